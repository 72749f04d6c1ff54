//! The processes of one operator in one version of its code, and what is counted about it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, watch};

use crate::bundle::Bundle;
use crate::cause::Cause;
use crate::config::Operator;
use crate::egress::Refusal;
use crate::kv::Store;
use crate::logs::{LogBook, Rate};
use crate::process::{Flight, Process};

/// One operator in one version.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) operator: Operator,
    pub(crate) bundle: Bundle,
    pub(crate) store: Option<Arc<Store>>,
    pub(crate) log: Arc<LogBook>,
    pub(crate) counters: Arc<Counters>,
    /// What the handler throws is shown to clients.
    pub(crate) dev: bool,
    pub(crate) processes: ArcSwap<Vec<Arc<Process>>>,
    /// Somebody waits for a process.
    pub(crate) demand: Notify,
    pub(crate) waiting: AtomicUsize,
    /// A place in a process became free.
    pub(crate) freed: Notify,
    /// Grows with every change of `processes` or `trouble`.
    pub(crate) changed: watch::Sender<Changed>,
    /// Set once: the pool takes no new requests and ends when the last one is answered.
    pub(crate) stopping: watch::Sender<bool>,
    /// Of lines about requests that failed: as many as the operator itself may write.
    told: Mutex<Rate>,
}

/// What waiting requests are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(crate) version: u64,
    /// Why no process can be started at the moment.
    pub(crate) trouble: Option<Cause>,
}

impl Pool {
    pub(crate) fn new(
        operator: Operator,
        bundle: Bundle,
        store: Option<Arc<Store>>,
        log: Arc<LogBook>,
        counters: Arc<Counters>,
        dev: bool,
    ) -> Self {
        let told = Mutex::new(Rate::new(operator.limits.log_lines_per_second, Instant::now()));
        Self {
            operator,
            bundle,
            store,
            log,
            counters,
            dev,
            processes: ArcSwap::default(),
            demand: Notify::new(),
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
            changed: watch::Sender::new(Changed::default()),
            stopping: watch::Sender::new(false),
            told,
        }
    }

    /// Counts a request whose answer is not the operator's, or not all of it, and says so: to whoever runs the host, and to the
    /// author where it is the operator's doing. `process` is 0 where no process had it.
    pub(crate) fn failed(&self, process: u64, cause: Cause, what: &'static str) {
        self.counters.count_cause(cause);
        let limits = &self.operator.limits;
        tracing::warn!(operator = %self.operator.name, process, cause = cause.id(), limit = cause.limit(limits), "{what}");
        if !cause.concerns_author() {
            return;
        }
        if self.told.lock().unwrap_or_else(PoisonError::into_inner).allows(Instant::now()) {
            self.log.write(process, format!("{what}: {}", cause.explained(limits)));
        } else {
            self.log.count_dropped();
        }
    }

    pub(crate) fn set_trouble(&self, trouble: Option<Cause>) {
        self.changed.send_modify(|changed| {
            changed.version += 1;
            changed.trouble = trouble;
        });
    }

    pub(crate) fn add(&self, process: &Arc<Process>) {
        self.processes.rcu(|processes| {
            let mut processes = Vec::clone(processes);
            processes.push(Arc::clone(process));
            processes
        });
        self.set_trouble(None);
    }

    pub(crate) fn remove(&self, process: &Process) {
        self.processes
            .rcu(|processes| processes.iter().filter(|other| other.id != process.id).cloned().collect::<Vec<_>>());
    }

    /// Whether some process takes another request.
    pub(crate) fn has_room(&self) -> bool {
        self.processes.load().iter().any(|process| process.has_room())
    }

    /// The place in the process with the fewest requests.
    fn try_acquire(&self) -> Option<Flight> {
        let processes = self.processes.load();
        if let [only] = processes.as_slice() {
            return only.acquire();
        }
        let mut candidates: Vec<&Arc<Process>> = processes.iter().collect();
        candidates.sort_by_key(|process| {
            process.assigned.get().map_or(usize::MAX, |assigned| assigned.in_flight.load(Ordering::Acquire))
        });
        candidates.into_iter().find_map(Process::acquire)
    }

    /// A place for a request; waits for a process to start, where one may.
    pub(crate) async fn acquire(&self) -> Result<Flight, Cause> {
        if *self.stopping.borrow() {
            return Err(Cause::Stopping);
        }
        if let Some(flight) = self.try_acquire() {
            return Ok(flight);
        }
        let mut changed = self.changed.subscribe();
        tokio::time::timeout(self.operator.limits.start, async {
            loop {
                let trouble = changed.borrow_and_update().trouble;
                if let Some(flight) = self.try_acquire() {
                    return Ok(flight);
                }
                if *self.stopping.borrow() {
                    return Err(Cause::Stopping);
                }
                let processes = self.processes.load_full();
                let most = usize::try_from(self.operator.replicas.max).unwrap_or(usize::MAX);
                let all_full = processes.len() >= most
                    && processes.iter().all(|process| process.is_alive() && !process.suspect.load(Ordering::Acquire));
                if all_full {
                    return Err(Cause::Concurrency);
                }
                if processes.is_empty()
                    && let Some(trouble) = trouble
                {
                    return Err(trouble);
                }
                // Counted only while it waits: whoever finds the last place taken must not find the one who took it waiting.
                let _waiting = Waiting::count(&self.waiting);
                self.demand.notify_one();
                tokio::select! {
                    changed = changed.changed() => if changed.is_err() { return Err(Cause::Stopping) },
                    () = self.freed.notified() => {}
                }
            }
        })
        .await
        .unwrap_or(Err(Cause::StartTime))
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn count(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::AcqRel);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What is counted about one operator, over all its versions and processes.
#[derive(Debug)]
pub(crate) struct Counters {
    requests: AtomicU64,
    causes: [AtomicU64; Cause::ALL.len()],
    starts: AtomicU64,
    ends: [AtomicU64; Cause::ALL.len()],
    cpu_nanoseconds: AtomicU64,
    subrequests: AtomicU64,
    /// By reason. Seldom: what an operator may ask for is bounded.
    refused: Mutex<BTreeMap<&'static str, u64>>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(0),
            causes: std::array::from_fn(|_| AtomicU64::new(0)),
            starts: AtomicU64::new(0),
            ends: std::array::from_fn(|_| AtomicU64::new(0)),
            cpu_nanoseconds: AtomicU64::new(0),
            subrequests: AtomicU64::new(0),
            refused: Mutex::default(),
        }
    }
}

impl Counters {
    pub(crate) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// How many, and how many of them without an answer of the operator's own.
    pub(crate) fn requests(&self) -> (u64, u64) {
        let failed = self.causes.iter().map(|counter| counter.load(Ordering::Relaxed)).sum();
        (self.requests.load(Ordering::Relaxed), failed)
    }

    pub(crate) fn count_cause(&self, cause: Cause) {
        if let Some(counter) = self.causes.get(cause.index()) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn count_start(&self) {
        self.starts.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_end(&self, cause: Cause) {
        if let Some(counter) = self.ends.get(cause.index()) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn count_cpu(&self, nanoseconds: u64) {
        self.cpu_nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    pub(crate) fn count_subrequest(&self, refusal: Option<&Refusal>) {
        self.subrequests.fetch_add(1, Ordering::Relaxed);
        if let Some(refusal) = refusal {
            *self.refused.lock().unwrap_or_else(PoisonError::into_inner).entry(refusal.reason).or_default() += 1;
        }
    }

    /// Name and value, names in the style of filters' metrics: labels follow as `.label.value`.
    pub(crate) fn read(&self, operator: &str, into: &mut Vec<(String, u64)>) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let plain = [
            ("portcullis_operator_requests_total", read(&self.requests)),
            ("portcullis_operator_starts_total", read(&self.starts)),
            ("portcullis_operator_cpu_milliseconds_total", read(&self.cpu_nanoseconds) / 1_000_000),
            ("portcullis_operator_subrequests_total", read(&self.subrequests)),
        ];
        into.extend(plain.map(|(name, value)| (format!("{name}.operator.{operator}"), value)));
        for (reason, count) in self.refused.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            into.push((
                format!("portcullis_operator_subrequests_refused_total.operator.{operator}.reason.{reason}"),
                *count,
            ));
        }
        for (family, counters) in
            [("portcullis_operator_failed_total", &self.causes), ("portcullis_operator_ends_total", &self.ends)]
        {
            for (cause, counter) in Cause::ALL.iter().zip(counters) {
                let value = read(counter);
                if value > 0 {
                    into.push((format!("{family}.operator.{operator}.reason.{}", cause.id()), value));
                }
            }
        }
    }
}

/// Pauses between attempts to start what keeps failing.
#[derive(Debug)]
pub(crate) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(30);
/// From the third failure in a row on, waiting requests are told instead of kept.
const CRASH_LOOP_FAILURES: u32 = 3;

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { failures: 0, until: None }
    }

    pub(crate) fn failed(&mut self, now: Instant, jitter: f64) {
        let exponent = self.failures.min(16);
        let pause = BACKOFF_FIRST.saturating_mul(1 << exponent).min(BACKOFF_MOST);
        self.failures = self.failures.saturating_add(1);
        // Half to whole, so that many operators that failed together do not come back together.
        self.until = now.checked_add(pause.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0));
    }

    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
        self.until = None;
    }

    pub(crate) fn is_loop(&self) -> bool {
        self.failures >= CRASH_LOOP_FAILURES
    }

    /// When the next attempt may be made, if not now.
    pub(crate) fn until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        let now = Instant::now();
        let mut backoff = Backoff::new();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            backoff.failed(now, 1.0);
            pauses.push(backoff.until(now).unwrap() - now);
        }
        assert_eq!(pauses[..3], [100, 200, 400].map(Duration::from_millis));
        assert_eq!(pauses[11], BACKOFF_MOST);
        assert!(backoff.is_loop());
        backoff.succeeded();
        assert!(!backoff.is_loop() && backoff.until(now).is_none());
    }

    #[test]
    fn metrics_carry_operator_and_reason() {
        let counters = Counters::default();
        counters.count_request();
        counters.count_cause(Cause::Memory);
        counters.count_subrequest(None);
        counters.count_subrequest(Some(&Refusal::new("net", "")));
        let mut found = Vec::new();
        counters.read("hello", &mut found);
        assert!(found.contains(&("portcullis_operator_requests_total.operator.hello".to_owned(), 1)));
        let failed = "portcullis_operator_failed_total.operator.hello.reason.operator_memory";
        assert!(found.contains(&(failed.to_owned(), 1)));
        assert!(found.contains(&("portcullis_operator_subrequests_total.operator.hello".to_owned(), 2)));
        let refused = "portcullis_operator_subrequests_refused_total.operator.hello.reason.net";
        assert!(found.contains(&(refused.to_owned(), 1)));
    }
}
