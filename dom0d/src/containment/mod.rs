//! What must dom0's kernel not forward by itself? The nft table `bridge understudy`, replaced as a whole
//! without a moment in which a frame passes that neither the old nor the new one lets through, put back when
//! somebody else changes it, and removed at a clean end.
//!
//! The OVM's segments of the service are dropped here because dom0d forwards them, rewritten; were the
//! originals to reach a client too, it would answer them with a RST. Everything an RVM sends is dropped
//! but what the operator allows, on each of its vifs. What is for a server's own address at a port of the service is
//! dropped, too: by that, a client would change one server behind the others' backs. A guest is known by its vifs and
//! their MACs: one that was migrated within this host may send from a new vif before dom0d knows that one. The table is
//! not the fence (the engine is), so it is rewritten after a promotion and off the packet path.

mod ruleset_watch;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nftables::helper::{DEFAULT_ARGS, DEFAULT_NFT, NftablesError, apply_ruleset_raw};
use serde_json::{Value, json};
use understudy_api::config::Allowed;
use understudy_bpf::Holds;
use understudy_bpf::layout::Hold;

use self::ruleset_watch::RulesetWatch;
use crate::link::device::mac_text;
use crate::link::frame::Mac;

const FAMILY: &str = "bridge";
/// The same for the kernel (NFPROTO_BRIDGE).
const FAMILY_NUMBER: u8 = 7;
const TABLE: &str = "understudy";

/// Holds the new rules while [`TABLE`] is replaced. One transaction is not enough: a frame that is on its way
/// through the hooks when the kernel changes generations has seen the new chain as not yet active, and sees
/// the old one as not active any more (20 of 2.8 million frames passed in 419 replacements, Linux 6.18).
const MEANWHILE: &str = "understudy_meanwhile";
const CHAIN: &str = "servers";

/// The chain that dom0's own frames pass.
const OWN: &str = "own";

/// Why frames are dropped, each counted per service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Refusal {
    /// A guest says that it is the PSC.
    Claim,
    /// A server that is not the OVM says something that nobody allowed.
    Contained,
    /// A server is spoken to at its own address.
    Direct,
}

impl Refusal {
    pub(crate) const ALL: [Self; 3] = [Self::Claim, Self::Contained, Self::Direct];

    /// Its name among the counters of a service's plane.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Claim => "claims_refused",
            Self::Contained => "contained_frames",
            Self::Direct => "direct_refused",
        }
    }

    /// The nft counter of a service, given by its place in the configuration.
    fn counter(self, service: usize) -> String {
        format!("{}_{service}", self.name())
    }

    /// Which refusal of which service a counter of this name is for.
    fn of_counter(name: &str) -> Option<(usize, Self)> {
        let (name, service) = name.rsplit_once('_')?;
        let refusal = Self::ALL.into_iter().find(|refusal| refusal.name() == name)?;
        Some((service.parse().ok()?, refusal))
    }
}

/// Frames dropped, by the service's place in the configuration.
pub(crate) type Refused = BTreeMap<(usize, Refusal), u64>;

/// What may pass from the vifs that dom0d knows; vifs that are not in it are nobody's business.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RuleSet {
    /// By the vif's name.
    pub(crate) vifs: BTreeMap<String, VifRules>,
}

/// What may pass from one vif, over all services that its domain belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VifRules {
    /// The number of its interface, if it has one.
    pub(crate) index: Option<u32>,
    /// The guest's MAC.
    pub(crate) mac: Mac,
    /// The guest's part in each of its services.
    pub(crate) parts: Vec<Part>,
}

/// A guest's part in one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The service's place in the configuration.
    pub(crate) service: usize,
    /// It is the OVM; else everything is dropped.
    pub(crate) is_ovm: bool,
    /// The guest's addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// The service's ports.
    pub(crate) ports: Vec<u16>,
    /// The PSC's addresses, which no guest may speak for.
    pub(crate) psc: Vec<IpAddr>,
    /// The PSC's MAC.
    pub(crate) psc_mac: Mac,
    /// What it may send as an RVM.
    pub(crate) allow: Vec<Allowed>,
    /// Others may speak to its own addresses at the service's ports.
    pub(crate) direct: bool,
}

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

/// Removes the table; done if there is none.
pub(crate) fn remove() -> Result<(), String> {
    run(&removal(&[TABLE, MEANWHILE]))
}

fn removal(names: &[&str]) -> Value {
    let commands = names.iter().flat_map(|name| {
        let table = json!({"family": FAMILY, "name": name});
        // Deleting what is not there is an error, adding what is there is none.
        [json!({"add": {"table": table}}), json!({"delete": {"table": table}})]
    });
    json!({"nftables": commands.collect::<Vec<_>>()})
}

fn run(commands: &Value) -> Result<(), String> {
    let payload = commands.to_string();
    let args = DEFAULT_ARGS.iter().copied();
    match apply_ruleset_raw(&payload, DEFAULT_NFT, args) {
        Ok(_) => Ok(()),
        Err(NftablesError::NftFailed { stderr, .. }) => {
            Err(format!("nft refused the table `{FAMILY} {TABLE}`: {}", stderr.trim()))
        }
        Err(other) => Err(format!("nft can't be run (package nftables): {other}")),
    }
}

/// The steps of a replacement: in each, one table stays as it is.
fn transactions(rules: &RuleSet) -> [Value; 3] {
    [replacement(MEANWHILE, rules), replacement(TABLE, rules), removal(&[MEANWHILE])]
}

/// One transaction that replaces whatever a table held, also what a crashed dom0d left.
fn replacement(name: &str, rules: &RuleSet) -> Value {
    let table = json!({"family": FAMILY, "name": name});
    let mut commands = vec![
        json!({"add": {"table": table}}),
        json!({"delete": {"table": table}}),
        json!({"add": {"table": table}}),
        // Before the bridge decides where a frame goes: bound for dom0 itself it must be dropped too.
        json!({"add": {"chain": {
            "family": FAMILY, "table": name, "name": CHAIN,
            "type": "filter", "hook": "prerouting", "prio": -300, "policy": "accept",
        }}}),
    ];
    if rules.vifs.is_empty() {
        return json!({"nftables": commands});
    }
    commands.push(json!({"add": {"chain": {
        "family": FAMILY, "table": name, "name": OWN,
        "type": "filter", "hook": "output", "prio": -300, "policy": "accept",
    }}}));
    let chain = |chain: &str| json!({"add": {"chain": {"family": FAMILY, "table": name, "name": chain}}});
    let rule = |chain: &str, expressions: Vec<Value>| json!({"add": {"rule": {"family": FAMILY, "table": name, "chain": chain, "expr": expressions}}});
    let jump = |chain: &str| json!({"jump": {"target": chain}});
    for service in rules.services() {
        for refusal in Refusal::ALL {
            let counter = json!({"family": FAMILY, "table": name, "name": refusal.counter(service)});
            commands.push(json!({"add": {"counter": counter}}));
        }
        commands.push(chain(&direct_chain(service)));
        commands.push(rule(&direct_chain(service), refuse(Refusal::Direct, service)));
    }
    // A chain for each vif, found by look-ups: frames of everybody else pass a few rules, however many vifs
    // there are.
    let mut by_vif = Vec::new();
    let mut by_mac = BTreeMap::new();
    for (number, (vif, vif_rules)) in rules.vifs.iter().enumerate() {
        let server = format!("server{number}");
        commands.push(chain(&server));
        commands.extend(vif_rules.expressions().into_iter().map(|expressions| rule(&server, expressions)));
        by_vif.push(json!([vif, jump(&server)]));
        // Two domains of one MAC are a mistake that must not cost the others their rules.
        by_mac.entry(mac_text(vif_rules.mac)).or_insert(jump(&server));
    }
    // What the kernel's part of the data plane has translated speaks for the PSC.
    let marked = matches(json!({"meta": {"key": "mark"}}), json!(understudy_bpf::layout::MARK));
    commands.push(rule(CHAIN, vec![marked, json!({"accept": null})]));
    for expressions in rules.direct() {
        commands.extend([CHAIN, OWN].map(|chain| rule(chain, expressions.clone())));
    }
    let by_mac: Vec<Value> = by_mac.into_iter().map(|(mac, jump)| json!([mac, jump])).collect();
    let vif = json!({"meta": {"key": "iifname"}});
    for (key, verdicts) in [(vif, by_vif), (payload("ether", "saddr"), by_mac)] {
        commands.push(rule(CHAIN, vec![verdict_map(&key, &verdicts)]));
    }
    json!({"nftables": commands})
}

fn direct_chain(service: usize) -> String {
    format!("direct{service}")
}

fn verdict_map(key: &Value, verdicts: &[Value]) -> Value {
    json!({"vmap": {"key": key, "data": {"set": verdicts}}})
}

impl RuleSet {
    /// What tc programs need to know of the vifs, by the numbers of their interfaces.
    fn holds(&self) -> BTreeMap<u32, Hold> {
        self.vifs.values().filter_map(|vif| Some((vif.index?, vif.hold()))).collect()
    }

    /// The services that vifs have a part in.
    fn services(&self) -> BTreeSet<usize> {
        self.vifs.values().flat_map(|vif| &vif.parts).map(|part| part.service).collect()
    }

    /// What is for a server's own address at a port of its service, whoever says it.
    fn direct(&self) -> Vec<Vec<Value>> {
        let mut by_address = [BTreeMap::new(), BTreeMap::new()];
        let mut by_mac = BTreeMap::new();
        for vif in self.vifs.values() {
            for part in vif.parts.iter().filter(|part| !part.direct && !part.addresses.is_empty()) {
                let jump = json!({"jump": {"target": direct_chain(part.service)}});
                by_mac.entry(mac_text(vif.mac)).or_insert(jump.clone());
                for &address in &part.addresses {
                    let ports = part.ports.iter().map(|&port| ((address, port), jump.clone()));
                    by_address[usize::from(address.is_ipv6())].extend(ports);
                }
            }
        }
        let mut rules = Vec::new();
        for (protocol, verdicts) in ["ip", "ip6"].into_iter().zip(by_address) {
            let verdicts: Vec<Value> = verdicts
                .into_iter()
                .map(|((address, port), jump)| json!([{"concat": [address.to_string(), port]}, jump]))
                .collect();
            if !verdicts.is_empty() {
                let key = json!({"concat": [payload(protocol, "daddr"), payload("tcp", "dport")]});
                rules.push(vec![verdict_map(&key, &verdicts)]);
            }
        }
        if !by_mac.is_empty() {
            let verdicts: Vec<Value> = by_mac.into_iter().map(|(mac, jump)| json!([mac, jump])).collect();
            rules.push(vec![is_tagged_twice(), verdict_map(&payload("ether", "daddr"), &verdicts)]);
        }
        rules
    }
}

impl VifRules {
    /// What may go on from it. Of more than there is room for, the first; the rest stays held.
    fn hold(&self) -> Hold {
        let is_ovm = self.parts.iter().any(|part| part.is_ovm);
        let mut hold = Hold { is_ovm: is_ovm.into(), ..Hold::default() };
        let mut udp = hold.udp.iter_mut();
        let mut tcp = hold.tcp.iter_mut();
        let ports = self.parts.iter().filter(|_| is_ovm).flat_map(|part| &part.ports);
        for (port, place) in ports.zip(tcp.by_ref()) {
            *place = *port;
        }
        for allowed in self.parts.iter().filter(|_| !is_ovm).flat_map(|part| &part.allow) {
            hold.found = 1;
            let (place, port) = match allowed {
                Allowed::Dhcp => {
                    hold.dhcp = 1;
                    continue;
                }
                Allowed::Udp(port) => (udp.next(), port),
                Allowed::Tcp(port) => (tcp.next(), port),
            };
            if let Some(place) = place {
                *place = *port;
            }
        }
        let (mut v4, mut v6) = (hold.v4.chunks_exact_mut(4), hold.v6.chunks_exact_mut(16));
        // In several services it has the same.
        for address in self.parts.iter().flat_map(|part| &part.addresses).collect::<BTreeSet<_>>() {
            match address {
                IpAddr::V4(address) => v4.next().map(|place| place.copy_from_slice(&address.octets())),
                IpAddr::V6(address) => v6.next().map(|place| place.copy_from_slice(&address.octets())),
            };
        }
        hold
    }

    fn expressions(&self) -> Vec<Vec<Value>> {
        let mut rules = Vec::new();
        for part in &self.parts {
            rules.extend(part.never());
        }
        // A domain that is the OVM of one service must be able to talk, whatever it is in another.
        if let Some(first) = self.parts.first()
            && !self.parts.iter().any(|part| part.is_ovm)
        {
            for part in &self.parts {
                rules.extend(part.allowed());
            }
            rules.push(refuse(Refusal::Contained, first.service));
        }
        rules
    }
}

impl Part {
    /// What a server of this service never sends by itself, OVM or not.
    fn never(&self) -> Vec<Vec<Value>> {
        let mut rules = vec![
            vec![matches(payload("ether", "saddr"), json!(mac_text(self.psc_mac)))],
            // Kernels take off any number of tags that name no VLAN: what is behind two can't be read here.
            vec![is_tagged_twice()],
        ];
        for &address in &self.psc {
            rules.push(vec![matches(source(address), json!(address.to_string()))]);
            match address {
                IpAddr::V4(v4) => {
                    rules.push(vec![is_arp(), matches(payload("arp", "saddr ip"), json!(v4.to_string()))]);
                }
                // Whatever it says that its own address is.
                IpAddr::V6(v6) => rules.push(advertises(v6)),
            }
        }
        for rule in &mut rules {
            rule.extend(refuse(Refusal::Claim, self.service));
        }
        for &address in &self.addresses {
            rules.push(vec![
                matches(source(address), json!(address.to_string())),
                matches(payload("tcp", "sport"), json!({"set": self.ports})),
                json!({"counter": null}),
                json!({"drop": null}),
            ]);
        }
        rules
    }

    /// What the operator lets an RVM send.
    fn allowed(&self) -> Vec<Vec<Value>> {
        let mut rules = Vec::new();
        for allowed in &self.allow {
            match allowed {
                Allowed::Dhcp => {
                    for (from, to) in [(68, 67), (546, 547)] {
                        rules.push(vec![
                            matches(payload("udp", "sport"), json!(from)),
                            matches(payload("udp", "dport"), json!(to)),
                        ]);
                    }
                }
                Allowed::Udp(port) => {
                    rules.push(vec![matches(payload("udp", "dport"), json!(port))]);
                }
                Allowed::Tcp(port) => {
                    rules.push(vec![matches(payload("tcp", "dport"), json!(port))]);
                }
            }
        }
        if !rules.is_empty() {
            // Answers to what is allowed need a neighbour's address on the way back.
            for &address in &self.addresses {
                rules.push(match address {
                    IpAddr::V4(v4) => vec![
                        is_arp(),
                        matches(payload("arp", "operation"), json!("reply")),
                        matches(payload("arp", "saddr ip"), json!(v4.to_string())),
                    ],
                    IpAddr::V6(v6) => {
                        let mut rule = vec![matches(source(address), json!(v6.to_string()))];
                        rule.extend(advertises(v6));
                        rule
                    }
                });
            }
        }
        for rule in &mut rules {
            rule.push(json!({"accept": null}));
        }
        rules
    }
}

/// Counts and drops.
fn refuse(refusal: Refusal, service: usize) -> Vec<Value> {
    vec![json!({"counter": refusal.counter(service)}), json!({"drop": null})]
}

/// A neighbour advertisement of this address (RFC 4861 §4.4), also behind extension headers.
fn advertises(address: Ipv6Addr) -> Vec<Value> {
    let target = json!({"payload": {"base": "th", "offset": 64, "len": 128}});
    vec![
        // As for ARP.
        matches(json!({"meta": {"key": "protocol"}}), json!("ip6")),
        matches(payload("icmpv6", "type"), json!("nd-neighbor-advert")),
        matches(target, json!(format!("{:#034x}", u128::from(address)))),
    ]
}

/// The outer tag is beside the frame by then.
fn is_tagged_twice() -> Value {
    matches(json!({"meta": {"key": "protocol"}}), json!({"set": ["0x8100", "0x88a8", "0x9100"]}))
}

fn matches(left: Value, right: Value) -> Value {
    json!({"match": {"op": "==", "left": left, "right": right}})
}

/// For ARP, nft by itself looks at the EtherType in the frame, which is the tag's where there is one (nft 1.0.6).
fn is_arp() -> Value {
    matches(json!({"meta": {"key": "protocol"}}), json!("arp"))
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn source(address: IpAddr) -> Value {
    payload(if address.is_ipv4() { "ip" } else { "ip6" }, "saddr")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn part(is_ovm: bool, allow: Vec<Allowed>) -> Part {
        Part {
            service: 7,
            is_ovm,
            addresses: vec!["10.77.0.11".parse().unwrap(), "fd77::11".parse().unwrap()],
            ports: vec![6379, 80],
            psc: vec!["10.77.0.100".parse().unwrap(), "fd77::100".parse().unwrap()],
            psc_mac: [2, 0, 0, 0, 0, 1],
            allow,
            direct: false,
        }
    }

    /// The rules of one vif, as text.
    fn rules(parts: Vec<Part>) -> Vec<String> {
        let vif_rules = VifRules { parts, ..VifRules::default() };
        let rules = vif_rules.expressions();
        rules.iter().map(|rule| json!(rule).to_string()).collect()
    }

    #[test]
    fn an_ovm_may_send_all_but_the_service() {
        let rules = rules(vec![part(true, vec![])]);
        assert!(rules.iter().all(|rule| rule.contains("match")), "{rules:?}");
        assert!(rules.iter().any(|rule| rule.contains("10.77.0.11") && rule.contains("6379")));
        assert!(rules.iter().any(|rule| rule.contains("fd77::11") && rule.contains("6379")));
        assert!(rules.iter().any(|rule| rule.contains("10.77.0.100")));
    }

    #[test]
    fn an_rvm_may_send_nothing_but_what_is_allowed() {
        let rules = rules(vec![part(false, vec![Allowed::Udp(123)])]);
        let last = rules.last().unwrap();
        assert!(last.contains("drop") && !last.contains("match"), "{last}");
        let accepted: Vec<_> = rules.iter().filter(|rule| rule.contains("accept")).collect();
        assert_eq!(accepted.len(), 3, "{accepted:?}");
        assert!(accepted[0].contains("123"));
        // Of no address but its own.
        assert!(accepted[2].contains("0xfd770000000000000000000000000011"), "{}", accepted[2]);
    }

    #[test]
    fn nobody_advertises_the_psc_whatever_its_own_address_is() {
        let rules = rules(vec![part(true, vec![])]);
        let claim = rules.iter().find(|rule| rule.contains("0xfd770000000000000000000000000100")).unwrap();
        assert!(claim.contains("claims_refused_7") && !claim.contains("saddr"), "{claim}");
        assert!(rules.iter().any(|rule| rule.contains("0x88a8") && rule.contains("claims_refused_7")));
    }

    #[test]
    fn tc_holds_whoever_is_no_ovm_but_for_what_is_allowed() {
        let mut set = RuleSet::default();
        for (index, is_ovm) in [(3, true), (4, false)] {
            let parts = vec![part(is_ovm, vec![Allowed::Udp(123), Allowed::Dhcp, Allowed::Tcp(443)])];
            let vif = VifRules { index: Some(index), parts, ..VifRules::default() };
            set.vifs.insert(format!("vif{index}.0"), vif);
        }
        let holds = set.holds();
        let ovm = &holds[&3];
        assert_eq!((ovm.is_ovm, ovm.found, ovm.dhcp, &ovm.tcp[..3]), (1, 0, 0, &[6379, 80, 0][..]));
        let hold = &holds[&4];
        assert_eq!((hold.is_ovm, hold.v4[3], ovm.v4[3]), (0, 11, 11));
        assert_eq!((hold.udp[0], hold.udp[1], hold.tcp[0], hold.dhcp, hold.found), (123, 0, 443, 1, 1));
        assert_eq!(hold.v4[..5], [10, 77, 0, 11, 0]);
        assert_eq!((hold.v6[0], hold.v6[15], hold.v6[16]), (0xfd, 0x11, 0));
    }

    #[test]
    fn a_counter_is_known_by_its_name() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::of_counter(&refusal.counter(12)), Some((12, refusal)));
        }
        assert_eq!(Refusal::of_counter("claims_refused"), None);
    }

    #[test]
    fn what_is_for_a_servers_own_address_is_dropped_unless_the_operator_lets_it_pass() {
        let mut set = RuleSet::default();
        set.vifs
            .insert("vif1.0".to_owned(), VifRules { parts: vec![part(true, vec![])], ..VifRules::default() });
        let text = json!(set.direct()).to_string();
        for wanted in ["10.77.0.11", "fd77::11", "6379", "80", "direct7", "00:00:00:00:00:00"] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        let mut open = part(true, vec![]);
        open.direct = true;
        set.vifs.insert("vif1.0".to_owned(), VifRules { parts: vec![open], ..VifRules::default() });
        assert!(set.direct().is_empty());
    }

    #[test]
    fn the_ovm_of_one_service_and_rvm_of_another_may_talk_but_for_both_services() {
        let mut other = part(false, vec![]);
        other.ports = vec![5432];
        let rules = rules(vec![part(true, vec![]), other]);
        assert!(rules.iter().all(|rule| rule.contains("match")), "{rules:?}");
        assert!(rules.iter().any(|rule| rule.contains("5432")));
    }

    #[test]
    fn a_whole_table_stays_at_each_step_of_a_replacement() {
        let mut set = RuleSet::default();
        for vif in ["vif1.0", "vif2.0"] {
            let mac = [0, 0x16, 0x3e, 0, 0, 1];
            set.vifs.insert(vif.to_owned(), VifRules { index: None, mac, parts: vec![part(true, vec![])] });
        }
        let touched = transactions(&set).map(|transaction| {
            let text = transaction.to_string();
            (text.contains("\"understudy\""), text.contains("\"understudy_meanwhile\""))
        });
        assert_eq!(touched, [(false, true), (true, false), (false, true)]);
        let commands = replacement(TABLE, &set);
        let commands = commands["nftables"].as_array().unwrap();
        assert!(commands[0]["add"]["table"].is_object());
        assert!(commands[1]["delete"]["table"].is_object());
        assert!(commands[2]["add"]["table"].is_object());
        assert_eq!(commands[3]["add"]["chain"]["hook"], "prerouting");
        assert!(commands.iter().any(|command| command["add"]["chain"]["name"] == "server0"));
        let text: Vec<String> = commands.iter().map(Value::to_string).collect();
        let [.., by_vif, by_mac] = &text[..] else { unreachable!("rules") };
        assert!(by_vif.contains("vif1.0") && by_vif.contains("server1"), "{by_vif}");
        assert!(by_mac.contains("00:16:3e:00:00:01") && !by_mac.contains("server1"), "{by_mac}");
    }
}
