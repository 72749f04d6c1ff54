//! The foreign functions `verify_signature` and `sign`: public-key operations on the host's own CPU.
//!
//! A signature check in a guest costs tens of times what it costs here, so guests ask the host where it offers this. What
//! is asked and answered are protobuf messages, Envoy's. As measured there: RSASSA-PKCS1-v1_5, and ECDSA with P-256 and
//! P-384 and signatures in DER; no RSA-PSS, no EdDSA, no HMAC. Unlike Envoy, no SHA-224.

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA384_ASN1, ECDSA_P384_SHA256_ASN1,
    ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
    RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY, RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
    RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384,
    RSA_PKCS1_SHA512, RsaEncoding, RsaKeyPair, UnparsedPublicKey, VerificationAlgorithm,
};
use spki::der::{Decode, Document};
use spki::{ObjectIdentifier, SubjectPublicKeyInfoRef};

use crate::abi::Status;
use crate::protobuf;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");

/// Envoy's words, which guests may look at.
const BAD_KEY: &str = "Failed to initialize digest verify.";
const BAD_SIGNATURE: &str = "Failed to verify digest. Error code: 0";
const BAD_SIGNING_KEY: &str = "Failed to initialize digest sign.";

/// `{1: hash_function, 2: public_key (DER), 3: signature, 4: text, 5: public_key_pem}` to `{1: result, 2: error}`.
pub(crate) fn verify(argument: &[u8]) -> Result<Vec<u8>, Status> {
    let [hash, der, signature, text, pem] = fields(argument, [1, 2, 3, 4, 5])?;
    let key = one_key(der, pem, "PUBLIC KEY")?;
    Ok(match check(hash, key.as_deref(), signature, text) {
        Ok(()) => encode(true, None, ""),
        Err(error) => encode(false, None, &error),
    })
}

fn check(hash: &[u8], key: Option<&[u8]>, signature: &[u8], text: &[u8]) -> Result<(), String> {
    let hash = hash_name(hash)?;
    let key = key.and_then(|key| SubjectPublicKeyInfoRef::from_der(key).ok()).ok_or(BAD_KEY)?;
    let bits = key.subject_public_key.as_bytes().ok_or(BAD_KEY)?;
    let curve = || key.algorithm.parameters_oid().ok();
    let algorithm: &'static dyn VerificationAlgorithm = match (key.algorithm.oid, hash) {
        (RSA, "sha1") => &RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY,
        (RSA, "sha256") => &RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
        (RSA, "sha384") => &RSA_PKCS1_2048_8192_SHA384,
        (RSA, "sha512") => &RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY,
        (EC, "sha256") if curve() == Some(P256) => &ECDSA_P256_SHA256_ASN1,
        (EC, "sha384") if curve() == Some(P256) => &ECDSA_P256_SHA384_ASN1,
        (EC, "sha256") if curve() == Some(P384) => &ECDSA_P384_SHA256_ASN1,
        (EC, "sha384") if curve() == Some(P384) => &ECDSA_P384_SHA384_ASN1,
        _ => return Err(BAD_KEY.into()),
    };
    UnparsedPublicKey::new(algorithm, bits).verify(text, signature).map_err(|_| BAD_SIGNATURE.into())
}

/// `{1: hash_function, 2: private_key (PKCS #8 DER), 3: text, 4: private_key_pem}` to `{1: result, 2: signature, 3: error}`.
pub(crate) fn sign(argument: &[u8]) -> Result<Vec<u8>, Status> {
    let [hash, der, text, pem] = fields(argument, [1, 2, 3, 4])?;
    let key = one_key(der, pem, "PRIVATE KEY")?;
    Ok(match make(hash, key.as_deref(), text) {
        Ok(signature) => encode(true, Some(&signature), ""),
        Err(error) => encode(false, Some(&[]), &error),
    })
}

fn make(hash: &[u8], key: Option<&[u8]>, text: &[u8]) -> Result<Vec<u8>, String> {
    let hash = hash_name(hash)?;
    let key = key.ok_or(BAD_SIGNING_KEY)?;
    let random = SystemRandom::new();
    if let Ok(pair) = RsaKeyPair::from_pkcs8(key) {
        let encoding: &'static dyn RsaEncoding = match hash {
            "sha256" => &RSA_PKCS1_SHA256,
            "sha384" => &RSA_PKCS1_SHA384,
            "sha512" => &RSA_PKCS1_SHA512,
            _ => return Err(BAD_SIGNING_KEY.into()),
        };
        let mut signature = vec![0; pair.public().modulus_len()];
        pair.sign(encoding, &random, text, &mut signature).map_err(|_| BAD_SIGNING_KEY)?;
        return Ok(signature);
    }
    let algorithm: &'static EcdsaSigningAlgorithm = match hash {
        "sha256" => &ECDSA_P256_SHA256_ASN1_SIGNING,
        "sha384" => &ECDSA_P384_SHA384_ASN1_SIGNING,
        _ => return Err(BAD_SIGNING_KEY.into()),
    };
    let pair = EcdsaKeyPair::from_pkcs8(algorithm, key, &random).map_err(|_| BAD_SIGNING_KEY)?;
    let signature = pair.sign(&random, text).map_err(|_| BAD_SIGNING_KEY)?;
    Ok(signature.as_ref().to_vec())
}

fn hash_name(hash: &[u8]) -> Result<&'static str, String> {
    let name = String::from_utf8_lossy(hash);
    ["sha1", "sha256", "sha384", "sha512"]
        .into_iter()
        .find(|known| name.eq_ignore_ascii_case(known))
        .ok_or_else(|| format!("{name} is not supported."))
}

/// Exactly one of the two forms must be given; `None` is a key that cannot be read.
fn one_key(der: &[u8], pem: &[u8], label: &str) -> Result<Option<Vec<u8>>, Status> {
    match (der.is_empty(), pem.is_empty()) {
        (true, true) | (false, false) => Err(Status::BadArgument),
        (false, true) => Ok(Some(der.to_vec())),
        (true, false) => {
            let document = std::str::from_utf8(pem).ok().and_then(|pem| Document::from_pem(pem).ok());
            Ok(document.filter(|(found, _)| *found == label).map(|(_, document)| document.into_vec()))
        }
    }
}

fn fields<const N: usize>(message: &[u8], numbers: [u64; N]) -> Result<[&[u8]; N], Status> {
    protobuf::length_delimited(message, numbers).map_err(|_| Status::BadArgument)
}

/// `result`, then the signature if the message has one, then the error.
fn encode(result: bool, signature: Option<&[u8]>, error: &str) -> Vec<u8> {
    let mut out = Vec::new();
    if result {
        protobuf::push_number(&mut out, 1, 1);
    }
    let error_number = if signature.is_some() { 3 } else { 2 };
    for (number, contents) in [(2, signature.unwrap_or_default()), (error_number, error.as_bytes())] {
        if !contents.is_empty() {
            protobuf::push_bytes(&mut out, number, contents);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use ring::signature::KeyPair;

    use super::*;

    fn message(fields: &[(u8, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, contents) in fields {
            out.push(number << 3 | 2);
            assert!(contents.len() < 1 << 14);
            out.extend([contents.len() as u8 | 0x80, (contents.len() >> 7) as u8]);
            out.extend_from_slice(contents);
        }
        out
    }

    /// SubjectPublicKeyInfo of a P-256 point (RFC 5480).
    fn spki_p256(point: &[u8]) -> Vec<u8> {
        let mut der =
            b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00"
                .to_vec();
        der.extend_from_slice(point);
        der
    }

    fn key() -> (Vec<u8>, Vec<u8>) {
        let random = SystemRandom::new();
        let private = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, private.as_ref(), &random).unwrap();
        (private.as_ref().to_vec(), spki_p256(pair.public_key().as_ref()))
    }

    #[test]
    fn verifies_what_it_signs_and_nothing_else() {
        let (private, public) = key();
        let signed = sign(&message(&[(1, b"sha256"), (2, &private), (3, b"text")])).unwrap();
        let [signature] = fields(&signed, [2]).unwrap();
        assert_eq!(signed[..2], [0x08, 1]);
        let verified =
            |hash: &[u8], text: &[u8]| verify(&message(&[(1, hash), (2, &public), (3, signature), (4, text)])).unwrap();
        assert_eq!(verified(b"SHA256", b"text"), [0x08, 1], "hash names have no case");
        assert_eq!(verified(b"sha256", b"other"), encode(false, None, BAD_SIGNATURE));
        assert_eq!(verified(b"sha512", b"text"), encode(false, None, BAD_KEY), "not with this curve");
        assert_eq!(verified(b"md5", b"text"), encode(false, None, "md5 is not supported."));
    }

    #[test]
    fn keys_come_in_one_form_exactly() {
        let (_, public) = key();
        assert_eq!(verify(&message(&[(1, b"sha256")])), Err(Status::BadArgument));
        assert_eq!(verify(&message(&[(1, b"sha256"), (2, &public), (5, b"x")])), Err(Status::BadArgument));
        assert_eq!(verify(&message(&[(1, b"sha256"), (2, b"junk")])).unwrap(), encode(false, None, BAD_KEY));
        assert_eq!(verify(&message(&[(1, b"sha256"), (5, b"junk")])).unwrap(), encode(false, None, BAD_KEY));
    }

    #[test]
    fn every_truncation_of_an_argument_is_refused_or_read_as_empty() {
        let whole = message(&[(1, b"sha256"), (2, b"key"), (3, b"signature"), (4, b"text")]);
        for len in 0..whole.len() {
            drop(verify(&whole[..len]));
        }
        assert_eq!(verify(&whole[..whole.len() - 1]), Err(Status::BadArgument));
    }
}
