//! [`Plan`]: a policy with everything loaded that all workers share: compiled modules, certificates, authorities.
//!
//! Made on the control thread, as a whole or not at all. What a new plan has in common with the running one (modules
//! above all, which take long to compile) is taken over.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use portcullis_abi::{
    Capabilities, Certificate, FailurePolicy, FieldMap, Limits, Module, NamePattern, Plugin, RouteInfo, Shared,
};
use portcullis_code::{LoadLimits, Loader, Source};
use portcullis_config::envoy::{operator_cluster_name, upstream_cluster_name};
use portcullis_config::{
    Action, Filter, HostPattern, ListenerTls, Policy, Protocol, RequestParts, Route, Service, Target, TcpForward,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::time::Instant;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::certificate;
use crate::message::Lines;
use crate::operator::OperatorSet;
use crate::upstream::UpstreamTls;

/// See the module.
pub(crate) struct Plan {
    pub(crate) policy: Arc<Policy>,
    pub(crate) plugins: Vec<Arc<Plugin>>,
    pub(crate) shared: Arc<Shared>,
    /// By index of the route, without what depends on the host.
    routes: Vec<RouteInfo>,
    virtual_hosts: VirtualHosts,
    /// By index of the upstream.
    pub(crate) upstream_tls: Vec<Option<UpstreamTls>>,
    /// By index of the listener.
    pub(crate) listener_tls: Vec<Option<ServerTls>>,
    /// The policy's operators, where there is a host for them.
    pub(crate) operators: Option<Arc<dyn OperatorSet>>,
    /// The moment from which filters' monotonic time counts.
    pub(crate) epoch: Instant,
}

/// TLS towards the clients of one listener.
#[derive(Clone)]
pub(crate) struct ServerTls {
    pub(crate) acceptor: TlsAcceptor,
    pub(crate) certificate: Option<Arc<Certificate>>,
}

/// Why a policy cannot run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanError {
    /// Where the problem lies, e.g. a file or a filter.
    pub place: String,
    /// What is wrong, and how to fix it.
    pub problem: String,
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.problem)
    }
}

impl std::error::Error for PlanError {}

fn error(place: impl Into<String>, problem: impl Into<String>) -> PlanError {
    PlanError { place: place.into(), problem: problem.into() }
}

impl Plan {
    /// Loads everything that the policy names but operators, of which it must be known whether somebody
    /// [will](Self::operators).
    pub(crate) fn load(
        policy: Policy,
        loader: &Loader,
        has_operator_host: bool,
        before: Option<&Plan>,
    ) -> Result<Plan, PlanError> {
        if !has_operator_host
            && let Some(route) = policy.routes.iter().find(|route| matches!(route.action, Action::Operator(_)))
        {
            return Err(error(
                format!("route `{}`", route.name),
                "this host runs no operators\n  hint: send the route to an upstream, or answer it with `respond`",
            ));
        }
        let mut plugins = Vec::with_capacity(policy.filters.len());
        for filter in &policy.filters {
            plugins.push(Arc::new(plugin(filter, &policy, loader, before)?));
        }
        let listener_tls = policy
            .listeners
            .iter()
            .map(|listener| {
                // What is spoken on a TCP connection only its ends know.
                let alpn: &[&[u8]] = if listener.service == Service::Http { &[b"h2", b"http/1.1"] } else { &[] };
                listener.tls.as_ref().map(|tls| acceptor(tls, alpn)).transpose()
            })
            .collect::<Result<_, _>>()?;
        let mut system_roots = None;
        let upstream_tls = policy
            .upstreams
            .iter()
            .map(|upstream| {
                let Some(tls) = &upstream.tls else { return Ok(None) };
                let alpn: &[&[u8]] = match upstream {
                    _ if upstream.tcp => &[],
                    _ if upstream.http2 => &[b"h2"],
                    _ => &[b"http/1.1"],
                };
                connector(&upstream.name, tls, alpn, &mut system_roots).map(Some)
            })
            .collect::<Result<_, _>>()?;
        Ok(Plan {
            plugins,
            routes: policy.routes.iter().map(|route| route_info(route, &policy)).collect(),
            virtual_hosts: VirtualHosts::new(&policy),
            shared: before.map_or_else(Shared::new, |before| Arc::clone(&before.shared)),
            upstream_tls,
            listener_tls,
            operators: None,
            epoch: before.map_or_else(Instant::now, |before| before.epoch),
            policy: Arc::new(policy),
        })
    }

    /// The index of the route that a request with these fields takes.
    pub(crate) fn route(&self, fields: &FieldMap, target: &Target) -> Option<usize> {
        let lines = Lines(fields);
        let parts = RequestParts {
            method: fields.get(b":method").unwrap_or_default(),
            authority: fields.get(b":authority").unwrap_or_default(),
            target,
            fields: &lines,
        };
        let host = portcullis_config::host_of(parts.authority);
        self.policy.routes.iter().position(|route| route.matches(&host, &parts))
    }

    /// What filters see of a route.
    pub(crate) fn route_info(&self, route: usize, authority: &[u8]) -> RouteInfo {
        let mut info = self.routes.get(route).cloned().unwrap_or_default();
        info.virtual_host_name = self.virtual_hosts.find(authority);
        info
    }

    /// What filters see of where TCP connections go.
    pub(crate) fn tcp_info(&self, forward: &TcpForward) -> RouteInfo {
        let upstream = self.policy.upstreams.get(forward.upstream);
        RouteInfo {
            cluster_name: upstream.map_or("", upstream_cluster_name).into(),
            endpoints: upstream.map(|upstream| upstream.endpoints.len()),
            ..RouteInfo::default()
        }
    }

    /// How much of a body, or of a TCP connection, may wait in a chain of these filters: the most that one of them is
    /// allowed.
    pub(crate) fn buffer_bytes(&self, filters: &[usize]) -> usize {
        filters
            .iter()
            .filter_map(|index| self.policy.filters.get(*index))
            .map(|filter| filter.limits.buffered_bytes.as_usize())
            .max()
            .unwrap_or(1024 * 1024)
    }
}

fn plugin(filter: &Filter, policy: &Policy, loader: &Loader, before: Option<&Plan>) -> Result<Plugin, PlanError> {
    let place = || format!("filter `{}` ({})", filter.name, filter.module_path.display());
    let known = before.and_then(|before| {
        let at = before.policy.filters.iter().position(|other| *other.module == *filter.module)?;
        before.plugins.get(at).map(|plugin| plugin.module.clone())
    });
    let module = match known {
        Some(module) => module,
        None => load(filter, loader).map_err(|problem| error(place(), problem))?,
    };
    check_callbacks(filter.protocol, &module).map_err(|problem| error(place(), problem))?;
    let limits = &filter.limits;
    let mut plugin = Plugin::new(&filter.name, module);
    plugin.root_id.clone_from(&filter.root_id);
    plugin.vm_id.clone_from(&filter.vm_id);
    plugin.vm_configuration = filter.vm_configuration.to_vec();
    plugin.configuration = filter.configuration.to_vec();
    plugin.environment = environment(filter);
    plugin.failure_policy = match filter.failure_policy {
        portcullis_config::FailurePolicy::FailReload => FailurePolicy::Reload,
        portcullis_config::FailurePolicy::FailClosed => FailurePolicy::Closed,
        portcullis_config::FailurePolicy::FailOpen => FailurePolicy::Open,
    };
    plugin.reload_backoff = filter.reload_base_interval;
    plugin.reload_backoff_max = filter.reload_max_interval;
    plugin.allow_on_headers_stop_iteration = filter.allow_on_headers_stop_iteration;
    plugin.limits = {
        let mut bounds = Limits::default();
        bounds.memory_bytes_max = limits.memory.as_usize();
        bounds.callback_time_max = limits.callback_time.0;
        bounds.calls_max = limits.callouts as usize;
        bounds.log_lines_per_second = limits.log_lines_per_second;
        bounds.map_lines_max = limits.map_pairs as usize;
        bounds.map_bytes_max = limits.map_bytes.as_usize();
        // An edit may make a body longer than what was collected, but not without bound.
        bounds.buffer_bytes_max = limits.buffered_bytes.as_usize().saturating_mul(2).max(bounds.buffer_bytes_max);
        bounds.metrics_max = limits.metrics as usize;
        bounds.properties_max = limits.properties as usize;
        bounds.shared.entries_max = limits.shared_data_entries as usize;
        bounds.shared.bytes_max = limits.shared_data_bytes.as_usize();
        bounds.shared.queues_max = limits.queues as usize;
        bounds.shared.queue_items_max = limits.queue_length as usize;
        bounds.shared.queue_bytes_max = limits.queue_bytes.as_usize();
        bounds.start_time_max = limits.start_time.0;
        bounds.call_bytes_max = limits.callout_bytes.as_usize();
        bounds.log_line_bytes_max = limits.log_line_bytes.as_usize();
        bounds
    };
    let listed = |names: Option<&Vec<String>>| names.map(|names| names.iter().cloned().collect::<BTreeSet<_>>());
    plugin.capabilities = Capabilities {
        functions: listed(filter.capabilities.as_ref()),
        // Always delivered: a list that forgets one would switch a check off unseen.
        callbacks: None,
        foreign_functions: listed(filter.foreign_functions.as_ref()),
        fields: patterns(filter.settable_fields.as_ref()),
        properties: patterns(filter.settable_properties.as_ref()),
        upstreams: Some(
            filter
                .allowed_upstreams
                .iter()
                .filter_map(|index| policy.upstreams.get(*index))
                .map(|upstream| upstream.name.clone())
                .collect(),
        ),
    };
    Ok(plugin)
}

/// Names as the host compares them.
fn patterns(written: Option<&Vec<portcullis_config::NamePattern>>) -> Option<Vec<NamePattern>> {
    let pattern = |written: &portcullis_config::NamePattern| match written {
        portcullis_config::NamePattern::Exact(name) => NamePattern::Exact(name.clone()),
        portcullis_config::NamePattern::Prefix(prefix) => NamePattern::Prefix(prefix.clone()),
    };
    Some(written?.iter().map(pattern).collect())
}

/// A filter without callbacks for what it is to look at would never be called, and everything would pass it. Modules made
/// with an SDK have all callbacks; those crash at the first that they were not written for, and so fail closed.
fn check_callbacks(protocol: Protocol, module: &Module) -> Result<(), &'static str> {
    let callbacks = module.callbacks();
    match protocol {
        Protocol::Http if callbacks.tcp && !callbacks.http => Err(
            "the module has callbacks for TCP connections only, so no request would ever reach it\n  hint: give the filter \
             `protocol: tcp`, and a listener with `tcp`",
        ),
        Protocol::Tcp if callbacks.http && !callbacks.tcp => Err(
            "the module has callbacks for HTTP only, so no TCP connection would ever reach it\n  hint: remove `protocol: \
             tcp`, or use a module that exports `proxy_on_new_connection` or `proxy_on_downstream_data`",
        ),
        Protocol::Http | Protocol::Tcp => Ok(()),
    }
}

fn environment(filter: &Filter) -> Vec<(String, String)> {
    let passed = filter.environment_pass.iter().filter_map(|name| Some((name.clone(), std::env::var(name).ok()?)));
    filter.environment_set.iter().cloned().chain(passed).collect()
}

/// The filter's module, compiled now or before.
fn load(filter: &Filter, loader: &Loader) -> Result<Module, String> {
    let mut limits = LoadLimits::default();
    limits.module.module_bytes_max = filter.limits.module_bytes.as_usize();
    limits.module.memory_bytes_max = filter.limits.memory.0;
    limits.compile_time_max = filter.limits.compile_time.0;
    limits.compile_memory_max = filter.limits.compile_memory.0;
    let loaded = loader.load(&filter.module, &limits).map_err(|cause| cause.to_string())?;
    match loaded.source {
        Source::Cache => tracing::info!("filter `{}`: compiled code taken from the code cache", filter.name),
        Source::Compiler => tracing::info!("filter `{}`: compiled", filter.name),
    }
    Ok(loaded.module)
}

/// What is known of a route, with the names that `envoy-config` gives to clusters.
fn route_info(route: &Route, policy: &Policy) -> RouteInfo {
    let (cluster_name, endpoints) = match &route.action {
        Action::Upstream(index) => {
            let upstream = policy.upstreams.get(*index);
            (upstream.map_or("", upstream_cluster_name).into(), upstream.map(|upstream| upstream.endpoints.len()))
        }
        Action::Operator(index) => {
            (policy.operators.get(*index).map(operator_cluster_name).unwrap_or_default().into(), Some(1))
        }
        Action::Respond(_) => (Arc::default(), None),
    };
    RouteInfo { name: route.name.as_str().into(), cluster_name, endpoints, virtual_host_name: Arc::default() }
}

/// Names of host patterns, found as Envoy finds virtual hosts: the most specific one wins.
struct VirtualHosts {
    exact: HashMap<Vec<u8>, Arc<str>>,
    /// The longest first.
    below: Vec<(HostPattern, Arc<str>)>,
    any: Arc<str>,
}

impl VirtualHosts {
    fn new(policy: &Policy) -> VirtualHosts {
        let mut hosts =
            VirtualHosts { exact: HashMap::new(), below: Vec::new(), any: HostPattern::Any.domain().into() };
        for pattern in policy.host_patterns() {
            let name = pattern.domain().into();
            match pattern {
                HostPattern::Exact(host) => drop(hosts.exact.insert(host.clone().into_bytes(), name)),
                HostPattern::Below(_) => hosts.below.push((pattern.clone(), name)),
                HostPattern::Any => {}
            }
        }
        hosts.below.sort_by_key(|(_, name)| Reverse(name.len()));
        hosts
    }

    fn find(&self, authority: &[u8]) -> Arc<str> {
        if self.exact.is_empty() && self.below.is_empty() {
            return Arc::clone(&self.any);
        }
        let host = portcullis_config::host_of(authority);
        let below = || self.below.iter().find(|(pattern, _)| pattern.matches(&host)).map(|(_, name)| name);
        Arc::clone(self.exact.get(&host).or_else(below).unwrap_or(&self.any))
    }
}

fn acceptor(tls: &ListenerTls, alpn: &[&[u8]]) -> Result<ServerTls, PlanError> {
    let at = tls.certificate_path.display().to_string();
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&tls.certificate_pem)
        .collect::<Result<_, _>>()
        .map_err(|cause| error(&at, format!("not a PEM certificate chain: {cause}")))?;
    let key_at = tls.private_key_path.display().to_string();
    let key = PrivateKeyDer::from_pem_slice(&tls.private_key_pem.0).map_err(|cause| {
        error(&key_at, format!("not a PEM private key: {cause}\n  hint: PKCS #8, PKCS #1 and SEC 1 are read"))
    })?;
    let certificate = certificates.first().and_then(certificate::read).map(Arc::new);
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|cause| error(&at, cause.to_string()))?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(|cause| {
            error(&at, format!("certificate and private key ({key_at}) do not work together: {cause}\n  hint: check that the key is this certificate's"))
        })?;
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(ServerTls { acceptor: TlsAcceptor::from(Arc::new(config)), certificate })
}

fn connector(
    upstream: &str,
    tls: &portcullis_config::UpstreamTls,
    alpn: &[&[u8]],
    system_roots: &mut Option<Arc<rustls::RootCertStore>>,
) -> Result<UpstreamTls, PlanError> {
    let roots = match &tls.ca {
        Some(authorities) => {
            let at = authorities.path.display().to_string();
            let mut roots = rustls::RootCertStore::empty();
            for certificate in CertificateDer::pem_slice_iter(&authorities.pem) {
                let certificate = certificate.map_err(|cause| error(&at, format!("not a PEM certificate: {cause}")))?;
                roots
                    .add(certificate)
                    .map_err(|cause| error(&at, format!("not a certificate of an authority: {cause}")))?;
            }
            Arc::new(roots)
        }
        None => Arc::clone(match system_roots {
            Some(roots) => roots,
            None => system_roots.insert(load_system_roots(upstream)?),
        }),
    };
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|cause| error(format!("upstream `{upstream}`"), cause.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    let server_name = ServerName::try_from(tls.server_name.clone()).map_err(|_| {
        error(format!("upstream `{upstream}`"), format!("`{}` is no name a certificate can have", tls.server_name))
    })?;
    Ok(UpstreamTls { connector: TlsConnector::from(Arc::new(config)), server_name })
}

fn load_system_roots(upstream: &str) -> Result<Arc<rustls::RootCertStore>, PlanError> {
    let loaded = rustls_native_certs::load_native_certs();
    let mut roots = rustls::RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(loaded.certs);
    if added == 0 {
        return Err(error(
            format!("upstream `{upstream}`"),
            "this machine trusts no certificate authority\n  hint: install the package `ca-certificates`, or name the \
             authorities with `tls.ca`",
        ));
    }
    Ok(Arc::new(roots))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

#[cfg(test)]
mod tests {
    use portcullis_abi::{Engine, EngineOptions};
    use portcullis_config::{CALLBACKS, HOST_FUNCTIONS};

    use super::*;

    /// A function that the host has and the policy does not know could be neither allowed nor, in Envoy, be called.
    #[test]
    fn policies_know_every_function_and_callback_that_the_host_has() {
        let engine = Engine::new(&EngineOptions::default()).expect("an engine");
        let known: BTreeSet<&str> = HOST_FUNCTIONS.iter().copied().collect();
        assert_eq!(known, engine.host_functions());
        assert_eq!(known.len(), HOST_FUNCTIONS.len(), "each is there once");
        let callbacks: BTreeSet<&str> = CALLBACKS.iter().copied().collect();
        let missing: Vec<_> = engine.callbacks().into_iter().filter(|name| !callbacks.contains(name)).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
