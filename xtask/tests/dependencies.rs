//! Holds the dependency tree to what `deny.toml` allows: licences, bans, sources.
//!
//! cargo-deny does the same and more, but needs to be installed and to reach an advisory database; this needs neither.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use toml::Table;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn rules() -> Table {
    std::fs::read_to_string(root().join("deny.toml")).unwrap().parse().unwrap()
}

fn strings<'a>(list: &'a toml::Value, key: Option<&str>) -> Vec<&'a str> {
    let item =
        |item: &'a toml::Value| key.map_or(Some(item), |key| item.get(key)).and_then(toml::Value::as_str).unwrap();
    list.as_array().unwrap().iter().map(item).collect()
}

/// Of both workspaces.
fn packages() -> Vec<Value> {
    let mut all = Vec::new();
    for manifest in ["Cargo.toml", "host/operators/runner/Cargo.toml"] {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(root()).args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--manifest-path",
            manifest,
        ]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let packages = metadata["packages"].as_array().unwrap();
        assert!(packages.len() > 50, "only {} packages in {manifest}: not the whole tree", packages.len());
        all.extend(packages.iter().cloned());
    }
    all
}

fn title(package: &Value) -> String {
    format!("{} {}", package["name"].as_str().unwrap(), package["version"].as_str().unwrap())
}

#[test]
fn every_dependency_has_a_licence_that_we_allow() {
    let rules = rules();
    let allowed = strings(&rules["licenses"]["allow"], None);
    let exceptions = rules["licenses"]["exceptions"].as_array().unwrap();
    let allowed_for = |name: &str| {
        let mut allowed = allowed.clone();
        for exception in exceptions.iter().filter(|exception| exception["crate"].as_str() == Some(name)) {
            allowed.extend(strings(&exception["allow"], None));
        }
        allowed
    };
    let refused: Vec<String> = packages()
        .iter()
        .filter(|package| {
            let allowed = allowed_for(package["name"].as_str().unwrap());
            !package["license"].as_str().is_some_and(|licence| is_allowed(licence, &allowed))
        })
        .map(|package| format!("{}: {}", title(package), package["license"]))
        .collect();
    assert!(refused.is_empty(), "not allowed by deny.toml: {refused:#?}");
}

#[test]
fn no_dependency_is_banned() {
    let rules = rules();
    let banned = strings(&rules["bans"]["deny"], Some("name"));
    assert!(!banned.is_empty());
    let found: Vec<String> =
        packages().iter().filter(|package| banned.contains(&package["name"].as_str().unwrap())).map(title).collect();
    assert!(found.is_empty(), "banned by deny.toml: {found:#?}");
}

#[test]
fn every_dependency_comes_from_an_allowed_registry_or_from_this_workspace() {
    let rules = rules();
    let registries = strings(&rules["sources"]["allow-registry"], None);
    let elsewhere: Vec<String> = packages()
        .iter()
        .filter(|package| match package["source"].as_str() {
            Some(source) => !registries.iter().any(|registry| source.strip_prefix("registry+") == Some(*registry)),
            None => !Path::new(package["manifest_path"].as_str().unwrap()).starts_with(root()),
        })
        .map(|package| format!("{}: {}", title(package), package["source"]))
        .collect();
    assert!(elsewhere.is_empty(), "not allowed by deny.toml: {elsewhere:#?}");
}

/// Whether an SPDX expression can be satisfied with the licences in `allowed`; what cannot be read is not allowed.
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    // Old manifests separate alternatives by a slash.
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words: Vec<&str> = spaced.split_whitespace().rev().collect();
    any(&mut words, allowed) == Some(true) && words.is_empty()
}

/// `OR` binds weakest (SPDX specification, annex D.4). Words are in reverse: the next one is the last.
fn any(words: &mut Vec<&str>, allowed: &[&str]) -> Option<bool> {
    let mut result = all(words, allowed)?;
    while words.pop_if(|word| *word == "OR").is_some() {
        result |= all(words, allowed)?;
    }
    Some(result)
}

fn all(words: &mut Vec<&str>, allowed: &[&str]) -> Option<bool> {
    let mut result = one(words, allowed)?;
    while words.pop_if(|word| *word == "AND").is_some() {
        result &= one(words, allowed)?;
    }
    Some(result)
}

fn one(words: &mut Vec<&str>, allowed: &[&str]) -> Option<bool> {
    match words.pop()? {
        "(" => {
            let result = any(words, allowed)?;
            words.pop_if(|word| *word == ")")?;
            Some(result)
        }
        ")" | "OR" | "AND" | "WITH" => None,
        licence => match words.pop_if(|word| *word == "WITH") {
            Some(_) => Some(allowed.contains(&format!("{licence} WITH {}", words.pop()?).as_str())),
            None => Some(allowed.contains(&licence)),
        },
    }
}

#[test]
fn licence_expressions_are_read_as_spdx_means_them() {
    let check = |expression: &str, allowed: &[&str], expected: bool| {
        assert_eq!(is_allowed(expression, allowed), expected, "{expression}");
    };
    check("MIT", &["MIT"], true);
    check("GPL-3.0-only", &["MIT"], false);
    check("MIT OR Apache-2.0", &["Apache-2.0"], true);
    check("MIT/Apache-2.0", &["Apache-2.0"], true);
    check("MIT AND Unicode-3.0", &["MIT"], false);
    check("(MIT OR GPL-2.0-only) AND Unicode-3.0", &["MIT", "Unicode-3.0"], true);
    check("(MIT OR GPL-2.0-only) AND Unicode-3.0", &["MIT"], false);
    check("MIT OR GPL-2.0-only AND GPL-3.0-only", &["MIT"], true);
    check("GPL-2.0-only AND GPL-3.0-only OR MIT", &["GPL-2.0-only"], false);
    check("Apache-2.0 WITH LLVM-exception", &["Apache-2.0"], false);
    check("Apache-2.0 WITH LLVM-exception", &["Apache-2.0 WITH LLVM-exception"], true);
    check("(MIT", &["MIT"], false);
    check("MIT OR", &["MIT"], false);
    check("MIT Apache-2.0", &["MIT", "Apache-2.0"], false);
    check("", &["MIT"], false);
}
