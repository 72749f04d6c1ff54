//! The Proxy-Wasm host functions that the adapter calls, with every status answered by a value.
//!
//! This module holds the kit's only `unsafe` code. It is here because the SDK's wrappers (`proxy_wasm::hostcalls`) do
//! not fit a filter that must not fail: they panic on statuses which Envoy does return (a call that its configuration
//! forbids gives 10, a property that cannot be set gives 2), read a status that they do not know as an enum value that
//! does not exist, and have no way to pass the response code details of a local response.
#![allow(unsafe_code, reason = "calls to the host are foreign functions; see above for why the SDK's do not serve")]

use std::ptr::{null, null_mut};

/// A status other than `OK`. Which one it is matters only to `call_foreign_function`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused(u32);

impl Refused {
    /// The host knows no such thing.
    pub(super) const NOT_FOUND: Self = Self(1);
    /// Among other things, how Envoy answers a call that its `capability_restriction_config` forbids, with a line in
    /// its error log each time.
    pub(super) const INTERNAL_FAILURE: Self = Self(10);
}

/// The request's field lines, in `proxy_get_header_map_pairs` and the functions that edit them.
const HTTP_REQUEST_HEADERS: u32 = 0;
const PLUGIN_CONFIGURATION: u32 = 7;
const COUNTER: u32 = 0;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_log(level: u32, message: *const u8, message_size: usize) -> u32;
    fn proxy_get_current_time_nanoseconds(time: *mut u64) -> u32;
    fn proxy_get_buffer_bytes(buffer: u32, start: usize, size_max: usize, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_get_header_map_pairs(map: u32, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_replace_header_map_value(map: u32, key: *const u8, key_size: usize, value: *const u8, size: usize) -> u32;
    fn proxy_remove_header_map_value(map: u32, key: *const u8, key_size: usize) -> u32;
    fn proxy_get_property(path: *const u8, path_size: usize, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_set_property(path: *const u8, path_size: usize, value: *const u8, value_size: usize) -> u32;
    fn proxy_send_local_response(
        status_code: u32,
        details: *const u8,
        details_size: usize,
        body: *const u8,
        body_size: usize,
        fields: *const u8,
        fields_size: usize,
        grpc_status: i32,
    ) -> u32;
    fn proxy_define_metric(kind: u32, name: *const u8, name_size: usize, id: *mut u32) -> u32;
    fn proxy_increment_metric(id: u32, offset: i64) -> u32;
    fn proxy_call_foreign_function(
        name: *const u8,
        name_size: usize,
        argument: *const u8,
        argument_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
}

fn outcome(status: u32) -> Result<(), Refused> {
    if status == 0 { Ok(()) } else { Err(Refused(status)) }
}

/// Runs a call that hands a buffer over, and takes the buffer.
fn taking_buffer(call: impl FnOnce(*mut *mut u8, *mut usize) -> u32) -> Result<Vec<u8>, Refused> {
    let (mut data, mut size) = (null_mut(), 0);
    outcome(call(&raw mut data, &raw mut size))?;
    if data.is_null() {
        return Ok(Vec::new());
    }
    // SAFETY: by the ABI, the host got `data` from this module's `proxy_on_memory_allocate(size)`, wrote all of it and
    // hands it over. That function, the SDK's, makes a boxed slice of exactly `size` bytes, of alignment 1, with the
    // global allocator: what a `Vec<u8>` of length and capacity `size` owns.
    Ok(unsafe { Vec::from_raw_parts(data, size, size) })
}

/// Levels as the ABI numbers them: 2 is info, 3 is a warning, 4 is an error. A log that fails has nowhere to say so.
pub(super) fn log(level: u32, message: &str) {
    // SAFETY: the pointer and the length are those of a string that outlives the call.
    let _ = unsafe { proxy_log(level, message.as_ptr(), message.len()) };
}

pub(super) fn current_time_nanoseconds() -> Result<u64, Refused> {
    let mut time = 0;
    // SAFETY: the pointer is to a local that outlives the call and has the size that the ABI names.
    outcome(unsafe { proxy_get_current_time_nanoseconds(&raw mut time) })?;
    Ok(time)
}

pub(super) fn plugin_configuration() -> Result<Vec<u8>, Refused> {
    // SAFETY: `data` and `size` are pointers to locals that outlive the call.
    taking_buffer(|data, size| unsafe { proxy_get_buffer_bytes(PLUGIN_CONFIGURATION, 0, usize::MAX, data, size) })
}

pub(super) fn request_field_lines() -> Result<Vec<u8>, Refused> {
    // SAFETY: `data` and `size` are pointers to locals that outlive the call.
    taking_buffer(|data, size| unsafe { proxy_get_header_map_pairs(HTTP_REQUEST_HEADERS, data, size) })
}

pub(super) fn set_request_field(name: &str, value: &[u8]) -> Result<(), Refused> {
    let (key, size) = (name.as_ptr(), name.len());
    // SAFETY: the pointers and lengths are those of slices that outlive the call.
    outcome(unsafe { proxy_replace_header_map_value(HTTP_REQUEST_HEADERS, key, size, value.as_ptr(), value.len()) })
}

pub(super) fn remove_request_field(name: &str) -> Result<(), Refused> {
    // SAFETY: the pointer and the length are those of a string that outlives the call.
    outcome(unsafe { proxy_remove_header_map_value(HTTP_REQUEST_HEADERS, name.as_ptr(), name.len()) })
}

pub(super) fn property(path: &[&str]) -> Result<Vec<u8>, Refused> {
    let path = path.join("\0");
    // SAFETY: the pointer and the length are those of a string that outlives the call; `data` and `size` are pointers
    // to locals that do.
    taking_buffer(|data, size| unsafe { proxy_get_property(path.as_ptr(), path.len(), data, size) })
}

pub(super) fn set_property(name: &str, value: &[u8]) -> Result<(), Refused> {
    // SAFETY: the pointers and lengths are those of slices that outlive the call.
    outcome(unsafe { proxy_set_property(name.as_ptr(), name.len(), value.as_ptr(), value.len()) })
}

pub(super) fn send_local_response(status: u16, details: &str, body: &[u8], fields: &[u8]) -> Result<(), Refused> {
    /// The response is not one to a gRPC call; Envoy turns it into one by itself where the request was.
    const NO_GRPC_STATUS: i32 = -1;
    // SAFETY: the pointers and lengths are those of slices that outlive the call.
    outcome(unsafe {
        proxy_send_local_response(
            status.into(),
            details.as_ptr(),
            details.len(),
            body.as_ptr(),
            body.len(),
            fields.as_ptr(),
            fields.len(),
            NO_GRPC_STATUS,
        )
    })
}

pub(super) fn define_counter(name: &str) -> Result<u32, Refused> {
    let mut id = 0;
    // SAFETY: the pointer and the length are those of a string, and `id` is a local, that outlive the call.
    outcome(unsafe { proxy_define_metric(COUNTER, name.as_ptr(), name.len(), &raw mut id) })?;
    Ok(id)
}

pub(super) fn increment_counter(id: u32) -> Result<(), Refused> {
    // SAFETY: no pointers are passed.
    outcome(unsafe { proxy_increment_metric(id, 1) })
}

pub(super) fn call_foreign_function(name: &str, argument: &[u8]) -> Result<Vec<u8>, Refused> {
    let (argument, argument_size) = if argument.is_empty() { (null(), 0) } else { (argument.as_ptr(), argument.len()) };
    // SAFETY: the pointers and lengths are those of slices that outlive the call; `data` and `size` are pointers to
    // locals that do.
    taking_buffer(|data, size| unsafe {
        proxy_call_foreign_function(name.as_ptr(), name.len(), argument, argument_size, data, size)
    })
}
