//! What is under test: dom0d with its unit, and the command line tool, as an operator installs them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::dom0::Dom0;
use super::guests::{Guests, name};
use super::patience::Patience;
use crate::host::setup;

/// The service's virtual address.
pub(super) const PSC: &str = "10.77.0.100";
/// Until dom0d has all replicas in the queue; emulation makes its start slow.
const READY_LIMIT: Duration = Duration::from_secs(180);
/// Debian packages that this lab needs besides the other lab's.
const PACKAGES: [&str; 7] =
    ["qemu-system-x86", "mmdebstrap", "e2fsprogs", "cpio", "kmod", "openssh-client", "binutils"];

/// Installs what is missing on this machine, and builds the product.
pub(super) fn prepare(progress: &dyn Fn(&str)) -> Result<()> {
    setup::install_packages(&PACKAGES, progress)?;
    setup::build(progress)
}

/// Copies the programs and the unit.
pub(super) fn copy(dom0: &Dom0, patience: &Patience, progress: &dyn Fn(&str)) -> Result<()> {
    for program in ["dom0d", "understudy"] {
        let contents = stripped(&setup::built(program), &dom0.scratch(program), patience)?;
        dom0.write(patience, &format!("/usr/sbin/{program}"), "755", &contents)?;
    }
    let unit = setup::workspace().join("dom0d/dom0d.service");
    let text = fs::read(&unit).with_context(|| format!("reading {}", unit.display()))?;
    dom0.write(patience, "/etc/systemd/system/dom0d.service", "644", &text)?;
    progress("dom0d, understudy and the unit are in dom0");
    Ok(())
}

/// Starts dom0d by its unit, with the domUs as one service; returns when each replica is promotable.
pub(super) fn start(
    dom0: &Dom0,
    guests: &Guests,
    patience: &Patience,
    progress: &dyn Fn(&str),
) -> Result<()> {
    let rvms = guests.replica_names();
    let configuration = format!(
        "[[service]]\nname = \"redis\"\npsc = [\"{PSC}\", \"fd77::100\"]\nports = [6379]\n\
         bridge = \"xenbr0\"\novm = \"{}\"\nrvms = {rvms:?}\nattach = \"known\"\n",
        name(1)
    );
    dom0.write(patience, "/etc/understudy/dom0d.toml", "644", configuration.as_bytes())?;
    let start = "systemctl daemon-reload && systemctl start dom0d";
    dom0.run(patience, "starting dom0d", start, Duration::from_secs(120))?;
    progress("dom0d runs");
    for rvm in rvms {
        patience.until(&format!("seeding {rvm}"), READY_LIMIT, || {
            // An order that came through though its answer did not is refused the second time.
            let order = format!(
                "understudy attach redis {rvm} --assume-identical >/dev/null 2>&1; \
                 understudy status | grep -qE '^ +{rvm} .*RVM .* yes '"
            );
            let seeded = dom0.run(patience, "attaching a replica", &order, Duration::from_secs(60));
            Ok(seeded.ok())
        })?;
        progress(&format!("{rvm} is a replica"));
    }
    Ok(())
}

/// A program without what only a debugger reads: emulated, each megabyte costs half a second.
fn stripped(path: &Path, scratch: &Path, patience: &Patience) -> Result<Vec<u8>> {
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(scratch).arg(path);
    let output = patience.run("stripping", &mut strip, &[], Duration::from_secs(60))?;
    ensure!(output.status.success(), "strip {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
    fs::read(scratch).with_context(|| format!("reading {}", scratch.display()))
}
