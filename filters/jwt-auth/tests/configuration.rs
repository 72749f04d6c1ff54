//! The configurations in `config/`: the good ones compile, the bad ones give the errors that stand beside them.

use std::fs;
use std::path::{Path, PathBuf};

use portcullis_jwt_auth::JwtAuth;
use portcullis_kit::guard::Guard;
use portcullis_kit::schema::schema_of;
use proptest::prelude::*;

fn json_files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<PathBuf> = files.filter(|file| file.extension().is_some_and(|ext| ext == "json")).collect();
    files.sort();
    files
}

#[test]
fn good_configurations_compile() {
    let files = json_files("config");
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        let text = fs::read(&file).expect("a file");
        Guard::<JwtAuth>::from_json(&text).unwrap_or_else(|errors| panic!("{}:\n{errors}", file.display()));
    }
}

#[test]
fn bad_configurations_give_the_errors_beside_them_word_for_word() {
    let files = json_files("config/bad");
    assert!(files.len() >= 10, "{files:?}");
    let mut differences = Vec::new();
    for file in files {
        let text = fs::read(&file).expect("a file");
        let Err(errors) = Guard::<JwtAuth>::from_json(&text) else { panic!("{} compiles", file.display()) };
        let beside = file.with_extension("txt");
        let actual = format!("{errors}\n");
        if fs::read_to_string(&beside).unwrap_or_default() != actual {
            differences.push(format!("{}:\n{actual}", beside.display()));
        }
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}

/// Editors complete and check configurations by this file. `UPDATE_SCHEMA=1 cargo test -p portcullis-jwt-auth` renews it.
#[test]
fn the_schema_for_editors_is_up_to_date() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.schema.json");
    let current = schema_of::<JwtAuth>();
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        fs::write(&file, format!("{current:#}\n")).expect("to write the schema");
    }
    // Compared as JSON: the order of keys depends on features that other crates of the workspace ask serde_json for.
    let committed = fs::read(&file).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    assert!(committed == Some(current), "{} is stale; renew it with UPDATE_SCHEMA=1", file.display());
}

proptest! {
    /// A configuration comes from an operator, but also from whatever wrote half a file.
    #[test]
    fn survives_any_configuration(at in any::<prop::sample::Index>(), length in 0usize..40, with in proptest::collection::vec(any::<u8>(), 0..12)) {
        for good in ["one-issuer.json", "two-issuers.json", "shared-secret.json"] {
            let mut text = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(good)).expect("a file");
            let at = at.index(text.len());
            text.splice(at..(at + length).min(text.len()), with.iter().copied());
            if let Err(errors) = Guard::<JwtAuth>::from_json(&text) {
                prop_assert!(errors.to_string().starts_with("jwt-auth: "));
            }
        }
    }
}
