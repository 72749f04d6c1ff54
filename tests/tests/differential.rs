//! Each row of the differential suite: `maps/value_absent`; and the page made of them.

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use portcullis_tests::differential::{Suite, page};
use portcullis_tests::places;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let suite = Arc::new(Suite::new());
    let mut trials = Vec::new();
    for (index, row) in suite.rows().iter().enumerate() {
        let suite = Arc::clone(&suite);
        trials.push(Trial::test(row.id.clone(), move || suite.judge(index).map_err(Failed::from)));
    }
    let shared = Arc::clone(&suite);
    trials.push(Trial::test("docs/compatibility.md says what was seen", move || page_is_current(&shared)));
    let shared = Arc::clone(&suite);
    trials.push(Trial::test("tests/differential holds what Envoy said", move || record_is_current(&shared)));
    let shared = Arc::clone(&suite);
    trials.push(Trial::test("docs/abi.md lists every deviation", move || deviations_are_listed(&shared)));
    let conclusion = libtest_mimic::run(&arguments, trials);
    suite.end();
    if conclusion.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn page_is_current(suite: &Suite) -> Result<(), Failed> {
    is_current("docs/compatibility.md", &suite.page()?)
}

fn deviations_are_listed(suite: &Suite) -> Result<(), Failed> {
    let abi = std::fs::read_to_string(places::workspace().join("docs/abi.md"))?;
    let problems = page::undocumented(&abi, suite.rows());
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n").into()) }
}

/// What was measured, row by row: a change of Envoy's, or of a row's, shows in a diff.
fn record_is_current(suite: &Suite) -> Result<(), Failed> {
    let folder = places::workspace().join("tests/differential");
    let record = suite.record()?;
    for (area, text) in &record {
        is_current(&format!("tests/differential/{area}.txt"), text)?;
    }
    for entry in std::fs::read_dir(folder)? {
        let file = entry?.path();
        let area = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !record.contains_key(&area) {
            return Err(format!("{} belongs to no area", file.display()).into());
        }
    }
    Ok(())
}

fn is_current(name: &str, text: &str) -> Result<(), Failed> {
    let file = places::workspace().join(name);
    if std::env::var_os("UPDATE").is_some() {
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        return Ok(std::fs::write(&file, text)?);
    }
    let current = std::fs::read_to_string(&file).unwrap_or_default();
    if current == text {
        return Ok(());
    }
    let line = current.lines().zip(text.lines()).position(|(old, new)| old != new).map_or(0, |line| line + 1);
    let renew = "UPDATE=1 cargo xtask test --only test -- --test differential";
    Err(format!("{name} is stale from line {line} on; read the difference, then renew it with `{renew}`").into())
}
