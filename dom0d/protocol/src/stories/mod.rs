//! Stories of single conversations, segment by segment: what each party sends, and what each receives.
//!
//! Here every number is chosen by hand; whole TCP stacks meet the engine in the simulator.

mod close;
mod copying;
mod handshake;
mod hostile;
mod numbering;
mod passing;
mod promotion;
mod recovery;
mod replication;
mod saved;
mod witness;

use core::time::Duration;
use std::collections::VecDeque;

use crate::wire::{self, Flags, Options, Parsed, SackBlocks, Segment};
use crate::{
    Command, Destination, Event, EventKind, Evidence, Handover, Input, Instant, LinkAddress, MAX_SERVERS,
    OperatorError, Output, Passage, Rule, Seeding, ServerId, ServerSpec, Service, ServiceConfig,
};

const PSC: &str = "10.0.0.100:80";
const CLIENT: &str = "10.0.0.1:5000";
const LINK: LinkAddress = LinkAddress([2, 0, 0, 0, 0, 1]);
/// The client's ISS: its sequence numbers wrap within the first bytes.
const CLIENT_ISS: u32 = u32::MAX - 10;

/// A segment that a client or server received.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Heard {
    seq: u32,
    ack: u32,
    flags: Flags,
    window: u16,
    timestamps: Option<(u32, u32)>,
    sack: SackBlocks,
    mss: Option<u16>,
    payload: Vec<u8>,
}

/// A service with an OVM and seeded RVMs, a client, and an inbox for each of them.
struct Story {
    service: Service,
    /// The client's socket: [`CLIENT`], or another socket of the same host.
    peer: std::net::SocketAddr,
    now: Instant,
    client: VecDeque<Heard>,
    servers: Vec<VecDeque<Heard>>,
    /// The client in whose name a server was last sent a segment.
    sender: std::net::SocketAddr,
    events: Vec<EventKind>,
    outputs: Vec<Output>,
    /// How often the engine asked each server for a sign of life.
    asked: [u32; MAX_SERVERS],
    timestamps: bool,
}

/// The segment that a party sends; its addresses follow from the party.
struct Say<'a> {
    seq: u32,
    ack: u32,
    flags: Flags,
    payload: &'a [u8],
    window: u16,
    tsval: u32,
    tsecr: u32,
    sack: SackBlocks,
}

impl Default for Say<'_> {
    fn default() -> Self {
        Self {
            seq: 0,
            ack: 0,
            flags: Flags::ACK,
            payload: b"",
            window: 1000,
            tsval: 0,
            tsecr: 0,
            sack: SackBlocks::default(),
        }
    }
}

fn iss(server: u32) -> u32 {
    [7_000, u32::MAX - 3, 500_000, 9, 1 << 31, 0, u32::MAX, 80][server as usize]
}

fn spec(server: u32) -> ServerSpec {
    ServerSpec { id: ServerId(server), addresses: vec![[10, 0, 0, 10 + server as u8].into()], mtu: 1500 }
}

impl Story {
    fn new(rvms: u32) -> Self {
        Self::configured(rvms, |_| {})
    }

    fn configured(rvms: u32, change: impl FnOnce(&mut ServiceConfig)) -> Self {
        let mut config = ServiceConfig::new("story", vec![[10, 0, 0, 100].into()], vec![80]);
        change(&mut config);
        let service = Service::new(config);
        let now = Instant::from_micros(1_000_000);
        let servers = vec![VecDeque::new(); MAX_SERVERS];
        let mut story = Self {
            service,
            peer: CLIENT.parse().unwrap(),
            now,
            client: VecDeque::new(),
            servers,
            sender: CLIENT.parse().unwrap(),
            events: Vec::new(),
            outputs: Vec::new(),
            asked: [0; MAX_SERVERS],
            timestamps: false,
        };
        story.command(Command::InstallOvm(spec(0))).unwrap();
        for server in 1..=rvms {
            story.command(Command::Attach { spec: spec(server), seeding: Seeding::AssumeIdentical }).unwrap();
        }
        story.drain();
        story.events.clear();
        story.outputs.clear();
        story
    }

    fn drain(&mut self) {
        while let Some(output) = self.service.poll(self.now) {
            match output {
                Output::Transmit(transmit) => {
                    for packet in transmit.packets() {
                        self.hear(transmit.to, &packet);
                    }
                }
                Output::Event(Event { kind, .. }) => self.events.push(kind),
                Output::Ask(ServerId(server)) => self.asked[server as usize] += 1,
                output => self.outputs.push(output),
            }
        }
    }

    fn tell(&mut self, input: Input<'_>) {
        self.service.handle(self.now, input).unwrap();
    }

    fn command(&mut self, command: Command) -> Result<(), OperatorError> {
        self.service.handle(self.now, Input::Command(command))
    }

    /// The conversation that the plane may pass now that it is idle.
    fn handover(&mut self) -> Option<Handover> {
        self.tell(Input::PlaneIdle);
        self.service.poll(self.now).map(|output| match output {
            Output::Rule(Rule::HandOver(handover)) => *handover,
            output => panic!("{output:?}"),
        })
    }

    fn hear(&mut self, to: Destination, packet: &[u8]) {
        let Ok(Parsed::Tcp(segment)) = wire::parse(packet) else { panic!("sent garbage") };
        let heard = Heard {
            seq: segment.seq,
            ack: segment.ack,
            flags: segment.flags,
            window: segment.window,
            timestamps: segment.options.timestamps,
            sack: segment.options.sack,
            mss: segment.options.mss,
            payload: segment.payload.to_vec(),
        };
        match to {
            Destination::Client(link) => {
                assert_eq!((link, segment.src), (LINK, PSC.parse().unwrap()));
                self.client.push_back(heard);
            }
            Destination::Server(ServerId(server)) => {
                assert_eq!(segment.src.ip(), self.peer.ip());
                self.sender = segment.src;
                self.servers[server as usize].push_back(heard);
            }
        }
    }

    /// Lets time pass, in steps that miss no deadline.
    fn wait(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now = (self.now + Duration::from_millis(1)).min(until);
            self.tell(Input::Timeout);
            self.drain();
        }
    }

    fn options(&self, say: &Say<'_>) -> Options {
        let syn = say.flags.has(Flags::SYN);
        Options {
            mss: syn.then_some(1460),
            timestamps: self.timestamps.then_some((say.tsval, say.tsecr)),
            sack_permitted: syn,
            sack: say.sack,
            ..Options::default()
        }
    }

    fn client_says(&mut self, say: Say<'_>) {
        let packet = self.client_packet(&say);
        self.tell(Input::Client { link: LINK, passage: Passage::Kept, packet: &packet });
        self.drain();
    }

    fn client_packet(&self, say: &Say<'_>) -> Vec<u8> {
        let segment = Segment {
            src: self.peer,
            dst: PSC.parse().unwrap(),
            seq: say.seq,
            ack: say.ack,
            flags: say.flags,
            window: say.window,
            urgent: 0,
            options: self.options(say),
            ecn: 0,
            payload: say.payload,
        };
        segment.emit()
    }

    fn server_says(&mut self, server: u32, say: Say<'_>) {
        let packet = self.server_packet(server, &say);
        self.tell(Input::Server { server: ServerId(server), passage: Passage::Kept, packet: &packet });
        self.drain();
    }

    fn server_packet(&self, server: u32, say: &Say<'_>) -> Vec<u8> {
        let segment = Segment {
            src: format!("10.0.0.{}:80", 10 + server).parse().unwrap(),
            dst: self.peer,
            seq: say.seq,
            ack: say.ack,
            flags: say.flags,
            window: say.window,
            urgent: 0,
            options: self.options(say),
            ecn: 0,
            payload: say.payload,
        };
        segment.emit()
    }

    /// The client's handshake with the OVM, up to its third segment.
    fn open(&mut self) {
        self.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, tsval: 100, ..Say::default() });
        let syn = self.server_hears(0);
        assert_eq!((syn.seq, syn.flags), (CLIENT_ISS, Flags::SYN));
        self.syn_ack(0);
        let syn_ack = self.client_hears();
        assert_eq!(syn_ack.seq, iss(0));
        self.client_says(Say { seq: at(1), ack: iss(0) + 1, tsval: 100, tsecr: 1000, ..Say::default() });
        self.server_hears(0);
    }

    /// `server` answers the SYN it was sent.
    fn syn_ack(&mut self, server: u32) {
        self.server_says(
            server,
            Say {
                seq: iss(server),
                ack: at(1),
                flags: Flags::SYN.with(Flags::ACK),
                tsval: tsval(server),
                tsecr: 100,
                ..Say::default()
            },
        );
    }

    /// The conversation, with every RVM's handshake complete.
    fn established(rvms: u32) -> Self {
        let mut story = Self::new(rvms);
        story.establish(rvms);
        story
    }

    fn establish(&mut self, rvms: u32) {
        self.open();
        for server in 1..=rvms {
            let syn = self.server_hears(server);
            assert_eq!((syn.seq, syn.flags), (CLIENT_ISS, Flags::SYN));
            self.syn_ack(server);
            let third = self.server_hears(server);
            assert_eq!((third.seq, third.ack, third.flags), (at(1), iss(server).wrapping_add(1), Flags::ACK));
        }
    }

    /// Client data at `position` that acknowledges answers up to `acked`.
    fn client_sends(&mut self, position: u32, payload: &[u8], acked: u32) {
        self.client_says(Say {
            seq: at(position),
            ack: iss(0).wrapping_add(acked),
            flags: Flags::ACK.with(Flags::PSH),
            payload,
            ..Say::default()
        });
    }

    /// A server's data at `position` that acknowledges client bytes up to `acked`.
    fn server_sends(&mut self, server: u32, position: u32, payload: &[u8], acked: u32) {
        self.server_says(
            server,
            Say {
                seq: iss(server).wrapping_add(position),
                ack: at(acked),
                flags: Flags::ACK.with(Flags::PSH),
                payload,
                tsval: tsval(server),
                ..Say::default()
            },
        );
    }

    fn client_hears(&mut self) -> Heard {
        self.client.pop_front().expect("the client hears nothing")
    }

    fn server_hears(&mut self, server: u32) -> Heard {
        self.servers[server as usize].pop_front().unwrap_or_else(|| panic!("server {server} hears nothing"))
    }

    fn silence(&self) {
        assert_eq!(self.client, []);
        for (server, inbox) in self.servers.iter().enumerate() {
            assert_eq!(*inbox, [], "server {server}");
        }
    }

    fn fail_ovm(&mut self) {
        let ovm = self.service.ovm().expect("an OVM");
        self.tell(Input::Evidence { server: ovm, evidence: Evidence::DomainGone });
        self.drain();
    }
}

/// The client's sequence number of a position.
fn at(position: u32) -> u32 {
    CLIENT_ISS.wrapping_add(position)
}

/// Each server's timestamp clock has another value.
fn tsval(server: u32) -> u32 {
    [1000, 900_000, u32::MAX - 5, 77, 5, 1 << 31, 1, 3000][server as usize]
}
