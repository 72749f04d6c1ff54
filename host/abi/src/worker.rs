//! [`Worker`]: the guests and streams of one thread.
//!
//! Events come in through methods, instructions go out through [`Worker::poll_action`]. A guest's wishes (resume, answer,
//! reset, call out) are noted while it runs and carried out once it has returned; a guest is never called from within
//! a guest's call.

mod callouts;
mod flow;
mod guests;
mod local;
mod tcp;

pub use tcp::ClosedBy;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::abi::{Direction, LogLevel};
use crate::embedder::{Embedder, LogRecord};
use crate::exchange::{Ending, Exchange, LocalResponse, RouteInfo, StageView, StreamInfo, UpstreamInfo};
use crate::fields::FieldMap;
use crate::grpc::{Answer, status};
use crate::ids::IdMap;
use crate::plugin::Plugin;
use crate::relay::Relay;
use crate::shared::{Mailbox, Shared, SharedLimits, Waker};
use crate::stream::{Hold, Sent, Stage, Stream};
use crate::vm::{Root, Surroundings, Trapped, Vm, VmStartError};

/// Number of a stream within its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(u64);

impl StreamId {
    /// The bare number, for logs.
    pub fn as_u64(self) -> u64 {
        self.0
    }
}

/// A callout, HTTP or gRPC: its VM's number and the guest's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId {
    vm: u64,
    token: u32,
}

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
    /// Connect this TCP connection to its upstream, and tell [`Worker::connected`].
    Connect(StreamId),
    /// Send this to the upstream or, respectively, to the client of a TCP connection.
    Data {
        /// The connection.
        id: StreamId,
        /// Which way.
        direction: Direction,
        /// May be empty at the end.
        bytes: Bytes,
        /// Nothing follows this way; the other way may go on.
        end_of_stream: bool,
    },
    /// Close a TCP connection: to the client once what was sent to it is written, to the upstream at once.
    Close(StreamId, Rc<str>),
    /// Ask an upstream on a guest's behalf, and tell [`Worker::call_answered`].
    Call(CallId, Call),
    /// Begin a gRPC exchange with an upstream on a guest's behalf, and tell [`Worker::grpc_event`] what comes of it.
    GrpcOpen(CallId, GrpcOpen),
    /// Send these bytes as part of its request, which may end with them; [`GrpcEvent::Sent`] says when they have left.
    GrpcSend(CallId, Bytes, bool),
    /// Nobody waits for this answer any more: break the exchange off, if it still goes on.
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

/// A gRPC exchange that a guest began: a request of HTTP/2 whose body comes in [`Action::GrpcSend`].
#[derive(Debug)]
pub struct GrpcOpen {
    /// Name of the plugin, for logs.
    pub plugin: String,
    /// The upstream's name.
    pub upstream: String,
    /// `:method`, `:path`, `:authority`, what gRPC asks for, and the guest's metadata. The scheme is the embedder's.
    pub fields: FieldMap,
    /// Time for the whole exchange; `None` is no limit.
    pub timeout: Option<Duration>,
}

/// What happens to a gRPC exchange, in HTTP's terms; the worker makes messages and a status of it.
///
/// What ends the response ends the exchange: the embedder then drops what is left of the request.
#[derive(Debug)]
pub enum GrpcEvent {
    /// The head of the response: `:status` and field lines. Informational responses do not come here.
    Headers {
        /// Pseudo-header and field lines.
        fields: FieldMap,
        /// The response ends here.
        end_of_stream: bool,
    },
    /// Some of its body.
    Data(Bytes),
    /// Its trailers; the response ends with them.
    Trailers(FieldMap),
    /// It ended without trailers.
    End,
    /// It broke off behind its head, with these details of the response code.
    Reset(String),
    /// The host answers in the upstream's place; see [`GrpcEvent::unavailable`].
    Local {
        /// gRPC's status.
        status: u32,
        /// Its message.
        message: String,
        /// Details of the response code, which stand behind the message.
        details: String,
    },
    /// The bytes of one [`Action::GrpcSend`] have left; so many.
    Sent(usize),
    /// Nothing but another turn; see [`Worker::grpc_event`].
    Turn,
}

impl GrpcEvent {
    /// What Envoy makes of an upstream that cannot be reached.
    pub fn unavailable(cause: &str, details: &str) -> GrpcEvent {
        let message = format!("upstream connect error or disconnect/reset before headers. {cause}");
        GrpcEvent::Local { status: status::UNAVAILABLE, message, details: details.to_owned() }
    }

    /// What Envoy makes of an upstream that resets its answer.
    pub fn reset() -> GrpcEvent {
        GrpcEvent::Reset("upstream_reset_after_response_started{remote_reset}".to_owned())
    }

    /// What Envoy makes of an upstream that is too slow.
    pub fn timed_out() -> GrpcEvent {
        let message = "upstream request timeout".to_owned();
        GrpcEvent::Local { status: status::UNAVAILABLE, message, details: "response_timeout".to_owned() }
    }
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
        CallAnswer::local("503", format!("upstream connect error or disconnect/reset before headers. {cause}"))
    }

    /// What Envoy makes of an upstream that is too slow.
    pub fn timed_out() -> CallAnswer {
        CallAnswer::local("504", "upstream request timeout".into())
    }

    fn local(status: &str, body: String) -> CallAnswer {
        let fields = [(":status", status), ("content-length", &body.len().to_string()), ("content-type", "text/plain")]
            .into_iter()
            .collect();
        CallAnswer::Response { fields, body: body.into(), trailers: FieldMap::new() }
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
    lines.iter().flat_map(|line| line.lines()).map(|line| format!("\n  {line}")).collect()
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
    /// When it came up.
    born: Duration,
    /// How many tries it took, in a row of VMs that did not last.
    tries: u32,
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
    root: u32,
    stream: Option<StreamId>,
    /// What has come of a gRPC exchange.
    grpc: Option<Box<Answer>>,
}

/// What is left to do once the present event is through.
enum Errand {
    /// A guest asked something of another stream than the one whose callback ran.
    Asked(StreamId, usize),
    /// The VM behind a stage of this stream is gone while it held something.
    Broken(StreamId, usize),
    /// A gRPC exchange was ended while its guest was running, which is to be told.
    Tell(CallId),
    /// A guest has said that it is done with a root context of the VM.
    EndRoot { vm: u64, root: u32 },
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

/// How long ticks, notifications and messages of a gRPC stream may keep requests waiting. One of them may take longer, up to the guest's own limit, and is
/// then the last of its turn.
const TURN: Duration = Duration::from_millis(10);

/// The guests and streams of one thread.
pub struct Worker {
    surroundings: Surroundings,
    mailbox: Arc<Mailbox>,
    plugins: Vec<PluginSlot>,
    vms: Vec<VmSlot>,
    streams: IdMap<StreamId, Box<Stream>>,
    relays: IdMap<StreamId, Box<Relay>>,
    calls: IdMap<CallId, PendingCall>,
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
        let mut limits: BTreeMap<&str, SharedLimits> = BTreeMap::new();
        for plugin in &plugins {
            let of_vm_id = limits.entry(&plugin.vm_id).or_insert(plugin.limits.shared);
            *of_vm_id = of_vm_id.or_larger(plugin.limits.shared);
        }
        for (vm_id, limits) in limits {
            shared.set_limits(vm_id, limits);
        }
        let (id, mailbox) = shared.add_worker();
        let embedder: Rc<RefCell<dyn Embedder>> = Rc::new(RefCell::new(Forward(embedder)));
        let surroundings = Surroundings { embedder, shared, worker: id };
        let mut worker = Worker {
            surroundings,
            mailbox,
            plugins: Vec::new(),
            vms: Vec::new(),
            streams: IdMap::default(),
            relays: IdMap::default(),
            calls: IdMap::default(),
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
        worker.settle();
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
                let born = self.now();
                self.vms.push(VmSlot { key, vm: Some(vm), id, born, tries: 0, failure: None, traps: 0, reloads: 0 });
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
            Err(cause) => Err(StartError { plugin: plugin.name.clone(), cause, log: vm.take_start_log() }),
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
        let stream = Stream {
            exchange: Rc::new(RefCell::new(Exchange::new(info, filters.len()))),
            stages,
            request_sent: Sent::Nothing,
            response_sent: Sent::Nothing,
            local: None,
            reset: false,
            upstream_cancelled: false,
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
            worker.deliver_headers(id, stream, Direction::Request, stream.first(Direction::Request), end_of_stream);
        });
    }

    /// More of the request's body.
    pub fn request_body(&mut self, id: StreamId, bytes: Bytes, end_of_stream: bool) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_some() {
                return;
            }
            stream.exchange.borrow_mut().request_bytes += bytes.len() as u64;
            worker.begin_body(id, stream, Direction::Request, bytes, end_of_stream);
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

    /// Which upstream the request went to. May be told again when more is known.
    pub fn upstream_info(&mut self, id: StreamId, info: UpstreamInfo) {
        if let Some(stream) = self.streams.get(&id) {
            stream.exchange.borrow_mut().upstream = Some(info);
        }
    }

    /// How long the upstream took, from the first byte of the request to the last of the response.
    pub fn upstream_latency(&mut self, id: StreamId, latency: Duration) {
        if let Some(stream) = self.streams.get(&id)
            && let Some(upstream) = &mut stream.exchange.borrow_mut().upstream
        {
            upstream.latency = Some(latency);
        }
    }

    /// The upstream's response: `:status` and field lines. Informational responses do not come here.
    pub fn response_headers(&mut self, id: StreamId, fields: FieldMap, end_of_stream: bool) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_some() || stream.exchange.borrow().response_headers.is_some() {
                return;
            }
            stream.exchange.borrow_mut().response_headers = Some(fields);
            worker.deliver_headers(id, stream, Direction::Response, stream.first(Direction::Response), end_of_stream);
        });
    }

    /// More of the response's body.
    pub fn response_body(&mut self, id: StreamId, bytes: Bytes, end_of_stream: bool) {
        self.with_stream(id, |worker, stream| {
            if stream.local.is_some() {
                return;
            }
            worker.begin_body(id, stream, Direction::Response, bytes, end_of_stream);
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
                *view = StageView { logging: true, ..StageView::default() };
            }
        }
        for stage in 0..stream.stages.len() {
            // Also a plugin that the request never reached gets to log it.
            if let Guest::Ready { slot, context } =
                self.guest(id, &mut stream.stages[stage].seat, stage, &stream.exchange)
            {
                self.run(slot, None, |vm| vm.on_log(context));
            }
        }
        for view in &mut stream.exchange.borrow_mut().stages {
            *view = StageView::default();
        }
        for stage in 0..stream.stages.len() {
            if let Guest::Ready { slot, context } = self.existing_guest(&stream.stages[stage].seat) {
                // A stream's context is deleted whatever the guest answers, as in Envoy.
                self.run(slot, None, |vm| vm.on_done(context));
                self.run(slot, None, |vm| vm.delete(context));
            }
        }
        self.cancel_calls_of(id);
        self.settle();
    }

    /// Whether the embedder should read more of this direction: not while a filter holds as much as may wait.
    /// [`Action::Readable`] says when it should again.
    pub fn may_read(&self, id: StreamId, direction: Direction) -> bool {
        if let Some(relay) = self.relays.get(&id) {
            return !relay.is_blocked(direction);
        }
        self.streams.get(&id).is_none_or(|stream| !stream.is_full(direction))
    }

    /// The request takes another route than the one it was opened with.
    pub fn rerouted(&mut self, id: StreamId, route: RouteInfo) {
        if let Some(stream) = self.streams.get(&id) {
            stream.exchange.borrow_mut().info.route = route;
        }
    }

    /// Whether the route is to be chosen again, since this was last asked: a guest has changed the request's fields, or said
    /// so. Envoy looks for a route once more after every change.
    pub fn route_cleared(&mut self, id: StreamId) -> bool {
        self.streams.get(&id).is_some_and(|stream| std::mem::take(&mut stream.exchange.borrow_mut().route_cleared))
    }

    // ---- other events

    /// What a stream's filters hold back in one direction: the first that holds something, in the direction's order, as an
    /// index into the filters that [`Worker::open`] was given.
    pub fn held(&self, id: StreamId, direction: Direction) -> Option<(usize, Hold)> {
        let stream = self.streams.get(&id)?;
        let mut at = stream.first(direction);
        while let Some(stage) = at {
            match stream.stages[stage].lane(direction).hold {
                Hold::Nothing => at = stream.next(direction, stage),
                hold => return Some((stage, hold)),
            }
        }
        None
    }

    /// Gives a stream a property that guests read at `path` (segments separated by NUL), before anything that the host
    /// knows by that name. For embedders that stand in for another host.
    pub fn set_property(&mut self, id: StreamId, path: &[u8], value: Vec<u8>) {
        if let Some(stream) = self.streams.get(&id) {
            stream.exchange.borrow_mut().given.insert(path.to_vec(), value);
        }
    }

    /// What guests have stored with a stream, by the names that they see: filter state, which `proxy_set_property` keeps
    /// below `wasm.`.
    pub fn stored_properties(&self, id: StreamId) -> Vec<(Vec<u8>, Vec<u8>)> {
        let Some(stream) = self.streams.get(&id) else { return Vec::new() };
        let exchange = stream.exchange.borrow();
        exchange.filter_state.readable()
    }

    /// When the next tick is due, on the embedder's monotonic clock.
    pub fn next_timer(&self) -> Option<Duration> {
        let roots = self.vms.iter().filter_map(|slot| slot.vm.as_ref()).flat_map(|vm| vm.state().roots.values());
        roots.filter_map(|root| root.next_tick).min()
    }

    /// Calls ticks that are due, the one that has waited longest first. Some may be left over for the next call, so that
    /// requests get their turn in between. A period counts from the end of a tick.
    pub fn run_timers(&mut self) {
        let began = self.now();
        let mut due: Vec<(Duration, u64, u32)> = Vec::new();
        for place in &self.vms {
            let Some(vm) = &place.vm else { continue };
            let ticks =
                vm.state().roots.iter().filter_map(|(context, root)| Some((root.next_tick?, place.id, *context)));
            due.extend(ticks.filter(|(at, ..)| *at <= began));
        }
        due.sort_unstable();
        for (_, vm_id, context) in due {
            // A VM that trapped meanwhile takes its ticks with it.
            let Some(slot) = self.vms.iter().position(|place| place.id == vm_id) else { continue };
            self.run(slot, None, |vm| vm.on_tick(context));
            let now = self.now();
            if let Some(vm) = &mut self.vms[slot].vm
                && let Some(root) = vm.state_mut().roots.get_mut(&context)
            {
                root.next_tick = root.tick_period.map(|period| now + period);
            }
            if now.saturating_sub(began) >= TURN {
                break;
            }
        }
        self.settle();
    }

    pub(crate) fn tick(&mut self, plugin: usize) {
        let (slot, root) = (self.plugins[plugin].vm, self.plugins[plugin].root);
        self.run(slot, None, |vm| vm.on_tick(root));
    }

    /// Tells `waker` whenever [`Worker::run_notifications`] has something to do.
    pub fn set_waker(&mut self, waker: Waker) {
        self.mailbox.set_waker(waker);
    }

    /// Tells guests of new items in the queues they registered. What takes too long is left over; the waker then comes again.
    pub fn run_notifications(&mut self) {
        let began = self.now();
        // No more than wait now: a guest can put an item in while it is told of one.
        for _ in 0..self.mailbox.len() {
            let Some(notification) = self.mailbox.take_one() else { break };
            let slot = self.vms.iter().position(|slot| slot.id == notification.owner.vm);
            if let Some(slot) = slot {
                self.run(slot, None, |vm| vm.on_queue_ready(notification.owner.context, notification.queue));
            }
            if self.now().saturating_sub(began) >= TURN {
                break;
            }
        }
        if self.mailbox.len() > 0 {
            self.mailbox.wake();
        }
        self.settle();
    }

    /// How the plugins are, in the order given to [`Worker::start`].
    pub fn health(&self) -> Vec<PluginHealth> {
        self.plugins
            .iter()
            .map(|slot| {
                let vm = &self.vms[slot.vm];
                let state = vm
                    .failure
                    .as_ref()
                    .map_or(PluginState::Running, |failure| PluginState::Failed(failure.cause.clone()));
                PluginHealth { plugin: slot.plugin.name.clone(), state, traps: vm.traps, reloads: vm.reloads }
            })
            .collect()
    }

    /// Tells all plugins' root contexts that this is the end. Streams should be finished before.
    ///
    /// A guest that is not done yet goes on with ticks, notifications and callouts until it calls `proxy_done`, which
    /// [`Worker::has_ended`] tells, or until the embedder's patience ends in [`Worker::abandon`].
    pub fn shutdown(&mut self) {
        for (slot, vm, root) in self.roots() {
            if self.root_mut(slot, root).is_none_or(|root| root.done_pending) {
                continue;
            }
            match self.run(slot, None, |vm| vm.on_done(root)) {
                Some(true) => self.end_root(vm, root),
                Some(false) => {
                    if let Some(root) = self.root_mut(slot, root) {
                        root.done_pending = true;
                    }
                }
                // Its VM is gone, and all its contexts with it.
                None => {}
            }
        }
        self.settle();
    }

    /// Whether no root context is left.
    pub fn has_ended(&self) -> bool {
        self.roots().is_empty()
    }

    /// Ends the root contexts that are left, also of guests that are not done; gives the names of their plugins.
    pub fn abandon(&mut self) -> Vec<String> {
        let mut names = Vec::new();
        for (slot, vm, root) in self.roots() {
            names.extend(self.root_mut(slot, root).map(|root| root.plugin.name.clone()));
            self.end_root(vm, root);
        }
        self.settle();
        names
    }

    /// All root contexts: places and numbers of their VMs, and their own numbers.
    fn roots(&self) -> Vec<(usize, u64, u32)> {
        let vms = self.vms.iter().enumerate().filter_map(|(slot, place)| Some((slot, place.id, place.vm.as_ref()?)));
        vms.flat_map(|(slot, id, vm)| vm.state().roots.keys().map(move |root| (slot, id, *root))).collect()
    }

    fn root_mut(&mut self, slot: usize, root: u32) -> Option<&mut Root> {
        self.vms[slot].vm.as_mut()?.state_mut().roots.get_mut(&root)
    }

    fn end_root(&mut self, vm: u64, root: u32) {
        let Some(slot) = self.vms.iter().position(|place| place.id == vm) else { return };
        self.run(slot, None, |vm| vm.delete(root));
        self.drop_calls(|call, pending| call.vm == vm && pending.root == root);
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

    fn traces(&self) -> bool {
        self.0.traces()
    }

    fn trace(&mut self, event: crate::trace::TraceEvent) {
        self.0.trace(event);
    }
}

/// What Envoy tells VMs apart by.
fn vm_key(plugin: &Plugin) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in [plugin.vm_id.as_bytes(), &plugin.vm_configuration, plugin.module.sha256()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}
