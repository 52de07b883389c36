//! What must dom0's kernel not forward by itself? The nft table `bridge understudy`, replaced as a whole
//! without a moment in which a frame passes that neither the old nor the new one lets through, and removed at
//! a clean end.
//!
//! The OVM's segments of the service are dropped here because dom0d forwards them, rewritten; were the
//! originals to reach a client too, it would answer them with a RST. Everything an RVM sends is dropped
//! but what the operator allows. A guest is known by its vif and by its MAC: one that was migrated within
//! this host may send from a new vif before dom0d knows that one. The table is not the fence (the engine
//! is), so it is rewritten after a promotion and off the packet path.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use nftables::helper::{DEFAULT_ARGS, DEFAULT_NFT, NftablesError, apply_ruleset_raw};
use serde_json::{Value, json};
use understudy_api::config::Allowed;

use super::device::mac_text;
use super::frame::Mac;

const FAMILY: &str = "bridge";
const TABLE: &str = "understudy";

/// Holds the new rules while [`TABLE`] is replaced. One transaction is not enough: a frame that is on its way
/// through the hooks when the kernel changes generations has seen the new chain as not yet active, and sees
/// the old one as not active any more (20 of 2.8 million frames passed in 419 replacements, Linux 6.18).
const MEANWHILE: &str = "understudy_meanwhile";
const CHAIN: &str = "servers";

/// What may pass from the vifs that dom0d knows; vifs that are not in it are nobody's business.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RuleSet {
    /// By the vif's name.
    pub(crate) vifs: BTreeMap<String, VifRules>,
}

/// What may pass from one vif, over all services that its domain belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VifRules {
    /// The guest's MAC.
    pub(crate) mac: Mac,
    /// The guest's part in each of its services.
    pub(crate) parts: Vec<Part>,
}

/// A guest's part in one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
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
}

/// Puts the rules in force.
pub(crate) fn apply(rules: &RuleSet) -> Result<(), String> {
    for transaction in transactions(rules) {
        run(&transaction)?;
    }
    Ok(())
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

/// Starts a thread that puts the newest rules in force and tells, per version, what became of it. It ends
/// when the sender is dropped.
pub(crate) fn spawn_writer(
    tell: impl Fn(u64, Result<(), String>) + Send + 'static,
) -> io::Result<(mpsc::Sender<Numbered>, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel::<Numbered>();
    let thread = std::thread::Builder::new().name("rules".to_owned()).spawn(move || {
        let mut failed: Option<Numbered> = None;
        loop {
            let received = match &failed {
                None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => receiver.recv_timeout(RETRY),
            };
            let newest = match (received, failed.take()) {
                (Ok(first), _) => receiver.try_iter().last().unwrap_or(first),
                (Err(RecvTimeoutError::Timeout), Some(again)) => again,
                (Err(_), _) => return,
            };
            let result = apply(&newest.rules);
            tell(newest.version, result.clone());
            failed = result.is_err().then_some(newest);
        }
    })?;
    Ok((sender, thread))
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
    // A chain for each vif, found by look-ups: frames of everybody else pass three rules, however many vifs
    // there are.
    let mut by_vif = Vec::new();
    let mut by_mac = BTreeMap::new();
    for (number, (vif, vif_rules)) in rules.vifs.iter().enumerate() {
        let chain = format!("server{number}");
        commands.push(json!({"add": {"chain": {"family": FAMILY, "table": name, "name": chain}}}));
        for expressions in vif_rules.expressions() {
            commands.push(json!({"add": {"rule": {
                "family": FAMILY, "table": name, "chain": chain, "expr": expressions,
            }}}));
        }
        let jump = json!({"jump": {"target": chain}});
        by_vif.push(json!([vif, jump]));
        // Two domains of one MAC are a mistake that must not cost the others their rules.
        by_mac.entry(mac_text(vif_rules.mac)).or_insert(jump);
    }
    if !by_vif.is_empty() {
        // What the kernel's part of the data plane has translated speaks for the PSC.
        let marked = matches(json!({"meta": {"key": "mark"}}), json!(understudy_bpf::layout::MARK));
        commands.push(json!({"add": {"rule": {
            "family": FAMILY, "table": name, "chain": CHAIN, "expr": [marked, {"accept": null}],
        }}}));
        let by_mac: Vec<Value> = by_mac.into_iter().map(|(mac, jump)| json!([mac, jump])).collect();
        let vif = json!({"meta": {"key": "iifname"}});
        for (key, verdicts) in [(vif, by_vif), (payload("ether", "saddr"), by_mac)] {
            let expression = json!({"vmap": {"key": key, "data": {"set": verdicts}}});
            commands.push(json!({"add": {"rule": {
                "family": FAMILY, "table": name, "chain": CHAIN, "expr": [expression],
            }}}));
        }
    }
    json!({"nftables": commands})
}

impl VifRules {
    fn expressions(&self) -> Vec<Vec<Value>> {
        let mut rules = Vec::new();
        for part in &self.parts {
            rules.extend(part.never());
        }
        // A domain that is the OVM of one service must be able to talk, whatever it is in another.
        if !self.parts.iter().any(|part| part.is_ovm) {
            for part in &self.parts {
                rules.extend(part.allowed());
            }
            rules.push(vec![json!({"counter": null}), json!({"drop": null})]);
        }
        rules
    }
}

impl Part {
    /// What a server of this service never sends by itself, OVM or not.
    fn never(&self) -> Vec<Vec<Value>> {
        let mut rules = vec![vec![matches(payload("ether", "saddr"), json!(mac_text(self.psc_mac)))]];
        for &address in &self.psc {
            rules.push(vec![matches(source(address), json!(address.to_string()))]);
            if address.is_ipv4() {
                rules.push(vec![is_arp(), matches(payload("arp", "saddr ip"), json!(address.to_string()))]);
            }
        }
        for &address in &self.addresses {
            rules.push(vec![
                matches(source(address), json!(address.to_string())),
                matches(payload("tcp", "sport"), json!({"set": self.ports})),
            ]);
        }
        for rule in &mut rules {
            rule.push(json!({"counter": null}));
            rule.push(json!({"drop": null}));
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
            for address in &self.addresses {
                rules.push(match address {
                    IpAddr::V4(v4) => vec![
                        is_arp(),
                        matches(payload("arp", "operation"), json!("reply")),
                        matches(payload("arp", "saddr ip"), json!(v4.to_string())),
                    ],
                    IpAddr::V6(v6) => vec![
                        matches(payload("ip6", "saddr"), json!(v6.to_string())),
                        matches(payload("icmpv6", "type"), json!("nd-neighbor-advert")),
                    ],
                });
            }
        }
        for rule in &mut rules {
            rule.push(json!({"accept": null}));
        }
        rules
    }
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
            is_ovm,
            addresses: vec!["10.77.0.11".parse().unwrap(), "fd77::11".parse().unwrap()],
            ports: vec![6379, 80],
            psc: vec!["10.77.0.100".parse().unwrap(), "fd77::100".parse().unwrap()],
            psc_mac: [2, 0, 0, 0, 0, 1],
            allow,
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
            set.vifs.insert(vif.to_owned(), VifRules { mac, parts: vec![part(true, vec![])] });
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
        assert_eq!(commands[4]["add"]["chain"]["name"], "server0");
        let text: Vec<String> = commands.iter().map(Value::to_string).collect();
        let [.., by_vif, by_mac] = &text[..] else { unreachable!("rules") };
        assert!(by_vif.contains("vif1.0") && by_vif.contains("server1"), "{by_vif}");
        assert!(by_mac.contains("00:16:3e:00:00:01") && !by_mac.contains("server1"), "{by_mac}");
    }
}
