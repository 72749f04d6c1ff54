//! What a scenario file says: a plugin configuration, one or several requests, and what comes of each.
//!
//! [`Scenario::load`] reads a file and finds every mistake that can be found without running it. [`Scenario::plan`]
//! mints the tokens and fills in times; what it returns is plain bytes that any host can be given. The format's
//! reference is `docs/reference/scenarios.md`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::content::Content;
use crate::document::{Document, ExpectDocument, RequestDocument};
use crate::expectation::Expectation;
use crate::plan::{Callout, RequestPlan, ResponsePlan};
use crate::planner::Planner;
use crate::template::Values;
use crate::token::mint;
use crate::yaml::{FileError, read, reason};

/// Where a scenario runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "Host")]
pub enum HostKind {
    /// The simulated host, without sockets.
    Harness,
    /// `portcullis serve`, over sockets.
    #[serde(rename = "host")]
    Standalone,
    /// The real Envoy, over sockets.
    Envoy,
}

impl HostKind {
    /// All of them.
    pub const ALL: [HostKind; 3] = [HostKind::Harness, HostKind::Standalone, HostKind::Envoy];

    /// As it is written in files and in test names.
    pub fn name(self) -> &'static str {
        match self {
            HostKind::Harness => "harness",
            HostKind::Standalone => "host",
            HostKind::Envoy => "envoy",
        }
    }
}

/// One scenario: read, checked, and ready to be planned.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// What it shows, as a sentence.
    pub name: String,
    /// Where it was read from.
    pub file: PathBuf,
    /// The filter's name: that of the folder which holds `scenarios/`.
    pub filter: String,
    /// The module that the file names; most leave it to the place they lie in.
    pub wasm: Option<PathBuf>,
    /// The plugin configuration, byte for byte.
    pub configuration: Vec<u8>,
    /// Selects the root context inside a module that has several.
    pub root_id: String,
    /// Whose shared data and queues the filter shares.
    pub vm_id: String,
    /// Where it runs.
    pub hosts: Vec<HostKind>,
    /// The scripted time at which it starts, in seconds since 1970. Only the harness can set its clock.
    pub now: Option<u64>,
    /// How many workers run the filter. Only the harness lets scenarios choose.
    pub workers: usize,
    /// The configuration must be refused, and the log must hold each of these texts. Such a scenario has no steps.
    pub refused: Option<Vec<String>>,
    /// What the filter remembers from other scenarios must not matter: it gets an instance of its own on every host.
    pub fresh: bool,
    /// Names of the upstreams that the filter may call.
    pub callout_upstreams: Vec<String>,
    /// Those of them that speak HTTP/2: they give a gRPC answer in some step.
    pub http2_upstreams: Vec<String>,
    document: Document,
}

/// One request with everything around it, in bytes; or something else that happens.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// What this step shows, if it says so.
    pub name: Option<String>,
    /// New answers for callouts, by upstream; they replace those of earlier steps.
    pub callouts: BTreeMap<String, Vec<Callout>>,
    /// How far the clock moves before the request. Only the harness can move its clock.
    pub advance: Duration,
    /// How many ticks happen before the request. Only in the harness.
    pub ticks: u32,
    /// Items put into queues before the request, each with the queue's name. Only in the harness.
    pub enqueue: Vec<(String, Vec<u8>)>,
    /// Which worker gets the request. Only in the harness.
    pub worker: usize,
    /// The request. Only in the harness can a step do without.
    pub request: Option<RequestPlan>,
    /// The request is sent once for every way to split its body. Only in the harness; elsewhere it is sent once.
    pub every_split: bool,
    /// Properties that the filter reads, by path with dots. Only in the harness.
    pub properties: Vec<(String, Vec<u8>)>,
    /// What the upstream answers.
    pub upstream_response: ResponsePlan,
    /// What must come of it.
    pub expect: Expectation,
}

/// Whether a scenario must say what it expects.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expects {
    Something,
    Perhaps,
}

impl Scenario {
    /// Reads and checks a file.
    pub fn load(file: &Path) -> Result<Scenario, FileError> {
        Scenario::check(file, read(file)?, Expects::Something)
    }

    /// The same for a file that may still lack what it expects, to be written into it.
    pub fn load_unfinished(file: &Path) -> Result<Scenario, FileError> {
        Scenario::check(file, read(file)?, Expects::Perhaps)
    }

    fn check(file: &Path, document: Document, expects: Expects) -> Result<Scenario, FileError> {
        let fail = |path: &str, problem: String| FileError::at(file, path, problem);
        if document.name.trim().is_empty() {
            return Err(fail("name", "it is empty".into()).hint("say in a sentence what the scenario shows"));
        }
        let configuration = match (&document.config, &document.config_inline) {
            (Some(name), None) => {
                let path = file.parent().unwrap_or(Path::new("")).join(name);
                std::fs::read(&path).map_err(|error| {
                    fail("config", format!("`{name}` cannot be read: {}", reason(&error)))
                        .hint("paths are relative to the file that names them")
                })?
            }
            (None, Some(value)) => value.to_string().into_bytes(),
            (None, None) => Vec::new(),
            (Some(_), Some(_)) => {
                return Err(fail("config_inline", "there is `config` as well".into()).hint("keep one of them"));
            }
        };
        let hosts = match &document.hosts {
            None => HostKind::ALL.to_vec(),
            Some(hosts) if hosts.is_empty() => {
                return Err(fail("hosts", "the list is empty, so the scenario would never run".into())
                    .hint("leave it out to run on `harness`, `host` and `envoy`"));
            }
            Some(hosts) => hosts.clone(),
        };
        if hosts != [HostKind::Harness]
            && let Some((path, problem)) = harness_only(&document)
        {
            return Err(fail(&path, problem.to_owned()).hint("add `hosts: [harness]`, or leave it out"));
        }
        if expects == Expects::Something {
            check_expectations(&document, file)?;
        }
        let refused = refusal(&document, file)?;
        let callouts = document.steps.iter().flatten().map(|step| &step.callouts).chain([&document.callouts]);
        let mut callout_upstreams: Vec<String> = Vec::new();
        let mut http2_upstreams: Vec<String> = Vec::new();
        for (name, answers) in callouts.flatten() {
            callout_upstreams.push(name.clone());
            if answers.iter().any(|answer| answer.grpc.is_some()) {
                http2_upstreams.push(name.clone());
            }
        }
        for names in [&mut callout_upstreams, &mut http2_upstreams] {
            names.sort();
            names.dedup();
        }
        let scenario = Scenario {
            name: document.name.trim().to_owned(),
            file: file.to_owned(),
            filter: filter_of(file),
            wasm: document.wasm.as_ref().map(|wasm| file.parent().unwrap_or(Path::new("")).join(wasm)),
            configuration,
            root_id: document.root_id.clone().unwrap_or_default(),
            vm_id: document.vm_id.clone().unwrap_or_default(),
            hosts,
            now: document.now,
            workers: document.workers.unwrap_or(1),
            refused,
            fresh: document.fresh || !callout_upstreams.is_empty(),
            callout_upstreams,
            http2_upstreams,
            document,
        };
        // Whatever planning can find wrong does not depend on the time of day.
        scenario.plan(scenario.now.unwrap_or(1_700_000_000))?;
        Ok(scenario)
    }

    /// The steps with tokens minted and times filled in; `now` is in seconds since 1970.
    pub fn plan(&self, now: u64) -> Result<Vec<Step>, FileError> {
        let planner = self.planner(now)?;
        if self.refused.is_some() { Ok(Vec::new()) } else { planner.steps(&self.document) }
    }

    /// What filters share at first, by key.
    pub fn shared_data(&self, now: u64) -> Result<Vec<(String, Vec<u8>)>, FileError> {
        let planner = self.planner(now)?;
        let values = self.document.shared_data.iter();
        values.map(|(key, value)| Ok((key.clone(), planner.content(&format!("shared_data.{key}"), value)?))).collect()
    }

    /// Whether it is written as `steps`.
    pub(crate) fn has_steps(&self) -> bool {
        self.document.steps.is_some()
    }

    /// Files that it names, beside the module.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let document = &self.document;
        let bodies = |request: &RequestDocument| -> Vec<String> {
            let chunks = request.body.iter().chain(request.body_chunks.iter().flatten());
            chunks.filter_map(Content::file).map(str::to_owned).collect()
        };
        let requests =
            document.request.iter().chain(document.steps.iter().flatten().filter_map(|step| step.request.as_ref()));
        let keys = document.tokens.values().flat_map(|token| [&token.key, &token.secret_from_public_key]).flatten();
        let keys = keys.filter_map(|key| key.split_once('#')).map(|(file, _)| file.to_owned());
        let names = document.config.iter().cloned().chain(keys).chain(requests.flat_map(bodies));
        names.map(|name| self.file.parent().unwrap_or(Path::new("")).join(name)).collect()
    }

    fn planner(&self, now: u64) -> Result<Planner<'_>, FileError> {
        let tokens = mint(&self.document.tokens, &self.file, now)?;
        Ok(Planner { file: &self.file, values: Values { now, tokens } })
    }
}

/// The first thing in the file that only the harness can do or see, and why.
fn harness_only(document: &Document) -> Option<(String, &'static str)> {
    const CLOCK: &str = "only the harness can set its clock";
    const DOES: &str = "only the harness can do this";
    const SEES: &str = "only the harness can see this";
    let whole = [
        ("now", document.now.is_some(), CLOCK),
        ("workers", document.workers.is_some(), DOES),
        ("shared_data", !document.shared_data.is_empty(), DOES),
    ];
    let expected = |expect: &ExpectDocument| {
        [
            ("log", !expect.log.is_empty()),
            ("details", expect.details.is_some()),
            ("properties", !expect.properties.is_empty()),
            ("shared_data", !expect.shared_data.is_empty()),
            ("queues", !expect.queues.is_empty()),
        ]
    };
    let mut found: Vec<(String, bool, &'static str)> =
        whole.into_iter().map(|(path, is_there, why)| (path.to_owned(), is_there, why)).collect();
    if let Some(request) = &document.request {
        found.push(("request.properties".to_owned(), !request.properties.is_empty(), DOES));
    }
    for (name, is_there) in document.expect.iter().flat_map(expected) {
        found.push((format!("expect.{name}"), is_there, SEES));
    }
    for (index, step) in document.steps.iter().flatten().enumerate() {
        let at = |name: &str| format!("steps[{index}].{name}");
        let properties = step.request.as_ref().is_some_and(|request| !request.properties.is_empty());
        found.extend([
            (at("advance"), step.advance.is_some(), CLOCK),
            (at("ticks"), step.ticks.is_some(), CLOCK),
            (at("enqueue"), !step.enqueue.is_empty(), DOES),
            (at("worker"), step.worker.is_some(), DOES),
            (at("request.properties"), properties, DOES),
        ]);
        if step.request.is_none() {
            found.push((format!("steps[{index}]"), true, "only in the harness can a step do without a request"));
        }
        for (name, is_there) in step.expect.iter().flat_map(expected) {
            found.push((at(&format!("expect.{name}")), is_there, SEES));
        }
    }
    found.into_iter().find(|(_, is_there, _)| *is_there).map(|(path, _, why)| (path, why))
}

/// Whether every request has an expectation.
fn check_expectations(document: &Document, file: &Path) -> Result<(), FileError> {
    let missing = |path: &str| {
        FileError::at(file, path, "`expect` is missing")
            .hint("say what must come of the request, or let `portcullis test --update` write what comes of it")
    };
    if document.request.is_some() && document.expect.is_none() {
        return Err(missing(""));
    }
    for (index, step) in document.steps.iter().flatten().enumerate() {
        if step.request.is_some() && step.expect.is_none() {
            return Err(missing(&format!("steps[{index}]")));
        }
    }
    Ok(())
}

/// The texts of `configuration_refused`, after checking that nothing else is asked of such a scenario.
fn refusal(document: &Document, file: &Path) -> Result<Option<Vec<String>>, FileError> {
    if document
        .steps
        .iter()
        .flatten()
        .any(|step| step.expect.as_ref().is_some_and(|expect| expect.configuration_refused.is_some()))
    {
        return Err(FileError::at(file, "steps", "a refused configuration has no steps")
            .hint("put `configuration_refused` into a top-level `expect`"));
    }
    let Some(texts) = document.expect.as_ref().and_then(|expect| expect.configuration_refused.as_ref()) else {
        return Ok(None);
    };
    let expect = document.expect.as_ref();
    let asks_more = document.request.is_some()
        || document.steps.is_some()
        || expect.is_some_and(|expect| {
            expect.local_response.is_some()
                || expect.response.is_some()
                || expect.upstream.is_some()
                || expect.closed
                || !expect.counters.is_empty()
        });
    if asks_more {
        return Err(FileError::at(file, "expect.configuration_refused", "a refused configuration serves no request")
            .hint("leave out everything else that is expected, and `request`"));
    }
    if texts.is_empty() {
        return Err(FileError::at(file, "expect.configuration_refused", "the list is empty")
            .hint("name what the message must say, e.g. the path inside the configuration"));
    }
    Ok(Some(texts.clone()))
}

/// `filters/jwt-auth/scenarios/a.yaml` belongs to `jwt-auth`.
pub(crate) fn filter_of(file: &Path) -> String {
    let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let folder = file
        .ancestors()
        .find(|folder| folder.file_name().is_some_and(|name| name == "scenarios"))
        .and_then(Path::parent)
        .or_else(|| file.parent());
    folder
        .and_then(|folder| {
            folder.file_name().map(|name| name.to_string_lossy().into_owned()).or_else(|| {
                let folder = folder.canonicalize().ok()?;
                folder.file_name().map(|name| name.to_string_lossy().into_owned())
            })
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expectation::Origin;
    use crate::grpc::{GrpcPlan, Replies};
    use crate::plan::CalloutAnswer;

    fn parse(text: &str) -> Result<Scenario, FileError> {
        let file = Path::new("filters/demo/scenarios/a.yaml");
        crate::yaml::parse(file, text).and_then(|document| Scenario::check(file, document, Expects::Something))
    }

    fn check_error(text: &str, expected: &str) {
        let error = parse(text).unwrap_err().to_string();
        assert_eq!(error.strip_prefix("filters/demo/scenarios/a.yaml").unwrap_or(&error), expected);
    }

    const WHOLE: &str = r#"
name: everything that a scenario can say
config_inline: { issuer: "https://issuer.example" }
hosts: [harness, envoy]
tokens:
  good: { secret: s, header: { alg: HS256 }, claims: { exp: now+300 } }
callouts:
  keys:
    - { path: /jwks.json, times: 1, response: { body: { json: { keys: [] } } } }
    - { failure: refused }
request:
  method: POST
  path: /orders?at=${now}
  fields: [[Authorization, "Bearer ${tokens.good}"], [x-bytes, { base64: "/w==" }], [x-twice, "1"], [x-twice, "2"]]
  body_chunks: ["a", { repeat: b, times: 3 }]
  trailers: [[x-sum, "4"]]
upstream_response: { status: 204 }
expect:
  response: { status: 204, fields: { x-a: "1", x-b: ["1", "2"], x-c: { contains: c } }, absent_fields: [Server] }
  upstream: { method: POST, path: "/orders?at=1000", body: abbb }
  counters: { demo_allowed_total: 1 }
  callouts: { keys: 1 }
"#;

    #[test]
    fn plans_what_the_file_says() {
        let scenario = parse(WHOLE).unwrap();
        assert_eq!(scenario.filter, "demo");
        assert_eq!(scenario.configuration, br#"{"issuer":"https://issuer.example"}"#);
        assert_eq!(scenario.hosts, [HostKind::Harness, HostKind::Envoy]);
        assert_eq!(scenario.callout_upstreams, ["keys"]);
        let [step] = scenario.plan(1000).unwrap().try_into().unwrap();
        let request = step.request.as_ref().unwrap();
        assert_eq!(request.method, "POST");
        assert_eq!(request.path, "/orders?at=1000");
        assert_eq!(request.authority, "api.example.com");
        assert_eq!(request.body, [b"a".to_vec(), b"bbb".to_vec()]);
        assert!(request.fields.get("authorization").unwrap().starts_with(b"Bearer eyJ"));
        assert_eq!(request.fields.get("x-bytes"), Some(&[0xff][..]));
        assert_eq!(request.fields.get_all("x-twice").count(), 2);
        assert_eq!(step.upstream_response.status, 204);
        assert!(step.upstream_response.body.is_empty());
        assert_eq!(step.callouts["keys"].len(), 2);
        assert_eq!(step.callouts["keys"][1].answer, CalloutAnswer::Refused);
        assert_eq!(step.expect.origin, Origin::Upstream);
        assert_eq!(step.expect.counters["demo_allowed_total"], 1);
    }

    #[test]
    fn an_upstream_that_answers_in_grpc_speaks_http2() {
        let scenario = parse(
            r#"
name: a call and a stream
callouts:
  auth:
    - { path: /a, delay: 2s, response: { status: 404 } }
    - { grpc: { replies: per_message, messages: [a, { base64: "/w==" }], status: 7, message: no, fields: [[x, "1"]] } }
  keys: [{ failure: reset }]
request: { path: / }
expect: { closed: true }
"#,
        )
        .unwrap();
        assert_eq!(scenario.callout_upstreams, ["auth", "keys"]);
        assert_eq!(scenario.http2_upstreams, ["auth"]);
        let [step] = scenario.plan(0).unwrap().try_into().unwrap();
        let plan = GrpcPlan {
            messages: vec![b"a".to_vec(), vec![0xff]],
            replies: Replies::PerMessage,
            ..GrpcPlan::failed(7, "no").field("x", "1")
        };
        assert_eq!(step.callouts["auth"][0].delay, Duration::from_secs(2));
        assert_eq!(step.callouts["auth"][1].answer, CalloutAnswer::Grpc(plan));
        assert_eq!(step.callouts["keys"][0].answer, CalloutAnswer::Reset);
        check_error(
            "name: a\ncallouts: { auth: [{ grpc: {}, failure: reset }] }\nrequest: { path: / }\nexpect: { closed: true }\n",
            ": callouts.auth[0]: an answer is one of `response`, `grpc` and `failure`\n  \
             hint: failures are `refused`, `timeout` and `reset`",
        );
    }

    #[test]
    fn steps_share_callouts_and_move_the_clock() {
        let scenario = parse(
            r#"
name: a key is fetched again
hosts: [harness]
now: 1700000000
callouts: { keys: [{ response: { body: first } }] }
steps:
  - { name: first, request: { path: / }, expect: { response: { status: 200 } } }
  - { advance: 5m, callouts: { keys: [{ failure: timeout }] }, request: { path: / }, expect: { closed: true } }
"#,
        )
        .unwrap();
        let steps = scenario.plan(1_700_000_000).unwrap();
        assert_eq!(steps.len(), 2);
        assert_eq!(steps[0].callouts["keys"].len(), 1);
        assert_eq!(steps[1].advance, Duration::from_secs(300));
        assert_eq!(steps[1].callouts["keys"][0].answer, CalloutAnswer::Timeout);
    }

    #[test]
    fn a_configuration_may_have_to_be_refused() {
        let scenario = parse("name: a\nconfig_inline: {}\nexpect: { configuration_refused: ['providers'] }\n").unwrap();
        assert_eq!(scenario.refused.as_deref(), Some(&["providers".to_owned()][..]));
        assert!(scenario.plan(0).unwrap().is_empty());
        check_error(
            "name: a\nrequest: { path: / }\nexpect: { configuration_refused: [x] }\n",
            ": expect.configuration_refused: a refused configuration serves no request\n  \
             hint: leave out everything else that is expected, and `request`",
        );
    }

    #[test]
    fn says_where_what_and_how_to_fix_it() {
        check_error(
            "name: a\nrequest: { path: / }\nexpects: {}\n",
            ":3:1: unknown key `expects`\n  hint: did you mean `expect`? known here: `name`, `wasm`, `config`, \
             `config_inline`, `root_id`, `vm_id`, `hosts`, `fresh`, `now`, `workers`, `shared_data`, `tokens`, `callouts`, `request`, \
             `upstream_response`, `expect`, `steps`",
        );
        check_error(
            "name: a\nrequest: { path: / }\nexpect: {}\n",
            ": expect: nothing is expected, so the scenario would always pass\n  \
             hint: add `local_response`, `response`, `upstream`, `closed`, `counters` or `callouts`",
        );
        check_error(
            "name: a\nconfig: ../config/none.json\nrequest: { path: / }\nexpect: { closed: true }\n",
            ": config: `../config/none.json` cannot be read: there is no such file\n  \
             hint: paths are relative to the file that names them",
        );
        check_error(
            "name: a\nrequest: { path: '/a b' }\nexpect: { closed: true }\n",
            ": request.path: a request target cannot be empty or hold white space\n  hint: escape it, e.g. `%20`",
        );
        check_error(
            "name: a\nrequest: { path: /, fields: [[x, '${tokens.t}']] }\nexpect: { closed: true }\n",
            ": request.fields[0]: there is no token `t`\n  hint: the scenario has no `tokens`",
        );
        check_error(
            "name: a\nnow: 5\nrequest: { path: / }\nexpect: { closed: true }\n",
            ": now: only the harness can set its clock\n  \
             hint: add `hosts: [harness]`, or leave it out",
        );
        check_error("name: a\n", ": `request` is missing\n  hint: give `request` and `expect`, or `steps`");
        check_error(
            "name: a\nrequest: { path: / }\n",
            ": `expect` is missing\n  \
             hint: say what must come of the request, or let `portcullis test --update` write what comes of it",
        );
        check_error(
            "name: a\nhosts: [moon]\n",
            ":2:9: hosts[0]: unknown value `moon`\n  hint: known here: `harness`, `host`, `envoy`",
        );
        check_error(
            "name: a\nrequest: { path: / }\nexpect: { response: { fields: { ':status': '200' } } }\n",
            ": expect.response.fields.:status: `:status` is not a field name\n  \
             hint: use the key `status` beside `fields`",
        );
        check_error(
            "name: a\nrequest: { path: / }\nexpect: { upstream: never }\n",
            ":3:11: expect.upstream: found string \"never\", expected `not_called`, or a map of what the upstream must \
             have been asked",
        );
        check_error(
            "name: a\nrequest: { path: / }\nexpect: { response: {}, local_response: {} }\n",
            ": expect: both `local_response` and `response` are given\n  hint: `local_response` is for an answer made \
             by the filter, `response` for one from the upstream",
        );
    }
}
