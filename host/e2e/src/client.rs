//! A client that sends exactly what a scenario says, also what a well-behaved one would not.
//!
//! One connection per request. The response is read to its end, and it is noted whether it ended as it should.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use portcullis_harness::{FieldLines, ObservedResponse, RequestPlan};

use crate::process::DEADLINE;

/// Sends a request; `None` means that the connection was closed without a response.
pub fn send(address: SocketAddr, request: &RequestPlan) -> Result<Option<ObservedResponse>, String> {
    send_paced(address, request, DEADLINE, |_| {})
}

/// Begins the error of a request that was not answered in time.
pub const NO_ANSWER: &str = "no answer from";

/// The same, waiting for `pace` before each piece: 0 is the head, then comes the body, then the end of a chunked one.
pub fn send_paced(
    address: SocketAddr,
    request: &RequestPlan,
    patience: Duration,
    mut pace: impl FnMut(usize),
) -> Result<Option<ObservedResponse>, String> {
    let fail = |what: &str, error: &std::io::Error| format!("{what} {address}: {error}");
    let mut stream =
        TcpStream::connect_timeout(&address, DEADLINE).map_err(|error| fail("cannot connect to", &error))?;
    stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(patience)))
        .and_then(|()| stream.set_write_timeout(Some(DEADLINE)))
        .map_err(|error| fail("cannot set up the connection to", &error))?;
    for (index, piece) in wire_pieces(request).iter().enumerate() {
        pace(index);
        match stream.write_all(piece) {
            Ok(()) => {}
            // An answer that came early, such as 413, is an answer.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => break,
            Err(error) => return Err(fail("cannot write to", &error)),
        }
    }
    let head_request = request.method == "HEAD";
    let mut received = Vec::new();
    let mut block = [0; 64 * 1024];
    // A server may keep the connection open for a while after a whole response, in case the client still sends.
    while !is_whole(&received, head_request) {
        match stream.read(&mut block) {
            Ok(0) => break,
            Ok(count) => received.extend_from_slice(block.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(format!("{NO_ANSWER} {address} to `{} {}` in {patience:?}", request.method, request.path));
            }
            Err(error) => return Err(fail("cannot read from", &error)),
        }
    }
    if received.is_empty() {
        return Ok(None);
    }
    parse(&received, head_request)
        .map(Some)
        .map_err(|problem| format!("{address} sent what is no HTTP response: {problem}: {}", received.escape_ascii()))
}

/// Whether all of a response is there, by what it says of its own end.
fn is_whole(received: &[u8], head_request: bool) -> bool {
    parse(received, head_request).is_ok_and(|response| {
        let bodiless = head_request || matches!(response.status, 204 | 304);
        let framed = ["content-length", "transfer-encoding"].iter().any(|name| response.fields.get(name).is_some());
        response.complete && (bodiless || framed)
    })
}

/// The request in the pieces it is written in: the head, each piece of the body, the end.
fn wire_pieces(request: &RequestPlan) -> Vec<Vec<u8>> {
    let mut head =
        format!("{} {} HTTP/1.1\r\nhost: {}\r\n", request.method, request.path, request.authority).into_bytes();
    for (name, value) in request.fields.iter() {
        push_line(&mut head, name, value);
    }
    let has = |name: &str| request.fields.get(name).is_some();
    let chunked = request.body.len() > 1 || !request.trailers.is_empty();
    let framed = has("content-length") || has("transfer-encoding");
    if !framed && chunked {
        push_line(&mut head, "transfer-encoding", b"chunked");
    } else if let ([body], false) = (request.body.as_slice(), framed) {
        push_line(&mut head, "content-length", body.len().to_string().as_bytes());
    }
    if !has("connection") {
        push_line(&mut head, "connection", b"close");
    }
    head.extend_from_slice(b"\r\n");
    let mut pieces = vec![head];
    for body in &request.body {
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
        for (name, value) in request.trailers.iter() {
            push_line(&mut end, name, value);
        }
        end.extend_from_slice(b"\r\n");
        pieces.push(end);
    }
    pieces
}

fn push_line(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(b": ");
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}

fn parse(mut received: &[u8], head_request: bool) -> Result<ObservedResponse, String> {
    loop {
        let mut lines = [httparse::EMPTY_HEADER; 256];
        let mut head = httparse::Response::new(&mut lines);
        let length = match head.parse(received) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Err("the head is cut off".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        let status = head.code.unwrap_or_default();
        let (_, rest) = received.split_at(length);
        // Informational responses come before the response (RFC 9110, section 15.2).
        if (100..200).contains(&status) && status != 101 {
            received = rest;
            continue;
        }
        let fields: FieldLines = head.headers.iter().map(|line| (line.name, line.value)).collect();
        let (body, trailers, complete) = if head_request || matches!(status, 204 | 304) {
            (Vec::new(), FieldLines::new(), rest.is_empty())
        } else if fields.get_all("transfer-encoding").any(|coding| coding.eq_ignore_ascii_case(b"chunked")) {
            dechunk(rest)
        } else if let Some(length) = fields.get("content-length") {
            let length: usize =
                std::str::from_utf8(length).ok().and_then(|length| length.parse().ok()).ok_or("bad content-length")?;
            (rest.to_vec(), FieldLines::new(), rest.len() == length)
        } else {
            (rest.to_vec(), FieldLines::new(), true)
        };
        return Ok(ObservedResponse { status, fields, body, trailers, complete });
    }
}

/// Body, trailers, and whether both came whole (RFC 9112, section 7.1).
fn dechunk(mut rest: &[u8]) -> (Vec<u8>, FieldLines, bool) {
    let mut body = Vec::new();
    while let Ok(httparse::Status::Complete((start, length))) = httparse::parse_chunk_size(rest) {
        let (_, data) = rest.split_at(start);
        if length == 0 {
            let mut lines = [httparse::EMPTY_HEADER; 64];
            return match httparse::parse_headers(data, &mut lines) {
                Ok(httparse::Status::Complete((_, lines))) => {
                    (body, lines.iter().map(|line| (line.name, line.value)).collect(), true)
                }
                _ => (body, FieldLines::new(), false),
            };
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some((chunk, after)) = data.split_at_checked(length) else {
            body.extend_from_slice(data);
            return (body, FieldLines::new(), false);
        };
        body.extend_from_slice(chunk);
        rest = after.strip_prefix(b"\r\n").unwrap_or(after);
    }
    (body, FieldLines::new(), false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(request: &RequestPlan) -> String {
        String::from_utf8(wire_pieces(request).concat()).unwrap()
    }

    #[test]
    fn writes_a_request_as_the_scenario_says() {
        let mut request = RequestPlan::new("POST", "/a");
        request.fields.push("x-twice", "1");
        request.fields.push("x-twice", "2");
        request.body = vec![b"ab".to_vec()];
        assert_eq!(
            text(&request),
            "POST /a HTTP/1.1\r\nhost: api.example.com\r\nx-twice: 1\r\nx-twice: 2\r\ncontent-length: 2\r\n\
             connection: close\r\n\r\nab"
        );
        request.body.push(b"c".to_vec());
        request.trailers.push("x-sum", "3");
        assert!(text(&request).ends_with("connection: close\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\nx-sum: 3\r\n\r\n"));
    }

    fn check(received: &str, body: &str, complete: bool) {
        let response = parse(received.as_bytes(), false).unwrap();
        assert_eq!(response.status, 200);
        assert_eq!(String::from_utf8(response.body).unwrap(), body);
        assert_eq!(response.complete, complete, "{received}");
    }

    #[test]
    fn tells_whole_responses_from_those_cut_off() {
        check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", "ok", true);
        check("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", "ok", false);
        check("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "", true);
        check("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "ok", true);
        check("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", "ok", false);
        check("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nok", "ok", false);
        check("HTTP/1.1 200 OK\r\n\r\nok", "ok", true);
        assert!(parse(b"HTTP/1.1 200", false).is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", true).unwrap().complete);
    }
}
