//! The part of WASI preview 1 that Rust, Go and C++ guests import, with Envoy 1.40's answers, measured one by one.
//!
//! There is no file, no socket, no argument. Clocks are the embedder's; output is the log. While a guest starts, Envoy lets
//! it call some functions and ends it at others, which are of no more use to it then; so does this host. `path_link` and
//! `path_symlink` have WASI's own types here; in Envoy they lack a parameter, so that a module that imports them is refused.

use wasmtime::Caller;

use super::{ALWAYS, Call, HostFunctions, RUNNING, STARTING};
use crate::abi::LogLevel;
use crate::vm::{GuestFault, VmState};

const SUCCESS: u32 = 0;
const BADF: u32 = 8;
/// What Envoy says to reading a directory; the number is another operating system's "not a directory".
const NOTDIR: u32 = 20;
const FAULT: u32 = 21;
const INVAL: u32 = 28;
const NOENT: u32 = 44;
const NOSYS: u32 = 52;
const NOTSUP: u32 = 58;
const NOTCAPABLE: u32 = 76;

/// Bytes of randomness that one call may ask for.
const RANDOM_BYTES_MAX: u32 = 64 * 1024;
/// Pieces that one write may consist of.
const IOVECS_MAX: u32 = 1024;

/// A WASI function: when it can be called, and what it does, unless the plugin may not call it.
macro_rules! wasi {
    ($linker:ident, $module:ident, $name:literal, $available:expr, $func:expr, ($($arg:ident: $ty:ty),*)) => {
        $linker.names.insert(($module, $name));
        $linker.linker.func_wrap(
            $module,
            $name,
            |caller: Caller<'_, VmState>, $($arg: $ty),*| -> wasmtime::Result<u32> {
                let mut call = Call::enter(caller, $name, $available)?;
                if !call.is_allowed() {
                    return Ok(NOTCAPABLE);
                }
                Ok(or_fault($func(&mut call, $($arg),*))?)
            },
        )?;
    };
}

/// A WASI function that does nothing but answer.
macro_rules! fixed {
    ($linker:ident, $module:ident, $name:literal, $available:expr, $errno:expr, ($($arg:ident: $ty:ty),*)) => {
        wasi!($linker, $module, $name, $available, |_: &mut Call<'_>, $(_: $ty),*| Ok($errno), ($($arg: $ty),*));
    };
}

/// A WASI function that would change or ask a file: nothing happens to the two outputs, and there are no others.
macro_rules! on_outputs {
    ($linker:ident, $module:ident, $name:literal, ($($arg:ident: $ty:ty),*)) => {
        wasi!($linker, $module, $name, STARTING,
            |_: &mut Call<'_>, fd: u32 $(, _: $ty)*| Ok(if is_output(fd) { SUCCESS } else { BADF }),
            (fd: u32 $(, $arg: $ty)*));
    };
}

/// WASI has a number for a pointer outside the guest's memory; functions of the ABI end the guest.
fn or_fault(answer: Errno) -> Errno {
    match answer {
        Err(GuestFault::OutOfBounds { .. }) => Ok(FAULT),
        answer => answer,
    }
}

fn is_output(fd: u32) -> bool {
    (1..=2).contains(&fd)
}

pub(super) fn link(functions: &mut HostFunctions, module: &'static str) -> wasmtime::Result<()> {
    let l = functions;
    wasi!(l, module, "fd_write", ALWAYS, fd_write, (fd: u32, iovs: u32, count: u32, ret: u32));
    wasi!(l, module, "fd_pwrite", STARTING, fd_pwrite, (fd: u32, iovs: u32, count: u32, offset: u64, ret: u32));
    wasi!(l, module, "clock_time_get", ALWAYS, clock_time_get, (id: u32, precision: u64, ret: u32));
    wasi!(l, module, "clock_res_get", STARTING, clock_res_get, (id: u32, ret: u32));
    wasi!(l, module, "random_get", STARTING, random_get, (pointer: u32, len: u32));
    wasi!(l, module, "environ_get", STARTING, environ_get, (pointers: u32, bytes: u32));
    wasi!(l, module, "environ_sizes_get", STARTING, environ_sizes_get, (ret_count: u32, ret_bytes: u32));
    fixed!(l, module, "args_get", STARTING, SUCCESS, (pointers: u32, bytes: u32));
    wasi!(l, module, "args_sizes_get", STARTING, args_sizes_get, (ret_count: u32, ret_bytes: u32));
    wasi!(l, module, "poll_oneoff", ALWAYS, poll_oneoff, (input: u32, output: u32, count: u32, ret: u32));
    fixed!(l, module, "sched_yield", RUNNING, SUCCESS, ());
    l.names.insert((module, "proc_exit"));
    l.linker.func_wrap(module, "proc_exit", |caller: Caller<'_, VmState>, code: u32| -> wasmtime::Result<()> {
        // Envoy goes on after it; so do we. What follows in a guest is usually an `unreachable`.
        let mut call = Call::enter(caller, "proc_exit", RUNNING)?;
        if call.is_allowed() {
            call.state_mut().log(LogLevel::Error, format!("the guest called proc_exit({code})").as_bytes());
        }
        Ok(())
    })?;

    wasi!(l, module, "fd_fdstat_get", STARTING, fd_fdstat_get, (fd: u32, ret: u32));
    wasi!(l, module, "fd_tell", STARTING, fd_tell, (fd: u32, ret: u32));
    wasi!(l, module, "fd_renumber", STARTING, fd_renumber, (from: u32, to: u32));
    wasi!(l, module, "fd_readdir", STARTING, fd_readdir, (fd: u32, buffer: u32, len: u32, cookie: u64, ret: u32));
    on_outputs!(l, module, "fd_allocate", (offset: u64, len: u64));
    on_outputs!(l, module, "fd_datasync", ());
    on_outputs!(l, module, "fd_fdstat_set_rights", (base: u64, inheriting: u64));
    on_outputs!(l, module, "fd_filestat_set_size", (size: u64));
    on_outputs!(l, module, "fd_filestat_set_times", (atim: u64, mtim: u64, flags: u32));
    on_outputs!(l, module, "fd_sync", ());
    fixed!(l, module, "fd_advise", STARTING, SUCCESS, (fd: u32, offset: u64, len: u64, advice: u32));
    fixed!(l, module, "fd_close", RUNNING, SUCCESS, (fd: u32));
    fixed!(l, module, "fd_seek", RUNNING, SUCCESS, (fd: u32, offset: u64, whence: u32, ret: u32));
    fixed!(l, module, "fd_prestat_get", STARTING, BADF, (fd: u32, ret: u32));
    fixed!(l, module, "fd_prestat_dir_name", STARTING, NOSYS, (fd: u32, path: u32, len: u32));
    fixed!(l, module, "fd_filestat_get", STARTING, BADF, (fd: u32, ret: u32));
    fixed!(l, module, "fd_fdstat_set_flags", STARTING, NOSYS, (fd: u32, flags: u32));
    fixed!(l, module, "fd_read", RUNNING, NOSYS, (fd: u32, iovs: u32, count: u32, ret: u32));
    fixed!(l, module, "fd_pread", STARTING, NOSYS, (fd: u32, iovs: u32, count: u32, offset: u64, ret: u32));

    fixed!(l, module, "path_open", RUNNING, NOENT,
        (fd: u32, dir: u32, path: u32, len: u32, open: u32, base: u64, inheriting: u64, flags: u32, ret: u32));
    fixed!(l, module, "path_create_directory", STARTING, NOTSUP, (fd: u32, path: u32, len: u32));
    fixed!(l, module, "path_filestat_get", STARTING, NOTSUP, (fd: u32, flags: u32, path: u32, len: u32, ret: u32));
    fixed!(l, module, "path_filestat_set_times", STARTING, NOTSUP,
        (fd: u32, flags: u32, path: u32, len: u32, atim: u64, mtim: u64, times: u32));
    fixed!(l, module, "path_link", STARTING, NOTSUP,
        (fd: u32, flags: u32, old: u32, old_len: u32, new_fd: u32, new: u32, new_len: u32));
    fixed!(l, module, "path_readlink", STARTING, NOTSUP,
        (fd: u32, path: u32, len: u32, buffer: u32, size: u32, ret: u32));
    fixed!(l, module, "path_remove_directory", STARTING, NOTSUP, (fd: u32, path: u32, len: u32));
    fixed!(l, module, "path_rename", STARTING, NOTSUP,
        (fd: u32, old: u32, old_len: u32, new_fd: u32, new: u32, new_len: u32));
    fixed!(l, module, "path_symlink", STARTING, NOTSUP, (old: u32, old_len: u32, fd: u32, new: u32, new_len: u32));
    fixed!(l, module, "path_unlink_file", STARTING, NOTSUP, (fd: u32, path: u32, len: u32));
    fixed!(l, module, "sock_accept", STARTING, NOTSUP, (fd: u32, flags: u32, ret: u32));
    fixed!(l, module, "sock_recv", STARTING, NOTSUP,
        (fd: u32, iovs: u32, count: u32, flags: u32, ret: u32, ret_flags: u32));
    fixed!(l, module, "sock_send", STARTING, NOTSUP, (fd: u32, iovs: u32, count: u32, flags: u32, ret: u32));
    fixed!(l, module, "sock_shutdown", STARTING, NOTSUP, (fd: u32, how: u32));
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
        return Ok(INVAL);
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
        return Ok(INVAL);
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

/// No event ever happens; Go's runtime asks all the same.
fn poll_oneoff(call: &mut Call<'_>, _input: u32, _output: u32, _count: u32, ret: u32) -> Errno {
    call.write_u32(ret, 0)?;
    Ok(SUCCESS)
}

/// Only the two outputs exist, with the right to write.
fn fd_fdstat_get(call: &mut Call<'_>, fd: u32, ret: u32) -> Errno {
    if !is_output(fd) {
        return Ok(BADF);
    }
    let mut stat = [0; 24];
    stat[8..16].copy_from_slice(&64u64.to_le_bytes());
    call.write(ret, &stat)?;
    Ok(SUCCESS)
}

fn fd_tell(call: &mut Call<'_>, fd: u32, ret: u32) -> Errno {
    if !is_output(fd) {
        return Ok(BADF);
    }
    call.write_u64(ret, 0)?;
    Ok(SUCCESS)
}

fn fd_renumber(_: &mut Call<'_>, from: u32, to: u32) -> Errno {
    Ok(if is_output(from) && is_output(to) { NOTSUP } else { BADF })
}

fn fd_readdir(call: &mut Call<'_>, _fd: u32, _buffer: u32, _len: u32, _cookie: u64, ret: u32) -> Errno {
    call.write_u32(ret, 0)?;
    Ok(NOTDIR)
}
