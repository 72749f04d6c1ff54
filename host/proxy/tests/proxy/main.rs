//! The proxy over real sockets: a server under test, an upstream that does what it is told, and clients that send bytes as
//! they are. One program, because linking the WebAssembly runtime takes longer than all tests together.

mod filters;
mod grpc;
mod lifecycle;
mod limits;
mod operators;
mod requests;
mod secure;
mod support;
mod tcp;
mod upstreams;
