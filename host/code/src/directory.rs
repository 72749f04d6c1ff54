//! A folder that nobody else can write to, and the secret in it.
//!
//! The folder is opened once and then used through its descriptor, so what was checked is what is used, whatever happens
//! to its name. Nothing in it is reached through a symbolic link.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;

/// Why a folder is not used for compiled code.
#[derive(Debug, thiserror::Error)]
#[error("the code cache `{}` is not used: {problem}", .path.display())]
pub struct Unusable {
    /// The folder.
    pub path: PathBuf,
    /// What is wrong with it, and how to fix it.
    pub problem: String,
}

/// What is wrong with a folder or a file.
type Problem = String;

/// See the module.
pub(crate) struct Directory {
    descriptor: OwnedFd,
}

/// A file in the folder, as listed.
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// When it was written or used last: seconds and nanoseconds since 1970.
    pub(crate) used: (i64, i64),
}

/// What a file begins to be called while it is written.
const UNFINISHED: &str = "new-";
const SECRET: &str = "key";
const LOCK: &str = "lock";

impl Directory {
    /// Opens the folder, and makes it if it is not there.
    pub(crate) fn open(path: &Path) -> Result<Directory, Unusable> {
        let unusable = |problem: String| Unusable { path: path.to_owned(), problem };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|error| unusable(format!("it cannot be made: {error}")))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let descriptor = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|error| match error {
            Errno::LOOP | Errno::NOTDIR => {
                unusable("it is a symbolic link or no folder; name the folder itself".into())
            }
            error => unusable(format!("it cannot be opened: {}", io::Error::from(error))),
        })?;
        let stat = rustix::fs::fstat(&descriptor).map_err(|error| unusable(io::Error::from(error).to_string()))?;
        match others_hand(&stat, 0o022) {
            None => Ok(Directory { descriptor }),
            Some(problem) => Err(unusable(problem)),
        }
    }

    /// Reads a file of ours with at most `most` bytes. `None`: there is none.
    pub(crate) fn read(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, Problem> {
        self.read_private(name, most, 0o022)
    }

    fn read_private(&self, name: &str, most: u64, forbidden: u32) -> Result<Option<Vec<u8>>, Problem> {
        // Not blocking: opening a fifo would otherwise wait for its other end.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.descriptor, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err("it is a symbolic link".into()),
            Err(error) => return Err(format!("it cannot be opened: {}", io::Error::from(error))),
        };
        let said = |error: io::Error| format!("it cannot be read: {error}");
        let stat = rustix::fs::fstat(&file).map_err(|error| said(error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err("it is not a regular file".into());
        }
        if let Some(problem) = others_hand(&stat, forbidden) {
            return Err(problem);
        }
        let mut bytes = Vec::with_capacity(usize::try_from(stat.st_size).unwrap_or(0).min(1 << 30));
        (&file).take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(said)?;
        if bytes.len() as u64 > most {
            return Err(format!("it has more than {most} bytes"));
        }
        // When it was used last, for choosing what to remove. Where that cannot be written, it looks older than it is.
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let _ = rustix::fs::futimens(&file, &Timestamps { last_access: now, last_modification: now });
        Ok(Some(bytes))
    }

    /// Writes a file whole: under its name there is either what was there before, or all of `bytes`.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.write_then(bytes, |unfinished| {
            rustix::fs::renameat(&self.descriptor, unfinished, &self.descriptor, name).map_err(Into::into)
        })
    }

    /// Writes `bytes` to a file with a name of its own, makes them last, and lets `place` give it its name.
    fn write_then(&self, bytes: &[u8], place: impl FnOnce(&str) -> io::Result<()>) -> io::Result<()> {
        let unfinished = format!("{UNFINISHED}{}", hex(&random::<16>()?));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.descriptor, &unfinished, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(file);
        let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| place(&unfinished));
        if written.is_err() {
            self.remove(&unfinished);
        }
        written
    }

    /// Removes a file; that it is gone already is no failure, and that it cannot be removed shows elsewhere.
    pub(crate) fn remove(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.descriptor, name, AtFlags::empty());
    }

    /// The folder's secret, made if there is none. Of several processes that make one at a time, one wins.
    pub(crate) fn secret<const LEN: usize>(&self) -> Result<[u8; LEN], Problem> {
        let wrong = |problem: Problem| {
            format!("its file `{SECRET}`: {problem}\n  hint: remove the folder; it is made anew and fills by itself")
        };
        let found = match self.read_private(SECRET, LEN as u64, 0o077).map_err(wrong)? {
            Some(found) => found,
            None => {
                self.make_secret::<LEN>().map_err(|error| wrong(format!("it cannot be made: {error}")))?;
                self.read_private(SECRET, LEN as u64, 0o077).map_err(wrong)?.unwrap_or_default()
            }
        };
        let len = found.len();
        found.try_into().map_err(|_| wrong(format!("it has {len} bytes instead of {LEN}")))
    }

    fn make_secret<const LEN: usize>(&self) -> io::Result<()> {
        self.write_then(&random::<LEN>()?, |unfinished| {
            // A link does not replace: the first secret stays, and all processes read that one.
            let linked = rustix::fs::linkat(&self.descriptor, unfinished, &self.descriptor, SECRET, AtFlags::empty());
            self.remove(unfinished);
            match linked {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Runs `tidy` unless another process is at it.
    pub(crate) fn exclusively(&self, tidy: impl FnOnce()) -> io::Result<()> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(&self.descriptor, LOCK, flags, Mode::RUSR | Mode::WUSR)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => tidy(),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Regular files with names that `wanted` accepts.
    pub(crate) fn list(&self, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<Listed>> {
        let mut files = Vec::new();
        for entry in Dir::read_from(&self.descriptor)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if !wanted(name) {
                continue;
            }
            // Gone meanwhile: another process removed it.
            let Ok(stat) = rustix::fs::statat(&self.descriptor, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                let used = (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0));
                files.push(Listed { name: name.to_owned(), bytes: u64::try_from(stat.st_size).unwrap_or(0), used });
            }
        }
        Ok(files)
    }

    /// Whether a name is one that [`Directory::write`] uses on the way.
    pub(crate) fn is_unfinished(name: &str) -> bool {
        name.starts_with(UNFINISHED)
    }
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory").finish_non_exhaustive()
    }
}

/// Who else has a hand in something that must be ours alone.
fn others_hand(stat: &Stat, forbidden: u32) -> Option<Problem> {
    others_hand_in(stat.st_uid, stat.st_mode, rustix::process::geteuid().as_raw(), forbidden)
}

fn others_hand_in(owner: u32, mode: u32, we: u32, forbidden: u32) -> Option<Problem> {
    if owner != we {
        return Some(format!("it belongs to user {owner}, and this runs as user {we}"));
    }
    if mode & forbidden != 0 {
        let can = if mode & forbidden & 0o022 != 0 { "write to" } else { "read" };
        return Some(format!("its mode {:03o} lets others {can} it", mode & 0o777));
    }
    None
}

fn random<const LEN: usize>() -> io::Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(format!("no randomness: {error}")))?;
    Ok(bytes)
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn problem(path: &Path) -> String {
        Directory::open(path).err().map(|unusable| unusable.problem).unwrap_or_default()
    }

    #[test]
    fn a_folder_is_made_for_its_owner_alone() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("a/b");
        Directory::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        Directory::open(&path).unwrap();
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let base = tempfile::tempdir().unwrap();
        for (bits, fine) in [(0o700, true), (0o755, true), (0o775, false), (0o702, false), (0o1777, false)] {
            mode(base.path(), bits);
            assert_eq!(Directory::open(base.path()).is_ok(), fine, "{bits:o}");
        }
        mode(base.path(), 0o770);
        assert_eq!(problem(base.path()), "its mode 770 lets others write to it");
    }

    #[test]
    fn what_belongs_to_someone_else_is_refused() {
        assert_eq!(others_hand_in(1000, 0o700, 1000, 0o022), None);
        let problem = others_hand_in(0, 0o700, 1000, 0o022).unwrap();
        assert_eq!(problem, "it belongs to user 0, and this runs as user 1000");
        let problem = others_hand_in(1000, 0o100_640, 1000, 0o077).unwrap();
        assert_eq!(problem, "its mode 640 lets others read it");
    }

    #[test]
    fn links_and_files_in_the_place_of_the_folder_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let (folder, link, file) = (base.path().join("folder"), base.path().join("link"), base.path().join("file"));
        std::fs::create_dir(&folder).unwrap();
        symlink(&folder, &link).unwrap();
        std::fs::write(&file, "").unwrap();
        assert!(problem(&link).starts_with("it is a symbolic link"), "{}", problem(&link));
        assert!(problem(&file).starts_with("it cannot be made: "), "{}", problem(&file));
    }

    #[test]
    fn a_secret_is_made_once_and_read_by_all() {
        let base = tempfile::tempdir().unwrap();
        let secrets: Vec<[u8; 32]> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| Directory::open(base.path()).unwrap().secret().unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(secrets.iter().all(|secret| *secret == secrets[0]), "eight openers, one secret");
        assert_ne!(secrets[0], [0; 32]);
        let mode = std::fs::metadata(base.path().join(SECRET)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let names: Vec<_> = std::fs::read_dir(base.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [SECRET], "nothing unfinished is left");
    }

    #[test]
    fn a_secret_that_others_can_read_or_replace_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let folder = Directory::open(base.path()).unwrap();
        let path = base.path().join(SECRET);
        let problem = || folder.secret::<32>().unwrap_err();
        std::fs::write(&path, [1; 32]).unwrap();
        for bits in [0o640, 0o604, 0o620] {
            mode(&path, bits);
            assert!(problem().contains("lets others"), "{bits:o}: {}", problem());
        }
        mode(&path, 0o600);
        assert_eq!(folder.secret(), Ok([1; 32]));
        std::fs::write(&path, [1; 31]).unwrap();
        assert!(problem().contains("it has 31 bytes instead of 32"), "{}", problem());
        std::fs::write(&path, [1; 33]).unwrap();
        assert!(problem().contains("more than 32 bytes"), "{}", problem());
        std::fs::rename(&path, base.path().join("elsewhere")).unwrap();
        symlink("elsewhere", &path).unwrap();
        assert!(problem().contains("symbolic link"), "{}", problem());
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(problem().contains("not a regular file"), "{}", problem());
    }

    #[test]
    fn files_are_read_up_to_a_bound_and_never_through_links_or_fifos() {
        let base = tempfile::tempdir().unwrap();
        let folder = Directory::open(base.path()).unwrap();
        assert_eq!(folder.read("a", 10), Ok(None));
        folder.write("a", b"12345").unwrap();
        assert_eq!(folder.read("a", 5), Ok(Some(b"12345".to_vec())));
        assert!(folder.read("a", 4).unwrap_err().contains("more than 4 bytes"));
        symlink("a", base.path().join("link")).unwrap();
        assert_eq!(folder.read("link", 10).unwrap_err(), "it is a symbolic link");
        rustix::fs::mknodat(CWD, base.path().join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(folder.read("fifo", 10).unwrap_err(), "it is not a regular file");
        mode(&base.path().join("a"), 0o666);
        assert!(folder.read("a", 10).unwrap_err().contains("lets others write"));
    }
}
