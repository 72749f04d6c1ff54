//! `cargo xtask setup`: brings what cargo alone cannot.
//!
//! Every part looks first and acts only where something is missing, so that doing it again costs a fraction of a second.
//! A part that fails does not keep the others from being tried; all failures are told at the end.

use std::fmt;
use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::process::Failure;
use crate::programs;
use crate::progress::{Mark, Progress};
use crate::runner::{self, Runner};
use crate::tools::{DENO, ENVOY, Found, JUST, Tool};
use crate::wasm_std::{self, WasmStd};
use crate::workspace::{WASM_TARGET, Workspace, shown};

/// Something that could not be brought: what, every way that was tried, and what a person can do.
#[derive(Debug)]
pub(crate) struct Unavailable {
    pub(crate) what: String,
    pub(crate) tried: Vec<Failure>,
    pub(crate) remedy: String,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} could not be set up", self.what)?;
        for failure in &self.tried {
            write!(f, "\n  tried {failure}")?;
        }
        write!(f, "\n  remedy: {}", self.remedy)
    }
}

impl std::error::Error for Unavailable {}

/// One part of the set-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Wasm,
    Envoy,
    Deno,
    Runner,
    Programs,
    Just,
}

impl Part {
    /// What the demo and the tests need.
    pub(crate) const NEEDED: [Self; 4] = [Self::Wasm, Self::Envoy, Self::Deno, Self::Runner];

    /// Names as given to `--only`.
    pub(crate) const NAMES: [(&'static str, Self); 6] = [
        ("wasm", Self::Wasm),
        ("envoy", Self::Envoy),
        ("deno", Self::Deno),
        ("runner", Self::Runner),
        ("programs", Self::Programs),
        ("just", Self::Just),
    ];
}

/// What the set-up found or brought.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    pub(crate) wasm_std: Option<WasmStd>,
    pub(crate) envoy: Option<PathBuf>,
    pub(crate) deno: Option<PathBuf>,
    pub(crate) runner: Option<Runner>,
}

/// Brings the parts asked for.
pub(crate) fn run(workspace: &Workspace, parts: &[Part], progress: Progress) -> anyhow::Result<Machine> {
    progress.step("set-up");
    let mut machine = Machine::default();
    let mut errors = Vec::new();
    let lock = lock(workspace, progress)?;
    for part in parts {
        let outcome = match part {
            Part::Wasm => wasm(workspace, progress).map(|found| machine.wasm_std = Some(found)),
            Part::Envoy => tool(&ENVOY, workspace, progress).map(|found| machine.envoy = Some(found.path)),
            Part::Deno => tool(&DENO, workspace, progress).map(|found| machine.deno = Some(found.path)),
            // Below, where nobody waits for it: cargo has a lock of its own.
            Part::Runner => Ok(()),
            Part::Just => tool(&JUST, workspace, progress).map(drop),
            Part::Programs => programs::ensure(&programs::names(), progress),
        };
        errors.extend(outcome.err());
    }
    drop(lock);
    if parts.contains(&Part::Runner) {
        match runner::ensure(workspace, false, progress) {
            Ok(found) => machine.runner = Some(found),
            Err(failure) => errors.push(failure.into()),
        }
    }
    match errors.len() {
        0 => Ok(machine),
        1 => Err(errors.remove(0)),
        count => {
            let told: Vec<String> = errors.iter().map(|error| format!("{error:#}")).collect();
            Err(anyhow::anyhow!("{count} parts of the set-up failed\n\n{}", told.join("\n\n")))
        }
    }
}

fn wasm(workspace: &Workspace, progress: Progress) -> anyhow::Result<WasmStd> {
    let started = Instant::now();
    let outcome = match wasm_std::find(workspace) {
        Ok(Some(found)) => Ok(found),
        Ok(None) => wasm_std::install(workspace, |how| progress.doing(WASM_TARGET, how)),
        Err(error) => Err(error),
    };
    match &outcome {
        Ok(found) => progress.found(Mark::Good, WASM_TARGET, found.described(), started.elapsed()),
        Err(_) => progress.found(Mark::Bad, WASM_TARGET, "told below", started.elapsed()),
    }
    outcome
}

fn tool(tool: &Tool, workspace: &Workspace, progress: Progress) -> anyhow::Result<Found> {
    let started = Instant::now();
    let title = tool.title();
    let outcome = match tool.find(workspace) {
        Ok(Some(found)) => Ok(found),
        Ok(None) => tool.install(workspace, |how| progress.doing(&title, how)),
        Err(error) => Err(error),
    };
    match &outcome {
        Ok(found) => {
            let path = shown(&found.path, &workspace.root);
            let how = if found.version == tool.version {
                path
            } else {
                format!("{path}, version {}, because {} says so", found.version, tool.variable)
            };
            progress.found(Mark::Good, &title, &how, started.elapsed());
        }
        Err(_) => progress.found(Mark::Bad, &title, "told below", started.elapsed()),
    }
    Ok(outcome?)
}

/// Keeps two set-ups of one checkout from working at the same time. Released when dropped, and by the system at exit.
fn lock(workspace: &Workspace, progress: Progress) -> anyhow::Result<File> {
    let folder = workspace.downloads();
    let path = folder.join("setup.lock");
    fs::create_dir_all(&folder).with_context(|| format!("`{}` could not be made", folder.display()))?;
    let file = File::create(&path).with_context(|| format!("`{}` could not be opened", path.display()))?;
    if file.try_lock().is_err() {
        progress.found(Mark::Missing, "lock", "another set-up is running here; waiting for it", Duration::ZERO);
        file.lock().with_context(|| format!("`{}` could not be locked", path.display()))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_tells_every_way_tried_and_the_remedy() {
        let mut failure = Failure::new("pip install x", "exit status: 1");
        failure.last_lines.push("no such package".to_owned());
        let error = Unavailable {
            what: "x 1.0".to_owned(),
            tried: vec![failure, Failure::new("uv", "is not installed")],
            remedy: "install pip".to_owned(),
        };
        let expected = "\
x 1.0 could not be set up
  tried `pip install x`: exit status: 1
    | no such package
  tried `uv`: is not installed
  remedy: install pip";
        assert_eq!(error.to_string(), expected);
    }
}
