//! A program on this machine together with what it needs to be executed inside an empty root.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::jail::Bind;

/// Why a program cannot be an engine.
#[derive(Debug, thiserror::Error)]
#[error("`{}` cannot be used as the engine: {problem}", path.display())]
pub struct Unusable {
    /// The binary.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
}

/// A program and its libraries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) binary: PathBuf,
    loader: Option<PathBuf>,
    libraries: Vec<PathBuf>,
}

impl Program {
    /// The program at a path.
    pub(super) fn at(path: &Path) -> Result<Self, Unusable> {
        let unusable = |error: io::Error| Unusable { path: path.to_owned(), problem: error.to_string() };
        let binary = path.canonicalize().map_err(unusable)?;
        let loader = interpreter(&binary).map_err(unusable)?;
        let libraries = match &loader {
            Some(loader) => libraries(loader, &binary).map_err(unusable)?,
            None => Vec::new(),
        };
        Ok(Self { binary, loader, libraries })
    }

    /// The lines that it prints when asked for its version.
    pub(super) fn version(&self) -> Result<Vec<String>, Unusable> {
        let asked = Command::new(&self.binary).arg("--version").env_clear().env("NO_COLOR", "1").output();
        let unusable = |problem: String| Unusable { path: self.binary.clone(), problem };
        let output = asked.map_err(|error| unusable(error.to_string()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = crate::logs::printable(said.lines().next().unwrap_or_default());
            return Err(unusable(format!("asked for its version, it ended with {}: {said}", output.status)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(crate::logs::printable).collect())
    }

    /// The files that a root needs for it, the program itself under the name `target`.
    pub(super) fn binds(&self, target: &str) -> Vec<Bind> {
        let itself = Bind { source: self.binary.clone(), target: PathBuf::from(target), executable: true };
        let in_place = |path: &PathBuf, executable| Bind { source: path.clone(), target: path.clone(), executable };
        let loader = self.loader.iter().map(|loader| in_place(loader, true));
        let libraries = self.libraries.iter().map(|library| in_place(library, false));
        std::iter::once(itself).chain(loader).chain(libraries).collect()
    }
}

/// The first file of this name beside this program or on the `PATH`, after the folders in `first`.
pub(super) fn find(name: &str, first: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = first.chain(beside).chain(std::env::split_paths(&path)).map(|folder| folder.join(name));
    candidates.find(|candidate| candidate.is_file())
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
        let error = Program::at(file.path()).unwrap_err().to_string();
        assert!(error.ends_with("not a 64-bit little-endian ELF program"), "{error}");
    }
}
