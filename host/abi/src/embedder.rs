//! [`Embedder`]: what a worker asks of whoever embeds it, at once and without waiting.

use std::time::Duration;

use crate::abi::LogLevel;
use crate::trace::TraceEvent;
use crate::worker::StreamId;

/// Answers that a guest's call needs at once. Everything that takes time is an [`crate::Action`] instead.
pub trait Embedder {
    /// A guest's log line, or the host's about a guest. Already bounded in length and rate.
    fn log(&mut self, record: &LogRecord<'_>);
    /// Nanoseconds since 1970.
    fn unix_nanos(&self) -> u64;
    /// Time since some fixed moment, never going back; orders ticks and back-offs.
    fn monotonic(&self) -> Duration;
    /// Whether callouts can go to an upstream of that name.
    fn has_upstream(&self, name: &str) -> bool;
    /// From which level on lines are wanted; guests that ask avoid making the others.
    fn log_level(&self) -> LogLevel;
    /// A guest did what Envoy answers with a status that panics most SDKs, or what cannot have the effect it seems to.
    fn lint(&mut self, lint: &Lint<'_>) {
        let _ = lint;
    }
    /// Whether [`Embedder::trace`] is to be told of every call between host and guests. Asked when a VM starts; where the
    /// answer is no, calls cost what they cost without it.
    fn traces(&self) -> bool {
        false
    }
    /// A guest was called, or called the host. Values are not masked.
    fn trace(&mut self, event: TraceEvent) {
        let _ = event;
    }
}

/// A line about a guest.
#[derive(Clone, Debug)]
pub struct LogRecord<'a> {
    /// Name of the plugin.
    pub plugin: &'a str,
    /// The stream it is about, if it is about one.
    pub stream: Option<StreamId>,
    /// Severity.
    pub level: LogLevel,
    /// Text; control characters are escaped by whoever writes it out.
    pub message: &'a str,
}

/// A call that will disappoint its author in Envoy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lint<'a> {
    /// Name of the plugin.
    pub plugin: &'a str,
    /// The callback it happened in, e.g. `proxy_on_request_body`.
    pub callback: &'static str,
    /// The host function, e.g. `proxy_get_header_map_value`.
    pub call: &'static str,
    /// What is wrong and what to do instead.
    pub reason: String,
}
