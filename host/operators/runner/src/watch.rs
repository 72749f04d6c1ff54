//! CPU time: who uses it, and the end of whoever uses too much.
//!
//! A thread looks at the process's CPU clock every few milliseconds while there is anything to watch. What was used since
//! the last look is charged to the request whose code runs: the isolate is interrupted, and the value that travels with
//! its promises and timers names the request. Where no JavaScript runs, or native code does not let itself be
//! interrupted, it is shared out among the requests in flight. A request over its limit ends the isolate's execution.
#![expect(
    unsafe_code,
    reason = "V8 calls back with a raw pointer; the CPU clock has no safe wrapper. SAFETY at each block"
)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use deno_core::v8;
use tokio::sync::Notify;

/// How often the clock is looked at. A loop goes on for so long beyond its limit; and all looks together take CPU time from requests.
const TICK: Duration = Duration::from_millis(8);
/// With nothing to watch for so long, the thread rests.
const REST: Duration = Duration::from_millis(200);
/// Requests that were answered and whose code still runs are remembered one by one, up to so many.
const AFTERWARDS_MAX: usize = 1024;

/// Limits of CPU time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuLimits {
    /// For one request, until it is answered.
    pub(crate) request: Duration,
    /// For what one request leaves running after its answer, and for what runs without any request.
    pub(crate) background: Duration,
}

/// Why an isolate must go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// This request used too much CPU time.
    CpuTime(u32),
    /// Code that belongs to no request in flight did.
    BackgroundCpu,
    /// The isolate needs more memory than it may have.
    Memory,
}

#[derive(Debug)]
struct State {
    isolate: Option<v8::IsolateHandle>,
    limits: CpuLimits,
    /// CPU time by request in flight.
    requests: HashMap<u32, Duration>,
    /// The same of those that were answered.
    afterwards: HashMap<u32, Duration>,
    background: Duration,
    /// The process's CPU time that has been charged.
    charged: Duration,
    /// The isolate was asked to say whose code runs.
    asked: bool,
    verdict: Option<Verdict>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// JavaScript may be running.
    in_turn: AtomicBool,
    resting: AtomicBool,
    /// Told about every verdict.
    verdict: Notify,
    memory: MemoryCheck,
}

/// What a look also asks about memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryCheck {
    /// Whether there is too much of what the process counts.
    pub(crate) is_full: fn() -> bool,
    /// Whether this is too much of what V8 counts.
    pub(crate) is_too_much: fn(usize) -> bool,
}

/// In an isolate's slot: its only context.
struct Watched(v8::Global<v8::Context>);

/// The thread's handle.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Thread,
}

impl Watch {
    /// Starts the thread. Later no thread can be started any more.
    pub(crate) fn start(memory: MemoryCheck) -> std::io::Result<Self> {
        let none = Duration::MAX;
        let state = State {
            isolate: None,
            limits: CpuLimits { request: none, background: none },
            requests: HashMap::new(),
            afterwards: HashMap::new(),
            background: Duration::ZERO,
            charged: cpu_time(),
            asked: false,
            verdict: None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            in_turn: AtomicBool::new(false),
            resting: AtomicBool::new(false),
            verdict: Notify::new(),
            memory,
        });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("watch".to_owned())
            // It keeps nothing on its stack.
            .stack_size(64 << 10)
            .spawn(move || watched.run())?
            .thread()
            .clone();
        Ok(Self { shared, thread })
    }

    /// Watches another isolate from now on. Requests of the one before are forgotten.
    pub(crate) fn watch(&self, isolate: &mut v8::Isolate, context: v8::Global<v8::Context>) {
        isolate.set_slot(Watched(context));
        let isolate = isolate.thread_safe_handle();
        let mut state = self.shared.lock();
        state.isolate = Some(isolate);
        state.requests.clear();
        state.afterwards.clear();
        state.background = Duration::ZERO;
        state.charged = cpu_time();
        state.asked = false;
        state.verdict = None;
    }

    pub(crate) fn limit(&self, limits: CpuLimits) {
        self.shared.lock().limits = limits;
    }

    /// A request comes in.
    pub(crate) fn begin(&self, id: u32) {
        let mut state = self.shared.lock();
        state.requests.insert(id, Duration::ZERO);
        state.background = Duration::ZERO;
    }

    /// A request was answered.
    pub(crate) fn end(&self, id: u32) {
        self.shared.lock().requests.remove(&id);
    }

    /// JavaScript may run until the returned value is dropped.
    pub(crate) fn turn(&self) -> Turn<'_> {
        self.shared.in_turn.store(true, Ordering::Release);
        if self.shared.resting.swap(false, Ordering::AcqRel) {
            self.thread.unpark();
        }
        Turn(&self.shared)
    }

    /// What was decided about the isolate, if anything.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.shared.lock().verdict
    }

    /// Waits for a verdict that may come while nothing runs.
    pub(crate) async fn decided(&self) {
        self.shared.verdict.notified().await;
    }

    /// Ends the isolate's execution for want of memory. Called by V8 while it allocates.
    pub(crate) fn out_of_memory(&self) {
        self.shared.decide(&mut self.shared.lock(), Verdict::Memory);
    }
}

/// See [`Watch::turn`].
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Shared);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.in_turn.store(false, Ordering::Release);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(self: Arc<Self>) {
        let mut last_active = Instant::now();
        loop {
            std::thread::sleep(TICK);
            if self.look() {
                last_active = Instant::now();
            } else if last_active.elapsed() > REST {
                self.resting.store(true, Ordering::Release);
                // Whoever begins a turn from here on wakes this thread; one that began before is seen here.
                while self.resting.load(Ordering::Acquire) && !self.in_turn.load(Ordering::Acquire) {
                    std::thread::park();
                }
                self.resting.store(false, Ordering::Release);
                last_active = Instant::now();
            }
        }
    }

    /// Charges what was used. False when nothing happens in the process.
    fn look(self: &Arc<Self>) -> bool {
        let in_turn = self.in_turn.load(Ordering::Acquire);
        let mut state = self.lock();
        if state.verdict.is_some() {
            return true;
        }
        if (self.memory.is_full)() {
            self.decide(&mut state, Verdict::Memory);
            return true;
        }
        if in_turn && !state.asked {
            if let Some(isolate) = &state.isolate {
                // Given back by `interrupted`, or lost with its isolate, which is rare and small.
                let data = Arc::into_raw(Arc::clone(self)).cast_mut().cast::<c_void>();
                state.asked = isolate.request_interrupt(interrupted, data);
            }
            return true;
        }
        let used = state.take_used();
        let is_active = in_turn || !state.requests.is_empty() || used > Duration::from_millis(1);
        let shares = u32::try_from(state.requests.len()).unwrap_or(u32::MAX);
        if shares == 0 {
            state.background += used;
        } else {
            for charged in state.requests.values_mut() {
                *charged += used / shares;
            }
        }
        self.judge(&mut state);
        is_active
    }

    /// Decides whether anything is over its limit.
    fn judge(&self, state: &mut State) {
        let limits = state.limits;
        let over = state.requests.iter().find(|(_, used)| **used > limits.request).map(|(id, _)| *id);
        let background_is_over =
            state.background > limits.background || state.afterwards.values().any(|used| *used > limits.background);
        match over {
            Some(id) => self.decide(state, Verdict::CpuTime(id)),
            None if background_is_over => self.decide(state, Verdict::BackgroundCpu),
            None => {}
        }
    }

    fn decide(&self, state: &mut State, verdict: Verdict) {
        if state.verdict.is_none() {
            state.verdict = Some(verdict);
        }
        if let Some(isolate) = &state.isolate {
            isolate.terminate_execution();
        }
        self.verdict.notify_one();
    }
}

impl State {
    fn take_used(&mut self) -> Duration {
        let now = cpu_time();
        let used = now.saturating_sub(self.charged);
        self.charged = now;
        used
    }

    /// Charges the code of one request, or of none.
    fn charge(&mut self, id: Option<u32>, used: Duration) {
        let Some(id) = id else {
            self.background += used;
            return;
        };
        if let Some(charged) = self.requests.get_mut(&id) {
            *charged += used;
            return;
        }
        if self.afterwards.len() >= AFTERWARDS_MAX {
            self.afterwards.clear();
        }
        *self.afterwards.entry(id).or_default() += used;
    }
}

/// Called by V8 on the isolate's thread, between two instructions of JavaScript.
unsafe extern "C" fn interrupted(isolate: v8::UnsafeRawIsolatePtr, data: *mut c_void) {
    // SAFETY: the pointer is an `Arc<Shared>` that `look` gave away for this call, and V8 makes the call once.
    let shared = unsafe { Arc::from_raw(data.cast_const().cast::<Shared>()) };
    // SAFETY: V8 calls this with the isolate that it is running on this very thread.
    let mut isolate = unsafe { v8::Isolate::from_raw_isolate_ptr(isolate) };
    let external = isolate.get_heap_statistics().external_memory();
    let context = isolate.get_slot::<Watched>().map(|watched| watched.0.clone());
    let id = context.and_then(|context| {
        v8::scope_with_context!(scope, &mut isolate, context);
        let value = scope.get_continuation_preserved_embedder_data();
        v8::Local::<v8::Uint32>::try_from(value).ok().map(|id| id.value())
    });
    let mut state = shared.lock();
    state.asked = false;
    let used = state.take_used();
    state.charge(id, used);
    if (shared.memory.is_too_much)(external) {
        shared.decide(&mut state, Verdict::Memory);
    }
    shared.judge(&mut state);
}

/// CPU time of this process so far, all threads together.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for one timespec during the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanoseconds)
}
