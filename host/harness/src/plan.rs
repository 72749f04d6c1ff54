//! What is to be sent: requests, responses, and answers to callouts. Plain data, the same for every host.

use std::time::Duration;

use crate::grpc::GrpcPlan;
use crate::message::FieldLines;

/// The authority of requests that name none.
pub(crate) const AUTHORITY_DEFAULT: &str = "api.example.com";

/// A request to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestPlan {
    /// The method.
    pub method: String,
    /// The request target.
    pub path: String,
    /// The authority.
    pub authority: String,
    /// Header fields in order.
    pub fields: FieldLines,
    /// The body in the pieces it arrives in; no piece means no body.
    pub body: Vec<Vec<u8>>,
    /// Trailer fields.
    pub trailers: FieldLines,
}

impl RequestPlan {
    /// A request without fields and body to `api.example.com`.
    pub fn new(method: &str, path: &str) -> RequestPlan {
        RequestPlan {
            method: method.to_owned(),
            path: path.to_owned(),
            authority: AUTHORITY_DEFAULT.to_owned(),
            fields: FieldLines::new(),
            body: Vec::new(),
            trailers: FieldLines::new(),
        }
    }
}

/// A response that a script gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponsePlan {
    /// The status code.
    pub status: u16,
    /// Header fields in order.
    pub fields: FieldLines,
    /// The body in the pieces it arrives in.
    pub body: Vec<Vec<u8>>,
    /// Trailer fields.
    pub trailers: FieldLines,
}

/// 200 with the body `ok`.
impl Default for ResponsePlan {
    fn default() -> ResponsePlan {
        ResponsePlan::new(200).body("ok")
    }
}

impl ResponsePlan {
    /// A response without fields and body.
    pub fn new(status: u16) -> ResponsePlan {
        ResponsePlan { status, fields: FieldLines::new(), body: Vec::new(), trailers: FieldLines::new() }
    }

    /// 200 with a JSON body.
    pub fn json(value: &serde_json::Value) -> ResponsePlan {
        ResponsePlan::new(200).field("content-type", "application/json").body(value.to_string())
    }

    /// Adds a field line.
    #[must_use]
    pub fn field(mut self, name: &str, value: impl AsRef<[u8]>) -> ResponsePlan {
        self.fields.push(name, value.as_ref());
        self
    }

    /// Adds a piece of body; several calls make several pieces.
    #[must_use]
    pub fn body(mut self, piece: impl AsRef<[u8]>) -> ResponsePlan {
        if !piece.as_ref().is_empty() {
            self.body.push(piece.as_ref().to_vec());
        }
        self
    }

    /// Adds a trailer line.
    #[must_use]
    pub fn trailer(mut self, name: &str, value: impl AsRef<[u8]>) -> ResponsePlan {
        self.trailers.push(name, value.as_ref());
        self
    }
}

/// An answer to a callout, and to which calls it is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Callout {
    /// Only for this path; `None` means any.
    pub path: Option<String>,
    /// How often this answer is given before the next one is; `None` means always.
    pub times: Option<u32>,
    /// How long the answer takes. Where the call's own deadline is shorter, the filter sees the 504 that hosts make of it.
    pub delay: Duration,
    /// The answer.
    pub answer: CalloutAnswer,
}

impl Callout {
    /// This answer to every call.
    pub fn always(answer: impl Into<CalloutAnswer>) -> Callout {
        Callout { path: None, times: None, delay: Duration::ZERO, answer: answer.into() }
    }

    /// This answer to one call.
    pub fn once(answer: impl Into<CalloutAnswer>) -> Callout {
        Callout { times: Some(1), ..Callout::always(answer) }
    }

    /// Only for calls to this path.
    #[must_use]
    pub fn path(mut self, path: &str) -> Callout {
        self.path = Some(path.to_owned());
        self
    }

    /// The answer takes this long.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Callout {
        self.delay = delay;
        self
    }

    /// Takes the first of `script` that fits a call to `path`, and counts it.
    pub fn choose(script: &mut [Callout], path: &str) -> Option<Callout> {
        let fits = |callout: &&mut Callout| {
            callout.times != Some(0) && callout.path.as_ref().is_none_or(|expected| expected == path)
        };
        let callout = script.iter_mut().find(fits)?;
        if let Some(times) = &mut callout.times {
            *times -= 1;
        }
        Some(callout.clone())
    }
}

/// What becomes of a callout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CalloutAnswer {
    /// It is answered.
    Response(ResponsePlan),
    /// It is answered as a gRPC server does.
    Grpc(GrpcPlan),
    /// The upstream is not there: the filter sees the 503 that the host makes.
    Refused,
    /// No answer ever comes: the filter sees the 504 that the host makes once its own deadline has passed.
    Timeout,
    /// The answer breaks off after its head: the filter is told of a failure, and sees no field.
    Reset,
}

impl From<ResponsePlan> for CalloutAnswer {
    fn from(response: ResponsePlan) -> CalloutAnswer {
        CalloutAnswer::Response(response)
    }
}

impl From<GrpcPlan> for CalloutAnswer {
    fn from(answer: GrpcPlan) -> CalloutAnswer {
        CalloutAnswer::Grpc(answer)
    }
}

/// A status alone.
impl From<u16> for CalloutAnswer {
    fn from(status: u16) -> CalloutAnswer {
        CalloutAnswer::Response(ResponsePlan::new(status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_that_fits_is_given_as_often_as_it_may_be() {
        let mut script = vec![Callout::once(200).path("/a"), Callout::once(201), Callout::always(202).path("/b")];
        let mut ask = |path: &str| match Callout::choose(&mut script, path)?.answer {
            CalloutAnswer::Response(response) => Some(response.status),
            _ => None,
        };
        assert_eq!(
            [ask("/a"), ask("/b"), ask("/b"), ask("/b"), ask("/a")],
            [Some(200), Some(201), Some(202), Some(202), None]
        );
    }
}
