//! What a client may send, and what becomes of it on the way to the upstream.

use crate::support::{Client, Doing, Folder, PLAIN_ROUTE, Proxy, Upstream, answer, policy_yaml};

fn proxy_to(upstream: &Upstream) -> Proxy {
    Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)))
}

#[test]
fn forwards_a_request_and_writes_what_the_proxy_vouches_for() {
    let upstream = Upstream::echo();
    let proxy = proxy_to(&upstream);
    let response = Client::connect(proxy.address()).exchange(
        "GET /a/./b//c?q=%2F HTTP/1.1\r\nHost: Example.com.\r\nX-One: 1\r\nX-Two: 2\r\nX-One: 3\r\n\
         X-Request-Id: forged\r\nX-Forwarded-Proto: https\r\nX-Forwarded-For: 192.0.2.1\r\n\
         Connection: keep-alive, X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\n\
         TE: gzip\r\n\r\n",
    );
    assert_eq!(response.status, 200);
    let received = &upstream.received()[0];
    assert_eq!(received.line, "GET /a/b/c?q=%2F HTTP/1.1");
    assert_eq!(received.field("host"), Some("Example.com"));
    assert_eq!(received.field("x-forwarded-for"), Some("192.0.2.1,127.0.0.1"));
    assert_eq!(received.field("x-forwarded-proto"), Some("http"));
    let id = received.field("x-request-id").expect("a request id");
    assert!(id.len() == 36 && id != "forged" && id.as_bytes()[14] == b'4', "{id}");
    let ones: Vec<&str> =
        received.fields.iter().filter(|(name, _)| name == "x-one").map(|(_, value)| value.as_str()).collect();
    assert_eq!(ones, ["1", "3"]);
    for gone in ["x-private", "keep-alive", "proxy-connection", "te", "connection"] {
        assert_eq!(received.field(gone), None, "{gone}");
    }
}

#[test]
fn answers_a_pipeline_in_order_on_one_connection() {
    let upstream = Upstream::echo();
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    client.send(
        "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
         POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n\
         GET /4 HTTP/1.1\r\nHost: a\r\n\r\n",
    );
    for number in 1..=4 {
        let response = client.response(false).expect("a response");
        assert!(response.text().contains(&format!("/{number} HTTP/1.1")), "{}", response.text());
    }
    let received = upstream.received();
    assert_eq!(received[1].body, b"abc");
    assert_eq!(received[2].body, b"abc");
}

#[test]
fn refuses_what_can_be_read_in_two_ways_and_closes() {
    let upstream = Upstream::echo();
    let proxy = proxy_to(&upstream);
    // The second request of each would be the smuggled one.
    const REST: &str = "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    let cases = [
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", 400),
        ("GET /a%2fb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /a%00b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400),
        ("GET / HTTP/9.9\r\nHost: a\r\n\r\n", 505),
        ("\x16\x03\x01\x02\x00\x01\r\n", 400),
        ("CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n", 403),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 403),
        ("GET / HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\n\r\n", 417),
    ];
    for (head, status) in cases {
        let mut client = Client::connect(proxy.address());
        client.send(format!("{head}{REST}"));
        let response = client.response(false).unwrap_or_else(|| panic!("no response to {head:?}"));
        assert_eq!(response.status, status, "{head:?}");
        assert_eq!(response.field("connection"), Some("close"), "{head:?}");
        assert!(client.is_closed(), "{head:?} was followed by another response");
    }
    assert_eq!(upstream.received().len(), 0);
    let log = proxy.end();
    assert_eq!(log.lines().count(), cases.len(), "{log}");
}

#[test]
fn a_malformed_request_in_a_pipeline_is_refused_in_its_turn() {
    let upstream = Upstream::echo();
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    client.send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.response(false).expect("the first response").status, 200);
    assert_eq!(client.response(false).expect("the refusal").status, 400);
    assert!(client.is_closed());
    assert_eq!(upstream.received().len(), 1);
}

#[test]
fn limits_the_head_of_a_request() {
    let upstream = Upstream::echo();
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE).replace(
        "address: \"127.0.0.1:0\" }]",
        "address: \"127.0.0.1:0\", limits: { header_bytes: 8KiB, header_count: 20 } }]",
    );
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    let status = |request: String| Client::connect(proxy.address()).exchange(&request).status;
    let with_fields = |count: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: 1\r\n".repeat(count - 1));
    assert_eq!(status(with_fields(20)), 200);
    assert_eq!(status(with_fields(21)), 431);
    let of_size = |size: usize| {
        let empty = "GET / HTTP/1.1\r\nHost: a\r\nx: \r\n\r\n".len();
        format!("GET / HTTP/1.1\r\nHost: a\r\nx: {}\r\n\r\n", "v".repeat(size - empty))
    };
    assert_eq!(status(of_size(8192)), 200);
    assert_eq!(status(of_size(8193)), 431);
    assert_eq!(status(format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "p".repeat(9000))), 414);
}

#[test]
fn forwards_a_body_of_chunks_with_its_trailers() {
    let upstream = Upstream::start(|received| {
        assert_eq!(received.field("transfer-encoding"), Some("chunked"));
        Doing::Answer(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 6\r\n\
              Content-Length: 9\r\n\r\n"
                .to_vec(),
        )
    });
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    client.send(
        "POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\nTrailer: x-check\r\nTransfer-Encoding: chunked\r\n\r\n\
         4\r\nbody\r\n0\r\nX-Check: 1\r\nAuthorization: late\r\nX-Forwarded-For: 192.0.2.9\r\n\r\n",
    );
    let response = client.response(false).expect("a response");
    assert_eq!(response.body, b"abc");
    assert_eq!(response.trailers, [("x-sum".to_owned(), "6".to_owned())]);
    let received = &upstream.received()[0];
    assert_eq!(received.body, b"body");
    assert_eq!(received.trailers, [("x-check".to_owned(), "1".to_owned())]);
}

#[test]
fn large_bodies_pass_both_ways_unchanged() {
    let upstream = Upstream::start(|_| Doing::Answer(answer(&"r".repeat(3_000_000))));
    let proxy = proxy_to(&upstream);
    let body: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    let mut client = Client::connect(proxy.address());
    client.send(format!("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()));
    client.send(&body);
    let response = client.response(false).expect("a response");
    assert_eq!(response.body.len(), 3_000_000);
    assert!(upstream.received()[0].body == body, "the upstream received another body");
}

#[test]
fn asks_for_the_body_when_the_client_waits_to_be_asked() {
    let upstream = Upstream::echo();
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    assert_eq!(client.response(false).expect("an interim response").status, 100);
    client.send("body");
    assert_eq!(client.response(false).expect("a response").status, 200);
    let received = &upstream.received()[0];
    assert_eq!(received.field("expect"), None);
    assert_eq!(received.body, b"body");
}

#[test]
fn responses_without_a_body_keep_their_framing() {
    let upstream = Upstream::start(|received| {
        Doing::Answer(match received.path() {
            "/204" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
            "/304" => b"HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nContent-Length: 99\r\n\r\n".to_vec(),
            "/empty" => b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".to_vec(),
            _ => b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n".to_vec(),
        })
    });
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    let head = client.exchange("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((head.status, head.field("content-length")), (200, Some("12345")));
    let no_content = client.exchange("GET /204 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((no_content.status, no_content.field("content-length")), (204, None));
    let not_modified = client.exchange("GET /304 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((not_modified.status, not_modified.field("etag")), (304, Some("\"x\"")));
    let empty = client.exchange("GET /empty HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((empty.status, empty.field("content-length")), (200, Some("0")));
}

#[test]
fn a_slow_head_is_answered_with_408_and_an_idle_connection_closed() {
    let upstream = Upstream::echo();
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE).replace(
        "address: \"127.0.0.1:0\" }]",
        "address: \"127.0.0.1:0\", limits: { header_timeout: 50ms, idle_timeout: 100ms, request_timeout: 100ms } }]",
    );
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    let mut slow = Client::connect(proxy.address());
    slow.send("GET / HTTP/1.1\r\nHo");
    assert_eq!(slow.response(false).expect("a response").status, 408);
    assert!(slow.is_closed());

    let mut silent = Client::connect(proxy.address());
    assert!(silent.is_closed());

    let mut idle = Client::connect(proxy.address());
    assert_eq!(idle.exchange("GET / HTTP/1.1\r\nHost: a\r\n\r\n").status, 200);
    assert!(idle.is_closed());

    let mut slow_body = Client::connect(proxy.address());
    slow_body.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf");
    assert_eq!(slow_body.response(false).expect("a response").status, 408);
    assert!(slow_body.is_closed());
}

#[test]
fn a_malformed_chunk_is_answered_with_400_and_reaches_nobody_as_a_whole_body() {
    let upstream = Upstream::echo();
    let proxy = proxy_to(&upstream);
    let mut client = Client::connect(proxy.address());
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\nzz\r\n");
    assert_eq!(client.response(false).expect("a response").status, 400);
    assert!(client.is_closed());
    assert_eq!(upstream.received().len(), 0);
}

#[test]
fn connections_over_the_limit_are_closed_at_once() {
    let upstream = Upstream::echo();
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE)
        .replace("address: \"127.0.0.1:0\" }]", "address: \"127.0.0.1:0\", limits: { max_connections: 1 } }]");
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    let mut first = Client::connect(proxy.address());
    assert_eq!(first.exchange("GET / HTTP/1.1\r\nHost: a\r\n\r\n").status, 200);
    assert!(Client::connect(proxy.address()).is_closed());
    assert_eq!(first.exchange("GET / HTTP/1.1\r\nHost: a\r\n\r\n").status, 200);
    assert_eq!(proxy.metric("portcullis_connections_refused_total"), 1.0);
}

#[test]
fn the_client_is_the_rightmost_address_that_is_no_trusted_proxy() {
    let upstream = Upstream::echo();
    let yaml =
        format!("trusted_proxies: [\"127.0.0.0/8\", \"10.0.0.0/8\"]\n{}", policy_yaml(upstream.address, PLAIN_ROUTE));
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    Client::connect(proxy.address()).exchange(
        "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: https\r\nX-Forwarded-For: 192.0.2.66, 192.0.2.7, 10.1.2.3\r\n\r\n",
    );
    assert_eq!(upstream.received()[0].field("x-forwarded-proto"), Some("https"));
    let log = proxy.end();
    assert!(log.contains(" 192.0.2.7 GET / 200 "), "{log}");
}

#[test]
fn the_access_log_tells_what_happened_and_no_query() {
    let upstream = Upstream::echo();
    let proxy = proxy_to(&upstream);
    Client::connect(proxy.address())
        .exchange("POST /a/b?token=secret HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi");
    let log = proxy.end();
    assert!(log.contains(" 127.0.0.1 POST /a/b 200 via_upstream "), "{log}");
    assert!(log.contains(" in=2 ") && log.contains(" route=all upstream=api id="), "{log}");
    assert!(!log.contains("secret"), "{log}");
}
