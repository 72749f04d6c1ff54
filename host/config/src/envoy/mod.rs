//! The policy as configuration for Envoy, which enforces the same with the same `.wasm` files.
//!
//! Tested with the Envoy releases named in `envoy/README.md`: every rendering is checked by `envoy --mode validate`,
//! and a running Envoy is asked for the route of awkward requests. What the policy holds and Envoy cannot enforce
//! is returned as notes, which also stand as comments at the top of the rendering: nothing is dropped in silence.
//!
//! How the parts correspond:
//!
//! | policy | Envoy |
//! |---|---|
//! | listener | listener with one HTTP connection manager, connection limit filter, TLS transport socket |
//! | filter | `envoy.filters.http.wasm`, named like the filter |
//! | route | routes of the virtual hosts for its host patterns; filters that it does not name are disabled there |
//! | upstream, operator | cluster, named like the upstream, or `operator:` and the operator's name |

mod document;
mod routes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::file::{FailurePolicy, FilterLimits, LogFormat};
use crate::policy::{Endpoint, Filter, Listener, Network, Operator, Policy, Upstream};
use crate::{LogLevel, Size};
use document::Document;

/// What differs from the policy in this rendering.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder in which `portcullis operators run` makes its sockets, `<operator>.sock`.
    pub operator_sockets: PathBuf,
    /// Other addresses for listeners, by name: for an Envoy beside a host that already has the policy's.
    pub listen: BTreeMap<String, SocketAddr>,
    /// Another address for the admin endpoints.
    pub admin: Option<SocketAddr>,
    /// The system's certificate authorities, for upstreams with `tls` but without `ca`: Envoy must be told a file.
    pub system_authorities: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            operator_sockets: PathBuf::from("/run/portcullis/operators"),
            listen: BTreeMap::new(),
            admin: None,
            // Debian, Ubuntu, Alpine, Arch and the Envoy container images.
            system_authorities: PathBuf::from("/etc/ssl/certs/ca-certificates.crt"),
        }
    }
}

/// Envoy configuration, and what it leaves out.
#[derive(Clone, Debug)]
pub struct Rendering {
    /// The YAML text, with the notes as comments at its top.
    pub yaml: String,
    /// What the policy holds and Envoy cannot enforce, or needs told in another way; one sentence each.
    pub notes: Vec<String>,
}

impl Rendering {
    fn new(title: &str, notes: Vec<String>, document: &Document) -> Self {
        // A name from the policy must not be able to end the comment.
        let line = |text: &str| text.replace(|c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}'), " ");
        let mut yaml = format!("# {}\n", line(title));
        if !notes.is_empty() {
            yaml.push_str("#\n# What Envoy does not do, or needs told in another way:\n");
        }
        for note in &notes {
            yaml.push_str(&format!("# - {}\n", line(note)));
        }
        yaml.push_str(&document.render());
        Self { yaml, notes }
    }
}

/// A whole bootstrap, for `envoy -c`.
#[must_use]
pub fn render_bootstrap(policy: &Policy, options: &Options) -> Rendering {
    let admin = options.admin.or(policy.admin);
    let listeners = policy.listeners.iter().map(|listener| listener_document(policy, listener, options));
    let clusters = policy
        .upstreams
        .iter()
        .map(|upstream| upstream_cluster(upstream, &options.system_authorities))
        .chain(policy.operators.iter().map(|operator| operator_cluster(operator, &options.operator_sockets)));
    let document =
        Document::map([("node", Document::map([("id", "portcullis".into()), ("cluster", "portcullis".into())]))])
            .with_some(
                "admin",
                admin.map(|address| {
                    // The endpoints must answer when clients have taken all connections.
                    let document = Document::map([("address", socket_address(address))]);
                    document.with("ignore_global_conn_limit", true)
                }),
            )
            .with("stats_config", stats_config())
            .with("overload_manager", overload_manager(policy))
            .with(
                "static_resources",
                Document::map([("listeners", Document::list(listeners)), ("clusters", Document::list(clusters))]),
            );
    let mut notes =
        vec![format!("start Envoy with `--concurrency {}` to get as many workers as the policy says", policy.workers)];
    if policy.logging.level != LogLevel::Info {
        notes.push(format!("start Envoy with `--log-level {}`", level_name(policy.logging.level)));
    }
    if policy.admin.is_some() {
        notes.push("the admin address serves Envoy's own endpoints: `/ready` for `/readyz`, `/stats/prometheus` for `/metrics`".to_owned());
    }
    for upstream in &policy.upstreams {
        if upstream.tls.as_ref().is_some_and(|tls| tls.ca.is_none()) {
            let file = options.system_authorities.display();
            notes.push(format!(
                "upstream `{}`: the system's certificate authorities are read from `{file}`",
                upstream.name
            ));
        }
    }
    notes.extend(policy_notes(policy));
    let title =
        format!("Envoy bootstrap for {}. Made by `portcullis envoy-config`; edit the policy instead.", policy.name);
    Rendering::new(&title, notes, &document)
}

/// Only the filters, for an Envoy whose listeners, routes and clusters come from elsewhere. The list goes in front
/// of `envoy.filters.http.router`.
#[must_use]
pub fn render_http_filters(policy: &Policy) -> Rendering {
    let document = Document::map([("http_filters", Document::list(policy.filters.iter().map(wasm_filter)))]);
    let mut notes = vec![
        "Envoy must normalise paths as the policy does: `normalize_path: true`, `merge_slashes: true`, \
         `path_with_escaped_slashes_action: REJECT_REQUEST`, `strip_trailing_host_dot: true`"
            .to_owned(),
        "broken escapes, `..;` spelled with escapes and authorities that are not one host must be refused by routes, as \
         in the whole bootstrap"
            .to_owned(),
        "metrics get their labels `rule` and `reason` from `stats_tags`, as in the whole bootstrap".to_owned(),
        "routes that do not pass every filter need `typed_per_filter_config` with \
         `envoy.config.route.v3.FilterConfig` and `disabled: true`"
            .to_owned(),
    ];
    for name in policy
        .filters
        .iter()
        .flat_map(|filter| &filter.allowed_upstreams)
        .filter_map(|index| policy.upstreams.get(*index))
        .map(|upstream| upstream.name.as_str())
        .collect::<std::collections::BTreeSet<_>>()
    {
        notes.push(format!("the filters call a cluster named `{name}`"));
    }
    notes.extend(policy.filters.iter().flat_map(|filter| filter_notes(policy, filter)));
    let title =
        format!("Envoy HTTP filters for {}. Made by `portcullis envoy-config`; edit the policy instead.", policy.name);
    Rendering::new(&title, notes, &document)
}

/// The cluster that an upstream is rendered to: filters' callouts use this name.
#[must_use]
pub fn upstream_cluster_name(upstream: &Upstream) -> &str {
    &upstream.name
}

/// The cluster that an operator is rendered to. No upstream can have such a name.
#[must_use]
pub fn operator_cluster_name(operator: &Operator) -> String {
    format!("operator:{}", operator.name)
}

fn policy_notes(policy: &Policy) -> Vec<String> {
    let mut notes: Vec<String> = policy.filters.iter().flat_map(|filter| filter_notes(policy, filter)).collect();
    let buffers: Vec<Size> = policy.filters.iter().map(|filter| filter.limits.buffered_bytes).collect();
    if buffers.iter().any(|size| Some(size) != buffers.first()) {
        notes.push(format!(
            "`limits.buffered_bytes` differs between filters; Envoy has one buffer limit, the largest: {}",
            buffer_limit(policy)
        ));
    }
    for upstream in &policy.upstreams {
        notes.push(format!(
            "upstream `{}`: Envoy counts `max_connections` over all workers, and lets 1024 requests wait for a connection instead of answering 503",
            upstream.name
        ));
    }
    if !policy.operators.is_empty() {
        notes.push("operators run outside Envoy: start `portcullis operators run`, which enforces their permissions and limits".to_owned());
    }
    notes
}

/// What Envoy does not enforce for one filter.
fn filter_notes(policy: &Policy, filter: &Filter) -> Vec<String> {
    let name = &filter.name;
    let limits = &filter.limits;
    let default = FilterLimits::default();
    let mut notes = vec![
        format!(
            "filter `{name}`: no CPU limit, so `limits.callback_time` ({}) is not enforced and an endless loop stops a worker",
            limits.callback_time
        ),
        format!("filter `{name}`: memory is capped at 1GiB per VM, not at `limits.memory` ({})", limits.memory),
        format!(
            "filter `{name}`: no limits on callouts ({}), log lines ({}/s), shared data ({} keys, {}), queues ({}) and metrics ({})",
            limits.callouts,
            limits.log_lines_per_second,
            limits.shared_data_entries,
            limits.shared_data_bytes,
            limits.queue_length,
            limits.metrics
        ),
    ];
    if limits.map_bytes != default.map_bytes || limits.map_pairs != default.map_pairs {
        notes.push(format!(
            "filter `{name}`: header maps are limited to {} and {} pairs, not to {} and {}",
            default.map_bytes, default.map_pairs, limits.map_bytes, limits.map_pairs
        ));
    }
    let allowed: Vec<&str> = filter
        .allowed_upstreams
        .iter()
        .filter_map(|index| policy.upstreams.get(*index))
        .map(|upstream| upstream.name.as_str())
        .collect();
    let allowed = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
    notes.push(format!("filter `{name}`: it can call every cluster; `allowed_upstreams` ({allowed}) is not enforced"));
    if filter.settable_fields.is_some() {
        notes.push(format!("filter `{name}`: it can write every field; `settable_fields` is not enforced"));
    }
    if filter.failure_policy == FailurePolicy::FailOpen {
        notes.push(format!("filter `{name}`: after a crash, requests pass WITHOUT it (`failure_policy: fail_open`)"));
    }
    notes
}

/// Splits `..._denied_total.rule.<rule>.reason.<reason>` into a name and labels, as our own `/metrics` does. The
/// first group is removed from the name, the second is the label's value.
fn stats_config() -> Document {
    let tag = |name: &str, regex: &str| Document::map([("tag_name", name.into()), ("regex", regex.into())]);
    Document::map([(
        "stats_tags",
        Document::list([
            tag("rule", r"^wasmcustom\.portcullis_[a-z0-9_]+(\.rule\.([a-z0-9_-]+))"),
            tag("reason", r"^wasmcustom\.portcullis_[a-z0-9_.-]+(\.reason\.([a-z0-9_]+))$"),
        ]),
    )])
}

/// The sum of the listeners' `max_connections`. Each filter chain counts its own connections, and a listener with
/// trusted proxies has two.
fn overload_manager(policy: &Policy) -> Document {
    let connections = policy.listeners.iter().map(|listener| listener.limits.max_connections).sum::<usize>();
    let monitor = typed(
        "envoy.resource_monitors.global_downstream_max_connections",
        "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        [("max_active_downstream_connections", connections.into())],
    );
    Document::map([("resource_monitors", Document::list([monitor]))])
}

fn listener_document(policy: &Policy, listener: &Listener, options: &Options) -> Document {
    let address = options.listen.get(&listener.name).copied().unwrap_or(listener.address);
    let transport_socket = listener.tls.as_ref().map(|tls| {
        let certificate = Document::map([
            ("certificate_chain", file_name(&tls.certificate_path)),
            ("private_key", file_name(&tls.private_key_path)),
        ]);
        let context = Document::map([
            ("tls_params", Document::map([("tls_minimum_protocol_version", "TLSv1_2".into())])),
            ("alpn_protocols", Document::list(["h2".into(), "http/1.1".into()])),
            ("tls_certificates", Document::list([certificate])),
        ]);
        let kind = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
        typed("envoy.transport_sockets.tls", kind, [("common_tls_context", context)])
    });
    let chain = |name: &str, peer: Peer| {
        let limit = typed(
            "envoy.filters.network.connection_limit",
            "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit",
            [
                ("stat_prefix", listener.name.as_str().into()),
                ("max_connections", listener.limits.max_connections.into()),
            ],
        );
        Document::map([("name", Document::from(name))])
            .with_some(
                "filter_chain_match",
                (peer == Peer::TrustedProxy)
                    .then(|| Document::map([("direct_source_prefix_ranges", cidr_ranges(&policy.trusted_proxies))])),
            )
            .with("filters", Document::list([limit, connection_manager(policy, listener, peer)]))
            .with_some("transport_socket", transport_socket.clone())
    };
    // What a proxy says about its client (address, scheme) is believed only if the connection comes from one that
    // is trusted; so those connections have a chain of their own.
    let trusted = (!policy.trusted_proxies.is_empty()).then(|| chain("trusted-proxies", Peer::TrustedProxy));
    let chains = trusted.into_iter().chain([chain("clients", Peer::Client)]);
    Document::map([
        ("name", listener.name.as_str().into()),
        ("address", listening_address(address)),
        ("per_connection_buffer_limit_bytes", buffer_limit(policy).0.into()),
        ("filter_chains", Document::list(chains)),
    ])
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    Client,
    TrustedProxy,
}

/// Envoy buffers what paused filters hold up to the connection's buffer limit.
fn buffer_limit(policy: &Policy) -> Size {
    let largest = policy.filters.iter().map(|filter| filter.limits.buffered_bytes).max();
    largest.unwrap_or(FilterLimits::default().buffered_bytes)
}

fn connection_manager(policy: &Policy, listener: &Listener, peer: Peer) -> Document {
    let limits = &listener.limits;
    let http_filters = policy.filters.iter().map(wasm_filter).chain([typed(
        "envoy.filters.http.router",
        "envoy.extensions.filters.http.router.v3.Router",
        // Otherwise clients learn how long the upstream took, and upstreams get fields that our host does not send.
        [("suppress_envoy_headers", true.into())],
    )]);
    let mut manager = vec![("stat_prefix", Document::from(listener.name.as_str())), ("codec_type", "AUTO".into())];
    match peer {
        Peer::Client => manager.push(("use_remote_address", true.into())),
        Peer::TrustedProxy => {
            manager.push(("use_remote_address", false.into()));
            manager
                .push(("original_ip_detection_extensions", Document::list([forwarded_for(&policy.trusted_proxies)])));
        }
    }
    manager.extend([
        // One spelling of a path for routes, filters and upstreams: see `Target::parse`, which does the same.
        ("normalize_path", true.into()),
        ("merge_slashes", true.into()),
        ("path_with_escaped_slashes_action", "REJECT_REQUEST".into()),
        ("strip_trailing_host_dot", true.into()),
        ("server_header_transformation", "PASS_THROUGH".into()),
        ("max_request_headers_kb", (limits.header_bytes / 1024).into()),
        ("request_headers_timeout", duration(limits.header_timeout)),
        ("request_timeout", duration(limits.request_timeout)),
        (
            "common_http_protocol_options",
            Document::map([
                ("idle_timeout", duration(limits.idle_timeout)),
                ("max_headers_count", limits.header_count.into()),
            ]),
        ),
        // What one HTTP/2 connection may hold open and unread, as Envoy's own advice for edge proxies has it.
        (
            "http2_protocol_options",
            Document::map([
                ("max_concurrent_streams", Document::from(100_u64)),
                ("initial_stream_window_size", 65_536_u64.into()),
                ("initial_connection_window_size", 1_048_576_u64.into()),
            ]),
        ),
        ("early_header_mutation_extensions", Document::list([dropped_fields()])),
    ]);
    if policy.logging.access_log {
        manager.push(("access_log", Document::list([access_log(policy.logging.format)])));
    }
    manager.push(("route_config", routes::route_config(policy)));
    manager.push(("http_filters", Document::list(http_filters)));
    typed(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        manager,
    )
}

/// Fields by which clients could give orders to Envoy, and the request id, which is always made here.
fn dropped_fields() -> Document {
    let prefix = Document::map([("prefix", "x-envoy-".into())]);
    let mutations = [
        Document::map([("remove", Document::from("x-request-id"))]),
        Document::map([("remove_on_match", Document::map([("key_matcher", prefix)]))]),
    ];
    typed(
        "envoy.http.early_header_mutation.header_mutation",
        "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        [("mutations", Document::list(mutations))],
    )
}

fn forwarded_for(networks: &[Network]) -> Document {
    typed(
        "envoy.http.original_ip_detection.xff",
        "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig",
        [("xff_trusted_cidrs", Document::map([("cidrs", cidr_ranges(networks))])), ("skip_xff_append", false.into())],
    )
}

fn cidr_ranges(networks: &[Network]) -> Document {
    Document::list(networks.iter().map(|network| {
        Document::map([
            ("address_prefix", network.address.to_string().into()),
            ("prefix_len", u64::from(network.prefix).into()),
        ])
    }))
}

/// No query, no field that may hold a credential.
fn access_log(format: LogFormat) -> Document {
    const FIELDS: [(&str, &str); 12] = [
        ("time", "%START_TIME%"),
        ("request_id", "%REQ(X-REQUEST-ID)%"),
        ("client", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
        ("method", "%REQ(:METHOD)%"),
        ("host", "%REQ(:AUTHORITY)%"),
        ("path", "%PATH(NQ)%"),
        ("protocol", "%PROTOCOL%"),
        ("status", "%RESPONSE_CODE%"),
        ("details", "%RESPONSE_CODE_DETAILS%"),
        ("route", "%ROUTE_NAME%"),
        ("response_bytes", "%BYTES_SENT%"),
        ("duration_ms", "%DURATION%"),
    ];
    let format = match format {
        LogFormat::Json => ("json_format", Document::map(FIELDS.map(|(name, value)| (name, value.into())))),
        LogFormat::Text => {
            let line =
                FIELDS.map(|(name, value)| if name == "time" { value.to_owned() } else { format!("{name}={value}") });
            let line = Document::map([("inline_string", format!("{}\n", line.join(" ")).into())]);
            ("text_format_source", line)
        }
    };
    typed(
        "envoy.access_loggers.stdout",
        "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
        [("log_format", Document::map([format]))],
    )
}

fn wasm_filter(filter: &Filter) -> Document {
    let environment = (!filter.environment_pass.is_empty() || !filter.environment_set.is_empty()).then(|| {
        Document::map([
            ("host_env_keys", Document::list(filter.environment_pass.iter().map(|name| name.as_str().into()))),
            (
                "key_values",
                Document::map(
                    filter.environment_set.iter().map(|(name, value)| (name.as_str(), value.as_str().into())),
                ),
            ),
        ])
    });
    let code = Document::map([("local", file_name(&filter.module_path))]);
    let vm_config = Document::map([
        ("vm_id", Document::from(filter.vm_id.as_str())),
        ("runtime", "envoy.wasm.runtime.v8".into()),
        ("code", code),
    ])
    .with_some("configuration", configuration(&filter.vm_configuration))
    .with_some("environment_variables", environment);
    let failure_policy = match filter.failure_policy {
        FailurePolicy::FailReload => "FAIL_RELOAD",
        FailurePolicy::FailClosed => "FAIL_CLOSED",
        FailurePolicy::FailOpen => "FAIL_OPEN",
    };
    let reload = (filter.failure_policy == FailurePolicy::FailReload).then(|| {
        Document::map([(
            "backoff",
            Document::map([
                ("base_interval", duration(filter.reload_base_interval)),
                ("max_interval", duration(filter.reload_max_interval)),
            ]),
        )])
    });
    let config = Document::map([
        ("name", Document::from(filter.name.as_str())),
        ("root_id", filter.root_id.as_str().into()),
        ("vm_config", vm_config),
    ])
    .with_some("configuration", configuration(&filter.configuration))
    .with("failure_policy", failure_policy)
    .with_some("reload_config", reload)
    .with("allow_on_headers_stop_iteration", filter.allow_on_headers_stop_iteration)
    .with_some(
        "capability_restriction_config",
        filter.capabilities.as_ref().map(|capabilities| {
            // Envoy's list covers callbacks as well; those are always delivered.
            let names = CALLBACKS.iter().copied().chain(capabilities.iter().map(String::as_str));
            Document::map([(
                "allowed_capabilities",
                Document::map(names.map(|name| (name, Document::map::<String>([])))),
            )])
        }),
    );
    typed(&filter.name, "envoy.extensions.filters.http.wasm.v3.Wasm", [("config", config)])
}

/// Callbacks of Proxy-Wasm 0.1.0 to 0.2.1 and Envoy's own, as Envoy names them in `allowed_capabilities`.
const CALLBACKS: [&str; 32] = [
    "proxy_on_context_create",
    "proxy_on_vm_start",
    "proxy_on_configure",
    "proxy_validate_configuration",
    "proxy_on_tick",
    "proxy_on_queue_ready",
    "proxy_on_done",
    "proxy_on_log",
    "proxy_on_delete",
    "proxy_on_new_connection",
    "proxy_on_downstream_data",
    "proxy_on_upstream_data",
    "proxy_on_downstream_connection_close",
    "proxy_on_upstream_connection_close",
    "proxy_on_request_headers",
    "proxy_on_request_body",
    "proxy_on_request_trailers",
    "proxy_on_request_metadata",
    "proxy_on_response_headers",
    "proxy_on_response_body",
    "proxy_on_response_trailers",
    "proxy_on_response_metadata",
    "proxy_on_http_call_response",
    "proxy_on_grpc_receive_initial_metadata",
    "proxy_on_grpc_receive",
    "proxy_on_grpc_receive_trailing_metadata",
    "proxy_on_grpc_close",
    "proxy_on_foreign_function",
    "proxy_on_memory_allocate",
    "envoy_on_resolve_dns",
    "envoy_on_stats_update",
    "proxy_on_stats_update",
];

/// A configuration as Envoy hands it to the module unchanged: text, or bytes where it is not text.
fn configuration(bytes: &[u8]) -> Option<Document> {
    if bytes.is_empty() {
        return None;
    }
    let (kind, value) = match std::str::from_utf8(bytes) {
        Ok(text) => ("StringValue", text.to_owned()),
        Err(_) => ("BytesValue", STANDARD.encode(bytes)),
    };
    Some(Document::map([
        ("@type", format!("type.googleapis.com/google.protobuf.{kind}").into()),
        ("value", value.into()),
    ]))
}

fn upstream_cluster(upstream: &Upstream, system_authorities: &Path) -> Document {
    let named = upstream.endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Name { .. }));
    let endpoints = upstream.endpoints.iter().map(|endpoint| match endpoint {
        Endpoint::Address(address) => socket_address(*address),
        Endpoint::Name { host, port } => host_address(host, *port),
        Endpoint::Unix(path) => pipe(path),
    });
    let transport_socket = upstream.tls.as_ref().map(|tls| {
        let san_type = if tls.server_name.parse::<std::net::IpAddr>().is_ok() { "IP_ADDRESS" } else { "DNS" };
        let san = Document::map([
            ("san_type", san_type.into()),
            ("matcher", Document::map([("exact", tls.server_name.as_str().into())])),
        ]);
        let authorities = match &tls.ca {
            Some(authorities) => ("trusted_ca", file_name(&authorities.path)),
            None => ("trusted_ca", file_name(system_authorities)),
        };
        let validation = Document::map([authorities, ("match_typed_subject_alt_names", Document::list([san]))]);
        let alpn = if upstream.http2 { "h2" } else { "http/1.1" };
        let context =
            Document::map([("alpn_protocols", Document::list([alpn.into()])), ("validation_context", validation)]);
        // SNI holds names only (RFC 6066, section 3).
        let sni = (san_type == "DNS").then(|| ("sni", Document::from(tls.server_name.as_str())));
        let fields = sni.into_iter().chain([("common_tls_context", context)]);
        typed("envoy.transport_sockets.tls", "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", fields)
    });
    cluster(
        upstream_cluster_name(upstream),
        if named { "STRICT_DNS" } else { "STATIC" },
        upstream.connect_timeout,
        upstream.max_connections,
        upstream.http2,
        Document::list(endpoints),
    )
    .with_some("transport_socket", transport_socket)
}

fn operator_cluster(operator: &Operator, sockets: &Path) -> Document {
    let endpoint = pipe(&sockets.join(format!("{}.sock", operator.name)));
    let connections = operator.limits.concurrency.saturating_mul(operator.replicas.max);
    cluster(
        &operator_cluster_name(operator),
        "STATIC",
        Duration::from_secs(1),
        connections as usize,
        false,
        Document::list([endpoint]),
    )
}

fn cluster(
    name: &str,
    kind: &str,
    connect_timeout: Duration,
    max_connections: usize,
    http2: bool,
    addresses: Document,
) -> Document {
    let Document::List(addresses) = addresses else {
        return addresses;
    };
    let lb_endpoints =
        addresses.into_iter().map(|address| Document::map([("endpoint", Document::map([("address", address)]))]));
    let protocol = if http2 { "http2_protocol_options" } else { "http_protocol_options" };
    let protocol = typed_config(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        [("explicit_http_config", Document::map([(protocol, Document::map::<String>([]))]))],
    );
    let threshold = Document::map([("max_connections", max_connections.into())]);
    Document::map([
        ("name", Document::from(name)),
        ("type", kind.into()),
        ("connect_timeout", duration(connect_timeout)),
        ("circuit_breakers", Document::map([("thresholds", Document::list([threshold]))])),
        (
            "typed_extension_protocol_options",
            Document::map([("envoy.extensions.upstreams.http.v3.HttpProtocolOptions", protocol)]),
        ),
        (
            "load_assignment",
            Document::map([
                ("cluster_name", name.into()),
                ("endpoints", Document::list([Document::map([("lb_endpoints", Document::list(lb_endpoints))])])),
            ]),
        ),
    ])
}

fn typed<'k>(name: &str, kind: &str, fields: impl IntoIterator<Item = (&'k str, Document)>) -> Document {
    Document::map([("name", name.into()), ("typed_config", typed_config(kind, fields))])
}

fn typed_config<'k>(kind: &str, fields: impl IntoIterator<Item = (&'k str, Document)>) -> Document {
    let kind = ("@type", Document::from(format!("type.googleapis.com/{kind}")));
    Document::map([kind].into_iter().chain(fields))
}

fn socket_address(address: SocketAddr) -> Document {
    host_address(&address.ip().to_string(), address.port())
}

/// `[::]` takes IPv4 connections as well in our host, as Linux has it; Envoy must be told.
fn listening_address(address: SocketAddr) -> Document {
    let both = address.is_ipv6() && address.ip().is_unspecified();
    let mut fields =
        vec![("address", Document::from(address.ip().to_string())), ("port_value", u64::from(address.port()).into())];
    if both {
        fields.push(("ipv4_compat", true.into()));
    }
    Document::map([("socket_address", Document::map(fields))])
}

fn host_address(host: &str, port: u16) -> Document {
    Document::map([(
        "socket_address",
        Document::map([("address", host.into()), ("port_value", u64::from(port).into())]),
    )])
}

fn pipe(path: &Path) -> Document {
    Document::map([("pipe", Document::map([("path", path.display().to_string().into())]))])
}

fn file_name(path: &Path) -> Document {
    Document::map([("filename", path.display().to_string().into())])
}

/// Protobuf's JSON form: seconds with a fraction.
fn duration(time: Duration) -> Document {
    let millis = time.as_millis();
    if millis.is_multiple_of(1000) {
        format!("{}s", millis / 1000).into()
    } else {
        format!("{}.{:03}s", millis / 1000, millis % 1000).into()
    }
}

fn level_name(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Trace => "trace",
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    }
}
