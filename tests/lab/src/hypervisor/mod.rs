//! The lab's hypervisor and toolstack: one background process per lab that owns its domains.
//!
//! It keeps `domains.json`, answers on `hypervisor.sock`, and holds xenstored; it makes the faults
//! happen, since only the owner of a domain's state can order its steps.

mod guest;
mod life;
mod nodes;
mod relay;
pub(crate) mod request;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};

use crate::host::{Fault, Group, Host, LabConfig, Link};
use crate::xenstored::Xenstored;

use guest::Guest;
use relay::Relay;
use request::{REQUEST_MAX, Reply, Request, SOCKET};

/// The state of one lab.
#[derive(Debug)]
struct Hypervisor {
    config: LabConfig,
    directory: PathBuf,
    dom0: Host,
    client: Host,
    /// The control group of this process, and of helpers that no freeze may stop.
    helpers: Group,
    xenstored: Mutex<Xenstored>,
    domains: Mutex<Domains>,
    relays: Mutex<BTreeMap<String, Relay>>,
}

#[derive(Debug)]
struct Domains {
    next_domid: u32,
    guests: Vec<Guest>,
    /// Places whose domain is being made, exists, or is still being cleared away.
    taken: Vec<usize>,
}

/// Runs the hypervisor of the lab of this name until it is killed.
pub(crate) fn run(name: &str) -> Result<()> {
    let config = LabConfig::saved(name)?;
    let directory = config.directory();
    let group = crate::host::lab_group(name)?;
    let hypervisor = Arc::new(Hypervisor {
        dom0: Host::new(name, &group, "dom0"),
        client: Host::new(name, &group, "client"),
        helpers: group.inside("hypervisor"),
        xenstored: Mutex::new(Xenstored::new(&directory.join("xenstored.sock"))?),
        domains: Mutex::new(Domains { next_domid: 1, guests: Vec::new(), taken: Vec::new() }),
        relays: Mutex::new(BTreeMap::new()),
        config,
        directory,
    });
    hypervisor.found_host()?;
    let socket = hypervisor.directory.join(SOCKET);
    let listener =
        UnixListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    for stream in listener.incoming() {
        // An error of accept concerns one connection that went away again.
        let Ok(stream) = stream else { continue };
        let hypervisor = Arc::clone(&hypervisor);
        let serve = move || hypervisor.serve(&stream);
        if let Err(error) = std::thread::Builder::new().name("request".to_owned()).spawn(serve) {
            eprintln!("a request could not be served: {error}");
        }
    }
    Ok(())
}

impl Hypervisor {
    /// What is there before any domU.
    fn found_host(&self) -> Result<()> {
        let xenstored = lock(&self.xenstored);
        xenstored.write("/local/domain/0/name", "Domain-0")?;
        xenstored.write("/local/domain/0/domid", "0")?;
        xenstored.write("/tool/xenstored", "")?;
        drop(xenstored);
        self.publish(&lock(&self.domains))
    }

    fn serve(self: &Arc<Self>, mut stream: &UnixStream) {
        let mut lines = BufReader::new(stream);
        loop {
            let mut line = String::new();
            match lines.by_ref().take(REQUEST_MAX).read_line(&mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let outcome = serde_json::from_str(&line)
                .with_context(|| format!("not a request: {}", line.trim_end()))
                .and_then(|request| self.answer(request));
            let reply = outcome.unwrap_or_else(|error| {
                eprintln!("{}: {error:#}", line.trim_end());
                Reply { error: Some(format!("{error:#}")), ..Reply::default() }
            });
            let Ok(mut text) = serde_json::to_string(&reply) else { return };
            text.push('\n');
            if stream.write_all(text.as_bytes()).is_err() {
                return;
            }
        }
    }

    fn answer(self: &Arc<Self>, request: Request) -> Result<Reply> {
        let mut reply = Reply { ok: true, ..Reply::default() };
        match request {
            Request::Pause { domid } => self.pause(domid)?,
            Request::Unpause { domid } => self.unpause(domid)?,
            Request::Destroy { domid } => self.destroy(domid)?,
            Request::List => {
                reply.domains = lock(&self.domains).guests.iter().map(Guest::record).collect();
            }
            Request::Create { name } => reply.domains.push(self.create_named(&name)?),
            Request::Rename { domain, new_name } => self.rename(&domain, &new_name)?,
            Request::Fault { fault, domain, service } => {
                if service.is_some() && !matches!(fault, Fault::Hang | Fault::Kill) {
                    bail!("only hang and kill concern one service; {fault:?} concerns the domain");
                }
                reply.monotonic_ns = Some(self.strike(fault, &domain, service)?);
            }
            Request::Thaw { domain } => self.thaw(&domain)?,
            Request::StartService { domain, service } => self.start_service(&domain, service)?,
            Request::StopService { domain, service } => self.stop_service(&domain, service)?,
            Request::Link { host, link } => self.impair(&host, link)?,
            Request::RestartXenstored { down_for } => {
                let mut xenstored = lock(&self.xenstored);
                xenstored.stop();
                std::thread::sleep(down_for);
                xenstored.start()?;
            }
        }
        Ok(reply)
    }

    fn impair(&self, host: &str, link: Link) -> Result<()> {
        link.check()?;
        let host = match host {
            "client" => self.client.clone(),
            "dom0" => bail!("dom0 has no link of its own: impair the client's or a domain's"),
            domain => lock(&self.domains).find(domain)?.host.clone(),
        };
        let mut relays = lock(&self.relays);
        if link == Link::default() {
            if let Some(relay) = relays.remove(&host.name) {
                relay.remove()?;
            }
        } else if let Some(relay) = relays.get(&host.name) {
            relay.set(link);
        } else {
            relays.insert(host.name.clone(), Relay::insert(&host, self.helpers.clone(), link)?);
        }
        Ok(())
    }

    /// Rewrites `domains.json`; a reader sees the old contents or the new, never a part.
    fn publish(&self, domains: &Domains) -> Result<()> {
        let path = self.directory.join("domains.json");
        let new = self.directory.join(".domains.json.new");
        fs::write(&new, domains.to_json().to_string())
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("writing {}", path.display()))
    }
}

impl Domains {
    fn to_json(&self) -> serde_json::Value {
        let domains: Vec<_> = self.guests.iter().map(Guest::to_json).collect();
        serde_json::json!({ "domains": domains })
    }

    /// By name, domid, UUID or the namespace's `dN`.
    fn find(&mut self, which: &str) -> Result<&mut Guest> {
        let known: Vec<String> = self.guests.iter().map(|guest| guest.name.clone()).collect();
        self.guests
            .iter_mut()
            .find(|guest| guest.is(which))
            .with_context(|| format!("the lab has no domain \"{which}\"; there are: {}", known.join(", ")))
    }

    fn of_domid(&mut self, domid: u32) -> Result<&mut Guest> {
        self.guests
            .iter_mut()
            .find(|guest| guest.domid == domid)
            .with_context(|| format!("no domain has the domid {domid}"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic of one request must not take the lab's other domains with it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
