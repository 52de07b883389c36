//! Where the logs of a lab go when it is taken down, so that a failure can be read afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::Lab;

/// Names the directory that logs are kept in; set by whoever runs a scenario and wants them.
pub(crate) const KEEP_LOGS: &str = "UNDERSTUDY_LAB_LOGS";

/// Copies a lab's logs when it is dropped.
#[derive(Debug)]
pub(crate) struct Logs {
    from: PathBuf,
    to: Option<PathBuf>,
}

impl Logs {
    pub(crate) fn of(lab: &Lab) -> Self {
        Self { from: lab.directory().join("log"), to: std::env::var_os(KEEP_LOGS).map(PathBuf::from) }
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        if let Some(to) = &self.to
            && let Err(error) = keep(&self.from, to)
        {
            eprintln!("the logs in {} could not be kept in {}: {error}", self.from.display(), to.display());
        }
    }
}

/// Copies a directory of logs.
pub(crate) fn keep(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            keep(&entry.path(), &target)?;
        } else if entry.file_type()?.is_file() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
