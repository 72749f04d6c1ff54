//! Where the built binaries, the built filters and Envoy lie.
//!
//! `cargo xtask test` says so in variables; without them the conventional places are tried. What is missing is an
//! error with the remedy, never a reason to skip a test.

use std::path::{Path, PathBuf};

/// The Envoy release that filters are tested against.
pub const ENVOY_VERSION: &str = "1.40.0";

/// The workspace's root folder.
pub fn workspace() -> PathBuf {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_folder.parent().unwrap_or(crate_folder).to_owned()
}

/// The real Envoy.
pub fn envoy() -> Result<PathBuf, String> {
    let folder = workspace().join(".portcullis/tools").join(format!("envoy-{ENVOY_VERSION}"));
    let places = [folder.join("envoy"), folder.join("bin/envoy"), folder.clone()];
    find("Envoy", "PORTCULLIS_ENVOY", &places, "cargo xtask setup")
}

/// The built `portcullis`.
pub fn portcullis() -> Result<PathBuf, String> {
    find("`portcullis`", "PORTCULLIS_BIN", &[target().join("debug/portcullis")], "cargo build -p portcullis")
}

/// The module of a filter.
pub fn filter(name: &str) -> Result<PathBuf, String> {
    let folder = std::env::var_os("PORTCULLIS_FILTERS").map_or_else(|| target().join("filters"), PathBuf::from);
    let file = folder.join(format!("{name}.wasm"));
    if file.is_file() {
        return Ok(file);
    }
    Err(format!(
        "the filter `{name}` is not built: there is no `{}`\n  hint: run `cargo xtask build-filters`",
        file.display()
    ))
}

fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(target) => workspace().join(target),
        None => workspace().join("target"),
    }
}

fn find(what: &str, variable: &str, places: &[PathBuf], remedy: &str) -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os(variable).map(PathBuf::from) {
        if named.is_file() {
            return Ok(named);
        }
        return Err(format!(
            "{what} is missing: `{variable}` names `{}`, which is not a file\n  hint: run `{remedy}`, or correct the variable",
            named.display()
        ));
    }
    if let Some(place) = places.iter().find(|place| place.is_file()) {
        return Ok(place.clone());
    }
    let tried = places.first().map(|place| place.display().to_string()).unwrap_or_default();
    Err(format!("{what} is missing: there is no `{tried}`\n  hint: run `{remedy}`"))
}
