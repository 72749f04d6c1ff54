//! No filter lacks what a filter has, and no limit lacks a test.

use std::collections::BTreeSet;
use std::path::PathBuf;

use portcullis_tests::{completeness, places};

/// Fails with everything that filters lack.
fn nothing(lacks: &[String]) {
    assert!(lacks.is_empty(), "\n{}", lacks.join("\n"));
}

#[test]
fn every_filter_has_a_readme() {
    nothing(&completeness::readmes(&places::workspace()));
}

#[test]
fn every_filter_has_good_and_bad_configurations() {
    nothing(&completeness::configurations(&places::workspace()));
}

#[test]
fn every_filter_has_scenarios_that_deny_that_pass_and_that_refuse_a_configuration() {
    nothing(&completeness::scenarios(&places::workspace()));
}

#[test]
fn every_filter_has_a_fuzz_target_for_its_configuration() {
    nothing(&completeness::fuzz_targets(&places::workspace()));
}

#[test]
fn every_filter_has_a_policy_for_envoy() {
    nothing(&completeness::policies_for_envoy(&places::workspace()));
}

#[test]
fn every_filter_imports_what_was_agreed_and_nothing_else() {
    nothing(&completeness::imports(&places::workspace(), places::filter));
}

// ---- limits

fn page_of_limits() -> String {
    std::fs::read_to_string(places::workspace().join("docs/limits.md")).expect("`docs/limits.md`")
}

/// What stands between backticks in each cell of the page's tables, row by row.
fn quoted(page: &str) -> Vec<Vec<Vec<String>>> {
    let words = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let rows = page.lines().filter(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(words).collect()).collect()
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
    let named: BTreeSet<String> =
        quoted(&page_of_limits()).into_iter().filter_map(|mut row| row.pop()).flatten().collect();
    assert!(named.len() > 50, "the page names {} tests", named.len());
    let missing: Vec<_> = named.difference(&functions()).cloned().collect();
    assert!(missing.is_empty(), "docs/limits.md names tests that are not there: {missing:?}");
}

#[test]
fn every_limit_of_a_policy_has_its_default_and_a_test() {
    let text = std::fs::read_to_string(places::workspace().join("docs/portcullis.schema.json")).expect("the schema");
    let schema: serde_json::Value = serde_json::from_str(&text).expect("the schema is JSON");
    let page = page_of_limits();
    let (_, clients) = page.split_once("\n## Clients").expect("a part on clients");
    for section in ["FilterLimits", "ListenerLimits", "CodeCache"] {
        let settings = schema["$defs"][section]["properties"].as_object().expect("settings of the section");
        let limits = settings.keys().filter(|key| section != "CodeCache" || key.starts_with("max_"));
        // The code cache's names are nobody else's; those of filters and of listeners are in their own parts.
        let part = if section == "FilterLimits" { page.strip_suffix(clients).unwrap_or_default() } else { clients };
        let rows = quoted(part);
        for limit in limits {
            let found = rows.iter().find_map(|row| match row.as_slice() {
                [names, defaults, tests] => Some((names.iter().position(|name| name == limit)?, defaults, tests)),
                _ => None,
            });
            let Some((at, defaults, tests)) = found else {
                panic!("docs/limits.md says nothing about `{limit}` of `{section}`");
            };
            assert!(!tests.is_empty(), "docs/limits.md names no test of `{limit}` of `{section}`");
            let default = match &settings[limit]["default"] {
                serde_json::Value::Null => continue,
                serde_json::Value::String(text) => text.clone(),
                number => number.to_string(),
            };
            assert_eq!(defaults.get(at), Some(&default), "docs/limits.md on `{limit}` of `{section}`");
        }
    }
}
