//! Which CPUs run what: some belong to one operator each, all others to the host and to everybody else.

use std::collections::BTreeSet;
use std::fs;
use std::sync::OnceLock;

use rustix::process::Pid;
use rustix::thread::CpuSet;

/// The CPUs that this process may use, as it found them first: before it kept its own threads off some.
pub(crate) fn usable() -> &'static BTreeSet<usize> {
    static USABLE: OnceLock<BTreeSet<usize>> = OnceLock::new();
    USABLE.get_or_init(|| match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        // A machine with more CPUs than fit: the kernel refuses the question.
        Err(_) => (0..std::thread::available_parallelism().map_or(1, std::num::NonZero::get)).collect(),
    })
}

/// Keeps every thread of a process on the given CPUs; threads that are started later take it from the one that starts
/// them.
pub(crate) fn pin(pid: u32, cpus: &BTreeSet<usize>) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU) {
        set.set(*cpu);
    }
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for thread in threads {
        let Some(thread) = thread.file_name().to_str().and_then(|tid| tid.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        match rustix::thread::sched_setaffinity(Some(thread), &set) {
            // It ended meanwhile.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
