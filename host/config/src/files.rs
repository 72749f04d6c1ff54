//! How a policy reads the files it names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

/// The only I/O of this crate: reading files whose names stand in a policy.
pub trait Files {
    /// The absolute form of a path as written in the policy; relative paths are relative to the policy's folder.
    fn resolve(&self, written: &str) -> PathBuf;

    /// Reads a whole file. One with more than `bytes_max` bytes is an [`io::ErrorKind::FileTooLarge`] error.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>>;
}

/// Files on disk, relative to the folder of the policy file.
#[derive(Clone, Debug)]
pub struct Folder {
    base: PathBuf,
}

impl Folder {
    /// The folder that relative paths start from. A relative `base` is made absolute now, so a later change of
    /// the working directory changes nothing.
    ///
    /// # Errors
    /// When the working directory cannot be determined.
    pub fn new(base: &Path) -> io::Result<Self> {
        Ok(Self { base: plain(&std::path::absolute(base)?) })
    }
}

impl Files for Folder {
    fn resolve(&self, written: &str) -> PathBuf {
        plain(&self.base.join(written))
    }

    fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            // A fifo or a device could block or never end.
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > bytes_max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    }
}

/// Files in memory, for tests and for programs that build policies themselves. By default all stand in the folder `/policy`.
#[derive(Clone, Debug)]
pub struct InMemory {
    base: PathBuf,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Default for InMemory {
    fn default() -> Self {
        Self::at("/policy")
    }
}

impl InMemory {
    /// No files yet; the policy is as if it stood in the folder `base`, which is absolute.
    #[must_use]
    pub fn at(base: impl Into<PathBuf>) -> Self {
        Self { base: base.into(), files: BTreeMap::new() }
    }

    /// Adds a file under the name that the policy uses for it.
    #[must_use]
    pub fn with(mut self, written: &str, bytes: impl Into<Vec<u8>>) -> Self {
        let path = self.resolve(written);
        self.files.insert(path, bytes.into());
        self
    }
}

impl Files for InMemory {
    fn resolve(&self, written: &str) -> PathBuf {
        plain(&self.base.join(written))
    }

    fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        match self.files.get(path) {
            Some(bytes) if bytes.len() as u64 > bytes_max => Err(io::ErrorKind::FileTooLarge.into()),
            Some(bytes) => Ok(bytes.clone()),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "No such file or directory (os error 2)")),
        }
    }
}

/// `a/./b` as `a/b`, for error messages and Envoy's configuration. `..` stays: behind a symbolic link it means
/// something else than dropping the name before it.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).collect()
}
