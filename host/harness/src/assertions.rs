//! What a test says about an outcome. A failure shows what was expected, what happened, and the way there.

use std::fmt;

use crate::expectation::{
    Expectation, FieldExpectation, Origin, RequestExpectation, ResponseExpectation, UpstreamExpectation, describe,
};
use crate::message::Observed;

/// Everything there is to know: the response, what reached the upstream, calls, counters, the log, and the trace.
impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&describe(self))
    }
}

impl Observed {
    /// Fails unless this is what was expected.
    #[track_caller]
    pub fn assert(&self, expected: &Expectation) -> &Observed {
        let mismatches = expected.compare(self);
        if !mismatches.is_empty() {
            let mismatches: Vec<String> = mismatches.iter().map(ToString::to_string).collect();
            panic!("{}\nwhat happened:\n{self}", mismatches.join("\n"));
        }
        self
    }

    /// Fails unless the client got a response with this status.
    #[track_caller]
    pub fn assert_status(&self, status: u16) -> &Observed {
        let response = Some(ResponseExpectation { status: Some(status), ..ResponseExpectation::default() });
        self.assert(&Expectation { response, ..Expectation::default() })
    }

    /// Fails unless the filter, or the host in its place, answered with this status, and the upstream was not asked.
    #[track_caller]
    pub fn assert_local_response(&self, status: u16) -> &Observed {
        let response = Some(ResponseExpectation { status: Some(status), ..ResponseExpectation::default() });
        self.assert(&Expectation { response, origin: Origin::Local, ..Expectation::default() })
    }

    /// Fails unless the upstream was asked once, and its answer reached the client.
    #[track_caller]
    pub fn assert_passed(&self) -> &Observed {
        self.assert(&Expectation {
            response: Some(ResponseExpectation::default()),
            origin: Origin::Upstream,
            upstream: Some(UpstreamExpectation::Request(Box::default())),
            ..Expectation::default()
        })
    }

    /// Fails unless the connection was closed without a response.
    #[track_caller]
    pub fn assert_closed(&self) -> &Observed {
        self.assert(&Expectation { closed: true, ..Expectation::default() })
    }

    /// Fails if anything reached the upstream.
    #[track_caller]
    pub fn assert_upstream_not_called(&self) -> &Observed {
        self.assert(&Expectation { upstream: Some(UpstreamExpectation::NotCalled), ..Expectation::default() })
    }

    /// Fails unless the upstream got this field with exactly this value, once.
    #[track_caller]
    pub fn assert_upstream_field(&self, name: &str, value: impl AsRef<[u8]>) -> &Observed {
        let fields = one_field(name, value.as_ref());
        self.assert_upstream(RequestExpectation { fields, ..RequestExpectation::default() })
    }

    /// Fails unless the upstream was asked, without this field.
    #[track_caller]
    pub fn assert_no_upstream_field(&self, name: &str) -> &Observed {
        let absent_fields = vec![name.to_ascii_lowercase()];
        self.assert_upstream(RequestExpectation { absent_fields, ..RequestExpectation::default() })
    }

    /// Fails unless the upstream got exactly this body.
    #[track_caller]
    pub fn assert_upstream_body(&self, body: impl AsRef<[u8]>) -> &Observed {
        let body = Some(body.as_ref().to_vec());
        self.assert_upstream(RequestExpectation { body, ..RequestExpectation::default() })
    }

    #[track_caller]
    fn assert_upstream(&self, request: RequestExpectation) -> &Observed {
        self.assert(&Expectation {
            upstream: Some(UpstreamExpectation::Request(Box::new(request))),
            ..Expectation::default()
        })
    }

    /// Fails unless the client got this field with exactly this value, once.
    #[track_caller]
    pub fn assert_field(&self, name: &str, value: impl AsRef<[u8]>) -> &Observed {
        let fields = one_field(name, value.as_ref());
        self.assert_response(ResponseExpectation { fields, ..ResponseExpectation::default() })
    }

    /// Fails unless the client got a response without this field.
    #[track_caller]
    pub fn assert_no_field(&self, name: &str) -> &Observed {
        let absent_fields = vec![name.to_ascii_lowercase()];
        self.assert_response(ResponseExpectation { absent_fields, ..ResponseExpectation::default() })
    }

    /// Fails unless the client got exactly this body.
    #[track_caller]
    pub fn assert_body(&self, body: impl AsRef<[u8]>) -> &Observed {
        let body = Some(body.as_ref().to_vec());
        self.assert_response(ResponseExpectation { body, ..ResponseExpectation::default() })
    }

    /// Fails unless the client got a JSON body that has these members.
    #[track_caller]
    pub fn assert_json(&self, json: serde_json::Value) -> &Observed {
        self.assert_response(ResponseExpectation { json: Some(json), ..ResponseExpectation::default() })
    }

    #[track_caller]
    fn assert_response(&self, response: ResponseExpectation) -> &Observed {
        self.assert(&Expectation { response: Some(response), ..Expectation::default() })
    }

    /// Fails unless a counter changed by exactly this much.
    #[track_caller]
    pub fn assert_counter(&self, name: &str, change: i64) -> &Observed {
        self.assert(&Expectation { counters: [(name.to_owned(), change)].into(), ..Expectation::default() })
    }

    /// Fails unless some line of the log contains this text.
    #[track_caller]
    pub fn assert_logged(&self, text: &str) -> &Observed {
        let found = self.log.iter().any(|line| line.message.contains(text));
        assert!(found, "log: expected a line that contains `{text}`, got none\nwhat happened:\n{self}");
        self
    }
}

fn one_field(name: &str, value: &[u8]) -> std::collections::BTreeMap<String, FieldExpectation> {
    [(name.to_ascii_lowercase(), FieldExpectation::Lines(vec![value.to_vec()]))].into()
}
