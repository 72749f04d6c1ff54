//! What runs an operator's code, behind one trait.
//!
//! An engine is a program that, confined and without an operator, listens on a Unix socket in its private directory,
//! takes code once, and from then on answers HTTP with it. This is the whole contract:
//!
//! * It is started with the paths of two sockets: the one it must listen on (`op.sock`) and the one on which the host
//!   offers services (`host.sock`: outgoing requests and the key-value store).
//! * Once it listens it prints one line, [`READY`].
//! * `POST http://portcullis.internal/load` brings a [`Load`] document. It answers 200, or 422 with a [`LoadFailure`].
//!   A second one is refused.
//! * `GET http://portcullis.internal/ping` answers 204 whenever its event loop is alive.
//! * Every other request is the operator's, in absolute form, so that `request.url` is what the client asked for.
//! * A request that has no answer of the operator's gets one with [`OUTCOME`], which says why. An engine that
//!   [keeps limits](Abilities::keeps_limits) may send the same as a trailer, when the answer had begun.
//! * One that keeps limits ends with [`BACKGROUND_CPU_STATUS`] when code between requests used too much CPU time.
//! * `SIGTERM` lets it finish what was handed to `ctx.waitUntil` and end.
//!
//! The host trusts none of it: whatever an engine says or does not say is checked, limited and timed from outside.

pub mod deno;
pub mod program;
pub mod runner;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::jail::Bind;

/// The line by which an engine says that it listens. Means something only before code was loaded.
pub const READY: &str = "\u{1e}portcullis ready";

/// The authority under which host and engine talk about the process itself. Clients cannot use it.
pub const INTERNAL_AUTHORITY: &str = "portcullis.internal";

/// The field by which an engine says why a request has no answer of its operator's: `exception`, `cpu_time`, `memory`,
/// `response_bytes`, or `bystander` when another request was to blame.
pub const OUTCOME: http::HeaderName = http::HeaderName::from_static("x-portcullis-outcome");

/// The status of an engine that ended because of what its operator did between requests. An operator cannot choose it; one that
/// broke out of its engine can, and only changes the name of its end.
pub const BACKGROUND_CPU_STATUS: i32 = 86;

/// What decides how a process is started. Prewarmed processes are interchangeable within one class.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Class {
    /// Largest JavaScript heap.
    pub heap_bytes: u64,
    /// Largest total of writable memory beyond what the engine needs for itself.
    pub memory_bytes: u64,
    /// Without a just-in-time compiler: slower, and a class of engine flaws less.
    pub interpreter_only: bool,
    /// Whether `eval` and `new Function` work.
    pub code_generation: bool,
    /// Quota of the private directory.
    pub private_bytes: u64,
    /// Whether every layer of isolation must hold.
    pub required: bool,
}

/// How a jail must look for an engine.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// The host's files that the engine needs, read-only.
    pub binds: Vec<Bind>,
    /// Small files that it needs.
    pub files: Vec<(std::path::PathBuf, String)>,
    /// Program and arguments; see [`crate::jail::Spec::argv`] for placeholders.
    pub argv: Vec<String>,
    /// Its whole environment.
    pub env: Vec<(String, String)>,
    /// Writable memory that the engine itself reserves, in bytes; the operator's budget comes on top.
    pub data_bytes: u64,
    /// Threads that it may have.
    pub threads: u64,
    /// Descriptors that it may have.
    pub files_open: u64,
    /// What it does by itself.
    pub abilities: Abilities,
}

/// What an engine does by itself, beyond the contract's least. The host goes on watching.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// It ends what uses too much CPU time or memory, and lives on. The host steps in only when it does not.
    pub keeps_limits: bool,
    /// It speaks HTTP/2 with the host's services, over one connection that it makes when it starts.
    pub multiplexes: bool,
    /// Given a source map, it tells positions in the operator's own files.
    pub maps_positions: bool,
    /// It gives up further system calls once it is ready, so it must be allowed to do that.
    pub restricts_itself: bool,
}

/// A program that runs operators.
pub trait Engine: Send + Sync + fmt::Debug {
    /// A short name with the version, for logs and reports.
    fn name(&self) -> String;

    /// The file that is executed.
    fn program(&self) -> &Path;

    /// What whoever runs the host should know about this very engine.
    fn remark(&self) -> Option<String> {
        None
    }

    /// What to do when it does not start.
    fn remedy(&self) -> String;

    /// How to start it for a class of operators.
    fn start(&self, class: &Class) -> Start;
}

/// Which engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// The runner where there is one, else Deno.
    #[default]
    Any,
    /// [`runner::Runner`].
    Runner,
    /// [`deno::Deno`].
    Deno,
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineMissing {
    /// There is no runner, and it must be the runner; or somebody put one there, and it cannot be used.
    #[error("operators are to run on the runner: {0}")]
    Runner(#[from] runner::RunnerMissing),
    /// There is no runner, and no Deno either.
    #[error(transparent)]
    Deno(#[from] deno::DenoMissing),
}

/// The engine to use on this machine, of those that it has.
///
/// # Errors
/// There is none, or one that was named is not usable; says what to do.
pub fn locate(choice: Choice) -> Result<Arc<dyn Engine>, EngineMissing> {
    match choice {
        Choice::Runner => Ok(Arc::new(runner::Runner::locate()?)),
        Choice::Deno => Ok(Arc::new(deno::Deno::locate()?)),
        Choice::Any => match runner::Runner::locate() {
            Ok(runner) => Ok(Arc::new(runner)),
            Err(runner::RunnerMissing::NotFound) => Ok(Arc::new(deno::Deno::locate()?)),
            // Somebody put it there to be used.
            Err(unusable) => Err(unusable.into()),
        },
    }
}

/// What an engine is handed once.
#[derive(Clone, Serialize, Deserialize)]
pub struct Load {
    /// The operator's name, for its own stack traces.
    pub name: String,
    /// One JavaScript module.
    pub code: String,
    /// Plain values of `env`. A secret appears as a placeholder that the host replaces on the way out.
    pub env: BTreeMap<String, String>,
    /// Contents of granted files by name, base64.
    pub files: BTreeMap<String, String>,
    /// Whether `env.kv` exists.
    pub kv: bool,
    /// Whether stack traces may be shown to the client.
    pub dev: bool,
    /// Where the pieces of `code` come from, for an engine that maps positions: a source map (ECMA-426).
    pub map: Option<String>,
    /// For an engine that keeps limits by itself.
    pub limits: LoadLimits,
}

/// Limits of one operator that an engine may keep by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadLimits {
    /// CPU time of one request.
    pub cpu_milliseconds: u64,
    /// CPU time of what runs without a request in flight.
    pub background_cpu_milliseconds: u64,
    /// Request body.
    pub request_bytes: u64,
    /// Response body.
    pub response_bytes: u64,
}

impl fmt::Debug for Load {
    /// Values may be confidential even where they are not called secrets.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Load")
            .field("name", &self.name)
            .field("code_bytes", &self.code.len())
            .field("env", &self.env.keys().collect::<Vec<_>>())
            .field("files", &self.files.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

/// Why an engine could not take the code: the operator's fault.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadFailure {
    /// What was thrown.
    pub message: String,
    /// Where, in the bundle's coordinates or already in those of the files.
    #[serde(default)]
    pub stack: String,
}
