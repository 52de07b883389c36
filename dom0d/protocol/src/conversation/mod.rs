//! One client connection to the PSC, with its counterpart on every server.
//!
//! Read before an edit: RFC 9293 §3.4 (sequence numbers), §3.10.7.4 (acceptability), RFC 7323
//! (timestamps, window scale), RFC 2018 and 2883 (SACK), RFC 5961 (blind attacks).
//!
//! | what happens | where |
//! |---|---|
//! | where a conversation is, and every transition | `state` |
//! | the client, the OVM, any other server says something | `client`, `ovm`, `replica` |
//! | the OVM closes, and RVMs are heard about it | `closing` |
//! | the daemon plays the client towards a server, the server towards the client | `feed`, `recuperation` |
//! | evidence against the OVM | `verdict` |
//! | the data plane passes a conversation by itself | `passing` |
//! | what is due when; how a conversation ends | `upkeep`, `ending` |
//! | what it sees of its service, and what follows for that | `turn`, `share` |

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

/// What a client said of itself in its SYN, as far as the OVM agreed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Client {
    pub(crate) iss: u32,
    /// Largest segment it takes, options included.
    pub(crate) mss: u16,
    /// Shift of the windows it advertises; `None` if windows are not scaled.
    pub(crate) shift: Option<u8>,
    pub(crate) sack: bool,
    pub(crate) timestamps: bool,
    /// Its latest TSval.
    pub(crate) tsval: u32,
    /// TS.Recent of the OVM (RFC 7323 §4.3): the basis of PAWS.
    pub(crate) ts_recent: u32,
    /// SND.UNA of the servers: down position that it acknowledged.
    pub(crate) acked: u64,
    /// The latest acknowledgment came only with what is no news, a keepalive or a repetition: a server that
    /// is strict about that (RFC 9293 §3.10.7.4) has not taken notice of it.
    pub(crate) acked_beside: bool,
    /// Right edge of its window.
    pub(crate) edge: u64,
}

impl Client {
    /// A client whose handshake is complete, by the numbers of its SYN and what its `options` and the OVM's `answer` agree
    /// on. `default_mss` is what it takes where it names no size.
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

/// What the client was told by any server so far; never taken back.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Told {
    /// ISS_client_view: fixed by the SYN-ACK that the client accepted.
    pub(crate) iss: u32,
    /// Shift of the windows that it is told.
    pub(crate) shift: u8,
    /// MSS of that SYN-ACK.
    pub(crate) mss: u16,
    /// Highest up position acknowledged to it.
    pub(crate) acked: u64,
    /// Furthest right edge of the window.
    pub(crate) edge: u64,
    /// Last TSval.
    pub(crate) tsval: u32,
}

impl Told {
    /// What the SYN-ACK told a client that scales windows or does not.
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

/// Least segment size (RFC 9293 §3.7.1) that is believed: one that names less would multiply packets.
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
    /// Where RVMs, ahead of the OVM, went on unasked and after a pause: first and last of those positions.
    paused: (u64, u64),
    last_heard: Instant,
    /// Since when the client owes an ACK of what it was sent up to a position (a client that
    /// acknowledges byte by byte still owes the rest); and whether that is too
    /// long for servers to share the wait.
    client_owes: Option<(Instant, u64)>,
    is_client_silent: bool,
    probes: u8,
    /// When it is registered to be looked at.
    pub(crate) deadline: Option<Instant>,
    /// An RVM keeps client or OVM from going on, or did and has not made up for that.
    is_slowed: bool,
    /// It is in the service's list of work.
    pub(crate) queued: bool,
    /// The data plane passes it by itself, since it was stopped that often.
    passing: Option<u32>,
    /// How far the data plane lets both sides go on, up and down, while it passes the conversation.
    bounds: (u64, u64),
    /// Right edges of the windows that client and OVM were last told.
    shown: (u64, u64),
    /// It is in the service's list of conversations that the data plane may pass.
    pub(crate) is_passable_queued: bool,
    /// Its share of the service's retained bytes.
    retained: u64,
    /// What of that is beyond gaps, of client and OVM.
    beyond: u64,
}

impl Conversation {
    /// A conversation as its handshake leaves it, without legs.
    pub(crate) fn opened(
        (id, key): (ConversationId, Key),
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

    /// Something is in flight anywhere: bytes that somebody has not acknowledged or produced.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_open() && !self.is_settled()
    }

    /// Everybody has said and followed everything.
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

    /// The OVM speaks with the client itself.
    pub(crate) fn is_through(&self, turn: &Turn<'_>) -> bool {
        turn.ovm().and_then(|(slot, server)| self.legs.get(slot, server)).is_some_and(|leg| leg.through)
    }

    /// For the record: the server has answered up to `position`, or never will comparably.
    pub(crate) fn has_produced(&self, slot: Slot, server: ServerId, position: u64) -> bool {
        self.legs.get(slot, server).is_none_or(|leg| {
            leg.through || !leg.covers() || leg.gone.is_some() || leg.said.answers.end() >= position
        })
    }

    /// A segment to the client with nothing in it but the present acknowledgment, window and time.
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

    /// Sends a segment to the client, split as it needs.
    pub(crate) fn send_to_client(&mut self, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        turn.note_sent_to_client(segment.payload);
        let link = self.link;
        let to = Destination::Client(link);
        segment.emit_large(self.client.mss, |packet, size| turn.send(to, packet, size));
    }

    /// A TSval for the client: never earlier than the last one.
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

    /// Gives the server a leg, or says why it has none.
    pub(crate) fn add_leg(&mut self, slot: Slot, leg: Leg, turn: &mut Turn<'_>) {
        if turn.guest(slot, self.key.psc).is_none() {
            self.legs.set_absent(slot, Uncovered::OptionsDiffer);
            turn.mark_stale(slot, StaleReason::UncoveredConversation);
            return;
        }
        self.legs.put(slot, Box::new(leg));
    }

    /// The server does not cover the conversation any more, so its state may differ from now on.
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

    /// A leg as it begins: handshake with `server` complete as the client saw it.
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
            // The SYN is acknowledged: what the daemon itself may have to send begins behind it.
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

    /// SACK blocks for an ACK of the daemon's own: without them a sender that was permitted SACK takes
    /// its duplicates for nothing, and each loss costs a retransmission timeout.
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

/// Text behind a FIN is ignored (RFC 9293 §3.10.7.4); some keepalives carry a byte in the FIN's place.
pub(crate) fn text_before(fin: Option<u64>, start: u64, text: &[u8]) -> &[u8] {
    let room = fin.map_or(u64::MAX, |fin| fin.saturating_sub(start));
    &text[..text.len().min(usize::try_from(room).unwrap_or(usize::MAX))]
}
