//! What `portcullis new` makes builds, is tested, and runs on all three hosts, with nothing changed.

use std::path::{Path, PathBuf};

use portcullis_tests::{completeness, places};

use crate::{Author, run, same_versions, target};

/// Makes a filter outside of a checkout, builds it with `build`, and has `passing` say that its native tests pass.
fn check_alone(name: &str, more: &[&str], build: &str, passing: &[&str]) {
    let author = Author::new();
    author.portcullis(author.folder.path(), &[&["new", "filter", name], more].concat());
    let filter = author.at(name);
    same_versions(&filter);
    author.cargo(&filter, &["fmt", "--check"]);
    let said = author.cargo(&filter, &["test"]);
    for test in passing {
        assert!(said.contains(test), "{said}");
    }
    author.cargo(&filter, &[build]);
    let said = author.portcullis(&filter, &["test", "--host", "harness", "--host", "host", "--host", "envoy"]);
    assert!(said.contains("9 passed, 0 failed") && !said.contains("warning"), "{said}");
    let said = author.portcullis(&filter, &["trace", "scenarios/denied.yaml"]);
    assert!(said.contains("proxy_send_local_response"), "{said}");
    let manifest = std::fs::read_to_string(filter.join("Cargo.toml")).expect("a manifest");
    let from_elsewhere = manifest.contains("path =") || manifest.contains("git =");
    assert_eq!(from_elsewhere, !more.is_empty(), "without a kit nothing but crates.io:\n{manifest}");
}

#[test]
fn a_new_filter_on_the_sdk_alone_builds_and_runs_on_every_host() {
    check_alone("plain-guard", &[], "wasm", &["3 passed"]);
}

#[test]
fn a_new_filter_on_the_kit_builds_and_runs_on_every_host() {
    let checkout = places::workspace().display().to_string();
    let passing = ["test the_schema_for_editors_is_up_to_date ... ok", "2 passed"];
    check_alone("kit-guard", &["--kit", &checkout], "wasm-dev", &passing);
}

/// A copy of what cargo needs of the workspace.
fn checkout(author: &Author) -> PathBuf {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).expect("a folder");
        for entry in std::fs::read_dir(from).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_owned();
            if path.is_dir() && name != "target" {
                copy(&path, &to.join(name));
            } else if path.is_file() {
                std::fs::copy(&path, to.join(name)).expect("a file");
            }
        }
    }
    let copied = author.at("checkout");
    for folder in ["filters", "host", "tests", "benches", "xtask", "envoy"] {
        copy(&places::workspace().join(folder), &copied.join(folder));
    }
    for file in ["Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "rustfmt.toml"] {
        std::fs::copy(places::workspace().join(file), copied.join(file)).expect("a file");
    }
    copied
}

#[test]
fn a_new_filter_in_the_workspace_lacks_nothing() {
    let author = Author::new();
    let checkout = checkout(&author);
    author.portcullis(&checkout, &["new", "filter", "tenant-guard", "--path", "filters/tenant-guard"]);
    let filter = checkout.join("filters/tenant-guard");
    assert_eq!(completeness::filters(&checkout).len(), completeness::filters(&places::workspace()).len() + 1);
    // Other members only have to be there.
    for file in ["filters/tenant-guard/src/lib.rs", "tests/fuzz/src/targets/mod.rs"] {
        run(&mut author.command("rustfmt", &checkout, &["--check", "--edition", "2024", file]));
    }
    let said = author.cargo(&filter, &["test"]);
    assert!(said.contains("test the_schema_for_editors_is_up_to_date ... ok"), "{said}");
    author.cargo(&filter, &["build", "--lib", "--profile", "wasm", "--target", "wasm32-wasip1"]);
    let built = target().join("wasm32-wasip1/wasm/portcullis_tenant_guard.wasm");
    let module = |name: &str| if name == "tenant-guard" { Ok(built.clone()) } else { places::filter(name) };
    for lacks in [
        completeness::readmes(&checkout),
        completeness::configurations(&checkout),
        completeness::scenarios(&checkout),
        completeness::fuzz_targets(&checkout),
        completeness::policies_for_envoy(&checkout),
        completeness::imports(&checkout, module),
    ] {
        assert!(lacks.is_empty(), "{lacks:#?}");
    }
    let built = built.display().to_string();
    let hosts = ["test", "--filter", &built, "--host", "harness", "--host", "host", "--host", "envoy"];
    let said = author.portcullis(&filter, &hosts);
    assert!(said.contains("9 passed, 0 failed"), "{said}");
    // What it made for Envoy is what `envoy-config` would make.
    let policy = author.at("etc");
    std::fs::create_dir_all(policy.join("filters")).expect("a folder");
    std::fs::copy(&built, policy.join("filters/tenant-guard.wasm")).expect("a file");
    for file in ["portcullis.yaml", "tenant-guard.json"] {
        std::fs::copy(checkout.join("envoy/tenant-guard").join(file), policy.join(file)).expect("a file");
    }
    let rendered = author.portcullis(&policy, &["envoy-config", "--http-filters"]);
    let rendered = rendered.replace(&policy.display().to_string(), "/etc/portcullis");
    let made = std::fs::read_to_string(checkout.join("envoy/tenant-guard/http-filters.yaml")).expect("a file");
    assert_eq!(rendered, made);
    // A second one has its place too, and none takes another's.
    author.portcullis(&checkout, &["new", "filter", "second-guard", "--path", "filters/second-guard"]);
    author.cargo(&checkout, &["metadata", "--no-deps", "--format-version", "1"]);
    let mut http = author.command(&author.portcullis, &checkout, &["new", "filter", "http", "--path", "filters/http"]);
    let refused = http.output().expect("to run");
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("`http` is taken"), "{refused:?}");
    assert!(!checkout.join("filters/http").exists());
}
