//! Writes results and errors: text for people or JSON for programs, safe for terminals and pipes.

use std::io::{self, Write};

use serde::Serialize;
use understudy_api::{Failure, Refusal};

use crate::failed::Failed;

/// The output format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON instead of text.
    pub(crate) json: bool,
}

impl Output {
    /// Writes a result: `value` as JSON, or the text.
    pub(crate) fn result(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failed> {
        if self.json {
            let json = serde_json::to_string_pretty(value).map_err(io::Error::from);
            write(&(json.map_err(Failed::Output)? + "\n"))
        } else {
            write(&printable(&text()))
        }
    }

    /// Writes one of several results on a line of its own.
    pub(crate) fn line(&self, json: &str, text: impl FnOnce() -> String) -> Result<(), Failed> {
        match self.json {
            true => write(&format!("{json}\n")),
            false => write(&printable(&(text() + "\n"))),
        }
    }

    /// Writes why a command was not carried out, to stderr.
    pub(crate) fn error(&self, failed: &Failed) {
        if matches!(failed, Failed::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return;
        }
        let error = Refusal { code: failed.code().to_owned(), message: failed.to_string() };
        let text = match serde_json::to_string(&Failure { error }) {
            Ok(json) if self.json => json,
            _ => printable(&format!("understudy: {failed}")),
        };
        // If stderr is closed, too, nobody can be told.
        let _ = writeln!(io::stderr(), "{text}");
    }

    /// Tells a person about progress, on stderr; programs get nothing.
    pub(crate) fn notice(&self, text: &str) {
        if !self.json {
            let _ = writeln!(io::stderr(), "{}", printable(text));
        }
    }
}

fn write(text: &str) -> Result<(), Failed> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failed::Output)
}

/// Replaces control characters: names come from xenstore and files, and must not control the operator's terminal.
fn printable(text: &str) -> String {
    let harmless = |c: char| match c {
        '\n' => c,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().map(harmless).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_t_control_a_terminal() {
        assert_eq!(printable("a\x1b[2Jb\r\n\u{9b}c\u{7f}"), "a\u{fffd}[2Jb\u{fffd}\n\u{fffd}c\u{fffd}");
    }
}
