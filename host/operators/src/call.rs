//! The way of one request to an operator and back.
//!
//! Runs on the caller's own runtime: connections to a process are kept per thread, so that a worker shares nothing with
//! another on this path but a few counters.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{HOST, HeaderMap, HeaderName, HeaderValue, TE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, Uri, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;

use crate::body::{BodyError, is_too_long};
use crate::cause::Cause;
use crate::egress::{is_hop_by_hop, strip};
use crate::engine::{INTERNAL_AUTHORITY, OUTCOME};
use crate::pool::Pool;
use crate::process::{Flight, Process, Slot};

/// Why an operator did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("operator `{operator}`: {cause}")]
pub struct OperatorError {
    /// Whose fault, and what the client is told.
    pub cause: Cause,
    /// Which operator.
    pub operator: String,
    /// In development only: what the handler threw, with positions in its sources.
    pub detail: Option<String>,
}

/// As [`OperatorError`], before it is known whose.
struct CallFailed {
    cause: Cause,
    detail: Option<String>,
}

impl From<Cause> for CallFailed {
    fn from(cause: Cause) -> Self {
        Self { cause, detail: None }
    }
}

impl OperatorError {
    pub(crate) fn new(cause: Cause, operator: &str) -> Self {
        Self { cause, operator: operator.to_owned(), detail: None }
    }

    /// A problem document (RFC 9457) for the client. It holds nothing about the operator but the reason, unless the host is
    /// one for development.
    #[must_use]
    pub fn to_response(&self, request_id: Option<&str>) -> Response<Bytes> {
        let (status, id, title) = self.cause.row();
        let mut problem = serde_json::json!({
            "type": format!("urn:portcullis:problem:{id}"),
            "title": title,
            "status": status.as_u16(),
            "reason": id,
        });
        for (name, value) in [("request_id", request_id), ("detail", self.detail.as_deref())] {
            if let (Some(value), Some(problem)) = (value, problem.as_object_mut()) {
                problem.insert(name.to_owned(), value.into());
            }
        }
        let mut response = Response::new(Bytes::from(problem.to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.cause.retry_after_seconds() {
            headers.insert(http::header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

type RequestBody = UnsyncBoxBody<Bytes, BodyError>;

thread_local! {
    /// Idle connections of this thread's runtime, by process.
    static IDLE: RefCell<HashMap<u64, Vec<SendRequest<RequestBody>>>> = RefCell::default();
}

/// Idle connections kept for one process on one thread.
const IDLE_MAX: usize = 32;

fn take_idle(process: u64) -> Option<SendRequest<RequestBody>> {
    IDLE.with_borrow_mut(|idle| idle.get_mut(&process).and_then(Vec::pop))
}

fn keep_idle(process: &Process, sender: SendRequest<RequestBody>) {
    IDLE.with_borrow_mut(|idle| {
        if !process.is_alive() {
            idle.remove(&process.id);
            return;
        }
        // Processes come and go; what ended while this thread was not looking goes here.
        if idle.len() > 64 {
            idle.retain(|_, senders| senders.iter().any(|sender| !sender.is_closed()));
        }
        let senders = idle.entry(process.id).or_default();
        if senders.len() < IDLE_MAX {
            senders.push(sender);
        }
    });
}

async fn open(process: &Process) -> Result<SendRequest<RequestBody>, Cause> {
    let stream = process.connect().await.map_err(|error| {
        tracing::warn!(process = process.id, "cannot connect to an operator: {error}");
        Cause::Crashed
    })?;
    let (sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_headers(128)
        .max_buf_size(64 << 10)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| Cause::Crashed)?;
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// Carries a request to an operator.
pub(crate) async fn call<B>(pool: &Arc<Pool>, request: Request<B>) -> Result<Response<OperatorBody>, OperatorError>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BodyError>,
{
    let mut process = 0;
    carry(pool, request, &mut process).await.map_err(|failed| {
        pool.failed(process, failed.cause, "a request was not answered by its operator");
        OperatorError { detail: failed.detail, ..OperatorError::new(failed.cause, &pool.operator.name) }
    })
}

/// `process` is told which one has the request, as soon as one has.
async fn carry<B>(
    pool: &Arc<Pool>,
    request: Request<B>,
    process: &mut u64,
) -> Result<Response<OperatorBody>, CallFailed>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BodyError>,
{
    let limits = &pool.operator.limits;
    let (mut parts, body) = request.into_parts();
    if is_too_long(Some(body.size_hint().lower()), limits.request_bytes) {
        return Err(Cause::RequestBytes.into());
    }
    prepare(&mut parts)?;
    let flight = Arc::new(pool.acquire().await?);
    *process = flight.process.id;
    let upload = if body.is_end_stream() {
        flight.slot().into_iter().for_each(Slot::set_uploaded);
        Empty::new().map_err(|never| match never {}).boxed_unsync()
    } else {
        let most = usize::try_from(limits.request_bytes).unwrap_or(usize::MAX);
        let inner = Limited::new(body.map_err(Into::into).boxed_unsync(), most);
        Upload { inner, flight: Arc::clone(&flight) }.boxed_unsync()
    };
    if flight.process.abilities.keeps_limits {
        // So that it can say why a body that has begun breaks off.
        parts.headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    let request = Request::from_parts(parts, upload);
    let answered = tokio::select! {
        biased;
        cause = flight.cancelled() => return Err(cause.into()),
        answered = exchange(&flight.process, request) => answered,
    };
    let (sender, response) = match answered {
        Ok(answered) => answered,
        Err(Failed::Request(cause)) => return Err(cause.into()),
        Err(Failed::Connection) => return Err(why_it_broke(&flight).await.into()),
    };
    let response = unless_failed(pool, &flight, response).await?;
    let (parts, body) = accept(response, limits.response_bytes)?.into_parts();
    let body = OperatorBody {
        inner: body,
        left: limits.response_bytes,
        state: Some(Open { flight, sender, pool: Arc::clone(pool) }),
    };
    Ok(Response::from_parts(parts, body))
}

/// What an operator gets to see of a request: absolute form, so that `request.url` is the client's, and no field that
/// describes a connection.
fn prepare(parts: &mut http::request::Parts) -> Result<(), Cause> {
    if matches!(parts.method, Method::CONNECT | Method::TRACE) {
        return Err(Cause::RequestRefused);
    }
    let host = || parts.headers.get(HOST).and_then(|value| Authority::try_from(value.as_bytes()).ok());
    let authority = parts.uri.authority().cloned().or_else(host).ok_or(Cause::RequestRefused)?;
    // Whatever the port: under this name the host talks to the engine.
    if authority.host().trim_end_matches('.').eq_ignore_ascii_case(INTERNAL_AUTHORITY)
        || authority.as_str().contains('@')
    {
        return Err(Cause::RequestRefused);
    }
    let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let path = if path.as_str().starts_with('/') { path } else { PathAndQuery::from_static("/") };
    parts.headers.insert(HOST, HeaderValue::from_str(authority.as_str()).map_err(|_| Cause::RequestRefused)?);
    parts.uri = Uri::builder()
        .scheme(parts.uri.scheme().cloned().unwrap_or(Scheme::HTTP))
        .authority(authority)
        .path_and_query(path)
        .build()
        .map_err(|_| Cause::RequestRefused)?;
    parts.version = Version::HTTP_11;
    strip_request(&mut parts.headers);
    Ok(())
}

/// Like [`strip`], but what filters say about the client (`x-portcullis-*`) is for the operator to read.
fn strip_request(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(http::header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // A client must not be able to take a filter's word away.
        .filter(|name: &HeaderName| !name.as_str().starts_with("x-portcullis-"))
        .collect();
    let unwanted: Vec<HeaderName> = headers.keys().filter(|name| is_hop_by_hop(name)).cloned().chain(named).collect();
    for name in unwanted {
        headers.remove(name);
    }
    headers.remove(http::header::EXPECT);
}

enum Failed {
    Request(Cause),
    Connection,
}

async fn exchange(
    process: &Process,
    mut request: Request<RequestBody>,
) -> Result<(SendRequest<RequestBody>, Response<Incoming>), Failed> {
    loop {
        let (mut sender, fresh) = match take_idle(process.id) {
            Some(sender) => (sender, false),
            None => (open(process).await.map_err(|_| Failed::Connection)?, true),
        };
        if sender.ready().await.is_err() {
            if fresh {
                return Err(Failed::Connection);
            }
            continue;
        }
        match sender.try_send_request(request).await {
            Ok(response) => return Ok((sender, response)),
            Err(mut error) => {
                // Given back unsent: the idle connection had ended.
                if let (Some(unsent), false) = (error.take_message(), fresh) {
                    request = unsent;
                    continue;
                }
                let error = error.into_error();
                if let Some(cause) = upload_failed(&error) {
                    return Err(Failed::Request(cause));
                }
                let refused = error.is_parse() || error.is_parse_status() || error.is_parse_too_large();
                return Err(if refused { Failed::Request(Cause::ResponseRefused) } else { Failed::Connection });
            }
        }
    }
}

/// The client's part in an error of the exchange.
fn upload_failed(error: &(dyn std::error::Error + 'static)) -> Option<Cause> {
    let mut current = Some(error);
    while let Some(error) = current {
        if error.is::<http_body_util::LengthLimitError>() {
            return Some(Cause::RequestBytes);
        }
        if let Some(error) = error.downcast_ref::<UploadError>() {
            return Some(if upload_is_too_long(error) { Cause::RequestBytes } else { Cause::ClientGone });
        }
        current = error.source();
    }
    None
}

fn upload_is_too_long(error: &UploadError) -> bool {
    error.0.is::<http_body_util::LengthLimitError>()
}

/// The connection broke: usually because the process ended, which is known a moment later.
async fn why_it_broke(flight: &Flight) -> Cause {
    let wait = std::time::Duration::from_secs(2);
    tokio::time::timeout(wait, flight.cancelled()).await.unwrap_or(Cause::Crashed)
}

/// The response, unless the engine says by it that there is none of the operator's. Where the handler threw, the body is the
/// stack, in development.
async fn unless_failed(
    pool: &Pool,
    flight: &Flight,
    response: Response<Incoming>,
) -> Result<Response<Incoming>, CallFailed> {
    const STACK_BYTES_MAX: usize = 64 << 10;
    let outcome = response.headers().get(OUTCOME).and_then(|outcome| Cause::from_outcome(outcome.as_bytes()));
    let Some(cause) = outcome.filter(|cause| cause.status() == response.status()) else { return Ok(response) };
    if response.body().size_hint().exact() == Some(0) {
        return Err(cause.into());
    }
    // Whoever forges the mark outside of development only sends a response.
    if !pool.dev {
        return Ok(response);
    }
    let stack = Limited::new(response.into_body(), STACK_BYTES_MAX).collect();
    tokio::select! {
        biased;
        cause = flight.cancelled() => Err(cause.into()),
        stack = stack => {
            let text = stack.map(|stack| String::from_utf8_lossy(&stack.to_bytes()).into_owned()).ok();
            Err(CallFailed { cause, detail: text.map(|text| pool.bundle.in_sources(&text)) })
        }
    }
}

/// What of an operator's response may be passed on.
fn accept(mut response: Response<Incoming>, bytes_max: u64) -> Result<Response<Incoming>, Cause> {
    let status = response.status();
    // 1xx would leave the client waiting; 101 would hand it the connection.
    if !(200..=599).contains(&status.as_u16()) {
        return Err(Cause::ResponseRefused);
    }
    if is_too_long(response.body().size_hint().exact(), bytes_max) {
        return Err(Cause::ResponseBytes);
    }
    strip(response.headers_mut());
    Ok(response)
}

/// The client's body on its way in: counted, and known to be complete or not.
struct Upload {
    inner: Limited<RequestBody>,
    flight: Arc<Flight>,
}

#[derive(Debug, thiserror::Error)]
#[error("the request body: {0}")]
struct UploadError(BodyError);

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = std::task::ready!(Pin::new(&mut self.inner).poll_frame(context));
        if let Some(Err(error)) = polled {
            return Poll::Ready(Some(Err(UploadError(error).into())));
        }
        if (polled.is_none() || self.inner.is_end_stream())
            && let Some(slot) = self.flight.slot()
        {
            slot.set_uploaded();
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// An operator's response body. Ends with an error, and the connection with it, when a limit is reached.
pub struct OperatorBody {
    inner: Incoming,
    left: u64,
    state: Option<Open>,
}

struct Open {
    flight: Arc<Flight>,
    sender: SendRequest<RequestBody>,
    pool: Arc<Pool>,
}

impl fmt::Debug for OperatorBody {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("OperatorBody").field("left", &self.left).finish_non_exhaustive()
    }
}

impl OperatorBody {
    fn fail(&mut self, cause: Cause) -> OperatorError {
        let operator = self.state.take().map_or_else(String::new, |open| {
            open.pool.failed(open.flight.process.id, cause, "a response was cut");
            open.pool.operator.name.clone()
        });
        OperatorError { cause, operator, detail: None }
    }

    fn finish(&mut self) {
        if let Some(open) = self.state.take() {
            keep_idle(&open.flight.process, open.sender);
        }
    }
}

impl Body for OperatorBody {
    type Data = Bytes;
    type Error = OperatorError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, OperatorError>>> {
        let Some(open) = &self.state else { return Poll::Ready(None) };
        if let Poll::Ready(cause) = open.flight.poll_cancelled(context) {
            let error = self.fail(cause);
            return Poll::Ready(Some(Err(error)));
        }
        match std::task::ready!(Pin::new(&mut self.inner).poll_frame(context)) {
            None => {
                self.finish();
                Poll::Ready(None)
            }
            Some(Err(_)) => {
                let error = self.fail(Cause::Crashed);
                Poll::Ready(Some(Err(error)))
            }
            Some(Ok(frame)) => {
                let outcome = frame.trailers_ref().map(|trailers| trailers.get(OUTCOME));
                if let Some(outcome) = outcome {
                    // An operator sends no trailers; its engine does when it ended the operator.
                    return match outcome.and_then(|outcome| Cause::from_outcome(outcome.as_bytes())) {
                        Some(cause) => {
                            let error = self.fail(cause);
                            Poll::Ready(Some(Err(error)))
                        }
                        None => {
                            self.finish();
                            Poll::Ready(None)
                        }
                    };
                }
                let length = frame.data_ref().map_or(0, |data| u64::try_from(data.len()).unwrap_or(u64::MAX));
                if length > self.left {
                    let error = self.fail(Cause::ResponseBytes);
                    return Poll::Ready(Some(Err(error)));
                }
                self.left -= length;
                if self.inner.is_end_stream() {
                    self.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.state.is_none() || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for OperatorBody {
    fn drop(&mut self) {
        // A consumer that believes `is_end_stream` never polls an empty body.
        if self.inner.is_end_stream() {
            self.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(uri: &str, fields: &[(&'static str, &'static str)]) -> Result<http::request::Parts, Cause> {
        let mut request = Request::builder().uri(uri).body(()).unwrap();
        for (name, value) in fields {
            request.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        let (mut parts, ()) = request.into_parts();
        prepare(&mut parts).map(|()| parts)
    }

    #[test]
    fn the_operator_sees_the_clients_address() {
        let parts = prepared("/a?b=c", &[("host", "api.example.com:8443")]).unwrap();
        assert_eq!(parts.uri, "http://api.example.com:8443/a?b=c");
        let parts = prepared("https://api.example.com/a", &[("host", "other")]).unwrap();
        assert_eq!(parts.uri, "https://api.example.com/a");
        assert_eq!(parts.headers["host"], "api.example.com");
    }

    #[test]
    fn clients_cannot_speak_to_the_engine() {
        for uri in [
            "http://portcullis.internal/load",
            "http://PORTCULLIS.internal:80/load",
            "http://portcullis.internal./load",
            "http://x@portcullis.internal/load",
            "http://x@api.example.com/",
        ] {
            assert_eq!(prepared(uri, &[]).err(), Some(Cause::RequestRefused), "{uri}");
        }
        assert_eq!(prepared("/load", &[("host", "portcullis.internal")]).err(), Some(Cause::RequestRefused));
        assert_eq!(prepared("/load", &[]).err(), Some(Cause::RequestRefused));
    }

    #[test]
    fn fields_of_the_connection_are_removed_and_identity_is_kept() {
        let fields = [
            ("host", "a"),
            ("connection", "upgrade, x-portcullis-sub, x-mine"),
            ("upgrade", "websocket"),
            ("x-portcullis-sub", "alice"),
            ("x-mine", "1"),
            ("expect", "100-continue"),
            ("accept", "*/*"),
        ];
        let parts = prepared("/", &fields).unwrap();
        let mut names: Vec<_> = parts.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "host", "x-portcullis-sub"]);
    }

    #[test]
    fn the_client_gets_a_problem_document() {
        let error = OperatorError::new(Cause::Concurrency, "secret-name");
        let response = error.to_response(Some("r-1"));
        assert_eq!(response.status(), http::StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()["retry-after"], "1");
        let text = std::str::from_utf8(response.body()).unwrap();
        assert!(text.contains("\"reason\":\"operator_concurrency\"") && text.contains("r-1"));
        assert!(!text.contains("secret-name"));
    }
}
