//! Guests that want more of something than there is, or want it all the time.

use std::time::{Duration, Instant};

use crate::support::{Settings, Site, attacker, guest};

/// Calls as long as the answer is `Ok`.
fn as_long_as_it_works(call: &str) -> String {
    format!("(loop (br_if 0 (i32.eqz {call})))")
}

#[test]
fn a_flood_of_log_lines_is_cut_off_and_counted() {
    let filter = "    limits: { log_lines_per_second: 10, log_line_bytes: 80B, callback_time: 5s }\n";
    let wasm = attacker(
        r#"(memory.fill (i32.const 4096) (i32.const 120) (i32.const 1000))
           (loop
             (drop (call $log (i32.const 3) (i32.const 4096) (i32.const 1000)))
             (br_if 0 (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 100000))))"#,
    );
    let mut gate = Site::new(&wasm, Settings { filter, ..Settings::default() }).serve();
    let began = Instant::now();
    assert_eq!(gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status), Some(200));
    let seconds = began.elapsed().as_secs() as usize + 2;
    gate.serves_others();
    let log = gate.server.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("xxxx")).collect();
    assert!((10..=10 * seconds).contains(&lines.len()), "{} lines in {seconds} s", lines.len());
    assert!(lines.iter().all(|line| line.matches('x').count() <= 81), "{log}");
    std::thread::sleep(Duration::from_millis(1_100));
    gate.ask("/guarded", &[("x-attack", "1")]);
    gate.wait_until("a line about the others", |gate| {
        gate.server.log().contains(" lines were dropped: more than 10 a second")
    });
}

#[test]
fn a_map_grows_to_its_bound_and_the_request_goes_on() {
    let filter = "    limits: { map_pairs: 40, map_bytes: 8KiB }\n";
    let many = attacker(&as_long_as_it_works(
        "(call $add (i32.const 0) (i32.const 0) (i32.const 2) (i32.const 0) (i32.const 1))",
    ));
    let large = attacker(&format!(
        "(memory.fill (i32.const 4096) (i32.const 120) (i32.const 1000)) {}",
        as_long_as_it_works("(call $add (i32.const 0) (i32.const 0) (i32.const 2) (i32.const 4096) (i32.const 1000))")
    ));
    for (wasm, lines) in [(many, 20..=40), (large, 10..=20)] {
        let mut gate = Site::new(&wasm, Settings { filter, ..Settings::default() }).serve();
        assert_eq!(gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status), Some(200));
        let requests = gate.site.origin.take_requests();
        let [request] = requests.as_slice() else { panic!("{requests:?}") };
        let seen = request.fields.iter().count();
        assert!(lines.contains(&seen), "{seen} lines");
        gate.serves_others();
    }
}

#[test]
fn shared_data_queues_metrics_and_properties_grow_to_their_bounds() {
    let filter = "    limits: { shared_data_entries: 100, queue_length: 10, queues: 3, metrics: 5, properties: 7, callback_time: 5s }\n";
    // Names are four letters at 4096; each kind is filled until it is refused, and the count becomes a field: a letter each 10.
    let fill = |call: &str, field: &str| {
        format!(
            r#"(local.set $i (i32.const 0))
               (loop
                 (i32.store (i32.const 4096) (i32.add (i32.const 0x61616161) (local.get $i)))
                 (if (i32.eqz {call}) (then (local.set $i (i32.add (local.get $i) (i32.const 1))) (br 1))))
               (i32.store8 (i32.const 40) (i32.add (i32.const 48) (i32.div_u (local.get $i) (i32.const 10))))
               (i32.store8 (i32.const 41) (i32.add (i32.const 48) (i32.rem_u (local.get $i) (i32.const 10))))
               (i32.store8 (i32.const 32) (i32.const {}))
               (drop (call $add (i32.const 0) (i32.const 32) (i32.const 1) (i32.const 40) (i32.const 2)))"#,
            field.as_bytes()[0]
        )
    };
    let code = [
        fill("(call $set_shared (i32.const 4096) (i32.const 4) (i32.const 0) (i32.const 8) (i32.const 0))", "d"),
        fill("(call $register (i32.const 4096) (i32.const 4) (i32.const 200))", "r"),
        fill("(call $enqueue (i32.load (i32.const 200)) (i32.const 4096) (i32.const 4))", "q"),
        fill("(call $define_metric (i32.const 0) (i32.const 4096) (i32.const 4) (i32.const 204))", "m"),
        fill("(call $set_property (i32.const 4096) (i32.const 4) (i32.const 0) (i32.const 8))", "p"),
    ]
    .concat();
    let mut gate = Site::new(&attacker(&code), Settings { filter, ..Settings::default() }).serve();
    assert_eq!(
        gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status),
        Some(200),
        "{}",
        gate.server.log()
    );
    let requests = gate.site.origin.take_requests();
    let field = |name: &str| requests[0].fields.get(name).map(|value| value.escape_ascii().to_string());
    let counts: Vec<Option<String>> = ["d", "r", "q", "m", "p"].into_iter().map(field).collect();
    // `:` follows 9: ten times ten.
    assert_eq!(counts, [":0", "03", "10", "05", "07"].map(|count| Some(count.to_owned())));
    gate.serves_others();
    assert!(gate.server.admin_get("/metrics").is_ok());
}

/// `GET /` of `a`, as a map.
const CALL: &str = r"\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\01\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/\00:authority\00a\00";

#[test]
fn callouts_are_bounded_and_the_request_goes_on() {
    let filter = "    allowed_upstreams: [origin]\n    limits: { callouts: 5 }\n";
    let call = "(call $http_call (i32.const 32) (i32.const 6) (i32.const 48) (i32.const 61)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 5000) (i32.const 204))";
    let wasm = guest(&format!(
        r#"(data (i32.const 32) "origin")
           (data (i32.const 48) "{CALL}")
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (if (call $attacked) (then {}))
             (i32.const 0))"#,
        as_long_as_it_works(call)
    ));
    let mut gate = Site::new(&wasm, Settings { filter, ..Settings::default() }).serve();
    assert_eq!(gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status), Some(200));
    gate.serves_others();
    let callouts = gate.site.origin.take_requests().iter().filter(|request| request.path == "/").count();
    assert!(callouts <= 5, "{callouts} callouts");
}

#[test]
fn a_callout_with_too_large_a_body_is_refused_and_the_request_goes_on() {
    let filter = "    allowed_upstreams: [origin]\n    limits: { callout_bytes: 99B }\n";
    // The answers to a body of 100 bytes and to one of 99 become a field: `:` is 10, `InternalFailure`.
    let call = |len: u8, at: u32| {
        format!(
            "(i32.store8 (i32.const {at}) (i32.add (i32.const 48) (call $http_call (i32.const 32) (i32.const 6)
               (i32.const 48) (i32.const 61) (i32.const 4096) (i32.const {len}) (i32.const 0) (i32.const 0) (i32.const 5000)
               (i32.const 204))))"
        )
    };
    let wasm = guest(&format!(
        r#"(data (i32.const 32) "origin")
           (data (i32.const 48) "{CALL}")
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             {} {}
             (i32.store8 (i32.const 44) (i32.const 97))
             (drop (call $add (i32.const 0) (i32.const 44) (i32.const 1) (i32.const 40) (i32.const 2)))
             (i32.const 0))"#,
        call(100, 40),
        call(99, 41)
    ));
    let gate = Site::new(&wasm, Settings { filter, ..Settings::default() }).serve();
    assert_eq!(gate.status("/guarded"), Some(200), "{}", gate.server.log());
    let requests = gate.site.origin.take_requests();
    let guarded = requests.iter().find(|request| request.path == "/guarded").expect("the request went on");
    assert_eq!(guarded.fields.get("a").map(|value| value.escape_ascii().to_string()), Some(":0".into()));
}

#[test]
fn many_guests_that_tick_each_millisecond_leave_turns_to_requests() {
    // Each tick computes for some milliseconds; together they want the whole worker, many times over.
    let wasm = guest(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
             (drop (call $tick_period (i32.const 1))) (i32.const 1))
           (func (export "proxy_on_tick") (param i32) (local $i i32)
             (loop (br_if 0 (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 3000000)))))"#,
    );
    let filters: String =
        (0..63).map(|n| format!("  - {{ name: ticks-{n}, wasm: guest.wasm, vm_id: v{} }}\n", n % 7)).collect();
    let mut gate = Site::new(&wasm, Settings { filter: &filters, ..Settings::default() }).serve();
    for _ in 0..20 {
        gate.serves_others();
        assert_eq!(gate.status("/guarded"), Some(200));
    }
}

#[test]
fn a_queue_that_fills_itself_leaves_turns_to_requests() {
    let wasm = guest(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
             (drop (call $register (i32.const 0) (i32.const 1) (i32.const 200)))
             (drop (call $enqueue (i32.load (i32.const 200)) (i32.const 0) (i32.const 1)))
             (i32.const 1))
           ;; One out, as many in as there is room for: each of them is told again.
           (func (export "proxy_on_queue_ready") (param i32) (param $queue i32)
             (drop (call $dequeue (local.get $queue) (i32.const 204) (i32.const 208)))
             (loop (br_if 0 (i32.eqz (call $enqueue (local.get $queue) (i32.const 0) (i32.const 1))))))"#,
    );
    let mut gate =
        Site::new(&wasm, Settings { filter: "    limits: { queue_length: 100 }\n", ..Settings::default() }).serve();
    for _ in 0..20 {
        gate.serves_others();
        assert_eq!(gate.status("/guarded"), Some(200));
    }
}

#[test]
fn pausing_for_ever_ends_with_a_time_out_and_leaves_nothing_behind() {
    for (callback, code) in
        [("proxy_on_request_headers", "(i32.const 3)"), ("proxy_on_response_headers", "(i32.const 3)")]
    {
        let wasm = guest(&format!(r#"(func (export "{callback}") (param i32 i32 i32) (result i32) {code})"#));
        // The route's own time is 15 s by default, and a standstill is the longer of both.
        let site = Site::new(&wasm, Settings { listener: "stream_idle_timeout: 100ms", ..Settings::default() });
        let policy = std::fs::read_to_string(site.policy()).expect("a policy");
        let policy =
            policy.replace("name: guarded, upstream: origin", "name: guarded, upstream: origin, timeout: 100ms");
        std::fs::write(site.policy(), policy).expect("a file");
        let mut gate = site.serve();
        let response = gate.ask("/guarded", &[]).expect("a response");
        assert_eq!(response.status, 504, "{callback}");
        gate.serves_others();
        gate.wait_until("no request", |gate| {
            gate.server.admin_get("/metrics").is_ok_and(|text| text.contains("portcullis_requests_active 0"))
        });
    }
}
