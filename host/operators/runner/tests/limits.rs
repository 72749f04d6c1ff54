//! Limits that are kept inside: what reaches one costs the isolate and not the process.

mod support;

use std::time::{Duration, Instant};

use support::{Engine, Options, block_on};

fn handler(attack: &str) -> String {
    format!(
        "const kept = []; export default {{ async fetch(request) {{ const path = new URL(request.url).pathname; if (path === '/ok') return new Response('ok ' + kept.length);\n{attack}\nreturn new Response('done'); }} }};"
    )
}

/// The request ends with the outcome, the next one is answered by a fresh isolate of the same process.
async fn check(attack: &str, options: &Options, outcome: &str) -> Engine {
    let mut engine = Engine::with(&handler(attack), options).await;
    for _ in 0..2 {
        let answer = engine.get("/").await;
        assert_eq!(answer.outcome(), Some(outcome), "{attack}: {} {}\n{}", answer.status, answer.text(), engine.log());
        assert_eq!(engine.text("/ok").await, "ok 0");
    }
    assert!(engine.is_running());
    engine
}

#[test]
fn a_loop_of_any_kind_costs_its_isolate() {
    let limit = Options { cpu: Duration::from_millis(150), ..Options::default() };
    for attack in [
        "for (;;);",
        "/^(a+)+$/.test('a'.repeat(60) + 'b');",
        "const again = () => Promise.resolve().then(again); await again();",
        "const again = () => queueMicrotask(again); again(); await new Promise(() => {});",
        "for (;;) { const end = performance.now() + 10; while (performance.now() < end); await new Promise((r) => setTimeout(r, 1)); }",
        "let text = 'x'; for (;;) { try { (function f() { f(); })(); } catch {} }",
        "for (;;) try { for (;;); } finally { continue; }",
        "const wasm = new WebAssembly.Module(new Uint8Array([0,97,115,109,1,0,0,0,1,4,1,96,0,0,3,2,1,0,7,5,1,1,102,0,0,10,9,1,7,0,3,64,12,0,11,11])); new WebAssembly.Instance(wasm).exports.f();",
        "new Proxy({}, { get() { for (;;); } }).x;",
        "return new Response(new ReadableStream({ pull() { for (;;); } }));",
        "const numbers = Array.from({ length: 1000 }, (_, i) => i % 7); for (;;) numbers.sort();",
        // V8's optimizer once left nothing in this one that could be interrupted.
        "for (;;) { new Array(1000).fill({}); }",
    ] {
        block_on(check(attack, &limit, "cpu_time"));
    }
}

#[test]
fn a_loop_ends_soon_after_its_limit() {
    // Generous: this machine may be busy with other things. The benchmark has the figure.
    block_on(async {
        let limit = Options { cpu: Duration::from_millis(100), ..Options::default() };
        let engine = check("for (;;);", &limit, "cpu_time").await;
        let started = Instant::now();
        engine.get("/").await;
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    });
}

#[test]
fn cpu_time_is_charged_to_the_request_whose_code_runs() {
    block_on(async {
        let limit = Options { cpu: Duration::from_millis(300), ..Options::default() };
        let code = handler(
            "if (path === '/waits') { await new Promise((r) => setTimeout(r, 30_000)); } \
             if (path === '/burns') for (;;) { const end = performance.now() + 10; while (performance.now() < end); await new Promise((r) => setTimeout(r, 1)); }",
        );
        let engine = Engine::with(&code, &limit).await;
        let (burns, first, second) = tokio::join!(engine.get("/burns"), engine.get("/waits"), engine.get("/waits"));
        assert_eq!(burns.outcome(), Some("cpu_time"));
        // They were charged nothing, and lost their isolate to the other.
        assert_eq!((first.outcome(), second.outcome()), (Some("bystander"), Some("bystander")));
        assert_eq!(engine.text("/ok").await, "ok 0");
    });
}

#[test]
fn what_goes_on_after_the_answer_ends_the_process() {
    block_on(async {
        let limit = Options { background_cpu: Duration::from_millis(200), ..Options::default() };
        let burn = "const end = performance.now() + 10; while (performance.now() < end);";
        let attacks = [
            format!("setInterval(() => {{ {burn} }}, 11);"),
            "setTimeout(() => { for (;;); }, 1);".to_owned(),
            format!(
                "kept.push(1); (async () => {{ for (;;) {{ {burn} await new Promise((r) => setTimeout(r, 1)); }} }})();"
            ),
        ];
        for attack in attacks {
            let mut engine = Engine::with(&handler(&attack), &limit).await;
            assert_eq!(engine.text("/").await, "done");
            engine.wait_for_log("code between requests used more CPU time than allowed").await;
            // By this status the host knows why.
            assert_eq!(engine.ended().await.code(), Some(86));
        }
    });
}

#[test]
fn too_much_memory_costs_the_isolate() {
    let small = Options { arguments: vec!["--heap-mebibytes", "32", "--memory-mebibytes", "48"], ..Options::default() };
    for attack in [
        "for (;;) kept.push(new Array(1000).fill({}));",
        "for (let text = 'x'.repeat(1000); ; ) kept.push([...text].reverse());",
        "const piece = new Uint8Array(1 << 20).fill(1); for (;;) kept.push(new Blob([piece]));",
        "const map = new Map(); for (let i = 0; ; i++) map.set(i, { i });",
        "for (;;) kept.push(Promise.resolve(new Array(100)));",
    ] {
        block_on(check(attack, &small, "memory"));
    }
}

#[test]
fn a_buffer_that_does_not_fit_is_an_exception() {
    let small = Options { arguments: vec!["--heap-mebibytes", "32", "--memory-mebibytes", "48"], ..Options::default() };
    block_on(async {
        let attack = "try { for (;;) kept.push(new Uint8Array(4 << 20).fill(1)); } catch (error) { const n = kept.length; kept.length = 0; return new Response(n + ' ' + error); }";
        let mut engine = Engine::with(&handler(attack), &small).await;
        for _ in 0..3 {
            let text = engine.text("/").await;
            assert!(text.ends_with("RangeError: Array buffer allocation failed"), "{text}");
            let count: usize = text.split(' ').next().unwrap().parse().unwrap();
            assert!((5..=12).contains(&count), "{text}");
        }
        assert!(engine.is_running());
    });
}

#[test]
fn webassembly_memory_is_limited() {
    let small = Options { arguments: vec!["--heap-mebibytes", "32", "--memory-mebibytes", "48"], ..Options::default() };
    block_on(async {
        let attack = "for (;;) { const memory = new WebAssembly.Memory({ initial: 16, maximum: 65536 }); kept.push(memory); for (let i = 0; i < 64; i++) { memory.grow(16); new Uint8Array(memory.buffer).fill(1); } }";
        let mut engine = Engine::with(&handler(attack), &small).await;
        let answer = engine.get("/").await;
        assert!(matches!(answer.outcome(), Some("exception" | "memory")), "{} {}", answer.status, answer.text());
        assert!(engine.text("/ok").await.starts_with("ok"));
        assert!(engine.is_running());
    });
}

#[test]
fn timers_and_calls_at_once_are_limited() {
    block_on(async {
        let attack = "let n = 0; try { for (;;) { setTimeout(() => {}, 100_000); n++; } } catch (error) { kept.push(n + ' ' + error); } \
             n = 0; const calls = []; for (let i = 0; i < 1100; i++) { calls.push(fetch('http://origin.example/never').catch(String)); } \
             kept.push(await Promise.race(calls)); return Response.json(kept);";
        let engine = Engine::with(&handler(attack), &Options::default()).await;
        let text = engine.text("/").await;
        assert!(text.starts_with("[\"10000 RangeError: more than 10000 timers at once\""), "{text}");
        assert!(text.contains("too many calls to the host at once"), "{text}");
    });
    // One that fires or is cleared makes room.
    block_on(async {
        let attack = "for (let i = 0; i < 9_999; i++) setTimeout(() => {}, 100_000); for (let i = 0; i < 50; i++) await new Promise((r) => setTimeout(r, 0)); for (let i = 0; i < 50; i++) clearInterval(setInterval(() => {}, 1000)); return new Response('ok');";
        let engine = Engine::with(&handler(attack), &Options::default()).await;
        assert_eq!(engine.text("/").await, "ok");
    });
}

#[test]
fn bodies_are_limited_inside() {
    let options = Options { request_bytes: 100_000, response_bytes: 100_000, ..Options::default() };
    block_on(async {
        let attack = "if (request.method === 'POST') { try { return new Response(String((await request.arrayBuffer()).byteLength)); } catch (error) { return new Response(String(error)); } } \
             if (path === '/whole') return new Response('x'.repeat(100_001)); \
             if (path === '/fits') return new Response('x'.repeat(100_000)); \
             return new Response(new ReadableStream({ pull(c) { c.enqueue(new Uint8Array(10_000)); } }));";
        let engine = Engine::with(&handler(attack), &options).await;
        let (sender, body) = support::channel();
        let sending =
            tokio::task::spawn_local(async move { while sender.send(vec![0; 10_000].into()).await.is_ok() {} });
        let answer = engine.post("/", body).await;
        assert!(answer.text().contains("the body broke off: length limit exceeded"), "{}", answer.text());
        sending.await.unwrap();
        assert_eq!(engine.get("/fits").await.body.len(), 100_000);
        let answer = engine.get("/whole").await;
        assert_eq!((answer.status, answer.outcome()), (500, Some("response_bytes")));
        let answer = engine.get("/stream").await;
        assert_eq!((answer.status, answer.outcome(), answer.body.len()), (200, Some("response_bytes"), 100_000));
    });
}

#[test]
fn a_response_that_had_begun_says_why_it_breaks_off() {
    let limit = Options { cpu: Duration::from_millis(150), ..Options::default() };
    block_on(async {
        let attack = "let n = 0; return new Response(new ReadableStream({ async pull(c) { if (n++ === 2) for (;;); c.enqueue(new Uint8Array(10)); await new Promise((r) => setTimeout(r, 5)); } }));";
        let engine = Engine::with(&handler(attack), &limit).await;
        let answer = engine.get("/").await;
        assert_eq!((answer.status, answer.outcome(), answer.body.len()), (200, Some("cpu_time"), 20));
        assert_eq!(engine.text("/ok").await, "ok 0");
    });
}
