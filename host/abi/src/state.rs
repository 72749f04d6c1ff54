//! Filter state: values that guests keep with a stream or with its connection.
//!
//! What `proxy_set_property` stores at `NAME` is `wasm.NAME` here, as in Envoy; the foreign function
//! `set_envoy_filter_state` stores what other parts of Envoy understand, under their names. A value belongs to the span that
//! it was first stored with.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use crate::abi::Status;
use crate::plugin::Limits;

/// How long a value is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Span {
    /// With the stream. Envoy tells what is kept with the filter chain from what is kept with the request; the two differ
    /// only where it redirects a request internally, which this host does not do. That a value does not change its span
    /// tells them apart, however.
    #[default]
    FilterChain,
    Request,
    /// With the connection, across its streams.
    Connection,
}

impl Span {
    /// Numbers of `LifeSpan` in Envoy's messages; unknown ones are the filter chain, as there.
    pub(crate) fn from_number(number: u64) -> Span {
        match number {
            1 => Span::Request,
            2 => Span::Connection,
            _ => Span::FilterChain,
        }
    }
}

/// What a property holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    #[default]
    Bytes,
    Text,
    /// FlatBuffers or Protobuf: bytes for whoever knows the name; what is inside needs a schema that this host does not read.
    Message,
}

impl Kind {
    /// Numbers of `WasmType` in Envoy's messages; unknown ones are bytes, as there.
    pub(crate) fn from_number(number: u64) -> Kind {
        match number {
            1 => Kind::Text,
            2 | 3 => Kind::Message,
            _ => Kind::Bytes,
        }
    }
}

/// What `declare_property` says of a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Declaration {
    pub(crate) readonly: bool,
    pub(crate) kind: Kind,
    pub(crate) span: Span,
}

/// The names that one context has declared.
#[derive(Debug, Default)]
pub(crate) struct Declarations {
    by_name: BTreeMap<Vec<u8>, Declaration>,
    bytes: usize,
}

impl Declarations {
    /// Declares a name, once.
    pub(crate) fn declare(&mut self, name: &[u8], declaration: Declaration, limits: &Limits) -> Result<(), Refused> {
        if self.by_name.contains_key(name) {
            return Err(Refused { status: Status::BadArgument, reason: "the property is declared already".into() });
        }
        if self.by_name.len() >= limits.properties_max || self.bytes + name.len() > limits.map_bytes_max {
            return Err(FULL);
        }
        self.bytes += name.len();
        self.by_name.insert(name.to_vec(), declaration);
        Ok(())
    }

    /// What holds for a name; an undeclared property is bytes that can be changed, kept with the stream.
    pub(crate) fn of(&self, name: &[u8]) -> Declaration {
        self.by_name.get(name).copied().unwrap_or_default()
    }
}

/// Why something was not stored or done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) status: Status,
    pub(crate) reason: Cow<'static, str>,
}

const FULL: Refused = Refused {
    status: Status::InternalFailure,
    reason: Cow::Borrowed("there are as many properties as allowed, or their values would become too large"),
};

/// A value of one of Envoy's own kinds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    /// Reads as this text.
    Text(Vec<u8>),
    /// Has the fields `ip` and `port`.
    Address(SocketAddr),
    /// Cannot be read back.
    Hidden,
}

impl Object {
    /// Makes what Envoy's factory of that name makes of a text; `None` where there is no such factory.
    ///
    /// The names and what each takes are Envoy 1.40's, measured, but for `envoy.ai.llm_protocol.request`. Nothing in this host
    /// acts on them: they steer TCP proxying, dynamic forwarding and rate limiting there.
    pub(crate) fn make(name: &[u8], value: &[u8]) -> Option<Result<Object, Refused>> {
        let text = std::str::from_utf8(value).unwrap_or_default();
        let unsigned = |most: u64| {
            let number = text.trim_matches(|c: char| c.is_ascii_whitespace()).parse::<u64>().ok();
            number.filter(|number| *number <= most).map(|number| Object::Text(number.to_string().into_bytes()))
        };
        let made = match name {
            b"envoy.string"
            | b"envoy.hashable_string"
            | b"envoy.network.network_namespace"
            | b"envoy.network.upstream_server_name"
            | b"envoy.network.upstream_subject_alt_names"
            | b"envoy.tcp_proxy.cluster"
            | b"envoy.upstream.dynamic_host" => Some(Object::Text(value.to_vec())),
            b"envoy.ai.model.request" => (!value.is_empty()).then(|| Object::Text(value.to_vec())),
            b"envoy.network.application_protocols" | b"envoy.router.debug_config" => Some(Object::Hidden),
            b"envoy.network.transport_socket.http_11_proxy.info" => {
                text.split_once(',').and_then(|(_, proxy)| proxy.parse::<SocketAddr>().ok()).map(|_| Object::Hidden)
            }
            b"envoy.bool" => truth(text).map(|truth| Object::Text(truth.to_string().into_bytes())),
            b"envoy.tcp_proxy.disable_tunneling" => Some(Object::Text((value == b"true").to_string().into_bytes())),
            b"envoy.upstream.dynamic_port" | b"envoy.ratelimit.hits_addend" => unsigned(u64::from(u32::MAX)),
            b"envoy.tcp_proxy.per_connection_idle_timeout_ms" => unsigned(u64::MAX),
            b"envoy.network.ip" => text
                .parse::<IpAddr>()
                .ok()
                .map(|address| Object::Text(SocketAddr::new(address, 0).to_string().into_bytes())),
            b"envoy.filters.listener.original_dst.local_ip"
            | b"envoy.filters.listener.original_dst.remote_ip"
            | b"envoy.network.transport_socket.original_dst_address" => text.parse().ok().map(Object::Address),
            _ => return None,
        };
        let refused = Refused {
            status: Status::BadArgument,
            reason: "the value is not of the kind that the name stands for".into(),
        };
        Some(made.ok_or(refused))
    }
}

/// What Envoy takes for a truth value.
fn truth(text: &str) -> Option<bool> {
    let is = |words: [&str; 5]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    match text {
        _ if is(["true", "t", "yes", "y", "1"]) => Some(true),
        _ if is(["false", "f", "no", "n", "0"]) => Some(false),
        _ => None,
    }
}

#[derive(Debug)]
struct Stored {
    span: Span,
    contents: Contents,
}

#[derive(Debug)]
enum Contents {
    Property { value: Vec<u8>, kind: Kind, readonly: bool },
    Object(Object),
}

impl Contents {
    fn bytes(&self) -> usize {
        match self {
            Contents::Property { value, .. } | Contents::Object(Object::Text(value)) => value.len(),
            Contents::Object(Object::Address(_) | Object::Hidden) => 0,
        }
    }
}

/// A stored value as it can be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found<'a> {
    Property(Cow<'a, [u8]>, Kind),
    Text(Cow<'a, [u8]>),
    Address(SocketAddr),
    Hidden,
}

/// Values by name, bounded in number and in bytes.
#[derive(Debug, Default)]
struct Values {
    by_name: BTreeMap<Vec<u8>, Stored>,
    bytes: usize,
}

impl Values {
    fn put(&mut self, name: &[u8], stored: Stored, limits: &Limits) -> Result<(), Refused> {
        let before = self.by_name.get(name).map(|stored| name.len() + stored.contents.bytes());
        let bytes = self.bytes - before.unwrap_or(0) + name.len() + stored.contents.bytes();
        if bytes > limits.map_bytes_max || (before.is_none() && self.by_name.len() >= limits.properties_max) {
            return Err(FULL);
        }
        self.bytes = bytes;
        self.by_name.insert(name.to_vec(), stored);
        Ok(())
    }
}

/// What guests keep with one connection, for the streams on it that are still to come.
///
/// An embedder makes one for each connection and gives it to all its streams; without, each stream counts as a connection of
/// its own.
#[derive(Clone, Default)]
pub struct ConnectionState(Rc<RefCell<Values>>);

/// Names only: values can be anything.
impl std::fmt::Debug for ConnectionState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let values = self.0.borrow();
        f.debug_set().entries(values.by_name.keys().map(|name| String::from_utf8_lossy(name).into_owned())).finish()
    }
}

/// The values that a stream sees.
#[derive(Debug, Default)]
pub(crate) struct FilterState {
    stream: Values,
    connection: ConnectionState,
}

impl FilterState {
    pub(crate) fn new(connection: ConnectionState) -> FilterState {
        FilterState { stream: Values::default(), connection }
    }

    pub(crate) fn get(&self, name: &[u8]) -> Option<Found<'_>> {
        if let Some(stored) = self.stream.by_name.get(name) {
            return Some(match &stored.contents {
                Contents::Property { value, kind, .. } => Found::Property(value.into(), *kind),
                Contents::Object(Object::Text(value)) => Found::Text(value.into()),
                Contents::Object(Object::Address(address)) => Found::Address(*address),
                Contents::Object(Object::Hidden) => Found::Hidden,
            });
        }
        let connection = self.connection.0.borrow();
        Some(match &connection.by_name.get(name)?.contents {
            Contents::Property { value, kind, .. } => Found::Property(value.clone().into(), *kind),
            Contents::Object(Object::Text(value)) => Found::Text(value.clone().into()),
            Contents::Object(Object::Address(address)) => Found::Address(*address),
            Contents::Object(Object::Hidden) => Found::Hidden,
        })
    }

    /// All values that can be read, those of the connection first.
    pub(crate) fn readable(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let connection = self.connection.0.borrow();
        let all = connection.by_name.iter().chain(&self.stream.by_name);
        all.filter_map(|(name, stored)| match &stored.contents {
            Contents::Property { value, .. } | Contents::Object(Object::Text(value)) => {
                Some((name.clone(), value.clone()))
            }
            Contents::Object(Object::Address(_) | Object::Hidden) => None,
        })
        .collect()
    }

    /// Stores a property. The declaration counts the first time; later the value is what it was declared as.
    pub(crate) fn set_property(
        &mut self,
        name: &[u8],
        value: &[u8],
        declared: Declaration,
        limits: &Limits,
    ) -> Result<(), Refused> {
        let present = |stored: &Stored| match &stored.contents {
            Contents::Property { kind, readonly, .. } => {
                Some(Declaration { readonly: *readonly, kind: *kind, span: stored.span })
            }
            Contents::Object(_) => None,
        };
        let declaration = match self.find(name, present) {
            Some(Some(found)) if !found.readonly => found,
            Some(_) => {
                let reason = "the property is read-only and has its value already";
                return Err(Refused { status: Status::BadArgument, reason: reason.into() });
            }
            None => declared,
        };
        let Declaration { readonly, kind, span } = declaration;
        let contents = Contents::Property { value: value.to_vec(), kind, readonly };
        self.put(name, Stored { span, contents }, limits)
    }

    /// Stores a value of Envoy's own kinds. One that is there with another span stays as it is, which is no error there.
    pub(crate) fn set_object(
        &mut self,
        name: &[u8],
        object: Object,
        span: Span,
        limits: &Limits,
    ) -> Result<(), Refused> {
        match self.find(name, |stored| stored.span) {
            Some(present) if present != span => Ok(()),
            _ => self.put(name, Stored { span, contents: Contents::Object(object) }, limits),
        }
    }

    fn find<R>(&self, name: &[u8], look: impl FnOnce(&Stored) -> R) -> Option<R> {
        match self.stream.by_name.get(name) {
            Some(stored) => Some(look(stored)),
            None => self.connection.0.borrow().by_name.get(name).map(look),
        }
    }

    fn put(&mut self, name: &[u8], stored: Stored, limits: &Limits) -> Result<(), Refused> {
        match stored.span {
            Span::Connection => self.connection.0.borrow_mut().put(name, stored, limits),
            Span::FilterChain | Span::Request => self.stream.put(name, stored, limits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(properties: usize, bytes: usize) -> Limits {
        Limits { properties_max: properties, map_bytes_max: bytes, ..Limits::default() }
    }

    fn text(state: &FilterState, name: &str) -> Option<String> {
        match state.get(name.as_bytes())? {
            Found::Property(bytes, _) | Found::Text(bytes) => Some(String::from_utf8(bytes.into_owned()).unwrap()),
            Found::Address(address) => Some(format!("address {address}")),
            Found::Hidden => Some("hidden".into()),
        }
    }

    #[test]
    fn what_belongs_to_a_connection_outlives_the_stream() {
        let connection = ConnectionState::default();
        let limits = Limits::default();
        let mut first = FilterState::new(connection.clone());
        let kept = Declaration { span: Span::Connection, ..Declaration::default() };
        first.set_property(b"kept", b"1", kept, &limits).unwrap();
        first.set_property(b"gone", b"1", Declaration::default(), &limits).unwrap();
        let mut second = FilterState::new(connection);
        assert_eq!(text(&second, "kept").as_deref(), Some("1"));
        assert_eq!(text(&second, "gone"), None);
        second.set_property(b"kept", b"2", Declaration::default(), &limits).unwrap();
        assert_eq!(text(&first, "kept").as_deref(), Some("2"), "the span stays what it was");
    }

    #[test]
    fn a_read_only_property_is_set_once() {
        let mut state = FilterState::default();
        let declared = Declaration { readonly: true, ..Declaration::default() };
        let limits = Limits::default();
        assert_eq!(state.set_property(b"ro", b"1", declared, &limits), Ok(()));
        let again = state.set_property(b"ro", b"2", Declaration::default(), &limits);
        assert_eq!(again.map_err(|refused| refused.status), Err(Status::BadArgument));
        assert_eq!(text(&state, "ro").as_deref(), Some("1"));
    }

    #[test]
    fn values_and_declarations_are_bounded_in_number_and_bytes() {
        let mut state = FilterState::default();
        let set = |state: &mut FilterState, name: &str, value: &str, limits: &Limits| {
            state.set_property(name.as_bytes(), value.as_bytes(), Declaration::default(), limits)
        };
        let two = limits(2, 100);
        assert_eq!(set(&mut state, "a", "", &two), Ok(()));
        assert_eq!(set(&mut state, "b", "", &two), Ok(()));
        assert_eq!(set(&mut state, "c", "", &two), Err(FULL));
        assert_eq!(set(&mut state, "b", "changes", &two), Ok(()));
        let small = limits(9, 10);
        assert_eq!(set(&mut state, "b", "12345678", &small), Ok(()), "a1 and b1, 8 of its value: ten bytes");
        assert_eq!(set(&mut state, "b", "123456789", &small), Err(FULL));
        assert_eq!(text(&state, "b").as_deref(), Some("12345678"), "a refused value changes nothing");
        let mut declared = Declarations::default();
        assert_eq!(declared.declare(b"a", Declaration::default(), &limits(1, 10)), Ok(()));
        assert_eq!(declared.declare(b"b", Declaration::default(), &limits(1, 10)), Err(FULL));
        assert_eq!(declared.declare(&[b'b'; 10], Declaration::default(), &limits(9, 10)), Err(FULL));
    }

    #[test]
    fn objects_are_made_of_what_envoys_factories_take() {
        let check = |name: &str, value: &str, expected: Option<&str>| {
            let mut state = FilterState::default();
            match Object::make(name.as_bytes(), value.as_bytes()) {
                Some(Ok(object)) => {
                    state.set_object(name.as_bytes(), object, Span::Request, &Limits::default()).unwrap();
                    assert_eq!(text(&state, name).as_deref(), expected, "{name} {value}");
                }
                Some(Err(refused)) => {
                    assert_eq!((refused.status, expected), (Status::BadArgument, None), "{name} {value}");
                }
                None => assert_eq!(expected, Some("unknown"), "{name}"),
            }
        };
        check("envoy.string", "text", Some("text"));
        check("envoy.string", "", Some(""));
        check("envoy.ai.model.request", "", None);
        check("envoy.bool", "Yes", Some("true"));
        check("envoy.bool", "0", Some("false"));
        check("envoy.bool", "text", None);
        check("envoy.tcp_proxy.disable_tunneling", "1", Some("false"));
        check("envoy.upstream.dynamic_port", " +007", Some("7"));
        check("envoy.upstream.dynamic_port", "4294967296", None);
        check("envoy.upstream.dynamic_port", "-1", None);
        check("envoy.tcp_proxy.per_connection_idle_timeout_ms", "18446744073709551615", Some("18446744073709551615"));
        check("envoy.network.ip", "::1", Some("[::1]:0"));
        check("envoy.network.ip", "1.2.3.4:5", None);
        check("envoy.filters.listener.original_dst.local_ip", "[::1]:5", Some("address [::1]:5"));
        check("envoy.filters.listener.original_dst.local_ip", "::1", None);
        check("envoy.network.transport_socket.http_11_proxy.info", "host,1.2.3.4:5", Some("hidden"));
        check("envoy.network.transport_socket.http_11_proxy.info", "1.2.3.4:5,host", None);
        check("wasm.x", "text", Some("unknown"));
    }

    #[test]
    fn an_object_keeps_the_span_it_came_with() {
        let mut state = FilterState::default();
        let limits = Limits::default();
        for (span, value) in [(Span::Request, "1"), (Span::Connection, "2"), (Span::FilterChain, "3")] {
            state.set_object(b"envoy.string", Object::Text(value.into()), span, &limits).unwrap();
        }
        assert_eq!(text(&state, "envoy.string").as_deref(), Some("1"));
    }
}
