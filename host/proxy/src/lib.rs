//! The standalone host: listeners, the filter chain, upstreams, admin endpoints.
//!
//! ```text
//! control thread: Server, Handle, admin          worker threads, each: event loop, Core (filters), Upstreams
//!
//! socket -> gate -> hyper -> serve -> filters (portcullis-abi) -> exchange -> upstream
//!                     ^------ response ------ filters <---------------'
//! ```
//!
//! Each worker is one thread with one event loop, its own listening sockets (SO_REUSEPORT), its own filter VMs and its own
//! upstream connections; no request takes a lock or crosses a thread. A request is refused where it can be read in two
//! ways ([`framing`]), meets the filters of its route, and is answered in Envoy's words where there is nobody behind.
//!
//! [`Server::prepare`] brings everything up, [`Server::run`] accepts connections, [`Handle`] reloads and ends it.

mod access_log;
mod admin;
mod callout;
mod certificate;
mod connection;
mod core;
mod exchange;
mod failure;
pub mod framing;
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod grpc;
mod ids;
mod listener;
mod message;
mod metrics;
mod operator;
mod outbox;
mod plan;
mod relay;
mod released;
mod rewind;
mod serve;
mod server;
mod socket;
mod stall;
mod tcp;
mod upstream;
mod worker;

pub use core::LINT_TARGET;
pub use metrics::counters_text;
pub use operator::{
    BodyError, OperatorAnswer, OperatorFailure, OperatorHost, OperatorRequestBody, OperatorSet, OperatorsRefused,
};
pub use plan::PlanError;
pub use server::{DRAIN_TIME, Handle, Options, Server, StartError, check};
