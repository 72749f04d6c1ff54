//! The keys of a provider (JWK, RFC 7517; RFC 7518, section 6; RFC 8037), read from the configuration.
//!
//! A key says which algorithms it may be used with, once, when it is read. A token's `alg` selects among these and never
//! adds one, so an RSA key is never taken for a shared secret, whatever a token says.

use std::collections::BTreeSet;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::VerifyingKey;
use jsonwebtoken::DecodingKey;
use jsonwebtoken::crypto::{JwtVerifier, rust_crypto};
use portcullis_kit::config_error::{ConfigErrors, JsonPath};
use portcullis_kit::secret::Secret;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::signature::der;
use crate::verify::Unverified;

/// A signature algorithm (RFC 7518, section 3.1; RFC 8037, section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "the names are those of the RFCs")]
pub enum Algorithm {
    HS256,
    HS384,
    HS512,
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}

impl Algorithm {
    const ALL: [Self; 12] = {
        use Algorithm::*;
        [HS256, HS384, HS512, RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA]
    };

    /// The name, as in a token's `alg`.
    pub fn name(self) -> &'static str {
        use Algorithm::*;
        match self {
            HS256 => "HS256",
            HS384 => "HS384",
            HS512 => "HS512",
            RS256 => "RS256",
            RS384 => "RS384",
            RS512 => "RS512",
            PS256 => "PS256",
            PS384 => "PS384",
            PS512 => "PS512",
            ES256 => "ES256",
            ES384 => "ES384",
            EdDSA => "EdDSA",
        }
    }

    /// The algorithm of this name; names are case-sensitive.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    /// Whether it works with a shared secret. Such an algorithm must be asked for by name: who can check a token can
    /// then also make one.
    pub fn is_symmetric(self) -> bool {
        matches!(self, Self::HS256 | Self::HS384 | Self::HS512)
    }

    fn library(self) -> jsonwebtoken::Algorithm {
        use jsonwebtoken::Algorithm as Library;
        match self {
            Self::HS256 => Library::HS256,
            Self::HS384 => Library::HS384,
            Self::HS512 => Library::HS512,
            Self::RS256 => Library::RS256,
            Self::RS384 => Library::RS384,
            Self::RS512 => Library::RS512,
            Self::PS256 => Library::PS256,
            Self::PS384 => Library::PS384,
            Self::PS512 => Library::PS512,
            Self::ES256 => Library::ES256,
            Self::ES384 => Library::ES384,
            Self::EdDSA => Library::EdDSA,
        }
    }

    /// What a key for this algorithm is called in messages.
    fn needs(self) -> &'static str {
        match self {
            Self::HS256 | Self::HS384 | Self::HS512 => "a shared secret",
            Self::RS256 | Self::RS384 | Self::RS512 | Self::PS256 | Self::PS384 | Self::PS512 => "an RSA key",
            Self::ES256 => "a P-256 key",
            Self::ES384 => "a P-384 key",
            Self::EdDSA => "an Ed25519 key",
        }
    }
}

/// A JWK Set (RFC 7517, section 5), as the issuer publishes it.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct JwksConfig {
    /// The keys. Those that are not for signatures (`use`, `key_ops`) are passed over.
    pub keys: Vec<JwkConfig>,
}

/// A key. Members that are not listed here are passed over, as RFC 7517 (section 4) demands.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct JwkConfig {
    /// The key type: `RSA`, `EC`, `OKP` or `oct`.
    pub kty: String,
    /// The key's id; a token's `kid` selects by it.
    pub kid: Option<String>,
    /// What the key is for; `sig` or absent.
    #[serde(rename = "use")]
    pub usage: Option<String>,
    /// What may be done with the key; contains `verify`, or absent.
    pub key_ops: Option<Vec<String>>,
    /// The one algorithm of the key. Absent: all algorithms of the provider that fit its type.
    pub alg: Option<String>,
    /// The curve: `P-256`, `P-384` or `Ed25519`.
    pub crv: Option<String>,
    /// The modulus of an RSA key.
    pub n: Option<String>,
    /// The exponent of an RSA key.
    pub e: Option<String>,
    /// The x coordinate, or an Ed25519 key.
    pub x: Option<String>,
    /// The y coordinate.
    pub y: Option<String>,
    /// A shared secret: at least as long as the hash of its algorithm (RFC 7518, section 3.2).
    pub k: Option<Secret>,
    /// A private key. It does not belong here, and the configuration is refused.
    pub d: Option<Secret>,
}

/// A key that signatures can be checked with.
pub struct Key {
    kid: Option<String>,
    verifiers: Vec<(Algorithm, Box<dyn JwtVerifier>)>,
    /// The public key for the host's `verify_signature`, if it knows the key's type.
    spki: Option<Vec<u8>>,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let algorithms: Vec<Algorithm> = self.verifiers.iter().map(|(algorithm, _)| *algorithm).collect();
        f.debug_struct("Key").field("kid", &self.kid).field("algorithms", &algorithms).finish_non_exhaustive()
    }
}

impl Key {
    /// The pure-Rust verifier for an algorithm, if the key is for that algorithm.
    pub fn verifier(&self, algorithm: Algorithm) -> Option<&dyn JwtVerifier> {
        self.verifiers.iter().find(|(own, _)| *own == algorithm).map(|(_, verifier)| verifier.as_ref())
    }

    /// The public key as the host's `verify_signature` takes it (SubjectPublicKeyInfo, RFC 5280).
    pub fn spki(&self) -> Option<&[u8]> {
        self.spki.as_deref()
    }
}

/// The keys of one provider.
#[derive(Debug)]
pub struct Keys(Vec<Key>);

impl Keys {
    /// The one key for a token. If the token has no `kid`, or no key has that `kid` and some have none, the algorithm
    /// must leave exactly one: to try several would multiply what rubbish costs us.
    pub fn select(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<&Key, Unverified> {
        if let Some(key) = self.0.iter().find(|key| kid.is_some() && key.kid.as_deref() == kid) {
            return if key.verifier(algorithm).is_some() { Ok(key) } else { Err(Unverified::AlgorithmNotOfKey) };
        }
        let fits = |key: &&Key| (kid.is_none() || key.kid.is_none()) && key.verifier(algorithm).is_some();
        let mut fitting = self.0.iter().filter(fits);
        match (fitting.next(), fitting.next()) {
            (Some(key), None) => Ok(key),
            (Some(_), Some(_)) => Err(Unverified::KeyAmbiguous),
            (None, _) => Err(Unverified::KeyUnknown),
        }
    }
}

/// More keys than this are refused: no issuer has so many, and each takes memory in every worker.
const KEYS_MAX: usize = 100;

/// Bits of an RSA modulus: fewer can be factored (RFC 7518, section 3.3); more cost too much time, and the library
/// takes no more.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=4096;

impl JwksConfig {
    /// Checks the keys. `named` are the algorithms of the configuration, if it names any.
    pub fn compile(
        self,
        named: Option<&[Algorithm]>,
        provider_at: &JsonPath,
        errors: &mut ConfigErrors,
    ) -> Option<Keys> {
        let before = errors.len();
        let keys_at = provider_at.key("jwks_inline").key("keys");
        if self.keys.len() > KEYS_MAX {
            errors.push(&keys_at, format!("{} keys, and at most {KEYS_MAX} are taken", self.keys.len()));
        }
        let accepted: Vec<Algorithm> = match named {
            Some(named) => named.to_vec(),
            None => Algorithm::ALL.into_iter().filter(|algorithm| !algorithm.is_symmetric()).collect(),
        };
        let mut kids = BTreeSet::new();
        let mut keys = Vec::new();
        for (index, jwk) in self.keys.into_iter().enumerate() {
            let at = keys_at.index(index);
            let for_signatures = jwk.usage.as_deref().is_none_or(|usage| usage == "sig")
                && jwk.key_ops.as_ref().is_none_or(|ops| ops.iter().any(|op| op == "verify"));
            if !for_signatures {
                continue;
            }
            if let Some(kid) = &jwk.kid
                && !kids.insert(kid.clone())
            {
                let hint = "a `kid` must tell one key";
                errors.push_with_hint(&at.key("kid"), format!("another key has the `kid` `{kid}` too"), hint);
            }
            keys.extend(jwk.compile(&accepted, &at, errors));
        }
        if errors.len() == before && keys.is_empty() {
            errors.push_with_hint(&keys_at, "there is no key for signatures", "give the issuer's public keys");
        }
        if errors.len() == before {
            for (index, algorithm) in named.unwrap_or_default().iter().enumerate() {
                if !keys.iter().any(|key: &Key| key.verifier(*algorithm).is_some()) {
                    let problem =
                        format!("`{}` needs {}, but no key is one for it", algorithm.name(), algorithm.needs());
                    errors.push_with_hint(
                        &provider_at.key("algorithms").index(index),
                        problem,
                        "add such a key, or leave the algorithm out",
                    );
                }
            }
        }
        (errors.len() == before).then_some(Keys(keys))
    }
}

/// A key's material, checked.
struct Material {
    key: DecodingKey,
    fits: Vec<Algorithm>,
    spki: Option<Vec<u8>>,
}

impl JwkConfig {
    fn compile(self, accepted: &[Algorithm], at: &JsonPath, errors: &mut ConfigErrors) -> Option<Key> {
        if self.d.is_some() {
            let hint = "this is a private key: take it out, treat it as disclosed, and give the public part only";
            errors.push_with_hint(&at.key("d"), "a private key has no place here", hint);
            return None;
        }
        let before = errors.len();
        let material = match self.kty.as_str() {
            "RSA" => self.rsa(at, errors),
            "EC" => self.ec(at, errors),
            "OKP" => self.ed25519(at, errors),
            "oct" => self.secret(at, errors),
            other => {
                let hint = "known here: `RSA`, `EC`, `OKP`, `oct`";
                errors.push_with_hint(&at.key("kty"), format!("unknown key type `{other}`"), hint);
                None
            }
        }?;
        let own = match self.alg.as_deref().map(|alg| (alg, Algorithm::from_name(alg))) {
            None => None,
            Some((_, Some(algorithm))) if material.fits.contains(&algorithm) => Some(algorithm),
            Some((alg, _)) => {
                errors.push(&at.key("alg"), format!("`{alg}` is not an algorithm for this key"));
                return None;
            }
        };
        let usable: Vec<Algorithm> =
            material.fits.iter().copied().filter(|a| own.is_none_or(|own| own == *a) && accepted.contains(a)).collect();
        if usable.is_empty() {
            let hint = match material.fits.first() {
                Some(algorithm) if algorithm.is_symmetric() => {
                    format!(
                        "shared secrets are used only if asked for by name: add `{}` to `algorithms`",
                        algorithm.name()
                    )
                }
                _ => "remove the key, or add an algorithm for it to `algorithms`".to_owned(),
            };
            errors.push_with_hint(at, "this provider accepts no algorithm that the key is for", hint);
        }
        let mut verifiers = Vec::new();
        for algorithm in usable {
            match (rust_crypto::DEFAULT_PROVIDER.verifier_factory)(&algorithm.library(), &material.key) {
                Ok(verifier) => verifiers.push((algorithm, verifier)),
                Err(_) => errors.push(at, "this is not a point on the curve"),
            }
        }
        (errors.len() == before).then_some(Key { kid: self.kid, verifiers, spki: material.spki })
    }

    fn rsa(&self, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Material> {
        use Algorithm::*;
        let (n, e) = (bytes(self.n.as_deref(), "n", at, errors), bytes(self.e.as_deref(), "e", at, errors));
        let (n, e) = (without_leading_zeros(n?), without_leading_zeros(e?));
        let bits = n.len() * 8 - n.first().map_or(0, |byte| byte.leading_zeros() as usize);
        if !RSA_BITS.contains(&bits) {
            let (least, most) = (RSA_BITS.start(), RSA_BITS.end());
            errors.push(&at.key("n"), format!("the modulus has {bits} bits; {least} to {most} are taken"));
            return None;
        }
        // An exponent of 1 would make every signature a good one. The library takes up to 33 bits.
        let odd = |number: &[u8]| number.last().is_some_and(|byte| byte % 2 == 1);
        if !odd(&n) || !odd(&e) || e == [1] || e.len() > 4 {
            errors.push(at, "`n` and `e` are not an RSA public key");
            return None;
        }
        Some(Material {
            key: DecodingKey::from_rsa_raw_components(&n, &e),
            fits: vec![RS256, RS384, RS512, PS256, PS384, PS512],
            spki: Some(der::rsa_public_key(&n, &e)),
        })
    }

    fn ec(&self, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Material> {
        let (algorithm, curve, length) = match self.crv.as_deref() {
            Some("P-256") => (Algorithm::ES256, der::Curve::P256, 32),
            Some("P-384") => (Algorithm::ES384, der::Curve::P384, 48),
            other => {
                let problem = format!("unknown curve `{}`", other.unwrap_or_default());
                errors.push_with_hint(&at.key("crv"), problem, "known here for `EC`: `P-256`, `P-384`");
                return None;
            }
        };
        let (x, y) = (bytes(self.x.as_deref(), "x", at, errors), bytes(self.y.as_deref(), "y", at, errors));
        let (x, y) = (exactly(x?, length, "x", at, errors), exactly(y?, length, "y", at, errors));
        let point = [&[4], x?.as_slice(), y?.as_slice()].concat();
        let spki = Some(der::ec_public_key(curve, &point));
        Some(Material { key: DecodingKey::from_ec_der(&point), fits: vec![algorithm], spki })
    }

    fn ed25519(&self, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Material> {
        if self.crv.as_deref() != Some("Ed25519") {
            let problem = format!("unknown curve `{}`", self.crv.as_deref().unwrap_or_default());
            errors.push_with_hint(&at.key("crv"), problem, "known here for `OKP`: `Ed25519`");
            return None;
        }
        // The library would panic on a shorter one.
        let x = exactly(bytes(self.x.as_deref(), "x", at, errors)?, 32, "x", at, errors)?;
        // For a point of small order anybody can make signatures (RFC 8032, section 5.1.7, asks only for cofactored
        // checks; the library does not look).
        let point = <[u8; 32]>::try_from(x.as_slice()).ok().and_then(|x| VerifyingKey::from_bytes(&x).ok());
        if point.is_some_and(|point| point.is_weak()) {
            errors.push(&at.key("x"), "this point has small order: anybody could sign for it");
        }
        Some(Material { key: DecodingKey::from_ed_der(&x), fits: vec![Algorithm::EdDSA], spki: None })
    }

    fn secret(&self, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Material> {
        use Algorithm::*;
        let secret = bytes(self.k.as_ref().map(Secret::expose), "k", at, errors)?;
        // RFC 7518, section 3.2: at least as long as the hash.
        let fits: Vec<Algorithm> = [(HS256, 32), (HS384, 48), (HS512, 64)]
            .into_iter()
            .filter(|(_, least)| secret.len() >= *least)
            .map(|(a, _)| a)
            .collect();
        if fits.is_empty() {
            let hint =
                "a secret is at least as long as the hash: 32 random bytes for `HS256`, 48 for `HS384`, 64 for `HS512`";
            errors.push_with_hint(&at.key("k"), format!("the secret has only {} bytes", secret.len()), hint);
            return None;
        }
        Some(Material { key: DecodingKey::from_secret(&secret), fits, spki: None })
    }
}

fn bytes(text: Option<&str>, name: &str, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Vec<u8>> {
    let Some(text) = text else {
        errors.push(at, format!("`{name}` is missing"));
        return None;
    };
    let decoded = URL_SAFE_NO_PAD.decode(text).ok().filter(|bytes| !bytes.is_empty());
    if decoded.is_none() {
        errors.push_with_hint(
            &at.key(name),
            "this is not base64url",
            "JWKs use the alphabet `A-Z a-z 0-9 - _` without `=`",
        );
    }
    decoded
}

fn exactly(bytes: Vec<u8>, length: usize, name: &str, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Vec<u8>> {
    if bytes.len() != length {
        errors.push(&at.key(name), format!("{} bytes, where the curve has {length}", bytes.len()));
        return None;
    }
    Some(bytes)
}

fn without_leading_zeros(mut number: Vec<u8>) -> Vec<u8> {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number.drain(..zeros);
    number
}
