//! One host's network stack: a smoltcp interface on a device that is two queues of IP packets.

use core::cell::Cell;
use core::net::{IpAddr, SocketAddr};
use std::collections::{BTreeMap, VecDeque};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use crate::disguise::{Disguise, DisguiseKnobs};
use crate::prng::Prng;
use crate::segment::Segment;

/// How a host's TCP behaves.
#[derive(Clone, Debug)]
pub(crate) struct StackKnobs {
    pub(crate) mtu: usize,
    pub(crate) receive_buffer: usize,
    pub(crate) send_buffer: usize,
    pub(crate) ack_delay_us: u64,
    pub(crate) nagle: bool,
    pub(crate) keep_alive_us: Option<u64>,
    pub(crate) congestion_control: tcp::CongestionControl,
    /// Microseconds per tick of the timestamp clock; `None` without timestamps.
    pub(crate) timestamp_tick_us: Option<u64>,
    pub(crate) timestamp_offset: u32,
    pub(crate) disguise: DisguiseKnobs,
}

/// smoltcp's bound on its retransmission timeout.
pub(crate) const LONGEST_RTO_US: u64 = 60_000_000;

thread_local! {
    // smoltcp takes a plain function as its timestamp clock, so the value of the host that is
    // polled now is left here.
    static TSVAL: Cell<u32> = const { Cell::new(0) };
}

fn tsval() -> u32 {
    TSVAL.get()
}

pub(crate) struct Stack {
    pub(crate) knobs: StackKnobs,
    interface: Interface,
    wire: Wire,
    pub(crate) sockets: SocketSet<'static>,
    disguise: Disguise,
    /// By peer and own port: when this stack last sent something that asks for acknowledgement.
    spoke_at: BTreeMap<(SocketAddr, u16), u64>,
}

impl Stack {
    pub(crate) fn new(knobs: StackKnobs, addresses: &[IpAddr], seed: u64) -> Self {
        let mut wire = Wire { mtu: knobs.mtu, received: VecDeque::new(), sent: VecDeque::new() };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|list| {
            for &address in addresses {
                let prefix = if address.is_ipv4() { 24 } else { 64 };
                // Hosts have at most one address per family, within smoltcp's limit of two.
                let _ = list.push(IpCidr::new(IpAddress::from(address), prefix));
            }
        });
        Self {
            disguise: Disguise::new(knobs.disguise.clone(), Prng::fork(seed, "disguise", 0)),
            knobs,
            interface,
            wire,
            sockets: SocketSet::new(Vec::new()),
            spoke_at: BTreeMap::new(),
        }
    }

    /// A new socket with this host's settings.
    pub(crate) fn open(&mut self) -> SocketHandle {
        let knobs = &self.knobs;
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; knobs.receive_buffer]),
            tcp::SocketBuffer::new(vec![0; knobs.send_buffer]),
        );
        socket.set_ack_delay((knobs.ack_delay_us != 0).then(|| micros(knobs.ack_delay_us)));
        socket.set_nagle_enabled(knobs.nagle);
        socket.set_keep_alive(knobs.keep_alive_us.map(micros));
        socket.set_congestion_control(knobs.congestion_control);
        let handle = self.sockets.add(socket);
        self.renew(handle);
        handle
    }

    /// smoltcp forgets for good that a listening socket has timestamps, once somebody without them had
    /// half opened it.
    pub(crate) fn renew(&mut self, handle: SocketHandle) {
        if self.knobs.timestamp_tick_us.is_some() {
            self.socket(handle).set_tsval_generator(Some(tsval));
        }
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(crate) fn connect(&mut self, handle: SocketHandle, to: (IpAddr, u16), from: (IpAddr, u16)) -> bool {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket
            .connect(
                self.interface.context(),
                (IpAddress::from(to.0), to.1),
                (IpAddress::from(from.0), from.1),
            )
            .is_ok()
    }

    /// A packet arrives at the device; [`Stack::poll`] processes it.
    pub(crate) fn receive(&mut self, mut packet: Vec<u8>) {
        self.disguise.incoming(&mut packet);
        self.wire.received.push_back(packet);
    }

    /// Processes what arrived and what is due, and gives the packets that leave.
    pub(crate) fn poll(&mut self, now_us: u64) -> Vec<Vec<u8>> {
        if let Some(tick) = self.knobs.timestamp_tick_us {
            TSVAL.set(((now_us / tick) as u32).wrapping_add(self.knobs.timestamp_offset));
        }
        self.interface.poll(at(now_us), &mut self.wire, &mut self.sockets);
        let mut sent: Vec<_> = self.wire.sent.drain(..).collect();
        for packet in &mut sent {
            if let Ok(segment) = Segment::parse(packet)
                && (segment.syn || segment.fin || segment.payload.len() > 1)
            {
                self.spoke_at.insert((segment.dst, segment.src.port()), now_us);
            }
            self.disguise.outgoing(packet);
        }
        sent
    }

    pub(crate) fn poll_at(&mut self, now_us: u64) -> Option<u64> {
        self.interface
            .poll_at(at(now_us), &self.sockets)
            .map(|t| (t.total_micros().max(0) as u64).max(now_us))
    }

    /// A connection has something to send or unacknowledged, and its stack does nothing about it for
    /// longer than any retransmission timeout. smoltcp loses its timer when a window opens again while
    /// data is in flight. Any connection, if no `peer` is named.
    pub(crate) fn forgot(&self, now_us: u64, peer: Option<SocketAddr>, port: u16) -> bool {
        let unsent = |socket: &tcp::Socket<'_>| {
            // Or it forgets a FIN that the other side had no use for yet.
            let fin =
                matches!(socket.state(), tcp::State::FinWait1 | tcp::State::Closing | tcp::State::LastAck);
            fin || socket.send_queue() > 0
        };
        self.idle_senders(now_us, 2 * LONGEST_RTO_US, unsent)
            .any(|(far, near)| peer.is_none_or(|peer| peer == far) && near == port)
    }

    /// Some connection has something to send, and the stack does nothing about it for this long.
    pub(crate) fn holds_back(&self, now_us: u64, for_us: u64) -> bool {
        self.idle_senders(now_us, for_us, |socket| socket.send_queue() > 0).next().is_some()
    }

    pub(crate) fn is_half_open(&self) -> bool {
        self.sockets.iter().any(|(_, socket)| {
            let smoltcp::socket::Socket::Tcp(socket) = socket;
            socket.state() == tcp::State::SynReceived
        })
    }

    /// Peer and own port of connections that have something to send and have not for this long.
    fn idle_senders(
        &self,
        now_us: u64,
        for_us: u64,
        unsent: impl Fn(&tcp::Socket<'_>) -> bool,
    ) -> impl Iterator<Item = (SocketAddr, u16)> {
        self.sockets.iter().filter_map(move |(_, socket)| {
            let smoltcp::socket::Socket::Tcp(socket) = socket;
            let (local, remote) = (socket.local_endpoint()?, socket.remote_endpoint()?);
            let ends = (SocketAddr::new(remote.addr.into(), remote.port), local.port);
            let spoke = self.spoke_at.get(&ends).copied().unwrap_or(0);
            let idle = socket.state() != tcp::State::Closed
                && unsent(socket)
                && now_us > spoke.saturating_add(for_us);
            idle.then_some(ends)
        })
    }
}

fn micros(us: u64) -> Duration {
    Duration::from_micros(us)
}

fn at(us: u64) -> Instant {
    Instant::from_micros(us as i64)
}

struct Wire {
    mtu: usize,
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);

struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = self.mtu;
        caps
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}
