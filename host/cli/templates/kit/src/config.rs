//! What a configuration says. The doc comments become `config.schema.json`.

use schemars::JsonSchema;
use serde::Deserialize;

/// The filter's own keys, beside `mode`, `failure_mode`, `rules` and `default_policy`, which all filters have.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The request field that is looked at, such as `x-client`.
    pub field: String,
}

/// What a rule, or `default_policy`, says about its requests.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyConfig {
    /// Values that pass, compared byte by byte.
    pub allow: Vec<String>,
}
