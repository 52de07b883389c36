//! Observes dom0's devices, knowing TCP and nothing of the engine: follows each conversation's streams as the
//! client and every server have them. The checkers compare these.

use core::net::SocketAddr;
use std::collections::{BTreeMap, BTreeSet};

use understudy_protocol::{EventKind, ServerId, ServiceStatus};

use crate::hostile::is_hostile;
use crate::segment::Segment;

/// How long a conversation that is over is remembered.
const LINGER_US: u64 = 59_000_000;

/// Longest stream that is followed. Positions beyond come from hostile segments only.
const STREAM_LIMIT: i64 = 16 << 20;

/// One thing that happens at dom0.
pub(crate) enum Seen<'a> {
    /// A valid segment from a client reached dom0.
    FromClient(&'a Segment<'a>),
    /// A valid segment came out of a server's vif.
    FromServer(ServerId, &'a Segment<'a>),
    /// The engine sends this to a client.
    ToClient(&'a Segment<'a>),
    /// The engine sends this to a server.
    ToServer(ServerId, &'a Segment<'a>),
    /// The engine promoted.
    Cutover { to: ServerId },
    /// The engine reports an event.
    Event(&'a EventKind),
    /// The engine's status, from time to time.
    Status(&'a ServiceStatus),
    /// A fault struck this server or its link.
    Blemish(ServerId),
    /// The service of this server, the OVM, was killed.
    Killed(ServerId),
}

/// Bytes by position, as far as they are known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stream {
    bytes: Vec<u8>,
    /// Known ranges, ordered and apart.
    known: Vec<(usize, usize)>,
}

impl Stream {
    /// One past the last known byte.
    pub(crate) fn high(&self) -> u64 {
        self.known.last().map_or(0, |r| r.1 as u64)
    }

    /// Bytes known from the start without a gap.
    pub(crate) fn contiguous(&self) -> u64 {
        match self.known.first() {
            Some(&(0, end)) => end as u64,
            _ => 0,
        }
    }

    /// End of the known range that has the byte at `position`.
    pub(crate) fn run_at(&self, position: u64) -> Option<u64> {
        let run = self.known.iter().find(|&&(start, end)| (start as u64..end as u64).contains(&position))?;
        Some(run.1 as u64)
    }

    /// The byte at a position.
    pub(crate) fn get(&self, position: usize) -> Option<u8> {
        let after = self.known.partition_point(|r| r.0 <= position);
        let (_, end) = *self.known.get(after.checked_sub(1)?)?;
        (position < end).then(|| self.bytes[position])
    }

    /// The first position of `bytes` (which start at `position`) that differs from what is known.
    pub(crate) fn conflict(&self, position: i64, bytes: &[u8]) -> Option<u64> {
        let (start, bytes) = clip(position, bytes)?;
        for &(from, to) in &self.known {
            let from = from.max(start);
            let to = to.min(start + bytes.len());
            if from < to && self.bytes[from..to] != bytes[from - start..to - start] {
                let same = self.bytes[from..to]
                    .iter()
                    .zip(&bytes[from - start..to - start])
                    .take_while(|(a, b)| a == b)
                    .count();
                return Some((from + same) as u64);
            }
        }
        None
    }

    /// Ranges of `position..position + length` that are not known.
    pub(crate) fn unknown(&self, position: i64, length: usize) -> Vec<(usize, usize)> {
        let mut gaps = Vec::new();
        let mut at = position.max(0) as usize;
        let end = (position + length as i64).clamp(0, STREAM_LIMIT) as usize;
        for &(from, to) in &self.known {
            if at < from.min(end) {
                gaps.push((at, from.min(end)));
            }
            at = at.max(to);
        }
        if at < end {
            gaps.push((at, end));
        }
        gaps
    }

    /// Adds bytes; known bytes stay.
    pub(crate) fn put(&mut self, position: i64, bytes: &[u8]) {
        let Some((start, bytes)) = clip(position, bytes) else {
            return;
        };
        let end = start + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        for (from, to) in self.unknown(start as i64, bytes.len()) {
            self.bytes[from..to].copy_from_slice(&bytes[from - start..to - start]);
        }
        let first = self.known.partition_point(|r| r.1 < start);
        let last = self.known.partition_point(|r| r.0 <= end);
        let mut range = (start, end);
        if first < last {
            range = (start.min(self.known[first].0), end.max(self.known[last - 1].1));
        }
        self.known.splice(first..last, [range]);
    }
}

fn clip(position: i64, bytes: &[u8]) -> Option<(usize, &[u8])> {
    let skip = usize::try_from(-position.min(0)).ok()?;
    let bytes = bytes.get(skip..).filter(|b| !b.is_empty())?;
    let start = position.max(0);
    (start + bytes.len() as i64 <= STREAM_LIMIT).then_some((start as usize, bytes))
}

/// A server's counterpart of a conversation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Leg {
    pub(crate) iss: Option<u32>,
    pub(crate) window_scale: u8,
    /// The answers that came out of the server.
    pub(crate) produced: Stream,
    /// It sent two different bytes for one position, or something that no TCP sends.
    pub(crate) contradicts_itself: bool,
    pub(crate) fin: Option<i64>,
    pub(crate) reset: bool,
    /// Sequence number of its last RST.
    reset_at: Option<u32>,
    /// It sent more than the client had a window for.
    pub(crate) overran: bool,
    /// When its FIN or RST was first seen.
    pub(crate) closed_at: Option<u64>,
    /// Client bytes handed to it end here.
    pub(crate) handed: u64,
    /// Furthest right edge of its windows, as a position of client bytes.
    pub(crate) window_edge: i64,
    /// Its last window was zero.
    pub(crate) window_shut: bool,
    /// Client bytes that it acknowledged end here; a FIN counts one.
    pub(crate) acked: i64,
    /// Timestamps that it sent.
    pub(crate) tsvals: Vec<u32>,
}

/// One life of a client's connection to the PSC.
#[derive(Clone, Debug)]
pub(crate) struct Conversation {
    pub(crate) client: SocketAddr,
    pub(crate) isn: u32,
    pub(crate) began: u64,
    /// Client bytes as they reached dom0.
    pub(crate) received: Stream,
    /// When which bytes reached dom0 first: start, end, order, time.
    pub(crate) arrivals: Vec<(u64, u64, u64, u64)>,
    pub(crate) client_fin: Option<i64>,
    pub(crate) client_reset: bool,
    /// dom0 has seen the client accept the SYN-ACK.
    pub(crate) established: bool,
    /// Highest position of answers that the client acknowledged.
    pub(crate) client_acked: i64,
    pub(crate) client_tsvals: Vec<u32>,
    /// Shift of the client's windows, and the right edge of its latest one.
    client_scale: u8,
    client_edge: i64,
    /// ISS and window scale of the SYN-ACK that the client was sent.
    pub(crate) view: Option<(u32, u8)>,
    /// ISS of an earlier SYN-ACK, that a RST followed.
    withdrawn: Option<u32>,
    /// Answers as they were sent to the client.
    pub(crate) sent: Stream,
    pub(crate) sent_fin: Option<i64>,
    /// Order and end of what is sent without a gap, after each growth.
    pub(crate) sent_growth: Vec<(u64, u64)>,
    pub(crate) reset_to_client: bool,
    /// Client bytes that an OVM acknowledged end here; a FIN counts one.
    pub(crate) ovm_acked: i64,
    /// Positions of sequence and acknowledgement in the last segment from and to the client.
    last_up: (i64, i64),
    last_down: (i64, i64),
    /// When both sides had closed, or one reset.
    over_at: Option<u64>,
    /// When one of its streams last grew.
    pub(crate) moved_at: u64,
    /// When the client was last told a window of zero.
    pub(crate) window_shut: bool,
    pub(crate) legs: BTreeMap<ServerId, Leg>,
    /// What former OVMs had sent when they were deposed.
    pub(crate) recorded: Vec<Leg>,
}

impl Conversation {
    /// The answer bytes sent to the client before the event numbered `order`.
    pub(crate) fn sent_before(&self, order: u64) -> u64 {
        let after = self.sent_growth.partition_point(|g| g.0 < order);
        after.checked_sub(1).map_or(0, |i| self.sent_growth[i].1)
    }

    /// Position of a sequence number of the client.
    pub(crate) fn client_position(&self, seq: u32) -> i64 {
        i64::from(seq.wrapping_sub(self.isn.wrapping_add(1)) as i32)
    }

    /// Position of a sequence number as the client sees it.
    pub(crate) fn view_position(&self, seq: u32) -> Option<i64> {
        let (iss, _) = self.view?;
        Some(i64::from(seq.wrapping_sub(iss.wrapping_add(1)) as i32))
    }

    /// Neither side has closed or reset.
    pub(crate) fn is_open(&self) -> bool {
        !self.client_reset && !self.reset_to_client && self.client_fin.is_none() && self.sent_fin.is_none()
    }

    /// The client was sent an acknowledgement of all that reached dom0.
    pub(crate) fn is_acknowledged(&self) -> bool {
        self.last_down.1 >= self.received.contiguous() as i64
    }

    /// Both ends repeat what the other has: each drops the other's segments, and the acknowledgements
    /// in them (RFC 9293 §3.10.7.4). smoltcp gets there, since it rewinds SND.NXT to retransmit.
    pub(crate) fn is_deadlocked(&self) -> bool {
        self.last_up.0 < self.last_down.1 && self.last_down.0 < self.last_up.1
    }

    /// Whether a server has everything that the client sent, and has sent everything that the client was sent.
    pub(crate) fn kept_up(&self, server: ServerId) -> bool {
        self.legs.get(&server).is_some_and(|leg| {
            leg.handed >= self.received.contiguous() && leg.produced.contiguous() >= self.sent.contiguous()
        }) && self.view.is_some()
    }

    /// Whether a server's answers differ from what the client was sent.
    pub(crate) fn diverged(&self, server: ServerId) -> bool {
        self.legs.get(&server).is_some_and(|leg| {
            leg.contradicts_itself
                || leg.fin.is_some_and(|fin| fin < self.sent.contiguous() as i64)
                || leg
                    .produced
                    .known
                    .iter()
                    .any(|&(a, b)| self.sent.conflict(a as i64, &leg.produced.bytes[a..b]).is_some())
        })
    }
}

pub(crate) struct Observer {
    /// Number of what happened last.
    pub(crate) order: u64,
    pub(crate) conversations: Vec<Conversation>,
    /// By client and PSC address: the newest life.
    newest: BTreeMap<(SocketAddr, SocketAddr), usize>,
    pub(crate) psc: Vec<SocketAddr>,
    /// Address of each server life, per family.
    pub(crate) servers: BTreeMap<ServerId, Vec<SocketAddr>>,
    /// Since when each life is in the queue.
    pub(crate) attached: BTreeMap<ServerId, u64>,
    /// Servers that sent segments that no TCP sends: their streams are unknown.
    pub(crate) liars: BTreeSet<ServerId>,
    pub(crate) ovm: Option<ServerId>,
    pub(crate) epoch: u64,
}

impl Observer {
    pub(crate) fn new(psc: Vec<SocketAddr>) -> Self {
        Self {
            order: 0,
            conversations: Vec::new(),
            newest: BTreeMap::new(),
            psc,
            servers: BTreeMap::new(),
            attached: BTreeMap::new(),
            liars: BTreeSet::new(),
            ovm: None,
            epoch: 0,
        }
    }

    pub(crate) fn server_joins(&mut self, id: ServerId, addresses: Vec<SocketAddr>) {
        self.servers.insert(id, addresses);
        self.attached.insert(id, self.order);
    }

    /// The conversation of a segment between a client and the PSC or a server.
    pub(crate) fn index_of(&self, client: SocketAddr, server: SocketAddr) -> Option<usize> {
        let psc = self.psc.iter().find(|p| p.is_ipv6() == server.is_ipv6() && p.port() == server.port())?;
        self.newest.get(&(client, *psc)).copied()
    }

    pub(crate) fn conversation_of(&self, client: SocketAddr, server: SocketAddr) -> Option<&Conversation> {
        self.index_of(client, server).map(|i| &self.conversations[i])
    }

    /// The newest conversation of each pair of addresses, without a SYN that everybody ignored.
    pub(crate) fn latest(&self) -> impl Iterator<Item = &Conversation> {
        self.newest.values().map(|&index| &self.conversations[index])
    }

    /// Whether a client that was refused does not know it yet: its segments are passed unchanged, and the OVM refuses them.
    pub(crate) fn is_refused(&self, conversation: &Conversation, server: ServerId) -> bool {
        conversation.reset_to_client && self.ovm == Some(server)
    }

    /// Whether this concerns a hostile client alone.
    pub(crate) fn is_of_hostile(seen: &Seen<'_>) -> bool {
        match seen {
            Seen::FromClient(segment) | Seen::ToServer(_, segment) => is_hostile(segment.src.ip()),
            Seen::FromServer(_, segment) | Seen::ToClient(segment) => is_hostile(segment.dst.ip()),
            _ => false,
        }
    }

    /// Whether this concerns a conversation that ended long ago, which nobody needs to remember.
    pub(crate) fn is_long_over(&self, seen: &Seen<'_>, at: u64) -> bool {
        let conversation = match seen {
            Seen::ToClient(segment) => self.conversation_of(segment.dst, segment.src),
            Seen::ToServer(_, segment) => self.conversation_of(segment.src, segment.dst),
            _ => None,
        };
        conversation.and_then(|c| c.over_at).is_some_and(|over| at > over + LINGER_US)
    }

    /// Takes in what happened; called after the checkers have compared it with what was before.
    pub(crate) fn record(&mut self, at: u64, seen: &Seen<'_>) {
        self.order += 1;
        match seen {
            Seen::FromClient(segment) => self.client_says(at, segment),
            Seen::FromServer(server, segment) => self.server_says(at, *server, segment),
            Seen::ToClient(segment) => self.client_hears(at, segment),
            Seen::ToServer(server, segment) => {
                if let Some(i) = self.index_of(segment.src, segment.dst) {
                    let conversation = &mut self.conversations[i];
                    let end = conversation.client_position(segment.seq) + segment.payload.len() as i64;
                    let leg = conversation.legs.entry(*server).or_default();
                    leg.handed = leg.handed.max(end.clamp(0, STREAM_LIMIT) as u64);
                }
            }
            Seen::Cutover { to } => {
                for conversation in &mut self.conversations {
                    if let Some(leg) = self.ovm.and_then(|former| conversation.legs.get(&former)) {
                        conversation.recorded.push(leg.clone());
                    }
                }
                self.ovm = Some(*to);
                self.epoch += 1;
            }
            Seen::Event(EventKind::Reset { client }) => {
                // The RST itself may leave later.
                let of_client = self.newest.iter().filter(|((c, _), _)| c == client);
                for (_, &index) in of_client {
                    self.conversations[index].reset_to_client = true;
                }
            }
            Seen::Event(_) | Seen::Status(_) | Seen::Blemish(_) | Seen::Killed(_) => {}
        }
        if let Seen::FromClient(segment) = seen
            && let Some(i) = self.index_of(segment.src, segment.dst)
        {
            let c = &mut self.conversations[i];
            let closed = c.client_fin.is_some() && c.sent_fin.is_some_and(|fin| c.client_acked > fin);
            if c.over_at.is_none() && (closed || c.client_reset || c.reset_to_client) {
                c.over_at = Some(at);
            }
        }
    }

    fn client_says(&mut self, at: u64, segment: &Segment<'_>) {
        if !self.psc.contains(&segment.dst) {
            return;
        }
        let known = self.index_of(segment.src, segment.dst);
        if segment.syn && segment.ack.is_none() && !segment.rst {
            let repeated = known.is_some_and(|i| self.conversations[i].isn == segment.seq);
            if !repeated {
                self.newest.insert((segment.src, segment.dst), self.conversations.len());
                self.conversations.push(Conversation {
                    client: segment.src,
                    isn: segment.seq,
                    began: self.order,
                    received: Stream::default(),
                    arrivals: Vec::new(),
                    client_fin: None,
                    client_reset: false,
                    established: false,
                    client_acked: 0,
                    client_tsvals: Vec::new(),
                    client_scale: segment.window_scale.unwrap_or(0).min(14),
                    client_edge: i64::from(segment.window),
                    view: None,
                    withdrawn: None,
                    sent: Stream::default(),
                    sent_fin: None,
                    sent_growth: Vec::new(),
                    reset_to_client: false,
                    ovm_acked: 0,
                    last_up: (0, 0),
                    last_down: (0, 0),
                    over_at: None,
                    moved_at: at,
                    window_shut: false,
                    legs: BTreeMap::new(),
                    recorded: Vec::new(),
                });
            }
        }
        let Some(i) = self.index_of(segment.src, segment.dst) else {
            return;
        };
        let order = self.order;
        let conversation = &mut self.conversations[i];
        if let Some((tsval, _)) = segment.timestamps
            && conversation.client_tsvals.last() != Some(&tsval)
        {
            conversation.client_tsvals.push(tsval);
        }
        if segment.rst {
            // Far from everything that was sent it is a guess, which no TCP believes.
            conversation.client_reset |= conversation.client_position(segment.seq).abs() < STREAM_LIMIT;
            return;
        }
        if segment.syn {
            return;
        }
        conversation.established = true;
        if conversation.withdrawn.is_some_and(|iss| segment.ack == Some(iss.wrapping_add(1))) {
            // It had accepted that one, and the RST is on its way.
            conversation.reset_to_client = true;
            return;
        }
        let position = conversation.client_position(segment.seq);
        if let Some(acked) = segment.ack.and_then(|ack| conversation.view_position(ack)) {
            conversation.last_up = (position, acked);
            conversation.client_acked = conversation.client_acked.max(acked);
            conversation.client_edge = acked + (i64::from(segment.window) << conversation.client_scale);
        }
        for (from, to) in conversation.received.unknown(position, segment.payload.len()) {
            conversation.arrivals.push((from as u64, to as u64, order, at));
        }
        let before = conversation.received.contiguous();
        conversation.received.put(position, segment.payload);
        if conversation.received.contiguous() > before {
            conversation.moved_at = at;
        }
        if segment.fin {
            conversation.client_fin = Some(position + segment.payload.len() as i64);
        }
    }

    fn server_says(&mut self, at: u64, server: ServerId, segment: &Segment<'_>) {
        let own = self.servers.get(&server).into_iter().flatten();
        if !own.clone().any(|a| *a == segment.src) {
            return;
        }
        let Some(i) = self.index_of(segment.dst, segment.src) else {
            return;
        };
        let conversation = &mut self.conversations[i];
        let acks_isn = segment.ack == Some(conversation.isn.wrapping_add(1));
        let (client_acked, client_edge) = (conversation.client_acked, conversation.client_edge);
        let acked = segment.ack.map(|ack| conversation.client_position(ack));
        let leg = conversation.legs.entry(server).or_default();
        if segment.syn {
            // A server that was reset before it said anything may be asked again.
            let anew = leg.iss != Some(segment.seq) && leg.produced.high() == 0;
            if acks_isn && anew {
                // Its RST may have overtaken it on the link.
                let reset = leg.reset_at == Some(segment.seq.wrapping_add(1));
                *leg = Leg { iss: Some(segment.seq), reset, reset_at: leg.reset_at, ..Leg::default() };
                leg.window_scale = segment.window_scale.unwrap_or(0).min(14);
                leg.window_edge = i64::from(segment.window);
            }
        } else if segment.rst {
            leg.reset = true;
            leg.reset_at = Some(segment.seq);
            // smoltcp's RST may lie before what it has sent: nobody takes notice of it (RFC 5961 §3.2).
            let position = leg.iss.map(|iss| i64::from(segment.seq.wrapping_sub(iss.wrapping_add(1)) as i32));
            let end = leg.produced.contiguous() as i64;
            if position.is_some_and(|p| p == end || Some(p - 1) == leg.fin || p == client_acked) {
                leg.closed_at.get_or_insert(at);
            }
            return;
        }
        if let Some((tsval, _)) = segment.timestamps
            && leg.tsvals.last() != Some(&tsval)
        {
            leg.tsvals.push(tsval);
        }
        let (Some(iss), false) = (leg.iss, segment.syn) else {
            return;
        };
        let position = i64::from(segment.seq.wrapping_sub(iss.wrapping_add(1)) as i32);
        if leg.produced.conflict(position, segment.payload).is_some() {
            leg.contradicts_itself = true;
        }
        leg.overran |= position + segment.payload.len() as i64 > client_edge + 1;
        leg.produced.put(position, segment.payload);
        if segment.fin {
            leg.fin = Some(position + segment.payload.len() as i64);
            leg.closed_at.get_or_insert(at);
        }
        if let Some(acked) = acked {
            leg.acked = leg.acked.max(acked);
            if self.ovm == Some(server) {
                conversation.ovm_acked = conversation.ovm_acked.max(acked);
            }
            let edge = acked + (i64::from(segment.window) << leg.window_scale);
            leg.window_edge = leg.window_edge.max(edge);
            leg.window_shut = segment.window == 0;
        }
    }

    fn client_hears(&mut self, at: u64, segment: &Segment<'_>) {
        let order = self.order;
        let Some(i) = self.index_of(segment.dst, segment.src) else {
            return;
        };
        let conversation = &mut self.conversations[i];
        if segment.rst {
            conversation.reset_to_client = true;
            return;
        }
        if segment.syn {
            // A client that was still waiting for a SYN-ACK took no notice of the reset.
            let anew = conversation.reset_to_client && conversation.client_acked == 0;
            if conversation.view.is_none() || anew {
                conversation.reset_to_client = false;
                conversation.sent_fin = None;
                conversation.recorded.clear();
                let scale = segment.window_scale.unwrap_or(0).min(14);
                if segment.window_scale.is_none() {
                    conversation.client_scale = 0;
                }
                conversation.withdrawn =
                    conversation.view.map(|(iss, _)| iss).filter(|iss| *iss != segment.seq);
                conversation.view = Some((segment.seq, scale));
            }
            return;
        }
        let Some(position) = conversation.view_position(segment.seq) else {
            return;
        };
        conversation.window_shut = segment.window == 0;
        if let Some(ack) = segment.ack {
            conversation.last_down = (position, conversation.client_position(ack));
        }
        let before = conversation.sent.contiguous();
        conversation.sent.put(position, segment.payload);
        let after = conversation.sent.contiguous();
        if after > before {
            conversation.moved_at = at;
            conversation.sent_growth.push((order, after));
        }
        if segment.fin && conversation.sent_fin.is_none() {
            conversation.sent_fin = Some(position + segment.payload.len() as i64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Stream;

    #[test]
    fn a_stream_joins_ranges_and_finds_conflicts() {
        let mut stream = Stream::default();
        stream.put(5, b"fgh");
        stream.put(0, b"abc");
        assert_eq!((stream.contiguous(), stream.high()), (3, 8));
        assert_eq!(stream.unknown(-1, 20), vec![(3, 5), (8, 19)]);
        assert_eq!(stream.conflict(4, b"efg"), None);
        assert_eq!(stream.conflict(4, b"eXg"), Some(5));
        stream.put(2, b"cdef");
        assert_eq!(stream.contiguous(), 8);
        assert_eq!(stream.conflict(0, b"abcdefgh"), None);
        stream.put(-1, b"?ab");
        assert_eq!(stream.get(0), Some(b'a'));
        assert_eq!(stream.get(8), None);
    }
}
