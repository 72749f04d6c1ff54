//! What became of scenarios, for people, for CI (JUnit) and for programs (JSON).

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::scenario::HostKind;

/// What became of all scenarios.
#[derive(Debug, Default)]
pub struct Report {
    /// One entry per scenario file, in the files' order.
    pub outcomes: Vec<Outcome>,
    /// Mistakes that kept the run from starting, such as a folder without scenarios.
    pub errors: Vec<String>,
    /// What makes it doubtful that the run says what its reader wants to know.
    pub warnings: Vec<String>,
}

/// What became of one scenario.
#[derive(Debug)]
pub struct Outcome {
    /// Its file.
    pub file: PathBuf,
    /// The filter it belongs to.
    pub filter: String,
    /// Its name, or that of the file where it could not be read.
    pub name: String,
    /// Where it ran.
    pub host: HostKind,
    /// What became of it.
    pub verdict: Verdict,
    /// What the filter does that will disappoint its author in Envoy.
    pub lints: Vec<String>,
    /// How long it took.
    pub took: Duration,
}

/// What became of a scenario.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything was as expected.
    Passed,
    /// Something was not; the text says what.
    Failed(String),
    /// Its `hosts` do not name this host.
    Elsewhere,
}

impl Report {
    /// How many scenarios passed.
    pub fn passed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.verdict == Verdict::Passed).count()
    }

    /// How many failed.
    pub fn failed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| matches!(outcome.verdict, Verdict::Failed(_))).count()
    }

    /// How many are for other hosts.
    pub fn elsewhere(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.verdict == Verdict::Elsewhere).count()
    }

    /// Whether at least one scenario ran, none failed, and nothing was in the way.
    pub fn is_success(&self) -> bool {
        self.errors.is_empty() && self.failed() == 0 && self.passed() > 0
    }

    /// Adds what another run came to.
    pub fn extend(&mut self, other: Report) {
        self.outcomes.extend(other.outcomes);
        for (ours, others) in [(&mut self.errors, other.errors), (&mut self.warnings, other.warnings)] {
            // Two hosts meet the same mistakes.
            let new: Vec<String> = others.into_iter().filter(|text| !ours.contains(text)).collect();
            ours.extend(new);
        }
    }

    /// What stands below the lines of the scenarios: warnings, mistakes, and the count.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        let mut lints: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for outcome in &self.outcomes {
            for lint in &outcome.lints {
                let filters = lints.entry(lint).or_default();
                if !filters.contains(&outcome.filter.as_str()) {
                    filters.push(&outcome.filter);
                }
            }
        }
        for (lint, filters) in lints {
            let _ = writeln!(text, "warning: {}: {lint}", filters.join(", "));
        }
        for warning in &self.warnings {
            let _ = writeln!(text, "warning: {warning}");
        }
        for error in &self.errors {
            let _ = writeln!(text, "error: {error}");
        }
        let _ = write!(text, "\n{} passed, {} failed", self.passed(), self.failed());
        match self.errors.len() {
            0 => {}
            1 => text.push_str(", 1 error"),
            count => {
                let _ = write!(text, ", {count} errors");
            }
        }
        if self.elsewhere() > 0 {
            let _ = write!(text, ", {} for other hosts", self.elsewhere());
        }
        text + "\n"
    }

    /// For CI systems: one test case a scenario, one suite a filter and host.
    pub fn junit(&self) -> String {
        let mut suites: BTreeMap<(&str, &str), Vec<&Outcome>> = BTreeMap::new();
        for outcome in &self.outcomes {
            suites.entry((outcome.host.name(), &outcome.filter)).or_default().push(outcome);
        }
        let seconds = |duration: Duration| format!("{:.3}", duration.as_secs_f64());
        let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        let _ = writeln!(
            text,
            "<testsuites name=\"portcullis test\" tests=\"{}\" failures=\"{}\" errors=\"{}\">",
            self.outcomes.len(),
            self.failed(),
            self.errors.len()
        );
        for ((host, filter), outcomes) in suites {
            let count =
                |wanted: fn(&Verdict) -> bool| outcomes.iter().filter(|outcome| wanted(&outcome.verdict)).count();
            let _ = writeln!(
                text,
                "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" skipped=\"{}\" time=\"{}\">",
                xml(&format!("{host}::{filter}")),
                outcomes.len(),
                count(|verdict| matches!(verdict, Verdict::Failed(_))),
                count(|verdict| *verdict == Verdict::Elsewhere),
                seconds(outcomes.iter().map(|outcome| outcome.took).sum()),
            );
            for outcome in outcomes {
                let _ = write!(
                    text,
                    "    <testcase name=\"{}\" classname=\"{}\" file=\"{}\" time=\"{}\"",
                    xml(&outcome.name),
                    xml(&format!("{host}::{filter}")),
                    xml(&outcome.file.display().to_string()),
                    seconds(outcome.took),
                );
                match &outcome.verdict {
                    Verdict::Passed => text.push_str("/>\n"),
                    Verdict::Elsewhere => text.push_str("><skipped message=\"for other hosts\"/></testcase>\n"),
                    Verdict::Failed(why) => {
                        let first = why.lines().next().unwrap_or_default();
                        let _ =
                            writeln!(text, "><failure message=\"{}\">{}</failure></testcase>", xml(first), xml(why));
                    }
                }
            }
            text.push_str("  </testsuite>\n");
        }
        for error in &self.errors {
            let _ = writeln!(
                text,
                "  <testsuite name=\"portcullis test\" tests=\"1\" errors=\"1\">\n    \
                 <testcase name=\"start\"><error message=\"{0}\">{0}</error></testcase>\n  </testsuite>",
                xml(error)
            );
        }
        text.push_str("</testsuites>\n");
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let outcomes: Vec<Value> = self
            .outcomes
            .iter()
            .map(|outcome| {
                let (verdict, why) = match &outcome.verdict {
                    Verdict::Passed => ("passed", None),
                    Verdict::Failed(why) => ("failed", Some(why)),
                    Verdict::Elsewhere => ("elsewhere", None),
                };
                json!({
                    "name": outcome.name, "filter": outcome.filter, "host": outcome.host.name(),
                    "file": outcome.file.display().to_string(), "verdict": verdict, "failure": why,
                    "warnings": outcome.lints, "seconds": outcome.took.as_secs_f64(),
                })
            })
            .collect();
        json!({
            "passed": self.passed(), "failed": self.failed(), "elsewhere": self.elsewhere(),
            "errors": self.errors, "warnings": self.warnings, "scenarios": outcomes,
        })
    }
}

/// One line, and below it what went wrong.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mark, text) = match &self.verdict {
            Verdict::Passed => ("ok    ", None),
            Verdict::Failed(text) => ("FAILED", Some(text)),
            Verdict::Elsewhere => ("-     ", None),
        };
        write!(f, "{mark}  {}::{}  {}", self.host.name(), self.filter, self.name)?;
        if self.verdict == Verdict::Elsewhere {
            write!(f, " (for other hosts)")?;
        }
        writeln!(f)?;
        if let Some(text) = text {
            let file = self.file.display().to_string();
            if !text.starts_with(&file) {
                writeln!(f, "        {file}")?;
            }
            for line in text.lines() {
                writeln!(f, "        {line}")?;
            }
        }
        Ok(())
    }
}

/// One line per scenario, differences below those that failed, warnings, and the count at the end.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for outcome in &self.outcomes {
            outcome.fmt(f)?;
        }
        f.write_str(&self.summary())
    }
}

/// Text as XML 1.0 can hold it: what is no character there is replaced.
fn xml(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\t' | '\n' => escaped.push(character),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let outcome = |name: &str, verdict: Verdict| Outcome {
            file: PathBuf::from("a/scenarios/b.yaml"),
            filter: "a".to_owned(),
            name: name.to_owned(),
            host: HostKind::Harness,
            verdict,
            lints: vec!["odd".to_owned()],
            took: Duration::from_millis(1500),
        };
        let failed = Verdict::Failed("x: expected \"1\", got <2>\u{1}\nmore".to_owned());
        Report {
            outcomes: vec![
                outcome("good", Verdict::Passed),
                outcome("bad & ugly", failed),
                outcome("other", Verdict::Elsewhere),
            ],
            errors: vec!["b: no scenario here".to_owned()],
            warnings: vec!["the module is old".to_owned()],
        }
    }

    #[test]
    fn people_read_lines_and_a_count() {
        assert_eq!(
            report().to_string(),
            "ok      harness::a  good\nFAILED  harness::a  bad & ugly\n        a/scenarios/b.yaml\n        \
             x: expected \"1\", got <2>\u{1}\n        more\n-       harness::a  other (for other hosts)\n\
             warning: a: odd\nwarning: the module is old\nerror: b: no scenario here\n\n1 passed, 1 failed, 1 error, 1 for other \
             hosts\n"
        );
        assert!(!report().is_success());
    }

    #[test]
    fn junit_is_well_formed_whatever_failed() {
        let text = report().junit();
        for part in [
            "<testsuites name=\"portcullis test\" tests=\"3\" failures=\"1\" errors=\"1\">",
            "<testsuite name=\"harness::a\" tests=\"3\" failures=\"1\" skipped=\"1\" time=\"4.500\">",
            "<testcase name=\"good\" classname=\"harness::a\" file=\"a/scenarios/b.yaml\" time=\"1.500\"/>",
            "name=\"bad &amp; ugly\"",
            "<failure message=\"x: expected &quot;1&quot;, got &lt;2&gt;\u{fffd}\">",
            "<error message=\"b: no scenario here\">",
        ] {
            assert!(text.contains(part), "no `{part}` in\n{text}");
        }
        assert_eq!(text.matches("<testcase").count(), 4);
    }

    #[test]
    fn programs_get_json() {
        let json = report().json();
        assert_eq!((&json["passed"], &json["failed"], &json["elsewhere"]), (&json!(1), &json!(1), &json!(1)));
        assert_eq!(json["errors"], json!(["b: no scenario here"]));
        assert_eq!(json["warnings"], json!(["the module is old"]));
        assert_eq!(json["scenarios"][1]["verdict"], "failed");
        assert_eq!(json["scenarios"][0]["failure"], Value::Null);
    }
}
