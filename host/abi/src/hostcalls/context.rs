//! Log, time, contexts, properties.

use std::time::Duration;

use super::{Answer, Call};
use crate::abi::{LogLevel, Status};
use crate::plugin::Limits;
use crate::property::Attributes;
use crate::state::{FilterState, Refused};
use crate::vm::{Doing, VmState};

pub(super) fn log(call: &mut Call<'_>, level: u32, message: u32, len: u32) -> Answer {
    let Some(level) = LogLevel::from_u32(level) else {
        return Ok(call.because("levels go from 0 to 5", Status::BadArgument));
    };
    if level < call.state().embedder.borrow().log_level() {
        return Ok(Status::Ok);
    }
    let most = call.state().plugin.limits.log_line_bytes_max;
    let message = call.bytes(message, len)?;
    let message = message[..message.len().min(most)].to_vec();
    call.state_mut().log(level, &message);
    Ok(Status::Ok)
}

pub(super) fn get_log_level(call: &mut Call<'_>, ret: u32) -> Answer {
    let level = call.state().embedder.borrow().log_level();
    call.write_u32(ret, level as u32)?;
    Ok(Status::Ok)
}

pub(super) fn get_time(call: &mut Call<'_>, ret: u32) -> Answer {
    let now = call.state().embedder.borrow().unix_nanos();
    call.write_u64(ret, now)?;
    Ok(Status::Ok)
}

/// The period is the root context's, also when a stream's callback sets it.
pub(super) fn set_tick_period(call: &mut Call<'_>, milliseconds: u32) -> Answer {
    let state = call.state_mut();
    let now = state.embedder.borrow().monotonic();
    if let Some(root) = state.effective_root().and_then(|root| state.roots.get_mut(&root)) {
        let period = (milliseconds > 0).then(|| Duration::from_millis(u64::from(milliseconds)));
        root.tick_period = period;
        root.next_tick = period.map(|period| now + period);
    }
    Ok(Status::Ok)
}

pub(super) fn set_effective_context(call: &mut Call<'_>, id: u32) -> Answer {
    let state = call.state_mut();
    // Context 0 is the VM's own in Envoy: it exists, and nothing belongs to it.
    if id != 0 && state.root_id_of(id).is_none() {
        return Ok(Status::BadArgument);
    }
    state.effective = id;
    Ok(Status::Ok)
}

pub(super) fn done(call: &mut Call<'_>) -> Answer {
    let state = call.state_mut();
    let effective = state.effective_root();
    let root = effective.and_then(|id| Some((id, state.roots.get_mut(&id)?)));
    match root {
        Some((id, root)) if root.done_pending => {
            root.done_pending = false;
            state.done.push(id);
            Ok(Status::Ok)
        }
        _ => Ok(call.because("nothing waits for it: `proxy_on_done` has not answered no", Status::NotFound)),
    }
}

pub(super) fn get_property(call: &mut Call<'_>, path: u32, len: u32, ret: u32, ret_len: u32) -> Answer {
    if len == 0 {
        return Ok(Status::SerializationFailure);
    }
    call.give_filled(ret, ret_len, |call, out| {
        let path = call.bytes(path, len)?;
        let state = call.state();
        let plugin = state.current_plugin();
        Ok(match state.effective_stream() {
            None => Attributes { plugin, stream: None }.get(path, out),
            Some(context) => {
                let exchange = context.exchange.borrow();
                Attributes { plugin, stream: Some((&exchange, context.stage)) }.get(path, out)
            }
        })
    })
}

pub(super) fn set_property(call: &mut Call<'_>, path: u32, len: u32, value: u32, value_len: u32) -> Answer {
    let path = call.bytes(path, len)?;
    let value = call.bytes(value, value_len)?;
    let state = call.state();
    if !state.current_plugin().capabilities.allows_property(path) {
        let path = path.to_vec();
        return Ok(call.blocked(&path, SETTABLE_PROPERTIES));
    }
    let declared = state.effective_root().and_then(|root| state.roots.get(&root)).map(|root| root.declared.of(path));
    let set = with_filter_state(state, |filter_state, limits| {
        filter_state.set_property(&[b"wasm.", path].concat(), value, declared.unwrap_or_default(), limits)
    });
    Ok(stored(call, set))
}

pub(super) const SETTABLE_PROPERTIES: &str = "settable_properties";

/// Lets the stream's filter state be changed; a root context has none.
pub(super) fn with_filter_state(
    state: &VmState,
    change: impl FnOnce(&mut FilterState, &Limits) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let Some(context) = state.effective_stream() else {
        let reason = "a root context has no stream to keep it with";
        return Err(Refused { status: Status::NotFound, reason: reason.into() });
    };
    change(&mut context.exchange.borrow_mut().filter_state, &state.plugin.limits)
}

pub(super) fn stored(call: &mut Call<'_>, set: Result<(), Refused>) -> Status {
    match set {
        Ok(()) => Status::Ok,
        Err(refused) => call.because(refused.reason, refused.status),
    }
}

pub(super) fn get_configuration(call: &mut Call<'_>, ret: u32, ret_len: u32) -> Answer {
    call.give_filled(ret, ret_len, |call, out| {
        let state = call.state();
        out.extend_from_slice(match state.callback.doing {
            Doing::Configuring => &state.current_plugin().configuration,
            // Outside `proxy_on_configure` it is the VM's.
            _ => &state.plugin.vm_configuration,
        });
        Ok(Status::Ok)
    })
}
