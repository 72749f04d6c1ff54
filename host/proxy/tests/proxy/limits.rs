//! What clients, upstreams and filters may take of the proxy: each bound, reached.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::secure::{TLS, block_on, certificate, connector};
use crate::support::{
    Client, Doing, Folder, GUEST_ROUTE, PATIENCE, PLAIN_ROUTE, Proxy, Upstream, answer, guest, policy_yaml,
};

/// A policy with limits of its listener.
fn limited(upstream: &Upstream, limits: &str, rest: &str) -> String {
    policy_yaml(upstream.address, rest)
        .replace("address: \"127.0.0.1:0\" }]", &format!("address: \"127.0.0.1:0\", limits: {{ {limits} }} }}]"))
}

fn with_guest(upstream: &Upstream, limits: &str, callbacks: &str) -> Proxy {
    let folder = Folder::new();
    folder.write("guest.wasm", guest(&[], callbacks));
    Proxy::start(folder.policy(&limited(upstream, limits, GUEST_ROUTE)))
}

// ---- standing still

/// 3 stops everything: headers, and the body behind them.
const PAUSES_REQUESTS: &str =
    r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 3))"#;
const PAUSES_RESPONSES: &str =
    r#"(func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 3))"#;

#[test]
fn a_request_that_a_filter_pauses_for_ever_ends_and_leaves_nothing_behind() {
    let upstream = Upstream::echo();
    let proxy = with_guest(&upstream, "stream_idle_timeout: 100ms", PAUSES_REQUESTS);
    let response = proxy.get("/");
    assert_eq!((response.status, response.text().as_str()), (504, "stream timeout"));
    let mut client = Client::connect(proxy.address());
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody");
    assert_eq!(client.response(false).expect("a response").status, 504, "with a body");
    assert_eq!(upstream.received().len(), 0);
    proxy.wait_for_metric("portcullis_requests_active", 0.0);
}

#[test]
fn a_response_that_a_filter_pauses_for_ever_ends_and_leaves_nothing_behind() {
    let upstream = Upstream::echo();
    // The standstill's time is the longer of the listener's and the route's.
    let folder = Folder::new();
    folder.write("guest.wasm", guest(&[], PAUSES_RESPONSES));
    let route = GUEST_ROUTE.replace("upstream: api }", "upstream: api, timeout: 50ms }");
    let proxy = Proxy::start(folder.policy(&limited(&upstream, "stream_idle_timeout: 100ms", &route)));
    assert_eq!(proxy.get("/").status, 504);
    proxy.wait_for_metric("portcullis_requests_active", 0.0);
}

#[test]
fn a_filter_that_pauses_even_the_answer_about_its_pause_loses_the_connection() {
    let upstream = Upstream::echo();
    let proxy = with_guest(&upstream, "stream_idle_timeout: 100ms", &format!("{PAUSES_REQUESTS}{PAUSES_RESPONSES}"));
    let mut client = Client::connect(proxy.address());
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(client.is_closed());
    proxy.wait_for_metric("portcullis_requests_active", 0.0);
    proxy.wait_for_metric("portcullis_streams_reset_total", 1.0);
}

/// Asks for a response of 32 MiB, more than the sockets' buffers take, and takes nothing of it.
fn takes_nothing(limits: &str, route: &str) -> (Proxy, TcpStream) {
    let body = Arc::new(answer(&"x".repeat(32 << 20)));
    let upstream = Upstream::start(move |_| Doing::Answer(body.to_vec()));
    let route = PLAIN_ROUTE.replace("upstream: api }", &format!("upstream: api, {route} }}"));
    let proxy = Proxy::start(Folder::new().policy(&limited(&upstream, limits, &route)));
    let mut stream = TcpStream::connect(proxy.address()).expect("a connection");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("to send");
    let mut beginning = [0; 12];
    stream.read_exact(&mut beginning).expect("the beginning of the response");
    assert_eq!(String::from_utf8_lossy(&beginning), "HTTP/1.1 200", "before the route's time was up");
    (proxy, stream)
}

#[test]
fn a_client_that_takes_nothing_of_its_response_loses_the_connection() {
    let (proxy, _stream) = takes_nothing("stream_idle_timeout: 1s", "timeout: 1s");
    proxy.wait_for_metric("portcullis_connections_active", 0.0);
    assert_eq!(proxy.metric("portcullis_requests_active"), 0.0);
}

#[test]
fn a_client_that_takes_nothing_loses_the_connection_also_after_its_request_was_ended() {
    // The route's time ends the request long before anything counts as standing still.
    let (proxy, _stream) = takes_nothing("stream_idle_timeout: 4s", "timeout: 2s");
    proxy.wait_for_metric("portcullis_streams_reset_total", 1.0);
    assert_eq!(proxy.metric("portcullis_requests_active"), 0.0);
    proxy.wait_for_metric("portcullis_connections_active", 0.0);
}

#[test]
fn a_client_that_goes_on_sending_after_the_answer_loses_the_connection() {
    let upstream = Upstream::echo();
    let respond = "routes: [{ name: all, respond: { status: 413 } }]";
    let proxy = Proxy::start(Folder::new().policy(&limited(&upstream, "request_timeout: 60s", respond)));
    let mut stream = TcpStream::connect(proxy.address()).expect("a connection");
    stream.set_write_timeout(Some(PATIENCE)).expect("an option");
    stream.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n").expect("to send");
    let sent = (0..1_000).take_while(|_| stream.write_all(&[0; 1 << 20]).is_ok()).count();
    assert!(sent < 100, "{sent} MiB were taken after the answer");
    proxy.wait_for_metric("portcullis_connections_active", 0.0);
}

// ---- connections that only seem to live

fn preface() -> Vec<u8> {
    // The preface and an empty SETTINGS frame (RFC 9113, sections 3.4 and 6.5).
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat()
}

#[test]
fn an_http2_client_that_answers_nothing_does_not_keep_its_connection() {
    let upstream = Upstream::echo();
    let yaml = limited(&upstream, "idle_timeout: 100ms, header_timeout: 100ms", PLAIN_ROUTE);
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    let mut client = Client::connect(proxy.address());
    client.send(preface());
    // It says SETTINGS, GOAWAY and asks with PING whether that arrived; nobody answers.
    assert!(!client.rest().is_empty());
    proxy.wait_for_metric("portcullis_connections_active", 0.0);
}

#[test]
fn a_client_that_stops_in_the_middle_of_tls_does_not_keep_its_connection() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    certificate(&folder);
    let yaml = limited(&upstream, "header_timeout: 100ms", PLAIN_ROUTE).replacen("}]", &format!(", {TLS}"), 1);
    let proxy = Proxy::start(folder.policy(&yaml));
    let mut silent = Client::connect(proxy.address());
    assert!(silent.is_closed());
    let mut half = Client::connect(proxy.address());
    // The head of a TLS record of 512 bytes, of which none follow.
    half.send([0x16, 3, 1, 2, 0]);
    assert!(half.is_closed());
    proxy.wait_for_metric("portcullis_connections_active", 0.0);
}

#[test]
fn a_tls_client_that_agrees_on_http2_and_says_nothing_does_not_keep_its_connection() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    let pem = certificate(&folder);
    let yaml = limited(&upstream, "idle_timeout: 100ms, header_timeout: 1s", PLAIN_ROUTE).replacen(
        "}]",
        &format!(", {TLS}"),
        1,
    );
    let proxy = Proxy::start(folder.policy(&yaml));
    let address = proxy.address();
    let closed = block_on(async {
        let stream = tokio::net::TcpStream::connect(address).await.expect("a connection");
        let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
        let mut stream = connector(&pem, &[b"h2"]).connect(name, stream).await.expect("TLS");
        let mut rest = Vec::new();
        tokio::time::timeout(PATIENCE, tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest)).await.is_ok()
    });
    assert!(closed);
    proxy.wait_for_metric("portcullis_connections_active", 0.0);
}

// ---- HTTP/2

fn h2_request(path: &str) -> http::Request<Empty<bytes::Bytes>> {
    http::Request::builder().uri(format!("http://test.example{path}")).body(Empty::new()).expect("a request")
}

type Http2 = hyper::client::conn::http2::SendRequest<Empty<bytes::Bytes>>;

async fn http2(address: SocketAddr) -> Http2 {
    let stream = tokio::net::TcpStream::connect(address).await.expect("a connection");
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("a handshake");
    tokio::spawn(connection);
    sender
}

#[test]
fn an_http2_connection_has_a_hundred_streams_at_a_time() {
    let upstream = Upstream::echo();
    let proxy = with_guest(&upstream, "stream_idle_timeout: 1m", PAUSES_REQUESTS);
    let address = proxy.address();
    let (started, has_started) = channel::<Sender<()>>();
    let client = std::thread::spawn(move || {
        block_on(async {
            let sender = http2(address).await;
            let requests: Vec<_> = (0..120)
                .map(|_| {
                    let mut sender = sender.clone();
                    tokio::spawn(async move { drop(sender.send_request(h2_request("/")).await) })
                })
                .collect();
            let (end, ended) = channel();
            started.send(end).expect("a waiting test");
            tokio::task::spawn_blocking(move || ended.recv()).await.expect("a thread").expect("a signal");
            drop(requests);
        });
    });
    let end = has_started.recv_timeout(PATIENCE).expect("a client");
    proxy.wait_for_metric("portcullis_requests_active", 100.0);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(proxy.metric("portcullis_requests_active"), 100.0, "the others wait at the client");
    end.send(()).expect("a waiting client");
    client.join().expect("the client");
}

#[test]
fn the_head_of_an_http2_request_is_bounded_in_bytes_and_fields() {
    let upstream = Upstream::echo();
    let yaml = limited(&upstream, "header_bytes: 4KiB, header_count: 20", PLAIN_ROUTE);
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    let address = proxy.address();
    let status = |name: &'static str, value: String, count: usize| {
        block_on(async move {
            let mut request = h2_request("/");
            for _ in 0..count {
                request.headers_mut().append(name, value.parse().expect("a value"));
            }
            let response = http2(address).await.send_request(request).await.expect("a response");
            let status = response.status().as_u16();
            drop(response.into_body().collect().await);
            status
        })
    };
    assert_eq!(status("x-a", "a".repeat(3000), 1), 200);
    assert_eq!(status("x-a", "a".repeat(5000), 1), 431);
    assert_eq!(status("x-a", "a".into(), 20), 200);
    assert_eq!(status("x-a", "a".into(), 21), 431);
}

// ---- upstreams

#[test]
fn the_head_of_a_response_is_bounded_in_bytes_and_fields() {
    let upstream = Upstream::start(|received| {
        let number: usize = received.path().rsplit('/').next().and_then(|text| text.parse().ok()).expect("a number");
        let fields = if received.path().starts_with("/bytes/") {
            format!("X-A: {}\r\n", "a".repeat(number))
        } else {
            "X-A: a\r\n".repeat(number)
        };
        Doing::AnswerAndClose(format!("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n{fields}\r\n").into_bytes())
    });
    let proxy = Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)));
    assert_eq!(proxy.get("/bytes/60000").status, 200);
    assert_eq!(proxy.get("/bytes/70000").status, 502);
    assert_eq!(proxy.get("/fields/200").status, 200);
    assert_eq!(proxy.get("/fields/300").status, 502);
}

#[test]
fn a_connection_that_never_comes_about_is_given_up() {
    // It is accepted by the system, and nobody answers the first message of TLS.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address");
    let folder = Folder::new();
    std::fs::write(folder.path().join("ca.pem"), certificate(&folder)).expect("a file");
    let yaml = policy_yaml(address, PLAIN_ROUTE)
        .replace("\"] }", "\"], connect_timeout: 100ms, tls: { server_name: localhost, ca: ca.pem } }");
    let proxy = Proxy::start(folder.policy(&yaml));
    let response = proxy.get("/");
    assert_eq!(response.status, 503);
    assert!(response.text().ends_with("reset reason: connection timeout"), "{}", response.text());
}

/// Asks `count` times at once and lets the upstream answer when all have arrived.
fn ask_at_once(proxy: &Proxy, count: usize, has_begun: &std::sync::mpsc::Receiver<()>, tell: &Sender<()>) {
    let mut clients: Vec<Client> = (0..count).map(|_| Client::connect(proxy.address())).collect();
    for client in &mut clients {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    for _ in 0..count {
        has_begun.recv_timeout(PATIENCE).expect("a request at the upstream");
    }
    for _ in 0..count {
        tell.send(()).expect("a waiting upstream");
    }
    for client in &mut clients {
        assert_eq!(client.response(false).expect("a response").status, 200);
    }
}

#[test]
fn a_bounded_number_of_upstream_connections_is_kept_and_only_for_a_while() {
    let (tell, told) = channel();
    let told = Arc::new(Mutex::new(told));
    let (began, has_begun) = channel();
    let upstream = Upstream::start(move |_| {
        began.send(()).expect("a waiting test");
        Doing::AnswerWhenTold(answer("ok"), Arc::clone(&told))
    });
    let proxy = Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)));
    let opened = || proxy.metric("portcullis_upstream_connections_total{upstream=\"api\"}");
    ask_at_once(&proxy, 70, &has_begun, &tell);
    assert_eq!(opened(), 70.0);
    let began = Instant::now();
    ask_at_once(&proxy, 70, &has_begun, &tell);
    // On a machine so busy that the connections grew too old in between, none of them is used again.
    if began.elapsed() < Duration::from_secs(3) {
        assert_eq!(opened(), 76.0, "64 were kept");
    }
    let before = opened();
    std::thread::sleep(Duration::from_millis(4_100));
    ask_at_once(&proxy, 1, &has_begun, &tell);
    assert_eq!(opened(), before + 1.0, "none that was unused for four seconds");
}

#[test]
fn the_answer_to_a_callout_is_bounded() {
    let head = b"\x03\0\0\0\x07\0\0\0\x03\0\0\0\x05\0\0\0\x01\0\0\0\x0a\0\0\0\x01\0\0\0:method\0GET\0:path\0/\0:authority\0a\0";
    // Answers 200 if there is an answer, and 403 if there is none.
    let callbacks = r#"
        (global $stream (mut i32) (i32.const 0))
        (func (export "proxy_on_request_headers") (param $id i32) (param i32 i32) (result i32)
            (global.set $stream (local.get $id))
            (drop (call $http_call @upstream @head (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 5000) (i32.const 16)))
            (i32.const 1))
        (func (export "proxy_on_http_call_response") (param i32 i32) (param $fields i32) (param i32 i32)
            (drop (call $context (global.get $stream)))
            (drop (call $respond (select (i32.const 200) (i32.const 403) (local.get $fields))
                (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1))))"#;
    for (bytes, status) in [(1 << 20, 200), ((1 << 20) + 1, 403)] {
        let upstream = Upstream::start(move |_| Doing::Answer(answer(&"x".repeat(bytes))));
        let folder = Folder::new();
        folder.write("guest.wasm", guest(&[("upstream", b"api"), ("head", head)], callbacks));
        let route = GUEST_ROUTE.replace("wasm: guest.wasm", "wasm: guest.wasm, allowed_upstreams: [api]");
        let proxy = Proxy::start(folder.policy(&policy_yaml(upstream.address, &route)));
        assert_eq!(proxy.get("/").status, status, "{bytes} bytes");
    }
}

// ---- the admin endpoint

#[test]
fn the_admin_endpoint_has_a_bounded_number_of_connections_and_little_patience() {
    let upstream = Upstream::echo();
    let proxy = Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)));
    let admin = proxy.handle.admin_address().expect("an address");
    let mut held: Vec<Client> = (0..64).map(|_| Client::connect(admin)).collect();
    assert_eq!(held[0].exchange("GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n").status, 200, "all were accepted by now");
    assert_eq!(held[63].exchange("GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n").status, 200);
    assert!(Client::connect(admin).is_closed());
    held[1].send("GET /readyz HTTP/1.1\r\nHo");
    // Ten seconds, by which all of them are ended.
    assert!(held.iter_mut().all(|client| !String::from_utf8_lossy(&client.rest()).contains("200 OK")));
    assert_eq!(proxy.admin("/readyz").status, 200);
}

#[test]
fn the_head_of_a_request_to_the_admin_endpoint_is_bounded() {
    let upstream = Upstream::echo();
    let proxy = Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)));
    let mut client = Client::connect(proxy.handle.admin_address().expect("an address"));
    let response = client.exchange(&format!("GET / HTTP/1.1\r\nHost: a\r\nX-A: {}\r\n\r\n", "a".repeat(20_000)));
    assert_eq!(response.status, 431);
}
