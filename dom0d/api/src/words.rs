//! Puts the protocol engine's reasons into words that tell an operator what happened and what to do.

use understudy_protocol::{Evidence, NotPromotable, StaleReason, Uncovered};

/// Why a server can't be promoted unasked, and what to do about it.
pub fn not_promotable(reason: NotPromotable) -> String {
    match reason {
        NotPromotable::IsOvm => "it is the OVM".to_owned(),
        NotPromotable::Stale(reason) => format!(
            "stale: {}; seed it: bring its state in line with the OVM's, then `understudy attach`",
            stale(reason)
        ),
        NotPromotable::Lagging => {
            "lagging: it is behind the OVM; promotable again once it has caught up"
                .to_owned()
        }
        NotPromotable::Recovering => {
            "recovering: it lost its seat as the OVM; promotable again once it has caught up, and fenced if it does not in time"
                .to_owned()
        }
        NotPromotable::PromotionLimit => {
            "too many unplanned promotions in a short time; find out what kills the servers, then `understudy failover`"
                .to_owned()
        }
        NotPromotable::NotRunning => {
            "its domain does not run; start it, or `understudy resume` it if it is paused".to_owned()
        }
        NotPromotable::OwnConnections => {
            "it tried to open connections of its own, which are dropped (`understudy events` says to where), so its state may differ from the OVM's; let them pass (allow = [\"tcp/PORT\"]) or state that they do no harm (own_connections = \"tolerate\"), then detach it, bring its state in line and attach it"
                .to_owned()
        }
    }
}

/// Why an RVM's state may differ from the OVM's.
pub fn stale(reason: StaleReason) -> &'static str {
    match reason {
        StaleReason::NotSeeded => "nobody has stated that its state equals the OVM's",
        StaleReason::MissedBytes => "it missed bytes that the OVM received",
        StaleReason::TookMore => "it received a request that the OVM answered with a reset",
        StaleReason::UncoveredConversation => {
            "the OVM serves a conversation that could not be replicated to it"
        }
        StaleReason::Deposed => "it was the OVM, was deposed for a fault, and did not catch up in time",
        StaleReason::Lagged => "it fell too far behind and was evicted",
    }
}

/// Why a conversation is uncovered by an RVM, or unprotected.
pub fn uncovered(reason: Uncovered) -> &'static str {
    match reason {
        Uncovered::MidStream => "its SYN was not seen",
        Uncovered::TableFull => "the conversation table was full",
        Uncovered::AttachedLater => "the RVM was attached after it began",
        Uncovered::OptionsDiffer => "the RVM's SYN-ACK lacks options that the client relies on",
        Uncovered::RvmReset => "the RVM refused or reset it",
        Uncovered::RvmLagged => "the RVM did not answer, or fell behind a limit",
        Uncovered::Authenticated => "TCP-MD5 or TCP-AO: its segments can't be rewritten",
        Uncovered::Unrecorded => "the kernel passed bytes that found no room to be recorded",
    }
}

/// Why the OVM is believed to be at fault.
pub fn evidence(evidence: Evidence) -> &'static str {
    match evidence {
        Evidence::DomainGone => "its domain is gone or shut down",
        Evidence::DomainPaused => "its domain is paused and nobody announced it",
        Evidence::UnacknowledgedSegment => {
            "it leaves a client's segment unacknowledged that an RVM acknowledged"
        }
        Evidence::NoProgress => "it does not begin an answer that the RVMs agree on",
        Evidence::UnsharedClose => "it closes conversations that the RVMs keep open",
        Evidence::Operator => "an operator asked for it",
    }
}
