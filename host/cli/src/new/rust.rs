//! Whether the Rust toolchain can build modules, and what it needs otherwise.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The target that modules are built for.
const TARGET: &str = "wasm32-wasip1";

/// The compiler that cargo will use.
#[derive(Debug)]
pub(crate) enum Toolchain {
    /// It has the target's standard library.
    Complete,
    /// It has not, but this sysroot of a checkout's own making has.
    Sysroot(PathBuf),
    /// It has not.
    Incomplete,
    /// There is none to be found here.
    Absent,
}

impl Toolchain {
    /// Asks the compiler of the current folder. `checkout` is one in which `cargo xtask setup` may have built the library.
    pub(crate) fn ask(checkout: Option<&Path>) -> Toolchain {
        let (Some(version), Some(sysroot)) = (rustc(&["-vV"]), rustc(&["--print", "sysroot"])) else {
            return Toolchain::Absent;
        };
        if Path::new(sysroot.trim()).join("lib/rustlib").join(TARGET).is_dir() {
            return Toolchain::Complete;
        }
        let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let (release, commit) = (field("release:"), field("commit-hash:").and_then(|hash| hash.get(..9)));
        let built = checkout.zip(release.zip(commit)).map(|(checkout, (release, commit))| {
            checkout.join(".portcullis").join(format!("wasm-std-{release}-{commit}"))
        });
        built.filter(|sysroot| sysroot.is_dir()).map_or(Toolchain::Incomplete, Toolchain::Sysroot)
    }

    /// What cargo's configuration must say for modules to be built.
    pub(crate) fn flags(&self) -> String {
        let Toolchain::Sysroot(sysroot) = self else { return String::new() };
        let flag = serde_json::Value::from(format!("--sysroot={}", sysroot.display()));
        format!(
            "\n# The toolchain lacks this target; the checkout of Portcullis has built it from source.\n\
             [target.{TARGET}]\nrustflags = [{flag}]\n"
        )
    }

    /// What is left to be done.
    pub(crate) fn missing(&self) -> Option<String> {
        match self {
            Toolchain::Complete | Toolchain::Sysroot(_) => None,
            Toolchain::Incomplete => Some(format!("rustup target add {TARGET}")),
            Toolchain::Absent => Some(format!("install Rust with rustup, then: rustup target add {TARGET}")),
        }
    }
}

fn rustc(arguments: &[&str]) -> Option<String> {
    let program = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
