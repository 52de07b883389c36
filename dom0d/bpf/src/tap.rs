//! The maps of one service, for the thread that everything passes through: nothing here waits.

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

/// A ring of records. The one read last stays in it until the next is asked for: a daemon that dies over it finds
/// it again.
struct Ring {
    map: RingBuf<MapData>,
    held: bool,
}

/// Which ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// That of clients and OVM, in the order of the service.
    Service,
    /// That of the server in this slot, with what it sent while it was not the OVM.
    Rvm(usize),
}

/// A place in the ring of clients and OVM: see [`Tap::end`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingEnd(u64);

/// A packet, in the ring.
#[derive(Debug)]
pub struct Packet<'a>(Option<ManuallyDrop<RingBufItem<'a>>>);

/// What a record says of the packet that it copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// The slot of the server that sent it; `None` for a client.
    pub slot: Option<usize>,
    /// Of the packet, in bytes.
    pub length: usize,
    /// The kernel has forwarded it, translated.
    pub forwarded: bool,
    /// If so: right edge of the window that its receiver was told.
    pub edge: u32,
    /// If so: its receiver takes it without a look at its TCP checksum.
    pub trusted: bool,
    /// It did so because the daemon was away, or had been.
    pub unattended: bool,
    /// The kernel forwards nothing of this conversation any more, this packet included.
    pub handed_over: bool,
    /// Epoch of the plane when it came.
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

    /// Begins a new epoch of the plane, in which the server in `slot` may speak, or nobody. In force at once;
    /// entries of older epochs count no more.
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

    /// What is known of the server in a slot. For the active one only with another interface: its frames and those
    /// to it are the daemon's then, or lost.
    pub fn set_server(&mut self, slot: usize, server: Server) {
        self.control.set_server(slot, server);
    }

    /// The daemon lives.
    pub fn beat(&mut self, now_ns: u64) {
        self.control.set_heartbeat(now_ns);
    }

    /// Segments that were forwarded without a record, ever.
    pub fn unrecorded(&self) -> u64 {
        self.control.unrecorded()
    }

    /// Lets a conversation pass from now on within these bounds, in the present epoch.
    pub fn install(&mut self, key: &Key, conversation: Conversation, bounds: Bounds) -> Result<(), MapError> {
        self.extend(conversation.place, bounds);
        self.conversations.insert(key, Conversation { epoch: self.epoch(), ..conversation }, 0)
    }

    /// Lets the conversation in a place go on up to there; in force before anything that the caller does next.
    pub fn extend(&mut self, place: u32, bounds: Bounds) {
        self.bounds.set(place, bounds);
    }

    /// The entry of a conversation.
    pub fn conversation(&self, key: &Key) -> Option<Conversation> {
        self.conversations.get(key, 0).ok()
    }

    /// Lets a conversation pass no more. None there is fine.
    pub fn remove(&mut self, key: &Key) {
        let _ = self.conversations.remove(key);
    }

    /// All entries: conversations that pass, or did.
    pub fn conversations(&self) -> impl Iterator<Item = Key> + '_ {
        self.conversations.keys().filter_map(Result::ok)
    }

    /// What is said of the next packet in a ring; `None` if there is none yet. Whatever is to be done with a packet for
    /// good must be done before the next is asked for.
    pub fn next(&mut self, source: Source) -> Option<Copied> {
        self.ring_of(source)?.next()
    }

    /// The packet that [`Tap::next`] told of, where it lies.
    pub fn packet(&mut self, source: Source) -> Packet<'_> {
        Packet(self.ring_of(source).filter(|ring| ring.held).and_then(Ring::peek))
    }

    fn ring_of(&mut self, source: Source) -> Option<&mut Ring> {
        match source {
            Source::Service => Some(&mut self.ring),
            Source::Rvm(slot) => self.rvm_rings.get_mut(slot),
        }
    }

    /// Where the ring of clients and OVM ends at this moment. What was forwarded before an [`Tap::activate`] that came
    /// before this is before it, written or yet being written.
    pub fn end(&self) -> RingEnd {
        RingEnd(self.positions.reserved())
    }

    /// What is said of the next packet before an end of the ring of clients and OVM, as [`Tap::next`] says it; `None` if
    /// there is none any more, whatever came after. Waits for one that is being written at this moment.
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

    /// What to poll for a ring.
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

    /// Gives the place of the one read last away.
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

    /// The record at the ring's end. Not to be dropped: that would give its place away.
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
