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
//! * `SIGTERM` lets it finish what was handed to `ctx.waitUntil` and end.
//!
//! The host trusts none of it: whatever an engine says or does not say is checked, limited and timed from outside.

pub mod deno;

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

    /// How to start it for a class of operators.
    fn start(&self, class: &Class) -> Start;
}

/// The engine that this machine has.
///
/// # Errors
/// There is none; says what to do.
pub fn locate() -> Result<Arc<dyn Engine>, deno::DenoMissing> {
    Ok(Arc::new(deno::Deno::locate()?))
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
    /// Where, in the bundle's coordinates.
    #[serde(default)]
    pub stack: String,
}
