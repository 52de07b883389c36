//! The rules as an nft table, and its replacement.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use nftables::helper::{DEFAULT_ARGS, DEFAULT_NFT, NftablesError, apply_ruleset_raw};
use serde_json::{Value, json};
use understudy_api::config::Allowed;

use super::{Part, Refusal, RuleSet, VifRules};
use crate::link::device::mac_text;

const FAMILY: &str = "bridge";
/// The same for the kernel (NFPROTO_BRIDGE).
pub(super) const FAMILY_NUMBER: u8 = 7;
pub(super) const TABLE: &str = "understudy";

/// Holds the new rules while [`TABLE`] is replaced. One transaction is not enough: a frame that is on its way
/// through the hooks when the kernel changes generations has seen the new chain as not yet active, and sees
/// the old one as not active any more (20 of 2.8 million frames passed in 419 replacements, Linux 6.18).
const MEANWHILE: &str = "understudy_meanwhile";
const CHAIN: &str = "servers";

/// The chain that dom0's own frames pass.
const OWN: &str = "own";

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

/// Has nft carry out commands.
pub(super) fn run(commands: &Value) -> Result<(), String> {
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
pub(super) fn transactions(rules: &RuleSet) -> [Value; 3] {
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

    use super::super::tests::part;
    use super::*;

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
