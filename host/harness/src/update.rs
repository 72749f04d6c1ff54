//! Writes what came of a scenario into its file, as what it expects from now on.
//!
//! The file is edited in place: only values that differ change, or an `expect` that is missing or of another kind is written
//! anew. Comments, order and style of everything else stay as they are.

use std::ops::Range;

use granit_parser::{Event, Parser, StructureStyle};
use serde_json::{Map, Value, json};

use crate::content::written;
use crate::expectation::{Mismatch, written_lines};
use crate::message::{FieldLines, Observed, ObservedRequest, ObservedResponse};
use crate::run::Ran;
use crate::scenario::{Scenario, Step};

/// Columns that a line may have before it is broken up.
const COLUMNS: usize = 110;

/// Bytes of a body that is written into a file.
const BODY_BYTES_MAX: usize = 4 * 1024;

/// Why a scenario's file cannot be brought up to date.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// What came of it cannot be expected: it changes from one way of splitting the body to the next.
    #[error("the outcome depends on how the body is split, so there is nothing to write down")]
    Splits,
    /// The configuration was refused, or accepted, against what is expected. That is for a person to put right.
    #[error("{0}")]
    Configuration(String),
    /// The file is not of a form that can be edited.
    #[error("the file cannot be edited: {0}")]
    Form(String),
}

/// The file's new text; `None` if everything is as expected.
pub fn updated(scenario: &Scenario, text: &str, ran: &Ran) -> Result<Option<String>, UpdateError> {
    let steps = match (ran, &scenario.refused) {
        (Ran::Refused(message), None) => return Err(UpdateError::Configuration(message.clone())),
        (Ran::Refused(_), Some(_)) => return Ok(None),
        (Ran::Steps { .. }, Some(_)) => {
            let problem = "the configuration was accepted, but must be refused".to_owned();
            return Err(UpdateError::Configuration(problem));
        }
        (Ran::Steps { steps, .. }, None) => steps,
    };
    let document = Node::parse(text)?;
    let mut edits = Vec::new();
    for (index, (step, outcomes)) in steps.iter().enumerate() {
        let Some(observed) = outcomes.first() else { continue };
        if step.expect.is_empty() && step.request.is_none() {
            continue;
        }
        let holder = if scenario.has_steps() {
            document.get("steps").and_then(|steps| steps.item(index))
        } else {
            Some(&document)
        };
        let holder = holder.ok_or_else(|| UpdateError::Form("a step is not where it was".to_owned()))?;
        let whole = || snapshot(step, observed);
        let expect = holder.get("expect");
        let before = edits.len();
        match (expect, step.expect.is_empty()) {
            (Some(expect), false) => {
                let mismatches: Vec<Mismatch> = step.expect.compare(observed);
                match piecewise(text, expect, &mismatches) {
                    Some(pieces) => edits.extend(pieces),
                    None => edits.push(Edit::replace(text, expect, &whole())),
                }
            }
            (Some(expect), true) => edits.push(Edit::replace(text, expect, &whole())),
            (None, _) => edits.push(Edit::insert(text, holder, "expect", &whole())?),
        }
        if edits.len() > before && outcomes.iter().any(|other| whole() != snapshot(step, other)) {
            return Err(UpdateError::Splits);
        }
    }
    if edits.is_empty() {
        return Ok(None);
    }
    // From the end, so that places further ahead stay where they are.
    edits.sort_by_key(|edit| edit.range.start);
    let mut updated = text.to_owned();
    for edit in edits.iter().rev() {
        updated.replace_range(edit.range.clone(), &edit.with);
    }
    Ok(Some(updated))
}

/// An edit for each value that differs; `None` if one of them cannot be replaced on its own.
fn piecewise(text: &str, expect: &Node, mismatches: &[Mismatch]) -> Option<Vec<Edit>> {
    let mut edits = Vec::new();
    for mismatch in mismatches {
        let value = mismatch.written.as_ref()?;
        let node = mismatch.at.iter().try_fold(expect, |node, segment| match &node.kind {
            Kind::Map(_) => node.get(segment),
            Kind::List(_) => node.item(segment.parse().ok()?),
            Kind::Scalar => None,
        })?;
        edits.push(Edit::replace(text, node, value));
    }
    Some(edits)
}

/// All that is worth expecting of an outcome.
fn snapshot(step: &Step, observed: &Observed) -> Value {
    let mut expect = Map::new();
    let request = step.request.as_ref();
    match &observed.response {
        _ if request.is_none() => {}
        None => {
            expect.insert("closed".to_owned(), json!(true));
        }
        Some(response) if observed.local == Some(true) => {
            expect.insert("local_response".to_owned(), local_response(response, observed));
        }
        Some(response) => {
            expect.insert("response".to_owned(), changed_response(step, response));
        }
    }
    if let ([seen], Some(request)) = (observed.upstream.as_slice(), request) {
        let mut changes = Map::new();
        for (name, sent, seen) in [("method", &request.method, &seen.method), ("path", &request.path, &seen.path)] {
            if name == "path" || sent != seen {
                changes.insert(name.to_owned(), json!(escaped(seen)));
            }
        }
        changed_lines(&mut changes, &request.fields, &seen.fields);
        changed_body(&mut changes, &request.body.concat(), &seen.body);
        expect.insert("upstream".to_owned(), changes.into());
    }
    if !observed.counters.is_empty() {
        let counters: Map<String, Value> =
            observed.counters.iter().map(|(name, change)| (name.clone(), json!(change))).collect();
        expect.insert("counters".to_owned(), counters.into());
    }
    if !observed.callouts.is_empty() {
        let calls = observed.callouts.iter().map(|(name, calls)| (name.clone(), calls_made(calls)));
        expect.insert("callouts".to_owned(), calls.collect::<Map<_, _>>().into());
    }
    expect.into()
}

fn calls_made(calls: &[ObservedRequest]) -> Value {
    json!(calls.len())
}

fn local_response(response: &ObservedResponse, observed: &Observed) -> Value {
    let mut expected = Map::new();
    expected.insert("status".to_owned(), json!(response.status));
    changed_lines(&mut expected, &FieldLines::new(), &response.fields);
    expected.remove("absent_fields");
    match serde_json::from_slice::<Value>(&response.body) {
        Ok(Value::Object(members)) => {
            // What names this one request is another at the next.
            let id = observed.upstream.first().and_then(|request| request.fields.get("x-request-id"));
            let is_request_id = |value: &Value| {
                value.as_str().is_some_and(|text| {
                    text.starts_with("00000000-0000-4000-8000-") || id.is_some_and(|id| id == text.as_bytes())
                })
            };
            let members: Map<String, Value> = members.into_iter().filter(|(_, value)| !is_request_id(value)).collect();
            expected.insert("json".to_owned(), members.into());
        }
        _ => changed_body(&mut expected, b"", &response.body),
    }
    expected.into()
}

fn changed_response(step: &Step, response: &ObservedResponse) -> Value {
    let mut expected = Map::new();
    expected.insert("status".to_owned(), json!(response.status));
    changed_lines(&mut expected, &step.upstream_response.fields, &response.fields);
    let head = step.request.as_ref().is_some_and(|request| request.method == "HEAD");
    if !head {
        changed_body(&mut expected, &step.upstream_response.body.concat(), &response.body);
    }
    expected.into()
}

/// Fields that differ between what was sent and what was seen, but for those that hosts add or that change by themselves.
fn changed_lines(into: &mut Map<String, Value>, sent: &FieldLines, seen: &FieldLines) {
    const OF_HOSTS: [&str; 10] = [
        "connection",
        "content-length",
        "date",
        "keep-alive",
        "server",
        "te",
        "transfer-encoding",
        "via",
        "x-request-id",
        "host",
    ];
    let of_hosts =
        |name: &str| OF_HOSTS.contains(&name) || name.starts_with("x-forwarded-") || name.starts_with("x-envoy-");
    let mut names: Vec<&str> =
        sent.iter().chain(seen.iter()).map(|(name, _)| name).filter(|name| !of_hosts(name)).collect();
    names.sort_unstable();
    names.dedup();
    let mut fields = Map::new();
    let mut absent = Vec::new();
    for name in names {
        let lines: Vec<&[u8]> = seen.get_all(name).collect();
        if sent.get_all(name).eq(lines.iter().copied()) {
            continue;
        }
        if lines.is_empty() {
            absent.push(json!(name));
        } else {
            fields.insert(name.to_owned(), written_lines(&lines));
        }
    }
    if !fields.is_empty() {
        into.insert("fields".to_owned(), fields.into());
    }
    if !absent.is_empty() {
        into.insert("absent_fields".to_owned(), absent.into());
    }
}

fn changed_body(into: &mut Map<String, Value>, sent: &[u8], seen: &[u8]) {
    if sent != seen && seen.len() <= BODY_BYTES_MAX {
        into.insert("body".to_owned(), written(seen));
    }
}

fn escaped(text: &str) -> String {
    text.replace("${", "$${")
}

/// Where something is replaced, and by what.
struct Edit {
    range: Range<usize>,
    with: String,
}

impl Edit {
    fn replace(text: &str, node: &Node, value: &Value) -> Edit {
        let one_line = flow(value);
        let line_start = text[..node.range.start].rfind('\n').map_or(0, |at| at + 1);
        let fits = node.range.start - line_start + one_line.len() <= COLUMNS;
        let is_map = value.as_object().is_some_and(|map| !map.is_empty());
        let with = if fits || node.in_flow || !is_map {
            one_line
        } else {
            let indent = text[line_start..].len() - text[line_start..].trim_start_matches([' ', '-']).len();
            format!("\n{}", block(value, indent + 2).trim_end())
        };
        // A value that stood on lines of its own goes behind its key.
        let mut range = node.range.clone();
        if node.is_block && !with.starts_with('\n') {
            let key_end = text[..range.start].trim_end().len();
            if text[key_end..range.start].contains('\n') {
                return Edit { range: key_end..range.end, with: format!(" {with}") };
            }
        }
        if with.starts_with('\n') {
            range.start = text[..range.start].trim_end().len();
        }
        Edit { range, with }
    }

    fn insert(text: &str, map: &Node, key: &str, value: &Value) -> Result<Edit, UpdateError> {
        let Kind::Map(entries) = &map.kind else {
            return Err(UpdateError::Form("a map is expected".to_owned()));
        };
        let Some((first, last)) = entries.first().zip(entries.last()) else {
            return Err(UpdateError::Form("the map is empty".to_owned()));
        };
        if map.is_flow || map.in_flow {
            let at = last.value.range.end;
            return Ok(Edit { range: at..at, with: format!(", {key}: {}", flow(value)) });
        }
        let line_start = text[..first.key.start].rfind('\n').map_or(0, |at| at + 1);
        let indent = first.key.start - line_start;
        // Behind the last value and a comment beside it.
        let end = text[..last.value.range.end].trim_end().len();
        let at = text[end..].find('\n').map_or(text.len(), |line| end + line);
        let line = format!("\n{}{key}: {}", " ".repeat(indent), flow(value));
        let with = if line.len() <= COLUMNS {
            line
        } else {
            format!("\n{}{key}:\n{}", " ".repeat(indent), block(value, indent + 2).trim_end())
        };
        Ok(Edit { range: at..at, with })
    }
}

/// Entries in the order in which people write them, whatever order `serde_json` keeps.
fn ordered(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    const FIRST: [&str; 14] = [
        "local_response",
        "response",
        "closed",
        "upstream",
        "status",
        "method",
        "path",
        "authority",
        "fields",
        "absent_fields",
        "body",
        "json",
        "counters",
        "callouts",
    ];
    let mut entries: Vec<(&String, &Value)> = map.iter().collect();
    entries.sort_by_key(|(name, _)| (FIRST.iter().position(|first| first == name).unwrap_or(FIRST.len()), *name));
    entries
}

/// A value on one line.
fn flow(value: &Value) -> String {
    match value {
        Value::Object(map) if map.is_empty() => "{}".to_owned(),
        Value::Object(map) => {
            let entries: Vec<String> =
                ordered(map).iter().map(|(key, value)| format!("{}: {}", plain_or_quoted(key), flow(value))).collect();
            format!("{{ {} }}", entries.join(", "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::String(text) => plain_or_quoted(text),
        other => other.to_string(),
    }
}

/// A map on lines of its own, each entry on one if it fits.
fn block(value: &Value, indent: usize) -> String {
    let Value::Object(map) = value else { return format!("{}{}\n", " ".repeat(indent), flow(value)) };
    let mut text = String::new();
    for (key, value) in ordered(map) {
        let line = format!("{}{}: {}", " ".repeat(indent), plain_or_quoted(key), flow(value));
        if line.len() <= COLUMNS || !value.is_object() {
            text.push_str(&line);
            text.push('\n');
        } else {
            text.push_str(&format!("{}{}:\n{}", " ".repeat(indent), plain_or_quoted(key), block(value, indent + 2)));
        }
    }
    text
}

/// Words need no quotes; everything else is written as JSON, which YAML reads too.
fn plain_or_quoted(text: &str) -> String {
    let is_word = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf"]
            .contains(&text.to_ascii_lowercase().as_str());
    if is_word { text.to_owned() } else { Value::from(text).to_string() }
}

/// A value in a YAML text, with its place.
struct Node {
    range: Range<usize>,
    kind: Kind,
    /// A map or list on lines of its own.
    is_block: bool,
    /// A map or list in brackets.
    is_flow: bool,
    /// It stands inside brackets.
    in_flow: bool,
}

enum Kind {
    Map(Vec<Entry>),
    List(Vec<Node>),
    Scalar,
}

struct Entry {
    name: String,
    key: Range<usize>,
    value: Node,
}

type Events<'a> = std::vec::IntoIter<(Event<'a>, Range<usize>)>;

impl Node {
    fn parse(text: &str) -> Result<Node, UpdateError> {
        let mut events = Vec::new();
        for event in Parser::new_from_str(text) {
            let (event, span) = event.map_err(|error| UpdateError::Form(error.to_string()))?;
            let range = span.byte_range().unwrap_or_default();
            if !matches!(
                event,
                Event::StreamStart
                    | Event::StreamEnd
                    | Event::DocumentStart(..)
                    | Event::DocumentEnd
                    | Event::Comment(..)
            ) {
                events.push((event, range));
            }
        }
        let mut events = events.into_iter();
        let (event, range) = events.next().ok_or_else(|| UpdateError::Form("it is empty".to_owned()))?;
        Node::read(&event, range, false, &mut events)
    }

    fn read<'a>(
        event: &Event<'a>,
        range: Range<usize>,
        in_flow: bool,
        events: &mut Events<'a>,
    ) -> Result<Node, UpdateError> {
        let cut = || UpdateError::Form("it ends early".to_owned());
        let scalar = |range| Node { range, kind: Kind::Scalar, is_block: false, is_flow: false, in_flow };
        match event {
            Event::Scalar(..) => Ok(scalar(range)),
            Event::MappingStart(style, ..) => {
                let is_flow = *style == StructureStyle::Flow;
                let mut entries: Vec<Entry> = Vec::new();
                let mut end = range.end;
                loop {
                    let (key, key_range) = events.next().ok_or_else(cut)?;
                    let name = match key {
                        Event::MappingEnd => {
                            end = if is_flow { key_range.end } else { end };
                            break;
                        }
                        Event::Scalar(name, ..) => name.into_owned(),
                        _ => return Err(UpdateError::Form("a key is no text".to_owned())),
                    };
                    let (event, value_range) = events.next().ok_or_else(cut)?;
                    let value = Node::read(&event, value_range, in_flow || is_flow, events)?;
                    end = value.range.end;
                    entries.push(Entry { name, key: key_range, value });
                }
                let start = entries.first().filter(|_| !is_flow).map_or(range.start, |entry| entry.key.start);
                Ok(Node { range: start..end, kind: Kind::Map(entries), is_block: !is_flow, is_flow, in_flow })
            }
            Event::SequenceStart(style, ..) => {
                let is_flow = *style == StructureStyle::Flow;
                let mut items: Vec<Node> = Vec::new();
                let mut end = range.end;
                loop {
                    let (event, item_range) = events.next().ok_or_else(cut)?;
                    if matches!(event, Event::SequenceEnd) {
                        end = if is_flow { item_range.end } else { end };
                        break;
                    }
                    let item = Node::read(&event, item_range, in_flow || is_flow, events)?;
                    end = item.range.end;
                    items.push(item);
                }
                Ok(Node { range: range.start..end, kind: Kind::List(items), is_block: !is_flow, is_flow, in_flow })
            }
            _ => Err(UpdateError::Form("it has anchors or aliases".to_owned())),
        }
    }

    fn get(&self, name: &str) -> Option<&Node> {
        match &self.kind {
            Kind::Map(entries) => {
                entries.iter().find(|entry| entry.name.eq_ignore_ascii_case(name)).map(|entry| &entry.value)
            }
            _ => None,
        }
    }

    fn item(&self, index: usize) -> Option<&Node> {
        match &self.kind {
            Kind::List(items) => items.get(index),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Runs nothing: takes the outcome as given.
    fn check(text: &str, observed: &Observed, expected: &str) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.yaml");
        std::fs::write(&file, text).unwrap();
        let update = |text: &str| {
            std::fs::write(&file, text).unwrap();
            let scenario = Scenario::load_unfinished(Path::new(&file)).unwrap();
            let steps = scenario.plan(1_700_000_000).unwrap();
            let steps = steps.into_iter().map(|step| (step, vec![observed.clone()])).collect();
            updated(
                &scenario,
                text,
                &Ran::Steps { steps, lints: Vec::new(), log: String::new(), start: crate::trace::Trace::default() },
            )
            .unwrap()
        };
        let new = update(text).expect("something to change");
        assert_eq!(new, expected);
        assert_eq!(update(&new), None, "what was written is what is expected:\n{new}");
    }

    fn denied() -> Observed {
        Observed {
            response: Some(ObservedResponse {
                status: 401,
                fields: [("www-authenticate", "Bearer"), ("content-length", "9"), ("date", "now")]
                    .into_iter()
                    .collect(),
                body: br#"{"reason":"none","request_id":"00000000-0000-4000-8000-000000000001"}"#.to_vec(),
                complete: true,
                ..ObservedResponse::default()
            }),
            local: Some(true),
            counters: [("denied_total.rule.a".to_owned(), 1)].into(),
            ..Observed::default()
        }
    }

    fn passed() -> Observed {
        Observed {
            response: Some(ObservedResponse {
                status: 200,
                body: b"ok".to_vec(),
                complete: true,
                ..ObservedResponse::default()
            }),
            local: Some(false),
            upstream: vec![ObservedRequest {
                method: "GET".to_owned(),
                path: "/".to_owned(),
                fields: [("x-who", "alice"), ("x-request-id", "1")].into_iter().collect(),
                complete: true,
                ..ObservedRequest::default()
            }],
            ..Observed::default()
        }
    }

    #[test]
    fn only_values_that_differ_change() {
        check(
            "# what it shows\nname: a\nrequest: { path: / }\nexpect:\n  # who answers\n  local_response:\n    \
             status: 403 # once 401\n    json: { reason: \"other\" }\n  counters: { denied_total.rule.a: 2 }\n# the end\n",
            &denied(),
            "# what it shows\nname: a\nrequest: { path: / }\nexpect:\n  # who answers\n  local_response:\n    \
             status: 401 # once 401\n    json: { reason: none }\n  counters: { denied_total.rule.a: 1 }\n# the end\n",
        );
    }

    #[test]
    fn an_expectation_of_another_kind_is_written_anew() {
        check(
            "name: a\nrequest: { path: /, fields: [[authorization, x]] }\nexpect: { local_response: { status: 401 } } # denied\n",
            &passed(),
            "name: a\nrequest: { path: /, fields: [[authorization, x]] }\n\
             expect:\n  response: { status: 200 }\n  \
             upstream: { path: /, fields: { x-who: alice }, absent_fields: [authorization] } # denied\n",
        );
    }

    #[test]
    fn what_is_missing_is_written_and_comments_stay() {
        check(
            "name: a\nrequest: { path: / } # plain\n# end\n",
            &denied(),
            "name: a\nrequest: { path: / } # plain\nexpect:\n  \
             local_response: { status: 401, fields: { www-authenticate: Bearer }, json: { reason: none } }\n  \
             counters: { denied_total.rule.a: 1 }\n# end\n",
        );
        check(
            "name: a\nsteps:\n  - { request: { path: / } }\n  - request: { path: / }\n    name: second\n",
            &passed(),
            "name: a\nsteps:\n  \
             - { request: { path: / }, expect: { response: { status: 200 }, upstream: { path: /, fields: { x-who: alice } } } }\n  \
             - request: { path: / }\n    name: second\n    \
             expect: { response: { status: 200 }, upstream: { path: /, fields: { x-who: alice } } }\n",
        );
    }

    #[test]
    fn bytes_that_are_not_text_and_templates_survive() {
        let mut observed = passed();
        observed.upstream[0].fields = [("x-who", &b"\xff"[..]), ("x-template", b"${now}")].into_iter().collect();
        check(
            "name: a\nrequest: { path: / }\nexpect: { upstream: { fields: { x-who: alice, x-template: b } } }\n",
            &observed,
            "name: a\nrequest: { path: / }\n\
             expect: { upstream: { fields: { x-who: { base64: \"/w==\" }, x-template: \"$${now}\" } } }\n",
        );
    }

    #[test]
    fn a_closed_connection_is_an_outcome() {
        check(
            "name: a\nrequest: { path: / }\nexpect:\n  response:\n    status: 200\n",
            &Observed::default(),
            "name: a\nrequest: { path: / }\nexpect: { closed: true }\n",
        );
    }
}
