//! Values that must not leave: no log line, no error message, no `Debug` output shows them.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};
use subtle::ConstantTimeEq;

/// A string from the configuration that is a secret. To read it is a visible act: [`Secret::expose`].
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// The secret itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Serde's own message would quote the value that it found instead of a string.
        String::deserialize(deserializer).map(Self).map_err(|_| de::Error::custom("expected a string"))
    }
}

impl JsonSchema for Secret {
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "writeOnly": true })
    }
}

/// Compares without telling, by the time it takes, how much of `a` and `b` agrees. Their lengths are not hidden.
pub fn constant_time_eq(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_debug_nor_an_error_shows_a_secret() {
        let secret: Secret = serde_json::from_str("\"hunter2\"").expect("a string");
        assert_eq!(secret.expose(), "hunter2");
        assert_eq!(format!("{secret:?}"), "Secret");
        let error = serde_json::from_value::<Secret>(serde_json::json!(31337)).expect_err("a number");
        assert_eq!(error.to_string(), "expected a string");
    }

    #[test]
    fn compares_like_equality() {
        for (a, b) in [("", ""), ("a", "a"), ("a", "b"), ("a", "ab"), ("abc", "abd")] {
            assert_eq!(constant_time_eq(a.as_bytes(), b.as_bytes()), a == b, "{a} {b}");
        }
    }
}
