//! Operators' commands (`POST /v1/services/{s}/…`), hooks' notices (`POST /v1/notify`), their answers and refusals.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use understudy_protocol::ServerId;

use crate::Domain;

/// How long open conversations get to end by themselves, if an attach with a drain gives no time.
pub const DEFAULT_DRAIN_TIMEOUT_MS: u64 = 30_000;

/// The longest drain: new clients wait meanwhile.
pub const MAX_DRAIN_TIMEOUT_MS: u64 = 3_600_000;

/// How long clients may be held while a state is copied, if an attach with a copy gives no time.
pub const DEFAULT_COPY_LIMIT_MS: u64 = 600_000;

/// The longest copy: clients wait meanwhile.
pub const MAX_COPY_LIMIT_MS: u64 = 3_600_000;

/// A command of an operator to a service, by its verb. As JSON it is the body of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Command {
    /// Puts a domain into the queue, or seeds one that is in it. Answered by [`Attached`].
    Attach(Attach),
    /// Takes an RVM out of the queue, and leaves it out until it is attached again. Answered by [`Done`].
    Detach(OnDomain),
    /// A planned promotion; the old OVM stays as an RVM. Answered by [`Promoted`].
    Switchover(Switchover),
    /// An unplanned promotion; the old OVM is fenced. Answered by [`Promoted`].
    Failover(Failover),
    /// Announces maintenance of a domain and pauses it; causes no failover within the service's limit. Answered by
    /// [`Done`] once the hypervisor says that the domain is paused.
    Pause(OnDomain),
    /// Lets a paused domain run again and ends its announced maintenance. Answered by [`Done`] once the hypervisor says
    /// that the domain runs.
    Resume(OnDomain),
}

impl Command {
    /// The command with this verb and this body; `None` if there is no such verb.
    pub fn parse(verb: &str, body: &[u8]) -> Option<serde_json::Result<Self>> {
        Some(match verb {
            "attach" => serde_json::from_slice(body).map(Self::Attach),
            "detach" => serde_json::from_slice(body).map(Self::Detach),
            "switchover" => serde_json::from_slice(body).map(Self::Switchover),
            "failover" => serde_json::from_slice(body).map(Self::Failover),
            "pause" => serde_json::from_slice(body).map(Self::Pause),
            "resume" => serde_json::from_slice(body).map(Self::Resume),
            _ => return None,
        })
    }

    /// The last part of its path.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Attach(_) => "attach",
            Self::Detach(_) => "detach",
            Self::Switchover(_) => "switchover",
            Self::Failover(_) => "failover",
            Self::Pause(_) => "pause",
            Self::Resume(_) => "resume",
        }
    }
}

/// The answer to a [`Command`] that was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// See there.
    Attached(Attached),
    /// See there.
    Done(Done),
    /// See there.
    Promoted(Promoted),
}

/// Body of `…/attach`. Exactly one of `assume_identical`, `drain` and `copied` must be there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The domain's name or UUID.
    pub domain: String,
    /// The operator states that its state equals the OVM's now.
    #[serde(default)]
    pub assume_identical: bool,
    /// The operator states that its state equals the OVM's once the open conversations have ended. New
    /// conversations are held until then.
    #[serde(default)]
    pub drain: bool,
    /// How long the drain waits, in milliseconds; [`DEFAULT_DRAIN_TIMEOUT_MS`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_timeout_ms: Option<u64>,
    /// Its state was made equal to the OVM's during this hold ([`Holding`]), which ends now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied: Option<u64>,
}

/// Body of `…/hold`: clients are held as long as the answer is read, while the OVM's state is copied to a domain.
///
/// The answer is a stream of [`Holding`], one per line, at least each second. Closing the connection lets the clients in
/// again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// The domain's name or UUID.
    pub domain: String,
    /// How long open conversations get to end, in milliseconds; [`DEFAULT_DRAIN_TIMEOUT_MS`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_timeout_ms: Option<u64>,
    /// How long clients are held for the copy, in milliseconds; [`DEFAULT_COPY_LIMIT_MS`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_ms: Option<u64>,
}

/// One line of a hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// Its number, for [`Attach::copied`].
    pub hold: u64,
    /// The OVM, whose state is to be copied.
    pub from: CopyEnd,
    /// The domain that it is to be copied to.
    pub to: CopyEnd,
    /// Its state now.
    pub state: HoldState,
}

/// A domain that a state is copied from or to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyEnd {
    /// The domain.
    pub domain: Domain,
    /// Its own addresses, by which dom0 reaches it.
    pub addresses: Vec<IpAddr>,
}

/// The state of a hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum HoldState {
    /// Open conversations have yet to end; new ones are held.
    Draining {
        /// How many are open.
        open: u64,
    },
    /// No client reaches the OVM: copy now.
    Held,
    /// Clients are let in again. This is the last line.
    Over {
        /// Why.
        reason: String,
    },
}

/// Body of `…/detach`, `…/pause` and `…/resume`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnDomain {
    /// The domain's name or UUID.
    pub domain: String,
}

/// Body of `…/switchover`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Switchover {
    /// The next OVM; the best candidate if absent.
    #[serde(default)]
    pub to: Option<String>,
}

/// Body of `…/failover`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failover {
    /// The next OVM; the best candidate if absent.
    #[serde(default)]
    pub to: Option<String>,
    /// Promote a server that is not promotable, too: conversations that can't continue there are reset.
    #[serde(default)]
    pub force: bool,
}

/// Body of `/v1/notify`: a domain or a vif came, or is about to leave. It is only a hint to look at xenstore
/// at once: nothing that it names need exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notice {
    /// What happens.
    pub event: NoticeEvent,
    /// The vif's backend interface in dom0.
    #[serde(default)]
    pub vif: Option<String>,
    /// The domain's number.
    #[serde(default)]
    pub domid: Option<u16>,
    /// The domain's name.
    #[serde(default)]
    pub domain: Option<String>,
}

/// What a [`Notice`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoticeEvent {
    /// It came.
    Online,
    /// It is about to leave.
    Offline,
}

/// Answer to `/v1/notify`: dom0d will list the domains soon; the events tell what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noticed {}

/// Answer to `…/attach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The domain.
    pub domain: Domain,
    /// Its id in events and status from now on.
    pub server: ServerId,
    /// The drain is running; the event `seeded`, `drain_failed`, `detached` or `evicted` reports its end.
    pub draining: bool,
}

/// Answer to `…/detach`, `…/pause` and `…/resume`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The domain.
    pub domain: Domain,
}

/// Answer to `…/switchover` and `…/failover`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promoted {
    /// The new OVM.
    pub domain: Domain,
    /// Its id in events and status.
    pub server: ServerId,
    /// The service's new epoch.
    pub epoch: u64,
}

/// Body of every answer with a status of 400 or more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was refused, or failed.
    pub error: Refusal,
}

/// Why a request was not carried out. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// A stable name, for programs.
    pub code: String,
    /// What failed, on what, and what to do.
    pub message: String,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_a_command_is_sent_as_reads_back_by_its_verb() {
        let on = || OnDomain { domain: "redis-2".to_owned() };
        let attach = Attach { domain: "redis-2".to_owned(), drain: true, ..Attach::default() };
        for command in [
            Command::Attach(attach),
            Command::Detach(on()),
            Command::Switchover(Switchover { to: Some("redis-2".to_owned()) }),
            Command::Failover(Failover { to: None, force: true }),
            Command::Pause(on()),
            Command::Resume(on()),
        ] {
            let body = serde_json::to_vec(&command).unwrap();
            assert_eq!(Command::parse(command.verb(), &body).unwrap().unwrap(), command);
        }
        assert!(Command::parse("reboot", b"{}").is_none());
    }
}
