//! The guest: an interpreter of a few lines, with every function of the ABI to call.

use std::fmt::Write as _;
use std::sync::OnceLock;

use portcullis_abi::{Engine, EngineOptions, Module, ModuleLimits, Ticker};

use super::program::FUNCTIONS;

/// Bytes at the beginning of the guest's memory that the program brings along.
pub(super) const DATA_BYTES: usize = 4096;
/// Where a guest lets the host write what it returns.
pub(super) const SCRATCH: u32 = 6000;

/// The guest, compiled once.
pub(super) fn module() -> Module {
    static MODULE: OnceLock<(Module, Ticker)> = OnceLock::new();
    let (module, _) = MODULE.get_or_init(|| {
        let engine = Engine::new(&EngineOptions::default()).expect("an engine");
        let ticker = engine.start_ticker();
        let wasm = wat::parse_str(text()).unwrap_or_else(|error| panic!("{error}"));
        (Module::from_bytes(&engine, &wasm, &ModuleLimits::default()).expect("a plugin"), ticker)
    });
    module.clone()
}

fn text() -> String {
    let (mut imports, mut calls) = (String::new(), String::new());
    for (number, function) in FUNCTIONS.iter().enumerate() {
        let mut params = String::new();
        let mut arguments = String::new();
        for kind in function.arguments {
            let wide = kind.is_wide();
            params.push_str(if wide { " i64" } else { " i32" });
            arguments.push_str(if wide { " (call $argument)" } else { " (i32.wrap_i64 (call $argument))" });
        }
        let module = if function.name.starts_with("proxy_") { "env" } else { "wasi_snapshot_preview1" };
        let _ = writeln!(
            imports,
            r#"(import "{module}" "{}" (func $h{number} (param{params}) (result i32)))"#,
            function.name
        );
        let _ = writeln!(calls, "(func $c{number} (drop (call $h{number}{arguments})))");
    }
    let count = FUNCTIONS.len();
    let elements: String = (0..count).map(|number| format!(" $c{number}")).collect();
    // Each callback: so many calls, each a number and its arguments, then the answer.
    let callbacks: String = [
        ("proxy_on_vm_start", 2, None),
        ("proxy_on_tick", 1, None),
        ("proxy_on_queue_ready", 2, None),
        ("proxy_on_context_create", 2, None),
        ("proxy_on_request_headers", 3, Some("step")),
        ("proxy_on_request_body", 3, Some("step")),
        ("proxy_on_request_trailers", 2, Some("step")),
        ("proxy_on_response_headers", 3, Some("step")),
        ("proxy_on_response_body", 3, Some("step")),
        ("proxy_on_response_trailers", 2, Some("step")),
        ("proxy_on_new_connection", 1, Some("step")),
        ("proxy_on_downstream_data", 3, Some("step")),
        ("proxy_on_upstream_data", 3, Some("step")),
        ("proxy_on_downstream_connection_close", 2, None),
        ("proxy_on_upstream_connection_close", 2, None),
        ("proxy_on_http_call_response", 5, None),
        ("proxy_on_grpc_receive_initial_metadata", 3, None),
        ("proxy_on_grpc_receive", 3, None),
        ("proxy_on_grpc_receive_trailing_metadata", 3, None),
        ("proxy_on_grpc_close", 3, None),
        ("proxy_on_done", 1, Some("step")),
        ("proxy_on_log", 1, None),
        ("proxy_on_delete", 1, None),
    ]
    .iter()
    .map(|(name, params, answer)| {
        let params = "i32 ".repeat(*params);
        match (answer, *name) {
            (Some(_), _) => format!(r#"(func (export "{name}") (param {params}) (result i32) (call $step))"#),
            (None, "proxy_on_vm_start") => {
                format!(r#"(func (export "{name}") (param {params}) (result i32) (i32.const 1))"#)
            }
            (None, _) => format!(r#"(func (export "{name}") (param {params}) (drop (call $step)))"#),
        }
    })
    .collect();
    format!(
        r#"(module
          {imports}
          (import "env" "proxy_get_buffer_bytes" (func $configuration (param i32 i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 8)
          (table funcref (elem{elements}))
          (type $call (func))
          (global $at (mut i32) (i32.const 0))
          (global $end (mut i32) (i32.const 0))
          (global $heap (mut i32) (i32.const 65536))
          (func (export "proxy_abi_version_0_2_1"))
          (func (export "proxy_on_memory_allocate") (param $size i32) (result i32) (local $found i32)
            (if (i32.gt_u (i32.add (global.get $heap) (local.get $size)) (i32.const 524288))
              (then (global.set $heap (i32.const 131072))))
            (local.set $found (global.get $heap))
            (global.set $heap (i32.add (global.get $heap) (local.get $size)))
            (local.get $found))
          (func $byte (result i32)
            (if (i32.ge_u (global.get $at) (global.get $end)) (then (return (i32.const 0))))
            (global.set $at (i32.add (global.get $at) (i32.const 1)))
            (i32.load8_u (i32.sub (global.get $at) (i32.const 1))))
          (func $argument (result i64)
            (if (i32.gt_u (i32.add (global.get $at) (i32.const 8)) (global.get $end)) (then (return (i64.const 0))))
            (global.set $at (i32.add (global.get $at) (i32.const 8)))
            (i64.load align=1 (i32.sub (global.get $at) (i32.const 8))))
          (func $step (result i32) (local $left i32)
            (local.set $left (call $byte))
            (block (loop
              (br_if 1 (i32.eqz (local.get $left)))
              (call_indirect (type $call) (i32.rem_u (call $byte) (i32.const {count})))
              (local.set $left (i32.sub (local.get $left) (i32.const 1)))
              (br 0)))
            (call $byte))
          {calls}
          (func (export "proxy_on_configure") (param i32 i32) (result i32)
            (if (call $configuration (i32.const 7) (i32.const 0) (i32.const -1) (i32.const {SCRATCH}) (i32.const {}))
              (then (return (i32.const 0))))
            (global.set $at (i32.load (i32.const {SCRATCH})))
            (global.set $end (i32.add (global.get $at) (i32.load (i32.const {}))))
            (memory.copy (i32.const 0) (global.get $at) (i32.const {DATA_BYTES}))
            (global.set $at (i32.add (global.get $at) (i32.const {DATA_BYTES})))
            (drop (call $step))
            (i32.const 1))
          {callbacks})"#,
        SCRATCH + 4,
        SCRATCH + 4,
    )
}
