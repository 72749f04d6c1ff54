//! Lets requests pass that carry a listed value in a field.
//!
//! [`policy`] decides about a request and knows no proxy; the adapter carries it out through Proxy-Wasm.

#[cfg(target_arch = "wasm32")]
mod adapter;
pub mod policy;
