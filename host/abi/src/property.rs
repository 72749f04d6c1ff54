//! Properties: what a guest can ask of the stream, the connection and the host by path, and how Envoy encodes it.
//!
//! [`Attributes`] answers names with [`Value`]s; `proxy_get_property` walks a path through them and encodes what it ends at.
//! Text and bytes are raw, numbers 8 bytes little-endian, booleans one byte, times and durations nanoseconds as `i64`, maps
//! the form of [`crate::pairs`], messages protobuf. Names are Envoy 1.40's. Metadata is empty here, as in an Envoy that was
//! configured without.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::abi::{MapType, Status};
use crate::exchange::{Certificate, Exchange, TlsInfo, UpstreamInfo};
use crate::fields::FieldMap;
use crate::grpc::status_of_http;
use crate::pairs;
use crate::plugin::Plugin;
use crate::protobuf;
use crate::state::{Found, Kind};

/// An attribute's value, or a step on the way to one.
#[derive(Clone, Debug)]
pub(crate) enum Value<'a> {
    Text(Cow<'a, [u8]>),
    Bytes(Cow<'a, [u8]>),
    Int(i64),
    Uint(u64),
    Bool(bool),
    /// Nanoseconds since 1970.
    Timestamp(i64),
    /// Nanoseconds.
    Duration(i64),
    /// Attributes by name, which cannot be enumerated.
    Group(Group),
    /// Fields of a message; none at all where the message cannot be seen.
    Fields(Option<&'a FieldMap>),
    /// An address with the fields `ip` and `port`.
    Address(SocketAddr),
    Message(Message),
    /// A map without entries.
    Nothing,
    /// Something that is there and cannot be encoded.
    Opaque,
}

/// The attributes that have others below them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Request,
    Response,
    Source,
    Destination,
    Connection,
    Upstream,
    Xds,
    FilterState,
    UpstreamFilterState,
}

/// Messages that Envoy shows; what they hold here is little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// `envoy.config.core.v3.Node`: who this host is.
    Node,
    /// `envoy.config.core.v3.Metadata`, empty.
    Metadata,
    /// `envoy.config.core.v3.Locality`, empty.
    Locality,
}

/// Id and cluster of the node, as `envoy-config` gives them to Envoy.
const NODE: &str = "portcullis";

/// What one call can look up: the plugin, and the stream with the filter's place in it, if there is one.
#[derive(Clone, Copy)]
pub(crate) struct Attributes<'a> {
    pub(crate) plugin: &'a Plugin,
    pub(crate) stream: Option<(&'a Exchange, usize)>,
}

/// A path's segments: NUL-separated; a NUL at the end ends nothing.
fn segments(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.strip_suffix(b"\0").unwrap_or(path).split(|byte| *byte == 0)
}

impl<'a> Attributes<'a> {
    /// Appends the value at `path` to `out`.
    pub(crate) fn get(&self, path: &[u8], out: &mut Vec<u8>) -> Status {
        if let Some((exchange, _)) = self.stream
            && let Some(value) = exchange.given.get(path.strip_suffix(b"\0").unwrap_or(path))
        {
            out.extend_from_slice(value);
            return Status::Ok;
        }
        let mut segments = segments(path);
        let first = segments.next().and_then(|name| self.top(name));
        match segments.try_fold(first, |value, name| Some(value.and_then(|value| self.field(&value, name)))).flatten() {
            None => Status::NotFound,
            Some(value) => value.encode(out),
        }
    }

    /// The value of a name that stands alone or begins a path.
    pub(crate) fn top(&self, name: &[u8]) -> Option<Value<'a>> {
        let plugin = self.plugin;
        match name {
            b"plugin_name" => return Some(text(&plugin.name)),
            b"plugin_root_id" => return Some(text(&plugin.root_id)),
            b"plugin_vm_id" => return Some(text(&plugin.vm_id)),
            // The one group that root contexts have, too.
            b"xds" => return Some(Value::Group(Group::Xds)),
            _ => {}
        }
        let (exchange, _) = self.stream?;
        Some(Value::Group(match name {
            b"request" => Group::Request,
            b"response" => Group::Response,
            b"source" => Group::Source,
            b"destination" => Group::Destination,
            b"connection" => Group::Connection,
            b"upstream" => Group::Upstream,
            b"filter_state" => Group::FilterState,
            b"upstream_filter_state" if exchange.response_headers.is_some() => Group::UpstreamFilterState,
            b"connection_id" => return Some(Value::Uint(exchange.info.connection_id)),
            b"metadata" => return Some(Value::Message(Message::Metadata)),
            // What `proxy_set_property` stored.
            name => match exchange.filter_state.get(&[b"wasm.", name].concat())? {
                // By its own name it is bytes for whoever knows what they mean.
                Found::Property(value, Kind::Bytes | Kind::Message) => return Some(Value::Bytes(value)),
                Found::Property(value, Kind::Text) => return Some(Value::Text(value)),
                Found::Text(_) | Found::Address(_) | Found::Hidden => return None,
            },
        }))
    }

    /// What lies below a value.
    pub(crate) fn field(&self, of: &Value<'a>, name: &[u8]) -> Option<Value<'a>> {
        match of {
            Value::Group(Group::Xds) => self.xds(name),
            Value::Group(group) => {
                let (exchange, stage) = self.stream?;
                match group {
                    Group::Request => request(exchange, stage, name),
                    Group::Response => response(exchange, stage, name),
                    Group::Source => peer(exchange.info.source_address?, name),
                    Group::Destination => peer(exchange.info.destination_address?, name),
                    Group::Connection => connection(exchange, name),
                    Group::Upstream => upstream(exchange, name),
                    Group::FilterState => match exchange.filter_state.get(name)? {
                        Found::Property(value, Kind::Bytes) => Some(Value::Bytes(value)),
                        Found::Property(value, Kind::Text) => Some(Value::Text(value)),
                        Found::Property(_, Kind::Message) => Some(Value::Opaque),
                        // Objects of Envoy's own are bytes there, too.
                        Found::Text(value) => Some(Value::Bytes(value)),
                        Found::Address(address) => Some(Value::Address(address)),
                        Found::Hidden => None,
                    },
                    Group::UpstreamFilterState | Group::Xds => None,
                }
            }
            Value::Fields(fields) => joined((*fields)?, name).map(Value::Text),
            Value::Address(address) => match name {
                b"ip" => Some(owned(address.ip().to_string())),
                b"port" => Some(Value::Int(i64::from(address.port()))),
                _ => None,
            },
            Value::Message(message) => match (message, name) {
                (Message::Node, b"id" | b"cluster" | b"user_agent_name") => Some(text(NODE)),
                (Message::Node, b"metadata") => Some(Value::Nothing),
                (Message::Node, b"locality") => Some(Value::Message(Message::Locality)),
                (Message::Locality, b"region" | b"zone" | b"sub_zone") => Some(text("")),
                (Message::Metadata, b"filter_metadata" | b"typed_filter_metadata") => Some(Value::Nothing),
                _ => None,
            },
            _ => None,
        }
    }

    fn xds(&self, name: &[u8]) -> Option<Value<'a>> {
        if name == b"node" {
            return Some(Value::Message(Message::Node));
        }
        let (exchange, _) = self.stream?;
        let info = &exchange.info;
        let is_http = exchange.tcp.is_none();
        // Of a TCP connection it is known once there is a connection to it.
        let has_cluster = if is_http { info.route.endpoints.is_some() } else { exchange.upstream.is_some() };
        match name {
            b"cluster_name" => has_cluster.then(|| text(&info.route.cluster_name)),
            b"cluster_metadata" => has_cluster.then_some(Value::Message(Message::Metadata)),
            b"route_name" | b"route_metadata" | b"virtual_host_name" | b"virtual_host_metadata" if !is_http => None,
            b"route_name" => Some(text(&info.route.name)),
            b"virtual_host_name" => Some(text(&info.route.virtual_host_name)),
            b"filter_chain_name" => Some(text(info.filter_chain_name)),
            b"route_metadata" | b"virtual_host_metadata" | b"listener_metadata" => {
                Some(Value::Message(Message::Metadata))
            }
            // envoy.config.core.v3.TrafficDirection: INBOUND
            b"listener_direction" => Some(Value::Int(1)),
            // Envoy has a host without metadata there, which it cannot encode.
            b"upstream_host_metadata" | b"upstream_host_locality_metadata" => {
                exchange.upstream.as_ref().map(|_| Value::Opaque)
            }
            _ => None,
        }
    }
}

fn request<'a>(exchange: &'a Exchange, stage: usize, name: &[u8]) -> Option<Value<'a>> {
    let info = &exchange.info;
    let fields = exchange.map(stage, MapType::RequestHeaders);
    let field = |name: &[u8]| fields?.get(name).map(|value| Value::Text(value.into()));
    let path = || fields?.get(b":path");
    match name {
        b"path" => field(b":path"),
        b"url_path" => Some(Value::Text(split_query(path()?).0.into())),
        b"query" => Some(Value::Text(split_query(path()?).1.into())),
        b"host" => field(b":authority"),
        b"method" => field(b":method"),
        b"scheme" => field(b":scheme"),
        b"referer" => field(b"referer"),
        b"useragent" => field(b"user-agent"),
        b"id" => field(b"x-request-id"),
        b"time" => Some(Value::Timestamp(info.start_unix_nanos as i64)),
        b"protocol" if exchange.tcp.is_none() => Some(text(info.protocol.as_str())),
        // What the request says of its length; what has come of it where it does not say.
        b"size" => match fields.and_then(|fields| fields.get(b"content-length")) {
            Some(length) => Some(Value::Int(std::str::from_utf8(length).ok()?.parse().ok()?)),
            None => Some(Value::Int(exchange.request_bytes as i64)),
        },
        b"total_size" => Some(Value::Int(exchange.request_bytes as i64 + byte_size(fields))),
        b"headers_bytes" => Some(Value::Int(byte_size(fields))),
        b"headers" => Some(Value::Fields(fields)),
        b"duration" if exchange.tcp.is_none() => Some(duration(exchange.ending.as_ref()?.duration)),
        _ => None,
    }
}

fn response<'a>(exchange: &'a Exchange, stage: usize, name: &[u8]) -> Option<Value<'a>> {
    let fields = exchange.map(stage, MapType::ResponseHeaders);
    let trailers = exchange.map(stage, MapType::ResponseTrailers);
    let code = || -> Option<u16> {
        std::str::from_utf8(exchange.response_headers.as_ref()?.get(b":status")?).ok()?.parse().ok()
    };
    match name {
        b"code" => Some(Value::Int(i64::from(code()?))),
        b"code_details" => match (&exchange.ending, &exchange.local_details) {
            (Some(ending), _) if exchange.tcp.is_none() => Some(text(&ending.response_code_details)),
            (_, Some(details)) => Some(text(details)),
            (_, None) => exchange.response_headers.as_ref().map(|_| text("via_upstream")),
        },
        b"flags" => Some(Value::Int(exchange.ending.as_ref().map_or(0, |ending| ending.response_flags as i64))),
        b"grpc_status" => {
            let said = [trailers, fields].into_iter().flatten().find_map(|fields| fields.get(b"grpc-status"));
            let said = said.and_then(|status| std::str::from_utf8(status).ok()?.parse().ok());
            said.or_else(|| Some(i64::from(status_of_http(code()?)))).map(Value::Int)
        }
        b"headers" => Some(Value::Fields(fields)),
        b"headers_bytes" => Some(Value::Int(byte_size(fields))),
        b"trailers" => Some(Value::Fields(trailers)),
        b"size" => Some(Value::Int(exchange.response_sent as i64)),
        b"total_size" => Some(Value::Int(exchange.response_sent as i64 + byte_size(fields) + byte_size(trailers))),
        b"backend_latency" => Some(duration(exchange.upstream.as_ref()?.latency?)),
        _ => None,
    }
}

fn byte_size(fields: Option<&FieldMap>) -> i64 {
    fields.map_or(0, FieldMap::byte_size) as i64
}

fn connection<'a>(exchange: &'a Exchange, name: &[u8]) -> Option<Value<'a>> {
    let tls = exchange.info.tls.as_ref();
    match name {
        b"id" => Some(Value::Uint(exchange.info.connection_id)),
        b"mtls" => Some(Value::Bool(tls.is_some_and(|tls| tls.peer_certificate.is_some()))),
        b"requested_server_name" => Some(text(tls.map_or("", |tls| &tls.server_name))),
        _ => session(tls?, name),
    }
}

/// What is known of a TLS session, with a client or with an upstream.
fn session<'a>(tls: &'a TlsInfo, name: &[u8]) -> Option<Value<'a>> {
    let local = tls.local_certificate.as_deref();
    let peer = tls.peer_certificate.as_deref();
    let first = |names: Option<&'a Vec<String>>| names?.first().map(|name| text(name));
    let subject = |certificate: Option<&'a Certificate>| Some(text(certificate.map_or("", |found| &found.subject)));
    match name {
        b"tls_version" => Some(text(&tls.version)),
        b"subject_local_certificate" => subject(local),
        b"subject_peer_certificate" => subject(peer),
        b"dns_san_local_certificate" => first(local.map(|found| &found.dns_names)),
        b"dns_san_peer_certificate" => first(peer.map(|found| &found.dns_names)),
        b"uri_san_local_certificate" => first(local.map(|found| &found.uris)),
        b"uri_san_peer_certificate" => first(peer.map(|found| &found.uris)),
        b"sha256_peer_certificate_digest" => Some(text(&peer?.sha256)),
        b"peer_certificate" => Some(text(&peer?.pem)),
        _ => None,
    }
}

fn upstream<'a>(exchange: &'a Exchange, name: &[u8]) -> Option<Value<'a>> {
    let upstream = exchange.upstream.as_ref();
    match name {
        // These two are there before an upstream was chosen.
        b"request_attempt_count" => {
            return Some(Value::Uint(upstream.map_or(0, |upstream| u64::from(upstream.attempts))));
        }
        // Of a TCP connection they are known once there is a connection to one of them.
        b"num_endpoints" if exchange.tcp.is_none() || upstream.is_some() => {
            return exchange.info.route.endpoints.map(|number| Value::Uint(number as u64));
        }
        b"transport_failure_reason" if exchange.tcp.is_some() => return Some(text("")),
        _ => {}
    }
    let UpstreamInfo { address, local_address, tls, ready_after, .. } = upstream?;
    match name {
        b"address" | b"port" => peer((*address)?, name),
        b"local_address" => peer((*local_address)?, b"address"),
        b"locality" => Some(Value::Message(Message::Locality)),
        // A connection that failed has no response to look at.
        b"transport_failure_reason" => Some(text("")),
        b"cx_pool_ready_duration" => ready_after.map(duration),
        _ => session(tls.as_ref()?, name),
    }
}

fn peer<'a>(address: SocketAddr, name: &[u8]) -> Option<Value<'a>> {
    // A client on a dual-stack listener is the IPv4 client it is.
    let address = match address.ip() {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, |v4| SocketAddr::new(IpAddr::V4(v4), address.port())),
        IpAddr::V4(_) => address,
    };
    match name {
        b"address" => Some(owned(address.to_string())),
        b"port" => Some(Value::Int(i64::from(address.port()))),
        _ => None,
    }
}

/// Path and query of a target; Envoy leaves out what stands behind a `#`, though a request has no business with it.
fn split_query(path: &[u8]) -> (&[u8], &[u8]) {
    match memchr::memchr(b'?', path) {
        Some(at) => {
            let query = &path[at + 1..];
            (&path[..at], memchr::memchr(b'#', query).map_or(query, |end| &query[..end]))
        }
        None => (path, b""),
    }
}

fn text(value: &str) -> Value<'_> {
    Value::Text(value.as_bytes().into())
}

fn owned<'a>(value: String) -> Value<'a> {
    Value::Text(value.into_bytes().into())
}

fn duration<'a>(duration: Duration) -> Value<'a> {
    Value::Duration(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX))
}

/// All values of a name, joined.
fn joined<'a>(fields: &'a FieldMap, name: &[u8]) -> Option<Cow<'a, [u8]>> {
    let mut values = fields.get_all(name);
    let mut joined = Cow::Borrowed(values.next()?);
    for value in values {
        let joined = joined.to_mut();
        joined.push(b',');
        joined.extend_from_slice(value);
    }
    Some(joined)
}

impl Value<'_> {
    /// Appends what a guest gets.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Status {
        match self {
            Value::Text(bytes) | Value::Bytes(bytes) => out.extend_from_slice(bytes),
            Value::Int(number) | Value::Timestamp(number) | Value::Duration(number) => {
                out.extend_from_slice(&number.to_le_bytes());
            }
            Value::Uint(number) => out.extend_from_slice(&number.to_le_bytes()),
            Value::Bool(truth) => out.push(u8::from(*truth)),
            Value::Fields(Some(fields)) if !fields.is_empty() => encode_fields(fields, out),
            // Unlike an empty map of fields, an empty map has its count.
            Value::Fields(_) | Value::Address(_) | Value::Nothing => out.extend_from_slice(&[0; 4]),
            Value::Message(Message::Node) => {
                for number in [1, 2, 6] {
                    protobuf::push_bytes(out, number, NODE.as_bytes());
                }
            }
            Value::Message(Message::Metadata | Message::Locality) => {}
            Value::Group(_) | Value::Opaque => return Status::SerializationFailure,
        }
        Status::Ok
    }
}

/// One entry a name, sorted, repeated lines joined.
fn encode_fields(fields: &FieldMap, out: &mut Vec<u8>) {
    let mut by_name: BTreeMap<&[u8], Vec<u8>> = BTreeMap::new();
    for (name, value) in fields.iter() {
        by_name
            .entry(name)
            .and_modify(|joined| {
                joined.push(b',');
                joined.extend_from_slice(value);
            })
            .or_insert_with(|| value.to_vec());
    }
    pairs::encode(by_name.iter().map(|(name, value)| (*name, value.as_slice())), out);
}
