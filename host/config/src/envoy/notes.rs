//! What a policy asks for and Envoy does not do, in words.

use super::listeners::buffer_limit;
use crate::file::{FailurePolicy, FilterLimits};
use crate::policy::{Filter, Policy};
use crate::units::Size;

pub(super) fn policy_notes(policy: &Policy) -> Vec<String> {
    let mut notes: Vec<String> = policy.filters.iter().flat_map(|filter| filter_notes(policy, filter)).collect();
    let buffers: Vec<Size> = policy.filters.iter().map(|filter| filter.limits.buffered_bytes).collect();
    if buffers.iter().any(|size| Some(size) != buffers.first()) {
        notes.push(format!(
            "`limits.buffered_bytes` differs between filters; Envoy has one buffer limit, the largest: {}",
            buffer_limit(policy)
        ));
    }
    for upstream in &policy.upstreams {
        notes.push(format!(
            "upstream `{}`: Envoy counts `max_connections` over all workers, and lets 1024 requests wait for a connection instead of answering 503",
            upstream.name
        ));
    }
    if !policy.operators.is_empty() {
        notes.push("operators run outside Envoy: start `portcullis operators run`, which enforces their permissions and limits".to_owned());
    }
    notes
}

/// What Envoy does not enforce for one filter.
pub(super) fn filter_notes(policy: &Policy, filter: &Filter) -> Vec<String> {
    let name = &filter.name;
    let limits = &filter.limits;
    let default = FilterLimits::default();
    let mut notes = vec![
        format!(
            "filter `{name}`: no CPU limit, so `limits.callback_time` ({}) is not enforced and an endless loop stops a worker",
            limits.callback_time
        ),
        format!("filter `{name}`: memory is capped at 1GiB per VM, not at `limits.memory` ({})", limits.memory),
        format!(
            "filter `{name}`: no limits on callouts ({}), log lines ({}/s), shared data ({} keys, {}), queues ({}) and metrics ({})",
            limits.callouts,
            limits.log_lines_per_second,
            limits.shared_data_entries,
            limits.shared_data_bytes,
            limits.queue_length,
            limits.metrics
        ),
    ];
    if limits.map_bytes != default.map_bytes || limits.map_pairs != default.map_pairs {
        notes.push(format!(
            "filter `{name}`: header maps are limited to {} and {} pairs, not to {} and {}",
            default.map_bytes, default.map_pairs, limits.map_bytes, limits.map_pairs
        ));
    }
    let allowed: Vec<&str> = filter
        .allowed_upstreams
        .iter()
        .filter_map(|index| policy.upstreams.get(*index))
        .map(|upstream| upstream.name.as_str())
        .collect();
    let allowed = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
    notes.push(format!("filter `{name}`: it can call every cluster; `allowed_upstreams` ({allowed}) is not enforced"));
    if filter.settable_fields.is_some() {
        notes.push(format!("filter `{name}`: it can write every field; `settable_fields` is not enforced"));
    }
    if filter.settable_properties.is_some() {
        notes.push(format!("filter `{name}`: it can store every property; `settable_properties` is not enforced"));
    }
    if filter.foreign_functions.is_some() {
        notes.push(format!("filter `{name}`: it can call every foreign function; `foreign_functions` is not enforced"));
    }
    if filter.failure_policy == FailurePolicy::FailOpen {
        notes.push(format!("filter `{name}`: after a crash, requests pass WITHOUT it (`failure_policy: fail_open`)"));
    }
    notes
}
