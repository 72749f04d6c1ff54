//! [`Connection`]: a TCP connection sent through a filter, piece by piece.

use std::fmt;

use bytes::Bytes;
use portcullis_abi::{ClosedBy, Direction, Ending, StreamInfo};

use crate::filter::Filter;
use crate::host::{Host, Inner, Mark, StreamKey, upstream_info};
use crate::message::LogLine;
use crate::stream::EndOfStream;
use crate::trace::Trace;

/// A TCP connection from a client, through a filter, to an upstream. It is closed when it is dropped, or with
/// [`Connection::close`].
///
/// The upstream is connected as soon as the filter lets the new connection pass.
pub struct Connection {
    host: Host,
    key: StreamKey,
    mark: Mark,
    closed: bool,
}

/// What came of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObservedConnection {
    /// Whether the upstream was connected.
    pub connected: bool,
    /// What the upstream got.
    pub upstream: Vec<u8>,
    /// Whether the upstream was told that nothing follows.
    pub upstream_ended: bool,
    /// What the client got.
    pub client: Vec<u8>,
    /// Whether the client was told that nothing follows.
    pub client_ended: bool,
    /// Why a filter, or the host in its place, closed the connection, if one did.
    pub closed: Option<String>,
    /// What was logged meanwhile.
    pub log: Vec<LogLine>,
    /// What passed between the host and the filters meanwhile.
    pub trace: Trace,
}

impl Filter {
    /// A client connects.
    pub fn connect(&self) -> Connection {
        self.connect_from(StreamInfo::default())
    }

    /// A client connects, of whom this is known.
    pub fn connect_from(&self, mut info: StreamInfo) -> Connection {
        let host = self.host.clone();
        let mut inner = host.inner.borrow_mut();
        inner.requests += 1;
        info.connection_id = inner.requests;
        info.start_unix_nanos = inner.unix_nanos();
        info.source_address = info.source_address.or(Some(([127, 0, 0, 1], 50_000).into()));
        info.destination_address = info.destination_address.or(Some(([127, 0, 0, 1], 80).into()));
        let mark = inner.mark();
        let (instance, worker) = (self.instance, self.worker);
        let filters: Vec<usize> = (0..self.names().len()).collect();
        let id = inner.instances[instance].workers[worker].worker.open_connection(&filters, info);
        let key = StreamKey { instance, worker, id };
        inner.connections.insert(key, ConnectionState::default());
        inner.settle();
        drop(inner);
        Connection { host, key, mark, closed: false }
    }
}

impl Connection {
    /// The client sends bytes. They reach the upstream as far as the filter lets them.
    ///
    /// # Panics
    /// If the upstream is not connected: a proxy does not read from the client before.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>, end: EndOfStream) -> &mut Connection {
        assert!(self.is_connected(), "a client is not read from before its upstream is connected\n{self}");
        self.data(Direction::Request, bytes.as_ref(), end)
    }

    /// The upstream sends bytes. They reach the client as far as the filter lets them.
    ///
    /// # Panics
    /// If the upstream is not connected.
    #[track_caller]
    pub fn upstream_sends(&mut self, bytes: impl AsRef<[u8]>, end: EndOfStream) -> &mut Connection {
        assert!(self.is_connected(), "the upstream is not connected\n{self}");
        self.data(Direction::Response, bytes.as_ref(), end)
    }

    fn data(&mut self, direction: Direction, bytes: &[u8], end: EndOfStream) -> &mut Connection {
        let bytes = Bytes::copy_from_slice(bytes);
        let mut inner = self.host.inner.borrow_mut();
        inner.worker(self.key).data(self.key.id, direction, bytes, end == EndOfStream::Yes);
        inner.settle();
        drop(inner);
        self
    }

    /// Whether the upstream is connected: not before the filter has let the new connection pass.
    pub fn is_connected(&self) -> bool {
        self.state().connected
    }

    /// Whether a filter, or the host in its place, has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.state().closed.is_some()
    }

    /// What has reached the upstream so far.
    pub fn upstream_received(&self) -> Vec<u8> {
        self.state().upstream
    }

    /// What has reached the client so far.
    pub fn received(&self) -> Vec<u8> {
        self.state().client
    }

    /// Ends the connection, and reports what came of it.
    pub fn close(mut self, by: ClosedBy) -> ObservedConnection {
        self.end(by)
    }

    fn state(&self) -> ConnectionState {
        self.host.inner.borrow().connections.get(&self.key).cloned().unwrap_or_default()
    }

    fn observed(&self, inner: &Inner) -> ObservedConnection {
        let since = inner.since(&self.mark);
        let state = inner.connections.get(&self.key).cloned().unwrap_or_default();
        ObservedConnection {
            connected: state.connected,
            upstream: state.upstream,
            upstream_ended: state.upstream_ended,
            client: state.client,
            client_ended: state.client_ended,
            closed: state.closed,
            log: since.log,
            trace: since.trace,
        }
    }

    fn end(&mut self, by: ClosedBy) -> ObservedConnection {
        self.closed = true;
        let mut inner = self.host.inner.borrow_mut();
        inner.worker(self.key).close_connection(self.key.id, by, Ending::default());
        inner.settle();
        let observed = self.observed(&inner);
        inner.connections.remove(&self.key);
        observed
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.closed {
            drop(self.end(ClosedBy::Remote));
        }
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.observed(&self.host.inner.borrow()).fmt(f)
    }
}

impl fmt::Display for ObservedConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ended = |ended: bool| if ended { ", then the end" } else { "" };
        match (&self.closed, self.connected) {
            (Some(details), _) => writeln!(f, "closed: {details}")?,
            (None, true) => writeln!(f, "open")?,
            (None, false) => writeln!(f, "the upstream is not connected")?,
        }
        writeln!(f, "upstream got: {}{}", crate::expectation::quoted(&self.upstream), ended(self.upstream_ended))?;
        writeln!(f, "client got: {}{}", crate::expectation::quoted(&self.client), ended(self.client_ended))?;
        for line in &self.log {
            writeln!(f, "log: {}: {}", line.level, line.message)?;
        }
        write!(f, "trace:\n{}", self.trace)
    }
}

/// One connection, seen from both ends.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConnectionState {
    pub(crate) wants_upstream: bool,
    connected: bool,
    upstream: Vec<u8>,
    upstream_ended: bool,
    client: Vec<u8>,
    client_ended: bool,
    pub(crate) closed: Option<String>,
}

impl ConnectionState {
    pub(crate) fn pass(&mut self, direction: Direction, bytes: &[u8], end: bool) {
        match direction {
            Direction::Request => {
                self.upstream.extend_from_slice(bytes);
                self.upstream_ended |= end;
            }
            Direction::Response => {
                self.client.extend_from_slice(bytes);
                self.client_ended |= end;
            }
        }
    }
}

impl Inner {
    /// Connects the upstreams that connections wait for. They are always there.
    pub(crate) fn connect_upstreams(&mut self) {
        for (key, connection) in &mut self.connections {
            if std::mem::take(&mut connection.wants_upstream) {
                connection.connected = true;
                let worker = &mut self.instances[key.instance].workers[key.worker].worker;
                worker.connected(key.id, upstream_info());
            }
        }
    }
}
