//! Somebody removes rules or programs.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::super::bridge::Psc;
use super::{Babble, NOTICED, counter, ear_for, expect_as_before};
use crate::client::clock::now_ns;
use crate::host::{Lab, Plane, Service};
use crate::stage::{Stage, with_plane};

/// Somebody removes the rules, under load and while a replica sends: dom0d restores them within a second, and reports it.
pub(super) fn rules_taken(lab: &str, script: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("rules")?;
    let (dom0, guest) = (stage.lab.dom0(), stage.lab.domain("guest-2")?);
    let babble = Babble::begin(&guest, "eth0", Psc::of(&stage)?)?;
    let rules = || Ok::<_, anyhow::Error>(dom0.run(&["nft", "--stateless", "list", "ruleset"])?.stdout);
    // What is written at the moment settles.
    sleep(Duration::from_millis(300));
    let before = rules()?;
    for _ in 0..3 {
        let now_us = now_ns() / 1_000;
        let ear = ear_for(&stage, &guest)?;
        let begun = Instant::now();
        dom0.run(&["sh", "-c", script])?;
        ensure!(rules()? != before || begun.elapsed() > Duration::from_millis(50), "nothing was taken away");
        let restored = stage.events.wait("restored", "redis", now_us, Duration::from_secs(5));
        let said = restored.map(|_| begun.elapsed())?;
        let leaked = ear.end()?;
        println!("  put back after {} ms, {leaked} frames leaked", said.as_millis());
        ensure!(leaked == 0, "{leaked} frames of the replica were heard while the rules were away");
        ensure!(said < NOTICED, "that took {said:?}");
        ensure!(rules()? == before, "the rules are others than before");
        let ear = ear_for(&stage, &guest)?;
        sleep(Duration::from_millis(200));
        ensure!(ear.end()? == 0, "the replica is heard though the rules are back");
    }
    let restored = stage.operator.status()?.counters.get("rules_restored").copied();
    ensure!(restored >= Some(3), "rules_restored is {restored:?}");
    babble.end()?;
    expect_as_before(&stage, 1)?;
    stage.survives_freeze(load)
}

/// Somebody detaches a program of the fast path, under load: dom0d restores it at once, and accuses nobody for the segments
/// that it missed.
pub(super) fn program_taken(lab: &str, of_anchor: bool, script: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 2, &[Service::Redis]), &|line| println!("  {line}"))?;
    let config = with_plane(&lab.default_config(), Plane::Bpf);
    let stage = Stage::take(lab, &config)?;
    let load = stage.load("programs")?;
    let dom0 = stage.lab.dom0();
    let hex: String = stage.psc_mac(Service::Redis)?.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut interfaces = vec![stage.lab.domain("guest-1")?.vif, stage.lab.domain("guest-2")?.vif];
    if of_anchor {
        interfaces = vec![format!("usa{hex}")];
    }
    for interface in interfaces {
        for _ in 0..3 {
            let now_us = now_ns() / 1_000;
            let begun = Instant::now();
            dom0.run(&["sh", "-c", &script.replace("DEV", &interface)])?;
            stage.events.wait("restored", "redis", now_us, Duration::from_secs(5))?;
            let said = begun.elapsed();
            println!("  {interface}: put back after {} ms", said.as_millis());
            ensure!(said < NOTICED, "that took {said:?}");
            load.wait_answers(300, Duration::from_secs(20))?;
            ensure!(load.broken() == 0, "clients noticed");
        }
        expect_as_before(&stage, 2)?;
    }
    let forwarded = |name| counter(&stage, name);
    let before = (forwarded("client_forwarded")?, forwarded("server_forwarded")?);
    load.wait_answers(300, Duration::from_secs(20))?;
    let after = (forwarded("client_forwarded")?, forwarded("server_forwarded")?);
    ensure!(
        after.0 > before.0 && after.1 > before.1,
        "the kernel passes nothing any more: {before:?}, {after:?}"
    );
    stage.survives_freeze(load)
}
