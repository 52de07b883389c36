//! A client speaks to a server's own address.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Own, counter, expect_as_before, listen, wait_counted};
use crate::client::frames::{ACK, Mac, PSH, RST, SYN, Segment, arp, tagged};
use crate::client::place::Place;
use crate::client::redis::session::Session;
use crate::client::sniff::Wire;
use crate::host::Service;
use crate::stage::{Stage, own_address};

/// A client of two conversations resets both at a server's own address, beside the PSC: at the replica's, then at the OVM's.
pub(super) fn direct_reset(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("direct")?;
    let target = stage.psc(Service::Redis)?;
    for name in ["guest-2", "guest-1"] {
        let guest = stage.lab.domain(name)?;
        let (own, refused) = (Own::of(&guest)?, counter(&stage, "direct_refused")?);
        let mut sessions = stage.client().run(move || {
            let mut sessions = Vec::new();
            for n in 0..2 {
                let wire = Wire::open_only()?;
                let mut session = Session::connect(target)?;
                session.ask(&["SET", &format!("direct{n}"), "1"])?;
                let local = session.local()?;
                let request =
                    wire.next(Duration::from_secs(1), |seen| seen.from == local && seen.flags & PSH != 0)?;
                let request = request.context("no request was seen on the client's link")?;
                let victim = SocketAddr::new(own.v4.into(), target.port());
                let mut reset = Segment::new(local, victim, RST);
                reset.sequence = request.sequence.wrapping_add(request.payload as u32);
                let frame = reset.frame(wire.mac, own.mac);
                for tags in [&[][..], &[0x81, 0, 0, 0], &[0x81, 0, 0, 0, 0x81, 0, 0, 0]] {
                    wire.send(&tagged(&frame, tags))?;
                }
                sessions.push(session);
            }
            Ok(sessions)
        })?;
        sleep(Duration::from_millis(500));
        for session in &mut sessions {
            session.ask(&["PING"]).with_context(|| format!("after resets to {name}'s own address"))?;
        }
        expect_as_before(&stage, 1)?;
        wait_counted(&stage, "direct_refused", refused + 6)?;
    }
    stage.survives_freeze(load)
}

/// A client's handshake and SET at a server's own address; returns the server's answer.
fn converse_directly(client: &Place, own: Own, port: u16) -> Result<bool> {
    const ME: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 225);
    client.run(move || {
        let wire = Wire::open_only()?;
        let mac = wire.mac;
        let (me, victim) = (SocketAddr::new(ME.into(), port), SocketAddr::new(own.v4.into(), 6379));
        let answer = |limit| {
            wire.next_frame(limit, |frame| {
                let asks = frame.get(12..14) == Some(&[8, 6]) && frame.get(38..42) == Some(&ME.octets());
                if asks
                    && let (Some(Ok(asker)), Some(Ok(address))) =
                        (frame.get(22..28).map(Mac::try_from), frame.get(28..32).map(<[u8; 4]>::try_from))
                {
                    // Nobody else has that address.
                    let _ = wire.send(&arp(2, (mac, ME), (asker, address.into()), asker));
                }
                crate::client::frames::parse(frame).filter(|seen| seen.to == me)
            })
        };
        let mut segment = Segment::new(me, victim, SYN);
        segment.sequence = 1_000;
        wire.send(&segment.frame(mac, own.mac))?;
        let Some(accepted) = answer(Duration::from_millis(1_500))? else { return Ok(false) };
        segment.sequence = 1_001;
        segment.acknowledgment = accepted.sequence.wrapping_add(1);
        segment.flags = ACK;
        wire.send(&segment.frame(mac, own.mac))?;
        segment.flags = ACK | PSH;
        segment.payload = b"SET direct written\r\n".to_vec();
        wire.send(&segment.frame(mac, own.mac))?;
        answer(Duration::from_millis(1_000))?;
        Ok(true)
    })
}

/// Neither a client nor dom0 itself can open a connection to the OVM's own address at the service's port; other ports are not
/// touched.
pub(super) fn direct_conversation(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("direct")?;
    let (ovm, dom0) = (stage.lab.domain("guest-1")?, stage.lab.dom0());
    let own = Own::of(&ovm)?;
    let answered = converse_directly(&stage.client(), own, 40_001)?;
    sleep(Duration::from_millis(500));
    expect_as_before(&stage, 1)?;
    let inside = own_address(&ovm, Service::Redis)?;
    let held = inside.0.run(move || Session::connect(inside.1)?.ask(&["GET", "direct"]))?;
    ensure!(held.text().is_none(), "what was written at the OVM's own address is there: {held:?}");
    ensure!(!answered, "a conversation with the OVM's own address began");
    wait_counted(&stage, "direct_refused", 1)?;
    let from_dom0 = Place::new(dom0.netns.clone());
    let service = SocketAddr::new(own.v4.into(), 6379);
    let connected = from_dom0
        .run(move || Ok(TcpStream::connect_timeout(&service, Duration::from_millis(500)).is_ok()))?;
    ensure!(!connected, "dom0 reaches the OVM's service beside the PSC");
    wait_counted(&stage, "direct_refused", 2)?;
    expect_as_before(&stage, 1)?;
    // A monitor on another port.
    let listener = Place::new(ovm.host.netns.clone()).run(move || Ok(TcpListener::bind((own.v4, 9_100))?))?;
    let monitor = SocketAddr::new(own.v4.into(), 9_100);
    for place in [stage.client(), from_dom0] {
        place.run(move || Ok(TcpStream::connect_timeout(&monitor, Duration::from_secs(2)).map(drop)?))?;
    }
    drop(listener);
    stage.survives_freeze(load)
}

/// With `direct = "allow"`, clients reach the server's own address.
pub(super) fn direct_allowed(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 1, &[Service::Redis]), |config| {
        config.replace("attach =", "direct = \"allow\"\nattach =")
    })?;
    let ovm = stage.lab.domain("guest-1")?;
    let own = Own::of(&ovm)?;
    let ear = listen(&Place::new(ovm.host.netns.clone()), "eth0", |frame| {
        crate::client::frames::parse(frame).is_some_and(|seen| seen.to.port() == 6379 && seen.flags == SYN)
    })?;
    converse_directly(&stage.client(), own, 40_002)?;
    ensure!(ear.end()? == 1, "nobody is heard at the OVM's own address");
    ensure!(counter(&stage, "direct_refused")? == 0, "it was refused");
    Ok(())
}
