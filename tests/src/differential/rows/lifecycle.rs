//! How plugins begin: VMs, root contexts, configurations, start functions, exports.

use serde_json::json;

use crate::differential::{Plugin, Row, Step};

/// What the modules below have in common.
const MODULE: &str = r#"
  (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
  (import "env" "proxy_get_buffer_bytes" (func $get (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func (export "proxy_abi_version_0_2_1"))
"#;
/// An allocator that gives the second page.
const ALLOCATE: &str = r#"(func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 65536))"#;

/// Logs a text, which lies at an address of its own.
fn say(at: usize, text: &str) -> (String, String) {
    (
        format!("(data (i32.const {at}) \"{text}\")"),
        format!("(drop (call $log (i32.const 3) (i32.const {at}) (i32.const {})))", text.len()),
    )
}

fn module(id: &str, functions: &[(&str, &str, &str)], rest: &str) -> Plugin {
    let mut text = format!("(module {MODULE} {rest}");
    for (index, (name, signature, answer)) in functions.iter().enumerate() {
        let (data, call) = say(1024 + index * 128, &format!("@{id}#1@{name}"));
        text.push_str(&format!("{data} (func (export \"{name}\") {signature} {call} {answer})"));
    }
    text.push(')');
    Plugin::new("own").text(text)
}

/// A module for a version of the ABI. Functions it has: `$tell` logs a letter with a digit, `$absent` and `$present` ask for a
/// request field.
fn versioned(id: &str, shows: &'static str, version: &str, imports: &str, code: &str) -> Row {
    let mark = format!("@{id}@");
    let letter = 16 + mark.len();
    let text = format!(
        r#"(module (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
             (import "env" "proxy_get_header_map_value" (func $field (param i32 i32 i32 i32 i32) (result i32)))
             {imports}
             (memory (export "memory") 2)
             (data (i32.const 16) "{mark}? ?")
             (data (i32.const 512) "x-absent:method")
             (func $tell (param $letter i32) (param $digit i32)
               (i32.store8 (i32.const {letter}) (local.get $letter))
               (i32.store8 (i32.const {digit}) (i32.add (i32.const 48) (local.get $digit)))
               (drop (call $log (i32.const 3) (i32.const 16) (i32.const {length}))))
             (func $absent (result i32)
               (call $field (i32.const 0) (i32.const 512) (i32.const 8) (i32.const 600) (i32.const 604)))
             (func $present (result i32)
               (call $field (i32.const 0) (i32.const 520) (i32.const 7) (i32.const 600) (i32.const 604)))
             (func (export "proxy_abi_version_{version}"))
             {ALLOCATE}
             {code})"#,
        digit = letter + 2,
        length = mark.len() + 3,
    );
    let plugin = Plugin::new("own").text(text).configuration("plugin").settings(json!({
        "vm_configuration": "the VM",
        "failure_policy": "fail_closed",
    }));
    Row::new(id, shows).plugin(plugin).dies()
}

pub(super) fn rows() -> Vec<Row> {
    const BOOL: &str = "(param i32 i32) (result i32)";
    const YES: &str = "(i32.const 1)";
    let started = |id: &'static str, shows: &'static str, functions: &[(&str, &str, &str)], rest: &str| {
        Row::new(id, shows).plugin(module(id, functions, rest)).with_root().steps([]).until("proxy_on_configure")
    };
    vec![
        Row::new("lifecycle/order", "A root is created, told of its VM, and configured; streams come after.")
            .plugin(
                Plugin::new("own")
                    .configuration("row: lifecycle/order")
                    .settings(json!({ "vm_configuration": "row: lifecycle/order" })),
            )
            .with_root(),
        Row::new("lifecycle/no_configurations", "Without configurations their lengths are 0.")
            .plugin(Plugin::new("own"))
            .script("request_headers: proxy_get_buffer_bytes 6 0 100"),
        Row::new("lifecycle/in_configure", "What can be called while a plugin is configured.")
            .root(
                r#"
                row: lifecycle/in_configure
                configure: proxy_get_header_map_value 0 ":path"
                configure: proxy_get_header_map_pairs 0
                configure: proxy_add_header_map_value 0 "x" "1"
                configure: proxy_get_buffer_bytes 0 0 10
                configure: proxy_get_property "plugin_name"
                configure: proxy_get_property "plugin_root_id"
                configure: proxy_get_property "plugin_vm_id"
                configure: proxy_get_property "request\0path"
                configure: proxy_set_property "row" "1"
                configure: proxy_continue_stream 0
                configure: proxy_send_local_response 403 "" "" { } -1
                configure: proxy_done
                configure: proxy_set_effective_context $context
                "#,
            )
            .steps([]),
        Row::new("lifecycle/shared_vm", "A second plugin with the same vm_id, module and VM configuration gets a root in the same VM, and no vm_start.")
            .plugin(Plugin::new("one").configuration("row: lifecycle/shared_vm\nname: one"))
            .plugin(Plugin::new("two").configuration("row: lifecycle/shared_vm\nname: two"))
            .with_root(),
        Row::new("lifecycle/shared_root", "Two plugins of one name, root id and configuration would share a root; of two names they do not.")
            .plugin(Plugin::new("one").configuration("row: lifecycle/shared_root").settings(json!({ "root_id": "same" })))
            .plugin(Plugin::new("two").configuration("row: lifecycle/shared_root").settings(json!({ "root_id": "same" })))
            .with_root()
            .script("request_headers: proxy_get_property \"plugin_name\""),
        Row::new("lifecycle/configure_refuses", "A plugin that refuses its configuration keeps the host from starting.")
            .plugin(Plugin::new("own").configuration("configure: return 0"))
            .steps([])
            .alone(),
        Row::new("lifecycle/vm_start_refuses", "So does one that refuses the VM's.")
            .plugin(Plugin::new("own").settings(json!({ "vm_configuration": "vm_start: return 0" })))
            .steps([])
            .alone(),
        started("modules/initialize", "A start function `_initialize` runs before everything.",
            &[("_initialize", "", ""), ("proxy_on_context_create", "(param i32 i32)", ""), ("proxy_on_vm_start", BOOL, YES), ("proxy_on_configure", BOOL, YES)], ALLOCATE),
        started("modules/initialize_and_main", "Then `main`, if there is one.",
            &[("_initialize", "", ""), ("main", BOOL, "(i32.const 0)"), ("proxy_on_configure", BOOL, YES)], ALLOCATE),
        started("modules/start", "`_start` runs where there is no `_initialize`.",
            &[("_start", "", ""), ("proxy_on_configure", BOOL, YES)], ALLOCATE),
        started("modules/start_and_initialize", "Of both, `_initialize`.",
            &[("_start", "", ""), ("_initialize", "", ""), ("proxy_on_configure", BOOL, YES)], ALLOCATE),
        started("modules/malloc", "`malloc` will do for an allocator.",
            &[("proxy_on_configure", BOOL, YES)], r#"(func (export "malloc") (param i32) (result i32) (i32.const 65536))"#),
        started("modules/no_optional_exports", "Callbacks that a module lacks are not called, and count as yes.",
            &[("proxy_on_configure", BOOL, YES)], ALLOCATE)
            .steps([Step::post(&["x"])])
            .dies()
            .upstream(),
        started("modules/main_void", "`__main_void` will do for `main`.",
            &[("_initialize", "", ""), ("__main_void", "(result i32)", "(i32.const 0)"), ("proxy_on_configure", BOOL, YES)], ALLOCATE),
        started("modules/main_alone", "Without `_initialize` neither is called.",
            &[("main", BOOL, "(i32.const 0)"), ("proxy_on_configure", BOOL, YES)], ALLOCATE),
        started("modules/two_allocators", "Of two allocators `malloc` is used.",
            &[("malloc", "(param i32) (result i32)", "(i32.const 65536)"), ("proxy_on_memory_allocate", "(param i32) (result i32)", "(i32.const 65536)"),
              ("proxy_on_configure", BOOL, "(drop (call $get (i32.const 7) (i32.const 0) (i32.const 9) (i32.const 200) (i32.const 204))) (i32.const 1)")],
            "")
            .configured("bytes")
            .until("malloc"),
        versioned("modules/abi_0_1_0", "0.1.0: two parameters of header callbacks, functions of its own, and what is absent is empty.", "0_1_0",
            r#"(import "env" "proxy_get_configuration" (func $get_configuration (param i32 i32) (result i32)))
               (import "env" "proxy_continue_request" (func $continue_request (result i32)))
               (import "env" "proxy_continue_response" (func $continue_response (result i32)))
               (import "env" "proxy_clear_route_cache" (func $clear_route_cache (result i32)))"#,
            r#"(global $status (mut i32) (i32.const 9))
               (global $length (mut i32) (i32.const 9))
               (func (export "proxy_on_configure") (param i32 i32) (result i32)
                 (global.set $status (call $get_configuration (i32.const 64) (i32.const 68)))
                 (global.set $length (i32.load (i32.const 68)))
                 (i32.const 1))
               (func (export "proxy_on_request_headers") (param i32 i32) (result i32)
                 (call $tell (i32.const 99) (global.get $status))
                 (call $tell (i32.const 108) (global.get $length))
                 (call $tell (i32.const 103) (call $absent))
                 (call $tell (i32.const 118) (call $get_configuration (i32.const 64) (i32.const 68)))
                 (call $tell (i32.const 108) (i32.load (i32.const 68)))
                 (call $tell (i32.const 114) (call $clear_route_cache))
                 (i32.const 0))
               (func (export "proxy_on_response_headers") (param i32 i32) (result i32)
                 (call $tell (i32.const 104) (i32.const 0)) (i32.const 0))
               (func (export "proxy_on_log") (param i32)
                 (call $tell (i32.const 113) (call $continue_request))
                 (call $tell (i32.const 115) (call $continue_response)))"#),
        versioned("modules/abi_0_2_0", "0.2.0: three parameters, and what is absent is NOT_FOUND.", "0_2_0", "",
            r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (call $tell (i32.const 103) (call $absent))
                 (call $tell (i32.const 101) (local.get 2))
                 (i32.const 0))"#),
        versioned("modules/abi_0_1_0_three_parameters", "A header callback of 0.2.0 in a module for 0.1.0.", "0_1_0", "",
            r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#)
            .alone(),
        versioned("modules/abi_0_2_0_log_level", "A function of 0.2.1 in a module for 0.2.0.", "0_2_0",
            r#"(import "env" "proxy_get_log_level" (func (param i32) (result i32)))"#, "")
            .alone(),
        versioned("modules/abi_0_2_1_continue_request", "A function of 0.1.0 in a module for 0.2.1.", "0_2_1",
            r#"(import "env" "proxy_continue_request" (func (result i32)))"#, "")
            .alone(),
        versioned("modules/emscripten", "What Emscripten's modules import besides.", "0_2_1",
            r#"(import "env" "emscripten_notify_memory_growth" (func $notify (param i32)))
               (import "env" "pthread_equal" (func $equal (param i32 i32) (result i32)))"#,
            r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (call $notify (i32.const 0))
                 (call $tell (i32.const 101) (call $equal (i32.const 7) (i32.const 7)))
                 (call $tell (i32.const 117) (call $equal (i32.const 7) (i32.const 8)))
                 (i32.const 0))"#),
        versioned("modules/wasi_unstable", "WASI by its older name.", "0_2_1",
            r#"(import "wasi_unstable" "random_get" (func $random (param i32 i32) (result i32)))
               (import "wasi_unstable" "fd_close" (func $close (param i32) (result i32)))
               (import "wasi_unstable" "args_sizes_get" (func $arguments (param i32 i32) (result i32)))"#,
            r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (call $tell (i32.const 114) (call $random (i32.const 64) (i32.const 4)))
                 (call $tell (i32.const 99) (call $close (i32.const 3)))
                 (call $tell (i32.const 97) (call $arguments (i32.const 64) (i32.const 68)))
                 (call $tell (i32.const 110) (i32.load (i32.const 64)))
                 (i32.const 0))"#),
        versioned("modules/allocator_calls", "An allocator that calls the host for more than a few harmless functions is a trap.", "0_2_1",
            r#"(import "env" "proxy_get_log_level" (func $level (param i32) (result i32)))"#,
            r#"(global $calls (mut i32) (i32.const 0))
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (global.set $calls (i32.const 1))
                 (drop (call $present))
                 (i32.const 0))
               (func (export "malloc") (param i32) (result i32)
                 (if (global.get $calls) (then (drop (call $level (i32.const 64))))) (i32.const 65536))"#),
        Row::new("modules/no_allocator", "Without an allocator a module is not loaded.")
            .plugin(Plugin::new("own").text(format!("(module {MODULE})")))
            .steps([])
            .alone(),
        Row::new("modules/no_abi_version", "Nor without the version of its ABI.")
            .plugin(Plugin::new("own").text(format!("(module (memory (export \"memory\") 1) {ALLOCATE})")))
            .steps([])
            .alone(),
        Row::new("modules/no_memory", "A module that exports no memory.")
            .plugin(Plugin::new("own").text(format!("(module (func (export \"proxy_abi_version_0_2_1\")) {ALLOCATE})")))
            .steps([])
            .alone()
            .deviates("a module without memory"),
        Row::new("modules/unknown_import", "Nor if it imports what the host does not have.")
            .plugin(Plugin::new("own").text(format!("(module (import \"env\" \"nothing\" (func)) {MODULE} {ALLOCATE})")))
            .steps([])
            .alone(),
        Row::new("modules/env_abort", "Such is `abort`, which AssemblyScript's compiler imports unless it is given another.")
            .plugin(Plugin::new("own").text(format!(
                "(module (import \"env\" \"abort\" (func (param i32 i32 i32 i32))) {MODULE} {ALLOCATE})"
            )))
            .steps([])
            .alone(),
        started("modules/start_section", "A module's own start section runs before everything.",
            &[("_initialize", "", ""), ("proxy_on_configure", BOOL, "(global.get $ready)")],
            &format!("{ALLOCATE} (global $ready (mut i32) (i32.const 0)) (func $begin (global.set $ready (i32.const 1))) (start $begin)")),
        Row::new("modules/start_section_calls", "A start section that calls the host.")
            .plugin(Plugin::new("own").text(format!(
                r#"(module {MODULE} {ALLOCATE} (data (i32.const 16) "hello")
                   (func $begin (drop (call $log (i32.const 3) (i32.const 16) (i32.const 5)))) (start $begin))"#
            )))
            .steps([])
            .alone(),
        Row::new("modules/imported_memory", "A module that imports its memory gets one from Envoy.")
            .plugin(Plugin::new("own").text(format!(
                r#"(module (import "env" "memory" (memory 1)) (export "memory" (memory 0))
                   (func (export "proxy_abi_version_0_2_1")) {ALLOCATE})"#
            )))
            .steps([])
            .alone()
            .deviates("a module that imports its memory (`env.memory`)"),
        Row::new("modules/resolve_dns", "Envoy has a function beyond the ABI that resolves names.")
            .plugin(Plugin::new("own").text(format!(
                "(module (import \"env\" \"envoy_resolve_dns\" (func (param i32 i32 i32) (result i32))) {MODULE} {ALLOCATE})"
            )))
            .steps([])
            .alone()
            .deviates("`env.envoy_resolve_dns`, `envoy_on_resolve_dns`"),
        Row::new("modules/wrong_signature", "Nor if it exports a callback with another signature.")
            .plugin(Plugin::new("own").text(format!("(module {MODULE} {ALLOCATE} (func (export \"proxy_on_configure\") (param i64) (result i32) (i32.const 1)))")))
            .steps([])
            .alone(),
        Row::new("modules/trap_in_configure", "A trap while it is configured is a refusal.")
            .plugin(Plugin::new("own").configuration("configure: trap"))
            .steps([])
            .alone(),
        Row::new("modules/restricted_in_start", "A start function that calls more than a few harmless functions is a trap.")
            .plugin(Plugin::new("own").text(format!(
                r#"(module (import "env" "proxy_set_tick_period_milliseconds" (func $tick (param i32) (result i32)))
                   {MODULE} {ALLOCATE} (func (export "_initialize") (drop (call $tick (i32.const 100)))))"#
            )))
            .steps([])
            .alone(),
    ]
}
