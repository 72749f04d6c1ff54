//! `cargo xtask test`: all that CI checks, in order, each step announced, its output shown, and a summary at the end.

use std::io::Write as _;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::process::{self, Failure, run_shown, run_watched};
use crate::progress::{Progress, seconds};
use crate::runner::{self, Runner};
use crate::setup::{self, Machine, Part};
use crate::wasm_std::WasmStd;
use crate::workspace::{WASM_PROFILE, WASM_TARGET, Workspace};
use crate::{filters, host, programs};

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Setup,
    Fmt,
    Clippy,
    ClippyWasm,
    Doc,
    Filters,
    Build,
    Test,
}

impl Step {
    const ALL: [Self; 8] =
        [Self::Setup, Self::Fmt, Self::Clippy, Self::ClippyWasm, Self::Doc, Self::Filters, Self::Build, Self::Test];

    /// Names as given to `--only`.
    pub(crate) const NAMES: [(&'static str, Self); 7] = [
        ("fmt", Self::Fmt),
        ("clippy", Self::Clippy),
        ("clippy-wasm", Self::ClippyWasm),
        ("doc", Self::Doc),
        ("filters", Self::Filters),
        ("build", Self::Build),
        ("test", Self::Test),
    ];

    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, step)| *step == self).map_or("set-up", |(name, _)| name)
    }

    /// Steps without whose success this one has nothing to say.
    fn needs(self) -> &'static [Self] {
        match self {
            Self::ClippyWasm | Self::Filters => &[Self::Setup],
            Self::Test => &[Self::Setup, Self::Filters, Self::Build],
            Self::Setup | Self::Fmt | Self::Clippy | Self::Doc | Self::Build => &[],
        }
    }
}

/// What to check.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Steps asked for; all if empty. What they need comes along.
    pub(crate) only: Vec<Step>,
    /// Stop at the first step that fails.
    pub(crate) fail_fast: bool,
    /// Arguments for `cargo test`; none means everything.
    pub(crate) test_arguments: Vec<String>,
}

impl Plan {
    fn steps(&self) -> Vec<Step> {
        let asked = |step: Step| self.only.is_empty() || self.only.contains(&step);
        let needed = |step: Step| Step::ALL.into_iter().any(|later| asked(later) && later.needs().contains(&step));
        let set_up = |step: Step| step != Step::Setup || needed(step);
        Step::ALL.into_iter().filter(|step| (asked(*step) && set_up(*step)) || needed(*step)).collect()
    }
}

/// How many tests ran and how they ended, added up over all test binaries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
}

impl Tally {
    /// Reads one line of what libtest prints.
    fn read(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            for (count, kind) in counts.split([';', '.']).filter_map(|part| part.trim().split_once(' ')) {
                let Ok(count) = count.parse::<u64>() else { continue };
                match kind {
                    "passed" => self.passed += count,
                    "failed" => self.failed += count,
                    "ignored" => self.ignored += count,
                    _ => {}
                }
            }
        } else if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            // Some harnesses pad names to one width.
            self.failures.push(name.trim_end().to_owned());
        }
    }

    fn ran(&self) -> u64 {
        self.passed + self.failed
    }
}

/// How a step ended.
#[derive(Debug, PartialEq, Eq)]
enum Ending {
    Passed,
    Failed(String),
    /// Not tried, because of a step before it.
    Left(Step),
}

#[derive(Debug)]
struct Report {
    step: Step,
    ending: Ending,
    took: Duration,
}

/// Checks, and tells.
pub(crate) fn run(workspace: &Workspace, plan: &Plan, progress: Progress) -> ExitCode {
    let mut checks = Checks { workspace, plan, progress, machine: Machine::default(), tally: Tally::default() };
    let mut reports: Vec<Report> = Vec::new();
    for step in plan.steps() {
        let failed =
            |need: &&Step| reports.iter().any(|report| report.step == **need && report.ending != Ending::Passed);
        let started = Instant::now();
        let ending = match step.needs().iter().find(failed) {
            Some(need) => Ending::Left(*need),
            None => match checks.run(step) {
                Ok(()) => Ending::Passed,
                Err(error) => {
                    eprintln!("\nerror: {error:#}");
                    Ending::Failed(first_line(&format!("{error:#}")))
                }
            },
        };
        let stop = plan.fail_fast && ending != Ending::Passed;
        reports.push(Report { step, ending, took: started.elapsed() });
        if stop {
            break;
        }
    }
    // A closed pipe is not a reason to fail: the exit code says it all.
    let _ =
        std::io::stdout().lock().write_all(summary(&reports, &checks.tally, checks.machine.runner.as_ref()).as_bytes());
    let all_passed = reports.iter().all(|report| report.ending == Ending::Passed);
    if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Checks<'a> {
    workspace: &'a Workspace,
    plan: &'a Plan,
    progress: Progress,
    machine: Machine,
    tally: Tally,
}

impl Checks<'_> {
    fn run(&mut self, step: Step) -> anyhow::Result<()> {
        match step {
            Step::Setup => {
                let parts = if self.plan.steps().contains(&Step::Test) { &Part::NEEDED[..] } else { &[Part::Wasm] };
                self.machine = setup::run(self.workspace, parts, self.progress)?;
                if self.plan.steps().contains(&Step::Test) {
                    programs::ensure(&programs::FOR_TESTS, self.progress)?;
                }
                Ok(())
            }
            Step::Fmt => {
                self.cargo("fmt", &["fmt", "--all", "--check"])?;
                Ok(run_shown(runner::fmt(self.workspace).arg("--check"))?)
            }
            Step::Clippy => {
                self.cargo("clippy", &["clippy", "--all-targets", "--", "-D", "warnings"])?;
                self.runner("clippy", &["--all-targets", "--", "-D", "warnings"])
            }
            Step::ClippyWasm => self.clippy_wasm(),
            Step::Doc => self.doc(),
            Step::Filters => filters::build(self.workspace, self.wasm_std()?, &[], WASM_PROFILE, self.progress),
            Step::Build => Ok(host::build(self.workspace, self.progress)?),
            Step::Test => self.test(),
        }
    }

    /// The same for the operators' engine, which is a workspace of its own; not where V8 cannot be had, as the set-up says.
    fn runner(&self, subcommand: &str, arguments: &[&str]) -> anyhow::Result<()> {
        match runner::command(self.workspace, subcommand) {
            Some(mut cargo) => Ok(run_shown(cargo.args(arguments))?),
            None => Ok(()),
        }
    }

    fn cargo(&self, title: &str, arguments: &[&str]) -> anyhow::Result<()> {
        self.progress.step(title);
        Ok(run_shown(self.command().args(arguments))?)
    }

    /// The adapter to Proxy-Wasm compiles for the filters' target only, so native lints never see it.
    fn clippy_wasm(&self) -> anyhow::Result<()> {
        self.progress.step("clippy-wasm");
        let mut cargo = self.command();
        cargo.args(["clippy", "--target", WASM_TARGET]);
        for package in &self.workspace.guest_packages {
            cargo.args(["--package", package]);
        }
        cargo.args(["--", "-D", "warnings"]);
        self.wasm_std()?.apply(&mut cargo);
        Ok(run_shown(&mut cargo)?)
    }

    fn wasm_std(&self) -> anyhow::Result<&WasmStd> {
        self.machine.wasm_std.as_ref().context("the set-up left out the WebAssembly target")
    }

    fn doc(&self) -> anyhow::Result<()> {
        self.progress.step("doc");
        let mut cargo = self.command();
        cargo.args(["doc", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
        run_shown(&mut cargo)?;
        match runner::command(self.workspace, "doc") {
            Some(mut cargo) => {
                Ok(run_shown(cargo.args(["--no-deps", "--document-private-items"]).env("RUSTDOCFLAGS", "-D warnings"))?)
            }
            None => Ok(()),
        }
    }

    fn test(&mut self) -> anyhow::Result<()> {
        self.progress.step("test");
        let of_runner = self.plan.test_arguments.iter().any(|argument| argument == runner::NAME);
        let mut commands = Vec::new();
        if !of_runner {
            let mut cargo = self.command();
            cargo.arg("test").args(self.test_arguments());
            host::tell_places(&mut cargo, self.workspace, &self.machine);
            commands.push(cargo);
        }
        if of_runner || self.plan.test_arguments.is_empty() {
            commands.extend(runner::command(self.workspace, "test").map(|mut cargo| {
                cargo.args(self.test_arguments());
                cargo
            }));
        }
        let outcomes: Vec<Result<(), Failure>> = commands.iter_mut().map(|cargo| self.watch(cargo)).collect();
        for outcome in outcomes {
            outcome?;
        }
        anyhow::ensure!(self.tally.ran() > 0, "no test ran");
        Ok(())
    }

    fn test_arguments(&self) -> Vec<&str> {
        let mut arguments = Vec::new();
        if !self.plan.fail_fast {
            arguments.push("--no-fail-fast");
        }
        arguments.extend(self.plan.test_arguments.iter().map(String::as_str));
        if let Some(Runner::Without(_)) = self.machine.runner {
            if !arguments.contains(&"--") {
                arguments.push("--");
            }
            // The summary says so.
            arguments.extend(["--skip", TESTS_ON_RUNNER]);
        }
        arguments
    }

    fn watch(&mut self, cargo: &mut Command) -> Result<(), Failure> {
        let tally = &mut self.tally;
        run_watched(cargo, |line| {
            tally.read(String::from_utf8_lossy(line).trim_end());
            // Whoever reads our output may have gone; the tests still run to their end.
            let _ = std::io::stdout().write_all(line);
        })
    }

    fn command(&self) -> Command {
        let mut cargo = process::cargo();
        cargo.current_dir(&self.workspace.root);
        cargo
    }
}

/// Where tests live that need the operators' engine on deno_core.
const TESTS_ON_RUNNER: &str = "on_runner::";

fn summary(reports: &[Report], tally: &Tally, runner: Option<&Runner>) -> String {
    let mut text = String::from("\n== summary\n");
    for report in reports {
        let (word, why) = match &report.ending {
            Ending::Passed => ("ok", String::new()),
            Ending::Failed(why) => ("FAILED", why.clone()),
            Ending::Left(need) => ("not run", format!("because `{}` failed", need.name())),
        };
        let line = format!("  {:<11} {word:<8} {:>10}  {why}", report.step.name(), seconds(report.took));
        text.push_str(line.trim_end());
        text.push('\n');
    }
    for name in &tally.failures {
        text.push_str(&format!("  failed: {name}\n"));
    }
    if tally.ignored > 0 {
        text.push_str(&format!("  {} ignored\n", tally.ignored));
    }
    if let Some(Runner::Without(why)) = runner {
        text.push_str(&format!("  operators were tested on Deno only, without the runner: {why}\n"));
    }
    if reports.iter().any(|report| report.step == Step::Test) {
        text.push_str(&format!("{} passed, {} failed\n", tally.passed, tally.failed));
    }
    text
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up_over_test_binaries() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test policy::tests::accepts ... ok",
            "test policy::tests::rejects ... FAILED",
            "test envoy::jwt-auth::no token      ... FAILED",
            "test result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.03s",
            "test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 1.20s",
            "a test result: ok. 7 passed; said by a test itself",
        ] {
            tally.read(line);
        }
        let failures = ["policy::tests::rejects", "envoy::jwt-auth::no token"].map(str::to_owned).to_vec();
        assert_eq!(tally, Tally { passed: 41, failed: 2, ignored: 1, failures });
    }

    #[test]
    fn a_step_brings_what_it_needs_and_no_more() {
        let steps = |only: &[Step]| Plan { only: only.to_vec(), ..Plan::default() }.steps();
        assert_eq!(steps(&[]), Step::ALL);
        assert_eq!(steps(&[Step::Fmt]), [Step::Fmt]);
        assert_eq!(steps(&[Step::Filters]), [Step::Setup, Step::Filters]);
        assert_eq!(steps(&[Step::Test]), [Step::Setup, Step::Filters, Step::Build, Step::Test]);
    }

    #[test]
    fn summary_names_failed_steps_and_tests_and_ends_with_the_count() {
        let took = Duration::from_millis(1_500);
        let reports = [
            Report { step: Step::Setup, ending: Ending::Passed, took },
            Report { step: Step::Clippy, ending: Ending::Failed("`cargo clippy`: exit status: 101".to_owned()), took },
            Report { step: Step::Test, ending: Ending::Left(Step::Build), took: Duration::ZERO },
        ];
        let tally = Tally { passed: 2, failed: 1, ignored: 0, failures: vec!["a::b".to_owned()] };
        let expected = "
== summary
  set-up      ok            1.5 s
  clippy      FAILED        1.5 s  `cargo clippy`: exit status: 101
  test        not run       0.0 s  because `build` failed
  failed: a::b
2 passed, 1 failed
";
        assert_eq!(summary(&reports, &tally, Some(&Runner::At("/runner".into()))), expected);
        let without = summary(&reports, &tally, Some(&Runner::Without("no V8".to_owned())));
        assert!(without.contains("  operators were tested on Deno only, without the runner: no V8\n"), "{without}");
    }
}
