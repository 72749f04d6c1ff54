//! What passes between an operator's isolate and the rest of the process: requests, bodies, calls to the host.
//!
//! Plain data and channels. Nothing here knows a socket, and nothing here is JavaScript; the operations on it that an
//! isolate has are in [`crate::ops`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use tokio::sync::{Notify, mpsc, oneshot};

/// What a body ended with when not with its own end.
pub(crate) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A body that arrives: a client's, or that of an answer from the host.
pub(crate) type Arriving = Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>>;

/// Tells the host why a request has no answer of its operator's.
pub(crate) const OUTCOME_FIELD: HeaderName = HeaderName::from_static("x-portcullis-outcome");

/// Chunks of a body that may wait for whoever takes them.
const CHUNKS_WAITING: usize = 4;

/// Calls to the host that may be under way at once, and wait for their turn.
const CALLS_MAX: usize = 1024;

/// Why a request ends without its operator's answer, in the words of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The handler threw, or returned no response.
    Exception,
    /// It used more CPU time than one request may.
    CpuTime,
    /// The isolate used more memory than it may.
    Memory,
    /// Its response body is longer than allowed.
    ResponseBytes,
    /// Another request cost the isolate.
    Bystander,
}

impl Outcome {
    /// As the host reads it.
    pub(crate) fn id(self) -> &'static str {
        match self {
            Self::Exception => "exception",
            Self::CpuTime => "cpu_time",
            Self::Memory => "memory",
            Self::ResponseBytes => "response_bytes",
            Self::Bystander => "bystander",
        }
    }

    fn status(self) -> StatusCode {
        match self {
            Self::Exception | Self::ResponseBytes => StatusCode::INTERNAL_SERVER_ERROR,
            Self::CpuTime | Self::Memory | Self::Bystander => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The whole answer where there is none yet. In development the body says more.
    pub(crate) fn to_response(self, text: Option<String>) -> Response<AnswerBody> {
        let mut response = Response::new(AnswerBody::full(text.map(Bytes::from).unwrap_or_default()));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(OUTCOME_FIELD, HeaderValue::from_static(self.id()));
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    }
}

/// Speaks to the host. The only way out of the process.
pub(crate) trait Host {
    /// Sends a request to the host's services and returns its answer.
    fn call(&self, request: Request<Departing>)
    -> Pin<Box<dyn Future<Output = Result<Response<Arriving>, BodyError>>>>;
}

/// A request that waits for its operator.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// Its field lines.
    pub(crate) fields: HeaderMap,
    /// Where its answer goes.
    pub(crate) answer: oneshot::Sender<Response<AnswerBody>>,
    /// Whether its client still sends a body.
    pub(crate) uploads: bool,
}

/// A body that JavaScript reads.
pub(crate) struct Reading {
    body: RefCell<Option<Arriving>>,
    cancelled: Notify,
    is_cancelled: Cell<bool>,
}

impl Reading {
    fn new(body: Arriving) -> Rc<Self> {
        Rc::new(Self { body: RefCell::new(Some(body)), cancelled: Notify::new(), is_cancelled: Cell::new(false) })
    }

    /// The next chunk; none at the end.
    pub(crate) async fn next(&self) -> Result<Option<Bytes>, BodyError> {
        // A stream pulls one chunk at a time; whoever comes in between finds the body taken.
        let Some(mut body) = self.body.borrow_mut().take() else { return Ok(None) };
        let chunk = tokio::select! {
            chunk = next_chunk(&mut body) => chunk,
            () = self.cancelled.notified() => return Ok(None),
        };
        if matches!(chunk, Ok(Some(_))) && !self.is_cancelled.get() {
            self.body.borrow_mut().replace(body);
        }
        chunk
    }

    pub(crate) fn cancel(&self) {
        self.is_cancelled.set(true);
        self.body.borrow_mut().take();
        self.cancelled.notify_one();
    }
}

/// The next data of a body; trailers are passed over.
pub(crate) async fn next_chunk(body: &mut Arriving) -> Result<Option<Bytes>, BodyError> {
    loop {
        match std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await {
            None => return Ok(None),
            Some(Err(error)) => return Err(error),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Ok(Some(data)),
                Err(_) => {}
            },
        }
    }
}

/// A body that JavaScript writes.
#[derive(Clone, Debug)]
pub(crate) struct Writing {
    chunks: mpsc::Sender<Bytes>,
    ending: Rc<Cell<Ending>>,
    left: Rc<Cell<u64>>,
}

/// How a written body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Its writer went without a word.
    Broken,
    /// As it should.
    Whole,
    /// For a reason that the host is told.
    Outcome(Outcome),
}

impl Writing {
    /// A body of at most so many bytes, and where it is taken from.
    pub(crate) fn new(bytes_max: u64) -> (Self, Departing) {
        let (chunks, taken) = mpsc::channel(CHUNKS_WAITING);
        let ending = Rc::new(Cell::new(Ending::Broken));
        let departing = Departing { chunks: taken, ending: Rc::clone(&ending), has_ended: false };
        (Self { chunks, ending, left: Rc::new(Cell::new(bytes_max)) }, departing)
    }

    /// Hands over a chunk. False when the next one must wait for [`Writing::room`].
    ///
    /// # Errors
    /// When the body becomes longer than allowed. It has ended then.
    pub(crate) fn write(&self, chunk: Bytes) -> Result<bool, TooLong> {
        let length = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        let Some(left) = self.left.get().checked_sub(length) else {
            self.ending.set(Ending::Outcome(Outcome::ResponseBytes));
            return Err(TooLong);
        };
        self.left.set(left);
        // Only one chunk is written between two waits, and the channel has room for it.
        Ok(self.chunks.try_send(chunk).is_ok() && self.chunks.capacity() > 0)
    }

    /// Waits until there is room; false when nobody takes the body any more.
    pub(crate) async fn room(&self) -> bool {
        self.chunks.reserve().await.is_ok()
    }

    pub(crate) fn end(&self, ending: Ending) {
        if self.ending.get() == Ending::Broken {
            self.ending.set(ending);
        }
    }
}

/// A written body is longer than allowed.
#[derive(Debug, thiserror::Error)]
#[error("the body is longer than allowed")]
pub(crate) struct TooLong;

/// A written body broke off.
#[derive(Debug, thiserror::Error)]
#[error("the body broke off")]
pub(crate) struct BrokeOff;

/// The other end of [`Writing`].
#[derive(Debug)]
pub(crate) struct Departing {
    chunks: mpsc::Receiver<Bytes>,
    ending: Rc<Cell<Ending>>,
    has_ended: bool,
}

impl Departing {
    /// A body that is known.
    pub(crate) fn whole(bytes: Bytes) -> Self {
        let (chunks, taken) = mpsc::channel(1);
        if !bytes.is_empty() {
            // Its capacity is one.
            let _ = chunks.try_send(bytes);
        }
        Self { chunks: taken, ending: Rc::new(Cell::new(Ending::Whole)), has_ended: false }
    }
}

impl Body for Departing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        if let Some(chunk) = std::task::ready!(self.chunks.poll_recv(context)) {
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        self.has_ended = true;
        match self.ending.get() {
            Ending::Whole => Poll::Ready(None),
            Ending::Broken => Poll::Ready(Some(Err(BrokeOff.into()))),
            Ending::Outcome(outcome) => {
                let fields = HeaderMap::from_iter([(OUTCOME_FIELD, HeaderValue::from_static(outcome.id()))]);
                Poll::Ready(Some(Ok(Frame::trailers(fields))))
            }
        }
    }
}

/// A response's body, as the connection takes it.
#[derive(Debug)]
pub(crate) struct AnswerBody {
    kind: AnswerKind,
    closed: Option<Closed>,
}

#[derive(Debug)]
enum AnswerKind {
    Full(Bytes),
    Departing(Departing),
}

impl AnswerBody {
    pub(crate) fn full(bytes: Bytes) -> Self {
        Self { kind: AnswerKind::Full(bytes), closed: None }
    }

    fn departing(body: Departing) -> Self {
        Self { kind: AnswerKind::Departing(body), closed: None }
    }

    /// Says when the connection has done with it.
    pub(crate) fn with_closed(mut self, closed: Closed) -> Self {
        self.closed = Some(closed);
        self
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.kind {
            AnswerKind::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            AnswerKind::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            AnswerKind::Departing(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(&self.kind, AnswerKind::Full(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            AnswerKind::Full(bytes) => SizeHint::with_exact(u64::try_from(bytes.len()).unwrap_or(u64::MAX)),
            AnswerKind::Departing(_) => SizeHint::default(),
        }
    }
}

/// Says, when dropped, that a request is over.
#[derive(Debug)]
pub(crate) struct Closed {
    id: u32,
    tell: mpsc::UnboundedSender<u32>,
}

impl Closed {
    pub(crate) fn new(id: u32, tell: mpsc::UnboundedSender<u32>) -> Self {
        Self { id, tell }
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        // Nobody listens while the process ends.
        let _ = self.tell.send(self.id);
    }
}

/// What a request may cost in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyLimits {
    pub(crate) request: u64,
    pub(crate) response: u64,
}

/// Everything that is under way.
pub(crate) struct Bridge {
    host: Option<Rc<dyn Host>>,
    limits: BodyLimits,
    exchanges: HashMap<u32, Exchange>,
    readings: HashMap<u32, Rc<Reading>>,
    writings: HashMap<u32, Writing>,
    calls: HashMap<u32, Rc<Notify>>,
    next_id: u32,
    closed: mpsc::UnboundedSender<u32>,
}

impl Bridge {
    pub(crate) fn new(limits: BodyLimits, closed: mpsc::UnboundedSender<u32>) -> Self {
        Self {
            host: None,
            limits,
            exchanges: HashMap::new(),
            readings: HashMap::new(),
            writings: HashMap::new(),
            calls: HashMap::new(),
            next_id: 1,
            closed,
        }
    }

    pub(crate) fn set_host(&mut self, host: Rc<dyn Host>) {
        self.host = Some(host);
    }

    pub(crate) fn set_limits(&mut self, limits: BodyLimits) {
        self.limits = limits;
    }

    pub(crate) fn host(&self) -> Option<Rc<dyn Host>> {
        self.host.clone()
    }

    pub(crate) fn limits(&self) -> BodyLimits {
        self.limits
    }

    /// A number that nothing under way has. One space for requests, bodies and calls.
    pub(crate) fn new_id(&mut self) -> u32 {
        loop {
            let id = self.next_id;
            // Small enough for a V8 small integer on every platform.
            self.next_id = if id >= 0x3fff_ffff { 1 } else { id + 1 };
            let taken = self.exchanges.contains_key(&id)
                || self.readings.contains_key(&id)
                || self.writings.contains_key(&id)
                || self.calls.contains_key(&id);
            if !taken {
                return id;
            }
        }
    }

    pub(crate) fn begin(&mut self, id: u32, exchange: Exchange) {
        self.exchanges.insert(id, exchange);
    }

    pub(crate) fn fields(&self, id: u32) -> Option<&HeaderMap> {
        self.exchanges.get(&id).map(|exchange| &exchange.fields)
    }

    pub(crate) fn read(&mut self, id: u32, body: Arriving) {
        self.readings.insert(id, Reading::new(body));
    }

    pub(crate) fn reading(&self, id: u32) -> Option<Rc<Reading>> {
        self.readings.get(&id).map(Rc::clone)
    }

    pub(crate) fn writing(&self, id: u32) -> Option<Writing> {
        self.writings.get(&id).cloned()
    }

    /// Lets a body be written under a number.
    fn write(&mut self, id: u32, bytes_max: u64) -> Departing {
        let (writing, departing) = Writing::new(bytes_max);
        self.writings.insert(id, writing);
        departing
    }

    pub(crate) fn end_reading(&mut self, id: u32) {
        if let Some(reading) = self.readings.remove(&id) {
            reading.cancel();
        }
    }

    pub(crate) fn end_writing(&mut self, id: u32, ending: Ending) {
        if let Some(writing) = self.writings.remove(&id) {
            writing.end(ending);
        }
    }

    /// Answers a request with a body that is known. False when nobody waits for it any more.
    pub(crate) fn answer(&mut self, id: u32, response: Response<Bytes>) -> bool {
        let Some(exchange) = self.exchanges.remove(&id) else { return false };
        let length = u64::try_from(response.body().len()).unwrap_or(u64::MAX);
        let response = if length > self.limits.response {
            Outcome::ResponseBytes.to_response(None)
        } else {
            response.map(AnswerBody::full)
        };
        let closed = Closed::new(id, self.closed.clone());
        // A client that still uploads is listened to until the connection has done with the answer.
        let response = if exchange.uploads { response.map(|body| body.with_closed(closed)) } else { response };
        exchange.answer.send(response).is_ok()
    }

    /// Answers a request with a body that is written under its number.
    pub(crate) fn answer_slowly(&mut self, id: u32, response: Response<()>) -> bool {
        let Some(exchange) = self.exchanges.remove(&id) else { return false };
        let body = self.write(id, self.limits.response);
        let mut response = self.closing(id, response.map(|()| AnswerBody::departing(body)));
        // Announces what may come instead of the body's own end.
        response.headers_mut().insert(http::header::TRAILER, HeaderValue::from_static("x-portcullis-outcome"));
        exchange.answer.send(response).is_ok()
    }

    fn closing(&self, id: u32, response: Response<AnswerBody>) -> Response<AnswerBody> {
        let closed = Closed::new(id, self.closed.clone());
        response.map(|body| body.with_closed(closed))
    }

    /// Ends a request that has no answer yet, for a reason that the host is told.
    pub(crate) fn refuse(&mut self, id: u32, outcome: Outcome, text: Option<String>) {
        if let Some(exchange) = self.exchanges.remove(&id) {
            let response = self.closing(id, outcome.to_response(text));
            let _ = exchange.answer.send(response);
        }
    }

    /// A request is over, answered or not: what it left goes.
    pub(crate) fn close(&mut self, id: u32) {
        self.exchanges.remove(&id);
        self.end_reading(id);
        self.end_writing(id, Ending::Broken);
    }

    /// Registers a call to the host; none when too many are under way.
    pub(crate) fn open_call(&mut self) -> Option<u32> {
        if self.calls.len() >= CALLS_MAX {
            return None;
        }
        let id = self.new_id();
        self.calls.insert(id, Rc::new(Notify::new()));
        Some(id)
    }

    /// Lets a call's request body be written under the call's number. The host limits its length.
    pub(crate) fn upload(&mut self, id: u32) -> Departing {
        self.write(id, u64::MAX)
    }

    pub(crate) fn call(&self, id: u32) -> Option<Rc<Notify>> {
        self.calls.get(&id).map(Rc::clone)
    }

    pub(crate) fn abort_call(&self, id: u32) {
        if let Some(call) = self.calls.get(&id) {
            call.notify_one();
        }
    }

    pub(crate) fn close_call(&mut self, id: u32) {
        self.calls.remove(&id);
        self.end_writing(id, Ending::Broken);
    }

    /// The isolate is gone: every request that it had not answered ends, those in `culprits` for `outcome`.
    pub(crate) fn abandon(&mut self, outcome: Outcome, is_culprit: impl Fn(u32) -> bool) {
        let of = |id: u32| if is_culprit(id) { outcome } else { Outcome::Bystander };
        let waiting: Vec<u32> = self.exchanges.keys().copied().collect();
        for id in waiting {
            self.refuse(id, of(id), None);
        }
        for (id, writing) in self.writings.drain() {
            writing.end(Ending::Outcome(of(id)));
        }
        for (_, reading) in self.readings.drain() {
            reading.cancel();
        }
        self.calls.clear();
    }
}
