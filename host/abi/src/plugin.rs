//! [`Plugin`]: a module with its configuration, its limits, and what happens when it fails.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::engine::Module;
use crate::fields::FieldMap;
use crate::shared::SharedLimits;

/// What happens to requests once a guest has trapped. Names and meaning are Envoy's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailurePolicy {
    /// The request is answered with 503, and so is every later one until a new VM stands, which is tried with the next
    /// request after a jittered back-off.
    #[default]
    Reload,
    /// The request and all later ones are answered with 503.
    Closed,
    /// The request is answered with 503; later ones pass without this plugin.
    Open,
}

/// Bounds on what one plugin's guest may use. Each default is argued in its own line.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of linear memory of one VM. Default 64 MiB: SDK guests start with 1 to 2 MiB, Go guests with up to 10.
    pub memory_bytes_max: usize,
    /// CPU time of one callback; it ends within three [`crate::EPOCH`]s after, given a CPU. Default 100 ms: a worker serves
    /// nobody else meanwhile. Time in which the machine runs something else does not count.
    pub callback_time_max: Duration,
    /// CPU time to start: `_initialize`, `main`, `proxy_on_vm_start` and `proxy_on_configure` together. Default 2 s: Go guests start
    /// their runtime in it and filters compile their rules, while the worker serves nobody else.
    pub start_time_max: Duration,
    /// Callouts under way at a time. Default 64: each holds a connection and a buffer.
    pub calls_max: usize,
    /// Bytes of one callout's body. Default 1 MiB.
    pub call_bytes_max: usize,
    /// Log lines per second, after which lines are dropped and counted. Default 1,000.
    pub log_lines_per_second: u32,
    /// Bytes of one log line; the rest is cut off. Default 16 KiB.
    pub log_line_bytes_max: usize,
    /// Lines of one map after a guest's additions. Default 1,024, Envoy's bound on maps from guests.
    pub map_lines_max: usize,
    /// Bytes of one map after a guest's additions. Default 1 MiB, likewise.
    pub map_bytes_max: usize,
    /// Bytes of one buffer after a guest's edits. Default 16 MiB.
    pub buffer_bytes_max: usize,
    /// Values that a guest has stored with one stream. Default 1,024.
    pub properties_max: usize,
    /// Metrics that one plugin may define. Default 4,096: a name per rule and reason stays far below, a name per client
    /// does not, and must not.
    pub metrics_max: usize,
    /// What it may keep for others, together with all of its `vm_id`.
    pub shared: SharedLimits,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            memory_bytes_max: 64 * 1024 * 1024,
            callback_time_max: Duration::from_millis(100),
            start_time_max: Duration::from_secs(2),
            calls_max: 64,
            call_bytes_max: 1024 * 1024,
            log_lines_per_second: 1_000,
            log_line_bytes_max: 16 * 1024,
            map_lines_max: 1_024,
            map_bytes_max: 1024 * 1024,
            buffer_bytes_max: 16 * 1024 * 1024,
            properties_max: 1_024,
            metrics_max: 4_096,
            shared: SharedLimits::default(),
        }
    }
}

impl Limits {
    /// Whether a map of a guest's may be as large as this.
    pub(crate) fn allow_map(&self, fields: &FieldMap) -> bool {
        fields.len() <= self.map_lines_max && fields.byte_size() <= self.map_bytes_max
    }
}

/// What a plugin may use at all. Whatever is `None` is not restricted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Host functions and WASI functions that it may call, by name. A blocked host function answers `InternalFailure`, a
    /// blocked WASI function 76 (`ENOTCAPABLE`); both are logged, as in Envoy.
    pub functions: Option<BTreeSet<String>>,
    /// Callbacks that are delivered, by name. Envoy has one list for these and for functions.
    pub callbacks: Option<BTreeSet<String>>,
    /// Foreign functions that it may call, by name. Another one answers `InternalFailure`.
    pub foreign_functions: Option<BTreeSet<String>>,
    /// Upstreams that callouts may go to. A callout elsewhere answers `BadArgument`, as an unknown upstream does.
    pub upstreams: Option<BTreeSet<String>>,
    /// Fields and trailers of requests and responses that it may add, change or remove; without regard to case. A change
    /// of others answers `InternalFailure` and changes nothing; a local response goes without them.
    pub fields: Option<Vec<NamePattern>>,
    /// Properties and filter state that it may store or declare. Others answer `InternalFailure`.
    pub properties: Option<Vec<NamePattern>>,
}

/// A name, or what names begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamePattern {
    /// This name.
    Exact(String),
    /// Every name that begins so.
    Prefix(String),
}

impl NamePattern {
    fn matches(&self, name: &[u8], equal: impl Fn(&[u8], &[u8]) -> bool) -> bool {
        match self {
            NamePattern::Exact(exact) => equal(name, exact.as_bytes()),
            NamePattern::Prefix(prefix) => {
                name.get(..prefix.len()).is_some_and(|start| equal(start, prefix.as_bytes()))
            }
        }
    }
}

impl Capabilities {
    /// Whether this field may be changed. `host` is another name of `:authority`.
    pub(crate) fn allows_field(&self, name: &[u8]) -> bool {
        let is_authority = [&b"host"[..], b":authority"].iter().any(|known| name.eq_ignore_ascii_case(known));
        self.fields.as_ref().is_none_or(|patterns| {
            let allows =
                |name: &[u8]| patterns.iter().any(|pattern| pattern.matches(name, <[u8]>::eq_ignore_ascii_case));
            if is_authority { allows(b"host") || allows(b":authority") } else { allows(name) }
        })
    }

    /// Whether this property may be stored.
    pub(crate) fn allows_property(&self, name: &[u8]) -> bool {
        let matches = |pattern: &NamePattern| pattern.matches(name, |a, b| a == b);
        self.properties.as_ref().is_none_or(|patterns| patterns.iter().any(matches))
    }
}

/// A module together with all that makes it a plugin of a chain. Made once, shared by all workers.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// Name in logs, errors and the property `plugin_name`.
    pub name: String,
    /// Selects the root context inside a module that has several.
    pub root_id: String,
    /// Plugins with the same `vm_id`, VM configuration and module share a VM on each worker.
    pub vm_id: String,
    /// Bytes that `proxy_on_vm_start` finds.
    pub vm_configuration: Vec<u8>,
    /// Bytes that `proxy_on_configure` finds.
    pub configuration: Vec<u8>,
    /// Environment variables that the guest sees; no others.
    pub environment: Vec<(String, String)>,
    /// The compiled code.
    pub module: Module,
    /// Bounds on what it uses.
    pub limits: Limits,
    /// What happens after a trap.
    pub failure_policy: FailurePolicy,
    /// Longest time between a trap and the first try at a new VM; the shortest is half of it. Default 1 s, as in Envoy. It doubles
    /// while new VMs do not come up, or crash within `reload_backoff_max`.
    pub reload_backoff: Duration,
    /// What it doubles up to. Default 10 s: an outage should not outlast its cause by more.
    pub reload_backoff_max: Duration,
    /// What the answer `StopIteration` to a headers callback means: `true`, body callbacks go on while the headers
    /// are held; `false`, nothing more is delivered until the guest resumes. Default `true`: a filter that looks at
    /// bodies can then deny before the upstream has seen anything.
    pub allow_on_headers_stop_iteration: bool,
    /// What it may use.
    pub capabilities: Capabilities,
}

impl Plugin {
    /// A plugin with default settings and no configuration.
    pub fn new(name: impl Into<String>, module: Module) -> Plugin {
        Plugin {
            name: name.into(),
            root_id: String::new(),
            vm_id: String::new(),
            vm_configuration: Vec::new(),
            configuration: Vec::new(),
            environment: Vec::new(),
            module,
            limits: Limits::default(),
            failure_policy: FailurePolicy::default(),
            reload_backoff: Duration::from_secs(1),
            reload_backoff_max: Duration::from_secs(10),
            allow_on_headers_stop_iteration: true,
            capabilities: Capabilities::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(written: &[&str]) -> Option<Vec<NamePattern>> {
        let pattern = |text: &&str| match text.strip_suffix('*') {
            Some(prefix) => NamePattern::Prefix(prefix.into()),
            None => NamePattern::Exact((*text).into()),
        };
        Some(written.iter().map(pattern).collect())
    }

    #[test]
    fn fields_are_allowed_by_name_or_by_what_they_begin_with() {
        let check = |written: &[&str], name: &str, allowed: bool| {
            let capabilities = Capabilities { fields: patterns(written), ..Capabilities::default() };
            assert_eq!(capabilities.allows_field(name.as_bytes()), allowed, "{written:?} {name}");
        };
        check(&["x-a"], "X-A", true);
        check(&["x-a"], "x-ab", false);
        check(&["x-*"], "X-Any", true);
        check(&["x-*"], "x-", true);
        check(&["x-*"], "x", false);
        check(&["*"], ":path", true);
        check(&[], "x-a", false);
        for authority in ["host", ":authority", "Host"] {
            check(&["host"], authority, true);
            check(&[":authority"], authority, true);
            check(&["x-*"], authority, false);
        }
        assert!(Capabilities::default().allows_field(b"x-a"), "without a list all are");
    }

    #[test]
    fn properties_are_allowed_letter_by_letter() {
        let capabilities = Capabilities { properties: patterns(&["mine.*", "one"]), ..Capabilities::default() };
        for (name, allowed) in [("mine.a", true), ("Mine.a", false), ("one", true), ("one.more", false), ("", false)] {
            assert_eq!(capabilities.allows_property(name.as_bytes()), allowed, "{name}");
        }
    }
}
