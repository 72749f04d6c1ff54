//! Control groups (version 2), where the host may make them: one for each process, as a further bound on memory, threads and
//! CPU beside limits and sampling.
//!
//! Best effort: nothing here keeps an operator from starting. What the machine does not delegate is said in the report.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::LayerState;

/// The controllers that bound a process.
const WANTED: [&str; 3] = ["memory", "pids", "cpu"];
const CPU_PERIOD_MICROSECONDS: u64 = 100_000;
const PREFIX: &str = "portcullis-";

/// What one process may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) memory_bytes: u64,
    pub(crate) threads: u64,
    /// CPUs that may be busy at the same time: an engine helps its one event loop with threads of its own.
    pub(crate) cpus: u64,
}

/// A folder of groups that belongs to one host.
#[derive(Debug)]
pub(crate) struct Groups {
    folder: PathBuf,
    /// Of [`WANTED`], those that are there.
    controllers: BTreeSet<&'static str>,
}

impl Groups {
    /// Makes a folder in the group that this process is in, and hands on the controllers that there are.
    ///
    /// # Errors
    /// Why there are no groups.
    pub(crate) fn prepare() -> Result<Self, String> {
        // Several hosts may live in one process, and several processes in one group.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
        let own = own_folder(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?)?;
        Self::prepare_in(&own, &name)
    }

    fn prepare_in(own: &Path, name: &str) -> Result<Self, String> {
        let offered = controllers(&own.join("cgroup.controllers"));
        if !offered.is_empty() && !hand_on(own, &offered) {
            // A group that hands controllers on may hold no process itself (but the uppermost). Where nobody but us is in
            // it, as in a systemd unit of our own, we go one down.
            if is_alone(own) && move_down(own).is_ok() {
                hand_on(own, &offered);
            }
        }
        remove_left(own);
        let folder = own.join(name);
        fs::create_dir(&folder).map_err(|error| format!("cannot make a group in `{}`: {error}", own.display()))?;
        let handed = controllers(&folder.join("cgroup.controllers"));
        hand_on(&folder, &handed);
        let test = folder.join("test");
        let made =
            fs::create_dir(&test).map_err(|error| format!("cannot make a group in `{}`: {error}", folder.display()));
        let controllers = controllers(&test.join("cgroup.controllers"));
        let _ = fs::remove_dir(&test);
        made.map(|()| Self { folder, controllers })
    }

    /// What to report of a process in one of these groups.
    pub(crate) fn state(&self) -> LayerState {
        let missing: Vec<&str> = WANTED.into_iter().filter(|name| !self.controllers.contains(name)).collect();
        if missing.is_empty() {
            return LayerState::Active;
        }
        LayerState::Partial {
            reason: format!("not delegated to this host, and so not bounded by the group: {}", missing.join(", ")),
        }
    }

    pub(crate) fn create(&self, name: &str, bounds: Bounds) -> io::Result<Group> {
        let path = self.folder.join(name);
        fs::create_dir(&path)?;
        let group = Group { path };
        let quota = bounds.cpus.max(1) * CPU_PERIOD_MICROSECONDS;
        let limits = [
            ("memory", "memory.max", bounds.memory_bytes.to_string()),
            // Otherwise what is too much would go to the disk instead.
            ("memory", "memory.swap.max", "0".to_owned()),
            ("pids", "pids.max", bounds.threads.to_string()),
            ("cpu", "cpu.max", format!("{quota} {CPU_PERIOD_MICROSECONDS}")),
        ];
        for (controller, file, value) in limits {
            if self.controllers.contains(controller)
                && let Err(error) = write(&group.path.join(file), &value)
                // A kernel without swap has no such file.
                && file != "memory.swap.max"
            {
                return Err(io::Error::new(error.kind(), format!("{file}: {error}")));
            }
        }
        Ok(group)
    }
}

impl Groups {
    /// Removes everything. No process may be started in it any more.
    pub(crate) fn clean(&self) {
        // Groups of processes go with these; what is left is what could not be removed then.
        for group in below(&self.folder) {
            remove(&group);
        }
        let _ = fs::remove_dir(&self.folder);
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        self.clean();
    }
}

/// One process's group. Dropping it ends whatever is left in it.
#[derive(Debug)]
pub(crate) struct Group {
    path: PathBuf,
}

impl Group {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the kernel ended something in it for want of memory.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        events.lines().any(|line| line.strip_prefix("oom_kill ").is_some_and(|count| count.trim() != "0"))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Kills what is in a group and removes it.
fn remove(path: &Path) {
    let _ = write(&path.join("cgroup.kill"), "1");
    for _ in 0..20 {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(Duration::from_millis(1)),
            _ => return,
        }
    }
}

/// Removes the groups of hosts that were killed: their processes ended with them. What is not empty stays, whoever it
/// belongs to.
fn remove_left(own: &Path) {
    for folder in below(own) {
        let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        // A host that lives may just have made a group and not put anything into it.
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            for group in below(&folder) {
                let _ = fs::remove_dir(group);
            }
            let _ = fs::remove_dir(folder);
        }
    }
}

fn below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

fn controllers(file: &Path) -> BTreeSet<&'static str> {
    let text = fs::read_to_string(file).unwrap_or_default();
    WANTED.into_iter().filter(|name| text.split_whitespace().any(|word| word == *name)).collect()
}

/// Whether all of them are there for the groups below.
fn hand_on(folder: &Path, names: &BTreeSet<&'static str>) -> bool {
    let control = folder.join("cgroup.subtree_control");
    // One by one: of several in one write, one that cannot be had takes the others with it.
    for name in names {
        let _ = write(&control, &format!("+{name}"));
    }
    controllers(&control) == *names
}

fn is_alone(folder: &Path) -> bool {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    let own = std::process::id().to_string();
    let mut found = text.lines().map(str::trim).filter(|line| !line.is_empty()).peekable();
    found.peek().is_some() && found.all(|line| line == own)
}

fn move_down(folder: &Path) -> io::Result<()> {
    let host = folder.join("host");
    match fs::create_dir(&host) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    write(&host.join("cgroup.procs"), &std::process::id().to_string())
}

/// Where this process's own group is in the file system (cgroups(7), proc_pid_mountinfo(5)).
fn own_folder(mountinfo: &str, cgroup: &str) -> Result<PathBuf, String> {
    let group = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    let group = group.ok_or("the kernel has no control groups of version 2")?;
    let mounts = mountinfo.lines().filter_map(|line| {
        let (fields, rest) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (rest.split(' ').next()? == "cgroup2").then_some((root, point))
    });
    let inside = mounts.into_iter().find_map(|(root, point)| {
        let below = Path::new(group).strip_prefix(root).ok()?;
        Some(Path::new(point).join(below))
    });
    inside.ok_or_else(|| "the control groups (version 2) are not mounted here".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_group() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
        let check = |mounts: &str, cgroup: &str, expected: Option<&str>| {
            assert_eq!(own_folder(mounts, cgroup).ok(), expected.map(PathBuf::from));
        };
        check(unified, "0::/system.slice/p.service\n", Some("/sys/fs/cgroup/system.slice/p.service"));
        check(unified, "4:memory:/x\n0::/\n", Some("/sys/fs/cgroup/"));
        check("41 31 0:38 /a /mnt rw - cgroup2 cgroup2 rw", "0::/a/b", Some("/mnt/b"));
        check("41 31 0:38 /a /mnt rw - cgroup2 cgroup2 rw", "0::/other", None);
        check("30 23 0:26 / /sys rw - sysfs sysfs rw", "0::/", None);
        check(unified, "4:memory:/x\n", None);
    }

    /// A folder that looks like a group to which `controllers` were handed on.
    fn group(folder: &Path, controllers: &str) {
        fs::create_dir_all(folder).unwrap();
        for file in ["cgroup.kill", "memory.max", "memory.swap.max", "pids.max", "cpu.max"] {
            fs::write(folder.join(file), "").unwrap();
        }
        fs::write(folder.join("cgroup.controllers"), controllers).unwrap();
    }

    #[test]
    fn bounds_are_written_for_the_controllers_that_there_are() {
        let temporary = tempfile::tempdir().unwrap();
        // Dropping groups removes their folder: each has one of its own.
        let groups = |controllers: &[&'static str]| {
            let folder = temporary.path().join(format!("of {}", controllers.join(" ")));
            fs::create_dir(&folder).unwrap();
            Groups { folder, controllers: controllers.iter().copied().collect() }
        };
        let bounds = Bounds { memory_bytes: 1 << 20, threads: 32, cpus: 2 };
        // Files that a real group has by itself are missing in a plain folder, so writing one is what fails.
        let error = groups(&["pids"]).create("a", bounds).unwrap_err();
        assert!(error.to_string().starts_with("pids.max: "), "{error}");
        let unbounded = groups(&[]);
        let none = unbounded.create("b", bounds).unwrap();
        assert_eq!(fs::read_dir(none.path()).unwrap().count(), 0);
        assert!(matches!(groups(&WANTED).state(), LayerState::Active));
        let LayerState::Partial { reason } = groups(&["cpu"]).state() else { panic!("not in part") };
        assert!(reason.ends_with("by the group: memory, pids"), "{reason}");
    }

    #[test]
    fn controllers_are_read_by_name() {
        let folder = tempfile::tempdir().unwrap();
        group(folder.path(), "cpuset cpu io memory hugetlb\n");
        assert_eq!(controllers(&folder.path().join("cgroup.controllers")), BTreeSet::from(["cpu", "memory"]));
    }

    #[test]
    fn the_end_for_want_of_memory_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let group = Group { path: folder.path().join("g") };
        fs::create_dir(group.path()).unwrap();
        assert!(!group.ran_out_of_memory());
        for (text, expected) in [("oom 3\noom_kill 0\n", false), ("oom 3\noom_kill 1\n", true)] {
            fs::write(group.path().join("memory.events"), text).unwrap();
            assert_eq!(group.ran_out_of_memory(), expected);
        }
    }
}
