//! `portcullis new`: a filter to begin with, which builds, is tested and runs.

mod member;
mod rust;

use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::print;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make the folder of a filter in Rust, with tests, scenarios and a policy file that runs it.
    ///
    /// The example in it lets requests pass that carry a listed value in a field. Without `--kit` it needs nothing but crates
    /// from crates.io; with it, rules, modes, counters and errors in configurations come from `portcullis-kit`. Below `filters/`
    /// in a checkout of Portcullis the filter becomes a member of the workspace.
    Filter(Filter),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Filter {
    /// What it is called, after what it guards: lower-case letters, digits and `-`.
    name: String,
    /// The folder to make. Default: one of that name in the current folder.
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// A checkout of Portcullis, or the URL of its Git repository, from which to take `portcullis-kit`.
    #[arg(long, value_name = "CHECKOUT|URL")]
    kit: Option<String>,
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    let Command::Filter(arguments) = command;
    let name = Name::parse(&arguments.name)?;
    let folder = arguments.path.clone().unwrap_or_else(|| PathBuf::from(&name.kebab));
    let folder = std::path::absolute(&folder).map_err(|error| unwritable(&folder, &error))?;
    if std::fs::read_dir(&folder).is_ok_and(|mut entries| entries.next().is_some()) || folder.is_file() {
        return Err(Failure::Configuration(format!(
            "`{}` exists already\n  hint: name another folder with `--path`",
            folder.display()
        )));
    }
    let said = match (member::checkout_of(&folder), &arguments.kit) {
        (Some(_), Some(_)) => {
            return Err(Failure::Configuration(
                "--kit: in this folder the filter is a member of the checkout, whose kit it uses\n  hint: leave `--kit` out, or \
                 name a folder elsewhere with `--path`"
                    .to_owned(),
            ));
        }
        (Some(checkout), None) => member::make(&checkout, &folder, &name)?,
        (None, kit) => make_alone(&folder, &name, kit.as_deref())?,
    };
    print(&said)
}

/// A file of a template: its path, and its text with placeholders.
type Template = (&'static str, &'static str);

/// Of a filter on `portcullis-kit`, wherever it lies.
const KIT: &[Template] = &[
    ("src/lib.rs", include_str!("../templates/kit/src/lib.rs")),
    ("src/config.rs", include_str!("../templates/kit/src/config.rs")),
    ("src/policy.rs", include_str!("../templates/kit/src/policy.rs")),
    ("tests/configuration.rs", include_str!("../templates/kit/tests/configuration.rs")),
    ("config.schema.json", include_str!("../templates/kit/config.schema.json")),
    ("config/one-client.json", include_str!("../templates/kit/config/one-client.json")),
    ("config/bad/nothing-allowed.json", include_str!("../templates/kit/config/bad/nothing-allowed.json")),
    ("config/bad/nothing-allowed.txt", include_str!("../templates/kit/config/bad/nothing-allowed.txt")),
    ("scenarios/listed.yaml", include_str!("../templates/kit/scenarios/listed.yaml")),
    ("scenarios/denied.yaml", include_str!("../templates/kit/scenarios/denied.yaml")),
    ("scenarios/refused.yaml", include_str!("../templates/kit/scenarios/refused.yaml")),
];

/// Of a filter on the SDK alone.
const PLAIN: &[Template] = &[
    ("src/lib.rs", include_str!("../templates/plain/src/lib.rs")),
    ("src/policy.rs", include_str!("../templates/plain/src/policy.rs")),
    ("src/adapter.rs", include_str!("../templates/plain/src/adapter.rs")),
    ("config/one-client.json", include_str!("../templates/plain/config/one-client.json")),
    ("config/bad/nothing-allowed.json", include_str!("../templates/plain/config/bad/nothing-allowed.json")),
    ("scenarios/listed.yaml", include_str!("../templates/plain/scenarios/listed.yaml")),
    ("scenarios/denied.yaml", include_str!("../templates/plain/scenarios/denied.yaml")),
    ("scenarios/refused.yaml", include_str!("../templates/plain/scenarios/refused.yaml")),
];

/// What a folder of its own has in either case.
const ALONE: &[Template] = &[
    (".gitignore", include_str!("../templates/shared/gitignore")),
    ("rustfmt.toml", include_str!("../templates/shared/rustfmt.toml")),
    ("portcullis.yaml", include_str!("../templates/shared/portcullis.yaml")),
];

fn make_alone(folder: &Path, name: &Name, kit: Option<&str>) -> Result<String, Failure> {
    let kit = kit.map(Kit::find).transpose()?;
    let (templates, manifest, readme) = if kit.is_some() {
        let manifest = include_str!("../templates/kit/Cargo.toml.alone");
        (KIT, manifest, include_str!("../templates/kit/README.md"))
    } else {
        let manifest = include_str!("../templates/plain/Cargo.toml.alone");
        (PLAIN, manifest, include_str!("../templates/plain/README.md"))
    };
    let mut values = name.values(&name.snake);
    if let Some(kit) = &kit {
        values.push(("kit", kit.dependency("")));
        values.push(("kit_testing", kit.dependency(", features = [\"testing\"]")));
    }
    let toolchain = rust::Toolchain::ask(kit.as_ref().and_then(Kit::checkout));
    let mut files: Vec<(&str, String)> =
        templates.iter().chain(ALONE).map(|(path, text)| (*path, filled(text, &values))).collect();
    files.push(("Cargo.toml", filled(manifest, &values)));
    let readme = readme.to_owned() + include_str!("../templates/shared/README.md");
    files.push(("README.md", filled(&readme, &values)));
    let mut cargo = include_str!("../templates/shared/cargo-config.toml").to_owned();
    cargo.push_str(&toolchain.flags());
    files.push((".cargo/config.toml", cargo));
    for (path, text) in &files {
        write(&folder.join(path), text)?;
    }
    let on = if kit.is_some() { "portcullis-kit" } else { "proxy-wasm" };
    let here = std::env::current_dir().unwrap_or_default();
    let shown = folder.strip_prefix(&here).unwrap_or(folder).display().to_string();
    let mut said = format!("made {shown}/, a filter on {on}\n\nnext:\n");
    if let Some(first) = toolchain.missing() {
        said.push_str(&format!("  {first}\n"));
    }
    said.push_str(&format!(
        "  cd {shown}\n  cargo test          native tests\n  cargo wasm          build the module\n  \
         portcullis test     run scenarios/ on it\n"
    ));
    Ok(said)
}

/// Where `portcullis-kit` comes from.
enum Kit {
    Checkout(PathBuf),
    Repository(String),
}

impl Kit {
    fn find(named: &str) -> Result<Kit, Failure> {
        if named.contains("://") || named.starts_with("git@") {
            return Ok(Kit::Repository(named.to_owned()));
        }
        let hint = "name the folder of a checkout of Portcullis, the one that holds `filters/kit`";
        let checkout = std::fs::canonicalize(named)
            .map_err(|error| Failure::Configuration(format!("--kit: `{named}`: {error}\n  hint: {hint}")))?;
        if !checkout.join("filters/kit/Cargo.toml").is_file() {
            return Err(Failure::Configuration(format!("--kit: `{named}` holds no `filters/kit`\n  hint: {hint}")));
        }
        Ok(Kit::Checkout(checkout))
    }

    fn checkout(&self) -> Option<&Path> {
        match self {
            Kit::Checkout(checkout) => Some(checkout),
            Kit::Repository(_) => None,
        }
    }

    /// The line of a manifest, with `more` keys.
    fn dependency(&self, more: &str) -> String {
        let (key, place) = match self {
            Kit::Checkout(checkout) => ("path", checkout.join("filters/kit").display().to_string()),
            Kit::Repository(url) => ("git", url.clone()),
        };
        // JSON's strings are TOML's basic strings.
        format!("portcullis-kit = {{ {key} = {}{more} }}", serde_json::Value::from(place))
    }
}

/// A filter's name in the spellings that files need.
#[derive(Debug)]
struct Name {
    /// `my-guard`.
    kebab: String,
    /// `my_guard`.
    snake: String,
    /// `MyGuard`.
    camel: String,
}

/// Names that cargo or the compiler would not take, or that the template's own dependencies have.
const TAKEN: &str = "alloc as async await break build const continue core crate deps dyn else enum examples extern false fn for \
    gen if impl in incremental kit let loop match mod move mut portcullis-kit proc-macro proxy-wasm pub ref \
    return schemars self serde serde-json static std struct super test trait true try type unsafe use where \
    while yield";

impl Name {
    fn parse(text: &str) -> Result<Name, Failure> {
        let well_formed = text.len() <= 50
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && !text.ends_with('-')
            && !text.contains("--")
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        let refused = |problem: &str, hint: &str| {
            let shown: String = text.chars().take(60).flat_map(char::escape_debug).collect();
            Failure::Configuration(format!("NAME: `{shown}` {problem}\n  hint: {hint}"))
        };
        if !well_formed {
            let hint = "use 1 to 50 lower-case letters and digits, beginning with a letter, with single `-` between words, as \
                        in `tenant-guard`";
            return Err(refused("is no name for a filter", hint));
        }
        if TAKEN.split(' ').any(|taken| taken == text) {
            return Err(refused("means something else to cargo", "add what it guards, as in `tenant-guard`"));
        }
        let capital = |word: &str| {
            let (first, rest) = word.split_at(1);
            first.to_ascii_uppercase() + rest
        };
        let camel = text.split('-').map(capital).collect();
        Ok(Name { kebab: text.to_owned(), snake: text.replace('-', "_"), camel })
    }

    /// Values of placeholders, for a crate that code calls `library`.
    fn values(&self, library: &str) -> Vec<(&'static str, String)> {
        vec![
            ("name", self.kebab.clone()),
            ("snake", self.snake.clone()),
            ("type", self.camel.clone()),
            ("crate", library.to_owned()),
        ]
    }
}

/// A template with its placeholders, `{{name}}`, replaced.
fn filled(template: &str, values: &[(&str, String)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("{{{{{name}}}}}"), value))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).and_then(|()| std::fs::write(path, text)).map_err(|error| unwritable(path, &error))
}

fn unwritable(path: &Path, error: &std::io::Error) -> Failure {
    let path = path.display();
    Failure::Running(format!("cannot write `{path}`: {error}\n  hint: its folder must be writable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_spelled_as_files_types_and_crates_need_them() {
        let name = Name::parse("tenant-guard2").expect("a name");
        assert_eq!((name.snake.as_str(), name.camel.as_str()), ("tenant_guard2", "TenantGuard2"));
        for bad in ["", "-a", "a-", "a--b", "A", "a_b", "a b", "1a", "../a", "\u{e9}", "serde", "mod", &"a".repeat(51)]
        {
            assert!(matches!(Name::parse(bad), Err(Failure::Configuration(said)) if said.contains("hint:")), "{bad}");
        }
    }

    #[test]
    fn no_template_has_a_placeholder_that_nothing_fills() {
        let name = Name::parse("a-b").expect("a name");
        let values = name.values("a_b");
        for (path, text) in KIT.iter().chain(PLAIN).chain(ALONE) {
            let text = filled(text, &values);
            // Rust code has `}}` of its own.
            let unfilled = text.split("{{").skip(1).any(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
            assert!(!unfilled, "{path}:\n{text}");
        }
    }
}
