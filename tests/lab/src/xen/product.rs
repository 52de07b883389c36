//! What goes into dom0: dom0d with its unit, the command line tool and the hooks, as an operator installs
//! them, and this program, which plays the stories there.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::dom0::Dom0;
use super::patience::Patience;
use crate::client::http::hex;
use crate::host::setup;

/// This program in dom0.
pub(super) const LAB: &str = "/usr/local/sbin/lab";
/// Debian packages that this lab needs besides the other lab's.
const PACKAGES: [&str; 10] = [
    "qemu-system-x86",
    "mmdebstrap",
    "e2fsprogs",
    "cpio",
    "kmod",
    "xz-utils",
    "openssh-client",
    "binutils",
    "gcc-12",
    "make",
];
/// How long a single order may take, here or in dom0.
const ORDER_LIMIT: Duration = Duration::from_secs(120);

/// Installs what is missing on this machine, and builds the product.
pub(super) fn prepare(progress: &dyn Fn(&str)) -> Result<()> {
    setup::install_packages(&PACKAGES, &[], progress)?;
    setup::build(progress)
}

/// Copies what is not there yet. Each order to dom0 costs a second or two in emulation.
pub(super) fn copy(dom0: &Dom0, patience: &Patience, progress: &dyn Fn(&str)) -> Result<()> {
    let own = Path::new("/proc/self/exe");
    let sums = format!("cat /usr/sbin/*.sum {LAB}.sum 2>/dev/null || :");
    let there = dom0.run(patience, "asking for programs", &sums, ORDER_LIMIT)?;
    for (program, to) in [
        (setup::built("dom0d").as_path(), "/usr/sbin/dom0d"),
        (setup::built("understudy").as_path(), "/usr/sbin/understudy"),
        (own, LAB),
    ] {
        let contents = fs::read(program).with_context(|| format!("reading {}", program.display()))?;
        let sum = hex(Sha256::new_with_prefix(&contents));
        if !there.lines().any(|line| line == sum) {
            copy_program(dom0, patience, contents, to, &sum)?;
        }
    }
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(setup::workspace()).args(["-c", "dom0d/dom0d.service", "xl-hooks"]);
    let output = patience.run("packing unit and hooks", &mut tar, &[], ORDER_LIMIT)?;
    ensure!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
    // A host that is emulated on busy cores stands still for ten seconds at times.
    let unpack = "tar -C /root --no-same-owner -x && mv /root/dom0d/dom0d.service /etc/systemd/system/ &&
                  mkdir -p /etc/systemd/system/dom0d.service.d &&
                  printf '[Service]\\nWatchdogSec=60s\\n' >/etc/systemd/system/dom0d.service.d/emulation.conf &&
                  systemctl daemon-reload";
    dom0.run_with(patience, "unpacking unit and hooks", unpack, &output.stdout, ORDER_LIMIT)?;
    progress("dom0d, its unit, understudy, the hooks and this program are in dom0");
    Ok(())
}

/// Packed and without what only a debugger reads: emulated, each megabyte costs half a second.
fn copy_program(dom0: &Dom0, patience: &Patience, contents: Vec<u8>, to: &str, sum: &str) -> Result<()> {
    let scratch = dom0.scratch("program");
    fs::write(&scratch, contents).with_context(|| format!("writing {}", scratch.display()))?;
    let mut pack = Command::new("sh");
    pack.args(["-ec", "strip --strip-debug \"$0\"; exec gzip -c -4 \"$0\""]).arg(&scratch);
    let output = patience.run("packing a program", &mut pack, &[], ORDER_LIMIT)?;
    ensure!(output.status.success(), "packing {to}: {}", String::from_utf8_lossy(&output.stderr));
    let unpack =
        format!("gunzip -c >{to}.new && chmod 755 {to}.new && mv {to}.new {to} && echo {sum} >{to}.sum");
    dom0.run_with(patience, &format!("copying {to}"), &unpack, &output.stdout, ORDER_LIMIT)?;
    Ok(())
}
