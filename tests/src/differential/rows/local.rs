//! Answers that a guest makes, and streams that it closes.

use super::full;
use crate::differential::{Row, Step};

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new("local_response/request_headers", "An answer from the request's headers runs back through the same filter, and no upstream hears of it.")
            .script(
                r#"
                request_headers: proxy_send_local_response 403 "why" "denied" { "x-why" "1" } -1
                request_headers: return 1
                response_headers: proxy_get_header_map_pairs 2
                response_body: proxy_get_buffer_bytes 1 0 100
                log: proxy_get_property "response\0code"
                log: proxy_get_property "response\0code_details"
                "#,
            )
            .upstream(),
        Row::new("local_response/returns_continue", "It stops the stream, whatever the guest returns.")
            .script("request_headers: proxy_send_local_response 403 \"why\" \"denied\" { } -1\nrequest_headers: return 0")
            .upstream(),
        Row::new("local_response/empty", "Without a body there is no body callback.")
            .script("request_headers: proxy_send_local_response 401 \"\" \"\" { } -1\nrequest_headers: return 1\nresponse_headers: proxy_get_header_map_pairs 2"),
        Row::new("local_response/content_type", "The guest can say what its body is, and cannot say its length.")
            .script(
                r#"
                request_headers: proxy_send_local_response 403 "" "{}" { "content-type" "application/json", "content-length" "99", "X-Upper" "Yes", "x-twice" "a", "x-twice" "b" } -1
                request_headers: return 1
                response_headers: proxy_get_header_map_pairs 2
                "#,
            ),
        Row::new("local_response/inline", "Lines that are joined in responses are in these, too.")
            .script(
                r#"
                request_headers: proxy_send_local_response 403 "" "x" { "vary" "a", "vary" "b", "content-type" "text/a", "content-type" "text/b" } -1
                request_headers: return 1
                response_headers: proxy_get_header_map_pairs 2
                "#,
            ),
        Row::new("local_response/details_blank", "Blanks in the details become underscores.")
            .script(
                r#"
                request_headers: proxy_send_local_response 403 "so say I\tall\nof us" "x" { } -1
                request_headers: return 1
                log: proxy_get_property "response\0code_details"
                "#,
            ),
        Row::new("local_response/twice", "The first of two answers counts.")
            .script(
                r#"
                request_headers: proxy_send_local_response 403 "a" "first" { } -1
                request_headers: proxy_send_local_response 404 "b" "second" { } -1
                request_headers: return 1
                "#,
            ),
        Row::new("local_response/request_body_held", "While the headers are held, an answer from the body keeps the request from the upstream.")
            .script(
                r#"
                request_headers: return 1
                request_body: proxy_send_local_response 403 "" "denied" { } -1
                request_body: return 1
                "#,
            )
            .steps([Step::post(&["evil"])])
            .upstream(),
        Row::new("local_response/response_headers", "From the response's headers it takes the upstream's answer's place, without another callback.")
            .script(
                r#"
                response_headers: proxy_send_local_response 502 "" "replaced" { "x-replaced" "1" } -1
                response_headers: return 1
                "#,
            ),
        Row::new("local_response/response_body", "From the response's body it is too late: the stream is cut off.")
            .script(
                r#"
                response_body#1: proxy_send_local_response 502 "" "replaced" { } -1
                response_body#1: return 1
                "#,
            ),
        Row::new("local_response/from_callout_in_response", "From a callout's answer while the response's headers wait, it takes their place.")
            .strict()
            .script(
                r#"
                response_headers: proxy_http_call "callee" { ":method" "GET", ":path" "/ROW", ":authority" "callee" } "" { } 1000
                response_headers: return 1
                http_call_response: proxy_set_effective_context $context
                http_call_response: proxy_send_local_response 502 "" "replaced" { "x-replaced" "1" } -1
                "#,
            )
            .steps([Step::get().callee(200, &[], "no")]),
        Row::new("local_response/request_trailers", "From the request's trailers, when everything else has gone.")
            .script("request_trailers: proxy_send_local_response 403 \"\" \"denied\" { } -1\nrequest_trailers: return 1")
            .steps([full()]),
        Row::new("local_response/request_trailers_held", "The same while the headers wait: the upstream hears of nothing.")
            .script(
                r#"
                request_headers: return 1
                request_body: return 1
                request_trailers: proxy_send_local_response 403 "" "denied" { } -1
                request_trailers: return 1
                "#,
            )
            .steps([full()])
            .upstream(),
        Row::new("local_response/response_trailers", "From the response's trailers it is too late.")
            .script("response_trailers: proxy_send_local_response 502 \"\" \"late\" { } -1\nresponse_trailers: return 1")
            .steps([full()]),
        Row::new("local_response/grpc_last", "The last status that gRPC has.")
            .script("request_headers: proxy_send_local_response 403 \"\" \"no\" { } 16\nrequest_headers: return 1\nresponse_headers: proxy_get_header_map_pairs 2")
            .steps([Step::default().method("POST").field("content-type", "application/grpc")]),
        Row::new("local_response/grpc_beyond", "Statuses that gRPC does not have.")
            .script("request_headers: proxy_send_local_response 403 \"\" \"no\" { } 17\nrequest_headers: return 1\nresponse_headers: proxy_get_header_map_pairs 2")
            .steps([Step::default().method("POST").field("content-type", "application/grpc")]),
        Row::new("local_response/grpc_below", "The same below.")
            .script("request_headers: proxy_send_local_response 403 \"\" \"no\" { } -7\nrequest_headers: return 1\nresponse_headers: proxy_get_header_map_pairs 2")
            .steps([Step::default().method("POST").field("content-type", "application/grpc")]),
        Row::new("local_response/response_body_held", "Unless the response's headers are still held.")
            .script(
                r#"
                response_headers: return 1
                response_body#1: proxy_send_local_response 502 "" "replaced" { } -1
                response_body#1: return 1
                "#,
            ),
        Row::new("local_response/re_entry_changed", "The filter can change its own answer on its way out.")
            .script(
                r#"
                request_headers: proxy_send_local_response 403 "" "denied" { } -1
                request_headers: return 1
                response_headers: proxy_add_header_map_value 2 "x-more" "1"
                response_headers: proxy_replace_header_map_value 2 ":status" "418"
                "#,
            ),
        Row::new("local_response/re_entry_answers", "An answer to its own answer.")
            .script(
                r#"
                request_headers: proxy_send_local_response 403 "" "first" { } -1
                request_headers: return 1
                response_headers: proxy_send_local_response 404 "" "second" { } -1
                "#,
            ),
        Row::new("local_response/grpc", "To a gRPC request it is an answer of gRPC.")
            .script(
                r#"
                request_headers: proxy_send_local_response 403 "" "not you % \n" { "x-why" "1" } 7
                request_headers: return 1
                response_headers: proxy_get_header_map_pairs 2
                "#,
            )
            .steps([Step::default().method("POST").field("content-type", "application/grpc")]),
        Row::new("local_response/grpc_derived", "Without a gRPC status it is derived from the other.")
            .script("request_headers: proxy_send_local_response 401 \"\" \"\" { } -1\nrequest_headers: return 1\nresponse_headers: proxy_get_header_map_pairs 2")
            .steps([Step::default().method("POST").field("content-type", "application/grpc+proto")]),
        Row::new("local_response/grpc_to_others", "A gRPC status means nothing to other requests.")
            .script("request_headers: proxy_send_local_response 403 \"\" \"no\" { } 7\nrequest_headers: return 1\nresponse_headers: proxy_get_header_map_pairs 2"),
        Row::new("local_response/head", "The answer to HEAD has no body.")
            .script("request_headers: proxy_send_local_response 403 \"\" \"denied\" { } -1\nrequest_headers: return 1\nresponse_headers: proxy_get_header_map_pairs 2")
            .steps([Step::default().method("HEAD")]),
        Row::new("local_response/in_log", "An answer while the stream is logged makes Envoy log it again, until its stack is used up.")
            .script("log: proxy_send_local_response 500 \"\" \"late\" { } -1")
            .alone()
            .deviates("an answer when the stream is over"),
        Row::new("local_response/empty_with_type", "What has no body has no type.")
            .script("request_headers: proxy_send_local_response 401 \"\" \"\" { \"content-type\" \"text/html\", \"content-length\" \"7\", \"x-a\" \"1\" } -1\nrequest_headers: return 1\nresponse_headers: proxy_get_header_map_pairs 2"),
        Row::new("local_response/status_999", "Statuses beyond 599.")
            .script("request_headers: proxy_send_local_response 999 \"\" \"\" { } -1\nrequest_headers: return 0")
            .deviates("statuses of local responses"),
        Row::new("local_response/fields_undecodable", "Fields that cannot be decoded.")
            .script("request_headers: proxy_send_local_response 403 \"\" \"x\" \"\\x01\\0\\0\\0\\xff\" -1\nrequest_headers: return 0")
            .deviates("map that cannot be decoded"),
        Row::new("close_stream/request_headers", "A stream that is closed ends without a response; its contexts end as always.")
            .script("request_headers: proxy_close_stream 0\nrequest_headers: return 1")
            .upstream(),
        Row::new("close_stream/request_headers_continue", "The same where the guest continues.")
            .script("request_headers: proxy_close_stream 0\nrequest_headers: return 0")
            .upstream(),
        Row::new("close_stream/by_response", "The response's side closes the same stream.")
            .script("request_headers: proxy_close_stream 1\nrequest_headers: return 1"),
        Row::new("close_stream/response_headers", "From the response's headers.").script("response_headers: proxy_close_stream 1\nresponse_headers: return 1"),
        Row::new("close_stream/response_body", "From the response's body: what was sent is cut off.")
            .script("response_body#1: proxy_close_stream 1\nresponse_body#1: return 1"),
        Row::new("close_stream/no_such", "There are streams 0 to 3.")
            .script("request_headers: proxy_close_stream 4\nrequest_headers: proxy_continue_stream 4\nrequest_headers: proxy_continue_stream 3"),
        Row::new("close_stream/twice", "Closing a stream twice in one callback ends Envoy.")
            .script("request_headers: proxy_close_stream 0\nrequest_headers: proxy_close_stream 1\nrequest_headers: return 1")
            .alone()
            .deviates("closing a stream twice"),
        Row::new("close_stream/after_answer", "An answer and a close in one callback.")
            .script("request_headers: proxy_send_local_response 403 \"\" \"x\" { } -1\nrequest_headers: proxy_close_stream 0\nrequest_headers: return 1"),
    ]
}
