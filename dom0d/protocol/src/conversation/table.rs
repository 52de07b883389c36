//! The conversation table: bounded, found by addresses or by id. A conversation in which nothing happens sleeps: it is
//! kept as the bytes that it would be saved as, a fraction of what it takes while awake.

use core::time::Duration;
use std::collections::{BTreeSet, HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::conversation::Conversation;
use crate::encoding;
use crate::key::{ConversationId, Key};
use crate::time::Instant;

/// How long nothing has happened in a conversation that falls asleep.
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
            // What was written here reads back.
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
    /// Closed ones, oldest first; they make room when the table is full.
    closed: VecDeque<ConversationId>,
    /// Those that have something in flight anywhere.
    busy: BTreeSet<ConversationId>,
    /// Which place is looked at next for a conversation that may fall asleep.
    drowsy: usize,
}

impl Table {
    /// Conversations that there is room for so far, never more than the limit.
    pub(crate) fn places(&self) -> u64 {
        self.places.len() as u64
    }

    pub(crate) fn find(&self, key: &Key) -> Option<ConversationId> {
        self.by_key.get(key).copied()
    }

    /// A conversation, unless it is asleep: everybody has followed everything then.
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

    /// A conversation has worked, and perhaps just closed.
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

    /// Gives a reserved place back that nobody moved into.
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

    /// A conversation closed: it is remembered, and makes room when room is needed.
    fn note_closed(&mut self, id: ConversationId) {
        self.closed.push_back(id);
        // Ids of conversations that are gone already pile up at the front.
        while self.closed.front().is_some_and(|id| self.is_gone(*id)) {
            self.closed.pop_front();
        }
    }

    fn is_gone(&self, id: ConversationId) -> bool {
        self.places.get(id.index as usize).is_none_or(|place| place.generation != id.generation)
    }

    /// The conversation that closed first and still takes room.
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

    /// The id of whatever is in the `index`th place, and whether there are further places.
    pub(crate) fn at(&self, index: usize) -> Option<Option<ConversationId>> {
        let place = self.places.get(index)?;
        let id = ConversationId { index: index as u32, generation: place.generation };
        Some((!matches!(place.tenant, Tenant::None)).then_some(id))
    }

    /// Lets conversations in up to `count` further places fall asleep, if nothing happens in them.
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

    /// Shows every conversation, as long as `visit` wants more; those asleep sleep on.
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
