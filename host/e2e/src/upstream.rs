//! An upstream that records what it was asked and answers from a script.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use http_body_util::combinators::BoxBody;
use hyper::body::Incoming;
use hyper::header::{HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis_harness::{Callout, CalloutAnswer, FieldLines, ObservedRequest, ResponsePlan};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::Sleep;

use crate::grpc;

/// A server on loopback. Dropping it ends it.
pub struct Upstream {
    address: SocketAddr,
    state: Shared,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// Without a script everything is answered with 200.
    answers: Option<Vec<Callout>>,
    /// With their numbers: a request may outlive the test's interest in it.
    requests: Vec<(u64, ObservedRequest)>,
    requests_total: u64,
}

type Shared = Arc<Mutex<State>>;

impl Upstream {
    /// Starts one that answers 200 and `ok`.
    pub fn start() -> Result<Upstream, String> {
        let fail = |error: std::io::Error| format!("the test's upstream cannot start: {error}");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail)?;
        let state = Arc::new(Mutex::new(State::default()));
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            runtime.block_on(async move {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                let accept = async {
                    while let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(converse(stream, Arc::clone(&shared)));
                    }
                };
                tokio::select! {
                    () = accept => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Upstream { address, state, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Says what it answers from now on: the first answer that fits, or 404.
    pub fn answer(&self, answers: Vec<Callout>) {
        self.lock().answers = Some(answers);
    }

    /// Says that it answers everything the same way from now on.
    pub fn answer_always(&self, response: ResponsePlan) {
        self.answer(vec![Callout::always(response)]);
    }

    /// What it was asked since the last call.
    pub fn take_requests(&self) -> Vec<ObservedRequest> {
        std::mem::take(&mut self.lock().requests).into_iter().map(|(_, request)| request).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It fails only if the thread has ended.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Speaks HTTP/1.1 or, with prior knowledge, HTTP/2. How the connection ends concerns nobody here.
async fn converse(stream: TcpStream, state: Shared) {
    let mut first = [0; 3];
    loop {
        match stream.peek(&mut first).await {
            Ok(read) if read == first.len() => break,
            // Less than that is nothing but a slow network, or the end.
            Ok(read) if read > 0 => tokio::time::sleep(Duration::from_millis(1)).await,
            _ => return,
        }
    }
    let service = service_fn(move |request| serve(request, Arc::clone(&state)));
    let stream = TokioIo::new(stream);
    // `PRI * HTTP/2.0` is how HTTP/2 begins (RFC 9113, section 3.4).
    if first == *b"PRI" {
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await;
    } else {
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await;
    }
}

async fn serve(request: Request<Incoming>, state: Shared) -> Result<Response<Answer>, Unanswered> {
    let (head, mut body) = request.into_parts();
    let mut observed = ObservedRequest {
        method: head.method.to_string(),
        path: head.uri.path_and_query().map_or_else(|| head.uri.to_string(), ToString::to_string),
        authority: head.uri.authority().map(ToString::to_string).unwrap_or_default(),
        fields: FieldLines::new(),
        ..ObservedRequest::default()
    };
    for (name, value) in &head.headers {
        if name == "host" {
            observed.authority = String::from_utf8_lossy(value.as_bytes()).into_owned();
        } else {
            observed.fields.push(name.as_str(), value.as_bytes());
        }
    }
    let content_type = head.headers.get("content-type").map(HeaderValue::as_bytes).unwrap_or_default();
    let is_grpc = content_type.starts_with(b"application/grpc");
    let path = observed.path.clone();
    // Noted before the body is read, so that a request which is broken off is seen too.
    let note = Note::begin(&state, observed);
    // A gRPC stream is answered while it lasts, everything else when all of it is there.
    let mut callout = if is_grpc { note.choose(&path) } else { None };
    if let Some(Callout { delay, answer: CalloutAnswer::Grpc(plan), .. }) = callout {
        tokio::time::sleep(delay).await;
        return Ok(grpc::respond(plan, body, note).await);
    }
    while let Some(frame) = body.frame().await {
        // The client is gone, and nobody waits for an answer.
        let Ok(frame) = frame else { return Err(Unanswered) };
        note.add(frame);
    }
    note.complete();
    if !is_grpc {
        callout = note.choose(&path);
    }
    let Some(callout) = callout else {
        return Ok(response(&ResponsePlan::new(404).body("the script has no answer to this call"), Ending::Whole));
    };
    if !callout.delay.is_zero() {
        tokio::time::sleep(callout.delay).await;
    }
    match callout.answer {
        CalloutAnswer::Response(plan) => Ok(response(&plan, Ending::Whole)),
        CalloutAnswer::Grpc(_) => Ok(response(&ResponsePlan::new(415), Ending::Whole)),
        // The connection ends without an answer; the host makes a 503 of it, as of one that was refused.
        CalloutAnswer::Refused => Err(Unanswered),
        CalloutAnswer::Timeout => std::future::pending().await,
        CalloutAnswer::Reset => {
            // Of a message of gRPC, less than its length.
            let begun = if is_grpc { "\0\0\0" } else { "cut off" };
            Ok(response(&ResponsePlan::new(200).body(begun), Ending::Broken))
        }
    }
}

/// A request among those that the upstream was asked.
pub(crate) struct Note {
    state: Shared,
    number: u64,
}

impl Note {
    fn begin(state: &Shared, request: ObservedRequest) -> Note {
        let number = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.requests_total += 1;
            let number = state.requests_total;
            state.requests.push((number, request));
            number
        };
        Note { state: Arc::clone(state), number }
    }

    fn change(&self, change: impl FnOnce(&mut ObservedRequest)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, request)) = state.requests.iter_mut().find(|(number, _)| *number == self.number) {
            change(request);
        }
    }

    pub(crate) fn add(&self, frame: Frame<Bytes>) {
        self.change(|request| match frame.into_data() {
            Ok(data) => request.body.extend_from_slice(&data),
            Err(frame) => {
                for (name, value) in &frame.into_trailers().unwrap_or_default() {
                    request.trailers.push(name.as_str(), value.as_bytes());
                }
            }
        });
    }

    pub(crate) fn complete(&self) {
        self.change(|request| request.complete = true);
    }

    /// The answer of the script, which counts as given.
    fn choose(&self, path: &str) -> Option<Callout> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut state.answers {
            Some(answers) => Callout::choose(answers, path),
            None => Some(Callout::always(ResponsePlan::default())),
        }
    }
}

/// The body of an answer.
pub(crate) type Answer = BoxBody<Bytes, Unanswered>;

/// How a response ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// As HTTP has it.
    Whole,
    /// With the connection, before the message does.
    Broken,
}

/// Ends the connection, or the stream, without a response or in the middle of one.
#[derive(Debug)]
pub(crate) struct Unanswered;

impl std::fmt::Display for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the script gives no answer")
    }
}

impl std::error::Error for Unanswered {}

fn response(plan: &ResponsePlan, ending: Ending) -> Response<Answer> {
    let length = match (plan.body.as_slice(), plan.trailers.is_empty()) {
        _ if ending == Ending::Broken => None,
        ([], true) => Some(0),
        ([body], true) => Some(body.len() as u64),
        _ => None,
    };
    let body = Scripted {
        length,
        pieces: plan.body.iter().cloned().map(Bytes::from).collect(),
        trailers: (!plan.trailers.is_empty()).then(|| header_map(&plan.trailers)),
        ending,
        written: None,
    };
    let mut response = Response::new(body.boxed());
    *response.status_mut() = StatusCode::from_u16(plan.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *response.headers_mut() = header_map(&plan.fields);
    response
}

pub(crate) fn header_map(lines: &FieldLines) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines.iter() {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value)) {
            map.append(name, value);
        }
    }
    map
}

/// A body in the pieces that the script gives.
struct Scripted {
    length: Option<u64>,
    pieces: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
    ending: Ending,
    /// Set where it breaks off: HTTP/2 drops what is not yet written when a stream does.
    written: Option<Pin<Box<Sleep>>>,
}

impl Body for Scripted {
    type Data = Bytes;
    type Error = Unanswered;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Unanswered>>> {
        let frame = match self.pieces.pop_front() {
            Some(piece) => Some(Frame::data(piece)),
            None if self.ending == Ending::Broken => {
                let written = || Box::pin(tokio::time::sleep(Duration::from_millis(50)));
                ready!(self.written.get_or_insert_with(written).as_mut().poll(cx));
                return Poll::Ready(Some(Err(Unanswered)));
            }
            None => self.trailers.take().map(Frame::trailers),
        };
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        let nothing_follows = self.pieces.is_empty() && self.trailers.is_none();
        nothing_follows && self.ending == Ending::Whole
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
