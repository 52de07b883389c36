//! Monotonic counters: what was dropped, refused or limited, by reason. Names are the control API's.

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
    /// Packets with IPv4 options or IPv6 extension headers: not forwarded, what they ask for can't be kept.
    ip_options,
    /// TCP options with impossible lengths.
    malformed_options,
    /// IP fragments: not forwarded, since their place in a stream is unknown.
    fragments,
    /// Segments with a wrong checksum.
    bad_checksum,
    /// Packets to the PSC that are not TCP, or to a port that is not replicated.
    not_replicated,
    /// Packets whose addresses are not the PSC's or the server's.
    wrong_address,
    /// Packets of servers that are not, or no longer, in the queue: the fence at work.
    fenced,
    /// Client segments while the service had no OVM.
    no_ovm,
    /// SYNs and segments with TCP-MD5 or TCP-AO: not forwarded, they can't be rewritten.
    authenticated,
    /// Client segments that a TCP would not accept: forwarded or answered, not recorded.
    unacceptable,
    /// Segments of clients that acknowledge what was never sent (RFC 5961 §5), and of the OVM that acknowledge what no
    /// client was ever told to send.
    bad_ack,
    /// Times that client or OVM had what could not be recorded: the conversation goes on without RVMs.
    passed_unrecorded,
    /// Times that the OVM acknowledged bytes that were never recorded: no RVM is promotable from then on.
    acknowledged_unrecorded,
    /// Client segments whose urgent pointer was cleared: servers would differ in what they read.
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
    /// Those that were refused instead, since an RVM would have missed them.
    unknown_refused,
    /// Client segments that contradict recorded ones: the first copy was passed on.
    contradictions,
    /// Bytes of the OVM that contradict what it sent before: the first copy was sent.
    ovm_contradictions,
    /// SYNs for the addresses of a conversation whose last bytes an RVM had yet to take: not forwarded,
    /// the client asks again.
    early_reuse,
    /// SYNs held during a drain.
    held_syns,
    /// SYNs dropped during a drain because too many were held.
    held_syns_dropped,
    /// Segments of clients dropped while nothing may change the OVM's state.
    held_segments,
    /// RVMs evicted.
    evictions,
    /// RVMs evicted, or clients slowed, for [`crate::Limits::lag_bytes`].
    lag_bytes,
    /// Times that client or OVM had come to the end of [`crate::Limits::ahead_bytes`] and was told to go on.
    ahead_bytes,
    /// RVMs evicted for [`crate::Limits::order_entries`].
    order_entries,
    /// Conversations in which an RVM diverged.
    divergences,
    /// OVMs that lost their seat for a fault, and have caught up as RVMs.
    recovered,
    /// Those that had not within [`crate::Timing::recover_limit`]: evicted and fenced.
    recover_limit,
    /// Promotions, planned ones included.
    promotions,
    /// Faults without a promotion because of [`crate::Limits::promotions`].
    promotions_limited,
    /// Conversations reset because they could not go on correctly.
    resets,
    /// Segments sent again to servers or clients.
    retransmissions,
    /// FIN and RST of the OVM that were held for an RVM to do the same.
    closes_held,
    /// FIN and RST of the OVM that no RVM shared.
    closes_unshared,
    /// Times that the OVM was asked for a sign of life before it would have been accused.
    questions,
    /// Accusations that came to nothing because it gave one.
    acquittals,
    /// ICMP errors passed to the OVM.
    icmp_errors,
    /// Events dropped because nobody polled them ([`crate::Limits::events`]).
    events,
    /// Times the caller did not call for [`crate::Timing::starvation`].
    starvations,
    /// Times that the engine, by a fault of its own, broke rule 1: a segment was taken for the OVM's that is another server's.
    broken_rule_1,
    /// Rule 2: the client was acknowledged bytes that nobody recorded, or bytes were forgotten that a server lacks.
    broken_rule_2,
    /// Rule 4: an RVM's segment made the engine speak to a client.
    broken_rule_4,
    /// Rule 5: a server was promoted unasked that was not equal to the OVM.
    broken_rule_5,
    /// Rule 6: the table holds more conversations than its limit.
    broken_rule_6,
    /// Rule 7: a conversation goes on with an OVM that diverged in it.
    broken_rule_7,
    /// Rule 11: the OVM was accused for silence, and nobody had asked it.
    broken_rule_11,
    /// Rule 12: a server was taken as equal to the OVM while conversations could change the OVM's state.
    broken_rule_12,
}
