//! The table of conversations: bounded (rule 6), searched by addresses or by id. A conversation in which nothing
//! happens sleeps: the table keeps it in its saved form, a fraction of its size while awake.

use core::time::Duration;
use std::collections::{BTreeSet, HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::conversation::Conversation;
use crate::encoding;
use crate::key::{ConversationId, Key};
use crate::time::Instant;

/// How long a conversation must be quiet before it may fall asleep.
const QUIET: Duration = Duration::from_secs(1);

#[derive(Debug, Default, Serialize, Deserialize)]
struct Place {
    generation: u32,
    tenant: Tenant,
}

#[derive(Debug, Default, Serialize, Deserialize)]
enum Tenant {
    #[default]
    None,
    Awake(Box<Conversation>),
    Asleep(#[serde(with = "serde_bytes")] Box<[u8]>),
}

impl Tenant {
    fn wake(&mut self) {
        if let Self::Asleep(bytes) = self {
            // These bytes were written by `fall_asleep`, so they decode.
            *self = postcard::from_bytes(bytes).map_or(Self::None, Self::Awake);
        }
    }

    fn fall_asleep(&mut self) {
        if let Self::Awake(conversation) = self
            && let Ok(bytes) = postcard::to_stdvec(conversation)
        {
            *self = Self::Asleep(bytes.into_boxed_slice());
        }
    }
}

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Table {
    places: Vec<Place>,
    free: Vec<u32>,
    #[serde(serialize_with = "encoding::by_key")]
    by_key: HashMap<Key, ConversationId>,
    /// Closed conversations, oldest first; they make room when the table is full.
    closed: VecDeque<ConversationId>,
    /// Conversations with something in flight anywhere.
    busy: BTreeSet<ConversationId>,
    /// The place at which [`Table::calm`] continues to look for conversations that may fall asleep.
    drowsy: usize,
}

impl Table {
    /// Places that the table has allocated so far, never more than the limit.
    pub(crate) fn places(&self) -> u64 {
        self.places.len() as u64
    }

    pub(crate) fn find(&self, key: &Key) -> Option<ConversationId> {
        self.by_key.get(key).copied()
    }

    /// A conversation, unless it is asleep. In a conversation that sleeps, every server has followed everything.
    pub(crate) fn get_awake(&self, id: ConversationId) -> Option<&Conversation> {
        let place = self.places.get(id.index as usize).filter(|place| place.generation == id.generation)?;
        match &place.tenant {
            Tenant::Awake(conversation) => Some(conversation),
            _ => None,
        }
    }

    pub(crate) fn get_mut(&mut self, id: ConversationId) -> Option<&mut Conversation> {
        let place =
            self.places.get_mut(id.index as usize).filter(|place| place.generation == id.generation)?;
        place.tenant.wake();
        match &mut place.tenant {
            Tenant::Awake(conversation) => Some(conversation),
            _ => None,
        }
    }

    /// Moves a conversation into the place that was reserved for it.
    pub(crate) fn put(&mut self, conversation: Box<Conversation>) {
        let id = conversation.id;
        if let Some(place) = self.places.get_mut(id.index as usize) {
            place.tenant = Tenant::Awake(conversation);
        }
        self.review(id, false);
    }

    /// A conversation's turn is over: notes whether something is in flight, and whether it just closed.
    pub(crate) fn review(&mut self, id: ConversationId, closed: bool) {
        if self.get_awake(id).is_some_and(Conversation::is_busy) {
            self.busy.insert(id);
        } else {
            self.busy.remove(&id);
        }
        if closed {
            self.note_closed(id);
        }
    }

    /// Reserves a place below `limit`; the caller puts a conversation with this id there.
    pub(crate) fn reserve(&mut self, key: Key, limit: u32) -> Option<ConversationId> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if (self.places.len() as u64) < u64::from(limit) => {
                self.places.push(Place::default());
                (self.places.len() - 1) as u32
            }
            None => return None,
        };
        let id = ConversationId { index, generation: self.places[index as usize].generation };
        self.by_key.insert(key, id);
        Some(id)
    }

    /// Frees a reserved place in which no conversation was put.
    pub(crate) fn cancel(&mut self, id: ConversationId, key: &Key) {
        self.by_key.remove(key);
        self.free.push(id.index);
    }

    /// Takes a conversation out for good.
    pub(crate) fn remove(&mut self, id: ConversationId) -> Option<Box<Conversation>> {
        let place =
            self.places.get_mut(id.index as usize).filter(|place| place.generation == id.generation)?;
        place.tenant.wake();
        let Tenant::Awake(conversation) = core::mem::take(&mut place.tenant) else { return None };
        place.generation = place.generation.wrapping_add(1);
        self.free.push(id.index);
        if self.by_key.get(&conversation.key) == Some(&id) {
            self.by_key.remove(&conversation.key);
        }
        self.busy.remove(&id);
        Some(conversation)
    }

    /// A conversation closed: the table remembers it until it needs the room.
    fn note_closed(&mut self, id: ConversationId) {
        self.closed.push_back(id);
        // Ids of removed conversations accumulate at the front.
        while self.closed.front().is_some_and(|id| self.is_gone(*id)) {
            self.closed.pop_front();
        }
    }

    fn is_gone(&self, id: ConversationId) -> bool {
        self.places.get(id.index as usize).is_none_or(|place| place.generation != id.generation)
    }

    /// The conversation that closed first, of those still in the table; takes it off the list of closed ones.
    pub(crate) fn oldest_closed(&mut self) -> Option<ConversationId> {
        while let Some(id) = self.closed.pop_front() {
            if !self.is_gone(id) {
                return Some(id);
            }
        }
        None
    }

    /// Conversations with something in flight.
    pub(crate) fn busy(&self) -> impl Iterator<Item = ConversationId> + '_ {
        self.busy.iter().copied()
    }

    /// The id of the conversation at `index` (`Some(None)`: the place is free); `None` beyond the last place.
    pub(crate) fn at(&self, index: usize) -> Option<Option<ConversationId>> {
        let place = self.places.get(index)?;
        let id = ConversationId { index: index as u32, generation: place.generation };
        Some((!matches!(place.tenant, Tenant::None)).then_some(id))
    }

    /// Looks at the next `count` places, at most, and lets quiet conversations in them fall asleep.
    pub(crate) fn calm(&mut self, now: Instant, count: usize) {
        for _ in 0..count.min(self.places.len()) {
            self.drowsy = (self.drowsy + 1) % self.places.len();
            let tenant = &mut self.places[self.drowsy].tenant;
            if let Tenant::Awake(conversation) = tenant
                && conversation.is_settled()
                && !conversation.queued
                && now.since(conversation.last_heard) >= QUIET
            {
                tenant.fall_asleep();
            }
        }
    }

    /// Shows every conversation until `visit` returns false. Those that sleep stay asleep.
    pub(crate) fn visit(&self, mut visit: impl FnMut(&Conversation) -> bool) {
        for place in &self.places {
            let more = match &place.tenant {
                Tenant::None => true,
                Tenant::Awake(conversation) => visit(conversation),
                Tenant::Asleep(bytes) => {
                    postcard::from_bytes::<Conversation>(bytes).map_or(true, |asleep| visit(&asleep))
                }
            };
            if !more {
                return;
            }
        }
    }
}
