//! Makes the faults of domains, links and clients happen, and the operators' actions.

use core::time::Duration;

use understudy_protocol::{Command, Input, OperatorError, Role, Seeding, ServerId};

use super::{GUESTS, World};
use crate::fault::{Fault, Join, Target};
use crate::forge;
use crate::guest::Health;
use crate::link::{Link, LinkKnobs};
use crate::observer::Seen;
use crate::prng::Prng;

impl World {
    /// A fault struck this server: from now on it may be suspected.
    pub(super) fn blemish(&mut self, id: ServerId) {
        self.see(&Seen::Blemish(id));
    }

    /// Notes that the server may have lost conversations, or may lose them when it serves.
    fn impair(&mut self, id: ServerId, why: &'static str) {
        self.impaired.entry(id).or_insert(why);
        self.blemish(id);
    }

    fn resolve(&self, target: Target) -> Option<usize> {
        let id = match target {
            Target::Ovm => self.service.ovm(),
            Target::Deposed => self.deposed,
            Target::Rvm(n) => {
                let rvms: Vec<_> = self
                    .service
                    .status()
                    .servers
                    .iter()
                    .filter(|s| s.role == Role::Rvm)
                    .map(|s| s.server)
                    .collect();
                (!rvms.is_empty()).then(|| rvms[n % rvms.len()])
            }
        };
        id.and_then(|id| self.guest_of(id))
    }

    pub(super) fn strike(&mut self, index: usize) {
        let fault = self.pending[index].fault;
        self.trace.line(self.now, || format!("fault {fault:?}"));
        self.note(format!("{fault:?}"));
        match fault {
            Fault::CutClient { client, us } => {
                self.client_up[client].cut(self.now + us);
                self.client_down[client].cut(self.now + us);
                self.coverage.hit("fault.cut client");
            }
            Fault::StarveDom0 { us } => {
                self.starved_until = self.now + us;
                self.coverage.hit("fault.starve dom0");
                // A starved host is slow for everybody; who is accused then does not matter here.
                for guest in 0..self.guests.len() {
                    let id = self.guests[guest].id;
                    self.blemish(id);
                }
            }
            Fault::Switchover => {
                let result = self.cut_over(Input::Command(Command::Switchover { to: None }));
                self.action("switchover", result);
            }
            Fault::Failover { force } => {
                let result = self.cut_over(Input::Command(Command::Failover { to: None, force }));
                if force && result.is_ok() {
                    self.excuse.get_or_insert("a forced failover");
                }
                self.action("failover", result);
            }
            Fault::Attach(join) => self.attach(join),
            Fault::Detach(target) => {
                if let Some(guest) = self.resolve(target) {
                    let server = self.guests[guest].id;
                    let result = self.command(Command::Detach { server });
                    self.action("detach", result);
                }
            }
            _ => self.strike_server(fault),
        }
        self.excuse_of_loss();
        self.drain();
    }

    pub(super) fn command(&mut self, command: Command) -> Result<(), OperatorError> {
        self.service.handle(self.instant(), Input::Command(command))
    }

    fn action(&mut self, name: &str, result: Result<(), OperatorError>) {
        self.trace.line(self.now, || format!("{name}: {result:?}"));
        match result {
            Ok(()) => self.coverage.hit(&format!("action.{name}")),
            Err(_) => self.coverage.hit(&format!("action.{name} refused")),
        }
    }

    fn attach(&mut self, join: Join) {
        let index = self.guests.len();
        if index >= GUESTS {
            return;
        }
        let mut knobs = self.knobs.guests[0].clone();
        knobs.stack.timestamp_offset = self.rng.next() as u32;
        self.knobs.guests.push(knobs);
        for links in [&mut self.guest_up, &mut self.guest_down] {
            let knobs = LinkKnobs { delay_us: 50, ..Default::default() };
            links.push(Link::new(knobs, Prng::fork(self.seed, "late link", index as u64)));
        }
        let spec = self.add_guest(index);
        let id = spec.id;
        let seeding = match join {
            Join::Unseeded => Seeding::Unseeded,
            Join::AssumeIdentical => Seeding::AssumeIdentical,
            Join::Drain { deadline_us } => {
                Seeding::Drain { deadline: self.instant() + Duration::from_micros(deadline_us) }
            }
        };
        let result = self.command(Command::Attach { spec, seeding });
        if result.is_err() {
            self.guests[index].health = Health::Gone;
        } else {
            self.impair(id, "joined later");
        }
        self.action("attach", result);
    }

    fn strike_server(&mut self, fault: Fault) {
        let (target, name) = match fault {
            Fault::Freeze(t) => (t, "freeze"),
            Fault::Thaw(t) => (t, if t == Target::Deposed { "thaw deposed" } else { "thaw" }),
            Fault::Crash(t) => (t, "crash"),
            Fault::Hang(t) => (t, "hang"),
            Fault::Spin(t) => (t, "spin"),
            Fault::Kill { target, .. } => (target, "kill"),
            Fault::Slow { target, .. } => (target, "slow"),
            Fault::WrongAnswer(t) => (t, "wrong answer"),
            Fault::Garbage { target, .. } => (target, "garbage"),
            Fault::Mutated { target, .. } => (target, "mutated"),
            Fault::Twisted { target, .. } => (target, "twisted"),
            Fault::ResetAll(t) => (t, "reset all"),
            Fault::CutServer { target, .. } => (target, "cut server"),
            _ => return,
        };
        let Some(index) = self.resolve(target) else {
            return;
        };
        let id = self.guests[index].id;
        let now = self.now;
        self.coverage.hit(&format!("fault.{name}"));
        if !matches!(fault, Fault::Thaw(_)) {
            self.impair(id, name_of_impairment(fault));
        }
        let lies = matches!(fault, Fault::Mutated { .. } | Fault::Twisted { .. });
        if lies {
            self.observer.liars.insert(id);
        }
        if lies || matches!(fault, Fault::WrongAnswer(_)) {
            self.untrue.insert(id);
        }
        if matches!(fault, Fault::Kill { .. }) {
            self.killed.insert(id);
        }
        if matches!(fault, Fault::ResetAll(_)) {
            self.resetters.insert(id);
        }
        if self.service.ovm() == Some(id) && !matches!(fault, Fault::Thaw(_)) {
            self.excuse_of_blow(fault);
        }
        let guest = &mut self.guests[index];
        if guest.health == Health::Gone {
            return;
        }
        match fault {
            Fault::Freeze(_) => guest.health = Health::Frozen,
            Fault::Spin(_) => guest.health = Health::Spinning,
            Fault::Crash(_) => guest.health = Health::Gone,
            Fault::Hang(_) if guest.health == Health::Running => guest.health = Health::Hung,
            Fault::Thaw(_) => guest.thaw(),
            Fault::Kill { orderly, .. } => guest.kill_process(orderly),
            Fault::Slow { us, .. } => guest.slow_us = us,
            Fault::WrongAnswer(_) => guest.wrong_answer = true,
            Fault::CutServer { us, .. } => {
                self.guest_up[index].cut(now + us);
                self.guest_down[index].cut(now + us);
            }
            Fault::Garbage { packets, .. } => {
                for _ in 0..packets {
                    let packet = forge::noise(&mut self.rng);
                    self.guest_sends(index, packet);
                }
            }
            Fault::Mutated { packets, .. } => {
                for _ in 0..packets {
                    if self.recent[index].is_empty() {
                        break;
                    }
                    let model = self.rng.pick(&self.recent[index]).clone();
                    let packet = forge::mutated(&mut self.rng, &model);
                    self.guest_sends(index, packet);
                }
            }
            Fault::Twisted { twist, packets, .. } => {
                for _ in 0..packets {
                    if self.recent[index].is_empty() {
                        break;
                    }
                    let model = self.rng.pick(&self.recent[index]).clone();
                    let packet = forge::twisted(&mut self.rng, &model, twist);
                    self.guest_sends(index, packet);
                }
            }
            Fault::ResetAll(_) => self.reset_all(index),
            _ => {}
        }
        self.domain_changed();
        self.poll_guest(index);
    }

    fn reset_all(&mut self, index: usize) {
        let id = self.guests[index].id;
        let mut resets = Vec::new();
        for conversation in &self.observer.conversations {
            if let Some(leg) = conversation.legs.get(&id)
                && let Some(iss) = leg.iss
            {
                let own = self
                    .observer
                    .servers
                    .get(&id)
                    .into_iter()
                    .flatten()
                    .find(|a| a.is_ipv6() == conversation.client.is_ipv6());
                let Some(own) = own else { continue };
                let seq = iss.wrapping_add(1).wrapping_add(leg.produced.contiguous() as u32);
                let ack = conversation.isn.wrapping_add(1).wrapping_add(leg.handed as u32);
                resets.push(forge::reset(*own, conversation.client, seq, Some(ack)));
            }
        }
        for packet in resets {
            self.guest_sends(index, packet);
        }
    }
}

fn name_of_impairment(fault: Fault) -> &'static str {
    match fault {
        Fault::Freeze(_) => "it was frozen",
        Fault::Crash(_) => "it crashed",
        Fault::Hang(_) => "it hung",
        Fault::Spin(_) => "it spun",
        Fault::Kill { .. } => "its service was killed",
        Fault::Slow { .. } => "it was slowed",
        Fault::WrongAnswer(_) => "it answered wrong",
        Fault::Garbage { .. } => "it sent garbage",
        Fault::Mutated { .. } => "it sent mutated segments",
        Fault::Twisted { .. } => "it sent twisted segments",
        Fault::ResetAll(_) => "it reset its conversations",
        Fault::CutServer { .. } => "its link was cut",
        _ => "something was done to it",
    }
}
