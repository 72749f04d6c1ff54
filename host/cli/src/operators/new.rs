//! `portcullis operators new`: a first operator on disk.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use portcullis_operators::author;

use crate::failure::Failure;
use crate::print;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The operator's name: lower-case letters, digits, `-` and `_`.
    name: String,
    /// Make its folder in this one.
    #[arg(long, value_name = "FOLDER", default_value = "operators")]
    folder: PathBuf,
    /// The policy file; written if it does not exist.
    #[arg(short, long, value_name = "POLICY", default_value = "portcullis.yaml")]
    config: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let created = author::create(&arguments.folder, &arguments.name).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => Failure::Configuration(error.to_string()),
        io::ErrorKind::AlreadyExists => {
            Failure::Configuration(format!("{error}\n  hint: choose another name; nothing is overwritten"))
        }
        _ => Failure::Running(error.to_string()),
    })?;
    let mut said = String::new();
    for file in &created.files {
        let _ = writeln!(said, "wrote {}", file.display());
    }
    let policy = &arguments.config;
    if policy.exists() {
        let _ = write!(said, "\nAdd to {}:\n\n{}\n", policy.display(), indented(&created.policy));
    } else {
        let text =
            format!("version: 1\nlisteners:\n  - {{ name: public, address: \"127.0.0.1:8080\" }}\n{}", created.policy);
        std::fs::write(policy, text)
            .map_err(|error| Failure::Running(format!("cannot write `{}`: {error}", policy.display())))?;
        let _ = writeln!(said, "wrote {}\n", policy.display());
    }
    let _ = write!(
        said,
        "Then:\n\n  portcullis operators dev {policy}\n  curl 'http://127.0.0.1:8080/{name}?name=you'\n",
        policy = policy.display(),
        name = arguments.name
    );
    print(&said)
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
