//! A YAML document with its keys in the order they were written, for people to read.

use std::collections::HashSet;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// A node of the document.
#[derive(Clone, Debug)]
pub(super) enum Document {
    Text(String),
    Number(u64),
    /// A number or `null`, as JSON and YAML write it.
    Plain(String),
    Bool(bool),
    List(Vec<Document>),
    Map(Vec<(String, Document)>),
}

impl Document {
    /// A mapping.
    pub(super) fn map<K: Into<String>>(entries: impl IntoIterator<Item = (K, Document)>) -> Self {
        Self::Map(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }

    /// A list.
    pub(super) fn list(items: impl IntoIterator<Item = Document>) -> Self {
        Self::List(items.into_iter().collect())
    }

    /// Adds an entry to a mapping; to anything else it adds nothing.
    pub(super) fn with(mut self, key: &str, value: impl Into<Document>) -> Self {
        if let Self::Map(entries) = &mut self {
            entries.push((key.to_owned(), value.into()));
        }
        self
    }

    /// Adds an entry if there is a value.
    pub(super) fn with_some(self, key: &str, value: Option<Document>) -> Self {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }

    /// The document that a JSON text is, with its keys in their order.
    pub(super) fn from_json(text: &[u8]) -> Result<Self, JsonRefused> {
        serde_json::from_slice(text).map_err(|error| {
            let said = error.to_string();
            match said.strip_prefix(TWICE).and_then(|rest| rest.rsplit_once(" at line ")) {
                Some((key, _)) => JsonRefused::Twice(key.to_owned()),
                None => JsonRefused::Syntax(said),
            }
        })
    }

    /// A number in it that a double does not hold exactly.
    pub(super) fn number_beyond_double(&self) -> Option<String> {
        /// All whole numbers up to here are doubles.
        const EXACT_MAX: u64 = 1 << 53;
        match self {
            Self::Number(number) if *number > EXACT_MAX => Some(number.to_string()),
            Self::Plain(text) => {
                text.parse::<i64>().ok().filter(|number| number.unsigned_abs() > EXACT_MAX).map(|_| text.clone())
            }
            Self::List(items) => items.iter().find_map(Self::number_beyond_double),
            Self::Map(entries) => entries.iter().find_map(|(_, value)| value.number_beyond_double()),
            Self::Text(_) | Self::Number(_) | Self::Bool(_) => None,
        }
    }

    /// The document as block-style YAML.
    pub(super) fn render(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, 0, false);
        out
    }

    fn write(&self, out: &mut String, indent: usize, after_dash: bool) {
        match self {
            Self::Map(entries) if entries.is_empty() => out.push_str(" {}\n"),
            Self::List(items) if items.is_empty() => out.push_str(" []\n"),
            Self::Map(entries) => {
                if !after_dash && indent > 0 {
                    out.push('\n');
                }
                for (index, (key, value)) in entries.iter().enumerate() {
                    if index > 0 || !after_dash {
                        out.push_str(&" ".repeat(indent));
                    } else {
                        out.push(' ');
                    }
                    out.push_str(&scalar(key));
                    out.push(':');
                    value.write(out, indent + 2, false);
                }
            }
            Self::List(items) => {
                out.push('\n');
                for item in items {
                    out.push_str(&" ".repeat(indent));
                    out.push('-');
                    item.write(out, indent + 2, true);
                }
            }
            Self::Text(text) if fits_a_block(text) => {
                out.push_str(if text.ends_with('\n') { " |\n" } else { " |-\n" });
                for line in text.lines() {
                    if !line.is_empty() {
                        out.push_str(&" ".repeat(indent));
                        out.push_str(line);
                    }
                    out.push('\n');
                }
            }
            Self::Text(text) => {
                out.push(' ');
                out.push_str(&scalar(text));
                out.push('\n');
            }
            Self::Number(number) => out.push_str(&format!(" {number}\n")),
            Self::Plain(text) => out.push_str(&format!(" {text}\n")),
            Self::Bool(value) => out.push_str(&format!(" {value}\n")),
        }
    }
}

/// Why a text is no document.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum JsonRefused {
    /// It is not JSON; serde's words.
    Syntax(String),
    /// A key stands twice in one object.
    Twice(String),
}

/// How an error begins that [`Document::from_json`] makes a value of.
const TWICE: &str = "a key stands twice: ";

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Document;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Document, E> {
        Ok(Document::Plain("null".to_owned()))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Document, E> {
        Ok(Document::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Document, E> {
        Ok(Document::Number(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Document, E> {
        Ok(Document::Plain(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Document, E> {
        Ok(Document::Plain(format!("{value:?}")))
    }

    fn visit_str<E>(self, value: &str) -> Result<Document, E> {
        Ok(Document::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Document, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Document::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Document, A::Error> {
        let mut map: Vec<(String, Document)> = Vec::new();
        let mut seen = HashSet::new();
        while let Some((key, value)) = entries.next_entry::<String, Document>()? {
            if !seen.insert(key.clone()) {
                return Err(de::Error::custom(format!("{TWICE}{key}")));
            }
            map.push((key, value));
        }
        Ok(Document::Map(map))
    }
}

/// Whether a text can stand as it is, line by line, and reads back the same.
fn fits_a_block(text: &str) -> bool {
    let lines = text.strip_suffix('\n').unwrap_or(text);
    lines.contains('\n')
        && !lines.starts_with([' ', '\n'])
        && !lines.ends_with('\n')
        && lines.chars().all(|c| c == '\n' || (!c.is_control() && !matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')))
        && lines.lines().all(|line| !line.ends_with(' '))
}

/// Plain where no YAML reader can take it for something else, quoted otherwise.
fn scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-./".contains(&byte))
        && !matches!(
            text.to_ascii_lowercase().as_str(),
            "y" | "n" | "yes" | "no" | "on" | "off" | "true" | "false" | "null" | "nan" | "inf"
        );
    if plain {
        return text.to_owned();
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            '\r' => quoted.push_str("\\r"),
            // Control characters, and the line breaks and marks that YAML treats as such.
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                quoted.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

impl From<&str> for Document {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Document {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Document {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u64> for Document {
    fn from(value: u64) -> Self {
        Self::Number(value)
    }
}

impl From<usize> for Document {
    fn from(value: usize) -> Self {
        Self::Number(value as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_its_order_and_reads_back_the_same() {
        let text = r#"{"b": [-1, 0.5, 1e300, null, true, "no"], "a": {"": []}, "big": 18446744073709551615}"#;
        let document = Document::from_json(text.as_bytes()).expect("JSON");
        let yaml = document.render();
        assert!(
            yaml.starts_with("b:\n  - -1\n  - 0.5\n  - 1e300\n  - null\n") && yaml.contains("\na:\n  \"\": []\n"),
            "{yaml}"
        );
        let read: serde_json::Value = serde_saphyr::from_str(&yaml).expect("valid YAML");
        assert_eq!(read, serde_json::from_str::<serde_json::Value>(text).expect("JSON"));
        assert_eq!(document.number_beyond_double().as_deref(), Some("18446744073709551615"));
        let small = Document::from_json(b"[9007199254740992, -9007199254740992, 1e300]").expect("JSON");
        assert_eq!(small.number_beyond_double(), None);
        let negative = Document::from_json(b"[{\"a\": -9007199254740993}]").expect("JSON");
        assert_eq!(negative.number_beyond_double().as_deref(), Some("-9007199254740993"));
    }

    #[test]
    fn json_with_a_key_twice_is_refused() {
        let refused = |text: &str| Document::from_json(text.as_bytes()).expect_err("not a document");
        assert_eq!(
            refused(r#"{"a": {"k at line ": 1, "k at line ": 2}}"#),
            JsonRefused::Twice("k at line ".to_owned())
        );
        assert!(matches!(refused("{"), JsonRefused::Syntax(said) if said.contains("line 1")));
        assert!(matches!(refused("1 2"), JsonRefused::Syntax(_)));
    }

    #[test]
    fn renders_block_style_that_reads_back_the_same() {
        let document = Document::map([
            ("name", Document::from("jwt")),
            ("empty", Document::map::<String>([])),
            ("none", Document::list([])),
            ("list", Document::list([Document::map([("a", 1_u64.into()), ("b", true.into())]), "x".into()])),
            ("nested", Document::map([("on", Document::from("no")), ("text", "a: \"b\"\n#\u{85}".into())])),
            ("lists", Document::list([Document::list([2_u64.into()])])),
            ("block", Document::map([("value", Document::from("{\n  \"a\": 1,\n\n  # \u{e9}\n}\n"))])),
            ("cut", "a\n: b".into()),
            ("crlf", "a\r\nb".into()),
        ]);
        let text = document.render();
        assert_eq!(
            text,
            "name: jwt\nempty: {}\nnone: []\nlist:\n  - a: 1\n    b: true\n  - x\nnested:\n  \"on\": \"no\"\n  text: \"a: \
             \\\"b\\\"\\n#\\u0085\"\nlists:\n  -\n    - 2\nblock:\n  value: |\n    {\n      \"a\": 1,\n\n      # \u{e9}\n    }\ncut: |-\n  \
             a\n  : b\ncrlf: \"a\\r\\nb\"\n"
        );
        let read: serde_json::Value = serde_saphyr::from_str(&text).expect("valid YAML");
        assert_eq!(
            read,
            serde_json::json!({
                "name": "jwt", "empty": {}, "none": [], "list": [{"a": 1, "b": true}, "x"],
                "nested": {"on": "no", "text": "a: \"b\"\n#\u{85}"}, "lists": [[2]], "block": {"value": "{\n  \"a\": 1,\n\n  # \u{e9}\n}\n"}, "cut": "a\n: b",
                "crlf": "a\r\nb",
            })
        );
    }
}
