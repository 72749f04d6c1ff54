//! A child process that ends with the test, and whose output is kept for when something fails.

use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long anything in a test may take. Generous: it ends hung tests and measures nothing.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Lines kept per process; the oldest go first.
const LINES_MAX: usize = 2_000;

/// A running child. Dropping it kills it and waits for its end.
pub struct Process {
    name: String,
    child: Arc<Mutex<Child>>,
    output: Arc<Output>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Output {
    state: Mutex<OutputState>,
    changed: Condvar,
}

#[derive(Default)]
struct OutputState {
    lines: Vec<String>,
    open: usize,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, OutputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, line: String) {
        let mut state = self.lock();
        if state.lines.len() >= LINES_MAX {
            state.lines.remove(0);
        }
        state.lines.push(line);
        self.changed.notify_all();
    }

    fn close(&self) {
        self.lock().open -= 1;
        self.changed.notify_all();
    }
}

/// How a process ended that was run to its end.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output and error, line by line as they came.
    pub output: String,
}

impl Process {
    /// Starts `command` with its output captured.
    pub fn start(name: &str, command: &mut Command) -> Result<Process, String> {
        Process::start_keeping(name, command, |_| true)
    }

    /// The same, keeping only some lines of the output. `keep` sees all of them, as they come.
    pub fn start_keeping(
        name: &str,
        command: &mut Command,
        keep: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<Process, String> {
        let keep: Arc<dyn Fn(&str) -> bool + Send + Sync> = Arc::new(keep);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{name} cannot be started: {error}"))?;
        let output = Arc::new(Output::default());
        let mut readers = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            readers.push(read_lines(stdout, &output, Arc::clone(&keep)));
        }
        if let Some(stderr) = child.stderr.take() {
            readers.push(read_lines(stderr, &output, Arc::clone(&keep)));
        }
        let child = Arc::new(Mutex::new(child));
        running().push(Arc::clone(&child));
        Ok(Process { name: name.to_owned(), child, output, readers })
    }

    /// Runs `command` to its end.
    pub fn run(name: &str, command: &mut Command) -> Result<Ended, String> {
        let mut process = Process::start(name, command)?;
        let status = process.wait()?;
        Ok(Ended { status, output: process.log() })
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> Result<ExitStatus, String> {
        let deadline = Instant::now() + DEADLINE;
        let mut state = self.output.lock();
        // Both pipes close when the process ends, since it passes them on to nobody.
        while state.open > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                return Err(format!("{} did not end within {DEADLINE:?}\n{}", self.name, self.log()));
            }
            (state, _) = self.output.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.child().wait().map_err(|error| format!("{}: {error}", self.name))
    }

    /// Waits until a line of the output gives `Some`. Fails if the process ends first, or takes too long.
    pub fn wait_for<T>(&self, mut find: impl FnMut(&str) -> Option<T>) -> Result<T, String> {
        let deadline = Instant::now() + DEADLINE;
        let mut seen = 0;
        let mut state = self.output.lock();
        loop {
            for line in state.lines.iter().skip(seen) {
                if let Some(found) = find(line) {
                    return Ok(found);
                }
            }
            seen = state.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if state.open == 0 || left.is_zero() {
                let why = if state.open == 0 { "ended before it was ready" } else { "was not ready in time" };
                drop(state);
                return Err(format!("{} {why}:\n{}", self.name, self.log()));
            }
            (state, _) = self.output.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        let mut text = String::new();
        for line in &self.output.lock().lines {
            text.push_str(line);
            text.push('\n');
        }
        text
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child().id()
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// CPU time that threads of a process have had so far, as the kernel counts it in nanoseconds; `which` is asked their names.
pub fn cpu_time(process: u32, which: impl Fn(&str) -> bool) -> Result<Duration, String> {
    let folder = PathBuf::from(format!("/proc/{process}/task"));
    let fail = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut nanos = 0;
    for thread in std::fs::read_dir(&folder).map_err(fail)? {
        let thread = thread.map_err(fail)?.path();
        let read = |file: &str| std::fs::read_to_string(thread.join(file));
        // A thread can end meanwhile; what it had is then lost, and was little.
        let (Ok(name), Ok(times)) = (read("comm"), read("schedstat")) else { continue };
        if which(name.trim()) {
            nanos += times.split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    if nanos == 0 {
        return Err(format!(
            "{}: no thread of this name with a time\n  hint: a kernel with schedstat",
            folder.display()
        ));
    }
    Ok(Duration::from_nanos(nanos))
}

/// Every child that runs now, for [`kill_all`].
static RUNNING: Mutex<Vec<Arc<Mutex<Child>>>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<Arc<Mutex<Child>>>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills every child that [`Process::start`] started. For programs that end without dropping what they hold, such as after
/// a signal.
pub fn kill_all() {
    for child in running().drain(..) {
        let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
        // Either fails only if the process is gone already, which is what is wanted.
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        {
            let mut child = self.child();
            // Either fails only if the process is gone already, which is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
        running().retain(|child| !Arc::ptr_eq(child, &self.child));
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

fn read_lines(
    pipe: impl Read + Send + 'static,
    output: &Arc<Output>,
    keep: Arc<dyn Fn(&str) -> bool + Send + Sync>,
) -> JoinHandle<()> {
    output.lock().open += 1;
    let output = Arc::clone(output);
    std::thread::spawn(move || {
        let mut lines = BufReader::new(pipe);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line);
            if keep(&text) {
                output.add(text.trim_end().to_owned());
            }
            line.clear();
        }
        output.close();
    })
}
