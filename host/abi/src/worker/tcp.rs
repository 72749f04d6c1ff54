//! TCP connections: from the first filter's `proxy_on_new_connection` to the last one's `proxy_on_delete`.
//!
//! The rules are those of Envoy's network filters in front of `tcp_proxy`: see [`crate::relay`]. Bytes from the client are
//! not read before the upstream is connected, and the upstream is not connected before every filter has let the new
//! connection pass.

use std::rc::Rc;

use bytes::Bytes;

use super::{Action, Guest, StreamId, Worker};
use crate::abi::Direction;
use crate::embedder::Lint;
use crate::exchange::{Ending, Exchange, StreamInfo, UpstreamInfo};
use crate::relay::{Both, End, Greeting, Progress, Relay, TcpAsked, TcpData};

/// Who closed a connection (`proxy_peer_type_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ClosedBy {
    /// Nobody knows.
    Unknown = 0,
    /// This side: a filter, the host, the upstream, or the client's request to finish.
    Local = 1,
    /// The client: it broke off, or was the last to finish.
    Remote = 2,
}

/// Whether a round goes on behind a stage.
enum Step {
    Pass,
    Stop,
}

impl Worker {
    /// Begins a TCP connection from a client through these plugins (indices into what [`Worker::start`] was given), in this
    /// order. [`Action::Connect`] says when to connect to the upstream.
    pub fn open_connection(&mut self, filters: &[usize], info: StreamInfo) -> StreamId {
        let id = StreamId(self.new_id());
        let exchange = Exchange { tcp: Some(TcpData::new(filters.len())), ..Exchange::new(info, 0) };
        self.relays.insert(id, Box::new(Relay::new(filters, exchange)));
        self.with_relay(id, |worker, relay| worker.round_from_client(id, relay, 0));
        id
    }

    /// The upstream of a TCP connection is connected; from now on the client may be read.
    pub fn connected(&mut self, id: StreamId, upstream: UpstreamInfo) {
        self.with_relay(id, |_, relay| {
            relay.exchange.borrow_mut().upstream = Some(upstream);
            relay.progress = relay.progress.max(Progress::Open);
        });
    }

    /// Bytes of a TCP connection, from the client or, respectively, from the upstream. After the end nothing follows.
    pub fn data(&mut self, id: StreamId, direction: Direction, bytes: Bytes, end_of_stream: bool) {
        self.with_relay(id, |worker, relay| {
            if *relay.end.get(direction) != End::Open {
                return;
            }
            if end_of_stream {
                *relay.end.get_mut(direction) = End::Waits;
            }
            {
                let exchange = &mut *relay.exchange.borrow_mut();
                if direction == Direction::Request {
                    exchange.request_bytes += bytes.len() as u64;
                }
                if let Some(tcp) = &mut exchange.tcp {
                    let waiting = tcp.waiting.get_mut(direction);
                    if waiting.is_empty() {
                        *waiting = bytes.into();
                    } else {
                        waiting.extend_from_slice(&bytes);
                    }
                }
            }
            match direction {
                Direction::Request => worker.round_from_client(id, relay, 0),
                Direction::Response => worker.round_from_upstream(id, relay),
            }
        });
    }

    /// A TCP connection is over, however it went: the guests that know of it are told, contexts end, callouts made for it
    /// are cancelled. Once per connection, last.
    pub fn close_connection(&mut self, id: StreamId, by: ClosedBy, ending: Ending) {
        let Some(relay) = self.relays.remove(&id) else {
            return;
        };
        {
            let exchange = &mut *relay.exchange.borrow_mut();
            exchange.ending = Some(ending);
            exchange.tcp = Some(TcpData::new(relay.stages.len()));
        }
        for stage in &relay.stages {
            // One guest after the other, unlike for HTTP; a context is deleted whatever the guest answers to `on_done`.
            if let Guest::Ready { slot, context } = self.existing_guest(&stage.seat) {
                self.run(slot, None, |vm| vm.on_connection_close(Direction::Request, context, by as u32));
                self.run(slot, None, |vm| vm.on_done(context));
                self.run(slot, None, |vm| vm.on_log(context));
                self.run(slot, None, |vm| vm.delete(context));
            }
        }
        self.cancel_calls_of(id);
        self.settle();
    }

    fn with_relay(&mut self, id: StreamId, work: impl FnOnce(&mut Worker, &mut Relay)) {
        self.work_on_relay(id, work);
        self.settle();
    }

    /// Takes a connection out, works on it, puts it back.
    pub(super) fn work_on_relay(&mut self, id: StreamId, work: impl FnOnce(&mut Worker, &mut Relay)) {
        let Some(mut relay) = self.relays.remove(&id) else {
            return;
        };
        if !relay.is_closing() {
            work(self, &mut relay);
            self.update_reading_of(id, &mut relay);
        }
        self.relays.insert(id, relay);
    }

    fn update_reading_of(&mut self, id: StreamId, relay: &mut Relay) {
        for direction in [Direction::Request, Direction::Response] {
            let blocked = relay.is_blocked(direction);
            if std::mem::replace(relay.blocked.get_mut(direction), blocked) && !blocked {
                self.actions.push_back(Action::Readable(id, direction));
            }
        }
    }

    /// Grants what a guest asked for in another callback than one for this connection's bytes.
    pub(super) fn grant_to_relay(&mut self, id: StreamId, relay: &mut Relay, stage: usize) {
        let asked = take_asked(relay, stage);
        if let Some(details) = asked.close {
            self.close_relay(id, relay, details.into());
        } else if asked.resume {
            self.resume_client(id, relay, stage);
        }
    }

    /// A guest lets go of what it holds of the client's side, towards the filters behind it.
    fn resume_client(&mut self, id: StreamId, relay: &mut Relay, stage: usize) {
        match relay.held_by.get(Direction::Request) {
            // What a filter further ahead holds is not this one's to release; in Envoy it would be.
            Some(holder) if *holder < stage => return,
            Some(holder) if *holder == stage => *relay.held_by.get_mut(Direction::Request) = None,
            _ => {}
        }
        if relay.stages[stage].greeting == Greeting::Held {
            relay.stages[stage].greeting = Greeting::Done;
        }
        self.round_from_client(id, relay, stage + 1);
    }

    /// Greets the filters from `first` on that don't know of the connection yet, and shows them what waits from the client.
    fn round_from_client(&mut self, id: StreamId, relay: &mut Relay, first: usize) {
        for stage in first..relay.stages.len() {
            if let Step::Stop = self.greet(id, relay, stage) {
                return;
            }
            let something = relay.waiting(Direction::Request) > 0 || *relay.end.get(Direction::Request) == End::Waits;
            if something && let Step::Stop = self.show(id, relay, Direction::Request, stage) {
                return;
            }
        }
        if relay.progress == Progress::Greeting {
            relay.progress = Progress::Connecting;
            self.actions.push_back(Action::Connect(id));
        }
        self.pass_on(id, relay, Direction::Request);
    }

    /// Shows what waits from the upstream, from the last filter to the first.
    fn round_from_upstream(&mut self, id: StreamId, relay: &mut Relay) {
        for stage in (0..relay.stages.len()).rev() {
            if let Step::Stop = self.show(id, relay, Direction::Response, stage) {
                return;
            }
        }
        self.pass_on(id, relay, Direction::Response);
    }

    fn greet(&mut self, id: StreamId, relay: &mut Relay, stage: usize) -> Step {
        match relay.stages[stage].greeting {
            Greeting::Done => return Step::Pass,
            // In Envoy another filter's `proxy_continue_stream` would override this hold.
            Greeting::Held => return Step::Stop,
            Greeting::Due => relay.stages[stage].greeting = Greeting::Done,
        }
        let (slot, context) = match self.guest(id, &mut relay.stages[stage].seat, stage, &relay.exchange) {
            Guest::Ready { slot, context } => (slot, context),
            Guest::Absent => return Step::Pass,
            Guest::Failed => {
                self.fail_relay(id, relay, stage);
                return Step::Stop;
            }
        };
        let Some(pause) = self.run(slot, Some((id, stage)), |vm| vm.on_new_connection(context)) else {
            self.fail_relay(id, relay, stage);
            return Step::Stop;
        };
        let asked = take_asked(relay, stage);
        if let Some(details) = asked.close {
            self.close_relay(id, relay, details.into());
            return Step::Stop;
        }
        if pause && !asked.resume {
            relay.stages[stage].greeting = Greeting::Held;
            return Step::Stop;
        }
        Step::Pass
    }

    /// Shows a filter all that waits in one direction.
    fn show(&mut self, id: StreamId, relay: &mut Relay, direction: Direction, stage: usize) -> Step {
        *relay.held_by.get_mut(direction) = None;
        let (slot, context) = match self.existing_guest(&relay.stages[stage].seat) {
            Guest::Ready { slot, context } => (slot, context),
            Guest::Absent => return Step::Pass,
            Guest::Failed => {
                self.fail_relay(id, relay, stage);
                return Step::Stop;
            }
        };
        let end = *relay.end.get(direction) == End::Waits;
        let len = relay.waiting(direction) as u32;
        set_seen(relay, stage, direction, true);
        let Some(pause) = self.run(slot, Some((id, stage)), |vm| vm.on_data(direction, context, len, end)) else {
            self.fail_relay(id, relay, stage);
            return Step::Stop;
        };
        if !pause {
            set_seen(relay, stage, direction, false);
        }
        let asked = take_asked(relay, stage);
        if let Some(details) = asked.close {
            self.close_relay(id, relay, details.into());
            return Step::Stop;
        }
        if direction == Direction::Response {
            if asked.resume {
                self.resume_client(id, relay, stage);
            }
            if end && !relay.is_closing() {
                self.end_of_upstream(id, relay, stage, slot, context, pause);
            }
            if relay.is_closing() {
                return Step::Stop;
            }
        } else if asked.resume {
            return Step::Pass;
        }
        if pause {
            *relay.held_by.get_mut(direction) = Some(stage);
            return Step::Stop;
        }
        Step::Pass
    }

    /// Behind the last bytes of the upstream, its filters hear that it has closed. Envoy does not know by whom.
    fn end_of_upstream(
        &mut self,
        id: StreamId,
        relay: &mut Relay,
        stage: usize,
        slot: usize,
        context: u32,
        pause: bool,
    ) {
        if pause {
            let plugin = &self.plugins[relay.stages[stage].seat.plugin].plugin;
            let lint = Lint {
                plugin: &plugin.name,
                callback: "proxy_on_upstream_data",
                call: "return",
                reason: "pauses at the end of the upstream's bytes: nothing follows that would call it again, and the \
                         upstream's side can't be resumed, so that the client never gets them"
                    .into(),
            };
            self.surroundings.embedder.borrow_mut().lint(&lint);
        }
        let by = ClosedBy::Unknown as u32;
        let told = self.run(slot, Some((id, stage)), |vm| vm.on_connection_close(Direction::Response, context, by));
        if told.is_none() {
            return self.fail_relay(id, relay, stage);
        }
        self.grant_to_relay(id, relay, stage);
    }

    /// Whatever waits has passed all filters.
    fn pass_on(&mut self, id: StreamId, relay: &mut Relay, direction: Direction) {
        let end_of_stream = *relay.end.get(direction) == End::Waits;
        if end_of_stream {
            *relay.end.get_mut(direction) = End::Passed;
        }
        let bytes = {
            let exchange = &mut *relay.exchange.borrow_mut();
            let bytes = exchange.tcp.as_mut().map(|tcp| tcp.waiting.get_mut(direction).split().freeze());
            let bytes = bytes.unwrap_or_default();
            if direction == Direction::Response {
                exchange.response_sent += bytes.len() as u64;
            }
            bytes
        };
        if end_of_stream || !bytes.is_empty() {
            self.actions.push_back(Action::Data { id, direction, bytes, end_of_stream });
        }
    }

    fn close_relay(&mut self, id: StreamId, relay: &mut Relay, details: Rc<str>) {
        if std::mem::replace(&mut relay.progress, Progress::Closing) != Progress::Closing {
            relay.held_by = Both::default();
            self.actions.push_back(Action::Close(id, details));
        }
    }

    /// The guest that a filter needs is not there: the connection fails closed.
    pub(super) fn fail_relay(&mut self, id: StreamId, relay: &mut Relay, stage: usize) {
        let plugin = &self.plugins[relay.stages[stage].seat.plugin].plugin;
        let details = format!("wasm_fail_stream{{{}}}", plugin.name);
        self.close_relay(id, relay, details.into());
    }
}

fn take_asked(relay: &Relay, stage: usize) -> TcpAsked {
    let exchange = &mut *relay.exchange.borrow_mut();
    let view = exchange.tcp.as_mut().and_then(|tcp| tcp.stages.get_mut(stage));
    view.map(|view| std::mem::take(&mut view.asked)).unwrap_or_default()
}

fn set_seen(relay: &Relay, stage: usize, direction: Direction, seen: bool) {
    let exchange = &mut *relay.exchange.borrow_mut();
    if let Some(view) = exchange.tcp.as_mut().and_then(|tcp| tcp.stages.get_mut(stage)) {
        *view.sees.get_mut(direction) = seen;
    }
}
