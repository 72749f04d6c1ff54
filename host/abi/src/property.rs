//! Properties: what a guest can ask of the stream, the connection and the host by path, and how Envoy encodes it.
//!
//! Strings and bytes are raw, numbers 8 bytes little-endian, booleans one byte, times and durations nanoseconds as
//! `i64`, maps the form of [`crate::pairs`].

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::abi::MapType;
use crate::exchange::Exchange;
use crate::fields::FieldMap;
use crate::pairs;
use crate::plugin::Plugin;

/// A path's segments: NUL-separated; a NUL at the end ends nothing.
fn segments(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.strip_suffix(b"\0").unwrap_or(path).split(|byte| *byte == 0)
}

/// Appends the value at `path` to `out`; `None` where there is none now.
///
/// `stream` is absent in a root context.
pub(crate) fn get(plugin: &Plugin, stream: Option<(&Exchange, usize)>, path: &[u8], out: &mut Vec<u8>) -> Option<()> {
    if let Some((exchange, _)) = stream
        && let Some(value) = exchange.given.get(path.strip_suffix(b"\0").unwrap_or(path))
    {
        return bytes(out, value);
    }
    let mut parts = segments(path);
    let first = parts.next()?;
    let second = parts.next();
    let third = parts.next();
    if parts.next().is_some() {
        return None;
    }
    match (first, second, third) {
        (b"plugin_name", None, None) => text(out, &plugin.name),
        (b"plugin_root_id", None, None) => text(out, &plugin.root_id),
        (b"plugin_vm_id", None, None) => text(out, &plugin.vm_id),
        _ => {
            let (exchange, stage) = stream?;
            if exchange.tcp.is_some() && matches!(first, b"request" | b"response") {
                return of_connection(exchange, first, second?, third, out);
            }
            match (first, second, third) {
                (b"request", Some(name), key) => request(exchange, stage, name, key, out),
                (b"response", Some(name), key) => response(exchange, stage, name, key, out),
                (b"source", Some(name), None) => address(exchange.info.source_address?, name, out),
                (b"destination", Some(name), None) => address(exchange.info.destination_address?, name, out),
                (b"upstream", Some(name), None) => {
                    address(exchange.upstream.as_ref().and_then(|upstream| upstream.address)?, name, out)
                }
                (b"connection", Some(name), None) => connection(exchange, name, out),
                (b"connection_id", None, None) => number(out, exchange.info.connection_id),
                (b"xds", Some(name), None) => xds(exchange, name, out),
                (b"filter_state", Some(key), None) => bytes(out, exchange.filter_state.get(key)?),
                // What `proxy_set_property` stored.
                (key, None, None) => {
                    let stored = [b"wasm.", key].concat();
                    bytes(out, exchange.filter_state.get(&stored)?)
                }
                _ => None,
            }
        }
    }
}

fn request(exchange: &Exchange, stage: usize, name: &[u8], key: Option<&[u8]>, out: &mut Vec<u8>) -> Option<()> {
    let info = &exchange.info;
    match (name, key) {
        (b"time", None) => return number(out, info.start_unix_nanos),
        (b"protocol", None) => return text(out, info.protocol.as_str()),
        (b"size", None) => return number(out, exchange.request_bytes),
        (b"duration", None) => return number(out, exchange.ending.as_ref()?.duration.as_nanos() as u64),
        _ => {}
    }
    let fields = exchange.map(stage, MapType::RequestHeaders)?;
    match (name, key) {
        (b"path", None) => bytes(out, fields.get(b":path")?),
        (b"url_path", None) => bytes(out, split_query(fields.get(b":path")?).0),
        (b"query", None) => bytes(out, split_query(fields.get(b":path")?).1),
        (b"host", None) => bytes(out, fields.get(b":authority")?),
        (b"method", None) => bytes(out, fields.get(b":method")?),
        (b"scheme", None) => bytes(out, fields.get(b":scheme")?),
        (b"referer", None) => bytes(out, fields.get(b"referer")?),
        (b"useragent", None) => bytes(out, fields.get(b"user-agent")?),
        (b"id", None) => bytes(out, fields.get(b"x-request-id")?),
        (b"total_size", None) => number(out, exchange.request_bytes + fields.byte_size() as u64),
        (b"headers", None) => map(out, fields),
        (b"headers", Some(key)) => joined(out, fields, key),
        _ => None,
    }
}

fn response(exchange: &Exchange, stage: usize, name: &[u8], key: Option<&[u8]>, out: &mut Vec<u8>) -> Option<()> {
    match (name, key) {
        (b"code", None) => {
            let status = exchange.response_headers.as_ref()?.get(b":status")?;
            return number(out, std::str::from_utf8(status).ok()?.parse().ok()?);
        }
        (b"code_details", None) => return text(out, &exchange.ending.as_ref()?.response_code_details),
        (b"flags", None) => return number(out, exchange.ending.as_ref()?.response_flags),
        (b"size", None) => return number(out, exchange.ending.as_ref().map(|_| exchange.response_bytes)?),
        _ => {}
    }
    match (name, key) {
        (b"headers", None) => map(out, exchange.map(stage, MapType::ResponseHeaders)?),
        (b"headers", Some(key)) => joined(out, exchange.map(stage, MapType::ResponseHeaders)?, key),
        (b"trailers", None) => map(out, exchange.map(stage, MapType::ResponseTrailers)?),
        (b"trailers", Some(key)) => joined(out, exchange.map(stage, MapType::ResponseTrailers)?, key),
        (b"total_size", None) => {
            let fields = exchange.map(stage, MapType::ResponseHeaders)?;
            number(out, exchange.ending.as_ref().map(|_| exchange.response_bytes + fields.byte_size() as u64)?)
        }
        _ => None,
    }
}

/// What a TCP connection has of a request and a response: when it began, and what passed.
fn of_connection(exchange: &Exchange, of: &[u8], name: &[u8], key: Option<&[u8]>, out: &mut Vec<u8>) -> Option<()> {
    match (of, name, key) {
        (b"request", b"time", None) => number(out, exchange.info.start_unix_nanos),
        (b"request", b"size" | b"total_size", None) => number(out, exchange.request_bytes),
        (b"response", b"size" | b"total_size", None) => number(out, exchange.response_bytes),
        (b"response", b"flags", None) => {
            number(out, exchange.ending.as_ref().map_or(0, |ending| ending.response_flags))
        }
        // A map without pairs.
        (_, b"headers", None) => bytes(out, &0_u32.to_le_bytes()),
        _ => None,
    }
}

fn connection(exchange: &Exchange, name: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let tls = exchange.info.tls.as_ref();
    match name {
        b"id" => number(out, exchange.info.connection_id),
        b"mtls" => bytes(out, &[u8::from(tls.is_some_and(|tls| tls.client_certificate_accepted))]),
        b"requested_server_name" => text(out, tls.map_or("", |tls| &tls.server_name)),
        b"tls_version" => text(out, &tls?.version),
        _ => None,
    }
}

fn xds(exchange: &Exchange, name: &[u8], out: &mut Vec<u8>) -> Option<()> {
    match name {
        b"route_name" if exchange.tcp.is_none() => text(out, &exchange.info.route_name),
        // Of a TCP connection it is known once there is a connection to it.
        b"cluster_name" if exchange.tcp.is_none() || exchange.upstream.is_some() => {
            text(out, &exchange.info.cluster_name)
        }
        // envoy.config.core.v3.TrafficDirection: INBOUND
        b"listener_direction" => number(out, 1),
        _ => None,
    }
}

fn address(address: SocketAddr, name: &[u8], out: &mut Vec<u8>) -> Option<()> {
    // A client on a dual-stack listener is the IPv4 client it is.
    let address = match address.ip() {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, |v4| SocketAddr::new(IpAddr::V4(v4), address.port())),
        IpAddr::V4(_) => address,
    };
    match name {
        b"address" => text(out, &address.to_string()),
        b"port" => number(out, u64::from(address.port())),
        _ => None,
    }
}

fn split_query(path: &[u8]) -> (&[u8], &[u8]) {
    match memchr::memchr(b'?', path) {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (path, b""),
    }
}

fn bytes(out: &mut Vec<u8>, value: &[u8]) -> Option<()> {
    out.extend_from_slice(value);
    Some(())
}

fn text(out: &mut Vec<u8>, value: &str) -> Option<()> {
    bytes(out, value.as_bytes())
}

fn number(out: &mut Vec<u8>, value: u64) -> Option<()> {
    bytes(out, &value.to_le_bytes())
}

/// A map of fields: one entry a name, sorted, repeated lines joined as `headers.NAME` would answer.
fn map(out: &mut Vec<u8>, fields: &FieldMap) -> Option<()> {
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
    Some(())
}

fn joined(out: &mut Vec<u8>, fields: &FieldMap, name: &[u8]) -> Option<()> {
    let mut values = fields.get_all(name);
    out.extend_from_slice(values.next()?);
    for value in values {
        out.push(b',');
        out.extend_from_slice(value);
    }
    Some(())
}
