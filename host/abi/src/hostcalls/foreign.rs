//! Foreign functions: what Envoy offers beyond the ABI, by name.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

use super::{Answer, Call};
use crate::abi::Status;
use crate::signature;
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
        return Ok(call.because("the argument is larger than `limits.buffer` allows", Status::InternalFailure));
    }
    let argument = argument.to_vec();
    let result = match name.as_slice() {
        b"compress" => compress(call, &argument)?,
        b"uncompress" => uncompress(call, &argument, most)?,
        b"verify_signature" => signature::verify(&argument),
        b"sign" => signature::sign(&argument),
        b"clear_route_cache" => return clear_route_cache(call),
        _ => Err(Status::NotFound),
    };
    match result {
        // Null pointers say that the result is not wanted.
        Ok(_) if ret == 0 || ret_len == 0 => Ok(Status::Ok),
        Ok(result) => {
            call.give(&result, ret, ret_len)?;
            Ok(Status::Ok)
        }
        Err(status) => Ok(status),
    }
}

/// Makes the host choose the route again, from the request as it is now.
pub(super) fn clear_route_cache(call: &mut Call<'_>) -> Answer {
    if let Some(context) = call.state().effective_stream() {
        context.exchange.borrow_mut().route_cleared = true;
    }
    Ok(Status::Ok)
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
