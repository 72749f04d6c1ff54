//! Connections to upstreams: opened, kept, reused and counted by one worker for itself.
//!
//! HTTP/1.1 connections are kept per endpoint while idle; an HTTP/2 connection carries many streams. A kept connection
//! can be closed by its server at the very moment it is used; [`Lease::send`] says whether a failed request can have
//! had any effect, and only where it cannot the caller may send it again.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use portcullis_abi::TlsInfo;
use portcullis_config::Endpoint;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use crate::connection::{peer_certificate, tls_version};
use crate::failure::UpstreamFailure;
use crate::grpc::Sending;
use crate::metrics::{Counter, Registry};
use crate::released::{BrokenOff, Released};
use crate::socket::{Line, Socket};

/// Idle connections kept per endpoint.
const IDLE_MAX: usize = 64;
/// How long a connection is kept unused. Below the 5 s after which common servers close theirs, so that we close first.
const IDLE_TIME: Duration = Duration::from_secs(4);
/// Bytes of a response's head, and its number of fields.
const RESPONSE_HEAD_BYTES_MAX: usize = 64 * 1024;
const RESPONSE_FIELDS_MAX: usize = 256;

/// Runs hyper's futures on the worker's own thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move {
            future.await;
        });
    }
}

/// TLS towards one upstream; made once per policy.
#[derive(Clone)]
pub(crate) struct UpstreamTls {
    pub(crate) connector: TlsConnector,
    pub(crate) server_name: ServerName<'static>,
}

/// One upstream, as one worker sees it.
pub(crate) struct Upstream {
    settings: portcullis_config::Upstream,
    tls: Option<UpstreamTls>,
    endpoints: Vec<EndpointState>,
    next: Cell<usize>,
    open: Cell<usize>,
    failures: Vec<Arc<Counter>>,
    connections: Arc<Counter>,
    warned: Cell<bool>,
}

#[derive(Default)]
struct EndpointState {
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Option<(http2::SendRequest<RequestBody>, Rc<Ends>)>>,
}

/// What is known of a connection.
#[derive(Default)]
pub(crate) struct Ends {
    pub(crate) peer: Option<SocketAddr>,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) tls: Option<TlsInfo>,
}

/// A kept connection, and since when it is unused.
struct Idle {
    sender: http1::SendRequest<RequestBody>,
    ends: Rc<Ends>,
    since: Instant,
}

/// A connection for bytes.
pub(crate) struct TcpLease {
    pub(crate) line: Line,
    pub(crate) ends: Ends,
    /// To be kept as long as the connection.
    pub(crate) slot: Slot,
}

/// A connection to send one request on.
pub(crate) struct Lease {
    upstream: Rc<Upstream>,
    endpoint: usize,
    sender: Sender,
    /// Whether the connection carried a request before.
    pub(crate) reused: bool,
    pub(crate) ends: Rc<Ends>,
}

enum Sender {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

/// A request that got no response.
pub(crate) struct SendFailure {
    pub(crate) failure: UpstreamFailure,
    /// No byte of it was written.
    pub(crate) unsent: bool,
    /// The connection ended without a byte of a response.
    pub(crate) unanswered: bool,
}

impl Upstream {
    pub(crate) fn new(
        settings: portcullis_config::Upstream,
        tls: Option<UpstreamTls>,
        registry: &Registry,
        worker: usize,
    ) -> Upstream {
        let failures = UpstreamFailure::ALL
            .iter()
            .map(|failure| {
                registry.counter(
                    worker,
                    "portcullis_upstream_failures_total",
                    "Requests and callouts that got no whole response, by upstream and reason.",
                    &[("upstream", &settings.name), ("reason", failure.name())],
                )
            })
            .collect();
        let connections = registry.counter(
            worker,
            "portcullis_upstream_connections_total",
            "Connections opened to upstreams.",
            &[("upstream", &settings.name)],
        );
        let endpoints = settings.endpoints.iter().map(|_| EndpointState::default()).collect();
        let (next, open, warned) = (Cell::new(0), Cell::new(0), Cell::new(false));
        Upstream { settings, tls, endpoints, next, open, failures, connections, warned }
    }

    pub(crate) fn name(&self) -> &str {
        &self.settings.name
    }

    /// The scheme, where HTTP/2 is spoken: there it is part of the request.
    pub(crate) fn http2_scheme(&self) -> Option<&'static str> {
        self.settings.http2.then_some(if self.tls.is_some() { "https" } else { "http" })
    }

    /// Says what is wrong with its settings, once: it happens anew with each request.
    pub(crate) fn warn_once(&self, problem: &str) {
        if !self.warned.replace(true) {
            tracing::warn!(upstream = self.name(), "{problem}");
        }
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        self.settings.request_timeout
    }

    pub(crate) fn count(&self, failure: UpstreamFailure) {
        if let Some(counter) =
            UpstreamFailure::ALL.iter().position(|each| *each == failure).and_then(|at| self.failures.get(at))
        {
            counter.increment();
        }
    }

    /// A connection to the endpoint whose turn it is: a kept one unless `fresh`, else a new one.
    pub(crate) async fn lease(self: &Rc<Self>, fresh: bool) -> Result<Lease, UpstreamFailure> {
        let endpoint = self.next.get() % self.endpoints.len().max(1);
        self.next.set(endpoint + 1);
        let Some((state, target)) = self.endpoints.get(endpoint).zip(self.settings.endpoints.get(endpoint)) else {
            return Err(UpstreamFailure::Connect);
        };
        if !fresh && let Some((sender, ends)) = state.take() {
            return Ok(Lease { upstream: Rc::clone(self), endpoint, sender, reused: true, ends });
        }
        let slot = self.slot()?;
        let connect = async {
            let (line, ends) = self.connect(target).await?;
            Ok((self.handshake(line, slot).await?, Rc::new(ends)))
        };
        let (sender, ends) = self.in_time(connect).await?;
        if let Sender::Http2(sender) = &sender {
            *state.shared.borrow_mut() = Some((sender.clone(), Rc::clone(&ends)));
        }
        Ok(Lease { upstream: Rc::clone(self), endpoint, sender, reused: false, ends })
    }

    /// A connection for bytes that are not HTTP, to the endpoint whose turn it is.
    pub(crate) async fn tcp(self: &Rc<Self>) -> Result<TcpLease, UpstreamFailure> {
        let endpoint = self.next.get() % self.endpoints.len().max(1);
        self.next.set(endpoint + 1);
        let target = self.settings.endpoints.get(endpoint).ok_or(UpstreamFailure::Connect)?;
        let slot = self.slot()?;
        let (line, ends) = self.in_time(self.connect(target)).await?;
        Ok(TcpLease { line, ends, slot })
    }

    /// A new connection's place among those that there may be.
    fn slot(self: &Rc<Self>) -> Result<Slot, UpstreamFailure> {
        if self.open.get() >= self.settings.max_connections && !self.close_an_idle_one() {
            return Err(UpstreamFailure::Overflow);
        }
        Ok(Slot::taken(self))
    }

    /// Bounds the time for a new connection, and counts it.
    async fn in_time<T>(
        &self,
        connect: impl Future<Output = Result<T, UpstreamFailure>>,
    ) -> Result<T, UpstreamFailure> {
        let connected = timeout(self.settings.connect_timeout, connect);
        let connected = connected.await.map_err(|_| UpstreamFailure::ConnectTimeout)??;
        self.connections.increment();
        Ok(connected)
    }

    /// Makes room for a connection to one endpoint at the expense of an unused one to another.
    fn close_an_idle_one(&self) -> bool {
        self.endpoints.iter().any(|state| state.idle.borrow_mut().pop().is_some())
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<(Line, Ends), UpstreamFailure> {
        let socket = match endpoint {
            Endpoint::Address(address) => connect_tcp(&[*address]).await?,
            Endpoint::Name { host, port } => {
                let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), *port))
                    .await
                    .map_err(|_| UpstreamFailure::Resolve)?
                    .collect();
                if addresses.is_empty() {
                    return Err(UpstreamFailure::Resolve);
                }
                connect_tcp(&addresses).await?
            }
            Endpoint::Unix(path) => {
                Socket::Unix(UnixStream::connect(path).await.map_err(|_| UpstreamFailure::Connect)?)
            }
        };
        let ends = match &socket {
            Socket::Tcp(stream) => Ends { peer: stream.peer_addr().ok(), local: stream.local_addr().ok(), tls: None },
            Socket::Unix(_) => Ends::default(),
        };
        let Some(tls) = &self.tls else { return Ok((Line::Plain(socket), ends)) };
        let stream = tls.connector.connect(tls.server_name.clone(), socket).await.map_err(|error| {
            tracing::warn!(upstream = self.name(), %error, "TLS with the upstream failed");
            UpstreamFailure::Connect
        })?;
        let session = stream.get_ref().1;
        if self.settings.http2 && session.alpn_protocol() != Some(b"h2") {
            tracing::warn!(upstream = self.name(), "the upstream does not offer HTTP/2 (ALPN h2)");
            return Err(UpstreamFailure::Protocol);
        }
        let info = TlsInfo {
            version: tls_version(session.protocol_version()),
            server_name: tls.server_name.to_str().into_owned(),
            local_certificate: None,
            peer_certificate: peer_certificate(session.peer_certificates()),
        };
        Ok((Line::Tls(Box::new(stream.into())), Ends { tls: Some(info), ..ends }))
    }

    async fn handshake(&self, line: Line, slot: Slot) -> Result<Sender, UpstreamFailure> {
        let io = TokioIo::new(line);
        if self.settings.http2 {
            let (sender, connection) = http2::Builder::new(LocalExecutor)
                .timer(TokioTimer::new())
                .max_header_list_size(RESPONSE_HEAD_BYTES_MAX as u32)
                .keep_alive_interval(Duration::from_secs(20))
                .keep_alive_timeout(Duration::from_secs(10))
                .handshake(io)
                .await
                .map_err(|_| UpstreamFailure::Protocol)?;
            drive(connection, slot);
            Ok(Sender::Http2(sender))
        } else {
            let (sender, connection) = http1::Builder::new()
                .max_headers(RESPONSE_FIELDS_MAX)
                .max_buf_size(RESPONSE_HEAD_BYTES_MAX)
                .max_header_size(RESPONSE_HEAD_BYTES_MAX)
                .handshake(io)
                .await
                .map_err(|_| UpstreamFailure::Protocol)?;
            drive(connection, slot);
            Ok(Sender::Http1(sender))
        }
    }

    /// Closes connections that were unused for too long; called now and then by the worker.
    pub(crate) fn close_idle(&self) {
        let now = Instant::now();
        for state in &self.endpoints {
            state
                .idle
                .borrow_mut()
                .retain(|idle| !idle.sender.is_closed() && now.duration_since(idle.since) < IDLE_TIME);
        }
    }

    fn keep(&self, endpoint: usize, sender: http1::SendRequest<RequestBody>, ends: Rc<Ends>) {
        let Some(state) = self.endpoints.get(endpoint) else { return };
        let mut idle = state.idle.borrow_mut();
        if idle.len() < IDLE_MAX {
            idle.push(Idle { sender, ends, since: Instant::now() });
        }
    }
}

impl EndpointState {
    fn take(&self) -> Option<(Sender, Rc<Ends>)> {
        let mut shared = self.shared.borrow_mut();
        if let Some((sender, ends)) = shared.as_ref() {
            if sender.is_ready() {
                return Some((Sender::Http2(sender.clone()), Rc::clone(ends)));
            }
            *shared = None;
        }
        let mut idle = self.idle.borrow_mut();
        while let Some(Idle { sender, ends, since }) = idle.pop() {
            if sender.is_ready() && since.elapsed() < IDLE_TIME {
                return Some((Sender::Http1(sender), ends));
            }
        }
        None
    }
}

async fn connect_tcp(addresses: &[SocketAddr]) -> Result<Socket, UpstreamFailure> {
    let stream = TcpStream::connect(addresses).await.map_err(|_| UpstreamFailure::Connect)?;
    // Messages are written whole; waiting for more would only delay them.
    drop(stream.set_nodelay(true));
    Ok(Socket::Tcp(stream))
}

/// Runs a connection until it ends, and with it its slot.
fn drive<C, E>(connection: C, slot: Slot)
where
    C: Future<Output = Result<(), E>> + 'static,
{
    tokio::task::spawn_local(async move {
        // How it ended is told to whoever waits for a response; an idle connection's end concerns nobody.
        drop(connection.await);
        drop(slot);
    });
}

/// One of the connections that an upstream may have.
pub(crate) struct Slot(Rc<Upstream>);

impl Slot {
    fn taken(upstream: &Rc<Upstream>) -> Slot {
        upstream.open.set(upstream.open.get() + 1);
        Slot(Rc::clone(upstream))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get().saturating_sub(1));
    }
}

impl Lease {
    /// Sends the request and waits for the head of the response.
    pub(crate) async fn send(
        &mut self,
        request: http::Request<RequestBody>,
    ) -> Result<http::Response<Incoming>, SendFailure> {
        let result = match &mut self.sender {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            Sender::Http2(sender) => sender.try_send_request(request).await,
        };
        let response = result.map_err(|mut failed| {
            let unsent = failed.take_message().is_some();
            let error = failed.into_error();
            let unanswered = unsent || error.is_incomplete_message() || error.is_canceled() || is_reset(&error);
            SendFailure { failure: failure_of(&error), unsent, unanswered }
        })?;
        // hyper drops a length that follows a coding; both in the other order reach us. Whichever the server meant,
        // it is not a server to share a connection with.
        let ambiguous = response.headers().contains_key(http::header::TRANSFER_ENCODING)
            && response.headers().contains_key(http::header::CONTENT_LENGTH);
        if ambiguous || response.status().is_informational() {
            return Err(SendFailure { failure: UpstreamFailure::Protocol, unsent: false, unanswered: false });
        }
        Ok(response)
    }

    /// Keeps the connection for another request. Only after the response was read to its end.
    pub(crate) fn give_back(self) {
        let Lease { upstream, endpoint, sender, ends, .. } = self;
        let Sender::Http1(mut sender) = sender else { return };
        if sender.is_ready() {
            upstream.keep(endpoint, sender, ends);
        } else if !sender.is_closed() {
            // hyper is a moment behind: it has yet to see that the message ended.
            tokio::task::spawn_local(async move {
                if matches!(timeout(IDLE_TIME, sender.ready()).await, Ok(Ok(()))) {
                    upstream.keep(endpoint, sender, ends);
                }
            });
        }
    }
}

fn is_reset(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted
            );
        }
        source = error.source();
    }
    false
}

/// What an error of hyper's client means.
pub(crate) fn failure_of(error: &hyper::Error) -> UpstreamFailure {
    if is_broken_request(error) {
        // Longer or shorter than its head says: only a filter's edit can do that. (Where the client broke it off, the
        // request is over already.)
        UpstreamFailure::Unsendable
    } else if error.is_incomplete_message() || error.is_canceled() || error.is_closed() || is_reset(error) {
        UpstreamFailure::Terminated
    } else if error.is_parse() || error.is_parse_status() {
        UpstreamFailure::Protocol
    } else {
        UpstreamFailure::Reset
    }
}

fn is_broken_request(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.is::<BrokenOff>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// The body of a request to an upstream.
pub(crate) enum RequestBody {
    Empty,
    Whole(Option<Bytes>),
    Released(Released),
    Grpc(Sending),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match self.get_mut() {
            RequestBody::Empty => Poll::Ready(None),
            RequestBody::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            RequestBody::Released(released) => released.poll_frame(cx),
            RequestBody::Grpc(sending) => sending.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            RequestBody::Empty => true,
            RequestBody::Whole(bytes) => bytes.is_none(),
            RequestBody::Released(released) => released.is_done(),
            RequestBody::Grpc(sending) => sending.is_done(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            RequestBody::Empty => SizeHint::with_exact(0),
            RequestBody::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            RequestBody::Released(released) => released.left().map_or_else(SizeHint::default, SizeHint::with_exact),
            RequestBody::Grpc(_) => SizeHint::default(),
        }
    }
}
