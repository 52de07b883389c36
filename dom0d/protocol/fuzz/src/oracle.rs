//! What must hold whatever the input. A broken promise panics.

use std::collections::BTreeMap;

use understudy_protocol::Service;

use crate::packet::Tcp;

/// Most packets that one input may cause: windows, in-flight limits and the pace of resets bound them (rule 6).
const PACKETS: usize = 20_000;
/// Servers in one queue, and streams of one conversation besides the servers' answers.
const STREAMS: u64 = 4 + 2;

/// An answer byte that marks its server, and the number of that server's last change of role.
///
/// Valid answers and requests stay below 0x80.
pub(crate) fn mark(server: usize, role: u8) -> u8 {
    0x80 | (server as u8) << 5 | role & 31
}

/// The bytes that one client was sent.
#[derive(Default)]
pub(crate) struct Client {
    sent: BTreeMap<u32, u8>,
    /// Another handshake has used the client's addresses meanwhile: nothing is known of the stream.
    pub(crate) ambiguous: bool,
    /// Highest sequence number that the client acknowledged.
    pub(crate) acked: u32,
}

impl Client {
    pub(crate) fn forget(&mut self) {
        self.sent.clear();
    }

    /// The same position never holds two different bytes (rule 2).
    pub(crate) fn hears(&mut self, tcp: &Tcp) {
        for (offset, &byte) in tcp.payload.iter().enumerate() {
            let seq = tcp.seq.wrapping_add(offset as u32);
            if (seq.wrapping_sub(self.acked) as i32) < 0 {
                // The client has acknowledged this byte, and ignores another copy.
                continue;
            }
            let first = *self.sent.entry(seq).or_insert(byte);
            assert_eq!(first, byte, "the client is sent another byte at {seq}");
        }
    }
}

/// Which servers may speak to clients (rule 1).
#[derive(Default)]
pub(crate) struct Voices {
    roles: [u8; 4],
    /// By server and number of its role: whether it was the OVM then, or later.
    may: [[bool; 32]; 4],
}

impl Voices {
    pub(crate) fn mark(&self, server: usize) -> u8 {
        mark(server, self.roles[server])
    }

    /// The server's role changed. As the OVM it may also send what it answered before.
    pub(crate) fn change(&mut self, server: usize, is_ovm: bool) {
        if is_ovm {
            self.may[server][usize::from(self.roles[server] & 31)] = true;
        }
        self.roles[server] = self.roles[server].wrapping_add(1);
        self.may[server][usize::from(self.roles[server] & 31)] = is_ovm;
    }

    /// No byte of a replica or of a deposed server reaches a client (rules 1 and 4).
    pub(crate) fn check(&self, tcp: &Tcp) {
        for byte in tcp.payload.iter().filter(|byte| **byte & 0x80 != 0) {
            let (server, role) = (usize::from(byte >> 5 & 3), usize::from(byte & 31));
            assert!(self.may[server][role], "a client is sent a byte of server {server}, who may not speak");
        }
    }
}

/// The service's own sums and limits, after each input.
pub(crate) fn check(service: &Service, packets: usize) {
    assert!(packets <= PACKETS, "{packets} packets for one input");
    let status = service.status();
    let limits = service.config().limits;
    assert!(status.embryonic <= u64::from(limits.embryonic));
    assert!(status.conversations <= u64::from(limits.conversations));
    let most = u64::from(limits.conversations) * STREAMS * u64::from(limits.conversation_bytes);
    assert!(status.retained_bytes <= most, "{} bytes retained", status.retained_bytes);
    for server in &status.servers {
        assert!(server.covered + server.diverged <= status.conversations, "{server:?}");
    }
}
