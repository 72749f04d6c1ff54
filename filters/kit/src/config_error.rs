//! Mistakes in a configuration: where, what, and how to put it right; all of them at once.

use std::fmt;

use serde::de::DeserializeOwned;
use serde_json::Value;

/// A place in a JSON document, written as a reader would: `providers.main.jwks_inline.keys[0]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JsonPath(String);

impl JsonPath {
    /// The member of this name in the object at this place.
    #[must_use]
    pub fn key(&self, name: &str) -> Self {
        let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        Self(match (plain, self.0.is_empty()) {
            (true, true) => name.to_owned(),
            (true, false) => format!("{}.{name}", self.0),
            (false, _) => format!("{}[{}]", self.0, Value::from(name)),
        })
    }

    /// The item of this number in the array at this place.
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    fn join(&self, inner: &serde_path_to_error::Path) -> Self {
        use serde_path_to_error::Segment;
        inner.iter().fold(self.clone(), |path, segment| match segment {
            Segment::Seq { index } => path.index(*index),
            Segment::Map { key } => path.key(key),
            Segment::Enum { variant } => path.key(variant),
            Segment::Unknown => path,
        })
    }
}

impl fmt::Display for JsonPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug)]
struct ConfigError {
    path: JsonPath,
    problem: String,
    hint: Option<String>,
}

/// The mistakes found in one configuration. Shown, each is a line and, where we know a remedy, a hint below it:
/// ```text
/// jwt-auth: providers.main.algorithms[0]: `HS256` needs a shared secret, but no key of this provider is one
///   hint: list public-key algorithms, such as `ES256`, or add a key with `"kty": "oct"`
/// ```
#[derive(Debug)]
pub struct ConfigErrors {
    filter: &'static str,
    errors: Vec<ConfigError>,
}

impl ConfigErrors {
    /// No mistakes yet, in a configuration for `filter`.
    pub fn new(filter: &'static str) -> Self {
        Self { filter, errors: Vec::new() }
    }

    /// Notes a mistake that needs no hint because the problem says it all.
    pub fn push(&mut self, path: &JsonPath, problem: impl Into<String>) {
        self.errors.push(ConfigError { path: path.clone(), problem: problem.into(), hint: None });
    }

    /// Notes a mistake and how to put it right.
    pub fn push_with_hint(&mut self, path: &JsonPath, problem: impl Into<String>, hint: impl Into<String>) {
        let (problem, hint) = (problem.into(), Some(hint.into()));
        self.errors.push(ConfigError { path: path.clone(), problem, hint });
    }

    /// Whether there is nothing to complain about.
    pub fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// How many mistakes there are; compare before and after a step to learn whether it found any.
    pub fn len(&self) -> usize {
        self.errors.len()
    }

    /// Reads a `T` from `value`, which stands at `path`; a failure is noted here. `beside` are names that are known in
    /// the object at `path` but are not for `T` to read: a misspelling of one of them gets a hint too.
    pub(crate) fn deserialize<T: DeserializeOwned>(
        &mut self,
        value: Value,
        path: &JsonPath,
        beside: &[&str],
    ) -> Option<T> {
        match serde_path_to_error::deserialize(value) {
            Ok(read) => Some(read),
            Err(error) => {
                let at = path.join(error.path());
                let beside = if error.path().iter().count() == 1 { beside } else { &[] };
                let (problem, hint) = explain(&error.inner().to_string(), beside);
                self.errors.push(ConfigError { path: at, problem, hint });
                None
            }
        }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, ConfigError { path, problem, hint }) in self.errors.iter().enumerate() {
            let newline = if position == 0 { "" } else { "\n" };
            let colon = if *path == JsonPath::default() { "" } else { ": " };
            let path = one_line(&path.to_string());
            write!(f, "{newline}{}: {path}{colon}{}", self.filter, one_line(problem))?;
            if let Some(hint) = hint {
                write!(f, "\n  hint: {}", one_line(hint))?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A text without control characters: what it quotes must not look like a line of its own.
fn one_line(text: &str) -> String {
    let plain = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(plain).collect()
}

/// Puts serde's message in our words. Serde quotes the value it found, and a value may be a secret: only its kind stays.
fn explain(message: &str, beside: &[&str]) -> (String, Option<String>) {
    for (prefix, what, beside) in
        [("unknown field `", "unknown key", beside), ("unknown variant `", "unknown value", &[])]
    {
        let Some(rest) = message.strip_prefix(prefix) else {
            continue;
        };
        let (name, list) = rest.split_once("`, ").unwrap_or((rest, ""));
        let (name, list) = rest.split_once("`, expected ").unwrap_or((name, list));
        let known: Vec<&str> = list.split('`').skip(1).step_by(2).chain(beside.iter().copied()).collect();
        return (format!("{what} `{name}`"), suggest(name, &known));
    }
    for prefix in ["invalid type: ", "invalid value: "] {
        if let Some((found, expected)) = message.strip_prefix(prefix).and_then(|rest| rest.rsplit_once(", expected ")) {
            let kind = found.split(['`', '"']).next().unwrap_or_default().trim();
            return (format!("expected {expected}, found {kind}"), None);
        }
    }
    if let Some(name) = message.strip_prefix("missing field ") {
        return (format!("{name} is missing"), None);
    }
    (message.to_owned(), None)
}

/// "did you mean", if something known is spelt alike or is a longer or shorter form; else the whole choice.
pub(crate) fn suggest(name: &str, known: &[&str]) -> Option<String> {
    let nearest = known
        .iter()
        .map(|candidate| match !name.is_empty() && (candidate.starts_with(name) || name.starts_with(candidate)) {
            true => (0, candidate),
            false => (strsim::damerau_levenshtein(name, candidate), candidate),
        })
        .min()
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 4);
    match nearest {
        Some((_, candidate)) => Some(format!("did you mean `{candidate}`?")),
        None if known.is_empty() => None,
        None => Some(format!("known here: {}", known.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;
    use crate::secret::Secret;

    #[expect(dead_code, reason = "read for its errors only")]
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        issuers: BTreeMap<String, Issuer>,
        mode: Option<Mode>,
    }

    #[expect(dead_code, reason = "read for its errors only")]
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Issuer {
        audiences: Vec<String>,
        secret: Option<Secret>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Mode {
        Enforce,
        Shadow,
    }

    #[track_caller]
    fn check(config: Value, expected: &str) {
        let mut errors = ConfigErrors::new("demo");
        let read: Option<Config> = errors.deserialize(config, &JsonPath::default(), &["rules"]);
        assert!(read.is_none());
        assert_eq!(errors.to_string(), expected);
    }

    #[test]
    fn errors_of_serde_are_told_in_our_words() {
        check(json!({"isuers": {}}), "demo: isuers: unknown key `isuers`\n  hint: did you mean `issuers`?");
        check(json!({"rule": {}}), "demo: rule: unknown key `rule`\n  hint: did you mean `rules`?");
        check(json!({"zebra": 1}), "demo: zebra: unknown key `zebra`\n  hint: known here: `issuers`, `mode`, `rules`");
        check(
            json!({"a`, b": 1}),
            "demo: [\"a`, b\"]: unknown key `a`, b`\n  hint: known here: `issuers`, `mode`, `rules`",
        );
        check(
            json!({"\n\u{85}": 1}),
            "demo: [\"\\n\\u{85}\"]: unknown key `\\n\\u{85}`\n  hint: known here: `issuers`, `mode`, `rules`",
        );
        check(
            json!({"issuers": {"a b": {"audience": "x"}}}),
            "demo: issuers[\"a b\"].audience: unknown key `audience`\n  hint: did you mean `audiences`?",
        );
        check(json!({"issuers": {"main": {}}}), "demo: issuers.main: `audiences` is missing");
        check(
            json!({"issuers": {"main": {"audiences": ["a", 7]}}}),
            "demo: issuers.main.audiences[1]: expected a string, found integer",
        );
        check(
            json!({"issuers": {}, "mode": "shado"}),
            "demo: mode: unknown value `shado`\n  hint: did you mean `shadow`?",
        );
        check(json!("text"), "demo: expected struct Config, found string");
    }

    #[test]
    fn no_error_quotes_a_value() {
        check(
            json!({"issuers": {"main": {"audiences": "hunter2, expected"}}}),
            "demo: issuers.main.audiences: expected a sequence, found string",
        );
        check(
            json!({"issuers": {"main": {"audiences": [], "secret": ["hunter2"]}}}),
            "demo: issuers.main.secret: expected a string",
        );
    }

    #[test]
    fn several_errors_stand_one_below_the_other() {
        let mut errors = ConfigErrors::new("demo");
        let path = JsonPath::default().key("issuers").index(0).key("audiences");
        errors.push(&path, "no audience is named");
        errors.push_with_hint(&path.index(3), "`a` stands here twice", "remove one");
        assert_eq!(
            errors.to_string(),
            "demo: issuers[0].audiences: no audience is named\n\
             demo: issuers[0].audiences[3]: `a` stands here twice\n  hint: remove one"
        );
    }
}
