//! A service's open interfaces: the far end of the PSC's anchor, and its servers' vifs. Takes their frames in turns,
//! and sends frames from them. Counts failures, which to a TCP are losses.
//!
//! Frames for a guest go to its vif itself, never through the bridge.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use nix::poll::PollFlags;
use understudy_protocol::ServerId;

use crate::link::device::{Device, Lost, SendError};
use crate::link::frame::{self, Mac};
use crate::link::vif::Vif;

/// Bytes taken from the anchor and from the OVM before other interfaces get their turn: one super-packet, which makes
/// some forty segments for each server.
const TURN: usize = 65_536;

/// The same for an RVM: room for the acknowledgments of such a super-packet, and no more for a flood.
const RVM_TURN: usize = 32_768;

/// The number of bytes for which the smallest frame counts, because its cost does not depend on its bytes.
const LEAST_COST: usize = 1_024;

/// An interface that a service lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    /// The server whose vif it was; `None` for the PSC's own.
    pub(crate) server: Option<ServerId>,
    /// What happened.
    pub(crate) error: String,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Ports {
    anchor: Option<Port>,
    /// The anchor was opened since [`Ports::take_is_new`] was last called.
    is_new: bool,
    servers: BTreeMap<ServerId, Server>,
    /// Whose turns are left until the next poll.
    turns: VecDeque<Turn>,
    /// The frame at hand.
    received: Vec<u8>,
    /// The frame being built.
    sending: Vec<u8>,
    losses: Vec<Loss>,
    counters: Counters,
}

struct Server {
    port: Port,
    mac: Mac,
    addresses: Vec<IpAddr>,
}

/// An interface that has something to be taken.
#[derive(Clone, Copy)]
struct Turn {
    /// Whose; `None` is the anchor.
    from: Option<ServerId>,
    /// What may still be taken, in bytes.
    left: usize,
    /// The interface is down: once its last frames are taken, it is lost.
    is_down: bool,
}

/// An interface; without a device once that was lost.
struct Port {
    device: Option<Device>,
    lost_before: Lost,
}

impl Port {
    fn new(device: Device) -> Self {
        Self { device: Some(device), lost_before: Lost::default() }
    }
}

#[derive(Default)]
struct Counters {
    sent_to_clients: u64,
    sent_to_servers: u64,
    send_queue_full: u64,
    send_too_long: u64,
    send_interface_down: u64,
    send_failed: u64,
    no_interface: u64,
    capture_dropped: u64,
    capture_truncated: u64,
}

impl Ports {
    /// Opens the PSC's place on its bridge: the far end of the anchor, in place of an earlier one. The PSC is announced with
    /// the next [`super::Plane::tick`].
    pub(crate) fn set_anchor(&mut self, far_end: Device) {
        self.note_lost();
        self.is_new = true;
        self.anchor = Some(Port::new(far_end));
    }

    /// Whether the anchor was opened since the last call.
    pub(super) fn take_is_new(&mut self) -> bool {
        std::mem::take(&mut self.is_new)
    }

    /// Whether the PSC has its place on a bridge.
    pub(crate) fn is_anchored(&self) -> bool {
        self.anchor.as_ref().is_some_and(|anchor| anchor.device.is_some())
    }

    /// Opens a server's vif, in place of the one that it had.
    pub(super) fn add_server(&mut self, server: ServerId, device: Device, vif: &Vif) {
        self.note_lost();
        let (port, mac, addresses) = (Port::new(device), vif.mac, vif.addresses.clone());
        self.servers.insert(server, Server { port, mac, addresses });
    }

    /// Whether a server's vif is open.
    pub(crate) fn has_server(&self, server: ServerId) -> bool {
        self.servers.get(&server).is_some_and(|server| server.port.device.is_some())
    }

    pub(super) fn rename_server(&mut self, from: ServerId, to: ServerId) {
        if let Some(server) = self.servers.remove(&from) {
            self.servers.insert(to, server);
        }
    }

    /// Closes a server's vif.
    pub(super) fn remove_server(&mut self, server: ServerId) {
        self.note_lost();
        self.servers.remove(&server);
    }

    /// A server's own addresses; none if it is not known.
    pub(super) fn addresses(&self, server: ServerId) -> &[IpAddr] {
        self.servers.get(&server).map_or(&[], |server| &server.addresses)
    }

    /// What to poll for reading.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let servers = self.servers.values().map(|server| &server.port);
        self.anchor.iter().chain(servers).filter_map(|port| port.device.as_ref().map(Device::fd))
    }

    /// Which of [`Ports::fds`] have something, in their order. The clients and the OVM come first.
    pub(super) fn set_ready(&mut self, ready: &[PollFlags], ovm: Option<ServerId>) {
        let anchor = self.anchor.iter().map(|port| (None, port));
        let servers = self.servers.iter().map(|(&id, server)| (Some(id), &server.port));
        let open = anchor.chain(servers).filter(|(_, port)| port.device.is_some());
        self.turns.clear();
        for ((from, _), ready) in open.zip(ready).filter(|(_, ready)| !ready.is_empty()) {
            let is_down = ready.contains(PollFlags::POLLERR);
            if from.is_none() || from == ovm {
                self.turns.push_front(Turn { from, left: TURN, is_down });
            } else {
                self.turns.push_back(Turn { from, left: RVM_TURN, is_down });
            }
        }
    }

    /// Takes the next frame of this round, and tells whose vif it came from (`None`: the anchor). [`Ports::frame`] has it.
    pub(super) fn receive(&mut self) -> Option<Option<ServerId>> {
        loop {
            let &Turn { from, left, is_down } = self.turns.front()?;
            if !self.take(from) {
                if is_down {
                    self.lose(from, "the interface is down, or gone".to_owned());
                }
                self.turns.pop_front();
                continue;
            }
            match left.checked_sub(self.received.len().max(LEAST_COST)) {
                Some(left) => self.turns[0].left = left,
                None => drop(self.turns.pop_front()),
            }
            return Some(from);
        }
    }

    /// The frame that was received last.
    pub(super) fn frame(&self) -> &[u8] {
        &self.received
    }

    /// Takes the next frame from one interface; `false` if it has none.
    fn take(&mut self, from: Option<ServerId>) -> bool {
        let port = match from {
            None => self.anchor.as_mut(),
            Some(id) => self.servers.get_mut(&id).map(|server| &mut server.port),
        };
        let Some(device) = port.and_then(|port| port.device.as_mut()) else { return false };
        match device.receive(&mut self.received) {
            Ok(is_there) => is_there,
            Err(error) => {
                self.lose(from, error.to_string());
                false
            }
        }
    }

    /// An interface yields nothing any more. The socket reports that once; libpcap then checks whether the interface
    /// still exists, and hides the error of an interface that is about to vanish.
    fn lose(&mut self, from: Option<ServerId>, error: String) {
        let port = match from {
            None => self.anchor.as_mut(),
            Some(id) => self.servers.get_mut(&id).map(|server| &mut server.port),
        };
        if port.and_then(|port| port.device.take()).is_some() {
            self.losses.push(Loss { server: from, error });
        }
    }

    /// Interfaces lost since the last call.
    pub(crate) fn take_losses(&mut self) -> Vec<Loss> {
        std::mem::take(&mut self.losses)
    }

    /// Sends a frame from the anchor to the network.
    pub(super) fn send_to_network(&mut self, frame: &[u8]) {
        let device = self.anchor.as_mut().and_then(|port| port.device.as_mut());
        let sent = device.map(|device| device.send(frame, None));
        self.counters.count_send(sent);
    }

    /// Sends a frame to a server.
    pub(super) fn send_to_server(&mut self, server: ServerId, frame: &[u8]) {
        let device = self.servers.get_mut(&server).and_then(|server| server.port.device.as_mut());
        let sent = device.map(|device| device.send(frame, None));
        self.counters.count_send(sent);
    }

    /// Sends an IP packet from the anchor to the station with this address, in segments of this size (0: as it is).
    pub(super) fn send_packet_to_network(&mut self, to: Mac, from: Mac, packet: &[u8], segment: u16) {
        frame::wrap_ip(&mut self.sending, to, from, packet);
        let device = self.anchor.as_mut().and_then(|port| port.device.as_mut());
        let sent = device.map(|device| device.send(&self.sending, frame::cut(packet, segment)));
        self.counters.sent_to_clients += 1;
        self.counters.count_send(sent);
    }

    /// Sends an IP packet to a server, in segments of this size (0: as it is).
    pub(super) fn send_packet_to_server(&mut self, to: ServerId, from: Mac, packet: &[u8], segment: u16) {
        let server = self.servers.get_mut(&to);
        let found = server.and_then(|server| Some((server.mac, server.port.device.as_mut()?)));
        let sent = found.map(|(mac, device)| {
            frame::wrap_ip(&mut self.sending, mac, from, packet);
            device.send(&self.sending, frame::cut(packet, segment))
        });
        self.counters.sent_to_servers += 1;
        self.counters.count_send(sent);
    }

    /// Adds up what the interfaces lost so far, before one of them is replaced or closed.
    fn note_lost(&mut self) {
        let servers = self.servers.values_mut().map(|server| &mut server.port);
        for port in self.anchor.iter_mut().chain(servers) {
            if let Some(device) = port.device.as_mut() {
                let lost = device.lost();
                self.counters.capture_dropped += lost.dropped.saturating_sub(port.lost_before.dropped);
                self.counters.capture_truncated += lost.truncated.saturating_sub(port.lost_before.truncated);
                port.lost_before = lost;
            }
        }
    }

    /// Monotonic counters.
    pub(super) fn counters(&mut self) -> [(&'static str, u64); 9] {
        self.note_lost();
        let counters = &self.counters;
        [
            ("sent_to_clients", counters.sent_to_clients),
            ("sent_to_servers", counters.sent_to_servers),
            ("send_queue_full", counters.send_queue_full),
            ("send_too_long", counters.send_too_long),
            ("send_interface_down", counters.send_interface_down),
            ("send_failed", counters.send_failed),
            ("no_interface", counters.no_interface),
            ("capture_dropped", counters.capture_dropped),
            ("capture_truncated", counters.capture_truncated),
        ]
    }
}

impl Counters {
    /// Counts a frame that was not sent; `None` if there was no interface to send it from.
    fn count_send(&mut self, sent: Option<Result<(), SendError>>) {
        let counter = match sent {
            Some(Ok(())) => return,
            Some(Err(SendError::QueueFull)) => &mut self.send_queue_full,
            Some(Err(SendError::TooLong)) => &mut self.send_too_long,
            Some(Err(SendError::Down)) => &mut self.send_interface_down,
            Some(Err(SendError::Other)) => &mut self.send_failed,
            None => &mut self.no_interface,
        };
        *counter += 1;
    }
}
