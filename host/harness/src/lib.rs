//! Scenarios against a filter's .wasm on a simulated host.

mod content;
mod expectation;
mod keys;
mod message;
mod scenario;
mod template;
mod token;
mod yaml;

pub use expectation::{
    Expectation, FieldExpectation, Mismatch, RequestExpectation, ResponseExpectation, UpstreamExpectation, describe,
};
pub use keys::{KeyError, SigningKey};
pub use message::{FieldLines, LogLine, Observed, ObservedRequest, ObservedResponse};
pub use scenario::{Callout, CalloutAnswer, Host, RequestPlan, ResponsePlan, Scenario, Step};
pub use token::{Signature, TokenRecipe};
pub use yaml::FileError;
