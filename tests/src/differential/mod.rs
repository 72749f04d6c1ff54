//! The differential suite: what `docs/abi.md` says of Envoy, asked of the real Envoy and of our host, answer by answer.
//!
//! A [`Row`] is one question: a script for the guest `calls`, which makes raw calls and tells what came of each, and the requests
//! that make it run. Both hosts run all rows with the same modules and the same policy; the [outcomes](outcome) of each row
//! are compared line by line. Where they differ, the row names the deviation in `docs/abi.md` that explains it; a
//! difference that is not declared is a failure, and so is a declared one that does not show. [`page`] makes
//! `docs/compatibility.md` of what was seen.
//!
//! * [`row`]: what a row says
//! * [`rows`]: all of them, by area
//! * [`policy`]: the policy that both hosts run
//! * [`transcript`]: what guests told, picked out of the hosts' logs
//! * [`conversation`]: what happens on a TCP connection
//! * [`outcome`]: what came of a row, and which values in it are of no account
//! * [`origin`]: the server behind the hosts
//! * [`stage`]: the hosts, and how a row is run on one
//! * [`simulated`]: a row in the harness, beside what Envoy said
//! * [`suite`]: rows, outcomes and verdicts together

pub mod conversation;
pub mod origin;
pub mod outcome;
pub mod page;
pub mod policy;
pub mod row;
pub mod rows;
pub mod simulated;
pub mod stage;
pub mod suite;
pub mod transcript;

pub use row::{Plugin, Row, Step};
pub use suite::Suite;
