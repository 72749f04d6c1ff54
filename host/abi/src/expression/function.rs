//! The functions that expressions can call.

use super::time::{self, Part};
use super::value::Value;
use super::{Failed, Steps};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Size,
    Contains,
    StartsWith,
    EndsWith,
    Matches,
    Int,
    Uint,
    Double,
    String,
    Bytes,
    Bool,
    Dyn,
    Type,
    Duration,
    Timestamp,
    /// `getHours()` and its like, with or without a time zone.
    Part(Part),
}

impl Function {
    /// The function that is called with so many arguments.
    pub(super) fn global(name: &str, arguments: usize) -> Option<Function> {
        let function = match name {
            "int" => Function::Int,
            "uint" => Function::Uint,
            "double" => Function::Double,
            "string" => Function::String,
            "bytes" => Function::Bytes,
            "bool" => Function::Bool,
            "dyn" => Function::Dyn,
            "type" => Function::Type,
            "duration" => Function::Duration,
            "timestamp" => Function::Timestamp,
            // These can also be called as methods.
            name => return Function::of_text(name).filter(|function| arguments == function.arguments()),
        };
        (arguments == 1).then_some(function)
    }

    /// The function that is called of something with so many other arguments.
    pub(super) fn method(name: &str, arguments: usize) -> Option<Function> {
        if let Some(function) = Function::of_text(name) {
            return (arguments + 1 == function.arguments()).then_some(function);
        }
        let part = Part::by_getter(name)?;
        (arguments <= 1).then_some(Function::Part(part))
    }

    fn of_text(name: &str) -> Option<Function> {
        Some(match name {
            "size" => Function::Size,
            "contains" => Function::Contains,
            "startsWith" => Function::StartsWith,
            "endsWith" => Function::EndsWith,
            "matches" => Function::Matches,
            _ => return None,
        })
    }

    fn arguments(self) -> usize {
        if self == Function::Size { 1 } else { 2 }
    }

    /// What it comes to.
    pub(super) fn call<'a>(self, arguments: Vec<Value<'a>>, steps: &Steps) -> Result<Value<'a>, Failed> {
        let mut arguments = arguments.into_iter();
        let first = arguments.next().unwrap_or(Value::Null);
        let second = arguments.next();
        match (self, first, second) {
            (Function::Size, value, _) => value.size(steps).map(|size| Value::Int(size as i64)),
            (Function::Matches, Value::Text(text), Some(Value::Text(pattern))) => {
                steps.pattern(&pattern)?.is_match(&text, steps).map(Value::Bool)
            }
            (_, Value::Text(text), Some(Value::Text(part))) => {
                steps.take_bytes(text.len() + part.len())?;
                Ok(Value::Bool(match self {
                    Function::StartsWith => text.starts_with(&part),
                    Function::EndsWith => text.ends_with(&part),
                    Function::Contains => memchr::memmem::find(&text, &part).is_some(),
                    _ => return Err(no_overload()),
                }))
            }
            (Function::Part(part), Value::Timestamp(at), zone) => {
                let offset = match &zone {
                    None => 0,
                    Some(Value::Text(zone)) => {
                        time::offset(zone).ok_or(Failed::new("there is no such time zone here"))?
                    }
                    Some(_) => return Err(no_overload()),
                };
                part.of_timestamp(at + offset).map(Value::Int).ok_or(Failed::new("the timestamp is out of range"))
            }
            (Function::Part(part), Value::Duration(long), None) => {
                part.of_duration(long).map(Value::Int).ok_or_else(no_overload)
            }
            (function, value, None) => convert(function, value, steps),
            _ => Err(no_overload()),
        }
    }
}

pub(super) fn no_overload() -> Failed {
    Failed::new("an operator or function is not for values of these types")
}

fn convert<'a>(function: Function, value: Value<'a>, steps: &Steps) -> Result<Value<'a>, Failed> {
    let out_of_range = || Failed::new("a number is out of the range of the type that it is converted to");
    let unreadable = || Failed::new("a string cannot be read as the type that it is converted to");
    if let Value::Text(text) | Value::Bytes(text) = &value {
        steps.take_bytes(text.len())?;
    }
    Ok(match (function, value) {
        (Function::Dyn, value) => value,
        (Function::Type, value) => Value::Type(value.type_name().ok_or(Failed::new("the type has no name here"))?),

        (Function::Int, value @ Value::Int(_)) => value,
        (Function::Int, Value::Uint(number)) => Value::Int(i64::try_from(number).map_err(|_| out_of_range())?),
        // Both bounds are powers of two, and the first is not in the range of cel-cpp.
        (Function::Int, Value::Double(number)) if number > -TWO_TO_63 && number < TWO_TO_63 => {
            Value::Int(number as i64)
        }
        (Function::Int, Value::Double(_)) => return Err(out_of_range()),
        (Function::Int, Value::Bool(truth)) => Value::Int(i64::from(truth)),
        (Function::Int, Value::Text(text)) => Value::Int(parsed(&text).ok_or_else(unreadable)?),
        (Function::Int, Value::Timestamp(at)) => Value::Int(at.div_euclid(time::SECOND) as i64),

        (Function::Uint, value @ Value::Uint(_)) => value,
        (Function::Uint, Value::Int(number)) => Value::Uint(u64::try_from(number).map_err(|_| out_of_range())?),
        (Function::Uint, Value::Double(number)) if (0.0..TWO_TO_63 * 2.0).contains(&number) => {
            Value::Uint(number as u64)
        }
        (Function::Uint, Value::Double(_)) => return Err(out_of_range()),
        (Function::Uint, Value::Text(text)) => Value::Uint(parsed(&text).ok_or_else(unreadable)?),

        (Function::Double, value @ Value::Double(_)) => value,
        (Function::Double, Value::Int(number)) => Value::Double(number as f64),
        (Function::Double, Value::Uint(number)) => Value::Double(number as f64),
        (Function::Double, Value::Text(text)) => Value::Double(parsed(&text).ok_or_else(unreadable)?),

        (Function::Bool, value @ Value::Bool(_)) => value,
        (Function::Bool, Value::Text(text)) => Value::Bool(match &*text {
            b"1" | b"t" | b"true" | b"TRUE" | b"True" => true,
            b"0" | b"f" | b"false" | b"FALSE" | b"False" => false,
            _ => return Err(unreadable()),
        }),

        (Function::Bytes, Value::Text(text) | Value::Bytes(text)) => Value::Bytes(text),

        (Function::String, value @ Value::Text(_)) => value,
        (Function::String, Value::Bytes(bytes)) => {
            std::str::from_utf8(&bytes).map_err(|_| Failed::new("the bytes are not UTF-8"))?;
            Value::Text(bytes)
        }
        (Function::String, Value::Int(number)) => Value::text(number.to_string()),
        (Function::String, Value::Uint(number)) => Value::text(number.to_string()),
        (Function::String, Value::Bool(truth)) => Value::text(truth.to_string()),
        (Function::String, Value::Double(number)) => Value::text(double_to_string(number)),
        (Function::String, Value::Duration(long)) => Value::text(time::duration_to_string(long)),
        (Function::String, Value::Timestamp(at)) => {
            Value::text(time::timestamp_to_string(at).ok_or(Failed::new("the timestamp is out of range"))?)
        }

        (Function::Duration, value @ Value::Duration(_)) | (Function::Timestamp, value @ Value::Timestamp(_)) => value,
        (Function::Duration, Value::Text(text)) => Value::Duration(time::duration(&text).ok_or_else(unreadable)?),
        (Function::Timestamp, Value::Text(text)) => Value::Timestamp(time::timestamp(&text).ok_or_else(unreadable)?),
        (Function::Timestamp, Value::Int(seconds)) => Value::Timestamp(i128::from(seconds) * time::SECOND),
        _ => return Err(no_overload()),
    })
}

const TWO_TO_63: f64 = 9_223_372_036_854_775_808.0;

/// A number as text; spaces around it do not matter.
fn parsed<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.trim_ascii().parse().ok()
}

/// The shortest digits that are read back as the same number; from a million on, and below 0.0001, with an exponent.
fn double_to_string(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() {
            "nan"
        } else if number > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into();
    }
    let size = number.abs();
    if size == 0.0 || (1e-4..1e6).contains(&size) {
        return number.to_string();
    }
    let written = format!("{number:e}");
    let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}
