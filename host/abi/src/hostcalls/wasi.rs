//! The part of WASI preview 1 that Rust, Go and C++ guests import, with Envoy's answers.
//!
//! There is no file, no socket, no argument. Clocks are the embedder's; output is the log.

use wasmtime::Caller;

use super::{ALWAYS, Call, HostFunctions, STARTING};
use crate::abi::LogLevel;
use crate::vm::{GuestFault, VmState};

const SUCCESS: u32 = 0;
const BADF: u32 = 8;
const FAULT_TOO_MUCH: u32 = 28;
const NOENT: u32 = 44;
const NOSYS: u32 = 52;
const NOTSUP: u32 = 58;
const NOTCAPABLE: u32 = 76;

/// Bytes of randomness that one call may ask for.
const RANDOM_BYTES_MAX: u32 = 64 * 1024;
/// Pieces that one write may consist of.
const IOVECS_MAX: u32 = 1024;

/// A WASI function: what it does, or the fixed answer it has.
macro_rules! wasi {
    ($linker:ident, $module:ident, $name:literal, $available:expr, $func:path, ($($arg:ident: $ty:ty),*)) => {
        $linker.names.insert(($module, $name));
        $linker.linker.func_wrap(
            $module,
            $name,
            |caller: Caller<'_, VmState>, $($arg: $ty),*| -> wasmtime::Result<u32> {
                let mut call = Call::enter(caller, $name, $available)?;
                if !call.is_allowed() {
                    return Ok(NOTCAPABLE);
                }
                Ok($func(&mut call, $($arg),*)?)
            },
        )?;
    };
}

macro_rules! constant {
    ($linker:ident, $module:ident, $name:literal, $errno:expr, ($($ty:ty),*)) => {
        $linker.names.insert(($module, $name));
        $linker.linker.func_wrap($module, $name, |$(_: $ty),*| -> u32 { $errno })?;
    };
}

pub(super) fn link(functions: &mut HostFunctions, module: &'static str) -> wasmtime::Result<()> {
    let l = functions;
    wasi!(l, module, "fd_write", ALWAYS, fd_write, (fd: u32, iovs: u32, count: u32, ret: u32));
    wasi!(l, module, "fd_pwrite", ALWAYS, fd_pwrite, (fd: u32, iovs: u32, count: u32, offset: u64, ret: u32));
    wasi!(l, module, "clock_time_get", ALWAYS, clock_time_get, (id: u32, precision: u64, ret: u32));
    wasi!(l, module, "clock_res_get", ALWAYS, clock_res_get, (id: u32, ret: u32));
    wasi!(l, module, "random_get", STARTING, random_get, (pointer: u32, len: u32));
    wasi!(l, module, "environ_get", STARTING, environ_get, (pointers: u32, bytes: u32));
    wasi!(l, module, "environ_sizes_get", STARTING, environ_sizes_get, (ret_count: u32, ret_bytes: u32));
    wasi!(l, module, "args_get", STARTING, args_get, (pointers: u32, bytes: u32));
    wasi!(l, module, "args_sizes_get", STARTING, args_sizes_get, (ret_count: u32, ret_bytes: u32));
    wasi!(l, module, "poll_oneoff", ALWAYS, poll_oneoff, (input: u32, output: u32, count: u32, ret: u32));
    wasi!(l, module, "fd_fdstat_get", STARTING, fd_fdstat_get, (fd: u32, ret: u32));
    l.names.insert((module, "proc_exit"));
    l.linker.func_wrap(module, "proc_exit", |caller: Caller<'_, VmState>, code: u32| -> wasmtime::Result<()> {
        // Envoy goes on after it; so do we. What follows in a guest is usually an `unreachable`.
        let mut call = Call::enter(caller, "proc_exit", ALWAYS)?;
        call.state_mut().log(LogLevel::Error, format!("the guest called proc_exit({code})").as_bytes());
        Ok(())
    })?;

    constant!(l, module, "sched_yield", SUCCESS, ());
    constant!(l, module, "fd_close", SUCCESS, (u32));
    constant!(l, module, "fd_seek", SUCCESS, (u32, i64, u32, u32));
    constant!(l, module, "fd_prestat_get", BADF, (u32, u32));
    constant!(l, module, "fd_filestat_get", BADF, (u32, u32));
    constant!(l, module, "fd_read", NOSYS, (u32, u32, u32, u32));
    constant!(l, module, "fd_pread", NOSYS, (u32, u32, u32, u64, u32));
    constant!(l, module, "fd_fdstat_set_flags", NOSYS, (u32, u32));
    constant!(l, module, "fd_prestat_dir_name", NOSYS, (u32, u32, u32));
    constant!(l, module, "fd_advise", NOTSUP, (u32, u64, u64, u32));
    constant!(l, module, "fd_allocate", NOTSUP, (u32, u64, u64));
    constant!(l, module, "fd_datasync", NOTSUP, (u32));
    constant!(l, module, "fd_fdstat_set_rights", NOTSUP, (u32, u64, u64));
    constant!(l, module, "fd_filestat_set_size", NOTSUP, (u32, u64));
    constant!(l, module, "fd_filestat_set_times", NOTSUP, (u32, u64, u64, u32));
    constant!(l, module, "fd_readdir", NOTSUP, (u32, u32, u32, u64, u32));
    constant!(l, module, "fd_renumber", NOTSUP, (u32, u32));
    constant!(l, module, "fd_sync", NOTSUP, (u32));
    constant!(l, module, "fd_tell", NOTSUP, (u32, u32));
    constant!(l, module, "path_open", NOENT, (u32, u32, u32, u32, u32, u64, u64, u32, u32));
    constant!(l, module, "path_create_directory", NOTSUP, (u32, u32, u32));
    constant!(l, module, "path_filestat_get", NOTSUP, (u32, u32, u32, u32, u32));
    constant!(l, module, "path_filestat_set_times", NOTSUP, (u32, u32, u32, u32, u64, u64, u32));
    constant!(l, module, "path_link", NOTSUP, (u32, u32, u32, u32, u32, u32, u32));
    constant!(l, module, "path_readlink", NOTSUP, (u32, u32, u32, u32, u32, u32));
    constant!(l, module, "path_remove_directory", NOTSUP, (u32, u32, u32));
    constant!(l, module, "path_rename", NOTSUP, (u32, u32, u32, u32, u32, u32));
    constant!(l, module, "path_symlink", NOTSUP, (u32, u32, u32, u32, u32));
    constant!(l, module, "path_unlink_file", NOTSUP, (u32, u32, u32));
    constant!(l, module, "proc_raise", NOTSUP, (u32));
    constant!(l, module, "sock_accept", NOTSUP, (u32, u32, u32));
    constant!(l, module, "sock_recv", NOTSUP, (u32, u32, u32, u32, u32, u32));
    constant!(l, module, "sock_send", NOTSUP, (u32, u32, u32, u32, u32));
    constant!(l, module, "sock_shutdown", NOTSUP, (u32, u32));
    Ok(())
}

type Errno = Result<u32, GuestFault>;

/// Standard output is logged as information, standard error as errors, a line a call.
fn fd_write(call: &mut Call<'_>, fd: u32, iovs: u32, count: u32, ret: u32) -> Errno {
    let level = match fd {
        1 => LogLevel::Info,
        2 => LogLevel::Error,
        _ => return Ok(BADF),
    };
    if count > IOVECS_MAX {
        return Ok(FAULT_TOO_MUCH);
    }
    let most = call.state().plugin.limits.log_line_bytes_max;
    let mut message = Vec::new();
    let mut written: u32 = 0;
    for i in 0..count {
        let entry = iovs.saturating_add(i * 8);
        let pair = call.bytes(entry, 8)?;
        let pointer = u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]);
        let len = u32::from_le_bytes([pair[4], pair[5], pair[6], pair[7]]);
        let piece = call.bytes(pointer, len)?;
        let room = most.saturating_sub(message.len());
        message.extend_from_slice(&piece[..piece.len().min(room)]);
        written = written.saturating_add(len);
    }
    if message.last() == Some(&b'\n') {
        message.pop();
    }
    if level >= call.state().embedder.borrow().log_level() {
        call.state_mut().log(level, &message);
    }
    call.write_u32(ret, written)?;
    Ok(SUCCESS)
}

fn fd_pwrite(call: &mut Call<'_>, fd: u32, iovs: u32, count: u32, _offset: u64, ret: u32) -> Errno {
    fd_write(call, fd, iovs, count, ret)
}

fn clock_time_get(call: &mut Call<'_>, id: u32, _precision: u64, ret: u32) -> Errno {
    let now = match id {
        0 => call.state().embedder.borrow().unix_nanos(),
        1 => call.state().embedder.borrow().monotonic().as_nanos() as u64,
        _ => return Ok(NOTSUP),
    };
    call.write_u64(ret, now)?;
    Ok(SUCCESS)
}

fn clock_res_get(call: &mut Call<'_>, id: u32, ret: u32) -> Errno {
    if id > 1 {
        return Ok(NOTSUP);
    }
    call.write_u64(ret, 1)?;
    Ok(SUCCESS)
}

fn random_get(call: &mut Call<'_>, pointer: u32, len: u32) -> Errno {
    if len > RANDOM_BYTES_MAX {
        return Ok(FAULT_TOO_MUCH);
    }
    let mut bytes = vec![0; len as usize];
    if getrandom::fill(&mut bytes).is_err() {
        return Ok(NOSYS);
    }
    call.write(pointer, &bytes)?;
    Ok(SUCCESS)
}

fn environ_sizes_get(call: &mut Call<'_>, ret_count: u32, ret_bytes: u32) -> Errno {
    let environment = &call.state().plugin.environment;
    let count = environment.len() as u32;
    // NAME=value and a NUL.
    let bytes: usize = environment.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    call.write_u32(ret_count, count)?;
    call.write_u32(ret_bytes, bytes as u32)?;
    Ok(SUCCESS)
}

fn environ_get(call: &mut Call<'_>, pointers: u32, bytes: u32) -> Errno {
    let plugin = call.state().plugin.clone();
    let (mut pointer_at, mut at) = (pointers, bytes);
    for (name, value) in &plugin.environment {
        call.write_u32(pointer_at, at)?;
        let entry = [name.as_bytes(), b"=", value.as_bytes(), b"\0"].concat();
        call.write(at, &entry)?;
        pointer_at = pointer_at.saturating_add(4);
        at = at.saturating_add(entry.len() as u32);
    }
    Ok(SUCCESS)
}

fn args_sizes_get(call: &mut Call<'_>, ret_count: u32, ret_bytes: u32) -> Errno {
    call.write_u32(ret_count, 0)?;
    call.write_u32(ret_bytes, 0)?;
    Ok(SUCCESS)
}

fn args_get(_call: &mut Call<'_>, _pointers: u32, _bytes: u32) -> Errno {
    Ok(SUCCESS)
}

/// No event ever happens; Go's runtime asks all the same.
fn poll_oneoff(call: &mut Call<'_>, _input: u32, _output: u32, _count: u32, ret: u32) -> Errno {
    call.write_u32(ret, 0)?;
    Ok(SUCCESS)
}

/// Only the two outputs exist, with the right to write.
fn fd_fdstat_get(call: &mut Call<'_>, fd: u32, ret: u32) -> Errno {
    if !(1..=2).contains(&fd) {
        return Ok(BADF);
    }
    let mut stat = [0; 24];
    stat[8..16].copy_from_slice(&64u64.to_le_bytes());
    call.write(ret, &stat)?;
    Ok(SUCCESS)
}
