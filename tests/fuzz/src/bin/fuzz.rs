//! `fuzz TARGET SECONDS [SEED]`: one target for as long as wanted.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portcullis_fuzz::{Budget, TARGETS, drive};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (Some(target), Some(seconds)) = (
        words.first().and_then(|name| TARGETS.iter().find(|target| target.name == name)),
        words.get(1).and_then(|word| word.parse().ok()),
    ) else {
        eprintln!("usage: fuzz TARGET SECONDS [SEED]\n\ntargets:");
        for target in TARGETS {
            eprintln!("  {:<20} {}", target.name, target.about);
        }
        return ExitCode::from(2);
    };
    let by_clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs());
    let seed = words.get(2).and_then(|word| word.parse().ok()).unwrap_or_else(by_clock);
    let report = drive(target, Budget { time: Duration::from_secs(seconds), seed });
    println!(
        "{}: {} inputs in {:?}, {} different outcomes, seed {seed}",
        target.name, report.inputs, report.time, report.outcomes
    );
    match report.failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            eprintln!(
                "{}\non the input {:?}\nwhich is kept in {:?}",
                failure.message,
                failure.input.escape_ascii().to_string(),
                failure.file
            );
            ExitCode::FAILURE
        }
    }
}
