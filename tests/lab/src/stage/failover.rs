//! One failover as it was measured: the lab's fault, the daemon's events and the clients' receipts
//! on one clock.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::Stage;
use super::operator::{Events, Operator};
use crate::client::redis::load::Outcome;
use crate::host::{Fault, FaultInstant, Service};

/// How long a failover may take until the daemon reports its end; far more than any limit it has.
const END: Duration = Duration::from_secs(30);

/// Times of one failover, in microseconds of CLOCK_MONOTONIC.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Failover {
    pub(crate) fault: Fault,
    /// The evidence's name, as in dom0d's events.
    pub(crate) detected_by: String,
    pub(crate) fault_us: u64,
    pub(crate) suspected_us: u64,
    pub(crate) cut_over_us: u64,
    /// `None` if the deposed domain was gone already, or is recovering.
    pub(crate) fenced_us: Option<u64>,
    pub(crate) recuperated_us: u64,
    /// Open conversations at the cutover, those that go on, and those that were reset.
    pub(crate) conversations: u64,
    pub(crate) recuperated: u64,
    pub(crate) reset: u64,
    pub(crate) epoch: u64,
    /// The new OVM.
    pub(crate) to: String,
}

impl Failover {
    /// Collects the failover that followed `fault`, and waits for its end.
    pub(crate) fn observe(stage: &Stage, service: Service, fault: Fault, at: FaultInstant) -> Result<Self> {
        Self::collect(&stage.operator, &stage.events, service, fault, at)
    }

    /// [`Failover::observe`] wherever operator and events are.
    pub(crate) fn collect(
        operator: &Operator,
        events: &Events,
        service: Service,
        fault: Fault,
        at: FaultInstant,
    ) -> Result<Self> {
        Self::from_events(events, service, fault, at).with_context(|| {
            let counters = match operator.service(service.name()) {
                Ok(service) => service.counters,
                Err(_) => Default::default(),
            };
            let counted: Vec<_> = counters
                .iter()
                .filter(|(_, count)| **count > 0)
                .map(|(name, count)| format!("{name} {count}"))
                .collect();
            format!("no complete failover; dom0d has counted {}", counted.join(", "))
        })
    }

    fn from_events(events: &Events, service: Service, fault: Fault, at: FaultInstant) -> Result<Self> {
        let name = service.name();
        let fault_us = at.monotonic_ns / 1_000;
        let suspected = events.wait("suspected", name, fault_us, END)?;
        let cut = events.wait("cut_over", name, suspected.monotonic_us, END)?;
        let done = events.wait("recuperated", name, cut.monotonic_us, END)?;
        let fenced = match fault {
            Fault::Crash | Fault::Destroy | Fault::Poweroff => {
                events.since("fenced", name, suspected.monotonic_us).first().cloned()
            }
            // Its domain lives, so it only loses its seat at first.
            Fault::Hang | Fault::Spin => {
                events.wait("recovering", name, suspected.monotonic_us, END)?;
                None
            }
            _ => Some(events.wait("fenced", name, suspected.monotonic_us, END)?),
        };
        let number = |event: &understudy_api::Event, field: &str| {
            event.number(field).with_context(|| format!("event {} has no {field}", event.kind()))
        };
        Ok(Self {
            fault,
            detected_by: suspected.text("evidence").context("no evidence in the event")?.to_owned(),
            fault_us,
            suspected_us: suspected.monotonic_us,
            cut_over_us: cut.monotonic_us,
            fenced_us: fenced.map(|event| event.monotonic_us),
            recuperated_us: done.monotonic_us,
            conversations: number(&cut, "conversations")?,
            recuperated: number(&done, "recuperated")?,
            reset: number(&done, "reset")?,
            epoch: number(&cut, "epoch")?,
            to: cut.domain("to").context("no `to` in the event")?,
        })
    }

    /// When a client with a request outstanding first read something of the new OVM's: what it read
    /// between the fault and the cutover was under way before.
    pub(crate) fn first_byte_us(&self, outcome: &Outcome) -> Option<u64> {
        outcome.first_receipt(self.cut_over_us * 1_000).map(|receipt| receipt.at_ns / 1_000)
    }

    /// The evidence must be one that this fault can give.
    pub(crate) fn expect_plausible(&self) -> Result<()> {
        let possible: &[&str] = match self.fault {
            Fault::Freeze => &["domain_paused"],
            // libxl pauses what it is about to destroy.
            Fault::Destroy => &["domain_gone", "domain_paused"],
            Fault::Crash | Fault::Poweroff | Fault::Reboot => &["domain_gone"],
            Fault::Hang => &["no_progress", "unacknowledged_segment"],
            Fault::Spin => &["no_progress", "unacknowledged_segment"],
            Fault::Kill => &["unshared_close"],
        };
        ensure!(
            possible.contains(&self.detected_by.as_str()),
            "{:?} was detected by {}, expected one of {possible:?}",
            self.fault,
            self.detected_by
        );
        self.expect_whole()
    }

    /// Every conversation must have gone on.
    pub(crate) fn expect_whole(&self) -> Result<()> {
        ensure!(self.reset == 0, "{} of {} conversations were reset", self.reset, self.conversations);
        ensure!(
            self.recuperated == self.conversations,
            "{} conversations were open at the cutover, {} recuperated",
            self.conversations,
            self.recuperated
        );
        println!(
            "  {:?} detected by {} after {} us, cut over to {} after {} us more, {} conversations recuperated {} us later",
            self.fault,
            self.detected_by,
            self.suspected_us.saturating_sub(self.fault_us),
            self.to,
            self.cut_over_us.saturating_sub(self.suspected_us),
            self.recuperated,
            self.recuperated_us.saturating_sub(self.cut_over_us)
        );
        Ok(())
    }
}
