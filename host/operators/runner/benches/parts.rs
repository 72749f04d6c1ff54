//! What each part of an isolate costs: the engine alone, with the web platform, with cryptography, and with all that operators have.
//!
//! `cargo bench --bench parts`, with the arguments that `cargo xtask runner` gives to cargo. This program makes a snapshot of each
//! part and starts itself from it, as V8 either makes snapshots in a process or starts from one.
#![allow(missing_docs, reason = "a program")]
#![allow(dead_code, reason = "the modules are the program's, which uses all of them")]

#[path = "../src/bridge.rs"]
mod bridge;
#[path = "../src/extensions.rs"]
mod extensions;
#[path = "../src/ops.rs"]
mod ops;

use std::borrow::Cow;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use deno_core::snapshot::{CreateSnapshotOptions, create_snapshot};
use deno_core::{Extension, ExtensionFileSource, JsRuntime, RuntimeOptions};

/// Parts by name, how many of the extensions they have, and which scripts are evaluated (all of those before, too).
const PARTS: [(&str, usize, &[&str]); 4] = [
    ("deno_core", 0, &[]),
    ("and deno_webidl, deno_web", 2, &WEB),
    ("and deno_crypto", 3, &["ext:deno_crypto/00_crypto.js"]),
    ("and ours, with deno_fetch's scripts", 4, &[]),
];
/// As in `js/globals.js`.
const WEB: [&str; 15] = [
    "ext:deno_webidl/00_webidl.js",
    "ext:deno_web/05_base64.js",
    "ext:deno_web/14_compression.js",
    "ext:deno_web/01_console.js",
    "ext:deno_web/08_text_encoding.js",
    "ext:deno_web/02_event.js",
    "ext:deno_web/01_dom_exception.js",
    "ext:deno_web/09_file.js",
    "ext:deno_web/13_message_port.js",
    "ext:deno_web/15_performance.js",
    "ext:deno_web/03_abort_signal.js",
    "ext:deno_web/06_streams.js",
    "ext:deno_web/02_timers.js",
    "ext:deno_web/00_url.js",
    "ext:deno_web/01_urlpattern.js",
];
/// The program's own, which the build script made.
static WHOLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/operator.snapshot"));
const ROUNDS: usize = 31;
const AT_ONCE: usize = 10;

/// The extensions of a part and, for its snapshot, their scripts.
fn part(number: usize, with_scripts: bool) -> Vec<Extension> {
    let mut scripts = Vec::new();
    let mut found = extensions::extensions(|_, of| scripts.push(of));
    let Some((_, count, _)) = PARTS.get(number) else { return Vec::new() };
    found.truncate(*count);
    if !with_scripts {
        if *count < 4 {
            found.push(Extension { name: "parts", ..Extension::default() });
        }
        return found;
    }
    for (extension, scripts) in found.iter_mut().zip(scripts) {
        extension.lazy_loaded_js_files = scripts;
    }
    let evaluated = PARTS.iter().take(number + 1).flat_map(|(_, _, scripts)| *scripts);
    let main: String =
        evaluated.map(|script| format!("__bootstrap.core.loadExtScript(\"{script}\");\n")).collect::<String>() + ";";
    let main = ExtensionFileSource::new_computed("ext:parts/main.js", Arc::from(main));
    found.push(Extension { name: "parts", js_files: Cow::Owned(vec![main]), ..Extension::default() });
    found
}

fn make(number: usize, place: &str) {
    let options = CreateSnapshotOptions {
        cargo_manifest_dir: env!("CARGO_MANIFEST_DIR"),
        startup_snapshot: None,
        skip_op_registration: false,
        extensions: part(number, true),
        extension_transpiler: None,
        with_runtime_cb: None,
    };
    let snapshot = create_snapshot(options, None).unwrap_or_else(|error| panic!("{error}"));
    std::fs::write(place, snapshot.output).expect("a file");
}

/// Starts as the program does, says so, and waits to be ended.
fn start(number: usize, place: &str) {
    let snapshot: &'static [u8] =
        if place.is_empty() { WHOLE } else { Box::leak(std::fs::read(place).expect("a file").into_boxed_slice()) };
    JsRuntime::init_platform(None);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _context = runtime.enter();
    let _isolate = JsRuntime::new(RuntimeOptions {
        startup_snapshot: Some(snapshot),
        extensions: part(number, false),
        ..RuntimeOptions::default()
    });
    say("ready");
    std::thread::sleep(Duration::from_secs(60));
}

#[expect(clippy::print_stdout, reason = "a program")]
fn say(text: &str) {
    println!("{text}");
}

fn own(arguments: &[&str]) -> Command {
    let mut own = Command::new(std::env::current_exe().expect("a path"));
    own.args(arguments).env("MALLOC_ARENA_MAX", "1");
    own
}

struct Started(Child);

impl Started {
    fn new(number: &str, place: &str) -> Self {
        let mut child = own(&["start", number, place]).stdout(Stdio::piped()).spawn().expect("a process");
        let output = child.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut String::new()).expect("a line");
        Self(child)
    }

    fn cpu_milliseconds(&self) -> f64 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).into_iter().flatten().flatten();
        let used = threads.filter_map(|thread| {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<f64>().ok()
        });
        used.sum::<f64>() / 1e6
    }

    fn pss_mebibytes(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.0.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or_default();
        line.split_whitespace().next().and_then(|number| number.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: &String| text.parse().unwrap_or(0);
    match arguments.as_slice() {
        [what, part, place] if what == "make" => make(number(part), place),
        [what, part, place] if what == "start" => start(number(part), place),
        // `cargo test` builds and runs benches, too; there is nothing to measure then.
        _ if arguments.iter().any(|argument| argument == "--bench") => measure(),
        _ => {}
    }
}

fn measure() {
    let folder = tempfile::tempdir().expect("a folder");
    let places: Vec<(String, String)> = (0..PARTS.len())
        .map(|number| {
            let name = number.to_string();
            if number + 1 == PARTS.len() {
                return (name, String::new());
            }
            let place = folder.path().join(&name).display().to_string();
            let made = own(&["make", &name, &place]).stdout(Stdio::null()).status().expect("a process");
            assert!(made.success(), "the snapshot of part {name} is not made");
            (name, place)
        })
        .collect();
    let mut times: Vec<(Vec<f64>, Vec<f64>)> = PARTS.iter().map(|_| Default::default()).collect();
    for _ in 0..ROUNDS {
        for ((name, place), (wall, cpu)) in places.iter().zip(&mut times) {
            let started = Instant::now();
            let process = Started::new(name, place);
            wall.push(started.elapsed().as_secs_f64() * 1000.0);
            cpu.push(process.cpu_milliseconds());
        }
    }
    say(&format!(
        "{:<38} {:>9} {:>14} {:>12} {:>20}",
        "part", "start, ms", "CPU time, ms", "snapshot, KiB", "PSS at ten, MiB"
    ));
    for (((name, place), (what, _, _)), (wall, cpu)) in places.iter().zip(PARTS).zip(&mut times) {
        let bytes = if place.is_empty() { WHOLE.len() } else { length(Path::new(place)) };
        let all: Vec<Started> = (0..AT_ONCE).map(|_| Started::new(name, place)).collect();
        let mut pss: Vec<f64> = all.iter().map(Started::pss_mebibytes).collect();
        say(&format!(
            "{what:<38} {:>9.1} {:>14.1} {:>12} {:>20.1}",
            median(wall),
            median(cpu),
            bytes / 1024,
            median(&mut pss)
        ));
    }
}

fn length(path: &Path) -> usize {
    std::fs::metadata(path).map_or(0, |found| usize::try_from(found.len()).unwrap_or(0))
}
