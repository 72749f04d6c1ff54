//! The simulated host, against a guest written for it (`guest.wat`), and scenario files run against the same guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use portcullis_harness::{
    Callout, CalloutAnswer, ClosedBy, Direction, EndOfStream, Filter, Flow, Guest, HarnessError, Hold, Host,
    PluginState, RequestPlan, ResponsePlan, RunOptions, Secrets, Simulated, TraceEvent, Verdict, for_every_split, run,
};
use serde_json::json;

fn guest() -> Guest {
    let wasm = wat::parse_str(include_str!("guest.wat")).unwrap();
    Guest::from_bytes("guest", &wasm).unwrap()
}

/// A host with the guest in it, which may call the upstream `keys`.
fn filter() -> Filter {
    Host::new().load(guest()).upstream("keys").start().unwrap()
}

// ---- whole exchanges

#[test]
fn passes_a_request_and_its_answer() {
    let seen = filter().request("POST", "/a?b=c").field("x-one", "1").body("first").body("second").send();
    seen.assert_passed().assert_status(200).assert_body("ok").assert_field("content-length", "2");
    seen.assert_upstream_field("x-seen", "1").assert_upstream_body("firstsecond");
    assert_eq!(seen.local, Some(false));
    let [request] = seen.upstream.as_slice() else { panic!("{seen}") };
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/a?b=c"));
    assert_eq!(request.authority, "api.example.com");
    assert!(request.complete);
}

#[test]
fn a_denial_reaches_the_client_and_not_the_upstream() {
    let filter = filter();
    for _ in 0..2 {
        let seen = filter.get("/").field("x-deny", "1").send();
        seen.assert_local_response(403).assert_body("no").assert_upstream_not_called().assert_counter("denied", 1);
        assert_eq!(seen.local, Some(true));
        assert_eq!(seen.details.as_deref(), Some("test.denied"));
    }
    assert_eq!(filter.host().counter("denied"), 2);
}

#[test]
fn trailers_pass_in_both_directions() {
    let answer = ResponsePlan::new(200).body("ok").trailer("x-sum", "2");
    let seen = filter().request("POST", "/").body("a").trailer("x-sum", "1").upstream_response(answer).send();
    assert_eq!(seen.upstream[0].trailers.get("x-sum"), Some(&b"1"[..]));
    assert_eq!(seen.response.as_ref().unwrap().trailers.get("x-sum"), Some(&b"2"[..]));
}

#[test]
fn a_held_body_reaches_the_upstream_as_one_however_it_was_split() {
    let filter = filter();
    let mut ways = 0;
    for_every_split("12345", |pieces| {
        ways += 1;
        let seen = filter.request("POST", "/").field("x-body", "1").body_pieces(pieces).send();
        seen.assert_passed().assert_upstream_body("12345");
    });
    assert_eq!(ways, 16);
}

#[test]
fn time_jumps_to_the_next_tick_when_nothing_else_is_left() {
    assert_eq!(filter().get("/").field("x-wait", "1").send().status(), Some(200));
}

#[test]
fn a_request_that_is_held_for_ever_is_given_up() {
    let filter = filter();
    let before = filter.host().now();
    let seen = filter.get("/").field("x-hold", "1").send();
    seen.assert_closed().assert_upstream_not_called().assert_logged("the filter holds the stream");
    assert!((59..=60).contains(&(filter.host().now() - before)));
    assert_eq!(filter.get("/").send().status(), Some(200), "the next request is served");
}

#[test]
fn a_head_request_gets_no_body() {
    let seen = filter().exchange(&RequestPlan::new("HEAD", "/"), &ResponsePlan::default());
    seen.assert_status(200).assert_body("");
}

// ---- phase by phase

#[test]
fn what_is_held_and_what_has_passed_shows_after_every_phase() {
    let filter = filter();
    let mut stream = filter.request("POST", "/").field("x-body", "1").begin(EndOfStream::No);
    assert_eq!(stream.flow(), Flow::Paused, "{stream}");
    assert_eq!(stream.held(Direction::Request), Some((0, Hold::Headers)));
    assert_eq!(stream.send_body("one, ", EndOfStream::No), Flow::Paused);
    assert!(stream.upstream().is_none(), "{stream}");
    assert_eq!(stream.send_body("two", EndOfStream::Yes), Flow::Continues);
    assert_eq!(stream.held(Direction::Request), None);
    let request = stream.upstream().unwrap();
    assert_eq!((request.body.as_slice(), request.complete), (&b"one, two"[..], true));

    assert_eq!(stream.respond_headers(200, [("x-late", "1")], EndOfStream::No), Flow::Paused);
    assert_eq!(stream.response(), None);
    assert_eq!(stream.respond_body("answer", EndOfStream::Yes), Flow::Continues);
    let seen = stream.finish();
    seen.assert_passed().assert_body("answer");
}

#[test]
fn a_body_passes_piece_by_piece_where_nothing_holds_it() {
    let mut stream = filter().request("POST", "/").begin(EndOfStream::No);
    assert_eq!(stream.send_body("a", EndOfStream::No), Flow::Continues);
    assert_eq!(stream.upstream().unwrap().body, b"a");
    assert_eq!(stream.send_trailers([("x-sum", "1")]), Flow::Continues);
    let request = stream.upstream().unwrap();
    assert!(request.complete && request.trailers.get("x-sum").is_some());
    stream.respond(ResponsePlan::new(204)).assert_status(204);
}

#[test]
fn a_denied_stream_says_that_it_was_answered() {
    let stream = filter().get("/").field("x-deny", "1").begin(EndOfStream::Yes);
    assert_eq!(stream.flow(), Flow::Answered);
    assert_eq!(stream.response().unwrap().status, 403);
    stream.finish().assert_local_response(403);
}

#[test]
fn a_client_that_goes_away_leaves_nothing_behind() {
    let filter = filter();
    let stream = filter.get("/").field("x-ask", "1").begin(EndOfStream::Yes);
    assert_eq!(filter.host().pending_calls().len(), 1);
    stream.disconnect().assert_closed();
    assert_eq!(filter.host().pending_calls(), [], "the call is cancelled");
    // Dropping a stream ends it as well: contexts do not pile up.
    drop(filter.get("/").begin(EndOfStream::Yes));
    let ended = filter.host().trace().names().iter().filter(|name| **name == "proxy_on_context_create").count();
    assert_eq!(ended, 3, "a root and two streams");
}

#[test]
#[should_panic(expected = "the request has ended")]
fn a_body_after_the_end_is_a_mistake_of_the_test() {
    filter().get("/").begin(EndOfStream::Yes).send_body("x", EndOfStream::Yes);
}

#[test]
#[should_panic(expected = "the upstream cannot answer: it has not seen the request, which is Paused")]
fn an_upstream_answers_only_what_it_has_seen() {
    filter().get("/").field("x-hold", "1").begin(EndOfStream::Yes).respond(ResponsePlan::default());
}

// ---- callouts

#[test]
fn callouts_are_answered_as_scripted() {
    let filter = filter();
    let keys = filter.host().upstream("keys");
    keys.always(ResponsePlan::default());
    let seen = filter.get("/").field("x-ask", "1").send();
    assert_eq!(seen.status(), Some(200));
    assert_eq!(seen.callouts["keys"].len(), 1);
    assert_eq!(seen.callouts["keys"][0].path, "/keys");

    for failure in [CalloutAnswer::Refused, CalloutAnswer::Reset, 503.into()] {
        keys.always(failure);
        filter.get("/").field("x-ask", "1").send().assert_local_response(503);
    }
    assert_eq!(keys.requests().len(), 4);
}

#[test]
fn calls_wait_to_be_answered_by_hand() {
    let filter = filter();
    let host = filter.host();
    let stream = filter.get("/").field("x-ask", "1").begin(EndOfStream::Yes);
    assert_eq!(stream.flow(), Flow::Paused);
    let [call] = host.pending_calls().try_into().unwrap();
    assert_eq!((call.upstream.as_str(), call.request.path.as_str()), ("keys", "/keys"));
    assert_eq!(call.timeout, Some(Duration::from_secs(1)));
    host.advance(Duration::from_millis(999));
    assert_eq!(stream.flow(), Flow::Paused, "the deadline is not there yet");
    let answered = host.answer_call_to("keys", 200);
    assert_eq!(answered, call);
    assert_eq!(stream.flow(), Flow::Continues, "{stream}");
}

#[test]
#[should_panic(expected = "no call waits for an answer")]
fn there_is_nothing_to_answer_without_a_call() {
    filter().host().answer_call(200);
}

#[test]
fn a_callout_nobody_answers_times_out_on_the_scripted_clock() {
    let filter = filter();
    filter.host().upstream("keys").always(CalloutAnswer::Timeout);
    let before = filter.host().now();
    filter.get("/").field("x-ask", "1").send().assert_local_response(503);
    assert_eq!(filter.host().now() - before, 1, "the call's own deadline is a second");
}

#[test]
fn a_late_answer_comes_when_it_is_due_and_one_after_the_deadline_never() {
    let filter = filter();
    let keys = filter.host().upstream("keys");
    keys.answers([Callout::always(200).delay(Duration::from_millis(400))]);
    let stream = filter.get("/").field("x-ask", "1").begin(EndOfStream::Yes);
    filter.host().advance(Duration::from_millis(399));
    assert_eq!(stream.flow(), Flow::Paused);
    filter.host().advance(Duration::from_millis(1));
    assert_eq!(stream.flow(), Flow::Continues);
    drop(stream);

    keys.answers([Callout::always(200).delay(Duration::from_millis(1001))]);
    filter.get("/").field("x-ask", "1").send().assert_local_response(503);
}

#[test]
fn a_call_that_the_script_does_not_know_finds_nothing() {
    let filter = filter();
    filter.host().upstream("keys").answers([Callout::always(200).path("/other")]);
    filter.get("/").field("x-ask", "1").send().assert_local_response(503);
}

#[test]
fn answers_can_run_out() {
    let filter = filter();
    filter.host().upstream("keys").answers([Callout::once(200), Callout::always(CalloutAnswer::Refused)]);
    assert_eq!(filter.get("/").field("x-ask", "1").send().status(), Some(200));
    assert_eq!(filter.get("/").field("x-ask", "1").send().status(), Some(503));
}

// ---- TCP

#[test]
fn tcp_bytes_pass_as_far_as_the_filter_lets_them() {
    let wasm = wat::parse_str(include_str!("tcp.wat")).unwrap();
    let filter = Host::new().load(Guest::from_bytes("tcp", &wasm).unwrap()).start().unwrap();
    for_every_split("hello", |pieces| {
        let mut connection = filter.connect();
        assert!(connection.is_connected());
        for piece in pieces {
            connection.send(piece, EndOfStream::No);
        }
        assert!(connection.upstream_received().len() >= 4, "{connection}");
        connection.send("", EndOfStream::Yes).upstream_sends("bye", EndOfStream::Yes);
        let seen = connection.close(ClosedBy::Local);
        assert_eq!((seen.upstream.as_slice(), seen.client.as_slice()), (&b"hello"[..], &b"bye"[..]), "{seen}");
        assert!(seen.upstream_ended && seen.client_ended && seen.closed.is_none(), "{seen}");
    });
    let mut connection = filter.connect();
    connection.send("ab", EndOfStream::No);
    assert_eq!(connection.upstream_received(), b"", "held until there are four");
    drop(connection);
    let mut connection = filter.connect();
    connection.send("X", EndOfStream::No);
    assert!(connection.is_closed() && connection.upstream_received().is_empty(), "{connection}");
}

// ---- time, sharing, properties

#[test]
fn the_clock_moves_only_when_told() {
    let host = Host::new().at(1000);
    let filter = host.load(guest()).start().unwrap();
    filter.get("/").send();
    assert_eq!(host.now(), 1000);
    host.advance(Duration::from_secs(90));
    assert_eq!((host.now(), host.elapsed()), (1090, Duration::from_secs(90)));
}

#[test]
fn ticks_come_one_by_one() {
    let filter = filter();
    let stream = filter.get("/").field("x-wait", "1").begin(EndOfStream::Yes);
    assert_eq!(stream.flow(), Flow::Paused);
    assert!(filter.host().tick());
    assert_eq!(stream.flow(), Flow::Continues);
    assert_eq!(filter.host().elapsed(), Duration::from_millis(300));
    assert!(!Host::new().tick(), "nobody has asked for ticks");
}

#[test]
fn workers_share_data_and_queues() {
    let host = Host::new();
    let filter = host.load(guest()).vm_id("shared").workers(2).start().unwrap();
    host.hold_queues();
    let seen = filter.on_worker(1).get("/").field("x-share", "1").send();
    seen.assert_passed();
    assert_eq!(seen.properties["mark"], b"1");
    assert_eq!(host.shared_data("shared", "k").as_deref(), Some(&b"v"[..]));
    assert_eq!(host.all_shared_data("shared"), [(b"k".to_vec(), b"v".to_vec())].into());
    assert_eq!(host.shared_data("other", "k"), None);
    assert_eq!(host.queue("shared", "q"), Some(vec![b"item".to_vec()]));
    assert_eq!(host.counter("queued"), 0, "nobody was told yet");
    assert!(host.deliver_queues());
    assert_eq!((host.counter("queued"), host.queue("shared", "q")), (1, Some(Vec::new())));
    assert_eq!(host.queue("shared", "other"), None);
}

#[test]
fn an_item_from_elsewhere_is_delivered_at_once_unless_it_is_held() {
    let filter = filter();
    filter.host().enqueue("", "q", "one");
    assert_eq!(filter.host().counter("queued"), 1);
    filter.host().set_shared_data("", "k", "from elsewhere");
    assert_eq!(filter.host().shared_data("", "k").as_deref(), Some(&b"from elsewhere"[..]));
}

#[test]
fn a_filter_reads_the_properties_it_is_given() {
    let seen = filter().get("/").field("x-weather", "1").property(&["weather"], "rain").send();
    seen.assert_upstream_field("x-forecast", "rain");
    filter().get("/").field("x-weather", "1").send().assert_no_upstream_field("x-forecast");
}

#[test]
fn filters_in_a_chain_see_the_request_in_order() {
    let host = Host::new();
    let second = host.load(guest()).name("second");
    let chain = host.load(guest()).name("first").then(second).start().unwrap();
    assert_eq!(chain.names(), ["first", "second"]);
    let seen = chain.get("/").send();
    assert_eq!(seen.upstream[0].fields.get_all("x-seen").count(), 2, "each adds one");
    let stream = chain.request("POST", "/").field("x-body", "1").begin(EndOfStream::No);
    assert_eq!(stream.held(Direction::Request), Some((0, Hold::Headers)), "the first holds it back from the second");
}

// ---- configuration, failures, messages

#[test]
fn a_refused_configuration_is_a_value_with_the_guests_words() {
    let error = Host::new().load(guest()).configuration("bad").start().err().unwrap();
    assert!(error.is_refusal());
    assert_eq!(error.refusal(), ["no"]);
    let text = error.to_string();
    assert!(text.contains("filter `guest`") && text.contains("no"), "{text}");
    assert!(Host::new().load(guest()).configuration(json!({ "good": true })).start().is_ok());
}

#[test]
fn a_file_that_is_no_filter_is_named() {
    let error = Guest::load("nowhere/x.wasm").err().unwrap().to_string();
    assert_eq!(
        error,
        "nowhere/x.wasm: cannot be read: there is no such file\n  hint: build it first: `cargo wasm` in a folder that \
         `portcullis new` made, `cargo xtask build-filters` in a checkout of Portcullis, else `cargo build --release --target \
         wasm32-wasip1`"
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.wasm");
    std::fs::write(&file, "(module)").unwrap();
    let error = Guest::load(&file).err().unwrap().to_string();
    assert!(
        error.contains("no WebAssembly module: it does not begin with `\\0asm`\n  hint: name the `.wasm` file"),
        "{error}"
    );
    // The parser's own words, on one line.
    std::fs::write(&file, b"\0asm\x09\0\0\0").unwrap();
    let error = Guest::load(&file).err().unwrap().to_string();
    assert!(error.contains("not a WebAssembly module this host can run: ") && error.lines().count() == 2, "{error}");
    std::fs::write(&file, wat::parse_str("(module)").unwrap()).unwrap();
    let error = Host::new().load(&file).start().err().unwrap();
    assert!(matches!(error, HarnessError::Module { .. }));
    let error = error.to_string();
    assert!(error.starts_with(&file.display().to_string()) && error.contains("proxy_abi_version"), "{error}");
}

#[test]
fn a_guest_that_is_too_large_says_so_instead_of_running() {
    let error = Host::new().load(guest()).limits(|limits| limits.memory_bytes_max = 1024).start().err().unwrap();
    assert!(!error.is_refusal());
    assert!(error.to_string().contains("`limits.memory`"), "{error}");
}

#[test]
fn health_tells_whether_a_filter_runs() {
    let filter = filter();
    assert_eq!(filter.health()[0].state, PluginState::Running);
}

#[test]
fn a_failed_assertion_shows_what_happened_and_the_way_there() {
    let seen = filter().get("/").field("authorization", "Bearer s3cret").field("x-deny", "1").send();
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| seen.assert_status(200))).unwrap_err();
    let text = panic.downcast_ref::<String>().unwrap();
    assert!(text.starts_with("response.status: expected 200, got 403\nwhat happened:\nresponse: 403\n"), "{text}");
    for part in [
        "upstream: not called",
        "guest #2  proxy_on_request_headers(context: 2, fields: 8, end_of_stream: true)",
        "    proxy_get_header_map_value(map: request headers, name: \"x-deny\") -> value: \"1\"",
        "    proxy_send_local_response(status: 403, details: \"test.denied\", body: \"no\", fields: [], grpc_status: -1)",
        "  = StopIteration",
    ] {
        assert!(text.contains(part), "no `{part}` in:\n{text}");
    }
    assert!(!text.contains("s3cret"), "{text}");
}

#[test]
fn a_trace_can_be_read_by_machines_and_left_out() {
    let filter = filter();
    filter.get("/").send();
    let trace = filter.host().trace();
    assert_eq!(trace.calls_of("proxy_add_header_map_value"), 1);
    assert!(
        trace.events().iter().any(|event| matches!(event, TraceEvent::Returned { callback: "proxy_on_configure", .. }))
    );
    let events = trace.with_secrets(Secrets::Shown).to_json();
    assert!(events.as_array().unwrap().iter().any(|event| event["callback"] == "proxy_on_request_headers"));

    let quiet = Host::new().without_trace().load(guest()).start().unwrap();
    quiet.get("/").send().assert_passed();
    assert!(quiet.host().trace().is_empty());
}

#[test]
fn what_works_here_and_fails_in_envoy_is_noted_once() {
    let filter = filter();
    for _ in 0..2 {
        assert_eq!(filter.get("/").field("x-lint", "1").send().status(), Some(200));
    }
    let lints = filter.host().lints();
    let [lint] = lints.as_slice() else { panic!("{lints:?}") };
    assert!(lint.starts_with("proxy_get_header_map_value in proxy_on_response_headers: "), "{lint}");
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| filter.host().assert_no_lints())).is_err());
}

#[test]
fn tests_in_parallel_do_not_meet() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let filter = filter();
                for denied in 1..=50 {
                    filter.get("/").field("x-deny", "1").send().assert_local_response(403);
                    assert_eq!(filter.host().counter("denied"), denied);
                }
            });
        }
    });
}

#[test]
fn a_filter_ends_when_it_is_shut_down() {
    let host = Host::new();
    host.load(guest()).start().unwrap().shutdown();
    assert!(!host.tick(), "no timer is left");
}

// ---- scenario files

#[test]
fn a_report_ends_with_the_warnings() {
    let folder = Folder::new();
    folder.scenario(
        "a.yaml",
        "name: a\nrequest: { path: /, fields: [[x-lint, '1']] }\nexpect: { response: { status: 200 } }\n",
    );
    let report = folder.run(None);
    assert!(report.is_success(), "{report}");
    let filter = &report.outcomes[0].filter;
    let warning = format!("warning: {filter}: proxy_get_header_map_value in proxy_on_response_headers: ");
    assert!(report.to_string().contains(&warning), "{report}");
}

/// Scenario files beside a built module, as a filter author has them.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("guest.wasm"), wat::parse_str(include_str!("guest.wat")).unwrap()).unwrap();
        std::fs::create_dir(folder.path().join("scenarios")).unwrap();
        Folder(folder)
    }

    fn scenario(&self, file: &str, text: &str) -> PathBuf {
        let path = self.0.path().join("scenarios").join(file);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn run(&self, only: Option<&str>) -> portcullis_harness::Report {
        let options = RunOptions {
            wasm: Some(self.path().join("guest.wasm")),
            only: only.map(str::to_owned),
            ..RunOptions::default()
        };
        run(&[self.path().to_owned()], &options, &mut Simulated::default(), &mut |_| {})
    }
}

#[test]
fn runs_scenario_files_and_reports() {
    let folder = Folder::new();
    folder.scenario(
        "a.yaml",
        "name: a marked request is refused\nrequest: { path: /, fields: [[x-deny, '1']] }\n\
         expect: { local_response: { status: 403, body: 'no' }, counters: { denied: 1 } }\n",
    );
    let failing = folder.scenario(
        "b.yaml",
        "name: a plain request is refused\nrequest: { path: / }\nexpect: { local_response: { status: 403 } }\n",
    );
    folder.scenario(
        "c.yaml",
        "name: three letters are refused\nconfig_inline: 100\nexpect: { configuration_refused: ['no'] }\n",
    );
    folder.scenario(
        "d.yaml",
        "name: only elsewhere\nhosts: [envoy]\nrequest: { path: / }\nexpect: { response: { status: 200 } }\n",
    );
    let report = folder.run(None);
    assert_eq!((report.passed(), report.failed()), (2, 1), "{report}");
    assert!(!report.is_success());
    assert_eq!(report.outcomes[3].verdict, Verdict::Elsewhere);
    let text = report.to_string();
    let filter = folder.path().file_name().unwrap().to_string_lossy().into_owned();
    assert!(
        text.starts_with(&format!(
            "ok      harness::{filter}  a marked request is refused\nFAILED  harness::{filter}  "
        )),
        "{text}"
    );
    assert!(text.contains(&format!("        {}\n", failing.display())), "{text}");
    assert!(text.contains("        local_response.status: expected 403, got 200\n"), "{text}");
    assert!(text.contains("        upstream: expected not called, got called with `GET /`\n"), "{text}");
    assert!(text.ends_with("\n2 passed, 1 failed, 1 for other hosts\n"), "{text}");

    let one = folder.run(Some("marked"));
    assert_eq!((one.outcomes.len(), one.passed()), (1, 1));
    assert!(one.is_success());
}

#[test]
fn a_broken_file_fails_and_the_others_run() {
    let folder = Folder::new();
    folder.scenario("a.yaml", "name: a\nrequst: { path: / }\n");
    folder.scenario("b.yaml", "name: b\nrequest: { path: / }\nexpect: { response: { status: 200 } }\n");
    let report = folder.run(None);
    assert_eq!((report.passed(), report.failed()), (1, 1));
    assert!(report.to_string().contains("a.yaml:2:1: unknown key `requst`"), "{report}");
}

#[test]
fn a_run_without_scenarios_fails() {
    let folder = Folder::new();
    let report = folder.run(None);
    assert!(!report.is_success());
    assert!(report.to_string().contains("no scenario here"), "{report}");
    folder.scenario("a.yaml", "name: a\nrequest: { path: / }\nexpect: { response: { status: 200 } }\n");
    let report = folder.run(Some("zebra"));
    assert!(!report.is_success());
    assert!(report.to_string().contains("no scenario's name or file contains `zebra`"), "{report}");
}

#[test]
fn a_filter_that_is_not_built_is_named() {
    let folder = Folder::new();
    folder.scenario("a.yaml", "name: a\nrequest: { path: / }\nexpect: { response: { status: 200 } }\n");
    let report = run(&[folder.path().to_owned()], &RunOptions::default(), &mut Simulated::default(), &mut |_| {});
    let text = report.to_string();
    assert!(text.contains("is not built") && text.contains("cargo xtask build-filters"), "{text}");
}

#[test]
fn a_scenario_can_say_all_that_the_simulated_host_can_do() {
    let folder = Folder::new();
    folder.scenario(
        "a.yaml",
        r#"
name: data, queues, properties, ticks and workers
hosts: [harness]
workers: 2
vm_id: shared
shared_data: { k: before }
steps:
  - name: what was shared before is there, and a queue is filled from outside
    enqueue: { q: [one, { base64: "/w==" }] }
    expect: { counters: { queued: 2 }, shared_data: { k: before, other: null }, queues: { q: [] } }
  - name: the filter shares on another worker
    worker: 1
    request: { path: /, fields: [[x-share, "1"]] }
    expect: { response: { status: 200 }, shared_data: { k: v }, properties: { mark: "1", none: null } }
  - name: properties are given
    request: { path: /, fields: [[x-weather, "1"]], properties: { weather: rain } }
    expect: { upstream: { fields: { x-forecast: rain } } }
  - name: a tick lets go
    request: { path: /, fields: [[x-wait, "1"]] }
    expect: { response: { status: 200 } }
  - name: a body in every split
    request: { method: POST, path: /, fields: [[x-body, "1"]], body: "12345", every_split: true }
    expect: { upstream: { body: "12345" } }
  - name: trailers, details and the log
    request: { method: POST, path: /, body_chunks: [a], trailers: [[x-sum, "1"]] }
    upstream_response: { trailers: [[x-end, "2"]] }
    expect: { response: { trailers: { x-end: "2" } }, upstream: { trailers: { x-sum: { starts_with: "1" } } } }
  - name: a denial
    request: { path: /, fields: [[x-deny, "1"]] }
    expect: { local_response: { status: 403 }, details: test.denied }
  - { name: ticks alone, ticks: 2, expect: { counters: { denied: 0 } } }
"#,
    );
    folder.scenario(
        "b.yaml",
        r#"
name: a call is late, refused, cut off, and looked at
callouts: { keys: [{ path: /other, failure: refused }, { times: 1, delay: 400ms, response: { status: 200 } }, { failure: reset }] }
hosts: [harness]
steps:
  - request: { path: /, fields: [[x-ask, "1"]] }
    expect: { response: { status: 200 }, callouts: { keys: [{ method: GET, path: /keys, authority: keys }] } }
  - request: { path: /, fields: [[x-ask, "1"]] }
    expect: { local_response: { status: 503 }, callouts: { keys: 1 } }
"#,
    );
    let report = folder.run(None);
    assert!(report.is_success(), "{report}");
}

#[test]
fn what_a_scenario_expects_and_does_not_come_is_named_with_its_place() {
    let folder = Folder::new();
    folder.scenario(
        "a.yaml",
        r#"
name: a
hosts: [harness]
steps:
  - enqueue: { q: [one] }
    expect: { counters: { queued: 2 }, shared_data: { k: v }, queues: { q: [one], none: [] }, log: [nothing like it] }
  - request: { path: /, fields: [[x-share, "1"]] }
    expect: { properties: { mark: "2", other: x }, callouts: { keys: [{ path: / }] } }
  - request: { method: POST, path: /, fields: [[x-body, "1"]], body: "123", every_split: true }
    expect: { upstream: { body: "12" } }
"#,
    );
    let text = folder.run(None).to_string();
    for line in [
        "step 1 of 3:",
        "counters.queued: expected +2, got +1",
        "shared_data.k: expected \"v\", got (absent)",
        "queues.none: expected [], got no queue of that name",
        "queues.q: expected [\"one\"], got []",
        "log: expected a line that contains \"nothing like it\", got none",
        "properties.mark: expected \"2\", got \"1\"",
        "properties.other: expected \"x\", got (absent)",
        "callouts.keys: expected 1 call, got 0 calls",
        "upstream.body: expected \"12\", got \"123\"",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    for (name, step, problem) in [
        ("b.yaml", "worker: 3\n    request: { path: / }", "there is no worker 3"),
        ("c.yaml", "enqueue: { nobody: [x] }", "no filter has registered the queue `nobody`"),
    ] {
        let text =
            format!("name: {name}\nhosts: [harness]\nsteps:\n  - {step}\n    expect: {{ counters: {{ x: 0 }} }}\n");
        folder.scenario(name, &text);
        let report = folder.run(Some(name)).to_string();
        assert!(report.contains(&format!("step 1: {problem}")), "{report}");
    }
}

#[test]
fn only_the_harness_does_what_real_hosts_cannot() {
    let folder = Folder::new();
    for (text, path) in [
        ("request: { path: / }\nexpect: { log: [x] }", "expect.log: only the harness can see this"),
        (
            "request: { path: /, properties: { a: b } }\nexpect: { closed: true }",
            "request.properties: only the harness can do this",
        ),
        ("steps: [{ ticks: 1 }]", "steps[0].ticks: only the harness can set its clock"),
        ("steps: [{ enqueue: { q: [x] } }]", "steps[0].enqueue: only the harness can do this"),
        ("steps: [{ callouts: {} }]", "steps[0]: only in the harness can a step do without a request"),
        ("workers: 2\nrequest: { path: / }\nexpect: { closed: true }", "workers: only the harness can do this"),
    ] {
        folder.scenario("a.yaml", &format!("name: a\n{text}\n"));
        let report = folder.run(None).to_string();
        assert!(report.contains(path) && report.contains("add `hosts: [harness]`"), "{report}");
    }
    folder.scenario("a.yaml", "name: a\nhosts: [harness]\nsteps: [{ callouts: {} }]\n");
    assert!(folder.run(None).to_string().contains("steps[0]: nothing happens in this step"));
}
