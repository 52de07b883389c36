//! `open` tells the truth about the machine that it runs on, with Xen and without.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;

use xen_sys::{Error, Xenctrl};

#[test]
fn open_works_in_dom0_and_is_readable_elsewhere() {
    let under_xen = fs::read_to_string("/sys/hypervisor/type").is_ok_and(|t| t.trim() == "xen");
    let in_dom0 = fs::read_to_string("/proc/xen/capabilities").is_ok_and(|c| c.contains("control"));
    match Xenctrl::open() {
        Ok(xen) => {
            assert!(in_dom0, "opened outside dom0");
            let domains = xen.domains().unwrap();
            assert_eq!(domains[0].domid, 0);
            assert!(domains[0].running && !domains[0].paused);
            assert!(domains.is_sorted_by(|a, b| a.domid < b.domid));
            let vcpus = xen.vcpus(0).unwrap().unwrap();
            assert!(vcpus.iter().any(|vcpu| vcpu.online && vcpu.running));
            // The last valid domid: nobody has it, and there is no next domain either.
            assert_eq!(xen.domain(0x7fef).unwrap(), None);
            // Nobody is paused under another's UUID.
            assert!(matches!(
                xen.pause(0, uuid::Uuid::from_u128(1)),
                Err(Error::DomidReused { domid: 0, .. })
            ));
        }
        Err(Error::NoXen) => {
            assert!(!under_xen);
            let message = Error::NoXen.to_string();
            assert!(message.contains("no Xen hypervisor runs on this machine"));
            assert!(message.contains("dom0"), "{message}");
        }
        Err(refused) => assert!(under_xen, "without Xen: {refused}"),
    }
}
