//! What conversations stand for in their service's sums and lists. It follows from each conversation alone, so nothing of it
//! is counted while a conversation works: what it was before is compared with what it is after.

use crate::key::MAX_SERVERS;

/// What one conversation stands for. The default is the share of a conversation that does not exist.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Share {
    pub(crate) is_open: bool,
    /// Bytes that it keeps.
    pub(crate) retained: u64,
    /// What of that is beyond gaps, of client and OVM.
    pub(crate) beyond: u64,
    /// A FIN or RST of the OVM is held.
    pub(crate) is_held: bool,
    /// RVMs dispute that close.
    pub(crate) is_disputed: bool,
    pub(crate) is_recuperating: bool,
    /// The client was sent bytes beyond a gap, up to here.
    pub(crate) gap: Option<u64>,
    /// By slot: what it means to each server.
    pub(crate) servers: [ServerShare; MAX_SERVERS],
}

/// What a conversation means to one server.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ServerShare {
    /// The conversation is open and the server covers it.
    pub(crate) covered: bool,
    /// The conversation is open and the server has diverged in it.
    pub(crate) diverged: bool,
    /// Bytes of both directions that the others have and the server has not.
    pub(crate) behind: u64,
    /// Bytes of its answers that are kept until they are compared.
    pub(crate) kept: u64,
}
