//! `jwt-auth` as a guest: starting an instance, and one request through it, without any socket.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis_harness::{Guest, Host, NOW_DEFAULT, RequestPlan, ResponsePlan, SigningKey};
use portcullis_tests::places;
use serde_json::json;

fn read(path: &str) -> String {
    let file = places::workspace().join("filters/jwt-auth").join(path);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn bench(criterion: &mut Criterion) {
    let module = places::filter("jwt-auth").unwrap_or_else(|error| panic!("{error}"));
    let guest = Guest::load(&module).unwrap_or_else(|error| panic!("{error}"));
    let configuration = read("config/one-issuer.json");
    let start = || {
        let filter = Host::new().without_trace().load(&guest).configuration(configuration.as_str()).start();
        filter.unwrap_or_else(|error| panic!("{error}"))
    };

    let mut group = criterion.benchmark_group("jwt-auth/abi");
    group.bench_function("start an instance", |bencher| bencher.iter(|| black_box(start())));

    let key = SigningKey::from_jwk_set(&read("testdata/keys.json"), "es256-1").expect("a key");
    let header = json!({ "alg": "ES256", "kid": "es256-1", "typ": "at+jwt" });
    let claims = json!({
        "iss": "https://issuer.example", "aud": "orders", "sub": "alice", "scope": "orders:read", "exp": NOW_DEFAULT + 3600,
    });
    let token = key.token(&header, &claims).expect("a token");
    let mut good = RequestPlan::new("GET", "/orders/1001");
    good.fields.push("authorization", format!("Bearer {token}"));
    let response = ResponsePlan::default();

    let filter = start();
    assert_eq!(filter.exchange(&good, &response).status(), Some(200));
    group.bench_function("a remembered token", |bencher| bencher.iter(|| black_box(filter.exchange(&good, &response))));

    let denied = RequestPlan::new("GET", "/orders/1001");
    assert_eq!(filter.exchange(&denied, &response).status(), Some(401));
    group.bench_function("no token", |bencher| bencher.iter(|| black_box(filter.exchange(&denied, &response))));
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
