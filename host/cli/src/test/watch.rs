//! Runs something again whenever a file it depends on changes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use notify::{Event, RecursiveMode, Watcher, recommended_watcher};

use crate::failure::Failure;
use crate::print;

/// Editors and builds write in several steps; this long nothing must happen before the next run.
const QUIET: Duration = Duration::from_millis(80);

/// Runs `work` now and after each change to what `depends` names, until the process is ended.
pub(crate) fn run(depends: impl Fn() -> Vec<PathBuf>, work: impl Fn() -> Result<(), Failure>) -> Result<(), Failure> {
    let cannot = |error: notify::Error| Failure::Running(format!("files cannot be watched: {error}"));
    let (sender, events) = channel();
    let mut watcher = recommended_watcher(move |event: notify::Result<Event>| {
        // The receiver lives as long as the process.
        drop(sender.send(event));
    })
    .map_err(cannot)?;
    let mut watched: BTreeSet<PathBuf> = BTreeSet::new();
    loop {
        // Again each time: a scenario may name other files now.
        let files: BTreeSet<PathBuf> = depends().iter().map(|path| whole(path)).collect();
        for folder in folders(&files) {
            if !watched.contains(&folder) && watcher.watch(&folder, RecursiveMode::NonRecursive).is_ok() {
                watched.insert(folder);
            }
        }
        if let Err(failure) = work() {
            // A mistake in a file is what the next change puts right.
            failure.report();
        }
        print("\nwaiting for a change\n")?;
        wait(&events, &files)?;
    }
}

/// Folders whose changes matter: those of files, and folders that were named themselves. What is replaced by another file of
/// its name, as editors do, is seen only there.
fn folders(paths: &BTreeSet<PathBuf>) -> BTreeSet<PathBuf> {
    let mut folders = BTreeSet::new();
    for path in paths {
        if path.is_dir() {
            scenarios_below(path, &mut folders);
        } else if let Some(folder) = path.ancestors().skip(1).find(|folder| folder.is_dir()) {
            // Of a file whose folder is not there yet, the folder in which that would appear.
            folders.insert(folder.to_owned());
        }
    }
    folders
}

/// Folders called `scenarios`, in which files may appear.
fn scenarios_below(folder: &Path, found: &mut BTreeSet<PathBuf>) {
    if folder.file_name().is_some_and(|name| name == "scenarios") {
        found.insert(folder.to_owned());
    }
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let skipped = name.starts_with('.') || name == "target" || name == "node_modules";
        if !skipped && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            scenarios_below(&entry.path(), found);
        }
    }
}

/// The path without links, as far as there is something.
fn whole(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut ancestors = path.ancestors().filter_map(|part| Some((part, part.canonicalize().ok()?)));
    match ancestors.next() {
        Some((part, there)) => path.strip_prefix(part).map_or_else(|_| there.clone(), |rest| there.join(rest)),
        None => path,
    }
}

/// Returns once something that matters has changed and nothing has happened since for a moment.
fn wait(events: &Receiver<notify::Result<Event>>, files: &BTreeSet<PathBuf>) -> Result<(), Failure> {
    let gone = || Failure::Running("files are no longer watched".to_owned());
    let matters = |event: &notify::Result<Event>| {
        event.as_ref().is_ok_and(|event| {
            let changes = event.kind.is_create() || event.kind.is_modify() || event.kind.is_remove();
            let is_scenario = |path: &Path| path.extension().is_some_and(|ending| ending == "yaml");
            let leads_to_ours = |path: &Path| event.kind.is_create() && files.iter().any(|file| file.starts_with(path));
            let ours = |path: &PathBuf| files.contains(path) || is_scenario(path) || leads_to_ours(path);
            changes && event.paths.iter().any(ours)
        })
    };
    while !matters(&events.recv().map_err(|_| gone())?) {}
    loop {
        match events.recv_timeout(QUIET) {
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => return Err(gone()),
        }
    }
}
