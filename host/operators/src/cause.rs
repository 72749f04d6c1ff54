//! Why a request to an operator did not get the operator's own answer.
//!
//! One table: status for the client, stable reason for client, log and metric, and what to do. A new cause does not
//! compile until it has a row.

use std::time::Duration;

use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::config::Limits;

/// A named reason. The first group is the client's doing, the second the operator's, the third the machine's or ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The request body is longer than the operator accepts.
    RequestBytes,
    /// The client did not send its body in time.
    RequestTime,
    /// The request asks for something that does not exist between proxy and operator.
    RequestRefused,
    /// The client went away.
    ClientGone,

    /// As many requests as allowed are being answered.
    Concurrency,
    /// The answer took longer than allowed.
    WallTime,
    /// The answer took more CPU time than allowed.
    CpuTime,
    /// The event loop stood still; the process was killed.
    Stalled,
    /// The process used more memory than allowed.
    Memory,
    /// The process worked on without a request for longer than allowed.
    BackgroundCpu,
    /// The response is longer than allowed.
    ResponseBytes,
    /// The response is not one that may be passed on.
    ResponseRefused,
    /// The handler threw.
    Exception,
    /// The process ended by itself while answering.
    Crashed,
    /// The operator's code could not be loaded.
    LoadFailed,
    /// The process ends again and again; it is started again after a pause.
    CrashLoop,

    /// Another request made the process end.
    Bystander,
    /// No process was ready in time.
    StartTime,
    /// The process could not be started or confined.
    StartFailed,
    /// The operator is being stopped.
    Stopping,
    /// There is no operator of this name.
    Unknown,
    /// It runs on hosts of another pool.
    Elsewhere,
}

impl Cause {
    /// All of them, for metrics and documentation.
    pub const ALL: [Self; 22] = [
        Self::RequestBytes,
        Self::RequestTime,
        Self::RequestRefused,
        Self::ClientGone,
        Self::Concurrency,
        Self::WallTime,
        Self::CpuTime,
        Self::Stalled,
        Self::Memory,
        Self::BackgroundCpu,
        Self::ResponseBytes,
        Self::ResponseRefused,
        Self::Exception,
        Self::Crashed,
        Self::LoadFailed,
        Self::CrashLoop,
        Self::Bystander,
        Self::StartTime,
        Self::StartFailed,
        Self::Stopping,
        Self::Unknown,
        Self::Elsewhere,
    ];

    /// Status, stable id, and a sentence for the client. The sentence says what, never why in the operator's own terms.
    #[must_use]
    pub fn row(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::RequestBytes => {
                (StatusCode::PAYLOAD_TOO_LARGE, "operator_request_bytes", "the request body is too long")
            }
            Self::RequestTime => {
                (StatusCode::REQUEST_TIMEOUT, "operator_request_time", "the request body did not arrive in time")
            }
            Self::RequestRefused => {
                (StatusCode::BAD_REQUEST, "operator_request_refused", "the request cannot be answered here")
            }
            Self::ClientGone => (StatusCode::BAD_REQUEST, "operator_client_gone", "the request ended early"),
            Self::Concurrency => {
                (StatusCode::TOO_MANY_REQUESTS, "operator_concurrency", "too many requests at the same time")
            }
            Self::WallTime => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_wall_time", "the answer took longer than allowed")
            }
            Self::CpuTime => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_cpu_time", "the answer took more computing than allowed")
            }
            Self::Stalled => (StatusCode::SERVICE_UNAVAILABLE, "operator_stalled", "the handler stopped answering"),
            Self::Memory => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_memory", "the handler used more memory than allowed")
            }
            Self::BackgroundCpu => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_background_cpu", "the handler was stopped between requests")
            }
            Self::ResponseBytes => {
                (StatusCode::INTERNAL_SERVER_ERROR, "operator_response_bytes", "the response is longer than allowed")
            }
            Self::ResponseRefused => {
                (StatusCode::INTERNAL_SERVER_ERROR, "operator_response_refused", "the response is not a valid answer")
            }
            Self::Exception => (StatusCode::INTERNAL_SERVER_ERROR, "operator_exception", "the handler failed"),
            Self::Crashed => (StatusCode::SERVICE_UNAVAILABLE, "operator_crashed", "the handler ended unexpectedly"),
            Self::LoadFailed => {
                (StatusCode::INTERNAL_SERVER_ERROR, "operator_load_failed", "the handler cannot be loaded")
            }
            Self::CrashLoop => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_crash_loop", "the handler keeps failing and is paused")
            }
            Self::Bystander => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_bystander", "the handler was restarted meanwhile")
            }
            Self::StartTime => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_start_time", "the handler did not start in time")
            }
            Self::StartFailed => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_start_failed", "the handler cannot be started")
            }
            Self::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "operator_stopping", "the handler is being stopped"),
            Self::Unknown => (StatusCode::NOT_FOUND, "operator_unknown", "there is no such handler"),
            Self::Elsewhere => {
                (StatusCode::SERVICE_UNAVAILABLE, "operator_elsewhere", "the handler does not run on this host")
            }
        }
    }

    /// Status for the client.
    #[must_use]
    pub fn status(self) -> StatusCode {
        self.row().0
    }

    /// Stable id for client, log and metric.
    #[must_use]
    pub fn id(self) -> &'static str {
        self.row().1
    }

    /// A sentence for the client.
    #[must_use]
    pub fn title(self) -> &'static str {
        self.row().2
    }

    /// Whether a later attempt may succeed, and after how many seconds to say so.
    #[must_use]
    pub fn retry_after_seconds(self) -> Option<u32> {
        match self {
            Self::Concurrency | Self::Bystander | Self::StartTime | Self::Stopping => Some(1),
            Self::CrashLoop => Some(10),
            _ => None,
        }
    }

    /// The limit that was reached, by the name that it has in the policy, and its value. For log and author; never for clients.
    pub(crate) fn limit(self, limits: &Limits) -> Option<String> {
        let time = |name: &str, value: Duration| Some(format!("`limits.{name}` is {value:?}"));
        let size = |name: &str, value: u64| Some(format!("`limits.{name}` is {}", written_size(value)));
        match self {
            Self::RequestBytes => size("request_bytes", limits.request_bytes),
            Self::RequestTime | Self::WallTime => time("wall_time", limits.wall),
            Self::CpuTime => time("cpu_time", limits.cpu),
            Self::BackgroundCpu => time("background_cpu_time", limits.background_cpu),
            Self::StartTime => time("start_time", limits.start),
            Self::Memory => Some(format!(
                "`limits.heap` is {}, `limits.memory` {}",
                written_size(limits.heap_bytes),
                written_size(limits.memory_bytes)
            )),
            Self::ResponseBytes => size("response_bytes", limits.response_bytes),
            Self::Concurrency => Some(format!("`limits.concurrency` is {} for each process", limits.concurrency)),
            _ => None,
        }
    }

    /// As the log has it.
    pub(crate) fn explained(self, limits: &Limits) -> String {
        self.limit(limits).map_or_else(|| self.id().to_owned(), |limit| format!("{}: {limit}", self.id()))
    }

    /// Whether the operator's author is to read of it. What clients do would drown what operators print, and what a handler
    /// throws has its stack there already.
    pub(crate) fn concerns_author(self) -> bool {
        matches!(
            self,
            Self::WallTime | Self::CpuTime | Self::Stalled | Self::Memory | Self::ResponseBytes | Self::ResponseRefused
        )
    }

    /// Whether a process that ends for this cause counts towards the crash loop.
    pub(crate) fn is_failure_of_process(self) -> bool {
        matches!(
            self,
            Self::Stalled | Self::Memory | Self::BackgroundCpu | Self::Crashed | Self::LoadFailed | Self::StartFailed
        )
    }

    /// What an engine says by [`crate::engine::OUTCOME`].
    pub(crate) fn from_outcome(outcome: &[u8]) -> Option<Self> {
        match outcome {
            b"exception" => Some(Self::Exception),
            b"cpu_time" => Some(Self::CpuTime),
            b"memory" => Some(Self::Memory),
            b"response_bytes" => Some(Self::ResponseBytes),
            b"bystander" => Some(Self::Bystander),
            _ => None,
        }
    }

    pub(crate) fn index(self) -> usize {
        Self::ALL.iter().position(|cause| *cause == self).unwrap_or(0)
    }

    pub(crate) fn from_index(index: usize) -> Option<Self> {
        Self::ALL.get(index).copied()
    }
}

/// A number of bytes as a policy has it.
fn written_size(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = units.iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{bytes}B"), |(unit, name)| format!("{}{name}", bytes / unit))
}

impl std::fmt::Display for Cause {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_snake_case() {
        let ids: std::collections::BTreeSet<_> = Cause::ALL.iter().map(|cause| cause.id()).collect();
        assert_eq!(ids.len(), Cause::ALL.len());
        assert!(ids.iter().all(|id| id.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')));
    }

    #[test]
    fn every_cause_is_an_error_to_the_client() {
        assert!(Cause::ALL.iter().all(|cause| cause.status().is_client_error() || cause.status().is_server_error()));
    }

    #[test]
    fn a_limit_is_told_by_its_name_and_value() {
        let limits = Limits { cpu: Duration::from_millis(200), response_bytes: 1 << 10, ..Limits::default() };
        let told = |cause: Cause| cause.explained(&limits);
        assert_eq!(told(Cause::CpuTime), "operator_cpu_time: `limits.cpu_time` is 200ms");
        assert_eq!(told(Cause::WallTime), "operator_wall_time: `limits.wall_time` is 15s");
        assert_eq!(told(Cause::ResponseBytes), "operator_response_bytes: `limits.response_bytes` is 1KiB");
        assert_eq!(told(Cause::Memory), "operator_memory: `limits.heap` is 64MiB, `limits.memory` 192MiB");
        assert_eq!(told(Cause::Crashed), "operator_crashed");
        assert_eq!([0, 1023, 1 << 20, 3 << 30].map(written_size), ["0B", "1023B", "1MiB", "3GiB"]);
    }

    #[test]
    fn an_index_names_its_cause() {
        for cause in Cause::ALL {
            assert_eq!(Cause::from_index(cause.index()), Some(cause));
        }
    }
}
