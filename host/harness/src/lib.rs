//! A simulated host for Proxy-Wasm filters, and scenarios that run on it and on real hosts.
//!
//! [`Host`] is what Rust tests use: it loads a filter's `.wasm`, sends requests through it as a whole or phase by phase
//! ([`Stream`]), plays its upstreams and its clock, and shows what came of it ([`Observed`]) and how ([`Trace`]). No sockets,
//! no threads, no async; each test makes a host of its own, so tests run in parallel.
//!
//! ```
//! use portcullis_harness::{Guest, Host, for_every_split};
//!
//! # let wasm = wat::parse_str(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest.wat")))?;
//! // Of a filter that was built: `Guest::load("target/wasm32-wasip1/release/my_guard.wasm")?`, or `Guest::find("my-guard")?`.
//! let guest = Guest::from_bytes("my-guard", &wasm)?;
//! let host = Host::new();
//! let filter = host.load(guest).start()?;
//!
//! let seen = filter.get("/orders").field("x-deny", "1").send();
//! seen.assert_local_response(403).assert_upstream_not_called();
//! for_every_split("a body", |pieces| {
//!     let seen = filter.request("POST", "/orders").body_pieces(pieces).send();
//!     seen.assert_status(200).assert_upstream_field("x-seen", "1");
//! });
//! assert_eq!(seen.counters["denied"], 1);
//! host.assert_no_lints();
//! # Ok::<(), Box<dyn std::error::Error>>(())
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
