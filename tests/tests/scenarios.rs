//! Every scenario of every filter, and of the guests made for tests, on every host it names: `envoy::jwt-auth::token without a signature is rejected`.

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use portcullis_harness::{Guest, HostKind, Scenario, find_scenarios, run_scenario};
use portcullis_tests::places;
use portcullis_tests::runner::Group;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // The trials own the groups, and these their processes: all have ended when `run` returns.
    let conclusion = libtest_mimic::run(&arguments, trials());
    if conclusion.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn trials() -> Vec<Trial> {
    let mut files = Vec::new();
    for folder in ["filters", "tests/guests"] {
        match find_scenarios(&places::workspace().join(folder)) {
            Ok(found) => files.extend(found),
            Err(error) => return vec![Trial::test("scenarios can be found", || Err(Failed::from(error)))],
        }
    }
    let mut trials = Vec::new();
    let mut guests = Guests::default();
    let mut groups: Vec<(GroupKey, Arc<Group>)> = Vec::new();
    for file in files {
        let shown = file.strip_prefix(places::workspace()).unwrap_or(&file).display().to_string();
        match Scenario::load(&file) {
            Ok(scenario) => {
                let scenario = Arc::new(scenario);
                for host in &scenario.hosts {
                    trials.push(trial(*host, &scenario, &mut guests, &mut groups));
                }
            }
            Err(error) => {
                let error = error.to_string();
                trials.push(Trial::test(format!("{shown} can be read"), || Err(Failed::from(error))));
            }
        }
    }
    trials
}

/// Scenarios with equal keys share a process.
#[derive(PartialEq, Eq)]
struct GroupKey {
    host: HostKind,
    filter: String,
    configuration: Vec<u8>,
    /// Set where the scenario must not share.
    own: Option<std::path::PathBuf>,
}

fn trial(
    host: HostKind,
    scenario: &Arc<Scenario>,
    guests: &mut Guests,
    groups: &mut Vec<(GroupKey, Arc<Group>)>,
) -> Trial {
    let name = format!("{}::{}::{}", host.name(), scenario.filter, scenario.name);
    let wasm = match scenario.wasm.clone().map_or_else(|| places::filter(&scenario.filter), Ok) {
        Ok(wasm) => wasm,
        Err(error) => return Trial::test(name, || Err(Failed::from(error))),
    };
    let scenario = Arc::clone(scenario);
    if host == HostKind::Harness {
        let guest = guests.get(&wasm);
        return Trial::test(name, move || {
            let guest = guest.get_or_init(|| Guest::load(&wasm).map_err(|error| error.to_string())).as_ref()?;
            run_scenario(&scenario, guest, &mut Vec::new()).map_err(Failed::from)
        });
    }
    let alone = scenario.fresh || scenario.refused.is_some();
    let key = GroupKey {
        host,
        filter: scenario.filter.clone(),
        configuration: scenario.configuration.clone(),
        own: alone.then(|| scenario.file.clone()),
    };
    let group = match groups.iter().find(|(present, _)| *present == key) {
        Some((_, group)) => Arc::clone(group),
        None => {
            let group = Arc::new(Group::new(host, &scenario, wasm));
            groups.push((key, Arc::clone(&group)));
            group
        }
    };
    group.expect_one_more();
    Trial::test(name, move || group.run(&scenario).map_err(Failed::from))
}

type SharedGuest = Arc<std::sync::OnceLock<Result<Guest, String>>>;

/// Modules by file, each compiled once, by the first test that needs it.
#[derive(Default)]
struct Guests(std::collections::BTreeMap<std::path::PathBuf, SharedGuest>);

impl Guests {
    fn get(&mut self, wasm: &std::path::Path) -> SharedGuest {
        Arc::clone(self.0.entry(wasm.to_owned()).or_default())
    }
}
