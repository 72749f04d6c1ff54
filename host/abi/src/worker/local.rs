//! Answers made here, by a guest or in its place, and resets.

use bytes::Bytes;

use super::{Action, StreamId, Worker};
use crate::abi::Direction;
use crate::exchange::LocalResponse;
use crate::fields::{FieldMap, Message};
use crate::grpc::status_of_http;
use crate::stream::{Sent, Stream};

impl Worker {
    /// Answers in the upstream's place: through the response side of the filters if no response has come yet, directly
    /// to the client if one has, and by a reset if it is on its way already.
    pub(super) fn answer_locally(&mut self, id: StreamId, stream: &mut Stream, response: LocalResponse) {
        if stream.reset {
            return;
        }
        if stream.response_sent != Sent::Nothing {
            return self.reset(id, stream);
        }
        self.cancel_upstream(id, stream);
        let replaces = stream.exchange.borrow().response_headers.is_some();
        stream.local = Some(response.details.as_str().into());
        let (fields, body) = local_message(&stream.exchange.borrow().request_headers, response);
        let end = body.is_empty() || stream.is_head;
        {
            let exchange = &mut *stream.exchange.borrow_mut();
            exchange.response_headers = Some(fields);
            exchange.response_trailers = None;
            exchange.local_details.clone_from(&stream.local);
        }
        let first = if replaces { None } else { stream.first(Direction::Response) };
        self.deliver_headers(id, stream, Direction::Response, first, end);
        if !end {
            self.deliver_body(id, stream, Direction::Response, first, body.into(), true);
        }
    }

    pub(super) fn reset(&mut self, id: StreamId, stream: &mut Stream) {
        if !std::mem::replace(&mut stream.reset, true) {
            self.cancel_upstream(id, stream);
            self.actions.push_back(Action::Reset(id));
        }
    }

    /// The upstream is no longer wanted; said once, and only where something was sent to it.
    fn cancel_upstream(&mut self, id: StreamId, stream: &mut Stream) {
        if stream.request_sent != Sent::Nothing && !std::mem::replace(&mut stream.upstream_cancelled, true) {
            self.actions.push_back(Action::CancelUpstream(id));
        }
    }

    /// The guest that a stage needs is not there.
    pub(super) fn fail(&mut self, id: StreamId, stream: &mut Stream, stage: usize) {
        let plugin = &self.plugins[stream.stages[stage].seat.plugin].plugin;
        let details = format!("wasm_fail_stream{{{}}}", plugin.name);
        self.answer_locally(id, stream, LocalResponse { status: 503, details, ..LocalResponse::default() });
    }
}

/// The fields and body of a local response, in the form that the request calls for.
fn local_message(request: &FieldMap, response: LocalResponse) -> (FieldMap, Bytes) {
    let LocalResponse { status, body, fields: extra, grpc_status, .. } = response;
    let mut fields = FieldMap::with_capacity(extra.len() + 4, extra.byte_size() + 64);
    let is_grpc = request.get(b"content-type").is_some_and(|value| {
        value.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    });
    if is_grpc {
        // A gRPC client understands nothing but trailers: status 200, and the outcome in its own fields.
        fields.push(b":status", b"200");
        add_extra(&mut fields, &extra);
        fields.set_in_place(b"content-type", b"application/grpc");
        let code = grpc_status.unwrap_or_else(|| status_of_http(status));
        if !fields.contains(b"grpc-status") {
            fields.push(b"grpc-status", code.to_string().as_bytes());
        }
        if !body.is_empty() {
            fields.set_in_place(b"grpc-message", percent_encoded(&body).as_bytes());
        }
        return (fields, Bytes::new());
    }
    fields.push(b":status", status.to_string().as_bytes());
    add_extra(&mut fields, &extra);
    if body.is_empty() {
        fields.remove(b"content-length");
        fields.remove(b"content-type");
    } else {
        fields.set_in_place(b"content-length", body.len().to_string().as_bytes());
        if !fields.contains(b"content-type") {
            fields.push(b"content-type", b"text/plain");
        }
    }
    (fields, body)
}

/// What the guest adds to an answer: what Envoy then sets itself takes the place of what the guest said.
fn add_extra(fields: &mut FieldMap, extra: &FieldMap) {
    for (name, value) in extra.iter().filter(|(name, _)| !name.starts_with(b":") && *name != b"transfer-encoding") {
        fields.append(Message::Response, name, value);
    }
}

fn percent_encoded(message: &[u8]) -> String {
    let mut out = String::with_capacity(message.len());
    for byte in message {
        match byte {
            b'%' | 0..=0x1f | 0x7f.. => out.push_str(&format!("%{byte:02X}")),
            _ => out.push(char::from(*byte)),
        }
    }
    out
}
