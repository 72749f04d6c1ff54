//! What must come of a request, and how what came of it differs. Pure: all three hosts are judged here.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use serde_json::Value;

use crate::content::written;
use crate::message::{FieldLines, Observed, ObservedRequest, ObservedResponse};
use crate::trace::{Secrets, shown_value};

/// What must come of one request. Only what is named is compared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expectation {
    /// The response that the client gets.
    pub response: Option<ResponseExpectation>,
    /// Who makes that response.
    pub origin: Origin,
    /// The connection is closed without a response.
    pub closed: bool,
    /// What reaches the upstream.
    pub upstream: Option<UpstreamExpectation>,
    /// By how much each counter changes.
    pub counters: BTreeMap<String, i64>,
    /// What calls the filter makes to each upstream.
    pub callouts: BTreeMap<String, CalloutsExpectation>,
    /// Texts that lines of the log must contain.
    pub log: Vec<String>,
    /// The response code details, where a response is local.
    pub details: Option<String>,
    /// What filters must have stored with the stream, by name; `None` is nothing.
    pub properties: BTreeMap<String, Option<Vec<u8>>>,
    /// What must be shared afterwards, by key; `None` is nothing.
    pub shared_data: BTreeMap<String, Option<Vec<u8>>>,
    /// What must wait in queues afterwards, by the queue's name.
    pub queues: BTreeMap<String, Vec<Vec<u8>>>,
}

/// Who makes a response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Origin {
    /// Whoever does.
    #[default]
    Either,
    /// The filter, or the host in its place. Unless the expectation says otherwise, the upstream was not called.
    Local,
    /// The upstream.
    Upstream,
}

/// What calls to one upstream must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CalloutsExpectation {
    /// So many.
    Count(usize),
    /// Exactly these, in order.
    Requests(Vec<RequestExpectation>),
}

/// What a response must be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResponseExpectation {
    /// The status code.
    pub status: Option<u16>,
    /// Fields that must be there.
    pub fields: BTreeMap<String, FieldExpectation>,
    /// Fields that must not be there.
    pub absent_fields: Vec<String>,
    /// The whole body.
    pub body: Option<Vec<u8>>,
    /// Members that the body must have, as JSON; objects may have more.
    pub json: Option<Value>,
    /// Trailer fields that must be there.
    pub trailers: BTreeMap<String, FieldExpectation>,
}

/// What must reach the upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpstreamExpectation {
    /// Nothing.
    NotCalled,
    /// Exactly one request.
    Request(Box<RequestExpectation>),
}

/// What a request must be when it reaches the upstream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestExpectation {
    /// The method.
    pub method: Option<String>,
    /// The request target.
    pub path: Option<String>,
    /// The authority.
    pub authority: Option<String>,
    /// Fields that must be there.
    pub fields: BTreeMap<String, FieldExpectation>,
    /// Fields that must not be there.
    pub absent_fields: Vec<String>,
    /// The whole body.
    pub body: Option<Vec<u8>>,
    /// Members that the body must have, as JSON; objects may have more.
    pub json: Option<Value>,
    /// Messages of a gRPC call or stream.
    pub grpc_messages: Option<Vec<Vec<u8>>>,
    /// Trailer fields that must be there.
    pub trailers: BTreeMap<String, FieldExpectation>,
}

/// What the lines of one field must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FieldExpectation {
    /// Exactly these lines, in this order.
    Lines(Vec<Vec<u8>>),
    /// One line that contains the text.
    Contains(String),
    /// One line that starts with the text.
    StartsWith(String),
}

impl Expectation {
    /// Whether it would accept anything.
    pub fn is_empty(&self) -> bool {
        self.response.is_none()
            && !self.closed
            && self.upstream.is_none()
            && self.counters.is_empty()
            && self.callouts.is_empty()
            && self.log.is_empty()
            && self.details.is_none()
            && self.properties.is_empty()
            && self.shared_data.is_empty()
            && self.queues.is_empty()
    }

    /// Whether it says something of a request or a response.
    pub(crate) fn concerns_messages(&self) -> bool {
        self.response.is_some()
            || self.closed
            || self.upstream.is_some()
            || self.details.is_some()
            || !self.properties.is_empty()
    }

    /// Every way in which `observed` is not what is expected.
    pub fn compare(&self, observed: &Observed) -> Vec<Mismatch> {
        let mut found = Mismatches::default();
        let response_name = if self.origin == Origin::Local { "local_response" } else { "response" };
        match (&self.response, &observed.response) {
            (Some(expected), Some(response)) => {
                found.response(response_name, expected, response);
                match (self.origin, observed.local) {
                    (Origin::Local, Some(false)) => {
                        found.add(&[response_name], "an answer made by the filter", "the upstream's answer", None);
                    }
                    (Origin::Upstream, Some(true)) => {
                        let got = "an answer made by the filter or the host";
                        found.add(&[response_name], "the upstream's answer", got, None);
                    }
                    _ => {}
                }
            }
            (Some(_), None) => {
                found.add(&[response_name], "a response", "the connection was closed without one", None);
            }
            (None, Some(response)) if self.closed => {
                let got = format!("status {}", response.status);
                found.add(&["closed"], "a connection closed without a response", &got, None);
            }
            _ => {}
        }
        let not_called = self.origin == Origin::Local
            && !matches!(self.upstream, Some(UpstreamExpectation::Request(_)))
            || self.upstream == Some(UpstreamExpectation::NotCalled);
        match (&self.upstream, observed.upstream.as_slice()) {
            (_, []) if not_called => {}
            (_, [request, ..]) if not_called => {
                let got = format!("called with `{} {}`", request.method, request.path);
                found.add(&["upstream"], "not called", &got, None);
            }
            (Some(UpstreamExpectation::Request(expected)), [request]) => {
                found.request(&["upstream"], expected, request);
            }
            (Some(UpstreamExpectation::Request(_)), requests) => {
                let got = match requests.len() {
                    0 => "not called".to_owned(),
                    times => format!("called {times} times"),
                };
                found.add(&["upstream"], "called once", &got, None);
            }
            _ => {}
        }
        for (name, expected) in &self.counters {
            let got = observed.counters.get(name).copied().unwrap_or_default();
            if got != *expected {
                found.add(&["counters", name], &format!("{expected:+}"), &format!("{got:+}"), Some(got.into()));
            }
        }
        for (upstream, expected) in &self.callouts {
            let made = observed.callouts.get(upstream).map(Vec::as_slice).unwrap_or_default();
            let count = match expected {
                CalloutsExpectation::Count(count) => *count,
                CalloutsExpectation::Requests(requests) => requests.len(),
            };
            if made.len() != count {
                found.add(&["callouts", upstream], &calls(count), &calls(made.len()), Some(made.len().into()));
            } else if let CalloutsExpectation::Requests(requests) = expected {
                for (index, (expected, request)) in requests.iter().zip(made).enumerate() {
                    found.request(&["callouts", upstream, &index.to_string()], expected, request);
                }
            }
        }
        self.compare_surroundings(observed, &mut found);
        found.0
    }

    /// What is seen beside the messages.
    fn compare_surroundings(&self, observed: &Observed, found: &mut Mismatches) {
        for text in &self.log {
            if !observed.log.iter().any(|line| line.message.contains(text)) {
                found.add(&["log"], &format!("a line that contains {}", quoted(text.as_bytes())), "none", None);
            }
        }
        if let Some(expected) = &self.details
            && observed.details.as_ref() != Some(expected)
        {
            let got = observed.details.as_deref();
            let shown = got.map_or_else(|| "(absent)".to_owned(), |details| quoted(details.as_bytes()));
            found.add(&["details"], &quoted(expected.as_bytes()), &shown, got.map(|got| written(got.as_bytes())));
        }
        found.values("properties", &self.properties, &observed.properties);
        found.values("shared_data", &self.shared_data, &observed.shared_data);
        for (name, expected) in &self.queues {
            let got = observed.queues.get(name);
            if got != Some(expected) {
                let shown = |items: &Vec<Vec<u8>>| {
                    let items: Vec<String> = items.iter().map(|item| quoted(item)).collect();
                    format!("[{}]", items.join(", "))
                };
                let new = got.map(|items| items.iter().map(|item| written(item)).collect());
                let got = got.map_or_else(|| "no queue of that name".to_owned(), shown);
                found.add(&["queues", name], &shown(expected), &got, new);
            }
        }
    }
}

fn calls(count: usize) -> String {
    if count == 1 { "1 call".to_owned() } else { format!("{count} calls") }
}

/// One way in which an outcome is not what is expected.
#[derive(Debug, Clone, PartialEq)]
pub struct Mismatch {
    /// Where, as keys of the expectation in a scenario file: `local_response`, `status`.
    pub at: Vec<String>,
    /// What was expected.
    pub expected: String,
    /// What was seen.
    pub observed: String,
    /// What was seen as a scenario writes it, where it could stand in the place of what was expected.
    pub written: Option<Value>,
}

/// One line if it is short, three if it is not.
impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.at.join(".");
        if path.len() + self.expected.len() + self.observed.len() < 70 {
            write!(f, "{path}: expected {}, got {}", self.expected, self.observed)
        } else {
            write!(f, "{path}:\n  expected  {}\n  got       {}", self.expected, self.observed)
        }
    }
}

#[derive(Default)]
struct Mismatches(Vec<Mismatch>);

/// The place of something inside another.
fn inside<'a>(at: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    at.iter().chain(more).copied().collect()
}

impl Mismatches {
    fn add(&mut self, at: &[&str], expected: &str, observed: &str, written: Option<Value>) {
        let at = at.iter().map(|segment| (*segment).to_owned()).collect();
        self.0.push(Mismatch { at, expected: expected.to_owned(), observed: observed.to_owned(), written });
    }

    fn response(&mut self, name: &str, expected: &ResponseExpectation, response: &ObservedResponse) {
        if let Some(status) = expected.status
            && status != response.status
        {
            let got = response.status;
            self.add(&[name, "status"], &status.to_string(), &got.to_string(), Some(got.into()));
        }
        self.fields(&[name], &expected.fields, &expected.absent_fields, &response.fields);
        self.body(&[name], expected.body.as_deref(), expected.json.as_ref(), &response.body);
        self.lines(&[name, "trailers"], &expected.trailers, &response.trailers);
        if !response.complete {
            self.add(&[name], "a complete response", "one that was cut off", None);
        }
    }

    fn request(&mut self, at: &[&str], expected: &RequestExpectation, request: &ObservedRequest) {
        let parts = [
            ("method", &expected.method, &request.method),
            ("path", &expected.path, &request.path),
            ("authority", &expected.authority, &request.authority),
        ];
        for (name, expected, got) in parts {
            if let Some(expected) = expected
                && expected != got
            {
                let (wanted, got) = (expected.as_bytes(), got.as_bytes());
                self.add(&inside(at, &[name]), &quoted(wanted), &quoted(got), Some(written(got)));
            }
        }
        self.fields(at, &expected.fields, &expected.absent_fields, &request.fields);
        self.body(at, expected.body.as_deref(), expected.json.as_ref(), &request.body);
        if let Some(expected) = &expected.grpc_messages {
            let got = request.grpc_messages();
            if got != *expected {
                let shown = |messages: &[Vec<u8>]| all_quoted(messages.iter().map(Vec::as_slice));
                let new = got.iter().map(|message| written(message)).collect();
                self.add(&inside(at, &["grpc_messages"]), &shown(expected), &shown(&got), Some(new));
            }
        }
        self.lines(&inside(at, &["trailers"]), &expected.trailers, &request.trailers);
        if !request.complete {
            self.add(at, "a complete request", "one that was cut off", None);
        }
    }

    /// What is kept under names: this value, or nothing.
    fn values(
        &mut self,
        path: &str,
        expected: &BTreeMap<String, Option<Vec<u8>>>,
        observed: &BTreeMap<String, Vec<u8>>,
    ) {
        let shown = |value: Option<&Vec<u8>>| value.map_or_else(|| "(absent)".to_owned(), |value| quoted(value));
        for (name, expected) in expected {
            let got = observed.get(name);
            if got != expected.as_ref() {
                let new = got.map_or(Value::Null, |value| written(value));
                self.add(&[path, name], &shown(expected.as_ref()), &shown(got), Some(new));
            }
        }
    }

    fn fields(
        &mut self,
        at: &[&str],
        expected: &BTreeMap<String, FieldExpectation>,
        absent: &[String],
        fields: &FieldLines,
    ) {
        self.lines(&inside(at, &["fields"]), expected, fields);
        for name in absent {
            let lines: Vec<&[u8]> = fields.get_all(name).collect();
            if !lines.is_empty() {
                let got = all_quoted(lines.into_iter());
                self.add(&inside(at, &["absent_fields"]), &format!("no `{name}`"), &got, None);
            }
        }
    }

    fn lines(&mut self, at: &[&str], expected: &BTreeMap<String, FieldExpectation>, fields: &FieldLines) {
        for (name, expectation) in expected {
            let lines: Vec<&[u8]> = fields.get_all(name).collect();
            let (holds, wanted) = match expectation {
                FieldExpectation::Lines(wanted) => (
                    lines.iter().copied().eq(wanted.iter().map(Vec::as_slice)),
                    all_quoted(wanted.iter().map(Vec::as_slice)),
                ),
                FieldExpectation::Contains(text) => (
                    matches!(lines.as_slice(), [line] if contains(line, text.as_bytes())),
                    format!("one line that contains {}", quoted(text.as_bytes())),
                ),
                FieldExpectation::StartsWith(text) => (
                    matches!(lines.as_slice(), [line] if line.starts_with(text.as_bytes())),
                    format!("one line that starts with {}", quoted(text.as_bytes())),
                ),
            };
            if !holds {
                // A field that is not there cannot be expected; it has to be named among those that are absent.
                let new = (!lines.is_empty()).then(|| written_lines(&lines));
                self.add(&inside(at, &[name]), &wanted, &all_quoted(lines.into_iter()), new);
            }
        }
    }

    fn body(&mut self, at: &[&str], expected: Option<&[u8]>, json: Option<&Value>, body: &[u8]) {
        if let Some(expected) = expected
            && expected != body
        {
            self.add(&inside(at, &["body"]), &quoted(expected), &quoted(body), Some(written(body)));
        }
        if let Some(expected) = json {
            match serde_json::from_slice(body) {
                Ok(value) => self.json(&inside(at, &["json"]), expected, &value),
                Err(_) => self.add(&inside(at, &["json"]), "a JSON body", &quoted(body), None),
            }
        }
    }

    /// Objects may have more members than expected; everything else is equal or it is not.
    fn json(&mut self, at: &[&str], expected: &Value, value: &Value) {
        match (expected, value) {
            (Value::Object(expected), Value::Object(members)) => {
                for (name, expected) in expected {
                    let at = inside(at, &[name]);
                    match members.get(name) {
                        Some(value) => self.json(&at, expected, value),
                        None => self.add(&at, &expected.to_string(), "(absent)", None),
                    }
                }
            }
            _ if expected == value => {}
            _ => self.add(at, &expected.to_string(), &value.to_string(), Some(value.clone())),
        }
    }
}

/// The lines of one field as a scenario writes them.
pub(crate) fn written_lines(lines: &[&[u8]]) -> Value {
    match lines {
        [line] => written(line),
        lines => lines.iter().map(|line| written(line)).collect(),
    }
}

fn contains(line: &[u8], part: &[u8]) -> bool {
    part.is_empty() || line.windows(part.len()).any(|window| window == part)
}

fn all_quoted<'a>(lines: impl ExactSizeIterator<Item = &'a [u8]>) -> String {
    if lines.len() == 0 {
        return "(absent)".to_owned();
    }
    lines.map(quoted).collect::<Vec<_>>().join(", ")
}

/// Bytes longer than this are cut in messages.
const SHOWN_BYTES_MAX: usize = 400;

/// Bytes in quotes; what is not printable is escaped, and what is long is cut.
pub(crate) fn quoted(bytes: &[u8]) -> String {
    let shown = bytes.get(..SHOWN_BYTES_MAX).unwrap_or(bytes);
    let mut text = String::from("\"");
    match std::str::from_utf8(shown) {
        Ok(shown) => shown.chars().for_each(|c| match c {
            // Escaped quotes make JSON bodies unreadable.
            '"' | '\'' => text.push(c),
            c => text.extend(c.escape_debug()),
        }),
        Err(_) => text.push_str(&shown.escape_ascii().to_string()),
    }
    text.push('"');
    if shown.len() < bytes.len() {
        let _ = write!(text, "... ({} bytes)", bytes.len());
    }
    text
}

/// What happened, for the reader of a failed scenario. Credentials are not shown unless the trace shows them.
pub fn describe(observed: &Observed) -> String {
    let secrets = observed.trace.secrets();
    let mut text = String::new();
    match &observed.response {
        Some(response) => {
            let _ =
                writeln!(text, "response: {}{}", response.status, if response.complete { "" } else { " (cut off)" });
            describe_message(&mut text, &response.fields, &response.body, &response.trailers, secrets);
        }
        None => text.push_str("response: none, the connection was closed\n"),
    }
    if let Some(details) = observed.details.as_ref().filter(|details| !details.is_empty()) {
        let _ = writeln!(text, "details: {details}");
    }
    if observed.upstream.is_empty() {
        text.push_str("upstream: not called\n");
    }
    for request in &observed.upstream {
        let _ = writeln!(
            text,
            "upstream: {} {}{}",
            request.method,
            request.path,
            if request.complete { "" } else { " (cut off)" }
        );
        describe_message(&mut text, &request.fields, &request.body, &request.trailers, secrets);
    }
    for (upstream, requests) in &observed.callouts {
        for request in requests {
            let _ = writeln!(text, "callout to {upstream}: {} {}", request.method, request.path);
        }
    }
    if !observed.counters.is_empty() {
        text.push_str("counters:\n");
        for (name, change) in &observed.counters {
            let _ = writeln!(text, "  {name}: {change:+}");
        }
    }
    if !observed.log.is_empty() {
        text.push_str("log:\n");
        for line in &observed.log {
            let _ = writeln!(text, "  {}: {}", line.level, line.message);
        }
    }
    if !observed.properties.is_empty() {
        text.push_str("properties:\n");
        for (name, value) in &observed.properties {
            let _ = writeln!(text, "  {name}: {}", shown_value(name, value, secrets));
        }
    }
    if !observed.trace.is_empty() {
        text.push_str("trace:\n");
        for line in observed.trace.to_string().lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
    text
}

fn describe_message(text: &mut String, fields: &FieldLines, body: &[u8], trailers: &FieldLines, secrets: Secrets) {
    for (name, value) in fields.iter() {
        let _ = writeln!(text, "  {name}: {}", shown_value(name, value, secrets));
    }
    if !body.is_empty() {
        let _ = writeln!(text, "  body: {}", quoted(body));
    }
    for (name, value) in trailers.iter() {
        let _ = writeln!(text, "  trailer {name}: {}", shown_value(name, value, secrets));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn denied() -> Observed {
        Observed {
            response: Some(ObservedResponse {
                status: 401,
                fields: [("www-authenticate", "Bearer"), ("vary", "a"), ("vary", "b")].into_iter().collect(),
                body: br#"{"reason":"expired","status":401}"#.to_vec(),
                trailers: FieldLines::new(),
                complete: true,
            }),
            local: Some(true),
            counters: [("denied".to_owned(), 1)].into(),
            ..Observed::default()
        }
    }

    fn passed() -> Observed {
        Observed {
            response: Some(ObservedResponse { status: 200, complete: true, ..ObservedResponse::default() }),
            upstream: vec![ObservedRequest {
                method: "GET".into(),
                path: "/a".into(),
                fields: [("x-sub", "alice")].into_iter().collect(),
                complete: true,
                ..ObservedRequest::default()
            }],
            local: Some(false),
            ..Observed::default()
        }
    }

    fn check(expectation: &Expectation, observed: &Observed, expected: &[&str]) {
        let found: Vec<String> = expectation.compare(observed).iter().map(ToString::to_string).collect();
        assert_eq!(found, expected);
    }

    fn response(response: ResponseExpectation, local: bool) -> Expectation {
        let origin = if local { Origin::Local } else { Origin::Upstream };
        Expectation { response: Some(response), origin, ..Expectation::default() }
    }

    #[test]
    fn accepts_what_is_expected() {
        let fields = [
            ("www-authenticate".to_owned(), FieldExpectation::Lines(vec![b"Bearer".to_vec()])),
            ("vary".to_owned(), FieldExpectation::Lines(vec![b"a".to_vec(), b"b".to_vec()])),
        ];
        let mut expectation = response(
            ResponseExpectation {
                status: Some(401),
                fields: fields.into(),
                absent_fields: vec!["server".into()],
                json: Some(json!({ "reason": "expired" })),
                ..ResponseExpectation::default()
            },
            true,
        );
        expectation.counters.insert("denied".into(), 1);
        check(&expectation, &denied(), &[]);
    }

    #[test]
    fn names_every_difference_in_the_words_of_the_file() {
        let fields = [
            ("www-authenticate".to_owned(), FieldExpectation::Contains("error".into())),
            ("vary".to_owned(), FieldExpectation::StartsWith("a".into())),
        ];
        let mut expectation = response(
            ResponseExpectation {
                status: Some(403),
                fields: fields.into(),
                absent_fields: vec!["vary".into()],
                body: Some(b"no".to_vec()),
                json: Some(json!({ "reason": "other", "title": "x" })),
                ..ResponseExpectation::default()
            },
            true,
        );
        expectation.counters.insert("allowed".into(), 1);
        check(
            &expectation,
            &denied(),
            &[
                "local_response.status: expected 403, got 401",
                r#"local_response.fields.vary: expected one line that starts with "a", got "a", "b""#,
                "local_response.fields.www-authenticate:\n  expected  one line that contains \"error\"\n  got       \"Bearer\"",
                r#"local_response.absent_fields: expected no `vary`, got "a", "b""#,
                r#"local_response.body: expected "no", got "{"reason":"expired","status":401}""#,
                r#"local_response.json.reason: expected "other", got "expired""#,
                r#"local_response.json.title: expected "x", got (absent)"#,
                "counters.allowed: expected +1, got +0",
            ],
        );
    }

    #[test]
    fn a_local_response_means_that_the_upstream_was_not_called() {
        check(
            &response(ResponseExpectation::default(), true),
            &passed(),
            &[
                "local_response: expected an answer made by the filter, got the upstream's answer",
                "upstream: expected not called, got called with `GET /a`",
            ],
        );
        check(
            &response(ResponseExpectation::default(), false),
            &denied(),
            &["response: expected the upstream's answer, got an answer made by the filter or the host"],
        );
    }

    #[test]
    fn the_upstream_is_called_exactly_once() {
        let request = RequestExpectation {
            path: Some("/b".into()),
            fields: [("x-sub".to_owned(), FieldExpectation::Lines(vec![b"bob".to_vec()]))].into(),
            ..RequestExpectation::default()
        };
        let expectation =
            Expectation { upstream: Some(UpstreamExpectation::Request(Box::new(request))), ..Expectation::default() };
        check(
            &expectation,
            &passed(),
            &[r#"upstream.path: expected "/b", got "/a""#, r#"upstream.fields.x-sub: expected "bob", got "alice""#],
        );
        check(&expectation, &denied(), &["upstream: expected called once, got not called"]);
        let mut twice = passed();
        twice.upstream.push(twice.upstream[0].clone());
        check(&expectation, &twice, &["upstream: expected called once, got called 2 times"]);
    }

    #[test]
    fn tells_a_closed_connection_from_a_response() {
        let closed = Expectation { closed: true, ..Expectation::default() };
        check(&closed, &Observed::default(), &[]);
        check(&closed, &passed(), &["closed: expected a connection closed without a response, got status 200"]);
        check(
            &response(ResponseExpectation::default(), false),
            &Observed::default(),
            &["response: expected a response, got the connection was closed without one"],
        );
    }

    #[test]
    fn shows_bytes_that_are_not_text() {
        assert_eq!(quoted(&[0xff, b'a', 0]), r#""\xffa\x00""#);
        assert_eq!(quoted(b"a\nb"), r#""a\nb""#);
        assert!(quoted(&[b'a'; 1000]).ends_with("\"... (1000 bytes)"));
    }

    #[test]
    fn describes_what_happened() {
        assert_eq!(
            describe(&denied()),
            "response: 401\n  www-authenticate: \"Bearer\"\n  vary: \"a\"\n  vary: \"b\"\n  \
             body: \"{\"reason\":\"expired\",\"status\":401}\"\nupstream: not called\ncounters:\n  denied: +1\n"
        );
    }
}
