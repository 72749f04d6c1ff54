//! Durations and timestamps of expressions: nanoseconds, wide enough for all years from 1 to 9999.

use time::format_description::well_known::Rfc3339;
use time::{Month, OffsetDateTime};

/// In nanoseconds.
pub(super) const SECOND: i128 = 1_000_000_000;
const MINUTE: i128 = 60 * SECOND;
const HOUR: i128 = 60 * MINUTE;
/// The longest duration, in either direction.
const DURATION_MAX: i128 = 315_576_000_000 * SECOND;

/// A part of a timestamp or of a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    FullYear,
    Month,
    DayOfYear,
    DayOfMonth,
    Date,
    DayOfWeek,
    Hours,
    Minutes,
    Seconds,
    Milliseconds,
}

impl Part {
    pub(super) fn by_getter(name: &str) -> Option<Part> {
        Some(match name {
            "getFullYear" => Part::FullYear,
            "getMonth" => Part::Month,
            "getDayOfYear" => Part::DayOfYear,
            "getDayOfMonth" => Part::DayOfMonth,
            "getDate" => Part::Date,
            "getDayOfWeek" => Part::DayOfWeek,
            "getHours" => Part::Hours,
            "getMinutes" => Part::Minutes,
            "getSeconds" => Part::Seconds,
            "getMilliseconds" => Part::Milliseconds,
            _ => return None,
        })
    }

    /// All but the date count from 0.
    pub(super) fn of_timestamp(self, at: i128) -> Option<i64> {
        let at = OffsetDateTime::from_unix_timestamp_nanos(at).ok()?;
        Some(match self {
            Part::FullYear => at.year().into(),
            Part::Month => i64::from(u8::from(at.month()) - u8::from(Month::January)),
            Part::DayOfYear => i64::from(at.ordinal()) - 1,
            Part::DayOfMonth => i64::from(at.day()) - 1,
            Part::Date => at.day().into(),
            Part::DayOfWeek => at.weekday().number_days_from_sunday().into(),
            Part::Hours => at.hour().into(),
            Part::Minutes => at.minute().into(),
            Part::Seconds => at.second().into(),
            Part::Milliseconds => at.millisecond().into(),
        })
    }

    /// The whole duration in that unit; only milliseconds are what is left beside the seconds.
    pub(super) fn of_duration(self, long: i128) -> Option<i64> {
        let whole = match self {
            Part::Hours => long / HOUR,
            Part::Minutes => long / MINUTE,
            Part::Seconds => long / SECOND,
            Part::Milliseconds => long % SECOND / 1_000_000,
            _ => return None,
        };
        i64::try_from(whole).ok()
    }
}

/// An offset from UTC such as `-02:30`. No database of time zones is at hand.
pub(super) fn offset(zone: &[u8]) -> Option<i128> {
    let zone = std::str::from_utf8(zone).ok()?;
    if matches!(zone, "" | "UTC" | "GMT") {
        return Some(0);
    }
    let (sign, rest) = match zone.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, zone.strip_prefix('+').unwrap_or(zone)),
    };
    let (hours, minutes) = rest.split_once(':')?;
    let number = |digits: &str| match digits.bytes().all(|byte| byte.is_ascii_digit()) && digits.len() <= 2 {
        true => digits.parse::<u8>().ok().map(i128::from),
        false => None,
    };
    Some(sign * (number(hours)? * HOUR + number(minutes)? * MINUTE))
}

/// `1h2m3.5s` and the like.
pub(super) fn duration(text: &[u8]) -> Option<i128> {
    let text = std::str::from_utf8(text).ok()?;
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    let mut long = 0i128;
    loop {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let (whole, after) = rest.split_at(digits(rest));
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => after.split_at(digits(after)),
            None => ("", after),
        };
        let (unit, after) = after.split_at(after.bytes().take_while(u8::is_ascii_alphabetic).take(2).count());
        // `1h30m`: the unit is the longest one that there is.
        let (nanoseconds, unit_len) = match unit {
            "ns" => (1, 2),
            "us" => (1_000, 2),
            "ms" => (1_000_000, 2),
            unit if unit.starts_with('s') => (SECOND, 1),
            unit if unit.starts_with('m') => (MINUTE, 1),
            unit if unit.starts_with('h') => (HOUR, 1),
            _ => return None,
        };
        if whole.len() + fraction.len() == 0 {
            return None;
        }
        let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        long = long.checked_add(whole.checked_mul(nanoseconds)?)?;
        let mut worth = nanoseconds;
        for digit in fraction.bytes() {
            worth /= 10;
            long += i128::from(digit - b'0') * worth;
        }
        if long > DURATION_MAX {
            return None;
        }
        rest = &rest[rest.len() - after.len() - (unit.len() - unit_len)..];
        if rest.is_empty() {
            return Some(sign * long);
        }
    }
}

/// Seconds, with as many groups of three digits behind the point as it takes.
pub(super) fn duration_to_string(long: i128) -> String {
    let sign = if long < 0 { "-" } else { "" };
    let (seconds, nanoseconds) = (long.abs() / SECOND, long.abs() % SECOND);
    match nanoseconds {
        0 => format!("{sign}{seconds}s"),
        n if n % 1_000_000 == 0 => format!("{sign}{seconds}.{:03}s", n / 1_000_000),
        n if n % 1_000 == 0 => format!("{sign}{seconds}.{:06}s", n / 1_000),
        n => format!("{sign}{seconds}.{n:09}s"),
    }
}

/// RFC 3339. Leap seconds are none of it, as the timestamps have none.
pub(super) fn timestamp(text: &[u8]) -> Option<i128> {
    let text = std::str::from_utf8(text).ok()?;
    let has_space = text.get(10..11) == Some(" ");
    let is_leap_second = text.get(17..19) == Some("60");
    let at = OffsetDateTime::parse(text, &Rfc3339).ok().filter(|_| !has_space && !is_leap_second)?;
    Some(at.unix_timestamp_nanos())
}

pub(super) fn timestamp_to_string(at: i128) -> Option<String> {
    OffsetDateTime::from_unix_timestamp_nanos(at).ok()?.format(&Rfc3339).ok()
}
