//! The file in which the memory outlives reboots.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use serde::Deserialize;

use super::memory::{Memory, VERSION};

/// The file's name in its directory.
const FILE: &str = "memory.json";

/// Why what was remembered can't be believed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unbelievable {
    /// It can't be read.
    #[error("{0}")]
    Unreadable(#[from] io::Error),
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Damaged(#[from] serde_json::Error),
    /// Another dom0d's.
    #[error("it has version {0}, and this dom0d knows {VERSION}")]
    OtherVersion(u64),
}

/// Reads what an earlier dom0d left in a directory; nothing if there is no file.
pub(crate) fn load(directory: &Path) -> Result<Memory, Unbelievable> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u64,
    }
    match fs::read(directory.join(FILE)) {
        Ok(text) => {
            let Versioned { version } = serde_json::from_slice(&text)?;
            if version != u64::from(VERSION) {
                return Err(Unbelievable::OtherVersion(version));
            }
            Ok(serde_json::from_slice(&text)?)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Memory::default()),
        Err(error) => Err(error.into()),
    }
}

/// Keeps what can't be believed for whoever wants to look at it; gives its new name.
pub(crate) fn set_aside(directory: &Path) -> io::Result<PathBuf> {
    let aside = directory.join(format!("{FILE}.unbelievable"));
    fs::rename(directory.join(FILE), &aside)?;
    Ok(aside)
}

/// A thread that writes what it is sent, so that no packet waits for a file system, and tells what came of it. It ends
/// when the sender is dropped.
pub(crate) fn spawn_writer(
    directory: PathBuf,
    tell: impl Fn(Option<String>) + Send + 'static,
) -> io::Result<(mpsc::Sender<Memory>, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel::<Memory>();
    let thread = std::thread::Builder::new().name("memory".to_owned()).spawn(move || {
        while let Ok(first) = receiver.recv() {
            let last = receiver.try_iter().last().unwrap_or(first);
            tell(store(&directory, &last).err().map(|error| {
                format!(
                    "who serves can't be written down in {} ({error}): should dom0 reboot now, another domain may be taken for the OVM; make room there",
                    directory.display()
                )
            }));
        }
    })?;
    Ok((sender, thread))
}

/// In force when this returns, whatever happens to dom0 then.
fn store(directory: &Path, memory: &Memory) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o750).create(directory)?;
    let path = directory.join(FILE);
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec_pretty(memory)?)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use uuid::Uuid;

    use super::*;
    use crate::domain::DomainRef;

    #[test]
    fn what_is_written_reads_back_and_all_else_is_not_believed() {
        let directory = std::env::temp_dir().join(format!("dom0d-memory-{}", std::process::id()));
        assert_eq!(load(&directory).unwrap(), Memory::default());
        let mut memory = Memory::default();
        let service = memory.services.entry("redis".to_owned()).or_default();
        service.begin(&DomainRef { name: "b".to_owned(), uuid: Uuid::from_u128(2), domid: 1 });
        service.see(Uuid::from_u128(2));
        let (told, tells) = mpsc::channel();
        let (sender, thread) = spawn_writer(directory.clone(), move |said| told.send(said).unwrap()).unwrap();
        sender.send(memory.clone()).unwrap();
        assert_eq!(tells.recv().unwrap(), None);
        assert_eq!(load(&directory).unwrap(), memory);
        let path = directory.join(FILE);
        let whole = fs::read_to_string(&path).unwrap();
        for (text, said) in [
            (whole.replace("\"version\": 1", "\"version\": 7"), "version 7"),
            (whole.replace("\"served\"", "\"sersed\""), "damaged"),
            (whole.replace("\"generation\"", "\"gene\""), "damaged"),
            (whole[..whole.len() / 2].to_owned(), "damaged"),
            (String::new(), "damaged"),
        ] {
            fs::write(&path, text).unwrap();
            let error = load(&directory).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        set_aside(&directory).unwrap();
        assert_eq!(load(&directory).unwrap(), Memory::default());
        // What can't be written down is said.
        fs::remove_dir_all(&directory).unwrap();
        fs::write(&directory, "").unwrap();
        sender.send(memory).unwrap();
        assert!(tells.recv().unwrap().unwrap().contains("can't be written down"));
        drop(sender);
        thread.join().unwrap();
        fs::remove_file(&directory).unwrap();
    }
}
