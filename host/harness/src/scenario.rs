//! What a scenario file says: a plugin configuration, one or several requests, and what comes of each.
//!
//! [`Scenario::load`] reads a file and finds every mistake that can be found without running it. [`Scenario::plan`]
//! mints the tokens and fills in times; what it returns is plain bytes that any host can be given. The format's
//! reference is `docs/reference/scenarios.md`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::content::{Content, Line, is_token};
use crate::expectation::{
    CalloutsExpectation, Expectation, FieldExpectation, Origin, RequestExpectation, ResponseExpectation,
    UpstreamExpectation,
};
use crate::grpc::{GrpcPlan, Replies};
use crate::message::FieldLines;
use crate::plan::{AUTHORITY_DEFAULT, Callout, CalloutAnswer, RequestPlan, ResponsePlan};
use crate::template::{Values, expand};
use crate::token::{TokenRecipe, mint};
use crate::yaml::{FileError, nearest, read, reason};

/// Where a scenario runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostKind {
    /// The simulated host, in this process.
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
    /// Where it runs.
    pub hosts: Vec<HostKind>,
    /// The scripted time at which it starts, in seconds since 1970. Only the harness can set its clock.
    pub now: Option<u64>,
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

/// One request with everything around it, in bytes.
#[derive(Debug, Clone)]
pub struct Step {
    /// What this step shows, if it says so.
    pub name: Option<String>,
    /// How far the clock moves before the request. Only the harness can move its clock.
    pub advance: Duration,
    /// New answers for callouts, by upstream; they replace those of earlier steps.
    pub callouts: BTreeMap<String, Vec<Callout>>,
    /// The request.
    pub request: RequestPlan,
    /// What the upstream answers.
    pub upstream_response: ResponsePlan,
    /// What must come of it.
    pub expect: Expectation,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    name: String,
    #[serde(default)]
    wasm: Option<String>,
    #[serde(default)]
    config: Option<String>,
    #[serde(default)]
    config_inline: Option<Value>,
    #[serde(default)]
    hosts: Option<Vec<HostKind>>,
    #[serde(default)]
    fresh: bool,
    #[serde(default)]
    now: Option<u64>,
    #[serde(default)]
    tokens: BTreeMap<String, TokenRecipe>,
    #[serde(default)]
    callouts: BTreeMap<String, Vec<CalloutDocument>>,
    #[serde(default)]
    request: Option<RequestDocument>,
    #[serde(default)]
    upstream_response: Option<ResponseDocument>,
    #[serde(default)]
    expect: Option<ExpectDocument>,
    #[serde(default)]
    steps: Option<Vec<StepDocument>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct StepDocument {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    advance: Option<String>,
    #[serde(default)]
    callouts: BTreeMap<String, Vec<CalloutDocument>>,
    request: RequestDocument,
    #[serde(default)]
    upstream_response: Option<ResponseDocument>,
    expect: ExpectDocument,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestDocument {
    #[serde(default = "method_default")]
    method: String,
    path: String,
    #[serde(default = "authority_default")]
    authority: String,
    #[serde(default)]
    fields: Vec<Line>,
    #[serde(default)]
    body: Option<Content>,
    #[serde(default)]
    body_chunks: Option<Vec<Content>>,
    #[serde(default)]
    trailers: Vec<Line>,
}

fn method_default() -> String {
    "GET".to_owned()
}

fn authority_default() -> String {
    AUTHORITY_DEFAULT.to_owned()
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResponseDocument {
    #[serde(default = "status_default")]
    status: u16,
    #[serde(default)]
    fields: Vec<Line>,
    #[serde(default)]
    body: Option<Content>,
    #[serde(default)]
    body_chunks: Option<Vec<Content>>,
    #[serde(default)]
    trailers: Vec<Line>,
}

fn status_default() -> u16 {
    200
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct CalloutDocument {
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    times: Option<u32>,
    #[serde(default)]
    delay: Option<String>,
    #[serde(default)]
    response: Option<ResponseDocument>,
    #[serde(default)]
    grpc: Option<GrpcDocument>,
    #[serde(default)]
    failure: Option<FailureDocument>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct GrpcDocument {
    #[serde(default)]
    fields: Vec<Line>,
    #[serde(default)]
    messages: Vec<Content>,
    #[serde(default)]
    replies: RepliesDocument,
    #[serde(default)]
    status: u32,
    #[serde(default)]
    message: String,
    #[serde(default)]
    trailers: Vec<Line>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RepliesDocument {
    #[default]
    AtOnce,
    PerMessage,
    AtEnd,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FailureDocument {
    Refused,
    Timeout,
    Reset,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectDocument {
    #[serde(default)]
    local_response: Option<ResponseExpectDocument>,
    #[serde(default)]
    response: Option<ResponseExpectDocument>,
    #[serde(default)]
    closed: bool,
    #[serde(default)]
    upstream: Option<UpstreamExpectDocument>,
    #[serde(default)]
    counters: BTreeMap<String, i64>,
    #[serde(default)]
    callouts: BTreeMap<String, usize>,
    #[serde(default)]
    configuration_refused: Option<Vec<String>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResponseExpectDocument {
    #[serde(default)]
    status: Option<u16>,
    #[serde(default)]
    fields: BTreeMap<String, FieldExpectDocument>,
    #[serde(default)]
    absent_fields: Vec<String>,
    #[serde(default)]
    body: Option<Content>,
    #[serde(default)]
    json: Option<Value>,
}

#[derive(Debug, Clone)]
enum UpstreamExpectDocument {
    NotCalled,
    Request(Box<RequestExpectDocument>),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestExpectDocument {
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    authority: Option<String>,
    #[serde(default)]
    fields: BTreeMap<String, FieldExpectDocument>,
    #[serde(default)]
    absent_fields: Vec<String>,
    #[serde(default)]
    body: Option<Content>,
    #[serde(default)]
    json: Option<Value>,
}

impl<'de> Deserialize<'de> for UpstreamExpectDocument {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UpstreamVisitor;
        impl<'de> Visitor<'de> for UpstreamVisitor {
            type Value = UpstreamExpectDocument;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`not_called`, or a map of what the upstream must have been asked")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                match text {
                    "not_called" => Ok(UpstreamExpectDocument::NotCalled),
                    other => Err(E::invalid_value(serde::de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let request = RequestExpectDocument::deserialize(MapAccessDeserializer::new(map))?;
                Ok(UpstreamExpectDocument::Request(Box::new(request)))
            }
        }
        deserializer.deserialize_any(UpstreamVisitor)
    }
}

/// What a field must hold: one exact line, several lines, or a part of one.
#[derive(Debug, Clone)]
enum FieldExpectDocument {
    Lines(Vec<Content>),
    Contains(String),
    StartsWith(String),
}

impl<'de> Deserialize<'de> for FieldExpectDocument {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Form {
            contains: Option<String>,
            starts_with: Option<String>,
            base64: Option<String>,
        }
        struct FieldVisitor;
        impl<'de> Visitor<'de> for FieldVisitor {
            type Value = FieldExpectDocument;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(
                    "the value in quotes, a list of all lines, or one of `{ contains: ... }`, \
                     `{ starts_with: ... }`, `{ base64: ... }`",
                )
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(FieldExpectDocument::Lines(vec![Content::Text(text.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut lines = Vec::new();
                while let Some(line) = items.next_element()? {
                    lines.push(line);
                }
                Ok(FieldExpectDocument::Lines(lines))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                use base64::Engine as _;
                match Form::deserialize(MapAccessDeserializer::new(map))? {
                    Form { contains: Some(text), starts_with: None, base64: None } => {
                        Ok(FieldExpectDocument::Contains(text))
                    }
                    Form { contains: None, starts_with: Some(text), base64: None } => {
                        Ok(FieldExpectDocument::StartsWith(text))
                    }
                    Form { contains: None, starts_with: None, base64: Some(text) } => {
                        let bytes = base64::engine::general_purpose::STANDARD.decode(text).map_err(|error| {
                            serde::de::Error::custom(format!("`base64` does not hold base64: {error}"))
                        })?;
                        Ok(FieldExpectDocument::Lines(vec![Content::Bytes(bytes)]))
                    }
                    _ => Err(serde::de::Error::custom(
                        "exactly one of `contains`, `starts_with` and `base64` can stand here",
                    )),
                }
            }
        }
        deserializer.deserialize_any(FieldVisitor)
    }
}

impl Scenario {
    /// Reads and checks a file.
    pub fn load(file: &Path) -> Result<Scenario, FileError> {
        Scenario::check(file, read(file)?)
    }

    fn check(file: &Path, document: Document) -> Result<Scenario, FileError> {
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
        let moves_clock = document.now.is_some() || document.steps.iter().flatten().any(|step| step.advance.is_some());
        if moves_clock && hosts != [HostKind::Harness] {
            let path = if document.now.is_some() { "now" } else { "steps" };
            return Err(fail(path, "only the harness can set its clock".into())
                .hint("add `hosts: [harness]`, or leave out `now` and `advance`"));
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
            hosts,
            now: document.now,
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
        let tokens = mint(&self.document.tokens, &self.file, now)?;
        let planner = Planner { file: &self.file, values: Values { now, tokens } };
        if self.refused.is_some() {
            return Ok(Vec::new());
        }
        match (&self.document.steps, &self.document.request, &self.document.expect) {
            (None, Some(request), Some(expect)) => {
                let mut callouts = planner.callouts("callouts", &self.document.callouts)?;
                let step = Step {
                    name: None,
                    advance: Duration::ZERO,
                    callouts: std::mem::take(&mut callouts),
                    request: planner.request("request", request)?,
                    upstream_response: planner
                        .response("upstream_response", self.document.upstream_response.as_ref())?,
                    expect: planner.expect("expect", expect)?,
                };
                Ok(vec![step])
            }
            (Some(steps), None, None) if self.document.upstream_response.is_none() => {
                if steps.is_empty() {
                    return Err(planner.fail("steps", "the list is empty"));
                }
                let mut planned = Vec::new();
                for (index, step) in steps.iter().enumerate() {
                    let at = |name: &str| format!("steps[{index}].{name}");
                    let mut callouts = match index {
                        0 => planner.callouts("callouts", &self.document.callouts)?,
                        _ => BTreeMap::new(),
                    };
                    callouts.extend(planner.callouts(&at("callouts"), &step.callouts)?);
                    planned.push(Step {
                        name: step.name.clone(),
                        advance: planner.duration(&at("advance"), step.advance.as_deref())?,
                        callouts,
                        request: planner.request(&at("request"), &step.request)?,
                        upstream_response: planner
                            .response(&at("upstream_response"), step.upstream_response.as_ref())?,
                        expect: planner.expect(&at("expect"), &step.expect)?,
                    });
                }
                Ok(planned)
            }
            (Some(_), _, _) => Err(planner
                .fail("steps", "there is a request outside the steps as well")
                .hint("move `request`, `upstream_response` and `expect` into a step")),
            (None, None, _) => {
                Err(planner.fail("", "`request` is missing").hint("give `request` and `expect`, or `steps`"))
            }
            (None, Some(_), None) => {
                Err(planner.fail("", "`expect` is missing").hint("say what must come of the request"))
            }
        }
    }
}

/// The texts of `configuration_refused`, after checking that nothing else is asked of such a scenario.
fn refusal(document: &Document, file: &Path) -> Result<Option<Vec<String>>, FileError> {
    if document.steps.iter().flatten().any(|step| step.expect.configuration_refused.is_some()) {
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
fn filter_of(file: &Path) -> String {
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

struct Planner<'a> {
    file: &'a Path,
    values: Values,
}

impl Planner<'_> {
    fn fail(&self, path: &str, problem: impl Into<String>) -> FileError {
        FileError::at(self.file, path, problem)
    }

    fn text(&self, path: &str, text: &str) -> Result<String, FileError> {
        expand(text, &self.values).map_err(|(problem, hint)| self.fail(path, problem).hint(hint))
    }

    fn lines(&self, path: &str, lines: &[Line]) -> Result<FieldLines, FileError> {
        let mut fields = FieldLines::new();
        for (index, line) in lines.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let value = line.value.resolve(&self.values, self.file, &path)?;
            if value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
                return Err(self.fail(&path, "a field value cannot hold a line break or a zero byte"));
            }
            fields.push(&line.name, value);
        }
        Ok(fields)
    }

    fn body(
        &self,
        path: &str,
        whole: Option<&Content>,
        chunks: Option<&Vec<Content>>,
    ) -> Result<Option<Vec<Vec<u8>>>, FileError> {
        match (whole, chunks) {
            (Some(_), Some(_)) => {
                Err(self.fail(path, "both `body` and `body_chunks` are given").hint("keep one of them"))
            }
            (Some(body), None) => {
                let body = body.resolve(&self.values, self.file, &format!("{path}.body"))?;
                Ok(Some(if body.is_empty() { Vec::new() } else { vec![body] }))
            }
            (None, Some(chunks)) => {
                let mut body = Vec::new();
                for (index, chunk) in chunks.iter().enumerate() {
                    let path = format!("{path}.body_chunks[{index}]");
                    let chunk = chunk.resolve(&self.values, self.file, &path)?;
                    if chunk.is_empty() {
                        return Err(self.fail(&path, "a chunk cannot be empty").hint("an empty chunk ends a body"));
                    }
                    body.push(chunk);
                }
                Ok(Some(body))
            }
            (None, None) => Ok(None),
        }
    }

    fn request(&self, path: &str, request: &RequestDocument) -> Result<RequestPlan, FileError> {
        let at = |name: &str| format!("{path}.{name}");
        let method = self.text(&at("method"), &request.method)?;
        if !is_token(&method) {
            return Err(self.fail(&at("method"), format!("`{method}` is not a method")));
        }
        let target = self.text(&at("path"), &request.path)?;
        if target.is_empty() || target.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return Err(self
                .fail(&at("path"), "a request target cannot be empty or hold white space")
                .hint("escape it, e.g. `%20`"));
        }
        let body = self.body(path, request.body.as_ref(), request.body_chunks.as_ref())?.unwrap_or_default();
        let trailers = self.lines(&at("trailers"), &request.trailers)?;
        if !trailers.is_empty() && body.is_empty() {
            return Err(self.fail(&at("trailers"), "trailers follow a body, and there is none"));
        }
        Ok(RequestPlan {
            method,
            path: target,
            authority: self.text(&at("authority"), &request.authority)?,
            fields: self.lines(&at("fields"), &request.fields)?,
            body,
            trailers,
        })
    }

    fn response(&self, path: &str, response: Option<&ResponseDocument>) -> Result<ResponsePlan, FileError> {
        let Some(response) = response else {
            return Ok(ResponsePlan::default());
        };
        if !(200..=599).contains(&response.status) {
            return Err(self.fail(&format!("{path}.status"), format!("{} is not a final status", response.status)));
        }
        let body = self.body(path, response.body.as_ref(), response.body_chunks.as_ref())?;
        let bodiless = matches!(response.status, 204 | 304);
        if bodiless && body.as_ref().is_some_and(|body| !body.is_empty()) {
            return Err(self.fail(path, format!("a {} response has no body", response.status)));
        }
        Ok(ResponsePlan {
            status: response.status,
            fields: self.lines(&format!("{path}.fields"), &response.fields)?,
            body: body.unwrap_or_else(|| if bodiless { Vec::new() } else { vec![b"ok".to_vec()] }),
            trailers: self.lines(&format!("{path}.trailers"), &response.trailers)?,
        })
    }

    fn grpc(&self, path: &str, grpc: &GrpcDocument) -> Result<GrpcPlan, FileError> {
        let messages = grpc.messages.iter().enumerate();
        let messages = messages
            .map(|(index, message)| message.resolve(&self.values, self.file, &format!("{path}.messages[{index}]")));
        Ok(GrpcPlan {
            fields: self.lines(&format!("{path}.fields"), &grpc.fields)?,
            messages: messages.collect::<Result<_, _>>()?,
            replies: match grpc.replies {
                RepliesDocument::AtOnce => Replies::AtOnce,
                RepliesDocument::PerMessage => Replies::PerMessage,
                RepliesDocument::AtEnd => Replies::AtEnd,
            },
            status: grpc.status,
            message: self.text(&format!("{path}.message"), &grpc.message)?,
            trailers: self.lines(&format!("{path}.trailers"), &grpc.trailers)?,
        })
    }

    fn callouts(
        &self,
        path: &str,
        callouts: &BTreeMap<String, Vec<CalloutDocument>>,
    ) -> Result<BTreeMap<String, Vec<Callout>>, FileError> {
        let mut planned = BTreeMap::new();
        for (upstream, answers) in callouts {
            let mut list = Vec::new();
            for (index, answer) in answers.iter().enumerate() {
                let path = format!("{path}.{upstream}[{index}]");
                list.push(Callout {
                    path: answer.path.clone(),
                    times: answer.times,
                    delay: self.duration(&format!("{path}.delay"), answer.delay.as_deref())?,
                    answer: match (&answer.response, &answer.grpc, answer.failure) {
                        (Some(response), None, None) => {
                            CalloutAnswer::Response(self.response(&format!("{path}.response"), Some(response))?)
                        }
                        (None, Some(grpc), None) => CalloutAnswer::Grpc(self.grpc(&format!("{path}.grpc"), grpc)?),
                        (None, None, Some(FailureDocument::Refused)) => CalloutAnswer::Refused,
                        (None, None, Some(FailureDocument::Timeout)) => CalloutAnswer::Timeout,
                        (None, None, Some(FailureDocument::Reset)) => CalloutAnswer::Reset,
                        _ => {
                            return Err(self
                                .fail(&path, "an answer is one of `response`, `grpc` and `failure`")
                                .hint("failures are `refused`, `timeout` and `reset`"));
                        }
                    },
                });
            }
            planned.insert(upstream.clone(), list);
        }
        Ok(planned)
    }

    fn duration(&self, path: &str, text: Option<&str>) -> Result<Duration, FileError> {
        let Some(text) = text else { return Ok(Duration::ZERO) };
        parse_duration(text).ok_or_else(|| {
            self.fail(path, format!("`{text}` is not a duration"))
                .hint("write a number and a unit: `300ms`, `5s`, `2m`, `1h`")
        })
    }

    fn expect(&self, path: &str, expect: &ExpectDocument) -> Result<Expectation, FileError> {
        let at = |name: &str| format!("{path}.{name}");
        let (response, origin) = match (&expect.local_response, &expect.response) {
            (Some(_), Some(_)) => {
                return Err(self.fail(path, "both `local_response` and `response` are given").hint(
                    "`local_response` is for an answer made by the filter, `response` for one from the upstream",
                ));
            }
            (Some(local), None) => (Some(self.expect_response(&at("local_response"), local)?), Origin::Local),
            (None, Some(response)) => (Some(self.expect_response(&at("response"), response)?), Origin::Upstream),
            (None, None) => (None, Origin::Either),
        };
        if expect.closed && response.is_some() {
            return Err(self.fail(&at("closed"), "a connection closed without an answer has no response"));
        }
        let upstream = match &expect.upstream {
            Some(UpstreamExpectDocument::NotCalled) => Some(UpstreamExpectation::NotCalled),
            Some(UpstreamExpectDocument::Request(request)) => {
                let path = at("upstream");
                Some(UpstreamExpectation::Request(RequestExpectation {
                    method: self.optional_text(&format!("{path}.method"), request.method.as_deref())?,
                    path: self.optional_text(&format!("{path}.path"), request.path.as_deref())?,
                    authority: self.optional_text(&format!("{path}.authority"), request.authority.as_deref())?,
                    fields: self.expect_fields(&format!("{path}.fields"), &request.fields)?,
                    absent_fields: self.names(&format!("{path}.absent_fields"), &request.absent_fields)?,
                    body: self.optional_content(&format!("{path}.body"), request.body.as_ref())?,
                    json: request.json.clone(),
                    ..RequestExpectation::default()
                }))
            }
            None => None,
        };
        let expectation = Expectation {
            response,
            origin,
            closed: expect.closed,
            upstream,
            counters: expect.counters.clone(),
            callouts: expect
                .callouts
                .iter()
                .map(|(upstream, count)| (upstream.clone(), CalloutsExpectation::Count(*count)))
                .collect(),
            ..Expectation::default()
        };
        if expectation.is_empty() {
            return Err(self
                .fail(path, "nothing is expected, so the scenario would always pass")
                .hint("add `local_response`, `response`, `upstream`, `closed`, `counters` or `callouts`"));
        }
        Ok(expectation)
    }

    fn expect_response(&self, path: &str, response: &ResponseExpectDocument) -> Result<ResponseExpectation, FileError> {
        Ok(ResponseExpectation {
            status: response.status,
            fields: self.expect_fields(&format!("{path}.fields"), &response.fields)?,
            absent_fields: self.names(&format!("{path}.absent_fields"), &response.absent_fields)?,
            body: self.optional_content(&format!("{path}.body"), response.body.as_ref())?,
            json: response.json.clone(),
            ..ResponseExpectation::default()
        })
    }

    fn expect_fields(
        &self,
        path: &str,
        fields: &BTreeMap<String, FieldExpectDocument>,
    ) -> Result<BTreeMap<String, FieldExpectation>, FileError> {
        let mut planned = BTreeMap::new();
        for (name, field) in fields {
            let path = format!("{path}.{name}");
            self.name(&path, name)?;
            let expectation = match field {
                FieldExpectDocument::Lines(lines) => FieldExpectation::Lines(
                    lines
                        .iter()
                        .map(|line| line.resolve(&self.values, self.file, &path))
                        .collect::<Result<Vec<_>, _>>()?,
                ),
                FieldExpectDocument::Contains(text) => FieldExpectation::Contains(self.text(&path, text)?),
                FieldExpectDocument::StartsWith(text) => FieldExpectation::StartsWith(self.text(&path, text)?),
            };
            planned.insert(name.to_ascii_lowercase(), expectation);
        }
        Ok(planned)
    }

    fn names(&self, path: &str, names: &[String]) -> Result<Vec<String>, FileError> {
        for (index, name) in names.iter().enumerate() {
            self.name(&format!("{path}[{index}]"), name)?;
        }
        Ok(names.iter().map(|name| name.to_ascii_lowercase()).collect())
    }

    fn name(&self, path: &str, name: &str) -> Result<(), FileError> {
        if is_token(name) {
            return Ok(());
        }
        let known = nearest(name.trim_start_matches(':'), ["method", "path", "authority", "status"]);
        let hint = known.map(|name| format!("use the key `{name}` beside `fields`")).unwrap_or_default();
        Err(self.fail(path, format!("`{name}` is not a field name")).hint(hint))
    }

    fn optional_text(&self, path: &str, text: Option<&str>) -> Result<Option<String>, FileError> {
        text.map(|text| self.text(path, text)).transpose()
    }

    fn optional_content(&self, path: &str, content: Option<&Content>) -> Result<Option<Vec<u8>>, FileError> {
        content.map(|content| content.resolve(&self.values, self.file, path)).transpose()
    }
}

/// `300ms`, `5s`, `2m` or `1h`.
fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at_checked(digits)?;
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Scenario, FileError> {
        let file = Path::new("filters/demo/scenarios/a.yaml");
        crate::yaml::parse(file, text).and_then(|document| Scenario::check(file, document))
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
        assert_eq!(step.request.method, "POST");
        assert_eq!(step.request.path, "/orders?at=1000");
        assert_eq!(step.request.authority, "api.example.com");
        assert_eq!(step.request.body, [b"a".to_vec(), b"bbb".to_vec()]);
        assert!(step.request.fields.get("authorization").unwrap().starts_with(b"Bearer eyJ"));
        assert_eq!(step.request.fields.get("x-bytes"), Some(&[0xff][..]));
        assert_eq!(step.request.fields.get_all("x-twice").count(), 2);
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
             `config_inline`, `hosts`, `fresh`, `now`, `tokens`, `callouts`, `request`, `upstream_response`, `expect`, `steps`",
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
             hint: add `hosts: [harness]`, or leave out `now` and `advance`",
        );
        check_error("name: a\n", ": `request` is missing\n  hint: give `request` and `expect`, or `steps`");
        check_error(
            "name: a\nrequest: { path: / }\n",
            ": `expect` is missing\n  hint: say what must come of the request",
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

    #[test]
    fn reads_durations() {
        assert_eq!(parse_duration("300ms"), Some(Duration::from_millis(300)));
        assert_eq!(parse_duration("1h"), Some(Duration::from_secs(3600)));
        assert_eq!(parse_duration("5"), None);
        assert_eq!(parse_duration("s"), None);
        assert_eq!(parse_duration("99999999999999999999h"), None);
    }
}
