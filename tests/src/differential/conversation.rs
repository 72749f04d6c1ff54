//! TCP rows: what client and origin do on a connection, in lockstep with the guests, and what each got.
//!
//! After each move the guests are given time to tell of it, so that bytes come to them in the pieces in which they were
//! sent.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::outcome::Outcome;
use crate::process::DEADLINE;

/// What one side does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Sends these bytes.
    Sends(&'static str),
    /// Sends nothing more, and goes on receiving.
    Finishes,
    /// Breaks off.
    Aborts,
    /// Waits until the other side has finished or broken off.
    SeesTheEnd,
}

/// One step of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// The client does something.
    Client(Act),
    /// The origin does; it is waited for, if it is not connected yet.
    Origin(Act),
    /// Waits until the guests have told a line with this in it.
    Told(&'static str),
    /// The client connects anew. It begins connected.
    Again,
    /// The same, until an origin hears of it: a VM comes back after a while.
    AgainUntilConnected,
}

/// How long something may take that must happen.
const MOVE_TIME_MAX: Duration = Duration::from_secs(5);

/// A server that does what a row says. Dropping it ends it.
pub struct TcpOrigin {
    address: SocketAddr,
    accepted: Mutex<Receiver<TcpStream>>,
}

impl TcpOrigin {
    /// Starts one.
    pub fn start() -> Result<TcpOrigin, String> {
        let fail = |error: std::io::Error| format!("the suite's TCP origin cannot start: {error}");
        let listener = TcpListener::bind("127.0.0.1:0").map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        let (sender, accepted) = channel();
        std::thread::spawn(move || {
            // Until nobody takes them any more.
            while let Ok((stream, _)) = listener.accept() {
                if sender.send(stream).is_err() {
                    return;
                }
            }
        });
        Ok(TcpOrigin { address, accepted: Mutex::new(accepted) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn take(&self, time: Duration) -> Option<TcpStream> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(time).ok()
    }

    /// Forgets connections that nobody has asked for.
    fn clear(&self) {
        while self.take(Duration::ZERO).is_some() {}
    }
}

impl Drop for TcpOrigin {
    fn drop(&mut self) {
        // One more connection, by which its thread learns that nobody takes them. It may be gone already.
        *self.accepted.lock().unwrap_or_else(PoisonError::into_inner) = channel().1;
        drop(TcpStream::connect(self.address));
    }
}

/// How a side saw the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Finished,
    Reset,
    /// It broke off itself.
    Own,
}

#[derive(Debug, Default)]
struct Got {
    bytes: Vec<u8>,
    end: Option<End>,
}

/// A side's socket, and the thread that reads it.
struct Peer {
    /// Absent once it has broken off.
    stream: Option<TcpStream>,
    reading: Option<JoinHandle<()>>,
    got: Arc<(Mutex<Got>, Condvar)>,
    finished: bool,
}

impl Peer {
    fn new(stream: TcpStream) -> Result<Peer, String> {
        let fail = |error: std::io::Error| format!("a test's socket: {error}");
        stream.set_nodelay(true).map_err(fail)?;
        stream.set_write_timeout(Some(DEADLINE)).map_err(fail)?;
        let reader = stream.try_clone().map_err(fail)?;
        let got: Arc<(Mutex<Got>, Condvar)> = Arc::default();
        let shared = Arc::clone(&got);
        let reading = Some(std::thread::spawn(move || read(reader, &shared)));
        Ok(Peer { stream: Some(stream), reading, got, finished: false })
    }

    fn act(&mut self, act: Act) -> Result<(), String> {
        match (act, &mut self.stream) {
            // A peer that has broken off is an outcome.
            (Act::Sends(text), Some(stream)) => drop(stream.write_all(text.as_bytes())),
            (Act::Finishes, Some(stream)) => {
                self.finished = true;
                drop(stream.shutdown(Shutdown::Write));
            }
            (Act::Aborts, _) => self.abort()?,
            (Act::SeesTheEnd, _) => {
                let deadline = Instant::now() + MOVE_TIME_MAX;
                let mut got = lock(&self.got.0);
                while got.end.is_none() {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(format!("the end never came, after {:?}", String::from_utf8_lossy(&got.bytes)));
                    }
                    (got, _) = self.got.1.wait_timeout(got, left).unwrap_or_else(PoisonError::into_inner);
                }
            }
            (Act::Sends(_) | Act::Finishes, None) => return Err("it has broken off".to_owned()),
        }
        Ok(())
    }

    /// Closes with a reset.
    fn abort(&mut self) -> Result<(), String> {
        let Some(stream) = self.stream.take() else { return Ok(()) };
        lock(&self.got.0).end.get_or_insert(End::Own);
        let socket = socket2::SockRef::from(&stream);
        socket.set_linger(Some(Duration::ZERO)).map_err(|error| format!("a test's socket: {error}"))?;
        // Ends the thread's reading, of which the other side learns nothing; only then is this the last handle.
        drop(stream.shutdown(Shutdown::Read));
        if let Some(reading) = self.reading.take() {
            reading.join().map_err(|_| "a test's reader panicked".to_owned())?;
        }
        Ok(())
    }

    fn describe(&self, whose: &str, outcome: &mut Outcome) {
        let got = lock(&self.got.0);
        let end = match got.end {
            None => "and nothing more yet",
            Some(End::Finished) => "to the end",
            Some(End::Reset) => "and a reset",
            Some(End::Own) => "until it broke off",
        };
        outcome.lines.push(format!("{whose}: \"{}\" {end}", got.bytes.escape_ascii()));
    }
}

fn read(mut stream: TcpStream, got: &(Mutex<Got>, Condvar)) {
    let mut space = [0; 4096];
    loop {
        let read = stream.read(&mut space);
        let mut got_now = lock(&got.0);
        match read {
            Ok(0) => drop(got_now.end.get_or_insert(End::Finished)),
            Ok(count) => got_now.bytes.extend_from_slice(space.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => drop(got_now.end.get_or_insert(End::Reset)),
        }
        got.1.notify_all();
        if got_now.end.is_some() {
            return;
        }
    }
}

fn lock(got: &Mutex<Got>) -> MutexGuard<'_, Got> {
    got.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One client's connection and the origin's end of it.
struct Pair {
    client: Peer,
    origin: Option<Peer>,
}

impl Pair {
    fn connect(address: SocketAddr) -> Result<Pair, String> {
        let stream = TcpStream::connect_timeout(&address, DEADLINE).map_err(|error| format!("{address}: {error}"))?;
        Ok(Pair { client: Peer::new(stream)?, origin: None })
    }

    /// The origin's end, waiting for it if need be.
    fn origin(&mut self, origin: &TcpOrigin, time: Duration) -> Result<Option<&mut Peer>, String> {
        if self.origin.is_none()
            && let Some(stream) = origin.take(time)
        {
            self.origin = Some(Peer::new(stream)?);
        }
        Ok(self.origin.as_mut())
    }

    /// Notes what both got, then breaks off what is left.
    fn end(mut self, origin: &TcpOrigin, outcome: &mut Outcome) -> Result<(), String> {
        self.origin(origin, Duration::ZERO)?;
        self.client.describe("client", outcome);
        match &self.origin {
            Some(peer) => peer.describe("origin", outcome),
            None => outcome.lines.push("origin: not connected".to_owned()),
        }
        // A client that has finished cannot break off any more.
        if !self.client.finished {
            self.client.abort()?;
        }
        self.origin.as_mut().map_or(Ok(()), Peer::abort)
    }
}

/// Carries out the moves on a listener and notes what came of them. `told` waits until the guests have told of a move;
/// `said` until they have told a line, and says whether they did.
pub fn converse(
    address: SocketAddr,
    origin: &TcpOrigin,
    moves: &[Move],
    told: &dyn Fn(),
    said: &dyn Fn(&str) -> bool,
    outcome: &mut Outcome,
) -> Result<(), String> {
    origin.clear();
    let mut pair = Pair::connect(address)?;
    told();
    for step in moves {
        match *step {
            Move::Client(act) => pair.client.act(act).map_err(|error| format!("client: {error}"))?,
            Move::Origin(act) => {
                let peer = pair.origin(origin, MOVE_TIME_MAX)?;
                let peer = peer.ok_or("the origin is not connected")?;
                peer.act(act).map_err(|error| format!("origin: {error}"))?;
            }
            Move::Told(line) => {
                if !said(line) {
                    return Err(format!("the guests never told `{line}`"));
                }
            }
            Move::Again => {
                std::mem::replace(&mut pair, Pair::connect(address)?).end(origin, outcome)?;
            }
            Move::AgainUntilConnected => {
                pair.end(origin, outcome)?;
                let deadline = Instant::now() + MOVE_TIME_MAX;
                pair = loop {
                    let mut next = Pair::connect(address)?;
                    if next.origin(origin, Duration::from_millis(100))?.is_some() {
                        break next;
                    }
                    if Instant::now() > deadline {
                        return Err("no connection ever reached the origin again".to_owned());
                    }
                };
            }
        }
        told();
    }
    pair.end(origin, outcome)
}
