//! Where built modules lie.

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
    if let Some(filters) = std::env::var_os("PORTCULLIS_FILTERS").map(|filters| PathBuf::from(filters).join(&file))
        && filters.is_file()
    {
        return Ok(filters);
    }
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let above = folder.ancestors().map(|folder| folder.join("target"));
    let newest = named.into_iter().chain(above).find_map(|target| newest_in(&target, name));
    newest.ok_or_else(|| {
        (
            format!("the filter `{name}` is not built: there is no `target/filters/{file}`, and cargo has made none"),
            HOW_TO_BUILD.to_owned(),
        )
    })
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

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

fn newest_in(target: &Path, name: &str) -> Option<PathBuf> {
    let mut candidates = vec![target.join("filters").join(format!("{name}.wasm"))];
    let library = format!("{}.wasm", name.replace('-', "_"));
    let profiles = std::fs::read_dir(target.join("wasm32-wasip1")).into_iter().flatten().flatten();
    candidates.extend(profiles.map(|profile| profile.path().join(&library)));
    let built = candidates.into_iter().filter_map(|path| Some((modified(&path)?, path)));
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
