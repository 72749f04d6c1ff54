//! TLS and HTTP/2, towards clients and towards upstreams.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::support::{Folder, GUEST_ROUTE, PLAIN_ROUTE, Proxy, Received, Upstream, denying_guest, policy_yaml};

pub(crate) const TLS: &str = "tls: { certificate: cert.pem, private_key: key.pem } }]";

/// Writes a certificate for `localhost`, signed by itself.
pub(crate) fn certificate(folder: &Folder) -> String {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let pem = made.cert.pem();
    folder.write("cert.pem", &pem).write("key.pem", made.signing_key.serialize_pem());
    pem
}

pub(crate) fn connector(pem: &str, alpn: &[&[u8]]) -> TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM")).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

fn request(method: &str, uri: &str, body: &'static str) -> http::Request<Full<Bytes>> {
    http::Request::builder()
        .method(method)
        .uri(uri)
        .body(Full::new(Bytes::from_static(body.as_bytes())))
        .expect("a request")
}

async fn over_http2<S>(stream: S, requests: Vec<http::Request<Full<Bytes>>>) -> Vec<(u16, String)>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("a handshake");
    tokio::spawn(connection);
    let mut answers = Vec::new();
    for request in requests {
        let response = sender.send_request(request).await.expect("a response");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        answers.push((status, String::from_utf8_lossy(&body).into_owned()));
    }
    answers
}

async fn tls(address: SocketAddr, pem: &str, alpn: &[&[u8]]) -> tokio_rustls::client::TlsStream<TcpStream> {
    let stream = TcpStream::connect(address).await.expect("a connection");
    connector(pem, alpn).connect(ServerName::try_from("localhost").expect("a name"), stream).await.expect("TLS")
}

#[test]
fn serves_http2_with_prior_knowledge_and_joins_cookies() {
    let upstream = Upstream::echo();
    let proxy = Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)));
    let address = proxy.address();
    let mut cookies = request("GET", "http://test.example/a", "");
    cookies.headers_mut().append("cookie", "a=1".parse().expect("a value"));
    cookies.headers_mut().append("cookie", "b=2".parse().expect("a value"));
    let mut elsewhere = request("GET", "http://test.example/b", "");
    elsewhere.headers_mut().insert("host", "other.example".parse().expect("a value"));
    let answers = block_on(async {
        let stream = TcpStream::connect(address).await.expect("a connection");
        over_http2(stream, vec![cookies, request("POST", "http://test.example/c", "body"), elsewhere]).await
    });
    assert_eq!(answers.iter().map(|(status, _)| *status).collect::<Vec<_>>(), [200, 200, 400]);
    let received = upstream.received();
    assert_eq!(received.len(), 2);
    assert_eq!((received[0].field("cookie"), received[0].field("host")), (Some("a=1; b=2"), Some("test.example")));
    assert_eq!((received[1].body.as_slice(), received[1].field("content-length")), (&b"body"[..], Some("4")));
}

#[test]
fn serves_http1_and_http2_over_tls() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    let pem = certificate(&folder);
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE).replacen("}]", &format!(", {TLS}"), 1);
    let proxy = Proxy::start(folder.policy(&yaml));
    let address = proxy.address();
    block_on(async {
        let stream = tls(address, &pem, &[b"h2"]).await;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let answers = over_http2(stream, vec![request("GET", "https://localhost/2", "")]).await;
        assert_eq!(answers[0].0, 200);

        let stream = tls(address, &pem, &[b"http/1.1"]).await;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
        tokio::spawn(connection);
        let mut http1 = request("GET", "/1", "");
        http1.headers_mut().insert("host", "localhost".parse().expect("a value"));
        assert_eq!(sender.send_request(http1).await.expect("a response").status(), 200);
    });
    let received = upstream.received();
    assert_eq!(received.iter().map(Received::path).collect::<Vec<_>>(), ["/2", "/1"]);
    assert!(received.iter().all(|received| received.field("x-forwarded-proto") == Some("https")));
}

#[test]
fn filters_guard_http2_too() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    folder.write("guest.wasm", denying_guest());
    let proxy = Proxy::start(folder.policy(&policy_yaml(upstream.address, GUEST_ROUTE)));
    let address = proxy.address();
    let answers = block_on(async {
        let stream = TcpStream::connect(address).await.expect("a connection");
        over_http2(stream, vec![request("GET", "http://a/", ""), request("POST", "http://a/", "body")]).await
    });
    assert_eq!(answers, [(403, "denied".to_owned()), (403, "denied".to_owned())]);
    assert_eq!(upstream.received().len(), 0);
}

#[test]
fn an_upstream_is_believed_only_with_a_certificate_of_its_authority() {
    // The second proxy is the first one's upstream, over TLS and HTTP/2.
    let upstream = Upstream::echo();
    let inner_folder = Folder::new();
    let pem = certificate(&inner_folder);
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE).replacen("}]", &format!(", {TLS}"), 1);
    let inner = Proxy::start(inner_folder.policy(&yaml));
    let outer = |ca: &str, http2: bool| {
        let folder = Folder::new();
        folder.write("ca.pem", ca);
        let tls = format!("\"], http2: {http2}, tls: {{ server_name: localhost, ca: ca.pem }} }}");
        Proxy::start(folder.policy(&policy_yaml(inner.address(), PLAIN_ROUTE).replace("\"] }", &tls)))
    };
    for http2 in [true, false] {
        let response = outer(&pem, http2).get("/through");
        assert_eq!(response.status, 200, "{}", response.text());
    }
    let stranger = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate").cert.pem();
    let response = outer(&stranger, true).get("/");
    assert_eq!(response.status, 503, "{}", response.text());
    assert_eq!(upstream.received().len(), 2);
}

#[test]
fn a_key_that_does_not_belong_to_the_certificate_is_refused_by_name() {
    let folder = Folder::new();
    certificate(&folder);
    let cert = std::fs::read(folder.path().join("cert.pem")).expect("the certificate");
    certificate(&folder);
    folder.write("cert.pem", cert);
    let upstream = Upstream::echo();
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE).replacen("}]", &format!(", {TLS}"), 1);
    let message = match Proxy::start_with(folder.policy(&yaml), None) {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    };
    assert!(message.contains("cert.pem") && message.contains("key.pem") && message.contains("hint: "), "{message}");
}
