//! Frames of other VLANs reach neither side of a service, and are counted. That a service works in a VLAN is among the
//! failovers (`matrix`).

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Scenario;
use crate::client::frames::{ACK, Mac, SYN, Segment, tagged};
use crate::client::place::{Place, join};
use crate::client::sniff::Wire;
use crate::host::{LabConfig, Service, Vlan};
use crate::stage::{Stage, own_address};

/// A lab's VLAN, tags that its service refuses, and one that it takes.
struct Tags {
    vlan: Option<Vlan>,
    others: &'static [&'static [u8]],
    own: &'static [u8],
}

const IN_A_VLAN: Tags = Tags {
    vlan: Some(Vlan { id: 5, filtered: false }),
    others: &[
        &[0x81, 0, 0, 7],
        // A priority, and no VLAN.
        &[0x81, 0, 0xe0, 0],
        // A provider's, and one in that.
        &[0x88, 0xa8, 0, 5],
        &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 5],
        &[0x81, 0, 0, 5, 0x81, 0, 0, 5],
    ],
    own: &[0x81, 0, 0xe0, 5],
};

const WITHOUT: Tags = Tags {
    vlan: None,
    others: &[&[0x81, 0, 0, 7], &[0x88, 0xa8, 0, 0], &[0x81, 0, 0, 5, 0x81, 0, 0, 5]],
    own: &[0x81, 0, 0xe0, 0],
};

/// Frames sent with each tag.
const TIMES: u16 = 3;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("vlan/others-are-refused", |lab| refused(lab, &IN_A_VLAN)),
        Scenario::new("vlan/others-are-refused/untagged", |lab| refused(lab, &WITHOUT)),
        Scenario::new("vlan/psc-is-nobody-elses", nobody_elses),
    ]
}

fn up(lab: &str, vlan: Option<Vlan>) -> Result<Stage> {
    Stage::up_with(LabConfig { vlan, ..Stage::plan(lab, 1, &[Service::Redis]) }, |config| config)
}

fn refused(lab: &str, tags: &Tags) -> Result<()> {
    let stage = up(lab, tags.vlan)?;
    let load = stage.load("vlan")?;
    let (psc, psc_mac) = (stage.psc(Service::Redis)?, stage.psc_mac(Service::Redis)?);
    for (n, tag) in tags.others.iter().enumerate() {
        let before = counted(&stage)?;
        let answered = knock(&stage.client(), tag, 50_000 + n as u16 * TIMES, (psc, psc_mac))?;
        ensure!(answered == 0, "{answered} SYNs with the tag {tag:02x?} were answered");
        let refused = counted(&stage)?.0 - before.0;
        ensure!(refused == u64::from(TIMES), "of {TIMES} with the tag {tag:02x?} {refused} are counted");
    }
    let answered = knock(&stage.client(), tags.own, 60_000, (psc, psc_mac))?;
    ensure!(answered == TIMES, "{answered} of {TIMES} SYNs with the tag {:02x?} were answered", tags.own);

    let guest = stage.lab.domain("guest-1")?;
    let (inside, own) = own_address(&guest, Service::Redis)?;
    let client = stage.client();
    for tag in tags.others {
        let before = counted(&stage)?;
        let heard = client.spawn("listener", move || {
            let wire = Wire::open_only()?;
            Ok(wire.next(Duration::from_millis(500), |seen| seen.from == own)?.is_some())
        })?;
        std::thread::sleep(Duration::from_millis(100));
        let tag_there = *tag;
        inside.run(move || {
            let wire = Wire::open_only()?;
            let segment = Segment::new(own, "10.77.0.1:40000".parse()?, ACK);
            for _ in 0..TIMES {
                wire.send(&tagged(&segment.frame(wire.mac, [0xff; 6]), tag_there))?;
            }
            Ok(())
        })?;
        let heard = join(heard)?;
        let after = counted(&stage)?;
        // Which of both counts depends on the plane.
        let refused = (after.0 - before.0).max(after.1 - before.1);
        println!(
            "  the OVM's with the tag {tag:02x?}: {refused} refused, reached the client's link: {heard}"
        );
        if tag.len() == 4 && tag[0] == 0x81 {
            ensure!(!heard, "the client's link saw the OVM's segment with the tag {tag:02x?}");
            ensure!(refused == u64::from(TIMES), "{refused} of {TIMES} are counted");
        }
    }
    stage.survives_freeze(load)
}

/// Frames of other VLANs that were refused: by the daemon, and by the programs in the kernel if there are any.
fn counted(stage: &Stage) -> Result<(u64, u64)> {
    // What was sent a moment ago is counted by then.
    std::thread::sleep(Duration::from_millis(100));
    let counters = stage.operator.service("redis")?.plane_counters;
    let of = |name: &str| counters.get(name).copied().unwrap_or_default();
    Ok((of("other_vlan_refused"), of("other_vlan")))
}

/// Sends SYNs with this tag from ports of their own; says how many are answered.
fn knock(client: &Place, tag: &'static [u8], port: u16, (psc, psc_mac): (SocketAddr, Mac)) -> Result<u16> {
    client.run(move || {
        let wire = Wire::open_only()?;
        let mut answered = 0;
        for port in port..port + TIMES {
            let from = SocketAddr::from(([10, 77, 0, 1], port));
            let segment = Segment::new(from, psc, SYN);
            wire.send(&tagged(&segment.frame(wire.mac, psc_mac), tag))?;
            let answer = wire.next(Duration::from_millis(300), |seen| seen.from == psc && seen.to == from)?;
            answered += u16::from(answer.is_some());
        }
        Ok(answered)
    })
}

/// A guest claims the PSC's address, in the VLAN and without a tag: nobody on the bridge hears it.
fn nobody_elses(lab: &str) -> Result<()> {
    let stage = up(lab, IN_A_VLAN.vlan)?;
    let load = stage.load("nobody")?;
    for guest in stage.lab.domains()? {
        let (inside, _) = own_address(&guest, Service::Redis)?;
        inside.run(|| {
            let wire = Wire::open_only()?;
            let psc = [10, 77, 0, 100];
            let mut frame = [&[0xff; 6][..], &wire.mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
            frame.extend([&wire.mac[..], &psc, &[0; 6], &psc].concat());
            wire.send(&frame).map(drop)
        })?;
    }
    std::thread::sleep(Duration::from_millis(100));
    let heard = stage.operator.service("redis")?.plane_counters.get("psc_conflicts").copied();
    ensure!(heard == Some(0), "claims to the PSC's address that its port of the bridge heard: {heard:?}");
    stage.survives_freeze(load)
}
