//! The maps of one service, for the data-path thread. Nothing here waits.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::ring_buf::RingBufItem;
use aya::maps::{HashMap, MapData, MapError, PerCpuArray, RingBuf};

use crate::layout::{
    Bounds, COUNTERS, Conversation, FORWARDED, FROM_CLIENT, HANDED_OVER, Key, NO_SLOT, Record, SLOTS, Server,
    TRUSTED, UNATTENDED,
};
use crate::shared::{RingPositions, SharedBounds, SharedControl};

/// See the module.
pub struct Tap {
    control: SharedControl,
    bounds: SharedBounds,
    ring: Ring,
    positions: RingPositions,
    rvm_rings: Vec<Ring>,
    conversations: HashMap<MapData, Key, Conversation>,
    counters: PerCpuArray<MapData, u64>,
}

/// A ring of records. The record read last stays in it until the next is asked for: if the daemon dies over it, its
/// successor reads it again.
struct Ring {
    map: RingBuf<MapData>,
    held: bool,
}

/// Identifies a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The ring of clients and OVM, in the order of the record.
    Service,
    /// The ring of the server in this slot, with what that sent while it was not the OVM.
    Rvm(usize),
}

/// A position in the ring of clients and OVM: see [`Tap::end`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingEnd(u64);

/// A packet, where it lies in the ring.
#[derive(Debug)]
pub struct Packet<'a>(Option<ManuallyDrop<RingBufItem<'a>>>);

/// The head of a record: what it says of its packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// The slot of the server that sent it; `None` for a client.
    pub slot: Option<usize>,
    /// Length of the packet in bytes.
    pub length: usize,
    /// The kernel passed it, translated.
    pub forwarded: bool,
    /// If it was passed: right edge of the window that its receiver was told.
    pub edge: u32,
    /// If it was passed: its receiver takes it without verifying its TCP checksum.
    pub trusted: bool,
    /// The kernel passed it because the daemon is or was away.
    pub unattended: bool,
    /// From this packet on the kernel passes nothing of its conversation.
    pub handed_over: bool,
    /// The plane's epoch when it came.
    pub epoch: u32,
    /// The frame's source address.
    pub source_mac: [u8; 6],
}

impl Tap {
    pub(crate) fn new(
        control: SharedControl,
        bounds: SharedBounds,
        (ring, positions): (RingBuf<MapData>, RingPositions),
        rvm_rings: Vec<RingBuf<MapData>>,
        conversations: HashMap<MapData, Key, Conversation>,
        counters: PerCpuArray<MapData, u64>,
    ) -> Self {
        let rvm_rings = rvm_rings.into_iter().map(Ring::new).collect();
        Self { control, bounds, ring: Ring::new(ring), positions, rvm_rings, conversations, counters }
    }

    /// Begins a new epoch of the plane, in which the server in `slot` may speak, or nobody (rule 1). Takes effect at
    /// once, and invalidates the entries of older epochs.
    pub fn activate(&mut self, slot: Option<usize>) {
        let epoch = (self.control.active() >> 8).wrapping_add(1) & 0xffff_ffff;
        let slot = slot.map_or(NO_SLOT, |slot| slot as u64);
        self.control.set_active(epoch << 8 | slot);
    }

    /// The slot of the server that may speak.
    pub fn active(&self) -> Option<usize> {
        usize::try_from(self.control.active() & 0xff).ok().filter(|slot| *slot < SLOTS)
    }

    /// The present epoch of the plane.
    pub fn epoch(&self) -> u32 {
        (self.control.active() >> 8) as u32
    }

    /// Sets the server in a slot. The active server's entry may be changed only when its interface is another one: its
    /// frames are lost meanwhile, or go to the daemon.
    pub fn set_server(&mut self, slot: usize, server: Server) {
        self.control.set_server(slot, server);
    }

    /// Writes the daemon's heartbeat.
    pub fn beat(&mut self, now_ns: u64) {
        self.control.set_heartbeat(now_ns);
    }

    /// How many segments were passed without a record so far.
    pub fn unrecorded(&self) -> u64 {
        self.control.unrecorded()
    }

    /// Installs a conversation's entry: it passes from now on within these bounds, in the present epoch.
    pub fn install(&mut self, key: &Key, conversation: Conversation, bounds: Bounds) -> Result<(), MapError> {
        self.extend(conversation.place, bounds);
        self.conversations.insert(key, Conversation { epoch: self.epoch(), ..conversation }, 0)
    }

    /// Moves the bounds with this index on; takes effect before anything that the caller does next.
    pub fn extend(&mut self, place: u32, bounds: Bounds) {
        self.bounds.set(place, bounds);
    }

    /// The entry of a conversation.
    pub fn conversation(&self, key: &Key) -> Option<Conversation> {
        self.conversations.get(key, 0).ok()
    }

    /// Removes a conversation's entry. Succeeds if there is none.
    pub fn remove(&mut self, key: &Key) {
        let _ = self.conversations.remove(key);
    }

    /// All entries, also of conversations that pass no longer.
    pub fn conversations(&self) -> impl Iterator<Item = Key> + '_ {
        self.conversations.keys().filter_map(Result::ok)
    }

    /// The head of the next record in a ring; `None` if there is none yet. This releases the record before it, so finish
    /// with that first.
    pub fn next(&mut self, source: Source) -> Option<Copied> {
        self.ring_of(source)?.next()
    }

    /// The packet of the record that [`Tap::next`] returned.
    pub fn packet(&mut self, source: Source) -> Packet<'_> {
        Packet(self.ring_of(source).filter(|ring| ring.held).and_then(Ring::peek))
    }

    fn ring_of(&mut self, source: Source) -> Option<&mut Ring> {
        match source {
            Source::Service => Some(&mut self.ring),
            Source::Rvm(slot) => self.rvm_rings.get_mut(slot),
        }
    }

    /// Where the ring of clients and OVM ends now. Everything that passed before an earlier [`Tap::activate`] lies before
    /// this end, though a record may still be being written.
    pub fn end(&self) -> RingEnd {
        RingEnd(self.positions.reserved())
    }

    /// Like [`Tap::next`] for the ring of clients and OVM, but `None` at `end`, whatever came after. Waits for a record that is
    /// being written at this moment.
    pub fn next_before(&mut self, end: RingEnd) -> Option<Copied> {
        self.ring.release();
        while self.positions.consumed() < end.0 {
            if let Some(copied) = self.ring.next() {
                return Some(copied);
            }
            std::hint::spin_loop();
        }
        None
    }

    /// The file descriptor to poll for a ring.
    pub fn fd(&self, source: Source) -> Option<BorrowedFd<'_>> {
        let ring = match source {
            Source::Service => Some(&self.ring),
            Source::Rvm(slot) => self.rvm_rings.get(slot),
        };
        ring.map(|ring| ring.map.as_fd())
    }

    /// Monotonic counters.
    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        let sum = |place: usize| {
            let values = self.counters.get(&(place as u32), 0);
            values.map_or(0, |values| values.iter().sum())
        };
        COUNTERS.iter().enumerate().map(|(place, &name)| (name, sum(place))).collect()
    }
}

impl Ring {
    fn new(map: RingBuf<MapData>) -> Self {
        Self { map, held: false }
    }

    /// Gives back the room of the record read last.
    fn release(&mut self) {
        if std::mem::take(&mut self.held) {
            drop(self.map.next());
        }
    }

    fn next(&mut self) -> Option<Copied> {
        self.release();
        let record = self.peek()?;
        let head = record.first_chunk::<{ size_of::<Record>() }>().unwrap_or(&[0; size_of::<Record>()]);
        let u32_at = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let u16_at = |at: usize| u16::from_ne_bytes([head[at], head[at + 1]]);
        let flags = u16_at(4);
        let copied = Copied {
            slot: (flags & FROM_CLIENT == 0).then_some(usize::from(u16_at(6))),
            length: u32_at(0) as usize,
            forwarded: flags & FORWARDED != 0,
            unattended: flags & UNATTENDED != 0,
            handed_over: flags & HANDED_OVER != 0,
            epoch: u32_at(8),
            edge: u32_at(20),
            trusted: flags & TRUSTED != 0,
            source_mac: [head[12], head[13], head[14], head[15], head[16], head[17]],
        };
        self.held = true;
        Some(copied)
    }

    /// The next record. It must not be dropped, which would give back its room.
    fn peek(&mut self) -> Option<ManuallyDrop<RingBufItem<'_>>> {
        self.map.next().map(ManuallyDrop::new)
    }
}

impl Deref for Packet<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let record = self.0.as_deref().map_or(&[][..], |record| record);
        let Some((length, _)) = record.split_first_chunk() else { return &[] };
        let bytes = record.get(size_of::<Record>()..).unwrap_or_default();
        bytes.get(..u32::from_ne_bytes(*length) as usize).unwrap_or_default()
    }
}
