//! Routes to operators, with a host of operators that runs none: it answers by itself.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use portcullis_config::Policy;
use portcullis_proxy::{
    OperatorAnswer, OperatorFailure, OperatorHost, OperatorRequestBody, OperatorSet, OperatorsRefused, Options, Server,
    StartError,
};

use crate::support::{Client, Folder, Proxy, denying_guest, guest};

/// Answers with what it was asked; `fails` does not answer.
#[derive(Default)]
struct Host {
    refuse: Mutex<bool>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    called: u64,
    /// Names of every set that was committed, and how many sets are gone again.
    committed: Vec<Vec<String>>,
    dropped: usize,
}

struct Set {
    names: Vec<String>,
    seen: Arc<Mutex<Seen>>,
}

impl Drop for Set {
    fn drop(&mut self) {
        self.seen.lock().expect("what was seen").dropped += 1;
    }
}

impl OperatorHost for Host {
    fn prepare(&self, policy: &Policy) -> Result<Arc<dyn OperatorSet>, OperatorsRefused> {
        if *self.refuse.lock().expect("the switch") {
            return Err(OperatorsRefused::Policy("operator `hello`: main.ts:1: nonsense".to_owned()));
        }
        let names = policy.operators.iter().map(|operator| operator.name.clone()).collect();
        Ok(Arc::new(Set { names, seen: Arc::clone(&self.seen) }))
    }

    fn metrics(&self) -> Vec<(String, u64)> {
        vec![("portcullis_operator_requests_total.operator.hello".to_owned(), self.called())]
    }
}

impl Host {
    /// How many sets are gone, once the last one that must go has.
    fn dropped_in_the_end(&self) -> usize {
        std::thread::sleep(std::time::Duration::from_millis(300));
        self.seen.lock().expect("what was seen").dropped
    }

    fn committed(&self) -> Vec<String> {
        self.seen.lock().expect("what was seen").committed.iter().map(|names| names.join(" ")).collect()
    }

    fn called(&self) -> u64 {
        self.seen.lock().expect("what was seen").called
    }
}

fn failure() -> OperatorFailure {
    let mut response = http::Response::new(Bytes::from_static(b"{}"));
    *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert("retry-after", http::HeaderValue::from_static("1"));
    OperatorFailure { details: "operator_crashed".to_owned(), response }
}

/// A body that has one piece and then fails.
struct Cut(Option<Bytes>);

impl Body for Cut {
    type Data = Bytes;
    type Error = OperatorFailure;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, OperatorFailure>>> {
        Poll::Ready(Some(self.0.take().map(Frame::data).ok_or_else(failure)))
    }
}

impl OperatorSet for Set {
    fn commit(&self) {
        self.seen.lock().expect("what was seen").committed.push(self.names.clone());
    }

    fn call(&self, operator: &str, request: http::Request<OperatorRequestBody>) -> OperatorAnswer {
        self.seen.lock().expect("what was seen").called += 1;
        let fails = operator == "fails";
        Box::pin(async move {
            if fails {
                return Err(failure());
            }
            if request.uri().path().ends_with("/cut") {
                return Ok(http::Response::new(Cut(Some(Bytes::from_static(b"half"))).boxed_unsync()));
            }
            let uri = request.uri().to_string();
            let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes);
            let length = body.map_or("broken".to_owned(), |body| body.len().to_string());
            let answer = Full::new(Bytes::from(format!("{uri} {length}")));
            Ok(http::Response::new(answer.map_err(|never| match never {}).boxed_unsync()))
        })
    }
}

const POLICY: &str = "version: 1\nworkers: 1\nadmin: { address: \"127.0.0.1:0\" }\n\
    listeners: [{ name: public, address: \"127.0.0.1:0\" }]\n\
    filters: [{ name: guest, wasm: guest.wasm }]\n\
    operators: { hello: { entry: main.ts }, fails: { entry: main.ts } }\n\
    routes:\n\
    - { name: hello, match: { path: { prefix: /hello } }, filters: [], operator: hello }\n\
    - { name: guarded, match: { path: { prefix: /guarded } }, operator: hello }\n\
    - { name: fails, match: { path: { prefix: /fails } }, filters: [], operator: fails }\n";

fn folder() -> Folder {
    let folder = Folder::new();
    folder.write("main.ts", "export default {}").write("guest.wasm", denying_guest());
    folder
}

#[test]
fn an_operator_answers_what_the_filters_let_pass() {
    let host = Arc::new(Host::default());
    let operators: Arc<dyn OperatorHost> = Arc::<Host>::clone(&host);
    let proxy = Proxy::start_with_operators(folder().policy(POLICY), Some(operators)).expect("a server");
    assert_eq!(host.committed(), ["hello fails"]);
    let mut client = Client::connect(proxy.address());
    let get = client.exchange("GET /hello/a?b HTTP/1.1\r\nHost: op.example\r\n\r\n");
    assert_eq!((get.status, get.text().as_str()), (200, "http://op.example/hello/a?b 0"));
    client.send(format!("POST /hello HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n{}", "x".repeat(500_000)));
    assert_eq!(client.response(false).expect("a response").text(), "http://a/hello 500000");
    let chunked =
        client.exchange("POST /hello HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    assert_eq!(chunked.text(), "http://a/hello 3");
    assert_eq!(client.exchange("GET /guarded HTTP/1.1\r\nHost: a\r\n\r\n").status, 403);
    assert_eq!(host.called(), 3);
    let failed = client.exchange("GET /fails HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((failed.status, failed.field("retry-after")), (503, Some("1")));
    assert_eq!(proxy.metric("portcullis_operator_requests_total{operator=\"hello\"}"), 4.0);
    assert!(proxy.end().contains(" 503 operator_crashed "));
}

#[test]
fn a_response_that_an_operator_does_not_finish_breaks_off_and_the_access_log_says_why() {
    let proxy =
        Proxy::start_with_operators(folder().policy(POLICY), Some(Arc::new(Host::default()))).expect("a server");
    let mut client = Client::connect(proxy.address());
    client.send("GET /hello/cut HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(client.response(false).is_none(), "the response looks complete");
    let log = proxy.end();
    assert!(log.contains(" operator_crashed "), "{log}");
}

#[test]
fn a_reload_changes_over_to_the_new_operators_once_all_is_well() {
    let host = Arc::new(Host::default());
    let operators: Arc<dyn OperatorHost> = Arc::<Host>::clone(&host);
    let folder = folder();
    let proxy = Proxy::start_with_operators(folder.policy(POLICY), Some(operators)).expect("a server");
    let without_fails = || {
        let routes = POLICY.split("- { name: fails").next().unwrap_or_default();
        folder.policy(&routes.replace(", fails: { entry: main.ts }", ""))
    };
    *host.refuse.lock().expect("the switch") = true;
    assert!(matches!(proxy.handle.reload(without_fails()), Err(StartError::Operators(_))));
    *host.refuse.lock().expect("the switch") = false;
    // Neither do they take over while a filter does not start: what was prepared is dropped.
    let refusing = r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 0))"#;
    folder.write("guest.wasm", guest(&[], refusing));
    assert!(matches!(proxy.handle.reload(without_fails()), Err(StartError::Filter(_))));
    folder.write("guest.wasm", denying_guest());
    assert_eq!(host.committed(), ["hello fails"]);
    assert_eq!(host.dropped_in_the_end(), 1);
    assert_eq!(proxy.get("/fails").status, 503);
    proxy.handle.reload(without_fails()).expect("a new policy");
    assert_eq!(proxy.get("/fails").status, 404);
    assert_eq!(proxy.get("/hello").status, 200);
    assert_eq!(host.dropped_in_the_end(), 2);
    assert_eq!(host.committed(), ["hello fails", "hello"]);
}

#[test]
fn an_operator_that_does_not_start_keeps_the_server_from_starting() {
    let host = Host { refuse: Mutex::new(true), ..Host::default() };
    let Err(error) = Proxy::start_with_operators(folder().policy(POLICY), Some(Arc::new(host))) else {
        panic!("it started")
    };
    assert!(matches!(error, StartError::Operators(_)));
    assert_eq!(error.to_string(), "operator `hello`: main.ts:1: nonsense");
}

#[test]
fn without_a_host_of_operators_a_route_to_one_is_refused() {
    let Err(error) = Server::prepare(folder().policy(POLICY), Options::default()) else { panic!("it started") };
    assert_eq!(
        error.to_string(),
        "route `hello`: this host runs no operators\n  hint: send the route to an upstream, or answer it with `respond`"
    );
}
