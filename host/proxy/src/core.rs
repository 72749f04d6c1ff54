//! [`Core`]: one worker's filters, upstreams and the requests in them, under one version of the policy.
//!
//! Every event goes through [`Core::with`], which afterwards carries out all that the filters asked for. Carrying out
//! only fills outboxes, sets flags and starts tasks; it never calls back into the filters, so no borrow is held twice.
//! After a reload a worker has two cores for a while: the new one for new requests, the old one until its last request
//! is finished.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portcullis_abi::{
    Action, Call, CallAnswer, CallId, ClosedBy, Embedder, GrpcOpen, Lint, LogLevel, LogRecord, Part, StreamId,
    StreamInfo, Worker,
};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::callout;
use crate::exchange::Exchange;
use crate::grpc::{self, Outgoing};
use crate::metrics::{Counter, Registry, WorkerMetrics};
use crate::outbox::Bell;
use crate::plan::Plan;
use crate::relay::Relay;
use crate::upstream::Upstream;

/// See the module.
pub(crate) struct Core {
    pub(crate) plan: Arc<Plan>,
    pub(crate) upstreams: Vec<Rc<Upstream>>,
    pub(crate) metrics: Rc<WorkerMetrics>,
    worker: RefCell<Worker>,
    exchanges: RefCell<HashMap<StreamId, Rc<Exchange>>>,
    relays: RefCell<HashMap<StreamId, Rc<Relay>>>,
    calls: RefCell<HashMap<CallId, Running>>,
    refusals: Refusals,
    next_timer: Cell<Option<Duration>>,
    timer_changed: Bell,
    notified: Arc<Notify>,
    life: watch::Sender<Life>,
}

/// What a core is still good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Life {
    /// New requests.
    Serving,
    /// Those that it has.
    Retired,
    /// None is left; filters that are not done yet have a moment.
    Leaving,
    /// Nothing.
    Ended,
}

/// How long filters may take between `proxy_on_done` and `proxy_done`.
const FAREWELL_TIME: Duration = Duration::from_secs(5);

/// A callout under way.
struct Running {
    task: AbortHandle,
    /// What is still to be sent, of a gRPC exchange.
    outgoing: Option<Rc<Outgoing>>,
}

/// A worker whose filters do not start.
#[derive(Clone, Debug)]
pub(crate) struct CoreError(pub(crate) String);

impl Core {
    /// Starts the filters. Takes as long as their start takes: milliseconds for most, bounded by the filters' limits.
    pub(crate) fn start(
        plan: &Arc<Plan>,
        registry: &Registry,
        metrics: &Rc<WorkerMetrics>,
        number: usize,
    ) -> Result<Rc<Core>, CoreError> {
        let policy = &plan.policy;
        let start_log = StartLog::default();
        let embedder = HostEmbedder {
            plan: Arc::clone(plan),
            start_log: start_log.clone(),
            lines: policy
                .filters
                .iter()
                .map(|filter| {
                    let labels = [("filter", filter.name.as_str())];
                    let help = "Lines that filters logged.";
                    (filter.name.clone(), registry.counter(number, "portcullis_filter_log_lines_total", help, &labels))
                })
                .collect(),
        };
        let worker = Worker::start(Arc::clone(&plan.shared), plan.plugins.clone(), Box::new(embedder))
            .map_err(|error| CoreError(error.to_string()))?;
        start_log.end(number == 0);
        let upstreams = policy
            .upstreams
            .iter()
            .zip(&plan.upstream_tls)
            .map(|(settings, tls)| Rc::new(Upstream::new(settings.clone(), tls.clone(), registry, number)))
            .collect();
        let refusals = Refusals::new(plan, registry, number);
        let core = Rc::new(Core {
            plan: Arc::clone(plan),
            upstreams,
            metrics: Rc::clone(metrics),
            worker: RefCell::new(worker),
            exchanges: RefCell::default(),
            relays: RefCell::default(),
            calls: RefCell::default(),
            refusals,
            next_timer: Cell::new(None),
            timer_changed: Bell::default(),
            notified: Arc::new(Notify::new()),
            life: watch::Sender::new(Life::Serving),
        });
        let notified = Arc::clone(&core.notified);
        core.with(|worker| worker.set_waker(Arc::new(move || notified.notify_one())));
        tokio::task::spawn_local(keep_time(Rc::clone(&core)));
        Ok(core)
    }

    /// Calls into the filters, then carries out what they asked for.
    pub(crate) fn with<R>(self: &Rc<Self>, act: impl FnOnce(&mut Worker) -> R) -> R {
        let mut worker = self.worker.borrow_mut();
        let result = act(&mut worker);
        self.carry_out_all(&mut worker);
        result
    }

    /// Begins a request; its exchange is known before the filters can ask for anything.
    pub(crate) fn open(self: &Rc<Self>, filters: &[usize], info: StreamInfo, exchange: &Rc<Exchange>) -> StreamId {
        let mut worker = self.worker.borrow_mut();
        let id = worker.open(filters, info);
        self.exchanges.borrow_mut().insert(id, Rc::clone(exchange));
        self.carry_out_all(&mut worker);
        id
    }

    /// Begins a TCP connection, likewise.
    pub(crate) fn open_connection(self: &Rc<Self>, filters: &[usize], info: StreamInfo, relay: &Rc<Relay>) -> StreamId {
        let mut worker = self.worker.borrow_mut();
        let id = worker.open_connection(filters, info);
        self.relays.borrow_mut().insert(id, Rc::clone(relay));
        self.carry_out_all(&mut worker);
        id
    }

    /// Ends a TCP connection. Exactly once for each [`Core::open_connection`].
    pub(crate) fn close_connection(self: &Rc<Self>, id: StreamId, by: ClosedBy, ending: portcullis_abi::Ending) {
        self.with(|worker| worker.close_connection(id, by, ending));
        self.relays.borrow_mut().remove(&id);
        self.end_if_unused();
    }

    /// Whether the filters take more of a body now.
    pub(crate) fn may_read(&self, id: StreamId, direction: portcullis_abi::Direction) -> bool {
        self.worker.borrow().may_read(id, direction)
    }

    /// Ends a request. Exactly once for each [`Core::open`].
    pub(crate) fn finish(self: &Rc<Self>, id: StreamId, ending: portcullis_abi::Ending) {
        self.with(|worker| worker.finish(id, ending));
        self.exchanges.borrow_mut().remove(&id);
        self.end_if_unused();
    }

    /// New requests go elsewhere from now on.
    pub(crate) fn retire(self: &Rc<Self>) {
        self.grow_to(Life::Retired);
        self.end_if_unused();
    }

    /// Ends when new requests have gone elsewhere for this time.
    pub(crate) async fn retired_for(&self, time: Duration) {
        // The sender lives as long as this, so that waiting cannot fail.
        self.reached(Life::Retired).await;
        tokio::time::sleep(time).await;
    }

    /// Ends when all filters have ended.
    pub(crate) async fn ended(&self) {
        self.reached(Life::Ended).await;
    }

    async fn reached(&self, life: Life) {
        drop(self.life.subscribe().wait_for(|reached| *reached >= life).await);
    }

    /// Whether filters were told of the end and are not done yet.
    pub(crate) fn is_leaving(&self) -> bool {
        self.life() == Life::Leaving
    }

    /// Whether all filters have ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.life() == Life::Ended
    }

    fn life(&self) -> Life {
        *self.life.borrow()
    }

    fn grow_to(&self, life: Life) {
        self.life.send_if_modified(|reached| life > std::mem::replace(reached, life.max(*reached)));
    }

    /// Tells the filters of the end once nothing is left that they could be asked about.
    fn end_if_unused(self: &Rc<Self>) {
        let is_unused = self.exchanges.borrow().is_empty() && self.relays.borrow().is_empty();
        if self.life() != Life::Retired || !is_unused {
            return;
        }
        self.grow_to(Life::Leaving);
        self.with(Worker::shutdown);
        if self.has_ended() {
            return;
        }
        let core = Rc::clone(self);
        tokio::task::spawn_local(async move {
            if tokio::time::timeout(FAREWELL_TIME, core.ended()).await.is_err() {
                core.abandon();
            }
        });
    }

    /// Ends the filters that are not done yet.
    pub(crate) fn abandon(self: &Rc<Self>) {
        if !self.is_leaving() {
            return;
        }
        for filter in self.with(Worker::abandon) {
            tracing::warn!(filter, "ended before it was done: it had answered no to `proxy_on_done`");
        }
    }

    fn carry_out_all(self: &Rc<Self>, worker: &mut Worker) {
        while let Some(action) = worker.poll_action() {
            self.carry_out(action);
        }
        if self.is_leaving() && worker.has_ended() {
            self.grow_to(Life::Ended);
            for (_, call) in self.calls.borrow_mut().drain() {
                call.task.abort();
            }
        }
        let next = worker.next_timer();
        if self.next_timer.replace(next) != next {
            self.timer_changed.ring();
        }
    }

    fn carry_out(self: &Rc<Self>, action: Action) {
        match action {
            Action::Request(id, part) => {
                if let Some(exchange) = self.exchange(id) {
                    exchange.touch();
                    exchange.request.put(part);
                }
            }
            Action::Response(id, part) => {
                if let Some(exchange) = self.exchange(id) {
                    exchange.touch();
                    if let Part::Headers { details: Some(details), .. } = &part {
                        exchange.answered_here();
                        self.refusals.count(details);
                    }
                    exchange.response.put(part);
                }
            }
            Action::CancelUpstream(id) => {
                if let Some(exchange) = self.exchange(id) {
                    exchange.cancel_upstream();
                }
            }
            Action::Reset(id) => {
                if let Some(exchange) = self.exchange(id) {
                    exchange.reset();
                }
            }
            Action::Readable(id, direction) => {
                if let Some(exchange) = self.exchange(id) {
                    exchange.readable(direction);
                } else if let Some(relay) = self.relay(id) {
                    relay.changed.ring();
                }
            }
            Action::Connect(id) => {
                if let Some(relay) = self.relay(id) {
                    relay.connect();
                }
            }
            Action::Data { id, direction, bytes, end_of_stream } => {
                if let Some(relay) = self.relay(id) {
                    relay.put(direction, bytes, end_of_stream);
                }
            }
            Action::Close(id, details) => {
                if let Some(relay) = self.relay(id) {
                    relay.close(details);
                }
            }
            Action::Call(id, call) => self.start_call(id, call),
            Action::GrpcOpen(id, open) => self.start_exchange(id, open),
            Action::GrpcSend(id, bytes, end) => {
                if let Some(Running { outgoing: Some(outgoing), .. }) = self.calls.borrow().get(&id) {
                    outgoing.put(bytes, end);
                }
            }
            Action::CancelCall(id) => {
                let call = self.calls.borrow_mut().remove(&id);
                if let Some(call) = call {
                    call.task.abort();
                }
            }
            other => {
                let action = std::mem::discriminant(&other);
                tracing::error!(?action, "a filter asked for what this proxy cannot do");
            }
        }
    }

    fn relay(&self, id: StreamId) -> Option<Rc<Relay>> {
        self.relays.borrow().get(&id).cloned()
    }

    fn exchange(&self, id: StreamId) -> Option<Rc<Exchange>> {
        self.exchanges.borrow().get(&id).cloned()
    }

    fn start_call(self: &Rc<Self>, id: CallId, call: Call) {
        let core = Rc::clone(self);
        let task = tokio::task::spawn_local(async move {
            let answer = match core.upstreams.iter().find(|upstream| upstream.name() == call.upstream) {
                Some(upstream) => callout::perform(upstream, call).await,
                None => CallAnswer::unavailable("reset reason: no such upstream"),
            };
            core.calls.borrow_mut().remove(&id);
            core.with(|worker| worker.call_answered(id, answer));
        });
        self.calls.borrow_mut().insert(id, Running { task: task.abort_handle(), outgoing: None });
    }

    fn start_exchange(self: &Rc<Self>, id: CallId, open: GrpcOpen) {
        let core = Rc::clone(self);
        let outgoing = Rc::new(Outgoing::default());
        let task = tokio::task::spawn_local({
            let outgoing = Rc::clone(&outgoing);
            async move {
                grpc::carry(&core, id, open, outgoing).await;
                core.calls.borrow_mut().remove(&id);
            }
        });
        self.calls.borrow_mut().insert(id, Running { task: task.abort_handle(), outgoing: Some(outgoing) });
    }

    /// Which filters run and which have failed.
    pub(crate) fn health(&self) -> Vec<portcullis_abi::PluginHealth> {
        self.worker.borrow().health()
    }

    pub(crate) fn close_idle_connections(&self) {
        for upstream in &self.upstreams {
            upstream.close_idle();
        }
    }
}

/// Counts responses that filters made, by filter.
///
/// A response does not say whose it is, but our filters write `portcullis.<module>.<reason>` as its details; the module is
/// found by its file's name, or by the name that the policy gives it.
struct Refusals {
    by_module: HashMap<String, Arc<Counter>>,
    others: Arc<Counter>,
}

impl Refusals {
    fn new(plan: &Plan, registry: &Registry, number: usize) -> Refusals {
        let counter = |filter: &str| {
            registry.counter(
                number,
                "portcullis_filter_responses_total",
                "Responses that a filter made itself, denials above all; `-` where the details do not tell which.",
                &[("filter", filter)],
            )
        };
        let mut by_module = HashMap::new();
        for filter in &plan.policy.filters {
            let file = filter.module_path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            for name in [Some(filter.name.clone()), file].into_iter().flatten() {
                by_module.entry(name.replace('-', "_")).or_insert_with(|| counter(&filter.name));
            }
        }
        Refusals { by_module, others: counter("-") }
    }

    /// Responses of the host itself, such as 404 and 503, have other details.
    fn count(&self, details: &str) {
        let mut parts = details.split('.');
        if parts.next() != Some("portcullis") {
            return;
        }
        parts.next().and_then(|module| self.by_module.get(module)).unwrap_or(&self.others).increment();
    }
}

/// Runs ticks and queue notifications until the filters have ended.
async fn keep_time(core: Rc<Core>) {
    while !core.has_ended() {
        let due = core.next_timer.get().map(|at| core.plan.epoch + at);
        let tick = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let mut armed = false;
        let changed = std::future::poll_fn(|cx| {
            if std::mem::replace(&mut armed, true) {
                return std::task::Poll::Ready(());
            }
            core.timer_changed.wait(cx);
            std::task::Poll::Pending
        });
        tokio::select! {
            () = tick => core.with(Worker::run_timers),
            () = core.notified.notified() => core.with(Worker::run_notifications),
            () = changed => {}
            () = core.ended() => {}
        }
        // What is due already is due again at once; requests come in between.
        tokio::task::yield_now().await;
    }
}

/// What filters say while they start. If one refuses, the error holds its lines; if all start, one worker's lines are
/// logged and not every worker's, which say the same.
#[derive(Clone)]
struct StartLog(Rc<RefCell<Option<Vec<StartLine>>>>);

/// Level, filter, text.
type StartLine = (LogLevel, String, String);

impl Default for StartLog {
    fn default() -> StartLog {
        StartLog(Rc::new(RefCell::new(Some(Vec::new()))))
    }
}

impl StartLog {
    /// Whether the line was taken; afterwards lines are logged as they come.
    fn take(&self, record: &LogRecord<'_>) -> bool {
        match &mut *self.0.borrow_mut() {
            Some(lines) => {
                lines.push((record.level, record.plugin.to_owned(), record.message.to_owned()));
                true
            }
            None => false,
        }
    }

    fn end(&self, say: bool) {
        let lines = self.0.borrow_mut().take().unwrap_or_default();
        for (level, filter, message) in lines.iter().filter(|_| say) {
            log_line(*level, filter, message);
        }
    }
}

/// Target of the log lines that tell what filters do in vain. They come with each request that makes a filter do so: show them to
/// who asks for them.
pub const LINT_TARGET: &str = "portcullis::lint";

struct HostEmbedder {
    plan: Arc<Plan>,
    start_log: StartLog,
    lines: HashMap<String, Arc<Counter>>,
}

impl Embedder for HostEmbedder {
    fn log(&mut self, record: &LogRecord<'_>) {
        if let Some(lines) = self.lines.get(record.plugin) {
            lines.increment();
        }
        if !self.start_log.take(record) {
            log_line(record.level, record.plugin, record.message);
        }
    }

    fn unix_nanos(&self) -> u64 {
        unix_nanos()
    }

    fn monotonic(&self) -> Duration {
        Instant::now().duration_since(self.plan.epoch)
    }

    fn has_upstream(&self, name: &str) -> bool {
        self.plan.policy.upstream_named(name).is_some()
    }

    fn log_level(&self) -> LogLevel {
        use tracing::level_filters::LevelFilter;
        match LevelFilter::current() {
            LevelFilter::TRACE => LogLevel::Trace,
            LevelFilter::DEBUG => LogLevel::Debug,
            LevelFilter::INFO => LogLevel::Info,
            LevelFilter::WARN => LogLevel::Warn,
            _ => LogLevel::Error,
        }
    }

    fn lint(&mut self, lint: &Lint<'_>) {
        tracing::warn!(
            target: LINT_TARGET,
            filter = lint.plugin, callback = lint.callback, call = lint.call, "{}", one_line(&lint.reason)
        );
    }
}

fn log_line(level: LogLevel, filter: &str, message: &str) {
    // A filter's text may hold what a client sent: it must not look like another line.
    let message = one_line(message);
    match level {
        LogLevel::Trace => tracing::trace!(target: "portcullis::filter", filter, "{message}"),
        LogLevel::Debug => tracing::debug!(target: "portcullis::filter", filter, "{message}"),
        LogLevel::Info => tracing::info!(target: "portcullis::filter", filter, "{message}"),
        LogLevel::Warn => tracing::warn!(target: "portcullis::filter", filter, "{message}"),
        LogLevel::Error | LogLevel::Critical => tracing::error!(target: "portcullis::filter", filter, "{message}"),
    }
}

fn one_line(text: &str) -> std::borrow::Cow<'_, str> {
    if !text.contains(|c: char| c.is_control()) {
        return text.into();
    }
    let mut line = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line.into()
}

pub(crate) fn unix_nanos() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filters_text_stays_on_its_line() {
        assert_eq!(one_line("plain \u{e9}"), "plain \u{e9}");
        assert_eq!(one_line("a\r\nERROR forged\u{1b}[0m"), "a\\r\\nERROR forged\\u{1b}[0m");
    }
}
