//! What the targets for filters' configurations share.

use std::path::{Path, PathBuf};

use portcullis_kit::filter::Filter;
use portcullis_kit::guard::Guard;

use super::outcome;

/// The folder of a filter.
pub(super) fn folder(filter: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../filters").join(filter)
}

/// Reads a configuration. Any bytes are one, or a list of errors, each of which says where it is and what is wrong.
pub(super) fn compile<F: Filter>(input: &[u8]) -> u64 {
    let Err(errors) = Guard::<F>::from_json(input) else { return 0 };
    let shown = errors.to_string();
    assert!(!errors.is_empty() && !shown.is_empty());
    for error in shown.lines() {
        assert!(error.starts_with(&format!("{}: ", F::NAME)) || error.starts_with("  "), "{shown}");
    }
    let said = shown.lines().next().unwrap_or_default().split('`').step_by(2).collect::<String>();
    outcome(said.chars().filter(|c| !c.is_ascii_digit()).collect::<String>())
}

/// The configurations in a filter's folder, the good and the bad, in order.
pub(super) fn configurations(filter: &str) -> Vec<Vec<u8>> {
    let config = folder(filter).join("config");
    let entries = [config.join("bad"), config].into_iter().filter_map(|folder| std::fs::read_dir(folder).ok());
    let mut files: Vec<PathBuf> = entries.flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    files.iter().filter_map(|file| std::fs::read(file).ok()).collect()
}
