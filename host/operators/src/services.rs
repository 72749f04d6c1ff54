//! What the host offers an operator's process, on a socket inside its private directory: outgoing requests and the
//! store. Whoever is at the other end is known by the socket and checked against the kernel's word.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::body::BodyError;
use crate::egress::{Egress, Refusal};
use crate::kv::KvError;
use crate::pool::Pool;
use crate::process::Process;

type Body = UnsyncBoxBody<Bytes, BodyError>;

/// Connections, or calls over one connection, that one process may have open to the host at once.
const CONNECTIONS_MAX: usize = 64;
const LIST_MAX: usize = 1000;
/// How long a call waits for its refusal when there were too many before it.
const UNPAID: Duration = Duration::from_millis(100);

/// Serves one process until it has ended.
pub(crate) async fn serve(process: Arc<Process>, listener: UnixListener, egress: Egress) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut exited = process.exited.subscribe();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = exited.wait_for(Option::is_some) => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        if process.check_peer(&stream).is_err() {
            continue;
        }
        let process = Arc::clone(&process);
        let egress = egress.clone();
        tokio::spawn(async move {
            connection(process, stream, egress).await;
            drop(place);
        });
    }
}

async fn connection(process: Arc<Process>, stream: UnixStream, egress: Egress) {
    let mut exited = process.exited.subscribe();
    let multiplexes = process.abilities.multiplexes;
    let service = service_fn(move |request| {
        let process = Arc::clone(&process);
        let egress = egress.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(&process, &egress, request).await) }
    });
    let stream = TokioIo::new(stream);
    let serving = async {
        if multiplexes {
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(u32::try_from(CONNECTIONS_MAX).unwrap_or(1))
                .max_header_list_size(64 << 10)
                .serve_connection(stream, service);
            drop(connection.await);
        } else {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(None)
                .max_headers(128)
                .max_buf_size(64 << 10)
                .serve_connection(stream, service);
            drop(connection.await);
        }
    };
    tokio::select! {
        () = serving => {}
        _ = exited.wait_for(Option::is_some) => {}
    }
}

async fn answer(process: &Process, egress: &Egress, request: Request<Incoming>) -> Response<Body> {
    // Before it belongs to an operator nothing is granted.
    let Some(assigned) = process.assigned.get() else { return status(StatusCode::FORBIDDEN) };
    let pool = &assigned.pool;
    let operator = &pool.operator;
    // Every call costs, also to the store and to nowhere: all operators share the thread that answers.
    if !assigned.spend() {
        tokio::time::sleep(UNPAID).await;
        let most = operator.limits.subrequests;
        let text = format!("more than {most} outgoing requests and uses of the store for one incoming request");
        let refusal = Refusal::new("subrequests", text);
        pool.counters.count_subrequest(Some(&refusal));
        return refused(&refusal);
    }
    let path = request.uri().path();
    if path == "/fetch" {
        let result = egress.fetch(&operator.grants, &operator.limits, request).await;
        pool.counters.count_subrequest(result.as_ref().err());
        return result.unwrap_or_else(|refusal| {
            pool.log.write(process.id, format!("refused: {}", refusal.message));
            refused(&refusal)
        });
    }
    if path == "/kv" || path.starts_with("/kv/") {
        let result = key_value(pool, request).await;
        pool.counters.count_subrequest(result.as_ref().err());
        return result.unwrap_or_else(|refusal| refused(&refusal));
    }
    status(StatusCode::NOT_FOUND)
}

async fn key_value(pool: &Pool, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
    let missing = || Refusal::new("kv", "needs kv; add `kv: true` to its `permissions`");
    let store = pool.store.clone().ok_or_else(missing)?;
    let (parts, body) = request.into_parts();
    let refuse = |error: KvError| {
        if let KvError::Io(error) = &error {
            tracing::error!(operator = %pool.operator.name, "store: {error}");
        }
        Refusal::new("kv", error.to_string())
    };
    let Some(key) = parts.uri.path().strip_prefix("/kv/") else {
        let prefix = parts.uri.query().and_then(|query| query.strip_prefix("prefix=")).unwrap_or_default();
        let prefix = percent_decoded(prefix).ok_or_else(|| refuse(KvError::Key))?;
        let keys = store.list(&prefix, LIST_MAX);
        let text = serde_json::to_vec(&keys).unwrap_or_default();
        return Ok(Response::new(full(text)));
    };
    let key = percent_decoded(key).ok_or_else(|| refuse(KvError::Key))?;
    let quota = pool.operator.kv_bytes_max.unwrap_or(0);
    let value = if parts.method == Method::PUT {
        let most = usize::try_from(quota).unwrap_or(usize::MAX);
        let body = Limited::new(body, most).collect().await.map_err(|_| refuse(KvError::Quota(quota)))?;
        body.to_bytes()
    } else {
        Bytes::new()
    };
    // Files are small, but a disk may be slow: not on the thread that watches every operator.
    let method = parts.method;
    let done = tokio::task::spawn_blocking(move || match method {
        Method::GET => store.get(&key),
        Method::PUT => store.put(&key, &value).map(|()| Some(Vec::new())),
        Method::DELETE => store.delete(&key).map(|()| Some(Vec::new())),
        _ => Ok(None),
    });
    let done = done.await.map_err(|_| Refusal::new("kv", "the store cannot be used"))?.map_err(refuse)?;
    Ok(done.map_or_else(|| status(StatusCode::NOT_FOUND), |value| Response::new(full(value))))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
        let digits = std::str::from_utf8(digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = rest.get(2..)?;
    }
    String::from_utf8(bytes).ok()
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = status;
    response
}

fn refused(refusal: &Refusal) -> Response<Body> {
    let mut response = Response::new(full(refusal.message.clone()));
    *response.status_mut() = StatusCode::FORBIDDEN;
    response.headers_mut().insert("x-portcullis-refused", HeaderValue::from_static(refusal.reason));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_is_undone_or_refused() {
        assert_eq!(percent_decoded("a%2Fb%C3%A4").as_deref(), Some("a/bä"));
        for bad in ["%", "%2", "%zz", "%ff", "%+1"] {
            assert_eq!(percent_decoded(bad), None, "{bad}");
        }
    }
}
