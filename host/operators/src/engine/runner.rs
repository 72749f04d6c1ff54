//! Engine B: our own runner on deno_core, `portcullis-operator`.
//!
//! Where the stock `deno` forbids, it has nothing: no operation in it opens a file, a socket or a process. It keeps the
//! limits of CPU time and memory inside, so that reaching one costs an operator its isolate and not its process, and gives up
//! most system calls once it is ready. Its source is a workspace of its own, `host/operators/runner`.

use std::path::{Path, PathBuf};

use super::program::{self, Program, Unusable};
use super::{Abilities, Class, Engine, Start};

/// Names the binary, before any search.
pub const VARIABLE: &str = "PORTCULLIS_OPERATOR";

/// The binary's name.
pub const NAME: &str = "portcullis-operator";

const REMEDY: &str =
    "build it again (`cargo xtask runner`), or have operators run on Deno with `operator_host: { engine: deno }`";

const ENGINE_PATH: &str = "/portcullis-operator";

/// Writable memory that it reserves before any script runs, measured on x86-64: V8's own heap and its range for machine code.
const DATA_BYTES: u64 = 192 << 20;

/// The runner and its libraries on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runner {
    program: Program,
    /// As it says itself: `0.1.0 (V8 15.0.245.2)`.
    version: String,
}

/// Why the runner cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunnerMissing {
    /// It is nowhere that we look.
    #[error(
        "`{NAME}` was not found\n  hint: put it beside this program or on the PATH, or name it in `{VARIABLE}`; in a checkout, \
         run `cargo xtask runner`"
    )]
    NotFound,
    /// It is there, but it is not usable.
    #[error("{0}\n  hint: {REMEDY}")]
    Unusable(#[from] Unusable),
}

impl Runner {
    /// Finds the binary: [`VARIABLE`], else beside this program, or on the `PATH`.
    ///
    /// # Errors
    /// [`RunnerMissing`], with the remedy.
    pub fn locate() -> Result<Self, RunnerMissing> {
        if let Some(path) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            return Self::at(Path::new(&path));
        }
        match program::find(NAME, std::iter::empty::<PathBuf>()) {
            Some(binary) => Self::at(&binary),
            None => Err(RunnerMissing::NotFound),
        }
    }

    /// Uses the given binary.
    ///
    /// # Errors
    /// [`RunnerMissing::Unusable`] when it is no program for this machine, or another one.
    pub fn at(path: &Path) -> Result<Self, RunnerMissing> {
        let program = Program::at(path)?;
        let said = program.version()?;
        match said.first().and_then(|line| line.strip_prefix(NAME)).map(str::trim) {
            Some(version) => Ok(Self { program, version: version.to_owned() }),
            None => {
                let problem = format!("it does not say that it is `{NAME}`");
                Err(Unusable { path: path.to_owned(), problem }.into())
            }
        }
    }
}

impl Engine for Runner {
    fn name(&self) -> String {
        format!("runner {}", self.version)
    }

    fn program(&self) -> &Path {
        &self.program.binary
    }

    fn remedy(&self) -> String {
        REMEDY.to_owned()
    }

    fn start(&self, class: &Class) -> Start {
        let mebibytes = |bytes: u64| (bytes >> 20).max(1).to_string();
        let mut argv = vec![ENGINE_PATH.to_owned()];
        argv.extend(["--heap-mebibytes".to_owned(), mebibytes(class.heap_bytes)]);
        argv.extend(["--memory-mebibytes".to_owned(), mebibytes(class.memory_bytes)]);
        if class.interpreter_only {
            argv.push("--interpreter-only".to_owned());
        }
        if class.code_generation {
            argv.push("--code-generation".to_owned());
        }
        argv.extend(["{private}/op.sock", "{private}/host.sock"].map(str::to_owned));
        Start {
            binds: self.program.binds(ENGINE_PATH),
            files: Vec::new(),
            argv,
            // One arena for all threads: there are few, and each arena costs memory.
            env: vec![("MALLOC_ARENA_MAX".to_owned(), "1".to_owned())],
            data_bytes: DATA_BYTES,
            threads: 16,
            files_open: 256,
            abilities: Abilities {
                keeps_limits: true,
                multiplexes: true,
                maps_positions: true,
                restricts_itself: true,
            },
        }
    }
}
