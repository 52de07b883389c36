//! Decodes the hypervisor's view of a domain: `struct xen_domctl_getdomaininfo` and
//! `struct xen_domctl_getvcpuinfo` of `xen/domctl.h`.

use std::fmt;

use uuid::Uuid;

use crate::bindings as xc;

/// KiB of a page in Xen's accounting, which is 4 KiB on every architecture Xen runs on.
const PAGE_KIB: u64 = 4;

/// One domain at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainInfo {
    /// The domain's number. Reused after the domain is gone: `uuid` is its identity.
    pub domid: u16,
    /// The domain's handle, byte for byte what the toolstack shows as its UUID.
    pub uuid: Uuid,
    /// The toolstack paused it, at least once: pauses are counted. False for a domain that Xen itself
    /// stops for a moment.
    pub paused: bool,
    /// At least one vCPU is on a physical CPU right now.
    pub running: bool,
    /// All vCPUs wait for events, as those of an idle healthy guest do.
    pub blocked: bool,
    /// The domain is dead, and only pages are left that others still map. During its destruction this
    /// is still false; see `shutdown`, and its absence from the list.
    pub dying: bool,
    /// Why the guest stopped, once it has.
    pub shutdown: Option<ShutdownReason>,
    /// Runs with hardware virtualisation: HVM and PVH. False for PV.
    pub hvm: bool,
    /// CPU time used by all vCPUs since the domain was created, in nanoseconds.
    pub cpu_time_ns: u64,
    /// vCPUs that are online now.
    pub nr_online_vcpus: u32,
    /// Highest vCPU number in use, `None` for a domain without vCPUs.
    pub max_vcpu_id: Option<u32>,
    /// Memory it has, in KiB.
    pub memkb: u64,
    /// Memory it may have at most, in KiB. Huge for a domain without limit (often dom0).
    pub max_memkb: u64,
}

impl DomainInfo {
    pub(crate) fn decode(raw: &xc::xc_domaininfo_t) -> Self {
        let is = |flag: u32| raw.flags & flag != 0;
        Self {
            domid: raw.domain,
            uuid: Uuid::from_bytes(raw.handle),
            paused: is(xc::XEN_DOMINF_paused),
            running: is(xc::XEN_DOMINF_running),
            blocked: is(xc::XEN_DOMINF_blocked),
            dying: is(xc::XEN_DOMINF_dying),
            shutdown: ShutdownReason::decode(raw.flags),
            hvm: is(xc::XEN_DOMINF_hvm_guest),
            cpu_time_ns: raw.cpu_time,
            nr_online_vcpus: raw.nr_online_vcpus,
            // bindgen takes the C constant `~0U` for an i32.
            max_vcpu_id: (raw.max_vcpu_id != xc::XEN_INVALID_MAX_VCPU_ID as u32).then_some(raw.max_vcpu_id),
            memkb: raw.tot_pages.saturating_mul(PAGE_KIB),
            max_memkb: raw.max_pages.saturating_mul(PAGE_KIB),
        }
    }
}

/// Why a guest stopped: `SHUTDOWN_*` of `xen/sched.h`, as the guest (or Xen for it) gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ShutdownReason {
    /// It ended normally.
    Poweroff,
    /// It asks to be started anew.
    Reboot,
    /// It suspended itself so that it can be saved or migrated.
    Suspend,
    /// It crashed.
    Crash,
    /// Its watchdog expired.
    Watchdog,
    /// It asks to be reset in place (kexec).
    SoftReset,
    /// A code that the headers of this build don't know.
    Other(u8),
}

impl ShutdownReason {
    /// Bits 16 to 23, meaningful only with the shutdown flag: Xen fills bits 16 to 31 of a domain
    /// that has not shut down with ones.
    pub(crate) fn decode(flags: u32) -> Option<Self> {
        if flags & xc::XEN_DOMINF_shutdown == 0 {
            return None;
        }
        let code = (flags >> xc::XEN_DOMINF_shutdownshift) & xc::XEN_DOMINF_shutdownmask;
        Some(match code {
            xc::SHUTDOWN_poweroff => Self::Poweroff,
            xc::SHUTDOWN_reboot => Self::Reboot,
            xc::SHUTDOWN_suspend => Self::Suspend,
            xc::SHUTDOWN_crash => Self::Crash,
            xc::SHUTDOWN_watchdog => Self::Watchdog,
            xc::SHUTDOWN_soft_reset => Self::SoftReset,
            // The mask leaves eight bits.
            other => Self::Other(other as u8),
        })
    }
}

impl fmt::Display for ShutdownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Poweroff => f.write_str("poweroff"),
            Self::Reboot => f.write_str("reboot"),
            Self::Suspend => f.write_str("suspend"),
            Self::Crash => f.write_str("crash"),
            Self::Watchdog => f.write_str("watchdog"),
            Self::SoftReset => f.write_str("soft-reset"),
            Self::Other(code) => write!(f, "shutdown code {code}"),
        }
    }
}

/// One vCPU at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuInfo {
    /// Its number within the domain.
    pub vcpu: u32,
    /// Not hot-unplugged and brought up by the guest.
    pub online: bool,
    /// Waits for an event.
    pub blocked: bool,
    /// Is on a physical CPU right now.
    pub running: bool,
    /// CPU time used since the domain was created, in nanoseconds.
    pub cpu_time_ns: u64,
    /// The physical CPU it is on or was on last.
    pub cpu: u32,
}

impl VcpuInfo {
    pub(crate) fn decode(raw: &xc::xc_vcpuinfo_t) -> Self {
        Self {
            vcpu: raw.vcpu,
            online: raw.online != 0,
            blocked: raw.blocked != 0,
            running: raw.running != 0,
            cpu_time_ns: raw.cpu_time,
            cpu: raw.cpu,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Xen leaves in the code's bits of a domain that has not shut down.
    const NO_CODE: u32 = 0xffff_0000;

    fn domain(flags: u32) -> DomainInfo {
        DomainInfo::decode(&xc::xc_domaininfo_t { flags, ..Default::default() })
    }

    // The bits are written as numbers on purpose: they are the hypervisor's ABI, and a binding
    // gone wrong must not agree with itself.

    #[test]
    fn a_healthy_idle_pv_guest_is_only_blocked() {
        let idle = domain(NO_CODE | 1 << 4);
        assert!(idle.blocked);
        assert!(!idle.paused && !idle.running && !idle.dying && !idle.hvm);
        assert_eq!(idle.shutdown, None);
    }

    #[test]
    fn each_flag_is_read_from_its_own_bit() {
        assert!(domain(NO_CODE | 1).dying);
        assert!(domain(NO_CODE | 1 << 1).hvm);
        assert!(domain(NO_CODE | 1 << 3).paused);
        assert!(domain(NO_CODE | 1 << 5).running);
        let debugged_xenstore_hap = domain(NO_CODE | 1 << 6 | 1 << 7 | 1 << 8);
        assert_eq!(debugged_xenstore_hap, domain(NO_CODE));
    }

    #[test]
    fn the_shutdown_code_is_in_bits_16_to_23() {
        let reason = |code: u32| ShutdownReason::decode(1 << 2 | code << 16);
        assert_eq!(reason(0), Some(ShutdownReason::Poweroff));
        assert_eq!(reason(1), Some(ShutdownReason::Reboot));
        assert_eq!(reason(2), Some(ShutdownReason::Suspend));
        assert_eq!(reason(3), Some(ShutdownReason::Crash));
        assert_eq!(reason(4), Some(ShutdownReason::Watchdog));
        assert_eq!(reason(5), Some(ShutdownReason::SoftReset));
        assert_eq!(reason(6), Some(ShutdownReason::Other(6)));
        assert_eq!(reason(0x1ff), Some(ShutdownReason::Other(255)));
    }

    #[test]
    fn a_code_without_the_shutdown_flag_means_nothing() {
        assert_eq!(ShutdownReason::decode(3 << 16), None);
        assert_eq!(ShutdownReason::decode(NO_CODE), None);
    }

    #[test]
    fn a_domain_paused_while_shut_down_is_both() {
        let saved = domain(1 << 2 | 1 << 3 | 2 << 16);
        assert!(saved.paused);
        assert_eq!(saved.shutdown, Some(ShutdownReason::Suspend));
    }

    #[test]
    fn the_handle_is_the_uuid_in_the_order_xl_prints() {
        let raw = xc::xc_domaininfo_t {
            domain: 7,
            handle: [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 1, 2, 3, 4, 5, 6, 7, 8],
            ..Default::default()
        };
        let info = DomainInfo::decode(&raw);
        assert_eq!(info.domid, 7);
        assert_eq!(info.uuid.to_string(), "12345678-9abc-def0-0102-030405060708");
    }

    #[test]
    fn sizes_and_times_are_converted_without_overflow() {
        let raw = xc::xc_domaininfo_t {
            tot_pages: 32_768,
            max_pages: u64::MAX,
            cpu_time: 1_500_000_000,
            nr_online_vcpus: 2,
            max_vcpu_id: 3,
            ..Default::default()
        };
        let info = DomainInfo::decode(&raw);
        assert_eq!(info.memkb, 131_072);
        assert_eq!(info.max_memkb, u64::MAX);
        assert_eq!(info.cpu_time_ns, 1_500_000_000);
        assert_eq!((info.nr_online_vcpus, info.max_vcpu_id), (2, Some(3)));
    }

    #[test]
    fn a_domain_without_vcpus_has_no_highest_vcpu() {
        let raw = xc::xc_domaininfo_t { max_vcpu_id: u32::MAX, ..Default::default() };
        assert_eq!(DomainInfo::decode(&raw).max_vcpu_id, None);
    }

    #[test]
    fn vcpu_flags_are_bytes() {
        let raw = xc::xc_vcpuinfo_t { vcpu: 1, online: 1, blocked: 0, running: 1, cpu_time: 42, cpu: 3 };
        let info = VcpuInfo::decode(&raw);
        assert!(info.online && info.running && !info.blocked);
        assert_eq!((info.vcpu, info.cpu_time_ns, info.cpu), (1, 42, 3));
    }
}
