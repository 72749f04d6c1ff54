//! What guests see of a stream and keep with it, as far as it takes a host that knows it: TLS, routes, connections.

use std::sync::Arc;
use std::time::Duration;

use portcullis_abi::{Certificate, ConnectionState, Ending, RouteInfo, StreamInfo, TlsInfo, UpstreamInfo};

use crate::support::{Host, bytes, plugin, request, response};

/// Logs the properties at these paths at the end of a stream, `-` for one that is absent.
fn reads(paths: &[&str]) -> String {
    let (mut data, mut code, mut at) = (String::new(), String::new(), 256);
    for path in paths {
        data.push_str(&format!("(data (i32.const {at}) \"{}\")\n", path.replace('.', "\\00")));
        code.push_str(&format!("(call $read (i32.const {at}) (i32.const {}))\n", path.len()));
        at += path.len();
    }
    format!(
        r#"(data (i32.const 16) "-") {data}
        (func $read (param i32 i32)
          (if (call $property (local.get 0) (local.get 1) (i32.const 200) (i32.const 204))
            (then (drop (call $log (i32.const 2) (i32.const 16) (i32.const 1))))
            (else (drop (call $log (i32.const 2) (i32.load (i32.const 200)) (i32.load (i32.const 204)))))))
        (func (export "proxy_on_log") (param i32) {code})"#
    )
}

/// What a guest sees at the end of a stream that was opened with `info`.
fn seen(paths: &[&str], info: StreamInfo, upstream: UpstreamInfo) -> Vec<String> {
    let mut host = Host::new(vec![plugin(&reads(paths))]);
    let id = host.worker.open(&[0], info);
    host.worker.request_headers(id, request(), true);
    host.worker.upstream_info(id, upstream);
    host.worker.response_headers(id, response(), false);
    host.worker.upstream_latency(id, Duration::from_nanos(0x6161_6161_6161_6161));
    host.worker.response_body(id, bytes("abc"), true);
    host.worker.finish(id, Ending::default());
    host.world.log.take()
}

fn certificate(name: &str) -> Arc<Certificate> {
    Arc::new(Certificate {
        subject: format!("CN={name}"),
        dns_names: vec![format!("{name}.example"), "other.example".into()],
        uris: Vec::new(),
        sha256: format!("sha256 of {name}"),
        pem: format!("PEM of {name}"),
    })
}

const SESSION: [&str; 9] = [
    "tls_version",
    "subject_local_certificate",
    "subject_peer_certificate",
    "dns_san_local_certificate",
    "dns_san_peer_certificate",
    "uri_san_local_certificate",
    "uri_san_peer_certificate",
    "sha256_peer_certificate_digest",
    "peer_certificate",
];

#[test]
fn certificates_of_both_sides_can_be_read() {
    let mut info = StreamInfo::default();
    info.tls = Some(TlsInfo {
        version: "TLSv1.3".into(),
        server_name: "sni.example".into(),
        local_certificate: Some(certificate("server")),
        peer_certificate: Some(certificate("client")),
    });
    let tls = info.tls.clone();
    let upstream = UpstreamInfo { tls, ..UpstreamInfo::default() };
    let expected = [
        "TLSv1.3",
        "CN=server",
        "CN=client",
        "server.example",
        "client.example",
        "-",
        "-",
        "sha256 of client",
        "PEM of client",
    ];
    for group in ["connection", "upstream"] {
        let paths = SESSION.map(|name| format!("{group}.{name}"));
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        assert_eq!(seen(&paths, info.clone(), upstream.clone()), expected, "{group}");
    }
    let own = seen(&["connection.requested_server_name", "connection.mtls"], info, upstream);
    assert_eq!(own, ["sni.example", "\u{1}"]);
}

#[test]
fn a_session_without_a_client_certificate_has_a_subject_without_a_name() {
    let mut info = StreamInfo::default();
    info.tls = Some(TlsInfo { version: "TLSv1.2".into(), ..TlsInfo::default() });
    let paths = SESSION.map(|name| format!("connection.{name}"));
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    assert_eq!(seen(&paths, info.clone(), UpstreamInfo::default()), ["TLSv1.2", "", "", "-", "-", "-", "-", "-", "-"]);
    assert_eq!(seen(&["connection.mtls"], info, UpstreamInfo::default()), ["\0"]);
}

#[test]
fn a_route_that_leads_to_no_upstream_has_no_cluster() {
    let paths = ["xds.route_name", "xds.cluster_name", "xds.cluster_metadata", "upstream.num_endpoints"];
    let mut info = StreamInfo::default();
    info.route = RouteInfo { name: "teapot".into(), ..RouteInfo::default() };
    assert_eq!(seen(&paths, info, UpstreamInfo::default()), ["teapot", "-", "-", "-"]);
}

#[test]
fn the_upstreams_time_is_known_at_the_end() {
    let upstream =
        UpstreamInfo { ready_after: Some(Duration::from_nanos(0x6262_6262_6262_6262)), ..Default::default() };
    let paths = ["response.backend_latency", "upstream.cx_pool_ready_duration"];
    assert_eq!(seen(&paths, StreamInfo::default(), upstream), ["aaaaaaaa", "bbbbbbbb"]);
}

#[test]
fn another_route_is_seen_once_it_was_taken() {
    let mut host = Host::new(vec![plugin(&reads(&["xds.route_name"]))]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), true);
    assert!(!host.worker.route_cleared(id), "nothing has changed");
    host.worker.rerouted(id, RouteInfo { name: "second".into(), ..RouteInfo::default() });
    host.worker.finish(id, Ending::default());
    assert_eq!(host.world.log.take(), ["second"]);
}

#[test]
fn a_changed_request_or_the_guests_word_has_the_route_chosen_again() {
    let data = r#"(data (i32.const 16) "x-b") (data (i32.const 32) "clear_route_cache")"#;
    let does = |code: &str| {
        let code = format!(
            r#"{data} (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (drop {code}) (i32.const 0))"#
        );
        let mut host = Host::new(vec![plugin(&code)]);
        let id = host.open(&[0]);
        host.worker.request_headers(id, request(), true);
        (host.worker.route_cleared(id), host.worker.route_cleared(id))
    };
    let add = "(call $add (i32.const 0) (i32.const 16) (i32.const 3) (i32.const 16) (i32.const 3))";
    let remove = "(call $remove (i32.const 0) (i32.const 16) (i32.const 3))";
    let clear = "(call $foreign (i32.const 32) (i32.const 17) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))";
    let read = "(call $get (i32.const 0) (i32.const 16) (i32.const 3) (i32.const 200) (i32.const 204))";
    for code in [add, remove, clear] {
        assert_eq!(does(code), (true, false), "{code}");
    }
    assert_eq!(does(read), (false, false));
}

#[test]
fn streams_share_what_is_kept_with_their_connection() {
    let keeps = r#"
        (data (i32.const 16) "declare_property") (data (i32.const 32) "\0a\04kept\28\02") (data (i32.const 48) "kept")
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
          (i32.eqz (call $foreign (i32.const 16) (i32.const 16) (i32.const 32) (i32.const 8) (i32.const 0) (i32.const 0))))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (call $say (i32.add (i32.const 48)
            (call $property (i32.const 48) (i32.const 4) (i32.const 200) (i32.const 204))))
          (drop (call $set_property (i32.const 48) (i32.const 4) (i32.const 48) (i32.const 4)))
          (i32.const 0))"#;
    let mut host = Host::new(vec![plugin(keeps)]);
    let (first, second) = (ConnectionState::default(), ConnectionState::default());
    for connection in [&first, &first, &second] {
        let mut info = StreamInfo::default();
        info.connection_state = connection.clone();
        let id = host.worker.open(&[0], info);
        host.worker.request_headers(id, request(), true);
        host.worker.finish(id, Ending::default());
    }
    assert_eq!(host.world.said(), "101", "NotFound, Ok on the same connection, NotFound on another");
    assert_eq!(format!("{first:?}"), r#"{"wasm.kept"}"#, "no values");
}
