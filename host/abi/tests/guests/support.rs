//! A scripted embedder, and guests written in WAT.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use portcullis_abi::{
    Action, Direction, Embedder, Ending, Engine, EngineOptions, FieldMap, Lint, LogLevel, LogRecord, Module,
    ModuleError, ModuleLimits, Part, Plugin, Shared, StartError, StreamId, StreamInfo, Ticker, UpstreamInfo, Worker,
};

/// Imports, memory and an allocator. Strings live below 4096, the heap above.
const PRELUDE: &str = include_str!("prelude.wat");

pub(crate) fn engine() -> &'static Engine {
    static ENGINE: OnceLock<(Engine, Ticker)> = OnceLock::new();
    let (engine, ticker) = ENGINE.get_or_init(|| {
        let engine = Engine::new(&EngineOptions::default()).unwrap();
        let ticker = engine.start_ticker();
        (engine, ticker)
    });
    assert!(ticker.is_running());
    engine
}

/// A module of the prelude and `code`.
pub(crate) fn guest(code: &str) -> Module {
    try_guest(code).unwrap()
}

pub(crate) fn try_guest(code: &str) -> Result<Module, ModuleError> {
    module(&format!("(module {PRELUDE} {code})"))
}

pub(crate) fn module(wat: &str) -> Result<Module, ModuleError> {
    let wasm = wat::parse_str(wat).unwrap();
    Module::from_bytes(engine(), &wasm, &ModuleLimits::default())
}

pub(crate) fn plugin(code: &str) -> Plugin {
    Plugin::new("probe", guest(code))
}

/// What the embedder saw, and its clock.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) log: RefCell<Vec<String>>,
    pub(crate) lints: RefCell<Vec<String>>,
    pub(crate) now: Cell<Duration>,
    /// How far the clock goes on with every line that is logged: work that takes time.
    pub(crate) line_takes: Cell<Duration>,
    /// CPU time, and time asleep, that asking for the time of day takes.
    pub(crate) busy: Cell<Duration>,
    pub(crate) asleep: Cell<Duration>,
}

impl World {
    /// Letters that a guest said, in order.
    pub(crate) fn said(&self) -> String {
        self.log.borrow().iter().filter(|line| line.len() == 1).cloned().collect()
    }

    /// All that guests and the host logged since the last call.
    pub(crate) fn take_log(&self) -> String {
        std::mem::take(&mut *self.log.borrow_mut()).concat()
    }
}

struct Scripted(Rc<World>);

impl Embedder for Scripted {
    fn log(&mut self, record: &LogRecord<'_>) {
        self.0.log.borrow_mut().push(record.message.to_owned());
        self.0.now.set(self.0.now.get() + self.0.line_takes.get());
    }
    fn unix_nanos(&self) -> u64 {
        burn(self.0.busy.get());
        std::thread::sleep(self.0.asleep.get());
        1_700_000_000_000_000_000 + self.0.now.get().as_nanos() as u64
    }
    fn monotonic(&self) -> Duration {
        self.0.now.get()
    }
    fn has_upstream(&self, name: &str) -> bool {
        name == "auth"
    }
    fn log_level(&self) -> LogLevel {
        LogLevel::Trace
    }
    fn lint(&mut self, lint: &Lint<'_>) {
        self.0.lints.borrow_mut().push(format!("{} {} {}", lint.callback, lint.call, lint.reason));
    }
}

/// Computes for so long.
fn burn(time: Duration) {
    let cpu_time = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let began = cpu_time();
    while cpu_time() - began < time {
        std::hint::spin_loop();
    }
}

/// A worker with its world.
pub(crate) struct Host {
    pub(crate) worker: Worker,
    pub(crate) world: Rc<World>,
}

impl Host {
    pub(crate) fn new(plugins: Vec<Plugin>) -> Host {
        Host::try_new(plugins).unwrap()
    }

    pub(crate) fn try_new(plugins: Vec<Plugin>) -> Result<Host, StartError> {
        Host::try_in(World::default(), plugins)
    }

    pub(crate) fn try_in(world: World, plugins: Vec<Plugin>) -> Result<Host, StartError> {
        let world = Rc::new(world);
        let plugins = plugins.into_iter().map(Arc::new).collect();
        let shared = Shared::new();
        let worker = Worker::start(shared, plugins, Box::new(Scripted(Rc::clone(&world))))?;
        Ok(Host { worker, world })
    }

    pub(crate) fn open(&mut self, filters: &[usize]) -> StreamId {
        let mut info = StreamInfo::default();
        info.buffer_bytes_max = 64;
        self.worker.open(filters, info)
    }

    /// Begins a TCP connection.
    pub(crate) fn open_connection(&mut self, filters: &[usize]) -> StreamId {
        let mut info = StreamInfo::default();
        info.buffer_bytes_max = 64;
        info.route.cluster_name = "db".into();
        info.source_address = Some(([192, 0, 2, 1], 4711).into());
        info.connection_id = 7;
        self.worker.open_connection(filters, info)
    }

    /// A TCP connection with its upstream connected; what happened until then.
    pub(crate) fn connect(&mut self, filters: &[usize]) -> (StreamId, Vec<String>) {
        let id = self.open_connection(filters);
        let mut seen = self.seen();
        self.worker
            .connected(id, UpstreamInfo { address: Some(([192, 0, 2, 9], 5432).into()), ..UpstreamInfo::default() });
        seen.extend(self.seen());
        (id, seen)
    }

    /// Bytes from the client; what came of them.
    pub(crate) fn client_sends(&mut self, id: StreamId, text: &str, end: bool) -> Vec<String> {
        self.worker.data(id, Direction::Request, bytes(text), end);
        self.seen()
    }

    /// Bytes from the upstream; what came of them.
    pub(crate) fn upstream_sends(&mut self, id: StreamId, text: &str, end: bool) -> Vec<String> {
        self.worker.data(id, Direction::Response, bytes(text), end);
        self.seen()
    }

    /// A GET without a body through plugin 0; what came of it.
    pub(crate) fn get(&mut self) -> Vec<String> {
        let id = self.open(&[0]);
        self.worker.request_headers(id, request(), true);
        let seen = self.seen();
        self.worker.finish(id, Ending::default());
        seen
    }

    pub(crate) fn advance(&self, by: Duration) {
        self.world.now.set(self.world.now.get() + by);
    }

    /// All actions, in short.
    pub(crate) fn seen(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.worker.poll_action()).map(|action| describe(&action)).collect()
    }
}

pub(crate) fn request() -> FieldMap {
    [(":method", "GET"), (":path", "/a?b"), (":authority", "api.example"), (":scheme", "http"), ("x-a", "1")]
        .into_iter()
        .collect()
}

pub(crate) fn response() -> FieldMap {
    [(":status", "200"), ("content-length", "3")].into_iter().collect()
}

pub(crate) fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn describe(action: &Action) -> String {
    match action {
        Action::Request(_, part) => format!("> {}", describe_part(part)),
        Action::Response(_, part) => format!("< {}", describe_part(part)),
        Action::CancelUpstream(_) => "cancel upstream".into(),
        Action::Reset(_) => "reset".into(),
        Action::Readable(_, direction) => {
            format!("readable {}", if *direction == Direction::Request { ">" } else { "<" })
        }
        Action::Connect(_) => "connect".into(),
        Action::Data { direction, bytes, end_of_stream, .. } => format!(
            "{} {:?}{}",
            if *direction == Direction::Request { '>' } else { '<' },
            String::from_utf8_lossy(bytes),
            if *end_of_stream { "." } else { "" }
        ),
        Action::Close(_, details) => format!("close ({details})"),
        Action::Call(_, call) => format!("call {} {}", call.upstream, lines(&call.fields)),
        Action::CancelCall(_) => "cancel call".into(),
        Action::GrpcOpen(_, open) => format!("grpc {} {:?} {}", open.upstream, open.timeout, lines(&open.fields)),
        Action::GrpcSend(_, bytes, end) => format!("send {:?}{}", bytes, if *end { "." } else { "" }),
        _ => "?".into(),
    }
}

fn describe_part(part: &Part) -> String {
    let end = |end: &bool| if *end { "." } else { "" };
    match part {
        Part::Headers { fields, end_of_stream, details } => {
            let details = details.as_ref().map_or(String::new(), |details| format!(" ({details})"));
            format!("{}{}{details}", lines(fields), end(end_of_stream))
        }
        Part::Body { bytes, end_of_stream } => {
            format!("{:?}{}", String::from_utf8_lossy(bytes), end(end_of_stream))
        }
        Part::Trailers { fields } => format!("trailers {}.", lines(fields)),
    }
}

/// Fields other than the request's own.
fn lines(fields: &FieldMap) -> String {
    let own = request();
    let shown = fields.iter().filter(|(name, value)| own.get(name) != Some(value));
    let shown: Vec<String> =
        shown.map(|(n, v)| format!("{}={}", String::from_utf8_lossy(n), String::from_utf8_lossy(v))).collect();
    format!("[{}]", shown.join(" "))
}
