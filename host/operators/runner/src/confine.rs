//! What the process may still ask of the kernel once it is ready: no file, no new socket, no program, no further thread.
//!
//! The host's list of system calls, under which the process starts, has to allow what a start needs. This one goes on top
//! of it, for all threads, before the process sees anything of an operator. Everything that is not on it answers EPERM.

use std::collections::BTreeMap;
use std::io;

use portcullis_syscalls::List;
use seccompiler::{BackendError, BpfProgram, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

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
    let mut plain = [ALLOWED, ALLOWED_HERE].concat();
    let mut rules = BTreeMap::new();
    for (number, argument) in PROTECTING {
        if interpreter_only {
            let execute = u64::try_from(libc::PROT_EXEC).unwrap_or(4);
            let not = SeccompCmpOp::MaskedEq(execute);
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, not, 0)?;
            rules.insert(number, vec![SeccompRule::new(vec![condition])?]);
        } else {
            plain.push(number);
        }
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
    List { plain, conditional: rules, unknown: Vec::new() }.compile()
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;
    use std::io::{Read as _, Write as _};
    use std::process::Command;

    use super::*;

    const INSIDE: &str = "PORTCULLIS_TEST_CONFINED";

    fn tell<T: Debug, E: Debug>(what: &str, result: Result<T, E>) {
        println!("{what}: {}", result.map_or_else(|error| format!("{error:?}"), |value| format!("ALLOWED {value:?}")));
    }

    /// Not much without `confined` below, which runs it in a process of its own.
    #[test]
    fn a_confined_process_tries() {
        if std::env::var_os(INSIDE).is_none() {
            return;
        }
        let (mut one, mut other) = std::os::unix::net::UnixStream::pair().unwrap();
        confine(std::env::var(INSIDE).as_deref() == Ok("interpreter")).unwrap();
        tell("open", std::fs::File::open("/etc/passwd"));
        tell("create", std::fs::File::create("/tmp/portcullis-test-confined"));
        tell("stat", std::fs::metadata("/"));
        tell("list", std::fs::read_dir("/"));
        tell("exec", Command::new("/bin/true").status());
        tell("thread", std::thread::Builder::new().spawn(|| {}));
        tell("tcp", std::net::TcpStream::connect("127.0.0.1:9"));
        tell("udp", std::net::UdpSocket::bind("127.0.0.1:0"));
        tell("unix", std::os::unix::net::UnixStream::connect("/nowhere"));
        tell("listen", std::os::unix::net::UnixListener::bind("/tmp/portcullis-test-confined.sock"));
        tell("pair", std::os::unix::net::UnixStream::pair());
        tell("kill", calls::kill_nobody());
        tell("trace", calls::be_traced());
        tell("executable", calls::executable_page());
        // What is left is enough to serve.
        one.write_all(b"x").unwrap();
        other.read_exact(&mut [0]).unwrap();
        drop(vec![1_u8; 64 << 20]);
        println!("and it works");
    }

    #[expect(unsafe_code, reason = "system calls without a safe wrapper here. SAFETY at each block")]
    mod calls {
        use std::io;

        fn checked(result: i64) -> io::Result<i64> {
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
        }

        pub(super) fn kill_nobody() -> io::Result<i64> {
            // SAFETY: signal 0 only asks whether it could be sent.
            checked(unsafe { libc::kill(libc::getppid(), 0) }.into())
        }

        pub(super) fn be_traced() -> io::Result<i64> {
            // SAFETY: takes no pointer, and the process is about to end.
            checked(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0) })
        }

        pub(super) fn executable_page() -> io::Result<i64> {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new page that nothing else knows.
            let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
            checked(if page == libc::MAP_FAILED { -1 } else { 1 })
        }
    }

    fn confined(how: &str) -> Vec<String> {
        let own = std::env::current_exe().unwrap();
        let mut test = Command::new(own);
        test.args(["--exact", "confine::tests::a_confined_process_tries", "--nocapture", "--test-threads", "1"]);
        let output = test.env(INSIDE, how).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("and it works"), "{text}{}", String::from_utf8_lossy(&output.stderr));
        text.lines().filter(|line| line.contains(": ")).map(str::to_owned).collect()
    }

    #[test]
    fn a_process_that_is_ready_opens_connects_and_starts_nothing_any_more() {
        let allowed = |lines: Vec<String>| -> Vec<String> {
            assert!(lines.len() >= 14, "{lines:?}");
            lines.into_iter().filter(|line| line.contains("ALLOWED")).collect()
        };
        // The compiler needs memory that can be executed.
        assert_eq!(allowed(confined("compiler")), ["executable: ALLOWED 1"]);
        assert_eq!(allowed(confined("interpreter")), [""; 0]);
    }
}
