//! Where built modules lie.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::filter::HOW_TO_BUILD;

/// Finds the module of the filter called `name`, built in `folder` or in one above it. Of several the newest is taken.
///
/// Looked for are `target/filters/NAME.wasm`, which `cargo xtask build-filters` makes, and what cargo itself makes of a
/// crate of that name: `target/wasm32-wasip1/*/NAME.wasm`, with `_` for `-`. `PORTCULLIS_FILTERS` names a folder that is
/// looked at first, `CARGO_TARGET_DIR` another `target`. The error is a problem and a hint.
pub(crate) fn find_built(name: &str, folder: &Path) -> Result<PathBuf, (String, String)> {
    let file = format!("{name}.wasm");
    if let Some(named) = in_named_folder(name).filter(|named| named.is_file()) {
        return Ok(named);
    }
    let newest = targets(folder).find_map(|target| newest_in(&target, name));
    newest.ok_or_else(|| {
        (
            format!("the filter `{name}` is not built: there is no `target/filters/{file}`, and cargo has made none"),
            HOW_TO_BUILD.to_owned(),
        )
    })
}

/// Where [`find_built`] would find a module once it is built.
pub(crate) fn places(name: &str, folder: &Path) -> Vec<PathBuf> {
    // Elsewhere nobody builds.
    let is_one =
        |target: &PathBuf| target.is_dir() || target.parent().is_some_and(|folder| folder.join("Cargo.toml").is_file());
    let built = targets(folder).filter(is_one).flat_map(|target| candidates(&target, name));
    in_named_folder(name).into_iter().chain(built).collect()
}

fn in_named_folder(name: &str) -> Option<PathBuf> {
    std::env::var_os("PORTCULLIS_FILTERS").map(|folder| PathBuf::from(folder).join(format!("{name}.wasm")))
}

fn targets(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    named.into_iter().chain(folder.ancestors().map(|folder| folder.join("target")))
}

/// Sources of the filter in `folder` that were changed after cargo built `module` from them; the first that is found.
///
/// Of modules that lie elsewhere nothing is known: they are copies, which tell when they were copied.
pub(crate) fn newer_source(module: &Path, folder: &Path) -> Option<PathBuf> {
    let profile = module.parent()?;
    if !profile.parent()?.ends_with("target/wasm32-wasip1") {
        return None;
    }
    let built = modified(module)?;
    let mut folders = vec![folder.join("src")];
    let mut sources = vec![folder.join("Cargo.toml")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                _ if path.extension().is_some_and(|ending| ending == "rs") => sources.push(path),
                _ => {}
            }
        }
    }
    sources.sort();
    sources.into_iter().find(|source| modified(source).is_some_and(|changed| changed > built))
}

fn candidates(target: &Path, name: &str) -> Vec<PathBuf> {
    let builds = target.join("wasm32-wasip1");
    let mut profiles: BTreeSet<PathBuf> = ["debug", "release"].iter().map(|profile| builds.join(profile)).collect();
    profiles.extend(std::fs::read_dir(&builds).into_iter().flatten().flatten().map(|profile| profile.path()));
    let library = format!("{}.wasm", name.replace('-', "_"));
    let mut candidates = vec![target.join("filters").join(format!("{name}.wasm"))];
    candidates.extend(profiles.into_iter().map(|profile| profile.join(&library)));
    candidates
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

fn newest_in(target: &Path, name: &str) -> Option<PathBuf> {
    let built = candidates(target, name).into_iter().filter_map(|path| Some((modified(&path)?, path)));
    built.max_by_key(|(modified, _)| *modified).map(|(_, path)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_module_counts() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        let put = |path: &str, seconds: u64| {
            let path = target.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, b"").unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds)).unwrap();
            path
        };
        assert_eq!(newest_in(&target, "my-guard"), None);
        let filters = put("filters/my-guard.wasm", 10);
        assert_eq!(newest_in(&target, "my-guard"), Some(filters));
        let release = put("wasm32-wasip1/release/my_guard.wasm", 20);
        put("wasm32-wasip1/debug/my_guard.wasm", 15);
        assert_eq!(newest_in(&target, "my-guard"), Some(release));
        assert_eq!(newest_in(&target, "other"), None);
    }

    #[test]
    fn a_source_that_was_changed_after_the_build_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: &str, seconds: u64| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, b"").unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds)).unwrap();
            path
        };
        let built = put("target/wasm32-wasip1/release/a.wasm", 20);
        let copied = put("target/filters/a.wasm", 20);
        put("src/lib.rs", 10);
        put("src/notes.txt", 30);
        assert_eq!(newer_source(&built, folder.path()), None);
        let policy = put("src/parts/policy.rs", 30);
        assert_eq!(newer_source(&built, folder.path()), Some(policy));
        assert_eq!(newer_source(&copied, folder.path()), None);
    }
}
