//! What xenstore says of all domains: one walk through the nodes that dom0 owns.
//!
//! A domain that comes or goes meanwhile is left out, a node that makes no sense is counted and its
//! domain or vif skipped; only a failing connection fails the walk.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;
use xenstore_rs::AsyncXs;

use super::{Domain, Snapshot, Vif};

/// Longest wait for xenstored's answer to one request. xenstore-rs leaves requests unanswered for
/// good when its connection dies under them.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A node's value, or why there is none.
enum Node<T> {
    Value(T),
    Missing,
    Garbage,
}

/// Lists all domains but dom0.
pub(crate) async fn list(xenstore: &impl AsyncXs) -> io::Result<Snapshot> {
    let mut walk = Walk { xenstore, garbage: 0 };
    let mut domains = Vec::new();
    for child in walk.children("/local/domain").await? {
        match child.parse::<u16>() {
            Ok(0) => {}
            Ok(domid) => domains.extend(walk.domain(domid).await?),
            Err(_) => walk.garbage += 1,
        }
    }
    domains.sort_by_key(|domain| domain.domid);
    Ok(Snapshot { domains, garbage: walk.garbage })
}

/// Asks something cheap, to see whether xenstored still answers.
pub(crate) async fn alive(xenstore: &impl AsyncXs) -> io::Result<()> {
    let path = "/local/domain/0/domid";
    answered(path, xenstore.read(path)).await.map(|_| ())
}

/// What a toolstack asks of a domain now.
pub(crate) async fn request_to(xenstore: &impl AsyncXs, domid: u16) -> io::Result<Option<String>> {
    Walk { xenstore, garbage: 0 }.request(domid).await
}

struct Walk<'a, X> {
    xenstore: &'a X,
    garbage: u64,
}

/// The node is the guest's to write, too: only what a toolstack asks (or nothing, once it is obeyed) counts.
fn shutdown_request(text: &str) -> Option<String> {
    ["", "poweroff", "reboot", "halt", "suspend", "s3", "crash"].contains(&text).then(|| text.to_owned())
}

impl<X: AsyncXs> Walk<'_, X> {
    async fn domain(&mut self, domid: u16) -> io::Result<Option<Domain>> {
        let home = format!("/local/domain/{domid}");
        let uuid = self.parsed(&format!("{home}/vm"), vm_uuid).await?;
        let name = self.parsed(&format!("{home}/name"), some_text).await?;
        let (Some(uuid), Some(name)) = (uuid, name) else {
            return Ok(None);
        };
        let shutdown_request = self.request(domid).await?;
        let mut vifs = Vec::new();
        let backends = format!("/local/domain/0/backend/vif/{domid}");
        for child in self.children(&backends).await? {
            match child.parse::<u32>() {
                Ok(devid) => vifs.extend(self.vif(domid, devid).await?),
                Err(_) => self.garbage += 1,
            }
        }
        vifs.sort_by_key(|vif| vif.devid);
        let foreign_vifs = self.foreign_vifs(domid).await?;
        Ok(Some(Domain { domid, uuid, name, vifs, foreign_vifs, received: false, shutdown_request }))
    }

    /// By libxl's own copy, which no guest can write.
    async fn foreign_vifs(&mut self, domid: u16) -> io::Result<Vec<u32>> {
        let home = format!("/libxl/{domid}/device/vif");
        let mut foreign = Vec::new();
        for child in self.children(&home).await? {
            let path = format!("{home}/{child}/backend");
            let is_foreign = self.parsed(&path, |text| Some(!text.starts_with("/local/domain/0/"))).await?;
            if is_foreign == Some(true) {
                foreign.extend(child.parse::<u32>().ok());
            }
        }
        foreign.sort_unstable();
        Ok(foreign)
    }

    async fn request(&mut self, domid: u16) -> io::Result<Option<String>> {
        let path = format!("/local/domain/{domid}/control/shutdown");
        Ok(self.parsed(&path, shutdown_request).await?.filter(|request| !request.is_empty()))
    }

    async fn vif(&mut self, domid: u16, devid: u32) -> io::Result<Option<Vif>> {
        let home = format!("/local/domain/0/backend/vif/{domid}/{devid}");
        // A backend directory whose frontend is somebody else's is not this domain's vif.
        let frontend = format!("/local/domain/{domid}/device/vif/{devid}");
        let ours = self.parsed(&format!("{home}/frontend"), |text| (text == frontend).then_some(())).await?;
        let mac = self.parsed(&format!("{home}/mac"), mac).await?;
        let state = self.parsed(&format!("{home}/state"), |text| text.parse().ok()).await?;
        let name = self.parsed(&format!("{home}/vifname"), some_text).await?;
        let bridge = self.parsed(&format!("{home}/bridge"), some_text).await?;
        let ips = self.parsed(&format!("{home}/ip"), addresses).await?;
        let (Some(()), Some(mac), Some(state)) = (ours, mac, state) else {
            return Ok(None);
        };
        Ok(Some(Vif {
            devid,
            name: name.unwrap_or_else(|| format!("vif{domid}.{devid}")),
            mac,
            bridge,
            state,
            ips: ips.unwrap_or_default(),
        }))
    }

    /// A node's value; `None` if it is missing, or is counted as garbage.
    async fn parsed<T>(
        &mut self,
        path: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> io::Result<Option<T>> {
        let node = match answered(path, self.xenstore.read(path)).await? {
            Node::Value(text) => parse(&text).map_or(Node::Garbage, Node::Value),
            Node::Missing => Node::Missing,
            Node::Garbage => Node::Garbage,
        };
        Ok(match node {
            Node::Value(value) => Some(value),
            Node::Missing => None,
            Node::Garbage => {
                self.garbage += 1;
                tracing::debug!(path, "xenstore: the node makes no sense");
                None
            }
        })
    }

    async fn children(&mut self, path: &str) -> io::Result<Vec<Box<str>>> {
        Ok(match answered(path, self.xenstore.directory(path)).await? {
            Node::Value(children) => children,
            Node::Missing => Vec::new(),
            Node::Garbage => {
                self.garbage += 1;
                Vec::new()
            }
        })
    }
}

/// Tells a missing or senseless node from a connection that fails.
async fn answered<T>(path: &str, request: impl Future<Output = io::Result<T>>) -> io::Result<Node<T>> {
    match timeout(REQUEST_TIMEOUT, request).await {
        Ok(Ok(value)) => Ok(Node::Value(value)),
        Ok(Err(error)) => match error.kind() {
            ErrorKind::NotFound => Ok(Node::Missing),
            // Not UTF-8, or an answer that xenstore-rs can't read.
            ErrorKind::InvalidData | ErrorKind::InvalidInput => Ok(Node::Garbage),
            _ => Err(io::Error::new(error.kind(), format!("{path}: {error}"))),
        },
        Err(_) => Err(io::Error::new(
            ErrorKind::TimedOut,
            format!("{path}: no answer within {} s", REQUEST_TIMEOUT.as_secs()),
        )),
    }
}

fn vm_uuid(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text.strip_prefix("/vm/")?).ok()
}

fn some_text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    let unicast = mac[0] & 1 == 0 && mac != [0; 6];
    (parts.next().is_none() && unicast).then_some(mac)
}

/// The toolstack's `ip=`: addresses separated by spaces (xl) or commas.
fn addresses(text: &str) -> Option<Vec<IpAddr>> {
    text.split([' ', ','])
        .filter(|part| !part.is_empty())
        .map(|part| {
            // vif-route's scripts take a prefix length along; the address is what counts here.
            let address = part.split_once('/').map_or(part, |(address, _)| address);
            address.parse().ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use super::*;

    /// A tree of nodes, as xenstored keeps one.
    struct Tree(BTreeMap<String, String>);

    impl AsyncXs for Tree {
        async fn directory(&self, path: &str) -> io::Result<Vec<Box<str>>> {
            let prefix = format!("{path}/");
            let mut children: Vec<Box<str>> = Vec::new();
            for key in self.0.keys().filter_map(|key| key.strip_prefix(&prefix)) {
                let child = key.split('/').next().unwrap_or(key);
                if children.last().is_none_or(|last| **last != *child) {
                    children.push(child.into());
                }
            }
            if children.is_empty() {
                return Err(ErrorKind::NotFound.into());
            }
            Ok(children)
        }

        async fn read(&self, path: &str) -> io::Result<Box<str>> {
            match self.0.get(path).map(String::as_str) {
                Some("\u{fffd}") => Err(ErrorKind::InvalidData.into()),
                Some(text) => Ok(text.into()),
                None => Err(ErrorKind::NotFound.into()),
            }
        }

        async fn write(&self, _: &str, _: &str) -> io::Result<()> {
            Err(ErrorKind::Unsupported.into())
        }

        async fn rm(&self, _: &str) -> io::Result<()> {
            Err(ErrorKind::Unsupported.into())
        }
    }

    const GUEST: &[(&str, &str)] = &[
        ("/local/domain/0/name", "Domain-0"),
        ("/local/domain/3/name", "redis-1"),
        ("/local/domain/3/vm", "/vm/2f8b5f0e-3c53-4d0a-9d8e-1f2f3a4b5c6d"),
        ("/local/domain/0/backend/vif/3/0/frontend", "/local/domain/3/device/vif/0"),
        ("/local/domain/0/backend/vif/3/0/mac", "00:16:3e:00:00:03"),
        ("/local/domain/0/backend/vif/3/0/state", "4"),
        ("/local/domain/0/backend/vif/3/0/bridge", "xenbr0"),
        ("/local/domain/0/backend/vif/3/0/ip", "10.77.0.13 fd77::13"),
    ];

    async fn listed(changes: &[(&str, Option<&str>)]) -> Snapshot {
        let mut tree: BTreeMap<String, String> =
            GUEST.iter().map(|&(path, value)| (path.to_owned(), value.to_owned())).collect();
        for &(path, value) in changes {
            match value {
                Some(value) => tree.insert(path.to_owned(), value.to_owned()),
                None => tree.remove(path),
            };
        }
        list(&Tree(tree)).await.unwrap()
    }

    #[tokio::test]
    async fn a_guest_is_listed_and_dom0_is_not() {
        let snapshot = listed(&[]).await;
        assert_eq!(snapshot.garbage, 0);
        let [domain] = &snapshot.domains[..] else {
            unreachable!("one domain: {snapshot:?}");
        };
        assert_eq!((domain.domid, domain.name.as_str()), (3, "redis-1"));
        let vif = &domain.vifs[0];
        assert_eq!(vif.name, "vif3.0");
        assert_eq!(vif.mac, [0, 0x16, 0x3e, 0, 0, 3]);
        assert_eq!(vif.bridge.as_deref(), Some("xenbr0"));
        assert_eq!(vif.ips.len(), 2);
    }

    #[tokio::test]
    async fn the_backends_own_name_for_a_vif_counts() {
        let snapshot = listed(&[("/local/domain/0/backend/vif/3/0/vifname", Some("redis0"))]).await;
        assert_eq!(snapshot.domains[0].vifs[0].name, "redis0");
    }

    #[tokio::test]
    async fn a_vif_of_a_driver_domain_is_noticed() {
        let snapshot = listed(&[
            ("/libxl/3/device/vif/0/backend", Some("/local/domain/0/backend/vif/3/0")),
            ("/libxl/3/device/vif/1/backend", Some("/local/domain/2/backend/vif/3/1")),
        ])
        .await;
        assert_eq!(snapshot.domains[0].foreign_vifs, [1]);
    }

    #[tokio::test]
    async fn garbage_is_counted_and_skipped() {
        for (path, value, domains, vifs) in [
            ("/local/domain/x/name", "a", 1, 1),
            ("/local/domain/70000/name", "a", 1, 1),
            ("/local/domain/3/vm", "/vm/none", 0, 0),
            ("/local/domain/3/name", "\u{fffd}", 0, 0),
            ("/local/domain/3/name", "", 0, 0),
            ("/local/domain/0/backend/vif/3/0/mac", "00:16", 1, 0),
            ("/local/domain/0/backend/vif/3/0/mac", "01:00:00:00:00:00", 1, 0),
            ("/local/domain/0/backend/vif/3/0/state", "four", 1, 0),
            ("/local/domain/0/backend/vif/3/0/frontend", "/local/domain/4/device/vif/0", 1, 0),
            ("/local/domain/0/backend/vif/3/0/ip", "10.77.0.300", 1, 1),
            ("/local/domain/0/backend/vif/3/zero/mac", "", 1, 1),
            ("/local/domain/3/control/shutdown", "what a guest may write", 1, 1),
        ] {
            let snapshot = listed(&[(path, Some(value))]).await;
            assert_eq!(snapshot.garbage, 1, "{path} = {value:?}");
            assert_eq!(snapshot.domains.len(), domains, "{path} = {value:?}");
            let found: usize = snapshot.domains.iter().map(|d| d.vifs.len()).sum();
            assert_eq!(found, vifs, "{path} = {value:?}");
        }
    }

    #[tokio::test]
    async fn a_domain_that_is_being_built_is_left_out_without_a_complaint() {
        for missing in ["/local/domain/3/name", "/local/domain/3/vm"] {
            let snapshot = listed(&[(missing, None)]).await;
            assert_eq!((snapshot.domains.len(), snapshot.garbage), (0, 0));
        }
        let snapshot = listed(&[("/local/domain/0/backend/vif/3/0/mac", None)]).await;
        assert!(snapshot.domains[0].vifs.is_empty());
        assert_eq!(snapshot.garbage, 0);
    }
}
