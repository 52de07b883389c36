//! A data plane that passes conversations by itself, as the one in the kernel does: by the engine's own `Flow`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use understudy_protocol::{Aside, Bounds, Evidence, Flow, Handover, Passage, ServerId};

/// See the module.
#[derive(Default)]
pub(crate) struct Plane {
    /// By client: place and flow.
    flows: BTreeMap<SocketAddr, (u32, Flow)>,
    /// Whom the engine accuses, and of what.
    pub(crate) suspicion: Option<(ServerId, Evidence)>,
}

impl Plane {
    pub(crate) fn install(&mut self, handover: &Handover) {
        self.flows.insert(handover.client, (handover.place, handover.flow));
    }

    pub(crate) fn extend(&mut self, place: u32, bounds: Bounds) {
        for (at, flow) in self.flows.values_mut() {
            if *at == place {
                flow.bounds = bounds;
            }
        }
    }

    pub(crate) fn remove(&mut self, client: SocketAddr) {
        self.flows.remove(&client);
    }

    /// Nothing passes any more.
    pub(crate) fn stop(&mut self) {
        self.flows.clear();
    }

    /// Translates a packet in a client's conversation if it passes.
    pub(crate) fn pass(
        &mut self,
        client: SocketAddr,
        translate: impl FnOnce(&mut Flow) -> Result<u32, Aside>,
    ) -> Passage {
        let Some((_, flow)) = self.flows.get_mut(&client) else { return Passage::Kept };
        match translate(flow) {
            Ok(edge) => Passage::Passed { edge, trusted: false },
            Err(Aside::DaemonFromNow) => {
                self.flows.remove(&client);
                Passage::HandedOver
            }
            Err(_) => Passage::Kept,
        }
    }
}
