//! TCP connections through guests, as Envoy's network filters in front of its `tcp_proxy` have them.

use std::time::Duration;

use crate::support::{Host, bytes, guest, plugin, request};
use portcullis_abi::{
    Action, CallAnswer, CallId, ClosedBy, Direction, Ending, FailurePolicy, FieldMap, Plugin, PluginState,
};

/// Says every callback: a letter, and what it was given.
const TELLS: &str = r#"
  (func (export "proxy_on_new_connection") (param i32) (result i32) (call $say (i32.const 110)) (i32.const 0))
  (func (export "proxy_on_downstream_data") (param i32) (param $len i32) (param $end i32) (result i32)
    (call $say (i32.const 100)) (call $say_number (local.get $len)) (call $say_number (local.get $end))
    (i32.const 0))
  (func (export "proxy_on_upstream_data") (param i32) (param $len i32) (param $end i32) (result i32)
    (call $say (i32.const 117)) (call $say_number (local.get $len)) (call $say_number (local.get $end))
    (i32.const 0))
  (func (export "proxy_on_downstream_connection_close") (param i32) (param $by i32)
    (call $say (i32.const 68)) (call $say_number (local.get $by)))
  (func (export "proxy_on_upstream_connection_close") (param i32) (param $by i32)
    (call $say (i32.const 85)) (call $say_number (local.get $by)))
  (func (export "proxy_on_done") (param i32) (result i32) (call $say (i32.const 111)) (i32.const 0))
  (func (export "proxy_on_log") (param i32) (call $say (i32.const 108)))
  (func (export "proxy_on_delete") (param i32) (call $say (i32.const 120)))"#;

/// A guest whose callback for the client's bytes does `code`, with the number of its call in `$call`.
fn on_client(code: &str) -> Plugin {
    plugin(&format!(
        r#"(global $call (mut i32) (i32.const 0))
           (func (export "proxy_on_downstream_data") (param $id i32) (param $len i32) (param $end i32) (result i32)
             (global.set $call (i32.add (global.get $call) (i32.const 1))) {code})"#
    ))
}

/// The same for the upstream's bytes.
fn on_upstream(code: &str) -> Plugin {
    plugin(&format!(
        r#"(global $call (mut i32) (i32.const 0))
           (data (i32.const 16) "XYZ")
           (func (export "proxy_on_upstream_data") (param $id i32) (param $len i32) (param $end i32) (result i32)
             (global.set $call (i32.add (global.get $call) (i32.const 1))) {code})"#
    ))
}

/// Pauses at its first call only.
const PAUSES_ONCE: &str = "(i32.eq (global.get $call) (i32.const 1))";

/// Pauses always, after showing what it is shown; calls out with its first call, and lets go of everything with the answer.
const ASKS: &str = r#"
  (data (i32.const 16) "auth")
  (data (i32.const 32) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\01\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/\00:authority\00a\00")
  (global $id (mut i32) (i32.const 0))
  (global $asked (mut i32) (i32.const 0))
  (func $ask (param $id i32) (result i32)
    (if (i32.eqz (global.get $asked)) (then
      (global.set $asked (i32.const 1))
      (global.set $id (local.get $id))
      (drop (call $http_call (i32.const 16) (i32.const 4) (i32.const 32) (i32.const 61)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 200)))))
    (i32.const 1))
  (func (export "proxy_on_delete") (param $id i32) (call $say (i32.const 120)))
  (func (export "proxy_on_http_call_response") (param i32 i32) (param $fields i32) (param i32 i32)
    (call $say (i32.const 97))
    (if (i32.eqz (local.get $fields)) (then (return)))
    (drop (call $effective (global.get $id)))
    "#;

fn asks(callback: &str, answered: &str) -> Plugin {
    plugin(&format!("{ASKS} {answered}) {callback}"))
}

const ASKS_ABOUT_CONNECTIONS: &str = r#"
  (func (export "proxy_on_new_connection") (param $id i32) (result i32) (call $ask (local.get $id)))"#;
const ASKS_ABOUT_BYTES: &str = r#"
  (func (export "proxy_on_downstream_data") (param $id i32) (param i32 i32) (result i32) (call $ask (local.get $id)))"#;

fn call_id(host: &mut Host) -> CallId {
    match host.worker.poll_action() {
        Some(Action::Call(id, _)) => id,
        other => panic!("{other:?}"),
    }
}

fn answer(host: &mut Host, call: CallId) -> Vec<String> {
    let fields = [(":status", "200")].into_iter().collect();
    host.worker.call_answered(call, CallAnswer::Response { fields, body: bytes(""), trailers: FieldMap::new() });
    host.seen()
}

#[test]
fn a_guest_hears_of_everything_in_envoys_order() {
    let mut host = Host::new(vec![plugin(TELLS)]);
    let (id, seen) = host.connect(&[0]);
    assert_eq!(seen, ["connect", "readable >", "readable <"]);
    assert_eq!(host.client_sends(id, "hello", false), ["> \"hello\""]);
    assert_eq!(host.upstream_sends(id, "220", false), ["< \"220\""]);
    assert_eq!(host.client_sends(id, "", true), ["> \"\"."], "one way ends, the other goes on");
    assert_eq!(host.upstream_sends(id, "bye", true), ["< \"bye\"."]);
    assert_eq!(host.world.take_log(), "nd50u30d01u31U0");
    host.worker.close_connection(id, ClosedBy::Local, Ending::default());
    assert_eq!(host.world.take_log(), "D1olx", "on_done comes before on_log, unlike for HTTP");
}

#[test]
fn several_filters_see_the_clients_bytes_in_order_and_the_upstreams_in_reverse() {
    let mark = |letter: u32| {
        plugin(&format!(
            r#"(func (export "proxy_on_new_connection") (param i32) (result i32) (call $say (i32.const {letter})) (i32.const 0))
               (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32) (call $say (i32.const {letter})) (i32.const 0))
               (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32) (call $say (i32.const {letter})) (i32.const 0))
               (func (export "proxy_on_upstream_connection_close") (param i32 i32) (call $say (i32.const 85)))
               (func (export "proxy_on_downstream_connection_close") (param i32 i32) (call $say (i32.const {letter})))
               (func (export "proxy_on_delete") (param i32) (call $say (i32.const 120)))"#
        ))
    };
    let mut host = Host::new(vec![mark(65), mark(66)]);
    let (id, _) = host.connect(&[0, 1]);
    assert_eq!(host.world.take_log(), "AB");
    host.client_sends(id, "a", false);
    assert_eq!(host.world.take_log(), "AB");
    host.upstream_sends(id, "a", true);
    assert_eq!(host.world.take_log(), "BUAU", "each hears that the upstream has closed behind its last bytes");
    host.worker.close_connection(id, ClosedBy::Remote, Ending::default());
    assert_eq!(host.world.take_log(), "AxBx", "one after the other to the end");
}

#[test]
fn without_filters_bytes_pass() {
    let mut host = Host::new(vec![]);
    let (id, seen) = host.connect(&[]);
    assert_eq!(seen, ["connect", "readable >", "readable <"]);
    assert_eq!(host.client_sends(id, "a", true), ["> \"a\"."]);
    assert_eq!(host.client_sends(id, "more", true), [""; 0], "nothing follows the end");
    assert_eq!(host.upstream_sends(id, "b", false), ["< \"b\""]);
}

#[test]
fn the_client_is_read_once_the_upstream_is_there() {
    let mut host = Host::new(vec![plugin(TELLS)]);
    let id = host.open_connection(&[0]);
    assert!(!host.worker.may_read(id, Direction::Request));
    host.worker.connected(id, portcullis_abi::UpstreamInfo::default());
    assert!(host.worker.may_read(id, Direction::Request));
}

#[test]
fn a_held_connection_reaches_neither_the_next_filter_nor_the_upstream() {
    let held = asks(ASKS_ABOUT_CONNECTIONS, "(drop (call $continue (i32.const 2)))");
    let mut host = Host::new(vec![held, plugin(TELLS)]);
    let id = host.open_connection(&[0, 1]);
    let call = call_id(&mut host);
    assert_eq!(host.seen(), [""; 0]);
    assert_eq!(host.world.take_log(), "");
    assert_eq!(answer(&mut host, call), ["connect"]);
    assert_eq!(host.world.take_log(), "an");
    host.worker.close_connection(id, ClosedBy::Local, Ending::default());
}

#[test]
fn a_filter_that_never_knew_of_a_connection_does_not_hear_of_its_end() {
    let mut host = Host::new(vec![asks(ASKS_ABOUT_CONNECTIONS, ""), plugin(TELLS)]);
    let id = host.open_connection(&[0, 1]);
    call_id(&mut host);
    host.worker.close_connection(id, ClosedBy::Remote, Ending::default());
    assert_eq!(host.seen(), ["cancel call"]);
    assert_eq!(host.world.take_log(), "xa", "the guest that asked hears that there is no answer");
}

#[test]
fn paused_bytes_wait_and_are_shown_again_with_what_came_since() {
    let mut host =
        Host::new(vec![on_client("(call $say_buffer (i32.const 2)) (i32.lt_u (global.get $call) (i32.const 3))")]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.client_sends(id, "one", false), [""; 0]);
    assert_eq!(host.client_sends(id, "two", false), [""; 0]);
    assert_eq!(host.client_sends(id, "!", false), ["> \"onetwo!\""]);
    assert_eq!(host.client_sends(id, "four", true), ["> \"four\"."]);
    assert_eq!(host.world.take_log(), "0one0onetwo0onetwo!0four");
}

#[test]
fn all_filters_look_at_the_same_bytes_also_at_those_they_let_pass_before() {
    let mut host = Host::new(vec![plugin(TELLS), on_client(PAUSES_ONCE)]);
    let (id, _) = host.connect(&[0, 1]);
    assert_eq!(host.client_sends(id, "one", false), [""; 0]);
    assert_eq!(host.client_sends(id, "two", false), ["> \"onetwo\""]);
    assert_eq!(host.world.take_log(), "nd30d60", "the first filter sees the first bytes twice, as in Envoy");
}

#[test]
fn a_resumed_connection_passes_what_waits_with_its_end_and_edits() {
    let edits_and_resumes = r#"
      (call $say_buffer (i32.const 2))
      (call $say_number (call $set_buffer (i32.const 2) (i32.const 0) (i32.const 3) (i32.const 16) (i32.const 4)))
      (drop (call $continue (i32.const 2)))"#;
    let mut host = Host::new(vec![asks(ASKS_ABOUT_BYTES, edits_and_resumes)]);
    let (id, _) = host.connect(&[0]);
    host.worker.data(id, Direction::Request, bytes("one"), false);
    let call = call_id(&mut host);
    assert_eq!(host.client_sends(id, "two", true), [""; 0]);
    assert_eq!(answer(&mut host, call), ["> \"authtwo\"."]);
    assert_eq!(host.world.take_log(), "a0onetwo0");
}

#[test]
fn resuming_in_the_very_callback_that_pauses_passes() {
    let mut host = Host::new(vec![on_client("(drop (call $continue (i32.const 2))) (i32.const 1)")]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.client_sends(id, "one", false), ["> \"one\""]);
}

#[test]
fn the_upstreams_side_cannot_be_resumed() {
    let mut host = Host::new(vec![on_upstream(&format!(
        "(call $say_number (call $continue (i32.const 3))) (call $say_buffer (i32.const 3)) {PAUSES_ONCE}"
    ))]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.upstream_sends(id, "one", false), [""; 0]);
    assert_eq!(host.upstream_sends(id, "two", false), ["< \"onetwo\""], "but the next callback can let go");
    assert_eq!(host.world.take_log(), "<0one<0onetwo", "< is 12, Unimplemented");
}

#[test]
fn pausing_at_the_end_of_the_upstream_keeps_its_bytes_for_ever_and_is_linted() {
    let mut host = Host::new(vec![on_upstream("(i32.const 1)")]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.upstream_sends(id, "one", true), [""; 0]);
    let lints = host.world.lints.borrow();
    assert!(
        lints[0].starts_with("proxy_on_upstream_data return pauses at the end of the upstream's bytes"),
        "{lints:?}"
    );
}

#[test]
fn bytes_can_be_edited_both_ways_at_the_start_and_the_end_only() {
    let edits = |buffer: u32| {
        format!(
            "(call $say_number (call $set_buffer (i32.const {buffer}) (i32.const 0) (i32.const 2) (i32.const 16) (i32.const 3)))
             (call $say_number (call $set_buffer (i32.const {buffer}) (i32.const 100) (i32.const 0) (i32.const 16) (i32.const 1)))
             (call $say_number (call $set_buffer (i32.const {buffer}) (i32.const 1) (i32.const 1) (i32.const 16) (i32.const 1)))
             (call $say_number (call $set_buffer (i32.const {}) (i32.const 0) (i32.const 0) (i32.const 16) (i32.const 1)))
             (i32.const 0)",
            5 - buffer
        )
    };
    let mut host = Host::new(vec![on_upstream(&edits(3))]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.upstream_sends(id, "abcd", false), ["< \"XYZcdX\""]);
    assert_eq!(host.world.take_log(), "0022", "not between, and not the other side's");
    let mut host = Host::new(vec![on_client(&edits(2))]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.client_sends(id, "abcd", false), ["> \"\\0\\0\\0cd\\0\""]);
}

#[test]
fn edited_bytes_are_bounded() {
    let mut grows = on_client(
        "(call $say_number (call $set_buffer (i32.const 2) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 95)))
         (call $say_number (call $set_buffer (i32.const 2) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1)))
         (i32.const 0)",
    );
    grows.limits.buffer_bytes_max = 100;
    let mut host = Host::new(vec![grows]);
    let (id, _) = host.connect(&[0]);
    host.client_sends(id, "abcde", false);
    assert_eq!(host.world.take_log(), "0:", ": is 10, InternalFailure");
}

#[test]
fn a_guest_that_pauses_for_ever_stops_the_sender() {
    let mut host = Host::new(vec![on_client("(i32.const 1)"), on_upstream("(i32.const 1)")]);
    let (id, _) = host.connect(&[0, 1]);
    for direction in [Direction::Request, Direction::Response] {
        host.worker.data(id, direction, vec![b'x'; 63].into(), false);
        assert!(host.worker.may_read(id, direction));
        host.worker.data(id, direction, bytes("y"), false);
        assert!(!host.worker.may_read(id, direction), "64 bytes are as many as may wait");
    }
    assert_eq!(host.seen(), [""; 0]);
}

#[test]
fn a_sender_that_was_stopped_goes_on_when_its_bytes_have_passed() {
    let mut host = Host::new(vec![asks(ASKS_ABOUT_BYTES, "(drop (call $continue (i32.const 2)))")]);
    let (id, _) = host.connect(&[0]);
    host.worker.data(id, Direction::Request, vec![b'x'; 64].into(), false);
    let call = call_id(&mut host);
    assert!(!host.worker.may_read(id, Direction::Request));
    let seen = answer(&mut host, call);
    assert_eq!(seen.last().map(String::as_str), Some("readable >"), "{seen:?}");
}

#[test]
fn a_hold_is_released_by_whoever_holds() {
    // Envoy lets any filter's `proxy_continue_stream` pass what filters ahead of it, or a new connection behind it, hold.
    let releases = asks(ASKS_ABOUT_CONNECTIONS, "(drop (call $continue (i32.const 2)))");
    let holds = plugin(
        r#"(func (export "proxy_on_new_connection") (param i32) (result i32) (i32.const 1))
           (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32) (i32.const 1))"#,
    );
    let mut host = Host::new(vec![releases, holds]);
    host.open_connection(&[0, 1]);
    let call = call_id(&mut host);
    assert_eq!(answer(&mut host, call), [""; 0], "the second filter holds the connection");

    let resumes_on_upstream_bytes = on_upstream("(drop (call $continue (i32.const 2))) (i32.const 0)");
    let mut host = Host::new(vec![on_client("(i32.const 1)"), resumes_on_upstream_bytes]);
    let (id, _) = host.connect(&[0, 1]);
    assert_eq!(host.client_sends(id, "held", false), [""; 0]);
    assert_eq!(host.upstream_sends(id, "a", false), ["< \"a\""], "the first filter holds the client's bytes");
}

#[test]
fn a_filter_closes_the_connection_and_nothing_is_asked_of_it_any_more() {
    for (stream, details) in [(2, "wasm_downstream_close"), (3, "wasm_upstream_close")] {
        for pause in [0, 1] {
            let closes = on_client(&format!("(drop (call $close (i32.const {stream}))) (i32.const {pause})"));
            let mut host = Host::new(vec![closes, plugin(TELLS)]);
            let (id, _) = host.connect(&[0, 1]);
            assert_eq!(host.client_sends(id, "x", false), [format!("close ({details})")]);
            assert_eq!(host.client_sends(id, "y", false), [""; 0]);
            assert_eq!(host.upstream_sends(id, "z", true), [""; 0]);
            host.worker.close_connection(id, ClosedBy::Local, Ending::default());
            assert_eq!(host.world.take_log(), "nD1olx");
        }
    }
}

#[test]
fn a_filter_closes_a_new_connection_before_the_upstream_hears_of_it() {
    let closes = plugin(
        r#"(func (export "proxy_on_new_connection") (param i32) (result i32)
             (drop (call $close (i32.const 2))) (i32.const 0))"#,
    );
    let mut host = Host::new(vec![closes]);
    host.open_connection(&[0]);
    assert_eq!(host.seen(), ["close (wasm_downstream_close)"]);
}

#[test]
fn what_is_for_http_has_no_effect_and_local_responses_are_linted() {
    let mut host = Host::new(vec![on_client(
        "(call $say_number (call $close (i32.const 0))) (call $say_number (call $close (i32.const 1)))
         (call $say_number (call $continue (i32.const 0))) (call $say_number (call $continue (i32.const 1)))
         (call $say_number (call $close (i32.const 4))) (call $say_number (call $continue (i32.const 4)))
         (call $say_number (call $respond (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
           (i32.const 0) (i32.const 0) (i32.const -1)))
         (call $say_number (call $get (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 200) (i32.const 204)))
         (call $say_number (call $pairs (i32.const 0) (i32.const 200) (i32.const 204)))
         (i32.const 0)",
    )]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.client_sends(id, "x", false), ["> \"x\""]);
    assert_eq!(host.world.take_log(), "000022020");
    let lints = host.world.lints.borrow();
    assert!(lints.iter().any(|lint| lint.contains("only an HTTP stream can be answered")), "{lints:?}");
}

#[test]
fn what_is_for_tcp_has_no_effect_on_a_request() {
    let mut host = Host::new(vec![plugin(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (call $say_number (call $close (i32.const 2))) (call $say_number (call $close (i32.const 3)))
             (call $say_number (call $continue (i32.const 2)))
             (call $say_buffer (i32.const 2))
             (call $say_number (call $set_buffer (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1)))
             (i32.const 0))"#,
    )]);
    assert_eq!(host.get(), ["> []."]);
    assert_eq!(host.world.take_log(), "00002");
}

#[test]
fn buffers_that_are_not_there_are_empty_and_cannot_be_changed() {
    let mut tells = String::new();
    for buffer in 0..=8 {
        tells.push_str(&format!(
            "(call $say_buffer (i32.const {buffer}))
             (call $say_number (call $set_buffer (i32.const {buffer}) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1)))"
        ));
    }
    let mut host = Host::new(vec![on_upstream(&format!("{tells} (i32.const 0)"))]);
    let (id, _) = host.connect(&[0]);
    host.upstream_sends(id, "up", false);
    // Bodies, the client's bytes, the upstream's (which get a NUL in front), a callout's answer, a gRPC message, the two
    // configurations, a foreign function's argument.
    assert_eq!(host.world.take_log(), ["02", "02", "02", "0up0", "11", "02", "02", "11", "02"].concat());
}

#[test]
fn properties_of_a_connection() {
    let ask = |at: usize, len: usize| {
        format!(
            "(call $say_number (call $property (i32.const {at}) (i32.const {len}) (i32.const 4008) (i32.const 4012)))
             (drop (call $log (i32.const 2) (i32.load (i32.const 4008)) (i32.load (i32.const 4012))))
             (i32.store (i32.const 4012) (i32.const 0))"
        )
    };
    let paths = [
        "source\\00address",
        "xds\\00cluster_name",
        "upstream\\00address",
        "request\\00size",
        "response\\00size",
        "request\\00path",
        "request\\00headers",
        "xds\\00route_name",
    ];
    let (mut data, mut asks) = (String::new(), String::new());
    for (index, path) in paths.iter().enumerate() {
        let at = 1024 + index * 64;
        data.push_str(&format!("(data (i32.const {at}) \"{path}\")"));
        asks.push_str(&ask(at, path.len() - 2));
        asks.push_str("(call $say (i32.const 32))");
    }
    let mut host = Host::new(vec![plugin(&format!(
        r#"{data} (func $ask {asks})
           (func (export "proxy_on_new_connection") (param i32) (result i32) (call $ask) (i32.const 0))
           (func (export "proxy_on_log") (param i32) (call $ask))"#
    ))]);
    let (id, _) = host.connect(&[0]);
    let empty = "\0\0\0\0";
    let number = |number: char| format!("{number}\0\0\0\0\0\0\0");
    assert_eq!(
        host.world.take_log(),
        format!("0192.0.2.1:4711 1 1 0{zero} 0{zero} 1 0{empty} 1 ", zero = number('\0'))
    );
    host.client_sends(id, "abc", true);
    host.upstream_sends(id, "ab", true);
    host.worker.close_connection(id, ClosedBy::Local, Ending::default());
    let expected =
        format!("0192.0.2.1:4711 0db 0192.0.2.9:5432 0{} 0{} 1 0{empty} 1 ", number('\u{3}'), number('\u{2}'));
    assert_eq!(host.world.take_log(), expected);
}

#[test]
fn a_trap_closes_the_connection_and_others_of_the_vm_when_they_need_it() {
    let mut host =
        Host::new(vec![on_client("(if (i32.eq (i32.const 4) (local.get $len)) (then unreachable)) (i32.const 0)")]);
    let (crashing, _) = host.connect(&[0]);
    let (other, _) = host.connect(&[0]);
    let closed = ["close (wasm_fail_stream{probe})"];
    assert_eq!(host.client_sends(crashing, "trap", false), closed);
    assert!(matches!(host.worker.health()[0].state, PluginState::Failed(_)));
    assert_eq!(host.client_sends(other, "x", false), closed, "it began in the VM that is gone");
    host.open_connection(&[0]);
    assert_eq!(host.seen(), closed, "inside the back-off");
    host.advance(Duration::from_secs(2));
    let (fresh, seen) = host.connect(&[0]);
    assert_eq!(seen[0], "connect", "a new VM");
    assert_eq!(host.client_sends(fresh, "x", false), ["> \"x\""]);
}

#[test]
fn traps_in_every_callback_close_the_connection() {
    let traps = |callback: &str, params: &str, result: &str| {
        plugin(&format!(r#"(func (export "{callback}") (param {params}) {result} unreachable)"#))
    };
    let closed = "close (wasm_fail_stream{probe})";
    let mut host = Host::new(vec![traps("proxy_on_new_connection", "i32", "(result i32)")]);
    host.open_connection(&[0]);
    assert_eq!(host.seen(), [closed], "the upstream hears nothing of it");

    let mut host = Host::new(vec![traps("proxy_on_upstream_data", "i32 i32 i32", "(result i32)")]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.upstream_sends(id, "x", false), [closed]);

    let mut host = Host::new(vec![traps("proxy_on_upstream_connection_close", "i32 i32", "")]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.upstream_sends(id, "x", true), [closed]);

    let mut host = Host::new(vec![traps("proxy_on_downstream_connection_close", "i32 i32", "")]);
    let (id, _) = host.connect(&[0]);
    host.worker.close_connection(id, ClosedBy::Local, Ending::default());
    assert_eq!(host.worker.health()[0].traps, 1);
}

#[test]
fn a_connection_that_waits_for_a_guest_whose_vm_traps_is_closed_at_once() {
    let mut host = Host::new(vec![asks(ASKS_ABOUT_CONNECTIONS, "unreachable")]);
    host.open_connection(&[0]);
    let call = call_id(&mut host);
    assert_eq!(answer(&mut host, call), ["close (wasm_fail_stream{probe})"]);

    let mut host = Host::new(vec![asks(ASKS_ABOUT_BYTES, "unreachable")]);
    let (id, _) = host.connect(&[0]);
    host.worker.data(id, Direction::Request, bytes("x"), false);
    let call = call_id(&mut host);
    assert_eq!(answer(&mut host, call), ["close (wasm_fail_stream{probe})"]);
}

#[test]
fn fail_open_leaves_the_filter_out_of_later_connections_only() {
    let mut open = on_client("unreachable");
    open.failure_policy = FailurePolicy::Open;
    let mut host = Host::new(vec![open]);
    let (crashing, _) = host.connect(&[0]);
    let (other, _) = host.connect(&[0]);
    let closed = ["close (wasm_fail_stream{probe})"];
    assert_eq!(host.client_sends(crashing, "x", false), closed);
    assert_eq!(host.client_sends(other, "x", false), closed, "its filter has seen a part already");
    let (later, _) = host.connect(&[0]);
    assert_eq!(host.client_sends(later, "x", true), ["> \"x\"."]);
    assert_eq!(host.upstream_sends(later, "y", true), ["< \"y\"."]);
}

#[test]
fn fail_open_leaves_the_filter_out_of_later_requests_only() {
    let mut open = plugin(
        r#"(global $requests (mut i32) (i32.const 0))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (global.set $requests (i32.add (global.get $requests) (i32.const 1)))
             (if (i32.eq (global.get $requests) (i32.const 2)) (then unreachable))
             (i32.const 0))"#,
    );
    open.failure_policy = FailurePolicy::Open;
    let mut host = Host::new(vec![open]);
    let begun = host.open(&[0]);
    host.worker.request_headers(begun, request(), false);
    assert_eq!(host.seen(), ["> []"]);
    host.get();
    host.worker.request_body(begun, bytes("x"), true);
    assert_eq!(
        host.seen(),
        ["cancel upstream", "< [:status=503]. (wasm_fail_stream{probe})"],
        "its filter has seen a part already"
    );
}

#[test]
fn a_closed_connection_cancels_its_callouts_but_not_those_made_because_of_the_end() {
    let mut host = Host::new(vec![asks(ASKS_ABOUT_BYTES, "")]);
    let (id, _) = host.connect(&[0]);
    host.worker.data(id, Direction::Request, bytes("x"), false);
    call_id(&mut host);
    host.worker.close_connection(id, ClosedBy::Remote, Ending::default());
    assert_eq!(host.seen(), ["cancel call"]);

    let reports = r#"
      (func (export "proxy_on_downstream_connection_close") (param $id i32) (param i32) (drop (call $ask (local.get $id))))"#;
    let mut host = Host::new(vec![asks(reports, "")]);
    let (id, _) = host.connect(&[0]);
    host.worker.close_connection(id, ClosedBy::Remote, Ending::default());
    let call = call_id(&mut host);
    assert_eq!(answer(&mut host, call), [""; 0]);
    assert_eq!(host.world.take_log(), "xa");
}

#[test]
fn blocked_callbacks_are_not_called() {
    let mut quiet = plugin(TELLS);
    quiet.capabilities.callbacks = Some(["proxy_on_context_create".to_owned()].into());
    let mut host = Host::new(vec![quiet]);
    let (id, _) = host.connect(&[0]);
    assert_eq!(host.client_sends(id, "x", false), ["> \"x\""]);
    assert_eq!(host.world.take_log(), "");
}

#[test]
fn modules_tell_which_streams_they_have_callbacks_for() {
    let check = |code: &str, http: bool, tcp: bool| {
        let callbacks = guest(code).callbacks();
        assert_eq!((callbacks.http, callbacks.tcp), (http, tcp), "{code}");
    };
    check("", false, false);
    check(r#"(func (export "proxy_on_log") (param i32))"#, false, false);
    check(r#"(func (export "proxy_on_new_connection") (param i32) (result i32) (i32.const 0))"#, false, true);
    check(r#"(func (export "proxy_on_request_trailers") (param i32 i32) (result i32) (i32.const 0))"#, true, false);
}
