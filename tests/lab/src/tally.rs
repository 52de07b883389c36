//! How scenarios ended, wherever they were played: what is printed, counted, and kept.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::supervise::Ending;

/// Lines of a failed scenario's output that are shown.
const SHOWN: usize = 30;

/// What has been played so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) interrupted: bool,
}

impl Tally {
    /// Counts and reports one scenario; whether further ones are to be played.
    pub(crate) fn count(&mut self, name: &str, played: Result<Played>, keep_going: bool) -> bool {
        match played {
            Ok(Played { ending: Ending::Passed, took, .. }) => {
                self.passed += 1;
                println!("PASS {name} ({:.1} s)", took.as_secs_f64());
                true
            }
            Ok(Played { ending: Ending::Interrupted, .. }) => {
                self.interrupted = true;
                false
            }
            Ok(Played { ending, took, logs, tail }) => {
                self.failed += 1;
                let how = if ending == Ending::TimedOut { ", its time was over" } else { "" };
                println!("FAIL {name} ({:.1} s{how})", took.as_secs_f64());
                println!("{tail}\n  logs: {}", logs.display());
                keep_going
            }
            Err(error) => {
                self.failed += 1;
                println!("FAIL {name}: {error:#}");
                keep_going
            }
        }
    }

    /// Says how `total` scenarios ended; its last line is the sum.
    pub(crate) fn conclude(self, total: usize) -> ExitCode {
        let played = self.passed + self.failed;
        if played < total {
            println!(
                "{} scenarios were not played{}",
                total - played,
                if self.interrupted {
                    ": interrupted"
                } else {
                    " after the first failure (--keep-going plays all)"
                }
            );
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        match (self.interrupted, self.failed) {
            (true, _) => ExitCode::from(130),
            (false, 0) => ExitCode::SUCCESS,
            (false, _) => ExitCode::FAILURE,
        }
    }
}

/// One scenario's end.
#[derive(Debug)]
pub(crate) struct Played {
    ending: Ending,
    took: Duration,
    logs: PathBuf,
    tail: String,
}

impl Played {
    /// It ended, and did not pass.
    pub(crate) fn has_failed(&self) -> bool {
        matches!(self.ending, Ending::Failed | Ending::TimedOut)
    }

    /// Plays one that leaves its logs in the directory and its output in the file that it is given,
    /// which are kept unless it passes.
    pub(crate) fn of(
        name: &str,
        directory: &Path,
        play: impl FnOnce(&Path, &Path) -> Result<Ending>,
    ) -> Result<Self> {
        let logs = directory.join(name.replace('/', "."));
        fs::create_dir_all(&logs)?;
        let output = logs.join("output.log");
        let begun = Instant::now();
        let ending = play(&logs, &output)?;
        let took = begun.elapsed();
        let said = fs::read_to_string(&output).unwrap_or_default();
        let lines: Vec<_> = said.lines().collect();
        let tail = lines[lines.len().saturating_sub(SHOWN)..]
            .iter()
            .map(|line| format!("  | {line}"))
            .collect::<Vec<_>>()
            .join("\n");
        if ending == Ending::Passed {
            fs::remove_dir_all(&logs)?;
        }
        Ok(Self { ending, took, logs, tail })
    }
}

/// Prints names, as long as somebody reads them.
pub(crate) fn list<'a>(names: impl Iterator<Item = &'a str>) -> Result<ExitCode> {
    let text: String = names.map(|name| format!("{name}\n")).collect();
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// `target/lab-test/<name>`, emptied.
pub(crate) fn log_directory(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(2).context("this program is nowhere")?.join("lab-test").join(name);
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    fs::create_dir_all(&target)?;
    Ok(target)
}
