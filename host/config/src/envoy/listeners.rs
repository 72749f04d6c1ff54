//! Listeners with their connection managers.

use std::net::{IpAddr, SocketAddr};

use super::document::Document;
use super::filters::wasm_filter;
use super::routes::route_config;
use super::{Options, duration, file_name, typed, upstream_cluster_name};
use crate::file::{FilterLimits, LogFormat, Protocol};
use crate::policy::{Filter, Listener, Network, Policy, Service, TcpForward};
use crate::units::Size;

pub(super) fn listener_document(policy: &Policy, listener: &Listener, options: &Options) -> Document {
    let address = options.listen.get(&listener.name).copied().unwrap_or(listener.address);
    let is_http = listener.service == Service::Http;
    let transport_socket = listener.tls.as_ref().map(|tls| {
        let certificate = Document::map([
            ("certificate_chain", file_name(&tls.certificate_path)),
            ("private_key", file_name(&tls.private_key_path)),
        ]);
        let alpn = is_http.then(|| Document::list(["h2".into(), "http/1.1".into()]));
        let context =
            Document::map([("tls_params", Document::map([("tls_minimum_protocol_version", "TLSv1_2".into())]))])
                .with_some("alpn_protocols", alpn)
                .with("tls_certificates", Document::list([certificate]));
        let kind = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
        typed("envoy.transport_sockets.tls", kind, [("common_tls_context", context)])
    });
    let chain = |name: &str, peer: Peer, filters: Vec<Document>| {
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
            .with("filters", Document::list([limit].into_iter().chain(filters)))
            .with_some("transport_socket", transport_socket.clone())
    };
    let (buffer, chains) = match &listener.service {
        Service::Http => {
            let http = |name, peer| chain(name, peer, vec![connection_manager(policy, listener, peer)]);
            // What a proxy says about its client (address, scheme) is believed only if the connection comes from one
            // that is trusted; so those connections have a chain of their own.
            let trusted = (!policy.trusted_proxies.is_empty()).then(|| http(TRUSTED_PROXIES, Peer::TrustedProxy));
            let chains = trusted.into_iter().chain([http(CLIENTS, Peer::Client)]).collect();
            (buffer_limit(policy.filters_of(Protocol::Http).map(|(_, filter)| filter)), chains)
        }
        Service::Tcp(forward) => {
            let filters = || forward.filters.iter().filter_map(|index| policy.filters.get(*index));
            let filters_then_proxy = filters().map(wasm_filter).chain([tcp_proxy(policy, listener, forward)]);
            (buffer_limit(filters()), vec![chain(CLIENTS, Peer::Client, filters_then_proxy.collect())])
        }
    };
    Document::map([
        ("name", listener.name.as_str().into()),
        ("traffic_direction", "INBOUND".into()),
        ("address", listening_address(address)),
        ("per_connection_buffer_limit_bytes", buffer.0.into()),
        ("filter_chains", Document::list(chains)),
    ])
}

const CLIENTS: &str = "clients";
/// The filter chain of a listener that forwards TCP connections.
pub const TCP_FILTER_CHAIN_NAME: &str = CLIENTS;
const TRUSTED_PROXIES: &str = "trusted-proxies";

/// The filter chain that takes a connection from this address.
#[must_use]
pub fn filter_chain_name(policy: &Policy, peer: IpAddr) -> &'static str {
    let trusted = policy.trusted_proxies.iter().any(|network| network.contains(peer));
    if trusted { TRUSTED_PROXIES } else { CLIENTS }
}

fn tcp_proxy(policy: &Policy, listener: &Listener, forward: &TcpForward) -> Document {
    let cluster = policy.upstreams.get(forward.upstream).map_or("", upstream_cluster_name);
    let mut proxy = vec![
        ("stat_prefix", Document::from(listener.name.as_str())),
        ("cluster", cluster.into()),
        ("idle_timeout", duration(listener.limits.idle_timeout)),
    ];
    if policy.logging.access_log {
        proxy.push(("access_log", Document::list([access_log(policy.logging.format, &TCP_FIELDS)])));
    }
    typed("envoy.filters.network.tcp_proxy", "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", proxy)
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    Client,
    TrustedProxy,
}

/// Envoy buffers what paused filters hold up to the connection's buffer limit.
pub(super) fn buffer_limit<'f>(filters: impl Iterator<Item = &'f Filter>) -> Size {
    let largest = filters.map(|filter| filter.limits.buffered_bytes).max();
    largest.unwrap_or(FilterLimits::default().buffered_bytes)
}

fn connection_manager(policy: &Policy, listener: &Listener, peer: Peer) -> Document {
    let limits = &listener.limits;
    let http_filters = policy.filters_of(Protocol::Http).map(|(_, filter)| wasm_filter(filter)).chain([typed(
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
        ("stream_idle_timeout", duration(limits.stream_idle_timeout)),
        (
            "common_http_protocol_options",
            Document::map([
                ("idle_timeout", duration(limits.idle_timeout)),
                ("max_headers_count", limits.header_count.into()),
            ]),
        ),
        // HTTP/2 has them always.
        ("http_protocol_options", Document::map([("enable_trailers", true.into())])),
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
        manager.push(("access_log", Document::list([access_log(policy.logging.format, &HTTP_FIELDS)])));
    }
    manager.push(("route_config", route_config(policy)));
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
const HTTP_FIELDS: [(&str, &str); 12] = [
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

const TCP_FIELDS: [(&str, &str); 9] = [
    ("time", "%START_TIME%"),
    ("client", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
    ("upstream", "%UPSTREAM_CLUSTER%"),
    ("upstream_address", "%UPSTREAM_HOST%"),
    ("details", "%DOWNSTREAM_LOCAL_CLOSE_REASON%"),
    ("flags", "%RESPONSE_FLAGS%"),
    ("received_bytes", "%BYTES_RECEIVED%"),
    ("sent_bytes", "%BYTES_SENT%"),
    ("duration_ms", "%DURATION%"),
];

fn access_log(format: LogFormat, fields: &[(&str, &str)]) -> Document {
    let format = match format {
        LogFormat::Json => {
            ("json_format", Document::map(fields.iter().map(|(name, value)| (*name, Document::from(*value)))))
        }
        LogFormat::Text => {
            let named = |(name, value): &(&str, &str)| {
                if *name == "time" { (*value).to_owned() } else { format!("{name}={value}") }
            };
            let line: Vec<String> = fields.iter().map(named).collect();
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
