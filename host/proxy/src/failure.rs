//! What a client is told when the host, and not a filter or the upstream, ends its request: Envoy's statuses, words,
//! response code details and flags, so that dashboards and alarms made for one proxy fit the other.

use bytes::Bytes;
use portcullis_abi::{FieldMap, LocalResponse};

/// Envoy's response flags, as bits.
pub(crate) mod flag {
    pub(crate) const UPSTREAM_REQUEST_TIMEOUT: u64 = 1 << 2;
    pub(crate) const LOCAL_RESET: u64 = 1 << 3;
    pub(crate) const UPSTREAM_REMOTE_RESET: u64 = 1 << 4;
    pub(crate) const UPSTREAM_CONNECTION_FAILURE: u64 = 1 << 5;
    pub(crate) const UPSTREAM_CONNECTION_TERMINATION: u64 = 1 << 6;
    pub(crate) const UPSTREAM_OVERFLOW: u64 = 1 << 7;
    pub(crate) const NO_ROUTE: u64 = 1 << 8;
    pub(crate) const DOWNSTREAM_CONNECTION_TERMINATION: u64 = 1 << 14;
    pub(crate) const STREAM_IDLE_TIMEOUT: u64 = 1 << 16;
    pub(crate) const DOWNSTREAM_PROTOCOL_ERROR: u64 = 1 << 18;
    pub(crate) const UPSTREAM_PROTOCOL_ERROR: u64 = 1 << 23;
    pub(crate) const DNS_FAILURE: u64 = 1 << 26;
}

/// Why there is no response from an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum UpstreamFailure {
    /// It refuses connections, or its TLS does not fit.
    Connect,
    /// It does not answer a connection attempt in time.
    ConnectTimeout,
    /// Its name cannot be resolved.
    Resolve,
    /// As many connections as allowed are in use.
    Overflow,
    /// It closed the connection before its response.
    Terminated,
    /// It reset the stream (HTTP/2).
    Reset,
    /// What it sends is no HTTP that we accept.
    Protocol,
    /// Its response took too long.
    ResponseTimeout,
    /// A request that filters wrote cannot be sent.
    Unsendable,
    /// The client's request broke off or was malformed while it was being forwarded.
    RequestBroken,
}

impl UpstreamFailure {
    pub(crate) const ALL: [UpstreamFailure; 10] = [
        UpstreamFailure::Connect,
        UpstreamFailure::ConnectTimeout,
        UpstreamFailure::Resolve,
        UpstreamFailure::Overflow,
        UpstreamFailure::Terminated,
        UpstreamFailure::Reset,
        UpstreamFailure::Protocol,
        UpstreamFailure::ResponseTimeout,
        UpstreamFailure::Unsendable,
        UpstreamFailure::RequestBroken,
    ];

    /// The label in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            UpstreamFailure::Connect => "connect",
            UpstreamFailure::ConnectTimeout => "connect_timeout",
            UpstreamFailure::Resolve => "resolve",
            UpstreamFailure::Overflow => "overflow",
            UpstreamFailure::Terminated => "terminated",
            UpstreamFailure::Reset => "reset",
            UpstreamFailure::Protocol => "protocol",
            UpstreamFailure::ResponseTimeout => "response_timeout",
            UpstreamFailure::Unsendable => "unsendable",
            UpstreamFailure::RequestBroken => "request_broken",
        }
    }

    /// Envoy's flag.
    pub(crate) fn flags(self) -> u64 {
        match self {
            UpstreamFailure::Connect | UpstreamFailure::ConnectTimeout => flag::UPSTREAM_CONNECTION_FAILURE,
            UpstreamFailure::Resolve => flag::DNS_FAILURE,
            UpstreamFailure::Overflow => flag::UPSTREAM_OVERFLOW,
            UpstreamFailure::Terminated => flag::UPSTREAM_CONNECTION_TERMINATION,
            UpstreamFailure::Reset => flag::UPSTREAM_REMOTE_RESET,
            UpstreamFailure::Protocol => flag::UPSTREAM_PROTOCOL_ERROR,
            UpstreamFailure::ResponseTimeout => flag::UPSTREAM_REQUEST_TIMEOUT,
            UpstreamFailure::Unsendable => flag::LOCAL_RESET,
            UpstreamFailure::RequestBroken => flag::DOWNSTREAM_PROTOCOL_ERROR,
        }
    }

    /// Envoy's words for it, as they stand in the answer's body.
    pub(crate) fn reset_reason(self) -> &'static str {
        match self {
            UpstreamFailure::Connect => "reset reason: remote connection failure",
            UpstreamFailure::ConnectTimeout => "reset reason: connection timeout",
            UpstreamFailure::Resolve => "reset reason: no healthy upstream",
            UpstreamFailure::Overflow => "reset reason: overflow",
            UpstreamFailure::Terminated => "reset reason: connection termination",
            UpstreamFailure::Reset => "reset reason: remote reset",
            UpstreamFailure::Protocol => "reset reason: protocol error",
            UpstreamFailure::ResponseTimeout => "reset reason: response timeout",
            UpstreamFailure::Unsendable | UpstreamFailure::RequestBroken => "reset reason: local reset",
        }
    }

    /// The answer to the client, as long as the response has not begun.
    pub(crate) fn response(self) -> LocalResponse {
        let (status, details) = match self {
            UpstreamFailure::Connect => (503, "upstream_reset_before_response_started{remote_connection_failure}"),
            UpstreamFailure::ConnectTimeout => (503, "upstream_reset_before_response_started{connection_timeout}"),
            UpstreamFailure::Resolve => return answer(503, "no_healthy_upstream", "no healthy upstream"),
            UpstreamFailure::Overflow => (503, "upstream_reset_before_response_started{overflow}"),
            UpstreamFailure::Terminated => (503, "upstream_reset_before_response_started{connection_termination}"),
            UpstreamFailure::Reset => (503, "upstream_reset_before_response_started{remote_reset}"),
            UpstreamFailure::Protocol => (502, "upstream_reset_before_response_started{protocol_error}"),
            UpstreamFailure::ResponseTimeout => return answer(504, "response_timeout", "upstream request timeout"),
            UpstreamFailure::Unsendable => return answer(500, "filter_wrote_invalid_request", ""),
            UpstreamFailure::RequestBroken => return answer(400, "http1.codec_error", "Bad Request"),
        };
        let reason = self.reset_reason();
        answer(status, details, format!("upstream connect error or disconnect/reset before headers. {reason}"))
    }
}

/// No route matches.
pub(crate) fn route_not_found() -> LocalResponse {
    answer(404, "route_not_found", "")
}

/// The client did not send its whole request in time.
pub(crate) fn request_timeout() -> LocalResponse {
    answer(408, "request_overall_timeout", "request timeout")
}

/// Nothing moved for too long.
pub(crate) fn stream_timeout() -> LocalResponse {
    answer(504, "stream_idle_timeout", "stream timeout")
}

/// An answer in plain text.
pub(crate) fn answer(status: u16, details: &str, body: impl Into<Bytes>) -> LocalResponse {
    let body = body.into();
    let mut fields = FieldMap::new();
    if !body.is_empty() {
        fields.push(b"content-type", b"text/plain");
    }
    LocalResponse { status, details: details.to_owned(), body, fields, ..LocalResponse::default() }
}
