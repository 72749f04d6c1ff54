//! The numbers of the Proxy-Wasm ABI: statuses, maps, buffers, streams, actions.
//!
//! Values are those of the specification (abi-versions/v0.2.1); where Envoy 1.40 knows a value that the
//! specification does not, the comment says so.

use crate::fields::Message;

/// What a host function answers (`proxy_status_t`).
///
/// The Rust SDK has no variant for 5, 6, 9, 11 and 12: returning one of them to a Rust guest is undefined behaviour there.
/// `Unimplemented` is returned exactly where Envoy does, nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Status {
    /// Done.
    Ok = 0,
    /// The thing asked for is not there.
    NotFound = 1,
    /// An argument makes no sense here.
    BadArgument = 2,
    /// A value could not be encoded or decoded.
    SerializationFailure = 3,
    /// A message could not be parsed; also an unknown gRPC service.
    ParseFailure = 4,
    /// The queue is empty.
    Empty = 7,
    /// The value was changed by somebody else.
    CasMismatch = 8,
    /// The host failed, or a limit or a restriction of the host stood in the way.
    InternalFailure = 10,
    /// Envoy's answer to resuming the upstream side of a TCP connection.
    Unimplemented = 12,
}

impl Status {
    /// The specification's name.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "Ok",
            Status::NotFound => "NotFound",
            Status::BadArgument => "BadArgument",
            Status::SerializationFailure => "SerializationFailure",
            Status::ParseFailure => "ParseFailure",
            Status::Empty => "Empty",
            Status::CasMismatch => "CasMismatch",
            Status::InternalFailure => "InternalFailure",
            Status::Unimplemented => "Unimplemented",
        }
    }
}

/// Severity of a guest's log line (`proxy_log_level_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum LogLevel {
    /// Finest.
    Trace = 0,
    /// For developers.
    Debug = 1,
    /// Normal events.
    Info = 2,
    /// Something is odd.
    Warn = 3,
    /// Something failed.
    Error = 4,
    /// The guest can't go on.
    Critical = 5,
}

impl LogLevel {
    /// The level with this number, if there is one.
    pub fn from_u32(level: u32) -> Option<LogLevel> {
        Some(match level {
            0 => LogLevel::Trace,
            1 => LogLevel::Debug,
            2 => LogLevel::Info,
            3 => LogLevel::Warn,
            4 => LogLevel::Error,
            5 => LogLevel::Critical,
            _ => return None,
        })
    }

    /// Lower-case name, as log lines show it.
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Trace => "trace",
            LogLevel::Debug => "debug",
            LogLevel::Info => "info",
            LogLevel::Warn => "warn",
            LogLevel::Error => "error",
            LogLevel::Critical => "critical",
        }
    }
}

/// Which fields a map call means (`proxy_header_map_type_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum MapType {
    /// Fields of the request.
    RequestHeaders = 0,
    /// Trailers of the request.
    RequestTrailers = 1,
    /// Fields of the response.
    ResponseHeaders = 2,
    /// Trailers of the response.
    ResponseTrailers = 3,
    /// Initial metadata of a gRPC answer.
    GrpcInitialMetadata = 4,
    /// Trailing metadata of a gRPC answer.
    GrpcTrailingMetadata = 5,
    /// Fields of a callout's answer.
    CallResponseHeaders = 6,
    /// Trailers of a callout's answer.
    CallResponseTrailers = 7,
}

impl MapType {
    /// The kind of message whose field lines the map holds.
    pub(crate) fn message(self) -> Message {
        match self {
            MapType::RequestHeaders => Message::Request,
            MapType::ResponseHeaders | MapType::CallResponseHeaders | MapType::GrpcInitialMetadata => Message::Response,
            MapType::RequestTrailers => Message::RequestTrailers,
            MapType::ResponseTrailers | MapType::CallResponseTrailers | MapType::GrpcTrailingMetadata => {
                Message::ResponseTrailers
            }
        }
    }

    pub(crate) fn from_u32(map: u32) -> Option<MapType> {
        Some(match map {
            0 => MapType::RequestHeaders,
            1 => MapType::RequestTrailers,
            2 => MapType::ResponseHeaders,
            3 => MapType::ResponseTrailers,
            4 => MapType::GrpcInitialMetadata,
            5 => MapType::GrpcTrailingMetadata,
            6 => MapType::CallResponseHeaders,
            7 => MapType::CallResponseTrailers,
            _ => return None,
        })
    }
}

/// Which bytes a buffer call means (`proxy_buffer_type_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum BufferType {
    /// Body of the request.
    RequestBody = 0,
    /// Body of the response.
    ResponseBody = 1,
    /// Bytes from a TCP client.
    DownstreamData = 2,
    /// Bytes from a TCP upstream.
    UpstreamData = 3,
    /// Body of a callout's answer.
    CallResponseBody = 4,
    /// Message of a gRPC answer.
    GrpcReceive = 5,
    /// Configuration of the VM.
    VmConfiguration = 6,
    /// Configuration of the plugin.
    PluginConfiguration = 7,
    /// Argument of a foreign function's callback.
    CallData = 8,
}

impl BufferType {
    pub(crate) fn from_u32(buffer: u32) -> Option<BufferType> {
        Some(match buffer {
            0 => BufferType::RequestBody,
            1 => BufferType::ResponseBody,
            2 => BufferType::DownstreamData,
            3 => BufferType::UpstreamData,
            4 => BufferType::CallResponseBody,
            5 => BufferType::GrpcReceive,
            6 => BufferType::VmConfiguration,
            7 => BufferType::PluginConfiguration,
            8 => BufferType::CallData,
            _ => return None,
        })
    }
}

/// Which way bytes travel through a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the client to the upstream.
    Request,
    /// From the upstream to the client.
    Response,
}

impl Direction {
    /// `request` or `response`.
    pub fn as_str(self) -> &'static str {
        match self {
            Direction::Request => "request",
            Direction::Response => "response",
        }
    }
}

/// What a guest answers to a headers or trailers callback (`proxy_action_t` and Envoy's further values).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadersAction {
    Continue,
    /// Headers stay here; whether body callbacks go on is the plugin's setting.
    Stop,
    /// Nothing more is delivered until the guest resumes; the body is kept, up to the limit.
    StopAllAndBuffer,
    /// Nothing more is delivered until the guest resumes; a full buffer stops the sender.
    StopAllAndWatermark,
}

impl HeadersAction {
    pub(crate) fn from_guest(action: u32) -> HeadersAction {
        match action {
            // 2 is ContinueAndEndStream, but Envoy 1.40 lets the rest of the message follow.
            0 | 2 => HeadersAction::Continue,
            1 => HeadersAction::Stop,
            3 => HeadersAction::StopAllAndBuffer,
            // Out of range is taken as the strictest stop, as in proxy-wasm-cpp-host.
            _ => HeadersAction::StopAllAndWatermark,
        }
    }
}

/// What a guest answers to a body callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyAction {
    Continue,
    /// Keep what was shown; the next callback shows all of it again with what came since.
    StopAndBuffer,
    /// Keep what was shown, but show only what is new; a full buffer stops the sender.
    StopAndWatermark,
    /// The guest has taken the bytes: drop them.
    StopNoBuffer,
}

impl BodyAction {
    pub(crate) fn from_guest(action: u32) -> BodyAction {
        match action {
            0 => BodyAction::Continue,
            1 => BodyAction::StopAndBuffer,
            2 => BodyAction::StopAndWatermark,
            _ => BodyAction::StopNoBuffer,
        }
    }
}
