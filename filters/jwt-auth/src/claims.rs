//! What a token claims: types, times, audience, scopes (RFC 7519, section 4.1; RFC 9068).

use std::time::Duration;

use portcullis_kit::time::UnixTime;
use serde_json::{Map, Value};

use crate::verify::Unverified;

/// The points in time that a token names, in seconds. Checked again whenever the token is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    expires: Option<u64>,
    not_before: Option<u64>,
    issued: Option<u64>,
}

/// Beyond this (the year 285 million) a JSON number is no longer exact.
const NUMERIC_DATE_MAX: u64 = 1 << 53;

impl Times {
    /// Reads `exp`, `nbf` and `iat`. A claim that is there and is not a date is refused, not ignored.
    pub fn read(claims: &Map<String, Value>) -> Result<Self, Unverified> {
        // A fraction of a second is given up so that the token lives no longer: `exp` rounds down, the others up.
        Ok(Self {
            expires: numeric_date(claims, "exp", f64::floor)?,
            not_before: numeric_date(claims, "nbf", f64::ceil)?,
            issued: numeric_date(claims, "iat", f64::ceil)?,
        })
    }

    /// Whether the token expires at all.
    pub fn expires(&self) -> bool {
        self.expires.is_some()
    }

    /// Whether the token is valid now, give or take `skew`.
    pub fn check(&self, now: UnixTime, skew: Duration) -> Result<(), Unverified> {
        let (now, skew) = (now.seconds(), skew.as_secs());
        // RFC 7519, section 4.1.4: not to be accepted on or after `exp`.
        if self.expires.is_some_and(|expires| now >= expires.saturating_add(skew)) {
            return Err(Unverified::Expired);
        }
        if self.not_before.is_some_and(|not_before| now.saturating_add(skew) < not_before) {
            return Err(Unverified::NotYetValid);
        }
        if self.issued.is_some_and(|issued| now.saturating_add(skew) < issued) {
            return Err(Unverified::IssuedInTheFuture);
        }
        Ok(())
    }

    /// Whether the token was made to live no longer than this.
    pub fn check_lifetime(&self, lifetime_max: Duration) -> Result<(), Unverified> {
        match (self.issued, self.expires) {
            (Some(issued), Some(expires)) if expires.saturating_sub(issued) <= lifetime_max.as_secs() => Ok(()),
            _ => Err(Unverified::LivesTooLong),
        }
    }
}

fn numeric_date(claims: &Map<String, Value>, name: &str, round: fn(f64) -> f64) -> Result<Option<u64>, Unverified> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let Value::Number(number) = value else { return Err(Unverified::NotADate) };
    let seconds = match (number.as_u64(), number.as_f64()) {
        (Some(seconds), _) => seconds,
        // Not negative, not infinite, and not so large that the cast below would change it.
        (None, Some(seconds)) if (0.0..1e15).contains(&seconds) => {
            #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "the range is checked above")]
            let seconds = round(seconds) as u64;
            seconds
        }
        _ => return Err(Unverified::NotADate),
    };
    if seconds <= NUMERIC_DATE_MAX { Ok(Some(seconds)) } else { Err(Unverified::NotADate) }
}

/// A claim that is a string, if it is there. One that is there and is no string is refused.
pub fn string<'a>(claims: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, Unverified> {
    match claims.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Unverified::NotAString),
    }
}

/// The strings of a claim that is an array of strings; of anything else, none.
pub fn strings(claims: &Map<String, Value>, name: &str) -> Vec<String> {
    match claims.get(name) {
        Some(Value::Array(items)) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<_>>(),
        _ => None,
    }
    .unwrap_or_default()
}

/// Whether one of `audiences` is among those that the token is for (RFC 7519, section 4.1.3).
pub fn is_for_one_of(claims: &Map<String, Value>, audiences: &[String]) -> bool {
    match claims.get("aud") {
        Some(Value::String(audience)) => audiences.contains(audience),
        Some(Value::Array(items)) => {
            // An audience that is no string makes the whole claim one that we do not understand.
            items.iter().all(Value::is_string)
                && items.iter().filter_map(Value::as_str).any(|a| audiences.iter().any(|b| a == b))
        }
        _ => false,
    }
}

/// The scopes of a token: `scope` as text with spaces (RFC 9068, section 2.2.3), or `scp` as text or array, as some
/// issuers write it. Other types carry no scopes.
pub fn scopes(claims: &Map<String, Value>) -> Vec<String> {
    match (claims.get("scope"), claims.get("scp")) {
        (Some(Value::String(text)), _) | (None, Some(Value::String(text))) => {
            text.split(' ').filter(|scope| !scope.is_empty()).map(str::to_owned).collect()
        }
        (None, Some(Value::Array(_))) => {
            strings(claims, "scp").into_iter().filter(|scope| !scope.contains(' ')).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: u64 = 1_700_000_000;

    fn object(value: Value) -> Map<String, Value> {
        let Value::Object(object) = value else { panic!("an object") };
        object
    }

    #[track_caller]
    fn check(claims: Value, expected: Result<(), Unverified>) {
        let result = Times::read(&object(claims))
            .and_then(|times| times.check(UnixTime::from_seconds(NOW), Duration::from_secs(60)));
        assert_eq!(result, expected);
    }

    #[test]
    fn times_hold_on_both_sides_of_each_boundary() {
        check(json!({}), Ok(()));
        check(json!({"exp": NOW + 1}), Ok(()));
        check(json!({"exp": NOW - 59}), Ok(()));
        check(json!({"exp": NOW - 60}), Err(Unverified::Expired));
        check(json!({"exp": 1_699_999_940.9}), Err(Unverified::Expired));
        check(json!({"exp": 0}), Err(Unverified::Expired));
        check(json!({"nbf": NOW + 60}), Ok(()));
        check(json!({"nbf": NOW + 61}), Err(Unverified::NotYetValid));
        check(json!({"nbf": 1_700_000_060.1}), Err(Unverified::NotYetValid));
        check(json!({"iat": NOW + 60}), Ok(()));
        check(json!({"iat": NOW + 61}), Err(Unverified::IssuedInTheFuture));
    }

    #[test]
    fn a_date_is_a_number_that_is_neither_negative_nor_huge() {
        for name in ["exp", "nbf", "iat"] {
            for value in [
                json!("1700000001"),
                json!(null),
                json!(true),
                json!([1]),
                json!(-1),
                json!(-0.5),
                json!(1e300),
                json!(u64::MAX),
                json!((1u64 << 53) + 1),
            ] {
                check(json!({name: value}), Err(Unverified::NotADate));
            }
        }
        check(json!({"exp": 1u64 << 53}), Ok(()));
        check(json!({"exp": 1.7e12}), Ok(()));
    }

    #[test]
    fn a_lifetime_is_counted_from_issue_to_expiry() {
        let lifetime = |claims: Value| {
            Times::read(&object(claims)).and_then(|times| times.check_lifetime(Duration::from_secs(300)))
        };
        assert_eq!(lifetime(json!({"iat": NOW, "exp": NOW + 300})), Ok(()));
        assert_eq!(lifetime(json!({"iat": NOW, "exp": NOW + 301})), Err(Unverified::LivesTooLong));
        assert_eq!(lifetime(json!({"exp": NOW + 1})), Err(Unverified::LivesTooLong));
        assert_eq!(lifetime(json!({"iat": NOW})), Err(Unverified::LivesTooLong));
    }

    #[test]
    fn an_audience_is_one_string_or_several() {
        let audiences = ["orders".to_owned(), "billing".to_owned()];
        for (aud, expected) in [
            (json!("orders"), true),
            (json!(["x", "billing"]), true),
            (json!("Orders"), false),
            (json!("orders "), false),
            (json!(["x"]), false),
            (json!([]), false),
            (json!(["orders", 1]), false),
            (json!({"orders": 1}), false),
            (json!(null), false),
        ] {
            assert_eq!(is_for_one_of(&object(json!({"aud": aud})), &audiences), expected, "{aud}");
        }
        assert!(!is_for_one_of(&Map::new(), &audiences));
    }

    #[test]
    fn scopes_are_text_with_spaces_or_an_array() {
        for (claims, expected) in [
            (json!({"scope": "a b  c"}), vec!["a", "b", "c"]),
            (json!({"scp": "a b"}), vec!["a", "b"]),
            (json!({"scp": ["a", "b"]}), vec!["a", "b"]),
            (json!({"scp": ["a", "b c"]}), vec!["a"]),
            (json!({"scp": ["a", 1]}), vec![]),
            (json!({"scope": "a", "scp": ["b"]}), vec!["a"]),
            (json!({"scope": ["a"]}), vec![]),
            (json!({"scope": 1, "scp": ["b"]}), vec![]),
            (json!({}), vec![]),
        ] {
            assert_eq!(scopes(&object(claims.clone())), expected, "{claims}");
        }
    }

    #[test]
    fn a_claim_of_the_wrong_type_is_refused() {
        let claims = object(json!({"sub": "alice", "iss": 7}));
        assert_eq!(string(&claims, "sub"), Ok(Some("alice")));
        assert_eq!(string(&claims, "jti"), Ok(None));
        assert_eq!(string(&claims, "iss"), Err(Unverified::NotAString));
    }
}
