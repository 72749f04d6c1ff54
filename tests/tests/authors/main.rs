//! What authors of filters do: begin one with `portcullis new`, and follow the tutorial.
//!
//! Everything is built for real, in temporary folders, but into one folder that stays: the second time only the filters
//! themselves are compiled. Crates come from where the workspace's own came from; nothing is downloaded.

mod new;
mod tutorial;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use portcullis_tests::places;

/// Runs a program, which must succeed; gives what it said on both channels.
fn run(command: &mut Command) -> String {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{shown}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{shown}\n{said}");
    said
}

/// A place to make filters in, and the programs that authors have.
struct Author {
    folder: tempfile::TempDir,
    portcullis: PathBuf,
}

impl Author {
    fn new() -> Author {
        let portcullis = places::portcullis().unwrap_or_else(|error| panic!("{error}"));
        Author { folder: tempfile::tempdir().expect("a folder"), portcullis }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>, folder: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(folder);
        command.env("CARGO_TARGET_DIR", target()).env("CARGO_NET_OFFLINE", "true").env_remove("PORTCULLIS_FILTERS");
        // No folder is met again, so nothing of it would be of use.
        command.env("CARGO_INCREMENTAL", "0");
        if let Some(flags) = wasm_flags() {
            command.env("CARGO_TARGET_WASM32_WASIP1_RUSTFLAGS", flags);
        }
        if let Ok(envoy) = places::envoy() {
            command.env("PORTCULLIS_ENVOY", envoy);
        }
        command
    }

    fn portcullis(&self, folder: &Path, arguments: &[&str]) -> String {
        run(&mut self.command(&self.portcullis, folder, arguments))
    }

    fn cargo(&self, folder: &Path, arguments: &[&str]) -> String {
        run(&mut self.command("cargo", folder, arguments))
    }
}

/// Where the filters are built.
fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("authors")
}

/// What cargo needs where the toolchain lacks the filters' target, and `cargo xtask setup` has built it from source.
fn wasm_flags() -> Option<String> {
    let sysroot = run(Command::new("rustc").args(["--print", "sysroot"]));
    if Path::new(sysroot.trim()).join("lib/rustlib/wasm32-wasip1").is_dir() {
        return None;
    }
    let built = std::fs::read_dir(places::workspace().join(".portcullis")).into_iter().flatten().flatten();
    let built = built.map(|entry| entry.path()).find(|path| path.display().to_string().contains("/wasm-std-"));
    let built = built.expect("the target wasm32-wasip1 is missing: run `cargo xtask setup`");
    Some(format!("--sysroot={}", built.display()))
}

/// The versions that the workspace uses: a test must not depend on what was published today.
fn same_versions(folder: &Path) {
    std::fs::copy(places::workspace().join("Cargo.lock"), folder.join("Cargo.lock")).expect("the lock file");
}
