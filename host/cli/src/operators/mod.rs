//! Operators in the binary: the adapter that lets the proxy route to them, and the commands of `portcullis operators`.

mod host;

pub(crate) use host::Host;
