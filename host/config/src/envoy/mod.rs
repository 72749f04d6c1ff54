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
//! | listener with `tcp` | listener with `envoy.filters.network.tcp_proxy` instead |
//! | filter | `envoy.filters.http.wasm`, or `envoy.filters.network.wasm`, named like the filter |
//! | route | routes of the virtual hosts for its host patterns; filters that it does not name are disabled there |
//! | upstream, operator | cluster, named like the upstream, or `operator:` and the operator's name |

mod clusters;
mod document;
mod filters;
pub mod kubernetes;
mod listeners;
mod notes;
mod routes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::file::{LogLevel, Protocol};
use crate::policy::{Filter, Operator, Policy, Service, Upstream};
use clusters::{operator_cluster, upstream_cluster};
use document::Document;
use filters::wasm_filter;
pub use listeners::{TCP_FILTER_CHAIN_NAME, filter_chain_name};
use listeners::{buffer_limit, listener_document};
use notes::{filter_notes, policy_notes};

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
        Self::of_several(title, notes, std::slice::from_ref(document))
    }

    /// Several documents in one text.
    fn of_several(title: &str, notes: Vec<String>, documents: &[Document]) -> Self {
        // A name from the policy must not be able to end the comment.
        let line = |text: &str| text.replace(|c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}'), " ");
        let mut yaml = format!("# {}\n", line(title));
        if !notes.is_empty() {
            yaml.push_str("#\n# What Envoy does not do, or needs told in another way:\n");
        }
        for note in &notes {
            yaml.push_str(&format!("# - {}\n", line(note)));
        }
        for (index, document) in documents.iter().enumerate() {
            if index > 0 {
                yaml.push_str("---\n");
            }
            yaml.push_str(&document.render());
        }
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
        .enumerate()
        .map(|(index, upstream)| {
            let buffer = tcp_filters_of_upstream(policy, index);
            upstream_cluster(upstream, &options.system_authorities, buffer_limit(buffer))
        })
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
    let http_filters = || policy.filters_of(Protocol::Http).map(|(_, filter)| filter);
    let document = Document::map([("http_filters", Document::list(http_filters().map(wasm_filter)))]);
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
    for name in http_filters()
        .flat_map(|filter| &filter.allowed_upstreams)
        .filter_map(|index| policy.upstreams.get(*index))
        .map(|upstream| upstream.name.as_str())
        .collect::<std::collections::BTreeSet<_>>()
    {
        notes.push(format!("the filters call a cluster named `{name}`"));
    }
    notes.extend(http_filters().flat_map(|filter| filter_notes(policy, filter)));
    let title =
        format!("Envoy HTTP filters for {}. Made by `portcullis envoy-config`; edit the policy instead.", policy.name);
    Rendering::new(&title, notes, &document)
}

/// The filters that the bytes of a TCP upstream pass.
fn tcp_filters_of_upstream(policy: &Policy, upstream: usize) -> impl Iterator<Item = &Filter> {
    let forwards = policy.listeners.iter().filter_map(|listener| match &listener.service {
        Service::Tcp(forward) => Some(forward),
        Service::Http => None,
    });
    let filters = forwards.filter(move |forward| forward.upstream == upstream).flat_map(|forward| &forward.filters);
    filters.filter_map(|index| policy.filters.get(*index))
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

fn host_address(host: &str, port: u16) -> Document {
    Document::map([(
        "socket_address",
        Document::map([("address", host.into()), ("port_value", u64::from(port).into())]),
    )])
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
