//! Decides whether a domain can serve in a service as this host is set up, from what xenstore and netlink say. Where it
//! can't, the reason tells the remedy.

use std::net::IpAddr;

use understudy_api::config;

use crate::discovery::{Domain, INCOMING, Vif, XENBUS_CONNECTED, is_incoming, sent_away};
use crate::link::anchor::{Link, LinkKind};
use crate::link::vif::{self, Arrival};

/// The domain's place in the service's configuration: 0 for the OVM, then the RVMs in their order;
/// `None` if it does not belong to the service.
pub(crate) fn rank(service: &config::Service, domain: &Domain) -> Option<usize> {
    if is_incoming(&domain.name) {
        return None;
    }
    let name = sent_away(&domain.name).unwrap_or(&domain.name);
    let matches = |selector: &config::Selector| selector.matches(name, domain.uuid);
    if matches(&service.ovm) {
        return Some(0);
    }
    let place = service.rvms.iter().position(matches)?;
    Some(place + 1)
}

/// Whether a domain belongs to the service, or will once it has been received.
pub(crate) fn is_of(service: &config::Service, domain: &Domain) -> bool {
    let received =
        domain.name.strip_suffix(INCOMING).map(|name| Domain { name: name.to_owned(), ..domain.clone() });
    rank(service, received.as_ref().unwrap_or(domain)).is_some()
}

/// The bridge that the service's PSC belongs on.
pub(crate) fn bridge<'a>(
    service: &config::Service,
    domains: &[&Domain],
    links: &'a [Link],
) -> Result<&'a Link, String> {
    let by_name = |name: &str| links.iter().find(|link| link.name == name);
    if let Some(name) = &service.bridge {
        return match by_name(name) {
            Some(link) if link.kind == LinkKind::Bridge => Ok(link),
            Some(link) if link.kind == LinkKind::OpenVswitch => {
                Err(format!("{name} is an Open vSwitch bridge, which is not supported; use a Linux bridge"))
            }
            Some(_) => Err(format!("{name} is no bridge; name the Linux bridge that the vifs are ports of")),
            None => Err(format!("there is no interface {name}; create the bridge, or correct `bridge`")),
        };
    }
    let vifs = domains.iter().flat_map(|domain| &domain.vifs);
    let mut masters = vifs
        .filter_map(|vif| by_name(&vif.name)?.master)
        .filter_map(|index| links.iter().find(|link| link.index == index));
    masters
        .find(|link| link.kind == LinkKind::Bridge)
        .ok_or_else(|| {
            "no domain of the service has a vif on a Linux bridge yet, so the PSC's bridge is not known; start the domains, or set `bridge`".to_owned()
        })
}

/// Whether a domain has the PSC's address: held back, as it is then, it can't tell when it is asked.
pub(crate) fn unclaimed(service: &config::Service, domains: &[&Domain]) -> Result<(), String> {
    for domain in domains {
        let mut addresses = domain.vifs.iter().flat_map(|vif| &vif.ips);
        if let Some(address) = addresses.find(|address| service.engine.psc.contains(address)) {
            return Err(format!(
                "the PSC's address {address} is in use by {}; give that domain one of its own, or choose another PSC",
                domain.name
            ));
        }
    }
    Ok(())
}

/// Since when the kernel cuts a large frame with a tag that a packet socket sends; older ones lose it, and say nothing.
const CUTS_TAGGED: (u32, u32) = (5, 19);

/// Whether a service's VLAN, if it is in one, can be served by the kernel of this release (`uname -r`).
pub(crate) fn vlan(service: &config::Service, release: &str) -> Result<(), String> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match service.vlan {
        Some(_) if version < CUTS_TAGGED => Err(format!(
            "a `vlan` needs Linux 5.19 or newer, and this is {release}; update dom0's kernel, or give the service an untagged bridge (one per VLAN)"
        )),
        _ => Ok(()),
    }
}

/// How `domain` can serve on `bridge`. What `is_contained` names, tc programs can hold back wherever it is connected.
pub(crate) fn usable(
    service: &config::Service,
    domain: &Domain,
    bridge: &Link,
    links: &[Link],
    is_contained: impl Fn(&str) -> bool,
) -> Result<Arrival, String> {
    let vif = vif_on(domain, bridge, links)?;
    for any in &domain.vifs {
        let emulated = format!("{}-emu", any.name);
        if links.iter().any(|link| link.name == emulated) {
            return Err(format!(
                "has an emulated network card ({emulated}), whose frames pass the vif by; give it type=vif in the domain's vif= list, or use type=\"pvh\""
            ));
        }
    }
    containable(domain, vif, links, is_contained)?;
    if vif.state != XENBUS_CONNECTED {
        return Err(format!(
            "its vif {} is not connected yet (state {}); the guest is starting, or has no netfront driver",
            vif.name, vif.state
        ));
    }
    let addresses = addresses(service, domain, vif)?;
    let link = links.iter().find(|link| link.name == vif.name);
    let mtu = link.map_or(1500, |link| link.mtu);
    Ok(Arrival {
        domain: domain.reference(),
        vif: vif::Vif {
            name: vif.name.clone(),
            mac: vif.mac,
            addresses,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        },
    })
}

/// Whether what the domain sends through other vifs than that it serves by can be held back while it is a replica.
fn containable(
    domain: &Domain,
    serving: &Vif,
    links: &[Link],
    is_contained: impl Fn(&str) -> bool,
) -> Result<(), String> {
    if let Some(devid) = domain.foreign_vifs.first() {
        return Err(format!(
            "its vif {devid} has its backend in another domain, where nothing holds back what a replica sends; driver domains are not supported, give that vif a backend in dom0"
        ));
    }
    let others = domain.vifs.iter().filter(|vif| vif.devid != serving.devid);
    for vif in others.filter(|vif| !is_contained(&vif.name)) {
        let name = &vif.name;
        let Some(link) = links.iter().find(|link| link.name == *name) else {
            continue;
        };
        let master = link.master.and_then(|index| links.iter().find(|link| link.index == index));
        if master.is_none_or(|master| master.kind != LinkKind::Bridge) {
            return Err(format!(
                "its other vif {name} is not a port of a Linux bridge, so what a replica sends there can't be held back; put it on one (vif-bridge), or take it from the domain"
            ));
        }
    }
    Ok(())
}

fn vif_on<'a>(domain: &'a Domain, bridge: &Link, links: &[Link]) -> Result<&'a Vif, String> {
    let mut reason = "has no vif with a backend in dom0; driver domains are not supported".to_owned();
    for vif in &domain.vifs {
        let name = &vif.name;
        let Some(link) = links.iter().find(|link| link.name == *name) else {
            reason = format!("its vif {name} is no interface of dom0 (yet)");
            continue;
        };
        let master = link.master.and_then(|index| links.iter().find(|link| link.index == index));
        match master {
            Some(master) if master.index == bridge.index => return Ok(vif),
            Some(master) if master.kind == LinkKind::OpenVswitch => {
                reason = format!(
                    "its vif {name} is a port of Open vSwitch, which is not supported; use a Linux bridge (vif-bridge)"
                );
            }
            Some(master) => {
                reason = format!(
                    "its vif {name} is a port of {}, and the PSC is on {}; put both on one bridge",
                    master.name, bridge.name
                );
            }
            None => {
                let meant = vif.bridge.as_deref();
                reason = format!(
                    "its vif {name} is a port of no bridge{}; vif-route and vif-nat are not supported, use vif-bridge",
                    meant.map(|meant| format!(" (meant for {meant})")).unwrap_or_default()
                );
            }
        }
    }
    Err(reason)
}

fn addresses(service: &config::Service, domain: &Domain, vif: &Vif) -> Result<Vec<IpAddr>, String> {
    let name = sent_away(&domain.name).unwrap_or(&domain.name);
    let configured = service.addresses.iter().find(|(selector, _)| selector.matches(name, domain.uuid));
    let given = configured.map_or(vif.ips.as_slice(), |(_, addresses)| addresses);
    let remedy = format!(
        "give `ip=` in the domain's vif= list, or `addresses = {{ \"{}\" = [...] }}` in the service",
        domain.name
    );
    let mut chosen = Vec::with_capacity(2);
    for psc in &service.engine.psc {
        let family = if psc.is_ipv4() { "IPv4" } else { "IPv6" };
        let mut same = given.iter().copied().filter(|address| address.is_ipv4() == psc.is_ipv4());
        match (same.next(), same.next()) {
            (None, _) => {
                return Err(format!("its {family} address is not known, and the PSC has one; {remedy}"));
            }
            (Some(_), Some(_)) => {
                return Err(format!(
                    "has several {family} addresses; name the one that the service listens on in the service's `addresses`"
                ));
            }
            (Some(address), None) if address == *psc => {
                return Err(format!(
                    "its address {address} is the PSC's, which is dom0d's alone; give the guest one of its own"
                ));
            }
            (Some(address), None) => chosen.push(address),
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use uuid::Uuid;

    use super::*;

    fn service(keys: &str) -> config::Service {
        let text = format!(
            "[[service]]\nname = \"s\"\npsc = \"10.77.0.100\"\nports = [80]\novm = \"a\"\nrvms = [\"b\", \"c*\"]\n{keys}"
        );
        text.parse::<config::Config>().unwrap().services.remove(0)
    }

    fn domain(name: &str) -> Domain {
        Domain {
            domid: 1,
            uuid: Uuid::from_u128(1),
            name: name.to_owned(),
            vifs: vec![Vif {
                devid: 0,
                name: "vif1.0".to_owned(),
                mac: [0, 0x16, 0x3e, 0, 0, 1],
                bridge: Some("xenbr0".to_owned()),
                state: XENBUS_CONNECTED,
                ips: vec!["10.77.0.11".parse().unwrap()],
            }],
            foreign_vifs: Vec::new(),
            received: false,
            shutdown_request: None,
        }
    }

    fn link(index: u32, name: &str, kind: LinkKind, master: Option<u32>) -> Link {
        Link { index, name: name.to_owned(), kind, master, mtu: 1500, ours: false }
    }

    fn links() -> Vec<Link> {
        vec![
            link(2, "xenbr0", LinkKind::Bridge, None),
            link(3, "vif1.0", LinkKind::Other, Some(2)),
            link(4, "xenbr1", LinkKind::Bridge, None),
            link(5, "ovs-system", LinkKind::OpenVswitch, None),
        ]
    }

    fn reason(domain: &Domain, links: &[Link], keys: &str) -> String {
        let bridge = links[0].clone();
        usable(&service(keys), domain, &bridge, links, |_| false).unwrap_err()
    }

    #[test]
    fn domains_rank_as_the_configuration_names_them() {
        let service = service("");
        for (name, expected) in [
            ("a", Some(0)),
            ("b", Some(1)),
            ("c9", Some(2)),
            ("d", None),
            ("a--incoming", None),
            ("a--migratedaway", Some(0)),
        ] {
            assert_eq!(rank(&service, &domain(name)), expected, "{name}");
        }
        assert!(is_of(&service, &domain("c9--incoming")) && !is_of(&service, &domain("d--incoming")));
    }

    #[test]
    fn the_ovms_vif_tells_the_bridge_unless_the_configuration_does() {
        let links = links();
        let a = domain("a");
        assert_eq!(bridge(&service(""), &[&a], &links).unwrap().name, "xenbr0");
        let other = service("bridge = \"xenbr1\"");
        assert_eq!(bridge(&other, &[&a], &links).unwrap().name, "xenbr1");
        for (keys, expected) in [
            ("bridge = \"nobr\"", "there is no interface nobr"),
            ("bridge = \"vif1.0\"", "is no bridge"),
            ("bridge = \"ovs-system\"", "Open vSwitch"),
        ] {
            let error = bridge(&service(keys), &[&a], &links).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let error = bridge(&service(""), &[], &links).unwrap_err();
        assert!(error.contains("set `bridge`"), "{error}");
    }

    #[test]
    fn a_vlan_needs_a_kernel_that_does_not_lose_its_large_frames() {
        for (release, works) in [
            ("6.1.0-39-amd64", true),
            ("5.19.0", true),
            ("5.18.19-rt7", false),
            ("5.10.0-30-amd64", false),
            ("7.0", true),
            ("", false),
        ] {
            assert_eq!(vlan(&service("vlan = 5"), release).is_ok(), works, "{release}");
            assert_eq!(vlan(&service(""), release), Ok(()));
        }
    }

    #[test]
    fn a_domain_on_the_bridge_with_an_address_is_usable() {
        let links = links();
        let arrival = usable(&service(""), &domain("a"), &links[0], &links, |_| false).unwrap();
        assert_eq!(arrival.vif.name, "vif1.0");
        assert_eq!(arrival.vif.addresses, ["10.77.0.11".parse::<IpAddr>().unwrap()]);
        assert_eq!(arrival.vif.mtu, 1500);
    }

    #[test]
    fn every_vif_can_be_contained_or_the_domain_is_refused() {
        let mut two = domain("a");
        two.vifs.push(Vif { devid: 1, name: "vif1.1".to_owned(), ..two.vifs[0].clone() });
        // Not there yet, on another bridge, on none, on Open vSwitch.
        assert!(usable(&service(""), &two, &links()[0], &links(), |_| false).is_ok());
        for (master, is_fine) in [(Some(4), true), (None, false), (Some(5), false)] {
            let mut links = links();
            links.push(link(9, "vif1.1", LinkKind::Other, master));
            let result = usable(&service(""), &two, &links[0], &links, |_| false);
            assert_eq!(result.is_ok(), is_fine, "{result:?}");
            assert!(result.is_ok_and(|arrival| arrival.vif.name == "vif1.0") || !is_fine);
            assert!(usable(&service(""), &two, &links[0], &links, |vif| vif == "vif1.1").is_ok());
        }
        let mut elsewhere = domain("a");
        elsewhere.foreign_vifs = vec![1];
        assert!(reason(&elsewhere, &links(), "").contains("vif 1 has its backend in another domain"));
    }

    #[test]
    fn configured_addresses_win_over_the_toolstacks() {
        let links = links();
        let service = service("addresses = { \"a\" = \"10.77.0.99\" }");
        for name in ["a", "a--migratedaway"] {
            let arrival = usable(&service, &domain(name), &links[0], &links, |_| false).unwrap();
            assert_eq!(arrival.vif.addresses, ["10.77.0.99".parse::<IpAddr>().unwrap()]);
        }
    }

    #[test]
    fn setups_that_can_not_work_are_refused_with_the_reason() {
        let mut no_vif = domain("a");
        no_vif.vifs.clear();
        assert!(reason(&no_vif, &links(), "").contains("driver domains"));

        let mut missing = domain("a");
        missing.vifs[0].name = "vif9.0".to_owned();
        assert!(reason(&missing, &links(), "").contains("vif9.0 is no interface"));

        for (master, expected) in [
            (Some(4), "is a port of xenbr1, and the PSC is on xenbr0"),
            (Some(5), "Open vSwitch"),
            (None, "vif-route and vif-nat"),
        ] {
            let mut links = links();
            links[1].master = master;
            let reason = reason(&domain("a"), &links, "");
            assert!(reason.contains(expected), "{reason}");
        }

        let mut emulated = links();
        emulated.push(link(9, "vif1.0-emu", LinkKind::Other, Some(2)));
        assert!(reason(&domain("a"), &emulated, "").contains("vif1.0-emu"));

        let mut starting = domain("a");
        starting.vifs[0].state = 2;
        assert!(reason(&starting, &links(), "").contains("not connected yet (state 2)"));

        let mut nameless = domain("a");
        nameless.vifs[0].ips.clear();
        assert!(reason(&nameless, &links(), "").contains("IPv4 address is not known"));

        let mut several = domain("a");
        several.vifs[0].ips.push("10.77.0.12".parse().unwrap());
        assert!(reason(&several, &links(), "").contains("several IPv4"));

        let mut psc = domain("b");
        assert_eq!(unclaimed(&service(""), &[&domain("a"), &psc]), Ok(()));
        psc.vifs[0].ips = vec!["10.77.0.100".parse().unwrap()];
        let claimed = unclaimed(&service(""), &[&domain("a"), &psc]).unwrap_err();
        assert!(claimed.contains("10.77.0.100 is in use by b"), "{claimed}");

        let mut psc = domain("a");
        psc.vifs[0].ips = vec!["10.77.0.100".parse().unwrap()];
        assert!(reason(&psc, &links(), "").contains("is the PSC's"));
    }
}
