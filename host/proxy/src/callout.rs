//! HTTP callouts of filters: one request, one bounded answer, in time or not at all.
//!
//! A refused connection is answered with 503 and a timeout with 504, as Envoy does; only a response that breaks off or
//! is over the limit is reported as none at all.

use std::rc::Rc;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::Incoming;
use portcullis_abi::{Call, CallAnswer, FieldMap, Message};

use crate::failure::UpstreamFailure;
use crate::message::{self, BodyLength};
use crate::upstream::{Lease, RequestBody, SendFailure, Upstream, failure_of};

/// Bytes of a callout's answer. Envoy's buffer limit; a key set has a few KiB.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Performs one callout.
pub(crate) async fn perform(upstream: &Rc<Upstream>, call: Call) -> CallAnswer {
    let time = call.timeout.unwrap_or_else(|| upstream.request_timeout());
    match tokio::time::timeout(time, exchange(upstream, &call)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(failure)) => {
            upstream.count(failure.0);
            if failure.1 { CallAnswer::Reset } else { CallAnswer::unavailable(failure.0.reset_reason()) }
        }
        Err(_) => {
            upstream.count(UpstreamFailure::ResponseTimeout);
            CallAnswer::timed_out()
        }
    }
}

/// A failed callout, and whether a response had begun.
struct Failed(UpstreamFailure, bool);

async fn exchange(upstream: &Rc<Upstream>, call: &Call) -> Result<CallAnswer, Failed> {
    let path = call.fields.get(b":path").unwrap_or(b"/").to_vec();
    let length = if call.body.is_empty() { BodyLength::None } else { BodyLength::Exactly(call.body.len() as u64) };
    let request = || -> Result<http::Request<RequestBody>, Failed> {
        let head = message::outbound_request(&call.fields, &path, None, upstream.http2_scheme(), length)
            .map_err(|_| Failed(UpstreamFailure::Unsendable, false))?;
        let body = if call.body.is_empty() { RequestBody::Empty } else { RequestBody::Whole(Some(call.body.clone())) };
        Ok(head.map(|()| body))
    };
    let mut fresh = false;
    let started = Instant::now();
    let (response, lease) = loop {
        let mut lease = upstream.lease(fresh).await.map_err(|failure| Failed(failure, false))?;
        match lease.send(request()?).await {
            Ok(response) => break (response, lease),
            Err(SendFailure { unsent: true, .. }) if lease.reused && !fresh => fresh = true,
            Err(failed) => return Err(Failed(failed.failure, false)),
        }
    };
    read(response, lease, started.elapsed()).await
}

async fn read(response: http::Response<Incoming>, lease: Lease, took: Duration) -> Result<CallAnswer, Failed> {
    let (head, mut body) = response.into_parts();
    let mut fields = message::response_fields(&head);
    // As Envoy tells how long the upstream took.
    fields.push(b"x-envoy-upstream-service-time", took.as_millis().to_string().as_bytes());
    let mut bytes = Vec::new();
    let mut trailers = FieldMap::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failed(failure_of(&error), true))?;
        match frame.into_data() {
            Ok(data) => {
                if bytes.len() + data.len() > ANSWER_BYTES_MAX {
                    return Err(Failed(UpstreamFailure::Overflow, true));
                }
                bytes.extend_from_slice(&data);
            }
            Err(frame) => {
                if let Ok(received) = frame.into_trailers() {
                    trailers = message::trailer_fields(Message::ResponseTrailers, &received);
                }
            }
        }
    }
    lease.give_back();
    Ok(CallAnswer::Response { fields, body: bytes.into(), trailers })
}
