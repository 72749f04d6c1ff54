//! [`Engine`], [`Module`]: compiling guests, once per process, and the clock that bounds their callbacks.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use wasmtime::{Config, ExternType, InstancePre, OptLevel, ValType, WasmBacktraceDetails};

use crate::bounds::ModuleLimits;
use crate::hostcalls::{self, HostFunctions};
use crate::vm::VmState;

/// How often the clock for callbacks ticks, and so how precisely their time is bounded; see [`crate::Limits`].
pub const EPOCH: Duration = Duration::from_millis(5);

/// What an [`Engine`] is made with.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Bytes of machine stack a guest may use. Default 512 KiB, wasmtime's own: guests keep large data in linear
    /// memory, and one worker thread has 2 MiB.
    pub stack_bytes_max: usize,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions { stack_bytes_max: 512 * 1024 }
    }
}

/// The compiler and runtime that all guests of a process share. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    pub(crate) wasmtime: wasmtime::Engine,
    functions: Arc<HostFunctions>,
}

/// An engine that could not be made: the machine lacks something that wasmtime needs.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the WebAssembly engine: {0:#}")]
pub struct EngineError(wasmtime::Error);

impl Engine {
    /// Sets up wasmtime.
    ///
    /// # Errors
    /// Where wasmtime cannot generate code for this machine.
    pub fn new(options: &EngineOptions) -> Result<Engine, EngineError> {
        Engine::with_config(&settings(options))
    }

    /// An engine whose code must not be mixed with that of other versions.
    #[cfg(test)]
    pub(crate) fn with_version(version: &str) -> Result<Engine, EngineError> {
        let mut config = settings(&EngineOptions::default());
        let version = wasmtime::ModuleVersionStrategy::Custom(version.to_owned());
        config.module_version(version).map_err(EngineError)?;
        Engine::with_config(&config)
    }

    fn with_config(config: &Config) -> Result<Engine, EngineError> {
        let wasmtime = wasmtime::Engine::new(config).map_err(EngineError)?;
        let functions = Arc::new(hostcalls::host_functions(&wasmtime).map_err(EngineError)?);
        Ok(Engine { wasmtime, functions })
    }

    /// Modules and names of all functions that guests may import.
    pub fn host_function_names(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.functions.names.iter().copied()
    }

    /// Names of all functions that a module may import, in whatever module of imports they are.
    pub fn host_functions(&self) -> BTreeSet<&'static str> {
        self.functions.names.iter().map(|(_, name)| *name).collect()
    }

    /// Names of all callbacks that a module may export.
    pub fn callbacks(&self) -> BTreeSet<&'static str> {
        CALLBACKS.iter().map(|(name, ..)| *name).filter(|name| name.starts_with("proxy_on_")).collect()
    }

    /// Starts the thread by whose clock callbacks are bounded. Without it no callback is ever ended.
    pub fn start_ticker(&self) -> Ticker {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("epoch".into()).spawn({
            let (engine, stop) = (self.wasmtime.clone(), Arc::clone(&stop));
            move || {
                let (began, mut ticks) = (Instant::now(), 0);
                while !stop.load(Ordering::Relaxed) {
                    std::thread::park_timeout(EPOCH);
                    // Where this thread got its turn late, the ticks that it missed are made up for: a busy machine must not
                    // lengthen everybody's time.
                    let due = began.elapsed().as_nanos() / EPOCH.as_nanos();
                    for _ in ticks..due {
                        engine.increment_epoch();
                    }
                    ticks = due;
                }
            }
        });
        Ticker { stop, thread: thread.ok() }
    }
}

fn settings(options: &EngineOptions) -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .max_wasm_stack(options.stack_bytes_max)
        .cranelift_opt_level(OptLevel::Speed)
        .wasm_backtrace_details(WasmBacktraceDetails::Disable)
        .memory_init_cow(true);
    config
}

/// Keeps callbacks bounded while it lives.
#[must_use = "callbacks are bounded only while the ticker lives"]
pub struct Ticker {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Ticker {
    /// Whether the thread could be started.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The thread does nothing but tick; a panic in it could only be wasmtime's, and there is nobody to tell.
            drop(thread.join());
        }
    }
}

impl std::fmt::Display for AbiVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            AbiVersion::V0_1_0 => "0.1.0",
            AbiVersion::V0_2_0 => "0.2.0",
            AbiVersion::V0_2_1 => "0.2.1",
        })
    }
}

/// Which Proxy-Wasm ABI a module was built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AbiVersion {
    /// 0.1.0: two-argument header callbacks, a few functions that were replaced later.
    V0_1_0,
    /// 0.2.0.
    V0_2_0,
    /// 0.2.1: 0.2.0 and `proxy_get_log_level`.
    V0_2_1,
}

impl AbiVersion {
    fn export(self) -> &'static str {
        match self {
            AbiVersion::V0_1_0 => "proxy_abi_version_0_1_0",
            AbiVersion::V0_2_0 => "proxy_abi_version_0_2_0",
            AbiVersion::V0_2_1 => "proxy_abi_version_0_2_1",
        }
    }
}

/// Why a module cannot be a plugin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// The file is larger than allowed.
    #[error(
        "the module has {bytes} bytes, more than the {max} allowed\n  hint: strip debug sections, or raise `limits.module_bytes`"
    )]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// It declares more of something than allowed.
    #[error(
        "the module has {count} {what}, more than the {max} allowed\n  hint: no compiler makes so many; if yours does, tell us"
    )]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        count: u64,
        /// The bound.
        max: u64,
    },
    /// One function is larger than allowed.
    #[error(
        "function {number} of the module has {bytes} bytes, more than the {max} allowed\n  hint: build with optimisation, \
         and keep large tables in data instead of code"
    )]
    FunctionTooLarge {
        /// The function's number, imported ones not counted.
        number: u32,
        /// Its size.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// It wants more memory from the beginning than its plugin may have.
    #[error(
        "the module begins with {bytes} bytes of memory, more than the {max} allowed\n  hint: raise `limits.memory`, or link \
         the module with a smaller initial memory"
    )]
    MemoryTooLarge {
        /// What it begins with.
        bytes: u64,
        /// The bound.
        max: u64,
    },
    /// The bytes are no WebAssembly module this host can run.
    #[error(
        "not a WebAssembly module this host can run: {}\n  hint: build it for `wasm32-wasip1` (a core module, not a component)",
        in_one_line(.0)
    )]
    Invalid(wasmtime::Error),
    /// None of the marks of Proxy-Wasm is exported.
    #[error(
        "the module is no Proxy-Wasm plugin: it exports none of `proxy_abi_version_0_2_1`, `proxy_abi_version_0_2_0`, \
         `proxy_abi_version_0_1_0`\n  hint: build it with a Proxy-Wasm SDK, as a library (for Rust: crate-type `cdylib`)"
    )]
    NoAbiVersion,
    /// Something every plugin must export is missing.
    #[error("the module lacks the export `{export}`, {purpose}\n  hint: {hint}")]
    MissingExport {
        /// Its name.
        export: &'static str,
        /// What the host needs it for.
        purpose: &'static str,
        /// How to get it.
        hint: &'static str,
    },
    /// An export has another type than the ABI gives it.
    #[error(
        "the export `{export}` has type {found}, the ABI has {expected}\n  hint: build it with an SDK for Proxy-Wasm ABI 0.2.1"
    )]
    ExportType {
        /// Its name.
        export: String,
        /// Its type in the module.
        found: String,
        /// Its type in the ABI.
        expected: String,
    },
    /// The module wants functions that this host does not have.
    #[error("the module imports what this host does not have: {}\n  hint: {}", .0.join(", "), import_hint(.0))]
    UnknownImports(Vec<String>),
    /// The module imports a function that the ABI it was built for does not have.
    #[error(
        "the module says that it was built for ABI {abi}, and imports `{import}`, which only {} has\n  hint: build it with one \
         version of one SDK, and let it export the mark of that SDK's ABI alone",
        .versions.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
    )]
    ImportOfOtherVersion {
        /// The function.
        import: String,
        /// The versions that have it.
        versions: &'static [AbiVersion],
        /// The version that the module says.
        abi: AbiVersion,
    },
    /// An import has another type than the host's function.
    #[error("the module's imports do not fit: {0:#}")]
    ImportType(wasmtime::Error),
}

/// Kinds of streams that a module has callbacks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Callbacks {
    /// HTTP requests and responses.
    pub http: bool,
    /// TCP connections.
    pub tcp: bool,
}

/// The parser shows bytes as lists, a line each.
fn in_one_line(error: &wasmtime::Error) -> String {
    format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
}

impl ModuleError {
    /// [`ModuleError::Invalid`] in the words of a compiler elsewhere.
    pub fn invalid(reason: &str) -> ModuleError {
        ModuleError::Invalid(wasmtime::Error::msg(reason.to_owned()))
    }
}

/// A compiled module that was checked against the ABI. Cheap to clone; shared by all workers.
#[derive(Clone)]
pub struct Module {
    inner: Arc<ModuleInner>,
}

struct ModuleInner {
    engine: Engine,
    instance_pre: InstancePre<VmState>,
    abi: AbiVersion,
    sha256: [u8; 32],
}

impl Module {
    /// Compiles `wasm` and checks that it is a plugin this host can run.
    ///
    /// # Errors
    /// Says what is missing or does not fit, and what to do about it.
    pub fn from_bytes(engine: &Engine, wasm: &[u8], limits: &ModuleLimits) -> Result<Module, ModuleError> {
        limits.check(wasm)?;
        let module = wasmtime::Module::from_binary(&engine.wasmtime, wasm).map_err(ModuleError::Invalid)?;
        Module::checked(engine, &module, Sha256::digest(wasm).into())
    }

    /// Checks compiled code against the ABI.
    pub(crate) fn checked(engine: &Engine, module: &wasmtime::Module, sha256: [u8; 32]) -> Result<Module, ModuleError> {
        let abi = abi_version(module)?;
        check_exports(module, abi)?;
        check_imports(module, &engine.functions, abi)?;
        let instance_pre = engine.functions.linker.instantiate_pre(module).map_err(ModuleError::ImportType)?;
        Ok(Module { inner: Arc::new(ModuleInner { engine: engine.clone(), instance_pre, abi, sha256 }) })
    }

    /// The ABI it was built for: the first that it says, as in Envoy.
    pub fn abi(&self) -> AbiVersion {
        self.inner.abi
    }

    /// Hash of the `.wasm` file.
    pub fn sha256(&self) -> &[u8; 32] {
        &self.inner.sha256
    }

    /// Names of the host functions it imports, as `module.name`, sorted.
    pub fn imports(&self) -> BTreeSet<String> {
        self.inner
            .instance_pre
            .module()
            .imports()
            .map(|import| format!("{}.{}", import.module(), import.name()))
            .collect()
    }

    /// Which kinds of streams it has callbacks for. Many SDKs export every callback there is, whatever the plugin is for;
    /// one that exports none of a kind is of no use there.
    pub fn callbacks(&self) -> Callbacks {
        let module = self.inner.instance_pre.module();
        let any = |names: &[&str]| names.iter().any(|name| module.get_export(name).is_some());
        Callbacks {
            http: any(&[
                "proxy_on_request_headers",
                "proxy_on_request_body",
                "proxy_on_request_trailers",
                "proxy_on_response_headers",
                "proxy_on_response_body",
                "proxy_on_response_trailers",
            ]),
            tcp: any(&[
                "proxy_on_new_connection",
                "proxy_on_downstream_data",
                "proxy_on_upstream_data",
                "proxy_on_downstream_connection_close",
                "proxy_on_upstream_connection_close",
            ]),
        }
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    pub(crate) fn instance_pre(&self) -> &InstancePre<VmState> {
        &self.inner.instance_pre
    }
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module").field("abi", &self.inner.abi).finish_non_exhaustive()
    }
}

fn abi_version(module: &wasmtime::Module) -> Result<AbiVersion, ModuleError> {
    let versions = [AbiVersion::V0_2_1, AbiVersion::V0_2_0, AbiVersion::V0_1_0];
    module
        .exports()
        .filter(|export| matches!(export.ty(), ExternType::Func(_)))
        .find_map(|export| versions.into_iter().find(|version| version.export() == export.name()))
        .ok_or(ModuleError::NoAbiVersion)
}

fn check_exports(module: &wasmtime::Module, abi: AbiVersion) -> Result<(), ModuleError> {
    if !matches!(module.get_export("memory"), Some(ExternType::Memory(_))) {
        return Err(ModuleError::MissingExport {
            export: "memory",
            purpose: "through which all values pass",
            hint: "link with `--export-memory`, or build with a Proxy-Wasm SDK",
        });
    }
    if module.get_export("proxy_on_memory_allocate").is_none() && module.get_export("malloc").is_none() {
        return Err(ModuleError::MissingExport {
            export: "proxy_on_memory_allocate",
            purpose: "by which the host gets room for its answers (`malloc` would do as well)",
            hint: "build with a Proxy-Wasm SDK, which exports it",
        });
    }
    // Without `_initialize` the module's `main` is not the host's business: `_start` calls it.
    let starts: &[_] = match module.get_export("_initialize") {
        Some(_) => &[("_initialize", 0, 0), ("main", 2, 1), ("__main_void", 0, 1)],
        None => &[("_start", 0, 0)],
    };
    for (name, params, results) in CALLBACKS.iter().chain(starts) {
        let Some(export) = module.get_export(name) else {
            continue;
        };
        // ABI 0.1.0 did not yet say whether headers end the stream.
        let params = if abi == AbiVersion::V0_1_0 && name.ends_with("_headers") { &2 } else { params };
        let found = match &export {
            ExternType::Func(func)
                if func.params().all(|ty| matches!(ty, ValType::I32))
                    && func.results().all(|ty| matches!(ty, ValType::I32)) =>
            {
                (func.params().len(), func.results().len())
            }
            _ => (usize::MAX, usize::MAX),
        };
        if found != (*params, *results) {
            return Err(ModuleError::ExportType {
                export: (*name).into(),
                found: describe(&export),
                expected: format!(
                    "({}) -> ({})",
                    "i32 ".repeat(*params).trim_end(),
                    "i32 ".repeat(*results).trim_end()
                ),
            });
        }
    }
    Ok(())
}

fn describe(export: &ExternType) -> String {
    match export {
        ExternType::Func(func) => {
            let list =
                |types: &mut dyn Iterator<Item = ValType>| types.map(|ty| ty.to_string()).collect::<Vec<_>>().join(" ");
            format!("({}) -> ({})", list(&mut func.params()), list(&mut func.results()))
        }
        ExternType::Memory(_) => "memory".into(),
        ExternType::Table(_) => "table".into(),
        _ => "another kind than a function".into(),
    }
}

fn check_imports(module: &wasmtime::Module, functions: &HostFunctions, abi: AbiVersion) -> Result<(), ModuleError> {
    let unknown: Vec<String> = module
        .imports()
        .filter(|import| !functions.names.contains(&(import.module(), import.name())))
        .map(|import| format!("`{}.{}`", import.module(), import.name()))
        .collect();
    if !unknown.is_empty() {
        return Err(ModuleError::UnknownImports(unknown));
    }
    for import in module.imports().filter(|import| import.module() == "env") {
        let versions = versions_with(import.name());
        if !versions.contains(&abi) {
            let import = import.name().to_owned();
            return Err(ModuleError::ImportOfOtherVersion { import, versions, abi });
        }
    }
    Ok(())
}

/// The versions of the ABI that have this function. Envoy does not offer it to modules that say another one.
fn versions_with(function: &str) -> &'static [AbiVersion] {
    match function {
        "proxy_get_configuration"
        | "proxy_continue_request"
        | "proxy_continue_response"
        | "proxy_clear_route_cache" => &[AbiVersion::V0_1_0],
        "proxy_continue_stream" | "proxy_close_stream" => &[AbiVersion::V0_2_0, AbiVersion::V0_2_1],
        "proxy_get_log_level" => &[AbiVersion::V0_2_1],
        _ => &[AbiVersion::V0_1_0, AbiVersion::V0_2_0, AbiVersion::V0_2_1],
    }
}

/// How to do without what a module imports.
fn import_hint(imports: &[String]) -> &'static str {
    let any = |of: &[&str]| imports.iter().any(|import| of.iter().any(|name| import.starts_with(&format!("`{name}"))));
    if any(&["env.abort`", "env.seed`", "env.trace`"]) {
        "compile AssemblyScript with `--use abort=...`, so that it brings its own `abort` as Envoy needs it, and without \
         `seed` and `trace`"
    } else if any(&["__wbindgen", "wbg."]) {
        "build for `wasm32-wasip1`, without anything that needs `wasm-bindgen`"
    } else if any(&["env.memory`"]) {
        "let the module have its own memory, without `--import-memory`"
    } else if any(&["env.envoy_resolve_dns`"]) {
        "this host resolves no names for filters: let them call an upstream"
    } else if any(&["wasi:"]) {
        "build a core module for `wasm32-wasip1`, not a component"
    } else {
        "Proxy-Wasm plugins may import the ABI's `env.proxy_*` functions and a part of WASI preview 1"
    }
}

/// Callbacks of the ABI: name, number of `i32` parameters, number of `i32` results.
pub(crate) const CALLBACKS: &[(&str, usize, usize)] = &[
    ("proxy_on_memory_allocate", 1, 1),
    ("malloc", 1, 1),
    ("proxy_on_context_create", 2, 0),
    ("proxy_on_vm_start", 2, 1),
    ("proxy_on_configure", 2, 1),
    ("proxy_on_tick", 1, 0),
    ("proxy_on_queue_ready", 2, 0),
    ("proxy_on_request_headers", 3, 1),
    ("proxy_on_request_body", 3, 1),
    ("proxy_on_request_trailers", 2, 1),
    ("proxy_on_response_headers", 3, 1),
    ("proxy_on_response_body", 3, 1),
    ("proxy_on_response_trailers", 2, 1),
    ("proxy_on_new_connection", 1, 1),
    ("proxy_on_downstream_data", 3, 1),
    ("proxy_on_upstream_data", 3, 1),
    ("proxy_on_downstream_connection_close", 2, 0),
    ("proxy_on_upstream_connection_close", 2, 0),
    ("proxy_on_http_call_response", 5, 0),
    ("proxy_on_grpc_receive_initial_metadata", 3, 0),
    ("proxy_on_grpc_receive", 3, 0),
    ("proxy_on_grpc_receive_trailing_metadata", 3, 0),
    ("proxy_on_grpc_close", 3, 0),
    // Neither Envoy nor this host has anything to say with these.
    ("proxy_on_request_metadata", 2, 1),
    ("proxy_on_response_metadata", 2, 1),
    ("proxy_on_foreign_function", 3, 0),
    ("proxy_on_done", 1, 1),
    ("proxy_on_log", 1, 0),
    ("proxy_on_delete", 1, 0),
];
