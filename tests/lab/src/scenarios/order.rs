//! Two clients whose writes to one key are ordered by each other's answers: a replica must see that
//! order too, also when it is slow.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::client::redis::session::{Answer, Session};
use crate::host::{Fault, Link, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, own_address};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("order/one-key/quick-replica", |lab| one_key(lab, Link::default(), 2_000)),
        Scenario::new("order/one-key/slow-replica", |lab| one_key(lab, slow(), 150)),
        Scenario::new("order/many-clients/slow-replica", |lab| many(lab, slow())),
        Scenario::new("order/read-decides-write/slow-replica", |lab| read_decides(lab, slow())),
    ]
}

/// Much slower than the OVM, not slow enough to be evicted.
fn slow() -> Link {
    Link { delay: Duration::from_millis(5), ..Link::default() }
}

fn integer(answer: Answer) -> Result<i64> {
    match answer {
        Answer::Integer(n) => Ok(n),
        other => anyhow::bail!("expected a number, got {other:?}"),
    }
}

/// A appends, sees the answer, tells B, B appends, sees the answer, tells A, and so on. The OVM
/// freezes in the middle, at a moment at which a slow replica is far behind.
fn one_key(lab: &str, replica_link: Link, rounds: usize) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    stage.lab.link("guest-2", replica_link)?;
    let target = stage.psc(Service::Redis)?;
    let open = || stage.client().run(move || Session::connect(target));
    let mut clients = [open()?, open()?];
    let mut expected = String::new();
    let mut failover = None;
    for round in 0..rounds {
        for (client, session) in clients.iter_mut().enumerate() {
            let token = format!("{}{round},", if client == 0 { 'a' } else { 'b' });
            expected.push_str(&token);
            let length = integer(session.ask(&["APPEND", "shared", &token])?)?;
            ensure!(
                length == expected.len() as i64,
                "after {token} the length is {length}, not {}: an append was lost or doubled",
                expected.len()
            );
        }
        if round == rounds / 2 {
            let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
            failover = Some(at);
        }
    }
    let at = failover.context("the rounds were too few for a fault")?;
    Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?.expect_plausible()?;
    let held = clients[0].ask(&["GET", "shared"])?.text();
    ensure!(held.as_deref() == Some(expected.as_str()), "the promoted server saw another order");
    Ok(())
}

/// Eight clients pass a token round; whoever has it appends. Then every replica must hold the same.
fn many(lab: &str, replica_link: Link) -> Result<()> {
    let stage = Stage::up(lab, 3, &[Service::Redis])?;
    for guest in ["guest-2", "guest-4"] {
        stage.lab.link(guest, replica_link)?;
    }
    let target = stage.psc(Service::Redis)?;
    let mut clients =
        (0..8).map(|_| stage.client().run(move || Session::connect(target))).collect::<Result<Vec<_>>>()?;
    let mut expected = String::new();
    for round in 0..30 {
        for (n, session) in clients.iter_mut().enumerate() {
            let token = format!("{n}:{round},");
            expected.push_str(&token);
            let length = integer(session.ask(&["APPEND", "shared", &token])?)?;
            ensure!(length == expected.len() as i64, "an append was lost or doubled");
        }
    }
    stage.until("no replica behind", Duration::from_secs(20), |status| {
        status.services[0].servers.iter().all(|s| s.behind_bytes == 0)
    })?;
    for domain in stage.lab.domains()? {
        let (place, address) = own_address(&domain, Service::Redis)?;
        let held = place.run(move || Session::connect(address)?.ask(&["GET", "shared"]))?;
        ensure!(held.text().as_deref() == Some(expected.as_str()), "{} saw another order", domain.name);
    }
    Ok(())
}

/// B writes what A's write let it read; on a replica that carried B's out first, B's read would
/// have found something else and diverge.
fn read_decides(lab: &str, replica_link: Link) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    stage.lab.link("guest-2", replica_link)?;
    let target = stage.psc(Service::Redis)?;
    let open = || stage.client().run(move || Session::connect(target));
    let (mut a, mut b) = (open()?, open()?);
    for n in 0..100 {
        let value = format!("value-{n}");
        a.ask(&["SET", "flag", &value])?;
        let read = b.ask(&["GET", "flag"])?.text().unwrap_or_default();
        ensure!(read == value, "B reads {read}, A wrote {value}");
        b.ask(&["RPUSH", "seen", &read])?;
    }
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let length = integer(b.ask(&["LLEN", "seen"])?)?;
    ensure!(length == 100, "the promoted server holds {length} of 100 items");
    Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?.expect_plausible()?;
    ensure!(
        stage.events.since("diverged", "redis", 0).is_empty(),
        "the replica answered differently: it saw another order"
    );
    Ok(())
}
