//! Compiling in a process of its own, which can be ended and whose memory can be bounded.
//!
//! Some kilobytes of WebAssembly can keep a compiler busy for hours and fill all memory on the way. A thread cannot be ended, and memory
//! belongs to a process; so the host executes its own program again under a hidden name ([`main`]), hands it the module and a key of the
//! moment, and takes back sealed code. The process has no other input, reads no file, and is killed when its time is over.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::channel;

use portcullis_abi::{CodeKey, Engine, EngineOptions, ModuleError, ModuleLimits};
use rustix::process::{Resource, Rlimit, Signal};

use crate::loader::{LoadError, LoadLimits};

/// How to start a process that runs [`main`].
#[derive(Clone, Debug)]
pub struct CompilerProcess {
    program: PathBuf,
    arguments: Vec<OsString>,
}

/// How a compilation ended, as the first byte of what the process writes.
const SEALED: u8 = 0;
const INVALID: u8 = 1;
const FAILED: u8 = 2;

/// Threads that compile. More gain little on one module, and each takes memory.
const THREADS_MAX: usize = 4;
/// Bytes of standard error that are looked at.
const WORDS_MAX: u64 = 4096;

impl CompilerProcess {
    /// This program itself, started with `argument`, which makes it run [`main`].
    pub fn this_program(argument: &str) -> CompilerProcess {
        // The file that runs now, even if another one has its name since.
        CompilerProcess::new("/proc/self/exe", [argument.into()])
    }

    /// A program that runs [`main`] when it is started with these arguments.
    pub fn new(program: impl Into<PathBuf>, arguments: impl IntoIterator<Item = OsString>) -> CompilerProcess {
        CompilerProcess { program: program.into(), arguments: arguments.into_iter().collect() }
    }

    /// Compiles and seals. The engine's settings are the default ones.
    pub(crate) fn compile(
        &self,
        wasm: &[u8],
        limits: &LoadLimits,
        key: &[u8; CodeKey::LEN],
    ) -> Result<Vec<u8>, LoadError> {
        let cannot = |error: io::Error| LoadError::Failed(format!("it cannot be started: {error}"));
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .env("RAYON_NUM_THREADS", threads.to_string())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = Ended(command.spawn().map_err(cannot)?);
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.0.stdin.take(), child.0.stdout.take(), child.0.stderr.take())
        else {
            return Err(LoadError::Failed("it has no pipes".into()));
        };
        let request = Request { limits: Limits::new(limits, threads), key: *key };
        let answer = std::thread::scope(|scope| {
            let (sender, receiver) = channel();
            scope.spawn(move || {
                // A process that reads no further has ended, which shows below.
                let _ = stdin.write_all(&request.to_bytes()).and_then(|()| stdin.write_all(wasm));
            });
            scope.spawn(move || {
                let mut answer = Vec::new();
                let read = stdout.take(limits.compile_memory_max).read_to_end(&mut answer);
                // Nobody waits any more if the time was over.
                let _ = sender.send(read.map(|_| answer));
            });
            let answer = receiver.recv_timeout(limits.compile_time_max);
            // Also ends the two threads: their pipes close.
            child.end();
            answer
        });
        let status = child.0.wait().map_err(|error| LoadError::Failed(error.to_string()))?;
        let Ok(answer) = answer else { return Err(LoadError::TooLong(limits.compile_time_max)) };
        match answer.ok().and_then(|mut answer| (!answer.is_empty()).then(|| (answer.remove(0), answer))) {
            Some((SEALED, sealed)) => Ok(sealed),
            Some((INVALID, reason)) => Err(ModuleError::invalid(&String::from_utf8_lossy(&reason)).into()),
            Some((FAILED, reason)) => Err(failure(&String::from_utf8_lossy(&reason), limits)),
            _ => Err(death(status, stderr, limits)),
        }
    }
}

/// A child that does not outlive this.
struct Ended(Child);

impl Ended {
    fn end(&mut self) {
        // It fails only if the process has ended by itself, which is as good.
        let _ = self.0.kill();
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.end();
        let _ = self.0.wait();
    }
}

/// Why a process ended without an answer.
fn death(status: ExitStatus, stderr: impl Read, limits: &LoadLimits) -> LoadError {
    let mut words = Vec::new();
    let _ = stderr.take(WORDS_MAX).read_to_end(&mut words);
    let words = String::from_utf8_lossy(&words);
    if status.signal() == Some(Signal::XCPU.as_raw()) {
        return LoadError::TooLong(limits.compile_time_max);
    }
    let said = words.lines().next().unwrap_or_default();
    failure(&format!("it ended early ({status}): {said}"), limits)
}

/// Running out of memory shows in many ways, of which most say so.
fn failure(words: &str, limits: &LoadLimits) -> LoadError {
    let lower = words.to_lowercase();
    let memory = ["memory allocation", "out of memory", "cannot allocate memory", "resource temporarily unavailable"];
    if memory.iter().any(|sign| lower.contains(sign)) {
        return LoadError::TooMuchMemory(limits.compile_memory_max);
    }
    LoadError::Failed(words.trim_end().to_owned())
}

/// What the process may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    memory_bytes: u64,
    cpu_seconds: u64,
}

impl Limits {
    fn new(limits: &LoadLimits, threads: usize) -> Limits {
        // Normally it is killed when its time is over. This holds should nobody be left to do it.
        let cpu_seconds = (limits.compile_time_max.as_secs() + 1).saturating_mul(threads as u64);
        Limits { memory_bytes: limits.compile_memory_max, cpu_seconds }
    }
}

/// What the process is told first; the module follows.
struct Request {
    limits: Limits,
    key: [u8; CodeKey::LEN],
}

impl Request {
    fn to_bytes(&self) -> Vec<u8> {
        let Limits { memory_bytes, cpu_seconds } = self.limits;
        [&memory_bytes.to_le_bytes()[..], &cpu_seconds.to_le_bytes(), &self.key].concat()
    }

    fn read(from: &mut impl Read) -> io::Result<Request> {
        let (mut number, mut key) = ([0; 8], [0; CodeKey::LEN]);
        from.read_exact(&mut number)?;
        let memory_bytes = u64::from_le_bytes(number);
        from.read_exact(&mut number)?;
        let cpu_seconds = u64::from_le_bytes(number);
        from.read_exact(&mut key)?;
        Ok(Request { limits: Limits { memory_bytes, cpu_seconds }, key })
    }
}

/// The whole program of a [`CompilerProcess`]: a request on standard input, the answer on standard output.
pub fn main() -> ExitCode {
    match serve(&mut io::stdin().lock(), &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever started this reads the line; if nobody did, nothing is lost.
            let _ = writeln!(io::stderr(), "this is a part of the host that compiles filters: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let request = Request::read(from)?;
    confine(request.limits)?;
    let mut wasm = Vec::new();
    from.read_to_end(&mut wasm)?;
    let (kind, answer) = match Engine::new(&EngineOptions::default()) {
        Err(error) => (FAILED, error.to_string().into_bytes()),
        Ok(engine) => {
            // The module's own limits were checked before it came here.
            let mut limits = ModuleLimits::default();
            limits.module_bytes_max = usize::MAX;
            match engine.compile_sealed(&wasm, &limits, &CodeKey::new(&request.key)) {
                Ok(sealed) => (SEALED, sealed),
                Err(ModuleError::Invalid(error)) => {
                    let text = format!("{error:#}");
                    let kind = if text.to_lowercase().contains("out of memory") { FAILED } else { INVALID };
                    (kind, text.into_bytes())
                }
                Err(error) => (FAILED, error.to_string().into_bytes()),
            }
        }
    };
    to.write_all(&[kind])?;
    to.write_all(&answer)?;
    to.flush()
}

/// Gives up what compiling does not need.
fn confine(limits: Limits) -> io::Result<()> {
    let bound =
        |resource, most| rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    // Not the address space: allocators reserve much of it that they never use.
    bound(Resource::Data, limits.memory_bytes)?;
    bound(Resource::Cpu, limits.cpu_seconds)?;
    bound(Resource::Core, 0)?;
    bound(Resource::Fsize, 0)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written() {
        let limits = Limits { memory_bytes: 1 << 40, cpu_seconds: 7 };
        let bytes = Request { limits, key: [9; CodeKey::LEN] }.to_bytes();
        let read = Request::read(&mut &bytes[..]).unwrap();
        assert_eq!((read.limits, read.key), (limits, [9; CodeKey::LEN]));
        assert!(Request::read(&mut &bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn a_program_that_is_no_compiler_is_an_error_with_its_words() {
        let load = |program: &str, arguments: &[&str]| {
            let process = CompilerProcess::new(program, arguments.iter().map(OsString::from));
            process.compile(b"", &LoadLimits::default(), &[0; CodeKey::LEN]).unwrap_err().to_string()
        };
        assert!(load("/nonexistent", &[]).starts_with("the compiler failed: it cannot be started: "));
        assert_eq!(
            load("/bin/sh", &["-c", "echo sorry >&2; exit 3"]),
            "the compiler failed: it ended early (exit status: 3): sorry"
        );
        assert!(
            load("/bin/sh", &["-c", "echo memory allocation of 8 bytes failed >&2; exit 1"])
                .contains("more than 1024 MiB")
        );
    }

    #[test]
    fn a_program_that_never_answers_is_ended() {
        let limits = LoadLimits { compile_time_max: Duration::from_millis(50), ..LoadLimits::default() };
        let process = CompilerProcess::new("/bin/sleep", ["1000".into()]);
        let error = process.compile(b"", &limits, &[0; CodeKey::LEN]).unwrap_err();
        assert!(matches!(error, LoadError::TooLong(_)), "{error}");
    }
}
