//! What gRPC calls of a filter look like on the wire, and what comes of servers that are not there: in `portcullis serve` and in
//! Envoy. What comes of answers is in the probe's scenarios.

use portcullis_harness::{Callout, GrpcPlan, HostKind, ObservedRequest, RequestPlan};
use portcullis_tests::policy::PolicyParts;
use portcullis_tests::server::Server;
use portcullis_tests::upstream::Upstream;
use portcullis_tests::{client, places};

/// A host with the probe in it, and a gRPC server beside it.
struct Probed {
    server: Server,
    auth: Upstream,
    _origin: Upstream,
    _folder: tempfile::TempDir,
}

impl Probed {
    fn start(host: HostKind) -> Probed {
        let fail = |error: String| -> ! { panic!("{error}") };
        let wasm = places::filter("probe").unwrap_or_else(|error| fail(error));
        let origin = Upstream::start().unwrap_or_else(|error| fail(error));
        let auth = Upstream::start().unwrap_or_else(|error| fail(error));
        auth.answer(vec![Callout::always(GrpcPlan::messages(["granted"]))]);
        // Nobody listens there any more.
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let nobody = nobody.expect("a free port");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let policy = PolicyParts {
            filter: "probe",
            wasm: &wasm,
            configuration: b"",
            origin: origin.address(),
            callouts: &[("auth".to_owned(), auth.address()), ("nobody".to_owned(), nobody)],
            http2: &["auth".to_owned(), "nobody".to_owned()],
            failure_policy: None,
        };
        let policy = policy.write(folder.path()).unwrap_or_else(|error| fail(error));
        let server = Server::start(host, &policy).unwrap_or_else(|error| fail(error));
        Probed { server, auth, _origin: origin, _folder: folder }
    }

    /// The transcript of a script (see the probe).
    fn run(&self, script: &str) -> String {
        let mut request = RequestPlan::new("GET", "/");
        request.fields.push("x-probe", "grpc");
        request.fields.push("x-grpc", script);
        let response = client::send(self.server.address(), &request)
            .unwrap_or_else(|error| panic!("{script}: {error}\n{}", self.server.log()));
        let response = response.unwrap_or_else(|| panic!("{script}: no answer\n{}", self.server.log()));
        String::from_utf8_lossy(&response.body).into_owned()
    }

    /// What the server was asked, once it has all of it.
    fn asked(&self) -> ObservedRequest {
        let [request] = self.auth.take_requests().try_into().expect("one request");
        request
    }
}

/// Fields in order of their names, without those that Envoy adds.
fn fields(request: &ObservedRequest) -> Vec<String> {
    let own = request.fields.iter().filter(|(name, _)| !name.starts_with("x-envoy-"));
    let mut fields: Vec<String> = own.map(|(n, v)| format!("{n}: {}", String::from_utf8_lossy(v))).collect();
    fields.sort();
    fields
}

fn a_call_is_the_same_request(host: HostKind) {
    let probed = Probed::start(host);
    let script = "meta:x-twice=1 meta:x-twice=2 meta:X-Upper=a%20b meta:key-bin=%00%ff%0d call:auth/auth.v1.Auth/Check:hello:1500";
    assert_eq!(probed.run(script), "message granted");
    let asked = probed.asked();
    assert_eq!((asked.method.as_str(), asked.path.as_str()), ("POST", "/auth.v1.Auth/Check"));
    assert_eq!(asked.authority, "auth", "the upstream's name");
    let expected = [
        "content-type: application/grpc",
        "grpc-timeout: 1500m",
        "key-bin: AP8N",
        "te: trailers",
        "x-twice: 1",
        "x-twice: 2",
        "x-upper: a b",
    ];
    assert_eq!(fields(&asked), expected);
    assert_eq!(asked.grpc_messages(), [b"hello"]);

    for (timeout, expected) in [("0", Some("0m")), ("100000000", Some("100000S"))] {
        assert_eq!(probed.run(&format!("call:auth/a/b:hello:{timeout}")), "message granted");
        let asked = probed.asked();
        let said = asked.fields.get("grpc-timeout").map(|value| String::from_utf8_lossy(value).into_owned());
        assert_eq!(said.as_deref(), expected);
    }
    // A service with an authority and metadata of its own, written out as protobuf.
    let service = "%0a%0f%0a%04auth%12%07x.local%2a%08%0a%03x-m%12%01v";
    assert_eq!(probed.run(&format!("call:{service}/a/b:hello:1500")), "message granted");
    let asked = probed.asked();
    assert_eq!((asked.authority.as_str(), asked.fields.get("x-m")), ("x.local", Some(&b"v"[..])));
}

fn a_stream_has_no_timeout_and_carries_what_is_sent(host: HostKind) {
    let probed = Probed::start(host);
    let plan = GrpcPlan::messages(["one", "two"]).replies(portcullis_harness::Replies::PerMessage);
    probed.auth.answer(vec![Callout::always(plan)]);
    let transcript = probed.run("stream:auth/chat.Chat/Talk send:a send: last:c");
    assert!(
        transcript.ends_with("message one\nmessage two\ntrailing grpc-status=0\nclose 0\nstatus 0 via_upstream"),
        "{transcript}"
    );
    let asked = probed.asked();
    assert_eq!(fields(&asked), ["content-type: application/grpc", "te: trailers"]);
    assert_eq!(asked.grpc_messages(), [&b"a"[..], b"", b"c"]);
    assert!(asked.complete);
}

fn a_refused_connection_is_unavailable(host: HostKind) {
    let probed = Probed::start(host);
    let status = "status 14 upstream connect error or disconnect/reset before headers";
    assert_eq!(probed.run("call:nobody/a/b:hello:1000"), format!("close 14\n{status}"));
    let trailing = "trailing :status=200 content-type=application/grpc \
                    grpc-message=upstream connect error or disconnect/reset before headers grpc-status=14";
    assert_eq!(probed.run("stream:nobody/a/b send:a"), format!("initial \n{trailing}\nclose 14\n{status}"));
}

fn a_cancelled_stream_is_no_whole_request(host: HostKind) {
    let probed = Probed::start(host);
    let plan = GrpcPlan::messages(["one"]).replies(portcullis_harness::Replies::PerMessage);
    probed.auth.answer(vec![Callout::always(plan)]);
    let transcript = probed.run("stream:auth/chat.Chat/Talk send:a; ; cancel answer");
    assert!(transcript.ends_with("message one"), "{transcript}");
    // On the same connection the next call arrives behind whatever became of the stream.
    assert_eq!(probed.run("call:auth/chat.Chat/Talk:b:1000"), "message one");
    let complete: Vec<bool> = probed.auth.take_requests().iter().map(|request| request.complete).collect();
    assert_eq!(complete, [false, true]);
}

/// One test per behaviour and host.
macro_rules! on_real_hosts {
    ($($behaviour:ident),+ $(,)?) => {
        mod host { $(#[test] fn $behaviour() { super::$behaviour(portcullis_harness::HostKind::Standalone); })+ }
        mod envoy { $(#[test] fn $behaviour() { super::$behaviour(portcullis_harness::HostKind::Envoy); })+ }
    };
}

on_real_hosts!(
    a_call_is_the_same_request,
    a_stream_has_no_timeout_and_carries_what_is_sent,
    a_refused_connection_is_unavailable,
    a_cancelled_stream_is_no_whole_request,
);
