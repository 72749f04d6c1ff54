//! What a plugin may do at all: functions, callbacks, and what calls may be about.

use portcullis_abi::{Ending, NamePattern, Plugin};

use crate::support::{Host, module, plugin, request};

/// A guest that says each call's status, as a digit or, from 10 on, as a letter.
fn calls(data: &str, calls: &[&str]) -> Plugin {
    let said: String = calls.iter().map(|call| format!("(call $status {call})\n")).collect();
    plugin(&format!(
        r#"{data}
        (func $status (param i32)
          (call $say (i32.add (local.get 0) (if (result i32) (i32.lt_u (local.get 0) (i32.const 10))
            (then (i32.const 48)) (else (i32.const 87))))))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) {said} (i32.const 0))"#
    ))
}

/// What a request came to: what the guest said, what passed it, and what the host logged of blocked calls.
fn run(plugin: Plugin) -> (String, Vec<String>, Vec<String>) {
    let mut host = Host::new(vec![plugin]);
    let seen = host.get();
    let said = host.world.said();
    let log = host.world.log.borrow();
    (said, seen, log.iter().filter(|line| line.starts_with("blocked")).cloned().collect())
}

fn names(names: &[&str]) -> Option<std::collections::BTreeSet<String>> {
    Some(names.iter().map(|name| (*name).to_owned()).collect())
}

fn patterns(names: &[&str]) -> Option<Vec<NamePattern>> {
    let pattern = |name: &&str| match name.strip_suffix('*') {
        Some(prefix) => NamePattern::Prefix(prefix.into()),
        None => NamePattern::Exact((*name).into()),
    };
    Some(names.iter().map(pattern).collect())
}

const GET: &str = "(call $get (i32.const 0) (i32.const 16) (i32.const 3) (i32.const 200) (i32.const 204))";

#[test]
fn a_blocked_host_function_fails_and_is_logged() {
    let mut blocked = calls(r#"(data (i32.const 16) "x-a")"#, &[GET]);
    assert_eq!(run(blocked.clone()).0, "0");
    blocked.capabilities.functions = names(&["proxy_log"]);
    let (said, seen, log) = run(blocked);
    assert_eq!((said.as_str(), seen), ("a", vec!["> [].".to_owned()]), "10 is InternalFailure");
    assert_eq!(log, ["blocked a call of `proxy_get_header_map_value`, which `capabilities` does not list"]);
}

#[test]
fn blocked_calls_do_not_flood_the_log() {
    let mut blocked = calls("", &[GET; 20]);
    blocked.capabilities.functions = names(&["proxy_log"]);
    blocked.limits.log_lines_per_second = 5;
    let (said, _, log) = run(blocked);
    assert_eq!(said.len() + log.len(), 5, "{log:?}");
}

#[test]
fn a_blocked_wasi_function_is_not_capable() {
    let code = r#"(module
        (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
        (memory (export "memory") 1)
        (func (export "malloc") (param i32) (result i32) (i32.const 4096))
        (func (export "proxy_abi_version_0_2_1"))
        (func $say (param i32) (i32.store8 (i32.const 16) (local.get 0)) (drop (call $log (i32.const 2) (i32.const 16) (i32.const 1))))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (call $say (call $random (i32.const 32) (i32.const 4)))
          (call $say (call $close (i32.const 3)))
          (call $exit (i32.const 1))
          (i32.const 0)))"#;
    let mut guest = Plugin::new("probe", module(code).unwrap());
    guest.capabilities.functions = names(&["proxy_log"]);
    let (said, _, log) = run(guest);
    assert_eq!(said, "LL", "76 each");
    assert_eq!(log.len(), 3, "{log:?}");
}

#[test]
fn a_blocked_callback_is_not_called() {
    let mut guest = calls("", &["(i32.const 1)"]);
    guest.capabilities.callbacks = names(&["proxy_on_context_create"]);
    assert_eq!(run(guest), (String::new(), vec!["> [].".to_owned()], Vec::new()));
}

/// `x-a` is there; `x-b`, `host` and a map with `x-a: 2` are not.
const NAMES: &str = r#"(data (i32.const 16) "x-ax-bhost")
    (data (i32.const 32) "\05\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\04\00\00\00\0a\00\00\00\0b\00\00\00\07\00\00\00\04\00\00\00\03\00\00\00\01\00\00\00:method\00GET\00:path\00/a?b\00:authority\00api.example\00:scheme\00http\00x-a\002\00")"#;

fn change(function: &str, at: u32, len: u32) -> String {
    format!("(call ${function} (i32.const 0) (i32.const {at}) (i32.const {len}) (i32.const 16) (i32.const 1))")
}

#[test]
fn a_plugin_changes_only_fields_that_it_may() {
    let set_pairs = "(call $set_pairs (i32.const 0) (i32.const 32) (i32.const 109))";
    let remove = "(call $remove (i32.const 0) (i32.const 16) (i32.const 3))";
    let each = [
        change("add", 16, 3),
        change("replace", 16, 3),
        remove.to_owned(),
        set_pairs.to_owned(),
        change("add", 19, 3),
        change("replace", 22, 4),
    ];
    let each: Vec<&str> = each.iter().map(String::as_str).collect();
    let mut guest = calls(NAMES, &each);
    guest.capabilities.fields = patterns(&["X-A"]);
    let (said, seen, log) = run(guest.clone());
    assert_eq!(said, "0000aa", "{log:?}");
    assert_eq!(seen, ["> [x-a=2]."]);
    assert_eq!(
        log,
        [
            "blocked `proxy_add_header_map_value` of `x-b`, which `settable_fields` does not list",
            "blocked `proxy_replace_header_map_value` of `host`, which `settable_fields` does not list",
        ]
    );
    guest.capabilities.fields = patterns(&["x-b", ":authority"]);
    let (said, seen, _) = run(guest);
    assert_eq!(said, "aaaa00", "a map as a whole counts by what it would change");
    assert_eq!(seen, ["> [:authority=x x-b=x]."]);
}

#[test]
fn a_local_response_goes_without_fields_that_the_plugin_may_not_set() {
    let data =
        r#"(data (i32.const 32) "\02\00\00\00\03\00\00\00\01\00\00\00\03\00\00\00\01\00\00\00x-a\001\00x-b\002\00")"#;
    let respond = "(call $respond (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
        (i32.const 32) (i32.const 32) (i32.const -1))";
    let mut guest = calls(data, &[respond]);
    guest.capabilities.fields = patterns(&["x-b"]);
    let (said, seen, log) = run(guest);
    assert_eq!((said.as_str(), seen), ("0", vec!["< [:status=403 x-b=2]. ()".to_owned()]), "{log:?}");
    assert_eq!(log, ["blocked `proxy_send_local_response` of `x-a`, which `settable_fields` does not list"]);
}

/// `set_property` of `mine.a` and `other`, and their foreign sisters.
const PROPERTIES: &str = r#"(data (i32.const 16) "mine.aother") (data (i32.const 32) "declare_property")
    (data (i32.const 48) "set_envoy_filter_state") (data (i32.const 80) "\0a\05other") (data (i32.const 96) "\0a\0cenvoy.string\12\01x")"#;

fn property_calls() -> [String; 4] {
    let set = |at: u32, len: u32| {
        format!("(call $set_property (i32.const {at}) (i32.const {len}) (i32.const 16) (i32.const 1))")
    };
    let foreign = |name: (u32, u32), argument: (u32, u32)| {
        format!(
            "(call $foreign (i32.const {}) (i32.const {}) (i32.const {}) (i32.const {}) (i32.const 0) (i32.const 0))",
            name.0, name.1, argument.0, argument.1
        )
    };
    [set(16, 6), set(22, 5), foreign((32, 16), (80, 7)), foreign((48, 22), (96, 17))]
}

#[test]
fn a_plugin_stores_only_properties_that_it_may() {
    let each = property_calls();
    let each: Vec<&str> = each.iter().map(String::as_str).collect();
    let mut guest = calls(PROPERTIES, &each);
    assert_eq!(run(guest.clone()).0, "0000");
    guest.capabilities.properties = patterns(&["mine.*"]);
    let (said, _, log) = run(guest);
    assert_eq!(said, "0aaa");
    assert_eq!(log[0], "blocked `proxy_set_property` of `other`, which `settable_properties` does not list");
    assert_eq!(log.len(), 3);
}

#[test]
fn a_plugin_calls_only_foreign_functions_that_it_may() {
    let each = property_calls();
    let each: Vec<&str> = each.iter().map(String::as_str).collect();
    let mut guest = calls(PROPERTIES, &each);
    guest.capabilities.foreign_functions = names(&["declare_property"]);
    let (said, _, log) = run(guest);
    assert_eq!(said, "000a");
    assert_eq!(
        log,
        ["blocked `proxy_call_foreign_function` of `set_envoy_filter_state`, which `foreign_functions` does not list"]
    );
}

#[test]
fn each_plugin_of_a_vm_has_its_own_capabilities() {
    let guest = calls(r#"(data (i32.const 16) "x-a")"#, &[GET]);
    let mut restricted = Plugin { name: "restricted".into(), ..guest.clone() };
    restricted.capabilities.functions = names(&["proxy_log"]);
    let mut host = Host::new(vec![guest, restricted]);
    for (filter, expected) in [(0, "0"), (1, "0a"), (0, "0a0")] {
        let id = host.open(&[filter]);
        host.worker.request_headers(id, request(), true);
        host.worker.finish(id, Ending::default());
        assert_eq!(host.world.said(), expected);
    }
}
