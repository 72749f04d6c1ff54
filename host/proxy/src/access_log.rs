//! One line per request, or per TCP connection, on standard output, or wherever the embedder sends it.
//!
//! A worker formats its lines into a buffer of its own and hands full buffers to one writing thread, so a slow terminal or
//! pipe holds up no request; what it cannot keep up with is dropped and counted. No line holds a query, a credential, a
//! cookie, a body or any field of the request but its own id.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::io::Write;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::metrics::Counter;

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AccessLogFormat {
    /// No lines at all.
    Off,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Batches that wait for the writing thread. With what a batch holds at a time, some thousand lines.
const BATCHES_MAX: usize = 256;
/// A batch is handed over after a moment, or at this size. Each one wakes the writing thread, which costs more than the line
/// itself: handed over with every turn of the event loop, lines took a tenth of a worker's time.
const BATCH_BYTES: usize = 32 * 1024;
const BATCH_TIME: Duration = Duration::from_millis(2);

/// The thread that writes.
#[derive(Debug)]
pub(crate) struct Writer {
    thread: Option<JoinHandle<()>>,
    sender: Option<SyncSender<String>>,
}

impl Writer {
    pub(crate) fn start(mut out: Box<dyn Write + Send>) -> std::io::Result<Writer> {
        let (sender, receiver): (_, Receiver<String>) = sync_channel(BATCHES_MAX);
        let thread = std::thread::Builder::new().name("access-log".into()).spawn(move || {
            for batch in receiver {
                // Nobody is left to tell if the output is gone; requests go on.
                if out.write_all(batch.as_bytes()).and_then(|()| out.flush()).is_err() {
                    break;
                }
            }
        })?;
        Ok(Writer { thread: Some(thread), sender: Some(sender) })
    }

    pub(crate) fn sender(&self) -> Option<SyncSender<String>> {
        self.sender.clone()
    }
}

impl Drop for Writer {
    /// Waits until all is written. The workers' senders must be gone by then.
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// One worker's end of it.
pub(crate) struct AccessLog {
    inner: Rc<Inner>,
}

struct Inner {
    format: Cell<AccessLogFormat>,
    batch: RefCell<String>,
    flush_planned: Cell<bool>,
    sender: Option<SyncSender<String>>,
    dropped: Arc<Counter>,
}

/// What is known of a request that is over.
pub(crate) struct Entry<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a [u8],
    pub(crate) status: Option<u16>,
    pub(crate) details: &'a str,
    pub(crate) flags: u64,
    pub(crate) duration: Duration,
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
    pub(crate) request_id: &'a str,
    pub(crate) client: SocketAddr,
    pub(crate) listener: &'a str,
    pub(crate) route: Option<&'a str>,
    pub(crate) upstream: Option<&'a str>,
    pub(crate) upstream_address: Option<SocketAddr>,
    pub(crate) complete: bool,
}

/// What is known of a TCP connection that is over.
pub(crate) struct TcpEntry<'a> {
    pub(crate) details: &'a str,
    pub(crate) flags: u64,
    pub(crate) duration: Duration,
    pub(crate) received_bytes: u64,
    pub(crate) sent_bytes: u64,
    /// Its number.
    pub(crate) connection: u64,
    pub(crate) client: SocketAddr,
    pub(crate) listener: &'a str,
    pub(crate) upstream: &'a str,
    pub(crate) upstream_address: Option<SocketAddr>,
}

impl AccessLog {
    pub(crate) fn new(format: AccessLogFormat, sender: Option<SyncSender<String>>, dropped: Arc<Counter>) -> AccessLog {
        AccessLog {
            inner: Rc::new(Inner {
                format: Cell::new(format),
                batch: RefCell::default(),
                flush_planned: Cell::new(false),
                sender,
                dropped,
            }),
        }
    }

    pub(crate) fn set_format(&self, format: AccessLogFormat) {
        self.inner.format.set(format);
    }

    pub(crate) fn write(&self, entry: &Entry<'_>) {
        self.add(|batch, now| write_text(batch, entry, now), |batch, now| write_json(batch, entry, now));
    }

    pub(crate) fn write_tcp(&self, entry: &TcpEntry<'_>) {
        self.add(|batch, now| write_tcp_text(batch, entry, now), |batch, now| write_tcp_json(batch, entry, now));
    }

    fn add(&self, text: impl FnOnce(&mut String, Duration), json: impl FnOnce(&mut String, Duration)) {
        let inner = &self.inner;
        if inner.sender.is_none() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut batch = inner.batch.borrow_mut();
        match inner.format.get() {
            AccessLogFormat::Off => return,
            AccessLogFormat::Text => text(&mut batch, now),
            AccessLogFormat::Json => json(&mut batch, now),
        }
        if batch.len() >= BATCH_BYTES {
            drop(batch);
            inner.flush();
        } else if !inner.flush_planned.replace(true) {
            let inner = Rc::clone(inner);
            tokio::task::spawn_local(async move {
                tokio::time::sleep(BATCH_TIME).await;
                inner.flush_planned.set(false);
                inner.flush();
            });
        }
    }
}

impl Inner {
    fn flush(&self) {
        let batch = std::mem::take(&mut *self.batch.borrow_mut());
        let Some(sender) = self.sender.as_ref().filter(|_| !batch.is_empty()) else { return };
        if let Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) = sender.try_send(batch) {
            self.dropped.add(batch.lines().count() as u64);
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.inner.flush();
    }
}

fn write_text(out: &mut String, entry: &Entry<'_>, now: Duration) {
    push_time(out, now);
    let _ = write!(out, " {} {} ", entry.client.ip(), entry.method);
    for byte in entry.path {
        out.extend(std::ascii::escape_default(*byte).map(char::from));
    }
    match entry.status {
        Some(status) if entry.complete => {
            let _ = write!(out, " {status}");
        }
        Some(status) => {
            let _ = write!(out, " {status}(incomplete)");
        }
        None => out.push_str(" -"),
    }
    out.push(' ');
    push_escaped_text(out, entry.details);
    let _ = writeln!(
        out,
        " {:.3}ms in={} out={} route={} upstream={} id={}",
        entry.duration.as_secs_f64() * 1e3,
        entry.request_bytes,
        entry.response_bytes,
        entry.route.unwrap_or("-"),
        entry.upstream.unwrap_or("-"),
        entry.request_id,
    );
}

fn write_json(out: &mut String, entry: &Entry<'_>, now: Duration) {
    begin_json(out, now);
    let mut text = |name, value: Option<&str>| push_json_field(out, name, value);
    text("method", Some(entry.method));
    text("path", Some(&String::from_utf8_lossy(entry.path)));
    text("details", Some(entry.details));
    text("request_id", Some(entry.request_id));
    text("client", Some(&entry.client.ip().to_string()));
    text("listener", Some(entry.listener));
    text("route", entry.route);
    text("upstream", entry.upstream);
    text("upstream_address", entry.upstream_address.map(|address| address.to_string()).as_deref());
    if let Some(status) = entry.status {
        let _ = write!(out, ",\"status\":{status}");
    }
    let _ = writeln!(
        out,
        ",\"complete\":{},\"flags\":{},\"duration_ms\":{:.3},\"request_bytes\":{},\"response_bytes\":{}}}",
        entry.complete,
        entry.flags,
        entry.duration.as_secs_f64() * 1e3,
        entry.request_bytes,
        entry.response_bytes,
    );
}

fn write_tcp_text(out: &mut String, entry: &TcpEntry<'_>, now: Duration) {
    push_time(out, now);
    let _ = write!(out, " {} TCP {} ", entry.client.ip(), entry.listener);
    push_escaped_text(out, entry.details);
    let _ = writeln!(
        out,
        " {:.3}ms in={} out={} upstream={} connection={}",
        entry.duration.as_secs_f64() * 1e3,
        entry.received_bytes,
        entry.sent_bytes,
        entry.upstream,
        entry.connection,
    );
}

fn write_tcp_json(out: &mut String, entry: &TcpEntry<'_>, now: Duration) {
    begin_json(out, now);
    let mut text = |name, value: Option<&str>| push_json_field(out, name, value);
    text("protocol", Some("tcp"));
    text("details", Some(entry.details));
    text("client", Some(&entry.client.ip().to_string()));
    text("listener", Some(entry.listener));
    text("upstream", Some(entry.upstream));
    text("upstream_address", entry.upstream_address.map(|address| address.to_string()).as_deref());
    let _ = writeln!(
        out,
        ",\"connection\":{},\"flags\":{},\"duration_ms\":{:.3},\"received_bytes\":{},\"sent_bytes\":{}}}",
        entry.connection,
        entry.flags,
        entry.duration.as_secs_f64() * 1e3,
        entry.received_bytes,
        entry.sent_bytes,
    );
}

fn begin_json(out: &mut String, now: Duration) {
    out.push_str("{\"time\":\"");
    push_time(out, now);
    out.push('"');
}

fn push_json_field(out: &mut String, name: &str, value: Option<&str>) {
    if let Some(value) = value {
        let _ = write!(out, ",\"{name}\":\"");
        push_json(out, value);
        out.push('"');
    }
}

/// Details can be a filter's own text: nothing in it may look like another line or another field.
fn push_escaped_text(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() || c.is_whitespace() { out.push('_') } else { out.push(c) }
    }
    if text.is_empty() {
        out.push('-');
    }
}

fn push_json(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c) & 0xffff);
            }
            c => out.push(c),
        }
    }
}

/// RFC 3339, in UTC, with milliseconds.
fn push_time(out: &mut String, since_1970: Duration) {
    let seconds = since_1970.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    let _ = write!(
        out,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60,
        since_1970.subsec_millis()
    );
}

/// The date in the Gregorian calendar, so many days after 1970-01-01.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day is the last of its year; 719468 days lie between 0000-03-01 and
    // 1970-01-01.
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry<'a>() -> Entry<'a> {
        Entry {
            method: "GET",
            path: b"/a\"b",
            status: Some(401),
            details: "portcullis.jwt-auth.x\n\"y\"",
            flags: 0,
            duration: Duration::from_micros(1500),
            request_bytes: 1,
            response_bytes: 2,
            request_id: "id",
            client: ([192, 0, 2, 1], 4711).into(),
            listener: "public",
            route: Some("orders"),
            upstream: None,
            upstream_address: None,
            complete: true,
        }
    }

    #[test]
    fn text_lines_keep_to_one_line() {
        let mut out = String::new();
        write_text(&mut out, &entry(), Duration::from_secs(0));
        assert_eq!(
            out,
            "1970-01-01T00:00:00.000Z 192.0.2.1 GET /a\\\"b 401 portcullis.jwt-auth.x_\"y\" 1.500ms in=1 out=2 \
             route=orders upstream=- id=id\n"
        );
    }

    #[test]
    fn json_lines_are_json() {
        let mut out = String::new();
        write_json(&mut out, &entry(), Duration::from_secs(0));
        let value: serde_json::Value = serde_json::from_str(&out).expect("an object");
        assert_eq!(value["path"], "/a\"b");
        assert_eq!(value["details"], "portcullis.jwt-auth.x\n\"y\"");
        assert_eq!(value["status"], 401);
        assert_eq!(value["duration_ms"], 1.5);
        assert_eq!(out.lines().count(), 1);
    }

    #[test]
    fn lines_of_tcp_connections_keep_to_one_line_too() {
        let entry = TcpEntry {
            details: "wasm_fail_stream{a\nb\"}",
            flags: 32,
            duration: Duration::from_micros(1500),
            received_bytes: 1,
            sent_bytes: 2,
            connection: 7,
            client: ([192, 0, 2, 1], 4711).into(),
            listener: "db",
            upstream: "postgres",
            upstream_address: Some(([192, 0, 2, 9], 5432).into()),
        };
        let mut out = String::new();
        write_tcp_text(&mut out, &entry, Duration::ZERO);
        assert_eq!(
            out,
            "1970-01-01T00:00:00.000Z 192.0.2.1 TCP db wasm_fail_stream{a_b\"} 1.500ms in=1 out=2 upstream=postgres \
             connection=7\n"
        );
        out.clear();
        write_tcp_json(&mut out, &entry, Duration::ZERO);
        let value: serde_json::Value = serde_json::from_str(&out).expect("an object");
        assert_eq!(value["details"], "wasm_fail_stream{a\nb\"}");
        assert_eq!((&value["protocol"], &value["flags"]), (&"tcp".into(), &32.into()));
        assert_eq!((&value["received_bytes"], &value["sent_bytes"]), (&1.into(), &2.into()));
        assert_eq!(out.lines().count(), 1);
    }

    /// Takes nothing until it is let.
    struct Blocked(Receiver<()>);

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            // An error: whoever holds it is gone, and everything passes.
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_output_loses_lines_and_holds_up_nobody() {
        let (open, blocked) = std::sync::mpsc::channel();
        let writer = Writer::start(Box::new(Blocked(blocked))).expect("a thread");
        let dropped = Arc::new(Counter::default());
        let log = AccessLog::new(AccessLogFormat::Text, writer.sender(), Arc::clone(&dropped));
        // Each line is a batch of its own. One more than wait can be in the writer's hands.
        let path = [b'x'; BATCH_BYTES];
        for _ in 0..BATCHES_MAX + 11 {
            log.write(&Entry { path: &path, ..entry() });
        }
        let lost = dropped.get();
        assert!(lost == 10 || lost == 11, "{lost} lines are lost");
        drop((open, log));
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        for (seconds, expected) in [
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800, "2024-02-29T00:00:00.000Z"),
            (1_798_761_599, "2026-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            let mut out = String::new();
            push_time(&mut out, Duration::from_secs(seconds));
            assert_eq!(out, expected);
        }
    }
}
