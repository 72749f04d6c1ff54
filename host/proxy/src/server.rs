//! [`Server`]: all workers, from binding to the last request; [`Handle`], by which it is reloaded and shut down.
//!
//! Nothing is half started: addresses are bound, modules compiled and filters started on every worker before the first
//! connection is accepted, and any failure on the way ends it all. A reload is the same: every worker brings up the new
//! filters beside the running ones, and only if all succeed do they change over.

use std::fmt;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portcullis_abi::{Engine, EngineOptions, PluginHealth, Ticker};
use portcullis_code::{Loader, LoaderSettings};
use portcullis_config::Policy;
use tokio::sync::{mpsc, oneshot, watch};

use crate::access_log::Writer;
use crate::admin;
use crate::listener::{self, Bound};
use crate::metrics::{
    CONTROL, Counter, Registry, write_counters, write_guest_metrics, write_module_metrics, write_process_metrics,
};
use crate::operator::{OperatorHost, OperatorsRefused};
use crate::plan::{Plan, PlanError};
use crate::worker::{self, Command, Remote, Setup, Socket};

/// What the policy file does not say.
#[derive(Default)]
pub struct Options {
    /// Where access log lines go. `None`: nowhere.
    pub access_log: Option<Box<dyn Write + Send>>,
    /// How long requests under way may take once the server is told to end. Default [`DRAIN_TIME`].
    pub drain_time: Option<Duration>,
    /// Who runs operators. `None`: a policy with a route to one is refused.
    pub operators: Option<Arc<dyn OperatorHost>>,
    /// How filters are compiled, and where compiled ones are kept.
    pub loading: LoaderSettings,
}

/// Half a minute: longer than the default time of an upstream (15 s), and what container platforms wait before they kill.
pub const DRAIN_TIME: Duration = Duration::from_secs(30);
/// How long workers may take to start the filters of a new policy.
const PREPARE_TIME: Duration = Duration::from_secs(60);
/// How long a worker may take to answer before it counts as stuck: far more than the longest callback.
const HEALTH_TIME: Duration = Duration::from_secs(2);

/// Why a server cannot start, or a policy cannot replace the running one.
#[derive(Debug)]
#[non_exhaustive]
pub enum StartError {
    /// An address cannot be bound.
    Bind {
        /// What it is for, e.g. `listener `public``.
        what: String,
        /// The address.
        address: SocketAddr,
        /// Why not.
        cause: io::Error,
    },
    /// Something that the policy names cannot be loaded.
    Load(PlanError),
    /// A filter does not start: with the worker's word for it, the filter's own lines among it.
    Filter(String),
    /// An operator does not start.
    Operators(OperatorsRefused),
    /// The machine lacks something that the server needs.
    System(String),
    /// Only a restart can change this.
    NeedsRestart(String),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Bind { what, address, cause } => {
                write!(f, "{what}: cannot listen on `{address}`: {}", plain(cause))?;
                let hint = match cause.kind() {
                    io::ErrorKind::AddrInUse => {
                        "another program listens there (`ss -ltnp` shows which); stop it or choose another port"
                    }
                    io::ErrorKind::PermissionDenied => {
                        "ports below 1024 need the capability CAP_NET_BIND_SERVICE; choose a higher port or grant it"
                    }
                    io::ErrorKind::AddrNotAvailable => {
                        "no interface of this machine has that address (`ip addr` lists them)"
                    }
                    _ => return Ok(()),
                };
                write!(f, "\n  hint: {hint}")
            }
            StartError::Load(error) => error.fmt(f),
            StartError::Operators(refused) => refused.fmt(f),
            StartError::Filter(message) | StartError::System(message) => f.write_str(message),
            StartError::NeedsRestart(what) => {
                write!(f, "{what} cannot change while running\n  hint: restart, or undo that change and reload again")
            }
        }
    }
}

impl std::error::Error for StartError {}

/// The kernel's words without Rust's number in brackets.
fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "the address is in use".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        io::ErrorKind::AddrNotAvailable => "the address is not available".to_owned(),
        _ => error.to_string(),
    }
}

/// A server that is ready to accept connections, and does so once it [runs](Server::run).
pub struct Server {
    handle: Handle,
    bound: Vec<Bound>,
    admin: Option<std::net::TcpListener>,
    workers: Starting,
    writer: Option<Writer>,
    drain_time: Duration,
    shutdown: watch::Receiver<Shutdown>,
    _ticker: Ticker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shutdown {
    No,
    Graceful,
    Now,
}

/// Reloads and ends a server, and tells how it is. From any thread.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<HandleShared>,
}

pub(crate) struct HandleShared {
    loader: Loader,
    operators: Option<Arc<dyn OperatorHost>>,
    pub(crate) registry: Arc<Registry>,
    plan: Mutex<Arc<Plan>>,
    /// One reload at a time.
    reloading: Mutex<()>,
    commands: Vec<mpsc::UnboundedSender<Command>>,
    addresses: Vec<(String, SocketAddr)>,
    admin_address: Option<SocketAddr>,
    shutdown: watch::Sender<Shutdown>,
    accepting: Arc<Counter>,
}

impl Server {
    /// Binds every address, loads every file, starts every filter on every worker.
    ///
    /// # Errors
    /// Whatever is in the way; nothing is left behind.
    pub fn prepare(policy: Policy, options: Options) -> Result<Server, StartError> {
        let mut bound = Vec::with_capacity(policy.listeners.len());
        for listener in &policy.listeners {
            bound.push(listener::bind(listener.address, policy.workers).map_err(|cause| StartError::Bind {
                what: format!("listener `{}`", listener.name),
                address: listener.address,
                cause,
            })?);
        }
        let admin = policy.admin.map(bind_admin).transpose()?;
        let admin_address = admin.as_ref().and_then(|listener| listener.local_addr().ok());

        let (loader, ticker) = engine(options.loading)?;
        let plan = Arc::new(load(policy, &loader, options.operators.as_deref(), None)?);
        let registry = Arc::new(Registry::default());
        let writer = options.access_log.map(Writer::start).transpose().map_err(|error| {
            StartError::System(format!("cannot start the thread that writes the access log: {error}"))
        })?;

        let drain_time = options.drain_time.unwrap_or(DRAIN_TIME);
        let mut workers = Starting::default();
        let mut starts = Vec::new();
        for number in 0..plan.policy.workers {
            let setup = Setup {
                number,
                plan: Arc::clone(&plan),
                registry: Arc::clone(&registry),
                access_log: writer.as_ref().and_then(Writer::sender),
                drain_time,
            };
            let (remote, start) = worker::start(setup)
                .map_err(|error| StartError::System(format!("cannot start worker {number}: {error}")))?;
            workers.0.push(remote);
            starts.push(start);
        }
        for start in starts {
            match start.blocking_recv() {
                Ok(Ok(())) => {}
                Ok(Err(message)) => return Err(StartError::Filter(message)),
                Err(_) => return Err(StartError::System("a worker ended while it started".to_owned())),
            }
        }
        commit_operators(&plan);
        let (shutdown, shutdown_wanted) = watch::channel(Shutdown::No);
        let addresses = plan
            .policy
            .listeners
            .iter()
            .zip(&bound)
            .map(|(listener, bound)| (listener.name.clone(), bound.address))
            .collect();
        let reloads = |result| {
            registry.counter(
                CONTROL,
                "portcullis_reloads_total",
                "Reloads of the policy, by result.",
                &[("result", result)],
            )
        };
        // There from the beginning, so that an alarm on their rise can be made before the first one.
        drop((reloads("ok"), reloads("failed")));
        let accepting = registry.gauge(CONTROL, "portcullis_accepting", "1 while new connections are accepted.", &[]);
        let shared = HandleShared {
            loader,
            operators: options.operators,
            plan: Mutex::new(plan),
            reloading: Mutex::new(()),
            commands: workers.0.iter().map(|worker| worker.commands.clone()).collect(),
            addresses,
            admin_address,
            shutdown,
            accepting,
            registry,
        };
        Ok(Server {
            handle: Handle { shared: Arc::new(shared) },
            bound,
            admin,
            workers,
            writer,
            drain_time,
            shutdown: shutdown_wanted,
            _ticker: ticker,
        })
    }

    /// To reload and end the server with.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Accepts connections until told to end, on this thread and the workers'. `ready` is called once, when all sockets
    /// listen.
    ///
    /// # Errors
    /// When a socket cannot listen, or a worker ends unasked.
    pub fn run(self, ready: impl FnOnce(&Handle)) -> Result<(), StartError> {
        let Server { handle, bound, admin, mut workers, writer, drain_time, shutdown, _ticker } = self;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| StartError::System(format!("cannot start an event loop: {error}")))?;
        let mut sockets: Vec<Vec<Socket>> = workers.0.iter().map(|_| Vec::new()).collect();
        for ((name, _), bound) in handle.shared.addresses.iter().zip(bound) {
            for (socket, of_worker) in bound.sockets.into_iter().zip(&mut sockets) {
                let listener = listener::listen(socket).map_err(|cause| StartError::Bind {
                    what: format!("listener `{name}`"),
                    address: bound.address,
                    cause,
                })?;
                of_worker.push(Socket { listener, address: bound.address, open: Arc::clone(&bound.open) });
            }
        }
        for (worker, sockets) in workers.0.iter().zip(sockets) {
            drop(worker.commands.send(Command::Listen(sockets)));
        }
        handle.shared.accepting.set(1);
        ready(&handle);
        let tasks = tokio::task::LocalSet::new();
        let result = tasks.block_on(&runtime, control(&handle, admin, &workers.0, drain_time, shutdown));
        handle.shared.accepting.set(0);
        workers.stop();
        drop(writer);
        result
    }
}

/// Waits until the server is told to end, and until it has.
async fn control(
    handle: &Handle,
    admin: Option<std::net::TcpListener>,
    workers: &[Remote],
    drain_time: Duration,
    mut shutdown: watch::Receiver<Shutdown>,
) -> Result<(), StartError> {
    if let Some(listener) = admin {
        let listener = tokio::net::TcpListener::from_std(listener)
            .map_err(|error| StartError::System(format!("the admin listener cannot be used: {error}")))?;
        tokio::task::spawn_local(admin::serve(listener, handle.clone()));
    }
    let ended = || workers.iter().any(|worker| worker.commands.is_closed());
    let one_ended = async {
        let closed = workers.iter().map(|worker| Box::pin(worker.commands.closed()));
        any(closed.collect()).await;
    };
    tokio::select! {
        _ = shutdown.wait_for(|shutdown| *shutdown > Shutdown::No) => {}
        () = one_ended => {}
    }
    if ended() {
        return Err(StartError::System("a worker ended unexpectedly".to_owned()));
    }
    handle.shared.accepting.set(0);
    for worker in workers {
        drop(worker.commands.send(Command::Drain));
    }
    let all_ended = async {
        for worker in workers {
            worker.commands.closed().await;
        }
    };
    tokio::select! {
        () = all_ended => {}
        _ = shutdown.wait_for(|shutdown| *shutdown == Shutdown::Now) => {}
        () = tokio::time::sleep(drain_time) => {
            tracing::warn!(?drain_time, "requests are still under way; their time is over");
        }
    }
    Ok(())
}

/// Ends with the first of the futures.
async fn any<F: Future<Output = ()> + Unpin>(mut futures: Vec<F>) {
    std::future::poll_fn(|cx| match futures.iter_mut().any(|future| std::pin::Pin::new(future).poll(cx).is_ready()) {
        true => std::task::Poll::Ready(()),
        false => std::task::Poll::Pending,
    })
    .await;
}

/// Workers that are stopped when this is dropped: whatever goes wrong, no thread is left behind.
#[derive(Default)]
struct Starting(Vec<Remote>);

impl Starting {
    fn stop(&mut self) {
        for worker in &self.0 {
            drop(worker.commands.send(Command::Stop));
        }
        for worker in &mut self.0 {
            if let Some(thread) = worker.thread.take()
                && thread.join().is_err()
            {
                tracing::error!("a worker panicked");
            }
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Loads everything that a policy names and starts its filters once, without any socket; then ends it all.
///
/// # Errors
/// Whatever would keep a server from starting, but addresses.
pub fn check(policy: Policy, options: Options) -> Result<(), StartError> {
    let (loader, _ticker) = engine(options.loading)?;
    let plan = Arc::new(load(policy, &loader, options.operators.as_deref(), None)?);
    let setup =
        Setup { number: 0, plan, registry: Arc::new(Registry::default()), access_log: None, drain_time: DRAIN_TIME };
    let (remote, start) =
        worker::start(setup).map_err(|error| StartError::System(format!("cannot start a worker: {error}")))?;
    let _worker = Starting(vec![remote]);
    match start.blocking_recv() {
        Ok(started) => started.map_err(StartError::Filter),
        Err(_) => Err(StartError::System("a worker ended while it started".to_owned())),
    }
}

/// What compiles filters, and what bounds their time.
fn engine(loading: LoaderSettings) -> Result<(Loader, Ticker), StartError> {
    let engine = Engine::new(&EngineOptions::default()).map_err(|error| StartError::System(error.to_string()))?;
    let ticker = engine.start_ticker();
    if !ticker.is_running() {
        return Err(StartError::System("cannot start the thread that bounds filters' time".to_owned()));
    }
    let loader = Loader::new(engine, loading).map_err(|error| StartError::System(error.to_string()))?;
    Ok((loader, ticker))
}

/// Loads everything that a policy names; its operators answer then, too.
fn load(
    policy: Policy,
    loader: &Loader,
    operators: Option<&dyn OperatorHost>,
    before: Option<&Plan>,
) -> Result<Plan, StartError> {
    let mut plan = Plan::load(policy, loader, operators.is_some(), before).map_err(StartError::Load)?;
    plan.operators =
        operators.map(|operators| operators.prepare(&plan.policy)).transpose().map_err(StartError::Operators)?;
    Ok(plan)
}

fn commit_operators(plan: &Plan) {
    if let Some(operators) = &plan.operators {
        operators.commit();
    }
}

fn bind_admin(address: SocketAddr) -> Result<std::net::TcpListener, StartError> {
    let failed = |cause| StartError::Bind { what: "admin".to_owned(), address, cause };
    let listener = std::net::TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

impl Handle {
    /// The listeners' addresses, with the ports that the system chose.
    pub fn addresses(&self) -> &[(String, SocketAddr)] {
        &self.shared.addresses
    }

    /// The admin endpoint's address.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.shared.admin_address
    }

    /// The policy in force.
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.plan().policy)
    }

    pub(crate) fn plan(&self) -> Arc<Plan> {
        Arc::clone(&self.shared.plan.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts a policy in the place of the running one. Requests under way end under the old one.
    ///
    /// Blocks until every worker has started the new filters; not to be called from within an async runtime.
    ///
    /// # Errors
    /// Whatever is wrong with the new policy; the old one then stays in force.
    pub fn reload(&self, policy: Policy) -> Result<(), StartError> {
        let result = self.try_reload(policy);
        let label = if result.is_ok() { "ok" } else { "failed" };
        self.count_reload(label);
        result
    }

    /// Counts a reload that failed before there was a policy, because its file has mistakes.
    pub fn reload_failed(&self) {
        self.count_reload("failed");
    }

    fn count_reload(&self, result: &str) {
        self.shared
            .registry
            .counter(CONTROL, "portcullis_reloads_total", "Reloads of the policy, by result.", &[("result", result)])
            .increment();
    }

    fn try_reload(&self, policy: Policy) -> Result<(), StartError> {
        let _one_at_a_time = self.shared.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.plan();
        check_unchanged(&before.policy, &policy)?;
        let plan = Arc::new(load(policy, &self.shared.loader, self.shared.operators.as_deref(), Some(&before))?);
        let prepared = self.prepare_on_all(&plan);
        let command = || if prepared.is_ok() { Command::Commit } else { Command::Discard };
        for worker in &self.shared.commands {
            drop(worker.send(command()));
        }
        if prepared.is_ok() {
            commit_operators(&plan);
            *self.shared.plan.lock().unwrap_or_else(PoisonError::into_inner) = plan;
        }
        prepared
    }

    fn prepare_on_all(&self, plan: &Arc<Plan>) -> Result<(), StartError> {
        let mut replies = Vec::new();
        for worker in &self.shared.commands {
            let (reply, answer) = oneshot::channel();
            drop(worker.send(Command::Prepare(Arc::clone(plan), reply)));
            replies.push(answer);
        }
        let deadline = std::time::Instant::now() + PREPARE_TIME;
        // Every worker is waited for, even after one failed: what comes next must find all of them done.
        let results: Vec<Result<(), StartError>> = replies
            .into_iter()
            .map(|mut answer| {
                loop {
                    match answer.try_recv() {
                        Ok(Ok(())) => break Ok(()),
                        Ok(Err(message)) => break Err(StartError::Filter(message)),
                        Err(oneshot::error::TryRecvError::Closed) => {
                            break Err(StartError::System("a worker is gone".to_owned()));
                        }
                        Err(oneshot::error::TryRecvError::Empty) if std::time::Instant::now() < deadline => {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        Err(oneshot::error::TryRecvError::Empty) => {
                            break Err(StartError::System("a worker did not start the new filters in time".to_owned()));
                        }
                    }
                }
            })
            .collect();
        results.into_iter().collect()
    }

    /// Ends the server after the requests under way, at the latest after its drain time.
    pub fn shutdown(&self) {
        self.shared.shutdown.send_if_modified(|shutdown| {
            let first = *shutdown == Shutdown::No;
            if first {
                *shutdown = Shutdown::Graceful;
            }
            first
        });
    }

    /// Ends the server now.
    pub fn shutdown_now(&self) {
        self.shared.shutdown.send_replace(Shutdown::Now);
    }

    /// Whether new connections are accepted.
    pub fn is_accepting(&self) -> bool {
        self.shared.accepting.get() == 1
    }

    /// All metrics in Prometheus' text format, but the filters' health, which only workers know.
    pub fn metrics_text(&self) -> String {
        let mut text = String::with_capacity(16 * 1024);
        self.shared.registry.write_text(&mut text);
        let plan = self.plan();
        write_guest_metrics(&plan.shared.metrics(), &mut text);
        if let Some(operators) = &self.shared.operators {
            write_counters(&operators.metrics(), &mut text);
        }
        write_module_metrics(self.shared.loader.counts(), &mut text);
        write_process_metrics(&mut text);
        text
    }

    /// Every worker's filters; `None` for a worker that does not answer.
    pub(crate) async fn health(&self) -> Vec<Option<Vec<PluginHealth>>> {
        let mut answers = Vec::new();
        for worker in &self.shared.commands {
            let (reply, answer) = oneshot::channel();
            drop(worker.send(Command::Health(reply)));
            answers.push(answer);
        }
        let deadline = tokio::time::Instant::now() + HEALTH_TIME;
        let mut healths = Vec::new();
        for answer in answers {
            healths.push(tokio::time::timeout_at(deadline, answer).await.ok().and_then(Result::ok));
        }
        healths
    }
}

/// Sockets and threads stay as they are as long as the process lives.
fn check_unchanged(before: &Policy, after: &Policy) -> Result<(), StartError> {
    let listeners = |policy: &Policy| -> Vec<(String, SocketAddr)> {
        policy.listeners.iter().map(|listener| (listener.name.clone(), listener.address)).collect()
    };
    if listeners(before) != listeners(after) {
        return Err(StartError::NeedsRestart("`listeners` (their names and addresses)".to_owned()));
    }
    if before.admin != after.admin {
        return Err(StartError::NeedsRestart("`admin`".to_owned()));
    }
    if before.code_cache != after.code_cache {
        return Err(StartError::NeedsRestart("`code_cache`".to_owned()));
    }
    if before.workers != after.workers {
        return Err(StartError::NeedsRestart("`workers`".to_owned()));
    }
    Ok(())
}
