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
                let id = request_id(lines.unwrap_or_default(), host);
                let mut message =
                    format!("{}: {verb}: rule={rule} reason={reason} finding=\"{}\"", F::NAME, denial.finding());
                if let Some(id) = &id {
                    message.push_str(" request_id=");
                    message.push_str(id);
                }
                Outcome {
                    response: (!passes).then(|| denial.response(F::NAME, id.as_deref())),
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

#[cfg(test)]
mod tests {
    use schemars::JsonSchema;
    use serde::Deserialize;
    use serde_json::json;

    use super::*;
    use crate::decision::Challenge;
    use crate::identity::Identity;
    use crate::testing::TestHost;

    /// Does to a request what its `do` field says.
    #[derive(Debug)]
    struct Demo {
        written_fields: Vec<String>,
    }

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        writes: String,
    }

    impl Filter for Demo {
        const NAME: &'static str = "de-mo";
        type Settings = Settings;
        type PolicyConfig = u32;
        type Policy = u32;

        fn compile(settings: Settings, errors: &mut ConfigErrors) -> Option<Self> {
            if settings.writes.is_empty() {
                errors.push(&JsonPath::default().key("writes"), "this is empty");
            }
            Some(Self { written_fields: vec![settings.writes] })
        }

        fn compile_policy(&self, config: u32, _: &JsonPath, _: &mut ConfigErrors) -> Option<u32> {
            Some(config)
        }

        fn written_fields(&self) -> &[String] {
            &self.written_fields
        }

        fn on_request_headers(&self, _: &u32, request: &Request<'_>, _: &dyn Host, _: UnixTime) -> Decision {
            match request.field_values("do").next() {
                Some(b"deny") => Decision::Deny(Denial::CredentialsRejected {
                    finding: "it says so",
                    challenge: Challenge::Bearer { realm: None },
                }),
                Some(b"depend") => {
                    Decision::Deny(Denial::DependencyUnavailable { finding: "nobody answers", retry_after_seconds: 1 })
                }
                Some(b"overload") => Decision::Deny(Denial::Overloaded { finding: "too much", retry_after_seconds: 1 }),
                Some(b"tell") => Decision::Continue(Forward {
                    field_edits: vec![FieldEdit::Set("x-demo".into(), b"1".to_vec())],
                    identity: Some(Identity { sub: Some("alice".into()), method: "demo", ..Identity::default() }),
                    identity_fields: true,
                }),
                _ => Decision::Continue(Forward::default()),
            }
        }
    }

    fn guard(more: &Value) -> Guard<Demo> {
        let mut config = json!({
            "writes": "x-demo",
            "rules": [{"name": "r", "match": {"path": {"prefix": "/r"}}, "policy": 1}],
            "default_policy": 0,
        });
        config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        Guard::from_json(config.to_string().as_bytes()).expect("a good configuration")
    }

    fn outcome<'a>(guard: &'a Guard<Demo>, path: &str, fields: &[FieldLine<'_>]) -> Outcome<'a> {
        let mut lines: Vec<FieldLine<'_>> = vec![(b":method", b"GET"), (b":path", path.as_bytes())];
        lines.extend_from_slice(fields);
        guard.on_request_headers(Some(&lines), &TestHost::default(), Some(UnixTime::from_seconds(1)))
    }

    fn counted(outcome: &Outcome<'_>) -> Option<(String, Event)> {
        outcome.counter.map(|counter| (counter.rule.to_owned(), counter.event))
    }

    fn status(outcome: &Outcome<'_>) -> Option<u16> {
        outcome.response.as_ref().map(|response| response.status)
    }

    fn logged<'a>(outcome: &'a Outcome<'_>) -> Option<(LogLevel, &'a str)> {
        outcome.log.as_ref().map(|line| (line.level, line.message.as_str()))
    }

    #[test]
    fn a_denial_becomes_a_response_a_count_and_a_log_line() {
        let guard = guard(&json!({}));
        let outcome = outcome(&guard, "/r/1", &[(b"do", b"deny"), (b"X-Request-Id", b"id-1"), (b"x-demo", b"forged")]);
        assert_eq!(status(&outcome), Some(401));
        let body = &outcome.response.as_ref().expect("a response").body;
        assert!(String::from_utf8_lossy(body).contains("\"request_id\":\"id-1\""));
        assert_eq!(counted(&outcome), Some(("r".into(), Event::Denied("credentials_rejected"))));
        let line = "de-mo: denied: rule=r reason=credentials_rejected finding=\"it says so\" request_id=id-1";
        assert_eq!(logged(&outcome), Some((LogLevel::Info, line)));
        assert_eq!(outcome.field_edits, []);
    }

    #[test]
    fn an_identity_is_written_after_what_the_client_wrote_is_removed() {
        let guard = guard(&json!({}));
        let forged: [FieldLine<'_>; 3] = [(b"do", b"tell"), (b"x-portcullis-sub", b"root"), (b"x_demo", b"forged")];
        let outcome = outcome(&guard, "/", &forged);
        assert_eq!(status(&outcome), None);
        let at = |edit: &FieldEdit| outcome.field_edits.iter().position(|other| other == edit);
        let removed = at(&FieldEdit::Remove("x-portcullis-sub".into()));
        let written = at(&FieldEdit::Set("x-portcullis-sub".into(), b"alice".to_vec()));
        assert!(removed.is_some() && removed < written, "{:?}", outcome.field_edits);
        assert!(at(&FieldEdit::Remove("x_demo".into())) < at(&FieldEdit::Set("x-demo".into(), b"1".to_vec())));
        assert!(outcome.properties.contains(&("portcullis.identity.sub", b"alice".to_vec())));
        assert_eq!(counted(&outcome), Some(("default".into(), Event::Allowed)));
    }

    #[test]
    fn shadow_denies_nothing_and_writes_nothing_but_counts_and_logs() {
        let guard = guard(&json!({"mode": "shadow"}));
        let denied = outcome(&guard, "/r", &[(b"do", b"deny"), (b"x-portcullis-sub", b"root")]);
        assert_eq!(status(&denied), None);
        assert_eq!(denied.field_edits, [FieldEdit::Remove("x-portcullis-sub".into())]);
        assert_eq!(counted(&denied), Some(("r".into(), Event::ShadowDenied("credentials_rejected"))));
        let line = "de-mo: would deny: rule=r reason=credentials_rejected finding=\"it says so\"";
        assert_eq!(logged(&denied), Some((LogLevel::Warn, line)));
        let told = outcome(&guard, "/r", &[(b"do", b"tell")]);
        assert_eq!((told.field_edits.len(), told.properties.len()), (0, 0));
        assert_eq!(counted(&told), Some(("r".into(), Event::Allowed)));
    }

    #[test]
    fn off_decides_nothing_and_still_removes_forged_fields() {
        let guard = guard(&json!({"mode": "off"}));
        let outcome = outcome(&guard, "/..%2f", &[(b"do", b"deny"), (b"x-portcullis-sub", b"root"), (b"x-demo", b"1")]);
        let removed = ["x-portcullis-sub", "x-demo"].map(|name| FieldEdit::Remove(name.into()));
        assert_eq!(outcome, Outcome { field_edits: removed.to_vec(), ..Outcome::default() });
    }

    #[test]
    fn failure_mode_excuses_dependencies_and_nothing_else() {
        let (strict, lenient) = (guard(&json!({})), guard(&json!({"failure_mode": "allow"})));
        assert_eq!(status(&outcome(&strict, "/", &[(b"do", b"depend")])), Some(503));
        let excused = outcome(&lenient, "/", &[(b"do", b"depend")]);
        assert_eq!(status(&excused), None);
        assert_eq!(counted(&excused), Some(("default".into(), Event::FailureAllowed("dependency_unavailable"))));
        let line = "de-mo: let pass unchecked: rule=default reason=dependency_unavailable finding=\"nobody answers\"";
        assert_eq!(logged(&excused), Some((LogLevel::Warn, line)));
        assert_eq!(status(&outcome(&lenient, "/", &[(b"do", b"deny")])), Some(401));
        assert_eq!(status(&outcome(&lenient, "/", &[(b"do", b"overload")])), Some(503));
    }

    #[test]
    fn an_ambiguous_path_is_refused_whatever_the_filter_thinks() {
        let guard = guard(&json!({}));
        for path in ["/r/%2e%2e/x", "/r//x", "/r;x", "/r\\x", "/r/%00", "/r/%zz", "/r#x"] {
            let outcome = outcome(&guard, path, &[]);
            assert_eq!(status(&outcome), Some(400), "{path}");
            assert_eq!(counted(&outcome).map(|(_, event)| event), Some(Event::Denied("request_malformed")), "{path}");
        }
        assert_eq!(
            counted(&outcome(&guard, "nowhere", &[])),
            Some(("default".into(), Event::Denied("request_malformed")))
        );
    }

    #[test]
    fn what_the_host_cannot_tell_denies() {
        let guard = guard(&json!({}));
        let now = Some(UnixTime::from_seconds(1));
        let lines: [FieldLine<'_>; 2] = [(b":method", b"GET"), (b":path", b"/")];
        let host = TestHost::default();
        assert_eq!(status(&guard.on_request_headers(None, &host, now)), Some(500));
        assert_eq!(status(&guard.on_request_headers(Some(&lines), &host, None)), Some(500));
        assert_eq!(status(&guard.on_request_headers(Some(&[]), &host, now)), Some(400));
        assert_eq!(status(&guard.on_request_headers(Some(&lines), &host, now)), None);
    }

    #[test]
    fn a_request_id_that_could_do_harm_is_not_repeated() {
        let id = |field: &[u8], property: &[u8]| {
            let host = TestHost::default().with_property(&["request", "id"], property);
            request_id(&[(b"x-request-id", field)], &host)
        };
        assert_eq!(id(b"id-1", b"id-2").as_deref(), Some("id-1"));
        for harmful in [&b""[..], b"a b", b"a\"b", b"a\nb", b"\xff", &[b'a'; 129]] {
            assert_eq!(id(harmful, b"id-2").as_deref(), Some("id-2"));
            assert_eq!(id(harmful, harmful), None);
        }
        assert_eq!(request_id(&[], &TestHost::default()), None);
    }

    #[track_caller]
    fn refused(config: &str, expected: &str) {
        let errors = Guard::<Demo>::from_json(config.as_bytes()).expect_err("a bad configuration");
        assert_eq!(errors.to_string(), expected);
    }

    #[test]
    fn a_configuration_that_is_none_is_refused() {
        refused("", "de-mo: there is no configuration\n  hint: the filter does nothing unless told what");
        refused(" \n", "de-mo: there is no configuration\n  hint: the filter does nothing unless told what");
        refused("[]", "de-mo: the configuration is not a JSON object\n  hint: write `{ ... }`");
        refused("{\n  \"a\": 1,\n}", "de-mo: the configuration is not JSON: trailing comma at line 3 column 1");
    }

    #[test]
    fn both_parts_of_a_configuration_tell_their_mistakes_at_once() {
        refused(
            r#"{"mod": "shadow", "writes": 5, "default_policy": 0, "rules": [{"name": "r", "match": {}, "policy": "x"}]}"#,
            "de-mo: rules[0].policy: expected u32, found string\n\
             de-mo: mod: unknown key `mod`\n  hint: did you mean `mode`?",
        );
        refused(
            r#"{"writes": "a", "writes": "b", "default_policy": 0, "rules": [{"name": "r", "match": {}, "policy": 1, "policy": 2}]}"#,
            "de-mo: writes: this key stands here twice\n  hint: remove one; readers differ in which they use\n\
             de-mo: rules[0].policy: this key stands here twice\n  hint: remove one; readers differ in which they use",
        );
        refused(
            r#"{"writes": "", "rules": []}"#,
            "de-mo: `default_policy` is missing\n  hint: say what holds where no rule fits; there is no silent default\n\
             de-mo: writes: this is empty",
        );
    }

    #[test]
    fn the_schema_holds_the_envelope_and_the_filters_own_keys() {
        let schema = crate::schema::schema_of::<Demo>();
        for key in ["mode", "failure_mode", "rules", "default_policy", "writes"] {
            assert!(schema["properties"].get(key).is_some(), "{key}");
        }
        assert_eq!(schema["additionalProperties"], json!(false));
        assert_eq!(schema["required"], json!(["default_policy", "writes"]));
    }
}
