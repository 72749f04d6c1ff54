//! Engine A: the stock `deno` binary with our shim.
//!
//! The shim listens, gives up every permission that Deno can give up, and imports the operator's bundle from memory.
//! Deno's permissions are the second wall; the jail is the first.

use std::path::{Path, PathBuf};

use super::program::{self, Program, Unusable};
use super::{Abilities, Class, Engine, INTERNAL_AUTHORITY, Start};

/// The release that limits and flags were measured with, and that the set-up installs.
pub const VERSION: &str = "2.9.8";

/// Names the binary, before any search.
pub const VARIABLE: &str = "PORTCULLIS_DENO";

const SHIM: &str = include_str!("../../runtime/shim.js");
const SHIM_PATH: &str = "/shim.js";
const ENGINE_PATH: &str = "/deno";

/// V8 reserves this much writable memory before any script runs, measured with 2.9.8: the code range and its own heap.
const DATA_BYTES_JIT: u64 = 560 << 20;
const DATA_BYTES_INTERPRETER: u64 = 64 << 20;

/// Deno and its libraries on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deno {
    program: Program,
    version: String,
    v8: String,
}

/// Why Deno cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DenoMissing {
    /// It is nowhere that we look.
    #[error(
        "operators need Deno {VERSION}, which was not found\n  hint: put `deno` on the PATH or beside this program, or name it \
         in `{VARIABLE}`; in a checkout, run `cargo xtask setup`"
    )]
    NotFound,
    /// It is there, but it is not usable.
    #[error(transparent)]
    Unusable(#[from] Unusable),
}

impl Deno {
    /// Finds the binary: [`VARIABLE`], else `.portcullis/tools/deno-<version>/` here or in a folder above, beside this
    /// program, or on the `PATH`.
    ///
    /// # Errors
    /// [`DenoMissing`], with the remedy.
    pub fn locate() -> Result<Self, DenoMissing> {
        if let Some(path) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            return Self::at(Path::new(&path));
        }
        let here = std::env::current_dir().unwrap_or_default();
        let tools = here.ancestors().map(|folder| folder.join(".portcullis/tools").join(format!("deno-{VERSION}")));
        match program::find("deno", tools) {
            Some(binary) => Self::at(&binary),
            None => Err(DenoMissing::NotFound),
        }
    }

    /// Uses the given binary.
    ///
    /// # Errors
    /// [`DenoMissing::Unusable`] when it is no program for this machine or its libraries cannot be found.
    pub fn at(path: &Path) -> Result<Self, DenoMissing> {
        let program = Program::at(path)?;
        // It says `deno 2.9.8 (stable, ...)`, `v8 15.0.245.2`, and more.
        let said = program.version()?;
        let second_word = |name: &str| {
            let line = said.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
            line.split_whitespace().next().map(str::to_owned)
        };
        let Some(version) = second_word("deno") else {
            let problem = "it does not say that it is Deno".to_owned();
            return Err(Unusable { path: path.to_owned(), problem }.into());
        };
        let v8 = second_word("v8").unwrap_or_else(|| "unknown".to_owned());
        Ok(Self { program, version, v8 })
    }

    /// The binary.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.program.binary
    }
}

impl Engine for Deno {
    fn name(&self) -> String {
        format!("deno {} (V8 {})", self.version, self.v8)
    }

    fn program(&self) -> &Path {
        self.path()
    }

    fn remark(&self) -> Option<String> {
        (self.version != VERSION).then(|| {
            format!(
                "limits and flags were measured with Deno {VERSION}, and this is {}: install that release",
                self.version
            )
        })
    }

    fn remedy(&self) -> String {
        format!(
            "use Deno {VERSION}, which is the release that is tested, or the runner (`operator_host: {{ engine: runner }}`)"
        )
    }

    fn start(&self, class: &Class) -> Start {
        let mut v8 = vec![format!("--max-heap-size={}", (class.heap_bytes >> 20).max(16))];
        if !class.code_generation {
            v8.push("--disallow-code-generation-from-strings".to_owned());
        }
        if class.interpreter_only {
            v8.push("--jitless".to_owned());
        }
        let operator = "{private}/op.sock";
        let host = "{private}/host.sock";
        let argv = [
            ENGINE_PATH.to_owned(),
            "run".to_owned(),
            "--quiet".to_owned(),
            "--no-prompt".to_owned(),
            "--no-remote".to_owned(),
            "--no-npm".to_owned(),
            "--cached-only".to_owned(),
            "--no-config".to_owned(),
            "--no-lock".to_owned(),
            // Nothing outlives the process, so making a cache would only cost.
            "--no-code-cache".to_owned(),
            format!("--allow-read={operator},{host}"),
            format!("--allow-write={operator},{host}"),
            format!("--allow-net=unix:{operator},unix:{host},{INTERNAL_AUTHORITY}:80"),
            format!("--v8-flags={}", v8.join(",")),
            format!("{{root}}{SHIM_PATH}"),
            operator.to_owned(),
            host.to_owned(),
        ];
        let env = [
            // Nowhere: Deno then keeps its caches in memory, and what would persist there does not.
            ("DENO_DIR", "/nowhere"),
            ("DENO_NO_UPDATE_CHECK", "1"),
            ("NO_COLOR", "1"),
            ("HOME", "/nowhere"),
            ("PATH", "/nowhere"),
        ];
        Start {
            binds: self.program.binds(ENGINE_PATH),
            files: vec![(PathBuf::from(SHIM_PATH), SHIM.to_owned())],
            argv: argv.to_vec(),
            env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            data_bytes: if class.interpreter_only { DATA_BYTES_INTERPRETER } else { DATA_BYTES_JIT },
            threads: 32,
            files_open: 256,
            abilities: Abilities::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_only_the_two_sockets_and_the_hosts_own_name() {
        let program = Program::at(&std::env::current_exe().unwrap()).unwrap();
        let deno = Deno { program, version: String::new(), v8: String::new() };
        let class = Class {
            heap_bytes: 64 << 20,
            memory_bytes: 128 << 20,
            interpreter_only: false,
            code_generation: false,
            private_bytes: 1 << 20,
            required: false,
        };
        let start = deno.start(&class);
        let grants: Vec<_> = start.argv.iter().filter(|argument| argument.starts_with("--allow")).collect();
        assert_eq!(
            grants,
            [
                "--allow-read={private}/op.sock,{private}/host.sock",
                "--allow-write={private}/op.sock,{private}/host.sock",
                "--allow-net=unix:{private}/op.sock,unix:{private}/host.sock,portcullis.internal:80",
            ]
        );
        assert!(start.argv.iter().any(|argument| argument.contains("--max-heap-size=64,--disallow-code-generation")));
    }
}
