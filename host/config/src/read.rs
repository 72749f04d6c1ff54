//! From the located YAML tree to the file model, noting mistakes instead of stopping at the first.
//!
//! Serde stops at its first error. Here an unknown key is noted and skipped, so the rest is still read, and the
//! caller reads each element of a section on its own, so that one bad filter does not hide the next one's faults.
//! Nothing is converted: a number is not text, an empty value is not an absent one.

use std::cell::RefCell;
use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, VariantAccess, Visitor,
};

use crate::mistake::{Position, did_you_mean, listed};
use crate::yaml::{Entry, Node, Value};

/// What was found wrong while reading, before it is given its file and source line.
#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) path: String,
    pub(crate) at: Position,
    pub(crate) problem: String,
    pub(crate) hint: Option<String>,
}

/// Reads one node; problems that do not stop the reading go to `findings`.
#[derive(Clone)]
pub(crate) struct Reader<'n> {
    pub(crate) node: &'n Node,
    pub(crate) path: String,
    pub(crate) findings: &'n RefCell<Vec<Finding>>,
}

/// A problem that stops the reading of a value. It gets its place from the innermost reader it passes through.
#[derive(Debug)]
pub(crate) struct Stop {
    problem: String,
    hint: Option<String>,
    place: Option<(String, Position)>,
}

impl Stop {
    fn located(mut self, reader: &Reader<'_>) -> Self {
        self.place.get_or_insert_with(|| (reader.path.clone(), reader.node.at));
        self
    }

    pub(crate) fn into_finding(self, reader: &Reader<'_>) -> Finding {
        let Self { problem, hint, place } = self;
        let (path, at) = place.unwrap_or_else(|| (reader.path.clone(), reader.node.at));
        Finding { path, at, problem, hint }
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)
    }
}

impl std::error::Error for Stop {}

impl serde::de::Error for Stop {
    fn custom<T: fmt::Display>(message: T) -> Self {
        let message = message.to_string();
        match message.split_once("\nhint: ") {
            Some((problem, hint)) => Self { problem: problem.to_owned(), hint: Some(hint.to_owned()), place: None },
            None => Self { problem: message, hint: Some("the reference page has an example".to_owned()), place: None },
        }
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let (found, is_scalar) = match found {
            Unexpected::Bool(value) => (format!("`{value}`"), true),
            Unexpected::Unsigned(value) => (format!("the number `{value}`"), true),
            Unexpected::Signed(value) => (format!("the number `{value}`"), true),
            Unexpected::Float(value) => (format!("the number `{value}`"), true),
            Unexpected::Str(value) => (format!("the text `{}`", value.chars().take(80).collect::<String>()), false),
            Unexpected::Unit | Unexpected::Option => ("nothing".to_owned(), false),
            Unexpected::Seq => ("a list".to_owned(), false),
            Unexpected::Map => ("a mapping".to_owned(), false),
            other => (other.to_string(), false),
        };
        let wanted = in_our_words(&expected.to_string());
        let hint = if found == "nothing" {
            Some("write a value, or remove the key to get its default".to_owned())
        } else if wanted == "text" && is_scalar {
            Some("put the value in quotes".to_owned())
        } else if wanted.contains(" such as ") && is_scalar {
            Some("add the unit".to_owned())
        } else if wanted.starts_with("a whole number") && found.starts_with("the text") {
            Some("write the number without quotes".to_owned())
        } else {
            Some(match wanted.as_str() {
                "`true` or `false`" => "write one of the two, without quotes".to_owned(),
                "a list" => "write `[...]`, or each element on a line of its own after `- `".to_owned(),
                "a mapping" => "write `{ key: value }`, or each key on a line of its own".to_owned(),
                wanted if wanted.starts_with("a whole number") => "write a number in that range".to_owned(),
                wanted => format!("write {wanted}"),
            })
        };
        Self { problem: format!("expected {wanted}, found {found}"), hint, place: None }
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn missing_field(field: &'static str) -> Self {
        Self { problem: format!("`{field}` is missing"), hint: Some(format!("add `{field}:`")), place: None }
    }
}

/// Serde names Rust types; the reader of a policy file has never heard of them.
fn in_our_words(expected: &str) -> String {
    let integer = |max: u64| format!("a whole number from 0 to {max}");
    match expected {
        "a string" => "text".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "u8" => integer(u8::MAX.into()),
        "u16" => integer(u16::MAX.into()),
        "u32" => integer(u32::MAX.into()),
        "u64" | "usize" => integer(u64::MAX),
        "a sequence" => "a list".to_owned(),
        "a map" => "a mapping".to_owned(),
        other if other.starts_with("struct ") || other.starts_with("struct variant ") => "a mapping".to_owned(),
        other => other.to_owned(),
    }
}

impl<'n> Reader<'n> {
    fn child(&self, node: &'n Node, path: String) -> Self {
        Self { node, path, findings: self.findings }
    }

    /// The entries of a mapping.
    pub(crate) fn entries(&self) -> Option<&'n [Entry]> {
        match &self.node.value {
            Value::Mapping(entries) => Some(entries),
            _ => None,
        }
    }

    /// The elements of a list, each with its own reader.
    pub(crate) fn elements(&self) -> Option<impl Iterator<Item = Self> + use<'n>> {
        let Value::List(nodes) = &self.node.value else {
            return None;
        };
        let this = self.clone();
        Some(nodes.iter().enumerate().map(move |(index, node)| this.child(node, format!("{}[{index}]", this.path))))
    }

    /// A reader for the value of one entry of this mapping.
    pub(crate) fn of_entry(&self, entry: &'n Entry) -> Self {
        let path = if self.path.is_empty() { entry.key.clone() } else { format!("{}.{}", self.path, entry.key) };
        self.child(&entry.node, path)
    }

    pub(crate) fn note(&self, at: Position, path: String, problem: String, hint: Option<String>) {
        self.findings.borrow_mut().push(Finding { path, at, problem, hint });
    }

    /// Notes a key that nothing knows.
    pub(crate) fn note_unknown_key(&self, entry: &Entry, known: &[&'static str]) {
        let hint = match did_you_mean(&entry.key, known.iter().copied()) {
            Some(meant) => format!("did you mean `{meant}`?"),
            None => format!("known here: {}", listed(known.iter().copied())),
        };
        let path = self.of_entry(entry).path;
        self.note(entry.key_at, path, format!("unknown key `{}`", entry.key), Some(hint));
    }

    fn unexpected(&self) -> Unexpected<'n> {
        match &self.node.value {
            Value::Nothing => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Unsigned(value) => Unexpected::Unsigned(*value),
            Value::Negative(value) => Unexpected::Signed(*value),
            Value::Float(value) => Unexpected::Float(*value),
            Value::Text(value) => Unexpected::Str(value),
            Value::List(_) => Unexpected::Seq,
            Value::Mapping(_) => Unexpected::Map,
        }
    }

    fn mapping<V: Visitor<'n>>(self, known: Option<&'static [&'static str]>, visitor: V) -> Result<V::Value, Stop> {
        let Some(entries) = self.entries() else {
            return Err(Stop::invalid_type(self.unexpected(), &visitor).located(&self));
        };
        let reader = self.clone();
        visitor
            .visit_map(Entries { reader: self, known, left: entries.iter(), current: None })
            .map_err(|stop| stop.located(&reader))
    }
}

/// Methods that read a value as what it is and let the visitor decide whether it likes it.
macro_rules! as_it_is {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Stop> {
            self.deserialize_any(visitor)
        }
    )*};
}

impl<'n> Deserializer<'n> for Reader<'n> {
    type Error = Stop;

    fn deserialize_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Stop> {
        let here = self.clone();
        let read = match &self.node.value {
            Value::Nothing => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Negative(value) => visitor.visit_i64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_borrowed_str(value),
            Value::List(nodes) => visitor.visit_seq(Elements { reader: self, left: nodes.iter(), index: 0 }),
            Value::Mapping(_) => self.mapping(None, visitor),
        };
        read.map_err(|stop| stop.located(&here))
    }

    as_it_is! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128 deserialize_f32
        deserialize_f64 deserialize_char deserialize_str deserialize_string deserialize_bytes
        deserialize_byte_buf deserialize_unit deserialize_seq deserialize_map deserialize_identifier
        deserialize_ignored_any
    }

    /// `tls:` with nothing behind it is not the absence of `tls`: it would switch something off unseen.
    fn deserialize_option<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_some(self)
    }

    fn deserialize_unit_struct<V: Visitor<'n>>(self, _: &'static str, visitor: V) -> Result<V::Value, Stop> {
        self.deserialize_any(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'n>>(self, _: &'static str, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_tuple<V: Visitor<'n>>(self, _: usize, visitor: V) -> Result<V::Value, Stop> {
        self.deserialize_any(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'n>>(self, _: &'static str, _: usize, visitor: V) -> Result<V::Value, Stop> {
        self.deserialize_any(visitor)
    }

    fn deserialize_struct<V: Visitor<'n>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Stop> {
        self.mapping(Some(fields), visitor)
    }

    fn deserialize_enum<V: Visitor<'n>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Stop> {
        let here = self.clone();
        let one_of = || listed(variants.iter().copied());
        let (name, at, content) = match &self.node.value {
            Value::Text(name) => (name.as_str(), self.node.at, None),
            Value::Mapping(entries) => match entries.as_slice() {
                [entry] => (entry.key.as_str(), entry.key_at, Some(self.of_entry(entry))),
                _ => {
                    return Err(Stop {
                        problem: format!("expected exactly one key, found {}", entries.len()),
                        hint: Some(format!("keep one of {}", one_of())),
                        place: None,
                    }
                    .located(&here));
                }
            },
            _ => {
                let found = Stop::invalid_type(self.unexpected(), &"a choice").problem;
                let found = found.strip_prefix("expected a choice, ").unwrap_or(&found);
                return Err(Stop {
                    problem: format!("expected one of {}, {found}", one_of()),
                    hint: Some("write one of these".to_owned()),
                    place: None,
                }
                .located(&here));
            }
        };
        if !variants.contains(&name) {
            let hint = match did_you_mean(name, variants.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("use one of {}", one_of()),
            };
            return Err(Stop {
                problem: format!("`{name}` is none of {}", one_of()),
                hint: Some(hint),
                place: Some((here.path.clone(), at)),
            });
        }
        visitor.visit_enum(Choice { name, content }).map_err(|stop| stop.located(&here))
    }
}

struct Elements<'n> {
    reader: Reader<'n>,
    left: std::slice::Iter<'n, Node>,
    index: usize,
}

impl<'n> SeqAccess<'n> for Elements<'n> {
    type Error = Stop;

    fn next_element_seed<T: DeserializeSeed<'n>>(&mut self, seed: T) -> Result<Option<T::Value>, Stop> {
        let Some(node) = self.left.next() else { return Ok(None) };
        let path = format!("{}[{}]", self.reader.path, self.index);
        self.index += 1;
        seed.deserialize(self.reader.child(node, path)).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.len())
    }
}

struct Entries<'n> {
    reader: Reader<'n>,
    known: Option<&'static [&'static str]>,
    left: std::slice::Iter<'n, Entry>,
    current: Option<&'n Entry>,
}

impl<'n> MapAccess<'n> for Entries<'n> {
    type Error = Stop;

    fn next_key_seed<K: DeserializeSeed<'n>>(&mut self, seed: K) -> Result<Option<K::Value>, Stop> {
        for entry in self.left.by_ref() {
            match self.known {
                Some(known) if !known.contains(&entry.key.as_str()) => self.reader.note_unknown_key(entry, known),
                _ => {
                    self.current = Some(entry);
                    return seed.deserialize(entry.key.as_str().into_deserializer()).map(Some);
                }
            }
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'n>>(&mut self, seed: V) -> Result<V::Value, Stop> {
        match self.current.take() {
            Some(entry) => seed.deserialize(self.reader.of_entry(entry)),
            None => Err(Stop::custom("a value was asked for before its key")),
        }
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.len())
    }
}

struct Choice<'n> {
    name: &'n str,
    content: Option<Reader<'n>>,
}

impl<'n> EnumAccess<'n> for Choice<'n> {
    type Error = Stop;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'n>>(self, seed: V) -> Result<(V::Value, Self), Stop> {
        Ok((seed.deserialize(self.name.into_deserializer())?, self))
    }
}

impl<'n> Choice<'n> {
    fn with_content(self) -> Result<Reader<'n>, Stop> {
        let name = self.name;
        self.content.ok_or_else(|| Stop {
            problem: format!("`{name}` needs a value"),
            hint: Some(format!("write `{{ {name}: ... }}`")),
            place: None,
        })
    }
}

impl<'n> VariantAccess<'n> for Choice<'n> {
    type Error = Stop;

    fn unit_variant(self) -> Result<(), Stop> {
        match self.content {
            None => Ok(()),
            Some(_) => Err(Stop {
                problem: format!("`{}` takes no value", self.name),
                hint: Some(format!("write just `{}`", self.name)),
                place: None,
            }),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'n>>(self, seed: T) -> Result<T::Value, Stop> {
        seed.deserialize(self.with_content()?)
    }

    fn tuple_variant<V: Visitor<'n>>(self, _: usize, visitor: V) -> Result<V::Value, Stop> {
        self.with_content()?.deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'n>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Stop> {
        self.with_content()?.mapping(Some(fields), visitor)
    }
}
