//! Where the programs lie that scenarios run on.

use std::path::{Path, PathBuf};

/// The Envoy release that filters are tested against.
pub const ENVOY_VERSION: &str = "1.40.0";

/// `portcullis` and Envoy.
#[derive(Debug, Clone, Default)]
pub struct Programs {
    portcullis: Option<PathBuf>,
}

impl Programs {
    /// What variables name, or what lies in the conventional places.
    pub fn find() -> Programs {
        Programs::default()
    }

    /// The same, with this `portcullis`.
    pub fn with_portcullis(portcullis: PathBuf) -> Programs {
        Programs { portcullis: Some(portcullis) }
    }

    /// `portcullis`: the one that was given, that `PORTCULLIS_BIN` names, or that was built in the checkout around the current
    /// folder.
    pub fn portcullis(&self) -> Result<PathBuf, String> {
        if let Some(portcullis) = &self.portcullis {
            return Ok(portcullis.clone());
        }
        let remedy = "cargo build --bins";
        if let Some(named) = named("`portcullis`", "PORTCULLIS_BIN", remedy)? {
            return Ok(named);
        }
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
        let targets = target.into_iter().chain(surroundings().map(|folder| folder.join("target")));
        let built = targets.map(|target| target.join("debug/portcullis")).find(|path| path.is_file());
        built.ok_or_else(|| {
            format!("`portcullis` is not built: there is no `target/debug/portcullis`\n  hint: run `{remedy}`")
        })
    }

    /// The real Envoy: the one that `PORTCULLIS_ENVOY` names, that `cargo xtask setup` has brought into the checkout around
    /// this program or the current folder, or that is on the PATH.
    pub fn envoy(&self) -> Result<PathBuf, String> {
        if let Some(named) = named("Envoy", "PORTCULLIS_ENVOY", "cargo xtask setup")? {
            return Ok(named);
        }
        let folder = Path::new(".portcullis/tools").join(format!("envoy-{ENVOY_VERSION}"));
        let brought = surroundings().flat_map(|around| {
            let folder = around.join(&folder);
            [folder.join("envoy"), folder.join("bin/envoy"), folder]
        });
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path: Vec<PathBuf> = std::env::split_paths(&path).map(|folder| folder.join("envoy")).collect();
        brought.chain(on_path).find(|place| place.is_file()).ok_or_else(|| {
            format!(
                "Envoy is missing: `PORTCULLIS_ENVOY` names none, and none is on the PATH\n  \
                 hint: set the variable to the program of Envoy {ENVOY_VERSION}, or, in a checkout of Portcullis, run \
                 `cargo xtask setup`"
            )
        })
    }
}

/// The file that a variable names.
fn named(what: &str, variable: &str, remedy: &str) -> Result<Option<PathBuf>, String> {
    let Some(named) = std::env::var_os(variable).map(PathBuf::from) else { return Ok(None) };
    if named.is_file() {
        return Ok(Some(named));
    }
    Err(format!(
        "{what} is missing: `{variable}` names `{}`, which is not a file\n  hint: run `{remedy}`, or correct the variable",
        named.display()
    ))
}

/// The current folder and this program's, and all above them.
fn surroundings() -> impl Iterator<Item = PathBuf> {
    let starts = [std::env::current_dir().ok(), std::env::current_exe().ok()];
    let above = |start: PathBuf| start.ancestors().map(Path::to_owned).collect::<Vec<_>>();
    starts.into_iter().flatten().flat_map(above)
}
