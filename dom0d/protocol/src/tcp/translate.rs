//! Which segments of a conversation may pass between client and OVM without the daemon, and how their headers change on
//! the way.
//!
//! This is the specification of the data plane in the kernel, which does the same to the same bytes; the engine
//! translates by the same functions. The engine takes a passed segment as it is (rule 10). So a segment passes only if
//! it matches the grammar of [`crate::wire`] and can be read in only one way. Only new bytes pass, perhaps beyond a
//! gap: retransmissions, contradictions, FIN and RST go to the daemon. No segment is resized; options that have no
//! translation are overwritten by NOPs.
//!
//! Read before an edit: RFC 9293 §3.4, RFC 7323 §3 to §5, RFC 2018, RFC 1624 (incremental checksums).

use core::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::tcp::seq::later;
use crate::wire::options::{self, AO, MD5, MSS, SACK, SACK_PERMITTED, TIMESTAMPS, WINDOW_SCALE};
use crate::wire::{self, TCP};

/// The state of one passed conversation, in the sequence numbers, timestamps and windows that its segments carry.
/// `told` marks what the client was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Added to the server's sequence numbers for the client.
    pub seq_delta: u32,
    /// Added to the server's TSval for the client.
    pub ts_delta: u32,
    /// The server's TSval when it was promoted: no earlier TSval is echoed to it.
    pub ts_floor: u32,
    /// The server's latest TSval.
    pub server_tsval: u32,
    /// Latest TSval that the client was told.
    pub told_tsval: u32,
    /// TS.Recent of the client's segments (RFC 7323 §4.3).
    pub ts_recent: u32,
    /// SND.NXT of the client, as far as seen: the end of everything that it has sent.
    pub up_nxt: u32,
    /// Highest acknowledgment that the client was told.
    pub told_acked: u32,
    /// Furthest right edge of the server's window.
    pub server_edge: u32,
    /// SND.NXT towards the client.
    pub down_nxt: u32,
    /// SND.UNA towards the client.
    pub client_acked: u32,
    /// Right edge of the client's window.
    pub client_edge: u32,
    /// Window scale of the windows that the client advertises.
    pub client_shift: u8,
    /// Window scale of the windows that the server advertises.
    pub server_shift: u8,
    /// Window scale of the windows that the client is told.
    pub told_shift: u8,
    /// Both sides send timestamps.
    pub timestamps: bool,
    /// How far client and server may send.
    pub bounds: Bounds,
}

/// Right edges beyond which no side is told to send, whatever window its peer has: the daemon keeps what replicas still
/// lack, and its room for that is finite (rule 6). Bounds never move back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// For the client, in its own sequence numbers.
    pub up: u32,
    /// For the server, in the sequence numbers that the client knows.
    pub down: u32,
}

/// Why a segment was not translated. The segment is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aside {
    /// The packet is not a complete TCP segment right after an IP header.
    Foreign,
    /// The daemon must deal with it.
    Daemon,
    /// The daemon must deal with it and with all later segments, because it advances the conversation.
    DaemonFromNow,
}

const FIN_RST_URG: u8 = 0x25;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// The client's TSecr, translated to what a server must see: one of its own TSvals since its promotion.
pub(crate) const fn tsecr_for_server(tsecr: u32, ts_delta: u32, floor: u32, latest: u32) -> u32 {
    let own = tsecr.wrapping_sub(ts_delta);
    if later(own, latest) {
        latest
    } else if later(floor, own) {
        floor
    } else {
        own
    }
}

/// The right edge of a window, cut at `bound`.
const fn bounded(edge: u32, bound: u32) -> u32 {
    if later(edge, bound) { bound } else { edge }
}

/// `low <= seq <= high` in sequence space. Comparing distances from `low` is exact, even when `seq` is half of the
/// sequence space away.
const fn is_between(low: u32, seq: u32, high: u32) -> bool {
    seq.wrapping_sub(low) <= high.wrapping_sub(low)
}

/// A segment begins at or after the end of everything seen in its direction (`next`), and lies in the window. This must
/// hold for segments without payload, too: a receiver ignores those outside its window.
const fn is_new(next: u32, seq: u32, end: u32, edge: u32) -> bool {
    let edge = if later(next, edge) { next } else { edge };
    is_between(next, seq, edge) && is_between(next, end, edge)
}

/// The later of a server's TSvals (RFC 7323 §4.3). All its segments come through one vif, so the latest counts. 0
/// stands for no known TSval.
pub(crate) const fn latest_tsval(known: u32, tsval: u32) -> u32 {
    if later(tsval, known) || known == 0 { tsval } else { known }
}

impl Flow {
    /// Translates a segment of the client for the server at `server`. Returns the right edge of the window that the
    /// server is told.
    pub fn client_to_server(&mut self, packet: &mut [u8], server: IpAddr) -> Result<u32, Aside> {
        let layout = Layout::of(packet, server).ok_or(Aside::Foreign)?;
        let old = layout.header(packet);
        let seq = be32(&old, 4);
        let end = seq.wrapping_add(layout.payload);
        let moves = layout.payload > 0 && later(end, self.up_nxt);
        if let Some(aside) = aside_for_flags(old[13], moves) {
            return Err(aside);
        }
        let aside = Err(if moves { Aside::DaemonFromNow } else { Aside::Daemon });
        let mut new = old;
        let Some(found) = read_options(&mut new, layout.header) else { return aside };
        let ack = be32(&old, 8);
        let edge = bounded(self.server_edge, self.bounds.up);
        if !is_new(self.up_nxt, seq, end, edge)
            || !is_between(self.client_acked, ack, self.down_nxt)
            || found.timestamps.is_some() != self.timestamps
        {
            return aside;
        }
        if let Some(at) = found.timestamps {
            let tsval = be32(&old, at + 2);
            // PAWS, with a tolerance of one tick like Linux.
            if later(self.ts_recent, tsval.wrapping_add(1)) {
                return aside;
            }
            let echo = tsecr_for_server(be32(&old, at + 6), self.ts_delta, self.ts_floor, self.server_tsval);
            put32(&mut new, at + 6, echo);
            if !later(seq, self.told_acked) && later(tsval, self.ts_recent) {
                self.ts_recent = tsval;
            }
        }
        put32(&mut new, 8, ack.wrapping_sub(self.seq_delta));
        self.move_sack(&old, &mut new, found.sack);
        if layout.payload > 0 {
            self.up_nxt = end;
        }
        self.client_acked = ack;
        self.client_edge = ack.wrapping_add(window_of(&old) << (self.client_shift & 15));
        let edge = bounded(self.client_edge, self.bounds.down);
        if edge != self.client_edge {
            put_window(&mut new, edge, ack, self.client_shift);
        }
        layout.write(packet, &old, &new, layout.destination, server);
        Ok(edge)
    }

    /// Moves the edges of the SACK blocks to the server's numbers.
    fn move_sack(&self, old: &[u8], new: &mut [u8], sack: Option<(usize, usize)>) {
        if let Some((at, length)) = sack {
            for edge in (at + 2..at + length).step_by(4) {
                put32(new, edge, be32(old, edge).wrapping_sub(self.seq_delta));
            }
        }
    }

    /// Translates a segment of the server for the client, which knows the service as `psc`. Returns the right edge of
    /// the window that the client is told.
    pub fn server_to_client(&mut self, packet: &mut [u8], psc: IpAddr) -> Result<u32, Aside> {
        let layout = Layout::of(packet, psc).ok_or(Aside::Foreign)?;
        let old = layout.header(packet);
        let seq = be32(&old, 4).wrapping_add(self.seq_delta);
        let end = seq.wrapping_add(layout.payload);
        let moves = layout.payload > 0 && later(end, self.down_nxt);
        if let Some(aside) = aside_for_flags(old[13], moves) {
            return Err(aside);
        }
        let aside = Err(if moves { Aside::DaemonFromNow } else { Aside::Daemon });
        let mut new = old;
        let Some(found) = read_options(&mut new, layout.header) else { return aside };
        if let Some(at) = found.timestamps
            && self.timestamps
            && !moves
        {
            // The client may echo the TSval of this retransmission, which the daemon forwards. If the plane replaced
            // that echo by an earlier TSval, the server would take its retransmission for spurious (RFC 3522), and
            // every recovery would take a timeout.
            self.server_tsval = latest_tsval(self.server_tsval, be32(&old, at + 2));
        }
        let ack = be32(&old, 8);
        // A window probe may exceed the window by one byte.
        if !is_new(self.down_nxt, seq, end, self.client_edge.wrapping_add(1))
            || !is_between(self.told_acked, ack, self.up_nxt)
            || found.timestamps.is_some() != self.timestamps
        {
            return aside;
        }
        if let Some(at) = found.timestamps {
            let tsval = be32(&old, at + 2);
            self.server_tsval = latest_tsval(self.server_tsval, tsval);
            let told = tsval.wrapping_add(self.ts_delta);
            if later(told, self.told_tsval) {
                self.told_tsval = told;
            }
            put32(&mut new, at + 2, self.told_tsval);
        }
        put32(&mut new, 4, seq);
        let edge = ack.wrapping_add(window_of(&old) << (self.server_shift & 15));
        if later(edge, self.server_edge) {
            self.server_edge = edge;
        }
        self.told_acked = ack;
        let edge = bounded(self.server_edge, self.bounds.up);
        put_window(&mut new, edge, ack, self.told_shift);
        if layout.payload > 0 {
            self.down_nxt = end;
        }
        layout.write(packet, &old, &new, layout.source, psc);
        Ok(edge)
    }
}

/// Translation while the daemon is not running and conversations must continue (rule 8). No daemon deals with the
/// segments, so whatever can be translated passes, new or not, and no window is bounded. The flow stays unchanged.
impl Flow {
    /// Rewrites a segment of the client in an unknown conversation: only the address changes.
    pub fn client_to_server_as_is(packet: &mut [u8], server: IpAddr) -> Result<(), Aside> {
        let layout = Layout::of(packet, server).ok_or(Aside::Foreign)?;
        let header = layout.header(packet);
        layout.write(packet, &header, &header, layout.destination, server);
        Ok(())
    }

    /// Rewrites a segment of the server in an unknown conversation: only the address changes.
    pub fn server_to_client_as_is(packet: &mut [u8], psc: IpAddr) -> Result<(), Aside> {
        let layout = Layout::of(packet, psc).ok_or(Aside::Foreign)?;
        let header = layout.header(packet);
        layout.write(packet, &header, &header, layout.source, psc);
        Ok(())
    }

    /// Translates a segment of the client for the server at `server`.
    pub fn client_to_server_alone(&self, packet: &mut [u8], server: IpAddr) -> Result<(), Aside> {
        let layout = Layout::of(packet, server).ok_or(Aside::Foreign)?;
        let old = layout.header(packet);
        let mut new = old;
        let Some(found) = read_options(&mut new, layout.header) else { return Err(Aside::Daemon) };
        if old[13] & ACK != 0 {
            put32(&mut new, 8, be32(&old, 8).wrapping_sub(self.seq_delta));
        }
        if let Some(at) = found.timestamps {
            put32(&mut new, at + 6, be32(&old, at + 6).wrapping_sub(self.ts_delta));
        }
        self.move_sack(&old, &mut new, found.sack);
        layout.write(packet, &old, &new, layout.destination, server);
        Ok(())
    }

    /// Translates a segment of the server for the client, which knows the service as `psc`.
    pub fn server_to_client_alone(&self, packet: &mut [u8], psc: IpAddr) -> Result<(), Aside> {
        let layout = Layout::of(packet, psc).ok_or(Aside::Foreign)?;
        let old = layout.header(packet);
        let mut new = old;
        let Some(found) = read_options(&mut new, layout.header) else { return Err(Aside::Daemon) };
        put32(&mut new, 4, be32(&old, 4).wrapping_add(self.seq_delta));
        if let Some(at) = found.timestamps {
            put32(&mut new, at + 2, be32(&old, at + 2).wrapping_add(self.ts_delta));
        }
        layout.write(packet, &old, &new, layout.source, psc);
        Ok(())
    }
}

/// A segment may pass only with ACK, and without SYN, FIN, RST and URG.
const fn aside_for_flags(flags: u8, moves: bool) -> Option<Aside> {
    if flags & FIN_RST_URG != 0 {
        return Some(Aside::DaemonFromNow);
    }
    match (flags & (SYN | ACK) == ACK, moves) {
        (true, _) => None,
        (false, true) => Some(Aside::DaemonFromNow),
        (false, false) => Some(Aside::Daemon),
    }
}

/// The longest TCP header (RFC 9293 §3.1).
const LONGEST_HEADER: usize = 60;

/// Offsets and lengths of a packet's parts, in bytes.
struct Layout {
    source: usize,
    destination: usize,
    tcp: usize,
    /// Bytes of the TCP header.
    header: usize,
    /// Bytes of payload.
    payload: u32,
    is_ipv4: bool,
}

impl Layout {
    /// The layout of a packet of the same address family as `other`.
    fn of(packet: &[u8], other: IpAddr) -> Option<Self> {
        let ip = wire::read_ip(packet).ok()?;
        if ip.protocol != TCP || ip.src.is_ipv4() != other.is_ipv4() {
            return None;
        }
        let header = wire::tcp_header(ip.payload).ok()?;
        let is_ipv4 = other.is_ipv4();
        let (source, destination) = if is_ipv4 { (12, 16) } else { (8, 24) };
        let payload = (ip.payload.len() - header) as u32;
        Some(Self { source, destination, tcp: ip.header, header, payload, is_ipv4 })
    }

    fn header(&self, packet: &[u8]) -> [u8; LONGEST_HEADER] {
        let mut header = [0; LONGEST_HEADER];
        header[..self.header].copy_from_slice(&packet[self.tcp..self.tcp + self.header]);
        header
    }

    /// Writes the new header, and `address` at `at`, and updates the checksums by the difference.
    fn write(&self, packet: &mut [u8], old: &[u8], new: &[u8], at: usize, address: IpAddr) {
        let mut octets = [0; 16];
        let length = match address {
            IpAddr::V4(v4) => {
                octets[..4].copy_from_slice(&v4.octets());
                4
            }
            IpAddr::V6(v6) => {
                octets = v6.octets();
                16
            }
        };
        let moved = difference(&packet[at..at + length], &octets[..length]);
        packet[at..at + length].copy_from_slice(&octets[..length]);
        if self.is_ipv4 {
            adjust(packet, 10, moved);
        }
        packet[self.tcp..self.tcp + self.header].copy_from_slice(&new[..self.header]);
        adjust(packet, self.tcp + 16, difference(old, new));
        adjust(packet, self.tcp + 16, moved);
    }
}

/// The change of a one's-complement sum when `new` replaces `old`.
fn difference(old: &[u8], new: &[u8]) -> u64 {
    let pairs = old.chunks_exact(2).zip(new.chunks_exact(2));
    pairs
        .map(|(old, new)| {
            u64::from(!u16::from_be_bytes([old[0], old[1]])) + u64::from(u16::from_be_bytes([new[0], new[1]]))
        })
        .sum()
}

/// Applies RFC 1624's equation 3 to the checksum field at `at`.
fn adjust(packet: &mut [u8], at: usize, gained: u64) {
    let field = u16::from_be_bytes([packet[at], packet[at + 1]]);
    // As in the kernel, a sum of zero counts as all ones before the complement.
    let mut sum = 0xffff_0000 + u64::from(!field) + gained;
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    packet[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// Offsets in a TCP header of the options that have a translation.
#[derive(Default)]
struct Found {
    timestamps: Option<usize>,
    /// Offset and length.
    sack: Option<(usize, usize)>,
}

/// Finds the options, and overwrites those without a translation by NOPs. `None` if an option is malformed, appears
/// twice, belongs to a handshake, or authenticates the segment, which then can't be rewritten (RFC 2385, RFC 5925).
fn read_options(header: &mut [u8; LONGEST_HEADER], end: usize) -> Option<Found> {
    let mut found = Found::default();
    let old = *header;
    for option in options::each(&old[20..end]) {
        let option = option?;
        let (at, length) = (20 + option.start, option.len());
        match (old[at], length) {
            (TIMESTAMPS, 10) if found.timestamps.is_none() => found.timestamps = Some(at),
            (SACK, 10 | 18 | 26 | 34) if found.sack.is_none() => found.sack = Some((at, length)),
            (MSS | WINDOW_SCALE | SACK_PERMITTED | SACK | TIMESTAMPS | MD5 | AO, _) => return None,
            _ => header[at..at + length].fill(1),
        }
    }
    Some(found)
}

/// Writes the window from `ack` to `edge`, scaled by `shift`.
fn put_window(header: &mut [u8], edge: u32, ack: u32, shift: u8) {
    let room = if later(ack, edge) { 0 } else { edge.wrapping_sub(ack) >> (shift & 15) };
    let room = u16::try_from(room).unwrap_or(u16::MAX);
    header[14..16].copy_from_slice(&room.to_be_bytes());
}

fn window_of(header: &[u8]) -> u32 {
    u32::from(u16::from_be_bytes([header[14], header[15]]))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}
