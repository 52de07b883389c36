//! A data plane that passes conversations by itself, as the kernel's does: by the engine's own `Flow`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use understudy_protocol::{Aside, Flow, Passage, Rule};

/// See the module.
#[derive(Default)]
pub(crate) struct Plane {
    /// By client: entry and flow.
    flows: BTreeMap<SocketAddr, (u32, Flow)>,
}

impl Plane {
    pub(crate) fn apply(&mut self, rule: &Rule) {
        match rule {
            Rule::HandOver(handover) => {
                self.flows.insert(handover.client, (handover.entry, handover.flow));
            }
            Rule::Extend { entry, bounds } => {
                for (at, flow) in self.flows.values_mut() {
                    if at == entry {
                        flow.bounds = *bounds;
                    }
                }
            }
            Rule::TakeBack { client, .. } => drop(self.flows.remove(client)),
        }
    }

    /// Stops the plane: nothing passes any more.
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
