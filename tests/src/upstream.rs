//! An upstream that records what it was asked and answers from a script.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use portcullis_harness::{Callout, CalloutAnswer, FieldLines, ObservedRequest, ResponsePlan};
use tokio::sync::oneshot;

/// A server on loopback. Dropping it ends it.
pub struct Upstream {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// Without a script everything is answered with 200.
    answers: Option<Vec<Callout>>,
    requests: Vec<ObservedRequest>,
}

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
                        let state = Arc::clone(&shared);
                        let service = service_fn(move |request| serve(request, Arc::clone(&state)));
                        tokio::spawn(
                            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                        );
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
        std::mem::take(&mut self.lock().requests)
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

async fn serve(request: Request<Incoming>, state: Arc<Mutex<State>>) -> Result<Response<Scripted>, Unanswered> {
    let (head, mut body) = request.into_parts();
    let mut observed = ObservedRequest {
        method: head.method.to_string(),
        path: head.uri.path_and_query().map_or_else(|| head.uri.to_string(), ToString::to_string),
        authority: String::new(),
        fields: FieldLines::new(),
        complete: true,
        ..ObservedRequest::default()
    };
    for (name, value) in &head.headers {
        if name == "host" {
            observed.authority = String::from_utf8_lossy(value.as_bytes()).into_owned();
        } else {
            observed.fields.push(name.as_str(), value.as_bytes());
        }
    }
    // Noted before the body is read, so that a request which is broken off is seen too.
    let index = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.requests.push(ObservedRequest { complete: false, ..observed.clone() });
        state.requests.len() - 1
    };
    while let Some(frame) = body.frame().await {
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) => observed.body.extend_from_slice(&data),
            Ok(Err(frame)) => {
                if let Ok(trailers) = frame.into_trailers() {
                    for (name, value) in &trailers {
                        observed.trailers.push(name.as_str(), value.as_bytes());
                    }
                }
            }
            Err(_) => {
                observed.complete = false;
                break;
            }
        }
    }
    let callout = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let path = observed.path.clone();
        if let Some(noted) = state.requests.get_mut(index) {
            *noted = observed;
        }
        match &mut state.answers {
            Some(answers) => Callout::choose(answers, &path),
            None => Some(Callout::always(ResponsePlan::default())),
        }
    };
    let Some(callout) = callout else {
        return Ok(response(&ResponsePlan::new(404).body("the script has no answer to this call"), Ending::Whole));
    };
    if !callout.delay.is_zero() {
        tokio::time::sleep(callout.delay).await;
    }
    match callout.answer {
        CalloutAnswer::Response(plan) => Ok(response(&plan, Ending::Whole)),
        // The connection ends without an answer; the host makes a 503 of it, as of one that was refused.
        CalloutAnswer::Refused => Err(Unanswered),
        CalloutAnswer::Timeout => std::future::pending().await,
        CalloutAnswer::Reset => Ok(response(&ResponsePlan::new(200).body("cut off"), Ending::Broken)),
    }
}

/// How a response ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// As HTTP has it.
    Whole,
    /// With the connection, before the message does.
    Broken,
}

/// Ends the connection without a response.
#[derive(Debug)]
struct Unanswered;

impl std::fmt::Display for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the script gives no answer")
    }
}

impl std::error::Error for Unanswered {}

fn response(plan: &ResponsePlan, ending: Ending) -> Response<Scripted> {
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
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(plan.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *response.headers_mut() = header_map(&plan.fields);
    response
}

fn header_map(lines: &FieldLines) -> HeaderMap {
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
}

impl Body for Scripted {
    type Data = Bytes;
    type Error = Unanswered;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Unanswered>>> {
        let frame = match self.pieces.pop_front() {
            Some(piece) => Some(Frame::data(piece)),
            None if self.ending == Ending::Broken => return Poll::Ready(Some(Err(Unanswered))),
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
