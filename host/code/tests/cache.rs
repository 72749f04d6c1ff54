//! The cache as a whole: what is kept, what is refused, what goes, and that nothing of it makes a load fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use portcullis_abi::{Engine, EngineOptions, ModuleError, ModuleLimits};
use portcullis_code::{Cache, CacheSettings, Counts, LoadError, LoadLimits, Loader, LoaderSettings, Source};
use tempfile::TempDir;

fn engine() -> Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| Engine::new(&EngineOptions::default()).unwrap()).clone()
}

/// A small plugin, different for each number.
fn plugin(number: u32) -> Vec<u8> {
    wat::parse_str(format!(
        r#"(module (memory (export "memory") 1)
             (func (export "malloc") (param i32) (result i32) (i32.const {number}))
             (func (export "proxy_abi_version_0_2_1")))"#
    ))
    .unwrap()
}

/// A cache in a folder of its own, which a loader opens as a new process would.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn settings(&self) -> CacheSettings {
        CacheSettings::new(self.0.path().join("code"))
    }

    fn loader(&self) -> Loader {
        self.bounded(|_| {})
    }

    fn bounded(&self, change: impl FnOnce(&mut CacheSettings)) -> Loader {
        let mut settings = self.settings();
        change(&mut settings);
        Loader::new(engine(), LoaderSettings { cache: Some(Cache::open(settings).unwrap()), process: None }).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("code").join(name)
    }

    /// Entries, the one that was used last being the last.
    fn entries(&self) -> Vec<PathBuf> {
        let mut entries: Vec<PathBuf> = fs::read_dir(self.path(""))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "code"))
            .collect();
        entries.sort_by_key(|path| fs::metadata(path).unwrap().modified().unwrap());
        entries
    }

    fn only_entry(&self) -> PathBuf {
        let entries = self.entries();
        assert_eq!(entries.len(), 1, "{entries:?}");
        entries[0].clone()
    }
}

fn load(loader: &Loader, number: u32) -> Source {
    loader.load(&plugin(number), &LoadLimits::default()).unwrap().source
}

fn age(path: &Path, by: Duration) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - by).unwrap();
}

#[test]
fn the_second_start_does_not_compile() {
    let folder = Folder::new();
    let first = folder.loader();
    assert_eq!(load(&first, 1), Source::Compiler);
    assert_eq!(load(&first, 1), Source::Cache, "also within one process");
    let second = folder.loader();
    assert_eq!(load(&second, 1), Source::Cache);
    assert_eq!(load(&second, 2), Source::Compiler, "another module is compiled");
    assert_eq!(second.counts(), Counts { cached: 1, compiled: 1 });
    let none = Loader::new(engine(), LoaderSettings::default()).unwrap();
    assert_eq!((load(&none, 1), load(&none, 1)), (Source::Compiler, Source::Compiler));
}

#[test]
fn an_entry_that_was_changed_is_compiled_anew_and_replaced() {
    let folder = Folder::new();
    load(&folder.loader(), 1);
    let entry = folder.only_entry();
    let good = fs::read(&entry).unwrap();
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let half = good[..good.len() / 2].to_vec();
    for bad in [flipped, half, Vec::new(), b"junk".to_vec(), [&good[..], &good].concat()] {
        fs::write(&entry, &bad).unwrap();
        assert_eq!(load(&folder.loader(), 1), Source::Compiler, "{} bytes", bad.len());
        assert_ne!(fs::read(&entry).unwrap(), bad, "it was replaced");
        assert_eq!(load(&folder.loader(), 1), Source::Cache);
    }
}

#[test]
fn an_entry_under_another_modules_name_is_refused() {
    let folder = Folder::new();
    load(&folder.loader(), 1);
    let first = folder.only_entry();
    load(&folder.loader(), 2);
    let second = folder.entries().into_iter().find(|path| *path != first).unwrap();
    fs::copy(&first, &second).unwrap();
    assert_eq!(load(&folder.loader(), 2), Source::Compiler);
    assert_eq!(load(&folder.loader(), 1), Source::Cache);
}

#[test]
fn entries_of_another_key_are_refused() {
    let folder = Folder::new();
    load(&folder.loader(), 1);
    fs::remove_file(folder.path("key")).unwrap();
    assert_eq!(load(&folder.loader(), 1), Source::Compiler);
    assert_eq!(load(&folder.loader(), 1), Source::Cache);
}

#[test]
fn an_entry_that_others_can_write_to_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = Folder::new();
    load(&folder.loader(), 1);
    fs::set_permissions(folder.only_entry(), fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(load(&folder.loader(), 1), Source::Compiler);
}

#[test]
fn a_link_in_the_place_of_an_entry_is_refused() {
    let folder = Folder::new();
    load(&folder.loader(), 1);
    let entry = folder.only_entry();
    fs::rename(&entry, folder.path("moved")).unwrap();
    std::os::unix::fs::symlink("moved", &entry).unwrap();
    assert_eq!(load(&folder.loader(), 1), Source::Compiler);
    assert!(folder.only_entry().symlink_metadata().unwrap().is_file(), "the link is gone");
}

#[test]
fn the_number_of_entries_is_bounded_and_the_least_recently_used_goes() {
    let folder = Folder::new();
    let loader = folder.bounded(|settings| settings.entries_max = 2);
    load(&loader, 1);
    age(&folder.entries()[0], Duration::from_secs(20));
    load(&loader, 2);
    age(folder.entries().last().unwrap(), Duration::from_secs(10));
    assert_eq!(load(&loader, 1), Source::Cache, "which makes 2 the least recently used");
    load(&loader, 3);
    assert_eq!(folder.entries().len(), 2);
    assert_eq!(
        (load(&loader, 1), load(&loader, 3), load(&loader, 2)),
        (Source::Cache, Source::Cache, Source::Compiler)
    );
}

#[test]
fn the_bytes_of_all_entries_are_bounded() {
    let folder = Folder::new();
    load(&folder.loader(), 1);
    let one = fs::metadata(folder.only_entry()).unwrap().len();
    age(&folder.only_entry(), Duration::from_secs(10));
    let room_for_one = folder.bounded(|settings| settings.bytes_max = one + one / 2);
    load(&room_for_one, 2);
    assert_eq!(load(&room_for_one, 2), Source::Cache);
    assert_eq!(folder.entries().len(), 1);
    let room_for_none = folder.bounded(|settings| settings.bytes_max = one / 2);
    assert_eq!((load(&room_for_none, 3), load(&room_for_none, 3)), (Source::Compiler, Source::Compiler));
}

#[test]
fn what_is_unused_for_long_and_what_was_left_unfinished_goes() {
    let folder = Folder::new();
    load(&folder.loader(), 1);
    let unused = folder.only_entry();
    age(&unused, Duration::from_secs(91 * 86_400));
    for (name, hours) in [("new-old", 2), ("new-young", 0), ("note.txt", 10_000)] {
        fs::write(folder.path(name), "").unwrap();
        age(&folder.path(name), Duration::from_secs(hours * 3600));
    }
    load(&folder.loader(), 2);
    let there = |name: &str| folder.path(name).exists();
    assert!(!unused.exists() && folder.entries().len() == 1);
    assert!(!there("new-old") && there("new-young"), "another process may be writing the young one");
    assert!(there("note.txt"), "it is not ours to remove");
}

#[test]
fn processes_that_share_a_folder_do_not_disturb_each_other() {
    let folder = Folder::new();
    std::thread::scope(|scope| {
        for process in 0..6 {
            let folder = &folder;
            scope.spawn(move || {
                // So little room that they remove each other's entries all the time.
                let loader = folder.bounded(|settings| settings.entries_max = 2);
                for round in 0..20 {
                    load(&loader, (process + round) % 4);
                }
            });
        }
    });
    let left = fs::read_dir(folder.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let unfinished: Vec<String> = left.filter(|name| name.starts_with("new-")).collect();
    assert_eq!(unfinished, [""; 0]);
    for entry in folder.entries() {
        assert!(fs::metadata(&entry).unwrap().len() > 1000, "an entry is whole");
    }
}

#[test]
fn a_disk_that_takes_nothing_costs_only_the_compiling() {
    let folder = Folder::new();
    let loader = folder.loader();
    load(&loader, 1);
    // Without its folder nothing can be written or read any more, whoever we run as.
    fs::remove_dir_all(folder.path("")).unwrap();
    assert_eq!((load(&loader, 1), load(&loader, 2)), (Source::Compiler, Source::Compiler));
}

#[test]
fn an_unusable_folder_is_an_error_with_its_name_and_reason() {
    let base = tempfile::tempdir().unwrap();
    let file = base.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Cache::open(CacheSettings::new(file.join("code"))).unwrap_err().to_string();
    assert!(error.starts_with(&format!("the code cache `{}/code` is not used: it cannot be made: ", file.display())));
}

#[test]
fn limits_hold_also_for_what_was_compiled_before() {
    let folder = Folder::new();
    load(&folder.loader(), 1);
    let mut limits = LoadLimits::default();
    limits.module = ModuleLimits::default();
    limits.module.module_bytes_max = 10;
    let error = folder.loader().load(&plugin(1), &limits).unwrap_err();
    assert!(matches!(error, LoadError::Module(ModuleError::TooLarge { .. })), "{error}");
}

#[test]
fn a_module_that_is_no_plugin_is_refused_and_not_kept() {
    let folder = Folder::new();
    let error = folder.loader().load(b"\0asm\x01\0\0\0", &LoadLimits::default()).unwrap_err();
    assert!(matches!(error, LoadError::Module(ModuleError::NoAbiVersion)), "{error}");
    let error = folder.loader().load(b"\0asm\x01\0\0\0junk", &LoadLimits::default()).unwrap_err();
    assert!(matches!(error, LoadError::Module(ModuleError::Invalid(_))), "{error}");
    assert!(folder.entries().is_empty());
}

#[test]
fn compiling_is_bounded_in_time() {
    let mut limits = LoadLimits::default();
    limits.compile_time_max = Duration::ZERO;
    let error = Folder::new().loader().load(&plugin(1), &limits).unwrap_err();
    assert!(matches!(error, LoadError::TooLong(_)), "{error}");
}
