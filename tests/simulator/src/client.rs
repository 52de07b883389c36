//! A client host: connections that follow a plan and check every byte of the answers against what
//! one server would have said.

use core::net::{IpAddr, SocketAddr};

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;

use crate::application::{KEYS, Session, Shared, op, request};
use crate::prng::{Prng, splitmix};
use crate::stack::{Stack, StackKnobs};

/// One step of a connection's plan.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A request with a payload of this size.
    Request { op: u8, size: usize },
    /// A request on a shared log: made only while no other connection has one on the same key
    /// outstanding, so that the answers order the requests.
    Shared { key: u8, size: usize },
    /// Asks for this many bytes.
    Download { size: usize },
    /// Waits for a while, once all answers are in.
    Pause { us: u64 },
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The client closes when it has all answers.
    Close,
    /// The client closes its half right after the last request and continues to read.
    HalfClose,
    /// The client asks the server to close.
    Quit,
    /// The client resets.
    Abort,
    /// The connection stays open to the end of the run.
    Stay,
}

/// The plan of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) start_us: u64,
    pub(crate) ipv6: bool,
    pub(crate) steps: Vec<Step>,
    /// Requests sent ahead of their answers.
    pub(crate) pipeline: usize,
    pub(crate) ending: Ending,
    /// The client stops reading for a time after each such number of bytes.
    pub(crate) slow_reading: Option<(usize, u64)>,
    /// Largest piece written to the socket at once.
    pub(crate) write_size: usize,
    /// The local port is that of the client's previous connection.
    pub(crate) reuse_port: bool,
}

/// The plan of a client.
#[derive(Clone, Debug)]
pub(crate) struct ClientKnobs {
    pub(crate) stack: StackKnobs,
    pub(crate) plans: Vec<Plan>,
}

/// The result of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Every answer was right, and the end was orderly.
    Completed,
    /// Everything that the client read was right; then it reset the connection as planned.
    Aborted,
    /// Reset by the other side.
    Reset,
    /// The stream of answers ended early.
    Truncated,
    /// An answer byte was wrong at this position.
    WrongByte(u64),
}

/// The world's shared state as the clients know it, and who may use which key of it.
pub(crate) struct Agreement {
    pub(crate) shared: Shared,
    /// By key: the connection (client, plan) that uses it.
    holders: [Option<(usize, usize)>; KEYS],
    /// By key: its state is no longer known, since a connection that used it broke.
    pub(crate) unknown: [bool; KEYS],
    /// A key was given back since this was last looked at.
    pub(crate) released: bool,
}

impl Agreement {
    pub(crate) fn new() -> Self {
        Self { shared: Shared::default(), holders: [None; KEYS], unknown: [false; KEYS], released: false }
    }

    /// Some connection has a request on this key outstanding.
    pub(crate) fn in_use(&self, key: usize) -> bool {
        self.holders[key].is_some()
    }

    fn acquire(&mut self, key: usize, who: (usize, usize)) -> bool {
        match self.holders[key] {
            None => self.holders[key] = Some(who),
            Some(holder) => return holder == who,
        }
        true
    }

    fn release(&mut self, who: (usize, usize)) {
        for holder in &mut self.holders {
            if *holder == Some(who) {
                *holder = None;
                self.released = true;
            }
        }
    }

    fn lose(&mut self, who: (usize, usize)) {
        for (key, holder) in self.holders.iter().enumerate() {
            if *holder == Some(who) {
                self.unknown[key] = true;
            }
        }
        self.release(who);
    }
}

pub(crate) struct Connection {
    handle: Option<SocketHandle>,
    pub(crate) port: u16,
    step: usize,
    steps_done: bool,
    resume_at: u64,
    to_send: Vec<u8>,
    written: usize,
    model: Session,
    expected: Vec<u8>,
    pub(crate) received: usize,
    /// Positions in `expected` at which answers of outstanding requests end.
    answer_ends: std::collections::VecDeque<usize>,
    pub(crate) answered: u64,
    pub(crate) issued: u64,
    read_again_at: u64,
    read_since_pause: usize,
    saw_end: bool,
    wrong_at: Option<u64>,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) ended_at: u64,
}

pub(crate) struct Client {
    index: usize,
    pub(crate) addresses: Vec<IpAddr>,
    psc: Vec<IpAddr>,
    psc_port: u16,
    pub(crate) knobs: ClientKnobs,
    stack: Stack,
    pub(crate) connections: Vec<Connection>,
    payload_seed: u64,
}

impl Client {
    pub(crate) fn new(
        index: usize,
        knobs: ClientKnobs,
        addresses: Vec<IpAddr>,
        psc: Vec<IpAddr>,
        psc_port: u16,
        seed: u64,
    ) -> Self {
        let mut first_port = Prng::fork(seed, "port", 0).between(32_768, 60_000) as u16;
        let connections = knobs
            .plans
            .iter()
            .map(|plan| {
                if !plan.reuse_port {
                    first_port += 1;
                }
                Connection {
                    handle: None,
                    port: first_port,
                    step: 0,
                    steps_done: false,
                    resume_at: plan.start_us,
                    to_send: Vec::new(),
                    written: 0,
                    model: Session::new(),
                    expected: Vec::new(),
                    received: 0,
                    answer_ends: Default::default(),
                    answered: 0,
                    issued: 0,
                    read_again_at: 0,
                    read_since_pause: 0,
                    saw_end: false,
                    wrong_at: None,
                    outcome: None,
                    ended_at: 0,
                }
            })
            .collect();
        Self {
            index,
            stack: Stack::new(knobs.stack.clone(), &addresses, seed),
            addresses,
            psc,
            psc_port,
            knobs,
            connections,
            payload_seed: splitmix(seed),
        }
    }

    pub(crate) fn receive(&mut self, packet: Vec<u8>) {
        self.stack.receive(packet);
    }

    /// Every connection has ended, or has all its answers if it stays open.
    pub(crate) fn finished(&self) -> bool {
        self.connections
            .iter()
            .zip(&self.knobs.plans)
            .all(|(c, plan)| c.outcome.is_some() || (plan.ending == Ending::Stay && c.idle()))
    }

    /// A connection waits for a log that another connection uses.
    pub(crate) fn waits_for_turn(&self, index: usize, agreement: &Agreement) -> bool {
        let connection = &self.connections[index];
        let next = self.knobs.plans[index].steps.get(connection.step);
        connection.answer_ends.is_empty()
            && matches!(next, Some(Step::Shared { key, .. })
                if agreement.holders[usize::from(*key)].is_some_and(|who| who != (self.index, index)))
    }

    /// A connection's two ends, as the client has them.
    pub(crate) fn ends(&self, index: usize) -> Option<(SocketAddr, SocketAddr)> {
        let ipv6 = self.knobs.plans[index].ipv6;
        let family = |list: &[IpAddr]| list.iter().copied().find(|a| a.is_ipv6() == ipv6);
        Some((
            SocketAddr::new(family(&self.addresses)?, self.connections[index].port),
            SocketAddr::new(family(&self.psc)?, self.psc_port),
        ))
    }

    /// This host's stack has stopped serving a connection.
    pub(crate) fn forgot(&self, now: u64, index: usize) -> bool {
        self.ends(index).is_some_and(|(own, psc)| self.stack.forgot(now, Some(psc), own.port()))
    }

    /// Runs what is due and returns the packets that leave.
    pub(crate) fn poll(&mut self, now: u64, agreement: &mut Agreement) -> Vec<Vec<u8>> {
        let mut sent = self.stack.poll(now);
        // The stack may free buffer or learn of an end only by sending, hence several rounds.
        for _ in 0..4 {
            if !self.work(now, agreement) {
                break;
            }
            sent.extend(self.stack.poll(now));
        }
        sent
    }

    pub(crate) fn poll_at(&mut self, now: u64) -> Option<u64> {
        let stack = self.stack.poll_at(now);
        let own = self
            .connections
            .iter()
            .filter(|c| c.outcome.is_none())
            .flat_map(|c| [c.resume_at, c.read_again_at])
            .filter(|&at| at > now)
            .min();
        [stack, own].into_iter().flatten().min()
    }

    fn work(&mut self, now: u64, agreement: &mut Agreement) -> bool {
        let mut touched = false;
        for index in 0..self.connections.len() {
            if self.connections[index].outcome.is_some() {
                continue;
            }
            let earlier_on_port = self.knobs.plans[index].reuse_port
                && self.connections[..index].iter().rev().take(1).any(|c| c.outcome.is_none());
            if self.connections[index].handle.is_none() {
                if self.connections[index].resume_at <= now && !earlier_on_port {
                    self.connect(index);
                    touched = true;
                }
                continue;
            }
            touched |= self.work_on(index, now, agreement);
        }
        touched
    }

    fn connect(&mut self, index: usize) {
        let ipv6 = self.knobs.plans[index].ipv6;
        let family = |list: &[IpAddr]| list.iter().copied().find(|a| a.is_ipv6() == ipv6);
        let (Some(own), Some(psc)) = (family(&self.addresses), family(&self.psc)) else {
            self.connections[index].outcome = Some(Outcome::Reset);
            return;
        };
        if self.knobs.plans[index].reuse_port
            && let Some(former) = index.checked_sub(1)
            && let Some(handle) = self.connections[former].handle.take()
        {
            // The stack would give the new connection's segments to the old one's TIME-WAIT.
            self.stack.sockets.remove(handle);
        }
        let handle = self.stack.open();
        let port = self.connections[index].port;
        if self.stack.connect(handle, (psc, self.psc_port), (own, port)) {
            self.connections[index].handle = Some(handle);
        } else {
            self.connections[index].outcome = Some(Outcome::Reset);
        }
    }

    fn work_on(&mut self, index: usize, now: u64, agreement: &mut Agreement) -> bool {
        let who = (self.index, index);
        let plan = &self.knobs.plans[index];
        let connection = &mut self.connections[index];
        let Some(handle) = connection.handle else {
            return false;
        };
        let socket = self.stack.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if matches!(socket.state(), tcp::State::SynSent | tcp::State::SynReceived) {
            return false;
        }
        let mut touched = connection.read(socket, plan, now);
        while connection.answer_ends.front().is_some_and(|&end| end <= connection.received) {
            connection.answer_ends.pop_front();
            connection.answered += 1;
        }
        if connection.answer_ends.is_empty() {
            agreement.release(who);
        }
        let seed = splitmix(self.payload_seed ^ (index as u64) << 32);
        connection.issue(plan, now, who, agreement, seed);
        touched |= connection.write(socket, plan);
        let outcome = connection.end(socket, plan);
        if outcome != connection.outcome {
            connection.outcome = outcome;
            connection.ended_at = now;
            match connection.outcome {
                Some(Outcome::Completed) => agreement.release(who),
                _ => agreement.lose(who),
            }
            if connection.outcome == Some(Outcome::Aborted) {
                socket.abort();
            }
            touched = true;
        }
        touched
    }
}

impl Connection {
    /// All answers are in and nothing more is planned.
    pub(crate) fn idle(&self) -> bool {
        self.steps_done && self.received == self.expected.len() && self.written == self.to_send.len()
    }

    fn read(&mut self, socket: &mut tcp::Socket<'_>, plan: &Plan, now: u64) -> bool {
        let mut touched = false;
        while now >= self.read_again_at && socket.can_recv() {
            let limit = plan.slow_reading.map_or(usize::MAX, |(bytes, _)| bytes);
            let Ok(bytes) = socket.recv(|data| {
                let take = data.len().min(limit);
                (take, data[..take].to_vec())
            }) else {
                break;
            };
            touched = true;
            for byte in &bytes {
                if self.wrong_at.is_none() && self.expected.get(self.received) != Some(byte) {
                    self.wrong_at = Some(self.received as u64);
                }
                self.received += 1;
            }
            self.read_since_pause += bytes.len();
            if let Some((limit, us)) = plan.slow_reading
                && self.read_since_pause >= limit
            {
                self.read_since_pause = 0;
                self.read_again_at = now + us;
            }
        }
        if !socket.can_recv()
            && matches!(
                socket.state(),
                tcp::State::CloseWait | tcp::State::LastAck | tcp::State::Closing | tcp::State::TimeWait
            )
        {
            self.saw_end = true;
        }
        touched
    }

    fn issue(&mut self, plan: &Plan, now: u64, who: (usize, usize), agreement: &mut Agreement, seed: u64) {
        while now >= self.resume_at && self.answer_ends.len() < plan.pipeline {
            let Some(step) = plan.steps.get(self.step) else {
                break;
            };
            let bytes = match step {
                Step::Request { op, size } => request(*op, &payload(seed, self.step, *size)),
                Step::Shared { key, size } => {
                    if agreement.unknown[usize::from(*key)] {
                        self.step += 1;
                        continue;
                    }
                    if !agreement.acquire(usize::from(*key), who) {
                        return;
                    }
                    let mut bytes = payload(seed, self.step, size + 1);
                    bytes[0] = *key;
                    request(op::SHARED, &bytes)
                }
                Step::Download { size } => {
                    request(op::GET, &[&(*size as u32).to_be_bytes()[..], b"."].concat())
                }
                Step::Pause { us } => {
                    if !self.answer_ends.is_empty() {
                        return;
                    }
                    self.resume_at = now + us;
                    self.step += 1;
                    return;
                }
            };
            self.step += 1;
            self.ask(&bytes, &mut agreement.shared);
        }
        if self.step == plan.steps.len()
            && !self.steps_done
            && now >= self.resume_at
            && (plan.ending == Ending::HalfClose || self.answer_ends.is_empty())
        {
            self.steps_done = true;
            match plan.ending {
                Ending::Quit => self.ask(&request(op::QUIT, b"."), &mut agreement.shared),
                // The service answers the client's FIN as it answers a request.
                Ending::HalfClose | Ending::Close => self.model.end_of_input(&mut self.expected),
                Ending::Abort | Ending::Stay => {}
            }
        }
    }

    fn ask(&mut self, bytes: &[u8], shared: &mut Shared) {
        self.to_send.extend_from_slice(bytes);
        self.model.input(bytes, shared, &mut self.expected);
        self.answer_ends.push_back(self.expected.len());
        self.issued += 1;
    }

    fn write(&mut self, socket: &mut tcp::Socket<'_>, plan: &Plan) -> bool {
        let mut touched = false;
        while self.written < self.to_send.len() && socket.can_send() {
            let rest = &self.to_send[self.written..];
            let piece = rest.len().min(plan.write_size);
            let taken = socket.send_slice(&rest[..piece]).unwrap_or(0);
            if taken == 0 {
                break;
            }
            self.written += taken;
            touched = true;
        }
        if self.steps_done && self.written == self.to_send.len() {
            let close = match plan.ending {
                Ending::Close | Ending::HalfClose => true,
                Ending::Quit => self.saw_end,
                Ending::Abort | Ending::Stay => false,
            };
            if close && matches!(socket.state(), tcp::State::Established | tcp::State::CloseWait) {
                socket.close();
                touched = true;
            }
        }
        touched
    }

    fn end(&self, socket: &tcp::Socket<'_>, plan: &Plan) -> Option<Outcome> {
        if let Some(position) = self.wrong_at {
            return Some(Outcome::WrongByte(position));
        }
        let all = self.steps_done && self.received == self.expected.len();
        if self.saw_end && !all {
            return Some(Outcome::Truncated);
        }
        match socket.state() {
            tcp::State::TimeWait => Some(Outcome::Completed),
            // LAST-ACK ends in CLOSED when the server has everything.
            tcp::State::Closed if self.saw_end && all => Some(Outcome::Completed),
            tcp::State::Closed => Some(Outcome::Reset),
            _ if plan.ending == Ending::Abort && all => Some(Outcome::Aborted),
            _ => None,
        }
    }
}

/// Request bytes that differ from step to step and from connection to connection.
fn payload(seed: u64, step: usize, size: usize) -> Vec<u8> {
    let mut rng = splitmix(seed ^ step as u64);
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        rng = splitmix(rng);
        bytes.extend_from_slice(&rng.to_be_bytes());
    }
    bytes.truncate(size);
    if let Some(last) = bytes.last_mut() {
        *last |= 1;
    }
    bytes
}
