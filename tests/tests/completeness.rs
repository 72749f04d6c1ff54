//! No filter lacks what a filter has: README, configurations good and bad, scenarios, and imports that somebody agreed to.
//! No limit lacks a test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use portcullis_harness::find_scenarios;
use portcullis_tests::places;

/// Folders below `filters/` that build to a module.
fn filters() -> Vec<(String, PathBuf)> {
    let folder = places::workspace().join("filters");
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

/// Runs `lacks` for every filter, and fails with everything that it finds.
fn every_filter(lacks: impl Fn(&str, &Path) -> Vec<String>) {
    let all: Vec<String> = filters()
        .iter()
        .flat_map(|(name, path)| lacks(name, path).into_iter().map(move |lack| format!("{name}: {lack}")))
        .collect();
    assert!(all.is_empty(), "\n{}", all.join("\n"));
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().ends_with(ending)).collect()
}

#[test]
fn every_filter_has_a_readme() {
    every_filter(|_, path| {
        let readme = std::fs::read_to_string(path.join("README.md")).unwrap_or_default();
        if readme.lines().count() < 10 { vec!["there is no README.md to speak of".to_owned()] } else { Vec::new() }
    });
}

#[test]
fn every_filter_has_good_and_bad_configurations() {
    every_filter(|_, path| {
        let mut lacks = Vec::new();
        if files(&path.join("config"), ".json").is_empty() {
            lacks.push("`config/` holds no configuration".to_owned());
        }
        if files(&path.join("config/bad"), ".json").is_empty() {
            lacks.push("`config/bad/` holds no configuration that must be refused".to_owned());
        }
        lacks
    });
}

#[test]
fn every_filter_has_scenarios_that_deny_that_pass_and_that_refuse_a_configuration() {
    every_filter(|_, path| {
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
    });
}

#[test]
fn every_filter_has_a_fuzz_target_for_its_configuration() {
    let targets = files(&places::workspace().join("tests/fuzz/src/targets"), ".rs");
    let text: String = targets.iter().map(|file| std::fs::read_to_string(file).unwrap_or_default()).collect();
    every_filter(|name, _| {
        let target = format!("name: \"{name}-configuration\"");
        if text.contains(&target) { Vec::new() } else { vec![format!("no fuzz target has `{target}`")] }
    });
}

#[test]
fn every_filter_has_a_policy_for_envoy() {
    every_filter(|name, _| {
        let folder = places::workspace().join("envoy").join(name);
        ["portcullis.yaml", "envoy.yaml"]
            .iter()
            .filter(|file| !folder.join(file).is_file())
            .map(|file| format!("there is no `envoy/{name}/{file}`"))
            .collect()
    });
}

/// What a module imports is what it can do: a new import is a decision, not an accident. The same lists are what
/// Envoy's `capability_restriction_config` and our host enforce.
#[test]
fn every_filter_imports_what_was_agreed_and_nothing_else() {
    every_filter(|name, path| {
        let built = places::filter(name).unwrap_or_else(|error| panic!("{error}"));
        let imported = imports(&built);
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
    });
}

/// The names alone: every host function has one module it can come from.
fn imports(module: &Path) -> BTreeSet<String> {
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

// ---- limits

fn page_of_limits() -> String {
    std::fs::read_to_string(places::workspace().join("docs/limits.md")).expect("`docs/limits.md`")
}

/// What stands between backticks in the first or the last column of the page's tables.
fn quoted(page: &str, last: bool) -> BTreeSet<String> {
    let rows = page.lines().filter(|line| line.starts_with('|'));
    rows.filter_map(|row| {
        let mut cells = row.trim_matches('|').split('|');
        if last { cells.next_back() } else { cells.next() }
    })
    .flat_map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>())
    .collect()
}

/// Names of all functions in Rust files below the workspace's folders.
fn functions() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders: Vec<PathBuf> = ["host", "filters", "tests"].map(|name| places::workspace().join(name)).into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().filter_map(Result::ok) {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                let names = text.split("fn ").skip(1).filter_map(|rest| rest.split(['(', '<']).next());
                found.extend(names.map(str::to_owned));
            }
        }
    }
    found
}

#[test]
fn every_test_that_the_page_of_limits_names_is_there() {
    let named = quoted(&page_of_limits(), true);
    assert!(named.len() > 50, "the page names {} tests", named.len());
    let missing: Vec<_> = named.difference(&functions()).cloned().collect();
    assert!(missing.is_empty(), "docs/limits.md names tests that are not there: {missing:?}");
}

#[test]
fn every_limit_of_a_policy_has_a_test() {
    let text = std::fs::read_to_string(places::workspace().join("docs/portcullis.schema.json")).expect("the schema");
    let schema: serde_json::Value = serde_json::from_str(&text).expect("the schema is JSON");
    let named = quoted(&page_of_limits(), false);
    for section in ["FilterLimits", "ListenerLimits", "CodeCache"] {
        let settings = schema["$defs"][section]["properties"].as_object().expect("settings of the section");
        let limits = settings.keys().filter(|key| section != "CodeCache" || key.starts_with("max_"));
        let missing: Vec<_> = limits.filter(|key| !named.contains(*key)).collect();
        assert!(missing.is_empty(), "docs/limits.md says of `{section}` nothing about {missing:?}");
    }
}
