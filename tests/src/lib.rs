//! One scenario, three hosts; attacks; the demo.
//!
//! The library holds what the tests stand on: processes that end with the test ([`process`]), a client that sends what no
//! well-behaved client would ([`client`]), an upstream that records and follows a script ([`upstream`]), policies
//! ([`policy`]), running hosts ([`server`]) and the runner for scenarios over sockets ([`runner`]).

pub mod client;
pub mod connection;
pub mod places;
pub mod policy;
pub mod process;
pub mod runner;
pub mod server;
pub mod upstream;
