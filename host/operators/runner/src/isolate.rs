//! One isolate with one operator: made from the snapshot, given the operator's module, asked to answer, replaced when it
//! went over a limit.

use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll};

use base64::Engine as _;
use bytes::Bytes;
use deno_core::error::{CoreError, CoreErrorKind, JsError};
use deno_core::{
    JsRuntime, ModuleLoadOptions, ModuleLoadReferrer, ModuleLoadResponse, ModuleLoader, ModuleResolveResponse,
    ModuleSpecifier, PollEventLoopOptions, ResolutionKind, RuntimeOptions, v8,
};
use deno_error::JsErrorBox;

use crate::bridge::Bridge;
use crate::contract::{Load, LoadFailure};
use crate::log::Output;
use crate::ops::{Log, MODULE_BASE, Settled};
use crate::watch::Watch;
use crate::{extensions, memory, sources};

static SNAPSHOT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/operator.snapshot"));

const _: () = assert!(
    u64::from_le_bytes(*include_bytes!(concat!(env!("OUT_DIR"), "/operator.sources"))) == sources::DIGEST,
    "the snapshot was made from other sources than this program's: remove `target/runner`, and build again",
);

/// What an isolate that is out of memory may use on top, step by step, until it has unwound. After the last step the process
/// ends, which the host recognizes.
const UNWINDING_BYTES: usize = 16 << 20;
const UNWINDING_BYTES_MAX: usize = 3 * UNWINDING_BYTES;

/// How isolates of this process are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Largest JavaScript heap.
    pub(crate) heap_bytes: usize,
    /// Whether code may be made of strings.
    pub(crate) code_generation: bool,
}

/// What every isolate of the process shares.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) bridge: Rc<RefCell<Bridge>>,
    pub(crate) output: Rc<RefCell<Output>>,
    pub(crate) watch: Watch,
    /// Called when nothing is left that the process should wait for.
    pub(crate) settled: Rc<dyn Fn()>,
}

/// An isolate.
pub(crate) struct Isolate {
    runtime: JsRuntime,
    loader: Rc<OneModule>,
    watch: Watch,
    functions: Functions,
}

struct Functions {
    adopt: v8::Global<v8::Function>,
    dispatch: v8::Global<v8::Function>,
    gone: v8::Global<v8::Function>,
    prepare: v8::Global<v8::Function>,
    stop: v8::Global<v8::Function>,
}

/// A request as JavaScript is told about it.
pub(crate) struct Incoming<'a> {
    pub(crate) id: u32,
    pub(crate) method: &'a str,
    pub(crate) url: &'a str,
    pub(crate) request_id: Option<&'a [u8]>,
    pub(crate) body: IncomingBody,
}

/// Its body.
pub(crate) enum IncomingBody {
    None,
    Whole(Bytes),
    Arriving,
}

impl Isolate {
    /// Makes an isolate without an operator. Must be called in the context of the process's runtime.
    pub(crate) fn new(options: Options, surroundings: &Surroundings) -> Result<Self, LoadFailure> {
        let loader = Rc::new(OneModule::default());
        let parameters = v8::CreateParams::default()
            .heap_limits(0, options.heap_bytes)
            .allow_atomics_wait(false)
            .array_buffer_allocator(memory::array_buffers());
        let mut runtime = JsRuntime::new(RuntimeOptions {
            startup_snapshot: Some(SNAPSHOT),
            extensions: extensions::extensions(|_, _| {}),
            module_loader: Some(Rc::clone(&loader) as Rc<dyn ModuleLoader>),
            create_params: Some(parameters),
            ..RuntimeOptions::default()
        });
        {
            let state = runtime.op_state();
            let mut state = state.borrow_mut();
            state.put(Rc::clone(&surroundings.bridge));
            let output = Rc::clone(&surroundings.output);
            state.put(Log(Box::new(move |text| output.borrow_mut().write(text))));
            let settled = Rc::clone(&surroundings.settled);
            state.put(Settled(Box::new(move || settled())));
        }
        let watch = surroundings.watch.clone();
        let told = watch.clone();
        runtime.add_near_heap_limit_callback(move |limit, initial| {
            // V8 asks, too, when all it lacks is an array buffer. That becomes an exception.
            if memory::was_refused() {
                return limit;
            }
            told.out_of_memory();
            limit.saturating_add(UNWINDING_BYTES).min(initial.saturating_add(UNWINDING_BYTES_MAX))
        });
        let functions = Functions::take(&mut runtime, options)?;
        let context = runtime.main_context();
        watch.watch(runtime.v8_isolate(), context);
        Ok(Self { runtime, loader, watch, functions })
    }

    /// Gives the isolate its operator.
    pub(crate) async fn load(&mut self, load: &Load) -> Result<(), LoadFailure> {
        self.loader.map.replace(load.map.clone());
        self.prepare(load)?;
        let specifier = ModuleSpecifier::parse(&format!("{MODULE_BASE}bundle.js"))
            .map_err(|error| LoadFailure::new(error.to_string()))?;
        let module = {
            let _turn = self.watch.turn();
            self.runtime.load_main_es_module_from_code(&specifier, load.code.clone()).await.map_err(failure)?
        };
        let evaluated = {
            let _turn = self.watch.turn();
            self.runtime.mod_evaluate(module)
        };
        let mut evaluated = std::pin::pin!(evaluated);
        std::future::poll_fn(|context| {
            let polled = self.poll(context);
            if let Poll::Ready(result) = evaluated.as_mut().poll(context) {
                return Poll::Ready(result.map_err(failure));
            }
            match polled {
                Poll::Ready(Err(error)) => Poll::Ready(Err(failure(error))),
                _ => Poll::Pending,
            }
        })
        .await?;
        self.adopt(module)
    }

    fn prepare(&mut self, load: &Load) -> Result<(), LoadFailure> {
        let _turn = self.watch.turn();
        deno_core::scope!(scope, &mut self.runtime);
        let mut values: Vec<v8::Local<'_, v8::Value>> = Vec::new();
        for (name, value) in &load.env {
            values.push(string(scope, name)?.into());
            values.push(string(scope, value)?.into());
        }
        let mut files: Vec<v8::Local<'_, v8::Value>> = Vec::new();
        for (name, contents) in &load.files {
            let contents = base64::engine::general_purpose::STANDARD
                .decode(contents)
                .map_err(|error| LoadFailure::new(error.to_string()))?;
            files.push(string(scope, name)?.into());
            files.push(bytes(scope, contents).into());
        }
        let values = v8::Array::new_with_elements(scope, &values).into();
        let files = v8::Array::new_with_elements(scope, &files).into();
        let (kv, dev) = (v8::Boolean::new(scope, load.kv).into(), v8::Boolean::new(scope, load.dev).into());
        call(scope, &self.functions.prepare, &[values, files, kv, dev])
    }

    fn adopt(&mut self, module: deno_core::ModuleId) -> Result<(), LoadFailure> {
        let namespace = self.runtime.get_module_namespace(module).map_err(failure)?;
        let _turn = self.watch.turn();
        deno_core::scope!(scope, &mut self.runtime);
        let namespace = v8::Local::new(scope, namespace);
        let name = string(scope, "default")?.into();
        let operator = namespace.get(scope, name).unwrap_or_else(|| v8::undefined(scope).into());
        call(scope, &self.functions.adopt, &[operator])
    }

    /// Hands a request to the operator. Its answer comes over the bridge.
    pub(crate) fn dispatch(&mut self, request: Incoming<'_>) {
        let _turn = self.watch.turn();
        deno_core::scope!(scope, &mut self.runtime);
        let id = v8::Integer::new_from_unsigned(scope, request.id).into();
        let (Ok(method), Ok(url)) = (string(scope, request.method), string(scope, request.url)) else { return };
        let request_id = request.request_id.and_then(|id| {
            v8::String::new_from_one_byte(scope, id, v8::NewStringType::Normal).map(v8::Local::<v8::Value>::from)
        });
        let request_id = request_id.unwrap_or_else(|| v8::null(scope).into());
        let body = match request.body {
            IncomingBody::None => v8::null(scope).into(),
            IncomingBody::Arriving => v8::undefined(scope).into(),
            IncomingBody::Whole(body) => bytes(scope, body.into()).into(),
        };
        // What it throws is a rejection of its promise, or the end of the isolate.
        let _ = call(scope, &self.functions.dispatch, &[id, method.into(), url.into(), request_id, body]);
        let nobody = v8::undefined(scope).into();
        scope.set_continuation_preserved_embedder_data(nobody);
        scope.perform_microtask_checkpoint();
    }

    /// Tells the operator that nobody waits for an answer any more.
    pub(crate) fn gone(&mut self, id: u32) {
        let _turn = self.watch.turn();
        deno_core::scope!(scope, &mut self.runtime);
        let id = v8::Integer::new_from_unsigned(scope, id).into();
        let _ = call(scope, &self.functions.gone, &[id]);
    }

    /// Asks to be told when `waitUntil` has nothing left.
    pub(crate) fn stop(&mut self) {
        let _turn = self.watch.turn();
        deno_core::scope!(scope, &mut self.runtime);
        let _ = call(scope, &self.functions.stop, &[]);
    }

    /// Lets timers and promises go on. Ready when nothing is under way.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), CoreError>> {
        let _turn = self.watch.turn();
        self.runtime.poll_event_loop(context, PollEventLoopOptions::default())
    }

    /// Takes the isolate apart, whatever its execution was ended for.
    pub(crate) fn discard(mut self) {
        self.runtime.v8_isolate().cancel_terminate_execution();
    }
}

impl Functions {
    /// Takes the snapshot's functions from the global object and lets it become the operator's.
    fn take(runtime: &mut JsRuntime, options: Options) -> Result<Self, LoadFailure> {
        deno_core::scope!(scope, runtime);
        let context = scope.get_current_context();
        context.set_allow_generation_from_strings(options.code_generation);
        let global = context.global(scope);
        let missing = |what: &str| LoadFailure::new(format!("the snapshot lacks `{what}`"));
        let name = string(scope, "__portcullis")?;
        let ours = global.get(scope, name.into()).and_then(|ours| v8::Local::<v8::Object>::try_from(ours).ok());
        let ours = ours.ok_or_else(|| missing("__portcullis"))?;
        let mut function = |name: &str| {
            let key = string(scope, name)?;
            let found = ours.get(scope, key.into());
            let found = found.and_then(|found| v8::Local::<v8::Function>::try_from(found).ok());
            found.map(|found| v8::Global::new(scope, found)).ok_or_else(|| missing(name))
        };
        let start = function("start")?;
        let functions = Self {
            adopt: function("adopt")?,
            dispatch: function("dispatch")?,
            gone: function("gone")?,
            prepare: function("prepare")?,
            stop: function("stop")?,
        };
        call(scope, &start, &[])?;
        Ok(functions)
    }
}

fn string<'s>(scope: &mut v8::PinScope<'s, '_>, text: &str) -> Result<v8::Local<'s, v8::String>, LoadFailure> {
    v8::String::new(scope, text).ok_or_else(|| LoadFailure::new("a text is too long for the engine"))
}

fn bytes<'s>(scope: &mut v8::PinScope<'s, '_>, contents: Vec<u8>) -> v8::Local<'s, v8::Uint8Array> {
    let length = contents.len();
    let store = v8::ArrayBuffer::new_backing_store_from_vec(contents).make_shared();
    let buffer = v8::ArrayBuffer::with_backing_store(scope, &store);
    v8::Uint8Array::new(scope, buffer, 0, length).expect("the buffer has this length")
}

/// Calls one of our own functions.
fn call(
    scope: &mut v8::PinScope<'_, '_>,
    function: &v8::Global<v8::Function>,
    arguments: &[v8::Local<'_, v8::Value>],
) -> Result<(), LoadFailure> {
    v8::tc_scope!(let scope, scope);
    let function = v8::Local::new(scope, function);
    let this = v8::undefined(scope).into();
    if function.call(scope, this, arguments).is_some() {
        return Ok(());
    }
    match scope.exception() {
        Some(exception) if !scope.has_terminated() => Err(of_js_error(&JsError::from_v8_exception(scope, exception))),
        _ => Err(LoadFailure::new("the isolate was ended")),
    }
}

fn failure(error: CoreError) -> LoadFailure {
    match error.into_kind() {
        CoreErrorKind::Js(error) => of_js_error(&error),
        other => LoadFailure::new(other.to_string()),
    }
}

fn of_js_error(error: &JsError) -> LoadFailure {
    let tidy = |text: &str| text.replace(MODULE_BASE, "");
    LoadFailure {
        message: tidy(error.exception_message.trim_start_matches("Uncaught ")),
        stack: error.stack.as_deref().map(tidy).unwrap_or_default(),
    }
}

/// Loads nothing: an operator is the one module that it was handed over as.
#[derive(Default)]
struct OneModule {
    map: RefCell<Option<String>>,
}

impl ModuleLoader for OneModule {
    fn resolve(&self, specifier: &str, _referrer: &str, kind: ResolutionKind) -> ModuleResolveResponse {
        match kind {
            ResolutionKind::MainModule => ModuleSpecifier::parse(specifier).map_err(JsErrorBox::from_err),
            _ => Err(JsErrorBox::type_error(format!("`{specifier}` cannot be imported: an operator is one module"))),
        }
    }

    fn load(
        &self,
        specifier: &ModuleSpecifier,
        _referrer: Option<&ModuleLoadReferrer>,
        _options: ModuleLoadOptions,
    ) -> ModuleLoadResponse {
        ModuleLoadResponse::Sync(Err(JsErrorBox::type_error(format!("`{specifier}` cannot be loaded"))))
    }

    fn get_source_map(&self, file_name: &str) -> Option<Cow<'_, [u8]>> {
        if !file_name.starts_with(MODULE_BASE) {
            return None;
        }
        self.map.borrow().as_ref().map(|map| Cow::Owned(map.clone().into_bytes()))
    }

    fn source_map_source_exists(&self, _source_url: &str) -> Option<bool> {
        Some(true)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The operations that are there under any name, and those not on the list that can be called.
    const OUTSIDE_OF_LIST: &str = r#"(() => {
        const { ops } = Deno.core;
        globalThis.found = [];
        for (const name of Object.keys(ops)) {
            if (listed.has(name)) continue;
            // What throws when an operation that waits is called becomes a rejection.
            try {
                const result = ops[name]();
                if (!(result instanceof Promise)) found.push(name);
                else result.then(() => found.push(name), (error) => /op is disabled/.test(error) || found.push(name));
            } catch (error) {
                if (!/op is disabled/.test(error)) found.push(name);
            }
        }
        return Object.keys(ops).join(" ");
    })()"#;

    #[test]
    fn an_isolate_can_reach_the_operations_on_the_list_and_no_others() {
        JsRuntime::init_platform(None);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _context = runtime.enter();
        let mut isolate = JsRuntime::new(RuntimeOptions {
            startup_snapshot: Some(SNAPSHOT),
            extensions: extensions::extensions(|_, _| {}),
            ..RuntimeOptions::default()
        });
        let mut evaluate = |code: String| -> BTreeSet<String> {
            let value = isolate.execute_script("test", code).unwrap();
            deno_core::scope!(scope, &mut isolate);
            let text = v8::Local::new(scope, value).to_rust_string_lossy(scope);
            text.split_whitespace().map(str::to_owned).collect()
        };
        let listed: BTreeSet<String> =
            extensions::OPS.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
        evaluate(format!("globalThis.listed = new Set([{}]); 0", quoted(&listed)));
        let there = evaluate(OUTSIDE_OF_LIST.to_owned());
        assert!(there.len() > listed.len(), "nothing of deno_core's own is there: {there:?}");
        assert_eq!(evaluate("found.join(' ')".to_owned()), BTreeSet::new(), "not on the list");
        assert_eq!(listed.difference(&there).collect::<Vec<_>>(), Vec::<&String>::new(), "listed, and not there");
    }

    fn quoted(names: &BTreeSet<String>) -> String {
        names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(",")
    }
}
