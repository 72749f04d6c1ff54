//! What a filter is: a configuration that compiles into policies, and a decision.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::config_error::{ConfigErrors, JsonPath};
use crate::decision::Decision;
use crate::host::Host;
use crate::request::Request;
use crate::time::UnixTime;

/// A filter. `portcullis_kit::export!(JwtAuth);` makes a Proxy-Wasm module of it.
pub trait Filter: Sized + 'static {
    /// What it is called, after what it guards: `jwt-auth`.
    const NAME: &'static str;

    /// The filter's own keys of the configuration, beside those of [`Envelope`](crate::rules::Envelope). Unknown keys
    /// must be refused: `#[serde(deny_unknown_fields)]`.
    type Settings: DeserializeOwned + JsonSchema;

    /// What the configuration says as `policy` of a rule and as `default_policy`.
    type PolicyConfig: DeserializeOwned + JsonSchema;

    /// A policy that can run.
    type Policy: 'static;

    /// Compiles what holds for all rules. Every mistake is noted in `errors`, and then nothing runs; what comes out
    /// serves to find the mistakes in the policies too. `None` if even that cannot be.
    fn compile(settings: Self::Settings, errors: &mut ConfigErrors) -> Option<Self>;

    /// Compiles the policy that stands at `at`.
    fn compile_policy(
        &self,
        config: Self::PolicyConfig,
        at: &JsonPath,
        errors: &mut ConfigErrors,
    ) -> Option<Self::Policy>;

    /// Fields that the filter writes into requests. What a client sends under these names is removed first, whatever
    /// the decision.
    fn written_fields(&self) -> &[String] {
        &[]
    }

    /// Decides from the head of a request. The same request, time and answers of the host give the same decision,
    /// except where the filter remembers earlier requests on purpose.
    fn on_request_headers(
        &self,
        policy: &Self::Policy,
        request: &Request<'_>,
        host: &dyn Host,
        now: UnixTime,
    ) -> Decision;
}
