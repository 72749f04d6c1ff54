//! Scenarios on hosts that listen on sockets: `portcullis serve` and the real Envoy.
//!
//! [`Sockets`] is behind `portcullis test --host host` and `--host envoy`, and behind the tests of this repository. It stands on
//! processes that end with whoever started them ([`process`]), a client that sends what no well-behaved client would
//! ([`client`]), upstreams that record and follow a script ([`upstream`]), policies ([`policy`]) and running hosts
//! ([`server`]). What must come of a request, and whether it did, is the harness's: [`portcullis_harness::judge`].

pub mod client;
mod grpc;
pub mod policy;
pub mod process;
mod programs;
pub mod server;
mod sockets;
pub mod upstream;

pub use programs::{ENVOY_VERSION, Programs};
pub use sockets::Sockets;
