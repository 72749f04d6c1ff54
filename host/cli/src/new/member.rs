//! A filter inside a checkout of Portcullis: beside its own folder it has a place in the workspace, an example for Envoy, and
//! a fuzz target.

use std::path::{Path, PathBuf};

use portcullis_config::{InMemory, compile, envoy};

use super::{KIT, Name, filled, unwritable, write};
use crate::failure::Failure;

/// The checkout in which a folder would be that of a filter.
pub(crate) fn checkout_of(folder: &Path) -> Option<PathBuf> {
    let filters = folder.parent()?;
    let is_ours = filters.ends_with("filters") && filters.join("kit/Cargo.toml").is_file();
    is_ours.then(|| filters.parent().map(Path::to_owned)).flatten()
}

/// Makes the filter; the text tells what comes next.
pub(crate) fn make(checkout: &Path, folder: &Path, name: &Name) -> Result<String, Failure> {
    let kebab = &name.kebab;
    if !folder.ends_with(kebab) {
        return Err(Failure::Configuration(format!(
            "--path: in a checkout the folder has the filter's name\n  hint: write `filters/{kebab}`"
        )));
    }
    let values = name.values(&format!("portcullis_{}", name.snake));
    let example = checkout.join("envoy").join(kebab);
    let target = checkout.join("tests/fuzz/src/targets").join(format!("{}.rs", name.snake));
    if let Some(present) = [&example, &target].into_iter().find(|path| path.exists()) {
        return Err(Failure::Configuration(format!(
            "NAME: `{kebab}` is taken: there is `{}`\n  hint: choose another name, or remove what an earlier attempt left",
            present.display()
        )));
    }
    // What the workspace must hold is changed in memory first: where it does not look as it should, nothing is written.
    let workspace = changed(checkout, "Cargo.toml", |text| {
        let text = below_each(text, |line| line.starts_with("  \"filters/"), &format!("  \"filters/{kebab}\","))?;
        let dependency = format!("portcullis-{kebab} = {{ path = \"filters/{kebab}\" }}");
        below_each(&text, |line| line.contains("{ path = \"filters/"), &dependency)
    })?;
    let fuzz = changed(checkout, "tests/fuzz/Cargo.toml", |text| {
        let dependency = format!("portcullis-{kebab}.workspace = true");
        below_each(text, |line| line.starts_with("portcullis-config"), &dependency)
    })?;
    let targets = changed(checkout, "tests/fuzz/src/targets/mod.rs", |text| {
        let text = in_order(text, &format!("mod {};", name.snake))?;
        let target = format!("    {}::CONFIGURATION,", name.snake);
        below_each(&text, |line| line.ends_with("::CONFIGURATION,"), &target)
    })?;
    let policy = filled(include_str!("../../templates/member/portcullis.yaml"), &values);
    let (bootstrap, filters) = rendered(kebab, &policy)?;

    let in_folder = |path: &str| folder.join(path);
    for (path, template) in KIT {
        write(&in_folder(path), &filled(template, &values))?;
    }
    write(&in_folder("Cargo.toml"), &filled(include_str!("../../templates/kit/Cargo.toml.member"), &values))?;
    write(&in_folder("README.md"), &filled(include_str!("../../templates/kit/README.md"), &values))?;
    write(&in_folder("imports.txt"), include_str!("../../templates/member/imports.txt"))?;
    write(&example.join("portcullis.yaml"), &policy)?;
    write(&example.join(format!("{kebab}.json")), CONFIGURATION)?;
    write(&example.join("envoy.yaml"), &bootstrap)?;
    write(&example.join("http-filters.yaml"), &filters)?;
    write(&target, &filled(include_str!("../../templates/member/fuzz_target.rs"), &values))?;
    for (path, text) in [workspace, fuzz, targets] {
        write(&path, &text)?;
    }
    Ok(format!(
        "made filters/{kebab}/, envoy/{kebab}/ and a fuzz target, all part of the workspace\n\nnext:\n  \
         just test-filter {kebab}     its tests, and its scenarios on every host\n  \
         just docs                    after a change of its configuration\n"
    ))
}

/// The configuration in the example, one of the filter's own.
const CONFIGURATION: &str = include_str!("../../templates/kit/config/one-client.json");

/// The example as it is for Envoy, as if all of it lay in `/etc/portcullis`.
fn rendered(name: &str, policy: &str) -> Result<(String, String), Failure> {
    let files = InMemory::at("/etc/portcullis")
        .with(&format!("filters/{name}.wasm"), *b"\0asm\x01\0\0\0")
        .with(&format!("{name}.json"), CONFIGURATION);
    let mut policy = compile("portcullis.yaml", policy, &files)
        .map_err(|mistakes| Failure::Running(format!("the example for Envoy has mistakes\n{mistakes}")))?;
    // It must not depend on the machine.
    policy.workers = 2;
    let bootstrap = envoy::render_bootstrap(&policy, &envoy::Options::default());
    Ok((bootstrap.yaml, envoy::render_http_filters(&policy).yaml))
}

/// A file of the checkout, and its text after a change.
fn changed(
    checkout: &Path,
    path: &str,
    change: impl FnOnce(&str) -> Option<String>,
) -> Result<(PathBuf, String), Failure> {
    let file = checkout.join(path);
    let text = std::fs::read_to_string(&file).map_err(|error| unwritable(&file, &error))?;
    let changed = change(&text).ok_or_else(|| {
        Failure::Running(format!(
            "`{path}` of the checkout is not as this `portcullis` knows it\n  hint: build `portcullis` from it"
        ))
    })?;
    Ok((file, changed))
}

/// The text with `line` below the last line of each run of lines that fit. `None` if there is none.
fn below_each(text: &str, fits: impl Fn(&str) -> bool, line: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut out = Vec::with_capacity(lines.len() + 2);
    let mut found = false;
    for (index, present) in lines.iter().enumerate() {
        out.push(*present);
        if fits(present) && !lines.get(index + 1).is_some_and(|next| fits(next)) {
            out.push(line);
            found = true;
        }
    }
    found.then(|| out.join("\n") + "\n")
}

/// The text with `line` among the `mod` lines, in the order that rustfmt keeps. `None` if there are none.
fn in_order(text: &str, line: &str) -> Option<String> {
    let mut lines: Vec<&str> = text.lines().collect();
    let first = lines.iter().position(|present| present.starts_with("mod "))?;
    let modules = lines.iter().skip(first).take_while(|present| present.starts_with("mod "));
    let before = modules.take_while(|present| **present < line).count();
    lines.insert(first + before, line);
    Some(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_added_where_their_like_stand() {
        let lists = "a = [\n  \"filters/kit\",\n  \"filters/jwt\",\n  \"host\",\n]\nb = [\n  \"filters/kit\",\n]\n";
        assert_eq!(
            below_each(lists, |line| line.starts_with("  \"filters/"), "  \"filters/new\",").expect("a change"),
            "a = [\n  \"filters/kit\",\n  \"filters/jwt\",\n  \"filters/new\",\n  \"host\",\n]\nb = [\n  \"filters/kit\",\n  \
             \"filters/new\",\n]\n"
        );
        assert_eq!(below_each("a\n", |line| line == "b", "c"), None);
        assert_eq!(
            in_order("//!\n\nmod a;\nmod c;\n\nuse x;\n", "mod b;").expect("a change"),
            "//!\n\nmod a;\nmod b;\nmod c;\n\nuse x;\n"
        );
        assert_eq!(in_order("mod a;\n", "mod b;").expect("a change"), "mod a;\nmod b;\n");
        assert_eq!(in_order("use a;\n", "mod b;"), None);
    }
}
