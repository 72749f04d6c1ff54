//! `portcullis.yaml` as it is written. [`crate::compile`] turns it into a [`crate::Policy`], which is what runs.
//!
//! The doc comments here are the reference: `docs/portcullis.schema.json` and `docs/reference/portcullis-yaml.md`
//! are made from them, so each says what a setting means, what its absence does and how it is written.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{Size, Time};

/// The whole policy file.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "portcullis.yaml")]
pub struct Config {
    /// The format of this file. Always `1`.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// Where health, readiness, metrics and the running configuration are served. Absent: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<Admin>,
    /// Worker threads. Each has its own sockets, event loop and filter VMs. Absent: one per CPU. Example: `2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub workers: Option<u32>,
    /// Networks of the proxies in front of this one. The client's address is the rightmost entry of
    /// `x-forwarded-for` that is not in one of them, and only looked for when the connection itself comes from
    /// one. Absent: the header is not believed. Example: `["10.0.0.0/8"]`.
    #[serde(default)]
    pub trusted_proxies: Vec<String>,
    /// What is logged, and how.
    #[serde(default)]
    pub logging: Logging,
    /// Where compiled filters are kept between starts.
    #[serde(default)]
    pub code_cache: CodeCache,
    /// The pool of machines that this one belongs to. An operator with another `placement.pool` is not started
    /// here, and a route to it is answered with 503. Absent: only operators without a pool run here. Example:
    /// `acme`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The addresses that clients connect to. At least one, at most 64.
    #[schemars(length(min = 1, max = 64))]
    pub listeners: Vec<Listener>,
    /// The filters, in the order in which a request, or a TCP client's bytes, pass them; what comes back passes
    /// them in the reverse order. At most 64.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub filters: Vec<Filter>,
    /// The servers behind the proxy, by name. Filters' callouts use the same names. At most 1000.
    #[serde(default)]
    pub upstreams: BTreeMap<String, Upstream>,
    /// How this machine runs operators.
    #[serde(default)]
    pub operator_host: OperatorHost,
    /// API handlers in JavaScript or TypeScript, by name, each in a locked process of its own. At most
    /// 1000.
    #[serde(default)]
    pub operators: BTreeMap<String, Operator>,
    /// What happens to which request. The first route that matches wins; a request that none matches is answered
    /// with 404 and meets no filter. At least one, unless every listener has `tcp`; at most 2000.
    #[serde(default)]
    #[schemars(length(max = 2000))]
    pub routes: Vec<Route>,
}

/// The administrative endpoints: `/healthz`, `/readyz`, `/metrics`, `/config`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// IP address and port. It must be a loopback address: the endpoints have no authentication, and Envoy's
    /// can change its state. Example: `127.0.0.1:9901`.
    pub address: String,
    /// Allows an `address` that other machines can reach. Set it only where a firewall or a network namespace
    /// keeps them away. Default `false`.
    #[serde(default)]
    pub dangerously_allow_remote: bool,
}

/// Logs go to standard error, access logs to standard output.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Logging {
    /// `json` is one object per line, `text` is for people. Default `text`.
    pub format: LogFormat,
    /// The least severe level that is logged. Filters' messages keep their own level. Default `info`.
    pub level: LogLevel,
    /// One line per request: method, path without query, status, sizes, duration, route, reason of a denial; and
    /// one per TCP connection. Never credentials, cookies or bodies. Default `true`.
    pub access_log: bool,
}

impl Default for Logging {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: LogLevel::Info, access_log: true }
    }
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Severity, from everything to least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names are the levels")]
pub enum LogLevel {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

/// Compiled filters on disk, so that a start does not compile again what an earlier one has compiled. Only what this
/// program wrote itself is loaded: entries carry a seal made with a key in the same folder. A folder that is not its
/// user's alone is not used. Envoy has nothing like it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CodeCache {
    /// `false`: every start compiles every filter. Default `true`.
    pub enabled: bool,
    /// The folder; it is made if it is not there, and nothing else should be in it. The option `--cache-dir` and the
    /// variable `PORTCULLIS_CACHE_DIR` go before it. Absent: `code` in the folder that systemd made for the service
    /// (`CacheDirectory=`), or in `portcullis` in the user's own cache folder; if there is none, nothing is kept.
    /// Example: `/var/cache/portcullis/code`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Bytes of all compiled filters; those unused the longest go first. Default `512MiB`: compiled code is a few
    /// times as large as its module, and real modules have up to 4 MiB.
    pub max_bytes: Size,
    /// Number of compiled filters. Default `256`: a policy has at most 64, and a few versions of each may be kept.
    #[schemars(range(min = 1, max = 10000))]
    pub max_entries: u32,
    /// How long one that no start has wanted is kept. Default `90d`.
    pub max_unused: Time,
}

impl Default for CodeCache {
    fn default() -> Self {
        Self {
            enabled: true,
            directory: None,
            max_bytes: Size::mib(512),
            max_entries: 256,
            max_unused: Time::secs(90 * 86_400),
        }
    }
}

/// An address that clients connect to.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// A name for logs and metrics: lower-case letters, digits, `-` and `_`. Example: `public`.
    #[schemars(regex(pattern = "^[a-z0-9][a-z0-9_-]{0,63}$"))]
    pub name: String,
    /// IP address and port; port 0 lets the system choose. Example: `0.0.0.0:8443`, `[::]:8443`.
    pub address: String,
    /// Speaks TLS with clients: HTTPS, or TLS before the bytes that `tcp` forwards. Absent: neither.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,
    /// Forwards TCP connections, whatever is spoken on them, instead of serving HTTP. Absent: HTTP, by `routes`.
    /// Example: `{ upstream: postgres, filters: [db-guard] }`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpForward>,
    /// What one client may take.
    #[serde(default)]
    pub limits: ListenerLimits,
}

/// Where TCP connections go.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TcpForward {
    /// Forwards each connection to an endpoint of this upstream, in turn. It is connected when every filter has
    /// let the new connection pass, and the client is read from then on. Example: `postgres`.
    pub upstream: String,
    /// The filters with `protocol: tcp` that connections pass, always in the order of the `filters` section.
    /// Absent: all of them. `[]`: none. Example: `[db-guard]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filters: Option<Vec<String>>,
}

/// TLS 1.2 and 1.3 towards clients.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListenerTls {
    /// PEM file: the server's certificate, then the intermediates. Example: `tls/server.pem`.
    pub certificate: String,
    /// PEM file: the certificate's private key. Example: `tls/server.key`.
    pub private_key: String,
}

/// What one client may take from a listener. With `tcp`, only `idle_timeout`, `max_connections` and,
/// with `tls`, `header_timeout` can be set.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ListenerLimits {
    /// Request line and fields together; more is answered with 431. A whole number of KiB, at most `8MiB`.
    /// Default `32KiB`: room for a token of 16 KiB, the largest that our filters take, and as much again for
    /// cookies and the rest.
    pub header_bytes: Size,
    /// Number of request fields; more is answered with 431. Default `100`, the number browsers and proxies
    /// stay far below, and Envoy's own.
    #[schemars(range(min = 1, max = 1000))]
    pub header_count: u32,
    /// Time for a request's fields to arrive completely, and for a TLS handshake. Default `10s`: a client that takes
    /// longer is holding connections open on purpose.
    pub header_timeout: Time,
    /// Time for a whole request, body included, to arrive. Default `5m`: an upload of 1 GiB at 30 Mbit/s.
    pub request_timeout: Time,
    /// Time a connection without a request in flight is kept; with `tcp`, one on which no byte moves. Absent:
    /// `1m`, longer than clients pause between requests, shorter than what load balancers in front assume (they
    /// must be the ones to close); with `tcp`, `1h`, Envoy's, since pools keep unused connections to databases.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Time>,
    /// Time in which nothing of a request or its response moves, whoever is to blame: a filter that paused it, a server,
    /// or a client that takes nothing; then 504, or the connection is closed. Default `5m`, Envoy's.
    pub stream_idle_timeout: Time,
    /// Connections at a time; further ones are closed at once. Default `10000`: their fields take 313 MiB at
    /// the most with the default `header_bytes`.
    #[schemars(range(min = 1))]
    pub max_connections: u32,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        Self {
            header_bytes: Size::kib(32),
            header_count: 100,
            header_timeout: Time::secs(10),
            request_timeout: Time::secs(300),
            idle_timeout: None,
            stream_idle_timeout: Time::secs(300),
            max_connections: 10_000,
        }
    }
}

/// A Proxy-Wasm module with its configuration.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// A name for routes, logs and metrics: lower-case letters, digits, `-` and `_`. Example: `jwt`.
    #[schemars(regex(pattern = "^[a-z0-9][a-z0-9_-]{0,63}$"))]
    pub name: String,
    /// The module's file. Example: `filters/jwt-auth.wasm`.
    pub wasm: String,
    /// What the filter looks at: requests, which `routes` bring to it, or TCP connections, which listeners with
    /// `tcp` do. Default `http`.
    #[serde(default)]
    pub protocol: Protocol,
    /// The filter's own configuration (the "plugin configuration" of Proxy-Wasm), handed over as JSON. A plain
    /// text is handed over as it is, for modules that do not read JSON. Absent: empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configuration: Option<serde_json::Value>,
    /// A file with the filter's own configuration, handed over byte for byte, instead of `configuration`. A name
    /// that ends in `.json` must hold valid JSON. Example: `jwt.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configuration_file: Option<String>,
    /// The root context to use, for modules that hold several filters. Default: empty.
    #[serde(default)]
    pub root_id: String,
    /// Filters with the same `vm_id`, module and `vm_configuration` share one VM per worker. It also names the
    /// space of shared data and queues. Default: empty.
    #[serde(default)]
    pub vm_id: String,
    /// Configuration of the VM, seen by all filters in it; JSON or text like `configuration`. Absent: empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_configuration: Option<serde_json::Value>,
    /// Environment variables that the module can read. Nothing of the host's environment is passed unasked.
    #[serde(default)]
    pub environment: Environment,
    /// What happens to requests when the filter crashes. Default `fail_reload`.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// The pause before a crashed VM is replaced, under `fail_reload`.
    #[serde(default)]
    pub reload: Reload,
    /// Whether a filter that pauses at the request's fields still sees the body. With `true` a filter can hold
    /// the fields back until it has seen the body, so that the upstream never sees a refused request. Default
    /// `true`; a plain Envoy has `false`.
    #[serde(default = "yes")]
    pub allow_on_headers_stop_iteration: bool,
    /// Host functions that the module may call (Proxy-Wasm and WASI names). Callbacks are always delivered: an
    /// allow-list that forgets one would switch a check off unseen. Absent: all. Example: `[proxy_log,
    /// proxy_get_header_map_value, proxy_send_local_response, fd_write]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Vec<String>>,
    /// Upstreams that the module may call. Default: none, so a module's callouts fail until they are named here.
    #[serde(default)]
    pub allowed_upstreams: Vec<String>,
    /// Request and response fields that the module may add, change or remove; `*` at the end stands for any
    /// rest. A change of another one is refused and logged, and an answer of the module's own goes without it. Absent: all. Example: `[authorization, "x-portcullis-*"]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settable_fields: Option<Vec<String>>,
    /// Properties and filter state that the module may store, as other filters read them; `*` at the end stands for any
    /// rest. Filters believe what others have stored, such as who the caller is. Absent: all. Example: `["rate.*"]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settable_properties: Option<Vec<String>>,
    /// Foreign functions that the module may call with `proxy_call_foreign_function`. Absent: all that there are. Example:
    /// `[verify_signature]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foreign_functions: Option<Vec<String>>,
    /// What the module may take.
    #[serde(default)]
    pub limits: FilterLimits,
}

fn yes() -> bool {
    true
}

/// What a filter looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP requests and responses.
    #[default]
    Http,
    /// The bytes of TCP connections (an Envoy network filter).
    Tcp,
}

/// Environment variables of a module.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Environment {
    /// Variables copied from the host's own environment; one that is unset there is unset for the module too.
    /// Example: `[REGION]`.
    pub pass: Vec<String>,
    /// Variables with their values. Not for secrets: this file is shown by `/config`. Example: `{ TIER: gold }`.
    pub set: BTreeMap<String, String>,
}

/// What happens to requests when a filter crashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailurePolicy {
    /// The request is answered with 503, the TCP connection closed; the VM is replaced after a short pause, until
    /// which that goes on.
    #[default]
    FailReload,
    /// The request and all further ones are answered with 503, TCP connections closed, until the configuration is
    /// loaded again.
    FailClosed,
    /// The request is answered with 503, the TCP connection closed; further ones pass WITHOUT this filter.
    FailOpen,
}

/// The pause before a crashed VM is replaced. It grows from `base_interval` to `max_interval` with each crash,
/// and is jittered so that workers do not all reload at once.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Reload {
    /// The first pause. Default `1s`, Envoy's.
    pub base_interval: Time,
    /// The longest pause; at least `base_interval`. Default `10s`: an outage after the cause is gone should
    /// not outlast an operator's patience.
    pub max_interval: Time,
}

impl Default for Reload {
    fn default() -> Self {
        Self { base_interval: Time::secs(1), max_interval: Time::secs(10) }
    }
}

/// What a module may take. Of these, Envoy has those on header maps, and a fixed one on memory.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FilterLimits {
    /// Linear memory of one VM; there is one VM per worker. Default `64MiB`: sixteen workers then take 1 GiB at
    /// the most, while Envoy's own cap (1 GiB per VM, not configurable) allows sixteen times that.
    pub memory: Size,
    /// CPU time of one callback, give or take 10 ms; then it is stopped and the request fails like in a crash.
    /// Default `100ms`: a worker serves nobody else meanwhile, and one RSA check in pure WebAssembly takes about
    /// 2 ms. At most `10s`.
    pub callback_time: Time,
    /// CPU time to start, all start functions together; then the filter has not started. Default `2s`: modules with a
    /// runtime set it up in it, and filters compile their rules, while the worker serves nobody else. At most `1m`.
    pub start_time: Time,
    /// Callouts (HTTP and gRPC) waiting for an answer, per VM; further ones are refused. Default `64`: each
    /// holds a connection and room for its answer, and a filter that waits for more is a filter whose server is down.
    pub callouts: u32,
    /// Bytes of one callout's body; a larger one is refused. Default `1MiB`, Envoy's buffer.
    pub callout_bytes: Size,
    /// Bytes of one request or response body held while the filter waits or collects; more is answered with
    /// 413 (request) or 500 (response). Of a TCP connection, bytes held in one direction; then the sender is not
    /// read. Default `1MiB`, Envoy's per-connection buffer.
    pub buffered_bytes: Size,
    /// Log lines per second and worker; what is above is dropped and counted. Default `100`: enough for every
    /// denial of a normal day, too little to fill a disk in an attack.
    pub log_lines_per_second: u32,
    /// Bytes of one log line; the rest is cut off. Default `16KiB`: a stack trace fits.
    pub log_line_bytes: Size,
    /// Keys of shared data, per `vm_id`. There is no way to delete one, so a filter that makes a key per client
    /// grows for ever; further keys are refused. Default `65536`.
    pub shared_data_entries: u32,
    /// Bytes of shared data, keys and values, per `vm_id`. Default `64MiB`: one KiB for each of the keys.
    pub shared_data_bytes: Size,
    /// Shared queues, per `vm_id`; further ones are refused. Default `100`: a queue is a way between two filters.
    pub queues: u32,
    /// Items in one shared queue; further ones are refused. Default `1024`: who does not keep up with so many does
    /// not keep up.
    pub queue_length: u32,
    /// Bytes of the items in all shared queues, per `vm_id`. Default `64MiB`, as for shared data.
    pub queue_bytes: Size,
    /// Metrics that the module may define. Default `4096`: ours have one per rule and reason.
    pub metrics: u32,
    /// Properties that filters keep with one stream, and names that the module may declare; further ones are refused.
    /// Their names and values together take at most `map_bytes`. Default `1024`, as for the entries of a map: a
    /// filter keeps some dozens, such as who the caller is.
    pub properties: u32,
    /// Bytes of one header map handed over by the module. Default `1MiB`, Envoy's.
    pub map_bytes: Size,
    /// Entries of one header map handed over by the module. Default `1024`, Envoy's.
    pub map_pairs: u32,
    /// Size of the module's file. Default `32MiB`: modules with a garbage collector and a runtime have several MiB.
    pub module_bytes: Size,
    /// Time to compile the module when it is loaded. Default `1m`: real modules take seconds; one that takes
    /// minutes was made to occupy the compiler.
    pub compile_time: Time,
    /// Memory to compile the module. Default `1GiB`: real modules take fifty to a hundred times their size. The
    /// compiler runs in a process of its own, which is ended when it reaches this or `compile_time`.
    pub compile_memory: Size,
}

impl Default for FilterLimits {
    fn default() -> Self {
        Self {
            memory: Size::mib(64),
            callback_time: Time::millis(100),
            start_time: Time::secs(2),
            callouts: 64,
            callout_bytes: Size::mib(1),
            buffered_bytes: Size::mib(1),
            log_lines_per_second: 100,
            log_line_bytes: Size::kib(16),
            shared_data_entries: 65_536,
            shared_data_bytes: Size::mib(64),
            queues: 100,
            queue_length: 1024,
            queue_bytes: Size::mib(64),
            metrics: 4096,
            properties: 1024,
            map_bytes: Size::mib(1),
            map_pairs: 1024,
            module_bytes: Size::mib(32),
            compile_time: Time::secs(60),
            compile_memory: Size::mib(1024),
        }
    }
}

/// Servers behind the proxy that do the same.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// Where they listen, used in turn: `address:port`, `name:port` or `unix:/path/to/socket`. Names are looked
    /// up while running. At least one. Example: `["10.0.0.5:9000", "10.0.0.6:9000"]`.
    #[schemars(length(min = 1))]
    pub endpoints: Vec<String>,
    /// Speaks TLS to them. Absent: plain HTTP or TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<UpstreamTls>,
    /// Time to open a connection, TLS included. Default `1s`: within a data centre anything slower is down.
    #[serde(default = "connect_timeout")]
    pub connect_timeout: Time,
    /// Time from the end of the request to the end of the response; then 504. A route's `timeout` goes before
    /// it. Of no meaning for TCP connections. Default `15s`, Envoy's.
    #[serde(default = "request_timeout")]
    pub request_timeout: Time,
    /// Connections to all endpoints together, per worker in our host and in total in Envoy. A request that would
    /// need one more is answered with 503, a TCP connection closed; Envoy lets some requests wait first. Default
    /// `1024`, Envoy's.
    #[serde(default = "upstream_connections")]
    #[schemars(range(min = 1))]
    pub max_connections: u32,
    /// Speaks HTTP/2, with prior knowledge where there is no TLS. Needed for gRPC. Default `false`.
    #[serde(default)]
    pub http2: bool,
}

fn connect_timeout() -> Time {
    Time::secs(1)
}

fn request_timeout() -> Time {
    Time::secs(15)
}

fn upstream_connections() -> u32 {
    1024
}

/// TLS towards an upstream. Its certificate is always checked.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UpstreamTls {
    /// The name that is sent (SNI) and that the certificate must have. Absent: the endpoints' host name, which
    /// must then be one and the same. Example: `orders.internal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// PEM file with the authorities that may have signed the certificate. Absent: those that the system trusts.
    /// Example: `tls/internal-ca.pem`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
}

/// What happens to the requests that match. Exactly one of `upstream`, `operator` and `respond`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// A name for logs, metrics and filters' `route_names`: lower-case letters, digits, `-` and `_`.
    #[schemars(regex(pattern = "^[a-z0-9][a-z0-9_-]{0,63}$"))]
    pub name: String,
    /// Which requests. Absent: all.
    #[serde(rename = "match", default)]
    pub matches: Match,
    /// The filters that these requests pass, always in the order of the `filters` section. Absent: all with
    /// `protocol: http`. `[]`: none. Example: `[jwt, rate]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filters: Option<Vec<String>>,
    /// Sends the request to this upstream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// Hands the request to this operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator: Option<String>,
    /// Answers it, once the filters let it pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub respond: Option<Respond>,
    /// Time from the end of the request to the end of the response; then 504. Absent: the upstream's
    /// `request_timeout`; for an operator, one second more than its `limits.start_time` and `limits.wall_time`
    /// together, so that these end the request first, with their own cause. Example: `30s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Time>,
    /// Replaces the authority (`host`) that the upstream sees. Absent: the client's. Example: `orders.internal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_rewrite: Option<String>,
    /// Replaces the matched `prefix` or `exact` path. Whole segments are replaced and exactly one slash stands
    /// between what is new and what is kept: with prefix `/api` and rewrite `/` the upstream sees `/orders` for
    /// `/api/orders`. Absent: the path stays. Example: `/v1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_rewrite: Option<String>,
}

/// Conditions that must all hold.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// Hosts, any of which matches: `api.example.com`, `*.example.com` (any name below, not the name itself) or
    /// `*`. Case, port and a final dot of the request's host do not matter. Absent: every host.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub hosts: Option<Vec<String>>,
    /// The path, compared after normalisation, without the query. Absent: every path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// Methods, any of which matches; `GET` does not include `HEAD`. Absent: every method.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub methods: Option<Vec<String>>,
    /// Fields, all of which must match. Absent: no condition.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderMatch>,
}

/// A condition on the path. Letters' case matters.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// This path and nothing else. Example: `{ exact: /healthz }`.
    Exact(String),
    /// This path and what lies below: `/orders` matches `/orders` and `/orders/1`, but not `/orders-old`.
    /// `/orders/` matches only what lies below. Example: `{ prefix: /orders }`.
    Prefix(String),
    /// Segments, some of which may be anything that is not empty. Example: `{ template:
    /// "/orders/{order_id}/items" }`.
    Template(String),
}

/// A condition on one field. Without `exact`, `present` is needed.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderMatch {
    /// The field's name. Example: `x-api-version`.
    pub name: String,
    /// The field's value; of a repeated field, one line with it is enough. Letters' case matters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact: Option<String>,
    /// `true`: the field must be there. `false`: it must not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub present: Option<bool>,
}

/// An answer that needs no server behind.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Respond {
    /// The status, 200 to 599. Example: `204`.
    #[schemars(range(min = 200, max = 599))]
    pub status: u16,
    /// Fields of the answer. Default: `content-type: text/plain` when there is a body. Example: `{ location: /v2/ }`.
    #[serde(default)]
    pub fields: BTreeMap<String, String>,
    /// The body, at most 64 KiB. Default: empty.
    #[serde(default)]
    pub body: String,
}

/// An API handler of a customer: `export default { async fetch(request, env, ctx) {...} }`. It runs in a process
/// of its own that can reach nothing but what is granted here.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Operator {
    /// The module with the default export; what it imports is bundled when it is loaded, and must lie in `root`.
    /// Example: `operators/hello/main.ts`.
    pub entry: String,
    /// The folder outside of which nothing is imported; for operators that share modules, the folder of them all.
    /// Absent: the folder of `entry`. Example: `operators`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// What it may reach. Default: nothing.
    #[serde(default)]
    pub permissions: Permissions,
    /// What it may take.
    #[serde(default)]
    pub limits: OperatorLimits,
    /// How many processes.
    #[serde(default)]
    pub replicas: Replicas,
    /// Where it runs.
    #[serde(default)]
    pub placement: Placement,
    /// What happens on a machine that cannot give every layer of isolation. Default `best_effort`.
    #[serde(default)]
    pub isolation: Isolation,
    /// Runs it without a just-in-time compiler: several times slower where it computes, but a whole class of flaws
    /// in the engine is out of reach. Default `false`.
    #[serde(default)]
    pub interpreter_only: bool,
    /// Lets `eval` and `new Function` work. What such code imports is not known when the operator is loaded, and
    /// text that a client sent may become code. Default `false`.
    #[serde(default)]
    pub dangerously_allow_code_generation: bool,
}

/// How this machine runs operators. Each setting holds for all of them.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OperatorHost {
    /// The folder of the operators' key-value stores and of the key that seals them. Made if it is absent; only
    /// this user may enter it. Absent: `permissions.kv` is refused. Example: `/var/lib/portcullis/kv`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<String>,
    /// The folder for what lives only as long as this host: sockets, and empty roots for processes. It must be on a
    /// local disk or in memory. Absent: the system's temporary folder. Example: `/run/portcullis`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_folder: Option<String>,
    /// What runs operators' code. Absent: the runner where `portcullis-operator` lies beside this program or on the `PATH`, else
    /// Deno. Example: `deno`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<OperatorEngine>,
    /// The least isolation that is accepted of any operator; an operator may ask for more. Default `best_effort`.
    pub isolation: Isolation,
    /// Generic processes kept ready for operators that have the same memory limits and options, so that a start
    /// takes a few milliseconds. Each takes several MiB. `0`: none. Default `1`.
    #[schemars(range(max = 64))]
    pub prewarmed: u32,
    /// Certificates of further authorities that operators' outbound requests may trust, PEM. Absent: only the
    /// well-known ones. Example: `ca.pem`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
}

impl Default for OperatorHost {
    fn default() -> Self {
        Self { storage: None, run_folder: None, engine: None, isolation: Isolation::default(), prewarmed: 1, ca: None }
    }
}

/// What an operator may reach, by name. Nothing by default.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Permissions {
    /// `host:port` pairs it may fetch from, through the host's egress. A name that resolves to a private,
    /// loopback or link-local address is refused there. Example: `["api.example.com:443"]`.
    pub net: Vec<String>,
    /// `host:port` pairs it may fetch from although their addresses are private, loopback or link-local: services
    /// of your own network, each named. Example: `["stock.internal:8080"]`.
    pub private_net: Vec<String>,
    /// Variables of the host's environment that it sees in `env`. Example: `[REGION]`.
    pub env: Vec<String>,
    /// Secrets that the host puts into its outbound requests, by name. The operator writes `{{secret:NAME}}` into
    /// a field and never holds the value.
    pub secrets: BTreeMap<String, Secret>,
    /// A private key-value store, encrypted at rest, of at most `limits.storage`; needs `operator_host.storage`.
    /// Default `false`.
    pub kv: bool,
    /// Files whose content is handed over; the process cannot open them. Example: `[prices.json]`.
    pub read: Vec<String>,
}

/// Where a secret comes from and where it may go.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// The source: `{ env: STRIPE_KEY }` or `{ file: secrets/stripe }`.
    pub from: SecretSource,
    /// The `host:port` pairs, each also in `net` or `private_net`, whose requests may carry it. At least one.
    #[schemars(length(min = 1))]
    pub hosts: Vec<String>,
}

/// The source of a secret.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SecretSource {
    /// A variable of the host's environment.
    Env(String),
    /// A file; one final line break is dropped.
    File(String),
}

/// What an operator may take. Each limit that is reached has a cause that client, log and metric share.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OperatorLimits {
    /// Time from the moment a process takes a request to the last byte of the answer; then 503. Default `15s`, as
    /// for upstreams.
    pub wall_time: Time,
    /// CPU time for one request; then 503, and a process that does not answer any more is killed and replaced.
    /// Default `1s`: a handler that serves 100 requests per second takes 10 ms, and a loop occupies a core until it
    /// is killed.
    pub cpu_time: Time,
    /// CPU time between two requests, for timers and `ctx.waitUntil`; then the process is killed and replaced.
    /// Default `1s`.
    pub background_cpu_time: Time,
    /// Time that a request waits for a process, and that an operator's modules may take to run; then 503. Default
    /// `10s`: 0.1 s is usual, a loaded machine takes longer.
    pub start_time: Time,
    /// JavaScript heap. Default `64MiB`.
    pub heap: Size,
    /// Memory beyond the engine's fixed part: heap, buffers, WebAssembly. At least `heap`. Default `192MiB`.
    pub memory: Size,
    /// Request body; more is answered with 413. Default `10MiB`: the engine itself has no limit and reads it
    /// into memory.
    pub request_bytes: Size,
    /// Response body; a longer one is cut off. Default `50MiB`.
    pub response_bytes: Size,
    /// Requests at a time per process. When all `replicas` are busy with so many, further requests get 429 with
    /// `retry-after`. Default `100`.
    pub concurrency: u32,
    /// Outbound requests and uses of the key-value store that one request may cause. Default `50`.
    pub subrequests: u32,
    /// Time for one outbound request, from resolving the name to the last byte of the answer. Default `10s`.
    pub subrequest_time: Time,
    /// Body of one outbound request. Default `1MiB`.
    pub subrequest_bytes: Size,
    /// Body of the answer to one outbound request. Default `10MiB`.
    pub subresponse_bytes: Size,
    /// Log lines per second and process, ten times as many at once; what is above is dropped and counted. Default
    /// `100`.
    pub log_lines_per_second: u32,
    /// Bytes in the key-value store. Default `64MiB`.
    pub storage: Size,
}

impl Default for OperatorLimits {
    fn default() -> Self {
        Self {
            wall_time: Time::secs(15),
            cpu_time: Time::secs(1),
            background_cpu_time: Time::secs(1),
            start_time: Time::secs(10),
            heap: Size::mib(64),
            memory: Size::mib(192),
            request_bytes: Size::mib(10),
            response_bytes: Size::mib(50),
            concurrency: 100,
            subrequests: 50,
            subrequest_time: Time::secs(10),
            subrequest_bytes: Size::mib(1),
            subresponse_bytes: Size::mib(10),
            log_lines_per_second: 100,
            storage: Size::mib(64),
        }
    }
}

/// How many processes an operator has.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Replicas {
    /// Processes kept even when idle. `0` lets it sleep; the first request then waits for a start. Default `1`.
    pub min: u32,
    /// Processes at the most, at least `min` and 1. Default `4`.
    pub max: u32,
    /// A process above `min` that had no request for so long is stopped. Default `1m`.
    pub idle_time: Time,
}

impl Default for Replicas {
    fn default() -> Self {
        Self { min: 1, max: 4, idle_time: Time::secs(60) }
    }
}

/// Where an operator runs.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// CPUs that it has for itself: no other operator may name or use them, and the host's own threads stay off
    /// them. At least one CPU must be left. Absent: all that are not reserved. Example: `[2, 3]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Vec<u32>>,
    /// The pool of machines it may run on; a machine's own is the `pool` at the top of the file. Absent: machines
    /// without a pool. Example: `acme`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
}

/// A program that runs operators' code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperatorEngine {
    /// `portcullis-operator`, made for operators: it holds nothing that opens a file, a socket or a process.
    Runner,
    /// The stock `deno`, with everything in it forbidden that can be.
    Deno,
}

/// What happens where the machine cannot give every layer of isolation (see `portcullis doctor`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// The operator starts with the layers that there are; each missing one is logged.
    #[default]
    BestEffort,
    /// The operator does not start.
    Required,
}
