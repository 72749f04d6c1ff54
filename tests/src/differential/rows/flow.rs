//! Pausing, buffering, ends of streams.

use std::time::Duration;

use serde_json::json;

use super::full;
use crate::differential::{Plugin, Row, Step};

pub(super) fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new("flow/bodies_in_pieces", "Each piece of a body is seen alone; the end of a chunked one is a call without bytes.")
            .script("request_body: proxy_get_buffer_bytes 0 0 100\nresponse_body: proxy_get_buffer_bytes 1 0 100")
            .steps([Step::post(&["one", "two", "three"]).answer(200, &[], &["a", "bc", "def"])])
            .upstream(),
        Row::new("flow/hold_headers", "Headers held with StopIteration stay readable and can be changed while the body comes.")
            .script(
                r#"
                request_headers: return 1
                request_body#1: proxy_get_header_map_value 0 ":method"
                request_body#1: proxy_add_header_map_value 0 "x-late" "1"
                request_body#1: return 1
                "#,
            )
            .steps([Step::post(&["one", "two"])])
            .upstream(),
        Row::new("flow/hold_headers_released_by_body", "The first body callback that continues lets headers and body go.")
            .script(
                r#"
                request_headers: return 1
                request_body#1: return 1
                request_body#2: return 0
                request_body#3: proxy_get_header_map_value 0 ":method"
                "#,
            )
            .steps([Step::post(&["one", "two", "three"])])
            .upstream(),
        Row::new("flow/hold_all_body_waits", "Where headers stop everything, no body callback comes until they are resumed.")
            .strict()
            .script("request_headers: proxy_http_call \"callee\" { \":method\" \"GET\", \":path\" \"/ROW\", \":authority\" \"callee\" } \"\" { } 1000\nrequest_headers: return 1\nhttp_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_continue_stream 0\nrequest_body: proxy_get_buffer_bytes 0 0 100")
            .steps([Step::post(&["one", "two"]).callee(200, &[], "go")])
            .upstream(),
        Row::new("flow/buffer_request", "Body paused with StopIterationAndBuffer: the buffer has all so far, and edits stay.")
            .script(
                r#"
                request_headers: return 1
                request_body: proxy_get_buffer_bytes 0 0 100
                request_body#1: return 1
                request_body#2: proxy_set_buffer_bytes 0 0 3 "ONE!"
                request_body#2: return 1
                request_body#3: return 1
                request_body#4: return 0
                "#,
            )
            .steps([Step::post(&["one", "two", "three"])])
            .upstream(),
        Row::new("flow/buffer_after_headers", "The same after the headers have gone.")
            .script("request_body: proxy_get_buffer_bytes 0 0 100\nrequest_body#1: return 1\nrequest_body#2: return 1\nrequest_body#3: return 0")
            .steps([Step::post(&["one", "two"])])
            .upstream(),
        Row::new("flow/buffer_response", "The same of a response.")
            .script("response_body: proxy_get_buffer_bytes 1 0 100\nresponse_body#1: return 1\nresponse_body#2: return 1\nresponse_body#3: return 0")
            .steps([Step::get().answer(200, &[], &["a", "bc"])]),
        Row::new("flow/buffer_then_pass", "After a release later pieces are seen alone.")
            .script("request_body: proxy_get_buffer_bytes 0 0 100\nrequest_body#1: return 1\nrequest_body#2: return 0\nrequest_body#3: return 0")
            .steps([Step::post(&["one", "two", "three"])])
            .upstream(),
        Row::new("flow/watermark_body", "StopIterationAndWatermark (2).")
            .script("request_body: proxy_get_buffer_bytes 0 0 100\nrequest_body#1: return 2\nrequest_body#2: return 0")
            .steps([Step::post(&["one", "two"])])
            .upstream(),
        Row::new("flow/no_buffer_body", "StopIterationNoBuffer (3).")
            .script("request_body: proxy_get_buffer_bytes 0 0 100\nrequest_body#1: return 3\nrequest_body#2: return 0")
            .steps([Step::post(&["one", "two"])])
            .upstream(),
        Row::new("flow/end_stream_early", "ContinueAndEndStream (2) from headers is Continue to Envoy.")
            .script("request_headers: return 2\nrequest_body: proxy_get_header_map_value 0 \":method\"")
            .steps([Step::post(&["one", "two"])])
            .upstream(),
        Row::new("flow/end_response_early", "The same of a response.")
            .script("response_headers: return 2\nresponse_body: proxy_get_header_map_value 2 \":status\"")
            .steps([Step::get().answer(200, &[], &["a", "b"])]),
        Row::new("flow/stop_all_buffer", "StopAllIterationAndBuffer (3) from headers.")
            .script("request_headers: return 3\nrequest_headers: proxy_http_call \"callee\" { \":method\" \"GET\", \":path\" \"/ROW\", \":authority\" \"callee\" } \"\" { } 1000\nhttp_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_continue_stream 0\nrequest_body: proxy_get_buffer_bytes 0 0 100")
            .steps([Step::post(&["one", "two"]).callee(200, &[], "go")])
            .upstream(),
        Row::new("flow/stop_all_watermark", "StopAllIterationAndWatermark (4) from headers.")
            .script("request_headers: return 4\nrequest_headers: proxy_http_call \"callee\" { \":method\" \"GET\", \":path\" \"/ROW\", \":authority\" \"callee\" } \"\" { } 1000\nhttp_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_continue_stream 0\nrequest_body: proxy_get_buffer_bytes 0 0 100")
            .steps([Step::post(&["one", "two"]).callee(200, &[], "go")])
            .upstream(),
        Row::new("flow/trailers_held", "Trailers that stop hold the stream's end; continuing from a callout lets it go.")
            .script("request_trailers: return 1\nrequest_trailers: proxy_http_call \"callee\" { \":method\" \"GET\", \":path\" \"/ROW\", \":authority\" \"callee\" } \"\" { } 1000\nhttp_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_continue_stream 0")
            .steps([full().callee(200, &[], "go")])
            .upstream(),
        Row::new("flow/trailers_changed", "Trailers can be changed on their way.")
            .script("request_trailers: proxy_replace_header_map_value 1 \"x-sum\" \"2\"\nresponse_trailers: proxy_replace_header_map_value 3 \"x-answer-sum\" \"3\"")
            .steps([full()])
            .upstream(),
        Row::new("flow/response_held", "A response paused at its headers and resumed by a callout's answer.")
            .script("response_headers: return 1\nresponse_headers: proxy_http_call \"callee\" { \":method\" \"GET\", \":path\" \"/ROW\", \":authority\" \"callee\" } \"\" { } 1000\nhttp_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_add_header_map_value 2 \"x-late\" \"1\"\nhttp_call_response: proxy_get_header_map_value 0 \":method\"\nhttp_call_response: proxy_continue_stream 1\nresponse_body: proxy_get_buffer_bytes 1 0 100")
            .strict()
            // The body arrives while the headers wait. Were it on its way when they go on, Envoy might tell of its end apart.
            .steps([Step::get().callee(200, &[], "go").callee_takes(Duration::from_millis(400))]),
        Row::new("flow/answer_is_out_of_range", "An action that does not exist is the strictest stop.")
            .script("request_headers: return 77\nrequest_headers: proxy_http_call \"callee\" { \":method\" \"GET\", \":path\" \"/ROW\", \":authority\" \"callee\" } \"\" { } 1000\nhttp_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_continue_stream 0")
            .steps([Step::post(&["one"]).callee(200, &[], "go")])
            .upstream(),
        Row::new("flow/request_too_large", "What a paused filter holds is bounded: 413.")
            .with(json!({ "limits": { "buffered_bytes": "64KiB" } }))
            .script("request_headers: return 1\nrequest_body: return 1\nresponse_headers: proxy_get_header_map_pairs 2")
            .steps([Step::default().method("POST").body(&[&"x".repeat(1_500_000)])])
            .coarse()
            .upstream(),
        Row::new("flow/response_too_large", "The same of a response: 500.")
            .script("response_headers: return 1\nresponse_body: return 1")
            .steps([Step::get().answer(200, &[], &[&"x".repeat(1_500_000)])])
            .coarse(),
        Row::new("flow/chain_order", "A request passes filters in order, a response in the reverse order; logs in the order of requests.")
            .plugin(Plugin::new("outer").configuration("name: outer"))
            .plugin(Plugin::new("inner").configuration("name: inner"))
            .steps([full()]),
        Row::new("flow/chain_changes", "Each filter sees what the one before it has left.")
            .plugin(Plugin::new("outer").configuration("name: outer"))
            .plugin(Plugin::new("inner").configuration("name: inner"))
            .script(
                r#"
                outer/request_headers: proxy_add_header_map_value 0 "x-by" "outer"
                inner/request_headers: proxy_get_header_map_value 0 "x-by"
                inner/response_headers: proxy_add_header_map_value 2 "x-by" "inner"
                outer/response_headers: proxy_get_header_map_value 2 "x-by"
                outer/request_body#1: proxy_set_buffer_bytes 0 0 3 "ONE"
                inner/request_body: proxy_get_buffer_bytes 0 0 100
                "#,
            )
            .steps([full()])
            .upstream(),
        Row::new("flow/chain_outer_answers", "An answer of the first filter: the second sees the response, and logs, and never saw the request.")
            .plugin(Plugin::new("outer").configuration("name: outer"))
            .plugin(Plugin::new("inner").configuration("name: inner"))
            .script("outer/request_headers: proxy_send_local_response 403 \"\" \"outer\" { } -1\nouter/request_headers: return 1")
            .upstream(),
        Row::new("flow/chain_inner_answers", "An answer of the second filter passes both.")
            .plugin(Plugin::new("outer").configuration("name: outer"))
            .plugin(Plugin::new("inner").configuration("name: inner"))
            .script("inner/request_headers: proxy_send_local_response 403 \"\" \"inner\" { } -1\ninner/request_headers: return 1")
            .upstream(),
        Row::new("flow/chain_inner_holds", "The second filter holds what the first has passed.")
            .plugin(Plugin::new("outer").configuration("name: outer"))
            .plugin(Plugin::new("inner").configuration("name: inner"))
            .script("inner/request_headers: return 1\ninner/request_body: return 1\ninner/request_end: return 0")
            .steps([Step::post(&["one", "two"])])
            .upstream(),
    ];
    rows.push(
        Row::new(
            "flow/denied_too_late",
            "Headers that were continued have reached the upstream before the body is denied.",
        )
        .script("request_body#3: proxy_send_local_response 403 \"\" \"denied\" { } -1\nrequest_body#3: return 1")
        .steps([Step::post(&["some", "more", "evil", "end"]).await_upstream(1)])
        .upstream(),
    );
    rows
}
