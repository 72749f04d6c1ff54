//! [`GrpcPlan`]: what a scripted upstream answers to a gRPC call or stream, and when.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use portcullis_abi::{GrpcEvent, GrpcMessages, Message, grpc_frame};

use crate::host::{field_map, response_fields};
use crate::message::FieldLines;
use crate::plan::{CalloutAnswer, ResponsePlan};

/// An answer to a gRPC call or stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GrpcPlan {
    /// Initial metadata.
    pub fields: FieldLines,
    /// Messages in order.
    pub messages: Vec<Vec<u8>>,
    /// When they are sent.
    pub replies: Replies,
    /// The status at the end; 0 is success.
    pub status: u32,
    /// Its message; none if empty.
    pub message: String,
    /// Further trailing metadata.
    pub trailers: FieldLines,
}

/// When the messages of an answer are sent, and its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Replies {
    /// All of them, and the end, without waiting for a message.
    #[default]
    AtOnce,
    /// One for each message that comes; the rest and the end once the caller's side has ended.
    PerMessage,
    /// All of them, and the end, once the caller's side has ended.
    AtEnd,
}

impl GrpcPlan {
    /// Success with these messages.
    pub fn messages<M: AsRef<[u8]>>(messages: impl IntoIterator<Item = M>) -> GrpcPlan {
        let messages = messages.into_iter().map(|message| message.as_ref().to_vec()).collect();
        GrpcPlan { messages, ..GrpcPlan::default() }
    }

    /// A failure without a message but its status's.
    pub fn failed(status: u32, message: &str) -> GrpcPlan {
        GrpcPlan { status, message: message.to_owned(), ..GrpcPlan::default() }
    }

    /// Says when messages are sent.
    #[must_use]
    pub fn replies(mut self, replies: Replies) -> GrpcPlan {
        self.replies = replies;
        self
    }

    /// Adds initial metadata.
    #[must_use]
    pub fn field(mut self, name: &str, value: impl AsRef<[u8]>) -> GrpcPlan {
        self.fields.push(name, value.as_ref());
        self
    }

    /// Adds trailing metadata.
    #[must_use]
    pub fn trailer(mut self, name: &str, value: impl AsRef<[u8]>) -> GrpcPlan {
        self.trailers.push(name, value.as_ref());
        self
    }

    fn end(&self) -> FieldLines {
        let mut fields = FieldLines::new();
        fields.push("grpc-status", self.status.to_string());
        if !self.message.is_empty() {
            fields.push("grpc-message", self.message.as_bytes());
        }
        append(&mut fields, &self.trailers);
        fields
    }
}

fn append(fields: &mut FieldLines, more: &FieldLines) {
    for (name, value) in more.iter() {
        fields.push(name, value);
    }
}

/// A piece of an answer, as HTTP carries it.
#[derive(Debug, PartialEq)]
pub enum GrpcPiece {
    /// The head of the response, which may be all of it.
    Head(FieldLines, bool),
    /// A message in its frame.
    Message(Bytes),
    /// The trailers.
    Trailers(FieldLines),
}

/// An answer on its way.
#[derive(Debug)]
pub struct GrpcAnswer {
    plan: GrpcPlan,
    has_head: bool,
    sent: usize,
    has_ended: bool,
}

impl GrpcAnswer {
    /// Nothing has been sent yet.
    pub fn new(plan: GrpcPlan) -> GrpcAnswer {
        GrpcAnswer { plan, has_head: false, sent: 0, has_ended: false }
    }

    /// What is sent next, now that so many messages have come and the caller's side has ended or not.
    pub fn next_piece(&mut self, received: usize, ended: bool) -> Option<GrpcPiece> {
        if self.has_ended {
            return None;
        }
        let (messages_due, end_is_due) = match self.plan.replies {
            Replies::AtOnce => (usize::MAX, true),
            Replies::PerMessage if !ended => (received, false),
            Replies::AtEnd if !ended => (0, false),
            Replies::PerMessage | Replies::AtEnd => (usize::MAX, true),
        };
        if !std::mem::replace(&mut self.has_head, true) {
            let mut fields = FieldLines::new();
            fields.push("content-type", "application/grpc");
            append(&mut fields, &self.plan.fields);
            // What has neither metadata nor messages is one piece: gRPC calls it "trailers-only".
            self.has_ended = end_is_due && self.plan.messages.is_empty() && self.plan.fields.is_empty();
            if self.has_ended {
                append(&mut fields, &self.plan.end());
            }
            return Some(GrpcPiece::Head(fields, self.has_ended));
        }
        if self.sent < messages_due
            && let Some(message) = self.plan.messages.get(self.sent)
        {
            self.sent += 1;
            return Some(GrpcPiece::Message(grpc_frame(message)));
        }
        self.has_ended = end_is_due;
        end_is_due.then(|| GrpcPiece::Trailers(self.plan.end()))
    }
}

/// A filter's gRPC exchange with a simulated upstream.
pub(crate) struct Exchange {
    /// Where it stands among the calls made.
    pub(crate) made: usize,
    messages: GrpcMessages,
    received: usize,
    has_closed: bool,
    /// The plan that is followed, if it is one.
    plan: Option<GrpcAnswer>,
    /// When the answer begins.
    at: Option<Duration>,
    /// What is to be told from then on.
    events: VecDeque<GrpcEvent>,
    has_ended: bool,
}

impl Exchange {
    pub(crate) fn new(made: usize) -> Exchange {
        Exchange {
            made,
            messages: GrpcMessages::new(usize::MAX),
            received: 0,
            has_closed: false,
            plan: None,
            at: None,
            events: VecDeque::new(),
            has_ended: false,
        }
    }

    /// More of the request.
    pub(crate) fn receive(&mut self, bytes: &Bytes, end: bool) {
        self.messages.push(bytes);
        // The filters' host makes no frame that could not be read.
        while let Ok(Some(_)) = self.messages.next_message() {
            self.received += 1;
        }
        self.has_closed |= end;
        self.follow();
    }

    /// Says how it is answered, and from when on.
    pub(crate) fn answer(&mut self, at: Duration, answer: &CalloutAnswer) {
        self.at = Some(at);
        match answer {
            CalloutAnswer::Response(response) => self.respond(response),
            CalloutAnswer::Grpc(plan) => {
                self.plan = Some(GrpcAnswer::new(plan.clone()));
                self.follow();
            }
            CalloutAnswer::Refused => {
                let details = "upstream_reset_before_response_started{remote_connection_failure}";
                self.events.push_back(GrpcEvent::unavailable("reset reason: remote connection failure", details));
            }
            CalloutAnswer::Timeout => {}
            CalloutAnswer::Reset => {
                let fields = response_fields(&ResponsePlan::new(200));
                self.events.push_back(GrpcEvent::Headers { fields, end_of_stream: false });
                self.events.push_back(GrpcEvent::reset());
            }
        }
    }

    /// An HTTP response, whatever gRPC makes of it.
    fn respond(&mut self, response: &ResponsePlan) {
        let is_bodiless = response.body.is_empty() && response.trailers.is_empty();
        let fields = response_fields(response);
        self.events.push_back(GrpcEvent::Headers { fields, end_of_stream: is_bodiless });
        let pieces = response.body.iter().map(|piece| GrpcEvent::Data(Bytes::from(piece.clone())));
        self.events.extend(pieces);
        if !response.trailers.is_empty() {
            self.events.push_back(GrpcEvent::Trailers(field_map(Message::ResponseTrailers, &response.trailers)));
        } else if !is_bodiless {
            self.events.push_back(GrpcEvent::End);
        }
    }

    fn follow(&mut self) {
        let Some(plan) = &mut self.plan else { return };
        while let Some(piece) = plan.next_piece(self.received, self.has_closed) {
            self.events.push_back(match piece {
                GrpcPiece::Head(fields, end_of_stream) => {
                    let mut head = field_map(Message::Response, &fields);
                    head.push(b":status", b"200");
                    GrpcEvent::Headers { fields: head, end_of_stream }
                }
                GrpcPiece::Message(bytes) => GrpcEvent::Data(bytes),
                GrpcPiece::Trailers(fields) => GrpcEvent::Trailers(field_map(Message::ResponseTrailers, &fields)),
            });
        }
    }

    /// Whether it is known how it will be answered.
    pub(crate) fn is_answered(&self) -> bool {
        self.at.is_some()
    }

    /// When something is to be told, if anything is.
    pub(crate) fn due(&self) -> Option<Duration> {
        self.at.filter(|_| !self.events.is_empty())
    }

    /// The next thing to tell.
    pub(crate) fn next(&mut self) -> Option<GrpcEvent> {
        let event = self.events.pop_front()?;
        self.has_ended = match &event {
            GrpcEvent::Headers { end_of_stream, .. } => *end_of_stream,
            GrpcEvent::Data(_) | GrpcEvent::Sent(_) | GrpcEvent::Turn => false,
            GrpcEvent::Trailers(_) | GrpcEvent::End | GrpcEvent::Reset(_) | GrpcEvent::Local { .. } => true,
        };
        Some(event)
    }

    /// Whether the last thing was told.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is sent when so many messages have come and the caller's side has ended or not, in words.
    fn sent(answer: &mut GrpcAnswer, received: usize, ended: bool) -> Vec<String> {
        let names = |fields: &FieldLines| fields.iter().map(|(name, _)| name.to_owned()).collect::<Vec<_>>().join(" ");
        std::iter::from_fn(|| answer.next_piece(received, ended))
            .map(|piece| match piece {
                GrpcPiece::Head(fields, end) => format!("head {}{}", names(&fields), if end { "." } else { "" }),
                GrpcPiece::Message(bytes) => format!("message {}", String::from_utf8_lossy(&bytes[5..])),
                GrpcPiece::Trailers(fields) => format!("trailers {}", names(&fields)),
            })
            .collect()
    }

    #[test]
    fn messages_are_sent_when_the_plan_says() {
        let plan = GrpcPlan::messages(["a", "b"]).field("x", "y").trailer("z", "");
        let (head, end) = ("head content-type x", "trailers grpc-status z");
        let mut at_once = GrpcAnswer::new(plan.clone());
        assert_eq!(sent(&mut at_once, 0, false), [head, "message a", "message b", end]);
        assert_eq!(sent(&mut at_once, 1, true), [""; 0]);
        let mut per_message = GrpcAnswer::new(plan.clone().replies(Replies::PerMessage));
        assert_eq!(sent(&mut per_message, 0, false), [head]);
        assert_eq!(sent(&mut per_message, 1, false), ["message a"]);
        assert_eq!(sent(&mut per_message, 1, true), ["message b", end]);
        let mut at_end = GrpcAnswer::new(plan.replies(Replies::AtEnd));
        assert_eq!(sent(&mut at_end, 1, false), [head]);
        assert_eq!(sent(&mut at_end, 1, true), ["message a", "message b", end]);
    }

    #[test]
    fn what_has_only_a_status_is_one_piece() {
        let mut failed = GrpcAnswer::new(GrpcPlan::failed(7, "no"));
        assert_eq!(sent(&mut failed, 0, false), ["head content-type grpc-status grpc-message."]);
        let mut with_metadata = GrpcAnswer::new(GrpcPlan::failed(7, "").field("x", "y"));
        assert_eq!(sent(&mut with_metadata, 0, false), ["head content-type x", "trailers grpc-status"]);
    }
}
