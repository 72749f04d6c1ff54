//! The configurations in `config/`: the good ones compile, the bad ones give the errors that stand beside them.

use std::fs;
use std::path::{Path, PathBuf};

use portcullis_kit::guard::Guard;
use portcullis_kit::schema::schema_of;

use {{crate}}::{{type}};

fn json_files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let files: Vec<PathBuf> = files.filter(|file| file.extension().is_some_and(|ext| ext == "json")).collect();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
}

#[test]
fn good_configurations_compile() {
    for file in json_files("config") {
        let text = fs::read(&file).expect("a file");
        Guard::<{{type}}>::from_json(&text).unwrap_or_else(|errors| panic!("{}:\n{errors}", file.display()));
    }
}

#[test]
fn bad_configurations_give_the_errors_beside_them_word_for_word() {
    for file in json_files("config/bad") {
        let text = fs::read(&file).expect("a file");
        let Err(errors) = Guard::<{{type}}>::from_json(&text) else { panic!("{} compiles", file.display()) };
        let beside = file.with_extension("txt");
        let expected = fs::read_to_string(&beside).unwrap_or_default();
        assert_eq!(format!("{errors}\n"), expected, "{}", beside.display());
    }
}

/// Editors complete and check configurations by this file. `UPDATE_SCHEMA=1 cargo test` renews it.
#[test]
fn the_schema_for_editors_is_up_to_date() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.schema.json");
    let current = schema_of::<{{type}}>();
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        fs::write(&file, format!("{current:#}\n")).expect("to write the schema");
    }
    let committed = fs::read(&file).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    assert!(committed == Some(current), "{} is stale; renew it with UPDATE_SCHEMA=1", file.display());
}
