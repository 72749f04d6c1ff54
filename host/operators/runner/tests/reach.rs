//! What an operator's code can get hold of.

mod support;

use std::collections::BTreeSet;

use support::{Engine, Options, block_on};

/// The names of the global object beside ECMAScript's own. A new one is a decision.
const GLOBALS: &str = "\
AbortController AbortSignal Blob ByteLengthQueuingStrategy CompressionStream CountQueuingStrategy Crypto CryptoKey CustomEvent \
DOMException DecompressionStream ErrorEvent Event EventTarget File FormData Headers MessageChannel MessageEvent MessagePort \
Navigator Performance PerformanceEntry PerformanceMark PerformanceMeasure PerformanceObserver PerformanceObserverEntryList \
ProgressEvent PromiseRejectionEvent QuotaExceededError ReadableByteStreamController ReadableStream ReadableStreamBYOBReader \
ReadableStreamBYOBRequest ReadableStreamDefaultController ReadableStreamDefaultReader Request Response SubtleCrypto TextDecoder \
TextDecoderStream TextEncoder TextEncoderStream TransformStream TransformStreamDefaultController URL URLPattern \
URLSearchParams WebAssembly WritableStream WritableStreamDefaultController WritableStreamDefaultWriter atob btoa clearInterval \
clearTimeout console crypto fetch navigator onerror onrejectionhandled onunhandledrejection performance queueMicrotask \
reportError self setInterval setTimeout structuredClone";

/// ECMA-262 and ECMA-402, annex B included, in the edition that V8 has.
const LANGUAGE: &str = "\
AggregateError Array ArrayBuffer AsyncDisposableStack Atomics BigInt BigInt64Array BigUint64Array Boolean DataView Date \
DisposableStack Error EvalError FinalizationRegistry Float16Array Float32Array Float64Array Function Infinity Int16Array \
Int32Array Int8Array Intl Iterator JSON Map Math NaN Number Object Promise Proxy RangeError ReferenceError Reflect RegExp Set \
String SuppressedError Symbol SyntaxError TypeError URIError Uint16Array Uint32Array Uint8Array Uint8ClampedArray WeakMap \
WeakRef WeakSet decodeURI decodeURIComponent encodeURI encodeURIComponent escape eval globalThis isFinite isNaN parseFloat \
parseInt undefined unescape";

/// Walks everything that can be reached by properties, prototypes, getters and the arguments of the handler.
const WALK: &str = r#"
const found = { names: Object.getOwnPropertyNames(globalThis), functions: [], suspects: [] };
const seen = new Set();
const queue = [];
const add = (value, path) => {
  if ((typeof value === "object" && value !== null) || typeof value === "function") {
    if (!seen.has(value)) { seen.add(value); queue.push([value, path]); }
  }
};
export default { async fetch(request, env, ctx) {
  add(globalThis, "globalThis"); add(request, "request"); add(env, "env"); add(ctx, "ctx");
  add(new Response("x"), "response"); add((async () => {})(), "promise"); add(function* () {}(), "generator");
  add((async function* () {})(), "async generator"); add(await fetch("http://origin.example/plain"), "fetched");
  add(new AbortController().signal, "signal"); add(new MessageChannel().port1, "port"); add(crypto.subtle, "subtle");
  add(await crypto.subtle.generateKey({ name: "AES-GCM", length: 128 }, true, ["encrypt"]), "key");
  try { null.x; } catch (error) { add(error, "error"); }
  while (queue.length > 0) {
    const [value, path] = queue.pop();
    if (typeof value === "function") {
      found.functions.push(value.name);
      if (/^(op_|async_op)/.test(value.name)) found.suspects.push(path);
    }
    for (const name of ["ops", "core", "primordials", "internals", "loadExtScript", "__bootstrap", "Deno", "print", "opNames"]) {
      if (Object.prototype.hasOwnProperty.call(value, name)) found.suspects.push(path + "." + name);
    }
    add(Object.getPrototypeOf(value), path + ".__proto__");
    for (const key of Reflect.ownKeys(value)) {
      const descriptor = Object.getOwnPropertyDescriptor(value, key);
      const at = path + "." + String(key);
      add(descriptor.value, at); add(descriptor.get, at + " (get)"); add(descriptor.set, at + " (set)");
      if (descriptor.get) { try { add(descriptor.get.call(value), at); } catch {} }
    }
  }
  found.count = seen.size;
  return Response.json(found);
} };
"#;

#[test]
fn the_global_object_has_the_names_on_the_list_and_no_path_leads_to_an_operation() {
    block_on(async {
        let engine = Engine::with(WALK, &Options { kv: true, ..Options::default() }).await;
        let found: serde_json::Value = serde_json::from_str(&engine.text("/").await).unwrap();
        let strings = |value: &serde_json::Value| -> BTreeSet<String> {
            value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        let listed: BTreeSet<String> =
            GLOBALS.split_whitespace().chain(LANGUAGE.split_whitespace()).map(str::to_owned).collect();
        let names = strings(&found["names"]);
        assert_eq!(names.difference(&listed).collect::<Vec<_>>(), Vec::<&String>::new(), "not on the list");
        assert_eq!(listed.difference(&names).collect::<Vec<_>>(), Vec::<&String>::new(), "not there");
        assert_eq!(found["suspects"], serde_json::json!([]));
        assert!(found["count"].as_u64().unwrap() > 1000, "only {} objects were seen", found["count"]);
    });
}

#[test]
fn ways_around_the_platforms_rules_are_closed() {
    block_on(async {
        let code = r#"
const attempts = {
  key_statics: () => Reflect.ownKeys(CryptoKey).concat(Reflect.ownKeys(Crypto), Reflect.ownKeys(SubtleCrypto)).filter((k) => !["length", "name", "prototype"].includes(k)).join(),
  eval: () => eval("1"),
  function: () => Function("return 1")(),
  async_function: () => (async () => {}).constructor("return 1")(),
  timer: () => { setTimeout("globalThis.ran = 1"); return "set"; },
  dynamic_import: () => import("data:text/javascript,export default 1"),
  import_file: () => import("file:///etc/passwd"),
  import_itself: () => import("operator:///bundle.js").then(() => "itself"),
  import_script: () => import("ext:core/ops"),
  import_script_2: () => import("ext:portcullis/serve.js"),
  atomics_wait: () => Atomics.wait(new Int32Array(new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true }).buffer), 0, 0, 1000),
  worker: () => new Worker("data:text/javascript,1"),
  private_fields: () => Reflect.ownKeys(new Headers()).length,
  meta: () => Reflect.ownKeys(import.meta).join(),
};
export default { async fetch() {
  const found = {};
  for (const [name, attempt] of Object.entries(attempts)) { try { found[name] = "ALLOWED " + (await attempt()); } catch (error) { found[name] = "DENIED " + error; } }
  await new Promise((resolve) => setTimeout(resolve, 20));
  found.ran = String(globalThis.ran);
  return Response.json(found);
} };
"#;
        let engine = Engine::with(code, &Options::default()).await;
        let found: std::collections::BTreeMap<String, String> = serde_json::from_str(&engine.text("/").await).unwrap();
        let expect = |name: &str, text: &str| assert!(found[name].starts_with(text), "{name}: {}", found[name]);
        expect("key_statics", "ALLOWED ");
        assert_eq!(found["key_statics"], "ALLOWED ");
        for name in ["eval", "function", "async_function"] {
            expect(name, "DENIED EvalError: Code generation from strings disallowed");
        }
        for name in ["dynamic_import", "import_file", "import_script", "import_script_2"] {
            expect(name, "DENIED TypeError: `");
        }
        expect(
            "import_itself",
            "DENIED TypeError: `operator:///bundle.js` cannot be imported: an operator is one module",
        );
        expect("atomics_wait", "DENIED TypeError");
        expect("worker", "DENIED ReferenceError");
        expect("timer", "ALLOWED set");
        assert_eq!(found["ran"], "undefined");
        engine.wait_for_log("EvalError").await;
    });
}

#[test]
fn code_of_strings_works_where_it_was_granted_and_imports_nothing_then_either() {
    block_on(async {
        let code = "export default { async fetch() { let text = String(eval('1+1') + new Function('return 1')()); try { await new Function('return import(\"node:fs\")')(); } catch (error) { text += ' ' + error; } return new Response(text); } };";
        let options = Options { arguments: vec!["--code-generation"], ..Options::default() };
        let engine = Engine::with(code, &options).await;
        assert!(engine.text("/").await.starts_with("3 TypeError: `node:fs` cannot be imported"));
    });
}

#[test]
fn without_a_compiler_everything_but_webassembly_is_there() {
    block_on(async {
        let code = "export default { async fetch() { const end = performance.now() + 20; let n = 0; while (performance.now() < end) n++; return Response.json([typeof WebAssembly, /(a|b)+c/.test('abac'), (await crypto.subtle.digest('SHA-256', new Uint8Array(1))).byteLength]); } };";
        let options = Options { arguments: vec!["--interpreter-only"], ..Options::default() };
        let engine = Engine::with(code, &options).await;
        assert_eq!(engine.text("/").await, r#"["undefined",true,32]"#);
    });
}

#[test]
fn the_list_of_operations_is_printed_with_reasons() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_portcullis-operator")).arg("--ops").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut names = BTreeSet::new();
    for line in text.lines() {
        let (name, reason) = line.split_once(' ').unwrap_or_else(|| panic!("{line}"));
        assert!(!reason.trim().is_empty(), "{line}");
        assert!(names.insert(name), "{name} is listed twice");
    }
    for forbidden in
        ["net", "fs_", "spawn", "open", "connect", "listen", "env", "exit", "ffi", "load_esm", "eval", "print"]
    {
        let found: Vec<_> = names.iter().filter(|name| name.contains(forbidden)).collect();
        assert!(found.is_empty(), "{forbidden}: {found:?}");
    }
}
