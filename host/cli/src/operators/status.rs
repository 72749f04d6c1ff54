//! `portcullis operators status`: what runs.

use std::fmt::Write as _;

use portcullis_operators::control::{self, HostStatus};

use super::Hosts;
use crate::failure::Failure;
use crate::print;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One JSON object for each host, one a line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    hosts: Hosts,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    for socket in arguments.hosts.find()? {
        let status = control::read_status(&socket)
            .map_err(|error| Failure::Running(format!("the host at `{}`: {error}", socket.display())))?;
        let text = if arguments.json {
            serde_json::to_string(&status).map_err(|error| Failure::Running(error.to_string()))? + "\n"
        } else {
            shown(&status)
        };
        print(&text)?;
    }
    Ok(())
}

fn shown(status: &HostStatus) -> String {
    let mut text = format!("host {} on {}, {} kept ready\n", status.pid, status.engine, status.ready);
    for operator in &status.operators {
        let trouble = operator.trouble.as_ref().map(|trouble| format!(", {trouble}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "  {}: {} requests, {} without an answer of its own{trouble}",
            operator.name, operator.requests, operator.failed
        );
        for process in &operator.processes {
            let _ = write!(
                text,
                "    [{}] pid {}, {} s old, {} in flight, {} MiB, {} ms of CPU",
                process.number,
                process.pid,
                process.age_seconds,
                process.in_flight,
                process.resident_bytes >> 20,
                process.cpu_milliseconds
            );
            let missing = process.missing_layers.join(", ");
            let _ = writeln!(text, "{}", if missing.is_empty() { missing } else { format!(", WITHOUT {missing}") });
        }
    }
    text
}
