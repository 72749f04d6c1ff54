//! What stands behind `portcullis operators new|check|dev|logs`.

use std::fmt;
use std::fs;
use std::io;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::bundle::Bundle;
use crate::config::{Operator, is_name};
use crate::engine::Engine;
use crate::logs::LogLine;
use crate::{ApplyError, ConfigError, Operators, Settings, StartError};

const TEMPLATE: &str = include_str!("../runtime/template.ts");
const TYPES: &str = include_str!("../runtime/operator.d.ts");
const WATCHED_MAX: usize = 2000;
const WATCH: Duration = Duration::from_millis(250);

/// A new operator on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// The files.
    pub files: Vec<PathBuf>,
    /// What to add to the policy file.
    pub policy: String,
}

/// Writes a first operator into `folder/<name>/`. Never overwrites.
///
/// # Errors
/// When the name is none, or a file exists or cannot be written.
pub fn create(folder: &Path, name: &str) -> io::Result<Created> {
    if !is_name(name) {
        let message = format!("`{name}` is no name for an operator: use 1 to 64 of a-z, 0-9, `-` and `_`");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let own = folder.join(name);
    fs::create_dir_all(&own)?;
    let files = [("main.ts", TEMPLATE), ("operator.d.ts", TYPES)];
    let mut created = Vec::new();
    for (file, text) in files {
        let path = own.join(file);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| io::Error::new(error.kind(), format!("`{}`: {error}", path.display())))?;
        file.write_all(text.as_bytes())?;
        created.push(path);
    }
    let entry = own.join("main.ts");
    let policy = format!(
        "operators:\n  {name}: {{ entry: {} }}\nroutes:\n  - {{ name: {name}, match: {{ path: {{ prefix: /{name} }} }}, operator: {name} }}\n",
        entry.display()
    );
    Ok(Created { files: created, policy })
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Which operator.
    pub operator: String,
    /// The modules that it consists of.
    pub files: Vec<PathBuf>,
    /// Length of the code that is handed to the engine.
    pub code_bytes: usize,
}

/// Bundles each operator, loads it in a confined process, and ends that again: everything but a request.
///
/// # Errors
/// [`StartError`] when no process can be confined here at all; mistakes of operators are in the result.
pub async fn check(
    operators: Vec<Operator>,
    settings: Settings,
    engine: Arc<dyn Engine>,
) -> Result<(Vec<Checked>, Vec<ApplyError>), StartError> {
    let launcher = settings.launcher.clone();
    let host = Operators::start(Settings { prewarmed: 0, ..settings }, engine)?;
    let mut checked = Vec::new();
    for operator in &operators {
        // Mistakes are reported by `apply`.
        if let Ok(bundle) = Bundle::build_apart(&launcher, &operator.entry, &operator.root).await {
            checked.push(Checked {
                operator: operator.name.clone(),
                files: bundle.files.clone(),
                code_bytes: bundle.code.len(),
            });
        }
    }
    let errors = host.apply(operators).await.err().unwrap_or_default();
    host.stop().await;
    let named = |error: &ApplyError, name: &str| error.operator() == Some(name);
    checked.retain(|checked| !errors.iter().any(|error| named(error, &checked.operator)));
    Ok((checked, errors))
}

/// Something that the author should see while developing.
#[derive(Debug)]
pub enum DevEvent {
    /// These operators answer in their newest version.
    Serving(Vec<String>),
    /// The configuration has mistakes; the last good one goes on.
    Config(Vec<ConfigError>),
    /// Operators' code has mistakes; their last good versions go on.
    Code(Vec<ApplyError>),
    /// An operator printed something, was refused something, or failed.
    Log(LogLine),
}

impl fmt::Display for DevEvent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serving(names) => write!(formatter, "serving {}", names.join(", ")),
            Self::Config(errors) => errors
                .iter()
                .try_for_each(|error| writeln!(formatter, "{error}"))
                .and(write!(formatter, "not reloaded")),
            Self::Code(errors) => errors
                .iter()
                .try_for_each(|error| writeln!(formatter, "{error}"))
                .and(write!(formatter, "not reloaded")),
            Self::Log(line) => write!(formatter, "{}", format_log(line)),
        }
    }
}

/// One line as `portcullis operators logs` prints it.
#[must_use]
pub fn format_log(line: &LogLine) -> String {
    let since = line.time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (seconds, milliseconds) = (since.as_secs() % 86_400, since.subsec_millis());
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!(
        "{hours:02}:{minutes:02}:{:02}.{milliseconds:03}Z {}[{}] {}",
        seconds % 60,
        line.operator,
        line.process,
        line.text
    )
}

/// Serves operators and follows their files and configuration: what changes is loaded anew at once. Ends only with its
/// caller's interest.
///
/// `load` reads the configuration; `also` names files whose change makes it be read again.
pub async fn develop(
    operators: &Operators,
    also: Vec<PathBuf>,
    mut load: impl FnMut() -> Result<Vec<Operator>, Vec<ConfigError>>,
    mut report: impl FnMut(DevEvent),
) {
    let mut followed: Vec<(String, tokio::sync::broadcast::Receiver<LogLine>)> = Vec::new();
    let mut roots: Vec<PathBuf> = Vec::new();
    loop {
        // Taken before the files are read, so that a change meanwhile is seen.
        let before = SystemTime::now();
        match load() {
            Err(errors) => report(DevEvent::Config(errors)),
            Ok(configured) => {
                roots = configured.iter().map(|operator| operator.root.clone()).collect();
                for operator in &configured {
                    if !followed.iter().any(|(name, _)| *name == operator.name) {
                        followed.push((operator.name.clone(), operators.follow_logs(&operator.name)));
                    }
                }
                match operators.apply(configured).await {
                    Ok(()) => report(DevEvent::Serving(operators.names())),
                    Err(errors) => report(DevEvent::Code(errors)),
                }
            }
        }
        let seen = fingerprints(&also, &roots);
        let fresh = |(_, found): &Fingerprint| found.is_some_and(|(modified, _)| modified > before);
        if seen.iter().any(fresh) {
            tokio::time::sleep(WATCH).await;
            continue;
        }
        while fingerprints(&also, &roots) == seen {
            for (_, lines) in &mut followed {
                while let Ok(line) = lines.try_recv() {
                    report(DevEvent::Log(line));
                }
            }
            tokio::time::sleep(WATCH).await;
        }
    }
}

type Fingerprint = (PathBuf, Option<(SystemTime, u64)>);

/// Of the files and of all modules below the folders: also those that a mistake kept from being loaded.
fn fingerprints(files: &[PathBuf], roots: &[PathBuf]) -> Vec<Fingerprint> {
    let of = |path: PathBuf| {
        let found = fs::metadata(&path).ok().and_then(|found| Some((found.modified().ok()?, found.len())));
        (path, found)
    };
    let mut folders: Vec<PathBuf> = roots.to_vec();
    let mut found: Vec<Fingerprint> = files.iter().cloned().map(of).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            let kind = entry.file_type().ok();
            if found.len() >= WATCHED_MAX || hidden || entry.file_name() == "node_modules" {
                continue;
            }
            if kind.is_some_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            } else if kind.is_some_and(|kind| kind.is_file()) {
                found.push(of(entry.path()));
            }
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_operator_bundles_and_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let created = create(folder.path(), "hello").unwrap();
        assert!(created.policy.contains("hello/main.ts"));
        let bundle = Bundle::build(&created.files[0], &folder.path().join("hello")).unwrap();
        assert!(bundle.code.contains("fetch"));
        let error = create(folder.path(), "hello").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(create(folder.path(), "../x").unwrap_err().to_string().contains("no name for an operator"));
    }

    #[test]
    fn a_log_line_says_whose_it_is() {
        let line = LogLine {
            time: SystemTime::UNIX_EPOCH + Duration::from_millis(3_723_004),
            operator: "hello".to_owned(),
            process: 7,
            text: "hi".to_owned(),
        };
        assert_eq!(format_log(&line), "01:02:03.004Z hello[7] hi");
    }
}
