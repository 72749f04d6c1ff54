//! TCP listeners over real sockets: bytes both ways, either side's end, filters that hold, change and close, and what bounds
//! them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::support::{Doing, Folder, PATIENCE, Proxy, Upstream, answer, guest, policy_yaml};

/// A policy with one TCP listener; `rest` begins with what the upstream `origin` has besides its endpoints.
fn tcp_yaml(listener: &str, endpoints: &[SocketAddr], rest: &str) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|address| format!("\"{address}\"")).collect();
    format!(
        "version: 1\nworkers: 1\nadmin: {{ address: \"127.0.0.1:0\" }}\nlisteners:\n  - name: db\n    address: \
         \"127.0.0.1:0\"\n    tcp: {{ upstream: origin }}\n{listener}upstreams:\n  origin:\n    endpoints: [{}]\n{rest}\n",
        endpoints.join(", ")
    )
}

const GUEST: &str = "filters: [{ name: guest, wasm: guest.wasm, protocol: tcp, failure_policy: fail_closed }]";

fn start(listener: &str, endpoint: SocketAddr, rest: &str) -> Proxy {
    Proxy::start(Folder::new().policy(&tcp_yaml(listener, &[endpoint], rest)))
}

fn start_with(endpoint: SocketAddr, wasm: &[u8]) -> Proxy {
    let folder = Folder::new();
    folder.write("guest.wasm", wasm);
    Proxy::start(folder.policy(&tcp_yaml("", &[endpoint], GUEST)))
}

/// A server that does this with each connection.
fn serve(handle: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let handle = Arc::new(handle);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let handle = Arc::clone(&handle);
            std::thread::spawn(move || handle(stream));
        }
    });
    address
}

/// Sends back what it gets, and ends when the other side has.
fn echo() -> SocketAddr {
    serve(|mut stream| {
        let mut reader = stream.try_clone().expect("a second handle");
        // A reset is an end, too.
        let _ = std::io::copy(&mut reader, &mut stream);
        let _ = stream.shutdown(Shutdown::Write);
    })
}

/// Tells all it got from each connection, once that has ended, and whether it ended well.
fn collect() -> (SocketAddr, Receiver<(Vec<u8>, bool)>) {
    let (tell, told) = channel();
    let address = serve(move |mut stream| {
        let mut got = Vec::new();
        let ended = stream.read_to_end(&mut got).is_ok();
        let _ = tell.send((got, ended));
    });
    (address, told)
}

fn connect(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.address()).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a write timeout");
    stream.set_nodelay(true).expect("no delay");
    stream
}

fn read(stream: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("bytes");
    bytes
}

/// All until the end; `None` when it breaks off.
fn rest(stream: &mut impl Read) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).ok().map(|_| bytes)
}

/// Closes with a reset.
fn abort(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
    drop(stream);
}

/// Bytes that no two places share.
fn pattern(count: usize) -> Vec<u8> {
    (0..count as u32 / 4).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

#[test]
fn bytes_pass_both_ways_and_either_side_may_finish_first() {
    let proxy = start("", echo(), "");
    let mut client = connect(&proxy);
    client.write_all(b"hello").expect("to send");
    assert_eq!(read(&mut client, 5), b"hello");
    client.write_all(b"again").expect("to send");
    client.shutdown(Shutdown::Write).expect("to finish");
    assert_eq!(rest(&mut client).as_deref(), Some(&b"again"[..]));
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"finished\"}", 1.0);
    assert_eq!(proxy.metric("portcullis_tcp_received_bytes_total"), 10.0);
    assert_eq!(proxy.metric("portcullis_tcp_sent_bytes_total"), 10.0);
    assert_eq!(proxy.metric("portcullis_tcp_connections_active"), 0.0);
    let log = proxy.end();
    assert!(log.contains(" 127.0.0.1 TCP db - ") && log.contains(" in=10 out=10 upstream=origin connection="), "{log}");
}

#[test]
fn a_server_that_speaks_first_and_finishes_first_still_gets_all_that_follows() {
    let (tell, told) = channel();
    let origin = serve(move |mut stream| {
        stream.write_all(b"220 ready").expect("to greet");
        stream.shutdown(Shutdown::Write).expect("to finish");
        tell.send(rest(&mut stream)).expect("a test");
    });
    let proxy = start("", origin, "");
    let mut client = connect(&proxy);
    assert_eq!(rest(&mut client).as_deref(), Some(&b"220 ready"[..]));
    client.write_all(b"late").expect("to send");
    client.shutdown(Shutdown::Write).expect("to finish");
    assert_eq!(told.recv_timeout(PATIENCE).expect("an end").as_deref(), Some(&b"late"[..]));
}

#[test]
fn large_transfers_pass_whole_however_slowly_they_are_taken() {
    let proxy = start_with(echo(), &counts());
    let sent = pattern(24 * 1024 * 1024);
    let mut client = connect(&proxy);
    let mut writer = client.try_clone().expect("a second handle");
    let bytes = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&bytes).expect("to send");
        writer.shutdown(Shutdown::Write).expect("to finish");
    });
    // The echo comes back while nobody reads it: everything on the way fills up and waits.
    std::thread::sleep(Duration::from_millis(100));
    let got = rest(&mut client).expect("all of it");
    writing.join().expect("a writer that succeeds");
    assert!(got == sent, "{} bytes came back", got.len());
    proxy.wait_for_metric("from_client_total", sent.len() as f64);
    proxy.wait_for_metric("from_upstream_total", sent.len() as f64);
}

/// Adds up what it sees in metrics, and counts the connections that it logged.
fn counts() -> Vec<u8> {
    guest(
        &[("client", b"from_client_total"), ("upstream", b"from_upstream_total"), ("logged", b"logged_total")],
        r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32)
            (drop (call $define_metric (i32.const 0) @client (i32.const 16)))
            (drop (call $define_metric (i32.const 0) @upstream (i32.const 20)))
            (drop (call $define_metric (i32.const 0) @logged (i32.const 24)))
            (i32.const 1))
        (func (export "proxy_on_downstream_data") (param i32) (param $len i32) (param i32) (result i32)
            (drop (call $increment (i32.load (i32.const 16)) (i64.extend_i32_u (local.get $len))))
            (i32.const 0))
        (func (export "proxy_on_upstream_data") (param i32) (param $len i32) (param i32) (result i32)
            (drop (call $increment (i32.load (i32.const 20)) (i64.extend_i32_u (local.get $len))))
            (i32.const 0))
        (func (export "proxy_on_log") (param i32)
            (drop (call $increment (i32.load (i32.const 24)) (i64.const 1))))"#,
    )
}

#[test]
fn a_filter_hears_of_every_connection_and_its_end() {
    let proxy = start_with(echo(), &counts());
    for _ in 0..3 {
        let mut client = connect(&proxy);
        client.write_all(b"12345").expect("to send");
        assert_eq!(read(&mut client, 5), b"12345");
        abort(client);
    }
    proxy.wait_for_metric("logged_total", 3.0);
    assert_eq!((proxy.metric("from_client_total"), proxy.metric("from_upstream_total")), (15.0, 15.0));
}

#[test]
fn a_filter_changes_bytes_both_ways() {
    let edits = guest(
        &[("to", b"> "), ("back", b"< ")],
        r#"(func (export "proxy_on_downstream_data") (param i32) (param $len i32) (param i32) (result i32)
            (if (local.get $len) (then (drop (call $set_buffer (i32.const 2) (i32.const 0) (i32.const 0) @to))))
            (i32.const 0))
        (func (export "proxy_on_upstream_data") (param i32) (param $len i32) (param i32) (result i32)
            (if (local.get $len) (then (drop (call $set_buffer (i32.const 3) (i32.const 0) (i32.const 0) @back))))
            (i32.const 0))"#,
    );
    let proxy = start_with(echo(), &edits);
    let mut client = connect(&proxy);
    client.write_all(b"hello").expect("to send");
    assert_eq!(read(&mut client, 9), b"< > hello");
}

/// Holds what the client sends until a whole line is there; closes when a line begins with `x`.
fn line_by_line() -> Vec<u8> {
    guest(
        &[],
        r#"(func (export "proxy_on_downstream_data") (param i32) (param $len i32) (param $end i32) (result i32)
            (if (i32.eqz (local.get $len)) (then (return (i32.const 0))))
            (drop (call $get_buffer (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 8) (i32.const 12)))
            (if (i32.eq (i32.load8_u (i32.load (i32.const 8))) (i32.const 120)) (then
                (drop (call $close_stream (i32.const 2)))
                (return (i32.const 1))))
            (drop (call $get_buffer (i32.const 2) (i32.sub (local.get $len) (i32.const 1)) (i32.const 1)
                (i32.const 8) (i32.const 12)))
            (i32.ne (i32.load8_u (i32.load (i32.const 8))) (i32.const 10)))"#,
    )
}

#[test]
fn a_filter_holds_bytes_until_it_has_seen_enough_also_when_they_come_one_by_one() {
    let (tell, told) = channel();
    let origin = serve(move |mut stream| {
        let mut got = [0; 64];
        while let Ok(count @ 1..) = stream.read(&mut got) {
            tell.send(got[..count].to_vec()).expect("a test");
        }
    });
    let proxy = start_with(origin, &line_by_line());
    let mut client = connect(&proxy);
    for byte in b"one line\n" {
        client.write_all(&[*byte]).expect("to send");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(told.recv_timeout(PATIENCE).expect("a line"), b"one line\n", "whole, and nothing before it");
    client.write_all(b"half a line").expect("to send");
    proxy.wait_for_metric("portcullis_tcp_received_bytes_total", 20.0);
    assert!(told.try_recv().is_err());
}

#[test]
fn a_filter_that_closes_lets_nothing_more_through() {
    let (origin, told) = collect();
    let proxy = start_with(origin, &line_by_line());
    let mut client = connect(&proxy);
    client.write_all(b"a line\n").expect("to send");
    proxy.wait_for_metric("portcullis_tcp_received_bytes_total", 7.0);
    client.write_all(b"x marks the spot\n").expect("to send");
    assert_eq!(rest(&mut client).as_deref(), Some(&b""[..]));
    assert_eq!(told.recv_timeout(PATIENCE).expect("an end").0, b"a line\n");
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"filter\"}", 1.0);
    assert!(proxy.end().contains(" TCP db wasm_downstream_close "));
}

#[test]
fn what_was_sent_before_a_filter_closes_reaches_the_client_though_it_goes_on_sending() {
    let closes_at_the_answer = guest(
        &[],
        r#"(global $seen (mut i32) (i32.const 0))
        (func (export "proxy_on_upstream_data") (param i32) (param $len i32) (param i32) (result i32)
            (global.set $seen (i32.add (global.get $seen) (local.get $len)))
            (i32.const 0))
        (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32)
            (if (global.get $seen) (then (drop (call $close_stream (i32.const 3)))))
            (i32.const 0))"#,
    );
    let proxy = start_with(
        serve(|mut stream| {
            stream.write_all(b"go away").expect("to send");
            rest(&mut stream);
        }),
        &closes_at_the_answer,
    );
    let mut client = connect(&proxy);
    proxy.wait_for_metric("portcullis_tcp_sent_bytes_total", 7.0);
    client.write_all(&vec![b'x'; 100_000]).expect("to send");
    assert_eq!(rest(&mut client).as_deref(), Some(&b"go away"[..]));
}

/// Asks the upstream `auth` about each new connection, which it closes unless the answer is 200.
fn asks() -> Vec<u8> {
    guest(
        &[
            ("auth", b"auth"),
            (
                "request",
                b"\x03\0\0\0\x07\0\0\0\x03\0\0\0\x05\0\0\0\x01\0\0\0\x0a\0\0\0\x01\0\0\0:method\0GET\0:path\0/\0:authority\0a\0",
            ),
            ("none", b"\0\0\0\0"),
            ("status", b":status"),
        ],
        r#"(global $id (mut i32) (i32.const 0))
        (func (export "proxy_on_new_connection") (param $id i32) (result i32)
            (global.set $id (local.get $id))
            (drop (call $http_call @auth @request (i32.const 0) (i32.const 0) @none (i32.const 5000) (i32.const 8)))
            (i32.const 1))
        (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
            (drop (call $get_field (i32.const 6) @status (i32.const 8) (i32.const 12)))
            (drop (call $context (global.get $id)))
            (if (i32.eq (i32.load8_u (i32.load (i32.const 8))) (i32.const 50))
                (then (drop (call $continue (i32.const 2))))
                (else (drop (call $close_stream (i32.const 2))))))"#,
    )
}

fn start_asking(origin: SocketAddr, auth: &Upstream) -> Proxy {
    let folder = Folder::new();
    folder.write("guest.wasm", asks());
    let rest = format!(
        "  auth: {{ endpoints: [\"{}\"] }}\nfilters: [{{ name: guest, wasm: guest.wasm, protocol: tcp, \
         allowed_upstreams: [auth] }}]",
        auth.address
    );
    Proxy::start(folder.policy(&tcp_yaml("", &[origin], &rest)))
}

#[test]
fn a_connection_waits_for_the_answer_of_a_callout_before_the_upstream_hears_of_it() {
    let (tell, told) = channel();
    let told = Arc::new(std::sync::Mutex::new(told));
    let auth = Upstream::start(move |_| Doing::AnswerWhenTold(answer(""), Arc::clone(&told)));
    let (accepted, accepts) = channel();
    let origin = serve(move |mut stream| {
        accepted.send(()).expect("a test");
        stream.write_all(b"welcome").expect("to send");
        rest(&mut stream);
    });
    let proxy = start_asking(origin, &auth);
    let mut client = connect(&proxy);
    client.write_all(b"impatient").expect("to send");
    proxy.wait_for_metric("portcullis_upstream_connections_total{upstream=\"auth\"}", 1.0);
    assert!(accepts.try_recv().is_err());
    assert_eq!(proxy.metric("portcullis_tcp_received_bytes_total"), 0.0, "the client is not read");
    tell.send(()).expect("an upstream that waits");
    assert_eq!(read(&mut client, 7), b"welcome");
}

#[test]
fn a_denied_connection_is_closed_and_the_upstream_never_hears_of_it() {
    let auth = Upstream::start(|_| Doing::Answer(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n".to_vec()));
    let (accepted, accepts) = channel();
    let origin = serve(move |_| accepted.send(()).expect("a test"));
    let proxy = start_asking(origin, &auth);
    assert_eq!(rest(&mut connect(&proxy)).as_deref(), Some(&b""[..]));
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"filter\"}", 1.0);
    assert!(accepts.try_recv().is_err());
}

/// Pauses always, both ways.
fn holds() -> Vec<u8> {
    guest(
        &[],
        r#"(func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32) (i32.const 1))
        (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32) (i32.const 1))"#,
    )
}

/// Sends until the other side takes nothing for a while; says how much it took.
fn fill(mut stream: TcpStream) -> JoinHandle<usize> {
    std::thread::spawn(move || {
        stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a write timeout");
        let piece = vec![b'x'; 64 * 1024];
        let mut sent = 0;
        while let Ok(count) = stream.write(&piece) {
            sent += count;
        }
        sent
    })
}

#[test]
fn a_filter_that_holds_for_ever_stops_the_sender_and_the_idle_timeout_ends_it() {
    let folder = Folder::new();
    folder.write("guest.wasm", holds());
    let rest_of_policy =
        "filters: [{ name: guest, wasm: guest.wasm, protocol: tcp, limits: { buffered_bytes: 64KiB } }]";
    let limits = "    limits: { idle_timeout: 2s }\n";
    let origin = serve(|stream| drop(fill(stream).join()));
    let proxy = Proxy::start(folder.policy(&tcp_yaml(limits, &[origin], rest_of_policy)));
    let mut client = connect(&proxy);
    let sent = fill(client.try_clone().expect("a second handle")).join().expect("a sender");
    assert!(sent > 64 * 1024, "only {sent} bytes were taken at all");
    let received = proxy.metric("portcullis_tcp_received_bytes_total");
    assert!((65_536.0..98_304.0).contains(&received), "{received} bytes were read");
    assert_eq!(rest(&mut client).unwrap_or_default(), b"", "nothing passed");
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"idle\"}", 1.0);
    assert!(proxy.end().contains(" TCP db tcp_session_idle_timeout "));
}

#[test]
fn a_receiver_that_takes_nothing_stops_the_sender() {
    let origin = serve(|stream| {
        std::thread::sleep(Duration::from_secs(5));
        drop(stream);
    });
    let proxy = start_with(origin, &counts());
    let client = connect(&proxy);
    let sent = fill(client).join().expect("a sender");
    // What the kernel keeps for four sockets' ends, and what the proxy keeps: 64 KiB and one read.
    let passed = proxy.metric("from_client_total");
    assert!(passed > 0.0 && passed <= sent as f64);
    assert!(passed < 32.0 * 1024.0 * 1024.0, "{passed} bytes were read for a receiver that takes none");
}

#[test]
fn a_filter_that_crashes_closes_the_connection_and_what_it_held_goes_nowhere() {
    let crashes = guest(
        &[],
        r#"(func (export "proxy_on_downstream_data") (param i32) (param $len i32) (param i32) (result i32)
            (if (i32.gt_u (local.get $len) (i32.const 4)) (then unreachable))
            (i32.const 0))"#,
    );
    let (origin, told) = collect();
    let proxy = start_with(origin, &crashes);
    let mut client = connect(&proxy);
    client.write_all(b"fine").expect("to send");
    proxy.wait_for_metric("portcullis_tcp_received_bytes_total", 4.0);
    client.write_all(b"too much").expect("to send");
    assert_eq!(rest(&mut client).unwrap_or_default(), b"");
    assert_eq!(told.recv_timeout(PATIENCE).expect("an end").0, b"fine");
    let mut later = connect(&proxy);
    assert_eq!(rest(&mut later).unwrap_or_default(), b"", "fail_closed");
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"filter_failed\"}", 2.0);
    assert!(told.try_recv().is_err(), "the upstream never heard of the second");
    assert!(proxy.end().contains(" TCP db wasm_fail_stream{guest} "));
}

#[test]
fn a_client_that_breaks_off_is_no_end_for_the_upstream() {
    let (origin, told) = collect();
    let proxy = start("", origin, "");
    let mut client = connect(&proxy);
    client.write_all(b"half of it").expect("to send");
    proxy.wait_for_metric("portcullis_tcp_received_bytes_total", 10.0);
    abort(client);
    let (_, ended_well) = told.recv_timeout(PATIENCE).expect("an end");
    assert!(!ended_well, "the upstream must not take it for the whole");
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"client\"}", 1.0);
    assert!(proxy.end().contains(" TCP db downstream_remote_disconnect "));
}

#[test]
fn an_upstream_that_breaks_off_is_no_end_for_the_client() {
    let origin = serve(|mut stream| {
        read(&mut stream, 5);
        abort(stream);
    });
    let proxy = start("", origin, "");
    let mut client = connect(&proxy);
    client.write_all(b"hello").expect("to send");
    let mut byte = [0];
    let error = client.read(&mut byte).expect_err("a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"upstream\"}", 1.0);
}

#[test]
fn an_upstream_that_is_not_there_closes_the_connection() {
    let closed = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("an address");
    let proxy = start("", closed, "");
    assert_eq!(rest(&mut connect(&proxy)).unwrap_or_default(), b"");
    proxy.wait_for_metric("portcullis_upstream_failures_total{upstream=\"origin\",reason=\"connect\"}", 1.0);
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"unreachable\"}", 1.0);
    assert!(proxy.end().contains(" TCP db upstream_unreachable{connect} "));
}

#[test]
fn connections_are_limited_towards_clients_and_upstreams() {
    let proxy = start("    limits: { max_connections: 2 }\n", echo(), "    max_connections: 1");
    let mut first = connect(&proxy);
    first.write_all(b"a").expect("to send");
    assert_eq!(read(&mut first, 1), b"a");
    let mut second = connect(&proxy);
    assert_eq!(rest(&mut second).unwrap_or_default(), b"", "the upstream has as many as it may");
    proxy.wait_for_metric("portcullis_upstream_failures_total{upstream=\"origin\",reason=\"overflow\"}", 1.0);
    proxy.wait_for_metric("portcullis_connections_active", 1.0);
    drop(second);
    drop(first);
    proxy.wait_for_metric("portcullis_connections_active", 0.0);
    let mut third = connect(&proxy);
    third.write_all(b"a").expect("to send");
    assert_eq!(read(&mut third, 1), b"a", "its place is free again");

    let proxy = start("    limits: { max_connections: 1 }\n", echo(), "");
    let mut first = connect(&proxy);
    first.write_all(b"a").expect("to send");
    assert_eq!(read(&mut first, 1), b"a");
    assert_eq!(rest(&mut connect(&proxy)).unwrap_or_default(), b"");
    proxy.wait_for_metric("portcullis_connections_refused_total", 1.0);
}

#[test]
fn connections_take_the_endpoints_in_turn() {
    let named = |name: &'static [u8]| serve(move |mut stream| stream.write_all(name).expect("to send"));
    let endpoints = [named(b"one"), named(b"two")];
    let proxy = Proxy::start(Folder::new().policy(&tcp_yaml("", &endpoints, "")));
    let seen: Vec<Vec<u8>> = (0..4).map(|_| rest(&mut connect(&proxy)).expect("a name")).collect();
    assert_eq!(seen, [b"one", b"two", b"one", b"two"]);
}

#[test]
fn unix_sockets_are_endpoints() {
    let folder = Folder::new();
    let listener = std::os::unix::net::UnixListener::bind(folder.path().join("origin.sock")).expect("a socket");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let got = read(&mut stream, 5);
        stream.write_all(&got).expect("to send");
    });
    let yaml = tcp_yaml("", &["127.0.0.1:1".parse().expect("an address")], "");
    let proxy = Proxy::start(folder.policy(&yaml.replace("127.0.0.1:1\"", "unix:origin.sock\"")));
    let mut client = connect(&proxy);
    client.write_all(b"hello").expect("to send");
    assert_eq!(rest(&mut client).as_deref(), Some(&b"hello"[..]));
}

#[test]
fn http_and_tcp_listeners_stand_side_by_side() {
    let upstream = Upstream::echo();
    let yaml = policy_yaml(upstream.address, "routes: [{ name: all, upstream: api }]")
        .replace("listeners: [", "listeners: [{ name: db, address: \"127.0.0.1:0\", tcp: { upstream: origin } }, ");
    let yaml = yaml.replace("  api:", &format!("  origin: {{ endpoints: [\"{}\"] }}\n  api:", echo()));
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    let mut client = connect(&proxy);
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("to send");
    assert_eq!(read(&mut client, 18), b"GET / HTTP/1.1\r\n\r\n", "to this listener it is but bytes");
    let http = proxy.handle.addresses()[1].1;
    let response = crate::support::Client::connect(http).exchange("GET /x HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(response.status, 200);
}

// ---- TLS

fn certificate(folder: &Folder) -> String {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let pem = made.cert.pem();
    folder.write("cert.pem", &pem).write("key.pem", made.signing_key.serialize_pem());
    pem
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn tls_client(proxy: &Proxy, pem: &str) -> rustls::StreamOwned<rustls::ClientConnection, TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM")).expect("a certificate");
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    // Nobody here knows what is spoken, so none of these can be agreed on.
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from("localhost").expect("a name");
    let connection = rustls::ClientConnection::new(Arc::new(config), name).expect("a session");
    rustls::StreamOwned::new(connection, connect(proxy))
}

const TLS: &str = "    tls: { certificate: cert.pem, private_key: key.pem }\n";

#[test]
fn tls_ends_at_the_listener_and_begins_anew_at_the_upstream() {
    let folder = Folder::new();
    let pem = certificate(&folder);
    let key = std::fs::read(folder.path().join("key.pem")).expect("the key");
    let chain = vec![CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM")];
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(&key).expect("PEM"))
        .expect("a certificate");
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    let config = Arc::new(config);
    let (tell, told) = channel();
    let origin = serve(move |stream| {
        let session = rustls::ServerConnection::new(Arc::clone(&config)).expect("a session");
        let mut stream = rustls::StreamOwned::new(session, stream);
        let got = read(&mut stream, 5);
        tell.send((got.clone(), stream.conn.alpn_protocol().map(<[u8]>::to_vec))).expect("a test");
        stream.write_all(&got).expect("to send");
        stream.conn.send_close_notify();
        stream.flush().expect("to send");
    });
    let rest_of_policy = "    tls: { server_name: localhost, ca: cert.pem }";
    let proxy = Proxy::start(folder.policy(&tcp_yaml(TLS, &[origin], rest_of_policy)));
    let mut client = tls_client(&proxy, &pem);
    client.write_all(b"hello").expect("to send");
    assert_eq!(rest(&mut client).as_deref(), Some(&b"hello"[..]), "with a proper end");
    assert_eq!(client.conn.alpn_protocol(), None);
    assert_eq!(told.recv_timeout(PATIENCE).expect("a connection"), (b"hello".to_vec(), None));
}

#[test]
fn tls_that_is_cut_off_is_no_end_for_the_upstream() {
    let folder = Folder::new();
    let pem = certificate(&folder);
    let (origin, told) = collect();
    let proxy = Proxy::start(folder.policy(&tcp_yaml(TLS, &[origin], "")));
    let mut client = tls_client(&proxy, &pem);
    client.write_all(b"half of it").expect("to send");
    proxy.wait_for_metric("portcullis_tcp_received_bytes_total", 10.0);
    // Whoever sits on the way can close the connection, but cannot say that TLS ends.
    client.sock.shutdown(Shutdown::Write).expect("to finish");
    assert!(!told.recv_timeout(PATIENCE).expect("an end").1);
    let mut whole = tls_client(&proxy, &pem);
    whole.write_all(b"all of it").expect("to send");
    whole.conn.send_close_notify();
    whole.flush().expect("to send");
    assert_eq!(told.recv_timeout(PATIENCE).expect("an end"), (b"all of it".to_vec(), true));
}

#[test]
fn a_client_that_fails_at_tls_meets_neither_filters_nor_the_upstream() {
    let folder = Folder::new();
    certificate(&folder);
    let (accepted, accepts) = channel();
    let origin = serve(move |_| accepted.send(()).expect("a test"));
    folder.write("guest.wasm", counts());
    let proxy = Proxy::start(folder.policy(&tcp_yaml(TLS, &[origin], GUEST)));
    let mut client = connect(&proxy);
    client.write_all(b"this is not TLS").expect("to send");
    rest(&mut client);
    proxy.wait_for_metric("portcullis_tls_handshake_failures_total", 1.0);
    proxy.wait_for_metric("portcullis_connections_active", 0.0);
    assert_eq!(proxy.metric("logged_total"), 0.0);
    assert!(accepts.try_recv().is_err());
}

// ---- the host's own life

#[test]
fn connections_go_on_while_the_host_drains_and_are_cut_when_the_time_is_over() {
    let origin = echo();
    let policy = Folder::new().policy(&tcp_yaml("", &[origin], ""));
    let mut proxy = Proxy::start_with(policy, Some(Duration::from_millis(800))).expect("a server");
    let mut client = connect(&proxy);
    client.write_all(b"a").expect("to send");
    assert_eq!(read(&mut client, 1), b"a");
    proxy.handle.shutdown();
    client.write_all(b"b").expect("to send");
    assert_eq!(read(&mut client, 1), b"b", "it drains");
    assert_eq!(rest(&mut client).unwrap_or_default(), b"");
    proxy.join().expect("a server that ends well");
}

#[test]
fn a_reload_lets_connections_go_on_under_their_policy_for_the_time_of_draining() {
    let (folder, origin) = (Folder::new(), echo());
    folder.write("guest.wasm", counts());
    let old = folder.policy(&tcp_yaml("", &[origin], GUEST));
    let new = folder.policy(&tcp_yaml("", &[origin], "    max_connections: 5"));
    let proxy = Proxy::start_with(old, Some(Duration::from_secs(1))).expect("a server");
    let mut client = connect(&proxy);
    client.write_all(b"a").expect("to send");
    assert_eq!(read(&mut client, 1), b"a");
    proxy.handle.reload(new).expect("a new policy");
    let began = Instant::now();
    client.write_all(b"b").expect("to send");
    assert_eq!(read(&mut client, 1), b"b");
    let mut later = connect(&proxy);
    later.write_all(b"c").expect("to send");
    assert_eq!(read(&mut later, 1), b"c");
    assert_eq!(proxy.metric("from_client_total"), 2.0, "the filter of the old policy sees the old connection only");
    assert_eq!(rest(&mut client).unwrap_or_default(), b"");
    assert!(began.elapsed() >= Duration::from_secs(1));
    later.write_all(b"d").expect("to send");
    assert_eq!(read(&mut later, 1), b"d");
    proxy.wait_for_metric("portcullis_tcp_connections_closed_total{reason=\"cut\"}", 1.0);
    proxy.wait_for_metric("logged_total", 1.0);
}

#[test]
fn a_module_that_would_never_be_called_is_refused() {
    let http =
        guest(&[], r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#);
    let folder = Folder::new();
    folder.write("guest.wasm", http);
    let tcp = folder.policy(&tcp_yaml("", &[echo()], GUEST));
    let error = Proxy::start_with(tcp, None).err().expect("a refusal").to_string();
    assert!(
        error.contains("the module has callbacks for HTTP only, so no TCP connection would ever reach it"),
        "{error}"
    );
    assert!(error.contains("hint: "), "{error}");

    folder.write("guest.wasm", holds());
    let upstream = Upstream::echo();
    let http = folder.policy(&policy_yaml(upstream.address, crate::support::GUEST_ROUTE));
    let error = Proxy::start_with(http, None).err().expect("a refusal").to_string();
    assert!(
        error.contains("the module has callbacks for TCP connections only, so no request would ever reach it"),
        "{error}"
    );
}
