//! Starts, feeds, watches and stops operators' processes, on a thread and runtime of its own.
//!
//! Workers hold an [`Operators`], which shares with the manager a table of pools and little else. The manager's thread
//! is the parent of every process: should it end, for whatever reason, the kernel ends them.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use base64::Engine as _;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use crate::body::BodyError;
use crate::bundle::{self, Bundle, BundleError};
use crate::call::{self, OperatorBody, OperatorError};
use crate::cause::Cause;
use crate::config::{Operator, Settings, check_placement};
use crate::control::{HostStatus, OperatorStatus, RunningProcess};
use crate::egress::{Egress, Resolve, SystemResolver};
use crate::engine::{Class, Engine, INTERNAL_AUTHORITY, Load, LoadFailure, LoadLimits, READY};
use crate::jail::{Bounds, Groups, Isolation, LaunchError, Layer, LayerState, Report, Rlimits, Spec, Waiting};
use crate::kv::{KvError, Store};
use crate::logs::{Lines, LogBook, LogLine, Rate, Readers};
use crate::placement;
use crate::pool::{Backoff, Counters, Pool};
use crate::process::{Assigned, Process, cpu_possible};
use crate::sys;

/// How often processes with a request in flight are looked at.
const SAMPLE: Duration = Duration::from_millis(10);
/// How much more CPU time than allowed an engine may use that is to notice by itself.
const KEEPS_LIMITS_PATIENCE: Duration = Duration::from_millis(250);
/// How often the others are.
const SAMPLE_IDLE: Duration = Duration::from_secs(1);
/// How long an event loop in doubt may take to answer, if it had half of this in CPU time.
const PING: Duration = Duration::from_millis(500);
/// How long it may take in any case.
const PING_STARVED: Duration = Duration::from_secs(5);
const LAUNCH: Duration = Duration::from_secs(10);
/// From the moment when a process that was ready is taken until another one is made ready. Whoever took it waits for an answer, and
/// a start takes as much CPU as several first answers.
const REFILL_AFTER: Duration = Duration::from_millis(20);
/// What an engine without an operator may take beyond an operator's budget, resident.
const ENGINE_RESIDENT_BYTES: u64 = 64 << 20;
/// Operators that are brought up at the same time.
const PREPARED_AT_ONCE: usize = 4;
/// CPUs that one process may keep busy, where control groups bound it: its event loop's, and one for what helps it.
const CPUS_AT_ONCE: u64 = 2;
/// Most that is read of a process's output in a second; a process that prints more waits.
const OUTPUT_BYTES_PER_SECOND: usize = 1 << 20;
/// User ids set aside for one host, and the number of hosts that one machine may run.
pub(crate) const UIDS: u32 = 1024;
const HOSTS: u32 = 64;
/// Alive so long, a process counts as one that works.
const SETTLED: Duration = Duration::from_secs(5);

/// Why operators cannot be run at all.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The folder for sockets and staging.
    #[error("the run folder `{}`: {source}", path.display())]
    Run {
        /// Which folder.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// Threads, certificates and the like.
    #[error("{what}: {source}")]
    Setup {
        /// What for.
        what: &'static str,
        /// What went wrong.
        source: io::Error,
    },
}

/// Why one operator is not (or not in its new version) being served.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Its files.
    #[error("operator `{operator}`: {}", join(errors))]
    Bundle {
        /// Which.
        operator: String,
        /// Every mistake.
        errors: Vec<BundleError>,
    },
    /// Its code threw, or is no handler.
    #[error("operator `{operator}` cannot be loaded: {message}")]
    Load {
        /// Which.
        operator: String,
        /// What was thrown, with positions in its files.
        message: String,
    },
    /// No process.
    #[error("operator `{operator}` cannot be started: {message}")]
    Start {
        /// Which.
        operator: String,
        /// What went wrong.
        message: String,
    },
    /// The set as a whole.
    #[error("{0}")]
    Config(String),
}

impl ApplyError {
    /// Which operator is meant; none when it is the set as a whole.
    #[must_use]
    pub fn operator(&self) -> Option<&str> {
        match self {
            Self::Bundle { operator, .. } | Self::Load { operator, .. } | Self::Start { operator, .. } => {
                Some(operator)
            }
            Self::Config(_) => None,
        }
    }
}

fn join(errors: &[BundleError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// What is running, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessStatus {
    /// Whose; none for a prewarmed one.
    pub operator: Option<String>,
    /// Process id.
    pub pid: i32,
    /// Requests in flight.
    pub in_flight: usize,
    /// What confines it.
    pub report: Report,
}

/// A handle on the operators of a host; cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Operators {
    shared: Arc<Shared>,
    // Dropped with the last handle: the manager ends then.
    commands: mpsc::UnboundedSender<Command>,
}

impl fmt::Debug for Operators {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Operators").field("names", &self.names()).finish_non_exhaustive()
    }
}

enum Command {
    Prepare(Vec<Operator>, oneshot::Sender<Prepared>),
    Commit(OperatorSet, oneshot::Sender<()>),
    Status(oneshot::Sender<Vec<ProcessStatus>>),
    Stop(oneshot::Sender<()>),
}

/// What outlives an operator's versions.
type Book = (Arc<LogBook>, Arc<Counters>);

/// What came of preparing: what is (or stays) loaded, and every operator that is not as asked.
struct Prepared {
    set: OperatorSet,
    errors: Vec<ApplyError>,
}

/// Operators that are loaded and answer: those of one configuration. Cheap to clone.
///
/// It keeps its versions alive. Whoever decided to send a request to one of them by a configuration holds that
/// configuration's set, so nothing that a reload takes away is missed by a request that is still on its way. A version that
/// no set holds any more is drained and ends.
#[derive(Clone)]
pub struct OperatorSet {
    shared: Arc<Shared>,
    serving: Arc<HashMap<String, Arc<Serving>>>,
}

impl fmt::Debug for OperatorSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("OperatorSet").field("names", &self.serving.keys()).finish_non_exhaustive()
    }
}

impl OperatorSet {
    /// Has an operator answer a request. Limits hold from here on; the response's body keeps them, too.
    ///
    /// `request` has an absolute address, or a `Host` field; a scheme in its address becomes that of `request.url`.
    ///
    /// # Errors
    /// [`OperatorError`], which knows the response to give instead.
    pub async fn call<B>(&self, operator: &str, request: Request<B>) -> Result<Response<OperatorBody>, OperatorError>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BodyError>,
    {
        let Some(serving) = self.serving.get(operator) else {
            return Err(OperatorError::new(Cause::Unknown, operator));
        };
        let pool = &serving.0;
        let _busy = Busy::new(&self.shared);
        pool.counters.count_request();
        call::call(pool, request).await
    }

    /// Counts and logs a request that its caller cannot hand to an operator.
    #[must_use]
    pub fn refuse(&self, operator: &str, cause: Cause) -> OperatorError {
        let (_, counters) = self.shared.book(operator);
        counters.count_request();
        counters.count_cause(cause);
        tracing::warn!(operator, cause = cause.id(), "a request was not answered by its operator");
        OperatorError::new(cause, operator)
    }
}

/// A pool for as long as some set holds it.
struct Serving(Arc<Pool>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.stopping.send_replace(true);
    }
}

#[derive(Default)]
struct Shared {
    /// What is in force.
    table: ArcSwap<HashMap<String, Arc<Serving>>>,
    books: Mutex<BTreeMap<String, Book>>,
    readers: Arc<Readers>,
    /// Requests in flight or waiting; the sampler rests while there are none.
    busy: AtomicU64,
    woken: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Operators {
    /// Starts the manager's thread. No operator runs yet: see [`Operators::apply`].
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(settings: Settings, engine: Arc<dyn Engine>) -> Result<Self, StartError> {
        Self::start_with_resolver(settings, engine, Arc::new(SystemResolver))
    }

    /// As [`Operators::start`], with another way to resolve the names that operators ask for.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_with_resolver(
        settings: Settings,
        engine: Arc<dyn Engine>,
        resolver: Arc<dyn Resolve>,
    ) -> Result<Self, StartError> {
        // Found out before anything is pinned.
        let _ = placement::usable();
        let instance = Instance::claim(&settings.run_folder)
            .map_err(|source| StartError::Run { path: settings.run_folder.clone(), source })?;
        let egress = Egress::new(resolver, settings.extra_roots.as_deref())
            .map_err(|source| StartError::Setup { what: "certificates for outgoing requests", source })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(8)
            .build()
            .map_err(|source| StartError::Setup { what: "the operators' runtime", source })?;
        let shared = Arc::new(Shared::default());
        let (commands, received) = mpsc::unbounded_channel();
        let manager = Arc::new(Manager {
            uids: Mutex::new(Uids { first: settings.uid_first + instance.number * UIDS, taken: BTreeSet::new() }),
            settings,
            engine,
            egress,
            groups: Groups::prepare(),
            instance,
            shared: Arc::clone(&shared),
            warm: Mutex::default(),
            launcher: Mutex::default(),
            refill: Notify::new(),
            next_folder: AtomicU64::new(1),
            reserved: Mutex::default(),
            was_reserved: AtomicBool::new(false),
            pools: Mutex::default(),
            missed: Mutex::default(),
            stores: Mutex::default(),
        });
        std::thread::Builder::new()
            .name("operators".to_owned())
            .spawn(move || {
                runtime.block_on(Arc::clone(&manager).run(received));
                // What is left of processes and their sockets goes with the tasks that hold them.
                drop(runtime);
                drop(manager);
            })
            .map_err(|source| StartError::Setup { what: "the operators' thread", source })?;
        Ok(Self { shared, commands })
    }

    /// Brings operators up beside those that are served, whose unchanged ones it takes over. Nothing changes for anybody
    /// until the set is [committed](Self::commit); a set that is dropped instead ends what was started for it.
    ///
    /// # Errors
    /// One for each operator that cannot be loaded; then there is no set.
    pub async fn prepare(&self, operators: Vec<Operator>) -> Result<OperatorSet, Vec<ApplyError>> {
        let prepared = self.ask(|answer| Command::Prepare(operators, answer)).await.ok_or_else(Self::gone)?;
        if prepared.errors.is_empty() { Ok(prepared.set) } else { Err(prepared.errors) }
    }

    /// As [`Operators::prepare`], for a caller that may block.
    ///
    /// # Errors
    /// As there.
    pub fn prepare_blocking(&self, operators: Vec<Operator>) -> Result<OperatorSet, Vec<ApplyError>> {
        let prepared = self.ask_blocking(|answer| Command::Prepare(operators, answer)).ok_or_else(Self::gone)?;
        if prepared.errors.is_empty() { Ok(prepared.set) } else { Err(prepared.errors) }
    }

    /// Makes a set the one that is served. What is in none but the former one is drained once nobody holds that any more.
    pub async fn commit(&self, set: &OperatorSet) {
        let _ = self.ask(|answer| Command::Commit(set.clone(), answer)).await;
    }

    /// As [`Operators::commit`], for a caller that may block.
    pub fn commit_blocking(&self, set: &OperatorSet) {
        let set = set.clone();
        let _ = self.ask_blocking(|answer| Command::Commit(set, answer));
    }

    /// As [`Operators::commit`], without waiting until it has happened.
    pub fn commit_soon(&self, set: &OperatorSet) {
        drop(self.commands.send(Command::Commit(set.clone(), oneshot::channel().0)));
    }

    /// Makes the given operators the ones that are served. What did not change goes on; what changed is replaced once
    /// the new version answers; what is gone is drained. A version that cannot be loaded never replaces one that works.
    ///
    /// # Errors
    /// One for each operator that is not served as asked; all others are.
    pub async fn apply(&self, operators: Vec<Operator>) -> Result<(), Vec<ApplyError>> {
        let prepared = self.ask(|answer| Command::Prepare(operators, answer)).await.ok_or_else(Self::gone)?;
        let whole = !prepared.errors.iter().any(|error| matches!(error, ApplyError::Config(_)));
        if whole {
            self.commit(&prepared.set).await;
        }
        if prepared.errors.is_empty() { Ok(()) } else { Err(prepared.errors) }
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).ok()?;
        answered.await.ok()
    }

    fn ask_blocking<T: Send + 'static>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).ok()?;
        // On a thread of its own: the caller may be one of a runtime, where waiting like this is not allowed.
        std::thread::spawn(move || answered.blocking_recv().ok()).join().ok().flatten()
    }

    fn gone() -> Vec<ApplyError> {
        vec![ApplyError::Config("the operators' thread has ended".to_owned())]
    }

    /// What is served at the moment.
    #[must_use]
    pub fn current(&self) -> OperatorSet {
        OperatorSet { shared: Arc::clone(&self.shared), serving: self.shared.table.load_full() }
    }

    /// As [`OperatorSet::call`], with what is served at the moment.
    ///
    /// # Errors
    /// As there.
    pub async fn call<B>(&self, operator: &str, request: Request<B>) -> Result<Response<OperatorBody>, OperatorError>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BodyError>,
    {
        self.current().call(operator, request).await
    }

    /// Names of the operators that are served.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.shared.table.load().keys().cloned().collect();
        names.sort();
        names
    }

    /// CPUs that belong to one operator each: whoever embeds this keeps its own threads off them.
    #[must_use]
    pub fn reserved_cpus(&self) -> Vec<usize> {
        let table = self.shared.table.load();
        let mut cpus: Vec<usize> = table.values().flat_map(|serving| serving.0.operator.cpus.iter().copied()).collect();
        cpus.sort_unstable();
        cpus.dedup();
        cpus
    }

    /// The files that the served versions consist of.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> =
            self.shared.table.load().values().flat_map(|serving| serving.0.bundle.files.iter().cloned()).collect();
        files.sort();
        files
    }

    /// Counters by name, labels as `.operator.<name>` and `.reason.<id>`.
    #[must_use]
    pub fn metrics(&self) -> Vec<(String, u64)> {
        let mut metrics = Vec::new();
        for (name, (log, counters)) in lock(&self.shared.books).iter() {
            counters.read(name, &mut metrics);
            metrics.push((format!("portcullis_operator_log_lines_dropped_total.operator.{name}"), log.dropped()));
        }
        metrics
    }

    /// The last lines of an operator's log, oldest first.
    #[must_use]
    pub fn recent_logs(&self, operator: &str) -> Vec<LogLine> {
        lock(&self.shared.books).get(operator).map(|(log, _)| log.recent()).unwrap_or_default()
    }

    /// Lines as they come, of one operator or of all. Whoever does not keep up misses some.
    #[must_use]
    pub fn follow_logs(&self, operator: Option<&str>) -> mpsc::Receiver<LogLine> {
        self.shared.readers.follow(operator)
    }

    /// All processes.
    pub async fn status(&self) -> Vec<ProcessStatus> {
        self.ask(Command::Status).await.unwrap_or_default()
    }

    /// Answers what is in flight, ends every process, and returns when all have ended.
    pub async fn stop(&self) {
        let _ = self.ask(Command::Stop).await;
    }

    /// As [`Operators::stop`], for a caller that may block.
    pub fn stop_blocking(&self) {
        let _ = self.ask_blocking(Command::Stop);
    }
}

/// Keeps the sampler awake.
struct Busy<'a>(&'a Shared);

impl<'a> Busy<'a> {
    fn new(shared: &'a Shared) -> Self {
        if shared.busy.fetch_add(1, Ordering::AcqRel) == 0 {
            shared.woken.notify_one();
        }
        Self(shared)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Shared {
    fn book(&self, operator: &str) -> Book {
        lock(&self.books)
            .entry(operator.to_owned())
            .or_insert_with(|| (Arc::new(LogBook::new(operator, Arc::clone(&self.readers))), Arc::default()))
            .clone()
    }
}

/// A folder of this host's own, and the number that keeps its user ids apart from another host's on the same machine.
pub(crate) struct Instance {
    pub(crate) number: u32,
    pub(crate) folder: PathBuf,
    /// Locked as long as this host lives; the kernel unlocks it when it does not.
    _lock: fs::File,
}

/// Where the hosts of this user have their folders.
pub(crate) fn base_folder(run_folder: &Path) -> PathBuf {
    run_folder.join(format!("portcullis-{}", rustix::process::geteuid().as_raw()))
}

impl Instance {
    pub(crate) fn claim(run_folder: &Path) -> io::Result<Self> {
        let uid = rustix::process::geteuid().as_raw();
        fs::create_dir_all(run_folder)?;
        let base = base_folder(run_folder);
        match fs::DirBuilder::new().mode(0o711).create(&base) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // The folder may be in one that everybody can write to.
        let found = fs::symlink_metadata(&base)?;
        if !found.is_dir() || found.uid() != uid || found.mode() & 0o022 != 0 {
            return Err(io::Error::other(format!("`{}` belongs to somebody else", base.display())));
        }
        for number in 0..HOSTS {
            let lock = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(base.join(format!("host-{number}.lock")))?;
            if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let folder = base.join(format!("host-{number}"));
            // Left by a host that was killed.
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            fs::DirBuilder::new().mode(0o711).recursive(true).create(folder.join("root"))?;
            return Ok(Self { number, folder, _lock: lock });
        }
        Err(io::Error::other(format!("more than {HOSTS} hosts on one machine")))
    }

    pub(crate) fn clean(&self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

struct Uids {
    first: u32,
    taken: BTreeSet<u32>,
}

impl Uids {
    fn take(&mut self) -> Option<u32> {
        let uid = (self.first..self.first + UIDS).find(|uid| !self.taken.contains(uid))?;
        self.taken.insert(uid);
        Some(uid)
    }
}

pub(crate) struct Manager {
    settings: Settings,
    engine: Arc<dyn Engine>,
    egress: Egress,
    instance: Instance,
    /// Control groups, or why there are none.
    groups: Result<Groups, String>,
    shared: Arc<Shared>,
    warm: Mutex<BTreeMap<Class, VecDeque<Arc<Process>>>>,
    /// For whoever needs a process next, so that nobody waits for two programs to start. There is none right after a launch.
    launcher: Mutex<Option<Waiting>>,
    refill: Notify,
    next_folder: AtomicU64,
    uids: Mutex<Uids>,
    /// CPUs that belong to one operator each.
    reserved: Mutex<BTreeSet<usize>>,
    /// Whether there ever were any: until then nobody is pinned to anything.
    was_reserved: AtomicBool,
    /// Every pool that has or may have processes, also the ones being drained.
    pools: Mutex<Vec<Arc<Pool>>>,
    /// Locked as long as this host lives, once an operator has a store.
    stores: Mutex<Option<fs::File>>,
    /// Layers whose absence was logged.
    missed: Mutex<BTreeSet<Layer>>,
}

/// Why a process is not serving.
enum NotServing {
    Launch(String),
    Load(String),
    /// Its modules did not run to their end in time.
    Late(String),
}

impl Manager {
    async fn run(self: Arc<Self>, mut commands: mpsc::UnboundedReceiver<Command>) {
        let mut background = vec![tokio::spawn(Arc::clone(&self).keep_warm()), tokio::spawn(Arc::clone(&self).watch())];
        match crate::control::listen(&self.instance.folder) {
            Ok(listener) => background.push(tokio::spawn(crate::control::serve(Arc::clone(&self), listener))),
            Err(error) => tracing::error!("nobody can ask about logs and processes: {error}"),
        }
        let mut stopped = None;
        while let Some(command) = commands.recv().await {
            match command {
                Command::Prepare(operators, answer) => {
                    // One at a time: the next one waits in the channel.
                    let _ = answer.send(self.prepare(operators).await);
                }
                Command::Commit(set, answer) => {
                    self.commit(&set);
                    let _ = answer.send(());
                }
                Command::Status(answer) => drop(answer.send(self.status())),
                Command::Stop(answer) => {
                    self.stop().await;
                    stopped = Some(answer);
                    break;
                }
            }
        }
        for task in background {
            task.abort();
        }
        self.kill_all().await;
        // Whoever waits for the end may end this process right after.
        self.instance.clean();
        if let Ok(groups) = &self.groups {
            groups.clean();
        }
        if let Some(stopped) = stopped {
            let _ = stopped.send(());
        }
    }

    async fn stop(&self) {
        self.shared.table.store(Arc::default());
        let pools = lock(&self.pools).clone();
        for pool in &pools {
            pool.stopping.send_replace(true);
        }
        let deadline = Instant::now() + self.settings.drain + self.settings.kill_after + Duration::from_secs(1);
        while !lock(&self.pools).is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn kill_all(&self) {
        let mut processes: Vec<Arc<Process>> = std::mem::take(&mut *lock(&self.warm)).into_values().flatten().collect();
        for pool in lock(&self.pools).iter() {
            pool.stopping.send_replace(true);
            processes.extend(pool.processes.load().iter().cloned());
        }
        for process in &processes {
            process.kill(Cause::Stopping);
        }
        for process in processes {
            let mut exited = process.exited.subscribe();
            let _ = tokio::time::timeout(Duration::from_secs(5), exited.wait_for(Option::is_some)).await;
        }
    }

    fn status(&self) -> Vec<ProcessStatus> {
        let of = |process: &Arc<Process>| ProcessStatus {
            operator: process.assigned.get().map(|assigned| assigned.pool.operator.name.clone()),
            pid: process.pid,
            in_flight: process.assigned.get().map_or(0, |assigned| assigned.in_flight.load(Ordering::Acquire)),
            report: process.report.clone(),
        };
        self.processes().iter().map(of).collect()
    }

    pub(crate) fn readers(&self) -> &Readers {
        &self.shared.readers
    }

    /// The last lines, in the order of their time.
    pub(crate) fn recent_logs(&self, operator: Option<&str>) -> Vec<LogLine> {
        let books = lock(&self.shared.books);
        let wanted = books.iter().filter(|(name, _)| operator.is_none_or(|operator| operator == *name));
        let mut lines: Vec<LogLine> = wanted.flat_map(|(_, (log, _))| log.recent()).collect();
        lines.sort_by_key(|line| line.time);
        lines
    }

    fn processes(&self) -> Vec<Arc<Process>> {
        let pools = lock(&self.pools).clone();
        let mut found: Vec<Arc<Process>> = pools.iter().flat_map(|pool| pool.processes.load().to_vec()).collect();
        found.extend(lock(&self.warm).values().flatten().cloned());
        found
    }

    /// Whether a process is one that an operator may run in.
    pub(crate) fn is_operator(&self, pid: i32) -> bool {
        self.processes().iter().any(|process| process.pid == pid)
    }

    pub(crate) fn host_status(&self) -> HostStatus {
        let mut operators = Vec::new();
        for pool in lock(&self.pools).clone() {
            let processes = pool.processes.load().iter().map(running).collect();
            let (requests, failed) = pool.counters.requests();
            operators.push(OperatorStatus {
                name: pool.operator.name.clone(),
                processes,
                requests,
                failed,
                trouble: pool.changed.borrow().trouble.map(|cause| cause.id().to_owned()),
            });
        }
        operators.sort_by(|a, b| a.name.cmp(&b.name));
        let ready = lock(&self.warm).values().map(VecDeque::len).sum();
        HostStatus { pid: std::process::id(), engine: self.engine.name(), operators, ready }
    }

    async fn prepare(self: &Arc<Self>, operators: Vec<Operator>) -> Prepared {
        let mut serving = HashMap::new();
        let mut errors: Vec<ApplyError> = match check_placement(&operators) {
            Ok(_) => Vec::new(),
            Err(mistakes) => mistakes.iter().map(|mistake| ApplyError::Config(mistake.to_string())).collect(),
        };
        if errors.is_empty() {
            // Several at a time: each waits for a bundler and an engine. In order, for the sake of whoever reads the errors.
            let places = Arc::new(Semaphore::new(PREPARED_AT_ONCE));
            let mut preparing = Vec::new();
            for operator in operators {
                let name = operator.name.clone();
                let current = self.shared.table.load().get(&name).map(Arc::clone);
                let (manager, places, of) = (Arc::clone(self), Arc::clone(&places), current.clone());
                let version = tokio::spawn(async move {
                    let _place = places.acquire_owned().await;
                    manager.version(operator, of.as_ref()).await
                });
                preparing.push((name, current, version));
            }
            for (name, current, version) in preparing {
                let failed = |message| Err(ApplyError::Start { operator: name.clone(), message });
                match version.await.unwrap_or_else(|error| failed(error.to_string())) {
                    Ok(version) => {
                        serving.insert(name, version);
                    }
                    Err(error) => {
                        errors.push(error);
                        serving.extend(current.map(|current| (name, current)));
                    }
                }
            }
        }
        Prepared { set: OperatorSet { shared: Arc::clone(&self.shared), serving: Arc::new(serving) }, errors }
    }

    fn commit(&self, set: &OperatorSet) {
        *lock(&self.reserved) = set.serving.values().flat_map(|serving| serving.0.operator.cpus.clone()).collect();
        // What only the former one held is told to stop when that is dropped.
        self.shared.table.store(Arc::clone(&set.serving));
        self.place_all();
        self.refill.notify_one();
    }

    /// The pool for an operator: the current one if nothing changed, else a new one with a process that answers.
    async fn version(
        self: &Arc<Self>,
        operator: Operator,
        current: Option<&Arc<Serving>>,
    ) -> Result<Arc<Serving>, ApplyError> {
        let name = operator.name.clone();
        let start_error = |message: String| ApplyError::Start { operator: name.clone(), message };
        let bundling = Bundle::build_apart(&self.settings.launcher, &operator.entry, &operator.root);
        let (bundle, ready) = match current {
            Some(_) => (bundling.await, None),
            // A new one needs a process in any case; it starts while the code is read.
            None => tokio::join!(bundling, async { Some(self.take_warm(&operator.class).await) }),
        };
        let bundle = bundle.map_err(|errors| {
            if let Some(Ok(process)) = &ready {
                self.keep_ready(&operator.class, process);
            }
            ApplyError::Bundle { operator: name.clone(), errors }
        })?;
        if let Some(current) = current
            && current.0.operator == operator
            && current.0.bundle == bundle
        {
            return Ok(Arc::clone(current));
        }
        let own_folder = self.instance.folder.join("kv");
        let kv_folder = self.settings.kv_folder.as_ref();
        let kv_folder = kv_folder.map(|folder| if self.settings.keeps_nothing { &own_folder } else { folder });
        let store = match (operator.kv_bytes_max, kv_folder) {
            (Some(quota), Some(folder)) => {
                // One store for both versions: two would not know of each other's entries.
                let same = current.filter(|current| current.0.operator.kv_bytes_max == Some(quota));
                match same.and_then(|current| current.0.store.clone()) {
                    Some(store) => Some(store),
                    None => {
                        let opened = self.claim_stores(folder).and_then(|()| Store::open(folder, &name, quota));
                        Some(Arc::new(opened.map_err(|error| start_error(error.to_string()))?))
                    }
                }
            }
            _ => None,
        };
        let (log, counters) = self.shared.book(&name);
        let pool = Arc::new(Pool::new(operator, bundle, store, log, counters, self.settings.dev));
        let process = self.serving(&pool, ready).await.map_err(|error| match error {
            NotServing::Launch(message) => start_error(message),
            NotServing::Load(message) | NotServing::Late(message) => {
                ApplyError::Load { operator: name.clone(), message }
            }
        })?;
        lock(&self.pools).push(Arc::clone(&pool));
        let (ended, ends) = mpsc::unbounded_channel();
        Self::report_end(&process, &ended);
        pool.add(&process);
        tokio::spawn(Arc::clone(self).keep(Arc::clone(&pool), ended, ends));
        Ok(Arc::new(Serving(pool)))
    }

    /// Keeps other hosts off the stores: two would not know of each other's entries.
    fn claim_stores(&self, folder: &Path) -> Result<(), KvError> {
        let mut claimed = lock(&self.stores);
        if claimed.is_none() {
            *claimed = Some(crate::kv::claim(folder)?);
        }
        Ok(())
    }

    fn report_end(process: &Arc<Process>, ended: &mpsc::UnboundedSender<Arc<Process>>) {
        let (process, ended) = (Arc::clone(process), ended.clone());
        tokio::spawn(async move {
            let mut exited = process.exited.subscribe();
            let _ = exited.wait_for(Option::is_some).await;
            let _ = ended.send(process);
        });
    }

    /// Keeps the right number of processes for one pool, until it is stopped and drained.
    async fn keep(
        self: Arc<Self>,
        pool: Arc<Pool>,
        ended: mpsc::UnboundedSender<Arc<Process>>,
        mut ends: mpsc::UnboundedReceiver<Arc<Process>>,
    ) {
        let mut backoff = Backoff::new();
        let mut stopping = pool.stopping.subscribe();
        let size = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
        let (least, most) = (size(pool.operator.replicas.min), size(pool.operator.replicas.max));
        let idle = pool.operator.replicas.idle;
        loop {
            let alive = pool.processes.load().len();
            // Who waits while there is room is about to take it, and asks again if somebody else was faster. In this order: who
            // takes the last place has ceased to wait before.
            let needs_room = || !pool.has_room() && pool.waiting.load(Ordering::Acquire) > 0;
            let wanted = alive < least || (alive < most && needs_room());
            let pause = backoff.until(Instant::now());
            if wanted && pause.is_none() && !*stopping.borrow() {
                match self.serving(&pool, None).await {
                    Ok(process) => {
                        Self::report_end(&process, &ended);
                        pool.add(&process);
                    }
                    Err(error) => {
                        let (cause, message) = match &error {
                            NotServing::Launch(message) => (Cause::StartFailed, message),
                            NotServing::Load(message) => (Cause::LoadFailed, message),
                            NotServing::Late(message) => (Cause::StartTime, message),
                        };
                        pool.log.write(0, format!("{}: {message}", cause.id()));
                        pool.counters.count_end(cause);
                        backoff.failed(Instant::now(), jitter());
                        pool.set_trouble(Some(if backoff.is_loop() { Cause::CrashLoop } else { cause }));
                    }
                }
                continue;
            }
            let rest = match (wanted, pause) {
                (true, Some(pause)) => pause.saturating_duration_since(Instant::now()),
                _ if alive > least => idle.min(SAMPLE_IDLE).max(Duration::from_millis(50)),
                _ => Duration::from_secs(3600),
            };
            tokio::select! {
                Some(process) = ends.recv() => {
                    let cause = process.exited.borrow().map_or(Cause::Crashed, |ended| ended.cause);
                    pool.remove(&process);
                    pool.counters.count_end(cause);
                    if cause.is_failure_of_process() {
                        let exit = process.exited.borrow().map_or(String::new(), |ended| format!(" ({})", ended.exit));
                        let explained = cause.explained(&pool.operator.limits);
                        pool.log.write(process.id, format!("the process ended: {explained}{exit}"));
                        tracing::warn!(operator = %pool.operator.name, process = process.id, cause = cause.id(), "a process ended");
                        if Duration::from_nanos(process.age()) > SETTLED {
                            backoff.succeeded();
                        }
                        backoff.failed(Instant::now(), jitter());
                        pool.set_trouble(backoff.is_loop().then_some(Cause::CrashLoop));
                    } else {
                        pool.set_trouble(None);
                    }
                }
                () = pool.demand.notified() => {}
                _ = stopping.wait_for(|stopping| *stopping) => break,
                () = tokio::time::sleep(rest) => {
                    self.stop_idle(&pool, least, idle);
                    let steady = pool.processes.load().iter().any(|process| Duration::from_nanos(process.age()) > SETTLED);
                    if steady {
                        backoff.succeeded();
                    }
                }
            }
        }
        self.drain(&pool).await;
        lock(&self.pools).retain(|other| !Arc::ptr_eq(other, &pool));
        // Generic processes of a kind that nobody needs any more go, too.
        self.refill.notify_one();
    }

    fn stop_idle(self: &Arc<Self>, pool: &Arc<Pool>, least: usize, idle: Duration) {
        let processes = pool.processes.load_full();
        let excess = processes.len().saturating_sub(least);
        let is_idle = |process: &&Arc<Process>| {
            process.assigned.get().is_some_and(|assigned| {
                let since = Duration::from_nanos(assigned.idle_since.load(Ordering::Acquire));
                assigned.in_flight.load(Ordering::Acquire) == 0
                    && Duration::from_nanos(process.age()).saturating_sub(since) >= idle
            })
        };
        for process in processes.iter().filter(is_idle).take(excess) {
            pool.remove(process);
            tokio::spawn(Arc::clone(self).end(Arc::clone(process)));
        }
    }

    /// Waits for what is in flight, then ends the processes.
    async fn drain(self: &Arc<Self>, pool: &Arc<Pool>) {
        pool.set_trouble(Some(Cause::Stopping));
        let ends: Vec<_> = pool
            .processes
            .load()
            .iter()
            .map(|process| tokio::spawn(Arc::clone(self).end(Arc::clone(process))))
            .collect();
        for end in ends {
            let _ = end.await;
        }
        pool.processes.store(Arc::default());
    }

    /// Ends one process in good order: no new requests, the old ones answered, then SIGTERM, then SIGKILL.
    async fn end(self: Arc<Self>, process: Arc<Process>) {
        process.stopping.store(true, Ordering::Release);
        // A request ends by its time limit at the latest, so what replaces an operator need not cut one off. The host's own end
        // is sooner, see `stop`.
        let longest = process.assigned.get().map_or(Duration::ZERO, |assigned| assigned.pool.operator.limits.wall);
        let deadline = Instant::now() + self.settings.drain.max(longest.saturating_add(Duration::from_secs(1)));
        let in_flight = || process.assigned.get().map_or(0, |assigned| assigned.in_flight.load(Ordering::Acquire));
        while process.is_alive() && in_flight() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        process.terminate();
        let mut exited = process.exited.subscribe();
        if tokio::time::timeout(self.settings.kill_after, exited.wait_for(Option::is_some)).await.is_err() {
            process.kill(Cause::Stopping);
            let _ = exited.wait_for(Option::is_some).await;
        }
    }

    /// A process that runs the pool's code and answers.
    async fn serving(
        self: &Arc<Self>,
        pool: &Arc<Pool>,
        ready: Option<Result<Arc<Process>, String>>,
    ) -> Result<Arc<Process>, NotServing> {
        let process = match ready {
            Some(ready) => ready,
            None => self.take_warm(&pool.operator.class).await,
        };
        let process = process.map_err(NotServing::Launch)?;
        self.place(&process, &pool.operator.cpus);
        let start = pool.operator.limits.start;
        let loaded = tokio::time::timeout(start, self.load(&process, pool)).await.unwrap_or_else(|_| {
            Err(NotServing::Late(format!("its modules did not run to their end within {start:?}")))
        });
        match loaded {
            Ok(()) => {
                pool.counters.count_start();
                Ok(process)
            }
            Err(error) => {
                process.kill(Cause::LoadFailed);
                Err(error)
            }
        }
    }

    async fn load(&self, process: &Arc<Process>, pool: &Arc<Pool>) -> Result<(), NotServing> {
        let launch = |error: &dyn fmt::Display| NotServing::Launch(error.to_string());
        process
            .assigned
            .set(Assigned::new(Arc::clone(pool)))
            .map_err(|_| launch(&"the process has an operator already"))?;
        let operator = &pool.operator;
        let encode = |bytes: &Vec<u8>| base64::engine::general_purpose::STANDARD.encode(bytes);
        let document = Load {
            name: operator.name.clone(),
            code: pool.bundle.code.clone(),
            env: operator.env.clone(),
            files: operator.files.iter().map(|(name, bytes)| (name.clone(), encode(bytes))).collect(),
            kv: pool.store.is_some(),
            dev: self.settings.dev,
            map: process.abilities.maps_positions.then(|| pool.bundle.source_map()),
            limits: LoadLimits {
                cpu_milliseconds: milliseconds(operator.limits.cpu),
                background_cpu_milliseconds: milliseconds(operator.limits.background_cpu),
                request_bytes: operator.limits.request_bytes,
                response_bytes: operator.limits.response_bytes,
            },
        };
        let document = serde_json::to_vec(&document).map_err(|error| launch(&error))?;
        let response = control(process, "POST", "/load", Bytes::from(document))
            .await
            .map_err(|error| NotServing::Load(format!("the process ended while its modules were loaded ({error})")))?;
        let (parts, body) = response;
        if parts.status == http::StatusCode::OK {
            return Ok(());
        }
        let failure: LoadFailure = serde_json::from_slice(&body).unwrap_or_default();
        let text = if failure.stack.is_empty() { failure.message } else { failure.stack };
        Err(NotServing::Load(pool.bundle.in_sources(&text)))
    }

    async fn take_warm(self: &Arc<Self>, class: &Class) -> Result<Arc<Process>, String> {
        loop {
            let warm = lock(&self.warm).get_mut(class).and_then(VecDeque::pop_front);
            match warm {
                Some(process) if process.is_alive() => {
                    self.refill.notify_one();
                    return Ok(process);
                }
                Some(_) => {}
                None => return self.launch(class).await.map_err(|error| error.to_string()),
            }
        }
    }

    /// Keeps a launcher ready, and generic processes for every class in use.
    async fn keep_warm(self: Arc<Self>) {
        let mut backoff = Backoff::new();
        loop {
            self.keep_launcher();
            let Some(class) = self.class_in_need() else {
                self.refill.notified().await;
                tokio::time::sleep(REFILL_AFTER).await;
                continue;
            };
            if let Some(until) = backoff.until(Instant::now()) {
                tokio::time::sleep_until(until.into()).await;
            }
            match self.launch(&class).await {
                Ok(process) => {
                    backoff.succeeded();
                    self.place(&process, &[]);
                    // Its first exchange costs more than later ones; nobody waits for this one.
                    let rehearsed = tokio::time::timeout(LAUNCH, control(&process, "GET", "/ping", Bytes::new())).await;
                    if matches!(rehearsed, Ok(Ok(_))) {
                        self.keep_ready(&class, &process);
                    } else {
                        process.kill(Cause::StartFailed);
                    }
                }
                Err(error) => {
                    tracing::error!("cannot start a process ahead of need: {error}");
                    backoff.failed(Instant::now(), jitter());
                }
            }
        }
    }

    fn keep_launcher(&self) {
        let mut launcher = lock(&self.launcher);
        if !launcher.as_mut().is_some_and(Waiting::is_there) {
            // Where none can be started, the next launch says so.
            *launcher = self.settings.launcher.start(&[]).ok();
        }
    }

    fn keep_ready(&self, class: &Class, process: &Arc<Process>) {
        lock(&self.warm).entry(class.clone()).or_default().push_back(Arc::clone(process));
    }

    /// A class of which too few processes are ready. Ends those of a class that no operator has any more.
    fn class_in_need(&self) -> Option<Class> {
        let wanted: BTreeSet<Class> = lock(&self.pools)
            .iter()
            .filter(|pool| !*pool.stopping.borrow())
            .map(|pool| pool.operator.class.clone())
            .collect();
        let mut warm = lock(&self.warm);
        for (_, unwanted) in warm.extract_if(.., |class, _| !wanted.contains(class)) {
            for process in unwanted {
                process.kill(Cause::Stopping);
            }
        }
        for processes in warm.values_mut() {
            processes.retain(|process| process.is_alive());
        }
        wanted.into_iter().find(|class| warm.get(class).map_or(0, VecDeque::len) < self.settings.prewarmed)
    }

    /// Starts a generic process and waits until it listens.
    async fn launch(self: &Arc<Self>, class: &Class) -> Result<Arc<Process>, LaunchError> {
        let number = self.next_folder.fetch_add(1, Ordering::Relaxed);
        let start = self.engine.start(class);
        let uid = lock(&self.uids).take().ok_or_else(|| LaunchError::Protocol("all user ids are in use".to_owned()))?;
        let private = self.instance.folder.join(format!("p{number}"));
        let bounds = Bounds {
            memory_bytes: class.memory_bytes.saturating_add(ENGINE_RESIDENT_BYTES).saturating_add(class.private_bytes),
            threads: start.threads,
            cpus: CPUS_AT_ONCE,
        };
        let group = match &self.groups {
            Ok(groups) => groups.create(&format!("p{number}"), bounds).map_err(|error| error.to_string()),
            Err(reason) => Err(reason.clone()),
        };
        let spec = Spec {
            isolation: if class.required { Isolation::Required } else { Isolation::BestEffort },
            host_pid: i32::try_from(std::process::id()).unwrap_or(0),
            uid,
            staging: self.instance.folder.join("root"),
            private_fallback: private.clone(),
            binds: start.binds,
            files: start.files,
            private_bytes: class.private_bytes,
            private_files: 64,
            rlimits: Rlimits {
                data_bytes: start.data_bytes.saturating_add(class.memory_bytes),
                files: start.files_open,
                threads: start.threads,
            },
            argv: start.argv,
            env: start.env,
            group: match (&group, &self.groups) {
                (Ok(group), Ok(groups)) => Ok((group.path().to_owned(), groups.state())),
                (Err(reason), _) | (_, Err(reason)) => Err(reason.clone()),
            },
            may_restrict_itself: start.abilities.restricts_itself,
            without: Vec::new(),
        };
        let waiting = lock(&self.launcher).take();
        let launched = match waiting {
            Some(waiting) => self.settings.launcher.launch_by(waiting, &spec, LAUNCH).await,
            None => self.settings.launcher.launch(&spec, LAUNCH).await,
        };
        self.refill.notify_one();
        let confined = launched.inspect_err(|_| {
            lock(&self.uids).taken.remove(&uid);
            let _ = fs::remove_dir_all(&private);
        })?;
        let pid = confined.pid;
        let (handle, directory, output, report) = confined.into_parts();
        let signaller = handle.signaller().map_err(LaunchError::Spawn)?;
        self.say_what_is_missing(&report);
        let own_user = report.is_active(Layer::Uid);
        let user = if own_user { uid } else { rustix::process::geteuid().as_raw() };
        let process = Arc::new(Process::new(pid, user, directory, group.ok(), signaller, report, start.abilities));
        tokio::spawn({
            let (manager, process) = (Arc::clone(self), Arc::clone(&process));
            async move {
                let exit = handle.wait().await.unwrap_or(crate::jail::Exit::Code(-1));
                process.end(exit);
                lock(&manager.uids).taken.remove(&uid);
                let _ = fs::remove_dir_all(&private);
                manager.refill.notify_one();
            }
        });
        let killing = |error: io::Error| {
            process.kill(Cause::StartFailed);
            LaunchError::Spawn(error)
        };
        let listener = process.listen().map_err(killing)?;
        tokio::spawn(crate::services::serve(Arc::clone(&process), listener, self.egress.clone()));
        let (ready, is_ready) = oneshot::channel();
        let output = pipe::Receiver::from_owned_fd(output).map_err(killing)?;
        let said = Arc::new(Mutex::new(String::new()));
        tokio::spawn(read_output(Arc::clone(&process), output, ready, Arc::clone(&said)));
        match tokio::time::timeout(LAUNCH, is_ready).await {
            Ok(Ok(())) => Ok(process),
            Ok(Err(_)) => {
                process.kill(Cause::StartFailed);
                let (said, remedy) = (lock(&said).trim().to_owned(), self.engine.remedy());
                Err(LaunchError::Refused { reason: format!("the engine does not start: {said}\n  hint: {remedy}") })
            }
            Err(_) => {
                process.kill(Cause::StartFailed);
                Err(LaunchError::Timeout(LAUNCH))
            }
        }
    }

    /// Once for each layer: what is missing for one process is missing for the next.
    fn say_what_is_missing(&self, report: &Report) {
        for row in report.rows() {
            if matches!(row.state, LayerState::Missing { .. }) && lock(&self.missed).insert(row.layer) {
                let (layer, reason) = (row.layer, row.reason());
                tracing::warn!("isolation layer `{layer}` is missing ({reason}): {}", layer.when_missing());
            }
        }
    }

    /// Pins a process: to its own CPUs, or to those that belong to nobody.
    fn place(&self, process: &Process, cpus: &[usize]) {
        let reserved = lock(&self.reserved).clone();
        let own = if cpus.is_empty() {
            placement::usable().difference(&reserved).copied().collect()
        } else {
            cpus.iter().copied().collect()
        };
        // Started by a thread of the host's, it has that one's CPUs.
        if (!cpus.is_empty() || self.was_reserved.load(Ordering::Acquire))
            && let Err(error) = placement::pin(process.pid.unsigned_abs(), &own)
        {
            tracing::warn!(process = process.id, "cannot place a process: {error}");
        }
    }

    fn place_all(&self) {
        let reserved = lock(&self.reserved).clone();
        if !reserved.is_empty() {
            self.was_reserved.store(true, Ordering::Release);
        }
        if self.settings.keep_host_off_reserved_cpus && self.was_reserved.load(Ordering::Acquire) {
            let free = placement::usable().difference(&reserved).copied().collect();
            if let Err(error) = placement::pin(std::process::id(), &free) {
                tracing::warn!("cannot keep this process's threads off reserved CPUs: {error}");
            }
        }
        for pool in lock(&self.pools).iter() {
            for process in pool.processes.load().iter() {
                self.place(process, &pool.operator.cpus);
            }
        }
        for process in lock(&self.warm).values().flatten() {
            self.place(process, &[]);
        }
    }

    /// Holds requests and processes to their limits.
    async fn watch(self: Arc<Self>) {
        let mut seen: HashMap<u64, u64> = HashMap::new();
        let mut last_full = Instant::now();
        loop {
            if self.shared.busy.load(Ordering::Acquire) == 0 && !self.anything_in_flight() {
                tokio::select! {
                    () = self.shared.woken.notified() => {}
                    () = tokio::time::sleep(SAMPLE_IDLE) => {}
                }
            } else {
                tokio::time::sleep(SAMPLE).await;
            }
            let full = last_full.elapsed() >= Duration::from_millis(100);
            if full {
                last_full = Instant::now();
            }
            let pools = lock(&self.pools).clone();
            let mut alive = BTreeSet::new();
            for pool in &pools {
                for process in pool.processes.load().iter() {
                    alive.insert(process.id);
                    Self::sample(pool, process, &mut seen, full);
                }
            }
            seen.retain(|id, _| alive.contains(id));
        }
    }

    fn anything_in_flight(&self) -> bool {
        lock(&self.pools).iter().any(|pool| {
            pool.processes.load().iter().any(|process| {
                process.assigned.get().is_some_and(|assigned| assigned.in_flight.load(Ordering::Acquire) > 0)
            })
        })
    }

    fn sample(pool: &Arc<Pool>, process: &Arc<Process>, seen: &mut HashMap<u64, u64>, full: bool) {
        let Some(assigned) = process.assigned.get() else { return };
        let limits = &pool.operator.limits;
        let Ok(now) = sys::process_cpu_nanoseconds(process.pid) else { return };
        // What loading took is not charged to the first request.
        let used = now.saturating_sub(*seen.get(&process.id).unwrap_or(&now));
        seen.insert(process.id, now);
        pool.counters.count_cpu(used);
        let age = process.age();
        // It knows better than a look from outside which request used what; but it is not trusted to act.
        let patience = if process.abilities.keeps_limits { KEEPS_LIMITS_PATIENCE } else { Duration::ZERO };
        let active: Vec<_> = assigned.active().collect();
        if active.is_empty() {
            // Of what was used since the last look, only what can have been used since the last request ended.
            let since = Duration::from_nanos(age.saturating_sub(assigned.idle_since.load(Ordering::Acquire)));
            let used = used.min(cpu_possible(since));
            let total = assigned.background_cpu.fetch_add(used, Ordering::AcqRel).saturating_add(used);
            if Duration::from_nanos(total) > limits.background_cpu + patience
                && assigned.in_flight.load(Ordering::Acquire) == 0
            {
                process.kill(Cause::BackgroundCpu);
            }
        }
        // While it is being found out whether a loop holds it up, the others did not use this.
        let sharing = if process.suspect.load(Ordering::Acquire) { 0 } else { used };
        let share = sharing / u64::try_from(active.len()).unwrap_or(u64::MAX).max(1);
        let (mut in_doubt, mut is_stuck) = (false, false);
        for slot in active {
            let cpu = slot.charge(share, age);
            let late = slot.elapsed(age) > limits.wall;
            if late && !slot.is_uploaded() {
                slot.cancel(Cause::RequestTime);
            } else if cpu > limits.cpu + patience {
                slot.cancel(Cause::CpuTime);
                (in_doubt, is_stuck) = (true, true);
            } else if late {
                slot.cancel(Cause::WallTime);
                in_doubt = true;
                // One that keeps limits would have ended a loop by itself, so it is asked, but goes on meanwhile.
                is_stuck |= !process.abilities.keeps_limits;
            }
        }
        if is_stuck {
            process.suspect.store(true, Ordering::Release);
        }
        if in_doubt && !process.asked.swap(true, Ordering::AcqRel) {
            tokio::spawn(clear_or_kill(Arc::clone(process)));
        }
        if full && resident_bytes(process.pid) > limits.memory_bytes.saturating_add(ENGINE_RESIDENT_BYTES) {
            process.kill(Cause::Memory);
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Asks an event loop in doubt whether it is alive.
///
/// One that was given no time to answer in is not to blame: on a machine that is busy it is waited for longer.
async fn clear_or_kill(process: Arc<Process>) {
    let used = || sys::process_cpu_nanoseconds(process.pid).unwrap_or(u64::MAX);
    let (began, used_before) = (Instant::now(), used());
    let mut answer = std::pin::pin!(control(&process, "GET", "/ping", Bytes::new()));
    let answered = loop {
        match tokio::time::timeout(PING, answer.as_mut()).await {
            Ok(answered) => break answered.ok(),
            Err(_) => {
                let had = Duration::from_nanos(used().saturating_sub(used_before));
                if had >= PING / 2 || began.elapsed() >= PING_STARVED || !process.is_alive() {
                    break None;
                }
            }
        }
    };
    match answered {
        Some((parts, _)) if parts.status == http::StatusCode::NO_CONTENT => {
            process.asked.store(false, Ordering::Release);
            process.suspect.store(false, Ordering::Release);
            if let Some(assigned) = process.assigned.get() {
                assigned.pool.set_trouble(None);
            }
        }
        _ => process.kill(Cause::Stalled),
    }
}

/// Speaks to the engine itself.
async fn control(
    process: &Process,
    method: &str,
    path: &str,
    body: Bytes,
) -> Result<(http::response::Parts, Bytes), BodyError> {
    let stream = process.connect().await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move { drop(connection.await) });
    let request = Request::builder()
        .method(method)
        .uri(format!("http://{INTERNAL_AUTHORITY}{path}"))
        .header(http::header::HOST, INTERNAL_AUTHORITY)
        .body(Full::new(body))?;
    let (parts, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, 1 << 20).collect().await?.to_bytes();
    Ok((parts, body))
}

fn running(process: &Arc<Process>) -> RunningProcess {
    let missing = process.report.rows().filter(|row| matches!(row.state, LayerState::Missing { .. }));
    RunningProcess {
        number: process.id,
        pid: process.pid,
        in_flight: process.assigned.get().map_or(0, |assigned| assigned.in_flight.load(Ordering::Acquire)),
        age_seconds: Duration::from_nanos(process.age()).as_secs(),
        resident_bytes: resident_bytes(process.pid),
        cpu_milliseconds: sys::process_cpu_nanoseconds(process.pid).unwrap_or(0) / 1_000_000,
        missing_layers: missing.map(|row| row.layer.to_string()).collect(),
    }
}

fn resident_bytes(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
    pages.saturating_mul(page)
}

/// Between 0 and 1, from the clock: only to keep operators that failed together from coming back together.
fn jitter() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    f64::from(now.subsec_nanos() % 1000) / 1000.0
}

async fn read_output(
    process: Arc<Process>,
    mut output: pipe::Receiver,
    ready: oneshot::Sender<()>,
    said: Arc<Mutex<String>>,
) {
    let mut ready = Some(ready);
    let mut lines = Lines::default();
    let mut rate: Option<Rate> = None;
    let mut buffer = vec![0; 16 << 10];
    let mut second = Instant::now();
    let mut read = 0_usize;
    let mark = READY.trim_start_matches('\u{1e}');
    loop {
        let length = match output.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        lines.feed(buffer.get(..length).unwrap_or_default(), |text| {
            let Some(assigned) = process.assigned.get() else {
                if text.ends_with(mark) {
                    if let Some(ready) = ready.take() {
                        let _ = ready.send(());
                    }
                } else {
                    let mut said = lock(&said);
                    if said.len() < 4096 {
                        said.push_str(&text);
                        said.push('\n');
                    }
                }
                return;
            };
            handle_line(&process, assigned, &mut rate, &text);
        });
        read += length;
        if read >= OUTPUT_BYTES_PER_SECOND {
            // Slower than it prints: its own printing waits, and nobody else's.
            let passed = second.elapsed();
            if passed < Duration::from_secs(1) {
                tokio::time::sleep(Duration::from_secs(1).saturating_sub(passed)).await;
            }
            second = Instant::now();
            read = 0;
        }
    }
    if let (Some(text), Some(assigned)) = (lines.rest(), process.assigned.get()) {
        handle_line(&process, assigned, &mut rate, &text);
    }
}

fn handle_line(process: &Process, assigned: &Assigned, rate: &mut Option<Rate>, text: &str) {
    let pool = &assigned.pool;
    // Said by the engine when it cannot go on. An operator may print the same; it only changes the name of its end.
    let fatal = ["Fatal JavaScript out of memory", "Fatal process out of memory", "JavaScript heap out of memory"];
    if fatal.iter().any(|mark| text.contains(mark))
        || (text.contains("memory allocation of") && text.contains("failed"))
    {
        process.said_out_of_memory.store(true, Ordering::Release);
    }
    if bundle::is_frame_of_engine(text) {
        return;
    }
    let now = Instant::now();
    let rate = rate.get_or_insert_with(|| Rate::new(pool.operator.limits.log_lines_per_second, now));
    if rate.allows(now) {
        pool.log.write(process.id, pool.bundle.map_positions(text));
    } else {
        pool.log.count_dropped();
    }
}
