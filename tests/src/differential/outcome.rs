//! What came of a row on one host, as lines that can be compared, and the values in them that are of no account.

use portcullis_harness::{FieldLines, ObservedRequest, ObservedResponse};

use super::row::Row;
use super::transcript::Told;

/// What came of a row on one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Line by line.
    pub lines: Vec<String>,
}

impl Outcome {
    /// Of what guests told, that which the row asks for.
    pub fn told(&mut self, row: &Row, told: &Told) {
        if row.root {
            self.root(told, row.until);
        }
        if row.coarse {
            self.callbacks(told);
        } else {
            self.streams(told, row.plugins.is_empty());
        }
    }

    /// What the root context told, in the VM that the row is about.
    fn root(&mut self, told: &Told, until: Option<&str>) {
        let wanted =
            |lines: &&(String, Vec<String>)| until.is_none_or(|until| lines.1.iter().any(|l| l.contains(until)));
        // Envoy makes a VM on trial first and throws it away. The last one serves.
        let serving = told.roots.iter().rev().find(wanted).or(told.roots.last());
        let lines = serving.map(|(_, lines)| lines.as_slice()).unwrap_or_default();
        // A module without randomness gives all its VMs one number; each begins with the same line.
        let start = lines.iter().rposition(|line| Some(line) == lines.first()).unwrap_or_default();
        for line in lines.get(start..).unwrap_or_default() {
            self.lines.push(format!("root: {}", plain(line)));
        }
    }

    /// What streams told; ids of calls are of no account in a VM that the row shares with others.
    fn streams(&mut self, told: &Told, shared: bool) {
        let lines = told.streams.iter().map(|line| plain(line));
        self.lines.extend(lines.map(|line| if shared { without_call_id(&line) } else { line }));
    }

    /// What streams told, every callback once and without its arguments.
    fn callbacks(&mut self, told: &Told) {
        for line in told.streams.iter().filter(|line| !line.starts_with(' ')) {
            let callback = line.split_once('(').map_or(line.as_str(), |(callback, _)| callback).to_owned();
            if !self.lines.contains(&callback) {
                self.lines.push(callback);
            }
        }
    }

    /// What the client got.
    pub fn response(&mut self, response: Option<&ObservedResponse>) {
        let Some(response) = response else {
            self.lines.push("client: the connection is closed without a response".to_owned());
            return;
        };
        self.lines.push(format!("client: {}", response.status));
        // When a response was made says nothing about who made it.
        self.fields("client", &response.fields, &["date"]);
        self.body("client", &response.body, response.complete);
        self.fields("client: trailer", &response.trailers, &[]);
    }

    /// What the upstream got.
    pub fn upstream(&mut self, requests: &[ObservedRequest]) {
        if requests.is_empty() {
            self.lines.push("upstream: nothing".to_owned());
        }
        for request in requests {
            self.request("upstream", request, false);
        }
    }

    /// What another upstream was asked by a guest.
    pub fn request(&mut self, whose: &str, request: &ObservedRequest, notes_too: bool) {
        let line = format!("{whose}: {} {} for {}", request.method, request.path, request.authority);
        self.lines.push(plain(&line));
        // What Envoy tells an upstream of itself is a row of its own, and of no account in the others.
        let notes = ["x-calls", "x-envoy-internal", "x-envoy-expected-rq-timeout-ms"];
        self.fields(whose, &request.fields, if notes_too { &notes[..1] } else { &notes });
        self.body(whose, &request.body, request.complete);
        self.fields(&format!("{whose}: trailer"), &request.trailers, &[]);
    }

    fn fields(&mut self, whose: &str, fields: &FieldLines, without: &[&str]) {
        // Between fields of different names order has no meaning.
        let mut fields: Vec<(&str, &[u8])> = fields.iter().filter(|(name, _)| !without.contains(name)).collect();
        fields.sort_by_key(|(name, _)| *name);
        for (name, value) in fields {
            self.lines.push(plain(&format!("{whose}: {name}: {}", value.escape_ascii())));
        }
    }

    fn body(&mut self, whose: &str, body: &[u8], complete: bool) {
        let end = if complete { "" } else { ", cut off" };
        if !body.is_empty() || !complete {
            let shown = match body.get(..200) {
                Some(start) if body.len() > 200 => {
                    format!("\"{}\"... {} bytes", start[..40].escape_ascii(), body.len())
                }
                _ => format!("\"{}\"", body.escape_ascii()),
            };
            self.lines.push(plain(&format!("{whose}: body {shown}{end}")));
        }
    }
}

/// A line without what differs from run to run.
fn plain(line: &str) -> String {
    let line = status_names(line);
    let line = replaced(&line, port);
    let line = replaced(&line, uuid);
    let line = replaced(&line, http_date);
    let line = client_address(&line);
    without_number(&replaced(&line, unix_time))
}

/// A line without the number that the host gave to what it keeps for everybody: it counts whatever came before.
fn without_number(line: &str) -> String {
    let calls = ["get_shared_data", "register_shared_queue", "resolve_shared_queue"];
    let Some((call, result)) = line.split_once(" -> ") else { return line.to_owned() };
    let is_one = calls.iter().any(|name| call.contains(&format!("proxy_{name} ")));
    match result.rsplit_once(' ') {
        Some((rest, number)) if is_one && number.parse::<u32>().is_ok() => format!("{call} -> {rest} <number>"),
        _ => line.to_owned(),
    }
}

fn without_call_id(line: &str) -> String {
    let calls = ["proxy_http_call", "proxy_grpc_call", "proxy_grpc_stream"];
    match line.rsplit_once(" -> OK ") {
        Some((call, _)) if calls.iter().any(|name| call.trim_start().starts_with(name)) => format!("{call} -> OK <id>"),
        _ => line.to_owned(),
    }
}

/// Statuses of the ABI by their names: `proxy_done -> 1` reads `proxy_done -> NOT_FOUND`.
fn status_names(line: &str) -> String {
    const NAMES: [&str; 13] = [
        "OK",
        "NOT_FOUND",
        "BAD_ARGUMENT",
        "SERIALIZATION_FAILURE",
        "PARSE_FAILURE",
        "BAD_EXPRESSION",
        "INVALID_MEMORY_ACCESS",
        "EMPTY",
        "CAS_MISMATCH",
        "RESULT_MISMATCH",
        "INTERNAL_FAILURE",
        "BROKEN_CONNECTION",
        "UNIMPLEMENTED",
    ];
    if !line.trim_start().starts_with("proxy_") && !line.trim_start().starts_with("raw proxy_") {
        return line.to_owned();
    }
    let Some((call, result)) = line.split_once(" -> ") else { return line.to_owned() };
    let (status, rest) = result.split_once(' ').map_or((result, String::new()), |(s, rest)| (s, format!(" {rest}")));
    match status.parse().ok().and_then(|status: usize| NAMES.get(status)) {
        Some(name) => format!("{call} -> {name}{rest}"),
        None => line.to_owned(),
    }
}

/// Puts a name in the place of every text that `rule` finds at the start of what it is shown.
fn replaced(line: &str, rule: fn(&str) -> Option<(usize, &'static str)>) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    let mut inside_word = false;
    while let Some(first) = rest.chars().next() {
        if !inside_word && let Some((len, name)) = rule(rest) {
            out.push_str(name);
            rest = rest.get(len..).unwrap_or_default();
            continue;
        }
        inside_word = first.is_ascii_alphanumeric();
        out.push(first);
        rest = rest.get(first.len_utf8()..).unwrap_or_default();
    }
    out
}

/// The ports that the system chose.
fn port(text: &str) -> Option<(usize, &'static str)> {
    let digits = text.strip_prefix("127.0.0.1:")?.bytes().take_while(u8::is_ascii_digit).count();
    (digits > 0).then_some(("127.0.0.1:".len() + digits, "127.0.0.1:<port>"))
}

/// A client on loopback is given the machine's own address by Envoy, and its real one by our host.
fn client_address(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("x-forwarded-for") {
        let separator: String = after.chars().take_while(|c| !c.is_ascii_digit()).collect();
        let address = after.get(separator.len()..).unwrap_or_default();
        let len = address.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'.').count();
        out.push_str(before);
        out.push_str("x-forwarded-for");
        out.push_str(&separator);
        out.push_str(if len > 0 { "<client>" } else { "" });
        rest = address.get(len..).unwrap_or_default();
    }
    out.push_str(rest);
    out
}

/// Request ids.
fn uuid(text: &str) -> Option<(usize, &'static str)> {
    let uuid = text.get(..36)?;
    let fits = uuid.bytes().enumerate().all(|(at, byte)| match at {
        8 | 13 | 18 | 23 => byte == b'-',
        _ => byte.is_ascii_hexdigit(),
    });
    fits.then_some((36, "<uuid>"))
}

/// When a message was made (RFC 9110, section 5.6.7).
fn http_date(text: &str) -> Option<(usize, &'static str)> {
    let date = text.get(..29)?;
    (date.get(3..5) == Some(", ") && date.ends_with(" GMT")).then_some((29, "<date>"))
}

/// Nanoseconds since 1970, of this century.
fn unix_time(text: &str) -> Option<(usize, &'static str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    (digits == 19 && text.starts_with('1')).then_some((digits, "<time>"))
}

/// The lines that differ: those only the first has with `-` before them, those only the second has with `+`.
pub fn difference(first: &Outcome, second: &Outcome) -> Vec<String> {
    let (a, b) = (&first.lines, &second.lines);
    // Longest common subsequence, from the end. Rows have a few dozen lines.
    let mut common = vec![vec![0u32; b.len() + 1]; a.len() + 1];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            common[i][j] = if a[i] == b[j] { common[i + 1][j + 1] + 1 } else { common[i + 1][j].max(common[i][j + 1]) };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut lines = Vec::new();
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i] == b[j] {
            i += 1;
            j += 1;
        } else if j == b.len() || (i < a.len() && common[i + 1][j] >= common[i][j + 1]) {
            lines.push(format!("- {}", a[i]));
            i += 1;
        } else {
            lines.push(format!("+ {}", b[j]));
            j += 1;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_from_run_to_run_has_a_name() {
        let check = |line: &str, expected: &str| assert_eq!(plain(line), expected);
        check("  proxy_done -> 1", "  proxy_done -> NOT_FOUND");
        check("  random_get 4 -> 1", "  random_get 4 -> 1");
        check(r#"  proxy_f "a" -> 0 "b -> 1""#, r#"  proxy_f "a" -> OK "b -> 1""#);
        check("x: 127.0.0.1:45678", "x: 127.0.0.1:<port>");
        check("x-request-id: 01234567-89ab-cdef-0123-456789abcdef.", "x-request-id: <uuid>.");
        check(
            "  proxy_get_current_time_nanoseconds -> 0 1764025555123456789",
            "  proxy_get_current_time_nanoseconds -> OK <time>",
        );
        check("x: 123456789012345678901", "x: 123456789012345678901");
        check(r#"  proxy_get_shared_data "a" -> 0 "7" 15"#, r#"  proxy_get_shared_data "a" -> OK "7" <number>"#);
        check(r#"  proxy_get_shared_data "a" -> 1"#, r#"  proxy_get_shared_data "a" -> NOT_FOUND"#);
        check(
            r#"one   proxy_register_shared_queue "a" =q -> 0 3"#,
            r#"one   proxy_register_shared_queue "a" =q -> 0 <number>"#,
        );
    }

    #[test]
    fn differences_are_told_in_order() {
        let outcome = |lines: &[&str]| Outcome { lines: lines.iter().map(|line| (*line).to_owned()).collect() };
        let check =
            |a: &[&str], b: &[&str], expected: &[&str]| assert_eq!(difference(&outcome(a), &outcome(b)), expected);
        check(&["a", "b", "c"], &["a", "b", "c"], &[]);
        check(&["a", "b", "c"], &["a", "x", "c", "d"], &["- b", "+ x", "+ d"]);
        check(&["a"], &[], &["- a"]);
    }
}
