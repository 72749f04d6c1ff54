//! The JSON Schema of a filter's configuration, for editors.

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use crate::filter::Filter;
use crate::rules::Envelope;

/// The schema of the whole configuration: the envelope's keys and the filter's own, in one object.
pub fn schema_of<F: Filter>() -> Value {
    let mut generator = SchemaGenerator::new(SchemaSettings::draft2020_12());
    let mut whole = Value::from(<Envelope<F::PolicyConfig> as schemars::JsonSchema>::json_schema(&mut generator));
    let own = Value::from(<F::Settings as schemars::JsonSchema>::json_schema(&mut generator));
    for part in ["properties", "required"] {
        match (whole.get_mut(part), own.get(part)) {
            (Some(Value::Object(all)), Some(Value::Object(own))) => all.extend(own.clone()),
            (Some(Value::Array(all)), Some(Value::Array(own))) => all.extend(own.iter().cloned()),
            _ => {}
        }
    }
    if let Value::Object(whole) = &mut whole {
        whole.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
        whole.insert("title".to_owned(), json!(format!("{} configuration", F::NAME)));
        whole.insert("$defs".to_owned(), Value::Object(generator.take_definitions(true)));
        whole.remove("description");
    }
    whole
}
