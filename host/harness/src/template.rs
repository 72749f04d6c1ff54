//! Text with `${...}` in it: tokens and times that exist only when the scenario runs.
//!
//! `${now}`, `${now+300}` and `${now-300}` are seconds since 1970. `${tokens.NAME}` is a token, and
//! `${tokens.NAME.header}`, `.payload` and `.signature` are its three parts as they stand on the wire. `$${` is a plain
//! `${`.

use std::collections::BTreeMap;

/// Values for the templates of one run.
#[derive(Debug, Default)]
pub(crate) struct Values {
    /// Seconds since 1970.
    pub(crate) now: u64,
    /// Tokens by name.
    pub(crate) tokens: BTreeMap<String, String>,
}

/// What is wrong with a template: the problem and the hint.
pub(crate) type TemplateError = (String, String);

/// Fills in every `${...}`.
pub(crate) fn expand(text: &str, values: &Values) -> Result<String, TemplateError> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        if let Some(before) = before.strip_suffix('$') {
            expanded.push_str(before);
            expanded.push_str("${");
            rest = after;
            continue;
        }
        let Some((name, after)) = after.split_once('}') else {
            return Err(("`${` has no closing `}`".into(), "a plain `${` is written `$${`".into()));
        };
        expanded.push_str(before);
        expanded.push_str(&value(name.trim(), values)?);
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn value(name: &str, values: &Values) -> Result<String, TemplateError> {
    if let Some(time) = moment(name, values.now) {
        return Ok(time.to_string());
    }
    let Some(token) = name.strip_prefix("tokens.") else {
        return Err((
            format!("`${{{name}}}` is not known"),
            "known are `${tokens.NAME}` and `${now+SECONDS}`; a plain `${` is written `$${`".into(),
        ));
    };
    if let Some(text) = values.tokens.get(token) {
        return Ok(text.clone());
    }
    let part = token.rsplit_once('.').and_then(|(token, part)| {
        let mut parts = values.tokens.get(token)?.split('.');
        match part {
            "header" => parts.next(),
            "payload" => parts.nth(1),
            "signature" => parts.nth(2),
            _ => None,
        }
    });
    part.map(str::to_owned).ok_or_else(|| {
        let names: Vec<String> = values.tokens.keys().map(|name| format!("`{name}`")).collect();
        let hint = if names.is_empty() {
            "the scenario has no `tokens`".to_owned()
        } else {
            format!("tokens of this scenario: {}", names.join(", "))
        };
        (format!("there is no token `{token}`"), hint)
    })
}

/// `now`, `now+300` or `now-300` as seconds since 1970; `None` if the text says something else.
pub(crate) fn moment(text: &str, now: u64) -> Option<u64> {
    let offset = text.strip_prefix("now")?;
    if offset.is_empty() {
        return Some(now);
    }
    let (sign, digits) = offset.split_at_checked(1)?;
    let seconds: u64 = digits.trim().parse().ok()?;
    match sign {
        "+" => now.checked_add(seconds),
        "-" => now.checked_sub(seconds),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> Values {
        Values { now: 1000, tokens: [("good".to_owned(), "h.p.s".to_owned())].into() }
    }

    #[test]
    fn fills_in_tokens_parts_and_times() {
        let check = |text: &str, expected: &str| assert_eq!(expand(text, &values()).unwrap(), expected);
        check("Bearer ${tokens.good}", "Bearer h.p.s");
        check("${tokens.good.payload}.${ tokens.good.header }.${tokens.good.signature}", "p.h.s");
        check(r#"{"exp":${now+5},"nbf":${now-5},"iat":${now}}"#, r#"{"exp":1005,"nbf":995,"iat":1000}"#);
        check("a $${now} b $ {c} $", "a ${now} b $ {c} $");
    }

    #[test]
    fn says_what_it_does_not_know() {
        let check = |text: &str, problem: &str, hint: &str| {
            assert_eq!(expand(text, &values()).unwrap_err(), (problem.to_owned(), hint.to_owned()));
        };
        check("${tokens.bad}", "there is no token `bad`", "tokens of this scenario: `good`");
        check("${tokens.good.tail}", "there is no token `good.tail`", "tokens of this scenario: `good`");
        check("${now", "`${` has no closing `}`", "a plain `${` is written `$${`");
        check(
            "${later}",
            "`${later}` is not known",
            "known are `${tokens.NAME}` and `${now+SECONDS}`; a plain `${` is written `$${`",
        );
    }

    #[test]
    fn a_time_before_1970_is_not_a_time() {
        assert_eq!(moment("now-1001", 1000), None);
        assert_eq!(moment("nowhere", 1000), None);
        assert_eq!(moment("now+1", u64::MAX), None);
    }
}
