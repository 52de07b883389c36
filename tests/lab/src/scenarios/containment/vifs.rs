//! Vifs come, go, and are more than one.

use std::net::UdpSocket;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::super::bridge::Psc;
use super::{Babble, depose, ear_for, expect_as_before, isolating, listen};
use crate::client::place::Place;
use crate::host::{BRIDGE, Domain, Lab, Service};
use crate::stage::Stage;

/// Sets a vif's backend node in xenstore to the state that follows from a netfront's.
fn set_backend_state(lab: &Lab, guest: &Domain, state: u32) -> Result<()> {
    let path = format!("/local/domain/0/backend/vif/{}/0/state", guest.domid);
    write_nodes(lab, &[(path, state.to_string())])
}

fn write_nodes(lab: &Lab, nodes: &[(String, String)]) -> Result<()> {
    let mut command = std::process::Command::new("xenstore-write");
    command.env("XENSTORED_PATH", lab.directory().join("xenstored.sock"));
    for (path, value) in nodes {
        command.arg(path).arg(value);
    }
    let output = command.output().context("xenstore-write (package xenstore-utils)")?;
    ensure!(output.status.success(), "xenstore-write: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A replica's netfront closes and connects again and again, while the guest sends; nobody hears it.
fn toggle(stage: &Stage, guest: &Domain) -> Result<()> {
    let psc = Psc::of(stage)?;
    let ear = ear_for(stage, guest)?;
    let babble = Babble::begin(guest, "eth0", psc)?;
    for _ in 0..4 {
        for state in [5, 6, 2, 4] {
            set_backend_state(&stage.lab, guest, state)?;
            sleep(Duration::from_millis(120));
        }
    }
    // Away for good, its interface as it was.
    set_backend_state(&stage.lab, guest, 6)?;
    sleep(Duration::from_millis(500));
    babble.end()?;
    let heard = ear.end()?;
    ensure!(heard == 0, "{heard} frames of {} reached the client's link", guest.name);
    Ok(())
}

pub(super) fn toggling_replica(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let load = stage.load("toggles")?;
    toggle(&stage, &stage.lab.domain("guest-2")?)?;
    expect_as_before(&stage, 1)?;
    stage.survives_freeze(load)
}

/// The same for a deposed OVM that is fenced by isolation.
pub(super) fn toggling_isolated(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis]), isolating)?;
    let load = stage.load("toggles")?;
    depose(&stage, "isolate")?;
    toggle(&stage, &stage.lab.domain("guest-1")?)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// Gives a guest another vif, a port of this bridge, with its nodes in xenstore.
fn plug_second(stage: &Stage, guest: &Domain, bridge: &str) -> Result<()> {
    let dom0 = stage.lab.dom0();
    let vif = format!("vif{}.1", guest.domid);
    let backend = format!("/local/domain/0/backend/vif/{}/1", guest.domid);
    let frontend = format!("/local/domain/{}/device/vif/1", guest.domid);
    let nodes = [
        ("frontend", frontend.as_str()),
        ("frontend-id", &guest.domid.to_string()),
        ("online", "1"),
        ("mac", "00:16:3e:77:02:01"),
        ("bridge", bridge),
        ("handle", "1"),
        ("vifname", &vif),
        ("state", "2"),
    ];
    let nodes = nodes.map(|(key, value)| (format!("{backend}/{key}"), value.to_owned()));
    write_nodes(&stage.lab, &nodes)?;
    let master = if bridge.is_empty() { String::new() } else { format!("ip link set {vif} master {bridge}") };
    let script = format!(
        "set -e; ip link add {vif} type veth peer name eth1 netns {inside}
         echo 1 > /proc/sys/net/ipv6/conf/{vif}/disable_ipv6
         ip link set {vif} address fe:ff:ff:ff:ff:ff arp off; {master}
         ip link set {vif} up; ip netns exec {inside} ip link set eth1 address 00:16:3e:77:02:01 up",
        inside = guest.host.netns
    );
    dom0.run(&["sh", "-c", &script])?;
    write_nodes(&stage.lab, &[(format!("{backend}/state"), "4".to_owned())])
}

/// A replica's second vif is contained like the first, and before it is up; the OVM's is free, except to claim the PSC.
pub(super) fn second_vif(lab: &str, bridge: &'static str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("second")?;
    let (dom0, psc, replica) = (stage.lab.dom0(), Psc::of(&stage)?, stage.lab.domain("guest-2")?);
    let (ear_place, ear_at) = if bridge == BRIDGE {
        (stage.client(), "eth0")
    } else {
        let script = "set -e; ip link add xenbr1 type bridge stp_state 0 forward_delay 0; ip link set xenbr1 up
            ip link add other type veth peer name otherend; ip link set other master xenbr1 up; ip link set otherend up";
        dom0.run(&["sh", "-c", script])?;
        (Place::new(dom0.netns.clone()), "otherend")
    };
    let mac = [0x00, 0x16, 0x3e, 0x77, 0x02, 0x01];
    let from_second = move |frame: &[u8]| frame.get(6..12) == Some(&mac);
    plug_second(&stage, &replica, bridge)?;
    // What xenstore tells is known by then.
    sleep(Duration::from_millis(500));
    let ear = listen(&ear_place, ear_at, from_second)?;
    let babble = Babble::begin(&replica, "eth1", psc)?;
    sleep(Duration::from_millis(500));
    babble.end()?;
    let heard = ear.end()?;
    ensure!(heard == 0, "{heard} frames of the replica's second vif were heard on {bridge}");
    stage.until("the second vif is known", Duration::from_secs(5), |status| {
        status.services.iter().flat_map(|service| &service.contained).any(|vif| vif.ends_with(".1"))
    })?;
    expect_as_before(&stage, 1)?;

    // Once it serves, it may talk there.
    stage.operator.order(&["switchover", "redis"])?;
    sleep(Duration::from_millis(500));
    let ear = listen(&ear_place, ear_at, from_second)?;
    let lie = listen(&ear_place, ear_at, move |frame| {
        from_second(frame) && frame.windows(4).any(|part| part == psc.v4.octets())
    })?;
    let babble = Babble::begin(&replica, "eth1", psc)?;
    sleep(Duration::from_millis(500));
    babble.end()?;
    ensure!(ear.end()? > 100, "the OVM's second vif is cut off");
    ensure!(lie.end()? == 0, "the OVM speaks for the PSC through its second vif");
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// A replica's second vif is routed and no port of a bridge: dom0 itself hears it only once the domain serves.
pub(super) fn second_vif_routed(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("routed")?;
    let (dom0, replica) = (stage.lab.dom0(), stage.lab.domain("guest-2")?);
    plug_second(&stage, &replica, "")?;
    dom0.run(&["ip", "address", "add", "10.99.0.1/24", "dev", &format!("vif{}.1", replica.domid)])?;
    replica.run(&["ip", "address", "add", "10.99.0.2/24", "dev", "eth1"])?;
    // The vif answers no ARP.
    let vif_mac = "fe:ff:ff:ff:ff:ff";
    replica.run(&["ip", "neigh", "replace", "10.99.0.1", "lladdr", vif_mac, "dev", "eth1"])?;
    let heard = || {
        let socket = Place::new(dom0.netns.clone()).run(|| Ok(UdpSocket::bind("10.99.0.1:9000")?))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        Place::new(replica.host.netns.clone()).run(|| {
            UdpSocket::bind("10.99.0.2:0")?.send_to(b"hello", "10.99.0.1:9000")?;
            Ok(())
        })?;
        Ok::<_, anyhow::Error>(socket.recv(&mut [0; 8]).is_ok())
    };
    ensure!(!heard()?, "dom0 hears what the replica sends through a routed vif");
    expect_as_before(&stage, 1)?;
    stage.operator.order(&["switchover", "redis"])?;
    sleep(Duration::from_millis(500));
    ensure!(heard()?, "dom0 does not hear the OVM");
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// A vif with its backend in a driver domain can't be contained: the domain does not become a replica, and the status says why.
pub(super) fn second_vif_refused(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let load = stage.load("elsewhere")?;
    let replica = stage.lab.domain("guest-2")?;
    let node = format!("/libxl/{}/device/vif/1/backend", replica.domid);
    write_nodes(&stage.lab, &[(node, format!("/local/domain/77/backend/vif/{}/1", replica.domid))])?;
    // What tells dom0d to list anew.
    set_backend_state(&stage.lab, &replica, 4)?;
    stage.until("guest-2 is refused", Duration::from_secs(5), |status| {
        let known = status.services.iter().flat_map(|service| &service.known);
        known.into_iter().any(|known| {
            let said = ["vif 1", "another domain", "understudy detach"];
            known.domain.name == "guest-2" && said.iter().all(|part| known.reason.contains(part))
        })
    })?;
    expect_as_before(&stage, 1)?;
    // It is held all the same, until the operator lets it go.
    let is_heard = || {
        let ear = ear_for(&stage, &replica)?;
        let babble = Babble::begin(&replica, "eth0", Psc::of(&stage)?)?;
        sleep(Duration::from_millis(500));
        babble.end()?;
        Ok::<_, anyhow::Error>(ear.end()? > 0)
    };
    ensure!(!is_heard()?, "a domain that is refused is heard");
    stage.operator.order(&["detach", "redis", "guest-2"])?;
    sleep(Duration::from_millis(500));
    ensure!(is_heard()?, "a domain that was detached is not heard");
    stage.survives_freeze(load)
}
