//! What expressions come to.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::function::no_overload;
use super::{Failed, Steps};
use crate::abi::Status;
use crate::pairs;
use crate::property::{self, Attributes, Message};

#[derive(Clone, Debug)]
pub(super) enum Value<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    /// Mostly UTF-8; fields of messages can hold anything.
    Text(Cow<'a, [u8]>),
    Bytes(Cow<'a, [u8]>),
    /// Nanoseconds since 1970.
    Timestamp(i128),
    /// Nanoseconds.
    Duration(i128),
    Type(&'static str),
    /// With its depth, as for maps.
    List(Rc<Vec<Value<'a>>>, u8),
    Map(Rc<BTreeMap<Key<'a>, Value<'a>>>, u8),
    /// An attribute with others below it: a map whose keys are only partly known.
    Attributes(property::Value<'a>),
    Message(Message),
    /// Can be passed on, but not looked into.
    Opaque,
}

/// What values of a map are found by. Numbers of the same size are different keys, but each finds the other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key<'a> {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Text(Cow<'a, [u8]>),
}

impl<'a> From<property::Value<'a>> for Value<'a> {
    fn from(value: property::Value<'a>) -> Value<'a> {
        use property::Value as Property;
        match value {
            Property::Text(text) => Value::Text(text),
            Property::Bytes(bytes) => Value::Bytes(bytes),
            Property::Int(number) => Value::Int(number),
            Property::Uint(number) => Value::Uint(number),
            Property::Bool(truth) => Value::Bool(truth),
            Property::Timestamp(at) => Value::Timestamp(at.into()),
            Property::Duration(long) => Value::Duration(long.into()),
            Property::Message(message) => Value::Message(message),
            Property::Opaque => Value::Opaque,
            below @ (Property::Group(_) | Property::Fields(_) | Property::Address(_) | Property::Nothing) => {
                Value::Attributes(below)
            }
        }
    }
}

impl<'a> From<Key<'a>> for Value<'a> {
    fn from(key: Key<'a>) -> Value<'a> {
        match key {
            Key::Bool(truth) => Value::Bool(truth),
            Key::Int(number) => Value::Int(number),
            Key::Uint(number) => Value::Uint(number),
            Key::Text(text) => Value::Text(text),
        }
    }
}

impl<'a> Value<'a> {
    pub(super) fn text(text: String) -> Value<'a> {
        Value::Text(text.into_bytes().into())
    }

    pub(super) fn list(items: Vec<Value<'a>>) -> Result<Value<'a>, Failed> {
        let depth = depth_above(&items)?;
        Ok(Value::List(Rc::new(items), depth))
    }

    pub(super) fn map(entries: BTreeMap<Key<'a>, Value<'a>>) -> Result<Value<'a>, Failed> {
        let depth = depth_above(entries.values())?;
        Ok(Value::Map(Rc::new(entries), depth))
    }

    /// Takes the steps for the bytes that are this value's own.
    fn charged(self, steps: &Steps) -> Result<Value<'a>, Failed> {
        if let Value::Text(Cow::Owned(bytes)) | Value::Bytes(Cow::Owned(bytes)) = &self {
            steps.take_bytes(bytes.len())?;
        }
        Ok(self)
    }

    pub(super) fn copy(&self, steps: &Steps) -> Result<Value<'a>, Failed> {
        self.clone().charged(steps)
    }

    pub(super) fn type_name(&self) -> Option<&'static str> {
        Some(match self {
            Value::Null => "null_type",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Uint(_) => "uint",
            Value::Double(_) => "double",
            Value::Text(_) => "string",
            Value::Bytes(_) => "bytes",
            Value::Timestamp(_) => "google.protobuf.Timestamp",
            Value::Duration(_) => "google.protobuf.Duration",
            Value::Type(_) => "type",
            Value::List(..) => "list",
            Value::Map(..) | Value::Attributes(_) => "map",
            Value::Message(Message::Node) => "envoy.config.core.v3.Node",
            Value::Message(Message::Metadata) => "envoy.config.core.v3.Metadata",
            Value::Message(Message::Locality) => "envoy.config.core.v3.Locality",
            Value::Opaque => return None,
        })
    }

    /// The type that a name stands for.
    pub(super) fn type_by_name(name: &str) -> Option<Value<'a>> {
        let types = ["bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"];
        types.into_iter().find(|known| *known == name).map(Value::Type)
    }

    pub(super) fn size(&self, steps: &Steps) -> Result<usize, Failed> {
        Ok(match self {
            Value::Text(text) => {
                steps.take_bytes(text.len())?;
                let chunks = text.utf8_chunks();
                chunks.map(|chunk| chunk.valid().chars().count() + usize::from(!chunk.invalid().is_empty())).sum()
            }
            Value::Bytes(bytes) => bytes.len(),
            Value::List(items, _) => items.len(),
            Value::Map(entries, _) => entries.len(),
            Value::Attributes(_) => self.names(steps)?.len(),
            _ => return Err(no_overload()),
        })
    }

    /// The names below an attribute that are known: a message's fields.
    fn names(&self, steps: &Steps) -> Result<BTreeSet<&'a [u8]>, Failed> {
        let Value::Attributes(property::Value::Fields(Some(fields))) = self else {
            return Ok(BTreeSet::new());
        };
        steps.take(fields.len())?;
        Ok(fields.iter().map(|(name, _)| name).collect())
    }

    /// What a macro goes through: a list's items or a map's keys.
    pub(super) fn items(&self, steps: &Steps) -> Result<Rc<Vec<Value<'a>>>, Failed> {
        let keys: Vec<Value<'a>> = match self {
            Value::List(items, _) => return Ok(Rc::clone(items)),
            Value::Map(entries, _) => {
                steps.take(entries.len())?;
                entries.keys().map(|key| Value::from(key.clone()).charged(steps)).collect::<Result<_, _>>()?
            }
            Value::Attributes(_) => {
                self.names(steps)?.into_iter().map(|name| Value::Text(Cow::Borrowed(name))).collect()
            }
            _ => return Err(Failed::new("a macro goes through a list or a map")),
        };
        Ok(Rc::new(keys))
    }

    /// What a map has below a key. What cannot be a key of any map fails.
    pub(super) fn get(
        &self,
        key: &Value<'a>,
        within: &Attributes<'a>,
        steps: &Steps,
    ) -> Result<Option<Value<'a>>, Failed> {
        let (key, other) = match key.copy(steps)? {
            Value::Bool(truth) => (Key::Bool(truth), None),
            Value::Text(text) => (Key::Text(text), None),
            Value::Int(number) => (Key::Int(number), u64::try_from(number).ok().map(Key::Uint)),
            Value::Uint(number) => (Key::Uint(number), i64::try_from(number).ok().map(Key::Int)),
            Value::Double(number) => match whole(number) {
                Some(number) => (Key::Int(number), u64::try_from(number).ok().map(Key::Uint)),
                None => return if self.type_name() == Some("map") { Ok(None) } else { Err(no_overload()) },
            },
            _ => return Err(no_overload()),
        };
        let found = match (self, &key) {
            (Value::Map(entries, _), key) => entries.get(key).or_else(|| entries.get(&other?)).cloned(),
            (Value::Attributes(of), Key::Text(name)) => within.field(of, name).map(Value::from),
            (Value::Attributes(_), _) => None,
            _ => return Err(no_overload()),
        };
        found.map(|found| found.charged(steps)).transpose()
    }

    /// Values of different types differ; numbers are compared by what they are worth.
    pub(super) fn equals(&self, other: &Value<'a>, within: &Attributes<'a>, steps: &Steps) -> Result<bool, Failed> {
        steps.take(1)?;
        Ok(match (self, other) {
            (Value::Null, Value::Null) => true,
            (Value::Type(left), Value::Type(right)) => left == right,
            (Value::Message(left), Value::Message(right)) => left == right,
            (Value::List(left, _), Value::List(right, _)) => {
                if left.len() != right.len() {
                    return Ok(false);
                }
                for (left, right) in left.iter().zip(right.iter()) {
                    if !left.equals(right, within, steps)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Value::Map(..) | Value::Attributes(_), Value::Map(..) | Value::Attributes(_)) => {
                if self.size(steps)? != other.size(steps)? {
                    return Ok(false);
                }
                for key in self.items(steps)?.iter() {
                    let (Some(left), Some(right)) = (self.get(key, within, steps)?, other.get(key, within, steps)?)
                    else {
                        return Ok(false);
                    };
                    if !left.equals(&right, within, steps)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Value::Opaque, Value::Opaque) => return Err(no_overload()),
            (left, right) => left.order(right, steps)? == Some(Some(Ordering::Equal)),
        })
    }

    /// How values follow each other, if they can; the inner `None` is a number that is none.
    pub(super) fn order(&self, other: &Value<'a>, steps: &Steps) -> Result<Option<Option<Ordering>>, Failed> {
        Ok(Some(match (self, other) {
            (Value::Bool(left), Value::Bool(right)) => Some(left.cmp(right)),
            (Value::Text(left), Value::Text(right)) | (Value::Bytes(left), Value::Bytes(right)) => {
                steps.take_bytes(left.len().min(right.len()))?;
                Some(left.cmp(right))
            }
            (Value::Timestamp(left), Value::Timestamp(right)) | (Value::Duration(left), Value::Duration(right)) => {
                Some(left.cmp(right))
            }
            (Value::Double(left), Value::Double(right)) => left.partial_cmp(right),
            (Value::Double(left), right) => match right.integer() {
                Some(right) => left.partial_cmp(&(right as f64)),
                None => return Ok(None),
            },
            (left, Value::Double(right)) => match left.integer() {
                Some(left) => (left as f64).partial_cmp(right),
                None => return Ok(None),
            },
            (left, right) => match (left.integer(), right.integer()) {
                (Some(left), Some(right)) => Some(left.cmp(&right)),
                _ => return Ok(None),
            },
        }))
    }

    fn integer(&self) -> Option<i128> {
        match self {
            Value::Int(number) => Some((*number).into()),
            Value::Uint(number) => Some((*number).into()),
            _ => None,
        }
    }

    /// Appends what a guest gets: see [`crate::property`]. A list is a map of its items to nothing.
    pub(super) fn encode(&self, steps: &Steps, out: &mut Vec<u8>) -> Result<Status, Failed> {
        steps.take(1)?;
        let before = out.len();
        let status = match self {
            Value::Text(bytes) | Value::Bytes(bytes) => {
                out.extend_from_slice(bytes);
                Status::Ok
            }
            Value::Bool(truth) => property::Value::Bool(*truth).encode(out),
            Value::Int(number) => property::Value::Int(*number).encode(out),
            Value::Uint(number) => property::Value::Uint(*number).encode(out),
            Value::Double(number) => property::Value::Uint(number.to_bits()).encode(out),
            Value::Timestamp(nanos) | Value::Duration(nanos) => {
                let nanos = (*nanos).clamp(i64::MIN.into(), i64::MAX.into()) as i64;
                property::Value::Int(nanos).encode(out)
            }
            Value::Attributes(attribute) => attribute.encode(out),
            Value::Message(message) => property::Value::Message(*message).encode(out),
            Value::List(items, _) => encode_pairs(items.iter().map(|item| (item, None)), steps, out)?,
            Value::Map(entries, _) => {
                let keys: Vec<Value<'_>> = entries.keys().cloned().map(Value::from).collect();
                encode_pairs(keys.iter().zip(entries.values().map(Some)), steps, out)?
            }
            Value::Null | Value::Type(_) | Value::Opaque => Status::SerializationFailure,
        };
        steps.take_bytes(out.len() - before)?;
        Ok(status)
    }
}

fn encode_pairs<'v, 'a: 'v>(
    entries: impl Iterator<Item = (&'v Value<'a>, Option<&'v Value<'a>>)>,
    steps: &Steps,
    out: &mut Vec<u8>,
) -> Result<Status, Failed> {
    let mut encoded = Vec::new();
    for (key, value) in entries {
        let mut pair = (Vec::new(), Vec::new());
        let mut status = key.encode(steps, &mut pair.0)?;
        if let (Status::Ok, Some(value)) = (status, value) {
            status = value.encode(steps, &mut pair.1)?;
        }
        if status != Status::Ok {
            return Ok(status);
        }
        encoded.push(pair);
    }
    if encoded.is_empty() {
        return Ok(property::Value::Nothing.encode(out));
    }
    pairs::encode(encoded.iter().map(|(key, value)| (key.as_slice(), value.as_slice())), out);
    Ok(Status::Ok)
}

/// How deep lists and maps may be in each other: they are gone through, and dropped, by recursion.
const DEPTH_MAX: u8 = 64;

fn depth_above<'v, 'a: 'v>(values: impl IntoIterator<Item = &'v Value<'a>>) -> Result<u8, Failed> {
    let depths = values.into_iter().map(|value| match value {
        Value::List(_, depth) | Value::Map(_, depth) => *depth,
        _ => 0,
    });
    match depths.max().unwrap_or(0) + 1 {
        depth if depth > DEPTH_MAX => Err(Failed::new("lists and maps are too deep in each other")),
        depth => Ok(depth),
    }
}

/// A number as an integer, if it is one.
pub(super) fn whole(number: f64) -> Option<i64> {
    let is_whole = number.fract() == 0.0 && (-9.2e18..9.2e18).contains(&number);
    is_whole.then_some(number as i64)
}
