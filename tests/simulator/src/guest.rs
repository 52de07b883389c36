//! A server domain: a stack, the service in it, and the domain's health.

use core::net::{IpAddr, SocketAddr};
use std::collections::VecDeque;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use understudy_protocol::ServerId;

use crate::application::{Session, Shared};
use crate::hostile::is_hostile;
use crate::prng::Prng;
use crate::stack::{Stack, StackKnobs};

/// Answer bytes the service keeps unsent before it stops reading.
const UNSENT_LIMIT: usize = 128 << 10;
/// Packets that the ring of a frozen domain holds.
const RING_PACKETS: usize = 256;
/// Sockets ready to accept a SYN.
const BACKLOG: usize = 2;
/// Sockets that wait for the process to accept, in any state: more than the hostile clients of a run can half open, since
/// smoltcp refuses what finds no room, where kernels answer with cookies or not at all.
const SOCKETS: usize = 256;

/// A server's properties.
#[derive(Clone, Debug)]
pub(crate) struct GuestKnobs {
    pub(crate) stack: StackKnobs,
    /// How long the service thinks about what it read, drawn each time.
    pub(crate) think_us: (u64, u64),
    /// Largest piece that the service reads at once.
    pub(crate) read_size: usize,
    /// Largest piece that the service writes at once.
    pub(crate) write_size: usize,
}

/// A domain's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Running,
    /// Paused: nothing in it runs, and the toolstack says so.
    Frozen,
    /// It makes no progress, but the toolstack says that it runs.
    Spinning,
    /// The stack lives, the service's process is stuck.
    Hung,
    /// The stack lives, the service's process died: nothing listens.
    Killed,
    Gone,
}

/// A connection as the service's process has it.
struct Connection {
    handle: SocketHandle,
    session: Session,
    /// Its requests use no shared state.
    hostile: bool,
    /// Bytes that the service thinks about, and when it is done (no bytes: end of input).
    thinking: VecDeque<(u64, Vec<u8>)>,
    unsent: Vec<u8>,
    /// How much of `unsent` the stack took.
    written: usize,
    saw_end: bool,
}

pub(crate) struct Guest {
    pub(crate) id: ServerId,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) health: Health,
    pub(crate) shared: Shared,
    knobs: GuestKnobs,
    stack: Stack,
    port: u16,
    rng: Prng,
    connections: Vec<Connection>,
    listening: Vec<SocketHandle>,
    ring: VecDeque<Vec<u8>>,
    /// Added to every think time.
    pub(crate) slow_us: u64,
    /// The next answer byte is wrong.
    pub(crate) wrong_answer: bool,
    /// Packets that found no room in the ring of a frozen domain.
    pub(crate) ring_drops: u64,
}

impl Guest {
    pub(crate) fn new(id: ServerId, knobs: GuestKnobs, addresses: Vec<IpAddr>, port: u16, seed: u64) -> Self {
        Self {
            id,
            health: Health::Running,
            shared: Shared::default(),
            stack: Stack::new(knobs.stack.clone(), &addresses, seed),
            knobs,
            addresses,
            port,
            rng: Prng::fork(seed, "guest", 0),
            connections: Vec::new(),
            listening: Vec::new(),
            ring: VecDeque::new(),
            slow_us: 0,
            wrong_answer: false,
            ring_drops: 0,
        }
    }

    pub(crate) fn mtu(&self) -> u16 {
        self.knobs.stack.mtu as u16
    }

    pub(crate) fn receive_buffer(&self) -> usize {
        self.knobs.stack.receive_buffer
    }

    /// Whether the domain's state says that it runs.
    pub(crate) fn paused(&self) -> bool {
        self.health == Health::Frozen
    }

    /// Whether it handles packets that arrive.
    pub(crate) fn stack_runs(&self) -> bool {
        matches!(self.health, Health::Running | Health::Hung | Health::Killed)
    }

    /// A packet reaches the vif.
    pub(crate) fn receive(&mut self, packet: Vec<u8>) {
        match self.health {
            Health::Gone => {}
            _ if self.stack_runs() => self.stack.receive(packet),
            _ if self.ring.len() < RING_PACKETS => self.ring.push_back(packet),
            _ => self.ring_drops += 1,
        }
    }

    /// This domain's stack has stopped serving its connection with a client (with any, if none is named).
    pub(crate) fn forgot(&self, now: u64, client: Option<SocketAddr>) -> bool {
        self.stack.forgot(now, client, self.port)
    }

    /// A connection waits for the end of its handshake.
    pub(crate) fn is_half_open(&self) -> bool {
        self.stack.is_half_open()
    }

    /// The service has answered more than the stack sends, for no visible reason.
    pub(crate) fn holds_back(&self, now: u64) -> bool {
        self.stack.holds_back(now, 50_000)
    }

    /// The domain runs again.
    pub(crate) fn thaw(&mut self) {
        if matches!(self.health, Health::Frozen | Health::Spinning) {
            self.health = Health::Running;
            for packet in self.ring.drain(..) {
                self.stack.receive(packet);
            }
        }
    }

    /// The service's process dies; its kernel closes what it had open.
    pub(crate) fn kill_process(&mut self, orderly: bool) {
        if self.health != Health::Running && self.health != Health::Hung {
            return;
        }
        self.health = Health::Killed;
        for connection in self.connections.drain(..) {
            let socket = self.stack.socket(connection.handle);
            if orderly {
                socket.close();
            } else {
                socket.abort();
            }
        }
        for handle in self.listening.drain(..) {
            self.stack.socket(handle).abort();
        }
    }

    /// Runs what is due and returns the packets that leave the domain.
    pub(crate) fn poll(&mut self, now: u64) -> Vec<Vec<u8>> {
        if !self.stack_runs() {
            return Vec::new();
        }
        self.listen();
        let mut sent = self.stack.poll(now);
        if self.health == Health::Running {
            self.accept();
            if self.serve(now) {
                sent.extend(self.stack.poll(now));
            }
        }
        sent
    }

    /// When [`Guest::poll`] is due.
    pub(crate) fn poll_at(&mut self, now: u64) -> Option<u64> {
        if !self.stack_runs() {
            return None;
        }
        let service = self
            .connections
            .iter()
            .filter_map(|c| c.thinking.front().map(|(at, _)| *at))
            .min()
            .filter(|_| self.health == Health::Running);
        let stack = self.stack.poll_at(now);
        [service, stack].into_iter().flatten().min()
    }

    /// Keeps sockets in LISTEN; those that a handshake took are made up for.
    fn listen(&mut self) {
        if self.health == Health::Killed {
            return;
        }
        let stack = &mut self.stack;
        // smoltcp gives a SYN to the first socket that would take it. A listening socket before one
        // in SYN-RECEIVED (a reset put it back) would take that one's SYN when it is repeated.
        let last =
            self.listening.iter().rposition(|&h| stack.socket(h).state() != tcp::State::Listen).unwrap_or(0);
        let mut position = 0;
        self.listening.retain(|&handle| {
            let stale = position < last && stack.socket(handle).state() == tcp::State::Listen;
            if stale {
                stack.socket(handle).close();
            }
            position += 1;
            !stale
        });
        for &handle in &self.listening {
            if stack.socket(handle).state() == tcp::State::Listen {
                stack.renew(handle);
            }
        }
        let free = self.listening.iter().filter(|&&h| stack.socket(h).state() == tcp::State::Listen).count();
        let room = SOCKETS.saturating_sub(self.listening.len());
        for _ in 0..BACKLOG.saturating_sub(free).min(room) {
            let handle = self.stack.open();
            if self.stack.socket(handle).listen(self.port).is_ok() {
                self.listening.push(handle);
            }
        }
    }

    fn accept(&mut self) {
        let stack = &mut self.stack;
        let connections = &mut self.connections;
        self.listening.retain(|&handle| {
            let state = stack.socket(handle).state();
            // A connection is the process's once its handshake is complete.
            if matches!(state, tcp::State::Listen | tcp::State::SynReceived) {
                return true;
            }
            connections.push(Connection {
                handle,
                session: Session::new(),
                hostile: stack
                    .socket(handle)
                    .remote_endpoint()
                    .is_some_and(|end| is_hostile(end.addr.into())),
                thinking: VecDeque::new(),
                unsent: Vec::new(),
                written: 0,
                saw_end: false,
            });
            false
        });
    }

    /// The service's process: reads, thinks, answers. True if it touched a socket.
    fn serve(&mut self, now: u64) -> bool {
        let mut touched = false;
        let Self { connections, stack, shared, knobs, rng, .. } = self;
        for connection in connections.iter_mut() {
            let socket = stack.socket(connection.handle);
            let think = |rng: &mut Prng| rng.between(knobs.think_us.0, knobs.think_us.1) + self.slow_us;
            while socket.can_recv() && connection.unsent.len() - connection.written < UNSENT_LIMIT {
                let mut bytes = vec![0; knobs.read_size.min(socket.recv_queue())];
                let length = socket.recv_slice(&mut bytes).unwrap_or(0);
                bytes.truncate(length);
                if length == 0 {
                    break;
                }
                touched = true;
                let done = now + think(rng);
                let done = connection.thinking.back().map_or(done, |(at, _)| done.max(*at));
                connection.thinking.push_back((done, bytes));
            }
            if !socket.may_recv() && !connection.saw_end && matches!(socket.state(), tcp::State::CloseWait) {
                connection.saw_end = true;
                let done = now + think(rng);
                let done = connection.thinking.back().map_or(done, |(at, _)| done.max(*at));
                connection.thinking.push_back((done, Vec::new()));
            }
            while let Some((at, _)) = connection.thinking.front()
                && *at <= now
            {
                let Some((_, bytes)) = connection.thinking.pop_front() else {
                    break;
                };
                let before = connection.unsent.len();
                if bytes.is_empty() {
                    connection.session.end_of_input(&mut connection.unsent);
                } else {
                    let mut own = Shared::default();
                    let shared = if connection.hostile { &mut own } else { &mut *shared };
                    connection.session.input(&bytes, shared, &mut connection.unsent);
                }
                if self.wrong_answer && connection.unsent.len() > before {
                    self.wrong_answer = false;
                    connection.unsent[before] ^= 0x20;
                }
            }
            while connection.written < connection.unsent.len() && socket.can_send() {
                let rest = &connection.unsent[connection.written..];
                let piece = rest.len().min(knobs.write_size);
                let taken = socket.send_slice(&rest[..piece]).unwrap_or(0);
                if taken == 0 {
                    break;
                }
                touched = true;
                connection.written += taken;
            }
            if connection.written == connection.unsent.len() {
                connection.unsent.clear();
                connection.written = 0;
            }
            if connection.session.closed()
                && connection.unsent.is_empty()
                && matches!(socket.state(), tcp::State::Established | tcp::State::CloseWait)
            {
                socket.close();
                touched = true;
            }
        }
        // Closed sockets stay in the set: the place of one must not go to a listening socket, which
        // would then come before others' sockets.
        connections.retain(|connection| stack.socket(connection.handle).state() != tcp::State::Closed);
        touched
    }
}
