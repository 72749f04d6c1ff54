//! What clients send.

use portcullis_config::Target as RequestTarget;
use portcullis_proxy::framing::{Framing, HeadLimits, Step, Violation};

use super::outcome;
use crate::Target;

const LIMITS: HeadLimits = HeadLimits { bytes_max: 2048, fields_max: 20 };

/// Everything that a connection's input lets through, and why it ended.
fn read(pieces: &mut dyn Iterator<Item = &[u8]>) -> (Vec<u8>, Vec<(usize, usize)>, Option<Violation>) {
    let mut framing = Framing::new(LIMITS);
    let (mut passed, mut heads, mut input) = (Vec::new(), Vec::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let at_head = framing.is_at_head();
            match framing.advance(&input) {
                Step::Pass(len) => {
                    assert!(len > 0 && len <= input.len(), "{len} of {}", input.len());
                    if at_head {
                        heads.push((passed.len(), passed.len() + len));
                    }
                    passed.extend(input.drain(..len));
                }
                Step::More => break,
                Step::Refuse(violation) => return (passed, heads, Some(violation)),
            }
        }
        assert!(input.len() <= LIMITS.bytes_max + piece.len(), "what waits is bounded");
    }
    (passed, heads, None)
}

/// A head that passed is one that another parser reads the same way.
fn check_head(head: &[u8]) {
    let mut fields = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut fields);
    let begin = head.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(head.len());
    let parsed = request.parse(&head[begin..]);
    assert_eq!(parsed, Ok(httparse::Status::Complete(head.len() - begin)), "{}", head.escape_ascii());
    let values = |name: &str| -> Vec<&[u8]> {
        request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value).collect()
    };
    let (lengths, codings) = (values("content-length"), values("transfer-encoding"));
    assert!(lengths.len() + codings.len() <= 1, "one statement of the length: {}", head.escape_ascii());
    assert!(lengths.iter().all(|length| length.iter().all(u8::is_ascii_digit) && length.len() <= 18));
    assert!(codings.iter().all(|coding| coding.eq_ignore_ascii_case(b"chunked")));
    assert!(values("host").len() <= 1 && head.len() <= LIMITS.bytes_max && request.headers.len() <= LIMITS.fields_max);
}

/// Where one HTTP/1.1 request ends and the next begins, in whatever pieces they come.
pub(super) const FRAMING: Target = Target {
    name: "framing",
    about: "where an HTTP/1.1 request ends, in whatever pieces it comes",
    run: |input| {
        let (size, input) = input.split_first().map_or((1, input), |(size, rest)| (usize::from(*size) % 32 + 1, rest));
        let (passed, heads, violation) = read(&mut [input].into_iter());
        assert!(input.starts_with(&passed), "bytes pass in order and unchanged");
        for (begin, end) in &heads {
            check_head(&passed[*begin..*end]);
        }
        let in_pieces = read(&mut input.chunks(size));
        // The same requests pass. What is refused before its end is seen may be refused for another of its faults.
        let same_heads = in_pieces.1.iter().zip(&heads).all(|(one, other)| one == other);
        assert!(same_heads, "in pieces of {size}: {:?} instead of {heads:?}", in_pieces.1);
        assert_eq!(in_pieces.2.is_some(), violation.is_some(), "in pieces of {size}");
        if violation.is_none() {
            assert_eq!(in_pieces.0, passed);
        }
        outcome((violation.map(Violation::reason), heads.len().min(3)))
    },
    seeds: || {
        [
            "\x05GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\n",
            "\x01POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.0\r\n\r\n",
            "\x07POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nT: 1\r\n\r\n",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
    },
    words: &[
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"Content-Length: ",
        b"Transfer-Encoding: chunked\r\n",
        b"HTTP/1.1",
        b"Host: a\r\n",
        b"GET / ",
        b"0\r\n\r\n",
        b": ",
        b"\t",
        b"99999999999999999999",
        b"ffffffffffffffff",
    ],
};

/// Request targets: what is accepted has one form, and that form is its own.
pub(super) const TARGETS: Target = Target {
    name: "targets",
    about: "request targets and authorities, brought into one form",
    run: |input| {
        let target = RequestTarget::parse(input).ok().map(|target| {
            let again = RequestTarget::parse(target.as_bytes()).expect("its own form is accepted");
            assert_eq!(again.as_bytes(), target.as_bytes(), "and is the last one");
            assert!(target.path().starts_with(b"/"));
            assert!(target.as_bytes().iter().all(u8::is_ascii_graphic), "{}", target.as_bytes().escape_ascii());
            target.path().split(|byte| *byte == b'/').count().min(5)
        });
        let authority = portcullis_config::normal_authority(input).map(|authority| {
            let again = portcullis_config::normal_authority(&authority).expect("its own form is accepted");
            assert_eq!(again, authority);
            authority.contains(&b':')
        });
        outcome((target, authority))
    },
    seeds: || {
        ["/a/../b?c", "/%41%2e/", "api.example:8080", "[::1]:80", "/a;b//c"]
            .map(|text| text.as_bytes().to_vec())
            .to_vec()
    },
    words: &[b"/../", b"/./", b"//", b"%2f", b"%2e", b"%00", b"%", b"?", b"#", b";", b"\\", b"[", b"]", b":", b"%25"],
};
