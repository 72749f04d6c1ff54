//! The jail's file system: an empty root with the engine's own files, read-only, and one private directory.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::{Bind, PRIVATE, Spec};
use crate::sys;

/// Builds the root in the current (own) mount namespace and makes it `/`. Nothing of the old root stays reachable.
pub(super) fn enter(spec: &Spec, uid: u32, gid: u32) -> io::Result<()> {
    // Otherwise every mount below would appear on the whole machine.
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let root = &spec.staging;
    let secure = MountFlags::NOSUID | MountFlags::NODEV;
    let options = c"size=1m,nr_inodes=256,mode=0755";
    rustix::mount::mount("tmpfs", root, "tmpfs", secure, Some(options))?;
    for bind in &spec.binds {
        show(root, bind)?;
    }
    for (path, text) in &spec.files {
        let path = inside(root, path)?;
        make_parent(&path)?;
        fs::write(&path, text)?;
    }
    let private = inside(root, Path::new(PRIVATE))?;
    fs::DirBuilder::new().mode(0o700).create(&private)?;
    let root_path = CString::new(root.as_os_str().as_encoded_bytes()).map_err(io::Error::other)?;
    // All at once, where the kernel can (5.12).
    let at_once = sys::restrict_mounts(&root_path).is_ok();
    if !at_once {
        spec.binds.iter().try_for_each(|bind| restrict(root, bind))?;
    }
    let options =
        format!("size={},nr_inodes={},mode=0700,uid={uid},gid={gid}", spec.private_bytes, spec.private_files.max(2));
    let options = CString::new(options).map_err(io::Error::other)?;
    rustix::mount::mount("tmpfs", &private, "tmpfs", secure | MountFlags::NOEXEC, Some(options.as_c_str()))?;
    rustix::process::chdir(root)?;
    // The same place twice: the old root ends up stacked on the new one and is detached from there (pivot_root(2)).
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    if !at_once {
        rustix::mount::mount_remount("/", secure | MountFlags::RDONLY, c"")?;
    }
    Ok(())
}

fn show(root: &Path, bind: &Bind) -> io::Result<()> {
    let target = inside(root, &bind.target)?;
    make_parent(&target)?;
    fs::write(&target, b"")?;
    rustix::mount::mount_bind(&bind.source, &target)?;
    Ok(())
}

fn restrict(root: &Path, bind: &Bind) -> io::Result<()> {
    let target = inside(root, &bind.target)?;
    let mut flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    // A user namespace may not take away what the mount it came from had.
    let locked = rustix::fs::statvfs(&target)?.f_flag;
    for (had, flag) in [
        (rustix::fs::StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (rustix::fs::StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (rustix::fs::StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (rustix::fs::StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ] {
        if locked.contains(had) {
            flags |= flag;
        }
    }
    rustix::mount::mount_remount(&target, flags, c"")?;
    Ok(())
}

/// Without a mount namespace: the private directory is one of the host's, and the engine's files are used in place.
pub(super) fn prepare_without_namespace(spec: &Spec, uid: u32, gid: u32) -> io::Result<()> {
    let private = &spec.private_fallback;
    fs::DirBuilder::new().mode(0o700).recursive(true).create(private)?;
    for (path, text) in &spec.files {
        let path = inside(&private.join("root"), path)?;
        make_parent(&path)?;
        fs::write(&path, text)?;
    }
    if rustix::process::geteuid().is_root() {
        chown(private, Some(uid), Some(gid))?;
    }
    Ok(())
}

fn make_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => fs::DirBuilder::new().mode(0o755).recursive(true).create(parent),
        None => Ok(()),
    }
}

fn inside(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let relative = path.strip_prefix("/").map_err(io::Error::other)?;
    let plain = relative.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if !plain {
        return Err(io::Error::other(format!("`{}` does not stay inside the root", path.display())));
    }
    Ok(root.join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_climbs_out_is_refused() {
        assert!(inside(Path::new("/r"), Path::new("/a/../../etc")).is_err());
        assert!(inside(Path::new("/r"), Path::new("relative")).is_err());
        assert_eq!(inside(Path::new("/r"), Path::new("/a/b")).unwrap(), Path::new("/r/a/b"));
    }
}
