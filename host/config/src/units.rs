//! Sizes and times as a policy file writes them: `64MiB`, `100ms`.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::{Serialize, Serializer};

/// A number of bytes: a whole number with `B`, `KiB`, `MiB` or `GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// `count` KiB.
    #[must_use]
    pub const fn kib(count: u64) -> Self {
        Self(count * 1024)
    }

    /// `count` MiB.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count * 1024 * 1024)
    }

    /// Bytes, for use with memory: saturates where a `usize` is smaller than 64 bits.
    #[must_use]
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match UNITS.iter().find(|(bytes, _)| self.0 >= *bytes && self.0.is_multiple_of(*bytes)) {
            Some((bytes, unit)) => write!(f, "{}{unit}", self.0 / bytes),
            None => write!(f, "{}B", self.0),
        }
    }
}

/// A span of time: a whole number with `ms`, `s`, `m`, `h` or `d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

impl Time {
    /// `count` milliseconds.
    #[must_use]
    pub const fn millis(count: u64) -> Self {
        Self(Duration::from_millis(count))
    }

    /// `count` seconds.
    #[must_use]
    pub const fn secs(count: u64) -> Self {
        Self(Duration::from_secs(count))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u128, &str); 4] = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")];
        let millis = self.0.as_millis();
        match UNITS.iter().find(|(unit, _)| millis >= *unit && millis.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", millis / unit),
            None => write!(f, "{millis}ms"),
        }
    }
}

const SIZE_UNITS: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1)];
const TIME_UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
/// A year: longer than any limit here makes sense, and far from overflow everywhere it is added up.
const TIME_MAX_MS: u64 = 365 * 86_400_000;

fn number_and_unit<'a>(text: &'a str, units: &[(&str, u64)]) -> Option<(u64, u64, &'a str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at_checked(digits)?;
    let scale = units.iter().find(|(name, _)| *name == unit)?.1;
    Some((number.parse().ok()?, scale, unit))
}

fn parse_size(text: &str) -> Result<Size, String> {
    number_and_unit(text, &SIZE_UNITS).and_then(|(number, scale, _)| number.checked_mul(scale)).map(Size).ok_or_else(
        || format!("`{text}` is not a size\nhint: write a whole number with B, KiB, MiB or GiB, e.g. `64MiB`"),
    )
}

fn parse_time(text: &str) -> Result<Time, String> {
    let hint = "hint: write a whole number with ms, s, m, h or d, e.g. `100ms`";
    let (number, scale, _) =
        number_and_unit(text, &TIME_UNITS).ok_or_else(|| format!("`{text}` is not a span of time\n{hint}"))?;
    match number.checked_mul(scale) {
        Some(millis) if millis <= TIME_MAX_MS => Ok(Time::millis(millis)),
        _ => Err(format!("`{text}` is longer than a year\n{hint}")),
    }
}

/// Both units are read alike: from text; a bare number is refused, because it leaves its unit to be guessed.
struct UnitVisitor<T> {
    parse: fn(&str) -> Result<T, String>,
    what: &'static str,
    example: &'static str,
}

impl<T> Visitor<'_> for UnitVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a {} such as `{}`", self.what, self.example)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(UnitVisitor { parse: parse_size, what: "size", example: "64MiB" })
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(UnitVisitor { parse: parse_time, what: "span of time", example: "100ms" })
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for Size {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^[0-9]+(B|KiB|MiB|GiB)$",
            "description": "A number of bytes: a whole number with B, KiB, MiB or GiB, e.g. `64MiB`."
        })
    }
}

impl JsonSchema for Time {
    fn schema_name() -> Cow<'static, str> {
        "Time".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^[0-9]+(ms|s|m|h|d)$",
            "description": "A span of time: a whole number with ms, s, m, h or d, e.g. `100ms`."
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_the_same() {
        for text in ["0B", "1B", "1023B", "1KiB", "64MiB", "3GiB"] {
            assert_eq!(parse_size(text).map(|size| size.to_string()).as_deref(), Ok(text));
        }
        assert_eq!(parse_size("1024KiB"), Ok(Size::mib(1)));
    }

    #[test]
    fn times_are_read_and_written_the_same() {
        for text in ["0ms", "1ms", "999ms", "1s", "90s", "2m", "3h", "365d"] {
            assert_eq!(parse_time(text).map(|time| time.to_string()).as_deref(), Ok(text));
        }
        assert_eq!(parse_time("1500ms"), Ok(Time::millis(1500)));
    }

    #[test]
    fn refuses_what_leaves_the_unit_to_be_guessed_or_overflows() {
        for text in
            ["", "64", "64MB", "64 MiB", "-1B", "1.5GiB", "MiB", "18446744073709551616B", "18446744073709551615KiB"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for text in ["", "1", "1.5s", "-1s", "1 s", "1min", "366d", "18446744073709551615h"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
