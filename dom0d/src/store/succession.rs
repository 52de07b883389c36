//! How does a dom0d go on where one that was killed has stopped? The engine does the same for the same inputs, so
//! each is written down before the engine has it, and a successor repeats them. What the engine then wants was
//! done already, except what had not been written down as done: that is done again, and is harmless twice.

use std::io;
use std::net::IpAddr;
use std::ops::Deref;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use understudy_api::config;
use understudy_protocol::{
    Input, Instant, OperatorError, Output, Passage, Repetition, ServerId, Service, ServiceConfig,
};

pub(crate) use super::journal::{Lost, remove};

use super::journal::Journal;

/// What is written down, in order.
#[derive(Debug, Serialize, Deserialize)]
enum Record<'a> {
    /// What the engine was told.
    Input {
        now: Instant,
        #[serde(borrow)]
        input: Input<'a>,
    },
    /// A packet of a replica that repeats what the OVM said, but for those bytes.
    Repeating {
        now: Instant,
        server: ServerId,
        passage: Passage,
        #[serde(borrow, with = "serde_bytes")]
        head: &'a [u8],
        tail: Repetition,
    },
    /// The engine was polled this often, and what came of that was carried out.
    Polled { now: Instant, count: u32 },
    /// What a successor must know beside the engine.
    Surroundings(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
}

/// The protocol engine of one service, which can be followed by another process's.
pub(crate) struct Engine {
    service: Service,
    journal: Option<Journal>,
    surroundings: Vec<u8>,
    /// A cutover is under way.
    urgent: bool,
}

/// What an earlier process knew, and left.
pub(crate) struct Left {
    /// As it was.
    pub(crate) engine: Engine,
    /// Inputs repeated for that.
    pub(crate) repeated: usize,
}

/// What conversations, and the maps that the kernel keeps, depend on. Who leaves under one of these can be followed only
/// under the same; every other key of the configuration may change in between.
#[derive(Serialize)]
struct Basis<'a> {
    layout: &'a str,
    psc: &'a [IpAddr],
    psc_mac: [u8; 6],
    ports: &'a [u16],
    conversations: u32,
    vlan: Option<u16>,
    bridge: Option<&'a str>,
}

/// Stands for the [`Basis`] of a service: the beginning of its SHA-256.
pub(crate) fn digest(config: &config::Service) -> u64 {
    let basis = Basis {
        layout: understudy_bpf::LAYOUT,
        psc: &config.engine.psc,
        psc_mac: config.psc_mac,
        ports: &config.engine.ports,
        conversations: config.engine.limits.conversations,
        vlan: config.vlan,
        bridge: config.bridge.as_deref(),
    };
    // Into memory, nothing of it can fail to be written.
    let bytes = postcard::to_stdvec(&basis).unwrap_or_default();
    Sha256::digest(bytes).first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

impl Engine {
    /// An engine that nobody can follow.
    pub(crate) fn new(config: ServiceConfig) -> Self {
        Self::around(Service::new(config))
    }

    fn around(service: Service) -> Self {
        Self { service, journal: None, surroundings: Vec::new(), urgent: false }
    }

    /// The engine that an earlier process left in files named after `base`, under this configuration from now on. See
    /// [`digest`].
    pub(crate) fn left(base: &Path, digest: u64, config: ServiceConfig) -> Result<Left, Lost> {
        let journal = Journal::left(base, digest)?;
        // Under the configuration that it was saved with: what was heard since is to have the same consequences.
        let mut engine = Self::around(Service::restore(journal.snapshot()?)?);
        let mut repeated = 0;
        for record in journal.records()? {
            engine.repeat(postcard::from_bytes(record).map_err(|_| Lost::Damaged)?)?;
            repeated += 1;
        }
        engine.service.reconfigure(config)?;
        engine.journal = Some(journal);
        engine.turn();
        Ok(Left { engine, repeated })
    }

    /// From now on another process can follow, by files named after `base`.
    pub(crate) fn begin_journal(&mut self, base: &Path, digest: u64) -> io::Result<()> {
        self.journal = Some(Journal::begin(base, digest, |room| self.service.save_in(room))?);
        Ok(())
    }

    /// Whether another process can follow.
    pub(crate) fn is_journaled(&self) -> bool {
        self.journal.is_some()
    }

    /// What was last known beside the engine, as it was given.
    pub(crate) fn surroundings(&self) -> &[u8] {
        &self.surroundings
    }

    /// What a successor must know beside the engine from now on.
    pub(crate) fn set_surroundings(&mut self, surroundings: Vec<u8>) {
        if surroundings != self.surroundings {
            self.surroundings = surroundings;
            let surroundings = std::mem::take(&mut self.surroundings);
            self.note(&Record::Surroundings(&surroundings));
            self.surroundings = surroundings;
        }
    }

    fn has_time(&self) -> bool {
        !self.urgent && !self.service.is_recuperating()
    }

    /// Writes a record, before the engine has what it tells of.
    fn note(&mut self, record: &Record<'_>) {
        if self.journal.as_ref().is_some_and(Journal::is_due) && self.has_time() {
            self.turn();
        }
        if !self.add(record) {
            self.turn();
            if !self.add(record) {
                self.give_up("an input is larger than the journal");
            }
        }
    }

    /// Whether there was room for it, or none was needed.
    fn add(&mut self, record: &Record<'_>) -> bool {
        let Some(journal) = &mut self.journal else { return true };
        journal.add(|room| postcard::to_slice(record, room).ok().map(|written| written.len()))
    }

    /// Writes down all that is known now, in place of what led to it.
    fn turn(&mut self) {
        let Some(journal) = &mut self.journal else { return };
        let turned = journal.turn(|room| self.service.save_in(room));
        let surroundings = std::mem::take(&mut self.surroundings);
        match turned {
            Ok(()) if self.add(&Record::Surroundings(&surroundings)) => {}
            Ok(()) => self.give_up("the servers are larger than the journal"),
            Err(error) => self.give_up(&error.to_string()),
        }
        self.surroundings = surroundings;
    }

    fn give_up(&mut self, error: &str) {
        let service = &self.service.config().name;
        tracing::error!(
            service,
            error,
            "no successor can follow this dom0d: if it is killed, replicas must be seeded again; is there room in /run?"
        );
        if let Some(journal) = self.journal.take() {
            journal.give_up();
        }
    }

    fn repeat(&mut self, record: Record<'_>) -> Result<(), Lost> {
        let service = &mut self.service;
        // What was refused then is refused now.
        match record {
            Record::Input { now, input } => drop(service.handle(now, input)),
            Record::Repeating { now, server, passage, head, tail } => {
                let packet = [head, &service.recall(&tail).ok_or(Lost::Damaged)?].concat();
                let _ = service.handle(now, Input::Server { server, passage, packet: &packet });
            }
            Record::Polled { now, count } => {
                for _ in 0..count {
                    let _ = service.poll(now);
                }
            }
            Record::Surroundings(surroundings) => surroundings.clone_into(&mut self.surroundings),
        }
        Ok(())
    }
}

impl understudy_driver::Engine for Engine {
    fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), OperatorError> {
        if self.journal.is_some() {
            self.note(&match input {
                Input::Server { server, passage, packet } => match self.service.repetition(server, packet) {
                    Some((head, tail)) => Record::Repeating { now, server, passage, head, tail },
                    None => Record::Input { now, input: Input::Server { server, passage, packet } },
                },
                ref input => Record::Input { now, input: input.clone() },
            });
        }
        self.service.handle(now, input)
    }

    fn poll(&mut self, now: Instant) -> Option<Output> {
        self.service.poll(now)
    }

    fn polled(&mut self, now: Instant, count: u32) {
        if !self.add(&Record::Polled { now, count }) {
            // What is written down instead is how things are after that.
            self.turn();
        }
    }

    /// While a cutover is under way, nothing is written down anew that can be put off: for many conversations that
    /// takes longer than the cutover.
    fn set_urgent(&mut self, urgent: bool) {
        self.urgent = urgent;
    }

    fn service(&self) -> &Service {
        &self.service
    }
}

impl Deref for Engine {
    type Target = Service;

    fn deref(&self) -> &Service {
        &self.service
    }
}

#[cfg(test)]
mod tests;
