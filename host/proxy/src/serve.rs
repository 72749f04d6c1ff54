//! What happens to one request, from hyper's service call to the head of its response; and [`ResponseBody`], from which
//! hyper takes the rest.

use std::cell::Cell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use portcullis_abi::{Protocol, StreamInfo};
use tokio::time::Instant;

use crate::access_log::Entry;
use crate::connection::Connection;
use crate::core::unix_nanos;
use crate::exchange::{Exchange, Journey, drive};
use crate::framing::Violation;
use crate::message::{self, Arrival, BodyLength, Inbound, Refusal};
use crate::metrics::Counter;
use crate::outbox::Head;
use crate::released::{BrokenOff, Released};

/// The stream ends without a response: hyper closes the connection, or resets the HTTP/2 stream.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the stream was reset")]
pub(crate) struct StreamReset;

/// Serves one request of a connection.
pub(crate) async fn serve(
    connection: Rc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, StreamReset> {
    let started = Instant::now();
    let number = connection.next_request();
    let in_flight = InFlight::new(&connection);
    let worker = &connection.worker;
    worker.metrics.requests.increment();
    let request_id: Rc<str> = worker.ids.next().as_str().into();
    let (head, body) = request.into_parts();
    if let Some(violation) = connection.gate.refusal(number) {
        return Ok(refuse_violation(&connection, violation, &request_id, started, in_flight));
    }
    let core = worker.core();
    let policy = &core.plan.policy;
    let arrival = Arrival {
        peer: connection.peer,
        tls: connection.tls.is_some(),
        trusted_proxies: &policy.trusted_proxies,
        fields_max: connection.limits.header_count,
        request_id: &request_id,
    };
    let inbound = match message::inbound(&head, &arrival) {
        Ok(inbound) => inbound,
        Err(refusal) => {
            return Ok(refuse(&connection, &head, !body.is_end_stream(), refusal, &request_id, started, in_flight));
        }
    };
    let Inbound { fields, target, client } = inbound;
    let Some(route_index) = core.plan.route(&fields, &target) else {
        let refusal = Refusal { status: 404, details: "route_not_found", text: "" };
        return Ok(refuse(&connection, &head, !body.is_end_stream(), refusal, &request_id, started, in_flight));
    };
    let Some(route) = policy.routes.get(route_index) else { return Err(StreamReset) };

    let mut info = StreamInfo::default();
    info.source_address = Some(client);
    info.destination_address = Some(connection.local);
    info.request_id = request_id.to_string();
    info.protocol = match head.version {
        Version::HTTP_2 => Protocol::Http2,
        Version::HTTP_10 => Protocol::Http10,
        _ => Protocol::Http11,
    };
    info.start_unix_nanos = unix_nanos();
    info.connection_id = connection.id;
    info.tls.clone_from(&connection.tls);
    info.route = core.plan.route_info(route_index, fields.get(b":authority").unwrap_or_default());
    info.filter_chain_name = portcullis_config::envoy::filter_chain_name(policy, connection.peer.ip());
    info.listener_name = Arc::clone(&connection.listener_name);
    info.connection_state = connection.state.clone();
    info.buffer_bytes_max = core.plan.buffer_bytes(&route.filters);

    worker.metrics.requests_active.increment();
    let exchange = Rc::new(Exchange::default());
    let response_bytes = Arc::clone(&worker.metrics.response_bytes);
    let watch = Watch { exchange: Rc::clone(&exchange), response_bytes, armed: true, in_body: false };
    let id = core.open(&route.filters, info, &exchange);
    let ended = body.is_end_stream();
    if ended {
        exchange.complete_request();
    }
    core.with(|filters| filters.request_headers(id, fields, ended));
    let journey = Journey {
        core: Rc::clone(&core),
        connection: Rc::clone(&connection),
        exchange: Rc::clone(&exchange),
        id,
        route: Cell::new(Some(route_index)),
        target,
        started,
        method: head.method.clone(),
        version: head.version,
        request_id: Rc::clone(&request_id),
        client,
    };
    // Behind a pointer: a task moves what it runs several times, and this has some kilobytes.
    tokio::task::spawn_local(Box::pin(drive(journey, (!ended).then_some(body))));

    let released = poll_fn(|cx| exchange.response.poll_head(cx)).await.ok_or(StreamReset)?;
    respond(&released, &exchange, &head, &request_id, watch, in_flight)
}

/// Makes hyper's response of what the filters released.
fn respond(
    released: &Head,
    exchange: &Rc<Exchange>,
    head: &http::request::Parts,
    request_id: &str,
    watch: Watch,
    in_flight: InFlight,
) -> Result<Response<ResponseBody>, StreamReset> {
    let outbox = &exchange.response;
    let is_head = head.method == Method::HEAD;
    let length = match (released.end_of_stream, outbox.whole_length()) {
        (true, _) if is_head => BodyLength::AsSaid,
        (true, _) => BodyLength::None,
        (false, Some(length)) if !is_head => BodyLength::Exactly(length),
        (false, _) => BodyLength::AsSaid,
    };
    let response = match message::outbound_response(&released.fields, length) {
        Ok(response) => response,
        Err(error) => {
            tracing::error!(request_id, %error, "the filters wrote a response that cannot be sent");
            exchange.reset();
            return Err(StreamReset);
        }
    };
    let promised = message::promised_length(response.headers());
    let bodiless = is_head
        || released.end_of_stream
        || matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    {
        let mut notes = exchange.notes.borrow_mut();
        notes.status = Some(response.status().as_u16());
        notes.details.clone_from(&released.details);
    }
    let mut response = response.map(|()| ResponseBody {
        source: if bodiless {
            Source::Nothing
        } else {
            Source::Released {
                watch: watch.clone_armed(),
                body: Released::new(Rc::clone(outbox), promised),
                begun: false,
            }
        },
        _in_flight: in_flight,
    });
    if bodiless {
        watch.delivered();
    } else {
        watch.disarm();
    }
    if head.version < Version::HTTP_2 && !exchange.request_is_complete() {
        // What is left of the request is not read, so the connection cannot carry another one.
        response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
}

fn refuse_violation(
    connection: &Rc<Connection>,
    violation: Violation,
    request_id: &str,
    started: Instant,
    in_flight: InFlight,
) -> Response<ResponseBody> {
    tracing::debug!(client = %connection.peer.ip(), reason = violation.reason(), "malformed request refused");
    let refusal = Refusal { status: violation.status(), details: violation.details(), text: violation.reason() };
    // Method and path of what was refused are not known for certain, so none are told.
    let line = RefusedLine { method: "-", path: b"-" };
    let mut response = refused(connection, &line, refusal, request_id, started, in_flight);
    response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn refuse(
    connection: &Rc<Connection>,
    head: &http::request::Parts,
    has_body: bool,
    refusal: Refusal,
    request_id: &str,
    started: Instant,
    in_flight: InFlight,
) -> Response<ResponseBody> {
    let line = RefusedLine { method: head.method.as_str(), path: head.uri.path().as_bytes() };
    let mut response = refused(connection, &line, refusal, request_id, started, in_flight);
    // What is wrong with a request may be wrong with what follows it; that it leads nowhere is not.
    let goes_on = refusal.status == 404 && !has_body;
    if head.version < Version::HTTP_2 && !goes_on {
        response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

struct RefusedLine<'a> {
    method: &'a str,
    path: &'a [u8],
}

/// Answers a request that no filter sees.
fn refused(
    connection: &Rc<Connection>,
    line: &RefusedLine<'_>,
    refusal: Refusal,
    request_id: &str,
    started: Instant,
    in_flight: InFlight,
) -> Response<ResponseBody> {
    let worker = &connection.worker;
    if refusal.status != 404 {
        worker.metrics.requests_malformed.increment();
    }
    let duration = started.elapsed();
    worker.metrics.response(refusal.status, duration);
    let client = SocketAddr::new(connection.peer.ip().to_canonical(), connection.peer.port());
    write_refusal(connection, line, refusal, request_id, duration, client);
    let text = Bytes::from_static(refusal.text.as_bytes());
    let mut response = Response::new(ResponseBody { source: Source::Fixed(Some(text)), _in_flight: in_flight });
    *response.status_mut() = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST);
    if !refusal.text.is_empty() {
        response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    response
}

fn write_refusal(
    connection: &Connection,
    line: &RefusedLine<'_>,
    refusal: Refusal,
    request_id: &str,
    duration: Duration,
    client: SocketAddr,
) {
    connection.worker.access_log.write(&Entry {
        method: line.method,
        path: line.path,
        status: Some(refusal.status),
        details: refusal.details,
        flags: 0,
        duration,
        request_bytes: 0,
        response_bytes: refusal.text.len() as u64,
        request_id,
        client,
        listener: &connection.listener_name,
        route: None,
        upstream: None,
        upstream_address: None,
        complete: true,
    });
}

/// Tells the driver when the client's side is dropped before its time.
struct Watch {
    exchange: Rc<Exchange>,
    response_bytes: Arc<Counter>,
    armed: bool,
    /// It goes with a body that hyper holds.
    in_body: bool,
}

impl Watch {
    fn clone_armed(&self) -> Watch {
        self.exchange.hold_body(true);
        Watch {
            exchange: Rc::clone(&self.exchange),
            response_bytes: Arc::clone(&self.response_bytes),
            armed: true,
            in_body: true,
        }
    }

    fn delivered(mut self) {
        self.armed = false;
        self.exchange.delivered();
    }

    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.in_body {
            self.exchange.hold_body(false);
        }
        if self.armed {
            self.exchange.client_gone();
        }
    }
}

/// Counts a request as under way on its connection until hyper is done with its response.
struct InFlight(Rc<Connection>);

impl InFlight {
    fn new(connection: &Rc<Connection>) -> InFlight {
        connection.gate.request_begins();
        InFlight(Rc::clone(connection))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.gate.request_ends();
    }
}

/// The body of a response to a client.
pub(crate) struct ResponseBody {
    source: Source,
    _in_flight: InFlight,
}

enum Source {
    Nothing,
    Fixed(Option<Bytes>),
    Released {
        watch: Watch,
        body: Released,
        /// hyper has asked for something, so it has the head.
        begun: bool,
    },
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match &mut self.get_mut().source {
            Source::Nothing => Poll::Ready(None),
            Source::Fixed(bytes) => {
                Poll::Ready(bytes.take().filter(|bytes| !bytes.is_empty()).map(|bytes| Ok(Frame::data(bytes))))
            }
            Source::Released { watch, body, begun } => {
                let exchange = &watch.exchange;
                if !std::mem::replace(begun, true) && exchange.response.is_broken() {
                    // A response that is cut off at once still has a head, which hyper writes when it has to wait.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                let frame = ready!(body.poll_frame(cx));
                exchange.touch();
                match &frame {
                    Some(Err(BrokenOff)) => exchange.reset(),
                    Some(Ok(frame)) => {
                        let bytes = frame.data_ref().map_or(0, Bytes::len);
                        exchange.notes.borrow_mut().response_bytes += bytes as u64;
                        watch.response_bytes.add(bytes as u64);
                    }
                    None => {}
                }
                if body.is_done() {
                    watch.armed = false;
                    exchange.delivered();
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Nothing => true,
            Source::Fixed(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            // That there is a body was said with the head, even if nothing came of it.
            Source::Released { body, begun, .. } => *begun && body.is_done(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Nothing => SizeHint::with_exact(0),
            Source::Fixed(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Source::Released { body, .. } => body.left().map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}
