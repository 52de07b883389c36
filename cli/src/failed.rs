//! Why a command was not carried out, and the exit code that says so.

use std::fmt;
use std::io;
use std::process::ExitCode;

use understudy_api::Refusal;

/// Why a command was not carried out.
#[derive(Debug)]
pub(crate) enum Failed {
    /// dom0d or a check refuses it.
    Refused(Refusal),
    /// The command line is ambiguous.
    Usage(String),
    /// dom0d does not answer.
    Unreachable(String),
    /// The result can't be written.
    Output(io::Error),
}

impl Failed {
    pub(crate) fn refused(code: &str, message: impl Into<String>) -> Self {
        Self::Refused(Refusal { code: code.to_owned(), message: message.into() })
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Refused(_) => ExitCode::from(1),
            Self::Usage(_) => ExitCode::from(2),
            Self::Unreachable(_) => ExitCode::from(3),
            // The reader has read enough, as `head` does.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Self::Output(_) => ExitCode::from(1),
        }
    }

    /// A stable name, for programs.
    pub(crate) fn code(&self) -> &str {
        match self {
            Self::Refused(refusal) => &refusal.code,
            Self::Usage(_) => "usage",
            Self::Unreachable(_) => "unreachable",
            Self::Output(_) => "output",
        }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => f.write_str(&refusal.message),
            Self::Usage(message) | Self::Unreachable(message) => f.write_str(message),
            Self::Output(error) => write!(f, "can't write the result: {error}"),
        }
    }
}
