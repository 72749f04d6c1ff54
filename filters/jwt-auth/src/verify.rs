//! Puts the checks of a token together. A [`Verified`] token is one that passed all of them: nothing else makes one.

use std::time::Duration;

use portcullis_kit::host::Host;
use portcullis_kit::time::UnixTime;
use serde_json::{Map, Value};

use crate::claims::{self, Times};
use crate::jwks::{Algorithm, Keys};
use crate::signature::Checker;
use crate::token::{Compact, Source};

/// What a provider's tokens must be, and what becomes of them.
#[derive(Debug)]
pub struct Provider {
    /// What the configuration calls it.
    pub name: String,
    /// The `iss` of its tokens.
    pub issuer: String,
    /// Those that a token may be for; `None` if that does not matter.
    pub audiences: Option<Vec<String>>,
    /// The values of `typ` that are taken, in lower case and without `application/`.
    pub token_types: Vec<String>,
    /// Whether a token without `typ` is taken.
    pub token_type_may_miss: bool,
    /// The keys.
    pub keys: Keys,
    /// By how much our clock and the issuer's may differ.
    pub clock_skew: Duration,
    /// Claims that a token must have.
    pub required_claims: Vec<String>,
    /// How long a token may live from `iat` to `exp`.
    pub lifetime_max: Option<Duration>,
    /// Where the provider's tokens may be.
    pub sources: Vec<Source>,
    /// Claim and field name: what is written into the request.
    pub claims_to_headers: Vec<(String, String)>,
    /// Whether the upstream gets the token.
    pub forward: bool,
}

/// A token that passed every check. Whether it is still valid is asked again whenever it is used.
#[derive(Debug)]
pub struct Verified {
    provider: usize,
    claims: Map<String, Value>,
    times: Times,
}

impl Verified {
    /// The position of the provider that vouches for it.
    pub fn provider(&self) -> usize {
        self.provider
    }

    /// What it claims.
    pub fn claims(&self) -> &Map<String, Value> {
        &self.claims
    }

    /// Whether it is valid now.
    pub fn check_times(&self, providers: &[Provider], now: UnixTime) -> Result<(), Unverified> {
        let provider = providers.get(self.provider).ok_or(Unverified::IssuerUnknown)?;
        self.times.check(now, provider.clock_skew)
    }

    /// A token for tests of what holds verified tokens without looking at them.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        let claims = Map::new();
        let times = Times::read(&claims).expect("no claims, no faults");
        Self { provider: 0, claims, times }
    }
}

/// Why a token is not accepted. The log gets the finding, the client only that it is so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "`finding` says what each means")]
pub enum Unverified {
    TooLong,
    NotThreeParts,
    NotBase64url,
    HeaderNotAnObject,
    ClaimsNotAnObject,
    CriticalHeader,
    PayloadNotEncoded,
    TypeNotAccepted,
    AlgorithmNotAccepted,
    AlgorithmNotOfKey,
    KeyIdNotAString,
    KeyUnknown,
    KeyAmbiguous,
    SignatureWrong,
    IssuerUnknown,
    AudienceMismatch,
    ClaimMissing,
    NotADate,
    NotAString,
    Expired,
    NotYetValid,
    IssuedInTheFuture,
    LivesTooLong,
    SourceNotOfProvider,
    TooManyChecks,
}

impl Unverified {
    /// What the log says.
    pub fn finding(self) -> &'static str {
        match self {
            Self::TooLong => "the token is too long",
            Self::NotThreeParts => "the token has not exactly three parts",
            Self::NotBase64url => "a part of the token is not base64url",
            Self::HeaderNotAnObject => "the header is not a JSON object, or has a name twice",
            Self::ClaimsNotAnObject => "the claims are not a JSON object, or have a name twice",
            Self::CriticalHeader => "the header has `crit`, and we understand no extension",
            Self::PayloadNotEncoded => "the header has `b64` other than true",
            Self::TypeNotAccepted => "the token's `typ` is not accepted",
            Self::AlgorithmNotAccepted => "the token's `alg` is not known",
            Self::AlgorithmNotOfKey => "the key is not for the token's `alg`",
            Self::KeyIdNotAString => "the token's `kid` is not a string",
            Self::KeyUnknown => "no key fits the token's `kid` and `alg`",
            Self::KeyAmbiguous => "several keys fit, and the token's `kid` does not tell which",
            Self::SignatureWrong => "the signature is wrong",
            Self::IssuerUnknown => "the token's `iss` is of no provider that this rule takes",
            Self::AudienceMismatch => "the token is for another audience",
            Self::ClaimMissing => "a required claim is missing",
            Self::NotADate => "a date claim is not a date",
            Self::NotAString => "a claim that must be a string is none",
            Self::Expired => "the token has expired",
            Self::NotYetValid => "the token is not yet valid",
            Self::IssuedInTheFuture => "the token was issued in the future",
            Self::LivesTooLong => "the token lives longer than it may",
            Self::SourceNotOfProvider => "the token is where its provider's tokens must not be",
            Self::TooManyChecks => "there were too many signatures to check",
        }
    }
}

/// Verifies a token against the providers whose positions are `accepted`.
///
/// What costs least is checked first: the signature last. Nothing is believed in between, since a token that fails
/// any check is refused all the same.
pub fn verify(
    token: &[u8],
    providers: &[Provider],
    accepted: &[usize],
    checker: &Checker,
    host: &dyn Host,
    now: UnixTime,
) -> Result<Verified, Unverified> {
    let Compact { header, claims, signed, signature } = Compact::parse(token)?;
    let algorithm = read_header(&header)?;
    let issuer = claims::string(&claims, "iss")?.ok_or(Unverified::IssuerUnknown)?;
    let (index, provider) = accepted
        .iter()
        .filter_map(|index| Some((*index, providers.get(*index)?)))
        .find(|(_, provider)| provider.issuer == issuer)
        .ok_or(Unverified::IssuerUnknown)?;
    provider.check_type(&header)?;
    let times = provider.check_claims(&claims, now)?;
    let kid = match header.get("kid") {
        None => None,
        Some(Value::String(kid)) => Some(kid.as_str()),
        Some(_) => return Err(Unverified::KeyIdNotAString),
    };
    let key = provider.keys.select(kid, algorithm)?;
    checker.check((key, algorithm), signed, &signature, host, now)?;
    Ok(Verified { provider: index, claims, times })
}

/// `jku`, `jwk`, `x5u`, `x5c` and their like are passed over: a key that comes with a token proves nothing about it.
fn read_header(header: &Map<String, Value>) -> Result<Algorithm, Unverified> {
    // RFC 7515, section 4.1.11: who does not understand all that is critical must refuse, and we understand none.
    if header.contains_key("crit") {
        return Err(Unverified::CriticalHeader);
    }
    // RFC 7797 demands that `b64` be critical, but a reader that does not know it would check another text than we.
    if header.get("b64").is_some_and(|b64| *b64 != Value::Bool(true)) {
        return Err(Unverified::PayloadNotEncoded);
    }
    header.get("alg").and_then(Value::as_str).and_then(Algorithm::from_name).ok_or(Unverified::AlgorithmNotAccepted)
}

impl Provider {
    /// RFC 8725, section 3.11: an explicit type keeps tokens made for another purpose out.
    fn check_type(&self, header: &Map<String, Value>) -> Result<(), Unverified> {
        let taken = match header.get("typ") {
            None => self.token_type_may_miss,
            Some(Value::String(typ)) => {
                let typ = typ.to_ascii_lowercase();
                let typ = typ.strip_prefix("application/").unwrap_or(&typ);
                self.token_types.iter().any(|taken| taken == typ)
            }
            Some(_) => false,
        };
        if taken { Ok(()) } else { Err(Unverified::TypeNotAccepted) }
    }

    fn check_claims(&self, claims: &Map<String, Value>, now: UnixTime) -> Result<Times, Unverified> {
        for name in ["sub", "jti", "client_id", "azp", "acr"] {
            claims::string(claims, name)?;
        }
        if self.required_claims.iter().any(|name| claims.get(name).is_none_or(Value::is_null)) {
            return Err(Unverified::ClaimMissing);
        }
        if self.audiences.as_ref().is_some_and(|audiences| !claims::is_for_one_of(claims, audiences)) {
            return Err(Unverified::AudienceMismatch);
        }
        let times = Times::read(claims)?;
        times.check(now, self.clock_skew)?;
        self.lifetime_max.map_or(Ok(()), |lifetime_max| times.check_lifetime(lifetime_max))?;
        Ok(times)
    }
}
