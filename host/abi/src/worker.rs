//! [`Worker`]: the guests and streams of one thread.
//!
//! Events come in through methods, instructions go out through [`Worker::poll_action`]. A guest's wishes (resume, answer,
//! reset, call out) are noted while it runs and carried out once it has returned; a guest is never called from within
//! a guest's call.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};

use crate::abi::{BodyAction, Direction, HeadersAction, LogLevel};
use crate::embedder::{Embedder, LogRecord};
use crate::exchange::{Ending, Exchange, LocalResponse, StageView, StreamInfo, UpstreamInfo};
use crate::fields::FieldMap;
use crate::plugin::{FailurePolicy, Plugin};
use crate::shared::{Mailbox, Shared, Waker};
use crate::stream::{Hold, Sent, Stage, Stream};
use crate::vm::{CallView, NewCall, StreamContext, Surroundings, Trapped, Vm, VmStartError};

/// Number of a stream within its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(u64);

impl StreamId {
    /// The bare number, for logs.
    pub fn as_u64(self) -> u64 {
        self.0
    }
}

/// Number of a callout within its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId(u64);

/// What the embedder is to do.
#[derive(Debug)]
#[non_exhaustive]
pub enum Action {
    /// Send this to the upstream. Headers come first, once.
    Request(StreamId, Part),
    /// Send this to the client. Headers come first, once.
    Response(StreamId, Part),
    /// An answer was made here: drop the exchange with the upstream.
    CancelUpstream(StreamId),
    /// Cut the client's stream off, without a response or in the middle of one.
    Reset(StreamId),
    /// There is room again; see [`Worker::may_read`].
    Readable(StreamId, Direction),
    /// Ask an upstream on a guest's behalf, and tell [`Worker::call_answered`].
    Call(CallId, Call),
    /// Nobody waits for this answer any more.
    CancelCall(CallId),
}

/// A piece of a message.
#[derive(Debug)]
pub enum Part {
    /// Its head.
    Headers {
        /// Pseudo-headers and field lines.
        fields: FieldMap,
        /// The message ends here.
        end_of_stream: bool,
        /// Details of the response code where the response was made here, e.g. by a filter.
        details: Option<Rc<str>>,
    },
    /// Some of its body.
    Body {
        /// May be empty at the end.
        bytes: Bytes,
        /// The message ends here.
        end_of_stream: bool,
    },
    /// Its trailers; the message ends here.
    Trailers {
        /// Field lines.
        fields: FieldMap,
    },
}

/// A request of a guest's to an upstream.
#[derive(Debug)]
pub struct Call {
    /// Name of the plugin, for logs.
    pub plugin: String,
    /// The upstream's name.
    pub upstream: String,
    /// `:method`, `:path`, `:authority` and what else the guest gave.
    pub fields: FieldMap,
    /// Body.
    pub body: Bytes,
    /// Trailers.
    pub trailers: FieldMap,
    /// Time for the whole exchange; `None` is no limit of the guest's.
    pub timeout: Option<Duration>,
}

/// How a callout went.
#[derive(Debug)]
pub enum CallAnswer {
    /// An answer, the host's own 503 and 504 among them.
    Response {
        /// `:status` and field lines.
        fields: FieldMap,
        /// Body.
        body: Bytes,
        /// Trailers.
        trailers: FieldMap,
    },
    /// The answer broke off, or was larger than allowed.
    Reset,
}

impl CallAnswer {
    /// What Envoy makes of an upstream that cannot be reached.
    pub fn unavailable(cause: &str) -> CallAnswer {
        CallAnswer::local(
            "503",
            format!("upstream connect error or disconnect/reset before headers. {cause}"),
        )
    }

    /// What Envoy makes of an upstream that is too slow.
    pub fn timed_out() -> CallAnswer {
        CallAnswer::local("504", "upstream request timeout".into())
    }

    fn local(status: &str, body: String) -> CallAnswer {
        let fields = [
            (":status", status),
            ("content-length", &body.len().to_string()),
            ("content-type", "text/plain"),
        ]
        .into_iter()
        .collect();
        CallAnswer::Response {
            fields,
            body: body.into(),
            trailers: FieldMap::new(),
        }
    }
}

/// Why a worker cannot start: a plugin does not come up.
#[derive(Debug, thiserror::Error)]
#[error("filter `{plugin}`: {cause}{}", log_lines(.log))]
pub struct StartError {
    /// Name of the plugin.
    pub plugin: String,
    /// Why.
    pub cause: VmStartError,
    /// What the guest said, at level warn and above.
    pub log: Vec<String>,
}

fn log_lines(lines: &[String]) -> String {
    lines
        .iter()
        .flat_map(|line| line.lines())
        .map(|line| format!("\n  {line}"))
        .collect()
}

/// Whether a plugin works, on this worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginHealth {
    /// Its name.
    pub plugin: String,
    /// Whether it runs.
    pub state: PluginState,
    /// How often its VM trapped.
    pub traps: u64,
    /// How often a new VM took a trapped one's place.
    pub reloads: u64,
}

/// Whether a plugin works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PluginState {
    /// It does.
    Running,
    /// Its VM trapped, for this reason.
    Failed(Trapped),
}

struct PluginSlot {
    plugin: Arc<Plugin>,
    vm: usize,
    root: u32,
}

/// The place of a VM, which a new one takes after a trap.
struct VmSlot {
    key: [u8; 32],
    vm: Option<Vm>,
    /// Number of the VM in this place; contexts remember theirs.
    id: u64,
    failure: Option<Failure>,
    traps: u64,
    reloads: u64,
}

struct Failure {
    cause: Trapped,
    retry_at: Duration,
    attempts: u32,
}

struct PendingCall {
    slot: usize,
    vm: u64,
    root: u32,
    token: u32,
    stream: Option<StreamId>,
}

/// What is left to do once the present event is through.
enum Errand {
    /// A guest asked something of another stream than the one whose callback ran.
    Asked(StreamId, usize),
    /// The VM behind a stage of this stream is gone while it held something.
    Broken(StreamId, usize),
}

/// What a callback came to, apart from the guest's answer.
enum Outcome {
    /// Go on, with the guest's answer or, if it resumed meanwhile, with `Continue`.
    Proceed { resumed: bool },
    /// The stream took another turn, which was seen to.
    Diverted,
}

/// Whether a stage has a guest to ask.
enum Guest {
    Ready { slot: usize, context: u32 },
    Absent,
    Failed,
}

/// The guests and streams of one thread.
pub struct Worker {
    surroundings: Surroundings,
    mailbox: Arc<Mailbox>,
    plugins: Vec<PluginSlot>,
    vms: Vec<VmSlot>,
    streams: HashMap<StreamId, Box<Stream>>,
    calls: HashMap<CallId, PendingCall>,
    actions: VecDeque<Action>,
    errands: VecDeque<Errand>,
    next_id: u64,
}

impl Worker {
    /// Brings up all plugins, in order: VM, root context, configuration.
    ///
    /// # Errors
    /// The first plugin that does not come up, with what its guest logged.
    pub fn start(
        shared: Arc<Shared>,
        plugins: Vec<Arc<Plugin>>,
        embedder: Box<dyn Embedder>,
    ) -> Result<Worker, StartError> {
        let (id, mailbox) = shared.add_worker();
        let embedder: Rc<RefCell<dyn Embedder>> = Rc::new(RefCell::new(Forward(embedder)));
        let surroundings = Surroundings {
            embedder,
            shared,
            worker: id,
        };
        let mut worker = Worker {
            surroundings,
            mailbox,
            plugins: Vec::new(),
            vms: Vec::new(),
            streams: HashMap::new(),
            calls: HashMap::new(),
            actions: VecDeque::new(),
            errands: VecDeque::new(),
            next_id: 1,
        };
        for plugin in plugins {
            worker.add_plugin(plugin)?;
        }
        for slot in &mut worker.vms {
            if let Some(vm) = &mut slot.vm {
                vm.end_start_log();
            }
        }
        for slot in 0..worker.vms.len() {
            worker.collect(slot, None);
        }
        Ok(worker)
    }

    fn add_plugin(&mut self, plugin: Arc<Plugin>) -> Result<(), StartError> {
        let key = vm_key(&plugin);
        let slot = match self.vms.iter().position(|slot| slot.key == key) {
            Some(slot) => slot,
            None => {
                let id = self.new_id();
                let vm = Vm::new(&self.surroundings, id, &plugin).map_err(|cause| StartError {
                    plugin: plugin.name.clone(),
                    cause,
                    log: Vec::new(),
                })?;
                self.vms.push(VmSlot {
                    key,
                    vm: Some(vm),
                    id,
                    failure: None,
                    traps: 0,
                    reloads: 0,
                });
                self.vms.len() - 1
            }
        };
        let Some(vm) = &mut self.vms[slot].vm else {
            // A VM that failed in start-up ended the start: see above.
            return Ok(());
        };
        match vm.add_plugin(&plugin) {
            Ok(root) => {
                self.plugins.push(PluginSlot { plugin, vm: slot, root });
                Ok(())
            }
            Err(cause) => Err(StartError {
                plugin: plugin.name.clone(),
                cause,
                log: vm.take_start_log(),
            }),
        }
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// The next thing to do. Call until `None` after every other call.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Begins a stream through these plugins (indices into what [`Worker::start`] was given), in this order.
    pub fn open(&mut self, filters: &[usize], info: StreamInfo) -> StreamId {
        let id = StreamId(self.new_id());
        let stages = filters.iter().map(|plugin| Stage::new(*plugin)).collect();
        let views = filters.iter().map(|_| StageView::default()).collect();
        let exchange = Exchange {
            info,
            stages: views,
            ..Exchange::default()
        };
        let stream = Stream {
            exchange: Rc::new(RefCell::new(exchange)),
            stages,
            request_sent: Sent::Nothing,
            response_sent: Sent::Nothing,
            local: None,
            reset: false,
            is_head: false,
            request_blocked: false,
            response_blocked: false,
        };
        self.streams.insert(id, Box::new(stream));
        id
    }

    // ---- events of a stream

    /// The client's request: pseudo-headers and field lines.
    pub fn request_headers(&mut self, id: StreamId, fields: FieldMap, end_of_stream: bool) {
        self.with_stream(id, |worker, stream| {
            stream.is_head = fields.get(b":method") == Some(b"HEAD");
            stream.exchange.borrow_mut().request_headers = fields;
            worker.deliver_headers(
                id,
                stream,
                Direction::Request,
                stream.first(Direction::Request),
                end_of_stream,
            );
        });
    }

    /// More of the request's body.
    pub fn request_body(&mut self, id: StreamId, bytes: Bytes, end_of_stream: bool) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_some() {
                return;
            }
            stream.exchange.borrow_mut().request_bytes += bytes.len() as u64;
            let first = stream.first(Direction::Request);
            worker.deliver_body(id, stream, Direction::Request, first, bytes.into(), end_of_stream);
        });
    }

    /// The request's trailers; it ends with them.
    pub fn request_trailers(&mut self, id: StreamId, fields: FieldMap) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_some() {
                return;
            }
            stream.exchange.borrow_mut().request_trailers = Some(fields);
            worker.deliver_trailers(id, stream, Direction::Request, stream.first(Direction::Request));
        });
    }

    /// Which upstream the request went to.
    pub fn upstream_info(&mut self, id: StreamId, info: UpstreamInfo) {
        if let Some(stream) = self.streams.get(&id) {
            stream.exchange.borrow_mut().upstream = Some(info);
        }
    }

    /// The upstream's response: `:status` and field lines. Informational responses do not come here.
    pub fn response_headers(&mut self, id: StreamId, fields: FieldMap, end_of_stream: bool) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_some() || stream.exchange.borrow().response_headers.is_some() {
                return;
            }
            stream.exchange.borrow_mut().response_headers = Some(fields);
            worker.deliver_headers(
                id,
                stream,
                Direction::Response,
                stream.first(Direction::Response),
                end_of_stream,
            );
        });
    }

    /// More of the response's body.
    pub fn response_body(&mut self, id: StreamId, bytes: Bytes, end_of_stream: bool) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_some() {
                return;
            }
            stream.exchange.borrow_mut().response_bytes += bytes.len() as u64;
            let first = stream.first(Direction::Response);
            worker.deliver_body(id, stream, Direction::Response, first, bytes.into(), end_of_stream);
        });
    }

    /// The response's trailers; it ends with them.
    pub fn response_trailers(&mut self, id: StreamId, fields: FieldMap) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_some() {
                return;
            }
            stream.exchange.borrow_mut().response_trailers = Some(fields);
            worker.deliver_trailers(id, stream, Direction::Response, stream.first(Direction::Response));
        });
    }

    /// The embedder's own answer, such as 404 without a route or 503 without an upstream. It passes through the filters
    /// that the request has reached. Has no effect once a response is on its way.
    pub fn respond(&mut self, id: StreamId, response: LocalResponse) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_none() {
                worker.answer_locally(id, stream, response);
            }
        });
    }

    /// The stream is over, however it went: contexts end, callouts made for it are cancelled. Once per stream, last.
    pub fn finish(&mut self, id: StreamId, ending: Ending) {
        let Some(mut stream) = self.streams.remove(&id) else {
            return;
        };
        {
            let exchange = &mut *stream.exchange.borrow_mut();
            exchange.ending = Some(ending);
            for view in &mut exchange.stages {
                *view = StageView {
                    logging: true,
                    ..StageView::default()
                };
            }
        }
        for stage in 0..stream.stages.len() {
            // Also a plugin that the request never reached gets to log it.
            if let Guest::Ready { slot, context } = self.guest(id, &mut stream, stage) {
                self.run(slot, None, |vm| vm.on_log(context));
            }
        }
        for view in &mut stream.exchange.borrow_mut().stages {
            *view = StageView::default();
        }
        for stage in 0..stream.stages.len() {
            if let Guest::Ready { slot, context } = self.existing_guest(&stream, stage) {
                // A stream's context is deleted whatever the guest answers, as in Envoy.
                self.run(slot, None, |vm| vm.on_done(context));
                self.run(slot, None, |vm| vm.delete(context));
            }
        }
        let calls = self.calls.iter().filter(|(_, pending)| pending.stream == Some(id));
        let calls: Vec<CallId> = calls.map(|(call, _)| *call).collect();
        for call in calls {
            if let Some(pending) = self.calls.remove(&call) {
                self.actions.push_back(Action::CancelCall(call));
                // SDKs keep a record of each call until it is answered.
                if self.vms[pending.slot].id == pending.vm {
                    self.run(pending.slot, None, |vm| {
                        vm.on_http_call_response(pending.root, pending.token, None)
                    });
                }
            }
        }
        self.settle();
    }

    /// Whether the embedder should read more of this direction: not while a filter holds as much as may wait.
    /// [`Action::Readable`] says when it should again.
    pub fn may_read(&self, id: StreamId, direction: Direction) -> bool {
        self.streams.get(&id).is_none_or(|stream| !stream.is_full(direction))
    }

    /// Whether a guest wants the route to be chosen again, since this was last asked.
    pub fn route_cleared(&mut self, id: StreamId) -> bool {
        self.streams
            .get(&id)
            .is_some_and(|stream| std::mem::take(&mut stream.exchange.borrow_mut().route_cleared))
    }

    // ---- other events

    /// How a callout went. Answers to calls that were cancelled are dropped.
    pub fn call_answered(&mut self, call: CallId, answer: CallAnswer) {
        let Some(pending) = self.calls.remove(&call) else {
            return;
        };
        if self.vms[pending.slot].id != pending.vm {
            return;
        }
        let view = match answer {
            CallAnswer::Response { fields, body, trailers } => Some(CallView { fields, body, trailers }),
            CallAnswer::Reset => None,
        };
        self.run(pending.slot, None, |vm| {
            vm.on_http_call_response(pending.root, pending.token, view)
        });
        self.settle();
    }

    /// When the next tick is due, on the embedder's monotonic clock.
    pub fn next_timer(&self) -> Option<Duration> {
        let roots = self
            .vms
            .iter()
            .filter_map(|slot| slot.vm.as_ref())
            .flat_map(|vm| vm.state().roots.values());
        roots.filter_map(|root| root.next_tick).min()
    }

    /// Calls the ticks that are due. A period counts from the end of a tick.
    pub fn run_timers(&mut self) {
        let now = self.now();
        for slot in 0..self.vms.len() {
            let Some(vm) = &mut self.vms[slot].vm else { continue };
            let due = |root: &crate::vm::Root| root.next_tick.is_some_and(|at| at <= now);
            let due: Vec<u32> = vm
                .state()
                .roots
                .iter()
                .filter(|(_, root)| due(root))
                .map(|(context, _)| *context)
                .collect();
            for context in due {
                self.run(slot, None, |vm| vm.on_tick(context));
                let now = self.now();
                let Some(vm) = &mut self.vms[slot].vm else { break };
                if let Some(root) = vm.state_mut().roots.get_mut(&context) {
                    root.next_tick = root.tick_period.map(|period| now + period);
                }
            }
        }
        self.settle();
    }

    /// Tells `waker` whenever [`Worker::run_notifications`] has something to do.
    pub fn set_waker(&mut self, waker: Waker) {
        self.mailbox.set_waker(waker);
    }

    /// Tells guests of new items in the queues they registered.
    pub fn run_notifications(&mut self) {
        for notification in self.mailbox.take() {
            let slot = self.vms.iter().position(|slot| slot.id == notification.owner.vm);
            if let Some(slot) = slot {
                self.run(slot, None, |vm| {
                    vm.on_queue_ready(notification.owner.context, notification.queue)
                });
            }
        }
        self.settle();
    }

    /// How the plugins are, in the order given to [`Worker::start`].
    pub fn health(&self) -> Vec<PluginHealth> {
        self.plugins
            .iter()
            .map(|slot| {
                let vm = &self.vms[slot.vm];
                let state = vm.failure.as_ref().map_or(PluginState::Running, |failure| {
                    PluginState::Failed(failure.cause.clone())
                });
                PluginHealth {
                    plugin: slot.plugin.name.clone(),
                    state,
                    traps: vm.traps,
                    reloads: vm.reloads,
                }
            })
            .collect()
    }

    /// Ends all plugins' root contexts. Streams should be finished before.
    pub fn shutdown(&mut self) {
        for slot in 0..self.vms.len() {
            let Some(vm) = &self.vms[slot].vm else { continue };
            let roots: Vec<u32> = vm.state().roots.keys().copied().collect();
            for root in roots {
                self.run(slot, None, |vm| vm.on_done(root));
                self.run(slot, None, |vm| vm.delete(root));
            }
        }
        self.calls.clear();
    }

    // ---- a message's way through the stages

    /// Takes a stream out, works on it, puts it back, and does what is left over.
    fn with_stream(&mut self, id: StreamId, work: impl FnOnce(&mut Worker, &mut Stream)) {
        self.work_on(id, work);
        self.settle();
    }

    fn work_on(&mut self, id: StreamId, work: impl FnOnce(&mut Worker, &mut Stream)) {
        let Some(mut stream) = self.streams.remove(&id) else {
            return;
        };
        if !stream.reset {
            work(self, &mut stream);
            self.update_reading(id, &mut stream);
        }
        self.streams.insert(id, stream);
    }

    /// Does what guests asked of streams other than the one at hand, until nothing is left.
    fn settle(&mut self) {
        while let Some(errand) = self.errands.pop_front() {
            match errand {
                Errand::Asked(id, stage) => self.work_on(id, |worker, stream| {
                    worker.grant(id, stream, stage);
                }),
                Errand::Broken(id, stage) => self.work_on(id, |worker, stream| {
                    worker.fail(id, stream, stage);
                }),
            }
        }
    }

    fn update_reading(&mut self, id: StreamId, stream: &mut Stream) {
        for direction in [Direction::Request, Direction::Response] {
            let full = stream.is_full(direction);
            if std::mem::replace(stream.blocked(direction), full) && !full {
                self.actions.push_back(Action::Readable(id, direction));
            }
        }
    }

    /// Headers arrive at a stage, or behind the last one.
    fn deliver_headers(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        at: Option<usize>,
        end: bool,
    ) {
        let Some(stage) = at else {
            return self.emit_headers(id, stream, direction, end);
        };
        stream.stages[stage].lane_mut(direction).end_seen = end;
        let (slot, context) = match self.guest_in(id, stream, direction, stage) {
            Guest::Ready { slot, context } => (slot, context),
            Guest::Absent => return self.pass_headers(id, stream, direction, stage, end),
            Guest::Failed => return self.fail(id, stream, stage),
        };
        let count = {
            let mut exchange = stream.exchange.borrow_mut();
            exchange.stages[stage].set_headers_visible(direction, true);
            exchange.headers(direction).map_or(0, FieldMap::len) as u32
        };
        let action = self.run(slot, Some((id, stage)), |vm| {
            vm.on_headers(direction, context, count, end)
        });
        let Outcome::Proceed { resumed } = self.outcome(id, stream, direction, stage, action.is_some()) else {
            return;
        };
        let allow_stop = self.plugins[stream.stages[stage].plugin]
            .plugin
            .allow_on_headers_stop_iteration;
        let (hold, watermark) = match action.unwrap_or(HeadersAction::Continue) {
            HeadersAction::Continue => (Hold::Nothing, false),
            HeadersAction::ContinueAndEndStream => {
                stream.stages[stage].lane_mut(direction).cut = true;
                return self.pass_headers(id, stream, direction, stage, true);
            }
            HeadersAction::Stop if allow_stop => (Hold::Headers, true),
            HeadersAction::Stop | HeadersAction::StopAllAndWatermark => (Hold::All, true),
            HeadersAction::StopAllAndBuffer => (Hold::All, false),
        };
        if hold == Hold::Nothing || resumed {
            self.pass_headers(id, stream, direction, stage, end);
        } else {
            let lane = stream.stages[stage].lane_mut(direction);
            lane.hold = hold;
            lane.watermark = watermark;
        }
    }

    fn pass_headers(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize, end: bool) {
        stream.exchange.borrow_mut().stages[stage].set_headers_visible(direction, false);
        stream.stages[stage].lane_mut(direction).headers_passed = true;
        let next = stream.next(direction, stage);
        self.deliver_headers(id, stream, direction, next, end);
    }

    /// Body arrives at a stage, or behind the last one.
    fn deliver_body(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        at: Option<usize>,
        bytes: BytesMut,
        end: bool,
    ) {
        if self.is_over(stream, direction) {
            return;
        }
        let Some(stage) = at else {
            return self.emit_body(id, stream, direction, bytes, end);
        };
        let lane = stream.stages[stage].lane_mut(direction);
        if lane.cut {
            return;
        }
        lane.end_seen |= end;
        if lane.hold == Hold::All {
            lane.held.extend_from_slice(&bytes);
            return self.check_room(id, stream, direction, stage);
        }
        let (slot, context) = match self.guest_in(id, stream, direction, stage) {
            Guest::Ready { slot, context } => (slot, context),
            Guest::Absent => {
                let next = stream.next(direction, stage);
                return self.deliver_body(id, stream, direction, next, bytes, end);
            }
            Guest::Failed => return self.fail(id, stream, stage),
        };
        let buffering = stream.stages[stage].lane(direction).buffering;
        let (len, had_trailers) = {
            let exchange = &mut *stream.exchange.borrow_mut();
            let had_trailers = exchange.trailers_mut(direction).is_some();
            let view = &mut exchange.stages[stage];
            view.last_body = end.then_some(direction);
            let shown = view.body_mut(direction).get_or_insert_default();
            if buffering {
                shown.extend_from_slice(&bytes);
            } else {
                *shown = bytes;
            }
            (shown.len() as u32, had_trailers)
        };
        let action = self.run(slot, Some((id, stage)), |vm| vm.on_body(direction, context, len, end));
        let Outcome::Proceed { resumed } = self.outcome(id, stream, direction, stage, action.is_some()) else {
            return;
        };
        let made_trailers = {
            let exchange = &mut *stream.exchange.borrow_mut();
            exchange.stages[stage].last_body = None;
            end && !had_trailers && exchange.trailers_mut(direction).is_some()
        };
        let lane = stream.stages[stage].lane_mut(direction);
        lane.trailers_held |= made_trailers;
        let action = if resumed {
            BodyAction::Continue
        } else {
            action.unwrap_or(BodyAction::Continue)
        };
        if action == BodyAction::Continue {
            return self.release(id, stream, direction, stage);
        }
        {
            let mut exchange = stream.exchange.borrow_mut();
            let body = exchange.stages[stage].body_mut(direction);
            match action {
                BodyAction::StopAndBuffer if lane.held.is_empty() => {}
                BodyAction::StopAndBuffer => {
                    // All that waits is shown next time, also what came before the guest began to buffer.
                    let mut all = lane.held.split();
                    all.extend_from_slice(body.as_deref().unwrap_or_default());
                    *body = Some(all);
                }
                BodyAction::StopAndWatermark => lane.held.extend_from_slice(&body.take().unwrap_or_default()),
                BodyAction::StopNoBuffer | BodyAction::Continue => *body = None,
            }
        }
        lane.buffering = action == BodyAction::StopAndBuffer;
        lane.watermark = !lane.buffering;
        if lane.hold == Hold::Nothing {
            lane.hold = Hold::Body;
        }
        self.check_room(id, stream, direction, stage);
    }

    /// Trailers arrive at a stage, or behind the last one.
    fn deliver_trailers(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, at: Option<usize>) {
        if self.is_over(stream, direction) {
            return;
        }
        let Some(stage) = at else {
            return self.emit_trailers(id, stream, direction);
        };
        let lane = stream.stages[stage].lane_mut(direction);
        if lane.cut {
            return;
        }
        lane.end_seen = true;
        if lane.hold == Hold::All {
            lane.trailers_held = true;
            return;
        }
        let (slot, context) = match self.guest_in(id, stream, direction, stage) {
            Guest::Ready { slot, context } => (slot, context),
            Guest::Absent => {
                let next = stream.next(direction, stage);
                return self.deliver_trailers(id, stream, direction, next);
            }
            Guest::Failed => return self.fail(id, stream, stage),
        };
        let count = {
            let mut exchange = stream.exchange.borrow_mut();
            exchange.stages[stage].set_trailers_visible(direction, true);
            exchange.trailers_mut(direction).as_ref().map_or(0, FieldMap::len) as u32
        };
        let action = self.run(slot, Some((id, stage)), |vm| vm.on_trailers(direction, context, count));
        let Outcome::Proceed { resumed } = self.outcome(id, stream, direction, stage, action.is_some()) else {
            return;
        };
        let lane = stream.stages[stage].lane_mut(direction);
        lane.trailers_held = true;
        if resumed || action.is_none_or(|action| action == HeadersAction::Continue) {
            self.release(id, stream, direction, stage);
        } else if lane.hold == Hold::Nothing {
            lane.hold = Hold::Trailers;
        }
    }

    /// Lets go of what a stage holds, towards the next stage.
    fn release(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize) {
        let (body, edited) = {
            let lane = stream.stages[stage].lane_mut(direction);
            lane.hold = Hold::Nothing;
            lane.buffering = false;
            let mut exchange = stream.exchange.borrow_mut();
            let view = &mut exchange.stages[stage];
            view.set_headers_visible(direction, false);
            view.set_trailers_visible(direction, false);
            let shown = view.body_mut(direction).take().unwrap_or_default();
            let body = if lane.held.is_empty() {
                shown
            } else {
                let mut held = lane.held.split();
                held.extend_from_slice(&shown);
                held
            };
            (body, std::mem::take(&mut view.edited))
        };
        let lane = stream.stages[stage].lane_mut(direction);
        let (headers_passed, trailers) = (lane.headers_passed, std::mem::take(&mut lane.trailers_held));
        let end = lane.end_seen && !trailers;
        if edited && *stream.sent(direction) == Sent::Nothing {
            repair_content_length(
                stream,
                direction,
                (!headers_passed && lane_end(stream, direction, stage)).then_some(body.len()),
            );
        }
        let next = stream.next(direction, stage);
        let nothing_follows = end && body.is_empty();
        if !headers_passed {
            self.pass_headers(id, stream, direction, stage, nothing_follows);
            if nothing_follows {
                return;
            }
        }
        if !body.is_empty() || end {
            self.deliver_body(id, stream, direction, next, body, end);
        }
        if trailers {
            self.deliver_trailers(id, stream, direction, next);
        }
    }

    /// A guest has resumed a direction that it had stopped.
    fn resume(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize) {
        if self.is_over(stream, direction) {
            return;
        }
        let lane = stream.stages[stage].lane_mut(direction);
        match lane.hold {
            Hold::Nothing => {}
            Hold::Headers | Hold::Body | Hold::Trailers => self.release(id, stream, direction, stage),
            Hold::All => {
                lane.hold = Hold::Nothing;
                let held = lane.held.split();
                let trailers = std::mem::take(&mut lane.trailers_held);
                let end = lane.end_seen && !trailers;
                let nothing_follows = end && held.is_empty();
                if !lane.headers_passed {
                    self.pass_headers(id, stream, direction, stage, nothing_follows);
                    if nothing_follows {
                        return;
                    }
                }
                // What came meanwhile is shown to this guest first.
                if !held.is_empty() || end {
                    self.deliver_body(id, stream, direction, Some(stage), held, end);
                }
                if trailers {
                    self.deliver_trailers(id, stream, direction, Some(stage));
                }
            }
        }
    }

    fn is_over(&self, stream: &mut Stream, direction: Direction) -> bool {
        stream.reset
            || *stream.sent(direction) == Sent::End
            || (direction == Direction::Request && stream.local.is_some())
    }

    /// More waits at a stage than may: the message is refused, unless the sender is held back instead.
    fn check_room(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize) {
        let most = stream.exchange.borrow().info.buffer_bytes_max;
        if stream.stages[stage].lane(direction).watermark || stream.waiting(direction, stage) <= most {
            return;
        }
        let (status, details, body) = match direction {
            Direction::Request => (413, "request_payload_too_large", "Payload Too Large"),
            Direction::Response => (500, "response_payload_too_large", "Internal Server Error"),
        };
        let response = LocalResponse {
            status,
            details: details.into(),
            body: Bytes::from_static(body.as_bytes()),
            ..LocalResponse::default()
        };
        self.answer_locally(id, stream, response);
    }

    // ---- out of the last stage

    fn emit_headers(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, end: bool) {
        if self.is_over(stream, direction) {
            return;
        }
        let fields = stream.exchange.borrow().headers(direction).cloned().unwrap_or_default();
        let required: &[&str] = match direction {
            Direction::Request => &[":method", ":path", ":authority"],
            Direction::Response => &[":status"],
        };
        if let Some(missing) = required
            .iter()
            .find(|name| fields.get(name.as_bytes()).is_none_or(<[u8]>::is_empty))
        {
            return self.refuse_incomplete(id, stream, direction, missing);
        }
        *stream.sent(direction) = if end { Sent::End } else { Sent::Headers };
        let details = match direction {
            Direction::Request => None,
            Direction::Response => stream.local.clone(),
        };
        self.emit(
            id,
            direction,
            Part::Headers {
                fields,
                end_of_stream: end,
                details,
            },
        );
    }

    /// A filter took away what a message cannot be without.
    fn refuse_incomplete(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, missing: &str) {
        let (status, which) = match direction {
            Direction::Request => (503, "request"),
            Direction::Response => (502, "response"),
        };
        let response = LocalResponse {
            status,
            details: format!("filter_removed_required_{which}_headers{{missing_required_header:_{missing}}}"),
            ..LocalResponse::default()
        };
        self.answer_locally(id, stream, response);
    }

    fn emit_body(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, bytes: BytesMut, end: bool) {
        if *stream.sent(direction) != Sent::Headers {
            return;
        }
        if end {
            *stream.sent(direction) = Sent::End;
        }
        self.emit(
            id,
            direction,
            Part::Body {
                bytes: bytes.freeze(),
                end_of_stream: end,
            },
        );
    }

    fn emit_trailers(&mut self, id: StreamId, stream: &mut Stream, direction: Direction) {
        if *stream.sent(direction) != Sent::Headers {
            return;
        }
        *stream.sent(direction) = Sent::End;
        let fields = stream
            .exchange
            .borrow_mut()
            .trailers_mut(direction)
            .clone()
            .unwrap_or_default();
        self.emit(id, direction, Part::Trailers { fields });
    }

    fn emit(&mut self, id: StreamId, direction: Direction, part: Part) {
        self.actions.push_back(match direction {
            Direction::Request => Action::Request(id, part),
            Direction::Response => Action::Response(id, part),
        });
    }

    // ---- answers made here

    /// Answers in the upstream's place: through the response side of the filters if no response has come yet, directly
    /// to the client if one has, and by a reset if it is on its way already.
    fn answer_locally(&mut self, id: StreamId, stream: &mut Stream, response: LocalResponse) {
        if stream.reset {
            return;
        }
        if stream.response_sent != Sent::Nothing {
            return self.reset(id, stream);
        }
        if stream.request_sent != Sent::Nothing {
            self.actions.push_back(Action::CancelUpstream(id));
        }
        let replaces = stream.exchange.borrow().response_headers.is_some();
        stream.local = Some(response.details.as_str().into());
        let (fields, body) = local_message(&stream.exchange.borrow().request_headers, response);
        let end = body.is_empty() || stream.is_head;
        {
            let exchange = &mut *stream.exchange.borrow_mut();
            exchange.response_headers = Some(fields);
            exchange.response_trailers = None;
            exchange.response_bytes = body.len() as u64;
        }
        let first = if replaces {
            None
        } else {
            stream.first(Direction::Response)
        };
        self.deliver_headers(id, stream, Direction::Response, first, end);
        if !end {
            self.deliver_body(id, stream, Direction::Response, first, body.into(), true);
        }
    }

    fn reset(&mut self, id: StreamId, stream: &mut Stream) {
        if !std::mem::replace(&mut stream.reset, true) {
            if stream.request_sent != Sent::Nothing {
                self.actions.push_back(Action::CancelUpstream(id));
            }
            self.actions.push_back(Action::Reset(id));
        }
    }

    /// The guest that a stage needs is not there.
    fn fail(&mut self, id: StreamId, stream: &mut Stream, stage: usize) {
        let plugin = &self.plugins[stream.stages[stage].plugin].plugin;
        let details = format!("wasm_fail_stream{{{}}}", plugin.name);
        self.answer_locally(
            id,
            stream,
            LocalResponse {
                status: 503,
                details,
                ..LocalResponse::default()
            },
        );
    }

    // ---- guests

    /// The guest behind a stage for a message that passes it; a local response passes a stage whose guest is gone.
    fn guest_in(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize) -> Guest {
        match direction {
            Direction::Request => self.guest(id, stream, stage),
            // A response concerns only filters that have seen the request.
            Direction::Response => match self.existing_guest(stream, stage) {
                Guest::Failed if stream.local.is_some() => Guest::Absent,
                guest => guest,
            },
        }
    }

    fn existing_guest(&self, stream: &Stream, stage: usize) -> Guest {
        let stage = &stream.stages[stage];
        let plugin = &self.plugins[stage.plugin];
        let vm = &self.vms[plugin.vm];
        match stage.context {
            None => Guest::Absent,
            Some((vm_id, context)) if vm.vm.is_some() && vm.id == vm_id => Guest::Ready {
                slot: plugin.vm,
                context,
            },
            Some(_) if plugin.plugin.failure_policy == FailurePolicy::Open => Guest::Absent,
            Some(_) => Guest::Failed,
        }
    }

    /// The guest behind a stage; its context is made if the stream has none yet.
    fn guest(&mut self, id: StreamId, stream: &mut Stream, stage: usize) -> Guest {
        if stream.stages[stage].skipped {
            return Guest::Absent;
        }
        if stream.stages[stage].context.is_some() {
            return self.existing_guest(stream, stage);
        }
        let plugin = stream.stages[stage].plugin;
        let slot = self.plugins[plugin].vm;
        if self.vms[slot].vm.is_none() {
            let policy = self.plugins[plugin].plugin.failure_policy;
            match policy {
                FailurePolicy::Open => {
                    stream.stages[stage].skipped = true;
                    return Guest::Absent;
                }
                FailurePolicy::Closed => return Guest::Failed,
                FailurePolicy::Reload if !self.reload(slot) => return Guest::Failed,
                FailurePolicy::Reload => {}
            }
        }
        let context = StreamContext {
            root: self.plugins[plugin].root,
            stream: id,
            stage,
            exchange: Rc::clone(&stream.exchange),
        };
        let vm_id = self.vms[slot].id;
        match self.run(slot, Some((id, stage)), |vm| vm.create_stream_context(context)) {
            Some(context) => {
                stream.stages[stage].context = Some((vm_id, context));
                Guest::Ready { slot, context }
            }
            None => Guest::Failed,
        }
    }

    /// Calls into a VM and gathers what its guest asked for. `None`: it trapped, which was seen to.
    fn run<R>(
        &mut self,
        slot: usize,
        current: Option<(StreamId, usize)>,
        call: impl FnOnce(&mut Vm) -> Result<R, Trapped>,
    ) -> Option<R> {
        let result = call(self.vms[slot].vm.as_mut()?);
        match result {
            Ok(value) => {
                self.collect(slot, current);
                Some(value)
            }
            Err(trapped) => {
                self.trap(slot, trapped);
                None
            }
        }
    }

    /// Takes over what a guest asked for: callouts, and wishes for streams other than `current`.
    fn collect(&mut self, slot: usize, current: Option<(StreamId, usize)>) {
        let Some(vm) = self.vms[slot].vm.as_mut() else { return };
        let state = vm.state_mut();
        if state.touched.is_empty() && state.new_calls.is_empty() {
            return;
        }
        let touched = std::mem::take(&mut state.touched);
        let new_calls = std::mem::take(&mut state.new_calls);
        for (stream, stage) in touched {
            if Some((stream, stage)) != current {
                self.errands.push_back(Errand::Asked(stream, stage));
            }
        }
        for call in new_calls {
            self.start_call(slot, call);
        }
    }

    fn start_call(&mut self, slot: usize, call: NewCall) {
        let id = CallId(self.new_id());
        let Some(vm) = &self.vms[slot].vm else { return };
        let plugin = vm
            .state()
            .roots
            .get(&call.root)
            .map_or_else(String::new, |root| root.plugin.name.clone());
        let pending = PendingCall {
            slot,
            vm: self.vms[slot].id,
            root: call.root,
            token: call.token,
            stream: call.stream,
        };
        self.calls.insert(id, pending);
        let NewCall {
            upstream,
            fields,
            body,
            trailers,
            timeout,
            ..
        } = call;
        self.actions.push_back(Action::Call(
            id,
            Call {
                plugin,
                upstream,
                fields,
                body,
                trailers,
                timeout,
            },
        ));
    }

    /// What became of a callback for this stream: a trap, an answer, a reset, or nothing special.
    fn outcome(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        stage: usize,
        returned: bool,
    ) -> Outcome {
        if !returned {
            self.fail(id, stream, stage);
            return Outcome::Diverted;
        }
        let asked = std::mem::take(&mut stream.exchange.borrow_mut().stages[stage].asked);
        if asked.reset {
            self.reset(id, stream);
            return Outcome::Diverted;
        }
        if let Some(response) = asked.local_response
            // A local response on its way out through the filters is not replaced by another one.
            && !(direction == Direction::Response && stream.local.is_some())
        {
            self.answer_locally(id, stream, response);
            return Outcome::Diverted;
        }
        let (resumed, other, resumed_other) = match direction {
            Direction::Request => (asked.resume_request, Direction::Response, asked.resume_response),
            Direction::Response => (asked.resume_response, Direction::Request, asked.resume_request),
        };
        if resumed_other {
            self.resume(id, stream, other, stage);
        }
        Outcome::Proceed { resumed }
    }

    /// Grants what a guest asked of a stream from another stream's or a root's callback.
    fn grant(&mut self, id: StreamId, stream: &mut Stream, stage: usize) {
        let asked = std::mem::take(&mut stream.exchange.borrow_mut().stages[stage].asked);
        if asked.reset {
            return self.reset(id, stream);
        }
        if let Some(response) = asked.local_response
            && stream.local.is_none()
        {
            return self.answer_locally(id, stream, response);
        }
        if asked.resume_request {
            self.resume(id, stream, Direction::Request, stage);
        }
        if asked.resume_response {
            self.resume(id, stream, Direction::Response, stage);
        }
    }

    // ---- failure and recovery

    /// A VM is done for. Streams that only it could release fail at once; others when they need it next.
    fn trap(&mut self, slot: usize, cause: Trapped) {
        let now = self.now();
        let place = &mut self.vms[slot];
        place.vm = None;
        place.traps += 1;
        let attempts = place.failure.as_ref().map_or(0, |failure| failure.attempts);
        let dead = place.id;
        let Some(member) = self.plugins.iter().find(|plugin| plugin.vm == slot) else {
            return;
        };
        let retry_at = now + backoff(member.plugin.reload_backoff, attempts);
        self.vms[slot].failure = Some(Failure {
            cause: cause.clone(),
            retry_at,
            attempts,
        });
        let names: Vec<&str> = self
            .plugins
            .iter()
            .filter(|plugin| plugin.vm == slot)
            .map(|plugin| plugin.plugin.name.as_str())
            .collect();
        let message = format!("the VM of {} failed: it {cause}", names.join(", "));
        self.surroundings.embedder.borrow_mut().log(&LogRecord {
            plugin: &member.plugin.name,
            stream: None,
            level: LogLevel::Critical,
            message: &message,
        });
        let calls: Vec<CallId> = self
            .calls
            .iter()
            .filter(|(_, call)| call.slot == slot && call.vm == dead)
            .map(|(id, _)| *id)
            .collect();
        for call in calls {
            self.calls.remove(&call);
            self.actions.push_back(Action::CancelCall(call));
        }
        for (id, stream) in &self.streams {
            let waits = |stage: &Stage| stage.context.is_some_and(|(vm, _)| vm == dead) && stage.holds();
            if let Some(stage) = stream.stages.iter().position(waits) {
                self.errands.push_back(Errand::Broken(*id, stage));
            }
        }
    }

    /// Puts a new VM in the place of a failed one, if it is time to.
    fn reload(&mut self, slot: usize) -> bool {
        let now = self.now();
        if self.vms[slot]
            .failure
            .as_ref()
            .is_some_and(|failure| now < failure.retry_at)
        {
            return false;
        }
        let id = self.new_id();
        let members: Vec<usize> = (0..self.plugins.len())
            .filter(|plugin| self.plugins[*plugin].vm == slot)
            .collect();
        let Some(first) = members.first().map(|member| Arc::clone(&self.plugins[*member].plugin)) else {
            return false;
        };
        let result = Vm::new(&self.surroundings, id, &first).and_then(|mut vm| {
            let mut roots = Vec::new();
            for member in &members {
                roots.push(vm.add_plugin(&self.plugins[*member].plugin)?);
            }
            vm.end_start_log();
            Ok((vm, roots))
        });
        match result {
            Ok((vm, roots)) => {
                for (member, root) in members.into_iter().zip(roots) {
                    self.plugins[member].root = root;
                }
                let place = &mut self.vms[slot];
                place.vm = Some(vm);
                place.id = id;
                place.failure = None;
                place.reloads += 1;
                self.collect(slot, None);
                true
            }
            Err(error) => {
                let message = format!("no new VM could be brought up: it {error}");
                self.surroundings.embedder.borrow_mut().log(&LogRecord {
                    plugin: &first.name,
                    stream: None,
                    level: LogLevel::Critical,
                    message: &message,
                });
                if let Some(failure) = &mut self.vms[slot].failure {
                    failure.attempts = failure.attempts.saturating_add(1);
                    failure.retry_at = now + backoff(first.reload_backoff, failure.attempts);
                }
                false
            }
        }
    }

    fn now(&self) -> Duration {
        self.surroundings.embedder.borrow().monotonic()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.surroundings.shared.remove_worker(self.surroundings.worker);
    }
}

/// Lets a boxed embedder stand behind a shared, dynamically typed one.
struct Forward(Box<dyn Embedder>);

impl Embedder for Forward {
    fn log(&mut self, record: &LogRecord<'_>) {
        self.0.log(record);
    }

    fn unix_nanos(&self) -> u64 {
        self.0.unix_nanos()
    }

    fn monotonic(&self) -> Duration {
        self.0.monotonic()
    }

    fn has_upstream(&self, name: &str) -> bool {
        self.0.has_upstream(name)
    }

    fn log_level(&self) -> LogLevel {
        self.0.log_level()
    }

    fn lint(&mut self, lint: &crate::embedder::Lint<'_>) {
        self.0.lint(lint);
    }
}

/// What Envoy tells VMs apart by.
fn vm_key(plugin: &Plugin) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in [
        plugin.vm_id.as_bytes(),
        &plugin.vm_configuration,
        plugin.module.sha256(),
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Doubles with each failed attempt up to ten times the base, and spreads over the upper half of that, so that the workers
/// of a process don't try at the same moment.
fn backoff(base: Duration, attempts: u32) -> Duration {
    let mut random = [0; 1];
    // Without randomness the workers try together; that is the worst that comes of it.
    if getrandom::fill(&mut random).is_err() {
        random = [255];
    }
    let full = base * 2u32.pow(attempts.min(4)).min(10);
    full / 2 + full * u32::from(random[0]) / 512
}

/// Whether the whole message has arrived at a stage.
fn lane_end(stream: &Stream, direction: Direction, stage: usize) -> bool {
    stream.stages[stage].lane(direction).end_seen
}

/// After a guest has changed a body whose headers are still here: says its new length where it is known, and otherwise
/// leaves the framing to the transport. Envoy would send the old, wrong length.
fn repair_content_length(stream: &mut Stream, direction: Direction, len: Option<usize>) {
    let mut exchange = stream.exchange.borrow_mut();
    let Some(fields) = exchange.headers_mut(direction) else {
        return;
    };
    if !fields.contains(b"content-length") {
        return;
    }
    match len {
        Some(len) => fields.set(b"content-length", len.to_string().as_bytes()),
        None => {
            fields.remove(b"content-length");
        }
    }
}

/// The fields and body of a local response, in the form that the request calls for.
fn local_message(request: &FieldMap, response: LocalResponse) -> (FieldMap, Bytes) {
    let LocalResponse {
        status,
        body,
        fields: extra,
        grpc_status,
        ..
    } = response;
    let mut fields = FieldMap::with_capacity(extra.len() + 4, extra.byte_size() + 64);
    let is_grpc = request.get(b"content-type").is_some_and(|value| {
        value
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    });
    if is_grpc {
        // A gRPC client understands nothing but trailers: status 200, and the outcome in its own fields.
        fields.push(b":status", b"200");
        fields.push(b"content-type", b"application/grpc");
        let code = grpc_status.unwrap_or_else(|| grpc_status_of(status));
        fields.push(b"grpc-status", code.to_string().as_bytes());
        if !body.is_empty() {
            fields.push(b"grpc-message", percent_encoded(&body).as_bytes());
        }
        for (name, value) in extra.iter().filter(|(name, _)| !name.starts_with(b":")) {
            fields.set(name, value);
        }
        return (fields, Bytes::new());
    }
    fields.push(b":status", status.to_string().as_bytes());
    let framing: [&[u8]; 3] = [b"content-length", b"transfer-encoding", b"content-type"];
    for (name, value) in extra
        .iter()
        .filter(|(name, _)| !name.starts_with(b":") && !framing.contains(name))
    {
        fields.push(name, value);
    }
    if !body.is_empty() {
        fields.push(b"content-type", extra.get(b"content-type").unwrap_or(b"text/plain"));
        fields.push(b"content-length", body.len().to_string().as_bytes());
    }
    (fields, body)
}

/// Envoy's translation of HTTP statuses.
fn grpc_status_of(status: u16) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

fn percent_encoded(message: &[u8]) -> String {
    let mut out = String::with_capacity(message.len());
    for byte in message {
        match byte {
            b'%' | 0..=0x1f | 0x7f.. => out.push_str(&format!("%{byte:02X}")),
            _ => out.push(char::from(*byte)),
        }
    }
    out
}
