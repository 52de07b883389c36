//! A guest claims to be the PSC.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::super::bridge::Psc;
use super::{NOBODY, Own, listen, wait_counted};
use crate::client::frames::{
    BROADCAST, arp, arp_announcement, behind_options, discovery, solicitation, tagged,
};
use crate::client::place::Place;
use crate::client::redis::session::Session;
use crate::client::sniff::Wire;
use crate::host::{Host, Service};
use crate::stage::Stage;

/// Every frame by which a guest could claim to be the PSC.
fn lies(own: Own, psc: Psc) -> Vec<(&'static str, Vec<u8>)> {
    let reply = arp_announcement(own.mac, psc.v4);
    let by_own = discovery(136, own.mac, own.v6, psc.v6);
    let mut by_other = reply.clone();
    by_other[22..28].copy_from_slice(&NOBODY);
    vec![
        ("an ARP reply", reply.clone()),
        ("an ARP announcement", arp(1, (own.mac, psc.v4), ([0; 6], psc.v4), BROADCAST)),
        ("an ARP reply about another MAC", by_other),
        ("an ARP reply with a priority", tagged(&reply, &[0x81, 0, 0, 0])),
        ("an ARP reply with a provider's tag", tagged(&reply, &[0x88, 0xa8, 0, 0])),
        ("an ARP reply behind 8100/8100", tagged(&reply, &[0x81, 0, 0, 0, 0x81, 0, 0, 0])),
        ("an ARP reply behind 88a8/8100", tagged(&reply, &[0x88, 0xa8, 0, 0, 0x81, 0, 0, 0])),
        ("an ARP reply behind 8100/88a8", tagged(&reply, &[0x81, 0, 0, 0, 0x88, 0xa8, 0, 0])),
        ("a neighbour advertisement", discovery(136, own.mac, psc.v6, psc.v6)),
        ("a neighbour advertisement of its own address", by_own.clone()),
        ("a neighbour advertisement with a priority", tagged(&by_own, &[0x81, 0, 0, 0])),
        ("a neighbour advertisement behind two tags", tagged(&by_own, &[0x81, 0, 0, 0, 0x81, 0, 0, 0])),
        ("a neighbour advertisement behind options", behind_options(&by_own)),
        ("a neighbour solicitation", solicitation(own.mac, psc.v6, own.v6)),
        ("a neighbour solicitation behind options", behind_options(&solicitation(own.mac, psc.v6, own.v6))),
    ]
}

/// Whether a frame claims the PSC for a guest's MAC, or for nobody's.
fn is_lie(frame: &[u8], own: Own, psc: Psc) -> bool {
    let has = |bytes: &[u8]| frame.windows(bytes.len()).any(|part| part == bytes);
    let source = frame.get(6..12);
    (source == Some(&own.mac) || source == Some(&NOBODY)) && (has(&psc.v4.octets()) || has(&psc.v6.octets()))
}

/// The PSC's MACs in the client's neighbour table.
fn believed(client: &Host) -> Result<Vec<String>> {
    let output = client.run(&["ip", "-j", "neigh", "show"])?;
    let all: Vec<Value> = serde_json::from_slice(&output.stdout).context("ip neigh")?;
    let of_psc = all
        .iter()
        .filter(|entry| entry["dst"].as_str().is_some_and(|dst| dst == "10.77.0.100" || dst == "fd77::100"));
    Ok(of_psc.filter_map(|entry| Some(entry["lladdr"].as_str()?.to_owned())).collect())
}

/// A guest claims in every way to be the PSC; nobody hears it.
pub(super) fn claims(lab: &str, liar: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let (psc, guest) = (Psc::of(&stage)?, stage.lab.domain(liar)?);
    let own = Own::of(&guest)?;
    let load = stage.load("claims")?;
    let target = stage.psc_of_family(Service::Redis, true)?;
    let mut over_v6 = stage.client().run(move || Session::connect(target))?;
    let before = believed(&stage.lab.client())?;
    ensure!(before.len() == 2, "the client does not know the PSC: {before:?}");
    let frames = lies(own, psc);
    let mut heard = Vec::new();
    for (what, frame) in &frames {
        let ear = listen(&stage.client(), "eth0", move |frame| is_lie(frame, own, psc))?;
        let (frame, inside) = (frame.clone(), Place::new(guest.host.netns.clone()));
        inside.run(move || {
            let wire = Wire::open_only()?;
            for _ in 0..3 {
                wire.send(&frame)?;
            }
            Ok(())
        })?;
        sleep(Duration::from_millis(50));
        if ear.end()? > 0 {
            heard.push(*what);
        }
    }
    ensure!(heard.is_empty(), "the client's link saw {liar}'s: {heard:#?}");
    ensure!(believed(&stage.lab.client())? == before, "the client believes {liar}");
    over_v6.ask(&["PING"])?;
    wait_counted(&stage, if liar == "guest-1" { "claims_refused" } else { "contained_frames" }, 3)?;
    if liar == "guest-1" {
        wait_counted(&stage, "claims_refused", 3 * frames.len() as u64)?;
    }
    stage.survives_freeze(load)
}
