//! The list of system calls that an engine may use, and with which arguments.
//!
//! Everything else answers EPERM, so that a library that probes for a feature falls back instead of dying. `clone3`
//! answers ENOSYS: its flags are behind a pointer that a filter cannot read, and the C library then uses `clone`.

use std::collections::BTreeMap;
use std::io;

use portcullis_syscalls::List;
use seccompiler::{BackendError, BpfProgram, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

/// Calls that are allowed with any arguments: memory, time, threads' own affairs, and files and sockets that are
/// already open or that Landlock and the root decide about.
const ALLOWED: &[i64] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    // Needed once, for the engine itself. Landlock leaves only the engine and the loader executable, and without
    // `fork` nothing can be executed beside the operator.
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mincore,
    libc::SYS_mkdirat,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_pkey_alloc,
    libc::SYS_pkey_free,
    libc::SYS_pkey_mprotect,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    // The engine asserts that this answers with a mode.
    libc::SYS_umask,
    libc::SYS_uname,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Older names that only this architecture has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[i64] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_getdents,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rmdir,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[i64] = &[];

/// `prctl` operations: naming threads and memory, and asking.
const PRCTL_ALLOWED: &[u64] = &[
    15,            // PR_SET_NAME
    16,            // PR_GET_NAME
    3,             // PR_GET_DUMPABLE
    23,            // PR_CAPBSET_READ
    38,            // PR_SET_NO_NEW_PRIVS, on for ever already
    0x53_56_4d_41, // PR_SET_VMA
];

const IOCTL_ALLOWED: &[u64] =
    &[libc::TCGETS, libc::TIOCGWINSZ, libc::FIONREAD, libc::FIONBIO, libc::FIOCLEX, libc::FIONCLEX];

fn is(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    // 32 bits wide: the kernel ignores the upper half of these integer arguments, so the filter must too.
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn any_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    values.iter().map(|value| SeccompRule::new(vec![is(argument, *value)?])).collect()
}

/// Compiles the program for the process `pid` that will execute the engine. A further list, where one may be installed,
/// can only take away.
pub(super) fn compile(
    pid: u32,
    own_pid_namespace: bool,
    may_restrict_itself: bool,
) -> Result<BpfProgram, BackendError> {
    let mut rules = BTreeMap::new();
    let unix = u64::try_from(libc::AF_UNIX).unwrap_or(1);
    rules.insert(libc::SYS_socket, any_of(0, &[unix])?);
    rules.insert(libc::SYS_socketpair, any_of(0, &[unix])?);
    rules.insert(libc::SYS_prctl, any_of(0, PRCTL_ALLOWED)?);
    rules.insert(libc::SYS_ioctl, any_of(1, IOCTL_ALLOWED)?);

    if may_restrict_itself {
        rules.insert(libc::SYS_seccomp, any_of(0, &[u64::from(libc::SECCOMP_SET_MODE_FILTER)])?);
    }

    // A thread, never a process: CLONE_THREAD set and no namespace asked for.
    let thread = u64::try_from(libc::CLONE_THREAD).unwrap_or(0);
    let namespaces = [
        libc::CLONE_NEWNS,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWNET,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWCGROUP,
        libc::CLONE_NEWUSER,
    ];
    let mask = namespaces.iter().fold(thread, |mask, flag| mask | u64::from(flag.unsigned_abs()));
    let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), thread)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![condition])?]);

    // Signals to its own threads only (the C library's `abort` and V8's profiler).
    let own = if own_pid_namespace { 1 } else { u64::from(pid) };
    rules.insert(libc::SYS_tgkill, any_of(0, &[own])?);
    // Its own limits, which it can only lower.
    rules.insert(libc::SYS_prlimit64, any_of(0, &[0, own])?);

    let plain = [ALLOWED, ALLOWED_HERE].concat();
    List { plain, conditional: rules, unknown: vec![libc::SYS_clone3] }.compile()
}

pub(super) fn install(program: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compiles_for_this_machine() {
        for may_restrict_itself in [false, true] {
            let program = compile(1, true, may_restrict_itself).unwrap();
            assert!((100..4096).contains(&program.len()));
        }
    }

    #[test]
    fn calls_that_reach_others_are_not_on_the_list() {
        let forbidden = [
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_keyctl,
            libc::SYS_seccomp,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_memfd_create,
            libc::SYS_execveat,
            libc::SYS_symlinkat,
            libc::SYS_linkat,
            libc::SYS_mknodat,
            libc::SYS_sched_setaffinity,
            libc::SYS_setpriority,
            libc::SYS_shmget,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
        ];
        for number in forbidden {
            assert!(!ALLOWED.contains(&number) && !ALLOWED_HERE.contains(&number), "{number}");
        }
    }
}
