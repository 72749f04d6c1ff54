//! Confines one process and then becomes another program in it.
//!
//! The host starts its own binary again with a hidden subcommand. That process, the launcher, has one thread and no
//! state, so it may do what a threaded server must not do between `fork` and `exec`: leave namespaces, build a root,
//! give up ids and capabilities, install Landlock and seccomp, and execute the engine. It is told what to do in JSON
//! documents on its standard input, a socket, and reports there which layers hold. What it can do before it knows what to
//! launch it does at once, so a launcher that the host keeps ready has less left to do.
//!
//! What this module does not do: it decides nothing about operators, keeps no secret and serves no request.
//!
//! Each layer is either active or missing with a reason. [`Isolation`] says which missing layers are tolerated.

mod cgroup;
mod landlock;
mod parent;
mod report;
mod root;
mod seccomp;

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(crate) use cgroup::{Bounds, Group, Groups};
pub(crate) use landlock::only_read;
pub(crate) use parent::OwnChild;
pub use parent::{Confined, Exit, LaunchError, Launcher, ProcessHandle, Signaller, Waiting};
pub use report::{Layer, LayerReport, LayerState, Report};

use crate::sys;

/// The hidden subcommand under which a binary that embeds this crate must call [`main`].
pub const SUBCOMMAND: &str = "__jail";

/// Which missing layers keep an operator from starting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Every layer except the control group must hold.
    Required,
    /// The layers without which the others mean nothing must hold (see [`Layer::is_floor`]), and the file system must be
    /// closed by at least one of mount namespace and Landlock. Others may be missing, and are reported.
    #[default]
    BestEffort,
}

/// One file of the host's that appears, read-only, in the jail's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it appears. Absolute.
    pub target: PathBuf,
    /// Whether it may be executed: the engine and the dynamic loader only.
    pub executable: bool,
}

/// Resource limits that the kernel keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimits {
    /// Writable private memory (`RLIMIT_DATA`), in bytes.
    pub data_bytes: u64,
    /// Open descriptors.
    pub files: u64,
    /// Threads of the process's own user (`RLIMIT_NPROC`).
    pub threads: u64,
}

/// All that the launcher is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// What to tolerate.
    pub isolation: Isolation,
    /// The host's process id; a launcher with another parent ends at once.
    pub host_pid: i32,
    /// User and group to become, where the launcher is root.
    pub uid: u32,
    /// An empty directory on which the jail's root is mounted (in the jail's own mount namespace only).
    pub staging: PathBuf,
    /// A directory for the process's private files, used only where there is no mount namespace.
    pub private_fallback: PathBuf,
    /// Files of the host's to show.
    pub binds: Vec<Bind>,
    /// Small files to create in the root: absolute path and text.
    pub files: Vec<(PathBuf, String)>,
    /// Quota of the private directory in bytes.
    pub private_bytes: u64,
    /// Quota of the private directory in files.
    pub private_files: u64,
    /// Kernel limits.
    pub rlimits: Rlimits,
    /// Program, as one of `binds` names it, and arguments. `{private}` in an argument stands for the private directory,
    /// `{root}` for the prefix of `files` (empty inside a mount namespace).
    pub argv: Vec<String>,
    /// The whole environment of the program; the same placeholders hold.
    pub env: Vec<(String, String)>,
    /// The control group to start in, and what it bounds; or why there is none.
    pub group: Result<(PathBuf, LayerState), String>,
    /// Whether the program may take further system calls from itself.
    pub may_restrict_itself: bool,
    /// Layers that are left out on purpose. For tests that show that one layer holds without another.
    pub without: Vec<Layer>,
}

/// How long setting up the isolation took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Before the launcher knew what to launch: leaving namespaces. One that the host keeps ready has done this already.
    pub ahead_microseconds: u64,
    /// From then on, until the engine was executed.
    pub microseconds: u64,
}

impl Setup {
    /// All of it.
    #[must_use]
    pub fn total_microseconds(&self) -> u64 {
        self.ahead_microseconds.saturating_add(self.microseconds)
    }
}

/// What the launcher says to the host, one JSON document a line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// The process that will be the engine exists.
    Started { pid: i32 },
    /// All layers were tried; a descriptor of the private directory comes with this message.
    Confined { report: Report, setup: Setup },
    /// It will not be the engine.
    Failed { error: String },
    /// No process was started: its control group does not take it.
    GroupRefused { reason: String },
}

/// Largest specification that a launcher reads.
const SPEC_BYTES_MAX: u64 = 1 << 20;

/// Where the private directory is inside the jail.
const PRIVATE: &str = "/private";

/// Runs as the launcher. The embedding binary calls this first thing, with the arguments after [`SUBCOMMAND`], and
/// ends with its result.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let bundle = arguments.any(|argument| argument == crate::bundle::ARGUMENT);
    match if bundle { crate::bundle::main() } else { launch() } {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the host's log pipe; whoever called this by hand sees the reason too.
            let _ = writeln!(io::stderr(), "portcullis jail: {error}");
            ExitCode::FAILURE
        }
    }
}

fn context(what: &'static str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn launch() -> io::Result<()> {
    // A duplicate that closes on exec: the engine must not inherit it, and its closing tells the host that exec worked.
    let control = io::stdin().as_fd().try_clone_to_owned().map_err(context("standard input"))?;
    let mut control = UnixStream::from(control);
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let (without, begun) = receive::<Vec<Layer>>(&mut control)?;
    let mut report = Report::default();
    let namespaces = leave_namespaces(&without, &mut report);
    let ahead = begun.elapsed();
    // It may wait for this for long: the host keeps a launcher ready. When the host ends, there is nothing to read any more.
    let (spec, told) = receive::<Spec>(&mut control)?;
    if rustix::process::getppid().map(rustix::process::Pid::as_raw_nonzero).map(i32::from) != Some(spec.host_pid) {
        return Err(io::Error::other("started by another process than the host that wrote the specification"));
    }
    let started_process = match start_in_group(&spec, &mut report) {
        Ok(cloned) => cloned,
        Err(NotStarted::Group(reason)) => return send(&control, &Message::GroupRefused { reason }, None),
        Err(NotStarted::Other(error)) => return Err(error),
    };
    match started_process {
        sys::Cloned::Caller(pid) => send(&control, &Message::Started { pid }, None),
        sys::Cloned::New => {
            let error = match confine(&spec, &namespaces, &mut report, &control) {
                Ok(private) => become_engine(&spec, &namespaces, &report, (ahead, told), &control, &private),
                Err(error) => error,
            };
            // The host reads this; after exec the descriptor is closed instead.
            let _ = send(&control, &Message::Failed { error: error.to_string() }, None);
            Err(error)
        }
    }
}

/// Starts the process that will be the engine, in its control group if there is one.
///
/// A clone that fails takes the new process-id namespace with it, so there is no second attempt here: the host makes it.
fn start_in_group(spec: &Spec, report: &mut Report) -> Result<sys::Cloned, NotStarted> {
    let missing = |reason: &str| LayerState::Missing { reason: reason.to_owned() };
    let (path, state) = match &spec.group {
        Ok(group) if !spec.without.contains(&Layer::ControlGroup) => group,
        other => {
            let reason = other.as_ref().err().map_or("left out on purpose", String::as_str);
            report.set(Layer::ControlGroup, missing(reason));
            return Ok(sys::clone_into_parent(None).map_err(context("clone"))?);
        }
    };
    // Both processes come back from the call and report the same.
    report.set(Layer::ControlGroup, state.clone());
    let group = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    group
        .map_err(io::Error::from)
        .and_then(|group| sys::clone_into_parent(Some(group.as_fd())))
        .map_err(|error| NotStarted::Group(error.to_string()))
}

enum NotStarted {
    Group(String),
    Other(io::Error),
}

impl From<io::Error> for NotStarted {
    fn from(error: io::Error) -> Self {
        Self::Other(error)
    }
}

/// What the host says next, and when it began to.
fn receive<T: DeserializeOwned>(control: &mut UnixStream) -> io::Result<(T, Instant)> {
    let mut length = [0_u8; 4];
    control.read_exact(&mut length).map_err(context("specification"))?;
    let begun = Instant::now();
    let length = u64::from(u32::from_be_bytes(length));
    if length > SPEC_BYTES_MAX {
        return Err(io::Error::other("the specification is longer than allowed"));
    }
    let mut text = Vec::new();
    control.take(length).read_to_end(&mut text)?;
    Ok((serde_json::from_slice(&text).map_err(io::Error::other)?, begun))
}

fn send(control: &UnixStream, message: &Message, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
    }
    let sent =
        rustix::net::sendmsg(control, &[io::IoSlice::new(&line)], &mut ancillary, rustix::net::SendFlags::NOSIGNAL)?;
    // Descriptors travel with the first byte, so the rest may follow plainly.
    (&mut &*control).write_all(line.get(sent..).unwrap_or_default())
}

/// What holds after [`leave_namespaces`].
#[derive(Debug)]
struct Namespaces {
    root: bool,
    mount: bool,
    pid: bool,
}

/// Needs to know nothing of what will be started, so it is done while nobody waits.
fn leave_namespaces(without: &[Layer], report: &mut Report) -> Namespaces {
    let root = rustix::process::geteuid().is_root();
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    if !root {
        // An unprivileged process gets the other namespaces through a user namespace. It maps itself to itself: being
        // root inside would only be one more thing to give up.
        attempt(without, report, Layer::UserNamespace, || {
            sys::unshare(libc::CLONE_NEWUSER)?;
            map_ids(rustix::fs::CWD, Path::new("/proc/self"), uid, gid)
        });
    }
    let namespaces = [
        (Layer::MountNamespace, libc::CLONE_NEWNS),
        (Layer::PidNamespace, libc::CLONE_NEWPID),
        (Layer::NetNamespace, libc::CLONE_NEWNET),
        (Layer::IpcNamespace, libc::CLONE_NEWIPC),
        (Layer::UtsNamespace, libc::CLONE_NEWUTS),
        (Layer::CgroupNamespace, libc::CLONE_NEWCGROUP),
    ];
    for (layer, flag) in namespaces {
        attempt(without, report, layer, || sys::unshare(flag));
    }
    Namespaces { root, mount: report.is_active(Layer::MountNamespace), pid: report.is_active(Layer::PidNamespace) }
}

fn attempt(without: &[Layer], report: &mut Report, layer: Layer, action: impl FnOnce() -> io::Result<()>) {
    let state = if without.contains(&layer) {
        LayerState::Missing { reason: "left out on purpose".to_owned() }
    } else {
        match action() {
            Ok(()) => LayerState::Active,
            Err(error) => LayerState::Missing { reason: error.to_string() },
        }
    };
    report.set(layer, state);
}

fn map_ids(directory: impl AsFd, proc_self: &Path, uid: u32, gid: u32) -> io::Result<()> {
    for (file, text) in
        [("setgroups", "deny".to_owned()), ("uid_map", format!("{uid} {uid} 1")), ("gid_map", format!("{gid} {gid} 1"))]
    {
        let fd = rustix::fs::openat(&directory, proc_self.join(file), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&fd, text.as_bytes())?;
    }
    Ok(())
}

/// Applies every layer that the new process applies to itself. Returns the private directory.
fn confine(spec: &Spec, namespaces: &Namespaces, report: &mut Report, control: &UnixStream) -> io::Result<OwnedFd> {
    report.set(Layer::OwnProcess, LayerState::Active);
    rustix::process::setsid()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty())
        .map_err(io::Error::from)
        .map_err(context("/dev/null"))?;
    rustix::stdio::dup2_stdin(&null)?;
    // Needed for the id maps after the old root is gone. Not inherited by the engine.
    let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok();
    // The kernel should take an operator before anything else when the whole machine is out of memory.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");

    let (uid, gid) = if namespaces.root {
        (spec.uid, spec.uid)
    } else {
        (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
    };
    if namespaces.mount {
        let built = root::enter(spec, uid, gid);
        if let Err(error) = built {
            // Half a root is worse than none: nothing after this could be trusted to see the paths it expects.
            return Err(context("mount namespace")(error));
        }
    } else {
        root::prepare_without_namespace(spec, uid, gid).map_err(context("private directory"))?;
    }
    let private_path = private_path(spec, namespaces);
    let private = rustix::fs::open(&private_path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .map_err(context("private directory"))?;
    if report.is_active(Layer::UtsNamespace) {
        let _ = rustix::system::sethostname(b"operator");
    }

    attempt(&spec.without, report, Layer::Descriptors, || sys::close_on_exec_from(3));
    attempt(&spec.without, report, Layer::Uid, || {
        if namespaces.root {
            drop_bounding_set()?;
            sys::become_user(uid, gid)
        } else {
            Err(io::Error::other("the host does not run as root, so operators share its user"))
        }
    });
    if namespaces.root {
        let user = if report.is_active(Layer::Uid) { (uid, gid) } else { (0, 0) };
        attempt(&spec.without, report, Layer::UserNamespace, || {
            let proc = proc.as_ref().ok_or_else(|| io::Error::other("no /proc to write the id map to"))?;
            // Changing ids made this process's own /proc files root's. Executing the engine decides about this anew.
            rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?;
            sys::unshare(libc::CLONE_NEWUSER)?;
            map_ids(proc, Path::new("self"), user.0, user.1)
        });
    }
    drop(proc);
    // After the user namespace, so that threads are counted in it and not with the host's other processes.
    attempt(&spec.without, report, Layer::Rlimits, || set_rlimits(&spec.rlimits));
    attempt(&spec.without, report, Layer::Capabilities, drop_capabilities);
    attempt(&spec.without, report, Layer::NoNewPrivileges, || Ok(rustix::thread::set_no_new_privs(true)?));
    // After the last change of ids, which would clear it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    if host_is_gone(control)? {
        return Err(io::Error::other("the host ended meanwhile"));
    }
    report.set(Layer::ParentDeath, LayerState::Active);
    if !spec.without.contains(&Layer::Landlock) {
        landlock::restrict(spec, namespaces.mount, &private_path, report);
    } else {
        report.set(Layer::Landlock, LayerState::Missing { reason: "left out on purpose".to_owned() });
    }
    report.set(Layer::Environment, LayerState::Active);
    let filter =
        seccomp::compile(std::process::id(), namespaces.pid, spec.may_restrict_itself).map_err(io::Error::other);
    attempt(&spec.without, report, Layer::Seccomp, || seccomp::install(&filter?));
    Ok(private)
}

fn private_path(spec: &Spec, namespaces: &Namespaces) -> PathBuf {
    if namespaces.mount { PathBuf::from(PRIVATE) } else { spec.private_fallback.clone() }
}

/// True when nobody holds the other end of the control socket any more. Closes the gap between the launcher's start
/// and the moment when the parent-death signal is in force.
fn host_is_gone(control: &UnixStream) -> io::Result<bool> {
    let mut fds = [rustix::event::PollFd::new(control, rustix::event::PollFlags::empty())];
    rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(fds.iter().any(|fd| fd.revents().intersects(rustix::event::PollFlags::HUP | rustix::event::PollFlags::ERR)))
}

fn drop_bounding_set() -> io::Result<()> {
    // Bits past the last capability that this kernel knows give EINVAL, which ends the list.
    for bit in 0..63_u32 {
        let Some(capability) = rustix::thread::CapabilitySet::from_bits(1_u64 << bit) else { break };
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    let none = rustix::thread::CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        rustix::thread::CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    Ok(())
}

fn set_rlimits(limits: &Rlimits) -> io::Result<()> {
    let fixed = |value: u64| Rlimit { current: Some(value), maximum: Some(value) };
    rustix::process::setrlimit(Resource::Data, fixed(limits.data_bytes))?;
    rustix::process::setrlimit(Resource::Nofile, fixed(limits.files))?;
    rustix::process::setrlimit(Resource::Nproc, fixed(limits.threads))?;
    rustix::process::setrlimit(Resource::Core, fixed(0))?;
    rustix::process::setrlimit(Resource::Memlock, fixed(0))?;
    rustix::process::setrlimit(Resource::Msgqueue, fixed(0))?;
    Ok(())
}

/// Reports and executes the engine. Returns only with an error.
fn become_engine(
    spec: &Spec,
    namespaces: &Namespaces,
    report: &Report,
    (ahead, told): (Duration, Instant),
    control: &UnixStream,
    private: &OwnedFd,
) -> io::Error {
    if let Some(missing) = report.unacceptable(spec.isolation) {
        return io::Error::other(format!("isolation layer `{}` is missing: {}", missing.layer, missing.reason()));
    }
    let (root, private_path) = if namespaces.mount {
        (String::new(), PRIVATE.to_owned())
    } else {
        (spec.private_fallback.join("root").display().to_string(), spec.private_fallback.display().to_string())
    };
    let fill = |text: &str| text.replace("{private}", &private_path).replace("{root}", &root);
    let Some((program, arguments)) = spec.argv.split_first() else {
        return io::Error::other("no program to execute");
    };
    let microseconds = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let setup = Setup { ahead_microseconds: microseconds(ahead), microseconds: microseconds(told.elapsed()) };
    let message = Message::Confined { report: report.clone(), setup };
    if let Err(error) = send(control, &message, Some(private.as_fd())) {
        return error;
    }
    let in_place = spec.binds.iter().find(|bind| !namespaces.mount && bind.target == Path::new(program));
    let mut command = Command::new(in_place.map_or(Path::new(program), |bind| bind.source.as_path()));
    command.args(arguments.iter().map(|argument| fill(argument))).env_clear();
    for (name, value) in &spec.env {
        command.env(name, fill(value));
    }
    context("exec")(command.exec())
}
