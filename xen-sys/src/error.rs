//! What can go wrong between this process and the hypervisor, and what to do about it.

use std::io;

use uuid::Uuid;

use crate::host::Version;

/// Why a call to Xen could not be made or was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `/sys/hypervisor` nor `/proc/xen` nor `/dev/xen/privcmd` says that Xen runs.
    #[error(
        "no Xen hypervisor runs on this machine (/sys/hypervisor/type does not say 'xen'); boot \
         the machine under Xen (Debian: package xen-system-amd64) and run this in dom0"
    )]
    NoXen,

    /// Xen runs, but this domain may not control others.
    #[error(
        "this Xen domain may not control other domains (the hypervisor answered: {source}); run \
         this in dom0"
    )]
    NotControlDomain {
        /// The hypervisor's answer, `EPERM`.
        source: io::Error,
    },

    /// The privileged command device exists but this process may not open it.
    #[error(
        "no permission to open /dev/xen/privcmd ({source}); run this as root (in a container or a \
         sandboxed unit: allow that device)"
    )]
    NoPrivilege {
        /// Why the device can't be opened.
        source: io::Error,
    },

    /// The privileged command device is missing or unusable.
    #[error(
        "can't open Xen's privileged command interface ({source}); in dom0, load the module \
         xen-privcmd and mount xenfs on /proc/xen (systemd: proc-xen.mount)"
    )]
    NoPrivcmd {
        /// Why the device can't be opened.
        source: io::Error,
    },

    /// `libxenctrl.so` of the running version can't be loaded.
    #[error(
        "can't load {library}, the control library of the running Xen {version}; install its \
         package (Debian: libxenmisc{version}); the loader says: {cause}"
    )]
    LibraryMissing {
        /// The file name asked for.
        library: String,
        /// The version of the running hypervisor.
        version: Version,
        /// The dynamic loader's message.
        cause: String,
    },

    /// The running hypervisor has another ABI than the headers of the build.
    #[error(
        "Xen {running} runs here, but this program was built with the headers of Xen {headers} and \
         struct layouts differ between Xen releases; build it on a machine with libxen-dev \
         {running}, or boot Xen {headers}"
    )]
    VersionMismatch {
        /// The version of the running hypervisor.
        running: Version,
        /// The version of the headers this crate was built with.
        headers: Version,
    },

    /// The hypervisor refuses the library's interface version, though both claim one release.
    #[error(
        "the hypervisor refuses the interface version of libxenctrl {version} ({source}); \
         hypervisor and tools come from different builds: install both from one source and reboot"
    )]
    InterfaceMismatch {
        /// The version both claim.
        version: Version,
        /// The hypervisor's answer, `EACCES`.
        source: io::Error,
    },

    /// A version file of `/sys/hypervisor` holds something that is no number.
    #[error("can't understand {path}: it holds '{text}', expected a number")]
    UnreadableVersion {
        /// The file.
        path: String,
        /// What it holds.
        text: String,
    },

    /// The domain is gone.
    #[error("{operation} of domain {domid}: there is no such domain")]
    NoSuchDomain {
        /// What was attempted.
        operation: &'static str,
        /// The domain it was attempted on.
        domid: u16,
    },

    /// The domid now belongs to another domain than the caller meant, which was left alone.
    #[error(
        "{operation} of domain {domid} not done: its UUID is {found}, meant was {meant}; the \
         domain meant is gone and its domid was reused"
    )]
    DomidReused {
        /// What was attempted.
        operation: &'static str,
        /// The domid that was reused.
        domid: u16,
        /// The UUID of the domain that the caller meant.
        meant: Uuid,
        /// The UUID of the domain that has the domid now.
        found: Uuid,
    },

    /// The hypervisor or the library refused a call about one domain.
    #[error("{operation} of domain {domid} failed: {source}")]
    Domain {
        /// What was attempted.
        operation: &'static str,
        /// The domain it was attempted on.
        domid: u16,
        /// The call's errno.
        source: io::Error,
    },

    /// The hypervisor or the library refused a call that is about no single domain.
    #[error("{operation} failed: {source}")]
    Call {
        /// What was attempted.
        operation: &'static str,
        /// The call's errno.
        source: io::Error,
    },
}
