//! [`Exchange`]: one request and its response between the client's connection, the filters and the upstream; and
//! [`drive`], the task that moves it along and ends it.
//!
//! The client's side (hyper) takes from the response's outbox and drops it when the client is gone; the driver reads the
//! request's body into the filters, forwards what they release, reads the response back, and finishes the stream in the
//! filters exactly once, whatever happened.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Version;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use portcullis_abi::{Direction, Ending, LocalResponse, Message, StreamId, UpstreamInfo};
use portcullis_config::{Action, Route, Target};
use tokio::time::Instant;

use crate::access_log::Entry;
use crate::connection::Connection;
use crate::core::Core;
use crate::failure::{self, UpstreamFailure, flag};
use crate::message::{self, BodyLength};
use crate::operator::OperatorRequestBody;
use crate::outbox::{Bell, Head, Outbox};
use crate::released::Released;
use crate::upstream::{RequestBody, SendFailure, Upstream, failure_of};

/// See the module.
#[derive(Default)]
pub(crate) struct Exchange {
    pub(crate) request: Rc<Outbox>,
    pub(crate) response: Rc<Outbox>,
    /// Rung when one of the flags below changes.
    changed: Bell,
    /// The filters or the host answer; the upstream is no longer wanted.
    answered: Cell<bool>,
    cancelled: Cell<bool>,
    reset: Cell<bool>,
    /// hyper has all of the response.
    delivered: Cell<bool>,
    client_gone: Cell<bool>,
    /// hyper holds the response's body.
    body_held: Cell<bool>,
    /// Counts whatever moved, for the idle watch.
    movements: Cell<u64>,
    request_complete: Cell<bool>,
    pub(crate) notes: RefCell<Notes>,
}

/// What the access log says of a request once it is over.
#[derive(Default)]
pub(crate) struct Notes {
    pub(crate) status: Option<u16>,
    pub(crate) details: Option<Rc<str>>,
    pub(crate) flags: u64,
    pub(crate) upstream: Option<Rc<str>>,
    pub(crate) upstream_address: Option<SocketAddr>,
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
}

impl Exchange {
    pub(crate) fn touch(&self) {
        self.movements.set(self.movements.get().wrapping_add(1));
    }

    pub(crate) fn answered_here(&self) {
        self.answered.set(true);
        self.changed.ring();
    }

    pub(crate) fn cancel_upstream(&self) {
        self.cancelled.set(true);
        self.request.break_off();
        self.changed.ring();
    }

    pub(crate) fn reset(&self) {
        self.reset.set(true);
        self.request.break_off();
        self.response.break_off();
        self.changed.ring();
    }

    pub(crate) fn readable(&self, direction: Direction) {
        match direction {
            Direction::Request => self.request.wake_filler(),
            Direction::Response => self.response.wake_filler(),
        }
    }

    /// The client has the whole response, or hyper will see to it.
    pub(crate) fn delivered(&self) {
        self.delivered.set(true);
        self.changed.ring();
    }

    pub(crate) fn client_gone(&self) {
        self.client_gone.set(true);
        self.changed.ring();
    }

    pub(crate) fn hold_body(&self, held: bool) {
        self.body_held.set(held);
    }

    pub(crate) fn request_is_complete(&self) -> bool {
        self.request_complete.get()
    }

    pub(crate) fn complete_request(&self) {
        self.request_complete.set(true);
    }

    fn wants_upstream(&self) -> bool {
        !(self.answered.get() || self.cancelled.get() || self.is_over())
    }

    fn is_over(&self) -> bool {
        self.reset.get() || self.delivered.get() || self.client_gone.get()
    }
}

/// One request's way through the proxy, as its driver needs it.
pub(crate) struct Journey {
    pub(crate) core: Rc<Core>,
    pub(crate) connection: Rc<Connection>,
    pub(crate) exchange: Rc<Exchange>,
    pub(crate) id: StreamId,
    /// The route that the request takes; none is left where the filters have changed it into one without.
    pub(crate) route: Cell<Option<usize>>,
    pub(crate) target: Target,
    pub(crate) started: Instant,
    pub(crate) method: http::Method,
    pub(crate) version: Version,
    pub(crate) request_id: Rc<str>,
    pub(crate) client: SocketAddr,
}

/// Moves a request along until it is over, then ends it in the filters and writes its log line.
pub(crate) async fn drive(journey: Journey, body: Option<Incoming>) {
    {
        let exchange = &journey.exchange;
        let work = async {
            tokio::join!(journey.read_request(body), journey.forward());
        };
        let mut work = std::pin::pin!(Some(work));
        let mut watch = std::pin::pin!(journey.watch());
        poll_fn(|cx| {
            if exchange.is_over() {
                return Poll::Ready(());
            }
            // Once an answer was made here, neither the rest of the request nor the upstream is wanted: dropping the
            // work drops the connection to the upstream, unless it is done with its response.
            if !exchange.wants_upstream() {
                work.set(None);
            } else if let Some(busy) = work.as_mut().as_pin_mut()
                && busy.poll(cx).is_ready()
            {
                work.set(None);
            }
            if watch.as_mut().poll(cx).is_ready() || exchange.is_over() {
                return Poll::Ready(());
            }
            if !exchange.wants_upstream() {
                work.set(None);
            }
            exchange.changed.wait(cx);
            Poll::Pending
        })
        .await;
    }
    journey.end();
}

impl Journey {
    fn route(&self) -> Option<&Route> {
        self.core.plan.policy.routes.get(self.route.get()?)
    }

    /// Reads the request's body into the filters.
    async fn read_request(&self, body: Option<Incoming>) {
        let Some(body) = body else { return };
        let deadline = self.started + self.connection.limits.request_timeout;
        if tokio::time::timeout_at(deadline, self.read_body(body)).await.is_err() {
            self.fail(failure::request_timeout(), flag::DOWNSTREAM_PROTOCOL_ERROR);
        }
    }

    async fn read_body(&self, mut body: Incoming) {
        loop {
            self.room(&self.exchange.request, Direction::Request).await;
            let Some(frame) = body.frame().await else {
                if !self.exchange.request_complete.replace(true) {
                    self.core.with(|worker| worker.request_body(self.id, Bytes::new(), true));
                }
                return;
            };
            self.exchange.touch();
            match frame.map(hyper::body::Frame::into_data) {
                Ok(Ok(data)) => {
                    let ended = ends_with_data(self.version) && body.is_end_stream();
                    self.exchange.request_complete.set(ended);
                    let bytes = data.len() as u64;
                    self.exchange.notes.borrow_mut().request_bytes += bytes;
                    self.core.metrics.request_bytes.add(bytes);
                    self.core.with(|worker| worker.request_body(self.id, data, ended));
                    if ended {
                        return;
                    }
                }
                Ok(Err(frame)) => {
                    let Ok(trailers) = frame.into_trailers() else { continue };
                    self.exchange.request_complete.set(true);
                    let fields = message::trailer_fields(Message::RequestTrailers, &trailers);
                    self.core.with(|worker| worker.request_trailers(self.id, fields));
                    return;
                }
                Err(_) if self.connection.gate.body_violation().is_some() => {
                    self.fail(UpstreamFailure::RequestBroken.response(), flag::DOWNSTREAM_PROTOCOL_ERROR);
                    return;
                }
                Err(_) => {
                    self.exchange.client_gone();
                    return;
                }
            }
        }
    }

    /// Waits until the filters and the receiver take more.
    async fn room(&self, outbox: &Outbox, direction: Direction) {
        poll_fn(|cx: &mut Context<'_>| {
            if outbox.is_broken() || self.core.may_read(self.id, direction) {
                return outbox.poll_room(cx);
            }
            outbox.wait_as_filler(cx);
            Poll::Pending
        })
        .await;
    }

    /// Sends what the filters release to where the route leads, and brings the response back.
    async fn forward(&self) {
        let Some(head) = poll_fn(|cx| self.exchange.request.poll_head(cx)).await else { return };
        let cleared = self.core.with(|worker| worker.route_cleared(self.id));
        let routed = if cleared { Some(self.route_again(&head.fields)) } else { None };
        let target = match &routed {
            Some(Routed::Found { route, target }) => {
                self.take_route(Some(*route), &head.fields);
                target
            }
            Some(Routed::Nowhere) => {
                self.take_route(None, &head.fields);
                &self.target
            }
            Some(Routed::Refused) => return self.fail(failure::answer(400, "direct_response", ""), 0),
            None => &self.target,
        };
        let Some(route) = self.route() else {
            self.fail(failure::route_not_found(), flag::NO_ROUTE);
            return;
        };
        match &route.action {
            Action::Respond(response) => {
                let fields = response.fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
                let answer = LocalResponse {
                    status: response.status,
                    details: "direct_response".into(),
                    body: Bytes::copy_from_slice(response.body.as_bytes()),
                    fields: fields.collect(),
                    ..LocalResponse::default()
                };
                self.fail(answer, 0);
            }
            Action::Upstream(index) => match self.core.upstreams.get(*index) {
                Some(upstream) => {
                    self.exchange.notes.borrow_mut().upstream = Some(upstream.name().into());
                    self.to_upstream(upstream, route, target, &head).await;
                }
                None => self.fail(UpstreamFailure::Resolve.response(), flag::NO_ROUTE),
            },
            Action::Operator(index) => match self.core.plan.policy.operators.get(*index) {
                Some(operator) => {
                    self.exchange.notes.borrow_mut().upstream = Some(operator.name.as_str().into());
                    let called = self.call_operator(&operator.name, route, target, &head);
                    self.within_time_of(route, called, |failure| self.fail(failure.response(), failure.flags())).await;
                }
                None => self.fail(UpstreamFailure::Resolve.response(), flag::NO_ROUTE),
            },
        }
    }

    /// Has an operator answer.
    async fn call_operator(
        &self,
        operator: &str,
        route: &Route,
        target: &Target,
        head: &Head,
    ) -> Result<(), UpstreamFailure> {
        let Some(host) = &self.core.plan.operators else { return Err(UpstreamFailure::Resolve) };
        let path = self.upstream_path(route, target, head);
        let scheme = if head.fields.get(b":scheme") == Some(b"https") { "https" } else { "http" };
        let length = self.request_length(head);
        let authority = route.host_rewrite.as_deref();
        let request = message::outbound_request(&head.fields, &path, authority, Some(scheme), length)
            .map_err(|error| self.unsendable(&error))?;
        let promised = message::promised_length(request.headers());
        let (body, fill): (_, Pin<Box<dyn Future<Output = ()>>>) = if head.end_of_stream {
            (OperatorRequestBody::empty(), Box::pin(std::future::pending()))
        } else {
            let released = Released::new(Rc::clone(&self.exchange.request), promised);
            let (body, fill) = OperatorRequestBody::released(released);
            (body, Box::pin(fill))
        };
        let sent = Instant::now();
        let info = UpstreamInfo { attempts: 1, ready_after: Some(Duration::ZERO), ..UpstreamInfo::default() };
        self.core.with(|worker| worker.upstream_info(self.id, info));
        // The operator may answer before it has read the body, and may never read it.
        let mut fill = std::pin::pin!(async {
            fill.await;
            std::future::pending::<std::convert::Infallible>().await
        });
        let answered = async {
            let (head, body) = host.call(operator, request.map(|()| body)).await?.into_parts();
            self.bring_back(&head, body, sent, |failed| failed).await
        };
        let answered = tokio::select! {
            answered = answered => answered,
            never = &mut fill => match never {},
        };
        if let Err(failed) = answered
            && self.exchange.wants_upstream()
        {
            let (head, body) = failed.response.into_parts();
            let fields = head.headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
            let answer = LocalResponse {
                status: head.status.as_u16(),
                details: failed.details,
                body,
                fields: fields.collect(),
                ..LocalResponse::default()
            };
            self.fail(answer, 0);
        }
        Ok(())
    }

    fn request_length(&self, head: &Head) -> BodyLength {
        if head.end_of_stream {
            BodyLength::None
        } else {
            self.exchange.request.whole_length().map_or(BodyLength::AsSaid, BodyLength::Exactly)
        }
    }

    fn unsendable(&self, error: &message::Unsendable) -> UpstreamFailure {
        tracing::error!(request_id = %self.request_id, %error, "the filters wrote a request that cannot be sent");
        UpstreamFailure::Unsendable
    }

    /// Runs an exchange within the route's time, which counts from the end of the request, as in Envoy: a slow client is
    /// not the upstream's fault.
    async fn within_time_of(
        &self,
        route: &Route,
        exchanged: impl Future<Output = Result<(), UpstreamFailure>>,
        failed: impl FnOnce(UpstreamFailure),
    ) {
        let late = async {
            poll_fn(|cx| self.exchange.request.poll_ended(cx)).await;
            tokio::time::sleep(route.timeout).await;
        };
        let exchanged = tokio::select! {
            biased;
            exchanged = exchanged => exchanged,
            () = late => Err(UpstreamFailure::ResponseTimeout),
        };
        if let Err(failure) = exchanged
            && self.exchange.wants_upstream()
        {
            failed(failure);
        }
    }

    /// The route of a request as the filters have left it. What no client may send, no filter may write either: Envoy
    /// refuses it with the same routes.
    fn route_again(&self, fields: &portcullis_abi::FieldMap) -> Routed {
        if fields.get(b":authority").is_none_or(|authority| portcullis_config::normal_authority(authority).is_none()) {
            return Routed::Refused;
        }
        let path = fields.get(b":path").unwrap_or_default();
        match Target::parse(path) {
            Ok(target) => match self.core.plan.route(fields, &target) {
                Some(route) => Routed::Found { route, target },
                None => Routed::Nowhere,
            },
            Err(_) if path.first() == Some(&b'/') => Routed::Refused,
            Err(_) => Routed::Nowhere,
        }
    }

    /// From now on this is the request's route, also for its filters and its line in the log.
    fn take_route(&self, route: Option<usize>, fields: &portcullis_abi::FieldMap) {
        if self.route.replace(route) == route {
            return;
        }
        if let Some(route) = route {
            let info = self.core.plan.route_info(route, fields.get(b":authority").unwrap_or_default());
            self.core.with(|worker| worker.rerouted(self.id, info));
        }
    }

    async fn to_upstream(&self, upstream: &Rc<Upstream>, route: &Route, target: &Target, head: &Head) {
        let exchanged = self.exchange_with(upstream, route, target, head);
        self.within_time_of(route, exchanged, |failure| {
            upstream.count(failure);
            self.fail(failure.response(), failure.flags());
        })
        .await;
    }

    async fn exchange_with(
        &self,
        upstream: &Rc<Upstream>,
        route: &Route,
        target: &Target,
        head: &Head,
    ) -> Result<(), UpstreamFailure> {
        let path = self.upstream_path(route, target, head);
        let request = || {
            let length = self.request_length(head);
            let host = route.host_rewrite.as_deref();
            message::outbound_request(&head.fields, &path, host, upstream.http2_scheme(), length).map(|request| {
                let promised = message::promised_length(request.headers());
                request.map(|()| match head.end_of_stream {
                    true => RequestBody::Empty,
                    false => RequestBody::Released(Released::new(Rc::clone(&self.exchange.request), promised)),
                })
            })
        };
        let mut fresh = false;
        let mut info = UpstreamInfo::default();
        let mut sent;
        let (response, lease) = loop {
            let asked = Instant::now();
            let mut lease = upstream.lease(fresh).await?;
            self.exchange.notes.borrow_mut().upstream_address = lease.ends.peer;
            info.address = lease.ends.peer;
            info.local_address = lease.ends.local;
            info.tls.clone_from(&lease.ends.tls);
            info.attempts += 1;
            info.ready_after = Some(asked.elapsed());
            self.core.with(|worker| worker.upstream_info(self.id, info.clone()));
            let request = request().map_err(|error| self.unsendable(&error))?;
            sent = Instant::now();
            match lease.send(request).await {
                Ok(response) => break (response, lease),
                // A kept connection may have been closed by the server at this very moment. Then nothing was lost if
                // nothing was written, or if the request has no body and no effect (RFC 9110, section 9.2.2).
                Err(failed) if lease.reused && !fresh && self.may_send_again(&failed, head.end_of_stream) => {
                    fresh = true;
                }
                Err(failed) => return Err(failed.failure),
            }
        };
        let (head, body) = response.into_parts();
        self.bring_back(&head, body, sent, |error| failure_of(&error)).await?;
        // hyper has all of it, unless the filters or the client wanted no more; then the lease is dropped with the body.
        if self.exchange.wants_upstream() || self.exchange.response.has_ended() {
            lease.give_back();
        }
        Ok(())
    }

    fn may_send_again(&self, failed: &SendFailure, bodiless: bool) -> bool {
        let untouched = bodiless || (failed.unsent && !self.exchange.request.was_taken_from());
        untouched && (failed.unsent || (failed.unanswered && self.method.is_safe()))
    }

    /// The path that the upstream sees: rewritten by the route, unless a filter has written another one.
    fn upstream_path(&self, route: &Route, target: &Target, head: &Head) -> Vec<u8> {
        let path = head.fields.get(b":path").unwrap_or(b"/");
        if path == target.as_bytes() {
            return route.upstream_target(target).into_owned();
        }
        match Target::parse(path) {
            Ok(changed) if route.path.matches(changed.path()) => route.upstream_target(&changed).into_owned(),
            _ => path.to_vec(),
        }
    }

    /// Feeds a response into the filters.
    async fn bring_back<B, E>(
        &self,
        head: &http::response::Parts,
        body: B,
        sent: Instant,
        failure_of: impl Fn(B::Error) -> E,
    ) -> Result<(), E>
    where
        B: Body<Data = Bytes>,
    {
        let mut body = std::pin::pin!(body);
        let ended = body.is_end_stream();
        self.core.with(|worker| {
            if ended {
                worker.upstream_latency(self.id, sent.elapsed());
            }
            worker.response_headers(self.id, message::response_fields(head), ended);
        });
        if ended {
            return Ok(());
        }
        loop {
            self.room(&self.exchange.response, Direction::Response).await;
            if !self.exchange.wants_upstream() {
                return Ok(());
            }
            let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await else {
                self.core.with(|worker| {
                    worker.upstream_latency(self.id, sent.elapsed());
                    worker.response_body(self.id, Bytes::new(), true);
                });
                return Ok(());
            };
            self.exchange.touch();
            match frame.map_err(&failure_of)?.into_data() {
                Ok(data) => {
                    let ended = ends_with_data(head.version) && body.is_end_stream();
                    self.core.with(|worker| {
                        if ended {
                            worker.upstream_latency(self.id, sent.elapsed());
                        }
                        worker.response_body(self.id, data, ended);
                    });
                    if ended {
                        return Ok(());
                    }
                }
                Err(frame) => {
                    let Ok(trailers) = frame.into_trailers() else { continue };
                    let fields = message::trailer_fields(Message::ResponseTrailers, &trailers);
                    self.core.with(|worker| {
                        worker.upstream_latency(self.id, sent.elapsed());
                        worker.response_trailers(self.id, fields);
                    });
                    return Ok(());
                }
            }
        }
    }

    /// Answers in place of the upstream; where a response is under way already, cuts it off.
    fn fail(&self, response: LocalResponse, flags: u64) {
        {
            let mut notes = self.exchange.notes.borrow_mut();
            notes.flags |= flags;
        }
        if self.exchange.response.has_begun() {
            if self.exchange.response.is_drained() {
                return;
            }
            let details: Rc<str> = response.details.as_str().into();
            self.exchange.notes.borrow_mut().details = Some(details);
            self.exchange.reset();
        } else {
            self.core.with(|worker| worker.respond(self.id, response));
            if !self.exchange.response.has_begun() && !self.exchange.answered.get() {
                // The filters hold a response of the upstream that will never be complete: better none than half of it.
                self.exchange.reset();
            }
        }
    }

    /// Ends a request in which nothing has moved for too long.
    async fn watch(&self) {
        // A response may stay silent for as long as its route allows.
        let time =
            self.connection.limits.stream_idle_timeout.max(self.route().map_or(Duration::ZERO, |route| route.timeout));
        loop {
            let before = self.exchange.movements.get();
            tokio::time::sleep(time).await;
            if self.exchange.movements.get() != before {
                continue;
            }
            self.exchange.notes.borrow_mut().flags |= flag::STREAM_IDLE_TIMEOUT;
            if self.exchange.response.has_begun() {
                // A client that takes nothing: hyper waits for room in the socket and would not see the reset.
                self.exchange.reset();
                self.connection.abort();
                return;
            }
            self.fail(failure::stream_timeout(), flag::STREAM_IDLE_TIMEOUT);
        }
    }

    /// hyper sees that a body broke off only once the client takes what came before: one that takes nothing loses its connection.
    fn let_go_in_time(&self) {
        if self.exchange.body_held.get() {
            let (exchange, connection) = (Rc::clone(&self.exchange), Rc::clone(&self.connection));
            tokio::task::spawn_local(async move {
                tokio::time::sleep(connection.limits.stream_idle_timeout).await;
                if exchange.body_held.get() {
                    connection.abort();
                }
            });
        }
    }

    /// The one end of every request.
    fn end(&self) {
        let exchange = &self.exchange;
        let complete = exchange.delivered.get();
        if !complete {
            exchange.request.break_off();
            exchange.response.break_off();
            self.let_go_in_time();
        }
        let duration = self.started.elapsed();
        let (ending, status) = {
            let mut notes = exchange.notes.borrow_mut();
            let left = exchange.client_gone.get() && !complete && !exchange.reset.get();
            if left {
                notes.flags |= flag::DOWNSTREAM_CONNECTION_TERMINATION;
            }
            let details = match &notes.details {
                Some(details) => Rc::clone(details),
                None if complete => "via_upstream".into(),
                None if left => "downstream_remote_disconnect".into(),
                None => "stream_reset".into(),
            };
            let ending = Ending { duration, response_code_details: details.to_string(), response_flags: notes.flags };
            let entry = Entry {
                method: self.method.as_str(),
                path: self.target.path(),
                status: notes.status,
                details: &details,
                flags: notes.flags,
                duration,
                request_bytes: notes.request_bytes,
                response_bytes: notes.response_bytes,
                request_id: &self.request_id,
                client: self.client,
                listener: &self.connection.listener_name,
                route: self.route().map(|route| route.name.as_str()),
                upstream: notes.upstream.as_deref(),
                upstream_address: notes.upstream_address,
                complete,
            };
            self.connection.worker.access_log.write(&entry);
            (ending, notes.status)
        };
        let metrics = &self.core.metrics;
        metrics.requests_active.decrement();
        match status {
            Some(status) if complete => metrics.response(status, duration),
            _ if exchange.reset.get() => metrics.streams_reset.increment(),
            _ => metrics.requests_abandoned.increment(),
        }
        self.core.finish(self.id, ending);
    }
}

/// Whether the last data of a body says that it is the last. Filters are told as Envoy tells them: in HTTP/2 a flag of the
/// last frame ends a body; in HTTP/1 its end is an event of its own, with no data, even where its length was known.
fn ends_with_data(version: Version) -> bool {
    version >= Version::HTTP_2
}

enum Routed {
    Found { route: usize, target: Target },
    Nowhere,
    Refused,
}
