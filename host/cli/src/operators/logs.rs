//! `portcullis operators logs`: what operators of a running host printed.

use std::io;
use std::path::Path;

use portcullis_operators::author::format_log;
use portcullis_operators::{LogLine, control};
use serde_json::json;

use super::Hosts;
use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only this operator's lines.
    operator: Option<String>,
    /// Go on with the lines that come, until Ctrl-C or the host's end.
    #[arg(short, long)]
    follow: bool,
    /// One JSON object a line: `time_milliseconds` (since 1970), `operator`, `process`, `text`.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    hosts: Hosts,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let sockets = arguments.hosts.find()?;
    let read = |socket: &Path| {
        control::read_logs(socket, arguments.operator.as_deref(), arguments.follow, |line| {
            let text = if arguments.json { as_json(&line) } else { format_log(&line) };
            // Whoever reads may have gone: `| head`.
            print_line(&text)
        })
    };
    let results: Vec<io::Result<()>> = std::thread::scope(|scope| {
        let readers: Vec<_> = sockets.iter().map(|socket| scope.spawn(|| read(socket))).collect();
        readers.into_iter().map(|reader| reader.join().unwrap_or_else(|_| Err(io::Error::other("a panic")))).collect()
    });
    for (socket, result) in sockets.iter().zip(results) {
        match result {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(Failure::Running(format!("the host at `{}`: {error}", socket.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

fn print_line(text: &str) -> io::Result<()> {
    use std::io::Write as _;
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

fn as_json(line: &LogLine) -> String {
    let since = line.time.duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap_or_default();
    json!({
        "time_milliseconds": since.as_millis() as u64,
        "operator": line.operator,
        "process": line.process,
        "text": line.text,
    })
    .to_string()
}
