//! What operators print: always read, never trusted, bounded in rate and length, and tagged with whose it is.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

const LINE_BYTES_MAX: usize = 4096;
const LINES_KEPT: usize = 1000;
/// A burst is this many seconds' worth of lines.
const BURST_SECONDS: u32 = 10;

/// One line that an operator (or its engine) printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When the host read it.
    pub time: SystemTime,
    /// Whose.
    pub operator: String,
    /// Which process of the operator's.
    pub process: u64,
    /// Printable text; positions in the bundle are replaced by those of the source.
    pub text: String,
}

/// Everybody who reads along. Each has a queue of its own: one that does not keep up misses lines and slows nobody.
#[derive(Debug, Default)]
pub(crate) struct Readers(Mutex<Vec<Reader>>);

#[derive(Debug)]
struct Reader {
    /// Only this operator's lines.
    operator: Option<String>,
    sender: mpsc::Sender<LogLine>,
}

/// Lines that wait for one reader.
const QUEUE: usize = 1024;

impl Readers {
    pub(crate) fn follow(&self, operator: Option<&str>) -> mpsc::Receiver<LogLine> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.lock().push(Reader { operator: operator.map(str::to_owned), sender });
        receiver
    }

    fn send(&self, line: &LogLine) {
        self.lock().retain(|reader| {
            let wanted = reader.operator.as_ref().is_none_or(|operator| *operator == line.operator);
            !matches!(wanted.then(|| reader.sender.try_send(line.clone())), Some(Err(TrySendError::Closed(_))))
                && !reader.sender.is_closed()
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Reader>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The lines of one operator.
#[derive(Debug)]
pub(crate) struct LogBook {
    operator: String,
    kept: Mutex<VecDeque<LogLine>>,
    readers: Arc<Readers>,
    dropped: AtomicU64,
}

impl LogBook {
    pub(crate) fn new(operator: &str, readers: Arc<Readers>) -> Self {
        Self { operator: operator.to_owned(), kept: Mutex::default(), readers, dropped: AtomicU64::new(0) }
    }

    pub(crate) fn write(&self, process: u64, text: String) {
        tracing::info!(target: "portcullis::operator", operator = %self.operator, process, "{text}");
        let line = LogLine { time: SystemTime::now(), operator: self.operator.clone(), process, text };
        {
            let mut kept = self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if kept.len() == LINES_KEPT {
                kept.pop_front();
            }
            kept.push_back(line.clone());
        }
        // After it was kept: who begins to read along first and looks at what is kept then misses nothing.
        self.readers.send(&line);
    }

    pub(crate) fn recent(&self) -> Vec<LogLine> {
        self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter().cloned().collect()
    }

    pub(crate) fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// Lets so many lines a second through.
#[derive(Debug)]
pub(crate) struct Rate {
    tokens: f64,
    per_second: f64,
    burst: f64,
    last: Instant,
}

impl Rate {
    pub(crate) fn new(per_second: u32, now: Instant) -> Self {
        let burst = f64::from(per_second.saturating_mul(BURST_SECONDS).max(1));
        Self { tokens: burst, per_second: f64::from(per_second), burst, last: now }
    }

    pub(crate) fn allows(&mut self, now: Instant) -> bool {
        let passed: Duration = now.saturating_duration_since(self.last);
        self.last = now;
        self.tokens = (self.tokens + passed.as_secs_f64() * self.per_second).min(self.burst);
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}

/// Splits a stream of bytes into lines of bounded length.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    buffer: Vec<u8>,
    cut: bool,
}

impl Lines {
    /// Adds bytes and hands out every complete line.
    pub(crate) fn feed(&mut self, bytes: &[u8], mut line: impl FnMut(String)) {
        for byte in bytes {
            if *byte == b'\n' {
                line(self.take());
            } else if self.buffer.len() < LINE_BYTES_MAX {
                self.buffer.push(*byte);
            } else {
                self.cut = true;
            }
        }
    }

    /// The line that has no end yet.
    pub(crate) fn rest(&mut self) -> Option<String> {
        (!self.buffer.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> String {
        let mut text = printable(&String::from_utf8_lossy(&self.buffer));
        if self.cut {
            text.push('…');
        }
        self.buffer.clear();
        self.cut = false;
        text
    }
}

/// Without control characters: a line must not be able to move a terminal's cursor or to look like two lines.
pub(crate) fn printable(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for character in text.chars() {
        if character == '\t' || !character.is_control() {
            result.push(character);
        } else {
            result.extend(character.escape_unicode());
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for chunk in chunks {
            lines.feed(chunk, |line| found.push(line));
        }
        found.extend(lines.rest());
        found
    }

    #[test]
    fn lines_are_whole_whatever_the_chunks() {
        assert_eq!(lines(&[b"on", b"e\ntw", b"o\n", b"three"]), ["one", "two", "three"]);
        assert_eq!(lines(&[b"\xff\n"]), ["\u{fffd}"]);
    }

    #[test]
    fn a_long_line_is_cut_and_says_so() {
        let found = lines(&[&[b'x'; 10_000], b"\nnext\n"]);
        assert_eq!(found[0].chars().count(), LINE_BYTES_MAX + 1);
        assert!(found[0].ends_with('…'));
        assert_eq!(found[1], "next");
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        assert_eq!(lines(&[b"a\x1b[2Jb\rc\n"]), ["a\\u{1b}[2Jb\\u{d}c"]);
    }

    #[test]
    fn the_rate_allows_a_burst_and_then_the_average() {
        let start = Instant::now();
        let mut rate = Rate::new(5, start);
        assert_eq!((0..100).filter(|_| rate.allows(start)).count(), 50);
        assert_eq!((0..100).filter(|_| rate.allows(start + Duration::from_secs(1))).count(), 5);
    }

    #[test]
    fn a_reader_gets_what_it_asked_for_and_a_slow_one_misses_lines() {
        let readers = Arc::new(Readers::default());
        let (a, b) = (LogBook::new("a", Arc::clone(&readers)), LogBook::new("b", Arc::clone(&readers)));
        let (mut of_a, mut of_all) = (readers.follow(Some("a")), readers.follow(None));
        a.write(1, "one".to_owned());
        b.write(2, "two".to_owned());
        assert_eq!(of_a.try_recv().unwrap().text, "one");
        assert!(of_a.try_recv().is_err());
        assert_eq!([of_all.try_recv().unwrap().text, of_all.try_recv().unwrap().text], ["one", "two"]);
        for _ in 0..QUEUE + 5 {
            b.write(2, String::new());
        }
        let mut seen = 0;
        while of_all.try_recv().is_ok() {
            seen += 1;
        }
        assert_eq!(seen, QUEUE);
        drop((of_a, of_all));
        b.write(2, String::new());
        assert!(readers.lock().is_empty());
    }

    #[test]
    fn only_so_many_lines_are_kept() {
        let book = LogBook::new("a", Arc::default());
        for number in 0..LINES_KEPT + 10 {
            book.write(1, number.to_string());
        }
        assert_eq!(book.recent().len(), LINES_KEPT);
        assert_eq!(book.recent()[0].text, "10");
    }
}
