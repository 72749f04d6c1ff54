//! What a person sees while things happen: one line per finding, on standard error, coloured only for a terminal.

use std::io::IsTerminal;
use std::time::Duration;

/// Writes progress lines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    colour: bool,
}

/// How a thing turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Good,
    Bad,
    Missing,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let unwanted = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { colour: std::io::stderr().is_terminal() && !unwanted("NO_COLOR") && !dumb }
    }

    /// Announces a step.
    pub(crate) fn step(self, title: &str) {
        eprintln!("{}", self.painted("1", &format!("== {title}")));
    }

    /// Says that something slow has begun.
    pub(crate) fn doing(self, what: &str, how: &str) {
        eprintln!("  {what:<16} {:<8} {how}", "...");
    }

    /// Says how something turned out, and how long that took if a person could have noticed.
    pub(crate) fn found(self, mark: Mark, what: &str, how: &str, took: Duration) {
        let (word, colour) = match mark {
            Mark::Good => ("ok", "32"),
            Mark::Bad => ("FAILED", "31"),
            Mark::Missing => ("missing", "33"),
        };
        let word = self.painted(colour, &format!("{word:<8}"));
        let took = if took < Duration::from_millis(500) { String::new() } else { format!(" ({})", seconds(took)) };
        eprintln!("  {what:<16} {word} {how}{took}");
    }

    fn painted(self, colour: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A duration as a person says it.
pub(crate) fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {:.0} s", duration.as_secs() / 60, seconds % 60.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_naturally() {
        assert_eq!(seconds(Duration::from_millis(1_240)), "1.2 s");
        assert_eq!(seconds(Duration::from_secs(151)), "2 min 31 s");
    }
}
