//! Every target for some seconds: `PORTCULLIS_FUZZ_SECONDS` says how many, `PORTCULLIS_FUZZ_SEED` what to begin with.

use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use portcullis_fuzz::{Budget, TARGETS, Target, drive};

/// For a plain `cargo test`; `cargo xtask test` gives them more.
const SECONDS_DEFAULT: u64 = 2;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn run(target: &Target) -> Result<(), Failed> {
    let seconds = number("PORTCULLIS_FUZZ_SECONDS").unwrap_or(SECONDS_DEFAULT);
    let seed = number("PORTCULLIS_FUZZ_SEED").unwrap_or(1);
    let report = drive(target, Budget { time: Duration::from_secs(seconds), seed });
    println!(
        "fuzz {}: {} inputs in {:.1} s, {} different outcomes",
        target.name,
        report.inputs,
        report.time.as_secs_f64(),
        report.outcomes
    );
    match report.failure {
        None => Ok(()),
        Some(failure) => Err(format!(
            "{}\non the input {:?}\nwhich is kept in {}",
            failure.message,
            failure.input.escape_ascii().to_string(),
            failure.file.map_or("no file".into(), |file| file.display().to_string())
        )
        .into()),
    }
}

fn main() {
    let trials = TARGETS.iter().map(|target| Trial::test(target.name, || run(target))).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
