//! Operators: carries out their commands ([`Command`]), and gives them snapshots of the service.

use crate::config::ServiceConfig;
use crate::conversation::Conversation;
use crate::event::{EventKind, Evidence, Release, ServerId, StaleReason};
use crate::input::{Command, OperatorError, Seeding, ServerSpec};
use crate::key::{MAX_SERVERS, Slot};
use crate::promotion::{self, Deposed};
use crate::service::{Purpose, Service};
use crate::status::{ConversationStatus, LegStatus, Role, ServerStatus, ServiceStatus};

impl Service {
    // ---- commands -----------------------------------------------------------------------------

    /// Carries out a command, or says why not.
    pub(crate) fn carry_out(&mut self, command: Command) -> Result<(), OperatorError> {
        match command {
            Command::InstallOvm(spec) => self.install_ovm(spec),
            Command::Attach { spec, seeding } => self.attach(spec, seeding),
            Command::Seed { server, seeding } => self.seed(server, seeding),
            Command::Detach { server } => self.detach(server),
            Command::Switchover { to } => {
                let slot = promotion::named_or_best(&self.ctx, to, false)?;
                self.promote(slot, None, Deposed::Rvm);
                Ok(())
            }
            Command::Failover { to, force } => {
                let slot = promotion::named_or_best(&self.ctx, to, force)?;
                self.promote(slot, Some(Evidence::Operator), Deposed::Fenced);
                Ok(())
            }
            Command::Hold { deadline, limit } => self.hold(deadline, limit),
            Command::Release => {
                self.release_for(Release::GivenUp);
                Ok(())
            }
        }
    }

    fn install_ovm(&mut self, spec: ServerSpec) -> Result<(), OperatorError> {
        if self.ctx.queue.ovm_server().is_some_and(|ovm| ovm.running) {
            return Err(OperatorError::OvmInstalled);
        }
        let first = self.ctx.accounts.open() == 0;
        let replaced = self.ctx.epoch > 0;
        let id = spec.id;
        let slot = match self.ctx.queue.slot_of(id) {
            Some(slot) => slot,
            None => self.ctx.queue.push(spec, None).ok_or(OperatorError::QueueFull(MAX_SERVERS))?,
        };
        promotion::cut_over(slot, None, Deposed::Fenced, &mut self.ctx);
        if replaced {
            // The RVMs were stated to equal another OVM.
            self.ctx.mark_all_stale(StaleReason::NotSeeded);
        }
        if first {
            // There is nothing to recuperate, and so nothing to report.
            self.ctx.recuperation.reported = true;
            self.ctx.recuperation.first_byte_due = false;
        } else {
            self.after_cutover();
        }
        Ok(())
    }

    fn attach(&mut self, spec: ServerSpec, seeding: Seeding) -> Result<(), OperatorError> {
        let id = spec.id;
        if self.ctx.queue.slot_of(id).is_some() {
            return Err(OperatorError::AlreadyAttached);
        }
        self.check_seeding(seeding)?;
        let slot = self
            .ctx
            .queue
            .push(spec, Some(StaleReason::NotSeeded))
            .ok_or(OperatorError::QueueFull(MAX_SERVERS))?;
        self.ctx.record.start(slot);
        let seeded = matches!(seeding, Seeding::AssumeIdentical | Seeding::Copied);
        self.ctx.event(EventKind::Attached { server: id, seeded });
        self.begin_seeding(id, seeding);
        Ok(())
    }

    fn seed(&mut self, server: ServerId, seeding: Seeding) -> Result<(), OperatorError> {
        let slot = self.ctx.queue.slot_of(server).ok_or(OperatorError::UnknownServer)?;
        if self.ctx.queue.ovm() == Some(slot) {
            return Err(OperatorError::IsOvm);
        }
        self.check_seeding(seeding)?;
        self.begin_seeding(server, seeding);
        Ok(())
    }

    fn check_seeding(&mut self, seeding: Seeding) -> Result<(), OperatorError> {
        match seeding {
            Seeding::AssumeIdentical => match self.unsettled() {
                0 => Ok(()),
                open => Err(OperatorError::ConversationsOpen(open)),
            },
            Seeding::Drain { .. } if self.drain.is_some() => Err(OperatorError::DrainUnderWay),
            Seeding::Copied => {
                // By now another OVM may serve, or the hold may be over.
                self.end_drain();
                if self.is_held() { Ok(()) } else { Err(OperatorError::NotHeld) }
            }
            _ => Ok(()),
        }
    }

    fn begin_seeding(&mut self, server: ServerId, seeding: Seeding) {
        match seeding {
            Seeding::Unseeded => {}
            Seeding::AssumeIdentical => self.mark_seeded(server),
            Seeding::Drain { deadline } => self.begin_drain(Purpose::Seed(server), deadline),
            Seeding::Copied => {
                self.mark_seeded(server);
                self.release_for(Release::Seeded);
            }
        }
    }

    fn detach(&mut self, server: ServerId) -> Result<(), OperatorError> {
        let slot = self.ctx.queue.slot_of(server).ok_or(OperatorError::UnknownServer)?;
        if self.ctx.queue.ovm() == Some(slot) {
            let alone = self.ctx.queue.rvms().next().is_none();
            return Err(if alone { OperatorError::NothingLeft } else { OperatorError::IsOvm });
        }
        self.drain.take_if(|drain| drain.purpose == Purpose::Seed(server));
        self.ctx.queue.remove(slot);
        self.ctx.record.start(slot);
        self.ctx.event(EventKind::Detached { server });
        Ok(())
    }

    fn promote(&mut self, slot: Slot, evidence: Option<Evidence>, deposed: Deposed) {
        promotion::cut_over(slot, evidence, deposed, &mut self.ctx);
        self.after_cutover();
    }

    // ---- getters ------------------------------------------------------------------------------

    /// The service's configuration.
    pub fn config(&self) -> &ServiceConfig {
        &self.ctx.config
    }

    /// The current OVM.
    pub fn ovm(&self) -> Option<ServerId> {
        self.ctx.ovm().map(|(_, server)| server)
    }

    /// The current epoch.
    pub fn epoch(&self) -> u64 {
        self.ctx.epoch
    }

    /// A promotion is under way: for some conversation it is still open whether it will continue.
    pub fn is_recuperating(&self) -> bool {
        self.sweep.is_some() || !self.ctx.recuperation.pending.is_empty()
    }

    /// A snapshot for operators. Its cost grows with the number of servers, not of conversations.
    pub fn status(&self) -> ServiceStatus {
        let ctx = &self.ctx;
        let recuperating = ctx.recuperation.pending.len() as u64;
        let server = |server: &crate::follower::queue::Follower| ServerStatus {
            server: server.id,
            role: match ctx.queue.ovm() == Some(server.slot) {
                true if recuperating > 0 => Role::TakingOver,
                true => Role::Ovm,
                false => Role::Rvm,
            },
            not_promotable: ctx.queue.not_promotable(server),
            stale: server.stale,
            covered: server.sums.covered,
            uncovered: ctx.accounts.open().saturating_sub(server.sums.covered + server.sums.diverged),
            diverged: server.sums.diverged,
            behind_bytes: server.sums.behind,
        };
        ServiceStatus {
            epoch: ctx.epoch,
            servers: ctx.queue.iter().map(server).collect(),
            conversations: ctx.accounts.open(),
            embryonic: self.handshakes.len() as u64,
            recuperating,
            retained_bytes: ctx.accounts.retained(),
            counters: ctx.counters.by_name(),
        }
    }

    /// Snapshots of open conversations, the first `limit` in table order starting at `skip`.
    pub fn conversations(&self, skip: usize, limit: usize) -> Vec<ConversationStatus> {
        let (mut place, mut found) = (0, Vec::new());
        self.table.visit(|conversation| {
            if conversation.is_open() {
                if place >= skip && found.len() < limit {
                    found.push(self.describe(conversation));
                }
                place += 1;
            }
            found.len() < limit
        });
        found
    }

    /// The state of the OVM's TCP (RFC 9293 §3.3.2). If both sides have closed, LAST-ACK also stands for CLOSING: the
    /// streams do not tell which FIN came first.
    fn tcp_state(&self, conversation: &Conversation) -> &'static str {
        let ovm = self.ctx.ovm().and_then(|(slot, server)| conversation.legs.get(slot, server));
        let taken = ovm.map_or(0, |ovm| ovm.rcv_nxt);
        let client_closed = conversation.up_fin.is_some_and(|(fin, _)| taken > fin);
        let acknowledged = conversation.down_fin.map(|fin| conversation.client.acked > fin);
        match (client_closed, acknowledged) {
            (false, None) => "ESTABLISHED",
            (true, None) => "CLOSE-WAIT",
            (false, Some(false)) => "FIN-WAIT-1",
            (false, Some(true)) => "FIN-WAIT-2",
            (true, Some(false)) => "LAST-ACK",
            (true, Some(true)) => "TIME-WAIT",
        }
    }

    fn describe(&self, conversation: &Conversation) -> ConversationStatus {
        let leg = |(slot, server)| match conversation.legs.get(slot, server) {
            Some(leg) => LegStatus {
                server,
                acknowledged_bytes: leg.rcv_nxt.saturating_sub(1),
                produced_bytes: if leg.through { conversation.down.end() } else { leg.said.answers.end() }
                    .saturating_sub(1),
                uncovered: None,
                diverged_at: leg.said.diverged_at.map(|position| position.saturating_sub(1)),
            },
            None => LegStatus {
                server,
                acknowledged_bytes: 0,
                produced_bytes: 0,
                uncovered: Some(conversation.legs.absence(slot)),
                diverged_at: None,
            },
        };
        ConversationStatus {
            client: conversation.key.client,
            psc: conversation.key.psc,
            state: self.tcp_state(conversation),
            recuperating: conversation.is_recuperating(),
            received_bytes: conversation.up.end() - 1,
            sent_bytes: conversation.down.end() - 1,
            legs: self.ctx.queue.roster().map(leg).collect(),
        }
    }
}
