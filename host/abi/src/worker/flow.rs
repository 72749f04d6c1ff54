//! A message's way through the stages of a stream, and out of the last one.
//!
//! Each `deliver_*` asks the guest of one stage and passes on to the next; [`Worker::release`] lets go of what a stage has
//! held. The rules are those of Envoy's filter manager and its Wasm filter.

use bytes::{Bytes, BytesMut};

use super::{Action, Errand, Guest, Outcome, Part, StreamId, Worker};
use crate::abi::{BodyAction, Direction, HeadersAction};
use crate::exchange::LocalResponse;
use crate::fields::FieldMap;
use crate::stream::{Hold, Sent, Stream};

/// Fields of a request that Envoy's routes are told to remove, see `portcullis envoy-config`.
const INTERNAL_REQUEST_FIELDS: [&[u8]; 2] = [b"x-envoy-external-address", b"x-envoy-internal"];
/// Fields that speak of the upstream's connection only.
const INTERNAL_RESPONSE_FIELDS: [&[u8]; 2] = [b"connection", b"transfer-encoding"];

impl Worker {
    /// Takes a stream out, works on it, puts it back, and does what is left over.
    pub(super) fn with_stream(&mut self, id: StreamId, work: impl FnOnce(&mut Worker, &mut Stream)) {
        self.work_on(id, work);
        self.settle();
    }

    pub(super) fn work_on(&mut self, id: StreamId, work: impl FnOnce(&mut Worker, &mut Stream)) {
        let Some(mut stream) = self.streams.remove(&id) else {
            return;
        };
        if !stream.reset {
            work(self, &mut stream);
            self.update_reading(id, &mut stream);
        }
        self.streams.insert(id, stream);
    }

    /// Does what guests asked of streams other than the one at hand, until nothing is left.
    pub(super) fn settle(&mut self) {
        while let Some(errand) = self.errands.pop_front() {
            match errand {
                Errand::Asked(id, stage) if self.relays.contains_key(&id) => {
                    self.work_on_relay(id, |worker, relay| worker.grant_to_relay(id, relay, stage));
                }
                Errand::Asked(id, stage) => self.work_on(id, |worker, stream| worker.grant(id, stream, stage)),
                Errand::Broken(id, stage) if self.relays.contains_key(&id) => {
                    self.work_on_relay(id, |worker, relay| worker.fail_relay(id, relay, stage));
                }
                Errand::Broken(id, stage) => self.work_on(id, |worker, stream| worker.fail(id, stream, stage)),
                // One step, the end: nothing is left over.
                Errand::Tell(call) => drop(self.tell(call)),
                Errand::EndRoot { vm, root } => self.end_root(vm, root),
            }
        }
    }

    pub(super) fn update_reading(&mut self, id: StreamId, stream: &mut Stream) {
        for direction in [Direction::Request, Direction::Response] {
            let full = stream.is_full(direction);
            if std::mem::replace(stream.blocked(direction), full) && !full {
                self.actions.push_back(Action::Readable(id, direction));
            }
        }
    }

    /// Headers arrive at a stage, or behind the last one.
    pub(super) fn deliver_headers(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        at: Option<usize>,
        end: bool,
    ) {
        let Some(stage) = at else {
            return self.emit_headers(id, stream, direction, end);
        };
        stream.stages[stage].lane_mut(direction).end_seen = end;
        let (slot, context) = match self.guest_in(id, stream, direction, stage) {
            Guest::Ready { slot, context } => (slot, context),
            Guest::Absent => return self.pass_headers(id, stream, direction, stage, end),
            Guest::Failed => return self.fail(id, stream, stage),
        };
        let count = {
            let mut exchange = stream.exchange.borrow_mut();
            exchange.stages[stage].set_headers_visible(direction, true);
            exchange.headers(direction).map_or(0, FieldMap::len) as u32
        };
        let action = self.run(slot, Some((id, stage)), |vm| vm.on_headers(direction, context, count, end));
        let Outcome::Proceed { resumed } = self.outcome(id, stream, direction, stage, action.is_some()) else {
            return;
        };
        let allow_stop = self.plugins[stream.stages[stage].seat.plugin].plugin.allow_on_headers_stop_iteration;
        let (hold, watermark) = match action.unwrap_or(HeadersAction::Continue) {
            HeadersAction::Continue => {
                // What was paused stays visible to its guest, in Envoy, also after it has gone.
                stream.exchange.borrow_mut().stages[stage].set_headers_visible(direction, false);
                (Hold::Nothing, false)
            }
            HeadersAction::Stop if allow_stop => (Hold::Headers, true),
            HeadersAction::Stop | HeadersAction::StopAllAndWatermark => (Hold::All, true),
            HeadersAction::StopAllAndBuffer => (Hold::All, false),
        };
        if hold == Hold::Nothing || resumed {
            self.pass_headers(id, stream, direction, stage, end);
        } else {
            let lane = stream.stages[stage].lane_mut(direction);
            lane.hold = hold;
            lane.watermark = watermark;
        }
    }

    pub(super) fn pass_headers(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        stage: usize,
        end: bool,
    ) {
        stream.stages[stage].lane_mut(direction).headers_passed = true;
        let next = stream.next(direction, stage);
        self.deliver_headers(id, stream, direction, next, end);
    }

    /// Body arrives from outside. Where no filter looks at it, it goes out as it came: what a guest may change has to be copied.
    pub(super) fn begin_body(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        bytes: Bytes,
        end: bool,
    ) {
        match stream.first(direction) {
            Some(first) => self.deliver_body(id, stream, direction, Some(first), bytes.into(), end),
            None if self.is_over(stream, direction) => {}
            None => self.emit_body(id, stream, direction, bytes, end),
        }
    }

    /// Body arrives at a stage, or behind the last one.
    pub(super) fn deliver_body(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        at: Option<usize>,
        bytes: BytesMut,
        end: bool,
    ) {
        if self.is_over(stream, direction) {
            return;
        }
        let Some(stage) = at else {
            return self.emit_body(id, stream, direction, bytes.freeze(), end);
        };
        let lane = stream.stages[stage].lane_mut(direction);
        lane.end_seen |= end;
        if lane.hold == Hold::All {
            lane.held.extend_from_slice(&bytes);
            return self.check_room(id, stream, direction, stage);
        }
        let (slot, context) = match self.guest_in(id, stream, direction, stage) {
            Guest::Ready { slot, context } => (slot, context),
            Guest::Absent => {
                let next = stream.next(direction, stage);
                return self.deliver_body(id, stream, direction, next, bytes, end);
            }
            Guest::Failed => return self.fail(id, stream, stage),
        };
        let buffering = stream.stages[stage].lane(direction).buffering;
        let (len, had_trailers) = {
            let exchange = &mut *stream.exchange.borrow_mut();
            let had_trailers = exchange.trailers_mut(direction).is_some();
            let view = &mut exchange.stages[stage];
            view.last_body = end.then_some(direction);
            view.request_body_hidden = false;
            let shown = view.body_mut(direction).get_or_insert_default();
            if buffering {
                shown.extend_from_slice(&bytes);
            } else {
                *shown = bytes;
            }
            (shown.len() as u32, had_trailers)
        };
        let action = self.run(slot, Some((id, stage)), |vm| vm.on_body(direction, context, len, end));
        let Outcome::Proceed { resumed } = self.outcome(id, stream, direction, stage, action.is_some()) else {
            return;
        };
        let made_trailers = {
            let exchange = &mut *stream.exchange.borrow_mut();
            exchange.stages[stage].last_body = None;
            end && !had_trailers && exchange.trailers_mut(direction).is_some()
        };
        let lane = stream.stages[stage].lane_mut(direction);
        lane.trailers_held |= made_trailers;
        let action = if resumed { BodyAction::Continue } else { action.unwrap_or(BodyAction::Continue) };
        if action == BodyAction::Continue {
            return self.release(id, stream, direction, stage);
        }
        {
            let mut exchange = stream.exchange.borrow_mut();
            let body = exchange.stages[stage].body_mut(direction);
            match action {
                BodyAction::StopAndBuffer if lane.held.is_empty() => {}
                BodyAction::StopAndBuffer => {
                    // All that waits is shown next time, also what came before the guest began to buffer.
                    let mut all = lane.held.split();
                    all.extend_from_slice(body.as_deref().unwrap_or_default());
                    *body = Some(all);
                }
                BodyAction::StopAndWatermark => lane.held.extend_from_slice(&body.take().unwrap_or_default()),
                BodyAction::StopNoBuffer | BodyAction::Continue => *body = None,
            }
        }
        lane.buffering = action == BodyAction::StopAndBuffer;
        lane.watermark = !lane.buffering;
        if lane.hold == Hold::Nothing {
            lane.hold = Hold::Body;
        }
        self.check_room(id, stream, direction, stage);
    }

    /// Trailers arrive at a stage, or behind the last one.
    pub(super) fn deliver_trailers(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        at: Option<usize>,
    ) {
        if self.is_over(stream, direction) {
            return;
        }
        let Some(stage) = at else {
            return self.emit_trailers(id, stream, direction);
        };
        let lane = stream.stages[stage].lane_mut(direction);
        lane.end_seen = true;
        if lane.hold == Hold::All {
            lane.trailers_held = true;
            return;
        }
        let (slot, context) = match self.guest_in(id, stream, direction, stage) {
            Guest::Ready { slot, context } => (slot, context),
            Guest::Absent => {
                let next = stream.next(direction, stage);
                return self.deliver_trailers(id, stream, direction, next);
            }
            Guest::Failed => return self.fail(id, stream, stage),
        };
        let count = {
            let mut exchange = stream.exchange.borrow_mut();
            exchange.stages[stage].set_trailers_visible(direction, true);
            exchange.trailers_mut(direction).as_ref().map_or(0, FieldMap::len) as u32
        };
        let action = self.run(slot, Some((id, stage)), |vm| vm.on_trailers(direction, context, count));
        let Outcome::Proceed { resumed } = self.outcome(id, stream, direction, stage, action.is_some()) else {
            return;
        };
        let goes_on = action.is_none_or(|action| action == HeadersAction::Continue);
        if goes_on {
            stream.exchange.borrow_mut().stages[stage].set_trailers_visible(direction, false);
        }
        let lane = stream.stages[stage].lane_mut(direction);
        lane.trailers_held = true;
        if resumed || goes_on {
            self.release(id, stream, direction, stage);
        } else if lane.hold == Hold::Nothing {
            lane.hold = Hold::Trailers;
        }
    }

    /// Lets go of what a stage holds, towards the next stage.
    pub(super) fn release(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize) {
        let (body, edited) = {
            let lane = stream.stages[stage].lane_mut(direction);
            lane.hold = Hold::Nothing;
            lane.buffering = false;
            let mut exchange = stream.exchange.borrow_mut();
            let view = &mut exchange.stages[stage];
            let shown = view.body_mut(direction).take().unwrap_or_default();
            let body = if lane.held.is_empty() {
                shown
            } else {
                let mut held = lane.held.split();
                held.extend_from_slice(&shown);
                held
            };
            (body, std::mem::take(&mut view.edited))
        };
        let lane = stream.stages[stage].lane_mut(direction);
        let (headers_passed, trailers) = (lane.headers_passed, std::mem::take(&mut lane.trailers_held));
        // While the headers wait here too, what has arrived is all there is of the body.
        let whole = lane.end_seen && !headers_passed;
        let end = lane.end_seen && !trailers;
        if edited && *stream.sent(direction) == Sent::Nothing {
            repair_content_length(stream, direction, whole.then_some(body.len()));
        }
        let next = stream.next(direction, stage);
        let nothing_follows = end && body.is_empty();
        if !headers_passed {
            self.pass_headers(id, stream, direction, stage, nothing_follows);
            if nothing_follows {
                return;
            }
        }
        if !body.is_empty() || end {
            self.deliver_body(id, stream, direction, next, body, end);
        }
        if trailers {
            self.deliver_trailers(id, stream, direction, next);
        }
    }

    /// A guest has resumed a direction that it had stopped.
    pub(super) fn resume(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize) {
        if self.is_over(stream, direction) {
            return;
        }
        let lane = stream.stages[stage].lane_mut(direction);
        match lane.hold {
            Hold::Nothing => {}
            Hold::Headers | Hold::Body | Hold::Trailers => self.release(id, stream, direction, stage),
            Hold::All => {
                lane.hold = Hold::Nothing;
                let held = lane.held.split();
                let trailers = std::mem::take(&mut lane.trailers_held);
                let end = lane.end_seen && !trailers;
                let nothing_follows = end && held.is_empty();
                if !lane.headers_passed {
                    self.pass_headers(id, stream, direction, stage, nothing_follows);
                    if nothing_follows {
                        return;
                    }
                }
                // What came meanwhile is shown to this guest first.
                if !held.is_empty() || end {
                    self.deliver_body(id, stream, direction, Some(stage), held, end);
                }
                if trailers {
                    self.deliver_trailers(id, stream, direction, Some(stage));
                }
            }
        }
    }

    pub(super) fn is_over(&self, stream: &mut Stream, direction: Direction) -> bool {
        stream.reset
            || *stream.sent(direction) == Sent::End
            || (direction == Direction::Request && stream.local.is_some())
    }

    /// More waits at a stage than may: the message is refused, unless the sender is held back instead.
    pub(super) fn check_room(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize) {
        let most = stream.exchange.borrow().info.buffer_bytes_max;
        if stream.stages[stage].lane(direction).watermark || stream.waiting(direction, stage) <= most {
            return;
        }
        let (status, details, body) = match direction {
            Direction::Request => (413, "request_payload_too_large", "Payload Too Large"),
            Direction::Response => (500, "response_payload_too_large", "Internal Server Error"),
        };
        let response = LocalResponse {
            status,
            details: details.into(),
            body: Bytes::from_static(body.as_bytes()),
            ..LocalResponse::default()
        };
        self.answer_locally(id, stream, response);
    }

    pub(super) fn emit_headers(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, end: bool) {
        if self.is_over(stream, direction) {
            return;
        }
        let fields = {
            // What is for filters only ends here, also in what they get to log.
            let internal: &[&[u8]] = match direction {
                Direction::Request => &INTERNAL_REQUEST_FIELDS,
                Direction::Response => &INTERNAL_RESPONSE_FIELDS,
            };
            let mut exchange = stream.exchange.borrow_mut();
            if let Some(fields) = exchange.headers_mut(direction) {
                for name in internal {
                    fields.remove(name);
                }
            }
            exchange.headers(direction).cloned().unwrap_or_default()
        };
        // In the order in which Envoy would miss them: a request without a path meets no route.
        let required: &[&str] = match direction {
            Direction::Request => &[":path", ":method", ":authority"],
            Direction::Response => &[":status"],
        };
        if let Some(missing) = required.iter().find(|name| fields.get(name.as_bytes()).is_none_or(<[u8]>::is_empty)) {
            return self.refuse_incomplete(id, stream, direction, missing);
        }
        *stream.sent(direction) = if end { Sent::End } else { Sent::Headers };
        let details = match direction {
            Direction::Request => None,
            Direction::Response => stream.local.clone(),
        };
        self.emit(id, direction, Part::Headers { fields, end_of_stream: end, details });
    }

    /// A filter took away what a message cannot be without.
    pub(super) fn refuse_incomplete(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, missing: &str) {
        let (status, which) = match direction {
            Direction::Request => (503, "request"),
            Direction::Response => (502, "response"),
        };
        let response = match missing {
            ":path" => LocalResponse { status: 404, details: "route_not_found".into(), ..LocalResponse::default() },
            _ => LocalResponse {
                status,
                details: format!("filter_removed_required_{which}_headers{{missing_required_header:_{missing}}}"),
                body: format!("missing required header: {missing}").into(),
                ..LocalResponse::default()
            },
        };
        self.answer_locally(id, stream, response);
    }

    pub(super) fn emit_body(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        bytes: Bytes,
        end: bool,
    ) {
        if *stream.sent(direction) != Sent::Headers {
            return;
        }
        if end {
            *stream.sent(direction) = Sent::End;
        }
        if direction == Direction::Response {
            stream.exchange.borrow_mut().response_sent += bytes.len() as u64;
        }
        self.emit(id, direction, Part::Body { bytes, end_of_stream: end });
    }

    pub(super) fn emit_trailers(&mut self, id: StreamId, stream: &mut Stream, direction: Direction) {
        if *stream.sent(direction) != Sent::Headers {
            return;
        }
        *stream.sent(direction) = Sent::End;
        let fields = stream.exchange.borrow_mut().trailers_mut(direction).clone().unwrap_or_default();
        self.emit(id, direction, Part::Trailers { fields });
    }

    pub(super) fn emit(&mut self, id: StreamId, direction: Direction, part: Part) {
        self.actions.push_back(match direction {
            Direction::Request => Action::Request(id, part),
            Direction::Response => Action::Response(id, part),
        });
    }
}

/// After a guest has changed a body whose headers are still here: says its new length where it is known, and otherwise
/// leaves the framing to the transport. Envoy would send the old, wrong length.
fn repair_content_length(stream: &mut Stream, direction: Direction, len: Option<usize>) {
    let mut exchange = stream.exchange.borrow_mut();
    let Some(fields) = exchange.headers_mut(direction) else {
        return;
    };
    if !fields.contains(b"content-length") {
        return;
    }
    match len {
        Some(len) => fields.set(b"content-length", len.to_string().as_bytes()),
        None => {
            fields.remove(b"content-length");
        }
    }
}
