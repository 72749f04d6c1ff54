//! Where built modules lie.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

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
            format!(
                "run `cargo xtask build-filters {name}` in this repository, \
                 `cargo build --release --target wasm32-wasip1` elsewhere"
            ),
        )
    })
}

fn newest_in(target: &Path, name: &str) -> Option<PathBuf> {
    let mut candidates = vec![target.join("filters").join(format!("{name}.wasm"))];
    let library = format!("{}.wasm", name.replace('-', "_"));
    let profiles = std::fs::read_dir(target.join("wasm32-wasip1")).into_iter().flatten().flatten();
    candidates.extend(profiles.map(|profile| profile.path().join(&library)));
    let modified = |path: &Path| -> Option<SystemTime> { path.metadata().ok()?.modified().ok() };
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
}
