//! [`Loader`]: from a `.wasm` file to a module, through the cache where there is one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use portcullis_abi::{CodeKey, Engine, Module, ModuleError, ModuleLimits, SealedError};

use crate::cache::Cache;
use crate::process::CompilerProcess;

/// What loading one module may cost.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LoadLimits {
    /// What the module may hold.
    pub module: ModuleLimits,
    /// Time to compile it. Default a minute: real modules take seconds.
    pub compile_time_max: Duration,
    /// Memory to compile it, bytes. Default 1 GiB: real modules take fifty to a hundred times their size. Holds where compiling
    /// has a process of its own.
    pub compile_memory_max: u64,
}

impl Default for LoadLimits {
    fn default() -> LoadLimits {
        LoadLimits {
            module: ModuleLimits::default(),
            compile_time_max: Duration::from_secs(60),
            compile_memory_max: 1 << 30,
        }
    }
}

/// Why a module cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// It is no plugin this host can run, or larger than allowed.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// Compiling did not come to an end in time.
    #[error("compiling took longer than {0:?}\n  hint: make the module smaller, or raise `limits.compile_time`")]
    TooLong(Duration),
    /// Compiling took more memory than allowed.
    #[error(
        "compiling took more than {} MiB of memory\n  hint: make the module smaller, or raise `limits.compile_memory`",
        .0 >> 20
    )]
    TooMuchMemory(u64),
    /// Something is wrong with this machine, or with us.
    #[error("the compiler failed: {0}")]
    Failed(String),
}

/// Where a module came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It was compiled before and lay on disk.
    Cache,
    /// It was compiled now.
    Compiler,
}

/// A module, and where it came from.
#[derive(Debug)]
pub struct Loaded {
    /// The module.
    pub module: Module,
    /// Where it came from.
    pub source: Source,
}

/// How many modules came from where, since the loader was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// From the cache.
    pub cached: u64,
    /// From the compiler.
    pub compiled: u64,
}

/// What a loader has beside an engine.
#[derive(Clone, Debug, Default)]
pub struct LoaderSettings {
    /// Where compiled code is kept. `None`: nowhere.
    pub cache: Option<Cache>,
    /// How to start a process that compiles. `None`: a thread does, whose memory is not bounded and which cannot be ended.
    pub process: Option<CompilerProcess>,
}

/// Compiles modules, or finds them compiled. Cheap to clone.
#[derive(Clone)]
pub struct Loader {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    cache: Option<Cache>,
    process: Option<CompilerProcess>,
    /// Seals what is compiled until it is loaded. The cache has a key of its own, which never leaves this process.
    secret: [u8; CodeKey::LEN],
    cached: AtomicU64,
    compiled: AtomicU64,
}

impl Loader {
    /// A loader for this engine, which must have the default options if there is a `process`.
    ///
    /// # Errors
    /// Where the system gives no randomness.
    pub fn new(engine: Engine, settings: LoaderSettings) -> Result<Loader, LoadError> {
        let LoaderSettings { cache, process } = settings;
        let mut secret = [0; CodeKey::LEN];
        getrandom::fill(&mut secret).map_err(|error| LoadError::Failed(format!("no randomness: {error}")))?;
        let inner = Inner { engine, cache, process, secret, cached: AtomicU64::new(0), compiled: AtomicU64::new(0) };
        Ok(Loader { inner: Arc::new(inner) })
    }

    /// The engine that modules are for.
    pub fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    /// How many modules came from where.
    pub fn counts(&self) -> Counts {
        let Inner { cached, compiled, .. } = &*self.inner;
        Counts { cached: cached.load(Ordering::Relaxed), compiled: compiled.load(Ordering::Relaxed) }
    }

    /// Makes a module of a `.wasm` file's bytes.
    ///
    /// # Errors
    /// Where the module is none this host can run, or reaches a limit.
    pub fn load(&self, wasm: &[u8], limits: &LoadLimits) -> Result<Loaded, LoadError> {
        let Inner { engine, cache, process, secret, cached, compiled } = &*self.inner;
        // Before the cache, so that a limit holds also for what was compiled under a higher one.
        limits.module.check(wasm)?;
        if let Some(cache) = cache
            && let Some(module) = cache.get(engine, wasm)?
        {
            cached.fetch_add(1, Ordering::Relaxed);
            return Ok(Loaded { module, source: Source::Cache });
        }
        let sealed = match process {
            Some(process) => process.compile(wasm, limits, secret)?,
            None => compile_in_thread(engine, wasm, limits, secret)?,
        };
        let module =
            Module::from_sealed(engine, wasm, &sealed, &CodeKey::new(secret)).map_err(|error| match error {
                SealedError::Module(error) => LoadError::Module(error),
                error => LoadError::Failed(format!("what it made: {error}")),
            })?;
        compiled.fetch_add(1, Ordering::Relaxed);
        if let Some(cache) = cache {
            cache.put(engine, wasm, &sealed, &CodeKey::new(secret));
        }
        Ok(Loaded { module, source: Source::Compiler })
    }
}

/// Compiles in a thread of its own, which is left to itself once the time is over: for tests and tools, whose modules are their
/// authors' own.
fn compile_in_thread(
    engine: &Engine,
    wasm: &[u8],
    limits: &LoadLimits,
    secret: &[u8; CodeKey::LEN],
) -> Result<Vec<u8>, LoadError> {
    let (sender, receiver) = channel();
    let (engine, wasm, bounds, key) = (engine.clone(), wasm.to_vec(), limits.module.clone(), CodeKey::new(secret));
    std::thread::Builder::new()
        .name("compile".into())
        .spawn(move || {
            // The receiver is gone if the time was over: then the result is of no use.
            drop(sender.send(engine.compile_sealed(&wasm, &bounds, &key)));
        })
        .map_err(|error| LoadError::Failed(format!("it cannot be started: {error}")))?;
    match receiver.recv_timeout(limits.compile_time_max) {
        Ok(sealed) => Ok(sealed?),
        Err(RecvTimeoutError::Timeout) => Err(LoadError::TooLong(limits.compile_time_max)),
        Err(RecvTimeoutError::Disconnected) => Err(LoadError::Failed("it ended early".into())),
    }
}
