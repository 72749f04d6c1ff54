//! What a configuration says, and how it compiles. Absent keys give the safe behaviour.

use std::collections::BTreeMap;

use portcullis_kit::config_error::{ConfigErrors, JsonPath};
use portcullis_kit::identity::is_reserved;
use portcullis_kit::rules::is_field_name;
use portcullis_kit::time::Period;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::jwks::{Algorithm, JwksConfig};
use crate::token::Source;
use crate::verify::Provider;

/// The filter's own keys, beside `mode`, `failure_mode`, `rules` and `default_policy`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Who issues tokens, by a name of your choice. A token's `iss` selects one (RFC 7519, section 4.1.1).
    pub providers: BTreeMap<String, ProviderConfig>,
    /// The protection space that challenges name (RFC 9110, section 11.5). Absent: challenges name none.
    pub realm: Option<String>,
    /// Whether the upstream is told who the client is, in `x-portcullis-sub`, `x-portcullis-scopes` and their like.
    /// Default `false`: only filters after this one are told.
    #[serde(default)]
    pub identity_to_headers: bool,
    /// How long verified tokens are remembered, so that each costs one signature check.
    #[serde(default)]
    pub token_cache: TokenCacheConfig,
    /// How many signatures a worker checks per second in wasm; requests beyond are told to come back (503). Default
    /// 200: an RS256 check takes about 2 ms in wasm, so rubbish can take no more than 40 % of a worker's time. Remembered
    /// tokens cost none, and neither do checks that the host makes (`verify_signature`) and shared secrets.
    #[serde(default = "signature_checks_per_second_default")]
    #[schemars(range(min = 1, max = 100_000))]
    pub signature_checks_per_second: u32,
}

fn signature_checks_per_second_default() -> u32 {
    200
}

/// How verified tokens are remembered.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenCacheConfig {
    /// How many tokens each worker remembers. Default 1000; 0 remembers none.
    #[serde(default = "entries_default")]
    #[schemars(range(max = 100_000))]
    pub entries: u32,
    /// How long a token is remembered at most; never beyond its `exp`. Default `10m`.
    #[serde(default = "max_age_default")]
    pub max_age: Period,
}

fn entries_default() -> u32 {
    1_000
}

fn max_age_default() -> Period {
    Period::from_seconds(600)
}

impl Default for TokenCacheConfig {
    fn default() -> Self {
        Self { entries: entries_default(), max_age: max_age_default() }
    }
}

/// An issuer of tokens, and what its tokens must be.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProviderConfig {
    /// The `iss` of the tokens, character by character: `https://issuer.example`.
    pub issuer: String,
    /// Those of whom a token must name one in `aud`. Needed, unless `dangerously_accept_any_audience` waives it.
    pub audiences: Option<Vec<String>>,
    /// Takes tokens for anybody: also those that a client of another service of the issuer's has, and that service.
    #[serde(default)]
    pub dangerously_accept_any_audience: bool,
    /// The values of `typ` that are taken; case and a leading `application/` do not matter. Default `["at+jwt", "JWT"]`.
    #[serde(default = "token_type_default")]
    pub token_type: Vec<String>,
    /// Takes tokens without `typ` too, which may have been made for another purpose (RFC 8725, section 2.8).
    #[serde(default)]
    pub dangerously_allow_missing_token_type: bool,
    /// The algorithms that are taken. Absent: all of public keys that fit the keys. Shared secrets (`HS256`) are used only
    /// if named here.
    pub algorithms: Option<Vec<Algorithm>>,
    /// The issuer's keys, as it publishes them.
    pub jwks_inline: JwksConfig,
    /// By how much our clock and the issuer's may differ. Default `60s`; at most `10m`.
    #[serde(default = "clock_skew_default")]
    pub clock_skew: Period,
    /// Claims that a token must have. `exp` must always be there, named here or not. Default `["exp"]`.
    #[serde(default)]
    pub require_claims: Vec<String>,
    /// Takes tokens without `exp` too: they are good for ever, once disclosed.
    #[serde(default)]
    pub dangerously_allow_missing_exp: bool,
    /// How long a token may live from `iat` to `exp`. Absent: as long as the issuer likes.
    pub max_lifetime: Option<Period>,
    /// The fields that may hold a token. Absent, as `from_cookies` is too: `authorization` with the scheme `Bearer`.
    pub from_headers: Option<Vec<HeaderSource>>,
    /// The cookies that may hold a token. A browser sends these by itself: guard against cross-site requests.
    pub from_cookies: Option<Vec<String>>,
    /// Claims to write into fields of the request. What a client sends under these names is removed, always.
    #[serde(default)]
    pub claims_to_headers: Vec<ClaimToHeader>,
    /// Whether the upstream gets the token. Default `false`: what has no token cannot lose it.
    #[serde(default)]
    pub forward: bool,
}

fn token_type_default() -> Vec<String> {
    vec!["at+jwt".to_owned(), "JWT".to_owned()]
}

fn clock_skew_default() -> Period {
    Period::from_seconds(60)
}

/// A field that may hold a token.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderSource {
    /// The field's name.
    pub name: String,
    /// The scheme before the token, such as `Bearer`. Absent: the whole value is the token.
    pub scheme: Option<String>,
}

/// A claim to write into a field.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClaimToHeader {
    /// The claim's name. Text, numbers and booleans are written as such, arrays and objects as JSON.
    pub claim: String,
    /// The field's name.
    pub header: String,
}

/// What holds for the requests of a rule.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyConfig {
    /// Whose token a request needs. Absent: one of any provider.
    pub requires: Option<Requires>,
    /// Scopes that the token must have, all of them. Absent: none.
    #[serde(default)]
    pub required_scopes: Vec<String>,
    /// Lets requests without a token pass, as nobody. A token that is there must still be good. Default `false`.
    #[serde(default)]
    pub allow_missing: bool,
}

/// Whose token a request needs.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Requires {
    /// A token of one of these providers.
    Any(Vec<String>),
    /// No token; one that is there is neither looked at nor removed.
    Nothing,
}

/// Checks the providers; those that are good come out, in the order of their names.
pub fn compile_providers(providers: BTreeMap<String, ProviderConfig>, errors: &mut ConfigErrors) -> Vec<Provider> {
    let at = JsonPath::default().key("providers");
    if providers.is_empty() {
        errors.push_with_hint(&at, "there is no provider", "name at least one issuer of tokens");
    }
    let mut compiled: Vec<Provider> = Vec::new();
    for (name, provider) in providers {
        let at = at.key(&name);
        if let Some(other) = compiled.iter().find(|other| other.issuer == provider.issuer) {
            let hint = "a token's `iss` must tell the provider; one provider can have several audiences and keys";
            errors.push_with_hint(&at.key("issuer"), format!("`{}` has this issuer too", other.name), hint);
        }
        compiled.extend(provider.compile(name, &at, errors));
    }
    compiled
}

impl ProviderConfig {
    fn compile(self, name: String, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Provider> {
        if self.issuer.is_empty() {
            errors.push(&at.key("issuer"), "the issuer is empty");
        }
        match (&self.audiences, self.dangerously_accept_any_audience) {
            (None, false) => errors.push_with_hint(
                at,
                "`audiences` is missing",
                "name what tokens for this API have in `aud`; without it, any service's token would open this one",
            ),
            (Some(_), true) => errors.push_with_hint(
                &at.key("dangerously_accept_any_audience"),
                "this contradicts `audiences`",
                "remove one of the two",
            ),
            (Some(audiences), false) => check_texts(audiences, &at.key("audiences"), errors),
            (None, true) => {}
        }
        check_texts(&self.token_type, &at.key("token_type"), errors);
        if self.algorithms.as_ref().is_some_and(Vec::is_empty) {
            errors.push_with_hint(
                &at.key("algorithms"),
                "the list is empty",
                "leave the key out to take all that fit the keys",
            );
        }
        if self.clock_skew > Period::from_seconds(600) {
            errors.push_with_hint(
                &at.key("clock_skew"),
                "clocks that differ by more than `10m` are broken",
                "an expired token would live on; set the clocks right",
            );
        }
        if self.max_lifetime.is_some_and(|lifetime| lifetime < Period::from_seconds(1)) {
            errors.push(&at.key("max_lifetime"), "no token lives less than a second");
        }
        if self.max_lifetime.is_some() && self.dangerously_allow_missing_exp {
            let problem = "`max_lifetime` needs `exp`, which `dangerously_allow_missing_exp` waives";
            errors.push_with_hint(&at.key("max_lifetime"), problem, "remove one of the two");
        }
        let mut required_claims = self.require_claims;
        if !self.dangerously_allow_missing_exp {
            required_claims.push("exp".to_owned());
        }
        let keys = self.jwks_inline.compile(self.algorithms.as_deref().filter(|named| !named.is_empty()), at, errors);
        let sources = compile_sources(self.from_headers, self.from_cookies, at, errors);
        let claims_to_headers = compile_claims_to_headers(self.claims_to_headers, &at.key("claims_to_headers"), errors);
        Some(Provider {
            name,
            issuer: self.issuer,
            audiences: self.audiences,
            token_types: self.token_type.iter().map(|typ| normalise_type(typ)).collect(),
            token_type_may_miss: self.dangerously_allow_missing_token_type,
            keys: keys?,
            clock_skew: self.clock_skew.duration(),
            required_claims,
            lifetime_max: self.max_lifetime.map(Period::duration),
            sources,
            claims_to_headers,
            forward: self.forward,
        })
    }
}

fn check_texts(texts: &[String], at: &JsonPath, errors: &mut ConfigErrors) {
    if texts.is_empty() {
        errors.push(at, "the list is empty");
    }
    if let Some(index) = texts.iter().position(String::is_empty) {
        errors.push(&at.index(index), "the text is empty");
    }
}

fn normalise_type(typ: &str) -> String {
    let lower = typ.to_ascii_lowercase();
    lower.strip_prefix("application/").map(str::to_owned).unwrap_or(lower)
}

fn compile_sources(
    headers: Option<Vec<HeaderSource>>,
    cookies: Option<Vec<String>>,
    at: &JsonPath,
    errors: &mut ConfigErrors,
) -> Vec<Source> {
    if headers.is_none() && cookies.is_none() {
        return vec![Source::Header { name: "authorization".to_owned(), scheme: Some("Bearer".to_owned()) }];
    }
    let mut sources = Vec::new();
    for (key, empty) in [
        ("from_headers", headers.as_ref().is_some_and(Vec::is_empty)),
        ("from_cookies", cookies.as_ref().is_some_and(Vec::is_empty)),
    ] {
        if empty {
            errors.push_with_hint(&at.key(key), "the list is empty", "leave the key out");
        }
    }
    for (index, HeaderSource { name, scheme }) in headers.unwrap_or_default().into_iter().enumerate() {
        let at = at.key("from_headers").index(index);
        if !is_field_name(&name) || matches!(name.as_str(), "cookie" | "host") {
            let hint = "write a field name in lower case, such as `x-access-token`; cookies are for `from_cookies`";
            errors.push_with_hint(&at.key("name"), format!("a token cannot be in `{name}`"), hint);
        }
        if scheme
            .as_ref()
            .is_some_and(|scheme| scheme.is_empty() || !scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
        {
            errors.push_with_hint(
                &at.key("scheme"),
                "this is not a scheme",
                "write it without a space, such as `Bearer`",
            );
        }
        sources.push(Source::Header { name, scheme });
    }
    for (index, name) in cookies.unwrap_or_default().into_iter().enumerate() {
        if !name.bytes().all(|b| b.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?={}".contains(&b)) || name.is_empty() {
            errors.push(&at.key("from_cookies").index(index), format!("`{name}` is not a cookie name"));
        }
        sources.push(Source::Cookie(name));
    }
    sources
}

/// Fields that a claim must not overwrite: they steer the connection, name the target or are the credentials.
const FIELDS_NOT_FOR_CLAIMS: &[&str] = &[
    "authorization",
    "connection",
    "content-length",
    "cookie",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-request-id",
];

fn compile_claims_to_headers(
    mappings: Vec<ClaimToHeader>,
    at: &JsonPath,
    errors: &mut ConfigErrors,
) -> Vec<(String, String)> {
    let mut compiled: Vec<(String, String)> = Vec::new();
    for (index, ClaimToHeader { claim, header }) in mappings.into_iter().enumerate() {
        let at = at.index(index).key("header");
        if !is_field_name(&header) {
            errors.push_with_hint(
                &at,
                format!("`{header}` is not a field name"),
                "write it in lower case, such as `x-email`",
            );
        } else if FIELDS_NOT_FOR_CLAIMS.contains(&header.as_str()) {
            errors.push_with_hint(
                &at,
                format!("`{header}` must not be written from a claim"),
                "choose a name of your own, such as `x-email`",
            );
        } else if is_reserved(header.as_bytes()) {
            let hint = "fields of that prefix tell the identity: set `identity_to_headers`, or choose another name";
            errors.push_with_hint(&at, format!("`{header}` is reserved"), hint);
        } else if compiled.iter().any(|(_, other)| *other == header) {
            errors.push(&at, format!("`{header}` is written from another claim too"));
        }
        compiled.push((claim, header));
    }
    compiled
}

/// Whether this is a scope as a challenge can name it (RFC 6749, section 3.3).
pub fn is_scope(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\')
}
