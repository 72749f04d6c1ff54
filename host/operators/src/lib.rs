//! Operators: customers' TypeScript handlers, one confined process each.

pub mod author;
mod body;
pub mod bundle;
mod call;
mod cause;
pub mod config;
pub mod control;
pub mod doctor;
mod egress;
pub mod engine;
mod front;
pub mod jail;
mod kv;
mod logs;
mod manager;
mod placement;
mod pool;
mod process;
mod services;
mod sys;

pub use call::{OperatorBody, OperatorError};
pub use cause::Cause;
pub use config::{ConfigError, Operator, OperatorConfig, Settings};
pub use doctor::Doctor;
pub use egress::{Resolve, SystemResolver};
pub use front::Front;
pub use logs::LogLine;
pub use manager::{ApplyError, OperatorSet, Operators, ProcessStatus, StartError};
