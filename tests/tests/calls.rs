//! The same calls on every host, answer by answer.

use portcullis_harness::{HostKind, RequestPlan};
use portcullis_tests::calls::Calls;

/// Runs a script on all hosts; the lines must be those in `expected`.
fn check(script: &str, expected: &[&str]) {
    for host in [HostKind::Harness, HostKind::Standalone, HostKind::Envoy] {
        let seen = Calls::start(host, "").and_then(|mut calls| calls.request(RequestPlan::new("GET", "/p?q"), script));
        let seen = seen.unwrap_or_else(|error| panic!("{}: {error}", host.name()));
        assert_eq!(seen, expected, "{}", host.name());
    }
}

#[test]
fn what_is_absent_and_what_is_empty() {
    check(
        r#"
        request_headers: proxy_get_property "request\0path"
        request_headers: proxy_get_property "request\0query"
        request_headers: proxy_get_property "nothing"
        request_headers: proxy_get_property ""
        request_headers: proxy_get_header_map_value 0 "x-none"
        "#,
        &[
            r#"request_headers proxy_get_property "request\0path" -> 0 "/p?q""#,
            r#"request_headers proxy_get_property "request\0query" -> 0 "q""#,
            r#"request_headers proxy_get_property "nothing" -> 1"#,
            r#"request_headers proxy_get_property "" -> 3"#,
            r#"request_headers proxy_get_header_map_value 0 "x-none" -> 1"#,
        ],
    );
}
