//! Engine A: the stock `deno` binary with our shim.
//!
//! The shim listens, gives up every permission that Deno can give up, and imports the operator's bundle from memory.
//! Deno's permissions are the second wall; the jail is the first.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Class, Engine, INTERNAL_AUTHORITY, Start};
use crate::jail::Bind;

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
    binary: PathBuf,
    version: String,
    loader: Option<PathBuf>,
    libraries: Vec<PathBuf>,
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
    #[error("`{}` cannot be used as the engine: {problem}", path.display())]
    Unusable {
        /// The binary.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
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
        let beside = std::env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let candidates = tools.chain(beside).chain(std::env::split_paths(&path)).map(|folder| folder.join("deno"));
        match candidates.into_iter().find(|candidate| candidate.is_file()) {
            Some(binary) => Self::at(&binary),
            None => Err(DenoMissing::NotFound),
        }
    }

    /// Uses the given binary.
    ///
    /// # Errors
    /// [`DenoMissing::Unusable`] when it is no program for this machine or its libraries cannot be found.
    pub fn at(path: &Path) -> Result<Self, DenoMissing> {
        let unusable = |problem: String| DenoMissing::Unusable { path: path.to_owned(), problem };
        let binary = path.canonicalize().map_err(|error| unusable(error.to_string()))?;
        let loader = interpreter(&binary).map_err(|error| unusable(error.to_string()))?;
        let libraries = match &loader {
            Some(loader) => libraries(loader, &binary).map_err(|error| unusable(error.to_string()))?,
            None => Vec::new(),
        };
        let version = version(&binary).map_err(|error| unusable(error.to_string()))?;
        Ok(Self { binary, version, loader, libraries })
    }

    /// The binary.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.binary
    }
}

impl Engine for Deno {
    fn name(&self) -> String {
        format!("deno {}", self.version)
    }

    fn program(&self) -> &Path {
        &self.binary
    }

    fn remark(&self) -> Option<String> {
        (self.version != VERSION).then(|| {
            format!(
                "limits and flags were measured with Deno {VERSION}, and this is {}: install that release",
                self.version
            )
        })
    }

    fn start(&self, class: &Class) -> Start {
        let mut binds =
            vec![Bind { source: self.binary.clone(), target: PathBuf::from(ENGINE_PATH), executable: true }];
        if let Some(loader) = &self.loader {
            binds.push(Bind { source: loader.clone(), target: loader.clone(), executable: true });
        }
        for library in &self.libraries {
            binds.push(Bind { source: library.clone(), target: library.clone(), executable: false });
        }
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
            binds,
            files: vec![(PathBuf::from(SHIM_PATH), SHIM.to_owned())],
            argv: argv.to_vec(),
            env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            data_bytes: if class.interpreter_only { DATA_BYTES_INTERPRETER } else { DATA_BYTES_JIT },
            threads: 32,
            files_open: 256,
        }
    }
}

/// The dynamic loader that an ELF file asks for (`PT_INTERP`); none for a static program.
fn interpreter(path: &Path) -> io::Result<Option<PathBuf>> {
    let malformed = || io::Error::other("not a 64-bit little-endian ELF program");
    let mut file = File::open(path)?;
    let mut header = [0_u8; 64];
    file.read_exact(&mut header).map_err(|_| malformed())?;
    if header.get(..6) != Some(&[0x7f, b'E', b'L', b'F', 2, 1]) {
        return Err(malformed());
    }
    let table = number(&header, 32, 8).ok_or_else(malformed)?;
    let entry_bytes = number(&header, 54, 2).ok_or_else(malformed)?;
    let entries = number(&header, 56, 2).ok_or_else(malformed)?;
    for index in 0..entries {
        file.seek(SeekFrom::Start(table.saturating_add(index * entry_bytes)))?;
        let mut entry = [0_u8; 56];
        file.read_exact(&mut entry)?;
        if number(&entry, 0, 4) != Some(3) {
            continue;
        }
        let offset = number(&entry, 8, 8).ok_or_else(malformed)?;
        let length = number(&entry, 32, 8).filter(|length| *length < 4096).ok_or_else(malformed)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut name = Vec::new();
        file.take(length).read_to_end(&mut name)?;
        let name = String::from_utf8(name).map_err(|_| malformed())?;
        return Ok(Some(PathBuf::from(name.trim_end_matches('\0'))));
    }
    Ok(None)
}

fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(length)?)?;
    Some(field.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
}

/// Asks the program itself, which says `deno 2.9.8 (stable, ...)`.
fn version(binary: &Path) -> io::Result<String> {
    let output = Command::new(binary).arg("--version").env_clear().env("NO_COLOR", "1").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.split_whitespace();
    match (words.next(), words.next()) {
        (Some("deno"), Some(version)) if output.status.success() => Ok(crate::logs::printable(version)),
        _ => Err(io::Error::other("it does not say that it is Deno")),
    }
}

/// Asks the loader which libraries it would map.
fn libraries(loader: &Path, binary: &Path) -> io::Result<Vec<PathBuf>> {
    let output = Command::new(loader).arg("--list").arg(binary).env_clear().output()?;
    if !output.status.success() {
        return Err(io::Error::other("its dynamic loader does not accept it"));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`; a set, since several names may be one file.
    let found: BTreeSet<PathBuf> = text
        .lines()
        .filter_map(|line| line.split_once("=> "))
        .filter_map(|(_, path)| path.split(" (").next())
        .map(|path| PathBuf::from(path.trim()))
        .filter(|path| path.is_absolute() && path != loader)
        .collect();
    Ok(found.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_loader_of_a_program() {
        let loader = interpreter(&std::env::current_exe().unwrap()).unwrap();
        assert!(loader.is_none_or(|loader| loader.is_absolute()));
    }

    #[test]
    fn a_text_file_is_no_engine() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [b'x'; 100]).unwrap();
        let error = Deno::at(file.path()).unwrap_err().to_string();
        assert!(error.ends_with("not a 64-bit little-endian ELF program"), "{error}");
    }

    #[test]
    fn grants_only_the_two_sockets_and_the_hosts_own_name() {
        let deno = Deno { binary: "/d".into(), version: String::new(), loader: None, libraries: Vec::new() };
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
