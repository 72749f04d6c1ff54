//! TCP connections through network filters.

use serde_json::json;

use crate::differential::conversation::Act::{Aborts, Finishes, SeesTheEnd, Sends};
use crate::differential::conversation::Move::{self, Again, AgainUntilConnected, Client, Origin, Told};
use crate::differential::{Plugin, Row};

/// Both sides say something and finish, the client first.
const USUAL: [Move; 6] = [
    Client(Sends("hello")),
    Origin(Sends("hi")),
    Client(Finishes),
    Origin(Finishes),
    Client(SeesTheEnd),
    Origin(SeesTheEnd),
];

/// A call to `callee`.
const CALL: &str =
    r#"proxy_http_call "callee" { ":method" "GET" ":path" "/ROW" ":authority" "callee.example" } "" "" 5000"#;
/// The answer comes to the root; from here on it is the connection's affair.
const ANSWERED: &str = "http_call_response: proxy_set_effective_context $context";

fn row(id: &str, shows: &'static str, moves: &[Move], script: &str) -> Row {
    Row::new(format!("tcp/{id}"), shows).tcp(moves.iter().copied()).script(script)
}

/// Two plugins, `one` before `two`, in VMs of their own.
fn two(id: &str, shows: &'static str, moves: &[Move], script: &str) -> Row {
    let plugin = |name: &'static str| Plugin::new(name).configuration(&format!("name: {name}"));
    Row::new(format!("tcp/{id}"), shows)
        .plugin(plugin("one").settings(json!({ "vm_id": format!("tcp-{id}-one") })))
        .plugin(plugin("two").settings(json!({ "vm_id": format!("tcp-{id}-two") })))
        .tcp(moves.iter().copied())
        .script(script)
}

fn properties(callbacks: &[&str]) -> String {
    const PATHS: [&str; 43] = [
        r"source\0address",
        r"source\0port",
        r"destination\0address",
        r"destination\0port",
        r"connection\0id",
        r"connection\0mtls",
        r"connection\0tls_version",
        r"connection\0requested_server_name",
        r"connection\0transport_failure_reason",
        r"connection\0termination_details",
        r"connection_id",
        r"upstream\0address",
        r"upstream\0port",
        r"upstream\0local_address",
        r"upstream\0transport_failure_reason",
        r"upstream\0tls_version",
        r"upstream\0request_attempt_count",
        r"upstream\0num_endpoints",
        r"upstream\0locality",
        r"upstream\0cx_pool_ready_duration",
        r"xds\0cluster_name",
        r"xds\0route_name",
        r"xds\0virtual_host_name",
        r"xds\0listener_direction",
        r"xds\0filter_chain_name",
        r"request\0time",
        r"request\0duration",
        r"request\0protocol",
        r"request\0size",
        r"request\0total_size",
        r"request\0headers",
        r"request\0path",
        r"request\0id",
        r"response\0size",
        r"response\0total_size",
        r"response\0flags",
        r"response\0code",
        r"response\0code_details",
        r"response\0headers",
        r"metadata",
        r"filter_state",
        r"plugin_name",
        r"plugin_vm_id",
    ];
    // Values that no two runs share: whether they are there is what counts.
    let varies = |path: &&str| {
        ["port", "connection\\0id", "connection_id", "time", "cx_pool"].iter().any(|part| path.contains(part))
    };
    let ask = |callback: &str, path: &str| {
        let size = if varies(&path) { "size " } else { "" };
        format!("{callback}: {size}proxy_get_property \"{path}\"\n")
    };
    callbacks.iter().map(|callback| PATHS.map(|path| ask(callback, path)).concat()).collect()
}

fn buffers(callback: &str) -> String {
    let mut script = String::new();
    for buffer in 0..=9 {
        script.push_str(&format!("{callback}: proxy_get_buffer_bytes {buffer} 0 100\n"));
        script.push_str(&format!("{callback}: proxy_get_buffer_status {buffer}\n"));
    }
    for buffer in (0..=8).filter(|buffer| !matches!(buffer, 2 | 3)) {
        script.push_str(&format!("{callback}: proxy_set_buffer_bytes {buffer} 0 0 \"x\"\n"));
    }
    script
}

fn crash(id: &str, shows: &'static str, policy: &str, moves: &[Move], script: &str) -> Row {
    let settings = json!({ "failure_policy": policy, "reload": { "base_interval": "50ms", "max_interval": "50ms" } });
    Row::new(format!("tcp/{id}"), shows).with(settings).tcp(moves.iter().copied()).script(script).dies()
}

pub(super) fn rows() -> Vec<Row> {
    vec![
        row("order", "on_done comes before on_log, unlike for HTTP.", &USUAL, ""),
        row(
            "origin_first",
            "The origin speaks and finishes first; the client goes on, and closes as the last.",
            &[
                Origin(Sends("220")),
                Origin(Finishes),
                Client(SeesTheEnd),
                Client(Sends("late")),
                Client(Finishes),
                Origin(SeesTheEnd),
            ],
            "",
        ),
        row(
            "client_aborts",
            "A client that breaks off is the remote peer; nothing is told of the upstream's side.",
            &[Client(Sends("x")), Client(Aborts), Origin(SeesTheEnd)],
            "",
        ),
        row(
            "origin_aborts",
            "An origin that breaks off closes the connection from this side.",
            &[Client(Sends("x")), Origin(Aborts), Client(SeesTheEnd)],
            "",
        ),
        row("unreachable", "So does one that cannot be reached.", &[Client(SeesTheEnd)], "").without_origin(),
        row(
            "held_new_connection",
            "A new connection that is held reaches nobody until it is resumed.",
            &[
                Told("http_call_response"),
                Origin(Sends("220")),
                Client(Sends("hi")),
                Client(Finishes),
                Origin(Finishes),
                Client(SeesTheEnd),
            ],
            &format!(
                "new_connection: {CALL}\nnew_connection: return 1\n{ANSWERED}\nhttp_call_response: proxy_continue_stream 2"
            ),
        ),
        row(
            "closed_new_connection",
            "One that is closed never reaches the upstream.",
            &[Client(SeesTheEnd)],
            "new_connection: proxy_close_stream 2",
        ),
        row(
            "resumed_new_connection",
            "Resuming in the callback that pauses passes.",
            &USUAL,
            "new_connection: proxy_continue_stream 2\nnew_connection: return 1",
        ),
        row(
            "paused_bytes",
            "Paused bytes are shown again with what came since, and pass together.",
            &[Client(Sends("one")), Client(Sends("two")), Client(Sends("three")), Client(Finishes), Origin(SeesTheEnd)],
            "downstream_data#1: return 1\ndownstream_data#2: return 1\ndownstream_data#3: proxy_get_buffer_bytes 2 0 100",
        ),
        row(
            "other_answers",
            "Whatever is not CONTINUE pauses.",
            &[Client(Sends("one")), Client(Sends("two")), Origin(Sends("a")), Origin(Sends("b"))],
            "downstream_data#1: return 2\nupstream_data#1: return 3",
        ),
        row(
            "resumed_bytes",
            "Bytes that wait can be read, edited and resumed from another callback; their end goes with them.",
            &[Client(Sends("one")), Client(Finishes), Told("http_call_response"), Origin(SeesTheEnd)],
            &format!(
                "downstream_data: return 1\ndownstream_data#2: {CALL}\n{ANSWERED}\nhttp_call_response: proxy_get_buffer_bytes 2 0 100\n\
                 http_call_response: proxy_set_buffer_bytes 2 0 1 \"ZZ\"\nhttp_call_response: proxy_get_buffer_status 2\n\
                 http_call_response: proxy_continue_stream 2"
            ),
        ),
        row(
            "resumed_in_the_callback",
            "Resuming in the callback that pauses passes; the bytes are not shown again.",
            &[Client(Sends("one")), Client(Sends("two"))],
            "downstream_data: proxy_continue_stream 2\ndownstream_data: return 1",
        ),
        row(
            "resumed_without_pause",
            "Resuming what was not paused does nothing.",
            &USUAL,
            "new_connection: proxy_continue_stream 2\ndownstream_data: proxy_continue_stream 2\n\
             upstream_data: proxy_continue_stream 2",
        ),
        row(
            "upstream_cannot_be_resumed",
            "The upstream's side cannot be resumed; the next callback can let go.",
            &[Origin(Sends("one")), Origin(Sends("two")), Origin(Finishes), Client(SeesTheEnd)],
            "upstream_data#1: proxy_continue_stream 3\nupstream_data#1: return 1\n\
             upstream_data#2: proxy_get_buffer_bytes 3 0 100",
        ),
        row(
            "paused_end_of_upstream",
            "Pausing at the end of the upstream keeps its bytes for ever.",
            &[Origin(Sends("one")), Origin(Finishes), Client(Finishes), Client(SeesTheEnd), Origin(SeesTheEnd)],
            "upstream_data: return 1",
        ),
        row(
            "edits",
            "Bytes are replaced at their start and appended at their end, nowhere between.",
            &[
                Client(Sends("abcdef")),
                Origin(Sends("ABCDEF")),
                Client(Sends("x")),
                Client(Finishes),
                Origin(SeesTheEnd),
            ],
            "downstream_data#1: proxy_set_buffer_bytes 2 0 2 \"XYZ\"\ndownstream_data#1: proxy_get_buffer_bytes 2 0 100\n\
             downstream_data#1: proxy_set_buffer_bytes 2 100 0 \"tail\"\ndownstream_data#1: proxy_set_buffer_bytes 2 3 1 \"Q\"\n\
             downstream_data#1: proxy_set_buffer_bytes 3 0 0 \"Q\"\ndownstream_data#1: proxy_get_buffer_bytes 2 1 3\n\
             downstream_data#2: proxy_set_buffer_bytes 2 0 100 \"\"\ndownstream_data#3: proxy_set_buffer_bytes 2 0 0 \"last\"\n\
             upstream_data#1: proxy_set_buffer_bytes 3 0 1 \"\"\nupstream_data#1: proxy_set_buffer_bytes 2 0 0 \"Q\"\n\
             upstream_data#1: proxy_get_buffer_bytes 3 0 100",
        ),
        row(
            "close_2",
            "Closing drops what was shown; nothing is asked any more.",
            &[Origin(Sends("before")), Client(Sends("x")), Client(SeesTheEnd), Origin(SeesTheEnd)],
            "downstream_data: proxy_close_stream 2",
        ),
        row(
            "close_3",
            "Closing the upstream's side closes the connection.",
            &[Client(Sends("x")), Origin(Sends("y")), Client(SeesTheEnd), Origin(SeesTheEnd)],
            "upstream_data: proxy_close_stream 3",
        ),
        row(
            "close_from_a_callout",
            "A connection whose bytes wait can be closed from another callback.",
            &[Client(Sends("x")), Client(SeesTheEnd)],
            &format!(
                "downstream_data: {CALL}\ndownstream_data: return 1\n{ANSWERED}\nhttp_call_response: proxy_close_stream 2"
            ),
        ),
        row(
            "http_functions",
            "What is for HTTP answers OK and does nothing.",
            &USUAL,
            "downstream_data#1: proxy_continue_stream 0\ndownstream_data#1: proxy_continue_stream 1\n\
             downstream_data#1: proxy_close_stream 0\ndownstream_data#1: proxy_close_stream 1\n\
             downstream_data#1: proxy_continue_stream 4\ndownstream_data#1: proxy_close_stream 4\n\
             downstream_data#1: proxy_send_local_response 403 \"no\" \"no\" {} -1\n\
             downstream_data#1: proxy_get_header_map_pairs 0\ndownstream_data#1: proxy_get_header_map_value 0 \"a\"\n\
             downstream_data#1: proxy_add_header_map_value 2 \"a\" \"b\"\ndownstream_data#1: proxy_get_header_map_size 1",
        ),
        row(
            "buffers",
            "Buffers that are not there are empty, and cannot be changed.",
            &USUAL,
            &buffers("upstream_data#1"),
        ),
        row("buffers_in_log", "So are all of them at the end.", &USUAL, &buffers("log")),
        row(
            "properties",
            "What is known of a connection, from its begin to its end.",
            &USUAL,
            &properties(&["new_connection", "downstream_data#1", "upstream_data#1", "log"]),
        ),
        row(
            "own_properties",
            "Properties are kept with the connection.",
            &USUAL,
            "new_connection: proxy_set_property \"a\" \"b\"\ndownstream_data#1: proxy_get_property \"a\"\n\
             log: proxy_get_property \"a\"\ndownstream_connection_close: proxy_set_property \"a\" \"c\"",
        ),
        row(
            "filter_state",
            "So is filter state, of Envoy's own kinds and declared ones; at the end it is still there.",
            &USUAL,
            r#"
            new_connection: proxy_call_foreign_function "declare_property" "\n\x01r\x10\x01\x18\x00\x28\x00"
            new_connection: proxy_call_foreign_function "declare_property" "\n\x01c\x10\x00\x18\x01\x28\x01"
            new_connection: proxy_set_property "r" "1"
            new_connection: proxy_set_property "c" "2"
            new_connection: proxy_set_property "p" "3"
            new_connection: proxy_call_foreign_function "set_envoy_filter_state" "\n\x0cenvoy.string\x12\x01x"
            downstream_data#1: proxy_set_property "r" "4"
            downstream_data#1: proxy_set_property "c" "5"
            upstream_data#1: proxy_get_property "r"
            upstream_data#1: proxy_get_property "c"
            upstream_data#1: proxy_get_property "filter_state\0wasm.r"
            upstream_data#1: proxy_get_property "filter_state\0wasm.c"
            upstream_data#1: proxy_get_property "filter_state\0wasm.p"
            upstream_data#1: proxy_get_property "filter_state\0envoy.string"
            upstream_data#1: proxy_get_property "upstream_filter_state\0wasm.p"
            done: proxy_get_property "p"
            log: proxy_get_property "r"
            log: proxy_get_property "filter_state\0wasm.c"
            log: proxy_set_property "p" "6"
            log: proxy_get_property "p"
            "#,
        ),
        row(
            "steering",
            "In Envoy filter state can send a connection elsewhere: here, to a cluster that does not exist.",
            &[Client(Sends("hello")), Client(SeesTheEnd)],
            r#"
            new_connection: proxy_call_foreign_function "set_envoy_filter_state" "\n\x17envoy.tcp_proxy.cluster\x12\x06nobody"
            downstream_data: proxy_close_stream 2
            "#,
        )
        .deviates("filter state that steers Envoy"),
        row(
            "expressions",
            "Expressions see the connection, and no request.",
            &USUAL,
            r#"
            new_connection: proxy_call_foreign_function "expr_create" "source.address.size() > 0 && plugin_name != ''"
            new_connection: proxy_call_foreign_function "expr_evaluate" "\x00\x00\x00\x00"
            new_connection: proxy_call_foreign_function "expr_create" "xds.cluster_name"
            new_connection: proxy_call_foreign_function "expr_evaluate" "\x01\x00\x00\x00"
            new_connection: proxy_call_foreign_function "expr_create" "request.path"
            new_connection: proxy_call_foreign_function "expr_evaluate" "\x02\x00\x00\x00"
            new_connection: proxy_call_foreign_function "expr_create" "connection.mtls"
            new_connection: proxy_call_foreign_function "expr_evaluate" "\x03\x00\x00\x00"
            upstream_data#1: proxy_call_foreign_function "expr_evaluate" "\x01\x00\x00\x00"
            log: proxy_call_foreign_function "expr_evaluate" "\x00\x00\x00\x00"
            log: proxy_call_foreign_function "expr_evaluate" "\x01\x00\x00\x00"
            "#,
        ),
        row(
            "effective_root",
            "On behalf of its root a filter sees no bytes; the next callback is the connection's again.",
            &USUAL,
            "downstream_data#1: proxy_set_effective_context $root\ndownstream_data#1: proxy_get_buffer_bytes 2 0 100\n\
             downstream_data#1: proxy_set_buffer_bytes 2 0 0 \"x\"\ndownstream_data#1: proxy_continue_stream 2\n\
             downstream_data#1: proxy_close_stream 2\ndownstream_data#1: proxy_get_property \"source\\0port\"\n\
             upstream_data#1: proxy_get_buffer_bytes 3 0 100",
        ),
        row(
            "calls",
            "Calls are begun, refused and cancelled as from HTTP filters.",
            &USUAL,
            r#"
            new_connection: proxy_http_call "nobody" { ":method" "GET" ":path" "/" ":authority" "c" } "" "" 1000
            new_connection: proxy_http_call "callee" { ":method" "GET" } "" "" 1000
            new_connection: proxy_grpc_call "nobody" "svc" "Get" {} "hello" 1000
            new_connection: proxy_grpc_stream "nobody" "svc" "Get" {}
            new_connection: proxy_grpc_call "\x0a\x08\x0a\x06nobody" "svc" "Get" {} "hello" 1000
            new_connection: proxy_grpc_send 6 "hello" 0
            new_connection: proxy_grpc_cancel 6
            new_connection: proxy_get_status
            "#,
        ),
        row("done_refused", "A guest that is not done is deleted all the same.", &USUAL, "done: return 0"),
        two(
            "two_plugins",
            "The client's bytes pass plugins in order, the upstream's in reverse; at the end one comes after the other.",
            &USUAL,
            "",
        ),
        two(
            "one_buffer",
            "All plugins look at the same bytes, also at those that they let pass before.",
            &[Client(Sends("one")), Client(Sends("two")), Origin(Sends("ab")), Origin(Sends("cd"))],
            "one/downstream_data: proxy_set_buffer_bytes 2 0 0 \"<\"\ntwo/downstream_data#1: return 1\n\
             two/downstream_data: proxy_get_buffer_bytes 2 0 100\none/upstream_data#1: return 1\n\
             one/upstream_data: proxy_get_buffer_bytes 3 0 100",
        ),
        two(
            "seen_while_held",
            "What a plugin has let pass it does not see any more, even if another holds it.",
            &[Client(Sends("one")), Origin(Sends("ab"))],
            "two/downstream_data: return 1\none/upstream_data: proxy_get_buffer_bytes 2 0 100\n\
             two/upstream_data: proxy_get_buffer_bytes 2 0 100",
        ),
        two(
            "decides_again",
            "When a plugin resumes what one behind it holds, that one is asked again.",
            &[Client(Sends("one")), Origin(Sends("ab")), Origin(Sends("cd"))],
            "two/downstream_data#1: return 1\ntwo/downstream_data#2: return 1\none/upstream_data: proxy_continue_stream 2",
        ),
        two(
            "overrides_ahead",
            "A plugin that resumes also passes what one ahead of it holds.",
            &[Client(Sends("one")), Origin(Sends("ab"))],
            "one/downstream_data: return 1\ntwo/upstream_data: proxy_continue_stream 2",
        )
        .deviates("`proxy_continue_stream(2)` of one filter while another holds"),
        crash(
            "crash_new_connection",
            "A trap closes the connection, and under FAIL_CLOSED every later one.",
            "fail_closed",
            &[Client(SeesTheEnd), Again, Client(SeesTheEnd)],
            "new_connection: trap",
        ),
        crash(
            "crash_downstream",
            "What was shown goes nowhere.",
            "fail_closed",
            &[Client(Sends("ok")), Client(Sends("x")), Client(SeesTheEnd), Origin(SeesTheEnd)],
            "downstream_data#2: trap",
        ),
        crash(
            "crash_upstream",
            "In neither direction.",
            "fail_closed",
            &[Origin(Sends("x")), Client(SeesTheEnd), Origin(SeesTheEnd)],
            "upstream_data: trap",
        ),
        crash(
            "crash_open",
            "Under FAIL_OPEN later connections pass without the plugin.",
            "fail_open",
            &[
                Client(Sends("x")),
                Client(SeesTheEnd),
                Again,
                Client(Sends("y")),
                Origin(Sends("z")),
                Client(Finishes),
                Origin(Finishes),
                Client(SeesTheEnd),
            ],
            "downstream_data: trap",
        ),
        crash(
            "crash_reload",
            "Under FAIL_RELOAD a new VM serves after a back-off.",
            "fail_reload",
            &[
                Client(Sends("x")),
                Client(SeesTheEnd),
                AgainUntilConnected,
                Origin(Sends("y")),
                Origin(Finishes),
                Client(SeesTheEnd),
            ],
            "downstream_data: trap",
        ),
        crash(
            "crash_in_log",
            "A trap in on_log comes too late for its connection, not for the next.",
            "fail_closed",
            &[Client(Sends("x")), Client(Finishes), Origin(Finishes), Client(SeesTheEnd), Again, Client(SeesTheEnd)],
            "log: trap",
        ),
    ]
}
