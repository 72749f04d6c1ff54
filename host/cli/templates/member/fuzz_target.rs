//! What operators write for {{name}}.

use {{crate}}::{{type}};

use super::filters::{compile, configurations};
use crate::Target;

/// Any bytes are a configuration or a list of errors, each of which says where it is and what is wrong.
pub(super) const CONFIGURATION: Target = Target {
    name: "{{name}}-configuration",
    about: "the configuration of {{name}}",
    run: compile::<{{type}}>,
    seeds: || configurations("{{name}}"),
    words: &[
        b"\"", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"-1", b"1e999", b"\"\"", b"[]", b"{}", b"\\u0000",
    ],
};
