//! YAML text as a tree in which every key and value knows its line and column.
//!
//! The tree exists so that a mistake found long after parsing (a route that names no upstream) can still point
//! at the text that caused it. Parsing is bounded: the text, the number of nodes, their depth and what aliases
//! expand to all have limits, so a file cannot be small on disk and huge in memory. Duplicate keys, merge keys
//! (`<<`), application tags and several documents in one file are refused.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::{DuplicateKeyPolicy, Error as YamlError, Location, MergeKeyPolicy, NonFiniteFloatPolicy, Spanned};

use crate::mistake::Position;

/// A policy of 1 MiB describes thousands of routes; larger input is a mistake or an attack.
pub(crate) const TEXT_BYTES_MAX: usize = 1024 * 1024;
/// Deep enough for a JSON Schema inside a filter's configuration, shallow enough for any stack.
const DEPTH_MAX: usize = 64;
const STACK_BYTES: usize = 16 * 1024 * 1024;
const NODES_MAX: usize = 100_000;
const ALIAS_EVENTS_MAX: usize = 50_000;

/// One value and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) at: Position,
}

/// What a node holds. Numbers and booleans are recognised as YAML 1.2's core schema says, with two exceptions
/// that keep what was written: `0755` and `1_000` are text.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Nothing,
    Bool(bool),
    Unsigned(u64),
    Negative(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Mapping(Vec<Entry>),
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) key_at: Position,
    pub(crate) node: Node,
}

/// Text that is not YAML, or more YAML than we take.
#[derive(Debug)]
pub(crate) struct NotYaml {
    pub(crate) at: Position,
    pub(crate) problem: String,
    pub(crate) hint: Option<&'static str>,
}

/// Parses one document.
pub(crate) fn parse(text: &str) -> Result<Node, NotYaml> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(NotYaml {
            at: Position::START,
            problem: format!("the file has {} bytes, more than the {TEXT_BYTES_MAX} that are read", text.len()),
            hint: Some("move filters' configurations into files of their own and name them with `configuration_file`"),
        });
    }
    let options = || {
        serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_depth: DEPTH_MAX,
                max_nodes: NODES_MAX,
                max_events: 4 * NODES_MAX,
                max_aliases: 1_000,
                max_anchors: 1_000,
                max_documents: 1,
                flow_nesting_limit: DEPTH_MAX,
            },
            alias_limits: serde_saphyr::alias_limits! {
                max_total_replayed_events: ALIAS_EVENTS_MAX,
                max_replay_stack_depth: 16,
            },
            duplicate_keys: DuplicateKeyPolicy::Error,
            merge_keys: MergeKeyPolicy::Error,
            non_finite_float_policy: NonFiniteFloatPolicy::Reject,
            strict_booleans: true,
            leading_zero_numbers_as_strings: true,
            underscored_numbers_as_strings: true,
            reject_unsupported_tags: true,
            with_snippet: false,
        }
    };
    let parse = || serde_saphyr::from_str_with_options::<Node>(text, options()).map_err(|error| not_yaml(&error));
    // The parser recurses, with some 50 KiB per level in unoptimised builds: more than a thread's usual 2 MiB. It
    // gets a stack of its own, so that no caller has to think of it. (`options` are built there: they are not `Send`.)
    std::thread::scope(|scope| match std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, parse) {
        Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        Err(error) => Err(NotYaml {
            at: Position::START,
            problem: format!("cannot start a thread to read the file: {error}"),
            hint: Some("free some memory, or raise the limit on processes"),
        }),
    })
}

fn not_yaml(error: &YamlError) -> NotYaml {
    let at = error.location().map_or(Position::START, |location| position(&location));
    let (problem, hint) = match error {
        YamlError::DuplicateMappingKey { key: Some(key), .. } => {
            (format!("the key `{key}` is given twice"), Some("keep one of the two"))
        }
        YamlError::DuplicateMappingKey { key: None, .. } => {
            ("a key is given twice".to_owned(), Some("keep one of the two"))
        }
        YamlError::MergeKeyNotAllowed { .. } => (
            "merge keys (`<<`) are not supported".to_owned(),
            Some("write the keys out, or use an alias (`*name`) for the whole value"),
        ),
        YamlError::Budget { breach: BudgetBreach::Documents { .. }, .. } | YamlError::MultipleDocuments { .. } => {
            ("the file holds more than one document".to_owned(), Some("remove the line `---` between them"))
        }
        YamlError::Budget { .. } => (
            format!("the file is too large or too deep: {}", first_line(error)),
            Some("move filters' configurations into files of their own and name them with `configuration_file`"),
        ),
        _ => {
            let message = first_line(error);
            if message.starts_with("alias replay") || message.starts_with("alias expansion") {
                // The variant is wrapped when the limit is hit inside an alias.
                return NotYaml {
                    at,
                    problem: format!("the aliases expand too far: {message}"),
                    hint: Some("use fewer aliases"),
                };
            }
            if message.contains("unknown anchor") {
                return NotYaml {
                    at,
                    problem: "this alias (`*name`) has no anchor (`&name`)".to_owned(),
                    hint: Some("put text that begins with `*` in quotes"),
                };
            }
            if message.contains("recursion limit") {
                return NotYaml {
                    at,
                    problem: format!("lists and mappings are nested deeper than {DEPTH_MAX} levels"),
                    hint: Some("move filters' configurations into files of their own"),
                };
            }
            let hint = if message.contains("tab") {
                "indent with spaces; YAML does not allow tabs there"
            } else if message.contains("tag") {
                "remove the tag"
            } else {
                "look at indentation, colons and quotes here and on the line above"
            };
            let hint = Some(hint);
            (format!("this is not valid YAML: {message}"), hint)
        }
    };
    NotYaml { at, problem, hint }
}

/// The parser's message without its own line and column, which we print our way.
fn first_line(error: &YamlError) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    let line = line.split(" at line ").next().unwrap_or(line);
    line.trim_end_matches('.').to_owned()
}

fn position(location: &Location) -> Position {
    Position {
        line: usize::try_from(location.line()).unwrap_or(0).max(1),
        column: usize::try_from(location.column()).unwrap_or(0).max(1),
        width: usize::try_from(location.span().len()).unwrap_or(1).max(1),
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { value: spanned.value, at: position(&spanned.referenced) })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Nothing)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Nothing)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(u64::try_from(value).map_or(Value::Negative(value), Value::Unsigned))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = access.next_element()? {
            nodes.push(node);
        }
        Ok(Value::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let node = access.next_value()?;
            entries.push(Entry { key: key.value, key_at: position(&key.referenced), node });
        }
        Ok(Value::Mapping(entries))
    }
}

impl Node {
    /// Where the value at `path` stands, or the nearest thing above it that exists: a missing key is reported
    /// at the mapping that lacks it.
    pub(crate) fn locate(&self, path: &str) -> Position {
        self.locate_both(path).1
    }

    /// Where the last key of `path` stands.
    pub(crate) fn locate_key(&self, path: &str) -> Position {
        self.locate_both(path).0
    }

    fn locate_both(&self, path: &str) -> (Position, Position) {
        let mut here = self;
        let mut at = (self.at, self.at);
        for step in steps(path) {
            let Some((node, position)) = here.below(&step) else { break };
            here = node;
            at = position;
        }
        at
    }

    /// Whether there is a value at `path`.
    pub(crate) fn holds(&self, path: &str) -> bool {
        steps(path).try_fold(self, |here, step| here.below(&step).map(|(node, _)| node)).is_some()
    }

    /// The value one step further, with the places of its key and of itself.
    fn below(&self, step: &Step<'_>) -> Option<(&Node, (Position, Position))> {
        match (&self.value, step) {
            (Value::Mapping(entries), Step::Key(key)) => {
                entries.iter().find(|entry| entry.key == *key).map(|entry| {
                    // A block mapping or list starts on a later line; its key is what a reader looks for.
                    let at = if entry.node.at.line == entry.key_at.line { entry.node.at } else { entry.key_at };
                    (&entry.node, (entry.key_at, at))
                })
            }
            (Value::List(nodes), Step::Index(index)) => nodes.get(*index).map(|node| (node, (node.at, node.at))),
            _ => None,
        }
    }
}

enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

/// Splits `routes[2].match.path` at its dots and brackets.
fn steps(path: &str) -> impl Iterator<Item = Step<'_>> {
    path.split(['.', '[']).filter(|part| !part.is_empty()).map(|part| {
        match part.strip_suffix(']').and_then(|index| index.parse().ok()) {
            Some(index) => Step::Index(index),
            None => Step::Key(part),
        }
    })
}
