//! What a configuration says, and the decision: from a request, to pass or be denied.

use serde::Deserialize;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The request field that is looked at.
    field: String,
    /// Values that pass, compared byte by byte.
    allow: Vec<String>,
}

impl Policy {
    /// Reads a configuration; the error is for whoever wrote it.
    pub fn from_json(text: &[u8]) -> Result<Self, String> {
        let mut policy: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        policy.field.make_ascii_lowercase();
        if policy.field.is_empty() {
            return Err("`field` is empty: name the request field to look at".to_owned());
        }
        if policy.allow.is_empty() {
            return Err("`allow` is empty, so nothing could pass: name one value".to_owned());
        }
        Ok(policy)
    }

    /// Decides about a request with these fields, whose names are in lower case. The error is for the log.
    pub fn check<'a>(&self, fields: impl Iterator<Item = (&'a str, &'a [u8])>) -> Result<(), &'static str> {
        let mut values = fields.filter(|(name, _)| *name == self.field).map(|(_, value)| value);
        // Two values are one too many: the upstream might go by the other one.
        match (values.next(), values.next()) {
            (Some(value), None) if self.allow.iter().any(|allowed| allowed.as_bytes() == value) => Ok(()),
            (Some(_), None) => Err("the value is not allowed"),
            (Some(_), Some(_)) => Err("the field occurs more than once"),
            (None, _) => Err("the field is missing"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(values: &[&str]) -> Result<(), &'static str> {
        let policy = Policy::from_json(br#"{ "field": "X-Client", "allow": ["orders-app"] }"#).expect("good");
        policy.check(values.iter().map(|value| ("x-client", value.as_bytes())))
    }

    #[test]
    fn a_listed_value_passes() {
        assert_eq!(check(&["orders-app"]), Ok(()));
    }

    #[test]
    fn any_other_value_none_and_two_are_denied() {
        assert_eq!(check(&["Orders-App"]), Err("the value is not allowed"));
        assert_eq!(check(&[]), Err("the field is missing"));
        assert_eq!(check(&["orders-app", "orders-app"]), Err("the field occurs more than once"));
    }

    #[test]
    fn a_configuration_with_a_mistake_says_what_it_is() {
        let refused = |text: &str| Policy::from_json(text.as_bytes()).expect_err("a mistake");
        assert_eq!(
            refused(r#"{ "field": "a", "allow": [] }"#),
            "`allow` is empty, so nothing could pass: name one value"
        );
        assert!(refused(r#"{ "field": "a", "alow": ["b"] }"#).contains("unknown field `alow`"));
    }
}
