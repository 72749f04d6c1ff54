//! The tutorial and the guides that go on from it do what they say, word by word.

use std::path::{Path, PathBuf};

use portcullis_tests::places;
use portcullis_tests::walkthrough::{Page, Reader};

use crate::{same_versions, target, wasm_flags};

/// A page of `docs`.
fn page(name: &str) -> Page {
    let text = std::fs::read_to_string(places::workspace().join("docs").join(name)).expect("a page");
    Page::parse(name, &text).unwrap_or_else(|error| panic!("{error}"))
}

/// What the pages have readers use, apart from what they build.
fn check_programs(path: &std::ffi::OsStr) {
    for (program, remedy) in [("curl", "cargo xtask setup --only programs"), ("python3", "apt-get install python3")] {
        let found = std::env::split_paths(path).any(|folder| folder.join(program).is_file());
        assert!(found, "`{program}` is missing, which the tutorial uses: install it, on Debian with `{remedy}`");
    }
}

#[test]
fn a_stranger_who_follows_the_tutorial_and_its_guides_has_a_filter_in_envoy() {
    let path = std::env::var_os("PATH").expect("a PATH");
    check_programs(&path);
    let elsewhere = tempfile::tempdir().expect("a folder");
    let mut variables = vec![
        // One folder for what is built in between, whatever the filter's folder is called today.
        ("CARGO_BUILD_BUILD_DIR".to_owned(), target().display().to_string()),
        ("CARGO_TARGET_DIR".to_owned(), String::new()),
        ("PORTCULLIS_FILTERS".to_owned(), String::new()),
        ("CARGO_NET_OFFLINE".to_owned(), "true".to_owned()),
        ("CARGO_INCREMENTAL".to_owned(), "0".to_owned()),
    ];
    variables.extend(wasm_flags().map(|flags| ("CARGO_TARGET_WASM32_WASIP1_RUSTFLAGS".to_owned(), flags)));
    // The page names where the programs usually lie; where they lie elsewhere, they are found here.
    let programs = tempfile::tempdir().expect("a folder");
    for (name, found) in [("portcullis", places::portcullis()), ("envoy", places::envoy())] {
        let found = found.unwrap_or_else(|error| panic!("{error}"));
        std::os::unix::fs::symlink(found, programs.path().join(name)).expect("a link");
    }
    let mut reader = Reader::new(&places::workspace(), elsewhere.path(), variables);
    reader.add_to_path(programs.path());
    let after = |reader: &mut Reader, command: &str, folder: &Path| {
        if let Some(name) = command.strip_prefix("portcullis new filter ") {
            same_versions(&folder.join(name));
            reader.free_ports_in(&folder.join(name).join("portcullis.yaml"));
        }
    };
    // The guides go on in the folder that the tutorial leaves.
    for name in ["tutorial.md", "guides/envoy.md", "guides/kubernetes.md"] {
        reader.follow(&page(name), after);
    }
}

/// Pages of the repository.
fn pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry")) {
        let (path, name) = (entry.path(), entry.file_name());
        let skipped = name.to_string_lossy().starts_with('.') || name == "target" || name == "templates";
        if path.is_dir() && !skipped {
            pages(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "md") {
            found.push(path);
        }
    }
}

/// What a heading is called in links.
fn anchor(heading: &str) -> String {
    let kept =
        heading.trim_start_matches('#').trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

#[test]
fn every_link_between_pages_leads_to_a_page_and_a_heading() {
    let workspace = places::workspace();
    let mut found = Vec::new();
    pages(&workspace, &mut found);
    let mut broken = Vec::new();
    let mut followed = 0;
    for page in &found {
        let text = std::fs::read_to_string(page).expect("a page");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            if link.contains("://") || link.contains(' ') {
                continue;
            }
            followed += 1;
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().expect("a folder").join(path) };
            let has_heading = || {
                let text = std::fs::read_to_string(&target).unwrap_or_default();
                text.lines().any(|line| line.starts_with('#') && anchor(line) == heading)
            };
            if !target.exists() || (!heading.is_empty() && !has_heading()) {
                let page = page.strip_prefix(&workspace).unwrap_or(page);
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    assert!(followed > 20, "{followed} links were found");
}
