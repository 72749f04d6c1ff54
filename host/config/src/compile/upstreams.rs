//! Upstreams. Host names are not looked up here: that is done, again and again, while running.

use std::net::{IpAddr, SocketAddr};

use super::names::{host_port, is_dns_name};
use super::{Compiler, References};
use crate::file;
use crate::policy::{Authorities, Endpoint, HostPort, Upstream, UpstreamTls};
use crate::units::Time;

impl Compiler<'_> {
    pub(super) fn upstreams(
        &mut self,
        written: Vec<(String, Option<file::Upstream>)>,
        references: &References,
    ) -> Vec<Upstream> {
        let mut upstreams = Vec::new();
        for (index, (name, upstream)) in written.into_iter().enumerate() {
            let path = format!("upstreams.{name}");
            self.key(&path, &name);
            let tcp = references.tcp_upstreams.get(&index);
            if let Some(listener) = tcp {
                self.tcp_upstream(&path, listener);
            }
            // A place is kept for what could not be read, so that indices stay those of the names.
            let upstream = upstream.unwrap_or_else(|| file::Upstream {
                endpoints: vec!["127.0.0.1:1".to_owned()],
                tls: None,
                connect_timeout: Time::secs(1),
                request_timeout: Time::secs(1),
                max_connections: 1,
                http2: false,
            });
            upstreams.push(self.upstream(&path, name, &upstream, tcp.is_some()));
        }
        upstreams
    }

    fn upstream(&mut self, path: &str, name: String, upstream: &file::Upstream, tcp: bool) -> Upstream {
        let at = |field: &str| format!("{path}.{field}");
        let mut endpoints: Vec<Endpoint> = Vec::new();
        for (index, text) in upstream.endpoints.iter().enumerate() {
            let path = format!("{path}.endpoints[{index}]");
            match self.endpoint(text) {
                Ok(endpoint) if endpoints.contains(&endpoint) => {
                    self.wrong(&path, format!("`{text}` is in the list twice"), "keep one of the two");
                }
                Ok(endpoint) => endpoints.push(endpoint),
                Err(hint) => self.wrong(&path, format!("`{text}` is not an endpoint"), hint),
            }
        }
        if upstream.endpoints.is_empty() {
            self.wrong(&at("endpoints"), "the list is empty", "add e.g. `\"127.0.0.1:9000\"`");
        }
        let named = endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Name { .. }));
        let unix = endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Unix(_)));
        if named && unix {
            self.wrong(&at("endpoints"), "host names and Unix sockets are mixed", "make two upstreams of them");
        }
        self.count(&at("max_connections"), upstream.max_connections, 1, 10_000_000);
        let tls = upstream.tls.as_ref().and_then(|tls| self.upstream_tls(&at("tls"), tls, &endpoints));
        Upstream {
            name,
            endpoints,
            tls,
            connect_timeout: self.time(&at("connect_timeout"), upstream.connect_timeout, Time::secs(300)),
            request_timeout: self.time(&at("request_timeout"), upstream.request_timeout, Time::secs(86_400)),
            max_connections: upstream.max_connections as usize,
            http2: upstream.http2,
            tcp,
        }
    }

    fn endpoint(&self, text: &str) -> Result<Endpoint, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = self.files.resolve(path);
            // sun_path has 108 bytes, the last of which is NUL.
            return if path.as_os_str().len() < 108 && !path.as_os_str().is_empty() {
                Ok(Endpoint::Unix(path))
            } else {
                Err("the path of a Unix socket has at most 107 bytes".to_owned())
            };
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 {
                Err("port 0 cannot be connected to".to_owned())
            } else {
                Ok(Endpoint::Address(address))
            };
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            return Err(
                "leave out the scheme: write `name:port`, and `tls: {}` beside `endpoints` for HTTPS".to_owned()
            );
        }
        host_port(text)
            .map(|HostPort { host, port }| Endpoint::Name { host, port })
            .ok_or_else(|| "write `address:port`, `name:port` or `unix:/path`, e.g. `10.0.0.5:9000`".to_owned())
    }

    fn upstream_tls(&mut self, path: &str, tls: &file::UpstreamTls, endpoints: &[Endpoint]) -> Option<UpstreamTls> {
        let ca = match &tls.ca {
            Some(ca) => {
                let (path, pem) = self.pem(&format!("{path}.ca"), ca, "CERTIFICATE")?;
                Some(Authorities { path, pem })
            }
            None => None,
        };
        if let Some(server_name) = &tls.server_name {
            if !is_dns_name(server_name) && server_name.parse::<IpAddr>().is_err() {
                self.wrong(
                    &format!("{path}.server_name"),
                    format!("`{server_name}` is neither a host name nor an IP address"),
                    "write e.g. `orders.internal`, without a port",
                );
            }
            return Some(UpstreamTls { server_name: server_name.clone(), ca });
        }
        let mut hosts: Vec<String> = endpoints
            .iter()
            .map(|endpoint| match endpoint {
                Endpoint::Name { host, .. } => host.clone(),
                Endpoint::Address(address) => address.ip().to_string(),
                Endpoint::Unix(_) => String::new(),
            })
            .collect();
        hosts.dedup();
        match hosts.as_slice() {
            [host] if !host.is_empty() => Some(UpstreamTls { server_name: host.clone(), ca }),
            [] => None,
            _ => {
                self.wrong(
                    path,
                    "the endpoints do not share one host name that the certificate could have",
                    "add `server_name: NAME`",
                );
                None
            }
        }
    }
}
