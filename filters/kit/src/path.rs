//! Reads a request target's path once, the way a router does, and says what in it two readers could read differently.
//!
//! A rule that guards `/admin` is worth nothing if the upstream also takes `/x/..%2fadmin` for it. Whether `%2f`, `;`,
//! `//` or `..` mean something differs from server to server, so a path with one of them is refused, unless the rule
//! allows it by name. What remains is normalised without loss: escapes of unreserved characters are decoded, other
//! escapes get upper-case digits (RFC 3986, section 6.2.2). The upstream receives the path as the client sent it.

use std::fmt;

use schemars::JsonSchema;
use serde::Deserialize;

/// The path of a request target, normalised, without the query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    normalised: String,
    oddities: Oddities,
}

/// Something in a path that two readers could read differently. Those that a configuration may allow have a name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Oddity {
    /// `%2f`: part of a segment to some, a separator to others.
    EncodedSlash,
    /// `%5c`: as `EncodedSlash`, on servers that take a backslash for a slash.
    EncodedBackslash,
    /// `//`, which many servers merge into `/`.
    EmptySegment,
    /// `;`, where some servers cut off parameters: `/admin;x` is `/admin` to them.
    Semicolon,
    /// Bytes above `0x7f`, which a URI holds only percent-encoded (RFC 3986, section 2).
    NonAscii,
    /// `.` and `..` segments, also when percent-encoded. No rule can allow them.
    #[serde(skip)]
    DotSegment,
    /// `\`, a slash to some. No rule can allow it.
    #[serde(skip)]
    Backslash,
    /// `%` without two hexadecimal digits after it. No rule can allow it.
    #[serde(skip)]
    InvalidEscape,
    /// A control character or a space, plain or percent-encoded (`%00`, `%0d`). No rule can allow it.
    #[serde(skip)]
    Control,
    /// `#`, which no request target contains (RFC 9112, section 3.2). No rule can allow it.
    #[serde(skip)]
    Fragment,
}

impl Oddity {
    /// What a log line says when a request is refused for it.
    pub fn finding(self) -> &'static str {
        match self {
            Self::EncodedSlash => "the path contains `%2f`",
            Self::EncodedBackslash => "the path contains `%5c`",
            Self::EmptySegment => "the path contains `//`",
            Self::Semicolon => "the path contains `;`",
            Self::NonAscii => "the path contains bytes above 0x7f",
            Self::DotSegment => "the path contains a dot segment",
            Self::Backslash => "the path contains a backslash",
            Self::InvalidEscape => "the path contains an invalid percent-encoding",
            Self::Control => "the path contains a control character",
            Self::Fragment => "the path contains `#`",
        }
    }
}

/// A set of [`Oddity`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Oddities(u16);

impl Oddities {
    fn add(&mut self, oddity: Oddity) {
        self.0 |= 1 << oddity as u16;
    }

    fn contains(self, oddity: Oddity) -> bool {
        self.0 & (1 << oddity as u16) != 0
    }

    /// One of those in `self` that are not in `allowed`; the worst first, so that a log line names that.
    pub fn first_beyond(self, allowed: Self) -> Option<Oddity> {
        use Oddity::*;
        [
            Control,
            DotSegment,
            Backslash,
            InvalidEscape,
            Fragment,
            EncodedSlash,
            EncodedBackslash,
            EmptySegment,
            Semicolon,
            NonAscii,
        ]
        .into_iter()
        .find(|oddity| self.contains(*oddity) && !allowed.contains(*oddity))
    }
}

impl FromIterator<Oddity> for Oddities {
    fn from_iter<I: IntoIterator<Item = Oddity>>(oddities: I) -> Self {
        let mut set = Self::default();
        oddities.into_iter().for_each(|oddity| set.add(oddity));
        set
    }
}

impl Path {
    /// Reads the path of a request target; what follows the first `?` is not part of it. `None` if the target is in
    /// neither origin-form nor asterisk-form (RFC 9112, section 3.2).
    pub fn parse(target: &[u8]) -> Option<Self> {
        if target == b"*" {
            return Some(Self { normalised: "*".to_owned(), oddities: Oddities::default() });
        }
        if target.first() != Some(&b'/') {
            return None;
        }
        let mut oddities = Oddities::default();
        let (path, query) = match target.iter().position(|byte| *byte == b'?') {
            Some(at) => target.split_at_checked(at)?,
            None => (target, &[][..]),
        };
        // The query has its own grammar and its own readers; only what could end or split the request line matters here.
        for byte in query {
            match byte {
                0..=b' ' | 0x7f => oddities.add(Oddity::Control),
                b'#' => oddities.add(Oddity::Fragment),
                _ => {}
            }
        }
        let normalised = normalise(path, &mut oddities);
        let mut segments = normalised.split('/').skip(1).peekable();
        while let Some(segment) = segments.next() {
            match segment {
                "." | ".." => oddities.add(Oddity::DotSegment),
                // The last segment may be empty: `/orders/` and `/`.
                "" if segments.peek().is_some() => oddities.add(Oddity::EmptySegment),
                // Servers that cut off parameters see a dot segment in `..;x`.
                _ if segment.starts_with(".;") || segment.starts_with("..;") => oddities.add(Oddity::DotSegment),
                _ => {}
            }
        }
        Some(Self { normalised, oddities })
    }

    /// The normalised path. Plain ASCII, so what it shows is what is compared.
    pub fn as_str(&self) -> &str {
        &self.normalised
    }

    /// What is ambiguous about the path. It is to be refused unless every one of these is allowed.
    pub fn oddities(&self) -> Oddities {
        self.oddities
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.normalised)
    }
}

fn normalise(path: &[u8], oddities: &mut Oddities) -> String {
    let mut normalised = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'%' => {
                let digits = after.split_at_checked(2).and_then(|(digits, after)| Some((hex_value(digits)?, after)));
                let Some((value, after)) = digits else {
                    oddities.add(Oddity::InvalidEscape);
                    normalised.push('%');
                    continue;
                };
                rest = after;
                match value {
                    b'/' => oddities.add(Oddity::EncodedSlash),
                    b'\\' => oddities.add(Oddity::EncodedBackslash),
                    b';' => oddities.add(Oddity::Semicolon),
                    0..=0x1f | 0x7f => oddities.add(Oddity::Control),
                    _ => {}
                }
                if value.is_ascii_alphanumeric() || b"-._~".contains(&value) {
                    normalised.push(char::from(value));
                } else {
                    push_escaped(&mut normalised, value);
                }
                continue;
            }
            b'\\' => oddities.add(Oddity::Backslash),
            b';' => oddities.add(Oddity::Semicolon),
            b'#' => oddities.add(Oddity::Fragment),
            0..=b' ' | 0x7f => oddities.add(Oddity::Control),
            0x80.. => {
                oddities.add(Oddity::NonAscii);
                push_escaped(&mut normalised, *byte);
                continue;
            }
            _ => {}
        }
        normalised.push(char::from(*byte));
    }
    normalised
}

/// Writes a byte as `%` and two upper-case hexadecimal digits.
pub(crate) fn push_escaped(text: &mut String, byte: u8) {
    text.push('%');
    for digit in [byte >> 4, byte & 0xf] {
        text.push(char::from_digit(digit.into(), 16).unwrap_or('0').to_ascii_uppercase());
    }
}

fn hex_value(digits: &[u8]) -> Option<u8> {
    let mut value = 0;
    for digit in digits {
        value = value * 16 + u8::try_from(char::from(*digit).to_digit(16)?).ok()?;
    }
    Some(value)
}

/// A pattern of whole segments, `/orders/{order_id}`: literal segments, and parameters that take any segment but an
/// empty one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    segments: Vec<Segment>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Parameter,
}

impl Template {
    /// Reads a template; the error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut names = Vec::new();
        let mut segments = Vec::new();
        let rest = text.strip_prefix('/').ok_or("a path template begins with `/`")?;
        for segment in rest.split('/') {
            if let Some(name) = segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
                if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') {
                    return Err(format!("`{{{name}}}` is not a parameter: its name is made of `a-z`, `0-9` and `_`"));
                }
                if names.contains(&name) {
                    return Err(format!("the parameter `{{{name}}}` stands here twice"));
                }
                names.push(name);
                segments.push(Segment::Parameter);
            } else if segment.contains(['{', '}', '*']) {
                return Err(format!("`{segment}` is neither a literal segment nor a parameter such as `{{order_id}}`"));
            } else {
                segments.push(Segment::Literal(segment.to_owned()));
            }
        }
        let literal: String = segments
            .iter()
            .map(|segment| match segment {
                Segment::Literal(literal) => format!("/{literal}"),
                Segment::Parameter => "/x".to_owned(),
            })
            .collect();
        literal_path(&literal)?;
        Ok(Self { segments })
    }

    /// Whether the whole path fits.
    pub fn matches(&self, path: &Path) -> bool {
        let mut actual = path.as_str().split('/').skip(1);
        let fits = self.segments.iter().all(|segment| match (segment, actual.next()) {
            (Segment::Literal(literal), Some(actual)) => literal == actual,
            (Segment::Parameter, Some(actual)) => !actual.is_empty(),
            (_, None) => false,
        });
        fits && actual.next().is_none()
    }

    /// Whether every path that fits `other` fits `self` too.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        self.segments.len() == other.segments.len()
            && self.segments.iter().zip(&other.segments).all(|pair| match pair {
                (Segment::Parameter, Segment::Parameter) => true,
                (Segment::Parameter, Segment::Literal(literal)) => !literal.is_empty(),
                (Segment::Literal(a), Segment::Literal(b)) => a == b,
                (Segment::Literal(_), Segment::Parameter) => false,
            })
    }

    /// Whether every path that fits begins with these literal segments.
    pub(crate) fn begins_with(&self, prefix: &str) -> bool {
        prefix
            .trim_end_matches('/')
            .split('/')
            .skip(1)
            .zip(self.segments.iter().map(Some).chain(std::iter::repeat(None)))
            .all(|(expected, segment)| matches!(segment, Some(Segment::Literal(literal)) if literal == expected))
    }
}

/// Checks a path that a configuration spells out: it must be what a request's path looks like once normalised, or it
/// would never match.
pub(crate) fn literal_path(text: &str) -> Result<Path, String> {
    let path = Path::parse(text.as_bytes()).ok_or("a path begins with `/`")?;
    if text.contains('?') {
        return Err("a path ends before the `?`; the query takes no part in matching".to_owned());
    }
    if let Some(oddity) = path
        .oddities()
        .first_beyond([Oddity::EncodedSlash, Oddity::EncodedBackslash, Oddity::Semicolon].into_iter().collect())
    {
        return Err(oddity.finding().to_owned());
    }
    if path.as_str() != text {
        return Err(format!("paths are compared in normalised form: write `{path}`"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(target: &str, normalised: &str, oddities: &[Oddity]) {
        let path = Path::parse(target.as_bytes()).expect("origin-form");
        assert_eq!((path.as_str(), path.oddities()), (normalised, oddities.iter().copied().collect()), "{target}");
    }

    #[test]
    fn normalises_what_is_not_ambiguous() {
        check("/", "/", &[]);
        check("/orders/1?x=/../%2f;", "/orders/1", &[]);
        check("/orders/", "/orders/", &[]);
        check("/%6frders/%7Ejoe/%2D", "/orders/~joe/-", &[]);
        check("/a%20b%c3%a9%3F", "/a%20b%C3%A9%3F", &[]);
        check("/a:b@c!$&'()*+,=", "/a:b@c!$&'()*+,=", &[]);
        check("/a...b/..c/.d", "/a...b/..c/.d", &[]);
        check("/%252e", "/%252e", &[]);
        check("*", "*", &[]);
    }

    #[test]
    fn sees_every_oddity() {
        use Oddity::*;
        check("/a%2fb", "/a%2Fb", &[EncodedSlash]);
        check("/a%2Fb", "/a%2Fb", &[EncodedSlash]);
        check("/a%5cb", "/a%5Cb", &[EncodedBackslash]);
        check("/a\\b", "/a\\b", &[Backslash]);
        check("/a//b", "/a//b", &[EmptySegment]);
        check("//", "//", &[EmptySegment]);
        check("//evil.example/x", "//evil.example/x", &[EmptySegment]);
        check("/a;b", "/a;b", &[Semicolon]);
        check("/a%3bb", "/a%3Bb", &[Semicolon]);
        check("/..;/admin", "/..;/admin", &[Semicolon, DotSegment]);
        for dots in ["/.", "/..", "/../a", "/a/./b", "/a/..", "/a/%2e%2E/b", "/a/.%2e"] {
            assert!(Path::parse(dots.as_bytes()).expect("origin-form").oddities().contains(DotSegment), "{dots}");
        }
        check("/a\u{e9}", "/a%C3%A9", &[NonAscii]);
        check("/a%", "/a%", &[InvalidEscape]);
        check("/a%2", "/a%2", &[InvalidEscape]);
        check("/a%zz", "/a%zz", &[InvalidEscape]);
        check("/a%+1", "/a%+1", &[InvalidEscape]);
        check("/a%00", "/a%00", &[Control]);
        check("/a%0d%0a", "/a%0D%0A", &[Control]);
        check("/a\tb", "/a\tb", &[Control]);
        check("/a b", "/a b", &[Control]);
        check("/a?b\0", "/a", &[Control]);
        check("/a#b", "/a#b", &[Fragment]);
        check("/a?b#c", "/a", &[Fragment]);
    }

    #[test]
    fn reads_only_origin_form_and_asterisk_form() {
        for target in ["", "orders", "http://api.example/orders", "api.example:443", "**", "*/"] {
            assert_eq!(Path::parse(target.as_bytes()), None, "{target}");
        }
    }

    #[test]
    fn templates_match_whole_segments() {
        let template = Template::parse("/orders/{order_id}/lines").expect("a template");
        for (path, fits) in [
            ("/orders/1/lines", true),
            ("/orders/a%2Fb/lines", true),
            ("/%6frders/1/lines", true),
            ("/orders//lines", false),
            ("/orders/1/lines/", false),
            ("/orders/1", false),
            ("/orders/1/lines/2", false),
            ("/Orders/1/lines", false),
            ("*", false),
        ] {
            assert_eq!(template.matches(&Path::parse(path.as_bytes()).expect("a path")), fits, "{path}");
        }
        let root = Template::parse("/").expect("a template");
        assert!(root.matches(&Path::parse(b"/").expect("a path")));
        assert!(!root.matches(&Path::parse(b"/a").expect("a path")));
    }

    #[test]
    fn templates_that_cannot_be_meant_are_refused() {
        for (text, error) in [
            ("orders", "a path template begins with `/`"),
            ("/{}", "`{}` is not a parameter: its name is made of `a-z`, `0-9` and `_`"),
            ("/{Id}", "`{Id}` is not a parameter: its name is made of `a-z`, `0-9` and `_`"),
            ("/{id}/{id}", "the parameter `{id}` stands here twice"),
            ("/a{id}", "`a{id}` is neither a literal segment nor a parameter such as `{order_id}`"),
            ("/a/*", "`*` is neither a literal segment nor a parameter such as `{order_id}`"),
            ("/a//b", "the path contains `//`"),
            ("/a/../b", "the path contains a dot segment"),
            ("/%61", "paths are compared in normalised form: write `/a`"),
            ("/a?b", "a path ends before the `?`; the query takes no part in matching"),
        ] {
            assert_eq!(Template::parse(text).expect_err(text), error);
        }
    }

    proptest! {
        #[test]
        fn survives_anything_and_normalises_to_a_fixed_point(mut target in proptest::collection::vec(any::<u8>(), 0..64)) {
            target.insert(0, b'/');
            let path = Path::parse(&target).expect("origin-form");
            prop_assert!(path.as_str().is_ascii());
            if path.oddities().first_beyond([Oddity::NonAscii].into_iter().collect()).is_none() {
                let again = Path::parse(path.as_str().as_bytes()).expect("origin-form");
                prop_assert_eq!(again.as_str(), path.as_str());
            }
        }

        #[test]
        fn an_unambiguous_path_decodes_to_no_separator(target in "/[a-c./%2efFEc5;\\\\]{0,24}") {
            let path = Path::parse(target.as_bytes()).expect("origin-form");
            if path.oddities() == Oddities::default() {
                let lower = path.as_str().to_ascii_lowercase();
                prop_assert!(!lower.contains("%2f") && !lower.contains("%5c") && !lower.contains("%2e"));
                prop_assert!(!lower.contains("/../") && !lower.contains("//") && !lower.contains("/./"));
            }
        }
    }
}
