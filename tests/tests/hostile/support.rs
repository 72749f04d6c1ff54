//! The built program with one guest in it, written in WAT: on the route `/guarded`, beside `/plain` without any filter. One worker
//! serves both, so whatever holds the guest's route up holds up the other one too.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use portcullis_harness::{ObservedResponse, RequestPlan};
use portcullis_tests::client;
use portcullis_tests::process::DEADLINE;
use portcullis_tests::server::Server;
use portcullis_tests::upstream::Upstream;

/// What a test changes about its policy.
#[derive(Clone, Copy, Default)]
pub(crate) struct Settings<'a> {
    /// Lines of the filter, each with four spaces in front.
    pub(crate) filter: &'a str,
    /// The listener's limits, as a flow mapping without braces.
    pub(crate) listener: &'a str,
}

/// A folder with a policy, a guest and an API behind it.
pub(crate) struct Site {
    folder: tempfile::TempDir,
    pub(crate) origin: Upstream,
}

impl Site {
    pub(crate) fn new(wasm: &[u8], settings: Settings<'_>) -> Site {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let origin = Upstream::start().unwrap_or_else(|error| panic!("{error}"));
        let site = Site { folder, origin };
        site.write(wasm, settings);
        site
    }

    /// Replaces guest and policy.
    pub(crate) fn write(&self, wasm: &[u8], settings: Settings<'_>) {
        std::fs::write(self.folder.path().join("guest.wasm"), wasm).expect("a file");
        let Settings { filter, listener } = settings;
        let origin = self.origin.address();
        let yaml = format!(
            "version: 1\nworkers: 1\nadmin: {{ address: \"127.0.0.1:0\" }}\n\
             listeners:\n  - {{ name: public, address: \"127.0.0.1:0\", limits: {{ {listener} }} }}\n\
             filters:\n  - name: guest\n    wasm: guest.wasm\n{filter}\
             upstreams: {{ origin: {{ endpoints: [\"{origin}\"] }} }}\n\
             routes:\n  - {{ name: plain, match: {{ path: {{ prefix: /plain }} }}, filters: [], upstream: origin }}\n  \
             - {{ name: guarded, upstream: origin }}\n"
        );
        std::fs::write(self.policy(), yaml).expect("a file");
    }

    pub(crate) fn policy(&self) -> PathBuf {
        self.folder.path().join("portcullis.yaml")
    }

    pub(crate) fn serve(self) -> Gate {
        let server = Server::portcullis(&self.policy()).unwrap_or_else(|error| panic!("{error}"));
        Gate { server, site: self }
    }
}

/// The running program.
pub(crate) struct Gate {
    pub(crate) server: Server,
    pub(crate) site: Site,
}

impl Gate {
    /// `None`: the connection ended without a response.
    pub(crate) fn ask(&self, path: &str, fields: &[(&str, &str)]) -> Option<ObservedResponse> {
        let mut request = RequestPlan::new("GET", path);
        for (name, value) in fields {
            request.fields.push(name.to_owned(), value.to_owned());
        }
        client::send(self.server.address(), &request).unwrap_or_else(|error| panic!("{error}\n{}", self.server.log()))
    }

    pub(crate) fn status(&self, path: &str) -> Option<u16> {
        self.ask(path, &[]).map(|response| response.status)
    }

    /// Whether the program is up and serves a route that has nothing to do with the guest.
    pub(crate) fn serves_others(&mut self) {
        assert!(self.server.is_running(), "the program has ended:\n{}", self.server.log());
        assert_eq!(self.status("/plain"), Some(200), "{}", self.server.log());
    }

    /// Asks again until something is as wanted.
    pub(crate) fn wait_until(&self, what: &str, mut is_so: impl FnMut(&Gate) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "never {what}:\n{}", self.server.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A guest: what the ABI's own tests begin with, and what makes it hostile.
///
/// `$attacked`: the request has a field `x-attack`. `$once`: nobody has asked before, in any VM.
pub(crate) fn guest(code: &str) -> Vec<u8> {
    let text = format!(
        r#"(module
          {}
          (data (i32.const 0) "x-attackonce")
          (func $attacked (result i32)
            (i32.eqz (call $get (i32.const 0) (i32.const 0) (i32.const 8) (i32.const 16) (i32.const 20))))
          (func $once (result i32)
            (if (result i32) (call $get_shared (i32.const 8) (i32.const 4) (i32.const 16) (i32.const 20) (i32.const 24))
              (then
                (drop (call $set_shared (i32.const 8) (i32.const 4) (i32.const 8) (i32.const 4) (i32.const 0)))
                (i32.const 1))
              (else (i32.const 0))))
          {code})"#,
        include_str!("../../../host/abi/tests/guests/prelude.wat")
    );
    wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// A guest that does `code` with a request that has the field `x-attack`, and lets every other one pass.
pub(crate) fn attacker(code: &str) -> Vec<u8> {
    guest(&format!(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (local $i i32)
             (if (call $attacked) (then {code}))
             (i32.const 0))"#
    ))
}

/// Quick replacement of what crashed.
pub(crate) const QUICKLY: &str = "    reload: { base_interval: 50ms, max_interval: 100ms }\n";
