//! Modules that compile for ever, or take all memory on the way: some kilobytes are enough.

use std::path::Path;
use std::process::Command;

use portcullis_tests::places;
use portcullis_tests::process::{Ended, Process};

use crate::support::{Settings, Site};

/// Loops in loops, each of which all variables live through: work and memory of the compiler grow with the product.
fn bomb(loops: usize, variables: usize) -> Vec<u8> {
    let mut wat = String::from(
        r#"(module (memory (export "memory") 1)
             (func (export "malloc") (param i32) (result i32) (i32.const 8))
             (func (export "proxy_abi_version_0_2_1"))
             (func (local "#,
    );
    wat.push_str(&"i32 ".repeat(variables));
    wat.push_str(")\n");
    wat.push_str(&"loop\n".repeat(loops));
    for variable in 0..variables {
        wat.push_str(&format!("local.get {variable} i32.const 1 i32.add local.set {variable}\n"));
    }
    wat.push_str(&"local.get 0 br_if 0 end\n".repeat(loops));
    wat.push_str("))");
    wat::parse_str(&wat).expect("WAT")
}

fn check(policy: &Path) -> Ended {
    let mut command = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
    command.args(["check", "--no-cache"]).arg(policy);
    Process::run("portcullis check", &mut command).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_module_that_compiles_for_ever_is_refused_in_time() {
    let wasm = bomb(1_000, 1_000);
    assert!(wasm.len() < 20_000);
    let site = Site::new(&wasm, Settings { filter: "    limits: { compile_time: 500ms }\n", ..Settings::default() });
    let ended = check(&site.policy());
    assert_eq!(ended.status.code(), Some(2), "{}", ended.output);
    assert!(
        ended.output.contains("compiling took longer than 500ms\n  hint: make the module smaller"),
        "{}",
        ended.output
    );
}

#[test]
fn a_module_whose_compilation_takes_all_memory_is_refused() {
    let site = Site::new(
        &bomb(3_000, 3_000),
        Settings { filter: "    limits: { compile_memory: 64MiB }\n", ..Settings::default() },
    );
    let ended = check(&site.policy());
    assert_eq!(ended.status.code(), Some(2), "{}", ended.output);
    assert!(
        ended.output.contains("compiling took more than 64 MiB of memory\n  hint: make the module smaller"),
        "{}",
        ended.output
    );
}

#[test]
fn requests_are_served_while_a_reload_compiles_and_after_it_failed() {
    let harmless = wat::parse_str(
        r#"(module (memory (export "memory") 1) (func (export "malloc") (param i32) (result i32) (i32.const 8))
             (func (export "proxy_abi_version_0_2_1")))"#,
    )
    .expect("WAT");
    let mut gate = Site::new(&harmless, Settings::default()).serve();
    gate.site
        .write(&bomb(1_000, 1_000), Settings { filter: "    limits: { compile_time: 1s }\n", ..Settings::default() });
    gate.server.signal("HUP");
    let mut served = 0;
    gate.wait_until("a failed reload", |gate| {
        assert_eq!((gate.status("/guarded"), gate.status("/plain")), (Some(200), Some(200)));
        served += 2;
        gate.server.log().contains("reload: the running policy stays in force")
    });
    assert!(served > 2, "requests were served meanwhile");
    assert!(gate.server.log().contains("compiling took longer than 1s"), "{}", gate.server.log());
    gate.serves_others();
    assert_eq!(gate.status("/guarded"), Some(200), "the old guest is still there");
}

#[test]
fn the_compiler_is_no_program_for_people() {
    let mut command = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
    let ended = Process::run("the compiler", command.arg("__compile")).unwrap_or_else(|error| panic!("{error}"));
    assert!(!ended.status.success());
    assert!(ended.output.starts_with("this is a part of the host that compiles filters: "), "{}", ended.output);
}
