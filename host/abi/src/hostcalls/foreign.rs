//! Foreign functions: what Envoy offers beyond the ABI, by name.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

use super::context::{SETTABLE_PROPERTIES, with_filter_state};
use super::{Answer, Call};
use crate::abi::Status;
use crate::expression::Expression;
use crate::property::Attributes;
use crate::protobuf::{self, Value};
use crate::signature;
use crate::state::{Declaration, Kind, Object, Span};
use crate::vm::GuestFault;

pub(super) fn call(
    call: &mut Call<'_>,
    name: u32,
    name_len: u32,
    argument: u32,
    argument_len: u32,
    ret: u32,
    ret_len: u32,
) -> Answer {
    let most = call.state().plugin.limits.buffer_bytes_max;
    // Nothing is copied that is too large anyway; no function's name is that long.
    let name = call.bytes(name, name_len)?.get(..name_len.min(64) as usize).unwrap_or_default().to_vec();
    let argument = call.bytes(argument, argument_len)?;
    if argument.len() > most {
        return Ok(call.because("the argument is larger than `limits.buffered_bytes` allows", Status::InternalFailure));
    }
    let argument = argument.to_vec();
    let allowed = &call.state().current_plugin().capabilities.foreign_functions;
    if allowed.as_ref().is_some_and(|names| !names.iter().any(|allowed| allowed.as_bytes() == name)) {
        return Ok(call.blocked(&name, "foreign_functions"));
    }
    let result = match name.as_slice() {
        b"compress" => compress(call, &argument)?,
        b"uncompress" => uncompress(call, &argument, most)?,
        b"verify_signature" => signature::verify(&argument),
        b"sign" => signature::sign(&argument),
        b"clear_route_cache" => {
            clear_route_cache(call);
            Ok(Vec::new())
        }
        b"declare_property" => declare_property(call, &argument).map(|()| Vec::new()),
        b"set_envoy_filter_state" => set_envoy_filter_state(call, &argument).map(|()| Vec::new()),
        b"expr_create" => expr_create(call, &argument),
        b"expr_evaluate" => expr_evaluate(call, &argument, most),
        b"expr_delete" => expr_delete(call, &argument).map(|()| Vec::new()),
        _ => return Ok(Status::NotFound),
    };
    let (status, result) = match result {
        Ok(result) => (Status::Ok, result),
        // Envoy writes an empty result then, too.
        Err(status) => (status, Vec::new()),
    };
    // Null pointers say that the result is not wanted.
    if ret != 0 && ret_len != 0 {
        call.give(&result, ret, ret_len)?;
    }
    Ok(status)
}

/// Makes the host choose the route again, from the request as it is now.
pub(super) fn proxy_clear_route_cache(call: &mut Call<'_>) -> Answer {
    clear_route_cache(call);
    Ok(Status::Ok)
}

fn clear_route_cache(call: &mut Call<'_>) {
    if let Some(context) = call.state().effective_stream() {
        context.exchange.borrow_mut().route_cleared = true;
    }
}

/// `{1: name, 2: readonly, 3: type, 4: schema, 5: span}`. What a root context declares holds for what its streams set.
fn declare_property(call: &mut Call<'_>, argument: &[u8]) -> Result<(), Status> {
    let mut name = "";
    let mut declaration = Declaration::default();
    for field in protobuf::fields(argument) {
        match field.map_err(|_| Status::BadArgument)? {
            (1, Value::Bytes(bytes)) => name = text(bytes)?,
            (2, Value::Varint(readonly)) => declaration.readonly = readonly != 0,
            (3, Value::Varint(number)) => declaration.kind = Kind::from_number(number),
            (5, Value::Varint(number)) => declaration.span = Span::from_number(number),
            _ => {}
        }
    }
    if !call.state().current_plugin().capabilities.allows_property(name.as_bytes()) {
        return Err(call.blocked(name.as_bytes(), SETTABLE_PROPERTIES));
    }
    let limits = call.state().plugin.limits.clone();
    let state = call.state_mut();
    let declared = match (state.roots.get_mut(&state.context), state.streams.get_mut(&state.context)) {
        (Some(root), _) => &mut root.declared,
        (None, Some(stream)) => &mut stream.declared,
        (None, None) => return Err(Status::InternalFailure),
    };
    let result = declared.declare(name.as_bytes(), declaration, &limits);
    result.map_err(|refused| call.because(refused.reason, refused.status))
}

/// `{1: path, 2: value, 3: span}`, both texts.
fn set_envoy_filter_state(call: &mut Call<'_>, argument: &[u8]) -> Result<(), Status> {
    let (mut path, mut value, mut span) = ("", "", Span::default());
    for field in protobuf::fields(argument) {
        match field.map_err(|_| Status::BadArgument)? {
            (1, Value::Bytes(bytes)) => path = text(bytes)?,
            (2, Value::Bytes(bytes)) => value = text(bytes)?,
            (3, Value::Varint(number)) => span = Span::from_number(number),
            _ => {}
        }
    }
    if !call.state().current_plugin().capabilities.allows_property(path.as_bytes()) {
        return Err(call.blocked(path.as_bytes(), SETTABLE_PROPERTIES));
    }
    let Some(object) = Object::make(path.as_bytes(), value.as_bytes()) else {
        return Err(call.because(format!("there is no filter state `{path}`"), Status::NotFound));
    };
    let set = object.and_then(|object| {
        with_filter_state(call.state(), |state, limits| state.set_object(path.as_bytes(), object, span, limits))
    });
    set.map_err(|refused| call.because(refused.reason, refused.status))?;
    call.lint(format!("keeps `{path}`, but nothing in this host acts on it"));
    Ok(())
}

/// Keeps an expression with the root of the context whose callback runs, whatever the effective context is.
fn expr_create(call: &mut Call<'_>, source: &[u8]) -> Result<Vec<u8>, Status> {
    let expression = Expression::parse(source).map_err(|refused| call.because(refused.reason, refused.status))?;
    let state = call.state_mut();
    let root = state.root_id_of(state.context).ok_or(Status::InternalFailure)?;
    let others = state.roots.iter().filter(|(id, _)| **id != root).map(|(_, root)| root.expressions.bytes()).sum();
    let expressions = &mut state.roots.get_mut(&root).ok_or(Status::InternalFailure)?.expressions;
    let token = expressions.add(expression, others);
    let token = token.map_err(|refused| call.because(refused.reason, refused.status))?;
    Ok(token.to_le_bytes().to_vec())
}

fn expr_evaluate(call: &mut Call<'_>, token: &[u8], most: usize) -> Result<Vec<u8>, Status> {
    let token = expression_token(call, token)?;
    let state = call.state();
    let root =
        state.root_id_of(state.context).and_then(|root| state.roots.get(&root)).ok_or(Status::InternalFailure)?;
    let Some(expression) = root.expressions.get(token) else {
        return Err(call.because("there is no expression of this token", Status::NotFound));
    };
    let mut value = Vec::new();
    let evaluated = match state.streams.get(&state.context) {
        None => expression.evaluate(Attributes { plugin: &root.plugin, stream: None }, &mut value),
        Some(context) => {
            let exchange = context.exchange.borrow();
            let stream = Some((&*exchange, context.stage));
            expression.evaluate(Attributes { plugin: &root.plugin, stream }, &mut value)
        }
    };
    evaluated.map_err(|refused| call.because(refused.reason, refused.status))?;
    if value.len() > most {
        let reason = "what the expression comes to is larger than `limits.buffered_bytes` allows";
        return Err(call.because(reason, Status::InternalFailure));
    }
    Ok(value)
}

fn expr_delete(call: &mut Call<'_>, token: &[u8]) -> Result<(), Status> {
    let token = expression_token(call, token)?;
    let state = call.state_mut();
    if let Some(root) = state.root_id_of(state.context).and_then(|root| state.roots.get_mut(&root)) {
        root.expressions.remove(token);
    }
    Ok(())
}

fn expression_token(call: &mut Call<'_>, token: &[u8]) -> Result<u32, Status> {
    let token = token.try_into().map(u32::from_le_bytes);
    token.map_err(|_| call.because("the token should have 4 bytes", Status::BadArgument))
}

/// proto3 takes a message whose text is not UTF-8 for malformed.
fn text(bytes: &[u8]) -> Result<&str, Status> {
    std::str::from_utf8(bytes).map_err(|_| Status::BadArgument)
}

/// Bytes that are worked on between two looks at the guest's time.
const PIECE: usize = 64 * 1024;

/// What a foreign function answers, unless it ends the guest.
type Outcome = Result<Result<Vec<u8>, Status>, GuestFault>;

fn compress(call: &mut Call<'_>, bytes: &[u8]) -> Outcome {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    for piece in bytes.chunks(PIECE) {
        call.state_mut().time.look()?;
        if encoder.write_all(piece).is_err() {
            return Ok(Err(Status::InternalFailure));
        }
    }
    Ok(encoder.finish().map_err(|_| Status::InternalFailure))
}

/// Unlike Envoy's, bounded: a few bytes can unfold into gigabytes.
fn uncompress(call: &mut Call<'_>, bytes: &[u8], most: usize) -> Outcome {
    let mut decoder = ZlibDecoder::new(bytes);
    let mut out = Vec::new();
    loop {
        call.state_mut().time.look()?;
        match decoder.by_ref().take(PIECE as u64).read_to_end(&mut out) {
            Ok(0) => return Ok(Ok(out)),
            Ok(_) if out.len() <= most => {}
            Ok(_) | Err(_) => return Ok(Err(Status::SerializationFailure)),
        }
    }
}
