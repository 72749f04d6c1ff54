//! Programs of the operating system that the tutorial, benches and by-hand checks use.
//!
//! Missing ones are installed where that takes one command and no question, that is as root on Debian; elsewhere the
//! command is named. A missing program here never fails the set-up; tests that need one say so themselves.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::process::{run_quietly, with_retries};
use crate::progress::{Mark, Progress};

/// A program, the Debian package that has it, and who wants it.
#[derive(Debug)]
struct Program {
    name: &'static str,
    package: &'static str,
    used_by: &'static str,
}

const PROGRAMS: [Program; 2] = [
    Program { name: "curl", package: "curl", used_by: "requests by hand, and the tutorial with its test" },
    Program { name: "h2load", package: "nghttp2-client", used_by: "end-to-end benches" },
];

/// What `cargo xtask test` wants.
pub(crate) const FOR_TESTS: [&str; 1] = ["curl"];

/// All of them.
pub(crate) fn names() -> Vec<&'static str> {
    PROGRAMS.iter().map(|program| program.name).collect()
}

/// Looks for programs by their names and installs what is missing where it may.
pub(crate) fn ensure(names: &[&str], progress: Progress) -> anyhow::Result<()> {
    for program in PROGRAMS.iter().filter(|program| names.contains(&program.name)) {
        let started = Instant::now();
        if is_on_path(program.name) {
            progress.found(Mark::Good, program.name, &format!("on PATH; for {}", program.used_by), Duration::ZERO);
            continue;
        }
        if rustix::process::geteuid().is_root() && is_on_path("apt-get") {
            progress.doing(program.name, &format!("installing Debian's {}", program.package));
            match install(program.package) {
                Ok(()) if is_on_path(program.name) => {
                    progress.found(Mark::Good, program.name, "installed", started.elapsed());
                    continue;
                }
                Ok(()) => {}
                Err(failure) => eprintln!("    {failure}"),
            }
        }
        let remedy = format!("only {} need it; on Debian: apt-get install {}", program.used_by, program.package);
        progress.found(Mark::Missing, program.name, &remedy, started.elapsed());
    }
    Ok(())
}

fn install(package: &str) -> Result<(), crate::process::Failure> {
    let apt_get = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        run_quietly(&mut command).map(drop)
    };
    // The lists may be absent or too old to name a package that the mirror still has.
    with_retries(|| {
        apt_get(&["update"])?;
        apt_get(&["install", "--yes", "--no-install-recommends", package])
    })
}

fn is_on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_for_programs_on_the_path() {
        assert!(is_on_path("sh"));
        assert!(!is_on_path("portcullis-no-such-program"));
    }
}
