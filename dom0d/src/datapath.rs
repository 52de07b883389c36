//! The data-path thread: everything that packets pass through.

use crate::command::Command;

/// What other threads tell the data path.
#[derive(Debug)]
pub(crate) enum Message {
    /// An operator's command.
    Command(Command),
}
