//! `portcullis doctor`: what confines operators on this machine, and what is missing.

use std::path::PathBuf;

use clap::ValueEnum;
use portcullis_operators::engine::Choice;
use portcullis_operators::engine::runner::Runner;
use portcullis_operators::jail::{Isolation, LayerState};
use portcullis_operators::{Doctor, Settings};
use serde_json::json;

use crate::failure::Failure;
use crate::{operators, print};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Look with the settings of this policy: its `operator_host`, and the strictest `isolation` that one of its operators
    /// asks for.
    #[arg(short, long, value_name = "POLICY")]
    config: Option<PathBuf>,
    /// The isolation to judge by. Default: the policy's, else `best-effort`.
    #[arg(long, value_name = "LEVEL")]
    isolation: Option<Level>,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Level {
    /// Operators start with the layers that there are, but not without the indispensable ones.
    BestEffort,
    /// Every layer must hold.
    Required,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut settings = match &arguments.config {
        None => Settings::default(),
        Some(path) => {
            let policy =
                portcullis_config::load(path).map_err(|mistakes| Failure::Configuration(mistakes.to_string()))?;
            let asks = |operator: &portcullis_config::Operator| {
                operator.isolation == portcullis_config::Isolation::Required
                    && operator.belongs_to(policy.pool.as_deref())
            };
            let mut settings = operators::settings(&policy, operators::Purpose::Check);
            if policy.operators.iter().any(asks) {
                settings.isolation = Isolation::Required;
            }
            settings
        }
    };
    match arguments.isolation {
        Some(Level::Required) => settings.isolation = Isolation::Required,
        Some(Level::BestEffort) => settings.isolation = Isolation::BestEffort,
        None => {}
    }
    let running = |error: &dyn std::fmt::Display| Failure::Running(error.to_string());
    let engine = portcullis_operators::engine::locate(settings.engine).map_err(|error| running(&error))?;
    let mut doctor = Doctor::examine(&settings, &*engine).map_err(|error| running(&error))?;
    if settings.engine == Choice::Any
        && let Err(why) = Runner::locate()
    {
        doctor.notes.insert(0, format!("operators run on Deno: {why}"));
    }
    if arguments.json {
        print(&format!("{:#}\n", as_json(&doctor)))?;
    } else {
        print(&doctor.to_string())?;
    }
    if doctor.is_well() { Ok(()) } else { Err(Failure::Reported) }
}

/// Flat, and with the meaning of what is missing, so that nobody has to look it up.
fn as_json(doctor: &Doctor) -> serde_json::Value {
    let layers = doctor.layers.iter().map(|row| {
        let (state, reason) = match &row.state {
            LayerState::Active => ("active", None),
            LayerState::Partial { reason } => ("partial", Some(reason)),
            LayerState::Missing { reason } => ("missing", Some(reason)),
        };
        let means = (state == "missing").then(|| row.layer.when_missing());
        json!({ "layer": row.layer, "state": state, "reason": reason, "means": means })
    });
    json!({
        "operators_start": doctor.is_well(),
        "refused": doctor.refused,
        "isolation": doctor.isolation,
        "engine": doctor.engine,
        "program": doctor.program,
        "layers": layers.collect::<Vec<_>>(),
        "setup_microseconds": doctor.setup.total_microseconds(),
        "setup_ahead_microseconds": doctor.setup.ahead_microseconds,
        "start_microseconds": doctor.start_microseconds,
        "notes": doctor.notes,
    })
}
