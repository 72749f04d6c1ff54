//! Plain data that all hosts share: field lines, and what happened to one request.

use std::collections::BTreeMap;

use portcullis_abi::GrpcMessages;

use crate::trace::Trace;

/// Field lines in order; names are lower-case, values are bytes, repeated names are kept apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldLines(Vec<(String, Vec<u8>)>);

impl FieldLines {
    /// No lines.
    pub fn new() -> FieldLines {
        FieldLines::default()
    }

    /// Adds a line at the end.
    pub fn push(&mut self, name: &str, value: impl Into<Vec<u8>>) {
        self.0.push((name.to_ascii_lowercase(), value.into()));
    }

    /// The first value of `name`.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.iter().find(|(line, _)| line.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_slice())
    }

    /// All values of `name`.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.0.iter().filter(move |(line, _)| line.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_slice())
    }

    /// Lines in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_slice()))
    }

    /// Number of lines.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no line.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'a, V: AsRef<[u8]>> FromIterator<(&'a str, V)> for FieldLines {
    fn from_iter<I: IntoIterator<Item = (&'a str, V)>>(lines: I) -> FieldLines {
        let mut all = FieldLines::new();
        for (name, value) in lines {
            all.push(name, value.as_ref());
        }
        all
    }
}

/// A response as the client saw it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedResponse {
    /// The status code.
    pub status: u16,
    /// Header fields, without pseudo-headers.
    pub fields: FieldLines,
    /// The whole body.
    pub body: Vec<u8>,
    /// Trailer fields.
    pub trailers: FieldLines,
    /// Whether the response ended as it should, rather than being cut off.
    pub complete: bool,
}

/// A request as the upstream saw it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedRequest {
    /// The method.
    pub method: String,
    /// The request target, path and query.
    pub path: String,
    /// The authority (`Host`).
    pub authority: String,
    /// Header fields, without pseudo-headers and `host`.
    pub fields: FieldLines,
    /// The whole body.
    pub body: Vec<u8>,
    /// Trailer fields.
    pub trailers: FieldLines,
    /// Whether the request ended as it should, rather than being cut off.
    pub complete: bool,
}

impl ObservedRequest {
    /// The messages of a gRPC call, out of their frames; what follows one that is compressed is left out.
    pub fn grpc_messages(&self) -> Vec<Vec<u8>> {
        let mut messages = GrpcMessages::new(self.body.len());
        messages.push(&self.body);
        std::iter::from_fn(|| messages.next_message().ok().flatten()).map(|message| message.to_vec()).collect()
    }
}

/// A line that a guest or a host logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// `trace` to `critical`.
    pub level: String,
    /// The text.
    pub message: String,
}

/// What happened to one request, as far as can be seen from outside the filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// What the client got; `None` if the connection was closed without a response.
    pub response: Option<ObservedResponse>,
    /// What reached the upstream.
    pub upstream: Vec<ObservedRequest>,
    /// Whether the response was made by the host or a filter rather than by the upstream; `None` where that cannot
    /// be told.
    pub local: Option<bool>,
    /// The response code details of a local response, where the host shows them.
    pub details: Option<String>,
    /// Counters that this request changed, and by how much.
    pub counters: BTreeMap<String, i64>,
    /// Calls that the filter made to other upstreams, by upstream.
    pub callouts: BTreeMap<String, Vec<ObservedRequest>>,
    /// What was logged meanwhile.
    pub log: Vec<LogLine>,
    /// What filters have stored with the stream, by the name under which they did; where the host shows it.
    pub properties: BTreeMap<String, Vec<u8>>,
    /// What filters share afterwards, by key; as far as it was asked for.
    pub shared_data: BTreeMap<String, Vec<u8>>,
    /// What waits in queues afterwards, by the queue's name; as far as it was asked for.
    pub queues: BTreeMap<String, Vec<Vec<u8>>>,
    /// What passed between the host and the filters meanwhile; where the host shows it.
    pub trace: Trace,
}

impl Observed {
    /// The status the client got, if any.
    pub fn status(&self) -> Option<u16> {
        self.response.as_ref().map(|response| response.status)
    }

    /// The first value of a response field, as text; `None` if it is absent or not UTF-8.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.response.as_ref()?.fields.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// The response body as JSON; `Null` if it is none.
    pub fn json(&self) -> serde_json::Value {
        self.response.as_ref().and_then(|response| serde_json::from_slice(&response.body).ok()).unwrap_or_default()
    }

    /// Whether anything reached the upstream.
    pub fn reached_upstream(&self) -> bool {
        !self.upstream.is_empty()
    }
}
