//! `portcullis operators check`: everything but a request.

use std::path::PathBuf;

use portcullis_operators::author;

use super::host::{Purpose, compile, refused, settings};
use crate::failure::Failure;
use crate::{PolicyFile, print};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    policy: PolicyFile,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let policy = arguments.policy.load()?;
    let settings = settings(&policy, Purpose::Check);
    let compiled = compile(&policy, &settings)?;
    if compiled.is_empty() {
        return print(&format!("{}: there is no operator to check\n", policy.name));
    }
    let running = |error: &dyn std::fmt::Display| Failure::Running(error.to_string());
    let engine = portcullis_operators::engine::locate(settings.engine).map_err(|error| running(&error))?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| running(&error))?;
    let (checked, errors) =
        runtime.block_on(author::check(compiled, settings, engine)).map_err(|error| running(&error))?;
    let count =
        |files: &[PathBuf]| if files.len() == 1 { "1 file".to_owned() } else { format!("{} files", files.len()) };
    for one in &checked {
        print(&format!("{}: ok ({}, {} bytes)\n", one.operator, count(&one.files), one.code_bytes))?;
    }
    if errors.is_empty() { Ok(()) } else { Err(refused(&policy.name, &errors).into()) }
}
