//! One stream's way through its filters: what each filter holds back, per direction.
//!
//! Plain bookkeeping, without a guest in sight; [`crate::worker`] calls the guests and moves the bytes.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::BytesMut;

use crate::abi::Direction;
use crate::exchange::Exchange;

/// What a filter holds back in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hold {
    /// Nothing: everything passes.
    #[default]
    Nothing,
    /// The headers; body callbacks go on.
    Headers,
    /// Headers or body, and no callback comes until the guest resumes.
    All,
    /// Body that has been shown.
    Body,
    /// The trailers.
    Trailers,
}

/// One filter's side of one direction.
#[derive(Debug, Default)]
pub(crate) struct LaneStage {
    pub(crate) hold: Hold,
    /// While something is held, a full buffer stops the sender; otherwise it is an error.
    pub(crate) watermark: bool,
    pub(crate) headers_passed: bool,
    /// The end of the message has arrived here.
    pub(crate) end_seen: bool,
    /// Trailers have arrived here and wait.
    pub(crate) trailers_held: bool,
    /// What the guest is shown grows with every chunk.
    pub(crate) buffering: bool,
    /// Bytes that wait here without being shown. What is shown is in the exchange's view.
    pub(crate) held: BytesMut,
}

/// A filter's place in a stream, be it HTTP or TCP.
#[derive(Debug)]
pub(crate) struct Seat {
    /// Index of the plugin.
    pub(crate) plugin: usize,
    /// The guest's context, with the number of the VM it was made in.
    pub(crate) context: Option<(u64, u32)>,
    /// The plugin is not there, and the stream passes without it.
    pub(crate) skipped: bool,
}

impl Seat {
    pub(crate) fn new(plugin: usize) -> Seat {
        Seat { plugin, context: None, skipped: false }
    }

    /// Whether the guest's context was made in this VM.
    pub(crate) fn is_in(&self, vm: u64) -> bool {
        self.context.is_some_and(|(of, _)| of == vm)
    }
}

/// A filter in an HTTP stream.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) seat: Seat,
    request: LaneStage,
    response: LaneStage,
}

impl Stage {
    pub(crate) fn new(plugin: usize) -> Stage {
        Stage { seat: Seat::new(plugin), request: LaneStage::default(), response: LaneStage::default() }
    }

    pub(crate) fn lane(&self, direction: Direction) -> &LaneStage {
        match direction {
            Direction::Request => &self.request,
            Direction::Response => &self.response,
        }
    }

    pub(crate) fn lane_mut(&mut self, direction: Direction) -> &mut LaneStage {
        match direction {
            Direction::Request => &mut self.request,
            Direction::Response => &mut self.response,
        }
    }

    /// Whether the guest has something that only it can release.
    pub(crate) fn holds(&self) -> bool {
        self.request.hold != Hold::Nothing || self.response.hold != Hold::Nothing
    }
}

/// How far one direction has come at the far end of the filters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sent {
    #[default]
    Nothing,
    Headers,
    /// Everything.
    End,
}

/// One stream.
pub(crate) struct Stream {
    pub(crate) exchange: Rc<RefCell<Exchange>>,
    pub(crate) stages: Vec<Stage>,
    pub(crate) request_sent: Sent,
    pub(crate) response_sent: Sent,
    /// An answer was made here: nothing more of the request or of the upstream's response counts.
    pub(crate) local: Option<Rc<str>>,
    /// The stream is to be cut off: nothing counts any more.
    pub(crate) reset: bool,
    /// The embedder was told to leave the upstream.
    pub(crate) upstream_cancelled: bool,
    pub(crate) is_head: bool,
    /// The embedder was told not to read.
    pub(crate) request_blocked: bool,
    pub(crate) response_blocked: bool,
}

impl Stream {
    /// The stage where a direction begins.
    pub(crate) fn first(&self, direction: Direction) -> Option<usize> {
        match direction {
            Direction::Request => (!self.stages.is_empty()).then_some(0),
            Direction::Response => self.stages.len().checked_sub(1),
        }
    }

    /// The stage behind this one.
    pub(crate) fn next(&self, direction: Direction, stage: usize) -> Option<usize> {
        match direction {
            Direction::Request => Some(stage + 1).filter(|next| *next < self.stages.len()),
            Direction::Response => stage.checked_sub(1),
        }
    }

    pub(crate) fn sent(&mut self, direction: Direction) -> &mut Sent {
        match direction {
            Direction::Request => &mut self.request_sent,
            Direction::Response => &mut self.response_sent,
        }
    }

    pub(crate) fn blocked(&mut self, direction: Direction) -> &mut bool {
        match direction {
            Direction::Request => &mut self.request_blocked,
            Direction::Response => &mut self.response_blocked,
        }
    }

    /// Bytes that wait at a stage, shown or not.
    pub(crate) fn waiting(&self, direction: Direction, stage: usize) -> usize {
        let shown = self.exchange.borrow().stages[stage].body(direction).map_or(0, <[u8]>::len);
        self.stages[stage].lane(direction).held.len() + shown
    }

    /// Whether some stage has as many bytes as may wait and stops the sender rather than failing.
    pub(crate) fn is_full(&self, direction: Direction) -> bool {
        let most = self.exchange.borrow().info.buffer_bytes_max;
        (0..self.stages.len()).any(|stage| {
            let lane = self.stages[stage].lane(direction);
            lane.hold != Hold::Nothing && lane.watermark && self.waiting(direction, stage) >= most
        })
    }
}
