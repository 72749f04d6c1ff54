//! Where things are: the checkout, its target directory, the folder for downloads, the filters.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;

use crate::process;

/// The profile in `Cargo.toml` that filters are built with, and the target they are built for.
pub(crate) const WASM_PROFILE: &str = "wasm";
/// The one for the loop of change and test.
pub(crate) const WASM_DEV_PROFILE: &str = "wasm-dev";
/// The target triple of every filter.
pub(crate) const WASM_TARGET: &str = "wasm32-wasip1";

/// Where guests lie: the filters, and what tests run in their place.
const GUEST_FOLDERS: [&str; 2] = ["filters", "tests/guests"];

/// The checkout this program was built from.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The folder of the root `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
    /// Filters that build to a `.wasm`, by name.
    pub(crate) filters: Vec<Filter>,
    /// Every package below the folders of guests, also those that only filters use.
    pub(crate) guest_packages: Vec<String>,
}

/// A crate in a folder of guests, with a `cdylib` target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    /// The folder's name, which is also the name of the `.wasm`.
    pub(crate) name: String,
    /// The crate's name, for `cargo build --package`.
    pub(crate) package: String,
    /// The library target's name, from which cargo names what it builds.
    pub(crate) library: String,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let root = root()?;
        let mut command = process::cargo();
        command.current_dir(&root).args(["metadata", "--no-deps", "--format-version", "1"]);
        let metadata = process::query(&mut command).context("cargo could not read the workspace")?;
        let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata was not JSON")?;
        let target = metadata["target_directory"].as_str().context("cargo metadata named no target directory")?;
        let folders = GUEST_FOLDERS.map(|folder| root.join(folder));
        let packages = folders.iter().flat_map(|folder| packages_below(&metadata, folder));
        Ok(Self {
            filters: folders.iter().flat_map(|folder| filters(&metadata, folder)).collect(),
            guest_packages: packages.map(|(_, package)| name_of(package)).collect(),
            target: PathBuf::from(target),
            root,
        })
    }

    /// The folder for downloads; ignored by git, never touched by `cargo clean`.
    pub(crate) fn downloads(&self) -> PathBuf {
        self.root.join(".portcullis")
    }

    /// The folder of built filters.
    pub(crate) fn built_filters(&self) -> PathBuf {
        self.target.join("filters")
    }
}

/// `path` as seen from the workspace root, for messages.
pub(crate) fn shown(path: &Path, root: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

fn root() -> anyhow::Result<PathBuf> {
    // Cargo sets the variable at run time; the compiled-in value serves a binary that is started without cargo.
    let crate_folder = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let crate_folder = PathBuf::from(crate_folder);
    let root = crate_folder.parent().context("xtask's folder has no parent")?;
    root.canonicalize().with_context(|| format!("the checkout `{}` is gone", root.display()))
}

fn filters(metadata: &Value, folder: &Path) -> Vec<Filter> {
    let is_cdylib = |target: &&Value| {
        target["crate_types"].as_array().is_some_and(|types| types.iter().any(|kind| kind.as_str() == Some("cdylib")))
    };
    let mut found: Vec<Filter> = packages_below(metadata, folder)
        .filter_map(|(name, package)| {
            let library = package["targets"].as_array()?.iter().find(is_cdylib)?;
            Some(Filter { name, package: name_of(package), library: name_of(library) })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Packages in folders directly below `folder`, with the folders' names.
fn packages_below<'a>(metadata: &'a Value, folder: &Path) -> impl Iterator<Item = (String, &'a Value)> {
    metadata["packages"].as_array().into_iter().flatten().filter_map(move |package| {
        let manifest = Path::new(package["manifest_path"].as_str()?);
        let name = manifest.parent()?.strip_prefix(folder).ok()?.to_str()?;
        Some((name.to_owned(), package))
    })
}

fn name_of(item: &Value) -> String {
    item["name"].as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_the_cdylibs_below_the_filters_folder() {
        let package = |name: &str, folder: &str, kinds: &[&str]| {
            serde_json::json!({
                "name": name,
                "manifest_path": format!("{folder}/Cargo.toml"),
                "targets": [
                    { "name": "a_bench", "crate_types": ["bin"] },
                    { "name": name.replace('-', "_"), "crate_types": kinds },
                ],
            })
        };
        let metadata = serde_json::json!({ "packages": [
            package("portcullis-kit", "/w/filters/kit", &["lib"]),
            package("portcullis-size-limit", "/w/filters/size-limit", &["cdylib", "rlib"]),
            package("portcullis-jwt-auth", "/w/filters/jwt-auth", &["cdylib", "rlib"]),
            package("elsewhere", "/w/tests/probe", &["cdylib"]),
        ] });
        let folder = Path::new("/w/filters");
        let guests: Vec<String> = packages_below(&metadata, folder).map(|(name, _)| name).collect();
        assert_eq!(guests, ["kit", "size-limit", "jwt-auth"]);
        let found = filters(&metadata, folder);
        let names: Vec<&str> = found.iter().map(|filter| filter.name.as_str()).collect();
        assert_eq!(names, ["jwt-auth", "size-limit"]);
        assert_eq!(found[0].package, "portcullis-jwt-auth");
        assert_eq!(found[0].library, "portcullis_jwt_auth");
    }
}
