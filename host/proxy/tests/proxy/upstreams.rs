//! What an upstream may do, and what its clients are told.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use crate::support::{Client, Doing, Folder, PATIENCE, PLAIN_ROUTE, Proxy, Upstream, answer, policy_yaml};

fn proxy_to(upstream: &Upstream) -> Proxy {
    Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)))
}

#[test]
fn an_upstream_that_refuses_connections_is_answered_in_envoys_words() {
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.local_addr().expect("an address")
    };
    let proxy = Proxy::start(Folder::new().policy(&policy_yaml(nobody, PLAIN_ROUTE)));
    let response = proxy.get("/");
    assert_eq!(response.status, 503);
    assert_eq!(response.field("content-type"), Some("text/plain"));
    assert_eq!(
        response.text(),
        "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure"
    );
    assert_eq!(proxy.metric("portcullis_upstream_failures_total{upstream=\"api\",reason=\"connect\"}"), 1.0);
    assert!(proxy.end().contains(" 503 upstream_reset_before_response_started{remote_connection_failure} "));
}

#[test]
fn failures_before_the_response_are_told_apart() {
    let (_never, told) = channel();
    let told = Arc::new(Mutex::new(told));
    let upstream = Upstream::start(move |received| match received.path() {
        "/close" => Doing::Close,
        "/garbage" => Doing::AnswerAndClose(b"SSH-2.0-OpenSSH_9.9\r\n".to_vec()),
        "/ambiguous" => {
            Doing::Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec())
        }
        "/upgrade" => {
            Doing::Answer(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n".to_vec())
        }
        "/large" => Doing::Answer(format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(100_000)).into_bytes()),
        _ => Doing::AnswerWhenTold(Vec::new(), Arc::clone(&told)),
    });
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE).replace("\"] }", "\"], request_timeout: 100ms }");
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    for (path, status, text) in [
        ("/close", 503, "reset reason: connection termination"),
        ("/garbage", 502, "reset reason: protocol error"),
        ("/ambiguous", 502, "reset reason: protocol error"),
        ("/upgrade", 502, "reset reason: protocol error"),
        ("/large", 502, "reset reason: protocol error"),
        ("/never", 504, "upstream request timeout"),
    ] {
        let mut client = Client::connect(proxy.address());
        client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n"));
        let response = client.response(false).unwrap_or_else(|| panic!("no response to {path}"));
        assert_eq!(response.status, status, "{path}: {}", response.text());
        assert!(response.text().ends_with(text), "{path}: {}", response.text());
    }
}

#[test]
fn a_response_that_breaks_off_breaks_off_for_the_client_too() {
    let upstream = Upstream::start(|received| {
        Doing::AnswerAndClose(match received.path() {
            "/length" => b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec(),
            _ => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n".to_vec(),
        })
    });
    let proxy = proxy_to(&upstream);
    for path in ["/length", "/chunked"] {
        let mut client = Client::connect(proxy.address());
        client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n"));
        let rest = String::from_utf8(client.rest()).expect("text");
        assert!(rest.starts_with("HTTP/1.1 200 OK\r\n"), "{rest}");
        assert!(!rest.ends_with("0\r\n\r\n"), "{rest}");
    }
    proxy.wait_for_metric("portcullis_streams_reset_total", 2.0);
}

#[test]
fn a_connection_is_used_again() {
    let upstream = Upstream::echo();
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    for _ in 0..5 {
        assert_eq!(client.exchange("GET / HTTP/1.1\r\nHost: a\r\n\r\n").status, 200);
    }
    let connections: Vec<usize> = upstream.received().iter().map(|received| received.connection).collect();
    assert_eq!(connections, [0; 5]);
}

/// Closes each connection when its second request comes: what a server does whose idle time ran out at that moment.
fn forgetful(count: Arc<AtomicUsize>) -> Upstream {
    Upstream::start(move |received| {
        let on_this_connection = if count.fetch_add(1, Ordering::SeqCst) == 0 { 0 } else { received.connection };
        if received.line.contains("/second") && on_this_connection == 0 {
            Doing::Close
        } else {
            Doing::Answer(answer(&received.line))
        }
    })
}

#[test]
fn a_request_without_effect_is_sent_again_when_a_kept_connection_was_closed() {
    let upstream = forgetful(Arc::default());
    let proxy = proxy_to(&upstream);
    assert_eq!(proxy.get("/first").status, 200);
    assert_eq!(proxy.get("/second").status, 200);
    let connections: Vec<usize> = upstream.received().iter().map(|received| received.connection).collect();
    assert_eq!(connections, [0, 0, 1]);
}

#[test]
fn a_request_that_may_have_had_an_effect_is_never_sent_twice() {
    let upstream = forgetful(Arc::default());
    let proxy = proxy_to(&upstream);
    assert_eq!(proxy.get("/first").status, 200);
    let mut client = Client::connect(proxy.address());
    let response = client.exchange("POST /second HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody");
    assert_eq!(response.status, 503);
    let response = client.exchange("DELETE /second HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(response.status, 200, "on a fresh connection");
    let seconds = upstream.received().iter().filter(|received| received.line.starts_with("POST")).count();
    assert_eq!(seconds, 1);
}

#[test]
fn an_early_response_is_delivered_while_the_request_is_still_being_sent() {
    let upstream = Upstream::start(|_| {
        Doing::AnswerEarly(
            b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge".to_vec(),
        )
    });
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\nsome");
    let response = client.response(false).expect("the response");
    assert_eq!((response.status, response.text().as_str()), (413, "large"));
    assert_eq!(response.field("connection"), Some("close"));
    assert!(client.is_closed());
}

#[test]
fn the_upstream_is_left_when_the_client_goes_away() {
    let (closed, is_closed) = channel();
    let (began, has_begun) = channel();
    let upstream = Upstream::start(move |_| {
        began.send(()).expect("a waiting test");
        Doing::WaitForClose(closed.clone())
    });
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    has_begun.recv_timeout(PATIENCE).expect("the request at the upstream");
    client.close();
    is_closed.recv_timeout(PATIENCE).expect("the end of the upstream's connection");
    proxy.wait_for_metric("portcullis_requests_abandoned_total", 1.0);
    assert_eq!(proxy.metric("portcullis_requests_active"), 0.0);
}

#[test]
fn requests_over_the_upstreams_connections_are_refused() {
    let (tell, told) = channel();
    let told = Arc::new(Mutex::new(told));
    let (began, has_begun) = channel();
    let upstream = Upstream::start(move |_| {
        began.send(()).expect("a waiting test");
        Doing::AnswerWhenTold(answer("ok"), Arc::clone(&told))
    });
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE).replace("\"] }", "\"], max_connections: 1 }");
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    let mut first = Client::connect(proxy.address());
    first.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    has_begun.recv_timeout(PATIENCE).expect("the first request at the upstream");
    let second = proxy.get("/");
    assert_eq!(second.status, 503);
    assert!(second.text().ends_with("reset reason: overflow"), "{}", second.text());
    tell.send(()).expect("a waiting upstream");
    assert_eq!(first.response(false).expect("a response").status, 200);
}

#[test]
fn routes_answer_rewrite_and_miss() {
    let upstream = Upstream::echo();
    let yaml = policy_yaml(
        upstream.address,
        "routes:\n\
         - { name: teapot, match: { path: { exact: /tea } }, respond: { status: 418, body: short and stout } }\n\
         - { name: api, match: { path: { prefix: /api }, methods: [GET] }, upstream: api, prefix_rewrite: /v1, host_rewrite: inside }",
    );
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    let teapot = proxy.get("/tea");
    assert_eq!((teapot.status, teapot.text().as_str()), (418, "short and stout"));
    assert_eq!(proxy.get("/api/orders?x=1").status, 200);
    let received = &upstream.received()[0];
    assert_eq!((received.path(), received.field("host")), ("/v1/orders?x=1", Some("inside")));
    let mut client = Client::connect(proxy.address());
    assert_eq!(client.exchange("GET /elsewhere HTTP/1.1\r\nHost: a\r\n\r\n").status, 404);
    assert_eq!(client.exchange("GET /tea HTTP/1.1\r\nHost: a\r\n\r\n").status, 418, "on the same connection");
    let post = Client::connect(proxy.address()).exchange("POST /api HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(post.status, 404);
}
