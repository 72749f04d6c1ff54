//! Properties, foreign functions, WASI: what a guest learns of its surroundings.

use serde_json::json;

use super::{PHASES, full, in_phase};
use crate::differential::{Row, Step};

/// Paths of properties, with what they are asked for.
const PROPERTIES: [&str; 57] = [
    r"request\0path",
    r"request\0url_path",
    r"request\0query",
    r"request\0host",
    r"request\0scheme",
    r"request\0method",
    r"request\0headers\0x-one",
    r"request\0headers\0x-twice",
    r"request\0headers\0x-absent",
    r"request\0referer",
    r"request\0useragent",
    r"request\0time",
    r"request\0id",
    r"request\0protocol",
    r"request\0size",
    r"request\0total_size",
    r"request\0duration",
    r"response\0code",
    r"response\0code_details",
    r"response\0flags",
    r"response\0grpc_status",
    r"response\0headers\0x-answer",
    r"response\0trailers\0x-answer-sum",
    r"response\0size",
    r"response\0total_size",
    r"source\0address",
    r"destination\0address",
    r"connection\0id",
    r"connection\0mtls",
    r"connection\0requested_server_name",
    r"connection\0tls_version",
    r"connection\0subject_local_certificate",
    r"connection\0termination_details",
    "connection_id",
    r"upstream\0address",
    r"upstream\0local_address",
    r"upstream\0tls_version",
    r"upstream\0transport_failure_reason",
    "plugin_name",
    "plugin_root_id",
    "plugin_vm_id",
    r"xds\0cluster_name",
    r"xds\0route_name",
    r"xds\0listener_direction",
    r"xds\0node\0id",
    r"xds\0virtual_host_name",
    r"xds\0filter_chain_name",
    "node",
    "cluster_name",
    "route_name",
    "listener_direction",
    "request",
    "response",
    "nothing",
    r"nothing\0at\0all",
    "",
    r"request\0",
];

pub(super) fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new("properties/set_and_get", "What a filter sets can be read under its name and as filter state.").script(
            r#"
            request_headers: proxy_set_property "mine" "value"
            request_headers: proxy_get_property "mine"
            request_headers: proxy_get_property "filter_state\0wasm.mine"
            request_headers: proxy_set_property "mine" "other"
            response_headers: proxy_get_property "mine"
            log: proxy_get_property "mine"
            "#,
        ),
        Row::new("properties/set_with_nul", "A path of several parts can be set, and not read back.").script(
            "request_headers: proxy_set_property \"foo\\0bar\" \"1\"\nrequest_headers: proxy_get_property \"foo\\0bar\"",
        ),
        Row::new("properties/set_known", "The host's own properties are not hidden by those that are set.").script(
            "request_headers: proxy_set_property \"request\" \"1\"\nrequest_headers: proxy_get_property \"request\\0method\"",
        ),
        Row::new("properties/headers", "A list of fields comes as a map, values of one name joined.")
            .script("request_headers: proxy_remove_header_map_value 0 \"x-calls\"\nrequest_headers: map proxy_get_property \"request\\0headers\"")
            .steps([Step::get().field("x-twice", "a").field("x-twice", "b")]),
        Row::new("foreign/unknown", "A function that does not exist is NOT_FOUND.")
            .script("request_headers: proxy_call_foreign_function \"nothing\" \"\"\nrequest_headers: proxy_call_foreign_function! \"nothing\" \"\""),
        Row::new("foreign/compress", "compress and uncompress are inverse.").script(
            r#"
            -request_headers: proxy_call_foreign_function "compress" "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" =packed
            request_headers: proxy_call_foreign_function "uncompress" $packed
            request_headers: proxy_call_foreign_function "uncompress" "no stream"
            request_headers: proxy_call_foreign_function "uncompress" ""
            -request_headers: proxy_call_foreign_function "compress" "" =empty
            request_headers: proxy_call_foreign_function "uncompress" $empty
            request_headers: proxy_call_foreign_function! "compress" "x"
            "#,
        ),
        Row::new("foreign/uncompress_unbounded", "A few bytes that unfold into many.").script(
            "-request_headers: proxy_call_foreign_function \"compress\" \"a\"*1000000 =packed\nrequest_headers: proxy_call_foreign_function \"uncompress\" $packed",
        ),
        Row::new("foreign/clear_route_cache", "The route is chosen again.")
            .script("request_headers: proxy_call_foreign_function \"clear_route_cache\" \"\""),
        Row::new("foreign/verify_signature_nonsense", "verify_signature without a key is BAD_ARGUMENT.").script(
            "request_headers: proxy_call_foreign_function \"verify_signature\" \"\"\nrequest_headers: proxy_call_foreign_function \"verify_signature\" \"\\x0a\\x06sha256\"\nrequest_headers: proxy_call_foreign_function \"verify_signature\" \"\\xff\\xff\"",
        ),
        Row::new("wasi/clocks", "There are two clocks.").script(
            r#"
            -request_headers: clock_time_get 0 1 =now
            request_headers: clock_res_get 0
            request_headers: clock_res_get 1
            request_headers: clock_res_get 2
            request_headers: clock_time_get 2 1
            request_headers: clock_time_get 3 1
            request_headers: clock_time_get 4294967295 1
            "#,
        ),
        Row::new("wasi/arguments", "There are no arguments.").script("request_headers: args_sizes_get\nrequest_headers: args_get 0 0"),
        Row::new("wasi/random", "Randomness in pieces of at most 64 KiB.")
            .script("request_headers: random_get 65536\nrequest_headers: random_get 65537\nrequest_headers: random_get 0"),
        Row::new("wasi/files", "There are no files.").script(
            r#"
            request_headers: fd_prestat_get 3 0
            request_headers: fd_prestat_dir_name 3 0 0
            request_headers: path_open 3 0 "etc/passwd" 0 0 0 0
            request_headers: path_filestat_get 3 0 "etc" 0
            request_headers: path_unlink_file 3 "etc"
            request_headers: fd_filestat_get 1 0
            request_headers: fd_read 0 0 0
            request_headers: fd_pread 0 0 0 0
            request_headers: fd_fdstat_set_flags 1 0
            request_headers: fd_sync 1
            request_headers: fd_tell 1
            "#,
        ),
        Row::new("wasi/close_and_seek", "Closing and seeking is no error, and does nothing.")
            .script("request_headers: fd_close 1\nrequest_headers: fd_close 77\nrequest_headers: fd_seek 1 0 0"),
        Row::new("wasi/fdstat", "Only the two outputs have a status.")
            .script("request_headers: fd_fdstat_get 0\nrequest_headers: fd_fdstat_get 3"),
        Row::new("wasi/sockets", "There are no sockets.")
            .script("request_headers: raw sock_recv 3 0 0 0 0 0\nrequest_headers: sock_shutdown 3 0"),
        Row::new("wasi/write", "Outputs 1 and 2 are the log; others are no files.").script(
            r#"
            request_headers: fd_write 1 "@wasi/write@to output 1\n"
            request_headers: fd_write 2 "@wasi/write@to output 2"
            request_headers: fd_write 0 "nowhere"
            request_headers: fd_write 3 "nowhere"
            request_headers: fd_pwrite 1 "@wasi/write@to output 1" 0
            "#,
        ),
        Row::new("wasi/poll", "Polling ends at once, with nothing.").script("request_headers: poll_oneoff 0 0 1\nrequest_headers: poll_oneoff 0 0 0\nrequest_headers: sched_yield"),
        Row::new("wasi/environment", "The environment is what the configuration says.")
            .with(json!({ "environment": { "set": { "TIER": "gold", "EMPTY": "" } } }))
            .script("request_headers: environ_sizes_get"),
    ];
    for phase in PHASES {
        let script: Vec<String> = PROPERTIES
            .iter()
            // Whether an upstream is there before the request has ended is a matter of time.
            .filter(|path| !(path.starts_with("upstream") && phase.starts_with("request")))
            .map(|path| {
                // Times, and numbers that the host gives: their size is all that can be compared.
                let differs = ["time", "duration", "connection\\0id", "connection_id", "local_address", "request\\0id"];
                let how = if differs.iter().any(|name| path.contains(name)) { "size " } else { "" };
                format!("{phase}: {how}proxy_get_property \"{path}\"")
            })
            .collect();
        let row = Row::new(
            format!("properties/in_{phase}"),
            "Which properties there are in this callback, and how they look.",
        );
        let mut row = in_phase(row.script(script.join("\n")), phase);
        if phase == "log" {
            row = row.deviates("bytes of heads");
        }
        row.steps = vec![
            full()
                .path("/p?q=1")
                .field("x-one", "1")
                .field("x-twice", "a")
                .field("x-twice", "b")
                .field("user-agent", "suite")
                .field("referer", "r"),
        ];
        rows.push(row);
    }
    rows
}
