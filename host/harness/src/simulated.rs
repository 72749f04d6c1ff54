//! [`Harness`]: a filter's `.wasm` on a simulated host. No sockets, no threads that matter, a clock that only scripts move.
//!
//! The guest runs in the very crate that `portcullis serve` runs it in; only what surrounds it is made up here: a
//! client that sends a request piece by piece, an upstream that answers once it has the whole request, and answers
//! to callouts. Time stands still until nothing else is left to happen, then jumps to the next timer or deadline.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use portcullis_abi::{
    Action, Call, CallAnswer, CallId, Direction, Embedder, Ending, Engine, EngineOptions, FieldMap, Lint, LogLevel,
    LogRecord, MetricValue, Module, Part, Plugin, Shared, SharedLimits, StreamId, StreamInfo, Ticker, Worker,
};
use portcullis_code::{Cache, CacheSettings, LoadLimits, Loader};

use crate::message::{FieldLines, LogLine, Observed, ObservedRequest, ObservedResponse};
use crate::scenario::{Callout, CalloutAnswer, RequestPlan, ResponsePlan};
use crate::yaml::reason;

/// What the clock says until it is told otherwise: the first second of 2026.
pub const NOW_DEFAULT: u64 = 1_767_225_600;

/// A filter may hold a request for this long, in simulated time, before the harness gives up on it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest that never returns ends after this much real time; far more than any callback needs on a busy machine.
const CALLBACK_TIME_MAX: Duration = Duration::from_secs(10);

/// Why a filter cannot be tested.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarnessError {
    /// The module cannot be read.
    #[error("{file}: cannot be read: {problem}\n  hint: {hint}")]
    Unreadable {
        /// The module.
        file: String,
        /// What is wrong.
        problem: String,
        /// How to fix it.
        hint: String,
    },
    /// The module is no filter.
    #[error("{file}: {problem}")]
    Module {
        /// The module.
        file: String,
        /// What is wrong, and how to fix it.
        problem: String,
    },
    /// wasmtime cannot run here.
    #[error("{0}")]
    Engine(String),
    /// The filter did not start, or refused its configuration.
    #[error("{0}")]
    Start(String),
}

/// A compiled module, ready to be started with any configuration. Cheap to clone.
#[derive(Clone)]
pub struct Guest {
    name: String,
    module: Module,
    _ticker: Arc<Ticker>,
}

impl Guest {
    /// Reads and compiles a `.wasm` file. The plugin is called as the file is, without `.wasm`.
    pub fn load(file: impl AsRef<Path>) -> Result<Guest, HarnessError> {
        let file = file.as_ref();
        let wasm = std::fs::read(file).map_err(|error| HarnessError::Unreadable {
            file: file.display().to_string(),
            problem: reason(&error),
            hint: "build it first: for the filters of this repository `cargo xtask build-filters`".to_owned(),
        })?;
        let name = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Guest::from_bytes(&name, &wasm).map_err(|error| match error {
            HarnessError::Module { problem, .. } => HarnessError::Module { file: file.display().to_string(), problem },
            other => other,
        })
    }

    /// Compiles a module that is in memory.
    pub fn from_bytes(name: &str, wasm: &[u8]) -> Result<Guest, HarnessError> {
        let engine = Engine::new(&EngineOptions::default()).map_err(|error| HarnessError::Engine(error.to_string()))?;
        let ticker = engine.start_ticker();
        // Compiling takes seconds, and a test run loads the same module many times.
        let cache = portcullis_code::default_directory().and_then(|path| Cache::open(CacheSettings::new(path)).ok());
        let module = Loader::new(engine, cache)
            .and_then(|loader| loader.load(wasm, &LoadLimits::default()))
            .map_err(|error| HarnessError::Module { file: name.to_owned(), problem: error.to_string() })?
            .module;
        Ok(Guest { name: name.to_owned(), module, _ticker: Arc::new(ticker) })
    }

    /// The filter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A harness for this module, not yet started.
    pub fn harness(&self) -> Builder {
        let mut plugin = Plugin::new(self.name.clone(), self.module.clone());
        plugin.limits.callback_time_max = CALLBACK_TIME_MAX;
        plugin.limits.start_time_max = CALLBACK_TIME_MAX;
        Builder { guest: self.clone(), plugin, upstreams: Vec::new(), now: NOW_DEFAULT }
    }
}

/// A harness that was not started yet.
pub struct Builder {
    guest: Guest,
    plugin: Plugin,
    upstreams: Vec<String>,
    now: u64,
}

impl Builder {
    /// The plugin configuration, byte for byte.
    #[must_use]
    pub fn configuration(mut self, configuration: impl Into<Vec<u8>>) -> Builder {
        self.plugin.configuration = configuration.into();
        self
    }

    /// Names an upstream that the filter may call; see [`Harness::answer_callouts`].
    #[must_use]
    pub fn upstream(mut self, name: impl Into<String>) -> Builder {
        self.upstreams.push(name.into());
        self
    }

    /// What the clock says at first, in seconds since 1970.
    #[must_use]
    pub fn now(mut self, seconds: u64) -> Builder {
        self.now = seconds;
        self
    }

    /// Changes whatever else makes a plugin: limits, failure policy, capabilities, root id.
    #[must_use]
    pub fn plugin(mut self, change: impl FnOnce(&mut Plugin)) -> Builder {
        change(&mut self.plugin);
        self
    }

    /// Starts the filter with its configuration.
    pub fn start(self) -> Result<Harness, HarnessError> {
        let world = Rc::new(RefCell::new(World {
            unix: Duration::from_secs(self.now),
            monotonic: Duration::ZERO,
            upstreams: self.upstreams,
            log: Vec::new(),
            lints: Vec::new(),
        }));
        let shared = Shared::new(SharedLimits::default());
        let worker =
            Worker::start(Arc::clone(&shared), vec![Arc::new(self.plugin)], Box::new(SimulatedHost(Rc::clone(&world))))
                .map_err(|error| HarnessError::Start(error.to_string()))?;
        let mut harness = Harness {
            worker,
            shared,
            world,
            callouts: BTreeMap::new(),
            calls: Vec::new(),
            made: BTreeMap::new(),
            requests: 0,
            _guest: self.guest,
        };
        // Callouts made while starting are answered like any other, once their answers are scripted.
        harness.drain(None);
        Ok(harness)
    }
}

struct World {
    unix: Duration,
    monotonic: Duration,
    upstreams: Vec<String>,
    log: Vec<LogLine>,
    lints: Vec<String>,
}

struct SimulatedHost(Rc<RefCell<World>>);

impl Embedder for SimulatedHost {
    fn log(&mut self, record: &LogRecord<'_>) {
        let line = LogLine { level: record.level.as_str().to_owned(), message: record.message.to_owned() };
        self.0.borrow_mut().log.push(line);
    }

    fn unix_nanos(&self) -> u64 {
        u64::try_from(self.0.borrow().unix.as_nanos()).unwrap_or(u64::MAX)
    }

    fn monotonic(&self) -> Duration {
        self.0.borrow().monotonic
    }

    fn has_upstream(&self, name: &str) -> bool {
        self.0.borrow().upstreams.iter().any(|upstream| upstream == name)
    }

    fn log_level(&self) -> LogLevel {
        LogLevel::Debug
    }

    fn lint(&mut self, lint: &Lint<'_>) {
        let text = format!("{} in {}: {}", lint.call, lint.callback, lint.reason);
        let lints = &mut self.0.borrow_mut().lints;
        if !lints.contains(&text) {
            lints.push(text);
        }
    }
}

/// A callout under way.
struct PendingCall {
    id: CallId,
    answer: Option<CallAnswer>,
    /// On the simulated clock; only for calls that nobody answers.
    deadline: Option<Duration>,
}

/// A started filter and its simulated host.
///
/// ```no_run
/// use portcullis_harness::Guest;
///
/// let guest = Guest::load("target/filters/jwt-auth.wasm")?;
/// let configuration = std::fs::read("filters/jwt-auth/config/minimal.json")?;
/// let mut harness = guest.harness().configuration(configuration).start()?;
///
/// let seen = harness.get("/orders/1").field("authorization", "Bearer junk").send();
/// assert_eq!(seen.status(), Some(401));
/// assert_eq!(seen.json()["reason"], "credentials_rejected");
/// assert!(!seen.reached_upstream());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Harness {
    worker: Worker,
    shared: Arc<Shared>,
    world: Rc<RefCell<World>>,
    callouts: BTreeMap<String, Vec<Callout>>,
    calls: Vec<PendingCall>,
    made: BTreeMap<String, Vec<ObservedRequest>>,
    requests: u64,
    // Its ticker bounds callbacks.
    _guest: Guest,
}

impl Harness {
    /// Begins a `GET`.
    pub fn get(&mut self, path: &str) -> RequestBuilder<'_> {
        self.request("GET", path)
    }

    /// Begins a request to `api.example.com`.
    pub fn request(&mut self, method: &str, path: &str) -> RequestBuilder<'_> {
        RequestBuilder { harness: self, request: RequestPlan::new(method, path), response: ResponsePlan::default() }
    }

    /// Moves the clock, and lets every timer run that becomes due on the way.
    pub fn advance(&mut self, by: Duration) {
        let end = self.monotonic() + by;
        while let Some(at) = self.next_event().filter(|at| *at <= end) {
            self.move_clock_to(at);
            self.fire(None);
        }
        self.move_clock_to(end);
    }

    /// Says what an upstream answers from now on; the first answer that fits a call is given.
    pub fn answer_callouts(&mut self, upstream: impl Into<String>, answers: Vec<Callout>) {
        self.callouts.insert(upstream.into(), answers);
    }

    /// Counters and gauges as they stand.
    pub fn counters(&self) -> BTreeMap<String, i64> {
        let numbers = self.shared.metrics().into_iter().filter_map(|metric| match metric.value {
            MetricValue::Number(number) => Some((metric.name, i64::try_from(number).unwrap_or(i64::MAX))),
            _ => None,
        });
        numbers.collect()
    }

    /// What the filter does that will disappoint its author in Envoy; each is said once.
    pub fn lints(&self) -> Vec<String> {
        self.world.borrow().lints.clone()
    }

    /// Seconds since 1970, as the guest sees them.
    pub fn now(&self) -> u64 {
        self.world.borrow().unix.as_secs()
    }

    /// Sends one request through the filter and reports what came of it.
    pub fn exchange(&mut self, request: &RequestPlan, response: &ResponsePlan) -> Observed {
        let before = self.counters();
        self.world.borrow_mut().log.clear();
        self.made.clear();
        self.requests += 1;
        let info = {
            let world = self.world.borrow();
            let mut info = StreamInfo::default();
            info.source_address = Some(([127, 0, 0, 1], 50_000).into());
            info.destination_address = Some(([127, 0, 0, 1], 80).into());
            info.request_id = request_id(self.requests);
            info.start_unix_nanos = u64::try_from(world.unix.as_nanos()).unwrap_or(u64::MAX);
            info.connection_id = self.requests;
            info.route_name = "all".to_owned();
            info.cluster_name = "origin".to_owned();
            info.listener_name = "public".to_owned();
            info
        };
        let id = self.worker.open(&[0], info);
        let mut stream = SimulatedStream::new(id, request, response, &request_id(self.requests));
        let began = self.monotonic();
        loop {
            self.drain(Some(&mut stream));
            if stream.is_over() {
                break;
            }
            if stream.client_sends(&mut self.worker) || self.answer_next() || stream.upstream_sends(&mut self.worker) {
                continue;
            }
            match self.next_event().filter(|at| *at <= began + PATIENCE) {
                Some(at) => {
                    self.move_clock_to(at);
                    self.fire(Some(&mut stream));
                }
                None => {
                    self.world.borrow_mut().log.push(LogLine {
                        level: "error".to_owned(),
                        message: "harness: the filter holds the stream, and nothing is left that could wake it"
                            .to_owned(),
                    });
                    break;
                }
            }
        }
        let ending = Ending {
            duration: self.monotonic().saturating_sub(began),
            response_code_details: stream.details.clone().unwrap_or_else(|| "via_upstream".to_owned()),
            ..Ending::default()
        };
        self.worker.finish(id, ending);
        // What a filter sends after the response, such as an audit record, is part of the outcome.
        self.drain(None);
        while self.answer_next() {
            self.drain(None);
        }
        let mut counters = self.counters();
        for (name, value) in &mut counters {
            *value -= before.get(name).copied().unwrap_or_default();
        }
        counters.retain(|_, change| *change != 0);
        Observed {
            local: stream.response.as_ref().map(|_| stream.details.is_some()),
            response: stream.response,
            upstream: stream.upstream,
            details: stream.details,
            counters,
            callouts: std::mem::take(&mut self.made),
            log: std::mem::take(&mut self.world.borrow_mut().log),
        }
    }

    /// Carries out whatever the worker asks for; parts of streams that are over are dropped.
    fn drain(&mut self, mut stream: Option<&mut SimulatedStream>) {
        while let Some(action) = self.worker.poll_action() {
            match action {
                Action::Call(id, call) => self.call(id, &call),
                Action::CancelCall(id) => self.calls.retain(|pending| pending.id != id),
                action => {
                    if let Some(stream) = stream.as_deref_mut() {
                        stream.take(action);
                    }
                }
            }
        }
        if let Some(stream) = stream {
            // There is one route here, so that choosing it again changes nothing.
            let _ = self.worker.route_cleared(stream.id);
        }
    }

    fn call(&mut self, id: CallId, call: &Call) {
        let request = observed_request(&call.fields);
        let request = ObservedRequest { body: call.body.to_vec(), complete: true, ..request };
        let scripted = self.callouts.get_mut(&call.upstream).and_then(|answers| {
            let answer = answers.iter_mut().find(|answer| {
                answer.times != Some(0) && answer.path.as_ref().is_none_or(|path| *path == request.path)
            })?;
            if let Some(times) = &mut answer.times {
                *times -= 1;
            }
            Some(answer.answer.clone())
        });
        self.made.entry(call.upstream.clone()).or_default().push(request);
        let deadline = self.monotonic() + call.timeout.unwrap_or(PATIENCE);
        let answer = match scripted {
            Some(CalloutAnswer::Response(response)) => Some(answer_of(&response)),
            Some(CalloutAnswer::Refused) => Some(CallAnswer::unavailable("reset reason: connection refused")),
            Some(CalloutAnswer::Timeout) => None,
            None => Some(answer_of(&ResponsePlan {
                status: 404,
                body: vec![b"the scenario scripts no answer to this call".to_vec()],
                ..ResponsePlan::default()
            })),
        };
        self.calls.push(PendingCall { id, deadline: answer.is_none().then_some(deadline), answer });
    }

    /// Gives the oldest answer that is there; says whether there was one.
    fn answer_next(&mut self) -> bool {
        let Some(at) = self.calls.iter().position(|call| call.answer.is_some()) else { return false };
        let call = self.calls.remove(at);
        if let Some(answer) = call.answer {
            self.worker.call_answered(call.id, answer);
        }
        true
    }

    fn monotonic(&self) -> Duration {
        self.world.borrow().monotonic
    }

    /// When the next timer or deadline is due.
    fn next_event(&self) -> Option<Duration> {
        let deadlines = self.calls.iter().filter_map(|call| call.deadline);
        deadlines.chain(self.worker.next_timer()).min().map(|at| at.max(self.monotonic()))
    }

    fn move_clock_to(&mut self, monotonic: Duration) {
        let mut world = self.world.borrow_mut();
        let by = monotonic.saturating_sub(world.monotonic);
        world.monotonic += by;
        world.unix += by;
    }

    /// Runs the timers and deadlines that are due.
    fn fire(&mut self, mut stream: Option<&mut SimulatedStream>) {
        let now = self.monotonic();
        self.worker.run_timers();
        self.worker.run_notifications();
        self.drain(stream.as_deref_mut());
        while let Some(at) = self.calls.iter().position(|call| call.deadline.is_some_and(|deadline| deadline <= now)) {
            let call = self.calls.remove(at);
            self.worker.call_answered(call.id, CallAnswer::timed_out());
            self.drain(stream.as_deref_mut());
        }
    }
}

/// A request that is being put together.
pub struct RequestBuilder<'a> {
    harness: &'a mut Harness,
    request: RequestPlan,
    response: ResponsePlan,
}

impl RequestBuilder<'_> {
    /// Adds a field line.
    #[must_use]
    pub fn field(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.request.fields.push(name, value.as_ref());
        self
    }

    /// Another authority than `api.example.com`.
    #[must_use]
    pub fn authority(mut self, authority: &str) -> Self {
        authority.clone_into(&mut self.request.authority);
        self
    }

    /// Adds a piece of body; several calls make several pieces.
    #[must_use]
    pub fn body(mut self, piece: impl AsRef<[u8]>) -> Self {
        if !piece.as_ref().is_empty() {
            self.request.body.push(piece.as_ref().to_vec());
        }
        self
    }

    /// What the upstream answers, instead of 200 and `ok`.
    #[must_use]
    pub fn upstream_response(mut self, response: ResponsePlan) -> Self {
        self.response = response;
        self
    }

    /// Sends it.
    pub fn send(self) -> Observed {
        self.harness.exchange(&self.request, &self.response)
    }
}

/// A piece of a message on its way.
enum Piece {
    Headers(FieldMap, bool),
    Body(Bytes, bool),
    Trailers(FieldMap),
}

/// One request, seen from the client and from the upstream.
struct SimulatedStream {
    id: StreamId,
    request: VecDeque<Piece>,
    scripted: VecDeque<Piece>,
    upstream: Vec<ObservedRequest>,
    /// Pieces of the response that the upstream has yet to send, once it has the whole request.
    answering: VecDeque<Piece>,
    response: Option<ObservedResponse>,
    details: Option<String>,
    reset: bool,
}

impl SimulatedStream {
    fn new(id: StreamId, request: &RequestPlan, response: &ResponsePlan, request_id: &str) -> SimulatedStream {
        let mut fields = FieldMap::new();
        fields.push(b":authority", request.authority.as_bytes());
        fields.push(b":path", request.path.as_bytes());
        fields.push(b":method", request.method.as_bytes());
        fields.push(b":scheme", b"http");
        push_all(&mut fields, &request.fields);
        push_length(&mut fields, &request.fields, &request.body, &request.trailers);
        // Envoy and our proxy add these before any filter sees the request.
        fields.set(b"x-forwarded-proto", b"http");
        fields.set(b"x-request-id", request_id.as_bytes());
        let mut answer = FieldMap::new();
        answer.push(b":status", response.status.to_string().as_bytes());
        push_all(&mut answer, &response.fields);
        push_length(&mut answer, &response.fields, &response.body, &response.trailers);
        let bodiless = request.method == "HEAD" || matches!(response.status, 204 | 304);
        let answer_body: &[Vec<u8>] = if bodiless { &[] } else { &response.body };
        SimulatedStream {
            id,
            request: pieces(fields, &request.body, &request.trailers),
            scripted: pieces(answer, answer_body, &response.trailers),
            upstream: Vec::new(),
            answering: VecDeque::new(),
            response: None,
            details: None,
            reset: false,
        }
    }

    fn is_over(&self) -> bool {
        self.reset || self.response.as_ref().is_some_and(|response| response.complete)
    }

    /// The client sends its next piece, if there is one and room for it.
    fn client_sends(&mut self, worker: &mut Worker) -> bool {
        if !worker.may_read(self.id, Direction::Request) {
            return false;
        }
        match self.request.pop_front() {
            Some(Piece::Headers(fields, end)) => worker.request_headers(self.id, fields, end),
            Some(Piece::Body(bytes, end)) => worker.request_body(self.id, bytes, end),
            Some(Piece::Trailers(fields)) => worker.request_trailers(self.id, fields),
            None => return false,
        }
        true
    }

    /// The upstream sends the next piece of its response, if it has one and room for it.
    fn upstream_sends(&mut self, worker: &mut Worker) -> bool {
        if !worker.may_read(self.id, Direction::Response) {
            return false;
        }
        match self.answering.pop_front() {
            Some(Piece::Headers(fields, end)) => worker.response_headers(self.id, fields, end),
            Some(Piece::Body(bytes, end)) => worker.response_body(self.id, bytes, end),
            Some(Piece::Trailers(fields)) => worker.response_trailers(self.id, fields),
            None => return false,
        }
        true
    }

    fn take(&mut self, action: Action) {
        match action {
            Action::Request(id, part) if id == self.id => self.request_part(part),
            Action::Response(id, part) if id == self.id => self.response_part(part),
            Action::CancelUpstream(id) if id == self.id => {
                self.answering.clear();
                self.request.clear();
            }
            Action::Reset(id) if id == self.id => self.reset = true,
            _ => {}
        }
    }

    fn request_part(&mut self, part: Part) {
        let ended = match part {
            Part::Headers { fields, end_of_stream, .. } => {
                self.upstream.push(observed_request(&fields));
                end_of_stream
            }
            Part::Body { bytes, end_of_stream } => {
                if let Some(request) = self.upstream.last_mut() {
                    request.body.extend_from_slice(&bytes);
                }
                end_of_stream
            }
            Part::Trailers { fields } => {
                if let Some(request) = self.upstream.last_mut() {
                    request.trailers = without_pseudo(&fields);
                }
                true
            }
        };
        if ended && let Some(request) = self.upstream.last_mut() {
            request.complete = true;
            self.answering = std::mem::take(&mut self.scripted);
        }
    }

    fn response_part(&mut self, part: Part) {
        match part {
            Part::Headers { fields, end_of_stream, details } => {
                if let Some(details) = details {
                    self.details = Some(details.to_string());
                }
                self.response = Some(ObservedResponse {
                    status: fields
                        .get(b":status")
                        .and_then(|status| std::str::from_utf8(status).ok()?.parse().ok())
                        .unwrap_or_default(),
                    fields: without_pseudo(&fields),
                    complete: end_of_stream,
                    ..ObservedResponse::default()
                });
            }
            Part::Body { bytes, end_of_stream } => {
                if let Some(response) = &mut self.response {
                    response.body.extend_from_slice(&bytes);
                    response.complete |= end_of_stream;
                }
            }
            Part::Trailers { fields } => {
                if let Some(response) = &mut self.response {
                    response.trailers = without_pseudo(&fields);
                    response.complete = true;
                }
            }
        }
    }
}

fn pieces(headers: FieldMap, body: &[Vec<u8>], trailers: &FieldLines) -> VecDeque<Piece> {
    let mut pieces = VecDeque::from([Piece::Headers(headers, body.is_empty() && trailers.is_empty())]);
    for (index, piece) in body.iter().enumerate() {
        let last = index + 1 == body.len() && trailers.is_empty();
        pieces.push_back(Piece::Body(Bytes::from(piece.clone()), last));
    }
    if !trailers.is_empty() {
        let mut fields = FieldMap::new();
        push_all(&mut fields, trailers);
        pieces.push_back(Piece::Trailers(fields));
    }
    pieces
}

fn push_all(fields: &mut FieldMap, lines: &FieldLines) {
    for (name, value) in lines.iter() {
        fields.push(name.as_bytes(), value);
    }
}

/// A body in one piece has a `content-length` on the wire, one in several pieces is chunked.
fn push_length(fields: &mut FieldMap, lines: &FieldLines, body: &[Vec<u8>], trailers: &FieldLines) {
    if let [body] = body
        && trailers.is_empty()
        && lines.get("content-length").is_none()
    {
        fields.push(b"content-length", body.len().to_string().as_bytes());
    }
}

fn answer_of(response: &ResponsePlan) -> CallAnswer {
    let mut fields = FieldMap::new();
    fields.push(b":status", response.status.to_string().as_bytes());
    push_all(&mut fields, &response.fields);
    push_length(&mut fields, &response.fields, &response.body, &response.trailers);
    let mut trailers = FieldMap::new();
    push_all(&mut trailers, &response.trailers);
    CallAnswer::Response { fields, body: Bytes::from(response.body.concat()), trailers }
}

fn observed_request(fields: &FieldMap) -> ObservedRequest {
    let text = |name: &[u8]| String::from_utf8_lossy(fields.get(name).unwrap_or_default()).into_owned();
    ObservedRequest {
        method: text(b":method"),
        path: text(b":path"),
        authority: text(b":authority"),
        fields: without_pseudo(fields),
        ..ObservedRequest::default()
    }
}

fn without_pseudo(fields: &FieldMap) -> FieldLines {
    let mut lines = FieldLines::new();
    for (name, value) in fields.iter().filter(|(name, _)| !name.starts_with(b":")) {
        lines.push(&String::from_utf8_lossy(name), value);
    }
    lines
}

/// A UUID of the right shape, the same in every run.
fn request_id(number: u64) -> String {
    format!("00000000-0000-4000-8000-{number:012x}")
}
