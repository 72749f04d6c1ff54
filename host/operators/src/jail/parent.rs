//! The host's side of the launcher: starts it, collects what it reports, and keeps a handle on the confined process.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::Serialize;
use tokio::io::Interest;

use super::{Layer, Message, Report, SPEC_BYTES_MAX, SUBCOMMAND, Setup, Spec};
use crate::sys;

/// How to start the launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launcher {
    /// Program and leading arguments.
    pub command: Vec<OsString>,
}

impl Default for Launcher {
    /// This very binary, under [`SUBCOMMAND`]. The link is followed by the kernel, so the binary may have been replaced
    /// or removed on disk since.
    fn default() -> Self {
        Self { command: vec!["/proc/self/exe".into(), SUBCOMMAND.into()] }
    }
}

/// Why there is no confined process.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher itself did not start.
    #[error("cannot start the launcher: {0}")]
    Spawn(#[source] io::Error),
    /// The launcher gave up: a layer is missing that may not be, or the engine could not be executed.
    #[error("{reason}")]
    Refused {
        /// What it said.
        reason: String,
    },
    /// The launcher broke off or said something else than agreed.
    #[error("the launcher ended without a result: {0}")]
    Protocol(String),
    /// The control group does not take the process.
    #[error("the control group does not take it: {0}")]
    Group(String),
    /// It took too long.
    #[error("the launcher took longer than {0:?}")]
    Timeout(Duration),
}

/// A confined process that now is the engine.
#[derive(Debug)]
pub struct Confined {
    /// Its process id as the host sees it.
    pub pid: i32,
    /// Its private directory, by descriptor: the path exists only in its own mount namespace.
    pub private: OwnedFd,
    /// What the launcher found.
    pub report: Report,
    /// How long that took.
    pub setup: Setup,
    /// Both of its output streams.
    pub output: OwnedFd,
    process: ProcessHandle,
}

impl Confined {
    /// Splits off the handle by which the process is signalled and awaited.
    #[must_use]
    pub fn into_parts(self) -> (ProcessHandle, OwnedFd, OwnedFd, Report) {
        (self.process, self.private, self.output, self.report)
    }
}

/// A process by descriptor, so that a signal can never reach another one that got its number.
///
/// Dropping it kills the process.
#[derive(Debug)]
pub struct ProcessHandle {
    pidfd: OwnedFd,
    reaped: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exit status {code}"),
            Self::Signal(signal) => write!(formatter, "signal {signal}"),
        }
    }
}

impl ProcessHandle {
    fn open(pid: i32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("process id 0"))?;
        Ok(Self { pidfd: rustix::process::pidfd_open(pid, PidfdFlags::empty())?, reaped: false })
    }

    /// Another descriptor of the same process, for whoever only signals it.
    ///
    /// # Errors
    /// When descriptors are used up.
    pub fn signaller(&self) -> io::Result<Signaller> {
        Ok(Signaller { pidfd: self.pidfd.as_fd().try_clone_to_owned()? })
    }

    /// Waits until the process has ended and takes its status.
    ///
    /// # Errors
    /// When it is not (or no longer) a child of this process.
    pub async fn wait(mut self) -> io::Result<Exit> {
        {
            let readable = sys::watch_readable(self.pidfd.as_fd().try_clone_to_owned()?)?;
            drop(readable.readable().await?);
        }
        self.reap(WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?
            .ok_or_else(|| io::Error::other("the process ended, yet has no status"))
    }

    fn reap(&mut self, options: WaitIdOptions) -> io::Result<Option<Exit>> {
        let status = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options)?;
        Ok(status.map(|status| {
            self.reaped = true;
            match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, signal) => Exit::Signal(signal.unwrap_or(0)),
            }
        }))
    }
}

impl Drop for ProcessHandle {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
            // After SIGKILL the end is near, and without this the process would stay as a zombie.
            let _ = self.reap(WaitIdOptions::EXITED);
        }
    }
}

/// Sends signals to one process.
#[derive(Debug)]
pub struct Signaller {
    pidfd: OwnedFd,
}

impl Signaller {
    /// Asks the process to end. One that has ended already is no error.
    pub fn terminate(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::TERM);
    }

    /// Ends the process.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Launcher {
    /// Starts a launcher that waits for what to launch: half of what a launch takes is done then. `without` is what the
    /// specification will say.
    ///
    /// Must be called on a thread that lives as long as the process is wanted: the kernel takes the end of that thread
    /// for the end of the parent.
    ///
    /// # Errors
    /// [`LaunchError::Spawn`].
    pub fn start(&self, without: &[Layer]) -> Result<Waiting, LaunchError> {
        let (mut control, control_theirs) = StdUnixStream::pair().map_err(LaunchError::Spawn)?;
        let (output, output_theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|error| LaunchError::Spawn(error.into()))?;
        let (program, arguments) =
            self.command.split_first().ok_or_else(|| LaunchError::Protocol("no launcher is configured".to_owned()))?;
        let output_again = output_theirs.try_clone().map_err(LaunchError::Spawn)?;
        let process = Command::new(program)
            .args(arguments)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(control_theirs)))
            .stdout(Stdio::from(output_theirs))
            .stderr(Stdio::from(output_again))
            .spawn()
            .map_err(LaunchError::Spawn)?;
        tell(&mut control, without)?;
        Ok(Waiting { process: OwnChild(process), control, output })
    }

    /// Starts the engine described by `spec`, confined, and returns once it has been executed. Called as [`Launcher::start`].
    ///
    /// # Errors
    /// [`LaunchError`]; nothing is left running then.
    pub async fn launch(&self, spec: &Spec, deadline: Duration) -> Result<Confined, LaunchError> {
        match self.start(&spec.without)?.launch(spec, deadline).await {
            Err(LaunchError::Group(reason)) => {
                let without = Spec { group: Err(reason), ..spec.clone() };
                self.start(&spec.without)?.launch(&without, deadline).await
            }
            launched => launched,
        }
    }

    /// As [`Launcher::launch`], by a launcher that waits already, or by another one if that cannot.
    ///
    /// # Errors
    /// As there.
    pub async fn launch_by(&self, waiting: Waiting, spec: &Spec, deadline: Duration) -> Result<Confined, LaunchError> {
        match waiting.launch(spec, deadline).await {
            // It ended while it waited, or there is something that a fresh one sees to.
            Err(LaunchError::Spawn(_) | LaunchError::Protocol(_) | LaunchError::Group(_)) => {
                self.launch(spec, deadline).await
            }
            launched => launched,
        }
    }
}

/// A launcher that waits for its specification. It ends when this is dropped, and with the host.
#[derive(Debug)]
pub struct Waiting {
    process: OwnChild,
    control: StdUnixStream,
    output: OwnedFd,
}

impl Waiting {
    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.0.id()
    }

    /// Whether it has not ended meanwhile.
    pub(crate) fn is_there(&mut self) -> bool {
        matches!(self.process.0.try_wait(), Ok(None))
    }

    async fn launch(self, spec: &Spec, deadline: Duration) -> Result<Confined, LaunchError> {
        let result = tokio::time::timeout(deadline, converse(self.control, spec)).await;
        // It has cloned and ended, or is to end now: the engine is another process.
        drop(self.process);
        let collected = result.map_err(|_| LaunchError::Timeout(deadline))??;
        Ok(Confined {
            pid: collected.pid,
            private: collected.private,
            report: collected.report,
            setup: collected.setup,
            output: self.output,
            process: collected.process,
        })
    }
}

/// A child that does not outlive this.
#[derive(Debug)]
pub(crate) struct OwnChild(pub(crate) std::process::Child);

impl Drop for OwnChild {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Collected {
    pid: i32,
    process: ProcessHandle,
    private: OwnedFd,
    report: Report,
    setup: Setup,
}

/// Sends a document that is smaller than a socket's buffer, so this does not block.
fn tell(control: &mut StdUnixStream, document: &(impl Serialize + ?Sized)) -> Result<(), LaunchError> {
    let text = serde_json::to_vec(document).map_err(|error| LaunchError::Protocol(error.to_string()))?;
    let length = u32::try_from(text.len()).ok().filter(|length| u64::from(*length) <= SPEC_BYTES_MAX);
    let length = length.ok_or_else(|| LaunchError::Protocol("the specification is too long".to_owned()))?;
    control.write_all(&length.to_be_bytes()).and_then(|()| control.write_all(&text)).map_err(LaunchError::Spawn)
}

async fn converse(mut ours: StdUnixStream, spec: &Spec) -> Result<Collected, LaunchError> {
    tell(&mut ours, spec)?;
    ours.set_nonblocking(true).map_err(LaunchError::Spawn)?;
    let ours = tokio::net::UnixStream::from_std(ours).map_err(LaunchError::Spawn)?;

    let mut text = Vec::new();
    let mut private = None;
    let mut process = None;
    let mut confined = None;
    let mut failed = None;
    loop {
        let received = ours
            .async_io(Interest::READABLE, || receive(ours.as_fd(), &mut text, &mut private))
            .await
            .map_err(LaunchError::Spawn)?;
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            match serde_json::from_slice(&line).map_err(|error| LaunchError::Protocol(error.to_string()))? {
                // Opened at once: from here on an error kills it.
                Message::Started { pid } => {
                    process = Some((pid, ProcessHandle::open(pid).map_err(LaunchError::Spawn)?));
                }
                Message::Confined { report, setup } => confined = Some((report, setup)),
                Message::Failed { error } => failed = Some(error),
                Message::GroupRefused { reason } => return Err(LaunchError::Group(reason)),
            }
        }
        if received == 0 {
            break;
        }
    }
    if let Some(reason) = failed {
        return Err(LaunchError::Refused { reason });
    }
    let ended = |what: &str| LaunchError::Protocol(format!("it did not say {what}; its output has the reason"));
    let (pid, process) = process.ok_or_else(|| ended("which process it started"))?;
    let (report, setup) = confined.ok_or_else(|| ended("what holds"))?;
    let private = private.ok_or_else(|| ended("where the private directory is"))?;
    Ok(Collected { pid, process, private, report, setup })
}

fn receive(socket: BorrowedFd<'_>, text: &mut Vec<u8>, private: &mut Option<OwnedFd>) -> io::Result<usize> {
    let mut buffer = [0_u8; 8192];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut buffer)],
        &mut ancillary,
        rustix::net::RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in ancillary.drain() {
        if let rustix::net::RecvAncillaryMessage::ScmRights(fds) = message {
            for fd in fds {
                *private = Some(fd);
            }
        }
    }
    text.extend_from_slice(buffer.get(..received.bytes).unwrap_or_default());
    Ok(received.bytes)
}
