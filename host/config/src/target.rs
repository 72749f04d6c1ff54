//! The request target, brought into the one form that routes, filters and upstreams all see.
//!
//! A proxy that compares one spelling of a path and forwards another lets requests slip past its rules. So the
//! target is normalised once, before anything looks at it, and the normal form is what is forwarded:
//!
//! * `\` becomes `/`; `.` and `..` segments are resolved, also when written `%2e`; repeated slashes become one.
//! * An escaped slash or backslash (`%2f`, `%5c`), an escaped NUL, a broken escape (`%zz`), a fragment and any
//!   byte that does not belong into a target (RFC 9112, section 3.2) are refused, because servers read them in
//!   different ways.
//! * The query is left alone. `;` is an ordinary character of a segment.
//!
//! This is what Envoy does with the settings of [`crate::envoy`]; the tests there compare the two byte for byte.

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
    /// `%` without two hexadecimal digits.
    #[error("the path holds a broken escape")]
    BrokenEscape,
    /// `%00`.
    #[error("the path holds an escaped NUL")]
    EscapedNul,
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
    let mut plain = Vec::with_capacity(path.len());
    let mut left = path;
    while let Some((byte, rest)) = left.split_first() {
        left = rest;
        match byte {
            b'\\' => plain.push(b'/'),
            b'%' => {
                let value = match left {
                    [high, low, ..] => hex(*high).zip(hex(*low)).map(|(high, low)| high * 16 + low),
                    _ => None,
                };
                match value {
                    None => return Err(TargetRefused::BrokenEscape),
                    Some(0) => return Err(TargetRefused::EscapedNul),
                    Some(b'/' | b'\\') => return Err(TargetRefused::EscapedSlash),
                    Some(b'.') => {
                        plain.push(b'.');
                        left = left.get(2..).unwrap_or_default();
                    }
                    Some(_) => plain.push(b'%'),
                }
            }
            other => plain.push(*other),
        }
    }
    Ok(without_dot_segments(&plain))
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

/// RFC 3986, section 5.2.4, and repeated slashes made one.
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
            b"." | b"" => {}
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
    if result.is_empty() {
        result.push(b'/');
    }
    result
}
