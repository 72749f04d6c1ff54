//! Upstreams and operators as clusters.

use std::path::Path;
use std::time::Duration;

use super::document::Document;
use super::{
    duration, file_name, host_address, operator_cluster_name, socket_address, typed, typed_config,
    upstream_cluster_name,
};
use crate::policy::{Endpoint, Operator, Upstream};
use crate::units::Size;

/// `tcp_buffer`: what may wait of an answer for filters of TCP connections.
pub(super) fn upstream_cluster(upstream: &Upstream, system_authorities: &Path, tcp_buffer: Size) -> Document {
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
        let authorities = tls.ca.as_ref().map_or(system_authorities, |authorities| &authorities.path);
        let validation = Document::map([
            ("trusted_ca", file_name(authorities)),
            ("match_typed_subject_alt_names", Document::list([san])),
        ]);
        let alpn = if upstream.http2 { "h2" } else { "http/1.1" };
        // What is spoken on TCP connections only their ends know.
        let alpn = (!upstream.tcp).then(|| ("alpn_protocols", Document::list([alpn.into()])));
        let context = Document::map(alpn.into_iter().chain([("validation_context", validation)]));
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
        (!upstream.tcp).then_some(upstream.http2),
        Document::list(endpoints),
    )
    .with_some("per_connection_buffer_limit_bytes", upstream.tcp.then(|| tcp_buffer.0.into()))
    .with_some("transport_socket", transport_socket)
}

pub(super) fn operator_cluster(operator: &Operator, sockets: &Path) -> Document {
    let endpoint = pipe(&sockets.join(format!("{}.sock", operator.name)));
    let connections = operator.limits.concurrency.saturating_mul(operator.replicas.max);
    cluster(
        &operator_cluster_name(operator),
        "STATIC",
        Duration::from_secs(1),
        connections as usize,
        Some(false),
        Document::list([endpoint]),
    )
}

fn cluster(
    name: &str,
    kind: &str,
    connect_timeout: Duration,
    max_connections: usize,
    http2: Option<bool>,
    addresses: Document,
) -> Document {
    let Document::List(addresses) = addresses else {
        return addresses;
    };
    let lb_endpoints =
        addresses.into_iter().map(|address| Document::map([("endpoint", Document::map([("address", address)]))]));
    let protocol = http2.map(|http2| {
        let protocol = if http2 {
            ("http2_protocol_options", Document::map::<String>([]))
        } else {
            ("http_protocol_options", Document::map([("enable_trailers", true.into())]))
        };
        let options = typed_config(
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            [("explicit_http_config", Document::map([protocol]))],
        );
        Document::map([("envoy.extensions.upstreams.http.v3.HttpProtocolOptions", options)])
    });
    let threshold = Document::map([("max_connections", max_connections.into())]);
    Document::map([
        ("name", Document::from(name)),
        ("type", kind.into()),
        ("connect_timeout", duration(connect_timeout)),
        ("circuit_breakers", Document::map([("thresholds", Document::list([threshold]))])),
    ])
    .with_some("typed_extension_protocol_options", protocol)
    .with(
        "load_assignment",
        Document::map([
            ("cluster_name", name.into()),
            ("endpoints", Document::list([Document::map([("lb_endpoints", Document::list(lb_endpoints))])])),
        ]),
    )
}

fn pipe(path: &Path) -> Document {
    Document::map([("pipe", Document::map([("path", path.display().to_string().into())]))])
}
