//! The log: lines on standard output, which the host reads, limits and keeps.
//!
//! Never waits: an operator that logs faster than the host reads loses lines, not time.

use std::io;
use std::os::fd::AsFd;

use crate::ops::MODULE_BASE;

/// What may wait to be written.
const WAITING_BYTES_MAX: usize = 64 << 10;
/// Longest text of one call; the host cuts lines much earlier.
const TEXT_BYTES_MAX: usize = 16 << 10;

/// Standard output.
#[derive(Debug, Default)]
pub(crate) struct Output {
    waiting: Vec<u8>,
    dropped: u64,
}

impl Output {
    /// Makes writes return at once.
    pub(crate) fn open() -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(io::stdout().as_fd())?;
        rustix::fs::fcntl_setfl(io::stdout().as_fd(), flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self::default())
    }

    /// Writes a text that ends its line.
    pub(crate) fn write(&mut self, text: &str) {
        self.flush();
        let end = (0..=text.len().min(TEXT_BYTES_MAX)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        let text = text.get(..end).unwrap_or_default().replace(MODULE_BASE, "");
        if self.waiting.len() + text.len() > WAITING_BYTES_MAX {
            self.dropped += 1;
            return;
        }
        if self.dropped > 0 {
            let note = format!("{} log entries were dropped: they came faster than they were read\n", self.dropped);
            self.waiting.extend_from_slice(note.as_bytes());
            self.dropped = 0;
        }
        self.waiting.extend_from_slice(text.as_bytes());
        if !text.ends_with('\n') {
            self.waiting.push(b'\n');
        }
        self.flush();
    }

    /// Writes what waits, as far as it is taken.
    pub(crate) fn flush(&mut self) {
        while !self.waiting.is_empty() {
            match rustix::io::write(io::stdout().as_fd(), &self.waiting) {
                Ok(0) => return,
                Ok(written) => drop(self.waiting.drain(..written)),
                Err(rustix::io::Errno::INTR) => {}
                // Full; or nobody reads any more, and then the process is about to end.
                Err(_) => return,
            }
        }
    }
}
