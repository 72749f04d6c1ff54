//! Where the built binaries, the built filters and Envoy lie.
//!
//! `cargo xtask test` says so in variables; without them the conventional places are tried. What is missing is an
//! error with the remedy, never a reason to skip a test.

use std::path::{Path, PathBuf};

pub use portcullis_e2e::ENVOY_VERSION;
use portcullis_e2e::Programs;

/// The workspace's root folder.
pub fn workspace() -> PathBuf {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_folder.parent().unwrap_or(crate_folder).to_owned()
}

/// The real Envoy.
pub fn envoy() -> Result<PathBuf, String> {
    Programs::find().envoy()
}

/// The built `portcullis`.
pub fn portcullis() -> Result<PathBuf, String> {
    Programs::find().portcullis()
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
