//! One request and its response, or one TCP connection, as the guests of a chain see them.
//!
//! All filters of a stream look at the same exchange; what each of them may see and change at the moment is kept per
//! stage. Shared between the stream and its guests on one thread, and never borrowed across a call into a guest.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::abi::{BufferType, Direction, MapType};
use crate::fields::FieldMap;
use crate::relay::TcpData;
use crate::state::{ConnectionState, FilterState};

/// Version of HTTP that a client speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    #[default]
    Http11,
    /// HTTP/2.
    Http2,
}

impl Protocol {
    /// As in a request line.
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Http10 => "HTTP/1.0",
            Protocol::Http11 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
        }
    }
}

/// What is known of a TLS session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsInfo {
    /// E.g. `TLSv1.3`.
    pub version: String,
    /// Server name that was asked for (SNI), if any.
    pub server_name: String,
    /// The certificate of this side.
    pub local_certificate: Option<Arc<Certificate>>,
    /// The certificate of the other side, if it presented one that was accepted.
    pub peer_certificate: Option<Arc<Certificate>>,
}

/// What properties tell of a certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Certificate {
    /// Its subject, as RFC 2253 writes it: the last part first.
    pub subject: String,
    /// Its DNS names, in order.
    pub dns_names: Vec<String>,
    /// Its URIs, in order.
    pub uris: Vec<String>,
    /// SHA-256 of its DER form, in lower-case hexadecimal digits.
    pub sha256: String,
    /// Its PEM form.
    pub pem: String,
}

/// What is known of a stream when it begins. Properties are answered from it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StreamInfo {
    /// The client.
    pub source_address: Option<SocketAddr>,
    /// Where it connected to.
    pub destination_address: Option<SocketAddr>,
    /// The request's id, also in its field `x-request-id`. Of a TCP connection: empty.
    pub request_id: String,
    /// Version of HTTP.
    pub protocol: Protocol,
    /// When the request or the TCP connection began, in nanoseconds since 1970.
    pub start_unix_nanos: u64,
    /// Number of the client's connection.
    pub connection_id: u64,
    /// Present on a TLS connection.
    pub tls: Option<TlsInfo>,
    /// The route that was chosen.
    pub route: RouteInfo,
    /// What Envoy calls the part of a listener that took the connection.
    pub filter_chain_name: &'static str,
    /// Name of the listener.
    pub listener_name: Arc<str>,
    /// What guests keep with the connection.
    pub connection_state: ConnectionState,
    /// Bytes of body, or of a TCP connection, that may wait in the chain, per direction. Default 1 MiB, Envoy's.
    pub buffer_bytes_max: usize,
}

impl Default for StreamInfo {
    fn default() -> StreamInfo {
        StreamInfo {
            source_address: None,
            destination_address: None,
            request_id: String::new(),
            protocol: Protocol::default(),
            start_unix_nanos: 0,
            connection_id: 0,
            tls: None,
            route: RouteInfo::default(),
            filter_chain_name: "",
            listener_name: Arc::default(),
            connection_state: ConnectionState::default(),
            buffer_bytes_max: 1024 * 1024,
        }
    }
}

/// What is known of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteInfo {
    /// Its name.
    pub name: Arc<str>,
    /// Name of the upstream that it leads to.
    pub cluster_name: Arc<str>,
    /// Number of the upstream's endpoints; `None` where the route leads to no upstream.
    pub endpoints: Option<usize>,
    /// The most specific of the policy's host patterns that the request's host falls under.
    pub virtual_host_name: Arc<str>,
}

/// What is known of the upstream once it was chosen.
#[derive(Clone, Debug, Default)]
pub struct UpstreamInfo {
    /// Its address.
    pub address: Option<SocketAddr>,
    /// This side's address of the connection.
    pub local_address: Option<SocketAddr>,
    /// Present on a TLS connection.
    pub tls: Option<TlsInfo>,
    /// How often the request was sent.
    pub attempts: u32,
    /// Time until there was a connection to send it on.
    pub ready_after: Option<Duration>,
    /// From the first byte sent to the last byte received, once that has come.
    pub latency: Option<Duration>,
}

/// How a stream ended, for `on_log`.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    /// From the first byte of the request to the last of the response.
    pub duration: Duration,
    /// Details of the response code, e.g. `via_upstream`.
    pub response_code_details: String,
    /// Envoy's response flags as a bit set.
    pub response_flags: u64,
}

/// An answer made here rather than by the upstream.
#[derive(Clone, Default)]
pub struct LocalResponse {
    /// Status code.
    pub status: u16,
    /// Response code details, for logs only.
    pub details: String,
    /// Body; `content-length` is derived from it.
    pub body: Bytes,
    /// Further fields.
    pub fields: FieldMap,
    /// Trailers-only gRPC answer where set.
    pub grpc_status: Option<u32>,
}

impl std::fmt::Debug for LocalResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalResponse")
            .field("status", &self.status)
            .field("details", &self.details)
            .field("fields", &self.fields)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// What a guest asked for in a callback; carried out once the callback has returned.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// The worker knows that something was asked: it need not be told again.
    pub(crate) noted: bool,
    pub(crate) resume_request: bool,
    pub(crate) resume_response: bool,
    pub(crate) local_response: Option<LocalResponse>,
    pub(crate) reset: bool,
}

/// What one filter may see of the exchange at the moment.
#[derive(Debug, Default)]
pub(crate) struct StageView {
    pub(crate) request_headers: bool,
    pub(crate) request_trailers: bool,
    pub(crate) response_headers: bool,
    pub(crate) response_trailers: bool,
    pub(crate) request_body: Option<BytesMut>,
    /// The request's body waits here, but the guest has resumed.
    pub(crate) request_body_hidden: bool,
    pub(crate) response_body: Option<BytesMut>,
    /// The body callback under way is the last of its direction: trailers can still be added.
    pub(crate) last_body: Option<Direction>,
    /// A guest has changed the body of this direction since the worker last looked.
    pub(crate) edited: bool,
    /// `on_log`: everything can be read, nothing changed.
    pub(crate) logging: bool,
    pub(crate) asked: Asked,
}

impl StageView {
    pub(crate) fn body(&self, direction: Direction) -> Option<&[u8]> {
        match direction {
            Direction::Request => self.request_body.as_deref().filter(|_| !self.request_body_hidden),
            Direction::Response => self.response_body.as_deref(),
        }
    }

    pub(crate) fn body_mut(&mut self, direction: Direction) -> &mut Option<BytesMut> {
        match direction {
            Direction::Request => &mut self.request_body,
            Direction::Response => &mut self.response_body,
        }
    }

    /// After a guest resumed anything, nothing of the request can be seen any more, at once.
    pub(crate) fn hide_request(&mut self) {
        self.request_headers = false;
        self.request_trailers = false;
        self.request_body_hidden = true;
    }

    pub(crate) fn set_headers_visible(&mut self, direction: Direction, visible: bool) {
        match direction {
            Direction::Request => self.request_headers = visible,
            Direction::Response => self.response_headers = visible,
        }
    }

    pub(crate) fn set_trailers_visible(&mut self, direction: Direction, visible: bool) {
        match direction {
            Direction::Request => self.request_trailers = visible,
            Direction::Response => self.response_trailers = visible,
        }
    }
}

/// One request and its response, or one TCP connection.
#[derive(Debug, Default)]
pub(crate) struct Exchange {
    pub(crate) info: StreamInfo,
    pub(crate) upstream: Option<UpstreamInfo>,
    pub(crate) ending: Option<Ending>,
    pub(crate) request_headers: FieldMap,
    pub(crate) request_trailers: Option<FieldMap>,
    pub(crate) response_headers: Option<FieldMap>,
    pub(crate) response_trailers: Option<FieldMap>,
    pub(crate) request_bytes: u64,
    /// Bytes of body that have left towards the client.
    pub(crate) response_sent: u64,
    /// Details of the response code where the response was made here.
    pub(crate) local_details: Option<Rc<str>>,
    /// Values that guests keep with the stream and its connection.
    pub(crate) filter_state: FilterState,
    /// Values that the embedder gave, by path; empty but in tests.
    pub(crate) given: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) route_cleared: bool,
    pub(crate) stages: Vec<StageView>,
    /// The bytes of a TCP connection. Where they are, there are no messages, and so no `stages`.
    pub(crate) tcp: Option<TcpData>,
}

impl Exchange {
    pub(crate) fn new(info: StreamInfo, stages: usize) -> Exchange {
        Exchange {
            filter_state: FilterState::new(info.connection_state.clone()),
            info,
            stages: std::iter::repeat_with(StageView::default).take(stages).collect(),
            ..Exchange::default()
        }
    }

    /// The bytes of a stream's buffer as this stage may read them now.
    pub(crate) fn buffer(&self, stage: usize, buffer: BufferType) -> Option<&[u8]> {
        match buffer {
            BufferType::RequestBody => self.stages.get(stage)?.body(Direction::Request),
            BufferType::ResponseBody => self.stages.get(stage)?.body(Direction::Response),
            BufferType::DownstreamData => self.tcp.as_ref()?.seen(stage, Direction::Request).map(|bytes| &**bytes),
            BufferType::UpstreamData => self.tcp.as_ref()?.seen(stage, Direction::Response).map(|bytes| &**bytes),
            _ => None,
        }
    }

    /// The bytes of a stream's buffer as this stage may change them now.
    pub(crate) fn buffer_mut(&mut self, stage: usize, buffer: BufferType) -> Option<&mut BytesMut> {
        let direction = match buffer {
            BufferType::RequestBody => Direction::Request,
            BufferType::ResponseBody => Direction::Response,
            BufferType::DownstreamData => return self.tcp.as_mut()?.seen_mut(stage, Direction::Request),
            BufferType::UpstreamData => return self.tcp.as_mut()?.seen_mut(stage, Direction::Response),
            _ => return None,
        };
        let view = self.stages.get_mut(stage).filter(|view| !view.logging)?;
        let body = match direction {
            Direction::Request => view.request_body.as_mut(),
            Direction::Response => view.response_body.as_mut(),
        }?;
        view.edited = true;
        Some(body)
    }

    /// The map as this stage may read it now.
    pub(crate) fn map(&self, stage: usize, map: MapType) -> Option<&FieldMap> {
        let view = self.stages.get(stage)?;
        match map {
            MapType::RequestHeaders => (view.request_headers || view.logging).then_some(&self.request_headers),
            MapType::RequestTrailers => self.request_trailers.as_ref().filter(|_| view.request_trailers),
            MapType::ResponseHeaders => {
                self.response_headers.as_ref().filter(|_| view.response_headers || view.logging)
            }
            MapType::ResponseTrailers => {
                self.response_trailers.as_ref().filter(|_| view.response_trailers || view.logging)
            }
            _ => None,
        }
    }

    /// The map as this stage may change it now. In the last body callback trailers come into being this way.
    pub(crate) fn map_mut(&mut self, stage: usize, map: MapType) -> Option<&mut FieldMap> {
        let view = self.stages.get_mut(stage)?;
        if view.logging {
            return None;
        }
        match map {
            MapType::RequestHeaders => view.request_headers.then_some(&mut self.request_headers),
            MapType::ResponseHeaders => self.response_headers.as_mut().filter(|_| view.response_headers),
            MapType::RequestTrailers => {
                if view.last_body == Some(Direction::Request) && self.request_trailers.is_none() {
                    view.request_trailers = true;
                    self.request_trailers = Some(FieldMap::new());
                }
                self.request_trailers.as_mut().filter(|_| view.request_trailers)
            }
            MapType::ResponseTrailers => {
                if view.last_body == Some(Direction::Response) && self.response_trailers.is_none() {
                    view.response_trailers = true;
                    self.response_trailers = Some(FieldMap::new());
                }
                self.response_trailers.as_mut().filter(|_| view.response_trailers)
            }
            _ => None,
        }
    }

    pub(crate) fn headers(&self, direction: Direction) -> Option<&FieldMap> {
        match direction {
            Direction::Request => Some(&self.request_headers),
            Direction::Response => self.response_headers.as_ref(),
        }
    }

    pub(crate) fn headers_mut(&mut self, direction: Direction) -> Option<&mut FieldMap> {
        match direction {
            Direction::Request => Some(&mut self.request_headers),
            Direction::Response => self.response_headers.as_mut(),
        }
    }

    pub(crate) fn trailers_mut(&mut self, direction: Direction) -> &mut Option<FieldMap> {
        match direction {
            Direction::Request => &mut self.request_trailers,
            Direction::Response => &mut self.response_trailers,
        }
    }
}
