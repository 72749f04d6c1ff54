//! `cargo xtask build-filters` and `imports`: from crates below `filters/` to `.wasm` files with the filters' names.

use std::fs;
use std::io;
use std::path::PathBuf;

use anyhow::{Context as _, bail};

use crate::process::{self, run_shown};
use crate::progress::Progress;
use crate::wasm_imports::{self, Import};
use crate::wasm_std::WasmStd;
use crate::workspace::{Filter, WASM_TARGET, Workspace, shown};

/// Builds the named filters, or all, in a profile of `Cargo.toml`, and puts each module where hosts and tests look for it.
pub(crate) fn build(
    workspace: &Workspace,
    wasm_std: &WasmStd,
    names: &[String],
    profile: &str,
    progress: Progress,
) -> anyhow::Result<()> {
    progress.step("build the filters");
    let filters = chosen(&workspace.filters, names)?;
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).args(["build", "--lib", "--profile", profile, "--target", WASM_TARGET]);
    for filter in &filters {
        cargo.args(["--package", &filter.package]);
    }
    wasm_std.apply(&mut cargo);
    run_shown(&mut cargo)?;
    for filter in &filters {
        let built = workspace.target.join(WASM_TARGET).join(profile).join(format!("{}.wasm", filter.library));
        let module = fs::read(&built).with_context(|| format!("`{}` could not be read", built.display()))?;
        let place = place(workspace, &filter.name);
        put(&place, &module).with_context(|| format!("`{}` could not be written", place.display()))?;
        eprintln!("  {:<16} {:>8}  {}", filter.name, size(module.len()), shown(&place, &workspace.root));
    }
    Ok(())
}

/// The imports of a built filter.
pub(crate) fn imports(workspace: &Workspace, name: &str) -> anyhow::Result<Vec<Import>> {
    chosen(&workspace.filters, &[name.to_owned()])?;
    let path = place(workspace, name);
    let module = fs::read(&path).with_context(|| {
        format!("`{}` could not be read\n  hint: run `cargo xtask build-filters {name}`", path.display())
    })?;
    wasm_imports::imports(&module).with_context(|| format!("`{}` is not a WebAssembly module", path.display()))
}

fn place(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.built_filters().join(format!("{name}.wasm"))
}

fn chosen<'a>(filters: &'a [Filter], names: &[String]) -> anyhow::Result<Vec<&'a Filter>> {
    if let Some(unknown) = names.iter().find(|name| filters.iter().all(|filter| filter.name != **name)) {
        let known: Vec<&str> = filters.iter().map(|filter| filter.name.as_str()).collect();
        bail!("there is no filter `{unknown}`\n  hint: filters that build to a module: {}", known.join(", "));
    }
    let is_chosen = |filter: &&Filter| names.is_empty() || names.contains(&filter.name);
    let chosen: Vec<&Filter> = filters.iter().filter(is_chosen).collect();
    if chosen.is_empty() {
        bail!("no crate below `filters/` has a `cdylib` target");
    }
    Ok(chosen)
}

/// Replaces the module in one step, and not at all if it is the same: a running host may be watching the file.
fn put(place: &std::path::Path, module: &[u8]) -> io::Result<()> {
    if fs::read(place).is_ok_and(|present| present == module) {
        return Ok(());
    }
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary = place.with_extension(format!("wasm.{}", std::process::id()));
    fs::write(&temporary, module)?;
    fs::rename(&temporary, place)
}

fn size(bytes: usize) -> String {
    let kibibytes = bytes.div_ceil(1024);
    if kibibytes < 1024 {
        format!("{kibibytes} KiB")
    } else {
        format!("{}.{} MiB", kibibytes / 1024, kibibytes % 1024 * 10 / 1024)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(name: &str) -> Filter {
        Filter { name: name.to_owned(), package: format!("portcullis-{name}"), library: name.replace('-', "_") }
    }

    #[test]
    fn no_name_means_all_and_an_unknown_name_is_an_error_that_lists_the_known() {
        let filters = [filter("body-limit"), filter("jwt-auth")];
        assert_eq!(chosen(&filters, &[]).unwrap().len(), 2);
        assert_eq!(chosen(&filters, &["jwt-auth".to_owned()]).unwrap(), [&filters[1]]);
        let error = chosen(&filters, &["jwt".to_owned()]).unwrap_err().to_string();
        assert_eq!(error, "there is no filter `jwt`\n  hint: filters that build to a module: body-limit, jwt-auth");
    }

    #[test]
    fn an_unchanged_module_is_not_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("filters/a.wasm");
        put(&place, b"one").unwrap();
        let before = fs::metadata(&place).unwrap().modified().unwrap();
        put(&place, b"one").unwrap();
        assert_eq!(fs::metadata(&place).unwrap().modified().unwrap(), before);
        put(&place, b"two").unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path().join("filters")).unwrap().count(), 1);
    }

    #[test]
    fn sizes_are_rounded_up_to_kibibytes() {
        assert_eq!(size(1), "1 KiB");
        assert_eq!(size(1024 * 1024), "1.0 MiB");
        assert_eq!(size(1024 * 1536), "1.5 MiB");
    }
}
