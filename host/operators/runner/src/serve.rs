//! The process at work: connections in, requests to the isolate, answers out.

use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming as HyperBody;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::Arguments;
use crate::bridge::{AnswerBody, Arriving, BodyError, BodyLimits, Bridge, Closed, Exchange, Outcome};
use crate::contract::{INTERNAL_AUTHORITY, Load, LoadFailure, READY};
use crate::host::{OnThisThread, Services};
use crate::isolate::{Incoming, IncomingBody, Isolate, Options, Surroundings};
use crate::log::Output;
use crate::watch::{CpuLimits, MemoryCheck, Verdict, Watch};
use crate::{confine, memory};

/// Longest code that is taken, with everything that comes with it.
const LOAD_BYTES_MAX: usize = 128 << 20;
/// Bodies up to this length that arrive together with their request are handed over with it.
const WHOLE_BODY_BYTES_MAX: u64 = 64 << 10;
/// How long cryptography may go on that an isolate began which is gone.
const CRYPTOGRAPHY_GRACE: Duration = Duration::from_millis(500);
const HEADERS_MAX: usize = 128;
const HEADERS_BYTES_MAX: usize = 64 << 10;

/// What a connection brings.
enum Event {
    Request(Box<Arrived>),
    Load(Box<Load>, oneshot::Sender<Result<(), LoadFailure>>),
    Ping(oneshot::Sender<()>),
    Stop,
}

struct Arrived {
    parts: http::request::Parts,
    body: ArrivedBody,
    answer: oneshot::Sender<Response<AnswerBody>>,
    /// The number that it gets, for the connection to know.
    id: Rc<std::cell::Cell<Option<u32>>>,
}

enum ArrivedBody {
    None,
    Whole(Bytes),
    Arriving(Arriving),
}

/// Why the process ends, if not for an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The host asked for it.
    Asked,
    /// Code that belongs to no request in flight used more CPU time than allowed.
    BackgroundCpu,
}

/// Runs until the process is asked to end, or must.
pub(crate) async fn run(arguments: &Arguments) -> io::Result<Ended> {
    let listener = UnixListener::bind(&arguments.listen)?;
    let output = Rc::new(RefCell::new(Output::open()?));
    // Before any other work, so that everything that needs a thread has one.
    tokio::task::spawn_blocking(|| {}).await.map_err(io::Error::other)?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let watch = Watch::start(MemoryCheck { is_full: memory::is_full, is_too_much: memory::is_too_much })?;
    let (closed, closings) = mpsc::unbounded_channel();
    let none = BodyLimits { request: 0, response: 0 };
    let bridge = Rc::new(RefCell::new(Bridge::new(none, closed.clone())));
    let (settled, mut is_settled) = mpsc::unbounded_channel::<()>();
    let surroundings = Surroundings {
        bridge: Rc::clone(&bridge),
        output: Rc::clone(&output),
        watch: watch.clone(),
        settled: Rc::new(move || {
            let _ = settled.send(());
        }),
    };
    let isolate = Isolate::new(arguments.options, &surroundings).map_err(|failure| unusable(&failure))?;
    let services = Services::connect(&arguments.host).await?;
    bridge.borrow_mut().set_host(Rc::new(services));
    memory::limit(arguments.memory_bytes);
    confine::confine(arguments.interpreter_only)?;
    output.borrow_mut().write(&format!("{READY}\n"));

    let (events, received) = mpsc::unbounded_channel();
    let engine = Engine {
        options: arguments.options,
        surroundings,
        isolate: Some(isolate),
        load: None,
        is_loaded: false,
        events: received,
        closings,
    };
    let accepting = tokio::task::spawn_local(accept(listener, events.clone(), closed, Rc::clone(&bridge)));
    tokio::select! {
        result = engine.run() => result,
        result = accepting => result.map_err(io::Error::other)?.map(|()| Ended::Asked),
        () = async {
            terminate.recv().await;
            let _ = events.send(Event::Stop);
            is_settled.recv().await;
        } => Ok(Ended::Asked),
    }
}

async fn accept(
    listener: UnixListener,
    events: mpsc::UnboundedSender<Event>,
    closed: mpsc::UnboundedSender<u32>,
    bridge: Rc<RefCell<Bridge>>,
) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::task::spawn_local(connection(stream, events.clone(), closed.clone(), Rc::clone(&bridge)));
    }
}

async fn connection(
    stream: UnixStream,
    events: mpsc::UnboundedSender<Event>,
    closed: mpsc::UnboundedSender<u32>,
    bridge: Rc<RefCell<Bridge>>,
) {
    let ways = Rc::new((events, closed, bridge));
    let service = service_fn(move |request| {
        let ways = Rc::clone(&ways);
        async move {
            let (events, closed, bridge) = &*ways;
            Ok::<_, Infallible>(answer(request, events, closed, bridge).await)
        }
    });
    let mut builder = auto::Builder::new(OnThisThread);
    builder.http1().max_headers(HEADERS_MAX).max_buf_size(HEADERS_BYTES_MAX);
    builder.http2().max_header_list_size(64 << 10);
    // The host sees the same and says why.
    drop(builder.serve_connection(TokioIo::new(stream), service).await);
}

/// One request, from the engine's own or for the operator.
async fn answer(
    request: Request<HyperBody>,
    events: &mpsc::UnboundedSender<Event>,
    closed: &mpsc::UnboundedSender<u32>,
    bridge: &Rc<RefCell<Bridge>>,
) -> Response<AnswerBody> {
    if request.uri().host() == Some(INTERNAL_AUTHORITY) {
        return control(request, events).await;
    }
    let limit = bridge.borrow().limits().request;
    let (parts, body) = request.into_parts();
    let Ok(body) = gather(body, limit).await else { return plain(StatusCode::BAD_REQUEST) };
    let (answer, answered) = oneshot::channel();
    let id = Rc::new(std::cell::Cell::new(None));
    let arrived = Arrived { parts, body, answer, id: Rc::clone(&id) };
    if events.send(Event::Request(Box::new(arrived))).is_err() {
        return plain(StatusCode::SERVICE_UNAVAILABLE);
    }
    // Dropped before there is an answer when the client goes.
    let mut waiting = Waiting { id, closed, answered: false };
    let response = answered.await;
    waiting.answered = true;
    response.unwrap_or_else(|_| Outcome::Bystander.to_response(None))
}

struct Waiting<'a> {
    id: Rc<std::cell::Cell<Option<u32>>>,
    closed: &'a mpsc::UnboundedSender<u32>,
    answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let (false, Some(id)) = (self.answered, self.id.get()) {
            drop(Closed::new(id, self.closed.clone()));
        }
    }
}

/// What of a body is here already: all of it, usually.
async fn gather(mut body: HyperBody, limit: u64) -> Result<ArrivedBody, BodyError> {
    if body.is_end_stream() {
        return Ok(ArrivedBody::None);
    }
    let mut gathered = BytesMut::new();
    if body.size_hint().upper().is_some_and(|length| length <= WHOLE_BODY_BYTES_MAX) {
        loop {
            let polled = std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut body).poll_frame(context))).await;
            match polled {
                Poll::Pending => break,
                Poll::Ready(None) => return Ok(ArrivedBody::Whole(gathered.freeze())),
                Poll::Ready(Some(Err(error))) => return Err(error.into()),
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        gathered.extend_from_slice(&data);
                    }
                    if body.is_end_stream() {
                        return Ok(ArrivedBody::Whole(gathered.freeze()));
                    }
                }
            }
        }
    }
    let rest = Limited::new(body, usize::try_from(limit).unwrap_or(usize::MAX));
    Ok(ArrivedBody::Arriving(Box::pin(Rest { gathered: gathered.freeze(), rest })))
}

/// A body of which a part has been read.
struct Rest {
    gathered: Bytes,
    rest: Limited<HyperBody>,
}

impl Body for Rest {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.gathered.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.gathered)))));
        }
        Pin::new(&mut self.rest).poll_frame(context)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

async fn control(request: Request<HyperBody>, events: &mpsc::UnboundedSender<Event>) -> Response<AnswerBody> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/ping") => {
            let (answer, answered) = oneshot::channel();
            let _ = events.send(Event::Ping(answer));
            // Answered by the loop that the isolate runs in, so that it means something.
            plain(if answered.await.is_ok() { StatusCode::NO_CONTENT } else { StatusCode::SERVICE_UNAVAILABLE })
        }
        (&Method::POST, "/load") => {
            let body = Limited::new(request.into_body(), LOAD_BYTES_MAX).collect().await;
            let document = body.map_err(|error| LoadFailure::new(error.to_string())).and_then(|body| {
                serde_json::from_slice(&body.to_bytes()).map_err(|error| LoadFailure::new(error.to_string()))
            });
            let loaded = match document {
                Ok(document) => {
                    let (answer, answered) = oneshot::channel();
                    let _ = events.send(Event::Load(document, answer));
                    answered.await.unwrap_or_else(|_| Err(LoadFailure::new("the engine ends")))
                }
                Err(failure) => Err(failure),
            };
            match loaded {
                Ok(()) => plain(StatusCode::OK),
                Err(failure) => {
                    let text = serde_json::to_vec(&failure).unwrap_or_default();
                    let mut response = Response::new(AnswerBody::full(text.into()));
                    *response.status_mut() = StatusCode::UNPROCESSABLE_ENTITY;
                    response
                }
            }
        }
        _ => plain(StatusCode::NOT_FOUND),
    }
}

fn plain(status: StatusCode) -> Response<AnswerBody> {
    let mut response = Response::new(AnswerBody::full(Bytes::new()));
    *response.status_mut() = status;
    response
}

fn unusable(failure: &LoadFailure) -> io::Error {
    io::Error::other(format!("no isolate can be made: {}", failure.message))
}

/// The isolate and what it is fed.
struct Engine {
    options: Options,
    surroundings: Surroundings,
    isolate: Option<Isolate>,
    load: Option<Load>,
    is_loaded: bool,
    events: mpsc::UnboundedReceiver<Event>,
    closings: mpsc::UnboundedReceiver<u32>,
}

impl Engine {
    async fn run(mut self) -> io::Result<Ended> {
        loop {
            let watch = self.surroundings.watch.clone();
            let next = tokio::select! {
                biased;
                next = std::future::poll_fn(|context| self.poll(context)) => next?,
                () = watch.decided() => Next::Decided,
            };
            match next {
                Next::Decided => {
                    if let Some(verdict) = self.surroundings.watch.verdict() {
                        let told = self.tell(verdict).await;
                        if verdict == Verdict::BackgroundCpu {
                            self.surroundings.output.borrow_mut().write(&format!("{told}: the process ends\n"));
                            return Ok(Ended::BackgroundCpu);
                        }
                        self.replace(told).await?;
                    }
                }
                Next::Load(load, answer) => {
                    let result = self.load(*load).await;
                    let _ = answer.send(result);
                }
            }
        }
    }

    /// Everything that happens without waiting for anything but events.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Next>> {
        let mut was_polled = false;
        loop {
            if self.surroundings.watch.verdict().is_some() {
                return Poll::Ready(Ok(Next::Decided));
            }
            let mut idle = true;
            while let Poll::Ready(Some(id)) = self.closings.poll_recv(context) {
                self.close(id);
                idle = false;
            }
            // A few at a time: their answers should not wait for the last one.
            for _ in 0..16 {
                match self.events.poll_recv(context) {
                    Poll::Ready(Some(Event::Request(arrived))) => self.dispatch(*arrived),
                    Poll::Ready(Some(Event::Ping(answer))) => drop(answer.send(())),
                    Poll::Ready(Some(Event::Load(load, answer))) => return Poll::Ready(Ok(Next::Load(load, answer))),
                    Poll::Ready(Some(Event::Stop)) => {
                        if let Some(isolate) = &mut self.isolate {
                            isolate.stop();
                        }
                    }
                    Poll::Ready(None) => return Poll::Ready(Err(io::Error::other("nothing accepts connections"))),
                    Poll::Pending => break,
                }
                idle = false;
                if self.surroundings.watch.verdict().is_some() {
                    return Poll::Ready(Ok(Next::Decided));
                }
            }
            // With nothing new, the isolate has said already that it waits.
            if idle && was_polled {
                return Poll::Pending;
            }
            was_polled = true;
            if let Some(isolate) = &mut self.isolate
                && let Poll::Ready(Err(error)) = isolate.poll(context)
                && self.surroundings.watch.verdict().is_none()
            {
                self.surroundings.output.borrow_mut().write(&format!("{error}\n"));
            }
            self.surroundings.output.borrow_mut().flush();
        }
    }

    fn dispatch(&mut self, arrived: Arrived) {
        let Arrived { mut parts, body, answer, id: known } = arrived;
        // About this connection, and none of the operator's business.
        parts.headers.remove(http::header::TE);
        let (Some(isolate), true) = (&mut self.isolate, self.is_loaded) else {
            let _ = answer.send(plain(StatusCode::SERVICE_UNAVAILABLE));
            return;
        };
        let request_id = parts.headers.get("x-request-id").map(|id| id.as_bytes().to_vec());
        let url = parts.uri.to_string();
        let (id, body) = {
            let mut bridge = self.surroundings.bridge.borrow_mut();
            let id = bridge.new_id();
            known.set(Some(id));
            let uploads = matches!(body, ArrivedBody::Arriving(_));
            bridge.begin(id, Exchange { fields: parts.headers, answer, uploads });
            let body = match body {
                ArrivedBody::None => IncomingBody::None,
                ArrivedBody::Whole(body) => IncomingBody::Whole(body),
                ArrivedBody::Arriving(body) => {
                    bridge.read(id, body);
                    IncomingBody::Arriving
                }
            };
            (id, body)
        };
        self.surroundings.watch.begin(id);
        let method = parts.method.as_str();
        isolate.dispatch(Incoming { id, method, url: &url, request_id: request_id.as_deref(), body });
    }

    fn close(&mut self, id: u32) {
        let was_waiting = self.surroundings.bridge.borrow().fields(id).is_some();
        self.surroundings.bridge.borrow_mut().close(id);
        self.surroundings.watch.end(id);
        if was_waiting && let Some(isolate) = &mut self.isolate {
            isolate.gone(id);
        }
    }

    async fn load(&mut self, load: Load) -> Result<(), LoadFailure> {
        if self.load.is_some() {
            return Err(LoadFailure::new("this process has an operator already"));
        }
        let limits = load.limits;
        let bodies = BodyLimits { request: limits.request_bytes, response: limits.response_bytes };
        self.surroundings.bridge.borrow_mut().set_limits(bodies);
        let result = match &mut self.isolate {
            Some(isolate) => isolate.load(&load).await,
            None => Err(LoadFailure::new("there is no isolate")),
        };
        self.surroundings.watch.limit(CpuLimits {
            request: Duration::from_millis(limits.cpu_milliseconds),
            background: Duration::from_millis(limits.background_cpu_milliseconds),
        });
        self.is_loaded = result.is_ok();
        self.load = Some(load);
        result
    }

    /// Something went over a limit: answers whoever waits, and says what it was.
    async fn tell(&self, verdict: Verdict) -> &'static str {
        let told = {
            let mut bridge = self.surroundings.bridge.borrow_mut();
            match verdict {
                Verdict::CpuTime(id) => {
                    bridge.abandon(Outcome::CpuTime, |other| other == id);
                    "a request used more CPU time than allowed"
                }
                Verdict::BackgroundCpu => {
                    bridge.abandon(Outcome::Bystander, |_| true);
                    "code between requests used more CPU time than allowed"
                }
                Verdict::Memory => {
                    bridge.abandon(Outcome::Memory, |_| true);
                    "more memory was needed than allowed"
                }
            }
        };
        // Their answers leave before anything is taken apart.
        tokio::task::yield_now().await;
        told
    }

    /// Puts another isolate in the place of this one, whose operator may be between any two steps.
    async fn replace(&mut self, told: &str) -> io::Result<()> {
        if let Some(isolate) = self.isolate.take() {
            isolate.discard();
        }
        // The isolate is gone, but not what it had begun on the other thread, where nothing can be ended.
        let free = tokio::time::timeout(CRYPTOGRAPHY_GRACE, tokio::task::spawn_blocking(|| {})).await;
        if !matches!(free, Ok(Ok(()))) {
            return Err(io::Error::other(format!("{told}, and cryptography goes on: the process ends")));
        }
        self.surroundings.output.borrow_mut().write(&format!("{told}: the isolate was replaced\n"));
        let mut isolate = Isolate::new(self.options, &self.surroundings).map_err(|failure| unusable(&failure))?;
        if let Some(load) = &self.load {
            isolate.load(load).await.map_err(|failure| io::Error::other(failure.message))?;
        }
        self.isolate = Some(isolate);
        Ok(())
    }
}

enum Next {
    Decided,
    Load(Box<Load>, oneshot::Sender<Result<(), LoadFailure>>),
}
