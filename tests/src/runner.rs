//! Runs scenarios against hosts that listen on sockets.
//!
//! Scenarios with the same module and configuration share a process, which starts with the first and ends with the
//! last of them. Scenarios that are `fresh` or have callouts have a process of their own: what filters remember from others
//! would change what comes of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use portcullis_harness::{HostKind, Observed, ObservedRequest, Scenario, Step, judge, refused_as_expected};

use crate::client;
use crate::policy::PolicyParts;
use crate::server::Server;
use crate::upstream::Upstream;

/// How long a counter may lag behind the response that it counts.
const COUNTER_LAG_MAX: Duration = Duration::from_secs(5);

/// Scenarios that share a process on one host.
pub struct Group {
    host: HostKind,
    wasm: PathBuf,
    filter: String,
    configuration: Vec<u8>,
    callouts: Vec<String>,
    http2: Vec<String>,
    state: Mutex<State>,
}

struct State {
    running: Option<Result<Running, String>>,
    left: usize,
}

/// A host, what stands behind it, and the folder of its files.
struct Running {
    server: Server,
    origin: Upstream,
    callouts: BTreeMap<String, Upstream>,
    _folder: tempfile::TempDir,
}

impl Group {
    /// A group for this scenario on `host`.
    pub fn new(host: HostKind, scenario: &Scenario, wasm: PathBuf) -> Group {
        Group {
            host,
            wasm,
            filter: scenario.filter.clone(),
            configuration: scenario.configuration.clone(),
            callouts: scenario.callout_upstreams.clone(),
            http2: scenario.http2_upstreams.clone(),
            state: Mutex::new(State { running: None, left: 0 }),
        }
    }

    /// Announces one more scenario, so that the process ends after the last.
    pub fn expect_one_more(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).left += 1;
    }

    /// Runs one of the announced scenarios.
    pub fn run(&self, scenario: &Scenario) -> Result<(), String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = match &scenario.refused {
            Some(texts) => self.start().map_or_else(
                |error| refused_as_expected(texts, &error),
                |_| Err("the configuration was accepted, but must be refused".to_owned()),
            ),
            None => match state.running.get_or_insert_with(|| self.start()) {
                Ok(running) => running.run(scenario),
                Err(error) => Err(error.clone()),
            },
        };
        state.left = state.left.saturating_sub(1);
        if state.left == 0 {
            state.running = None;
        }
        outcome
    }

    fn start(&self) -> Result<Running, String> {
        let origin = Upstream::start()?;
        let mut callouts = BTreeMap::new();
        for name in &self.callouts {
            callouts.insert(name.clone(), Upstream::start()?);
        }
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let addresses: Vec<_> = callouts.iter().map(|(name, upstream)| (name.clone(), upstream.address())).collect();
        let policy = PolicyParts {
            filter: &self.filter,
            wasm: &self.wasm,
            configuration: &self.configuration,
            origin: origin.address(),
            callouts: &addresses,
            http2: &self.http2,
            failure_policy: None,
        }
        .write(folder.path())?;
        let server = Server::start(self.host, &policy)?;
        Ok(Running { server, origin, callouts, _folder: folder })
    }
}

impl Running {
    fn run(&mut self, scenario: &Scenario) -> Result<(), String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let steps = scenario.plan(now).map_err(|error| error.to_string())?;
        let mut failures = Vec::new();
        for (index, step) in steps.iter().enumerate() {
            let observed = self.exchange(step)?;
            if let Some(failure) = judge(index, steps.len(), step, &observed) {
                failures.push(failure);
            }
        }
        if failures.is_empty() {
            return Ok(());
        }
        failures.push(format!("log of the process:\n{}", self.server.log()));
        Err(failures.join("\n"))
    }

    fn exchange(&mut self, step: &Step) -> Result<Observed, String> {
        for (name, answers) in &step.callouts {
            if let Some(upstream) = self.callouts.get(name) {
                upstream.answer(answers.clone());
            }
        }
        self.origin.answer_always(step.upstream_response.clone());
        self.origin.take_requests();
        for upstream in self.callouts.values() {
            upstream.take_requests();
        }
        let before = self.server.counters()?;
        let response = client::send(self.server.address(), &step.request)
            .map_err(|error| format!("{error}\n{}", self.server.log()))?;
        let upstream = self.origin.take_requests();
        let callouts: BTreeMap<String, Vec<ObservedRequest>> = self
            .callouts
            .iter()
            .map(|(name, upstream)| (name.clone(), upstream.take_requests()))
            .filter(|(_, requests)| !requests.is_empty())
            .collect();
        // What the upstream was never asked, it cannot have answered. The other way round nothing can be said: a
        // filter may have replaced the upstream's answer.
        let local = if upstream.is_empty() { Some(true) } else { None };
        let mut observed =
            Observed { local: response.as_ref().and(local), response, upstream, callouts, ..Observed::default() };
        let deadline = Instant::now() + COUNTER_LAG_MAX;
        loop {
            observed.counters = self.server.counters()?;
            for (name, value) in &mut observed.counters {
                *value -= before.get(name).copied().unwrap_or_default();
            }
            // A host counts much of its own; what filters count by rule, and what the scenario asks for, matters here.
            let wanted = &step.expect.counters;
            observed
                .counters
                .retain(|name, change| *change != 0 && (name.contains(".rule.") || wanted.contains_key(name)));
            let counted = step
                .expect
                .counters
                .iter()
                .all(|(name, change)| observed.counters.get(name).copied().unwrap_or_default() >= *change);
            if counted || Instant::now() > deadline {
                return Ok(observed);
            }
            // Filters may count after the response, and hosts tell nobody; they can only be asked again.
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
