//! Between the proxy, which knows routes, and the library that runs operators' processes. Data flows one way: from the
//! policy to what the library is asked for.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::BodyExt;
use portcullis_config::{Isolation, Operator, OperatorEngine, Policy, SecretSource};
use portcullis_operators::config::{Limits, Placement, Replicas, SecretConfig, SecretSource as OperatorSecretSource};
use portcullis_operators::{
    ApplyError, Cause, OperatorConfig, OperatorError, OperatorSet, Operators, Settings, engine, jail,
};
use portcullis_proxy::{OperatorAnswer, OperatorFailure, OperatorHost, OperatorRequestBody, OperatorsRefused};

/// Runs the operators of a policy. Nothing is started before a policy has one.
#[derive(Debug, Default)]
pub(crate) struct Host {
    purpose: Purpose,
    running: Mutex<Option<Running>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Purpose {
    #[default]
    Serve,
    /// Stack traces go to clients.
    Develop,
    /// Beside a host that serves, perhaps: nothing of it is touched.
    Check,
}

#[derive(Clone, Debug)]
struct Running {
    operators: Operators,
    settings: Settings,
}

impl Host {
    pub(crate) fn new(purpose: Purpose) -> Self {
        Self { purpose, running: Mutex::default() }
    }

    /// The handle on the processes, once there was an operator.
    pub(crate) fn operators(&self) -> Option<Operators> {
        self.running().as_ref().map(|running| running.operators.clone())
    }

    /// Ends every process after the requests under way. Blocks.
    pub(crate) fn stop(&self) {
        if let Some(operators) = self.operators() {
            operators.stop_blocking();
        }
    }

    /// How long requests under way may go on once the end is asked for.
    pub(crate) fn drain(&self) -> Duration {
        self.running().as_ref().map_or(Duration::ZERO, |running| running.settings.drain)
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, policy: &Policy) -> Result<Running, OperatorsRefused> {
        let settings = settings(policy, self.purpose);
        let mut running = self.running();
        if let Some(running) = &*running {
            if running.settings != settings {
                return Err(OperatorsRefused::Policy(
                    "`operator_host` and `pool` cannot change while operators run\n  hint: restart, or undo that \
                     change and reload again"
                        .to_owned(),
                ));
            }
            return Ok(running.clone());
        }
        let machine = |error: &dyn std::fmt::Display| OperatorsRefused::Machine(error.to_string());
        let engine = engine::locate(settings.engine).map_err(|error| machine(&error))?;
        tracing::info!("operators run on {}", engine.name());
        if let Some(remark) = engine.remark() {
            tracing::warn!("{remark}");
        }
        let operators = Operators::start(settings.clone(), engine).map_err(|error| machine(&error))?;
        Ok(running.insert(Running { operators, settings }).clone())
    }
}

/// A policy's operators, loaded.
pub(super) struct Loaded {
    pub(super) operators: Operators,
    pub(super) set: OperatorSet,
    /// Names of those that belong to another pool.
    pub(super) elsewhere: BTreeSet<String>,
}

impl Host {
    /// Brings a policy's operators up beside those that run; nothing changes before the set is committed.
    pub(super) fn load(&self, policy: &Policy) -> Result<Loaded, OperatorsRefused> {
        let Running { operators, settings } = self.start(policy)?;
        let elsewhere: Vec<&Operator> =
            policy.operators.iter().filter(|operator| !operator.belongs_to(policy.pool.as_deref())).collect();
        for operator in &elsewhere {
            let pool = operator.pool.as_deref().unwrap_or("none");
            tracing::warn!("operator `{}` is not started here: its pool is {pool}", operator.name);
        }
        let elsewhere = elsewhere.iter().map(|operator| operator.name.clone()).collect();
        let compiled = compile(policy, &settings)?;
        let set = operators.prepare_blocking(compiled).map_err(|errors| refused(&policy.name, &errors))?;
        Ok(Loaded { operators, set, elsewhere })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}

impl OperatorHost for Host {
    fn prepare(&self, policy: &Policy) -> Result<Arc<dyn portcullis_proxy::OperatorSet>, OperatorsRefused> {
        if policy.operators.is_empty() && self.running().is_none() {
            return Ok(Arc::new(NoOperators));
        }
        Ok(Arc::new(self.load(policy)?))
    }

    fn metrics(&self) -> Vec<(String, u64)> {
        self.operators().map(|operators| operators.metrics()).unwrap_or_default()
    }
}

/// What can run here of what the policy asks for: secrets, variables and files are read here.
pub(super) fn compile(
    policy: &Policy,
    settings: &Settings,
) -> Result<Vec<portcullis_operators::Operator>, OperatorsRefused> {
    let mut compiled = Vec::new();
    let mut mistakes = Vec::new();
    for operator in policy.operators.iter().filter(|operator| operator.belongs_to(policy.pool.as_deref())) {
        // Paths of a compiled policy are absolute.
        let result = config(operator).and_then(|config| config.compile(&operator.name, Path::new("/"), settings));
        match result {
            Ok(operator) => compiled.push(operator),
            Err(found) => mistakes.extend(found),
        }
    }
    if mistakes.is_empty() {
        return Ok(compiled);
    }
    let said: Vec<String> = mistakes.iter().map(|mistake| format!("{}: {mistake}", policy.name)).collect();
    Err(OperatorsRefused::Policy(said.join("\n")))
}

pub(super) fn refused(policy: &str, errors: &[ApplyError]) -> OperatorsRefused {
    let said = errors.iter().map(|error| format!("{policy}: {error}")).collect::<Vec<_>>().join("\n");
    // One that cannot be confined or started here might elsewhere; all else is for whoever wrote the policy or the code.
    if errors.iter().any(|error| matches!(error, ApplyError::Start { .. })) {
        OperatorsRefused::Machine(said + "\n  hint: `portcullis doctor` shows what this machine can do")
    } else {
        OperatorsRefused::Policy(said)
    }
}

/// The library's settings for a policy.
pub(crate) fn settings(policy: &Policy, purpose: Purpose) -> Settings {
    let host = &policy.operator_host;
    let default = Settings::default();
    Settings {
        isolation: isolation(host.isolation),
        engine: match host.engine {
            None => engine::Choice::Any,
            Some(OperatorEngine::Runner) => engine::Choice::Runner,
            Some(OperatorEngine::Deno) => engine::Choice::Deno,
        },
        run_folder: host.run_folder.clone().unwrap_or(default.run_folder),
        prewarmed: if purpose == Purpose::Check { 0 } else { host.prewarmed },
        keeps_nothing: purpose == Purpose::Check,
        kv_folder: host.storage.clone(),
        pool: policy.pool.clone(),
        dev: purpose == Purpose::Develop,
        extra_roots: host.ca.as_ref().map(|authorities| authorities.path.clone()),
        keep_host_off_reserved_cpus: true,
        ..default
    }
}

fn isolation(isolation: Isolation) -> jail::Isolation {
    match isolation {
        Isolation::BestEffort => jail::Isolation::BestEffort,
        Isolation::Required => jail::Isolation::Required,
    }
}

fn config(operator: &Operator) -> Result<OperatorConfig, Vec<portcullis_operators::ConfigError>> {
    let texts = |list: &[portcullis_config::HostPort]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut config = OperatorConfig::new(&operator.entry);
    config.root = Some(operator.root.clone());
    config.net = texts(&operator.net);
    config.private_net = texts(&operator.private_net);
    let mut mistakes = Vec::new();
    for (index, name) in operator.env.iter().enumerate() {
        match std::env::var(name) {
            Ok(value) => drop(config.env.insert(name.clone(), value)),
            Err(_) => mistakes.push(portcullis_operators::ConfigError {
                path: format!("operators.{}.permissions.env[{index}]", operator.name),
                problem: format!("the host's environment has no text in `{name}`"),
                hint: "set it before the start, or remove it from the list".to_owned(),
            }),
        }
    }
    config.secrets = operator
        .secrets
        .iter()
        .map(|secret| {
            let from = match &secret.source {
                SecretSource::Env(name) => OperatorSecretSource::Env(name.clone()),
                SecretSource::File(path) => OperatorSecretSource::File(path.clone()),
            };
            (secret.name.clone(), SecretConfig { from, hosts: texts(&secret.hosts) })
        })
        .collect();
    config.kv = operator.kv.then_some(portcullis_operators::config::KvConfig { bytes_max: operator.limits.storage.0 });
    config.read = operator.read.iter().cloned().collect();
    config.limits = limits(&operator.limits);
    config.replicas =
        Replicas { min: operator.replicas.min, max: operator.replicas.max, idle: operator.replicas.idle_time.0 };
    config.placement = Placement {
        cpus: operator.cpus.iter().flatten().map(|cpu| *cpu as usize).collect(),
        pool: operator.pool.clone(),
    };
    config.interpreter_only = operator.interpreter_only;
    config.dangerously_allow_code_generation = operator.code_generation;
    config.isolation = isolation(operator.isolation);
    if mistakes.is_empty() { Ok(config) } else { Err(mistakes) }
}

fn limits(written: &portcullis_config::OperatorLimits) -> Limits {
    Limits {
        wall: written.wall_time.0,
        cpu: written.cpu_time.0,
        background_cpu: written.background_cpu_time.0,
        start: written.start_time.0,
        heap_bytes: written.heap.0,
        memory_bytes: written.memory.0,
        request_bytes: written.request_bytes.0,
        response_bytes: written.response_bytes.0,
        concurrency: written.concurrency,
        subrequests: written.subrequests,
        subrequest_bytes: written.subrequest_bytes.0,
        subresponse_bytes: written.subresponse_bytes.0,
        subrequest: written.subrequest_time.0,
        log_lines_per_second: written.log_lines_per_second,
        ..Limits::default()
    }
}

/// The set of a policy without operators, while none run.
#[derive(Debug)]
struct NoOperators;

impl portcullis_proxy::OperatorSet for NoOperators {
    fn commit(&self) {}

    fn call(&self, operator: &str, _: http::Request<OperatorRequestBody>) -> OperatorAnswer {
        let error = OperatorError { cause: Cause::Unknown, operator: operator.to_owned(), detail: None };
        Box::pin(std::future::ready(Err(failure(&error, None))))
    }
}

impl portcullis_proxy::OperatorSet for Loaded {
    fn commit(&self) {
        self.operators.commit_soon(&self.set);
    }

    fn call(&self, operator: &str, request: http::Request<OperatorRequestBody>) -> OperatorAnswer {
        let id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
        if self.elsewhere.contains(operator) {
            let error = self.set.refuse(operator, Cause::Elsewhere);
            return Box::pin(std::future::ready(Err(failure(&error, id.as_deref()))));
        }
        let (set, operator) = (self.set.clone(), operator.to_owned());
        Box::pin(async move {
            match set.call(&operator, request).await {
                Ok(response) => {
                    let body = |body: portcullis_operators::OperatorBody| {
                        body.map_err(move |error| failure(&error, id.as_deref())).boxed_unsync()
                    };
                    Ok(response.map(body))
                }
                Err(error) => Err(failure(&error, id.as_deref())),
            }
        })
    }
}

/// One id for client, access log and metric.
fn failure(error: &OperatorError, request_id: Option<&str>) -> OperatorFailure {
    OperatorFailure { details: error.cause.id().to_owned(), response: error.to_response(request_id) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_and_library_agree_on_every_default() {
        assert_eq!(limits(&portcullis_config::OperatorLimits::default()), Limits::default());
        let replicas = portcullis_config::Replicas::default();
        let written = Replicas { min: replicas.min, max: replicas.max, idle: replicas.idle_time.0 };
        assert_eq!(written, Replicas::default());
    }
}
