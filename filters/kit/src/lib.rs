//! What the filters share, so that a filter is its configuration and its decision and nothing else.
//!
//! A filter implements [`filter::Filter`]; [`guard::Guard`] adds rules, modes, counters and responses, still as a pure
//! function from a request to an outcome; the adapter, built for wasm32 only, carries outcomes out through Proxy-Wasm.
//! No module but the adapter knows Proxy-Wasm, and none asks for the time.

#[cfg(target_arch = "wasm32")]
pub mod adapter;
pub mod config_error;
pub mod decision;
pub mod filter;
pub mod guard;
pub mod host;
pub mod identity;
pub mod json;
pub mod metrics;
pub mod pairs;
pub mod path;
pub mod request;
pub mod rules;
pub mod schema;
pub mod secret;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod time;

/// Makes a Proxy-Wasm module of a crate: `portcullis_kit::export!(JwtAuth);` is all its glue.
#[macro_export]
macro_rules! export {
    ($filter:ty) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(missing_docs, reason = "the proxy is the only caller of what stands here")]
        const _: () = {
            $crate::adapter::proxy_wasm::main! {{
                $crate::adapter::start::<$filter>();
            }}
        };
    };
}
