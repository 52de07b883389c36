//! The PSC's place on its bridge.

use tokio::time::Instant;
use understudy_api::config;

use super::{ADDRESS_TAKEN, Anchor, Placement, blocking};
use crate::link::anchor::{self, AnchorError, Link};
use crate::link::device::{Device, DeviceError, anchor_filter, mac_text};
use crate::link::psc::Psc;
use crate::message::Message;

impl Placement {
    /// Makes sure that the PSC's anchor is on `bridge`.
    pub(super) async fn anchor(
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

    /// Makes the anchor, or adopts the one that a predecessor left (`is_left`). Fails if dom0 itself has one of the
    /// PSC's addresses, or, before a new anchor comes into use, if another host answers for one.
    pub(super) async fn place(
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
}
