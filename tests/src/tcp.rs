//! The two ends of a TCP connection through a host: a client's socket and the origin's, each read by a thread of its own.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::process::DEADLINE;

/// A server whose ends of connections a test holds. Dropping it ends it.
pub struct TcpOrigin {
    address: SocketAddr,
    accepted: Mutex<Receiver<TcpStream>>,
}

impl TcpOrigin {
    /// Starts one.
    pub fn start() -> Result<TcpOrigin, String> {
        let fail = |error: std::io::Error| format!("the TCP origin cannot start: {error}");
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

    /// The end of the next connection that comes within this time.
    pub fn take(&self, time: Duration) -> Result<Option<Peer>, String> {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(time);
        accepted.ok().map(Peer::new).transpose()
    }

    /// Forgets connections that nobody has asked for.
    pub fn clear(&self) {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        while accepted.try_recv().is_ok() {}
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
pub enum End {
    /// Nothing follows.
    Finished,
    /// The other side broke off.
    Reset,
    /// It broke off itself.
    Own,
}

/// What a side got so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Got {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// How they ended, once they have.
    pub end: Option<End>,
}

/// One side's socket, and the thread that reads it.
pub struct Peer {
    /// Absent once it has broken off.
    stream: Option<TcpStream>,
    reading: Option<JoinHandle<()>>,
    got: Arc<(Mutex<Got>, Condvar)>,
    has_finished: bool,
}

impl Peer {
    /// A client that connects.
    pub fn connect(address: SocketAddr) -> Result<Peer, String> {
        Peer::new(TcpStream::connect_timeout(&address, DEADLINE).map_err(|error| format!("{address}: {error}"))?)
    }

    fn new(stream: TcpStream) -> Result<Peer, String> {
        let fail = |error: std::io::Error| format!("a test's socket: {error}");
        stream.set_nodelay(true).map_err(fail)?;
        stream.set_write_timeout(Some(DEADLINE)).map_err(fail)?;
        let reader = stream.try_clone().map_err(fail)?;
        let got: Arc<(Mutex<Got>, Condvar)> = Arc::default();
        let shared = Arc::clone(&got);
        let reading = Some(std::thread::spawn(move || read(reader, &shared)));
        Ok(Peer { stream: Some(stream), reading, got, has_finished: false })
    }

    /// Sends bytes. That the other side has broken off shows in what this one gets.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        let Some(stream) = &mut self.stream else { return Err("it has broken off".to_owned()) };
        drop(stream.write_all(bytes));
        Ok(())
    }

    /// Sends nothing more, and goes on receiving.
    pub fn finish(&mut self) -> Result<(), String> {
        let Some(stream) = &mut self.stream else { return Err("it has broken off".to_owned()) };
        self.has_finished = true;
        drop(stream.shutdown(Shutdown::Write));
        Ok(())
    }

    /// Whether it sends nothing more.
    pub fn has_finished(&self) -> bool {
        self.has_finished
    }

    /// Closes with a reset.
    pub fn abort(&mut self) -> Result<(), String> {
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

    /// What it got so far.
    pub fn got(&self) -> Got {
        lock(&self.got.0).clone()
    }

    /// What it got once that is enough, or when the time is up.
    pub fn wait(&self, time: Duration, is_enough: impl Fn(&Got) -> bool) -> Got {
        let deadline = Instant::now() + time;
        let mut got = lock(&self.got.0);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if is_enough(&got) || left.is_zero() {
                return got.clone();
            }
            (got, _) = self.got.1.wait_timeout(got, left).unwrap_or_else(PoisonError::into_inner);
        }
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
