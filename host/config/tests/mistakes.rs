//! Every mistake that a policy file can have, word for word.
//!
//! `tests/mistakes/*.txt` hold them: a line `## what it is about`, a policy, a line `----`, and what is said about it.
//! After a change of words, `UPDATE=1 cargo test -p portcullis-config --test mistakes` writes the new ones; read the
//! difference before you commit it.

use std::fmt::Write as _;
use std::path::PathBuf;

use portcullis_config::{InMemory, compile, load};

/// The files that the policies name.
fn files() -> InMemory {
    InMemory::default()
        .with("good.wasm", *b"\0asm\x01\0\0\0")
        .with("component.wasm", *b"\0asm\x0d\0\x01\0")
        .with("large.wasm", vec![0; 2000])
        .with("good.json", "{}")
        .with("bad.json", "{\n  \"issuer\": \"x\",\n}\n")
        .with("good.pem", "-----BEGIN CERTIFICATE-----\n")
        .with("good.key", "-----BEGIN PRIVATE KEY-----\n")
        .with("encrypted.key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
        .with("good.ts", "export default {}")
}

fn check(file: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/mistakes").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let files = files();
    let mut renewed = String::new();
    let mut wrong = String::new();
    let mut cases = 0;
    for case in text.split("## ").skip(1) {
        let (name, rest) = case.split_once('\n').expect("a name");
        let (policy, expected) = rest.split_once("----\n").expect("a line `----` after the policy");
        let said = match compile("portcullis.yaml", policy, &files) {
            Ok(_) => "nothing is wrong".to_owned(),
            Err(mistakes) => mistakes.to_string(),
        };
        write!(renewed, "## {name}\n{policy}----\n{said}\n\n").expect("memory");
        if said != expected.trim_end() {
            write!(wrong, "\n## {name}\n{policy}---- expected\n{}\n---- said\n{said}\n", expected.trim_end())
                .expect("memory");
        }
        cases += 1;
    }
    assert!(cases > 0, "{file} holds no cases");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, renewed).expect("the file can be written");
    } else {
        assert!(wrong.is_empty(), "{file}: to accept the new words, set UPDATE=1\n{wrong}");
    }
}

macro_rules! files {
    ($($test:ident: $file:literal)*) => {$(
        #[test]
        fn $test() {
            check($file);
        }
    )*};
}

files! {
    says_what_is_no_yaml: "yaml.txt"
    says_what_has_the_wrong_shape: "shape.txt"
    says_which_names_are_wrong: "names.txt"
    says_what_is_wrong_with_listeners: "listeners.txt"
    says_what_is_wrong_with_tcp: "tcp.txt"
    says_what_is_wrong_with_filters: "filters.txt"
    says_what_is_wrong_with_upstreams: "upstreams.txt"
    says_what_is_wrong_with_operators: "operators.txt"
    says_what_is_wrong_with_routes: "routes.txt"
    says_everything_at_once: "several.txt"
}

#[test]
fn more_elements_than_are_supported_are_refused() {
    let head = "version: 1\nlisteners: [{ name: a, address: \"127.0.0.1:0\" }]\n";
    let route = "routes: [{ name: all, respond: { status: 200 } }]\n";
    let list = |section: &str, count: usize, element: &dyn Fn(usize) -> String| {
        let elements: Vec<String> = (0..count).map(element).collect();
        format!("{section}: [{}]\n", elements.join(", "))
    };
    let listener = |index| format!("{{ name: l{index}, address: \"127.0.0.1:{}\" }}", 2000 + index);
    let filter = |index| format!("{{ name: f{index}, wasm: good.wasm }}");
    let routed =
        |index| format!("{{ name: r{index}, match: {{ path: {{ exact: /{index} }} }}, respond: {{ status: 200 }} }}");
    let mapping = |section: &str, count: usize, element: &str| {
        let elements: Vec<String> = (0..count).map(|index| format!("e{index}: {element}")).collect();
        format!("{section}: {{ {} }}\n", elements.join(", "))
    };
    type PolicyWith<'a> = &'a dyn Fn(usize) -> String;
    let sections: [(&str, usize, PolicyWith<'_>); 5] = [
        ("listeners", 64, &|count| format!("version: 1\n{route}{}", list("listeners", count, &listener))),
        ("filters", 64, &|count| format!("{head}{route}{}", list("filters", count, &filter))),
        ("upstreams", 1000, &|count| {
            format!("{head}{route}{}", mapping("upstreams", count, "{ endpoints: [\"127.0.0.1:1\"] }"))
        }),
        ("operators", 1000, &|count| format!("{head}{route}{}", mapping("operators", count, "{ entry: good.ts }"))),
        ("routes", 2000, &|count| format!("{head}{}", list("routes", count, &routed))),
    ];
    let files = files();
    for (section, most, policy) in sections {
        let refused =
            |count| compile("portcullis.yaml", &policy(count), &files).err().map(|mistakes| mistakes.to_string());
        let about_the_number = |said: &Option<String>| said.as_ref().is_some_and(|said| said.contains("are supported"));
        assert!(!about_the_number(&refused(most)), "{section}: {:?}", refused(most));
        let said = refused(most + 1).unwrap_or_default();
        let expected = format!("error: there are {}, more than the {most} that are supported", most + 1);
        assert!(said.starts_with(&expected) && said.contains("= hint: split the policy"), "{section}: {said}");
    }
}

#[test]
fn files_that_are_too_large_are_refused() {
    let mebibyte = 1 << 20;
    let files = files()
        .with("large.json", vec![b' '; 16 * mebibyte + 1])
        .with("large.pem", vec![b' '; mebibyte + 1])
        .with("large.ts", vec![b' '; 16 * mebibyte + 1]);
    let body = "x".repeat(64 * 1024 + 1);
    for (policy, said) in [
        (
            "filters: [{ name: a, wasm: good.wasm, configuration_file: large.json }]".to_owned(),
            "`large.json` is larger than 16MiB",
        ),
        (
            "upstreams: { a: { endpoints: [\"127.0.0.1:1\"], tls: { ca: large.pem } } }".to_owned(),
            "`large.pem` is larger than 1MiB",
        ),
        ("operators: { a: { entry: large.ts } }".to_owned(), "`large.ts` is larger than 16MiB"),
        (
            format!("routes: [{{ name: a, respond: {{ status: 200, body: {body} }} }}]"),
            "the body has 65537 bytes, more than 64 KiB",
        ),
    ] {
        let mistakes = compile("portcullis.yaml", &format!("version: 1\n{policy}\n"), &files).expect_err("too large");
        assert!(mistakes.to_string().contains(said), "{said}: {mistakes}");
    }
}

#[test]
fn says_that_the_policy_file_is_missing() {
    let mistakes = load("/nowhere/portcullis.yaml".as_ref()).expect_err("there is no such file").to_string();
    assert_eq!(
        mistakes,
        "error: there is no such file\n --> /nowhere/portcullis.yaml\n  = hint: name the policy file, e.g. `portcullis.yaml`"
    );
}

#[test]
fn says_that_the_policy_file_is_not_utf8() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("portcullis.yaml");
    std::fs::write(&path, b"version: 1\npool: \xff\n").expect("a file");
    let mistakes = load(&path).expect_err("it is not UTF-8").to_string();
    assert_eq!(
        mistakes,
        format!("error: line 2 is not UTF-8\n --> {}\n  = hint: save the file as UTF-8", path.display())
    );
}

#[test]
fn says_that_the_policy_file_is_a_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let mistakes = load(folder.path()).expect_err("it is a folder").to_string();
    assert_eq!(
        mistakes,
        format!(
            "error: cannot read the file: it is not a regular file\n --> {}\n  = hint: check its permissions and that it \
             is a file",
            folder.path().display()
        )
    );
}

#[test]
fn says_that_the_policy_file_is_too_large() {
    let text = format!("version: 1\n# {}\n", "x".repeat(1024 * 1024));
    let mistakes = compile("portcullis.yaml", &text, &files()).expect_err("it is too large").to_string();
    assert!(
        mistakes.starts_with("error: the file has 1048590 bytes, more than the 1048576 that are read\n"),
        "{mistakes}"
    );
}

#[test]
fn never_shows_a_line_of_a_filters_configuration_file() {
    let files = files().with("secret.json", "{ \"secret\": \"hunter2\" oops }");
    let text = "version: 1\nlisteners: [{ name: a, address: \"127.0.0.1:0\" }]\nfilters: [{ name: jwt, wasm: good.wasm, \
                configuration_file: secret.json }]\nroutes: [{ name: all, respond: { status: 200 } }]\n";
    let mistakes = compile("portcullis.yaml", text, &files).expect_err("the configuration is not JSON").to_string();
    assert!(!mistakes.contains("hunter2"), "{mistakes}");
}

#[test]
fn shows_no_control_characters() {
    let text = "version: 1\npool: \"\\e[31mred\"\n\"\\e[2J\": 1\nlisteners: [{ name: a, address: \"127.0.0.1:0\" }]\n\
                routes: [{ name: all, upstream: \"\\a\" }]\n";
    let mistakes = compile("portcullis.yaml", text, &files()).expect_err("there are mistakes").to_string();
    assert!(mistakes.contains("unknown key"), "{mistakes}");
    assert!(!mistakes.contains(|c: char| c.is_control() && c != '\n'), "{mistakes:?}");
}
