//! What confines operators on this machine, found out by confining one process and asking from inside.

use std::fmt;
use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::Settings;
use crate::engine::{Class, Engine, READY};
use crate::jail::{Bounds, Confined, Groups, Isolation, LayerReport, LayerState, Report, Rlimits, Setup, Spec};
use crate::manager::{Instance, StartError};
use crate::process;

const DEADLINE: Duration = Duration::from_secs(20);
/// What an engine may print before it listens.
const OUTPUT_BYTES_MAX: usize = 64 << 10;

/// The findings, for `portcullis doctor`.
#[derive(Clone, Debug, Serialize)]
pub struct Doctor {
    /// Which engine, and its version.
    pub engine: String,
    /// The file that is executed.
    pub program: PathBuf,
    /// Why operators do not start with the isolation that was asked for; none when they do.
    pub refused: Option<String>,
    /// Layer by layer; empty when nothing could be started.
    pub layers: Vec<LayerReport>,
    /// How long the launcher took for all of them.
    pub setup: Setup,
    /// From the engine's start until it listened, in microseconds; 0 when it did not.
    pub start_microseconds: u64,
    /// Facts about the machine that matter between operators, and what follows.
    pub notes: Vec<String>,
    /// Which level of isolation was asked for.
    pub isolation: Isolation,
}

impl Doctor {
    /// Confines one process with the given engine and looks.
    ///
    /// # Errors
    /// [`StartError`] when not even the attempt is possible.
    pub fn examine(settings: &Settings, engine: &dyn Engine) -> Result<Self, StartError> {
        let run = |source| StartError::Run { path: settings.run_folder.clone(), source };
        let instance = Instance::claim(&settings.run_folder).map_err(run)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| StartError::Setup { what: "a runtime", source })?;
        let class = Class {
            heap_bytes: 64 << 20,
            memory_bytes: 128 << 20,
            interpreter_only: false,
            code_generation: false,
            private_bytes: 4 << 20,
            required: false,
        };
        let start = engine.start(&class);
        let bounds = Bounds { memory_bytes: 1 << 30, threads: start.threads, cpus: 2 };
        let group = Groups::prepare().and_then(|groups| {
            let group = groups.create("doctor", bounds).map_err(|error| error.to_string())?;
            Ok((groups, group))
        });
        let spec = Spec {
            // Asked for everything: the report says what is missing, the caller's level what that means.
            isolation: Isolation::BestEffort,
            host_pid: i32::try_from(std::process::id()).unwrap_or(0),
            uid: settings.uid_first + instance.number * crate::manager::UIDS,
            staging: instance.folder.join("root"),
            private_fallback: instance.folder.join("doctor"),
            binds: start.binds,
            files: start.files,
            private_bytes: class.private_bytes,
            private_files: 64,
            rlimits: Rlimits {
                data_bytes: start.data_bytes + class.memory_bytes,
                files: start.files_open,
                threads: start.threads,
            },
            argv: start.argv,
            env: start.env,
            group: group
                .as_ref()
                .map(|(groups, group)| (group.path().to_owned(), groups.state()))
                .map_err(Clone::clone),
            may_restrict_itself: start.abilities.restricts_itself,
            without: Vec::new(),
        };
        let launched = runtime.block_on(settings.launcher.launch(&spec, DEADLINE));
        let mut doctor = Self {
            engine: engine.name(),
            program: engine.program().to_owned(),
            refused: None,
            layers: Vec::new(),
            setup: Setup::default(),
            start_microseconds: 0,
            notes: machine_notes(engine),
            isolation: settings.isolation,
        };
        match launched {
            Ok(confined) => {
                doctor.setup = confined.setup;
                doctor.refused = verdict(&confined.report, settings.isolation);
                doctor.layers = confined.report.rows().collect();
                let started = Instant::now();
                match runtime.block_on(starts(confined)) {
                    Ok(()) => doctor.start_microseconds = u64::try_from(started.elapsed().as_micros()).unwrap_or(0),
                    Err(reason) => {
                        let unusable = format!("the engine does not start: {reason}\n  hint: {}", engine.remedy());
                        doctor.refused.get_or_insert(unusable);
                    }
                }
            }
            Err(error) => doctor.refused = Some(error.to_string()),
        }
        instance.clean();
        Ok(doctor)
    }

    /// Whether operators would start with the level of isolation that was asked for.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.refused.is_none()
    }
}

/// Waits until the engine listens. Ends it in any case, as its handle goes.
async fn starts(confined: Confined) -> Result<(), String> {
    let (_handle, private, output, _) = confined.into_parts();
    // Its services: it wants to connect, and asks for nothing yet.
    let _listener = process::listen(private.as_fd()).map_err(|error| error.to_string())?;
    let mut output = pipe::Receiver::from_owned_fd(output).map_err(|error| error.to_string())?;
    let mut said = Vec::new();
    let ready = async {
        while output.read_buf(&mut said).await.is_ok_and(|read| read > 0) && said.len() < OUTPUT_BYTES_MAX {
            if said.windows(READY.len()).any(|found| found == READY.as_bytes()) {
                return true;
            }
        }
        false
    };
    match tokio::time::timeout(DEADLINE, ready).await {
        Ok(true) => Ok(()),
        Ok(false) => {
            let said = String::from_utf8_lossy(&said);
            Err(said.trim().lines().map(crate::logs::printable).collect::<Vec<_>>().join("\n"))
        }
        Err(_) => Err(format!("it took longer than {DEADLINE:?}")),
    }
}

fn verdict(report: &Report, isolation: Isolation) -> Option<String> {
    let missing = report.unacceptable(isolation)?;
    Some(format!("isolation layer `{}` is missing: {}", missing.layer, missing.reason()))
}

impl fmt::Display for Doctor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.isolation {
            Isolation::Required => "required",
            Isolation::BestEffort => "best_effort",
        };
        match &self.refused {
            None => writeln!(formatter, "operators: start with `isolation: {level}`")?,
            Some(reason) => writeln!(formatter, "operators: do NOT start with `isolation: {level}`: {reason}")?,
        }
        writeln!(formatter, "  engine: {} ({})", self.engine, self.program.display())?;
        for row in &self.layers {
            match &row.state {
                LayerState::Active => writeln!(formatter, "  {:<18} active", row.layer)?,
                LayerState::Partial { reason } => writeln!(formatter, "  {:<18} in part: {reason}", row.layer)?,
                LayerState::Missing { reason } => {
                    writeln!(formatter, "  {:<18} MISSING ({reason}): {}", row.layer, row.layer.when_missing())?;
                }
            }
        }
        let setup = self.setup.total_microseconds();
        if setup > 0 {
            write!(formatter, "  set up in {}.{:03} ms", setup / 1000, setup % 1000)?;
            match self.start_microseconds {
                0 => writeln!(formatter)?,
                start => writeln!(formatter, ", and the engine in {}.{:03} ms more", start / 1000, start % 1000)?,
            }
        }
        for note in &self.notes {
            writeln!(formatter, "  note: {note}")?;
        }
        Ok(())
    }
}

fn machine_notes(engine: &dyn Engine) -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let mut notes: Vec<String> = engine.remark().into_iter().collect();
    let release = read("/proc/sys/kernel/osrelease");
    notes.push(format!("kernel {release}"));
    if read("/sys/devices/system/cpu/smt/active") == "1" {
        notes.push(
            "two hardware threads share a core: give operators that must not share one all threads of their cores in \
             `placement.cpus`"
                .to_owned(),
        );
    }
    if read("/sys/kernel/mm/ksm/run") == "1" {
        notes.push(
            "the kernel merges equal pages (KSM), which lets processes guess each other's memory: turn it off"
                .to_owned(),
        );
    }
    notes
}
