//! One confined process as the host sees it: requests in flight, what they used, and why it ended.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::cause::Cause;
use crate::engine::{Abilities, BACKGROUND_CPU_STATUS};
use crate::jail::{Exit, Group, Report, Signaller};
use crate::pool::Pool;

/// A process, generic until it is assigned to an operator.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) id: u64,
    pub(crate) pid: i32,
    pub(crate) report: Report,
    /// What its engine does by itself.
    pub(crate) abilities: Abilities,
    private: OwnedFd,
    /// Its control group, where there is one; goes when the process has ended.
    group: Mutex<Option<Group>>,
    /// The user it runs as.
    uid: u32,
    signaller: Signaller,
    born: Instant,
    /// 0, or 1 + the index of the cause for which the host killed it.
    killed: AtomicUsize,
    /// The host asked it to end.
    pub(crate) stopping: AtomicBool,
    /// Its event loop is in doubt: it gets no new requests until it answered.
    pub(crate) suspect: AtomicBool,
    /// It is being asked for a sign of life.
    pub(crate) asked: AtomicBool,
    /// It said something that only an engine without memory says.
    pub(crate) said_out_of_memory: AtomicBool,
    pub(crate) exited: watch::Sender<Option<Ended>>,
    pub(crate) assigned: OnceLock<Assigned>,
}

/// How it ended, as far as requests are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) cause: Cause,
}

/// What a process has once it belongs to an operator.
#[derive(Debug)]
pub(crate) struct Assigned {
    pub(crate) pool: Arc<Pool>,
    pub(crate) slots: Box<[Slot]>,
    pub(crate) in_flight: AtomicUsize,
    /// Outgoing requests that may still be made.
    pub(crate) credits: AtomicI64,
    /// CPU time used while no request was in flight, in nanoseconds.
    pub(crate) background_cpu: AtomicU64,
    /// Nanoseconds since birth when the last request ended.
    pub(crate) idle_since: AtomicU64,
}

/// One request in flight.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    taken: AtomicBool,
    /// 0, or 1 + the index of the cause that ends the request.
    cancelled: AtomicUsize,
    /// Nanoseconds since the process's birth.
    started: AtomicU64,
    cpu: AtomicU64,
    /// The client's body has arrived completely.
    uploaded: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

const OPERATOR_SOCKET: &str = "op.sock";
const HOST_SOCKET: &str = "host.sock";

/// Connections are kept by process per thread, whichever host they belong to, so no two processes may share a number.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Process {
    pub(crate) fn new(
        pid: i32,
        uid: u32,
        private: OwnedFd,
        group: Option<Group>,
        signaller: Signaller,
        report: Report,
        abilities: Abilities,
    ) -> Self {
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            pid,
            report,
            abilities,
            private,
            group: Mutex::new(group),
            uid,
            signaller,
            born: Instant::now(),
            killed: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            said_out_of_memory: AtomicBool::new(false),
            exited: watch::Sender::new(None),
            assigned: OnceLock::new(),
        }
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.exited.borrow().is_none() && self.killed.load(Ordering::Acquire) == 0
    }

    /// Ends it now; the first cause counts.
    pub(crate) fn kill(&self, cause: Cause) {
        let _ = self.killed.compare_exchange(0, cause.index() + 1, Ordering::AcqRel, Ordering::Acquire);
        self.signaller.kill();
    }

    pub(crate) fn terminate(&self) {
        self.stopping.store(true, Ordering::Release);
        self.signaller.terminate();
    }

    /// Called once, when it has ended: finds the cause and tells every request in flight.
    pub(crate) fn end(&self, exit: Exit) -> Ended {
        let group = self.group.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let group_ran_out = group.as_ref().is_some_and(Group::ran_out_of_memory);
        let killed = self.killed.load(Ordering::Acquire).checked_sub(1).and_then(Cause::from_index);
        let cause = match killed {
            Some(cause) => cause,
            None if self.said_out_of_memory.load(Ordering::Acquire) || group_ran_out => Cause::Memory,
            None if self.abilities.keeps_limits && exit == Exit::Code(BACKGROUND_CPU_STATUS) => Cause::BackgroundCpu,
            None if self.stopping.load(Ordering::Acquire) => Cause::Stopping,
            None => Cause::Crashed,
        };
        let ended = Ended { exit, cause };
        self.exited.send_replace(Some(ended));
        if let Some(assigned) = self.assigned.get() {
            // A loop was charged to the request that ran it, which has its answer already, and so had whoever left one behind. From
            // outside it looks like those that ran beside it from its beginning, but not like one that came when it was under way.
            let half = assigned.pool.operator.limits.cpu / 2;
            for slot in assigned.slots.iter().filter(|slot| slot.taken.load(Ordering::Acquire)) {
                let used = Duration::from_nanos(slot.cpu.load(Ordering::Acquire));
                slot.cancel(match cause {
                    Cause::Stalled if used > half => Cause::CpuTime,
                    Cause::Stalled | Cause::BackgroundCpu => Cause::Bystander,
                    cause => cause,
                });
            }
        }
        ended
    }

    /// Nanoseconds since birth.
    pub(crate) fn age(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Connects to the engine's socket and makes sure that it is this process that listens there.
    pub(crate) async fn connect(&self) -> io::Result<UnixStream> {
        // An operator that broke out of its engine could have put a link to someone else's socket there. The descriptor
        // names one inode, found without following anything, and stays the same for connect.
        let socket = rustix::fs::openat2(
            &self.private,
            OPERATOR_SOCKET,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH | ResolveFlags::NO_XDEV,
        )?;
        if FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) != FileType::Socket {
            return Err(io::Error::other("the engine's socket is no socket"));
        }
        let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await?;
        self.check_peer(&stream)?;
        Ok(stream)
    }

    pub(crate) fn check_peer(&self, stream: &UnixStream) -> io::Result<()> {
        let peer = stream.peer_cred()?;
        let same_process = peer.pid() == Some(self.pid);
        if same_process && self.uid == peer.uid() {
            Ok(())
        } else {
            Err(io::Error::other("the other end of the socket is another process"))
        }
    }

    /// Opens the socket on which the host serves this process. Called before any code that is not ours runs in it.
    pub(crate) fn listen(&self) -> io::Result<UnixListener> {
        listen(self.private.as_fd())
    }

    fn takes_requests(&self) -> bool {
        self.is_alive() && !self.suspect.load(Ordering::Acquire) && !self.stopping.load(Ordering::Acquire)
    }

    pub(crate) fn has_room(&self) -> bool {
        let is_free = |assigned: &Assigned| assigned.in_flight.load(Ordering::Acquire) < assigned.slots.len();
        self.takes_requests() && self.assigned.get().is_some_and(is_free)
    }

    /// Takes a place for a request, if one is free and the process fit.
    pub(crate) fn acquire(self: &Arc<Self>) -> Option<Flight> {
        let assigned = self.assigned.get()?;
        if !self.takes_requests() {
            return None;
        }
        let index = assigned
            .slots
            .iter()
            .position(|slot| slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok())?;
        let slot = assigned.slots.get(index)?;
        slot.cancelled.store(0, Ordering::Release);
        slot.cpu.store(0, Ordering::Release);
        slot.uploaded.store(false, Ordering::Release);
        slot.started.store(self.age(), Ordering::Release);
        assigned.in_flight.fetch_add(1, Ordering::AcqRel);
        assigned.background_cpu.store(0, Ordering::Release);
        let per_request = i64::from(assigned.pool.operator.limits.subrequests);
        let most = per_request.saturating_mul(i64::try_from(assigned.slots.len()).unwrap_or(i64::MAX));
        let _ = assigned.credits.fetch_update(Ordering::AcqRel, Ordering::Acquire, |credits| {
            Some(credits.saturating_add(per_request).min(most))
        });
        let flight = Flight { process: Arc::clone(self), index };
        // It may have ended between the check and the taking, and then nobody would tell this request.
        if self.exited.borrow().is_some() {
            return None;
        }
        Some(flight)
    }
}

/// Opens the host's socket inside a process's private directory.
pub(crate) fn listen(private: BorrowedFd<'_>) -> io::Result<UnixListener> {
    let path = PathBuf::from(format!("/proc/self/fd/{}/{HOST_SOCKET}", private.as_raw_fd()));
    let listener = StdUnixListener::bind(&path)?;
    // The directory is closed to all but this process's user.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

impl Assigned {
    pub(crate) fn new(pool: Arc<Pool>) -> Self {
        let slots = (0..pool.operator.limits.concurrency).map(|_| Slot::default()).collect();
        Self {
            pool,
            slots,
            in_flight: AtomicUsize::new(0),
            credits: AtomicI64::new(0),
            background_cpu: AtomicU64::new(0),
            idle_since: AtomicU64::new(0),
        }
    }

    /// Pays for one outgoing request.
    pub(crate) fn spend(&self) -> bool {
        self.credits
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |credits| (credits > 0).then(|| credits - 1))
            .is_ok()
    }

    pub(crate) fn active(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| slot.taken.load(Ordering::Acquire) && !slot.is_cancelled())
    }
}

/// The most CPU time that one process can use in a time: its event loop's, and that of one thread that helps it.
pub(crate) fn cpu_possible(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX).saturating_mul(2)
}

impl Slot {
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire) != 0
    }

    pub(crate) fn cancel(&self, cause: Cause) {
        let _ = self.cancelled.compare_exchange(0, cause.index() + 1, Ordering::AcqRel, Ordering::Acquire);
        if let Some(waker) = self.waker.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
            waker.wake();
        }
    }

    /// Adds CPU time; returns the sum. What was used since the last look may be more than this request can have used since
    /// it came: it is not charged for those before it.
    pub(crate) fn charge(&self, nanoseconds: u64, age: u64) -> Duration {
        let possible = cpu_possible(self.elapsed(age));
        let before = self.cpu.fetch_update(Ordering::AcqRel, Ordering::Acquire, |cpu| {
            Some(cpu.saturating_add(nanoseconds).min(possible.max(cpu)))
        });
        let before = before.unwrap_or(0);
        Duration::from_nanos(before.saturating_add(nanoseconds).min(possible.max(before)))
    }

    /// How long it has been in flight at an age of its process.
    pub(crate) fn elapsed(&self, age: u64) -> Duration {
        Duration::from_nanos(age.saturating_sub(self.started.load(Ordering::Acquire)))
    }

    pub(crate) fn is_uploaded(&self) -> bool {
        self.uploaded.load(Ordering::Acquire)
    }

    pub(crate) fn set_uploaded(&self) {
        self.uploaded.store(true, Ordering::Release);
    }
}

/// A request's place in a process; given back when dropped.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) process: Arc<Process>,
    index: usize,
}

impl Flight {
    pub(crate) fn slot(&self) -> Option<&Slot> {
        self.process.assigned.get().and_then(|assigned| assigned.slots.get(self.index))
    }

    /// Ready with the cause once the request must end.
    pub(crate) fn poll_cancelled(&self, context: &mut Context<'_>) -> Poll<Cause> {
        let Some(slot) = self.slot() else { return Poll::Ready(Cause::StartFailed) };
        let cancelled = || slot.cancelled.load(Ordering::Acquire).checked_sub(1).and_then(Cause::from_index);
        if let Some(cause) = cancelled() {
            return Poll::Ready(cause);
        }
        {
            let mut waker = slot.waker.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *waker = Some(context.waker().clone());
            }
        }
        // Whoever cancels stores first and wakes then, so this closes the gap.
        cancelled().map_or(Poll::Pending, Poll::Ready)
    }

    pub(crate) async fn cancelled(&self) -> Cause {
        std::future::poll_fn(|context| self.poll_cancelled(context)).await
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some(assigned) = self.process.assigned.get() else { return };
        if let Some(slot) = assigned.slots.get(self.index) {
            slot.waker.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            slot.taken.store(false, Ordering::Release);
        }
        assigned.idle_since.store(self.process.age(), Ordering::Release);
        assigned.in_flight.fetch_sub(1, Ordering::AcqRel);
        assigned.pool.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_not_charged_for_those_before_it() {
        let millisecond = 1_000_000;
        let slot = Slot::default();
        slot.started.store(1_000 * millisecond, Ordering::Release);
        // The sampler slept; a whole second was used meanwhile, and this request came a millisecond ago.
        assert_eq!(slot.charge(1_000 * millisecond, 1_001 * millisecond), Duration::from_millis(2));
        assert_eq!(slot.charge(10 * millisecond, 1_011 * millisecond), Duration::from_millis(12));
        assert_eq!(slot.charge(1_000 * millisecond, 1_012 * millisecond), Duration::from_millis(24));
    }
}
