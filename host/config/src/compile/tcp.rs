//! Listeners that forward TCP connections: where to, through which filters, and what of a policy is about requests and so
//! has no meaning there.

use std::collections::BTreeSet;

use super::{Compiler, References};
use crate::file::{self, Protocol};
use crate::policy::{Service, TcpForward};

impl Compiler<'_> {
    /// What a listener does; `None` if what it names is not there.
    pub(super) fn service(
        &mut self,
        path: &str,
        listener: &str,
        has_tls: bool,
        tcp: Option<file::TcpForward>,
        references: &mut References,
    ) -> Option<Service> {
        let Some(tcp) = tcp else { return Some(Service::Http) };
        // With TLS, `header_timeout` is the time for its handshake.
        let header_timeout = (!has_tls).then_some("header_timeout");
        let limits = ["header_bytes", "header_count", "request_timeout", "stream_idle_timeout"];
        for limit in limits.into_iter().chain(header_timeout) {
            self.without_effect(
                &format!("{path}.limits.{limit}"),
                format!("a TCP connection has no requests, so `{limit}` has no effect"),
            );
        }
        let filters = self.tcp_filters(&format!("{path}.tcp.filters"), tcp.filters, references);
        let upstream = self.find(&format!("{path}.tcp.upstream"), &tcp.upstream, &references.upstreams)?;
        references.tcp_upstreams.entry(upstream).or_insert_with(|| listener.to_owned());
        Some(Service::Tcp(TcpForward { upstream, filters }))
    }

    fn tcp_filters(&mut self, path: &str, written: Option<Vec<String>>, references: &References) -> Vec<usize> {
        let Some(names) = written else {
            return references.filters_of(Protocol::Tcp).collect();
        };
        let mut chosen = BTreeSet::new();
        for (index, name) in names.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let Some(found) = self.find(&path, name, &references.filters) else { continue };
            if references.protocols.get(found) != Some(&Protocol::Tcp) {
                self.wrong(
                    &path,
                    format!("`{name}` looks at HTTP requests, of which a TCP connection has none"),
                    format!("give it `protocol: tcp` if its module handles TCP connections, or remove `{name}`"),
                );
            } else if !chosen.insert(found) {
                self.wrong(&path, format!("the filter `{name}` is in the list twice"), "keep one of the two");
            }
        }
        chosen.into_iter().collect()
    }

    /// An upstream carries requests or TCP connections: TLS, for one, announces what it is (ALPN).
    pub(super) fn carries_requests(&mut self, path: &str, upstream: usize, references: &References) {
        let Some(listener) = references.tcp_upstreams.get(&upstream) else { return };
        let name = references.upstreams.names.get(upstream).map_or("", String::as_str);
        self.wrong(
            path,
            format!("`{name}` carries the TCP connections of listener `{listener}`, so it cannot be sent requests"),
            format!("add an upstream with the same endpoints under another name than `{name}`"),
        );
    }

    /// What is said about requests to an upstream that gets none.
    pub(super) fn tcp_upstream(&mut self, path: &str, listener: &str) {
        for setting in ["http2", "request_timeout"] {
            let problem = format!(
                "the upstream carries the TCP connections of listener `{listener}`, so `{setting}` has no effect"
            );
            self.without_effect(&format!("{path}.{setting}"), problem);
        }
    }

    /// What is said about requests in a filter that sees none.
    pub(super) fn tcp_filter(&mut self, path: &str) {
        for setting in ["allow_on_headers_stop_iteration", "settable_fields"] {
            let problem = format!("a filter with `protocol: tcp` sees no requests, so `{setting}` has no effect");
            self.without_effect(&format!("{path}.{setting}"), problem);
        }
    }

    /// A filter that nothing would ever reach protects nothing; neither does a route.
    pub(super) fn served(&mut self, references: &References, has_routes: bool) {
        if has_routes && references.serves_http == Some(false) {
            self.wrong(
                "routes",
                "every listener forwards TCP connections, so no request ever comes to a route",
                "remove `routes`, or add a listener without `tcp`",
            );
        }
        for (protocol, served, problem, hint) in [
            (
                Protocol::Http,
                references.serves_http,
                "looks at HTTP requests, but every listener forwards TCP connections",
                "give it `protocol: tcp` if its module handles TCP connections, or remove it",
            ),
            (
                Protocol::Tcp,
                references.serves_tcp,
                "looks at TCP connections, but no listener forwards any",
                "add a listener with `tcp: { upstream: NAME }`, or remove it",
            ),
        ] {
            if served != Some(false) {
                continue;
            }
            for index in references.filters_of(protocol) {
                let name = references.filters.names.get(index).map_or("", String::as_str);
                self.wrong(&format!("filters[{index}]"), format!("`{name}` {problem}"), hint);
            }
        }
    }

    /// A setting that is written where it means nothing.
    fn without_effect(&mut self, path: &str, problem: String) {
        if self.root.holds(path) {
            let key = path.rsplit('.').next().unwrap_or(path);
            self.wrong(path, problem, format!("remove `{key}`"));
        }
    }
}
