//! The JSON Schema of a scenario file, for editors.

use std::collections::BTreeMap;

use schemars::schema_for;
use serde_json::{Map, Value};

use crate::document::Document;

/// The JSON Schema of a scenario file.
///
/// Made from the doc comments on what is read; `docs/scenario.schema.json` is a copy that a test keeps fresh.
pub fn json_schema() -> Value {
    let mut schema = tidy(schema_for!(Document).to_value());
    schema["title"] = Value::from("Portcullis scenario");
    schema
}

/// Sorts keys, so that the text does not depend on how `serde_json` was built, removes `null` from alternatives, since an
/// empty value is a mistake rather than an absent one, and joins the lines of descriptions.
fn tidy(value: Value) -> Value {
    match value {
        Value::Array(items) => items.into_iter().map(tidy).collect(),
        Value::Object(entries) => {
            let sorted: BTreeMap<String, Value> = entries.into_iter().map(|(key, value)| (key, tidy(value))).collect();
            let mut entries: Map<String, Value> = sorted.into_iter().collect();
            if let Some(Value::Array(kinds)) = entries.get("type") {
                let kinds: Vec<Value> = kinds.iter().filter(|kind| *kind != "null").cloned().collect();
                if let [kind] = kinds.as_slice() {
                    entries.insert("type".to_owned(), kind.clone());
                }
            }
            if entries.get("default").is_some_and(Value::is_null) {
                entries.remove("default");
            }
            let is_null = |choice: &Value| choice.get("type").is_some_and(|kind| kind == "null");
            // Where `null` may stand for nothing, it is an alternative beside a description of its own.
            if let Some(Value::Array(choices)) = entries.get("anyOf")
                && entries.contains_key("description")
                && let [Value::Object(choice)] =
                    choices.iter().filter(|choice| !is_null(choice)).collect::<Vec<_>>()[..]
            {
                let choice = choice.clone();
                entries.remove("anyOf");
                for (key, value) in choice {
                    entries.entry(key).or_insert(value);
                }
            }
            if let Some(Value::String(text)) = entries.get("description") {
                let text: Vec<String> = text.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect();
                entries.insert("description".to_owned(), Value::String(text.join("\n\n")));
            }
            Value::Object(entries)
        }
        other => other,
    }
}
