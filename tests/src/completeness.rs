//! What a filter has to have: README, configurations good and bad, scenarios, a policy for Envoy, a fuzz target, and imports
//! that somebody agreed to.
//!
//! Each function looks at all filters of a checkout, and gives what they lack.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use portcullis_harness::find_scenarios;

/// Folders below `filters/` that build to a module, and their names.
pub fn filters(checkout: &Path) -> Vec<(String, PathBuf)> {
    let folder = checkout.join("filters");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&folder).expect("`filters` can be listed") {
        let path = entry.expect("`filters` can be listed").path();
        let manifest = std::fs::read_to_string(path.join("Cargo.toml")).unwrap_or_default();
        if manifest.contains("cdylib") {
            let name = path.file_name().expect("a folder has a name").to_string_lossy().into_owned();
            found.push((name, path));
        }
    }
    found.sort();
    assert!(!found.is_empty(), "`{}` holds no filter", folder.display());
    found
}

fn every_filter(checkout: &Path, lacks: impl Fn(&str, &Path) -> Vec<String>) -> Vec<String> {
    let found = filters(checkout);
    found
        .iter()
        .flat_map(|(name, path)| lacks(name, path).into_iter().map(move |lack| format!("{name}: {lack}")))
        .collect()
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().ends_with(ending)).collect()
}

/// READMEs.
pub fn readmes(checkout: &Path) -> Vec<String> {
    every_filter(checkout, |_, path| {
        let readme = std::fs::read_to_string(path.join("README.md")).unwrap_or_default();
        if readme.lines().count() < 10 { vec!["there is no README.md to speak of".to_owned()] } else { Vec::new() }
    })
}

/// Configurations, good and bad.
pub fn configurations(checkout: &Path) -> Vec<String> {
    every_filter(checkout, |_, path| {
        let mut lacks = Vec::new();
        if files(&path.join("config"), ".json").is_empty() {
            lacks.push("`config/` holds no configuration".to_owned());
        }
        if files(&path.join("config/bad"), ".json").is_empty() {
            lacks.push("`config/bad/` holds no configuration that must be refused".to_owned());
        }
        lacks
    })
}

/// Scenarios in which a request is denied, in which one passes, and in which a configuration is refused.
pub fn scenarios(checkout: &Path) -> Vec<String> {
    every_filter(checkout, |_, path| {
        let scenarios = match find_scenarios(&path.join("scenarios")) {
            Ok(files) => files,
            Err(error) => return vec![error],
        };
        let text: String = scenarios.iter().map(|file| std::fs::read_to_string(file).unwrap_or_default()).collect();
        ["local_response:", "upstream:", "configuration_refused:"]
            .iter()
            .filter(|key| !text.contains(*key))
            .map(|key| format!("no scenario expects `{key}`"))
            .collect()
    })
}

/// Fuzz targets for configurations.
pub fn fuzz_targets(checkout: &Path) -> Vec<String> {
    let targets = files(&checkout.join("tests/fuzz/src/targets"), ".rs");
    let text: String = targets.iter().map(|file| std::fs::read_to_string(file).unwrap_or_default()).collect();
    every_filter(checkout, |name, _| {
        let target = format!("name: \"{name}-configuration\"");
        if text.contains(&target) { Vec::new() } else { vec![format!("no fuzz target has `{target}`")] }
    })
}

/// Policies, and what they are for Envoy.
pub fn policies_for_envoy(checkout: &Path) -> Vec<String> {
    every_filter(checkout, |name, _| {
        let folder = checkout.join("envoy").join(name);
        ["portcullis.yaml", "envoy.yaml"]
            .iter()
            .filter(|file| !folder.join(file).is_file())
            .map(|file| format!("there is no `envoy/{name}/{file}`"))
            .collect()
    })
}

/// Imports that `imports.txt` lists, no more and no fewer. What a module imports is what it can do: a new import is a decision,
/// not an accident. The same lists are what Envoy's `capability_restriction_config` and our host enforce.
///
/// `built` gives the module of a filter.
pub fn imports(checkout: &Path, built: impl Fn(&str) -> Result<PathBuf, String>) -> Vec<String> {
    every_filter(checkout, |name, path| {
        let built = built(name).unwrap_or_else(|error| panic!("{error}"));
        let imported = imports_of(&built);
        let file = path.join("imports.txt");
        let agreed: BTreeSet<String> = std::fs::read_to_string(&file)
            .unwrap_or_default()
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::to_owned)
            .collect();
        let mut lacks: Vec<String> = imported
            .difference(&agreed)
            .map(|import| format!("the module imports `{import}`, which imports.txt does not list"))
            .collect();
        lacks.extend(
            agreed
                .difference(&imported)
                .map(|import| format!("imports.txt lists `{import}`, which the module does not import")),
        );
        if !lacks.is_empty() {
            lacks.push(format!("if the change is meant: `cargo xtask imports {name}` prints the list"));
        }
        lacks
    })
}

/// The names alone: every host function has one module it can come from.
fn imports_of(module: &Path) -> BTreeSet<String> {
    let wasm = std::fs::read(module).expect("the module can be read");
    let mut found = BTreeSet::new();
    for payload in wasmparser::Parser::new(0).parse_all(&wasm) {
        if let wasmparser::Payload::ImportSection(section) = payload.expect("the module is WebAssembly") {
            for import in section.into_imports() {
                let import = import.expect("the module is WebAssembly");
                found.insert(format!("{}.{}", import.module, import.name));
            }
        }
    }
    found
}
