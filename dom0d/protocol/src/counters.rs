//! Monotonic counters of what was dropped, refused or limited, by reason (rule 7). Their names are part of the control
//! API.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// See the module.
        #[derive(Clone, Debug, Default, Serialize, Deserialize)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: u64,)*
        }

        impl Counters {
            pub(crate) fn by_name(&self) -> BTreeMap<&'static str, u64> {
                BTreeMap::from([$((stringify!($name), self.$name),)*])
            }
        }
    };
}

counters! {
    /// Segments from clients to a replicated port.
    client_segments,
    /// Segments from the OVM that were passed on.
    ovm_segments,
    /// Segments from RVMs (suppressed).
    rvm_segments,
    /// Packets too short for their headers.
    malformed_truncated,
    /// Packets with impossible header fields, or a wrong checksum of the IP header.
    malformed_header,
    /// Packets with IPv4 options or IPv6 extension headers: not forwarded, because the daemon can't do what these ask
    /// for.
    ip_options,
    /// TCP options with impossible lengths.
    malformed_options,
    /// IP fragments: not forwarded, because their position in a stream is unknown.
    fragments,
    /// Segments with a wrong checksum.
    bad_checksum,
    /// Packets to the PSC that are not TCP, or to a port that is not replicated.
    not_replicated,
    /// Packets whose addresses are not the PSC's or the server's.
    wrong_address,
    /// Packets of servers that are not in the queue, or no longer: the fence at work (rule 1).
    fenced,
    /// Client segments while the service had no OVM.
    no_ovm,
    /// SYNs and segments with TCP-MD5 or TCP-AO: not forwarded, because they can't be rewritten.
    authenticated,
    /// Client segments that a TCP would not accept: forwarded or answered, not recorded.
    unacceptable,
    /// Segments of clients that acknowledge bytes that were never sent (RFC 5961 §5), and of the OVM that acknowledge
    /// bytes beyond any window that a client was offered.
    bad_ack,
    /// Times that client or OVM received bytes that could not be recorded: the conversation continues without RVMs.
    passed_unrecorded,
    /// Times that the OVM acknowledged bytes that were never recorded: from then on no RVM is promotable (rule 10).
    acknowledged_unrecorded,
    /// Client segments whose urgent pointer was cleared: otherwise servers would read different streams.
    urgent,
    /// Segments dropped for [`crate::Limits::conversation_bytes`].
    conversation_bytes,
    /// Segments dropped, and RVMs evicted, for [`crate::Limits::retained_bytes`].
    retained_bytes,
    /// Segments dropped for [`crate::Limits::out_of_order_bytes`].
    out_of_order_bytes,
    /// Handshakes forgotten, or not begun, for [`crate::Limits::embryonic`].
    embryonic,
    /// Conversations left unprotected for [`crate::Limits::conversations`].
    conversations,
    /// Segments of conversations that the daemon does not know, forwarded unprotected.
    unprotected_segments,
    /// Segments of conversations that the daemon does not know, refused because an RVM would have missed them.
    unknown_refused,
    /// Client segments that contradict recorded ones: the first copy was passed on.
    contradictions,
    /// Bytes of the OVM that contradict what it sent before: the first copy was sent.
    ovm_contradictions,
    /// SYNs for the addresses of a conversation whose last bytes an RVM had not acknowledged yet: not forwarded, the
    /// client retransmits them.
    early_reuse,
    /// SYNs held during a drain.
    held_syns,
    /// SYNs dropped during a drain because too many were held.
    held_syns_dropped,
    /// Segments of clients dropped while clients are held, so that nothing changes the OVM's state.
    held_segments,
    /// RVMs evicted.
    evictions,
    /// RVMs evicted, or clients slowed, for [`crate::Limits::lag_bytes`].
    lag_bytes,
    /// Window updates to a client or OVM that had stopped at [`crate::Limits::ahead_bytes`].
    ahead_bytes,
    /// RVMs evicted for [`crate::Limits::order_entries`].
    order_entries,
    /// Conversations in which an RVM diverged.
    divergences,
    /// OVMs that were deposed for a fault, and have caught up as RVMs.
    recovered,
    /// OVMs that were deposed for a fault and did not catch up within [`crate::Timing::recover_limit`]: evicted and
    /// fenced.
    recover_limit,
    /// Promotions, planned ones included.
    promotions,
    /// Faults without a promotion because of [`crate::Limits::promotions`].
    promotions_limited,
    /// Conversations reset because they could not continue correctly (rule 7).
    resets,
    /// Segments that the daemon retransmitted to servers or clients.
    retransmissions,
    /// FIN and RST of the OVM that waited for an RVM to do the same.
    closes_held,
    /// FIN and RST of the OVM that no RVM shared.
    closes_unshared,
    /// Times that the daemon asked the OVM for a sign of life before it would have accused the OVM (rule 11).
    questions,
    /// Suspicions that were dropped because the OVM gave a sign of life.
    acquittals,
    /// ICMP errors passed to the OVM.
    icmp_errors,
    /// Events dropped because nobody polled them ([`crate::Limits::events`]).
    events,
    /// Times that a call to the engine was late by [`crate::Timing::starvation`] or more.
    starvations,
    /// Times that the engine, by a fault of its own, broke rule 1: it took another server's segment for the OVM's.
    broken_rule_1,
    /// Rule 2: the engine acknowledged to a client bytes that it had not recorded, or forgot bytes that a server lacks.
    broken_rule_2,
    /// Rule 4: an RVM's segment made the engine speak to a client.
    broken_rule_4,
    /// Rule 5: the engine promoted unasked a server that was not equal to the OVM.
    broken_rule_5,
    /// Rule 6: the table holds more conversations than its limit.
    broken_rule_6,
    /// Rule 7: a conversation continues with an OVM that diverged in it.
    broken_rule_7,
    /// Rule 11: the engine accused the OVM of silence without having asked it.
    broken_rule_11,
    /// Rule 12: the engine took a server as equal to the OVM while conversations could change the OVM's state.
    broken_rule_12,
}
