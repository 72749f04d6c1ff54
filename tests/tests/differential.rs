//! Each row of the differential suite: `maps/value_absent`; and the page made of them.

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use portcullis_tests::differential::Suite;
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
    let conclusion = libtest_mimic::run(&arguments, trials);
    suite.end();
    if conclusion.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn page_is_current(suite: &Suite) -> Result<(), Failed> {
    let page = suite.page()?;
    let file = places::workspace().join("docs/compatibility.md");
    if std::env::var_os("UPDATE").is_some() {
        return Ok(std::fs::write(&file, page)?);
    }
    let current = std::fs::read_to_string(&file).unwrap_or_default();
    if current == page {
        return Ok(());
    }
    let renew = "UPDATE=1 cargo xtask test --only test -- --test differential";
    Err(format!("docs/compatibility.md is stale; renew it with `{renew}`").into())
}
