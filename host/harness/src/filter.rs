//! [`Guest`], [`FilterBuilder`], [`Filter`]: from a `.wasm` file to a filter that requests can be sent through.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use portcullis_abi::{
    Engine, EngineOptions, Limits, Module, Plugin, PluginHealth, StartError, Ticker, VmStartError, Worker,
};
use portcullis_code::{Cache, CacheSettings, LoadLimits, Loader, LoaderSettings};
use sha2::{Digest as _, Sha256};

use crate::host::{Host, Instance, SimulatedHost, WorkerSlot};
use crate::message::Observed;
use crate::module::find_built;
use crate::plan::{RequestPlan, ResponsePlan};
use crate::stream::RequestBuilder;
use crate::yaml::reason;

/// A guest that never returns ends after this much real time; far more than any callback needs on a busy machine.
const CALLBACK_TIME_MAX: Duration = Duration::from_secs(10);

/// How an author gets the module that is missing.
pub(crate) const HOW_TO_BUILD: &str = "build it first: `cargo wasm` in a folder that `portcullis new` made, `cargo xtask \
                                       build-filters` in a checkout of Portcullis, else `cargo build --release --target \
                                       wasm32-wasip1`";

/// Compiled modules kept for the next test that loads the same bytes.
const COMPILED_MAX: usize = 32;

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
    /// The filter refused its configuration, or that of its VM.
    #[error("{message}")]
    Refused {
        /// The filter.
        filter: String,
        /// What it logged at level warn and above while it started.
        log: Vec<String>,
        /// All of that, for people.
        message: String,
    },
    /// The filter did not start: it trapped, or needs more than it may have.
    #[error("{0}")]
    Start(String),
}

impl HarnessError {
    /// Whether the filter itself said no to its configuration.
    pub fn is_refusal(&self) -> bool {
        matches!(self, HarnessError::Refused { .. })
    }

    /// What the filter said while it refused, a line each; empty for other errors.
    pub fn refusal(&self) -> &[String] {
        match self {
            HarnessError::Refused { log, .. } => log,
            _ => &[],
        }
    }
}

impl From<StartError> for HarnessError {
    fn from(error: StartError) -> HarnessError {
        let message = error.to_string();
        match error.cause {
            VmStartError::ConfigurationRefused | VmStartError::VmConfigurationRefused => {
                HarnessError::Refused { filter: error.plugin, log: error.log, message }
            }
            _ => HarnessError::Start(message),
        }
    }
}

/// A compiled module. Cheap to clone, and shared by all threads: compiling takes up to seconds, so modules with the same
/// bytes are compiled once per process.
#[derive(Clone)]
pub struct Guest {
    name: String,
    module: Module,
}

impl Guest {
    /// Reads and compiles a `.wasm` file. The filter is called as the file is, without `.wasm`.
    ///
    /// A relative path is looked for in the current folder, then in those above it: tests run in their package's folder,
    /// modules lie in the workspace's.
    pub fn load(file: impl AsRef<Path>) -> Result<Guest, HarnessError> {
        let file = file.as_ref();
        let found = from_here_upwards(file);
        let wasm = std::fs::read(&found).map_err(|error| HarnessError::Unreadable {
            file: file.display().to_string(),
            problem: reason(&error),
            hint: match error.kind() {
                std::io::ErrorKind::NotFound => HOW_TO_BUILD.to_owned(),
                _ => "name the `.wasm` file that the build made".to_owned(),
            },
        })?;
        let name = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Guest::from_bytes(&name, &wasm).map_err(|error| match error {
            HarnessError::Module { problem, .. } => HarnessError::Module { file: file.display().to_string(), problem },
            other => other,
        })
    }

    /// Finds the built module of the filter called `name`, from the current folder upwards, and compiles it.
    pub fn find(name: &str) -> Result<Guest, HarnessError> {
        let here = std::env::current_dir().unwrap_or_default();
        let file = find_built(name, &here).map_err(|(problem, hint)| HarnessError::Unreadable {
            file: format!("{name}.wasm"),
            problem,
            hint,
        })?;
        Ok(Guest { name: name.to_owned(), ..Guest::load(file)? })
    }

    /// Compiles a module that is in memory.
    pub fn from_bytes(name: &str, wasm: &[u8]) -> Result<Guest, HarnessError> {
        if !wasm.starts_with(b"\0asm") {
            return Err(HarnessError::Module {
                file: name.to_owned(),
                problem: "this is no WebAssembly module: it does not begin with `\\0asm`\n  hint: name the `.wasm` file that \
                          the build made"
                    .to_owned(),
            });
        }
        static COMPILED: Mutex<Vec<([u8; 32], Module)>> = Mutex::new(Vec::new());
        let hash: [u8; 32] = Sha256::digest(wasm).into();
        // Held while compiling: tests that start together wait for one compilation instead of each making its own.
        let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match compiled.iter().find(|(known, _)| *known == hash) {
            Some((_, module)) => module.clone(),
            None => {
                let module = loader()?
                    .load(wasm, &LoadLimits::default())
                    .map_err(|error| HarnessError::Module { file: name.to_owned(), problem: error.to_string() })?
                    .module;
                if compiled.len() >= COMPILED_MAX {
                    compiled.remove(0);
                }
                compiled.push((hash, module.clone()));
                module
            }
        };
        Ok(Guest { name: name.to_owned(), module })
    }

    /// The filter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The compiled module.
    pub fn module(&self) -> &Module {
        &self.module
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The compiler of this process, with the clock that bounds callbacks.
fn loader() -> Result<&'static Loader, HarnessError> {
    static LOADER: OnceLock<Result<(Loader, Ticker), String>> = OnceLock::new();
    let loader = LOADER.get_or_init(|| {
        let engine = Engine::new(&EngineOptions::default()).map_err(|error| error.to_string())?;
        let ticker = engine.start_ticker();
        if !ticker.is_running() {
            return Err("the thread that bounds callbacks cannot be started".to_owned());
        }
        // Compiling takes seconds, and the next test run loads the same modules.
        let cache = portcullis_code::default_directory().and_then(|path| Cache::open(CacheSettings::new(path)).ok());
        let loader = Loader::new(engine, LoaderSettings { cache, process: None }).map_err(|error| error.to_string())?;
        Ok((loader, ticker))
    });
    loader.as_ref().map(|(loader, _)| loader).map_err(|error| HarnessError::Engine(error.clone()))
}

fn from_here_upwards(file: &Path) -> PathBuf {
    if file.is_absolute() || file.exists() {
        return file.to_owned();
    }
    let here = std::env::current_dir().unwrap_or_default();
    here.ancestors().map(|folder| folder.join(file)).find(|path| path.is_file()).unwrap_or_else(|| file.to_owned())
}

/// What a filter can be loaded from: the path of a `.wasm` file, or a [`Guest`].
pub trait Source {
    /// The compiled module.
    fn guest(self) -> Result<Guest, HarnessError>;
}

impl Source for &str {
    fn guest(self) -> Result<Guest, HarnessError> {
        Guest::load(self)
    }
}

impl Source for &Path {
    fn guest(self) -> Result<Guest, HarnessError> {
        Guest::load(self)
    }
}

impl Source for &PathBuf {
    fn guest(self) -> Result<Guest, HarnessError> {
        Guest::load(self)
    }
}

impl Source for PathBuf {
    fn guest(self) -> Result<Guest, HarnessError> {
        Guest::load(self)
    }
}

impl Source for &Guest {
    fn guest(self) -> Result<Guest, HarnessError> {
        Ok(self.clone())
    }
}

impl Source for Guest {
    fn guest(self) -> Result<Guest, HarnessError> {
        Ok(self)
    }
}

/// Bytes of a configuration: text, bytes, or JSON.
pub trait IntoConfiguration {
    /// The bytes that the filter finds.
    fn into_configuration(self) -> Vec<u8>;
}

impl IntoConfiguration for &str {
    fn into_configuration(self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }
}

impl IntoConfiguration for String {
    fn into_configuration(self) -> Vec<u8> {
        self.into_bytes()
    }
}

impl IntoConfiguration for &[u8] {
    fn into_configuration(self) -> Vec<u8> {
        self.to_vec()
    }
}

impl<const N: usize> IntoConfiguration for &[u8; N] {
    fn into_configuration(self) -> Vec<u8> {
        self.to_vec()
    }
}

impl IntoConfiguration for Vec<u8> {
    fn into_configuration(self) -> Vec<u8> {
        self
    }
}

impl IntoConfiguration for serde_json::Value {
    fn into_configuration(self) -> Vec<u8> {
        self.to_string().into_bytes()
    }
}

impl IntoConfiguration for &serde_json::Value {
    fn into_configuration(self) -> Vec<u8> {
        self.to_string().into_bytes()
    }
}

/// A filter that is about to be started, or several in a chain.
#[must_use = "a filter runs once it is started"]
pub struct FilterBuilder {
    host: Host,
    chain: Result<Vec<Plugin>, HarnessError>,
    workers: usize,
}

impl FilterBuilder {
    pub(crate) fn new(host: &Host, guest: Result<Guest, HarnessError>) -> FilterBuilder {
        let chain = guest.map(|guest| {
            let mut plugin = Plugin::new(guest.name, guest.module);
            plugin.limits.callback_time_max = CALLBACK_TIME_MAX;
            plugin.limits.start_time_max = CALLBACK_TIME_MAX;
            vec![plugin]
        });
        FilterBuilder { host: host.clone(), chain, workers: 1 }
    }

    /// The plugin configuration, byte for byte; JSON values are written out.
    pub fn configuration(self, configuration: impl IntoConfiguration) -> FilterBuilder {
        let configuration = configuration.into_configuration();
        self.plugin(|plugin| plugin.configuration = configuration)
    }

    /// Another name, in logs and in the property `plugin_name`.
    pub fn name(self, name: impl Into<String>) -> FilterBuilder {
        let name = name.into();
        self.plugin(|plugin| plugin.name = name)
    }

    /// The bytes that `proxy_on_vm_start` finds.
    pub fn vm_configuration(self, configuration: impl IntoConfiguration) -> FilterBuilder {
        let configuration = configuration.into_configuration();
        self.plugin(|plugin| plugin.vm_configuration = configuration)
    }

    /// Whose shared data and queues it shares, and, with the same module and VM configuration, whose VM.
    pub fn vm_id(self, vm_id: impl Into<String>) -> FilterBuilder {
        let vm_id = vm_id.into();
        self.plugin(|plugin| plugin.vm_id = vm_id)
    }

    /// Selects the root context inside a module that has several.
    pub fn root_id(self, root_id: impl Into<String>) -> FilterBuilder {
        let root_id = root_id.into();
        self.plugin(|plugin| plugin.root_id = root_id)
    }

    /// An environment variable that the guest sees.
    pub fn environment(self, name: &str, value: &str) -> FilterBuilder {
        let variable = (name.to_owned(), value.to_owned());
        self.plugin(|plugin| plugin.environment.push(variable))
    }

    /// Changes what the guest may use.
    pub fn limits(self, change: impl FnOnce(&mut Limits)) -> FilterBuilder {
        self.plugin(|plugin| change(&mut plugin.limits))
    }

    /// Changes whatever else makes a plugin: failure policy, capabilities.
    pub fn plugin(mut self, change: impl FnOnce(&mut Plugin)) -> FilterBuilder {
        if let Ok(chain) = &mut self.chain
            && let Some(plugin) = chain.last_mut()
        {
            change(plugin);
        }
        self
    }

    /// An upstream that filters may call; see [`Host::upstream`].
    pub fn upstream(self, name: impl Into<String>) -> FilterBuilder {
        self.host.upstream(name);
        self
    }

    /// Requests go through `next` afterwards, and answers through it first.
    pub fn then(mut self, next: FilterBuilder) -> FilterBuilder {
        self.chain = match (self.chain, next.chain) {
            (Ok(mut chain), Ok(next)) => {
                chain.extend(next);
                Ok(chain)
            }
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        self
    }

    /// How many workers run it, each with a VM of its own, as a proxy with as many threads does. Default one.
    pub fn workers(mut self, workers: usize) -> FilterBuilder {
        self.workers = workers.max(1);
        self
    }

    /// Starts the filter with its configuration, on every worker.
    ///
    /// # Errors
    /// If the module cannot be loaded, or does not start; [`HarnessError::Refused`] if the filter refuses its
    /// configuration.
    pub fn start(self) -> Result<Filter, HarnessError> {
        let chain: Vec<Arc<Plugin>> = self.chain?.into_iter().map(Arc::new).collect();
        let names: Vec<String> = chain.iter().map(|plugin| plugin.name.clone()).collect();
        let mut inner = self.host.inner.borrow_mut();
        let mut workers = Vec::new();
        for _ in 0..self.workers {
            let embedder = Box::new(SimulatedHost(Rc::clone(&inner.world)));
            let mut worker = Worker::start(Arc::clone(&inner.shared), chain.clone(), embedder)?;
            let woken = Arc::new(AtomicBool::new(true));
            worker.set_waker({
                let woken = Arc::clone(&woken);
                Arc::new(move || woken.store(true, Ordering::Relaxed))
            });
            workers.push(WorkerSlot { worker, woken });
        }
        inner.instances.push(Instance { workers });
        let instance = inner.instances.len() - 1;
        // Calls made while starting are answered like any other.
        inner.settle();
        drop(inner);
        Ok(Filter { host: self.host, instance, worker: 0, names })
    }
}

/// A started filter, or chain of filters. Clones are the same filter.
#[derive(Clone)]
pub struct Filter {
    pub(crate) host: Host,
    pub(crate) instance: usize,
    pub(crate) worker: usize,
    names: Vec<String>,
}

impl Filter {
    /// The host that it runs in.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The filters' names, in the order of the chain.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The same filter, as another worker runs it; the first is 0.
    ///
    /// # Panics
    /// If it was not started on as many workers.
    #[must_use]
    #[track_caller]
    pub fn on_worker(&self, worker: usize) -> Filter {
        let workers = self.host.inner.borrow().instances[self.instance].workers.len();
        assert!(worker < workers, "there are {workers} workers; see `FilterBuilder::workers`");
        Filter { worker, ..self.clone() }
    }

    /// Begins a `GET`.
    pub fn get(&self, path: &str) -> RequestBuilder {
        self.request("GET", path)
    }

    /// Begins a request to `api.example.com`.
    pub fn request(&self, method: &str, path: &str) -> RequestBuilder {
        self.plan(RequestPlan::new(method, path))
    }

    /// Begins a request that is planned already.
    pub fn plan(&self, request: RequestPlan) -> RequestBuilder {
        RequestBuilder::new(self, request)
    }

    /// Sends a request through the filter, lets the upstream answer, and reports what came of it.
    pub fn exchange(&self, request: &RequestPlan, response: &ResponsePlan) -> Observed {
        self.plan(request.clone()).upstream_response(response.clone()).send()
    }

    /// Whether the filters of the chain work, on this worker.
    pub fn health(&self) -> Vec<PluginHealth> {
        self.host.inner.borrow().instances[self.instance].workers[self.worker].worker.health()
    }

    /// Ends the filter on all workers: its root contexts are told. Streams should be finished before.
    pub fn shutdown(self) {
        let mut inner = self.host.inner.borrow_mut();
        for slot in &mut inner.instances[self.instance].workers {
            slot.worker.shutdown();
        }
        inner.settle();
    }
}
