//! Operators in the binary: the adapter that lets the proxy route to them, and the commands of `portcullis operators`.

mod admin;
mod check;
mod dev;
mod host;
mod logs;
mod new;
mod run;
mod status;

use std::path::{Path, PathBuf};

use portcullis_config::Policy;
use portcullis_operators::control;

pub(crate) use host::{Host, Purpose, settings};

use crate::failure::Failure;

/// `portcullis operators ...`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Write a first operator: a module, its types, and a policy if there is none yet.
    New(new::Arguments),
    /// Serve while you edit: changes are loaded at once, stack traces are shown, also to clients.
    ///
    /// Serves a policy as `portcullis serve` does, filters and routes included; or one entry module by itself, at every
    /// path. What operators print, what they are refused and what they throw is shown with the lines of their sources. A
    /// version that does not load leaves the last good one running.
    ///
    /// Not for production: stack traces go to clients.
    Dev(dev::Arguments),
    /// Bundle every operator and load it in a confined process, without serving.
    Check(check::Arguments),
    /// Show what operators of a running host printed.
    ///
    /// Asks the hosts of this user that run on this machine (`serve`, `operators run` or `operators dev`) over a socket in
    /// their run folder.
    Logs(logs::Arguments),
    /// Show what runs: operators, their processes, requests, memory.
    Status(status::Arguments),
    /// Serve each operator on a Unix socket, for Envoy.
    ///
    /// `portcullis envoy-config` renders the clusters that lead to these sockets. SIGHUP reloads the policy; SIGTERM and
    /// SIGINT end after the requests under way. Filters do not run here: they run in Envoy.
    Run(run::Arguments),
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::New(arguments) => new::run(arguments),
        Command::Dev(arguments) => dev::run(arguments),
        Command::Check(arguments) => check::run(arguments),
        Command::Logs(arguments) => logs::run(arguments),
        Command::Status(arguments) => status::run(arguments),
        Command::Run(arguments) => run::run(arguments),
    }
}

/// Which hosts to ask.
#[derive(Debug, clap::Args)]
struct Hosts {
    /// The policy of the host to ask, if its `operator_host.run_folder` is not the system's temporary folder.
    #[arg(short, long, value_name = "POLICY")]
    config: Option<PathBuf>,
}

impl Hosts {
    /// The sockets of the hosts that run.
    fn find(&self) -> Result<Vec<PathBuf>, Failure> {
        let run_folder = match &self.config {
            None => std::env::temp_dir(),
            Some(path) => settings(&load(path)?, Purpose::Serve).run_folder,
        };
        let unreadable = |error: std::io::Error| {
            Failure::Running(format!("cannot look for hosts in `{}`: {error}", run_folder.display()))
        };
        let found = control::hosts(&run_folder).map_err(unreadable)?;
        if found.is_empty() {
            return Err(Failure::Running(format!(
                "no host of this user runs operators in `{}`\n  hint: name its policy with `--config` if that has another \
                 `operator_host.run_folder`, and ask as the user that started it",
                run_folder.display()
            )));
        }
        Ok(found)
    }
}

fn load(path: &Path) -> Result<Policy, Failure> {
    portcullis_config::load(path).map_err(|mistakes| Failure::Configuration(mistakes.to_string()))
}
