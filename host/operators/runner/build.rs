//! Makes the snapshot that every isolate starts from: the web platform's scripts and ours, evaluated once.
//!
//! `deno_fetch` is asked for its scripts here and only here: the program itself holds none of its network client.
#![allow(dead_code, reason = "the modules are the program's, which uses all of them")]
#![allow(missing_docs, reason = "a build script")]

#[path = "src/bridge.rs"]
mod bridge;
#[path = "src/extensions.rs"]
mod extensions;
#[path = "src/ops.rs"]
mod ops;
#[path = "src/sources.rs"]
mod sources;

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use deno_core::snapshot::{CreateSnapshotOptions, create_snapshot};
use deno_core::{ExtensionFileSource, JsRuntimeForSnapshot};
use tokio::sync::{mpsc, oneshot};

use crate::bridge::{BodyLimits, Bridge, Exchange};

/// Of deno_fetch: what describes requests and responses, not what sends them.
const FETCH_SCRIPTS: [&str; 5] = ["20_headers.js", "21_formdata.js", "22_body.js", "23_request.js", "23_response.js"];

/// Ours, in `js/`, by the name under which others load them.
const SCRIPTS: [(&str, &str); 5] = [
    ("ext:deno_fetch/22_http_client.js", concat!(env!("CARGO_MANIFEST_DIR"), "/js/http_client.js")),
    ("ext:portcullis/bodies.js", concat!(env!("CARGO_MANIFEST_DIR"), "/js/bodies.js")),
    ("ext:portcullis/fetch.js", concat!(env!("CARGO_MANIFEST_DIR"), "/js/fetch.js")),
    ("ext:portcullis/globals.js", concat!(env!("CARGO_MANIFEST_DIR"), "/js/globals.js")),
    ("ext:portcullis/serve.js", concat!(env!("CARGO_MANIFEST_DIR"), "/js/serve.js")),
];
const MAIN: ExtensionFileSource = ExtensionFileSource::loaded_during_snapshot(
    "ext:portcullis/main.js",
    concat!(env!("CARGO_MANIFEST_DIR"), "/js/main.js"),
);

fn main() {
    for path in ["js", "ops.txt", "src/bridge.rs", "src/extensions.rs", "src/ops.rs", "src/sources.rs"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let scripts: RefCell<Vec<Cow<'static, [ExtensionFileSource]>>> = RefCell::default();
    let mut extensions = extensions::extensions(|_, found| scripts.borrow_mut().push(found));
    let mut scripts = scripts.into_inner();
    let ours = scripts.last_mut().expect("our own extension is the last").to_mut();
    let fetch = deno_fetch::deno_fetch::init(deno_fetch::Options::default());
    let wanted = |file: &&ExtensionFileSource| FETCH_SCRIPTS.iter().any(|name| file.specifier.ends_with(name));
    ours.extend(fetch.lazy_loaded_js_files.iter().filter(wanted).cloned());
    ours.extend(SCRIPTS.map(|(specifier, path)| ExtensionFileSource::loaded_during_snapshot(specifier, path)));
    for (extension, scripts) in extensions.iter_mut().zip(scripts) {
        extension.lazy_loaded_js_files = scripts;
    }
    if let Some(ours) = extensions.last_mut() {
        ours.js_files = Cow::Owned(vec![MAIN]);
    }
    let snapshot = create_snapshot(
        CreateSnapshotOptions {
            cargo_manifest_dir: env!("CARGO_MANIFEST_DIR"),
            startup_snapshot: None,
            skip_op_registration: false,
            extensions,
            extension_transpiler: None,
            with_runtime_cb: Some(Box::new(rehearse)),
        },
        None,
    )
    .unwrap_or_else(|error| panic!("the snapshot cannot be made: {error}"));
    let folder = std::env::var_os("OUT_DIR").expect("cargo names a folder");
    let folder = Path::new(&folder);
    std::fs::write(folder.join("operator.snapshot"), snapshot.output).expect("the snapshot is written");
    std::fs::write(folder.join("operator.sources"), sources::DIGEST.to_le_bytes()).expect("the digest is written");
}

/// Two requests of the usual kind, before there is an operator. V8 compiles a function when it is first called and keeps what it
/// compiled in the snapshot, so that no operator's first request waits for that.
const REHEARSAL: &str = r#"
const { adopt, dispatch, prepare } = globalThis.__portcullis;
prepare(["NAME", "value"], [], false, false);
adopt({
  async fetch(request, env, ctx) {
    const url = new URL(request.url);
    const sent = request.method === "POST" ? await request.json() : request.headers.get("accept");
    const headers = new Headers({ "x-request-id": String(ctx.requestId) });
    if (url.searchParams.get("as") === "text") return new Response("text", { status: 201, headers });
    return Response.json({ path: url.pathname, sent, env }, { headers });
  },
});
dispatch(1, "GET", "http://api.example.com/?as=text", null, null);
dispatch(2, "POST", "http://api.example.com/path", "id", new TextEncoder().encode("{}"));
"#;

fn rehearse(runtime: &mut JsRuntimeForSnapshot) {
    let (closed, _closings) = mpsc::unbounded_channel();
    let mut bridge = Bridge::new(BodyLimits { request: u64::MAX, response: u64::MAX }, closed);
    let answers = [(); 2].map(|()| {
        let (answer, answered) = oneshot::channel();
        let id = bridge.new_id();
        let mut fields = http::HeaderMap::new();
        fields.insert(http::header::ACCEPT, http::HeaderValue::from_static("*/*"));
        bridge.begin(id, Exchange { fields, answer, uploads: false });
        answered
    });
    {
        let state = runtime.op_state();
        let mut state = state.borrow_mut();
        state.put(Rc::new(RefCell::new(bridge)));
        state.put(ops::Log(Box::new(|text| panic!("the rehearsal failed: {text}"))));
    }
    runtime.execute_script("rehearsal", REHEARSAL).unwrap_or_else(|error| panic!("the rehearsal failed: {error}"));
    {
        deno_core::scope!(scope, runtime);
        scope.perform_microtask_checkpoint();
        // Of no request, what comes later.
        let nobody = deno_core::v8::undefined(scope).into();
        scope.set_continuation_preserved_embedder_data(nobody);
    }
    for (mut answered, status) in answers.into_iter().zip([201, 200]) {
        let response = answered.try_recv().expect("the rehearsal's requests are answered");
        assert_eq!(response.status(), status, "the rehearsal's answers are as they should be");
    }
}
