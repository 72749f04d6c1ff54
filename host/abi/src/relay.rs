//! A TCP connection's way through its filters, as Envoy's network filters have it.
//!
//! Unlike an HTTP message, which moves from filter to filter, the bytes of each direction wait in one buffer that all
//! filters of the connection look at in turn. The first that pauses ends the round; the next round begins at the first
//! filter again, which then sees what it has let pass before. Only when a whole round has passed do the bytes leave.
//!
//! Plain bookkeeping, without a guest in sight; [`crate::worker`] calls the guests and moves the bytes.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::BytesMut;

use crate::abi::Direction;
use crate::exchange::Exchange;
use crate::stream::Seat;

/// What belongs to either direction.
#[derive(Debug, Default)]
pub(crate) struct Both<T> {
    request: T,
    response: T,
}

impl<T> Both<T> {
    pub(crate) fn get(&self, direction: Direction) -> &T {
        match direction {
            Direction::Request => &self.request,
            Direction::Response => &self.response,
        }
    }

    pub(crate) fn get_mut(&mut self, direction: Direction) -> &mut T {
        match direction {
            Direction::Request => &mut self.request,
            Direction::Response => &mut self.response,
        }
    }
}

/// The bytes that wait in a connection, and who of its filters may look at them now.
#[derive(Debug, Default)]
pub(crate) struct TcpData {
    pub(crate) waiting: Both<BytesMut>,
    pub(crate) stages: Vec<TcpView>,
}

/// What one filter may see and has asked for.
#[derive(Debug, Default)]
pub(crate) struct TcpView {
    /// From when the guest is shown the bytes until it lets them pass.
    pub(crate) sees: Both<bool>,
    pub(crate) asked: TcpAsked,
}

/// What a guest asked for in a callback; carried out once the callback has returned.
#[derive(Debug, Default)]
pub(crate) struct TcpAsked {
    /// The worker knows that something was asked, and will look.
    pub(crate) noted: bool,
    pub(crate) resume: bool,
    /// Envoy's word for who closed.
    pub(crate) close: Option<&'static str>,
}

impl TcpData {
    pub(crate) fn new(stages: usize) -> TcpData {
        TcpData { waiting: Both::default(), stages: (0..stages).map(|_| TcpView::default()).collect() }
    }

    pub(crate) fn seen(&self, stage: usize, direction: Direction) -> Option<&BytesMut> {
        let sees = *self.stages.get(stage)?.sees.get(direction);
        sees.then(|| self.waiting.get(direction))
    }

    pub(crate) fn seen_mut(&mut self, stage: usize, direction: Direction) -> Option<&mut BytesMut> {
        let sees = *self.stages.get(stage)?.sees.get(direction);
        sees.then(|| self.waiting.get_mut(direction))
    }
}

/// Whether a filter knows of the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// Not yet.
    #[default]
    Due,
    /// It does, and holds the connection back from the filters behind it and from the upstream.
    Held,
    /// It does.
    Done,
}

/// A filter in a connection.
#[derive(Debug)]
pub(crate) struct RelayStage {
    pub(crate) seat: Seat,
    pub(crate) greeting: Greeting,
}

/// The end of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum End {
    #[default]
    Open,
    /// The sender has finished; its last bytes, or the mere end, wait.
    Waits,
    /// It was passed on.
    Passed,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Progress {
    /// Some filter does not know of it yet, or holds it.
    #[default]
    Greeting,
    /// The embedder was told to connect to the upstream.
    Connecting,
    /// Both sides are there.
    Open,
    /// It is to be closed: nothing counts any more.
    Closing,
}

/// One connection.
pub(crate) struct Relay {
    pub(crate) exchange: Rc<RefCell<Exchange>>,
    pub(crate) stages: Vec<RelayStage>,
    pub(crate) progress: Progress,
    pub(crate) end: Both<End>,
    /// The filter that ended the last round, and so holds what waits.
    pub(crate) held_by: Both<Option<usize>>,
    /// The embedder was told not to read.
    pub(crate) blocked: Both<bool>,
}

impl Relay {
    /// A connection whose exchange has [`TcpData`] for as many filters.
    pub(crate) fn new(filters: &[usize], exchange: Exchange) -> Relay {
        Relay {
            exchange: Rc::new(RefCell::new(exchange)),
            stages: filters
                .iter()
                .map(|plugin| RelayStage { seat: Seat::new(*plugin), greeting: Greeting::Due })
                .collect(),
            progress: Progress::Greeting,
            end: Both::default(),
            held_by: Both::default(),
            blocked: Both { request: true, response: true },
        }
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.progress == Progress::Closing
    }

    /// Bytes that wait in one direction.
    pub(crate) fn waiting(&self, direction: Direction) -> usize {
        self.exchange.borrow().tcp.as_ref().map_or(0, |tcp| tcp.waiting.get(direction).len())
    }

    /// Whether only this filter's guest can move the connection on.
    pub(crate) fn waits_for(&self, stage: usize) -> bool {
        let holds = |direction| *self.held_by.get(direction) == Some(stage);
        self.stages[stage].greeting == Greeting::Held || holds(Direction::Request) || holds(Direction::Response)
    }

    /// Whether the embedder is to read nothing of this direction now: nobody is there to send it to, or a filter holds as
    /// much as may wait.
    pub(crate) fn is_blocked(&self, direction: Direction) -> bool {
        let most = self.exchange.borrow().info.buffer_bytes_max;
        self.progress != Progress::Open || self.waiting(direction) >= most
    }
}
