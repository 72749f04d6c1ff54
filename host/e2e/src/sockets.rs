//! [`Sockets`]: scenarios on hosts that listen on sockets.
//!
//! Scenarios with the same module and configuration share a process, one after the other. Scenarios that are `fresh` or have
//! callouts have a process of their own: what filters remember from others would change what comes of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use portcullis_harness::{HostKind, Observed, ObservedRequest, Ran, Runner, Scenario, Step};

use crate::client;
use crate::policy::PolicyParts;
use crate::programs::Programs;
use crate::server::Server;
use crate::upstream::Upstream;

/// How long a counter may lag behind the response that it counts.
const COUNTER_LAG_MAX: Duration = Duration::from_secs(5);

/// Runs scenarios on `portcullis serve` or on the real Envoy.
pub struct Sockets {
    host: HostKind,
    programs: Programs,
    running: Option<(Key, Running)>,
}

/// Scenarios with equal keys share a process.
#[derive(PartialEq, Eq)]
struct Key {
    wasm: PathBuf,
    filter: String,
    configuration: Vec<u8>,
    root_id: String,
    vm_id: String,
}

/// A host, what stands behind it, and the folder of its files.
struct Running {
    server: Server,
    origin: Upstream,
    callouts: BTreeMap<String, Upstream>,
    _folder: tempfile::TempDir,
}

impl Sockets {
    /// Nothing is started until a scenario is run.
    pub fn new(host: HostKind, programs: Programs) -> Sockets {
        Sockets { host, programs, running: None }
    }

    /// Ends the process, if one runs.
    pub fn stop(&mut self) {
        self.running = None;
    }

    fn start(&self, scenario: &Scenario, wasm: &Path) -> Result<Running, String> {
        let origin = Upstream::start()?;
        let mut callouts = BTreeMap::new();
        for name in &scenario.callout_upstreams {
            callouts.insert(name.clone(), Upstream::start()?);
        }
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let addresses: Vec<_> = callouts.iter().map(|(name, upstream)| (name.clone(), upstream.address())).collect();
        let parts = PolicyParts {
            filter: &scenario.filter,
            wasm,
            configuration: &scenario.configuration,
            origin: origin.address(),
            callouts: &addresses,
            http2: &scenario.http2_upstreams,
            failure_policy: None,
        };
        let mut more = Vec::new();
        for (name, value) in [("root_id", &scenario.root_id), ("vm_id", &scenario.vm_id)] {
            if !value.is_empty() {
                more.push(format!("{name}: {}", serde_json::Value::from(value.as_str())));
            }
        }
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        let policy = parts.write_with(folder.path(), &more)?;
        let server = Server::start_with(&self.programs, self.host, &policy, |_| true)?;
        Ok(Running { server, origin, callouts, _folder: folder })
    }
}

impl Runner for Sockets {
    fn host(&self) -> HostKind {
        self.host
    }

    fn run(&mut self, scenario: &Scenario, wasm: &Path) -> Result<Ran, String> {
        if scenario.refused.is_some() {
            // What the host says while it does not come up is the filter's refusal.
            return Ok(match self.start(scenario, wasm) {
                Err(said) => Ran::Refused(said),
                Ok(_) => Ran::accepted(),
            });
        }
        if scenario.fresh {
            return self.start(scenario, wasm)?.run(scenario);
        }
        let key = Key {
            wasm: wasm.to_owned(),
            filter: scenario.filter.clone(),
            configuration: scenario.configuration.clone(),
            root_id: scenario.root_id.clone(),
            vm_id: scenario.vm_id.clone(),
        };
        if let Some((running_key, running)) = &mut self.running
            && *running_key == key
        {
            return running.run(scenario);
        }
        self.running = None;
        let mut running = self.start(scenario, wasm)?;
        let ran = running.run(scenario);
        self.running = Some((key, running));
        ran
    }
}

impl Running {
    fn run(&mut self, scenario: &Scenario) -> Result<Ran, String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut ran = Vec::new();
        for step in scenario.plan(now).map_err(|error| error.to_string())? {
            let observed =
                self.exchange(&step).map_err(|error| format!("{error}\nlog of the process:\n{}", self.server.log()))?;
            ran.push((step, vec![observed]));
        }
        Ok(Ran::Steps {
            steps: ran,
            lints: Vec::new(),
            log: self.server.log(),
            start: portcullis_harness::Trace::default(),
        })
    }

    fn exchange(&mut self, step: &Step) -> Result<Observed, String> {
        let Some(request) = &step.request else {
            return Err("a step without a request runs in the harness only".to_owned());
        };
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
        let response = client::send(self.server.address(), request)?;
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
