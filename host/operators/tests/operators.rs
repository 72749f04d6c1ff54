//! Operators from the outside: the contract, permissions by name, life.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use portcullis_operators::config::{KvConfig, SecretConfig, SecretSource};
use portcullis_operators::{ApplyError, Cause};

use support::{Host, Kind, Origin, eventually};

on_each_engine! {
    async the_contract_holds;
    async a_bundle_behaves_as_its_modules_would;
    async what_an_operator_cannot_load_is_explained;
    async an_exception_is_the_authors_to_see_and_not_the_clients;
    async outgoing_requests_go_where_they_may_and_nowhere_else;
    async outgoing_tls_is_checked_by_the_host;
    async subrequests_are_bounded_by_requests;
    async a_store_is_the_operators_own;
    async (flavor = "multi_thread", worker_threads = 2) a_new_version_takes_over_without_a_lost_request;
    async what_a_reload_takes_away_still_answers_those_who_hold_it;
    async a_request_is_waited_for_as_long_as_it_may_take;
    async (flavor = "multi_thread", worker_threads = 2) a_killed_process_costs_only_what_it_was_answering;
    async processes_come_with_demand_and_go_with_idleness;
    async a_request_waits_for_a_process_only_so_long;
    async stopping_answers_first_and_leaves_nothing;
    async dropping_the_handle_ends_every_process;
    async what_goes_on_after_a_response_is_waited_for_but_not_for_ever;
    async a_pinned_operator_has_its_cpu_to_itself;
    async a_process_is_in_a_control_group_of_its_own_if_it_says_so;
    async a_response_streams_as_it_is_made;
    async an_operator_runs_without_a_compiler;
    sync workers_with_runtimes_of_their_own_share_one_host;
}

async fn an_operator_runs_without_a_compiler(engine: Kind) {
    let host = Host::new(engine);
    let code = "export default { fetch() { return Response.json([typeof WebAssembly, /(a|b)+c/.test('abac')]); } };";
    host.serve(vec![host.operator("slow", code, |config| config.interpreter_only = true)]).await;
    assert_eq!(host.text("slow", "/").await, r#"["undefined",true]"#);
    let pids = host.pids("slow").await;
    // No page of it can be written and executed.
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", pids[0])).unwrap();
    assert!(maps.contains("r-xp") && !maps.contains("rwxp"), "{maps}");
}

const HELLO: &str =
    "export default { async fetch(request: Request) { return new Response('hello ' + request.url); } };";

async fn the_contract_holds(engine: Kind) {
    let host = Host::new(engine);
    let echo = host.operator(
        "echo",
        r#"
import { shout } from "./lib/shout";
interface Env { GREETING: string; files: { text(name: string): string } }
export default {
  prefix: "p",
  async fetch(request: Request, env: Env, ctx: { requestId: string | null; waitUntil(p: Promise<unknown>): void }) {
    const url = new URL(request.url);
    ctx.waitUntil(Promise.resolve());
    if (url.pathname === "/stream") {
      return new Response(request.body!.pipeThrough(new TransformStream()), { status: 201, headers: { "x-kept": "1" } });
    }
    return Response.json({
      method: request.method, url: request.url, body: await request.text(), id: ctx.requestId, self: this.prefix,
      greeting: shout(env.GREETING), file: env.files.text("data.txt"), frozen: Object.isFrozen(env),
      sub: request.headers.get("x-portcullis-sub"), globals: typeof Deno + typeof process + typeof Worker + typeof crypto.subtle,
    });
  },
};
"#,
        |config| {
            host.write("echo/lib/shout.ts", "export const shout = (text: string): string => text.toUpperCase();");
            host.write("data.txt", "contents");
            config.env.insert("GREETING".to_owned(), "hello".to_owned());
            config.read.insert("data.txt".to_owned(), "data.txt".into());
        },
    );
    host.serve(vec![echo]).await;
    let request = Request::post("https://api.example.com/a?b=c")
        .header("x-request-id", "r-1")
        .header("x-portcullis-sub", "alice")
        .body(Full::from("body"))
        .unwrap();
    let response = host.send("echo", request).await.unwrap();
    let found: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
    let expected = serde_json::json!({
        "method": "POST", "url": "https://api.example.com/a?b=c", "body": "body", "id": "r-1", "self": "p",
        "greeting": "HELLO", "file": "contents", "frozen": true, "sub": "alice",
        "globals": "undefinedundefinedundefinedobject",
    });
    assert_eq!(found, expected);
    let body: String = "x".repeat(500_000);
    let request = Request::post("http://a/stream").body(Full::from(body.clone())).unwrap();
    let response = host.send("echo", request).await.unwrap();
    assert_eq!((response.status(), response.headers()["x-kept"].as_bytes()), (StatusCode::CREATED, &b"1"[..]));
    assert_eq!(response.body().len(), body.len());
    assert_eq!(host.get("absent", "/").await.unwrap_err(), Cause::Unknown);
}

async fn a_bundle_behaves_as_its_modules_would(engine: Kind) {
    let host = Host::new(engine);
    host.write("m/a.ts", "import { b } from './b.ts'; export let count = 0; export function up() { count++; return b; } const name = 'a'; export const who = () => name; export default class { v = 1 }");
    host.write("m/b.ts", "import { who } from './a.ts'; const name = 'b'; export const b = () => name + who(); export * from './c.ts'; export { name as renamed };");
    host.write("m/c.ts", "export enum Color { Red = 'red' } const Response = 1; export const own = Response; export default 5; globalThis.order = (globalThis.order ?? '') + 'c';");
    host.write("m/data.json", r#"{"k":[1,"__proto__"]}"#);
    let operator = host.operator(
        "m",
        r#"
import A, { count, up } from "./a.ts";
import * as b from "./b.ts";
import five from "./c.ts";
import data from "./data.json" with { type: "json" };
const name = "main";
const obj = { count, name, five };
export default { fetch: () => { const f = up(); return Response.json([count, obj, f(), b.own, b.Color.Red, b.renamed, Object.keys(b), data.k, new A().v, name, globalThis.order]); } };
"#,
        |_| {},
    );
    host.serve(vec![operator]).await;
    assert_eq!(
        host.text("m", "/").await,
        r#"[1,{"count":0,"name":"main","five":5},"ba",1,"red","b",["Color","b","own","renamed"],[1,"__proto__"],1,"main","c"]"#
    );
}

async fn what_an_operator_cannot_load_is_explained(engine: Kind) {
    let host = Host::new(engine);
    let cases = [
        ("syntax", "export default {\n  fetch( {", "syntax/main.ts"),
        (
            "remote",
            "import x from 'https://e.example/x.ts';\nexport default { fetch: x };",
            "main.ts:1:15: `https://e.example/x.ts` is remote",
        ),
        (
            "throws",
            "const a: number = 1;\n\nthrow new Error('at the top ' + a);\nexport default { fetch() {} };",
            "Error: at the top 1\n    at main.ts:3:7",
        ),
        ("handler", "export default { handle() {} };", "needs `export default { async fetch(request, env, ctx)"),
        ("deep", "DEEP", "its nesting is too deep"),
        // Where it ends depends on the size of the parsers' stack frames: in the bundler, or behind it in V8.
        ("sum", "SUM", "its nesting is too deep|the process ended while its modules were loaded"),
        (
            "wait",
            "await new Promise(() => {});\nexport default { fetch() {} };",
            "did not run to their end within|Top-level await promise never resolved",
        ),
    ];
    for (name, code, expected) in cases {
        let code = match code {
            "DEEP" => format!("export default {};", "[".repeat(300_000)),
            "SUM" => format!("export default {}1;", "1+".repeat(200_000)),
            code => code.to_owned(),
        };
        let operator = host.operator(name, &code, |config| {
            config.limits.start = Duration::from_millis(if name == "wait" { 1_500 } else { 20_000 });
        });
        let errors = host.operators.apply(vec![operator]).await.unwrap_err();
        let text = errors[0].to_string();
        let explained = expected.split('|').any(|expected| text.contains(expected));
        assert!(explained || (name == "syntax" && text.contains("main.ts:2:")), "{name}: {text}");
        assert!(matches!(errors[0], ApplyError::Bundle { .. } | ApplyError::Load { .. }));
    }
    assert_eq!(host.operators.names(), Vec::<String>::new());
}

async fn an_exception_is_the_authors_to_see_and_not_the_clients(engine: Kind) {
    let host = Host::new(engine);
    let code = "function inner(): never {\n  throw new Error('private detail');\n}\nexport default { async fetch() { inner(); } };";
    host.serve(vec![host.operator("throws", code, |_| {})]).await;
    assert_eq!(host.get("throws", "/").await.unwrap_err(), Cause::Exception);
    eventually("the log shows the stack", async || host.log("throws").contains("at inner (main.ts:2:9)")).await;
    assert!(host.log("throws").contains("private detail"));
    assert_eq!(host.metric("portcullis_operator_failed_total.operator.throws.reason.operator_exception"), 1);
    let not = host.operator("not", "export default { fetch() { return 5; } };", |_| {});
    host.serve(vec![not]).await;
    assert_eq!(host.get("not", "/").await.unwrap_err(), Cause::Exception);

    let dev = Host::with(engine, |settings| settings.dev = true);
    dev.serve(vec![dev.operator("throws", code, |_| {})]).await;
    let request = Request::get("http://a/").body(Full::<Bytes>::default()).unwrap();
    let error = dev.operators.call("throws", request).await.unwrap_err();
    let expected = "Error: private detail\n    at inner (main.ts:2:9)\n    at Object.fetch (main.ts:4:34)";
    assert_eq!((error.cause, error.detail.as_deref()), (Cause::Exception, Some(expected)));
    assert!(String::from_utf8_lossy(error.to_response(None).body()).contains("private detail"));
    let asks = dev.operator("asks", "export default { fetch(_: Request, env: any) { return Response.json([env.kv, env.REGION, 'x' in env, Object.isFrozen(env)]); } };", |_| {});
    dev.serve(vec![asks]).await;
    assert_eq!(dev.text("asks", "/").await, "[null,null,false,true]");
    eventually("it is told", async || {
        dev.log("asks").contains("`env.REGION` is not there: add `REGION` to `env` or `secrets`")
    })
    .await;
    assert!(dev.log("asks").contains("`env.kv` is not there: add `kv: true` in its `permissions`"));
}

const FETCH: &str = r#"
export default { async fetch(request: Request, env: Record<string, string>) {
  const url = new URL(request.url).searchParams.get("url")!;
  try {
    const response = await fetch(url, { method: request.method, body: request.body, headers: { authorization: `Bearer ${env.TOKEN}`, "x-portcullis-sub": "forged" }, redirect: "follow" });
    return Response.json([response.status, response.url, await response.text()]);
  } catch (error) { return new Response(String(error)); }
} };
"#;

async fn outgoing_requests_go_where_they_may_and_nowhere_else(engine: Kind) {
    let origin = Origin::start().await;
    let elsewhere = Origin::start().await;
    let names = BTreeMap::from([("rebound.example", "127.0.0.1"), ("nowhere.example", "")]);
    let host = Host::with_resolver(engine, |_| {}, Arc::new(support::Names(names)));
    let port = origin.port;
    host.write("token", "s3cret-canary\n");
    let operator = host.operator("f", FETCH, |config| {
        config.net = vec![format!("rebound.example:{port}"), "nowhere.example:80".into(), "api.example.com:443".into()];
        config.private_net = vec![format!("127.0.0.1:{port}"), format!("localhost:{port}")];
        config.secrets.insert(
            "TOKEN".into(),
            SecretConfig { from: SecretSource::File("token".into()), hosts: vec![format!("127.0.0.1:{port}")] },
        );
        config.limits.subrequest_bytes = 1000;
        config.limits.subresponse_bytes = 100_000;
        config.limits.subrequest = Duration::from_millis(1_000);
        config.limits.subrequests = 5;
    });
    host.serve(vec![operator]).await;
    let base = format!("http://127.0.0.1:{port}");
    // The operator sees a placeholder; the origin the secret; nobody a forged identity.
    let text = host.text("f", &format!("/?url={base}/echo")).await;
    assert!(text.contains("bearer s3cret-canary") || text.contains("Bearer s3cret-canary"), "{text}");
    assert!(!text.contains("forged"), "{text}");
    let cases = [
        (format!("http://127.0.0.1:{}/", elsewhere.port), "needs net 127.0.0.1:".to_owned()),
        (
            "http://169.254.169.254/latest/meta-data/".into(),
            "needs net 169.254.169.254:80; add `169.254.169.254:80` to its `permissions.net`".into(),
        ),
        (format!("http://rebound.example:{port}/"), "secret `TOKEN` may not go to rebound.example".into()),
        ("http://nowhere.example/".into(), "secret `TOKEN` may not go".into()),
        (format!("http://[::ffff:127.0.0.1]:{port}/"), "needs net [::ffff:".into()),
        (format!("http://2130706433:{port}/echo"), "[200".into()), // the platform's URL makes it 127.0.0.1, which is granted
        ("file:///etc/passwd".into(), "`file:` addresses cannot be fetched".into()),
        ("ftp://127.0.0.1/".into(), "`ftp:` addresses cannot be fetched".into()),
        (format!("{base}/redirect?to=http://127.0.0.1:{}/", elsewhere.port), "needs net 127.0.0.1:".into()),
        (format!("{base}/redirect?to={base}/plain"), format!("[200,\"{base}/plain\",\"plain\"]")),
        (format!("{base}/redirect?to=/redirect"), "more than".into()),
        (format!("{base}/long"), "longer than 100000 bytes".into()),
        (format!("{base}/slow"), "longer than allowed".into()),
    ];
    for (url, expected) in cases {
        let text = host.text("f", &format!("/?url={url}")).await;
        assert!(text.contains(&expected), "{url}: expected `{expected}`, got `{text}`");
    }
    let request = Request::post(format!("http://a/?url={base}/plain")).body(Full::from(vec![0; 2000])).unwrap();
    let text = host.send("f", request).await.unwrap();
    assert!(String::from_utf8_lossy(text.body()).contains("longer than 1000 bytes"), "{text:?}");
    assert_eq!(elsewhere.connections(), 0, "something reached an address that was not granted");
    assert!(!host.log("f").contains("s3cret-canary"));

    // Without the secret in the way: refused for its address, after resolution.
    let rebound = host.operator("r", &FETCH.replace("`Bearer ${env.TOKEN}`", "'x'"), |config| {
        config.net = vec![format!("rebound.example:{port}"), "nowhere.example:80".into()];
        config.limits.subrequests = 3;
    });
    host.serve(vec![rebound]).await;
    let before = origin.connections();
    let text = host.text("r", &format!("/?url=http://rebound.example:{port}/")).await;
    assert!(text.contains("rebound.example is at a private address"), "{text}");
    let text = host.text("r", "/?url=http://nowhere.example/").await;
    assert!(text.contains("cannot be resolved"), "{text}");
    assert_eq!(origin.connections(), before);
}

async fn outgoing_tls_is_checked_by_the_host(engine: Kind) {
    let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let origin = Origin::start_tls(&key).await;
    let port = origin.port;
    for trusted in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let roots = folder.path().join("roots.pem");
        std::fs::write(&roots, key.cert.pem()).unwrap();
        let host = Host::with(engine, |settings| settings.extra_roots = trusted.then_some(roots));
        let operator = host.operator("f", FETCH, |config| config.private_net = vec![format!("localhost:{port}")]);
        host.serve(vec![operator]).await;
        let text = host.text("f", &format!("/?url=https://localhost:{port}/plain")).await;
        let expected = if trusted { "[200," } else { "cannot reach localhost" };
        assert!(text.starts_with(expected) || text.contains(expected), "{text}");
    }
}

async fn subrequests_are_bounded_by_requests(engine: Kind) {
    let origin = Origin::start().await;
    let host = Host::new(engine);
    let code = format!(
        "export default {{ async fetch() {{ let done = 0; try {{ for (;;) {{ await (await fetch('http://127.0.0.1:{}/plain')).text(); done++; }} }} catch (e) {{ return new Response(done + ' ' + e); }} }} }};",
        origin.port
    );
    let operator = host.operator("many", &code, |config| {
        config.private_net = vec![format!("127.0.0.1:{}", origin.port)];
        config.limits.subrequests = 7;
    });
    host.serve(vec![operator]).await;
    let text = host.text("many", "/").await;
    assert!(text.starts_with("7 TypeError: more than 7 outgoing requests and uses"), "{text}");
    assert_eq!(origin.connections(), 7);
}

const KV: &str = r#"
export default { async fetch(request: Request, env: any) {
  const url = new URL(request.url), key = decodeURIComponent(url.pathname.slice(1));
  try {
    if (request.method === "PUT") await env.kv.put(key, await request.text());
    if (request.method === "DELETE") await env.kv.delete(key);
    return Response.json([await env.kv.get(key), await env.kv.list("")]);
  } catch (error) { return new Response(String(error)); }
} };
"#;

async fn a_store_is_the_operators_own(engine: Kind) {
    let host = Host::new(engine);
    let grant = |config: &mut portcullis_operators::OperatorConfig| config.kv = Some(KvConfig { bytes_max: 2000 });
    let none = host.operator("none", KV, |_| {});
    host.serve(vec![host.operator("a", KV, grant), host.operator("b", KV, grant), none]).await;
    let put = |operator: &'static str, value: String| {
        let request = Request::put("http://x/..%2Fb%2Fkey").body(Full::from(value)).unwrap();
        let host = &host;
        async move { String::from_utf8(host.send(operator, request).await.unwrap().body().to_vec()).unwrap() }
    };
    assert_eq!(put("a", "canary".into()).await, r#"["canary",["../b/key"]]"#);
    assert_eq!(host.text("b", "/..%2Fb%2Fkey").await, "[null,[]]");
    assert!(put("a", "x".repeat(2000)).await.contains("its quota is 2000 bytes"));
    assert_eq!(host.text("a", "/..%2Fb%2Fkey").await, r#"["canary",["../b/key"]]"#);
    assert!(host.text("none", "/k").await.contains("TypeError"));
    let stored = std::fs::read_dir(host.folder.path().join("kv/a"))
        .unwrap()
        .flatten()
        .map(|entry| std::fs::read(entry.path()).unwrap());
    assert!(stored.into_iter().all(|bytes| !bytes.windows(6).any(|part| part == b"canary")));
    let request = Request::delete("http://x/..%2Fb%2Fkey").body(Full::default()).unwrap();
    assert_eq!(host.send("a", request).await.unwrap().body(), "[null,[]]");
}

/// Sends requests until told to stop; returns how many were answered, and every cause otherwise.
async fn load(
    host: Arc<Host>,
    operator: &'static str,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
) -> Vec<Cause> {
    let mut causes = Vec::new();
    while !stop.load(Ordering::Acquire) {
        match host.get(operator, "/").await {
            Ok(_) => drop(answered.fetch_add(1, Ordering::AcqRel)),
            Err(cause) => causes.push(cause),
        }
    }
    causes
}

async fn a_new_version_takes_over_without_a_lost_request(engine: Kind) {
    let host = Arc::new(Host::new(engine));
    let version = |number: u32| {
        let code = format!(
            "export default {{ async fetch() {{ await new Promise(r => setTimeout(r, 20)); return new Response('{number}'); }} }};"
        );
        host.operator("v", &code, |_| {})
    };
    host.serve(vec![version(0)]).await;
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> =
        (0..4).map(|_| tokio::spawn(load(Arc::clone(&host), "v", Arc::clone(&stop), Arc::clone(&answered)))).collect();
    let mut old = host.pids("v").await;
    for number in 1..4 {
        host.serve(vec![version(number)]).await;
        assert_eq!(host.text("v", "/").await, number.to_string());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // A version that does not load changes nothing.
    let broken = host.operator("v", "throw new Error('no');\nexport default { fetch() {} };", |_| {});
    assert!(host.operators.apply(vec![broken]).await.is_err());
    assert_eq!(host.text("v", "/").await, "3");
    // Nor does the same version again.
    let before = host.pids("v").await;
    host.serve(vec![version(3)]).await;
    old.retain(|pid| before.contains(pid));
    assert_eq!((old, host.pids("v").await), (Vec::new(), before));
    stop.store(true, Ordering::Release);
    for client in clients {
        assert_eq!(client.await.unwrap(), []);
    }
    assert!(answered.load(Ordering::Acquire) > 10);
}

/// A request that was sent on its way by the old configuration, and is held up before it reaches its operator.
async fn what_a_reload_takes_away_still_answers_those_who_hold_it(engine: Kind) {
    let host = Host::new(engine);
    let (kept, gone) = (host.operator("kept", HELLO, |_| {}), host.operator("gone", HELLO, |_| {}));
    host.serve(vec![kept.clone(), gone]).await;
    let before = host.operators.current();
    let pids = host.pids("gone").await;
    // A set that is dropped instead of committed changes nothing and leaves nothing.
    let other = host.operator("other", HELLO, |_| {});
    let dropped = host.operators.prepare(vec![kept.clone(), other]).await.unwrap();
    assert_eq!(host.operators.names(), ["gone", "kept"]);
    drop(dropped);
    eventually("what was started for it has ended", async || host.pids("other").await.is_empty()).await;
    // Neither does one with a mistake in it.
    let broken = host.operator("broken", "nonsense(;", |_| {});
    assert!(host.operators.prepare(vec![kept.clone(), broken]).await.is_err());
    assert_eq!(host.operators.names(), ["gone", "kept"]);

    let after = host.operators.prepare(vec![kept]).await.unwrap();
    host.operators.commit(&after).await;
    assert_eq!(host.get("gone", "/").await.unwrap_err(), Cause::Unknown);
    let request = Request::get("http://api.example.com/").body(Full::<Bytes>::default()).unwrap();
    assert_eq!(before.call("gone", request).await.unwrap().status(), 200);
    assert!(pids.iter().all(|pid| support::is_running(*pid)));
    drop(before);
    eventually("nobody holds it any more", async || pids.iter().all(|pid| !support::is_running(*pid))).await;
    assert!(host.text("kept", "/").await.starts_with("hello"));
}

/// How long the host lets requests go on at its own end does not matter to a version that is replaced.
async fn a_request_is_waited_for_as_long_as_it_may_take(engine: Kind) {
    let host = Host::with(engine, |settings| settings.drain = Duration::from_millis(1));
    let code = "export default { async fetch() { await new Promise(r => setTimeout(r, 1500)); return new Response('old'); } };";
    host.serve(vec![host.operator("v", code, |_| {})]).await;
    let (answer, ()) = tokio::join!(host.get("v", "/"), async {
        eventually("it is being answered", async || host.metric("portcullis_operator_requests_total.operator.v") == 1)
            .await;
        host.serve(vec![host.operator("v", HELLO, |_| {})]).await;
    });
    assert_eq!(answer.unwrap().body(), "old");
    assert!(host.text("v", "/").await.starts_with("hello"));
}

async fn a_killed_process_costs_only_what_it_was_answering(engine: Kind) {
    let host = Arc::new(Host::new(engine));
    let slow =
        "export default { async fetch() { await new Promise(r => setTimeout(r, 30)); return new Response('ok'); } };";
    host.serve(vec![host.operator("k", slow, |config| config.replicas.min = 2), host.operator("other", HELLO, |_| {})])
        .await;
    eventually("two processes", async || host.pids("k").await.len() == 2).await;
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| tokio::spawn(load(Arc::clone(&host), "k", Arc::clone(&stop), Arc::clone(&answered))))
        .chain([tokio::spawn(load(Arc::clone(&host), "other", Arc::clone(&stop), Arc::clone(&answered)))])
        .collect();
    eventually("some answers", async || answered.load(Ordering::Acquire) > 20).await;
    let victim = host.pids("k").await[0];
    rustix::process::kill_process(rustix::process::Pid::from_raw(victim).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    eventually("a replacement", async || {
        let pids = host.pids("k").await;
        pids.len() == 2 && !pids.contains(&victim)
    })
    .await;
    stop.store(true, Ordering::Release);
    let mut lost = Vec::new();
    for client in clients {
        lost.extend(client.await.unwrap());
    }
    assert!(lost.len() <= 4, "{lost:?}");
    assert!(lost.iter().all(|cause| *cause == Cause::Crashed), "{lost:?}");
    assert_eq!(host.metric("portcullis_operator_failed_total.operator.other.reason.operator_crashed"), 0);
}

async fn processes_come_with_demand_and_go_with_idleness(engine: Kind) {
    let host = Host::new(engine);
    let slow =
        "export default { async fetch() { await new Promise(r => setTimeout(r, 300)); return new Response('ok'); } };";
    let operator = host.operator("s", slow, |config| {
        config.replicas.min = 0;
        config.replicas.max = 3;
        config.replicas.idle = Duration::from_secs(1);
        config.limits.concurrency = 1;
    });
    host.serve(vec![operator]).await;
    let answers = tokio::join!(host.get("s", "/"), host.get("s", "/"), host.get("s", "/"));
    assert!(answers.0.is_ok() && answers.1.is_ok() && answers.2.is_ok(), "{answers:?}");
    eventually("none is left", async || host.pids("s").await.is_empty()).await;
    // One request, one process: who waits for it is not counted again once it is there.
    let before = host.metric("portcullis_operator_starts_total.operator.s");
    assert_eq!(host.text("s", "/").await, "ok");
    assert_eq!(host.metric("portcullis_operator_starts_total.operator.s"), before + 1);
}

/// Its first start is quick. A later one takes for ever, and a request waits for it only so long.
async fn a_request_waits_for_a_process_only_so_long(engine: Kind) {
    let host = Host::new(engine);
    let later = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap() + Duration::from_secs(4);
    let code = format!(
        "if (Date.now() > {}) await new Promise((r) => setTimeout(r, 60_000));\nexport default {{ fetch: () => new Response('ok') }};",
        later.as_millis()
    );
    let operator = host.operator("s", &code, |config| {
        config.replicas.min = 0;
        config.replicas.idle = Duration::from_millis(100);
        config.limits.start = Duration::from_secs(3);
    });
    host.serve(vec![operator]).await;
    assert_eq!(host.text("s", "/").await, "ok");
    eventually("it sleeps", async || host.pids("s").await.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(host.get("s", "/").await.unwrap_err(), Cause::StartTime);
    assert_eq!(Cause::StartTime.status(), 503);
}

async fn stopping_answers_first_and_leaves_nothing(engine: Kind) {
    let host = Host::new(engine);
    let slow =
        "export default { async fetch() { await new Promise(r => setTimeout(r, 300)); return new Response('ok'); } };";
    host.serve(vec![host.operator("s", slow, |_| {})]).await;
    let pids: Vec<i32> = host.operators.status().await.into_iter().map(|one| one.pid).collect();
    let (answer, ()) = tokio::join!(host.get("s", "/"), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        host.operators.stop().await;
    });
    assert_eq!(answer.unwrap().body(), "ok");
    eventually("all processes ended", async || pids.iter().all(|pid| !support::is_running(*pid))).await;
    assert!(matches!(host.get("s", "/").await, Err(Cause::Unknown | Cause::Stopping)));
    drop(host);
}

async fn what_goes_on_after_a_response_is_waited_for_but_not_for_ever(engine: Kind) {
    let host = Host::new(engine);
    let code = r#"
export default { fetch(request: Request, _: unknown, ctx: { waitUntil(p: Promise<unknown>): void }) {
  const later = request.url.endsWith("/ever") ? new Promise(() => {}) : new Promise((r) => setTimeout(r, 500)).then(() => console.log("done later"));
  ctx.waitUntil(later);
  return new Response("ok");
} };
"#;
    let replaced = |text: &str| host.operator("w", &code.replace("(\"ok\")", &format!("(\"{text}\")")), |_| {});
    host.serve(vec![replaced("one")]).await;
    let first = host.pids("w").await;
    assert_eq!(host.text("w", "/").await, "one");
    // Replaced at once: what was handed over still comes to its end.
    host.serve(vec![replaced("two")]).await;
    eventually("the first one has ended", async || first.iter().all(|pid| !support::is_running(*pid))).await;
    // What a process printed last is read a moment after its end.
    eventually("what was handed over was done", async || host.log("w").contains("done later")).await;
    // What never ends is ended.
    let second = host.pids("w").await;
    assert_eq!(host.text("w", "/ever").await, "two");
    host.operators.stop().await;
    assert!(second.iter().all(|pid| !support::is_running(*pid)));
}

async fn dropping_the_handle_ends_every_process(engine: Kind) {
    let host = Host::new(engine);
    host.serve(vec![host.operator("hello", HELLO, |_| {})]).await;
    eventually("one is prewarmed", async || host.operators.status().await.len() == 2).await;
    let pids: Vec<i32> = host.operators.status().await.into_iter().map(|one| one.pid).collect();
    drop(host);
    eventually("all processes ended", async || pids.iter().all(|pid| !support::is_running(*pid))).await;
}

async fn a_pinned_operator_has_its_cpu_to_itself(engine: Kind) {
    let cpus = std::thread::available_parallelism().unwrap().get();
    if cpus < 2 {
        // Refused then, which the configuration's own tests show.
        return;
    }
    let host = Host::new(engine);
    let pinned = host.operator("pinned", HELLO, |config| config.placement.cpus = vec![1]);
    host.serve(vec![pinned, host.operator("free", HELLO, |_| {})]).await;
    let allowed = |pid: i32| {
        let set = rustix::thread::sched_getaffinity(rustix::process::Pid::from_raw(pid)).unwrap();
        (0..cpus).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>()
    };
    assert_eq!(allowed(host.pids("pinned").await[0]), [1]);
    assert!(!allowed(host.pids("free").await[0]).contains(&1));
    for operator in ["pinned", "free"] {
        assert!(host.text(operator, "/").await.starts_with("hello"));
    }
}

/// Whether this machine has control groups and whether they bound anything here is not up to the test; that what the report says
/// is so, is.
async fn a_process_is_in_a_control_group_of_its_own_if_it_says_so(engine: Kind) {
    use portcullis_operators::jail::Layer;
    let host = Host::new(engine);
    host.serve(vec![host.operator("hello", HELLO, |_| {})]).await;
    let status = host.operators.status().await;
    let one = status.iter().find(|one| one.operator.is_some()).unwrap();
    let groups = |pid: String| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned()
    };
    let (own, its) = (groups("self".to_owned()), groups(one.pid.to_string()));
    let row = one.report.rows().find(|row| row.layer == Layer::ControlGroup).unwrap();
    if !one.report.is_active(Layer::ControlGroup) {
        assert_eq!(own, its);
        assert!(!row.reason().is_empty());
        return;
    }
    assert_ne!(own, its);
    assert!(its.contains("/portcullis-"), "{its}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap().split(' ').nth(4).unwrap();
    let folder = std::path::PathBuf::from(format!("{mount}{its}"));
    for (controller, file, unbounded) in
        [("memory", "memory.max", "max"), ("pids", "pids.max", "max"), ("cpu", "cpu.max", "max 100000")]
    {
        match std::fs::read_to_string(folder.join(file)) {
            Ok(value) => assert_ne!(value.trim(), unbounded),
            Err(_) => assert!(row.reason().contains(controller), "{file} is missing, but {:?}", row.state),
        }
    }
    host.operators.stop().await;
    eventually("the groups are gone", async || !folder.exists() && !folder.parent().unwrap().exists()).await;
}

fn workers_with_runtimes_of_their_own_share_one_host(engine: Kind) {
    let setup = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let host = Arc::new(Host::new(engine));
    // Blocking is allowed anywhere, also where a runtime is running.
    let set = setup
        .block_on(async { host.operators.prepare_blocking(vec![host.operator("hello", HELLO, |_| {})]) })
        .unwrap_or_else(|errors| panic!("{errors:?}"));
    setup.block_on(host.operators.commit(&set));
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let host = Arc::clone(&host);
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    for _ in 0..100 {
                        assert_eq!(host.text("hello", "/").await, "hello http://api.example.com/");
                    }
                });
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    assert_eq!(host.metric("portcullis_operator_requests_total.operator.hello"), 300);
}

async fn a_response_streams_as_it_is_made(engine: Kind) {
    let host = Host::new(engine);
    let code = r#"export default { fetch() { let n = 0; return new Response(new ReadableStream({ async pull(c) { if (n++) await new Promise(r => setTimeout(r, 50)); if (n > 3) return c.close(); c.enqueue(new TextEncoder().encode("part" + n)); } })); } };"#;
    host.serve(vec![host.operator("stream", code, |_| {})]).await;
    let request = Request::get("http://a/").body(Full::<Bytes>::default()).unwrap();
    let mut body = host.operators.call("stream", request).await.unwrap().into_body();
    let mut parts = Vec::new();
    while let Some(frame) = body.frame().await {
        parts.push(String::from_utf8(frame.unwrap().into_data().unwrap().to_vec()).unwrap());
    }
    assert_eq!(parts, ["part1", "part2", "part3"]);
}
