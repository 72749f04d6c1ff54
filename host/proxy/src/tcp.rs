//! One TCP connection that is forwarded: from the client's first byte, or TLS handshake, to the last line in the log.
//!
//! The filters decide when it reaches the upstream and what passes either way; see [`portcullis_abi::Worker::open_connection`].
//! Here are the sockets: bytes are read as long as the filters and the receiver take them, so a slow receiver slows its
//! sender down. Either side may finish alone; one that breaks off is passed on as a break, not as an end.

use std::borrow::Cow;
use std::future::{Future, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use portcullis_abi::{ClosedBy, Direction, Ending, StreamId, StreamInfo, TlsInfo, UpstreamInfo};
use portcullis_config::{ListenerLimits, TcpForward};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use crate::access_log::TcpEntry;
use crate::connection::{Accepted, handshake, reached};
use crate::core::{Core, unix_nanos};
use crate::failure::{UpstreamFailure, flag};
use crate::relay::{Pipe, Relay};
use crate::socket::{Line, Socket};
use crate::upstream::TcpLease;
use crate::worker::{Phase, WorkerState};

/// Bytes read at a time, onto the stack: connections that wait hold no buffer.
const READ_BYTES: usize = 32 * 1024;
/// How long what was let pass may take to leave once the connection is over.
const FLUSH_TIME: Duration = Duration::from_secs(10);
/// How long, and how much, a client that is closed may go on sending: its bytes in flight would otherwise make the
/// system throw away what it was sent.
const LINGER_TIME: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 256 * 1024;

/// Serves a connection to its end.
pub(crate) async fn run(worker: Rc<WorkerState>, core: Rc<Core>, accepted: Accepted, forward: TcpForward) {
    let Accepted { stream, peer, local, listener_name, limits, tls, phase } = accepted;
    // Who waits for whom only the two ends know; holding bytes back could only delay them.
    drop(stream.set_nodelay(true));
    let (client, tls) = match tls {
        None => (Line::Plain(Socket::Tcp(stream)), None),
        Some(tls) => match handshake(&worker, peer, tls, Socket::Tcp(stream), limits.header_timeout).await {
            Some((stream, info)) => (Line::Tls(Box::new(stream.into())), Some(info)),
            None => return,
        },
    };
    let started = Instant::now();
    let id = worker.next_connection();
    let info = stream_info(&core, &forward, id, peer, local, &listener_name, tls);
    worker.metrics.tcp.begins();
    let relay = Rc::new(Relay::default());
    let stream = core.open_connection(&forward.filters, info, &relay);
    let mut session = Session {
        core: Rc::clone(&core),
        relay,
        stream,
        limits,
        upstream: forward.upstream,
        upstream_address: None,
        received: 0,
        sent: 0,
    };
    let end = session.serve(client, phase, worker.drain_time).await;

    let duration = started.elapsed();
    let ending = Ending { duration, response_code_details: end.details().into_owned(), response_flags: end.flags() };
    core.close_connection(stream, end.closed_by(), ending);
    worker.metrics.tcp.ends(end.reason());
    worker.access_log.write_tcp(&TcpEntry {
        details: &end.details(),
        flags: end.flags(),
        duration,
        received_bytes: session.received,
        sent_bytes: session.sent,
        connection: id,
        client: SocketAddr::new(peer.ip().to_canonical(), peer.port()),
        listener: &listener_name,
        upstream: core.upstreams.get(forward.upstream).map_or("", |upstream| upstream.name()),
        upstream_address: session.upstream_address,
    });
}

fn stream_info(
    core: &Core,
    forward: &TcpForward,
    id: u64,
    peer: SocketAddr,
    local: SocketAddr,
    listener_name: &Arc<str>,
    tls: Option<TlsInfo>,
) -> StreamInfo {
    let mut info = StreamInfo::default();
    info.source_address = Some(peer);
    info.destination_address = Some(local);
    info.start_unix_nanos = unix_nanos();
    info.connection_id = id;
    info.tls = tls;
    info.route = core.plan.tcp_info(forward);
    info.filter_chain_name = portcullis_config::envoy::TCP_FILTER_CHAIN_NAME;
    info.listener_name = Arc::clone(listener_name);
    info.buffer_bytes_max = core.plan.buffer_bytes(&forward.filters);
    info
}

/// How a connection came to its end.
#[derive(Clone, Debug)]
enum End {
    /// Both sides have finished; the last was the client, or not.
    Finished { client_last: bool },
    /// The client broke off.
    ClientGone,
    /// The upstream broke off.
    UpstreamGone,
    /// The upstream could not be reached.
    Unreachable(UpstreamFailure),
    /// A filter closed it, or failed: the word for it.
    Filter(Rc<str>),
    /// No byte moved for too long.
    Idle,
    /// The host ends, or the policy that it began under was replaced a while ago.
    Cut { reloaded: bool },
}

impl End {
    fn closed_by(&self) -> ClosedBy {
        match self {
            End::Finished { client_last: true } | End::ClientGone => ClosedBy::Remote,
            _ => ClosedBy::Local,
        }
    }

    /// The label in metrics.
    fn reason(&self) -> &'static str {
        match self {
            End::Finished { .. } => "finished",
            End::ClientGone => "client",
            End::UpstreamGone => "upstream",
            End::Unreachable(_) => "unreachable",
            End::Filter(details) if details.starts_with("wasm_fail_stream") => "filter_failed",
            End::Filter(_) => "filter",
            End::Idle => "idle",
            End::Cut { .. } => "cut",
        }
    }

    /// Envoy's words, where it has any.
    fn details(&self) -> Cow<'static, str> {
        match self {
            End::Finished { .. } => "".into(),
            End::ClientGone => "downstream_remote_disconnect".into(),
            End::UpstreamGone => "upstream_reset".into(),
            End::Unreachable(failure) => format!("upstream_unreachable{{{}}}", failure.name()).into(),
            End::Filter(details) => details.to_string().into(),
            End::Idle => "tcp_session_idle_timeout".into(),
            End::Cut { reloaded: true } => "policy_replaced".into(),
            End::Cut { reloaded: false } => "server_ends".into(),
        }
    }

    fn flags(&self) -> u64 {
        match self {
            End::Unreachable(failure) => failure.flags(),
            End::UpstreamGone => flag::UPSTREAM_REMOTE_RESET,
            _ => 0,
        }
    }
}

struct Session {
    core: Rc<Core>,
    relay: Rc<Relay>,
    stream: StreamId,
    limits: ListenerLimits,
    upstream: usize,
    upstream_address: Option<SocketAddr>,
    received: u64,
    sent: u64,
}

impl Session {
    async fn serve(&mut self, client: Line, phase: watch::Receiver<Phase>, drain_time: Duration) -> End {
        let core = Rc::clone(&self.core);
        let mut cut = pin!(async {
            tokio::select! {
                () = reached(phase, Phase::Closing) => false,
                () = core.retired_for(drain_time) => true,
            }
        });
        let mut idle = Idle::new(self.limits.idle_timeout);
        let mut asked = Instant::now();
        let connected = tokio::select! {
            connected = self.connect(&mut asked) => connected,
            () = &mut idle => Err(End::Idle),
            reloaded = &mut cut => Err(End::Cut { reloaded }),
        };
        let mut client = Side::new(client);
        let (mut upstream, _lease) = match connected {
            Ok(TcpLease { line, ends, slot }) => {
                self.upstream_address = ends.peer;
                let info = UpstreamInfo {
                    address: ends.peer,
                    local_address: ends.local,
                    tls: ends.tls,
                    attempts: 1,
                    ready_after: Some(asked.elapsed()),
                    ..UpstreamInfo::default()
                };
                self.core.with(|filters| filters.connected(self.stream, info));
                idle.touch();
                (Side::new(line), slot)
            }
            Err(end) => {
                self.dismiss(&mut client, &end).await;
                return end;
            }
        };
        let end = poll_fn(|cx| {
            if let Poll::Ready(end) = self.poll_relay(cx, &mut client, &mut upstream, &mut idle) {
                return Poll::Ready(end);
            }
            cut.as_mut().poll(cx).map(|reloaded| End::Cut { reloaded })
        })
        .await;
        match &end {
            End::ClientGone if client.broken => upstream.line.abort_on_close(),
            End::Finished { .. } | End::ClientGone => {
                let sent = timeout(FLUSH_TIME, poll_fn(|cx| upstream.poll_rest(cx, &self.relay.to_upstream))).await;
                if !matches!(sent, Ok(Ok(()))) {
                    upstream.line.abort_on_close();
                }
            }
            End::UpstreamGone if upstream.broken => {
                client.line.abort_on_close();
                return end;
            }
            _ => {}
        }
        // The upstream first: it is done, while the client may take a while.
        drop(upstream);
        self.dismiss(&mut client, &end).await;
        end
    }

    /// Waits until every filter has let the connection pass, then connects, and says from when on.
    async fn connect(&self, asked: &mut Instant) -> Result<TcpLease, End> {
        poll_fn(|cx| {
            if let Some(details) = self.relay.closing.borrow().clone() {
                return Poll::Ready(Err(End::Filter(details)));
            }
            if self.relay.wants_upstream.get() {
                return Poll::Ready(Ok(()));
            }
            self.relay.changed.wait(cx);
            Poll::Pending
        })
        .await?;
        *asked = Instant::now();
        let Some(upstream) = self.core.upstreams.get(self.upstream) else {
            return Err(End::Unreachable(UpstreamFailure::Resolve));
        };
        let closed = poll_fn(|cx| {
            if let Some(details) = self.relay.closing.borrow().clone() {
                return Poll::Ready(End::Filter(details));
            }
            self.relay.changed.wait(cx);
            Poll::Pending
        });
        tokio::select! {
            connected = upstream.tcp() => connected.map_err(|failure| {
                upstream.count(failure);
                End::Unreachable(failure)
            }),
            end = closed => Err(end),
        }
    }

    /// Moves bytes both ways as far as they go.
    fn poll_relay(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Side,
        upstream: &mut Side,
        idle: &mut Idle,
    ) -> Poll<End> {
        let relay = Rc::clone(&self.relay);
        loop {
            if let Some(details) = relay.closing.borrow().clone() {
                return Poll::Ready(End::Filter(details));
            }
            let mut moved = false;
            match client.poll_write(cx, &relay.to_client) {
                Ok(written) => {
                    self.sent += written.bytes as u64;
                    self.core.metrics.tcp.sent.add(written.bytes as u64);
                    moved |= written.moved;
                }
                Err(_) => {
                    client.broken = true;
                    return Poll::Ready(End::ClientGone);
                }
            }
            match upstream.poll_write(cx, &relay.to_upstream) {
                Ok(written) => moved |= written.moved,
                Err(_) => {
                    upstream.broken = true;
                    return Poll::Ready(End::UpstreamGone);
                }
            }
            if client.read_ended && client.is_shut() {
                return Poll::Ready(End::Finished { client_last: false });
            }
            // Nothing more can come from the upstream, not even if a filter holds some of it: nobody can release that.
            if upstream.read_ended && upstream.is_shut() && client.is_flushed(&relay.to_client) {
                return Poll::Ready(End::Finished { client_last: false });
            }
            match self.read(cx, client, Direction::Request) {
                Ok(read) => moved |= read,
                Err(error) => {
                    client.broken = is_break(&error);
                    return Poll::Ready(End::ClientGone);
                }
            }
            if client.read_ended && client.is_shut() && !relay.is_closing() {
                return Poll::Ready(End::Finished { client_last: true });
            }
            match self.read(cx, upstream, Direction::Response) {
                Ok(read) => moved |= read,
                Err(error) => {
                    upstream.broken = is_break(&error);
                    return Poll::Ready(End::UpstreamGone);
                }
            }
            if moved {
                idle.touch();
                continue;
            }
            relay.changed.wait(cx);
            return Pin::new(idle).poll(cx).map(|()| End::Idle);
        }
    }

    /// Hands what a side has sent to the filters, if they and the other side take it; says whether there was anything.
    fn read(&mut self, cx: &mut Context<'_>, side: &mut Side, direction: Direction) -> io::Result<bool> {
        let wanted = self.core.may_read(self.stream, direction) && self.relay.pipe(direction).has_room();
        if side.read_ended || !wanted {
            return Ok(false);
        }
        let mut space = [MaybeUninit::<u8>::uninit(); READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut space);
        match Pin::new(&mut side.line).poll_read(cx, &mut buffer) {
            Poll::Pending => return Ok(false),
            Poll::Ready(result) => result?,
        }
        let bytes = Bytes::copy_from_slice(buffer.filled());
        side.read_ended = bytes.is_empty();
        if direction == Direction::Request {
            self.received += bytes.len() as u64;
            self.core.metrics.tcp.received.add(bytes.len() as u64);
        }
        self.core.with(|filters| filters.data(self.stream, direction, bytes, side.read_ended));
        Ok(true)
    }

    /// Lets the client have what passed, and closes.
    async fn dismiss(&mut self, client: &mut Side, end: &End) {
        if matches!(end, End::ClientGone) || client.is_shut() {
            return;
        }
        let rest = poll_fn(|cx| {
            let written = client.poll_write(cx, &self.relay.to_client)?;
            self.sent += written.bytes as u64;
            self.core.metrics.tcp.sent.add(written.bytes as u64);
            if client.is_flushed(&self.relay.to_client) { Poll::Ready(io::Result::Ok(())) } else { Poll::Pending }
        });
        if !matches!(timeout(FLUSH_TIME, rest).await, Ok(Ok(()))) {
            return;
        }
        drop(timeout(FLUSH_TIME, client.line.shutdown()).await);
        if !client.read_ended {
            drop(timeout(LINGER_TIME, client.discard()).await);
        }
    }
}

/// Whether the peer broke off: its bytes until then are not the whole. The end of TLS without its notice is one, since
/// anybody on the way can cause it.
fn is_break(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof)
}

/// One end of the connection.
struct Side {
    line: Line,
    /// It has finished sending.
    read_ended: bool,
    writing: Writing,
    /// It broke off rather than finished.
    broken: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    /// All that was written has left.
    Flushed,
    /// Some of it may wait in the TLS session.
    Unflushed,
    /// The end was sent.
    Shut,
}

struct Written {
    bytes: usize,
    /// Something happened, be it only that the end was sent.
    moved: bool,
}

impl Side {
    fn new(line: Line) -> Side {
        Side { line, read_ended: false, writing: Writing::Flushed, broken: false }
    }

    fn is_shut(&self) -> bool {
        self.writing == Writing::Shut
    }

    fn is_flushed(&self, pipe: &Pipe) -> bool {
        pipe.is_empty() && self.writing != Writing::Unflushed
    }

    /// Writes what is in the pipe, as much as the socket takes, and the end behind it.
    fn poll_write(&mut self, cx: &mut Context<'_>, pipe: &Pipe) -> io::Result<Written> {
        let mut written = Written { bytes: 0, moved: false };
        if self.is_shut() {
            return Ok(written);
        }
        while let Some(front) = pipe.front() {
            match Pin::new(&mut self.line).poll_write(cx, &front) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(count)) => {
                    pipe.advance(count);
                    written.bytes += count;
                    written.moved = true;
                    self.writing = Writing::Unflushed;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(written),
            }
        }
        if self.writing == Writing::Unflushed {
            match Pin::new(&mut self.line).poll_flush(cx)? {
                Poll::Ready(()) => self.writing = Writing::Flushed,
                Poll::Pending => return Ok(written),
            }
        }
        if pipe.is_ended() {
            match Pin::new(&mut self.line).poll_shutdown(cx)? {
                Poll::Ready(()) => {
                    self.writing = Writing::Shut;
                    written.moved = true;
                }
                Poll::Pending => {}
            }
        }
        Ok(written)
    }

    /// Ready when all of the pipe has left, with the end.
    fn poll_rest(&mut self, cx: &mut Context<'_>, pipe: &Pipe) -> Poll<io::Result<()>> {
        self.poll_write(cx, pipe)?;
        if self.is_shut() {
            return Poll::Ready(Ok(()));
        }
        if self.is_flushed(pipe) && !pipe.is_ended() {
            // What passed was not the whole, but it is over.
            return Pin::new(&mut self.line).poll_shutdown(cx);
        }
        Poll::Pending
    }

    async fn discard(&mut self) {
        let mut space = [0; 4096];
        let mut left = LINGER_BYTES_MAX;
        while let Ok(count @ 1..) = self.line.read(&mut space).await {
            left = left.saturating_sub(count);
            if left == 0 {
                return;
            }
        }
    }
}

/// Ready when nothing was touched for a time.
struct Idle {
    time: Duration,
    touched: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl Idle {
    fn new(time: Duration) -> Idle {
        let touched = Instant::now();
        Idle { time, touched, sleep: Box::pin(sleep_until(touched + time)) }
    }

    fn touch(&mut self) {
        self.touched = Instant::now();
    }
}

impl Future for Idle {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            std::task::ready!(self.sleep.as_mut().poll(cx));
            // Moved only when it has run out: that is once in the idle time rather than with every byte.
            let due = self.touched + self.time;
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            self.sleep.as_mut().reset(due);
        }
    }
}
