//! The JSON Schema and the reference page in `docs/` are those of this source, and what the page shows can be read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use portcullis_harness::{Scenario, json_schema};
use serde_json::Value;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

fn check(file: &str, made: &str) {
    let path = docs().join(file);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, made).expect("the file can be written");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == made, "docs/{file} is stale; renew it with `UPDATE=1 cargo test --test reference`");
}

#[test]
fn the_json_schema_is_fresh() {
    check("scenario.schema.json", &format!("{:#}\n", json_schema()));
}

#[test]
fn every_key_is_documented() {
    let schema = json_schema();
    let types = schema["$defs"].as_object().unwrap().iter().map(|(name, schema)| (name.as_str(), schema));
    let mut count = 0;
    for (name, schema) in types.chain([("Scenario", &schema)]) {
        for (key, property) in schema["properties"].as_object().into_iter().flatten() {
            assert!(property["description"].is_string(), "{name}.{key} has no documentation");
            count += 1;
        }
    }
    assert!(count > 80, "only {count} keys");
}

/// Tables stand behind their markers, up to the next empty line.
#[test]
fn the_tables_of_the_reference_page_are_fresh() {
    let page = std::fs::read_to_string(docs().join("reference/scenarios.md")).unwrap();
    let schema = json_schema();
    let orders = orders();
    let mut made = String::new();
    let mut lines = page.lines().peekable();
    let mut shown = Vec::new();
    while let Some(line) = lines.next() {
        made.push_str(line);
        made.push('\n');
        let marker = line.strip_prefix("<!-- ").and_then(|line| line.strip_suffix(" -->"));
        let Some((kind, name)) = marker.and_then(|marker| marker.split_once(" of ")) else { continue };
        while lines.peek().is_some_and(|line| line.starts_with('|')) {
            lines.next();
        }
        let definition = if name == "Scenario" { &schema } else { &schema["$defs"][name] };
        assert!(definition.is_object(), "there is no `{name}`");
        made.push_str(&match kind {
            "keys" => keys(definition, &orders[name]),
            "values" => values(definition),
            other => panic!("what are the {other} of {name}?"),
        });
        shown.push(name.to_owned());
    }
    check("reference/scenarios.md", &made);
    for name in orders.keys() {
        assert!(shown.contains(name), "the page has no table for `{name}`");
    }
}

fn keys(definition: &Value, order: &[String]) -> String {
    let mut table = "| Key | Meaning |\n|---|---|\n".to_owned();
    for key in order {
        let meaning = definition["properties"][key]["description"].as_str().unwrap_or_default();
        table.push_str(&format!("| `{key}` | {} |\n", meaning.replace('|', "\\|")));
    }
    let declared = definition["properties"].as_object().unwrap().len();
    assert_eq!(order.len(), declared, "the source's keys are {order:?}");
    table
}

fn values(definition: &Value) -> String {
    let mut table = "| Value | Meaning |\n|---|---|\n".to_owned();
    for choice in definition["oneOf"].as_array().unwrap() {
        let (name, meaning) = (choice["const"].as_str().unwrap(), choice["description"].as_str().unwrap());
        table.push_str(&format!("| `{name}` | {meaning} |\n"));
    }
    table
}

/// The keys of each type in the order of the source, by the name that it has in the schema.
fn orders() -> BTreeMap<String, Vec<String>> {
    let mut orders = BTreeMap::new();
    for source in [include_str!("../src/document.rs"), include_str!("../src/token.rs")] {
        let mut name = None;
        let mut keys: Option<Vec<String>> = None;
        for line in source.lines() {
            if let Some(rest) = line.strip_prefix("#[schemars(rename = \"") {
                name = rest.split('"').next().map(str::to_owned);
            } else if line.contains("struct ") && line.ends_with('{') && name.is_some() {
                keys = Some(Vec::new());
            } else if line == "}" {
                if let (Some(name), Some(keys)) = (name.take(), keys.take()) {
                    orders.insert(name, keys);
                }
            } else if let (Some(keys), Some((key, _))) = (&mut keys, line.trim_start().split_once(": "))
                && let Some(key) = key.strip_prefix("pub ").or_else(|| key.strip_prefix("pub(crate) "))
            {
                keys.push(key.to_owned());
            }
        }
    }
    orders
}

/// Examples that are whole scenarios are read like any other file; beside a filter's folders, so that what they name is there.
#[test]
fn the_scenarios_on_the_pages_can_be_read() {
    let filter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../filters/jwt-auth");
    let folder = tempfile::tempdir().unwrap();
    for part in ["config", "testdata"] {
        std::os::unix::fs::symlink(filter.join(part).canonicalize().unwrap(), folder.path().join(part)).unwrap();
    }
    std::fs::create_dir(folder.path().join("scenarios")).unwrap();
    let mut read = 0;
    for page in ["reference/scenarios.md", "guides/testing-filters.md"] {
        let text = std::fs::read_to_string(docs().join(page)).unwrap();
        for block in text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            if !block.lines().any(|line| line.starts_with("name: ")) {
                continue;
            }
            let file = folder.path().join("scenarios/a.yaml");
            std::fs::write(&file, block).unwrap();
            Scenario::load(&file).unwrap_or_else(|error| panic!("{page}: {error}\n{block}"));
            read += 1;
        }
    }
    assert!(read >= 6, "only {read} examples");
}
