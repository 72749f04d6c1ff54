//! `jwt-auth` in `portcullis serve` and in Envoy: the same module, the same policy, one client on one connection.
//!
//! What is timed is a whole exchange over loopback, the API behind the proxy included, so the difference between two rows
//! says more than either. Both hosts run one worker.

use std::cell::RefCell;
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis_harness::{HostKind, SigningKey};
use portcullis_tests::connection::Connection;
use portcullis_tests::places;
use portcullis_tests::policy::PolicyParts;
use portcullis_tests::server::Server;
use portcullis_tests::upstream::Upstream;
use serde_json::json;

fn read(path: &str) -> String {
    let file = places::workspace().join("filters/jwt-auth").join(path);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn token() -> String {
    let key = SigningKey::from_jwk_set(&read("testdata/keys.json"), "es256-1").expect("a key");
    let header = json!({ "alg": "ES256", "kid": "es256-1", "typ": "at+jwt" });
    // Far in the future: the year 2100.
    let claims = json!({
        "iss": "https://issuer.example", "aud": "orders", "sub": "alice", "scope": "orders:read", "exp": 4_102_444_800u64,
    });
    key.token(&header, &claims).expect("a token")
}

fn bench(criterion: &mut Criterion) {
    let wasm = places::filter("jwt-auth").unwrap_or_else(|error| panic!("{error}"));
    let configuration = read("config/one-issuer.json");
    let origin = Upstream::start().unwrap_or_else(|error| panic!("{error}"));
    let authorization = format!("Bearer {}", token());
    let mut group = criterion.benchmark_group("jwt-auth/end_to_end");
    let mut connect = |name: String, address, authorization: Option<&str>, expected: u16| {
        let connection = RefCell::new(Connection::open(address).unwrap_or_else(|error| panic!("{error}")));
        let ask =
            || connection.borrow_mut().get("/orders/1001", authorization).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(ask(), expected, "{name}");
        group.bench_function(name, |bencher| bencher.iter(|| black_box(ask())));
        origin.take_requests();
    };
    connect("no proxy".to_owned(), origin.address(), None, 200);
    for host in [HostKind::Standalone, HostKind::Envoy] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let policy = PolicyParts {
            filter: "jwt-auth",
            wasm: &wasm,
            configuration: configuration.as_bytes(),
            origin: origin.address(),
            callouts: &[],
            http2: &[],
            failure_policy: None,
        };
        let policy = policy.write(folder.path()).unwrap_or_else(|error| panic!("{error}"));
        let server = Server::start(host, &policy).unwrap_or_else(|error| panic!("{error}"));
        connect(format!("{}, a remembered token", host.name()), server.address(), Some(&authorization), 200);
        connect(format!("{}, no token", host.name()), server.address(), None, 401);
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
