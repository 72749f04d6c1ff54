//! The code cache of the built program: a filter is compiled once, whoever starts it next.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use portcullis_tests::policy::PolicyParts;
use portcullis_tests::process::Process;
use portcullis_tests::server::Server;
use portcullis_tests::upstream::Upstream;
use portcullis_tests::{client, places};

/// A policy with the probe in it, and a folder for a cache that does not exist yet.
struct Folder {
    folder: tempfile::TempDir,
    policy: std::path::PathBuf,
    _origin: Upstream,
}

impl Folder {
    fn new() -> Folder {
        let wasm = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
        let origin = Upstream::start().unwrap_or_else(|error| panic!("{error}"));
        let folder = tempfile::tempdir().expect("a temporary folder");
        let parts = PolicyParts {
            filter: "probe",
            wasm: &wasm,
            configuration: b"",
            origin: origin.address(),
            callouts: &[],
            http2: &[],
            failure_policy: None,
        };
        let policy = parts.write(folder.path()).unwrap_or_else(|error| panic!("{error}"));
        Folder { folder, policy, _origin: origin }
    }

    fn cache(&self) -> std::path::PathBuf {
        self.folder.path().join("cache")
    }

    fn serve(&self, arguments: &[&str]) -> Server {
        let cache = self.cache();
        Server::portcullis_with(&self.policy, |command| {
            command.env("PORTCULLIS_CACHE_DIR", cache).args(arguments);
        })
        .unwrap_or_else(|error| panic!("{error}"))
    }

    fn check(&self) -> Command {
        let mut command = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
        command.arg("check").arg(&self.policy).arg("--cache-dir").arg(self.cache());
        command
    }
}

fn entries(cache: &Path) -> usize {
    let is_entry = |name: &str| Path::new(name).extension().is_some_and(|extension| extension == "code");
    let names = std::fs::read_dir(cache).map(|files| files.flatten().map(|file| file.file_name()).collect());
    let names: Vec<std::ffi::OsString> = names.unwrap_or_default();
    names.iter().filter(|name| is_entry(&name.to_string_lossy())).count()
}

fn loaded(server: &Server, source: &str) -> Option<i64> {
    let counters = server.counters().unwrap_or_else(|error| panic!("{error}"));
    counters.get(&format!("portcullis_modules_loaded_total.source.{source}")).copied()
}

#[test]
fn the_second_start_takes_what_the_first_one_compiled() {
    let folder = Folder::new();
    let first = folder.serve(&[]);
    assert!(first.log().contains("filter `probe`: compiled\n"), "{}", first.log());
    assert_eq!((loaded(&first, "compiler"), loaded(&first, "cache")), (Some(1), Some(0)));
    drop(first);
    let second = folder.serve(&[]);
    assert!(second.log().contains("filter `probe`: compiled code taken from the code cache"), "{}", second.log());
    assert_eq!((loaded(&second, "compiler"), loaded(&second, "cache")), (Some(0), Some(1)));
    let request = portcullis_harness::RequestPlan::new("GET", "/");
    let response = client::send(second.address(), &request).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(response.map(|response| response.status), Some(200), "what was kept works");
}

#[test]
fn programs_that_start_at_the_same_time_share_a_cache() {
    let folder = Folder::new();
    let checks: Vec<Process> = (0..4)
        .map(|_| Process::start("portcullis check", &mut folder.check()).unwrap_or_else(|error| panic!("{error}")))
        .collect();
    for mut check in checks {
        let status = check.wait().unwrap_or_else(|error| panic!("{error}"));
        assert!(status.success(), "{}", check.log());
    }
    assert_eq!(entries(&folder.cache()), 1);
    let server = folder.serve(&[]);
    assert_eq!((loaded(&server, "compiler"), loaded(&server, "cache")), (Some(0), Some(1)));
}

#[test]
fn a_folder_that_others_can_write_to_is_not_used_and_the_log_says_so() {
    let folder = Folder::new();
    std::fs::create_dir(folder.cache()).expect("a folder");
    std::fs::set_permissions(folder.cache(), std::fs::Permissions::from_mode(0o777)).expect("a mode");
    let server = folder.serve(&[]);
    let log = server.log();
    let said =
        format!("the code cache `{}` is not used: its mode 777 lets others write to it", folder.cache().display());
    assert!(log.contains(&said), "{log}");
    assert_eq!((loaded(&server, "compiler"), loaded(&server, "cache")), (Some(1), Some(0)));
    assert_eq!(entries(&folder.cache()), 0);
}

#[test]
fn nothing_is_kept_where_that_was_asked_for() {
    let folder = Folder::new();
    let server = folder.serve(&["--no-cache"]);
    assert_eq!(loaded(&server, "compiler"), Some(1));
    assert!(!folder.cache().exists());
}
