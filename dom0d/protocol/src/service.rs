//! One PSC, its server queue and its conversations.

use core::net::IpAddr;

use crate::{
    ConversationStatus, Effect, Evidence, Instant, LinkAddress, ServerId, ServiceConfig,
    ServiceStatus, Transmit,
};

/// A server as the caller introduces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSpec {
    /// Its identity, never used before in this service.
    pub id: ServerId,
    /// The guest's own addresses: at most one per family; a PSC address without a counterpart here
    /// is not served by it.
    pub addresses: Vec<IpAddr>,
    /// MTU of its vif in bytes.
    pub mtu: u16,
}

/// What the operator states about an RVM's state when attaching it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seeding {
    /// Nothing: it is fed new conversations, and is stale.
    Unseeded,
    /// Its state equals the OVM's now. Refused while conversations are open.
    AssumeIdentical,
    /// Its state will equal the OVM's once open conversations ended: new SYNs are held, and what is
    /// still open at the deadline makes the drain fail (SYNs flow again, the RVM stays stale).
    Drain {
        /// When to give up.
        deadline: Instant,
    },
}

/// Why an operator's request is refused; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperatorError {
    /// The id is not in the queue.
    #[error("the server is not in this service's queue")]
    UnknownServer,
    /// The id is in the queue already.
    #[error("the server is in this service's queue already")]
    AlreadyAttached,
    /// No slot is free.
    #[error("the queue is full: a service has at most {0} servers")]
    QueueFull(usize),
    /// Seeding as identical needs a moment without open conversations.
    #[error(
        "{0} conversations are open; a server can be taken as identical only when none is (wait, or drain)"
    )]
    ConversationsOpen(u64),
    /// A drain is under way.
    #[error("a drain is under way already")]
    DrainUnderWay,
    /// It is the OVM.
    #[error("the server is the OVM")]
    IsOvm,
    /// No server would remain that could serve.
    #[error("nothing would be left to serve the clients")]
    NothingLeft,
    /// The server can't be promoted unasked, and force was not given.
    #[error("the server is not promotable")]
    NotPromotable,
}

/// One PSC with its server queue and conversations.
///
/// After any input, drain in this order: [`Service::poll_effect`] until `None` (a cutover must be in
/// force before packets of the new epoch leave), then [`Service::poll_transmit`] until `None`, then
/// ask [`Service::poll_timeout`] when to call [`Service::handle_timeout`].
pub struct Service {
    config: ServiceConfig,
}

impl Service {
    /// A service without servers: clients' segments are dropped until [`Service::install_ovm`].
    pub fn new(config: ServiceConfig) -> Self {
        Self { config }
    }

    // ---- inputs -------------------------------------------------------------------------------

    /// An IP packet from a client to the PSC. `link` is the frame's source address.
    pub fn handle_client(&mut self, now: Instant, link: LinkAddress, packet: &[u8]) {
        let _ = (now, link, packet);
    }

    /// An IP packet that came out of a server's vif. Packets that are not this service's (another
    /// port, another protocol) are ignored and counted. An unknown id is a deposed or former
    /// server: dropped and counted.
    pub fn handle_server(&mut self, now: Instant, server: ServerId, packet: &[u8]) {
        let _ = (now, server, packet);
    }

    /// Liveness found evidence of kind (a) or (b) against a server. For the OVM: promotion (or
    /// [`crate::EventKind::NoCandidate`]). For an RVM: eviction.
    pub fn handle_evidence(&mut self, now: Instant, server: ServerId, evidence: Evidence) {
        let _ = (now, server, evidence);
    }

    /// A server is (not) running as far as the domain's state tells; one that is not is never
    /// promoted, and an OVM whose pause was announced is not accused by (c) or (d).
    pub fn handle_running(&mut self, now: Instant, server: ServerId, running: bool) {
        let _ = (now, server, running);
    }

    /// The time that [`Service::poll_timeout`] named has come (calling early or late is fine).
    pub fn handle_timeout(&mut self, now: Instant) {
        let _ = now;
    }

    // ---- outputs ------------------------------------------------------------------------------

    /// The next effect outside the data path.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        None
    }

    /// The next packet to send. Does bounded work per call.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        let _ = now;
        None
    }

    /// When [`Service::handle_timeout`] must be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    // ---- operator actions ---------------------------------------------------------------------

    /// The first OVM of a service that has none. Its state is the truth by definition.
    pub fn install_ovm(&mut self, now: Instant, spec: ServerSpec) -> Result<(), OperatorError> {
        let _ = (now, spec);
        Ok(())
    }

    /// Adds an RVM at the end of the queue.
    pub fn attach(
        &mut self,
        now: Instant,
        spec: ServerSpec,
        seeding: Seeding,
    ) -> Result<(), OperatorError> {
        let _ = (now, spec, seeding);
        Ok(())
    }

    /// Seeds an RVM that is attached already.
    pub fn seed(
        &mut self,
        now: Instant,
        server: ServerId,
        seeding: Seeding,
    ) -> Result<(), OperatorError> {
        let _ = (now, server, seeding);
        Ok(())
    }

    /// Takes an RVM out of the queue.
    pub fn detach(&mut self, now: Instant, server: ServerId) -> Result<(), OperatorError> {
        let _ = (now, server);
        Ok(())
    }

    /// Planned: `to` (or the best candidate) becomes the OVM; the old OVM stays as a promotable RVM.
    pub fn switchover(
        &mut self,
        now: Instant,
        to: Option<ServerId>,
    ) -> Result<ServerId, OperatorError> {
        let _ = (now, to);
        Err(OperatorError::NothingLeft)
    }

    /// Unplanned by an operator: the OVM is deposed and fenced. `force` promotes `to` even if it is
    /// not promotable (its uncovered and diverged conversations are reset).
    pub fn failover(
        &mut self,
        now: Instant,
        to: Option<ServerId>,
        force: bool,
    ) -> Result<ServerId, OperatorError> {
        let _ = (now, to, force);
        Err(OperatorError::NothingLeft)
    }

    // ---- getters ------------------------------------------------------------------------------

    /// The service's configuration.
    pub fn config(&self) -> &ServiceConfig {
        &self.config
    }

    /// The current OVM.
    pub fn ovm(&self) -> Option<ServerId> {
        None
    }

    /// The current epoch.
    pub fn epoch(&self) -> u64 {
        0
    }

    /// A snapshot for operators; cost grows with the number of servers, not of conversations.
    pub fn status(&self) -> ServiceStatus {
        ServiceStatus {
            epoch: 0,
            servers: Vec::new(),
            conversations: 0,
            embryonic: 0,
            recuperating: 0,
            retained_bytes: 0,
            counters: Default::default(),
        }
    }

    /// Snapshots of conversations, the first `limit` in table order starting at `skip`.
    pub fn conversations(&self, skip: usize, limit: usize) -> Vec<ConversationStatus> {
        let _ = (skip, limit);
        Vec::new()
    }
}
