//! Modules built for older versions of the ABI, and modules that are made in odd ways: what Envoy 1.40 takes, this host takes.

use portcullis_abi::{AbiVersion, Ending, Plugin};

use crate::support::{Host, module, request};

/// A module for a version, with imports and code.
fn text(version: &str, imports: &str, code: &str) -> String {
    let version = version.replace('.', "_");
    format!(
        r#"(module {imports} (memory (export "memory") 1)
          (func (export "malloc") (param i32) (result i32) (i32.const 4096))
          (func (export "proxy_abi_version_{version}")) {code})"#
    )
}

const LOG: &str = r#"(import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))"#;
const SAY: &str = r#"
  (func $say (param i32)
    (i32.store8 (i32.const 16) (local.get 0)) (drop (call $log (i32.const 2) (i32.const 16) (i32.const 1))))"#;

fn refusal(wat: &str) -> String {
    module(wat).expect_err(wat).to_string()
}

#[test]
fn a_function_is_there_for_the_versions_that_have_it() {
    let functions = [
        ("proxy_get_configuration", "(param i32 i32)", &["0.1.0"][..]),
        ("proxy_continue_request", "", &["0.1.0"]),
        ("proxy_continue_response", "", &["0.1.0"]),
        ("proxy_clear_route_cache", "", &["0.1.0"]),
        ("proxy_continue_stream", "(param i32)", &["0.2.0", "0.2.1"]),
        ("proxy_close_stream", "(param i32)", &["0.2.0", "0.2.1"]),
        ("proxy_get_log_level", "(param i32)", &["0.2.1"]),
        ("proxy_get_buffer_status", "(param i32 i32 i32)", &["0.1.0", "0.2.0", "0.2.1"]),
        ("proxy_call_foreign_function", "(param i32 i32 i32 i32 i32 i32)", &["0.1.0", "0.2.0", "0.2.1"]),
    ];
    for (function, params, versions) in functions {
        for version in ["0.1.0", "0.2.0", "0.2.1"] {
            let import = format!(r#"(import "env" "{function}" (func {params} (result i32)))"#);
            let wat = text(version, &import, "");
            if versions.contains(&version) {
                assert!(module(&wat).is_ok(), "{version} {function}");
            } else {
                let error = refusal(&wat);
                let expected = format!(
                    "the module says that it was built for ABI {version}, and imports `{function}`, which only {} has",
                    versions.join(" and ")
                );
                assert!(error.starts_with(&expected), "{error}");
            }
        }
    }
}

#[test]
fn the_first_version_that_a_module_says_counts() {
    let both = |first: &str, second: &str| {
        module(&text(first, "", &format!(r#"(func (export "proxy_abi_version_{}"))"#, second.replace('.', "_"))))
    };
    assert_eq!(both("0.1.0", "0.2.1").unwrap().abi(), AbiVersion::V0_1_0);
    assert_eq!(both("0.2.1", "0.1.0").unwrap().abi(), AbiVersion::V0_2_1);
    let global = text("9.9.9", "", r#"(global (export "proxy_abi_version_0_2_1") i32 (i32.const 0))"#);
    assert!(refusal(&global).contains("no Proxy-Wasm plugin"), "a version is said by a function");
}

#[test]
fn header_callbacks_have_the_versions_parameters() {
    for version in ["0.1.0", "0.2.0", "0.2.1"] {
        for (params, right) in [("i32 i32", version == "0.1.0"), ("i32 i32 i32", version != "0.1.0")] {
            for callback in ["proxy_on_request_headers", "proxy_on_response_headers"] {
                let code = format!(r#"(func (export "{callback}") (param {params}) (result i32) (i32.const 0))"#);
                let made = module(&text(version, "", &code));
                assert_eq!(made.is_ok(), right, "{version} {callback} {params}: {made:?}");
            }
        }
    }
}

/// Built for 0.1.0: reads its configurations and a field, and resumes what it has stopped.
const V0_1_0: &str = r#"
  (data (i32.const 32) "x-none")
  (func $configuration
    (call $say (i32.add (i32.const 48) (call $get_configuration (i32.const 200) (i32.const 204))))
    (drop (call $log (i32.const 2) (i32.load (i32.const 200)) (i32.load (i32.const 204)))))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (call $configuration) (i32.const 1))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (call $configuration) (drop (call $tick (i32.const 1000))) (i32.const 1))
  (func (export "proxy_on_tick") (param i32) (call $configuration))
  (func (export "proxy_on_request_headers") (param i32 i32) (result i32)
    (i32.store (i32.const 200) (i32.const -1))
    (call $say (i32.add (i32.const 48)
      (call $get (i32.const 0) (i32.const 32) (i32.const 6) (i32.const 200) (i32.const 204))))
    (call $say (i32.add (i32.const 48) (i32.load (i32.const 200))))
    (drop (call $continue_request))
    (drop (call $clear_route_cache))
    (i32.const 1))
  (func (export "proxy_on_response_headers") (param i32 i32) (result i32)
    (drop (call $continue_response))
    (i32.const 1))"#;

#[test]
fn a_module_built_for_0_1_0_runs() {
    let imports = format!(
        r#"{LOG}
        (import "env" "proxy_get_configuration" (func $get_configuration (param i32 i32) (result i32)))
        (import "env" "proxy_get_header_map_value" (func $get (param i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_set_tick_period_milliseconds" (func $tick (param i32) (result i32)))
        (import "env" "proxy_continue_request" (func $continue_request (result i32)))
        (import "env" "proxy_continue_response" (func $continue_response (result i32)))
        (import "env" "proxy_clear_route_cache" (func $clear_route_cache (result i32)))"#
    );
    let mut plugin = Plugin::new("probe", module(&text("0.1.0", &imports, &format!("{SAY}{V0_1_0}"))).unwrap());
    plugin.configuration = b"plugin".to_vec();
    plugin.vm_configuration = b"vm".to_vec();
    let mut host = Host::new(vec![plugin]);
    assert_eq!(host.world.log.take(), ["0", "vm", "0", "plugin"]);
    host.advance(std::time::Duration::from_secs(1));
    host.worker.run_timers();
    assert_eq!(host.world.log.take(), ["0", "vm"], "outside `proxy_on_configure` it is the VM's");
    let id = host.open(&[0]);
    host.worker.request_headers(id, request(), true);
    assert_eq!(host.world.log.take(), ["0", "0"], "what is absent is empty");
    assert_eq!(host.seen(), ["> []."]);
    assert!(host.worker.route_cleared(id));
    host.worker.response_headers(id, [(":status", "200")].into_iter().collect(), true);
    assert_eq!(host.seen(), ["< [:status=200]."]);
    host.worker.finish(id, Ending::default());
}

#[test]
fn start_functions_run_in_their_order() {
    let say = |letter: char| format!("(call $say (i32.const {}))", u32::from(letter));
    let initialize = format!(r#"(func (export "_initialize") {})"#, say('i'));
    let main = format!(r#"(func (export "main") (param i32 i32) (result i32) {} (i32.const 7))"#, say('m'));
    let main_void = format!(r#"(func (export "__main_void") (result i32) {} (i32.const 7))"#, say('v'));
    let start = format!(r#"(func (export "_start") {})"#, say('s'));
    let said = |code: &[&str]| {
        let code = format!("{SAY}{}", code.concat());
        let host = Host::new(vec![Plugin::new("probe", module(&text("0.2.1", LOG, &code)).unwrap())]);
        host.world.said()
    };
    assert_eq!(said(&[&main_void, &main, &initialize, &start]), "im");
    assert_eq!(said(&[&main_void, &initialize]), "iv");
    assert_eq!(said(&[&initialize]), "i");
    assert_eq!(said(&[&start, &main]), "s", "`_start` calls `main` itself");
    assert_eq!(said(&[&main]), "", "without `_initialize` nobody calls it");
}

#[test]
fn exports_of_another_type_are_refused() {
    let check = |code: &str, name: &str| {
        let error = refusal(&text("0.2.1", "", code));
        assert!(error.starts_with(&format!("the export `{name}` has type")), "{error}");
    };
    check(r#"(func (export "_start") (param i32))"#, "_start");
    check(r#"(func (export "_initialize")) (func (export "main") (result i32) (i32.const 0))"#, "main");
    check(r#"(func (export "_initialize")) (func (export "__main_void"))"#, "__main_void");
    check(r#"(func (export "proxy_on_tick") (param i32 i32))"#, "proxy_on_tick");
    check(r#"(func (export "proxy_on_foreign_function") (param i32))"#, "proxy_on_foreign_function");
    check(r#"(func (export "proxy_on_request_metadata") (param i32))"#, "proxy_on_request_metadata");
    let main = r#"(func (export "main") (result i32) (i32.const 0))"#;
    assert!(module(&text("0.2.1", "", main)).is_ok(), "the module's own business");
}

#[test]
fn of_two_allocators_malloc_is_used() {
    let code = format!(
        r#"{SAY}
        (func (export "proxy_on_memory_allocate") (param i32) (result i32) (call $say (i32.const 97)) (i32.const 4096))
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
          (drop (call $get (i32.const 7) (i32.const 0) (i32.const 9) (i32.const 200) (i32.const 204))) (i32.const 1))"#
    );
    let imports =
        format!(r#"{LOG}(import "env" "proxy_get_buffer_bytes" (func $get (param i32 i32 i32 i32 i32) (result i32)))"#);
    let mut plugin = Plugin::new("probe", module(&text("0.2.1", &imports, &code)).unwrap());
    plugin.configuration = b"bytes".to_vec();
    assert_eq!(Host::new(vec![plugin]).world.said(), "");
}

#[test]
fn what_cannot_be_imported_is_named_with_a_way_out() {
    let check = |import: &str, named: &str, hint: &str| {
        let error = refusal(&text("0.2.1", import, ""));
        assert!(error.starts_with("the module imports what this host does not have: "), "{error}");
        assert!(error.contains(named) && error.contains(hint), "{error}");
    };
    check(
        r#"(import "env" "abort" (func (param i32 i32 i32 i32)))"#,
        "`env.abort`",
        "AssemblyScript with `--use abort=",
    );
    check(r#"(import "env" "seed" (func (result f64)))"#, "`env.seed`", "AssemblyScript");
    check(
        r#"(import "env" "envoy_resolve_dns" (func (param i32 i32 i32) (result i32)))"#,
        "envoy_resolve_dns",
        "upstream",
    );
    check(r#"(import "__wbindgen_placeholder__" "x" (func))"#, "__wbindgen", "wasm-bindgen");
    check(
        r#"(import "wasi_snapshot_preview1" "proc_raise" (func (param i32) (result i32)))"#,
        "proc_raise",
        "WASI preview 1",
    );
    check(r#"(import "env" "host_secret" (func))"#, "`env.host_secret`", "`env.proxy_*`");
    let error = refusal(
        r#"(module (import "env" "memory" (memory 1)) (func (export "proxy_abi_version_0_2_1"))
        (export "memory" (memory 0)) (func (export "malloc") (param i32) (result i32) (i32.const 0)))"#,
    );
    assert!(error.contains("`env.memory`") && error.contains("--import-memory"), "{error}");
}
