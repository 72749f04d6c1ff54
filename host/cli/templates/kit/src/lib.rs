//! Lets requests pass that carry a listed value in a field.
//!
//! [`config`] says what a configuration means, [`policy`] decides about a request. Neither knows Proxy-Wasm: all of that is
//! in `portcullis-kit`.

pub mod config;
pub mod policy;

pub use policy::{{type}};

portcullis_kit::export!({{type}});
