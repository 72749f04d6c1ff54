//! TCP rows: what client and origin do on a connection, in lockstep with the guests, and what each got.
//!
//! After each move the guests are given time to tell of it, so that bytes come to them in the pieces in which they were
//! sent.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::outcome::Outcome;
use crate::tcp::{End, Peer, TcpOrigin};

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

fn act(peer: &mut Peer, act: Act) -> Result<(), String> {
    match act {
        Act::Sends(text) => peer.send(text.as_bytes()),
        Act::Finishes => peer.finish(),
        Act::Aborts => peer.abort(),
        Act::SeesTheEnd => {
            let got = peer.wait(MOVE_TIME_MAX, |got| got.end.is_some());
            match got.end {
                Some(_) => Ok(()),
                None => Err(format!("the end never came, after {:?}", String::from_utf8_lossy(&got.bytes))),
            }
        }
    }
}

fn describe(peer: &Peer, whose: &str, outcome: &mut Outcome) {
    let got = peer.got();
    let end = match got.end {
        None => "and nothing more yet",
        Some(End::Finished) => "to the end",
        Some(End::Reset) => "and a reset",
        Some(End::Own) => "until it broke off",
    };
    outcome.lines.push(format!("{whose}: \"{}\" {end}", got.bytes.escape_ascii()));
}

/// One client's connection and the origin's end of it.
struct Pair {
    client: Peer,
    origin: Option<Peer>,
}

impl Pair {
    fn connect(address: SocketAddr) -> Result<Pair, String> {
        Ok(Pair { client: Peer::connect(address)?, origin: None })
    }

    /// The origin's end, waiting for it if need be.
    fn origin(&mut self, origin: &TcpOrigin, time: Duration) -> Result<Option<&mut Peer>, String> {
        if self.origin.is_none() {
            self.origin = origin.take(time)?;
        }
        Ok(self.origin.as_mut())
    }

    /// Notes what both got, then breaks off what is left.
    fn end(mut self, origin: &TcpOrigin, outcome: &mut Outcome) -> Result<(), String> {
        self.origin(origin, Duration::ZERO)?;
        describe(&self.client, "client", outcome);
        match &self.origin {
            Some(peer) => describe(peer, "origin", outcome),
            None => outcome.lines.push("origin: not connected".to_owned()),
        }
        // A client that has finished cannot break off any more.
        if !self.client.has_finished() {
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
            Move::Client(act) => self::act(&mut pair.client, act).map_err(|error| format!("client: {error}"))?,
            Move::Origin(act) => {
                let peer = pair.origin(origin, MOVE_TIME_MAX)?;
                let peer = peer.ok_or("the origin is not connected")?;
                self::act(peer, act).map_err(|error| format!("origin: {error}"))?;
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
