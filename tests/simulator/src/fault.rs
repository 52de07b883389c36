//! Faults and operators' actions, and when they strike.

use understudy_protocol::CandidatePolicy;

use crate::forge::Twist;

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// At this time.
    At(u64),
    /// When dom0 has seen this many packets.
    Packets(u64),
    /// At this time after the promotion with this number, counted from 1.
    AfterPromotion(u64, u64),
}

/// Which server; resolved when the fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Who serves at that moment.
    Ovm,
    /// The n-th other server in the queue, counted from 0, modulo their number.
    Rvm(usize),
    /// The one deposed last.
    Deposed,
}

/// One fault, or one action of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Paused by nobody: visible to the daemon.
    Freeze(Target),
    /// Runs again.
    Thaw(Target),
    /// The domain is gone.
    Crash(Target),
    /// The service's process is stuck; its kernel acknowledges.
    Hang(Target),
    /// Nothing comes out of the domain, but the toolstack says that it runs.
    Spin(Target),
    /// The service's process dies; its connections are reset, or closed if `orderly`.
    Kill { target: Target, orderly: bool },
    /// The service takes this much longer for everything.
    Slow { target: Target, us: u64 },
    /// The next answer has a wrong byte.
    WrongAnswer(Target),
    /// This many random packets come out of the vif.
    Garbage { target: Target, packets: u32 },
    /// This many mutated segments of its own conversations come out of the vif.
    Mutated { target: Target, packets: u32 },
    /// This many segments of its own conversations, twisted in this way, come out of the vif.
    Twisted { target: Target, twist: Twist, packets: u32 },
    /// Resets at the exact sequence number of its conversations.
    ResetAll(Target),
    /// Nothing passes between dom0 and the server, both ways.
    CutServer { target: Target, us: u64 },
    /// Nothing passes between the client and dom0, both ways.
    CutClient { client: usize, us: u64 },
    /// dom0 gets no CPU: all its inputs wait.
    StarveDom0 { us: u64 },
    /// A switchover.
    Switchover,
    /// An operator's failover.
    Failover { force: bool },
    /// An RVM leaves the queue.
    Detach(Target),
    /// A fresh domain joins, its state copied at the moment it counts as identical.
    Attach(Join),
}

/// What the operator says when attaching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Join {
    Unseeded,
    AssumeIdentical,
    Drain { deadline_us: u64 },
}

/// A fault with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheduled {
    pub(crate) when: When,
    pub(crate) fault: Fault,
}

/// Whether the run's policy looks at the progress of candidates.
pub(crate) fn policy_name(policy: CandidatePolicy) -> &'static str {
    match policy {
        CandidatePolicy::Progress => "policy.progress",
        CandidatePolicy::Queue => "policy.queue",
    }
}
