//! One scenario, three hosts; attacks; the demo.
//!
//! The tests stand on `portcullis-e2e`, which is here under its own names: processes that end with the test ([`process`]), a
//! client that sends what no well-behaved client would ([`client`]), an upstream that records and follows a script
//! ([`upstream`]), policies ([`policy`]), running hosts ([`server`]) and the runner for scenarios over sockets ([`Sockets`]).
//! Beside them a guest that makes the calls it is told to ([`calls`]), what every filter has to have ([`completeness`]), and a reader who
//! does what a page says ([`walkthrough`]).

pub mod calls;
pub mod completeness;
pub mod connection;
pub mod differential;
pub mod places;
pub mod tcp;
pub mod walkthrough;

pub use portcullis_e2e::{Programs, Sockets, client, policy, process, server, upstream};
