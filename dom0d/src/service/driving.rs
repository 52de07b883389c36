//! The engine drives the plane, the rules and the domains: one service as [`understudy_driver`] wants it.

use understudy_driver::{Driven, Engine as _, Suspicion};
use understudy_protocol::{EventKind, Input, Instant, OperatorError, Output, ServerId};

use super::{Service, Surroundings};
use crate::clock;
use crate::plane::{Change, FastPath, Inbound, Origin};
use crate::report::Happening;
use crate::store::succession::Engine;

/// A service, and what it uses of the data path around it.
struct Driving<'s, 'a> {
    service: &'s mut Service,
    around: &'s mut Surroundings<'a>,
}

impl Driven for Driving<'_, '_> {
    type Engine = Engine;

    fn engine(&mut self) -> &mut Engine {
        &mut self.service.engine
    }

    fn suspicion(&mut self) -> &mut Option<Suspicion> {
        &mut self.service.suspicion
    }

    fn is_ready(&self) -> bool {
        self.service.opening.is_none()
    }

    fn carry_out(&mut self, output: Output) {
        self.service.carry_out(output, self.around);
    }

    fn stop(&mut self) -> bool {
        self.service.plane.fast.as_mut().is_some_and(FastPath::stop)
    }

    fn hear_rest(&mut self, now: Instant) -> bool {
        let rest = self.service.plane.rest();
        if let Some(inbound) = &rest {
            hear(&mut self.service.engine, now, inbound);
        }
        rest.is_some()
    }

    fn resume(&mut self, ovm: Option<ServerId>) {
        let plane = &mut self.service.plane;
        if plane.fast.as_ref().is_some_and(FastPath::is_stopped) {
            plane.change(Change::Ovm(ovm));
        }
    }

    fn is_idle(&self) -> bool {
        self.service.plane.fast.as_ref().is_some_and(FastPath::is_idle)
    }
}

/// Tells the engine of a packet.
pub(super) fn hear(engine: &mut Engine, now: Instant, inbound: &Inbound<'_>) {
    let (passage, packet) = (inbound.passage, &inbound.packet[..]);
    engine.tell(
        now,
        match inbound.from {
            Origin::Client(link) => Input::Client { link, passage, packet },
            Origin::Server(server) => Input::Server { server, passage, packet },
        },
    );
}

impl Service {
    /// Carries out the engine's outputs; `true` if more wait.
    pub(crate) fn drain(&mut self, now: Instant, around: &mut Surroundings<'_>) -> bool {
        understudy_driver::drain(&mut Driving { service: self, around }, now)
    }

    /// Hands the engine an input that may depose the OVM, and carries out what follows. See
    /// [`understudy_driver::cut_over`].
    pub(crate) fn cut_over(
        &mut self,
        now: Instant,
        around: &mut Surroundings<'_>,
        input: Option<Input<'_>>,
    ) -> Result<(), OperatorError> {
        understudy_driver::cut_over(&mut Driving { service: self, around }, now, input)
    }

    /// Every input at hand was handed over. See [`understudy_driver::settle`].
    pub(super) fn settle(&mut self, now: Instant, around: &mut Surroundings<'_>) {
        understudy_driver::settle(&mut Driving { service: self, around }, now);
    }

    fn carry_out(&mut self, output: Output, around: &mut Surroundings<'_>) {
        match output {
            Output::Transmit(packet) => self.plane.transmit(&packet),
            Output::Rule(rule) => self.plane.fast.iter_mut().for_each(|fast| fast.apply(&rule)),
            Output::Cutover { to, .. } => {
                self.plane.change(Change::Ovm(Some(to)));
                self.rules_changed = true;
                if let Some(server) = self.servers.get(&to) {
                    self.memory.begin(&server.domain);
                    self.memory_changed = true;
                }
            }
            Output::Fence(id) => self.fence(id, around),
            Output::Ask(server) => self.plane.presence.ask(server, &mut self.plane.ports),
            Output::StopPlane { .. } => {}
            Output::Event(event) => {
                self.note(&event.kind);
                // The engine dates these events to the instant of their cause; they take effect now.
                let carried_out = matches!(
                    event.kind,
                    EventKind::CutOver { .. } | EventKind::FirstByte { .. } | EventKind::Recuperated { .. }
                );
                let at = if carried_out { clock::now() } else { event.at };
                self.report(at, Happening::Protocol(event.kind), around);
            }
        }
    }
}
