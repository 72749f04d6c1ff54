//! [`Calls`]: the guest `calls` on one host. A script goes in, what each call answered comes out, so that hosts can be
//! compared line by line. The script's language stands in `tests/guests/calls`.

use std::time::{Duration, Instant};

use portcullis_harness::{Filter, Host, HostKind, RequestPlan, ResponsePlan};

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
    /// Lines of the log that were handed out.
    seen: usize,
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
            failure_policy: None,
        }
        .write(folder.path())?;
        let server = Server::start(host, &policy)?;
        Ok(Calls::Real(Box::new(Real { server, origin, seen: 0, _folder: folder })))
    }

    /// Sends a request with a script of its own; gives what the guest logged for it, in order, without the mark.
    pub fn request(&mut self, mut request: RequestPlan, script: &str) -> Result<Vec<String>, String> {
        let script = format!("{}; delete: return 0", script.trim().replace('\n', "; "));
        request.fields.push("x-calls", script);
        match self {
            Calls::Simulated(filter) => {
                let seen = filter.exchange(&request, &ResponsePlan::default());
                let lines = marked(seen.log.iter().map(|line| line.message.as_str()));
                finished(lines).ok_or_else(|| "the stream did not end".to_owned())
            }
            Calls::Real(real) => real.request(&request),
        }
    }
}

impl Real {
    fn request(&mut self, request: &RequestPlan) -> Result<Vec<String>, String> {
        self.origin.take_requests();
        self.seen = marked(self.server.log().lines()).len();
        // A script may cut the connection; what was logged is of interest then, too.
        client::send(self.server.address(), request)?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(lines) = finished(marked(self.server.log().lines()).split_off(self.seen)) {
                return Ok(lines);
            }
            if Instant::now() > deadline {
                return Err(format!("the stream did not end:\n{}", self.server.log()));
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
