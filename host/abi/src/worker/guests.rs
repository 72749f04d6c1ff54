//! Calling guests: finding or making the context, carrying out what a guest asked for, and what happens when its VM
//! fails.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::{Errand, Failure, Guest, Outcome, StreamId, Worker};
use crate::abi::{Direction, LogLevel};
use crate::embedder::LogRecord;
use crate::exchange::Exchange;
use crate::plugin::{FailurePolicy, Plugin};
use crate::state::Declarations;
use crate::stream::{Seat, Stage, Stream};
use crate::vm::{StreamContext, Trapped, Vm};

impl Worker {
    /// The guest behind a stage for a message that passes it; a local response passes a stage whose guest is gone.
    pub(super) fn guest_in(&mut self, id: StreamId, stream: &mut Stream, direction: Direction, stage: usize) -> Guest {
        match direction {
            Direction::Request => self.guest(id, &mut stream.stages[stage].seat, stage, &stream.exchange),
            // A response concerns only filters that have seen the request.
            Direction::Response => match self.existing_guest(&stream.stages[stage].seat) {
                Guest::Failed if stream.local.is_some() => Guest::Absent,
                guest => guest,
            },
        }
    }

    /// The guest in a seat, if it was ever called. A stream that a guest began to see does not go on without it, whatever
    /// the failure policy: as in Envoy, leaving a filter out is for streams that begin later.
    pub(super) fn existing_guest(&self, seat: &Seat) -> Guest {
        let slot = self.plugins[seat.plugin].vm;
        let vm = &self.vms[slot];
        match seat.context {
            None => Guest::Absent,
            Some((vm_id, context)) if vm.vm.is_some() && vm.id == vm_id => Guest::Ready { slot, context },
            Some(_) => Guest::Failed,
        }
    }

    /// The guest in a seat; its context is made if the stream has none yet.
    pub(super) fn guest(
        &mut self,
        id: StreamId,
        seat: &mut Seat,
        stage: usize,
        exchange: &Rc<RefCell<Exchange>>,
    ) -> Guest {
        if seat.skipped {
            return Guest::Absent;
        }
        if seat.context.is_some() {
            return self.existing_guest(seat);
        }
        let plugin = seat.plugin;
        let slot = self.plugins[plugin].vm;
        if self.vms[slot].vm.is_none() {
            let policy = self.plugins[plugin].plugin.failure_policy;
            match policy {
                FailurePolicy::Open => {
                    seat.skipped = true;
                    return Guest::Absent;
                }
                FailurePolicy::Closed => return Guest::Failed,
                FailurePolicy::Reload if !self.reload(slot) => return Guest::Failed,
                FailurePolicy::Reload => {}
            }
        }
        let context = StreamContext {
            root: self.plugins[plugin].root,
            stream: id,
            stage,
            exchange: Rc::clone(exchange),
            declared: Declarations::default(),
        };
        let vm_id = self.vms[slot].id;
        match self.run(slot, Some((id, stage)), |vm| vm.create_stream_context(context)) {
            Some(context) => {
                seat.context = Some((vm_id, context));
                Guest::Ready { slot, context }
            }
            None => Guest::Failed,
        }
    }

    /// Calls into a VM and gathers what its guest asked for. `None`: it trapped, which was seen to.
    pub(super) fn run<R>(
        &mut self,
        slot: usize,
        current: Option<(StreamId, usize)>,
        call: impl FnOnce(&mut Vm) -> Result<R, Trapped>,
    ) -> Option<R> {
        let result = call(self.vms[slot].vm.as_mut()?);
        match result {
            Ok(value) => {
                self.collect(slot, current);
                Some(value)
            }
            Err(trapped) => {
                self.trap(slot, &trapped);
                None
            }
        }
    }

    /// Takes over what a guest asked for: callouts, and wishes for streams other than `current`.
    pub(super) fn collect(&mut self, slot: usize, current: Option<(StreamId, usize)>) {
        let Some(vm) = self.vms[slot].vm.as_mut() else { return };
        let state = vm.state_mut();
        if state.touched.is_empty() && state.call_requests.is_empty() && state.done.is_empty() {
            return;
        }
        let done = std::mem::take(&mut state.done);
        let touched = std::mem::take(&mut state.touched);
        let requests = std::mem::take(&mut state.call_requests);
        for (stream, stage) in touched {
            if Some((stream, stage)) != current {
                self.errands.push_back(Errand::Asked(stream, stage));
            }
        }
        for request in requests {
            self.carry_out(slot, request);
        }
        let vm = self.vms[slot].id;
        self.errands.extend(done.into_iter().map(|root| Errand::EndRoot { vm, root }));
    }

    /// What became of a callback for this stream: a trap, an answer, a reset, or nothing special.
    pub(super) fn outcome(
        &mut self,
        id: StreamId,
        stream: &mut Stream,
        direction: Direction,
        stage: usize,
        returned: bool,
    ) -> Outcome {
        if !returned {
            self.fail(id, stream, stage);
            return Outcome::Diverted;
        }
        let asked = std::mem::take(&mut stream.exchange.borrow_mut().stages[stage].asked);
        if asked.reset {
            self.reset(id, stream);
            return Outcome::Diverted;
        }
        if let Some(response) = asked.local_response {
            self.answer_locally(id, stream, response);
            return Outcome::Diverted;
        }
        let (resumed, other, resumed_other) = match direction {
            Direction::Request => (asked.resume_request, Direction::Response, asked.resume_response),
            Direction::Response => (asked.resume_response, Direction::Request, asked.resume_request),
        };
        if resumed_other {
            self.resume(id, stream, other, stage);
        }
        Outcome::Proceed { resumed }
    }

    /// Grants what a guest asked of a stream from another stream's or a root's callback.
    pub(super) fn grant(&mut self, id: StreamId, stream: &mut Stream, stage: usize) {
        let asked = std::mem::take(&mut stream.exchange.borrow_mut().stages[stage].asked);
        if asked.reset {
            return self.reset(id, stream);
        }
        if let Some(response) = asked.local_response
            && stream.local.is_none()
        {
            return self.answer_locally(id, stream, response);
        }
        if asked.resume_request {
            self.resume(id, stream, Direction::Request, stage);
        }
        if asked.resume_response {
            self.resume(id, stream, Direction::Response, stage);
        }
    }

    /// A VM is done for. Streams that only it could release fail at once; others when they need it next.
    pub(super) fn trap(&mut self, slot: usize, cause: &Trapped) {
        let now = self.now();
        let place = &mut self.vms[slot];
        place.vm = None;
        place.traps += 1;
        let (dead, lasted, tries) = (place.id, now.saturating_sub(place.born), place.tries);
        let Some(member) = self.plugins.iter().find(|plugin| plugin.vm == slot) else {
            return;
        };
        // One that crashes as soon as it is up is tried ever less often; one that lasted begins anew.
        let attempts = if lasted < member.plugin.reload_backoff_max { tries } else { 0 };
        let retry_at = now + backoff(&member.plugin, attempts);
        self.vms[slot].failure = Some(Failure { cause: cause.clone(), retry_at, attempts });
        let names: Vec<&str> =
            self.plugins.iter().filter(|plugin| plugin.vm == slot).map(|plugin| plugin.plugin.name.as_str()).collect();
        let message = format!("the VM of {} failed: it {cause}", names.join(", "));
        self.surroundings.embedder.borrow_mut().log(&LogRecord {
            plugin: &member.plugin.name,
            stream: None,
            level: LogLevel::Critical,
            message: &message,
        });
        self.drop_calls(|call, _| call.vm == dead);
        for (id, stream) in &self.streams {
            let waits = |stage: &Stage| stage.seat.is_in(dead) && stage.holds();
            if let Some(stage) = stream.stages.iter().position(waits) {
                self.errands.push_back(Errand::Broken(*id, stage));
            }
        }
        for (id, relay) in &self.relays {
            let waits = |stage: &usize| relay.stages[*stage].seat.is_in(dead) && relay.waits_for(*stage);
            if let Some(stage) = (0..relay.stages.len()).find(waits) {
                self.errands.push_back(Errand::Broken(*id, stage));
            }
        }
    }

    /// Puts a new VM in the place of a failed one, if it is time to.
    pub(super) fn reload(&mut self, slot: usize) -> bool {
        let now = self.now();
        if self.vms[slot].failure.as_ref().is_some_and(|failure| now < failure.retry_at) {
            return false;
        }
        let id = self.new_id();
        let members: Vec<usize> = (0..self.plugins.len()).filter(|plugin| self.plugins[*plugin].vm == slot).collect();
        let Some(first) = members.first().map(|member| Arc::clone(&self.plugins[*member].plugin)) else {
            return false;
        };
        let result = Vm::new(&self.surroundings, id, &first).and_then(|mut vm| {
            let mut roots = Vec::new();
            for member in &members {
                roots.push(vm.add_plugin(&self.plugins[*member].plugin)?);
            }
            vm.end_start_log();
            Ok((vm, roots))
        });
        match result {
            Ok((vm, roots)) => {
                for (member, root) in members.into_iter().zip(roots) {
                    self.plugins[member].root = root;
                }
                let born = self.now();
                let place = &mut self.vms[slot];
                place.vm = Some(vm);
                place.id = id;
                place.born = born;
                place.tries = place.failure.take().map_or(0, |failure| failure.attempts.saturating_add(1));
                place.reloads += 1;
                self.collect(slot, None);
                true
            }
            Err(error) => {
                let message = format!("no new VM could be brought up: it {error}");
                self.surroundings.embedder.borrow_mut().log(&LogRecord {
                    plugin: &first.name,
                    stream: None,
                    level: LogLevel::Critical,
                    message: &message,
                });
                if let Some(failure) = &mut self.vms[slot].failure {
                    failure.attempts = failure.attempts.saturating_add(1);
                    failure.retry_at = now + backoff(&first, failure.attempts);
                }
                false
            }
        }
    }
}

/// Doubles with each attempt up to the longest pause, and spreads over the upper half of that, so that the workers of a
/// process don't try at the same moment.
fn backoff(plugin: &Plugin, attempts: u32) -> Duration {
    let mut random = [0; 1];
    // Without randomness the workers try together; that is the worst that comes of it.
    if getrandom::fill(&mut random).is_err() {
        random = [255];
    }
    let full = plugin.reload_backoff.saturating_mul(2u32.saturating_pow(attempts)).min(plugin.reload_backoff_max);
    full / 2 + full / 512 * u32::from(random[0])
}
