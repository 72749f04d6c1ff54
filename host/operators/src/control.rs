//! How another process of the same user asks a running host about its operators: `portcullis operators logs|status`.
//!
//! A Unix socket in the host's own folder. Who asks sends one line of JSON and gets lines of JSON back. Only this user and
//! root are answered, and no process that this host runs operators in.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::logs::{LogLine, printable};
use crate::manager::{Manager, base_folder};

const SOCKET: &str = "control.sock";
const CONNECTIONS_MAX: usize = 16;
const QUESTION_BYTES_MAX: u64 = 4096;
const QUESTION: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(10);

/// What may be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// One [`HostStatus`].
    Status,
    /// The last lines that operators printed, each a [`LogLine`].
    Logs {
        /// Only this one's.
        operator: Option<String>,
        /// And those that come, until whoever asked hangs up.
        follow: bool,
    },
}

/// What a host runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The host's process id.
    pub pid: u32,
    /// Which engine it uses.
    pub engine: String,
    /// Operators by name.
    pub operators: Vec<OperatorStatus>,
    /// Generic processes that are kept ready.
    pub ready: usize,
}

/// What runs of one operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorStatus {
    /// Its name.
    pub name: String,
    /// Its processes.
    pub processes: Vec<RunningProcess>,
    /// Requests since the host's start.
    pub requests: u64,
    /// Of these, without an answer of the operator's own.
    pub failed: u64,
    /// Why no process can be started at the moment; the reason's id.
    pub trouble: Option<String>,
}

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningProcess {
    /// Its number in the log.
    pub number: u64,
    /// Its process id.
    pub pid: i32,
    /// Requests in flight.
    pub in_flight: usize,
    /// Since its start.
    pub age_seconds: u64,
    /// Resident memory.
    pub resident_bytes: u64,
    /// CPU time since its start.
    pub cpu_milliseconds: u64,
    /// Layers of isolation that it lacks.
    pub missing_layers: Vec<String>,
}

/// Opens the socket. The folder is the host's own.
pub(crate) fn listen(folder: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join(SOCKET);
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

pub(crate) async fn serve(manager: Arc<Manager>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        if !may_ask(&manager, &stream) {
            tracing::warn!("refused a question from another user or from an operator");
            continue;
        }
        let manager = Arc::clone(&manager);
        tokio::spawn(async move {
            // Whoever asks may hang up at any time.
            drop(answer(&manager, stream).await);
            drop(place);
        });
    }
}

fn may_ask(manager: &Manager, stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| {
        let known = peer.uid() == own || peer.uid() == 0;
        // Where the host is not root and the kernel offers no namespaces, an operator that broke out of its engine has
        // this very user.
        known && !peer.pid().is_some_and(|pid| manager.is_operator(pid))
    })
}

async fn answer(manager: &Manager, stream: UnixStream) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut limited = tokio::io::BufReader::new(read.take(QUESTION_BYTES_MAX));
    tokio::time::timeout(QUESTION, limited.read_line(&mut line)).await??;
    let question: Question = serde_json::from_str(&line)?;
    let (operator, follow) = match question {
        Question::Status => return send(&mut write, &manager.host_status()).await,
        Question::Logs { operator, follow } => (operator, follow),
    };
    // Reads along from before what is kept is copied, so that nothing falls between; a line can come twice then.
    let mut coming = manager.readers().follow(operator.as_deref());
    let kept = manager.recent_logs(operator.as_deref());
    for line in &kept {
        send(&mut write, line).await?;
    }
    if !follow {
        return Ok(());
    }
    let mut gone = [0; 1];
    let mut end = limited.into_inner().into_inner();
    loop {
        tokio::select! {
            line = coming.recv() => match line {
                Some(line) if kept.last().is_some_and(|last| line.time <= last.time && kept.contains(&line)) => {}
                Some(line) => send(&mut write, &line).await?,
                None => return Ok(()),
            },
            _ = end.read(&mut gone) => return Ok(()),
        }
    }
}

async fn send(write: &mut (impl AsyncWriteExt + Unpin), answer: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(answer)?;
    text.push(b'\n');
    tokio::time::timeout(ANSWER, write.write_all(&text)).await?
}

/// The sockets of the hosts of this user that run now. `run_folder` is that of their settings.
///
/// # Errors
/// When the folder cannot be read; that there is none is no error.
pub fn hosts(run_folder: &Path) -> io::Result<Vec<PathBuf>> {
    let base = base_folder(run_folder);
    let entries = match std::fs::read_dir(&base) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path().join(SOCKET))
        // One that was killed leaves its socket behind, where nobody answers.
        .filter(|socket| StdUnixStream::connect(socket).is_ok())
        .collect();
    found.sort();
    Ok(found)
}

/// Asks one host. Blocks; hands out answers as they come until the host has none left, or `each` says that it is enough.
///
/// # Errors
/// When the host does not answer, or `each` fails.
pub fn ask(socket: &Path, question: &Question, mut each: impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
    let mut stream = StdUnixStream::connect(socket)?;
    let mut text = serde_json::to_vec(question)?;
    text.push(b'\n');
    stream.write_all(&text)?;
    for line in BufReader::new(stream).lines() {
        each(&line?)?;
    }
    Ok(())
}

/// As [`ask`], for logs.
///
/// # Errors
/// As there.
pub fn read_logs(
    socket: &Path,
    operator: Option<&str>,
    follow: bool,
    mut each: impl FnMut(LogLine) -> io::Result<()>,
) -> io::Result<()> {
    let question = Question::Logs { operator: operator.map(str::to_owned), follow };
    ask(socket, &question, |answer| {
        let mut line: LogLine = serde_json::from_str(answer)?;
        // Whoever is at the other end: a terminal is not for it to steer.
        line.text = printable(&line.text);
        line.operator = printable(&line.operator);
        each(line)
    })
}

/// As [`ask`], for what a host runs.
///
/// # Errors
/// As there, and when it says nothing.
pub fn read_status(socket: &Path) -> io::Result<HostStatus> {
    let mut found = None;
    ask(socket, &Question::Status, |answer| {
        found = Some(serde_json::from_str(answer)?);
        Ok(())
    })?;
    found.ok_or_else(|| io::Error::other("the host gave no answer"))
}
