//! What identifies a conversation: its addresses, and its place in the table.

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The addresses that identify a conversation (RFC 9293 §3.3.1: remote and local socket).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Key {
    pub(crate) client: SocketAddr,
    pub(crate) psc: SocketAddr,
}

/// A place in the table and which of its tenants is meant.
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
