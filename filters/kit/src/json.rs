//! Reads JSON (RFC 8259) more strictly than `serde_json` does: a name that appears twice in one object is seen.
//!
//! `serde_json` keeps the last of two equal names and other readers keep the first, so two readers of one text can be
//! told two different things. RFC 8725 and RFC 7519 (section 4) allow a reader to refuse such tokens, and we do; in a
//! configuration the second entry is a mistake that would silently undo the first.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::config_error::JsonPath;

/// Reads a JSON text in which no object has the same name twice. The answer to any fault is `None`: what a token
/// contains belongs in no message.
pub fn parse_strict(text: &[u8]) -> Option<Value> {
    parse(text, &mut |_, _| false).ok()
}

/// Reads a JSON text and notes where a name repeats one before it in the same object; the first one's value is kept.
pub(crate) fn parse_noting_duplicates(text: &[u8], duplicates: &mut Vec<JsonPath>) -> serde_json::Result<Value> {
    parse(text, &mut |place, name| {
        duplicates.push(place.path().key(name));
        true
    })
}

/// `on_duplicate` is told where a name occurs again and answers whether to go on.
fn parse(text: &[u8], on_duplicate: &mut dyn FnMut(&Place<'_>, &str) -> bool) -> serde_json::Result<Value> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    // `serde_json` itself refuses texts nested deeper than 128 levels, so neither it nor we recurse without bound.
    let value = Reader { place: &Place::Root, on_duplicate }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// Where the reader is: a list on the stack, which costs nothing unless a path is asked for.
enum Place<'a> {
    Root,
    Key(&'a Place<'a>, &'a str),
    Index(&'a Place<'a>, usize),
}

impl Place<'_> {
    fn path(&self) -> JsonPath {
        match self {
            Self::Root => JsonPath::default(),
            Self::Key(parent, key) => parent.path().key(key),
            Self::Index(parent, index) => parent.path().index(*index),
        }
    }
}

struct Reader<'a> {
    place: &'a Place<'a>,
    on_duplicate: &'a mut dyn FnMut(&Place<'_>, &str) -> bool,
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        loop {
            let place = Place::Index(self.place, array.len());
            match items.next_element_seed(Reader { place: &place, on_duplicate: &mut *self.on_duplicate })? {
                Some(item) => array.push(item),
                None => return Ok(Value::Array(array)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            let place = Place::Key(self.place, &name);
            let value = members.next_value_seed(Reader { place: &place, on_duplicate: &mut *self.on_duplicate })?;
            if !object.contains_key(&name) {
                object.insert(name, value);
            } else if !(self.on_duplicate)(self.place, &name) {
                return Err(A::Error::custom("a name appears twice in one object"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_what_serde_json_reads() {
        for text in [
            "null",
            " [1, -2, 0.5, true, \"x\\u0000\"] ",
            r#"{"a":{"a":1},"b":[{"a":1},{"a":2}]}"#,
            "1e2",
            "18446744073709551615",
        ] {
            assert_eq!(parse_strict(text.as_bytes()), serde_json::from_str(text).ok(), "{text}");
            assert!(parse_strict(text.as_bytes()).is_some(), "{text}");
        }
    }

    #[test]
    fn refuses_names_that_repeat_at_any_depth_and_in_any_spelling() {
        for text in [r#"{"a":1,"a":1}"#, r#"[{"x":{"a":1,"b":2,"a":3}}]"#, r#"{"a":1,"\u0061":2}"#] {
            assert_eq!(parse_strict(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn refuses_what_is_not_json() {
        for text in [
            "",
            "{",
            "{} {}",
            "{}x",
            "NaN",
            "1e400",
            "-1e400",
            "'a'",
            "{\"a\":1,}",
            "[1,]",
            "\u{feff}{}",
            "01",
            "\"\u{1}\"",
        ] {
            assert_eq!(parse_strict(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse_strict(b"\"\xff\""), None, "not UTF-8");
        assert_eq!(parse_strict("\"\\ud800\"".as_bytes()), None, "a lone surrogate");
        assert_eq!(parse_strict("[".repeat(100_000).as_bytes()), None, "nested too deeply");
    }

    #[test]
    fn says_where_each_name_repeats_and_keeps_the_first_value() {
        let mut duplicates = Vec::new();
        let text = br#"{"a":1,"b":[{"c":1,"c":2}],"a":{"d":1,"d":2}}"#;
        let value = parse_noting_duplicates(text, &mut duplicates).expect("JSON");
        assert_eq!(value, json!({"a":1,"b":[{"c":1}]}));
        assert_eq!(duplicates.iter().map(ToString::to_string).collect::<Vec<_>>(), ["b[0].c", "a.d", "a"]);
    }

    proptest! {
        #[test]
        fn survives_anything(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(value) = parse_strict(&text) {
                prop_assert_eq!(serde_json::from_slice::<Value>(&text).ok(), Some(value));
            }
        }

        #[test]
        fn survives_anything_made_of_json_punctuation(text in "[\\[\\]{}:,\"ab0-9eE.\\\\u -]{0,60}") {
            if let Some(value) = parse_strict(text.as_bytes()) {
                prop_assert_eq!(serde_json::from_str::<Value>(&text).ok(), Some(value));
            }
        }
    }
}
