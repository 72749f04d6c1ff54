//! What stands behind `portcullis operators new|check|dev|logs`.

use std::fs;
use std::io;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::bundle::Bundle;
use crate::config::{Operator, is_name};
use crate::engine::Engine;
use crate::logs::LogLine;
use crate::{ApplyError, Operators, Settings, StartError};

const TEMPLATE: &str = include_str!("../runtime/template.ts");
const TYPES: &str = include_str!("../runtime/operator.d.ts");
const WATCHED_MAX: usize = 2000;

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
    let host = Operators::start(Settings { prewarmed: 0, keeps_nothing: true, ..settings }, engine)?;
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

/// One line as `portcullis operators logs` prints it.
#[must_use]
pub fn format_log(line: &LogLine) -> String {
    let since = line.time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (seconds, milliseconds) = (since.as_secs() % 86_400, since.subsec_millis());
    format!(
        "{:02}:{:02}:{:02}.{milliseconds:03}Z {}[{}] {}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        line.operator,
        line.process,
        line.text
    )
}

/// Notices changes of files, by looking at them. For development: it costs a look at each file's metadata.
#[derive(Debug)]
pub struct Watch {
    files: Vec<PathBuf>,
    roots: Vec<PathBuf>,
    seen: Vec<Fingerprint>,
}

impl Watch {
    /// Watches some files, and all below some folders: also modules that a mistake kept from being loaded. To be made
    /// before the files are read, so that a change meanwhile is noticed.
    #[must_use]
    pub fn new(files: Vec<PathBuf>, roots: Vec<PathBuf>) -> Self {
        let seen = fingerprints(&files, &roots);
        Self { files, roots, seen }
    }

    /// The first file that changed, came or went since the last call, if one did.
    pub fn changed(&mut self) -> Option<PathBuf> {
        let now = fingerprints(&self.files, &self.roots);
        let before = std::mem::replace(&mut self.seen, now);
        let differs = |a: &[Fingerprint], b: &[Fingerprint]| a.iter().find(|one| !b.contains(one)).cloned();
        differs(&self.seen, &before).or_else(|| differs(&before, &self.seen)).map(|(path, _)| path)
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
    fn a_watch_names_what_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("policy"), "1").unwrap();
        fs::create_dir_all(path("root/lib")).unwrap();
        fs::write(path("root/main.ts"), "1").unwrap();
        let mut watch = Watch::new(vec![path("policy"), path("absent")], vec![path("root")]);
        assert_eq!(watch.changed(), None);
        for (name, text) in [("policy", "12"), ("root/main.ts", "12"), ("root/lib/new.ts", "1"), ("absent", "1")] {
            fs::write(path(name), text).unwrap();
            assert_eq!(watch.changed(), Some(path(name)));
            assert_eq!(watch.changed(), None);
        }
        fs::remove_file(path("root/lib/new.ts")).unwrap();
        assert_eq!(watch.changed(), Some(path("root/lib/new.ts")));
        fs::create_dir(path("root/node_modules")).unwrap();
        fs::write(path("root/node_modules/x.ts"), "1").unwrap();
        fs::write(path("root/.swap"), "1").unwrap();
        assert_eq!(watch.changed(), None);
    }

    #[test]
    fn a_log_line_says_whose_it_is() {
        let line = LogLine {
            time: SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(3_723_004),
            operator: "hello".to_owned(),
            process: 7,
            text: "hi".to_owned(),
        };
        assert_eq!(format_log(&line), "01:02:03.004Z hello[7] hi");
    }
}
