//! The native binaries, built once for demo and tests alike, and the variables that tell them where things are.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;

use crate::filters;
use crate::process::{self, Failure, run_shown};
use crate::progress::Progress;
use crate::runner::{self, Runner};
use crate::setup::{self, Machine, Part};
use crate::tools::{DENO, ENVOY};
use crate::workspace::{WASM_PROFILE, Workspace};

/// The binary that serves and the one that demonstrates.
const SERVER: &str = "portcullis";
const DEMO: &str = "demo";

/// A test of xtask's own, without dependencies of note.
const SMALL_TEST: &str = "dependencies";

/// Builds every binary, in the profile and with the features that `cargo test` uses.
///
/// Cargo compiles a dependency with the features that everything on its command line asks for together, and counts
/// dev-dependencies only where a test is named. So no package is named, which means all, and one small test: otherwise tokio and
/// all that stands on it would be compiled once for the demo and once more, with other features, for the tests.
pub(crate) fn build(workspace: &Workspace, progress: Progress) -> Result<(), Failure> {
    progress.step("build the host");
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).args(["build", "--bins", "--test", SMALL_TEST]);
    run_shown(&mut cargo)
}

/// Seconds that each fuzz target runs in the tests, unless the environment says otherwise: a minute and a half for all of them.
const FUZZ_SECONDS: (&str, &str) = ("PORTCULLIS_FUZZ_SECONDS", "7");

/// Tells a program where to find what was set up and built. Tests fail with a remedy if they find nothing.
pub(crate) fn tell_places(command: &mut Command, workspace: &Workspace, machine: &Machine) {
    command.env("PORTCULLIS_BIN", binary(workspace, SERVER)).env("PORTCULLIS_FILTERS", workspace.built_filters());
    if std::env::var_os(FUZZ_SECONDS.0).is_none() {
        command.env(FUZZ_SECONDS.0, FUZZ_SECONDS.1);
    }
    for (tool, path) in [(&ENVOY, &machine.envoy), (&DENO, &machine.deno)] {
        if let Some(path) = path {
            command.env(tool.variable, path);
        }
    }
    if let Some(Runner::At(path)) = &machine.runner {
        command.env(runner::VARIABLE, path);
    }
}

/// `cargo xtask demo`: sets up, builds, and becomes the demo. Returns only if that failed.
pub(crate) fn demo(workspace: &Workspace, arguments: &[String], progress: Progress) -> anyhow::Error {
    match ready_demo(workspace, arguments, progress) {
        Ok(mut demo) => {
            // In our place rather than below us: its input, output and signals are then the terminal's own.
            let error = demo.exec();
            anyhow::Error::new(error).context(format!("`{}` could not be started", process::shell_line(&demo)))
        }
        Err(error) => error,
    }
}

fn ready_demo(workspace: &Workspace, arguments: &[String], progress: Progress) -> anyhow::Result<Command> {
    let machine = setup::run(workspace, &Part::NEEDED, progress)?;
    let wasm_std = machine.wasm_std.as_ref().context("the set-up left out the WebAssembly target")?;
    filters::build(workspace, wasm_std, &[], WASM_PROFILE, progress)?;
    build(workspace, progress)?;
    let mut demo = Command::new(binary(workspace, DEMO));
    demo.args(arguments).current_dir(&workspace.root);
    tell_places(&mut demo, workspace, &machine);
    Ok(demo)
}

fn binary(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.target.join("debug").join(name)
}
