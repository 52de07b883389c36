//! What servers' frames tell beside the service's segments: signs of the OVM's life, and connections that RVMs tried to
//! open by themselves. Both wait here, bounded, until they are taken.

use std::collections::VecDeque;
use std::net::SocketAddr;

use understudy_protocol::{LinkAddress, ServerId, Sign};

use super::presence::Presence;
use crate::link::frame::Content;

/// Signs of an OVM's life that wait to be taken: those of one round, each asked address once.
const SIGNS: usize = 64;

/// Attempts of RVMs to open connections that wait to be taken.
const OWN_CONNECTIONS: usize = 64;

/// See the module.
#[derive(Default)]
pub(crate) struct Notes {
    /// Each with the OVM that gave it.
    signs: VecDeque<(ServerId, Sign)>,
    own_connections: Vec<(ServerId, SocketAddr)>,
    own_connection_attempts: u64,
}

impl Notes {
    /// What the OVM says to its neighbours, it says because it lives.
    pub(super) fn note_sign(&mut self, ovm: ServerId, content: &Content, presence: &Presence) {
        let target = match content {
            // A probe or an announcement asks for nobody.
            Content::Arp(arp) if arp.request && arp.sender != arp.target && !arp.sender.is_unspecified() => {
                Some(arp.target.into())
            }
            Content::Solicitation(asks) if !asks.source.is_unspecified() => Some(asks.target.into()),
            Content::Arp(_) | Content::Solicitation(_) | Content::Advertisement(_) => None,
            _ => return,
        };
        let sign = match target {
            Some(target) => {
                let link = presence.neighbour(target).map(|neighbour| LinkAddress(neighbour.mac));
                Sign::Asked { target, link }
            }
            None => Sign::Answered,
        };
        if self.signs.len() < SIGNS && !self.signs.contains(&(ovm, sign)) {
            self.signs.push_back((ovm, sign));
        }
    }

    /// An RVM tried to open a connection.
    pub(super) fn note_own_connection(&mut self, server: ServerId, to: SocketAddr) {
        self.own_connection_attempts += 1;
        if self.own_connections.len() < OWN_CONNECTIONS {
            self.own_connections.push((server, to));
        }
    }

    /// Another server is the OVM.
    pub(super) fn forget_signs(&mut self) {
        self.signs.clear();
    }

    /// The OVM's next sign of life: of each kind the latest, as far as there is room for them.
    pub(crate) fn take_sign(&mut self) -> Option<(ServerId, Sign)> {
        self.signs.pop_front()
    }

    /// Connections that RVMs tried to open by themselves since the last call, and where to: the first ones, if many.
    pub(crate) fn take_own_connections(&mut self) -> Vec<(ServerId, SocketAddr)> {
        std::mem::take(&mut self.own_connections)
    }

    /// Connections that RVMs ever tried to open by themselves.
    pub(super) fn own_connection_attempts(&self) -> u64 {
        self.own_connection_attempts
    }
}
