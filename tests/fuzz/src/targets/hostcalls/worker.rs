//! A worker that random things happen to, and what must hold whatever happens.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Unstructured;
use bytes::Bytes;
use portcullis_abi::{
    Action, CallAnswer, CallId, ClosedBy, Direction, Embedder, Ending, FailurePolicy, FieldMap, GrpcEvent,
    LocalResponse, LogLevel, LogRecord, Part, Plugin, Shared, StreamId, StreamInfo, TraceEvent, UpstreamInfo, Worker,
};

use super::guest;
use super::program::Data;

/// Things that happen in one run.
const EVENTS_MAX: usize = 150;
/// Bytes of a body that may wait in a filter.
const BUFFER: usize = 64;

thread_local! {
    static DATA: Data = Data::new();
}

/// What the guests did, for telling runs apart.
#[derive(Default)]
struct World {
    now: Cell<Duration>,
    calls: RefCell<BTreeSet<(&'static str, &'static str, &'static str)>>,
    callback: Cell<&'static str>,
    /// Everything is shown, for somebody who looks for the cause of a failure.
    shown: bool,
}

struct Scripted(Rc<World>);

impl Embedder for Scripted {
    fn log(&mut self, _record: &LogRecord<'_>) {}
    fn unix_nanos(&self) -> u64 {
        1_700_000_000_000_000_000 + self.0.now.get().as_nanos() as u64
    }
    fn monotonic(&self) -> Duration {
        self.0.now.get()
    }
    fn has_upstream(&self, name: &str) -> bool {
        matches!(name, "auth" | "grpc")
    }
    fn log_level(&self) -> LogLevel {
        LogLevel::Trace
    }
    fn traces(&self) -> bool {
        true
    }
    fn trace(&mut self, event: TraceEvent) {
        if self.0.shown {
            eprintln!("    {event:?}");
        }
        match event {
            TraceEvent::Callback { callback, .. } => self.0.callback.set(callback),
            TraceEvent::Hostcall { call, status, .. } => {
                let status = status.unwrap_or("fault");
                self.0.calls.borrow_mut().insert((self.0.callback.get(), call, status));
            }
            _ => {}
        }
    }
}

/// How far one direction has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Come {
    #[default]
    Nothing,
    Headers,
    End,
}

impl Come {
    /// A part goes this way; checks that it may.
    fn pass(&mut self, part: &Part, direction: &str) {
        match part {
            Part::Headers { fields, end_of_stream, .. } => {
                assert_eq!(*self, Come::Nothing, "{direction}: headers once, and first");
                let required: &[&[u8]] =
                    if direction == "request" { &[b":method", b":path", b":authority"] } else { &[b":status"] };
                assert!(
                    required.iter().all(|name| fields.get(name).is_some_and(|value| !value.is_empty())),
                    "{direction}: {fields:?}"
                );
                check_fields(fields);
                *self = if *end_of_stream { Come::End } else { Come::Headers };
            }
            Part::Body { end_of_stream, .. } => {
                assert_eq!(*self, Come::Headers, "{direction}: body between headers and end");
                if *end_of_stream {
                    *self = Come::End;
                }
            }
            Part::Trailers { fields } => {
                assert_eq!(*self, Come::Headers, "{direction}: trailers end a message that has begun");
                check_fields(fields);
                *self = Come::End;
            }
        }
    }
}

/// No line that would be another one on the wire.
fn check_fields(fields: &FieldMap) {
    let mut regular = false;
    for (name, value) in fields.iter() {
        assert!(!value.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n')), "{fields:?}");
        assert!(
            !name.iter().any(|byte| byte.is_ascii_uppercase() || byte.is_ascii_whitespace() || *byte == 0),
            "{fields:?}"
        );
        let pseudo = name.first() == Some(&b':');
        assert!(!(pseudo && regular), "pseudo-headers come first: {fields:?}");
        regular |= !pseudo;
    }
}

#[derive(Debug, Default)]
struct Stream {
    tcp: bool,
    /// What was told to the worker.
    request: Come,
    response: Come,
    /// What it let out.
    request_out: Come,
    response_out: Come,
    connect: bool,
    connected: bool,
    cancelled: bool,
    answered: bool,
    reset: bool,
    closed: bool,
    /// Of a TCP connection, by direction.
    ended: [bool; 2],
    ended_out: [bool; 2],
}

#[derive(Debug, Default)]
struct Grpc {
    headers: bool,
    unsent: usize,
    request_ended: bool,
}

#[derive(Debug)]
enum Open {
    Http,
    Grpc(Grpc),
}

/// The worker, and what is known of it.
struct Driven {
    worker: Worker,
    world: Rc<World>,
    streams: BTreeMap<StreamId, Stream>,
    finished: BTreeSet<StreamId>,
    calls: Vec<(CallId, Open)>,
    seen_calls: BTreeSet<String>,
    /// gRPC exchanges whose end was told to the worker.
    ended: BTreeSet<String>,
}

impl Driven {
    /// Three plugins of one module: two VMs, of which the first has two plugins.
    fn start(programs: [Vec<u8>; 3], u: &mut Unstructured<'_>) -> Option<Driven> {
        let world = Rc::new(World { shown: std::env::var_os("PORTCULLIS_FUZZ_SHOW").is_some(), ..World::default() });
        let policies = [FailurePolicy::Reload, FailurePolicy::Closed, FailurePolicy::Open];
        let plugins = programs.into_iter().enumerate().map(|(number, program)| {
            let mut plugin = Plugin::new(["a", "b", "c"][number], guest::module());
            plugin.vm_id = ["shared", "alone", "shared"][number].into();
            plugin.configuration = program;
            plugin.environment = vec![("NAME".into(), "value".into())];
            plugin.failure_policy = *u.choose(&policies).unwrap_or(&policies[0]);
            plugin.allow_on_headers_stop_iteration = u.arbitrary().unwrap_or(true);
            plugin.limits.calls_max = 4;
            plugin.limits.map_lines_max = 32;
            plugin.limits.buffer_bytes_max = 256;
            plugin.limits.metrics_max = 8;
            plugin.limits.properties_max = 8;
            plugin.limits.log_lines_per_second = 20;
            plugin.limits.shared.entries_max = 3;
            plugin.limits.shared.queues_max = 2;
            plugin.limits.shared.queue_items_max = 3;
            Arc::new(plugin)
        });
        let worker = Worker::start(Shared::new(), plugins.collect(), Box::new(Scripted(Rc::clone(&world)))).ok()?;
        Some(Driven {
            worker,
            world,
            streams: BTreeMap::new(),
            finished: BTreeSet::new(),
            calls: Vec::new(),
            seen_calls: BTreeSet::new(),
            ended: BTreeSet::new(),
        })
    }

    /// Takes all that the worker asks for, and checks that it may be asked for.
    fn drain(&mut self) {
        while let Some(action) = self.worker.poll_action() {
            if self.world.shown {
                eprintln!("  {action:?}");
            }
            match action {
                Action::Request(id, part) => {
                    let stream = self.live(id, "request");
                    assert!(!stream.cancelled && !stream.answered, "a request goes on after an answer was made here");
                    stream.request_out.pass(&part, "request");
                }
                Action::Response(id, part) => {
                    let stream = self.live(id, "response");
                    if let Part::Headers { details: Some(_), .. } = &part {
                        stream.answered = true;
                    }
                    stream.response_out.pass(&part, "response");
                }
                Action::CancelUpstream(id) => {
                    let stream = self.live(id, "cancel");
                    assert!(
                        stream.request_out > Come::Nothing && !stream.cancelled,
                        "cancelled once, and only what has begun"
                    );
                    stream.cancelled = true;
                }
                Action::Reset(id) => {
                    let stream = self.live(id, "reset");
                    assert!(!stream.tcp);
                    stream.reset = true;
                }
                Action::Readable(id, direction) => {
                    assert!(self.worker.may_read(id, direction), "readable again");
                }
                Action::Connect(id) => {
                    let stream = self.live(id, "connect");
                    assert!(stream.tcp && !stream.connect, "connected once");
                    stream.connect = true;
                }
                Action::Data { id, direction, end_of_stream, .. } => {
                    let stream = self.live(id, "data");
                    let out = &mut stream.ended_out[direction as usize];
                    assert!(!*out, "nothing follows the end");
                    *out = end_of_stream;
                }
                Action::Close(id, _) => {
                    let stream = self.live(id, "close");
                    assert!(stream.tcp && !stream.closed, "closed once");
                    stream.closed = true;
                }
                Action::Call(id, call) => {
                    assert!(matches!(call.upstream.as_str(), "auth" | "grpc"));
                    check_fields(&call.fields);
                    check_fields(&call.trailers);
                    self.open(id, Open::Http);
                }
                Action::GrpcOpen(id, open) => {
                    assert!(matches!(open.upstream.as_str(), "auth" | "grpc"));
                    check_fields(&open.fields);
                    self.open(id, Open::Grpc(Grpc::default()));
                }
                Action::GrpcSend(id, bytes, end) => {
                    match self.calls.iter_mut().find(|(open, _)| *open == id) {
                        Some((_, Open::Grpc(grpc))) => {
                            assert!(!grpc.request_ended, "nothing follows the end of a gRPC request");
                            grpc.unsent += bytes.len();
                            grpc.request_ended = end;
                        }
                        // The guest may go on sending before it was told of an end that has come already.
                        _ => assert!(self.ended.contains(&format!("{id:?}")), "bytes for what is open"),
                    }
                }
                Action::CancelCall(id) => {
                    let before = self.calls.len();
                    self.calls.retain(|(open, _)| *open != id);
                    let was_open = self.calls.len() < before;
                    // The guest may give up a gRPC exchange before it was told of an end that has come already.
                    assert!(was_open || self.ended.remove(&format!("{id:?}")), "cancelled is what is open");
                }
                other => panic!("unknown to this target: {other:?}"),
            }
        }
        assert!(self.calls.len() <= 3 * 4 + 3, "{} calls are open", self.calls.len());
    }

    fn open(&mut self, id: CallId, open: Open) {
        assert!(self.seen_calls.insert(format!("{id:?}")), "an id is given once");
        self.calls.push((id, open));
    }

    fn live(&mut self, id: StreamId, what: &str) -> &mut Stream {
        assert!(!self.finished.contains(&id), "{what} of a stream that is finished");
        let stream = self.streams.get_mut(&id).unwrap_or_else(|| panic!("{what} of a stream that was never opened"));
        assert!(!stream.reset && !stream.closed, "{what} after the end: {stream:?}");
        stream
    }

    fn choose_stream(&self, u: &mut Unstructured<'_>) -> Option<StreamId> {
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        u.choose(&ids).ok().copied()
    }

    /// Something that happens whatever is proxied: time, notifications, answers of callouts.
    fn happens_anyhow(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        match u.int_in_range(0..=4)? {
            0 => {
                let step = *u.choose(&[0, 1, 20, 500, 5_000])?;
                self.world.now.set(self.world.now.get() + Duration::from_millis(step));
                self.worker.run_timers();
            }
            1 => self.worker.run_notifications(),
            _ if self.calls.is_empty() => {}
            _ => {
                let at = u.choose_index(self.calls.len())?;
                let (id, open) = self.calls.swap_remove(at);
                match open {
                    Open::Http => {
                        let answer = match u.int_in_range(0..=3)? {
                            0 => CallAnswer::Reset,
                            1 => CallAnswer::timed_out(),
                            _ => CallAnswer::Response {
                                fields: some_fields(&[(":status", "200")], u)?,
                                body: some_bytes(u)?,
                                trailers: some_fields(&[], u)?,
                            },
                        };
                        self.worker.call_answered(id, answer);
                    }
                    Open::Grpc(grpc) => self.grpc_goes_on(id, grpc, u)?,
                }
            }
        }
        self.drain();
        Ok(())
    }

    fn grpc_goes_on(&mut self, id: CallId, mut grpc: Grpc, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let frames: [&'static [u8]; 5] =
            [b"\0\0\0\0\x02hi", b"\0\0", b"\0\0\0", b"\x01\0\0\0\x01x", b"\0\xff\xff\xff\xff"];
        let (event, goes_on) = match u.int_in_range(0..=6)? {
            0 if !grpc.headers => {
                let end_of_stream = u.ratio(1, 4)?;
                let fields =
                    some_fields(&[(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "0")], u)?;
                grpc.headers = true;
                (GrpcEvent::Headers { fields, end_of_stream }, !end_of_stream)
            }
            1 if grpc.headers => (GrpcEvent::Data(Bytes::from_static(u.choose(&frames)?)), true),
            2 if grpc.headers => (GrpcEvent::Trailers(some_fields(&[("grpc-status", "3")], u)?), false),
            3 if grpc.headers => (GrpcEvent::End, false),
            4 if grpc.unsent > 0 => {
                let sent = std::mem::take(&mut grpc.unsent);
                (GrpcEvent::Sent(sent), true)
            }
            5 => (GrpcEvent::Turn, true),
            _ if u.ratio(1, 4)? => (GrpcEvent::timed_out(), false),
            _ if u.ratio(1, 4)? => {
                (GrpcEvent::Reset("upstream_reset_after_response_started{remote_reset}".into()), false)
            }
            _ => (GrpcEvent::Turn, true),
        };
        if goes_on {
            // In the list before the worker hears of it: it may be cancelled in the same breath.
            self.calls.push((id, Open::Grpc(grpc)));
        } else {
            self.ended.insert(format!("{id:?}"));
        }
        let wants_turn = self.worker.grpc_event(id, event);
        if wants_turn {
            self.drain();
            let _another = self.worker.grpc_event(id, GrpcEvent::Turn);
        }
        Ok(())
    }

    /// The next thing that happens to an HTTP stream.
    fn http_goes_on(&mut self, id: StreamId, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        let end: bool = u.ratio(1, 3)?;
        let choice = u.int_in_range(0..=9)?;
        let request_open = !stream.reset && !stream.cancelled && !stream.answered;
        let response_open = request_open && stream.request_out > Come::Nothing;
        let come = if end { Come::End } else { Come::Headers };
        match choice {
            0..=3 if request_open && stream.request == Come::Nothing => {
                stream.request = come;
                let method = *u.choose(&["GET", "POST", "HEAD"])?;
                let own = [
                    (":method", method),
                    (":path", "/a?b"),
                    (":authority", "api.example"),
                    (":scheme", "http"),
                    ("x-a", "1"),
                ];
                let fields = some_fields(&own, u)?;
                self.worker.request_headers(id, fields, end);
            }
            0..=2
                if request_open && stream.request == Come::Headers && self.worker.may_read(id, Direction::Request) =>
            {
                stream.request = come;
                self.worker.request_body(id, some_bytes(u)?, end);
            }
            3 if request_open && stream.request == Come::Headers && self.worker.may_read(id, Direction::Request) => {
                stream.request = Come::End;
                self.worker.request_trailers(id, some_fields(&[("x-t", "1")], u)?);
            }
            4..=6 if response_open && stream.response == Come::Nothing => {
                stream.response = come;
                self.worker.upstream_info(id, UpstreamInfo::default());
                self.worker.response_headers(id, some_fields(&[(":status", "200"), ("content-length", "3")], u)?, end);
            }
            4..=5
                if response_open
                    && stream.response == Come::Headers
                    && self.worker.may_read(id, Direction::Response) =>
            {
                stream.response = come;
                self.worker.response_body(id, some_bytes(u)?, end);
            }
            6 if response_open && stream.response == Come::Headers && self.worker.may_read(id, Direction::Response) => {
                stream.response = Come::End;
                self.worker.response_trailers(id, some_fields(&[("x-t", "1")], u)?);
            }
            7 if request_open => {
                let response =
                    LocalResponse { status: 404, details: "route_not_found".into(), ..LocalResponse::default() };
                self.worker.respond(id, response);
            }
            8 => drop(self.worker.route_cleared(id)),
            9 => self.finish(id),
            _ => {}
        }
        self.drain();
        Ok(())
    }

    /// Ends a stream; before, checks that nothing is lost in it.
    fn finish(&mut self, id: StreamId) {
        self.drain();
        let Some(stream) = self.streams.get(&id) else { return };
        if self.world.shown {
            eprintln!("finish {id:?} {stream:?}");
        }
        // An answer that was made here may be held by a filter on its way out; the request is then of no interest any more.
        let answer_held = stream.response == Come::Nothing && self.worker.held(id, Direction::Response).is_some();
        let over = stream.reset || stream.answered || stream.cancelled || stream.closed || answer_held;
        if !stream.tcp && !over {
            for (direction, told, out) in [
                (Direction::Request, stream.request, stream.request_out),
                (Direction::Response, stream.response, stream.response_out),
            ] {
                let held = self.worker.held(id, direction);
                if held.is_none() && told == Come::End {
                    assert_eq!(out, Come::End, "nobody holds the {direction:?}, and it is not out: {stream:?}");
                }
                if held.is_none() && told == Come::Headers {
                    assert!(
                        out > Come::Nothing,
                        "nobody holds the {direction:?}, and its headers are not out: {stream:?}"
                    );
                }
            }
        }
        let tcp = stream.tcp;
        if tcp {
            self.worker.close_connection(id, ClosedBy::Remote, Ending::default());
        } else {
            self.worker.finish(id, Ending::default());
        }
        self.streams.remove(&id);
        self.finished.insert(id);
        self.drain();
    }

    /// The next thing that happens to a TCP connection.
    fn tcp_goes_on(&mut self, id: StreamId, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        let open = !stream.closed;
        match u.int_in_range(0..=7)? {
            0..=1 if open && stream.connect && !stream.connected => {
                stream.connected = true;
                self.worker.connected(id, UpstreamInfo::default());
            }
            choice @ 2..=5 if open && stream.connected => {
                let direction = if choice < 4 { Direction::Request } else { Direction::Response };
                let end = u.ratio(1, 5)?;
                if !stream.ended[direction as usize] && self.worker.may_read(id, direction) {
                    stream.ended[direction as usize] = end;
                    self.worker.data(id, direction, some_bytes(u)?, end);
                }
            }
            6 if u.ratio(1, 2)? => self.finish(id),
            _ => {}
        }
        self.drain();
        Ok(())
    }

    /// Ends everything, and says what happened.
    fn end(mut self) -> u64 {
        for id in self.streams.keys().copied().collect::<Vec<_>>() {
            self.finish(id);
        }
        self.worker.shutdown();
        self.drain();
        let mut hasher = DefaultHasher::new();
        // The last call that nobody made before: a run is new if it has a new one, not if it has a new set of them.
        for call in &*self.world.calls.borrow() {
            NEW_CALLS.with(|known| {
                if known.borrow_mut().insert(*call) {
                    call.hash(&mut hasher);
                }
            });
        }
        self.worker.health().iter().map(|health| health.traps.min(2)).collect::<Vec<_>>().hash(&mut hasher);
        hasher.finish()
    }
}

thread_local! {
    /// Callbacks, calls in them, and what they answered, of all runs.
    static NEW_CALLS: RefCell<BTreeSet<(&'static str, &'static str, &'static str)>> = const { RefCell::new(BTreeSet::new()) };
}

fn some_bytes(u: &mut Unstructured<'_>) -> arbitrary::Result<Bytes> {
    let len = *u.choose(&[0, 1, 3, 10, 40, 100])?;
    Ok(vec![b'x'; len].into())
}

fn some_fields(own: &[(&str, &str)], u: &mut Unstructured<'_>) -> arbitrary::Result<FieldMap> {
    let mut fields: FieldMap = own.iter().copied().collect();
    for _ in 0..u.int_in_range(0..=2)? {
        const LINES: [(&str, &[u8]); 4] =
            [("x-b", b"2"), ("x-a", b"\xff"), ("cookie", b""), ("content-type", b"application/grpc")];
        let (name, value) = *u.choose(&LINES)?;
        fields.push(name.as_bytes(), value);
    }
    Ok(fields)
}

fn some_filters(u: &mut Unstructured<'_>) -> arbitrary::Result<&'static [usize]> {
    const CHAINS: [&[usize]; 7] = [&[0], &[1], &[0, 1], &[1, 0], &[0, 2], &[0, 1, 2], &[]];
    u.choose(&CHAINS).copied()
}

fn info() -> StreamInfo {
    let mut info = StreamInfo::default();
    info.buffer_bytes_max = BUFFER;
    info
}

/// A worker whose guests do what the input says, and the rest of the input.
fn start(input: &[u8]) -> Option<(Driven, Vec<u8>)> {
    // The first half says what the guests do, the second what happens to them.
    let (programs, events) = input.split_at(input.len() / 2);
    let part = |number: usize| -> Vec<u8> {
        let len = programs.len() / 3;
        let mut u = Unstructured::new(&programs[number * len..(number + 1) * len]);
        DATA.with(|data| data.program(&mut u))
    };
    let driven = Driven::start([part(0), part(1), part(2)], &mut Unstructured::new(events))?;
    Some((driven, events.to_vec()))
}

pub(super) fn http(input: &[u8]) -> u64 {
    let Some((mut driven, events)) = start(input) else { return 1 };
    let mut u = Unstructured::new(&events);
    driven.drain();
    for _ in 0..EVENTS_MAX {
        let happened = match u.int_in_range(0..=9).unwrap_or(0) {
            _ if u.is_empty() => break,
            0 if driven.streams.len() < 4 => some_filters(&mut u).map(|filters| {
                let id = driven.worker.open(filters, info());
                driven.streams.insert(id, Stream::default());
                driven.drain();
            }),
            1 | 2 => driven.happens_anyhow(&mut u),
            _ => match driven.choose_stream(&mut u) {
                Some(id) => driven.http_goes_on(id, &mut u),
                None => Ok(()),
            },
        };
        if happened.is_err() {
            break;
        }
    }
    driven.end()
}

pub(super) fn tcp(input: &[u8]) -> u64 {
    let Some((mut driven, events)) = start(input) else { return 1 };
    let mut u = Unstructured::new(&events);
    driven.drain();
    for _ in 0..EVENTS_MAX {
        let happened = match u.int_in_range(0..=9).unwrap_or(0) {
            _ if u.is_empty() => break,
            0 if driven.streams.len() < 4 => some_filters(&mut u).map(|filters| {
                let id = driven.worker.open_connection(filters, info());
                driven.streams.insert(id, Stream { tcp: true, ..Stream::default() });
                driven.drain();
            }),
            1 | 2 => driven.happens_anyhow(&mut u),
            _ => match driven.choose_stream(&mut u) {
                Some(id) => driven.tcp_goes_on(id, &mut u),
                None => Ok(()),
            },
        };
        if happened.is_err() {
            break;
        }
    }
    driven.end()
}

/// One request through a guest that asks for one property in each callback.
pub(super) fn properties(path: &[u8]) -> u64 {
    let program = || DATA.with(|data| data.asking(path));
    let Some(mut driven) = Driven::start([program(), program(), program()], &mut Unstructured::new(&[])) else {
        return 1;
    };
    let id = driven.worker.open(&[0, 1], info());
    driven.streams.insert(id, Stream::default());
    let fields = |lines: &[(&str, &str)]| -> FieldMap { lines.iter().copied().collect() };
    driven.worker.request_headers(
        id,
        fields(&[(":method", "POST"), (":path", "/a?b"), (":authority", "a"), ("x-a", "1")]),
        false,
    );
    driven.worker.request_body(id, Bytes::from_static(b"body"), false);
    driven.worker.request_trailers(id, fields(&[("x-t", "1")]));
    driven.worker.upstream_info(id, UpstreamInfo::default());
    driven.worker.response_headers(id, fields(&[(":status", "200"), ("x-a", "2")]), false);
    driven.worker.response_body(id, Bytes::from_static(b"body"), false);
    driven.worker.response_trailers(id, fields(&[("x-t", "2")]));
    driven.end()
}
