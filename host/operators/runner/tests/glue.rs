//! An operator that changes the language's own objects breaks itself, and nothing of ours.

mod support;

use support::{Engine, Options, block_on, full};

/// Everything that our scripts could be tempted to use, made to throw or to lie, after the operator took what it needs itself.
const PATCHES: &str = r#"
const patch = (object, name, value) => { try { Object.defineProperty(object, name, { value, writable: true, configurable: true }); } catch {} };
const lie = function () { globalThis.noticed = (globalThis.noticed ?? 0) + 1; throw new Error("patched"); };
const { defineProperty, getOwnPropertyDescriptor, ownKeys } = Reflect;
const prototypeOfObjects = Object.prototype;
export function breakEverything() {
  const prototypes = [Array, Object, Function, Promise, Map, Set, WeakMap, WeakSet, String, RegExp, Number, Uint8Array, ArrayBuffer, Error, Headers, Request, Response, ReadableStream, ReadableStreamDefaultReader, URL, URLSearchParams, AbortSignal, EventTarget, Event, TextEncoder, TextDecoder, Blob].map((one) => one.prototype);
  prototypes.push(Object.getPrototypeOf(Uint8Array.prototype), Object.getPrototypeOf([][Symbol.iterator]()), Object.getPrototypeOf(new Map()[Symbol.iterator]()), Object.getPrototypeOf(new Set()[Symbol.iterator]()));
  const targets = [...prototypes, Object, Reflect, JSON, Promise, Array, Symbol, Math, String, Number];
  // By number: the iterators break with the first array.
  for (let i = 0; i < targets.length; i++) {
    const target = targets[i];
    const keys = ownKeys(target);
    for (let j = 0; j < keys.length; j++) {
      const key = keys[j];
      if (key === "constructor" || key === "prototype" || key === "length" || key === "name") continue;
      const descriptor = getOwnPropertyDescriptor(target, key);
      if (!descriptor.configurable) continue;
      if (descriptor.get) defineProperty(target, key, { __proto__: null, get: lie, set: lie, configurable: true });
      else if (typeof descriptor.value === "function") defineProperty(target, key, { __proto__: null, value: lie, configurable: true, writable: true });
    }
  }
  // Whoever looks up what is not there finds these. Not `then`, which the language asks every answer for, nor
  // "0", which it asks every array that grows.
  const looked = ["get", "set", "value", "done", "status", "client", "body", "signal", "reason", "cause", "type", "highWaterMark", "enumerable"];
  for (let i = 0; i < looked.length; i++) {
    defineProperty(prototypeOfObjects, looked[i], { __proto__: null, get: lie, set: lie, configurable: true });
  }
  const names = ["Request", "Response", "Headers", "Promise", "Object", "Array", "Map", "TypeError", "Error", "console", "setTimeout", "queueMicrotask", "URL", "fetch", "String", "Uint8Array"];
  for (let i = 0; i < names.length; i++) {
    defineProperty(globalThis, names[i], { __proto__: null, value: undefined, configurable: true, writable: true });
  }
}
"#;

fn operator(handler: &str) -> String {
    let patches = PATCHES.replace("export function", "function");
    // What the operator itself needs it takes first, as the platform's scripts did.
    format!(
        "{patches}\nconst {{ Response, fetch, Promise }} = globalThis;\nconst ok = (text) => new Response(text);\nconst responses = {{ plain: ok('plain') }};\nlet broken = false;\n\
         export default {{ async fetch(request, env, ctx) {{ if (!broken) {{ broken = true; breakEverything(); }}\n{handler}\n}} }};"
    )
}

#[test]
fn answers_go_out_and_requests_come_in() {
    block_on(async {
        let handler = "const response = responses.plain; responses.plain = null; return response;";
        let engine = Engine::with(&operator(handler), &Options::default()).await;
        assert_eq!(engine.text("/").await, "plain");
        // From here on the platform's own constructors may be broken, which is the operator's loss: a failure, told as one.
        let answer = engine.get("/").await;
        assert_eq!((answer.status, answer.outcome()), (500, Some("exception")));
        let answer = engine.post("/", full("body")).await;
        assert_eq!((answer.status, answer.outcome()), (500, Some("exception")));
        // It broke the words for it, too.
        engine.wait_for_log("an exception that cannot be described").await;
    });
}

#[test]
fn exceptions_are_told_and_the_store_and_fetch_still_reach_only_the_host() {
    block_on(async {
        let handler = "let text = ''; try { await fetch('http://origin.example/plain'); text += 'fetched '; } catch { text += 'failed '; } try { await env.kv.put('k', 'v'); } catch { text += 'store '; } ctx.waitUntil(null); throw text;";
        let engine = Engine::with(&operator(handler), &Options { kv: true, ..Options::default() }).await;
        for _ in 0..2 {
            let answer = engine.get("/").await;
            assert_eq!((answer.status, answer.outcome(), answer.text().as_str()), (500, Some("exception"), ""));
        }
        for (_, path, fields) in engine.asked.borrow().iter() {
            assert!(path == "/fetch" || path.starts_with("/kv/"), "{path}");
            assert!(
                fields.get("x-portcullis-url").is_none_or(|url| url == "http://origin.example/plain"),
                "{fields:?}"
            );
        }
    });
}

/// Spies instead of saboteurs: nothing passes through the language's own objects that is not the operator's.
#[test]
fn spies_see_nothing_of_the_glue() {
    block_on(async {
        let code = r#"
const seen = [];
const { stringify } = JSON;
const { apply } = Reflect;
let busy = false;
const note = (a) => { try { seen[seen.length] = typeof a === "function" ? "function " + a.name : typeof a === "string" ? a : stringify(a) ?? typeof a; } catch {} };
const spied = (old) => function (...args) { if (!busy) { busy = true; note(this); for (let i = 0; i < args.length; i++) note(args[i]); busy = false; } return apply(old, this, args); };
const { defineProperty, getOwnPropertyDescriptor, ownKeys } = Reflect;
const spyOn = (object) => {
  for (const key of ownKeys(object)) {
    const descriptor = getOwnPropertyDescriptor(object, key);
    if (!descriptor.configurable || key === "constructor") continue;
    for (const part of ["value", "get", "set"]) if (typeof descriptor[part] === "function") descriptor[part] = spied(descriptor[part]);
    defineProperty(object, key, descriptor);
  }
};
const all = [Object, Array, Map, Set, WeakMap, WeakSet, String, RegExp, Number, Boolean, Symbol, Promise, Function, Error, TypeError, ArrayBuffer, Uint8Array, Object.getPrototypeOf(Uint8Array), Date, Headers, Request, Response, ReadableStream, ReadableStreamDefaultReader, ReadableByteStreamController, ReadableStreamDefaultController, URL, URLSearchParams, AbortSignal, AbortController, EventTarget, Event, TextEncoder, TextDecoder, Blob].flatMap((one) => [one, one.prototype]);
all.push(Reflect, JSON, Math, console, performance);
for (const made of [[], new Map(), new Set(), "", new Headers()]) all.push(Object.getPrototypeOf(made[Symbol.iterator]()));
all.push(Object.getPrototypeOf(Object.getPrototypeOf([][Symbol.iterator]())), Object.getPrototypeOf((function* () {})()), Object.getPrototypeOf((async function* () {})()));
for (const object of all) spyOn(object);
for (const name of Object.getOwnPropertyNames(globalThis)) if (typeof globalThis[name] === "function" && !globalThis[name].prototype) globalThis[name] = spied(globalThis[name]);
for (const name of ["value", "done", "status", "type", "op", "core", "ops", "then"]) defineProperty(Object.prototype, name, { __proto__: null, configurable: true, get() { if (!busy) { busy = true; note(this); busy = false; } return undefined; }, set(value) { if (!busy) { busy = true; note(this); note(value); busy = false; } defineProperty(this, name, { __proto__: null, value, writable: true, configurable: true, enumerable: true }); } });
export default { async fetch(request, env, ctx) {
  await (await fetch("http://origin.example/plain", { headers: { a: "b" } })).text();
  await fetch("http://origin.example/echo", { method: "POST", body: new ReadableStream({ pull(c) { c.enqueue(new Uint8Array(3)); c.close(); } }), duplex: "half" });
  await fetch("data:text/plain,hello");
  const key = await crypto.subtle.generateKey({ name: "HMAC", hash: "SHA-256" }, true, ["sign"]);
  await crypto.subtle.sign("HMAC", key, new Uint8Array(3));
  await new Response(new Blob(["x"]).stream().pipeThrough(new CompressionStream("gzip"))).arrayBuffer();
  structuredClone({ a: 1 });
  console.log("%o", { a: [1] }, new Map([[1, 2]]));
  const { port1, port2 } = new MessageChannel();
  port1.postMessage("x");
  port2.close();
  reportError(new Error("reported"));
  await new Promise((resolve) => setTimeout(resolve, 1));
  Promise.reject(new Error("rejected"));
  await env.kv.put("key", "value");
  ctx.waitUntil(new Promise((resolve) => setTimeout(resolve, 1)));
  busy = true;
  const text = seen.filter((text) => /\bop_|async_op|\bdispatch\b|portcullis|\/fetch|\/kv|host\.sock/.test(text)).join("\n");
  const count = seen.length;
  busy = false;
  return new Response(count > 100 ? text : "the spies saw too little: " + count);
} };
"#;
        let engine = Engine::with(code, &Options { kv: true, ..Options::default() }).await;
        for _ in 0..3 {
            assert_eq!(engine.text("/").await, "");
        }
    });
}
