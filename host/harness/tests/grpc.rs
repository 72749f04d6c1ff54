//! gRPC calls and streams on the simulated host, against a guest written for it (`grpc.wat`).

use std::time::Duration;

use portcullis_harness::{
    Callout, CalloutAnswer, EndOfStream, Filter, Flow, GrpcPlan, Guest, Host, Observed, Replies, ResponsePlan, Stream,
};

fn filter() -> Filter {
    let wasm = wat::parse_str(include_str!("grpc.wat")).unwrap();
    Host::new().load(Guest::from_bytes("grpc", &wasm).unwrap()).upstream("auth").start().unwrap()
}

fn call(filter: &Filter) -> Observed {
    filter.get("/").send()
}

fn stream(filter: &Filter) -> Observed {
    filter.get("/").field("x-stream", "1").send()
}

/// What the guest was told.
fn told(seen: &Observed) -> Vec<&str> {
    seen.log.iter().map(|line| line.message.as_str()).collect()
}

#[test]
fn a_call_is_answered_by_the_script() {
    let filter = filter();
    let auth = filter.host().upstream("auth");
    auth.answers([
        Callout::once(GrpcPlan::messages(["granted"])).path("/svc/Talk"),
        Callout::once(GrpcPlan::failed(7, "no")),
        Callout::once(CalloutAnswer::Refused),
        Callout::once(CalloutAnswer::Reset),
        Callout::once(ResponsePlan::new(404)),
    ]);
    let seen = call(&filter);
    seen.assert_local_response(200);
    assert_eq!(told(&seen), ["granted"]);
    let [request] = auth.requests().try_into().unwrap();
    assert_eq!((request.path.as_str(), request.authority.as_str()), ("/svc/Talk", "auth"));
    assert_eq!((request.grpc_messages(), request.complete), (vec![b"hello".to_vec()], true));
    for status in [507, 514, 513, 512] {
        call(&filter).assert_local_response(status);
    }
    call(&filter).assert_local_response(512);
    assert_eq!(auth.requests().len(), 6, "what the script does not know is answered with 404 too");
}

#[test]
fn a_call_that_nobody_answers_times_out_on_the_scripted_clock() {
    let filter = filter();
    let auth = filter.host().upstream("auth");
    auth.always(CalloutAnswer::Timeout);
    let before = filter.host().elapsed();
    call(&filter).assert_local_response(514);
    assert_eq!(filter.host().elapsed() - before, Duration::from_secs(1), "the call's own deadline");
    let late = |millis| [Callout::always(GrpcPlan::messages(["late"])).delay(Duration::from_millis(millis))];
    auth.answers(late(1001));
    call(&filter).assert_local_response(514);
    auth.answers(late(1000));
    call(&filter).assert_local_response(200);
}

#[test]
fn messages_of_a_stream_follow_those_that_come() {
    let filter = filter();
    let plan = GrpcPlan::messages(["last", "after"]).replies(Replies::PerMessage);
    let auth = filter.host().upstream("auth");
    auth.always(plan);
    let seen = stream(&filter);
    seen.assert_local_response(200);
    assert_eq!(told(&seen), ["last", "after"]);
    let [request] = auth.requests().try_into().unwrap();
    assert_eq!(request.grpc_messages(), [&b"hello"[..], b""]);
    assert!(request.complete);
}

#[test]
fn a_stream_waits_to_be_answered_by_hand_and_ends_with_its_request() {
    let filter = filter();
    let host = filter.host();
    let begin = || -> Stream { filter.get("/").field("x-stream", "1").begin(EndOfStream::Yes) };
    let held = begin();
    assert_eq!(held.flow(), Flow::Paused);
    let [waiting] = host.pending_calls().try_into().unwrap();
    assert_eq!((waiting.upstream.as_str(), waiting.timeout), ("auth", None));
    assert_eq!(waiting.request.grpc_messages(), [b"hello"]);
    host.answer_call_to("auth", GrpcPlan::failed(7, ""));
    held.finish().assert_local_response(507);
    assert_eq!(host.pending_calls(), []);

    let held = begin();
    // Answered, and not at its end yet: it waits for the guest's.
    host.answer_call(GrpcPlan::messages(["other"]).replies(Replies::PerMessage));
    assert_eq!(held.flow(), Flow::Paused);
    drop(held);
    assert_eq!(host.pending_calls(), [], "the exchange is cancelled with the request");
}
