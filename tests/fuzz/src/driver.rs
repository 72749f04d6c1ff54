//! Feeds a target with inputs and keeps what it fails on.

use std::cell::RefCell;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use crate::Target;
use crate::input::Random;

/// How long to look.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Time.
    pub time: Duration,
    /// What the random choices begin with: the same seed makes the same inputs.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// Inputs tried.
    pub inputs: u64,
    /// Different things that happened.
    pub outcomes: usize,
    /// The time it took.
    pub time: Duration,
    /// The first input that failed.
    pub failure: Option<Failure>,
}

/// An input that failed.
#[derive(Debug)]
pub struct Failure {
    /// The input, made small.
    pub input: Vec<u8>,
    /// What the target said.
    pub message: String,
    /// Where the input was written to.
    pub file: Option<PathBuf>,
}

/// Inputs that are mutated further.
const POOL_MAX: usize = 4_000;
/// Bytes of an input.
const INPUT_BYTES_MAX: usize = 8 * 1024;
/// An input that takes longer than this has hung. Far more than any takes, also where everything else on the machine goes first.
const HUNG: Duration = Duration::from_secs(300);
/// Tries to make a failing input smaller.
const SHRINKING_MAX: usize = 3_000;

/// Runs a target until its time is over or it fails.
pub fn drive(target: &Target, budget: Budget) -> Report {
    let began = Instant::now();
    let watch = Watch::start(target.name);
    let mut state = State { target, watch: &watch, seen: HashSet::new(), pool: Vec::new(), inputs: 0 };
    let failure = state.search(began, budget);
    let failure = failure.map(|(input, message)| state.keep(&input, message));
    Report { inputs: state.inputs, outcomes: state.seen.len(), time: began.elapsed(), failure }
}

struct State<'a> {
    target: &'a Target,
    watch: &'a Watch,
    seen: HashSet<u64>,
    pool: Vec<Vec<u8>>,
    inputs: u64,
}

impl State<'_> {
    fn search(&mut self, began: Instant, budget: Budget) -> Option<(Vec<u8>, String)> {
        let folders = ["regressions", "corpus"].map(|kind| folder(kind, self.target.name));
        let kept = folders.iter().flat_map(|folder| files(folder));
        for input in kept.chain((self.target.seeds)()).chain([Vec::new()]) {
            if let Err(message) = self.try_input(&input) {
                return Some((input, message));
            }
            self.pool.push(input);
        }
        let mut random = Random::new(budget.seed);
        while began.elapsed() < budget.time {
            // A clock for each input would cost more than most inputs.
            for _ in 0..64 {
                let input = self.next_input(&mut random);
                match self.try_input(&input) {
                    Ok(true) if self.pool.len() < POOL_MAX => self.pool.push(input),
                    Ok(true) => {
                        let at = random.below(self.pool.len());
                        self.pool[at] = input;
                    }
                    Ok(false) => {}
                    Err(message) => return Some((input, message)),
                }
                if began.elapsed() >= budget.time {
                    break;
                }
            }
        }
        None
    }

    /// Whether something new happened; an error is what the target said.
    fn try_input(&mut self, input: &[u8]) -> Result<bool, String> {
        self.inputs += 1;
        self.watch.begin(input);
        let outcome = caught(|| (self.target.run)(input));
        self.watch.end();
        Ok(self.seen.insert(outcome?))
    }

    fn next_input(&self, random: &mut Random) -> Vec<u8> {
        if random.one_in(8) {
            let len = random.len(256);
            return random.bytes(len);
        }
        // What was found last is nearest to what was not found yet.
        let at = if random.one_in(2) {
            random.below(self.pool.len())
        } else {
            self.pool.len() - 1 - random.below(self.pool.len().min(64))
        };
        let mut input = self.pool[at].clone();
        for _ in 0..1 + random.below(6) {
            self.mutate(&mut input, random);
        }
        input.truncate(INPUT_BYTES_MAX);
        input
    }

    fn mutate(&self, input: &mut Vec<u8>, random: &mut Random) {
        let at = random.below(input.len() + 1);
        match random.below(9) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.byte(),
            2 if at < input.len() => input[at] = input[at].wrapping_add(random.byte() % 33).wrapping_sub(16),
            3 => input.insert(at, random.byte()),
            4 => {
                let end = (at + 1 + random.len(32)).min(input.len());
                input.drain(at.min(end)..end);
            }
            5 => {
                let end = (at + 1 + random.len(64)).min(input.len());
                let piece = input[at.min(end)..end].to_vec();
                let to = random.below(input.len() + 1);
                input.splice(to..to, piece);
            }
            6 if !self.target.words.is_empty() => {
                let word = self.target.words[random.below(self.target.words.len())];
                let end = if random.one_in(2) { at } else { (at + word.len()).min(input.len()) };
                input.splice(at..end, word.iter().copied());
            }
            7 => {
                let other = &self.pool[random.below(self.pool.len())];
                let from = random.below(other.len() + 1);
                let to = (from + 1 + random.len(128)).min(other.len());
                input.splice(at..at, other[from..to].iter().copied());
            }
            _ => {
                let len = random.len(8);
                let bytes = random.bytes(len);
                input.splice(at..at, bytes);
            }
        }
    }

    /// Makes a failing input small and writes it down.
    fn keep(&self, input: &[u8], message: String) -> Failure {
        let mut small = input.to_vec();
        let mut tries = 0;
        let mut len = small.len().div_ceil(2).max(1);
        while tries < SHRINKING_MAX && !small.is_empty() {
            let mut shorter = false;
            let mut at = 0;
            while at < small.len() && tries < SHRINKING_MAX {
                let mut candidate = small.clone();
                candidate.drain(at..(at + len).min(candidate.len()));
                tries += 1;
                self.watch.begin(&candidate);
                if caught(|| (self.target.run)(&candidate)).is_err() {
                    small = candidate;
                    shorter = true;
                } else {
                    at += len;
                }
                self.watch.end();
            }
            if !shorter && len == 1 {
                break;
            }
            len = if shorter { len } else { len.div_ceil(2) };
        }
        // A smaller input may fail in another way; its own words are the ones to show.
        let message = caught(|| (self.target.run)(&small)).err().unwrap_or(message);
        let file = write(self.target.name, &small);
        Failure { input: small, message, file }
    }
}

fn folder(kind: &str, target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(kind).join(target)
}

/// The contents of a folder's files, in the order of their names.
fn files(folder: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).map(|files| files.flatten().map(|file| file.path()).collect()).unwrap_or_default();
    paths.sort();
    paths.iter().filter_map(|path| std::fs::read(path).ok()).collect()
}

fn write(target: &str, input: &[u8]) -> Option<PathBuf> {
    let name: String = Sha256::digest(input)[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let folder = folder("regressions", target);
    let file = folder.join(name);
    std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&file, input)).ok().map(|()| file)
}

thread_local! {
    /// Where a panic of this thread goes, while one is waited for.
    static CAUGHT: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work`; a panic is an error with its words and place.
fn caught<R>(work: impl FnOnce() -> R) -> Result<R, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let waited_for = CAUGHT.with(|caught| match &mut *caught.borrow_mut() {
                Some(words) => {
                    *words = info.to_string();
                    true
                }
                None => false,
            });
            if !waited_for {
                usual(info);
            }
        }));
    });
    CAUGHT.with(|caught| *caught.borrow_mut() = Some(String::new()));
    let result = catch_unwind(AssertUnwindSafe(work));
    let words = CAUGHT.with(|caught| caught.borrow_mut().take()).unwrap_or_default();
    result.map_err(|_| words)
}

/// A thread that ends the process, with the input on standard error, when an input hangs.
struct Watch {
    running: Arc<Mutex<Running>>,
    stop: Arc<AtomicBool>,
}

/// Since when an input runs, and which.
type Running = Option<(Instant, Vec<u8>)>;

impl Watch {
    fn start(target: &'static str) -> Watch {
        let watch = Watch { running: Arc::default(), stop: Arc::default() };
        let (running, stop) = (Arc::clone(&watch.running), Arc::clone(&watch.stop));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(200));
                let running = running.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some((_, input)) = running.as_ref().filter(|(since, _)| since.elapsed() > HUNG) {
                    let file = write(target, input);
                    eprintln!("{target}: an input hangs for more than {HUNG:?}: {file:?} {}", input.escape_ascii());
                    std::process::abort();
                }
            }
        });
        watch
    }

    fn begin(&self, input: &[u8]) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), input.to_vec()));
    }

    fn end(&self) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(run: fn(&[u8]) -> u64) -> Target {
        Target { name: "a-test-of-the-driver", about: "", run, seeds: || vec![b"seed".to_vec()], words: &[b"magic"] }
    }

    fn budget(seconds: u64) -> Budget {
        Budget { time: Duration::from_secs(seconds), seed: 1 }
    }

    #[test]
    fn what_fails_is_found_made_small_and_written_down() {
        // Found step by step: each of the three lets the next one be seen.
        fn picky(input: &[u8]) -> u64 {
            let Some(at) = input.windows(5).position(|window| window == b"magic") else { return 0 };
            let rest = &input[at + 5..];
            match rest {
                [b'!', b'?', ..] => panic!("it was said"),
                [b'!', ..] => 2,
                _ => 1,
            }
        }
        let report = drive(&target(picky), budget(60));
        let failure = report.failure.expect("a failure");
        assert_eq!(failure.input, b"magic!?");
        assert!(failure.message.contains("it was said"), "{}", failure.message);
        let file = failure.file.expect("a file");
        assert_eq!(std::fs::read(&file).unwrap(), b"magic!?");
        // From now on it is tried first.
        let again = drive(&target(picky), budget(0));
        assert_eq!((again.inputs, again.failure.map(|failure| failure.input)), (1, Some(b"magic!?".to_vec())));
        std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
    }

    #[test]
    fn what_holds_is_tried_until_the_time_is_over() {
        let report = drive(&target(|input| input.len() as u64), Budget { time: Duration::from_millis(50), seed: 7 });
        assert!(report.failure.is_none());
        assert!(report.inputs > 64 && report.outcomes > 10, "{report:?}");
    }
}
