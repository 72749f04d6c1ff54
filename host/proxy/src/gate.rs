//! The gate between a client's socket and hyper: lets through whole heads and framed bodies, and nothing else.
//!
//! hyper reads from a [`Gate`]; the gate reads from the socket and asks [`crate::framing`] what may pass. A request that
//! may not is replaced by a marked empty one, which the service answers with the error in its turn (after the
//! responses of requests before it in the pipeline), and nothing is read after it. The gate also keeps the time: a
//! head that is slow to arrive is answered with 408, an idle connection is closed.
//!
//! When a connection ends while the client may still be sending, closing at once would make the kernel answer with a
//! reset, which can destroy the response in flight (RFC 9112, section 9.6); [`Gate::poll_shutdown`] therefore reads on
//! for a moment.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::framing::{Framing, HeadLimits, Step, Violation};

/// Bytes read from the socket at a time.
const READ_BYTES: usize = 16 * 1024;
/// How long and how much is still read after the last byte was sent, while the client may still be sending.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 512 * 1024;

/// The request that stands for a refused one. What is in it is never looked at: the service knows it by its number.
const MARKED_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: refused.invalid\r\nconnection: close\r\n\r\n";

/// What the gate and the service of one connection tell each other.
#[derive(Debug, Default)]
pub(crate) struct GateState {
    heads: Cell<u64>,
    refused: Cell<Option<(u64, Violation)>>,
    body_violation: Cell<Option<Violation>>,
    in_flight: Cell<usize>,
}

impl GateState {
    /// Why the request with this number (the first is 1) is refused, if it is.
    pub(crate) fn refusal(&self, number: u64) -> Option<Violation> {
        self.refused.get().filter(|(refused, _)| *refused == number).map(|(_, violation)| violation)
    }

    /// What was wrong with the framing of the body that just failed, if that was why.
    pub(crate) fn body_violation(&self) -> Option<Violation> {
        self.body_violation.get()
    }

    pub(crate) fn request_begins(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    pub(crate) fn request_ends(&self) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }
}

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GateTimes {
    /// From a head's first byte to its last.
    pub(crate) head: Duration,
    /// Between requests.
    pub(crate) idle: Duration,
}

enum Closing {
    No,
    Lingering { until: Pin<Box<Sleep>>, bytes_left: usize },
    Done,
}

/// See the module.
pub(crate) struct Gate<S> {
    io: S,
    framing: Framing,
    times: GateTimes,
    state: Rc<GateState>,
    /// Read from the socket; the first `passable` bytes may go to hyper.
    input: BytesMut,
    passable: usize,
    /// What the timer stands for, if it runs.
    waiting_for: Option<WaitingFor>,
    timer: Pin<Box<Sleep>>,
    ended: bool,
    closing: Closing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WaitingFor {
    Request,
    RestOfHead,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Gate<S> {
    /// A gate before `io`, from which `read_already` was read.
    pub(crate) fn new(
        io: S,
        read_already: BytesMut,
        limits: HeadLimits,
        times: GateTimes,
        state: Rc<GateState>,
    ) -> Gate<S> {
        Gate {
            io,
            framing: Framing::new(limits),
            times,
            state,
            input: read_already,
            passable: 0,
            waiting_for: None,
            timer: Box::pin(sleep_until(Instant::now())),
            ended: false,
            closing: Closing::No,
        }
    }

    fn refuse(&mut self, violation: Violation) {
        self.ended = true;
        self.input.clear();
        self.input.extend_from_slice(MARKED_REQUEST);
        self.passable = self.input.len();
        let number = self.state.heads.get() + 1;
        self.state.heads.set(number);
        self.state.refused.set(Some((number, violation)));
    }

    /// Whether the time to wait for more input is over.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<WaitingFor> {
        let wanted = if !self.framing.is_at_head() {
            None
        } else if !self.input.is_empty() {
            Some((WaitingFor::RestOfHead, self.times.head))
        } else if self.state.in_flight() == 0 {
            Some((WaitingFor::Request, self.times.idle))
        } else {
            None
        };
        let Some((what, time)) = wanted else {
            self.waiting_for = None;
            return Poll::Pending;
        };
        if self.waiting_for != Some(what) {
            self.waiting_for = Some(what);
            self.timer.as_mut().reset(Instant::now() + time);
        }
        ready!(self.timer.as_mut().poll(cx));
        Poll::Ready(what)
    }

    /// Reads more into `input`; says how much.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.input.reserve(READ_BYTES);
        let before = self.input.len();
        // A pinned tokio helper that reads into spare capacity without zeroing it.
        let read = std::pin::pin!(tokio::io::AsyncReadExt::read_buf(&mut self.io, &mut self.input));
        ready!(read.poll(cx))?;
        Poll::Ready(Ok(self.input.len() - before))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gate<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let gate = self.get_mut();
        loop {
            if gate.passable > 0 {
                let take = gate.passable.min(buf.remaining());
                // take <= passable <= input.len()
                buf.put_slice(gate.input.get(..take).unwrap_or_default());
                gate.input.advance(take);
                gate.passable -= take;
                return Poll::Ready(Ok(()));
            }
            if gate.ended {
                // hyper closes once the marked request is answered; an end of input would make it drop the answer.
                return Poll::Pending;
            }
            let at_head = gate.framing.is_at_head();
            match gate.framing.advance(&gate.input) {
                Step::Pass(len) => {
                    gate.passable = len;
                    if at_head {
                        gate.waiting_for = None;
                        gate.state.heads.set(gate.state.heads.get() + 1);
                    }
                    continue;
                }
                Step::Refuse(violation) if at_head => {
                    gate.refuse(violation);
                    continue;
                }
                Step::Refuse(violation) => {
                    gate.ended = true;
                    gate.state.body_violation.set(Some(violation));
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation.reason())));
                }
                Step::More => {}
            }
            match gate.poll_fill(cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => match ready!(gate.poll_deadline(cx)) {
                    WaitingFor::Request => return Poll::Ready(Ok(())),
                    WaitingFor::RestOfHead => gate.refuse(Violation::HeadTooSlow),
                },
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gate<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let gate = self.get_mut();
        loop {
            match &mut gate.closing {
                Closing::No => {
                    ready!(Pin::new(&mut gate.io).poll_shutdown(cx))?;
                    let client_may_be_sending = gate.ended || !gate.framing.is_at_head() || !gate.input.is_empty();
                    gate.closing = if client_may_be_sending {
                        let until = Box::pin(sleep_until(Instant::now() + LINGER));
                        Closing::Lingering { until, bytes_left: LINGER_BYTES_MAX }
                    } else {
                        Closing::Done
                    };
                }
                Closing::Lingering { until, bytes_left } => {
                    if until.as_mut().poll(cx).is_ready() || *bytes_left == 0 {
                        gate.closing = Closing::Done;
                        continue;
                    }
                    let mut discarded = [0; 4096];
                    let mut buf = ReadBuf::new(&mut discarded);
                    let end = match ready!(Pin::new(&mut gate.io).poll_read(cx, &mut buf)) {
                        Ok(()) => buf.filled().is_empty(),
                        Err(_) => true,
                    };
                    *bytes_left = bytes_left.saturating_sub(buf.filled().len());
                    if end {
                        gate.closing = Closing::Done;
                    }
                }
                Closing::Done => return Poll::Ready(Ok(())),
            }
        }
    }
}
