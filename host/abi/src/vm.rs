//! [`Vm`]: one instance of a module with its contexts. Calls guests; never called by them (see [`crate::hostcalls`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use wasmtime::{Instance, Memory, ResourceLimiter, Store, Trap, TypedFunc, UpdateDeadline, WasmParams, WasmResults};

use crate::abi::{BodyAction, Direction, HeadersAction, LogLevel};
use crate::embedder::{Embedder, Lint, LogRecord};
use crate::engine::EPOCH;
use crate::exchange::Exchange;
use crate::expression::Expressions;
use crate::fields::FieldMap;
use crate::ids::IdMap;
use crate::plugin::Plugin;
use crate::shared::{MetricCell, Shared};
use crate::state::Declarations;
use crate::trace::{self, Words};
use crate::worker::StreamId;

/// Why a guest cannot go on. Its VM is done for: nothing is called in it any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Trapped {
    /// It ran longer than allowed.
    #[error("ran longer than {0:?} in `{1}`")]
    Deadline(Duration, &'static str),
    /// It used up its stack.
    #[error("used up its stack in `{0}`")]
    StackOverflow(&'static str),
    /// It asked for more memory than allowed and did not survive the refusal.
    #[error("wanted more than {0} bytes of memory in `{1}`")]
    Memory(usize, &'static str),
    /// It handed the host something impossible.
    #[error("{fault} in `{callback}`")]
    Fault {
        /// What.
        fault: GuestFault,
        /// Where.
        callback: &'static str,
    },
    /// A trap of its own, a panic among them.
    #[error("trapped in `{callback}`: {cause}")]
    Trap {
        /// wasmtime's word for it.
        cause: String,
        /// Where.
        callback: &'static str,
    },
}

/// What a guest handed over that no correct guest would.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestFault {
    /// A pointer or length outside its memory.
    #[error("gave `{call}` {len} bytes at {pointer:#x}, outside the guest's memory,")]
    OutOfBounds {
        /// The host function.
        call: &'static str,
        /// The address.
        pointer: u32,
        /// The length.
        len: u32,
    },
    /// A host function was called where it must not be.
    #[error("called `{call}` while {doing}, when it is not available,")]
    Restricted {
        /// The host function.
        call: &'static str,
        /// During what.
        doing: &'static str,
    },
    /// Its allocator answered with nothing.
    #[error("has an allocator that refused {0} bytes for the answer of a host function")]
    NoMemory(usize),
    /// Its time was over; told as [`Trapped::Deadline`].
    #[error("used up its time")]
    TimeIsUp,
}

/// Where a guest is: names for errors and lints, and what it may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Callback {
    pub(crate) name: &'static str,
    pub(crate) doing: Doing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Nothing: outside any callback.
    Idle,
    /// `_initialize`, `main`: only the log, clocks, randomness and the environment.
    Starting,
    /// `proxy_on_memory_allocate`: only the log and clocks.
    Allocating,
    /// `proxy_on_configure`: the plugin configuration can be read.
    Configuring,
    /// Any other callback.
    Running,
}

/// The answer of a callout, while the guest may look at it.
#[derive(Debug, Default)]
pub(crate) struct CallView {
    pub(crate) fields: FieldMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: FieldMap,
}

/// A piece of a gRPC answer, while the guest may look at it.
#[derive(Debug)]
pub(crate) enum GrpcView {
    Initial(FieldMap),
    Message(Bytes),
    Trailing(FieldMap),
}

/// A root context: one plugin's.
pub(crate) struct Root {
    pub(crate) plugin: Arc<Plugin>,
    pub(crate) tick_period: Option<Duration>,
    /// When the next tick is due, on the embedder's monotonic clock.
    pub(crate) next_tick: Option<Duration>,
    pub(crate) call_view: Option<CallView>,
    pub(crate) grpc_view: Option<GrpcView>,
    /// What `proxy_get_status` answers.
    pub(crate) status: (u32, Vec<u8>),
    /// Properties that this context has declared; they hold for what its streams set.
    pub(crate) declared: Declarations,
    pub(crate) expressions: Expressions,
    /// The guest answered `proxy_on_done` with no and has not called `proxy_done` yet.
    pub(crate) done_pending: bool,
}

/// A stream context: one plugin's view of one stream.
pub(crate) struct StreamContext {
    pub(crate) root: u32,
    pub(crate) stream: StreamId,
    pub(crate) stage: usize,
    pub(crate) exchange: Rc<RefCell<Exchange>>,
    /// Properties that this context has declared. Nothing is ever set by them, as in Envoy: only a root's count.
    pub(crate) declared: Declarations,
}

/// What a token stands for; its low bits say so, as in Envoy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallKind {
    Http = 0,
    GrpcCall = 1,
    GrpcStream = 2,
}

impl CallKind {
    pub(crate) fn of(token: u32) -> Option<CallKind> {
        [CallKind::Http, CallKind::GrpcCall, CallKind::GrpcStream].into_iter().find(|kind| *kind as u32 == token & 3)
    }
}

/// A callout under way, as far as the guest's further calls need to know it.
#[derive(Debug, Default)]
pub(crate) struct OpenCall {
    /// What a stream's messages that have not left yet take.
    pub(crate) unsent: usize,
    /// The guest has ended its side of the stream.
    pub(crate) half_closed: bool,
    /// It has called `proxy_grpc_close`: once the answer has ended too, the stream is forgotten.
    pub(crate) closed: bool,
}

impl OpenCall {
    /// What a piece takes while it waits; a small one costs the host more than its bytes.
    pub(crate) fn cost(bytes: usize) -> usize {
        bytes + 64
    }
}

/// Whose a callout is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallOwner {
    pub(crate) token: u32,
    pub(crate) root: u32,
    /// The stream for whose sake it was made, unless the stream was ending already.
    pub(crate) stream: Option<StreamId>,
}

/// What a guest asked for about callouts, in order.
#[derive(Debug)]
pub(crate) enum CallRequest {
    Http {
        owner: CallOwner,
        upstream: String,
        fields: FieldMap,
        body: Bytes,
        trailers: FieldMap,
        timeout: Option<Duration>,
    },
    Grpc {
        owner: CallOwner,
        upstream: String,
        fields: FieldMap,
        timeout: Option<Duration>,
        /// Longest message that is taken from the answer.
        message_bytes_max: usize,
    },
    /// A framed message, or the end of the guest's side.
    Send {
        token: u32,
        bytes: Bytes,
        end_of_stream: bool,
    },
    /// More waits to be sent than may.
    Overflow {
        token: u32,
    },
    Cancel {
        token: u32,
    },
}

impl CallRequest {
    pub(crate) fn token(&self) -> u32 {
        match self {
            CallRequest::Http { owner, .. } | CallRequest::Grpc { owner, .. } => owner.token,
            CallRequest::Send { token, .. } | CallRequest::Overflow { token } | CallRequest::Cancel { token } => *token,
        }
    }
}

/// Tokens of gRPC exchanges whose end was told, or is being told, and which the guest may still close or cancel.
///
/// Envoy keeps streams that a guest never closes for ever; here the oldest are forgotten, and are then unknown.
#[derive(Debug, Default)]
pub(crate) struct Ended(VecDeque<u32>);

impl Ended {
    const MAX: usize = 1024;

    pub(crate) fn insert(&mut self, token: u32) {
        if self.0.len() == Self::MAX {
            self.0.pop_front();
        }
        self.0.push_back(token);
    }

    pub(crate) fn contains(&self, token: u32) -> bool {
        self.0.contains(&token)
    }

    pub(crate) fn remove(&mut self, token: u32) -> bool {
        // The one at hand is nearly always the last.
        let at = self.0.iter().rposition(|ended| *ended == token);
        at.is_some_and(|at| self.0.remove(at).is_some())
    }
}

/// State of the host that belongs to one VM; what host functions work on.
pub(crate) struct VmState {
    pub(crate) memory: Option<Memory>,
    pub(crate) allocate: Option<Func<u32, u32>>,
    pub(crate) embedder: Rc<RefCell<dyn Embedder>>,
    /// The embedder wants to hear of every call.
    pub(crate) traced: bool,
    pub(crate) shared: Arc<Shared>,
    pub(crate) worker: u64,
    pub(crate) id: u64,
    /// The plugin that the VM was made for: its VM configuration, environment and limits hold for all that share it.
    pub(crate) plugin: Arc<Plugin>,
    pub(crate) roots: BTreeMap<u32, Root>,
    pub(crate) streams: IdMap<u32, StreamContext>,
    /// Some plugin here may not call every function: only then each call has to be looked at.
    pub(crate) restricted: bool,
    pub(crate) callback: Callback,
    /// The context whose callback runs.
    pub(crate) context: u32,
    /// The context that `proxy_set_effective_context` put in its place.
    pub(crate) effective: u32,
    next_context: u32,
    /// The last token of each kind.
    last_tokens: [u32; 3],
    /// Callouts under way, by token.
    pub(crate) calls: IdMap<u32, OpenCall>,
    pub(crate) ended: Ended,
    pub(crate) call_requests: Vec<CallRequest>,
    /// Streams, with stages, in which a guest asked for something.
    pub(crate) touched: Vec<(StreamId, usize)>,
    /// Root contexts for which a guest has called `proxy_done`.
    pub(crate) done: Vec<u32>,
    pub(crate) metrics: MetricTable,
    log_budget: LogBudget,
    /// Lints have a budget of their own, as large: a guest that errs in a loop must not use up its log, nor flood ours.
    lint_budget: LogBudget,
    limiter: MemoryLimiter,
    pub(crate) time: CallbackTime,
    /// For answers on their way into the guest's memory.
    pub(crate) scratch: Vec<u8>,
    /// Lines logged while the guest starts, for the error if it does not.
    start_log: Option<Vec<String>>,
}

/// Lines of a guest's log that the error about its start shows.
const START_LOG_LINES_MAX: usize = 50;

/// Metrics that this VM has defined; an id's low bits say the kind, as in Envoy.
#[derive(Default)]
pub(crate) struct MetricTable {
    pub(crate) by_id: IdMap<u32, Arc<MetricCell>>,
    pub(crate) next: [u32; 3],
}

/// Lines a guest may still log in this second.
#[derive(Default)]
pub(crate) struct LogBudget {
    second: Option<Duration>,
    left: u32,
    dropped: u64,
}

impl LogBudget {
    /// Takes one line's worth, of `most` a second. `None`: there is none left. Else how many lines were dropped in the second
    /// before, to be told once.
    fn take(&mut self, now: Duration, most: u32) -> Option<u64> {
        let second = Duration::from_secs(now.as_secs());
        let mut dropped = 0;
        if self.second != Some(second) {
            dropped = self.dropped;
            *self = LogBudget { second: Some(second), left: most, dropped: 0 };
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(dropped)
            }
            None => {
                self.dropped += 1;
                None
            }
        }
    }
}

/// The time that the callback under way may take: CPU time of this thread, so that a machine which is busy with something else
/// does not make a guest look like one that loops.
#[derive(Default)]
pub(crate) struct CallbackTime {
    budget: Duration,
    /// The thread's CPU time at the first look, up to [`EPOCH`] after the callback began.
    since: Option<Duration>,
}

impl CallbackTime {
    /// After how many ticks to look again. An error: the time is up.
    pub(crate) fn look(&mut self) -> Result<u64, GuestFault> {
        let now = thread_cpu_time();
        let used = now.saturating_sub(*self.since.get_or_insert(now));
        match self.budget.checked_sub(used) {
            Some(left) if !left.is_zero() => Ok(left.as_nanos().div_ceil(EPOCH.as_nanos()) as u64),
            _ => Err(GuestFault::TimeIsUp),
        }
    }
}

/// How long this thread has been computing.
fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Elements of all tables together. A guest's function table has thousands; a million are 8 MiB of the host's memory.
const TABLE_ELEMENTS_MAX: usize = 1_000_000;

/// Bounds what all memories and all tables of a VM take together: a module may have several.
struct MemoryLimiter {
    bytes_max: usize,
    bytes: usize,
    table_elements: usize,
    refused: Option<Refused>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Refused {
    Memory,
    Table,
}

impl MemoryLimiter {
    fn new(bytes_max: usize) -> MemoryLimiter {
        MemoryLimiter { bytes_max, bytes: 0, table_elements: 0, refused: None }
    }
}

/// Adds to `total` what one part of it grows by, unless that makes more than `max`; says whether it did.
fn grow(total: &mut usize, current: usize, desired: usize, max: usize) -> bool {
    let grown = total.checked_add(desired.saturating_sub(current)).filter(|grown| *grown <= max);
    *total = grown.unwrap_or(*total);
    grown.is_some()
}

impl ResourceLimiter for MemoryLimiter {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            // Beyond the module's own bound, where wasmtime refuses whatever is answered here.
            return Ok(false);
        }
        let fits = grow(&mut self.bytes, current, desired, self.bytes_max);
        if !fits {
            self.refused = Some(Refused::Memory);
        }
        Ok(fits)
    }

    fn table_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let fits = grow(&mut self.table_elements, current, desired, TABLE_ELEMENTS_MAX);
        if !fits {
            self.refused = Some(Refused::Table);
        }
        Ok(fits)
    }
}

impl VmState {
    /// The plugin of the context that a call acts for.
    pub(crate) fn root_id_of(&self, context: u32) -> Option<u32> {
        if self.roots.contains_key(&context) {
            return Some(context);
        }
        self.streams.get(&context).map(|stream| stream.root)
    }

    pub(crate) fn effective_root(&self) -> Option<u32> {
        self.root_id_of(self.effective).or_else(|| self.root_id_of(self.context))
    }

    /// The plugin on whose behalf the guest is running.
    pub(crate) fn current_plugin(&self) -> &Arc<Plugin> {
        let root = self.effective_root().and_then(|root| self.roots.get(&root));
        root.map_or(&self.plugin, |root| &root.plugin)
    }

    /// The stream context that calls act on, if they act on one.
    pub(crate) fn effective_stream(&self) -> Option<&StreamContext> {
        self.streams.get(&self.effective)
    }

    /// Tells the embedder of a call that cannot do what it seems to, within the guest's budget.
    pub(crate) fn lint(&mut self, call: &'static str, reason: impl FnOnce() -> String) {
        let now = self.embedder.borrow().monotonic();
        let plugin = Arc::clone(self.current_plugin());
        if self.lint_budget.take(now, plugin.limits.log_lines_per_second).is_some() {
            let lint = Lint { plugin: &plugin.name, callback: self.callback.name, call, reason: reason() };
            self.embedder.borrow_mut().lint(&lint);
        }
    }

    /// A token for a new callout, as Envoy counts them: 4, 8, 12.. or 5, 9, 13.. or 6, 10, 14... One still in use is
    /// not given again.
    pub(crate) fn new_token(&mut self, kind: CallKind) -> u32 {
        loop {
            let last = &mut self.last_tokens[kind as usize];
            *last = last.wrapping_add(4);
            let token = *last;
            if token > 3 && !self.calls.contains_key(&token) && !self.ended.contains(token) {
                return token;
            }
        }
    }

    /// Logs a guest's or the host's line about the guest, within the guest's budget.
    pub(crate) fn log(&mut self, level: LogLevel, message: &[u8]) {
        let now = self.embedder.borrow().monotonic();
        let plugin = Arc::clone(self.current_plugin());
        let Some(dropped) = self.log_budget.take(now, plugin.limits.log_lines_per_second) else { return };
        let stream = self.effective_stream().map(|context| context.stream);
        let mut embedder = self.embedder.borrow_mut();
        if dropped > 0 {
            let message =
                format!("{dropped} lines were dropped: more than {} a second", plugin.limits.log_lines_per_second);
            embedder.log(&LogRecord { plugin: &plugin.name, stream: None, level: LogLevel::Warn, message: &message });
        }
        let cut = &message[..message.len().min(plugin.limits.log_line_bytes_max)];
        let message = String::from_utf8_lossy(cut);
        if let Some(lines) = &mut self.start_log
            && level >= LogLevel::Warn
            && lines.len() < START_LOG_LINES_MAX
        {
            lines.push(message.clone().into_owned());
        }
        embedder.log(&LogRecord { plugin: &plugin.name, stream, level, message: &message });
    }
}

/// Root context, token, numbers of fields, of bytes, of trailers.
type CallResponseParams = (u32, u32, u32, u32, u32);

/// A function of the guest's. Behind a count, because a copy of the function itself counts in what all threads share, which takes
/// longer than the call.
type Func<P, R> = Rc<TypedFunc<P, R>>;

/// Functions that a guest may export.
struct Exports {
    context_create: Option<Func<(u32, u32), ()>>,
    vm_start: Option<Func<(u32, u32), u32>>,
    configure: Option<Func<(u32, u32), u32>>,
    tick: Option<Func<u32, ()>>,
    queue_ready: Option<Func<(u32, u32), ()>>,
    request_headers: Option<HeadersFunc>,
    request_body: Option<Func<(u32, u32, u32), u32>>,
    request_trailers: Option<Func<(u32, u32), u32>>,
    response_headers: Option<HeadersFunc>,
    response_body: Option<Func<(u32, u32, u32), u32>>,
    response_trailers: Option<Func<(u32, u32), u32>>,
    new_connection: Option<Func<u32, u32>>,
    downstream_data: Option<Func<(u32, u32, u32), u32>>,
    upstream_data: Option<Func<(u32, u32, u32), u32>>,
    downstream_close: Option<Func<(u32, u32), ()>>,
    upstream_close: Option<Func<(u32, u32), ()>>,
    http_call_response: Option<Func<CallResponseParams, ()>>,
    grpc_initial: Option<Func<(u32, u32, u32), ()>>,
    grpc_receive: Option<Func<(u32, u32, u32), ()>>,
    grpc_trailing: Option<Func<(u32, u32, u32), ()>>,
    grpc_close: Option<Func<(u32, u32, u32), ()>>,
    done: Option<Func<u32, u32>>,
    log: Option<Func<u32, ()>>,
    delete: Option<Func<u32, ()>>,
}

/// ABI 0.1.0 has no word on the end of the stream.
#[derive(Clone)]
enum HeadersFunc {
    Current(Func<(u32, u32, u32), u32>),
    V0_1_0(Func<(u32, u32), u32>),
}

impl Exports {
    /// `proxy_on_*` functions by name; one that the plugin may not have called is left out.
    fn find(store: &mut Store<VmState>, instance: &Instance, plugin: &Plugin) -> Exports {
        let allowed = |name: &str| plugin.capabilities.callbacks.as_ref().is_none_or(|names| names.contains(name));
        macro_rules! export {
            ($name:literal) => {
                allowed($name).then(|| instance.get_typed_func(&mut *store, $name).ok().map(Rc::new)).flatten()
            };
        }
        macro_rules! headers {
            ($name:literal) => {
                match export!($name) {
                    Some(func) => Some(HeadersFunc::Current(func)),
                    None => export!($name).map(HeadersFunc::V0_1_0),
                }
            };
        }
        Exports {
            context_create: export!("proxy_on_context_create"),
            vm_start: export!("proxy_on_vm_start"),
            configure: export!("proxy_on_configure"),
            tick: export!("proxy_on_tick"),
            queue_ready: export!("proxy_on_queue_ready"),
            request_headers: headers!("proxy_on_request_headers"),
            request_body: export!("proxy_on_request_body"),
            request_trailers: export!("proxy_on_request_trailers"),
            response_headers: headers!("proxy_on_response_headers"),
            response_body: export!("proxy_on_response_body"),
            response_trailers: export!("proxy_on_response_trailers"),
            new_connection: export!("proxy_on_new_connection"),
            downstream_data: export!("proxy_on_downstream_data"),
            upstream_data: export!("proxy_on_upstream_data"),
            downstream_close: export!("proxy_on_downstream_connection_close"),
            upstream_close: export!("proxy_on_upstream_connection_close"),
            http_call_response: export!("proxy_on_http_call_response"),
            grpc_initial: export!("proxy_on_grpc_receive_initial_metadata"),
            grpc_receive: export!("proxy_on_grpc_receive"),
            grpc_trailing: export!("proxy_on_grpc_receive_trailing_metadata"),
            grpc_close: export!("proxy_on_grpc_close"),
            done: export!("proxy_on_done"),
            log: export!("proxy_on_log"),
            delete: export!("proxy_on_delete"),
        }
    }
}

/// Why a VM did not come up.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmStartError {
    /// wasmtime could not make the instance, memory being the usual reason.
    #[error("cannot be instantiated: {0}")]
    Instantiate(String),
    /// The guest trapped.
    #[error("{0}")]
    Trapped(#[from] Trapped),
    /// `proxy_on_vm_start` answered no.
    #[error("refused its VM configuration")]
    VmConfigurationRefused,
    /// `proxy_on_configure` answered no.
    #[error("refused its configuration")]
    ConfigurationRefused,
}

/// One instance of a module and all contexts in it.
pub(crate) struct Vm {
    store: Store<VmState>,
    exports: Exports,
    /// Root contexts by what Envoy keys them on: root id, configuration, name.
    roots_by_key: HashMap<(String, Vec<u8>, String), u32>,
    started: bool,
    /// The thread's CPU time when the VM, or a later plugin in it, began to start.
    start_began: Duration,
}

/// Surroundings of a VM, the same for all of a worker.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) embedder: Rc<RefCell<dyn Embedder>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) worker: u64,
}

impl Vm {
    /// Instantiates the plugin's module and runs its start functions.
    pub(crate) fn new(surroundings: &Surroundings, id: u64, plugin: &Arc<Plugin>) -> Result<Vm, VmStartError> {
        let start_began = thread_cpu_time();
        let engine = plugin.module.engine();
        let state = VmState {
            memory: None,
            allocate: None,
            embedder: Rc::clone(&surroundings.embedder),
            traced: surroundings.embedder.borrow().traces(),
            shared: Arc::clone(&surroundings.shared),
            worker: surroundings.worker,
            id,
            plugin: Arc::clone(plugin),
            roots: BTreeMap::new(),
            streams: IdMap::default(),
            restricted: plugin.capabilities.functions.is_some(),
            callback: Callback { name: "_initialize", doing: Doing::Starting },
            context: 0,
            effective: 0,
            next_context: 1,
            last_tokens: [CallKind::Http, CallKind::GrpcCall, CallKind::GrpcStream].map(|kind| kind as u32),
            calls: IdMap::default(),
            ended: Ended::default(),
            call_requests: Vec::new(),
            touched: Vec::new(),
            done: Vec::new(),
            metrics: MetricTable::default(),
            log_budget: LogBudget::default(),
            lint_budget: LogBudget::default(),
            time: CallbackTime::default(),
            limiter: MemoryLimiter::new(plugin.limits.memory_bytes_max),
            scratch: Vec::new(),
            start_log: Some(Vec::new()),
        };
        let mut store = Store::new(&engine.wasmtime, state);
        store.limiter(|state| &mut state.limiter);
        store.epoch_deadline_callback(|mut store| Ok(UpdateDeadline::Continue(store.data_mut().time.look()?)));
        set_deadline(&mut store, plugin.limits.start_time_max);
        let instance = plugin.module.instance_pre().instantiate(&mut store).map_err(|error| {
            let limiter = &store.data().limiter;
            // The module's own start section ran, and not to its end.
            if error.is::<Trap>() || error.is::<GuestFault>() {
                let limit = plugin.limits.start_time_max;
                return VmStartError::Trapped(classify(&error, "start section", limit, limiter));
            }
            match limiter.refused {
                None => VmStartError::Instantiate(format!("{error:#}")),
                Some(Refused::Memory) => VmStartError::Instantiate(format!(
                    "it starts with more than the {} bytes of memory allowed\n  hint: raise `limits.memory`",
                    limiter.bytes_max
                )),
                Some(Refused::Table) => VmStartError::Instantiate(format!(
                    "its tables start with more than the {TABLE_ELEMENTS_MAX} elements allowed"
                )),
            }
        })?;
        let memory = instance.get_memory(&mut store, "memory");
        // In Envoy's order: the specification has it the other way round, but a module that exports both is used to this.
        let allocate = ["malloc", "proxy_on_memory_allocate"]
            .into_iter()
            .find_map(|name| instance.get_typed_func(&mut store, name).ok())
            .map(Rc::new);
        store.data_mut().memory = memory;
        store.data_mut().allocate = allocate;
        let exports = Exports::find(&mut store, &instance, plugin);
        let mut vm = Vm { store, exports, roots_by_key: HashMap::new(), started: false, start_began };
        vm.run_start_functions(&instance, plugin)?;
        Ok(vm)
    }

    fn run_start_functions(&mut self, instance: &Instance, plugin: &Plugin) -> Result<(), VmStartError> {
        let callback = |name| Callback { name, doing: Doing::Starting };
        if let Ok(initialize) = instance.get_typed_func::<(), ()>(&mut self.store, "_initialize") {
            self.call(callback("_initialize"), 0, self.time_to_start(plugin), &initialize, ())?;
            if let Ok(main) = instance.get_typed_func::<(u32, u32), u32>(&mut self.store, "main") {
                self.call(callback("main"), 0, self.time_to_start(plugin), &main, (0, 0))?;
            } else if let Ok(main) = instance.get_typed_func::<(), u32>(&mut self.store, "__main_void") {
                self.call(callback("__main_void"), 0, self.time_to_start(plugin), &main, ())?;
            }
        } else if let Ok(start) = instance.get_typed_func::<(), ()>(&mut self.store, "_start") {
            self.call(callback("_start"), 0, self.time_to_start(plugin), &start, ())?;
        }
        Ok(())
    }

    /// Makes the plugin's root context, or finds the one it shares; returns its id.
    pub(crate) fn add_plugin(&mut self, plugin: &Arc<Plugin>) -> Result<u32, VmStartError> {
        let key = (plugin.root_id.clone(), plugin.configuration.clone(), plugin.name.clone());
        if let Some(root) = self.roots_by_key.get(&key) {
            return Ok(*root);
        }
        let id = self.new_context_id();
        let root = Root {
            plugin: Arc::clone(plugin),
            tick_period: None,
            next_tick: None,
            call_view: None,
            grpc_view: None,
            status: (0, Vec::new()),
            declared: Declarations::default(),
            expressions: Expressions::default(),
            done_pending: false,
        };
        let state = self.store.data_mut();
        state.restricted |= plugin.capabilities.functions.is_some();
        state.roots.insert(id, root);
        if self.started {
            self.start_began = thread_cpu_time();
        }
        if let Some(create) = self.exports.context_create.clone() {
            self.call(running("proxy_on_context_create"), id, self.time_to_start(plugin), &create, (id, 0))?;
        }
        self.started = true;
        // Envoy tells every root of its VM, not only the first.
        if let Some(start) = self.exports.vm_start.clone() {
            let len = self.store.data().plugin.vm_configuration.len() as u32;
            if self.call(running("proxy_on_vm_start"), id, self.time_to_start(plugin), &start, (id, len))? == 0 {
                return Err(VmStartError::VmConfigurationRefused);
            }
        }
        if let Some(configure) = self.exports.configure.clone() {
            let callback = Callback { name: "proxy_on_configure", doing: Doing::Configuring };
            let len = plugin.configuration.len() as u32;
            if self.call(callback, id, self.time_to_start(plugin), &configure, (id, len))? == 0 {
                return Err(VmStartError::ConfigurationRefused);
            }
        }
        self.roots_by_key.insert(key, id);
        Ok(id)
    }

    /// What is left of the time in which the plugin has to start.
    fn time_to_start(&self, plugin: &Plugin) -> Allowance {
        let limit = plugin.limits.start_time_max;
        Allowance { limit, left: limit.saturating_sub(thread_cpu_time().saturating_sub(self.start_began)) }
    }

    /// What the guest has logged, at level warn and above, since it was made or since the last call of this.
    pub(crate) fn take_start_log(&mut self) -> Vec<String> {
        self.store.data_mut().start_log.replace(Vec::new()).unwrap_or_default()
    }

    /// The guest stands: from now on its lines go to the embedder only.
    pub(crate) fn end_start_log(&mut self) {
        self.store.data_mut().start_log = None;
    }

    pub(crate) fn state(&self) -> &VmState {
        self.store.data()
    }

    pub(crate) fn state_mut(&mut self) -> &mut VmState {
        self.store.data_mut()
    }

    fn new_context_id(&mut self) -> u32 {
        let state = self.store.data_mut();
        loop {
            let id = state.next_context;
            // 0 means "no parent"; an id still alive is not given again.
            state.next_context = state.next_context.checked_add(1).unwrap_or(1);
            if !state.roots.contains_key(&id) && !state.streams.contains_key(&id) {
                return id;
            }
        }
    }

    /// Makes a context for a stream; `proxy_on_context_create` has run when this returns.
    pub(crate) fn create_stream_context(&mut self, context: StreamContext) -> Result<u32, Trapped> {
        let id = self.new_context_id();
        let root = context.root;
        self.store.data_mut().streams.insert(id, context);
        if let Some(create) = self.exports.context_create.clone() {
            self.callback("proxy_on_context_create", id, &create, (id, root))?;
        }
        Ok(id)
    }

    pub(crate) fn on_headers(
        &mut self,
        direction: Direction,
        context: u32,
        count: u32,
        end_of_stream: bool,
    ) -> Result<HeadersAction, Trapped> {
        let (name, func) = match direction {
            Direction::Request => ("proxy_on_request_headers", self.exports.request_headers.clone()),
            Direction::Response => ("proxy_on_response_headers", self.exports.response_headers.clone()),
        };
        let action = match func {
            None => 0,
            Some(HeadersFunc::Current(func)) => {
                self.callback(name, context, &func, (context, count, u32::from(end_of_stream)))?
            }
            Some(HeadersFunc::V0_1_0(func)) => self.callback(name, context, &func, (context, count))?,
        };
        Ok(HeadersAction::from_guest(action))
    }

    pub(crate) fn on_body(
        &mut self,
        direction: Direction,
        context: u32,
        len: u32,
        end_of_stream: bool,
    ) -> Result<BodyAction, Trapped> {
        let (name, func) = match direction {
            Direction::Request => ("proxy_on_request_body", self.exports.request_body.clone()),
            Direction::Response => ("proxy_on_response_body", self.exports.response_body.clone()),
        };
        let action = match func {
            None => 0,
            Some(func) => self.callback(name, context, &func, (context, len, u32::from(end_of_stream)))?,
        };
        Ok(BodyAction::from_guest(action))
    }

    pub(crate) fn on_trailers(
        &mut self,
        direction: Direction,
        context: u32,
        count: u32,
    ) -> Result<HeadersAction, Trapped> {
        let (name, func) = match direction {
            Direction::Request => ("proxy_on_request_trailers", self.exports.request_trailers.clone()),
            Direction::Response => ("proxy_on_response_trailers", self.exports.response_trailers.clone()),
        };
        let action = match func {
            None => 0,
            Some(func) => self.callback(name, context, &func, (context, count))?,
        };
        Ok(HeadersAction::from_guest(action))
    }

    /// Tells of a TCP connection; says whether the guest holds it.
    pub(crate) fn on_new_connection(&mut self, context: u32) -> Result<bool, Trapped> {
        match self.exports.new_connection.clone() {
            None => Ok(false),
            // Whatever is not "continue" is a pause: there is but one kind here.
            Some(func) => Ok(self.callback("proxy_on_new_connection", context, &func, context)? != 0),
        }
    }

    /// Shows the bytes of a TCP connection; says whether the guest holds them.
    pub(crate) fn on_data(
        &mut self,
        direction: Direction,
        context: u32,
        len: u32,
        end_of_stream: bool,
    ) -> Result<bool, Trapped> {
        let (name, func) = match direction {
            Direction::Request => ("proxy_on_downstream_data", self.exports.downstream_data.clone()),
            Direction::Response => ("proxy_on_upstream_data", self.exports.upstream_data.clone()),
        };
        match func {
            None => Ok(false),
            Some(func) => Ok(self.callback(name, context, &func, (context, len, u32::from(end_of_stream)))? != 0),
        }
    }

    /// Tells that the client's or, respectively, the upstream's side of a TCP connection is closed.
    pub(crate) fn on_connection_close(&mut self, direction: Direction, context: u32, by: u32) -> Result<(), Trapped> {
        let (name, func) = match direction {
            Direction::Request => ("proxy_on_downstream_connection_close", self.exports.downstream_close.clone()),
            Direction::Response => ("proxy_on_upstream_connection_close", self.exports.upstream_close.clone()),
        };
        match func {
            None => Ok(()),
            Some(func) => self.callback(name, context, &func, (context, by)),
        }
    }

    /// Delivers a callout's answer; `None` is a failure without an answer.
    pub(crate) fn on_http_call_response(
        &mut self,
        root: u32,
        token: u32,
        answer: Option<CallView>,
    ) -> Result<(), Trapped> {
        if self.store.data_mut().calls.remove(&token).is_none() {
            return Ok(());
        }
        let Some(func) = self.exports.http_call_response.clone() else {
            return Ok(());
        };
        let (fields, body, trailers) = answer.as_ref().map_or((0, 0, 0), |answer| {
            (answer.fields.len() as u32, answer.body.len() as u32, answer.trailers.len() as u32)
        });
        if answer.is_none() {
            // Envoy's number of a broken connection, which is not the specification's (9).
            self.set_status(root, 11, b"reset".to_vec());
        }
        self.with_root(root, |root| root.call_view = answer);
        let result = self.callback("proxy_on_http_call_response", root, &func, (root, token, fields, body, trailers));
        self.with_root(root, |root| root.call_view = None);
        self.end_status(root);
        result
    }

    /// Delivers a piece of a gRPC answer.
    pub(crate) fn on_grpc_receive(&mut self, root: u32, token: u32, piece: GrpcView) -> Result<(), Trapped> {
        let (name, func, size) = match &piece {
            GrpcView::Initial(fields) => {
                ("proxy_on_grpc_receive_initial_metadata", self.exports.grpc_initial.clone(), fields.len())
            }
            GrpcView::Message(message) => ("proxy_on_grpc_receive", self.exports.grpc_receive.clone(), message.len()),
            GrpcView::Trailing(fields) => {
                ("proxy_on_grpc_receive_trailing_metadata", self.exports.grpc_trailing.clone(), fields.len())
            }
        };
        let Some(func) = func else {
            return Ok(());
        };
        self.with_root(root, |root| root.grpc_view = Some(piece));
        let result = self.callback(name, root, &func, (root, token, size as u32));
        self.with_root(root, |root| root.grpc_view = None);
        result
    }

    /// Tells of the end of a gRPC stream, or of a call that failed.
    pub(crate) fn on_grpc_close(&mut self, root: u32, token: u32, code: u32, message: Vec<u8>) -> Result<(), Trapped> {
        let Some(func) = self.exports.grpc_close.clone() else {
            return Ok(());
        };
        self.set_status(root, code, message);
        let result = self.callback("proxy_on_grpc_close", root, &func, (root, token, code));
        self.end_status(root);
        result
    }

    fn set_status(&mut self, root: u32, code: u32, message: Vec<u8>) {
        self.with_root(root, |root| root.status = (code, message));
    }

    /// The code stays for later calls of `proxy_get_status`, as in Envoy; the message does not.
    fn end_status(&mut self, root: u32) {
        self.with_root(root, |root| root.status.1 = Vec::new());
    }

    fn with_root(&mut self, root: u32, change: impl FnOnce(&mut Root)) {
        if let Some(root) = self.store.data_mut().roots.get_mut(&root) {
            change(root);
        }
    }

    pub(crate) fn on_tick(&mut self, root: u32) -> Result<(), Trapped> {
        match self.exports.tick.clone() {
            Some(tick) => self.callback("proxy_on_tick", root, &tick, root),
            None => Ok(()),
        }
    }

    pub(crate) fn on_queue_ready(&mut self, root: u32, queue: u32) -> Result<(), Trapped> {
        match self.exports.queue_ready.clone() {
            Some(ready) if self.store.data().roots.contains_key(&root) => {
                self.callback("proxy_on_queue_ready", root, &ready, (root, queue))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn on_log(&mut self, context: u32) -> Result<(), Trapped> {
        match self.exports.log.clone() {
            Some(log) => self.callback("proxy_on_log", context, &log, context),
            None => Ok(()),
        }
    }

    /// Whether the guest is done with the context; a guest that does not say is.
    pub(crate) fn on_done(&mut self, context: u32) -> Result<bool, Trapped> {
        match self.exports.done.clone() {
            Some(done) => Ok(self.callback("proxy_on_done", context, &done, context)? != 0),
            None => Ok(true),
        }
    }

    /// Ends a context, also in the guest.
    pub(crate) fn delete(&mut self, context: u32) -> Result<(), Trapped> {
        let result = match self.exports.delete.clone() {
            Some(delete) => self.callback("proxy_on_delete", context, &delete, context),
            None => Ok(()),
        };
        let state = self.store.data_mut();
        state.streams.remove(&context);
        state.roots.remove(&context);
        result
    }

    fn callback<P: WasmParams + Words, R: WasmResults + Words>(
        &mut self,
        name: &'static str,
        context: u32,
        func: &TypedFunc<P, R>,
        params: P,
    ) -> Result<R, Trapped> {
        let limit = self.store.data().plugin.limits.callback_time_max;
        self.call(running(name), context, Allowance { limit, left: limit }, func, params)
    }

    fn call<P: WasmParams + Words, R: WasmResults + Words>(
        &mut self,
        callback: Callback,
        context: u32,
        time: Allowance,
        func: &TypedFunc<P, R>,
        params: P,
    ) -> Result<R, Trapped> {
        set_deadline(&mut self.store, time.left);
        let state = self.store.data_mut();
        state.callback = callback;
        state.context = context;
        state.effective = context;
        state.limiter.refused = None;
        if state.traced {
            let event = trace::callback(state, callback.name, &params.words());
            state.embedder.borrow_mut().trace(event);
        }
        let result = func.call(&mut self.store, params);
        let state = self.store.data_mut();
        let at = state.callback.name;
        state.callback = Callback { name: "", doing: Doing::Idle };
        let result = result.map_err(|error| classify(&error, at, time.limit, &state.limiter));
        if state.traced {
            let event = trace::returned(callback.name, result.as_ref().map(Words::words).map_err(Trapped::clone));
            state.embedder.borrow_mut().trace(event);
        }
        result
    }
}

fn running(name: &'static str) -> Callback {
    Callback { name, doing: Doing::Running }
}

/// A limit on time, and what is left of it.
#[derive(Clone, Copy)]
struct Allowance {
    limit: Duration,
    left: Duration,
}

/// Gives what runs next in this store so much time, from now on.
fn set_deadline(store: &mut Store<VmState>, budget: Duration) {
    store.data_mut().time = CallbackTime { budget, since: None };
    // The first look is at the next tick, so that a callback which is done by then pays for no clock.
    store.set_epoch_deadline(1);
}

fn classify(error: &wasmtime::Error, callback: &'static str, limit: Duration, limiter: &MemoryLimiter) -> Trapped {
    if let Some(fault) = error.downcast_ref::<GuestFault>() {
        if *fault == GuestFault::TimeIsUp {
            return Trapped::Deadline(limit, callback);
        }
        return Trapped::Fault { fault: fault.clone(), callback };
    }
    match error.downcast_ref::<Trap>() {
        Some(Trap::StackOverflow) => Trapped::StackOverflow(callback),
        // A guest that gets no memory aborts; what it was refused says more than how it aborted.
        Some(_) if limiter.refused == Some(Refused::Memory) => Trapped::Memory(limiter.bytes_max, callback),
        Some(trap) => Trapped::Trap { cause: trap.to_string(), callback },
        None => Trapped::Trap { cause: format!("{error:#}"), callback },
    }
}
