//! What identifies a conversation (its addresses, its index in the table) and a server (its slot).

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The addresses that identify a conversation (RFC 9293 §3.3.1: remote and local socket).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Key {
    pub(crate) client: SocketAddr,
    pub(crate) psc: SocketAddr,
}

/// A conversation's index in the table; the generation tells it from earlier ones at that index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct ConversationId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl ConversationId {
    #[cfg(test)]
    pub(crate) const fn for_tests(index: u32) -> Self {
        Self { index, generation: 0 }
    }
}

/// Most servers in one queue: the OVM and seven RVMs. The maps of the data plane `bpf` have as many slots.
pub const MAX_SERVERS: usize = 8;

/// A server's index in the queue and in per-conversation arrays. Slots are reused; the [`crate::ServerId`] kept with
/// each entry tells which server it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Slot(u8);

impl Slot {
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    /// Every slot, in order.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..MAX_SERVERS as u8).map(Self)
    }

    #[cfg(test)]
    pub(crate) const fn for_tests(index: u8) -> Self {
        Self(index)
    }
}
