//! A service with its clients, servers and operator, all driven by one byte string.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use understudy_driver::{Driven, Suspicion};
use understudy_protocol::{
    Command, Destination, Evidence, Input, Instant, LagPolicy, LinkAddress, Mask, Output, Passage, Seeding,
    ServerId, ServerSpec, Service, ServiceConfig, Sign,
};

use crate::START;
use crate::bytes::Bytes;
use crate::oracle::{self, Voices};
use crate::packet::{self, ACK, FIN, RST, SYN, Tcp};
use crate::plane::Plane;

const PORT: u16 = 80;
const SERVERS: usize = 4;
const CLIENTS: usize = 4;
const LINK: LinkAddress = LinkAddress([2, 0, 0, 0, 0, 1]);

/// A TCP endpoint, as far as a peer must know it to send acceptable segments.
#[derive(Clone, Default)]
struct End {
    iss: u32,
    nxt: u32,
    /// RCV.NXT.
    rcv: u32,
    tsval: u32,
    heard_tsval: Option<u32>,
    knows_peer: bool,
}

impl End {
    fn hears(&mut self, tcp: &Tcp) {
        let end = tcp.seq.wrapping_add(tcp.length());
        if tcp.flags & SYN != 0 {
            self.rcv = end;
            self.knows_peer = true;
            self.heard_tsval = tcp.tsval();
            return;
        }
        let reaches = (tcp.seq.wrapping_sub(self.rcv) as i32) <= 0;
        if reaches && (end.wrapping_sub(self.rcv) as i32) > 0 {
            self.rcv = end;
        }
        self.heard_tsval = tcp.tsval().or(self.heard_tsval);
    }
}

struct Client {
    address: SocketAddr,
    psc: SocketAddr,
    end: End,
    has_timestamps: bool,
    oracle: oracle::Client,
}

/// See the module.
pub(crate) struct World {
    service: Service,
    now: Instant,
    clients: Vec<Client>,
    /// The present life of each server.
    ids: [Option<ServerId>; SERVERS],
    next_id: u32,
    ovm: Option<ServerId>,
    /// By server and client.
    ends: Vec<End>,
    voices: Voices,
    /// The data plane, if one passes conversations by itself.
    plane: Option<Plane>,
    /// Only servers' own marks have the highest bit.
    is_marked: bool,
    last: Vec<u8>,
    suspicion: Option<Suspicion>,
    /// Clients whose conversations the engine knew before the outputs at hand.
    tracked: Vec<SocketAddr>,
    /// Packets and other outputs since the latest input.
    packets: usize,
    others: usize,
}

fn guest(server: usize, like: IpAddr) -> SocketAddr {
    let n = server as u8 + 10;
    let address: IpAddr = match like {
        IpAddr::V4(_) => Ipv4Addr::new(10, 0, 0, n).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(n)).into(),
    };
    SocketAddr::new(address, PORT)
}

impl Driven for World {
    type Engine = Service;

    fn engine(&mut self) -> &mut Service {
        &mut self.service
    }

    fn suspicion(&mut self) -> &mut Option<Suspicion> {
        &mut self.suspicion
    }

    fn carry_out(&mut self, output: Output) {
        if let Output::Transmit(transmit) = output {
            self.packets += 1;
            oracle::check(&self.service, self.packets);
            for packet in transmit.packets() {
                self.deliver(transmit.to, &packet);
            }
            return;
        }
        self.others += 1;
        let limit = self.service.config().limits.events as usize + 32;
        assert!(self.others <= limit + self.packets, "outputs without end");
        match (output, &mut self.plane) {
            (Output::Cutover { to, .. }, _) => self.note_cutover(to),
            (Output::Rule(rule), Some(plane)) => plane.apply(&rule),
            _ => {}
        }
    }

    fn stop(&mut self) -> bool {
        self.plane.as_mut().map(Plane::stop).is_some()
    }

    /// The engine gets each packet while it passes, so none is left.
    fn hear_rest(&mut self, _: Instant) -> bool {
        false
    }

    fn resume(&mut self, _: Option<ServerId>) {}

    fn is_idle(&self) -> bool {
        self.plane.is_some()
    }
}

impl World {
    pub(crate) fn new(bytes: &mut Bytes<'_>) -> Self {
        let psc4 = IpAddr::from([10, 0, 0, 100]);
        let psc6 = IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100));
        let mut config = ServiceConfig::new("fuzz", vec![psc4, psc6], vec![PORT]);
        let knobs = bytes.byte();
        config.limits.conversations = 3;
        config.limits.embryonic = 3;
        config.limits.conversation_bytes = if knobs & 1 == 0 { 32 << 10 } else { 2 << 10 };
        config.limits.inflight_bytes = 8 << 10;
        config.limits.lag_bytes = 16 << 10;
        config.limits.order_entries = 64;
        config.limits.events = 64;
        if knobs & 2 != 0 {
            config.on_lag = LagPolicy::Wait;
        }
        if knobs & 4 != 0 {
            config.masks = vec![Mask { prefix: vec![3], length: 4 }];
        }
        let client = |address: IpAddr, port, psc| Client {
            address: SocketAddr::new(address, port),
            psc: SocketAddr::new(psc, PORT),
            end: End::default(),
            has_timestamps: false,
            oracle: oracle::Client::default(),
        };
        let clients = vec![
            client([10, 0, 0, 1].into(), 5000, psc4),
            client([10, 0, 0, 1].into(), 5001, psc4),
            client([10, 0, 0, 2].into(), 5000, psc4),
            client(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).into(), 5000, psc6),
        ];
        let mut world = Self {
            service: Service::new(config),
            now: START,
            clients,
            ids: [None; SERVERS],
            next_id: 0,
            ovm: None,
            ends: vec![End::default(); SERVERS * CLIENTS],
            voices: Voices::default(),
            plane: (knobs & 0x20 != 0).then(Plane::default),
            is_marked: true,
            last: Vec::new(),
            suspicion: None,
            tracked: Vec::new(),
            packets: 0,
            others: 0,
        };
        if world.plane.is_some() {
            world.tell(Input::PlanePasses);
        }
        let spec = world.spec(0);
        world.command(Command::InstallOvm(spec));
        for server in 1..1 + usize::from(knobs >> 3 & 3) {
            let spec = world.spec(server);
            world.command(Command::Attach { spec, seeding: Seeding::AssumeIdentical });
        }
        world.drain();
        world
    }

    /// The server comes back with a new id; the engine no longer knows its former life.
    fn spec(&mut self, server: usize) -> ServerSpec {
        let id = ServerId(self.next_id);
        self.next_id += 1;
        self.ids[server] = Some(id);
        self.voices.change(server, false);
        let addresses =
            vec![guest(server, [0, 0, 0, 0].into()).ip(), guest(server, Ipv6Addr::LOCALHOST.into()).ip()];
        ServerSpec { id, addresses, mtu: 1500 }
    }

    fn server_of(&self, id: ServerId) -> Option<usize> {
        self.ids.iter().position(|known| *known == Some(id))
    }

    // ---- what comes out -------------------------------------------------------------------------

    fn drain(&mut self) {
        (self.packets, self.others) = (0, 0);
        self.carry_out_all();
        understudy_driver::settle(self, self.now);
        self.carry_out_all();
    }

    fn carry_out_all(&mut self) {
        self.track();
        while understudy_driver::drain(self, self.now) {}
        oracle::check(&self.service, self.packets);
    }

    /// Hands the engine an input that may depose the OVM.
    fn cut_over(&mut self, input: Input<'_>) {
        let _ = understudy_driver::cut_over(self, self.now, Some(input));
    }

    /// Hands the engine an input that it can't refuse.
    fn tell(&mut self, input: Input<'_>) {
        assert_eq!(self.service.handle(self.now, input), Ok(()));
    }

    /// Hands the engine a command, which it may refuse.
    fn command(&mut self, command: Command) {
        let _ = self.service.handle(self.now, Input::Command(command));
    }

    /// Notes which clients' conversations the engine knows, and forgets what other clients were sent.
    fn track(&mut self) {
        self.tracked = self.service.conversations(0, CLIENTS).into_iter().map(|known| known.client).collect();
        for client in &mut self.clients {
            if !self.tracked.contains(&client.address) {
                client.oracle.forget();
                client.oracle.ambiguous = false;
            }
        }
    }

    fn note_cutover(&mut self, to: ServerId) {
        if let Some(old) = self.ovm.and_then(|ovm| self.server_of(ovm)) {
            self.voices.change(old, false);
        }
        if let Some(new) = self.server_of(to) {
            self.voices.change(new, true);
        }
        self.ovm = Some(to);
    }

    fn deliver(&mut self, to: Destination, packet: &[u8]) {
        let (Some(first), protocol) =
            (packet.first(), if packet[0] >> 4 == 4 { packet[9] } else { packet[6] })
        else {
            return;
        };
        if protocol != 6 {
            assert!(matches!(to, Destination::Server(_)) && (*first >> 4 == 4 || *first >> 4 == 6));
            return;
        }
        let tcp = Tcp::read(packet);
        self.last.clear();
        self.last.extend_from_slice(packet);
        match to {
            Destination::Client(_) => self.client_hears(&tcp),
            Destination::Server(id) => {
                let Some(server) = self.server_of(id) else { return };
                assert_eq!(tcp.dst, guest(server, tcp.dst.ip()));
                if let Some(client) = self.clients.iter().position(|client| client.address == tcp.src) {
                    self.ends[server * CLIENTS + client].hears(&tcp);
                }
            }
        }
    }

    fn client_hears(&mut self, tcp: &Tcp) {
        if self.is_marked {
            self.voices.check(tcp);
        }
        let Some(client) = self.clients.iter_mut().find(|client| client.address == tcp.dst) else { return };
        assert_eq!(tcp.src, client.psc);
        if tcp.flags & SYN != 0 {
            client.oracle.forget();
            client.oracle.acked = tcp.seq;
        } else if self.tracked.contains(&client.address) && !client.oracle.ambiguous {
            client.oracle.hears(tcp);
        }
        client.end.hears(tcp);
    }

    // ---- what goes in ---------------------------------------------------------------------------

    /// Text is arbitrary from now on.
    pub(crate) fn unmark(&mut self) {
        self.is_marked = false;
    }

    pub(crate) fn raw_from_client(&mut self, link: LinkAddress, packet: &[u8]) {
        for client in &mut self.clients {
            client.oracle.ambiguous = true;
        }
        self.hears_client(link, packet);
    }

    pub(crate) fn raw_from_server(&mut self, id: ServerId, packet: &[u8]) {
        self.hears_server(id, packet);
    }

    /// A client's packet, which the plane may pass by itself.
    fn hears_client(&mut self, link: LinkAddress, packet: &[u8]) {
        let ovm = self.ovm.and_then(|ovm| self.server_of(ovm));
        let mut passage = Passage::Kept;
        if let (Some(plane), Some((src, dst)), Some(ovm)) = (&mut self.plane, packet::parties(packet), ovm)
            && self.clients.iter().any(|client| (client.address, client.psc) == (src, dst))
        {
            let mut passed = packet.to_vec();
            passage = plane.pass(src, |flow| flow.client_to_server(&mut passed, guest(ovm, src.ip()).ip()));
            if let (Passage::Passed { .. }, true) = (passage, packet::is_right(&passed)) {
                self.deliver(Destination::Server(self.ids[ovm].unwrap_or(ServerId(0))), &passed);
            }
        }
        let before = self.untaken();
        self.tell(Input::Client { link, passage, packet });
        self.check_taken(before, packet, passage);
        self.drain();
    }

    /// A server's packet; the plane may pass the OVM's by itself.
    fn hears_server(&mut self, id: ServerId, packet: &[u8]) {
        let mut passage = Passage::Kept;
        let server = self.server_of(id).filter(|_| self.ovm == Some(id));
        if let (Some(plane), Some((src, dst)), Some(server)) =
            (&mut self.plane, packet::parties(packet), server)
            && src == guest(server, src.ip())
            && let Some(client) = self.clients.iter().find(|client| client.address == dst)
        {
            let mut passed = packet.to_vec();
            passage = plane.pass(dst, |flow| flow.server_to_client(&mut passed, client.psc.ip()));
            if let (Passage::Passed { .. }, true) = (passage, packet::is_right(&passed)) {
                self.track();
                self.client_hears(&Tcp::read(&passed));
            }
        }
        let before = self.untaken();
        self.tell(Input::Server { server: id, passage, packet });
        self.check_taken(before, packet, passage);
        self.drain();
    }

    /// The engine's counts of segments that it did not accept.
    fn untaken(&self) -> u64 {
        if self.plane.is_none() {
            return 0;
        }
        let counters = self.service.status().counters;
        let names = ["passed_unrecorded", "unacceptable", "bad_ack", "malformed_options", "malformed_header"];
        names.iter().map(|name| counters[name]).sum()
    }

    /// What is passed is what the engine takes (rule 10).
    fn check_taken(&self, before: u64, packet: &[u8], passage: Passage) {
        if matches!(passage, Passage::Passed { .. }) && packet::is_right(packet) {
            assert_eq!(
                self.untaken(),
                before,
                "it was passed, and the engine does not take it: {packet:02x?}"
            );
        }
    }

    pub(crate) fn step(&mut self, bytes: &mut Bytes<'_>) {
        let what = bytes.byte();
        let (client, server) = (usize::from(what >> 4 & 3), usize::from(what >> 6));
        match what & 15 {
            0 => self.client_syn(client, bytes),
            1 => self.server_syn_ack(server, client, bytes),
            2 => self.handshake(client, bytes),
            3..=5 => self.client_segment(client, bytes),
            6..=8 => self.server_segment(server, client, bytes),
            9 => self.wait(Duration::from_micros(250 << (bytes.byte() & 15))),
            10 => self.due(),
            11 => self.operate(server, bytes.byte()),
            12 => self.mutate(server, bytes),
            13 => self.answer_all(client, bytes),
            14 => self.icmp(bytes.byte()),
            _ => {
                let id = ServerId(self.next_id + 7);
                let packet = self.server_packet(server, client, 0, 0, ACK, bytes).write();
                self.hears_server(id, &packet);
            }
        }
    }

    /// Time passes, and each deadline is met.
    fn wait(&mut self, time: Duration) {
        let until = self.now + time;
        for round in 0.. {
            // In six hours of silence an OVM that never answers causes two deadlines a second.
            assert!(round < 60_000, "deadlines without end");
            let Some(due) = self.service.next_timeout().filter(|due| *due <= until) else { break };
            self.now = self.now.max(due);
            self.tell(Input::Timeout);
            self.drain();
        }
        self.now = until;
    }

    fn due(&mut self) {
        if let Some(due) = self.service.next_timeout() {
            self.now = self.now.max(due);
            self.tell(Input::Timeout);
            self.drain();
            let mut rounds = 0;
            while self.service.next_timeout().is_some_and(|due| due <= self.now) {
                self.tell(Input::Timeout);
                self.drain();
                rounds += 1;
                assert!(rounds < 200, "a deadline that can't be met");
            }
        }
    }

    fn syn_options(knobs: u8, tsval: u32, tsecr: u32) -> Vec<u8> {
        let mut options = Vec::new();
        if knobs & 1 != 0 {
            options.extend([2, 4]);
            options.extend([1460_u16, 536, 88, 0][usize::from(knobs >> 5 & 3)].to_be_bytes());
        }
        if knobs & 2 != 0 {
            options.extend([3, 3, knobs >> 4]);
        }
        if knobs & 4 != 0 {
            options.extend([4, 2]);
        }
        if knobs & 8 != 0 {
            options.extend([8, 10]);
            options.extend(tsval.to_be_bytes());
            options.extend(tsecr.to_be_bytes());
        }
        options
    }

    fn client_syn(&mut self, number: usize, bytes: &mut Bytes<'_>) {
        let client = &mut self.clients[number];
        let iss = u32::from(bytes.byte()).wrapping_mul(0x0101_0101).wrapping_sub(20);
        let knobs = bytes.byte();
        let end = End { iss, nxt: iss.wrapping_add(1), tsval: u32::from(knobs >> 4) << 28, ..End::default() };
        client.end = end;
        client.has_timestamps = knobs & 8 != 0;
        client.oracle.forget();
        client.oracle.ambiguous = true;
        let syn = Tcp {
            src: client.address,
            dst: client.psc,
            seq: iss,
            ack: 0,
            flags: SYN,
            window: 0xffff >> (knobs & 7),
            urgent: 0,
            options: Self::syn_options(knobs, client.end.tsval, 0),
            payload: Vec::new(),
        };
        self.hears_client(LINK, &syn.write());
    }

    fn server_syn_ack(&mut self, server: usize, client: usize, bytes: &mut Bytes<'_>) {
        let Some(id) = self.ids[server] else { return };
        let knobs = bytes.byte();
        let end = &mut self.ends[server * CLIENTS + client];
        if !end.knows_peer {
            return;
        }
        end.iss = u32::from(knobs).wrapping_mul(0x0202_0305).wrapping_sub(9);
        end.nxt = end.iss.wrapping_add(1);
        let tsecr = end.heard_tsval;
        let knobs = if tsecr.is_some() { knobs | 8 } else { knobs & !8 };
        let syn_ack = Tcp {
            src: guest(server, self.clients[client].address.ip()),
            dst: self.clients[client].address,
            seq: end.iss,
            ack: end.rcv,
            flags: SYN | ACK,
            window: 0xffff >> (knobs & 7),
            urgent: 0,
            // Mostly, all servers run the same kernel.
            options: Self::syn_options(
                if knobs & 0x90 == 0 { knobs } else { 7 | knobs & 8 },
                1000,
                tsecr.unwrap_or(0),
            ),
            payload: Vec::new(),
        };
        self.hears_server(id, &syn_ack.write());
    }

    /// A client's whole handshake with the OVM and the replicas.
    fn handshake(&mut self, client: usize, bytes: &mut Bytes<'_>) {
        self.client_syn(client, bytes);
        if let Some(ovm) = self.service.ovm().and_then(|ovm| self.server_of(ovm)) {
            self.server_syn_ack(ovm, client, bytes);
        }
        let third = self.client_packet(client, 0, 0, ACK, &mut Bytes::new(&[]));
        self.hears_client(LINK, &third.write());
        for server in 0..SERVERS {
            if self.ids[server] != self.service.ovm() {
                self.server_syn_ack(server, client, bytes);
            }
        }
    }

    fn client_packet(&self, number: usize, seq: u32, ack: u32, flags: u8, bytes: &mut Bytes<'_>) -> Tcp {
        let client = &self.clients[number];
        let shape = bytes.byte();
        let seq = client.end.nxt.wrapping_add(seq);
        let first = seq.wrapping_sub(client.end.iss);
        let length = [0, 1, 3, 100, 1000, 1448, 2000, 9000][usize::from(shape & 7)];
        let twist = if shape & 0xc0 == 0xc0 { bytes.byte() & 0x7f } else { 0 };
        let payload =
            (0..length).map(|at| (first.wrapping_add(at).wrapping_mul(7) as u8 & 0x7f) ^ twist).collect();
        let mut options = Vec::new();
        if client.has_timestamps && shape & 0x38 != 0x38 {
            options.extend([8, 10]);
            let jump = if shape & 0x38 == 0x30 { u32::from(bytes.byte()) << 24 } else { 0 };
            options.extend(client.end.tsval.wrapping_add(jump).to_be_bytes());
            options.extend(client.end.heard_tsval.unwrap_or(0).to_be_bytes());
        }
        if shape & 0x38 == 0x28 {
            options.extend([2, 4, 5, 0xb4, 5, 26]);
            options.extend([7; 24]);
        }
        if shape & 0x38 == 0x18 {
            // An option of any kind, and of any length.
            options.extend([bytes.byte() & 31, bytes.byte() & 15, 1, 1]);
        }
        Tcp {
            src: client.address,
            dst: client.psc,
            seq,
            ack: client.end.rcv.wrapping_add(ack),
            flags,
            window: if shape & 0x38 == 0x20 { u16::from(bytes.byte()) } else { 0x7fff },
            urgent: u16::from(flags & 32) * 3,
            options,
            payload,
        }
    }

    fn client_segment(&mut self, number: usize, bytes: &mut Bytes<'_>) {
        let flags = Self::flags(bytes.byte());
        let (seq, ack) = (bytes.error(), bytes.error());
        let tcp = self.client_packet(number, seq, ack, flags, bytes);
        let client = &mut self.clients[number];
        if seq == 0 {
            client.end.nxt = client.end.nxt.wrapping_add(tcp.length());
        }
        client.end.tsval = client.end.tsval.wrapping_add(1);
        if ack == 0 && (tcp.ack.wrapping_sub(client.oracle.acked) as i32) > 0 {
            client.oracle.acked = tcp.ack;
        }
        if flags & SYN != 0 {
            client.oracle.ambiguous = true;
        }
        self.hears_client(LINK, &tcp.write());
    }

    fn server_packet(
        &self,
        server: usize,
        client: usize,
        seq: u32,
        ack: u32,
        flags: u8,
        bytes: &mut Bytes<'_>,
    ) -> Tcp {
        let end = &self.ends[server * CLIENTS + client];
        let shape = bytes.byte();
        let seq = end.nxt.wrapping_add(seq);
        let first = seq.wrapping_sub(end.iss);
        let length = [0, 1, 3, 100, 1000, 1448, 3000, 20_000][usize::from(shape & 7)];
        let payload = match shape & 0x18 {
            0x18 => vec![self.voices.mark(server); length as usize],
            _ => (0..length).map(|at| first.wrapping_add(at).wrapping_mul(11) as u8 & 0x7f).collect(),
        };
        let mut options = Vec::new();
        if let Some(tsecr) = end.heard_tsval {
            options.extend([8, 10]);
            options.extend((end.tsval.wrapping_add(1000)).to_be_bytes());
            options.extend(tsecr.to_be_bytes());
        }
        Tcp {
            src: guest(server, self.clients[client].address.ip()),
            dst: self.clients[client].address,
            seq,
            ack: end.rcv.wrapping_add(ack),
            flags,
            window: if shape & 0x60 == 0x60 { u16::from(bytes.byte()) } else { 0x7fff },
            urgent: u16::from(flags & 32) * 3,
            options,
            payload,
        }
    }

    fn server_segment(&mut self, server: usize, client: usize, bytes: &mut Bytes<'_>) {
        let Some(id) = self.ids[server] else { return };
        let flags = Self::flags(bytes.byte());
        let (seq, ack) = (bytes.error(), bytes.error());
        let tcp = self.server_packet(server, client, seq, ack, flags, bytes);
        let end = &mut self.ends[server * CLIENTS + client];
        if seq == 0 {
            end.nxt = end.nxt.wrapping_add(tcp.length());
        }
        end.tsval = end.tsval.wrapping_add(1);
        self.hears_server(id, &tcp.write());
    }

    /// Every server acknowledges what it has, and answers the same.
    fn answer_all(&mut self, client: usize, bytes: &mut Bytes<'_>) {
        let flags = Self::flags(bytes.byte());
        let shape = bytes.byte() & 0x0f;
        for server in 0..SERVERS {
            let Some(id) = self.ids[server] else { continue };
            let tcp = self.server_packet(server, client, 0, 0, flags, &mut Bytes::new(&[shape]));
            let end = &mut self.ends[server * CLIENTS + client];
            end.nxt = end.nxt.wrapping_add(tcp.length());
            self.hears_server(id, &tcp.write());
        }
    }

    fn flags(byte: u8) -> u8 {
        match byte {
            0..=160 => ACK,
            161..=200 => ACK | FIN,
            201..=220 => RST,
            221..=235 => RST | ACK,
            236..=245 => ACK | 32,
            odd => odd.wrapping_mul(29),
        }
    }

    /// The last packet that the engine sent comes back from a client or server, slightly changed.
    fn mutate(&mut self, server: usize, bytes: &mut Bytes<'_>) {
        let mut packet = self.last.clone();
        let how = bytes.byte();
        for _ in 0..how & 3 {
            let at = usize::from(bytes.byte());
            if let Some(byte) = packet.get_mut(at) {
                // A changed byte of text must not become a server's mark.
                *byte = bytes.byte() & if at < 40 { 0xff } else { 0x7f };
            }
        }
        if how & 4 != 0 {
            packet::repair(&mut packet);
        }
        if how & 8 != 0 {
            packet.truncate(usize::from(bytes.byte()));
        }
        if how & 16 != 0 {
            self.raw_from_client(LINK, &packet);
        } else if let Some(id) = self.ids[server] {
            self.raw_from_server(id, &packet);
        }
    }

    /// A router on the path sends an ICMP error about the last packet.
    fn icmp(&mut self, how: u8) {
        if self.last.len() < 60 {
            return;
        }
        let v4 = self.last[0] >> 4 == 4;
        let tcp = Tcp::read(&self.last);
        let mtu = u32::from(how) << 3;
        let [a, b, c, d] = mtu.to_be_bytes();
        let mut message = match (v4, how & 1) {
            (true, 0) => vec![3, 4, 0, 0, 0, 0, c, d],
            (true, _) => vec![3, 1, 0, 0, 0, 0, 0, 0],
            (false, 0) => vec![2, 0, 0, 0, a, b, c, d],
            (false, _) => vec![1, 4, 0, 0, 0, 0, 0, 0],
        };
        let header = if v4 { 28 } else { 48 };
        message.extend_from_slice(&self.last[..header]);
        let from =
            if v4 { [10, 0, 0, 254].into() } else { Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0xfe).into() };
        let mut packet = packet::ip(from, tcp.src.ip(), if v4 { 1 } else { 58 }, &message);
        packet::repair(&mut packet);
        self.tell(Input::Client { link: LINK, passage: Passage::Kept, packet: &packet });
        self.drain();
    }

    fn operate(&mut self, server: usize, what: u8) {
        // Any command may depose the OVM.
        let _ = understudy_driver::cut_over(self, self.now, None);
        let id = self.ids[server];
        let now = self.now;
        match (what & 15, id) {
            (0 | 1, Some(id)) => {
                let evidence = if what & 16 == 0 { Evidence::DomainGone } else { Evidence::DomainPaused };
                self.cut_over(Input::Evidence { server: id, evidence });
            }
            (2, Some(server)) => self.tell(Input::Running { server, running: what & 16 != 0 }),
            (3..=5, id) => {
                let present =
                    id.is_some_and(|id| self.service.status().servers.iter().any(|known| known.server == id));
                let seeding = match what >> 4 & 3 {
                    0 => Seeding::Unseeded,
                    1 => Seeding::Drain { deadline: now + Duration::from_millis(50) },
                    _ => Seeding::AssumeIdentical,
                };
                if let (true, Some(id)) = (present, id) {
                    self.command(Command::Seed { server: id, seeding });
                } else {
                    let spec = self.spec(server);
                    self.command(Command::Attach { spec, seeding });
                }
            }
            (6, Some(server)) => self.command(Command::Detach { server }),
            (7 | 8, id) => {
                self.cut_over(Input::Command(Command::Switchover { to: id.filter(|_| what & 16 == 0) }))
            }
            (9 | 10, id) => {
                let (to, force) = (id.filter(|_| what & 16 == 0), what & 32 != 0);
                self.cut_over(Input::Command(Command::Failover { to, force }));
            }
            (11, _) => {
                let gone = self.ovm.is_none_or(|ovm| self.server_of(ovm) != Some(server));
                let absent =
                    id.is_none_or(|id| self.service.status().servers.iter().all(|known| known.server != id));
                if gone && absent {
                    let spec = self.spec(server);
                    self.cut_over(Input::Command(Command::InstallOvm(spec)));
                }
            }
            (12, _) => self.restore(),
            (13, Some(id)) => {
                let link = (what & 32 != 0).then_some(LINK);
                let asked = Sign::Asked { target: self.clients[server].address.ip(), link };
                let sign = if what & 16 == 0 { Sign::Answered } else { asked };
                self.tell(Input::Sign { server: id, sign });
            }
            _ => {}
        }
        self.drain();
    }

    /// Another process continues from what this one saved.
    fn restore(&mut self) {
        let saved = self.service.save();
        self.service = match Service::restore(&saved) {
            Ok(service) => service,
            Err(error) => panic!("what was saved just now: {error}"),
        };
        assert!(self.service.save() == saved, "the engine saves something else than it was restored from");
    }

    /// Clients and servers fall silent: in the end nothing may be left.
    pub(crate) fn finish(mut self) {
        for server in 0..SERVERS {
            if let Some(id) = self.ids[server] {
                self.command(Command::Detach { server: id });
            }
        }
        self.drain();
        self.wait(Duration::from_secs(3 * 7200));
        let status = self.service.status();
        assert_eq!(
            (status.conversations, status.retained_bytes, status.recuperating),
            (0, 0, 0),
            "left behind"
        );
        for server in &status.servers {
            assert_eq!((server.covered, server.diverged, server.behind_bytes), (0, 0, 0), "{server:?}");
        }
    }
}
