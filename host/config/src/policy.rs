//! A policy that can run: every name resolved, every file read, every default filled in.
//!
//! Made only by [`crate::compile`]. Filters, upstreams and operators are referred to by their index in the
//! policy's vectors. Files were read when the policy was compiled, so what was checked is what runs.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::file::{
    FailurePolicy, FilterLimits, Isolation, Logging, OperatorEngine, OperatorLimits, Protocol, Replicas,
};
use crate::route::{FieldLines, HostPattern, Route};
use crate::target::Target;

/// What a request must have for [`Policy::route`] to find its route.
#[derive(Clone, Copy)]
pub struct RequestParts<'a> {
    /// The method, as sent.
    pub method: &'a [u8],
    /// The authority (`host`), from [`crate::normal_authority`] or as sent.
    pub authority: &'a [u8],
    /// The request target, normalised.
    pub target: &'a Target,
    /// The request's field lines.
    pub fields: &'a dyn FieldLines,
}

/// What runs.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The policy file's name, as it was given.
    pub name: String,
    /// Where the administrative endpoints are served.
    pub admin: Option<SocketAddr>,
    /// Worker threads, at least one.
    pub workers: usize,
    /// Networks whose `x-forwarded-for` is believed.
    pub trusted_proxies: Vec<Network>,
    /// What is logged.
    pub logging: Logging,
    /// Where compiled filters are kept.
    pub code_cache: CodeCache,
    /// This machine's pool.
    pub pool: Option<String>,
    /// Addresses that clients connect to; at least one.
    pub listeners: Vec<Listener>,
    /// All filters, in chain order.
    pub filters: Vec<Filter>,
    /// All upstreams, by name.
    pub upstreams: Vec<Upstream>,
    /// How operators are run here.
    pub operator_host: OperatorHost,
    /// All operators, by name.
    pub operators: Vec<Operator>,
    /// All routes, in order; at least one, unless no listener serves HTTP.
    pub routes: Vec<Route>,
}

impl Policy {
    /// The first route that matches, or none: then the answer is 404 and no filter runs.
    #[must_use]
    pub fn route(&self, request: &RequestParts<'_>) -> Option<&Route> {
        self.routes.get(self.route_index(request)?)
    }

    /// The index of that route in [`Policy::routes`].
    #[must_use]
    pub fn route_index(&self, request: &RequestParts<'_>) -> Option<usize> {
        let host = crate::route::host_of(request.authority);
        self.routes.iter().position(|route| route.matches(&host, request))
    }

    /// The host patterns of all routes, and the one that every host falls under. In Envoy each is a virtual host.
    #[must_use]
    pub fn host_patterns(&self) -> BTreeSet<&HostPattern> {
        let patterns = self.routes.iter().flat_map(|route| &route.hosts);
        patterns.chain([&HostPattern::Any]).collect()
    }

    /// The filters of one protocol, in chain order, with their indices.
    pub fn filters_of(&self, protocol: Protocol) -> impl Iterator<Item = (usize, &Filter)> {
        self.filters.iter().enumerate().filter(move |(_, filter)| filter.protocol == protocol)
    }

    /// The index of the upstream with this name.
    #[must_use]
    pub fn upstream_named(&self, name: &str) -> Option<usize> {
        self.upstreams.iter().position(|upstream| upstream.name == name)
    }
}

/// Compiled filters on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeCache {
    /// Whether there is to be one.
    pub enabled: bool,
    /// The folder, absolute; `None`: what the environment suggests.
    pub directory: Option<PathBuf>,
    /// Bytes of all entries.
    pub bytes_max: u64,
    /// Number of entries.
    pub entries_max: usize,
    /// How long an unused entry stays.
    pub unused_max: Duration,
}

/// An address that clients connect to.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Its name.
    pub name: String,
    /// Its address; port 0 lets the system choose.
    pub address: SocketAddr,
    /// TLS, unless it is plain HTTP or TCP.
    pub tls: Option<ListenerTls>,
    /// What it does with connections.
    pub service: Service,
    /// What one client may take.
    pub limits: ListenerLimits,
}

/// What a listener does with connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    /// Serves HTTP requests, by the policy's routes.
    Http,
    /// Forwards their bytes.
    Tcp(TcpForward),
}

/// Where TCP connections go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpForward {
    /// Index of the upstream.
    pub upstream: usize,
    /// Indices of the filters, sorted: their order in the chain. All are [`Protocol::Tcp`].
    pub filters: Vec<usize>,
}

/// Certificate and key of a listener; both are known to be PEM of the right kind.
#[derive(Clone, Debug)]
pub struct ListenerTls {
    /// Where the certificate chain stands.
    pub certificate_path: PathBuf,
    /// The certificate chain, PEM.
    pub certificate_pem: Arc<[u8]>,
    /// Where the private key stands.
    pub private_key_path: PathBuf,
    /// The private key, PEM.
    pub private_key_pem: Secret,
}

/// Bytes that `Debug` does not show.
#[derive(Clone)]
pub struct Secret(pub Arc<[u8]>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What one client may take from a listener. What is about requests is of no meaning where TCP is forwarded.
#[derive(Clone, Copy, Debug)]
pub struct ListenerLimits {
    /// Request line and fields together; a whole number of KiB.
    pub header_bytes: usize,
    /// Number of field lines.
    pub header_count: usize,
    /// Time for the fields to arrive.
    pub header_timeout: Duration,
    /// Time for the whole request to arrive.
    pub request_timeout: Duration,
    /// Time an unused connection is kept; with TCP, one on which no byte moves.
    pub idle_timeout: Duration,
    /// Time in which nothing of a request moves.
    pub stream_idle_timeout: Duration,
    /// Connections at a time.
    pub max_connections: usize,
}

/// A Proxy-Wasm filter.
#[derive(Clone, Debug)]
pub struct Filter {
    /// Its name.
    pub name: String,
    /// What it looks at.
    pub protocol: Protocol,
    /// The module's file, absolute.
    pub module_path: PathBuf,
    /// The module: core WebAssembly of at most `limits.module_bytes`, not yet validated.
    pub module: Bytes,
    /// The plugin configuration.
    pub configuration: Bytes,
    /// The root context to use.
    pub root_id: String,
    /// Which VMs and shared data it shares.
    pub vm_id: String,
    /// The VM configuration.
    pub vm_configuration: Bytes,
    /// Variables copied from the host's environment when the VM starts, if they are set.
    pub environment_pass: Vec<String>,
    /// Variables with their values. No name is in both lists.
    pub environment_set: Vec<(String, String)>,
    /// What a crash does.
    pub failure_policy: FailurePolicy,
    /// First pause before a crashed VM is replaced.
    pub reload_base_interval: Duration,
    /// Longest such pause.
    pub reload_max_interval: Duration,
    /// Whether the body flows while request fields are held.
    pub allow_on_headers_stop_iteration: bool,
    /// Host functions it may call, sorted; none means all.
    pub capabilities: Option<Vec<String>>,
    /// Indices of the upstreams it may call, sorted.
    pub allowed_upstreams: Vec<usize>,
    /// Fields it may write; none means all.
    pub settable_fields: Option<Vec<NamePattern>>,
    /// Properties it may store; none means all.
    pub settable_properties: Option<Vec<NamePattern>>,
    /// Foreign functions it may call, sorted; none means all.
    pub foreign_functions: Option<Vec<String>>,
    /// What it may take.
    pub limits: FilterLimits,
}

/// Shared bytes; `Debug` shows their number only, because a filter's configuration may hold key material.
#[derive(Clone)]
pub struct Bytes(pub Arc<[u8]>);

impl Bytes {
    pub(crate) fn new(bytes: impl Into<Arc<[u8]>>) -> Self {
        Self(bytes.into())
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// The name of a field or a property, or the start of one. Fields' names are in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamePattern {
    /// This name.
    Exact(String),
    /// Names that begin so. Written `x-portcullis-*`.
    Prefix(String),
}

/// Servers behind the proxy.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Its name.
    pub name: String,
    /// Where they listen; at least one.
    pub endpoints: Vec<Endpoint>,
    /// TLS, unless it is plain HTTP.
    pub tls: Option<UpstreamTls>,
    /// Time to open a connection.
    pub connect_timeout: Duration,
    /// Time for the response, unless the route has its own.
    pub request_timeout: Duration,
    /// Connections at a time.
    pub max_connections: usize,
    /// Whether HTTP/2 is spoken.
    pub http2: bool,
    /// Whether it carries TCP connections; then it carries no requests.
    pub tcp: bool,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// IP address and port.
    Address(SocketAddr),
    /// A name to look up, and a port.
    Name {
        /// Host name.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket; absolute.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// TLS towards an upstream.
#[derive(Clone, Debug)]
pub struct UpstreamTls {
    /// The name to send and to find in the certificate: a DNS name or an IP address.
    pub server_name: String,
    /// Authorities; absent: the system's.
    pub ca: Option<Authorities>,
}

/// Certificates of authorities, known to be PEM.
#[derive(Clone, Debug)]
pub struct Authorities {
    /// Where they stand.
    pub path: PathBuf,
    /// The certificates, PEM.
    pub pem: Arc<[u8]>,
}

/// A handler in a process of its own.
#[derive(Clone, Debug)]
pub struct Operator {
    /// Its name.
    pub name: String,
    /// The entry module, absolute; it exists.
    pub entry: PathBuf,
    /// The folder outside of which nothing is imported, absolute; it holds `entry`.
    pub root: PathBuf,
    /// Hosts it may fetch from, host in lower case.
    pub net: Vec<HostPort>,
    /// Hosts it may fetch from although their addresses are not public.
    pub private_net: Vec<HostPort>,
    /// Variables of the host's environment that it sees.
    pub env: Vec<String>,
    /// Secrets put into its outbound requests.
    pub secrets: Vec<OperatorSecret>,
    /// Whether it has a key-value store.
    pub kv: bool,
    /// Files handed over: the name as written, and the absolute path; they exist.
    pub read: Vec<(String, PathBuf)>,
    /// What it may take.
    pub limits: OperatorLimits,
    /// How many processes.
    pub replicas: Replicas,
    /// CPUs it has for itself, sorted; none means it shares.
    pub cpus: Option<Vec<u32>>,
    /// The pool it may run on.
    pub pool: Option<String>,
    /// What a missing layer of isolation does.
    pub isolation: Isolation,
    /// Whether it runs without a just-in-time compiler.
    pub interpreter_only: bool,
    /// Whether `eval` and the like work.
    pub code_generation: bool,
}

/// How operators are run here.
#[derive(Clone, Debug)]
pub struct OperatorHost {
    /// The folder of the stores, absolute.
    pub storage: Option<PathBuf>,
    /// The folder for sockets and the like, absolute.
    pub run_folder: Option<PathBuf>,
    /// What runs their code; none says whatever there is.
    pub engine: Option<OperatorEngine>,
    /// The least isolation that is accepted.
    pub isolation: Isolation,
    /// Generic processes kept ready.
    pub prewarmed: usize,
    /// Further authorities for outbound requests.
    pub ca: Option<Authorities>,
}

impl Operator {
    /// Whether it may run on a machine of this pool.
    #[must_use]
    pub fn belongs_to(&self, pool: Option<&str>) -> bool {
        self.pool.as_deref() == pool
    }
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// A DNS name or an IP address (without brackets), lower case.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A secret and where it may go. The value is not read here.
#[derive(Clone, Debug)]
pub struct OperatorSecret {
    /// Its name in `{{secret:NAME}}`.
    pub name: String,
    /// Where the value comes from.
    pub source: SecretSource,
    /// Where it may go; each is also in the operator's `net` or `private_net`.
    pub hosts: Vec<HostPort>,
}

/// The source of a secret's value.
#[derive(Clone, Debug)]
pub enum SecretSource {
    /// A variable of the host's environment.
    Env(String),
    /// A file, absolute; it exists.
    File(PathBuf),
}

/// A network: an address and how many of its bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The address, with zeroes after the prefix.
    pub address: IpAddr,
    /// Bits that count.
    pub prefix: u8,
}

impl Network {
    /// Whether an address lies in the network. IPv4 addresses mapped into IPv6 count as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix.min(32))).unwrap_or(0);
                network.to_bits() == address.to_bits() & mask
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix.min(128))).unwrap_or(0);
                network.to_bits() == address.to_bits() & mask
            }
            _ => false,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}
