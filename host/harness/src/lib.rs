//! Scenarios against a filter's `.wasm` on a simulated host.
//!
//! A scenario is a file: a plugin configuration, requests, and what must come of each. [`Scenario`] reads it,
//! [`Harness`] runs the filter without any socket, and [`Expectation::compare`] judges what came of it. The same files run
//! against `portcullis serve` and the real Envoy; those runners live elsewhere and share everything but the host.
//!
//! [`run`] is behind `portcullis test`. A filter's own Rust tests use [`Guest`] and [`Harness`].

mod content;
mod expectation;
mod keys;
mod message;
mod run;
mod scenario;
mod simulated;
mod template;
mod token;
mod yaml;

pub use expectation::{
    Expectation, FieldExpectation, Mismatch, RequestExpectation, ResponseExpectation, UpstreamExpectation, describe,
};
pub use keys::{KeyError, SigningKey};
pub use message::{FieldLines, LogLine, Observed, ObservedRequest, ObservedResponse};
pub use run::{
    Outcome, Report, RunOptions, Verdict, find_module, find_scenarios, judge, refused_as_expected, run, run_scenario,
};
pub use scenario::{Callout, CalloutAnswer, Host, RequestPlan, ResponsePlan, Scenario, Step};
pub use simulated::{Builder, Guest, Harness, HarnessError, NOW_DEFAULT, RequestBuilder};
pub use token::{Signature, TokenRecipe};
pub use yaml::FileError;
