//! How does a dom0d go on where one that was killed has stopped? The engine does the same for the same inputs, so
//! each is written down before the engine has it, and a successor repeats them. What the engine then wants was
//! done already, except what had not been written down as done: that is done again, and is harmless twice.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::ops::Deref;
use std::path::Path;

use serde::{Deserialize, Serialize};
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

/// Stands for a configuration and for what is shared with the kernel: what was left under another can't be repeated.
fn digest(config: &config::Service) -> u64 {
    let mut hasher = DefaultHasher::new();
    let config::Service { engine, .. } = config;
    let unseeded = config::Service { engine: ServiceConfig { seed: 0, ..engine.clone() }, ..config.clone() };
    (understudy_bpf::LAYOUT, format!("{unseeded:?}")).hash(&mut hasher);
    hasher.finish()
}

impl Engine {
    /// An engine that nobody can follow.
    pub(crate) fn new(config: ServiceConfig) -> Self {
        Self::around(Service::new(config))
    }

    fn around(service: Service) -> Self {
        Self { service, journal: None, surroundings: Vec::new(), urgent: false }
    }

    /// The engine that an earlier process left in files named after `base`.
    pub(crate) fn left(base: &Path, config: &config::Service) -> Result<Left, Lost> {
        let journal = Journal::left(base, digest(config))?;
        let service = Service::restore(config.engine.clone(), journal.snapshot()?);
        let service = service.map_err(|_| Lost::Damaged)?;
        let mut engine = Self::around(service);
        let mut repeated = 0;
        for record in journal.records()? {
            engine.repeat(postcard::from_bytes(record).map_err(|_| Lost::Damaged)?)?;
            repeated += 1;
        }
        engine.journal = Some(journal);
        engine.turn();
        Ok(Left { engine, repeated })
    }

    /// From now on another process can follow, by files named after `base`.
    pub(crate) fn begin_journal(&mut self, base: &Path, config: &config::Service) -> io::Result<()> {
        self.journal = Some(Journal::begin(base, digest(config), |room| self.service.save_in(room))?);
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
mod tests {
    #![allow(clippy::unwrap_used)]

    use understudy_driver::Engine as _;
    use understudy_protocol::{Command, LinkAddress, Seeding, ServerSpec};

    use super::*;

    const NOW: Instant = Instant::from_micros(1_000_000);

    fn config() -> config::Service {
        let text =
            "[[service]]\nname = \"s\"\npsc = \"10.77.0.100\"\nports = [80]\novm = \"a\"\nrvms = [\"b\"]\n";
        text.parse::<config::Config>().unwrap().services.remove(0)
    }

    /// An engine with a journal, and the files' base.
    fn journaled(name: &str) -> (Engine, std::path::PathBuf) {
        let config = config();
        let base = std::env::temp_dir().join(format!("dom0d-{name}-{}", std::process::id()));
        let mut engine = Engine::new(config.engine.clone());
        engine.begin_journal(&base, &config).unwrap();
        (engine, base)
    }

    /// One whose journal is so full that a new snapshot is due.
    fn due(name: &str) -> (Engine, std::path::PathBuf) {
        let (mut engine, base) = journaled(name);
        // Not one of the service: nothing comes of it but a record.
        let packet = vec![0; 60_000];
        while !engine.journal.as_ref().unwrap().is_due() {
            engine.tell(
                NOW,
                Input::Client { link: LinkAddress([2; 6]), passage: Passage::Kept, packet: &packet },
            );
        }
        (engine, base)
    }

    const CLIENT: ([u8; 4], u16) = ([10, 77, 0, 1], 40_000);
    const ACK: u8 = 0x10;
    const SYN: u8 = 0x02;

    /// A packet as a guest or a client on this host sends it: with a partial checksum.
    fn packet(
        from: ([u8; 4], u16),
        to: ([u8; 4], u16),
        (seq, ack): (u32, u32),
        flags: u8,
        payload: &[u8],
    ) -> Vec<u8> {
        let length = 20 + payload.len() as u16;
        let mut packet = vec![0x45, 0];
        packet.extend((20 + length).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        packet.extend([from.0, to.0].concat());
        let header: u32 = packet.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
        packet[10..12].copy_from_slice(&(!((header & 0xffff) + (header >> 16)) as u16).to_be_bytes());
        packet.extend([from.1.to_be_bytes(), to.1.to_be_bytes()].concat());
        packet.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
        packet.extend([0x50, flags, 0xff, 0xff]);
        let addresses = packet[12..20].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
        let sum = addresses.sum::<u32>() + 6 + u32::from(length);
        packet.extend(((sum & 0xffff) as u16 + (sum >> 16) as u16).to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(payload);
        packet
    }

    #[test]
    fn a_successor_hears_what_a_replica_repeated_though_it_was_not_written_down() {
        let (mut engine, base) = journaled("repeating");
        let link = LinkAddress([2, 0, 0, 0, 0, 1]);
        let psc = ([10, 77, 0, 100], 80);
        let [ovm, rvm] = [11, 12].map(|last| ([10, 77, 0, last], 80));
        let spec = |id, (address, _): ([u8; 4], u16)| ServerSpec {
            id: ServerId(id),
            addresses: vec![address.into()],
            mtu: 1500,
        };
        engine.command(NOW, Command::InstallOvm(spec(0, ovm))).unwrap();
        let (spec, seeding) = (spec(1, rvm), Seeding::AssumeIdentical);
        engine.command(NOW, Command::Attach { spec, seeding }).unwrap();
        let drain = |engine: &mut Engine| {
            let polled = std::iter::from_fn(|| engine.poll(NOW)).count() as u32;
            engine.polled(NOW, polled + 1);
        };
        let answer = b"what both servers answer, at some length. ".repeat(100);
        let from_client = |numbers, flags| packet(CLIENT, psc, numbers, flags, &[]);
        engine.tell(NOW, Input::Client { link, passage: Passage::Kept, packet: &from_client((100, 0), SYN) });
        drain(&mut engine);
        let server_says = |id, from, numbers, flags, payload: &[u8], engine: &mut Engine| {
            let packet = packet(from, CLIENT, numbers, flags, payload);
            engine.tell(NOW, Input::Server { server: ServerId(id), passage: Passage::Kept, packet: &packet });
            drain(engine);
        };
        server_says(0, ovm, (5_000, 101), SYN | ACK, &[], &mut engine);
        engine.tell(
            NOW,
            Input::Client { link, passage: Passage::Kept, packet: &from_client((101, 5_001), ACK) },
        );
        drain(&mut engine);
        server_says(1, rvm, (9_000, 101), SYN | ACK, &[], &mut engine);
        server_says(0, ovm, (5_001, 101), ACK, &answer[..4_000], &mut engine);
        let before = engine.journal.as_ref().unwrap().records().unwrap().map(<[u8]>::len).sum::<usize>();
        server_says(1, rvm, (9_001, 101), ACK, &answer[..1_000], &mut engine);
        let taken =
            engine.journal.as_ref().unwrap().records().unwrap().map(<[u8]>::len).sum::<usize>() - before;
        assert!(taken < 200, "{taken} bytes for what is known");
        // What is ahead of the OVM is.
        server_says(1, rvm, (10_001, 101), ACK, &answer[1_000..4_100], &mut engine);
        let status = engine.conversations(0, 9);
        let expected = engine.save();
        drop(engine);
        let left = Engine::left(&base, &config()).unwrap();
        assert!(left.engine.save() == expected, "{status:?}");
        remove(&base).unwrap();
    }

    #[test]
    fn an_engine_that_gave_its_journal_up_is_followed_by_nobody() {
        let (mut engine, base) = journaled("given-up");
        let packet = &vec![0; 64 << 20];
        engine.tell(NOW, Input::Client { link: LinkAddress([2; 6]), passage: Passage::Kept, packet });
        assert!(!engine.is_journaled());
        engine.tell(NOW, Input::Timeout);
        assert!(matches!(Engine::left(&base, &config()), Err(Lost::Damaged)));
        remove(&base).unwrap();
    }

    #[test]
    fn a_snapshot_that_is_due_waits_for_the_end_of_a_cutover() {
        let (mut engine, base) = due("urgent");
        engine.set_urgent(true);
        engine.tell(NOW, Input::Timeout);
        engine.polled(NOW, 0);
        assert!(engine.journal.as_ref().unwrap().is_due());
        engine.set_urgent(false);
        engine.tell(NOW, Input::Timeout);
        assert!(!engine.journal.as_ref().unwrap().is_due());
        remove(&base).unwrap();
    }

    #[test]
    fn without_room_for_another_input_the_snapshot_comes_all_the_same() {
        let (mut engine, base) = due("full");
        engine.set_urgent(true);
        let packet = vec![0; 60_000];
        for _ in 0..200 {
            engine.tell(
                NOW,
                Input::Client { link: LinkAddress([2; 6]), passage: Passage::Kept, packet: &packet },
            );
        }
        // More than the reserve: it was written in between, and a successor can follow.
        assert!(engine.is_journaled());
        assert!(!engine.journal.as_ref().unwrap().is_due());
        remove(&base).unwrap();
    }

    #[test]
    fn what_was_left_with_a_byte_changed_is_not_gone_on_with() {
        let (mut engine, base) = journaled("flipped");
        for n in 0..9 {
            engine.tell(NOW + std::time::Duration::from_millis(n), Input::Timeout);
        }
        let expected = engine.save();
        drop(engine);
        let file = base.with_extension("journal.1");
        let whole = std::fs::read(&file).unwrap();
        let end = whole.iter().rposition(|&byte| byte != 0).unwrap() + 1;
        let mut refused = 0;
        for at in 0..end {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            std::fs::write(&file, &flipped).unwrap();
            match Engine::left(&base, &config()) {
                Ok(left) => assert!(left.engine.save() == expected, "byte {at} of {end}"),
                Err(_) => refused += 1,
            }
            remove(&base).unwrap();
        }
        // Not the count of tries.
        assert!(refused >= end - 8, "{refused} of {end}");
    }
}
