//! The system calls for which no safe wrapper exists in the crates that we use.
//!
//! Everything `unsafe` in this crate is in this file. Each function is a thin, checked wrapper; none of them keeps
//! a pointer that it was given.
#![expect(unsafe_code, reason = "system calls without a safe wrapper; one SAFETY comment per block")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What [`clone_into_parent`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cloned {
    /// In the process that called; holds the new process's id.
    Caller(i32),
    /// In the new process.
    New,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Forks so that the new process is a child of our parent, not of us: the launcher can then end at once and the host
/// itself waits for the confined process. With `group`, a folder of control groups, it starts in that one.
///
/// Only for a process with one thread that executes another program soon after.
pub(crate) fn clone_into_parent(group: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    // struct clone_args (clone(2)): flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
    // set_tid_size, cgroup. The signal at its end is the caller's own, which is SIGCHLD.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut arguments = [0_u64; 11];
    arguments[0] = u64::from(libc::CLONE_PARENT.unsigned_abs());
    if let Some(group) = group {
        arguments[0] |= CLONE_INTO_CGROUP;
        arguments[10] = u64::try_from(group.as_raw_fd()).map_err(io::Error::other)?;
    }
    // SAFETY: `arguments` has the layout of struct clone_args, whose length is passed, and lives during the call. Without
    // CLONE_VM and without a stack the call behaves as fork(2) does: both processes go on with their own copy of memory. The
    // launcher has one thread, so no lock can be held by a thread that does not exist in the new process.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) })?;
    if pid == 0 {
        return Ok(Cloned::New);
    }
    i32::try_from(pid).map(Cloned::Caller).map_err(io::Error::other)
}

/// Leaves the namespaces named by `flags` (`CLONE_NEW*`).
pub(crate) fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: takes no pointer. None of the flags that callers pass (`CLONE_NEW*`) changes what memory or which
    // descriptors this process has.
    check(libc::c_long::from(unsafe { libc::unshare(flags) })).map(|_| ())
}

/// Gives up every supplementary group and takes the given ids for good (real, effective and saved).
pub(crate) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: a null list with length 0 is what setgroups(2) asks for to drop all groups; the other calls take
    // integers only. The launcher has one thread, so no other thread keeps the old ids.
    unsafe {
        check(libc::c_long::from(libc::setgroups(0, std::ptr::null())))?;
        check(libc::c_long::from(libc::setresgid(gid, gid, gid)))?;
        check(libc::c_long::from(libc::setresuid(uid, uid, uid)))?;
    }
    Ok(())
}

/// Makes the mount at `path` and all mounts below it read-only, without devices and set-user-id programs. One call for the
/// whole tree, and it never takes away a restriction that a mount had.
pub(crate) fn restrict_mounts(path: &std::ffi::CStr) -> io::Result<()> {
    const RDONLY_NOSUID_NODEV: u64 = 1 | 2 | 4;
    const RECURSIVE: libc::c_long = 0x8000;
    let attributes: [u64; 4] = [RDONLY_NOSUID_NODEV, 0, 0, 0];
    let cwd = libc::c_long::from(libc::AT_FDCWD);
    // SAFETY: `path` ends with a zero byte and `attributes` has the layout of struct mount_attr (four 64-bit fields), whose
    // length is passed; both live during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            cwd,
            path.as_ptr(),
            RECURSIVE,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    check(result).map(|_| ())
}

/// Marks every descriptor from `first` upwards close-on-exec.
pub(crate) fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let first = libc::c_long::from(first);
    let flags = 4; // CLOSE_RANGE_CLOEXEC: nothing is closed now, so no owner of a descriptor is surprised.
    // SAFETY: takes integers only.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_long::from(u32::MAX), flags) }).map(|_| ())
}

/// CPU time (user and system) that a process has used so far, in nanoseconds.
pub(crate) fn process_cpu_nanoseconds(pid: i32) -> io::Result<u64> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is a valid place for one clockid_t during the call.
    let error = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for one timespec during the call.
    check(libc::c_long::from(unsafe { libc::clock_gettime(clock, &mut time) }))?;
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    Ok(seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds))
}

/// Registers an owned descriptor with the current runtime.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, and `AsyncFd` owns it and deregisters
    // it first.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cpu_time_grows_with_work() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let before = process_cpu_nanoseconds(pid).unwrap();
        let mut value = 1_u64;
        while process_cpu_nanoseconds(pid).unwrap() < before + 5_000_000 {
            value = std::hint::black_box(value.wrapping_mul(3));
        }
        assert!(process_cpu_nanoseconds(pid).unwrap() > before);
    }

    #[test]
    fn cpu_time_of_an_absent_process_is_an_error() {
        assert!(process_cpu_nanoseconds(i32::MAX - 1).is_err());
    }
}
