//! `portcullis test`: runs scenario files, and writes what comes of them into the files where that is asked for.

mod watch;

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use portcullis_e2e::{Programs, Sockets};
use portcullis_harness::{
    HostKind, Outcome, Ran, Report, RunOptions, Runner, Scenario, Secrets, Simulated, Told, UpdateError, Verdict,
    files_of, run as run_all, updated,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::failure::Failure;
use crate::print;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Scenario files, or folders that hold a `scenarios` folder somewhere below. Default: the current folder.
    #[arg(value_name = "PATH", default_value = ".")]
    paths: Vec<PathBuf>,
    /// The module to test, instead of the one that each scenario belongs to.
    #[arg(long, value_name = "WASM")]
    filter: Option<PathBuf>,
    /// Only scenarios whose name or file contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Where to run them; can be given several times.
    #[arg(long, value_enum, value_name = "HOST", default_value = "harness")]
    host: Vec<On>,
    /// How to tell what came of them.
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "human")]
    format: Format,
    /// Write a JUnit report to this file as well.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write what comes of scenarios into their files, where it differs from what they expect or they expect nothing yet.
    #[arg(long)]
    update: bool,
    /// Run again whenever a scenario, a file that it names, or a module changes. Ends with Ctrl-C.
    #[arg(long, conflicts_with_all = ["update", "junit"])]
    watch: bool,
    /// Show credentials in what is told of failures.
    #[arg(long)]
    show_secrets: bool,
}

/// Where scenarios run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum On {
    /// A simulated host, without sockets.
    Harness,
    /// This program's own `serve`, on a port of its choice.
    Host,
    /// A real Envoy: the one that `PORTCULLIS_ENVOY` names, that `cargo xtask setup` has brought, or that is on the PATH.
    Envoy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Lines, for people.
    Human,
    /// JUnit's XML, for CI systems.
    Junit,
    /// JSON, for programs.
    Json,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    if arguments.watch {
        return watch::run(|| paths_to_watch(arguments), || run_once(arguments).map(drop));
    }
    let report = run_once(arguments)?;
    if let Some(file) = &arguments.junit {
        std::fs::write(file, report.junit())
            .map_err(|error| Failure::Running(format!("cannot write `{}`: {error}", file.display())))?;
    }
    match (report.is_success(), report.errors.is_empty() && !report.outcomes.is_empty()) {
        (true, _) => Ok(()),
        (false, true) => Err(Failure::Reported),
        (false, false) => Err(Failure::ReportedConfiguration),
    }
}

fn options(arguments: &Arguments) -> RunOptions {
    RunOptions { wasm: arguments.filter.clone(), only: arguments.only.clone(), unfinished: arguments.update }
}

fn run_once(arguments: &Arguments) -> Result<Report, Failure> {
    let mut report = Report::default();
    for host in &arguments.host {
        let mut runner = runner(*host, arguments.show_secrets)?;
        let mut failed = Ok(());
        let mut told = |told: &Told<'_>| {
            let told = match told.ran.filter(|_| arguments.update) {
                Some((scenario, ran)) => update(scenario, ran, told.outcome, arguments.format),
                None if arguments.format == Format::Human => print(&told.outcome.to_string()),
                None => Ok(()),
            };
            if failed.is_ok() {
                failed = told;
            }
        };
        let mut came = run_all(&arguments.paths, &options(arguments), runner.as_mut(), &mut told);
        failed?;
        if arguments.update {
            // What was written is run once more: an outcome that changes by itself cannot be expected.
            let again = RunOptions { unfinished: false, ..options(arguments) };
            came = run_all(&arguments.paths, &again, runner.as_mut(), &mut |_| {});
            if arguments.format == Format::Human {
                for outcome in came.outcomes.iter().filter(|outcome| matches!(outcome.verdict, Verdict::Failed(_))) {
                    print(&outcome.to_string())?;
                }
            }
        }
        report.extend(came);
    }
    match arguments.format {
        Format::Human => print(&report.summary())?,
        Format::Junit => print(&report.junit())?,
        Format::Json => print(&format!("{:#}\n", report.json()))?,
    }
    Ok(report)
}

fn runner(host: On, show_secrets: bool) -> Result<Box<dyn Runner>, Failure> {
    let secrets = if show_secrets { Secrets::Shown } else { Secrets::Masked };
    let kind = match host {
        On::Harness => return Ok(Box::new(Simulated { secrets })),
        On::Host => HostKind::Standalone,
        On::Envoy => HostKind::Envoy,
    };
    let ourselves = std::env::current_exe()
        .map_err(|error| Failure::Running(format!("this program's own file cannot be found: {error}")))?;
    end_children_on_signals()?;
    let programs = Programs::with_portcullis(ourselves);
    if kind == HostKind::Envoy {
        programs.envoy().map_err(Failure::Configuration)?;
    }
    Ok(Box::new(Sockets::new(kind, programs)))
}

/// Servers under test end with this program, also when a signal ends it.
fn end_children_on_signals() -> Result<(), Failure> {
    let cannot = |error: std::io::Error| Failure::Running(format!("cannot receive signals: {error}"));
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(cannot)?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                portcullis_e2e::process::kill_all();
                // What a shell says of a program that a signal has ended.
                std::process::exit(128 + signal);
            }
        })
        .map_err(cannot)?;
    Ok(())
}

/// Writes what came of a scenario into its file, if that differs.
fn update(scenario: &Scenario, ran: &Ran, outcome: &Outcome, format: Format) -> Result<(), Failure> {
    let cannot = |problem: String| Failure::Running(format!("{}: {problem}", outcome.file.display()));
    let text = std::fs::read_to_string(&outcome.file).map_err(|error| cannot(error.to_string()))?;
    let said = match updated(scenario, &text, ran) {
        Ok(None) => format!("ok       {}\n", scenario.name),
        Ok(Some(new)) => {
            write_whole(&outcome.file, &new).map_err(|error| cannot(error.to_string()))?;
            format!("updated  {}\n        {}\n", scenario.name, outcome.file.display())
        }
        Err(error @ UpdateError::Configuration(_)) => format!("FAILED   {}\n        {error}\n", scenario.name),
        Err(error) => return Err(cannot(error.to_string())),
    };
    if format == Format::Human { print(&said) } else { Ok(()) }
}

/// Renamed into place, so that no editor and no watcher meets half a file.
fn write_whole(file: &Path, text: &str) -> std::io::Result<()> {
    let mut unfinished = file.as_os_str().to_owned();
    unfinished.push(format!(".{}", std::process::id()));
    std::fs::write(&unfinished, text)?;
    std::fs::rename(&unfinished, file)
}

/// What a run depends on, and the folders in which new scenarios would appear.
fn paths_to_watch(arguments: &Arguments) -> Vec<PathBuf> {
    let mut paths = files_of(&arguments.paths, &options(arguments));
    paths.extend(arguments.paths.iter().filter(|path| path.is_dir()).cloned());
    paths
}
