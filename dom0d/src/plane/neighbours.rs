//! Link-layer addresses of neighbours, by IP address. dom0d learns them from the traffic that it sees, so that it can
//! answer an RVM's questions with the real next hop, and need resolve nothing at a promotion.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use understudy_protocol::{Instant, ServerId};

use crate::link::frame::{Mac, is_unicast};

/// Entries of one generation; two are kept.
const GENERATION: usize = 2_048;

/// Questions that wait for an answer, over all servers.
const WAITING: usize = 64;

/// How long a question waits for the real answer before dom0d answers it with the PSC's MAC.
const PATIENCE: Duration = Duration::from_millis(900);

/// A known neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neighbour {
    /// Its link-layer address.
    pub(crate) mac: Mac,
    /// It announced itself as a router (IPv6).
    pub(crate) router: bool,
}

/// A server's question that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// Who asks.
    pub(crate) server: ServerId,
    /// The asker's IP address, as the question gave it.
    pub(crate) asker: IpAddr,
    /// The asker's link-layer address.
    pub(crate) asker_mac: Mac,
    /// Whose address it asks for.
    pub(crate) target: IpAddr,
}

/// What to do about a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Response {
    /// Answer it with this.
    Answer(Neighbour),
    /// Ask the network first.
    Ask,
    /// The question has waited too long: no host of the link has that address, or only one behind a router. Any answer
    /// lets the asker's TCP send, and its frames go to dom0d in any case.
    AnswerWithPsc,
    /// Asked already; wait.
    Wait,
}

/// Neighbours and open questions; bounded, and cheap per packet whatever a client sends.
#[derive(Default)]
pub(crate) struct Neighbours {
    /// Neighbours learned recently. When this is full, it becomes `old`, and the former `old` is forgotten.
    young: HashMap<IpAddr, Neighbour>,
    old: HashMap<IpAddr, Neighbour>,
    /// Spares a look-up per packet: bulk traffic comes from one address.
    last: Option<(IpAddr, Mac)>,
    waiting: Vec<(Question, Instant)>,
}

impl Neighbours {
    /// Learns that `address` is reached through `mac`; returns the questions that this answers.
    pub(crate) fn learn(&mut self, address: IpAddr, mac: Mac, router: Option<bool>) -> Vec<Question> {
        if router.is_none() && self.last == Some((address, mac)) {
            return Vec::new();
        }
        if !is_unicast(mac) || address.is_unspecified() || address.is_multicast() {
            return Vec::new();
        }
        self.last = Some((address, mac));
        let known = self.get(address);
        let neighbour =
            Neighbour { mac, router: router.unwrap_or_else(|| known.is_some_and(|known| known.router)) };
        if known != Some(neighbour) || !self.young.contains_key(&address) {
            if self.young.len() >= GENERATION {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(address, neighbour);
        }
        let mut answered = Vec::new();
        self.waiting.retain(|(question, _)| {
            let now_known = question.target == address;
            if now_known {
                answered.push(*question);
            }
            !now_known
        });
        answered
    }

    /// The neighbour with that address.
    pub(crate) fn get(&self, address: IpAddr) -> Option<Neighbour> {
        let young = self.young.get(&address);
        young.or_else(|| self.old.get(&address)).copied()
    }

    /// What to do about a server's question.
    pub(crate) fn ask(&mut self, now: Instant, question: Question) -> Response {
        if let Some(neighbour) = self.get(question.target) {
            return Response::Answer(neighbour);
        }
        let asked = self
            .waiting
            .iter()
            .position(|(other, _)| (other.server, other.target) == (question.server, question.target));
        match asked {
            Some(index) if now.since(self.waiting[index].1) >= PATIENCE => {
                self.waiting.swap_remove(index);
                Response::AnswerWithPsc
            }
            Some(_) => Response::Wait,
            None if self.waiting.len() >= WAITING => {
                // The kernel of the oldest question has asked again by now, or never will.
                self.waiting.remove(0);
                self.waiting.push((question, now));
                Response::Ask
            }
            None => {
                self.waiting.push((question, now));
                Response::Ask
            }
        }
    }

    /// Forgets a server's questions.
    pub(crate) fn forget(&mut self, server: ServerId) {
        self.waiting.retain(|(question, _)| question.server != server);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn address(n: u32) -> IpAddr {
        Ipv4Addr::from(0x0a00_0000 + n).into()
    }

    fn question(target: u32) -> Question {
        Question { server: ServerId(1), asker: address(9), asker_mac: MAC, target: address(target) }
    }

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    #[test]
    fn a_question_waits_for_the_network_and_gets_its_answer() {
        let mut neighbours = Neighbours::default();
        assert_eq!(neighbours.ask(at(0), question(1)), Response::Ask);
        assert_eq!(neighbours.ask(at(10), question(1)), Response::Wait);
        assert_eq!(neighbours.learn(address(1), MAC, None), [question(1)]);
        let neighbour = Neighbour { mac: MAC, router: false };
        assert_eq!(neighbours.ask(at(20), question(1)), Response::Answer(neighbour));
        assert!(neighbours.learn(address(1), MAC, None).is_empty());
    }

    #[test]
    fn a_question_that_nobody_answers_gets_the_psc() {
        let mut neighbours = Neighbours::default();
        assert_eq!(neighbours.ask(at(0), question(1)), Response::Ask);
        assert_eq!(neighbours.ask(at(1_000), question(1)), Response::AnswerWithPsc);
        assert_eq!(neighbours.ask(at(1_001), question(1)), Response::Ask);
    }

    #[test]
    fn a_router_stays_one_until_it_says_otherwise() {
        let mut neighbours = Neighbours::default();
        neighbours.learn(address(1), MAC, Some(true));
        neighbours.learn(address(2), MAC, None);
        neighbours.learn(address(1), MAC, None);
        assert!(neighbours.get(address(1)).is_some_and(|n| n.router));
        neighbours.learn(address(1), MAC, Some(false));
        assert!(neighbours.get(address(1)).is_some_and(|n| !n.router));
    }

    #[test]
    fn neighbours_and_questions_are_bounded_and_the_busy_are_kept() {
        let mut neighbours = Neighbours::default();
        for n in 0..20 * GENERATION as u32 {
            neighbours.learn(address(n + 1), MAC, None);
            neighbours.learn(address(0xffff), MAC, None);
            neighbours.ask(at(0), question(0x00ff_0000 + n));
        }
        assert!(neighbours.young.len() + neighbours.old.len() <= 2 * GENERATION);
        assert!(neighbours.get(address(0xffff)).is_some());
        assert!(neighbours.waiting.len() <= WAITING);
    }

    #[test]
    fn nonsense_is_not_learned() {
        let mut neighbours = Neighbours::default();
        neighbours.learn(address(1), [0xff; 6], None);
        neighbours.learn(address(2), [0; 6], None);
        neighbours.learn(Ipv4Addr::UNSPECIFIED.into(), MAC, None);
        assert!(neighbours.young.is_empty());
    }
}
