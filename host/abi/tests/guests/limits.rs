//! Each bound on what a guest may take, reached: time in every callback, memory, tables, lines, maps, bodies, metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use portcullis_abi::{CallAnswer, Ending, FieldMap, Plugin, PluginState, Trapped};

use crate::support::{Host, World, bytes, guest, module, plugin, request, response};

/// What became of the first plugin.
fn trapped(host: &Host) -> Option<Trapped> {
    match &host.worker.health()[0].state {
        PluginState::Failed(trapped) => Some(trapped.clone()),
        PluginState::Running => None,
    }
}

// ---- time

const SOME_TIME: Duration = Duration::from_millis(20);

/// A guest in which one callback never returns.
fn loops_in(callback: &str, params: usize, results: usize) -> Plugin {
    let (params, results) = ("i32 ".repeat(params), if results == 0 { "" } else { "(result i32)" });
    let mut plugin = plugin(&format!(
        r#"(data (i32.const 16) "auth")
           (data (i32.const 32) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\01\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/\00:authority\00a\00")
           (func $call_out
             (drop (call $http_call (i32.const 16) (i32.const 4) (i32.const 32) (i32.const 61)
               (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 200))))
           (func $prepare
             (drop (call $tick_period (i32.const 1)))
             (drop (call $register (i32.const 16) (i32.const 1) (i32.const 200)))
             (drop (call $enqueue (i32.load (i32.const 200)) (i32.const 16) (i32.const 1)))
             (call $call_out))
           {}
           (func (export "{callback}") (param {params}) {results} (loop (br 0)) unreachable)"#,
        if callback == "proxy_on_configure" {
            ""
        } else {
            r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (call $prepare) (i32.const 1))"#
        }
    ));
    plugin.limits.callback_time_max = SOME_TIME;
    plugin.limits.start_time_max = SOME_TIME;
    plugin
}

/// Everything that can happen to a guest, in turn.
fn live_through(host: &mut Host) {
    let call = std::iter::from_fn(|| host.worker.poll_action()).find_map(|action| match action {
        portcullis_abi::Action::Call(id, _) => Some(id),
        _ => None,
    });
    host.advance(Duration::from_secs(1));
    host.worker.run_timers();
    host.worker.run_notifications();
    if let Some(call) = call {
        let fields: FieldMap = [(":status", "200")].into_iter().collect();
        host.worker.call_answered(call, CallAnswer::Response { fields, body: bytes(""), trailers: FieldMap::new() });
    }
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), false);
    host.worker.request_body(id, bytes("body"), false);
    host.worker.request_trailers(id, [("x-t", "1")].into_iter().collect());
    host.worker.response_headers(id, response(), false);
    host.worker.response_body(id, bytes("abc"), false);
    host.worker.response_trailers(id, [("x-t", "1")].into_iter().collect());
    host.worker.finish(id, Ending::default());
}

#[test]
fn a_loop_ends_at_its_deadline_in_every_callback() {
    for (callback, params, results) in [
        ("proxy_on_tick", 1, 0),
        ("proxy_on_queue_ready", 2, 0),
        ("proxy_on_http_call_response", 5, 0),
        ("proxy_on_request_headers", 3, 1),
        ("proxy_on_request_body", 3, 1),
        ("proxy_on_request_trailers", 2, 1),
        ("proxy_on_response_headers", 3, 1),
        ("proxy_on_response_body", 3, 1),
        ("proxy_on_response_trailers", 2, 1),
        ("proxy_on_log", 1, 0),
        ("proxy_on_done", 1, 1),
        ("proxy_on_delete", 1, 0),
    ] {
        let mut host = Host::new(vec![loops_in(callback, params, results)]);
        live_through(&mut host);
        assert_eq!(trapped(&host), Some(Trapped::Deadline(SOME_TIME, callback)), "{callback}");
    }
}

#[test]
fn a_loop_ends_at_its_deadline_in_every_part_of_the_start() {
    for (callback, params, results) in [
        ("_initialize", 0, 0),
        ("_start", 0, 0),
        ("proxy_on_context_create", 2, 0),
        ("proxy_on_vm_start", 2, 1),
        ("proxy_on_configure", 2, 1),
    ] {
        let error = Host::try_new(vec![loops_in(callback, params, results)]).err().expect(callback).to_string();
        assert_eq!(error, format!("filter `probe`: ran longer than 20ms in `{callback}`"));
    }
    let mut in_start_section = plugin("(func $begin (loop (br 0))) (start $begin)");
    in_start_section.limits.start_time_max = SOME_TIME;
    let error = Host::try_new(vec![in_start_section]).err().expect("the start section").to_string();
    assert_eq!(error, "filter `probe`: ran longer than 20ms in `start section`");
}

/// Computes for some ticks, asks for the time of day, and computes on.
const ASKS_THE_TIME: &str = r#"
  (func $compute (local $i i32)
    (loop (br_if 0 (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 30000000)))))
  (func $ask
    (call $compute)
    (drop (call $time (i32.const 200)))
    (call $compute))"#;

#[test]
fn the_parts_of_a_start_share_one_time() {
    let starts = |time: u64| {
        let mut plugin = plugin(&format!(
            r#"{ASKS_THE_TIME}
               (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (call $ask) (i32.const 1))
               (func (export "proxy_on_configure") (param i32 i32) (result i32) (call $ask) (i32.const 1))"#
        ));
        plugin.limits.start_time_max = Duration::from_millis(time);
        let world = World::default();
        world.busy.set(Duration::from_millis(300));
        Host::try_in(world, vec![plugin]).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(starts(10_000), Ok(()));
    let error = starts(550).unwrap_err();
    assert_eq!(
        error, "filter `probe`: ran longer than 550ms in `proxy_on_configure`",
        "each part alone has time enough"
    );
}

#[test]
fn time_in_which_the_guest_does_not_compute_does_not_count() {
    let asks = |world: World| {
        let mut plugin = plugin(&format!(
            r#"{ASKS_THE_TIME}
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (call $ask) (i32.const 0))"#
        ));
        plugin.limits.callback_time_max = Duration::from_millis(200);
        let mut host = Host::try_in(world, vec![plugin]).unwrap();
        host.get();
        trapped(&host)
    };
    let asleep = World::default();
    asleep.asleep.set(Duration::from_millis(600));
    assert_eq!(asks(asleep), None, "a machine that did something else for 600 ms");
    let busy = World::default();
    // Much more than the limit: where others compute, too, the clock that has the host look at it may come late.
    busy.busy.set(Duration::from_millis(900));
    assert_eq!(asks(busy), Some(Trapped::Deadline(Duration::from_millis(200), "proxy_on_request_headers")));
}

/// A guest with much memory that calls a foreign function on all of it.
fn on_much_memory(function: &str, bytes: u32) -> Plugin {
    let module = module(&format!(
        r#"(module
             (import "env" "proxy_call_foreign_function" (func $foreign (param i32 i32 i32 i32 i32 i32) (result i32)))
             (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
             (memory (export "memory") 400)
             (data (i32.const 0) "{function}")
             (func (export "proxy_abi_version_0_2_1"))
             (func (export "malloc") (param i32) (result i32) (i32.const 1024))
             (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
               (i32.store8 (i32.const 64) (i32.add (i32.const 48)
                 (call $foreign (i32.const 0) (i32.const {}) (i32.const 0) (i32.const {bytes}) (i32.const 0) (i32.const 0))))
               (drop (call $log (i32.const 2) (i32.const 64) (i32.const 1)))
               (i32.const 0)))"#,
        function.len()
    ));
    Plugin::new("probe", module.unwrap())
}

#[test]
fn a_host_function_that_works_for_long_ends_with_the_guests_time() {
    let mut large = on_much_memory("compress", 16 << 20);
    large.limits.callback_time_max = Duration::from_millis(5);
    let mut host = Host::new(vec![large]);
    host.get();
    let deadline = Trapped::Deadline(Duration::from_millis(5), "proxy_on_request_headers");
    assert_eq!(trapped(&host), Some(deadline));
}

#[test]
fn arguments_of_foreign_functions_are_bounded() {
    for function in ["compress", "uncompress", "verify_signature", "sign"] {
        let mut large = on_much_memory(function, 100_001);
        large.limits.buffer_bytes_max = 100_000;
        let mut host = Host::new(vec![large]);
        host.get();
        assert_eq!(host.world.said(), ":", "{function}: 48 + 10 is InternalFailure");
    }
}

#[test]
fn what_a_few_bytes_unfold_into_is_bounded() {
    // 2,000 zeros, compressed by zlib.
    let compressed = r"\78\9c\63\60\18\05\a3\60\14\8c\82\51\30\0a\46\c1\50\07\00\07\d0\00\01";
    let unfold = |most: usize| {
        let call =
            "(call $foreign (i32.const 48) (i32.const 10) (i32.const 64) (i32.const 23) (i32.const 0) (i32.const 0))";
        let data = format!(r#"(data (i32.const 48) "uncompress") (data (i32.const 64) "{compressed}")"#);
        status_with(&data, call, |plugin| plugin.limits.buffer_bytes_max = most)
    };
    assert_eq!(unfold(2000), "0");
    assert_eq!(unfold(1999), "3", "SerializationFailure");
}

#[test]
fn what_an_expression_comes_to_is_bounded() {
    // A list of one number has 22 bytes.
    let evaluate = |most: usize| {
        let calls = "(drop (call $foreign
                (i32.const 48) (i32.const 11) (i32.const 64) (i32.const 3) (i32.const 80) (i32.const 84)))
            (i32.store (i32.const 88) (i32.load (i32.load (i32.const 80))))
            (call $foreign (i32.const 96) (i32.const 13) (i32.const 88) (i32.const 4) (i32.const 80) (i32.const 84))";
        let data =
            r#"(data (i32.const 48) "expr_create") (data (i32.const 64) "[1]") (data (i32.const 96) "expr_evaluate")"#;
        status_with(data, calls, |plugin| plugin.limits.buffer_bytes_max = most)
    };
    assert_eq!(evaluate(22), "0");
    assert_eq!(evaluate(21), ":", "InternalFailure");
}

// ---- turns

/// Ticks each millisecond, and says so with its letter.
fn ticks(letter: u8) -> Plugin {
    let mut plugin = plugin(&format!(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
             (drop (call $tick_period (i32.const 1))) (i32.const 1))
           (func (export "proxy_on_tick") (param i32) (call $say (i32.const {letter})))"#
    ));
    plugin.name = char::from(letter).to_string();
    plugin.vm_id = plugin.name.clone();
    plugin
}

#[test]
fn ticks_that_take_long_leave_turns_to_requests_and_to_each_other() {
    let mut host = Host::new(vec![ticks(b'a'), ticks(b'b'), ticks(b'c')]);
    host.advance(Duration::from_millis(5));
    host.worker.run_timers();
    assert_eq!(host.world.said(), "abc", "quick ones are run together");
    host.advance(Duration::from_millis(5));
    host.world.line_takes.set(Duration::from_millis(50));
    for expected in ["abca", "abcab", "abcabc", "abcabca"] {
        host.worker.run_timers();
        assert_eq!(host.world.said(), expected);
        assert!(host.worker.next_timer().is_some_and(|next| next <= host.world.now.get()), "the rest is due at once");
    }
}

#[test]
fn notifications_that_take_long_leave_turns_to_requests() {
    let mut host = Host::new(vec![plugin(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (local $i i32)
             (drop (call $register (i32.const 16) (i32.const 1) (i32.const 200)))
             (loop
               (drop (call $enqueue (i32.load (i32.const 200)) (i32.const 16) (i32.const 1)))
               (br_if 0 (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 3))))
             (i32.const 1))
           (func (export "proxy_on_queue_ready") (param i32 i32)
             (call $say (i32.const 113))
             ;; One in for each that is told: this never ends.
             (drop (call $dequeue (i32.load (i32.const 200)) (i32.const 204) (i32.const 208)))
             (drop (call $enqueue (i32.load (i32.const 200)) (i32.const 16) (i32.const 1))))"#,
    )]);
    let woken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&woken);
    host.worker.set_waker(Arc::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    assert_eq!(woken.swap(0, Ordering::Relaxed), 1, "for what came while the guest started");
    host.worker.run_notifications();
    assert_eq!(host.world.said(), "qqq", "those that waited");
    woken.store(0, Ordering::Relaxed);
    host.world.line_takes.set(Duration::from_millis(50));
    host.worker.run_notifications();
    assert_eq!(host.world.said(), "qqqq", "one a turn");
    assert_eq!(woken.load(Ordering::Relaxed), 2, "for the new item, and for those left over");
}

// ---- memory

#[test]
fn all_memories_of_a_module_share_one_limit() {
    let with_limit = |bytes: usize| {
        // 1 page each at first, and growing by turns; `o` for each time that it succeeds.
        let module = module(
            r#"(module
                 (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
                 (memory $a (export "memory") 1) (memory $b 1) (memory $c 1 2)
                 (data (i32.const 0) "o")
                 (func (export "proxy_abi_version_0_2_1"))
                 (func (export "malloc") (param i32) (result i32) (i32.const 8))
                 (func $say (param $grown i32)
                   (if (i32.ne (local.get $grown) (i32.const -1))
                     (then (drop (call $log (i32.const 2) (i32.const 0) (i32.const 1))))))
                 (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                   (call $say (memory.grow $a (i32.const 1)))
                   (call $say (memory.grow $b (i32.const 1)))
                   (call $say (memory.grow $c (i32.const 2)))
                   (call $say (memory.grow $c (i32.const 1)))
                   (call $say (memory.grow $b (i32.const 100)))
                   (call $say (memory.grow $a (i32.const 1)))
                   (i32.const 0)))"#,
        );
        let mut plugin = Plugin::new("probe", module.unwrap());
        plugin.limits.memory_bytes_max = bytes;
        Host::try_new(vec![plugin]).map(|mut host| {
            host.get();
            host.world.said().len()
        })
    };
    const PAGE: usize = 65536;
    assert!(with_limit(2 * PAGE).is_err(), "they start with three");
    assert_eq!(with_limit(3 * PAGE).unwrap(), 0);
    assert_eq!(with_limit(5 * PAGE).unwrap(), 2);
    assert_eq!(with_limit(6 * PAGE).unwrap(), 3, "a growth beyond the module's own maximum takes nothing");
    assert_eq!(with_limit(7 * PAGE).unwrap(), 4, "after a refusal, less may still be had");
}

#[test]
fn all_tables_of_a_module_share_one_limit() {
    let starts = |elements: usize| {
        let mut plugin = plugin(&format!("(table {elements} funcref) (table {elements} funcref)"));
        plugin.name = "probe".into();
        Host::try_new(vec![plugin]).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(starts(500_000), Ok(()));
    assert_eq!(
        starts(500_001).unwrap_err(),
        "filter `probe`: cannot be instantiated: its tables start with more than the 1000000 elements allowed"
    );
}

// ---- what guests hand over

#[test]
fn a_log_line_is_cut_off() {
    let mut long = plugin(
        r#"(data (i32.const 16) "0123456789")
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (drop (call $log (i32.const 2) (i32.const 16) (i32.const 10))) (i32.const 0))"#,
    );
    long.limits.log_line_bytes_max = 4;
    let mut host = Host::new(vec![long]);
    host.get();
    assert_eq!(*host.world.log.borrow(), ["0123"]);
}

/// Says the status of one call, as a letter from `0` on.
fn status_of(call: &str, limit: impl FnOnce(&mut Plugin)) -> String {
    status_with("", call, limit)
}

fn status_with(data: &str, call: &str, limit: impl FnOnce(&mut Plugin)) -> String {
    let mut plugin = plugin(&format!(
        r#"(data (i32.const 16) "name\00value") {data}
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
             (call $say (i32.add (i32.const 48) {call})) (i32.const 0))"#
    ));
    limit(&mut plugin);
    let mut host = Host::new(vec![plugin]);
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), false);
    host.worker.request_body(id, bytes("abc"), true);
    host.world.said()
}

#[test]
fn the_bytes_of_a_map_are_bounded() {
    let add = "(call $add (i32.const 0) (i32.const 16) (i32.const 4) (i32.const 21) (i32.const 5))";
    let size = request().byte_size();
    assert_eq!(status_of(add, |plugin| plugin.limits.map_bytes_max = size + 9), "0");
    assert_eq!(status_of(add, |plugin| plugin.limits.map_bytes_max = size + 8), ":", "InternalFailure");
    let set = "(call $set_pairs (i32.const 0) (i32.const 48) (i32.const 4))";
    assert_eq!(status_of(set, |plugin| plugin.limits.map_bytes_max = 0), "0", "an empty map fits");
}

#[test]
fn a_map_may_be_as_large_as_its_limits_say() {
    let lines = |count: u32| {
        [count.to_le_bytes().to_vec(), [1, 0, 0, 0, 0, 0, 0, 0].repeat(count as usize), b"a\0\0".repeat(count as usize)]
            .concat()
    };
    let status = |count: u32, call: &str, limit: fn(&mut Plugin)| {
        let map: String = lines(count).iter().map(|byte| format!("\\{byte:02x}")).collect();
        let data = format!(r#"(data (i32.const 20000) "{map}")"#);
        status_with(&data, &call.replace("MAP", &format!("(i32.const 20000) (i32.const {})", map.len() / 3)), limit)
    };
    let set = "(call $set_pairs (i32.const 0) MAP)";
    // More than Envoy reads is no valid argument, unless it is allowed.
    assert_eq!(status(1024, set, |_| {}), "0");
    assert_eq!(status(1025, set, |_| {}), "2");
    assert_eq!(status(1025, set, |plugin| plugin.limits.map_lines_max = 1025), "0");
    let respond =
        "(call $respond (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) MAP (i32.const -1))";
    let http_call =
        "(call $http_call (i32.const 16) (i32.const 4) MAP (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
        (i32.const 0) (i32.const 200))";
    for call in [set, respond, http_call] {
        assert_eq!(status(4, call, |plugin| plugin.limits.map_lines_max = 3), ":", "{call} with few lines");
        assert_eq!(status(4, call, |plugin| plugin.limits.map_bytes_max = 3), ":", "{call} with few bytes");
    }
}

#[test]
fn a_body_is_bounded_after_a_guests_edits() {
    let append = "(call $set_buffer (i32.const 0) (i32.const 3) (i32.const 0) (i32.const 16) (i32.const 10))";
    assert_eq!(status_of(append, |plugin| plugin.limits.buffer_bytes_max = 13), "0");
    assert_eq!(status_of(append, |plugin| plugin.limits.buffer_bytes_max = 12), ":");
    let replace = "(call $set_buffer (i32.const 0) (i32.const 0) (i32.const 3) (i32.const 16) (i32.const 10))";
    assert_eq!(status_of(replace, |plugin| plugin.limits.buffer_bytes_max = 10), "0");
    assert_eq!(status_of(replace, |plugin| plugin.limits.buffer_bytes_max = 9), ":");
}

#[test]
fn metrics_are_bounded_also_across_crashes() {
    // Defines two metrics with names of its own on each request, and then crashes.
    let mut flaky = plugin(
        r#"(global $name (mut i32) (i32.const 16))
           (func $define
             (i32.store8 (i32.const 16) (i32.add (i32.load8_u (i32.const 17)) (i32.const 97)))
             (call $say (i32.add (i32.const 48) (call $define_metric (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 200))))
             (i32.store8 (i32.const 17) (i32.add (i32.load8_u (i32.const 17)) (i32.const 1))))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (drop (call $time (i32.const 208)))
             ;; The clock goes on between the two, and with it the names.
             (i32.store8 (i32.const 17) (i32.wrap_i64 (i64.rem_u (i64.div_u (i64.load (i32.const 208)) (i64.const 1000000000)) (i64.const 20))))
             (call $define) (call $define) unreachable)"#,
    );
    flaky.limits.metrics_max = 3;
    let mut host = Host::new(vec![flaky]);
    host.get();
    assert_eq!(host.world.said(), "00");
    host.advance(Duration::from_secs(5));
    host.get();
    assert_eq!(host.world.said(), "000:", "a new VM has no new room");
    assert_eq!(host.worker.health()[0].reloads, 1);
}

#[test]
fn the_name_of_a_metric_is_bounded() {
    let define = |len: usize| {
        status_of(
            &format!("(call $define_metric (i32.const 0) (i32.const 4096) (i32.const {len}) (i32.const 200))"),
            |_| {},
        )
    };
    assert_eq!((define(1024).as_str(), define(1025).as_str()), ("0", ":"));
}

#[test]
fn the_details_of_a_local_response_are_cut_off() {
    let mut host = Host::new(vec![plugin(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (memory.fill (i32.const 4096) (i32.const 120) (i32.const 5000))
             (drop (call $respond (i32.const 403) (i32.const 4096) (i32.const 5000) (i32.const 0) (i32.const 0)
               (i32.const 0) (i32.const 0) (i32.const -1)))
             (i32.const 1))"#,
    )]);
    let seen = host.get();
    assert_eq!(seen, [format!("< [:status=403]. ({})", "x".repeat(1024))]);
}

#[test]
fn what_a_guest_does_wrong_in_a_loop_is_told_a_bounded_number_of_times() {
    let mut wrong = plugin(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (local $i i32)
             (loop
               (drop (call $continue (i32.const 9)))
               (br_if 0 (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 1000))))
             (call $say (i32.const 33))
             (i32.const 0))"#,
    );
    wrong.limits.log_lines_per_second = 7;
    let mut host = Host::new(vec![wrong]);
    host.get();
    assert_eq!(host.world.lints.borrow().len(), 7);
    assert_eq!(host.world.said(), "!", "which leaves the guest's own lines alone");
    host.advance(Duration::from_secs(1));
    host.get();
    assert_eq!(host.world.lints.borrow().len(), 14);
}

// ---- replacing a VM

#[test]
fn a_vm_that_crashes_at_once_is_tried_ever_less_often() {
    let mut crashes =
        plugin(r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) unreachable)"#);
    crashes.reload_backoff = Duration::from_secs(1);
    crashes.reload_backoff_max = Duration::from_secs(8);
    let mut host = Host::new(vec![crashes]);
    let traps = |host: &Host| host.worker.health()[0].traps;
    host.get();
    // A pause is between half of these and the whole.
    for (number, seconds) in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (6, 8)] {
        assert_eq!(traps(&host), number);
        host.advance(Duration::from_millis(seconds * 500 - 10));
        host.get();
        assert_eq!(traps(&host), number, "it is too early after crash {number}");
        host.advance(Duration::from_millis(seconds * 500 + 10));
        host.get();
    }
    assert_eq!(traps(&host), 7);
}

#[test]
fn a_vm_that_lasted_is_replaced_as_soon_as_the_first_time() {
    let crashes_each_second_time = plugin(
        r#"(global $requests (mut i32) (i32.const 0))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (global.set $requests (i32.add (global.get $requests) (i32.const 1)))
             (if (i32.eq (global.get $requests) (i32.const 2)) (then unreachable))
             (i32.const 0))"#,
    );
    let mut host = Host::new(vec![crashes_each_second_time]);
    for traps in 1..=4 {
        assert_eq!(host.get(), ["> []."]);
        host.advance(Duration::from_secs(20));
        host.get();
        assert_eq!(host.worker.health()[0].traps, traps);
        host.advance(Duration::from_secs(1));
    }
}

#[test]
fn a_guest_may_ask_as_often_as_it_likes() {
    let asks = guest(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (local $i i32)
             (loop
               (drop (call $continue (i32.const 0)))
               (drop (call $continue (i32.const 1)))
               (br_if 0 (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 100000))))
             (i32.const 1))"#,
    );
    let mut asks = Plugin::new("probe", asks);
    asks.limits.callback_time_max = Duration::from_secs(10);
    let mut host = Host::new(vec![asks]);
    assert_eq!(host.get(), ["> []."], "which counts once");
}
