//! [`TraceEvent`]: what passes between host and guest, in the ABI's own words, for an embedder that asks.
//!
//! For tests, and for authors who look for a mistake. Values are shown as they are: what must not be seen, such as a
//! credential, is the embedder's to mask. Nothing here runs, and nothing is read, unless [`Embedder::traces`] says so
//! when a VM starts.
//!
//! [`Embedder::traces`]: crate::Embedder::traces

use crate::abi::{BufferType, LogLevel, MapType, Status};
use crate::pairs;
use crate::shared::MetricKind;
use crate::vm::{GuestFault, Trapped, VmState};
use crate::worker::StreamId;

/// Bytes of one value that a trace keeps; the rest is counted.
const VALUE_BYTES_MAX: usize = 4 * 1024;

/// One thing that passed between host and guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TraceEvent {
    /// The host calls the guest.
    Callback {
        /// Name of the plugin.
        plugin: String,
        /// The stream it is about, if it is about one.
        stream: Option<StreamId>,
        /// The function that the guest exports, e.g. `proxy_on_request_headers`.
        callback: &'static str,
        /// What it is given, by name.
        arguments: Vec<(&'static str, TraceValue)>,
    },
    /// The guest calls the host, within a callback.
    Hostcall {
        /// The host function, e.g. `proxy_get_header_map_value`.
        call: &'static str,
        /// What the guest gives, by name.
        arguments: Vec<(&'static str, TraceValue)>,
        /// The status, or the fault by which the guest ends.
        status: Result<&'static str, String>,
        /// What the guest gets, by name; nothing unless the status is `Ok`.
        results: Vec<(&'static str, TraceValue)>,
    },
    /// The guest returns from a callback.
    Returned {
        /// The callback.
        callback: &'static str,
        /// What it answers: an action, yes or no; nothing where the ABI asks for nothing.
        answer: Option<TraceValue>,
    },
    /// The guest ended in a callback.
    Trapped {
        /// The callback.
        callback: &'static str,
        /// Why.
        cause: Trapped,
    },
}

/// An argument or a result.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TraceValue {
    /// A number.
    Number(i128),
    /// A value that the ABI has a word for, such as a map or an action.
    Word(&'static str),
    /// Bytes, of which the first 4 KiB are kept.
    Bytes {
        /// What was kept.
        bytes: Vec<u8>,
        /// How many there were.
        len: usize,
    },
    /// Field lines.
    Fields(Vec<(Vec<u8>, Vec<u8>)>),
}

impl TraceValue {
    fn bytes(bytes: &[u8]) -> TraceValue {
        TraceValue::Bytes { bytes: bytes[..bytes.len().min(VALUE_BYTES_MAX)].to_vec(), len: bytes.len() }
    }
}

/// How one parameter of a host function is to be read, or two: a pointer and a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Number,
    Signed,
    Level,
    Map,
    Buffer,
    Stream,
    Metric,
    /// Pointer and length.
    Bytes,
    /// Pointer and length of a serialised map.
    Fields,
    /// Where the host is to write pointer and length.
    GivesBytes,
    /// The same, for a serialised map.
    GivesFields,
    /// Where the host is to write a number of 32 bits.
    Gives,
    /// Where the host is to write a number of 64 bits.
    GivesLong,
}

type Parameters = &'static [(&'static str, Kind)];

/// The parameters of every host function.
fn parameters(call: &str) -> Option<Parameters> {
    use Kind::{
        Buffer, Bytes, Fields, Gives, GivesBytes, GivesFields, GivesLong, Level, Map, Metric, Number, Signed, Stream,
    };
    Some(match call {
        "proxy_log" => &[("level", Level), ("message", Bytes)],
        "proxy_get_log_level" => &[("level", Gives)],
        "proxy_get_current_time_nanoseconds" => &[("time", GivesLong)],
        "proxy_set_tick_period_milliseconds" => &[("period", Number)],
        "proxy_set_effective_context" => &[("context", Number)],
        "proxy_get_property" => &[("path", Bytes), ("value", GivesBytes)],
        "proxy_set_property" => &[("path", Bytes), ("value", Bytes)],
        "proxy_call_foreign_function" => &[("function", Bytes), ("argument", Bytes), ("result", GivesBytes)],
        "proxy_get_buffer_bytes" => &[("buffer", Buffer), ("start", Number), ("most", Number), ("bytes", GivesBytes)],
        "proxy_set_buffer_bytes" => &[("buffer", Buffer), ("start", Number), ("size", Number), ("bytes", Bytes)],
        "proxy_get_buffer_status" => &[("buffer", Buffer), ("len", Gives), ("flags", Gives)],
        "proxy_get_header_map_size" => &[("map", Map), ("size", Gives)],
        "proxy_get_header_map_pairs" => &[("map", Map), ("fields", GivesFields)],
        "proxy_set_header_map_pairs" => &[("map", Map), ("fields", Fields)],
        "proxy_get_header_map_value" => &[("map", Map), ("name", Bytes), ("value", GivesBytes)],
        "proxy_add_header_map_value" | "proxy_replace_header_map_value" => {
            &[("map", Map), ("name", Bytes), ("value", Bytes)]
        }
        "proxy_remove_header_map_value" => &[("map", Map), ("name", Bytes)],
        "proxy_continue_stream" | "proxy_close_stream" => &[("stream", Stream)],
        "proxy_send_local_response" => {
            &[("status", Number), ("details", Bytes), ("body", Bytes), ("fields", Fields), ("grpc_status", Signed)]
        }
        "proxy_http_call" => &[
            ("upstream", Bytes),
            ("fields", Fields),
            ("body", Bytes),
            ("trailers", Fields),
            ("timeout", Number),
            ("call", Gives),
        ],
        "proxy_grpc_call" => &[
            ("upstream", Bytes),
            ("service", Bytes),
            ("method", Bytes),
            ("metadata", Fields),
            ("message", Bytes),
            ("timeout", Number),
            ("call", Gives),
        ],
        "proxy_grpc_stream" => {
            &[("upstream", Bytes), ("service", Bytes), ("method", Bytes), ("metadata", Fields), ("call", Gives)]
        }
        "proxy_grpc_send" => &[("call", Number), ("message", Bytes), ("end_of_stream", Number)],
        "proxy_grpc_cancel" | "proxy_grpc_close" => &[("call", Number)],
        "proxy_get_status" => &[("code", Gives), ("message", GivesBytes)],
        "proxy_get_shared_data" => &[("key", Bytes), ("value", GivesBytes), ("cas", Gives)],
        "proxy_set_shared_data" => &[("key", Bytes), ("value", Bytes), ("cas", Number)],
        "proxy_register_shared_queue" => &[("name", Bytes), ("queue", Gives)],
        "proxy_resolve_shared_queue" => &[("vm_id", Bytes), ("name", Bytes), ("queue", Gives)],
        "proxy_enqueue_shared_queue" => &[("queue", Number), ("item", Bytes)],
        "proxy_dequeue_shared_queue" => &[("queue", Number), ("item", GivesBytes)],
        "proxy_define_metric" => &[("kind", Metric), ("name", Bytes), ("metric", Gives)],
        "proxy_increment_metric" => &[("metric", Number), ("offset", Signed)],
        "proxy_record_metric" => &[("metric", Number), ("value", Number)],
        "proxy_get_metric" => &[("metric", Number), ("value", GivesLong)],
        "proxy_get_configuration" => &[("configuration", GivesBytes)],
        "proxy_done" | "proxy_continue_request" | "proxy_continue_response" | "proxy_clear_route_cache" => &[],
        _ => return None,
    })
}

/// A word of a call's, whatever its type: how host functions hand their arguments over to be shown.
pub(crate) trait Word {
    fn word(self) -> u64;
}

impl Word for u32 {
    fn word(self) -> u64 {
        u64::from(self)
    }
}

impl Word for i32 {
    fn word(self) -> u64 {
        // Sign-extended, which is how `Signed` is read back.
        i64::from(self) as u64
    }
}

impl Word for u64 {
    fn word(self) -> u64 {
        self
    }
}

impl Word for i64 {
    fn word(self) -> u64 {
        self as u64
    }
}

/// Arguments and answers of callbacks.
pub(crate) trait Words {
    fn words(&self) -> Vec<u32>;
}

impl Words for () {
    fn words(&self) -> Vec<u32> {
        Vec::new()
    }
}

impl Words for u32 {
    fn words(&self) -> Vec<u32> {
        vec![*self]
    }
}

macro_rules! words {
    ($($name:ident)+) => {
        impl Words for ($(words!(@u32 $name),)+) {
            #[allow(non_snake_case, reason = "a pattern for each place of the tuple")]
            fn words(&self) -> Vec<u32> {
                let ($($name,)+) = *self;
                vec![$($name),+]
            }
        }
    };
    (@u32 $name:ident) => { u32 };
}

words!(a b);
words!(a b c);
words!(a b c d);
words!(a b c d e);

/// A host function's arguments, read before it runs; it may overwrite what they point at.
pub(crate) struct Watched {
    arguments: Vec<(&'static str, TraceValue)>,
    words: Vec<u64>,
}

/// Reads what a guest hands over. What lies outside its memory is shown as no bytes; the call itself says what is wrong.
pub(crate) fn arguments(call: &str, memory: &[u8], words: Vec<u64>) -> Watched {
    let mut shown = Vec::new();
    let mut rest = words.iter().copied();
    for (name, kind) in parameters(call).unwrap_or_default() {
        let Some(word) = rest.next() else { break };
        let value = match kind {
            Kind::Number => TraceValue::Number(i128::from(word)),
            Kind::Signed => TraceValue::Number(i128::from(word as i64)),
            Kind::Level => word_of(LogLevel::from_u32(word as u32).map(LogLevel::as_str), word),
            Kind::Map => word_of(MapType::from_u32(word as u32).map(map_word), word),
            Kind::Buffer => word_of(BufferType::from_u32(word as u32).map(buffer_word), word),
            Kind::Stream => word_of(stream_word(word), word),
            Kind::Metric => word_of(metric_word(word), word),
            Kind::Bytes => TraceValue::bytes(range(memory, word, rest.next().unwrap_or_default())),
            Kind::Fields => fields(range(memory, word, rest.next().unwrap_or_default())),
            Kind::GivesBytes | Kind::GivesFields => {
                rest.next();
                continue;
            }
            Kind::Gives | Kind::GivesLong => continue,
        };
        shown.push((*name, value));
    }
    Watched { arguments: shown, words }
}

/// The event of a host function that has run.
pub(crate) fn hostcall(
    call: &'static str,
    memory: &[u8],
    watched: Watched,
    outcome: &Result<Status, GuestFault>,
) -> TraceEvent {
    let Watched { arguments, words } = watched;
    let results = match outcome {
        Ok(Status::Ok) => results(call, memory, &words),
        _ => Vec::new(),
    };
    let status = outcome.as_ref().map(|status| status.as_str()).map_err(ToString::to_string);
    TraceEvent::Hostcall { call, arguments, status, results }
}

fn results(call: &str, memory: &[u8], words: &[u64]) -> Vec<(&'static str, TraceValue)> {
    let mut shown = Vec::new();
    let mut rest = words.iter().copied();
    for (name, kind) in parameters(call).unwrap_or_default() {
        let Some(word) = rest.next() else { break };
        let value = match kind {
            Kind::Bytes | Kind::Fields => {
                rest.next();
                continue;
            }
            Kind::GivesBytes | Kind::GivesFields => {
                let len_at = rest.next().unwrap_or_default();
                // Null pointers say that the result is not wanted.
                if word == 0 || len_at == 0 {
                    continue;
                }
                let bytes = range(memory, number(memory, word, 4), number(memory, len_at, 4));
                if *kind == Kind::GivesFields { fields(bytes) } else { TraceValue::bytes(bytes) }
            }
            Kind::Gives => TraceValue::Number(i128::from(number(memory, word, 4))),
            Kind::GivesLong => TraceValue::Number(i128::from(number(memory, word, 8))),
            _ => continue,
        };
        shown.push((*name, value));
    }
    shown
}

fn range(memory: &[u8], pointer: u64, len: u64) -> &[u8] {
    let (start, len) = (pointer as u32 as usize, len as u32 as usize);
    memory.get(start..start + len).unwrap_or_default()
}

/// A little-endian number in the guest's memory.
fn number(memory: &[u8], pointer: u64, len: u64) -> u64 {
    range(memory, pointer, len).iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn fields(bytes: &[u8]) -> TraceValue {
    match pairs::decode(bytes, pairs::Bounds::ENVOY) {
        Ok(fields) => {
            TraceValue::Fields(fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect::<Vec<_>>())
        }
        Err(_) => TraceValue::bytes(bytes),
    }
}

fn word_of(word: Option<&'static str>, number: u64) -> TraceValue {
    word.map_or(TraceValue::Number(i128::from(number)), TraceValue::Word)
}

fn map_word(map: MapType) -> &'static str {
    match map {
        MapType::RequestHeaders => "request headers",
        MapType::RequestTrailers => "request trailers",
        MapType::ResponseHeaders => "response headers",
        MapType::ResponseTrailers => "response trailers",
        MapType::GrpcInitialMetadata => "initial metadata",
        MapType::GrpcTrailingMetadata => "trailing metadata",
        MapType::CallResponseHeaders => "callout's headers",
        MapType::CallResponseTrailers => "callout's trailers",
    }
}

fn buffer_word(buffer: BufferType) -> &'static str {
    match buffer {
        BufferType::RequestBody => "request body",
        BufferType::ResponseBody => "response body",
        BufferType::DownstreamData => "downstream data",
        BufferType::UpstreamData => "upstream data",
        BufferType::CallResponseBody => "callout's body",
        BufferType::GrpcReceive => "gRPC message",
        BufferType::VmConfiguration => "VM configuration",
        BufferType::PluginConfiguration => "plugin configuration",
        BufferType::CallData => "call data",
    }
}

fn stream_word(stream: u64) -> Option<&'static str> {
    ["request", "response", "downstream", "upstream"].get(stream as usize).copied()
}

fn metric_word(kind: u64) -> Option<&'static str> {
    let kinds = [MetricKind::Counter, MetricKind::Gauge, MetricKind::Histogram];
    kinds.into_iter().find(|known| *known as u64 == kind).map(|kind| match kind {
        MetricKind::Counter => "counter",
        MetricKind::Gauge => "gauge",
        MetricKind::Histogram => "histogram",
    })
}

/// Names of what a callback is given, the context first.
fn callback_parameters(callback: &str) -> &'static [&'static str] {
    match callback {
        "proxy_on_context_create" => &["context", "root"],
        "proxy_on_vm_start" | "proxy_on_configure" => &["root", "bytes"],
        "proxy_on_tick" => &["root"],
        "proxy_on_queue_ready" => &["root", "queue"],
        "proxy_on_request_headers" | "proxy_on_response_headers" => &["context", "fields", "end_of_stream"],
        "proxy_on_request_trailers" | "proxy_on_response_trailers" => &["context", "fields"],
        "proxy_on_request_body" | "proxy_on_response_body" | "proxy_on_downstream_data" | "proxy_on_upstream_data" => {
            &["context", "bytes", "end_of_stream"]
        }
        "proxy_on_downstream_connection_close" | "proxy_on_upstream_connection_close" => &["context", "peer"],
        "proxy_on_http_call_response" => &["root", "call", "fields", "bytes", "trailers"],
        "proxy_on_grpc_receive_initial_metadata" | "proxy_on_grpc_receive_trailing_metadata" => {
            &["root", "call", "fields"]
        }
        "proxy_on_grpc_receive" => &["root", "call", "bytes"],
        "proxy_on_grpc_close" => &["root", "call", "status"],
        "proxy_on_foreign_function" => &["root", "function", "bytes"],
        "main" => &["argc", "argv"],
        _ => &["context"],
    }
}

/// The event of a callback that is about to run.
pub(crate) fn callback(state: &VmState, callback: &'static str, words: &[u32]) -> TraceEvent {
    let names = callback_parameters(callback);
    let arguments = words.iter().enumerate().map(|(at, word)| {
        let name = names.get(at).copied().unwrap_or("argument");
        let value = match (name, word) {
            ("end_of_stream", 0) => TraceValue::Word("false"),
            ("end_of_stream", _) => TraceValue::Word("true"),
            (_, word) => TraceValue::Number(i128::from(*word)),
        };
        (name, value)
    });
    TraceEvent::Callback {
        plugin: state.current_plugin().name.clone(),
        stream: state.effective_stream().map(|context| context.stream),
        callback,
        arguments: arguments.collect(),
    }
}

/// The event of a callback that has run.
pub(crate) fn returned(callback: &'static str, outcome: Result<Vec<u32>, Trapped>) -> TraceEvent {
    let words = match outcome {
        Ok(words) => words,
        Err(cause) => return TraceEvent::Trapped { callback, cause },
    };
    let answer = words.first().map(|word| match callback {
        "proxy_on_vm_start" | "proxy_on_configure" | "proxy_on_done" => {
            TraceValue::Word(if *word == 0 { "no" } else { "yes" })
        }
        name if name.ends_with("_headers") || name.ends_with("_trailers") => word_of(
            ["Continue", "StopIteration", "ContinueAndEndStream", "StopAllIterationAndBuffer"]
                .get(*word as usize)
                .copied()
                .or(Some("StopAllIterationAndWatermark")),
            u64::from(*word),
        ),
        name if name.ends_with("_body") || name.ends_with("_data") => word_of(
            ["Continue", "StopIterationAndBuffer", "StopIterationAndWatermark"]
                .get(*word as usize)
                .copied()
                .or(Some("StopIterationNoBuffer")),
            u64::from(*word),
        ),
        _ => TraceValue::Number(i128::from(*word)),
    });
    TraceEvent::Returned { callback, answer }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function without a row is shown without its arguments, which helps nobody.
    #[test]
    fn every_host_function_of_the_abi_can_be_shown() {
        let engine = crate::Engine::new(&crate::EngineOptions::default()).unwrap();
        let missing: Vec<&str> = engine
            .host_function_names()
            .filter(|(module, name)| *module == "env" && name.starts_with("proxy_"))
            .map(|(_, name)| name)
            .filter(|name| parameters(name).is_none())
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn what_lies_outside_the_memory_is_shown_as_nothing() {
        let memory = [b'a', b'b', 4, 0, 0, 0, 1, 0, 0, 0];
        let watched = arguments("proxy_log", &memory, vec![2, 0, 2]);
        assert_eq!(watched.arguments, [("level", TraceValue::Word("info")), ("message", TraceValue::bytes(b"ab"))]);
        let watched = arguments("proxy_log", &memory, vec![9, u64::from(u32::MAX), u64::from(u32::MAX)]);
        assert_eq!(watched.arguments, [("level", TraceValue::Number(9)), ("message", TraceValue::bytes(b""))]);
        assert_eq!(
            results("proxy_dequeue_shared_queue", &memory, &[1, 2, 6]),
            [("item", TraceValue::bytes(&[0]))],
            "the pointer at 2 is 4, the length at 6 is 1"
        );
        assert_eq!(results("proxy_get_log_level", &memory, &[9]), [("level", TraceValue::Number(0))]);
    }

    #[test]
    fn long_values_are_cut_and_counted() {
        let TraceValue::Bytes { bytes, len } = TraceValue::bytes(&[7; 5000]) else { panic!("no bytes") };
        assert_eq!((bytes.len(), len), (VALUE_BYTES_MAX, 5000));
    }
}
