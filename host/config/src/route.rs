//! Which route a request takes: pure, on bytes, without regular expressions.
//!
//! The same table decides in Envoy, as rendered by [`crate::envoy`]; `tests/envoy_routes.rs` compares the two on a
//! list of awkward requests and on random ones. Where a request can be read in two ways, the reading is this:
//!
//! * An authority that [`normal_authority`] refuses gets 400. The host is compared without its port, without one
//!   final dot and without regard to case. A pattern `*.example.com` stands for one or more labels before the dot.
//! * The path is compared after [`Target::parse`], with regard to case, without the query.
//! * Of a repeated field, one line with the value is enough; a list in one line is not taken apart.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use crate::policy::RequestParts;
use crate::target::Target;

/// Field lines of a request, in order.
pub trait FieldLines {
    /// Calls `each` with the value of every field line of this name; `name` is in lower case.
    fn for_each_value(&self, name: &str, each: &mut dyn FnMut(&[u8]));
}

impl FieldLines for http::HeaderMap {
    fn for_each_value(&self, name: &str, each: &mut dyn FnMut(&[u8])) {
        for value in self.get_all(name) {
            each(value.as_bytes());
        }
    }
}

impl FieldLines for [(&[u8], &[u8])] {
    fn for_each_value(&self, name: &str, each: &mut dyn FnMut(&[u8])) {
        for (own, value) in self {
            if own.eq_ignore_ascii_case(name.as_bytes()) {
                each(value);
            }
        }
    }
}

impl<const N: usize> FieldLines for [(&[u8], &[u8]); N] {
    fn for_each_value(&self, name: &str, each: &mut dyn FnMut(&[u8])) {
        self.as_slice().for_each_value(name, each);
    }
}

/// What happens to the requests that match.
#[derive(Clone, Debug)]
pub struct Route {
    /// Its name.
    pub name: String,
    /// Host patterns, any of which matches; at least one.
    pub hosts: Vec<HostPattern>,
    /// The condition on the path.
    pub path: PathPattern,
    /// Methods, any of which matches; none means all.
    pub methods: Option<Vec<String>>,
    /// Conditions on fields, all of which must hold.
    pub fields: Vec<FieldCondition>,
    /// Indices of the filters that the request passes, in chain order.
    pub filters: Vec<usize>,
    /// What happens then.
    pub action: Action,
    /// Time from the end of the request to the end of the response.
    pub timeout: Duration,
    /// The authority that the upstream sees, if not the client's.
    pub host_rewrite: Option<String>,
    /// How the path that the upstream sees is made, if it is not the client's.
    pub path_rewrite: Option<PathRewrite>,
}

/// What happens to a request that the filters let pass.
#[derive(Clone, Debug)]
pub enum Action {
    /// It goes to the upstream with this index.
    Upstream(usize),
    /// It goes to the operator with this index.
    Operator(usize),
    /// It is answered.
    Respond(Arc<Response>),
}

/// A fixed answer. All names and values are valid; there is a `content-type` if there is a body.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status.
    pub status: u16,
    /// Fields, names in lower case.
    pub fields: Vec<(String, String)>,
    /// Body.
    pub body: String,
}

/// A condition on the host; all text in lower case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostPattern {
    /// This host.
    Exact(String),
    /// Every longer name that ends so; starts with a dot. Written `*.example.com`.
    Below(String),
    /// Every host, and requests without one.
    Any,
}

impl HostPattern {
    /// Whether the pattern matches a host that came from [`host_of`].
    #[must_use]
    pub fn matches(&self, host: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => host == exact.as_bytes(),
            Self::Below(suffix) => host.len() > suffix.len() && host.ends_with(suffix.as_bytes()),
            Self::Any => true,
        }
    }

    /// As Envoy writes it, which is also the name of its virtual host.
    #[must_use]
    pub fn domain(&self) -> String {
        match self {
            Self::Exact(host) => host.clone(),
            Self::Below(suffix) => format!("*{suffix}"),
            Self::Any => "*".to_owned(),
        }
    }

    /// Whether every host that `other` matches is matched by this one too.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) => true,
            (_, Self::Any) | (Self::Exact(_), Self::Below(_)) => false,
            (pattern, Self::Exact(host)) => pattern.matches(host.as_bytes()),
            (Self::Below(own), Self::Below(other)) => other.ends_with(own.as_str()),
        }
    }
}

/// A condition on the normalised path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathPattern {
    /// Every path.
    Any,
    /// This path.
    Exact(String),
    /// This path or, after a slash, anything below. Has no final slash.
    Prefix(String),
    /// Whatever begins so. Has a final slash.
    Below(String),
    /// Segments.
    Template(Vec<Segment>),
}

/// One segment of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// This text; may be empty only as the last one (a final slash).
    Text(String),
    /// One or more bytes other than `/`.
    Variable(String),
}

impl PathPattern {
    /// Whether the pattern matches a normalised path without its query.
    #[must_use]
    pub fn matches(&self, path: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => path == exact.as_bytes(),
            Self::Prefix(prefix) => {
                path.strip_prefix(prefix.as_bytes()).is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
            }
            Self::Below(prefix) => path.starts_with(prefix.as_bytes()),
            Self::Template(segments) => {
                let Some(rest) = path.strip_prefix(b"/") else {
                    return false;
                };
                let mut parts = rest.split(|byte| *byte == b'/');
                let all = segments.iter().all(|segment| match (segment, parts.next()) {
                    (Segment::Text(text), Some(part)) => part == text.as_bytes(),
                    (Segment::Variable(_), Some(part)) => !part.is_empty(),
                    (_, None) => false,
                });
                all && parts.next().is_none()
            }
        }
    }
}

/// A condition on one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldCondition {
    /// The name, lower case.
    pub name: String,
    /// What must hold.
    pub test: FieldTest,
}

/// What must hold for a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldTest {
    /// It is there.
    Present,
    /// It is not there.
    Absent,
    /// One of its lines has this value.
    Exact(String),
}

impl FieldCondition {
    fn holds(&self, fields: &dyn FieldLines) -> bool {
        let mut lines = 0_usize;
        let mut equal = false;
        fields.for_each_value(&self.name, &mut |value| {
            lines += 1;
            equal |= matches!(&self.test, FieldTest::Exact(wanted) if wanted.as_bytes() == value);
        });
        match self.test {
            FieldTest::Present => lines > 0,
            FieldTest::Absent => lines == 0,
            FieldTest::Exact(_) => equal,
        }
    }
}

impl Route {
    /// Whether the request meets every condition; `host` comes from [`host_of`].
    #[must_use]
    pub fn matches(&self, host: &[u8], request: &RequestParts<'_>) -> bool {
        self.hosts.iter().any(|pattern| pattern.matches(host))
            && self.path.matches(request.target.path())
            && self
                .methods
                .as_ref()
                .is_none_or(|methods| methods.iter().any(|method| method.as_bytes() == request.method))
            && self.fields.iter().all(|condition| condition.holds(request.fields))
    }

    /// The path and query that the upstream sees.
    #[must_use]
    pub fn upstream_target<'t>(&self, target: &'t Target) -> Cow<'t, [u8]> {
        let Some(rewrite) = &self.path_rewrite else {
            return Cow::Borrowed(target.as_bytes());
        };
        let kept = target.as_bytes().get(rewrite.replaced_bytes..).unwrap_or_default();
        let mut result = rewrite.replacement.clone().into_bytes();
        if result.ends_with(b"/") {
            result.extend_from_slice(kept.strip_prefix(b"/").unwrap_or(kept));
        } else {
            result.extend_from_slice(kept);
        }
        Cow::Owned(result)
    }
}

/// How a matched path begins anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathRewrite {
    /// How many bytes of the normalised path are replaced.
    pub replaced_bytes: usize,
    /// What they are replaced with. If it ends with a slash, one slash after the replaced bytes goes too.
    pub replacement: String,
}

/// The authority as it is forwarded: without a final dot of its host (which names the same host, RFC 3986, section
/// 3.2.2). `None` when it is not one host with perhaps a port: user information, lists (two `host` lines joined),
/// percent signs and empty labels are read in different ways by different servers. Then the answer is 400.
#[must_use]
pub fn normal_authority(raw: &[u8]) -> Option<Cow<'_, [u8]>> {
    let authority = without_final_dot(raw);
    let (host, port) = match authority.iter().rposition(|byte| *byte == b':') {
        Some(colon) if authority.last() != Some(&b']') => {
            let (host, port) = authority.split_at(colon);
            (host, port.get(1..))
        }
        _ => (&*authority, None),
    };
    let port_is_sound = port.is_none_or(|port| (1..=5).contains(&port.len()) && port.iter().all(u8::is_ascii_digit));
    let host_is_sound = match host.strip_prefix(b"[").map(|ip| ip.strip_suffix(b"]")) {
        Some(ip) => {
            ip.and_then(|ip| std::str::from_utf8(ip).ok()).is_some_and(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok())
        }
        None => host.split(|byte| *byte == b'.').all(|label| {
            !label.is_empty() && label.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        }),
    };
    (host_is_sound && port_is_sound).then_some(authority)
}

/// The host of an authority as routes compare it: without port and final dot, in lower case.
#[must_use]
pub fn host_of(authority: &[u8]) -> Vec<u8> {
    let authority = without_final_dot(authority);
    let host = match authority.iter().rposition(|byte| *byte == b':') {
        Some(colon) if authority.last() != Some(&b']') => authority.get(..colon).unwrap_or_default(),
        _ => &authority,
    };
    host.to_ascii_lowercase()
}

/// Removes the last dot if it ends the authority or stands before the port.
fn without_final_dot(authority: &[u8]) -> Cow<'_, [u8]> {
    match authority.iter().rposition(|byte| *byte == b'.').map(|dot| authority.split_at(dot)) {
        Some((before, [_])) => Cow::Borrowed(before),
        Some((before, [_, b':', ..])) => {
            let port = authority.get(before.len() + 1..).unwrap_or_default();
            Cow::Owned([before, port].concat())
        }
        _ => Cow::Borrowed(authority),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_compared_without_port_dot_and_case() {
        for (authority, host) in [
            ("api.example.com", "api.example.com"),
            ("API.Example.com:8443", "api.example.com"),
            ("api.example.com.", "api.example.com"),
            ("api.example.com.:80", "api.example.com"),
            ("[::1]", "[::1]"),
            ("[::1]:80", "[::1]"),
            ("127.0.0.1:80", "127.0.0.1"),
        ] {
            assert_eq!(host_of(authority.as_bytes()), host.as_bytes(), "{authority}");
        }
    }

    #[test]
    fn authorities_that_can_be_read_in_two_ways_are_refused() {
        for authority in ["a", "a.b-c_d", "A.b:1", "a:65535", "[::1]", "[::ffff:1.2.3.4]:80", "1.2.3.4"] {
            assert_eq!(normal_authority(authority.as_bytes()).as_deref(), Some(authority.as_bytes()), "{authority}");
        }
        assert_eq!(normal_authority(b"a.b.").as_deref(), Some(&b"a.b"[..]));
        assert_eq!(normal_authority(b"a.b.:80").as_deref(), Some(&b"a.b:80"[..]));
        for authority in [
            "", ".", "..", "a..", "a..b", ".a", ":80", "a:", "a:x", "a:123456", "a:+1", "a:80:80", "u@a", "a,b", "a b",
            "a%2eb", "a/b", "a?b", "::1", "[::1", "::1]", "[]", "[g]", "[::1]x", "\u{e9}",
        ] {
            assert_eq!(normal_authority(authority.as_bytes()), None, "{authority}");
        }
    }

    #[test]
    fn host_patterns_cover_what_they_match() {
        let exact = HostPattern::Exact("a.b.c".to_owned());
        let near = HostPattern::Below(".b.c".to_owned());
        let far = HostPattern::Below(".c".to_owned());
        assert!(near.matches(b"a.b.c") && near.matches(b"x.a.b.c"));
        assert!(!near.matches(b"b.c") && !near.matches(b".b.c") && !near.matches(b"ab.c"));
        for (wide, narrow) in [(&HostPattern::Any, &far), (&far, &near), (&near, &exact), (&HostPattern::Any, &exact)] {
            assert!(wide.covers(narrow) && wide.covers(wide) && !narrow.covers(wide), "{wide:?} {narrow:?}");
        }
    }

    #[test]
    fn path_patterns_respect_segments() {
        let prefix = PathPattern::Prefix("/a".to_owned());
        assert!(prefix.matches(b"/a") && prefix.matches(b"/a/") && prefix.matches(b"/a/b"));
        assert!(!prefix.matches(b"/ab") && !prefix.matches(b"/A"));
        let below = PathPattern::Below("/a/".to_owned());
        assert!(below.matches(b"/a/") && below.matches(b"/a/b") && !below.matches(b"/a"));
        let template = PathPattern::Template(vec![
            Segment::Text("a".to_owned()),
            Segment::Variable("b".to_owned()),
            Segment::Text("c".to_owned()),
        ]);
        assert!(template.matches(b"/a/x/c"));
        for path in ["/a/x", "/a//c", "/a/x/c/", "/a/x/y/c", "/a/x/d", "/"] {
            assert!(!template.matches(path.as_bytes()), "{path}");
        }
    }

    #[test]
    fn one_line_of_a_repeated_field_is_enough() {
        let condition = |test| FieldCondition { name: "x-a".to_owned(), test };
        let lines: [(&[u8], &[u8]); 2] = [(b"X-A", b"1"), (b"x-a", b"2")];
        assert!(condition(FieldTest::Exact("2".to_owned())).holds(&lines));
        assert!(!condition(FieldTest::Exact("1,2".to_owned())).holds(&lines));
        assert!(condition(FieldTest::Present).holds(&lines));
        assert!(!condition(FieldTest::Absent).holds(&lines));
        let none: [(&[u8], &[u8]); 0] = [];
        assert!(!condition(FieldTest::Exact(String::new())).holds(&none));
        assert!(condition(FieldTest::Absent).holds(&none));
        let mut map = http::HeaderMap::new();
        map.append("x-a", http::HeaderValue::from_bytes(b"\xff").expect("a value"));
        assert!(condition(FieldTest::Present).holds(&map));
    }
}
