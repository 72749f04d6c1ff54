//! From hyper's messages to the fields that filters see, and back.
//!
//! What a client says about its connection ends here: hop-by-hop fields (RFC 9110, section 7.6.1) go, the authority is
//! checked, the target is normalised, and what the proxy itself vouches for (`x-forwarded-for`, `x-forwarded-proto`,
//! `x-request-id`) is written before any filter runs. On the way out, whatever filters wrote is checked again: an
//! invalid name or value can only be a filter's, and such a message is not sent.

use std::net::{IpAddr, SocketAddr};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode, Uri, Version};
use portcullis_abi::{FieldMap, Message};
use portcullis_config::{FieldLines, Network, Target};

/// A request refused before any filter sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) details: &'static str,
    pub(crate) text: &'static str,
}

const fn refusal(status: u16, details: &'static str, text: &'static str) -> Refusal {
    Refusal { status, details, text }
}

/// What is known of a request beside its head.
pub(crate) struct Arrival<'a> {
    pub(crate) peer: SocketAddr,
    pub(crate) tls: bool,
    pub(crate) trusted_proxies: &'a [Network],
    pub(crate) fields_max: usize,
    pub(crate) request_id: &'a str,
}

impl Arrival<'_> {
    fn trusts(&self, address: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|network| network.contains(address))
    }

    fn is_from_trusted_proxy(&self) -> bool {
        self.trusts(self.peer.ip())
    }
}

/// A request as filters get it.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) fields: FieldMap,
    pub(crate) target: Target,
    /// The client, as far as the proxies in front of us are believed.
    pub(crate) client: SocketAddr,
}

/// Reads a request's head.
pub(crate) fn inbound(head: &http::request::Parts, arrival: &Arrival<'_>) -> Result<Inbound, Refusal> {
    const MALFORMED: &str = "malformed_request";
    if head.method == Method::CONNECT {
        return Err(refusal(403, "upgrade_failed", "CONNECT is not supported"));
    }
    if head.headers.len() > arrival.fields_max {
        return Err(refusal(431, "http2.headers_too_large", "too many request fields"));
    }
    let connection = Connection::of(&head.headers);
    if connection.upgrade && head.version < Version::HTTP_2 {
        return Err(refusal(403, "upgrade_failed", "protocol upgrades are not supported"));
    }
    for expectation in head.headers.get_all(http::header::EXPECT) {
        // hyper sends `100 Continue` by itself, as soon as the body is wanted.
        if !expectation.as_bytes().eq_ignore_ascii_case(b"100-continue") {
            return Err(refusal(417, "expectation_unknown", "unknown expectation"));
        }
    }
    let authority = authority(head).ok_or(refusal(400, MALFORMED, "invalid host"))?;
    let target = target(&head.uri).ok_or(refusal(400, "path_normalization_failed", "invalid request target"))?;

    let scheme = if arrival.tls { "https" } else { "http" };
    let mut fields = FieldMap::with_capacity(head.headers.len() + 8, 512);
    fields.push(b":authority", &authority);
    fields.push(b":path", target.as_bytes());
    fields.push(b":method", head.method.as_str().as_bytes());
    fields.push(b":scheme", scheme.as_bytes());
    let (mut cookies_joined, mut te_said) = (false, false);
    for (name, value) in &head.headers {
        let bytes = name.as_str().as_bytes();
        if *name == http::header::TE && connection.trailers && !std::mem::replace(&mut te_said, true) {
            fields.push(b"te", b"trailers");
        }
        if is_hop_by_hop(bytes) || connection.names(bytes) || is_ours(bytes) {
            continue;
        }
        // HTTP/2 allows a cookie to be split for compression; anything that is not HTTP/2 reads the first line only
        // (RFC 9113, section 8.2.3).
        if *name == http::header::COOKIE && head.version == Version::HTTP_2 {
            if !std::mem::replace(&mut cookies_joined, true) {
                let cookies: Vec<&[u8]> = head.headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
                fields.push(b"cookie", &cookies.join(&b"; "[..]));
            }
            continue;
        }
        fields.append(Message::Request, bytes, value.as_bytes());
    }
    let forwarded_for = forwarded_for(&head.headers, arrival.peer.ip());
    let client = client_address(&forwarded_for, arrival);
    fields.push(b"x-forwarded-for", &forwarded_for);
    fields.push(b"x-forwarded-proto", forwarded_proto(&head.headers, arrival, scheme));
    if !arrival.is_from_trusted_proxy() {
        // Envoy's name for the client whom no proxy speaks for. Filters see it, upstreams don't.
        fields.push(b"x-envoy-external-address", client.ip().to_string().as_bytes());
    }
    fields.push(b"x-request-id", arrival.request_id.as_bytes());
    Ok(Inbound { fields, target, client })
}

/// Fields that the proxy writes itself, whatever the client sent, and those that are not the client's to say: whose
/// certificate it showed, and orders to an Envoy.
fn is_ours(name: &[u8]) -> bool {
    matches!(name, b"host" | b"expect" | b"x-forwarded-for" | b"x-forwarded-proto" | b"x-request-id")
        || name == b"x-forwarded-client-cert"
        || name.starts_with(b"x-envoy-")
}

fn is_hop_by_hop(name: &[u8]) -> bool {
    matches!(
        name,
        b"connection"
            | b"keep-alive"
            | b"proxy-connection"
            | b"te"
            | b"transfer-encoding"
            | b"upgrade"
            | b"http2-settings"
    )
}

/// What the `connection` field of a message asks for.
#[derive(Default)]
struct Connection {
    nominated: Vec<Vec<u8>>,
    upgrade: bool,
    trailers: bool,
}

impl Connection {
    fn of(headers: &HeaderMap) -> Connection {
        let mut connection = Connection::default();
        for value in headers.get_all(http::header::CONNECTION) {
            for token in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                if token.eq_ignore_ascii_case(b"upgrade") {
                    // An offer of h2c may be ignored, and always is: nobody sends it but scanners.
                    connection.upgrade = headers
                        .get_all(http::header::UPGRADE)
                        .iter()
                        .any(|protocol| !protocol.as_bytes().eq_ignore_ascii_case(b"h2c"));
                } else if !token.is_empty() && !token.eq_ignore_ascii_case(b"close") {
                    connection.nominated.push(token.to_ascii_lowercase());
                }
            }
        }
        connection.trailers = headers.get_all(http::header::TE).iter().any(|value| {
            value.as_bytes().split(|byte| *byte == b',').any(|coding| {
                coding
                    .split(|byte| *byte == b';')
                    .next()
                    .unwrap_or_default()
                    .trim_ascii()
                    .eq_ignore_ascii_case(b"trailers")
            })
        });
        connection
    }

    /// Whether the field belongs to this connection only. The body's length is never taken for such.
    fn names(&self, name: &[u8]) -> bool {
        name != b"content-length" && self.nominated.iter().any(|nominated| nominated == name)
    }
}

/// The request's authority: of an absolute-form target, else `host` (RFC 9112, section 3.2.2; RFC 9113, section 8.3.1), in
/// the one spelling that routes, filters and upstreams see. `None` where there is none, or more than one, or none that
/// all servers read alike; also for HTTP/1.0, whose requests may lack one, since there is no route without a host.
fn authority(head: &http::request::Parts) -> Option<std::borrow::Cow<'_, [u8]>> {
    let host = head.headers.get(http::header::HOST).map(HeaderValue::as_bytes);
    if head.headers.get_all(http::header::HOST).iter().count() > 1 {
        return None;
    }
    let authority = match (head.uri.authority(), host) {
        (Some(authority), Some(host)) if head.version == Version::HTTP_2 => {
            // Two different hosts in one message: which one a server believes differs.
            authority.as_str().as_bytes().eq_ignore_ascii_case(host).then_some(host)?
        }
        (Some(authority), _) => authority.as_str().as_bytes(),
        (None, host) => host?,
    };
    portcullis_config::normal_authority(authority)
}

fn target(uri: &Uri) -> Option<Target> {
    let raw = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    // `http://host?x` has an empty path, which means `/`.
    if raw.starts_with('?') {
        Target::parse(format!("/{raw}").as_bytes()).ok()
    } else {
        Target::parse(raw.as_bytes()).ok()
    }
}

fn forwarded_for(headers: &HeaderMap, peer: IpAddr) -> Vec<u8> {
    let mut joined = Vec::new();
    for value in headers.get_all("x-forwarded-for") {
        if !value.is_empty() {
            joined.extend_from_slice(value.as_bytes());
            joined.push(b',');
        }
    }
    joined.extend_from_slice(peer.to_canonical().to_string().as_bytes());
    joined
}

/// The rightmost address that is not one of the trusted proxies'; the peer itself unless it is trusted.
fn client_address(forwarded_for: &[u8], arrival: &Arrival<'_>) -> SocketAddr {
    let peer = SocketAddr::new(arrival.peer.ip().to_canonical(), arrival.peer.port());
    let mut client = peer;
    for entry in forwarded_for.rsplit(|byte| *byte == b',') {
        let Some(address) = std::str::from_utf8(entry).ok().and_then(|text| text.trim().parse::<IpAddr>().ok()) else {
            break;
        };
        if address != peer.ip() || client != peer {
            client = SocketAddr::new(address, 0);
        }
        if !arrival.trusts(address) {
            break;
        }
    }
    client
}

fn forwarded_proto<'a>(headers: &'a HeaderMap, arrival: &Arrival<'_>, scheme: &'a str) -> &'a [u8] {
    match headers.get("x-forwarded-proto").map(HeaderValue::as_bytes) {
        Some(proto @ (b"http" | b"https")) if arrival.is_from_trusted_proxy() => proto,
        _ => scheme.as_bytes(),
    }
}

/// Why a message that went through the filters cannot be sent: a filter wrote something that is not HTTP.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unsendable {
    #[error("`{0}` is missing or invalid")]
    Pseudo(&'static str),
    #[error("the name of a field is invalid")]
    Name,
    #[error("the value of the field `{0}` is invalid")]
    Value(String),
}

/// Headers of a message on its way out, without pseudo-headers.
fn headers_of(fields: &FieldMap) -> Result<HeaderMap, Unsendable> {
    let mut headers = HeaderMap::with_capacity(fields.len());
    for (name, value) in fields.iter() {
        if name.first() == Some(&b':') || is_hop_by_hop(name) {
            continue;
        }
        let header = HeaderName::from_bytes(name).map_err(|_| Unsendable::Name)?;
        let value = HeaderValue::from_bytes(value)
            .map_err(|_| Unsendable::Value(String::from_utf8_lossy(name).into_owned()))?;
        headers.try_append(header, value).map_err(|_| Unsendable::Name)?;
    }
    Ok(headers)
}

/// Sets or drops `content-length` so that it says what is sent.
fn repair_length(headers: &mut HeaderMap, length: BodyLength) {
    match length {
        BodyLength::None => {
            headers.remove(http::header::CONTENT_LENGTH);
        }
        BodyLength::Exactly(length) => {
            // A message that says no length is sent in chunks, as Envoy sends it.
            if let Some(said) = headers.get_mut(http::header::CONTENT_LENGTH) {
                *said = HeaderValue::from(length);
            }
        }
        BodyLength::AsSaid => {
            let mut said = headers.get_all(http::header::CONTENT_LENGTH).iter();
            let valid = match (said.next(), said.next()) {
                (Some(value), None) => value.as_bytes().iter().all(u8::is_ascii_digit),
                (None, _) => true,
                _ => false,
            };
            if !valid {
                headers.remove(http::header::CONTENT_LENGTH);
            }
        }
    }
}

/// What is known of a body's length when its head is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyLength {
    /// There is no body.
    None,
    /// The whole body has this many bytes.
    Exactly(u64),
    /// The body is still coming; the message's own word is kept.
    AsSaid,
}

/// The length that `content-length` promises.
pub(crate) fn promised_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(http::header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The head of a request to an upstream.
pub(crate) fn outbound_request(
    fields: &FieldMap,
    path: &[u8],
    authority: Option<&str>,
    http2: Option<&'static str>,
    length: BodyLength,
) -> Result<http::Request<()>, Unsendable> {
    let method = fields.get(b":method").and_then(|method| Method::from_bytes(method).ok());
    let method = method.filter(|method| method != Method::CONNECT).ok_or(Unsendable::Pseudo(":method"))?;
    let authority = authority.map_or_else(|| fields.get(b":authority").unwrap_or_default(), str::as_bytes);
    let path_and_query = http::uri::PathAndQuery::try_from(path).map_err(|_| Unsendable::Pseudo(":path"))?;
    let mut headers = headers_of(fields)?;
    headers.remove(http::header::HOST);
    // A request without a body says so only where its method makes one expected.
    if length == BodyLength::None && matches!(method, Method::POST | Method::PUT | Method::PATCH) {
        headers.insert(http::header::CONTENT_LENGTH, HeaderValue::from(0));
    } else {
        repair_length(&mut headers, length);
    }
    if fields.get(b"te").is_some_and(|te| te.eq_ignore_ascii_case(b"trailers")) {
        headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    }
    let mut request = http::Request::new(());
    *request.method_mut() = method;
    match http2 {
        Some(scheme) => {
            let mut uri = http::uri::Parts::default();
            uri.scheme = http::uri::Scheme::try_from(scheme).ok();
            uri.authority = Some(authority.try_into().map_err(|_| Unsendable::Pseudo(":authority"))?);
            uri.path_and_query = Some(path_and_query);
            *request.uri_mut() = Uri::from_parts(uri).map_err(|_| Unsendable::Pseudo(":authority"))?;
            *request.version_mut() = Version::HTTP_2;
        }
        None => {
            *request.uri_mut() = Uri::from(path_and_query);
            let host = HeaderValue::from_bytes(authority).map_err(|_| Unsendable::Pseudo(":authority"))?;
            headers.insert(http::header::HOST, host);
        }
    }
    *request.headers_mut() = headers;
    Ok(request)
}

/// The fields of an upstream's response, as filters get them.
pub(crate) fn response_fields(head: &http::response::Parts) -> FieldMap {
    let connection = Connection::of(&head.headers);
    let mut fields = FieldMap::with_capacity(head.headers.len() + 1, 512);
    fields.push(b":status", head.status.as_str().as_bytes());
    for (name, value) in &head.headers {
        let bytes = name.as_str().as_bytes();
        // How the body was framed is for filters to see, as in Envoy; it goes no further.
        let framing = matches!(*name, http::header::CONNECTION | http::header::TRANSFER_ENCODING);
        if framing || (!is_hop_by_hop(bytes) && !connection.names(bytes)) {
            fields.append(Message::Response, bytes, value.as_bytes());
        }
    }
    fields
}

/// The head of a response to a client.
pub(crate) fn outbound_response(fields: &FieldMap, length: BodyLength) -> Result<http::Response<()>, Unsendable> {
    let status = fields.get(b":status").and_then(|status| StatusCode::from_bytes(status).ok());
    let status = status.filter(|status| (200..600).contains(&status.as_u16())).ok_or(Unsendable::Pseudo(":status"))?;
    let mut headers = headers_of(fields)?;
    let bodiless = matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if !bodiless {
        repair_length(&mut headers, length);
    } else if status == StatusCode::NO_CONTENT {
        headers.remove(http::header::CONTENT_LENGTH);
    }
    let mut response = http::Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}

/// Trailers from a peer: fields that belong into a head are dropped, or a sender could change the message's meaning
/// after it was checked (RFC 9110, section 6.5.1).
pub(crate) fn trailer_fields(message: Message, trailers: &HeaderMap) -> FieldMap {
    let mut fields = FieldMap::with_capacity(trailers.len(), 256);
    for (name, value) in trailers {
        let bytes = name.as_str().as_bytes();
        if !is_hop_by_hop(bytes) && !is_head_only(bytes) {
            fields.append(message, bytes, value.as_bytes());
        }
    }
    fields
}

fn is_head_only(name: &[u8]) -> bool {
    matches!(
        name,
        b"authorization"
            | b"cache-control"
            | b"content-encoding"
            | b"content-length"
            | b"content-range"
            | b"content-type"
            | b"cookie"
            | b"expect"
            | b"host"
            | b"proxy-authorization"
            | b"range"
            | b"set-cookie"
            | b"trailer"
    ) || name.starts_with(b"x-forwarded-")
        || name.starts_with(b"x-portcullis-")
}

/// Trailers on their way out.
pub(crate) fn outbound_trailers(fields: &FieldMap) -> Result<HeaderMap, Unsendable> {
    headers_of(fields)
}

/// A filter's fields, for the route table.
pub(crate) struct Lines<'a>(pub(crate) &'a FieldMap);

impl FieldLines for Lines<'_> {
    fn for_each_value(&self, name: &str, each: &mut dyn FnMut(&[u8])) {
        for value in self.0.get_all(name.as_bytes()) {
            each(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival<'a>(trusted_proxies: &'a [Network]) -> Arrival<'a> {
        Arrival { peer: ([10, 0, 0, 1], 4711).into(), tls: false, trusted_proxies, fields_max: 10, request_id: "id" }
    }

    fn head(version: Version, uri: &str, fields: &[(&str, &str)]) -> http::request::Parts {
        let mut request = http::Request::builder().version(version).uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request").into_parts().0
    }

    fn lines(fields: &FieldMap) -> Vec<String> {
        fields
            .iter()
            .map(|(name, value)| format!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)))
            .collect()
    }

    #[test]
    fn filters_get_pseudo_headers_first_and_no_field_of_the_connection() {
        let head = head(
            Version::HTTP_11,
            "/a/../b?q",
            &[
                ("host", "a.example"),
                ("x-a", "1"),
                ("connection", "x-b, content-length, close"),
                ("x-b", "2"),
                ("content-length", "3"),
                ("te", "gzip, trailers;q=1"),
                ("expect", "100-Continue"),
                ("x-envoy-retry-on", "5xx"),
            ],
        );
        let inbound = inbound(&head, &arrival(&[])).expect("a request");
        assert_eq!(
            lines(&inbound.fields),
            [
                ":authority: a.example",
                ":path: /b?q",
                ":method: GET",
                ":scheme: http",
                "x-a: 1",
                "content-length: 3",
                "te: trailers",
                "x-forwarded-for: 10.0.0.1",
                "x-forwarded-proto: http",
                "x-envoy-external-address: 10.0.0.1",
                "x-request-id: id",
            ]
        );
    }

    fn check_refused(head: &http::request::Parts, status: u16) {
        assert_eq!(inbound(head, &arrival(&[])).map(drop).map_err(|refusal| refusal.status), Err(status));
    }

    #[test]
    fn refuses_what_it_cannot_vouch_for() {
        check_refused(&head(Version::HTTP_11, "/", &[]), 400);
        check_refused(&head(Version::HTTP_11, "/", &[("host", "")]), 400);
        check_refused(&head(Version::HTTP_11, "/", &[("host", "a/b")]), 400);
        check_refused(&head(Version::HTTP_2, "http://a.example/", &[("host", "b.example")]), 400);
        check_refused(&head(Version::HTTP_11, "/%2e%2f", &[("host", "a")]), 400);
        check_refused(&head(Version::HTTP_11, "*", &[("host", "a")]), 400);
        check_refused(&head(Version::HTTP_11, "/", &[("host", "a"), ("expect", "more")]), 417);
        let upgrade = [("host", "a"), ("connection", "Upgrade"), ("upgrade", "websocket")];
        check_refused(&head(Version::HTTP_11, "/", &upgrade), 403);
        let many: Vec<(&str, &str)> = [("host", "a")].into_iter().chain([("x", "1"); 10]).collect();
        check_refused(&head(Version::HTTP_2, "http://a/", &many), 431);
    }

    #[test]
    fn an_offer_of_h2c_is_ignored() {
        let offer =
            [("host", "a"), ("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "x")];
        let inbound = inbound(&head(Version::HTTP_11, "/", &offer), &arrival(&[])).expect("a request");
        assert!(!inbound.fields.contains(b"upgrade") && !inbound.fields.contains(b"http2-settings"));
    }

    #[test]
    fn the_authority_is_one_host_in_one_spelling() {
        let check = |host: &str, expected: Option<&str>| {
            let inbound = inbound(&head(Version::HTTP_11, "/", &[("host", host)]), &arrival(&[]));
            let found = inbound.ok().and_then(|inbound| inbound.fields.get(b":authority").map(<[u8]>::to_vec));
            assert_eq!(found.as_deref(), expected.map(str::as_bytes), "{host}");
        };
        check("a.example.", Some("a.example"));
        check("a.example.:8080", Some("a.example:8080"));
        check("[::1]:80", Some("[::1]:80"));
        for host in ["", "a.example,b.example", "a%2eexample", "user@a.example", "a..example", "a.example:x"] {
            check(host, None);
        }
    }

    #[test]
    fn an_absolute_target_names_the_authority() {
        let head = head(Version::HTTP_11, "http://b.example?q", &[("host", "a.example")]);
        let inbound = inbound(&head, &arrival(&[])).expect("a request");
        assert_eq!(inbound.fields.get(b":authority"), Some(&b"b.example"[..]));
        assert_eq!(inbound.target.as_bytes(), b"/?q");
    }

    #[test]
    fn the_client_is_found_from_the_right() {
        let network = |address: [u8; 4], prefix| Network { address: IpAddr::from(address), prefix };
        let check = |trusted: &[Network], forwarded: &str, expected: &str| {
            let head = head(Version::HTTP_11, "/", &[("host", "a"), ("x-forwarded-for", forwarded)]);
            let inbound = inbound(&head, &arrival(trusted)).expect("a request");
            assert_eq!(inbound.client.ip().to_string(), expected, "{forwarded}");
        };
        let inside = [network([10, 0, 0, 0], 8)];
        check(&[], "192.0.2.1", "10.0.0.1");
        check(&inside, "192.0.2.1", "192.0.2.1");
        check(&inside, "192.0.2.66, 192.0.2.1, 10.9.9.9", "192.0.2.1");
        check(&inside, "192.0.2.1, nonsense, 10.9.9.9", "10.9.9.9");
        check(&inside, "", "10.0.0.1");
        check(&[network([192, 0, 2, 0], 24)], "192.0.2.1", "10.0.0.1");
    }

    #[test]
    fn messages_say_their_length() {
        let fields = |length: &str| -> FieldMap {
            [(":method", "POST"), (":path", "/"), (":authority", "a"), (":status", "200"), ("content-length", length)]
                .into_iter()
                .collect()
        };
        let check = |said: &str, length, expected: Option<&str>| {
            let request = outbound_request(&fields(said), b"/", None, None, length).expect("a request");
            let found = request.headers().get("content-length").map(|value| value.to_str().expect("text").to_owned());
            assert_eq!(found.as_deref(), expected, "{said} {length:?}");
        };
        check("5", BodyLength::AsSaid, Some("5"));
        check("5", BodyLength::Exactly(7), Some("7"));
        check("5", BodyLength::None, Some("0"));
        check("five", BodyLength::AsSaid, None);
        let response = outbound_response(&fields("5"), BodyLength::None).expect("a response");
        assert_eq!(promised_length(response.headers()), None);
    }

    #[test]
    fn what_filters_wrote_is_checked_on_the_way_out() {
        let request = |extra: &[(&[u8], &[u8])]| {
            let mut fields: FieldMap = [(":method", "GET"), (":path", "/"), (":authority", "a")].into_iter().collect();
            for (name, value) in extra {
                fields.push(name, value);
            }
            outbound_request(&fields, b"/", None, None, BodyLength::None)
        };
        assert!(request(&[(b"x-ok", b"\xff\t ")]).is_ok());
        assert_eq!(request(&[(b"x", b"a\r\nb: c")]).map(drop), Err(Unsendable::Value("x".into())));
        assert_eq!(request(&[(b"x y", b"1")]).map(drop), Err(Unsendable::Name));
        assert_eq!(request(&[(b":method", b"CONNECT")]).map(drop), Ok(()));
        let stripped = request(&[(b"transfer-encoding", b"chunked"), (b"connection", b"x")]).expect("a request");
        assert_eq!(stripped.headers().keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["host"]);

        let response = |status: &str| {
            let fields: FieldMap = [(":status", status)].into_iter().collect();
            outbound_response(&fields, BodyLength::None).map(drop)
        };
        assert_eq!(response("204"), Ok(()));
        for status in ["", "100", "101", "600", "2000", "abc"] {
            assert_eq!(response(status), Err(Unsendable::Pseudo(":status")), "{status}");
        }
    }

    #[test]
    fn trailers_lose_what_belongs_into_a_head() {
        let mut trailers = HeaderMap::new();
        for name in ["x-sum", "authorization", "x-portcullis-sub", "x-forwarded-for", "content-length"] {
            trailers.insert(name, HeaderValue::from_static("1"));
        }
        assert_eq!(lines(&trailer_fields(Message::RequestTrailers, &trailers)), ["x-sum: 1"]);
    }
}
