//! The gRPC side of [`crate::upstream::Upstream`]: answers that follow a [`GrpcPlan`] while the request still comes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::{BodyExt as _, Empty};
use hyper::Response;
use hyper::body::Incoming;
use portcullis_abi::GrpcMessages;
use portcullis_harness::{FieldLines, GrpcAnswer, GrpcPiece, GrpcPlan};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::upstream::{Answer, Note, Unanswered, header_map};

/// Begins the answer; the rest of it follows as the plan says.
pub(crate) async fn respond(plan: GrpcPlan, body: Incoming, note: Note) -> Response<Answer> {
    let (pieces, mut received) = channel(1);
    tokio::spawn(converse(GrpcAnswer::new(plan), body, note, pieces));
    let (fields, end) = match received.recv().await {
        Some(GrpcPiece::Head(fields, end)) => (fields, end),
        _ => (FieldLines::new(), true),
    };
    // What is all in the head says so, rather than with an empty frame behind it.
    let body = if end { Empty::new().map_err(|never| match never {}).boxed() } else { Pieces(received).boxed() };
    let mut response = Response::new(body);
    *response.headers_mut() = header_map(&fields);
    response
}

/// Reads the request and sends what is due. Ends with either side.
async fn converse(mut answer: GrpcAnswer, mut body: Incoming, note: Note, pieces: Sender<GrpcPiece>) {
    let mut messages = GrpcMessages::new(usize::MAX);
    let mut received = 0;
    let mut ended = false;
    loop {
        while let Some(piece) = answer.next_piece(received, ended) {
            if pieces.send(piece).await.is_err() {
                return;
            }
        }
        if ended {
            return;
        }
        match body.frame().await {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    messages.push(data);
                }
                note.add(frame);
                while let Ok(Some(_)) = messages.next_message() {
                    received += 1;
                }
            }
            Some(Err(_)) => return,
            None => {
                note.complete();
                ended = true;
            }
        }
    }
}

/// A body of pieces that come one by one.
struct Pieces(Receiver<GrpcPiece>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Unanswered;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Unanswered>>> {
        Poll::Ready(match ready!(self.0.poll_recv(cx)) {
            Some(GrpcPiece::Message(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(GrpcPiece::Trailers(fields)) => Some(Ok(Frame::trailers(header_map(&fields)))),
            Some(GrpcPiece::Head(..)) | None => None,
        })
    }
}
