//! Bytes as a scenario writes them: text, base64, something repeated, JSON, or what a file holds.

use std::borrow::Cow;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::keys::SigningKey;
use crate::template::{Values, expand};
use crate::yaml::{FileError, read_text};

/// Bytes, not yet filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Text(String),
    Bytes(Vec<u8>),
    Json(Value),
    File(String),
    PublicKeysOf(String),
}

/// More than this from one `repeat` is a slip of the pen.
const REPEATED_BYTES_MAX: usize = 64 * 1024 * 1024;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Form {
    /// These bytes.
    base64: Option<String>,
    /// This text, `times` over.
    repeat: Option<String>,
    /// How often `repeat` is repeated.
    times: Option<usize>,
    /// The JSON text of this value.
    json: Option<Value>,
    /// What this file holds; the path is relative to the scenario.
    file: Option<String>,
    /// The public halves of a JWK Set with private keys, as a JWK Set.
    public_keys_of: Option<String>,
}

impl JsonSchema for Content {
    fn schema_name() -> Cow<'static, str> {
        "Content".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let form = generator.subschema_for::<Form>();
        json_schema!({ "description": "Bytes: text in quotes, or a map that makes them.", "anyOf": [{ "type": "string" }, form] })
    }
}

impl JsonSchema for Line {
    fn schema_name() -> Cow<'static, str> {
        "Line".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let content = generator.subschema_for::<Content>();
        json_schema!({
            "description": "A field line: `[name, value]`.",
            "type": "array", "prefixItems": [{ "type": "string" }, content], "minItems": 2, "maxItems": 2,
        })
    }
}

impl Form {
    fn content(self) -> Result<Content, String> {
        match self {
            Form { base64: Some(text), repeat: None, times: None, json: None, file: None, public_keys_of: None } => {
                STANDARD.decode(text.trim()).map(Content::Bytes).map_err(|error| {
                    format!("`base64` does not hold base64: {error}\nhint: use the alphabet with `+` and `/`, padded")
                })
            }
            Form { base64: None, repeat: Some(unit), times, json: None, file: None, public_keys_of: None } => {
                let times = times.ok_or("`repeat` needs `times`\nhint: write `{ repeat: \"a\", times: 1000 }`")?;
                match unit.len().checked_mul(times) {
                    Some(total) if total <= REPEATED_BYTES_MAX => Ok(Content::Text(unit.repeat(times))),
                    _ => Err(format!("`repeat` makes more than {REPEATED_BYTES_MAX} bytes")),
                }
            }
            Form { base64: None, repeat: None, times: None, json: Some(value), file: None, public_keys_of: None } => {
                Ok(Content::Json(value))
            }
            Form { base64: None, repeat: None, times: None, json: None, file: Some(name), public_keys_of: None } => {
                Ok(Content::File(name))
            }
            Form { base64: None, repeat: None, times: None, json: None, file: None, public_keys_of: Some(name) } => {
                Ok(Content::PublicKeysOf(name))
            }
            _ => Err("this is not one kind of content\nhint: give text in quotes, or one of `{ base64: ... }`, \
                      `{ repeat: ..., times: ... }`, `{ json: ... }`, `{ file: ... }` and `{ public_keys_of: ... }`"
                .to_owned()),
        }
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("text in quotes, or a map such as `{ base64: ... }`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Content, A::Error> {
                Form::deserialize(MapAccessDeserializer::new(map))?.content().map_err(serde::de::Error::custom)
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

impl Content {
    /// The file that it names.
    pub(crate) fn file(&self) -> Option<&str> {
        match self {
            Content::File(name) | Content::PublicKeysOf(name) => Some(name),
            _ => None,
        }
    }

    /// The bytes. `file` is the scenario, and `path` the place in it, for errors and for relative paths.
    pub(crate) fn resolve(&self, values: &Values, file: &Path, path: &str) -> Result<Vec<u8>, FileError> {
        let expand_at =
            |text: &str| expand(text, values).map_err(|(problem, hint)| FileError::at(file, path, problem).hint(hint));
        let neighbour = |name: &str| file.parent().unwrap_or(Path::new("")).join(name);
        match self {
            Content::Text(text) => Ok(expand_at(text)?.into_bytes()),
            Content::Bytes(bytes) => Ok(bytes.clone()),
            Content::Json(value) => Ok(expand_at(&value.to_string())?.into_bytes()),
            Content::File(name) => std::fs::read(neighbour(name)).map_err(|error| {
                FileError::at(file, path, format!("`{name}` cannot be read: {}", crate::yaml::reason(&error)))
                    .hint("paths are relative to the file that names them")
            }),
            Content::PublicKeysOf(name) => {
                let set = read_text(&neighbour(name)).map_err(|error| {
                    FileError::at(file, path, format!("`{name}` {}", error.problem)).hint(error.hint)
                })?;
                let keys = SigningKey::all_from_jwk_set(&set)
                    .map_err(|error| FileError::at(file, path, format!("`{name}`: {error}")))?;
                let keys: Vec<Value> = keys.iter().filter_map(SigningKey::public_jwk).collect();
                Ok(json!({ "keys": keys }).to_string().into_bytes())
            }
        }
    }
}

/// Bytes as a scenario writes them: text where they are text, else base64.
pub(crate) fn written(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\t')) => {
            Value::from(text.replace("${", "$${"))
        }
        _ => json!({ "base64": STANDARD.encode(bytes) }),
    }
}

/// A field line: `[name, value]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) value: Content,
}

impl<'de> Deserialize<'de> for Line {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Line, D::Error> {
        struct LineVisitor;
        impl<'de> Visitor<'de> for LineVisitor {
            type Value = Line;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a field line, `[name, \"value\"]`")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Line, A::Error> {
                let short = |len| serde::de::Error::invalid_length(len, &self);
                let name: String = items.next_element()?.ok_or_else(|| short(0))?;
                let value = items.next_element()?.ok_or_else(|| short(1))?;
                if items.next_element::<serde::de::IgnoredAny>()?.is_some() {
                    return Err(short(3));
                }
                if !is_token(&name) {
                    return Err(serde::de::Error::custom(format!(
                        "`{name}` is not a field name\nhint: pseudo-headers have keys of their own: `method`, `path`, \
                         `authority`, `status`"
                    )));
                }
                Ok(Line { name, value })
            }
        }
        deserializer.deserialize_seq(LineVisitor)
    }
}

/// A `token` of RFC 9110, section 5.6.2.
pub(crate) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(yaml: &str, expected: Result<&[u8], &str>) {
        let file = Path::new("s.yaml");
        let values = Values { now: 1000, ..Values::default() };
        let outcome = crate::yaml::parse::<Content>(file, yaml)
            .and_then(|content| content.resolve(&values, file, "body"))
            .map_err(|error| error.to_string());
        assert_eq!(outcome.as_deref().map_err(String::as_str), expected);
    }

    #[test]
    fn writes_bytes_in_several_ways() {
        check("'at ${now}'", Ok(b"at 1000"));
        check("{ base64: '/wA=' }", Ok(&[0xff, 0]));
        check("{ repeat: ab, times: 3 }", Ok(b"ababab"));
        check("{ json: { a: [1, 'x'] } }", Ok(br#"{"a":[1,"x"]}"#));
    }

    #[test]
    fn says_what_is_not_content() {
        check("5", Err("s.yaml: found integer `5`, expected text in quotes, or a map such as `{ base64: ... }`"));
        check("{ repeat: ab }", Err("s.yaml: `repeat` needs `times`\n  hint: write `{ repeat: \"a\", times: 1000 }`"));
        check(
            "{ base64: '=' }",
            Err("s.yaml: `base64` does not hold base64: Invalid symbol 61, offset 0.\n  \
                 hint: use the alphabet with `+` and `/`, padded"),
        );
        check(
            "{ file: nothing.bin }",
            Err("s.yaml: body: `nothing.bin` cannot be read: there is no such file\n  \
                 hint: paths are relative to the file that names them"),
        );
    }

    #[test]
    fn a_field_line_is_a_name_and_a_value() {
        let parse = |yaml: &str| crate::yaml::parse::<Line>(Path::new("s.yaml"), yaml);
        assert_eq!(parse("[X-A, 'b']").unwrap().name, "X-A");
        assert_eq!(
            parse("[':path', '/']").unwrap_err().to_string(),
            "s.yaml: `:path` is not a field name\n  hint: pseudo-headers have keys of their own: `method`, `path`, \
             `authority`, `status`"
        );
        assert!(parse("[a]").unwrap_err().to_string().contains("a field line, `[name, \"value\"]`"));
    }
}
