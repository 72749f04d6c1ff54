//! What the process may still ask of the kernel once it is ready: no file, no new socket, no program, no further thread.
//!
//! The host's list of system calls, under which the process starts, has to allow what a start needs. This one goes on top
//! of it, for all threads, before the process sees anything of an operator. Everything that is not on it answers EPERM.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Allowed with any arguments: memory, time, what is open already, and the threads that there are.
const ALLOWED: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_pkey_alloc,
    libc::SYS_pkey_free,
    libc::SYS_ppoll,
    libc::SYS_read,
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
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Older names that only this architecture has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_time];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[i64] = &[];

/// Calls that could make memory executable, and where they say so.
const PROTECTING: [(i64, u8); 3] = [(libc::SYS_mmap, 2), (libc::SYS_mprotect, 2), (libc::SYS_pkey_mprotect, 2)];

/// Installs the list. Without a compiler in the process (`interpreter_only`) no memory becomes executable any more, either.
pub(crate) fn confine(interpreter_only: bool) -> io::Result<()> {
    let program = compile(interpreter_only).map_err(io::Error::other)?;
    seccompiler::apply_filter_all_threads(&program).map_err(io::Error::other)
}

fn compile(interpreter_only: bool) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALLOWED_HERE).map(|number| (*number, Vec::new())).collect();
    for (number, argument) in PROTECTING {
        let rule = if interpreter_only {
            let execute = u64::try_from(libc::PROT_EXEC).unwrap_or(4);
            let not = SeccompCmpOp::MaskedEq(execute);
            vec![SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, not, 0)?])?]
        } else {
            Vec::new()
        };
        rules.insert(number, rule);
    }
    // Ends itself when it must (`abort`), and nobody else.
    let own = u64::from(std::process::id());
    let only_own = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own)?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![only_own])?]);
    // Names of memory and threads, for whoever looks at the process from outside.
    let names = [15, 0x53_56_4d_41].map(|operation| {
        SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, operation)?])
    });
    rules.insert(libc::SYS_prctl, names.into_iter().collect::<Result<_, _>>()?);
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(u32::try_from(libc::EPERM).unwrap_or(1)),
        SeccompAction::Allow,
        TargetArch::try_from(std::env::consts::ARCH)?,
    )?
    .try_into()
}
