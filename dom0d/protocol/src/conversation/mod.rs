//! One client connection to the PSC, with its counterpart on every server.
//!
//! Read before an edit: RFC 9293 §3.4 (sequence numbers), §3.10.7.4 (acceptability), RFC 7323
//! (timestamps, window scale), RFC 2018 and 2883 (SACK), RFC 5961 (blind attacks).
//!
//! | what happens | where |
//! |---|---|
//! | where a conversation is, and every transition | `state` |
//! | a segment of the client, of the OVM, of any other server | `client`, `ovm`, `replica` |
//! | the OVM closes, and RVMs confirm or dispute that | `closing` |
//! | the daemon plays the client towards a server, the server towards the client | `feed`, `recuperation` |
//! | evidence against the OVM | `verdict` |
//! | the data plane passes a conversation by itself | `passing` |
//! | deadlines; how a conversation ends | `upkeep`, `ending` |
//! | what a conversation sees of its service; what follows for the service | `turn`, `share` |

pub(crate) mod client;
pub(crate) mod closing;
pub(crate) mod ending;
pub(crate) mod feed;
pub(crate) mod handshake;
pub(crate) mod ovm;
pub(crate) mod passing;
pub(crate) mod recuperation;
pub(crate) mod replica;
pub(crate) mod share;
pub(crate) mod state;
pub(crate) mod table;
pub(crate) mod turn;
pub(crate) mod upkeep;
pub(crate) mod verdict;

use serde::{Deserialize, Serialize};

use crate::conversation::passing::UNBOUNDED;
use crate::conversation::state::State;
use crate::conversation::turn::Turn;
use crate::event::{LinkAddress, ServerId, StaleReason, Uncovered};
use crate::follower::leg::{Leg, Legs, Numbers, Phase};
use crate::key::{ConversationId, Key, Slot};
use crate::output::Destination;
use crate::suspicion::Suspicion;
use crate::tcp::sender::Sender;
use crate::tcp::seq::{later, seq_of};
use crate::tcp::stream::Stream;
use crate::time::Instant;
use crate::wire::{Flags, Options, SackBlocks, Segment};

/// What a client announced in its SYN, as far as the OVM agreed, and what it has acknowledged since.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Client {
    pub(crate) iss: u32,
    /// Largest segment that it accepts, options included.
    pub(crate) mss: u16,
    /// Window scale (RFC 7323) of the windows that it advertises; `None` if windows are not scaled.
    pub(crate) shift: Option<u8>,
    pub(crate) sack: bool,
    pub(crate) timestamps: bool,
    /// Its latest TSval.
    pub(crate) tsval: u32,
    /// TS.Recent of the OVM (RFC 7323 §4.3): the basis of PAWS.
    pub(crate) ts_recent: u32,
    /// SND.UNA of the servers: the down position that the client has acknowledged.
    pub(crate) acked: u64,
    /// SND.UNA was last advanced by a keepalive or a retransmission, and no acceptable segment has repeated that
    /// acknowledgment since: a server that drops unacceptable segments whole (RFC 9293 §3.10.7.4) has not processed it.
    pub(crate) acked_beside: bool,
    /// Right edge of its window.
    pub(crate) edge: u64,
}

impl Client {
    /// A client whose handshake is complete: the numbers of its SYN, and the options that both its SYN (`options`) and
    /// the OVM's SYN-ACK (`answer`) carry. `default_mss` holds if the client sent no MSS.
    pub(crate) fn agreed(
        iss: u32,
        window: u16,
        options: &Options,
        answer: &Options,
        default_mss: u16,
    ) -> Self {
        let timestamps = options.timestamps.filter(|_| answer.timestamps.is_some());
        let tsval = timestamps.map_or(0, |(tsval, _)| tsval);
        Self {
            iss,
            mss: options.mss.unwrap_or(default_mss).max(LEAST_MSS),
            shift: options.window_shift.filter(|_| answer.window_shift.is_some()),
            sack: options.sack_permitted && answer.sack_permitted,
            timestamps: timestamps.is_some(),
            tsval,
            ts_recent: tsval,
            acked: 1,
            acked_beside: false,
            edge: 1 + u64::from(window),
        }
    }
}

/// What the client was told so far, by whichever server. Nothing of it is ever taken back (rule 2).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Told {
    /// ISS_client_view: fixed by the SYN-ACK that the client accepted.
    pub(crate) iss: u32,
    /// Window scale of the windows that the client is told.
    pub(crate) shift: u8,
    /// MSS of that SYN-ACK.
    pub(crate) mss: u16,
    /// Highest up position that was acknowledged to the client.
    pub(crate) acked: u64,
    /// Furthest right edge of the window that the client was offered, as an up position.
    pub(crate) edge: u64,
    /// Last TSval that the client was sent.
    pub(crate) tsval: u32,
}

impl Told {
    /// What the SYN-ACK told the client; `scales` says whether both sides scale windows.
    pub(crate) fn by_syn_ack(
        iss: u32,
        window: u16,
        options: &Options,
        scales: bool,
        default_mss: u16,
    ) -> Self {
        Self {
            iss,
            shift: options.window_shift.filter(|_| scales).unwrap_or(0),
            mss: options.mss.unwrap_or(default_mss),
            acked: 1,
            edge: 1 + u64::from(window),
            tsval: options.timestamps.map_or(0, |(tsval, _)| tsval),
        }
    }
}

/// The smallest MSS that the daemon honours (RFC 9293 §3.7.1): a smaller one would multiply packets.
pub(crate) const LEAST_MSS: u16 = 88;

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Conversation {
    pub(crate) id: ConversationId,
    pub(crate) key: Key,
    link: LinkAddress,
    /// Epoch in which its legs were last arranged.
    pub(crate) epoch: u64,
    state: State,
    pub(crate) client: Client,
    told: Told,
    /// Recorded bytes of the client.
    pub(crate) up: Stream,
    /// When the client's handshake began.
    begun: Instant,
    /// Until when the OVM may refuse the client's first byte or FIN ([`Self::refused_from`]), once it is recorded.
    refusable_until: Option<Instant>,
    /// Position of the client's FIN, and its mark in the service-wide record.
    pub(crate) up_fin: Option<(u64, u64)>,
    /// Position of the client's RST, and its mark in the service-wide record.
    up_rst: Option<(u64, u64)>,
    /// What the client was sent.
    pub(crate) down: Stream,
    /// Position of the FIN that the client was sent.
    pub(crate) down_fin: Option<u64>,
    pub(crate) legs: Legs,
    suspicion: Suspicion,
    /// First and last position at which RVMs, ahead of the OVM, sent unsolicited data after a pause.
    paused: (u64, u64),
    last_heard: Instant,
    /// Since when the client owes an ACK, and of which down position: a client that acknowledges byte by byte still
    /// owes the rest.
    client_owes: Option<(Instant, u64)>,
    /// The client has owed that ACK for so long that servers no longer wait for it.
    is_client_silent: bool,
    probes: u8,
    /// When the service is to look at this conversation next.
    pub(crate) deadline: Option<Instant>,
    /// An RVM stops the client or the OVM, or has not yet made up for having done so.
    is_slowed: bool,
    /// The conversation is in the service's list of work.
    pub(crate) queued: bool,
    /// If the data plane passes the conversation by itself: how often the plane had been stopped when it began.
    passing: Option<u32>,
    /// The up and down positions at which the data plane stops the client and the OVM while it passes the conversation.
    bounds: (u64, u64),
    /// Right edges of the windows that the client and the OVM were last told.
    shown: (u64, u64),
    /// The conversation is in the service's list of those that the data plane may pass.
    pub(crate) is_passable_queued: bool,
    /// Its share of the service's retained bytes.
    retained: u64,
    /// Of these, the bytes of client and OVM that lie beyond gaps.
    beyond: u64,
}

impl Conversation {
    /// A conversation as its handshake leaves it, without legs.
    pub(crate) fn opened(
        (id, key): (ConversationId, Key),
        begun: Instant,
        link: LinkAddress,
        client: Client,
        told: Told,
        turn: &Turn<'_>,
    ) -> Self {
        Self {
            id,
            key,
            link,
            epoch: turn.epoch,
            state: State::OPENED,
            shown: (told.edge, client.edge),
            client,
            told,
            up: Stream::new(1),
            begun,
            refusable_until: None,
            up_fin: None,
            up_rst: None,
            down: Stream::new(1),
            down_fin: None,
            legs: Legs::default(),
            suspicion: Suspicion::default(),
            paused: (0, 0),
            last_heard: turn.now,
            client_owes: None,
            is_client_silent: false,
            probes: 0,
            deadline: None,
            is_slowed: false,
            queued: false,
            passing: None,
            bounds: UNBOUNDED,
            is_passable_queued: false,
            retained: 0,
            beyond: 0,
        }
    }

    /// The conversation is open, and some server or the client has not yet acknowledged or produced every byte.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_open() && !self.is_settled()
    }

    /// Client and servers have acknowledged and produced every byte, and nothing speaks against the OVM.
    pub(crate) fn is_settled(&self) -> bool {
        self.retained == 0
            && !self.is_recuperating()
            && self.client.acked >= self.down_end()
            && !self.suspicion.is_pending()
    }

    /// Open for client and OVM.
    pub(crate) fn is_open(&self) -> bool {
        self.state.is_open()
    }

    /// The daemon plays the OVM towards the client.
    pub(crate) fn is_recuperating(&self) -> bool {
        self.state.recuperating().is_some()
    }

    /// SND.NXT towards the client, FIN counted.
    pub(crate) fn down_end(&self) -> u64 {
        self.down.highest().max(self.down_fin.map_or(0, |fin| fin + 1))
    }

    /// End of the client's recorded sequence space, FIN counted.
    pub(crate) fn up_end(&self) -> u64 {
        self.up_fin.map_or(self.up.end(), |(fin, _)| fin + 1)
    }

    /// Client and OVM exchange their own segments; the daemon plays neither.
    pub(crate) fn is_through(&self, turn: &Turn<'_>) -> bool {
        turn.ovm().and_then(|(slot, server)| self.legs.get(slot, server)).is_some_and(|leg| leg.through)
    }

    /// Tells the record (rule 3) whether the server has produced its answer up to `position`, or can no longer be
    /// compared there.
    pub(crate) fn has_produced(&self, slot: Slot, server: ServerId, position: u64) -> bool {
        self.legs.get(slot, server).is_none_or(|leg| {
            leg.through || !leg.covers() || leg.gone.is_some() || leg.said.answers.end() >= position
        })
    }

    /// A segment to the client that carries only the present acknowledgment, window and timestamps.
    pub(crate) fn segment_to_client(&self) -> Segment<'static> {
        let window = self.told.edge.saturating_sub(self.told.acked) >> self.told.shift;
        Segment {
            src: self.key.psc,
            dst: self.key.client,
            seq: seq_of(self.told.iss, self.down_end()),
            ack: seq_of(self.client.iss, self.told.acked),
            flags: Flags::ACK,
            window: u16::try_from(window).unwrap_or(u16::MAX),
            urgent: 0,
            options: Options {
                timestamps: self.client.timestamps.then_some((self.told.tsval, self.client.ts_recent)),
                ..Options::default()
            },
            ecn: 0,
            payload: &[],
        }
    }

    /// Sends a segment to the client, split to the client's MSS.
    pub(crate) fn send_to_client(&mut self, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        turn.note_sent_to_client(segment.payload);
        let link = self.link;
        let to = Destination::Client(link);
        segment.emit_large(self.client.mss, |packet, size| turn.send(to, packet, size));
    }

    /// The TSval to send to the client: never earlier than the last one, or PAWS would drop the segment (RFC 7323 §5).
    pub(crate) fn advance_tsval(&mut self, tsval: u32) -> u32 {
        if later(tsval, self.told.tsval) {
            self.told.tsval = tsval;
        }
        self.told.tsval
    }

    /// Calls `visit` for each leg of a server in the queue.
    pub(crate) fn for_each_leg(
        &mut self,
        turn: &mut Turn<'_>,
        mut visit: impl FnMut(Slot, &mut Leg, &mut Turn<'_>),
    ) {
        for (slot, server) in turn.roster() {
            if let Some(leg) = self.legs.get_mut(slot, server) {
                visit(slot, leg, turn);
            }
        }
    }

    /// Gives the server a leg. A server without an address of the PSC's family gets none, and becomes stale (rule 5).
    pub(crate) fn add_leg(&mut self, slot: Slot, leg: Leg, turn: &mut Turn<'_>) {
        if turn.guest(slot, self.key.psc).is_none() {
            self.legs.set_absent(slot, Uncovered::OptionsDiffer);
            turn.mark_stale(slot, StaleReason::UncoveredConversation);
            return;
        }
        self.legs.put(slot, Box::new(leg));
    }

    /// The server no longer covers the conversation, so its state may differ from the OVM's from now on (rule 5).
    pub(crate) fn drop_leg(&mut self, slot: Slot, leg: &Leg, reason: Uncovered, turn: &mut Turn<'_>) {
        if leg.is_open() {
            self.send_reset_to(slot, leg, turn);
        }
        self.legs.set_absent(slot, reason);
        turn.note_produced(slot);
        turn.mark_stale(slot, StaleReason::UncoveredConversation);
    }

    /// The server reset the conversation, or refused it.
    pub(crate) fn note_gone(&self, slot: Slot, leg: &mut Leg, turn: &mut Turn<'_>) {
        if leg.gone.is_none() {
            leg.gone = Some(turn.now);
            leg.sender.disarm();
            turn.note_produced(slot);
        }
    }

    /// The leg of the server that answered the client's SYN: its handshake is complete, with the numbers that the
    /// client saw.
    pub(crate) fn through_leg(server: ServerId, told: &Told, window: u16) -> Leg {
        Leg {
            phase: Phase::Open,
            through: true,
            has_spoken: true,
            numbers: Numbers {
                iss: told.iss,
                shift: told.shift,
                mss: told.mss,
                tsval: told.tsval,
                ts_delta: 0,
                ts_floor: told.tsval,
            },
            rcv_nxt: 1,
            edge: 1 + u64::from(window),
            told: (1, 0),
            // The SYN is acknowledged: anything that the daemon itself may have to send comes after it.
            sender: Sender::new(1),
            ..Leg::opening(server)
        }
    }

    pub(crate) fn options_to_leg(&self, leg: &Leg) -> Options {
        Options {
            timestamps: self.client.timestamps.then_some((self.client.tsval, leg.numbers.tsval)),
            ..Options::default()
        }
    }

    /// SACK blocks (RFC 2018) for an ACK of the daemon's own. Without them a sender that negotiated SACK ignores
    /// duplicate ACKs, and each loss costs a retransmission timeout.
    pub(crate) fn sack_blocks(&self, stream: &Stream, iss: u32) -> SackBlocks {
        let mut blocks = SackBlocks::default();
        if self.client.sack {
            for island in stream.islands() {
                blocks.push(seq_of(iss, island.start), seq_of(iss, island.end));
            }
        }
        blocks
    }
}

/// The part of `text` before the FIN's position. Text after a FIN is ignored (RFC 9293 §3.10.7.4); some keepalives
/// carry a byte at the FIN's position.
pub(crate) fn text_before(fin: Option<u64>, start: u64, text: &[u8]) -> &[u8] {
    let room = fin.map_or(u64::MAX, |fin| fin.saturating_sub(start));
    &text[..text.len().min(usize::try_from(room).unwrap_or(usize::MAX))]
}
