//! All rows, by area: in the order in which a reader of the ABI meets them.

mod basics;
mod buffers;
mod callouts;
mod environment;
mod failure;
mod flow;
mod languages;
mod lifecycle;
mod local;
mod maps;
mod shared;
mod tcp;

use super::row::{Row, Step};

/// All rows.
pub fn all() -> Vec<Row> {
    let areas = [
        lifecycle::rows,
        basics::rows,
        maps::rows,
        buffers::rows,
        flow::rows,
        local::rows,
        callouts::rows,
        shared::rows,
        environment::rows,
        failure::rows,
        languages::rows,
        tcp::rows,
    ];
    areas.into_iter().flat_map(|rows| rows()).collect()
}

/// The callbacks of a stream, as scripts name them.
const PHASES: [&str; 10] = [
    "context_create",
    "request_headers",
    "request_body",
    "request_trailers",
    "response_headers",
    "response_body",
    "response_trailers",
    "log",
    "done",
    "delete",
];

/// A request and a response that go through every callback.
fn full() -> Step {
    Step::post(&["one", "two"])
        .field("te", "trailers")
        .field("trailer", "x-sum")
        .trailer("x-sum", "1")
        .answer(200, &[("x-answer", "yes"), ("trailer", "x-answer-sum")], &["a", "b"])
        .answer_trailer("x-answer-sum", "2")
}

/// A row whose script belongs to one of [`PHASES`], with what reaches it.
fn in_phase(row: Row, phase: &str) -> Row {
    // A stream's script is in its request, which nobody sees when its context is made: so it stands in the configuration.
    if phase == "context_create" {
        let script = format!("row: {}\n{}", row.id, row.script);
        return row.script("").root(&script).steps([full()]);
    }
    row.steps([full()])
}
