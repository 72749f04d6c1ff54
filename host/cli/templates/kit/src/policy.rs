//! The decision: from a request, to pass or be denied.

use portcullis_kit::config_error::{ConfigErrors, JsonPath};
use portcullis_kit::decision::{Decision, Denial, Forward};
use portcullis_kit::filter::Filter;
use portcullis_kit::host::Host;
use portcullis_kit::request::Request;
use portcullis_kit::rules::is_field_name;
use portcullis_kit::time::UnixTime;

use crate::config::{PolicyConfig, Settings};

/// The filter: what holds for all rules.
#[derive(Debug)]
pub struct {{type}} {
    field: String,
}

/// What holds for the requests of one rule.
#[derive(Debug)]
pub struct Policy {
    allow: Vec<String>,
}

impl Filter for {{type}} {
    const NAME: &'static str = "{{name}}";
    type Settings = Settings;
    type PolicyConfig = PolicyConfig;
    type Policy = Policy;

    fn compile(settings: Settings, errors: &mut ConfigErrors) -> Option<Self> {
        let field = settings.field.to_ascii_lowercase();
        if !is_field_name(&field) {
            let problem = format!("`{field}` is not the name of a field");
            errors.push_with_hint(&JsonPath::default().key("field"), problem, "write one such as `x-client`");
        }
        Some(Self { field })
    }

    fn compile_policy(&self, config: PolicyConfig, at: &JsonPath, errors: &mut ConfigErrors) -> Option<Policy> {
        if config.allow.is_empty() {
            errors.push_with_hint(&at.key("allow"), "the list is empty, so nothing could pass", "name one value");
        }
        Some(Policy { allow: config.allow })
    }

    fn on_request_headers(&self, policy: &Policy, request: &Request<'_>, _: &dyn Host, _: UnixTime) -> Decision {
        let mut values = request.field_values(&self.field);
        // Two values are one too many: the upstream might go by the other one.
        let finding = match (values.next(), values.next()) {
            (Some(value), None) if policy.allow.iter().any(|allowed| allowed.as_bytes() == value) => {
                return Decision::Continue(Forward::default());
            }
            (Some(_), None) => "the value is not allowed",
            (Some(_), Some(_)) => "the field occurs more than once",
            (None, _) => "the field is missing",
        };
        Decision::Deny(Denial::NotPermitted { finding })
    }
}

#[cfg(test)]
mod tests {
    use portcullis_kit::guard::Guard;
    use portcullis_kit::testing::TestHost;

    use super::*;

    /// The status that a request with these values of the field gets, if it does not pass.
    fn denied(values: &[&str]) -> Option<u16> {
        let configuration = br#"{ "field": "X-Client", "default_policy": { "allow": ["orders-app"] } }"#;
        let guard = Guard::<{{type}}>::from_json(configuration).expect("a good configuration");
        let mut lines: Vec<(&[u8], &[u8])> =
            vec![(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"api.example"), (b":path", b"/")];
        lines.extend(values.iter().map(|value| (&b"x-client"[..], value.as_bytes())));
        let now = Some(UnixTime::from_nanoseconds(1_767_225_600_000_000_000));
        let outcome = guard.on_request_headers(Some(&lines), &TestHost::default(), now);
        outcome.response.map(|response| response.status)
    }

    #[test]
    fn a_listed_value_passes() {
        assert_eq!(denied(&["orders-app"]), None);
    }

    #[test]
    fn any_other_value_none_and_two_are_denied() {
        assert_eq!(denied(&["Orders-App"]), Some(403));
        assert_eq!(denied(&[]), Some(403));
        assert_eq!(denied(&["orders-app", "orders-app"]), Some(403));
    }
}
