//! The decision: from a request, the time and what was remembered, to pass or be denied.

use std::rc::Rc;

use portcullis_kit::config_error::{ConfigErrors, JsonPath};
use portcullis_kit::decision::{Challenge, Decision, Denial, FieldEdit, Forward};
use portcullis_kit::filter::Filter;
use portcullis_kit::host::Host;
use portcullis_kit::identity::{Identity, field_value};
use portcullis_kit::request::Request;
use portcullis_kit::time::UnixTime;
use serde_json::Value;

use crate::cache::{self, Cache};
use crate::claims;
use crate::config::{PolicyConfig, Requires, Settings, compile_providers, is_scope};
use crate::signature::Checker;
use crate::token::{self, Found, Source, Unfound};
use crate::verify::{Provider, Unverified, Verified, verify};

/// The filter: providers, and what was learnt about tokens so far.
#[derive(Debug)]
pub struct JwtAuth {
    /// Also those whose configuration has mistakes: to name one of them is not a mistake in itself.
    provider_names: Vec<String>,
    providers: Vec<Provider>,
    /// Fields that claims are written to.
    written_fields: Vec<String>,
    identity_to_headers: bool,
    challenge: Challenge,
    cache: Cache,
    checker: Checker,
}

/// What holds for the requests of one rule.
#[derive(Debug)]
pub enum Policy {
    /// Requests pass, whatever they carry.
    Open,
    /// Requests need a token.
    Token(TokenPolicy),
}

/// Which token a request needs.
#[derive(Debug)]
pub struct TokenPolicy {
    /// Positions of the providers whose tokens are taken.
    providers: Vec<usize>,
    /// Where tokens of these providers may be.
    sources: Vec<Source>,
    required_scopes: Vec<String>,
    /// The same, as a challenge names them.
    required_scopes_text: Rc<str>,
    allow_missing: bool,
}

impl Filter for JwtAuth {
    const NAME: &'static str = "jwt-auth";
    type Settings = Settings;
    type PolicyConfig = PolicyConfig;
    type Policy = Policy;

    fn compile(settings: Settings, errors: &mut ConfigErrors) -> Option<Self> {
        let root = JsonPath::default();
        let provider_names = settings.providers.keys().cloned().collect();
        let providers = compile_providers(settings.providers, errors);
        let realm_is_text = |realm: &str| realm.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\');
        if settings.realm.as_deref().is_some_and(|realm| realm.is_empty() || !realm_is_text(realm)) {
            errors.push_with_hint(
                &root.key("realm"),
                "this is not a realm",
                "use printable ASCII without `\"` and `\\`",
            );
        }
        if !(1..=100_000).contains(&settings.signature_checks_per_second) {
            errors.push(&root.key("signature_checks_per_second"), "1 to 100000 are taken");
        }
        if settings.token_cache.entries > 100_000 {
            errors.push(&root.key("token_cache").key("entries"), "at most 100000 are taken");
        }
        let mut written_fields: Vec<String> = providers
            .iter()
            .flat_map(|provider| &provider.claims_to_headers)
            .map(|(_, header)| header.clone())
            .collect();
        written_fields.sort();
        written_fields.dedup();
        Some(Self {
            provider_names,
            providers,
            written_fields,
            identity_to_headers: settings.identity_to_headers,
            challenge: Challenge::Bearer { realm: settings.realm.map(Into::into) },
            cache: Cache::new(
                usize::try_from(settings.token_cache.entries).unwrap_or(usize::MAX),
                settings.token_cache.max_age.duration(),
            ),
            checker: Checker::new(settings.signature_checks_per_second),
        })
    }

    fn compile_policy(&self, config: PolicyConfig, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Policy> {
        let before = errors.len();
        for (index, scope) in config.required_scopes.iter().enumerate() {
            if !is_scope(scope) {
                let hint = "one scope each, of printable ASCII without space, `\"` and `\\`";
                errors.push_with_hint(
                    &at.key("required_scopes").index(index),
                    format!("`{scope}` is not a scope"),
                    hint,
                );
            }
        }
        let names = match config.requires {
            Some(Requires::Nothing) => {
                if config.allow_missing || !config.required_scopes.is_empty() {
                    let hint = "remove `required_scopes` and `allow_missing`, or require a provider's token";
                    errors.push_with_hint(at, "where nothing is required, nothing can be required of it", hint);
                }
                return (errors.len() == before).then_some(Policy::Open);
            }
            Some(Requires::Any(names)) => names,
            None => self.provider_names.clone(),
        };
        let names_at = at.key("requires").key("any");
        if names.is_empty() {
            let hint = "name providers, or write `\"requires\": \"nothing\"` if none is needed";
            errors.push_with_hint(&names_at, "the list is empty", hint);
        }
        let mut providers = Vec::new();
        for (index, name) in names.iter().enumerate() {
            match self.providers.iter().position(|provider| provider.name == *name) {
                Some(provider) => providers.push(provider),
                None if self.provider_names.contains(name) => {}
                None => {
                    let known: Vec<String> = self.provider_names.iter().map(|name| format!("`{name}`")).collect();
                    let hint = format!("known here: {}", known.join(", "));
                    errors.push_with_hint(&names_at.index(index), format!("there is no provider `{name}`"), hint);
                }
            }
        }
        let mut sources: Vec<Source> = Vec::new();
        for source in providers.iter().filter_map(|index| self.providers.get(*index)).flat_map(|p| &p.sources) {
            if !sources.contains(source) {
                sources.push(source.clone());
            }
        }
        let required_scopes_text = config.required_scopes.join(" ").into();
        (errors.len() == before).then_some(Policy::Token(TokenPolicy {
            providers,
            sources,
            required_scopes: config.required_scopes,
            required_scopes_text,
            allow_missing: config.allow_missing,
        }))
    }

    fn written_fields(&self) -> &[String] {
        &self.written_fields
    }

    fn on_request_headers(&self, policy: &Policy, request: &Request<'_>, host: &dyn Host, now: UnixTime) -> Decision {
        let Policy::Token(policy) = policy else { return Decision::Continue(Forward::default()) };
        let found = match token::find(request, &policy.sources) {
            Ok(Some(found)) => found,
            Ok(None) if policy.allow_missing => return Decision::Continue(Forward::default()),
            Ok(None) => return Decision::Deny(Denial::CredentialsMissing { challenge: self.challenge.clone() }),
            Err(Unfound::Several) => return self.rejected("there is more than one token"),
            Err(Unfound::Malformed) => {
                let challenge = Some(self.challenge.clone());
                return Decision::Deny(Denial::RequestMalformed {
                    finding: "there is no token after the scheme",
                    challenge,
                });
            }
        };
        let verified = match self.verified(&found, policy, host, now) {
            Ok(verified) => verified,
            Err(Unverified::TooManyChecks) => {
                let finding = Unverified::TooManyChecks.finding();
                return Decision::Deny(Denial::Overloaded { finding, retry_after_seconds: 1 });
            }
            Err(reason) => return self.rejected(reason.finding()),
        };
        let scopes = claims::scopes(verified.claims());
        if !policy.required_scopes.iter().all(|required| scopes.contains(required)) {
            let required = Rc::clone(&policy.required_scopes_text);
            return Decision::Deny(Denial::ScopeInsufficient { required, challenge: self.challenge.clone() });
        }
        Decision::Continue(self.forwarded(&verified, scopes, request, found.source))
    }
}

impl JwtAuth {
    fn rejected(&self, finding: &'static str) -> Decision {
        Decision::Deny(Denial::CredentialsRejected { finding, challenge: self.challenge.clone() })
    }

    /// The token, verified now or lately.
    fn verified(
        &self,
        found: &Found<'_>,
        policy: &TokenPolicy,
        host: &dyn Host,
        now: UnixTime,
    ) -> Result<Rc<Verified>, Unverified> {
        // Before it is hashed: to hash a long one costs more than to refuse it.
        if found.token.len() > token::TOKEN_BYTES_MAX {
            return Err(Unverified::TooLong);
        }
        let hash = cache::hash(found.token);
        let verified = match self.cache.get(&hash, now) {
            Some(verified) => {
                verified.check_times(&self.providers, now)?;
                verified
            }
            None => {
                let verified = verify(found.token, &self.providers, &policy.providers, &self.checker, host, now)?;
                let verified = Rc::new(verified);
                self.cache.insert(hash, found.token.len(), Rc::clone(&verified), now);
                verified
            }
        };
        // A remembered token was perhaps verified under another rule, and found where this provider's may not be.
        if !policy.providers.contains(&verified.provider()) {
            return Err(Unverified::IssuerUnknown);
        }
        let provider = self.providers.get(verified.provider()).ok_or(Unverified::IssuerUnknown)?;
        if !provider.sources.contains(found.source) {
            return Err(Unverified::SourceNotOfProvider);
        }
        Ok(verified)
    }

    fn forwarded(&self, verified: &Verified, scopes: Vec<String>, request: &Request<'_>, source: &Source) -> Forward {
        let claims = verified.claims();
        let provider = self.providers.get(verified.provider());
        let mut field_edits = Vec::new();
        for (claim, header) in provider.iter().flat_map(|provider| &provider.claims_to_headers) {
            let value = match claims.get(claim) {
                None | Some(Value::Null) => continue,
                Some(Value::String(text)) => field_value(text),
                Some(other) => field_value(&other.to_string()),
            };
            field_edits.push(FieldEdit::Set(header.clone().into(), value));
        }
        if provider.is_some_and(|provider| !provider.forward) {
            field_edits.push(match source {
                Source::Header { name, .. } => FieldEdit::Remove(name.clone().into()),
                Source::Cookie(name) => match token::cookies_without(request, name) {
                    none if none.is_empty() => FieldEdit::Remove("cookie".into()),
                    others => FieldEdit::Set("cookie".into(), others),
                },
            });
        }
        let text = |name: &str| claims.get(name).and_then(Value::as_str).map(str::to_owned);
        let identity = Identity {
            sub: text("sub"),
            client_id: text("client_id").or_else(|| text("azp")),
            issuer: text("iss"),
            scopes,
            groups: claims::strings(claims, "groups"),
            method: "jwt",
            acr: text("acr"),
            credential_id: text("jti"),
        };
        Forward { field_edits, identity: Some(identity), identity_fields: self.identity_to_headers }
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use jsonwebtoken::EncodingKey;
    use jsonwebtoken::crypto::rust_crypto;
    use portcullis_kit::guard::{Guard, Outcome};
    use portcullis_kit::request::FieldLine;
    use portcullis_kit::testing::TestHost;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const NOW: u64 = 1_700_000_000;

    /// The private key of RFC 8037, appendix A.1, as PKCS #8.
    fn signing_key() -> EncodingKey {
        let prefix = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
        let seed = URL_SAFE_NO_PAD.decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A").expect("base64url");
        EncodingKey::from_ed_der(&[&prefix[..], &seed].concat())
    }

    /// A token with a good signature, whatever it says.
    fn sign(header: &Value, claims: &Value) -> String {
        let signed =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string()));
        let signer = (rust_crypto::DEFAULT_PROVIDER.signer_factory)(&jsonwebtoken::Algorithm::EdDSA, &signing_key());
        let signature = signer.expect("a key").try_sign(signed.as_bytes()).expect("a signature");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn good_header() -> Value {
        json!({"alg": "EdDSA", "typ": "at+jwt", "kid": "k"})
    }

    fn good_claims() -> Value {
        json!({"iss": "https://a.example", "aud": "orders", "sub": "alice", "exp": NOW + 300, "scope": "read write"})
    }

    fn with(mut object: Value, name: &str, value: Value) -> Value {
        object[name] = value;
        object
    }

    fn without(mut object: Value, name: &str) -> Value {
        object.as_object_mut().expect("an object").remove(name);
        object
    }

    fn key(kid: &str) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "kid": kid, "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"})
    }

    fn config() -> Value {
        json!({
            "providers": {
                "a": {
                    "issuer": "https://a.example", "audiences": ["orders"], "jwks_inline": {"keys": [key("k")]},
                    "claims_to_headers": [{"claim": "email", "header": "x-email"}],
                },
                "b": {
                    "issuer": "https://b.example", "audiences": ["orders"], "jwks_inline": {"keys": [key("k")]},
                    "from_headers": [{"name": "x-token"}], "from_cookies": ["session"], "forward": true,
                },
            },
            "identity_to_headers": true,
            "rules": [
                {"name": "only-a", "match": {"path": {"prefix": "/a"}}, "policy": {"requires": {"any": ["a"]}}},
                {"name": "scoped", "match": {"path": {"prefix": "/s"}}, "policy": {"required_scopes": ["read", "admin"]}},
                {"name": "open", "match": {"path": {"prefix": "/open"}}, "policy": {"requires": "nothing"}},
                {"name": "optional", "match": {"path": {"prefix": "/optional"}}, "policy": {"allow_missing": true}},
            ],
            "default_policy": {},
        })
    }

    fn guard(config: &Value) -> Guard<JwtAuth> {
        Guard::from_json(config.to_string().as_bytes()).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn at<'a>(guard: &'a Guard<JwtAuth>, now: u64, path: &str, fields: &[(&str, &str)]) -> Outcome<'a> {
        let mut lines: Vec<FieldLine<'_>> = vec![(b":method", b"GET"), (b":path", path.as_bytes())];
        lines.extend(fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
        guard.on_request_headers(Some(&lines), &TestHost::default(), Some(UnixTime::from_seconds(now)))
    }

    fn bearer(token: &str) -> String {
        format!("Bearer {token}")
    }

    /// What the log says about a token in `authorization`; empty if it passes.
    fn finding(config: &Value, token: &str) -> String {
        let guard = guard(config);
        let outcome = at(&guard, NOW, "/", &[("authorization", &bearer(token))]);
        let Some(line) = outcome.log else { return String::new() };
        let response = outcome.response.expect("a denial");
        assert_eq!(response.status, 401, "{}", line.message);
        let challenge = response.fields.iter().find(|(name, _)| *name == "www-authenticate");
        assert_eq!(challenge.map(|(_, value)| value.as_str()), Some("Bearer error=\"invalid_token\""));
        line.message.split('"').nth(1).unwrap_or_default().to_owned()
    }

    #[track_caller]
    fn check(header: &Value, claims: &Value, expected: &str) {
        assert_eq!(finding(&config(), &sign(header, claims)), expected);
    }

    #[test]
    fn a_good_token_passes() {
        check(&good_header(), &good_claims(), "");
        check(&without(good_header(), "kid"), &good_claims(), "");
        check(&with(good_header(), "typ", json!("application/AT+JWT")), &good_claims(), "");
        check(&with(good_header(), "typ", json!("JWT")), &good_claims(), "");
        check(&with(good_header(), "b64", json!(true)), &good_claims(), "");
        check(&good_header(), &with(good_claims(), "aud", json!(["x", "orders"])), "");
    }

    #[test]
    fn a_header_that_is_not_what_it_must_be_is_refused() {
        let refused = |header: Value, finding: &str| check(&header, &good_claims(), finding);
        for alg in
            [json!("none"), json!("None"), json!("eddsa"), json!("ES512"), json!(""), json!(null), json!(["EdDSA"])]
        {
            refused(with(good_header(), "alg", alg), "the token's `alg` is not known");
        }
        refused(without(good_header(), "alg"), "the token's `alg` is not known");
        for alg in ["HS256", "RS256", "ES256"] {
            refused(with(good_header(), "alg", json!(alg)), "the key is not for the token's `alg`");
        }
        for crit in [json!(["exp"]), json!([]), json!(["b64"]), json!(null)] {
            refused(with(good_header(), "crit", crit), "the header has `crit`, and we understand no extension");
        }
        for b64 in [json!(false), json!("true"), json!(null)] {
            refused(with(good_header(), "b64", b64), "the header has `b64` other than true");
        }
        for typ in [json!("dpop+jwt"), json!("secevent+jwt"), json!(""), json!(null), json!(1)] {
            refused(with(good_header(), "typ", typ), "the token's `typ` is not accepted");
        }
        refused(without(good_header(), "typ"), "the token's `typ` is not accepted");
        refused(with(good_header(), "kid", json!("other")), "no key fits the token's `kid` and `alg`");
        refused(with(good_header(), "kid", json!("../k")), "no key fits the token's `kid` and `alg`");
        for kid in [json!(1), json!(null), json!({})] {
            refused(with(good_header(), "kid", kid), "the token's `kid` is not a string");
        }
    }

    #[test]
    fn a_key_that_comes_with_the_token_is_not_looked_at() {
        for (name, value) in [
            ("jwk", key("k")),
            ("jku", json!("https://evil.example/jwks.json")),
            ("x5u", json!("https://evil.example/cert")),
            ("x5c", json!(["MII"])),
        ] {
            check(&with(good_header(), name, value.clone()), &good_claims(), "");
            let forged = with(with(good_header(), name, value), "kid", json!("evil"));
            check(&forged, &good_claims(), "no key fits the token's `kid` and `alg`");
        }
    }

    #[test]
    fn claims_that_are_not_what_they_must_be_are_refused() {
        let refused = |claims: Value, finding: &str| check(&good_header(), &claims, finding);
        refused(without(good_claims(), "exp"), "a required claim is missing");
        refused(with(good_claims(), "exp", json!(null)), "a required claim is missing");
        refused(with(good_claims(), "exp", json!((NOW + 300).to_string())), "a date claim is not a date");
        refused(with(good_claims(), "exp", json!(-1)), "a date claim is not a date");
        refused(with(good_claims(), "exp", json!(NOW - 60)), "the token has expired");
        refused(with(good_claims(), "nbf", json!(NOW + 61)), "the token is not yet valid");
        refused(with(good_claims(), "iat", json!(NOW + 61)), "the token was issued in the future");
        refused(without(good_claims(), "aud"), "the token is for another audience");
        refused(with(good_claims(), "aud", json!("billing")), "the token is for another audience");
        let unknown = "the token's `iss` is of no provider that this rule takes";
        refused(without(good_claims(), "iss"), unknown);
        refused(with(good_claims(), "iss", json!("https://a.example/")), unknown);
        refused(with(good_claims(), "iss", json!(["https://a.example"])), "a claim that must be a string is none");
        refused(with(good_claims(), "sub", json!(7)), "a claim that must be a string is none");
    }

    #[test]
    fn exp_that_no_json_number_can_be_is_refused() {
        for exp in ["1e400", "NaN", "Infinity", "0x7fffffff"] {
            let payload =
                URL_SAFE_NO_PAD.encode(format!(r#"{{"iss":"https://a.example","aud":"orders","exp":{exp}}}"#));
            let header = URL_SAFE_NO_PAD.encode(good_header().to_string());
            let finding = finding(&config(), &format!("{header}.{payload}.AAAA"));
            assert_eq!(finding, "the claims are not a JSON object, or have a name twice", "{exp}");
        }
    }

    #[test]
    fn a_token_altered_after_signing_is_refused() {
        let token = sign(&good_header(), &good_claims());
        let parts: Vec<&str> = token.split('.').collect();
        let other = sign(&good_header(), &with(good_claims(), "sub", json!("root")));
        let other_parts: Vec<&str> = other.split('.').collect();
        for forged in [
            format!("{}.{}.{}", parts[0], other_parts[1], parts[2]),
            format!("{}.{}.{}", parts[0], parts[1], other_parts[2]),
            format!("{}.{}.", parts[0], parts[1]),
        ] {
            assert_eq!(finding(&config(), &forged), "the signature is wrong");
        }
        assert_eq!(finding(&config(), &format!("{token}=")), "a part of the token is not base64url");
    }

    #[test]
    fn a_providers_own_demands_hold() {
        let mut strict = config();
        strict["providers"]["a"]["max_lifetime"] = json!("5m");
        strict["providers"]["a"]["require_claims"] = json!(["sub", "jti"]);
        strict["providers"]["a"]["token_type"] = json!(["JWT"]);
        let header = with(good_header(), "typ", json!("jwt"));
        let claims = with(with(good_claims(), "iat", json!(NOW)), "jti", json!("t-1"));
        assert_eq!(finding(&strict, &sign(&header, &claims)), "");
        assert_eq!(finding(&strict, &sign(&good_header(), &claims)), "the token's `typ` is not accepted");
        assert_eq!(finding(&strict, &sign(&header, &without(claims.clone(), "jti"))), "a required claim is missing");
        assert_eq!(
            finding(&strict, &sign(&header, &with(claims, "iat", json!(NOW - 1)))),
            "the token lives longer than it may"
        );
    }

    #[test]
    fn what_is_waived_by_name_is_waived() {
        let mut lax = config();
        let provider = lax["providers"]["a"].as_object_mut().expect("an object");
        provider.remove("audiences");
        for name in
            ["dangerously_accept_any_audience", "dangerously_allow_missing_token_type", "dangerously_allow_missing_exp"]
        {
            provider.insert(name.into(), json!(true));
        }
        let (header, claims) = (json!({"alg": "EdDSA"}), json!({"iss": "https://a.example"}));
        assert_eq!(finding(&lax, &sign(&header, &claims)), "");
        assert_eq!(finding(&lax, &sign(&header, &with(claims, "exp", json!(NOW - 60)))), "the token has expired");
    }

    #[test]
    fn no_token_a_malformed_one_and_two_are_told_apart() {
        let guard = guard(&config());
        let status = |fields: &[(&str, &str)]| {
            let response = at(&guard, NOW, "/", fields).response.expect("a denial");
            let challenge = response.fields.into_iter().find(|(name, _)| *name == "www-authenticate");
            (response.status, challenge.map(|(_, value)| value).unwrap_or_default())
        };
        let token = bearer(&sign(&good_header(), &good_claims()));
        assert_eq!(status(&[]), (401, "Bearer".into()));
        assert_eq!(status(&[("authorization", "Basic dTpw")]), (401, "Bearer".into()));
        assert_eq!(status(&[("authorization", "Bearer ")]), (400, "Bearer error=\"invalid_request\"".into()));
        let rejected = (401, "Bearer error=\"invalid_token\"".to_owned());
        assert_eq!(status(&[("authorization", &token), ("authorization", &token)]), rejected);
        assert_eq!(status(&[("authorization", &token), ("authorization", "Basic dTpw")]), rejected);
        assert_eq!(status(&[("authorization", &token), ("x-token", "x")]), rejected);
        assert_eq!(status(&[("authorization", &format!("{token} x"))]), rejected);
    }

    #[test]
    fn scopes_are_needed_all_of_them() {
        let guard = guard(&config());
        let status = |scope: Value| {
            let token = bearer(&sign(&good_header(), &with(good_claims(), "scope", scope)));
            at(&guard, NOW, "/s", &[("authorization", &token)]).response.map(|response| {
                assert!(response.fields.contains(&(
                    "www-authenticate",
                    "Bearer error=\"insufficient_scope\", scope=\"read admin\"".to_owned()
                )));
                response.status
            })
        };
        assert_eq!(status(json!("admin x read")), None);
        for scope in [json!("read"), json!("administer read"), json!(""), json!("READ ADMIN"), json!(null)] {
            assert_eq!(status(scope), Some(403));
        }
    }

    #[test]
    fn each_rule_takes_the_tokens_of_its_providers_where_they_may_be() {
        let guard = guard(&config());
        let a = sign(&good_header(), &good_claims());
        let b = sign(&good_header(), &with(good_claims(), "iss", json!("https://b.example")));
        let passes = |path: &str, field: &str, value: &str| at(&guard, NOW, path, &[(field, value)]).response.is_none();
        // Twice, so that a remembered token is judged like a new one.
        for _ in 0..2 {
            assert!(passes("/", "authorization", &bearer(&a)));
            assert!(passes("/", "x-token", &b));
            assert!(passes("/", "cookie", &format!("x=y; session={b}")));
            assert!(passes("/a", "authorization", &bearer(&a)));
            assert!(!passes("/", "x-token", &a), "a's tokens must not be there");
            assert!(!passes("/", "authorization", &bearer(&b)), "b's tokens must not be there");
            assert!(!passes("/a", "authorization", &bearer(&b)));
            assert!(!passes("/a", "x-token", &b));
        }
    }

    #[test]
    fn an_open_rule_looks_at_nothing_and_an_optional_one_only_at_what_is_there() {
        let guard = guard(&config());
        assert_eq!(at(&guard, NOW, "/open", &[("authorization", "Bearer rubbish")]).response, None);
        assert_eq!(at(&guard, NOW, "/optional", &[]).response, None);
        assert!(at(&guard, NOW, "/optional", &[("authorization", "Bearer rubbish")]).response.is_some());
        let forged = at(&guard, NOW, "/optional", &[("x-email", "root@example.com"), ("x-portcullis-sub", "root")]);
        let removed = ["x-email", "x-portcullis-sub"].map(|name| FieldEdit::Remove(name.into()));
        assert_eq!((forged.field_edits, forged.properties), (removed.to_vec(), Vec::new()));
    }

    #[test]
    fn the_upstream_learns_who_the_client_is_and_does_not_get_the_token() {
        let guard = guard(&config());
        let claims = with(good_claims(), "email", json!("alice@example.com\r\nx-admin: 1"));
        let claims = with(with(claims, "groups", json!(["staff"])), "azp", json!("app"));
        let outcome = at(&guard, NOW, "/", &[("authorization", &bearer(&sign(&good_header(), &claims)))]);
        for edit in [
            FieldEdit::Remove("authorization".into()),
            FieldEdit::Set("x-email".into(), b"alice@example.com%0D%0Ax-admin: 1".to_vec()),
            FieldEdit::Set("x-portcullis-sub".into(), b"alice".to_vec()),
            FieldEdit::Set("x-portcullis-client-id".into(), b"app".to_vec()),
            FieldEdit::Set("x-portcullis-scopes".into(), b"read write".to_vec()),
            FieldEdit::Set("x-portcullis-groups".into(), b"[\"staff\"]".to_vec()),
            FieldEdit::Set("x-portcullis-issuer".into(), b"https://a.example".to_vec()),
            FieldEdit::Set("x-portcullis-method".into(), b"jwt".to_vec()),
        ] {
            assert!(outcome.field_edits.contains(&edit), "{edit:?} in {:?}", outcome.field_edits);
        }
        assert!(outcome.properties.contains(&("portcullis.identity.sub", b"alice".to_vec())));
    }

    #[test]
    fn a_cookie_that_held_the_token_goes_alone() {
        let mut config = config();
        config["providers"]["b"]["forward"] = json!(false);
        let guard = guard(&config);
        let b = sign(&good_header(), &with(good_claims(), "iss", json!("https://b.example")));
        let edits = |cookie: &str| at(&guard, NOW, "/", &[("cookie", cookie)]).field_edits;
        assert!(
            edits(&format!("a=1; session={b}; c=2")).contains(&FieldEdit::Set("cookie".into(), b"a=1; c=2".to_vec()))
        );
        assert!(edits(&format!("session={b}")).contains(&FieldEdit::Remove("cookie".into())));
    }

    #[test]
    fn a_remembered_token_expires_like_a_new_one() {
        let guard = guard(&config());
        let token = bearer(&sign(&good_header(), &good_claims()));
        let passes = |now: u64| at(&guard, now, "/", &[("authorization", &token)]).response.is_none();
        assert!(passes(NOW));
        assert!(passes(NOW + 359));
        assert!(!passes(NOW + 360));
    }

    #[test]
    fn rubbish_that_looks_like_a_token_is_told_to_come_back_and_known_tokens_still_pass() {
        let mut config = config();
        config["signature_checks_per_second"] = json!(2);
        let guard = guard(&config);
        let good = sign(&good_header(), &good_claims());
        let status = |now: u64, token: &str| {
            at(&guard, now, "/", &[("authorization", &bearer(token))]).response.map(|r| r.status)
        };
        assert_eq!(status(NOW, &good), None);
        let rubbish = format!("{}.AAAA", good.rsplit_once('.').expect("three parts").0);
        assert_eq!(status(NOW, &rubbish), Some(401));
        assert_eq!(status(NOW, &rubbish), Some(503));
        assert_eq!(status(NOW, &good), None, "a remembered token needs no check");
        assert_eq!(status(NOW + 1, &rubbish), Some(401));
    }

    #[test]
    fn a_finding_of_ours_is_all_that_the_log_says_of_a_token() {
        let guard = guard(&config());
        let outcome = at(&guard, NOW, "/", &[("authorization", "Bearer HUNTER2")]);
        let line = outcome.log.expect("a line").message;
        assert_eq!(
            line,
            "jwt-auth: denied: rule=default reason=credentials_rejected finding=\"the token has not exactly three parts\""
        );
        assert!(!format!("{guard:?}").contains("11qYAYKx"), "no key either");
    }

    proptest! {
        /// Parts that a parser likes, in any order, with anything in between.
        #[test]
        fn survives_any_request(
            path in "/[a-z%./;0-9]{0,12}",
            pieces in proptest::collection::vec(prop_oneof![
                Just(b"Bearer ".to_vec()),
                Just(b".".to_vec()),
                Just(URL_SAFE_NO_PAD.encode(good_header().to_string()).into_bytes()),
                Just(URL_SAFE_NO_PAD.encode(good_claims().to_string()).into_bytes()),
                Just(b"session=".to_vec()),
                Just(b"; ".to_vec()),
                proptest::collection::vec(any::<u8>(), 0..70),
            ], 0..8),
            name in prop_oneof![Just("authorization"), Just("x-token"), Just("cookie"), Just("x-portcullis-sub")],
        ) {
            let guard = guard(&config());
            let value = pieces.concat();
            let lines: [FieldLine<'_>; 3] = [(b":method", b"GET"), (b":path", path.as_bytes()), (name.as_bytes(), &value)];
            let outcome = guard.on_request_headers(Some(&lines), &TestHost::default(), Some(UnixTime::from_seconds(NOW)));
            let open = path.starts_with("/open") || path.starts_with("/optional");
            prop_assert!(outcome.response.is_some() || open, "nobody passes without a good signature");
        }
    }
}
