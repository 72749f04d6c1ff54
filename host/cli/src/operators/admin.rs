//! `/metrics` and `/readyz` of `portcullis operators run`, which has no proxy around it.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use portcullis_proxy::OperatorHost;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::Host;

/// Connections at a time: scrapers and probes need a handful.
const CONNECTIONS_MAX: usize = 16;
const HEAD_TIME: Duration = Duration::from_secs(10);

/// Serves on the current runtime.
pub(super) fn serve(address: SocketAddr, host: Arc<Host>) -> io::Result<()> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    tracing::info!("admin on http://{}", listener.local_addr()?);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
            let host = Arc::clone(&host);
            tokio::spawn(async move {
                let service = service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&host, &request))));
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIME)
                    .max_buf_size(16 * 1024)
                    .serve_connection(TokioIo::new(stream), service);
                // A prober that hangs up concerns nobody.
                drop(connection.await);
                drop(place);
            });
        }
    });
    Ok(())
}

fn answer(host: &Host, request: &Request<Incoming>) -> Response<Full<bytes::Bytes>> {
    let (status, text) = match request.uri().path() {
        "/metrics" => (StatusCode::OK, portcullis_proxy::counters_text(&host.metrics())),
        "/readyz" => (StatusCode::OK, "ready\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "there are /metrics and /readyz\n".to_owned()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    response
}
