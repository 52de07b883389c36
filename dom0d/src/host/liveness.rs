//! Decides whether a server's domain is at fault: evidence (a) and (b), from what the hypervisor says at each poll. The
//! engine finds the other kinds of evidence.
//!
//! Pure: a [`Watch`] sees one domain's states in order and says what to tell the engine.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_protocol::{Evidence, Instant};

use super::{DomainState, Shutdown};

/// What an operator decided about pauses of a service's domains.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PausePolicy {
    /// How long a pause that nobody announced is excused.
    pub(crate) grace: Duration,
    /// How long an announced pause, a save or a migration is excused.
    pub(crate) maintenance_limit: Duration,
}

/// What excuses a domain for not running.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Excuse {
    /// An operator announced maintenance at that moment.
    pub(crate) announced: Option<Instant>,
    /// The toolstack has sent it away: its name ends in `--migratedaway`.
    pub(crate) migrating: bool,
    /// It has moved to another domid and is not back on the network: whatever it does there, it can't serve.
    pub(crate) moving: bool,
    /// This daemon paused it to fence it.
    pub(crate) fenced: bool,
    /// Not an excuse: the domain serves another service too, which found this evidence and has it stopped.
    pub(crate) doomed: Option<Evidence>,
}

/// What the engine must be told after one look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Whether the domain runs, if that changed since the last look.
    pub(crate) running: Option<bool>,
    /// It is at fault.
    pub(crate) evidence: Option<Evidence>,
}

/// First wait before a fault that persists is reported again: a replica may be promotable by then.
const REPEAT_FIRST: Duration = Duration::from_secs(1);

/// Longest wait before a fault that persists is reported again.
const REPEAT_MOST: Duration = Duration::from_secs(60);

/// How long a domain that vanished while it was suspended may take to appear under another domid of this host, or its old
/// one.
const MOVES: Duration = Duration::from_secs(1);

/// One domain, watched over one life of it, or over several if it moves.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Watch {
    /// A domain that was never seen running is being built, or was paused before we came.
    seen_running: bool,
    running: Option<bool>,
    stopped_since: Option<Instant>,
    /// It was suspended when it was last listed.
    suspended: bool,
    gone_since: Option<Instant>,
    reported: Option<(Instant, Duration)>,
}

impl Watch {
    /// Looks at the domain's state; `None` if the hypervisor has no such domain. `starved` says that
    /// this process was not run for so long that waits must be measured anew.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        state: Option<&DomainState>,
        excuse: Excuse,
        policy: PausePolicy,
        starved: bool,
    ) -> Verdict {
        let fault = self.fault(now, state, excuse, policy, starved);
        let running = !excuse.moving && state.is_some_and(is_running);
        let mut verdict = Verdict::default();
        if self.running != Some(running) {
            self.running = Some(running);
            verdict.running = Some(running);
        }
        match fault {
            None => self.reported = None,
            Some(evidence) => {
                let wait = match self.reported {
                    None => Some(REPEAT_FIRST),
                    Some((at, wait)) if now.since(at) >= wait => Some((wait * 2).min(REPEAT_MOST)),
                    Some(_) => None,
                };
                if let Some(wait) = wait {
                    self.reported = Some((now, wait));
                    verdict.evidence = Some(evidence);
                }
            }
        }
        verdict
    }

    fn fault(
        &mut self,
        now: Instant,
        state: Option<&DomainState>,
        excuse: Excuse,
        policy: PausePolicy,
        starved: bool,
    ) -> Option<Evidence> {
        let alive = state.filter(|state| !state.dying && state.shutdown != Some(Shutdown::Final));
        if alive.is_some_and(is_running) && !excuse.moving {
            self.seen_running = true;
            self.stopped_since = None;
            self.suspended = false;
            self.gone_since = None;
            return None;
        }
        let Some(state) = alive else {
            let since = match self.gone_since {
                Some(since) if !starved => since,
                _ => *self.gone_since.insert(now),
            };
            let may_move = (self.suspended || excuse.moving) && now.since(since) < MOVES;
            return (!may_move).then_some(Evidence::DomainGone);
        };
        self.suspended = state.shutdown == Some(Shutdown::Suspend);
        self.gone_since = None;
        // A starved host stalls every domain: what the daemon can't have seen is nobody's fault.
        let since = match self.stopped_since {
            Some(since) if !starved => since,
            _ => *self.stopped_since.insert(now),
        };
        if excuse.fenced {
            return None;
        }
        if excuse.doomed.is_some() {
            return excuse.doomed;
        }
        if !self.seen_running {
            return None;
        }
        let (since, limit) = match excuse.announced {
            Some(announced) => (announced, policy.maintenance_limit),
            None if excuse.migrating || excuse.moving || self.suspended => (since, policy.maintenance_limit),
            None => (since, policy.grace),
        };
        (now.since(since) >= limit).then_some(Evidence::DomainPaused)
    }
}

fn is_running(state: &DomainState) -> bool {
    !state.paused && !state.dying && state.shutdown.is_none()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const POLICY: PausePolicy =
        PausePolicy { grace: Duration::ZERO, maintenance_limit: Duration::from_secs(30) };

    const RUNNING: DomainState =
        DomainState { domid: 1, uuid: Uuid::nil(), paused: false, dying: false, shutdown: None };

    fn paused() -> DomainState {
        DomainState { paused: true, ..RUNNING }
    }

    fn shut_down(code: Shutdown) -> DomainState {
        DomainState { shutdown: Some(code), ..RUNNING }
    }

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    /// Looks once a millisecond, and gives when and what evidence came first.
    fn first_evidence(
        watch: &mut Watch,
        state: Option<&DomainState>,
        excuse: Excuse,
        policy: PausePolicy,
        from_ms: u64,
        for_ms: u64,
    ) -> Option<(u64, Evidence)> {
        (from_ms..from_ms + for_ms).find_map(|ms| {
            let verdict = watch.look(at(ms), state, excuse, policy, false);
            verdict.evidence.map(|evidence| (ms - from_ms, evidence))
        })
    }

    fn seen_running() -> Watch {
        let mut watch = Watch::default();
        let verdict = watch.look(at(0), Some(&RUNNING), Excuse::default(), POLICY, false);
        assert_eq!(verdict.running, Some(true));
        assert_eq!(verdict.evidence, None);
        watch
    }

    #[test]
    fn an_unannounced_pause_is_evidence_at_the_first_look() {
        let mut watch = seen_running();
        let verdict = watch.look(at(1), Some(&paused()), Excuse::default(), POLICY, false);
        assert_eq!(verdict.running, Some(false));
        assert_eq!(verdict.evidence, Some(Evidence::DomainPaused));
    }

    #[test]
    fn a_grace_delays_the_evidence_by_just_that() {
        let policy = PausePolicy { grace: Duration::from_millis(20), ..POLICY };
        let found = first_evidence(&mut seen_running(), Some(&paused()), Excuse::default(), policy, 1, 100);
        assert_eq!(found, Some((20, Evidence::DomainPaused)));
    }

    #[test]
    fn a_short_pause_within_the_grace_is_forgotten() {
        let policy = PausePolicy { grace: Duration::from_millis(20), ..POLICY };
        let mut watch = seen_running();
        let excuse = Excuse::default();
        for start in [1, 100, 200] {
            assert_eq!(first_evidence(&mut watch, Some(&paused()), excuse, policy, start, 15), None);
            let verdict = watch.look(at(start + 15), Some(&RUNNING), excuse, policy, false);
            assert_eq!(verdict.running, Some(true));
        }
    }

    #[test]
    fn a_starved_daemon_measures_the_grace_anew() {
        let policy = PausePolicy { grace: Duration::from_millis(20), ..POLICY };
        let mut watch = seen_running();
        let excuse = Excuse::default();
        watch.look(at(1), Some(&paused()), excuse, policy, false);
        let verdict = watch.look(at(500), Some(&paused()), excuse, policy, true);
        assert_eq!(verdict.evidence, None);
        let found = first_evidence(&mut watch, Some(&paused()), excuse, policy, 501, 100);
        assert_eq!(found, Some((19, Evidence::DomainPaused)));
    }

    #[test]
    fn a_domain_never_seen_running_is_not_accused_of_its_pause() {
        let mut watch = Watch::default();
        let excuse = Excuse::default();
        assert_eq!(first_evidence(&mut watch, Some(&paused()), excuse, POLICY, 0, 1_000), None);
        watch.look(at(1_000), Some(&RUNNING), excuse, POLICY, false);
        let verdict = watch.look(at(1_001), Some(&paused()), excuse, POLICY, false);
        assert_eq!(verdict.evidence, Some(Evidence::DomainPaused));
    }

    #[test]
    fn an_announced_pause_is_excused_until_its_limit() {
        let excuse = Excuse { announced: Some(at(0)), ..Excuse::default() };
        let found = first_evidence(&mut seen_running(), Some(&paused()), excuse, POLICY, 1, 40_000);
        assert_eq!(found, Some((29_999, Evidence::DomainPaused)));
    }

    #[test]
    fn a_save_and_a_migration_are_excused_until_the_limit() {
        let found = first_evidence(
            &mut seen_running(),
            Some(&shut_down(Shutdown::Suspend)),
            Excuse::default(),
            POLICY,
            1,
            40_000,
        );
        assert_eq!(found, Some((30_000, Evidence::DomainPaused)));
        let migrating = Excuse { migrating: true, ..Excuse::default() };
        let found = first_evidence(&mut seen_running(), Some(&paused()), migrating, POLICY, 1, 40_000);
        assert_eq!(found, Some((30_000, Evidence::DomainPaused)));
    }

    #[test]
    fn a_domain_that_is_gone_dying_or_down_is_evidence_whatever_was_announced() {
        let dying = DomainState { dying: true, ..RUNNING };
        let down = shut_down(Shutdown::Final);
        let excuse = Excuse { announced: Some(at(0)), migrating: true, ..Excuse::default() };
        for state in [None, Some(&dying), Some(&down)] {
            let mut watch = seen_running();
            let verdict = watch.look(at(1), state, excuse, POLICY, false);
            assert_eq!(verdict.evidence, Some(Evidence::DomainGone));
            assert_eq!(verdict.running, Some(false));
        }
    }

    #[test]
    fn a_domain_that_went_while_it_was_suspended_has_a_second_to_appear_elsewhere() {
        let mut watch = seen_running();
        let suspended = shut_down(Shutdown::Suspend);
        let excuse = Excuse { migrating: true, ..Excuse::default() };
        assert_eq!(first_evidence(&mut watch, Some(&suspended), excuse, POLICY, 1, 100), None);
        let dying = DomainState { dying: true, ..suspended };
        assert_eq!(first_evidence(&mut watch, Some(&dying), excuse, POLICY, 101, 500), None);
        let mut moved = watch.clone();
        let found = first_evidence(&mut watch, None, excuse, POLICY, 601, 2_000);
        assert_eq!(found, Some((500, Evidence::DomainGone)));
        // Created paused, unpaused, connected, destroyed.
        let excuse = Excuse { moving: true, ..Excuse::default() };
        assert_eq!(first_evidence(&mut moved, Some(&paused()), excuse, POLICY, 601, 100), None);
        assert_eq!(first_evidence(&mut moved, Some(&RUNNING), excuse, POLICY, 701, 100), None);
        let verdict = moved.look(at(801), Some(&RUNNING), Excuse::default(), POLICY, false);
        assert_eq!(verdict, Verdict { running: Some(true), evidence: None });
        let verdict = moved.look(at(802), None, Excuse::default(), POLICY, false);
        assert_eq!(verdict.evidence, Some(Evidence::DomainGone));
    }

    #[test]
    fn a_moved_domain_that_never_returns_to_the_network_is_found_at_the_limit() {
        let excuse = Excuse { moving: true, ..Excuse::default() };
        let found = first_evidence(&mut seen_running(), Some(&RUNNING), excuse, POLICY, 1, 40_000);
        assert_eq!(found, Some((30_000, Evidence::DomainPaused)));
    }

    #[test]
    fn a_fence_is_no_evidence_against_the_fenced() {
        let excuse = Excuse { fenced: true, ..Excuse::default() };
        assert_eq!(first_evidence(&mut seen_running(), Some(&paused()), excuse, POLICY, 1, 1_000), None);
    }

    #[test]
    fn a_fence_for_another_service_is_what_that_one_found_and_no_pause() {
        let mut watch = seen_running();
        let excuse = Excuse { doomed: Some(Evidence::NoProgress), ..Excuse::default() };
        assert_eq!(watch.look(at(1), Some(&RUNNING), excuse, POLICY, false).evidence, None);
        let reports: Vec<_> = (2..5_000)
            .filter_map(|ms| watch.look(at(ms), Some(&paused()), excuse, POLICY, false).evidence)
            .collect();
        assert_eq!(reports, [Evidence::NoProgress; 3]);
        let gone = watch.look(at(10_000), None, excuse, POLICY, false);
        assert_eq!(gone.evidence, Some(Evidence::DomainGone));
    }

    #[test]
    fn a_persisting_fault_is_reported_again_ever_more_rarely() {
        let mut watch = seen_running();
        let excuse = Excuse::default();
        let reports: Vec<u64> = (0..20_000)
            .filter(|&ms| {
                let state = paused();
                let verdict = watch.look(at(ms), Some(&state), excuse, POLICY, false);
                verdict.evidence.is_some()
            })
            .collect();
        assert_eq!(reports, [0, 1_000, 3_000, 7_000, 15_000]);
    }
}
