//! The host functions by name: what a script gives to each, and what comes back.

use std::fmt::Write as _;

/// What a host function takes or gives back, as one word of a script or of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A number.
    Number,
    /// Bytes: pointer and length.
    Bytes,
    /// Bytes behind an I/O vector of one piece.
    Vector,
    /// A `u32` that the host writes.
    GivesU32,
    /// A `u64` that the host writes.
    GivesU64,
    /// Bytes that the host has the guest allocate.
    GivesBytes,
    /// The same, the bytes being a map.
    GivesMap,
    /// This many bytes, which the host fills.
    Filled,
}

/// What a function gave back.
#[derive(Clone, Debug)]
pub(crate) enum Returned {
    Number(u64),
    Bytes(Vec<u8>),
    Map(Vec<u8>),
    /// No bytes, and no pointer to them.
    Null,
}

impl Returned {
    pub(crate) fn write(&self, line: &mut String) {
        // Writing to a `String` cannot fail.
        let _ = match self {
            Returned::Number(number) => write!(line, " {number}"),
            Returned::Bytes(bytes) => write!(line, " {}", quoted(bytes)),
            Returned::Null => write!(line, " \"\""),
            Returned::Map(bytes) => match pairs(bytes) {
                Some(pairs) => {
                    let pairs: Vec<String> =
                        pairs.iter().map(|(name, value)| format!("{} {}", quoted(name), quoted(value))).collect();
                    write!(line, " {{ {} }}", pairs.join(", "))
                }
                None => write!(line, " no map: {}", quoted(bytes)),
            },
        };
    }
}

/// Bytes as text with escapes, long ones shortened; a script in a request stands for itself.
fn quoted(bytes: &[u8]) -> String {
    const SHOWN_MAX: usize = 400;
    if bytes.starts_with(b"row: ") {
        return "<script>".to_owned();
    }
    if bytes.len() > SHOWN_MAX {
        let sum = bytes.iter().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(*byte)));
        return format!("\"{}\"... {} bytes, sum {sum:08x}", bytes[..40].escape_ascii(), bytes.len());
    }
    format!("\"{}\"", bytes.escape_ascii())
}

/// A map in the order of its names.
pub(crate) fn sorted(blob: &[u8]) -> Vec<u8> {
    let Some(mut pairs) = pairs(blob) else { return blob.to_vec() };
    pairs.sort_unstable();
    let parts: Vec<&[u8]> = pairs.iter().flat_map(|(name, value)| [*name, *value]).collect();
    let mut blob = (pairs.len() as u32).to_le_bytes().to_vec();
    for part in &parts {
        blob.extend((part.len() as u32).to_le_bytes());
    }
    for part in parts {
        blob.extend(part);
        blob.push(0);
    }
    blob
}

/// Reads a map in the ABI's form.
fn pairs(blob: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let word = |at: usize| Some(u32::from_le_bytes(blob.get(at..at + 4)?.try_into().ok()?) as usize);
    let count = word(0)?;
    let mut at = 4 + count * 8;
    let mut part = |len: usize| {
        let bytes = blob.get(at..at + len)?;
        at += len + 1;
        Some(bytes)
    };
    (0..count).map(|index| Some((part(word(4 + index * 8)?)?, part(word(8 + index * 8)?)?))).collect()
}

macro_rules! functions {
    ($($module:literal { $($name:ident($($ty:ty),*) [$($kind:ident),*];)* })*) => {
        $(#[link(wasm_import_module = $module)]
        unsafe extern "C" { $(pub(crate) fn $name($(_: $ty),*) -> u32;)* })*

        /// What the function's parameters are; `None` for an unknown name.
        pub(crate) fn shape(name: &str) -> Option<&'static [Kind]> {
            match name {
                $($(stringify!($name) => Some(&[$(Kind::$kind),*]),)*)*
                _ => None,
            }
        }

        /// Calls the function with these raw arguments; missing ones are 0.
        pub(crate) fn call(name: &str, arguments: &[u64]) -> u32 {
            let mut arguments = arguments.iter().copied();
            match name {
                // SAFETY: the host checks pointers and lengths against the guest's memory; those that scripts don't make
                // up point to buffers that live until the call has returned.
                $($(stringify!($name) => unsafe { $name($(arguments.next().unwrap_or_default() as $ty),*) },)*)*
                _ => u32::MAX,
            }
        }
    };
}

functions! {
    "env" {
        proxy_log(u32, u32, u32) [Number, Bytes];
        proxy_get_log_level(u32) [GivesU32];
        proxy_get_current_time_nanoseconds(u32) [GivesU64];
        proxy_set_tick_period_milliseconds(u32) [Number];
        proxy_set_effective_context(u32) [Number];
        proxy_done() [];
        proxy_get_property(u32, u32, u32, u32) [Bytes, GivesBytes];
        proxy_set_property(u32, u32, u32, u32) [Bytes, Bytes];
        proxy_call_foreign_function(u32, u32, u32, u32, u32, u32) [Bytes, Bytes, GivesBytes];
        proxy_get_buffer_bytes(u32, u32, u32, u32, u32) [Number, Number, Number, GivesBytes];
        proxy_set_buffer_bytes(u32, u32, u32, u32, u32) [Number, Number, Number, Bytes];
        proxy_get_buffer_status(u32, u32, u32) [Number, GivesU32, GivesU32];
        proxy_get_header_map_size(u32, u32) [Number, GivesU32];
        proxy_get_header_map_pairs(u32, u32, u32) [Number, GivesMap];
        proxy_set_header_map_pairs(u32, u32, u32) [Number, Bytes];
        proxy_get_header_map_value(u32, u32, u32, u32, u32) [Number, Bytes, GivesBytes];
        proxy_add_header_map_value(u32, u32, u32, u32, u32) [Number, Bytes, Bytes];
        proxy_replace_header_map_value(u32, u32, u32, u32, u32) [Number, Bytes, Bytes];
        proxy_remove_header_map_value(u32, u32, u32) [Number, Bytes];
        proxy_continue_stream(u32) [Number];
        proxy_close_stream(u32) [Number];
        proxy_send_local_response(u32, u32, u32, u32, u32, u32, u32, u32) [Number, Bytes, Bytes, Bytes, Number];
        proxy_http_call(u32, u32, u32, u32, u32, u32, u32, u32, u32, u32) [Bytes, Bytes, Bytes, Bytes, Number, GivesU32];
        proxy_grpc_call(u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32)
            [Bytes, Bytes, Bytes, Bytes, Bytes, Number, GivesU32];
        proxy_grpc_stream(u32, u32, u32, u32, u32, u32, u32, u32, u32) [Bytes, Bytes, Bytes, Bytes, GivesU32];
        proxy_grpc_send(u32, u32, u32, u32) [Number, Bytes, Number];
        proxy_grpc_cancel(u32) [Number];
        proxy_grpc_close(u32) [Number];
        proxy_get_status(u32, u32, u32) [GivesU32, GivesBytes];
        proxy_get_shared_data(u32, u32, u32, u32, u32) [Bytes, GivesBytes, GivesU32];
        proxy_set_shared_data(u32, u32, u32, u32, u32) [Bytes, Bytes, Number];
        proxy_register_shared_queue(u32, u32, u32) [Bytes, GivesU32];
        proxy_resolve_shared_queue(u32, u32, u32, u32, u32) [Bytes, Bytes, GivesU32];
        proxy_enqueue_shared_queue(u32, u32, u32) [Number, Bytes];
        proxy_dequeue_shared_queue(u32, u32, u32) [Number, GivesBytes];
        proxy_define_metric(u32, u32, u32, u32) [Number, Bytes, GivesU32];
        proxy_increment_metric(u32, u64) [Number, Number];
        proxy_record_metric(u32, u64) [Number, Number];
        proxy_get_metric(u32, u32) [Number, GivesU64];
    }
    "wasi_snapshot_preview1" {
        args_get(u32, u32) [Number, Number];
        args_sizes_get(u32, u32) [GivesU32, GivesU32];
        clock_res_get(u32, u32) [Number, GivesU64];
        clock_time_get(u32, u64, u32) [Number, Number, GivesU64];
        environ_sizes_get(u32, u32) [GivesU32, GivesU32];
        fd_close(u32) [Number];
        fd_fdstat_get(u32, u32) [Number, GivesU64];
        fd_fdstat_set_flags(u32, u32) [Number, Number];
        fd_filestat_get(u32, u32) [Number, Number];
        fd_pread(u32, u32, u32, u64, u32) [Number, Number, Number, Number, GivesU32];
        fd_prestat_dir_name(u32, u32, u32) [Number, Number, Number];
        fd_prestat_get(u32, u32) [Number, Number];
        fd_pwrite(u32, u32, u32, u64, u32) [Number, Vector, Number, GivesU32];
        fd_read(u32, u32, u32, u32) [Number, Number, Number, GivesU32];
        fd_seek(u32, u64, u32, u32) [Number, Number, Number, GivesU64];
        fd_sync(u32) [Number];
        fd_tell(u32, u32) [Number, GivesU64];
        fd_write(u32, u32, u32, u32) [Number, Vector, GivesU32];
        path_filestat_get(u32, u32, u32, u32, u32) [Number, Number, Bytes, Number];
        path_open(u32, u32, u32, u32, u32, u64, u64, u32, u32)
            [Number, Number, Bytes, Number, Number, Number, Number, GivesU32];
        path_unlink_file(u32, u32, u32) [Number, Bytes];
        poll_oneoff(u32, u32, u32, u32) [Number, Number, Number, GivesU32];
        random_get(u32, u32) [Filled];
        sched_yield() [];
        sock_recv(u32, u32, u32, u32, u32, u32) [Number, Number, Number, Number, GivesU32, GivesU32];
        sock_shutdown(u32, u32) [Number, Number];
    }
}

/// Room that the host fills; as a vector of exactly this size it is freed again.
pub(crate) fn allocate(size: u32) -> u32 {
    let bytes = vec![0u8; size as usize].into_boxed_slice();
    Box::into_raw(bytes) as *mut u8 as u32
}

/// Takes over what the host had [`allocate`] make.
pub(crate) fn take(pointer: u32, len: u32) -> Vec<u8> {
    if pointer == 0 {
        return Vec::new();
    }
    // SAFETY: the host hands back a pointer from `allocate`, with the size it asked for, once.
    unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(pointer as *mut u8, len as usize)) }.into_vec()
}

fn returned_bytes(call: impl FnOnce(u32, u32) -> u32) -> Option<Vec<u8>> {
    let mut back = [0u32; 2];
    let at = back.as_mut_ptr() as u32;
    (call(at, at + 4) == 0).then(|| take(back[0], back[1]))
}

/// A number that no other VM has, in all likelihood, and that is not 0.
pub(crate) fn unlike_others() -> u32 {
    let mut number = [0u32];
    // SAFETY: the host writes four bytes, to where there is room for four.
    unsafe { random_get(number.as_mut_ptr() as u32, 4) };
    std::hint::black_box(number)[0] | 1
}

/// All of a buffer.
pub(crate) fn buffer(kind: u32) -> Option<Vec<u8>> {
    // SAFETY: the host writes two words, to where there is room for two.
    returned_bytes(|pointer, len| unsafe { proxy_get_buffer_bytes(kind, 0, u32::MAX, pointer, len) })
}

/// A field of the request.
pub(crate) fn request_field(name: &str) -> Option<Vec<u8>> {
    let (at, size) = (name.as_ptr() as u32, name.len() as u32);
    // SAFETY: the host reads the name and writes two words, to where there is room for two.
    returned_bytes(|pointer, len| unsafe { proxy_get_header_map_value(0, at, size, pointer, len) })
}
