//! Counters that workers write without locks, and the Prometheus text that shows them.
//!
//! Every worker has counters of its own and is the only one to write them; the reader adds them up. A lock is taken
//! only when a counter is made (at start and reload) and when the text is written.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use portcullis_abi::{Metric, MetricKind, MetricValue};
use portcullis_code::Counts;

/// A number that one thread writes and any thread reads. A cache line of its own: workers never share one.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub(crate) fn increment(&self) {
        self.add(1);
    }

    /// Adds `amount`. Only the owning thread may call this: load and store are two steps, so that no locked
    /// instruction is needed.
    pub(crate) fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Takes one away (of a gauge), likewise.
    pub(crate) fn decrement(&self) {
        self.0.store(self.0.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
    }

    /// Replaces the value.
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value now.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    /// Series with the one label `le` are cumulative buckets, the one without a label is the sum in microseconds.
    Durations,
}

#[derive(Debug)]
struct Family {
    help: &'static str,
    kind: Kind,
    /// By labels as they are written, then by writer.
    series: BTreeMap<String, BTreeMap<usize, Arc<Counter>>>,
}

/// All counters of the process by name, labels and writer.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    families: Mutex<BTreeMap<&'static str, Family>>,
}

/// The number under which the control thread writes, beside the workers' 0, 1, 2...
pub(crate) const CONTROL: usize = usize::MAX;

impl Registry {
    /// The counter of `writer` with this name and these labels: the same one each time.
    pub(crate) fn counter(
        &self,
        writer: usize,
        name: &'static str,
        help: &'static str,
        labels: &[(&str, &str)],
    ) -> Arc<Counter> {
        self.series(writer, name, help, Kind::Counter, labels)
    }

    /// Likewise for a value that can go down.
    pub(crate) fn gauge(
        &self,
        writer: usize,
        name: &'static str,
        help: &'static str,
        labels: &[(&str, &str)],
    ) -> Arc<Counter> {
        self.series(writer, name, help, Kind::Gauge, labels)
    }

    fn series(
        &self,
        writer: usize,
        name: &'static str,
        help: &'static str,
        kind: Kind,
        labels: &[(&str, &str)],
    ) -> Arc<Counter> {
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let family = families.entry(name).or_insert_with(|| Family { help, kind, series: BTreeMap::new() });
        Arc::clone(family.series.entry(labels_text(labels)).or_default().entry(writer).or_default())
    }

    /// Appends everything in Prometheus' text format.
    pub(crate) fn write_text(&self, out: &mut String) {
        let families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, family) in families.iter() {
            let kind = match family.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Durations => "histogram",
            };
            let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
            let sum = |writers: &BTreeMap<usize, Arc<Counter>>| -> u64 {
                writers.values().map(|counter| counter.get()).fold(0, u64::wrapping_add)
            };
            if family.kind == Kind::Durations {
                write_durations(out, name, |labels| family.series.get(labels).map_or(0, sum));
                continue;
            }
            for (labels, writers) in &family.series {
                let _ = writeln!(out, "{name}{labels} {}", sum(writers));
            }
        }
    }
}

fn write_durations(out: &mut String, name: &str, value: impl Fn(&str) -> u64) {
    for le in DURATION_BOUNDS_US.iter().map(|(_, le)| *le).chain(["+Inf"]) {
        let labels = labels_text(&[("le", le)]);
        let _ = writeln!(out, "{name}_bucket{labels} {}", value(&labels));
    }
    let _ = writeln!(out, "{name}_sum {}", value("") as f64 / 1e6);
    let _ = writeln!(out, "{name}_count {}", value(&labels_text(&[("le", "+Inf")])));
}

fn labels_text(labels: &[(&str, &str)]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let labels: Vec<String> = labels.iter().map(|label| label_text(*label)).collect();
    format!("{{{}}}", labels.join(","))
}

fn label_text((name, value): (&str, &str)) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => escaped.push_str("\\\\"),
            '"' => escaped.push_str("\\\""),
            '\n' => escaped.push_str("\\n"),
            c => escaped.push(c),
        }
    }
    format!("{name}=\"{escaped}\"")
}

/// The parts of a metric's name that filters write as `.rule.<rule>` and `.reason.<reason>`, as labels; operators' metrics
/// have `.operator.<name>` besides.
const GUEST_LABELS: [&str; 3] = ["rule", "reason", "operator"];

/// Splits a guest's metric name into a Prometheus name and labels, the way the tag rules of our Envoy bootstraps do.
fn guest_name(name: &str) -> (String, Vec<(&'static str, &str)>) {
    let mut labels = Vec::new();
    let mut base = String::with_capacity(name.len());
    let mut parts = name.split('.');
    while let Some(part) = parts.next() {
        let label = GUEST_LABELS.iter().find(|label| **label == part && !base.is_empty());
        match label {
            Some(label) => match parts.next() {
                Some(value) => labels.push((*label, value)),
                None => push_part(&mut base, part),
            },
            None => push_part(&mut base, part),
        }
    }
    if base.is_empty() || base.starts_with(|c: char| c.is_ascii_digit()) {
        base.insert(0, '_');
    }
    (base, labels)
}

fn push_part(base: &mut String, part: &str) {
    if !base.is_empty() {
        base.push('_');
    }
    base.extend(part.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == ':' { c } else { '_' }));
}

/// Appends counters whose names hold labels as guests' do.
pub(crate) fn write_counters(counters: &[(String, u64)], out: &mut String) {
    let metrics: Vec<Metric> = counters
        .iter()
        .map(|(name, value)| Metric {
            name: name.clone(),
            kind: MetricKind::Counter,
            value: MetricValue::Number(*value),
        })
        .collect();
    write_guest_metrics(&metrics, out);
}

/// Counters whose names hold labels as [`crate::OperatorHost::metrics`] has them, in Prometheus' text format.
pub fn counters_text(counters: &[(String, u64)]) -> String {
    let mut text = String::new();
    write_counters(counters, &mut text);
    text
}

/// Appends the metrics that guests defined.
///
/// Names that fall together once they are made valid are added up for numbers.
pub(crate) fn write_guest_metrics(metrics: &[Metric], out: &mut String) {
    let mut families: BTreeMap<String, (&'static str, BTreeMap<String, i128>, String)> = BTreeMap::new();
    for metric in metrics {
        let (name, labels) = guest_name(&metric.name);
        let kind = match metric.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        let (_, numbers, histograms) =
            families.entry(name.clone()).or_insert_with(|| (kind, BTreeMap::new(), String::new()));
        match &metric.value {
            MetricValue::Number(value) => {
                *numbers.entry(labels_text(&labels)).or_default() += i128::from(*value);
            }
            MetricValue::Histogram { count, sum, buckets } => {
                for (bound, at_most) in buckets {
                    let bound = if *bound == u64::MAX { "+Inf".to_owned() } else { bound.to_string() };
                    let mut labels = labels.clone();
                    labels.push(("le", &bound));
                    let _ = writeln!(histograms, "{name}_bucket{} {at_most}", labels_text(&labels));
                }
                let labels = labels_text(&labels);
                let _ = writeln!(histograms, "{name}_sum{labels} {sum}\n{name}_count{labels} {count}");
            }
        }
    }
    for (name, (kind, numbers, histograms)) in families {
        let _ = writeln!(out, "# TYPE {name} {kind}");
        for (labels, value) in numbers {
            let _ = writeln!(out, "{name}{labels} {value}");
        }
        out.push_str(&histograms);
    }
}

/// Upper bounds of the duration histogram, in microseconds: a filter's work, a local upstream, a far one, a timeout.
const DURATION_BOUNDS_US: [(u64, &str); 12] = [
    (500, "0.0005"),
    (1_000, "0.001"),
    (2_500, "0.0025"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (25_000, "0.025"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (250_000, "0.25"),
    (1_000_000, "1"),
    (5_000_000, "5"),
    (15_000_000, "15"),
];

/// One worker's counters.
#[derive(Debug)]
pub(crate) struct WorkerMetrics {
    pub(crate) connections: Arc<Counter>,
    pub(crate) connections_active: Arc<Counter>,
    pub(crate) connections_refused: Arc<Counter>,
    pub(crate) tls_failures: Arc<Counter>,
    pub(crate) requests: Arc<Counter>,
    pub(crate) requests_active: Arc<Counter>,
    pub(crate) requests_malformed: Arc<Counter>,
    pub(crate) requests_abandoned: Arc<Counter>,
    pub(crate) streams_reset: Arc<Counter>,
    pub(crate) request_bytes: Arc<Counter>,
    pub(crate) response_bytes: Arc<Counter>,
    pub(crate) log_lines_dropped: Arc<Counter>,
    pub(crate) tcp: TcpMetrics,
    responses: [Arc<Counter>; 5],
    duration_buckets: Vec<Arc<Counter>>,
    duration_count: Arc<Counter>,
    duration_us: Arc<Counter>,
}

impl WorkerMetrics {
    pub(crate) fn new(registry: &Registry, worker: usize) -> WorkerMetrics {
        let counter = |name, help| registry.counter(worker, name, help, &[]);
        let gauge = |name, help| registry.gauge(worker, name, help, &[]);
        let class = |class| {
            registry.counter(
                worker,
                "portcullis_responses_total",
                "Responses, by class of status.",
                &[("class", class)],
            )
        };
        let durations = |labels: &[(&str, &str)]| {
            registry.series(
                worker,
                "portcullis_request_duration_seconds",
                "Time from a request's first byte to its response's last.",
                Kind::Durations,
                labels,
            )
        };
        WorkerMetrics {
            connections: counter("portcullis_connections_total", "Connections accepted."),
            connections_active: gauge("portcullis_connections_active", "Connections open now."),
            connections_refused: counter(
                "portcullis_connections_refused_total",
                "Connections closed at once because the listener's max_connections was reached.",
            ),
            tls_failures: counter(
                "portcullis_tls_handshake_failures_total",
                "TLS handshakes with clients that failed.",
            ),
            requests: counter("portcullis_requests_total", "Requests received."),
            requests_active: gauge("portcullis_requests_active", "Requests being worked on now."),
            requests_malformed: counter(
                "portcullis_requests_malformed_total",
                "Requests refused before any filter because they break HTTP or a limit on it.",
            ),
            requests_abandoned: counter(
                "portcullis_requests_abandoned_total",
                "Requests whose client went away before it had the whole response.",
            ),
            streams_reset: counter(
                "portcullis_streams_reset_total",
                "Requests ended without a whole response by the host, a filter or an upstream.",
            ),
            request_bytes: counter("portcullis_request_body_bytes_total", "Bytes of request bodies received."),
            response_bytes: counter("portcullis_response_body_bytes_total", "Bytes of response bodies sent."),
            log_lines_dropped: counter(
                "portcullis_access_log_lines_dropped_total",
                "Access log lines dropped because standard output did not keep up.",
            ),
            tcp: TcpMetrics::new(registry, worker),
            responses: [class("1xx"), class("2xx"), class("3xx"), class("4xx"), class("5xx")],
            duration_buckets: DURATION_BOUNDS_US.iter().map(|(_, le)| durations(&[("le", le)])).collect(),
            duration_count: durations(&[("le", "+Inf")]),
            duration_us: durations(&[]),
        }
    }

    pub(crate) fn response(&self, status: u16, duration: std::time::Duration) {
        if let Some(class) = (status / 100).checked_sub(1).and_then(|class| self.responses.get(usize::from(class))) {
            class.increment();
        }
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.duration_us.add(us);
        self.duration_count.increment();
        for ((bound, _), bucket) in DURATION_BOUNDS_US.iter().zip(&self.duration_buckets) {
            if us <= *bound {
                bucket.increment();
            }
        }
    }
}

/// Appends how modules were had: a start that compiles what an earlier one has compiled lacks its code cache.
pub(crate) fn write_module_metrics(counts: Counts, out: &mut String) {
    const NAME: &str = "portcullis_modules_loaded_total";
    let Counts { cached, compiled } = counts;
    let _ = writeln!(
        out,
        "# HELP {NAME} Filters' modules that were compiled, or found compiled.\n# TYPE {NAME} counter\n\
         {NAME}{{source=\"cache\"}} {cached}\n{NAME}{{source=\"compiler\"}} {compiled}"
    );
}

/// One worker's counters of TCP connections that are forwarded.
#[derive(Debug)]
pub(crate) struct TcpMetrics {
    connections: Arc<Counter>,
    active: Arc<Counter>,
    pub(crate) received: Arc<Counter>,
    pub(crate) sent: Arc<Counter>,
    closed: Vec<(&'static str, Arc<Counter>)>,
}

/// How a TCP connection can end.
const TCP_ENDS: [&str; 8] = ["finished", "client", "upstream", "unreachable", "filter", "filter_failed", "idle", "cut"];

impl TcpMetrics {
    fn new(registry: &Registry, worker: usize) -> TcpMetrics {
        let counter = |name, help| registry.counter(worker, name, help, &[]);
        let closed = |reason| {
            let help = "TCP connections that have ended, by reason.";
            let labels = [("reason", reason)];
            (reason, registry.counter(worker, "portcullis_tcp_connections_closed_total", help, &labels))
        };
        TcpMetrics {
            connections: counter("portcullis_tcp_connections_total", "TCP connections forwarded, or held by a filter."),
            active: registry.gauge(worker, "portcullis_tcp_connections_active", "TCP connections open now.", &[]),
            received: counter("portcullis_tcp_received_bytes_total", "Bytes received from clients of TCP listeners."),
            sent: counter("portcullis_tcp_sent_bytes_total", "Bytes sent to clients of TCP listeners."),
            closed: TCP_ENDS.map(closed).into(),
        }
    }

    pub(crate) fn begins(&self) {
        self.connections.increment();
        self.active.add(1);
    }

    pub(crate) fn ends(&self, reason: &'static str) {
        self.active.decrement();
        if let Some((_, counter)) = self.closed.iter().find(|(own, _)| *own == reason) {
            counter.increment();
        }
    }
}

/// Appends what the operating system knows of this process.
pub(crate) fn write_process_metrics(out: &mut String) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15 (utime, stime), 20 (threads), 22 (start) and 24 (pages), counted behind the command's name.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<u64>().ok());
    // USER_HZ is 100 on every architecture Linux runs Rust's std on.
    const TICKS_PER_SECOND: f64 = 100.0;
    let mut write = |name: &str, kind: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        }
    };
    let cpu = field(14).zip(field(15)).map(|(user, system)| (user + system) as f64 / TICKS_PER_SECOND);
    write("process_cpu_seconds_total", "counter", "CPU time used.", cpu);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident_kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    write("process_resident_memory_bytes", "gauge", "Resident memory.", resident_kib.map(|kib| kib * 1024.0));
    write("process_threads", "gauge", "Threads.", field(20).map(|threads| threads as f64));
    let open = std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as f64);
    write("process_open_fds", "gauge", "Open file descriptors.", open);
    let boot = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let boot = boot.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok());
    let start = boot.zip(field(22)).map(|(boot, ticks)| boot + ticks as f64 / TICKS_PER_SECOND);
    write("process_start_time_seconds", "gauge", "Start, in seconds since 1970.", start);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_name(name: &str, expected: &str) {
        let (base, labels) = guest_name(name);
        assert_eq!(format!("{base}{}", labels_text(&labels)), expected);
    }

    #[test]
    fn guest_names_split_into_labels() {
        check_name(
            "portcullis_jwt_auth_denied_total.rule.default.reason.credentials_rejected",
            r#"portcullis_jwt_auth_denied_total{rule="default",reason="credentials_rejected"}"#,
        );
        check_name("portcullis_jwt_auth_allowed_total.rule.a-b", r#"portcullis_jwt_auth_allowed_total{rule="a-b"}"#);
        check_name("plain", "plain");
        check_name("two.parts", "two_parts");
        check_name("ends.in.rule", "ends_in_rule");
        check_name("rule.first", "rule_first");
        check_name("9 lives\n\"}", "_9_lives___");
        check_name("", "_");
        check_name("x.rule.a\"b\\c\nd", "x{rule=\"a\\\"b\\\\c\\nd\"}");
    }

    #[test]
    fn sums_over_writers_and_finds_the_same_counter_again() {
        let registry = Registry::default();
        for writer in [0, 1, CONTROL] {
            registry.counter(writer, "a_total", "A.", &[("x", "1")]).add(2);
        }
        registry.counter(0, "a_total", "A.", &[("x", "1")]).increment();
        registry.counter(0, "a_total", "A.", &[("x", "2")]).increment();
        registry.gauge(0, "b", "B.", &[]).set(7);
        let mut text = String::new();
        registry.write_text(&mut text);
        assert_eq!(
            text,
            "# HELP a_total A.\n# TYPE a_total counter\na_total{x=\"1\"} 7\na_total{x=\"2\"} 1\n\
             # HELP b B.\n# TYPE b gauge\nb 7\n"
        );
    }

    #[test]
    fn process_metrics_are_there() {
        let mut text = String::new();
        write_process_metrics(&mut text);
        for name in
            ["process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_threads"]
        {
            assert!(text.contains(&format!("\n{name} ")), "{name} in\n{text}");
        }
    }
}
