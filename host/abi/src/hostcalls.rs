//! The functions that guests call. Everything a guest hands over is checked here: pointers, lengths, ids, maps.
//!
//! Answers are those of Envoy 1.40, also where the specification says otherwise; docs/abi.md lists the few where the host
//! answers differently on purpose. A pointer outside the guest's memory ends the guest.

mod context;
mod foreign;
mod grpc;
mod http;
mod shared;
mod wasi;

use std::borrow::Cow;
use std::collections::BTreeSet;

use wasmtime::{Caller, Linker, Memory};

use crate::abi::{LogLevel, Status};
use crate::fields::FieldMap;
use crate::pairs::{self, Bounds, PairsError};
use crate::trace::{self, Watched, Word};
use crate::vm::{Doing, GuestFault, VmState};

/// A host function's end, short of the guest's.
type Answer = Result<Status, GuestFault>;

/// One call of a guest's into the host.
struct Call<'a> {
    caller: Caller<'a, VmState>,
    memory: Memory,
    name: &'static str,
    /// Why the status is what it is, for the lint.
    reason: Option<Cow<'static, str>>,
}

/// When a host function can be called apart from ordinary callbacks.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Available {
    starting: bool,
    allocating: bool,
}

const ALWAYS: Available = Available { starting: true, allocating: true };
const STARTING: Available = Available { starting: true, allocating: false };
const RUNNING: Available = Available { starting: false, allocating: false };

impl<'a> Call<'a> {
    fn enter(caller: Caller<'a, VmState>, name: &'static str, available: Available) -> Result<Call<'a>, GuestFault> {
        let state = caller.data();
        let doing = match state.callback.doing {
            Doing::Starting if !available.starting => Some("the guest starts"),
            Doing::Allocating if !available.allocating => Some("the guest allocates memory for the host"),
            _ => None,
        };
        if let Some(doing) = doing {
            return Err(GuestFault::Restricted { call: name, doing });
        }
        let Some(memory) = state.memory else {
            // Only a start function inside the module's own `start` section runs before the memory is known.
            return Err(GuestFault::Restricted { call: name, doing: "the module is instantiated" });
        };
        Ok(Call { caller, memory, name, reason: None })
    }

    /// Whether the plugin may call this function. A refusal is logged.
    fn is_allowed(&mut self) -> bool {
        if !self.state().restricted {
            return true;
        }
        let functions = &self.state().current_plugin().capabilities.functions;
        let allowed = functions.as_ref().is_none_or(|names| names.contains(self.name));
        if !allowed {
            let message = format!("blocked a call of `{}`, which `capabilities` does not list", self.name);
            self.state_mut().log(LogLevel::Error, message.as_bytes());
        }
        allowed
    }

    /// The answer to a call that may be made, but not with this name. The refusal is logged.
    fn blocked(&mut self, name: &[u8], list: &str) -> Status {
        let name = String::from_utf8_lossy(&name[..name.len().min(256)]);
        let message = format!("blocked `{}` of `{name}`, which `{list}` does not list", self.name);
        self.state_mut().log(LogLevel::Error, message.as_bytes());
        self.because(message, Status::InternalFailure)
    }

    fn state(&self) -> &VmState {
        self.caller.data()
    }

    fn state_mut(&mut self) -> &mut VmState {
        self.caller.data_mut()
    }

    /// The guest's memory beside the host's state.
    fn parts(&mut self) -> (&mut [u8], &mut VmState) {
        self.memory.data_and_store_mut(&mut self.caller)
    }

    fn bytes(&self, pointer: u32, len: u32) -> Result<&[u8], GuestFault> {
        range(self.memory.data(&self.caller), self.name, pointer, len)
    }

    /// A map that the guest hands over.
    fn map(&self, pointer: u32, len: u32) -> Result<Result<FieldMap, PairsError>, GuestFault> {
        let bounds = Bounds::of(&self.state().current_plugin().limits);
        Ok(pairs::decode(self.bytes(pointer, len)?, bounds))
    }

    fn write(&mut self, pointer: u32, value: &[u8]) -> Result<(), GuestFault> {
        let name = self.name;
        let target = range_mut(self.memory.data_mut(&mut self.caller), name, pointer, value.len())?;
        target.copy_from_slice(value);
        Ok(())
    }

    fn write_u32(&mut self, pointer: u32, value: u32) -> Result<(), GuestFault> {
        self.write(pointer, &value.to_le_bytes())
    }

    fn write_u64(&mut self, pointer: u32, value: u64) -> Result<(), GuestFault> {
        self.write(pointer, &value.to_le_bytes())
    }

    /// Copies bytes into memory that the guest allocates for them, exactly as many: an SDK takes them over as a whole.
    /// No bytes are a null pointer.
    fn give(&mut self, value: &[u8], return_pointer: u32, return_len: u32) -> Result<(), GuestFault> {
        let pointer = if value.is_empty() { 0 } else { self.allocate(value.len())? };
        let name = self.name;
        // Looked up once for all three; only the allocator could have moved it.
        let memory = self.memory.data_mut(&mut self.caller);
        if !value.is_empty() {
            range_mut(memory, name, pointer, value.len())?.copy_from_slice(value);
        }
        range_mut(memory, name, return_pointer, 4)?.copy_from_slice(&pointer.to_le_bytes());
        range_mut(memory, name, return_len, 4)?.copy_from_slice(&(value.len() as u32).to_le_bytes());
        Ok(())
    }

    /// Like [`Call::give`], for what `fill` writes into the VM's scratch space; nothing is given if it answers
    /// otherwise than `Ok`.
    fn give_filled(
        &mut self,
        return_pointer: u32,
        return_len: u32,
        fill: impl FnOnce(&mut Self, &mut Vec<u8>) -> Answer,
    ) -> Answer {
        let mut scratch = std::mem::take(&mut self.state_mut().scratch);
        scratch.clear();
        let result = fill(self, &mut scratch).and_then(|status| {
            if status == Status::Ok {
                self.give(&scratch, return_pointer, return_len)?;
            }
            Ok(status)
        });
        // One large answer must not keep its memory for the life of the VM.
        if scratch.capacity() <= 64 * 1024 {
            self.state_mut().scratch = scratch;
        }
        result
    }

    fn allocate(&mut self, len: usize) -> Result<u32, GuestFault> {
        let size = u32::try_from(len).map_err(|_| GuestFault::NoMemory(len))?;
        let state = self.state_mut();
        let allocate = state.allocate.clone().ok_or(GuestFault::NoMemory(len))?;
        let callback = state.callback;
        state.callback.doing = Doing::Allocating;
        let pointer = allocate.call(&mut self.caller, size);
        self.state_mut().callback = callback;
        match pointer {
            Ok(pointer) if pointer != 0 => Ok(pointer),
            // A trap inside the allocator ends the guest the same way: it cannot take the answer.
            _ => Err(GuestFault::NoMemory(len)),
        }
    }

    /// Reads the arguments for a trace, where one is wanted.
    fn watch(&self, words: impl FnOnce() -> Vec<u64>) -> Option<Watched> {
        let wanted = self.state().traced && self.state().callback.doing != Doing::Allocating;
        wanted.then(|| trace::arguments(self.name, self.memory.data(&self.caller), words()))
    }

    /// Tells what came of a call whose arguments were read.
    #[cold]
    fn tell(&self, watched: Watched, outcome: &Answer) {
        let event = trace::hostcall(self.name, self.memory.data(&self.caller), watched, outcome);
        self.state().embedder.borrow_mut().trace(event);
    }

    /// Notes why the answer will be what it is.
    fn because<T>(&mut self, reason: impl Into<Cow<'static, str>>, status: T) -> T {
        self.reason = Some(reason.into());
        status
    }

    /// Tells the embedder of a call that cannot do what it seems to.
    fn lint(&mut self, reason: impl Into<String>) {
        let name = self.name;
        self.state_mut().lint(name, || reason.into());
    }

    /// A status that the Rust SDK does not expect makes it panic; the author should hear why.
    fn lint_status(&mut self, status: Status, tolerated: &[Status]) {
        if status == Status::Ok || tolerated.contains(&status) {
            return;
        }
        let reason = self.reason.take().unwrap_or_else(|| "an argument is not valid here".into());
        let name = self.name;
        let text = || format!("answers {status:?} ({}), on which SDKs panic: {reason}", status as u32);
        self.state_mut().lint(name, text);
    }
}

fn range<'m>(memory: &'m [u8], call: &'static str, pointer: u32, len: u32) -> Result<&'m [u8], GuestFault> {
    // Both fit in usize, and so does their sum.
    memory.get(pointer as usize..pointer as usize + len as usize).ok_or(GuestFault::OutOfBounds { call, pointer, len })
}

fn range_mut<'m>(
    memory: &'m mut [u8],
    call: &'static str,
    pointer: u32,
    len: usize,
) -> Result<&'m mut [u8], GuestFault> {
    memory.get_mut(pointer as usize..pointer as usize + len).ok_or(GuestFault::OutOfBounds {
        call,
        pointer,
        len: u32::try_from(len).unwrap_or(u32::MAX),
    })
}

/// A host function of the ABI: its name, when it can be called, what it does, its parameters, and the statuses beside
/// `Ok` that SDKs expect of it.
macro_rules! proxy {
    ($linker:ident, $name:literal, $available:expr, $func:path, ($($arg:ident: $ty:ty),*), $tolerated:expr) => {
        $linker.names.insert(("env", $name));
        $linker.linker.func_wrap(
            "env",
            $name,
            |caller: Caller<'_, VmState>, $($arg: $ty),*| -> wasmtime::Result<u32> {
                let mut call = Call::enter(caller, $name, $available)?;
                if !call.is_allowed() {
                    return Ok(Status::InternalFailure as u32);
                }
                let watched = call.watch(|| vec![$(Word::word($arg)),*]);
                let outcome = $func(&mut call, $($arg),*);
                if let Some(watched) = watched {
                    call.tell(watched, &outcome);
                }
                let status = outcome?;
                call.lint_status(status, &$tolerated);
                Ok(status as u32)
            },
        )?;
    };
}

/// All host functions, and their names by module.
pub(crate) struct HostFunctions {
    pub(crate) linker: Linker<VmState>,
    pub(crate) names: BTreeSet<(&'static str, &'static str)>,
}

/// All host functions, for any module.
pub(crate) fn host_functions(engine: &wasmtime::Engine) -> wasmtime::Result<HostFunctions> {
    use Status::{BadArgument, CasMismatch, Empty, InternalFailure, NotFound, ParseFailure, SerializationFailure};
    let mut functions = HostFunctions { linker: Linker::new(engine), names: BTreeSet::new() };
    let l = &mut functions;

    proxy!(l, "proxy_log", ALWAYS, context::log, (level: u32, message: u32, len: u32), []);
    proxy!(l, "proxy_get_log_level", RUNNING, context::get_log_level, (ret: u32), []);
    proxy!(l, "proxy_get_current_time_nanoseconds", RUNNING, context::get_time, (ret: u32), []);
    proxy!(l, "proxy_set_tick_period_milliseconds", RUNNING, context::set_tick_period, (milliseconds: u32), []);
    proxy!(l, "proxy_set_effective_context", RUNNING, context::set_effective_context, (id: u32), [BadArgument]);
    proxy!(l, "proxy_done", RUNNING, context::done, (), []);
    proxy!(l, "proxy_get_property", RUNNING, context::get_property, (path: u32, len: u32, ret: u32, ret_len: u32),
        [NotFound, SerializationFailure, InternalFailure]);
    proxy!(l, "proxy_set_property", RUNNING, context::set_property, (path: u32, len: u32, value: u32, value_len: u32), []);
    proxy!(l, "proxy_call_foreign_function", RUNNING, foreign::call,
        (name: u32, name_len: u32, arg: u32, arg_len: u32, ret: u32, ret_len: u32),
        [NotFound, BadArgument, SerializationFailure, InternalFailure]);

    proxy!(l, "proxy_get_buffer_bytes", RUNNING, http::get_buffer,
        (buffer: u32, start: u32, most: u32, ret: u32, ret_len: u32), [NotFound]);
    proxy!(l, "proxy_set_buffer_bytes", RUNNING, http::set_buffer,
        (buffer: u32, start: u32, size: u32, value: u32, len: u32), []);
    proxy!(l, "proxy_get_buffer_status", RUNNING, http::get_buffer_status, (buffer: u32, ret_len: u32, ret_flags: u32), []);
    proxy!(l, "proxy_get_header_map_size", RUNNING, http::get_map_size, (map: u32, ret: u32), []);
    proxy!(l, "proxy_get_header_map_pairs", RUNNING, http::get_map, (map: u32, ret: u32, ret_len: u32), []);
    proxy!(l, "proxy_set_header_map_pairs", RUNNING, http::set_map, (map: u32, pairs: u32, len: u32), []);
    proxy!(l, "proxy_get_header_map_value", RUNNING, http::get_field,
        (map: u32, name: u32, name_len: u32, ret: u32, ret_len: u32), [NotFound]);
    proxy!(l, "proxy_add_header_map_value", RUNNING, http::add_field,
        (map: u32, name: u32, name_len: u32, value: u32, value_len: u32), []);
    proxy!(l, "proxy_replace_header_map_value", RUNNING, http::replace_field,
        (map: u32, name: u32, name_len: u32, value: u32, value_len: u32), []);
    proxy!(l, "proxy_remove_header_map_value", RUNNING, http::remove_field, (map: u32, name: u32, name_len: u32), []);
    proxy!(l, "proxy_continue_stream", RUNNING, http::continue_stream, (stream: u32), []);
    proxy!(l, "proxy_close_stream", RUNNING, http::close_stream, (stream: u32), []);
    proxy!(l, "proxy_send_local_response", RUNNING, http::send_local_response,
        (status: u32, details: u32, details_len: u32, body: u32, body_len: u32, fields: u32, fields_len: u32, grpc: i32), []);
    proxy!(l, "proxy_http_call", RUNNING, http::http_call,
        (upstream: u32, upstream_len: u32, fields: u32, fields_len: u32, body: u32, body_len: u32, trailers: u32,
         trailers_len: u32, timeout: u32, ret: u32), [BadArgument, InternalFailure]);
    proxy!(l, "proxy_grpc_call", RUNNING, grpc::call,
        (upstream: u32, upstream_len: u32, service: u32, service_len: u32, method: u32, method_len: u32, metadata: u32,
         metadata_len: u32, message: u32, message_len: u32, timeout: u32, ret: u32), [ParseFailure, InternalFailure]);
    proxy!(l, "proxy_grpc_stream", RUNNING, grpc::stream,
        (upstream: u32, upstream_len: u32, service: u32, service_len: u32, method: u32, method_len: u32, metadata: u32,
         metadata_len: u32, ret: u32), [ParseFailure, InternalFailure]);
    proxy!(l, "proxy_grpc_send", RUNNING, grpc::send, (id: u32, message: u32, len: u32, end: u32), [NotFound, BadArgument]);
    proxy!(l, "proxy_grpc_cancel", RUNNING, grpc::cancel, (id: u32), [NotFound]);
    proxy!(l, "proxy_grpc_close", RUNNING, grpc::close, (id: u32), [NotFound]);
    proxy!(l, "proxy_get_status", RUNNING, http::get_status, (ret_code: u32, ret: u32, ret_len: u32), []);

    proxy!(l, "proxy_get_shared_data", RUNNING, shared::get_data,
        (key: u32, key_len: u32, ret: u32, ret_len: u32, ret_cas: u32), [NotFound]);
    proxy!(l, "proxy_set_shared_data", RUNNING, shared::set_data,
        (key: u32, key_len: u32, value: u32, value_len: u32, cas: u32), [CasMismatch]);
    proxy!(l, "proxy_register_shared_queue", RUNNING, shared::register_queue, (name: u32, len: u32, ret: u32), []);
    proxy!(l, "proxy_resolve_shared_queue", RUNNING, shared::resolve_queue,
        (vm_id: u32, vm_id_len: u32, name: u32, len: u32, ret: u32), [NotFound]);
    proxy!(l, "proxy_enqueue_shared_queue", RUNNING, shared::enqueue, (id: u32, value: u32, len: u32), [NotFound]);
    proxy!(l, "proxy_dequeue_shared_queue", RUNNING, shared::dequeue, (id: u32, ret: u32, ret_len: u32), [NotFound, Empty]);
    proxy!(l, "proxy_define_metric", RUNNING, shared::define_metric, (kind: u32, name: u32, len: u32, ret: u32), []);
    proxy!(l, "proxy_increment_metric", RUNNING, shared::increment_metric, (id: u32, offset: i64), [NotFound, BadArgument]);
    proxy!(l, "proxy_record_metric", RUNNING, shared::record_metric, (id: u32, value: u64), [NotFound]);
    proxy!(l, "proxy_get_metric", RUNNING, shared::get_metric, (id: u32, ret: u32), [NotFound, BadArgument]);

    // ABI 0.1.0 only.
    proxy!(l, "proxy_get_configuration", RUNNING, context::get_configuration, (ret: u32, ret_len: u32), []);
    proxy!(l, "proxy_continue_request", RUNNING, http::continue_request, (), []);
    proxy!(l, "proxy_continue_response", RUNNING, http::continue_response, (), []);
    proxy!(l, "proxy_clear_route_cache", RUNNING, foreign::proxy_clear_route_cache, (), []);

    // What C++ guests import besides.
    l.names.extend([("env", "emscripten_notify_memory_growth"), ("env", "pthread_equal")]);
    l.linker.func_wrap("env", "emscripten_notify_memory_growth", |_memory: u32| {})?;
    l.linker.func_wrap("env", "pthread_equal", |left: u32, right: u32| u32::from(left == right))?;

    for module in ["wasi_snapshot_preview1", "wasi_unstable"] {
        wasi::link(l, module)?;
    }
    Ok(functions)
}
