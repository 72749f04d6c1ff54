//! One scenario, three hosts; attacks; the demo.
//!
//! The library holds what the tests stand on: processes that end with the test ([`process`]), a client that sends what no
//! well-behaved client would ([`client`]), an upstream that records and follows a script ([`upstream`]), policies
//! ([`policy`]), running hosts ([`server`]), a guest that makes the calls it is told to ([`calls`]) and the runner for
//! scenarios over sockets ([`runner`]).

pub mod calls;
pub mod client;
pub mod connection;
pub mod differential;
mod grpc;
pub mod places;
pub mod policy;
pub mod process;
pub mod runner;
pub mod server;
pub mod upstream;
