//! What a policy asks for and Envoy does not do, in words.

use super::listeners::buffer_limit;
use crate::file::{FailurePolicy, FilterLimits, Protocol};
use crate::policy::{Filter, Policy, Service, TcpForward};

pub(super) fn policy_notes(policy: &Policy) -> Vec<String> {
    let mut notes: Vec<String> = policy.filters.iter().flat_map(|filter| filter_notes(policy, filter)).collect();
    let http_filters: Vec<&Filter> = policy.filters_of(Protocol::Http).map(|(_, filter)| filter).collect();
    if !same_buffers(&http_filters) {
        notes.push(format!(
            "`limits.buffered_bytes` differs between filters; Envoy has one buffer limit, the largest: {}",
            buffer_limit(http_filters.into_iter())
        ));
    }
    for listener in &policy.listeners {
        if let Service::Tcp(forward) = &listener.service {
            notes.extend(tcp_notes(policy, &listener.name, forward));
        }
    }
    for upstream in &policy.upstreams {
        let (waiting, instead) =
            if upstream.tcp { ("TCP connections", "closing them") } else { ("requests", "answering 503") };
        notes.push(format!(
            "upstream `{}`: Envoy counts `max_connections` over all workers, and lets 1024 {waiting} wait for a connection instead of {instead}",
            upstream.name
        ));
    }
    if !policy.operators.is_empty() {
        notes.push("operators run outside Envoy: start `portcullis operators run`, which enforces their permissions and limits".to_owned());
    }
    notes
}

fn same_buffers(filters: &[&Filter]) -> bool {
    let mut sizes = filters.iter().map(|filter| filter.limits.buffered_bytes);
    let first = sizes.next();
    sizes.all(|size| Some(size) == first)
}

/// What Envoy does otherwise with the TCP connections of one listener.
fn tcp_notes(policy: &Policy, listener: &str, forward: &TcpForward) -> Vec<String> {
    let filters: Vec<&Filter> = forward.filters.iter().filter_map(|index| policy.filters.get(*index)).collect();
    if filters.is_empty() {
        return Vec::new();
    }
    let mut notes = vec![format!(
        "listener `{listener}`: `limits.idle_timeout` counts from when the upstream is connected; a filter that holds a new connection holds it without end"
    )];
    if filters.len() > 1 {
        notes.push(format!(
            "listener `{listener}`: a filter that resumes a connection also resumes what the filters before it hold, and a new connection that one behind it holds"
        ));
    }
    if !same_buffers(&filters) {
        notes.push(format!(
            "listener `{listener}`: `limits.buffered_bytes` differs between its filters; Envoy has one buffer limit, the largest: {}",
            buffer_limit(filters.into_iter())
        ));
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
        let what = if filter.protocol == Protocol::Tcp { "TCP connections" } else { "requests" };
        notes.push(format!("filter `{name}`: after a crash, {what} pass WITHOUT it (`failure_policy: fail_open`)"));
    }
    notes
}
