//! The lab's clients against one server over a plain bridge, without dom0d: they report no error where
//! there is none, and every error where there is one.

use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Scenario;
use super::transfer::{LARGE, read_half_closed};
use crate::client::http;
use crate::client::place::Place;
use crate::client::redis::load::Plan;
use crate::client::redis::session::Session;
use crate::client::redis::verify::verify;
use crate::host::{Fault, Lab, LabConfig, Link, Service};
use crate::stage::{Stage, own_address};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("plain/everything-right", everything_right),
        Scenario::new("plain/loss", loss),
        Scenario::new("plain/wrong-answer-is-found", wrong_answer),
        Scenario::new("plain/lost-write-is-found", lost_write),
        Scenario::new("plain/death-is-found", death),
    ]
}

fn up(lab: &str, services: &[Service]) -> Result<Lab> {
    let plan = LabConfig { large_file_bytes: 100_000_000, ..Stage::plan(lab, 0, services) };
    Lab::up(plan, &|line| println!("  {line}"))
}

fn client(lab: &Lab) -> Place {
    Place::new(lab.client().netns)
}

/// Every workload, over IPv4 and IPv6.
fn everything_right(lab: &str) -> Result<()> {
    let lab = up(lab, &Service::ALL)?;
    let guest = lab.domain("guest-1")?;
    for address in guest.addresses.clone() {
        let at = |service: Service| SocketAddr::new(address, service.port());
        let mut plan = Plan::new(at(Service::Redis), &format!("plain-{address}"));
        plan.connections = 200;
        plan.busy = 50;
        plan.depth = 8;
        let load = plan.start(&client(&lab))?;
        load.wait_answers(10_000, Duration::from_secs(20))?;
        let outcome = load.finish()?;
        ensure!(outcome.troubles() == 0, "troubles where there are none: {:#?}", outcome.errors);
        let (place, own) = own_address(&guest, Service::Redis)?;
        let verdict = verify(&place, own, &outcome)?;
        ensure!(verdict.wrong.is_empty(), "{:#?}", verdict.wrong);

        let bytes = lab.config().large_file_bytes;
        let down = http::download(&client(&lab), at(Service::Http), LARGE)?.finish()?;
        ensure!(down.bytes == bytes, "{} bytes came", down.bytes);
        let up = http::upload(&client(&lab), at(Service::Http), "/upload/a", bytes, 1)?.finish()?;
        ensure!(up.sha256 == http::upload_sha256(bytes, 1), "the upload's own hash differs");
        ensure!(http::file_sha256(&guest.uploaded("a"))? == up.sha256, "the file differs");

        let target = at(Service::Postgresql);
        let read = |target| client(&lab).run(move || read_half_closed(target, &AtomicU64::new(0)));
        ensure!(read(target)? == read(target)?, "two half-closed sessions differ");
    }
    Ok(())
}

/// An impaired link makes clients slower, and nothing wrong.
fn loss(lab: &str) -> Result<()> {
    let lab = up(lab, &[Service::Redis])?;
    let link = Link { loss: 0.01, duplicate: 0.01, reorder: 0.01, ..Link::default() };
    lab.link("client", link)?;
    let (place, own) = own_address(&lab.domain("guest-1")?, Service::Redis)?;
    let mut plan = Plan::new(own, "lossy");
    plan.depth = 8;
    let load = plan.start(&client(&lab))?;
    load.wait_answers(5_000, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    ensure!(outcome.troubles() == 0, "{:#?}", outcome.errors);
    ensure!(verify(&place, own, &outcome)?.wrong.is_empty(), "the server differs");
    Ok(())
}

/// Somebody changes a client's data behind its back.
fn wrong_answer(lab: &str) -> Result<()> {
    let lab = up(lab, &[Service::Redis])?;
    let (place, own) = own_address(&lab.domain("guest-1")?, Service::Redis)?;
    let load = Plan::new(own, "tampered").start(&client(&lab))?;
    load.wait_answers(500, Duration::from_secs(20))?;
    place.run(move || Session::connect(own)?.ask(&["INCRBY", "tampered:3:n", "1000"]))?;
    while load.broken() == 0 {
        load.wait_answers(100, Duration::from_secs(20))?;
    }
    let outcome = load.finish()?;
    ensure!(
        outcome.wrong_answers == 1,
        "found {} wrong answers: {:#?}",
        outcome.wrong_answers,
        outcome.errors
    );
    Ok(())
}

/// The server forgets what it has acknowledged.
fn lost_write(lab: &str) -> Result<()> {
    let lab = up(lab, &[Service::Redis])?;
    let (place, own) = own_address(&lab.domain("guest-1")?, Service::Redis)?;
    let load = Plan::new(own, "forgotten").start(&client(&lab))?;
    load.wait_answers(1_000, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    place.run(move || Session::connect(own)?.ask(&["RPOP", "forgotten:2:list"]))?;
    let verdict = verify(&place, own, &outcome)?;
    ensure!(verdict.lost_writes == 1 && verdict.wrong.len() == 1, "{verdict:?}");
    Ok(())
}

/// The server's process dies, and nobody takes over.
fn death(lab: &str) -> Result<()> {
    let lab = up(lab, &[Service::Redis])?;
    let (_, own) = own_address(&lab.domain("guest-1")?, Service::Redis)?;
    let load = Plan::new(own, "killed").start(&client(&lab))?;
    load.wait_answers(500, Duration::from_secs(20))?;
    lab.fault(Fault::Kill, "guest-1")?;
    let outcome = load.finish()?;
    ensure!(
        outcome.closed + outcome.resets == 8,
        "8 connections broke, {} were noticed: {:#?}",
        outcome.closed + outcome.resets,
        outcome.errors
    );
    Ok(())
}
