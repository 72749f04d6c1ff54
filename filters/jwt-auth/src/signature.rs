//! Checks a signature: by the host's `verify_signature` where there is one, else in pure Rust within a budget.
//!
//! Envoy and our own host have the function. It takes RSASSA-PKCS1-v1_5 and ECDSA, the latter with signatures in DER;
//! for RSASSA-PSS, EdDSA and HMAC it has nothing. A host without it says so once, and is not asked again.
//!
//! From `jsonwebtoken` come the pure-Rust verifiers and nothing else. Its own reading of tokens is laxer than ours: it
//! passes `crit` and `b64` over, takes a missing `aud` and an `iss` that is a list for good, and a token in the second of
//! its `exp`; the tests in [`token`](crate::token), [`claims`](crate::claims) and [`policy`](crate::policy) hold us to
//! the stricter reading.

use std::cell::Cell;

use portcullis_kit::host::{ForeignCallError, Host};
use portcullis_kit::time::UnixTime;

use crate::budget::Budget;
use crate::jwks::{Algorithm, Key};
use crate::verify::Unverified;

/// Checks signatures, and remembers what the host can do.
#[derive(Debug)]
pub struct Checker {
    budget: Budget,
    host_lacks_function: Cell<bool>,
}

impl Checker {
    /// A checker that makes so many costly checks per second in pure Rust.
    pub fn new(checks_per_second: u32) -> Self {
        Self { budget: Budget::new(checks_per_second), host_lacks_function: Cell::new(false) }
    }

    /// Whether `signature` is one over `signed` by `key`.
    pub fn check(
        &self,
        (key, algorithm): (&Key, Algorithm),
        signed: &[u8],
        signature: &[u8],
        host: &dyn Host,
        now: UnixTime,
    ) -> Result<(), Unverified> {
        let verifier = key.verifier(algorithm).ok_or(Unverified::AlgorithmNotOfKey)?;
        let good = match self.ask_host(key, algorithm, signed, signature, host) {
            Some(good) => good,
            None => {
                // An HMAC costs as little as the hash that the cache needs anyway.
                if !algorithm.is_symmetric() && !self.budget.take(now) {
                    return Err(Unverified::TooManyChecks);
                }
                // The trait of the library takes a `Vec`.
                verifier.verify(signed, &signature.to_vec()).is_ok()
            }
        };
        if good { Ok(()) } else { Err(Unverified::SignatureWrong) }
    }

    /// The host's answer; `None` if it has none to give.
    fn ask_host(
        &self,
        key: &Key,
        algorithm: Algorithm,
        signed: &[u8],
        signature: &[u8],
        host: &dyn Host,
    ) -> Option<bool> {
        use Algorithm::*;
        if self.host_lacks_function.get() {
            return None;
        }
        let (hash, signature) = match algorithm {
            RS256 => ("sha256", signature.to_vec()),
            RS384 => ("sha384", signature.to_vec()),
            RS512 => ("sha512", signature.to_vec()),
            // A signature of the wrong length is none; the pure path says so too, at no cost.
            ES256 => ("sha256", der::ecdsa_signature(signature, 64)?),
            ES384 => ("sha384", der::ecdsa_signature(signature, 96)?),
            HS256 | HS384 | HS512 | PS256 | PS384 | PS512 | EdDSA => return None,
        };
        let argument = protobuf::arguments(hash, key.spki()?, &signature, signed);
        match host.call_foreign_function("verify_signature", &argument) {
            Ok(result) => Some(protobuf::result(&result)),
            Err(ForeignCallError::Absent) => {
                self.host_lacks_function.set(true);
                None
            }
            Err(ForeignCallError::Refused) => None,
        }
    }
}

/// The messages of `verify_signature` (Protocol Buffers encoding).
mod protobuf {
    /// `{1: hash_function, 2: public_key, 3: signature, 4: text}`.
    pub(super) fn arguments(hash: &str, spki: &[u8], signature: &[u8], signed: &[u8]) -> Vec<u8> {
        const LENGTH_DELIMITED: u8 = 2;
        let mut message = Vec::with_capacity(signed.len() + signature.len() + spki.len() + 32);
        for (field, value) in [(1, hash.as_bytes()), (2, spki), (3, signature), (4, signed)] {
            message.push(field << 3 | LENGTH_DELIMITED);
            push_varint(&mut message, value.len());
            message.extend_from_slice(value);
        }
        message
    }

    fn push_varint(message: &mut Vec<u8>, mut value: usize) {
        while value >= 0x80 {
            message.push((value & 0x7f | 0x80).to_le_bytes()[0]);
            value >>= 7;
        }
        message.push(value.to_le_bytes()[0]);
    }

    /// `{1: bool result, 2: string error}`: field 1 is written first, and only if it is true.
    pub(super) fn result(message: &[u8]) -> bool {
        message.starts_with(&[0x08, 0x01])
    }
}

/// Distinguished Encoding Rules (ITU-T X.690), as far as keys and signatures need them.
pub mod der {
    /// A curve that `verify_signature` knows.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Curve {
        /// NIST P-256.
        P256,
        /// NIST P-384.
        P384,
    }

    const INTEGER: u8 = 0x02;
    const BIT_STRING: u8 = 0x03;
    const SEQUENCE: u8 = 0x30;
    /// OBJECT IDENTIFIER 1.2.840.113549.1.1.1, and NULL for its parameters.
    const RSA_ENCRYPTION: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
    /// OBJECT IDENTIFIER 1.2.840.10045.2.1.
    const EC_PUBLIC_KEY: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
    /// OBJECT IDENTIFIER 1.2.840.10045.3.1.7.
    const PRIME256V1: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
    /// OBJECT IDENTIFIER 1.3.132.0.34.
    const SECP384R1: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];

    /// An RSA public key as SubjectPublicKeyInfo (RFC 5280, section 4.1; RFC 3279, section 2.3.1).
    pub fn rsa_public_key(n: &[u8], e: &[u8]) -> Vec<u8> {
        let key = element(SEQUENCE, &[unsigned(n), unsigned(e)].concat());
        public_key(RSA_ENCRYPTION, &key)
    }

    /// An EC public key as SubjectPublicKeyInfo (RFC 5480, section 2); the point is uncompressed.
    pub fn ec_public_key(curve: Curve, point: &[u8]) -> Vec<u8> {
        let parameters = match curve {
            Curve::P256 => PRIME256V1,
            Curve::P384 => SECP384R1,
        };
        public_key(&[EC_PUBLIC_KEY, parameters].concat(), point)
    }

    /// An ECDSA signature as a sequence of two integers (RFC 3279, section 2.2.3), from the two numbers side by side
    /// (RFC 7518, section 3.4). `None` if it has not this length.
    pub fn ecdsa_signature(signature: &[u8], length: usize) -> Option<Vec<u8>> {
        let (r, s) = signature.split_at_checked(length / 2).filter(|_| signature.len() == length)?;
        Some(element(SEQUENCE, &[unsigned(r), unsigned(s)].concat()))
    }

    fn public_key(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
        let algorithm = element(SEQUENCE, algorithm);
        // No bits of the last byte are unused.
        let key = element(BIT_STRING, &[&[0], key].concat());
        element(SEQUENCE, &[algorithm, key].concat())
    }

    /// An INTEGER that is not negative, in as few bytes as can be.
    fn unsigned(number: &[u8]) -> Vec<u8> {
        let zeros = number.iter().take_while(|byte| **byte == 0).count();
        let digits = number.get(zeros..).unwrap_or_default();
        let sign = if digits.first().is_none_or(|first| first & 0x80 != 0) { &[0][..] } else { &[] };
        element(INTEGER, &[sign, digits].concat())
    }

    fn element(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = content.len().to_be_bytes();
        let zeros = length.iter().take_while(|byte| **byte == 0).count();
        let digits = length.get(zeros..).unwrap_or_default();
        let mut element = vec![tag];
        match digits {
            [] => element.push(0),
            [short] if *short < 0x80 => element.push(*short),
            // A usize has at most eight digits of this kind.
            long => {
                element.push(0x80 | long.len().to_le_bytes()[0]);
                element.extend_from_slice(long);
            }
        }
        element.extend_from_slice(content);
        element
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use p256::ecdsa::signature::Verifier as _;
    use portcullis_kit::config_error::{ConfigErrors, JsonPath};
    use portcullis_kit::testing::TestHost;
    use rsa::pkcs8::DecodePublicKey;
    use serde_json::{Value, json};
    use sha2::{Digest, Sha256, Sha384, Sha512};

    use super::*;
    use crate::jwks::Keys;

    const NOW: UnixTime = UnixTime::from_seconds(1_700_000_000);

    /// A host whose `verify_signature` does what Envoy's does, by crates that read DER themselves.
    pub(crate) fn host_with_function() -> TestHost {
        TestHost::default().with_function("verify_signature", |argument| {
            let [hash, spki, signature, text] = arguments(argument);
            let good = match hash.as_slice() {
                _ if !spki.starts_with(&[0x30]) => return Err(ForeignCallError::Refused),
                b"sha256" if p256::ecdsa::VerifyingKey::from_public_key_der(&spki).is_ok() => {
                    let key = p256::ecdsa::VerifyingKey::from_public_key_der(&spki).expect("a key");
                    p256::ecdsa::DerSignature::try_from(signature.as_slice())
                        .is_ok_and(|s| key.verify(&text, &s).is_ok())
                }
                b"sha384" if p384::ecdsa::VerifyingKey::from_public_key_der(&spki).is_ok() => {
                    let key = p384::ecdsa::VerifyingKey::from_public_key_der(&spki).expect("a key");
                    p384::ecdsa::DerSignature::try_from(signature.as_slice())
                        .is_ok_and(|s| key.verify(&text, &s).is_ok())
                }
                hash => {
                    let key = rsa::RsaPublicKey::from_public_key_der(&spki).expect("a key");
                    let (scheme, digest) = match hash {
                        b"sha256" => (rsa::Pkcs1v15Sign::new::<Sha256>(), Sha256::digest(&text).to_vec()),
                        b"sha384" => (rsa::Pkcs1v15Sign::new::<Sha384>(), Sha384::digest(&text).to_vec()),
                        b"sha512" => (rsa::Pkcs1v15Sign::new::<Sha512>(), Sha512::digest(&text).to_vec()),
                        other => panic!("unknown hash {other:?}"),
                    };
                    key.verify(scheme, &digest, &signature).is_ok()
                }
            };
            Ok(if good { vec![8, 1] } else { [&[0x12, 3][..], b"bad"].concat() })
        })
    }

    /// Reads the message as any Protocol Buffers decoder would: fields 1 to 4, each once.
    fn arguments(mut message: &[u8]) -> [Vec<u8>; 4] {
        let mut fields: [Vec<u8>; 4] = Default::default();
        while let Some((tag, rest)) = message.split_first() {
            assert_eq!(tag & 7, 2, "length-delimited");
            let (mut length, mut shift, mut rest) = (0, 0, rest);
            loop {
                let (byte, after) = rest.split_first().expect("a varint");
                length |= usize::from(byte & 0x7f) << shift;
                (shift, rest) = (shift + 7, after);
                if byte & 0x80 == 0 {
                    break;
                }
            }
            let (value, after) = rest.split_at(length);
            fields[usize::from(tag >> 3) - 1] = value.to_vec();
            message = after;
        }
        fields
    }

    fn keys(algorithms: &[Algorithm]) -> Keys {
        let mut set: Value = serde_json::from_str(include_str!("../testdata/keys.json")).expect("JSON");
        for key in set["keys"].as_array_mut().expect("an array") {
            key.as_object_mut().expect("an object").remove("d");
        }
        let mut errors = ConfigErrors::new("jwt-auth");
        let jwks: crate::jwks::JwksConfig = serde_json::from_value(set).expect("a JWK Set");
        jwks.compile(Some(algorithms), &JsonPath::default(), &mut errors).unwrap_or_else(|| panic!("{errors}"))
    }

    fn all_keys() -> Keys {
        use Algorithm::*;
        keys(&[HS256, HS384, HS512, RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA])
    }

    fn decode(part: &str) -> Vec<u8> {
        URL_SAFE_NO_PAD.decode(part).expect("base64url")
    }

    /// Published vectors, as algorithm, `kid`, signed text and signature.
    fn vectors() -> Vec<(Algorithm, String, String, Vec<u8>)> {
        let vectors: Value = serde_json::from_str(include_str!("../testdata/vectors.json")).expect("JSON");
        let text = |vector: &Value, name: &str| vector[name].as_str().expect("text").to_owned();
        let algorithm = |vector| Algorithm::from_name(&text(vector, "alg")).expect("an algorithm");
        let compact = vectors["compact"].as_array().expect("an array").iter().map(|vector| {
            let token = text(vector, "token");
            let (signed, signature) = token.rsplit_once('.').expect("three parts");
            (algorithm(vector), text(vector, "kid"), signed.to_owned(), decode(signature))
        });
        let raw = vectors["raw"].as_array().expect("an array").iter().map(|vector| {
            (algorithm(vector), text(vector, "kid"), text(vector, "signed"), decode(&text(vector, "signature")))
        });
        compact.chain(raw).collect()
    }

    #[test]
    fn published_signatures_are_good_and_altered_ones_are_not_on_both_paths() {
        let keys = all_keys();
        assert_eq!(vectors().len(), 7);
        for host in [TestHost::default(), host_with_function()] {
            let checker = Checker::new(1_000);
            for (algorithm, kid, signed, signature) in vectors() {
                let key = keys.select(Some(&kid), algorithm).expect("the key");
                let check = |signed: &str, signature: &[u8]| {
                    checker.check((key, algorithm), signed.as_bytes(), signature, &host, NOW)
                };
                assert_eq!(check(&signed, &signature), Ok(()), "{algorithm:?}");
                assert_eq!(check(&format!("{signed}x"), &signature), Err(Unverified::SignatureWrong), "{algorithm:?}");
                for altered in altered(&signature) {
                    assert_eq!(
                        check(&signed, &altered),
                        Err(Unverified::SignatureWrong),
                        "{algorithm:?} {altered:02x?}"
                    );
                }
            }
        }
    }

    /// Signatures that are none: empty, cut, longer, with a bit turned, all zero (CVE-2022-21449), doubled.
    fn altered(signature: &[u8]) -> Vec<Vec<u8>> {
        let mut turned = signature.to_vec();
        turned[signature.len() / 2] ^= 1;
        let mut last = signature.to_vec();
        *last.last_mut().expect("not empty") ^= 1;
        vec![
            Vec::new(),
            signature[1..].to_vec(),
            signature[..signature.len() - 1].to_vec(),
            [&[0], signature].concat(),
            [signature, &[0]].concat(),
            turned,
            last,
            vec![0; signature.len()],
            vec![0xff; signature.len()],
            [signature, signature].concat(),
        ]
    }

    #[test]
    fn the_host_is_asked_for_what_it_can_do_and_not_again_once_it_lacks_the_function() {
        let keys = all_keys();
        let (with, without) = (host_with_function(), TestHost::default());
        let (with_checker, without_checker) = (Checker::new(1_000), Checker::new(1_000));
        for (algorithm, kid, signed, signature) in vectors() {
            let key = keys.select(Some(&kid), algorithm).expect("the key");
            let pair = (key, algorithm);
            assert_eq!(with_checker.check(pair, signed.as_bytes(), &signature, &with, NOW), Ok(()));
            assert_eq!(without_checker.check(pair, signed.as_bytes(), &signature, &without, NOW), Ok(()));
        }
        assert_eq!(with.foreign_calls(), 3, "RS256, ES256 and ES384; not PS384, EdDSA and HS256");
        assert_eq!(without.foreign_calls(), 1);
    }

    #[test]
    fn an_answer_that_is_not_true_is_no_yes() {
        for (answer, good) in [
            (&[8, 1][..], true),
            (&[8, 1, 0x12, 0], true),
            (&[], false),
            (&[8, 0], false),
            (&[8], false),
            (&[1], false),
            (&[0x12, 2, 8, 1], false),
        ] {
            assert_eq!(protobuf::result(answer), good, "{answer:?}");
        }
        let (algorithm, kid, signed, signature) = vectors().swap_remove(1);
        let keys = all_keys();
        let key = keys.select(Some(&kid), algorithm).expect("the key");
        let liar = TestHost::default().with_function("verify_signature", |_| Ok(Vec::new()));
        let checker = Checker::new(1_000);
        assert_eq!(
            checker.check((key, algorithm), signed.as_bytes(), &signature, &liar, NOW),
            Err(Unverified::SignatureWrong)
        );
        let refusing = TestHost::default().with_function("verify_signature", |_| Err(ForeignCallError::Refused));
        assert_eq!(
            checker.check((key, algorithm), signed.as_bytes(), &signature, &refusing, NOW),
            Ok(()),
            "checked in pure Rust"
        );
    }

    #[test]
    fn costly_checks_in_pure_rust_have_a_budget_and_others_have_none() {
        let keys = all_keys();
        let vectors = vectors();
        let check = |checker: &Checker, host: &TestHost, index: usize| {
            let (algorithm, kid, signed, signature) = &vectors[index];
            let key = keys.select(Some(kid), *algorithm).expect("the key");
            checker.check((key, *algorithm), signed.as_bytes(), signature, host, NOW)
        };
        let (without, with) = (TestHost::default(), host_with_function());
        let checker = Checker::new(1);
        assert_eq!(check(&checker, &without, 1), Ok(()));
        assert_eq!(check(&checker, &without, 1), Err(Unverified::TooManyChecks));
        assert_eq!(check(&checker, &without, 0), Ok(()), "HS256");
        let checker = Checker::new(1);
        assert_eq!([check(&checker, &with, 1), check(&checker, &with, 1)], [Ok(()), Ok(())]);
    }

    #[test]
    fn a_key_is_only_for_the_algorithms_of_its_type() {
        let keys = all_keys();
        for (kid, algorithm) in [
            ("rsa-1", Algorithm::HS256),
            ("rsa-1", Algorithm::ES256),
            ("es256-1", Algorithm::ES384),
            ("es256-1", Algorithm::RS256),
            ("ed25519-1", Algorithm::ES256),
            ("hs-1", Algorithm::RS256),
            ("hs-2", Algorithm::HS512),
        ] {
            let selected = keys.select(Some(kid), algorithm).map(|_| ());
            assert_eq!(selected, Err(Unverified::AlgorithmNotOfKey), "{kid} {algorithm:?}");
        }
    }

    #[test]
    fn a_token_without_kid_needs_exactly_one_key_that_fits() {
        let keys = all_keys();
        assert!(keys.select(None, Algorithm::ES384).is_ok());
        assert_eq!(keys.select(None, Algorithm::ES256).map(|_| ()), Err(Unverified::KeyAmbiguous));
        assert_eq!(keys.select(Some("nobody"), Algorithm::ES384).map(|_| ()), Err(Unverified::KeyUnknown));
        let only_ec = keys.select(None, Algorithm::HS512).map(|_| ());
        assert_eq!(only_ec, Ok(()), "only one secret is long enough");
    }

    #[test]
    fn integers_in_der_are_as_short_as_can_be_and_not_negative() {
        let zero = [0; 64];
        assert_eq!(der::ecdsa_signature(&zero, 64), Some(vec![0x30, 6, 2, 1, 0, 2, 1, 0]));
        let mut signature = [0; 64];
        (signature[31], signature[32]) = (1, 0x80);
        let der = der::ecdsa_signature(&signature, 64).expect("64 bytes");
        assert_eq!(der[..8], [0x30, 38, 2, 1, 1, 2, 33, 0]);
        assert_eq!((der[8], der.len()), (0x80, 40));
        assert_eq!(der::ecdsa_signature(&zero[1..], 64), None);
        assert_eq!(der::ecdsa_signature(&[0; 96], 64), None);
    }

    #[test]
    fn lengths_in_der_have_one_spelling() {
        // 2048 bits: the lengths of key, bit string and sequence take two bytes each; read back by another reader.
        let (n, e) = ([0xc5; 256], [1, 0, 1]);
        let key = rsa::RsaPublicKey::from_public_key_der(&der::rsa_public_key(&n, &e)).expect("a key");
        assert_eq!(rsa::traits::PublicKeyParts::n(&key).to_bytes_be(), n);
        assert_eq!(rsa::traits::PublicKeyParts::e(&key).to_bytes_be(), e);
        assert_eq!(json!(der::ec_public_key(der::Curve::P256, &[4; 65]).len()), json!(91));
    }
}
