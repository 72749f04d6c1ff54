//! The rows of the differential suite once more, in the harness: what a filter is told and answered there is what Envoy said.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use portcullis_tests::differential::simulated::Asked;
use portcullis_tests::differential::{rows, simulated};

fn main() -> ExitCode {
    let rows = rows::all().into_iter().filter(|row| simulated::asked(row) != Asked::Nothing);
    let trials = rows.map(|row| Trial::test(row.id.clone(), move || simulated::judge(&row).map_err(Failed::from)));
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
