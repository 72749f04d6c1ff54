//! What the filters share, so that a filter is its configuration and its decision and nothing else.
//!
//! A filter implements [`filter::Filter`]; [`guard::Guard`] adds rules, modes, counters and responses, still as a pure
//! function from a request to an outcome; the adapter, built for wasm32 only, carries outcomes out through Proxy-Wasm.
//! No module but the adapter knows Proxy-Wasm, and none asks for the time.
//!
//! A whole filter, which lets only listed countries in:
//!
//! ```
//! use portcullis_kit::config_error::{ConfigErrors, JsonPath};
//! use portcullis_kit::decision::{Decision, Denial, Forward};
//! use portcullis_kit::{filter::Filter, guard::Guard, host::Host, request::Request, time::UnixTime};
//! use schemars::JsonSchema;
//! use serde::Deserialize;
//!
//! struct CountryGuard {
//!     field: String,
//! }
//!
//! /// The filter's own keys of the configuration.
//! #[derive(Deserialize, JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct Settings {
//!     /// The field in which the proxy in front tells the country.
//!     field: String,
//! }
//!
//! /// What a rule says.
//! #[derive(Deserialize, JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct Countries {
//!     allow: Vec<String>,
//! }
//!
//! impl Filter for CountryGuard {
//!     const NAME: &'static str = "country-guard";
//!     type Settings = Settings;
//!     type PolicyConfig = Countries;
//!     type Policy = Countries;
//!
//!     fn compile(settings: Settings, _: &mut ConfigErrors) -> Option<Self> {
//!         Some(Self { field: settings.field })
//!     }
//!
//!     fn compile_policy(&self, config: Countries, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Countries> {
//!         if config.allow.is_empty() {
//!             errors.push_with_hint(&at.key("allow"), "the list is empty", "name at least one country");
//!         }
//!         Some(config)
//!     }
//!
//!     fn on_request_headers(&self, policy: &Countries, request: &Request<'_>, _: &dyn Host, _: UnixTime) -> Decision {
//!         let mut countries = request.field_values(&self.field);
//!         match (countries.next(), countries.next()) {
//!             (Some(country), None) if policy.allow.iter().any(|allowed| allowed.as_bytes() == country) => {
//!                 Decision::Continue(Forward::default())
//!             }
//!             _ => Decision::Deny(Denial::NotPermitted { finding: "the country is not allowed" }),
//!         }
//!     }
//! }
//!
//! // In the filter's crate: portcullis_kit::export!(CountryGuard);
//!
//! let good = br#"{ "field": "x-country", "default_policy": { "allow": ["CH"] } }"#;
//! assert!(Guard::<CountryGuard>::from_json(good).is_ok());
//! let bad = br#"{ "fiel": "x-country", "default_policy": { "allow": ["CH"] } }"#;
//! assert_eq!(
//!     Guard::<CountryGuard>::from_json(bad).err().unwrap().to_string(),
//!     "country-guard: fiel: unknown key `fiel`\n  hint: did you mean `field`?"
//! );
//! ```
//!
//! Later phases are meant to be added without a change to filters that do not need them: a call to another service is
//! one more variant of [`decision::Decision`], after whose answer the filter is asked again, and the need of a body is
//! one more member of [`decision::Forward`] with a method of `Filter` that by default is never called.

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
