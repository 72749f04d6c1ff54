//! Streams through guests: what passes, what is held, what is answered.

use std::time::Duration;

use crate::support::{Host, bytes, plugin, request, response};
use portcullis_abi::{CallAnswer, Direction, Ending, FieldMap, LocalResponse};

/// Adds `x-b: 2` to the request.
const ADDS_A_FIELD: &str = r#"
  (data (i32.const 16) "X-B2")
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $add (i32.const 0) (i32.const 16) (i32.const 3) (i32.const 19) (i32.const 1)))
    (i32.const 0))"#;

/// Answers 403 with a field, and says when its response callbacks run.
const DENIES: &str = r#"
  (data (i32.const 16) "no way")
  (data (i32.const 32) "\01\00\00\00\01\00\00\00\01\00\00\00x\00y\00")
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $respond (i32.const 403) (i32.const 16) (i32.const 6) (i32.const 16) (i32.const 6)
      (i32.const 32) (i32.const 16) (i32.const -1)))
    (drop (call $respond (i32.const 500) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0) (i32.const -1)))
    (i32.const 0))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (call $say (i32.const 72)) (i32.const 0))
  (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32) (call $say (i32.const 66)) (i32.const 0))
  (func (export "proxy_on_log") (param i32) (call $say (i32.const 108)))
  (func (export "proxy_on_done") (param i32) (result i32) (call $say (i32.const 100)) (i32.const 0))
  (func (export "proxy_on_delete") (param i32) (call $say (i32.const 120)))"#;

/// Stops at headers and, with every body callback, at the body until its end.
const WAITS_FOR_THE_BODY: &str = r#"
  (func (export "proxy_on_request_headers") (param i32 i32) (param $end i32) (result i32)
    (i32.eqz (local.get $end)))
  (func (export "proxy_on_request_body") (param i32) (param $len i32) (param $end i32) (result i32)
    (call $say (i32.add (i32.const 48) (local.get $len)))
    (i32.eqz (local.get $end)))"#;

#[test]
fn a_chain_without_filters_passes_everything() {
    let mut host = Host::new(vec![]);
    let id = host.open(&[]);
    host.worker.request_headers(id, request(), false);
    host.worker.request_body(id, bytes("ab"), false);
    host.worker.request_trailers(id, [("t", "1")].into_iter().collect());
    host.worker.response_headers(id, response(), false);
    host.worker.response_body(id, bytes("abc"), true);
    assert_eq!(
        host.seen(),
        ["> []", "> \"ab\"", "> trailers [t=1].", "< [:status=200 content-length=3]", "< \"abc\"."]
    );
}

#[test]
fn filters_change_the_request_in_order() {
    let mut host = Host::new(vec![plugin(ADDS_A_FIELD)]);
    let id = host.open(&[0, 0]);
    host.worker.request_headers(id, request(), true);
    assert_eq!(host.seen(), ["> [x-b=2 x-b=2]."]);
}

#[test]
fn a_local_response_passes_back_through_the_filter_that_made_it() {
    let mut host = Host::new(vec![plugin(DENIES), plugin(ADDS_A_FIELD)]);
    let id = host.open(&[0, 1]);
    host.worker.request_headers(id, request(), false);
    host.worker.request_body(id, bytes("late"), true);
    assert_eq!(
        host.seen(),
        ["< [:status=403 x=y content-length=6 content-type=text/plain] (no_way)", "< \"no way\"."],
        "the first answer counts, white space in details does not survive, the upstream sees nothing"
    );
    host.worker.finish(id, Ending::default());
    assert_eq!(host.world.said(), "HBldx");
}

#[test]
fn a_held_request_reaches_the_upstream_whole() {
    let mut host = Host::new(vec![plugin(WAITS_FOR_THE_BODY)]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), false);
    host.worker.request_body(id, bytes("ab"), false);
    host.worker.request_body(id, bytes("c"), false);
    assert_eq!(host.seen(), [""; 0], "nothing leaves while the filter waits");
    host.worker.request_body(id, bytes(""), true);
    assert_eq!(host.seen(), ["> []", "> \"abc\"."]);
    assert_eq!(host.world.said(), "233", "each callback shows all there is so far");
}

#[test]
fn without_stop_iteration_nothing_is_shown_until_the_guest_resumes() {
    let mut stopped = plugin(WAITS_FOR_THE_BODY);
    stopped.allow_on_headers_stop_iteration = false;
    let mut host = Host::new(vec![stopped]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), false);
    host.worker.request_body(id, bytes("ab"), true);
    assert_eq!(host.seen(), [""; 0]);
    assert_eq!(host.world.said(), "");
}

#[test]
fn a_body_over_the_limit_is_refused() {
    let mut host = Host::new(vec![plugin(WAITS_FOR_THE_BODY)]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), false);
    host.worker.request_body(id, vec![b'x'; 64].into(), false);
    assert_eq!(host.seen(), [""; 0]);
    host.worker.request_body(id, bytes("y"), false);
    let seen = host.seen();
    assert!(seen[0].starts_with("< [:status=413 "), "{seen:?}");
    assert!(!seen.iter().any(|line| line.starts_with('>')));
}

#[test]
fn a_full_buffer_stops_the_sender_where_the_guest_stops_everything() {
    let mut stopped = plugin(WAITS_FOR_THE_BODY);
    stopped.allow_on_headers_stop_iteration = false;
    let mut host = Host::new(vec![stopped]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), false);
    assert!(host.worker.may_read(id, Direction::Request));
    host.worker.request_body(id, vec![b'x'; 64].into(), false);
    assert!(!host.worker.may_read(id, Direction::Request));
    assert_eq!(host.seen(), [""; 0], "no error: the client waits");
}

/// Stops the request, calls out, and resumes it when the answer is 200, or answers 403.
const ASKS_AUTH: &str = r#"
  (data (i32.const 16) "auth")
  (data (i32.const 32) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\01\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/\00:authority\00a\00")
  (data (i32.const 128) ":status")
  (global $stream (mut i32) (i32.const 0))
  (func (export "proxy_on_request_headers") (param $id i32) (param i32 i32) (result i32)
    (global.set $stream (local.get $id))
    (if (call $http_call (i32.const 16) (i32.const 4) (i32.const 32) (i32.const 61)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 200))
      (then (call $say (i32.const 33))))
    (i32.const 1))
  (func (export "proxy_on_http_call_response") (param $root i32) (param $token i32) (param $fields i32) (param i32 i32)
    (call $say (i32.add (i32.const 48) (local.get $token)))
    (if (i32.eqz (local.get $fields)) (then (return)))
    (drop (call $get (i32.const 6) (i32.const 128) (i32.const 7) (i32.const 204) (i32.const 208)))
    (drop (call $effective (global.get $stream)))
    (if (i32.eq (i32.load8_u (i32.load (i32.const 204))) (i32.const 50))
      (then (drop (call $continue (i32.const 0))))
      (else (drop (call $respond (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
        (i32.const 0) (i32.const 0) (i32.const -1))))))"#;

fn call_id(host: &mut Host) -> portcullis_abi::CallId {
    match host.worker.poll_action() {
        Some(portcullis_abi::Action::Call(id, call)) => {
            assert_eq!((call.upstream.as_str(), call.timeout), ("auth", Some(Duration::from_secs(1))));
            id
        }
        other => panic!("{other:?}"),
    }
}

fn answer(status: &str) -> CallAnswer {
    CallAnswer::Response {
        fields: [(":status", status)].into_iter().collect(),
        body: bytes(""),
        trailers: FieldMap::new(),
    }
}

#[test]
fn an_answered_callout_resumes_or_denies_the_request() {
    let mut host = Host::new(vec![plugin(ASKS_AUTH)]);
    let (first, second) = (host.open(&[0]), host.open(&[0]));
    host.worker.request_headers(first, request(), true);
    let call = call_id(&mut host);
    host.worker.call_answered(call, answer("200"));
    assert_eq!(host.seen(), ["> []."]);
    host.worker.call_answered(call, answer("200"));
    assert_eq!(host.seen(), [""; 0], "an answer counts once");
    host.worker.request_headers(second, request(), true);
    let call = call_id(&mut host);
    host.worker.call_answered(call, CallAnswer::unavailable("test"));
    assert_eq!(host.seen(), ["< [:status=403]. ()"]);
    assert_eq!(host.world.said(), "48", "tokens go up by four");
}

#[test]
fn callouts_under_way_are_bounded() {
    let mut limited = plugin(ASKS_AUTH);
    limited.limits.calls_max = 1;
    let mut host = Host::new(vec![limited]);
    for _ in 0..2 {
        let id = host.open(&[0]);
        host.worker.request_headers(id, request(), true);
    }
    call_id(&mut host);
    assert_eq!(host.seen(), [""; 0], "the second was not made");
    assert_eq!(host.world.said(), "!", "and its guest knows");
}

#[test]
fn a_finished_stream_cancels_its_callouts() {
    let mut host = Host::new(vec![plugin(ASKS_AUTH)]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), true);
    let call = call_id(&mut host);
    host.worker.finish(id, Ending::default());
    assert_eq!(host.seen(), ["cancel call"]);
    host.worker.call_answered(call, answer("200"));
    assert_eq!(host.seen(), [""; 0]);
    assert_eq!(host.world.said(), "4", "the guest heard once that there is no answer");
}

#[test]
fn an_answer_of_the_hosts_own_passes_filters_that_saw_the_request() {
    let mut host = Host::new(vec![plugin(DENIES)]);
    let id = host.open(&[0]);
    host.worker.respond(id, LocalResponse { status: 404, details: "route_not_found".into(), ..Default::default() });
    assert_eq!(host.seen(), ["< [:status=404]. (route_not_found)"]);
    host.worker.finish(id, Ending::default());
    assert_eq!(host.world.said(), "ldx", "it logs what it never saw");
}

#[test]
fn grpc_clients_get_trailers_only_answers() {
    let mut host = Host::new(vec![plugin(DENIES)]);
    let id = host.open(&[0]);
    let mut fields = request();
    fields.push(b"content-type", b"application/grpc+proto");
    host.worker.request_headers(id, fields, false);
    assert_eq!(
        host.seen(),
        ["< [:status=200 x=y content-type=application/grpc grpc-status=7 grpc-message=no way]. (no_way)"]
    );
}

/// Replaces the body by a longer one, having held the headers.
const EDITS_THE_BODY: &str = r#"
  (data (i32.const 16) "longer")
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_response_body") (param i32) (param $len i32) (param $end i32) (result i32)
    (if (i32.eqz (local.get $end)) (then (return (i32.const 1))))
    (drop (call $set_buffer (i32.const 1) (i32.const 0) (local.get $len) (i32.const 16) (i32.const 6)))
    (i32.const 0))"#;

#[test]
fn content_length_follows_an_edited_body() {
    let mut host = Host::new(vec![plugin(EDITS_THE_BODY)]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), true);
    host.worker.response_headers(id, response(), false);
    host.worker.response_body(id, bytes("abc"), false);
    host.worker.response_body(id, bytes(""), true);
    assert_eq!(host.seen()[1..], ["< [:status=200 content-length=6]", "< \"longer\"."]);
}

/// Removes `:path`.
const TAKES_THE_PATH: &str = r#"
  (data (i32.const 16) ":path")
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $remove (i32.const 0) (i32.const 16) (i32.const 5)))
    (i32.const 0))"#;

#[test]
fn a_request_without_its_path_is_not_sent() {
    let mut host = Host::new(vec![plugin(TAKES_THE_PATH)]);
    let seen = host.get();
    assert!(seen[0].starts_with("< [:status=404]. (route_not_found"), "{seen:?}");
}

/// Answers 500 from the response's headers, and resets from its body.
const RESPONDS_LATE: &str = r#"
  (func (export "proxy_on_response_headers") (param i32) (param $count i32) (param i32) (result i32)
    (call $say (i32.const 72))
    (if (i32.gt_u (local.get $count) (i32.const 1)) (then (return (i32.const 0))))
    (drop (call $respond (i32.const 500) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0) (i32.const -1)))
    (i32.const 0))
  (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
    (drop (call $respond (i32.const 500) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0) (i32.const -1)))
    (i32.const 0))"#;

#[test]
fn a_local_response_to_response_headers_replaces_them_directly() {
    let mut host = Host::new(vec![plugin(RESPONDS_LATE)]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), true);
    host.worker.response_headers(id, [(":status", "200")].into_iter().collect(), false);
    assert_eq!(host.seen(), ["> [].", "cancel upstream", "< [:status=500]. ()"]);
    assert_eq!(host.world.said(), "H", "no second callback");
}

#[test]
fn a_local_response_behind_sent_headers_is_a_reset() {
    let mut host = Host::new(vec![plugin(RESPONDS_LATE)]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), true);
    host.worker.response_headers(id, response(), false);
    host.worker.response_body(id, bytes("abc"), true);
    assert_eq!(host.seen(), ["> [].", "< [:status=200 content-length=3]", "cancel upstream", "reset"]);
}

/// Reads a request field in the response phase.
const READS_TOO_LATE: &str = r#"
  (data (i32.const 16) "x-a")
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (call $say (i32.add (i32.const 48)
      (call $get (i32.const 0) (i32.const 16) (i32.const 3) (i32.const 200) (i32.const 204))))
    (call $say (i32.add (i32.const 48) (call $pairs (i32.const 0) (i32.const 200) (i32.const 204))))
    (call $say (i32.add (i32.const 48) (i32.load (i32.const 200))))
    (i32.const 0))"#;

#[test]
fn released_request_headers_answer_as_in_envoy_and_are_linted() {
    let mut host = Host::new(vec![plugin(READS_TOO_LATE)]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), true);
    host.worker.response_headers(id, response(), true);
    assert_eq!(host.world.said(), "200", "BadArgument for a value; an empty map, which is no error");
    let lints = host.world.lints.borrow();
    assert!(
        lints[0].starts_with("proxy_on_response_headers proxy_get_header_map_value answers BadArgument"),
        "{lints:?}"
    );
    assert!(
        lints[1].starts_with("proxy_on_response_headers proxy_get_header_map_pairs answers an empty map"),
        "{lints:?}"
    );
}

/// Ticks every second, and re-registers nothing.
const TICKS: &str = r#"
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $tick_period (i32.const 1000)))
    (drop (call $register (i32.const 16) (i32.const 1) (i32.const 200)))
    (drop (call $enqueue (i32.load (i32.const 200)) (i32.const 16) (i32.const 1)))
    (i32.const 1))
  (func (export "proxy_on_tick") (param i32) (call $say (i32.const 116)))
  (func (export "proxy_on_queue_ready") (param i32 i32) (call $say (i32.const 113)))"#;

#[test]
fn ticks_and_queue_notifications_reach_the_root() {
    let mut host = Host::new(vec![plugin(TICKS)]);
    assert_eq!(host.worker.next_timer(), Some(Duration::from_secs(1)));
    host.worker.run_timers();
    assert_eq!(host.world.said(), "", "not yet due");
    host.advance(Duration::from_millis(1_500));
    host.worker.run_timers();
    assert_eq!(host.world.said(), "t");
    assert_eq!(host.worker.next_timer(), Some(Duration::from_millis(2_500)), "the period counts from the tick's end");
    host.worker.run_notifications();
    assert_eq!(host.world.said(), "tq");
}
