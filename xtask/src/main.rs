//! Set-up that cargo alone cannot do, and the two commands of the README: `cargo xtask demo` and `cargo xtask test`.
//!
//! Responsible for bringing the WebAssembly target, Envoy and Deno, for building filters under their names and the operators'
//! engine, and for the order in which everything is checked. It decides nothing about filters or hosts: their own crates and tests do.

mod apt;
mod checks;
mod cli;
mod filters;
mod guests;
mod host;
mod process;
mod programs;
mod progress;
mod runner;
mod setup;
mod tools;
mod wasm_imports;
mod wasm_std;
mod workspace;

use std::process::ExitCode;

use anyhow::Context as _;

use crate::cli::Command;
use crate::progress::Progress;
use crate::setup::Part;
use crate::wasm_std::WasmStd;
use crate::workspace::{WASM_DEV_PROFILE, WASM_PROFILE, Workspace};

fn main() -> ExitCode {
    let command = match cli::parse(lexopt::Parser::from_env()) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    match run(command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    if let Command::Help(text) = command {
        print!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    process::end_children_on_signals().context("signals could not be watched")?;
    let progress = Progress::new();
    let workspace = Workspace::find()?;
    match command {
        Command::Help(_) => {}
        Command::Setup { parts } => drop(setup::run(&workspace, &parts, progress)?),
        Command::Runner { release } => {
            progress.step("runner");
            if let runner::Runner::Without(why) = runner::ensure(&workspace, release, progress)? {
                anyhow::bail!("there is no V8 to build it with: {why}");
            }
        }
        Command::BuildFilters { names, dev } => {
            let wasm_std = ready_for_wasm(&workspace, progress)?;
            let profile = if dev { WASM_DEV_PROFILE } else { WASM_PROFILE };
            filters::build(&workspace, &wasm_std, &names, profile, progress)?;
        }
        Command::BuildGuests => guests::build(&workspace, progress)?,
        Command::Imports { name } => {
            for import in filters::imports(&workspace, &name)? {
                println!("{import}");
            }
        }
        Command::Test(plan) => return Ok(checks::run(&workspace, &plan, progress)),
        Command::Demo { arguments } => return Err(host::demo(&workspace, &arguments, progress)),
    }
    Ok(ExitCode::SUCCESS)
}

fn ready_for_wasm(workspace: &Workspace, progress: Progress) -> anyhow::Result<WasmStd> {
    setup::run(workspace, &[Part::Wasm], progress)?.wasm_std.context("the set-up left out the WebAssembly target")
}
