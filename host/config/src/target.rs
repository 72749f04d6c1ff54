//! The request target, brought into the one form that routes, filters and upstreams all see.
//!
//! A proxy that compares one spelling of a path and forwards another lets requests slip past its rules. So the
//! target is normalised once, before anything looks at it, and the normal form is what is forwarded:
//!
//! * `\` becomes `/`; `.` and `..` segments are resolved, also when they are escaped (`%2e`) or carry a parameter
//!   (`..;x`); then repeated slashes become one. Escapes of letters, digits and `-._~` are undone, and the few
//!   printable characters that do not belong into a path (`"<>^{|}` and the grave accent) are escaped.
//! * What servers read in different ways is refused: an escaped slash, backslash or NUL, a broken escape (`%zz`), a
//!   fragment, a byte that is not printable ASCII, and in the result a segment such as `..;` or a path `//`.
//! * The query is left alone. `;` in other segments is an ordinary character.
//!
//! This is what Envoy does with the settings and the first route of [`crate::envoy`]; the tests there compare the
//! two byte for byte. The order of the steps is Envoy's: dot segments are resolved before slashes are merged, so
//! `/a//../b` is `/a/b`.

use std::fmt;

/// A normalised request target in origin-form (RFC 9112, section 3.2.1).
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    bytes: Vec<u8>,
    path_len: usize,
}

/// Why a request target is refused; the answer is 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetRefused {
    /// Neither a path nor anything that has one.
    #[error("the request target is not a path")]
    NotAPath,
    /// A byte that does not belong into a target.
    #[error("the request target holds a byte that does not belong there")]
    Byte,
    /// `#` and what follows is never sent by a correct client.
    #[error("the request target has a fragment")]
    Fragment,
    /// `%2f` or `%5c`.
    #[error("the path holds an escaped slash or backslash")]
    EscapedSlash,
    /// `%00`.
    #[error("the path holds an escaped NUL")]
    EscapedNul,
    /// `%` without two hexadecimal digits.
    #[error("the path holds a broken escape")]
    BrokenEscape,
    /// A `.` or `..` with a parameter that Envoy leaves in place, because it was written with escapes.
    #[error("the path holds a dot segment with a parameter")]
    DotSegment,
    /// `//` and nothing else.
    #[error("the path is empty segments only")]
    OnlySlashes,
}

impl Target {
    /// Normalises a target in origin-form: a path, perhaps with a query.
    ///
    /// # Errors
    /// When it can be read in more than one way. The answer to the client is 400.
    pub fn parse(raw: &[u8]) -> Result<Self, TargetRefused> {
        if raw.first() != Some(&b'/') {
            return Err(TargetRefused::NotAPath);
        }
        if raw.contains(&b'#') {
            return Err(TargetRefused::Fragment);
        }
        if !raw.iter().all(u8::is_ascii_graphic) {
            return Err(TargetRefused::Byte);
        }
        let query_at = raw.iter().position(|byte| *byte == b'?').unwrap_or(raw.len());
        let (path, query) = raw.split_at(query_at);
        let mut bytes = normal_path(path)?;
        let path_len = bytes.len();
        bytes.extend_from_slice(query);
        Ok(Self { bytes, path_len })
    }

    /// The path, without the query. Starts with `/`.
    #[must_use]
    pub fn path(&self) -> &[u8] {
        self.bytes.get(..self.path_len).unwrap_or_default()
    }

    /// Path and query: what is forwarded.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// The path only: a query may hold credentials.
impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({})", self.path().escape_ascii())
    }
}

fn normal_path(path: &[u8]) -> Result<Vec<u8>, TargetRefused> {
    if escapes(path).any(|value| matches!(value, Some(b'/' | b'\\'))) {
        return Err(TargetRefused::EscapedSlash);
    }
    if escapes(path).any(|value| value == Some(0)) {
        return Err(TargetRefused::EscapedNul);
    }
    let spelled = respelled(&without_dot_parameters(path));
    let normal = with_single_slashes(&without_dot_segments(&spelled));
    if normal == b"//" {
        return Err(TargetRefused::OnlySlashes);
    }
    if escapes(&normal).any(|value| value.is_none()) {
        return Err(TargetRefused::BrokenEscape);
    }
    let is_dot_with_parameter = |segment: &[u8]| {
        let rest = segment.strip_prefix(b".").map(|rest| rest.strip_prefix(b".").unwrap_or(rest));
        rest.is_some_and(|rest| {
            rest.starts_with(b";") || rest.get(..3).is_some_and(|rest| rest.eq_ignore_ascii_case(b"%3b"))
        })
    };
    if normal.split(|byte| *byte == b'/').any(is_dot_with_parameter) {
        return Err(TargetRefused::DotSegment);
    }
    Ok(normal)
}

/// The byte that each `%` stands for, or nothing where two hexadecimal digits are missing.
fn escapes(path: &[u8]) -> impl Iterator<Item = Option<u8>> {
    path.iter().enumerate().filter(|(_, byte)| **byte == b'%').map(|(at, _)| unescaped(path.get(at + 1..)?))
}

fn unescaped(rest: &[u8]) -> Option<u8> {
    let digit = |digit: &u8| char::from(*digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    match rest {
        [high, low, ..] => Some(digit(high)? * 16 + digit(low)?),
        _ => None,
    }
}

/// RFC 3986, section 2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// `/a/..;x/b` as `/a/../b`: servers that know path parameters see a dot segment there.
fn without_dot_parameters(path: &[u8]) -> Vec<u8> {
    let mut result = Vec::with_capacity(path.len());
    for (index, segment) in path.split(|byte| *byte == b'/').enumerate() {
        if index > 0 {
            result.push(b'/');
        }
        result.extend_from_slice(if segment.starts_with(b"..;") {
            b".."
        } else if segment.starts_with(b".;") {
            b"."
        } else {
            segment
        });
    }
    result
}

/// One spelling per character.
fn respelled(path: &[u8]) -> Vec<u8> {
    let mut result = Vec::with_capacity(path.len());
    let mut broken = Vec::new();
    let mut left = path;
    while let Some((byte, rest)) = left.split_first() {
        left = rest;
        match byte {
            b'\\' => result.push(b'/'),
            b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}' => {
                result.extend_from_slice(format!("%{byte:02X}").as_bytes());
            }
            b'%' => match unescaped(rest) {
                Some(value) if is_unreserved(value) => {
                    result.push(value);
                    left = rest.get(2..).unwrap_or_default();
                }
                Some(_) => result.push(b'%'),
                None => {
                    broken.push(result.len());
                    result.push(b'%');
                }
            },
            other => result.push(*other),
        }
    }
    percent_signs_as_such(result, &broken)
}

/// `%%34%31` must not become `%41`, an escape that nobody sent: its first character is a percent sign, `%25`.
fn percent_signs_as_such(path: Vec<u8>, broken: &[usize]) -> Vec<u8> {
    if broken.is_empty() {
        return path;
    }
    let mut broken = broken.iter().copied().peekable();
    let mut result = Vec::with_capacity(path.len());
    for (at, byte) in path.iter().enumerate() {
        result.push(*byte);
        if broken.next_if_eq(&at).is_some() && path.get(at + 1..).is_some_and(|rest| unescaped(rest).is_some()) {
            result.extend_from_slice(b"25");
        }
    }
    result
}

/// RFC 3986, section 5.2.4.
fn without_dot_segments(path: &[u8]) -> Vec<u8> {
    let mut result: Vec<u8> = Vec::with_capacity(path.len());
    let mut segments = path.split(|byte| *byte == b'/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            b".." => {
                let cut = result.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                result.truncate(cut);
            }
            b"." => {}
            segment => {
                result.push(b'/');
                result.extend_from_slice(segment);
                continue;
            }
        }
        if last {
            result.push(b'/');
        }
    }
    result
}

/// Runs of slashes made one. Envoy joins what is not empty between a slash at the start and, if there was one, a
/// slash at the end; so nothing but slashes becomes two.
fn with_single_slashes(path: &[u8]) -> Vec<u8> {
    if !path.windows(2).any(|pair| pair == b"//") {
        return path.to_vec();
    }
    let segments: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|segment| !segment.is_empty()).collect();
    let mut result = vec![b'/'];
    result.extend_from_slice(&segments.join(&b'/'));
    if path.ends_with(b"/") {
        result.push(b'/');
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(raw: &str, normal: Result<&str, TargetRefused>) {
        let parsed = Target::parse(raw.as_bytes());
        let shown = parsed.as_ref().map(|target| std::str::from_utf8(target.as_bytes()).expect("ASCII"));
        assert_eq!(shown.map_err(|error| *error), normal, "{raw}");
        // What is forwarded means the same to whoever normalises it again.
        if let Ok(target) = parsed {
            assert_eq!(Target::parse(target.as_bytes()).as_ref(), Ok(&target), "{raw}");
        }
    }

    #[test]
    fn leaves_plain_targets_alone() {
        for target in
            ["/", "/a", "/a/", "/a/b.c", "/a;b=1/c", "/a?", "/a?b=/../c%2f%zz//", "/%c3%A9", "/a%20b", "/...", "/.a"]
        {
            check(target, Ok(target));
        }
    }

    #[test]
    fn resolves_dot_segments_before_it_merges_slashes() {
        check("/a/./b", Ok("/a/b"));
        check("/a/../b", Ok("/b"));
        check("/a/b/..", Ok("/a/"));
        check("/a/.", Ok("/a/"));
        check("/..", Ok("/"));
        check("/../../a", Ok("/a"));
        check("/a//b", Ok("/a/b"));
        check("//a", Ok("/a"));
        check("/a//", Ok("/a/"));
        check("/a//../b", Ok("/a/b"));
        check("/a/b//..", Ok("/a/b/"));
        check("/a/..?b/../c", Ok("/?b/../c"));
    }

    #[test]
    fn undoes_escapes_that_hide_dot_segments_and_letters() {
        check("/a/%2e%2E/b", Ok("/b"));
        check("/a/.%2e/b", Ok("/b"));
        check("/%61dmin", Ok("/admin"));
        check("/%7euser/%2D%5f%41%30", Ok("/~user/-_A0"));
        check("/%21%3b%3F%23", Ok("/%21%3b%3F%23"));
        check("/\"<>^`{|}", Ok("/%22%3C%3E%5E%60%7B%7C%7D"));
        check("/a?\"<>^`{|}", Ok("/a?\"<>^`{|}"));
    }

    #[test]
    fn takes_backslashes_for_slashes() {
        check("/a\\b", Ok("/a/b"));
        check("/a\\..\\b", Ok("/b"));
        check("/a?b\\c", Ok("/a?b\\c"));
    }

    #[test]
    fn resolves_dot_segments_with_parameters() {
        check("/a/..;/b", Ok("/b"));
        check("/a/..;x=1/b", Ok("/b"));
        check("/a/.;x/b", Ok("/a/b"));
        check("/a/x..;/b", Ok("/a/x..;/b"));
    }

    #[test]
    fn refuses_what_servers_read_in_different_ways() {
        check("", Err(TargetRefused::NotAPath));
        check("*", Err(TargetRefused::NotAPath));
        check("a", Err(TargetRefused::NotAPath));
        check("http://a/b", Err(TargetRefused::NotAPath));
        check("/a#b", Err(TargetRefused::Fragment));
        check("/a b", Err(TargetRefused::Byte));
        check("/a\u{7f}", Err(TargetRefused::Byte));
        check("/\u{e9}", Err(TargetRefused::Byte));
        check("/a?\u{e9}", Err(TargetRefused::Byte));
        check("/a%2fb", Err(TargetRefused::EscapedSlash));
        check("/a%2Fb", Err(TargetRefused::EscapedSlash));
        check("/a%5cb", Err(TargetRefused::EscapedSlash));
        check("/a%00", Err(TargetRefused::EscapedNul));
        check("/a%", Err(TargetRefused::BrokenEscape));
        check("/a%2", Err(TargetRefused::BrokenEscape));
        check("/a%zz", Err(TargetRefused::BrokenEscape));
        check("/a%%41", Err(TargetRefused::BrokenEscape));
        check("/a/%2e%2e;/b", Err(TargetRefused::DotSegment));
        check("/a/..%3B/b", Err(TargetRefused::DotSegment));
        check("/a\\..;\\b", Err(TargetRefused::DotSegment));
        check("//", Err(TargetRefused::OnlySlashes));
        check("/\\", Err(TargetRefused::OnlySlashes));
    }

    #[test]
    fn an_escape_made_of_escapes_is_a_percent_sign() {
        check("/%%34%31", Ok("/%2541"));
        check("/%%32%66", Ok("/%252f"));
    }

    #[test]
    fn long_targets_take_time_in_proportion() {
        for piece in ["%", "%%30%30", "/..", "/", "..;/", "a/../"] {
            let start = std::time::Instant::now();
            drop(Target::parse(format!("/{}", piece.repeat(200_000)).as_bytes()));
            assert!(start.elapsed().as_secs() < 5, "{piece} took {:?}", start.elapsed());
        }
    }

    #[test]
    fn debug_shows_no_query() {
        let target = Target::parse(b"/a?token=secret").expect("a target");
        assert_eq!(format!("{target:?}"), "Target(/a)");
    }
}
