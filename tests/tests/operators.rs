//! Operators in the built binary: filters before them, causes told alike everywhere, reload, the host's end, and a
//! neighbour that does not notice what another one does.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use portcullis_harness::{ObservedResponse, RequestPlan};
use portcullis_tests::process::{DEADLINE, Process};
use portcullis_tests::server::Server;
use portcullis_tests::{client, places};
use serde_json::Value;

const HELLO: &str = "export default { async fetch(request: Request) { return new Response('hello ' + new URL(request.url).pathname); } };";

/// A folder with a policy and operators' files.
struct Site {
    folder: tempfile::TempDir,
}

impl Site {
    fn new(files: &[(&str, &str)]) -> Self {
        let site = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        for (name, text) in files {
            site.write(name, text);
        }
        site
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).expect("a folder");
        fs::write(path, text).expect("a file");
    }

    /// Writes the policy: every operator at the path of its name, behind the probe.
    fn policy(&self, operators: &[(&str, &str)]) {
        let probe = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
        let mut text = format!(
            "version: 1\nworkers: 1\nadmin: {{ address: \"127.0.0.1:0\" }}\n\
             listeners: [{{ name: public, address: \"127.0.0.1:0\" }}]\n\
             filters: [{{ name: probe, wasm: \"{}\" }}]\n\
             operator_host: {{ run_folder: run, storage: kv }}\noperators:\n",
            probe.display()
        );
        for (name, settings) in operators {
            text.push_str(&format!("  {name}: {{ {settings} }}\n"));
        }
        text.push_str("routes:\n");
        for (name, _) in operators {
            text.push_str(&format!(
                "  - {{ name: {name}, match: {{ path: {{ prefix: /{name} }} }}, operator: {name} }}\n"
            ));
        }
        self.write("portcullis.yaml", &text);
    }

    /// Has the policy name the engine.
    fn choose(&self, engine: &str) {
        let path = self.folder.path().join("portcullis.yaml");
        let text = fs::read_to_string(&path).expect("a policy");
        fs::write(&path, text.replace("operator_host: {", &format!("operator_host: {{ engine: {engine},")))
            .expect("a policy");
    }

    fn serve(&self) -> Serving {
        let server = Server::portcullis(&self.folder.path().join("portcullis.yaml"));
        Serving(server.unwrap_or_else(|error| panic!("{error}")))
    }
}

struct Serving(Server);

impl Serving {
    fn send(&self, request: &RequestPlan) -> ObservedResponse {
        let sent = client::send(self.0.address(), request).unwrap_or_else(|error| panic!("{error}\n{}", self.0.log()));
        sent.unwrap_or_else(|| panic!("no answer to {}\n{}", request.path, self.0.log()))
    }

    fn get(&self, path: &str) -> (u16, String) {
        let response = self.send(&RequestPlan::new("GET", path));
        (response.status, String::from_utf8_lossy(&response.body).into_owned())
    }

    fn counter(&self, name: &str) -> i64 {
        let counters = self.0.counters().unwrap_or_else(|error| panic!("{error}"));
        counters.get(name).copied().unwrap_or_default()
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.0.id().to_string()).status();
        assert!(sent.expect("`kill` runs").success());
    }

    fn reload(&self) {
        let reloads = || {
            ["ok", "failed"]
                .iter()
                .map(|result| self.counter(&format!("portcullis_reloads_total.result.{result}")))
                .sum()
        };
        let before: i64 = reloads();
        self.signal("HUP");
        eventually("a reload", || reloads() > before);
    }

    /// Processes whose parent is the host: operators and those that are kept ready.
    fn children(&self) -> Vec<u32> {
        let parent = self.0.id().to_string();
        let processes = fs::read_dir("/proc").expect("/proc").flatten();
        processes
            .filter_map(|entry| {
                let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
                let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
                let mut fields = stat.rsplit(") ").next()?.split(' ');
                let is_zombie = fields.next() == Some("Z");
                (!is_zombie && fields.next() == Some(parent.as_str())).then_some(pid)
            })
            .collect()
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_running(pid: u32) -> bool {
    // A zombie has no executable any more.
    Path::new("/proc").join(pid.to_string()).join("exe").read_link().is_ok()
}

#[test]
fn filters_come_first_and_the_operator_sees_what_they_added() {
    let site = Site::new(&[(
        "echo/main.ts",
        "export default { async fetch(request: Request) { return Response.json([request.method, request.url, request.headers.get('x-probed'), await request.text()]); } };",
    )]);
    site.policy(&[("echo", "entry: echo/main.ts")]);
    let serving = site.serve();
    let mut request = RequestPlan::new("POST", "/echo/a?b=c");
    request.body = vec![b"two ".to_vec(), b"pieces".to_vec()];
    let response = serving.send(&request);
    let seen: Value = serde_json::from_slice(&response.body).expect("JSON");
    assert_eq!(seen, serde_json::json!(["POST", "http://api.example.com/echo/a?b=c", "yes", "two pieces"]));

    let mut denied = RequestPlan::new("GET", "/echo");
    denied.fields.push("x-probe", "deny");
    assert_eq!(serving.send(&denied).status, 418);
    let mut crashed = RequestPlan::new("GET", "/echo");
    crashed.fields.push("x-probe", "panic");
    assert_eq!(serving.send(&crashed).status, 503);
    assert_eq!(serving.counter("portcullis_operator_requests_total.operator.echo"), 1, "denied requests reached it");
}

/// Client, access log and metric name one cause.
fn check_cause(serving: &Serving, path: &str, status: u16, cause: &str) {
    check_cause_of(serving, &RequestPlan::new("GET", path), status, cause);
}

fn check_cause_of(serving: &Serving, request: &RequestPlan, status: u16, cause: &str) {
    let before = failures(serving, &request.path, cause);
    let response = serving.send(request);
    check_answer(serving, request, (response.status, &response.body), before, status, cause);
}

fn failures(serving: &Serving, path: &str, cause: &str) -> i64 {
    let operator = path.trim_start_matches('/').split(['/', '?']).next().unwrap_or_default();
    serving.counter(&format!("portcullis_operator_failed_total.operator.{operator}.reason.{cause}"))
}

fn check_answer(
    serving: &Serving,
    request: &RequestPlan,
    (found, body): (u16, &[u8]),
    failed_before: i64,
    status: u16,
    cause: &str,
) {
    let (method, path) = (&request.method, &request.path);
    let body = String::from_utf8_lossy(body);
    let problem: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("{path}: {found} {body}"));
    assert_eq!((found, problem["reason"].as_str()), (status, Some(cause)), "{path}\n{}", serving.0.log());
    assert!(problem["request_id"].is_string(), "{body}");
    assert_eq!(failures(serving, path, cause), failed_before + 1, "{cause}");
    let line = format!(" {method} {} {status} {cause} ", path.split('?').next().unwrap_or_default());
    eventually("the access log has it", || serving.0.log().contains(&line));
}

const CAUSES: &str = r#"
const kept: unknown[] = [];
export default { async fetch(request: Request) {
  switch (new URL(request.url).pathname.split("/")[2]) {
    case "throw": throw new Error("private detail");
    case "loop": for (;;) {}
    case "wait": await new Promise(() => {});
    case "memory": for (;;) kept.push(new Array(1000).fill({}));
    case "long": return new Response("x".repeat(2000));
    case "read": await request.text();
    case "slow": await new Promise((resolve) => setTimeout(resolve, 1500));
  }
  return new Response("ok");
} };
"#;

mod on_deno {
    #[test]
    fn each_limit_ends_a_request_with_one_cause_for_client_log_and_metric() {
        super::each_limit_ends_a_request_with_one_cause_for_client_log_and_metric("deno");
    }
}

mod on_runner {
    #[test]
    fn each_limit_ends_a_request_with_one_cause_for_client_log_and_metric() {
        super::each_limit_ends_a_request_with_one_cause_for_client_log_and_metric("runner");
    }
}

fn each_limit_ends_a_request_with_one_cause_for_client_log_and_metric(engine: &str) {
    let site = Site::new(&[("a/main.ts", CAUSES), ("elsewhere/main.ts", HELLO)]);
    site.policy(&[
        (
            "a",
            "entry: a/main.ts, replicas: { max: 1 }, limits: { cpu_time: 400ms, wall_time: 30s, heap: 32MiB, memory: 64MiB, \
             request_bytes: 1KiB, response_bytes: 1KiB, concurrency: 1 }",
        ),
        ("short", "entry: a/main.ts, limits: { wall_time: 500ms }"),
        ("two", "entry: a/main.ts, replicas: { max: 1 }, limits: { cpu_time: 1s, wall_time: 1m, concurrency: 2 }"),
        ("elsewhere", "entry: elsewhere/main.ts, placement: { pool: acme }"),
    ]);
    site.choose(engine);
    let serving = site.serve();
    check_cause(&serving, "/a/throw", 500, "operator_exception");
    check_cause(&serving, "/short/wait", 503, "operator_wall_time");
    check_cause(&serving, "/a/long", 500, "operator_response_bytes");
    check_cause(&serving, "/elsewhere", 503, "operator_elsewhere");
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| serving.get("/a/slow"));
        eventually("it is being answered", || serving.counter("portcullis_operator_requests_total.operator.a") == 3);
        check_cause(&serving, "/a/ok", 429, "operator_concurrency");
        assert_eq!(slow.join().expect("an answer"), (200, "ok".to_owned()));
    });
    let mut long = RequestPlan::new("POST", "/a");
    long.body = vec![vec![b'x'; 2000]];
    check_cause_of(&serving, &long, 413, "operator_request_bytes");
    // A client that does not send what it promised.
    let answer = {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(serving.0.address()).expect("a connection");
        stream.write_all(b"POST /short/read HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc").expect("sent");
        stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the end, as the request cannot go on");
        String::from_utf8(answer).expect("text")
    };
    let (head, body) = answer.split_once("\r\n\r\n").expect("a response");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    let late = RequestPlan::new("POST", "/short/read");
    check_answer(&serving, &late, (status, body.as_bytes()), 0, 408, "operator_request_time");
    // What comes to a process that a loop holds up is not to blame, and is told that it may try again.
    let request = RequestPlan::new("GET", "/two/ok");
    std::thread::scope(|scope| {
        let culprit = scope.spawn(|| check_cause(&serving, "/two/loop", 503, "operator_cpu_time"));
        eventually("it is running", || {
            serving.counter("portcullis_operator_cpu_milliseconds_total.operator.two") > 600
        });
        let beside = serving.send(&request);
        if engine == "runner" {
            // The isolate alone went, before it knew of this one.
            assert_eq!((beside.status, &beside.body[..]), (200, &b"ok"[..]), "{}", serving.0.log());
        } else {
            assert_eq!(beside.fields.get("retry-after"), Some(&b"1"[..]), "{}", serving.0.log());
            check_answer(&serving, &request, (beside.status, &beside.body), 0, 503, "operator_bystander");
        }
        culprit.join().expect("its cause");
    });
    check_cause(&serving, "/a/loop", 503, "operator_cpu_time");
    eventually("it was replaced", || serving.get("/a/ok").0 == 200);
    check_cause(&serving, "/a/memory", 503, "operator_memory");
    eventually("it was replaced", || serving.get("/a/ok").0 == 200);
    let log = serving.0.log();
    assert!(log.contains("Error: private detail") && log.contains("at Object.fetch (main.ts:5:"), "{log}");
    // For whoever looks after it: which limit, and how much it is.
    for limit in ["operator_cpu_time: `limits.cpu_time` is 400ms", "operator_wall_time: `limits.wall_time` is 500ms"] {
        assert!(log.contains(&format!("a request was not answered by its operator: {limit}")), "{limit}: {log}");
    }
}

/// On Deno, whose process ends when its heap is full; the runner ends the isolate alone.
#[test]
fn what_keeps_crashing_is_paused_and_comes_back() {
    let site = Site::new(&[("a/main.ts", CAUSES)]);
    site.policy(&[(
        "a",
        "entry: a/main.ts, replicas: { max: 1 }, limits: { heap: 16MiB, memory: 64MiB, cpu_time: 20s }",
    )]);
    site.choose("deno");
    let serving = site.serve();
    let request = RequestPlan::new("GET", "/a/memory");
    let mut ends = 0;
    let paused = loop {
        let before = failures(&serving, &request.path, "operator_crash_loop");
        let response = serving.send(&request);
        if String::from_utf8_lossy(&response.body).contains("operator_crash_loop") {
            check_answer(&serving, &request, (response.status, &response.body), before, 503, "operator_crash_loop");
            break response;
        }
        ends += 1;
        assert!(ends < 20, "never paused\n{}", serving.0.log());
    };
    assert_eq!(paused.fields.get("retry-after"), Some(&b"10"[..]));
    assert!(ends >= 3, "paused after {ends}");
    let said = "the process ended: operator_memory: `limits.heap` is 16MiB, `limits.memory` 64MiB (signal 5)";
    assert!(serving.0.log().matches(said).count() >= 3, "{}", serving.0.log());
    assert!(serving.counter("portcullis_operator_ends_total.operator.a.reason.operator_memory") >= 3);
    // The pause is over some time, and then it is as good as before.
    eventually("it answers again", || serving.get("/a/ok").0 == 200);
}

const BOMBS: &str = r#"
const kept: unknown[] = [];
export default { async fetch(request: Request, env: any) {
  switch (new URL(request.url).pathname.slice(1)) {
    case "loop": for (;;) {}
    case "regex": return new Response(String(/^(a+)+$/.test("a".repeat(60) + "b")));
    case "heap": for (;;) kept.push(new Array(1000).fill({}));
    case "buffers": for (;;) kept.push(new Uint8Array(1 << 20).fill(1));
    case "wasm": for (;;) { kept.push(new WebAssembly.Memory({ initial: 100, maximum: 200 })); new Uint8Array((kept.at(-1) as WebAssembly.Memory).buffer).fill(1); }
    case "log": for (;;) { console.log("x".repeat(1000)); await null; }
    case "store": for (let i = 0; ; i++) await env.kv.put("k" + i, "x".repeat(1000));
    case "fetch": for (;;) { try { await fetch("http://127.0.0.1:9/"); } catch {} }
    case "endless": return new Response(new ReadableStream({ pull(c) { c.enqueue(new Uint8Array(65536)); } }));
    case "fields": { const fields = new Headers(); for (let i = 0; i < 100000; i++) fields.append("x-" + i, "1"); return new Response(null, { headers: fields }); }
    case "timers": for (let i = 0; i < 1000; i++) setTimeout(() => { for (let j = 0; j < 1e7; j++); }, 0); await new Promise(() => {});
    case "pollute": Object.prototype.toString = () => { throw 1; }; (Object.prototype as any).then = (f: any) => f(1); Promise.prototype.then = () => { throw 2; }; return new Response("polluted");
    case "status": { const r = new Response("x"); Object.defineProperty(r, "status", { value: 101 }); return r; }
    case "split": return new Response("x", { headers: { "x-a": "1\r\nx-injected: 1" } });
  }
  return new Response("ok");
} };
"#;

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// One attack after the other, each twice at a time and by an operator of its own, next to a neighbour, a filter that denies
/// and a route without an operator: none of these notices.
#[test]
fn whatever_an_operator_does_its_neighbours_filters_and_other_routes_go_on() {
    const MEMORY: &[&str] = &["operator_memory", "operator_exception"];
    // What the first answer names; nothing means that it is not about a cause.
    let attacks: [(&str, &[&str]); 14] = [
        ("loop", &["operator_cpu_time"]),
        ("regex", &["operator_cpu_time"]),
        ("heap", MEMORY),
        ("buffers", MEMORY),
        ("wasm", MEMORY),
        // It waits for whoever reads what it prints.
        ("log", &["operator_wall_time", "operator_cpu_time"]),
        ("store", &["operator_exception"]),
        ("fetch", &["operator_wall_time"]),
        ("endless", &[]),
        ("fields", &["operator_response_refused", "operator_cpu_time"]),
        ("timers", &["operator_cpu_time"]),
        ("pollute", &[]),
        ("status", &[]),
        ("split", &["operator_exception"]),
    ];
    let site = Site::new(&[("bomb/main.ts", BOMBS), ("calm/main.ts", HELLO)]);
    let bomb = "entry: bomb/main.ts, permissions: { kv: true }, replicas: { min: 0, max: 1 }, limits: { cpu_time: 400ms, \
                wall_time: 10s, heap: 32MiB, memory: 64MiB, response_bytes: 1MiB, log_lines_per_second: 10, storage: 64KiB }";
    let brief = bomb.replace("wall_time: 10s", "wall_time: 1s");
    // What waits for ever need not wait for long.
    let waits = |name: &str| matches!(name, "log" | "fetch");
    let mut operators: Vec<(&str, &str)> =
        attacks.iter().map(|(name, _)| (*name, if waits(name) { brief.as_str() } else { bomb })).collect();
    operators.push(("calm", "entry: calm/main.ts"));
    site.policy(&operators);
    let policy = site.folder.path().join("portcullis.yaml");
    let mut text = fs::read_to_string(&policy).expect("a policy");
    text.push_str("  - { name: plain, match: { path: { prefix: /plain } }, respond: { status: 200, body: plain } }\n");
    fs::write(&policy, text).expect("a policy");
    let serving = site.serve();
    let attack = |name: &str| client::send(serving.0.address(), &RequestPlan::new("GET", &format!("/{name}")));
    let stop = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| {
        // Also when an attack comes out otherwise than it should.
        let stopping = StopAtEnd(&stop);
        let calm = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(Ordering::Acquire) {
                let mut denied = RequestPlan::new("GET", "/calm");
                denied.fields.push("x-probe", "deny");
                assert_eq!(serving.send(&denied).status, 418);
                assert_eq!(serving.get("/plain"), (200, "plain".to_owned()));
                assert_eq!(serving.get("/calm/x"), (200, "hello /calm/x".to_owned()));
                rounds += 1;
            }
            rounds
        });
        for (name, causes) in attacks {
            let (first, second) = std::thread::scope(|scope| {
                let second = scope.spawn(|| attack(name));
                (attack(name), second.join().expect("an attack"))
            });
            let mut named = Vec::new();
            for response in [first, second].into_iter().flatten().flatten() {
                assert_ne!(response.status, 101, "{name}");
                assert!(response.fields.get("x-injected").is_none(), "{name}");
                let problem: Value = serde_json::from_slice(&response.body).unwrap_or_default();
                named.extend(problem["reason"].as_str().map(str::to_owned));
            }
            // The other one may be told that it was only beside it.
            let as_expected = causes.is_empty() || named.iter().any(|reason| causes.contains(&reason.as_str()));
            assert!(as_expected, "{name}: {named:?}\n{}", serving.0.log());
        }
        drop(stopping);
        calm.join().expect("undisturbed answers")
    });
    assert!(rounds > attacks.len(), "only {rounds} rounds");
    let counters = serving.0.counters().expect("metrics");
    let failed = counters.keys().filter(|name| name.starts_with("portcullis_operator_failed_total.operator.calm."));
    assert_eq!(failed.count(), 0, "{counters:#?}");
    assert_eq!(serving.counter("portcullis_operator_starts_total.operator.calm"), 1);
    assert_eq!(serving.0.admin_get("/healthz").expect("health"), "ok\n");
    assert!(!serving.0.log().contains("panicked"), "{}", serving.0.log());
}

#[test]
fn a_reload_takes_what_loads_and_keeps_what_worked() {
    let site = Site::new(&[("v/main.ts", HELLO), ("w/main.ts", HELLO)]);
    site.policy(&[("v", "entry: v/main.ts, permissions: { kv: true }"), ("w", "entry: w/main.ts")]);
    let serving = site.serve();
    assert_eq!(serving.get("/v/1").1, "hello /v/1");

    // Of two changes one does not load: neither is taken, and the log says why.
    site.write("w/main.ts", &HELLO.replace("hello", "changed"));
    site.write("v/main.ts", "import './absent.ts';\nexport default {};");
    serving.reload();
    assert_eq!((serving.get("/v").1.as_str(), serving.get("/w").1.as_str()), ("hello /v", "hello /w"));
    let log = serving.0.log();
    assert!(log.contains("the running policy stays in force"), "{log}");
    assert!(log.contains("operator `v`: main.ts:1:8: there is no module `./absent.ts`"), "{log}");
    assert_eq!(serving.counter("portcullis_reloads_total.result.failed"), 1);

    site.write("v/main.ts", &HELLO.replace("hello", "second"));
    site.policy(&[("v", "entry: v/main.ts, permissions: { kv: true }")]);
    // A check beside it disturbs nobody, stores included.
    let mut check = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
    check.args(["check", "portcullis.yaml"]).current_dir(site.folder.path());
    let checked = Process::run("portcullis check", &mut check).unwrap_or_else(|error| panic!("{error}"));
    assert!(checked.status.success(), "{}", checked.output);
    serving.reload();
    assert_eq!(serving.get("/v").1, "second /v");
    assert_eq!(serving.get("/w").0, 404);
    site.write("new/main.ts", HELLO);
    site.policy(&[("v", "entry: v/main.ts"), ("new", "entry: new/main.ts")]);
    serving.reload();
    assert_eq!(serving.get("/new").1, "hello /new");

    // What the host itself was started with stays.
    let path = site.folder.path().join("portcullis.yaml");
    let text = fs::read_to_string(&path).expect("a policy");
    fs::write(&path, text.replace("storage: kv", "storage: other")).expect("a policy");
    serving.reload();
    assert!(serving.0.log().contains("`operator_host` and `pool` cannot change while operators run"));
    assert_eq!(serving.get("/new").1, "hello /new");
}

/// The CPUs that a process's threads may use, as the kernel writes them; one for each thread.
fn allowed_cpus(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("a process").flatten();
    let status = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    status.filter_map(|text| Some(text.split_once("Cpus_allowed_list:")?.1.lines().next()?.trim().to_owned())).collect()
}

#[test]
fn a_pinned_operators_cpu_is_left_alone_by_the_host_and_its_neighbours() {
    let usable = allowed_cpus(std::process::id()).first().cloned().unwrap_or_default();
    let Some(last) = usable.split([',', '-']).next_back().filter(|_| usable.contains([',', '-'])) else {
        // With one CPU there is none to give away, which the configuration's own tests refuse.
        return;
    };
    let site = Site::new(&[("pinned/main.ts", HELLO), ("free/main.ts", HELLO)]);
    let placement = format!("entry: pinned/main.ts, placement: {{ cpus: [{last}] }}");
    site.policy(&[("pinned", &placement), ("free", "entry: free/main.ts")]);
    let serving = site.serve();
    let cpus = || {
        let mut own = allowed_cpus(serving.0.id());
        own.dedup();
        let children = serving.children().into_iter().map(|pid| (allowed_cpus(pid), pid));
        let (pinned, others): (Vec<_>, Vec<_>) = children.partition(|(cpus, _)| cpus.iter().all(|list| list == last));
        (own, pinned.len(), others)
    };
    eventually("two operators and one that is kept ready", || serving.children().len() == 3);
    let mut seen = cpus();
    eventually("everybody is in place", || {
        seen = cpus();
        let free = |list: &String| {
            list != last && !list.ends_with(&format!("-{last}")) && !list.ends_with(&format!(",{last}"))
        };
        seen.0.iter().all(free) && seen.1 == 1 && seen.2.iter().all(|(cpus, _)| cpus.iter().all(free))
    });
    assert_eq!((serving.get("/pinned").0, serving.get("/free").0), (200, 200));
    // Without the reservation everything is everybody's again.
    site.policy(&[("pinned", "entry: pinned/main.ts"), ("free", "entry: free/main.ts")]);
    serving.reload();
    eventually("all CPUs are the host's again", || cpus().0 == [usable.clone()]);
    assert_eq!(serving.get("/pinned").0, 200);
}

/// Without root there is one layer less: the operators' own user. All else works, and who asks for every layer is refused.
#[test]
fn an_ordinary_user_runs_operators_but_not_with_every_layer() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    const USER: u32 = 65_532;
    let site = Site::new(&[("hello/main.ts", HELLO)]);
    let folder = site.folder.path();
    let policy = |isolation: &str| {
        let text = format!(
            "version: 1\nlisteners: [{{ name: public, address: \"127.0.0.1:0\" }}]\n\
             operator_host: {{ run_folder: run }}\n\
             operators: {{ hello: {{ entry: hello/main.ts, isolation: {isolation} }} }}\nroutes: [{{ name: all, operator: hello }}]\n"
        );
        site.write("portcullis.yaml", &text);
    };
    policy("best_effort");
    // Where such a user can read them.
    let copy = |from: &Path, to: &str| {
        let to = folder.join(to);
        fs::hard_link(from, &to).or_else(|_| fs::copy(from, &to).map(drop)).expect("a copy");
        to
    };
    let binary = copy(&places::portcullis().unwrap_or_else(|error| panic!("{error}")), "portcullis");
    let engine = std::env::var_os("PORTCULLIS_DENO").map(std::path::PathBuf::from);
    let engine = engine.unwrap_or_else(|| places::workspace().join(".portcullis/tools/deno-2.9.8/deno"));
    let engine = copy(&engine.canonicalize().expect("deno: run `cargo xtask setup`"), "deno");
    let is_root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    if is_root {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("a mode");
        chown(folder, Some(USER), Some(USER)).expect("an owner");
    }
    let run = |arguments: &[&str]| {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(&binary);
        command.args(arguments).current_dir(folder).env("PORTCULLIS_DENO", &engine).env("HOME", folder);
        if is_root {
            command.uid(USER).gid(USER);
        }
        Process::run("portcullis", &mut command).unwrap_or_else(|error| panic!("{error}"))
    };
    let checked = run(&["operators", "check"]);
    assert!(checked.status.success() && checked.output.contains("hello: ok"), "{}", checked.output);
    policy("required");
    let refused = run(&["serve"]);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.output);
    assert!(
        refused.output.contains("isolation layer `uid` is missing: the host does not run as root"),
        "{}",
        refused.output
    );
    assert!(refused.output.contains("hint: `portcullis doctor`"), "{}", refused.output);
    let doctor = run(&["doctor", "-c", "portcullis.yaml"]);
    assert_eq!(doctor.status.code(), Some(1), "{}", doctor.output);
    assert!(doctor.output.contains("operators: do NOT start with `isolation: required`"), "{}", doctor.output);
    assert!(doctor.output.contains("uid                MISSING"), "{}", doctor.output);
}

#[test]
fn reloads_and_kills_under_load_lose_only_what_a_killed_process_was_answering() {
    let slow = |version: u32| {
        format!(
            "export default {{ async fetch() {{ await new Promise((r) => setTimeout(r, 20)); return new Response('{version}'); }} }};"
        )
    };
    let site = Site::new(&[("busy/main.ts", &slow(0)), ("calm/main.ts", HELLO)]);
    site.policy(&[("busy", "entry: busy/main.ts, replicas: { min: 2 }"), ("calm", "entry: calm/main.ts")]);
    let serving = site.serve();
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let ask =
        |path: &'static str| {
            let (stop, answered, address) = (Arc::clone(&stop), Arc::clone(&answered), serving.0.address());
            std::thread::spawn(move || {
                let mut failed = Vec::new();
                while !stop.load(Ordering::Acquire) {
                    match client::send(address, &RequestPlan::new("GET", path)) {
                        Ok(Some(response)) if response.status == 200 && response.complete => {
                            answered.fetch_add(1, Ordering::AcqRel);
                        }
                        other => failed.push(other.map(|response| {
                            response.map(|response| String::from_utf8_lossy(&response.body).into_owned())
                        })),
                    }
                }
                failed
            })
        };
    const CLIENTS: usize = 4;
    let busy: Vec<_> = (0..CLIENTS).map(|_| ask("/busy")).collect();
    let calm = ask("/calm");
    for version in 1..4 {
        site.write("busy/main.ts", &slow(version));
        serving.reload();
        assert_eq!(serving.get("/busy").1, version.to_string());
    }
    let before = answered.load(Ordering::Acquire);
    eventually("more answers", || answered.load(Ordering::Acquire) > before + 20);
    // Which child is which is not told, so each is killed in turn: also the neighbour's and the ones kept ready.
    let kills = 3;
    for _ in 0..kills {
        let victim = serving.children().first().copied().expect("a process");
        let killed = Command::new("kill").args(["-KILL", &victim.to_string()]).status();
        assert!(killed.expect("`kill` runs").success());
        let before = answered.load(Ordering::Acquire);
        eventually("more answers", || answered.load(Ordering::Acquire) > before + 20);
    }
    stop.store(true, Ordering::Release);
    let lost: Vec<_> = busy.into_iter().flat_map(|client| client.join().expect("a client")).collect();
    let lost_calm = calm.join().expect("a client");
    assert!(lost.len() <= CLIENTS * kills && lost_calm.len() <= kills, "{lost:?} {lost_calm:?}");
    for failed in lost.iter().chain(&lost_calm) {
        let cause = failed.as_ref().ok().and_then(Option::as_ref);
        assert!(cause.is_some_and(|body| body.contains("operator_crashed")), "{failed:?}");
    }
}

#[test]
fn whatever_ends_the_host_ends_its_operators() {
    for signal in ["TERM", "KILL"] {
        let site = Site::new(&[("hello/main.ts", HELLO)]);
        site.policy(&[("hello", "entry: hello/main.ts")]);
        let mut serving = site.serve();
        assert_eq!(serving.get("/hello").0, 200);
        eventually("one is kept ready", || serving.children().len() == 2);
        let children = serving.children();
        serving.signal(signal);
        eventually("the host has ended", || !serving.0.is_running());
        eventually("its processes have, too", || !children.iter().any(|pid| is_running(*pid)));
        // A host that ends in order leaves no folder behind; the next one clears up after one that could not.
        if signal == "TERM" {
            let left: Vec<_> = walk(&site.folder.path().join("run"));
            assert!(left.iter().all(|path| path.ends_with(".lock")), "{left:?}");
            let group = format!("portcullis-{}-", serving.0.id());
            assert!(!folders_of_groups().iter().any(|name| name.starts_with(&group)), "a control group is left");
        } else {
            let again = site.serve();
            assert_eq!(again.get("/hello").0, 200);
        }
    }
}

/// In this process's own control group, where there are such groups.
fn folders_of_groups() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let folder = format!("{}{own}", mount.unwrap_or("/absent"));
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn walk(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(walk(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found
}
