//! What goes wrong before anything is served: the built binary says where, what and how to fix it, exits with a code that
//! is not zero, and leaves nothing behind that listens.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use portcullis_tests::places;
use portcullis_tests::process::{Ended, Process};

/// A folder with a policy, and an address in it that nobody else uses.
struct Site {
    folder: tempfile::TempDir,
    free: SocketAddr,
}

impl Site {
    fn new() -> Site {
        // The port is free again once the listener is gone; the policy names it so that we can look whether anything
        // listens there afterwards.
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
        Site { folder: tempfile::tempdir().expect("a temporary folder"), free }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).expect("a temporary file");
        path
    }

    /// A policy that is right but for what the caller makes of it.
    fn policy(&self, change: impl FnOnce(String) -> String) -> PathBuf {
        let probe = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
        let text = format!(
            "version: 1\nworkers: 1\nlisteners:\n  - {{ name: public, address: \"{}\" }}\nfilters:\n  \
             - name: probe\n    wasm: \"{}\"\n    configuration: accept\nupstreams:\n  \
             orders: {{ endpoints: [\"127.0.0.1:9\"] }}\nroutes:\n  - {{ name: all, upstream: orders }}\n",
            self.free,
            probe.display()
        );
        self.file("portcullis.yaml", change(text))
    }

    fn serve(&self, policy: &Path) -> Ended {
        let ready = self.folder.path().join("ready.json");
        let mut command = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
        command.arg("serve").arg(policy).arg("--ready-file").arg(&ready);
        let ended = Process::run("portcullis serve", &mut command).unwrap_or_else(|error| panic!("{error}"));
        assert!(!ready.exists(), "it said that it was ready:\n{}", ended.output);
        assert!(TcpStream::connect(self.free).is_err(), "something listens on {}:\n{}", self.free, ended.output);
        ended
    }
}

/// Serves a policy and compares the exit code and what must be said.
fn check(site: &Site, policy: &Path, code: i32, said: &[&str]) {
    let ended = site.serve(policy);
    for text in said {
        assert!(ended.output.contains(text), "nothing says `{text}`:\n{}", ended.output);
    }
    assert!(!ended.output.contains("panicked"), "{}", ended.output);
    assert_eq!(ended.status.code(), Some(code), "{}", ended.output);
}

const CONFIGURATION: i32 = 2;
const RUNNING: i32 = 1;

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_key_that_was_meant() {
    let site = Site::new();
    let policy = site.policy(|text| text.replace("listeners:", "listners:"));
    check(&site, &policy, CONFIGURATION, &["portcullis.yaml:3", "`listners`", "hint: ", "`listeners`"]);
}

#[test]
fn a_missing_policy_is_named() {
    let site = Site::new();
    let policy = site.folder.path().join("nowhere.yaml");
    check(&site, &policy, CONFIGURATION, &["nowhere.yaml", "no such file", "hint: "]);
}

#[test]
fn a_missing_module_is_named_with_the_place_that_names_it() {
    let site = Site::new();
    let probe = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
    let policy = site.policy(|text| text.replace(&probe.display().to_string(), "nowhere.wasm"));
    check(&site, &policy, CONFIGURATION, &["portcullis.yaml:", "filters[0].wasm", "nowhere.wasm", "hint: "]);
}

#[test]
fn broken_yaml_is_shown_with_its_line() {
    let site = Site::new();
    let policy = site.policy(|text| text.replace("upstreams:", " upstreams: ["));
    check(&site, &policy, CONFIGURATION, &["portcullis.yaml:", "error"]);
}

#[test]
fn a_module_that_is_no_filter_is_refused_with_the_reason() {
    let site = Site::new();
    let probe = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
    let empty = site.file("empty.wasm", b"\0asm\x01\0\0\0");
    let policy = site.policy(|text| text.replace(&probe.display().to_string(), &empty.display().to_string()));
    check(&site, &policy, CONFIGURATION, &["probe", "proxy_abi_version_0_2_1", "hint: "]);
    let junk = site.file("empty.wasm", b"junk");
    assert_eq!(junk, empty);
    check(&site, &policy, CONFIGURATION, &["filters[0].wasm", "not a WebAssembly module", "hint: "]);
}

#[test]
fn a_filter_that_refuses_its_configuration_is_named_with_its_own_words() {
    let site = Site::new();
    let policy = site.policy(|text| text.replace("configuration: accept", "configuration: refuse"));
    check(&site, &policy, CONFIGURATION, &["filter `probe`", "the probe was told to refuse"]);
}

#[test]
fn an_unknown_key_in_a_filters_configuration_is_named_with_its_path() {
    let site = Site::new();
    let [probe, jwt] = ["probe", "jwt-auth"].map(|name| places::filter(name).unwrap_or_else(|error| panic!("{error}")));
    let policy = site.policy(|text| {
        text.replace(&probe.display().to_string(), &jwt.display().to_string()).replace(
            "configuration: accept",
            "configuration: { providers: { main: { issuer: \"https://issuer.example\", audience: [orders] } }, default_policy: {} }",
        )
    });
    check(&site, &policy, CONFIGURATION, &["providers.main", "`audience`", "hint: ", "`audiences`"]);
}

#[test]
fn a_port_in_use_is_named_and_the_other_listener_does_not_stay() {
    let site = Site::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    let policy = site.policy(|text| {
        text.replace("filters:\n", &format!("  - {{ name: second, address: \"{address}\" }}\nfilters:\n"))
    });
    check(&site, &policy, RUNNING, &["listener `second`", &address.to_string(), "in use"]);
}

#[test]
fn two_listeners_on_one_address_are_refused() {
    let site = Site::new();
    let address = site.free;
    let policy = site.policy(|text| {
        text.replace("filters:\n", &format!("  - {{ name: second, address: \"{address}\" }}\nfilters:\n"))
    });
    check(&site, &policy, CONFIGURATION, &["listeners[1].address", &address.to_string(), "hint: "]);
}

#[test]
fn check_finds_what_serve_would_refuse_and_accepts_what_it_would_serve() {
    let site = Site::new();
    let run = |policy: &Path| {
        let mut command = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
        Process::run("portcullis check", command.arg("check").arg(policy)).unwrap_or_else(|error| panic!("{error}"))
    };
    let good = run(&site.policy(|text| text));
    assert_eq!(good.status.code(), Some(0), "{}", good.output);
    let refused = run(&site.policy(|text| text.replace("configuration: accept", "configuration: refuse")));
    assert_eq!(refused.status.code(), Some(CONFIGURATION), "{}", refused.output);
    assert!(refused.output.contains("the probe was told to refuse"), "{}", refused.output);
}

#[test]
fn an_unknown_command_explains_the_known_ones() {
    let mut command = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
    let ended = Process::run("portcullis", command.arg("sreve")).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(ended.status.code(), Some(2), "{}", ended.output);
    assert!(ended.output.contains("serve"), "{}", ended.output);
}
