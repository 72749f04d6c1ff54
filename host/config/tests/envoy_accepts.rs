//! Every rendering is configuration that the real Envoy takes, and the committed ones in `envoy/` are fresh.

mod support;

use std::io;
use std::path::{Path, PathBuf};

use portcullis_config::envoy::{Options, Rendering, render_bootstrap, render_http_filters};
use portcullis_config::{Files, Policy, compile};

#[test]
fn envoy_accepts_every_setting() {
    let folder = support::folder();
    let policy = support::policy_in(folder.path(), include_str!("policies/everything.yaml"));
    let rendering = render_bootstrap(&policy, &support::options(folder.path()));
    support::validate(folder.path(), &rendering).unwrap_or_else(|said| panic!("{said}"));
}

#[test]
fn what_envoy_cannot_enforce_is_said() {
    let folder = support::folder();
    let policy = support::policy_in(folder.path(), include_str!("policies/everything.yaml"));
    let rendering = render_bootstrap(&policy, &support::options(folder.path()));
    for words in [
        "start Envoy with `--concurrency 3`",
        "start Envoy with `--log-level warn`",
        "filter `first`: no CPU limit, so `limits.callback_time` (50ms) is not enforced",
        "filter `first`: memory is capped at 1GiB per VM, not at `limits.memory` (32MiB)",
        "no limits on callouts (8), log lines (10/s), shared data (1000 keys, 1MiB), queues (10) and metrics (100)",
        "header maps are limited to 1MiB and 1024 pairs, not to 512KiB and 500",
        "filter `first`: it can call every cluster; `allowed_upstreams` (keys) is not enforced",
        "filter `first`: it can write every field; `settable_fields` is not enforced",
        "filter `first`: it can store every property; `settable_properties` is not enforced",
        "filter `first`: it can call every foreign function; `foreign_functions` is not enforced",
        "filter `third`: after a crash, requests pass WITHOUT it (`failure_policy: fail_open`)",
        "`limits.buffered_bytes` differs between filters; Envoy has one buffer limit, the largest: 2MiB",
        "filter `db-guard`: after a crash, TCP connections pass WITHOUT it (`failure_policy: fail_open`)",
        "listener `db`: `limits.idle_timeout` counts from when the upstream is connected",
        "listener `mail`: a filter that resumes a connection also resumes what the filters before it hold",
        "listener `mail`: `limits.buffered_bytes` differs between its filters; Envoy has one buffer limit, the largest: 1MiB",
        "upstream `postgres`: Envoy counts `max_connections` over all workers, and lets 1024 TCP connections wait",
        "upstream `keys`: the system's certificate authorities are read from",
        "upstream `orders`: Envoy counts `max_connections` over all workers",
        "start `portcullis operators run`",
        "the admin address serves Envoy's own endpoints",
    ] {
        assert!(
            rendering.notes.iter().any(|note| note.contains(words)),
            "no note says: {words}\n{:#?}",
            rendering.notes
        );
    }
    for note in &rendering.notes {
        assert!(rendering.yaml.contains(&format!("# - {note}\n")), "not among the comments: {note}");
    }
}

#[test]
fn tcp_listeners_and_their_filters_are_apart_from_http() {
    let folder = support::folder();
    let policy = support::policy_in(folder.path(), include_str!("policies/everything.yaml"));
    let yaml = render_bootstrap(&policy, &support::options(folder.path())).yaml;
    let (http, tcp) = yaml.split_once("    - name: db\n").expect("listeners in order");
    assert!(!http.contains("network.wasm") && !http.contains("db-guard\n"), "{http}");
    let (tcp, clusters) = tcp.split_once("  clusters:\n").expect("clusters behind the listeners");
    assert!(!tcp.contains("filters.http") && !tcp.contains("alpn"), "{tcp}");
    let (db, mail) = tcp.split_once("    - name: mail\n").expect("two listeners");
    assert!(db.contains("name: db-guard") && !db.contains("name: counter"), "{db}");
    assert!(mail.contains("name: db-guard") && mail.contains("name: counter"), "all by default: {mail}");
    assert!(db.contains("idle_timeout: \"1800s\"") && mail.contains("idle_timeout: \"3600s\""), "{tcp}");
    let (_, postgres) = clusters.split_once("name: postgres\n").expect("its cluster");
    let (postgres, _) = postgres.split_once("    - name:").expect("another cluster behind it");
    assert!(postgres.contains("per_connection_buffer_limit_bytes: 131072"), "{postgres}");
    assert!(!postgres.contains("alpn") && !postgres.contains("http"), "{postgres}");
    assert!(!render_http_filters(&policy).yaml.contains("db-guard"));
}

#[test]
fn a_name_in_a_policy_cannot_leave_the_comment_at_the_top() {
    let folder = support::folder();
    let policy = support::policy_in(folder.path(), include_str!("policies/routes.yaml"));
    let policy = Policy { name: "a\nadmin: {}\u{2028}b".to_owned(), ..policy };
    let rendering = render_bootstrap(&policy, &support::options(folder.path()));
    assert!(rendering.yaml.starts_with("# Envoy bootstrap for a admin: {} b. "), "{}", rendering.yaml);
}

/// Reads an example as if it stood in `/etc/portcullis`: what the example does not have comes from the folder of
/// test files.
struct Deployed {
    example: PathBuf,
    files: PathBuf,
}

const HOME: &str = "/etc/portcullis";

impl Files for Deployed {
    fn resolve(&self, written: &str) -> PathBuf {
        Path::new(HOME).join(written.trim_start_matches("../jwt-auth/"))
    }

    fn read(&self, path: &Path, _: u64) -> io::Result<Vec<u8>> {
        let name = path.strip_prefix(HOME).map_err(io::Error::other)?;
        let places = [self.example.join(name), self.example.join("../jwt-auth").join(name), self.files.join(name)];
        std::fs::read(places.into_iter().find(|place| place.exists()).ok_or(io::ErrorKind::NotFound)?)
    }
}

/// The names of the folders in one of the workspace's.
fn folders(of: &str) -> Vec<String> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(of);
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let folders = entries.filter(|path| path.is_dir()).filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let mut folders: Vec<String> = folders.collect();
    folders.sort();
    folders
}

fn check_example(name: &str) {
    let folder = support::folder();
    for filter in folders("filters") {
        let module = folder.path().join("filters").join(filter).with_extension("wasm");
        std::fs::copy(folder.path().join("pass.wasm"), module).expect("a module");
    }
    let example = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../envoy").join(name);
    let files = Deployed { example: example.clone(), files: folder.path().to_owned() };
    let text = std::fs::read_to_string(example.join("portcullis.yaml")).expect("the policy");
    let mut policy = compile("portcullis.yaml", &text, &files).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    // The example must not depend on the machine that renders it.
    policy.workers = 2;
    let bootstrap = render_bootstrap(&policy, &Options::default());
    let filters = render_http_filters(&policy);
    for (file, rendering) in [("envoy.yaml", &bootstrap), ("http-filters.yaml", &filters)] {
        let path = example.join(file);
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &rendering.yaml).expect("the file can be written");
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == rendering.yaml,
            "envoy/{name}/{file} is stale; renew it with `UPDATE=1 cargo test -p portcullis-config --test envoy_accepts`"
        );
    }
    let here = |rendering: &Rendering| Rendering {
        yaml: rendering.yaml.replace(HOME, &folder.path().display().to_string()),
        notes: Vec::new(),
    };
    support::validate(folder.path(), &here(&bootstrap)).unwrap_or_else(|said| panic!("{said}"));
}

#[test]
fn every_example_is_fresh_and_accepted() {
    let examples = folders("envoy");
    assert!(examples.len() >= 2, "{examples:?}");
    for example in examples {
        check_example(&example);
    }
}
