//! What guests tell, picked out of the log of a host.
//!
//! A line of a row has `@row@` before it; one of a root context `@row#instance@`, since hosts bring up several VMs from one
//! configuration.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Everything told so far, by row.
#[derive(Default)]
pub struct Transcripts {
    rows: Mutex<BTreeMap<String, Told>>,
    changed: Condvar,
}

/// What one row's guests told.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Lines of streams, in order.
    pub streams: Vec<String>,
    /// How many contexts of streams have come to their end.
    pub ended: usize,
    /// Lines of root contexts, by VM, the VMs in the order in which they began.
    pub roots: Vec<(String, Vec<String>)>,
}

impl Told {
    /// Whether as many streams have ended as have begun.
    pub fn streams_have_ended(&self) -> bool {
        let begun = self.streams.iter().filter(|line| line.contains("context_create(")).count();
        begun > 0 && begun == self.ended
    }

    /// Whether a line contains `text`.
    pub fn contains(&self, text: &str) -> bool {
        let mut all = self.roots.iter().flat_map(|(_, lines)| lines).chain(&self.streams);
        all.any(|line| line.contains(text))
    }

    /// How many pieces of bodies were told of, in both directions.
    pub fn bodies(&self) -> usize {
        self.streams.iter().filter(|line| line.contains("_body(")).count()
    }
}

impl Transcripts {
    /// Takes note of a line of a host's log, if a guest told it; says whether one did.
    pub fn note(&self, line: &str) -> bool {
        // Our host logs in JSON, Envoy in text.
        let message = serde_json::from_str::<Value>(line).ok().and_then(|line| message_of(&line));
        let Some((row, instance, text)) = parse(message.as_deref().unwrap_or(line.trim_end())) else {
            return false;
        };
        let mut rows = self.lock();
        let told = rows.entry(row.to_owned()).or_default();
        match instance {
            None if text == "end" || text.ends_with(" end") => told.ended += 1,
            None => told.streams.push(text.to_owned()),
            Some(instance) => match told.roots.iter_mut().find(|(known, _)| known == instance) {
                Some((_, lines)) => lines.push(text.to_owned()),
                None => told.roots.push((instance.to_owned(), vec![text.to_owned()])),
            },
        }
        self.changed.notify_all();
        true
    }

    /// What was told of a row.
    pub fn told(&self, row: &str) -> Told {
        self.lock().get(row).cloned().unwrap_or_default()
    }

    /// Waits until what was told of a row is as wanted; `false` if that takes longer than `most`.
    pub fn wait(&self, row: &str, most: Duration, wanted: impl Fn(&Told) -> bool) -> bool {
        let deadline = Instant::now() + most;
        let mut rows = self.lock();
        loop {
            if rows.get(row).is_some_and(&wanted) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (rows, _) = self.changed.wait_timeout(rows, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Told>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn message_of(line: &Value) -> Option<String> {
    line["message"].as_str().or(line["fields"]["message"].as_str()).map(str::to_owned)
}

/// Row, instance of the VM if it was a root context, and what was told.
fn parse(line: &str) -> Option<(&str, Option<&str>, &str)> {
    let mut rest = line;
    loop {
        let (_, after) = rest.split_once('@')?;
        let (mark, text) = after.split_once('@')?;
        if !mark.is_empty() && mark.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/_-.#".contains(&byte)) {
            return Some(match mark.split_once('#') {
                Some((row, instance)) => (row, Some(instance), text),
                None => (mark, None, text),
            });
        }
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_guests_told_in_the_logs_of_both_hosts() {
        let transcripts = Transcripts::default();
        assert!(transcripts.note("[2025-01-01][7][warning][wasm] [a.cc:1] wasm log calls: @a/b@context_create(2)\n"));
        assert!(transcripts.note(r#"{"level":"WARN","fields":{"message":"@a/b@  f \"x@y\" -> 0","filter":"calls"}}"#));
        assert!(transcripts.note("wasm log: @a/b#17@configure(0)"));
        assert!(!transcripts.note("[warning] somebody@example.org wrote to nobody@example.org"));
        let told = transcripts.told("a/b");
        assert_eq!(told.streams, ["context_create(2)", "  f \"x@y\" -> 0"]);
        assert_eq!(told.roots, [("17".to_owned(), vec!["configure(0)".to_owned()])]);
        assert!(!told.streams_have_ended());
        transcripts.note("wasm log: @a/b@end");
        assert!(transcripts.wait("a/b", Duration::ZERO, Told::streams_have_ended));
    }
}
