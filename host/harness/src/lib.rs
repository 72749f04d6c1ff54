//! A simulated host for Proxy-Wasm filters, and scenarios that run on it and on real hosts.
//!
//! [`Host`] is what Rust tests use: it loads a filter's `.wasm`, sends requests through it as a whole or phase by phase
//! ([`Stream`]), plays its upstreams and its clock, and shows what came of it ([`Observed`]) and how ([`Trace`]). No sockets,
//! no threads, no async; each test makes a host of its own, so tests run in parallel.
//!
//! ```no_run
//! use portcullis_harness::{Host, for_every_split};
//!
//! let host = Host::new();
//! let filter = host.load("target/filters/my-filter.wasm").configuration(r#"{ "deny": "evil" }"#).start()?;
//! for_every_split("an evil body", |pieces| {
//!     filter.request("POST", "/").body_pieces(pieces).send().assert_local_response(403);
//! });
//! host.assert_no_lints();
//! # Ok::<(), portcullis_harness::HarnessError>(())
//! ```
//!
//! A scenario is a file: a plugin configuration, requests, and what must come of each. [`Scenario`] reads it,
//! [`run_scenario`] runs it on a [`Host`], and [`Expectation::compare`] judges what came of it. The same files run against
//! `portcullis serve` and the real Envoy; those runners live elsewhere and share everything but the host.

mod assertions;
mod connection;
mod content;
mod document;
mod expectation;
mod filter;
mod grpc;
mod host;
mod keys;
mod message;
mod module;
mod plan;
mod planner;
mod report;
mod ring;
mod run;
mod scenario;
mod schema;
mod split;
mod stream;
mod template;
mod token;
mod trace;
mod update;
mod yaml;

pub use connection::{Connection, ObservedConnection};
pub use expectation::{
    CalloutsExpectation, Expectation, FieldExpectation, Mismatch, Origin, RequestExpectation, ResponseExpectation,
    UpstreamExpectation, describe,
};
pub use filter::{Filter, FilterBuilder, Guest, HarnessError, IntoConfiguration, Source};
pub use grpc::{GrpcAnswer, GrpcPiece, GrpcPlan, Replies};
pub use host::{Host, NOW_DEFAULT, PendingCall, Upstream};
pub use keys::{KeyError, SigningKey};
pub use message::{FieldLines, LogLine, Observed, ObservedRequest, ObservedResponse};
pub use plan::{Callout, CalloutAnswer, RequestPlan, ResponsePlan};
/// What tests meet of the host that filters run in.
pub use portcullis_abi::{
    AbiVersion, Capabilities, ClosedBy, Direction, FailurePolicy, Hold, Limits, LogLevel, MetricValue, Plugin,
    PluginHealth, PluginState, Protocol, StreamInfo, TlsInfo, TraceEvent, TraceValue,
};
pub use report::{Outcome, Report, Verdict};
pub use run::{
    Ran, RunOptions, Runner, Simulated, Told, files_of, find_module, find_scenarios, judge, run, run_scenario, simulate,
};
pub use scenario::{HostKind, Scenario, Step};
pub use schema::json_schema;
pub use split::{for_every_split, splits};
pub use stream::{EndOfStream, Flow, RequestBuilder, Stream};
pub use token::{Signature, TokenRecipe};
pub use trace::{Secrets, Trace};
pub use update::{UpdateError, updated};
pub use yaml::FileError;
