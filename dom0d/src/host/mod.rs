//! The host of the domains: lists them and their states, pauses, resumes and destroys them ([`Host`]). On top of that,
//! [`liveness`] judges domains and [`fencing`] silences them.
//!
//! [`Host`] has two implementations: [`xen`] over libxenctrl and [`lab`] over the files and the socket of the namespace lab.
//! Nothing else in the daemon knows which one runs.

pub(crate) mod fencing;
pub(crate) mod lab;
pub(crate) mod liveness;
pub(crate) mod xen;

use std::path::PathBuf;

use uuid::Uuid;

use crate::domain::DomainId;

/// A domain as the hypervisor sees it. Frozen inside, stalled or idle do not show here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DomainState {
    /// The number of this life of it.
    pub(crate) domid: u16,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// Paused by a toolstack (or by this daemon).
    pub(crate) paused: bool,
    /// Dead; its remains are being cleared away.
    pub(crate) dying: bool,
    /// It stopped by itself, with this code.
    pub(crate) shutdown: Option<Shutdown>,
}

/// Why a domain stopped by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shutdown {
    /// So that it can be saved or migrated; it may come back.
    Suspend,
    /// Any other code: it does not come back in this life.
    Final,
}

/// Access to the host's hypervisor. Each thread opens its own.
pub(crate) trait Host: Send {
    /// All domains at this moment. Called every millisecond: must not block.
    fn domains(&mut self) -> Result<&[DomainState], HostError>;

    /// Pauses a domain; done if it is paused already.
    fn pause(&mut self, domain: DomainId) -> Result<(), HostError>;

    /// Lets a paused domain run; done if it runs already.
    fn unpause(&mut self, domain: DomainId) -> Result<(), HostError>;

    /// Ends a domain; done if it is gone already.
    fn destroy(&mut self, domain: DomainId) -> Result<(), HostError>;
}

/// Which hypervisor runs the domains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HostKind {
    /// The real one.
    Xen,
    /// The namespace lab in this directory.
    Lab(PathBuf),
}

impl HostKind {
    /// A connection of its own for the calling thread.
    pub(crate) fn open(&self) -> Result<Box<dyn Host>, HostError> {
        Ok(match self {
            Self::Xen => Box::new(xen::Xen::open()?),
            Self::Lab(dir) => Box::new(lab::Lab::open(dir)?),
        })
    }

    /// Its name in the status.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Xen => "xen",
            Self::Lab(_) => "lab",
        }
    }
}

/// Why the hypervisor did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    /// Xen refused, or can't be reached.
    #[error(transparent)]
    Xen(#[from] xen_sys::Error),
    /// The lab's domain list can't be read.
    #[error("can't read the lab's domain list {}: {error}; is the lab up (cargo lab status)?", .path.display())]
    LabList {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The lab's hypervisor socket can't be used.
    #[error("can't {op} domain {domid} through {}: {error}; is the lab up (cargo lab status)?", .path.display())]
    LabSocket {
        /// The request.
        op: &'static str,
        /// The domain.
        domid: u16,
        /// The socket.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The lab refused.
    #[error("the lab refuses to {op} domain {domid}: {error}")]
    LabRefused {
        /// The request.
        op: &'static str,
        /// The domain.
        domid: u16,
        /// Why.
        error: String,
    },
    /// The domain is gone, or its number belongs to another one now.
    #[error("domain {domid} ({uuid}) does not exist any more")]
    Gone {
        /// The number it had.
        domid: u16,
        /// The domain.
        uuid: Uuid,
    },
}
