//! The filter that reads what strangers send: its configuration, and tokens.

use std::cell::OnceCell;

use portcullis_jwt_auth::JwtAuth;
use portcullis_kit::guard::Guard;
use portcullis_kit::request::FieldLine;
use portcullis_kit::testing::TestHost;
use portcullis_kit::time::UnixTime;

use super::filters::{compile, configurations, folder};
use super::outcome;
use crate::Target;

const NOW: u64 = 1_767_225_600;

fn read(name: &str) -> Vec<u8> {
    let file = folder("jwt-auth").join("config").join(name);
    std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Any bytes are a configuration or a list of errors, each of which says where it is and what is wrong.
pub(super) const CONFIGURATION: Target = Target {
    name: "jwt-auth-configuration",
    about: "the configuration of jwt-auth",
    run: compile::<JwtAuth>,
    seeds: || configurations("jwt-auth"),
    words: &[
        b"\"",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"null",
        b"true",
        b"-1",
        b"1e999",
        b"\"\"",
        b"[]",
        b"{}",
        b"\"issuers\"",
        b"\"algorithms\"",
        b"\"keys\"",
        b"\"kty\"",
        b"\"n\"",
        b"\"e\"",
        b"\"x\"",
        b"\"y\"",
        b"\"crv\"",
        b"\"RS256\"",
        b"\"ES256\"",
        b"\"HS256\"",
        b"\\u0000",
    ],
};

thread_local! {
    static GUARD: OnceCell<Guard<JwtAuth>> = const { OnceCell::new() };
}

/// No token but one with a signature of the configured keys passes, and none brings the filter down.
pub(super) const TOKENS: Target = Target {
    name: "jwt-auth-tokens",
    about: "the authorization field of a request, as jwt-auth reads it",
    run: |input| {
        GUARD.with(|guard| {
            let guard = guard.get_or_init(|| {
                let mut configuration: serde_json::Value =
                    serde_json::from_slice(&read("one-issuer.json")).expect("a configuration");
                configuration["signature_checks_per_second"] = 100_000.into();
                Guard::from_json(configuration.to_string().as_bytes()).expect("a configuration that is accepted")
            });
            // Lines are divided by line feeds, which no field value holds.
            let values: Vec<&[u8]> = input.split(|byte| *byte == b'\n').take(4).collect();
            let mut lines: Vec<FieldLine<'_>> = vec![
                (b":authority", b"api.example.com"),
                (b":path", b"/orders/1"),
                (b":method", b"GET"),
                (b":scheme", b"http"),
            ];
            lines.extend(values.iter().map(|value| (&b"authorization"[..], *value)));
            let decided =
                guard.on_request_headers(Some(&lines), &TestHost::default(), Some(UnixTime::from_seconds(NOW)));
            let response = decided.response.as_ref().expect("no token here carries a signature");
            outcome((response.status, format!("{:?}", decided.log).len()))
        })
    },
    seeds: || {
        [
            "Bearer eyJhbGciOiJub25lIn0.e30.",
            "Bearer eyJhbGciOiJFUzI1NiIsImtpZCI6ImVzMjU2LTEiLCJ0eXAiOiJhdCtqd3QifQ.eyJpc3MiOiJodHRwczovL2lzc3Vlci5leGFtcGxlIn0.AAAA",
            "bearer  a.b.c\nBearer d.e.f",
            "Basic dXNlcjpwYXNz",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
    },
    words: &[b"Bearer ", b".", b"eyJ", b"e30", b"eyJhbGciOiJSUzI1NiJ9", b"=", b"-_", b"\n", b",", b"AAAA"],
};
