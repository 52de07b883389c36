//! The real hypervisor, through libxenctrl.

use xen_sys::{DomainInfo, ShutdownReason, Xenctrl};

use super::{DomainState, Host, HostError, Shutdown};
use crate::domain::DomainId;

/// An open libxenctrl and the last list of domains.
pub(crate) struct Xen {
    control: Xenctrl,
    domains: Vec<DomainState>,
}

impl Xen {
    /// Opens the library of the running hypervisor's version.
    pub(crate) fn open() -> Result<Self, HostError> {
        Ok(Self { control: Xenctrl::open()?, domains: Vec::new() })
    }

    fn find(&self, domain: DomainId) -> Result<Option<DomainInfo>, HostError> {
        let found = self.control.domain(domain.domid)?;
        Ok(found.filter(|found| found.uuid == domain.uuid))
    }

    fn existing(&self, domain: DomainId) -> Result<DomainInfo, HostError> {
        self.find(domain)?.ok_or(HostError::Gone { domid: domain.domid, uuid: domain.uuid })
    }
}

impl Host for Xen {
    fn domains(&mut self) -> Result<&[DomainState], HostError> {
        self.domains.clear();
        let listed = self.control.domains()?;
        self.domains.extend(listed.iter().map(state));
        Ok(&self.domains)
    }

    fn pause(&mut self, domain: DomainId) -> Result<(), HostError> {
        // Xen counts pauses: one of ours on top of another would outlive a single `xl unpause`.
        if !self.existing(domain)?.paused {
            self.control.pause(domain.domid, domain.uuid)?;
        }
        Ok(())
    }

    fn unpause(&mut self, domain: DomainId) -> Result<(), HostError> {
        if self.existing(domain)?.paused {
            self.control.unpause(domain.domid, domain.uuid)?;
        }
        Ok(())
    }

    fn destroy(&mut self, domain: DomainId) -> Result<(), HostError> {
        match self.find(domain)? {
            Some(found) if !found.dying => Ok(self.control.destroy(domain.domid, domain.uuid)?),
            _ => Ok(()),
        }
    }
}

fn state(info: &DomainInfo) -> DomainState {
    DomainState {
        domid: info.domid,
        uuid: info.uuid,
        paused: info.paused,
        dying: info.dying,
        shutdown: info.shutdown.map(|reason| match reason {
            ShutdownReason::Suspend => Shutdown::Suspend,
            _ => Shutdown::Final,
        }),
    }
}
