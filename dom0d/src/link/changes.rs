//! Learns from the kernel (rtnetlink) when interfaces must be looked at again: an interface came, went or changed or
//! lost its filters, or the bridge forgot a PSC.

use std::io;
use std::sync::Arc;

use futures_util::StreamExt;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::neighbour::NeighbourAttribute;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::frame::Mac;

/// The pending notice. Any number of changes until it is taken counts as one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes(Arc<Notify>);

impl Changes {
    /// Listens from now on, until the runtime ends.
    pub(crate) fn listen(psc_macs: Vec<Mac>) -> io::Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Tc, MulticastGroup::Neigh];
        let (connection, _, mut messages) = new_multicast_connection(&groups)?;
        tokio::spawn(connection);
        let changes = Self::default();
        let told = changes.clone();
        tokio::spawn(async move {
            while let Some((message, _)) = messages.next().await {
                if matters(&message.payload, &psc_macs) {
                    told.0.notify_one();
                }
            }
        });
        Ok(changes)
    }

    /// Resolves after the next change, but not before then.
    pub(crate) async fn next(&self, not_before: Instant) {
        sleep_until(not_before).await;
        self.0.notified().await;
    }
}

fn matters(payload: &NetlinkPayload<RouteNetlinkMessage>, psc_macs: &[Mac]) -> bool {
    match payload {
        NetlinkPayload::InnerMessage(message) => match message {
            // What a bridge says of its ports (learning, states) comes in a family of its own.
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
                link.header.interface_family != AddressFamily::Bridge
            }
            RouteNetlinkMessage::DelQueueDiscipline(_) | RouteNetlinkMessage::DelTrafficFilter(_) => true,
            // Bridges forget others by the second.
            RouteNetlinkMessage::DelNeighbour(entry) => {
                entry.attributes.iter().any(|attribute| match attribute {
                    NeighbourAttribute::LinkLayerAddress(mac) => {
                        psc_macs.iter().any(|psc| psc[..] == mac[..])
                    }
                    _ => false,
                })
            }
            _ => false,
        },
        // Some were lost.
        NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}
