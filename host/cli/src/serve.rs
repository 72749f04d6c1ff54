//! `portcullis serve`: runs a policy until a signal ends it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use portcullis_config::{Listener, Service};
use portcullis_proxy::{Handle, Options, Server};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::failure::Failure;
use crate::logging::Lint;
use crate::operators::Host;
use crate::{PolicyFile, code_cache, logging};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    policy: PolicyFile,
    /// Once every socket listens, write the bound addresses to this file, as one JSON object: `{"listeners": {"public":
    /// "127.0.0.1:8080"}, "admin": "127.0.0.1:9901", "pid": 4711}`. The file appears whole or not at all; one that an earlier
    /// start has left is removed at once.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Seconds that requests under way may take after the first SIGTERM or SIGINT.
    #[arg(long, value_name = "SECONDS", default_value_t = portcullis_proxy::DRAIN_TIME.as_secs())]
    drain_seconds: u64,
    /// Warn of calls of filters that Envoy answers with a status on which their SDK panics, or that cannot do what they seem
    /// to: with the callback, the call and the reason. For trying filters out; each request tells the same again.
    #[arg(long)]
    lint: bool,
    #[command(flatten)]
    code_cache: code_cache::CacheArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    if let Some(path) = &arguments.ready_file {
        // Whoever waits for this file must not find the addresses of an earlier start.
        let removed = std::fs::remove_file(path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        });
        removed.map_err(|error| no_ready_file(path, &error))?;
    }
    let policy = arguments.policy.load()?;
    let _logging = logging::start(&policy.logging, if arguments.lint { Lint::Shown } else { Lint::Hidden });
    // Signals count from here on: one that comes during the start ends it as soon as it is through.
    let signals = Signals::new([SIGHUP, SIGINT, SIGTERM])
        .map_err(|error| Failure::Running(format!("cannot receive signals: {error}")))?;
    let schemes: Vec<&str> = policy.listeners.iter().map(scheme).collect();
    let operators = Arc::new(Host::default());
    let options = Options {
        access_log: Some(Box::new(io::stdout())),
        drain_time: Some(Duration::from_secs(arguments.drain_seconds)),
        operators: Some(Arc::<Host>::clone(&operators)),
        loading: arguments.code_cache.loading(&policy.code_cache),
    };
    let server = Server::prepare(policy, options)?;
    let signal_handle = signals.handle();
    let obeying = obey(signals, server.handle(), arguments.policy.path())?;
    let mut ready_failure = None;
    let result = server.run(|handle| {
        announce(handle, &schemes);
        if let Some(path) = &arguments.ready_file
            && let Err(error) = write_ready_file(path, handle)
        {
            ready_failure = Some(no_ready_file(path, &error));
            handle.shutdown_now();
        }
    });
    signal_handle.close();
    drop(obeying.join());
    operators.stop();
    if let Some(failure) = ready_failure {
        return Err(failure);
    }
    result?;
    tracing::info!("ended");
    Ok(())
}

/// Tells people and scripts where to connect: one line per address.
fn announce(handle: &Handle, schemes: &[&str]) {
    for ((name, address), scheme) in handle.addresses().iter().zip(schemes) {
        tracing::info!("listener `{name}` on {scheme}://{address}");
    }
    if let Some(address) = handle.admin_address() {
        tracing::info!("admin on http://{address}");
    }
}

/// What a listener speaks with clients.
fn scheme(listener: &Listener) -> &'static str {
    match (&listener.service, &listener.tls) {
        (Service::Http, None) => "http",
        (Service::Http, Some(_)) => "https",
        (Service::Tcp(_), None) => "tcp",
        (Service::Tcp(_), Some(_)) => "tls",
    }
}

fn no_ready_file(path: &Path, error: &io::Error) -> Failure {
    Failure::Configuration(format!(
        "cannot write the ready file `{}`: {error}\n  hint: its folder must exist and be writable",
        path.display()
    ))
}

fn write_ready_file(path: &Path, handle: &Handle) -> io::Result<()> {
    let listeners: serde_json::Map<String, serde_json::Value> =
        handle.addresses().iter().map(|(name, address)| (name.clone(), json!(address.to_string()))).collect();
    let ready = json!({
        "listeners": listeners,
        "admin": handle.admin_address().map(|address| address.to_string()),
        "pid": std::process::id(),
    });
    // Renamed into place, so that whoever waits for it never reads half of it.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}", std::process::id()));
    std::fs::write(&unfinished, format!("{ready}\n"))?;
    std::fs::rename(&unfinished, path)
}

/// Carries out what signals ask for, in a thread of its own: reloading takes as long as filters take to start.
fn obey(mut signals: Signals, handle: Handle, path: PathBuf) -> Result<std::thread::JoinHandle<()>, Failure> {
    let thread = std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut ending = false;
        for signal in &mut signals {
            match signal {
                SIGHUP => reload(&handle, &path),
                _ if ending => {
                    tracing::warn!("ending at once");
                    handle.shutdown_now();
                }
                _ => {
                    ending = true;
                    tracing::info!("ending after the requests under way; another signal ends at once");
                    handle.shutdown();
                }
            }
        }
    });
    thread.map_err(|error| Failure::Running(format!("cannot start the thread for signals: {error}")))
}

fn reload(handle: &Handle, path: &Path) {
    let policy = match portcullis_config::load(path) {
        Ok(policy) => policy,
        Err(mistakes) => {
            handle.reload_failed();
            tracing::error!("reload: the running policy stays in force\n{mistakes}");
            return;
        }
    };
    match handle.reload(policy) {
        Ok(()) => tracing::info!("reload: `{}` is in force", path.display()),
        Err(error) => tracing::error!("reload: the running policy stays in force\n{error}"),
    }
}
