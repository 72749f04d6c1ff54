//! Guests that other compilers made: one gate, in Go, in C++ and in AssemblyScript, with the shapes of modules that their SDKs
//! make.

use serde_json::json;

use crate::differential::{Plugin, Row, Step};

pub(super) fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = ["go", "cpp", "assemblyscript"].into_iter().flat_map(gate).collect();
    rows.push(
        Row::new("assemblyscript/throws", "What is thrown ends the guest, as its compiler has it.")
            .plugin(
                Plugin::new("gate")
                    .prebuilt("assemblyscript")
                    .configuration("a gate")
                    .settings(json!({ "vm_id": "assemblyscript-throws", "failure_policy": "fail_closed" })),
            )
            .steps([Step::get().field("x-key", "k"), Step::get().field("x-key", "throw"), Step::get()])
            .dies(),
    );
    rows
}

fn gate(language: &'static str) -> Vec<Row> {
    let row = |name: &str, shows: &'static str| {
        // The gate in Go pauses as Go's SDK does, with the one action there is: it stops everything where that is set so.
        let id = format!("{language}/{name}");
        let settings = json!({ "vm_id": language, "vm_configuration": "for the VM" });
        Row::new(id, shows).plugin(Plugin::new("gate").prebuilt(language).configuration("a gate").settings(settings))
    };
    let strict = |name: &str, shows: &'static str| {
        let mut row = row(name, shows);
        for plugin in &mut row.plugins {
            plugin.settings["allow_on_headers_stop_iteration"] = false.into();
        }
        row
    };
    vec![
        row("ticks", "The module starts, is configured and gets its ticks.")
            .steps([])
            .configured(&format!("row: {language}/ticks"))
            .with_root()
            .until("ticked"),
        row("passes", "A request with a key passes, with the fields that the gate adds and takes.")
            .steps([Step::get().field("x-key", "k")])
            .upstream(),
        row("no_key", "One without is answered, and counted in shared data.")
            .steps([Step::get(), Step::get()])
            .upstream(),
        row("body", "A body is held until it was read, then passes.")
            .steps([Step::post(&["one", "two"]).field("x-key", "k")])
            .upstream(),
        row("evil_body", "One that must not pass is denied, and the upstream never hears of the request.")
            .steps([Step::post(&["some e", "vil"]).field("x-key", "k")])
            .upstream(),
        strict("asks", "Another server is asked while the request waits, and lets it pass,")
            .steps([Step::get().field("x-key", "ask").callee(200, &[], "yes")])
            .upstream(),
        strict("asks_and_is_told_no", "or not.")
            .steps([Step::get().field("x-key", "ask").callee(404, &[], "who?")])
            .upstream(),
        row("edits", "The response's body is edited.")
            .steps([Step::get().field("x-key", "k").field("x-edit", "yes").answer(200, &[], &["secret plan"])]),
    ]
}
