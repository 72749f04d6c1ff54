//! Finds the token in a request, and takes it apart (JWS compact serialisation, RFC 7515, section 3.1).
//!
//! What comes out is what somebody wrote, believed by nobody yet: [`crate::verify`] does the rest.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portcullis_kit::json;
use portcullis_kit::request::Request;
use serde_json::{Map, Value};

use crate::verify::Unverified;

/// Tokens longer than this are refused unparsed. Twice what common servers take as a whole request head, so no token
/// that anything else would let through is refused.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;

/// Where a request may carry a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A field.
    Header {
        /// The field's name, in lower case.
        name: String,
        /// The scheme before the token, such as `Bearer`; `None` if the token is the whole value.
        scheme: Option<String>,
    },
    /// A cookie of this name.
    Cookie(String),
}

/// A token and where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// The token, as sent.
    pub token: &'a [u8],
    /// Where it was.
    pub source: &'a Source,
}

/// Why no single token was found where one was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfound {
    /// There is more than one, and two readers could choose differently.
    Several,
    /// The field has the right scheme and no token after it.
    Malformed,
}

/// Finds the one token of a request.
pub fn find<'a>(request: &Request<'a>, sources: &'a [Source]) -> Result<Option<Found<'a>>, Unfound> {
    let mut found = None;
    for source in sources {
        let token = match source {
            Source::Header { name, scheme } => in_header(request, name, scheme.as_deref())?,
            Source::Cookie(name) => in_cookies(request, name)?,
        };
        if let Some(token) = token
            && found.replace(Found { token, source }).is_some()
        {
            return Err(Unfound::Several);
        }
    }
    Ok(found)
}

fn in_header<'a>(request: &Request<'a>, name: &str, scheme: Option<&str>) -> Result<Option<&'a [u8]>, Unfound> {
    let mut values = request.field_values(name);
    let Some(value) = values.next() else { return Ok(None) };
    // Also if the other is of another scheme: who reads the first and who reads the last would see two clients.
    if values.next().is_some() {
        return Err(Unfound::Several);
    }
    let Some(scheme) = scheme else {
        return if value.is_empty() { Err(Unfound::Malformed) } else { Ok(Some(value)) };
    };
    // Schemes are compared without case (RFC 9110, section 11.1).
    let Some((start, rest)) = value.split_at_checked(scheme.len()) else { return Ok(None) };
    if !start.eq_ignore_ascii_case(scheme.as_bytes()) || !matches!(rest.first(), None | Some(b' ')) {
        return Ok(None);
    }
    let token = rest.trim_ascii_start();
    if token.is_empty() { Err(Unfound::Malformed) } else { Ok(Some(token)) }
}

fn in_cookies<'a>(request: &Request<'a>, name: &str) -> Result<Option<&'a [u8]>, Unfound> {
    let mut found = None;
    for (cookie, value) in cookies(request) {
        // An empty cookie is one that the application has cleared.
        if cookie == name.as_bytes() && !value.is_empty() && found.replace(value).is_some() {
            return Err(Unfound::Several);
        }
    }
    Ok(found)
}

/// The cookies of a request (RFC 6265, section 4.2); HTTP/2 may spread them over several lines.
fn cookies<'a>(request: &Request<'a>) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
    let pairs = request.field_values("cookie").flat_map(|line| line.split(|b| *b == b';')).map(<[u8]>::trim_ascii);
    pairs.filter(|pair| !pair.is_empty()).map(|pair| match pair.iter().position(|b| *b == b'=') {
        Some(at) => (pair.get(..at).unwrap_or_default(), pair.get(at + 1..).unwrap_or_default()),
        None => (pair, &[][..]),
    })
}

/// The `cookie` field without the cookies of this name; empty if none remain.
pub fn cookies_without(request: &Request<'_>, name: &str) -> Vec<u8> {
    let kept = cookies(request).filter(|(cookie, _)| *cookie != name.as_bytes());
    kept.map(|(cookie, value)| [cookie, b"=", value].concat()).collect::<Vec<_>>().join(&b"; "[..])
}

/// A token taken apart.
#[derive(Debug)]
pub struct Compact<'a> {
    /// The JOSE header.
    pub header: Map<String, Value>,
    /// The claims.
    pub claims: Map<String, Value>,
    /// What is signed: the first two parts with the dot between them.
    pub signed: &'a [u8],
    /// The signature.
    pub signature: Vec<u8>,
}

impl<'a> Compact<'a> {
    /// Takes a token apart.
    pub fn parse(token: &'a [u8]) -> Result<Self, Unverified> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Unverified::TooLong);
        }
        let mut parts = token.split(|byte| *byte == b'.');
        let (Some(header), Some(claims), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Unverified::NotThreeParts);
        };
        let signed = token.get(..header.len() + 1 + claims.len()).ok_or(Unverified::NotThreeParts)?;
        // The engine takes no padding, no white space, neither `+` nor `/`, and no stray bits in the last digit, so
        // that one signature has one spelling.
        let decode = |part| URL_SAFE_NO_PAD.decode(part).map_err(|_| Unverified::NotBase64url);
        let object = |text: Vec<u8>| match json::parse_strict(&text) {
            Some(Value::Object(object)) => Some(object),
            _ => None,
        };
        Ok(Self {
            header: object(decode(header)?).ok_or(Unverified::HeaderNotAnObject)?,
            claims: object(decode(claims)?).ok_or(Unverified::ClaimsNotAnObject)?,
            signed,
            signature: decode(signature)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use portcullis_kit::request::FieldLine;
    use proptest::prelude::*;

    use super::*;

    fn sources() -> Vec<Source> {
        let header =
            |name: &str, scheme: Option<&str>| Source::Header { name: name.into(), scheme: scheme.map(Into::into) };
        vec![header("authorization", Some("Bearer")), header("x-token", None), Source::Cookie("session".into())]
    }

    #[track_caller]
    fn check(fields: &[FieldLine<'_>], expected: Result<Option<&[u8]>, Unfound>) {
        let mut lines: Vec<FieldLine<'_>> = vec![(b":method", b"GET"), (b":path", b"/")];
        lines.extend_from_slice(fields);
        let request = Request::from_field_lines(lines).expect("well-formed");
        let sources = sources();
        assert_eq!(find(&request, &sources).map(|found| found.map(|found| found.token)), expected);
    }

    #[test]
    fn finds_a_token_wherever_it_may_be() {
        check(&[], Ok(None));
        for value in ["Bearer t", "bearer t", "BEARER   t"] {
            check(&[(b"authorization", value.as_bytes())], Ok(Some(b"t")));
        }
        check(&[(b"x-token", b"t")], Ok(Some(b"t")));
        check(&[(b"cookie", b"a=b; session=t;c")], Ok(Some(b"t")));
        check(&[(b"cookie", b"a=b"), (b"cookie", b"session=t=u")], Ok(Some(b"t=u")));
        check(&[(b"authorization", b"Bearer \xff")], Ok(Some(b"\xff")));
    }

    #[test]
    fn other_schemes_and_cookies_are_no_token() {
        check(&[(b"authorization", b"Basic dTpw")], Ok(None));
        check(&[(b"authorization", b"BearerX t")], Ok(None));
        check(&[(b"authorization", b"Bear")], Ok(None));
        check(&[(b"authorization", b"")], Ok(None));
        check(&[(b"cookie", b"Session=t; xsession=t; session; session=")], Ok(None));
    }

    #[test]
    fn two_tokens_are_none() {
        check(&[(b"authorization", b"Bearer t"), (b"authorization", b"Bearer t")], Err(Unfound::Several));
        check(&[(b"authorization", b"Bearer t"), (b"Authorization", b"Basic x")], Err(Unfound::Several));
        check(&[(b"authorization", b"Bearer t"), (b"x-token", b"t")], Err(Unfound::Several));
        check(&[(b"x-token", b"t"), (b"cookie", b"session=t")], Err(Unfound::Several));
        check(&[(b"cookie", b"session=t; session=u")], Err(Unfound::Several));
    }

    #[test]
    fn a_scheme_without_a_token_is_malformed() {
        check(&[(b"authorization", b"Bearer")], Err(Unfound::Malformed));
        check(&[(b"authorization", b"Bearer  ")], Err(Unfound::Malformed));
        check(&[(b"x-token", b"")], Err(Unfound::Malformed));
    }

    #[test]
    fn a_cookie_is_taken_out_and_the_others_stay() {
        let lines: [FieldLine<'_>; 4] =
            [(b":method", b"GET"), (b":path", b"/"), (b"cookie", b"a=b;session=t; c=d=e"), (b"cookie", b"session=;f=")];
        let request = Request::from_field_lines(lines).expect("well-formed");
        assert_eq!(cookies_without(&request, "session"), b"a=b; c=d=e; f=");
        assert_eq!(cookies_without(&request, "x"), b"a=b; session=t; c=d=e; session=; f=");
    }

    /// What is wrong with a token, `None` if nothing.
    fn fault(token: &str) -> Option<Unverified> {
        Compact::parse(token.as_bytes()).err()
    }

    #[test]
    fn takes_a_token_apart() {
        let token = b"eyJhbGciOiJub25lIn0.eyJpc3MiOiJhIn0._w";
        let compact = Compact::parse(token).expect("a token");
        assert_eq!(Value::from(compact.header), serde_json::json!({"alg": "none"}));
        assert_eq!(Value::from(compact.claims), serde_json::json!({"iss": "a"}));
        assert_eq!(
            (compact.signed, compact.signature.as_slice()),
            (&b"eyJhbGciOiJub25lIn0.eyJpc3MiOiJhIn0"[..], &b"\xff"[..])
        );
        assert_eq!(fault("e30.e30."), None, "an empty signature is for the verifier to refuse");
    }

    #[test]
    fn a_token_has_exactly_three_parts() {
        for token in ["", "e30", "e30.e30", "e30.e30.e30.", "e30.e30.e30.e30.e30"] {
            assert_eq!(fault(token), Some(Unverified::NotThreeParts), "{token}");
        }
    }

    #[test]
    fn base64url_has_one_spelling() {
        // Padding, white space, the other alphabet, stray bits, lengths that no text has, bytes that are not ASCII.
        for part in ["e30=", " e30", "e30 ", "e3 0", "e30\n", "ey+/", "e31", "e30ab", "\u{e9}30"] {
            for token in [format!("{part}.e30."), format!("e30.{part}."), format!("e30.e30.{part}")] {
                assert!(fault(&token).is_some(), "{token:?}");
            }
        }
        assert_eq!(fault("e30.e30.e31"), Some(Unverified::NotBase64url));
    }

    #[test]
    fn header_and_claims_are_objects_without_repeated_names() {
        let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
        for text in [
            "[]",
            "null",
            "{",
            "",
            "{\"a\":1,\"a\":1}",
            "{\"a\":{\"b\":1,\"b\":1}}",
            "{\"exp\":1e400}",
            "{\"a\":NaN}",
            "{}{}",
        ] {
            assert_eq!(fault(&format!("{}.e30.", encode(text))), Some(Unverified::HeaderNotAnObject), "{text}");
            assert_eq!(fault(&format!("e30.{}.", encode(text))), Some(Unverified::ClaimsNotAnObject), "{text}");
        }
        assert_eq!(fault(&format!("{}.e30.", encode("\u{feff}{}"))), Some(Unverified::HeaderNotAnObject));
    }

    #[test]
    fn a_token_over_the_limit_is_refused_unparsed() {
        let token = format!("e30.e30.{}", "A".repeat(TOKEN_BYTES_MAX - 8));
        assert_eq!((token.len(), fault(&token)), (TOKEN_BYTES_MAX, None));
        assert_eq!(fault(&format!("{token}A")), Some(Unverified::TooLong));
    }

    proptest! {
        #[test]
        fn survives_anything(token in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Compact::parse(&token);
        }

        #[test]
        fn survives_any_json_in_a_token(header in "[\\[\\]{}:,\"ab0-9e.-]{0,40}", claims in proptest::collection::vec(any::<u8>(), 0..40)) {
            let token = format!("{}.{}.", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
            let _ = Compact::parse(token.as_bytes());
        }

        #[test]
        fn survives_any_field(value in proptest::collection::vec(any::<u8>(), 0..40), cookie in "[a-z=; \"]{0,40}") {
            let lines: [FieldLine<'_>; 4] = [(b":method", b"GET"), (b":path", b"/"), (b"authorization", &value), (b"cookie", cookie.as_bytes())];
            let request = Request::from_field_lines(lines).expect("well-formed");
            let _ = find(&request, &sources());
            let _ = cookies_without(&request, "session");
        }
    }
}
