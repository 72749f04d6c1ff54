//! A worker: one thread with one event loop, its own listening sockets, filters and upstream connections.
//!
//! It shares nothing with other workers but compiled code and what filters share by design. The control thread speaks to
//! it through [`Command`]s.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::thread::JoinHandle;
use std::time::Duration;

use portcullis_abi::PluginHealth;
use portcullis_config::Service;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};
use tokio::task::LocalSet;

use crate::access_log::{AccessLog, AccessLogFormat};
use crate::connection::{self, Accepted};
use crate::core::Core;
use crate::ids::RequestIds;
use crate::listener::OpenConnections;
use crate::metrics::{Registry, WorkerMetrics};
use crate::plan::Plan;
use crate::tcp;

/// How often kept connections are looked through.
const HOUSEKEEPING: Duration = Duration::from_secs(2);
/// Pause after the system refused a new connection (no file descriptors left): others end meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long ended connections may take to unwind.
const UNWIND: Duration = Duration::from_secs(1);

/// What the control thread tells a worker.
pub(crate) enum Command {
    /// Begin to accept.
    Listen(Vec<Socket>),
    /// Start the filters of a new policy beside the running ones, and say whether they came up.
    Prepare(Arc<Plan>, oneshot::Sender<Result<(), String>>),
    /// New requests take the prepared policy from now on.
    Commit,
    /// Forget the prepared policy.
    Discard,
    /// Say how the filters are.
    Health(oneshot::Sender<Vec<PluginHealth>>),
    /// Accept nothing more; end when the last request has ended.
    Drain,
    /// End all connections and the worker.
    Stop,
}

/// A listening socket of one worker.
pub(crate) struct Socket {
    pub(crate) listener: std::net::TcpListener,
    pub(crate) address: SocketAddr,
    pub(crate) open: Arc<OpenConnections>,
}

/// What a worker is made with.
pub(crate) struct Setup {
    pub(crate) number: usize,
    pub(crate) plan: Arc<Plan>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) access_log: Option<SyncSender<String>>,
    pub(crate) drain_time: Duration,
}

/// The control thread's end of a worker.
#[derive(Debug)]
pub(crate) struct Remote {
    pub(crate) commands: UnboundedSender<Command>,
    pub(crate) thread: Option<JoinHandle<()>>,
}

/// What all tasks of a worker see.
pub(crate) struct WorkerState {
    pub(crate) metrics: Rc<WorkerMetrics>,
    pub(crate) ids: RequestIds,
    pub(crate) access_log: AccessLog,
    /// How long what began under a policy may go on after it was replaced.
    pub(crate) drain_time: Duration,
    number: usize,
    registry: Arc<Registry>,
    core: RefCell<Rc<Core>>,
    connections: Cell<u64>,
}

impl WorkerState {
    /// The filters and upstreams that new requests take.
    pub(crate) fn core(&self) -> Rc<Core> {
        Rc::clone(&self.core.borrow())
    }

    /// A number for a new connection: no other in the process has it.
    pub(crate) fn next_connection(&self) -> u64 {
        let number = self.connections.get() + 1;
        self.connections.set(number);
        ((self.number as u64) << 48) | number
    }
}

/// Starts a worker's thread and, in it, the filters. The answer comes through the receiver.
pub(crate) fn start(setup: Setup) -> std::io::Result<(Remote, oneshot::Receiver<Result<(), String>>)> {
    let (commands, received) = unbounded_channel();
    let (started, start) = oneshot::channel();
    let thread = std::thread::Builder::new().name(format!("worker-{}", setup.number)).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                drop(started.send(Err(format!("cannot start an event loop: {error}"))));
                return;
            }
        };
        let tasks = LocalSet::new();
        tasks.block_on(&runtime, run(setup, received, started));
    })?;
    Ok((Remote { commands, thread: Some(thread) }, start))
}

/// The format of the access log that a policy asks for.
fn access_log_format(plan: &Plan) -> AccessLogFormat {
    let logging = &plan.policy.logging;
    match logging.format {
        _ if !logging.access_log => AccessLogFormat::Off,
        portcullis_config::LogFormat::Json => AccessLogFormat::Json,
        portcullis_config::LogFormat::Text => AccessLogFormat::Text,
    }
}

async fn run(setup: Setup, mut commands: UnboundedReceiver<Command>, started: oneshot::Sender<Result<(), String>>) {
    let Setup { number, plan, registry, access_log, drain_time } = setup;
    let metrics = Rc::new(WorkerMetrics::new(&registry, number));
    let core = match Core::start(&plan, &registry, &metrics, number) {
        Ok(core) => core,
        Err(error) => {
            drop(started.send(Err(error.0)));
            return;
        }
    };
    let worker = Rc::new(WorkerState {
        ids: RequestIds::new(),
        access_log: AccessLog::new(access_log_format(&plan), access_log, Arc::clone(&metrics.log_lines_dropped)),
        metrics,
        drain_time,
        number,
        registry,
        core: RefCell::new(core),
        connections: Cell::new(0),
    });
    drop(plan);
    if started.send(Ok(())).is_err() {
        return;
    }
    let (draining, drained) = watch::channel(Phase::Open);
    let mut prepared: Option<Rc<Core>> = None;
    // Those whose filters may not have ended yet, which is what keeps them alive.
    let mut retired: Vec<Weak<Core>> = Vec::new();
    let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
    let (mut is_draining, mut is_stopped) = (false, false);
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(Command::Listen(sockets)) => listen(&worker, sockets, &drained),
                Some(Command::Prepare(plan, reply)) => {
                    let result = Core::start(&plan, &worker.registry, &worker.metrics, worker.number);
                    drop(reply.send(result.map(|core| prepared = Some(core)).map_err(|error| error.0)));
                }
                Some(Command::Commit) => {
                    if let Some(core) = prepared.take() {
                        worker.access_log.set_format(access_log_format(&core.plan));
                        retire(&worker.core.replace(core), &mut retired);
                    }
                }
                Some(Command::Discard) => {
                    if let Some(core) = prepared.take() {
                        retire(&core, &mut retired);
                    }
                }
                Some(Command::Health(reply)) => drop(reply.send(worker.core().health())),
                Some(Command::Drain) => {
                    is_draining = true;
                    draining.send_replace(Phase::Draining);
                }
                Some(Command::Stop) | None => {
                    is_stopped = true;
                    break;
                }
            },
            _ = housekeeping.tick() => worker.core().close_idle_connections(),
            () = unused(&worker), if is_draining => break,
        }
    }
    // Dropped connections tell their requests, which end in the filters as every request does.
    draining.send_replace(Phase::Closing);
    drop(tokio::time::timeout(UNWIND, unused(&worker)).await);
    retire(&worker.core(), &mut retired);
    prepared.into_iter().for_each(|core| retire(&core, &mut retired));
    let farewell = async {
        for core in retired.iter().filter_map(Weak::upgrade) {
            // One that has requests left, in spite of all, would not end.
            if core.is_leaving() {
                core.ended().await;
            }
        }
    };
    let stop = async { while !matches!(commands.recv().await, Some(Command::Stop) | None) {} };
    if !is_stopped {
        tokio::select! {
            () = farewell => {}
            () = stop => {}
        }
    }
    for core in retired.iter().filter_map(Weak::upgrade) {
        core.abandon();
    }
}

/// New requests go elsewhere; what is left of the core ends by itself.
fn retire(core: &Rc<Core>, retired: &mut Vec<Weak<Core>>) {
    core.retire();
    retired.retain(|core| core.strong_count() > 0);
    retired.push(Rc::downgrade(core));
}

/// How far a worker's end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Requests are served.
    Open,
    /// No new connections; those that are there end after the request under way.
    Draining,
    /// Connections end at once.
    Closing,
}

/// Ends when no connection and no request is left.
async fn unused(worker: &WorkerState) {
    // The last steps of a request take a few turns of the event loop, an upload may take minutes: looking now and then
    // costs less than telling at every end.
    let mut look = tokio::time::interval(Duration::from_millis(10));
    loop {
        look.tick().await;
        if worker.metrics.connections_active.get() == 0 && worker.metrics.requests_active.get() == 0 {
            return;
        }
    }
}

fn listen(worker: &Rc<WorkerState>, sockets: Vec<Socket>, phase: &watch::Receiver<Phase>) {
    for (index, socket) in sockets.into_iter().enumerate() {
        match TcpListener::from_std(socket.listener) {
            Ok(listener) => {
                let task = accept(Rc::clone(worker), index, listener, socket.address, socket.open, phase.clone());
                tokio::task::spawn_local(task);
            }
            Err(error) => {
                tracing::error!(address = %socket.address, %error, "a worker cannot use its listening socket");
            }
        }
    }
}

async fn accept(
    worker: Rc<WorkerState>,
    index: usize,
    listener: TcpListener,
    address: SocketAddr,
    open: Arc<OpenConnections>,
    phase: watch::Receiver<Phase>,
) {
    let mut changed = phase.clone();
    let ended = changed.wait_for(|phase| *phase > Phase::Open);
    let mut ended = std::pin::pin!(ended);
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            // Only once the kernel has handed over what it had accepted for us: those clients believe they are connected.
            _ = &mut ended => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                tracing::warn!(%address, %error, "cannot accept connections; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let core = worker.core();
        let Some(settings) = core.plan.policy.listeners.get(index) else { continue };
        let metrics = &worker.metrics;
        let Some(open) = open.begin(settings.limits.max_connections) else {
            metrics.connections_refused.increment();
            continue;
        };
        metrics.connections.increment();
        let accepted = Accepted {
            local: stream.local_addr().unwrap_or(address),
            stream,
            peer,
            listener_name: settings.name.as_str().into(),
            limits: settings.limits,
            tls: core.plan.listener_tls.get(index).cloned().flatten(),
            phase: phase.clone(),
        };
        let (worker, service) = (Rc::clone(&worker), settings.service.clone());
        tokio::task::spawn_local(async move {
            let _active = Active::begin(&worker);
            match service {
                Service::Http => connection::run(Rc::clone(&worker), accepted).await,
                // To its end under the policy that it began with: its bytes are in the hands of that policy's filters.
                Service::Tcp(forward) => tcp::run(Rc::clone(&worker), core, accepted, forward).await,
            }
            drop(open);
        });
    }
}

struct Active(Rc<WorkerMetrics>);

impl Active {
    fn begin(worker: &WorkerState) -> Active {
        let metrics = &worker.metrics;
        metrics.connections_active.add(1);
        Active(Rc::clone(metrics))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.connections_active.decrement();
    }
}

/// Errors that concern the connection being accepted and not the listener.
fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}
