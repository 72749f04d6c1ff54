//! The targets, by what they try.

mod configuration;
mod filters;
mod hostcalls;
mod http;
mod jwt;
mod wire;

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::Target;

/// All of them.
pub const TARGETS: &[Target] = &[
    wire::PAIRS,
    hostcalls::PROPERTIES,
    hostcalls::EXPRESSIONS,
    wire::SIGNATURES,
    wire::GRPC,
    wire::CERTIFICATES,
    wire::MODULES,
    http::FRAMING,
    http::TARGETS,
    configuration::POLICY,
    jwt::CONFIGURATION,
    jwt::TOKENS,
    hostcalls::HTTP,
    hostcalls::TCP,
];

/// A number for what happened.
fn outcome(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}
