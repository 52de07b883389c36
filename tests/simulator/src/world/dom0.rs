//! What happens at dom0 in a run: the engine is fed and drained as its documentation says, and the observer
//! and the checkers see all of it.

use understudy_protocol::{
    Destination, EventKind, Evidence, Input, LinkAddress, OperatorError, Output, Passage, Rule, ServerId,
    Service, Sign, StaleReason,
};

use super::{Event, Known, LINK_QUESTION, World, link_address, psc};
use crate::disguise::{complete_checksum, readdress};
use crate::fault::When;
use crate::guest::Health;
use crate::hostile::{is_hostile, is_nobody};
use crate::observer::{Conversation, Observer, Seen};
use crate::segment::Segment;

impl World {
    pub(super) fn see(&mut self, seen: &Seen<'_>) {
        let silent =
            self.lies_served || Observer::is_of_hostile(seen) || self.observer.is_long_over(seen, self.now);
        for checker in self.checkers.iter_mut().filter(|_| !silent) {
            if let Err(text) = checker.see(&self.observer, self.now, seen) {
                let rule = checker.rule();
                self.observer.record(self.now, seen);
                self.fail(rule, text);
                return;
            }
        }
        self.observer.record(self.now, seen);
    }

    pub(super) fn client_says(&mut self, client: usize, packet: &[u8]) {
        let mut whole = packet.to_vec();
        complete_checksum(&mut whole);
        self.trace.packet(self.now, &format!("client {client} >"), &whole);
        if let Ok(segment) = Segment::taken(&whole) {
            self.own_syns.remove(&segment.src);
            self.see(&Seen::FromClient(&segment));
        }
        if self.bare && Segment::parse(&whole).is_ok() {
            let mut packet = whole.clone();
            let to = self.guests[0].addresses.clone();
            readdress(&mut packet, None, Some(&to));
            self.carry_to_server(0, packet);
        }
        if self.bare {
            return;
        }
        if self.plane_takes_from_client(client, &whole, packet) {
            return;
        }
        self.tell(Input::Client { link: link_address(client), passage: Passage::Kept, packet });
        self.after_packet();
    }

    pub(super) fn server_says(&mut self, guest: usize, packet: &[u8]) {
        let id = self.guests[guest].id;
        let mut whole = packet.to_vec();
        complete_checksum(&mut whole);
        self.trace.packet(self.now, &format!("{id:?} >"), &whole);
        let to = Segment::parse(&whole).map(|segment| segment.dst.ip());
        if let Ok(to) = to
            && is_nobody(to)
            && self.service.ovm() == Some(id)
        {
            // It asks for that address, and nobody answers. Replicas' questions are answered by dom0.
            return self.asks_in_vain(id, to);
        }
        if let Ok(segment) = Segment::parse(&whole)
            && !self.own_syns.contains(&segment.dst)
        {
            self.see(&Seen::FromServer(id, &segment));
        }
        if self.bare {
            let client = Segment::parse(&whole).ok().and_then(|s| {
                let to = s.dst.ip();
                self.clients.iter().position(|c| c.addresses.contains(&to))
            });
            readdress(&mut whole, Some(&psc()), None);
            if let Some(client) = client {
                self.carry_to_client(client, whole);
            }
            return;
        }
        if self.plane_takes_from_server(id, &whole, packet) {
            return;
        }
        self.check_repetition(id, packet);
        self.tell(Input::Server { server: id, passage: Passage::Kept, packet });
        self.after_packet();
        self.settle();
    }

    /// A server told its link address, as a living kernel does.
    pub(super) fn sign_of(&mut self, guest: usize) {
        let id = self.guests[guest].id;
        self.trace.line(self.now, || format!("{id:?} > its address"));
        self.tell(Input::Sign { server: id, sign: Sign::Answered });
        self.drain();
        self.settle();
    }

    /// Who writes down what the engine hears may leave out what it can recall.
    pub(super) fn check_repetition(&mut self, id: ServerId, packet: &[u8]) {
        let Some((head, tail)) = self.service.repetition(id, packet) else { return };
        self.coverage.hit("engine.repetition recalled");
        if self.service.recall(&tail).is_none_or(|bytes| [head, &bytes].concat() != packet) {
            self.fail("repetition", "the engine recalls something else than the replica said".into());
        }
    }

    pub(super) fn after_packet(&mut self) {
        self.drain();
        self.packets += 1;
        for index in 0..self.pending.len() {
            if self.pending[index].when == When::Packets(self.packets) {
                self.strike(index);
            }
        }
        if self.packets.is_multiple_of(64) || self.now > self.last_status + 1_000_000 {
            self.last_status = self.now;
            let status = self.service.status();
            self.see(&Seen::Status(&status));
        }
    }

    /// Tells the engine what it can't refuse.
    pub(super) fn tell(&mut self, input: Input<'_>) {
        if let Err(error) = self.service.handle(self.instant(), input) {
            self.fail("input", format!("what is no command is refused: {error}"));
        }
    }

    /// Does what may depose the OVM, as the daemon does it.
    pub(super) fn cut_over(&mut self, input: Input<'_>) -> Result<(), OperatorError> {
        let result = understudy_driver::cut_over(self, self.instant(), Some(input));
        self.drain();
        result
    }

    /// The daemon has nothing left to hear.
    pub(super) fn settle(&mut self) {
        understudy_driver::settle(self, self.instant());
        self.drain();
    }

    /// Drains the engine, and sees to its timer.
    pub(super) fn drain(&mut self) {
        self.restore_sometimes();
        while understudy_driver::drain(self, self.instant()) {}
        if self.failure.is_some() {
            return;
        }
        let Some(at) = self.service.next_timeout() else {
            self.timer = None;
            return;
        };
        let lateness = self.rng.between(0, self.knobs.timer_lateness_us);
        let due = at.as_micros().max(self.now) + lateness;
        if self.timer != Some(due) && self.timer.is_none_or(|t| due < t || t < self.now) {
            self.timer = Some(due);
            self.push(due, Event::EngineTimer);
        }
    }

    /// Another process goes on with what this one's engine saved; nothing else may tell the difference.
    fn restore_sometimes(&mut self) {
        if !self.restores.chance(self.knobs.restores_per_million) {
            return;
        }
        let saved = self.service.save();
        match Service::restore(&saved) {
            Ok(service) => self.service = service,
            Err(error) => return self.fail("saved", error.to_string()),
        }
        if self.service.save() != saved {
            self.fail("saved", "the engine saves something else than it was restored from".into());
        }
        self.coverage.hit("engine.restored");
    }

    pub(super) fn transmit_to_client(&mut self, link: LinkAddress, packet: Vec<u8>) {
        let client = usize::from(link.0[5]);
        self.trace.packet(self.now, &format!("> client {client}"), &packet);
        let segment = match Segment::parse(&packet) {
            Ok(segment) => segment,
            Err(why) => {
                self.fail("well-formed", format!("a client is sent a packet with {why}"));
                return;
            }
        };
        let wrong = if !self.observer.psc.contains(&segment.src) {
            Some("does not come from the PSC")
        } else if !is_hostile(segment.dst.ip())
            && !self.clients.get(client).is_some_and(|c| c.addresses.contains(&segment.dst.ip()))
        {
            Some("goes to another client's link address")
        } else if packet.len() > 9000 {
            Some("is longer than any MTU")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            let text = format!("a segment {wrong}: {segment}");
            self.fail("well-formed", text);
            return;
        }
        if segment.seq > u32::MAX - 70_000 && segment.syn {
            self.coverage.hit("wrap.server");
        }
        self.see(&Seen::ToClient(&segment));
        self.carry_to_client(client, packet);
    }

    fn carry_to_client(&mut self, client: usize, packet: Vec<u8>) {
        let queue = &mut self.queue;
        let queued = &mut self.queued;
        self.client_down[client].carry(self.now, packet, |at, packet| {
            *queued += 1;
            queue.insert((at, *queued), Event::ToClient(client, packet));
        });
    }

    pub(super) fn transmit_to_server(&mut self, id: ServerId, packet: Vec<u8>) {
        self.trace.packet(self.now, &format!("> {id:?}"), &packet);
        let Some(guest) = self.guest_of(id) else {
            self.fail("well-formed", format!("a packet to {id:?}, which never was"));
            return;
        };
        let segment = match Segment::parse(&packet) {
            Ok(segment) => segment,
            Err(why) => {
                self.fail("well-formed", format!("{id:?} is sent a packet with {why}"));
                return;
            }
        };
        let wrong = if !self.guests[guest].addresses.contains(&segment.dst.ip()) {
            Some("does not go to the guest's own address")
        } else if packet.len() > usize::from(self.guests[guest].mtu()) && self.observer.ovm != Some(id) {
            Some("is longer than the vif's MTU")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            let text = format!("a segment {wrong}: {segment}");
            self.fail("well-formed", text);
            return;
        }
        if segment.seq > u32::MAX - 70_000 && segment.syn {
            self.coverage.hit("wrap.client");
        }
        if segment.syn && self.observer.conversation_of(segment.src, segment.dst).is_none() {
            // No client's: the daemon asks for the service.
            self.own_syns.insert(segment.src);
            self.coverage.hit("engine.asked for the service");
        }
        if !self.own_syns.contains(&segment.src) {
            self.see(&Seen::ToServer(id, &segment));
        }
        self.carry_to_server(guest, packet);
    }

    fn carry_to_server(&mut self, guest: usize, packet: Vec<u8>) {
        let queue = &mut self.queue;
        let queued = &mut self.queued;
        self.guest_down[guest].carry(self.now, packet, |at, packet| {
            *queued += 1;
            queue.insert((at, *queued), Event::ToServer(guest, packet));
        });
    }

    /// Carries out what the engine wants done, as long as no rule is broken.
    pub(super) fn carry_out_or_fail(&mut self, output: Output) {
        if self.failure.is_some() {
            return;
        }
        if !matches!(output, Output::Transmit(_)) {
            self.trace.line(self.now, || format!("output {output:?}"));
        }
        match output {
            Output::Transmit(transmit) => {
                self.restore_sometimes();
                for packet in transmit.packets() {
                    match transmit.to {
                        Destination::Client(link) => self.transmit_to_client(link, packet),
                        Destination::Server(id) => self.transmit_to_server(id, packet),
                    }
                }
            }
            Output::Cutover { from, to, .. } => {
                self.see(&Seen::Cutover { to });
                if let Some(plane) = &mut self.plane {
                    plane.activate(Some(to));
                }
                let Some(from) = from else { return };
                self.deposed = Some(from);
                self.promotions += 1;
                self.coverage.hit(match self.promotions {
                    1 => "promotion.first",
                    2 => "promotion.second",
                    3 => "promotion.third",
                    _ => "promotion.further",
                });
                self.note(format!("{from:?} -> {to:?}"));
                self.untrue_served |= self.untrue.contains(&to);
                // It lacks what the reset conversations said.
                let heard = |c: &Conversation| c.legs.get(&to).is_some_and(|leg| leg.reset);
                self.forgetful_served |=
                    self.resetters.contains(&to) && !self.observer.conversations.iter().any(heard);
                self.lies_served |= self.observer.liars.contains(&to);
                if let Some(why) = self.impaired.get(&to) {
                    self.excuse.get_or_insert(why);
                }
                for index in 0..self.pending.len() {
                    if let When::AfterPromotion(n, wait) = self.pending[index].when
                        && n == self.promotions
                    {
                        self.push(self.now + wait, Event::Strike(index));
                    }
                }
            }
            Output::Fence(id) => {
                let at = self.now + self.knobs.fence_us;
                self.push(at, Event::Fenced(id));
            }
            Output::Ask(id) => {
                self.coverage.hit("engine.asked for a sign");
                if let Some(guest) = self.guest_of(id) {
                    self.carry_to_server(guest, LINK_QUESTION);
                }
            }
            Output::StopPlane { .. } => {}
            Output::Rule(rule) => {
                if matches!(rule, Rule::HandOver(_)) {
                    self.coverage.hit("plane.handed over");
                }
                if let Some(plane) = &mut self.plane {
                    plane.apply(&rule);
                }
            }
            Output::Event(event) => {
                self.event(&event.kind);
                self.see(&Seen::Event(&event.kind));
            }
        }
    }

    fn event(&mut self, kind: &EventKind) {
        match kind {
            EventKind::Suspected { server, evidence } => {
                // smoltcp does not always send into a window that opens again. That is no progress.
                let idle = self.guest_of(*server).is_some_and(|g| self.guests[g].holds_back(self.now));
                // Nor does it answer a repeated SYN before its own timer runs out.
                let deaf = self.guest_of(*server).is_some_and(|g| self.guests[g].is_half_open());
                // Or it repeats more than there is a window for, which counts as sent and is not passed on.
                let overran = |c: &Conversation| c.legs.get(server).is_some_and(|leg| leg.overran);
                let idle = idle || self.observer.conversations.iter().any(overran);
                if idle && *evidence == Evidence::NoProgress
                    || deaf && *evidence == Evidence::UnacknowledgedSegment
                {
                    self.blemish(*server);
                }
                self.note(format!("{evidence:?}"));
                self.coverage.hit(&format!("evidence.{evidence:?}"));
            }
            EventKind::NoCandidate { .. } => {
                self.coverage.hit("event.no candidate");
                self.excuse.get_or_insert("nothing was promotable");
            }
            EventKind::Seeded { server } | EventKind::Attached { server, seeded: true } => {
                self.coverage.hit("event.seeded");
                self.copy_state(*server);
            }
            EventKind::Evicted { server, reason } => {
                self.coverage.hit("event.evicted");
                // A server that comes later has a link without faults.
                let lossy =
                    |guest: usize| self.knobs.guest_links.get(guest).is_some_and(|link| !link.faithful());
                self.lost_behind_lossy |=
                    *reason == StaleReason::Lagged && self.guest_of(*server).is_some_and(lossy);
            }
            EventKind::Stale { .. } => self.coverage.hit("event.stale"),
            EventKind::Diverged { .. } => self.coverage.hit("event.diverged"),
            EventKind::Recuperated { .. } => self.coverage.hit("event.recuperated"),
            EventKind::Unprotected { .. } => self.coverage.hit("event.unprotected"),
            EventKind::Reset { .. } => self.coverage.hit("event.reset"),
            _ => {}
        }
    }

    /// What an operator did who states that a server's state equals the OVM's.
    fn copy_state(&mut self, server: ServerId) {
        let ovm = self.service.ovm().and_then(|id| self.guest_of(id));
        if let (Some(ovm), Some(guest)) = (ovm, self.guest_of(server)) {
            self.guests[guest].shared = self.guests[ovm].shared.clone();
        }
    }

    pub(super) fn daemon_poll(&mut self) {
        let mut evidence = Vec::new();
        for index in 0..self.guests.len() {
            let guest = &self.guests[index];
            let state = match guest.health {
                Health::Gone => Known::Gone,
                _ if guest.paused() => Known::Paused,
                _ => Known::Running,
            };
            if core::mem::replace(&mut self.known[index], state) == state {
                continue;
            }
            let id = guest.id;
            self.tell(Input::Running { server: id, running: state == Known::Running });
            match state {
                Known::Gone => evidence.push((id, Evidence::DomainGone)),
                Known::Paused if !self.fenced[index] => evidence.push((id, Evidence::DomainPaused)),
                _ => {}
            }
        }
        for (server, evidence) in evidence {
            self.trace.line(self.now, || format!("daemon: {server:?} {evidence:?}"));
            let input = Input::Evidence { server, evidence };
            if self.service.ovm() == Some(server) {
                let _ = self.cut_over(input);
            } else {
                self.tell(input);
            }
        }
        self.drain();
    }

    /// Domain state changed; the daemon notices at its next look.
    pub(super) fn domain_changed(&mut self) {
        let next = (self.now / self.knobs.poll_us + 1) * self.knobs.poll_us;
        self.push(next, Event::DaemonPoll);
    }

    pub(super) fn fence_done(&mut self, id: ServerId) {
        if let Some(guest) = self.guest_of(id) {
            self.fenced[guest] = true;
            if self.guests[guest].health != Health::Gone {
                self.guests[guest].health = Health::Frozen;
            }
            self.domain_changed();
        }
    }
}
