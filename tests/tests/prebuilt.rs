//! The modules of guests in Go, C++ and AssemblyScript are those of the sources beside them, as `cargo xtask build-guests` left both.

use std::collections::BTreeMap;
use std::path::Path;

use portcullis_tests::places;
use sha2::{Digest as _, Sha256};

#[test]
fn sources_and_modules_are_those_that_were_built_together() {
    let folder = places::workspace().join("tests/guests");
    let list = std::fs::read_to_string(folder.join("prebuilt.sha256")).expect("the list of checksums");
    let listed: BTreeMap<String, String> = list
        .lines()
        .map(|line| line.split_once("  ").unwrap_or_else(|| panic!("not a line of `sha256sum`: {line}")))
        .map(|(sum, file)| (file.to_owned(), sum.to_owned()))
        .collect();
    let mut present = BTreeMap::new();
    for guest in ["go", "cpp", "assemblyscript"] {
        for entry in std::fs::read_dir(folder.join(guest)).expect("a guest's folder") {
            let file = entry.expect("a file").path();
            if file.is_file() {
                let name = file.strip_prefix(&folder).expect("a file below the folder").display().to_string();
                present.insert(name, sum_of(&file));
            }
        }
    }
    assert_eq!(
        present, listed,
        "sources or modules have changed: run `cargo xtask build-guests` and commit what it makes"
    );
}

fn sum_of(file: &Path) -> String {
    let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
