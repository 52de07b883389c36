//! The hook of vif-bridge never delays or fails `xl create`, whatever dom0d does.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::host::{BRIDGE, Service};
use crate::scenarios::Scenario;
use crate::xen::Kind;
use crate::xen::inside::command::{run, shell};
use crate::xen::inside::stage::Stage;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![Scenario::new("hook/never-in-the-way", never_in_the_way).within(Duration::from_secs(600))]
}

/// Half of libxl's limit for a hotplug script (40 s), far more than noise: 9 s were seen on a busy machine.
const SLOWER_BY: Duration = Duration::from_secs(20);

/// Removes the command, and restores it.
const HIDE: &str = "mv /usr/sbin/understudy /usr/sbin/understudy.away";
const RESTORE: &str = "mv /usr/sbin/understudy.away /usr/sbin/understudy";
/// A command that ignores the polite signal, too.
const HANGING: &str = "printf '#!/bin/sh\ntrap \"\" TERM\nsleep 1000\n' >/usr/sbin/understudy
                       chmod 755 /usr/sbin/understudy";

/// What may be wrong with the receiver of the hook's notice: how to cause it, and how to end it.
fn cases() -> Vec<(&'static str, String, String)> {
    let killed = "systemctl mask --runtime dom0d; systemctl kill --signal=KILL dom0d
                  test -S /run/understudy/control.sock";
    vec![
        ("dom0d runs", ":".to_owned(), ":".to_owned()),
        ("the command hangs", format!("{HIDE}; {HANGING}"), RESTORE.to_owned()),
        ("the command is absent", HIDE.to_owned(), RESTORE.to_owned()),
        (
            "dom0d hangs",
            "systemctl kill --signal=STOP dom0d".to_owned(),
            "systemctl kill --signal=CONT dom0d".to_owned(),
        ),
        (
            "dom0d is dead and its socket is left",
            killed.to_owned(),
            "systemctl unmask --runtime dom0d".to_owned(),
        ),
    ]
}

/// A guest that is never run: all of it that matters here is its vif.
fn create() -> Result<Duration> {
    let path = "/etc/xen/unborn.cfg";
    let configuration = format!(
        "name = \"unborn\"\ntype = \"pv\"\nkernel = \"/srv/guests/vmlinux\"\nmemory = 96\n\
         vif = [ \"mac=00:16:3e:77:01:77,bridge={BRIDGE}\" ]\n"
    );
    fs::write(path, configuration).with_context(|| format!("writing {path}"))?;
    let begun = Instant::now();
    run(&["xl", "create", "-p", path])?;
    let took = begun.elapsed();
    run(&["xl", "destroy", "unborn"])?;
    fs::remove_file(path)?;
    Ok(took)
}

fn never_in_the_way(_: &str) -> Result<()> {
    let _stage = Stage::up(Kind::Pv, 1, &[Service::Redis])?;
    let without = create()?;
    println!("  xl create without the hook: {:.1} s", without.as_secs_f64());
    run(&["/root/xl-hooks/install"])?;
    let played = cases().iter().try_for_each(|(what, begin, end)| {
        shell(begin)?;
        let took = create();
        shell(end)?;
        let took = took?;
        println!("  {what}: {:.1} s", took.as_secs_f64());
        ensure!(took < without + SLOWER_BY, "with the hook, while {what}, xl create took {took:?}");
        Ok(())
    });
    run(&["/root/xl-hooks/uninstall"])?;
    played
}
