//! Proxy-Wasm ABI 0.2.1 for wasmtime, without I/O.
//!
//! A [`Worker`] holds the guests of one thread and the streams that pass through them. It is told what happened
//! ([`Worker::request_headers`], [`Worker::call_answered`], ...) and says what to do ([`Worker::poll_action`]). It knows no
//! socket, no async runtime and no clock but the [`Embedder`]'s. The reverse proxy and the test harness are two embedders:
//! what a filter does in one it does in the other.
//!
//! ```text
//! Engine -> Module -> Plugin --\
//!                     Shared ---> Worker -> Vm (one per vm_id, VM configuration and module)
//!                                   |         `- contexts: root per plugin, one per stream
//!                                   `- streams: filters in order, what each holds back
//! ```
//!
//! Guests are hostile: see [`Limits`] for what bounds them, and [`Trapped`] for how they end. The
//! behaviour is Envoy 1.40's, also where the specification says otherwise.

mod abi;
mod bounds;
mod code;
mod embedder;
mod engine;
mod exchange;
mod expression;
mod fields;
mod grpc;
mod hostcalls;
mod ids;
#[doc(hidden)]
pub mod internals;
mod pairs;
mod plugin;
mod property;
mod protobuf;
mod relay;
mod shared;
mod signature;
mod state;
mod stream;
mod trace;
mod vm;
mod worker;

pub use abi::{Direction, LogLevel};
pub use bounds::ModuleLimits;
pub use code::{CodeKey, SealedError};
pub use embedder::{Embedder, Lint, LogRecord};
pub use engine::{AbiVersion, Callbacks, EPOCH, Engine, EngineError, EngineOptions, Module, ModuleError, Ticker};
pub use exchange::{Certificate, Ending, LocalResponse, Protocol, RouteInfo, StreamInfo, TlsInfo, UpstreamInfo};
pub use fields::{FieldMap, Message};
pub use grpc::{GrpcFrameError, GrpcMessages, frame as grpc_frame};
pub use plugin::{Capabilities, FailurePolicy, Limits, NamePattern, Plugin};
pub use shared::{Metric, MetricKind, MetricValue, Shared, SharedLimits, Waker};
pub use state::ConnectionState;
pub use stream::Hold;
pub use trace::{TraceEvent, TraceValue};
pub use vm::{GuestFault, Trapped, VmStartError};
pub use worker::{
    Action, Call, CallAnswer, CallId, ClosedBy, GrpcEvent, GrpcOpen, Part, PluginHealth, PluginState, StartError,
    StreamId, Worker,
};
