//! [`Trace`]: what passed between the host and the filter, callback by callback and call by call, for reading.
//!
//! Values of fields, properties and the like that are credentials by their name are not shown; see [`Secrets`].

use std::fmt::{self, Write as _};

use portcullis_abi::{TraceEvent, TraceValue};
use serde_json::{Value, json};

use crate::expectation::quoted;

/// Whether credentials are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Secrets {
    /// Their length is.
    #[default]
    Masked,
    /// They are.
    Shown,
}

impl Secrets {
    /// Whether the value of something called `name` may not be shown.
    pub(crate) fn hides(self, name: &str) -> bool {
        self == Secrets::Masked && is_credential(name)
    }
}

/// Names whose values are credentials: of fields, properties, shared keys, and of foreign functions: what `verify_signature`
/// gets is a token in two parts.
fn is_credential(name: &str) -> bool {
    const WORDS: [&str; 11] = [
        "authorization",
        "cookie",
        "token",
        "secret",
        "password",
        "api-key",
        "apikey",
        "api_key",
        "dpop",
        "credential",
        "signature",
    ];
    let name = name.to_ascii_lowercase();
    WORDS.iter().any(|word| name.contains(word))
}

/// A value in quotes, or that it is not shown.
pub(crate) fn shown_value(name: &str, value: &[u8], secrets: Secrets) -> String {
    if secrets.hides(name) { format!("({} bytes, not shown)", value.len()) } else { quoted(value) }
}

/// What passed between the host and filters, oldest first. Print it to read it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Trace {
    events: Vec<TraceEvent>,
    forgotten: usize,
    secrets: Secrets,
}

/// Never with values: a failing `assert_eq` must not print credentials.
impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trace({} events)", self.events.len())
    }
}

impl Trace {
    pub(crate) fn new(events: Vec<TraceEvent>, forgotten: usize, secrets: Secrets) -> Trace {
        Trace { events, forgotten, secrets }
    }

    /// What passed, with values as they are.
    pub fn events(&self) -> &[TraceEvent] {
        &self.events
    }

    /// Names of the callbacks and host functions, in order.
    pub fn names(&self) -> Vec<&'static str> {
        let name = |event: &TraceEvent| match event {
            TraceEvent::Callback { callback, .. } => Some(*callback),
            TraceEvent::Hostcall { call, .. } => Some(*call),
            _ => None,
        };
        self.events.iter().filter_map(name).collect()
    }

    /// How often a host function was called.
    pub fn calls_of(&self, call: &str) -> usize {
        self.events
            .iter()
            .filter(|event| matches!(event, TraceEvent::Hostcall { call: name, .. } if *name == call))
            .count()
    }

    /// Whether nothing passed.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub(crate) fn secrets(&self) -> Secrets {
        self.secrets
    }

    /// The same, with credentials or without.
    #[must_use]
    pub fn with_secrets(mut self, secrets: Secrets) -> Trace {
        self.secrets = secrets;
        self
    }

    /// The same as JSON, one object an event.
    pub fn to_json(&self) -> Value {
        self.events.iter().map(|event| self.event_json(event)).collect()
    }

    fn event_json(&self, event: &TraceEvent) -> Value {
        let values = |values: &[(&'static str, TraceValue)]| -> Value {
            values
                .iter()
                .map(|(name, value)| ((*name).to_owned(), self.json(name, value, values)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        match event {
            TraceEvent::Callback { plugin, stream, callback, arguments } => json!({
                "callback": callback, "filter": plugin, "stream": stream.map(portcullis_abi::StreamId::as_u64),
                "arguments": values(arguments),
            }),
            TraceEvent::Hostcall { call, arguments, status, results } => {
                let mut all = arguments.clone();
                all.extend(results.iter().cloned());
                let result_json: serde_json::Map<String, Value> =
                    results.iter().map(|(name, value)| ((*name).to_owned(), self.json(name, value, &all))).collect();
                let mut object = json!({ "call": call, "arguments": values(arguments) });
                match status {
                    Ok(status) => object["status"] = json!(status),
                    Err(fault) => object["fault"] = json!(fault),
                }
                if !result_json.is_empty() {
                    object["results"] = result_json.into();
                }
                object
            }
            TraceEvent::Returned { callback, answer } => {
                json!({ "returned": callback, "answer": answer.as_ref().map(|answer| self.json("answer", answer, &[])) })
            }
            TraceEvent::Trapped { callback, cause } => json!({ "trapped": callback, "cause": cause.to_string() }),
            _ => Value::Null,
        }
    }

    fn json(&self, name: &str, value: &TraceValue, beside: &[(&'static str, TraceValue)]) -> Value {
        match value {
            TraceValue::Number(number) => {
                i64::try_from(*number).map_or_else(|_| json!(number.to_string()), Value::from)
            }
            TraceValue::Word("true") => Value::Bool(true),
            TraceValue::Word("false") => Value::Bool(false),
            TraceValue::Fields(lines) => lines
                .iter()
                .map(|(name, value)| {
                    let name = String::from_utf8_lossy(name).into_owned();
                    let value = shown_value(&name, value, self.secrets);
                    json!([name, unquoted(&value)])
                })
                .collect(),
            other => json!(unquoted(&self.text(name, other, beside))),
        }
    }

    /// A value for reading. What stands beside it tells what it is: the value of the field `authorization` is a credential.
    fn text(&self, name: &str, value: &TraceValue, beside: &[(&'static str, TraceValue)]) -> String {
        match value {
            TraceValue::Number(number) => number.to_string(),
            TraceValue::Word(word) => (*word).to_owned(),
            TraceValue::Bytes { bytes, .. } if name == "path" => {
                // Segments of a property's path are separated by NUL.
                let path = bytes.strip_suffix(b"\0").unwrap_or(bytes);
                let segments: Vec<_> = path.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
                quoted(segments.join(".").as_bytes())
            }
            TraceValue::Bytes { bytes, len } => {
                let is_value = matches!(name, "value" | "result" | "argument" | "item");
                let called = beside.iter().find_map(|(name, value)| match value {
                    TraceValue::Bytes { bytes, .. }
                        if is_value && matches!(*name, "name" | "key" | "path" | "function") =>
                    {
                        Some(String::from_utf8_lossy(bytes).into_owned())
                    }
                    _ => None,
                });
                // A configuration may hold keys as well as any request.
                let is_configuration = beside
                    .iter()
                    .any(|(_, value)| matches!(value, TraceValue::Word("plugin configuration" | "VM configuration")));
                if name == "configuration" || is_configuration || called.as_deref() == Some("sign") {
                    return format!("({len} bytes)");
                }
                let shown = shown_value(called.as_deref().unwrap_or_default(), bytes, self.secrets);
                if bytes.len() < *len && !shown.ends_with(')') { format!("{shown}... ({len} bytes)") } else { shown }
            }
            TraceValue::Fields(lines) => {
                let mut text = String::from("[");
                for (at, (name, value)) in lines.iter().enumerate() {
                    let name = String::from_utf8_lossy(name);
                    let separator = if at == 0 { "" } else { ", " };
                    let _ = write!(text, "{separator}{name}: {}", shown_value(&name, value, self.secrets));
                }
                text.push(']');
                text
            }
            other => format!("{other:?}"),
        }
    }

    fn list(&self, values: &[(&'static str, TraceValue)], beside: &[(&'static str, TraceValue)]) -> String {
        let shown: Vec<String> =
            values.iter().map(|(name, value)| format!("{name}: {}", self.text(name, value, beside))).collect();
        shown.join(", ")
    }
}

fn unquoted(text: &str) -> &str {
    text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text)
}

/// One line per callback, with its calls below it and what it answered at the end.
impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.forgotten > 0 {
            writeln!(f, "({} earlier events are not kept)", self.forgotten)?;
        }
        for event in &self.events {
            match event {
                TraceEvent::Callback { plugin, stream, callback, arguments } => {
                    let stream = stream.map(|stream| format!(" #{}", stream.as_u64())).unwrap_or_default();
                    writeln!(f, "{plugin}{stream}  {callback}({})", self.list(arguments, &[]))?;
                }
                TraceEvent::Hostcall { call, arguments, status, results } => {
                    let mut all = arguments.clone();
                    all.extend(results.iter().cloned());
                    write!(f, "    {call}({})", self.list(arguments, &all))?;
                    match status {
                        Ok("Ok") if results.is_empty() => writeln!(f)?,
                        Ok("Ok") => writeln!(f, " -> {}", self.list(results, &all))?,
                        Ok(status) => writeln!(f, " -> {status}")?,
                        Err(fault) => writeln!(f, " -> fault: {fault}")?,
                    }
                }
                TraceEvent::Returned { answer: Some(answer), .. } => {
                    writeln!(f, "  = {}", self.text("answer", answer, &[]))?;
                }
                TraceEvent::Trapped { cause, .. } => writeln!(f, "  ended: it {cause}")?,
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> TraceValue {
        TraceValue::Bytes { bytes: text.as_bytes().to_vec(), len: text.len() }
    }

    fn get(name: &str, value: &str) -> TraceEvent {
        TraceEvent::Hostcall {
            call: "proxy_get_header_map_value",
            arguments: vec![("map", TraceValue::Word("request headers")), ("name", bytes(name))],
            status: Ok("Ok"),
            results: vec![("value", bytes(value))],
        }
    }

    #[test]
    fn reads_like_what_happened() {
        let trace = Trace::new(
            vec![
                TraceEvent::Callback {
                    plugin: "guard".to_owned(),
                    stream: None,
                    callback: "proxy_on_request_headers",
                    arguments: vec![("context", TraceValue::Number(2)), ("end_of_stream", TraceValue::Word("true"))],
                },
                get("x-country", "CH"),
                TraceEvent::Hostcall {
                    call: "proxy_get_property",
                    arguments: vec![("path", bytes("request\0headers\0cookie"))],
                    status: Ok("NotFound"),
                    results: Vec::new(),
                },
                TraceEvent::Returned {
                    callback: "proxy_on_request_headers",
                    answer: Some(TraceValue::Word("Continue")),
                },
            ],
            3,
            Secrets::Masked,
        );
        assert_eq!(
            trace.to_string(),
            "(3 earlier events are not kept)\n\
             guard  proxy_on_request_headers(context: 2, end_of_stream: true)\n    \
             proxy_get_header_map_value(map: request headers, name: \"x-country\") -> value: \"CH\"\n    \
             proxy_get_property(path: \"request.headers.cookie\") -> NotFound\n  \
             = Continue\n"
        );
        assert_eq!(trace.to_json()[1]["results"]["value"], "CH");
        assert_eq!(trace.to_json()[0]["arguments"]["end_of_stream"], true);
    }

    #[test]
    fn credentials_are_shown_only_when_asked_for() {
        let events = vec![
            get("Authorization", "Bearer s3cret"),
            TraceEvent::Hostcall {
                call: "proxy_set_header_map_pairs",
                arguments: vec![(
                    "fields",
                    TraceValue::Fields(vec![
                        (b"x-api-key".to_vec(), b"s3cret".to_vec()),
                        (b"x".to_vec(), b"1".to_vec()),
                    ]),
                )],
                status: Ok("Ok"),
                results: Vec::new(),
            },
            TraceEvent::Hostcall {
                call: "proxy_get_property",
                arguments: vec![("path", bytes("request\0headers\0cookie"))],
                status: Ok("Ok"),
                results: vec![("value", bytes("s3cret"))],
            },
            TraceEvent::Hostcall {
                call: "proxy_set_shared_data",
                arguments: vec![("key", bytes("session-token")), ("value", bytes("s3cret"))],
                status: Ok("Ok"),
                results: Vec::new(),
            },
        ];
        let trace = Trace::new(events, 0, Secrets::Masked);
        for text in [trace.to_string(), trace.to_json().to_string(), format!("{trace:?}")] {
            assert!(!text.contains("s3cret"), "{text}");
        }
        assert!(trace.to_string().contains("[x-api-key: (6 bytes, not shown), x: \"1\"]"), "{trace}");
        let shown = trace.with_secrets(Secrets::Shown);
        assert_eq!(shown.to_string().matches("s3cret").count(), 4, "{shown}");
    }
}
