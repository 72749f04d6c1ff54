//! One client's connection: TLS, which HTTP it speaks, and its end.
//!
//! HTTP/1.x goes through the [`Gate`]. HTTP/2 is recognised by ALPN or, without TLS, by its preface.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use portcullis_abi::{Certificate, ConnectionState, TlsInfo};
use portcullis_config::ListenerLimits;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::server::TlsStream;

use crate::certificate;
use crate::framing::HeadLimits;
use crate::gate::{Gate, GateState, GateTimes};
use crate::outbox::Bell;
use crate::plan::ServerTls;
use crate::rewind::Rewind;
use crate::serve::serve;
use crate::stall::Stall;
use crate::upstream::LocalExecutor;
use crate::worker::{Phase, WorkerState};

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Streams at a time on one HTTP/2 connection. Envoy's recommendation for an edge.
const HTTP2_STREAMS_MAX: u32 = 100;
/// Bytes of a request's body that a client may send ahead, per stream and per connection; Envoy's recommendation.
const HTTP2_STREAM_WINDOW: u32 = 64 * 1024;
const HTTP2_CONNECTION_WINDOW: u32 = 1024 * 1024;

/// What the requests of one connection have in common.
pub(crate) struct Connection {
    pub(crate) worker: Rc<WorkerState>,
    pub(crate) gate: Rc<GateState>,
    pub(crate) id: u64,
    pub(crate) peer: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) listener_name: Arc<str>,
    pub(crate) limits: ListenerLimits,
    pub(crate) tls: Option<TlsInfo>,
    /// What filters keep with the connection.
    pub(crate) state: ConnectionState,
    requests: Cell<u64>,
    aborted: Cell<bool>,
    abort: Bell,
}

impl Connection {
    /// The number of the next request; the first is 1.
    pub(crate) fn next_request(&self) -> u64 {
        let number = self.requests.get() + 1;
        self.requests.set(number);
        number
    }

    /// Ends the connection at once.
    pub(crate) fn abort(&self) {
        self.aborted.set(true);
        self.abort.ring();
    }
}

/// An accepted socket and what is known of it.
pub(crate) struct Accepted {
    pub(crate) stream: TcpStream,
    pub(crate) peer: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) listener_name: Arc<str>,
    pub(crate) limits: ListenerLimits,
    pub(crate) tls: Option<ServerTls>,
    pub(crate) phase: watch::Receiver<Phase>,
}

/// Serves a connection to its end.
pub(crate) async fn run(worker: Rc<WorkerState>, accepted: Accepted) {
    let Accepted { stream, peer, local, listener_name, limits, tls, phase } = accepted;
    // Responses are written whole; waiting for more would only delay them.
    drop(stream.set_nodelay(true));
    let stream = Stall::new(stream, limits.stream_idle_timeout);
    let connection = |tls| {
        Rc::new(Connection {
            gate: Rc::new(GateState::default()),
            id: worker.next_connection(),
            worker: Rc::clone(&worker),
            peer,
            local,
            listener_name: Arc::clone(&listener_name),
            limits,
            tls,
            state: ConnectionState::default(),
            requests: Cell::new(0),
            aborted: Cell::new(false),
            abort: Bell::default(),
        })
    };
    match tls {
        None => detect(connection(None), stream, phase).await,
        Some(tls) => {
            let Some((stream, info)) = handshake(&worker, peer, tls, stream, limits.header_timeout).await else {
                return;
            };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let connection = connection(Some(info));
            if http2 {
                run_http2(connection, stream, phase).await;
            } else {
                run_http1(connection, stream, BytesMut::new(), phase).await;
            }
        }
    }
}

/// Begins TLS with a client; `None` where that fails.
pub(crate) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    worker: &WorkerState,
    peer: SocketAddr,
    tls: ServerTls,
    stream: S,
    time: Duration,
) -> Option<(TlsStream<S>, TlsInfo)> {
    let stream = match tokio::time::timeout(time, tls.acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            worker.metrics.tls_failures.increment();
            tracing::debug!(client = %peer.ip(), %error, "TLS handshake failed");
            return None;
        }
        Err(_) => {
            worker.metrics.tls_failures.increment();
            return None;
        }
    };
    let session = stream.get_ref().1;
    let info = TlsInfo {
        version: tls_version(session.protocol_version()),
        server_name: session.server_name().unwrap_or_default().to_owned(),
        local_certificate: tls.certificate,
        peer_certificate: peer_certificate(session.peer_certificates()),
    };
    Some((stream, info))
}

/// As Envoy and OpenSSL write it.
pub(crate) fn tls_version(version: Option<rustls::ProtocolVersion>) -> String {
    match version {
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3".into(),
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2".into(),
        _ => String::new(),
    }
}

/// The certificate that the other side presented; rustls has accepted it.
pub(crate) fn peer_certificate(chain: Option<&[CertificateDer<'_>]>) -> Option<Arc<Certificate>> {
    chain?.first().and_then(certificate::read).map(Arc::new)
}

/// Tells HTTP/2 with prior knowledge from HTTP/1.x by the first bytes.
async fn detect(connection: Rc<Connection>, mut stream: Stall<TcpStream>, phase: watch::Receiver<Phase>) {
    let mut begin = BytesMut::with_capacity(4096);
    let time = connection.limits.idle_timeout;
    let first = tokio::time::timeout(time, async {
        while begin.len() < HTTP2_PREFACE.len() && HTTP2_PREFACE.starts_with(&begin) {
            if stream.read_buf(&mut begin).await? == 0 {
                return Ok(false);
            }
        }
        Ok::<bool, std::io::Error>(!begin.is_empty())
    });
    let mut stopped = phase.clone();
    let something = tokio::select! {
        first = first => matches!(first, Ok(Ok(true))),
        // A connection on which nothing was ever sent may go at once.
        _ = stopped.wait_for(|phase| *phase > Phase::Open) => false,
    };
    if !something {
        return;
    }
    if begin.starts_with(HTTP2_PREFACE) {
        run_http2(connection, Rewind::new(begin, stream), phase).await;
    } else {
        run_http1(connection, stream, begin, phase).await;
    }
}

async fn run_http1<S>(connection: Rc<Connection>, stream: S, begin: BytesMut, phase: watch::Receiver<Phase>)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let limits = HeadLimits { bytes_max: connection.limits.header_bytes, fields_max: connection.limits.header_count };
    let times = GateTimes { head: connection.limits.header_timeout, idle: connection.limits.idle_timeout };
    let gate = Gate::new(stream, begin, limits, times, Rc::clone(&connection.gate));
    let mut builder = http1::Builder::new();
    // The gate has its own limits and times; hyper's must only not be tighter.
    builder.header_read_timeout(None).max_buf_size((limits.bytes_max + 16 * 1024).max(64 * 1024));
    if limits.fields_max > 100 {
        builder.max_headers(limits.fields_max);
    }
    let served = Rc::clone(&connection);
    let service = service_fn(move |request| serve(Rc::clone(&served), request));
    let mut http = pin!(builder.serve_connection(TokioIo::new(gate), service));
    let mut draining = pin!(reached(phase.clone(), Phase::Draining));
    let mut closing = pin!(reached(phase, Phase::Closing));
    let mut graceful = false;
    poll_fn(|cx| {
        if connection.aborted.get() || closing.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        connection.abort.wait(cx);
        if !graceful && draining.as_mut().poll(cx).is_ready() {
            graceful = true;
            http.as_mut().graceful_shutdown();
        }
        http.as_mut().poll(cx).map(|_| ())
    })
    .await;
}

async fn run_http2<S>(connection: Rc<Connection>, stream: S, phase: watch::Receiver<Phase>)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let mut builder = http2::Builder::new(LocalExecutor);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .max_header_list_size(u32::try_from(connection.limits.header_bytes).unwrap_or(u32::MAX))
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_send_buf_size(crate::outbox::HIGH_WATER);
    let served = Rc::clone(&connection);
    let service = service_fn(move |request| serve(Rc::clone(&served), request));
    let mut http = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut closing = pin!(reached(phase.clone(), Phase::Closing));
    let ending = Cell::new(false);
    let mut over = pin!(async {
        tokio::select! {
            () = idle(&connection) => {}
            () = reached(phase, Phase::Draining) => {}
        }
        ending.set(true);
        // hyper ends a connection gracefully by a question to the client, to which some never answer.
        loop {
            tokio::time::sleep(connection.limits.header_timeout).await;
            if connection.gate.in_flight() == 0 {
                return;
            }
        }
    });
    let mut graceful = false;
    poll_fn(|cx| {
        let over = over.as_mut().poll(cx).is_ready();
        if over || connection.aborted.get() || closing.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        connection.abort.wait(cx);
        if !graceful && ending.get() {
            graceful = true;
            http.as_mut().graceful_shutdown();
        }
        http.as_mut().poll(cx).map(|_| ())
    })
    .await;
}

/// Ends when a phase is reached.
pub(crate) async fn reached(mut phase: watch::Receiver<Phase>, wanted: Phase) {
    if phase.wait_for(|phase| *phase >= wanted).await.is_err() {
        // The worker is gone, and this task with it in a moment.
        std::future::pending::<()>().await;
    }
}

/// Ends when no request was begun or under way for the idle time.
async fn idle(connection: &Connection) {
    loop {
        let before = connection.requests.get();
        tokio::time::sleep(connection.limits.idle_timeout).await;
        if connection.gate.in_flight() == 0 && connection.requests.get() == before {
            return;
        }
    }
}
