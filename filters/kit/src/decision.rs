//! What a policy decides, and the one table from a denial to the response that a client gets.

use std::borrow::Cow;
use std::rc::Rc;

use serde::Serialize;

use crate::identity::Identity;

/// What a policy decides about a request.
#[derive(Debug, PartialEq)]
pub enum Decision {
    /// The request goes on.
    Continue(Forward),
    /// The request ends here.
    Deny(Denial),
}

/// How a request that goes on differs from what the client sent.
#[derive(Debug, Default, PartialEq)]
pub struct Forward {
    /// Changes to the field lines, in order.
    pub field_edits: Vec<FieldEdit>,
    /// Who the client is, if the filter has established that.
    pub identity: Option<Identity>,
    /// Whether the identity is written as `x-portcullis-*` fields too.
    pub identity_fields: bool,
}

/// A change to the request's field lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldEdit {
    /// All field lines of this name go.
    Remove(Cow<'static, str>),
    /// One field line of this name stands, with this value, instead of any before.
    Set(Cow<'static, str>, Vec<u8>),
}

/// Why a request ends here, grouped by who must act.
///
/// A finding is for the log. It is a constant of ours, so nothing that a client sent can reach a log line through it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    // The client.
    /// The request is not what its syntax demands, or two readers could read it differently.
    RequestMalformed {
        /// What is malformed.
        finding: &'static str,
        /// The challenge to answer with, if it is the credentials' syntax that is wrong.
        challenge: Option<Challenge>,
    },
    /// Credentials are needed and there are none.
    CredentialsMissing {
        /// What to authenticate with.
        challenge: Challenge,
    },
    /// The credentials are not accepted. The client does not learn why.
    CredentialsRejected {
        /// Why.
        finding: &'static str,
        /// What to authenticate with.
        challenge: Challenge,
    },
    /// The credentials are good but do not carry the scopes that are needed (RFC 6750, section 3.1).
    ScopeInsufficient {
        /// The scopes that are needed, separated by spaces.
        required: Rc<str>,
        /// What to authenticate with.
        challenge: Challenge,
    },
    /// The client is known and may not do this.
    NotPermitted {
        /// Why.
        finding: &'static str,
    },
    /// The client has used up what it may use.
    LimitExceeded {
        /// What is used up.
        finding: &'static str,
        /// When to try again.
        retry_after_seconds: u32,
    },
    // The operator of the system.
    /// Something the check depends on does not answer. `failure_mode: allow` lets such a request pass.
    DependencyUnavailable {
        /// What does not answer.
        finding: &'static str,
        /// When to try again.
        retry_after_seconds: u32,
    },
    /// The check would cost more than the proxy can spend on it now. Never excused: an attacker can bring it about.
    Overloaded {
        /// What there is too much of.
        finding: &'static str,
        /// When to try again.
        retry_after_seconds: u32,
    },
    // Us.
    /// Something happened that must not.
    InternalError {
        /// What.
        finding: &'static str,
    },
}

/// One row of the table. The reason's counters take their names from it, so no denial is without one.
struct Row {
    /// The stable id: in the response, the metric, the response code details and the log.
    reason: &'static str,
    status: u16,
    title: &'static str,
    finding: &'static str,
    www_authenticate: Option<String>,
    retry_after_seconds: Option<u32>,
}

impl Denial {
    /// The stable id of the reason: in the response, the metric, the response code details and the log.
    pub fn reason(&self) -> &'static str {
        self.row().reason
    }

    /// What the log says beyond the reason. The client never sees it.
    pub fn finding(&self) -> &'static str {
        self.row().finding
    }

    /// The table. A response never says more about a denial than its row does.
    fn row(&self) -> Row {
        let row = |reason, status, title, finding| Row {
            reason,
            status,
            title,
            finding,
            www_authenticate: None,
            retry_after_seconds: None,
        };
        match self {
            Self::RequestMalformed { finding, challenge } => Row {
                www_authenticate: challenge
                    .as_ref()
                    .map(|challenge| challenge.field_value(Some("invalid_request"), None)),
                ..row("request_malformed", 400, "The request is malformed.", finding)
            },
            Self::CredentialsMissing { challenge } => Row {
                // No error code where no credentials were sent (RFC 6750, section 3.1).
                www_authenticate: Some(challenge.field_value(None, None)),
                ..row("credentials_missing", 401, "Credentials are needed.", "there are no credentials")
            },
            Self::CredentialsRejected { finding, challenge } => Row {
                www_authenticate: Some(challenge.field_value(Some("invalid_token"), None)),
                ..row("credentials_rejected", 401, "The credentials are not accepted.", finding)
            },
            Self::ScopeInsufficient { required, challenge } => Row {
                www_authenticate: Some(challenge.field_value(Some("insufficient_scope"), Some(required))),
                ..row("scope_insufficient", 403, "The credentials lack a scope.", "a required scope is missing")
            },
            Self::NotPermitted { finding } => row("not_permitted", 403, "This is not permitted.", finding),
            Self::LimitExceeded { finding, retry_after_seconds } => Row {
                retry_after_seconds: Some(*retry_after_seconds),
                ..row("limit_exceeded", 429, "A limit is exceeded.", finding)
            },
            Self::DependencyUnavailable { finding, retry_after_seconds } => Row {
                retry_after_seconds: Some(*retry_after_seconds),
                ..row("dependency_unavailable", 503, "The request cannot be checked now.", finding)
            },
            Self::Overloaded { finding, retry_after_seconds } => Row {
                retry_after_seconds: Some(*retry_after_seconds),
                ..row("overloaded", 503, "There are too many requests to check.", finding)
            },
            Self::InternalError { finding } => row("internal_error", 500, "The request could not be checked.", finding),
        }
    }

    /// The response to a request denied by `filter`.
    pub fn response(&self, filter: &str, request_id: Option<&str>) -> LocalResponse {
        let Row { reason, status, title, finding: _, www_authenticate, retry_after_seconds } = self.row();
        let problem = Problem { kind: format!("urn:portcullis:problem:{reason}"), title, status, reason, request_id };
        let mut fields = vec![
            ("content-type", "application/problem+json".to_owned()),
            // A cache must not keep one client's denial for another.
            ("cache-control", "no-store".to_owned()),
        ];
        fields.extend(www_authenticate.map(|value| ("www-authenticate", value)));
        fields.extend(retry_after_seconds.map(|seconds| ("retry-after", seconds.to_string())));
        LocalResponse {
            status,
            fields,
            // Strings and a number always serialise; without a body the status would still say enough.
            body: serde_json::to_vec(&problem).unwrap_or_default(),
            details: format!("portcullis.{}.{reason}", filter.replace('-', "_")),
        }
    }
}

/// A problem document (RFC 9457). It says nothing that its reader did not know, but for the reason's id.
#[derive(Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    status: u16,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
}

/// A response that the proxy itself gives.
#[derive(Debug, PartialEq, Eq)]
pub struct LocalResponse {
    /// The status code.
    pub status: u16,
    /// The field lines.
    pub fields: Vec<(&'static str, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// What the proxy's access log shows as response code details.
    pub details: String,
}

/// What a client is told to authenticate with (RFC 9110, section 11.6.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// A bearer token (RFC 6750).
    Bearer {
        /// The protection space, if the configuration names one: printable ASCII without `"` and `\`.
        realm: Option<Rc<str>>,
    },
}

impl Challenge {
    fn field_value(&self, error: Option<&str>, scope: Option<&str>) -> String {
        let Self::Bearer { realm } = self;
        let parameters: Vec<String> = [("realm", realm.as_deref()), ("error", error), ("scope", scope)]
            .into_iter()
            .filter_map(|(name, value)| Some(format!("{name}=\"{}\"", value?)))
            .collect();
        if parameters.is_empty() { "Bearer".to_owned() } else { format!("Bearer {}", parameters.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(denial: &Denial, status: u16, fields: &[(&'static str, &str)], body: &str) {
        let response = denial.response("jwt-auth", Some("r-1"));
        let expected: Vec<(&str, String)> =
            [("content-type", "application/problem+json"), ("cache-control", "no-store")]
                .iter()
                .chain(fields)
                .map(|(name, value)| (*name, (*value).to_owned()))
                .collect();
        assert_eq!((response.status, response.fields), (status, expected));
        assert_eq!(String::from_utf8(response.body).as_deref(), Ok(body));
        assert_eq!(response.details, format!("portcullis.jwt_auth.{}", denial.reason()));
    }

    fn bearer() -> Challenge {
        Challenge::Bearer { realm: None }
    }

    #[test]
    fn each_denial_has_its_response_and_no_response_tells_a_finding() {
        let finding = "SECRET";
        check(
            &Denial::RequestMalformed { finding, challenge: None },
            400,
            &[],
            r#"{"type":"urn:portcullis:problem:request_malformed","title":"The request is malformed.","status":400,"reason":"request_malformed","request_id":"r-1"}"#,
        );
        check(
            &Denial::RequestMalformed { finding, challenge: Some(bearer()) },
            400,
            &[("www-authenticate", r#"Bearer error="invalid_request""#)],
            r#"{"type":"urn:portcullis:problem:request_malformed","title":"The request is malformed.","status":400,"reason":"request_malformed","request_id":"r-1"}"#,
        );
        check(
            &Denial::CredentialsMissing { challenge: bearer() },
            401,
            &[("www-authenticate", "Bearer")],
            r#"{"type":"urn:portcullis:problem:credentials_missing","title":"Credentials are needed.","status":401,"reason":"credentials_missing","request_id":"r-1"}"#,
        );
        check(
            &Denial::CredentialsRejected { finding, challenge: bearer() },
            401,
            &[("www-authenticate", r#"Bearer error="invalid_token""#)],
            r#"{"type":"urn:portcullis:problem:credentials_rejected","title":"The credentials are not accepted.","status":401,"reason":"credentials_rejected","request_id":"r-1"}"#,
        );
        let challenge = Challenge::Bearer { realm: Some("orders".into()) };
        check(
            &Denial::ScopeInsufficient { required: "orders:read orders:write".into(), challenge },
            403,
            &[(
                "www-authenticate",
                r#"Bearer realm="orders", error="insufficient_scope", scope="orders:read orders:write""#,
            )],
            r#"{"type":"urn:portcullis:problem:scope_insufficient","title":"The credentials lack a scope.","status":403,"reason":"scope_insufficient","request_id":"r-1"}"#,
        );
        check(
            &Denial::NotPermitted { finding },
            403,
            &[],
            r#"{"type":"urn:portcullis:problem:not_permitted","title":"This is not permitted.","status":403,"reason":"not_permitted","request_id":"r-1"}"#,
        );
        check(
            &Denial::LimitExceeded { finding, retry_after_seconds: 7 },
            429,
            &[("retry-after", "7")],
            r#"{"type":"urn:portcullis:problem:limit_exceeded","title":"A limit is exceeded.","status":429,"reason":"limit_exceeded","request_id":"r-1"}"#,
        );
        check(
            &Denial::DependencyUnavailable { finding, retry_after_seconds: 5 },
            503,
            &[("retry-after", "5")],
            r#"{"type":"urn:portcullis:problem:dependency_unavailable","title":"The request cannot be checked now.","status":503,"reason":"dependency_unavailable","request_id":"r-1"}"#,
        );
        check(
            &Denial::Overloaded { finding, retry_after_seconds: 1 },
            503,
            &[("retry-after", "1")],
            r#"{"type":"urn:portcullis:problem:overloaded","title":"There are too many requests to check.","status":503,"reason":"overloaded","request_id":"r-1"}"#,
        );
        check(
            &Denial::InternalError { finding },
            500,
            &[],
            r#"{"type":"urn:portcullis:problem:internal_error","title":"The request could not be checked.","status":500,"reason":"internal_error","request_id":"r-1"}"#,
        );
    }

    #[test]
    fn a_request_without_an_id_gets_a_problem_without_one() {
        let body = Denial::InternalError { finding: "" }.response("x", None).body;
        assert!(!String::from_utf8(body).expect("UTF-8").contains("request_id"));
    }
}
