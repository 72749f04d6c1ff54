//! `jwt-auth` as it is deployed: the module, not its parts.

use std::path::PathBuf;
use std::time::Duration;

use portcullis_harness::{EndOfStream, Filter, Flow, Guest, Host, NOW_DEFAULT, SigningKey, for_every_split};
use portcullis_tests::places;
use serde_json::{Value, json};

fn folder() -> PathBuf {
    places::workspace().join("filters/jwt-auth")
}

fn read(path: &str) -> String {
    let file = folder().join(path);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn guest() -> Guest {
    let module = places::filter("jwt-auth").unwrap_or_else(|error| panic!("{error}"));
    Guest::load(module).unwrap_or_else(|error| panic!("{error}"))
}

fn started(host: &Host, configuration: &str) -> Filter {
    host.load(guest()).configuration(configuration).start().unwrap_or_else(|error| panic!("{error}"))
}

/// A token that the configuration `one-issuer.json` takes for another `lifetime`.
fn token(lifetime: u64) -> String {
    let key = SigningKey::from_jwk_set(&read("testdata/keys.json"), "es256-1").expect("the key");
    let header = json!({ "alg": "ES256", "kid": "es256-1", "typ": "at+jwt" });
    let claims = json!({
        "iss": "https://issuer.example", "aud": "orders", "sub": "alice", "exp": NOW_DEFAULT + lifetime,
        "scope": "orders:read orders:write",
    });
    key.token(&header, &claims).expect("a token")
}

/// The configuration, with so many signature checks that a test does not use them up.
fn one_issuer() -> String {
    let mut configuration: Value = serde_json::from_str(&read("config/one-issuer.json")).expect("JSON");
    configuration["signature_checks_per_second"] = 100_000.into();
    configuration.to_string()
}

#[test]
fn the_module_takes_and_refuses_the_configurations_that_its_policy_does() {
    let guest = guest();
    let files = |path: &str| {
        let entries =
            std::fs::read_dir(folder().join(path)).expect("a folder").map(|entry| entry.expect("an entry").path());
        entries.filter(|file| file.extension().is_some_and(|extension| extension == "json")).collect::<Vec<_>>()
    };
    for file in files("config") {
        let configuration = std::fs::read_to_string(&file).expect("a file");
        let started = Host::new().load(guest.clone()).configuration(configuration).start();
        assert!(started.is_ok(), "{}", file.display());
    }
    for file in files("config/bad") {
        let configuration = std::fs::read_to_string(&file).expect("a file");
        let refused = Host::new().load(guest.clone()).configuration(configuration).start().err().expect("a refusal");
        let expected = std::fs::read_to_string(file.with_extension("txt")).expect("the words beside it");
        assert_eq!(refused.refusal().join("\n") + "\n", expected, "{}", file.display());
    }
}

/// One character changed anywhere, and the token opens nothing; nor do its beginnings.
#[test]
fn no_token_passes_but_the_one_that_was_issued() {
    let host = Host::new();
    let filter = started(&host, &one_issuer());
    let good = token(300);
    let send = |token: &str| filter.get("/orders/1").field("authorization", format!("Bearer {token}")).send();
    send(&good).assert_passed();
    for at in 0..good.len() {
        let mut changed = good.clone().into_bytes();
        // Base64url's last bits of a part may be unused, and a decoder that ignored them would take four tokens for one.
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).expect("ASCII");
        send(&changed).assert_local_response(401).assert_upstream_not_called();
        let beginning = &good[..at];
        let seen = send(beginning);
        assert!(matches!(seen.status(), Some(400 | 401)), "{beginning}: {:?}", seen.status());
        seen.assert_upstream_not_called();
    }
    send(&good).assert_passed();
    host.assert_no_lints();
}

#[test]
fn a_token_is_taken_until_it_has_expired_on_every_worker() {
    let host = Host::new();
    let filter = host.load(guest()).configuration(one_issuer()).workers(2).start().expect("to start");
    let token = format!("Bearer {}", token(300));
    let status =
        |worker: usize| filter.on_worker(worker).get("/orders/1").field("authorization", &token).send().status();
    assert_eq!((status(0), status(1)), (Some(200), Some(200)));
    // The clocks of issuer and proxy may differ by a minute.
    host.advance(Duration::from_secs(300 + 59));
    assert_eq!((status(0), status(1)), (Some(200), Some(200)));
    host.advance(Duration::from_secs(2));
    assert_eq!((status(0), status(1)), (Some(401), Some(401)));
}

#[test]
fn a_body_passes_piece_by_piece_once_the_head_has() {
    let host = Host::new();
    let filter = started(&host, &one_issuer());
    let good = format!("Bearer {}", token(300));
    for_every_split("{\"n\":1}", |pieces| {
        let seen = filter.request("POST", "/orders").field("authorization", &good).body_pieces(pieces).send();
        seen.assert_passed().assert_upstream_body("{\"n\":1}").assert_no_upstream_field("authorization");
    });
    let mut stream = filter.request("POST", "/orders").field("authorization", &good).begin(EndOfStream::No);
    assert_eq!(stream.send_body("piece", EndOfStream::No), Flow::Continues);
    assert_eq!(stream.upstream().map(|seen| seen.body), Some(b"piece".to_vec()));
    stream.disconnect();
    let stream = filter.request("POST", "/orders").begin(EndOfStream::No);
    assert_eq!(stream.flow(), Flow::Answered, "no body is waited for");
    stream.finish().assert_local_response(401).assert_upstream_not_called();
}

/// Neither in a trace that a failure prints, nor in the log, nor in what the upstream sees.
#[test]
fn a_token_is_shown_to_nobody() {
    let host = Host::new();
    let filter = started(&host, &one_issuer());
    let good = token(300);
    let bad = good.chars().rev().collect::<String>();
    for token in [&good, &bad] {
        let seen = filter.get("/orders/1").field("authorization", format!("Bearer {token}")).send();
        let upstream = format!("{:?}", seen.upstream);
        let log = format!("{:?}", host.log());
        let trace = seen.trace.to_string();
        assert!(trace.contains("proxy_get_header_map_pairs"), "{trace}");
        for part in token.split('.') {
            for (place, text) in [("upstream", &upstream), ("log", &log), ("trace", &trace)] {
                assert!(!text.contains(part), "`{part}` stands in the {place}:\n{text}");
            }
        }
    }
}

/// What the filter tells the next one stays with the request, and what a client makes up does not.
#[test]
fn two_in_a_chain_ask_for_the_same_token() {
    let host = Host::new();
    let first = host.load(guest()).name("first").configuration(one_issuer());
    let second = host.load(guest()).name("second").configuration(one_issuer());
    let filter = first.then(second).start().expect("to start");
    // The first takes the token away, as it is told to.
    let seen = filter.get("/orders/1").field("authorization", format!("Bearer {}", token(300))).send();
    seen.assert_local_response(401).assert_upstream_not_called();
    let seen = filter.get("/healthz").field("x-portcullis-sub", "root").send();
    seen.assert_passed().assert_no_upstream_field("x-portcullis-sub");
}
