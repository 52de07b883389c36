//! An open handle on the hypervisor: lists, pauses, unpauses and destroys domains.

use std::ffi::c_int;
use std::io;
use std::path::Path;
use std::ptr::{self, NonNull};

use uuid::Uuid;

use crate::Error;
use crate::bindings as xc;
use crate::domain::{DomainInfo, VcpuInfo};
use crate::host::{Version, running_version};
use crate::library::{SILENT, libxenctrl};

/// Domains asked for in one call while listing: the buffer's size, not a limit. One page of them, which is
/// what libxenctrl keeps for the next call; more would be mapped and unmapped at every poll.
const BATCH: usize = 4_096 / size_of::<xc::xc_domaininfo_t>();

// Linux's errno values that Xen answers with.
const EPERM: i32 = 1;
const ESRCH: i32 = 3;
const EACCES: i32 = 13;

/// An open handle on the hypervisor.
///
/// `Send` but not `Sync`: libxenctrl writes its last error into the handle without a lock. A
/// handle is two file descriptors and some pages, so open one per thread. A handle must not be
/// used in a child after `fork`.
pub struct Xenctrl {
    library: &'static xc::Libxenctrl,
    handle: NonNull<xc::xc_interface>,
}

// SAFETY: libxenctrl binds a handle to no thread; what it keeps per thread (a buffer for error
// texts) is not in the handle. Not `Sync`, so no two threads use one handle at a time.
unsafe impl Send for Xenctrl {}

impl Xenctrl {
    /// Opens the hypervisor this machine runs under, and makes sure that it answers.
    ///
    /// # Errors
    /// [`Error::NoXen`], [`Error::NotControlDomain`], [`Error::NoPrivilege`],
    /// [`Error::NoPrivcmd`], [`Error::LibraryMissing`], [`Error::VersionMismatch`],
    /// [`Error::InterfaceMismatch`]: each says what to do.
    pub fn open() -> Result<Self, Error> {
        // Unknown: most likely the version of the build. Asked again below, of Xen itself.
        let expected = running_version(Path::new("/"))?.unwrap_or(Version::HEADERS);
        let library = libxenctrl(expected.check()?)?;
        let xen = Self::open_handle(library)?;
        xen.running_version()?.check()?;
        // Neither opening nor the version needs any privilege in Xen; this does.
        match xen.domain(0) {
            Ok(_) => Ok(xen),
            Err(Error::Domain { source, .. }) => Err(match source.raw_os_error() {
                Some(EPERM) => Error::NotControlDomain { source },
                Some(EACCES) => Error::InterfaceMismatch { version: Version::HEADERS, source },
                _ => Error::Call { operation: "a first question to the hypervisor", source },
            }),
            Err(other) => Err(other),
        }
    }

    fn open_handle(library: &'static xc::Libxenctrl) -> Result<Self, Error> {
        let logger = (&raw const SILENT).cast_mut();
        // SAFETY: the logger lives forever; libxenctrl only calls its three functions and never
        // writes to it or frees it.
        let handle = unsafe { library.xc_interface_open(logger, logger, 0) };
        match NonNull::new(handle) {
            Some(handle) => Ok(Self { library, handle }),
            None => {
                let source = io::Error::last_os_error();
                Err(match source.raw_os_error() {
                    Some(EPERM | EACCES) => Error::NoPrivilege { source },
                    _ => Error::NoPrivcmd { source },
                })
            }
        }
    }

    fn running_version(&self) -> Result<Version, Error> {
        // SAFETY: the handle is open; XENVER_version takes no argument.
        let answer = unsafe {
            self.library.xc_version(self.handle.as_ptr(), xc::XENVER_version as c_int, ptr::null_mut())
        };
        u32::try_from(answer).map(Version::from_xenver).map_err(|_| Error::Call {
            operation: "asking for Xen's version",
            source: io::Error::last_os_error(),
        })
    }

    /// All domains, dom0 included, by ascending domid. Domains that come or go meanwhile may or
    /// may not be in it.
    ///
    /// # Errors
    /// [`Error::Call`] if the hypervisor refuses.
    pub fn domains(&self) -> Result<Vec<DomainInfo>, Error> {
        let mut buffer = vec![xc::xc_domaininfo_t::default(); BATCH];
        let mut domains: Vec<DomainInfo> = Vec::new();
        let mut first = 0;
        loop {
            let batch = self
                .list(first, &mut buffer)
                .map_err(|source| Error::Call { operation: "listing the domains", source })?;
            domains.extend(batch.iter().map(DomainInfo::decode));
            match batch.last() {
                // Xen lists by ascending domid, and all domids are below DOMID_FIRST_RESERVED.
                Some(last) if batch.len() == BATCH && last.domain >= first => {
                    first = last.domain.saturating_add(1);
                }
                _ => return Ok(domains),
            }
        }
    }

    /// The domain that has this domid now, if any. Compare its UUID with the one you mean.
    ///
    /// # Errors
    /// [`Error::Domain`] if the hypervisor refuses.
    pub fn domain(&self, domid: u16) -> Result<Option<DomainInfo>, Error> {
        let mut buffer = [xc::xc_domaininfo_t::default()];
        let found = self.list(domid, &mut buffer).map_err(|source| Error::Domain {
            operation: "reading the state",
            domid,
            source,
        })?;
        Ok(exactly(domid, found))
    }

    /// The vCPUs of a domain, `None` if there is no such domain. vCPUs that the domain has not
    /// got (yet) are left out; so are those not yet read when the domain ends meanwhile.
    ///
    /// # Errors
    /// [`Error::Domain`] if the hypervisor refuses.
    pub fn vcpus(&self, domid: u16) -> Result<Option<Vec<VcpuInfo>>, Error> {
        let Some(domain) = self.domain(domid)? else {
            return Ok(None);
        };
        let mut vcpus = Vec::new();
        for vcpu in domain.max_vcpu_id.map_or(0..0, |max| 0..max + 1) {
            let mut raw = xc::xc_vcpuinfo_t::default();
            // SAFETY: the handle is open, `raw` is a struct of the library's release and lives
            // across the call.
            let result = unsafe {
                self.library.xc_vcpu_getinfo(self.handle.as_ptr(), domid.into(), vcpu, &raw mut raw)
            };
            if result == 0 {
                vcpus.push(VcpuInfo::decode(&raw));
                continue;
            }
            let source = io::Error::last_os_error();
            if source.raw_os_error() != Some(ESRCH) {
                return Err(Error::Domain { operation: "reading the vCPUs", domid, source });
            }
        }
        Ok(Some(vcpus))
    }

    /// Pauses a domain. When this returns, none of its vCPUs runs; what it had already put into
    /// its vif's ring can still come out.
    ///
    /// Xen counts pauses (up to 255): two need two unpauses, so look at [`DomainInfo::paused`]
    /// before a retry. dom0 can't pause itself.
    ///
    /// # The race that remains
    /// The UUID is read right before the call, but Xen offers no call by UUID: the domain could
    /// end and another be created with its domid between the two. Xen hands out domids in
    /// ascending order until it wraps after 32 thousand, and libxl does not reuse one within 60
    /// seconds, so this takes a toolstack that chooses domids by hand, within microseconds.
    ///
    /// # Errors
    /// [`Error::NoSuchDomain`], [`Error::DomidReused`] (nothing was done), [`Error::Domain`].
    pub fn pause(&self, domid: u16, uuid: Uuid) -> Result<(), Error> {
        // SAFETY: `act` passes an open handle.
        self.act("pause", domid, uuid, |library, handle, domid| unsafe {
            library.xc_domain_pause(handle, domid)
        })
    }

    /// Takes back one pause; the domain runs on once none is left. A domain that is not paused
    /// gives [`Error::Domain`] with `EINVAL`. The race of [`pause`](Self::pause) applies.
    ///
    /// # Errors
    /// As for [`pause`](Self::pause).
    pub fn unpause(&self, domid: u16, uuid: Uuid) -> Result<(), Error> {
        // SAFETY: `act` passes an open handle.
        self.act("unpause", domid, uuid, |library, handle, domid| unsafe {
            library.xc_domain_unpause(handle, domid)
        })
    }

    /// Destroys a domain at once, without telling the guest. Its vCPUs stop first; returns when
    /// its memory is given back, which takes the longer the more it had. It leaves the list once
    /// nobody maps its pages any more. Its backends and xenstore nodes are the toolstack's, which
    /// notices the death and removes them (xl: the process that waits for the domain; a domain
    /// created with `xl create -e` has none). The race of [`pause`](Self::pause) applies.
    ///
    /// # Errors
    /// As for [`pause`](Self::pause).
    pub fn destroy(&self, domid: u16, uuid: Uuid) -> Result<(), Error> {
        // SAFETY: `act` passes an open handle.
        self.act("destroy", domid, uuid, |library, handle, domid| unsafe {
            library.xc_domain_destroy(handle, domid)
        })
    }

    /// Makes `call` on the domid if the domain that has it now is the one meant.
    fn act(
        &self,
        operation: &'static str,
        domid: u16,
        meant: Uuid,
        call: impl FnOnce(&xc::Libxenctrl, *mut xc::xc_interface, u32) -> c_int,
    ) -> Result<(), Error> {
        let now = self.domain(domid)?.map(|domain| domain.uuid);
        same_domain(operation, domid, meant, now)?;
        if call(self.library, self.handle.as_ptr(), domid.into()) == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        Err(match source.raw_os_error() {
            Some(ESRCH) => Error::NoSuchDomain { operation, domid },
            _ => Error::Domain { operation, domid, source },
        })
    }

    /// The domains from `first` on, as many as fit: the one call that every release has.
    fn list<'b>(
        &self,
        first: u16,
        buffer: &'b mut [xc::xc_domaininfo_t],
    ) -> io::Result<&'b [xc::xc_domaininfo_t]> {
        // Callers' buffers are far below u32::MAX entries.
        let room = buffer.len() as u32;
        // SAFETY: the handle is open; `buffer` has room for `room` structs of the library's
        // release and lives across the call.
        let written = unsafe {
            self.library.xc_domain_getinfolist(self.handle.as_ptr(), first.into(), room, buffer.as_mut_ptr())
        };
        match usize::try_from(written) {
            Ok(written) => Ok(&buffer[..written.min(buffer.len())]),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Xenctrl {
    fn drop(&mut self) {
        // SAFETY: the handle is open and not used after this. The logger outlives it. A failure
        // to close leaves it closed all the same, says xenctrl.h.
        unsafe { self.library.xc_interface_close(self.handle.as_ptr()) };
    }
}

/// Asked for a domid that nobody has, Xen answers with the next domain.
fn exactly(domid: u16, found: &[xc::xc_domaininfo_t]) -> Option<DomainInfo> {
    found.first().filter(|raw| raw.domain == domid).map(DomainInfo::decode)
}

fn same_domain(operation: &'static str, domid: u16, meant: Uuid, now: Option<Uuid>) -> Result<(), Error> {
    match now {
        Some(found) if found == meant => Ok(()),
        Some(found) => Err(Error::DomidReused { operation, domid, meant, found }),
        None => Err(Error::NoSuchDomain { operation, domid }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn raw(domid: u16) -> xc::xc_domaininfo_t {
        xc::xc_domaininfo_t { domain: domid, ..Default::default() }
    }

    #[test]
    fn the_next_domain_is_not_the_domain_asked_for() {
        assert_eq!(exactly(3, &[raw(4)]), None);
        assert_eq!(exactly(3, &[]), None);
        assert_eq!(exactly(3, &[raw(3)]).unwrap().domid, 3);
    }

    #[test]
    fn a_reused_domid_is_left_alone() {
        let meant = Uuid::new_v4();
        let other = Uuid::new_v4();
        assert!(same_domain("pause", 5, meant, Some(meant)).is_ok());
        assert!(matches!(same_domain("pause", 5, meant, None), Err(Error::NoSuchDomain { domid: 5, .. })));
        let message = same_domain("destroy", 5, meant, Some(other)).unwrap_err().to_string();
        assert!(message.starts_with("destroy of domain 5 not done"), "{message}");
        assert!(message.contains(&other.to_string()), "{message}");
    }

    #[test]
    fn xenctrl_is_send() {
        fn send<T: Send>() {}
        send::<Xenctrl>();
    }

    /// Calls the real library: without Xen it can't open its device and says so by errno.
    #[test]
    fn the_real_library_without_its_device_gives_a_readable_error() {
        let library = libxenctrl(Version::HEADERS).unwrap();
        if ["/dev/xen/privcmd", "/proc/xen/privcmd"].iter().any(|device| Path::new(device).exists()) {
            return; // tests/open.rs opens it.
        }
        let message = Xenctrl::open_handle(library).err().unwrap().to_string();
        assert!(message.contains("xen-privcmd"), "{message}");
        assert!(message.contains("No such file"), "{message}");
    }
}
