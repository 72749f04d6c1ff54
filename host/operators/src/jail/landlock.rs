//! Landlock: what of the file system, of TCP, of abstract sockets and of signals stays reachable.
//!
//! It holds even where there is no mount namespace. Without one, the engine's files are named in place.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::{Layer, LayerState, Report, Spec};

/// The newest interface whose rights we name. An older kernel takes what it knows, and the report says so.
const NEWEST: ABI = ABI::V6;

pub(super) fn restrict(spec: &Spec, own_root: bool, private: &Path, report: &mut Report) {
    let state = match apply(spec, own_root, private) {
        Ok(RulesetStatus::FullyEnforced) => LayerState::Active,
        Ok(RulesetStatus::PartiallyEnforced) => LayerState::Partial {
            reason:
                "the kernel knows an older Landlock: some of TCP, abstract sockets and signals are left to seccomp and \
                     the namespaces"
                    .to_owned(),
        },
        Ok(RulesetStatus::NotEnforced) => LayerState::Missing { reason: "the kernel has no Landlock".to_owned() },
        Err(reason) => LayerState::Missing { reason },
    };
    report.set(Layer::Landlock, state);
}

fn apply(spec: &Spec, own_root: bool, private: &Path) -> Result<RulesetStatus, String> {
    let said = |error: landlock::RulesetError| error.to_string();
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
        .map_err(said)?
        .handle_access(AccessNet::from_all(NEWEST))
        .map_err(said)?
        .scope(Scope::from_all(NEWEST))
        .map_err(said)?
        .create()
        .map_err(said)?;
    let read: BitFlags<AccessFs> = AccessFs::ReadFile.into();
    for bind in &spec.binds {
        let path = if own_root { &bind.target } else { &bind.source };
        let rights = if bind.executable { read | AccessFs::Execute } else { read };
        ruleset = allow(ruleset, path, rights)?;
    }
    for (path, _) in &spec.files {
        let path = if own_root { path.clone() } else { fallback_file(spec, path) };
        ruleset = allow(ruleset, &path, read)?;
    }
    // No symbolic links, devices or pipes, and nothing executable: the private directory is for data and two sockets.
    let private_rights = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir;
    ruleset = allow(ruleset, private, private_rights)?;
    Ok(ruleset.restrict_self().map_err(said)?.ruleset)
}

/// Takes all file rights from this process but that of reading below one folder, as far as the kernel can.
pub(crate) fn only_read(folder: &Path) {
    let restricted = || -> Result<(), String> {
        let said = |error: landlock::RulesetError| error.to_string();
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))
            .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
            .and_then(Ruleset::create)
            .map_err(said)?;
        let ruleset = allow(ruleset, folder, AccessFs::ReadFile | AccessFs::ReadDir)?;
        ruleset.restrict_self().map(|_| ()).map_err(said)
    };
    // Reading below the folder is all that is asked for; this is the second wall.
    drop(restricted());
}

fn fallback_file(spec: &Spec, path: &Path) -> PathBuf {
    let relative = path.strip_prefix("/").unwrap_or(path);
    spec.private_fallback.join("root").join(relative)
}

fn allow(
    ruleset: landlock::RulesetCreated,
    path: &Path,
    rights: BitFlags<AccessFs>,
) -> Result<landlock::RulesetCreated, String> {
    let fd = PathFd::new(path).map_err(|error| format!("`{}`: {error}", path.display()))?;
    ruleset.add_rule(PathBeneath::new(fd, rights)).map_err(|error| error.to_string())
}
