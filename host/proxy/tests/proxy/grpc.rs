//! Filters that call gRPC servers: over real HTTP/2, with servers that do what servers should not, too.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis_abi::{GrpcMessages, grpc_frame};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::support::{Client, Folder, PATIENCE, Proxy, Upstream, guest, policy_yaml};

/// What the server saw of a call.
#[derive(Debug, PartialEq)]
enum Seen {
    /// Its path and fields.
    Began(String, Vec<(String, String)>),
    Message(Bytes),
    /// The request has ended, as it should or by a reset.
    Ended(bool),
}

/// A server for calls of `svc`; the method says what it does.
struct Server {
    address: SocketAddr,
    seen: Receiver<Seen>,
}

impl Server {
    fn start() -> Server {
        let (sender, seen) = channel();
        let (listening, address) = channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                listening.send(listener.local_addr().expect("an address")).expect("a waiting test");
                // Ends with the test: then nobody is left to tell.
                while let Ok((stream, _)) = listener.accept().await {
                    let sender = sender.clone();
                    let service = service_fn(move |request| answer(request, sender.clone()));
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    tokio::spawn(async move { server.serve_connection(TokioIo::new(stream), service).await });
                }
            });
        });
        Server { address: address.recv_timeout(PATIENCE).expect("a server"), seen }
    }

    fn next(&self) -> Seen {
        self.seen.recv_timeout(PATIENCE).expect("something at the server")
    }

    /// Waits for the next request; what is left of others is passed over.
    fn began(&self) -> String {
        loop {
            if let Seen::Began(path, _) = self.next() {
                return path;
            }
        }
    }

    /// Waits for the end of the request; whether it came as it should. Messages before it are passed over.
    fn ended(&self) -> bool {
        loop {
            if let Seen::Ended(whole) = self.next() {
                return whole;
            }
        }
    }
}

/// The rest of a response.
struct Pieces(UnboundedReceiver<io::Result<Frame<Bytes>>>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(cx)
    }
}

type Pipe = UnboundedSender<io::Result<Frame<Bytes>>>;

fn send(pipe: &Pipe, frame: Frame<Bytes>) {
    // It fails where the caller has gone away, which some tests are about.
    let _ = pipe.send(Ok(frame));
}

fn end(pipe: &Pipe, status: &'static str) {
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", status.parse().expect("a value"));
    trailers.insert("grpc-message", "so%20it%20is".parse().expect("a value"));
    send(pipe, Frame::trailers(trailers));
}

async fn answer(
    request: http::Request<Incoming>,
    seen: Sender<Seen>,
) -> Result<http::Response<Pieces>, std::convert::Infallible> {
    let (head, body) = request.into_parts();
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let fields = head.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
    let path = head.uri.path().to_owned();
    let _ = seen.send(Seen::Began(path.clone(), fields));
    let (pipe, pieces) = unbounded_channel();
    let method = path.rsplit('/').next().unwrap_or_default().to_owned();
    if method == "Never" {
        read(body, &seen, |_| {}).await;
        return std::future::pending().await;
    }
    tokio::spawn(async move {
        match method.as_str() {
            "Echo" => {
                read(body, &seen, |message| send(&pipe, Frame::data(grpc_frame(&message)))).await;
                end(&pipe, "0");
            }
            // Does not wait for the request.
            "Early" => {
                send(&pipe, Frame::data(grpc_frame(b"early")));
                end(&pipe, "0");
                read(body, &seen, |_| {}).await;
            }
            "Denied" => {
                read(body, &seen, |_| {}).await;
                end(&pipe, "7");
            }
            "Reset" => {
                send(&pipe, Frame::data(Bytes::from_static(b"\0\0\0")));
                read(body, &seen, |_| {}).await;
                // HTTP/2 drops what is not yet written when a stream is reset.
                tokio::time::sleep(Duration::from_millis(50)).await;
                let _ = pipe.send(Err(io::Error::other("reset")));
            }
            "Long" => {
                read(body, &seen, |_| {}).await;
                send(&pipe, Frame::data(grpc_frame(&vec![b'x'; 1024 * 1024 + 1])));
                end(&pipe, "0");
            }
            "Flood" => {
                let flood: Vec<u8> = (0..20_000).flat_map(|_| grpc_frame(b"x")).collect();
                send(&pipe, Frame::data(Bytes::from(flood)));
                read(body, &seen, |_| {}).await;
                end(&pipe, "0");
            }
            // Takes nothing, so that the connection's windows fill.
            _ => {
                send(&pipe, Frame::data(Bytes::new()));
                pipe.closed().await;
                drop(body);
                let _ = seen.send(Seen::Ended(false));
            }
        }
    });
    let mut response = http::Response::new(Pieces(pieces));
    response.headers_mut().insert("content-type", "application/grpc".parse().expect("a value"));
    Ok(response)
}

async fn read(mut body: Incoming, seen: &Sender<Seen>, mut each: impl FnMut(Bytes)) {
    let mut messages = GrpcMessages::new(usize::MAX);
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            let _ = seen.send(Seen::Ended(false));
            return;
        };
        messages.push(frame.data_ref().map(AsRef::as_ref).unwrap_or_default());
        while let Ok(Some(message)) = messages.next_message() {
            let _ = seen.send(Seen::Message(message.clone()));
            each(message);
        }
    }
    let _ = seen.send(Seen::Ended(true));
}

/// A proxy with a filter that calls `auth`.
fn proxy_to(auth: SocketAddr, wasm: &[u8], http2: bool) -> (Proxy, Upstream) {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    folder.write("guest.wasm", wasm);
    let rest = format!(
        "  auth: {{ endpoints: [\"{auth}\"], http2: {http2} }}\n\
         filters: [{{ name: guest, wasm: guest.wasm, failure_policy: fail_closed, allowed_upstreams: [auth] }}]\n\
         routes: [{{ name: all, upstream: api }}]"
    );
    (Proxy::start(folder.policy(&policy_yaml(upstream.address, &rest))), upstream)
}

/// A filter that makes one call of `method` for each request, and answers the client with what came of it: 200 and the
/// message, or 400 plus the status, and its message.
fn caller(method: &str, timeout: u32) -> Vec<u8> {
    guest(
        &[("auth", b"auth"), ("service", b"svc"), ("method", method.as_bytes()), ("message", b"hello")],
        &format!(
            r#"{ANSWERS}
        (func (export "proxy_on_request_headers") (param $id i32) (param i32 i32) (result i32)
            (global.set $stream (local.get $id))
            (if (call $grpc_call @auth @service @method (i32.const 0) (i32.const 0) @message (i32.const {timeout}) (i32.const 16))
                (then (unreachable)))
            (i32.const 1))
        (func (export "proxy_on_grpc_receive") (param i32 i32) (param $len i32)
            (call $answer_message (local.get $len)))"#
        ),
    )
}

/// Answers to the client of the stream `$stream`: with the message at hand, or with the status.
const ANSWERS: &str = r#"
    (global $stream (mut i32) (i32.const 0))
    (func $answer_message (param $len i32)
        (drop (call $get_buffer (i32.const 5) (i32.const 0) (local.get $len) (i32.const 32) (i32.const 36)))
        (drop (call $context (global.get $stream)))
        (drop (call $respond (i32.const 200) (i32.const 0) (i32.const 0) (i32.load (i32.const 32)) (i32.load (i32.const 36))
            (i32.const 0) (i32.const 0) (i32.const -1))))
    (func (export "proxy_on_grpc_close") (param i32 i32) (param $status i32)
        (drop (call $get_status (i32.const 40) (i32.const 32) (i32.const 36)))
        (drop (call $context (global.get $stream)))
        (drop (call $respond (i32.add (i32.const 400) (local.get $status)) (i32.const 0) (i32.const 0)
            (i32.load (i32.const 32)) (i32.load (i32.const 36)) (i32.const 0) (i32.const 0) (i32.const -1))))"#;

#[test]
fn a_call_reaches_the_server_and_its_answer_the_filter() {
    let server = Server::start();
    let (proxy, upstream) = proxy_to(server.address, &caller("Echo", 1000), true);
    for _ in 0..2 {
        let response = proxy.get("/");
        assert_eq!((response.status, response.text().as_str()), (200, "hello"));
        let expected = [("grpc-timeout", "1000m"), ("content-type", "application/grpc"), ("te", "trailers")];
        let fields = expected.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        assert_eq!(server.next(), Seen::Began("/svc/Echo".into(), fields));
        assert_eq!(server.next(), Seen::Message(Bytes::from_static(b"hello")));
        assert_eq!(server.next(), Seen::Ended(true));
    }
    assert_eq!(upstream.received().len(), 0, "the filter answered");
    let connections = "portcullis_upstream_connections_total{upstream=\"auth\"}";
    assert_eq!(proxy.metric(connections), 1.0, "both calls went over one connection");
}

#[test]
fn failures_are_told_as_envoy_tells_them() {
    let check = |method: &str, status: u16, message: &str, reason: &str| {
        let server = Server::start();
        let (proxy, _) = proxy_to(server.address, &caller(method, 300), true);
        let response = proxy.get("/");
        assert_eq!((response.status, response.text().as_str()), (status, message), "{method}");
        if !reason.is_empty() {
            let series = format!("portcullis_upstream_failures_total{{upstream=\"auth\",reason=\"{reason}\"}}");
            assert_eq!(proxy.metric(&series), 1.0, "{method}");
        }
    };
    check("Denied", 407, "so%20it%20is{via_upstream}", "");
    check("Never", 414, "upstream request timeout{response_timeout}", "response_timeout");
    check("Stall", 413, "response_timeout", "response_timeout");
    check("Reset", 413, "upstream_reset_after_response_started{remote_reset}", "reset");
    check("Long", 408, "via_upstream", "");
}

#[test]
fn a_server_that_is_not_there_is_unavailable() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("an address");
    let (proxy, _) = proxy_to(nobody, &caller("Echo", 1000), true);
    let response = proxy.get("/");
    let message = "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure\
                   {upstream_reset_before_response_started{remote_connection_failure}}";
    assert_eq!((response.status, response.text().as_str()), (414, message));
    assert_eq!(proxy.metric("portcullis_upstream_failures_total{upstream=\"auth\",reason=\"connect\"}"), 1.0);
}

#[test]
fn a_server_that_speaks_http1_is_unavailable() {
    let http1 = Upstream::echo();
    let (proxy, _) = proxy_to(http1.address, &caller("Echo", 1000), false);
    let response = proxy.get("/");
    assert_eq!(response.status, 414);
    assert!(response.text().ends_with("{grpc_needs_http2}"), "{}", response.text());
    assert_eq!(http1.received().len(), 0);
    let (proxy, _) = proxy_to(http1.address, &caller("Echo", 1000), true);
    assert_eq!(proxy.get("/").status, 414, "it answers HTTP/2 with what is none");
}

/// A filter that opens a stream of `method` for each request, does `begin` at once and `further` with each message.
fn streamer(method: &str, begin: &str, further: &str) -> Vec<u8> {
    let counter = b"messages_total";
    guest(
        &[
            ("auth", b"auth"),
            ("service", b"svc"),
            ("method", method.as_bytes()),
            ("message", b"hello"),
            ("counter", counter),
        ],
        &format!(
            r#"{ANSWERS}
        (global $messages (mut i32) (i32.const 0))
        (global $i (mut i32) (i32.const 0))
        (func $send (drop (call $grpc_send (i32.load (i32.const 16)) @message (i32.const 0))))
        (func $close (drop (call $grpc_close (i32.load (i32.const 16)))))
        (func $cancel (drop (call $grpc_cancel (i32.load (i32.const 16)))))
        (func (export "proxy_on_request_headers") (param $id i32) (param i32 i32) (result i32)
            (global.set $stream (local.get $id))
            (if (call $grpc_stream @auth @service @method (i32.const 0) (i32.const 0) (i32.const 16)) (then (unreachable)))
            {begin}
            (i32.const 1))
        (func (export "proxy_on_grpc_receive") (param i32 i32) (param $len i32)
            (global.set $messages (i32.add (global.get $messages) (i32.const 1)))
            {further})"#
        ),
    )
}

#[test]
fn messages_of_a_stream_go_both_ways_while_it_lasts() {
    let server = Server::start();
    // Sends one message, and the next one only when it has come back.
    let further = "(if (i32.lt_u (global.get $messages) (i32.const 3)) (then (call $send)) (else (call $close)))";
    let (proxy, _) = proxy_to(server.address, &streamer("Echo", "(call $send)", further), true);
    let response = proxy.get("/");
    assert_eq!((response.status, response.text().as_str()), (400, "so%20it%20is{via_upstream}"));
    assert_eq!(server.began(), "/svc/Echo");
    for _ in 0..3 {
        assert_eq!(server.next(), Seen::Message(Bytes::from_static(b"hello")));
    }
    assert_eq!(server.next(), Seen::Ended(true));
}

#[test]
fn a_stream_that_is_cancelled_is_reset() {
    let server = Server::start();
    let further = "(call $cancel) (call $answer_message (local.get $len))";
    let (proxy, _) = proxy_to(server.address, &streamer("Echo", "(call $send)", further), true);
    assert_eq!(proxy.get("/").text(), "hello");
    assert_eq!(server.began(), "/svc/Echo");
    assert!(!server.ended(), "a part of the request was taken for the whole");
}

#[test]
fn what_was_not_sent_before_a_cancellation_is_not_taken_for_sent() {
    // All messages and the end of the stream wait when it is cancelled, in a later callback.
    let server = Server::start();
    let begin = "(call $send) (call $send) (call $close)
        (drop (call $tick_every (i32.const 1)))";
    let tick = r#"(call $answer_message (local.get $len)))
        (func (export "proxy_on_tick") (param i32)
            (call $cancel)
            (drop (call $context (global.get $stream)))
            (drop (call $respond (i32.const 204) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
                (i32.const 0) (i32.const 0) (i32.const -1)))"#;
    let (proxy, _) = proxy_to(server.address, &streamer("Stall", begin, tick), true);
    assert_eq!(proxy.get("/").status, 204);
    // Either nothing of it was seen, or its end was not.
    if let Ok(Seen::Began(..)) = server.seen.recv_timeout(Duration::from_millis(200)) {
        assert!(!server.ended());
    }
}

#[test]
fn the_server_is_left_when_the_client_goes_away() {
    let server = Server::start();
    let (proxy, _) = proxy_to(server.address, &streamer("Echo", "(call $send)", ""), true);
    let mut client = Client::connect(proxy.address());
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(server.began(), "/svc/Echo");
    assert_eq!(server.next(), Seen::Message(Bytes::from_static(b"hello")));
    client.close();
    assert!(!server.ended());
    proxy.wait_for_metric("portcullis_requests_abandoned_total", 1.0);
}

#[test]
fn a_server_that_answers_early_ends_the_stream() {
    let server = Server::start();
    let (proxy, _) = proxy_to(server.address, &streamer("Early", "(call $send)", ""), true);
    assert_eq!(proxy.get("/").status, 400);
    assert_eq!(server.began(), "/svc/Early");
    assert!(!server.ended(), "the rest of the request is not waited for");
}

#[test]
fn a_stream_whose_server_takes_nothing_ends_before_memory_does() {
    let server = Server::start();
    // 64 KiB a message, from wherever: three windows' worth over the limit of 1 MiB.
    let begin = "(loop
        (drop (call $grpc_send (i32.load (i32.const 16)) (i32.const 1024) (i32.const 65536) (i32.const 0)))
        (global.set $i (i32.add (global.get $i) (i32.const 1)))
        (br_if 0 (i32.lt_u (global.get $i) (i32.const 40))))";
    let (proxy, _) = proxy_to(server.address, &streamer("Stall", begin, ""), true);
    let response = proxy.get("/");
    assert_eq!((response.status, response.text().as_str()), (408, "more waits to be sent than `limits` allows"));
}

#[test]
fn room_comes_back_as_a_stream_is_sent() {
    // 4 MiB in all, and never more than 64 KiB at a time: each message is sent when the one before has come back.
    let server = Server::start();
    let send = "(drop (call $grpc_send (i32.load (i32.const 16)) (i32.const 1024) (i32.const 65536) (i32.const 0)))";
    let further = format!("(if (i32.lt_u (global.get $messages) (i32.const 64)) (then {send}) (else (call $close)))");
    let (proxy, _) = proxy_to(server.address, &streamer("Echo", send, &further), true);
    assert_eq!(proxy.get("/").status, 400);
    assert_eq!(server.began(), "/svc/Echo");
    for _ in 0..64 {
        assert!(matches!(server.next(), Seen::Message(message) if message.len() == 65_536));
    }
}

#[test]
fn a_flood_of_messages_leaves_others_their_turn() {
    let server = Server::start();
    // A millisecond or so of work for each message. They come 2,700 at a time, the most that a frame of HTTP/2 holds.
    let begin = "(drop (call $define_metric (i32.const 0) @counter (i32.const 20)))";
    let further = "(drop (call $increment (i32.load (i32.const 20)) (i64.const 1)))
        (global.set $i (i32.const 0)) (loop
        (global.set $i (i32.add (global.get $i) (i32.const 1)))
        (br_if 0 (i32.lt_u (global.get $i) (i32.const 1000000))))";
    let (proxy, _) = proxy_to(server.address, &streamer("Flood", begin, further), true);
    let mut first = Client::connect(proxy.address());
    first.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(server.began(), "/svc/Flood");
    let deadline = Instant::now() + PATIENCE;
    while proxy.metric("messages_total") == 0.0 {
        assert!(Instant::now() < deadline, "no message was told");
        std::thread::yield_now();
    }
    // The same worker serves others meanwhile, before all of the frame was told.
    let mut other = Client::connect(proxy.address());
    other.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(server.began(), "/svc/Flood");
    let told = proxy.metric("messages_total");
    assert!(told < 2_000.0, "{told} messages in one turn");
    // It lets go of a flood whose client goes away.
    first.close();
    other.close();
    proxy.wait_for_metric("portcullis_requests_active", 0.0);
}
