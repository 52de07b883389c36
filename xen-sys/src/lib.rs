//! libxenctrl behind a safe interface: lists domains with their states, pauses, unpauses and destroys them.
//!
//! The library is loaded when [`Xenctrl::open`] is called, in the version of the hypervisor that
//! runs, so a program that links this crate also starts where there is no Xen and gets a readable
//! [`Error`] there. Struct layouts are those of the `xenctrl.h` the crate was built with; Xen
//! guarantees them for one release (4.17, 4.18, ...), so another release is refused.
//!
//! ```no_run
//! let xen = xen_sys::Xenctrl::open()?;
//! for domain in xen.domains()? {
//!     println!("{} {} paused={}", domain.domid, domain.uuid, domain.paused);
//! }
//! # Ok::<(), xen_sys::Error>(())
//! ```

mod bindings;
mod domain;
mod error;
mod host;
mod library;
mod xenctrl;

pub use domain::{DomainInfo, ShutdownReason, VcpuInfo};
pub use error::Error;
pub use host::Version;
pub use xenctrl::Xenctrl;
