//! HTTP callouts.

use crate::differential::{Row, Step};

/// A call to `callee`, and what its answer does.
fn held(id: &str, shows: &'static str, then: &str) -> Row {
    // The stream is held, so that it is there when the answer comes.
    Row::new(id, shows).strict().script(format!(
        "request_headers: proxy_http_call \"callee\" {{ \":method\" \"GET\", \":path\" \"/ROW/ask?x\", \":authority\" \"callee.example\" }} \"\" {{ }} 1000\n\
         request_headers: return 1\n{then}"
    ))
}

const GO_ON: &str =
    "http_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_continue_stream 0";

pub(super) fn rows() -> Vec<Row> {
    let refused = |id: &str, shows: &'static str, arguments: &str| {
        Row::new(id, shows).script(format!("request_headers: proxy_http_call {arguments}"))
    };
    vec![
        held("http_call/answer", "An answer comes with its fields, body and trailers, to the root context.", &format!(
            r#"
            http_call_response: proxy_get_header_map_value 6 ":status"
            http_call_response: proxy_get_header_map_value 6 "X-Answer"
            http_call_response: proxy_get_header_map_value 6 "x-absent"
            http_call_response: proxy_get_header_map_value 7 "x-absent"
            http_call_response: proxy_get_header_map_pairs 7
            http_call_response: proxy_get_buffer_bytes 4 0 100
            http_call_response: proxy_get_buffer_bytes 4 1 1
            http_call_response: proxy_get_buffer_status 4
            http_call_response: proxy_get_header_map_value 0 ":path"
            http_call_response: proxy_get_header_map_pairs 0
            http_call_response: proxy_get_header_map_size 6
            http_call_response: proxy_add_header_map_value 6 "x" "1"
            http_call_response: proxy_set_buffer_bytes 4 0 1 "x"
            http_call_response: proxy_get_property "request\0path"
            {GO_ON}
            http_call_response: proxy_get_header_map_value 6 ":status"
            "#
        ))
        .steps([Step::get().callee(201, &[("x-answer", "yes"), ("x-twice", "a"), ("x-twice", "b")], "answer")])
        .upstream(),
        held("http_call/request_notes", "Envoy tells the upstream of itself.", GO_ON)
            .steps([Step::get().callee(200, &[], "go")])
            .deviates("notes on callouts"),
        Row::new("http_call/with_body", "A body is sent with its length, whatever the guest says of it; trailers follow.")
            .strict()
            .script(format!(
                "request_headers: proxy_http_call \"callee\" {{ \":method\" \"POST\", \":path\" \"/ROW\", \":authority\" \"c\", \"content-length\" \"99\", \"X-Upper\" \"1\" }} \"the body\" {{ }} 1000\n\
                 request_headers: return 1\n{GO_ON}"
            ))
            .steps([Step::get().callee(200, &[], "go")]),
        held("http_call/answer_used", "The stream can be changed and answered from the answer's callback.",
            "http_call_response: proxy_set_effective_context $context\n\
             http_call_response: proxy_get_header_map_value 0 \":method\"\n\
             http_call_response: proxy_add_header_map_value 0 \"x-late\" \"1\"\n\
             http_call_response: proxy_continue_stream 0",
        )
        .steps([Step::get().callee(200, &[], "go")])
        .upstream(),
        held("http_call/answer_denies", "A denial from the answer's callback.",
            "http_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_send_local_response 403 \"\" \"denied\" { } -1",
        )
        .steps([Step::get().callee(401, &[], "no")])
        .upstream(),
        held("http_call/answer_closes", "Closing the stream from the answer's callback.",
            "http_call_response: proxy_set_effective_context $context\nhttp_call_response: proxy_close_stream 0",
        )
        .steps([Step::get().callee(401, &[], "no")])
        .upstream(),
        Row::new("http_call/connection_refused", "A connection that is refused is a 503 that the host makes.")
            .strict()
            .script(format!(
                "request_headers: proxy_http_call \"closed\" {{ \":method\" \"GET\", \":path\" \"/ROW\", \":authority\" \"c\" }} \"\" {{ }} 1000\n\
                 request_headers: return 1\n\
                 http_call_response: proxy_get_header_map_pairs 6\n\
                 http_call_response: proxy_get_buffer_bytes 4 0 40\n\
                 {GO_ON}"
            )),
        held("http_call/timeout", "No answer in time is a 504 that the host makes.", &format!(
            "http_call_response: proxy_get_header_map_pairs 6\nhttp_call_response: proxy_get_buffer_bytes 4 0 100\n{GO_ON}"
        ))
        .steps([Step::get().callee_is_silent()]),
        held("http_call/hung_up", "A connection that ends before its answer is a 503, too.", &format!(
            "http_call_response: proxy_get_header_map_value 6 \":status\"\nhttp_call_response: proxy_get_buffer_bytes 4 0 40\n{GO_ON}"
        ))
        .steps([Step::get().callee_hangs_up()]),
        Row::new("http_call/broken_off", "An answer that breaks off is none: no fields, no body, and a status to ask for.")
            .strict()
            .script(
                r#"
                request_headers: proxy_http_call "origin" { ":method" "GET", ":path" "/ROW", ":authority" "c" } "" { } 1000
                request_headers: return 1
                http_call_response: proxy_get_header_map_value 6 ":status"
                http_call_response: proxy_get_header_map_pairs 6
                http_call_response: proxy_get_buffer_bytes 4 0 100
                http_call_response: proxy_get_status
                http_call_response: proxy_set_effective_context $context
                http_call_response: proxy_send_local_response 403 "" "denied" { } -1
                "#,
            )
            .steps([Step::get().answer(200, &[("transfer-encoding", "chunked")], &["zz is no length\r\n"])]),
        held("http_call/inline", "Lines of an answer are joined like those of a response.",
            &format!("http_call_response: proxy_get_header_map_value 6 \"vary\"\nhttp_call_response: proxy_get_header_map_value 6 \"x-own\"\n{GO_ON}"))
        .steps([Step::get().callee(200, &[("vary", "a"), ("vary", "b"), ("x-own", "a"), ("x-own", "b")], "go")]),
        Row::new("http_call/in_turn", "A second call from the first one's answer.")
            .strict()
            .script(
                r#"
                request_headers: proxy_http_call "callee" { ":method" "GET", ":path" "/ROW/first", ":authority" "c" } "" { } 1000
                request_headers: return 1
                http_call_response: proxy_get_buffer_bytes 4 0 100
                http_call_response: proxy_set_effective_context $context
                http_call_response#1: proxy_http_call "callee" { ":method" "GET", ":path" "/ROW/second", ":authority" "c" } "" { } 1000
                http_call_response#2: proxy_continue_stream 0
                "#,
            )
            .steps([Step::get().callee(200, &[], "go")])
            .upstream(),
        refused("http_call/unknown_upstream", "An upstream that does not exist is BAD_ARGUMENT.",
            r#""nobody" { ":method" "GET", ":path" "/ROW", ":authority" "c" } "" { } 1000"#),
        refused("http_call/no_method", "So is a request without a method,", r#""callee" { ":path" "/ROW", ":authority" "c" } "" { } 1000"#),
        refused("http_call/no_path", "without a path,", r#""callee" { ":method" "GET", ":authority" "c" } "" { } 1000"#),
        refused("http_call/no_authority", "without an authority,", r#""callee" { ":method" "GET", ":path" "/ROW" } "" { } 1000"#),
        refused("http_call/host_as_authority", "or with `host` in its place.", r#""callee" { ":method" "GET", ":path" "/ROW", "host" "c" } "" { } 1000"#)
            .steps([Step::get().callee_is_silent()])
            .fire_and_forget(),
        refused("http_call/timeout_too_long", "A timeout beyond the range of an i32.",
            r#""callee" { ":method" "GET", ":path" "/ROW", ":authority" "c" } "" { } 2147483648"#),
        refused("http_call/fields_undecodable", "Fields that cannot be decoded are none.", r#""callee" "\x01\0\0\0\xff" "" { } 1000"#),
        Row::new("http_call/ids", "Ids of calls are 4, 8, 12.. in each VM.")
            .with(serde_json::json!({}))
            .steps([Step::get().script(
                r#"
                request_headers: proxy_http_call "callee" { ":method" "GET", ":path" "/ROW", ":authority" "c" } "" { } 1000
                request_headers: proxy_http_call "callee" { ":method" "GET", ":path" "/ROW", ":authority" "c" } "" { } 1000
                "#,
            ).callee_is_silent()])
            .fire_and_forget(),
        Row::new("http_call/from_root", "A root context can call while it is configured, and is answered.")
            .root(
                r#"
                row: http_call/from_root
                configure: proxy_set_tick_period_milliseconds 20
                tick#1: proxy_http_call "closed" { ":method" "GET", ":path" "/ROW", ":authority" "c" } "" { } 1000
                tick#1: proxy_set_tick_period_milliseconds 0
                http_call_response: proxy_get_header_map_value 6 ":status"
                "#,
            )
            .until("proxy_get_header_map_value 6")
            .steps([]),
        Row::new("http_call/stream_gone", "The answer for a stream that has ended still comes to its root.")
            .root("row: http_call/stream_gone")
            .steps([Step::get()
                .script("request_headers: proxy_http_call \"callee\" { \":method\" \"GET\", \":path\" \"/ROW\", \":authority\" \"c\" } \"\" { } 300")
                .callee_is_silent()])
            .until("http_call_response(")
            .fire_and_forget()
            .deviates("callouts of a stream that has ended"),
    ]
}
