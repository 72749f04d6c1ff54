//! Header maps: reading, changing, and when they are there at all.

use crate::differential::{Row, Step};

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new("maps/value_absent", "A field that is not there is NOT_FOUND, and nothing is written.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "x-absent""#),
        Row::new("maps/value_empty", "An empty value is no bytes and a null pointer.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "x-empty""#)
            .steps([Step::get().field("x-empty", "")]),
        Row::new("maps/value_case", "Names are looked up without regard to case.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "X-MIXED""#)
            .steps([Step::get().field("x-Mixed", "Value")]),
        Row::new("maps/value_repeated", "Of a repeated field the first value is given.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "x-twice""#)
            .steps([Step::get().field("x-twice", "one").field("x-twice", "two")]),
        Row::new("maps/value_host", "`host` is another name of `:authority`.")
            .script(
                r#"
            request_headers: proxy_get_header_map_value 0 "host"
            request_headers: proxy_get_header_map_value 0 ":authority"
            request_headers: proxy_replace_header_map_value 0 "host" "other.example"
            request_headers: proxy_get_header_map_value 0 ":authority"
            "#,
            )
            .upstream(),
        Row::new("maps/pairs_request", "All lines come in order, pseudo-headers first, names in lower case.")
            .script("request_headers: proxy_get_header_map_pairs 0")
            .steps([Step::get().field("X-One", "1").field("x-twice", "a").field("x-twice", "b").field("x-other", "")]),
        Row::new("maps/pairs_order", "A repeated field stands where its lines stood, not together.")
            .script("request_headers: proxy_get_header_map_pairs 0")
            .steps([Step::get().field("x-twice", "a").field("x-other", "").field("x-twice", "b")])
            .deviates("order of repeated fields"),
        Row::new("maps/pairs_response", "The same of a response.")
            .script("response_headers: proxy_get_header_map_pairs 2")
            .steps([Step::get().answer(201, &[("x-one", "1"), ("x-twice", "a"), ("x-twice", "b")], &["made"])]),
    ]
}
