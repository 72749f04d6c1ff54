//! Buffers: reading and editing bodies and configurations.

use super::{PHASES, full, in_phase};
use crate::differential::{Row, Step};

pub(super) fn rows() -> Vec<Row> {
    let post = || [Step::post(&["0123456789"]).field("content-type", "text/plain")];
    let answer = || [Step::get().answer(200, &[], &["0123456789"])];
    let mut rows = vec![
        Row::new("buffers/read_edges", "A start behind the end, no length, and lengths that are too large are no errors.")
            .script(
                r#"
                request_body#1: proxy_get_buffer_bytes 0 0 10
                request_body#1: proxy_get_buffer_bytes 0 0 3
                request_body#1: proxy_get_buffer_bytes 0 4 3
                request_body#1: proxy_get_buffer_bytes 0 8 100
                request_body#1: proxy_get_buffer_bytes 0 10 1
                request_body#1: proxy_get_buffer_bytes 0 11 1
                request_body#1: proxy_get_buffer_bytes 0 0 0
                request_body#1: proxy_get_buffer_bytes 0 0 4294967295
                request_body#1: proxy_get_buffer_bytes 0 4294967295 4294967295
                request_body#1: proxy_get_buffer_bytes 0 1 4294967295
                "#,
            )
            .steps(post()),
        Row::new("buffers/status", "A buffer's status is its length, and no flags.")
            .script("request_body: proxy_get_buffer_status 0\nresponse_body: proxy_get_buffer_status 1")
            .steps(post()),
        Row::new("buffers/no_such", "There are buffers 0 to 8.").script(
            r#"
            request_headers: proxy_get_buffer_bytes 9 0 10
            request_headers: proxy_set_buffer_bytes 9 0 10 "x"
            request_headers: proxy_get_buffer_status 9
            request_headers: proxy_get_buffer_bytes 4294967295 0 10
            "#,
        ),
        edit("buffers/set_all", "Replacing all of a body.", r#"proxy_set_buffer_bytes 1 0 10 "new""#),
        edit("buffers/set_more_than_all", "A size beyond the end replaces all.", r#"proxy_set_buffer_bytes 1 0 4294967295 "new""#),
        edit("buffers/set_start", "Replacing the first bytes.", r#"proxy_set_buffer_bytes 1 0 4 "new""#),
        edit("buffers/set_prepend", "Size 0 at the start puts bytes before the others.", r#"proxy_set_buffer_bytes 1 0 0 "new""#),
        edit("buffers/set_append", "A start at the end, or behind it, puts bytes after the others.", r#"proxy_set_buffer_bytes 1 10 0 "new""#),
        edit("buffers/set_behind", "The same far behind the end, whatever the size.", r#"proxy_set_buffer_bytes 1 4294967295 5 "new""#),
        edit("buffers/set_middle", "Between start and end nothing can be replaced.", r#"proxy_set_buffer_bytes 1 3 4 "new""#),
        edit("buffers/set_nothing", "Taking the body away.", r#"proxy_set_buffer_bytes 1 0 10 """#),
        Row::new("buffers/request_edit_length", "The length that a request says stays as it was when its body is edited.")
            .script("request_body#1: proxy_set_buffer_bytes 0 0 10 \"a longer body than before\"\nrequest_headers: proxy_remove_header_map_value 0 \"content-length\"")
            .steps(post())
            .upstream(),
        Row::new("buffers/request_edit_whole", "A body that was held to its end is replaced, the length said anew by the guest.")
            .script(
                r#"
                request_headers: proxy_remove_header_map_value 0 "content-length"
                request_headers: return 1
                request_body#1: return 1
                request_body#2: proxy_get_buffer_bytes 0 0 100
                request_body#2: proxy_set_buffer_bytes 0 0 100 "a longer body than before"
                "#,
            )
            .steps(post())
            .upstream(),
        Row::new("buffers/length_repaired", "A guest that edits a body and leaves its length makes a message with a wrong length.")
            .script("response_body#1: proxy_set_buffer_bytes 1 0 10 \"short\"\nresponse_headers: return 1\nresponse_body#1: return 1")
            .steps(answer())
            .deviates("length of an edited body"),
        Row::new("buffers/read_only", "What can only be read cannot be set.").script(
            r#"
            request_headers: proxy_set_buffer_bytes 2 0 10 "x"
            request_headers: proxy_set_buffer_bytes 3 0 10 "x"
            request_headers: proxy_set_buffer_bytes 4 0 10 "x"
            request_headers: proxy_set_buffer_bytes 5 0 10 "x"
            request_headers: proxy_set_buffer_bytes 6 0 10 "x"
            request_headers: proxy_set_buffer_bytes 7 0 10 "x"
            request_headers: proxy_set_buffer_bytes 8 0 10 "x"
            "#,
        ),
        Row::new("buffers/configurations", "The plugin's configuration can be read in on_configure only, the VM's always.")
            .plugin(
                crate::differential::Plugin::new("own")
                    .configuration(
                        r#"
                        row: buffers/configurations
                        configure: proxy_get_buffer_bytes 6 0 10
                        configure: proxy_get_buffer_bytes 7 0 10
                        configure: proxy_get_buffer_status 6
                        configure: proxy_get_buffer_status 7
                        context_create: proxy_get_buffer_bytes 6 0 10
                        context_create: proxy_get_buffer_bytes 7 0 10
                        request_headers: proxy_get_buffer_bytes 6 0 10
                        request_headers: proxy_get_buffer_bytes 7 0 10
                        request_headers: proxy_get_buffer_status 6
                        request_headers: proxy_get_buffer_status 7
                        log: proxy_get_buffer_bytes 6 0 10
                        "#,
                    )
                    .settings(serde_json::json!({ "vm_configuration": "row: buffers/configurations; vm_start: proxy_get_buffer_bytes 6 0 10; vm_start: proxy_get_buffer_bytes 7 0 10" })),
            )
            .with_root(),
    ];
    for phase in PHASES {
        let script: Vec<String> = (0..=8)
            .flat_map(|buffer| {
                let empty = if buffer < 2 {
                    format!("{phase}: proxy_set_buffer_bytes {buffer} 4294967295 0 \"\"")
                } else {
                    String::new()
                };
                [
                    format!("{phase}: proxy_get_buffer_bytes {buffer} 0 100"),
                    format!("{phase}: proxy_get_buffer_status {buffer}"),
                    empty,
                ]
            })
            .collect();
        let row = Row::new(format!("buffers/in_{phase}"), "Which buffers there are in this callback.");
        rows.push(in_phase(row.script(script.join("\n")), phase));
    }
    rows.push(
        Row::new("buffers/response_after_request", "In the response the request's body is gone.")
            .script("response_headers: proxy_get_buffer_bytes 0 0 100\nresponse_body#1: proxy_get_buffer_bytes 0 0 100")
            .steps([full()]),
    );
    rows
}

/// An edit of the response's body, whose length was taken away before.
fn edit(id: &str, shows: &'static str, call: &str) -> Row {
    Row::new(id, shows)
        .script(format!(
            "response_headers: proxy_remove_header_map_value 2 \"content-length\"\nresponse_body#1: {call}\n\
             response_body#1: proxy_get_buffer_bytes 1 0 100"
        ))
        .steps([Step::get().answer(200, &[], &["0123456789"])])
}
