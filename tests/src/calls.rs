//! [`Calls`]: the guest `calls` on one host. A script goes in, what each call answered comes out, so that hosts can be
//! compared line by line. The script's language stands in `tests/guests/calls`.

use std::time::{Duration, Instant};

use portcullis_harness::{Filter, Host, HostKind, RequestPlan, ResponsePlan};

use crate::connection::Connection;
use crate::policy::PolicyParts;
use crate::process::DEADLINE;
use crate::server::Server;
use crate::upstream::Upstream;
use crate::{client, places};

/// Begins what the guest logs.
const MARK: &str = "[calls] ";
/// The last line of a stream.
const END: &str = "delete return 0 -> 0";

/// The guest on one host.
pub enum Calls {
    /// In the harness.
    Simulated(Filter),
    /// Over sockets.
    Real(Box<Real>),
}

/// A process that runs the guest.
pub struct Real {
    server: Server,
    origin: Upstream,
    _folder: tempfile::TempDir,
}

impl Calls {
    /// Starts the guest with a script as its configuration.
    pub fn start(host: HostKind, script: &str) -> Result<Calls, String> {
        let wasm = places::filter("calls")?;
        if host == HostKind::Harness {
            let filter = Host::new().load(&wasm).configuration(script).start().map_err(|error| error.to_string())?;
            return Ok(Calls::Simulated(filter));
        }
        let origin = Upstream::start()?;
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let policy = PolicyParts {
            filter: "calls",
            wasm: &wasm,
            configuration: script.as_bytes(),
            origin: origin.address(),
            callouts: &[],
            http2: &[],
            failure_policy: None,
        }
        // Scripts log more than filters should.
        .write_with(folder.path(), &["limits: { log_lines_per_second: 100000 }"])?;
        let server = Server::start(host, &policy)?;
        Ok(Calls::Real(Box::new(Real { server, origin, _folder: folder })))
    }

    /// Sends a request with a script of its own; gives what the guest logged for it, in order, without the mark.
    pub fn request(&mut self, mut request: RequestPlan, script: &str) -> Result<Vec<String>, String> {
        request.fields.push("x-calls", ending(script));
        match self {
            Calls::Simulated(filter) => {
                let seen = filter.exchange(&request, &ResponsePlan::default());
                let lines = marked(seen.log.iter().map(|line| line.message.as_str()));
                finished(lines).ok_or_else(|| "the stream did not end".to_owned())
            }
            Calls::Real(real) => {
                let address = real.server.address();
                // A script may cut the connection; what was logged is of interest then, too.
                real.observe(|| client::send(address, &request).map(drop))
            }
        }
    }

    /// What the guest has logged by the time that it logs a line that begins so; for callbacks of its root context.
    pub fn until(&mut self, begin: &str) -> Result<Vec<String>, String> {
        match self {
            Calls::Simulated(filter) => {
                filter.host().advance(Duration::from_secs(1));
                Ok(marked(filter.host().log().iter().map(|line| line.message.as_str())))
            }
            Calls::Real(real) => {
                real.wait_for(0, |lines| lines.iter().any(|line| line.starts_with(begin)).then_some(lines))
            }
        }
    }

    /// Ends the host; gives what the guest logged since the last request.
    pub fn end(self) -> Result<Vec<String>, String> {
        match self {
            Calls::Simulated(filter) => {
                let host = filter.host().clone();
                let before = marked(host.log().iter().map(|line| line.message.as_str())).len();
                filter.shutdown();
                host.advance(Duration::from_secs(1));
                Ok(marked(host.log().iter().map(|line| line.message.as_str())).split_off(before))
            }
            Calls::Real(mut real) => {
                let before = marked(real.server.log().lines()).len();
                real.server.end()?;
                Ok(marked(real.server.log().lines()).split_off(before))
            }
        }
    }

    /// Sends a `GET` for each script, on one connection; gives the lines of all. Not in the harness, which has no connections.
    pub fn on_one_connection(&mut self, scripts: &[&str]) -> Result<Vec<String>, String> {
        let Calls::Real(real) = self else { return Err("the harness has no connections".to_owned()) };
        let mut connection = Connection::open(real.server.address())?;
        let mut lines = Vec::new();
        for script in scripts {
            let script = ending(script);
            lines.extend(real.observe(|| connection.get_with("/", &[("x-calls", &script)]).map(drop))?);
        }
        Ok(lines)
    }
}

/// A script on one line, with the mark of the end behind it.
fn ending(script: &str) -> String {
    format!("{}; delete: return 0", script.trim().replace('\n', "; "))
}

impl Real {
    /// Does something, and gives what was logged until a stream had ended.
    fn observe(&mut self, act: impl FnOnce() -> Result<(), String>) -> Result<Vec<String>, String> {
        self.origin.take_requests();
        let seen = marked(self.server.log().lines()).len();
        act()?;
        self.wait_for(seen, finished)
    }

    /// Waits until there is something in what was logged behind the first `seen` lines.
    fn wait_for<T>(&self, seen: usize, find: impl Fn(Vec<String>) -> Option<T>) -> Result<T, String> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(found) = find(marked(self.server.log().lines()).split_off(seen)) {
                return Ok(found);
            }
            if Instant::now() > deadline {
                return Err(format!("what was waited for never came:\n{}", self.server.log()));
            }
            // The log of a stream that has ended comes when the process gets to it.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn marked<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    let said = lines.filter_map(|line| Some(line.split_once(MARK)?.1));
    // `portcullis serve` adds whose line it is.
    said.map(|line| line.strip_suffix(" filter=\"calls\"").unwrap_or(line).to_owned()).collect()
}

/// A stream's lines, once it has ended.
fn finished(mut lines: Vec<String>) -> Option<Vec<String>> {
    lines.pop_if(|line| line.contains(END)).map(|_| lines)
}
