//! [`Host`]: a simulated host. No sockets, no threads, and a clock that moves only when told to.
//!
//! Filters run in the very crate that `portcullis serve` runs them in; only what surrounds them is made up here: clients,
//! upstreams, the time. [`crate::filter`] starts filters, [`crate::stream`] sends requests through them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use portcullis_abi::{
    Action, Call, CallAnswer, CallId, Embedder, FieldMap, GrpcEvent, GrpcOpen, Lint, LogLevel, LogRecord, Message,
    MetricValue, Part, Shared, StreamId, TraceEvent, UpstreamInfo, Worker,
};

use crate::connection::ConnectionState;
use crate::filter::{FilterBuilder, Source};
use crate::grpc::Exchange;
use crate::message::{FieldLines, LogLine, Observed, ObservedRequest};
use crate::plan::{Callout, CalloutAnswer, ResponsePlan};
use crate::ring::Ring;
use crate::stream::StreamState;
use crate::trace::{Secrets, Trace};

/// What the clock says until it is told otherwise: the first second of 2026.
pub const NOW_DEFAULT: u64 = 1_767_225_600;

/// Entries kept of the trace, the log and the calls made; older ones are forgotten.
const HISTORY_MAX: usize = 4_000;

/// Answers and notifications delivered one after the other, without time passing, before the host gives up: a filter that
/// calls out whenever it is answered would go on for ever.
const ROUNDS_MAX: usize = 10_000;

/// A simulated host. Clones are the same host.
///
/// ```no_run
/// use std::time::Duration;
/// use portcullis_harness::{EndOfStream, Flow, Host, ResponsePlan};
///
/// let host = Host::new();
/// host.upstream("keys");
/// let filter = host.load("target/filters/my-filter.wasm").configuration(r#"{ "fail_closed": true }"#).start()?;
///
/// // Phase by phase, with the filter's own call answered by hand:
/// let mut stream = filter.request("POST", "/orders").field("x-client", "a").begin(EndOfStream::No);
/// assert_eq!(stream.flow(), Flow::Paused);
/// host.answer_call(ResponsePlan::json(&serde_json::json!({ "keys": [] })));
/// assert_eq!(stream.send_body("first piece", EndOfStream::Yes), Flow::Continues);
/// let seen = stream.respond(ResponsePlan::default());
/// seen.assert_status(200).assert_upstream_field("x-verified", "yes");
///
/// // Or as a whole:
/// host.advance(Duration::from_secs(3600));
/// filter.get("/orders").send().assert_local_response(403);
/// # Ok::<(), portcullis_harness::HarnessError>(())
/// ```
#[derive(Clone)]
pub struct Host {
    pub(crate) inner: Rc<RefCell<Inner>>,
}

impl Default for Host {
    fn default() -> Host {
        Host::new()
    }
}

/// A filter's call to an upstream, not yet answered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PendingCall {
    /// The filter that calls.
    pub filter: String,
    /// The upstream.
    pub upstream: String,
    /// What it asks.
    pub request: ObservedRequest,
    /// How long it waits, from when it called; `None` is for ever.
    pub timeout: Option<Duration>,
}

impl Host {
    /// A host without filters, at the start of 2026.
    pub fn new() -> Host {
        let world = Rc::new(RefCell::new(World {
            unix: Duration::from_secs(NOW_DEFAULT),
            monotonic: UP,
            upstreams: BTreeMap::new(),
            log: Ring::new(HISTORY_MAX),
            log_level: LogLevel::Debug,
            lints: Vec::new(),
            traces: true,
            trace: Ring::new(HISTORY_MAX),
        }));
        let inner = Inner {
            world,
            shared: Shared::new(),
            instances: Vec::new(),
            calls: Vec::new(),
            made: Ring::new(HISTORY_MAX),
            streams: BTreeMap::new(),
            connections: BTreeMap::new(),
            requests: 0,
            queues_held: false,
            secrets: Secrets::Masked,
        };
        Host { inner: Rc::new(RefCell::new(inner)) }
    }

    /// Without a trace, which costs a few microseconds a call: for measurements. Holds for filters started afterwards.
    #[must_use]
    pub fn without_trace(self) -> Host {
        self.world(|world| world.traces = false);
        self
    }

    /// Shows credentials in traces and failures, which otherwise show how long they are.
    #[must_use]
    pub fn showing_secrets(self) -> Host {
        self.inner.borrow_mut().secrets = Secrets::Shown;
        self
    }

    /// Sets the clock, in seconds since 1970, before filters are started.
    #[must_use]
    pub fn at(self, unix_seconds: u64) -> Host {
        self.world(|world| world.unix = Duration::from_secs(unix_seconds));
        self
    }

    /// Lines below this level are not made by guests that ask. Default `Debug`.
    #[must_use]
    pub fn log_level(self, level: LogLevel) -> Host {
        self.world(|world| world.log_level = level);
        self
    }

    /// Begins to start a filter: from a `.wasm` file, or from a [`Guest`](crate::Guest) that is compiled already.
    pub fn load(&self, module: impl Source) -> FilterBuilder {
        FilterBuilder::new(self, module.guest())
    }

    // ---- time

    /// Seconds since 1970, as filters see them.
    pub fn now(&self) -> u64 {
        self.world(|world| world.unix.as_secs())
    }

    /// How far the clock has moved so far.
    pub fn elapsed(&self) -> Duration {
        self.world(|world| world.monotonic.saturating_sub(UP))
    }

    /// Moves the clock. Every timer, late answer and deadline on the way happens when it is due.
    pub fn advance(&self, by: Duration) {
        self.inner.borrow_mut().advance(by);
    }

    /// Moves the clock to the next tick of a filter and lets it happen; `false` if no filter has asked for ticks.
    pub fn tick(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        let Some(at) = inner.next_tick() else { return false };
        let by = at.saturating_sub(inner.monotonic());
        inner.advance(by);
        true
    }

    // ---- upstreams and callouts

    /// Makes an upstream known that filters may call. Calls to it wait for [`Host::answer_call`], for
    /// [`Upstream::answers`] or for their own deadline.
    pub fn upstream(&self, name: impl Into<String>) -> Upstream {
        let name = name.into();
        self.world(|world| {
            world.upstreams.entry(name.clone()).or_default();
        });
        Upstream { host: self.clone(), name }
    }

    /// Calls that wait for an answer, oldest first.
    pub fn pending_calls(&self) -> Vec<PendingCall> {
        self.inner.borrow().calls.iter().map(|call| call.shown.clone()).collect()
    }

    /// Answers the oldest call that waits, now, and tells which that was.
    ///
    /// # Panics
    /// If no call waits.
    #[track_caller]
    pub fn answer_call(&self, answer: impl Into<CalloutAnswer>) -> PendingCall {
        let answered = self.inner.borrow_mut().answer_oldest(None, &answer.into());
        answered.unwrap_or_else(|| panic!("no call waits for an answer\n{}", self.trace()))
    }

    /// Answers the oldest call to this upstream that waits, now.
    ///
    /// # Panics
    /// If no such call waits.
    #[track_caller]
    pub fn answer_call_to(&self, upstream: &str, answer: impl Into<CalloutAnswer>) -> PendingCall {
        let answered = self.inner.borrow_mut().answer_oldest(Some(upstream), &answer.into());
        answered.unwrap_or_else(|| panic!("no call to `{upstream}` waits for an answer\n{}", self.trace()))
    }

    /// Every call that filters have made so far, by upstream and in order, answered or not.
    pub fn calls_made(&self) -> BTreeMap<String, Vec<ObservedRequest>> {
        self.inner.borrow().calls_since(0)
    }

    // ---- what filters share

    /// The value that filters of this `vm_id` share under `key`.
    pub fn shared_data(&self, vm_id: &str, key: impl AsRef<[u8]>) -> Option<Vec<u8>> {
        self.inner.borrow().shared.data(vm_id, key.as_ref())
    }

    /// All that filters of this `vm_id` share, by key.
    pub fn all_shared_data(&self, vm_id: &str) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.inner.borrow().shared.all_data(vm_id)
    }

    /// Shares a value, as another filter of this `vm_id` would.
    ///
    /// # Panics
    /// If the limits on shared data do not allow it.
    #[track_caller]
    pub fn set_shared_data(&self, vm_id: &str, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        let put = self.inner.borrow().shared.put_data(vm_id, key.as_ref(), value.as_ref());
        assert!(put, "shared data is full");
    }

    /// What waits in a queue, oldest first; `None` if no filter has registered it.
    pub fn queue(&self, vm_id: &str, name: &str) -> Option<Vec<Vec<u8>>> {
        self.inner.borrow().shared.queued(vm_id, name.as_bytes())
    }

    /// Puts an item into a queue, as another filter would; who registered the queue is told.
    ///
    /// # Panics
    /// If no filter has registered it, or it is full.
    #[track_caller]
    pub fn enqueue(&self, vm_id: &str, name: &str, item: impl AsRef<[u8]>) {
        let mut inner = self.inner.borrow_mut();
        let put = inner.shared.put_queued(vm_id, name.as_bytes(), item.as_ref());
        assert!(put, "no filter has registered the queue `{name}` of the vm_id `{vm_id}`, or it is full");
        inner.settle();
    }

    /// From now on filters hear of new items in queues only when [`Host::deliver_queues`] says so.
    pub fn hold_queues(&self) {
        self.inner.borrow_mut().queues_held = true;
    }

    /// Tells filters of new items in the queues they registered; `false` if there was nothing to tell.
    pub fn deliver_queues(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        let told = inner.deliver_queues();
        inner.settle();
        told
    }

    // ---- what came of it

    /// What came of something that is no request, such as a tick: calls, counters, log, trace.
    pub fn observe(&self, happen: impl FnOnce()) -> Observed {
        let mark = self.inner.borrow().mark();
        happen();
        let since = self.inner.borrow().since(&mark);
        Observed {
            counters: since.counters,
            callouts: since.callouts,
            log: since.log,
            trace: since.trace,
            ..Observed::default()
        }
    }

    /// Everything that filters have measured.
    pub fn metrics(&self) -> BTreeMap<String, MetricValue> {
        self.inner.borrow().shared.metrics().into_iter().map(|metric| (metric.name, metric.value)).collect()
    }

    /// Counters and gauges as they stand.
    pub fn counters(&self) -> BTreeMap<String, i64> {
        self.inner.borrow().counters()
    }

    /// A counter or gauge as it stands; 0 if no filter has defined it.
    pub fn counter(&self, name: &str) -> i64 {
        self.counters().get(name).copied().unwrap_or_default()
    }

    /// What was logged so far; the latest 4,000 lines.
    pub fn log(&self) -> Vec<LogLine> {
        self.inner.borrow().log_since(0)
    }

    /// What filters do that will disappoint their authors in Envoy; each is said once.
    pub fn lints(&self) -> Vec<String> {
        self.world(|world| world.lints.clone())
    }

    /// Fails if a filter has done what will disappoint its author in Envoy.
    #[track_caller]
    pub fn assert_no_lints(&self) {
        let lints = self.lints();
        assert!(lints.is_empty(), "{}\n{}", lints.join("\n"), self.trace());
    }

    /// What passed between this host and its filters so far; the latest 4,000 events.
    pub fn trace(&self) -> Trace {
        self.inner.borrow().trace_since(0)
    }

    fn world<R>(&self, with: impl FnOnce(&mut World) -> R) -> R {
        with(&mut self.inner.borrow().world.borrow_mut())
    }
}

/// An upstream that filters may call.
pub struct Upstream {
    host: Host,
    name: String,
}

impl Upstream {
    /// From now on calls are answered by themselves: the first of `script` that fits a call. What nothing fits gets 404.
    pub fn answers(&self, script: impl IntoIterator<Item = Callout>) {
        let script = script.into_iter().collect();
        self.host.world(|world| world.upstreams.insert(self.name.clone(), Some(script)));
    }

    /// From now on every call gets this answer.
    pub fn always(&self, answer: impl Into<CalloutAnswer>) {
        self.answers([Callout::always(answer)]);
    }

    /// From now on calls wait for [`Host::answer_call`] again.
    pub fn by_hand(&self) {
        self.host.world(|world| world.upstreams.insert(self.name.clone(), None));
    }

    /// What filters have asked it so far.
    pub fn requests(&self) -> Vec<ObservedRequest> {
        self.host.calls_made().remove(&self.name).unwrap_or_default()
    }
}

/// How long the simulated machine has been up: Go's runtime takes a clock that says 0 for a broken one.
const UP: Duration = Duration::from_secs(1);

/// What embedders of all workers see.
pub(crate) struct World {
    unix: Duration,
    monotonic: Duration,
    /// Upstreams that may be called, each with its script; `None`: calls wait to be answered by hand.
    upstreams: BTreeMap<String, Option<Vec<Callout>>>,
    log: Ring<LogLine>,
    log_level: LogLevel,
    lints: Vec<String>,
    traces: bool,
    trace: Ring<TraceEvent>,
}

/// The end of the world that a worker's guests touch.
pub(crate) struct SimulatedHost(pub(crate) Rc<RefCell<World>>);

impl Embedder for SimulatedHost {
    fn log(&mut self, record: &LogRecord<'_>) {
        let line = LogLine { level: record.level.as_str().to_owned(), message: record.message.to_owned() };
        self.0.borrow_mut().log.push(line);
    }

    fn unix_nanos(&self) -> u64 {
        nanos(self.0.borrow().unix)
    }

    fn monotonic(&self) -> Duration {
        self.0.borrow().monotonic
    }

    fn has_upstream(&self, name: &str) -> bool {
        self.0.borrow().upstreams.contains_key(name)
    }

    fn log_level(&self) -> LogLevel {
        self.0.borrow().log_level
    }

    fn lint(&mut self, lint: &Lint<'_>) {
        let text = format!("{} in {}: {}", lint.call, lint.callback, lint.reason);
        let lints = &mut self.0.borrow_mut().lints;
        if !lints.contains(&text) {
            lints.push(text);
        }
    }

    fn traces(&self) -> bool {
        self.0.borrow().traces
    }

    fn trace(&mut self, event: TraceEvent) {
        self.0.borrow_mut().trace.push(event);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A started filter, or chain of filters, on one or several workers.
pub(crate) struct Instance {
    pub(crate) workers: Vec<WorkerSlot>,
}

pub(crate) struct WorkerSlot {
    pub(crate) worker: Worker,
    /// Another worker has put something into a queue of this one's.
    pub(crate) woken: Arc<AtomicBool>,
}

/// Which stream of which worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StreamKey {
    pub(crate) instance: usize,
    pub(crate) worker: usize,
    pub(crate) id: StreamId,
}

/// A callout under way.
struct CallUnderWay {
    instance: usize,
    worker: usize,
    id: CallId,
    shown: PendingCall,
    /// When it is given up, by the filter's own wish.
    deadline: Option<Duration>,
    answer: Answer,
}

/// What a call is waiting for.
enum Answer {
    /// The scripted answer, and when it comes.
    Http(Option<(Duration, CallAnswer)>),
    Grpc(Box<Exchange>),
}

impl CallUnderWay {
    /// When something happens to it by itself.
    fn due(&self) -> Option<Duration> {
        let answered = match &self.answer {
            Answer::Http(answer) => answer.as_ref().map(|(at, _)| *at),
            Answer::Grpc(exchange) => exchange.due(),
        };
        [answered, self.deadline].into_iter().flatten().min()
    }

    /// What happens to it when its time has come, and whether that is all.
    fn happen(&mut self) -> (Happening, bool) {
        let in_time = |at: Duration| self.deadline.is_none_or(|deadline| at <= deadline);
        match &mut self.answer {
            Answer::Http(answer) => {
                let answer = answer.take().filter(|(at, _)| in_time(*at)).map(|(_, answer)| answer);
                (Happening::Answered(answer.unwrap_or_else(CallAnswer::timed_out)), true)
            }
            Answer::Grpc(exchange) => match exchange.due().filter(|at| in_time(*at)).and_then(|_| exchange.next()) {
                Some(event) => (Happening::Event(event), exchange.has_ended()),
                None => (Happening::Event(GrpcEvent::timed_out()), true),
            },
        }
    }
}

enum Happening {
    Answered(CallAnswer),
    Event(GrpcEvent),
}

pub(crate) struct Inner {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) instances: Vec<Instance>,
    calls: Vec<CallUnderWay>,
    made: Ring<(String, ObservedRequest)>,
    pub(crate) streams: BTreeMap<StreamKey, StreamState>,
    pub(crate) connections: BTreeMap<StreamKey, ConnectionState>,
    pub(crate) requests: u64,
    queues_held: bool,
    secrets: Secrets,
}

/// A moment in the history of a host, to tell what came since.
#[derive(Clone, Default)]
pub(crate) struct Mark {
    log: usize,
    made: usize,
    trace: usize,
    counters: BTreeMap<String, i64>,
}

impl Inner {
    pub(crate) fn worker(&mut self, key: StreamKey) -> &mut Worker {
        &mut self.instances[key.instance].workers[key.worker].worker
    }

    pub(crate) fn monotonic(&self) -> Duration {
        self.world.borrow().monotonic
    }

    pub(crate) fn unix_nanos(&self) -> u64 {
        nanos(self.world.borrow().unix)
    }

    // ---- history

    pub(crate) fn mark(&self) -> Mark {
        let world = self.world.borrow();
        Mark { log: world.log.mark(), made: self.made.mark(), trace: world.trace.mark(), counters: self.counters() }
    }

    fn log_since(&self, mark: usize) -> Vec<LogLine> {
        self.world.borrow().log.since(mark).1.cloned().collect()
    }

    fn calls_since(&self, mark: usize) -> BTreeMap<String, Vec<ObservedRequest>> {
        let mut made: BTreeMap<String, Vec<ObservedRequest>> = BTreeMap::new();
        for (upstream, request) in self.made.since(mark).1 {
            made.entry(upstream.clone()).or_default().push(request.clone());
        }
        made
    }

    fn trace_since(&self, mark: usize) -> Trace {
        let world = self.world.borrow();
        let (forgotten, events) = world.trace.since(mark);
        Trace::new(events.cloned().collect(), forgotten, self.secrets)
    }

    fn counters(&self) -> BTreeMap<String, i64> {
        let numbers = self.shared.metrics().into_iter().filter_map(|metric| match metric.value {
            MetricValue::Number(number) => Some((metric.name, i64::try_from(number).unwrap_or(i64::MAX))),
            _ => None,
        });
        numbers.collect()
    }

    /// Log, calls, trace, and what was counted since.
    pub(crate) fn since(&self, mark: &Mark) -> Since {
        let mut counters = self.counters();
        for (name, value) in &mut counters {
            *value -= mark.counters.get(name).copied().unwrap_or_default();
        }
        counters.retain(|_, change| *change != 0);
        Since {
            log: self.log_since(mark.log),
            callouts: self.calls_since(mark.made),
            trace: self.trace_since(mark.trace),
            counters,
        }
    }

    pub(crate) fn note(&self, message: &str) {
        let line = LogLine { level: "error".to_owned(), message: format!("harness: {message}") };
        self.world.borrow_mut().log.push(line);
    }

    // ---- events

    /// Carries out whatever the workers ask for.
    pub(crate) fn drain(&mut self) {
        for instance in 0..self.instances.len() {
            for worker in 0..self.instances[instance].workers.len() {
                while let Some(action) = self.instances[instance].workers[worker].worker.poll_action() {
                    self.carry_out(instance, worker, action);
                }
            }
        }
        self.connect_upstreams();
        for (key, state) in &mut self.streams {
            let worker = &mut self.instances[key.instance].workers[key.worker].worker;
            // There is one route here, so that choosing it again changes nothing.
            state.route_cleared |= worker.route_cleared(key.id);
        }
    }

    fn carry_out(&mut self, instance: usize, worker: usize, action: Action) {
        let key = |id| StreamKey { instance, worker, id };
        match action {
            Action::Call(id, call) => self.call(instance, worker, id, &call),
            Action::GrpcOpen(id, open) => self.open(instance, worker, id, &open),
            Action::GrpcSend(id, bytes, end) => self.send(instance, worker, id, &bytes, end),
            Action::CancelCall(id) => {
                self.calls.retain(|call| (call.instance, call.worker, call.id) != (instance, worker, id));
            }
            Action::Request(id, part) => {
                if matches!(part, Part::Headers { .. }) {
                    self.worker(key(id)).upstream_info(id, upstream_info());
                }
                if let Some(stream) = self.streams.get_mut(&key(id)) {
                    stream.request_part(part);
                }
            }
            Action::Response(id, part) => {
                if let Some(stream) = self.streams.get_mut(&key(id)) {
                    stream.response_part(part);
                }
            }
            Action::CancelUpstream(id) => {
                if let Some(stream) = self.streams.get_mut(&key(id)) {
                    stream.upstream_cancelled = true;
                }
            }
            Action::Reset(id) => {
                if let Some(stream) = self.streams.get_mut(&key(id)) {
                    stream.reset = true;
                }
            }
            Action::Connect(id) => {
                if let Some(connection) = self.connections.get_mut(&key(id)) {
                    connection.wants_upstream = true;
                }
            }
            Action::Data { id, direction, bytes, end_of_stream } => {
                if let Some(connection) = self.connections.get_mut(&key(id)) {
                    connection.pass(direction, &bytes, end_of_stream);
                }
            }
            Action::Close(id, details) => {
                if let Some(connection) = self.connections.get_mut(&key(id)) {
                    connection.closed = Some(details.to_string());
                }
            }
            _ => {}
        }
    }

    fn call(&mut self, instance: usize, worker: usize, id: CallId, call: &Call) {
        let request = observed_request(&call.fields);
        let request = ObservedRequest {
            body: call.body.to_vec(),
            trailers: without_pseudo(&call.trailers),
            complete: true,
            ..request
        };
        let now = self.monotonic();
        let scripted = self.scripted(&call.upstream, &request.path);
        let answer = scripted.and_then(|callout| Some((now + callout.delay, answer_of(&callout.answer)?)));
        self.made.push((call.upstream.clone(), request.clone()));
        let shown = PendingCall {
            filter: call.plugin.clone(),
            upstream: call.upstream.clone(),
            request,
            timeout: call.timeout,
        };
        let deadline = call.timeout.map(|timeout| now + timeout);
        self.calls.push(CallUnderWay { instance, worker, id, shown, deadline, answer: Answer::Http(answer) });
    }

    /// What the script of an upstream says to a call; `None` where it is answered by hand.
    fn scripted(&self, upstream: &str, path: &str) -> Option<Callout> {
        let world = &mut *self.world.borrow_mut();
        let script = world.upstreams.get_mut(upstream)?.as_mut()?;
        Some(
            Callout::choose(script, path).unwrap_or_else(|| {
                Callout::always(ResponsePlan::new(404).body("the script has no answer to this call"))
            }),
        )
    }

    fn open(&mut self, instance: usize, worker: usize, id: CallId, open: &GrpcOpen) {
        let request = observed_request(&open.fields);
        let now = self.monotonic();
        let mut exchange = Exchange::new(self.made.mark());
        if let Some(callout) = self.scripted(&open.upstream, &request.path) {
            exchange.answer(now + callout.delay, &callout.answer);
        }
        self.made.push((open.upstream.clone(), request.clone()));
        let shown = PendingCall {
            filter: open.plugin.clone(),
            upstream: open.upstream.clone(),
            request,
            timeout: open.timeout,
        };
        let deadline = open.timeout.map(|timeout| now + timeout);
        let answer = Answer::Grpc(Box::new(exchange));
        self.calls.push(CallUnderWay { instance, worker, id, shown, deadline, answer });
    }

    fn send(&mut self, instance: usize, worker: usize, id: CallId, bytes: &Bytes, end: bool) {
        let is_meant = |call: &&mut CallUnderWay| (call.instance, call.worker, call.id) == (instance, worker, id);
        let Some(call) = self.calls.iter_mut().find(is_meant) else { return };
        let Answer::Grpc(exchange) = &mut call.answer else { return };
        exchange.receive(bytes, end);
        let made = self.made.get_mut(exchange.made).map(|(_, request)| request);
        for request in made.into_iter().chain([&mut call.shown.request]) {
            request.body.extend_from_slice(bytes);
            request.complete |= end;
        }
        // There is room at once.
        let slot = &mut self.instances[instance].workers[worker];
        let _ = slot.worker.grpc_event(id, GrpcEvent::Sent(bytes.len()));
    }

    fn answer_oldest(&mut self, upstream: Option<&str>, answer: &CalloutAnswer) -> Option<PendingCall> {
        let fits = |call: &&mut CallUnderWay| {
            let is_answered = matches!(&call.answer, Answer::Grpc(exchange) if exchange.is_answered());
            !is_answered && upstream.is_none_or(|upstream| call.shown.upstream == upstream)
        };
        let now = self.monotonic();
        let call = self.calls.iter_mut().find(fits)?;
        // Nobody waits for what never comes: the deadline is here at once.
        match &mut call.answer {
            Answer::Http(scripted) => {
                *scripted = Some((now, answer_of(answer).unwrap_or_else(CallAnswer::timed_out)));
            }
            Answer::Grpc(_) if *answer == CalloutAnswer::Timeout => call.deadline = Some(now),
            Answer::Grpc(exchange) => exchange.answer(now, answer),
        }
        let shown = call.shown.clone();
        self.settle();
        Some(shown)
    }

    /// Gives the oldest answer whose time has come, or the host's own in its place; says whether there was one.
    pub(crate) fn answer_next(&mut self) -> bool {
        let now = self.monotonic();
        let Some(at) = self.calls.iter().position(|call| call.due().is_some_and(|due| due <= now)) else {
            return false;
        };
        let call = &mut self.calls[at];
        let (instance, worker, id) = (call.instance, call.worker, call.id);
        let (happening, is_all) = call.happen();
        if is_all {
            self.calls.remove(at);
        }
        let worker = &mut self.instances[instance].workers[worker].worker;
        match happening {
            Happening::Answered(answer) => worker.call_answered(id, answer),
            Happening::Event(event) => {
                // Time stands still, so that each turn is as long as it takes.
                let mut is_left = worker.grpc_event(id, event);
                while is_left {
                    is_left = worker.grpc_event(id, GrpcEvent::Turn);
                }
            }
        }
        self.drain();
        true
    }

    /// Tells workers of new items in queues; says whether there were any.
    fn deliver_queues(&mut self) -> bool {
        let mut told = false;
        for instance in &mut self.instances {
            for slot in &mut instance.workers {
                if slot.woken.swap(false, Ordering::Relaxed) {
                    slot.worker.run_notifications();
                    told = true;
                }
            }
        }
        self.drain();
        told
    }

    /// Lets everything happen that takes no time.
    pub(crate) fn settle(&mut self) {
        self.drain();
        for _ in 0..ROUNDS_MAX {
            let busy = self.answer_next() || (!self.queues_held && self.deliver_queues());
            if !busy {
                return;
            }
        }
        self.note("filters called out or filled queues again and again without time passing; given up");
    }

    fn next_tick(&self) -> Option<Duration> {
        let workers = self.instances.iter().flat_map(|instance| &instance.workers);
        workers.filter_map(|slot| slot.worker.next_timer()).min()
    }

    /// When the next timer, answer or deadline is due.
    pub(crate) fn next_event(&self) -> Option<Duration> {
        let calls = self.calls.iter().filter_map(CallUnderWay::due);
        calls.chain(self.next_tick()).min().map(|at| at.max(self.monotonic()))
    }

    /// Moves the clock to `at` and lets happen what is due then.
    pub(crate) fn happen_at(&mut self, at: Duration) {
        self.move_clock_to(at);
        for instance in &mut self.instances {
            for slot in &mut instance.workers {
                slot.worker.run_timers();
            }
        }
        self.settle();
    }

    fn move_clock_to(&mut self, monotonic: Duration) {
        let mut world = self.world.borrow_mut();
        let by = monotonic.saturating_sub(world.monotonic);
        world.monotonic += by;
        world.unix += by;
    }

    pub(crate) fn advance(&mut self, by: Duration) {
        let end = self.monotonic() + by;
        while let Some(at) = self.next_event().filter(|at| *at <= end) {
            self.happen_at(at);
        }
        self.move_clock_to(end);
    }
}

/// What came since a [`Mark`].
pub(crate) struct Since {
    pub(crate) log: Vec<LogLine>,
    pub(crate) callouts: BTreeMap<String, Vec<ObservedRequest>>,
    pub(crate) trace: Trace,
    pub(crate) counters: BTreeMap<String, i64>,
}

/// The answer as the worker is given it; `None` never comes.
fn answer_of(answer: &CalloutAnswer) -> Option<CallAnswer> {
    match answer {
        CalloutAnswer::Response(response) => {
            let trailers = field_map(Message::ResponseTrailers, &response.trailers);
            let body = Bytes::from(response.body.concat());
            Some(CallAnswer::Response { fields: response_fields(response), body, trailers })
        }
        // No HTTP client asks for this.
        CalloutAnswer::Grpc(_) => answer_of(&CalloutAnswer::from(415)),
        CalloutAnswer::Refused => Some(CallAnswer::unavailable("reset reason: remote connection failure")),
        CalloutAnswer::Timeout => None,
        CalloutAnswer::Reset => Some(CallAnswer::Reset),
    }
}

/// What properties tell of the upstream.
pub(crate) fn upstream_info() -> UpstreamInfo {
    UpstreamInfo { address: Some(([127, 0, 0, 1], 9000).into()), attempts: 1, ..UpstreamInfo::default() }
}

/// `:status` and fields, with the `content-length` that a body in one piece has on the wire.
pub(crate) fn response_fields(response: &ResponsePlan) -> FieldMap {
    let mut fields = FieldMap::new();
    fields.push(b":status", response.status.to_string().as_bytes());
    append_all(&mut fields, Message::Response, &response.fields);
    push_length(&mut fields, &response.fields, &response.body, &response.trailers);
    fields
}

/// Adds lines as they come in from the wire, where Envoy and our proxy join some.
pub(crate) fn append_all(fields: &mut FieldMap, message: Message, lines: &FieldLines) {
    for (name, value) in lines.iter() {
        fields.append(message, name.as_bytes(), value);
    }
}

/// The lines of a head or of trailers.
pub(crate) fn field_map(message: Message, lines: &FieldLines) -> FieldMap {
    let mut fields = FieldMap::new();
    append_all(&mut fields, message, lines);
    fields
}

/// A body in one piece has a `content-length` on the wire, one in several pieces is chunked.
pub(crate) fn push_length(fields: &mut FieldMap, lines: &FieldLines, body: &[Vec<u8>], trailers: &FieldLines) {
    if let [body] = body
        && trailers.is_empty()
        && lines.get("content-length").is_none()
    {
        fields.push(b"content-length", body.len().to_string().as_bytes());
    }
}

pub(crate) fn observed_request(fields: &FieldMap) -> ObservedRequest {
    let text = |name: &[u8]| String::from_utf8_lossy(fields.get(name).unwrap_or_default()).into_owned();
    ObservedRequest {
        method: text(b":method"),
        path: text(b":path"),
        authority: text(b":authority"),
        fields: without_pseudo(fields),
        ..ObservedRequest::default()
    }
}

pub(crate) fn without_pseudo(fields: &FieldMap) -> FieldLines {
    let mut lines = FieldLines::new();
    for (name, value) in fields.iter().filter(|(name, _)| !name.starts_with(b":")) {
        lines.push(&String::from_utf8_lossy(name), value);
    }
    lines
}
