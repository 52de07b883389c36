//! The client was already sent most of what an RVM answers: a journal of the engine's inputs can leave those bytes out.

use serde::{Deserialize, Serialize};

use crate::event::ServerId;
use crate::key::{ConversationId, Key};
use crate::service::Service;
use crate::tcp::seq::position_of;
use crate::wire::{self, Parsed};

/// Shorter payloads, in bytes, are not worth leaving out.
const LEAST: usize = 256;

/// A range of bytes that the client was sent; see [`Service::repetition`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repetition {
    conversation: ConversationId,
    position: u64,
    length: u32,
}

impl Service {
    /// If the payload of an RVM's packet equals what the client was sent at that position: the packet without its
    /// payload, and a reference to the bytes. [`Service::recall`] returns the bytes as long as the engine has had no
    /// other input.
    pub fn repetition<'a>(&self, server: ServerId, packet: &'a [u8]) -> Option<(&'a [u8], Repetition)> {
        let slot = self.ctx.queue.slot_of(server).filter(|slot| self.ctx.queue.ovm() != Some(*slot))?;
        let Ok(Parsed::Tcp(segment)) = wire::parse(packet) else { return None };
        let payload = segment.payload;
        // Padding may follow the IP packet.
        if payload.len() < LEAST || payload.as_ptr_range().end != packet.as_ptr_range().end {
            return None;
        }
        let key = Key { client: segment.dst, psc: self.psc_of(segment.src)? };
        let conversation = self.table.get_awake(self.table.find(&key)?)?;
        let leg = conversation.legs.get(slot, server)?;
        let position = position_of(leg.numbers.iss, segment.seq, leg.said.answers.end())?;
        let length = payload.len() as u32;
        let head = packet.get(..packet.len() - payload.len())?;
        let repetition = Repetition { conversation: conversation.id, position, length };
        conversation.down.says(position, payload).then_some((head, repetition))
    }

    /// The bytes of a [`Repetition`]; `None` if this engine does not hold them.
    pub fn recall(&self, repetition: &Repetition) -> Option<Vec<u8>> {
        let &Repetition { conversation, position, length } = repetition;
        let down = &self.table.get_awake(conversation)?.down;
        let range = position..position.checked_add(u64::from(length))?;
        (down.base() <= range.start && range.end <= down.end()).then(|| down.copy(range))
    }
}
