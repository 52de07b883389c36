//! The namespace lab's hypervisor: a file that lists the domains, a socket that takes requests.
//!
//! The file is replaced as a whole at each change and seen only by polling, as domain info is on Xen.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{DomainState, Host, HostError, Shutdown};
use crate::domain::DomainId;

/// Longest wait for the lab's answer to one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The lab's directory and what its list said last.
pub(crate) struct Lab {
    list: PathBuf,
    socket: PathBuf,
    seen: Option<Version>,
    domains: Vec<DomainState>,
}

/// Tells one version of the list from the next: a replaced file has another inode or another time.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    seconds: i64,
    nanoseconds: i64,
    size: u64,
}

#[derive(Deserialize)]
struct List {
    domains: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    domid: u16,
    uuid: Uuid,
    paused: bool,
    dying: bool,
    shutdown: Option<Code>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Code {
    Poweroff,
    Reboot,
    Suspend,
    Crash,
    Watchdog,
}

#[derive(Serialize)]
struct Request {
    op: &'static str,
    domid: u16,
}

#[derive(Deserialize)]
struct Answer {
    ok: bool,
    error: Option<String>,
}

impl Lab {
    /// The lab in `dir`, which must be up.
    pub(crate) fn open(dir: &Path) -> Result<Self, HostError> {
        let mut lab = Self {
            list: dir.join("domains.json"),
            socket: dir.join("hypervisor.sock"),
            seen: None,
            domains: Vec::new(),
        };
        lab.domains()?;
        Ok(lab)
    }

    fn refresh(&mut self) -> io::Result<()> {
        let stat = fs::metadata(&self.list)?;
        let version = Version {
            inode: stat.ino(),
            seconds: stat.mtime(),
            nanoseconds: stat.mtime_nsec(),
            size: stat.size(),
        };
        if self.seen == Some(version) {
            return Ok(());
        }
        let list: List = serde_json::from_slice(&fs::read(&self.list)?)?;
        self.domains.clear();
        self.domains.extend(list.domains.iter().map(state));
        // If it was replaced between the two looks, the next poll finds another version.
        self.seen = Some(version);
        Ok(())
    }

    fn find(&mut self, domain: DomainId) -> Result<Option<&DomainState>, HostError> {
        let domains = self.domains()?;
        Ok(domains.iter().find(|found| found.domid == domain.domid && found.uuid == domain.uuid))
    }

    fn request(&mut self, op: &'static str, domain: DomainId) -> Result<(), HostError> {
        let domid = domain.domid;
        let answer = ask(&self.socket, &Request { op, domid }).map_err(|error| HostError::LabSocket {
            op,
            domid,
            path: self.socket.clone(),
            error,
        })?;
        if answer.ok {
            return Ok(());
        }
        Err(HostError::LabRefused {
            op,
            domid,
            error: answer.error.unwrap_or_else(|| "no reason given".to_owned()),
        })
    }
}

fn ask(socket: &Path, request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    stream.set_write_timeout(Some(REQUEST_TIMEOUT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

fn state(listed: &Listed) -> DomainState {
    DomainState {
        domid: listed.domid,
        uuid: listed.uuid,
        paused: listed.paused,
        dying: listed.dying,
        shutdown: listed.shutdown.as_ref().map(|code| match code {
            Code::Suspend => Shutdown::Suspend,
            Code::Poweroff | Code::Reboot | Code::Crash | Code::Watchdog => Shutdown::Final,
        }),
    }
}

impl Host for Lab {
    fn domains(&mut self) -> Result<&[DomainState], HostError> {
        match self.refresh() {
            Ok(()) => Ok(&self.domains),
            Err(error) => Err(HostError::LabList { path: self.list.clone(), error }),
        }
    }

    fn pause(&mut self, domain: DomainId) -> Result<(), HostError> {
        match self.find(domain)? {
            Some(found) if found.paused => Ok(()),
            Some(_) => self.request("pause", domain),
            None => Err(gone(domain)),
        }
    }

    fn unpause(&mut self, domain: DomainId) -> Result<(), HostError> {
        match self.find(domain)? {
            Some(found) if !found.paused => Ok(()),
            Some(_) => self.request("unpause", domain),
            None => Err(gone(domain)),
        }
    }

    fn destroy(&mut self, domain: DomainId) -> Result<(), HostError> {
        match self.find(domain)? {
            Some(_) => self.request("destroy", domain),
            None => Ok(()),
        }
    }
}

fn gone(domain: DomainId) -> HostError {
    HostError::Gone { domid: domain.domid, uuid: domain.uuid }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn replace(dir: &Path, text: &str) {
        let new = dir.join("new");
        fs::write(&new, text).expect("a temporary directory is writable");
        fs::rename(&new, dir.join("domains.json")).expect("rename within a directory");
    }

    #[test]
    fn a_replaced_list_is_seen_and_a_broken_one_is_an_error() {
        let dir = std::env::temp_dir().join(format!("dom0d-lab-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        replace(
            &dir,
            r#"{"domains":[{"domid":1,"uuid":"2f8b5f0e-3c53-4d0a-9d8e-1f2f3a4b5c6d","paused":false,"dying":false,"shutdown":null,"cpu_time_ns":0}]}"#,
        );
        let mut lab = Lab::open(&dir).unwrap();
        assert!(!lab.domains().unwrap()[0].paused);
        replace(
            &dir,
            r#"{"domains":[{"domid":1,"uuid":"2f8b5f0e-3c53-4d0a-9d8e-1f2f3a4b5c6d","paused":true,"dying":false,"shutdown":"crash","cpu_time_ns":0}]}"#,
        );
        let domain = lab.domains().unwrap()[0].clone();
        assert!(domain.paused);
        assert_eq!(domain.shutdown, Some(Shutdown::Final));
        replace(&dir, "{");
        assert!(lab.domains().is_err());
        replace(&dir, r#"{"domains":[]}"#);
        assert!(lab.domains().unwrap().is_empty());
        fs::remove_dir_all(&dir).unwrap();
        assert!(lab.domains().unwrap_err().to_string().contains("is the lab up"));
    }
}
