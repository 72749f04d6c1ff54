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
use crate::config::{PolicyConfig, Requires, Settings, is_scope};
use crate::signature::Checker;
use crate::token::{self, Found, Source, Unfound};
use crate::verify::{Provider, Unverified, Verified, verify};

/// The filter: providers, and what was learnt about tokens so far.
#[derive(Debug)]
pub struct JwtAuth {
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
        let before = errors.len();
        let root = JsonPath::default();
        let (provider_names, providers) = Settings::compile_providers(settings.providers, errors);
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
        (errors.len() == before).then(|| Self {
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
            match self.provider_names.iter().position(|known| known == name) {
                Some(provider) => providers.push(provider),
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
