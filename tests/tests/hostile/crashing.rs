//! Guests that do not come back: loops, recursion, memory, pointers, allocators, panics.

use std::process::Command;
use std::time::{Duration, Instant};

use portcullis_tests::places;
use portcullis_tests::process::{Process, cpu_time};

use crate::support::{Gate, QUICKLY, Settings, Site, attacker, guest};

fn serve(wasm: &[u8]) -> Gate {
    Site::new(wasm, Settings { filter: QUICKLY, ..Settings::default() }).serve()
}

/// The guest crashes with `log` on the next attack; others are served, and soon it is again.
fn crashes(gate: &mut Gate, log: &str) {
    assert_eq!(gate.status("/guarded"), Some(200), "{}", gate.server.log());
    let seen = gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status);
    assert_eq!(seen, Some(503), "{}", gate.server.log());
    gate.serves_others();
    gate.wait_until(log, |gate| gate.server.log().contains(log));
    gate.wait_until("a fresh guest", |gate| gate.status("/guarded") == Some(200));
}

#[test]
fn whatever_a_guest_does_in_a_request_only_that_request_fails() {
    for (code, log) in [
        ("(loop (br 0))", "ran longer than 100ms in `proxy_on_request_headers`"),
        ("unreachable", "trapped in `proxy_on_request_headers`: wasm trap: wasm `unreachable` instruction executed"),
        (
            "(loop (br_if 0 (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable",
            "wanted more than 67108864 bytes of memory in `proxy_on_request_headers`",
        ),
        ("(drop (call $log (i32.const 2) (i32.const -1) (i32.const 2)))", "outside the guest's memory"),
        ("(drop (call $log (i32.const 2) (i32.const 8) (i32.const -1)))", "outside the guest's memory"),
        (
            "(drop (call $get (i32.const 0) (i32.const 0) (i32.const 8) (i32.const -4) (i32.const 16)))",
            "outside the guest's memory",
        ),
        ("(drop (call $pairs (i32.const 0) (i32.const 131071) (i32.const 16)))", "outside the guest's memory"),
        ("(drop (call $set_pairs (i32.const 0) (i32.const 131000) (i32.const 1000)))", "outside the guest's memory"),
        (
            "(drop (call $respond (i32.const 403) (i32.const -9) (i32.const 9) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1)))",
            "outside the guest's memory",
        ),
        ("(drop (i32.div_u (i32.const 1) (local.get $i)))", "integer divide by zero"),
        ("(drop (i32.load (i32.const -4)))", "out of bounds memory access"),
    ] {
        crashes(&mut serve(&attacker(code)), log);
    }
}

/// Counted in the worker's CPU time, so that nothing else on the machine counts; the least of some tries, because on a busy machine the
/// thread that watches gets its turn late, too.
#[test]
fn a_loop_takes_no_more_of_a_worker_than_its_time_and_fifty_milliseconds() {
    let gate = serve(&attacker("(loop (br 0))"));
    let taken =
        || cpu_time(gate.server.id(), |thread| thread.starts_with("worker")).unwrap_or_else(|error| panic!("{error}"));
    let tries = (0..5).map(|_| {
        gate.wait_until("a fresh guest", |gate| gate.status("/guarded") == Some(200));
        let before = taken();
        assert_eq!(gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status), Some(503));
        taken() - before
    });
    let least = tries.min().expect("five tries");
    assert!(
        (Duration::from_millis(95)..Duration::from_millis(150)).contains(&least),
        "{least:?}\n{}",
        gate.server.log()
    );
}

#[test]
fn recursion_ends() {
    let mut gate = serve(&guest(
        r#"(func $deeper (param i32) (result i32) (i32.add (i32.const 1) (call $deeper (local.get 0))))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (if (call $attacked) (then (drop (call $deeper (i32.const 0)))))
             (i32.const 0))"#,
    ));
    crashes(&mut gate, "used up its stack in `proxy_on_request_headers`");
}

#[test]
fn an_allocator_that_calls_the_host_loops_or_lies_ends_its_guest() {
    for (body, log) in [
        (
            "(drop (call $pairs (i32.const 0) (i32.const 8) (i32.const 12))) (i32.const 64)",
            "has an allocator that refused",
        ),
        (
            "(drop (call $get (i32.const 0) (i32.const 0) (i32.const 8) (i32.const 16) (i32.const 20))) (i32.const 64)",
            "has an allocator that refused",
        ),
        ("(loop (br 0)) (i32.const 64)", "has an allocator that refused"),
        ("unreachable", "has an allocator that refused"),
        ("(i32.const 0)", "has an allocator that refused"),
        ("(i32.const -2)", "outside the guest's memory"),
    ] {
        // The field is long, so that the allocator is asked for much only then.
        let wasm = wat::parse_str(format!(
            r#"(module
                 (import "env" "proxy_get_header_map_value" (func $get (param i32 i32 i32 i32 i32) (result i32)))
                 (import "env" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
                 (memory (export "memory") 1)
                 (data (i32.const 0) "x-attack")
                 (func (export "proxy_abi_version_0_2_1"))
                 (func (export "proxy_on_memory_allocate") (param i32) (result i32) {body})
                 (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                   (drop (call $get (i32.const 0) (i32.const 0) (i32.const 8) (i32.const 16) (i32.const 20)))
                   (i32.const 0)))"#
        ))
        .expect("WAT");
        crashes(&mut serve(&wasm), log);
    }
}

#[test]
fn the_next_request_gets_a_fresh_guest() {
    // Counts its requests in `x-count`, by a letter from `a` on.
    let mut gate = serve(&guest(
        r#"(data (i32.const 32) "x-count")
           (global $count (mut i32) (i32.const 96))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (global.set $count (i32.add (global.get $count) (i32.const 1)))
             (i32.store8 (i32.const 40) (global.get $count))
             (drop (call $add (i32.const 0) (i32.const 32) (i32.const 7) (i32.const 40) (i32.const 1)))
             (if (call $attacked) (then (loop (br 0))))
             (i32.const 0))"#,
    ));
    let counts = |gate: &Gate| -> Vec<String> {
        let requests = gate.site.origin.take_requests();
        requests
            .iter()
            .filter_map(|request| request.fields.get("x-count").map(|value| value.escape_ascii().to_string()))
            .collect()
    };
    gate.status("/guarded");
    gate.status("/guarded");
    assert_eq!(counts(&gate), ["a", "b"]);
    crashes(&mut gate, "ran longer than 100ms");
    assert_eq!(counts(&gate), ["c", "a"], "the request that crashed it, `d`, reached nobody");
}

/// A guest that loops in one callback, once.
fn loops_once_in(callback: &str, params: usize, result: bool) -> Vec<u8> {
    let (params, result, value) =
        ("i32 ".repeat(params), if result { "(result i32)" } else { "" }, if result { "(i32.const 0)" } else { "" });
    guest(&format!(
        r#"(data (i32.const 32) "origin")
           (data (i32.const 48) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\01\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/\00:authority\00a\00")
           (func (export "proxy_on_configure") (param i32 i32) (result i32)
             (drop (call $tick_period (i32.const 20)))
             (drop (call $register (i32.const 32) (i32.const 1) (i32.const 200)))
             (drop (call $enqueue (i32.load (i32.const 200)) (i32.const 32) (i32.const 1)))
             (drop (call $http_call (i32.const 32) (i32.const 6) (i32.const 48) (i32.const 61)
               (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 5000) (i32.const 204)))
             (i32.const 1))
           (func (export "{callback}") (param {params}) {result}
             (if (call $once) (then (loop (br 0))))
             {value})"#
    ))
}

#[test]
fn a_loop_in_any_callback_ends_and_others_are_served() {
    for (callback, params, result) in [
        ("proxy_on_tick", 1, false),
        ("proxy_on_queue_ready", 2, false),
        ("proxy_on_http_call_response", 5, false),
        ("proxy_on_request_body", 3, true),
        ("proxy_on_response_headers", 3, true),
        ("proxy_on_response_body", 3, true),
        ("proxy_on_log", 1, false),
        ("proxy_on_done", 1, true),
        ("proxy_on_delete", 1, false),
    ] {
        let filter = format!("{QUICKLY}    allowed_upstreams: [origin]\n");
        let wasm = loops_once_in(callback, params, result);
        let mut gate = Site::new(&wasm, Settings { filter: &filter, ..Settings::default() }).serve();
        let began = Instant::now();
        let mut request = portcullis_harness::RequestPlan::new("POST", "/guarded");
        request.body = vec![b"body".to_vec()];
        // Whether it is answered depends on how far it has come when the loop begins.
        drop(portcullis_tests::client::send(gate.server.address(), &request));
        gate.serves_others();
        let log = format!("ran longer than 100ms in `{callback}`");
        gate.wait_until(&log, |gate| gate.server.log().contains(&log));
        gate.wait_until("a fresh guest", |gate| gate.status("/guarded") == Some(200));
        // Far from any figure: a loop that did not end would take for ever.
        assert!(began.elapsed() < Duration::from_secs(30), "{callback}: {:?}", began.elapsed());
    }
}

#[test]
fn a_guest_that_never_starts_keeps_the_program_from_starting() {
    for callback in ["_initialize", "proxy_on_vm_start", "proxy_on_configure"] {
        let signature = if callback == "_initialize" { "" } else { "(param i32 i32) (result i32)" };
        let wasm = guest(&format!(r#"(func (export "{callback}") {signature} (loop (br 0)) unreachable)"#));
        let site = Site::new(&wasm, Settings { filter: "    limits: { start_time: 100ms }\n", ..Settings::default() });
        let mut command = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
        let ended = Process::run("portcullis", command.arg("serve").arg(site.policy()))
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(ended.status.code(), Some(2), "{}", ended.output);
        let said = format!("filter `guest`: ran longer than 100ms in `{callback}`");
        assert!(ended.output.contains(&said), "{}", ended.output);
    }
}

#[test]
fn a_guest_that_loops_when_it_is_started_again_ends_and_is_tried_later() {
    // The first start counts, the second loops, the third is well.
    let wasm = guest(
        r#"(data (i32.const 32) "starts")
           (func (export "proxy_on_configure") (param i32 i32) (result i32)
             (if (call $get_shared (i32.const 32) (i32.const 6) (i32.const 16) (i32.const 20) (i32.const 24))
               (then (drop (call $set_shared (i32.const 32) (i32.const 6) (i32.const 32) (i32.const 1) (i32.const 0))))
               (else (if (call $once) (then (loop (br 0))))))
             (i32.const 1))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (if (call $attacked) (then unreachable))
             (i32.const 0))"#,
    );
    let filter = format!("{QUICKLY}    limits: {{ start_time: 100ms }}\n");
    let mut gate = Site::new(&wasm, Settings { filter: &filter, ..Settings::default() }).serve();
    assert_eq!(gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status), Some(503));
    gate.wait_until("a fresh guest", |gate| gate.status("/guarded") == Some(200));
    gate.serves_others();
    let log = gate.server.log();
    assert!(log.contains("no new VM could be brought up: it ran longer than 100ms in `proxy_on_configure`"), "{log}");
}

#[test]
fn a_crash_of_one_filter_leaves_the_others_of_its_worker_alone() {
    let filter = format!("{QUICKLY}  - name: second\n    wasm: guest.wasm\n    vm_id: another\n");
    let wasm = guest(
        r#"(data (i32.const 32) "plugin_name") (data (i32.const 48) "x-count")
           (global $count (mut i32) (i32.const 96))
           (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
             (global.set $count (i32.add (global.get $count) (i32.const 1)))
             (i32.store8 (i32.const 60) (global.get $count))
             (drop (call $add (i32.const 2) (i32.const 48) (i32.const 7) (i32.const 60) (i32.const 1)))
             (i32.const 0))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             ;; The first filter is called `guest`, the second `second`: their names have 5 and 6 letters.
             (drop (call $property (i32.const 32) (i32.const 11) (i32.const 64) (i32.const 68)))
             (if (i32.and (call $attacked) (i32.eq (i32.load (i32.const 68)) (i32.const 5))) (then unreachable))
             (i32.const 0))"#,
    );
    let mut gate = Site::new(&wasm, Settings { filter: &filter, ..Settings::default() }).serve();
    let counts = |gate: &Gate| -> String {
        let response = gate.ask("/guarded", &[]).expect("a response");
        let values = response
            .fields
            .iter()
            .filter(|(name, _)| *name == "x-count")
            .map(|(_, value)| value.escape_ascii().to_string());
        values.collect()
    };
    assert_eq!(counts(&gate), "aa");
    assert_eq!(counts(&gate), "bb");
    crashes(&mut gate, "the VM of guest failed");
    let after = counts(&gate);
    // `crashes` let three requests pass: two through both before the crash and after it. The second filter has counted on.
    assert_eq!(after.len(), 2, "{after}");
    assert!(
        after.starts_with(|c| c > 'c') && after.ends_with(|c| c < 'c'),
        "{after}: the first began anew, the second did not"
    );
}
