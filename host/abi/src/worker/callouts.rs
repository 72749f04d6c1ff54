//! Callouts on their way: what guests ask for becomes actions, and what comes of it callbacks.
//!
//! A guest is told only while none of its callbacks runs; what it does in the callback, such as cancelling the very exchange
//! it is told of, counts before the next piece is delivered.

use super::{Action, Call, CallAnswer, CallId, Errand, GrpcEvent, GrpcOpen, PendingCall, StreamId, TURN, Worker};
use crate::grpc::{Answer, Step, status};
use crate::vm::{CallKind, CallOwner, CallRequest, CallView, GrpcView, OpenCall};

impl Worker {
    /// How an HTTP callout went. Answers to calls that were cancelled are dropped.
    pub fn call_answered(&mut self, call: CallId, answer: CallAnswer) {
        let Some(pending) = self.calls.remove(&call) else {
            return;
        };
        let view = match answer {
            CallAnswer::Response { fields, body, trailers } => Some(CallView { fields, body, trailers }),
            CallAnswer::Reset => None,
        };
        self.run(pending.slot, None, |vm| vm.on_http_call_response(pending.root, call.token, view));
        self.settle();
    }

    /// What happened to a gRPC exchange. Events of exchanges that are over are dropped.
    ///
    /// Whether messages are left over, because the guest takes long over each: tell of [`GrpcEvent::Turn`] once requests had
    /// theirs, and of nothing else before.
    #[must_use = "what is left over must be asked for"]
    pub fn grpc_event(&mut self, call: CallId, event: GrpcEvent) -> bool {
        let Some(pending) = self.calls.get_mut(&call) else {
            return false;
        };
        let slot = pending.slot;
        let Some(answer) = &mut pending.grpc else {
            return false;
        };
        match event {
            GrpcEvent::Headers { fields, end_of_stream } => answer.headers(fields, end_of_stream),
            GrpcEvent::Data(bytes) => answer.data(&bytes),
            GrpcEvent::Trailers(fields) => answer.trailers(fields),
            GrpcEvent::End => answer.end(),
            GrpcEvent::Reset(details) => answer.reset(&details),
            GrpcEvent::Local { status, message, details } => answer.local(status, &message, &details),
            GrpcEvent::Sent(bytes) => {
                let vm = self.vms[slot].vm.as_mut();
                if let Some(open) = vm.and_then(|vm| vm.state_mut().calls.get_mut(&call.token)) {
                    open.unsent = open.unsent.saturating_sub(OpenCall::cost(bytes));
                }
                return false;
            }
            GrpcEvent::Turn => {}
        }
        let left = self.tell(call);
        self.settle();
        left
    }

    /// Delivers what there is of an answer, as long as the guest wants it and for one turn; whether something may be left.
    pub(super) fn tell(&mut self, call: CallId) -> bool {
        let CallId { token, .. } = call;
        let began = self.now();
        while let Some(pending) = self.calls.get_mut(&call) {
            let (slot, root) = (pending.slot, pending.root);
            let Some(answer) = &mut pending.grpc else { return false };
            let Some(step) = answer.next() else { return false };
            let is_last = answer.is_unary() || matches!(step, Step::Close(..));
            let is_cut = answer.is_cut();
            let mut forget = false;
            if is_last {
                self.calls.remove(&call);
                if is_cut {
                    self.actions.push_back(Action::CancelCall(call));
                }
                let Some(vm) = &mut self.vms[slot].vm else { return false };
                let state = vm.state_mut();
                let open = state.calls.remove(&token).unwrap_or_default();
                forget = open.closed || CallKind::of(token) == Some(CallKind::GrpcCall);
                state.ended.insert(token);
            }
            self.run(slot, None, |vm| match step {
                Step::Initial(fields) => vm.on_grpc_receive(root, token, GrpcView::Initial(fields)),
                Step::Message(message) => vm.on_grpc_receive(root, token, GrpcView::Message(message)),
                Step::Trailing(fields) => vm.on_grpc_receive(root, token, GrpcView::Trailing(fields)),
                Step::Close(code, message) => vm.on_grpc_close(root, token, code, message),
            });
            if forget && let Some(vm) = &mut self.vms[slot].vm {
                vm.state_mut().ended.remove(token);
            }
            if self.now().saturating_sub(began) >= TURN {
                return self.calls.contains_key(&call);
            }
        }
        false
    }

    /// The stream is over: its callouts are cancelled. Guests hear of it, since SDKs keep a record of each until then.
    pub(super) fn cancel_calls_of(&mut self, stream: StreamId) {
        let calls = self.calls.iter().filter(|(_, pending)| pending.stream == Some(stream));
        let mut calls: Vec<CallId> = calls.map(|(call, _)| *call).collect();
        calls.sort_unstable();
        for call in calls {
            let Some(pending) = self.calls.get_mut(&call) else { continue };
            if let Some(answer) = &mut pending.grpc {
                answer.cut(status::CANCELLED, "the stream that it was for has ended");
                // One step, the end.
                self.tell(call);
            } else {
                self.actions.push_back(Action::CancelCall(call));
                let (slot, root) = (pending.slot, pending.root);
                self.calls.remove(&call);
                self.run(slot, None, |vm| vm.on_http_call_response(root, call.token, None));
            }
        }
    }

    /// Cancels callouts that nobody waits for any more.
    pub(super) fn drop_calls(&mut self, which: impl Fn(&CallId, &PendingCall) -> bool) {
        let calls = self.calls.iter().filter(|(call, pending)| which(call, pending));
        let mut calls: Vec<CallId> = calls.map(|(call, _)| *call).collect();
        calls.sort_unstable();
        for call in calls {
            self.calls.remove(&call);
            let vms = self.vms.iter_mut().filter(|place| place.id == call.vm);
            for vm in vms.filter_map(|place| place.vm.as_mut()) {
                vm.state_mut().calls.remove(&call.token);
            }
            self.actions.push_back(Action::CancelCall(call));
        }
    }

    /// Does what a guest asked for. A root that was deleted meanwhile gets nothing.
    pub(super) fn carry_out(&mut self, slot: usize, request: CallRequest) {
        let id = CallId { vm: self.vms[slot].id, token: request.token() };
        match request {
            CallRequest::Http { owner, upstream, fields, body, trailers, timeout } => {
                let Some(plugin) = self.begin(slot, id, owner, None) else { return };
                let call = Call { plugin, upstream, fields, body, trailers, timeout };
                self.actions.push_back(Action::Call(id, call));
            }
            CallRequest::Grpc { owner, upstream, fields, timeout, message_bytes_max } => {
                let unary = CallKind::of(owner.token) == Some(CallKind::GrpcCall);
                let answer = Answer::new(unary, message_bytes_max);
                let Some(plugin) = self.begin(slot, id, owner, Some(answer)) else { return };
                self.actions.push_back(Action::GrpcOpen(id, GrpcOpen { plugin, upstream, fields, timeout }));
            }
            CallRequest::Send { bytes, end_of_stream, .. } => {
                if self.calls.contains_key(&id) {
                    self.actions.push_back(Action::GrpcSend(id, bytes, end_of_stream));
                }
            }
            CallRequest::Overflow { .. } => {
                if let Some(answer) = self.calls.get_mut(&id).and_then(|pending| pending.grpc.as_mut()) {
                    answer.cut(status::RESOURCE_EXHAUSTED, "more waits to be sent than `limits` allows");
                    self.errands.push_back(Errand::Tell(id));
                }
            }
            CallRequest::Cancel { .. } => {
                if self.calls.remove(&id).is_some() {
                    self.actions.push_back(Action::CancelCall(id));
                }
            }
        }
    }

    /// Notes a callout; gives its plugin's name, or nothing if its root is gone.
    fn begin(&mut self, slot: usize, id: CallId, owner: CallOwner, grpc: Option<Answer>) -> Option<String> {
        let state = self.vms[slot].vm.as_mut()?.state_mut();
        let Some(root) = state.roots.get(&owner.root) else {
            state.calls.remove(&id.token);
            return None;
        };
        let plugin = root.plugin.name.clone();
        let pending = PendingCall { slot, root: owner.root, stream: owner.stream, grpc: grpc.map(Box::new) };
        self.calls.insert(id, pending);
        Some(plugin)
    }
}
