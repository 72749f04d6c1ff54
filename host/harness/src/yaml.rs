//! Reads a YAML document into a type, and turns the first mistake into where, what and how to fix it.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// A mistake in a file that somebody wrote: where it is, what is wrong, and how to put it right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.render())]
pub struct FileError {
    /// The file.
    pub file: PathBuf,
    /// Line and column, from 1, where they are known.
    pub position: Option<(u64, u64)>,
    /// The place inside the document, e.g. `steps[1].request.method`; empty for the document itself.
    pub path: String,
    /// What is wrong.
    pub problem: String,
    /// How to fix it; may be empty.
    pub hint: String,
}

impl FileError {
    /// A mistake at `path` in `file`, without a position.
    pub(crate) fn at(file: &Path, path: impl Into<String>, problem: impl Into<String>) -> FileError {
        FileError {
            file: file.to_owned(),
            position: None,
            path: path.into(),
            problem: problem.into(),
            hint: String::new(),
        }
    }

    /// The same mistake with advice.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> FileError {
        self.hint = hint.into();
        self
    }

    fn render(&self) -> String {
        let mut text = self.file.display().to_string();
        if let Some((line, column)) = self.position {
            text.push_str(&format!(":{line}:{column}"));
        }
        if !self.path.is_empty() {
            text.push_str(&format!(": {}", self.path));
        }
        text.push_str(&format!(": {}", self.problem));
        if !self.hint.is_empty() {
            text.push_str(&format!("\n  hint: {}", self.hint));
        }
        text
    }
}

/// Reads `file` as one YAML document.
pub(crate) fn read<T: DeserializeOwned>(file: &Path) -> Result<T, FileError> {
    parse(file, &read_text(file)?)
}

/// Reads the text of `file`; `file` is named in the error.
pub(crate) fn read_text(file: &Path) -> Result<String, FileError> {
    std::fs::read_to_string(file).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => "paths are relative to the file that names them",
            std::io::ErrorKind::InvalidData => "the file must be UTF-8 text",
            std::io::ErrorKind::IsADirectory => "name one file",
            _ => "",
        };
        FileError::at(file, "", format!("cannot be read: {}", reason(&error))).hint(hint)
    })
}

/// What the operating system says, without its error number.
pub(crate) fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        std::io::ErrorKind::IsADirectory => "it is a directory".into(),
        std::io::ErrorKind::InvalidData => "it is not UTF-8 text".into(),
        _ => error.to_string(),
    }
}

pub(crate) fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, FileError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let mut path = String::new();
    serde_saphyr::with_deserializer_from_str_with_options(text, options, |document| {
        let mut track = serde_path_to_error::Track::new();
        let outcome = T::deserialize(serde_path_to_error::Deserializer::new(document, &mut track));
        if outcome.is_err() {
            path = track.path().to_string();
        }
        outcome
    })
    .map_err(|error| explain(file, &path, &error))
}

fn explain(file: &Path, path: &str, error: &serde_saphyr::Error) -> FileError {
    use serde_saphyr::Error;
    let error = error.without_snippet();
    let position = error.location().map(|at| (at.line(), at.column())).filter(|(line, _)| *line > 0);
    let path = if matches!(path, "." | "?") { "" } else { path.trim_end_matches(".?") };
    let (path, problem, hint) = match error {
        Error::SerdeUnknownField { field, expected, .. } => {
            let parent = parent_of(path, field);
            (parent, format!("unknown key `{field}`"), known(field, expected))
        }
        Error::SerdeMissingField { field, .. } => (path.to_owned(), format!("`{field}` is missing"), String::new()),
        Error::SerdeUnknownVariant { variant, expected, .. } => {
            (path.to_owned(), format!("unknown value `{variant}`"), known(variant, expected))
        }
        Error::SerdeInvalidType { unexpected, expected, .. }
        | Error::SerdeInvalidValue { unexpected, expected, .. } => {
            (path.to_owned(), format!("found {unexpected}, expected {expected}"), String::new())
        }
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            (path.to_owned(), format!("the key `{key}` is written twice"), "keep one of them".to_owned())
        }
        Error::Message { msg, .. } => match msg.split_once("\nhint: ") {
            Some((problem, hint)) => (path.to_owned(), problem.to_owned(), hint.to_owned()),
            None => (path.to_owned(), msg.clone(), String::new()),
        },
        other => {
            let text = other.to_string();
            let text = text.lines().next().unwrap_or_default();
            let problem = text.split(" at line ").next().unwrap_or(text).trim_start_matches("error: ");
            let (problem, hint) = in_our_words(problem);
            (path.to_owned(), problem.to_owned(), hint.to_owned())
        }
    };
    FileError { file: file.to_owned(), position, path, problem, hint }
}

/// What the parser says, and what to do about it, for people who do not know its states.
fn in_our_words(problem: &str) -> (&str, &str) {
    const COLUMNS: &str = "keys of one mapping begin in the same column; text that contains `: ` or ` #`, or begins with one of `[]{}&*!|>'\"%@`, \
                           stands in quotes";
    match problem {
        "invalid u16" | "invalid u32" | "invalid u64" | "invalid usize" => ("a whole number is expected here", ""),
        "expected sequence start" => {
            ("a list is expected here", "write `[a, b]`, or a line beginning with `- ` for each item")
        }
        "expected mapping start" => {
            ("a mapping is expected here", "write `{ key: value }`, or a line `key: value` for each key")
        }
        "unexpected end of input" | "unexpected end of file" => ("there is nothing in it", ""),
        syntax
            if syntax.contains("mapping values are not allowed")
                || syntax.contains("did not find expected")
                || syntax.contains("simple key") =>
        {
            (syntax, COLUMNS)
        }
        syntax if syntax.starts_with("tabs disallowed") => (syntax, "indent with spaces"),
        other => (other, ""),
    }
}

/// An unknown key is reported at the mapping that holds it.
fn parent_of(path: &str, field: &str) -> String {
    path.strip_suffix(field).map_or(path, |parent| parent.trim_end_matches('.')).to_owned()
}

/// The nearest of the names that would have been right, and all of them.
fn known(written: &str, expected: &[&str]) -> String {
    let all = expected.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match nearest(written, expected.iter().copied()) {
        Some(name) => format!("did you mean `{name}`? known here: {all}"),
        None => format!("known here: {all}"),
    }
}

/// The candidate that a slip of the fingers turns into `written`, if there is one.
pub(crate) fn nearest<'a>(written: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (distance(written, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.chars().count() / 4)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance, one row at a time.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, to) in row.iter_mut().skip(1).zip(&b) {
            let above = *cell;
            let best = (diagonal + usize::from(from != *to)).min(above + 1).min(left + 1);
            diagonal = above;
            left = best;
            *cell = best;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only parsed")]
    struct Outer {
        request: Option<Inner>,
        list: Option<Vec<Inner>>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only parsed")]
    struct Inner {
        method: String,
        status: Option<u16>,
    }

    fn check(text: &str, expected: &str) {
        let error = parse::<Outer>(Path::new("a.yaml"), text).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn names_the_unknown_key_and_the_nearest_known_one() {
        check(
            "requst: { method: GET }\n",
            "a.yaml:1:1: unknown key `requst`\n  hint: did you mean `request`? known here: `request`, `list`",
        );
        check(
            "list:\n  - { method: GET, colour: red }\n",
            "a.yaml:2:20: list[0]: unknown key `colour`\n  hint: known here: `method`, `status`",
        );
    }

    #[test]
    fn names_the_missing_key_and_the_wrong_type() {
        check("request: { status: 200 }\n", "a.yaml:1:12: request: `method` is missing");
        check(
            "request: { method: GET, status: many }\n",
            "a.yaml:1:33: request.status: a whole number is expected here",
        );
        check(
            "list: 5\n",
            "a.yaml:1:7: list: a list is expected here\n  hint: write `[a, b]`, or a line beginning with `- ` for each item",
        );
        check(
            "request: [a]\n",
            "a.yaml:1:10: request: a mapping is expected here\n  hint: write `{ key: value }`, or a line `key: value` for each key",
        );
    }

    #[test]
    fn names_the_line_of_broken_yaml() {
        check(
            "request:\n  method: GET\n status: 5\n",
            "a.yaml:3:2: while parsing a block mapping, did not find expected key\n  hint: keys of one mapping begin in the same \
             column; text that contains `: ` or ` #`, or begins with one of `[]{}&*!|>'\"%@`, stands in quotes",
        );
        check(
            "request:\n\tmethod: GET\n",
            "a.yaml:2:2: tabs disallowed within this context (block indentation)\n  hint: indent with spaces",
        );
        let error = parse::<Outer>(Path::new("a.yaml"), "request: { method: 'GET }\n").unwrap_err();
        assert_eq!(error.position.map(|(line, _)| line), Some(1), "{error}");
    }

    #[test]
    fn names_a_key_written_twice() {
        check(
            "request: { method: GET, method: PUT }\n",
            "a.yaml:1:25: request: the key `method` is written twice\n  hint: keep one of them",
        );
    }

    #[test]
    fn nearest_knows_slips_from_other_words() {
        assert_eq!(nearest("requset", ["request", "response"]), Some("request"));
        assert_eq!(nearest("colour", ["request", "response"]), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
