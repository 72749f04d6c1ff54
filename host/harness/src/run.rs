//! `portcullis test`: finds scenario files, runs each on the simulated host, and reports.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::expectation::describe;
use crate::filter::{Guest, HarnessError};
use crate::host::{Host, NOW_DEFAULT};
use crate::message::Observed;
use crate::module::find_built;
use crate::scenario::{HostKind, Scenario};

/// How to run.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// The module for all scenarios, instead of the one each belongs to.
    pub wasm: Option<PathBuf>,
    /// Only scenarios whose name or file contains this.
    pub only: Option<String>,
}

/// What became of all scenarios.
#[derive(Debug, Default)]
pub struct Report {
    /// One entry per scenario file, in order.
    pub outcomes: Vec<Outcome>,
    /// Mistakes that kept the run from starting, such as a folder without scenarios.
    pub errors: Vec<String>,
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
    /// What became of it.
    pub verdict: Verdict,
    /// What the filter does that will disappoint its author in Envoy.
    pub lints: Vec<String>,
}

/// What became of a scenario.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything was as expected.
    Passed,
    /// Something was not; the text says what.
    Failed(String),
    /// Its `hosts` do not name the harness.
    Elsewhere,
}

impl Report {
    /// How many scenarios passed.
    pub fn passed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.verdict == Verdict::Passed).count()
    }

    /// How many failed, mistakes that kept the run from starting included.
    pub fn failed(&self) -> usize {
        let failed = self.outcomes.iter().filter(|outcome| matches!(outcome.verdict, Verdict::Failed(_))).count();
        failed + self.errors.len()
    }

    /// Whether at least one scenario ran and none failed.
    pub fn is_success(&self) -> bool {
        self.failed() == 0 && self.passed() > 0
    }
}

/// One line per scenario, differences below those that failed, warnings, and the count at the end.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.outcomes.iter().map(|outcome| outcome.filter.chars().count()).max().unwrap_or_default();
        for outcome in &self.outcomes {
            let (mark, text) = match &outcome.verdict {
                Verdict::Passed => ("ok    ", None),
                Verdict::Failed(text) => ("FAILED", Some(text)),
                Verdict::Elsewhere => ("-     ", None),
            };
            write!(f, "{mark}  {:width$}  {}", outcome.filter, outcome.name)?;
            if outcome.verdict == Verdict::Elsewhere {
                write!(f, " (not for the harness)")?;
            }
            writeln!(f)?;
            if let Some(text) = text {
                writeln!(f, "        {}", outcome.file.display())?;
                for line in text.lines() {
                    writeln!(f, "        {line}")?;
                }
            }
        }
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
            writeln!(f, "warning: {}: {lint}", filters.join(", "))?;
        }
        for error in &self.errors {
            writeln!(f, "error: {error}")?;
        }
        writeln!(f, "\n{} passed, {} failed", self.passed(), self.failed())
    }
}

/// Runs every scenario in `paths`: files, or folders that hold a `scenarios` folder somewhere below.
pub fn run(paths: &[PathBuf], options: &RunOptions) -> Report {
    let mut report = Report::default();
    let mut guests = Guests::default();
    for path in paths {
        let files = match find_scenarios(path) {
            Ok(files) => files,
            Err(error) => {
                report.errors.push(error);
                continue;
            }
        };
        for file in files {
            if let Some(outcome) = run_file(&file, options, &mut guests) {
                report.outcomes.push(outcome);
            }
        }
    }
    if report.outcomes.is_empty() && report.errors.is_empty() {
        let only = options.only.as_deref().unwrap_or_default();
        report.errors.push(format!("no scenario's name or file contains `{only}`"));
    }
    report
}

fn run_file(file: &Path, options: &RunOptions, guests: &mut Guests) -> Option<Outcome> {
    let wanted = |text: &str| options.only.as_ref().is_none_or(|only| text.contains(only.as_str()));
    let scenario = match Scenario::load(file) {
        Ok(scenario) => scenario,
        Err(error) => {
            return wanted(&file.to_string_lossy()).then(|| Outcome {
                file: file.to_owned(),
                filter: String::new(),
                name: file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                verdict: Verdict::Failed(error.to_string()),
                lints: Vec::new(),
            });
        }
    };
    if !wanted(&scenario.name) && !wanted(&file.to_string_lossy()) {
        return None;
    }
    let mut lints = Vec::new();
    let verdict = if scenario.hosts.contains(&HostKind::Harness) {
        match guests.get(&scenario, options.wasm.as_deref()) {
            Ok(guest) => match run_scenario(&scenario, &guest, &mut lints) {
                Ok(()) => Verdict::Passed,
                Err(text) => Verdict::Failed(text),
            },
            Err(error) => Verdict::Failed(error),
        }
    } else {
        Verdict::Elsewhere
    };
    Some(Outcome { file: file.to_owned(), filter: scenario.filter.clone(), name: scenario.name, verdict, lints })
}

/// Runs one scenario on the simulated host; the error says every way in which it came out otherwise.
pub fn run_scenario(scenario: &Scenario, guest: &Guest, lints: &mut Vec<String>) -> Result<(), String> {
    let now = scenario.now.unwrap_or(NOW_DEFAULT);
    let steps = scenario.plan(now).map_err(|error| error.to_string())?;
    let host = Host::new().at(now);
    for upstream in &scenario.callout_upstreams {
        host.upstream(upstream).answers([]);
    }
    let filter = match (host.load(guest).configuration(scenario.configuration.clone()).start(), &scenario.refused) {
        (Ok(filter), None) => filter,
        (Ok(_), Some(_)) => return Err("the configuration was accepted, but must be refused".to_owned()),
        (Err(HarnessError::Refused { message, .. }), Some(texts)) => return refused_as_expected(texts, &message),
        (Err(error), _) => return Err(error.to_string()),
    };
    let mut failures = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        host.advance(step.advance);
        for (upstream, answers) in &step.callouts {
            host.upstream(upstream).answers(answers.clone());
        }
        let observed = filter.exchange(&step.request, &step.upstream_response);
        if let Some(failure) = judge(index, steps.len(), step, &observed) {
            failures.push(failure);
        }
    }
    lints.extend(host.lints());
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

/// Compares one step's outcome with what the scenario expects; the text is what a reader of a failed test needs.
pub fn judge(index: usize, of: usize, step: &crate::scenario::Step, observed: &Observed) -> Option<String> {
    let mismatches = step.expect.compare(observed);
    if mismatches.is_empty() {
        return None;
    }
    let mut text = String::new();
    if of > 1 {
        text.push_str(&format!("step {} of {of}", index + 1));
        if let Some(name) = &step.name {
            text.push_str(&format!(" ({name})"));
        }
        text.push_str(":\n");
    }
    for mismatch in mismatches {
        text.push_str(&format!("{mismatch}\n"));
    }
    text.push_str("what happened:\n");
    for line in describe(observed).lines() {
        text.push_str(&format!("  {line}\n"));
    }
    Some(text)
}

/// Whether a refusal says all that it must.
pub fn refused_as_expected(texts: &[String], message: &str) -> Result<(), String> {
    let missing: Vec<String> =
        texts.iter().filter(|text| !message.contains(*text)).map(|text| format!("`{text}`")).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("the configuration was refused, but the message does not say {}:\n{message}", missing.join(", ")))
}

/// Scenario files at or below `path`, sorted.
pub fn find_scenarios(path: &Path) -> Result<Vec<PathBuf>, String> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    if !path.is_dir() {
        return Err(format!("{}: there is no such file or folder", path.display()));
    }
    let mut files = Vec::new();
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let inside = absolute.components().any(|part| part.as_os_str() == "scenarios");
    collect(path, inside, &mut files).map_err(|error| format!("{}: {error}", path.display()))?;
    files.sort();
    if files.is_empty() {
        return Err(format!(
            "{}: no scenario here\n  hint: scenarios are `.yaml` files in a folder called `scenarios`",
            path.display()
        ));
    }
    Ok(files)
}

fn collect(folder: &Path, inside: bool, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if entry.file_type()?.is_dir() {
            if !name.starts_with('.') && name != "target" && name != "node_modules" {
                collect(&path, inside || name == "scenarios", files)?;
            }
        } else if inside && name.ends_with(".yaml") {
            files.push(path);
        }
    }
    Ok(())
}

/// Modules that were compiled already, by file.
#[derive(Default)]
struct Guests(BTreeMap<PathBuf, Guest>);

impl Guests {
    fn get(&mut self, scenario: &Scenario, wasm: Option<&Path>) -> Result<Guest, String> {
        let file = match wasm {
            Some(file) => file.to_owned(),
            None => find_module(scenario)?,
        };
        if let Some(guest) = self.0.get(&file) {
            return Ok(guest.clone());
        }
        let guest = Guest::load(&file).map_err(|error| error.to_string())?;
        self.0.insert(file, guest.clone());
        Ok(guest)
    }
}

/// The module that a scenario belongs to: the one it names, or `target/filters/NAME.wasm` of the workspace it lies in.
pub fn find_module(scenario: &Scenario) -> Result<PathBuf, String> {
    if let Some(wasm) = &scenario.wasm {
        return Ok(wasm.clone());
    }
    let file = scenario.file.canonicalize().unwrap_or_else(|_| scenario.file.clone());
    find_built(&scenario.filter, file.parent().unwrap_or(&file)).map_err(|(problem, hint)| {
        format!(
            "{}: {problem}\n  hint: {hint}; or name the module with `--filter` or with `wasm:` in the scenario",
            scenario.file.display()
        )
    })
}
