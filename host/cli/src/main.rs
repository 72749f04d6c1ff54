//! The `portcullis` binary.
//!
//! Exit codes: 0, all is well; 1, something failed while running; 2, the command line or a configuration is wrong, and
//! nothing was started.

mod check;
mod code_cache;
mod doctor;
mod envoy_config;
mod failure;
mod image;
mod logging;
mod manifests;
mod new;
mod operators;
mod package;
mod serve;
mod test;
mod trace;

use std::ffi::OsStr;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::failure::Failure;

/// API security for the edge: Proxy-Wasm filters in a standalone host, and the configuration that makes Envoy enforce the
/// same.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, propagate_version = true, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the policy: listen, filter, forward.
    ///
    /// Logs go to standard error, the access log to standard output. SIGHUP reloads the policy file; if the new one has a
    /// mistake, the old one stays. SIGTERM and SIGINT end after the requests under way; a second one ends at once.
    Serve(serve::Arguments),
    /// Check a policy: its file, all that it names, and whether every filter accepts its configuration.
    Check(check::Arguments),
    /// Run scenario files against filters: on a simulated host, on this program's own `serve`, or on a real Envoy.
    ///
    /// Exits with 0 if at least one scenario ran and none failed, with 1 if one failed, and with 2 if none could be run.
    Test(test::Arguments),
    /// Show a request's way through a filter: every callback, every call of the filter's to the host, and what came of it.
    Trace(trace::Arguments),
    /// Make a filter to begin with.
    #[command(subcommand)]
    New(new::Command),
    /// Make an OCI image of a module, for a registry that Istio or Envoy Gateway pull from. Prints the image's digest.
    ///
    /// The same module gives the same digest, wherever and whenever the image is made.
    Package(package::Arguments),
    /// Print the Envoy configuration that enforces the same policy.
    EnvoyConfig(envoy_config::Arguments),
    /// Print the filters of a policy as Kubernetes resources, for Istio or Envoy Gateway.
    ///
    /// What they do otherwise stands as comments at the top.
    #[command(subcommand)]
    Manifests(manifests::Command),
    /// Write, run and look after operators: API handlers in TypeScript or JavaScript, each in a locked process of its own.
    #[command(subcommand)]
    Operators(operators::Command),
    /// Show what confines operators on this machine, and what each missing layer means.
    ///
    /// Confines one process with the engine that operators would run on, and looks from inside. Exits with 1 if operators
    /// would not start.
    Doctor(doctor::Arguments),
    /// Print the JSON Schema of a file that people write, for editors that complete and check it.
    Schema {
        /// The file.
        #[arg(value_enum)]
        of: SchemaOf,
    },
    /// Print a script that teaches a shell to complete this command's arguments.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Files that have a schema.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum SchemaOf {
    /// A filter's scenarios.
    Scenario,
    /// `portcullis.yaml`.
    Policy,
}

/// The policy file, as an argument or an option.
#[derive(Debug, clap::Args)]
struct PolicyFile {
    /// The policy file. Default: `portcullis.yaml` in the current folder.
    #[arg(value_name = "POLICY", conflicts_with = "config")]
    policy: Option<PathBuf>,
    /// The policy file, as an option.
    #[arg(short, long, value_name = "POLICY")]
    config: Option<PathBuf>,
}

impl PolicyFile {
    fn path(&self) -> PathBuf {
        self.policy.clone().or_else(|| self.config.clone()).unwrap_or_else(|| PathBuf::from("portcullis.yaml"))
    }

    fn load(&self) -> Result<portcullis_config::Policy, Failure> {
        portcullis_config::load(&self.path()).map_err(|mistakes| Failure::Configuration(mistakes.to_string()))
    }
}

fn main() -> ExitCode {
    // This binary starts itself again to confine an operator, and to compile a filter. First thing, while there is one thread.
    let mut words = std::env::args_os().skip(1);
    match words.next().as_deref().and_then(OsStr::to_str) {
        Some(portcullis_operators::jail::SUBCOMMAND) => return portcullis_operators::jail::main(words),
        Some(code_cache::COMPILE) => return portcullis_code::process::main(),
        _ => {}
    }
    let result = match Arguments::parse().command {
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Trace(arguments) => trace::run(&arguments),
        Command::New(command) => new::run(&command),
        Command::Package(arguments) => package::run(&arguments),
        Command::EnvoyConfig(arguments) => envoy_config::run(&arguments),
        Command::Manifests(command) => manifests::run(&command),
        Command::Operators(command) => operators::run(&command),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Schema { of: SchemaOf::Scenario } => print(&format!("{:#}\n", portcullis_harness::json_schema())),
        Command::Schema { of: SchemaOf::Policy } => print(&portcullis_config::reference::json_schema()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "portcullis", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            failure.exit_code()
        }
    }
}

/// Writes to standard output. That its reader has gone (`| head`) is no failure.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::Running(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_policy_file_is_an_argument_or_an_option() {
        let path = |arguments: &[&str]| match Arguments::try_parse_from(arguments).expect("to parse").command {
            Command::Check(arguments) => arguments.policy.path(),
            _ => panic!("another command"),
        };
        assert_eq!(path(&["portcullis", "check"]), PathBuf::from("portcullis.yaml"));
        assert_eq!(path(&["portcullis", "check", "a.yaml"]), PathBuf::from("a.yaml"));
        assert_eq!(path(&["portcullis", "check", "-c", "b.yaml"]), PathBuf::from("b.yaml"));
        assert!(Arguments::try_parse_from(["portcullis", "check", "a.yaml", "-c", "b.yaml"]).is_err());
    }
}
