//! [`Origin`]: a server that answers exactly what a row says, byte for byte, and notes exactly what it was sent.
//!
//! Servers made with HTTP libraries add fields and leave out trailers that nobody asked for; here that would be
//! mistaken for what the hosts do.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use portcullis_harness::{FieldLines, ObservedRequest, ResponsePlan};

use crate::process::DEADLINE;

/// A server on loopback. Dropping it ends it.
pub struct Origin {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Blocks until the next piece may follow.
type Pace = Arc<dyn Fn(usize) + Send + Sync>;

#[derive(Default)]
struct State {
    answer: ResponsePlan,
    pace: Option<Pace>,
    requests: Vec<ObservedRequest>,
}

impl Origin {
    /// Starts one.
    pub fn start() -> Result<Origin, String> {
        let fail = |error: std::io::Error| format!("the suite's origin cannot start: {error}");
        let listener = TcpListener::bind("127.0.0.1:0").map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        let state = Arc::new(Mutex::new(State::default()));
        let stopped = Arc::new(AtomicBool::new(false));
        let (shared, stop) = (Arc::clone(&state), Arc::clone(&stopped));
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let state = Arc::clone(&shared);
                // It ends with its connection.
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        Ok(Origin { address, state, stopped, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Says what it answers from now on, and what it waits for before each piece: 0 is the head, then comes the body, then
    /// the end of one in chunks.
    pub fn answer(&self, answer: ResponsePlan, pace: impl Fn(usize) + Send + Sync + 'static) {
        let mut state = lock(&self.state);
        state.answer = answer;
        state.pace = Some(Arc::new(pace));
        state.requests.clear();
    }

    /// What it was asked since it was last told what to answer.
    pub fn requests(&self) -> Vec<ObservedRequest> {
        lock(&self.state).requests.clone()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) {
    if stream.set_nodelay(true).and(stream.set_read_timeout(Some(DEADLINE))).is_err() {
        return;
    }
    let mut received = Vec::new();
    while let Some(head) = read_head(&mut stream, &mut received) {
        // Noted before the body is read, so that a request which is broken off is seen, too.
        let index = {
            let mut state = lock(state);
            state.requests.push(head.clone());
            state.requests.len() - 1
        };
        let Some(request) = read_body(&mut stream, &mut received, head) else { return };
        let (answer, pace) = {
            let mut state = lock(state);
            if let Some(noted) = state.requests.get_mut(index) {
                *noted = request;
            }
            (state.answer.clone(), state.pace.clone())
        };
        for (index, piece) in wire_pieces(&answer).iter().enumerate() {
            if let Some(pace) = &pace {
                pace(index);
            }
            if stream.write_all(piece).is_err() {
                return;
            }
        }
    }
}

/// More bytes; `false` at the end of the connection.
fn read_more(stream: &mut TcpStream, received: &mut Vec<u8>) -> bool {
    let mut block = [0; 16 * 1024];
    match stream.read(&mut block) {
        Ok(0) | Err(_) => false,
        Ok(count) => {
            received.extend_from_slice(block.get(..count).unwrap_or_default());
            true
        }
    }
}

fn read_head(stream: &mut TcpStream, received: &mut Vec<u8>) -> Option<ObservedRequest> {
    loop {
        let mut lines = [httparse::EMPTY_HEADER; 512];
        let mut head = httparse::Request::new(&mut lines);
        if let httparse::Status::Complete(len) = head.parse(received).ok()? {
            let mut request = ObservedRequest {
                method: head.method?.to_owned(),
                path: head.path?.to_owned(),
                ..ObservedRequest::default()
            };
            for line in head.headers.iter() {
                if line.name.eq_ignore_ascii_case("host") {
                    request.authority = String::from_utf8_lossy(line.value).into_owned();
                } else {
                    request.fields.push(line.name, line.value);
                }
            }
            received.drain(..len);
            return Some(request);
        }
        if !read_more(stream, received) {
            return None;
        }
    }
}

fn read_body(stream: &mut TcpStream, received: &mut Vec<u8>, mut request: ObservedRequest) -> Option<ObservedRequest> {
    let chunked = request.fields.get_all("transfer-encoding").any(|coding| coding.eq_ignore_ascii_case(b"chunked"));
    if !chunked {
        let len = request.fields.get("content-length").and_then(|len| std::str::from_utf8(len).ok()?.parse().ok());
        let len: usize = len.unwrap_or_default();
        while received.len() < len {
            if !read_more(stream, received) {
                return None;
            }
        }
        request.body = received.drain(..len).collect();
        request.complete = true;
        return Some(request);
    }
    loop {
        let size = match httparse::parse_chunk_size(received).ok()? {
            httparse::Status::Complete(size) => Some(size),
            httparse::Status::Partial => None,
        };
        match size {
            Some((start, 0)) => {
                let mut lines = [httparse::EMPTY_HEADER; 64];
                let rest = received.get(start..)?;
                if let httparse::Status::Complete((len, lines)) = httparse::parse_headers(rest, &mut lines).ok()? {
                    request.trailers = lines.iter().map(|line| (line.name, line.value)).collect();
                    request.complete = true;
                    received.drain(..start + len);
                    return Some(request);
                }
            }
            Some((start, len)) => {
                let end = start + usize::try_from(len).ok()?;
                if received.len() >= end + 2 {
                    request.body.extend_from_slice(received.get(start..end)?);
                    received.drain(..end + 2);
                    continue;
                }
            }
            None => {}
        }
        if !read_more(stream, received) {
            return None;
        }
    }
}

/// The answer in the pieces it is written in: the head, each piece of the body, the end.
fn wire_pieces(answer: &ResponsePlan) -> Vec<Vec<u8>> {
    let mut head = format!("HTTP/1.1 {} Row\r\n", answer.status).into_bytes();
    let framed = answer.fields.get("content-length").is_some() || answer.fields.get("transfer-encoding").is_some();
    let chunked = answer.body.len() > 1 || !answer.trailers.is_empty();
    let bodiless = matches!(answer.status, 204 | 304);
    push_lines(&mut head, &answer.fields);
    if chunked && !framed {
        head.extend_from_slice(b"transfer-encoding: chunked\r\n");
    } else if !framed && !bodiless {
        let len: usize = answer.body.iter().map(Vec::len).sum();
        head.extend_from_slice(format!("content-length: {len}\r\n").as_bytes());
    }
    head.extend_from_slice(b"\r\n");
    let mut pieces = vec![head];
    for body in &answer.body {
        if chunked && !framed {
            let mut chunk = format!("{:x}\r\n", body.len()).into_bytes();
            chunk.extend_from_slice(body);
            chunk.extend_from_slice(b"\r\n");
            pieces.push(chunk);
        } else {
            pieces.push(body.clone());
        }
    }
    if chunked && !framed {
        let mut end = b"0\r\n".to_vec();
        push_lines(&mut end, &answer.trailers);
        end.extend_from_slice(b"\r\n");
        pieces.push(end);
    }
    pieces
}

fn push_lines(text: &mut Vec<u8>, lines: &FieldLines) {
    for (name, value) in lines.iter() {
        text.extend_from_slice(name.as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value);
        text.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_what_it_is_told_and_notes_what_it_gets() {
        let origin = Origin::start().unwrap();
        let trailers = [("x-sum", "2")].into_iter().collect();
        let body = vec![b"a".to_vec(), b"b".to_vec()];
        origin.answer(ResponsePlan { status: 201, body, trailers, ..ResponsePlan::default() }, |_| {});
        let mut stream = TcpStream::connect(origin.address()).unwrap();
        let head = "POST /p HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(format!("{head}3\r\none\r\n0\r\nx-sum: 1\r\n\r\n").as_bytes()).unwrap();
        let text = "HTTP/1.1 201 Row\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\nx-sum: 2\r\n\r\n";
        // It keeps the connection, so there is no end to wait for.
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), text);
        let seen = origin.requests();
        assert_eq!((seen[0].body.as_slice(), seen[0].trailers.get("x-sum")), (&b"one"[..], Some(&b"1"[..])));
        assert!(seen[0].complete);
    }
}
