//! The foreign functions `verify_signature` and `sign`: public-key operations on the host's own CPU.
//!
//! A signature check in a guest costs tens of times what it costs here, so guests ask the host where it offers this. What
//! is asked and answered are protobuf messages, Envoy's, and so are the words of errors. As measured there: RSASSA-PKCS1-v1_5,
//! and ECDSA with signatures in DER; no RSA-PSS, no EdDSA, no HMAC; keys in DER (SubjectPublicKeyInfo, PKCS #8), behind which
//! anything may follow, or PEM. Less than Envoy's in what is rarely used: no SHA-224, no curves but P-256 and P-384 and these
//! with SHA-256 and SHA-384 only, no RSA keys below 1024 bits, and no signing with SHA-1, with RSA keys below 2048 bits or with
//! another hash than the curve's own.

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA384_ASN1, ECDSA_P384_SHA256_ASN1,
    ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
    RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY, RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
    RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384,
    RSA_PKCS1_SHA512, RsaEncoding, RsaKeyPair, UnparsedPublicKey, VerificationAlgorithm,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivateKeyDer, SubjectPublicKeyInfoDer};
use spki::der::asn1::AnyRef;
use spki::der::{Decode, Encode, Reader, SliceReader};
use spki::{AlgorithmIdentifierRef, ObjectIdentifier, SubjectPublicKeyInfoRef};

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
const NO_SIGNING_KEY: &str = "Invalid key type: private key required for signing operation.";
const ODD_SIGNING_KEY: &str = "Invalid private key: key data is corrupted or malformed.";

/// `{1: hash_function, 2: public_key (DER), 3: signature, 4: text, 5: public_key_pem}` to `{1: result, 2: error}`.
pub(crate) fn verify(argument: &[u8]) -> Result<Vec<u8>, Status> {
    let [hash, der, signature, text, pem] = fields(argument, [1, 2, 3, 4, 5])?;
    let hash = utf8(hash)?;
    let key = match one_of(der, pem)? {
        Form::Der(der) => first_element(der).map(<[u8]>::to_vec),
        Form::Pem(pem) => SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).ok().map(|key| key.to_vec()),
    };
    Ok(match check(hash, key.as_deref(), signature, text) {
        Ok(()) => encode(true, None, ""),
        Err(error) => encode(false, None, &error),
    })
}

fn check(hash: &str, key: Option<&[u8]>, signature: &[u8], text: &[u8]) -> Result<(), String> {
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
    let hash = utf8(hash)?;
    let key = match one_of(der, pem)? {
        Form::Der(der) => first_element(der).map(|der| PrivateKeyDer::Pkcs8(der.to_vec().into())),
        // All three forms that OpenSSL writes.
        Form::Pem(pem) => PrivateKeyDer::from_pem_slice(pem.as_bytes()).ok(),
    };
    Ok(match make(hash, key.as_ref(), text) {
        Ok(signature) => encode(true, Some(&signature), ""),
        Err(error) => encode(false, Some(&[]), &error),
    })
}

fn make(hash: &str, key: Option<&PrivateKeyDer<'_>>, text: &[u8]) -> Result<Vec<u8>, String> {
    let hash = hash_name(hash)?;
    match key.ok_or(NO_SIGNING_KEY)? {
        PrivateKeyDer::Pkcs1(key) => {
            let pair = RsaKeyPair::from_der(key.secret_pkcs1_der()).map_err(|_| BAD_SIGNING_KEY)?;
            sign_rsa(&pair, hash, text)
        }
        PrivateKeyDer::Sec1(key) => {
            let (curve, _) = curve_for(hash).ok_or(BAD_SIGNING_KEY)?;
            let algorithm = AlgorithmIdentifierRef { oid: EC, parameters: Some(AnyRef::from(&curve)) };
            let wrapped = pkcs8::PrivateKeyInfo::new(algorithm, key.secret_sec1_der()).to_der();
            sign_ecdsa(&wrapped.map_err(|_| BAD_SIGNING_KEY)?, hash, text)
        }
        PrivateKeyDer::Pkcs8(key) => {
            let der = key.secret_pkcs8_der();
            let info = pkcs8::PrivateKeyInfo::from_der(der).map_err(|_| NO_SIGNING_KEY)?;
            match info.algorithm.oid {
                RSA => {
                    let pair = RsaKeyPair::from_pkcs8(der).map_err(|_| BAD_SIGNING_KEY)?;
                    sign_rsa(&pair, hash, text)
                }
                EC if info.algorithm.parameters_oid().is_ok_and(|curve| CURVES.contains(&curve)) => {
                    sign_ecdsa(der, hash, text)
                }
                EC => Err(NO_SIGNING_KEY.into()),
                // Such as Ed25519: a key, but none that makes this kind of signature.
                _ => Err(ODD_SIGNING_KEY.into()),
            }
        }
        _ => Err(NO_SIGNING_KEY.into()),
    }
}

fn sign_rsa(pair: &RsaKeyPair, hash: &str, text: &[u8]) -> Result<Vec<u8>, String> {
    let encoding: &'static dyn RsaEncoding = match hash {
        "sha256" => &RSA_PKCS1_SHA256,
        "sha384" => &RSA_PKCS1_SHA384,
        "sha512" => &RSA_PKCS1_SHA512,
        _ => return Err(BAD_SIGNING_KEY.into()),
    };
    let mut signature = vec![0; pair.public().modulus_len()];
    pair.sign(encoding, &SystemRandom::new(), text, &mut signature).map_err(|_| BAD_SIGNING_KEY)?;
    Ok(signature)
}

fn sign_ecdsa(pkcs8: &[u8], hash: &str, text: &[u8]) -> Result<Vec<u8>, String> {
    let (_, algorithm) = curve_for(hash).ok_or(BAD_SIGNING_KEY)?;
    let random = SystemRandom::new();
    let pair = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8, &random).map_err(|_| BAD_SIGNING_KEY)?;
    let signature = pair.sign(&random, text).map_err(|_| BAD_SIGNING_KEY)?;
    Ok(signature.as_ref().to_vec())
}

/// Curves that Envoy signs with. A key on another one is none there.
const CURVES: [ObjectIdentifier; 4] = [
    P256,
    P384,
    ObjectIdentifier::new_unwrap("1.3.132.0.33"), // P-224
    ObjectIdentifier::new_unwrap("1.3.132.0.35"), // P-521
];

/// The curve whose keys sign with this hash.
fn curve_for(hash: &str) -> Option<(ObjectIdentifier, &'static EcdsaSigningAlgorithm)> {
    match hash {
        "sha256" => Some((P256, &ECDSA_P256_SHA256_ASN1_SIGNING)),
        "sha384" => Some((P384, &ECDSA_P384_SHA384_ASN1_SIGNING)),
        _ => None,
    }
}

fn hash_name(hash: &str) -> Result<&'static str, String> {
    ["sha1", "sha256", "sha384", "sha512"]
        .into_iter()
        .find(|known| hash.eq_ignore_ascii_case(known))
        .ok_or_else(|| format!("{hash} is not supported."))
}

/// A key as it was given.
enum Form<'a> {
    Der(&'a [u8]),
    Pem(&'a str),
}

/// Exactly one of the two forms must be given.
fn one_of<'a>(der: &'a [u8], pem: &'a [u8]) -> Result<Form<'a>, Status> {
    let pem = utf8(pem)?;
    match (der.is_empty(), pem.is_empty()) {
        (true, true) | (false, false) => Err(Status::BadArgument),
        (false, true) => Ok(Form::Der(der)),
        (true, false) => Ok(Form::Pem(pem)),
    }
}

/// The first element of DER, without what follows it.
fn first_element(der: &[u8]) -> Option<&[u8]> {
    let mut reader = SliceReader::new(der).ok()?;
    AnyRef::decode(&mut reader).ok()?;
    der.get(..usize::try_from(reader.position()).ok()?)
}

/// proto3 takes a message whose text is not UTF-8 for malformed.
fn utf8(bytes: &[u8]) -> Result<&str, Status> {
    std::str::from_utf8(bytes).map_err(|_| Status::BadArgument)
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

    /// What comes of these, as hosts write it: `ok`, or the error's words.
    fn outcome(answer: &[u8], error_number: u64) -> String {
        let mut said = "none".to_owned();
        for field in protobuf::fields(answer) {
            match field.unwrap() {
                (1, _) => said = "ok".to_owned(),
                (number, value) if number == error_number => {
                    said = String::from_utf8(value.bytes().to_vec()).unwrap();
                }
                _ => {}
            }
        }
        said
    }

    const TEXT: &[u8] = include_bytes!("../testdata/signatures/text");
    const RSA_PUBLIC: &[u8] = include_bytes!("../testdata/signatures/rsa-public.pem");
    const RSA_SHA256: &[u8] = include_bytes!("../testdata/signatures/rsa-sha256.sig");

    fn check_pem(pem: &[u8], signature: &[u8], hash: &str, expected: &str) {
        let answer = verify(&message(&[(1, hash.as_bytes()), (5, pem), (3, signature), (4, TEXT)])).unwrap();
        assert_eq!(outcome(&answer, 2), expected, "{hash} {}", String::from_utf8_lossy(pem));
    }

    #[test]
    fn public_keys_are_read_as_openssl_writes_them() {
        check_pem(RSA_PUBLIC, RSA_SHA256, "SHA256", "ok");
        check_pem(&[b"a comment\n", RSA_PUBLIC].concat(), RSA_SHA256, "sha256", "ok");
        check_pem(&[RSA_PUBLIC, RSA_PUBLIC].concat(), RSA_SHA256, "sha256", "ok");
        let windows = String::from_utf8_lossy(RSA_PUBLIC).replace('\n', "\r\n");
        check_pem(windows.as_bytes(), RSA_SHA256, "sha256", "ok");
        let p256 = include_bytes!("../testdata/signatures/p256-public.pem");
        check_pem(p256, include_bytes!("../testdata/signatures/p256-sha384.sig"), "sha384", "ok");
        check_pem(p256, &[1; 64], "sha256", BAD_SIGNATURE);
        check_pem(RSA_PUBLIC, include_bytes!("../testdata/signatures/rsa-pss.sig"), "sha256", BAD_SIGNATURE);
        for unusable in [
            &include_bytes!("../testdata/signatures/k256-public.pem")[..],
            include_bytes!("../testdata/signatures/ed25519-public.pem"),
            include_bytes!("../testdata/signatures/rsa.pem"),
        ] {
            check_pem(unusable, RSA_SHA256, "sha256", BAD_KEY);
        }
        let der = SubjectPublicKeyInfoDer::from_pem_slice(RSA_PUBLIC).unwrap();
        for (der, expected) in
            [(der.to_vec(), "ok"), ([&*der, b"xx"].concat(), "ok"), (der[..der.len() - 1].to_vec(), BAD_KEY)]
        {
            let answer = verify(&message(&[(1, b"sha256"), (2, &der), (3, RSA_SHA256), (4, TEXT)])).unwrap();
            assert_eq!(outcome(&answer, 2), expected);
        }
    }

    #[test]
    fn private_keys_are_read_in_the_forms_that_openssl_writes() {
        let signed = |hash: &str, pem: &[u8]| sign(&message(&[(1, hash.as_bytes()), (4, pem), (3, TEXT)])).unwrap();
        let rsa = include_bytes!("../testdata/signatures/rsa.pem");
        for pem in [&rsa[..], include_bytes!("../testdata/signatures/rsa-pkcs1.pem")] {
            let answer = signed("sha256", pem);
            assert_eq!(outcome(&answer, 3), "ok");
            let [signature] = fields(&answer, [2]).unwrap();
            assert_eq!(signature, RSA_SHA256);
        }
        let p256 = include_bytes!("../testdata/signatures/p256-public.pem");
        for pem in [
            &include_bytes!("../testdata/signatures/p256.pem")[..],
            include_bytes!("../testdata/signatures/p256-sec1.pem"),
        ] {
            let answer = signed("sha256", pem);
            let [signature] = fields(&answer, [2]).unwrap();
            check_pem(p256, signature, "sha256", "ok");
        }
        for (pem, expected) in [
            (&b"junk"[..], NO_SIGNING_KEY),
            (RSA_PUBLIC, NO_SIGNING_KEY),
            (include_bytes!("../testdata/signatures/k256.pem"), NO_SIGNING_KEY),
            (include_bytes!("../testdata/signatures/ed25519.pem"), ODD_SIGNING_KEY),
        ] {
            assert_eq!(outcome(&signed("sha256", pem), 3), expected);
        }
        assert_eq!(outcome(&signed("md5", rsa), 3), "md5 is not supported.");
        assert_eq!(outcome(&signed("sha1", rsa), 3), BAD_SIGNING_KEY, "verified, but not made");
        let PrivateKeyDer::Pkcs8(der) = PrivateKeyDer::from_pem_slice(rsa).unwrap() else { panic!("another form") };
        let with_more = [der.secret_pkcs8_der(), b"xx"].concat();
        assert_eq!(outcome(&sign(&message(&[(1, b"sha256"), (2, &with_more), (3, TEXT)])).unwrap(), 3), "ok");
    }

    #[test]
    fn texts_that_are_not_utf8_make_no_message() {
        assert_eq!(verify(&message(&[(1, b"\xff"), (2, b"x")])), Err(Status::BadArgument));
        assert_eq!(verify(&message(&[(1, b"sha256"), (5, b"\xff")])), Err(Status::BadArgument));
        assert_eq!(sign(&message(&[(1, b"sha256"), (4, b"\xff")])), Err(Status::BadArgument));
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
