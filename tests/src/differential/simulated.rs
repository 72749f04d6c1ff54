//! A row in the harness: the same modules, configurations and scripts, on a host without sockets.
//!
//! Compared is what guests tell, and the status that the client gets. What belongs to connections is not there to be compared.

use std::time::Duration;

use portcullis_abi::{FailurePolicy, LogLevel, Plugin as HostPlugin};
use portcullis_harness::{CalloutAnswer, FieldLines, Filter, FilterBuilder, Guest, Host};
use serde_json::Value;

use super::outcome::{Outcome, difference};
use super::policy::{SHARED, STRICT};
use super::row::{Module, Plugin, Row, Step};
use super::stage;
use super::transcript::Transcripts;
use crate::places;

/// Longer than any timer in a script.
const WHILE: Duration = Duration::from_secs(2);

const PIECES: &str = "what waits of a body comes as one there";
const ROUTES: &str = "there are no routes";
const LENGTHS: &str = "fields of connections have their lengths";

/// Rows whose answers are others in the harness, which has no connections and no routes. An id that ends in `_` means all that begin so.
const ELSEWISE: &[(&str, &str)] = &[
    ("contexts/no_upstream", ROUTES),
    ("flow/hold_all_body_waits", PIECES),
    ("flow/stop_all_buffer", PIECES),
    ("flow/stop_all_watermark", PIECES),
    ("http_call/broken_off", "an answer that breaks off is planned as such there, not sent"),
    ("maps/inline_request", "there is nobody for whom a request could be forwarded"),
    ("maps/pairs_hop_by_hop", "there are no connections whose fields it could take away"),
    ("maps/replace_pseudo", ROUTES),
    ("maps/set_pairs", ROUTES),
    ("maps/size", LENGTHS),
    ("maps/write_in_request_headers", LENGTHS),
    ("maps/write_in_response_headers", LENGTHS),
    ("properties/in_", "addresses, clusters and sizes are others"),
];

/// What the harness is asked of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Whether it answers as Envoy does.
    Same,
    /// Whether it still answers otherwise, for this reason.
    Otherwise(&'static str),
    /// Nothing: there are two answers to it already, it is about TCP connections, or about limits that belong to the proxy.
    Nothing,
}

/// What the harness is asked of this row.
pub fn asked(row: &Row) -> Asked {
    let limited = row.plugins.iter().any(|plugin| plugin.settings.get("limits").is_some());
    if row.deviation.is_some() || row.is_tcp() || limited {
        return Asked::Nothing;
    }
    let fits = |id: &str| row.id == id || (id.ends_with('_') && row.id.starts_with(id));
    ELSEWISE.iter().find(|(id, _)| fits(id)).map_or(Asked::Same, |(_, why)| Asked::Otherwise(why))
}

/// Runs a row; see the module.
fn run(row: &Row) -> Result<Outcome, String> {
    let host = Host::new().log_level(LogLevel::Info).without_trace();
    let filter = match start(&host, row) {
        Ok(filter) => filter,
        Err(_) if row.alone => return Ok(Outcome { lines: vec!["host: it does not start".to_owned()] }),
        Err(error) => return Err(error),
    };
    let mut seen = Outcome::default();
    for step in &row.steps {
        take(&host, &filter, row, step, &mut seen)?;
    }
    let told = || {
        let transcripts = Transcripts::default();
        for line in host.log() {
            transcripts.note(&line.message);
        }
        transcripts.told(&row.id)
    };
    if let Some(until) = row.until {
        for _ in 0..10 {
            if told().contains(until) {
                break;
            }
            host.advance(WHILE);
        }
    }
    let told = told();
    let mut outcome = Outcome::default();
    if row.alone {
        outcome.lines.push("host: it starts".to_owned());
    }
    outcome.told(row, &told);
    outcome.lines.append(&mut seen.lines);
    Ok(comparable(&outcome))
}

/// Of an outcome, what one without sockets has, too: callbacks, without how much was sent in which of them; every call and its
/// answer, without the fields that belong to connections; and the client's status.
fn comparable(outcome: &Outcome) -> Outcome {
    let mut lines: Vec<String> = Vec::new();
    let mut all = outcome.lines.iter().peekable();
    while let Some(line) = all.next() {
        if line.contains(" -> ") {
            lines.push(OF_CONNECTIONS.iter().fold(line.clone(), |line, field| line.replace(field, "")));
            continue;
        }
        match line.split_once(": ") {
            Some(("client", rest)) if rest.bytes().all(|byte| byte.is_ascii_digit()) => lines.push(line.clone()),
            Some(("client", rest)) if rest.starts_with("the connection") => lines.push(line.clone()),
            Some(("client" | "upstream" | "callee" | "metric", _)) => {}
            _ => {
                let callback = line.split_once('(').map_or(line.as_str(), |(callback, _)| callback);
                // A body comes in as many pieces as it is sent in, and its end with the last of them or alone.
                let calls = all.peek().is_some_and(|next| next.contains(" -> "));
                if calls || !callback.ends_with("_body") || !lines.iter().any(|line| line == callback) {
                    lines.push(callback.to_owned());
                }
            }
        }
    }
    Outcome { lines }
}

/// What a proxy knows of its clients, and how it sends bodies.
const OF_CONNECTIONS: [&str; 4] = [
    "\"x-forwarded-for\" \"<client>\", ",
    "\"x-envoy-external-address\" \"127.0.0.1\", ",
    ", \"x-envoy-external-address\" \"127.0.0.1\"",
    ", \"transfer-encoding\" \"chunked\"",
];

/// What Envoy said, from the record beside the tests.
fn recorded(row: &Row) -> Result<Outcome, String> {
    let file = places::workspace().join(format!("tests/differential/{}.txt", row.area()));
    let record = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let head = format!("== {}\n{}\n", row.id, row.shows);
    let (_, rest) = record.split_once(&head).ok_or_else(|| format!("{} has no `{}`", file.display(), row.id))?;
    let lines = rest.split_once("\n\n").map_or(rest, |(lines, _)| lines);
    Ok(Outcome { lines: lines.lines().map(str::to_owned).collect() })
}

/// Whether a row comes out in the harness as it did in Envoy, or otherwise where that is expected.
pub fn judge(row: &Row) -> Result<(), String> {
    let difference = difference(&comparable(&recorded(row)?), &run(row)?);
    match (difference.is_empty(), asked(row)) {
        (true, Asked::Otherwise(why)) => Err(format!("it is the same as in Envoy, although {why}")),
        (false, Asked::Same) => {
            Err(format!("{}\nEnvoy (-) and the harness (+) differ:\n{}", row.shows, difference.join("\n")))
        }
        _ => Ok(()),
    }
}

fn start(host: &Host, row: &Row) -> Result<Filter, String> {
    host.upstream("callee");
    host.upstream("closed").always(CalloutAnswer::Refused);
    let shared = [Plugin::new(if row.strict { STRICT } else { SHARED })];
    let plugins = if row.plugins.is_empty() { &shared[..] } else { &row.plugins };
    let mut chain: Option<FilterBuilder> = None;
    for plugin in plugins {
        let (name, vm_id) = if row.plugins.is_empty() {
            (plugin.name.to_owned(), plugin.name.to_owned())
        } else {
            (format!("{}-{}", row.slug(), plugin.name), row.slug())
        };
        let guest = match &plugin.module {
            Module::Guest(guest) => Guest::load(places::filter(guest)?),
            Module::Prebuilt(language) => {
                Guest::load(places::workspace().join(format!("tests/guests/{language}/gate.wasm")))
            }
            Module::Text(text) => {
                let wasm = wat::parse_str(text).map_err(|error| format!("the module of `{name}`: {error}"))?;
                Guest::from_bytes(&name, &wasm)
            }
        };
        let guest = guest.map_err(|error| error.to_string())?;
        let strict = row.plugins.is_empty() && row.strict;
        let built =
            host.load(&guest).name(name).vm_id(vm_id).configuration(plugin.configuration.as_str()).plugin(|made| {
                made.allow_on_headers_stop_iteration = !strict;
                made.limits.log_lines_per_second = 1_000_000;
                for (key, value) in plugin.settings.as_object().into_iter().flatten() {
                    set(made, key, value);
                }
            });
        chain = Some(match chain {
            Some(chain) => chain.then(built),
            None => built,
        });
    }
    let chain = chain.ok_or("a row without plugins")?;
    chain.start().map_err(|error| error.to_string())
}

/// A setting of a policy file.
fn set(plugin: &mut HostPlugin, key: &str, value: &Value) {
    let text = || value.as_str().unwrap_or_default().to_owned();
    let names = || value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    match key {
        "vm_id" => plugin.vm_id = text(),
        "root_id" => plugin.root_id = text(),
        "vm_configuration" => plugin.vm_configuration = text().into_bytes(),
        "allow_on_headers_stop_iteration" => {
            plugin.allow_on_headers_stop_iteration = value.as_bool().unwrap_or_default();
        }
        "failure_policy" => {
            plugin.failure_policy = match value.as_str() {
                Some("fail_open") => FailurePolicy::Open,
                Some("fail_closed") => FailurePolicy::Closed,
                _ => FailurePolicy::Reload,
            }
        }
        "environment" => {
            for (name, value) in value["set"].as_object().into_iter().flatten() {
                plugin.environment.push((name.clone(), value.as_str().unwrap_or_default().to_owned()));
            }
        }
        "capabilities" => plugin.capabilities.functions = Some(names()),
        // The simulated clock stands still meanwhile, or moves as far as it has to.
        "reload" => {}
        other => unreachable!("the suite uses no `{other}`"),
    }
}

fn take(host: &Host, filter: &Filter, row: &Row, step: &Step, seen: &mut Outcome) -> Result<(), String> {
    host.upstream("callee").answers(step.callouts.clone());
    let (mut request, mut response) = (stage::request(row, step), step.response.clone());
    as_on_the_wire(&mut request.body, &mut request.fields, request.trailers.is_empty());
    as_on_the_wire(&mut response.body, &mut response.fields, response.trailers.is_empty());
    for _ in 0..20 {
        let observed = filter.exchange(&request, &response);
        let status = observed.status();
        if step.until_status.is_none() || status == step.until_status {
            seen.response(observed.response.as_ref());
            return Ok(());
        }
        host.advance(WHILE);
    }
    Err(format!("never answered {:?}", step.until_status))
}

/// A body whose end comes behind its last piece, as from a connection.
fn as_on_the_wire(body: &mut Vec<Vec<u8>>, fields: &mut FieldLines, ends: bool) {
    body.retain(|piece| !piece.is_empty());
    if body.is_empty() || !ends {
        return;
    }
    if let [whole] = &body[..]
        && fields.get("content-length").is_none()
    {
        fields.push("content-length", whole.len().to_string());
    }
    body.push(Vec::new());
}
