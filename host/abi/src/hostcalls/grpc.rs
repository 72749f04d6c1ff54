//! gRPC callouts: calls and streams. What they become on the wire is [`crate::grpc`]'s.

use std::time::Duration;

use bytes::Bytes;

use super::http::new_call;
use super::{Answer, Call};
use crate::abi::Status;
use crate::fields::FieldMap;
use crate::grpc::{self, Head, Service, ServiceError};
use crate::vm::{CallKind, CallOwner, CallRequest, GuestFault, OpenCall};

/// Pointer and length.
type Slice = (u32, u32);

/// Bytes of each name, and of a serialised service; none that a server would take is longer.
const NAME_BYTES_MAX: u32 = 64 * 1024;

#[expect(clippy::too_many_arguments, reason = "the ABI's own signature")]
pub(super) fn call(
    call: &mut Call<'_>,
    upstream: u32,
    upstream_len: u32,
    service: u32,
    service_len: u32,
    method: u32,
    method_len: u32,
    metadata: u32,
    metadata_len: u32,
    message: u32,
    message_len: u32,
    timeout: u32,
    ret: u32,
) -> Answer {
    let message = call.bytes(message, message_len)?;
    if message.len() > call.state().current_plugin().limits.call_bytes_max {
        return Ok(call.because("the message is larger than `limits.callout_bytes` allows", Status::InternalFailure));
    }
    let bytes = grpc::frame(message);
    if timeout == 0 {
        call.lint(
            "the server is told of a timeout of 0, which has passed at once: give the time that the call may take",
        );
    }
    let timeout = Duration::from_millis(u64::from(timeout));
    let names = [(upstream, upstream_len), (service, service_len), (method, method_len), (metadata, metadata_len)];
    let owner = match open(call, CallKind::GrpcCall, names, Some(timeout))? {
        Ok(owner) => owner,
        Err(status) => return Ok(status),
    };
    call.state_mut().call_requests.push(CallRequest::Send { token: owner.token, bytes, end_of_stream: true });
    call.write_u32(ret, owner.token)?;
    Ok(Status::Ok)
}

#[expect(clippy::too_many_arguments, reason = "the ABI's own signature")]
pub(super) fn stream(
    call: &mut Call<'_>,
    upstream: u32,
    upstream_len: u32,
    service: u32,
    service_len: u32,
    method: u32,
    method_len: u32,
    metadata: u32,
    metadata_len: u32,
    ret: u32,
) -> Answer {
    let names = [(upstream, upstream_len), (service, service_len), (method, method_len), (metadata, metadata_len)];
    let owner = match open(call, CallKind::GrpcStream, names, None)? {
        Ok(owner) => owner,
        Err(status) => return Ok(status),
    };
    call.write_u32(ret, owner.token)?;
    Ok(Status::Ok)
}

/// Begins an exchange with what calls and streams have in common.
fn open(
    call: &mut Call<'_>,
    kind: CallKind,
    [upstream, service, method, metadata]: [Slice; 4],
    timeout: Option<Duration>,
) -> Result<Result<CallOwner, Status>, GuestFault> {
    if [upstream, service, method].iter().any(|(_, len)| *len > NAME_BYTES_MAX) {
        return Ok(Err(call.because(format!("a name has at most {NAME_BYTES_MAX} bytes"), Status::ParseFailure)));
    }
    let upstream = call.bytes(upstream.0, upstream.1)?.to_vec();
    let (service, method) = (call.bytes(service.0, service.1)?, call.bytes(method.0, method.1)?);
    let metadata = call.map(metadata.0, metadata.1)?.map_err(|error| error.to_string());
    let plugin = call.state().current_plugin();
    let limits = &plugin.limits;
    let head = |target: &Service, metadata: &FieldMap| {
        let authority = target.authority.as_ref().unwrap_or(&target.upstream);
        Head { authority, service, method, metadata: [&target.metadata, metadata], timeout }.fields()
    };
    let target = match target(call, &upstream) {
        Ok(target) => target,
        Err((reason, status)) => return Ok(Err(call.because(reason, status))),
    };
    // The SDK's guests take this status for a failure, and panic on most others.
    let fields = match metadata.and_then(|metadata| head(&target, &metadata).map_err(|error| error.to_string())) {
        Ok(fields) => fields,
        Err(reason) => return Ok(Err(call.because(reason, Status::ParseFailure))),
    };
    if !limits.allow_map(&fields) {
        let reason = "the metadata is larger than `limits` allows";
        return Ok(Err(call.because(reason, Status::InternalFailure)));
    }
    let message_bytes_max = match target.message_bytes_max {
        0 => limits.call_bytes_max,
        bytes => limits.call_bytes_max.min(bytes as usize),
    };
    let Some(owner) = new_call(call, kind) else {
        return Ok(Err(Status::InternalFailure));
    };
    let upstream = target.upstream;
    // What is told to the server is not waited for here: 0 is no limit.
    let timeout = timeout.filter(|timeout| !timeout.is_zero());
    call.state_mut().call_requests.push(CallRequest::Grpc { owner, upstream, fields, timeout, message_bytes_max });
    Ok(Ok(owner))
}

/// The upstream that a guest means by its name, or by a serialised service, and may call.
fn target(call: &Call<'_>, given: &[u8]) -> Result<Service, (String, Status)> {
    let plugin = call.state().current_plugin();
    let may_call = |name: &str| {
        let allowed = plugin.capabilities.upstreams.as_ref().is_none_or(|names| names.contains(name));
        allowed && call.state().embedder.borrow().has_upstream(name)
    };
    if let Ok(name) = std::str::from_utf8(given)
        && may_call(name)
    {
        return Ok(Service { upstream: name.to_owned(), ..Service::default() });
    }
    let shown =
        |name: &[u8]| format!("there is no upstream `{}` for this plugin", name[..name.len().min(80)].escape_ascii());
    match grpc::service(given) {
        Ok(service) if may_call(&service.upstream) => Ok(service),
        // Envoy begins the call all the same, and has to give up at once.
        Ok(service) => Err((shown(service.upstream.as_bytes()), Status::InternalFailure)),
        Err(ServiceError::NotEnvoyGrpc) => Err((ServiceError::NotEnvoyGrpc.to_string(), Status::ParseFailure)),
        Err(ServiceError::Malformed) => Err((shown(given), Status::ParseFailure)),
    }
}

pub(super) fn send(call: &mut Call<'_>, token: u32, message: u32, len: u32, end: u32) -> Answer {
    let (pointer, end_of_stream) = (message, end != 0);
    call.bytes(pointer, len)?;
    if CallKind::of(token) != Some(CallKind::GrpcStream) {
        return Ok(call.because("the id is not a stream's", Status::BadArgument));
    }
    let most = call.state().current_plugin().limits.call_bytes_max;
    let state = call.state_mut();
    let Some(stream) = state.calls.get_mut(&token) else {
        let known = state.ended.contains(token);
        return Ok(if known { Status::Ok } else { Status::NotFound });
    };
    if stream.half_closed {
        call.lint("has no effect: the guest has ended its side of the stream");
        return Ok(Status::Ok);
    }
    stream.unsent += OpenCall::cost(grpc::framed_len(len as usize));
    let overflows = stream.unsent > most;
    stream.half_closed = overflows || end_of_stream;
    // SDKs panic on most statuses here, so that the stream ends instead.
    let request = if overflows {
        CallRequest::Overflow { token }
    } else {
        CallRequest::Send { token, bytes: grpc::frame(call.bytes(pointer, len)?), end_of_stream }
    };
    call.state_mut().call_requests.push(request);
    Ok(Status::Ok)
}

pub(super) fn cancel(call: &mut Call<'_>, token: u32) -> Answer {
    if let Some(status) = not_grpc(call, token) {
        return Ok(status);
    }
    let state = call.state_mut();
    if state.calls.remove(&token).is_some() {
        // What was opened in this very callback never begins: a guest that opens and cancels in a loop costs nothing.
        let requests = &mut state.call_requests;
        let opened = |request: &CallRequest| matches!(request, CallRequest::Grpc { owner, .. } if owner.token == token);
        let begun = !requests.iter().any(opened);
        requests.retain(|request| request.token() != token);
        if begun {
            requests.push(CallRequest::Cancel { token });
        }
        return Ok(Status::Ok);
    }
    Ok(if state.ended.remove(token) { Status::Ok } else { Status::NotFound })
}

/// Ends the guest's side of a stream. Of a call it is the end.
pub(super) fn close(call: &mut Call<'_>, token: u32) -> Answer {
    if CallKind::of(token) != Some(CallKind::GrpcStream) {
        return cancel(call, token);
    }
    let state = call.state_mut();
    let Some(stream) = state.calls.get_mut(&token) else {
        return Ok(if state.ended.remove(token) { Status::Ok } else { Status::NotFound });
    };
    stream.closed = true;
    if !std::mem::replace(&mut stream.half_closed, true) {
        state.call_requests.push(CallRequest::Send { token, bytes: Bytes::new(), end_of_stream: true });
    }
    Ok(Status::Ok)
}

fn not_grpc(call: &mut Call<'_>, token: u32) -> Option<Status> {
    match CallKind::of(token) {
        Some(CallKind::GrpcCall | CallKind::GrpcStream) => None,
        _ => Some(call.because("the id is not a gRPC call's or stream's", Status::BadArgument)),
    }
}
