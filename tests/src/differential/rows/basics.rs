//! Log, time, contexts, and calls that no callback is for.

use super::{PHASES, full, in_phase};
use crate::differential::{Row, Step};

pub(super) fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new("log/levels", "Levels go from 0 to 5; others are BAD_ARGUMENT.").script(
            r#"
            request_headers: proxy_log 0 "trace"
            request_headers: proxy_log 1 "debug"
            request_headers: proxy_log 2 "info"
            request_headers: proxy_log 3 "warn"
            request_headers: proxy_log 4 "error"
            request_headers: proxy_log 5 "critical"
            request_headers: proxy_log 6 "none"
            request_headers: proxy_log 4294967295 "none"
            request_headers: proxy_log 2 ""
            "#,
        ),
        Row::new("log/shown", "What is below the host's level is dropped; the rest reaches its log.").script(
            r#"
            request_headers: proxy_log 1 "@log/shown@at debug"
            request_headers: proxy_log 2 "@log/shown@at info"
            request_headers: proxy_log 5 "@log/shown@at critical"
            "#,
        ),
        Row::new("log/get_level", "The level is the host's own.").script("request_headers: proxy_get_log_level"),
        Row::new("time/nanoseconds", "The time is that of the wall clock, in nanoseconds.")
            .script("request_headers: proxy_get_current_time_nanoseconds"),
        Row::new("contexts/effective_unknown", "A context that does not exist cannot be the effective one.").script(
            r#"
            request_headers: proxy_set_effective_context 0
            request_headers: proxy_set_effective_context 999999
            request_headers: proxy_set_effective_context $context
            request_headers: proxy_set_effective_context $root
            "#,
        ),
        Row::new(
            "contexts/effective_root",
            "On behalf of its root a stream sees no request; the next callback is its own again.",
        )
        .script(
            r#"
                request_headers: proxy_set_effective_context $root
                request_headers: proxy_get_header_map_value 0 ":method"
                request_headers: proxy_get_header_map_pairs 0
                request_headers: proxy_get_property "request\0method"
                request_headers: proxy_get_property "plugin_name"
                request_headers: proxy_set_effective_context $context
                request_headers: proxy_get_header_map_value 0 ":method"
                request_headers: proxy_set_effective_context $root
                response_headers: proxy_get_header_map_value 2 ":status"
                "#,
        ),
        Row::new("contexts/done_not_asked", "proxy_done is NOT_FOUND where nothing waits for it.").script(
            r#"
            request_headers: proxy_done
            request_headers: proxy_set_effective_context $root
            request_headers: proxy_done
            "#,
        ),
        Row::new("contexts/done_false", "A stream's context ends at once, even if it asks to wait.")
            .script("done: return 0"),
        Row::new("contexts/order", "A context is created, sees its stream, logs it, is done and is deleted.")
            .steps([full()]),
        Row::new("contexts/order_bodiless", "A message without a body has no body callback.")
            .steps([Step::get().answer(204, &[], &[])]),
        Row::new("contexts/order_empty_body", "Neither has one whose body is empty and said to be.")
            .steps([Step::default().method("POST").field("content-length", "0").answer(200, &[], &[""])]),
        Row::new("contexts/order_head", "The answer to HEAD has no body.")
            .steps([Step::default().method("HEAD").answer(200, &[("content-length", "5")], &[])]),
        Row::new("contexts/order_304", "Nor has 304, whatever it says of a length.").steps([Step::get().answer(
            304,
            &[("etag", "\"1\"")],
            &[],
        )]),
        Row::new("contexts/no_upstream", "The host's own answer goes through the response's callbacks, too.")
            .script("response_headers: proxy_get_header_map_pairs 2")
            .steps([Step::get()
                .path("-x")
                .script("request_headers: proxy_replace_header_map_value 0 \":path\" \"/nowhere\"")]),
        Row::new("contexts/id_reuse", "Streams have ids of their own, and their root's is another.").script(
            r#"
            request_headers: proxy_set_effective_context $root =none
            request_headers: proxy_set_effective_context $context
            "#,
        ),
    ];
    for phase in PHASES {
        let script = [
            "proxy_continue_stream 0",
            "proxy_continue_stream 1",
            "proxy_continue_stream 2",
            "proxy_continue_stream 3",
            "proxy_continue_stream 4",
            "proxy_close_stream 4",
            "proxy_done",
            "proxy_get_log_level",
        ];
        // To resume what is not paused makes Envoy send a message twice: only where nothing can be sent any more.
        if matches!(phase, "log" | "done" | "delete") {
            let script = script.map(|call| format!("{phase}: {call}")).join("\n");
            let row =
                Row::new(format!("contexts/stream_calls_in_{phase}"), "Resuming and closing what is over is no error.");
            rows.push(in_phase(row.script(script), phase));
        }
    }
    rows
}
