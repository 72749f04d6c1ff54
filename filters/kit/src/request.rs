//! The head of a request as a policy sees it: borrowed bytes, in the order in which they came.

use std::borrow::Cow;

use crate::path::Path;

/// One field line (RFC 9110, section 5): the name as the host gives it, the value as bytes.
pub type FieldLine<'a> = (&'a [u8], &'a [u8]);

/// The head of a request. A field value is bytes: a client may send any but CR, LF and NUL.
#[derive(Debug)]
pub struct Request<'a> {
    method: &'a [u8],
    target: &'a [u8],
    path: Path,
    host: Cow<'a, str>,
    field_lines: Vec<FieldLine<'a>>,
}

impl<'a> Request<'a> {
    /// Reads a head as Proxy-Wasm hosts give it: pseudo-fields (`:method`, `:path`, `:authority`) among the field lines.
    /// The error says what no well-formed request lacks or has twice.
    pub fn from_field_lines(lines: impl IntoIterator<Item = FieldLine<'a>>) -> Result<Self, &'static str> {
        let (mut method, mut target, mut authority) = (None, None, None);
        let mut field_lines = Vec::new();
        for (name, value) in lines {
            let pseudo = match name {
                b":method" => &mut method,
                b":path" => &mut target,
                b":authority" => &mut authority,
                [b':', ..] => continue,
                _ => {
                    field_lines.push((name, value));
                    continue;
                }
            };
            if pseudo.replace(value).is_some() {
                return Err("a pseudo-field appears twice");
            }
        }
        let target = target.ok_or("the request has no target")?;
        Ok(Self {
            method: method.ok_or("the request has no method")?,
            target,
            path: Path::parse(target).ok_or("the target is in neither origin-form nor asterisk-form")?,
            host: host_of(authority.unwrap_or_default()).ok_or("the authority is malformed")?,
            field_lines,
        })
    }

    /// The method. Methods are case-sensitive.
    pub fn method(&self) -> &'a [u8] {
        self.method
    }

    /// The target as the client sent it, with its query.
    pub fn target(&self) -> &'a [u8] {
        self.target
    }

    /// The target's path, normalised.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The authority without port and final dot, in lower case; empty if the request names none.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// All field lines, in order, without pseudo-fields.
    pub fn field_lines(&self) -> &[FieldLine<'a>] {
        &self.field_lines
    }

    /// The values of all field lines of this name, in order. Case does not matter.
    pub fn field_values<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'a [u8]> + 's {
        self.field_lines.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name.as_bytes())).map(|(_, value)| *value)
    }
}

/// The host of an authority: `None` if it holds user information, a bad port or a character that no host has.
fn host_of(authority: &[u8]) -> Option<Cow<'_, str>> {
    let authority = std::str::from_utf8(authority).ok()?;
    let port_at = match authority.strip_prefix('[') {
        Some(rest) => rest.find(']')? + 2,
        None => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at_checked(port_at)?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._~[]:%".contains(&b);
    let well_formed = host.bytes().all(allowed)
        && (port.is_empty() || port.strip_prefix(':').is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit())));
    let host = host.strip_suffix('.').unwrap_or(host);
    well_formed.then(|| match host.bytes().any(|b| b.is_ascii_uppercase()) {
        true => Cow::Owned(host.to_ascii_lowercase()),
        false => Cow::Borrowed(host),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head<'a>(extra: &[FieldLine<'a>]) -> Vec<FieldLine<'a>> {
        let mut lines: Vec<FieldLine<'a>> =
            vec![(b":authority", b"api.example"), (b":path", b"/a?b"), (b":method", b"GET")];
        lines.extend_from_slice(extra);
        lines
    }

    #[test]
    fn field_values_come_in_order_whatever_the_case_of_the_name() {
        let lines = head(&[(b"Accept", b"a"), (b"x", b"\xff"), (b"accept", b""), (b":scheme", b"https")]);
        let request = Request::from_field_lines(lines).expect("well-formed");
        assert_eq!(request.field_values("ACCEPT").collect::<Vec<_>>(), [&b"a"[..], b""]);
        assert_eq!(request.field_values("x").collect::<Vec<_>>(), [b"\xff"]);
        assert_eq!(request.field_values(":scheme").count(), 0);
        assert_eq!((request.method(), request.target(), request.path().as_str()), (&b"GET"[..], &b"/a?b"[..], "/a"));
        assert_eq!(request.field_lines().len(), 3);
    }

    #[test]
    fn a_head_lacks_nothing_and_has_nothing_twice() {
        let lacking = |name: &[u8]| {
            let lines = head(&[]).into_iter().filter(|(n, _)| *n != name).collect::<Vec<_>>();
            Request::from_field_lines(lines).map(|request| request.host().to_owned())
        };
        assert_eq!(lacking(b":method"), Err("the request has no method"));
        assert_eq!(lacking(b":path"), Err("the request has no target"));
        assert_eq!(lacking(b":authority"), Ok(String::new()), "HTTP/1.0 has none");
        let twice = Request::from_field_lines(head(&[(b":path", b"/admin")])).map(|_| ());
        assert_eq!(twice, Err("a pseudo-field appears twice"));
        let connect: Vec<FieldLine<'_>> = vec![(b":method", b"CONNECT"), (b":path", b"api.example:443")];
        let connect = Request::from_field_lines(connect).map(|_| ());
        assert_eq!(connect, Err("the target is in neither origin-form nor asterisk-form"));
    }

    #[test]
    fn the_host_is_the_authority_without_port_case_and_final_dot() {
        for (authority, host) in [
            ("api.example", Some("api.example")),
            ("API.Example.:8443", Some("api.example")),
            ("api.example:", Some("api.example")),
            ("[2001:DB8::1]:80", Some("[2001:db8::1]")),
            ("127.0.0.1:80", Some("127.0.0.1")),
            ("", Some("")),
            ("admin@api.example", None),
            ("api.example:80:80", None),
            ("api.example:8x", None),
            ("api.example/x", None),
            ("api example", None),
            ("[::1", None),
            ("[::1]x", None),
            ("\u{e9}.example", None),
        ] {
            assert_eq!(host_of(authority.as_bytes()).as_deref(), host, "{authority}");
        }
        assert_eq!(host_of(b"\xff"), None);
    }

    proptest! {
        #[test]
        fn survives_any_head(lines in proptest::collection::vec((prop_oneof![Just(":path".to_owned()), Just(":authority".to_owned()), "[a-z:]{0,9}"], proptest::collection::vec(any::<u8>(), 0..24)), 0..6)) {
            let _ = Request::from_field_lines(lines.iter().map(|(name, value)| (name.as_bytes(), value.as_slice())));
        }
    }
}
