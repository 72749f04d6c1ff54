//! A filter of TCP connections, written with the Rust SDK, side by side in the harness, in `portcullis serve` and in Envoy.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use portcullis_abi::FailurePolicy;
use portcullis_harness::{
    ClosedBy, Connection, EndOfStream, Filter, Host, HostKind, ObservedConnection, RequestPlan, ResponsePlan,
};
use portcullis_tests::policy::PolicyParts;
use portcullis_tests::process::DEADLINE;
use portcullis_tests::server::Server;
use portcullis_tests::tcp::{End, Got, Peer, TcpOrigin};
use portcullis_tests::upstream::Upstream;
use portcullis_tests::{client, places};

/// How long a test looks whether something happens that must not.
const QUIET: Duration = Duration::from_millis(200);

/// A host with the probe on a TCP listener.
enum Probed {
    Simulated(Filter),
    Real(Box<Real>),
}

struct Real {
    server: Server,
    origin: TcpOrigin,
    keys: Upstream,
    _folder: tempfile::TempDir,
}

impl Probed {
    fn start(host: HostKind, configuration: &str) -> Probed {
        let wasm = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
        if host == HostKind::Harness {
            let host = Host::new();
            host.upstream("keys");
            let filter = host.load(&wasm).configuration(configuration);
            let filter = filter.plugin(|plugin| plugin.failure_policy = FailurePolicy::Reload).start();
            return Probed::Simulated(filter.unwrap_or_else(|error| panic!("{error}")));
        }
        let origin = TcpOrigin::start().unwrap_or_else(|error| panic!("{error}"));
        let keys = Upstream::start().unwrap_or_else(|error| panic!("{error}"));
        let folder = tempfile::tempdir().expect("a temporary folder");
        let policy = format!(
            "version: 1\nworkers: 1\nadmin: {{ address: \"127.0.0.1:0\" }}\nlisteners:\n  - name: public\n    \
             address: \"127.0.0.1:0\"\n    tcp: {{ upstream: origin, filters: [probe] }}\nfilters:\n  - name: probe\n    \
             protocol: tcp\n    wasm: \"{}\"\n    configuration: \"{configuration}\"\n    failure_policy: fail_reload\n    \
             allowed_upstreams: [keys]\nupstreams:\n  origin: {{ endpoints: [\"{}\"] }}\n  \
             keys: {{ endpoints: [\"{}\"] }}\n",
            wasm.display(),
            origin.address(),
            keys.address(),
        );
        let file = folder.path().join("portcullis.yaml");
        std::fs::write(&file, policy).expect("a temporary file");
        let server = Server::start(host, &file).unwrap_or_else(|error| panic!("{error}"));
        Probed::Real(Box::new(Real { server, origin, keys, _folder: folder }))
    }

    /// What the upstream `keys` answers from now on.
    fn keys_answer(&self, status: u16) {
        match self {
            Probed::Simulated(filter) => filter.host().upstream("keys").always(ResponsePlan::new(status)),
            Probed::Real(real) => real.keys.answer_always(ResponsePlan::new(status)),
        }
    }

    fn connect(&self) -> Ends<'_> {
        match self {
            Probed::Simulated(filter) => Ends::Simulated(Some(filter.connect())),
            Probed::Real(real) => {
                let client = Peer::connect(real.server.address()).unwrap_or_else(|error| panic!("{error}"));
                Ends::Real { real, client, origin: None }
            }
        }
    }

    /// Connects again until a connection reaches the origin: a new VM takes the place of the old one after a while.
    fn connect_until_it_reaches_the_origin(&self) -> Ends<'_> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let mut ends = self.connect();
            if ends.reaches_the_origin(QUIET) {
                return ends;
            }
            assert!(Instant::now() < deadline, "no connection ever reaches the origin again");
            if let Probed::Simulated(filter) = self {
                filter.host().advance(Duration::from_millis(100));
            }
        }
    }

    /// Waits until the guest has said this in the log.
    fn says(&self, line: &str) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let log = match self {
                Probed::Simulated(filter) => filter.host().trace().to_string(),
                Probed::Real(real) => real.server.log(),
            };
            if log.contains(line) {
                return;
            }
            assert!(Instant::now() < deadline, "the probe never says `{line}`:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A connection from both ends.
enum Ends<'a> {
    /// Absent once it is over.
    Simulated(Option<Connection>),
    Real {
        real: &'a Real,
        client: Peer,
        origin: Option<Peer>,
    },
}

impl Ends<'_> {
    fn simulated(connection: &mut Option<Connection>) -> &mut Connection {
        connection.as_mut().expect("the connection is over")
    }

    fn client_sends(&mut self, bytes: &[u8]) {
        match self {
            Ends::Simulated(connection) => {
                Ends::simulated(connection).send(bytes, EndOfStream::No);
            }
            Ends::Real { client, .. } => client.send(bytes).unwrap_or_else(|error| panic!("{error}")),
        }
    }

    fn client_finishes(&mut self) {
        match self {
            Ends::Simulated(connection) => {
                Ends::simulated(connection).send("", EndOfStream::Yes);
            }
            Ends::Real { client, .. } => client.finish().unwrap_or_else(|error| panic!("{error}")),
        }
    }

    fn origin_sends(&mut self, bytes: &[u8]) {
        match self {
            Ends::Simulated(connection) => {
                Ends::simulated(connection).upstream_sends(bytes, EndOfStream::No);
            }
            Ends::Real { .. } => self.origin().send(bytes).unwrap_or_else(|error| panic!("{error}")),
        }
    }

    fn origin_finishes(&mut self) {
        match self {
            Ends::Simulated(connection) => {
                Ends::simulated(connection).upstream_sends("", EndOfStream::Yes);
            }
            Ends::Real { .. } => self.origin().finish().unwrap_or_else(|error| panic!("{error}")),
        }
    }

    fn reaches_the_origin(&mut self, time: Duration) -> bool {
        match self {
            Ends::Simulated(connection) => Ends::simulated(connection).is_connected(),
            Ends::Real { real, origin, .. } => {
                if origin.is_none() {
                    *origin = real.origin.take(time).unwrap_or_else(|error| panic!("{error}"));
                }
                origin.is_some()
            }
        }
    }

    fn origin(&mut self) -> &mut Peer {
        assert!(self.reaches_the_origin(DEADLINE), "the origin is not connected");
        match self {
            Ends::Real { origin: Some(origin), .. } => origin,
            _ => panic!("there is no socket"),
        }
    }

    /// What the origin has once it has as much as this.
    fn origin_got(&mut self, expected: &[u8]) {
        let got = match self {
            Ends::Simulated(connection) => Ends::simulated(connection).upstream_received(),
            Ends::Real { .. } => self.origin().wait(DEADLINE, |got| got.bytes.len() >= expected.len()).bytes,
        };
        assert_eq!(got.escape_ascii().to_string(), expected.escape_ascii().to_string());
    }

    /// What the client has once it has as much as this.
    fn client_got(&mut self, expected: &[u8]) {
        let got = match self {
            Ends::Simulated(connection) => Ends::simulated(connection).received(),
            Ends::Real { client, .. } => client.wait(DEADLINE, |got| got.bytes.len() >= expected.len()).bytes,
        };
        assert_eq!(got.escape_ascii().to_string(), expected.escape_ascii().to_string());
    }

    /// The origin has heard that the client sends nothing more.
    fn origin_got_the_end(&mut self) {
        if let Ends::Real { .. } = self {
            let got = self.origin().wait(DEADLINE, |got| got.end.is_some());
            assert_eq!(got.end, Some(End::Finished));
        }
    }

    /// Both ends have finished, the client first.
    fn has_ended(&mut self) {
        match self {
            Ends::Simulated(connection) => {
                let seen = close(connection, ClosedBy::Local);
                assert!(seen.upstream_ended && seen.client_ended && seen.closed.is_none(), "{seen}");
            }
            Ends::Real { client, .. } => {
                let got = client.wait(DEADLINE, |got| got.end.is_some());
                assert_eq!(got.end, Some(End::Finished));
            }
        }
    }

    /// A filter, or the host in its place, has closed the connection; nothing that was held has passed.
    fn is_closed_without_having_passed(&mut self, held: &str) {
        match self {
            Ends::Simulated(connection) => {
                assert!(Ends::simulated(connection).is_closed());
                let seen = close(connection, ClosedBy::Local);
                assert!(!String::from_utf8_lossy(&seen.upstream).contains(held), "{seen}");
                assert_eq!(seen.client, b"", "{seen}");
            }
            Ends::Real { real, client, origin } => {
                let log = || real.server.log();
                let got = client.wait(DEADLINE, |got| got.end.is_some());
                assert!(got.end.is_some() && got.bytes.is_empty(), "{got:?}\n{}", log());
                let Some(origin) = origin else { return };
                let got: Got = origin.wait(DEADLINE, |got| got.end.is_some());
                assert!(got.end.is_some(), "the origin waits for ever\n{}", log());
                assert!(!String::from_utf8_lossy(&got.bytes).contains(held), "{got:?}\n{}", log());
            }
        }
    }
}

fn close(connection: &mut Option<Connection>, by: ClosedBy) -> ObservedConnection {
    connection.take().expect("the connection is over").close(by)
}

fn lines_pass_whole_and_edited_however_they_are_cut(host: HostKind) {
    let probed = Probed::start(host, "tcp");
    let mut ends = probed.connect();
    for byte in b"hello secret\n" {
        ends.client_sends(&[*byte]);
    }
    ends.origin_got(b"hello ******\n");
    ends.origin_sends(b"no secret\n");
    ends.client_got(b"no ******\n");
    // What is not a whole line passes at the end.
    ends.client_sends(b"the last secret");
    ends.client_finishes();
    ends.origin_got(b"hello ******\nthe last ******");
    ends.origin_got_the_end();
    // The other direction is still open.
    ends.origin_sends(b"bye\n");
    ends.client_got(b"no ******\nbye\n");
    ends.origin_finishes();
    ends.has_ended();
    probed.says("probe: 28 up, 14 down, closed by Some(Local)");
}

fn an_answer_lets_a_line_pass_or_closes(host: HostKind) {
    let probed = Probed::start(host, "tcp");
    probed.keys_answer(200);
    let mut ends = probed.connect();
    ends.client_sends(b"ask\n");
    ends.origin_got(b"ask\n");
    ends.client_sends(b"and on\n");
    ends.origin_got(b"ask\nand on\n");
    probed.keys_answer(403);
    ends.client_sends(b"held\nask\n");
    ends.is_closed_without_having_passed("held");
}

fn an_answer_lets_a_connection_begin_or_closes_it(host: HostKind) {
    let probed = Probed::start(host, "tcp ask");
    probed.keys_answer(200);
    let mut ends = probed.connect();
    assert!(ends.reaches_the_origin(DEADLINE));
    ends.client_sends(b"hello");
    ends.origin_got(b"hello");
    drop(ends);
    probed.keys_answer(403);
    let mut ends = probed.connect();
    assert!(!ends.reaches_the_origin(QUIET), "the origin is connected");
    ends.is_closed_without_having_passed("anything");
}

fn a_filter_closes_a_connection(host: HostKind) {
    let probed = Probed::start(host, "tcp");
    let mut ends = probed.connect();
    assert!(ends.reaches_the_origin(DEADLINE));
    ends.client_sends(b"held\nquit\n");
    ends.is_closed_without_having_passed("held");
    probed.says("probe: 10 up, 0 down, closed by Some(Local)");
}

fn a_panic_closes_the_connection_and_a_new_vm_serves_later_ones(host: HostKind) {
    let probed = Probed::start(host, "tcp");
    for _ in 0..2 {
        let mut ends = probed.connect_until_it_reaches_the_origin();
        ends.client_sends(b"held\npanic\n");
        ends.is_closed_without_having_passed("held");
    }
    let mut ends = probed.connect_until_it_reaches_the_origin();
    ends.client_sends(b"secret\n");
    ends.origin_got(b"******\n");
}

fn megabytes_pass_intact_both_ways(host: HostKind) {
    const PIECE: usize = 64 * 1024;
    const PIECES: usize = 64;
    let probed = Probed::start(host, "tcp count");
    let mut ends = probed.connect();
    assert!(ends.reaches_the_origin(DEADLINE));
    // Each piece differs from the others, and from those of the other side.
    let pieces = |first: usize| (first..first + PIECES).map(|number| vec![number as u8; PIECE]);
    for (up, down) in pieces(0).zip(pieces(PIECES)) {
        ends.client_sends(&up);
        ends.origin_sends(&down);
    }
    ends.origin_got(&pieces(0).collect::<Vec<_>>().concat());
    ends.client_got(&pieces(PIECES).collect::<Vec<_>>().concat());
    ends.client_finishes();
    ends.origin_got_the_end();
    ends.origin_finishes();
    ends.has_ended();
    let size = PIECE * PIECES;
    probed.says(&format!("probe: {size} up, {size} down, closed by Some(Local)"));
}

/// The SDK exports every callback, so that no host can tell beforehand what its filter is for.
fn a_filter_of_http_on_a_tcp_listener_lets_nothing_pass(host: HostKind) {
    let probed = Probed::start(host, "");
    let mut ends = probed.connect();
    ends.is_closed_without_having_passed("anything");
}

fn a_filter_of_tcp_in_front_of_http_lets_nothing_pass(host: HostKind) {
    let wasm = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
    let seen = if host == HostKind::Harness {
        let filter = Host::new().load(&wasm).configuration("tcp").start().unwrap_or_else(|error| panic!("{error}"));
        filter.get("/").send().response
    } else {
        // Nobody listens there, and nobody is asked.
        let origin = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let origin: SocketAddr = origin.expect("an address");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let policy = PolicyParts {
            filter: "probe",
            wasm: &wasm,
            configuration: b"tcp",
            origin,
            callouts: &[],
            http2: &[],
            failure_policy: None,
        };
        let policy = policy.write(folder.path()).unwrap_or_else(|error| panic!("{error}"));
        let server = Server::start(host, &policy).unwrap_or_else(|error| panic!("{error}"));
        client::send(server.address(), &RequestPlan::new("GET", "/")).unwrap_or_else(|error| panic!("{error}"))
    };
    let response = seen.expect("an answer");
    assert_eq!(response.status, 503);
    let body = String::from_utf8_lossy(&response.body);
    assert!(!body.contains("connect"), "it is not the filter that stopped it: {body}");
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
    lines_pass_whole_and_edited_however_they_are_cut,
    an_answer_lets_a_line_pass_or_closes,
    an_answer_lets_a_connection_begin_or_closes_it,
    a_filter_closes_a_connection,
    a_panic_closes_the_connection_and_a_new_vm_serves_later_ones,
    megabytes_pass_intact_both_ways,
    a_filter_of_http_on_a_tcp_listener_lets_nothing_pass,
    a_filter_of_tcp_in_front_of_http_lets_nothing_pass,
);
