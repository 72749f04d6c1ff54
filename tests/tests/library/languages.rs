//! Gates in Go, C++ and AssemblyScript, which bring runtimes, allocators and SDKs of their own.

use std::path::PathBuf;
use std::time::Duration;

use portcullis_harness::{
    CalloutAnswer, Direction, EndOfStream, Filter, Flow, Hold, Host, ResponsePlan, for_every_split,
};
use portcullis_tests::places;

/// The gates, and how each signs what it does.
const GATES: [(&str, &str); 3] = [("go", "go"), ("cpp", "cpp"), ("assemblyscript", "assemblyscript")];

fn module(language: &str) -> PathBuf {
    places::workspace().join("tests/guests").join(language).join("gate.wasm")
}

fn started(host: &Host, language: &str) -> Filter {
    host.load(module(language)).upstream("callee").start().unwrap_or_else(|error| panic!("{language}: {error}"))
}

#[test]
fn a_body_is_read_whole_in_whatever_pieces_it_comes() {
    for (language, by) in GATES {
        let host = Host::new();
        let filter = started(&host, language);
        for_every_split("good", |pieces| {
            let seen = filter.request("POST", "/").field("x-key", "k").body_pieces(pieces).send();
            seen.assert_passed().assert_upstream_body("good").assert_upstream_field("x-read", "4");
            seen.assert_upstream_field("x-checked-by", by).assert_no_upstream_field("x-key");
        });
        for_every_split("an evil one", |pieces| {
            let seen = filter.request("POST", "/").field("x-key", "k").body_pieces(pieces).send();
            seen.assert_local_response(403).assert_body("evil").assert_upstream_not_called();
        });
        host.assert_no_lints();
    }
}

#[test]
fn a_request_waits_for_the_answer_to_a_call_whatever_becomes_of_it() {
    let answers: [(CalloutAnswer, Option<&str>); 5] = [
        (200.into(), None),
        (404.into(), Some("the callee says 404")),
        (CalloutAnswer::Refused, Some("the callee says 503")),
        (CalloutAnswer::Timeout, Some("the callee says 504")),
        (ResponsePlan::new(500).body("broken").into(), Some("the callee says 500")),
    ];
    for (language, _) in GATES {
        for (answer, denied) in answers.clone() {
            let host = Host::new();
            let filter = started(&host, language);
            host.upstream("callee").by_hand();
            let stream = filter.get("/").field("x-key", "ask").begin(EndOfStream::Yes);
            assert_eq!(stream.flow(), Flow::Paused, "{language}");
            assert!(stream.upstream().is_none());
            assert_eq!(host.pending_calls().len(), 1);
            host.answer_call(answer);
            let Some(body) = denied else {
                assert_eq!(stream.flow(), Flow::Continues, "{language}");
                stream.respond(ResponsePlan::new(200)).assert_passed();
                continue;
            };
            assert_eq!(stream.flow(), Flow::Answered, "{language}");
            stream.finish().assert_local_response(403).assert_body(body).assert_upstream_not_called();
        }
    }
}

#[test]
fn what_is_held_of_a_body_shows_phase_by_phase() {
    for (language, _) in GATES {
        let host = Host::new();
        let filter = started(&host, language);
        let mut stream = filter.request("POST", "/").field("x-key", "k").begin(EndOfStream::No);
        assert_eq!(stream.flow(), Flow::Paused, "{language}");
        assert_eq!(stream.send_body("on", EndOfStream::No), Flow::Paused);
        assert_eq!(
            stream.held(Direction::Request),
            Some((0, Hold::Headers)),
            "{language}: the first filter of the chain"
        );
        assert!(stream.upstream().is_none());
        assert_eq!(stream.send_body("e", EndOfStream::Yes), Flow::Continues);
        assert_eq!(stream.upstream().map(|seen| seen.body), Some(b"one".to_vec()), "{language}");
        stream.respond_headers(200, [("x-from", "upstream")], EndOfStream::Yes);
        let seen = stream.finish();
        assert_eq!(seen.field("x-gate"), Some(language));
    }
}

#[test]
fn workers_count_together_in_shared_data() {
    for (language, _) in GATES {
        let host = Host::new();
        let filter = host.load(module(language)).upstream("callee").workers(3).start().expect("to start");
        for worker in [0, 1, 2, 1] {
            filter.on_worker(worker).get("/").send().assert_local_response(401);
        }
        assert_eq!(host.shared_data("", "denied/").as_deref(), Some(&b"4"[..]), "{language}");
    }
}

#[test]
fn ticks_come_until_the_gate_wants_no_more() {
    for (language, _) in GATES {
        let host = Host::new();
        let filter = host.load(module(language)).upstream("callee").configuration("row: a").start().expect("to start");
        let before = host.log().len();
        host.advance(Duration::from_secs(1));
        let ticks = host.log()[before..].iter().filter(|line| line.message.contains("@tick")).count();
        assert_eq!(ticks, 3, "two ticks, and the end of them:\n{language}: {:?}", host.log());
        drop(filter);
    }
}

#[test]
fn a_refusal_is_a_value_with_the_gates_words() {
    for (language, _) in GATES {
        let refused = Host::new().load(module(language)).configuration("refuse").start().err().expect("a refusal");
        assert!(refused.is_refusal() && refused.refusal()[0].contains("was told to refuse"), "{language}: {refused}");
    }
}
