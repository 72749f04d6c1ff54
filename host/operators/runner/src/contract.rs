//! The documents that host and engine exchange. The host's side of them is `portcullis_operators::engine`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The line that says that this process listens.
pub(crate) const READY: &str = "\u{1e}portcullis ready";

/// The authority under which the host speaks to the engine itself.
pub(crate) const INTERNAL_AUTHORITY: &str = "portcullis.internal";

/// The status with which it ends when code between requests used more CPU time than allowed.
pub(crate) const BACKGROUND_CPU_STATUS: u8 = 86;

/// What the process is handed once.
#[derive(Clone, Deserialize)]
pub(crate) struct Load {
    /// One JavaScript module.
    pub(crate) code: String,
    /// Where its pieces come from: a source map (ECMA-426).
    #[serde(default)]
    pub(crate) map: Option<String>,
    pub(crate) env: BTreeMap<String, String>,
    /// Contents by name, base64.
    pub(crate) files: BTreeMap<String, String>,
    pub(crate) kv: bool,
    pub(crate) dev: bool,
    pub(crate) limits: LoadLimits,
}

/// Limits that are kept inside, so that reaching one does not cost the process.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct LoadLimits {
    pub(crate) cpu_milliseconds: u64,
    pub(crate) background_cpu_milliseconds: u64,
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
}

/// Why the code was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LoadFailure {
    pub(crate) message: String,
    pub(crate) stack: String,
}

impl LoadFailure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), stack: String::new() }
    }
}
