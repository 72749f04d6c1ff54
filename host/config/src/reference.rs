//! What is made from the doc comments in [`crate::file`]: the JSON Schema for editors and the reference page.
//!
//! Both are committed (`docs/portcullis.schema.json`, `docs/reference/portcullis-yaml.md`); `tests/reference.rs`
//! fails when they are stale and says how to renew them.

use std::collections::BTreeMap;
use std::fmt;

use schemars::schema_for;
use serde::de::{Deserialize, Deserializer, Visitor};
use serde_json::{Map, Value};

use crate::file;

/// The JSON Schema of a policy file, as text.
///
/// Unlike what serde would accept, it has no `null`: an empty value is a mistake, not an absent one.
#[must_use]
pub fn json_schema() -> String {
    let mut text = serde_json::to_string_pretty(&schema()).unwrap_or_default();
    text.push('\n');
    text
}

fn schema() -> Value {
    tidy(schema_for!(file::Config).to_value())
}

/// Sorts keys, so that the text does not depend on how `serde_json` was built, removes `null` from alternatives, and
/// joins the lines of descriptions.
fn tidy(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(tidy).collect()),
        Value::Object(entries) => {
            let sorted: BTreeMap<String, Value> = entries.into_iter().map(|(key, value)| (key, tidy(value))).collect();
            let mut entries: Map<String, Value> = sorted.into_iter().collect();
            if let Some(Value::Array(kinds)) = entries.get("type") {
                let kinds: Vec<Value> = kinds.iter().filter(|kind| *kind != "null").cloned().collect();
                if let [kind] = kinds.as_slice() {
                    entries.insert("type".to_owned(), kind.clone());
                }
            }
            if let Some(Value::Array(choices)) = entries.get("anyOf") {
                let choices: Vec<Value> =
                    choices.iter().filter(|choice| choice.get("type") != Some(&"null".into())).cloned().collect();
                if let [Value::Object(choice)] = choices.as_slice() {
                    let choice = choice.clone();
                    entries.remove("anyOf");
                    entries.extend(choice);
                }
            }
            if let Some(Value::String(text)) = entries.get("description") {
                let text =
                    text.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect::<Vec<_>>().join("\n\n");
                entries.insert("description".to_owned(), Value::String(text));
            }
            Value::Object(entries)
        }
        other => other,
    }
}

/// The reference page, in Markdown.
#[must_use]
pub fn reference_page() -> String {
    let schema = schema();
    let mut page =
        Page { definitions: schema.get("$defs").cloned().unwrap_or_default(), orders: orders(), sections: Vec::new() };
    page.section("", &schema);
    let mut text = String::from(
        "# portcullis.yaml\n\n\
         <!-- Made from the doc comments in host/config/src/file.rs. To renew it: UPDATE=1 cargo test -p portcullis-config --test reference -->\n\n\
         Every setting of the policy file. Sizes are written `64MiB` (B, KiB, MiB, GiB), times `100ms` (ms, s, m, h, d); a\n\
         bare number is refused. Unknown keys, keys given twice and empty values are refused. Names of files are relative\n\
         to the folder of the policy file. `portcullis check` explains every mistake.\n\n\
         Editors complete and check the file with `docs/portcullis.schema.json`; those that use the YAML language server find\n\
         it by a first line `# yaml-language-server: $schema=PATH`.\n",
    );
    for section in page.sections {
        text.push('\n');
        text.push_str(&section);
    }
    text
}

struct Page {
    definitions: Value,
    orders: BTreeMap<&'static str, &'static [&'static str]>,
    sections: Vec<String>,
}

impl Page {
    /// Follows a `$ref`; gives the definition's name as well.
    fn resolve<'s>(&'s self, schema: &'s Value) -> (Option<&'s str>, &'s Value) {
        let name = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix("#/$defs/"));
        match name.and_then(|name| self.definitions.get(name)) {
            Some(definition) => (name, definition),
            None => (None, schema),
        }
    }

    /// One mapping: what it is, then its settings, then sections for the mappings in it.
    fn section(&mut self, path: &str, schema: &Value) {
        let (name, resolved) = self.resolve(schema);
        let resolved = resolved.clone();
        let order = self.orders.get(name.unwrap_or("portcullis.yaml")).copied().unwrap_or_default();
        let title = if path.is_empty() { "The file".to_owned() } else { format!("`{path}`") };
        let mut text = format!("## {title}\n\n{}\n\n", description(&resolved));
        let required: Vec<&str> = resolved
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let mut inner = Vec::new();
        for key in order {
            let Some(property) = resolved.get("properties").and_then(|properties| properties.get(key)) else {
                continue;
            };
            let (kind, nested) = self.kind(property);
            let needed = if required.contains(key) { ", required" } else { "" };
            text.push_str(&format!("* `{key}` ({kind}{needed}): {}\n", description(property)));
            text.push_str(&self.choices(property));
            if let Some((suffix, nested)) = nested {
                let dot = if path.is_empty() { "" } else { "." };
                inner.push((format!("{path}{dot}{key}{suffix}"), nested));
            }
        }
        self.sections.push(text);
        for (path, nested) in inner {
            self.section(&path, &nested);
        }
    }

    /// What may be written for a property, and the mapping in it that deserves a section.
    fn kind(&self, schema: &Value) -> (String, Option<(&'static str, Value)>) {
        let (name, resolved) = self.resolve(schema);
        match name {
            Some("Size") => return ("size".to_owned(), None),
            Some("Time") => return ("time".to_owned(), None),
            _ => {}
        }
        if resolved.get("oneOf").is_some() {
            return ("one of the below".to_owned(), None);
        }
        match resolved.get("type").and_then(Value::as_str) {
            Some("string") => match resolved.get("enum").and_then(Value::as_array) {
                Some(names) => {
                    let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
                    (format!("one of {}", crate::mistake::listed(names)), None)
                }
                None => ("text".to_owned(), None),
            },
            Some("integer") => ("number".to_owned(), None),
            Some("boolean") => ("`true` or `false`".to_owned(), None),
            Some("array") => {
                let (kind, nested) = resolved.get("items").map_or_else(Default::default, |items| self.kind(items));
                (format!("list of {}", plural(&kind)), nested.map(|(_, nested)| ("[]", nested)))
            }
            Some("object") => match resolved.get("additionalProperties") {
                Some(values) if values.is_object() => {
                    let (kind, nested) = self.kind(values);
                    (format!("names with a {kind} each"), nested.map(|(_, nested)| (".NAME", nested)))
                }
                _ => ("mapping".to_owned(), Some(("", schema.clone()))),
            },
            _ => ("anything".to_owned(), None),
        }
    }

    /// The alternatives of an enum, indented below its property.
    fn choices(&self, schema: &Value) -> String {
        let (_, resolved) = self.resolve(schema);
        let mut text = String::new();
        for choice in resolved.get("oneOf").and_then(Value::as_array).into_iter().flatten() {
            let fixed = choice.get("const").and_then(Value::as_str).map(|name| format!("`{name}`"));
            let names = choice.get("enum").and_then(Value::as_array);
            let names = names.map(|names| {
                names.iter().filter_map(Value::as_str).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
            });
            let keyed = choice.get("properties").and_then(Value::as_object).and_then(|keys| keys.keys().next());
            let keyed = keyed.map(|key| format!("`{{ {key}: ... }}`"));
            if let Some(name) = fixed.or(names).or(keyed) {
                let meaning = description(choice);
                let separator = if meaning.is_empty() { "" } else { ": " };
                text.push_str(&format!("  * {name}{separator}{meaning}\n"));
            }
        }
        text
    }
}

fn plural(kind: &str) -> String {
    match kind {
        "text" => "texts".to_owned(),
        other => format!("{other}s"),
    }
}

fn description(schema: &Value) -> &str {
    schema.get("description").and_then(Value::as_str).unwrap_or_default()
}

/// The settings of each type in the order of its source, by the type's name in the schema.
fn orders() -> BTreeMap<&'static str, &'static [&'static str]> {
    macro_rules! orders {
        ($($type:ident)*) => { [$((stringify!($type), settings_of::<file::$type>())),*] };
    }
    let types = orders! {
        Admin Logging CodeCache Listener ListenerTls TcpForward ListenerLimits Filter Environment Reload FilterLimits Upstream UpstreamTls
        Route Match HeaderMatch Respond OperatorHost Operator Permissions Secret OperatorLimits Replicas Placement
    };
    types.into_iter().chain([("portcullis.yaml", settings_of::<file::Config>())]).collect()
}

/// Asks a type's `Deserialize` which fields it knows.
fn settings_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct Ask<'a>(&'a mut &'static [&'static str]);

    #[derive(Debug)]
    struct Answered;

    impl fmt::Display for Answered {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("answered")
        }
    }

    impl std::error::Error for Answered {}

    impl serde::de::Error for Answered {
        fn custom<M: fmt::Display>(_: M) -> Self {
            Self
        }
    }

    impl<'de> Deserializer<'de> for Ask<'_> {
        type Error = Answered;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Answered> {
            Err(Answered)
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Answered> {
            *self.0 = fields;
            Err(Answered)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut fields: &'static [&'static str] = &[];
    // The answer comes by way of the error.
    let _ = T::deserialize(Ask(&mut fields)).err();
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(schema: &Value) -> Vec<(String, String, Value)> {
        let types = schema["$defs"].as_object().expect("definitions").iter();
        let types = types.map(|(name, definition)| (name.as_str(), definition)).chain([("portcullis.yaml", schema)]);
        types
            .flat_map(|(name, definition)| {
                let properties = definition["properties"].as_object().into_iter().flatten();
                properties.map(move |(key, property)| (name.to_owned(), key.clone(), property.clone()))
            })
            .collect()
    }

    #[test]
    fn every_setting_is_documented() {
        for (name, key, property) in properties(&schema()) {
            assert!(!description(&property).is_empty(), "{name}.{key} has no documentation");
        }
    }

    #[test]
    fn documented_defaults_are_the_real_ones() {
        let mut compared = 0;
        for (name, key, property) in properties(&schema()) {
            let default = match property.get("default") {
                Some(Value::String(text)) if !text.is_empty() => text.clone(),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => value.to_string(),
                _ => continue,
            };
            let documented = description(&property).contains(&format!("Default `{default}`"));
            assert!(documented, "{name}.{key}: the documentation does not say \"Default `{default}`\"");
            compared += 1;
        }
        assert!(compared > 40, "only {compared} defaults were compared");
    }

    /// The policy that Envoy is shown in `tests/envoy_accepts.rs` is only a proof for the settings that are in it.
    #[test]
    fn the_policy_with_everything_has_every_setting() {
        fn walk(schema: &Value, root: &Value, value: &Value, seen: &mut std::collections::BTreeSet<String>) {
            let name = schema["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/"));
            let definition = name.map_or(schema, |name| &root["$defs"][name]);
            for choice in definition["oneOf"].as_array().into_iter().flatten() {
                walk(choice, root, value, seen);
            }
            for item in value.as_array().into_iter().flatten() {
                walk(&definition["items"], root, item, seen);
            }
            for (key, inner) in value.as_object().into_iter().flatten() {
                match definition["properties"].get(key) {
                    Some(property) => {
                        seen.insert(format!("{}.{key}", name.unwrap_or("portcullis.yaml")));
                        walk(property, root, inner, seen);
                    }
                    None => walk(&definition["additionalProperties"], root, inner, seen),
                }
            }
        }
        let schema = schema();
        let policy: Value = serde_saphyr::from_str(include_str!("../tests/policies/everything.yaml")).expect("YAML");
        let mut seen = std::collections::BTreeSet::new();
        walk(&schema, &schema, &policy, &mut seen);
        let missing: Vec<String> = properties(&schema)
            .into_iter()
            .map(|(name, key, _)| format!("{name}.{key}"))
            .filter(|setting| !seen.contains(setting) && setting != "Admin.dangerously_allow_remote")
            .collect();
        assert_eq!(missing, Vec::<String>::new());
    }

    #[test]
    fn the_order_of_every_mapping_is_known() {
        let schema = schema();
        for (name, definition) in schema["$defs"].as_object().expect("definitions") {
            if definition.get("properties").is_some() {
                assert!(orders().contains_key(name.as_str()), "add {name} to `orders`");
            }
        }
    }

    #[test]
    fn the_sections_of_the_file_are_those_that_are_read() {
        let mut known: Vec<&str> = crate::compile::SECTIONS.to_vec();
        let mut declared = settings_of::<file::Config>().to_vec();
        known.sort_unstable();
        declared.sort_unstable();
        assert_eq!(known, declared);
    }
}
