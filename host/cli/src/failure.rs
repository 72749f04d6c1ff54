//! [`Failure`]: how a command ends when it does not end well.

use std::io::Write;
use std::process::ExitCode;

use portcullis_proxy::{OperatorsRefused, StartError};

/// What went wrong, by whose turn it is.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The user's: the command line or a file. Nothing was started.
    Configuration(String),
    /// The machine's, or ours.
    Running(String),
    /// Everything was said already.
    Reported,
    /// The same, of what is the user's to put right before anything can be started.
    ReportedConfiguration,
}

impl Failure {
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Failure::Configuration(_) | Failure::ReportedConfiguration => ExitCode::from(2),
            Failure::Running(_) | Failure::Reported => ExitCode::from(1),
        }
    }

    /// Says it on standard error.
    pub(crate) fn report(&self) {
        let (Failure::Configuration(message) | Failure::Running(message)) = self else { return };
        let message = message.trim_end();
        let prefix = if message.starts_with("error") { "" } else { "error: " };
        // Without standard error there is nobody to tell.
        let _ = writeln!(std::io::stderr().lock(), "{prefix}{message}");
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Configuration(message) | Failure::Running(message) => f.write_str(message.trim_end()),
            Failure::Reported | Failure::ReportedConfiguration => Ok(()),
        }
    }
}

impl From<OperatorsRefused> for Failure {
    fn from(refused: OperatorsRefused) -> Failure {
        match refused {
            OperatorsRefused::Policy(message) => Failure::Configuration(message),
            OperatorsRefused::Machine(message) => Failure::Running(message),
        }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Failure {
        let message = error.to_string();
        match error {
            StartError::Load(_)
            | StartError::Filter(_)
            | StartError::NeedsRestart(_)
            | StartError::Operators(OperatorsRefused::Policy(_)) => Failure::Configuration(message),
            _ => Failure::Running(message),
        }
    }
}
