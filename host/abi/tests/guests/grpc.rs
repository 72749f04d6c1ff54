//! gRPC calls and streams: what guests may ask for, what they are told, and in which order.
//!
//! The behaviour is Envoy 1.40's, as measured with the probe of `tests/guests`.

use std::time::Duration;

use bytes::Bytes;
use portcullis_abi::{Action, CallAnswer, CallId, Ending, FieldMap, GrpcEvent, Plugin, StreamId, grpc_frame};

use crate::support::{Host, plugin, request};

/// Does `code` when a request comes and holds it, tells all it is told, and does `further` when a message comes.
///
/// Names lie at 16 (`auth`), 20 (`svc`) and 23 (`Get`), the message `hello` at 26; the last token is `$token`. Statuses are
/// said as letters from `a` (0) on, closing statuses as digits, roots and tokens with everything that is told.
fn script(code: &str, further: &str) -> Plugin {
    plugin(&format!(
        r#"
  (data (i32.const 16) "authsvcGethello")
  ;; A service with `envoy_grpc`: `auth`, `nope`; and one without.
  (data (i32.const 48) "\0a\06\0a\04auth")
  (data (i32.const 56) "\0a\06\0a\04nope")
  (data (i32.const 64) "\12\05\0a\03a:1")
  (data (i32.const 80) "\01\00\00\00\03\00\00\00\01\00\00\00x-a\00\0a\00")
  (data (i32.const 112) "\01\00\00\00\03\00\00\00\01\00\00\00x-a\001\00")
  (data (i32.const 144) "grpc-status")
  (data (i32.const 400) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\01\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/\00:authority\00a\00")
  (global $token (mut i32) (i32.const 0))
  (func $status (param $status i32) (call $say (i32.add (i32.const 97) (local.get $status))))
  (func $call (result i32) (local $status i32)
    (local.set $status (call $grpc_call (i32.const 16) (i32.const 4) (i32.const 20) (i32.const 3) (i32.const 23) (i32.const 3)
      (i32.const 0) (i32.const 0) (i32.const 26) (i32.const 5) (i32.const 1000) (i32.const 200)))
    (global.set $token (i32.load (i32.const 200)))
    (local.get $status))
  (func $stream (result i32) (call $stream_to (i32.const 16) (i32.const 4) (i32.const 0) (i32.const 0)))
  (func $stream_to (param $at i32) (param $len i32) (param $meta i32) (param $meta_len i32) (result i32) (local $status i32)
    (local.set $status (call $grpc_stream (local.get $at) (local.get $len) (i32.const 20) (i32.const 3)
      (i32.const 23) (i32.const 3) (local.get $meta) (local.get $meta_len) (i32.const 200)))
    (global.set $token (i32.load (i32.const 200)))
    (local.get $status))
  (func $send (param $end i32) (result i32)
    (call $grpc_send (global.get $token) (i32.const 26) (i32.const 5) (local.get $end)))
  (func $http (result i32)
    (call $http_call (i32.const 16) (i32.const 4) (i32.const 400) (i32.const 61) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 204)))
  (func $say_status
    (drop (call $get_status (i32.const 204) (i32.const 208) (i32.const 212)))
    (call $say (i32.add (i32.const 48) (i32.load (i32.const 204))))
    (drop (call $log (i32.const 2) (i32.load (i32.const 208)) (i32.load (i32.const 212)))))
  ;; `root, token`, behind a word of three letters.
  (func $told (param $word i32) (param $root i32) (param $token i32)
    (i32.store (i32.const 300) (local.get $word))
    (i32.store8 (i32.const 303) (i32.add (i32.const 48) (local.get $root)))
    (i32.store8 (i32.const 304) (i32.add (i32.const 48) (local.get $token)))
    (drop (call $log (i32.const 2) (i32.const 300) (i32.const 5))))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) {code} (i32.const 1))
  (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32) (call $say_status))
  (func (export "proxy_on_grpc_receive_initial_metadata") (param $root i32) (param $token i32) (param $lines i32)
    (call $told (i32.const 0x696e69) (local.get $root) (local.get $token)))
  (func (export "proxy_on_grpc_receive") (param $root i32) (param $token i32) (param $len i32)
    (call $told (i32.const 0x67736d) (local.get $root) (local.get $token))
    (drop (call $get_buffer (i32.const 5) (i32.const 0) (local.get $len) (i32.const 204) (i32.const 208)))
    (drop (call $log (i32.const 2) (i32.load (i32.const 204)) (i32.load (i32.const 208))))
    {further})
  (func (export "proxy_on_grpc_receive_trailing_metadata") (param $root i32) (param $token i32) (param $lines i32)
    (call $told (i32.const 0x617274) (local.get $root) (local.get $token))
    (if (i32.eqz (call $get (i32.const 5) (i32.const 144) (i32.const 11) (i32.const 204) (i32.const 208)))
      (then (drop (call $log (i32.const 2) (i32.load (i32.const 204)) (i32.load (i32.const 208)))))))
  (func (export "proxy_on_grpc_close") (param $root i32) (param $token i32) (param $status i32)
    (call $told (i32.const 0x646e65) (local.get $root) (local.get $token))
    (call $say_status))"#
    ))
}

fn begin(plugin: Plugin) -> (Host, StreamId) {
    let mut host = Host::new(vec![plugin]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), true);
    (host, id)
}

/// The exchanges that the guest began; other actions are dropped.
fn opened(host: &mut Host) -> Vec<CallId> {
    let actions = std::iter::from_fn(|| host.worker.poll_action());
    let opened = actions.filter_map(|action| match action {
        Action::GrpcOpen(id, _) => Some(id),
        _ => None,
    });
    opened.collect()
}

fn log(host: &Host) -> Vec<String> {
    host.world.log.take()
}

/// Tells of an event that leaves nothing over.
fn event(host: &mut Host, call: CallId, event: GrpcEvent) {
    assert!(!host.worker.grpc_event(call, event));
}

fn head() -> GrpcEvent {
    GrpcEvent::Headers { fields: [(":status", "200")].into_iter().collect(), end_of_stream: false }
}

fn data(messages: &[&str]) -> GrpcEvent {
    GrpcEvent::Data(Bytes::from(
        messages.iter().flat_map(|message| grpc_frame(message.as_bytes())).collect::<Vec<u8>>(),
    ))
}

fn trailers(status: &str) -> GrpcEvent {
    let mut fields = FieldMap::new();
    fields.push(b"grpc-status", status.as_bytes());
    GrpcEvent::Trailers(fields)
}

#[test]
fn a_call_is_one_message_there_and_one_back() {
    let (mut host, _) = begin(script("(call $status (call $call))", ""));
    let seen = host.seen();
    assert_eq!(
        seen,
        [
            "grpc auth Some(1s) [:method=POST :path=/svc/Get :authority=auth te=trailers grpc-timeout=1000m content-type=application/grpc]",
            "send b\"\\0\\0\\0\\0\\x05hello\".",
        ]
    );
    let (mut host, _) = begin(script("(call $status (call $call))", ""));
    let [call] = opened(&mut host)[..] else { panic!("one call") };
    for each in [head(), data(&["world"]), trailers("0")] {
        event(&mut host, call, each);
    }
    assert_eq!(log(&host), ["a", "msg15", "world"], "the root context 1, the token 5");
    event(&mut host, call, trailers("0"));
    assert_eq!((log(&host), host.seen()), (vec![], vec![]), "once");
}

#[test]
fn a_failed_call_is_told_by_its_status_alone() {
    let (mut host, _) = begin(script("(call $status (call $call))", ""));
    let [call] = opened(&mut host)[..] else { panic!("one call") };
    for each in [head(), data(&["world"]), trailers("7")] {
        event(&mut host, call, each);
    }
    assert_eq!(log(&host), ["a", "end15", "7", "via_upstream"]);

    let (mut host, _) = begin(script("(call $status (call $call))", ""));
    let [call] = opened(&mut host)[..] else { panic!("one call") };
    event(&mut host, call, GrpcEvent::unavailable("reset reason: overflow", "details"));
    let message = "upstream connect error or disconnect/reset before headers. reset reason: overflow{details}";
    assert_eq!(log(&host), ["a", "end15", ">", message], "14");
}

#[test]
fn a_stream_carries_messages_both_ways() {
    let further = "(call $status (call $send (i32.const 0))) (call $status (call $send (i32.const 1)))
        (call $status (call $send (i32.const 0)))";
    let (mut host, _) =
        begin(script("(call $status (call $stream)) (call $status (call $send (i32.const 0)))", further));
    let seen = host.seen();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(seen[0].starts_with("grpc auth None [:method=POST"), "{seen:?}");
    assert!(!seen[0].contains("grpc-timeout"), "{seen:?}");
    assert_eq!(seen[1], "send b\"\\0\\0\\0\\0\\x05hello\"");

    let (mut host, _) =
        begin(script("(call $status (call $stream)) (call $status (call $send (i32.const 0)))", further));
    let [call] = opened(&mut host)[..] else { panic!("one stream") };
    for each in [head(), data(&["one"])] {
        event(&mut host, call, each);
    }
    let one = "send b\"\\0\\0\\0\\0\\x05hello\"";
    assert_eq!(host.seen(), [one, &format!("{one}.")], "what follows the end of our side has no effect");
    assert_eq!(log(&host), ["a", "a", "ini16", "msg16", "one", "a", "a", "a"]);
    assert!(host.world.lints.borrow().iter().any(|lint| lint.contains("has ended its side")));
    event(&mut host, call, trailers("0"));
    assert_eq!(log(&host), ["tra16", "0", "end16", "0", "via_upstream"]);
}

#[test]
fn bytes_of_a_message_may_arrive_one_by_one() {
    let (mut host, _) = begin(script("(drop (call $stream))", ""));
    let [call] = opened(&mut host)[..] else { panic!("one stream") };
    event(&mut host, call, head());
    for byte in [grpc_frame(b"one"), grpc_frame(b""), grpc_frame(b"two")].concat() {
        event(&mut host, call, GrpcEvent::Data(Bytes::from(vec![byte])));
    }
    assert_eq!(log(&host), ["ini16", "msg16", "one", "msg16", "", "msg16", "two"]);
}

#[test]
fn closing_ends_our_side_and_cancelling_everything() {
    let close = "(call $status (call $grpc_close (global.get $token)))";
    let cancel = "(call $status (call $grpc_cancel (global.get $token)))";
    let (mut host, _) = begin(script("(drop (call $stream))", &format!("{close}{close}")));
    let [call] = opened(&mut host)[..] else { panic!("one stream") };
    event(&mut host, call, head());
    event(&mut host, call, data(&["one"]));
    assert_eq!(host.seen(), ["send b\"\"."]);
    event(&mut host, call, trailers("0"));
    assert_eq!(log(&host), ["ini16", "msg16", "one", "a", "a", "tra16", "0", "end16", "0", "via_upstream"]);

    // The second message has arrived together with the first, and nobody wants it any more.
    let (mut host, _) = begin(script("(drop (call $stream))", &format!("{cancel}{cancel}{close}")));
    let [call] = opened(&mut host)[..] else { panic!("one stream") };
    event(&mut host, call, head());
    event(&mut host, call, data(&["one", "two"]));
    assert_eq!(host.seen(), ["cancel call"]);
    event(&mut host, call, trailers("0"));
    assert_eq!(log(&host), ["ini16", "msg16", "one", "a", "b", "b"], "the token is unknown from then on");

    // Of a call, closing is cancelling; one that was not even begun never is.
    let (mut host, _) = begin(script(&format!("(drop (call $call)) {close} {cancel}"), ""));
    assert_eq!((host.seen(), log(&host)), (vec![], vec!["a".to_owned(), "b".to_owned()]));
}

#[test]
fn a_stream_that_the_server_ended_can_be_closed_or_cancelled_once() {
    for end in ["$grpc_close", "$grpc_cancel"] {
        let end = format!("(call $status (call {end} (i32.const 6)))");
        let later = format!(
            "(if (global.get $token) (then (drop (call $send (i32.const 0))) {end} {end}) (else (drop (call $stream))))"
        );
        let mut host = Host::new(vec![script(&later, "")]);
        let first = host.open(&[0]);
        host.worker.request_headers(first, request(), true);
        let [call] = opened(&mut host)[..] else { panic!("one stream") };
        event(&mut host, call, head());
        event(&mut host, call, trailers("0"));
        log(&host);
        let second = host.open(&[0]);
        host.worker.request_headers(second, request(), true);
        assert_eq!(log(&host), ["a", "b"], "{end}");
        assert_eq!(host.seen(), [""; 0], "nothing is sent on it");
    }
}

#[test]
fn statuses_are_envoys() {
    let stream = |at: u32, len: u32| {
        format!("(call $status (call $stream_to (i32.const {at}) (i32.const {len}) (i32.const 0) (i32.const 0)))")
    };
    let check = |code: &str, expected: &str| {
        let (host, _) = begin(script(code, ""));
        assert_eq!(host.world.said(), expected, "{code}");
    };
    check(&stream(48, 8), "a");
    check(&stream(20, 3), "e");
    check(&stream(0, 0), "e");
    check(&stream(56, 8), "k");
    check(&stream(64, 7), "e");
    check(&stream(0, 65_537), "e");
    // Metadata with a line feed, and such that cannot be decoded; Envoy does not survive the first and takes the second as none.
    check("(call $status (call $stream_to (i32.const 16) (i32.const 4) (i32.const 80) (i32.const 18)))", "e");
    check("(call $status (call $stream_to (i32.const 16) (i32.const 4) (i32.const 80) (i32.const 17)))", "e");
    check("(call $status (call $stream_to (i32.const 16) (i32.const 4) (i32.const 112) (i32.const 18)))", "a");
    let on = |function: &str, token: u32| match function {
        "send" => {
            format!("(call $status (call $grpc_send (i32.const {token}) (i32.const 26) (i32.const 5) (i32.const 0)))")
        }
        other => format!("(call $status (call $grpc_{other} (i32.const {token})))"),
    };
    check(&[on("send", 2), on("send", 6), on("send", 4), on("send", 5), on("send", 7)].concat(), "bbccc");
    for end in ["close", "cancel"] {
        check(&[on(end, 5), on(end, 6), on(end, 4), on(end, 7), on(end, 0)].concat(), "bbccc");
    }
    let mut restricted = script(&stream(16, 4), "");
    restricted.capabilities.upstreams = Some(["other".to_owned()].into());
    assert_eq!(begin(restricted).0.world.said(), "e", "an upstream that the plugin may not call");
    let mut restricted = script(&stream(48, 8), "");
    restricted.capabilities.upstreams = Some(["other".to_owned()].into());
    assert_eq!(begin(restricted).0.world.said(), "k");
}

#[test]
fn pointers_outside_memory_end_the_guest() {
    for code in [
        "(drop (call $grpc_send (i32.const 6) (i32.const -1) (i32.const 5) (i32.const 0)))",
        "(drop (call $stream_to (i32.const 131070) (i32.const 4) (i32.const 0) (i32.const 0)))",
        "(drop (call $grpc_stream (i32.const 16) (i32.const 4) (i32.const 20) (i32.const 3) (i32.const 23) (i32.const 3)
            (i32.const 0) (i32.const 0) (i32.const 131070)))",
    ] {
        let (host, _) = begin(script(code, ""));
        assert!(host.world.log.borrow().iter().any(|line| line.contains("outside the guest's memory")), "{code}");
    }
}

#[test]
fn calls_of_all_kinds_count_together() {
    let mut limited = script(
        "(call $status (call $call)) (call $status (call $stream)) (call $status (call $http))
         (call $status (call $stream)) (call $status (call $call)) (call $status (call $http))",
        "",
    );
    limited.limits.calls_max = 3;
    let (mut host, _) = begin(limited);
    assert_eq!(host.world.said(), "aaakkk");
    let [call, _] = opened(&mut host)[..] else { panic!("two exchanges") };
    event(&mut host, call, head());
    event(&mut host, call, trailers("0"));
    log(&host);
    let second = host.open(&[0]);
    host.worker.request_headers(second, request(), true);
    assert_eq!(host.world.said(), "akkkkk", "one has ended");
}

#[test]
fn opening_and_cancelling_in_a_loop_costs_nothing() {
    let code = "(local $i i32) (loop
        (drop (call $stream)) (drop (call $send (i32.const 0))) (drop (call $grpc_cancel (global.get $token)))
        (br_if 0 (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 1000))))
        (call $status (call $stream))";
    let (mut host, _) = begin(script(code, ""));
    assert_eq!(host.world.said(), "a");
    assert_eq!(host.seen().len(), 1, "the last one");
}

#[test]
fn messages_and_metadata_from_guests_are_bounded() {
    let mut long = script("(call $status (call $call))", "");
    long.limits.call_bytes_max = 4;
    assert_eq!(begin(long).0.world.said(), "k");
    let code = "(call $status (call $stream_to (i32.const 16) (i32.const 4) (i32.const 112) (i32.const 18)))";
    let mut many = script(code, "");
    many.limits.map_lines_max = 5;
    assert_eq!(begin(many).0.world.said(), "k", "five lines are the host's own");
    let mut large = script(code, "");
    large.limits.map_bytes_max = 50;
    assert_eq!(begin(large).0.world.said(), "k");
}

#[test]
fn what_waits_to_be_sent_is_bounded_by_the_end_of_the_stream() {
    let code =
        "(drop (call $stream)) (call $status (call $send (i32.const 0))) (call $status (call $send (i32.const 0)))
        (call $status (call $send (i32.const 0)))";
    // Each of the messages counts with its frame and 64 bytes more: 74.
    let limited = |bytes_max| {
        let mut limited = script(code, "");
        limited.limits.call_bytes_max = bytes_max;
        limited
    };
    let (mut host, _) = begin(limited(148));
    assert_eq!(log(&host), ["a", "a", "a", "end16", "8", "more waits to be sent than `limits` allows"]);
    let seen = host.seen();
    assert_eq!(seen.len(), 4, "{seen:?}");
    assert_eq!(seen[3], "cancel call");
    let (mut host, _) = begin(limited(222));
    let [call] = opened(&mut host)[..] else { panic!("one stream") };
    assert_eq!(log(&host), ["a", "a", "a"]);
    // What has left makes room.
    let more = "(call $status (call $send (i32.const 0)))";
    let mut limited = script(&format!("(drop (call $stream)) {more}{more}"), &format!("{more}{more}"));
    limited.limits.call_bytes_max = 148;
    event(&mut host, call, GrpcEvent::Sent(10));
    let (mut host, _) = begin(limited);
    let [call] = opened(&mut host)[..] else { panic!("one stream") };
    event(&mut host, call, GrpcEvent::Sent(10));
    event(&mut host, call, GrpcEvent::Sent(10));
    event(&mut host, call, head());
    event(&mut host, call, data(&["go"]));
    assert_eq!(log(&host), ["a", "a", "ini16", "msg16", "go", "a", "a"]);
}

#[test]
fn messages_that_take_long_leave_turns_to_requests() {
    let (mut host, _) = begin(script("(drop (call $stream))", ""));
    let [call] = opened(&mut host)[..] else { panic!("one stream") };
    event(&mut host, call, head());
    log(&host);
    // Two lines a message, and turns of 10 ms.
    host.world.line_takes.set(Duration::from_millis(3));
    assert!(host.worker.grpc_event(call, data(&["a", "b", "c"])));
    assert_eq!(log(&host), ["msg16", "a", "msg16", "b"]);
    event(&mut host, call, GrpcEvent::Turn);
    assert_eq!(log(&host), ["msg16", "c"]);
    event(&mut host, call, GrpcEvent::Turn);
    assert_eq!(log(&host), [""; 0]);
}

#[test]
fn a_message_that_is_too_long_ends_the_exchange() {
    let mut limited = script("(drop (call $stream))", "");
    limited.limits.call_bytes_max = 10;
    let (mut host, _) = begin(limited);
    let [call] = opened(&mut host)[..] else { panic!("one stream") };
    event(&mut host, call, head());
    event(&mut host, call, data(&["0123456789"]));
    event(&mut host, call, GrpcEvent::Data(Bytes::from_static(b"\0\0\0\0\x0b")));
    assert_eq!(log(&host), ["ini16", "msg16", "0123456789", "tra16", "end16", "8", "via_upstream"]);
    assert_eq!(host.seen(), ["cancel call"]);
}

#[test]
fn a_finished_stream_cancels_its_exchanges() {
    let (mut host, id) = begin(script("(drop (call $call)) (drop (call $stream))", ""));
    let [first, second] = opened(&mut host)[..] else { panic!("two exchanges") };
    host.worker.finish(id, Ending::default());
    assert_eq!(host.seen(), ["cancel call", "cancel call"]);
    let message = "the stream that it was for has ended";
    assert_eq!(log(&host), ["end15", "1", message, "end16", "1", message]);
    for call in [first, second] {
        event(&mut host, call, head());
        event(&mut host, call, trailers("0"));
    }
    assert_eq!(log(&host), [""; 0]);
}

#[test]
fn a_trap_cancels_what_the_guest_began() {
    let (mut host, _) = begin(script("(drop (call $stream)) (drop (call $stream))", "(unreachable)"));
    let [first, second] = opened(&mut host)[..] else { panic!("two streams") };
    event(&mut host, first, head());
    event(&mut host, first, data(&["one", "two"]));
    let seen = host.seen();
    assert_eq!(seen.iter().filter(|line| *line == "cancel call").count(), 2, "{seen:?}");
    assert!(seen.iter().any(|line| line.starts_with("< [:status=503")), "the request that waits fails: {seen:?}");
    event(&mut host, second, head());
    assert_eq!(log(&host).iter().filter(|line| line.starts_with("msg")).count(), 1);
}

#[test]
fn a_callback_that_is_not_allowed_is_not_called() {
    let mut restricted = script("(call $status (call $call))", "");
    restricted.capabilities.callbacks = Some(["proxy_on_request_headers".to_owned()].into());
    let (mut host, _) = begin(restricted);
    let [call] = opened(&mut host)[..] else { panic!("one call") };
    for each in [head(), data(&["world"]), trailers("0")] {
        event(&mut host, call, each);
    }
    assert_eq!(log(&host), ["a"]);
}

#[test]
fn the_status_is_that_of_the_last_failure() {
    // The message is there only while the guest is told; a callout without an answer counts as a broken connection.
    let code = "(call $say_status) (drop (call $call)) (call $status (call $http))";
    let (mut host, _) = begin(script(code, ""));
    let mut actions = std::iter::from_fn(|| host.worker.poll_action()).collect::<Vec<_>>();
    let Some(Action::Call(http, _)) = actions.pop() else { panic!("{actions:?}") };
    let Some(Action::GrpcOpen(call, open)) = actions.drain(..).next() else { panic!("a call") };
    assert_eq!(open.timeout, Some(Duration::from_secs(1)));
    event(&mut host, call, trailers("7"));
    host.worker.call_answered(http, CallAnswer::Reset);
    let second = host.open(&[0]);
    host.worker.request_headers(second, request(), true);
    // The digit after 9 and one: 11.
    assert_eq!(log(&host)[..9], ["0", "", "a", "end15", "7", "via_upstream", ";", "reset", ";"]);
}
