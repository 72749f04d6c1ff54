//! Small guests, written in WAT, in a worker: how streams pass them, and what the host survives.

mod attributes;
mod capabilities;
mod contexts;
mod grpc;
mod hostile;
mod http;
mod limits;
mod support;
mod tcp;
mod versions;
mod wasi;
