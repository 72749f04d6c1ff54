//! Listeners, the admin endpoints, and the proxies in front.
//!
//! Addresses are compared with each other, not bound: a port that another program has shows when a host starts.

use std::net::{IpAddr, SocketAddr};

use super::names::network;
use super::{Compiler, References, owned, present};
use crate::file;
use crate::policy::{Listener, ListenerLimits, ListenerTls, Network, Secret};
use crate::units::{Size, Time};

impl Compiler<'_> {
    pub(super) fn trusted_proxies(&mut self, written: &[Option<String>]) -> Vec<Network> {
        let mut networks = Vec::new();
        for (index, text) in written.iter().enumerate() {
            let path = format!("trusted_proxies[{index}]");
            let Some(text) = text else { continue };
            match network(text) {
                Ok(network) => networks.push(network),
                Err((problem, hint)) => self.wrong(&path, problem, hint),
            }
        }
        networks
    }

    fn address(&mut self, path: &str, text: &str) -> Option<SocketAddr> {
        if let Ok(address) = text.parse() {
            return Some(address);
        }
        let hint = if text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4()) {
            format!("add a port, e.g. `{text}:8080`")
        } else if text.parse::<IpAddr>().is_ok() {
            format!("put it in brackets and add a port, e.g. `[{text}]:8080`")
        } else if let Some(port) = text.strip_prefix("localhost:") {
            format!("names are not looked up here; write `127.0.0.1:{port}`")
        } else if let Some(port) = text.strip_prefix(':').or_else(|| text.strip_prefix("*:")) {
            format!("for every address of this machine write `0.0.0.0:{port}` or `[::]:{port}`")
        } else {
            "write an IP address and a port up to 65535, e.g. `127.0.0.1:8080` or `[::1]:8080`".to_owned()
        };
        self.wrong(path, format!("`{text}` is not an address to listen on"), hint);
        None
    }

    pub(super) fn admin(&mut self, admin: &file::Admin) -> Option<SocketAddr> {
        let address = self.address("admin.address", &admin.address)?;
        if !address.ip().is_loopback() && !admin.dangerously_allow_remote {
            self.wrong(
                "admin.address",
                format!("`{address}` can be reached by other machines, and the admin endpoints have no authentication"),
                format!("write `127.0.0.1:{}`", address.port()),
            );
        }
        Some(address)
    }

    pub(super) fn listeners(
        &mut self,
        written: Vec<Option<file::Listener>>,
        admin: Option<SocketAddr>,
        references: &mut References,
    ) -> Vec<Listener> {
        if written.is_empty() && self.root_has("listeners") {
            self.wrong(
                "listeners",
                "the list is empty, so nothing would be served",
                "add e.g. `{ name: public, address: \"127.0.0.1:8080\" }`",
            );
        }
        self.unique_names("listeners", present(&written).map(|(index, listener)| (index, listener.name.as_str())));
        let mut used: Vec<(SocketAddr, String)> =
            admin.map(|address| (address, "`admin`".to_owned())).into_iter().collect();
        let mut listeners = Vec::new();
        for (index, listener) in owned(written) {
            let path = format!("listeners[{index}]");
            let has_tls = listener.tls.is_some();
            let tls = listener.tls.and_then(|tls| self.listener_tls(&format!("{path}.tls"), &tls));
            let limits = self.listener_limits(&format!("{path}.limits"), &listener.limits, listener.tcp.is_some());
            let service = self.service(&path, &listener.name, has_tls, listener.tcp, references);
            let Some(address) = self.address(&format!("{path}.address"), &listener.address) else {
                continue;
            };
            if let Some((_, user)) = used.iter().find(|(other, _)| collide(*other, address)) {
                self.wrong(
                    &format!("{path}.address"),
                    format!("`{address}` is already taken by {user}"),
                    "give each its own port",
                );
            }
            used.push((address, format!("listener `{}`", listener.name)));
            if let Some(service) = service {
                listeners.push(Listener { name: listener.name, address, tls, service, limits });
            }
        }
        listeners
    }

    fn listener_tls(&mut self, path: &str, tls: &file::ListenerTls) -> Option<ListenerTls> {
        let certificate = self.pem(&format!("{path}.certificate"), &tls.certificate, "CERTIFICATE");
        let private_key = self.pem(&format!("{path}.private_key"), &tls.private_key, "PRIVATE KEY");
        let (certificate_path, certificate_pem) = certificate?;
        let (private_key_path, private_key_pem) = private_key?;
        Some(ListenerTls {
            certificate_path,
            certificate_pem,
            private_key_path,
            private_key_pem: Secret(private_key_pem),
        })
    }

    fn listener_limits(&mut self, path: &str, limits: &file::ListenerLimits, tcp: bool) -> ListenerLimits {
        let idle_timeout = limits.idle_timeout.unwrap_or(if tcp { Time::secs(3600) } else { Time::secs(60) });
        let at = |field: &str| format!("{path}.{field}");
        self.size(&at("header_bytes"), limits.header_bytes, Size::kib(1), Size::mib(8));
        if !limits.header_bytes.0.is_multiple_of(1024) {
            self.wrong(
                &at("header_bytes"),
                format!("`{}` is not a whole number of KiB", limits.header_bytes),
                format!("use `{}KiB`", limits.header_bytes.0.div_ceil(1024)),
            );
        }
        self.count(&at("header_count"), limits.header_count, 1, 1000);
        self.count(&at("max_connections"), limits.max_connections, 1, 10_000_000);
        ListenerLimits {
            header_bytes: limits.header_bytes.as_usize(),
            header_count: limits.header_count as usize,
            header_timeout: self.time(&at("header_timeout"), limits.header_timeout, Time::secs(3600)),
            request_timeout: self.time(&at("request_timeout"), limits.request_timeout, Time::secs(86_400)),
            idle_timeout: self.time(&at("idle_timeout"), idle_timeout, Time::secs(86_400)),
            stream_idle_timeout: self.time(&at("stream_idle_timeout"), limits.stream_idle_timeout, Time::secs(86_400)),
            max_connections: limits.max_connections as usize,
        }
    }
}

/// Whether two listeners cannot both have their address: same port, and same IP or one that stands for all.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    // An IPv6 wildcard socket takes IPv4 connections as well, unless told otherwise; we do not tell it.
    let same_family = a.is_ipv4() == b.is_ipv4();
    let ip = if same_family {
        a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified()
    } else {
        (a.is_ipv6() && a.ip().is_unspecified()) || (b.is_ipv6() && b.ip().is_unspecified())
    };
    a.port() != 0 && a.port() == b.port() && ip
}
