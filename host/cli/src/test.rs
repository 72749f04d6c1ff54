//! `portcullis test`: runs scenario files on the simulated host.

use std::path::PathBuf;

use portcullis_harness::RunOptions;

use crate::failure::Failure;
use crate::print;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Scenario files, or folders that hold a `scenarios` folder somewhere below. Default: the current folder.
    #[arg(value_name = "PATH", default_value = ".")]
    paths: Vec<PathBuf>,
    /// The module to test, instead of the one that each scenario belongs to.
    #[arg(long, value_name = "WASM")]
    filter: Option<PathBuf>,
    /// Only scenarios whose name or file contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let options = RunOptions { wasm: arguments.filter.clone(), only: arguments.only.clone() };
    let report = portcullis_harness::run(&arguments.paths, &options);
    print(&report.to_string())?;
    if report.is_success() { Ok(()) } else { Err(Failure::Reported) }
}
