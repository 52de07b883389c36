//! Adds hostile clients to a run; see [`crate::hostile`].

use core::net::IpAddr;

use understudy_protocol::{Input, ServerId, Sign};

use super::{Event, World};
use crate::client::Client;
use crate::observer::Conversation;

impl World {
    /// How many clients are honest: the first ones.
    pub(crate) fn honest(&self) -> usize {
        self.knobs.clients.len() - self.knobs.hostile.len()
    }

    /// What leaves a client in the place of what its stack sends.
    pub(super) fn twist(&mut self, client: usize, packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let Some(hostile) = client.checked_sub(self.honest()) else { return packets };
        let hostility = &self.knobs.hostile[hostile];
        packets.into_iter().flat_map(|packet| hostility.twist(&mut self.hostile, packet)).collect()
    }

    /// Sets the times of all shots.
    pub(super) fn load_volleys(&mut self) {
        for hostile in 0..self.knobs.hostile.len() {
            let mut at = 0;
            for shot in 0..self.knobs.hostile[hostile].volley.len() {
                at += self.knobs.hostile[hostile].volley[shot].0;
                self.shots += 1;
                self.push(at, Event::Shoot(hostile, shot));
            }
        }
    }

    pub(super) fn shoot(&mut self, hostile: usize, shot: usize) {
        self.shots -= 1;
        let shot = self.knobs.hostile[hostile].volley[shot].1;
        let client = self.honest() + hostile;
        let honest = self.observer.conversations.iter().filter(|c| c.is_open() && c.established);
        let open: Vec<_> = honest
            .filter_map(|c: &Conversation| {
                let psc = self.observer.psc.iter().find(|psc| psc.is_ipv4() == c.client.is_ipv4())?;
                Some((c.client, *psc, c.isn.wrapping_add(1).wrapping_add(c.received.contiguous() as u32)))
            })
            .collect();
        let own = self.clients[client].addresses.clone();
        let psc = self.observer.psc.clone();
        let Some(packet) = shot.packet(&mut self.hostile, &own, &psc, &open) else { return };
        self.coverage.hit(&format!("shot.{shot:?}"));
        // A router between them has one link address for both.
        let claimed = crate::segment::Segment::parse(&packet).map(|segment| segment.src.ip());
        let named = |client: &Client| claimed.is_ok_and(|claimed| client.addresses.contains(&claimed));
        let through = self.clients.iter().position(named).unwrap_or(client);
        self.client_says(through, &packet);
    }

    /// The OVM asks who has an address that nobody has.
    pub(super) fn asks_in_vain(&mut self, ovm: ServerId, target: IpAddr) {
        self.coverage.hit("guest.asked in vain");
        self.tell(Input::Sign { server: ovm, sign: Sign::Asked { target, link: None } });
        self.drain();
    }
}
