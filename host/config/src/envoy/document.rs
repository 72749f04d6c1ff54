//! A YAML document with its keys in the order they were written, for people to read.

/// A node of the document.
#[derive(Clone, Debug)]
pub(super) enum Document {
    Text(String),
    Number(u64),
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
            Self::Bool(value) => out.push_str(&format!(" {value}\n")),
        }
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
