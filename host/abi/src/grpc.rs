//! gRPC as a client speaks it over HTTP/2, without I/O: heads of requests, messages in frames, and what an answer comes to.
//!
//! Follows the protocol description of gRPC ("gRPC over HTTP2") and, where that leaves a choice, Envoy 1.40's client: which
//! status stands for which failure, what a guest is shown of answers that carry no message, and the details in braces
//! behind a status message.

use std::collections::VecDeque;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::fields::FieldMap;
use crate::protobuf;

/// Statuses that the host itself gives. A server's can be any number.
pub(crate) mod status {
    pub(crate) const OK: u32 = 0;
    pub(crate) const CANCELLED: u32 = 1;
    pub(crate) const UNKNOWN: u32 = 2;
    pub(crate) const PERMISSION_DENIED: u32 = 7;
    pub(crate) const RESOURCE_EXHAUSTED: u32 = 8;
    pub(crate) const UNIMPLEMENTED: u32 = 12;
    pub(crate) const INTERNAL: u32 = 13;
    pub(crate) const UNAVAILABLE: u32 = 14;
    pub(crate) const UNAUTHENTICATED: u32 = 16;
    /// The last one that gRPC defines.
    pub(crate) const LAST: u32 = UNAUTHENTICATED;
    /// What Envoy makes of a status that is no number, or none that gRPC defines: -1.
    pub(crate) const INVALID: u32 = u32::MAX;
}

/// Envoy's translation of HTTP statuses, which is gRPC's own.
pub(crate) fn status_of_http(status: u16) -> u32 {
    match status {
        400 => status::INTERNAL,
        401 => status::UNAUTHENTICATED,
        403 => status::PERMISSION_DENIED,
        404 => status::UNIMPLEMENTED,
        429 | 502..=504 => status::UNAVAILABLE,
        _ => status::UNKNOWN,
    }
}

// ---- where a call goes

/// What a guest's serialised `envoy.config.core.v3.GrpcService` says. Retry policies and the choice of Envoy's own fields are
/// passed over.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Service {
    /// `envoy_grpc.cluster_name`.
    pub(crate) upstream: String,
    /// `envoy_grpc.authority`, if it names one.
    pub(crate) authority: Option<String>,
    /// `envoy_grpc.max_receive_message_length`; 0 is no limit of the guest's.
    pub(crate) message_bytes_max: u32,
    /// `initial_metadata`.
    pub(crate) metadata: FieldMap,
}

/// Why a serialised service cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ServiceError {
    /// It is no such message.
    #[error("the service is no `envoy.config.core.v3.GrpcService`")]
    Malformed,
    /// It names an address of its own (`google_grpc`), which no list of allowed upstreams would hold, or none at all.
    #[error("the service has no `envoy_grpc`, and this host has no other client")]
    NotEnvoyGrpc,
}

/// Reads a serialised service.
pub(crate) fn service(message: &[u8]) -> Result<Service, ServiceError> {
    let mut service = Service::default();
    let mut is_envoy_grpc = false;
    for field in protobuf::fields(message) {
        match field.map_err(|_| ServiceError::Malformed)? {
            // A `oneof`: the last one counts.
            (1, envoy) => {
                is_envoy_grpc = true;
                read_envoy_grpc(&mut service, envoy.bytes())?;
            }
            (2, _) => is_envoy_grpc = false,
            (5, line) => {
                let [key, value, raw] = strings(line.bytes(), [1, 2, 3])?;
                service.metadata.push(key, if raw.is_empty() { value } else { raw });
            }
            _ => {}
        }
    }
    if is_envoy_grpc { Ok(service) } else { Err(ServiceError::NotEnvoyGrpc) }
}

fn read_envoy_grpc(service: &mut Service, message: &[u8]) -> Result<(), ServiceError> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| ServiceError::Malformed);
    let [upstream, authority, bytes_max] = strings(message, [1, 2, 4])?;
    service.upstream = text(upstream)?;
    service.authority = Some(text(authority)?).filter(|authority| !authority.is_empty());
    for field in protobuf::fields(bytes_max) {
        if let (1, protobuf::Value::Varint(bytes)) = field.map_err(|_| ServiceError::Malformed)? {
            service.message_bytes_max = u32::try_from(bytes).unwrap_or(u32::MAX);
        }
    }
    Ok(())
}

fn strings<const N: usize>(message: &[u8], numbers: [u64; N]) -> Result<[&[u8]; N], ServiceError> {
    protobuf::length_delimited(message, numbers).map_err(|_| ServiceError::Malformed)
}

// ---- requests

/// Why a guest's call cannot become a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeadError {
    #[error("the names of a service and its method make a path: visible ASCII without `?` and `#`")]
    Path,
    #[error("the authority is visible ASCII")]
    Authority,
    #[error(
        "metadata cannot hold pseudo-headers and the fields that the host writes: `te`, `content-type`, `host`, .."
    )]
    Reserved,
    #[error("a metadata name consists of token characters, and a value has no CR, LF or NUL")]
    Line,
}

/// What a guest gives of a request.
pub(crate) struct Head<'a> {
    pub(crate) authority: &'a str,
    pub(crate) service: &'a [u8],
    pub(crate) method: &'a [u8],
    /// The guest's metadata, last; a `grpc-timeout` in it goes before the call's.
    pub(crate) metadata: [&'a FieldMap; 2],
    /// What the server is told. Envoy says `0m` for a call that is not limited.
    pub(crate) timeout: Option<Duration>,
}

impl Head<'_> {
    /// The request's fields, in the order that gRPC asks for.
    pub(crate) fn fields(&self) -> Result<FieldMap, HeadError> {
        let visible = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_graphic);
        let path = [b"/", self.service, b"/", self.method].concat();
        if !visible(&path) || path.iter().any(|byte| b"?#".contains(byte)) {
            return Err(HeadError::Path);
        }
        if self.authority.is_empty() || !visible(self.authority.as_bytes()) {
            return Err(HeadError::Authority);
        }
        let mut fields = FieldMap::new();
        fields.push(b":method", b"POST");
        fields.push(b":path", &path);
        fields.push(b":authority", self.authority.as_bytes());
        fields.push(b"te", b"trailers");
        if let Some(timeout) = self.timeout {
            fields.push(b"grpc-timeout", timeout_value(timeout).as_bytes());
        }
        fields.push(b"content-type", b"application/grpc");
        for (name, value) in self.metadata.iter().flat_map(|metadata| metadata.iter()) {
            if is_reserved(name) {
                return Err(HeadError::Reserved);
            }
            let encoded = name.ends_with(b"-bin").then(|| STANDARD.encode(value));
            let value = encoded.as_ref().map_or(value, |encoded| encoded.as_bytes());
            if !crate::fields::is_token(name) || !crate::fields::is_value(value) {
                return Err(HeadError::Line);
            }
            if name == b"grpc-timeout" {
                fields.set(name, value);
            } else {
                fields.push(name, value);
            }
        }
        Ok(fields)
    }
}

/// At most eight digits and a unit.
fn timeout_value(timeout: Duration) -> String {
    match timeout.as_millis() {
        millis @ ..100_000_000 => format!("{millis}m"),
        _ => format!("{}S", timeout.as_secs().min(99_999_999)),
    }
}

fn is_reserved(name: &[u8]) -> bool {
    name.first() == Some(&b':')
        || [
            &b"host"[..],
            b"te",
            b"content-type",
            b"content-length",
            b"connection",
            b"keep-alive",
            b"proxy-connection",
            b"transfer-encoding",
            b"upgrade",
            b"http2-settings",
            // Messages are neither compressed nor decompressed here.
            b"grpc-encoding",
        ]
        .contains(&name)
}

/// A message as it stands on the wire: not compressed, four bytes of length, its bytes.
pub fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(framed_len(message.len()));
    framed.put_u8(0);
    // Callers bound messages far below 4 GiB.
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

/// Bytes of a message's frame.
pub(crate) fn framed_len(message_len: usize) -> usize {
    FRAME_HEAD + message_len
}

const FRAME_HEAD: usize = 5;

/// Takes messages out of their frames, however the bytes arrive. Holds less than one frame once all were taken.
#[derive(Debug)]
pub struct GrpcMessages {
    bytes: BytesMut,
    message_bytes_max: usize,
}

/// A frame that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrpcFrameError {
    /// It is compressed, or of a kind that does not exist.
    #[error("the message is compressed, or is none")]
    Flags,
    /// Its message is longer than allowed.
    #[error("the message has {0} bytes, more than allowed")]
    TooLong(usize),
}

impl GrpcMessages {
    /// Nothing has arrived yet; longer messages than this are refused.
    pub fn new(message_bytes_max: usize) -> GrpcMessages {
        GrpcMessages { bytes: BytesMut::new(), message_bytes_max }
    }

    /// Adds bytes of a body.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, once all of it is there.
    ///
    /// # Errors
    /// For a frame that is refused. What follows it cannot be read.
    pub fn next_message(&mut self) -> Result<Option<Bytes>, GrpcFrameError> {
        let Some([flags, len @ ..]) = self.bytes.first_chunk::<FRAME_HEAD>() else {
            return Ok(None);
        };
        let (flags, len) = (*flags, u32::from_be_bytes(*len) as usize);
        // An empty message may be marked as compressed: there is nothing in it to decompress.
        if flags > 1 || (flags == 1 && len > 0) {
            return Err(GrpcFrameError::Flags);
        }
        if len > self.message_bytes_max {
            return Err(GrpcFrameError::TooLong(len));
        }
        if self.bytes.len() < FRAME_HEAD + len {
            return Ok(None);
        }
        self.bytes.advance(FRAME_HEAD);
        Ok(Some(self.bytes.split_to(len).freeze()))
    }
}

// ---- answers

/// What an exchange brings about, one after the other.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    /// Initial metadata.
    Initial(FieldMap),
    /// A message. The only one, and the end, for a unary call.
    Message(Bytes),
    /// Trailing metadata.
    Trailing(FieldMap),
    /// The end, with a status and its message.
    Close(u32, Vec<u8>),
}

/// One exchange's answer so far.
#[derive(Debug)]
pub(crate) struct Answer {
    unary: bool,
    has_head: bool,
    messages: GrpcMessages,
    /// The last message of a unary call.
    message: Option<Bytes>,
    /// What follows the messages that have arrived.
    steps: VecDeque<Step>,
    ended: bool,
    /// It ended here before it ended on the wire.
    is_cut: bool,
}

/// Envoy adds the response's code details to each message.
const VIA_UPSTREAM: &[u8] = b"via_upstream";

impl Answer {
    /// No answer yet.
    pub(crate) fn new(unary: bool, message_bytes_max: usize) -> Answer {
        Answer {
            unary,
            has_head: false,
            messages: GrpcMessages::new(message_bytes_max),
            message: None,
            steps: VecDeque::new(),
            ended: false,
            is_cut: false,
        }
    }

    /// The head of the response.
    pub(crate) fn headers(&mut self, fields: FieldMap, end: bool) {
        if self.ended || std::mem::replace(&mut self.has_head, true) {
            return;
        }
        let status = fields.get(b":status").and_then(|status| std::str::from_utf8(status).ok()?.parse().ok());
        let status: u16 = status.unwrap_or_default();
        let is_trailers = end && (status == 200 || fields.contains(b"grpc-status"));
        if status == 200 && !end {
            self.steps.push_back(Step::Initial(fields));
            return;
        }
        // What stands in the head is trailing metadata, or it is no gRPC at all.
        self.steps.push_back(Step::Initial(FieldMap::new()));
        if is_trailers {
            self.trailers(fields);
        } else {
            self.is_cut = !end;
            self.fail(status_of_http(status), VIA_UPSTREAM);
        }
    }

    /// Bytes of its body. [`Answer::next`] must have given `None` before.
    pub(crate) fn data(&mut self, bytes: &[u8]) {
        if !self.ended {
            self.messages.push(bytes);
        }
    }

    /// The body ended without trailers.
    pub(crate) fn end(&mut self) {
        self.fail(status::UNKNOWN, VIA_UPSTREAM);
    }

    /// Its trailers.
    pub(crate) fn trailers(&mut self, fields: FieldMap) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let status = fields.get(b"grpc-status").filter(|status| !status.is_empty());
        let status = status.map_or(status::UNKNOWN, |status| {
            let known = |status: &u32| *status <= status::UNAUTHENTICATED;
            std::str::from_utf8(status)
                .ok()
                .and_then(|status| status.parse().ok())
                .filter(known)
                .unwrap_or(status::INVALID)
        });
        let message = with_details(fields.get(b"grpc-message").unwrap_or_default(), VIA_UPSTREAM);
        self.steps.push_back(Step::Trailing(fields));
        self.steps.push_back(Step::Close(status, message));
    }

    /// The exchange broke off.
    pub(crate) fn reset(&mut self, details: &str) {
        self.fail(status::INTERNAL, details.as_bytes());
    }

    /// The host answers in the upstream's place.
    pub(crate) fn local(&mut self, status: u32, message: &str, details: &str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        if !std::mem::replace(&mut self.has_head, true) {
            self.steps.push_back(Step::Initial(FieldMap::new()));
        }
        let mut fields = FieldMap::new();
        fields.push(b":status", b"200");
        fields.push(b"content-type", b"application/grpc");
        fields.push(b"grpc-status", status.to_string().as_bytes());
        fields.push(b"grpc-message", message.as_bytes());
        self.steps.push_back(Step::Trailing(fields));
        self.steps.push_back(Step::Close(status, with_details(message.as_bytes(), details.as_bytes())));
    }

    /// Ends with empty trailing metadata and a status.
    fn fail(&mut self, status: u32, details: &[u8]) {
        if !std::mem::replace(&mut self.ended, true) {
            self.push_failure(status, details);
        }
    }

    fn push_failure(&mut self, status: u32, details: &[u8]) {
        self.steps.push_back(Step::Trailing(FieldMap::new()));
        self.steps.push_back(Step::Close(status, details.to_vec()));
    }

    /// Ends it here, whatever has arrived.
    pub(crate) fn cut(&mut self, status: u32, message: &str) {
        self.end_early();
        self.steps.push_back(Step::Close(status, message.as_bytes().to_vec()));
    }

    fn end_early(&mut self) {
        self.ended = true;
        self.is_cut = true;
        self.messages.bytes = BytesMut::new();
        self.steps.clear();
    }

    /// Whether the exchange goes on although its answer has ended here.
    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Whether only the end is told.
    pub(crate) fn is_unary(&self) -> bool {
        self.unary
    }

    /// What comes next, if it is there already.
    pub(crate) fn next(&mut self) -> Option<Step> {
        loop {
            let step = self.next_step()?;
            if !self.unary {
                return Some(step);
            }
            // Of a call, only how it ends is told.
            match step {
                Step::Initial(_) | Step::Trailing(_) => {}
                Step::Message(message) => self.message = Some(message),
                Step::Close(status::OK, _) => {
                    return Some(self.message.take().map_or(Step::Close(status::INTERNAL, Vec::new()), Step::Message));
                }
                close @ Step::Close(..) => return Some(close),
            }
        }
    }

    fn next_step(&mut self) -> Option<Step> {
        // The head comes before the messages, and everything else behind them.
        if matches!(self.steps.front(), Some(Step::Initial(_))) {
            return self.steps.pop_front();
        }
        match self.messages.next_message() {
            Ok(Some(message)) => return Some(Step::Message(message)),
            Ok(None) => {}
            Err(error) => {
                self.end_early();
                let status = match error {
                    GrpcFrameError::Flags => status::INTERNAL,
                    GrpcFrameError::TooLong(_) => status::RESOURCE_EXHAUSTED,
                };
                self.push_failure(status, VIA_UPSTREAM);
            }
        }
        self.steps.pop_front()
    }
}

fn with_details(message: &[u8], details: &[u8]) -> Vec<u8> {
    if message.is_empty() { details.to_vec() } else { [message, b"{", details, b"}"].concat() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envoy_grpc(fields: &[(u32, &[u8])]) -> Vec<u8> {
        let mut inner = Vec::new();
        for (number, contents) in fields {
            protobuf::push_bytes(&mut inner, *number, contents);
        }
        let mut out = Vec::new();
        protobuf::push_bytes(&mut out, 1, &inner);
        out
    }

    #[test]
    fn reads_a_serialised_service() {
        let mut bytes_max = Vec::new();
        protobuf::push_number(&mut bytes_max, 1, 1000);
        let mut message = envoy_grpc(&[(1, b"auth"), (2, b"auth.example"), (4, &bytes_max), (3, b"\x0a\x00")]);
        let mut line = Vec::new();
        protobuf::push_bytes(&mut line, 1, b"x-tenant");
        protobuf::push_bytes(&mut line, 2, b"blue");
        protobuf::push_bytes(&mut message, 5, &line);
        let expected = Service {
            upstream: "auth".into(),
            authority: Some("auth.example".into()),
            message_bytes_max: 1000,
            metadata: [("x-tenant", "blue")].into_iter().collect(),
        };
        assert_eq!(service(&message), Ok(expected));
        for len in 1..message.len() {
            drop(service(&message[..len]));
        }
    }

    #[test]
    fn a_service_that_is_not_envoys_own_is_refused() {
        let mut google = envoy_grpc(&[(1, b"auth")]);
        protobuf::push_bytes(&mut google, 2, b"\x0a\x03a:1");
        assert_eq!(service(&google), Err(ServiceError::NotEnvoyGrpc), "the last of a `oneof` counts");
        assert_eq!(service(b""), Err(ServiceError::NotEnvoyGrpc));
        assert_eq!(service(b"auth"), Err(ServiceError::Malformed));
        assert_eq!(service(&envoy_grpc(&[(1, b"\xff")])), Err(ServiceError::Malformed));
    }

    fn head(service: &str, metadata: &FieldMap, timeout: Option<u64>) -> Result<FieldMap, HeadError> {
        let none = FieldMap::new();
        Head {
            authority: "auth",
            service: service.as_bytes(),
            method: b"Check",
            metadata: [&none, metadata],
            timeout: timeout.map(Duration::from_millis),
        }
        .fields()
    }

    fn meta(name: &[u8], value: &[u8]) -> FieldMap {
        [(name, value)].into_iter().collect()
    }

    #[test]
    fn a_request_says_what_grpc_asks_for_in_its_order() {
        let mut metadata = meta(b"x-a", b"1");
        metadata.push(b"key-bin", &[0, 255, b'\n']);
        let expected: FieldMap = [
            (":method", "POST"),
            (":path", "/auth.v1.Auth/Check"),
            (":authority", "auth"),
            ("te", "trailers"),
            ("grpc-timeout", "1500m"),
            ("content-type", "application/grpc"),
            ("x-a", "1"),
            ("key-bin", "AP8K"),
        ]
        .into_iter()
        .collect();
        assert_eq!(head("auth.v1.Auth", &metadata, Some(1500)), Ok(expected));
    }

    #[test]
    fn a_timeout_has_at_most_eight_digits() {
        let said = |millis| {
            let fields = head("a", &FieldMap::new(), Some(millis)).unwrap();
            String::from_utf8(fields.get(b"grpc-timeout").unwrap().to_vec()).unwrap()
        };
        assert_eq!(said(0), "0m");
        assert_eq!(said(99_999_999), "99999999m");
        assert_eq!(said(100_000_000), "100000S");
        assert_eq!(said(u64::from(u32::MAX)), "4294967S");
        let fields = head("a", &meta(b"grpc-timeout", b"5S"), Some(1)).unwrap();
        assert_eq!(fields.get_all(b"grpc-timeout").collect::<Vec<_>>(), [b"5S"], "the guest's own goes before");
    }

    #[test]
    fn what_would_be_another_request_is_refused() {
        let none = FieldMap::new();
        for service in ["a\r\nx: y", "a b", "a?b", "a#b", "\u{e9}", "a\0"] {
            assert_eq!(head(service, &none, None), Err(HeadError::Path), "{service:?}");
        }
        for name in [":path", ":authority", "host", "te", "content-type", "connection", "grpc-encoding"] {
            assert_eq!(head("a", &meta(name.as_bytes(), b"x"), None), Err(HeadError::Reserved), "{name}");
        }
        for (name, value) in [("a b", "x"), ("", "x"), ("a\n", "x"), ("a", "x\r\ny"), ("a", "\0")] {
            let line = meta(name.as_bytes(), value.as_bytes());
            assert_eq!(head("a", &line, None), Err(HeadError::Line), "{name:?} {value:?}");
        }
        let authority =
            Head { authority: "a\nb", service: b"a", method: b"b", metadata: [&none, &none], timeout: None };
        assert_eq!(authority.fields(), Err(HeadError::Authority));
    }

    fn messages(chunks: &[&[u8]], bytes_max: usize) -> Result<Vec<Bytes>, GrpcFrameError> {
        let mut reader = GrpcMessages::new(bytes_max);
        let mut found = Vec::new();
        for chunk in chunks {
            reader.push(chunk);
            while let Some(message) = reader.next_message()? {
                found.push(message);
            }
        }
        Ok(found)
    }

    #[test]
    fn messages_are_found_however_their_bytes_arrive() {
        let wire = [frame(b"abc"), frame(b""), frame(&[7; 300])].concat();
        let expected = [Bytes::from_static(b"abc"), Bytes::new(), Bytes::from(vec![7; 300])];
        for size in 1..wire.len() {
            let chunks: Vec<&[u8]> = wire.chunks(size).collect();
            assert_eq!(messages(&chunks, 300).unwrap(), expected, "in pieces of {size}");
        }
    }

    #[test]
    fn frames_that_cannot_be_read_are_refused() {
        assert_eq!(messages(&[b"\x01\0\0\0\x01a"], 10), Err(GrpcFrameError::Flags), "compressed");
        assert_eq!(messages(&[b"\x02\0\0\0\0"], 10), Err(GrpcFrameError::Flags));
        assert_eq!(messages(&[b"\x01\0\0\0\0"], 10).unwrap().len(), 1, "nothing was compressed");
        assert_eq!(messages(&[b"\0\0\0\0\x0a0123456789"], 10).unwrap().len(), 1);
        assert_eq!(messages(&[b"\0\0\0\0\x0b"], 10), Err(GrpcFrameError::TooLong(11)), "before it has arrived");
        assert_eq!(messages(&[b"\0\xff\xff\xff\xff"], 10), Err(GrpcFrameError::TooLong(0xffff_ffff)));
    }

    /// What comes of an answer, in words.
    fn steps(unary: bool, act: impl FnOnce(&mut Answer)) -> Vec<String> {
        let mut answer = Answer::new(unary, 100);
        act(&mut answer);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let lines =
            |fields: &FieldMap| fields.iter().map(|(n, v)| format!(" {}={}", text(n), text(v))).collect::<String>();
        std::iter::from_fn(|| answer.next())
            .map(|step| match step {
                Step::Initial(fields) => format!("initial{}", lines(&fields)),
                Step::Message(message) => format!("message {}", text(&message)),
                Step::Trailing(fields) => format!("trailing{}", lines(&fields)),
                Step::Close(status, message) => format!("close {status} {}", text(&message)),
            })
            .collect()
    }

    fn status_200() -> FieldMap {
        [(":status", "200")].into_iter().collect()
    }

    fn trailers(status: &str) -> FieldMap {
        [("grpc-status", status)].into_iter().collect()
    }

    #[test]
    fn a_stream_is_told_everything_and_a_call_how_it_ended() {
        let act = |status: &'static str| {
            move |answer: &mut Answer| {
                answer.headers(status_200(), false);
                answer.data(&frame(b"a"));
                answer.data(&frame(b"b"));
                let mut end = trailers(status);
                end.push(b"grpc-message", b"why%20not");
                answer.trailers(end);
            }
        };
        let expected = [
            "initial :status=200",
            "message a",
            "message b",
            "trailing grpc-status=7 grpc-message=why%20not",
            "close 7 why%20not{via_upstream}",
        ];
        assert_eq!(steps(false, act("7")), expected);
        assert_eq!(steps(true, act("7")), ["close 7 why%20not{via_upstream}"]);
        assert_eq!(steps(true, act("0")), ["message b"], "the last one, as in Envoy");
    }

    /// All of these were measured on Envoy 1.40.
    #[test]
    fn answers_that_are_not_what_they_should_be_come_to_a_status() {
        let with = |fields: &[(&str, &str)]| fields.iter().copied().collect::<FieldMap>();
        let check = |expected: &[&str], act: &dyn Fn(&mut Answer)| assert_eq!(steps(false, act), expected);
        check(&["initial", "trailing", "close 12 via_upstream"], &|answer| {
            answer.headers(with(&[(":status", "404")]), false);
            answer.data(b"not found");
        });
        check(&["initial", "trailing :status=403 grpc-status=9", "close 9 via_upstream"], &|answer| {
            answer.headers(with(&[(":status", "403"), ("grpc-status", "9")]), true);
        });
        check(&["initial", "trailing", "close 14 via_upstream"], &|answer| {
            answer.headers(with(&[(":status", "503"), ("grpc-status", "9")]), false);
        });
        check(&["initial", "trailing :status=200 grpc-status=5", "close 5 via_upstream"], &|answer| {
            answer.headers(with(&[(":status", "200"), ("grpc-status", "5")]), true);
        });
        let began = |answer: &mut Answer| answer.headers(status_200(), false);
        check(&["initial :status=200", "message a", "trailing", "close 2 via_upstream"], &|answer| {
            began(answer);
            answer.data(&frame(b"a"));
            answer.end();
        });
        check(&["initial :status=200", "trailing x=y", "close 2 via_upstream"], &|answer| {
            began(answer);
            answer.trailers(with(&[("x", "y")]));
        });
        check(&["initial :status=200", "trailing grpc-status=", "close 2 via_upstream"], &|answer| {
            began(answer);
            answer.trailers(trailers(""));
        });
        for status in ["zz", "17", "-1", "99"] {
            let trailing = format!("trailing grpc-status={status}");
            check(&["initial :status=200", &trailing, "close 4294967295 via_upstream"], &|answer| {
                began(answer);
                answer.trailers(trailers(status));
            });
        }
        check(&["initial :status=200", "message a", "trailing", "close 13 via_upstream"], &|answer| {
            began(answer);
            answer.data(&frame(b"a"));
            answer.data(b"\x01\0\0\0\x01b");
            answer.trailers(trailers("0"));
        });
        check(&["initial :status=200", "trailing", "close 8 via_upstream"], &|answer| {
            began(answer);
            answer.data(&frame(&[0; 101]));
        });
        check(&["initial :status=200", "trailing grpc-status=0", "close 0 via_upstream"], &|answer| {
            began(answer);
            answer.data(b"\0\0\0\0\x05half");
            answer.trailers(trailers("0"));
        });
        check(&["initial :status=200", "trailing", "close 13 broken"], &|answer| {
            began(answer);
            answer.reset("broken");
            answer.trailers(trailers("0"));
        });
        check(
            &[
                "initial",
                "trailing :status=200 content-type=application/grpc grpc-status=14 grpc-message=slow",
                "close 14 slow{response_timeout}",
            ],
            &|answer| answer.local(14, "slow", "response_timeout"),
        );
        let nothing = |answer: &mut Answer| {
            began(answer);
            answer.trailers(trailers("0"));
        };
        assert_eq!(steps(true, nothing), ["close 13 "], "success without a message is none");
    }

    #[test]
    fn an_answer_that_was_cut_says_nothing_else() {
        let mut answer = Answer::new(false, 100);
        answer.headers(status_200(), false);
        answer.data(&frame(b"a"));
        answer.cut(status::CANCELLED, "over");
        answer.trailers(trailers("0"));
        assert_eq!(answer.next(), Some(Step::Close(1, b"over".to_vec())));
        assert_eq!(answer.next(), None);
        assert!(answer.is_cut());
    }
}
