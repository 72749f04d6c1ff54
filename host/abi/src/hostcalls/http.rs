//! Buffers, maps, streams, local responses, HTTP callouts.

use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::{Answer, Call};
use crate::abi::{BufferType, MapType, Status};
use crate::engine::AbiVersion;
use crate::exchange::{Exchange, LocalResponse, StageView};
use crate::fields::{FieldMap, is_token, is_value};
use crate::grpc;
use crate::pairs;
use crate::plugin::{Capabilities, Limits};
use crate::relay::TcpAsked;
use crate::vm::{CallKind, CallOwner, CallRequest, Doing, GrpcView, OpenCall, VmState};

/// Bytes of a response's details; the rest is cut off. They go to logs, once per request.
const DETAILS_BYTES_MAX: usize = 1024;
const RELEASED: &str = "the map is not there now; request headers, for one, can't be touched any more once they were \
                        released: copy what later phases need";

// ---- buffers

pub(super) fn get_buffer(call: &mut Call<'_>, buffer: u32, start: u32, most: u32, ret: u32, ret_len: u32) -> Answer {
    let Some(buffer) = BufferType::from_u32(buffer) else {
        return Ok(call.because("there is no such buffer", Status::BadArgument));
    };
    call.give_filled(ret, ret_len, |call, out| {
        let found = with_buffer(call.state(), buffer, |bytes| {
            // Outside the buffer there are no bytes, which is no error.
            let rest = bytes.get(start as usize..).unwrap_or_default();
            out.extend_from_slice(&rest[..rest.len().min(most as usize)]);
        });
        Ok(if found.is_some() { Status::Ok } else { Status::NotFound })
    })
}

/// Shows a buffer that the guest may read now.
fn with_buffer<R>(state: &VmState, buffer: BufferType, read: impl FnOnce(&[u8]) -> R) -> Option<R> {
    let root = || state.effective_root().and_then(|root| state.roots.get(&root));
    match buffer {
        BufferType::RequestBody | BufferType::ResponseBody | BufferType::DownstreamData | BufferType::UpstreamData => {
            // To Envoy a stream's bytes that are not there now are none, which is no error.
            let Some(context) = state.effective_stream() else { return Some(read(&[])) };
            let exchange = context.exchange.borrow();
            Some(read(exchange.buffer(context.stage, buffer).unwrap_or_default()))
        }
        BufferType::CallResponseBody => Some(read(&root()?.call_view.as_ref()?.body)),
        BufferType::GrpcReceive => match root().and_then(|root| root.grpc_view.as_ref()) {
            Some(GrpcView::Message(message)) => Some(read(message)),
            _ => Some(read(&[])),
        },
        BufferType::VmConfiguration => Some(read(&state.plugin.vm_configuration)),
        BufferType::PluginConfiguration if state.callback.doing == Doing::Configuring => {
            Some(read(&root()?.plugin.configuration))
        }
        BufferType::PluginConfiguration => None,
        BufferType::CallData => Some(read(&[])),
    }
}

pub(super) fn set_buffer(call: &mut Call<'_>, buffer: u32, start: u32, size: u32, value: u32, len: u32) -> Answer {
    let Some(buffer) = BufferType::from_u32(buffer) else {
        return Ok(call.because("there is no such buffer", Status::BadArgument));
    };
    let name = call.name;
    let (memory, state) = call.parts();
    let value = super::range(memory, name, value, len)?;
    let most = state.plugin.limits.buffer_bytes_max;
    let mut exchange = state.effective_stream().map(|context| (context.exchange.borrow_mut(), context.stage));
    let body = exchange.as_mut().and_then(|(exchange, stage)| exchange.buffer_mut(*stage, buffer));
    let Some(body) = body else {
        drop(exchange);
        if with_buffer(call.state(), buffer, |_| ()).is_none() {
            return Ok(call.because("the buffer is not there now", Status::NotFound));
        }
        return Ok(call.because("the buffer can't be changed, or not now", Status::BadArgument));
    };
    let (start, size) = (start as usize, size as usize);
    let kept = if start == 0 { body.len().saturating_sub(size) } else { body.len() };
    if kept + value.len() > most {
        drop(exchange);
        return Ok(
            call.because("the body would become larger than `limits.buffered_bytes` allows", Status::InternalFailure)
        );
    }
    if start == 0 {
        let rest = body.split_off(size.min(body.len()));
        *body = BytesMut::with_capacity(value.len() + rest.len());
        body.extend_from_slice(value);
        body.extend_from_slice(&rest);
    } else if start >= body.len() {
        body.extend_from_slice(value);
    } else {
        drop(exchange);
        return Ok(call.because(
            "Envoy replaces at the start of a body or appends behind its end, nowhere between",
            Status::BadArgument,
        ));
    }
    Ok(Status::Ok)
}

pub(super) fn get_buffer_status(call: &mut Call<'_>, buffer: u32, ret_len: u32, ret_flags: u32) -> Answer {
    let Some(buffer) = BufferType::from_u32(buffer) else {
        return Ok(call.because("there is no such buffer", Status::BadArgument));
    };
    let Some(len) = with_buffer(call.state(), buffer, <[u8]>::len) else {
        return Ok(call.because("the buffer is not there now", Status::NotFound));
    };
    call.write_u32(ret_len, len as u32)?;
    call.write_u32(ret_flags, 0)?;
    Ok(Status::Ok)
}

// ---- maps

/// Shows a map that the guest may read now.
fn with_map<R>(state: &VmState, map: MapType, read: impl FnOnce(&FieldMap) -> R) -> Option<R> {
    match map {
        MapType::CallResponseHeaders | MapType::CallResponseTrailers => {
            let view = state.roots.get(&state.effective_root()?)?.call_view.as_ref()?;
            match map {
                MapType::CallResponseHeaders => Some(read(&view.fields)),
                // An answer without trailers has no map for them.
                _ => Some(&view.trailers).filter(|trailers| !trailers.is_empty()).map(read),
            }
        }
        MapType::GrpcInitialMetadata | MapType::GrpcTrailingMetadata => {
            match (map, state.roots.get(&state.effective_root()?)?.grpc_view.as_ref()?) {
                (MapType::GrpcInitialMetadata, GrpcView::Initial(fields))
                | (MapType::GrpcTrailingMetadata, GrpcView::Trailing(fields)) => Some(read(fields)),
                _ => None,
            }
        }
        _ => {
            let context = state.effective_stream()?;
            let exchange = context.exchange.borrow();
            exchange.map(context.stage, map).map(read)
        }
    }
}

/// Lets a map be changed that the guest may change now.
fn with_map_mut<R>(state: &VmState, map: MapType, change: impl FnOnce(&mut FieldMap, &Limits) -> R) -> Option<R> {
    let context = state.effective_stream()?;
    let mut exchange = context.exchange.borrow_mut();
    exchange.map_mut(context.stage, map).map(|fields| change(fields, &state.plugin.limits))
}

/// The same for changes of fields: where the request's change, its route is chosen again, as in Envoy.
fn change_map(state: &VmState, map: MapType, change: impl FnOnce(&mut FieldMap, &Limits) -> bool) -> Option<bool> {
    let changed = with_map_mut(state, map, change);
    if changed == Some(true)
        && map == MapType::RequestHeaders
        && let Some(context) = state.effective_stream()
    {
        context.exchange.borrow_mut().route_cleared = true;
    }
    changed
}

/// Whether the stream is over and only logged.
fn is_logging(state: &VmState) -> bool {
    state
        .effective_stream()
        .is_some_and(|context| context.exchange.borrow().stages.get(context.stage).is_some_and(|view| view.logging))
}

fn map_type(call: &mut Call<'_>, map: u32) -> Result<MapType, Status> {
    match MapType::from_u32(map) {
        Some(map) => Ok(map),
        None => Err(call.because("there is no such map", Status::BadArgument)),
    }
}

pub(super) fn get_map_size(call: &mut Call<'_>, map: u32, ret: u32) -> Answer {
    let map = match map_type(call, map) {
        Ok(map) => map,
        Err(status) => return Ok(status),
    };
    let Some(size) = with_map_mut(call.state(), map, |fields, _| fields.byte_size()) else {
        return Ok(call.because("Envoy tells the size of maps that can be changed, only", Status::BadArgument));
    };
    call.write_u32(ret, size as u32)?;
    Ok(Status::Ok)
}

pub(super) fn get_map(call: &mut Call<'_>, map: u32, ret: u32, ret_len: u32) -> Answer {
    let map = match map_type(call, map) {
        Ok(map) => map,
        Err(status) => return Ok(status),
    };
    let mut available = true;
    let status = call.give_filled(ret, ret_len, |call, out| {
        available = with_map(call.state(), map, |fields| pairs::encode(fields.iter(), out)).is_some();
        Ok(Status::Ok)
    })?;
    if !available && matches!(map, MapType::RequestHeaders | MapType::ResponseHeaders) {
        call.lint(format!("answers an empty map, though no map is there to be read: {RELEASED}"));
    }
    Ok(status)
}

pub(super) fn set_map(call: &mut Call<'_>, map: u32, pointer: u32, len: u32) -> Answer {
    let map = match map_type(call, map) {
        Ok(map) => map,
        Err(status) => return Ok(status),
    };
    let fields = match call.map(pointer, len)? {
        Ok(fields) => fields,
        Err(error) => return Ok(call.because(error.to_string(), Status::BadArgument)),
    };
    if let Err(reason) = check_lines(map, &fields) {
        return Ok(call.because(reason, Status::BadArgument));
    }
    let capabilities = &call.state().current_plugin().capabilities;
    let mut blocked = None;
    let changed = change_map(call.state(), map, |target, limits| {
        if capabilities.fields.is_some() {
            blocked = first_blocked(capabilities, target, &fields);
        }
        let fits = blocked.is_none() && limits.allow_map(&fields);
        if fits {
            target.clear();
            fields.iter().for_each(|(name, value)| add(target, map, name, value));
        }
        fits
    });
    match blocked {
        Some(name) => Ok(call.blocked(&name, SETTABLE_FIELDS)),
        None => changed_status(call, changed),
    }
}

const MAP_TOO_LARGE: &str = "the map would be larger than `limits.map_pairs` or `limits.map_bytes` allows";

const SETTABLE_FIELDS: &str = "settable_fields";

/// The name of a line that one map has and the other has not, or not in that order, and that may not be changed.
fn first_blocked(capabilities: &Capabilities, before: &FieldMap, after: &FieldMap) -> Option<Vec<u8>> {
    let mut before = before.iter().filter(|(name, _)| !capabilities.allows_field(name));
    let mut after = after.iter().filter(|(name, _)| !capabilities.allows_field(name));
    loop {
        match (before.next(), after.next()) {
            (None, None) => return None,
            (one, other) if one == other => {}
            (one, other) => return one.or(other).map(|(name, _)| name.to_vec()),
        }
    }
}

fn changed_status(call: &mut Call<'_>, changed: Option<bool>) -> Answer {
    Ok(match changed {
        Some(true) => Status::Ok,
        Some(false) => call.because(MAP_TOO_LARGE, Status::InternalFailure),
        None => call.because(RELEASED, Status::BadArgument),
    })
}

pub(super) fn get_field(call: &mut Call<'_>, map: u32, name: u32, name_len: u32, ret: u32, ret_len: u32) -> Answer {
    let map = match map_type(call, map) {
        Ok(map) => map,
        Err(status) => return Ok(status),
    };
    call.give_filled(ret, ret_len, |call, out| {
        let name = call.bytes(name, name_len)?;
        let found =
            with_map(call.state(), map, |fields| fields.get(name).map(|value| out.extend_from_slice(value)).is_some());
        Ok(match found {
            Some(true) => Status::Ok,
            // ABI 0.1.0 does not tell what is absent from what is empty.
            Some(false) if call.state().plugin.module.abi() == AbiVersion::V0_1_0 => Status::Ok,
            Some(false) => Status::NotFound,
            None if is_logging(call.state()) => Status::NotFound,
            None => call.because(RELEASED, Status::BadArgument),
        })
    })
}

pub(super) fn add_field(call: &mut Call<'_>, map: u32, name: u32, name_len: u32, value: u32, value_len: u32) -> Answer {
    change_field(call, map, (name, name_len), (value, value_len), add)
}

fn add(fields: &mut FieldMap, map: MapType, name: &[u8], value: &[u8]) {
    let name = name.to_ascii_lowercase();
    // A second pseudo-header of a name would be two answers to one question; `host` is `:authority`.
    if name.first() == Some(&b':') || name == b"host" {
        fields.set(&name, value);
    } else {
        fields.append(map.message(), &name, value);
    }
}

pub(super) fn replace_field(
    call: &mut Call<'_>,
    map: u32,
    name: u32,
    name_len: u32,
    value: u32,
    value_len: u32,
) -> Answer {
    change_field(call, map, (name, name_len), (value, value_len), |fields, _, name, value| fields.set(name, value))
}

fn change_field(
    call: &mut Call<'_>,
    map: u32,
    name: (u32, u32),
    value: (u32, u32),
    change: impl FnOnce(&mut FieldMap, MapType, &[u8], &[u8]),
) -> Answer {
    let map = match map_type(call, map) {
        Ok(map) => map,
        Err(status) => return Ok(status),
    };
    let name = call.bytes(name.0, name.1)?;
    let value = call.bytes(value.0, value.1)?;
    if let Err(reason) = check_line(map, name, value) {
        return Ok(call.because(reason, Status::BadArgument));
    }
    if !call.state().current_plugin().capabilities.allows_field(name) {
        let name = name.to_vec();
        return Ok(call.blocked(&name, SETTABLE_FIELDS));
    }
    let changed = change_map(call.state(), map, |fields, limits| {
        let fits = fields.len() < limits.map_lines_max
            && fields.byte_size() + name.len() + value.len() <= limits.map_bytes_max;
        if fits {
            change(fields, map, name, value);
        }
        fits
    });
    changed_status(call, changed)
}

pub(super) fn remove_field(call: &mut Call<'_>, map: u32, name: u32, name_len: u32) -> Answer {
    let map = match map_type(call, map) {
        Ok(map) => map,
        Err(status) => return Ok(status),
    };
    let name = call.bytes(name, name_len)?;
    if !call.state().current_plugin().capabilities.allows_field(name) {
        let name = name.to_vec();
        return Ok(call.blocked(&name, SETTABLE_FIELDS));
    }
    let removed = change_map(call.state(), map, |fields, _| {
        fields.remove(name);
        true
    });
    changed_status(call, removed)
}

fn check_lines(map: MapType, fields: &FieldMap) -> Result<(), String> {
    fields.iter().try_for_each(|(name, value)| check_line(map, name, value))
}

/// A line that would become another message on the wire is refused (RFC 9110, section 5.5; RFC 9113, section 8.2.1).
fn check_line(map: MapType, name: &[u8], value: &[u8]) -> Result<(), String> {
    if !is_token(name.strip_prefix(b":").unwrap_or(name)) {
        return Err("a field name consists of token characters".into());
    }
    if !is_value(value) {
        return Err("a field value has no CR, LF or NUL".into());
    }
    if name.first() == Some(&b':') {
        let known: &[&[u8]] = match map {
            MapType::RequestHeaders => &[b":method", b":scheme", b":authority", b":path", b":protocol"],
            MapType::ResponseHeaders => &[b":status"],
            _ => &[],
        };
        if !known.iter().any(|known| name.eq_ignore_ascii_case(known)) {
            return Err("there is no such pseudo-header in this map".into());
        }
    }
    Ok(())
}

// ---- streams

/// Notes what a guest asks of its HTTP stream; it is done once the guest has returned. Of anything else it asks nothing.
fn ask(call: &mut Call<'_>, ask: impl FnOnce(&mut StageView)) -> bool {
    ask_exchange(call, |exchange, stage| {
        let view = exchange.stages.get_mut(stage)?;
        ask(view);
        Some(!std::mem::replace(&mut view.asked.noted, true))
    })
}

/// The same of a TCP connection.
fn ask_connection(call: &mut Call<'_>, ask: impl FnOnce(&mut TcpAsked)) -> bool {
    ask_exchange(call, |exchange, stage| {
        let asked = &mut exchange.tcp.as_mut()?.stages.get_mut(stage)?.asked;
        ask(asked);
        Some(!std::mem::replace(&mut asked.noted, true))
    })
}

/// `ask` says whether it is the first wish since the worker last looked, or that there is nobody to ask.
fn ask_exchange(call: &mut Call<'_>, ask: impl FnOnce(&mut Exchange, usize) -> Option<bool>) -> bool {
    let state = call.state_mut();
    let Some(context) = state.streams.get(&state.effective) else {
        return false;
    };
    let touched = (context.stream, context.stage);
    let Some(fresh) = ask(&mut context.exchange.borrow_mut(), context.stage) else {
        return false;
    };
    // Once, however often a guest asks: the list must not grow with a loop.
    if fresh {
        state.touched.push(touched);
    }
    true
}

pub(super) fn continue_stream(call: &mut Call<'_>, stream: u32) -> Answer {
    match stream {
        0 => continue_request(call),
        1 => continue_response(call),
        2 => {
            ask_connection(call, |asked| asked.resume = true);
            Ok(Status::Ok)
        }
        3 => Ok(call.because("Envoy does not resume the upstream side of a connection", Status::Unimplemented)),
        _ => Ok(call.because("there is no such stream", Status::BadArgument)),
    }
}

pub(super) fn continue_request(call: &mut Call<'_>) -> Answer {
    ask(call, |view| {
        view.asked.resume_request = true;
        view.hide_request();
    });
    Ok(Status::Ok)
}

pub(super) fn continue_response(call: &mut Call<'_>) -> Answer {
    ask(call, |view| {
        view.asked.resume_response = true;
        // Envoy hides the request, whichever side is resumed.
        view.hide_request();
    });
    Ok(Status::Ok)
}

pub(super) fn close_stream(call: &mut Call<'_>, stream: u32) -> Answer {
    match stream {
        0 | 1 => {
            ask(call, |view| view.asked.reset = true);
            Ok(Status::Ok)
        }
        // Either closes the client's connection, in Envoy's words for who did.
        2 | 3 => {
            let details = if stream == 2 { "wasm_downstream_close" } else { "wasm_upstream_close" };
            ask_connection(call, |asked| asked.close = asked.close.or(Some(details)));
            Ok(Status::Ok)
        }
        _ => Ok(call.because("there is no such stream", Status::BadArgument)),
    }
}

#[expect(clippy::too_many_arguments, reason = "the ABI's own signature")]
pub(super) fn send_local_response(
    call: &mut Call<'_>,
    status: u32,
    details: u32,
    details_len: u32,
    body: u32,
    body_len: u32,
    fields: u32,
    fields_len: u32,
    grpc: i32,
) -> Answer {
    let details = call.bytes(details, details_len)?;
    let details = &details[..details.len().min(DETAILS_BYTES_MAX)];
    let details = String::from_utf8_lossy(details).replace(char::is_whitespace, "_");
    let body = call.bytes(body, body_len)?;
    if body.len() > call.state().plugin.limits.buffer_bytes_max {
        return Ok(call.because("the body is larger than `limits.buffered_bytes` allows", Status::InternalFailure));
    }
    let body = Bytes::copy_from_slice(body);
    let fields = match call.map(fields, fields_len)? {
        Ok(fields) => fields,
        Err(error) => return Ok(call.because(error.to_string(), Status::BadArgument)),
    };
    if !call.state().current_plugin().limits.allow_map(&fields) {
        return Ok(call.because(MAP_TOO_LARGE, Status::InternalFailure));
    }
    if let Err(reason) = check_lines(MapType::ResponseHeaders, &fields) {
        return Ok(call.because(reason, Status::BadArgument));
    }
    let Ok(status @ 200..=599) = u16::try_from(status) else {
        return Ok(call.because("the status of a final response is 200 to 599", Status::BadArgument));
    };
    // Others are as good as none: the status is derived from the other one.
    let grpc_status = u32::try_from(grpc).ok().filter(|code| *code <= grpc::status::LAST);
    let fields = without_blocked(call, fields);
    let response = LocalResponse { status, details, body, fields, grpc_status };
    let has_stream = ask(call, |view| {
        // The first one counts.
        view.asked.local_response.get_or_insert(response);
    });
    if !has_stream {
        call.lint(
            "has no effect: only an HTTP stream can be answered; close a TCP connection with `proxy_close_stream`",
        );
    }
    Ok(Status::Ok)
}

/// The fields that a local response may have. One without the others still denies, which an error would not: not every
/// guest looks at statuses.
fn without_blocked(call: &mut Call<'_>, mut fields: FieldMap) -> FieldMap {
    let capabilities = &call.state().current_plugin().capabilities;
    let blocked: Vec<Vec<u8>> = match &capabilities.fields {
        None => Vec::new(),
        Some(_) => {
            let names = fields.iter().map(|(name, _)| name).filter(|name| !capabilities.allows_field(name));
            names.map(<[u8]>::to_vec).collect()
        }
    };
    for name in &blocked {
        fields.remove(name);
    }
    if let Some(name) = blocked.first() {
        call.blocked(name, SETTABLE_FIELDS);
    }
    fields
}

// ---- callouts

#[expect(clippy::too_many_arguments, reason = "the ABI's own signature")]
pub(super) fn http_call(
    call: &mut Call<'_>,
    upstream: u32,
    upstream_len: u32,
    fields: u32,
    fields_len: u32,
    body: u32,
    body_len: u32,
    trailers: u32,
    trailers_len: u32,
    timeout: u32,
    ret: u32,
) -> Answer {
    // Written at once, whatever comes of the call, as Envoy does.
    call.write_u32(ret, 0)?;
    // A name that is not UTF-8 is no upstream's.
    let upstream = std::str::from_utf8(call.bytes(upstream, upstream_len)?).unwrap_or_default();
    let fields = call.map(fields, fields_len)?.map(|lines| {
        let mut fields = FieldMap::with_capacity(lines.len(), lines.byte_size());
        lines.iter().for_each(|(name, value)| add(&mut fields, MapType::RequestHeaders, name, value));
        fields
    });
    let trailers = call.map(trailers, trailers_len)?;
    let body = call.bytes(body, body_len)?;
    let plugin = call.state().current_plugin();
    if body.len() > plugin.limits.call_bytes_max {
        return Ok(call.because("the body is larger than `limits.callout_bytes` allows", Status::InternalFailure));
    }
    let body = Bytes::copy_from_slice(body);
    let (mut fields, trailers) = match (fields, trailers) {
        (Ok(fields), Ok(trailers)) => (fields, trailers),
        (Err(error), _) | (_, Err(error)) => return Ok(call.because(error.to_string(), Status::BadArgument)),
    };
    let checked = check_lines(MapType::RequestHeaders, &fields).and(check_lines(MapType::RequestTrailers, &trailers));
    if let Err(reason) = checked {
        return Ok(call.because(reason, Status::BadArgument));
    }
    if ![&fields, &trailers].into_iter().all(|map| plugin.limits.allow_map(map)) {
        return Ok(call.because(MAP_TOO_LARGE, Status::InternalFailure));
    }
    let allowed = plugin.capabilities.upstreams.as_ref().is_none_or(|names| names.contains(upstream));
    if !allowed || !call.state().embedder.borrow().has_upstream(upstream) {
        let shown: String = upstream.chars().take(80).collect();
        return Ok(call.because(format!("there is no upstream `{shown}` for this plugin"), Status::BadArgument));
    }
    let upstream = upstream.to_owned();
    if let Some(missing) = [":method", ":path", ":authority"].iter().find(|name| !fields.contains(name.as_bytes())) {
        return Ok(call.because(format!("a callout needs `{missing}`"), Status::BadArgument));
    }
    if timeout > i32::MAX as u32 {
        return Ok(call.because("the timeout is too long", Status::BadArgument));
    }
    let timeout = (timeout > 0).then(|| Duration::from_millis(u64::from(timeout)));
    let Some(owner) = new_call(call, CallKind::Http) else {
        return Ok(Status::InternalFailure);
    };
    if !body.is_empty() {
        fields.set(b"content-length", body.len().to_string().as_bytes());
    }
    call.write_u32(ret, owner.token)?;
    call.state_mut().call_requests.push(CallRequest::Http { owner, upstream, fields, body, trailers, timeout });
    Ok(Status::Ok)
}

/// Whose a new callout is, and its token; `None` where as many as allowed are under way.
pub(super) fn new_call(call: &mut Call<'_>, kind: CallKind) -> Option<CallOwner> {
    let calls_max = call.state().current_plugin().limits.calls_max;
    if call.state().calls.len() >= calls_max {
        call.reason = Some("as many callouts as allowed are under way".into());
        return None;
    }
    let state = call.state_mut();
    let root = state.effective_root()?;
    let token = state.new_token(kind);
    state.calls.insert(token, OpenCall::default());
    let ending = matches!(
        state.callback.name,
        "proxy_on_downstream_connection_close" | "proxy_on_log" | "proxy_on_done" | "proxy_on_delete"
    );
    let stream = state.streams.get(&state.effective).filter(|_| !ending).map(|context| context.stream);
    Some(CallOwner { token, root, stream })
}

pub(super) fn get_status(call: &mut Call<'_>, ret_code: u32, ret: u32, ret_len: u32) -> Answer {
    let state = call.state();
    let status = state.effective_root().and_then(|root| state.roots.get(&root)).map(|root| root.status.clone());
    let (code, message) = status.unwrap_or_default();
    call.write_u32(ret_code, code)?;
    call.give(&message, ret, ret_len)?;
    Ok(Status::Ok)
}
