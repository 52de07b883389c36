//! A lab in a VLAN: frames of client and guests are tagged between their hosts and the bridge. tc programs do that, since many
//! kernels lack VLAN interfaces (`eth0.5`).

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Host;
use super::network::GUEST_INTERFACE;

const SOURCE: &str = include_str!("vlan.bpf.c");

/// The VLAN that client and guests are in. dom0's own kernel is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Vlan {
    /// 1 to 4094.
    pub(crate) id: u16,
    /// The bridge lets frames of a VLAN pass between its members only.
    pub(crate) filtered: bool,
}

impl Vlan {
    /// Makes the programs, for [`Vlan::put_on`].
    pub(super) fn compile(self, directory: &Path) -> Result<()> {
        let source = directory.join("vlan.bpf.c");
        std::fs::write(&source, SOURCE).with_context(|| format!("writing {}", source.display()))?;
        let output = Command::new("clang")
            .args(["-O2", "-g", "-target", "bpf", "-c"])
            .arg(format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH))
            .arg(format!("-DVLAN={}", self.id))
            .arg(source)
            .arg("-o")
            .arg(object(directory))
            .output()
            .context("starting clang")?;
        ensure!(output.status.success(), "clang: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// Whatever this host sends and receives is in the VLAN from now on.
    pub(super) fn put_on(self, host: &Host, directory: &Path) -> Result<()> {
        host.run(&["tc", "qdisc", "add", "dev", GUEST_INTERFACE, "clsact"])?;
        let object = object(directory);
        for (hook, section) in [("egress", "sent"), ("ingress", "received")] {
            let words = ["tc", "filter", "add", "dev", GUEST_INTERFACE, hook, "bpf", "direct-action", "obj"];
            host.run(&[&words[..], &[&object.to_string_lossy(), "sec", section]].concat())?;
        }
        Ok(())
    }

    /// Makes a port of dom0's bridge a member, where the bridge asks for that.
    pub(super) fn admit(self, dom0: &Host, port: &str) -> Result<()> {
        if self.filtered {
            dom0.run(&["bridge", "vlan", "add", "dev", port, "vid", &self.id.to_string()])?;
        }
        Ok(())
    }

    /// Whether this kernel's bridges can tell VLANs apart.
    pub(crate) fn can_be_filtered() -> Result<bool> {
        let words = ["--net", "ip", "link", "add", "type", "bridge", "vlan_filtering", "1"];
        let output = Command::new("unshare").args(words).output().context("starting unshare")?;
        let said = String::from_utf8_lossy(&output.stderr);
        let refused = said.contains("not supported");
        ensure!(output.status.success() || refused, "making a bridge: {}", said.trim());
        Ok(!refused)
    }
}

fn object(directory: &Path) -> PathBuf {
    directory.join("vlan.bpf.o")
}
