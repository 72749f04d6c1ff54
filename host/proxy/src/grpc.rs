//! gRPC callouts of filters: requests over HTTP/2 whose messages come and go while they last.
//!
//! What gRPC makes of it (messages, statuses, deadlines that servers are told) is the ABI crate's; here are the connection, the
//! time that a call may take, and the order in which things happen. A failure before the response is answered in
//! the upstream's place, as Envoy does; one behind its head is a reset.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use portcullis_abi::{CallId, GrpcEvent, GrpcOpen, Message};

use crate::core::Core;
use crate::failure::UpstreamFailure;
use crate::message::{self, BodyLength};
use crate::outbox::Bell;
use crate::released::BrokenOff;
use crate::upstream::{RequestBody, SendFailure, Upstream, failure_of};

/// What a filter sends on one exchange and the connection has not taken yet. The filters' host bounds it.
#[derive(Default)]
pub(crate) struct Outgoing {
    pieces: RefCell<VecDeque<Bytes>>,
    ended: Cell<bool>,
    broken: Cell<bool>,
    filled: Bell,
}

impl Outgoing {
    pub(crate) fn put(&self, bytes: Bytes, end: bool) {
        if !bytes.is_empty() {
            self.pieces.borrow_mut().push_back(bytes);
        }
        self.ended.set(self.ended.get() || end);
        self.filled.ring();
    }

    /// Nothing more is sent. A request that was not sent to its end is reset: a server must never take a part for the whole.
    fn break_off(&self) {
        if !self.is_sent() {
            self.broken.set(true);
            self.pieces.borrow_mut().clear();
            self.filled.ring();
        }
    }

    fn is_sent(&self) -> bool {
        self.ended.get() && self.pieces.borrow().is_empty() && !self.broken.get()
    }
}

/// An exchange's request body.
pub(crate) struct Sending {
    core: Rc<Core>,
    id: CallId,
    outgoing: Rc<Outgoing>,
}

impl Sending {
    pub(crate) fn poll_frame(&self, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        if self.outgoing.broken.get() {
            return Poll::Ready(Some(Err(BrokenOff)));
        }
        let next = self.outgoing.pieces.borrow_mut().pop_front();
        if let Some(bytes) = next {
            self.core.with(|worker| {
                // Room for more is nothing that a filter is told of, so that nothing is left over.
                let _ = worker.grpc_event(self.id, GrpcEvent::Sent(bytes.len()));
            });
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        if self.outgoing.ended.get() {
            return Poll::Ready(None);
        }
        self.outgoing.filled.wait(cx);
        Poll::Pending
    }

    pub(crate) fn is_done(&self) -> bool {
        self.outgoing.is_sent()
    }
}

/// Whatever ends an exchange ends its request.
struct Guard(Rc<Outgoing>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.break_off();
    }
}

/// Carries one exchange from its beginning to its end.
pub(crate) async fn carry(core: &Rc<Core>, id: CallId, open: GrpcOpen, outgoing: Rc<Outgoing>) {
    let _guard = Guard(Rc::clone(&outgoing));
    let Some(upstream) = core.upstreams.iter().find(|upstream| upstream.name() == open.upstream) else {
        return tell(core, id, GrpcEvent::unavailable("reset reason: no such upstream", "no_cluster")).await;
    };
    if upstream.http2_scheme().is_none() {
        upstream.warn_once("a filter's gRPC call needs HTTP/2: set `http2: true` for this upstream");
        return tell(core, id, GrpcEvent::unavailable("the upstream speaks HTTP/1.1 only", "grpc_needs_http2")).await;
    }
    let has_head = Cell::new(false);
    let exchange = exchange(core, id, &open, upstream, outgoing, &has_head);
    let result = match open.timeout {
        Some(timeout) => {
            let in_time = tokio::time::timeout(timeout, exchange).await;
            in_time.unwrap_or(Err(UpstreamFailure::ResponseTimeout))
        }
        None => exchange.await,
    };
    let Err(failure) = result else { return };
    upstream.count(failure);
    let details = failure.response().details;
    let event = if has_head.get() {
        GrpcEvent::Reset(details.replace("_before_", "_after_"))
    } else if failure == UpstreamFailure::ResponseTimeout {
        GrpcEvent::timed_out()
    } else {
        GrpcEvent::unavailable(failure.reset_reason(), &details)
    };
    tell(core, id, event).await;
}

/// Tells the filter, in as many turns as it takes.
async fn tell(core: &Rc<Core>, id: CallId, event: GrpcEvent) {
    let mut is_left = core.with(|worker| worker.grpc_event(id, event));
    while is_left {
        tokio::task::yield_now().await;
        is_left = core.with(|worker| worker.grpc_event(id, GrpcEvent::Turn));
    }
}

async fn exchange(
    core: &Rc<Core>,
    id: CallId,
    open: &GrpcOpen,
    upstream: &Rc<Upstream>,
    outgoing: Rc<Outgoing>,
    has_head: &Cell<bool>,
) -> Result<(), UpstreamFailure> {
    let path = open.fields.get(b":path").unwrap_or(b"/");
    let request = || {
        let scheme = upstream.http2_scheme();
        let head = message::outbound_request(&open.fields, path, None, scheme, BodyLength::AsSaid)
            .map_err(|_| UpstreamFailure::Unsendable)?;
        let body = Sending { core: Rc::clone(core), id, outgoing: Rc::clone(&outgoing) };
        Ok(head.map(|()| RequestBody::Grpc(body)))
    };
    let mut fresh = false;
    let (response, _lease) = loop {
        let mut lease = upstream.lease(fresh).await?;
        match lease.send(request()?).await {
            Ok(response) => break (response, lease),
            // Given back whole: nothing was taken from the queue.
            Err(SendFailure { unsent: true, .. }) if lease.reused && !fresh => fresh = true,
            Err(failed) => return Err(failed.failure),
        }
    };
    bring_back(core, id, response, has_head).await
}

/// Feeds the response to the filter; no faster than the filter takes it.
async fn bring_back(
    core: &Rc<Core>,
    id: CallId,
    response: http::Response<Incoming>,
    has_head: &Cell<bool>,
) -> Result<(), UpstreamFailure> {
    has_head.set(true);
    let (head, mut body) = response.into_parts();
    let end_of_stream = body.is_end_stream();
    tell(core, id, GrpcEvent::Headers { fields: message::response_fields(&head), end_of_stream }).await;
    if end_of_stream {
        return Ok(());
    }
    while let Some(frame) = body.frame().await {
        match frame.map_err(|error| failure_of(&error))?.into_data() {
            Ok(data) => tell(core, id, GrpcEvent::Data(data)).await,
            Err(frame) => {
                let Ok(trailers) = frame.into_trailers() else { continue };
                let fields = message::trailer_fields(Message::ResponseTrailers, &trailers);
                tell(core, id, GrpcEvent::Trailers(fields)).await;
                return Ok(());
            }
        }
    }
    tell(core, id, GrpcEvent::End).await;
    Ok(())
}
