//! The domUs: `guest-1` is the OVM, the others its replicas, on dom0's bridge `xenbr0`, as an operator
//! would create them with xl.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;

use super::dom0::Dom0;
use super::patience::Patience;

/// `xl create` took 16 to 25 s in emulation.
const CREATE_LIMIT: Duration = Duration::from_secs(180);
/// From there to a service that answers.
const SERVICE_LIMIT: Duration = Duration::from_secs(180);

/// How a domU is virtualised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// Paravirtualised.
    Pv,
    /// Paravirtualised in a hardware-virtualised container, through QEMU's emulated SVM.
    Pvh,
}

/// The domUs of a lab.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guests {
    pub(super) kind: Kind,
    pub(super) replicas: u8,
}

impl Guests {
    /// Creates them one after the other, then waits until each one's Redis answers.
    pub(super) fn create(self, dom0: &Dom0, patience: &Patience, progress: &dyn Fn(&str)) -> Result<()> {
        for place in 1..=self.replicas + 1 {
            let (name, begun) = (name(place), Instant::now());
            let path = format!("/etc/xen/{name}.cfg");
            dom0.write(patience, &path, "644", self.configuration(place).as_bytes())?;
            dom0.run(patience, &format!("creating {name}"), &format!("xl create {path}"), CREATE_LIMIT)?;
            progress(&format!("{name} created in {:.0} s", begun.elapsed().as_secs_f64()));
        }
        for place in 1..=self.replicas + 1 {
            let address = address(place);
            patience.until(&format!("waiting for {address}"), SERVICE_LIMIT, || {
                let asked = format!("ip netns exec client timeout 5 redis-cli -h {address} ping");
                let answer = dom0.run(patience, "asking a guest's redis", &asked, Duration::from_secs(30));
                Ok(answer.is_ok_and(|answer| answer.trim() == "PONG").then_some(()))
            })?;
        }
        progress("every guest's redis answers");
        Ok(())
    }

    /// What `xl create` is given.
    fn configuration(self, place: u8) -> String {
        let (name, address) = (name(place), address(place));
        let kind = match self.kind {
            Kind::Pv => "pv",
            Kind::Pvh => "pvh",
        };
        format!(
            r#"name = "{name}"
type = "{kind}"
kernel = "/srv/guests/vmlinuz"
ramdisk = "/srv/guests/guest.cpio"
extra = "console=hvc0 quiet lab.name={name} lab.address={address}/24 lab.address6=fd77::1{place}/64"
memory = 192
vcpus = 1
vif = [ "mac=00:16:3e:77:01:{place:02x},bridge=xenbr0,ip={address} fd77::1{place}" ]
# The lab's emulated SVM can't emulate RDTSCP.
tsc_mode = "native"
"#
        )
    }

    /// Names of the replicas.
    pub(super) fn replica_names(self) -> Vec<String> {
        (2..=self.replicas + 1).map(name).collect()
    }
}

/// Name of the domU at a place, counted from 1.
pub(super) fn name(place: u8) -> String {
    format!("guest-{place}")
}

/// Its IPv4 address.
pub(super) fn address(place: u8) -> String {
    format!("10.77.0.{}", 10 + u16::from(place))
}
