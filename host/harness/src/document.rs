//! The shape of a scenario file, as serde reads it and as editors are told of it.
//!
//! The doc comments here are what the reference page and the JSON Schema say (see [`crate::reference`]).

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::content::{Content, Line};
use crate::plan::AUTHORITY_DEFAULT;
use crate::scenario::HostKind;
use crate::token::TokenRecipe;

/// A filter's configuration, one request or several, and what must come of each.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Scenario")]
pub(crate) struct Document {
    /// What the scenario shows, as a sentence.
    pub(crate) name: String,
    /// The module. Default: the newest that was built for the filter whose folder holds `scenarios`.
    #[serde(default)]
    pub(crate) wasm: Option<String>,
    /// The plugin configuration: a file, handed over byte for byte. Default: no configuration.
    #[serde(default)]
    pub(crate) config: Option<String>,
    /// The same, written here; it is handed over as JSON. Instead of `config`.
    #[serde(default)]
    pub(crate) config_inline: Option<Value>,
    /// Selects the root context inside a module that has several.
    #[serde(default)]
    pub(crate) root_id: Option<String>,
    /// Whose shared data and queues the filter shares.
    #[serde(default)]
    pub(crate) vm_id: Option<String>,
    /// Where it runs. Default: on all three.
    #[serde(default)]
    pub(crate) hosts: Option<Vec<HostKind>>,
    /// The filter gets an instance of its own. Without it, scenarios with the same configuration share one on `host` and
    /// `envoy`, for speed; a filter that remembers what it saw (limits, caches) needs `fresh: true`. Implied by `callouts`. In
    /// the harness every scenario has an instance of its own.
    #[serde(default)]
    pub(crate) fresh: bool,
    /// What the clock says at first, in seconds since 1970. Only in the harness. Default: the start of 2026 there, the
    /// real time elsewhere.
    #[serde(default)]
    pub(crate) now: Option<u64>,
    /// How many workers run the filter, each with a VM of its own. Only in the harness. Default: one.
    #[serde(default)]
    pub(crate) workers: Option<usize>,
    /// What filters share at first, by key. Only in the harness.
    #[serde(default)]
    pub(crate) shared_data: BTreeMap<String, Content>,
    /// Tokens to present, by name.
    #[serde(default)]
    pub(crate) tokens: BTreeMap<String, TokenRecipe>,
    /// What other upstreams answer to the filter, by name. The first answer of a list that fits a call is given; a call that
    /// none fits gets 404.
    #[serde(default)]
    pub(crate) callouts: BTreeMap<String, Vec<CalloutDocument>>,
    /// The request. Required, unless there are `steps`.
    #[serde(default)]
    pub(crate) request: Option<RequestDocument>,
    /// What the upstream answers, once it has the whole request. Default: status 200, body `ok`.
    #[serde(default)]
    pub(crate) upstream_response: Option<ResponseDocument>,
    /// What must come of it. Required, unless there are `steps`; `portcullis test --update` writes it.
    #[serde(default)]
    pub(crate) expect: Option<ExpectDocument>,
    /// Several requests to the same instance, one after the other. Instead of `request`, `upstream_response` and `expect`.
    #[serde(default)]
    pub(crate) steps: Option<Vec<StepDocument>>,
}

/// One of several requests, or something else that happens. What is given happens in the order of this table.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Step")]
pub(crate) struct StepDocument {
    /// What this step shows.
    #[serde(default)]
    pub(crate) name: Option<String>,
    /// New answers to calls, by upstream, from this step on; they replace those of the upstreams they name.
    #[serde(default)]
    pub(crate) callouts: BTreeMap<String, Vec<CalloutDocument>>,
    /// Moves the clock, and lets ticks, late answers and deadlines happen: `300ms`, `5s`, `2m`, `1h`. Only in the harness.
    #[serde(default)]
    pub(crate) advance: Option<String>,
    /// Moves the clock to the next tick that the filter has asked for, so many times. Only in the harness.
    #[serde(default)]
    pub(crate) ticks: Option<u32>,
    /// Puts items into queues, by the queue's name, as another filter would; the filter that registered it is told. Only in
    /// the harness.
    #[serde(default)]
    pub(crate) enqueue: BTreeMap<String, Vec<Content>>,
    /// Which worker gets the request, from 0. Only in the harness. Default: 0.
    #[serde(default)]
    pub(crate) worker: Option<usize>,
    /// The request. Only in the harness can a step do without.
    #[serde(default)]
    pub(crate) request: Option<RequestDocument>,
    /// What the upstream answers.
    #[serde(default)]
    pub(crate) upstream_response: Option<ResponseDocument>,
    /// What must come of it.
    #[serde(default)]
    pub(crate) expect: Option<ExpectDocument>,
}

/// A request of a client's.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Request")]
pub(crate) struct RequestDocument {
    /// The method. Default: `GET`.
    #[serde(default = "method_default")]
    pub(crate) method: String,
    /// The request target. It is sent as it stands, without normalisation.
    pub(crate) path: String,
    /// The authority (`host`). Default: `api.example.com`.
    #[serde(default = "authority_default")]
    pub(crate) authority: String,
    /// Field lines in order, each `[name, value]`. Names may repeat.
    #[serde(default)]
    pub(crate) fields: Vec<Line>,
    /// The body in one piece, with `content-length`. Default: no body.
    #[serde(default)]
    pub(crate) body: Option<Content>,
    /// The body in several pieces, chunked; the filter sees them one by one in the harness, and as the network delivers them
    /// elsewhere. Instead of `body`.
    #[serde(default)]
    pub(crate) body_chunks: Option<Vec<Content>>,
    /// In the harness the request is sent again and again, with `body` split in every way: all ways if it has up to ten
    /// bytes, otherwise at every place and into single bytes. What is expected must come of each. Elsewhere it is sent once.
    #[serde(default)]
    pub(crate) every_split: bool,
    /// Trailer fields, each `[name, value]`.
    #[serde(default)]
    pub(crate) trailers: Vec<Line>,
    /// Properties that the filter reads, by path with dots, e.g. `source.address`; they come before those that the host
    /// knows. Only in the harness.
    #[serde(default)]
    pub(crate) properties: BTreeMap<String, Content>,
}

fn method_default() -> String {
    "GET".to_owned()
}

fn authority_default() -> String {
    AUTHORITY_DEFAULT.to_owned()
}

/// What an upstream answers.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Response")]
pub(crate) struct ResponseDocument {
    /// The status. Default: 200.
    #[serde(default = "status_default")]
    pub(crate) status: u16,
    /// Field lines in order, each `[name, value]`.
    #[serde(default)]
    pub(crate) fields: Vec<Line>,
    /// The body in one piece. Default: `ok`.
    #[serde(default)]
    pub(crate) body: Option<Content>,
    /// The body in several pieces. Instead of `body`.
    #[serde(default)]
    pub(crate) body_chunks: Option<Vec<Content>>,
    /// Trailer fields, each `[name, value]`.
    #[serde(default)]
    pub(crate) trailers: Vec<Line>,
}

fn status_default() -> u16 {
    200
}

/// An answer to calls of the filter's.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Callout")]
pub(crate) struct CalloutDocument {
    /// Only for calls to this path; of a gRPC call `/SERVICE/METHOD`. Default: any.
    #[serde(default)]
    pub(crate) path: Option<String>,
    /// How often this answer is given before the next one is. Default: always.
    #[serde(default)]
    pub(crate) times: Option<u32>,
    /// How long the answer takes: `300ms`, `5s`. In the harness that costs no time. If the call's own deadline is shorter, the
    /// filter sees the 504 that hosts make of it.
    #[serde(default)]
    pub(crate) delay: Option<String>,
    /// The answer to an HTTP call.
    #[serde(default)]
    pub(crate) response: Option<ResponseDocument>,
    /// The answer to a gRPC call or stream.
    #[serde(default)]
    pub(crate) grpc: Option<GrpcDocument>,
    /// That there is no answer. Instead of `response` and `grpc`.
    #[serde(default)]
    pub(crate) failure: Option<FailureDocument>,
}

/// What becomes of a call that is not answered.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "Failure")]
pub(crate) enum FailureDocument {
    /// Nobody is there; the filter sees the 503 that hosts make of it.
    Refused,
    /// No answer ever comes; the filter sees the 504 that hosts make of it after its own deadline.
    Timeout,
    /// The answer breaks off behind its head; the filter sees no field at all.
    Reset,
}

/// The answer of a gRPC server, to a call or a stream. One with neither messages nor `fields` is one block of trailing
/// metadata, as gRPC servers send it. An upstream that gives such an answer in any step speaks HTTP/2 in all of them;
/// `response` then is what no gRPC server should answer, body and all, and each `failure` is the status that hosts make of it:
/// 14, 14 and 13.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Grpc")]
pub(crate) struct GrpcDocument {
    /// Messages in order, without their frames.
    #[serde(default)]
    pub(crate) messages: Vec<Content>,
    /// When they are sent.
    #[serde(default)]
    pub(crate) replies: RepliesDocument,
    /// The status; 0 is success. Default: 0.
    #[serde(default)]
    pub(crate) status: u32,
    /// The status's message.
    #[serde(default)]
    pub(crate) message: String,
    /// Initial metadata, each `[name, value]`.
    #[serde(default)]
    pub(crate) fields: Vec<Line>,
    /// Trailing metadata beside the status, each `[name, value]`.
    #[serde(default)]
    pub(crate) trailers: Vec<Line>,
}

/// When messages are sent.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "Replies")]
pub(crate) enum RepliesDocument {
    /// All of them, and the end, without waiting for a message. The default.
    #[default]
    AtOnce,
    /// One for each message that comes; the rest and the end once the filter has ended its side.
    PerMessage,
    /// All of them, and the end, once the filter has ended its side, as it has at once in a call.
    AtEnd,
}

/// What must come of a request. Only what is named is compared, and something must be named.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Expect")]
pub(crate) struct ExpectDocument {
    /// The filter or the host answers, and the upstream is not called (unless `upstream` says that it is).
    #[serde(default)]
    pub(crate) local_response: Option<ResponseExpectDocument>,
    /// The upstream answers. Instead of `local_response`.
    #[serde(default)]
    pub(crate) response: Option<ResponseExpectDocument>,
    /// The connection is closed without an answer.
    #[serde(default)]
    pub(crate) closed: bool,
    /// `not_called`, or what reaches the upstream, exactly once.
    #[serde(default)]
    pub(crate) upstream: Option<UpstreamExpectDocument>,
    /// By how much each counter or gauge changes: `{ "portcullis_jwt_auth_allowed_total.rule.default": 1 }`. The names are those
    /// that the filter gives, on every host.
    #[serde(default)]
    pub(crate) counters: BTreeMap<String, i64>,
    /// What calls the filter makes, by upstream: how many, or a list of what each must be.
    #[serde(default)]
    pub(crate) callouts: BTreeMap<String, CalloutsExpectDocument>,
    /// Texts that lines of the log must contain. Only in the harness.
    #[serde(default)]
    pub(crate) log: Vec<String>,
    /// The response code details of a local response. Only in the harness.
    #[serde(default)]
    pub(crate) details: Option<String>,
    /// What filters must have stored with the stream, by name; `null` is nothing. Only in the harness.
    #[serde(default)]
    pub(crate) properties: BTreeMap<String, Option<Content>>,
    /// What filters must share afterwards, by key; `null` is nothing. Only in the harness.
    #[serde(default)]
    pub(crate) shared_data: BTreeMap<String, Option<Content>>,
    /// What must wait in queues afterwards, by the queue's name. Only in the harness.
    #[serde(default)]
    pub(crate) queues: BTreeMap<String, Vec<Content>>,
    /// The filter refuses its configuration, and what is logged holds each of these texts. Such a scenario has no request.
    #[serde(default)]
    pub(crate) configuration_refused: Option<Vec<String>>,
}

/// What a response must be. One that is cut off is never as expected.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ResponseExpectation")]
pub(crate) struct ResponseExpectDocument {
    /// The status.
    #[serde(default)]
    pub(crate) status: Option<u16>,
    /// Fields that must be there, by name.
    #[serde(default)]
    pub(crate) fields: BTreeMap<String, FieldExpectDocument>,
    /// Names of fields that must not be there.
    #[serde(default)]
    pub(crate) absent_fields: Vec<String>,
    /// The whole body.
    #[serde(default)]
    pub(crate) body: Option<Content>,
    /// Members that the body must have as JSON; objects may have more, everything else is equal or it is not.
    #[serde(default)]
    pub(crate) json: Option<Value>,
    /// Trailer fields that must be there, by name.
    #[serde(default)]
    pub(crate) trailers: BTreeMap<String, FieldExpectDocument>,
}

/// What a request must be when it reaches the upstream. One that is cut off is never as expected.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "RequestExpectation")]
pub(crate) struct RequestExpectDocument {
    /// The method.
    #[serde(default)]
    pub(crate) method: Option<String>,
    /// The request target.
    #[serde(default)]
    pub(crate) path: Option<String>,
    /// The authority.
    #[serde(default)]
    pub(crate) authority: Option<String>,
    /// Fields that must be there, by name.
    #[serde(default)]
    pub(crate) fields: BTreeMap<String, FieldExpectDocument>,
    /// Names of fields that must not be there.
    #[serde(default)]
    pub(crate) absent_fields: Vec<String>,
    /// The whole body.
    #[serde(default)]
    pub(crate) body: Option<Content>,
    /// Members that the body must have as JSON; objects may have more, everything else is equal or it is not.
    #[serde(default)]
    pub(crate) json: Option<Value>,
    /// Messages of a gRPC call or stream, without their frames.
    #[serde(default)]
    pub(crate) grpc_messages: Option<Vec<Content>>,
    /// Trailer fields that must be there, by name.
    #[serde(default)]
    pub(crate) trailers: BTreeMap<String, FieldExpectDocument>,
}

#[derive(Debug, Clone)]
pub(crate) enum UpstreamExpectDocument {
    NotCalled,
    Request(Box<RequestExpectDocument>),
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

impl JsonSchema for UpstreamExpectDocument {
    fn schema_name() -> Cow<'static, str> {
        "UpstreamExpectation".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let request = generator.subschema_for::<RequestExpectDocument>();
        json_schema!({ "anyOf": [{ "const": "not_called" }, request] })
    }
}

/// How many calls, or what each must be.
#[derive(Debug, Clone)]
pub(crate) enum CalloutsExpectDocument {
    Count(usize),
    Requests(Vec<RequestExpectDocument>),
}

impl<'de> Deserialize<'de> for CalloutsExpectDocument {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CalloutsVisitor;
        impl<'de> Visitor<'de> for CalloutsVisitor {
            type Value = CalloutsExpectDocument;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("how many calls there must be, or a list of what each must be")
            }

            fn visit_u64<E: serde::de::Error>(self, count: u64) -> Result<Self::Value, E> {
                let count = usize::try_from(count).map_err(|_| E::custom("so many calls nobody counts"))?;
                Ok(CalloutsExpectDocument::Count(count))
            }

            fn visit_i64<E: serde::de::Error>(self, count: i64) -> Result<Self::Value, E> {
                let count = u64::try_from(count).map_err(|_| E::custom("there cannot be less than no call"))?;
                self.visit_u64(count)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut requests = Vec::new();
                while let Some(request) = items.next_element()? {
                    requests.push(request);
                }
                Ok(CalloutsExpectDocument::Requests(requests))
            }
        }
        deserializer.deserialize_any(CalloutsVisitor)
    }
}

impl JsonSchema for CalloutsExpectDocument {
    fn schema_name() -> Cow<'static, str> {
        "CalloutsExpectation".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let request = generator.subschema_for::<RequestExpectDocument>();
        json_schema!({ "anyOf": [{ "type": "integer", "minimum": 0 }, { "type": "array", "items": request }] })
    }
}

/// What a field must hold: one exact line, several lines, or a part of one.
#[derive(Debug, Clone)]
pub(crate) enum FieldExpectDocument {
    Lines(Vec<Content>),
    Contains(String),
    StartsWith(String),
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FieldForm {
    /// One line that contains this.
    contains: Option<String>,
    /// One line that starts with this.
    starts_with: Option<String>,
    /// One line of exactly these bytes.
    base64: Option<String>,
}

impl<'de> Deserialize<'de> for FieldExpectDocument {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
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
                match FieldForm::deserialize(MapAccessDeserializer::new(map))? {
                    FieldForm { contains: Some(text), starts_with: None, base64: None } => {
                        Ok(FieldExpectDocument::Contains(text))
                    }
                    FieldForm { contains: None, starts_with: Some(text), base64: None } => {
                        Ok(FieldExpectDocument::StartsWith(text))
                    }
                    FieldForm { contains: None, starts_with: None, base64: Some(text) } => {
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

impl JsonSchema for FieldExpectDocument {
    fn schema_name() -> Cow<'static, str> {
        "FieldExpectation".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (content, form) = (generator.subschema_for::<Content>(), generator.subschema_for::<FieldForm>());
        json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": content }, form] })
    }
}
