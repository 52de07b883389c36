//! How does a dom0d go on where one that was killed has stopped? The engine does the same for the same inputs, so
//! each is written down before the engine has it, and a successor repeats them. What the engine then wants was
//! done already, except what had not been written down as done: that is done again, and is harmless twice.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_api::config;
use understudy_protocol::{
    Effect, Evidence, Handover, Instant, LinkAddress, OperatorError, Passage, Repetition, Seeding, ServerId,
    ServerSpec, Service, ServiceConfig, Sign, Transmit,
};

pub(crate) use super::journal::{Lost, remove};

use super::journal::Journal;

/// What the engine is told, in order.
#[derive(Debug, Serialize, Deserialize)]
enum Input {
    /// The packet follows.
    Client {
        now: Instant,
        link: LinkAddress,
        passage: Passage,
    },
    /// The packet follows.
    Server {
        now: Instant,
        server: ServerId,
        passage: Passage,
    },
    /// The packet follows, but for what repeats the OVM.
    Repeating {
        now: Instant,
        server: ServerId,
        passage: Passage,
        tail: Repetition,
    },
    Timeout {
        now: Instant,
    },
    /// All effects were carried out, and so many packets polled.
    Drained {
        now: Instant,
        packets: u32,
    },
    Handover,
    Evidence {
        now: Instant,
        server: ServerId,
        evidence: Evidence,
    },
    Running {
        now: Instant,
        server: ServerId,
        running: bool,
    },
    Sign {
        now: Instant,
        server: ServerId,
        sign: Sign,
    },
    OwnConnection {
        now: Instant,
        server: ServerId,
    },
    PlaneStopped,
    Untold,
    Confirmed {
        now: Instant,
        accused: ServerId,
        evidence: Evidence,
    },
    InstallOvm {
        now: Instant,
        spec: ServerSpec,
    },
    Attach {
        now: Instant,
        spec: ServerSpec,
        seeding: Seeding,
    },
    Seed {
        now: Instant,
        server: ServerId,
        seeding: Seeding,
    },
    Detach {
        now: Instant,
        server: ServerId,
    },
    Switchover {
        now: Instant,
        to: Option<ServerId>,
    },
    Failover {
        now: Instant,
        to: Option<ServerId>,
        force: bool,
    },
    Hold {
        now: Instant,
        deadline: Instant,
        limit: Duration,
    },
    Release {
        now: Instant,
    },
    /// Not the engine's: what a successor must know beside it follows.
    Surroundings,
}

/// The protocol engine of one service, which can be followed by another process's.
pub(crate) struct Engine {
    service: Service,
    journal: Option<Journal>,
    surroundings: Vec<u8>,
    /// The input at hand as it is written down.
    record: Vec<u8>,
    /// A cutover is under way: see [`Engine::set_urgent`].
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
        Self { service, journal: None, surroundings: Vec::new(), record: Vec::new(), urgent: false }
    }

    /// The engine that an earlier process left in files named after `base`.
    pub(crate) fn left(base: &Path, config: &config::Service) -> Result<Left, Lost> {
        let journal = Journal::left(base, digest(config))?;
        let service = Service::restore(config.engine.clone(), journal.snapshot()?);
        let service = service.map_err(|_| Lost::Damaged)?;
        let mut engine = Self::around(service);
        let mut repeated = 0;
        for record in journal.records()? {
            let (input, packet) = postcard::take_from_bytes(record).map_err(|_| Lost::Damaged)?;
            engine.repeat(input, packet)?;
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
            self.note(&Input::Surroundings, &surroundings);
            self.surroundings = surroundings;
        }
    }

    /// While a cutover is under way, nothing is written down anew that can be put off: for many conversations that
    /// takes longer than the cutover.
    pub(crate) fn set_urgent(&mut self, urgent: bool) {
        self.urgent = urgent;
    }

    fn has_time(&self) -> bool {
        !self.urgent && !self.service.is_recuperating()
    }

    /// Writes an input down, before the engine has it.
    fn note(&mut self, input: &Input, packet: &[u8]) {
        if self.journal.as_ref().is_some_and(Journal::is_due) && self.has_time() {
            self.turn();
        }
        if !self.add(input, packet) {
            self.turn();
            if !self.add(input, packet) {
                self.give_up("an input is larger than the journal");
            }
        }
    }

    /// Whether there was room for it, or none was needed.
    fn add(&mut self, input: &Input, packet: &[u8]) -> bool {
        let Some(journal) = &mut self.journal else { return true };
        self.record.clear();
        self.record = postcard::to_extend(input, std::mem::take(&mut self.record)).unwrap_or_default();
        journal.add(&self.record, packet)
    }

    /// Writes down all that is known now, in place of what led to it.
    fn turn(&mut self) {
        let Some(journal) = &mut self.journal else { return };
        let turned = journal.turn(|room| self.service.save_in(room));
        let surroundings = std::mem::take(&mut self.surroundings);
        match turned {
            Ok(()) if self.add(&Input::Surroundings, &surroundings) => {}
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

    fn repeat(&mut self, input: Input, packet: &[u8]) -> Result<(), Lost> {
        let service = &mut self.service;
        match input {
            Input::Client { now, link, passage } => service.handle_tapped_client(now, link, packet, passage),
            Input::Server { now, server, passage } => {
                service.handle_tapped_server(now, server, packet, passage)
            }
            Input::Repeating { now, server, passage, tail } => {
                let packet = [packet, &service.recall(&tail).ok_or(Lost::Damaged)?].concat();
                service.handle_tapped_server(now, server, &packet, passage);
            }
            Input::Timeout { now } => service.handle_timeout(now),
            Input::Drained { now, packets } => {
                while service.poll_effect().is_some() {}
                for _ in 0..packets {
                    let _ = service.poll_transmit(now);
                }
            }
            Input::Handover => {
                let _ = service.poll_handover();
            }
            Input::Evidence { now, server, evidence } => service.handle_evidence(now, server, evidence),
            Input::Running { now, server, running } => service.handle_running(now, server, running),
            Input::Sign { now, server, sign } => service.handle_sign(now, server, sign),
            Input::OwnConnection { now, server } => service.handle_own_connection(now, server),
            Input::PlaneStopped => service.handle_plane_stopped(),
            Input::Untold => service.handle_untold(),
            Input::Confirmed { now, accused, evidence } => service.handle_confirmed(now, accused, evidence),
            // What was refused then is refused now.
            Input::InstallOvm { now, spec } => drop(service.install_ovm(now, spec)),
            Input::Attach { now, spec, seeding } => drop(service.attach(now, spec, seeding)),
            Input::Seed { now, server, seeding } => drop(service.seed(now, server, seeding)),
            Input::Detach { now, server } => drop(service.detach(now, server)),
            Input::Switchover { now, to } => drop(service.switchover(now, to)),
            Input::Failover { now, to, force } => drop(service.failover(now, to, force)),
            Input::Hold { now, deadline, limit } => drop(service.hold(now, deadline, limit)),
            Input::Release { now } => service.release(now),
            Input::Surroundings => packet.clone_into(&mut self.surroundings),
        }
        Ok(())
    }

    /// See [`Service::handle_tapped_client`].
    pub(crate) fn handle_client(&mut self, now: Instant, link: LinkAddress, packet: &[u8], passage: Passage) {
        self.note(&Input::Client { now, link, passage }, packet);
        self.service.handle_tapped_client(now, link, packet, passage);
    }

    /// See [`Service::handle_tapped_server`].
    pub(crate) fn handle_server(&mut self, now: Instant, server: ServerId, packet: &[u8], passage: Passage) {
        let tail = self.journal.as_ref().and_then(|_| self.service.repetition(server, packet));
        match tail {
            Some((head, tail)) => self.note(&Input::Repeating { now, server, passage, tail }, head),
            None => self.note(&Input::Server { now, server, passage }, packet),
        }
        self.service.handle_tapped_server(now, server, packet, passage);
    }

    /// See [`Service::handle_timeout`].
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.note(&Input::Timeout { now }, &[]);
        self.service.handle_timeout(now);
    }

    /// See [`Service::poll_effect`]; to be followed by [`Engine::drained`].
    pub(crate) fn poll_effect(&mut self) -> Option<Effect> {
        self.service.poll_effect()
    }

    /// See [`Service::poll_transmit`]; to be followed by [`Engine::drained`].
    pub(crate) fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        self.service.poll_transmit(now)
    }

    /// All effects were carried out, and `packets` asked for.
    pub(crate) fn drained(&mut self, now: Instant, packets: u32) {
        if !self.add(&Input::Drained { now, packets }, &[]) {
            // What is written down instead is how things are after that.
            self.turn();
        }
    }

    /// See [`Service::poll_handover`].
    pub(crate) fn poll_handover(&mut self) -> Option<Handover> {
        self.note(&Input::Handover, &[]);
        self.service.poll_handover()
    }

    /// See [`Service::handle_evidence`].
    pub(crate) fn handle_evidence(&mut self, now: Instant, server: ServerId, evidence: Evidence) {
        self.note(&Input::Evidence { now, server, evidence }, &[]);
        self.service.handle_evidence(now, server, evidence);
    }

    /// See [`Service::handle_own_connection`].
    pub(crate) fn handle_own_connection(&mut self, now: Instant, server: ServerId) {
        self.note(&Input::OwnConnection { now, server }, &[]);
        self.service.handle_own_connection(now, server);
    }

    /// See [`Service::handle_running`].
    pub(crate) fn handle_running(&mut self, now: Instant, server: ServerId, running: bool) {
        self.note(&Input::Running { now, server, running }, &[]);
        self.service.handle_running(now, server, running);
    }

    /// See [`Service::handle_sign`].
    pub(crate) fn handle_sign(&mut self, now: Instant, server: ServerId, sign: Sign) {
        self.note(&Input::Sign { now, server, sign }, &[]);
        self.service.handle_sign(now, server, sign);
    }

    /// See [`Service::set_plane_passes`]; before anything else.
    pub(crate) fn set_plane_passes(&mut self) {
        self.service.set_plane_passes();
    }

    /// See [`Service::handle_plane_stopped`].
    pub(crate) fn handle_plane_stopped(&mut self) {
        self.note(&Input::PlaneStopped, &[]);
        self.service.handle_plane_stopped();
    }

    /// See [`Service::handle_untold`].
    pub(crate) fn handle_untold(&mut self) {
        self.note(&Input::Untold, &[]);
        self.service.handle_untold();
    }

    /// See [`Service::handle_confirmed`].
    pub(crate) fn handle_confirmed(&mut self, now: Instant, accused: ServerId, evidence: Evidence) {
        self.note(&Input::Confirmed { now, accused, evidence }, &[]);
        self.service.handle_confirmed(now, accused, evidence);
    }

    /// See [`Service::install_ovm`].
    pub(crate) fn install_ovm(&mut self, now: Instant, spec: ServerSpec) -> Result<(), OperatorError> {
        self.note(&Input::InstallOvm { now, spec: spec.clone() }, &[]);
        self.service.install_ovm(now, spec)
    }

    /// See [`Service::attach`].
    pub(crate) fn attach(
        &mut self,
        now: Instant,
        spec: ServerSpec,
        seeding: Seeding,
    ) -> Result<(), OperatorError> {
        self.note(&Input::Attach { now, spec: spec.clone(), seeding }, &[]);
        self.service.attach(now, spec, seeding)
    }

    /// See [`Service::seed`].
    pub(crate) fn seed(
        &mut self,
        now: Instant,
        server: ServerId,
        seeding: Seeding,
    ) -> Result<(), OperatorError> {
        self.note(&Input::Seed { now, server, seeding }, &[]);
        self.service.seed(now, server, seeding)
    }

    /// See [`Service::hold`].
    pub(crate) fn hold(
        &mut self,
        now: Instant,
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), OperatorError> {
        self.note(&Input::Hold { now, deadline, limit }, &[]);
        self.service.hold(now, deadline, limit)
    }

    /// See [`Service::release`].
    pub(crate) fn release(&mut self, now: Instant) {
        self.note(&Input::Release { now }, &[]);
        self.service.release(now);
    }

    /// See [`Service::detach`].
    pub(crate) fn detach(&mut self, now: Instant, server: ServerId) -> Result<(), OperatorError> {
        self.note(&Input::Detach { now, server }, &[]);
        self.service.detach(now, server)
    }

    /// See [`Service::switchover`].
    pub(crate) fn switchover(
        &mut self,
        now: Instant,
        to: Option<ServerId>,
    ) -> Result<ServerId, OperatorError> {
        self.note(&Input::Switchover { now, to }, &[]);
        self.service.switchover(now, to)
    }

    /// See [`Service::failover`].
    pub(crate) fn failover(
        &mut self,
        now: Instant,
        to: Option<ServerId>,
        force: bool,
    ) -> Result<ServerId, OperatorError> {
        self.note(&Input::Failover { now, to, force }, &[]);
        self.service.failover(now, to, force)
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
            engine.handle_client(NOW, LinkAddress([2; 6]), &packet, Passage::Kept);
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
        engine.install_ovm(NOW, spec(0, ovm)).unwrap();
        engine.attach(NOW, spec(1, rvm), Seeding::AssumeIdentical).unwrap();
        let drain = |engine: &mut Engine| {
            while engine.poll_effect().is_some() {}
            let packets = std::iter::from_fn(|| engine.poll_transmit(NOW)).count() as u32;
            engine.drained(NOW, packets + 1);
        };
        let answer = b"what both servers answer, at some length. ".repeat(100);
        let from_client = |numbers, flags| packet(CLIENT, psc, numbers, flags, &[]);
        engine.handle_client(NOW, link, &from_client((100, 0), SYN), Passage::Kept);
        drain(&mut engine);
        let server_says = |id, from, numbers, flags, payload: &[u8], engine: &mut Engine| {
            let packet = packet(from, CLIENT, numbers, flags, payload);
            engine.handle_server(NOW, ServerId(id), &packet, Passage::Kept);
            drain(engine);
        };
        server_says(0, ovm, (5_000, 101), SYN | ACK, &[], &mut engine);
        engine.handle_client(NOW, link, &from_client((101, 5_001), ACK), Passage::Kept);
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
        engine.handle_client(NOW, LinkAddress([2; 6]), &vec![0; 64 << 20], Passage::Kept);
        assert!(!engine.is_journaled());
        engine.handle_timeout(NOW);
        assert!(matches!(Engine::left(&base, &config()), Err(Lost::Damaged)));
        remove(&base).unwrap();
    }

    #[test]
    fn a_snapshot_that_is_due_waits_for_the_end_of_a_cutover() {
        let (mut engine, base) = due("urgent");
        engine.set_urgent(true);
        engine.handle_timeout(NOW);
        engine.drained(NOW, 0);
        assert!(engine.journal.as_ref().unwrap().is_due());
        engine.set_urgent(false);
        engine.handle_timeout(NOW);
        assert!(!engine.journal.as_ref().unwrap().is_due());
        remove(&base).unwrap();
    }

    #[test]
    fn without_room_for_another_input_the_snapshot_comes_all_the_same() {
        let (mut engine, base) = due("full");
        engine.set_urgent(true);
        let packet = vec![0; 60_000];
        for _ in 0..200 {
            engine.handle_client(NOW, LinkAddress([2; 6]), &packet, Passage::Kept);
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
            engine.handle_timeout(NOW + std::time::Duration::from_millis(n));
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
