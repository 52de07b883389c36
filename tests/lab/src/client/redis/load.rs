//! Many Redis connections driven by one thread, checked byte for byte while they run.
//!
//! Every answer is predicted when its request is sent ([`super::script`]); what arrives is compared
//! with that prediction as a stream, so a wrong, missing, repeated or reordered byte is found at
//! once. A connection that breaks stays broken and is reported: nothing reconnects.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use hdrhistogram::Histogram;
use nix::sched::{CloneFlags, unshare};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::script::{Model, Op, Script};
use crate::client::clock::now_ns;
use crate::client::place::{Place, join};

/// Receipts kept; a longer run keeps its first ones and says that it dropped some.
const RECEIPTS: usize = 8_000_000;
/// What one failing connection may say.
const ERRORS: usize = 20;

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Where the service is.
    pub(crate) target: SocketAddr,
    /// Connections opened, and kept open to the end.
    pub(crate) connections: usize,
    /// Those of them that ask all the time; the others ask once at the start and once at the end.
    pub(crate) busy: usize,
    /// Requests outstanding per busy connection.
    pub(crate) depth: usize,
    /// Least time between two batches of one busy connection; none: as fast as answers come.
    pub(crate) pace: Option<Duration>,
    /// First part of every key; no other load on this lab may use it.
    pub(crate) prefix: String,
    /// Same seed, same requests.
    pub(crate) seed: u64,
    /// How long the first and the last answers are waited for.
    pub(crate) patience: Duration,
}

impl Plan {
    pub(crate) fn new(target: SocketAddr, prefix: &str) -> Self {
        Self {
            target,
            connections: 8,
            busy: 8,
            depth: 1,
            pace: Some(Duration::from_millis(2)),
            prefix: prefix.to_owned(),
            seed: 1,
            patience: Duration::from_secs(20),
        }
    }

    /// Opens every connection, asks each one question, and keeps the busy ones asking until told
    /// otherwise.
    pub(crate) fn start(self, place: &Place) -> Result<Running> {
        let orders = Arc::new(Orders::default());
        let (opened, wait) = mpsc::channel();
        let shared = orders.clone();
        let handle = place.spawn("redis-load", move || {
            // How many files may be open is counted by table.
            unshare(CloneFlags::CLONE_FILES)?;
            let mut load = Load::open(self, shared)?;
            load.first_answers()?;
            // The starter gave up if nobody listens; the load then ends by its own error.
            opened.send(()).map_err(|_| anyhow!("nobody waits for the load"))?;
            load.run()
        })?;
        if wait.recv().is_err() {
            join(handle)?;
            bail!("the load ended before its connections were open");
        }
        Ok(Running { handle, orders })
    }
}

#[derive(Debug, Default)]
struct Orders {
    mode: AtomicU8,
    answers: AtomicU64,
    outstanding: AtomicU64,
    broken: AtomicU64,
    first_error: Mutex<Option<String>>,
}

const RUN: u8 = 0;
const HOLD: u8 = 1;
const FINISH: u8 = 2;

/// A load under way.
#[derive(Debug)]
pub(crate) struct Running {
    handle: JoinHandle<Result<Outcome>>,
    orders: Arc<Orders>,
}

impl Running {
    /// Answers received so far.
    pub(crate) fn answers(&self) -> u64 {
        self.orders.answers.load(Ordering::Relaxed)
    }

    /// Connections that broke so far.
    pub(crate) fn broken(&self) -> u64 {
        self.orders.broken.load(Ordering::Relaxed)
    }

    /// How the first connection broke, if one did.
    pub(crate) fn first_error(&self) -> Option<String> {
        self.orders.first_error.lock().ok()?.clone()
    }

    /// Blocks until `more` further answers came.
    pub(crate) fn wait_answers(&self, more: u64, limit: Duration) -> Result<()> {
        let (from, deadline) = (self.answers(), Instant::now() + limit);
        while self.answers() < from + more {
            if self.handle.is_finished() {
                bail!("the load ended early");
            }
            if Instant::now() > deadline {
                bail!(
                    "only {} of {more} answers came within {limit:?}, {} connections are broken; the first: {}",
                    self.answers() - from,
                    self.broken(),
                    self.first_error().unwrap_or_else(|| "none".to_owned())
                );
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// No further requests; blocks until every answer came.
    pub(crate) fn hold(&self, limit: Duration) -> Result<()> {
        self.orders.mode.store(HOLD, Ordering::SeqCst);
        let deadline = Instant::now() + limit;
        // One turn of the loop, so that what it was about to send is counted.
        sleep(Duration::from_millis(20));
        while self.orders.outstanding.load(Ordering::SeqCst) > 0 {
            if Instant::now() > deadline {
                bail!(
                    "answers are still missing after {limit:?}, {} connections are broken; the first: {}",
                    self.broken(),
                    self.first_error().unwrap_or_else(|| "none".to_owned())
                );
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Requests flow again after [`Running::hold`].
    pub(crate) fn go_on(&self) {
        self.orders.mode.store(RUN, Ordering::SeqCst);
    }

    /// Lets every connection ask a last time, the idle ones too, and waits for all answers.
    pub(crate) fn finish(self) -> Result<Outcome> {
        self.orders.mode.store(FINISH, Ordering::SeqCst);
        join(self.handle)
    }
}

/// Bytes read by the client at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Receipt {
    /// CLOCK_MONOTONIC, right after the read.
    pub(crate) at_ns: u64,
    /// When the oldest request that these bytes belong to was sent.
    pub(crate) asked_ns: u64,
    /// Which connection.
    pub(crate) connection: u32,
}

/// What a load saw.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) answers: u64,
    /// Commands that changed something and were answered.
    pub(crate) acknowledged_writes: u64,
    /// Connections that were reset or timed out.
    pub(crate) resets: u64,
    /// Connections that the other side closed.
    pub(crate) closed: u64,
    /// Connections on which something else was answered than one server would have.
    pub(crate) wrong_answers: u64,
    /// Connections that still lacked answers at the end.
    pub(crate) unanswered: u64,
    /// Connections opened beyond the plan's.
    pub(crate) reconnects: u64,
    /// The first errors, in words.
    pub(crate) errors: Vec<String>,
    /// Request to complete answer, in nanoseconds.
    pub(crate) latency: Histogram<u64>,
    pub(crate) receipts: Vec<Receipt>,
    /// Per connection, what must be on the server.
    pub(crate) ledgers: Vec<Ledger>,
}

/// What a server must hold of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    pub(crate) prefix: String,
    pub(crate) local: SocketAddr,
    /// After the last acknowledged request.
    pub(crate) acknowledged: Model,
    /// Sent and not acknowledged, in order: a server may have carried out any first part of it.
    pub(crate) open: Vec<Op>,
}

impl Outcome {
    /// Everything that went wrong for a client; 0 is the promise.
    pub(crate) fn troubles(&self) -> u64 {
        self.resets + self.closed + self.wrong_answers + self.unanswered + self.reconnects
    }

    /// The first bytes that any client read at or after `moment`.
    pub(crate) fn first_receipt(&self, moment_ns: u64) -> Option<Receipt> {
        // Receipts are in order of time: one thread wrote them.
        let from = self.receipts.partition_point(|r| r.at_ns < moment_ns);
        self.receipts.get(from).copied()
    }

    /// For each connection with a request outstanding at `from_ns`, the time until it read again.
    pub(crate) fn stalls_ns(&self, fault_ns: u64, from_ns: u64) -> Vec<u64> {
        let mut seen = vec![false; self.ledgers.len()];
        let from = self.receipts.partition_point(|r| r.at_ns < from_ns);
        let mut stalls = Vec::new();
        for receipt in &self.receipts[from..] {
            let Some(seen) = seen.get_mut(receipt.connection as usize) else {
                continue;
            };
            if !std::mem::replace(seen, true) && receipt.asked_ns <= from_ns {
                stalls.push(receipt.at_ns.saturating_sub(fault_ns));
            }
        }
        stalls
    }
}

struct Waiting {
    op: Op,
    answer: Vec<u8>,
    sent_ns: u64,
}

struct Connection {
    stream: TcpStream,
    local: SocketAddr,
    prefix: String,
    script: Script,
    predicted: Model,
    acknowledged: Model,
    waiting: VecDeque<Waiting>,
    /// Bytes of the first waiting answer that have arrived.
    matched: usize,
    out: Vec<u8>,
    written: usize,
    /// The socket had no room: wait for it.
    blocked: bool,
    broken: bool,
    last_sent: bool,
}

struct Load {
    plan: Plan,
    orders: Arc<Orders>,
    epoll: Epoll,
    connections: Vec<Connection>,
    due: BinaryHeap<Reverse<(u64, usize)>>,
    outcome: Outcome,
    connects: u64,
    dropped_receipts: u64,
}

impl Load {
    fn open(plan: Plan, orders: Arc<Orders>) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut connections = Vec::with_capacity(plan.connections);
        let mut connects = 0;
        for index in 0..plan.connections {
            let stream =
                TcpStream::connect_timeout(&plan.target, Duration::from_secs(10)).with_context(|| {
                    format!("connection {index} of {} to {} failed", plan.connections, plan.target)
                })?;
            connects += 1;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
            connections.push(Connection {
                local: stream.local_addr()?,
                stream,
                prefix: format!("{}:{index}", plan.prefix),
                script: Script::new(plan.seed.wrapping_mul(1_000_003) ^ index as u64),
                predicted: Model::default(),
                acknowledged: Model::default(),
                waiting: VecDeque::new(),
                matched: 0,
                out: Vec::new(),
                written: 0,
                blocked: false,
                broken: false,
                last_sent: false,
            });
        }
        Ok(Self {
            plan,
            orders,
            epoll,
            connections,
            due: BinaryHeap::new(),
            outcome: Outcome {
                requests: 0,
                answers: 0,
                acknowledged_writes: 0,
                resets: 0,
                closed: 0,
                wrong_answers: 0,
                unanswered: 0,
                reconnects: 0,
                errors: Vec::new(),
                latency: Histogram::new_with_bounds(1_000, 120_000_000_000, 3)?,
                receipts: Vec::new(),
                ledgers: Vec::new(),
            },
            connects,
            dropped_receipts: 0,
        })
    }

    fn first_answers(&mut self) -> Result<()> {
        for index in 0..self.connections.len() {
            self.ask(index, 1);
        }
        let deadline = Instant::now() + self.plan.patience;
        while self.outstanding() > 0 && Instant::now() < deadline {
            self.turn(10)?;
        }
        if self.outstanding() > 0 || self.broken() > 0 {
            bail!(
                "the connections opened, but {} first answers are missing and {} are broken: {:?}",
                self.outstanding(),
                self.broken(),
                self.outcome.errors
            );
        }
        Ok(())
    }

    fn run(mut self) -> Result<Outcome> {
        let start = now_ns();
        for index in 0..self.plan.busy.min(self.connections.len()) {
            // Spread over one pace, so that paced connections do not ask in step.
            let offset = self
                .plan
                .pace
                .map_or(0, |pace| pace.as_nanos() as u64 * index as u64 / self.plan.busy as u64);
            self.due.push(Reverse((start + offset, index)));
        }
        let mut finishing: Option<Instant> = None;
        loop {
            let mode = self.orders.mode.load(Ordering::SeqCst);
            if mode == RUN {
                self.ask_due();
            }
            if mode == FINISH {
                let since = *finishing.get_or_insert_with(Instant::now);
                self.ask_last();
                let pending =
                    self.connections.iter().any(|c| !c.broken && (!c.last_sent || !c.waiting.is_empty()));
                if !pending || since.elapsed() > self.plan.patience {
                    break;
                }
            }
            self.orders.outstanding.store(self.outstanding(), Ordering::SeqCst);
            self.turn(self.timeout_ms(mode))?;
        }
        Ok(self.conclude())
    }

    fn timeout_ms(&self, mode: u8) -> u8 {
        match self.due.peek() {
            Some(Reverse((due, _))) if mode == RUN => {
                due.saturating_sub(now_ns()).div_ceil(1_000_000).min(5) as u8
            }
            _ => 5,
        }
    }

    fn ask_due(&mut self) {
        let now = now_ns();
        while let Some(&Reverse((due, index))) = self.due.peek() {
            if due > now {
                break;
            }
            self.due.pop();
            let connection = &self.connections[index];
            if connection.broken {
                continue;
            }
            let room = self.plan.depth.saturating_sub(connection.waiting.len());
            self.ask(index, room);
            if let Some(pace) = self.plan.pace {
                let next = (due + pace.as_nanos() as u64).max(now);
                self.due.push(Reverse((next, index)));
            }
            // Without a pace the next batch is due when answers arrive.
        }
    }

    fn ask_last(&mut self) {
        for index in 0..self.connections.len() {
            let connection = &mut self.connections[index];
            if !connection.broken && !connection.last_sent && connection.waiting.is_empty() {
                connection.last_sent = true;
                self.ask(index, 1);
            }
        }
    }

    fn ask(&mut self, index: usize, requests: usize) {
        if requests == 0 {
            return;
        }
        let connection = &mut self.connections[index];
        let now = now_ns();
        for _ in 0..requests {
            let op = connection.script.next();
            op.encode(&connection.prefix, &mut connection.out);
            let mut answer = Vec::new();
            connection.predicted.apply(&op, &mut answer);
            connection.waiting.push_back(Waiting { op, answer, sent_ns: now });
        }
        self.outcome.requests += requests as u64;
        self.write(index);
    }

    fn write(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        while connection.written < connection.out.len() {
            match connection.stream.write(&connection.out[connection.written..]) {
                Ok(0) => return self.fail(index, "nothing could be written"),
                Ok(n) => connection.written += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    if !connection.blocked {
                        connection.blocked = true;
                        self.listen(index, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT);
                    }
                    return;
                }
                Err(e) => return self.lose(index, &e),
            }
        }
        connection.out.clear();
        connection.written = 0;
        if connection.blocked {
            connection.blocked = false;
            self.listen(index, EpollFlags::EPOLLIN);
        }
    }

    fn listen(&mut self, index: usize, flags: EpollFlags) {
        let mut event = EpollEvent::new(flags, index as u64);
        if let Err(e) = self.epoll.modify(&self.connections[index].stream, &mut event) {
            self.fail(index, &format!("cannot wait for the socket: {e}"));
        }
    }

    fn turn(&mut self, timeout_ms: u8) -> Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        let ready = match self.epoll.wait(&mut events, EpollTimeout::from(timeout_ms)) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(e) => return Err(e).context("cannot wait for the sockets"),
        };
        for event in &events[..ready] {
            let index = event.data() as usize;
            if self.connections[index].broken {
                continue;
            }
            let flags = event.events();
            if flags.contains(EpollFlags::EPOLLOUT) {
                self.write(index);
            }
            if flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                self.read(index);
            }
        }
        Ok(())
    }

    fn read(&mut self, index: usize) {
        let mut buffer = [0u8; 32 << 10];
        loop {
            let connection = &mut self.connections[index];
            if connection.broken {
                return;
            }
            match connection.stream.read(&mut buffer) {
                Ok(0) => {
                    self.outcome.closed += 1;
                    self.fail(index, "the server closed the connection");
                }
                Ok(n) => self.receive(index, &buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => self.lose(index, &e),
            }
        }
    }

    fn receive(&mut self, index: usize, mut bytes: &[u8]) {
        let at_ns = now_ns();
        let connection = &mut self.connections[index];
        if self.outcome.receipts.len() < RECEIPTS {
            self.outcome.receipts.push(Receipt {
                at_ns,
                asked_ns: connection.waiting.front().map_or(at_ns, |w| w.sent_ns),
                connection: index as u32,
            });
        } else {
            self.dropped_receipts += 1;
        }
        while !bytes.is_empty() {
            let Some(first) = connection.waiting.front() else {
                let text = format!("bytes that nothing asked for: {}", quote(bytes));
                self.outcome.wrong_answers += 1;
                return self.fail(index, &text);
            };
            let expected = &first.answer[connection.matched..];
            let length = expected.len().min(bytes.len());
            if expected[..length] != bytes[..length] {
                let text = format!(
                    "wrong answer to {}: expected {}, got {}",
                    shorten(&format!("{:?}", first.op)),
                    quote(expected),
                    quote(bytes)
                );
                self.outcome.wrong_answers += 1;
                return self.fail(index, &text);
            }
            bytes = &bytes[length..];
            connection.matched += length;
            if length == expected.len() {
                connection.matched = 0;
                if let Some(done) = connection.waiting.pop_front() {
                    let mut answer = Vec::new();
                    connection.acknowledged.apply(&done.op, &mut answer);
                    self.outcome.answers += 1;
                    self.outcome.acknowledged_writes += done.op.writes();
                    let took = at_ns.saturating_sub(done.sent_ns).max(1);
                    self.outcome.latency.saturating_record(took);
                    self.orders.answers.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let unpaced = self.plan.pace.is_none() && index < self.plan.busy;
        if unpaced && connection.waiting.len() < self.plan.depth.div_ceil(2) {
            self.due.push(Reverse((0, index)));
        }
    }

    fn lose(&mut self, index: usize, error: &std::io::Error) {
        self.outcome.resets += 1;
        self.fail(index, &error.to_string());
    }

    fn fail(&mut self, index: usize, text: &str) {
        let connection = &mut self.connections[index];
        if std::mem::replace(&mut connection.broken, true) {
            return;
        }
        self.orders.broken.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut first) = self.orders.first_error.lock() {
            first.get_or_insert_with(|| text.to_owned());
        }
        // Whether it is still registered does not matter: its events are ignored from now on.
        let _ = self.epoll.delete(&connection.stream);
        if self.outcome.errors.len() < ERRORS {
            let text = format!("at {} us, {}: {text}", now_ns() / 1_000, connection.local);
            self.outcome.errors.push(text);
        }
    }

    fn outstanding(&self) -> u64 {
        self.connections.iter().filter(|c| !c.broken).map(|c| c.waiting.len() as u64).sum()
    }

    fn broken(&self) -> usize {
        self.connections.iter().filter(|c| c.broken).count()
    }

    fn conclude(mut self) -> Outcome {
        for connection in self.connections {
            if !connection.broken && !connection.waiting.is_empty() {
                self.outcome.unanswered += 1;
                if self.outcome.errors.len() < ERRORS {
                    self.outcome.errors.push(format!(
                        "{}: {} answers never came",
                        connection.local,
                        connection.waiting.len()
                    ));
                }
            }
            self.outcome.ledgers.push(Ledger {
                prefix: connection.prefix,
                local: connection.local,
                acknowledged: connection.acknowledged,
                open: connection.waiting.into_iter().map(|w| w.op).collect(),
            });
        }
        if self.dropped_receipts > 0 {
            self.outcome
                .errors
                .push(format!("{} receipts were not kept: the run was too long", self.dropped_receipts));
        }
        self.outcome.reconnects = self.connects.saturating_sub(self.plan.connections as u64);
        self.outcome
    }
}

fn quote(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(60)];
    format!("\"{}\"", shown.escape_ascii())
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}
