//! A service that opens connections itself: nginx passes requests to a backend. A replica's nginx gets no answer there, and
//! dom0d says so. Connections that the operator allows or tolerates change nothing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Scenario;
use crate::host::{Fault, PROXIED, Service};
use crate::stage::Stage;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("own-connections/refused", |lab| asks(lab, "", Means::Refused)),
        Scenario::new("own-connections/tolerated", |lab| {
            asks(lab, "own_connections = \"tolerate\"", Means::Tolerated)
        }),
        Scenario::new("own-connections/allowed", |lab| {
            asks(lab, &format!("allow = [\"tcp/{}\"]", PROXIED.port()), Means::Allowed)
        }),
    ]
}

/// What the operator decided about a replica's own connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Means {
    Refused,
    Tolerated,
    Allowed,
}

/// Answers one request on each connection, and counts them.
fn backend(stage: &Stage) -> Result<Arc<AtomicU64>> {
    let served = Arc::new(AtomicU64::new(0));
    let counter = served.clone();
    let listener = stage.client().run(|| Ok(TcpListener::bind(PROXIED)?))?;
    std::thread::Builder::new().name("backend".to_owned()).spawn(move || {
        for mut stream in listener.incoming().flatten() {
            counter.fetch_add(1, Ordering::Relaxed);
            let _ = stream.read(&mut [0; 4_096]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nasked");
        }
    })?;
    Ok(served)
}

fn ask(psc: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(psc)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET /proxied/ HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn asks(lab: &str, option: &str, means: Means) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 1, &[Service::Http]), |config| {
        config.replace("attach =", &format!("{option}\nattach ="))
    })?;
    let served = backend(&stage)?;
    let psc = stage.psc(Service::Http)?;
    let answer = stage.client().run(move || ask(psc))?;
    ensure!(answer.ends_with("asked"), "the OVM's answer is {answer:?}");
    let limit = Duration::from_secs(5);
    if means == Means::Allowed {
        stage.until("the replica asks as well", limit, |_| served.load(Ordering::Relaxed) == 2)?;
        ensure!(stage.events.since("own_connection", "http", 0).is_empty(), "what passes was told");
        return Ok(());
    }
    let event = stage.events.wait("own_connection", "http", 0, limit)?;
    ensure!(
        event.domain("server").as_deref() == Some("guest-2")
            && event.text("to") == Some(PROXIED.to_string().as_str()),
        "not what the replica did: {event:?}"
    );
    ensure!(served.load(Ordering::Relaxed) == 1, "the replica reached the backend");
    if means == Means::Tolerated {
        ensure!(stage.operator.service("http")?.promotable() == 1, "what is tolerated was held against it");
        return Ok(());
    }
    stage.until("guest-2 not promotable", limit, |status| status.services[0].promotable() == 0)?;
    let service = stage.operator.service("http")?;
    let said = service.problems.join("; ");
    ensure!(said.contains("guest-2") && said.contains(&PROXIED.to_string()), "status says {said:?}");
    let why = service.servers.iter().find_map(|server| server.why.clone()).unwrap_or_default();
    ensure!(why.contains("connections of its own"), "guest-2 is not promotable since {why:?}");
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let refusal = stage.events.wait("no_candidate", "http", at.monotonic_ns / 1_000, limit)?;
    println!("  no candidate: {:?}", refusal.what.get("because"));
    Ok(())
}
