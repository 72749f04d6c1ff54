//! The simulated host, against a guest written for it (`guest.wat`), and scenario files run against the same guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use portcullis_harness::{
    Callout, CalloutAnswer, Guest, Harness, HarnessError, RequestPlan, ResponsePlan, RunOptions, Verdict, run,
};

fn guest() -> Guest {
    let wasm = wat::parse_str(include_str!("guest.wat")).unwrap();
    Guest::from_bytes("guest", &wasm).unwrap()
}

fn harness() -> Harness {
    guest().harness().upstream("keys").start().unwrap()
}

fn keys_answer(answer: CalloutAnswer) -> Vec<Callout> {
    vec![Callout { path: Some("/keys".to_owned()), times: None, answer }]
}

#[test]
fn passes_a_request_and_its_answer() {
    let seen = harness().request("POST", "/a?b=c").field("x-one", "1").body("first").body("second").send();
    assert_eq!(seen.status(), Some(200));
    assert_eq!(seen.response.as_ref().unwrap().body, b"ok");
    assert_eq!(seen.field("content-length"), Some("2"));
    assert_eq!(seen.local, Some(false));
    let [request] = seen.upstream.as_slice() else { panic!("{seen:?}") };
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/a?b=c"));
    assert_eq!(request.authority, "api.example.com");
    assert_eq!(request.body, b"firstsecond");
    assert_eq!(request.fields.get("x-seen"), Some(&b"1"[..]));
    assert!(request.complete);
}

#[test]
fn a_denial_reaches_the_client_and_not_the_upstream() {
    let mut harness = harness();
    for _ in 0..2 {
        let seen = harness.get("/").field("x-deny", "1").send();
        assert_eq!(seen.status(), Some(403));
        assert_eq!(seen.response.as_ref().unwrap().body, b"no");
        assert!(!seen.reached_upstream());
        assert_eq!(seen.local, Some(true));
        assert_eq!(seen.details.as_deref(), Some("test.denied"));
        assert_eq!(seen.counters, [("denied".to_owned(), 1)].into());
    }
    assert_eq!(harness.counters()["denied"], 2);
}

#[test]
fn callouts_are_answered_as_scripted() {
    let mut harness = harness();
    harness.answer_callouts("keys", keys_answer(CalloutAnswer::Response(ResponsePlan::default())));
    let seen = harness.get("/").field("x-ask", "1").send();
    assert_eq!(seen.status(), Some(200));
    assert_eq!(seen.callouts["keys"].len(), 1);
    assert_eq!(seen.callouts["keys"][0].path, "/keys");

    harness.answer_callouts("keys", keys_answer(CalloutAnswer::Refused));
    let seen = harness.get("/").field("x-ask", "1").send();
    assert_eq!(seen.status(), Some(503));
    assert!(!seen.reached_upstream());
}

#[test]
fn a_callout_nobody_answers_times_out_on_the_scripted_clock() {
    let mut harness = harness();
    harness.answer_callouts("keys", keys_answer(CalloutAnswer::Timeout));
    let before = harness.now();
    assert_eq!(harness.get("/").field("x-ask", "1").send().status(), Some(503));
    assert_eq!(harness.now() - before, 1, "the call's own deadline is a second");
}

#[test]
fn a_call_without_a_script_finds_nothing() {
    assert_eq!(harness().get("/").field("x-ask", "1").send().status(), Some(503));
}

#[test]
fn answers_can_run_out() {
    let mut harness = harness();
    let answers = vec![
        Callout { path: None, times: Some(1), answer: CalloutAnswer::Response(ResponsePlan::default()) },
        Callout { path: None, times: None, answer: CalloutAnswer::Refused },
    ];
    harness.answer_callouts("keys", answers);
    assert_eq!(harness.get("/").field("x-ask", "1").send().status(), Some(200));
    assert_eq!(harness.get("/").field("x-ask", "1").send().status(), Some(503));
}

#[test]
fn time_jumps_to_the_next_tick_when_nothing_else_is_left() {
    assert_eq!(harness().get("/").field("x-wait", "1").send().status(), Some(200));
}

#[test]
fn a_request_that_is_held_for_ever_is_given_up() {
    let mut harness = harness();
    let before = harness.now();
    let seen = harness.get("/").field("x-hold", "1").send();
    assert_eq!(seen.status(), None);
    assert!(!seen.reached_upstream());
    assert!(seen.log.iter().any(|line| line.message.contains("the filter holds the stream")), "{:?}", seen.log);
    assert!((59..=60).contains(&(harness.now() - before)));
    assert_eq!(harness.get("/").send().status(), Some(200), "the next request is served");
}

#[test]
fn the_clock_moves_only_when_told() {
    let mut harness = guest().harness().now(1000).start().unwrap();
    harness.get("/").send();
    assert_eq!(harness.now(), 1000);
    harness.advance(Duration::from_secs(90));
    assert_eq!(harness.now(), 1090);
}

#[test]
fn a_refused_configuration_is_an_error_with_the_guests_words() {
    let error = guest().harness().configuration("bad").start().err().unwrap();
    assert!(matches!(error, HarnessError::Start(_)));
    let text = error.to_string();
    assert!(text.contains("filter `guest`") && text.contains("no"), "{text}");
}

#[test]
fn a_file_that_is_no_filter_is_named() {
    let error = Guest::load("nowhere/x.wasm").err().unwrap().to_string();
    assert_eq!(
        error,
        "nowhere/x.wasm: cannot be read: there is no such file\n  \
         hint: build it first: for the filters of this repository `cargo xtask build-filters`"
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.wasm");
    std::fs::write(&file, wat::parse_str("(module)").unwrap()).unwrap();
    let error = Guest::load(&file).err().unwrap().to_string();
    assert!(error.starts_with(&file.display().to_string()) && error.contains("proxy_abi_version"), "{error}");
}

#[test]
fn a_head_request_gets_no_body() {
    let seen = harness().exchange(&RequestPlan::new("HEAD", "/"), &ResponsePlan::default());
    assert_eq!(seen.status(), Some(200));
    assert!(seen.response.unwrap().body.is_empty());
}

#[test]
fn what_works_here_and_fails_in_envoy_is_noted_once() {
    let mut harness = harness();
    for _ in 0..2 {
        assert_eq!(harness.get("/").field("x-lint", "1").send().status(), Some(200));
    }
    let lints = harness.lints();
    let [lint] = lints.as_slice() else { panic!("{lints:?}") };
    assert!(lint.starts_with("proxy_get_header_map_value in proxy_on_response_headers: "), "{lint}");
}

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
        let options = RunOptions { wasm: Some(self.path().join("guest.wasm")), only: only.map(str::to_owned) };
        run(&[self.path().to_owned()], &options)
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
    assert!(text.starts_with(&format!("ok      {filter}  a marked request is refused\nFAILED  {filter}  ")), "{text}");
    assert!(text.contains(&format!("        {}\n", failing.display())), "{text}");
    assert!(text.contains("        local_response.status: expected 403, got 200\n"), "{text}");
    assert!(text.contains("        upstream: expected not called, got called with `GET /`\n"), "{text}");
    assert!(text.ends_with("\n2 passed, 1 failed\n"), "{text}");

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
    let report = run(&[folder.path().to_owned()], &RunOptions::default());
    let text = report.to_string();
    assert!(text.contains("is not built") && text.contains("cargo xtask build-filters"), "{text}");
}
