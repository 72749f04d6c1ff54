//! Encodings that guests, upstreams and certificates bring along.

use portcullis_abi::{CodeKey, GrpcMessages, ModuleLimits, internals};

use super::outcome;
use crate::Target;

/// Maps between guest and host: whatever is read is written again the same, and what is written is read again the same.
pub(super) const PAIRS: Target = Target {
    name: "pairs",
    about: "maps that guests hand over",
    run: |input| outcome(internals::pairs(input)),
    seeds: || {
        vec![
            internals::encode_pairs(&[(b":path", b"/"), (b"x-a", b"1"), (b"x-a", b"")]),
            internals::encode_pairs(&[]),
            vec![0; 4],
        ]
    },
    words: &[b"\0", b"\x01\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\0", b"a\0b\0", b"host", b":authority"],
};

/// Arguments of `verify_signature` and `sign`: protobuf messages with keys in DER and PEM.
pub(super) const SIGNATURES: Target = Target {
    name: "signatures",
    about: "protobuf messages, DER and PEM of the foreign functions for signatures",
    run: |input| outcome(internals::signatures(input)),
    seeds: || {
        let key = b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\0\x04";
        let mut der = key.to_vec();
        der.extend([7; 64]);
        let mut message = b"\x0a\x06sha256\x12".to_vec();
        message.push(der.len() as u8);
        message.extend(&der);
        message.extend(b"\x1a\x02\x30\0\x22\x04text");
        let pem = b"\x0a\x06sha256\x2a\x1f-----BEGIN PUBLIC KEY-----\nMFk=\x22\x01a".to_vec();
        vec![message, pem, b"\x0a\x04sha1".to_vec()]
    },
    words: &[
        b"sha1",
        b"sha256",
        b"sha384",
        b"sha512",
        b"-----BEGIN PUBLIC KEY-----\n",
        b"-----END PUBLIC KEY-----\n",
        b"\x30\x82",
        b"\x12",
    ],
};

/// Messages of gRPC in a body: the same whatever pieces it comes in, and never one that is longer than allowed.
pub(super) const GRPC: Target = Target {
    name: "grpc",
    about: "frames of gRPC in a body that comes in pieces",
    run: |input| {
        const MOST: usize = 100;
        let read = |pieces: &mut dyn Iterator<Item = &[u8]>| {
            let mut messages = GrpcMessages::new(MOST);
            let mut found = Vec::new();
            for piece in pieces {
                messages.push(piece);
                loop {
                    match messages.next_message() {
                        Ok(Some(message)) => found.push(message),
                        Ok(None) => break,
                        Err(error) => return (found, Some(error)),
                    }
                }
            }
            (found, None)
        };
        let (size, body) = input.split_first().map_or((1, input), |(size, body)| (usize::from(*size) + 1, body));
        let whole = read(&mut [body].into_iter());
        assert_eq!(whole, read(&mut body.chunks(size)), "in pieces of {size}");
        assert!(whole.0.iter().all(|message| message.len() <= MOST));
        outcome((whole.0.len().min(4), whole.1.is_some()))
    },
    seeds: || vec![b"\x03\0\0\0\0\x02hi\0\0\0\0\0".to_vec(), b"\x01\x01\0\0\0\x01x".to_vec()],
    words: &[b"\0\0\0\0", b"\0\0\0\0\x01a", b"\x01\0\0\0\0"],
};

/// Certificates of other sides, as TLS hands them over.
pub(super) const CERTIFICATES: Target = Target {
    name: "certificates",
    about: "certificates in DER",
    run: |input| outcome(portcullis_proxy::fuzzing::certificate(input)),
    seeds: Vec::new,
    words: &[
        b"\x30\x82\x01\0",
        b"\x06\x03\x55\x1d\x11",
        b"\x06\x03\x55\x04\x03",
        b"\x17\x0d250101000000Z",
        b"\xa0\x03\x02\x01\x02",
    ],
};

/// Modules, up to where they are compiled; and code that claims to be sealed.
pub(super) const MODULES: Target = Target {
    name: "modules",
    about: "what is looked at of a module before it is compiled, and sealed code",
    run: |input| {
        let checked = ModuleLimits::default().check(input).map_err(|error| std::mem::discriminant(&error));
        let opened = internals::open_sealed(input, &CodeKey::new(&[7; CodeKey::LEN]));
        assert!(!opened, "nothing here was sealed with this key");
        outcome(checked.err())
    },
    seeds: || {
        let text = r#"(module (import "env" "proxy_log" (func (param i32 i32 i32) (result i32))) (memory (export "memory") 1 2)
            (table 1 funcref) (global i32 (i32.const 0)) (func (export "malloc") (param i32) (result i32) local.get 0)
            (func (export "proxy_abi_version_0_2_1")) (elem (i32.const 0) 0) (data (i32.const 0) "x"))"#;
        vec![wat::parse_str(text).unwrap_or_default(), b"portcullis sealed code 1\n".to_vec()]
    },
    words: &[b"\0asm\x01\0\0\0", b"\x80\x80\x80\x80\x08", b"\xff\xff\xff\xff\x0f", b"memory"],
};
