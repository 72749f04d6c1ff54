//! Header maps: reading, changing, and when they are there at all.

use super::{PHASES, full, in_phase};
use crate::differential::{Row, Step};

/// Request headers and trailers, response headers and trailers, metadata and answers of callouts, and one that is none.
const MAPS: std::ops::RangeInclusive<u32> = 0..=8;

/// Names that proxies know.
const REPEATED: [&str; 73] = [
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "access-control-request-headers",
    "access-control-request-method",
    "age",
    "allow",
    "authorization",
    "baggage",
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-location",
    "content-range",
    "content-type",
    "cookie",
    "date",
    "dnt",
    "etag",
    "expires",
    "forwarded",
    "from",
    "grpc-accept-encoding",
    "grpc-message",
    "grpc-status",
    "grpc-timeout",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "link",
    "location",
    "max-forwards",
    "origin",
    "pragma",
    "priority",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-status",
    "range",
    "referer",
    "retry-after",
    "server",
    "set-cookie",
    "strict-transport-security",
    "traceparent",
    "tracestate",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "x-b3-sampled",
    "x-b3-traceid",
    "x-client-trace-id",
    "x-forwarded-client-cert",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-grpc-web",
    "x-ot-span-context",
    "x-real-ip",
    "x-request-id",
    "x-amzn-trace-id",
];

/// Sets a response's map to so many lines and a status, asks for its size, and makes it small again for the client.
fn many_lines(id: &str, shows: &'static str, lines: usize) -> Row {
    let lines = "\"x\" \"1\", ".repeat(lines);
    Row::new(id, shows).script(format!(
        "-response_headers: proxy_set_header_map_pairs 2 {{ \":status\" \"202\", {lines} }}\n\
         response_headers: proxy_get_header_map_size 2\n\
         response_headers: proxy_set_header_map_pairs 2 {{ \":status\" \"203\" }}"
    ))
}

/// Names that are joined in one kind of message or another.
const INLINE_TRAILERS: [&str; 4] = ["grpc-status", "grpc-message", "vary", "x-own"];

pub(super) fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new("maps/value_absent", "A field that is not there is NOT_FOUND, and nothing is written.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "x-absent""#),
        Row::new("maps/value_empty", "An empty value is no bytes and a null pointer.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "x-empty""#)
            .steps([Step::get().field("x-empty", "")]),
        Row::new("maps/value_bytes", "A value is bytes, not text.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "x-bytes""#)
            .steps([Step::get().field("x-bytes", b"caf\xe9 \xff\t~")]),
        Row::new("maps/value_case", "Names are looked up without regard to case.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "X-MIXED""#)
            .steps([Step::get().field("x-Mixed", "Value")]),
        Row::new("maps/value_repeated", "Of a repeated field the first value is given.")
            .script(r#"request_headers: proxy_get_header_map_value 0 "x-twice""#)
            .steps([Step::get().field("x-twice", "one").field("x-twice", "two")]),
        Row::new("maps/value_name_empty", "No field has an empty name.")
            .script(r#"request_headers: proxy_get_header_map_value 0 """#),
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
        Row::new("maps/add_host", "Adding `host` changes `:authority`.")
            .script(
                r#"
                request_headers: proxy_add_header_map_value 0 "host" "other.example"
                request_headers: proxy_get_header_map_pairs 0
                "#,
            )
            .upstream()
            .deviates("a second pseudo-header of a name"),
        Row::new("maps/pairs_request", "All lines come in order, pseudo-headers first, names in lower case.")
            .script("request_headers: proxy_get_header_map_pairs 0")
            .steps([Step::get().field("X-One", "1").field("x-twice", "a").field("x-twice", "b").field("x-other", "")]),
        Row::new("maps/pairs_order", "A repeated field stands where its lines stood, not together.")
            .script("request_headers: proxy_get_header_map_pairs 0")
            .steps([Step::get().field("x-twice", "a").field("x-other", "").field("x-twice", "b")])
            .deviates("order of repeated fields"),
        Row::new("maps/pairs_cookies", "Two cookie lines of HTTP/1.")
            .script("request_headers: proxy_get_header_map_pairs 0")
            .steps([Step::get().field("cookie", "a=1").field("cookie", "b=2").field("x-after", "1")]),
        Row::new("maps/pairs_known_repeated", "Repeated lines of names that Envoy knows.")
            .script(
                r#"
                request_headers: proxy_get_header_map_pairs 0
                request_headers: proxy_get_header_map_value 0 "accept"
                request_headers: proxy_get_header_map_value 0 "user-agent"
                "#,
            )
            .steps([Step::get()
                .field("accept", "text/html")
                .field("accept", "text/plain")
                .field("user-agent", "one")
                .field("user-agent", "two")
                .field("via", "1.1 a")
                .field("via", "1.1 b")
                .field("x-end", "")])
            .upstream(),
        Row::new("maps/inline_request", "Repeated lines of names that Envoy keeps in one line, joined with a comma.")
            .script("request_headers: proxy_get_header_map_pairs 0")
            .steps([REPEATED.iter().fold(Step::get(), |step, name| step.field(name, "a").field(name, "b"))]),
        Row::new("maps/inline_empty", "Empty lines leave no trace in what is joined, unless they are the first.")
            .script("request_headers: proxy_get_header_map_pairs 0")
            .steps([["", "a", "", "b", ""].iter().fold(Step::get().field("origin", "").field("te", ""), |step, value| {
                step.field("accept", value).field("x-own", value)
            })
            .field("origin", "")
            .field("te", "trailers")]),
        Row::new("maps/inline_added", "What a filter adds is joined, too.")
            .script(
                r#"
                response_headers: proxy_add_header_map_value 2 "Vary" "b"
                response_headers: proxy_add_header_map_value 2 "vary" ""
                response_headers: proxy_add_header_map_value 2 "vary" "c"
                response_headers: proxy_add_header_map_value 2 "age" ""
                response_headers: proxy_add_header_map_value 2 "age" "1"
                response_headers: proxy_add_header_map_value 2 "accept" "a"
                response_headers: proxy_add_header_map_value 2 "accept" "b"
                response_headers: proxy_get_header_map_pairs 2
                "#,
            )
            .steps([Step::get().answer(200, &[("x-first", "1"), ("vary", "a"), ("x-last", "1")], &["x"])]),
        Row::new("maps/inline_replaced", "What is replaced is not.")
            .script(
                r#"
                response_headers: proxy_replace_header_map_value 2 "vary" "b"
                response_headers: proxy_replace_header_map_value 2 "vary" ""
                response_headers: proxy_get_header_map_pairs 2
                response_headers: proxy_remove_header_map_value 2 "vary"
                response_headers: proxy_add_header_map_value 2 "vary" "c"
                response_headers: proxy_get_header_map_pairs 2
                "#,
            )
            .steps([Step::get().answer(200, &[("x-first", "1"), ("vary", "a"), ("x-last", "1")], &["x"])]),
        Row::new("maps/inline_set", "In a map that is set as a whole lines are joined as they come.")
            .script(
                r#"
                response_headers: proxy_set_header_map_pairs 2 { ":status" "201", "vary" "a", "x" "1", "Vary" "b", "x" "2" }
                response_headers: proxy_get_header_map_pairs 2
                "#,
            ),
        Row::new("maps/inline_trailers", "Trailers of a response have one line each of what is gRPC's; of others, and of a request's, as many as come.")
            .script("request_trailers: proxy_get_header_map_pairs 1\nresponse_trailers: proxy_get_header_map_pairs 3")
            .steps([{
                let announced = INLINE_TRAILERS.join(", ");
                let step = Step::post(&["one", "two"]).field("te", "trailers").field("trailer", &announced);
                let step = step.answer(200, &[("trailer", &announced)], &["a", "b"]);
                INLINE_TRAILERS.iter().fold(step, |step, name| {
                    step.trailer(name, "a").trailer(name, "b").answer_trailer(name, "a").answer_trailer(name, "b")
                })
            }])
            .upstream(),
        Row::new("maps/inline_trailers_added", "The same of what a filter adds.")
            .script(
                r#"
                request_trailers: proxy_add_header_map_value 1 "grpc-status" "0"
                request_trailers: proxy_add_header_map_value 1 "grpc-status" "1"
                request_trailers: proxy_get_header_map_pairs 1
                response_trailers: proxy_add_header_map_value 3 "grpc-status" "0"
                response_trailers: proxy_add_header_map_value 3 "grpc-status" "1"
                response_trailers: proxy_add_header_map_value 3 "vary" "0"
                response_trailers: proxy_add_header_map_value 3 "vary" "1"
                response_trailers: proxy_get_header_map_pairs 3
                response_trailers: proxy_remove_header_map_value 3 "grpc-status"
                response_trailers: proxy_remove_header_map_value 3 "vary"
                "#,
            )
            .steps([full()]),
        Row::new("maps/pairs_hop_by_hop", "What belongs to the client's connection is not in the map.")
            .script("request_headers: proxy_get_header_map_pairs 0")
            .steps([Step::post(&["x"])
                .field("connection", "close, x-mine")
                .field("x-mine", "1")
                .field("keep-alive", "timeout=5")
                .field("proxy-connection", "close")
                .field("te", "trailers, gzip")])
            .upstream(),
        Row::new("maps/pairs_response", "The same of a response.")
            .script("response_headers: proxy_get_header_map_pairs 2")
            .steps([Step::get().answer(201, &[("x-one", "1"), ("x-twice", "a"), ("x-twice", "b")], &["made"])]),
        Row::new("maps/pairs_response_hop_by_hop", "What belongs to the upstream's connection is not in the map.")
            .script("response_headers: proxy_get_header_map_pairs 2")
            .steps([Step::get().answer(
                200,
                &[("connection", "x-mine"), ("x-mine", "1"), ("keep-alive", "timeout=5"), ("server", "origin")],
                &["a"],
            )])
            .deviates("fields that `connection` names"),
        Row::new("maps/size", "The size of a map is that of names and values together, and only of maps that can be changed.")
            .script(
                r#"
                -request_headers: proxy_remove_header_map_value 0 "x-forwarded-for"
                request_headers: proxy_get_header_map_size 0
                request_headers: proxy_add_header_map_value 0 "abc" "de"
                request_headers: proxy_get_header_map_size 0
                response_headers: proxy_get_header_map_size 0
                "#,
            ),
        Row::new("maps/add", "Adding puts a line at the end, its name in lower case, beside those of the same name.")
            .script(
                r#"
                request_headers: proxy_add_header_map_value 0 "X-Twice" "two"
                request_headers: proxy_add_header_map_value 0 "x-empty" ""
                request_headers: proxy_get_header_map_pairs 0
                "#,
            )
            .steps([Step::get().field("x-twice", "one")])
            .upstream(),
        Row::new("maps/add_known", "Adding a field that Envoy knows and that is there.")
            .script(
                r#"
                request_headers: proxy_add_header_map_value 0 "user-agent" "two"
                request_headers: proxy_add_header_map_value 0 "cookie" "b=2"
                request_headers: proxy_add_header_map_value 0 "x-forwarded-proto" "https"
                request_headers: proxy_get_header_map_pairs 0
                "#,
            )
            .steps([Step::get().field("user-agent", "one").field("cookie", "a=1")])
            .upstream(),
        Row::new("maps/add_pseudo", "Adding a pseudo-header that is there.")
            .script(
                r#"
                request_headers: proxy_add_header_map_value 0 ":method" "PUT"
                request_headers: proxy_get_header_map_pairs 0
                "#,
            )
            .deviates("a second pseudo-header of a name"),
        Row::new("maps/replace", "Replacing removes all lines of the name and puts one at the end.")
            .script(
                r#"
                request_headers: proxy_replace_header_map_value 0 "X-Twice" "three"
                request_headers: proxy_replace_header_map_value 0 "x-new" "1"
                request_headers: proxy_get_header_map_pairs 0
                "#,
            )
            .steps([Step::get().field("x-twice", "one").field("x-twice", "two").field("x-other", "1")])
            .upstream(),
        Row::new("maps/replace_pseudo", "A pseudo-header that is replaced keeps its place.")
            .script(
                r#"
                request_headers: proxy_replace_header_map_value 0 ":path" "/elsewhere?x=1"
                request_headers: proxy_replace_header_map_value 0 ":method" "PUT"
                request_headers: proxy_get_header_map_pairs 0
                "#,
            )
            .upstream(),
        Row::new("maps/replace_status", "A filter can change the status of a response.")
            .script(
                r#"
                response_headers: proxy_replace_header_map_value 2 ":status" "299"
                response_headers: proxy_get_header_map_value 2 ":status"
                "#,
            ),
        Row::new("maps/remove", "Removing removes all lines of the name; one that is not there is no error.")
            .script(
                r#"
                request_headers: proxy_remove_header_map_value 0 "X-TWICE"
                request_headers: proxy_remove_header_map_value 0 "x-absent"
                request_headers: proxy_get_header_map_pairs 0
                "#,
            )
            .steps([Step::get().field("x-twice", "one").field("x-other", "1").field("x-twice", "two")])
            .upstream(),
        Row::new("maps/remove_pseudo", "A pseudo-header can be removed; such a request is answered by the host.")
            .script("request_headers: proxy_remove_header_map_value 0 \":path\"; request_headers: proxy_get_header_map_pairs 0"),
        Row::new("maps/remove_method", "A request without a method.")
            .script("request_headers: proxy_remove_header_map_value 0 \":method\""),
        Row::new("maps/remove_authority", "A request without an authority.")
            .script("request_headers: proxy_remove_header_map_value 0 \":authority\"")
            .deviates("a request without an authority"),
        Row::new("maps/remove_status", "A response whose status was removed.")
            .script("response_headers: proxy_remove_header_map_value 2 \":status\""),
        Row::new("maps/set_pairs", "Setting a map replaces all of it.")
            .script(
                r#"
                request_headers: proxy_set_header_map_pairs 0 { ":path" "/p", ":method" "GET", ":authority" "a.example", ":scheme" "http", "X-One" "1", "x-twice" "a", "x-twice" "b" }
                request_headers: proxy_get_header_map_pairs 0
                "#,
            )
            .upstream(),
        Row::new("maps/set_pairs_response", "The same of a response.")
            .script(
                r#"
                response_headers: proxy_set_header_map_pairs 2 { ":status" "202", "x-one" "1" }
                response_headers: proxy_get_header_map_pairs 2
                "#,
            ),
        Row::new("maps/set_pairs_undecodable", "A map that cannot be decoded counts as empty and wipes the headers.")
            .script(
                r#"
                response_headers: proxy_set_header_map_pairs 2 "\x01\0\0\0\xff"
                response_headers: proxy_get_header_map_pairs 2
                response_headers: proxy_set_header_map_pairs 2 { ":status" "202" }
                "#,
            )
            .deviates("map that cannot be decoded"),
        many_lines("maps/set_pairs_1024", "A map has up to 1024 lines, pseudo-headers among them.", 1023),
        many_lines("maps/set_pairs_1025", "One more, and it counts as empty.", 1024)
            .deviates("map that cannot be decoded"),
        Row::new("maps/field_crlf", "A value with a line break.")
            .script(
                r#"
                request_headers: proxy_add_header_map_value 0 "x-a" "1\r\nx-smuggled: 1"
                request_headers: proxy_get_header_map_value 0 "x-a"
                request_headers: proxy_remove_header_map_value 0 "x-a"
                "#,
            )
            .deviates("CR, LF, NUL in fields from guests; unknown pseudo-headers"),
        Row::new("maps/field_pseudo_unknown", "A pseudo-header that does not exist.")
            .script(
                r#"
                request_headers: proxy_add_header_map_value 0 ":nothing" "1"
                request_headers: proxy_remove_header_map_value 0 ":nothing"
                "#,
            )
            .deviates("CR, LF, NUL in fields from guests; unknown pseudo-headers"),
        Row::new("maps/field_name_invalid", "A name that is no token.")
            .script(
                r#"
                request_headers: proxy_add_header_map_value 0 "x a" "1"
                request_headers: proxy_get_header_map_value 0 "x a"
                request_headers: proxy_remove_header_map_value 0 "x a"
                "#,
            )
            .deviates("CR, LF, NUL in fields from guests; unknown pseudo-headers"),
        Row::new("maps/released_request", "After a continue the request's fields are gone at once.")
            .script(
                r#"
                request_headers: proxy_get_header_map_value 0 ":path"
                request_headers: proxy_continue_stream 0
                request_headers: proxy_get_header_map_value 0 ":path"
                request_headers: proxy_get_header_map_pairs 0
                request_headers: proxy_add_header_map_value 0 "x-late" "1"
                "#,
            )
            .steps([Step::get().await_upstream(2)])
            .upstream()
            .deviates("resuming what was not paused"),
        Row::new("maps/released_response", "The same of a response's fields.")
            .script(
                r#"
                response_headers: proxy_continue_stream 1
                response_headers: proxy_get_header_map_value 2 ":status"
                response_headers: proxy_get_header_map_pairs 2
                response_headers: proxy_get_header_map_value 0 ":path"
                "#,
            )
            .deviates("resuming what was not paused"),
    ];
    for (part, names) in REPEATED.chunks(37).enumerate() {
        let fields: Vec<(&str, &str)> = names.iter().flat_map(|name| [(*name, "a"), (*name, "b")]).collect();
        let row = Row::new(format!("maps/inline_response_{part}"), "The same of a response.")
            .script("response_headers: proxy_get_header_map_pairs 2")
            .steps([Step::get().answer(200, &fields, &["x"])]);
        rows.push(row);
    }
    let reading = |phase: &str| {
        MAPS.map(|map| {
            format!("{phase}: proxy_get_header_map_value {map} \"x-absent\"\n{phase}: proxy_get_header_map_pairs {map}")
        })
        .collect::<Vec<_>>()
        .join("\n")
    };
    let writing = |phase: &str| {
        MAPS.map(|map| {
            format!(
                "{phase}: proxy_get_header_map_size {map} =size\n\
                 {phase}: proxy_add_header_map_value {map} \"x-{phase}\" \"1\"\n\
                 {phase}: proxy_replace_header_map_value {map} \"x-{phase}\" \"2\"\n\
                 {phase}: proxy_remove_header_map_value {map} \"x-{phase}\""
            )
        })
        .collect::<Vec<_>>()
        .join("\n")
    };
    for phase in PHASES {
        let row = Row::new(format!("maps/read_in_{phase}"), "Which maps can be read in this callback.");
        let mut row = in_phase(row.script(reading(phase)), phase);
        if phase == "log" {
            row = row.deviates("fields of the client's connection in `on_log`");
        }
        rows.push(row);
        let row = Row::new(format!("maps/write_in_{phase}"), "Which maps can be changed in this callback.");
        // How long a machine's address is does not matter here.
        let script =
            format!("-request_headers: proxy_remove_header_map_value 0 \"x-forwarded-for\"\n{}", writing(phase));
        rows.push(in_phase(row.script(script), phase));
    }
    rows.push(
        Row::new("maps/trailers_added", "Trailers come into being when one is added in the last body callback.")
            .script(
                r#"
                request_end: proxy_add_header_map_value 1 "x-request-trailer" "1"
                request_end: proxy_get_header_map_pairs 1
                response_end: proxy_add_header_map_value 3 "x-response-trailer" "2"
                response_end: proxy_get_header_map_pairs 3
                "#,
            )
            .steps([Step::post(&["one", "two"]).field("te", "trailers").answer(200, &[], &["a", "b"])])
            .upstream()
            .deviates("trailers of HTTP/1"),
    );
    rows
}
