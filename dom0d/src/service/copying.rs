//! Seeding by copy: an operator's command copies the OVM's state to a server while dom0d holds clients. dom0d ensures that
//! no client writes meanwhile, and believes the copy only if none did (rule 12).

use std::time::Duration;

use understudy_api::{CopyEnd, HoldState};
use understudy_driver::Engine as _;
use understudy_protocol::{Command, Instant, OperatorError, Release, Seeding, ServerId};

use super::{Place, Service, Surroundings};
use crate::command::Hold;

/// A copy under way, or over.
#[derive(Debug)]
pub(crate) struct Copying {
    hold: u64,
    server: ServerId,
    /// Rules of this version let it use its network.
    pub(super) needs: Option<u64>,
    open: bool,
    over: Option<Release>,
}

impl Service {
    /// Begins to hold clients for a copy to this server, which leaves the queue.
    pub(crate) fn hold_clients(
        &mut self,
        now: Instant,
        server: ServerId,
        (drain, limit): (Duration, Duration),
        around: &mut Surroundings<'_>,
    ) -> Result<Hold, OperatorError> {
        let ovm = self.engine.ovm().ok_or(OperatorError::NothingLeft)?;
        let Some(from) = self.servers.get(&ovm) else { return Err(OperatorError::NothingLeft) };
        let to = &self.servers[&server];
        // Ids of servers are given out once per process, and so are these.
        let hold = u64::from(*around.next_server);
        let told = Hold {
            hold,
            from: CopyEnd { domain: from.domain.clone(), addresses: from.vif.addresses.clone() },
            to: CopyEnd { domain: to.domain.clone(), addresses: to.vif.addresses.clone() },
        };
        self.engine.command(now, Command::Hold { deadline: now + drain, limit })?;
        *around.next_server += 1;
        if self.is_queued(server) {
            // It was there a moment ago.
            let _ = self.engine.command(now, Command::Detach { server });
        }
        self.server_mut(server, |server| server.place = Place::Copying);
        self.copying = Some(Copying { hold, server, needs: None, open: false, over: None });
        self.rules_changed = true;
        self.drain(now, around);
        Ok(told)
    }

    /// The state of a hold.
    pub(crate) fn holding(&self, hold: u64) -> HoldState {
        let open = self.engine.status().conversations;
        match self.copying.as_ref().filter(|copying| copying.hold == hold) {
            None => HoldState::Over { reason: "another copy has begun".to_owned() },
            Some(Copying { over: Some(reason), .. }) => {
                HoldState::Over { reason: over_text(*reason).to_owned() }
            }
            Some(copying) if copying.open && self.engine.is_held() => HoldState::Held,
            Some(_) => HoldState::Draining { open },
        }
    }

    /// The holder released the hold, or is gone.
    pub(crate) fn release(&mut self, now: Instant, hold: u64, around: &mut Surroundings<'_>) {
        if self.copying.as_ref().is_some_and(|copying| copying.hold == hold && copying.over.is_none()) {
            // Never refused.
            let _ = self.engine.command(now, Command::Release);
            self.drain(now, around);
        }
    }

    /// Seeds a server that was made equal under this hold.
    pub(crate) fn copied(
        &mut self,
        now: Instant,
        (server, hold): (ServerId, u64),
        around: &mut Surroundings<'_>,
    ) -> Result<ServerId, OperatorError> {
        let copying =
            self.copying.as_ref().filter(|copying| (copying.server, copying.hold) == (server, hold));
        let is_copying = self.servers.get(&server).is_some_and(|server| server.place == Place::Copying);
        if !is_copying || copying.is_none_or(|copying| copying.over.is_some() || !copying.open) {
            return Err(OperatorError::NotHeld);
        }
        let attached = self.attach(now, server, Seeding::Copied, around);
        // Also what was found out on the way to a refusal.
        self.drain(now, around);
        attached
    }

    /// This server is gone: releases the clients that were held for it.
    pub(super) fn copying_lost(&mut self, now: Instant, server: ServerId, around: &mut Surroundings<'_>) {
        if let Some(hold) = self.copying.as_ref().filter(|copying| copying.server == server).map(|c| c.hold) {
            self.release(now, hold, around);
        }
    }

    pub(super) fn copying_rules_applied(&mut self, version: u64) {
        if let Some(copying) = &mut self.copying {
            copying.open |= copying.needs.is_some_and(|needs| needs <= version);
        }
    }

    pub(super) fn copying_ended(&mut self, reason: Release) {
        let Some(copying) = self.copying.as_mut().filter(|copying| copying.over.is_none()) else { return };
        copying.over = Some(reason);
        let server = copying.server;
        if let Some(server) = self.servers.get_mut(&server).filter(|server| server.place == Place::Copying) {
            server.place = Place::Left(format!(
                "the copy of the OVM's state to it did not end: {}; its state is nobody's, copy again (understudy attach --copy)",
                over_text(reason)
            ));
            self.rules_changed = true;
        }
    }
}

fn over_text(reason: Release) -> &'static str {
    match reason {
        Release::Seeded => "it is in the queue",
        Release::GivenUp => "it was given up",
        Release::ConversationsOpen => "open conversations did not end in time",
        Release::Limit => "it took longer than clients were to be held",
        Release::Unattended => "clients reached the OVM meanwhile, past a dom0d that did not run",
        Release::OvmChanged => "another OVM serves, whose state it is not",
    }
}
