//! `portcullis-operator`: an engine for operators in which nothing opens a file, a socket or a process.
//!
//! Started by the host inside a jail, with two sockets in a private directory: it listens on one and connects to the other.
//! When it is ready it gives up what only a start needs, says so, and waits for an operator's code. The contract is
//! described in `host/operators/src/engine/mod.rs`.

mod bridge;
mod confine;
mod contract;
mod extensions;
mod host;
mod isolate;
mod log;
mod memory;
mod ops;
mod serve;
mod sources;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::isolate::Options;
use crate::serve::Ended;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

const HELP: &str = "\
An engine for operators. The host starts it; by hand only these are of use:

  --version   Its own version and V8's
  --ops       Every operation that an isolate can reach, with its reason
";

/// Of a memory of WebAssembly's.
const WASM_PAGE_BYTES: usize = 64 << 10;

/// What it was started with.
#[derive(Debug)]
pub(crate) struct Arguments {
    options: Options,
    memory_bytes: usize,
    interpreter_only: bool,
    listen: PathBuf,
    host: PathBuf,
}

enum Command {
    Serve(Arguments),
    Print(String),
}

fn main() -> ExitCode {
    // Whatever panicked, nothing here is worth going on with; the host starts another process.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("portcullis-operator: {panic}");
        std::process::abort();
    }));
    match parse(std::env::args().skip(1)) {
        Ok(Command::Print(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Command::Serve(arguments)) => match serve(&arguments) {
            Ok(Ended::Asked) => ExitCode::SUCCESS,
            Ok(Ended::BackgroundCpu) => ExitCode::from(contract::BACKGROUND_CPU_STATUS),
            Err(error) => {
                eprintln!("portcullis-operator: {error}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("portcullis-operator: {error}\n\n{HELP}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut options = Options { heap_bytes: 64 << 20, code_generation: false };
    let mut memory_bytes = 128 << 20;
    let mut interpreter_only = false;
    let mut paths = Vec::new();
    while let Some(argument) = arguments.next() {
        let mut mebibytes = || {
            let value = arguments.next().ok_or_else(|| format!("{argument} needs a number"))?;
            let value: usize = value.parse().map_err(|_| format!("{argument}: `{value}` is not a number"))?;
            value.checked_mul(1 << 20).ok_or_else(|| format!("{argument}: too many"))
        };
        match argument.as_str() {
            "--version" => {
                let (own, v8) = (env!("CARGO_PKG_VERSION"), deno_core::v8::V8::get_version());
                return Ok(Command::Print(format!("portcullis-operator {own} (V8 {v8})\n")));
            }
            "--ops" => return Ok(Command::Print(extensions::OPS.to_owned())),
            "--help" | "-h" => return Ok(Command::Print(HELP.to_owned())),
            "--heap-mebibytes" => options.heap_bytes = mebibytes()?,
            "--memory-mebibytes" => memory_bytes = mebibytes()?,
            "--interpreter-only" => interpreter_only = true,
            "--code-generation" => options.code_generation = true,
            other if other.starts_with('-') => return Err(format!("there is no option `{other}`")),
            _ => paths.push(PathBuf::from(argument)),
        }
    }
    match <[PathBuf; 2]>::try_from(paths) {
        Ok([listen, host]) => Ok(Command::Serve(Arguments { options, memory_bytes, interpreter_only, listen, host })),
        Err(_) => Err("two sockets are needed: the one to listen on, and the host's".to_owned()),
    }
}

fn serve(arguments: &Arguments) -> std::io::Result<Ended> {
    start_v8(arguments);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Cryptography runs there. It lives as long as the process, since no other can be started later.
        .max_blocking_threads(1)
        .thread_keep_alive(Duration::from_secs(u64::from(u32::MAX)))
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, serve::run(arguments))
}

fn start_v8(arguments: &Arguments) {
    // With these, V8 15.0 leaves out checks of loops that it should not leave out, and some loops would never end:
    // `for (;;) new Array(1000).fill(0)`, for one.
    let mut flags = "--no-turboshaft-loop-unrolling --no-wasm-loop-unrolling".to_owned();
    // A larger memory would not fit anyway. This way the operator gets an exception.
    flags.push_str(&format!(" --wasm-max-mem-pages={}", (arguments.memory_bytes / WASM_PAGE_BYTES).max(1)));
    if arguments.interpreter_only {
        flags.push_str(" --jitless");
    }
    deno_core::v8::V8::set_flags_from_string(&flags);
    deno_core::JsRuntime::init_platform(None);
}
