//! [`FieldMap`]: the field lines of one message, in order, as bytes.
//!
//! One arena holds all names and values, so that reading a request into a map costs two allocations and passing it on
//! costs none. Names are lower-case; pseudo-header fields stand first (RFC 9113, section 8.3).

/// Ordered field lines. Names are lower-case bytes, values are bytes; repeated names are kept apart.
///
/// `host` and `:authority` mean the same line, as in Envoy.
#[derive(Clone, Default)]
pub struct FieldMap {
    arena: Vec<u8>,
    lines: Vec<Line>,
    /// Bytes of names and values that are in use; the rest of the arena is what replaced lines left behind.
    live: usize,
}

#[derive(Clone, Copy)]
struct Line {
    start: u32,
    name_len: u32,
    value_len: u32,
}

impl Line {
    fn name_range(self) -> std::ops::Range<usize> {
        self.start as usize..(self.start + self.name_len) as usize
    }

    fn value_range(self) -> std::ops::Range<usize> {
        let start = (self.start + self.name_len) as usize;
        start..start + self.value_len as usize
    }

    fn size(self) -> usize {
        (self.name_len + self.value_len) as usize
    }
}

/// What kind of message field lines belong to, for [`FieldMap::append`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A request's head.
    Request,
    /// A response's head.
    Response,
    /// A request's trailers.
    RequestTrailers,
    /// A response's trailers.
    ResponseTrailers,
}

impl Message {
    /// Fields that Envoy keeps in one line per message; what is added to them is joined with a comma. Envoy 1.40 names
    /// them in its log when it starts; some are lists (RFC 9110, section 5.3) and some are not.
    fn joins(self, name: &[u8]) -> bool {
        match self {
            Message::Request => matches!(
                name,
                b"accept"
                    | b"accept-encoding"
                    | b"access-control-request-headers"
                    | b"access-control-request-method"
                    | b"access-control-request-private-network"
                    | b"authentication"
                    | b"authorization"
                    | b"cache-control"
                    | b"cdn-loop"
                    | b"connection"
                    | b"content-encoding"
                    | b"content-length"
                    | b"content-type"
                    | b"expect"
                    | b"grpc-accept-encoding"
                    | b"grpc-timeout"
                    | b"if-match"
                    | b"if-modified-since"
                    | b"if-none-match"
                    | b"if-range"
                    | b"if-unmodified-since"
                    | b"keep-alive"
                    | b"origin"
                    | b"pragma"
                    | b"proxy-connection"
                    | b"proxy-status"
                    | b"referer"
                    | b"te"
                    | b"transfer-encoding"
                    | b"upgrade"
                    | b"user-agent"
                    | b"via"
                    | b"x-client-trace-id"
                    | b"x-envoy-attempt-count"
                    | b"x-envoy-decorator-operation"
                    | b"x-envoy-downstream-service-cluster"
                    | b"x-envoy-downstream-service-node"
                    | b"x-envoy-expected-rq-timeout-ms"
                    | b"x-envoy-external-address"
                    | b"x-envoy-force-trace"
                    | b"x-envoy-hedge-on-per-try-timeout"
                    | b"x-envoy-internal"
                    | b"x-envoy-ip-tags"
                    | b"x-envoy-is-timeout-retry"
                    | b"x-envoy-max-retries"
                    | b"x-envoy-original-host"
                    | b"x-envoy-original-path"
                    | b"x-envoy-original-url"
                    | b"x-envoy-retriable-header-names"
                    | b"x-envoy-retriable-status-codes"
                    | b"x-envoy-retry-grpc-on"
                    | b"x-envoy-retry-on"
                    | b"x-envoy-upstream-alt-stat-name"
                    | b"x-envoy-upstream-rq-per-try-timeout-ms"
                    | b"x-envoy-upstream-rq-timeout-alt-response"
                    | b"x-envoy-upstream-rq-timeout-ms"
                    | b"x-envoy-upstream-stream-duration-ms"
                    | b"x-forwarded-client-cert"
                    | b"x-forwarded-for"
                    | b"x-forwarded-host"
                    | b"x-forwarded-port"
                    | b"x-forwarded-proto"
                    | b"x-request-id"
            ),
            Message::Response => matches!(
                name,
                b"access-control-allow-credentials"
                    | b"access-control-allow-headers"
                    | b"access-control-allow-methods"
                    | b"access-control-allow-origin"
                    | b"access-control-allow-private-network"
                    | b"access-control-expose-headers"
                    | b"access-control-max-age"
                    | b"age"
                    | b"cache-control"
                    | b"connection"
                    | b"content-encoding"
                    | b"content-length"
                    | b"content-type"
                    | b"date"
                    | b"etag"
                    | b"expires"
                    | b"grpc-message"
                    | b"grpc-status"
                    | b"keep-alive"
                    | b"last-modified"
                    | b"location"
                    | b"proxy-connection"
                    | b"proxy-status"
                    | b"server"
                    | b"transfer-encoding"
                    | b"upgrade"
                    | b"vary"
                    | b"via"
                    | b"x-envoy-attempt-count"
                    | b"x-envoy-decorator-operation"
                    | b"x-envoy-degraded"
                    | b"x-envoy-immediate-health-check-fail"
                    | b"x-envoy-ratelimited"
                    | b"x-envoy-upstream-canary"
                    | b"x-envoy-upstream-healthchecked-cluster"
                    | b"x-envoy-upstream-service-time"
                    | b"x-request-id"
            ),
            Message::RequestTrailers => false,
            Message::ResponseTrailers => matches!(name, b"grpc-message" | b"grpc-status"),
        }
    }
}

impl FieldMap {
    /// A map without lines.
    pub fn new() -> FieldMap {
        FieldMap::default()
    }

    /// A map with room for `lines` lines of `bytes` bytes in all.
    pub fn with_capacity(lines: usize, bytes: usize) -> FieldMap {
        FieldMap { arena: Vec::with_capacity(bytes), lines: Vec::with_capacity(lines), live: 0 }
    }

    /// Adds a line at the end; a pseudo-header goes behind the last pseudo-header.
    ///
    /// Lines beyond 4 GiB in one map are dropped; every embedder's limits are far below.
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        let Some(line) = self.store(name, value) else { return };
        if name.first() == Some(&b':') {
            let at = self.pseudo_count();
            self.lines.insert(at, line);
        } else {
            self.lines.push(line);
        }
    }

    /// Adds a line as Envoy does: to a field that it keeps in one line, the value is joined with a comma; else like
    /// [`FieldMap::push`]. `name` is in lower case.
    pub fn append(&mut self, message: Message, name: &[u8], value: &[u8]) {
        if !message.joins(name) {
            return self.push(name, value);
        }
        let Some(at) = self.lines.iter().position(|line| self.is_named(*line, name)) else {
            return self.push(name, value);
        };
        let present = &self.arena[self.lines[at].value_range()];
        if value.is_empty() {
            return;
        }
        let joined = if present.is_empty() { value.to_vec() } else { [present, b",", value].concat() };
        self.replace_value(at, name, &joined);
    }

    /// The first value of `name`. Case does not matter; `host` also finds `:authority`.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        let name = alias(name);
        // Names here are in lower case, and nearly always so are those that are asked for.
        let line = if name.iter().any(u8::is_ascii_uppercase) {
            self.lines.iter().find(|line| self.is_named(**line, name))?
        } else {
            let is_it =
                |line: &Line| line.name_len as usize == name.len() && self.arena.get(line.name_range()) == Some(name);
            self.lines.iter().find(|line| is_it(line))?
        };
        Some(&self.arena[line.value_range()])
    }

    /// All values of `name`, in order.
    pub fn get_all<'a>(&'a self, name: &[u8]) -> impl Iterator<Item = &'a [u8]> {
        let name = alias(name);
        self.lines.iter().filter(move |line| self.is_named(**line, name)).map(|line| &self.arena[line.value_range()])
    }

    /// Whether a line of that name exists.
    pub fn contains(&self, name: &[u8]) -> bool {
        let name = alias(name);
        self.lines.iter().any(|line| self.is_named(*line, name))
    }

    /// Removes all lines called `name` and adds one: at the end, a pseudo-header behind the other pseudo-headers.
    pub fn set(&mut self, name: &[u8], value: &[u8]) {
        let name = alias(name);
        self.remove(name);
        self.push(name, value);
    }

    /// Gives the first line called `name` another value; adds one at the end where there is none.
    pub(crate) fn set_in_place(&mut self, name: &[u8], value: &[u8]) {
        let Some(at) = self.lines.iter().position(|line| self.is_named(*line, name)) else {
            return self.push(name, value);
        };
        self.replace_value(at, name, value);
    }

    fn replace_value(&mut self, at: usize, name: &[u8], value: &[u8]) {
        if let Some(line) = self.store(name, value) {
            self.live -= self.lines[at].size();
            self.lines[at] = line;
            self.compact();
        }
    }

    /// Removes all lines called `name`; says whether there was one.
    pub fn remove(&mut self, name: &[u8]) -> bool {
        let name = alias(name);
        let before = self.lines.len();
        let arena = &self.arena;
        let live = &mut self.live;
        self.lines.retain(|line| {
            let keep = !arena[line.name_range()].eq_ignore_ascii_case(name);
            if !keep {
                *live -= line.size();
            }
            keep
        });
        self.compact();
        self.lines.len() != before
    }

    /// Lines in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u8], &[u8])> + Clone {
        self.lines.iter().map(|line| (&self.arena[line.name_range()], &self.arena[line.value_range()]))
    }

    /// Number of lines.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether there is no line.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Bytes of all names and values, without separators: what `proxy_get_header_map_size` answers.
    pub fn byte_size(&self) -> usize {
        self.live
    }

    /// Drops all lines.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.lines.clear();
        self.live = 0;
    }

    fn is_named(&self, line: Line, name: &[u8]) -> bool {
        line.name_len as usize == name.len() && self.arena[line.name_range()].eq_ignore_ascii_case(name)
    }

    fn pseudo_count(&self) -> usize {
        self.lines.iter().take_while(|line| self.arena.get(line.start as usize) == Some(&b':')).count()
    }

    fn store(&mut self, name: &[u8], value: &[u8]) -> Option<Line> {
        let start = u32::try_from(self.arena.len()).ok()?;
        u32::try_from(self.arena.len() + name.len() + value.len()).ok()?;
        self.arena.extend(name.iter().map(u8::to_ascii_lowercase));
        self.arena.extend_from_slice(value);
        let line = Line { start, name_len: name.len() as u32, value_len: value.len() as u32 };
        self.live += line.size();
        Some(line)
    }

    /// Keeps what replaced lines left behind below the size of what is in use, so that a guest that replaces a field
    /// in a loop costs no memory.
    fn compact(&mut self) {
        if self.arena.len() - self.live <= self.live.max(1024) {
            return;
        }
        let mut arena = Vec::with_capacity(self.live);
        for line in &mut self.lines {
            let start = arena.len() as u32;
            arena.extend_from_slice(&self.arena[line.name_range()]);
            arena.extend_from_slice(&self.arena[line.value_range()]);
            line.start = start;
        }
        self.arena = arena;
    }
}

fn alias(name: &[u8]) -> &[u8] {
    if name.eq_ignore_ascii_case(b"host") { b":authority" } else { name }
}

/// Whether this can be the name of a field (RFC 9110, section 5.1).
pub(crate) fn is_token(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

/// Whether this can be a field's value: it holds nothing that would end its line (RFC 9110, section 5.5).
pub(crate) fn is_value(value: &[u8]) -> bool {
    !value.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n'))
}

impl<'a> FromIterator<(&'a [u8], &'a [u8])> for FieldMap {
    fn from_iter<I: IntoIterator<Item = (&'a [u8], &'a [u8])>>(lines: I) -> FieldMap {
        let mut map = FieldMap::new();
        for (name, value) in lines {
            map.push(name, value);
        }
        map
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for FieldMap {
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(lines: I) -> FieldMap {
        lines.into_iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect()
    }
}

/// Names only: values can be credentials.
impl std::fmt::Debug for FieldMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter().map(|(name, _)| String::from_utf8_lossy(name).into_owned())).finish()
    }
}

impl PartialEq for FieldMap {
    fn eq(&self, other: &FieldMap) -> bool {
        self.iter().eq(other.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(map: &FieldMap) -> Vec<(String, String)> {
        map.iter()
            .map(|(n, v)| (String::from_utf8_lossy(n).into_owned(), String::from_utf8_lossy(v).into_owned()))
            .collect()
    }

    fn check(map: &FieldMap, expected: &[(&str, &str)]) {
        let expected: Vec<(String, String)> = expected.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
        assert_eq!(lines(map), expected);
        assert_eq!(map.byte_size(), expected.iter().map(|(n, v)| n.len() + v.len()).sum::<usize>());
    }

    #[test]
    fn keeps_order_and_repeated_lines() {
        let mut map = FieldMap::new();
        map.push(b"X-A", b"1");
        map.push(b"x-b", b"2");
        map.push(b"x-a", b"3");
        check(&map, &[("x-a", "1"), ("x-b", "2"), ("x-a", "3")]);
        assert_eq!(map.get(b"X-a"), Some(&b"1"[..]));
        assert_eq!(map.get_all(b"x-a").collect::<Vec<_>>(), [b"1", b"3"]);
    }

    #[test]
    fn set_removes_all_and_moves_to_the_end() {
        let mut map: FieldMap = [("x-a", "1"), ("x-b", "2"), ("x-a", "3")].into_iter().collect();
        map.set(b"x-a", b"4");
        check(&map, &[("x-b", "2"), ("x-a", "4")]);
    }

    #[test]
    fn pseudo_headers_stay_first() {
        let mut map: FieldMap = [(":method", "GET"), (":path", "/"), ("x", "1")].into_iter().collect();
        map.push(b":scheme", b"http");
        map.set(b":path", b"/2");
        check(&map, &[(":method", "GET"), (":scheme", "http"), (":path", "/2"), ("x", "1")]);
    }

    #[test]
    fn some_fields_are_kept_in_one_line() {
        let mut map = FieldMap::new();
        for (name, value) in
            [("accept", "a"), ("x-a", "1"), ("accept", "b"), ("accept", ""), ("x-a", "2"), ("vary", "x")]
        {
            map.append(Message::Request, name.as_bytes(), value.as_bytes());
        }
        map.append(Message::Request, b"vary", b"y");
        check(&map, &[("accept", "a,b"), ("x-a", "1"), ("x-a", "2"), ("vary", "x"), ("vary", "y")]);
        let mut map: FieldMap = [("vary", "")].into_iter().collect();
        map.append(Message::Response, b"vary", b"y");
        map.append(Message::Response, b"vary", b"z");
        check(&map, &[("vary", "y,z")]);
        // Two statuses are none, and not the first.
        for (message, expected) in [(Message::ResponseTrailers, &["0,1"][..]), (Message::RequestTrailers, &["0", "1"])]
        {
            let mut map = FieldMap::new();
            map.append(message, b"grpc-status", b"0");
            map.append(message, b"grpc-status", b"1");
            let values: Vec<_> = map.iter().map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect();
            assert_eq!(values, expected);
        }
    }

    #[test]
    fn host_is_authority() {
        let mut map: FieldMap = [(":authority", "a.example")].into_iter().collect();
        assert_eq!(map.get(b"Host"), Some(&b"a.example"[..]));
        map.set(b"host", b"b.example");
        check(&map, &[(":authority", "b.example")]);
        assert!(map.remove(b"HOST"));
        assert!(map.is_empty());
    }

    #[test]
    fn replacing_in_a_loop_costs_no_memory() {
        let mut map = FieldMap::new();
        map.push(b"x-b", b"kept");
        for i in 0..100_000u32 {
            map.set(b"x-a", &i.to_le_bytes());
        }
        assert!(map.arena.len() < 4096, "arena grew to {}", map.arena.len());
        assert_eq!(map.get(b"x-b"), Some(&b"kept"[..]));
        assert_eq!(map.get(b"x-a"), Some(&99_999u32.to_le_bytes()[..]));
    }

    #[test]
    fn debug_shows_no_value() {
        let map: FieldMap = [("authorization", "Bearer secret")].into_iter().collect();
        assert_eq!(format!("{map:?}"), r#"["authorization"]"#);
    }
}
