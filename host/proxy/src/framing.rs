//! Where one HTTP/1.1 request ends and the next begins, decided strictly, before hyper sees a byte.
//!
//! Follows RFC 9112. Two parsers that disagree about the end of a request let a client smuggle a second one past the
//! filters, so everything on which servers are known to disagree is refused here: `content-length` beside
//! `transfer-encoding`, either of them twice, codings other than `chunked`, bare LF and CR, folded lines, space before
//! the colon. hyper accepts some of these (it drops a `content-length` that follows `transfer-encoding`, takes bare LF
//! as a line's end and repeated equal lengths as one); after this module it never meets them.
//!
//! Plain data in and out; the socket is in `gate`.

use memchr::memchr;

/// Limits on one request's head.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Bytes of request line and fields together.
    pub bytes_max: usize,
    /// Number of field lines.
    pub fields_max: usize,
}

/// Bytes that chunk sizes' extensions may take in one body; nobody uses them, attackers do (CVE-2023-39326 in Go).
const CHUNK_EXTENSION_BYTES_MAX: usize = 4096;
/// Empty lines tolerated before a request line (RFC 9112, section 2.2 asks for at least one).
const LEADING_LINES_MAX: usize = 4;

/// Why a request is refused before any filter sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A line of the head does not follow the grammar.
    Malformed(&'static str),
    /// The body's length is stated in more than one way, or in none that we accept.
    AmbiguousLength(&'static str),
    /// A transfer coding other than `chunked`.
    UnknownCoding,
    /// An HTTP version other than 1.0 and 1.1.
    Version,
    /// The request target alone is beyond the limit of the head.
    TargetTooLong,
    /// The head is beyond its limit of bytes or fields.
    HeadTooLarge,
    /// The head did not arrive in time.
    HeadTooSlow,
}

impl Violation {
    /// The status that the client gets.
    pub fn status(self) -> u16 {
        match self {
            Violation::Malformed(_) | Violation::AmbiguousLength(_) => 400,
            Violation::UnknownCoding => 501,
            Violation::Version => 505,
            Violation::TargetTooLong => 414,
            Violation::HeadTooLarge => 431,
            Violation::HeadTooSlow => 408,
        }
    }

    /// The response code details, as access log and metrics show them.
    pub fn details(self) -> &'static str {
        match self {
            Violation::Malformed(_) => "http1.codec_error",
            Violation::AmbiguousLength(_) => "http1.content_length_ambiguous",
            Violation::UnknownCoding => "http1.invalid_transfer_encoding",
            Violation::Version => "http1.version_not_supported",
            Violation::TargetTooLong => "http1.target_too_long",
            Violation::HeadTooLarge => "http1.headers_too_large",
            Violation::HeadTooSlow => "request_header_timeout",
        }
    }

    /// What is wrong, for the log.
    pub fn reason(self) -> &'static str {
        match self {
            Violation::Malformed(what) | Violation::AmbiguousLength(what) => what,
            Violation::UnknownCoding => "transfer coding other than chunked",
            Violation::Version => "unknown HTTP version",
            Violation::TargetTooLong => "request target over the limit",
            Violation::HeadTooLarge => "request fields over the limit",
            Violation::HeadTooSlow => "request head not received in time",
        }
    }
}

/// What to do with the bytes at the front of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This many bytes are in order: pass them on and drop them from the input.
    Pass(usize),
    /// More input is needed before anything can be passed on.
    More,
    /// The connection's input ends here.
    Refuse(Violation),
}

/// The state of one connection's input.
#[derive(Debug)]
pub struct Framing {
    limits: HeadLimits,
    state: State,
}

#[derive(Debug)]
enum State {
    Head(Head),
    Fixed(u64),
    Chunked(Chunked),
    Refused,
}

#[derive(Debug, Default)]
struct Head {
    /// Start of the line that is not yet complete, and how far it was searched for its end.
    line_start: usize,
    searched: usize,
    leading: usize,
    request_line: bool,
    http_10: bool,
    fields: usize,
    hosts: usize,
    length: Option<u64>,
    chunked: bool,
}

#[derive(Debug)]
struct Chunked {
    at: ChunkAt,
    size: u64,
    digits: u32,
    extension_bytes: usize,
    trailer_bytes: usize,
    trailer_line_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkAt {
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Trailer,
    TrailerLf,
    Done,
}

impl Framing {
    /// A connection at its first request.
    pub fn new(limits: HeadLimits) -> Framing {
        Framing { limits, state: State::Head(Head::default()) }
    }

    /// Whether the next byte belongs to a head (and not to a body).
    pub fn is_at_head(&self) -> bool {
        matches!(self.state, State::Head(_))
    }

    /// Looks at `input`, which begins where the last `Pass` ended and has grown since the last `More`.
    ///
    /// A head is passed whole or not at all, body bytes as they come. What `Pass` lets through is a head where
    /// [`Framing::is_at_head`] was true before.
    pub fn advance(&mut self, input: &[u8]) -> Step {
        if input.is_empty() {
            return Step::More;
        }
        match &mut self.state {
            State::Head(head) => match head.advance(input, self.limits) {
                Ok(None) => Step::More,
                Ok(Some(len)) => {
                    self.state = if head.chunked {
                        State::Chunked(Chunked::new())
                    } else {
                        match head.length {
                            Some(length) if length > 0 => State::Fixed(length),
                            _ => State::Head(Head::default()),
                        }
                    };
                    Step::Pass(len)
                }
                Err(violation) => self.refuse(violation),
            },
            State::Fixed(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                *left -= take as u64;
                if *left == 0 {
                    self.state = State::Head(Head::default());
                }
                Step::Pass(take)
            }
            State::Chunked(chunked) => match chunked.advance(input, self.limits) {
                Ok(len) => {
                    if chunked.at == ChunkAt::Done {
                        self.state = State::Head(Head::default());
                    }
                    Step::Pass(len)
                }
                Err(violation) => self.refuse(violation),
            },
            State::Refused => Step::More,
        }
    }

    fn refuse(&mut self, violation: Violation) -> Step {
        self.state = State::Refused;
        Step::Refuse(violation)
    }
}

impl Head {
    /// The length of the head if it is complete.
    fn advance(&mut self, input: &[u8], limits: HeadLimits) -> Result<Option<usize>, Violation> {
        loop {
            let unsearched = input.get(self.searched..).unwrap_or_default();
            let Some(offset) = memchr(b'\n', unsearched) else {
                self.searched = input.len();
                return if input.len() > limits.bytes_max { Err(self.too_large()) } else { Ok(None) };
            };
            let end = self.searched + offset;
            if end >= limits.bytes_max {
                return Err(self.too_large());
            }
            // line_start <= searched <= end < input.len()
            let line = input.get(self.line_start..end).unwrap_or_default();
            let Some(line) = line.strip_suffix(b"\r") else {
                return Err(Violation::Malformed("line ends in bare LF"));
            };
            self.line_start = end + 1;
            self.searched = end + 1;
            if !self.request_line {
                if line.is_empty() {
                    self.leading += 1;
                    if self.leading > LEADING_LINES_MAX {
                        return Err(Violation::Malformed("empty lines before the request line"));
                    }
                    continue;
                }
                self.take_request_line(line)?;
            } else if line.is_empty() {
                self.check_end()?;
                return Ok(Some(self.line_start));
            } else {
                self.fields += 1;
                if self.fields > limits.fields_max {
                    return Err(Violation::HeadTooLarge);
                }
                self.take_field(line)?;
            }
        }
    }

    fn too_large(&self) -> Violation {
        if self.request_line { Violation::HeadTooLarge } else { Violation::TargetTooLong }
    }

    fn take_request_line(&mut self, line: &[u8]) -> Result<(), Violation> {
        let malformed = Violation::Malformed("request line");
        let mut parts = line.split(|byte| *byte == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(malformed);
        };
        if method.is_empty() || !method.iter().copied().all(is_token) {
            return Err(Violation::Malformed("method"));
        }
        // RFC 9112, section 3.2: no white space; controls and bytes beyond ASCII are no part of any target form.
        // A fragment is never sent (RFC 9110, section 7.1); servers differ in whether they cut it off.
        if target.is_empty() || !target.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#') {
            return Err(Violation::Malformed("request target"));
        }
        match version {
            b"HTTP/1.1" => {}
            b"HTTP/1.0" => self.http_10 = true,
            _ if version.starts_with(b"HTTP/") => return Err(Violation::Version),
            _ => return Err(malformed),
        }
        self.request_line = true;
        Ok(())
    }

    fn take_field(&mut self, line: &[u8]) -> Result<(), Violation> {
        if matches!(line.first(), Some(b' ' | b'\t')) {
            return Err(Violation::Malformed("folded field line"));
        }
        let Some(colon) = memchr(b':', line) else {
            return Err(Violation::Malformed("field line without a colon"));
        };
        let (name, rest) = line.split_at(colon);
        let value = trim_ows(rest.get(1..).unwrap_or_default());
        if name.is_empty() || !name.iter().copied().all(is_token) {
            return Err(Violation::Malformed("field name"));
        }
        if value.iter().any(|byte| (*byte < 0x20 && *byte != b'\t') || *byte == 0x7f) {
            return Err(Violation::Malformed("control character in a field value"));
        }
        if name.eq_ignore_ascii_case(b"content-length") {
            if self.length.is_some() {
                return Err(Violation::AmbiguousLength("content-length twice"));
            }
            self.length = Some(parse_length(value)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.chunked {
                return Err(Violation::AmbiguousLength("transfer-encoding twice"));
            }
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Violation::UnknownCoding);
            }
            self.chunked = true;
        } else if name.eq_ignore_ascii_case(b"host") {
            self.hosts += 1;
        }
        Ok(())
    }

    fn check_end(&self) -> Result<(), Violation> {
        if self.chunked && self.length.is_some() {
            return Err(Violation::AmbiguousLength("content-length beside transfer-encoding"));
        }
        if self.chunked && self.http_10 {
            return Err(Violation::AmbiguousLength("transfer-encoding in HTTP/1.0"));
        }
        match self.hosts {
            0 if !self.http_10 => Err(Violation::Malformed("host is missing")),
            0 | 1 => Ok(()),
            _ => Err(Violation::Malformed("host twice")),
        }
    }
}

/// Without the optional white space around a value (RFC 9110, section 5.6.3): space and tab, and not a CR that stands alone.
fn trim_ows(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

fn parse_length(value: &[u8]) -> Result<u64, Violation> {
    // 18 digits stay below 2^63: no arithmetic on lengths can overflow.
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return Err(Violation::AmbiguousLength("content-length is no plain number"));
    }
    Ok(value.iter().fold(0, |length, digit| length * 10 + u64::from(digit - b'0')))
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

impl Chunked {
    fn new() -> Chunked {
        Chunked { at: ChunkAt::Size, size: 0, digits: 0, extension_bytes: 0, trailer_bytes: 0, trailer_line_bytes: 0 }
    }

    /// How many bytes of `input` belong to this body. At least one, or an error.
    fn advance(&mut self, input: &[u8], limits: HeadLimits) -> Result<usize, Violation> {
        let mut at = 0;
        while at < input.len() && self.at != ChunkAt::Done {
            if self.at == ChunkAt::Data {
                let take = usize::try_from(self.size).unwrap_or(usize::MAX).min(input.len() - at);
                self.size -= take as u64;
                at += take;
                if self.size == 0 {
                    self.at = ChunkAt::DataCr;
                }
                continue;
            }
            let Some(byte) = input.get(at).copied() else { break };
            at += 1;
            self.take(byte, limits)?;
        }
        Ok(at)
    }

    fn take(&mut self, byte: u8, limits: HeadLimits) -> Result<(), Violation> {
        let malformed = Violation::Malformed("chunked body");
        self.at = match (self.at, byte) {
            (ChunkAt::Size, _) if byte.is_ascii_hexdigit() => {
                self.digits += 1;
                if self.digits > 15 {
                    return Err(malformed);
                }
                self.size = self.size * 16 + u64::from(char::from(byte).to_digit(16).unwrap_or_default());
                ChunkAt::Size
            }
            (ChunkAt::Size, b'\r') if self.digits > 0 => ChunkAt::SizeLf,
            (ChunkAt::Size, b';') if self.digits > 0 => ChunkAt::Extension,
            (ChunkAt::Extension, b'\r') => ChunkAt::SizeLf,
            (ChunkAt::Extension, b'\t' | 0x20..=0x7e | 0x80..) => {
                self.extension_bytes += 1;
                if self.extension_bytes > CHUNK_EXTENSION_BYTES_MAX {
                    return Err(Violation::Malformed("chunk extensions over the limit"));
                }
                ChunkAt::Extension
            }
            (ChunkAt::SizeLf, b'\n') if self.size == 0 => ChunkAt::Trailer,
            (ChunkAt::SizeLf, b'\n') => ChunkAt::Data,
            (ChunkAt::DataCr, b'\r') => ChunkAt::DataLf,
            (ChunkAt::DataLf, b'\n') => {
                self.digits = 0;
                ChunkAt::Size
            }
            (ChunkAt::Trailer, b'\r') => ChunkAt::TrailerLf,
            (ChunkAt::TrailerLf, b'\n') if self.trailer_line_bytes == 0 => ChunkAt::Done,
            (ChunkAt::TrailerLf, b'\n') => {
                self.trailer_line_bytes = 0;
                ChunkAt::Trailer
            }
            (ChunkAt::Trailer, b'\t' | 0x20..=0x7e | 0x80..) => {
                self.trailer_bytes += 1;
                self.trailer_line_bytes += 1;
                if self.trailer_bytes > limits.bytes_max {
                    return Err(Violation::HeadTooLarge);
                }
                ChunkAt::Trailer
            }
            _ => return Err(malformed),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeadLimits = HeadLimits { bytes_max: 512, fields_max: 8 };

    /// Feeds `input` in pieces of `piece` bytes, as a connection would; gives what was passed, or the violation.
    fn check(input: &[u8], piece: usize) -> Result<Vec<usize>, Violation> {
        let mut framing = Framing::new(LIMITS);
        let mut buffer = Vec::new();
        let mut heads = Vec::new();
        let mut passed = 0;
        for chunk in input.chunks(piece.max(1)) {
            buffer.extend_from_slice(chunk);
            loop {
                let at_head = framing.is_at_head();
                match framing.advance(&buffer) {
                    Step::Pass(len) => {
                        assert!(len > 0 && len <= buffer.len());
                        buffer.drain(..len);
                        passed += len;
                        if at_head {
                            heads.push(passed);
                        }
                    }
                    Step::More => break,
                    Step::Refuse(violation) => return Err(violation),
                }
            }
        }
        Ok(heads)
    }

    /// The same at every size of piece: no byte boundary changes the finding.
    fn check_all(input: &[u8]) -> Result<usize, Violation> {
        let whole = check(input, input.len()).map(|heads| heads.len());
        for piece in 1..input.len().min(40) {
            assert_eq!(check(input, piece).map(|heads| heads.len()), whole, "in pieces of {piece}");
        }
        whole
    }

    #[test]
    fn finds_every_request_of_a_pipeline() {
        let input = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\
            POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello\
            POST /y HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n5;x=y\r\nGET /\r\n0\r\nx-t: 1\r\n\r\n\
            \r\nGET /z HTTP/1.0\r\n\r\n";
        assert_eq!(check_all(input), Ok(4));
    }

    #[test]
    fn refuses_whatever_servers_disagree_on() {
        let ambiguous = |what| Err(Violation::AmbiguousLength(what));
        let malformed = |what| Err(Violation::Malformed(what));
        let cases: &[(&str, Result<usize, Violation>)] = &[
            (
                "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
                ambiguous("content-length beside transfer-encoding"),
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
                ambiguous("content-length beside transfer-encoding"),
            ),
            ("Content-Length: 3\r\nContent-Length: 3\r\n", ambiguous("content-length twice")),
            ("Content-Length: 3, 3\r\n", ambiguous("content-length is no plain number")),
            ("Content-Length: +3\r\n", ambiguous("content-length is no plain number")),
            ("Content-Length: -3\r\n", ambiguous("content-length is no plain number")),
            ("Content-Length: 0x3\r\n", ambiguous("content-length is no plain number")),
            ("Content-Length:\r\n", ambiguous("content-length is no plain number")),
            ("Content-Length: 9999999999999999999\r\n", ambiguous("content-length is no plain number")),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", ambiguous("transfer-encoding twice")),
            ("Transfer-Encoding: gzip, chunked\r\n", Err(Violation::UnknownCoding)),
            ("Transfer-Encoding: chunked, identity\r\n", Err(Violation::UnknownCoding)),
            ("Transfer-Encoding: xchunked\r\n", Err(Violation::UnknownCoding)),
            ("Transfer-Encoding: \x0bchunked\r\n", malformed("control character in a field value")),
            ("Transfer-Encoding : chunked\r\n", malformed("field name")),
            (" Transfer-Encoding: chunked\r\n", malformed("folded field line")),
            ("X: 1\r\n chunked\r\n", malformed("folded field line")),
            ("X: 1\nTransfer-Encoding: chunked\r\n", malformed("line ends in bare LF")),
            ("X: 1\rTransfer-Encoding: chunked\r\n", malformed("control character in a field value")),
            ("X: 1\r\r\n", malformed("control character in a field value")),
            ("Content-Length:\x0c5\r\n", malformed("control character in a field value")),
            ("Transfer-Encoding: chunked\x0c\r\n", malformed("control character in a field value")),
            ("X: a\0b\r\n", malformed("control character in a field value")),
            ("no colon\r\n", malformed("field line without a colon")),
            (": empty\r\n", malformed("field name")),
            ("Host: b\r\n", malformed("host twice")),
        ];
        for (fields, expected) in cases {
            let input = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
            assert_eq!(check_all(input.as_bytes()), *expected, "{fields:?}");
        }
    }

    #[test]
    fn refuses_malformed_request_lines() {
        let malformed = |what| Err(Violation::Malformed(what));
        for (line, expected) in [
            ("GET / HTTP/1.2", Err(Violation::Version)),
            ("GET / HTTP/2.0", Err(Violation::Version)),
            ("GET / http/1.1", malformed("request line")),
            ("GET  / HTTP/1.1", malformed("request line")),
            ("GET /", malformed("request line")),
            ("GET /a b HTTP/1.1", malformed("request line")),
            ("G(T / HTTP/1.1", malformed("method")),
            (" / HTTP/1.1", malformed("method")),
            ("GET /\t HTTP/1.1", malformed("request target")),
            ("GET /#x HTTP/1.1", malformed("request target")),
            ("GET /\u{e9} HTTP/1.1", malformed("request target")),
        ] {
            let input = format!("{line}\r\nHost: a\r\n\r\n");
            assert_eq!(check_all(input.as_bytes()), expected, "{line:?}");
        }
        assert_eq!(check_all(b"GET / HTTP/1.1\r\n\r\n"), malformed("host is missing"));
        assert_eq!(
            check_all(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"),
            Err(Violation::AmbiguousLength("transfer-encoding in HTTP/1.0"))
        );
        assert_eq!(check_all(&b"\r\n".repeat(5)), malformed("empty lines before the request line"));
    }

    #[test]
    fn limits_bytes_and_fields_of_a_head() {
        let head = |padding: usize| format!("GET / HTTP/1.1\r\nHost: a\r\nx: {}\r\n\r\n", "p".repeat(padding));
        let fixed = head(0).len();
        assert_eq!(check_all(head(LIMITS.bytes_max - fixed).as_bytes()), Ok(1));
        assert_eq!(check_all(head(LIMITS.bytes_max - fixed + 1).as_bytes()), Err(Violation::HeadTooLarge));
        let fields = |count: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: 1\r\n".repeat(count - 1));
        assert_eq!(check_all(fields(LIMITS.fields_max).as_bytes()), Ok(1));
        assert_eq!(check_all(fields(LIMITS.fields_max + 1).as_bytes()), Err(Violation::HeadTooLarge));
        let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "p".repeat(LIMITS.bytes_max));
        assert_eq!(check_all(long.as_bytes()), Err(Violation::TargetTooLong));
    }

    #[test]
    fn refuses_malformed_chunks() {
        let malformed = Err(Violation::Malformed("chunked body"));
        for body in [
            "\r\n",
            "g\r\n",
            "5 \r\nhello\r\n0\r\n\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "5\r\nhelloX\r\n0\r\n\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "-5\r\n",
            "0x5\r\n",
            "1111111111111111\r\n",
            "0\r\nx: 1\n\r\n",
            ";x\r\n",
        ] {
            let input = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
            assert_eq!(check_all(input.as_bytes()), malformed, "{body:?}");
        }
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let trailer = |bytes: usize| format!("{head}0\r\nx: {}\r\n\r\n", "t".repeat(bytes - 3));
        assert_eq!(check_all(trailer(LIMITS.bytes_max).as_bytes()), Ok(1));
        assert_eq!(check_all(trailer(LIMITS.bytes_max + 1).as_bytes()), Err(Violation::HeadTooLarge));
        let extension = |bytes: usize| format!("{head}1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(bytes));
        assert_eq!(check_all(extension(CHUNK_EXTENSION_BYTES_MAX).as_bytes()), Ok(1));
        assert_eq!(
            check_all(extension(CHUNK_EXTENSION_BYTES_MAX + 1).as_bytes()),
            Err(Violation::Malformed("chunk extensions over the limit"))
        );
    }

    #[test]
    fn nothing_passes_after_a_refusal() {
        let mut framing = Framing::new(LIMITS);
        assert!(matches!(framing.advance(b"GET\r\n"), Step::Refuse(_)));
        assert_eq!(framing.advance(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"), Step::More);
    }
}
