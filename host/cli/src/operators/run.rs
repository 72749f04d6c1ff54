//! `portcullis operators run`: operators on Unix sockets, for a proxy in another process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use portcullis_config::Policy;
use portcullis_operators::Front;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Host, admin, load};
use crate::failure::Failure;
use crate::logging::Lint;
use crate::{PolicyFile, logging};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    policy: PolicyFile,
    /// The folder of the sockets: `<operator>.sock`. Made if it is absent.
    #[arg(long, value_name = "FOLDER", default_value = "/run/portcullis/operators")]
    sockets: PathBuf,
    /// A user that may connect beside this one and is checked on every connection, by name or number; may be repeated. Give
    /// the one that Envoy runs as.
    #[arg(long = "allow-user", value_name = "USER", value_parser = user)]
    users: Vec<u32>,
    /// Serve `/metrics` and `/readyz` on this address, which should be a loopback address: there is no authentication.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
}

fn user(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let passwd = std::fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd: {error}"))?;
    let mut users = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = users.find(|fields| fields.first() == Some(&text)).and_then(|fields| fields.get(2)?.parse().ok());
    found.ok_or_else(|| format!("there is no user `{text}` in /etc/passwd; give its number"))
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let policy = arguments.policy.load()?;
    if policy.operators.is_empty() {
        return Err(Failure::Configuration(format!(
            "{}: there is no operator to run\n  hint: `portcullis operators new NAME` writes one",
            policy.name
        )));
    }
    let _logging = logging::start(&policy.logging, Lint::Hidden);
    let running = |error: &dyn std::fmt::Display| Failure::Running(error.to_string());
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(|error| running(&error))?;
    let host = Arc::new(Host::default());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(policy.workers)
        .thread_name("front")
        .enable_all()
        .build()
        .map_err(|error| running(&error))?;
    let in_the_way =
        |error: std::io::Error| Failure::Running(format!("sockets in `{}`: {error}", arguments.sockets.display()));
    let mut front = Front::new(arguments.sockets.clone(), &arguments.users).map_err(in_the_way)?;
    let _context = runtime.enter();
    let apply = |policy: &Policy, front: &mut Front| -> Result<(), Failure> {
        let loaded = host.load(policy)?;
        loaded.operators.commit_blocking(&loaded.set);
        let names = loaded.operators.names();
        front.serve(&loaded.operators, &names).map_err(in_the_way)?;
        for name in names {
            tracing::info!("operator `{name}` on {}", front.socket(&name).display());
        }
        Ok(())
    };
    if let Some(address) = arguments.admin {
        admin::serve(address, Arc::clone(&host))
            .map_err(|error| Failure::Running(format!("--admin {address}: {error}")))?;
    }
    apply(&policy, &mut front)?;
    let path = arguments.policy.path();
    for signal in signals.forever() {
        if signal != SIGHUP {
            break;
        }
        match load(&path).and_then(|policy| apply(&policy, &mut front)) {
            Ok(()) => tracing::info!("reload: `{}` is in force", path.display()),
            Err(failure) => tracing::error!("reload: what runs stays as it is\n{failure}"),
        }
    }
    tracing::info!("ending after the requests under way; another signal ends at once");
    std::thread::spawn(move || {
        if signals.forever().any(|signal| signal != SIGHUP) {
            std::process::exit(1);
        }
    });
    // New connections are refused; what is under way on open ones is answered, to the last byte.
    runtime.block_on(front.finish(host.drain()));
    host.stop();
    tracing::info!("ended");
    Ok(())
}
