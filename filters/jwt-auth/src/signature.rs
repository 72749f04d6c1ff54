//! Checks a signature: by the host's `verify_signature` where there is one, else in pure Rust within a budget.
//!
//! Envoy and our own host have the function. It takes RSASSA-PKCS1-v1_5 and ECDSA, the latter with signatures in DER;
//! for RSASSA-PSS, EdDSA and HMAC it has nothing. A host without it says so once, and is not asked again.

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
