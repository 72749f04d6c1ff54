//! Outgoing requests of operators: who may go where, checked after resolution, and with secrets put in on the way.
//!
//! The operator's process has no network. It hands a request to the host, which decides by name and port, resolves the
//! name, checks every address, connects to an address that was checked (never resolving again), and speaks TLS itself.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, Uri, Version};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::body::{BodyError, Metered, find_cut, is_too_long};
use crate::config::Limits;

/// A value that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(HeaderValue);

impl Secret {
    /// The text of a file without its final line break; none when it is empty or cannot stand in a header.
    pub(crate) fn new(mut text: Vec<u8>) -> Option<Self> {
        while matches!(text.last(), Some(b'\n' | b'\r')) {
            text.pop();
        }
        let mut value = HeaderValue::from_bytes(&text).ok().filter(|value| !value.is_empty())?;
        value.set_sensitive(true);
        Some(Self(value))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(..)")
    }
}

type Destination = (String, u16);

/// Where an operator may go, and which secrets it may use there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Grants {
    /// The value says whether private addresses are meant.
    destinations: BTreeMap<Destination, bool>,
    secrets: BTreeMap<String, (Secret, Vec<Destination>)>,
}

impl Grants {
    /// Adds `host:port`. What is wrong with it is told with a hint.
    pub(crate) fn allow(&mut self, text: &str, private: bool) -> Result<(), (String, &'static str)> {
        let destination = destination(text)
            .ok_or_else(|| (format!("`{text}` is not `host:port`"), "write e.g. `api.example.com:443`"))?;
        // Requests to these would be refused for their addresses, whatever is granted.
        let is_local_name = destination.0 == "localhost" || destination.0.ends_with(".localhost");
        if !private && (is_local_name || destination.0.parse::<IpAddr>().is_ok_and(|address| !is_public(address))) {
            return Err((
                format!("`{text}` is not a public address"),
                "write it in `permissions.private_net`, if it is a service of your own network that is meant",
            ));
        }
        *self.destinations.entry(destination).or_default() |= private;
        Ok(())
    }

    pub(crate) fn is_granted(&self, text: &str) -> bool {
        destination(text).is_some_and(|destination| self.destinations.contains_key(&destination))
    }

    pub(crate) fn add_secret(&mut self, name: &str, value: Secret, to: &[String]) {
        let to = to.iter().filter_map(|text| destination(text)).collect();
        self.secrets.insert(name.to_owned(), (value, to));
    }

    /// What an operator sees instead of its secrets.
    pub(crate) fn placeholders(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.secrets.keys().map(|name| (name.clone(), placeholder(name)))
    }

    /// Replaces placeholders of secrets that may go to this destination. One that may not is an error, so that nobody
    /// wonders why a service rejects `{{secret:...}}`.
    fn put_secrets_in(&self, to: &Destination, headers: &mut HeaderMap) -> Result<(), Refusal> {
        if self.secrets.is_empty() {
            return Ok(());
        }
        for value in headers.values_mut() {
            for (name, (secret, destinations)) in &self.secrets {
                let mark = placeholder(name);
                if !contains(value.as_bytes(), mark.as_bytes()) {
                    continue;
                }
                if !destinations.contains(to) {
                    return Err(Refusal::new(
                        "secret",
                        format!("secret `{name}` may not go to {}:{}; add it to the secret's `hosts`", to.0, to.1),
                    ));
                }
                let replaced = replace(value.as_bytes(), mark.as_bytes(), secret.0.as_bytes());
                let mut replaced = HeaderValue::from_bytes(&replaced)
                    .map_err(|_| Refusal::new("secret", format!("secret `{name}` cannot stand in this header")))?;
                replaced.set_sensitive(true);
                *value = replaced;
            }
        }
        Ok(())
    }
}

fn placeholder(name: &str) -> String {
    format!("{{{{secret:{name}}}}}")
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn replace(text: &[u8], part: &[u8], with: &[u8]) -> Vec<u8> {
    let mut result = Vec::with_capacity(text.len() + with.len());
    let mut rest = text;
    while let Some(at) = rest.windows(part.len()).position(|window| window == part) {
        result.extend_from_slice(rest.get(..at).unwrap_or_default());
        result.extend_from_slice(with);
        rest = rest.get(at + part.len()..).unwrap_or_default();
    }
    result.extend_from_slice(rest);
    result
}

fn destination(text: &str) -> Option<Destination> {
    let (host, port) = text.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|port| *port != 0)?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|address| address.parse::<Ipv6Addr>().is_ok())?,
        None if host.contains(':') => return None,
        None => host,
    };
    normal_host(host).map(|host| (host, port))
}

fn normal_host(host: &str) -> Option<String> {
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b':');
    (!host.is_empty() && host.len() <= 253 && host.bytes().all(allowed)).then_some(host)
}

/// Whether an address belongs to the public Internet. Everything that the registries set aside is refused: the list is
/// about what is not known to be public, not about what is known to be private.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let set_aside = matches!(a, 0 | 10 | 127 | 224..=255)
        || (a == 100 && (64..128).contains(&b)) // shared by providers (RFC 6598)
        || (a == 169 && b == 254) // link-local, where clouds keep their metadata
        || (a == 172 && (16..32).contains(&b))
        || (a == 192 && b == 168)
        || (a == 192 && b == 0 && (c == 0 || c == 2))
        || (a == 192 && b == 88 && c == 99) // 6to4 relays
        || (a == 198 && (b == 18 || b == 19)) // benchmarks
        || (a == 198 && b == 51 && c == 100)
        || (a == 203 && b == 0 && c == 113)
        || (a == 168 && b == 63 && address.octets()[2..] == [129, 16]); // Azure's metadata
    !set_aside
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let s = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    if address.to_ipv4_mapped().is_some() || s[..6] == [0; 6] || (s[..4] == [0; 4] && s[4] == 0xffff) {
        return embedded(s[6], s[7]);
    }
    if s[..6] == [0x64, 0xff9b, 0, 0, 0, 0] {
        return embedded(s[6], s[7]); // NAT64
    }
    if s[0] == 0x2002 {
        return embedded(s[1], s[2]); // 6to4
    }
    // Global unicast, without documentation, benchmarks, ORCHID and Teredo (2001::/23 and neighbours).
    (0x2000..0x4000).contains(&s[0])
        && !(s[0] == 0x2001 && (s[1] < 0x200 || s[1] == 0xdb8))
        && !(s[0] == 0x3fff && s[1] < 0x1000)
}

/// A refusal or failure that the operator's own code gets to see as an exception.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Stable, for metrics.
    pub(crate) reason: &'static str,
    /// For the author.
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

type Resolved<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'a>>;

/// Turns a host name into addresses.
pub trait Resolve: Send + Sync + fmt::Debug {
    /// All addresses of the name.
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> Resolved<'a>;
}

/// The system's resolver.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> Resolved<'a> {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
    }
}

/// Carries out what [`Grants`] allow.
#[derive(Clone)]
pub(crate) struct Egress {
    resolver: Arc<dyn Resolve>,
    tls: tokio_rustls::TlsConnector,
}

impl fmt::Debug for Egress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Egress").field("resolver", &self.resolver).finish_non_exhaustive()
    }
}

/// Fields that describe one connection, or that only the host may set.
pub(crate) fn is_hop_by_hop(name: &HeaderName) -> bool {
    const NAMES: [&str; 9] = [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    NAMES.contains(&name.as_str())
}

/// Removes hop-by-hop fields, also those that `Connection` names, and everything in our own name space.
pub(crate) fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(http::header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    let unwanted: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_hop_by_hop(name) || name.as_str().starts_with("x-portcullis-"))
        .cloned()
        .collect();
    for name in unwanted {
        headers.remove(name);
    }
}

pub(crate) const URL_FIELD: HeaderName = HeaderName::from_static("x-portcullis-url");

impl Egress {
    pub(crate) fn new(resolver: Arc<dyn Resolve>, extra_roots: Option<&std::path::Path>) -> io::Result<Self> {
        let mut roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let Some(path) = extra_roots {
            use rustls::pki_types::pem::PemObject;
            let certificates = rustls::pki_types::CertificateDer::pem_file_iter(path).map_err(io::Error::other)?;
            for certificate in certificates {
                roots.add(certificate.map_err(io::Error::other)?).map_err(io::Error::other)?;
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { resolver, tls: Arc::new(tls).into() })
    }

    /// Carries one outgoing request out.
    pub(crate) async fn fetch(
        &self,
        grants: &Grants,
        limits: &Limits,
        request: Request<Incoming>,
    ) -> Result<Response<UnsyncBoxBody<Bytes, BodyError>>, Refusal> {
        let deadline = Instant::now() + limits.subrequest;
        let late = || Refusal::new("subrequest_time", "the outgoing request took longer than allowed");
        tokio::time::timeout_at(deadline, self.fetch_until(grants, limits, request, deadline))
            .await
            .unwrap_or_else(|_| Err(late()))
    }

    async fn fetch_until(
        &self,
        grants: &Grants,
        limits: &Limits,
        request: Request<Incoming>,
        deadline: Instant,
    ) -> Result<Response<UnsyncBoxBody<Bytes, BodyError>>, Refusal> {
        let (mut parts, body) = request.into_parts();
        let target = Target::parse(parts.headers.get(&URL_FIELD))?;
        let Some(private) = grants.destinations.get(&target.destination).copied() else {
            let (host, port) = &target.destination;
            let shown = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
            return Err(Refusal::new("net", format!("needs net {shown}; add `{shown}` to its `permissions.net`")));
        };
        if is_too_long(body.size_hint().exact(), limits.subrequest_bytes) {
            return Err(too_long("request", limits.subrequest_bytes));
        }
        strip(&mut parts.headers);
        parts.headers.remove(HOST);
        parts.headers.insert(HOST, target.host_field.clone());
        grants.put_secrets_in(&target.destination, &mut parts.headers)?;
        parts.uri = target.origin_form.clone();
        parts.version = Version::HTTP_11;
        let body = Metered::new(body, limits.subrequest_bytes, deadline);

        let address = self.checked_address(&target.destination, private).await?;
        let failed = |error: &dyn fmt::Display| {
            let (host, port) = &target.destination;
            Refusal::new("connect", format!("cannot reach {host}:{port}: {error}"))
        };
        let stream = TcpStream::connect(address).await.map_err(|error| failed(&error))?;
        let _ = stream.set_nodelay(true);
        let request = Request::from_parts(parts, body);
        let response = if target.tls {
            let name = ServerName::try_from(target.destination.0.clone()).map_err(|error| failed(&error))?;
            let stream = self.tls.connect(name, stream).await.map_err(|error| failed(&error))?;
            exchange(TokioIo::new(stream), request).await
        } else {
            exchange(TokioIo::new(stream), request).await
        };
        let mut response = response.map_err(|error| match find_cut(&error) {
            Some(_) => too_long("request", limits.subrequest_bytes),
            None => failed(&error),
        })?;
        if is_too_long(response.body().size_hint().exact(), limits.subresponse_bytes) {
            return Err(too_long("response", limits.subresponse_bytes));
        }
        strip(response.headers_mut());
        Ok(response.map(|body| Metered::new(body, limits.subresponse_bytes, deadline).boxed_unsync()))
    }

    async fn checked_address(&self, destination: &Destination, private: bool) -> Result<SocketAddr, Refusal> {
        let (host, port) = destination;
        let unknown = || Refusal::new("resolve", format!("{host} cannot be resolved"));
        let addresses = match host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, *port)],
            Err(_) => self.resolver.resolve(host, *port).await.map_err(|_| unknown())?,
        };
        if addresses.is_empty() {
            return Err(unknown());
        }
        // The port comes from the grant, whatever a resolver says.
        let fitting = addresses.iter().find(|address| private || is_public(address.ip()));
        fitting.map(|address| SocketAddr::new(address.ip(), *port)).ok_or_else(|| {
            Refusal::new(
                "private_address",
                format!(
                    "{host} is at a private address; if that is meant, add `{host}:{port}` to its `permissions.private_net`"
                ),
            )
        })
    }
}

fn too_long(which: &str, limit: u64) -> Refusal {
    Refusal::new("subrequest_bytes", format!("the body of the outgoing {which} is longer than {limit} bytes"))
}

async fn exchange<S>(stream: S, request: Request<Metered<Incoming>>) -> hyper::Result<Response<Incoming>>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::Builder::new().max_headers(128).max_buf_size(64 << 10).handshake(stream).await?;
    // Ends with the exchange: the sender is dropped and the body's reader, too.
    tokio::spawn(async move { drop(connection.await) });
    sender.send_request(request).await
}

struct Target {
    tls: bool,
    destination: Destination,
    host_field: HeaderValue,
    origin_form: Uri,
}

impl Target {
    fn parse(field: Option<&HeaderValue>) -> Result<Self, Refusal> {
        let invalid = || Refusal::new("url", "the address of the outgoing request is not usable");
        let uri: Uri =
            field.and_then(|value| value.to_str().ok()).and_then(|value| value.parse().ok()).ok_or_else(invalid)?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(invalid()),
        };
        let authority = uri.authority().filter(|authority| !authority.as_str().contains('@')).ok_or_else(invalid)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let host = normal_host(host).ok_or_else(invalid)?;
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let host_field = HeaderValue::from_str(authority.as_str()).map_err(|_| invalid())?;
        let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        Ok(Self { tls, destination: (host, port), host_field, origin_form: path.parse().map_err(|_| invalid())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_are_not_public() {
        let private = [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "192.0.2.1",
            "198.18.0.1",
            "203.0.113.5",
            "224.0.0.1",
            "255.255.255.255",
            "168.63.129.16",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001:db8::1",
            "2001::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "3fff::1",
            "100::1",
        ];
        for address in private {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn addresses_that_are_public() {
        for address in ["1.1.1.1", "100.128.0.1", "172.32.0.1", "192.0.3.1", "2606:4700::1111", "64:ff9b::101:101"] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn destinations_are_exact() {
        let mut grants = Grants::default();
        grants.allow("API.Example.com.:443", false).unwrap();
        grants.allow("[::1]:80", true).unwrap();
        assert!(grants.is_granted("api.example.com:443"));
        assert!(grants.is_granted("[::1]:80"));
        for other in ["example.com:443", "x.api.example.com:443", "api.example.com:80", "api.example.com", ""] {
            assert!(!grants.is_granted(other), "{other}");
        }
        for bad in ["a", "a:0", "a:65536", "a b:1", "::1:80", "[::1:80", "a/b:1", ":1", "*:1"] {
            assert!(grants.allow(bad, true).is_err(), "{bad}");
        }
        for local in ["127.0.0.1:80", "[::1]:80", "localhost:80", "Api.LOCALHOST.:80"] {
            let (problem, hint) = grants.allow(local, false).unwrap_err();
            assert_eq!(problem, format!("`{local}` is not a public address"));
            assert!(hint.contains("permissions.private_net"));
        }
    }

    #[test]
    fn a_secret_goes_only_where_it_may() {
        let mut grants = Grants::default();
        grants.add_secret("KEY", Secret::new(b"s3cret\n".to_vec()).unwrap(), &["a.example:443".to_owned()]);
        let fields =
            || HeaderMap::from_iter([(http::header::AUTHORIZATION, HeaderValue::from_static("Bearer {{secret:KEY}}"))]);
        let mut headers = fields();
        grants.put_secrets_in(&("a.example".to_owned(), 443), &mut headers).unwrap();
        assert_eq!(headers.get("authorization").unwrap(), "Bearer s3cret");
        assert!(!format!("{headers:?} {grants:?}").contains("s3cret"));
        let mut headers = fields();
        let refusal = grants.put_secrets_in(&("b.example".to_owned(), 443), &mut headers).unwrap_err();
        assert!(refusal.message.contains("may not go to b.example:443"));
        assert_eq!(headers.get("authorization").unwrap(), "Bearer {{secret:KEY}}");
    }

    #[test]
    fn a_secret_with_a_line_break_inside_is_refused() {
        assert_eq!(Secret::new(b"a\r\nx: y".to_vec()), None);
        assert_eq!(Secret::new(b"\n".to_vec()), None);
    }

    #[test]
    fn fields_of_one_connection_are_removed() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("x-portcullis-sub", "admin"),
            ("x-kept", "1"),
        ] {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_static(value));
        }
        strip(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-kept"]);
    }

    #[test]
    fn addresses_with_tricks_are_not_usable() {
        for bad in ["ftp://a/", "http://u:p@a/", "/a", "http://", "http://a b/", "https://%61/"] {
            let value = HeaderValue::from_str(bad).unwrap();
            assert!(Target::parse(Some(&value)).is_err(), "{bad}");
        }
        assert!(Target::parse(None).is_err());
    }
}
