//! Operators: customers' TypeScript handlers, one confined process each.

mod body;
pub mod bundle;
mod call;
mod cause;
pub mod config;
mod egress;
pub mod engine;
pub mod jail;
mod kv;
mod logs;
mod manager;
mod pool;
mod process;
mod services;
mod sys;

pub use call::{OperatorBody, OperatorError};
pub use cause::Cause;
pub use config::{ConfigError, Operator, OperatorConfig, Settings};
pub use egress::{Resolve, SystemResolver};
pub use logs::LogLine;
pub use manager::{ApplyError, Operators, ProcessStatus, StartError};
