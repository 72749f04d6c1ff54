//! Foreign functions: what Envoy offers beyond the ABI, by name.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

use super::{Answer, Call};
use crate::abi::Status;
use crate::signature;

pub(super) fn call(
    call: &mut Call<'_>,
    name: u32,
    name_len: u32,
    argument: u32,
    argument_len: u32,
    ret: u32,
    ret_len: u32,
) -> Answer {
    let name = call.bytes(name, name_len)?.to_vec();
    let argument = call.bytes(argument, argument_len)?.to_vec();
    let most = call.state().plugin.limits.buffer_bytes_max;
    let result = match name.as_slice() {
        b"compress" => compress(&argument, most),
        b"uncompress" => uncompress(&argument, most),
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

fn compress(bytes: &[u8], most: usize) -> Result<Vec<u8>, Status> {
    if bytes.len() > most {
        return Err(Status::InternalFailure);
    }
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).map_err(|_| Status::InternalFailure)?;
    encoder.finish().map_err(|_| Status::InternalFailure)
}

/// Unlike Envoy's, bounded: a few bytes can unfold into gigabytes.
fn uncompress(bytes: &[u8], most: usize) -> Result<Vec<u8>, Status> {
    let mut out = Vec::new();
    ZlibDecoder::new(bytes).take(most as u64 + 1).read_to_end(&mut out).map_err(|_| Status::SerializationFailure)?;
    if out.len() > most { Err(Status::SerializationFailure) } else { Ok(out) }
}
