//! Reads scenario files and reports their mistakes, without a module: `check_scenarios FILE...`.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut failed = 0usize;
    let mut passed = 0usize;
    for file in std::env::args().skip(1) {
        match portcullis_harness::Scenario::load(Path::new(&file)) {
            Ok(scenario) => {
                passed += 1;
                println!("{file}: {}", scenario.name);
            }
            Err(error) => {
                failed += 1;
                eprintln!("{error}");
            }
        }
    }
    println!("{passed} can be run, {failed} cannot");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
