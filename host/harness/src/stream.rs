//! [`Stream`]: one request and its answer, sent through a filter phase by phase, or as a whole.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use portcullis_abi::{Direction, Ending, FieldMap, Hold, Message, Part, Protocol, RouteInfo, StreamInfo, TlsInfo};

use crate::expectation::describe;
use crate::filter::Filter;
use crate::host::{
    Host, Inner, Mark, StreamKey, append_all, field_map, observed_request, push_length, response_fields, without_pseudo,
};
use crate::message::{FieldLines, Observed, ObservedRequest, ObservedResponse};
use crate::plan::{RequestPlan, ResponsePlan};

/// A filter may hold a whole exchange for this long, in simulated time, before the harness gives up on it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a message ends here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndOfStream {
    /// It does.
    Yes,
    /// More follows.
    No,
}

impl EndOfStream {
    fn is_end(self) -> bool {
        self == EndOfStream::Yes
    }
}

/// How a message fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// All that was sent has passed the filters.
    Continues,
    /// A filter holds it, or a part of it; see [`Stream::held`].
    Paused,
    /// A filter, or the host in its place, has answered the client.
    Answered,
    /// The client's stream was cut off.
    Reset,
}

/// A request that is being put together.
#[must_use = "nothing happens before it is sent"]
pub struct RequestBuilder {
    filter: Filter,
    request: RequestPlan,
    response: ResponsePlan,
    scheme: String,
    info: StreamInfo,
    properties: Vec<(Vec<u8>, Vec<u8>)>,
}

impl RequestBuilder {
    pub(crate) fn new(filter: &Filter, request: RequestPlan) -> RequestBuilder {
        let mut info = StreamInfo::default();
        info.source_address = Some(([127, 0, 0, 1], 50_000).into());
        info.destination_address = Some(([127, 0, 0, 1], 80).into());
        info.route = RouteInfo {
            name: "all".into(),
            cluster_name: "origin".into(),
            endpoints: Some(1),
            virtual_host_name: "*".into(),
        };
        info.filter_chain_name = "clients";
        info.listener_name = "public".into();
        RequestBuilder {
            filter: filter.clone(),
            request,
            response: ResponsePlan::default(),
            scheme: "http".to_owned(),
            info,
            properties: Vec::new(),
        }
    }

    /// Adds a field line.
    pub fn field(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.request.fields.push(name, value.as_ref());
        self
    }

    /// Another authority than `api.example.com`.
    pub fn authority(mut self, authority: &str) -> Self {
        authority.clone_into(&mut self.request.authority);
        self
    }

    /// Adds a piece of body; several calls make several pieces.
    pub fn body(mut self, piece: impl AsRef<[u8]>) -> Self {
        if !piece.as_ref().is_empty() {
            self.request.body.push(piece.as_ref().to_vec());
        }
        self
    }

    /// The body in these pieces, as [`crate::for_every_split`] gives them.
    pub fn body_pieces<P: AsRef<[u8]>>(mut self, pieces: impl IntoIterator<Item = P>) -> Self {
        for piece in pieces {
            self = self.body(piece);
        }
        self
    }

    /// Adds a trailer line.
    pub fn trailer(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.request.trailers.push(name, value.as_ref());
        self
    }

    /// What the upstream answers, instead of 200 and `ok`.
    pub fn upstream_response(mut self, response: ResponsePlan) -> Self {
        self.response = response;
        self
    }

    /// A property that the filter reads at this path, whether or not our host knows one by that name.
    pub fn property(mut self, path: &[&str], value: impl AsRef<[u8]>) -> Self {
        self.properties.push((path.join("\0").into_bytes(), value.as_ref().to_vec()));
        self
    }

    /// The client's address, instead of `127.0.0.1:50000`.
    pub fn source_address(mut self, address: SocketAddr) -> Self {
        self.info.source_address = Some(address);
        self
    }

    /// The client has connected with TLS.
    pub fn tls(mut self, tls: TlsInfo) -> Self {
        self.info.tls = Some(tls);
        "https".clone_into(&mut self.scheme);
        self
    }

    /// The client speaks this version of HTTP, instead of 1.1.
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.info.protocol = protocol;
        self
    }

    /// The route's name, instead of `all`.
    pub fn route_name(mut self, name: &str) -> Self {
        self.info.route.name = name.into();
        self
    }

    /// Changes whatever else is known of a stream when it begins.
    pub fn info(mut self, change: impl FnOnce(&mut StreamInfo)) -> Self {
        change(&mut self.info);
        self
    }

    /// Sends the head, and nothing else. The rest is sent through the [`Stream`].
    ///
    /// # Panics
    /// If a body, trailers or an upstream's response were planned: they are sent through the stream, piece by piece.
    #[track_caller]
    pub fn begin(self, end: EndOfStream) -> Stream {
        assert!(
            self.request.body.is_empty() && self.request.trailers.is_empty(),
            "a stream that is driven phase by phase gets its body and trailers from `send_body` and `send_trailers`"
        );
        let (mut stream, head) = self.open();
        stream.request_headers(head, end.is_end());
        stream
    }

    /// Sends the whole request, as fast as the filter takes it, lets the upstream answer once it has all of it, and reports
    /// what came of it. Where nothing else is left to happen, the clock moves to the next timer, answer or deadline.
    pub fn send(mut self) -> Observed {
        let bodiless = self.request.method == "HEAD" || matches!(self.response.status, 204 | 304);
        let answer_head = response_fields(&self.response);
        let answer_body = if bodiless { Vec::new() } else { std::mem::take(&mut self.response.body) };
        let mut answer = pieces(answer_head, answer_body, Message::ResponseTrailers, &self.response.trailers);
        let body = std::mem::take(&mut self.request.body);
        let trailers = std::mem::take(&mut self.request.trailers);
        let (stream, mut head) = self.open();
        push_length(&mut head, &stream.sent_fields, &body, &trailers);
        let mut request = pieces(head, body, Message::RequestTrailers, &trailers);
        let host = stream.host.clone();
        let mut inner = host.inner.borrow_mut();
        let give_up = inner.monotonic() + PATIENCE;
        loop {
            inner.drain();
            let key = stream.key;
            let Some(state) = inner.streams.get(&key) else { break };
            if state.is_over() {
                break;
            }
            let (cancelled, ready) = (state.upstream_cancelled, state.upstream_has_all());
            if cancelled {
                request.clear();
                answer.clear();
            }
            if inner.worker(key).may_read(key.id, Direction::Request)
                && let Some(piece) = request.pop_front()
            {
                match piece {
                    Piece::Headers(fields, end) => inner.worker(key).request_headers(key.id, fields, end),
                    Piece::Body(bytes, end) => inner.worker(key).request_body(key.id, bytes, end),
                    Piece::Trailers(fields) => inner.worker(key).request_trailers(key.id, fields),
                }
                continue;
            }
            if inner.answer_next() {
                continue;
            }
            if ready
                && inner.worker(key).may_read(key.id, Direction::Response)
                && let Some(piece) = answer.pop_front()
            {
                match piece {
                    Piece::Headers(fields, end) => inner.worker(key).response_headers(key.id, fields, end),
                    Piece::Body(bytes, end) => inner.worker(key).response_body(key.id, bytes, end),
                    Piece::Trailers(fields) => inner.worker(key).response_trailers(key.id, fields),
                }
                continue;
            }
            // Queues are told of when nothing else is left to do: other threads of a proxy get to it when they do.
            inner.settle();
            let over = inner.streams.get(&key).is_none_or(StreamState::is_over);
            if over || stream.can_go_on(&mut inner, &request, &answer) {
                continue;
            }
            match inner.next_event().filter(|at| *at <= give_up) {
                Some(at) => inner.happen_at(at),
                None => {
                    inner.note("the filter holds the stream, and nothing is left that could wake it");
                    break;
                }
            }
        }
        drop(inner);
        stream.finish()
    }

    /// Opens the stream and puts the head together.
    fn open(mut self) -> (Stream, FieldMap) {
        let mut fields = FieldMap::new();
        fields.push(b":authority", self.request.authority.as_bytes());
        fields.push(b":path", self.request.path.as_bytes());
        fields.push(b":method", self.request.method.as_bytes());
        fields.push(b":scheme", self.scheme.as_bytes());
        append_all(&mut fields, Message::Request, &self.request.fields);
        let host = self.filter.host.clone();
        let mut inner = host.inner.borrow_mut();
        inner.requests += 1;
        let id = request_id(inner.requests);
        // Envoy and our proxy add these before any filter sees the request.
        fields.set(b"x-forwarded-proto", self.scheme.as_bytes());
        fields.set(b"x-request-id", id.as_bytes());
        self.info.request_id = id;
        self.info.start_unix_nanos = inner.unix_nanos();
        self.info.connection_id = inner.requests;
        let mark = inner.mark();
        let began = inner.monotonic();
        let (instance, worker) = (self.filter.instance, self.filter.worker);
        let filters: Vec<usize> = (0..self.filter.names().len()).collect();
        let id = inner.instances[instance].workers[worker].worker.open(&filters, self.info);
        let key = StreamKey { instance, worker, id };
        for (path, value) in self.properties {
            inner.worker(key).set_property(id, &path, value);
        }
        inner.streams.insert(key, StreamState::default());
        drop(inner);
        let stream = Stream {
            host,
            key,
            mark,
            began,
            request: Progress::Nothing,
            answer: Progress::Nothing,
            sent_fields: self.request.fields,
            finished: false,
        };
        (stream, fields)
    }
}

/// How far one side has sent its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    Nothing,
    Headers,
    End,
}

/// A request on its way through a filter. It ends when it is dropped, or with [`Stream::finish`].
pub struct Stream {
    host: Host,
    key: StreamKey,
    mark: Mark,
    began: Duration,
    request: Progress,
    answer: Progress,
    sent_fields: FieldLines,
    finished: bool,
}

impl Stream {
    // ---- the client

    /// The client sends a piece of body. It says how the request fares.
    ///
    /// # Panics
    /// If the request has ended.
    #[track_caller]
    pub fn send_body(&mut self, piece: impl AsRef<[u8]>, end: EndOfStream) -> Flow {
        self.must_be_open(self.request, "request");
        let bytes = Bytes::copy_from_slice(piece.as_ref());
        self.request = if end.is_end() { Progress::End } else { Progress::Headers };
        self.with_worker(|worker, id| worker.request_body(id, bytes, end.is_end()))
    }

    /// The client sends trailers, with which its request ends.
    ///
    /// # Panics
    /// If the request has ended.
    #[track_caller]
    pub fn send_trailers<'a>(&mut self, trailers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Flow {
        self.must_be_open(self.request, "request");
        self.request = Progress::End;
        let fields = field_map(Message::RequestTrailers, &trailers.into_iter().collect());
        self.with_worker(|worker, id| worker.request_trailers(id, fields))
    }

    /// The client goes away in the middle of things. Filters see the end of the stream, and what came of it.
    pub fn disconnect(mut self) -> Observed {
        self.end("downstream_remote_disconnect")
    }

    // ---- the upstream

    /// The upstream sends the head of its response, `:status` among the fields or not.
    ///
    /// # Panics
    /// If the upstream has not seen the request's head, or has answered already.
    #[track_caller]
    pub fn respond_headers<'a>(
        &mut self,
        status: u16,
        fields: impl IntoIterator<Item = (&'a str, &'a str)>,
        end: EndOfStream,
    ) -> Flow {
        let mut plan = ResponsePlan::new(status);
        for (name, value) in fields {
            plan = plan.field(name, value);
        }
        self.answer_headers(response_fields(&plan), end.is_end());
        self.response_flow()
    }

    /// The upstream sends a piece of body. It says how the response fares.
    ///
    /// # Panics
    /// If the upstream has not begun to answer, or has ended.
    #[track_caller]
    pub fn respond_body(&mut self, piece: impl AsRef<[u8]>, end: EndOfStream) -> Flow {
        self.must_be_open(self.answer, "response");
        let bytes = Bytes::copy_from_slice(piece.as_ref());
        self.answer = if end.is_end() { Progress::End } else { Progress::Headers };
        self.with_worker(|worker, id| worker.response_body(id, bytes, end.is_end()));
        self.response_flow()
    }

    /// The upstream sends trailers, with which its response ends.
    ///
    /// # Panics
    /// If the upstream has not begun to answer, or has ended.
    #[track_caller]
    pub fn respond_trailers<'a>(&mut self, trailers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Flow {
        self.must_be_open(self.answer, "response");
        self.answer = Progress::End;
        let fields = field_map(Message::ResponseTrailers, &trailers.into_iter().collect());
        self.with_worker(|worker, id| worker.response_trailers(id, fields));
        self.response_flow()
    }

    /// The upstream sends its whole response, the stream ends, and what came of it is reported.
    ///
    /// # Panics
    /// If the upstream has not seen the request's head, or has answered already.
    #[track_caller]
    pub fn respond(mut self, response: ResponsePlan) -> Observed {
        let head = response_fields(&response);
        for piece in pieces(head, response.body, Message::ResponseTrailers, &response.trailers) {
            match piece {
                Piece::Headers(fields, end) => self.answer_headers(fields, end),
                Piece::Body(bytes, end) => {
                    self.with_worker(|worker, id| worker.response_body(id, bytes, end));
                }
                Piece::Trailers(fields) => {
                    self.with_worker(|worker, id| worker.response_trailers(id, fields));
                }
            }
        }
        self.finish()
    }

    // ---- how it stands

    /// How the request fares.
    pub fn flow(&self) -> Flow {
        self.flow_of(Direction::Request)
    }

    /// How the response fares.
    pub fn response_flow(&self) -> Flow {
        self.flow_of(Direction::Response)
    }

    /// What the filters hold back in one direction: the first that does, as an index into the chain, and what.
    pub fn held(&self, direction: Direction) -> Option<(usize, Hold)> {
        self.host.inner.borrow_mut().worker(self.key).held(self.key.id, direction)
    }

    /// Whether a proxy would read more from the client, or from the upstream. Not while a filter holds more than fits into
    /// the buffer.
    pub fn may_send(&self, direction: Direction) -> bool {
        self.host.inner.borrow_mut().worker(self.key).may_read(self.key.id, direction)
    }

    /// What has reached the upstream so far.
    pub fn upstream(&self) -> Option<ObservedRequest> {
        self.state(|state| state.upstream.clone())
    }

    /// What the client has got so far.
    pub fn response(&self) -> Option<ObservedResponse> {
        self.state(|state| state.response.clone())
    }

    /// Whether the filter asked for the route to be chosen again.
    pub fn route_was_cleared(&self) -> bool {
        self.state(|state| state.route_cleared)
    }

    /// What filters have stored with the stream, by the name under which they did.
    pub fn properties(&self) -> BTreeMap<String, Vec<u8>> {
        stored_properties(&mut self.host.inner.borrow_mut(), self.key)
    }

    /// Gives the stream a property, from now on.
    pub fn set_property(&mut self, path: &[&str], value: impl AsRef<[u8]>) {
        let value = value.as_ref().to_vec();
        let mut inner = self.host.inner.borrow_mut();
        inner.worker(self.key).set_property(self.key.id, path.join("\0").as_bytes(), value);
    }

    /// Ends the stream, whichever state it is in, and reports what came of it.
    pub fn finish(mut self) -> Observed {
        let details = self.state(|state| match (&state.details, &state.response) {
            (Some(details), _) => details.clone(),
            (None, Some(_)) => "via_upstream".to_owned(),
            (None, None) => "downstream_remote_disconnect".to_owned(),
        });
        self.end(&details)
    }

    // ---- underneath

    fn request_headers(&mut self, fields: FieldMap, end: bool) {
        self.request = if end { Progress::End } else { Progress::Headers };
        self.with_worker(|worker, id| worker.request_headers(id, fields, end));
    }

    #[track_caller]
    fn answer_headers(&mut self, fields: FieldMap, end: bool) {
        let seen = self.state(|state| state.upstream.is_some());
        assert!(seen, "the upstream cannot answer: it has not seen the request, which is {:?}\n{self}", self.flow());
        assert!(self.answer == Progress::Nothing, "the upstream has answered already\n{self}");
        self.answer = if end { Progress::End } else { Progress::Headers };
        self.with_worker(|worker, id| worker.response_headers(id, fields, end));
    }

    #[track_caller]
    fn must_be_open(&self, progress: Progress, what: &str) {
        assert!(
            progress == Progress::Headers,
            "the {what} has {}\n{self}",
            match progress {
                Progress::Nothing => "not begun",
                _ => "ended",
            }
        );
    }

    fn with_worker(&self, event: impl FnOnce(&mut portcullis_abi::Worker, portcullis_abi::StreamId)) -> Flow {
        let mut inner = self.host.inner.borrow_mut();
        event(inner.worker(self.key), self.key.id);
        inner.settle();
        drop(inner);
        self.flow()
    }

    fn state<R>(&self, read: impl FnOnce(&StreamState) -> R) -> R {
        let inner = self.host.inner.borrow();
        match inner.streams.get(&self.key) {
            Some(state) => read(state),
            None => read(&StreamState::default()),
        }
    }

    fn flow_of(&self, direction: Direction) -> Flow {
        let (reset, local) = self.state(|state| (state.reset, state.details.is_some()));
        match self.held(direction) {
            _ if reset => Flow::Reset,
            _ if local && direction == Direction::Request => Flow::Answered,
            Some(_) => Flow::Paused,
            None if local => Flow::Answered,
            None => Flow::Continues,
        }
    }

    /// Whether the client or the upstream could still send something, now that everything else has happened.
    fn can_go_on(&self, inner: &mut Inner, request: &VecDeque<Piece>, answer: &VecDeque<Piece>) -> bool {
        let ready = inner.streams.get(&self.key).is_some_and(StreamState::upstream_has_all);
        let worker = inner.worker(self.key);
        let id = self.key.id;
        (!request.is_empty() && worker.may_read(id, Direction::Request))
            || (ready && !answer.is_empty() && worker.may_read(id, Direction::Response))
    }

    fn observed(&self, inner: &mut Inner) -> Observed {
        let properties = stored_properties(inner, self.key);
        let since = inner.since(&self.mark);
        let state = inner.streams.get(&self.key).cloned().unwrap_or_default();
        Observed {
            local: state.response.as_ref().map(|_| state.details.is_some()),
            response: state.response,
            upstream: state.upstream.into_iter().collect(),
            details: state.details,
            counters: since.counters,
            callouts: since.callouts,
            log: since.log,
            properties,
            trace: since.trace,
            ..Observed::default()
        }
    }

    fn end(&mut self, details: &str) -> Observed {
        self.finished = true;
        let mut inner = self.host.inner.borrow_mut();
        let properties = stored_properties(&mut inner, self.key);
        let duration = inner.monotonic().saturating_sub(self.began);
        let ending = Ending { duration, response_code_details: details.to_owned(), ..Ending::default() };
        inner.worker(self.key).finish(self.key.id, ending);
        // What a filter sends after the response, such as an audit record, is part of the outcome.
        inner.settle();
        let observed = Observed { properties, ..self.observed(&mut inner) };
        inner.streams.remove(&self.key);
        observed
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.finished {
            drop(self.end("downstream_remote_disconnect"));
        }
    }
}

/// What has happened so far, and how, for messages of failed assertions.
impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let observed = self.observed(&mut self.host.inner.borrow_mut());
        for direction in [Direction::Request, Direction::Response] {
            if let Some((filter, hold)) = self.held(direction) {
                writeln!(f, "{}: filter {filter} of the chain holds {hold:?}", direction.as_str())?;
            }
        }
        f.write_str(&describe(&observed))
    }
}

fn stored_properties(inner: &mut Inner, key: StreamKey) -> BTreeMap<String, Vec<u8>> {
    let stored = inner.worker(key).stored_properties(key.id);
    let named = stored.into_iter().map(|(name, value)| {
        // Where hosts keep what `proxy_set_property` stores; filters read it without.
        let name = name.strip_prefix(b"wasm.").unwrap_or(&name);
        (String::from_utf8_lossy(name).into_owned(), value)
    });
    named.collect()
}

/// A piece of a message on its way.
enum Piece {
    Headers(FieldMap, bool),
    Body(Bytes, bool),
    Trailers(FieldMap),
}

fn pieces(headers: FieldMap, body: Vec<Vec<u8>>, kind: Message, trailers: &FieldLines) -> VecDeque<Piece> {
    let mut pieces = VecDeque::from([Piece::Headers(headers, body.is_empty() && trailers.is_empty())]);
    let count = body.len();
    for (index, piece) in body.into_iter().enumerate() {
        let last = index + 1 == count && trailers.is_empty();
        pieces.push_back(Piece::Body(Bytes::from(piece), last));
    }
    if !trailers.is_empty() {
        pieces.push_back(Piece::Trailers(field_map(kind, trailers)));
    }
    pieces
}

/// One request, seen from the client and from the upstream.
#[derive(Debug, Clone, Default)]
pub(crate) struct StreamState {
    upstream: Option<ObservedRequest>,
    response: Option<ObservedResponse>,
    details: Option<String>,
    pub(crate) upstream_cancelled: bool,
    pub(crate) route_cleared: bool,
    pub(crate) reset: bool,
}

impl StreamState {
    fn is_over(&self) -> bool {
        self.reset || self.response.as_ref().is_some_and(|response| response.complete)
    }

    fn upstream_has_all(&self) -> bool {
        self.upstream.as_ref().is_some_and(|request| request.complete)
    }

    pub(crate) fn request_part(&mut self, part: Part) {
        match part {
            Part::Headers { fields, end_of_stream, .. } => {
                self.upstream = Some(ObservedRequest { complete: end_of_stream, ..observed_request(&fields) });
            }
            Part::Body { bytes, end_of_stream } => {
                if let Some(request) = &mut self.upstream {
                    request.body.extend_from_slice(&bytes);
                    request.complete |= end_of_stream;
                }
            }
            Part::Trailers { fields } => {
                if let Some(request) = &mut self.upstream {
                    request.trailers = without_pseudo(&fields);
                    request.complete = true;
                }
            }
        }
    }

    pub(crate) fn response_part(&mut self, part: Part) {
        match part {
            Part::Headers { fields, end_of_stream, details } => {
                if let Some(details) = details {
                    self.details = Some(details.to_string());
                }
                self.response = Some(ObservedResponse {
                    status: fields
                        .get(b":status")
                        .and_then(|status| std::str::from_utf8(status).ok()?.parse().ok())
                        .unwrap_or_default(),
                    fields: without_pseudo(&fields),
                    complete: end_of_stream,
                    ..ObservedResponse::default()
                });
            }
            Part::Body { bytes, end_of_stream } => {
                if let Some(response) = &mut self.response {
                    response.body.extend_from_slice(&bytes);
                    response.complete |= end_of_stream;
                }
            }
            Part::Trailers { fields } => {
                if let Some(response) = &mut self.response {
                    response.trailers = without_pseudo(&fields);
                    response.complete = true;
                }
            }
        }
    }
}

/// A UUID of the right shape, the same in every run.
fn request_id(number: u64) -> String {
    format!("00000000-0000-4000-8000-{number:012x}")
}
