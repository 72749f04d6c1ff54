//! The JSON Schema and the reference page in `docs/` are those of this source.

use std::path::PathBuf;

use portcullis_config::reference::{json_schema, reference_page};

fn check(file: &str, made: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(file);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("the folder can be made");
        std::fs::write(&path, made).expect("the file can be written");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == made,
        "docs/{file} is stale; renew it with `UPDATE=1 cargo test -p portcullis-config --test reference`"
    );
}

#[test]
fn the_json_schema_is_fresh() {
    check("portcullis.schema.json", &json_schema());
}

#[test]
fn the_reference_page_is_fresh() {
    check("reference/portcullis-yaml.md", &reference_page());
}
