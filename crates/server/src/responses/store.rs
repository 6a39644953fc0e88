//! Responses that can be read again and continued: bounded in number and in bytes. Where room is needed, the owner who takes
//! the most gives up what was used least recently, so nobody is pushed out by somebody else's plenty. A conversation's
//! responses share what they have in common. Must not know requests or the engine.
//!
//! A response belongs to the API key that asked for it; with another key it does not exist.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::item::Item;

/// What all stored responses may take together.
const MAX_BYTES: usize = 256 << 20;
/// One conversation may take one part in so many: what a live conversation shares is not freed by forgetting its older
/// responses, so a few must not fill all the room.
const CONVERSATION_SHARE: usize = 8;
/// What an entry takes beside its texts.
const ENTRY_BYTES: usize = 512;

/// Which of the configured keys opened the API, by its place in the list; `None` where none is asked for.
pub(crate) type Owner = Option<usize>;

/// What one response added to a conversation, and what stands before it. Counted as long as anybody holds it.
#[derive(Debug)]
pub(crate) struct Segment {
    parent: Option<Arc<Segment>>,
    /// The request's, then the reply's.
    items: Vec<Item>,
    num_inputs: usize,
    /// What it and those before it take.
    chain_bytes: usize,
    num_chain_items: usize,
    _counted: Counted,
}

/// A stored response.
#[derive(Debug)]
pub(crate) struct Stored {
    owner: Owner,
    /// As it is shown.
    pub(crate) json: String,
    pub(crate) segment: Arc<Segment>,
    _counted: Counted,
}

/// Bytes that are counted until they are given back.
#[derive(Debug)]
struct Counted {
    bytes: usize,
    total: Arc<AtomicUsize>,
    owners: Arc<AtomicUsize>,
}

/// The stored responses.
#[derive(Debug)]
pub(crate) struct Store {
    max_responses: usize,
    max_bytes: usize,
    total_bytes: Arc<AtomicUsize>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    by_id: HashMap<String, (u64, Arc<Stored>)>,
    by_owner: HashMap<Owner, Owned>,
    uses: u64,
}

/// What one owner takes.
#[derive(Debug, Default)]
struct Owned {
    /// Ids by when they were last used.
    by_use: BTreeMap<u64, String>,
    bytes: Arc<AtomicUsize>,
}

impl Counted {
    fn new(bytes: usize, total: &Arc<AtomicUsize>, owners: &Arc<AtomicUsize>) -> Self {
        total.fetch_add(bytes, Ordering::Relaxed);
        owners.fetch_add(bytes, Ordering::Relaxed);
        Self { bytes, total: total.clone(), owners: owners.clone() }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
        self.owners.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Segment {
    /// The conversation's segments up to this one, the oldest first.
    pub(crate) fn chain(self: &Arc<Self>) -> Vec<Arc<Self>> {
        let mut chain = vec![self.clone()];
        while let Some(parent) = &chain[chain.len() - 1].parent {
            chain.push(parent.clone());
        }
        chain.reverse();
        chain
    }

    pub(crate) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Memory that the conversation up to here takes, about.
    pub(crate) fn chain_bytes(&self) -> usize {
        self.chain_bytes
    }

    /// Items of the conversation up to here.
    pub(crate) fn num_chain_items(&self) -> usize {
        self.num_chain_items
    }

    /// The request's own items.
    pub(crate) fn inputs(&self) -> &[Item] {
        &self.items[..self.num_inputs]
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // One after the other: a long conversation would overflow the stack.
        let mut next = self.parent.take();
        while let Some(mut segment) = next.and_then(Arc::into_inner) {
            next = segment.parent.take();
        }
    }
}

impl Store {
    /// Keeps at most `max_responses`; none of them turns it off.
    pub(crate) fn new(max_responses: usize) -> Self {
        Self::bounded(max_responses, MAX_BYTES)
    }

    fn bounded(max_responses: usize, max_bytes: usize) -> Self {
        Self { max_responses, max_bytes, total_bytes: Arc::default(), kept: Mutex::default() }
    }

    pub(crate) fn is_off(&self) -> bool {
        self.max_responses == 0
    }

    /// Most bytes of a conversation that is kept.
    pub(crate) fn max_conversation_bytes(&self) -> usize {
        self.max_bytes / CONVERSATION_SHARE
    }

    /// Keeps a response: its items, those of the request first, behind those of `parent`. Whether it is kept: one whose
    /// conversation is too large is not.
    pub(crate) fn insert(
        &self,
        owner: Owner,
        id: String,
        json: String,
        parent: Option<Arc<Segment>>,
        items: Vec<Item>,
        num_inputs: usize,
    ) -> bool {
        let segment_bytes = size_of::<Segment>() + items.iter().map(Item::bytes).sum::<usize>();
        let stored_bytes = ENTRY_BYTES + json.len();
        let (parents_bytes, num_parents_items) =
            parent.as_ref().map_or((0, 0), |parent| (parent.chain_bytes, parent.num_chain_items));
        let chain_bytes = parents_bytes + segment_bytes;
        if self.is_off() || chain_bytes + stored_bytes > self.max_conversation_bytes() {
            tracing::debug!(id, bytes = chain_bytes + stored_bytes, "a response is not stored");
            return false;
        }
        {
            let mut kept = self.kept();
            let at = kept.next_use();
            let Kept { by_id, by_owner, .. } = &mut *kept;
            let owned = by_owner.entry(owner).or_default();
            let counted = |bytes| Counted::new(bytes, &self.total_bytes, &owned.bytes);
            let num_chain_items = num_parents_items + items.len();
            let segment = Segment {
                parent,
                items,
                num_inputs,
                chain_bytes,
                num_chain_items,
                _counted: counted(segment_bytes),
            };
            let stored = Stored { owner, json, segment: Arc::new(segment), _counted: counted(stored_bytes) };
            owned.by_use.insert(at, id.clone());
            by_id.insert(id, (at, Arc::new(stored)));
        }
        // A long conversation takes its time to drop, which nobody else shall wait for: each is dropped unlocked.
        while let Some(evicted) = self.evict() {
            drop(evicted);
        }
        true
    }

    /// Takes out what is to go next, while there is too much.
    fn evict(&self) -> Option<Arc<Stored>> {
        let mut kept = self.kept();
        let Kept { by_id, by_owner, .. } = &mut *kept;
        let most = if by_id.len() > self.max_responses {
            by_owner.values_mut().max_by_key(|owned| owned.by_use.len())?
        } else if self.total_bytes.load(Ordering::Relaxed) > self.max_bytes {
            by_owner.values_mut().max_by_key(|owned| owned.bytes.load(Ordering::Relaxed))?
        } else {
            return None;
        };
        // Who has nothing left holds the rest in running requests; to take it from others would be no help.
        let (_, oldest) = most.by_use.pop_first()?;
        by_id.remove(&oldest).map(|(_, stored)| stored)
    }

    /// The response of this id, which is thereby used.
    pub(crate) fn get(&self, owner: Owner, id: &str) -> Option<Arc<Stored>> {
        let mut kept = self.kept();
        let at = kept.next_use();
        let (last_use, stored) = kept.by_id.get_mut(id).filter(|(_, stored)| stored.owner == owner)?;
        let last_use = std::mem::replace(last_use, at);
        let stored = stored.clone();
        let by_use = &mut kept.by_owner.get_mut(&owner).expect("who has a response is known").by_use;
        let id = by_use.remove(&last_use).expect("every response has its last use");
        by_use.insert(at, id);
        Some(stored)
    }

    /// Forgets a response; whether there was one. Those that continue it keep what they stand on.
    pub(crate) fn remove(&self, owner: Owner, id: &str) -> bool {
        let removed = {
            let mut kept = self.kept();
            if kept.by_id.get(id).is_none_or(|(_, stored)| stored.owner != owner) {
                return false;
            }
            let (last_use, stored) = kept.by_id.remove(id).expect("it was there");
            kept.by_owner.get_mut(&owner).expect("who has a response is known").by_use.remove(&last_use);
            stored
        };
        drop(removed);
        true
    }

    /// Where items with these ids stand: each a segment and its index there.
    pub(crate) fn find_items(
        &self,
        owner: Owner,
        ids: &HashSet<&str>,
    ) -> HashMap<String, (Arc<Segment>, usize)> {
        let mut found = HashMap::new();
        if ids.is_empty() {
            return found;
        }
        let segments: Vec<Arc<Segment>> = {
            let kept = self.kept();
            let own = kept.by_id.values().filter(|(_, stored)| stored.owner == owner);
            own.map(|(_, stored)| stored.segment.clone()).collect()
        };
        for segment in segments {
            for (i, item) in segment.items.iter().enumerate() {
                if ids.contains(item.id.as_str()) {
                    found.insert(item.id.clone(), (segment.clone(), i));
                }
            }
        }
        found
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing in here panics half way through a change.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn next_use(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }
}

#[cfg(test)]
mod tests {
    use super::super::item::{ItemStatus, Said, Speaker};
    use super::*;

    fn item(id: &str, text_len: usize) -> Item {
        let said = Said::Message { role: Speaker::User, texts: vec!["x".repeat(text_len)] };
        Item { id: id.into(), status: ItemStatus::Completed, said }
    }

    fn put(store: &Store, id: &str, parent: Option<Arc<Segment>>, text_len: usize) -> Option<Arc<Stored>> {
        store.insert(None, id.into(), format!("json of {id}"), parent, vec![item(id, text_len)], 1);
        store.get(None, id)
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let store = Store::new(2);
        put(&store, "a", None, 1);
        put(&store, "b", None, 1);
        assert_eq!(store.get(None, "a").unwrap().json, "json of a");
        put(&store, "c", None, 1);
        assert!(store.get(None, "b").is_none());
        assert!(store.get(None, "a").is_some() && store.get(None, "c").is_some());
        assert!(store.remove(None, "a") && !store.remove(None, "a") && store.get(None, "a").is_none());
    }

    #[test]
    fn bytes_are_bounded_and_given_back() {
        let store = Store::bounded(1000, 100_000);
        for i in 0..50 {
            assert!(put(&store, &format!("r{i}"), None, 10_000).is_some());
            assert!(store.total_bytes.load(Ordering::Relaxed) <= 100_000);
        }
        assert!(store.get(None, "r0").is_none());
        assert!(put(&store, "large", None, 20_000).is_none(), "it is larger than its share");
        assert!(store.get(None, "r49").is_some(), "and nothing had to go for it");
        for i in 0..50 {
            store.remove(None, &format!("r{i}"));
        }
        assert_eq!(store.total_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_conversation_is_counted_once_and_outlives_its_beginning() {
        let store = Store::bounded(2, 4 << 20);
        let mut last = put(&store, "r0", None, 1000).unwrap();
        for i in 1..100 {
            last = put(&store, &format!("r{i}"), Some(last.segment.clone()), 1000).unwrap();
        }
        assert!(store.get(None, "r0").is_none());
        let chain = last.segment.chain();
        let ids: Vec<&str> = chain.iter().flat_map(|s| s.items()).map(|item| item.id.as_str()).collect();
        assert!(ids.len() == 100 && ids[0] == "r0" && ids[99] == "r99");
        let bytes = store.total_bytes.load(Ordering::Relaxed);
        assert!((100_000..200_000).contains(&bytes), "{bytes}");
        drop((chain, last));
        assert!(store.remove(None, "r98") && store.remove(None, "r99"));
        assert_eq!(store.total_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_conversation_that_outgrows_its_share_pushes_nobody_out() {
        let store = Store::bounded(1000, 100_000);
        let insert = |owner, id: &str, parent, len| {
            store.insert(owner, id.into(), String::new(), parent, vec![item(id, len)], 1)
        };
        assert!(insert(Some(1), "other", None, 100));
        assert!(insert(Some(0), "r0", None, 1000));
        let mut kept = vec!["r0".to_owned()];
        for i in 1..100 {
            let parent = store.get(Some(0), kept.last().unwrap()).unwrap().segment.clone();
            let (id, before) = (format!("r{i}"), parent.chain_bytes());
            if insert(Some(0), &id, Some(parent), 1000) {
                let segment = store.get(Some(0), &id).unwrap().segment.clone();
                assert!(segment.chain_bytes() > before + 1000 && segment.num_chain_items() == i + 1);
                kept.push(id);
            }
        }
        assert!((5..20).contains(&kept.len()), "{}", kept.len());
        assert!(kept.iter().all(|id| store.get(Some(0), id).is_some()));
        assert!(store.get(Some(1), "other").is_some());
    }

    #[test]
    fn who_takes_the_most_gives_way() {
        let store = Store::bounded(1000, 100_000);
        let insert = |owner, id: &str, len| {
            store.insert(Some(owner), id.into(), String::new(), None, vec![item(id, len)], 1)
        };
        assert!(insert(1, "quiet", 5000));
        for i in 0..50 {
            assert!(insert(0, &format!("loud{i}"), 10_000));
        }
        assert!(store.get(Some(1), "quiet").is_some());
        assert!(store.get(Some(0), "loud0").is_none() && store.get(Some(0), "loud49").is_some());
        let few = Store::bounded(3, 1 << 20);
        for (owner, id) in [(1, "quiet"), (0, "a"), (0, "b"), (0, "c"), (0, "d")] {
            few.insert(Some(owner), id.into(), String::new(), None, vec![item(id, 1)], 1);
        }
        assert!(few.get(Some(1), "quiet").is_some() && few.get(Some(0), "b").is_none());
    }

    #[test]
    fn what_running_requests_hold_costs_others_nothing() {
        let store = Store::bounded(1000, 100_000);
        let insert = |owner, id: &str, len| {
            store.insert(Some(owner), id.into(), String::new(), None, vec![item(id, len)], 1)
        };
        assert!(insert(1, "quiet", 1000));
        let held: Vec<_> = (0..20)
            .filter_map(|i| {
                insert(0, &format!("r{i}"), 10_000);
                store.get(Some(0), &format!("r{i}"))
            })
            .collect();
        assert!(store.total_bytes.load(Ordering::Relaxed) > 90_000);
        assert!(insert(1, "more", 1000));
        assert!(store.get(Some(1), "quiet").is_some() && store.get(Some(1), "more").is_some());
        drop(held);
    }

    #[test]
    fn a_long_conversation_is_dropped_without_recursion() {
        let store = Store::bounded(1, usize::MAX);
        let mut last = put(&store, "first", None, 0).unwrap();
        for i in 0..200_000 {
            last = put(&store, &i.to_string(), Some(last.segment.clone()), 0).unwrap();
        }
        drop(last);
        assert!(store.remove(None, "199999"));
        assert_eq!(store.total_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn another_key_sees_nothing() {
        let store = Store::new(9);
        store.insert(Some(0), "a".into(), String::new(), None, vec![item("i", 1)], 1);
        let ids = HashSet::from(["i"]);
        for other in [None, Some(1)] {
            assert!(store.get(other, "a").is_none() && !store.remove(other, "a"));
            assert!(store.find_items(other, &ids).is_empty());
        }
        assert_eq!(store.find_items(Some(0), &ids)["i"].1, 0);
        assert!(store.get(Some(0), "a").is_some());
    }
}
