//! The thread that keeps the newest rules in force, and counts what they dropped.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use understudy_bpf::Holds;

use super::table::{FAMILY_NUMBER, TABLE, run, transactions};
use super::watch::RulesetWatch;
use super::{Refusal, Refused, RuleSet};

/// A set of rules with the number that its sender knows it by.
#[derive(Clone, Debug)]
pub(crate) struct Numbered {
    /// Grows with each set.
    pub(crate) version: u64,
    /// The rules.
    pub(crate) rules: RuleSet,
}

/// How long a failed attempt to write the table waits for the next.
const RETRY: Duration = Duration::from_secs(1);

/// How often it is looked whether somebody else changed the table.
const LOOK: Duration = Duration::from_millis(100);

/// How often rules are written anew at most because somebody else writes others meanwhile; if more is to be done, it is seen
/// at the next look.
const ATTEMPTS: usize = 3;

/// How often what was counted is told.
const COUNT: Duration = Duration::from_secs(1);

/// What the writer tells.
#[derive(Debug)]
pub(crate) enum RulesNews {
    /// What became of the rules of this version.
    Applied(u64, Result<(), String>),
    /// Somebody else changed them; they are in force again, or not.
    Restored(Result<(), String>),
    /// What was dropped so far.
    Counted(Refused),
}

/// Starts a thread that puts the newest rules in force and back when somebody else changes them, and tells. It ends when
/// the sender is dropped.
pub(crate) fn spawn_writer(
    holds: Option<Holds>,
    tell: impl Fn(RulesNews) + Send + 'static,
) -> io::Result<(mpsc::Sender<Numbered>, JoinHandle<()>)> {
    let watch = RulesetWatch::open(FAMILY_NUMBER, TABLE).inspect_err(|error| {
        tracing::error!(%error, "should somebody else change the kernel's rules, dom0d would not notice");
    });
    let watch = watch.ok();
    let (sender, receiver) = mpsc::channel::<Numbered>();
    let writer = Writer {
        watch,
        holds,
        dropped: BTreeMap::new(),
        newest: None,
        is_due: None,
        read: BTreeMap::new(),
        refused: Refused::new(),
        told: (Instant::now(), Refused::new()),
    };
    let thread = std::thread::Builder::new();
    let thread = thread.name("rules".to_owned()).spawn(move || writer.run(&receiver, tell))?;
    Ok((sender, thread))
}

struct Writer {
    /// Without it, changes by others go unnoticed, and nothing is counted.
    watch: Option<RulesetWatch>,
    /// Without it, the table alone contains domains.
    holds: Option<Holds>,
    /// What that had dropped when last read, by the number of the interface.
    dropped: BTreeMap<u32, u64>,
    newest: Option<Numbered>,
    /// When the newest rules are to be written again, since they could not be.
    is_due: Option<Instant>,
    /// What the table's counters were when last read.
    read: BTreeMap<String, u64>,
    /// What was counted by this table and those before.
    refused: Refused,
    /// When that was told last, and what.
    told: (Instant, Refused),
}

impl Writer {
    fn run(mut self, receiver: &mpsc::Receiver<Numbered>, tell: impl Fn(RulesNews)) {
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(first) => {
                    self.newest = Some(receiver.try_iter().last().unwrap_or(first));
                    self.write(&tell);
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) if self.is_due.is_some_and(|due| due <= Instant::now()) => {
                    self.write(&tell);
                }
                // What could not be written is tried again in its time.
                Err(RecvTimeoutError::Timeout) if self.is_due.is_none() && self.newest.is_some() => {
                    if self.watch.as_mut().is_some_and(RulesetWatch::is_touched) {
                        tell(RulesNews::Restored(self.put_in_force()));
                    }
                    if self.told.0.elapsed() >= COUNT {
                        self.count();
                        if self.refused != self.told.1 {
                            tell(RulesNews::Counted(self.refused.clone()));
                        }
                        self.told = (Instant::now(), self.refused.clone());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn write(&mut self, tell: &impl Fn(RulesNews)) {
        if let Some(version) = self.newest.as_ref().map(|newest| newest.version) {
            tell(RulesNews::Applied(version, self.put_in_force()));
        }
    }

    fn put_in_force(&mut self) -> Result<(), String> {
        let Some(transactions) = self.newest.as_ref().map(|newest| transactions(&newest.rules)) else {
            return Ok(());
        };
        let mut result = Ok(());
        self.count();
        if let (Some(holds), Some(newest)) = (&mut self.holds, &self.newest)
            && let Err(error) = holds.set(&newest.rules.holds())
        {
            tracing::error!(%error, "tc does not hold all domains that it should; nft does");
        }
        for _ in 0..ATTEMPTS {
            self.count();
            if let Some(watch) = &mut self.watch {
                watch.forget();
            }
            result = transactions.iter().try_for_each(run);
            // The new table's count from 0.
            self.read.clear();
            // What somebody else did meanwhile can't be told from this, but by there being more of it.
            let is_alone = match &mut self.watch {
                Some(watch) => watch.transactions() == transactions.len(),
                None => true,
            };
            if let Some(watch) = self.watch.as_mut().filter(|_| is_alone) {
                watch.forget();
            }
            if result.is_err() || is_alone {
                break;
            }
        }
        self.is_due = result.is_err().then(|| Instant::now() + RETRY);
        result
    }

    /// Adds up what was counted since it was last read.
    fn count(&mut self) {
        if let (Some(holds), Some(newest)) = (&self.holds, &self.newest) {
            let dropped = holds.dropped();
            for vif in newest.rules.vifs.values() {
                let Some((part, index)) = vif.parts.first().zip(vif.index) else { continue };
                let now = dropped.get(&index).copied().unwrap_or(0);
                let before = self.dropped.get(&index).copied().filter(|before| *before <= now).unwrap_or(0);
                *self.refused.entry((part.service, Refusal::Contained)).or_default() += now - before;
            }
            self.dropped = dropped;
        }
        let Some(watch) = &self.watch else { return };
        let counters = watch.counters();
        for (name, &now) in &counters {
            let before = self.read.get(name).copied().filter(|before| *before <= now).unwrap_or(0);
            if let Some(refusal) = Refusal::of_counter(name) {
                *self.refused.entry(refusal).or_default() += now - before;
            }
        }
        self.read = counters;
    }
}
