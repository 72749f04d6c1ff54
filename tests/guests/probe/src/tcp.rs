//! The probe on TCP connections. The plugin configuration says what it does with one:
//!
//! * `tcp`: holds what the client sends until a line is whole. The line `panic` is a trap, `quit` closes the connection,
//!   `ask` asks the upstream `keys` first: 200 lets it pass, anything else closes the connection. In all that passes, both
//!   ways, `secret` becomes `******`.
//! * `tcp ask`: asks before it lets a new connection pass
//! * `tcp count`: looks at nothing
//!
//! At the end of a connection it says in the log how much was shown to it and who closed.

use std::time::Duration;

use proxy_wasm::traits::{Context, StreamContext};
use proxy_wasm::types::{Action, LogLevel, PeerType};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Lines,
    AskFirst,
    Count,
}

impl Wish {
    pub(crate) fn read(configuration: &[u8]) -> Option<Wish> {
        match configuration {
            b"tcp" => Some(Wish::Lines),
            b"tcp ask" => Some(Wish::AskFirst),
            b"tcp count" => Some(Wish::Count),
            _ => None,
        }
    }
}

pub(crate) struct Connection {
    wish: Wish,
    /// Waits for an answer.
    asks: bool,
    from_client: usize,
    from_upstream: usize,
    closed_by: Option<PeerType>,
}

impl Connection {
    pub(crate) fn new(wish: Wish) -> Connection {
        Connection { wish, asks: false, from_client: 0, from_upstream: 0, closed_by: None }
    }

    fn ask(&mut self) -> Action {
        let fields = vec![(":method", "GET"), (":path", "/keys"), (":authority", "keys.example")];
        self.asks = self.dispatch_http_call("keys", fields, None, Vec::new(), Duration::from_secs(1)).is_ok();
        if !self.asks {
            self.close_downstream();
        }
        Action::Pause
    }
}

/// The same bytes without what must not be seen, if it is in them.
fn hidden(bytes: &[u8]) -> Option<Vec<u8>> {
    let text = String::from_utf8_lossy(bytes);
    text.contains("secret").then(|| text.replace("secret", "******").into_bytes())
}

impl Context for Connection {
    fn on_http_call_response(&mut self, _: u32, _: usize, _: usize, _: usize) {
        self.asks = false;
        if self.get_http_call_response_header_bytes(":status").is_some_and(|status| status == b"200") {
            self.resume_downstream();
        } else {
            self.close_downstream();
        }
    }
}

impl StreamContext for Connection {
    fn on_new_connection(&mut self) -> Action {
        if self.wish == Wish::AskFirst { self.ask() } else { Action::Continue }
    }

    fn on_downstream_data(&mut self, size: usize, end_of_stream: bool) -> Action {
        let data = match self.wish {
            Wish::Lines => self.get_downstream_data(0, size).unwrap_or_default(),
            Wish::AskFirst | Wish::Count => {
                self.from_client += size;
                return Action::Continue;
            }
        };
        if self.asks || !(end_of_stream || data.ends_with(b"\n")) {
            return Action::Pause;
        }
        self.from_client += size;
        if let Some(data) = hidden(&data) {
            self.set_downstream_data(0, size, &data);
        }
        let mut wish = Action::Continue;
        for line in data.split(|byte| *byte == b'\n') {
            match line {
                b"panic" => panic!("the probe was told to panic"),
                b"quit" => {
                    self.close_downstream();
                    wish = Action::Pause;
                }
                b"ask" => wish = self.ask(),
                _ => {}
            }
        }
        wish
    }

    fn on_upstream_data(&mut self, size: usize, _: bool) -> Action {
        self.from_upstream += size;
        if self.wish == Wish::Lines
            && let Some(data) = self.get_upstream_data(0, size).as_deref().and_then(hidden)
        {
            self.set_upstream_data(0, size, &data);
        }
        Action::Continue
    }

    fn on_downstream_close(&mut self, peer: PeerType) {
        self.closed_by = Some(peer);
    }

    fn on_log(&mut self) {
        let Connection { from_client, from_upstream, closed_by, .. } = self;
        let message = format!("probe: {from_client} up, {from_upstream} down, closed by {closed_by:?}");
        // A host that takes no log line is none that these tests are about.
        let _ = proxy_wasm::hostcalls::log(LogLevel::Error, &message);
    }
}
