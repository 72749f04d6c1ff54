//! Routes to operators, with a host of operators that runs none: it answers by itself.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use portcullis_config::Policy;
use portcullis_proxy::{
    BodyError, OperatorAnswer, OperatorFailure, OperatorHost, OperatorRequestBody, Options, Server, StartError,
};

use crate::support::{Client, Folder, Proxy, denying_guest};

/// Answers with what it was asked; `fails` does not answer.
#[derive(Default)]
struct Host {
    applied: Mutex<Vec<String>>,
    refuse: Mutex<bool>,
    called: Arc<Mutex<u64>>,
}

impl OperatorHost for Host {
    fn apply(&self, policy: &Policy) -> Result<(), String> {
        if *self.refuse.lock().expect("the switch") {
            return Err("operator `hello`: main.ts:1: nonsense".to_owned());
        }
        let names = policy.operators.iter().map(|operator| operator.name.clone());
        self.applied.lock().expect("the names").extend(names);
        Ok(())
    }

    fn call(&self, operator: &str, request: http::Request<OperatorRequestBody>) -> OperatorAnswer {
        *self.called.lock().expect("the counter") += 1;
        let fails = operator == "fails";
        Box::pin(async move {
            if fails {
                let mut response = http::Response::new(Bytes::from_static(b"{}"));
                *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
                response.headers_mut().insert("retry-after", http::HeaderValue::from_static("1"));
                return Err(OperatorFailure { details: "portcullis.operator.crashed".to_owned(), response });
            }
            let uri = request.uri().to_string();
            let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes);
            let length = body.map_or("broken".to_owned(), |body| body.len().to_string());
            let answer = Full::new(Bytes::from(format!("{uri} {length}")));
            Ok(http::Response::new(answer.map_err(|never| -> BodyError { match never {} }).boxed_unsync()))
        })
    }

    fn metrics(&self) -> Vec<(String, u64)> {
        vec![(
            "portcullis_operator_requests_total.operator.hello".to_owned(),
            *self.called.lock().expect("the counter"),
        )]
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
    assert_eq!(*host.applied.lock().expect("the names"), ["hello", "fails"]);
    let mut client = Client::connect(proxy.address());
    let get = client.exchange("GET /hello/a?b HTTP/1.1\r\nHost: op.example\r\n\r\n");
    assert_eq!((get.status, get.text().as_str()), (200, "http://op.example/hello/a?b 0"));
    client.send(format!("POST /hello HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n{}", "x".repeat(500_000)));
    assert_eq!(client.response(false).expect("a response").text(), "http://a/hello 500000");
    let chunked =
        client.exchange("POST /hello HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    assert_eq!(chunked.text(), "http://a/hello 3");
    assert_eq!(client.exchange("GET /guarded HTTP/1.1\r\nHost: a\r\n\r\n").status, 403);
    assert_eq!(*host.called.lock().expect("the counter"), 3);
    let failed = client.exchange("GET /fails HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((failed.status, failed.field("retry-after")), (503, Some("1")));
    assert_eq!(proxy.metric("portcullis_operator_requests_total{operator=\"hello\"}"), 4.0);
    assert!(proxy.end().contains(" 503 portcullis.operator.crashed "));
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
