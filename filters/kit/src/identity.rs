//! Who the client is, as one filter tells the next and the upstream.
//!
//! An authenticating filter writes what it established as properties (`portcullis.identity.sub`), which no client can
//! forge, and, where its configuration asks for it, as fields (`x-portcullis-sub`) for the upstream. Fields of that
//! prefix which a client sends are removed before anything is written.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::decision::FieldEdit;
use crate::host::Host;
use crate::path::push_escaped;
use crate::request::FieldLine;

/// Who the client is. What is not known is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The subject: a user, or a service.
    pub sub: Option<String>,
    /// The OAuth client that acts.
    pub client_id: Option<String>,
    /// Who vouches for the identity.
    pub issuer: Option<String>,
    /// What the credentials allow (RFC 6749, section 3.3).
    pub scopes: Vec<String>,
    /// The groups that the subject belongs to.
    pub groups: Vec<String>,
    /// How the client authenticated: `jwt`, `basic`, `api_key`.
    pub method: &'static str,
    /// The class of authentication (RFC 9470).
    pub acr: Option<String>,
    /// Which credential it was: a token's `jti`, a key's id. Never the credential.
    pub credential_id: Option<String>,
}

/// Set once a filter of ours has written `x-portcullis-*` fields, so that filters after it know whose they are.
const FIELDS_ARE_OURS: &str = "portcullis.identity.fields";

/// Set with every identity; its presence says that an earlier filter has established one.
const METHOD: &str = "portcullis.identity.method";

impl Identity {
    /// Property name, field name, value. Scopes hold no spaces, so spaces part them; groups may, so they are JSON.
    fn entries(&self) -> [(&'static str, &'static str, Option<String>); 8] {
        let text = |list: &[String], text: fn(&[String]) -> String| (!list.is_empty()).then(|| text(list));
        [
            (METHOD, "x-portcullis-method", Some(self.method.to_owned())),
            ("portcullis.identity.sub", "x-portcullis-sub", self.sub.clone()),
            ("portcullis.identity.client_id", "x-portcullis-client-id", self.client_id.clone()),
            ("portcullis.identity.issuer", "x-portcullis-issuer", self.issuer.clone()),
            ("portcullis.identity.scopes", "x-portcullis-scopes", text(&self.scopes, |scopes| scopes.join(" "))),
            (
                "portcullis.identity.groups",
                "x-portcullis-groups",
                text(&self.groups, |groups| Value::from(groups).to_string()),
            ),
            ("portcullis.identity.acr", "x-portcullis-acr", self.acr.clone()),
            ("portcullis.identity.credential_id", "x-portcullis-credential-id", self.credential_id.clone()),
        ]
    }

    /// The properties that tell this identity. What an earlier filter told and this one does not know is blanked, so
    /// that nobody reads a mixture of two identities.
    pub(crate) fn properties(&self, host: &dyn Host, as_fields: bool) -> Vec<(&'static str, Vec<u8>)> {
        let replaces_another = host.property(&[METHOD]).is_some();
        let mark = as_fields.then(|| (FIELDS_ARE_OURS, b"1".to_vec()));
        let entries = self.entries().into_iter().filter_map(|(property, _, value)| match value {
            Some(value) => Some((property, value.into_bytes())),
            None => replaces_another.then(|| (property, Vec::new())),
        });
        entries.chain(mark).collect()
    }

    /// The fields that tell this identity.
    pub(crate) fn field_edits(&self) -> impl Iterator<Item = FieldEdit> {
        self.entries().into_iter().map(|(_, field, value)| match value {
            Some(value) => FieldEdit::Set(field.into(), field_value(&value)),
            None => FieldEdit::Remove(field.into()),
        })
    }
}

/// A text as a field value. Bytes that a field value cannot hold, or that its readers read differently (controls, line
/// breaks, non-ASCII), are percent-encoded, and so is `%` itself and a space at either end.
pub fn field_value(text: &str) -> Vec<u8> {
    let mut value = String::with_capacity(text.len());
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b' ' if at == 0 || at + 1 == text.len() => push_escaped(&mut value, byte),
            b'%' => push_escaped(&mut value, byte),
            b' '..=b'~' => value.push(char::from(byte)),
            _ => push_escaped(&mut value, byte),
        }
    }
    value.into_bytes()
}

/// Removes what a client must not be able to send: `x-portcullis-*`, and the fields that this filter writes itself.
pub(crate) fn strip(lines: &[FieldLine<'_>], written_by_filter: &[String], host: &dyn Host) -> Vec<FieldEdit> {
    let mut edits = Vec::new();
    let mut removed = BTreeSet::new();
    // Asked at most once, and only if there is something to remove.
    let mut fields_are_ours = None;
    for (name, _) in lines {
        let reserved = is_reserved(name);
        if !reserved && !written_by_filter.iter().any(|written| same_variable(name, written.as_bytes())) {
            continue;
        }
        if reserved && *fields_are_ours.get_or_insert_with(|| host.property(&[FIELDS_ARE_OURS]).is_some()) {
            continue;
        }
        // A host gives names that are tokens. One that is not cannot be named in a hostcall; it is nothing we wrote.
        let Ok(name) = std::str::from_utf8(name) else { continue };
        if removed.insert(name) {
            edits.push(FieldEdit::Remove(name.to_owned().into()));
        }
    }
    edits
}

/// Whether only filters of ours may write a field of this name.
pub fn is_reserved(name: &[u8]) -> bool {
    const PREFIX: &[u8] = b"x-portcullis-";
    name.split_at_checked(PREFIX.len()).is_some_and(|(start, _)| same_variable(start, PREFIX))
}

/// Whether two names reach an application as the same variable: CGI and its heirs map `-` and `_` to `_` and ignore
/// case, so `X_Portcullis_Sub` is `x-portcullis-sub` to them.
fn same_variable(a: &[u8], b: &[u8]) -> bool {
    let variable = |byte: &u8| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    a.len() == b.len() && a.iter().map(variable).eq(b.iter().map(variable))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHost;

    fn alice() -> Identity {
        Identity {
            sub: Some("alice".to_owned()),
            scopes: vec!["a".to_owned(), "b".to_owned()],
            groups: vec!["x y".to_owned(), "\u{e9}".to_owned()],
            method: "jwt",
            ..Identity::default()
        }
    }

    #[test]
    fn an_identity_is_told_as_properties() {
        let expected: [(&str, &[u8]); 4] = [
            ("portcullis.identity.method", b"jwt"),
            ("portcullis.identity.sub", b"alice"),
            ("portcullis.identity.scopes", b"a b"),
            ("portcullis.identity.groups", "[\"x y\",\"\u{e9}\"]".as_bytes()),
        ];
        let properties = alice().properties(&TestHost::default(), false);
        assert_eq!(properties.iter().map(|(name, value)| (*name, value.as_slice())).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn nobody_reads_a_mixture_of_two_identities() {
        let host = TestHost::default().with_property(&["portcullis.identity.method"], b"basic");
        let properties = alice().properties(&host, false);
        assert_eq!(properties.len(), 8);
        assert!(properties.contains(&("portcullis.identity.acr", Vec::new())));
    }

    #[test]
    fn an_identity_is_told_as_fields_and_marked_as_ours() {
        let edits: Vec<FieldEdit> = alice().field_edits().collect();
        assert_eq!(edits.len(), 8);
        assert!(edits.contains(&FieldEdit::Set("x-portcullis-sub".into(), b"alice".to_vec())));
        assert!(edits.contains(&FieldEdit::Set("x-portcullis-groups".into(), b"[\"x y\",\"%C3%A9\"]".to_vec())));
        assert!(edits.contains(&FieldEdit::Remove("x-portcullis-acr".into())));
        let properties = alice().properties(&TestHost::default(), true);
        assert_eq!(properties.last(), Some(&("portcullis.identity.fields", b"1".to_vec())));
    }

    #[test]
    fn a_field_value_holds_no_line_break_and_can_be_read_back() {
        for (text, value) in [
            ("alice", "alice"),
            ("a b", "a b"),
            (" a ", "%20a%20"),
            (" ", "%20"),
            ("100%", "100%25"),
            ("a\r\nx-admin: 1", "a%0D%0Ax-admin: 1"),
            ("J\u{f6}rg\0\u{7f}", "J%C3%B6rg%00%7F"),
        ] {
            assert_eq!(field_value(text), value.as_bytes(), "{text:?}");
        }
    }

    #[test]
    fn fields_that_only_filters_may_write_are_removed() {
        let lines: [FieldLine<'_>; 8] = [
            (b"x-portcullis-sub", b"mallory"),
            (b"X-Portcullis-Sub", b"mallory"),
            (b"x_portcullis_sub", b"mallory"),
            (b"x-portcullis-anything", b""),
            (b"x-portcullis-sub", b"again"),
            (b"x-portculli", b"stays"),
            (b"x_email", b"mallory@example.com"),
            (b"accept", b"stays"),
        ];
        let written = ["x-email".to_owned()];
        let remove = |name: &'static str| FieldEdit::Remove(name.into());
        assert_eq!(
            strip(&lines, &written, &TestHost::default()),
            [
                remove("x-portcullis-sub"),
                remove("X-Portcullis-Sub"),
                remove("x_portcullis_sub"),
                remove("x-portcullis-anything"),
                remove("x_email"),
            ]
        );
    }

    #[test]
    fn fields_of_an_earlier_filter_stay() {
        let lines: [FieldLine<'_>; 2] = [(b"x-portcullis-sub", b"alice"), (b"x-email", b"mallory@example.com")];
        let host = TestHost::default().with_property(&["portcullis.identity.fields"], b"1");
        assert_eq!(strip(&lines, &["x-email".to_owned()], &host), [FieldEdit::Remove("x-email".into())]);
    }
}
