//! Names for the layers, and what was found of each.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Isolation;

/// One thing that confines an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// A process of its own.
    OwnProcess,
    /// A user id that no other process has.
    Uid,
    /// A user namespace of its own: capabilities, should any be won, mean nothing outside it.
    UserNamespace,
    /// An empty root of its own, with the engine's files only.
    MountNamespace,
    /// No other process is visible.
    PidNamespace,
    /// No network interface but a loopback that is down.
    NetNamespace,
    /// No shared memory or message queues of others.
    IpcNamespace,
    /// A host name of its own.
    UtsNamespace,
    /// A view of control groups of its own.
    CgroupNamespace,
    /// Files, TCP, abstract sockets and signals restricted by Landlock.
    Landlock,
    /// System calls restricted to a list.
    Seccomp,
    /// Memory, descriptors, threads and core dumps limited.
    Rlimits,
    /// Memory, threads and CPU bounded once more, by a control group of its own.
    ControlGroup,
    /// No capability, now or later.
    Capabilities,
    /// Executing a program never adds rights.
    NoNewPrivileges,
    /// The host's environment is not inherited.
    Environment,
    /// The host's open files are not inherited.
    Descriptors,
    /// The kernel ends the process when the host ends.
    ParentDeath,
}

impl Layer {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 18] = [
        Self::OwnProcess,
        Self::Uid,
        Self::UserNamespace,
        Self::MountNamespace,
        Self::PidNamespace,
        Self::NetNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
        Self::Landlock,
        Self::Seccomp,
        Self::Rlimits,
        Self::ControlGroup,
        Self::Capabilities,
        Self::NoNewPrivileges,
        Self::Environment,
        Self::Descriptors,
        Self::ParentDeath,
    ];

    /// Whether the layer must hold even with [`Isolation::BestEffort`]. These need no privilege and no kernel option
    /// that a distribution leaves out.
    #[must_use]
    pub fn is_floor(self) -> bool {
        matches!(
            self,
            Self::OwnProcess
                | Self::Seccomp
                | Self::Rlimits
                | Self::Capabilities
                | Self::NoNewPrivileges
                | Self::Environment
                | Self::Descriptors
                | Self::ParentDeath
        )
    }

    /// What it means for whoever runs the host when this layer is missing.
    #[must_use]
    pub fn when_missing(self) -> &'static str {
        match self {
            Self::OwnProcess => "operators would share memory",
            Self::Uid => {
                "operators run as the host's own user: only namespaces, Landlock and seccomp keep them from its files \
                 and from each other. Start the host as root (it gives root up for every operator)"
            }
            Self::UserNamespace => {
                "a kernel flaw that yields a capability yields it for the whole machine. Allow user namespaces \
                 (`user.max_user_namespaces`, `kernel.unprivileged_userns_clone`, AppArmor's `userns` rule)"
            }
            Self::MountNamespace => {
                "the machine's files are in sight and only Landlock and file modes deny them; Unix sockets that file modes \
                 leave open to all can be connected to; the private directory has no quota"
            }
            Self::PidNamespace => "the process sees the ids of others; signals and ptrace stay forbidden by seccomp",
            Self::NetNamespace => "interfaces exist in its sight; only seccomp keeps it from opening a network socket",
            Self::IpcNamespace => "shared memory and queues of others exist in its sight; seccomp refuses the calls",
            Self::UtsNamespace => "the machine's host name is visible",
            Self::CgroupNamespace => "the names of the machine's control groups are visible",
            Self::Landlock => {
                "only the empty root (mount namespace) and file modes deny files. Use a kernel with Landlock (6.12 or \
                 later for all of it) and `landlock` in the `lsm=` list"
            }
            Self::Seccomp => "the whole system call interface is open to attack; operators do not start",
            Self::Rlimits => "memory and descriptors are unbounded; operators do not start",
            Self::ControlGroup => {
                "memory, threads and CPU are bounded by limits of the process and by sampling alone. Start the host in a \
                 control group (version 2) that is delegated to it, e.g. a systemd unit with `Delegate=yes`"
            }
            Self::Capabilities => "the process keeps privileges; operators do not start",
            Self::NoNewPrivileges => "set-user-id programs could add rights; operators do not start",
            Self::Environment => "the host's environment leaks; operators do not start",
            Self::Descriptors => "the host's open files leak; operators do not start",
            Self::ParentDeath => "a killed host leaves operators behind; operators do not start",
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::OwnProcess => "own_process",
            Self::Uid => "uid",
            Self::UserNamespace => "user_namespace",
            Self::MountNamespace => "mount_namespace",
            Self::PidNamespace => "pid_namespace",
            Self::NetNamespace => "net_namespace",
            Self::IpcNamespace => "ipc_namespace",
            Self::UtsNamespace => "uts_namespace",
            Self::CgroupNamespace => "cgroup_namespace",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
            Self::Rlimits => "rlimits",
            Self::ControlGroup => "control_group",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivileges => "no_new_privileges",
            Self::Environment => "environment",
            Self::Descriptors => "descriptors",
            Self::ParentDeath => "parent_death",
        };
        formatter.pad(name)
    }
}

/// What was found of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerState {
    /// It holds.
    Active,
    /// It holds in part; what is left out is said.
    Partial {
        /// What is left out.
        reason: String,
    },
    /// It does not hold.
    Missing {
        /// What the kernel answered.
        reason: String,
    },
}

/// One row of a [`Report`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Which layer.
    pub layer: Layer,
    /// What was found.
    pub state: LayerState,
}

impl LayerReport {
    /// Why it is not wholly active; empty when it is.
    #[must_use]
    pub fn reason(&self) -> &str {
        match &self.state {
            LayerState::Active => "",
            LayerState::Partial { reason } | LayerState::Missing { reason } => reason,
        }
    }
}

/// What holds for one confined process, as the launcher found it from inside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    layers: BTreeMap<Layer, LayerState>,
}

impl Report {
    pub(crate) fn set(&mut self, layer: Layer, state: LayerState) {
        self.layers.insert(layer, state);
    }

    /// Whether the layer holds, wholly or in part.
    #[must_use]
    pub fn is_active(&self, layer: Layer) -> bool {
        matches!(self.layers.get(&layer), Some(LayerState::Active | LayerState::Partial { .. }))
    }

    /// A row for every layer there is; one that was never tried is missing.
    pub fn rows(&self) -> impl Iterator<Item = LayerReport> + '_ {
        Layer::ALL.into_iter().map(|layer| LayerReport {
            layer,
            state: self
                .layers
                .get(&layer)
                .cloned()
                .unwrap_or_else(|| LayerState::Missing { reason: "not tried".to_owned() }),
        })
    }

    /// The first layer whose absence the given level does not tolerate.
    #[must_use]
    pub fn unacceptable(&self, isolation: Isolation) -> Option<LayerReport> {
        let files_closed = self.is_active(Layer::MountNamespace) || self.is_active(Layer::Landlock);
        self.rows().find(|row| {
            let needed = (isolation == Isolation::Required && row.layer != Layer::ControlGroup)
                || row.layer.is_floor()
                || (row.layer == Layer::MountNamespace && !files_closed);
            needed && !self.is_active(row.layer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Report {
        let mut report = Report::default();
        for layer in Layer::ALL {
            report.set(layer, LayerState::Active);
        }
        report
    }

    fn without(layers: &[Layer]) -> Report {
        let mut report = full();
        for layer in layers {
            report.set(*layer, LayerState::Missing { reason: "test".to_owned() });
        }
        report
    }

    #[test]
    fn a_full_report_is_acceptable_everywhere() {
        assert_eq!(full().unacceptable(Isolation::Required), None);
        assert_eq!(full().unacceptable(Isolation::BestEffort), None);
    }

    #[test]
    fn required_refuses_each_single_missing_layer() {
        for layer in Layer::ALL {
            let missing = without(&[layer]).unacceptable(Isolation::Required).map(|row| row.layer);
            // What it bounds is bounded without it.
            assert_eq!(missing, (layer != Layer::ControlGroup).then_some(layer));
        }
    }

    #[test]
    fn best_effort_tolerates_all_but_the_floor() {
        for layer in Layer::ALL {
            let missing = without(&[layer]).unacceptable(Isolation::BestEffort).map(|row| row.layer);
            assert_eq!(missing, layer.is_floor().then_some(layer));
        }
    }

    #[test]
    fn best_effort_refuses_open_files() {
        let report = without(&[Layer::MountNamespace, Layer::Landlock]);
        let missing = report.unacceptable(Isolation::BestEffort).map(|row| row.layer);
        assert_eq!(missing, Some(Layer::MountNamespace));
    }

    #[test]
    fn an_empty_report_is_refused() {
        assert!(Report::default().unacceptable(Isolation::BestEffort).is_some());
    }
}
