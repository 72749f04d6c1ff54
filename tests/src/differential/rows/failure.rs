//! Traps, and what comes after; limits that Envoy lacks; capabilities.

use serde_json::json;

use crate::differential::{Row, Step};

fn crash(id: &str, shows: &'static str, policy: &str) -> Row {
    let trap = || Step::get().script("request_headers: trap");
    Row::new(id, shows)
        .with(json!({ "failure_policy": policy, "reload": { "base_interval": "500ms", "max_interval": "500ms" } }))
        .steps([Step::get(), trap(), Step::get(), Step::get()])
        .dies()
        .upstream()
}

pub(super) fn rows() -> Vec<Row> {
    vec![
        crash("failure/closed", "FAIL_CLOSED: 503 to the request that crashed the plugin, and to all after it.", "fail_closed"),
        crash("failure/open", "FAIL_OPEN: 503 to the request that crashed the plugin; those after it pass without it.", "fail_open"),
        Row::new("failure/reload", "FAIL_RELOAD: 503 to the request that crashed the plugin; after a back-off a new VM serves.")
            .with(json!({ "failure_policy": "fail_reload", "reload": { "base_interval": "50ms", "max_interval": "50ms" } }))
            .steps([Step::get(), Step::get().script("request_headers: trap"), Step::get().until_status(200)])
            .dies(),
        Row::new("failure/reload_backs_off", "Until then it is 503 to all.")
            .with(json!({ "failure_policy": "fail_reload", "reload": { "base_interval": "60s", "max_interval": "60s" } }))
            .steps([Step::get(), Step::get().script("request_headers: trap"), Step::get(), Step::get()])
            .dies(),
        Row::new("failure/reload_reconfigures", "The new VM is started and configured like the first.")
            .root("row: failure/reload_reconfigures")
            .steps([Step::get(), Step::get().script("request_headers: trap"), Step::get().until_status(200)])
            .dies(),
        Row::new("failure/details", "The response's details name what failed.")
            .with(json!({ "failure_policy": "fail_closed" }))
            .steps([Step::get().script("response_headers: trap"), Step::get().script("response_body: trap"), Step::get()])
            .dies(),
        Row::new("failure/in_body", "A trap in a body whose headers have gone to the upstream.")
            .with(json!({ "failure_policy": "fail_closed" }))
            .steps([Step::post(&["x"]).script("request_body: trap")])
            .dies(),
        Row::new("failure/in_log", "A trap in on_log comes too late for its request, not for the next.")
            .with(json!({ "failure_policy": "fail_closed" }))
            .steps([Step::get().script("log: trap"), Step::get()])
            .dies(),
        Row::new("failure/in_chain", "The plugin beside the one that crashed is not touched.")
            .plugin(crate::differential::Plugin::new("outer").configuration("name: outer").settings(json!({ "vm_id": "failure-outer" })))
            .plugin(
                crate::differential::Plugin::new("inner")
                    .configuration("name: inner")
                    .settings(json!({ "vm_id": "failure-inner", "failure_policy": "fail_closed" })),
            )
            .steps([Step::get().script("inner/request_headers: trap"), Step::get()])
            .dies(),
        Row::new("failure/bad_pointer", "A pointer outside the guest's memory is INVALID_MEMORY_ACCESS.")
            .with(json!({ "failure_policy": "fail_closed" }))
            .script("request_headers: raw proxy_log 2 4294967000 200")
            .dies()
            .deviates("pointers outside the guest's memory"),
        Row::new("failure/bad_result_pointer", "The same where the host would write.")
            .with(json!({ "failure_policy": "fail_closed" }))
            .script("request_headers: raw proxy_get_log_level 4294967294")
            .dies()
            .deviates("pointers outside the guest's memory"),
        Row::new("failure/null_results", "Null for a result.")
            .with(json!({ "failure_policy": "fail_closed" }))
            .script("request_headers: proxy_get_log_level!\nrequest_headers: proxy_get_header_map_value! 0 \":method\"")
            .dies(),
        Row::new("failure/stack", "A stack that overflows is a trap.")
            .with(json!({ "failure_policy": "fail_closed" }))
            .script("request_headers: overflow")
            .dies(),
        Row::new("failure/exit", "proc_exit does not end the guest; what its runtime does after it is a trap.")
            .with(json!({ "failure_policy": "fail_closed" }))
            .script("request_headers: exit 3")
            .dies(),
        Row::new("limits/memory", "Envoy gives a VM up to a gigabyte.")
            .script("request_headers: allocate 100")
            .with(json!({}))
            .deviates("memory of a VM"),
        Row::new("limits/time", "In Envoy a callback may take as long as it likes.")
            .with(json!({ "failure_policy": "fail_closed", "limits": { "callback_time": "50ms" } }))
            .script("request_headers: work 400")
            .dies()
            .deviates("CPU time of a callback"),
        Row::new("capabilities/allowed", "With an allow-list, what it does not name is answered with INTERNAL_FAILURE.")
            .with(json!({ "capabilities": ["proxy_log", "proxy_get_header_map_value", "random_get", "fd_write", "environ_get", "environ_sizes_get", "proxy_get_buffer_bytes"] }))
            .script(
                r#"
                request_headers: proxy_get_header_map_value 0 ":method"
                request_headers: proxy_get_header_map_pairs 0
                request_headers: proxy_add_header_map_value 0 "x" "1"
                request_headers: proxy_send_local_response 403 "" "" { } -1
                request_headers: proxy_http_call "callee" { ":method" "GET", ":path" "/ROW", ":authority" "c" } "" { } 1000
                request_headers: clock_time_get 0 0
                request_headers: sched_yield
                request_headers: args_sizes_get
                "#,
            )
            .upstream(),
    ]
}
