//! Every scenario of every filter, and of the guests made for tests, on every host it names: `envoy::jwt-auth::token without a signature is rejected`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use libtest_mimic::{Arguments, Failed, Trial};
use portcullis_e2e::{Programs, Sockets};
use portcullis_harness::{Guest, HostKind, Runner as _, Scenario, find_scenarios, judge, run_scenario};
use portcullis_tests::places;

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
    let mut groups: Vec<(GroupKey, Arc<Group>)> = Vec::new();
    for file in files {
        let shown = file.strip_prefix(places::workspace()).unwrap_or(&file).display().to_string();
        match Scenario::load(&file) {
            Ok(scenario) => {
                let scenario = Arc::new(scenario);
                for host in &scenario.hosts {
                    trials.push(trial(*host, &scenario, &mut groups));
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
    own: Option<PathBuf>,
}

fn trial(host: HostKind, scenario: &Arc<Scenario>, groups: &mut Vec<(GroupKey, Arc<Group>)>) -> Trial {
    let name = format!("{}::{}::{}", host.name(), scenario.filter, scenario.name);
    let wasm = match scenario.wasm.clone().map_or_else(|| places::filter(&scenario.filter), Ok) {
        Ok(wasm) => wasm,
        Err(error) => return Trial::test(name, || Err(Failed::from(error))),
    };
    let scenario = Arc::clone(scenario);
    if host == HostKind::Harness {
        return Trial::test(name, move || {
            let guest = Guest::load(&wasm).map_err(|error| error.to_string())?;
            run_scenario(&scenario, &guest).map_err(Failed::from)
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
            let group = Arc::new(Group::new(host, &wasm));
            groups.push((key, Arc::clone(&group)));
            group
        }
    };
    group.expect_one_more();
    Trial::test(name, move || group.run(&scenario).map_err(Failed::from))
}

/// Scenarios that share a process, which starts with the first and ends with the last of them.
struct Group {
    wasm: PathBuf,
    state: Mutex<State>,
}

struct State {
    sockets: Sockets,
    left: usize,
}

impl Group {
    fn new(host: HostKind, wasm: &Path) -> Group {
        let sockets = Sockets::new(host, Programs::find());
        Group { wasm: wasm.to_owned(), state: Mutex::new(State { sockets, left: 0 }) }
    }

    /// Announces one more scenario, so that the process ends after the last.
    fn expect_one_more(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).left += 1;
    }

    /// Runs one of the announced scenarios.
    fn run(&self, scenario: &Scenario) -> Result<(), String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = state.sockets.run(scenario, &self.wasm).and_then(|ran| judge(scenario, &ran));
        state.left = state.left.saturating_sub(1);
        if state.left == 0 {
            state.sockets.stop();
        }
        outcome
    }
}
