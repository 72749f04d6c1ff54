//! [`Stage`]: a host with the plugins of some rows, and how a row is run on it.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use portcullis_harness::{HostKind, ObservedRequest, RequestPlan};

use super::conversation::converse;
use super::origin::Origin;
use super::outcome::Outcome;
use super::policy::{self, SHARED, STRICT, Upstreams};
use super::row::{Row, Step};
use super::transcript::{Told, Transcripts};
use crate::client;
use crate::process::DEADLINE;
use crate::server::Server;
use crate::tcp::TcpOrigin;
use crate::upstream::Upstream;

/// The next piece of a body follows when the guest has told something, or after this time: a guest that has paused
/// everything tells nothing.
const PIECE_PAUSE_MAX: Duration = Duration::from_millis(150);

/// What belongs to a piece that was told of, the host sends on meanwhile.
const PIECE_PAUSE: Duration = Duration::from_millis(10);

/// How long a request may take to the origin after the client has its answer.
const UPSTREAM_LAG_MAX: Duration = Duration::from_millis(500);

/// How long a row may take to come to its end.
const ROW_TIME_MAX: Duration = Duration::from_secs(5);

/// One host and what stands behind it. Rows are run one at a time.
pub struct Stage {
    host: HostKind,
    server: Server,
    transcripts: Arc<Transcripts>,
    origin: Origin,
    callee: Upstream,
    tcp: TcpOrigin,
    fences: u32,
    _folder: tempfile::TempDir,
}

impl Stage {
    /// Starts a host with the plugins of these rows.
    pub fn start<'a>(host: HostKind, rows: impl IntoIterator<Item = &'a Row>) -> Result<Stage, String> {
        let (origin, callee, tcp) = (Origin::start()?, Upstream::start()?, TcpOrigin::start()?);
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let upstreams = Upstreams {
            origin: origin.address(),
            callee: callee.address(),
            closed: closed_address()?,
            tcp: tcp.address(),
        };
        let policy = policy::write(folder.path(), rows, &upstreams)?;
        let transcripts = Arc::new(Transcripts::default());
        let noted = Arc::clone(&transcripts);
        let server = Server::start_watched(host, &policy, move |line| !noted.note(line))?;
        Ok(Stage { host, server, transcripts, origin, callee, tcp, fences: 0, _folder: folder })
    }

    /// Runs a row in a host that is its own, which may refuse to start, or end.
    pub fn run_alone(host: HostKind, row: &Row) -> Result<Outcome, String> {
        let Ok(mut stage) = Stage::start(host, [row]) else {
            return Ok(Outcome { lines: vec!["host: it does not start".to_owned()] });
        };
        let outcome = stage.run(row);
        let silent = outcome.as_ref().is_err_and(|error| error.contains(client::NO_ANSWER));
        if stage.is_running() && !silent {
            return outcome.map(|mut outcome| {
                outcome.lines.insert(0, "host: it starts".to_owned());
                outcome
            });
        }
        Ok(Outcome { lines: vec!["host: it crashes, or answers no more".to_owned()] })
    }

    /// Whether the host still runs.
    pub fn is_running(&mut self) -> bool {
        self.server.is_running()
    }

    /// Runs a row.
    pub fn run(&mut self, row: &Row) -> Result<Outcome, String> {
        self.fences += 1;
        let mut seen = Outcome::default();
        let steps = row.steps.iter().try_for_each(|step| self.step(row, step, &mut seen));
        let ran = steps.and_then(|()| self.converse(row, &mut seen)).and_then(|()| self.finish(row));
        let told = self.transcripts.told(&row.id);
        ran.map_err(|error| {
            let roots: Vec<&str> = told.roots.iter().flat_map(|(_, lines)| lines).map(String::as_str).collect();
            let (roots, streams) = (roots.join("\n"), told.streams.join("\n"));
            let host = self.host.name();
            format!("{host}: {error}; its guest told\n{roots}\n{streams}\nlog of {host}:\n{}", self.server.log())
        })?;
        let mut outcome = Outcome::default();
        outcome.told(row, &told);
        outcome.lines.append(&mut seen.lines);
        if !row.metrics.is_empty() {
            let counters = self.server.counters()?;
            for name in &row.metrics {
                let value = counters.get(*name).map_or("absent".to_owned(), i64::to_string);
                outcome.lines.push(format!("metric: {name} {value}"));
            }
        }
        if !self.is_running() {
            return Err(format!("{} has ended:\n{}", self.host.name(), self.server.log()));
        }
        Ok(outcome)
    }

    /// Sends a step's request and notes what client and upstreams saw.
    fn step(&mut self, row: &Row, step: &Step, outcome: &mut Outcome) -> Result<(), String> {
        self.callee.answer(step.callouts.clone());
        self.callee.take_requests();
        let pace = Pace::new(&self.transcripts, &row.id);
        let origin_pace = Pace::new(&self.transcripts, &row.id);
        self.origin.answer(step.response.clone(), move |piece| origin_pace.wait(piece));
        let request = request(row, step);
        let deadline = Instant::now() + ROW_TIME_MAX;
        let response = loop {
            let response = client::send_paced(self.server.address(), &request, ROW_TIME_MAX, |piece| pace.wait(piece))?;
            let status = response.as_ref().map(|response| response.status);
            if step.until_status.is_none() || status == step.until_status {
                break response;
            }
            if Instant::now() > deadline {
                return Err(format!("never answered {:?}, but {status:?}", step.until_status));
            }
            // A VM comes back after a while, which nobody is told.
            std::thread::sleep(Duration::from_millis(20));
        };
        outcome.response(response.as_ref());
        if row.upstream {
            let mut requests = self.origin.requests();
            let deadline = Instant::now() + UPSTREAM_LAG_MAX;
            while requests.len() < step.await_upstream && Instant::now() < deadline {
                // What is sent on at once may still arrive after the answer that the client has.
                std::thread::sleep(PIECE_PAUSE);
                requests = self.origin.requests();
            }
            outcome.upstream(&requests);
        }
        let slug = row.slug();
        let ours = |request: &ObservedRequest| !row.fire_and_forget && request.path.contains(&slug);
        for request in self.callee.take_requests().into_iter().filter(ours) {
            outcome.request("callee", &request, row.deviation == Some("notes on callouts"));
        }
        Ok(())
    }

    /// Has a row's conversation on its listener.
    fn converse(&self, row: &Row, outcome: &mut Outcome) -> Result<(), String> {
        if !row.is_tcp() {
            return Ok(());
        }
        self.callee.answer(Vec::new());
        let lines = || self.transcripts.told(&row.id).streams.len();
        let before = AtomicUsize::new(lines());
        let told = || {
            let seen = before.load(Ordering::SeqCst);
            self.transcripts.wait(&row.id, PIECE_PAUSE_MAX, |told| told.streams.len() > seen);
            std::thread::sleep(PIECE_PAUSE);
            before.store(lines(), Ordering::SeqCst);
        };
        let said = |line: &str| self.transcripts.wait(&row.id, ROW_TIME_MAX, |told| told.contains(line));
        let address = self.server.listener(&row.slug())?;
        converse(address, &self.tcp, &row.conversation, &told, &said, outcome)
    }

    /// Waits until the row's guests have told everything.
    fn finish(&self, row: &Row) -> Result<(), String> {
        if let Some(until) = row.until
            && !self.transcripts.wait(&row.id, ROW_TIME_MAX, |told| told.contains(until))
        {
            return Err(format!("its guest never told `{until}`"));
        }
        if row.dies {
            return self.fence(self.fences);
        }
        if row.is_tcp() {
            let ended = self.transcripts.wait(&row.id, ROW_TIME_MAX, Told::streams_have_ended);
            return if ended { Ok(()) } else { Err("not every connection has ended".to_owned()) };
        }
        let streams = row.steps.len() * row.plugins.len().max(1);
        let ended = |told: &Told| told.streams_have_ended() && told.ended >= streams;
        if row.steps.is_empty() || self.transcripts.wait(&row.id, ROW_TIME_MAX, ended) {
            return Ok(());
        }
        Err("not every stream has ended".to_owned())
    }

    /// When another request, on the same worker, has come to its end, everything before it has been told.
    fn fence(&self, number: u32) -> Result<(), String> {
        let name = format!("fence-{number}");
        let mut request = RequestPlan::new("GET", &format!("/{SHARED}/fence"));
        request.fields.push("x-calls", script_field(&name, ""));
        client::send(self.server.address(), &request)?;
        if self.transcripts.wait(&name, DEADLINE, Told::streams_have_ended) {
            return Ok(());
        }
        Err("the request after it has not ended".to_owned())
    }
}

/// A step's request, with the script that its guests follow.
pub fn request(row: &Row, step: &Step) -> RequestPlan {
    let mut request = step.request.clone();
    let chain = match (row.plugins.is_empty(), row.strict) {
        (true, false) => format!("/{SHARED}/{}", row.slug()),
        (true, true) => format!("/{STRICT}/{}", row.slug()),
        (false, _) => format!("/{}/", row.slug()),
    };
    request.path = format!("{chain}{}", request.path);
    let script = step.script.as_ref().unwrap_or(&row.script);
    // Callouts name the row in their path, so that one that comes late is no other row's.
    request.fields.push("x-calls", script_field(&row.id, &script.replace("ROW", &row.slug())));
    request
}

/// Lets a piece of a body go when the guest has told of the one before.
struct Pace {
    transcripts: Arc<Transcripts>,
    row: String,
    /// How many pieces had been told of when the last one went.
    told: AtomicUsize,
}

impl Pace {
    fn new(transcripts: &Arc<Transcripts>, row: &str) -> Pace {
        Pace { transcripts: Arc::clone(transcripts), row: row.to_owned(), told: AtomicUsize::new(0) }
    }

    fn wait(&self, piece: usize) {
        // The first piece of a body follows its head at once.
        if piece > 1 {
            let before = self.told.load(Ordering::SeqCst);
            self.transcripts.wait(&self.row, PIECE_PAUSE_MAX, |told| told.bodies() > before);
            std::thread::sleep(PIECE_PAUSE);
        }
        self.told.store(self.transcripts.told(&self.row).bodies(), Ordering::SeqCst);
    }
}

/// A script as a field's value, which has no line breaks.
fn script_field(row: &str, script: &str) -> String {
    let lines = script.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    std::iter::once(format!("row: {row}")).chain(lines.map(str::to_owned)).collect::<Vec<_>>().join("; ")
}

/// An address on which nobody listens, for as long as nobody else asks the system for one.
fn closed_address() -> Result<SocketAddr, String> {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.map_err(|error| format!("no address: {error}"))
}
