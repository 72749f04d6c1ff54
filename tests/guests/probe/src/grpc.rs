//! gRPC on demand: the field `x-grpc` is a script, and the answer's body a transcript of what the host made of it.
//!
//! A script's parts are separated by `;`. The first runs when the request comes, the next one after each callback. A part is a
//! list of words:
//!
//! * `call:UPSTREAM/SERVICE/METHOD:MESSAGE:MILLISECONDS` and `stream:UPSTREAM/SERVICE/METHOD`
//! * `send:MESSAGE`, `last:MESSAGE` (which ends our side), `close`, `cancel`, on what was opened last
//! * `meta:NAME=VALUE`: metadata for what is opened next; `%` and two digits stand for a byte
//! * `ask:UPSTREAM/PATH`: an HTTP callout
//! * `status`: what `proxy_get_status` says; `token`: the token of what was opened last
//! * `answer`: the transcript, now; without it it is sent once a call or a stream has ended and the script too
//!
//! The transcript has a line per callback, and one for each word that the host answered otherwise than with success.

use std::time::Duration;

use proxy_wasm::hostcalls;
use proxy_wasm::types::{BufferType, MapType, Status};

/// A script on its way.
pub(crate) struct Script {
    parts: std::vec::IntoIter<String>,
    metadata: Vec<(String, Vec<u8>)>,
    token: u32,
    pub(crate) transcript: Vec<String>,
    /// The call or stream has ended.
    ended: bool,
    answer: bool,
}

impl Script {
    pub(crate) fn new(script: &[u8]) -> Script {
        let parts: Vec<String> = String::from_utf8_lossy(script).split(';').map(str::to_owned).collect();
        Script {
            parts: parts.into_iter(),
            metadata: Vec::new(),
            token: 0,
            transcript: Vec::new(),
            ended: false,
            answer: false,
        }
    }

    /// Runs the next part; says whether the transcript is to be sent.
    pub(crate) fn go_on(&mut self) -> bool {
        let part = self.parts.next().unwrap_or_default();
        for word in part.split_whitespace() {
            if let Err(status) = self.run(word) {
                self.transcript.push(format!("{} -> {}", word.split(':').next().unwrap_or_default(), status as u32));
            }
        }
        self.answer || (self.ended && self.parts.as_slice().is_empty())
    }

    fn run(&mut self, word: &str) -> Result<(), Status> {
        let (verb, rest) = word.split_once(':').unwrap_or((word, ""));
        let (target, rest) =
            if matches!(verb, "call" | "stream") { rest.split_once(':').unwrap_or((rest, "")) } else { ("", rest) };
        let (upstream, path) = target.split_once('/').unwrap_or((target, ""));
        let (service, method) = path.split_once('/').unwrap_or((path, ""));
        let upstream = String::from_utf8_lossy(&decoded(upstream)).into_owned();
        let metadata = std::mem::take(&mut self.metadata);
        let lines = || metadata.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        match verb {
            "call" => {
                let (message, timeout) = rest.split_once(':').unwrap_or((rest, "0"));
                let timeout = Duration::from_millis(timeout.parse().unwrap_or_default());
                let message = decoded(message);
                self.token =
                    hostcalls::dispatch_grpc_call(&upstream, service, method, lines(), Some(&message), timeout)?;
            }
            "stream" => self.token = hostcalls::open_grpc_stream(&upstream, service, method, lines())?,
            "send" | "last" => {
                hostcalls::send_grpc_stream_message(self.token, Some(&decoded(rest)), verb == "last")?;
            }
            "close" => hostcalls::close_grpc_stream(self.token)?,
            "cancel" => hostcalls::cancel_grpc_stream(self.token)?,
            "meta" => {
                self.metadata = metadata.clone();
                let (name, value) = rest.split_once('=').unwrap_or((rest, ""));
                self.metadata.push((String::from_utf8_lossy(&decoded(name)).into_owned(), decoded(value)));
            }
            "ask" => {
                let (upstream, path) = rest.split_once('/').unwrap_or((rest, ""));
                let path = format!("/{path}");
                let fields = vec![(":method", "GET"), (":path", path.as_str()), (":authority", "probe.example")];
                hostcalls::dispatch_http_call(upstream, fields, None, Vec::new(), Duration::from_secs(5))?;
            }
            "status" => self.status(),
            "answer" => self.answer = true,
            "token" => self.transcript.push(format!("token {}", self.token)),
            _ => self.transcript.push(format!("no such word: {verb}")),
        }
        Ok(())
    }

    fn status(&mut self) {
        let line = match hostcalls::get_grpc_status() {
            Ok((code, message)) => format!("status {code} {}", shown(message.unwrap_or_default().as_bytes())),
            Err(status) => format!("status -> {}", status as u32),
        };
        self.transcript.push(line);
    }

    pub(crate) fn metadata(&mut self, what: &str, map: MapType) {
        let lines = hostcalls::get_map_bytes(map).unwrap_or_default();
        // What proxies and servers add of their own is no part of the comparison.
        let own = |name: &str| !matches!(name, "date" | "server") && !name.starts_with("x-envoy");
        let mut lines: Vec<String> = lines
            .iter()
            .filter(|(name, _)| own(name))
            .map(|(name, value)| format!("{name}={}", shown(value)))
            .collect();
        lines.sort();
        self.transcript.push(format!("{what} {}", lines.join(" ")));
    }

    pub(crate) fn message(&mut self, len: usize) {
        let message = hostcalls::get_buffer(BufferType::GrpcReceiveBuffer, 0, len);
        let message = message.ok().flatten().unwrap_or_default();
        let shown = if message.len() > 64 {
            format!("{} bytes", message.len())
        } else {
            String::from_utf8_lossy(&message).into_owned()
        };
        self.transcript.push(format!("message {shown}"));
    }

    pub(crate) fn closed(&mut self, code: u32) {
        self.transcript.push(format!("close {code}"));
        self.status();
        self.ended = true;
    }

    /// What came of a unary call.
    pub(crate) fn answered(&mut self, code: u32, len: usize) {
        if code == 0 {
            self.message(len);
            self.ended = true;
        } else {
            self.closed(code);
        }
    }
}

/// A message as far as all hosts have it: each has words of its own for why a connection failed.
fn shown(message: &[u8]) -> String {
    let message = String::from_utf8_lossy(message);
    message.split_once(". reset reason").map_or(&*message, |(message, _)| message).to_owned()
}

/// `%41` is `A`.
fn decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        let escaped = (*byte == b'%')
            .then(|| std::str::from_utf8(tail.get(..2)?).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok()));
        match escaped.flatten() {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => bytes.push(*byte),
        }
    }
    bytes
}
