//! Shared data, queues and metrics.

use super::{Answer, Call};
use crate::abi::Status;
use crate::shared::{MetricKind, NAME_BYTES_MAX, Owner};

pub(super) fn get_data(call: &mut Call<'_>, key: u32, key_len: u32, ret: u32, ret_len: u32, ret_cas: u32) -> Answer {
    let key = call.bytes(key, key_len)?;
    let state = call.state();
    let Some((value, cas)) = state.shared.get_data(&state.plugin.vm_id, key) else {
        return Ok(Status::NotFound);
    };
    call.give(&value, ret, ret_len)?;
    call.write_u32(ret_cas, cas)?;
    Ok(Status::Ok)
}

pub(super) fn set_data(call: &mut Call<'_>, key: u32, key_len: u32, value: u32, value_len: u32, cas: u32) -> Answer {
    let key = call.bytes(key, key_len)?;
    let value = call.bytes(value, value_len)?;
    let state = call.state();
    let status = state.shared.set_data(&state.plugin.vm_id, key, value, cas);
    if status == Status::InternalFailure {
        return Ok(call.because("shared data is full: use a fixed number of keys", status));
    }
    Ok(status)
}

pub(super) fn register_queue(call: &mut Call<'_>, name: u32, len: u32, ret: u32) -> Answer {
    let state = call.state();
    let Some(context) = state.effective_root() else {
        return Ok(Status::NotFound);
    };
    let owner = Owner { worker: state.worker, vm: state.id, context };
    let id = state.shared.register_queue(&state.plugin.vm_id, call.bytes(name, len)?, owner);
    let Some(id) = id else {
        let reason = "the process has as many queues as allowed, or the name is too long";
        return Ok(call.because(reason, Status::InternalFailure));
    };
    call.write_u32(ret, id)?;
    Ok(Status::Ok)
}

pub(super) fn resolve_queue(call: &mut Call<'_>, vm_id: u32, vm_id_len: u32, name: u32, len: u32, ret: u32) -> Answer {
    let vm_id = call.bytes(vm_id, vm_id_len)?;
    let name = call.bytes(name, len)?;
    let state = call.state();
    // No vm_id is the guest's own; one that is not UTF-8 is nobody's.
    let vm_id = if vm_id.is_empty() { Ok(state.plugin.vm_id.as_str()) } else { std::str::from_utf8(vm_id) };
    match vm_id.ok().and_then(|vm_id| state.shared.resolve_queue(vm_id, name)) {
        Some(id) => {
            call.write_u32(ret, id)?;
            Ok(Status::Ok)
        }
        None => Ok(Status::NotFound),
    }
}

pub(super) fn enqueue(call: &mut Call<'_>, id: u32, value: u32, len: u32) -> Answer {
    let value = call.bytes(value, len)?;
    let status = call.state().shared.enqueue(id, value);
    if status == Status::InternalFailure {
        return Ok(call.because("the queue is full, or the item too large", status));
    }
    Ok(status)
}

pub(super) fn dequeue(call: &mut Call<'_>, id: u32, ret: u32, ret_len: u32) -> Answer {
    let item = call.state().shared.dequeue(id);
    match item {
        Ok(item) => {
            call.give(&item, ret, ret_len)?;
            Ok(Status::Ok)
        }
        Err(status) => Ok(status),
    }
}

pub(super) fn define_metric(call: &mut Call<'_>, kind: u32, name: u32, len: u32, ret: u32) -> Answer {
    let kind = match kind {
        0 => MetricKind::Counter,
        1 => MetricKind::Gauge,
        2 => MetricKind::Histogram,
        _ => return Ok(call.because("kinds are 0 counter, 1 gauge, 2 histogram", Status::BadArgument)),
    };
    let state = call.state();
    let plugin = state.current_plugin();
    let most = plugin.limits.metrics_max;
    let name = call.bytes(name, len)?;
    let cell = if name.len() > NAME_BYTES_MAX || state.metrics.by_id.len() >= most {
        None
    } else {
        state.shared.define_metric(&plugin.name, most, kind, &String::from_utf8_lossy(name))
    };
    let Some(cell) = cell else {
        let reason = "the plugin has as many metrics as allowed, or the name is too long";
        return Ok(call.because(reason, Status::InternalFailure));
    };
    let state = call.state_mut();
    // Low bits of an id say the kind: 4, 8.. counters; 5, 9.. gauges; 6, 10.. histograms.
    let next = &mut state.metrics.next[kind as usize];
    *next += 1;
    let id = (*next << 2) | kind as u32;
    state.metrics.by_id.insert(id, cell);
    call.write_u32(ret, id)?;
    Ok(Status::Ok)
}

/// Whether an id is of a counter or a gauge, by its low bits; Envoy looks at them first.
fn is_number(id: u32) -> bool {
    id & 3 < 2
}

pub(super) fn increment_metric(call: &mut Call<'_>, id: u32, offset: i64) -> Answer {
    if !is_number(id) {
        return Ok(Status::BadArgument);
    }
    Ok(call.state().metrics.by_id.get(&id).map_or(Status::NotFound, |cell| cell.increment(offset)))
}

pub(super) fn record_metric(call: &mut Call<'_>, id: u32, value: u64) -> Answer {
    Ok(call.state().metrics.by_id.get(&id).map_or(Status::NotFound, |cell| {
        cell.record(value);
        Status::Ok
    }))
}

pub(super) fn get_metric(call: &mut Call<'_>, id: u32, ret: u32) -> Answer {
    if !is_number(id) {
        return Ok(Status::BadArgument);
    }
    let Some(cell) = call.state().metrics.by_id.get(&id) else {
        return Ok(Status::NotFound);
    };
    match cell.number() {
        Some(number) => {
            call.write_u64(ret, number)?;
            Ok(Status::Ok)
        }
        None => Ok(Status::BadArgument),
    }
}
