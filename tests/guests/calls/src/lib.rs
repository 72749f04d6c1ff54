//! A guest that makes the host calls it is told to, and logs what each answers: one script, the same in every host.
//!
//! A script is a list of statements, one a line or divided by `;`, each with the callback it belongs to:
//!
//! ```text
//! configure: proxy_get_property "plugin_name"
//! request_headers: proxy_get_property "request\0path"
//! request_headers: return 1
//! ```
//!
//! The plugin configuration is the script of the root context and of every stream; the request field `x-calls` adds
//! statements for its own stream. Each call is logged, at level warn, as
//! `[calls] request_headers proxy_get_property "request\0path" -> 0 "/"`: the status, then what the host returned, numbers
//! in decimal and bytes as text with escapes. [`script`] says what a statement can hold, [`functions`] which functions
//! there are. It does without an SDK, since SDKs panic where this is to go on.

#![cfg(target_arch = "wasm32")]
#![allow(unsafe_code, reason = "the ABI consists of raw imports and exports, of pointers and lengths")]
#![allow(missing_docs, reason = "exports are the ABI's, and documented there")]

mod functions;
mod script;

use std::cell::RefCell;
use std::collections::BTreeMap;

use script::{Statement, Values};

/// Statements by context; 0 holds the plugin's.
type Scripts = BTreeMap<u32, Vec<Statement>>;

thread_local! {
    static SCRIPTS: RefCell<Scripts> = const { RefCell::new(BTreeMap::new()) };
    static VALUES: RefCell<Values> = RefCell::new(Values::default());
}

const LEVEL_WARN: u32 = 3;

fn log(line: &str) {
    // SAFETY: the host reads `line.len()` bytes from the pointer before it returns.
    unsafe { functions::proxy_log(LEVEL_WARN, line.as_ptr() as u32, line.len() as u32) };
}

/// Makes the calls that belong to this callback of this context; the answer of the callback is what `return` says.
fn run(callback: &str, context: u32, answer: u32) -> u32 {
    let statements: Vec<Statement> = SCRIPTS.with_borrow(|scripts| {
        let mine = [0, context].into_iter().filter_map(|owner| scripts.get(&owner)).flatten();
        mine.filter(|statement| statement.callback == callback).cloned().collect()
    });
    VALUES.with_borrow_mut(|values| values.context = context);
    let mut answer = answer;
    for statement in statements {
        // The values are lent out for one call only: the host may come back in through the allocator.
        let line = match VALUES.with_borrow(|values| statement.prepare(values)) {
            Ok(call) => {
                let (status, returned) = call.make();
                if let Some(number) = call.answer() {
                    answer = number;
                }
                let line = call.line(status, &returned);
                VALUES.with_borrow_mut(|values| values.last = returned);
                line
            }
            Err(problem) => format!("[calls] {callback}: {problem}"),
        };
        if !statement.is_quiet() {
            log(&line);
        }
    }
    answer
}

fn add_script(context: u32, text: &str) {
    match script::parse(text) {
        Ok(statements) => SCRIPTS.with_borrow_mut(|scripts| scripts.entry(context).or_default().extend(statements)),
        Err(problem) => log(&format!("[calls] the script has a mistake: {problem}")),
    }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_abi_version_0_2_1() {}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_memory_allocate(size: u32) -> u32 {
    functions::allocate(size)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_context_create(context: u32, parent: u32) {
    VALUES.with_borrow_mut(|values| {
        if parent == 0 {
            values.root = context;
        }
    });
    run("context_create", context, 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_vm_start(root: u32, _: u32) -> u32 {
    run("vm_start", root, 1)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_configure(root: u32, _: u32) -> u32 {
    const PLUGIN_CONFIGURATION: u32 = 7;
    SCRIPTS.with_borrow_mut(|scripts| scripts.remove(&0));
    if let Some(text) = functions::buffer(PLUGIN_CONFIGURATION) {
        add_script(0, &String::from_utf8_lossy(&text));
    }
    // The script is known only now.
    run("vm_start", root, 1);
    run("configure", root, 1)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_tick(root: u32) {
    run("tick", root, 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_queue_ready(root: u32, queue: u32) {
    log(&format!("[calls] queue_ready({queue})"));
    run("queue_ready", root, 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(context: u32, _: u32, _: u32) -> u32 {
    if let Some(text) = functions::request_field("x-calls") {
        add_script(context, &String::from_utf8_lossy(&text));
    }
    run("request_headers", context, 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_body(context: u32, _: u32, end: u32) -> u32 {
    let answer = run("request_body", context, 0);
    if end == 0 { answer } else { run("request_end", context, 0) }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_trailers(context: u32, _: u32) -> u32 {
    run("request_trailers", context, 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_headers(context: u32, _: u32, _: u32) -> u32 {
    run("response_headers", context, 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_body(context: u32, _: u32, end: u32) -> u32 {
    let answer = run("response_body", context, 0);
    if end == 0 { answer } else { run("response_end", context, 0) }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_trailers(context: u32, _: u32) -> u32 {
    run("response_trailers", context, 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_http_call_response(root: u32, token: u32, fields: u32, body: u32, trailers: u32) {
    log(&format!("[calls] http_call_response({token}, {fields}, {body}, {trailers})"));
    run("http_call_response", root, 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_foreign_function(root: u32, id: u32, len: u32) {
    log(&format!("[calls] foreign_function({id}, {len})"));
    run("foreign_function", root, 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_done(context: u32) -> u32 {
    run("done", context, 1)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_log(context: u32) {
    run("log", context, 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_delete(context: u32) {
    run("delete", context, 0);
    SCRIPTS.with_borrow_mut(|scripts| scripts.remove(&context));
}
