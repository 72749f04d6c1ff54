//! Listening sockets: one per worker on the same address (SO_REUSEPORT), so that the kernel spreads connections and workers
//! share nothing.
//!
//! Binding and listening are two steps: everything is bound before anything is started, and nothing listens before
//! everything has started.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that wait to be accepted, per socket. The kernel caps it at its own limit (4096 on current systems).
const BACKLOG: i32 = 1024;

/// The sockets of one listener, one for each worker.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) address: SocketAddr,
    pub(crate) sockets: Vec<Socket>,
    pub(crate) open: Arc<OpenConnections>,
}

/// How many connections a listener has, over all workers. Touched when a connection begins and ends, never by a request.
#[derive(Debug, Default)]
pub(crate) struct OpenConnections(AtomicUsize);

impl OpenConnections {
    /// Counts one more, unless there are `max` already.
    pub(crate) fn begin(self: &Arc<Self>, max: usize) -> Option<OpenConnection> {
        if self.0.fetch_add(1, Ordering::Relaxed) >= max {
            self.0.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(OpenConnection(Arc::clone(self)))
    }
}

/// One of them.
#[derive(Debug)]
pub(crate) struct OpenConnection(Arc<OpenConnections>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Binds `workers` sockets to one address.
pub(crate) fn bind(address: SocketAddr, workers: usize) -> io::Result<Bound> {
    if address.port() != 0 {
        // With SO_REUSEPORT two instances of the same user would share a port without noticing, each with half of the
        // requests. A socket without it is refused while anybody listens there.
        socket(address, false)?;
    }
    let mut sockets = vec![socket(address, true)?];
    let bound = local_address(sockets.first())?;
    while sockets.len() < workers {
        sockets.push(socket(bound, true)?);
    }
    Ok(Bound { address: bound, sockets, open: Arc::default() })
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    if !shared {
        // Two sockets may be bound to one address as long as neither listens; only this finds a listener out.
        socket.listen(1)?;
    }
    Ok(socket)
}

fn local_address(socket: Option<&Socket>) -> io::Result<SocketAddr> {
    socket
        .and_then(|socket| socket.local_addr().ok()?.as_socket())
        .ok_or_else(|| io::Error::new(io::ErrorKind::AddrNotAvailable, "the bound address is unknown"))
}

/// Begins to listen.
pub(crate) fn listen(socket: Socket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_a_port_and_nobody_else_does() {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let bound = bind(loopback, 3).expect("a free port");
        assert_eq!(bound.sockets.len(), 3);
        for socket in &bound.sockets {
            assert_eq!(socket.local_addr().expect("an address").as_socket(), Some(bound.address));
        }
        let _listening: Vec<TcpListener> =
            bound.sockets.into_iter().map(|socket| listen(socket).expect("to listen")).collect();
        let refused = bind(bound.address, 1).expect_err("the port is in use");
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn counts_connections_to_the_limit() {
        let open = Arc::new(OpenConnections::default());
        let first = open.begin(2);
        let second = open.begin(2);
        assert!(first.is_some() && second.is_some());
        assert!(open.begin(2).is_none());
        drop(first);
        assert!(open.begin(2).is_some());
    }
}
