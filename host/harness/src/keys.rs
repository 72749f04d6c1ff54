//! Private keys for minting: a JWK Set with private parts (RFC 7517, RFC 7518), or a key made on the spot.
//!
//! Signs with RS/PS 256-512, ES256, ES384, EdDSA (Ed25519) and HS 256-512. Only for tests: keys lie in the repository.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::rsa::KeyPairComponents;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
    RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding,
    RsaKeyPair,
};
use ring::{hmac, rand};
use serde::Deserialize;
use serde_json::{Value, json};

/// Why a key cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The file is not a JWK Set.
    #[error("not a JWK Set: {0}")]
    NotAJwkSet(String),
    /// No key of that `kid`.
    #[error("no key has the kid `{kid}`; there are {present}")]
    UnknownKid {
        /// The `kid` asked for.
        kid: String,
        /// What the file holds, for the message.
        present: String,
    },
    /// Several keys of that `kid`.
    #[error("{0} keys have the kid `{1}`")]
    AmbiguousKid(usize, String),
    /// A member is missing or is not base64url.
    #[error("the key's member `{0}` is missing or not base64url")]
    Member(&'static str),
    /// The numbers are no key.
    #[error("the key is refused: {0}")]
    Refused(String),
    /// Another kind of key.
    #[error("`kty` `{0}` with `crv` `{1}` cannot sign here; RSA, EC P-256 and P-384, OKP Ed25519 and oct can")]
    Unsupported(String, String),
    /// The algorithm does not go with the key.
    #[error("`{algorithm}` cannot be signed with {kind} key; it signs {possible}")]
    Algorithm {
        /// The algorithm asked for.
        algorithm: String,
        /// The kind of key, with its article.
        kind: &'static str,
        /// What the key can sign.
        possible: &'static str,
    },
}

/// A key that signs.
pub struct SigningKey {
    kind: Kind,
    kid: Option<String>,
}

enum Kind {
    Rsa(Box<RsaKeyPair>),
    P256(EcdsaKeyPair),
    P384(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Secret(Vec<u8>),
}

/// No part of a key is printed, not even of a test key.
impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").field("kind", &self.kind_name()).field("kid", &self.kid).finish()
    }
}

#[derive(Deserialize)]
struct JwkSet {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    d: Option<String>,
    p: Option<String>,
    q: Option<String>,
    dp: Option<String>,
    dq: Option<String>,
    qi: Option<String>,
    x: Option<String>,
    y: Option<String>,
    k: Option<String>,
}

impl SigningKey {
    /// The key called `kid` in the JWK Set `set`.
    pub fn from_jwk_set(set: &str, kid: &str) -> Result<SigningKey, KeyError> {
        let set: JwkSet = serde_json::from_str(set).map_err(|error| KeyError::NotAJwkSet(error.to_string()))?;
        let mut named = set.keys.iter().filter(|key| key.kid.as_deref() == Some(kid));
        match (named.next(), named.count()) {
            (Some(key), 0) => SigningKey::from_jwk(key),
            (Some(_), more) => Err(KeyError::AmbiguousKid(more + 1, kid.to_owned())),
            (None, _) => {
                let present: Vec<String> =
                    set.keys.iter().filter_map(|key| key.kid.as_ref()).map(|kid| format!("`{kid}`")).collect();
                let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
                Err(KeyError::UnknownKid { kid: kid.to_owned(), present })
            }
        }
    }

    /// Every key in the JWK Set `set`.
    pub fn all_from_jwk_set(set: &str) -> Result<Vec<SigningKey>, KeyError> {
        let set: JwkSet = serde_json::from_str(set).map_err(|error| KeyError::NotAJwkSet(error.to_string()))?;
        set.keys.iter().map(SigningKey::from_jwk).collect()
    }

    /// A shared secret, for HMAC.
    pub fn from_secret(secret: impl Into<Vec<u8>>) -> SigningKey {
        SigningKey { kind: Kind::Secret(secret.into()), kid: None }
    }

    /// A new P-256 key that exists only in this process.
    pub fn generate_es256(kid: impl Into<String>) -> Result<SigningKey, KeyError> {
        let random = SystemRandom::new();
        let refused = |_| KeyError::Refused("no random numbers".to_owned());
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).map_err(refused)?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref(), &random)
            .map_err(|error| KeyError::Refused(error.to_string()))?;
        Ok(SigningKey { kind: Kind::P256(pair), kid: Some(kid.into()) })
    }

    fn from_jwk(jwk: &Jwk) -> Result<SigningKey, KeyError> {
        let refused = |error: ring::error::KeyRejected| KeyError::Refused(error.to_string());
        let random = SystemRandom::new();
        let kind = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => {
                let components = KeyPairComponents {
                    public_key: ring::rsa::PublicKeyComponents {
                        n: member("n", jwk.n.as_ref())?,
                        e: member("e", jwk.e.as_ref())?,
                    },
                    d: member("d", jwk.d.as_ref())?,
                    p: member("p", jwk.p.as_ref())?,
                    q: member("q", jwk.q.as_ref())?,
                    dP: member("dp", jwk.dp.as_ref())?,
                    dQ: member("dq", jwk.dq.as_ref())?,
                    qInv: member("qi", jwk.qi.as_ref())?,
                };
                Kind::Rsa(Box::new(RsaKeyPair::from_components(&components).map_err(refused)?))
            }
            ("EC", Some(curve @ ("P-256" | "P-384"))) => {
                let algorithm =
                    if curve == "P-256" { &ECDSA_P256_SHA256_FIXED_SIGNING } else { &ECDSA_P384_SHA384_FIXED_SIGNING };
                // The uncompressed point of SEC 1, section 2.3.3.
                let mut point = vec![4];
                point.extend(member("x", jwk.x.as_ref())?);
                point.extend(member("y", jwk.y.as_ref())?);
                let scalar = member("d", jwk.d.as_ref())?;
                let pair = EcdsaKeyPair::from_private_key_and_public_key(algorithm, &scalar, &point, &random)
                    .map_err(refused)?;
                if curve == "P-256" { Kind::P256(pair) } else { Kind::P384(pair) }
            }
            ("OKP", Some("Ed25519")) => {
                let (seed, public) = (member("d", jwk.d.as_ref())?, member("x", jwk.x.as_ref())?);
                Kind::Ed25519(Ed25519KeyPair::from_seed_and_public_key(&seed, &public).map_err(refused)?)
            }
            ("oct", _) => Kind::Secret(member("k", jwk.k.as_ref())?),
            (kty, crv) => {
                return Err(KeyError::Unsupported(kty.to_owned(), crv.unwrap_or_default().to_owned()));
            }
        };
        Ok(SigningKey { kind, kid: jwk.kid.clone() })
    }

    /// The key's name, if it has one.
    pub fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// Signs `message` with the JWS algorithm called `algorithm` (RFC 7518, section 3.1; RFC 8037).
    pub fn sign(&self, algorithm: &str, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let random = SystemRandom::new();
        let mismatch = || KeyError::Algorithm {
            algorithm: algorithm.to_owned(),
            kind: self.kind_name(),
            possible: match self.kind {
                Kind::Rsa(_) => "RS256, RS384, RS512, PS256, PS384 and PS512",
                Kind::P256(_) => "ES256",
                Kind::P384(_) => "ES384",
                Kind::Ed25519(_) => "EdDSA",
                Kind::Secret(_) => "HS256, HS384 and HS512",
            },
        };
        let unspecified = |_| KeyError::Refused("the signature could not be made".to_owned());
        match &self.kind {
            Kind::Rsa(pair) => {
                let encoding: &'static dyn RsaEncoding = match algorithm {
                    "RS256" => &RSA_PKCS1_SHA256,
                    "RS384" => &RSA_PKCS1_SHA384,
                    "RS512" => &RSA_PKCS1_SHA512,
                    "PS256" => &RSA_PSS_SHA256,
                    "PS384" => &RSA_PSS_SHA384,
                    "PS512" => &RSA_PSS_SHA512,
                    _ => return Err(mismatch()),
                };
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(encoding, &random, message, &mut signature).map_err(unspecified)?;
                Ok(signature)
            }
            Kind::P256(pair) if algorithm == "ES256" => ecdsa(pair, &random, message),
            Kind::P384(pair) if algorithm == "ES384" => ecdsa(pair, &random, message),
            Kind::Ed25519(pair) if algorithm == "EdDSA" || algorithm == "Ed25519" => {
                Ok(pair.sign(message).as_ref().to_vec())
            }
            Kind::Secret(secret) => {
                let algorithm = match algorithm {
                    "HS256" => hmac::HMAC_SHA256,
                    "HS384" => hmac::HMAC_SHA384,
                    "HS512" => hmac::HMAC_SHA512,
                    _ => return Err(mismatch()),
                };
                Ok(hmac::sign(&hmac::Key::new(algorithm, secret), message).as_ref().to_vec())
            }
            _ => Err(mismatch()),
        }
    }

    /// A token in compact serialisation (RFC 7515, section 3.1), signed with the header's `alg`.
    pub fn token(&self, header: &Value, claims: &Value) -> Result<String, KeyError> {
        let algorithm = header.get("alg").and_then(Value::as_str).unwrap_or_default();
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let signature = self.sign(algorithm, signed.as_bytes())?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// The public half as a JWK; a shared secret has none.
    pub fn public_jwk(&self) -> Option<Value> {
        let mut jwk = match &self.kind {
            Kind::Rsa(pair) => {
                let public = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({ "kty": "RSA", "n": URL_SAFE_NO_PAD.encode(public.n), "e": URL_SAFE_NO_PAD.encode(public.e) })
            }
            Kind::P256(pair) | Kind::P384(pair) => {
                let (_, coordinates) = pair.public_key().as_ref().split_first()?;
                let (x, y) = coordinates.split_at(coordinates.len() / 2);
                let curve = if matches!(self.kind, Kind::P256(_)) { "P-256" } else { "P-384" };
                json!({ "kty": "EC", "crv": curve, "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y) })
            }
            Kind::Ed25519(pair) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(pair.public_key()) })
            }
            Kind::Secret(_) => return None,
        };
        if let (Some(kid), Some(members)) = (&self.kid, jwk.as_object_mut()) {
            members.insert("kid".to_owned(), Value::from(kid.as_str()));
        }
        Some(jwk)
    }

    /// The public half as PEM (RFC 7468, section 13): what an attacker takes for an HMAC secret when a verifier
    /// lets the token choose the algorithm. A shared secret has none.
    pub fn public_pem(&self) -> Option<String> {
        let spki = match &self.kind {
            Kind::Rsa(pair) => {
                let key = der(0x30, &[&RSA_ENCRYPTION[..], &bit_string(pair.public_key().as_ref())].concat());
                return Some(pem(&key));
            }
            Kind::P256(pair) => [&EC_P256[..], &bit_string(pair.public_key().as_ref())].concat(),
            Kind::P384(pair) => [&EC_P384[..], &bit_string(pair.public_key().as_ref())].concat(),
            Kind::Ed25519(pair) => [&ED25519[..], &bit_string(pair.public_key().as_ref())].concat(),
            Kind::Secret(_) => return None,
        };
        Some(pem(&der(0x30, &spki)))
    }

    fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::Rsa(_) => "an RSA",
            Kind::P256(_) => "a P-256",
            Kind::P384(_) => "a P-384",
            Kind::Ed25519(_) => "an Ed25519",
            Kind::Secret(_) => "a shared",
        }
    }
}

fn ecdsa(pair: &EcdsaKeyPair, random: &dyn rand::SecureRandom, message: &[u8]) -> Result<Vec<u8>, KeyError> {
    pair.sign(random, message)
        .map(|signature| signature.as_ref().to_vec())
        .map_err(|_| KeyError::Refused("the signature could not be made".to_owned()))
}

fn member(name: &'static str, value: Option<&String>) -> Result<Vec<u8>, KeyError> {
    value.and_then(|value| URL_SAFE_NO_PAD.decode(value).ok()).ok_or(KeyError::Member(name))
}

// `AlgorithmIdentifier`s in DER (RFC 3279, section 2.3; RFC 5480, section 2.1; RFC 8410, section 3).
const RSA_ENCRYPTION: [u8; 15] =
    [0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
const EC_P256: [u8; 21] = [
    0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03,
    0x01, 0x07,
];
const EC_P384: [u8; 18] =
    [0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
const ED25519: [u8; 7] = [0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70];

fn bit_string(bytes: &[u8]) -> Vec<u8> {
    der(0x03, &[&[0], bytes].concat())
}

/// One DER element; lengths up to 65,535, which no public key exceeds.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let [.., high, low] = content.len().to_be_bytes();
    let mut element = match content.len() {
        0..0x80 => vec![tag, low],
        0x80..0x100 => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    element.extend_from_slice(content);
    element
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN PUBLIC KEY-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem.push_str("-----END PUBLIC KEY-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use ring::signature::{ECDSA_P256_SHA256_FIXED, ED25519 as ED25519_VERIFY, UnparsedPublicKey};

    use super::*;

    /// The key and the signature of RFC 8037, appendices A.1 and A.4.
    #[test]
    fn signs_as_rfc_8037_shows() {
        let set = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a",
            "d":"nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
        let key = SigningKey::from_jwk_set(set, "a").unwrap();
        let signature = key.sign("EdDSA", b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc").unwrap();
        assert_eq!(
            URL_SAFE_NO_PAD.encode(signature),
            "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
        );
        assert_eq!(
            key.public_pem().unwrap(),
            "-----BEGIN PUBLIC KEY-----\n\
             MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n\
             -----END PUBLIC KEY-----\n"
        );
        let public = key.public_jwk().unwrap();
        assert_eq!(public["x"], "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
        assert!(public.get("d").is_none());
        assert!(UnparsedPublicKey::new(&ED25519_VERIFY, b"").verify(b"", b"").is_err());
    }

    #[test]
    fn a_generated_key_signs_what_its_public_half_verifies() {
        let key = SigningKey::generate_es256("k1").unwrap();
        let public = key.public_jwk().unwrap();
        let mut point = vec![4];
        for name in ["x", "y"] {
            point.extend(URL_SAFE_NO_PAD.decode(public[name].as_str().unwrap()).unwrap());
        }
        let signature = key.sign("ES256", b"message").unwrap();
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(b"message", &signature).unwrap();
        assert_eq!(public["kid"], "k1");
        let token = key.token(&json!({ "alg": "ES256" }), &json!({ "sub": "a" })).unwrap();
        let (signed, signature) = token.rsplit_once('.').unwrap();
        assert_eq!(signed, "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0");
        assert_eq!(URL_SAFE_NO_PAD.decode(signature).unwrap().len(), 64);
    }

    #[test]
    fn says_what_is_wrong_with_a_key() {
        let check = |set: &str, kid: &str, expected: &str| {
            assert_eq!(SigningKey::from_jwk_set(set, kid).unwrap_err().to_string(), expected);
        };
        check(r#"{"keys":[{"kty":"oct","kid":"a","k":"AA"}]}"#, "b", "no key has the kid `b`; there are `a`");
        check(
            r#"{"keys":[{"kty":"oct","kid":"a","k":"AA"},{"kty":"oct","kid":"a","k":"AQ"}]}"#,
            "a",
            "2 keys have the kid `a`",
        );
        check(r#"{"keys":[{"kty":"oct","kid":"a"}]}"#, "a", "the key's member `k` is missing or not base64url");
        check(
            r#"{"keys":[{"kty":"EC","crv":"P-521","kid":"a"}]}"#,
            "a",
            "`kty` `EC` with `crv` `P-521` cannot sign here; RSA, EC P-256 and P-384, OKP Ed25519 and oct can",
        );
        let secret = SigningKey::from_secret("s");
        assert_eq!(
            secret.sign("RS256", b"").unwrap_err().to_string(),
            "`RS256` cannot be signed with a shared key; it signs HS256, HS384 and HS512"
        );
        assert!(secret.public_jwk().is_none());
    }

    #[test]
    fn debug_shows_no_key() {
        assert_eq!(
            format!("{:?}", SigningKey::from_secret("hunter2")),
            r#"SigningKey { kind: "a shared", kid: None }"#
        );
    }
}
