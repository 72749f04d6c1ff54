//! Runs scenario files and folders on the simulated host, as `portcullis test` does, without building the proxy first.

use std::path::PathBuf;
use std::process::ExitCode;

use portcullis_harness::{RunOptions, Simulated, run};

fn main() -> ExitCode {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let report = run(&paths, &RunOptions::default(), &mut Simulated::default(), &mut |_| {});
    print!("{report}");
    if report.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
