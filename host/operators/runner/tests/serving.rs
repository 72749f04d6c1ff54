//! Requests, bodies, calls to the host, and the life of the process.

mod support;

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use support::{Engine, OnThisThread, Options, block_on, channel, full};

#[test]
fn a_request_is_what_the_client_sent_and_an_answer_what_the_handler_returned() {
    block_on(async {
        let code = r#"export default { async fetch(request, env, ctx) {
  const headers = new Headers({ "x-a": "1" }); headers.append("set-cookie", "a=1"); headers.append("set-cookie", "b=2"); headers.set("x-latin", "\xe4");
  return new Response(JSON.stringify([request.method, request.url, [...request.headers], await request.text(), ctx.requestId, env.NAME]), { status: 207, headers });
} };"#;
        let env = [("NAME".to_owned(), "value".to_owned())].into();
        let engine = Engine::with(code, &Options { env, ..Options::default() }).await;
        for size in [0, 10, 60_000, 70_000, 1_000_000] {
            let body = "y".repeat(size);
            let request = Request::put("https://api.example.com:8443/a%20b?c=d&e")
                .header("x-request-id", "r-1")
                .header("x-latin", http::HeaderValue::from_bytes(b"\xe4").unwrap())
                .body(full(body.clone()))
                .unwrap();
            let answer = engine.send(request).await;
            assert_eq!(answer.status, 207);
            assert_eq!(answer.headers.get_all("set-cookie").iter().count(), 2);
            assert_eq!(answer.headers["x-latin"].as_bytes(), b"\xe4");
            let found: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
            assert_eq!(
                (found[0].as_str(), found[1].as_str()),
                (Some("PUT"), Some("https://api.example.com:8443/a%20b?c=d&e"))
            );
            assert_eq!(
                (found[3].as_str(), found[4].as_str(), found[5].as_str()),
                (Some(&*body), Some("r-1"), Some("value"))
            );
            assert!(found[2].as_array().unwrap().contains(&serde_json::json!(["x-latin", "\u{e4}"])), "{}", found[2]);
            // What lies between host and engine is not the operator's.
            assert!(!found[2].to_string().contains("\"te\""), "{}", found[2]);
        }
    });
}

#[test]
fn bodies_flow_both_ways_no_faster_than_they_are_taken() {
    block_on(async {
        let code = r#"
let pulled = 0;
export default { async fetch(request) {
  const path = new URL(request.url).pathname;
  if (path === "/pulled") return new Response(String(pulled));
  if (path === "/echo") return new Response(request.body);
  if (path === "/unread") { await new Promise((r) => setTimeout(r, 300)); return new Response("unread"); }
  return new Response(new ReadableStream({ pull(c) { pulled++; c.enqueue(new Uint8Array(64 << 10)); } }));
} };"#;
        let options = Options { request_bytes: 1 << 30, response_bytes: 1 << 30, ..Options::default() };
        let engine = Engine::with(code, &options).await;
        // Down: nobody reads, so little is made.
        let request = Request::get("http://a/").body(full("")).unwrap();
        let response = engine.connect().await.send_request(request).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let pulled: u32 = engine.text("/pulled").await.parse().unwrap();
        assert!(pulled < 40, "{pulled} chunks were made for nobody");
        drop(response);
        // Up: nobody reads, so little is taken.
        let (sender, body) = channel();
        let sending = tokio::task::spawn_local(async move {
            let mut sent = 0;
            while sender.send(Bytes::from(vec![1; 64 << 10])).await.is_ok() {
                sent += 1;
            }
            sent
        });
        assert_eq!(engine.post("/unread", body).await.text(), "unread");
        let sent = sending.await.unwrap();
        assert!(sent < 40, "{sent} chunks were taken for nobody");
        // Through: what goes in comes out.
        let (sender, body) = channel();
        let sending = tokio::task::spawn_local(async move {
            for number in 0..100_u8 {
                sender.send(Bytes::from(vec![number; 10_000])).await.unwrap();
            }
        });
        let answer = engine.post("/echo", body).await;
        sending.await.unwrap();
        assert_eq!(answer.body.len(), 1_000_000);
        assert!(
            answer
                .body
                .chunks(10_000)
                .enumerate()
                .all(|(number, chunk)| chunk.iter().all(|byte| usize::from(*byte) == number))
        );
    });
}

#[test]
fn many_requests_share_one_connection_of_http2() {
    block_on(async {
        let code = "export default { async fetch(request) { await new Promise((r) => setTimeout(r, 20)); return new Response(request.url + await request.text()); } };";
        let engine = Engine::with(code, &Options::default()).await;
        let stream = tokio::net::UnixStream::connect(engine.socket()).await.unwrap();
        let (sender, connection) =
            hyper::client::conn::http2::handshake(OnThisThread, TokioIo::new(stream)).await.unwrap();
        tokio::task::spawn_local(connection);
        let asked: Vec<_> = (0..20)
            .map(|number| {
                let mut sender = sender.clone();
                tokio::task::spawn_local(async move {
                    let request = Request::post(format!("http://api.example.com/{number}")).body(full("!")).unwrap();
                    sender.ready().await.unwrap();
                    let body = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap();
                    assert_eq!(body.to_bytes(), format!("http://api.example.com/{number}!"));
                })
            })
            .collect();
        for one in asked {
            one.await.unwrap();
        }
    });
}

#[test]
fn a_client_that_goes_is_noticed() {
    block_on(async {
        let code = "let aborted = 0; export default { async fetch(request) { if (request.url.endsWith('/aborted')) return new Response(String(aborted)); request.signal.addEventListener('abort', () => { aborted++; }); await new Promise(() => {}); } };";
        let engine = Engine::with(code, &Options::default()).await;
        let mut sender = engine.connect().await;
        let request = Request::get("http://a/wait").body(full("")).unwrap();
        let gone = tokio::time::timeout(Duration::from_millis(200), sender.send_request(request)).await;
        assert!(gone.is_err());
        drop(sender);
        while engine.text("/aborted").await != "1" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

#[test]
fn fetch_is_the_platforms() {
    block_on(async {
        let code = r#"
const base = "http://origin.example/";
const cases = {
  plain: async () => { const r = await fetch(base + "plain"); return [r.status, r.ok, r.url, r.redirected, await r.text()]; },
  post: async () => (await fetch(base + "echo", { method: "POST", body: "text" })).text(),
  form: async () => { const f = new FormData(); f.set("a", "b"); return (await (await fetch(base + "echo", { method: "POST", body: f })).text()).includes('name="a"'); },
  stream: async () => (await fetch(base + "echo", { method: "POST", body: new ReadableStream({ start(c) { c.enqueue(new TextEncoder().encode("in ")); c.enqueue(new TextEncoder().encode("pieces")); c.close(); } }), duplex: "half" })).text(),
  request: async () => (await fetch(new Request(base + "echo", { method: "PUT", body: new Uint8Array([104, 105]) }))).text(),
  redirect: async () => { const r = await fetch(base + "redirect"); return [r.url, r.redirected, await r.text()]; },
  manual: async () => { const r = await fetch(base + "redirect", { redirect: "manual" }); return [r.status, r.headers.get("location")]; },
  error: async () => fetch(base + "redirect", { redirect: "error" }),
  gzip: async () => { const r = await fetch(base + "gzip"); return [r.headers.get("content-encoding"), await r.text()]; },
  json: async () => (await fetch("data:application/json,%7B%22a%22%3A1%7D")).json(),
  blob: async () => (await fetch(URL.createObjectURL(new Blob(["blob"])))).text(),
  refused: async () => fetch("http://elsewhere.example/"),
  scheme: async () => fetch("ftp://origin.example/"),
  relative: async () => fetch("/plain"),
  timeout: async () => fetch(base + "never", { signal: AbortSignal.timeout(20) }),
  abort: async () => { const c = new AbortController(); const p = fetch(base + "never", { signal: c.signal }); c.abort(new Error("mine")); return p; },
  abort_body: async () => { const c = new AbortController(); const r = await fetch(base + "endless", { signal: c.signal }); const reader = r.body.getReader(); await reader.read(); c.abort(new Error("mine")); for (;;) if ((await reader.read()).done) return "ended"; },
  cancel_body: async () => { const r = await fetch(base + "endless"); await r.body.cancel(); return "cancelled"; },
  no_body: async () => { const r = await fetch(base + "plain", { method: "HEAD" }); return r.status; },
};
export default { async fetch() {
  const found = {};
  for (const [name, run] of Object.entries(cases)) { try { found[name] = await run(); } catch (error) { found[name] = String(error); } }
  return Response.json(found);
} };"#;
        let engine = Engine::with(code, &Options::default()).await;
        let found: serde_json::Value = serde_json::from_str(&engine.text("/").await).unwrap();
        let expected = serde_json::json!({
            "plain": [200, true, "http://origin.example/plain", false, "GET http://origin.example/plain"],
            "post": "text", "form": true, "stream": "in pieces", "request": "hi",
            "redirect": ["http://origin.example/plain", true, "GET http://origin.example/plain"],
            "manual": [302, "/plain"],
            "error": "TypeError: `http://origin.example/redirect` answered with a redirect",
            "gzip": ["gzip", "gzip of this"], "json": { "a": 1 }, "blob": "blob",
            "refused": "TypeError: needs net elsewhere.example:80",
            "scheme": "TypeError: `ftp:` addresses cannot be fetched",
            "relative": "TypeError: Invalid URL: '/plain'",
            "timeout": "TimeoutError: The operation was aborted due to timeout", "abort": "Error: mine", "abort_body": "Error: mine",
            "cancel_body": "cancelled", "no_body": 200,
        });
        for (name, value) in expected.as_object().unwrap() {
            assert_eq!(found[name], *value, "{name}");
        }
        for (_, path, fields) in engine.asked.borrow().iter() {
            assert_eq!(path, "/fetch");
            assert_eq!(fields["user-agent"], "Portcullis");
            assert!(!fields.contains_key("host") && fields.contains_key("x-portcullis-url"), "{fields:?}");
        }
    });
}

#[test]
fn the_store_keeps_text_and_bytes() {
    block_on(async {
        let code = "export default { async fetch(_, env) { await env.kv.put('a/b', 't\\u00e4xt'); await env.kv.put('c', new Uint8Array([0, 255])); await env.kv.delete('d'); return Response.json([await env.kv.get('a/b'), [...await env.kv.getBytes('c')], await env.kv.get('none'), await env.kv.getBytes('none'), await env.kv.list()]); } };";
        let engine = Engine::with(code, &Options { kv: true, ..Options::default() }).await;
        assert_eq!(engine.text("/").await, r#"["täxt",[0,255],null,null,["a%2Fb","c","d"]]"#.replace(",\"d\"", ""));
    });
}

#[test]
fn stacks_have_positions_in_the_operators_own_files() {
    block_on(async {
        // Line 1 of the bundle is line 7 of `lib/a.ts`, line 2 is line 1 of `main.ts`.
        let code = "function inner() { throw new Error('here'); }\nexport default { fetch(request) { if (request.url.endsWith('/stack')) { try { inner(); } catch (error) { return new Response(error.stack); } } inner(); } };";
        let map = r#"{"version":3,"sources":["lib/a.ts","main.ts"],"names":[],"mappings":"AAMA;ACNA"}"#;
        let engine = Engine::with(code, &Options { map: Some(map.to_owned()), dev: true, ..Options::default() }).await;
        let stack = engine.text("/stack").await;
        assert!(stack.contains("lib/a.ts:7:1") && stack.contains("main.ts:1:1"), "{stack}");
        let answer = engine.get("/").await;
        assert!(
            answer.text().contains("at inner (lib/a.ts:7:1)\n    at Object.fetch (main.ts:1:1)"),
            "{}",
            answer.text()
        );
        engine.wait_for_log("at inner (lib/a.ts:7:1)").await;
    });
}

#[test]
fn code_that_cannot_be_taken_is_explained_and_nothing_is_taken_twice() {
    block_on(async {
        let cases = [
            ("export default {", "SyntaxError: Unexpected end of input"),
            ("throw new Error('at the top');", "Error: at the top"),
            ("export default { handle() {} };", "TypeError: the entry module needs `export default"),
            ("export const a = 1;", "TypeError: the entry module needs `export default"),
            (
                "import 'node:fs'; export default { fetch() {} };",
                "`node:fs` cannot be imported: an operator is one module",
            ),
            ("await new Promise(() => {}); export default { fetch() {} };", "Top-level await promise never resolved"),
        ];
        for (code, expected) in cases {
            let engine = Engine::start(&[]).await;
            let answer = engine.load(code, &Options::default()).await;
            assert_eq!(answer.status, 422);
            assert!(answer.text().contains(expected), "{code}: {}", answer.text());
            assert_eq!(engine.get("/").await.status, 503);
        }
        let engine = Engine::start(&[]).await;
        assert_eq!(engine.get("/").await.status, 503);
        let ok = "export default { fetch: () => new Response('first') };";
        assert_eq!(engine.load(ok, &Options::default()).await.status, 200);
        let answer = engine.load("export default { fetch: () => new Response('second') };", &Options::default()).await;
        assert!(answer.status == 422 && answer.text().contains("has an operator already"), "{}", answer.text());
        assert_eq!(engine.text("/").await, "first");
        let nonsense = Request::post("http://portcullis.internal/load").body(full("{")).unwrap();
        assert_eq!(engine.send(nonsense).await.status, 422);
        let ping = Request::get("http://portcullis.internal/ping").body(full("")).unwrap();
        assert_eq!(engine.send(ping).await.status, 204);
        let other = Request::get("http://portcullis.internal/other").body(full("")).unwrap();
        assert_eq!(engine.send(other).await.status, 404);
    });
}

#[test]
fn what_was_handed_to_wait_until_is_waited_for() {
    block_on(async {
        let code = "export default { fetch(request, env, ctx) { ctx.waitUntil(new Promise((r) => setTimeout(r, 300)).then(() => console.log('finished'))); ctx.waitUntil(Promise.reject(new Error('told'))); return new Response('ok'); } };";
        let mut engine = Engine::with(code, &Options::default()).await;
        assert_eq!(engine.text("/").await, "ok");
        engine.terminate();
        assert!(engine.ended().await.success());
        assert!(engine.log().contains("finished") && engine.log().contains("Error: told"), "{}", engine.log());
        let mut idle = Engine::with(code, &Options::default()).await;
        idle.terminate();
        assert!(idle.ended().await.success());
    });
}

#[test]
fn uncaught_exceptions_are_lines_in_the_log_and_events() {
    block_on(async {
        let code = "addEventListener('unhandledrejection', (event) => { if (event.reason?.message === 'mine') event.preventDefault(); console.log('event', event.reason?.message); });\n\
             export default { async fetch() { setTimeout(() => { throw new Error('in a timer'); }); queueMicrotask(() => { throw new Error('in a microtask'); }); reportError(new Error('reported')); Promise.reject(new Error('rejected')); Promise.reject(new Error('mine')); new EventTarget().dispatchEvent(new Event('x')); await new Promise((r) => setTimeout(r, 30)); return new Response('ok'); } };";
        let mut engine = Engine::with(code, &Options::default()).await;
        assert_eq!(engine.text("/").await, "ok");
        for text in [
            "Error: in a timer",
            "Error: in a microtask",
            "Error: reported",
            "Error: rejected",
            "event rejected",
            "event mine",
        ] {
            engine.wait_for_log(text).await;
        }
        assert!(!engine.log().contains("Error: mine"), "{}", engine.log());
        assert!(engine.is_running());
    });
}

#[test]
fn a_flood_of_log_lines_costs_lines_and_no_time() {
    block_on(async {
        let code = "export default { fetch() { for (let i = 0; i < 50_000; i++) console.log('x'.repeat(200)); return new Response('ok'); } };";
        let engine = Engine::with(code, &Options::default()).await;
        assert_eq!(engine.text("/").await, "ok");
        engine.text("/").await;
        let log = engine.log();
        assert!(log.lines().count() < 100_000);
    });
}
