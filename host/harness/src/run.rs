//! Finds scenario files, runs each on a host, and judges what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::expectation::describe;
use crate::filter::{Filter, Guest, HarnessError};
use crate::host::{Host, NOW_DEFAULT};
use crate::message::Observed;
use crate::module::{find_built, newer_source, places};
use crate::report::{Outcome, Report, Verdict};
use crate::scenario::{HostKind, Scenario, Step, filter_of};
use crate::split::splits;
use crate::trace::{Secrets, Trace};

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// The module for all scenarios, instead of the one each belongs to.
    pub wasm: Option<PathBuf>,
    /// Only scenarios whose name or file contains this.
    pub only: Option<String>,
    /// Scenarios that do not say yet what they expect are run too, to have it written into them.
    pub unfinished: bool,
}

/// Runs scenarios on one kind of host.
pub trait Runner {
    /// Which.
    fn host(&self) -> HostKind;

    /// Runs a scenario against a module. The error says why it could not be run.
    fn run(&mut self, scenario: &Scenario, wasm: &Path) -> Result<Ran, String>;
}

/// What came of a scenario, before it is judged.
#[derive(Debug)]
pub enum Ran {
    /// The filter refused its configuration, with these words.
    Refused(String),
    /// It started, and its steps were run.
    Steps {
        /// Each step with what came of it; several outcomes where a body is split in every way.
        steps: Vec<(Step, Vec<Observed>)>,
        /// What the filter does that will disappoint its author in Envoy.
        lints: Vec<String>,
        /// What the host wrote, for the reader of a failure; may be empty.
        log: String,
        /// What passed between host and filter before the first step; where the host shows it.
        start: Trace,
    },
}

impl Ran {
    /// The filter has accepted its configuration, and no more was asked.
    pub fn accepted() -> Ran {
        Ran::Steps { steps: Vec::new(), lints: Vec::new(), log: String::new(), start: Trace::default() }
    }
}

/// What is told of a scenario once it was run.
pub struct Told<'a> {
    /// What became of it.
    pub outcome: &'a Outcome,
    /// The scenario and what came of it, if it could be read and run.
    pub ran: Option<(&'a Scenario, &'a Ran)>,
}

/// A scenario that was found, with what keeps it from running, if anything does.
struct Found {
    file: PathBuf,
    loaded: Result<(Scenario, Result<PathBuf, String>), String>,
}

/// Runs every scenario in `paths`: files, or folders that hold a `scenarios` folder somewhere below. Outcomes are told as they
/// come; scenarios that can share a host's process come one after the other.
pub fn run(
    paths: &[PathBuf],
    options: &RunOptions,
    runner: &mut dyn Runner,
    told: &mut dyn FnMut(&Told<'_>),
) -> Report {
    let mut report = Report::default();
    let mut found = find(paths, options, &mut report);
    if found.is_empty() && report.errors.is_empty() {
        let only = options.only.as_deref().unwrap_or_default();
        report.errors.push(format!("no scenario's name or file contains `{only}`"));
    }
    // A stable sort: within a configuration the order is that of the files.
    found.sort_by_cached_key(|found| match &found.loaded {
        Ok((scenario, _)) => Some((scenario.filter.clone(), scenario.configuration.clone())),
        Err(_) => None,
    });
    let warnings: BTreeSet<String> = found.iter().filter_map(stale).collect();
    report.warnings.extend(warnings);
    for found in found {
        let began = Instant::now();
        let (outcome, ran) = run_found(&found, runner, began);
        let scenario = found.loaded.as_ref().ok().map(|(scenario, _)| scenario);
        told(&Told { outcome: &outcome, ran: scenario.zip(ran.as_ref()) });
        report.outcomes.push(outcome);
    }
    report.outcomes.sort_by(|a, b| a.file.cmp(&b.file));
    report
}

/// That a scenario's module is older than what it is built from, so that something else is tested than what the author sees.
fn stale(found: &Found) -> Option<String> {
    let (scenario, Ok(module)) = found.loaded.as_ref().ok()? else { return None };
    let file = scenario.file.canonicalize().ok()?;
    let folder = file.ancestors().find(|folder| folder.join("Cargo.toml").is_file())?;
    let source = newer_source(module, folder)?;
    let shown = source.strip_prefix(folder).unwrap_or(&source).display();
    Some(format!(
        "{}: `{shown}` was changed after the module was built, so this tests what it was before",
        scenario.filter
    ))
}

fn find(paths: &[PathBuf], options: &RunOptions, report: &mut Report) -> Vec<Found> {
    let wanted = |text: &str| options.only.as_ref().is_none_or(|only| text.contains(only.as_str()));
    let mut all = Vec::new();
    for path in paths {
        let files = match find_scenarios(path) {
            Ok(files) => files,
            Err(error) => {
                report.errors.push(error);
                continue;
            }
        };
        for file in files {
            let loaded = if options.unfinished { Scenario::load_unfinished(&file) } else { Scenario::load(&file) };
            let named = loaded.as_ref().is_ok_and(|scenario| wanted(&scenario.name));
            if !named && !wanted(&file.to_string_lossy()) {
                continue;
            }
            let loaded = loaded.map_err(|error| error.to_string()).map(|scenario| {
                let module = options.wasm.clone().map_or_else(|| find_module(&scenario), Ok);
                (scenario, module)
            });
            all.push(Found { file, loaded });
        }
    }
    all
}

fn run_found(found: &Found, runner: &mut dyn Runner, began: Instant) -> (Outcome, Option<Ran>) {
    let mut outcome = Outcome {
        file: found.file.clone(),
        filter: filter_of(&found.file),
        name: found.file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        host: runner.host(),
        verdict: Verdict::Elsewhere,
        lints: Vec::new(),
        took: Duration::ZERO,
    };
    let (scenario, module) = match &found.loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            outcome.verdict = Verdict::Failed(error.clone());
            return (outcome, None);
        }
    };
    outcome.filter.clone_from(&scenario.filter);
    outcome.name.clone_from(&scenario.name);
    if !scenario.hosts.contains(&runner.host()) {
        return (outcome, None);
    }
    let ran = module.clone().and_then(|module| runner.run(scenario, &module));
    outcome.took = began.elapsed();
    outcome.verdict = match ran.as_ref().map_err(Clone::clone).and_then(|ran| judge(scenario, ran)) {
        Ok(()) => Verdict::Passed,
        Err(text) => Verdict::Failed(text),
    };
    let ran = ran.ok();
    if let Some(Ran::Steps { lints, .. }) = &ran {
        outcome.lints.clone_from(lints);
    }
    (outcome, ran)
}

/// The simulated host as a runner.
#[derive(Debug, Default)]
pub struct Simulated {
    /// Whether failures show credentials.
    pub secrets: Secrets,
}

impl Runner for Simulated {
    fn host(&self) -> HostKind {
        HostKind::Harness
    }

    fn run(&mut self, scenario: &Scenario, wasm: &Path) -> Result<Ran, String> {
        let guest = Guest::load(wasm).map_err(|error| error.to_string())?;
        simulate(scenario, &guest, self.secrets)
    }
}

/// Runs one scenario on the simulated host; the error says every way in which it came out otherwise.
pub fn run_scenario(scenario: &Scenario, guest: &Guest) -> Result<(), String> {
    judge(scenario, &simulate(scenario, guest, Secrets::Masked)?)
}

/// Runs one scenario on the simulated host.
pub fn simulate(scenario: &Scenario, guest: &Guest, secrets: Secrets) -> Result<Ran, String> {
    let now = scenario.now.unwrap_or(NOW_DEFAULT);
    let steps = scenario.plan(now).map_err(|error| error.to_string())?;
    let mut host = Host::new().at(now);
    if secrets == Secrets::Shown {
        host = host.showing_secrets();
    }
    for upstream in &scenario.callout_upstreams {
        host.upstream(upstream).answers([]);
    }
    for (key, value) in scenario.shared_data(now).map_err(|error| error.to_string())? {
        host.set_shared_data(&scenario.vm_id, key, value);
    }
    let filter = host
        .load(guest)
        .configuration(scenario.configuration.clone())
        .root_id(&scenario.root_id)
        .vm_id(&scenario.vm_id)
        .workers(scenario.workers)
        .start();
    let filter = match filter {
        Ok(filter) => filter,
        Err(HarnessError::Refused { message, .. }) => return Ok(Ran::Refused(message)),
        Err(error) => return Err(error.to_string()),
    };
    let start = host.trace();
    let mut ran = Vec::new();
    for (index, step) in steps.into_iter().enumerate() {
        let observed =
            simulate_step(scenario, &filter, &step).map_err(|problem| format!("step {}: {problem}", index + 1))?;
        ran.push((step, observed));
    }
    Ok(Ran::Steps { steps: ran, lints: host.lints(), log: String::new(), start })
}

fn simulate_step(scenario: &Scenario, filter: &Filter, step: &Step) -> Result<Vec<Observed>, String> {
    let host = filter.host();
    if step.worker >= scenario.workers {
        return Err(format!("there is no worker {}, since `workers` is {}", step.worker, scenario.workers));
    }
    for (upstream, answers) in &step.callouts {
        host.upstream(upstream).answers(answers.clone());
    }
    let mut problem = None;
    let before = host.observe(|| {
        host.advance(step.advance);
        for _ in 0..step.ticks {
            if !host.tick() {
                problem = Some("the filter has asked for no tick".to_owned());
            }
        }
        for (queue, item) in &step.enqueue {
            if host.queue(&scenario.vm_id, queue).is_none() {
                problem = Some(format!("no filter has registered the queue `{queue}`"));
            } else {
                host.enqueue(&scenario.vm_id, queue, item);
            }
        }
    });
    if let Some(problem) = problem {
        return Err(problem);
    }
    let mut outcomes = match &step.request {
        None => vec![before],
        Some(request) => {
            let body = request.body.concat();
            let ways: Vec<Vec<Vec<u8>>> = if step.every_split {
                splits(&body).map(|pieces| pieces.into_iter().map(<[u8]>::to_vec).collect()).collect()
            } else {
                vec![request.body.clone()]
            };
            let send = |body| {
                let mut builder = filter.on_worker(step.worker).plan(crate::RequestPlan { body, ..request.clone() });
                for (path, value) in &step.properties {
                    builder = builder.property(&path.split('.').collect::<Vec<_>>(), value);
                }
                builder.upstream_response(step.upstream_response.clone()).send()
            };
            ways.into_iter().map(send).collect()
        }
    };
    for observed in &mut outcomes {
        for key in step.expect.shared_data.keys() {
            if let Some(value) = host.shared_data(&scenario.vm_id, key) {
                observed.shared_data.insert(key.clone(), value);
            }
        }
        for queue in step.expect.queues.keys() {
            if let Some(items) = host.queue(&scenario.vm_id, queue) {
                observed.queues.insert(queue.clone(), items);
            }
        }
    }
    Ok(outcomes)
}

/// Whether a scenario came out as it expects; the error says every way in which it did not.
pub fn judge(scenario: &Scenario, ran: &Ran) -> Result<(), String> {
    let (steps, log) = match (ran, &scenario.refused) {
        (Ran::Refused(message), Some(texts)) => return refused_as_expected(texts, message),
        (Ran::Refused(message), None) => return Err(message.clone()),
        (Ran::Steps { .. }, Some(_)) => {
            return Err("the configuration was accepted, but must be refused".to_owned());
        }
        (Ran::Steps { steps, log, .. }, None) => (steps, log),
    };
    let mut failures = Vec::new();
    for (index, (step, outcomes)) in steps.iter().enumerate() {
        // One way of splitting a body that fails is enough to read about.
        let failed = outcomes.iter().find_map(|observed| judge_step(index, steps.len(), step, observed));
        failures.extend(failed);
    }
    if failures.is_empty() {
        return Ok(());
    }
    if !log.is_empty() {
        failures.push(format!("log of the process:\n{log}"));
    }
    Err(failures.join("\n"))
}

/// Compares one step's outcome with what the scenario expects; the text is what a reader of a failed test needs.
fn judge_step(index: usize, of: usize, step: &Step, observed: &Observed) -> Option<String> {
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
fn refused_as_expected(texts: &[String], message: &str) -> Result<(), String> {
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
    if path == Path::new(".") {
        for file in &mut files {
            *file = file.strip_prefix(".").unwrap_or(file).to_owned();
        }
    }
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

/// The module that a scenario belongs to: the one it names, or the newest that was built for the filter it lies with.
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

/// Where the module that a scenario belongs to can appear.
fn module_places(scenario: &Scenario) -> Vec<PathBuf> {
    let file = scenario.file.canonicalize().unwrap_or_else(|_| scenario.file.clone());
    places(&scenario.filter, file.parent().unwrap_or(&file))
}

/// Every file that a run of these scenarios depends on: the scenarios, what they name, and the modules, built or not.
pub fn files_of(paths: &[PathBuf], options: &RunOptions) -> Vec<PathBuf> {
    let mut files = BTreeMap::new();
    for path in paths {
        for file in find_scenarios(path).unwrap_or_default() {
            if let Ok(scenario) = Scenario::load_unfinished(&file) {
                let modules = match options.wasm.as_ref().or(scenario.wasm.as_ref()) {
                    Some(named) => vec![named.clone()],
                    None => module_places(&scenario),
                };
                files.extend(modules.into_iter().chain(scenario.files()).map(|file| (file, ())));
            }
            files.insert(file, ());
        }
    }
    files.into_keys().collect()
}
