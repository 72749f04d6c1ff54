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
//! statements for its own stream; those for `vm_start` stand in the VM configuration. Each call is logged, at level warn, as
//! `[calls] request_headers proxy_get_property "request\0path" -> 0 "/"`: the status, then what the host returned, numbers
//! in decimal and bytes as text with escapes.
//!
//! A script that says what it is called, as in `row: get_property/absent`, is told in full: every callback with its
//! arguments and, indented, the calls in it, each line with `@get_property/absent@` before it.
//!
//! `script.rs` says what a statement can hold, `functions.rs` which functions there are, `contexts.rs` what is kept between
//! callbacks. It does without an SDK, since SDKs panic where this is to go on.

#![cfg(target_arch = "wasm32")]
#![allow(unsafe_code, reason = "the ABI consists of raw imports and exports, of pointers and lengths")]
#![allow(missing_docs, reason = "exports are the ABI's, and documented there")]

mod contexts;
mod functions;
mod script;

use contexts::{add_script, caller, lacks_script, run};

const VM_CONFIGURATION: u32 = 6;
const PLUGIN_CONFIGURATION: u32 = 7;

/// Reads the script of a stream, from the first callback in which its request can be seen.
fn read_script(context: u32) {
    if lacks_script(context)
        && let Some(text) = functions::request_field("x-calls")
    {
        add_script(context, &String::from_utf8_lossy(&text));
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
    contexts::create(context, parent);
    run("context_create", context, &[], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_vm_start(root: u32, len: u32) -> u32 {
    if let Some(text) = functions::buffer(VM_CONFIGURATION) {
        add_script(root, &String::from_utf8_lossy(&text));
    }
    run("vm_start", root, &[len], 1)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_configure(root: u32, len: u32) -> u32 {
    contexts::clear_script(root);
    if let Some(text) = functions::buffer(PLUGIN_CONFIGURATION) {
        add_script(root, &String::from_utf8_lossy(&text));
    }
    run("configure", root, &[len], 1)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_tick(root: u32) {
    run("tick", root, &[], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_queue_ready(root: u32, queue: u32) {
    contexts::tell_root(root, &format!("queue_ready({queue})"));
    run("queue_ready", root, &[], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(context: u32, count: u32, end: u32) -> u32 {
    read_script(context);
    run("request_headers", context, &[count, end], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_body(context: u32, len: u32, end: u32) -> u32 {
    let answer = run("request_body", context, &[len, end], 0);
    if end == 0 { answer } else { run_end("request_end", context, answer) }
}

/// Statements for the last piece of a body, which callbacks do not divide the same way on every host.
fn run_end(callback: &'static str, context: u32, answer: u32) -> u32 {
    if contexts::has(callback, context) { run(callback, context, &[], 0) } else { answer }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_trailers(context: u32, count: u32) -> u32 {
    run("request_trailers", context, &[count], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_metadata(context: u32, count: u32) -> u32 {
    run("request_metadata", context, &[count], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_headers(context: u32, count: u32, end: u32) -> u32 {
    run("response_headers", context, &[count, end], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_body(context: u32, len: u32, end: u32) -> u32 {
    let answer = run("response_body", context, &[len, end], 0);
    if end == 0 { answer } else { run_end("response_end", context, answer) }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_trailers(context: u32, count: u32) -> u32 {
    run("response_trailers", context, &[count], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_metadata(context: u32, count: u32) -> u32 {
    run("response_metadata", context, &[count], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_new_connection(context: u32) -> u32 {
    run("new_connection", context, &[], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_downstream_data(context: u32, len: u32, end: u32) -> u32 {
    run("downstream_data", context, &[len, end], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_upstream_data(context: u32, len: u32, end: u32) -> u32 {
    run("upstream_data", context, &[len, end], 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_downstream_connection_close(context: u32, peer: u32) {
    run("downstream_connection_close", context, &[peer], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_upstream_connection_close(context: u32, peer: u32) {
    run("upstream_connection_close", context, &[peer], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_http_call_response(root: u32, token: u32, fields: u32, body: u32, trailers: u32) {
    contexts::tell_root(root, &format!("http_call_response({token}, {fields}, {body}, {trailers})"));
    run("http_call_response", caller(root, token), &[fields, body, trailers], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_grpc_receive_initial_metadata(root: u32, call: u32, count: u32) {
    run("grpc_receive_initial_metadata", caller(root, call), &[count], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_grpc_receive(root: u32, call: u32, len: u32) {
    run("grpc_receive", caller(root, call), &[len], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_grpc_receive_trailing_metadata(root: u32, call: u32, count: u32) {
    run("grpc_receive_trailing_metadata", caller(root, call), &[count], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_grpc_close(root: u32, call: u32, status: u32) {
    run("grpc_close", caller(root, call), &[status], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_foreign_function(root: u32, id: u32, len: u32) {
    contexts::tell_root(root, &format!("foreign_function({id}, {len})"));
    run("foreign_function", root, &[id, len], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_done(context: u32) -> u32 {
    run("done", context, &[], 1)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_log(context: u32) {
    // Also of a request that an earlier filter has answered.
    read_script(context);
    run("log", context, &[], 0);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_delete(context: u32) {
    run("delete", context, &[], 0);
    contexts::delete(context);
}
