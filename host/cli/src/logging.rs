//! Where log lines go: standard error, as text or JSON, written by a thread of its own so that a slow terminal holds up no
//! request.

use std::io;

use portcullis_config::{LogFormat, LogLevel, Logging};
use portcullis_proxy::LINT_TARGET;
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::EnvFilter;

/// The variable that overrides the policy's level, e.g. `debug` or `portcullis::filter=debug,info`.
pub(crate) const VARIABLE: &str = "PORTCULLIS_LOG";

/// Which lines there are beside those that the policy's level shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lint {
    /// What filters do that disappoints their authors in Envoy, as warnings.
    Shown,
    /// None: each request would tell the same again.
    Hidden,
}

/// Begins to log. What is still to be written is written when the guard is dropped.
pub(crate) fn start(logging: &Logging, lint: Lint) -> WorkerGuard {
    let level = match logging.level {
        LogLevel::Trace => "trace",
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    };
    // The libraries below us say nothing of use to those who run this.
    let default = format!("warn,portcullis={level},portcullis_proxy={level},portcullis_operators={level}");
    let directives = std::env::var(VARIABLE).ok().filter(|directives| EnvFilter::try_new(directives).is_ok());
    let directives = directives.unwrap_or(default);
    // Of two that fit, the later one counts.
    let filter = EnvFilter::new(match lint {
        Lint::Shown => format!("{directives},{LINT_TARGET}=warn"),
        Lint::Hidden => format!("{LINT_TARGET}=off,{directives}"),
    });
    let (writer, guard) = tracing_appender::non_blocking(io::stderr());
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false);
    // Only the first call in a process has an effect, and this is the only one.
    let _ = match logging.format {
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
        LogFormat::Text => lines.with_target(false).try_init(),
    };
    guard
}
