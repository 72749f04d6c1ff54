//! Child processes: started in a group of their own, ended with us, and quoted when they fail.
//!
//! A signal that ends `cargo xtask` must end what it started, also where no terminal passes the signal on (CI ends a
//! run by signalling one process). So each child leads a process group and [`end_children_on_signals`] forwards.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// How long children may take to end after a signal before they are killed.
const END_WITHIN: Duration = Duration::from_secs(3);

/// How much of a failed command's output an error quotes.
const QUOTED_LINES: usize = 12;

static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// A command that could not be started or did not succeed, with what a person needs to see of it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) command: String,
    pub(crate) outcome: String,
    pub(crate) last_lines: Vec<String>,
}

impl Failure {
    /// A failure that is not an exit status: the program is absent, or what it made is not what was asked for.
    pub(crate) fn new(command: impl Into<String>, outcome: impl Into<String>) -> Self {
        Self { command: command.into(), outcome: outcome.into(), last_lines: Vec::new() }
    }

    fn from_output(command: &Command, status: ExitStatus, output: &[u8]) -> Self {
        let text = String::from_utf8_lossy(output);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let quoted = lines.iter().skip(lines.len().saturating_sub(QUOTED_LINES));
        Self {
            command: shell_line(command),
            outcome: status.to_string(),
            last_lines: quoted.map(|line| (*line).to_owned()).collect(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.command, self.outcome)?;
        for line in &self.last_lines {
            write!(f, "\n    | {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// Ends every running child, then this process, when a signal asks for it.
pub(crate) fn end_children_on_signals() -> io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    thread::spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        // Held to the end of the process, so that no thread starts another child meanwhile, as a retry would.
        let groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        // SIGTERM whatever the signal was: shells start background children with SIGINT ignored.
        for group in groups.iter() {
            // An error means that the group has ended already.
            let _ = kill_process_group(*group, Signal::TERM);
        }
        let deadline = Instant::now() + END_WITHIN;
        while Instant::now() < deadline && groups.iter().any(|group| test_kill_process_group(*group).is_ok()) {
            thread::sleep(Duration::from_millis(20));
        }
        for group in groups.iter() {
            let _ = kill_process_group(*group, Signal::KILL);
        }
        std::process::exit(128 + signal);
    });
    Ok(())
}

/// A running child whose group is on the list that signals are forwarded to.
struct Running {
    child: Child,
    group: Option<Pid>,
}

impl Running {
    fn start(command: &mut Command) -> io::Result<Self> {
        command.stdin(Stdio::null()).process_group(0);
        // Held while starting, so that a signal cannot fall between the start and the entry on the list.
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        groups.extend(group);
        Ok(Self { child, group })
    }

    fn wait(mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait();
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| Some(*group) != self.group);
        status
    }
}

/// Runs a command whose output goes where ours goes.
pub(crate) fn run_shown(command: &mut Command) -> Result<(), Failure> {
    let status = start(command)?.wait().map_err(|error| unwaited(command, &error))?;
    if status.success() { Ok(()) } else { Err(Failure::from_output(command, status, b"")) }
}

/// Runs a command, giving each line of its standard output, with its line end, to the caller.
pub(crate) fn run_watched(command: &mut Command, mut each_line: impl FnMut(&[u8])) -> Result<(), Failure> {
    let mut running = start(command.stdout(Stdio::piped()))?;
    if let Some(stdout) = running.child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            each_line(&line);
            line.clear();
        }
    }
    let status = running.wait().map_err(|error| unwaited(command, &error))?;
    if status.success() { Ok(()) } else { Err(Failure::from_output(command, status, b"")) }
}

/// Runs a command silently and gives what it wrote, standard output and standard error together.
pub(crate) fn run_quietly(command: &mut Command) -> Result<String, Failure> {
    let not_piped = |error: io::Error| Failure::new(shell_line(command), format!("no pipe for its output: {error}"));
    let (mut reader, writer) = io::pipe().map_err(not_piped)?;
    let second_writer = writer.try_clone().map_err(not_piped)?;
    let running = start(command.stdout(writer).stderr(second_writer))?;
    // The command keeps both writers until they are replaced; only then does the reader see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut output = Vec::new();
    let read = reader.read_to_end(&mut output);
    let status = running.wait().map_err(|error| unwaited(command, &error))?;
    if !status.success() {
        return Err(Failure::from_output(command, status, &output));
    }
    read.map_err(|error| Failure::new(shell_line(command), format!("its output could not be read: {error}")))?;
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// Runs a short query and gives its standard output alone.
pub(crate) fn query(command: &mut Command) -> Result<String, Failure> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| unstarted(command, &error))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(Failure::from_output(command, output.status, &output.stderr))
    }
}

/// Repeats what may fail for a passing reason, such as a download, with a growing pause between the tries.
pub(crate) fn with_retries<T>(mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    for pause in [Duration::from_secs(1), Duration::from_secs(4)] {
        match attempt() {
            Err(failure) if failure.outcome != NOT_INSTALLED => thread::sleep(pause),
            settled => return settled,
        }
    }
    attempt().map_err(|mut failure| {
        failure.outcome.push_str(" (3 tries)");
        failure
    })
}

const NOT_INSTALLED: &str = "is not installed";

fn start(command: &mut Command) -> Result<Running, Failure> {
    Running::start(command).map_err(|error| unstarted(command, &error))
}

fn unstarted(command: &Command, error: &io::Error) -> Failure {
    let program = command.get_program().to_string_lossy().into_owned();
    match error.kind() {
        io::ErrorKind::NotFound => Failure::new(program, NOT_INSTALLED),
        _ => Failure::new(program, format!("could not be started: {error}")),
    }
}

fn unwaited(command: &Command, error: &io::Error) -> Failure {
    Failure::new(shell_line(command), format!("its end could not be awaited: {error}"))
}

/// The command as a person would type it.
pub(crate) fn shell_line(command: &Command) -> String {
    // `cargo()` names the toolchain's own binary, of which a person types the last part.
    let program = Path::new(command.get_program());
    let program = program.file_name().filter(|name| *name == "cargo").unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(quoted).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into_owned() } else { format!("'{word}'") }
}

/// A `cargo` command that behaves as if typed in a shell.
///
/// `cargo run` leaves variables about *this* crate in the environment. Some build scripts ask to be run again when
/// those change, so passing them on would compile such crates anew each time xtask and a plain `cargo` take turns.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    for (name, _) in std::env::vars_os() {
        if is_set_for_one_crate(&name.to_string_lossy()) {
            command.env_remove(&name);
        }
    }
    command
}

fn is_set_for_one_crate(variable: &str) -> bool {
    variable.starts_with("CARGO_PKG_")
        || variable.starts_with("CARGO_BIN_")
        || matches!(
            variable,
            "CARGO"
                | "CARGO_CRATE_NAME"
                | "CARGO_MANIFEST_DIR"
                | "CARGO_MANIFEST_PATH"
                | "CARGO_PRIMARY_PACKAGE"
                | "OUT_DIR"
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn failure_quotes_only_the_last_lines_of_both_streams() {
        let failure = run_quietly(&mut sh("seq 1 20; echo broken >&2; exit 3")).unwrap_err();
        assert_eq!(failure.outcome, "exit status: 3");
        assert_eq!(failure.last_lines.first().map(String::as_str), Some("10"));
        assert_eq!(failure.last_lines.last().map(String::as_str), Some("broken"));
        assert_eq!(failure.last_lines.len(), QUOTED_LINES);
    }

    #[test]
    fn absent_program_is_said_to_be_absent_and_not_tried_again() {
        let mut tries = 0;
        let failure = with_retries(|| {
            tries += 1;
            run_quietly(&mut Command::new("portcullis-no-such-program"))
        })
        .unwrap_err();
        assert_eq!(failure.to_string(), "`portcullis-no-such-program`: is not installed");
        assert_eq!(tries, 1);
    }

    #[test]
    fn watched_output_arrives_line_by_line() {
        let mut lines = Vec::new();
        let mut printf = sh("printf 'one\\ntwo\\nunfinished'");
        run_watched(&mut printf, |line| lines.extend([line.to_vec()])).unwrap();
        assert_eq!(lines, [&b"one\n"[..], b"two\n", b"unfinished"]);
    }

    #[test]
    fn child_leads_its_own_process_group() {
        let output = run_quietly(&mut sh("ps -o pid=,pgid= -p $$ || awk '{print $1, $5}' /proc/$$/stat")).unwrap();
        let ids: Vec<&str> = output.split_whitespace().collect();
        assert_eq!(ids.len(), 2, "{output}");
        assert_eq!(ids[0], ids[1]);
    }

    #[test]
    fn words_with_spaces_are_quoted() {
        assert_eq!(shell_line(&sh("exit 1")), "sh -c 'exit 1'");
        assert_eq!(shell_line(&Command::new("/toolchain/bin/cargo")), "cargo");
    }

    #[test]
    fn variables_about_this_crate_are_dropped_and_settings_kept() {
        assert!(is_set_for_one_crate("CARGO_PKG_NAME"));
        assert!(is_set_for_one_crate("CARGO_MANIFEST_DIR"));
        assert!(!is_set_for_one_crate("CARGO_TARGET_DIR"));
        assert!(!is_set_for_one_crate("CARGO_TERM_COLOR"));
    }
}
