//! The standard library for the filters' target: the toolchain's own, or one built from source.
//!
//! `rustup` cannot always fetch a target: some machines have no rustup, some have no way to its server. Debian ships the
//! same library source and the C library that WASI needs, and a Debian mirror is more often in reach. What is built from
//! them goes to a folder of ours in the shape of a sysroot; filters are then compiled with `--sysroot` and stable flags,
//! and the installed toolchain stays as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::apt::{self, PrivateApt};
use crate::process::{self, Failure, query, run_quietly, with_retries};
use crate::setup::Unavailable;
use crate::workspace::{WASM_TARGET, Workspace};

/// Names the choice for people who want to test the second way where the first one works.
pub(crate) const CHOICE_VARIABLE: &str = "PORTCULLIS_WASM_STD";

/// Where the target's standard library is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WasmStd {
    /// In the toolchain: cargo needs no help.
    Toolchain,
    /// In a sysroot of ours.
    Sysroot(PathBuf),
}

impl WasmStd {
    /// Tells a cargo command that builds for the target where the library is.
    pub(crate) fn apply(&self, cargo: &mut Command) {
        let Self::Sysroot(sysroot) = self else { return };
        let mut flags = rustflags(std::env::var("CARGO_ENCODED_RUSTFLAGS").ok(), std::env::var("RUSTFLAGS").ok());
        flags.push(format!("--sysroot={}", sysroot.display()));
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    }

    /// What a progress line says.
    pub(crate) fn described(&self) -> &'static str {
        match self {
            Self::Toolchain => "in the Rust toolchain",
            Self::Sysroot(_) => "built from source",
        }
    }
}

/// Flags already asked for; cargo knows two variables and gives the encoded one precedence.
fn rustflags(encoded: Option<String>, plain: Option<String>) -> Vec<String> {
    let words = |text: String, separator: char| -> Vec<String> {
        text.split(separator).filter(|word| !word.is_empty()).map(str::to_owned).collect()
    };
    match (encoded, plain) {
        (Some(encoded), _) => words(encoded, '\x1f'),
        (None, Some(plain)) => words(plain, ' '),
        (None, None) => Vec::new(),
    }
}

/// Gives the library if it is there already.
pub(crate) fn find(workspace: &Workspace) -> anyhow::Result<Option<WasmStd>> {
    let rustc = Rustc::ask(&workspace.root)?;
    if !source_is_wanted()? && rustc.has_target() {
        return Ok(Some(WasmStd::Toolchain));
    }
    let sysroot = rustc.sysroot_of_ours(workspace);
    Ok(sysroot.is_dir().then_some(WasmStd::Sysroot(sysroot)))
}

/// Adds the library: first as rustup does, then from source.
pub(crate) fn install(workspace: &Workspace, saying: impl Fn(&str)) -> anyhow::Result<WasmStd> {
    let rustc = Rustc::ask(&workspace.root)?;
    let mut tried = Vec::new();
    if !source_is_wanted()? {
        saying("asking rustup for it");
        let mut rustup = Command::new("rustup");
        rustup.args(["target", "add", WASM_TARGET]).current_dir(&workspace.root);
        match with_retries(|| run_quietly(&mut rustup)) {
            Ok(_) if rustc.has_target() => return Ok(WasmStd::Toolchain),
            Ok(_) => tried.push(Failure::new(
                process::shell_line(&rustup),
                format!("succeeded, but `{}` is still not there", rustc.target_library().display()),
            )),
            Err(failure) => tried.push(failure),
        }
    }
    let temporary = workspace.downloads().join("tmp/wasm-std");
    drop(fs::remove_dir_all(&temporary));
    let built = rustc.build_from_source(workspace, &temporary, &saying, &mut tried);
    drop(fs::remove_dir_all(&temporary));
    match built {
        Some(sysroot) => Ok(WasmStd::Sysroot(sysroot)),
        None => Err(Unavailable {
            what: format!("the Rust target {WASM_TARGET}"),
            tried,
            remedy: format!(
                "run `rustup target add {WASM_TARGET}` where rustup can reach its server; \
                 or, on Debian, make `apt-get` able to reach a suite that has `rust-src` {}",
                rustc.release
            ),
        }
        .into()),
    }
}

fn source_is_wanted() -> anyhow::Result<bool> {
    match std::env::var(CHOICE_VARIABLE).as_deref() {
        Err(_) | Ok("") => Ok(false),
        Ok("source") => Ok(true),
        Ok(other) => {
            bail!("{CHOICE_VARIABLE}: `{other}` is not a known choice\n  hint: set it to `source`, or unset it")
        }
    }
}

/// The compiler in use.
#[derive(Debug)]
struct Rustc {
    /// Its version without suffix, such as `1.95.0`.
    release: String,
    /// The commit it was built from; two compilers of one release need not agree on library metadata.
    commit: String,
    sysroot: PathBuf,
}

impl Rustc {
    fn ask(folder: &Path) -> anyhow::Result<Self> {
        let ask = |arguments: &[&str]| query(rustc().args(arguments).current_dir(folder));
        let version = ask(&["-vV"]).context("the Rust compiler did not answer")?;
        let sysroot = ask(&["--print", "sysroot"]).context("the Rust compiler did not answer")?;
        let (release, commit) = parse_version(&version)
            .with_context(|| format!("`rustc -vV` named neither release nor commit:\n{version}"))?;
        Ok(Self { release, commit, sysroot: PathBuf::from(sysroot.trim()) })
    }

    fn target_library(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib").join(WASM_TARGET).join("lib")
    }

    fn has_target(&self) -> bool {
        self.target_library().is_dir()
    }

    fn sysroot_of_ours(&self, workspace: &Workspace) -> PathBuf {
        workspace.downloads().join(format!("wasm-std-{}-{}", self.release, self.commit))
    }

    /// Builds in `temporary` and moves the result into place. What went wrong is added to `tried`.
    fn build_from_source(
        &self,
        workspace: &Workspace,
        temporary: &Path,
        saying: &impl Fn(&str),
        tried: &mut Vec<Failure>,
    ) -> Option<PathBuf> {
        let candidates = apt::candidate_suites(&apt::configured_sources());
        if candidates.is_empty() {
            tried.push(Failure::new("/etc/apt", "no Debian archive is configured on this machine"));
        }
        for (suite, archive) in candidates {
            saying(&format!("looking for its source in {suite}"));
            let unpacked = temporary.join(&suite).join("unpacked");
            let attempt = self
                .unpack_source(&temporary.join(&suite), &suite, &archive, &unpacked)
                .and_then(|()| {
                    saying("building the standard library, which takes a minute or more");
                    self.build(&unpacked, &temporary.join("build"))
                })
                .and_then(|sysroot| {
                    let place = self.sysroot_of_ours(workspace);
                    fs::rename(&sysroot, &place).map_err(|error| io_failure(&place, &error))?;
                    Ok(place)
                });
            match attempt {
                Ok(place) => return Some(place),
                Err(failure) => tried.push(failure),
            }
        }
        None
    }

    fn unpack_source(
        &self,
        folder: &Path,
        suite: &str,
        archive: &apt::Source,
        destination: &Path,
    ) -> Result<(), Failure> {
        let apt = PrivateApt::open(&folder.join("apt"), suite, archive)?;
        let sources = apt.versions("rust-src")?;
        let Some(source) = sources.iter().find(|version| is_release(version, &self.release)) else {
            let offered = if sources.is_empty() { "none".to_owned() } else { sources.join(", ") };
            return Err(Failure::new(
                format!("apt-cache madison rust-src ({suite})"),
                format!("has no {}, only: {offered}", self.release),
            ));
        };
        let libc = apt.versions("wasi-libc")?;
        let Some(libc) = libc.first() else {
            return Err(Failure::new(format!("apt-cache madison wasi-libc ({suite})"), "has none"));
        };
        apt.unpack(&[format!("rust-src={source}"), format!("wasi-libc={libc}")], destination)
    }

    /// Builds a sysroot from unpacked packages and proves that it links a module.
    fn build(&self, unpacked: &Path, folder: &Path) -> Result<PathBuf, Failure> {
        let source = unpacked.join(format!("usr/src/rustc-{}/library", self.release));
        let (package, target) = (folder.join("package"), folder.join("target"));
        write(&package.join("src/lib.rs"), "#![no_std]\n")?;
        write(&package.join("Cargo.toml"), PACKAGE)?;
        let flags = [
            // Filters are linked with `lto = "fat"`, which needs the library's bitcode; cargo leaves it out by default.
            "-Cembed-bitcode=yes".to_owned(),
            // As in the official build: panic messages must not name this machine's folders.
            format!("--remap-path-prefix={}=/rustc/{}/library", source.display(), self.commit),
        ];
        let mut build = process::cargo();
        build.args(["build", "--release", "--target", WASM_TARGET, "-Z", "build-std=std,panic_abort"]);
        build.current_dir(&package).env("CARGO_TARGET_DIR", &target);
        build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        // `-Z` is for nightly toolchains; this says that we know. It applies to this one build, never to a filter's.
        build.env("RUSTC_BOOTSTRAP", "1");
        // Where cargo looks for the library's source instead of inside the toolchain. Internal to cargo, and used all
        // the same: `rust-toolchain.toml` fixes cargo's version, and the alternative is to write into the toolchain.
        build.env("__CARGO_TESTS_ONLY_SRC_ROOT", &source);
        run_quietly(&mut build)?;

        let sysroot = folder.join("sysroot");
        let library = sysroot.join("lib/rustlib").join(WASM_TARGET).join("lib");
        let objects = library.join("self-contained");
        fs::create_dir_all(&objects).map_err(|error| io_failure(&objects, &error))?;
        let built = target.join(WASM_TARGET).join("release/deps");
        let entries = fs::read_dir(&built).map_err(|error| io_failure(&built, &error))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".rlib") && !name.starts_with("libwasm_std_seed") {
                copy(&path, &library.join(name))?;
            }
        }
        for name in ["crt1-command.o", "crt1-reactor.o", "libc.a"] {
            copy(&unpacked.join("usr/lib/wasm32-wasi").join(name), &objects.join(name))?;
        }
        let probe = folder.join("probe.rs");
        write(&probe, PROBE)?;
        let mut link = rustc();
        link.args([
            "--edition",
            "2024",
            "--crate-type",
            "cdylib",
            "--target",
            WASM_TARGET,
            "-Clto=fat",
            "-Cpanic=abort",
        ]);
        link.arg("--sysroot").arg(&sysroot).arg("-o").arg(folder.join("probe.wasm")).arg(&probe);
        run_quietly(&mut link)?;
        Ok(sysroot)
    }
}

/// An empty package, built for the sake of the library below it.
const PACKAGE: &str = "\
[package]
name = \"wasm-std-seed\"
version = \"0.0.0\"
edition = \"2024\"

[workspace]

[profile.release]
debug = false
";

/// Uses allocation, formatting and the clock, so that a missing part of either library shows when linking.
const PROBE: &str = "\
#[unsafe(no_mangle)]
pub extern \"C\" fn probe() -> usize {
    format!(\"{:?}\", std::time::SystemTime::now()).len()
}
";

fn rustc() -> Command {
    Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

/// Release and short commit from `rustc -vV`.
fn parse_version(text: &str) -> Option<(String, String)> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let commit = field("commit-hash:")?;
    Some((field("release:")?.to_owned(), commit.get(..9).unwrap_or(commit).to_owned()))
}

/// Whether a Debian version is of this upstream release: `1.95.0+dfsg1-2` is of `1.95.0`, `1.95.01-1` is not.
fn is_release(debian_version: &str, release: &str) -> bool {
    debian_version
        .strip_prefix(release)
        .is_some_and(|rest| rest.starts_with(['+', '-', '~']) && !rest.starts_with("~b"))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).and_then(|()| fs::write(path, text)).map_err(|error| io_failure(path, &error))
}

fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::copy(from, to).map(drop).map_err(|error| io_failure(from, &error))
}

fn io_failure(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(path.display().to_string(), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_read_from_the_verbose_form() {
        let text = "\
rustc 1.95.0 (59807616e 2026-04-14)
binary: rustc
commit-hash: 59807616e1fa2540724bfbac14d7976d7e4a3860
commit-date: 2026-04-14
host: x86_64-unknown-linux-gnu
release: 1.95.0
LLVM version: 22.1.2
";
        assert_eq!(parse_version(text), Some(("1.95.0".to_owned(), "59807616e".to_owned())));
        assert_eq!(parse_version("rustc 1.95.0"), None);
    }

    #[test]
    fn only_the_same_release_will_do() {
        assert!(is_release("1.95.0+dfsg1-2~bpo13+1", "1.95.0"));
        assert!(is_release("1.95.0-1", "1.95.0"));
        assert!(!is_release("1.95.0~beta.5-1", "1.95.0"));
        assert!(!is_release("1.95.01-1", "1.95.0"));
        assert!(!is_release("1.94.1+dfsg1-1", "1.95.0"));
    }

    #[test]
    fn flags_already_set_are_kept() {
        let flags = |encoded: Option<&str>, plain: Option<&str>| {
            rustflags(encoded.map(str::to_owned), plain.map(str::to_owned))
        };
        assert_eq!(flags(None, None), Vec::<String>::new());
        assert_eq!(flags(None, Some("-C a  -C b")), ["-C", "a", "-C", "b"]);
        assert_eq!(flags(Some("-C\x1fa b"), Some("-C c")), ["-C", "a b"]);
    }
}
