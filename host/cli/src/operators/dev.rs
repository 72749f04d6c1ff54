//! `portcullis operators dev`: serves while the author edits.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use portcullis_config::{Folder, LogLevel, Logging, Policy, SecretSource};
use portcullis_operators::LogLine;
use portcullis_operators::author::{Watch, format_log};
use portcullis_proxy::{Handle, Options, Server, StartError};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Host, Purpose};
use crate::code_cache::CacheArguments;
use crate::failure::Failure;
use crate::logging::Lint;
use crate::{logging, print};

/// How often files are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How often what operators printed is shown.
const SHOW: Duration = Duration::from_millis(20);

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A policy file, or the entry module of one operator. Default: `portcullis.yaml` in the current folder.
    #[arg(value_name = "POLICY|MODULE", default_value = "portcullis.yaml")]
    target: PathBuf,
    /// Where to listen, if the target is a module.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    listen: std::net::SocketAddr,
    #[command(flatten)]
    code_cache: CacheArguments,
}

/// Something happened.
enum Event {
    /// The server runs.
    Ready(Handle),
    /// The server has ended, or never started.
    Ended(Result<(), StartError>),
    /// A signal asks for the end.
    Stop,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    // Operators' lines are shown in a form of their own.
    let logging = Logging { level: LogLevel::Warn, ..Logging::default() };
    let _logging = logging::start(&logging, Lint::Hidden);
    let running = |error: io::Error| Failure::Running(error.to_string());
    let (events, happened) = channel();
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(running)?;
    std::thread::spawn({
        let events = events.clone();
        move || signals.forever().take(1).for_each(|_| drop(events.send(Event::Stop)))
    });
    let host = Arc::new(Host::new(Purpose::Develop));
    // A policy that does not start is shown, and tried again once something changes.
    loop {
        let (mut watch, policy) = match arguments.load() {
            Ok(loaded) => loaded,
            Err((mut watch, failure)) => {
                failure.report();
                if wait_for_change(&mut watch, &happened).is_none() {
                    return Ok(());
                }
                continue;
            }
        };
        let options = Options {
            access_log: Some(Box::new(io::stdout())),
            drain_time: Some(Duration::from_secs(2)),
            operators: Some(Arc::<Host>::clone(&host)),
            loading: arguments.code_cache.loading(&policy.code_cache),
        };
        let names: Vec<String> = policy.operators.iter().map(|operator| operator.name.clone()).collect();
        let serving = std::thread::spawn({
            let events = events.clone();
            move || {
                let ended = Server::prepare(policy, options)
                    .and_then(|server| server.run(|handle| drop(events.send(Event::Ready(handle.clone())))));
                drop(events.send(Event::Ended(ended)));
            }
        });
        match happened.recv() {
            Ok(Event::Ready(handle)) => {
                follow(arguments, &handle, &names, &host, watch, &happened)?;
                drop(serving.join());
                return Ok(());
            }
            Ok(Event::Ended(result)) => {
                let _ = serving.join();
                match result.map_err(Failure::from) {
                    // No change of files brings an engine or frees an address.
                    Err(failure @ Failure::Running(_)) => return Err(failure),
                    Err(failure) => failure.report(),
                    Ok(()) => {}
                }
                if wait_for_change(&mut watch, &happened).is_none() {
                    return Ok(());
                }
            }
            // The server may be starting: the end of this process is its end, too.
            Ok(Event::Stop) | Err(_) => return Ok(()),
        }
    }
}

/// Shows what operators print and loads what changes, until a signal.
fn follow(
    arguments: &Arguments,
    handle: &Handle,
    names: &[String],
    host: &Host,
    mut watch: Watch,
    happened: &Receiver<Event>,
) -> Result<(), Failure> {
    let addresses: Vec<String> = handle.addresses().iter().map(|(_, address)| format!("http://{address}")).collect();
    print(&format!("serving {} on {}\n", names.join(", "), addresses.join(", ")))?;
    let mut lines = host.operators().map(|operators| operators.follow_logs(None));
    // What was printed while it was loaded.
    for name in names {
        for line in host.operators().iter().flat_map(|operators| operators.recent_logs(name)) {
            show(&line)?;
        }
    }
    let mut looked = std::time::Instant::now();
    loop {
        match happened.recv_timeout(SHOW) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Event::Ended(result)) => return result.map_err(Failure::from),
            Ok(Event::Stop | Event::Ready(_)) | Err(RecvTimeoutError::Disconnected) => {
                handle.shutdown();
                return Ok(());
            }
        }
        while let Some(Ok(line)) = lines.as_mut().map(tokio::sync::mpsc::Receiver::try_recv) {
            show(&line)?;
        }
        if looked.elapsed() < LOOK {
            continue;
        }
        looked = std::time::Instant::now();
        let Some(changed) = watch.changed() else { continue };
        let here = std::env::current_dir().unwrap_or_default();
        print(&format!("{} changed\n", changed.strip_prefix(here).unwrap_or(&changed).display()))?;
        let reloaded = match arguments.load() {
            Ok((fresh, policy)) => {
                watch = fresh;
                let names: Vec<String> = policy.operators.iter().map(|operator| operator.name.clone()).collect();
                handle.reload(policy).map(|()| names).map_err(Failure::from)
            }
            // What can be read of it is watched further.
            Err((_, failure)) => Err(failure),
        };
        lines = lines.or_else(|| host.operators().map(|operators| operators.follow_logs(None)));
        match reloaded {
            Ok(names) => print(&format!("serving {}\n", names.join(", ")))?,
            Err(failure) => {
                failure.report();
                print("not loaded: what ran before goes on\n")?;
            }
        }
    }
}

fn show(line: &LogLine) -> Result<(), Failure> {
    print(&format!("{}\n", format_log(line)))
}

/// Nothing when a signal came first.
fn wait_for_change(watch: &mut Watch, happened: &Receiver<Event>) -> Option<PathBuf> {
    let _ = print("waiting for a change\n");
    loop {
        match happened.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Timeout) => {}
            // An end that was told already.
            Ok(Event::Ended(_) | Event::Ready(_)) => {}
            Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return None,
        }
        if let Some(changed) = watch.changed() {
            return Some(changed);
        }
    }
}

impl Arguments {
    fn is_module(&self) -> bool {
        let extension = self.target.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| ["ts", "mts", "js", "mjs"].contains(&extension))
    }

    /// Reads the policy, and tells what to watch from before it was read.
    fn load(&self) -> Result<(Watch, Policy), (Watch, Failure)> {
        // What there is before there is a policy to tell.
        let roots =
            if self.is_module() { self.target.parent().map(Path::to_owned).into_iter().collect() } else { vec![] };
        let first = Watch::new(vec![self.target.clone()], roots);
        match self.policy() {
            Err(failure) => Err((first, failure)),
            Ok(policy) => {
                let watch =
                    Watch::new(self.files(&policy), policy.operators.iter().map(|one| one.root.clone()).collect());
                // Read again: a change between the first reading and the watch would go unseen.
                match self.policy() {
                    Ok(policy) => Ok((watch, policy)),
                    Err(failure) => Err((watch, failure)),
                }
            }
        }
    }

    fn files(&self, policy: &Policy) -> Vec<PathBuf> {
        let mut files = vec![self.target.clone()];
        files.extend(policy.filters.iter().map(|filter| filter.module_path.clone()));
        for operator in &policy.operators {
            files.extend(operator.read.iter().map(|(_, path)| path.clone()));
            files.extend(operator.secrets.iter().filter_map(|secret| match &secret.source {
                SecretSource::File(path) => Some(path.clone()),
                SecretSource::Env(_) => None,
            }));
        }
        files
    }

    fn policy(&self) -> Result<Policy, Failure> {
        if !self.is_module() {
            return super::load(&self.target);
        }
        let unusable = |problem: &str| Failure::Configuration(format!("`{}`: {problem}", self.target.display()));
        let folder = self.target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file =
            self.target.file_name().and_then(|name| name.to_str()).ok_or_else(|| unusable("no name of a file"))?;
        let text = serde_json::json!({
            "version": 1,
            "listeners": [{ "name": "dev", "address": self.listen.to_string() }],
            "operators": { "dev": { "entry": file } },
            "routes": [{ "name": "all", "operator": "dev" }],
        });
        let folder = Folder::new(folder).map_err(|error| unusable(&error.to_string()))?;
        // JSON is YAML.
        portcullis_config::compile("portcullis.yaml", &text.to_string(), &folder)
            .map_err(|mistakes| Failure::Configuration(mistakes.to_string()))
    }
}
