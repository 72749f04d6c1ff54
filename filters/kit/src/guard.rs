//! A configured filter: finds the rule, asks the policy, and says what the proxy is to do.
//!
//! Everything that is the same for all filters happens here and needs no proxy: modes, failure modes, counters, log
//! lines, identity, removal of fields that clients must not send. The adapter only carries out the [`Outcome`].

use serde_json::{Map, Value};

use crate::config_error::{ConfigErrors, JsonPath};
use crate::decision::{Decision, Denial, FieldEdit, Forward, LocalResponse};
use crate::filter::Filter;
use crate::host::Host;
use crate::identity;
use crate::json;
use crate::metrics::Event;
use crate::request::{FieldLine, Request};
use crate::rules::{DEFAULT_RULE, ENVELOPE_KEYS, Envelope, FailureMode, Mode, Rules, Selected};
use crate::time::UnixTime;

/// A filter with its configuration.
#[derive(Debug)]
pub struct Guard<F: Filter> {
    filter: F,
    mode: Mode,
    failure_mode: FailureMode,
    rules: Rules<F::Policy>,
}

/// What the proxy is to do with a request.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome<'a> {
    /// The response to give, if the request ends here. Otherwise it goes on, changed as the other members say.
    pub response: Option<LocalResponse>,
    /// Changes to the field lines, in order.
    pub field_edits: Vec<FieldEdit>,
    /// Properties to set.
    pub properties: Vec<(&'static str, Vec<u8>)>,
    /// What to count.
    pub counter: Option<Counter<'a>>,
    /// What to log.
    pub log: Option<LogLine>,
}

/// A counter to increase by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter<'a> {
    /// The rule's position, which with `event` identifies the counter within one [`Guard`].
    pub rule_index: usize,
    /// The rule's name.
    pub rule: &'a str,
    /// What happened.
    pub event: Event,
}

/// A line for the proxy's log.
#[derive(Debug, PartialEq, Eq)]
pub struct LogLine {
    /// How much it matters.
    pub level: LogLevel,
    /// The line. It contains no credentials.
    pub message: String,
}

/// How much a log line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// What happens every day: a client is denied.
    Info,
    /// What an operator asked to be told: a request passed that was not, or would not be, allowed.
    Warn,
    /// What an operator must put right.
    Error,
}

impl<F: Filter> Guard<F> {
    /// Reads a configuration. All mistakes that can be seen at once are told at once.
    pub fn from_json(text: &[u8]) -> Result<Self, ConfigErrors> {
        let mut errors = ConfigErrors::new(F::NAME);
        let guard = Self::compile(text, &mut errors);
        guard.filter(|_| errors.is_empty()).ok_or(errors)
    }

    fn compile(text: &[u8], errors: &mut ConfigErrors) -> Option<Self> {
        let root = JsonPath::default();
        let mut duplicates = Vec::new();
        let config = match json::parse_noting_duplicates(text, &mut duplicates) {
            Ok(Value::Object(config)) => config,
            Ok(_) => {
                errors.push_with_hint(&root, "the configuration is not a JSON object", "write `{ ... }`");
                return None;
            }
            Err(_) if text.iter().all(u8::is_ascii_whitespace) => {
                errors.push_with_hint(&root, "there is no configuration", "the filter does nothing unless told what");
                return None;
            }
            Err(error) => {
                errors.push(&root, format!("the configuration is not JSON: {error}"));
                return None;
            }
        };
        for path in duplicates {
            errors.push_with_hint(&path, "this key stands here twice", "remove one; readers differ in which they use");
        }
        let (envelope, settings): (Map<_, _>, Map<_, _>) =
            config.into_iter().partition(|(key, _)| ENVELOPE_KEYS.contains(&key.as_str()));
        // Both parts are read before either failure ends this, so that one attempt tells as much as it can.
        let envelope: Option<Envelope<F::PolicyConfig>> = Envelope::read(envelope, errors);
        let settings: Option<F::Settings> = errors.deserialize(Value::Object(settings), &root, ENVELOPE_KEYS);
        let filter = F::compile(settings?, errors)?;
        let envelope = envelope?;
        let (mode, failure_mode) = (envelope.mode, envelope.failure_mode);
        let rules = envelope.compile(errors, |config, at, errors| filter.compile_policy(config, at, errors))?;
        Some(Self { filter, mode, failure_mode, rules })
    }

    /// Decides about the head of a request. `lines` or `now` are `None` if the host could not tell them: a check that
    /// cannot be made denies.
    pub fn on_request_headers(
        &self,
        lines: Option<&[FieldLine<'_>]>,
        host: &dyn Host,
        now: Option<UnixTime>,
    ) -> Outcome<'_> {
        let stripped = identity::strip(lines.unwrap_or_default(), self.filter.written_fields(), host);
        if self.mode == Mode::Off {
            return Outcome { field_edits: stripped, ..Outcome::default() };
        }
        let (rule_index, rule, decision) = match lines.map(|lines| Request::from_field_lines(lines.iter().copied())) {
            None => self.before_rules(Denial::InternalError { finding: "the host gave no readable request head" }),
            Some(Err(finding)) => self.before_rules(Denial::RequestMalformed { finding, challenge: None }),
            Some(Ok(request)) => {
                let Selected { index, name, policy, oddity } = self.rules.select(&request, host);
                let decision = match (oddity, now) {
                    (Some(oddity), _) => {
                        Decision::Deny(Denial::RequestMalformed { finding: oddity.finding(), challenge: None })
                    }
                    (None, None) => {
                        Decision::Deny(Denial::InternalError { finding: "the host does not tell the time" })
                    }
                    (None, Some(now)) => self.filter.on_request_headers(policy, &request, host, now),
                };
                (index, name, decision)
            }
        };
        let count = |event| Some(Counter { rule_index, rule, event });
        let request_id = request_id(lines.unwrap_or_default(), host);
        match decision {
            // What would have been written in `enforce` is not: the upstream sees what it saw before.
            Decision::Continue(_) if self.mode == Mode::Shadow => {
                Outcome { field_edits: stripped, counter: count(Event::Allowed), ..Outcome::default() }
            }
            Decision::Continue(Forward { field_edits, identity, identity_fields }) => {
                let fields = identity.iter().filter(|_| identity_fields).flat_map(identity::Identity::field_edits);
                Outcome {
                    field_edits: stripped.into_iter().chain(fields).chain(field_edits).collect(),
                    properties: identity.map(|identity| identity.properties(host, identity_fields)).unwrap_or_default(),
                    counter: count(Event::Allowed),
                    ..Outcome::default()
                }
            }
            Decision::Deny(denial) => {
                let reason = denial.reason();
                let excused =
                    self.failure_mode == FailureMode::Allow && matches!(denial, Denial::DependencyUnavailable { .. });
                let (level, event, verb) = match (self.mode, excused) {
                    (Mode::Shadow, _) => (LogLevel::Warn, Event::ShadowDenied(reason), "would deny"),
                    (_, true) => (LogLevel::Warn, Event::FailureAllowed(reason), "let pass unchecked"),
                    (_, false) => (LogLevel::Info, Event::Denied(reason), "denied"),
                };
                let passes = matches!(event, Event::ShadowDenied(_) | Event::FailureAllowed(_));
                let id = request_id.as_deref();
                let mut message =
                    format!("{}: {verb}: rule={rule} reason={reason} finding=\"{}\"", F::NAME, denial.finding());
                if let Some(id) = id {
                    message.push_str(" request_id=");
                    message.push_str(id);
                }
                Outcome {
                    response: (!passes).then(|| denial.response(F::NAME, id)),
                    field_edits: if passes { stripped } else { Vec::new() },
                    properties: Vec::new(),
                    counter: count(event),
                    log: Some(LogLine { level, message }),
                }
            }
        }
    }

    fn before_rules(&self, denial: Denial) -> (usize, &'static str, Decision) {
        (usize::MAX, DEFAULT_RULE, Decision::Deny(denial))
    }
}

/// The id under which the proxy's log knows the request. It goes into logs and responses, so only harmless ones count.
fn request_id(lines: &[FieldLine<'_>], host: &dyn Host) -> Option<String> {
    let harmless = |id: &[u8]| {
        let allowed = |b: &u8| b.is_ascii_alphanumeric() || b"-._:".contains(b);
        (1..=128).contains(&id.len()) && id.iter().all(allowed)
    };
    let field = lines.iter().find(|(name, _)| name.eq_ignore_ascii_case(b"x-request-id")).map(|(_, id)| id.to_vec());
    field
        .filter(|id| harmless(id))
        .or_else(|| host.property(&["request", "id"]).filter(|id| harmless(id)))
        .and_then(|id| String::from_utf8(id).ok())
}
