//! Guests that loop, eat memory, lie about pointers, flood and crash: the host stays up and other streams are served.

use std::time::{Duration, Instant};

use crate::support::{Host, bytes, guest, module, plugin, request, try_guest};
use portcullis_abi::{Ending, FailurePolicy, ModuleError, Plugin, PluginState, Trapped};

const FAILED: &str = "< [:status=503]. (wasm_fail_stream{probe})";

/// A guest whose request callback does `code`.
fn on_request(code: &str) -> Plugin {
    on_request_with("", code)
}

/// The same, with more data.
fn on_request_with(data: &str, code: &str) -> Plugin {
    plugin(&format!(
        r#"(data (i32.const 16) "name\0avalue") {data}
           (func $recurse (param i32) (result i32) (i32.add (i32.const 1) (call $recurse (local.get 0))))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) {code} (i32.const 0))"#
    ))
}

/// Runs a request into a guest that does not survive it; says how it ended.
fn end_of(plugin: Plugin) -> Trapped {
    let mut host = Host::new(vec![plugin]);
    assert_eq!(host.get(), [FAILED]);
    match &host.worker.health()[0].state {
        PluginState::Failed(trapped) => trapped.clone(),
        PluginState::Running => panic!("the guest survived"),
    }
}

#[test]
fn an_endless_loop_ends_at_its_deadline() {
    let began = Instant::now();
    let trapped = end_of(on_request("(loop (br 0))"));
    assert_eq!(trapped, Trapped::Deadline(Duration::from_millis(100), "proxy_on_request_headers"));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn endless_recursion_ends() {
    assert_eq!(
        end_of(on_request("(drop (call $recurse (i32.const 0)))")),
        Trapped::StackOverflow("proxy_on_request_headers")
    );
}

#[test]
fn memory_is_bounded() {
    let mut greedy = on_request("(if (i32.eq (memory.grow (i32.const 1000)) (i32.const -1)) (then unreachable))");
    greedy.limits.memory_bytes_max = 1024 * 1024;
    assert_eq!(end_of(greedy), Trapped::Memory(1024 * 1024, "proxy_on_request_headers"));
}

#[test]
fn a_guest_that_starts_too_large_is_refused() {
    let mut large = plugin("");
    large.limits.memory_bytes_max = 65536;
    let error = Host::try_new(vec![large]).err().unwrap().to_string();
    assert!(error.contains("more than the 65536 bytes of memory allowed"), "{error}");
}

#[test]
fn pointers_outside_memory_end_the_guest() {
    for code in [
        "(drop (call $log (i32.const 2) (i32.const -1) (i32.const 2)))",
        "(drop (call $log (i32.const 2) (i32.const 0) (i32.const -1)))",
        "(drop (call $get (i32.const 0) (i32.const 16) (i32.const 4) (i32.const -2) (i32.const 200)))
         (drop (call $pairs (i32.const 0) (i32.const 131070) (i32.const 200)))",
        "(drop (call $set_pairs (i32.const 0) (i32.const 131071) (i32.const 4)))",
    ] {
        let trapped = end_of(on_request(code));
        assert!(trapped.to_string().contains("outside the guest's memory"), "{code}: {trapped}");
    }
}

#[test]
fn an_allocator_that_calls_back_or_lies_ends_the_guest() {
    let prelude = |body: &str| {
        format!(
            r#"(module
              (import "env" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
              (memory (export "memory") 1)
              (func (export "proxy_abi_version_0_2_1"))
              (func (export "proxy_on_memory_allocate") (param i32) (result i32) {body})
              (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                (drop (call $pairs (i32.const 0) (i32.const 8) (i32.const 12))) (i32.const 0)))"#
        )
    };
    for (body, expected) in [
        (
            "(drop (call $pairs (i32.const 0) (i32.const 8) (i32.const 12))) (i32.const 1)",
            "has an allocator that refused",
        ),
        ("(i32.const 0)", "has an allocator that refused"),
        ("(i32.const -8)", "outside the guest's memory"),
        ("unreachable", "has an allocator that refused"),
        ("(loop (br 0)) unreachable", "has an allocator that refused"),
    ] {
        let trapped = end_of(Plugin::new("probe", module(&prelude(body)).unwrap()));
        assert!(trapped.to_string().contains(expected), "{body}: {trapped}");
    }
}

#[test]
fn lines_that_would_split_a_message_are_refused() {
    // 2 is BadArgument: names and values with a line feed, unknown pseudo-headers, an undecodable map.
    let mut host = Host::new(vec![on_request(
        r#"(call $say (i32.add (i32.const 48) (call $add (i32.const 0) (i32.const 16) (i32.const 4) (i32.const 18) (i32.const 4))))
           (call $say (i32.add (i32.const 48) (call $add (i32.const 0) (i32.const 18) (i32.const 4) (i32.const 16) (i32.const 4))))
           (i32.store8 (i32.const 16) (i32.const 58))
           (call $say (i32.add (i32.const 48) (call $replace (i32.const 0) (i32.const 16) (i32.const 4) (i32.const 21) (i32.const 4))))
           (call $say (i32.add (i32.const 48) (call $set_pairs (i32.const 0) (i32.const 16) (i32.const 9))))"#,
    )]);
    assert_eq!(host.get(), ["> []."], "the request is as it was");
    assert_eq!(host.world.said(), "2222");
}

#[test]
fn maps_and_bodies_from_guests_are_bounded() {
    let mut small = on_request(
        r#"(loop (br_if 0 (i32.eqz (call $add (i32.const 0) (i32.const 21) (i32.const 5) (i32.const 21) (i32.const 5)))))
           (call $say (i32.const 111))"#,
    );
    small.limits.map_lines_max = 20;
    let mut host = Host::new(vec![small]);
    assert_eq!(host.get().len(), 1);
    assert_eq!(host.world.said(), "o", "the 21st line is refused");
}

/// How often `call`, which answers a status, succeeds before it answers InternalFailure (10).
fn successes(call: &str, limit: impl FnOnce(&mut Plugin)) -> usize {
    successes_with("", call, limit)
}

/// The same, in a guest with more data.
fn successes_with(data: &str, call: &str, limit: impl FnOnce(&mut Plugin)) -> usize {
    let mut plugin = on_request_with(
        data,
        &format!(
            r#"(local $status i32)
           (block (loop
             (br_if 1 (local.tee $status {call}))
             (call $say (i32.const 111))
             (br 0)))
           (call $say (i32.add (i32.const 48) (i32.eq (local.get $status) (i32.const 10))))"#
        ),
    );
    limit(&mut plugin);
    let mut host = Host::new(vec![plugin]);
    host.get();
    let said = host.world.said();
    assert!(said.ends_with('1'), "{said}: another status than InternalFailure");
    said.len() - 1
}

#[test]
fn bodies_and_callouts_of_guests_are_bounded() {
    let respond = "(call $respond (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 100)
        (i32.const 0) (i32.const 0) (i32.const -1))";
    assert_eq!(successes(respond, |plugin| plugin.limits.buffer_bytes_max = 99), 0, "the body of an answer");
    let call = "(call $http_call (i32.const 16) (i32.const 4) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 100)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 200))";
    assert_eq!(successes(call, |plugin| plugin.limits.call_bytes_max = 99), 0, "the body of a callout");
}

#[test]
fn what_guests_keep_with_a_stream_is_bounded() {
    // Each time another name of four bytes.
    let next = "(i32.store (i32.const 16) (i32.add (i32.const 1) (i32.load (i32.const 16))))";
    let set = format!(
        "(block (result i32) {next} (call $set_property (i32.const 16) (i32.const 4) (i32.const 0) (i32.const 6)))"
    );
    assert_eq!(successes(&set, |plugin| plugin.limits.properties_max = 3), 3, "in number");
    // `wasm.`, the name and the value are 15 bytes.
    assert_eq!(successes(&set, |plugin| plugin.limits.map_bytes_max = 59), 3, "in bytes");
    let declare = format!(
        r#"(block (result i32) {next} (i32.store16 (i32.const 14) (i32.const 0x040a))
           (call $foreign (i32.const 32) (i32.const 16) (i32.const 14) (i32.const 6) (i32.const 0) (i32.const 0)))"#
    );
    let name = r#"(data (i32.const 32) "declare_property")"#;
    assert_eq!(successes_with(name, &declare, |plugin| plugin.limits.properties_max = 3), 3, "in declarations");
}

#[test]
fn a_module_that_is_too_large_is_refused() {
    let mut limits = portcullis_abi::ModuleLimits::default();
    limits.module_bytes_max = 7;
    let error = portcullis_abi::Module::from_bytes(crate::support::engine(), b"\0asm\x01\0\0\0", &limits);
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("the module has 8 bytes, more than the 7 allowed"), "{error}");
}

#[test]
fn log_floods_are_cut_off_and_counted() {
    let mut chatty = on_request(
        "(local $i i32)
         (loop (call $say (i32.const 46)) (br_if 0 (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 50))))",
    );
    chatty.limits.log_lines_per_second = 10;
    let mut host = Host::new(vec![chatty]);
    host.get();
    assert_eq!(host.world.said().len(), 10);
    host.advance(Duration::from_secs(1));
    host.get();
    assert_eq!(host.world.said().len(), 20);
    assert!(host.world.log.borrow().iter().any(|line| line.starts_with("40 lines were dropped")));
}

/// Traps on every request with `x-a: 1`, which all have, unless it is told to wait first.
const TRAPS: &str = "unreachable";

#[test]
fn a_failed_guest_is_replaced_after_a_back_off() {
    let flaky = plugin(
        r#"(global $requests (mut i32) (i32.const 0))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (global.set $requests (i32.add (global.get $requests) (i32.const 1)))
             (if (i32.eq (global.get $requests) (i32.const 2)) (then unreachable))
             (i32.const 0))"#,
    );
    let mut host = Host::new(vec![flaky]);
    assert_eq!(host.get(), ["> []."]);
    assert_eq!(host.get(), [FAILED], "it traps");
    assert_eq!(host.get(), [FAILED], "inside the back-off");
    host.advance(Duration::from_millis(400));
    assert_eq!(host.get(), [FAILED], "which lasts half a second at least");
    host.advance(Duration::from_millis(700));
    assert_eq!(host.get(), ["> []."], "a new VM");
    let health = &host.worker.health()[0];
    assert_eq!((&health.state, health.traps, health.reloads), (&PluginState::Running, 1, 1));
}

#[test]
fn failure_policies_are_envoys() {
    let mut closed = on_request(TRAPS);
    closed.failure_policy = FailurePolicy::Closed;
    let mut host = Host::new(vec![closed]);
    assert_eq!(host.get(), [FAILED]);
    host.advance(Duration::from_secs(60));
    assert_eq!(host.get(), [FAILED], "for ever");

    let mut open = on_request(TRAPS);
    open.failure_policy = FailurePolicy::Open;
    let mut host = Host::new(vec![open]);
    assert_eq!(host.get(), [FAILED], "the request that broke it");
    assert_eq!(host.get(), ["> []."], "later ones pass without it");
}

#[test]
fn a_trap_fails_the_streams_that_wait_for_the_same_guest_and_no_others() {
    let waits_then_traps = plugin(
        r#"(global $requests (mut i32) (i32.const 0))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (global.set $requests (i32.add (global.get $requests) (i32.const 1)))
             (if (i32.eq (global.get $requests) (i32.const 2)) (then unreachable))
             (i32.const 1))"#,
    );
    let mut host = Host::new(vec![waits_then_traps, Plugin::new("other", guest("(func)"))]);
    let (waiting, other, crashing) = (host.open(&[0]), host.open(&[1]), host.open(&[0]));
    host.worker.request_headers(waiting, request(), false);
    host.worker.request_headers(other, request(), false);
    assert_eq!(host.seen(), ["> []"]);
    host.worker.request_headers(crashing, request(), true);
    assert_eq!(host.seen(), [FAILED, FAILED], "the crashing request and the waiting one");
    host.worker.request_body(other, bytes("goes on"), true);
    assert_eq!(host.seen(), ["> \"goes on\"."]);
    for id in [waiting, other, crashing] {
        host.worker.finish(id, Ending::default());
    }
}

#[test]
fn start_functions_may_not_use_the_abi() {
    let early = plugin(r#"(func (export "_initialize") (drop (call $continue (i32.const 0))))"#);
    let error = Host::try_new(vec![early]).err().unwrap().to_string();
    assert!(error.contains("called `proxy_continue_stream` while the guest starts"), "{error}");
}

#[test]
fn a_refused_configuration_says_what_the_guest_said() {
    let picky = plugin(
        r#"(data (i32.const 16) "issuers[0]: no keys")
           (func (export "proxy_on_configure") (param i32 i32) (result i32)
             (drop (call $log (i32.const 4) (i32.const 16) (i32.const 19))) (i32.const 0))"#,
    );
    let error = Host::try_new(vec![picky]).err().unwrap().to_string();
    assert_eq!(error, "filter `probe`: refused its configuration\n  issuers[0]: no keys");
}

#[test]
fn modules_that_are_no_plugins_are_refused_with_the_reason() {
    let check = |wat: &str, expected: &str| {
        let error = module(wat).expect_err(wat).to_string();
        assert!(error.contains(expected), "{wat}: {error}");
        assert!(error.contains("hint: ") || matches!(module(wat), Err(ModuleError::ImportType(_))), "{error}");
    };
    check("(module)", "no Proxy-Wasm plugin");
    check(r#"(module (func (export "proxy_abi_version_0_2_1")))"#, "lacks the export `memory`");
    check(
        r#"(module (memory (export "memory") 1) (func (export "proxy_abi_version_0_2_0")))"#,
        "lacks the export `proxy_on_memory_allocate`",
    );
    check(
        r#"(module (import "env" "host_secret" (func)) (memory (export "memory") 1) (func (export "malloc") (param i32)
           (result i32) (i32.const 0)) (func (export "proxy_abi_version_0_2_0")))"#,
        "imports what this host does not have: `env.host_secret`",
    );
    check(
        r#"(module (import "env" "proxy_log" (func (param i32))) (memory (export "memory") 1) (func (export "malloc")
           (param i32) (result i32) (i32.const 0)) (func (export "proxy_abi_version_0_2_0")))"#,
        "imports do not fit",
    );
    let error = try_guest(r#"(func (export "proxy_on_log") (param i64))"#).unwrap_err().to_string();
    assert!(error.starts_with("the export `proxy_on_log` has type (i64) -> ()"), "{error}");
}
