//! The decision of `jwt-auth`, native: what a check costs without any proxy around it.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis_harness::SigningKey;
use portcullis_jwt_auth::JwtAuth;
use portcullis_kit::guard::Guard;
use portcullis_kit::request::FieldLine;
use portcullis_kit::testing::TestHost;
use portcullis_kit::time::UnixTime;
use portcullis_tests::places;
use serde_json::{Value, json};

const NOW: u64 = 1_767_225_600;

fn read(path: &str) -> String {
    let file = places::workspace().join("filters/jwt-auth").join(path);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// `entries` tokens are remembered; with 0 every request costs a signature check.
fn guard(entries: u32) -> Guard<JwtAuth> {
    let mut configuration: Value = serde_json::from_str(&read("config/one-issuer.json")).expect("JSON");
    configuration["token_cache"] = json!({ "entries": entries });
    configuration["signature_checks_per_second"] = json!(100_000);
    Guard::from_json(configuration.to_string().as_bytes()).expect("a configuration that is accepted")
}

fn authorization(kid: &str, algorithm: &str) -> String {
    let key = SigningKey::from_jwk_set(&read("testdata/keys.json"), kid).expect("a key");
    let header = json!({ "alg": algorithm, "kid": kid, "typ": "at+jwt" });
    let claims = json!({
        "iss": "https://issuer.example", "aud": "orders", "sub": "alice", "scope": "orders:read", "exp": NOW + 100_000_000,
    });
    format!("Bearer {}", key.token(&header, &claims).expect("a token"))
}

fn lines(authorization: Option<&str>) -> Vec<FieldLine<'_>> {
    let mut lines: Vec<FieldLine<'_>> = vec![
        (b":authority", b"api.example.com"),
        (b":path", b"/orders/1001"),
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b"user-agent", b"bench"),
        (b"accept", b"*/*"),
        (b"x-request-id", b"00000000-0000-4000-8000-000000000001"),
    ];
    lines.extend(authorization.map(|value| (&b"authorization"[..], value.as_bytes())));
    lines
}

fn bench(criterion: &mut Criterion) {
    let host = TestHost::default();
    let mut group = criterion.benchmark_group("jwt-auth/policy");
    let mut case = |name: &str, guard: &Guard<JwtAuth>, authorization: Option<&str>, denied: bool| {
        let lines = lines(authorization);
        let mut seconds = NOW;
        let first = guard.on_request_headers(Some(&lines), &host, Some(UnixTime::from_seconds(seconds)));
        assert_eq!(first.response.is_some(), denied, "{name}: {:?}", first.log);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                // A second for each request, so that the bound on signature checks per second is never reached.
                seconds += 1;
                black_box(guard.on_request_headers(Some(&lines), &host, Some(UnixTime::from_seconds(seconds))))
            });
        });
    };
    case("no token", &guard(0), None, true);
    case("junk", &guard(0), Some("Bearer junk"), true);
    for (kid, algorithm) in [("rsa-1", "RS256"), ("es256-1", "ES256"), ("ed25519-1", "EdDSA")] {
        case(&format!("{algorithm}, checked"), &guard(0), Some(&authorization(kid, algorithm)), false);
    }
    let token = authorization("es256-1", "ES256");
    let remembered = lines(Some(&token));
    let guard = guard(1000);
    group.bench_function("ES256, remembered", |bencher| {
        let now = Some(UnixTime::from_seconds(NOW));
        bencher.iter(|| black_box(guard.on_request_headers(Some(&remembered), &host, now)));
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
