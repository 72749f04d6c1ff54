//! Builds `portcullis-operator`, the operators' engine on deno_core, where V8 can be had.
//!
//! It is a workspace of its own (`host/operators/runner` says why), built into `target/runner`, where another feature set does not
//! make its four hundred crates be compiled again. The one thing that it needs and cargo cannot bring is V8's static library.
//! Every call of cargo for it is made here, since the `v8` crate, and all above it, is compiled anew whenever the variable that
//! names the library changes.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::process::{self, Failure, query, run_shown};
use crate::progress::{Mark, Progress};
use crate::workspace::{Workspace, shown};

/// The binary.
pub(crate) const NAME: &str = "portcullis-operator";

/// Names a binary to use instead; the host reads the same variable.
pub(crate) const VARIABLE: &str = "PORTCULLIS_OPERATOR";

/// The `v8` crate's own: V8's library, instead of one that it downloads.
const ARCHIVE_VARIABLE: &str = "RUSTY_V8_ARCHIVE";

/// Beside the checkout, for machines that cannot download.
const ARCHIVE_BESIDE: &str = "../shared/v8/librusty_v8.a.gz";

/// How long the place that the `v8` crate downloads from may take to answer.
const REACHABLE_WITHIN: Duration = Duration::from_secs(10);

/// Whether there is a runner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Runner {
    /// There is, here.
    At(PathBuf),
    /// V8 cannot be had; why not.
    Without(String),
}

/// How a build comes by V8.
#[derive(Clone, Debug, PartialEq, Eq)]
enum V8 {
    /// From this file; and who says so.
    Archive(PathBuf, &'static str),
    /// The `v8` crate downloads it.
    Download,
}

impl fmt::Display for V8 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Archive(path, why) => write!(f, "V8 from {}, {why}", path.display()),
            Self::Download => write!(f, "V8 as its crate downloads it"),
        }
    }
}

/// Builds the runner, or says why there is none.
pub(crate) fn ensure(workspace: &Workspace, release: bool, progress: Progress) -> Result<Runner, Failure> {
    let started = Instant::now();
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        let path = workspace.root.join(path);
        let said = query(Command::new(&path).arg("--version"))?;
        let how = format!("{}, because {VARIABLE} says so", said.trim());
        progress.found(Mark::Good, NAME, &how, started.elapsed());
        return Ok(Runner::At(path));
    }
    let profile = if release { "release" } else { "debug" };
    // Beside `portcullis`, which looks for it there.
    let place = workspace.target.join(profile).join(NAME);
    let v8 = match find_v8(workspace) {
        Ok(v8) => v8,
        Err(why) => {
            // One that other sources made would be found and used all the same.
            let _ = fs::remove_file(&place);
            progress.found(Mark::Missing, NAME, &format!("operators run on Deno: {why}"), started.elapsed());
            return Ok(Runner::Without(why));
        }
    };
    progress.doing(NAME, &format!("building; {v8}"));
    let mut cargo = cargo(workspace, Some(&v8), "build");
    if release {
        cargo.arg("--release");
    }
    run_shown(&mut cargo)?;
    let built = target(workspace).join(profile).join(NAME);
    put(&built, &place)?;
    let said = query(Command::new(&place).arg("--version"))?;
    let how = format!("{} at {}", said.trim(), shown(&place, &workspace.root));
    progress.found(Mark::Good, NAME, &how, started.elapsed());
    Ok(Runner::At(place))
}

/// A cargo command for the runner's workspace; none where V8 cannot be had.
pub(crate) fn command(workspace: &Workspace, subcommand: &str) -> Option<Command> {
    let v8 = find_v8(workspace).ok()?;
    Some(cargo(workspace, Some(&v8), subcommand))
}

/// Formats the runner's workspace, or checks that: needs no V8.
pub(crate) fn fmt(workspace: &Workspace) -> Command {
    cargo(workspace, None, "fmt")
}

fn cargo(workspace: &Workspace, v8: Option<&V8>, subcommand: &str) -> Command {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).arg(subcommand);
    cargo.arg("--manifest-path").arg(workspace.root.join("host/operators/runner/Cargo.toml"));
    if let Some(v8) = v8 {
        cargo.arg("--locked").arg("--target-dir").arg(target(workspace));
        match v8 {
            V8::Archive(path, _) => cargo.env(ARCHIVE_VARIABLE, path),
            V8::Download => cargo.env_remove(ARCHIVE_VARIABLE),
        };
    }
    cargo
}

/// Of this checkout alone. Cargo knows a package by its place in its workspace and a file by its age, so of two checkouts that
/// build into one folder, one may get what was built from the other's sources.
fn target(workspace: &Workspace) -> PathBuf {
    workspace.target.join("runner")
}

/// Where V8 comes from, or why it cannot be had.
fn find_v8(workspace: &Workspace) -> Result<V8, String> {
    if let Some(path) = std::env::var_os(ARCHIVE_VARIABLE).filter(|path| !path.is_empty()) {
        let path = workspace.root.join(path);
        if !path.is_file() {
            return Err(format!("{ARCHIVE_VARIABLE} names `{}`, which is no file", path.display()));
        }
        return Ok(V8::Archive(path, "because RUSTY_V8_ARCHIVE says so"));
    }
    // By its real path: the same file must not have two names (see the top).
    if let Ok(path) = workspace.root.join(ARCHIVE_BESIDE).canonicalize() {
        return Ok(V8::Archive(path, "which lies beside the checkout"));
    }
    if is_downloaded(&target(workspace)) {
        return Ok(V8::Download);
    }
    let url = download_url(&version(workspace)?);
    if is_reachable(&url) {
        return Ok(V8::Download);
    }
    Err(format!(
        "V8's library cannot be downloaded here, is not at {ARCHIVE_BESIDE}, and {ARCHIVE_VARIABLE} names none"
    ))
}

/// Whether a build has downloaded it before.
fn is_downloaded(target: &Path) -> bool {
    ["debug", "release"].iter().any(|profile| target.join(profile).join("gn_out/obj/librusty_v8.sum").is_file())
}

/// The version of the `v8` crate that the runner's lock file names.
fn version(workspace: &Workspace) -> Result<String, String> {
    let path = workspace.root.join("host/operators/runner/Cargo.lock");
    let lock = fs::read_to_string(&path).map_err(|error| format!("`{}`: {error}", path.display()))?;
    locked_version(&lock, "v8").ok_or_else(|| format!("`{}` names no `v8`", path.display()))
}

fn locked_version(lock: &str, package: &str) -> Option<String> {
    let (_, after) = lock.split_once(&format!("name = \"{package}\"\nversion = \""))?;
    after.split('"').next().map(str::to_owned)
}

/// What the `v8` crate's build script downloads.
fn download_url(version: &str) -> String {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    format!(
        "https://github.com/denoland/rusty_v8/releases/download/v{version}/librusty_v8_simdutf_release_{target}.a.gz"
    )
}

/// Asks with whatever client there is, which knows this machine's proxies. Never hangs.
fn is_reachable(url: &str) -> bool {
    let seconds = REACHABLE_WITHIN.as_secs().to_string();
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail", "--location", "--head", "--output", "/dev/null", "--max-time", &seconds, url]);
    if query(&mut curl).is_ok() {
        return true;
    }
    let script =
        "import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1], method='HEAD'), timeout=int(sys.argv[2]))";
    query(Command::new("python3").args(["-c", script, url, &seconds])).is_ok()
}

/// Copies a program to a place where it may be running.
fn put(from: &Path, to: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::new(to.display().to_string(), error.to_string());
    let age = |path: &Path| fs::metadata(path).and_then(|found| found.modified()).ok();
    if age(to).is_some() && age(to) >= age(from) {
        return Ok(());
    }
    let folder = to.parent().unwrap_or(to);
    fs::create_dir_all(folder).map_err(failed)?;
    let beside = folder.join(format!(".{NAME}-{}", std::process::id()));
    fs::copy(from, &beside).and_then(|_| fs::rename(&beside, to)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkouts_that_share_their_downloads_build_apart() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| {
            let root = folder.path().join(name);
            fs::create_dir_all(&root).unwrap();
            std::os::unix::fs::symlink(folder.path().join("shared"), root.join(".portcullis")).unwrap();
            Workspace { target: root.join("target"), root, filters: Vec::new(), guest_packages: Vec::new() }
        });
        fs::create_dir_all(folder.path().join("shared")).unwrap();
        let [one, other] = [one, other].map(|workspace| {
            let place = target(&workspace);
            fs::create_dir_all(&place).unwrap();
            place.canonicalize().unwrap()
        });
        assert_ne!(one, other);
    }

    #[test]
    fn version_of_v8_is_read_from_the_lock_file() {
        let lock = "[[package]]\nname = \"v8\"\nversion = \"150.4.0\"\nsource = \"registry\"\n";
        assert_eq!(locked_version(lock, "v8").as_deref(), Some("150.4.0"));
        assert_eq!(locked_version(lock, "v9"), None);
        assert!(download_url("150.4.0").ends_with("-unknown-linux-gnu.a.gz"));
    }

    #[test]
    fn an_older_copy_is_replaced_and_a_newer_one_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to/program"));
        fs::write(&from, "one").unwrap();
        put(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "one");
        let past = std::time::SystemTime::now() - Duration::from_secs(60);
        fs::File::options().write(true).open(&to).unwrap().set_modified(past).unwrap();
        fs::write(&from, "two").unwrap();
        put(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "two");
        fs::write(&to, "newer").unwrap();
        put(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "newer");
        assert_eq!(fs::read_dir(folder.path().join("to")).unwrap().count(), 1);
    }
}
