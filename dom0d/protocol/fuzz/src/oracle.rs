//! What must hold whatever comes in. A broken promise panics.

use std::collections::BTreeMap;

use understudy_protocol::Service;

use crate::packet::Tcp;

/// Packets that one input may cause: windows, in-flight limits and paced resets bound them.
const PACKETS: usize = 20_000;
/// Servers of one queue, and streams of one conversation besides their answers.
const STREAMS: u64 = 4 + 2;

/// Bytes of answers that are a server's own mark: which server, and since which change of its role.
///
/// Valid answers and requests stay below 0x80.
pub(crate) fn mark(server: usize, role: u8) -> u8 {
    0x80 | (server as u8) << 5 | role & 31
}

/// What one client was sent.
#[derive(Default)]
pub(crate) struct Client {
    sent: BTreeMap<u32, u8>,
    /// The client's addresses were used for another handshake meanwhile: nothing is known.
    pub(crate) ambiguous: bool,
    /// Highest ACK that it sent for what it was sent.
    pub(crate) acked: u32,
}

impl Client {
    pub(crate) fn forget(&mut self) {
        self.sent.clear();
    }

    /// The same position never holds two different bytes.
    pub(crate) fn hears(&mut self, tcp: &Tcp) {
        for (offset, &byte) in tcp.payload.iter().enumerate() {
            let seq = tcp.seq.wrapping_add(offset as u32);
            if (seq.wrapping_sub(self.acked) as i32) < 0 {
                // The client has it, and does not look again.
                continue;
            }
            let first = *self.sent.entry(seq).or_insert(byte);
            assert_eq!(first, byte, "the client is sent another byte at {seq}");
        }
    }
}

/// Who may speak to clients.
#[derive(Default)]
pub(crate) struct Voices {
    roles: [u8; 4],
    /// By server and role: it was the OVM then, or later.
    may: [[bool; 32]; 4],
}

impl Voices {
    pub(crate) fn mark(&self, server: usize) -> u8 {
        mark(server, self.roles[server])
    }

    /// The server's role changed; as the OVM it may also say what it has answered before.
    pub(crate) fn change(&mut self, server: usize, is_ovm: bool) {
        if is_ovm {
            self.may[server][usize::from(self.roles[server] & 31)] = true;
        }
        self.roles[server] = self.roles[server].wrapping_add(1);
        self.may[server][usize::from(self.roles[server] & 31)] = is_ovm;
    }

    /// No byte of a replica or of a deposed server reaches a client.
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
