//! Which domains and bridges does each service get? Compares what discovery and netlink say with what the
//! data path was given, and gives it what is missing: the PSC's anchor, and open vifs.
//!
//! Everything that may wait (netlink, opening captures, asking whether an address is free) happens here,
//! off the data path.

mod eligibility;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use rtnetlink::Handle;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;
use tokio::time::Instant;
use understudy_api::config::{self, Config};
use understudy_bpf::{Containment, Programs};
use uuid::Uuid;

use self::eligibility::{bridge, is_of, rank, unclaimed, usable, vlan};
use crate::discovery::{Domain, Found, Snapshot, is_incoming, sent_away};
use crate::domain::{DomainId, DomainRef, KnownDomain};
use crate::link::anchor::{self, AnchorError, Link};
use crate::link::changes::Changes;
use crate::link::device::{Device, DeviceError, anchor_filter, mac_text, odd_server_filter, server_filter};
use crate::link::psc::Psc;
use crate::link::vif::{Arrival, GuestVif, Interface};
use crate::message::{LostInterface, Message, Source};
use crate::wake::Waker;

/// How often everything is looked at again while something is missing.
const IMPATIENT: Duration = Duration::from_secs(1);

/// How often everything is looked at again while nothing is: what netlink tells of may have been too much to be heard.
const PATIENT: Duration = Duration::from_secs(10);

/// Shortest time between two looks that changes of interfaces cause.
const CHANGES: Duration = Duration::from_millis(20);

/// How long a lost interface waits before it is opened again.
const AFTER_LOSS: Duration = Duration::from_millis(200);

/// How often it is asked meanwhile whether it is gone: it is lost a moment before.
const GONE_YET: Duration = Duration::from_millis(5);

/// How long a PSC whose address is taken by somebody else waits before it is tried again.
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
    /// What holds domains back in the kernel, if it can, and the numbers of the vifs that it is on.
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
                let life = DomainId { uuid: arrival.domain.uuid, domid: arrival.domain.domid };
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

    /// One comparison of what is with what was given; whether nothing is missing.
    async fn pass(&mut self, snapshot: &Snapshot) -> bool {
        let mut complete = true;
        self.follow_moves(snapshot);
        let links = anchor::links(&self.netlink).await.map_err(|error| error.to_string());
        if let Ok(links) = &links {
            // First: a vif must be contained before it comes up.
            let services = 0..self.config.services.len();
            let changed: Vec<usize> =
                services.filter(|&index| self.note_vifs(index, snapshot, links)).collect();
            self.contain(links, !changed.is_empty()).await;
            // Now, so that what is held at first is not held for good.
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

    /// Notes all vifs that the service's domains have, whatever their state is. One whose domain, or backend, is not listed
    /// any more counts as long as its interface is there. Whether they are others than before.
    fn note_vifs(&mut self, index: usize, snapshot: &Snapshot, links: &[Link]) -> bool {
        let service = &self.config.services[index];
        let number = |name: &str| links.iter().find(|link| link.name == name).map(|link| link.index);
        let mut vifs = self.vifs[index].clone();
        // One that was given another name is nobody's here any more.
        let is_still_of = |was: &DomainRef| {
            let mut listed = snapshot.domains.iter();
            let now = listed.find(|domain| (domain.uuid, domain.domid) == (was.uuid, was.domid));
            now.is_none_or(|domain| is_of(service, domain))
        };
        vifs.retain(|name, vif| vif.index.is_some() && vif.index == number(name) && is_still_of(&vif.domain));
        for domain in snapshot.domains.iter().filter(|domain| is_of(service, domain)) {
            let is_incoming = is_incoming(&domain.name);
            for vif in &domain.vifs {
                let index = number(&vif.name);
                let guest = GuestVif { domain: domain.reference(), is_incoming, mac: vif.mac, index };
                vifs.insert(vif.name.clone(), guest);
            }
        }
        let before = std::mem::replace(&mut self.vifs[index], vifs);
        before != self.vifs[index]
    }

    /// Puts what holds domains back on all their vifs, and back where somebody has taken it away. A vif that is new is held
    /// as a whole if the data path is about to hear of it, which then says what may go on from it.
    async fn contain(&mut self, links: &[Link], is_told: bool) {
        let Some(containment) = &mut self.containment else { return };
        let own: BTreeSet<&String> = self.vifs.iter().flat_map(BTreeMap::keys).collect();
        for vif in containment.vifs().iter().filter(|vif| !own.contains(vif)) {
            tokio::task::block_in_place(|| containment.leave(vif));
            self.contained.remove(vif);
        }
        let mut restored = Vec::new();
        for link in links.iter().filter(|link| own.contains(&link.name)) {
            let is_new = self.contained.get(&link.name) != Some(&link.index);
            let place = (understudy_bpf::CONTAIN_PRIORITY, understudy_bpf::CONTAIN_NUMBER);
            // One that can't be asked is gone, or answers the next time.
            if !is_new && anchor::has_program(&self.netlink, link, true, place).await.unwrap_or(true) {
                continue;
            }
            let put = tokio::task::block_in_place(|| {
                if is_new && is_told {
                    containment.hold(link.index)?;
                }
                containment.attach(&link.name)
            });
            match put {
                Ok(()) => {
                    self.contained.insert(link.name.clone(), link.index);
                    if !is_new {
                        restored.push(link.name.clone());
                    }
                }
                Err(error) => {
                    tracing::warn!(interface = link.name, %error, "nft alone holds back what a replica sends there");
                }
            }
        }
        for vif in restored {
            let services = (0..self.vifs.len()).filter(|&index| self.vifs[index].contains_key(&vif));
            for service in services.collect::<Vec<_>>() {
                let what = format!("the tc program that contains {vif}");
                self.tell(Message::Restored { service, what });
            }
        }
    }

    /// A domain that was migrated within this host has the same UUID and memory under another number. What was
    /// given of it counts for that, before its old life ends, so that nobody takes that for its end. Back, too: a
    /// migration that fails at its very end leaves the domain what and where it was.
    ///
    /// A rebooted domain has the same UUID and another number too, but was not received.
    fn follow_moves(&mut self, snapshot: &Snapshot) {
        let mut seen = BTreeSet::new();
        let lives = snapshot.domains.iter().map(|domain| domain.uuid);
        self.in_transit = lives.filter(|uuid| !seen.insert(*uuid)).collect();
        let moves: Vec<_> = self
            .given
            .iter()
            .filter_map(|(&(service, life), given)| {
                let GivenState::Open { arrival, .. } = &given.state else {
                    return None;
                };
                let is_listed = snapshot.domains.iter().any(|domain| domain.id() == life);
                let new = snapshot.domains.iter().find(|new| {
                    let is_other = new.uuid == life.uuid && new.domid != life.domid;
                    let is_back = given.came_from == Some(new.domid);
                    let lives_on = if is_back { !is_listed } else { new.received };
                    is_other && lives_on && !is_incoming(&new.name) && sent_away(&new.name).is_none()
                })?;
                let vif = new.vifs.iter().find(|vif| vif.mac == arrival.mac)?;
                Some(((service, life), new.reference(), vif.name.clone()))
            })
            .collect();
        for ((service, from), to, vif) in moves {
            let Some(mut given) = self.given.remove(&(service, from)) else {
                continue;
            };
            if let GivenState::Open { arrival, index } = &mut given.state {
                arrival.domain = to.clone();
                // No interface has this number, so it is opened once it is connected.
                *index = 0;
            }
            given.name.clone_from(&to.name);
            given.came_from = Some(from.domid);
            given.moving_since = Some(Instant::now());
            self.given.insert((service, DomainId { uuid: to.uuid, domid: to.domid }), given);
            self.tell(Message::Moved { service, from, to, vif });
        }
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

    /// Puts the service's programs back where somebody has taken them away.
    async fn mend_programs(&mut self, index: usize, service: &config::Service, links: &[Link]) {
        let Some(programs) = &mut self.programs[index] else { return };
        let mut again = Vec::new();
        for (interface, is_ingress) in programs.places() {
            // An interface that is gone, or another by now, is opened anew in any case.
            let Some(link) = links.iter().find(|link| link.name == interface) else { continue };
            let is_as_opened = !is_ingress
                || self.given.iter().any(|((service, _), given)| {
                    matches!(&given.state, GivenState::Open { arrival, index: number }
                        if *service == index && arrival.vif == interface && *number == link.index)
                });
            if !is_as_opened {
                continue;
            }
            let place = (understudy_bpf::PRIORITY, understudy_bpf::number(service.psc_mac));
            match anchor::has_program(&self.netlink, link, is_ingress, place).await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(interface, %error, "can't be looked at");
                    continue;
                }
            }
            let put = tokio::task::block_in_place(|| match is_ingress {
                true => programs.attach_vif(&interface),
                false => programs.attach_anchor(&interface),
            });
            match put {
                Ok(()) => {
                    let what = format!("the tc program on {interface}");
                    let _ = self.messages.send(Message::Restored { service: index, what });
                    self.waker.wake();
                }
                Err(error) => {
                    tracing::error!(interface, %error, "a tc program was taken away by somebody else, and can't be put back yet");
                    again.push((interface, is_ingress));
                }
            }
        }
        for (interface, is_ingress) in again {
            if is_ingress {
                let given = self.given.iter_mut().filter(|((service, _), _)| *service == index);
                for (_, given) in given {
                    if let GivenState::Open { arrival, index } = &mut given.state
                        && arrival.vif == interface
                    {
                        // No interface has this number, so it is opened again.
                        *index = 0;
                    }
                }
            } else {
                self.anchors[index] = Anchor::default();
            }
        }
    }

    /// Whether a domain's memory is elsewhere, or was, and what is here is on its way out.
    fn is_left_behind(&self, index: usize, domain: &Domain) -> bool {
        let is_given = self.given.contains_key(&(index, domain.id()));
        let mut given = self.given.iter();
        let lives_on = given.any(|((service, life), given)| {
            *service == index && life.uuid == domain.uuid && given.came_from == Some(domain.domid)
        });
        !is_given && (lives_on || sent_away(&domain.name).is_some())
    }

    /// Takes back what is not there any more, or does not belong to the service any more.
    fn take_back(&mut self, index: usize, domains: &[&Domain]) {
        let has = |uuid, domid| domains.iter().any(|domain| domain.uuid == uuid && domain.domid == domid);
        let gone: Vec<DomainId> = self
            .given
            .iter()
            .filter(|((service, life), given)| {
                // Where it came from, it may go on yet: then its end is for its hypervisor to say.
                let may_be_back = given.moving_since.is_some()
                    && given.came_from.is_some_and(|domid| has(life.uuid, domid));
                *service == index && !has(life.uuid, life.domid) && !may_be_back
            })
            .map(|((_, life), _)| *life)
            .collect();
        for domain in gone {
            let given = self.given.remove(&(index, domain));
            if let Some(Given { state: GivenState::Open { arrival, .. }, .. }) = given {
                self.detach(index, &arrival.vif);
            }
            self.tell(Message::Departed { service: index, domain });
        }
    }

    /// Sees to it that the PSC has its place on `bridge`.
    async fn anchor(
        &mut self,
        index: usize,
        service: &config::Service,
        bridge: &Link,
        links: &[Link],
    ) -> Result<(), String> {
        let (name, far) = anchor::names(service.psc_mac);
        let by_name = |wanted: &str| links.iter().find(|link| link.name == wanted);
        let in_place = by_name(&name).filter(|link| link.master == Some(bridge.index));
        let far_index = by_name(&far).map(|link| link.index);
        let has = self.anchors[index].on;
        if let Some(anchor) = in_place
            && has.is_some()
            && has == far_index.map(|far| (bridge.index, far))
        {
            // An operator who flushes the bridge (`bridge fdb flush`) unties it.
            return anchor::tie(&self.netlink, service.psc_mac, service.vlan, anchor.index)
                .await
                .map_err(|error| error.to_string());
        }
        if let Some((until, reason)) = &self.anchors[index].blocked
            && Instant::now() < *until
        {
            return Err(reason.clone());
        }
        let is_left = in_place.is_some() && self.anchors[index].is_left;
        self.anchors[index] = Anchor::default();
        let mut placed = self.place(service, bridge, is_left).await;
        if placed.is_ok()
            && let Some(programs) = &mut self.programs[index]
            && let Err(error) = tokio::task::block_in_place(|| programs.attach_anchor(&name))
        {
            placed = Err(error.to_string());
        }
        let (device, far_index) = match placed {
            Ok(placed) => placed,
            Err(reason) => {
                // A half-made or unusable anchor must not attract the PSC's frames.
                if let Err(error) = anchor::remove(&self.netlink, service.psc_mac).await {
                    tracing::warn!(service = service.engine.name, %error, "an unused anchor stays");
                }
                let until = Instant::now() + ADDRESS_TAKEN;
                self.anchors[index].blocked = Some((until, reason.clone()));
                return Err(reason);
            }
        };
        self.anchors[index].on = Some((bridge.index, far_index));
        self.tell(Message::Anchored { service: index, bridge: bridge.name.clone(), device });
        Ok(())
    }

    /// Makes the anchor, or takes it as it `is_left` there; the PSC's addresses are nobody else's then.
    async fn place(
        &self,
        service: &config::Service,
        bridge: &Link,
        is_left: bool,
    ) -> Result<(Device, u32), String> {
        let text = |error: AnchorError| error.to_string();
        let addresses = anchor::addresses_of_dom0(&self.netlink).await;
        for address in addresses.map_err(text)? {
            if service.engine.psc.contains(&address) {
                return Err(format!(
                    "the PSC's address {address} is in use by dom0 itself; remove it there (ip address del), or choose another PSC"
                ));
            }
        }
        let far = if is_left {
            anchor::names(service.psc_mac).1
        } else {
            anchor::create(&self.netlink, service.psc_mac, service.vlan, bridge).await.map_err(text)?
        };
        let links = anchor::links(&self.netlink).await.map_err(text)?;
        let index = links.iter().find(|link| link.name == far);
        let index = index.ok_or_else(|| AnchorError::Vanished(far.clone()).to_string())?;
        let filter = anchor_filter(service.psc_mac);
        let buffer = self.config.capture_buffer;
        let psc = Psc::of(service);
        let opened = blocking(move || {
            let mut device = Device::open(&far, psc.vlan, &filter, buffer)?;
            let taken = if is_left { None } else { anchor::probe(&mut device, &psc) };
            Ok::<_, DeviceError>((device, taken))
        });
        match opened.await? {
            Err(error) => Err(format!("the PSC's interface can't be captured: {error}")),
            Ok((_, Some((address, mac)))) => Err(format!(
                "the PSC's address {address} is in use by the machine with MAC {} on {}; take it from there, or choose another PSC",
                mac_text(mac),
                bridge.name
            )),
            Ok((device, None)) => Ok((device, index.index)),
        }
    }

    /// Brings one domain up to date; whether it is usable.
    async fn domain(
        &mut self,
        index: usize,
        service: &config::Service,
        domain: &Domain,
        bridge: &Link,
        links: &[Link],
    ) -> bool {
        let key = (index, domain.id());
        let decided = usable(service, domain, bridge, links, |vif| self.contained.contains_key(vif))
            .and_then(|arrival| self.unshared(index, arrival));
        let opened = match decided {
            Ok(arrival) => self.open(key, service, arrival, links).await,
            Err(reason) => Err(reason),
        };
        let is_usable = opened.is_ok();
        if let Err(reason) = opened {
            self.refuse(key, domain, reason);
        }
        self.news(key, domain);
        is_usable
    }

    /// Two servers with one address, or two services on one server's port, can't be told apart.
    fn unshared(&self, index: usize, arrival: Arrival) -> Result<Arrival, String> {
        let ports = &self.config.services[index].engine.ports;
        let life = (arrival.domain.uuid, arrival.domain.domid);
        for ((other, id), given) in &self.given {
            let GivenState::Open { arrival: open, .. } = &given.state else {
                continue;
            };
            let mut addresses = open.addresses.iter();
            let Some(shared) = addresses.find(|address| arrival.addresses.contains(address)) else {
                continue;
            };
            let other_service = &self.config.services[*other].engine;
            if (id.uuid, id.domid) != life {
                return Err(format!(
                    "its address {shared} is that of {} too; give each domain its own",
                    open.domain.name
                ));
            }
            let port = ports.iter().find(|port| other_service.ports.contains(port));
            if let Some(port) = port.filter(|_| *other != index) {
                return Err(format!(
                    "its port {port} serves in service {} already; one port of a domain can serve behind one PSC",
                    other_service.name
                ));
            }
        }
        Ok(arrival)
    }

    /// Opens a usable domain's vif and gives it to the data path, unless that has it already.
    async fn open(
        &mut self,
        key: (usize, DomainId),
        service: &config::Service,
        arrival: Arrival,
        links: &[Link],
    ) -> Result<(), String> {
        let link = links.iter().find(|link| link.name == arrival.vif);
        let link_index = link.map_or(0, |link| link.index);
        if let Some(Given { state: GivenState::Open { arrival: open, index }, .. }) = self.given.get(&key) {
            let same_vif = *index == link_index && open.vif == arrival.vif;
            if same_vif && open.addresses == arrival.addresses && open.mac == arrival.mac {
                return Ok(());
            }
            let left = (open.vif != arrival.vif).then(|| open.vif.clone());
            if open.addresses != arrival.addresses {
                // Not the server it was: it leaves and comes as another.
                self.tell(Message::Departed { service: key.0, domain: key.1 });
            }
            if let Some(vif) = left {
                self.detach(key.0, &vif);
            }
        }
        let filter = match &mut self.programs[key.0] {
            None => server_filter(&arrival.addresses, &service.engine.ports),
            Some(programs) => {
                let attached = tokio::task::block_in_place(|| programs.attach_vif(&arrival.vif));
                attached.map_err(|error| error.to_string())?;
                odd_server_filter(&arrival.addresses)
            }
        };
        let (vif, vlan, buffer) = (arrival.vif.clone(), service.vlan, self.config.capture_buffer);
        let opened = blocking(move || Device::open(&vif, vlan, &filter, buffer)).await?;
        let device = opened.map_err(|error| format!("its vif can't be captured: {error}"))?;
        let came_from = self.given.get(&key).and_then(|given| given.came_from);
        self.given.insert(key, Given { came_from, ..Given::open(arrival.clone(), link_index) });
        let vif = Interface { index: link_index, device };
        self.tell(Message::Arrived { service: key.0, arrival, vif });
        Ok(())
    }

    /// Takes the kernel's part of the plane from a vif that is not used any more.
    fn detach(&mut self, service: usize, vif: &str) {
        if let Some(programs) = &mut self.programs[service] {
            tokio::task::block_in_place(|| programs.leave(vif));
        }
    }

    fn refuse(&mut self, key: (usize, DomainId), domain: &Domain, reason: String) {
        let limit = self.config.services[key.0].maintenance_limit;
        if let Some(given) = self.given.get(&key)
            && matches!(given.state, GivenState::Open { .. })
            && (self.in_transit.contains(&domain.uuid)
                || given.moving_since.is_some_and(|since| since.elapsed() < limit))
        {
            // Where its life ends is for its hypervisor to say, and for the list.
            return;
        }
        match self.given.get(&key).map(|given| &given.state) {
            Some(GivenState::Unusable(before)) if *before == reason => return,
            Some(GivenState::Open { .. }) => self.tell(Message::Departed { service: key.0, domain: key.1 }),
            _ => {}
        }
        self.given.insert(
            key,
            Given {
                name: domain.name.clone(),
                shutdown_request: None,
                came_from: None,
                moving_since: None,
                state: GivenState::Unusable(reason.clone()),
            },
        );
        self.tell(Message::Unusable {
            service: key.0,
            known: KnownDomain { domain: domain.reference(), reason },
        });
    }

    /// Passes on a new name, and a new request to shut down.
    fn news(&mut self, key: (usize, DomainId), domain: &Domain) {
        let (service, life) = key;
        let Some(given) = self.given.get_mut(&key) else {
            return;
        };
        let renamed = given.name != domain.name;
        given.name.clone_from(&domain.name);
        let request = domain
            .shutdown_request
            .clone()
            .filter(|request| given.shutdown_request.as_ref() != Some(request));
        given.shutdown_request.clone_from(&domain.shutdown_request);
        if renamed {
            self.tell(Message::Renamed { service, domain: life, name: domain.name.clone() });
        }
        if let Some(request) = request {
            self.tell(Message::ShutdownRequested { service, domain: life, request });
        }
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
                Some(arrival.vif.clone())
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

/// Waits while a lost interface is there: one that is down opens, and is lost again at once. That one is gone is to be
/// told to every service that used it before any finds out by what its domain does not do any more.
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
