//! Contexts: who shares which, and how they end.

use std::time::Duration;

use portcullis_abi::{CallAnswer, Ending, FieldMap, Plugin};

use crate::support::{Host, plugin, request};

/// Says `c` with its parent's number when a context is made, `l`, `d` and `x` with the context's when it logs, is done and is
/// deleted, and `k` at each configuration.
const TELLS: &str = r#"
  (func $tell (param $letter i32) (param $number i32)
    (call $say (local.get $letter)) (call $say_number (local.get $number)))
  (func (export "proxy_on_context_create") (param $id i32) (param $parent i32)
    (call $tell (i32.const 99) (local.get $parent)))
  (func (export "proxy_on_configure") (param i32 i32) (result i32) (call $say (i32.const 107)) (i32.const 1))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
  (func (export "proxy_on_log") (param $id i32) (call $tell (i32.const 108) (local.get $id)))
  (func (export "proxy_on_delete") (param $id i32) (call $tell (i32.const 120) (local.get $id)))"#;

/// And says yes or no in `proxy_on_done`.
fn tells(done: bool) -> Plugin {
    plugin(&format!(
        r#"{TELLS} (func (export "proxy_on_done") (param $id i32) (result i32)
             (call $tell (i32.const 100) (local.get $id)) (i32.const {}))"#,
        u32::from(done)
    ))
}

#[test]
fn a_streams_context_logs_is_done_and_is_deleted_whatever_it_answers() {
    for done in [true, false] {
        let mut host = Host::new(vec![tells(done)]);
        assert_eq!(host.world.take_log(), "c0k");
        host.get();
        assert_eq!(host.world.take_log(), "c1l2d2x2");
    }
}

#[test]
fn a_root_context_that_is_done_is_deleted_at_once() {
    let mut host = Host::new(vec![tells(true)]);
    host.get();
    host.world.take_log();
    assert!(!host.worker.has_ended());
    host.worker.shutdown();
    assert_eq!(host.world.take_log(), "d1x1");
    assert!(host.worker.has_ended());
    host.worker.shutdown();
    assert_eq!(host.worker.abandon(), Vec::<String>::new());
    assert_eq!(host.world.take_log(), "");
}

/// Is not done before its third tick after `proxy_on_done`; says what `proxy_done` answered.
fn takes_three_ticks() -> Plugin {
    plugin(
        r#"(global $left (mut i32) (i32.const -1))
           (func (export "proxy_on_configure") (param i32 i32) (result i32)
             (drop (call $tick_period (i32.const 10))) (i32.const 1))
           (func (export "proxy_on_tick") (param i32)
             (call $say (i32.const 116))
             (global.set $left (i32.sub (global.get $left) (i32.const 1)))
             (if (i32.eqz (global.get $left)) (then
               (call $say_number (call $done))
               (call $say_number (call $done))
               (call $say (i32.const 62)))))
           (func (export "proxy_on_done") (param i32) (result i32)
             (global.set $left (i32.const 3))
             (call $say_number (call $done))
             (i32.const 0))
           (func (export "proxy_on_delete") (param i32) (call $say (i32.const 120)))"#,
    )
}

#[test]
fn a_root_context_that_is_not_done_goes_on_until_it_is() {
    let mut host = Host::new(vec![takes_three_ticks()]);
    let tick = |host: &mut Host| {
        host.advance(Duration::from_millis(10));
        host.worker.run_timers();
        host.world.take_log()
    };
    assert_eq!(tick(&mut host), "t");
    host.worker.shutdown();
    assert_eq!(host.world.take_log(), "1", "in `proxy_on_done` nothing waits yet");
    assert_eq!(tick(&mut host), "t");
    assert_eq!(tick(&mut host), "t");
    assert!(!host.worker.has_ended());
    // Once the host waits no longer, and only after the callback, it is deleted.
    assert_eq!(tick(&mut host), "t01>x");
    assert!(host.worker.has_ended());
    assert_eq!(tick(&mut host), "");
    assert_eq!(host.worker.next_timer(), None);
}

#[test]
fn a_root_context_that_is_never_done_is_ended_when_the_host_has_waited_enough() {
    let mut refuses = tells(false);
    refuses.name = "refuses".into();
    let mut accepts = tells(true);
    accepts.name = "accepts".into();
    let mut host = Host::new(vec![refuses, accepts]);
    host.world.take_log();
    host.worker.shutdown();
    // Each has a VM of its own.
    assert_eq!(host.world.take_log(), "d1d1x1");
    assert!(!host.worker.has_ended());
    assert_eq!(host.worker.abandon(), ["refuses"]);
    assert_eq!(host.world.take_log(), "x1");
    assert!(host.worker.has_ended());
}

#[test]
fn a_root_context_gets_the_answers_it_waits_for_and_none_after_its_end() {
    let mut host = Host::new(vec![plugin(
        r#"(data (i32.const 16) "auth")
           (data (i32.const 32) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\01\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/\00:authority\00a\00")
           (func $ask
             (call $say_number (call $http_call (i32.const 16) (i32.const 4) (i32.const 32) (i32.const 61)
               (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 8))))
           (func (export "proxy_on_done") (param i32) (result i32) (call $ask) (call $ask) (i32.const 0))
           (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
             (call $say (i32.const 97))
             (call $say_number (call $done)))
           (func (export "proxy_on_delete") (param i32) (call $say (i32.const 120)))"#,
    )]);
    host.worker.shutdown();
    assert_eq!(host.world.take_log(), "00");
    let calls: Vec<_> = std::iter::from_fn(|| host.worker.poll_action())
        .filter_map(|action| match action {
            portcullis_abi::Action::Call(id, _) => Some(id),
            _ => None,
        })
        .collect();
    let answer = || CallAnswer::Response {
        fields: [(":status", "200")].into_iter().collect(),
        body: bytes::Bytes::new(),
        trailers: FieldMap::new(),
    };
    host.worker.call_answered(calls[0], answer());
    assert_eq!(host.world.take_log(), "a0x");
    assert_eq!(host.seen(), ["cancel call"]);
    host.worker.call_answered(calls[1], answer());
    assert_eq!(host.world.take_log(), "");
    assert!(host.worker.has_ended());
}

#[test]
fn what_a_root_context_opens_while_it_is_deleted_is_not_begun() {
    let mut host = Host::new(vec![plugin(
        r#"(data (i32.const 16) "auth")
           (func $open (result i32)
             (call $grpc_stream (i32.const 16) (i32.const 4) (i32.const 16) (i32.const 1) (i32.const 17) (i32.const 1)
               (i32.const 0) (i32.const 0) (i32.const 8)))
           (func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.eqz (call $open)))
           (func (export "proxy_on_delete") (param i32)
             (call $say_number (call $grpc_close (i32.load (i32.const 8))))
             (call $say_number (call $open))
             (call $say_number (call $grpc_send (i32.load (i32.const 8)) (i32.const 16) (i32.const 4) (i32.const 0))))"#,
    )]);
    host.seen();
    host.worker.shutdown();
    assert_eq!(host.world.take_log(), "000");
    assert_eq!(host.seen(), ["send b\"\".", "cancel call"]);
    assert!(host.worker.has_ended());
}

#[test]
fn a_guest_that_traps_at_the_end_has_ended() {
    let mut host = Host::new(vec![plugin(
        r#"(func (export "proxy_on_done") (param i32) (result i32) unreachable)
           (func (export "proxy_on_delete") (param i32) (call $say (i32.const 120)))"#,
    )]);
    host.worker.shutdown();
    assert_eq!(host.world.said(), "");
    assert!(host.worker.has_ended());
}

#[test]
fn plugins_share_a_vm_by_its_id_configuration_and_module() {
    // What context numbers say: a VM of its own begins with 1.
    let vms = |change: fn(&mut Plugin)| {
        let first = tells(true);
        let mut second = tells(true);
        second.name = "second".into();
        change(&mut second);
        let mut host = Host::new(vec![first, second]);
        host.world.take_log();
        host.worker.shutdown();
        host.world.take_log()
    };
    assert_eq!(vms(|_| {}), "d1x1d2x2");
    assert_eq!(vms(|second| second.vm_id = "other".into()), "d1x1d1x1");
    assert_eq!(vms(|second| second.vm_configuration = b"other".to_vec()), "d1x1d1x1");
    assert_eq!(vms(|second| second.module = plugin(TELLS).module), "d1x1x1", "which has no `proxy_on_done`");
}

#[test]
fn plugins_share_a_root_context_by_name_root_id_and_configuration() {
    let roots = |change: fn(&mut Plugin)| {
        let mut second = tells(true);
        change(&mut second);
        let mut host = Host::new(vec![tells(true), second]);
        let configured = host.world.take_log();
        for filter in [0, 1] {
            let id = host.open(&[filter]);
            host.worker.request_headers(id, request(), true);
            host.worker.finish(id, Ending::default());
        }
        host.worker.shutdown();
        (configured, host.world.take_log())
    };
    assert_eq!(roots(|_| {}), ("c0k".into(), "c1l2d2x2c1l3d3x3d1x1".into()));
    let own = ("c0kc0k".into(), "c1l3d3x3c2l4d4x4d1x1d2x2".into());
    assert_eq!(roots(|second| second.root_id = "other".into()), own);
    assert_eq!(roots(|second| second.configuration = b"other".to_vec()), own);
    assert_eq!(roots(|second| second.name = "other".into()), own);
}

#[test]
fn the_configuration_can_be_read_while_it_is_told_and_not_later() {
    let mut probe = plugin(
        r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32) (call $say_buffer (i32.const 7)) (i32.const 1))
           (func (export "proxy_on_configure") (param i32 i32) (result i32) (call $say_buffer (i32.const 7)) (i32.const 1))
           (func (export "proxy_on_tick") (param i32) (call $say_buffer (i32.const 7)))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (call $say_buffer (i32.const 7)) (i32.const 0))
           (func (export "proxy_on_done") (param i32) (result i32) (call $say_buffer (i32.const 7)) (i32.const 1))"#,
    );
    probe.configuration = b"secret".to_vec();
    let mut host = Host::new(vec![probe]);
    assert_eq!(host.world.take_log(), "10secret", "1 is NotFound");
    host.get();
    host.worker.shutdown();
    assert_eq!(host.world.take_log(), "111");
}
