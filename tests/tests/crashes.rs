//! A filter that panics, side by side in the harness, in `portcullis serve` and in Envoy: the request that it happened to
//! fails closed, and what comes of later ones is what `failure_policy` says.

use std::time::{Duration, Instant};

use portcullis_abi::FailurePolicy;
use portcullis_harness::{Filter, Host, HostKind, Observed, RequestPlan, ResponsePlan};
use portcullis_tests::policy::PolicyParts;
use portcullis_tests::process::DEADLINE;
use portcullis_tests::server::Server;
use portcullis_tests::upstream::Upstream;
use portcullis_tests::{client, places};

/// A host with the probe in it.
enum Probed {
    Simulated(Filter),
    Real(Box<Real>),
}

struct Real {
    server: Server,
    origin: Upstream,
    _folder: tempfile::TempDir,
}

impl Probed {
    fn start(host: HostKind, failure_policy: &str) -> Probed {
        let wasm = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
        if host == HostKind::Harness {
            let policy = match failure_policy {
                "fail_closed" => FailurePolicy::Closed,
                "fail_open" => FailurePolicy::Open,
                _ => FailurePolicy::Reload,
            };
            let filter = Host::new().load(&wasm).plugin(|plugin| plugin.failure_policy = policy).start();
            return Probed::Simulated(filter.unwrap_or_else(|error| panic!("{error}")));
        }
        let origin = Upstream::start().unwrap_or_else(|error| panic!("{error}"));
        let folder = tempfile::tempdir().expect("a temporary folder");
        let policy = PolicyParts {
            filter: "probe",
            wasm: &wasm,
            configuration: b"",
            origin: origin.address(),
            callouts: &[],
            http2: &[],
            failure_policy: Some(failure_policy),
        };
        let policy = policy.write(folder.path()).unwrap_or_else(|error| panic!("{error}"));
        let server = Server::start(host, &policy).unwrap_or_else(|error| panic!("{error}"));
        Probed::Real(Box::new(Real { server, origin, _folder: folder }))
    }

    fn ask(&mut self, wish: Option<&str>) -> Observed {
        let mut request = RequestPlan::new("GET", "/");
        if let Some(wish) = wish {
            request.fields.push("x-probe", wish);
        }
        match self {
            Probed::Simulated(filter) => filter.exchange(&request, &ResponsePlan::default()),
            Probed::Real(real) => {
                let Real { server, origin, .. } = &mut **real;
                origin.take_requests();
                let response = client::send(server.address(), &request)
                    .unwrap_or_else(|error| panic!("{error}\n{}", server.log()));
                assert!(server.is_running(), "the host has ended:\n{}", server.log());
                Observed { response, upstream: origin.take_requests(), ..Observed::default() }
            }
        }
    }

    /// Asks again until the answer is `status`; a new VM takes the place of the old one after a while.
    fn ask_until(&mut self, status: u16) -> Observed {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let seen = self.ask(None);
            if seen.status() == Some(status) {
                return seen;
            }
            assert!(Instant::now() < deadline, "never {status}, but {:?}", seen.status());
            match self {
                Probed::Simulated(filter) => filter.host().advance(Duration::from_millis(100)),
                // A back-off that is over shows only in the next answer.
                Probed::Real(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

fn passes(seen: &Observed, filtered: bool) {
    assert_eq!(seen.status(), Some(200), "{seen:?}");
    let [request] = seen.upstream.as_slice() else { panic!("{seen:?}") };
    assert_eq!(request.fields.get("x-probed").is_some(), filtered, "{seen:?}");
}

fn fails_closed(seen: &Observed) {
    assert_eq!(seen.status(), Some(503), "{seen:?}");
    assert!(!seen.reached_upstream(), "{seen:?}");
    let body = seen.response.as_ref().map(|response| response.body.as_slice()).unwrap_or_default();
    assert!(!String::from_utf8_lossy(body).contains("panic"), "the client is told about our insides: {seen:?}");
}

fn a_panic_fails_the_request_and_a_new_vm_serves_later_ones(host: HostKind) {
    let mut probed = Probed::start(host, "fail_reload");
    passes(&probed.ask(None), true);
    fails_closed(&probed.ask(Some("panic")));
    passes(&probed.ask_until(200), true);
    fails_closed(&probed.ask(Some("panic")));
    passes(&probed.ask_until(200), true);
}

fn after_a_panic_everything_fails_where_that_was_chosen(host: HostKind) {
    let mut probed = Probed::start(host, "fail_closed");
    passes(&probed.ask(None), true);
    fails_closed(&probed.ask(Some("panic")));
    fails_closed(&probed.ask(None));
    fails_closed(&probed.ask(None));
}

fn after_a_panic_the_filter_is_left_out_where_that_was_chosen(host: HostKind) {
    let mut probed = Probed::start(host, "fail_open");
    passes(&probed.ask(None), true);
    fails_closed(&probed.ask(Some("panic")));
    passes(&probed.ask(None), false);
}

fn an_ordinary_denial_is_not_a_crash(host: HostKind) {
    let mut probed = Probed::start(host, "fail_closed");
    for _ in 0..2 {
        let seen = probed.ask(Some("deny"));
        assert_eq!(seen.status(), Some(418), "{seen:?}");
        assert_eq!(seen.field("x-probed"), Some("denied"));
        assert!(!seen.reached_upstream());
    }
    passes(&probed.ask(None), true);
}

fn a_panic_on_the_log_leaves_the_answer_alone(host: HostKind) {
    let mut probed = Probed::start(host, "fail_reload");
    passes(&probed.ask(Some("panic-on-log")), true);
    passes(&probed.ask_until(200), true);
}

/// One test per behaviour and host.
macro_rules! on_every_host {
    ($($behaviour:ident),+ $(,)?) => {
        mod harness { $(#[test] fn $behaviour() { super::$behaviour(portcullis_harness::HostKind::Harness); })+ }
        mod host { $(#[test] fn $behaviour() { super::$behaviour(portcullis_harness::HostKind::Standalone); })+ }
        mod envoy { $(#[test] fn $behaviour() { super::$behaviour(portcullis_harness::HostKind::Envoy); })+ }
    };
}

on_every_host!(
    a_panic_fails_the_request_and_a_new_vm_serves_later_ones,
    after_a_panic_everything_fails_where_that_was_chosen,
    after_a_panic_the_filter_is_left_out_where_that_was_chosen,
    an_ordinary_denial_is_not_a_crash,
    a_panic_on_the_log_leaves_the_answer_alone,
);

/// Envoy bounds neither time nor memory (beyond 1 GiB), so only our host is asked.
#[test]
fn our_host_ends_a_callback_that_never_returns_and_one_that_takes_all_memory() {
    for wish in ["loop", "memory"] {
        let mut probed = Probed::start(HostKind::Standalone, "fail_reload");
        fails_closed(&probed.ask(Some(wish)));
        passes(&probed.ask_until(200), true);
    }
}
