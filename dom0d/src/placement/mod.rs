//! Gives each service its domains and its place on a bridge: compares what discovery and netlink say with what the data path
//! has, and hands over what it lacks, open vifs and the PSC's anchor.
//!
//! Everything that may wait (netlink, opening captures, asking whether an address is free) happens here, off the data path.

mod anchoring;
mod domains;
mod eligibility;
mod moves;
mod vifs;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use rtnetlink::Handle;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;
use tokio::time::Instant;
use understudy_api::config::Config;
use understudy_bpf::{Containment, Programs};
use uuid::Uuid;

use self::eligibility::{bridge, rank, unclaimed, vlan};
use crate::discovery::{Domain, Found, Snapshot};
use crate::domain::DomainId;
use crate::link::anchor::{self, Link};
use crate::link::changes::Changes;
use crate::link::vif::{Arrival, GuestVif};
use crate::message::{LostInterface, Message, Source};
use crate::wake::Waker;

/// How often everything is looked at again while something is missing.
const IMPATIENT: Duration = Duration::from_secs(1);

/// How often everything is looked at again while nothing is missing: netlink may have dropped messages.
const PATIENT: Duration = Duration::from_secs(10);

/// Shortest time between two looks that changes of interfaces cause.
const CHANGES: Duration = Duration::from_millis(20);

/// How long a lost interface waits before it is opened again.
const AFTER_LOSS: Duration = Duration::from_millis(200);

/// How often it is asked meanwhile whether it is gone: it is lost a moment before.
const GONE_YET: Duration = Duration::from_millis(5);

/// How long placement waits before it tries again an anchor whose PSC address another host has.
const ADDRESS_TAKEN: Duration = Duration::from_secs(10);

const KERNEL_RELEASE: &str = "/proc/sys/kernel/osrelease";

/// See the module.
pub(crate) struct Placement {
    config: Arc<Config>,
    netlink: Handle,
    messages: mpsc::Sender<Message>,
    waker: Waker,
    anchors: Vec<Anchor>,
    /// By service: what the plane has for interfaces.
    programs: Vec<Option<Programs>>,
    given: BTreeMap<(usize, DomainId), Given>,
    /// By service: every vif that a domain of it has, or had and that is still there.
    vifs: Vec<BTreeMap<String, GuestVif>>,
    /// The containment program, if the kernel has loaded it, and the numbers of the vifs that have it.
    containment: Option<Containment>,
    contained: BTreeMap<String, u32>,
    /// Domains with two lives at present: what of them is not usable now may be in a moment.
    in_transit: BTreeSet<Uuid>,
    told: BTreeMap<Source, Vec<String>>,
}

/// What is known of one service's anchor.
#[derive(Clone, Debug, Default)]
struct Anchor {
    /// The bridge's number and the far end's, while the data path has it.
    on: Option<(u32, u32)>,
    /// It may be in place, as another process left it.
    is_left: bool,
    /// Not to be tried again before, and why.
    blocked: Option<(Instant, String)>,
}

/// What the data path was last told of a domain.
#[derive(Debug)]
struct Given {
    name: String,
    shutdown_request: Option<String>,
    /// The domid that it was moved here from.
    came_from: Option<u16>,
    /// Since when it is here, but not connected to the network yet.
    moving_since: Option<Instant>,
    state: GivenState,
}

impl Given {
    fn open(arrival: Arrival, index: u32) -> Self {
        Self {
            name: arrival.domain.name.clone(),
            shutdown_request: None,
            came_from: None,
            moving_since: None,
            state: GivenState::Open { arrival, index },
        }
    }
}

#[derive(Debug)]
enum GivenState {
    /// It was given with this vif, whose number was that.
    Open { arrival: Arrival, index: u32 },
    /// It can't be used for this reason.
    Unusable(String),
}

impl Placement {
    /// Placement that has given nothing yet but what each service begins with, by `beginnings`: what its plane has
    /// for interfaces, and its servers.
    pub(crate) fn new(
        config: Arc<Config>,
        netlink: Handle,
        messages: mpsc::Sender<Message>,
        waker: Waker,
        containment: Option<Containment>,
        beginnings: Vec<(Option<Programs>, Vec<Arrival>)>,
    ) -> Self {
        let mut anchors = Vec::new();
        let mut programs = Vec::new();
        let mut given = BTreeMap::new();
        for (index, (program, arrivals)) in beginnings.into_iter().enumerate() {
            programs.push(program);
            anchors.push(Anchor { is_left: !arrivals.is_empty(), ..Anchor::default() });
            for arrival in arrivals {
                let life = DomainId::from(&arrival.domain);
                // No interface has the number 0, so it is opened.
                given.insert((index, life), Given::open(arrival, 0));
            }
        }
        Self {
            vifs: vec![BTreeMap::new(); programs.len()],
            config,
            netlink,
            messages,
            waker,
            containment,
            contained: BTreeMap::new(),
            anchors,
            programs,
            given,
            in_transit: BTreeSet::new(),
            told: BTreeMap::new(),
        }
    }

    /// Works until discovery or the data path ends.
    pub(crate) async fn run(
        mut self,
        mut found: watch::Receiver<Found>,
        mut lost: UnboundedReceiver<LostInterface>,
        changes: Changes,
    ) {
        let mut not_before = Instant::now();
        loop {
            let now = found.borrow_and_update().clone();
            self.complain(Source::Xenstore, now.problem.into_iter().collect());
            let complete = match now.snapshot {
                Some(snapshot) => self.pass(&snapshot).await,
                None => false,
            };
            let wait = if complete { PATIENT } else { IMPATIENT };
            tokio::select! {
                changed = found.changed() => if changed.is_err() { return },
                interface = lost.recv() => match interface {
                    Some(interface) => if let Some(vif) = self.forget(interface) {
                        after_loss(&vif).await;
                    }
                    None => return,
                },
                () = changes.next(not_before) => not_before = Instant::now() + CHANGES,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Compares once. Gives whether nothing is missing.
    async fn pass(&mut self, snapshot: &Snapshot) -> bool {
        let mut complete = true;
        self.follow_moves(snapshot);
        let links = anchor::links(&self.netlink).await.map_err(|error| error.to_string());
        if let Ok(links) = &links {
            // This comes first: a vif must be contained before it comes up (rule 13).
            let services = 0..self.config.services.len();
            let changed: Vec<usize> =
                services.filter(|&index| self.note_vifs(index, snapshot, links)).collect();
            self.contain(links, !changed.is_empty()).await;
            // A new vif is held as a whole until the data path says what may pass.
            for service in changed {
                self.tell(Message::Vifs { service, vifs: self.vifs[service].clone() });
            }
        }
        for index in 0..self.config.services.len() {
            let mut problems = Vec::new();
            let looked = match &links {
                Ok(links) => self.service(index, snapshot, links).await,
                Err(error) => Err(error.clone()),
            };
            match looked {
                Ok(all_usable) => complete &= all_usable,
                Err(problem) => {
                    complete = false;
                    problems.push(problem);
                }
            }
            self.complain(Source::Placement(index), problems);
        }
        complete
    }

    /// Brings one service up to date; whether all its domains are usable, or what hinders the service.
    async fn service(&mut self, index: usize, snapshot: &Snapshot, links: &[Link]) -> Result<bool, String> {
        let config = Arc::clone(&self.config);
        let service = &config.services[index];
        let mut domains: Vec<(usize, &Domain)> =
            snapshot.domains.iter().filter_map(|domain| Some((rank(service, domain)?, domain))).collect();
        // The queue's order is the configuration's.
        domains.sort_by_key(|(rank, domain)| (*rank, domain.domid));
        let mut domains: Vec<&Domain> = domains.into_iter().map(|(_, domain)| domain).collect();
        self.take_back(index, &domains);
        domains.retain(|domain| !self.is_left_behind(index, domain));

        vlan(service, std::fs::read_to_string(KERNEL_RELEASE).unwrap_or_default().trim())?;
        // Before all that may be refused: clients wait for it.
        self.mend_programs(index, service, links).await;
        let bridge = bridge(service, &domains, links)?;
        if self.anchors[index].on.is_none() && !self.anchors[index].is_left {
            unclaimed(service, &domains)?;
        }
        let mut all_usable = !domains.is_empty();
        for domain in domains {
            all_usable &= self.domain(index, service, domain, bridge, links).await;
        }
        // Last, so that clients find a service with its replicas in place.
        self.anchor(index, service, bridge, links).await?;
        Ok(all_usable)
    }

    /// The data path lost an interface: what it was given counts no more. Which interface, if that is news.
    fn forget(&mut self, lost: LostInterface) -> Option<String> {
        let Some(domain) = lost.domain else {
            self.anchors[lost.service] = Anchor::default();
            return Some(anchor::names(self.config.services[lost.service].psc_mac).1);
        };
        match self.given.get_mut(&(lost.service, domain)) {
            Some(Given { state: GivenState::Open { arrival, index }, moving_since: None, .. }) => {
                // No interface has this number, so it is opened again.
                *index = 0;
                Some(arrival.vif.name.clone())
            }
            _ => None,
        }
    }

    /// Tells the data path what hinders, if that changed.
    fn complain(&mut self, source: Source, problems: Vec<String>) {
        let known = self.told.get(&source).is_some_and(|told| *told == problems);
        let nothing = problems.is_empty() && !self.told.contains_key(&source);
        if known || nothing {
            return;
        }
        self.told.insert(source, problems.clone());
        self.tell(Message::Problems { source, problems });
    }

    fn tell(&self, message: Message) {
        // Without a data path the daemon is stopping.
        let _ = self.messages.send(message);
        self.waker.wake();
    }
}

/// Waits until a lost interface is gone, at most [`AFTER_LOSS`]: an interface that is only down would open, and be lost
/// again at once. All services that used a vanished interface are to hear of it before one of them accuses its domain.
async fn after_loss(interface: &str) {
    let until = Instant::now() + AFTER_LOSS;
    while Instant::now() < until && if_nametoindex(interface).is_ok() {
        tokio::time::sleep(GONE_YET).await;
    }
}

/// Runs what may wait on a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| format!("dom0d failed inside: {error}"))
}
