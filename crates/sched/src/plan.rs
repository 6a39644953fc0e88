//! Chooses the next step. Pure: reads the state, changes nothing; [`begin`](crate::begin) carries the plan out.

use std::collections::BTreeMap;
use std::collections::btree_map::Values;
use std::iter::{Enumerate, Peekable};

use r1_core::{BlockId, SeqId};

use crate::prefix::BlockHash;
use crate::sequence::Turn;
use crate::{BlockPool, Limits, Phase, Sequence, State};

/// One step: which rows, and who loses their blocks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sequences that run their last token, in order of service.
    pub decode: Vec<Decode>,
    /// Pieces of known tokens, in order of service. At most one per sequence, and none for one that decodes.
    pub prefill: Vec<PrefillChunk>,
    /// Sequences that give up their blocks before the step and wait to be computed anew.
    pub preempt: Vec<SeqId>,
}

/// A row that runs a sequence's last token and its drafts, and samples after each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decode {
    /// Whose.
    pub seq: SeqId,
    /// Position of the last token. When `start >= tokens(seq).len()`, that token is still in flight and only the
    /// device knows it. With drafts in flight this is an upper bound: the true position is lower by as many drafts
    /// as the steps in flight reject. Slots are reserved up to the bound, so the device may subtract.
    pub start: usize,
    /// Draft tokens run after the last token, at `start + 1..=start + num_drafts`.
    pub num_drafts: usize,
}

/// A row that runs known tokens `start..start + len` of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillChunk {
    /// Whose.
    pub seq: SeqId,
    /// Position of the first token; exact.
    pub start: usize,
    /// Number of tokens, at least 1.
    pub len: usize,
    /// Whether the chunk ends with the last known token, after which the next one is drawn.
    pub samples: bool,
}

impl Plan {
    /// Nothing can run now: commit the oldest step in flight, or wait for a sequence. Never empty while a sequence is
    /// live and nothing is in flight, unless the limits of the step are 0.
    pub fn is_empty(&self) -> bool {
        self.decode.is_empty() && self.prefill.is_empty()
    }

    /// Tokens that the step runs, drafts included.
    pub fn num_tokens(&self) -> usize {
        self.decode.iter().map(|row| 1 + row.num_drafts).sum::<usize>()
            + self.prefill.iter().map(|chunk| chunk.len).sum::<usize>()
    }

    /// Rows of the step.
    pub fn num_seqs(&self) -> usize {
        self.decode.len() + self.prefill.len()
    }
}

/// Chooses the next step: decode first, which bounds inter-token latency; then drafts; then prefill chunks. Empty when
/// `depth` steps are in flight.
pub fn plan(state: &State, limits: &Limits) -> Plan {
    let mut plan = Plan::default();
    plan_into(state, limits, &mut plan);
    plan
}

/// The same as [`plan`], into a plan whose vectors are used again. While only decode rows are planned, and each has its
/// block, it allocates nothing.
pub fn plan_into(state: &State, limits: &Limits, plan: &mut Plan) {
    plan.decode.clear();
    plan.prefill.clear();
    plan.preempt.clear();
    if state.steps_in_flight() >= state.config.depth {
        return;
    }
    let mut room = Room::new(state, limits, plan);
    room.decode();
    room.drafts(limits.num_drafts);
    room.prefill();
    if plan.is_empty() {
        // The row that needed somebody's blocks is left out after all, to give way itself. The next plan decides anew.
        plan.preempt.clear();
    }
}

/// What is left of the step's budget and of the cache while a plan is being made.
struct Room<'a, 'p> {
    state: &'a State,
    plan: &'p mut Plan,
    /// Running sequences that keep their blocks and may be planned, from the front. Those that lose their blocks, now or
    /// in the next plan, are cut off the end.
    num_running: usize,
    /// Sequences that hold blocks once the plan is begun, draining ones included.
    num_holding: usize,
    num_tokens: usize,
    num_seqs: usize,
    blocks: Available,
    /// Blocks that come free without further preemption when the steps in flight are committed; `None` before somebody
    /// asks.
    soon_free: Option<usize>,
    /// Only sequences of a strictly better priority are admitted: that of the first sequence that lacks a block or loses
    /// its own.
    closed_from: Option<i32>,
    /// Tokens by which sequences admitted by this plan should be able to grow.
    admitted_growth: usize,
}

/// Blocks that can be had, and what the plan changes about who holds which.
#[derive(Clone)]
struct Available {
    /// Free or evictable.
    num: usize,
    /// Tables that will hold a block, less those that do. Only where a plan preempts or shares.
    change: BTreeMap<BlockId, i32>,
}

impl Available {
    fn refs(&self, pool: &BlockPool, block: BlockId) -> i64 {
        i64::from(pool.refs(block)) + i64::from(self.change.get(&block).copied().unwrap_or(0))
    }

    /// One more table holds `block`.
    fn share(&mut self, pool: &BlockPool, block: BlockId) {
        self.num -= usize::from(self.refs(pool, block) == 0);
        *self.change.entry(block).or_default() += 1;
    }

    /// Nobody but others of the table's length less one holds its blocks any more. Returns how many come free.
    fn release(&mut self, pool: &BlockPool, table: &[BlockId]) -> usize {
        let before = self.num;
        for &block in table {
            *self.change.entry(block).or_default() -= 1;
            self.num += usize::from(self.refs(pool, block) == 0);
        }
        self.num - before
    }
}

/// Where the prefill of a waiting sequence would begin.
struct Found {
    /// Blocks in the index.
    indexed: usize,
    /// These, and those that chunks of the plan before it fill.
    shared: usize,
}

impl<'a, 'p> Room<'a, 'p> {
    fn new(state: &'a State, limits: &Limits, plan: &'p mut Plan) -> Self {
        Self {
            state,
            plan,
            num_running: state.running.len(),
            num_holding: state.running.len() + state.num_draining(),
            num_tokens: limits.max_num_batched_tokens.min(state.config.max_num_batched_tokens),
            num_seqs: limits.max_num_seqs.min(state.config.max_num_seqs),
            blocks: Available { num: state.pool.num_available(), change: BTreeMap::new() },
            soon_free: None,
            closed_from: None,
            admitted_growth: 0,
        }
    }

    fn is_full(&self) -> bool {
        self.num_tokens == 0 || self.num_seqs == 0
    }

    /// Running sequences that may be planned.
    fn running(&self) -> impl Iterator<Item = &'a Sequence> + use<'a> {
        self.state.running().take(self.num_running)
    }

    /// One token for every running sequence that may decode and can have the block for it.
    fn decode(&mut self) {
        let mut running = self.state.running.values();
        while !self.is_full() {
            let Some(id) = running.next() else { return };
            let seq = &self.state.sequences[id];
            if seq.may_decode() && self.take_block_for(seq, &mut running) {
                self.num_tokens -= 1;
                self.num_seqs -= 1;
                self.plan.decode.push(Decode { seq: seq.id, start: seq.placed, num_drafts: 0 });
            }
        }
    }

    /// Takes the block that the next position of `seq` needs, if it needs one; those `behind` it may lose theirs for it.
    /// `false`: not in this step.
    fn take_block_for(&mut self, seq: &Sequence, behind: &mut Values<'a, Turn, SeqId>) -> bool {
        if seq.placed < seq.blocks.len() * self.state.config.block_size {
            return true;
        }
        if self.blocks.num == 0 {
            self.close(seq.priority());
            let soon_free = self.soon_free.unwrap_or_else(|| self.drained_blocks());
            self.soon_free = Some(soon_free.saturating_sub(1));
            if soon_free > 0 {
                return false;
            }
            if !self.take_from(behind) {
                return false;
            }
        }
        self.blocks.num -= 1;
        true
    }

    /// Takes the blocks of the fewest of the last running sequences that free one. `false`: there are none in this step.
    /// The last in service keeps its blocks and waits, which costs nothing unless somebody needs them.
    fn take_from(&mut self, behind: &mut Values<'a, Turn, SeqId>) -> bool {
        let mut blocks = self.blocks.clone();
        let mut victims = behind.clone();
        let (mut num_victims, mut in_flight) = (0, false);
        while blocks.num == 0 {
            let Some(id) = victims.next_back() else { return false };
            let victim = &self.state.sequences[id];
            num_victims += 1;
            in_flight |= victim.is_in_flight();
            blocks.release(&self.state.pool, &victim.blocks);
        }
        self.cut(num_victims, in_flight);
        *behind = victims;
        if in_flight {
            self.soon_free = Some(blocks.num - 1);
            return false;
        }
        self.num_holding -= num_victims;
        self.blocks = blocks;
        true
    }

    /// From now on, nobody of this priority or a worse one is admitted.
    fn close(&mut self, priority: i32) {
        self.closed_from = Some(self.closed_from.map_or(priority, |from| from.min(priority)));
    }

    /// Blocks that only draining sequences hold.
    fn drained_blocks(&self) -> usize {
        if self.state.num_draining() == 0 {
            return 0;
        }
        let mut blocks = self.blocks.clone();
        let draining = self.state.sequences.values().filter(|seq| seq.phase == Phase::Draining);
        draining.map(|seq| blocks.release(&self.state.pool, &seq.blocks)).sum()
    }

    /// Up to `num_drafts` more tokens per decode row, from what no decode row, no prefill in progress and no newcomer
    /// needs.
    fn drafts(&mut self, num_drafts: usize) {
        if num_drafts == 0 {
            return;
        }
        let prefilling = self.running().filter(|seq| seq.is_prefilling()).count();
        let newcomer = usize::from(!self.state.waiting.is_empty());
        let mut spare = self.num_tokens.saturating_sub(prefilling + newcomer);
        let config = &self.state.config;
        for row in &mut self.plan.decode {
            let seq = &self.state.sequences[&row.seq];
            if !seq.run_ahead {
                continue;
            }
            let held = seq.blocks.len().max(config.blocks_for(row.start + 1));
            let slots = (held + self.blocks.num) * config.block_size - (row.start + 1);
            let to_limit = seq.max_len - seq.len_upper_bound() - 1;
            row.num_drafts = num_drafts.min(to_limit).min(slots).min(spare);
            self.blocks.num -= config.blocks_for(row.start + 1 + row.num_drafts).saturating_sub(held);
            self.num_tokens -= row.num_drafts;
            spare -= row.num_drafts;
        }
    }

    /// Chunks of running and of waiting sequences, in one order of service.
    fn prefill(&mut self) {
        let budget = self.num_tokens;
        let mut line = Line::new(self.state);
        while !self.is_full() {
            let Some(next) = line.next(self.num_running) else { return };
            let seq = next.seq;
            let start = if next.waits { self.admit(seq, true) } else { Some(seq.placed) };
            let Some(start) = start else {
                line.admits = false;
                continue;
            };
            if next.prefill_len() - start > self.num_tokens {
                self.overtake(&mut line, seq.turn.priority, budget / 2);
                self.chunk(&next, start);
                return;
            }
            self.chunk(&next, start);
        }
    }

    /// Plans short prefills that would otherwise wait behind a long one, of the same priority, that takes all that is
    /// left of the budget: those that fit whole in `reserve`.
    fn overtake(&mut self, line: &mut Line<'a>, priority: i32, reserve: usize) {
        // The long one goes on, too.
        let mut reserve = reserve.min(self.num_tokens - 1);
        while reserve > 0 && self.num_seqs > 1 {
            let Some(next) = line.next(self.num_running).filter(|next| next.seq.turn.priority == priority)
            else {
                return;
            };
            let seq = next.seq;
            let mut start = seq.placed;
            if next.waits {
                start = self.found(seq).shared * self.state.config.block_size;
                // A long one that is overtaken while it waits keeps its seat and its blocks from those behind it.
                let fits = seq.tokens.len() - start <= reserve;
                if self.admit(seq, fits).is_none() {
                    line.admits = false;
                    continue;
                }
            }
            let len = next.prefill_len() - start;
            if len <= reserve {
                self.chunk(&next, start);
                reserve -= len;
            }
        }
    }

    /// As much of a prefill, from `start` on, as the budget allows.
    fn chunk(&mut self, next: &Next<'a>, start: usize) {
        let left = next.prefill_len() - start;
        let len = left.min(self.num_tokens);
        self.num_tokens -= len;
        self.num_seqs -= 1;
        self.plan.prefill.push(PrefillChunk { seq: next.seq.id, start, len, samples: len == left });
    }

    /// Takes a seat and blocks for all known tokens of a waiting sequence, and says where its prefill begins. `None`:
    /// it does not fit, and nobody behind it is admitted either. If it `may_preempt`, running sequences of a strictly
    /// worse priority give way to it.
    fn admit(&mut self, seq: &Sequence, may_preempt: bool) -> Option<usize> {
        if self.closed_from.is_some_and(|from| from <= seq.turn.priority) {
            return None;
        }
        let found = self.found(seq);
        let headroom = self.state.config.blocks_for(self.headroom(seq));
        let fits = |holding: usize, blocks: &Available| {
            holding < self.state.config.max_num_seqs
                && self.need(seq, &found, blocks) + headroom <= blocks.num
        };
        if !fits(self.num_holding, &self.blocks) {
            if !may_preempt {
                return None;
            }
            // The fewest of the last running ones that make room; if all do not, nobody gives way.
            let mut blocks = self.blocks.clone();
            let mut num_victims = 0;
            let mut in_flight = false;
            for victim in self.victims(seq.turn.priority) {
                num_victims += 1;
                in_flight |= victim.is_in_flight();
                blocks.num += self.planned_blocks(victim);
                blocks.release(&self.state.pool, &victim.blocks);
                if fits(self.num_holding - num_victims, &blocks) {
                    break;
                }
            }
            if !fits(self.num_holding - num_victims, &blocks) {
                return None;
            }
            self.cut(num_victims, in_flight);
            if in_flight {
                return None;
            }
            self.num_holding -= num_victims;
            self.blocks = blocks;
        }
        let hashes = seq.shareable(self.state.config.block_size);
        self.blocks.num -= self.state.config.blocks_for(seq.tokens.len()) - found.shared;
        for &hash in &hashes[..found.indexed] {
            let block = self.state.pool.find(hash).expect("found just above");
            self.blocks.share(&self.state.pool, block);
        }
        self.num_holding += 1;
        self.admitted_growth += self.growth(seq);
        Some(found.shared * self.state.config.block_size)
    }

    /// Running sequences of a strictly worse priority, the last one first.
    fn victims(&self, priority: i32) -> impl Iterator<Item = &'a Sequence> + use<'a> {
        let given_up = self.state.running.len() - self.num_running;
        self.state.running().rev().skip(given_up).take_while(move |seq| seq.turn.priority > priority)
    }

    /// Blocks that the plan takes for the decode row of a sequence, if it has one.
    fn planned_blocks(&self, seq: &Sequence) -> usize {
        let row = self.plan.decode.iter().rev().find(|row| row.seq == seq.id);
        row.map_or(0, |row| {
            let config = &self.state.config;
            config.blocks_for(row.start + 1 + row.num_drafts).saturating_sub(seq.blocks.len())
        })
    }

    /// Takes the last running sequences out of the plan: for good, or, while some are `in_flight`, out of this step only,
    /// after which none is.
    fn cut(&mut self, num_victims: usize, in_flight: bool) {
        for _ in 0..num_victims {
            let victim = self.victims(i32::MIN).next().expect("counted by the caller");
            self.close(victim.turn.priority);
            if in_flight {
                self.blocks.num += self.planned_blocks(victim);
            } else {
                self.plan.preempt.push(victim.id);
            }
            if let Some(row) = self.plan.decode.pop_if(|row| row.seq == victim.id) {
                self.num_tokens += 1 + row.num_drafts;
                self.num_seqs += 1;
            }
            self.num_running -= 1;
        }
    }

    /// What of a waiting sequence need not be computed.
    fn found(&self, seq: &Sequence) -> Found {
        let hashes = seq.shareable(self.state.config.block_size);
        let indexed = hashes.iter().take_while(|&&hash| self.state.pool.find(hash).is_some()).count();
        let filled = |&at: &usize| self.plan.prefill.iter().any(|chunk| self.fills(chunk, at, hashes[at]));
        let shared = indexed + (indexed..hashes.len()).take_while(filled).count();
        Found { indexed, shared }
    }

    /// Whether a chunk of the plan completes its sequence's block `at`, and that has this hash.
    fn fills(&self, chunk: &PrefillChunk, at: usize, hash: BlockHash) -> bool {
        let block_size = self.state.config.block_size;
        (chunk.start / block_size..(chunk.start + chunk.len) / block_size).contains(&at)
            && self.state.sequences[&chunk.seq].chain.hashes().get(at) == Some(&hash)
    }

    /// Available blocks that a waiting sequence takes: new ones, and cached ones that it finds.
    fn need(&self, seq: &Sequence, found: &Found, blocks: &Available) -> usize {
        let config = &self.state.config;
        let hashes = &seq.shareable(config.block_size)[..found.indexed];
        let pool = &self.state.pool;
        let is_cached =
            |&&hash: &&BlockHash| pool.find(hash).is_some_and(|block| blocks.refs(pool, block) == 0);
        config.blocks_for(seq.tokens.len()) - found.shared + hashes.iter().filter(is_cached).count()
    }

    /// Tokens by which the sequences that do not give way to `seq` should be able to grow once it is admitted.
    fn headroom(&self, seq: &Sequence) -> usize {
        let stay = self.running().take_while(|running| running.turn.priority <= seq.turn.priority);
        self.admitted_growth + stay.map(|running| self.growth(running)).sum::<usize>()
    }

    /// Tokens by which a sequence should be able to grow before it lacks a block.
    fn growth(&self, seq: &Sequence) -> usize {
        self.state.config.headroom_tokens.min(seq.max_len - seq.len_upper_bound())
    }
}

/// A sequence whose turn it is to be prefilled.
struct Next<'a> {
    seq: &'a Sequence,
    waits: bool,
}

impl Next<'_> {
    fn prefill_len(&self) -> usize {
        if self.waits { self.seq.tokens.len() } else { self.seq.prefill_len }
    }
}

/// Running and waiting sequences with something to prefill, in one order of service.
struct Line<'a> {
    state: &'a State,
    /// With their places among the running.
    running: Peekable<Enumerate<Values<'a, Turn, SeqId>>>,
    waiting: Peekable<Values<'a, Turn, SeqId>>,
    /// Whether the waiting ones still have a turn.
    admits: bool,
}

impl<'a> Line<'a> {
    fn new(state: &'a State) -> Self {
        Self {
            state,
            running: state.running.values().enumerate().peekable(),
            waiting: state.waiting.values().peekable(),
            admits: true,
        }
    }

    /// The next in service, from the first `num_running` and the waiting.
    fn next(&mut self, num_running: usize) -> Option<Next<'a>> {
        let sequences = &self.state.sequences;
        let skip = |&(at, id): &(usize, &SeqId)| at < num_running && !sequences[id].is_prefilling();
        while self.running.next_if(skip).is_some() {}
        let runs = self.running.peek().filter(|&&(at, _)| at < num_running).map(|&(_, id)| &sequences[id]);
        let waits = self.waiting.peek().filter(|_| self.admits).map(|&id| &sequences[id]);
        match (runs, waits) {
            (Some(seq), None) => {
                self.running.next();
                Some(Next { seq, waits: false })
            }
            (Some(seq), Some(other)) if seq.turn < other.turn => {
                self.running.next();
                Some(Next { seq, waits: false })
            }
            (_, Some(seq)) => {
                self.waiting.next();
                Some(Next { seq, waits: true })
            }
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{config, drawn, finish, sequence, shape, start, start_with, state, step};
    use crate::{NewSequence, SchedConfig, begin, commit};
    use proptest::prelude::*;
    use r1_core::TokenId;

    #[test]
    fn prompts_are_cut_into_chunks_and_only_the_last_one_samples() {
        let mut state = state(config(20));
        state.add(sequence(1, 40, 3)).unwrap();
        let chunks: Vec<_> = (0..4).map(|_| shape(&step(&mut state, 9).0)).collect();
        assert_eq!(chunks[0], (vec![], vec![(1, 0, 16, false)], vec![]));
        assert_eq!(chunks[1], (vec![], vec![(1, 16, 16, false)], vec![]));
        assert_eq!(chunks[2], (vec![], vec![(1, 32, 8, true)], vec![]));
        assert_eq!(chunks[3], (vec![1], vec![], vec![]));
    }

    #[test]
    fn decode_comes_first_and_prefill_fills_the_budget() {
        let mut state = state(config(20));
        state.add(sequence(1, 6, 9)).unwrap();
        state.add(sequence(2, 6, 9)).unwrap();
        step(&mut state, 9);
        state.add(sequence(3, 20, 9)).unwrap();
        let (chosen, _) = step(&mut state, 9);
        assert_eq!(shape(&chosen), (vec![1, 2], vec![(3, 0, 14, false)], vec![]));
        assert_eq!((chosen.num_tokens(), chosen.num_seqs()), (16, 3));
    }

    #[test]
    fn priority_then_arrival_orders_running_and_waiting_prefills_alike() {
        let mut state = state(config(30));
        let with = |id, len, priority| NewSequence { priority, ..sequence(id, len, 2) };
        state.add(with(1, 20, 1)).unwrap();
        assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 0, 16, false)]);
        state.add(with(2, 3, 1)).unwrap();
        state.add(with(3, 3, 0)).unwrap();
        state.add(with(4, 3, -1)).unwrap();
        let expect = [(4, 0, 3, true), (3, 0, 3, true), (1, 16, 4, true), (2, 0, 3, true)];
        assert_eq!(shape(&step(&mut state, 9).0).1, expect);
    }

    #[test]
    fn nobody_passes_a_sequence_that_does_not_fit_yet() {
        let mut state = state(config(6));
        state.add(sequence(1, 12, 4)).unwrap();
        state.add(sequence(2, 16, 4)).unwrap();
        state.add(sequence(3, 1, 1)).unwrap();
        assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 0, 12, true)]);
        assert_eq!(
            shape(&step(&mut state, 9).0),
            (vec![1], vec![], vec![]),
            "3 would fit, but waits behind 2"
        );
    }

    #[test]
    fn at_most_max_num_seqs_hold_blocks_even_while_some_drain() {
        let mut state = state(SchedConfig { depth: 2, ..config(20) });
        for id in 1..=5 {
            state.add(sequence(id, 2, 9)).unwrap();
        }
        let first = start(&mut state);
        assert_eq!(first.1.num_seqs(), 4);
        state.abort(SeqId(1)).unwrap();
        let second = start(&mut state);
        assert_eq!(shape(&second.1), (vec![2, 3, 4], vec![], vec![]));
        finish(&mut state, &first, 9);
        assert_eq!(shape(&plan(&state, &state.limits())), (vec![2, 3, 4], vec![(5, 0, 2, true)], vec![]));
    }

    #[test]
    fn headroom_holds_back_a_newcomer_but_never_a_lone_sequence() {
        let admitted = |headroom_tokens| {
            let mut state = state(SchedConfig { headroom_tokens, ..config(5) });
            state.add(sequence(1, 8, 12)).unwrap();
            state.add(sequence(2, 8, 12)).unwrap();
            plan(&state, &state.limits()).prefill.len()
        };
        assert_eq!((admitted(0), admitted(4), admitted(5), admitted(1000)), (2, 2, 1, 1));
    }

    #[test]
    fn headroom_is_no_more_than_a_sequence_can_grow() {
        let mut state = state(SchedConfig { headroom_tokens: 1000, ..config(5) });
        state.add(sequence(1, 8, 4)).unwrap();
        state.add(sequence(2, 8, 12)).unwrap();
        assert_eq!(plan(&state, &state.limits()).prefill.len(), 2);
    }

    /// Two sequences of two full blocks each, and nothing free.
    fn full(depth: usize) -> State {
        let mut state = state(SchedConfig { depth, ..config(4) });
        state.add(sequence(1, 8, 8)).unwrap();
        state.add(sequence(2, 8, 8)).unwrap();
        state
    }

    #[test]
    fn the_last_running_sequence_gives_its_blocks_to_the_first_that_lacks_one() {
        let mut state = full(1);
        step(&mut state, 9);
        let (chosen, _) = step(&mut state, 10);
        assert_eq!(shape(&chosen), (vec![1], vec![], vec![2]));
        let seq = state.sequence(SeqId(2)).unwrap();
        assert_eq!((seq.tokens().len(), seq.block_table().len()), (9, 0), "what it has drawn stays");
        assert_eq!(state.stats().preemptions, 1);
        state.add(sequence(3, 1, 1)).unwrap();
        let order: Vec<_> = state.waiting().map(|seq| seq.id().0).collect();
        assert_eq!(order, [2, 3], "back in front");
        let mut last = Vec::new();
        while last.is_empty() {
            last = step(&mut state, 11).1;
        }
        assert_eq!((last[0].seq, last[0].output().len()), (SeqId(1), 8));
        let (chosen, _) = step(&mut state, 12);
        assert_eq!(
            shape(&chosen).1,
            [(2, 0, 9, true), (3, 0, 1, true)],
            "prompt and output are computed anew"
        );
    }

    #[test]
    fn a_better_priority_arriving_later_takes_the_blocks_of_a_worse_one() {
        let mut state = state(config(4));
        state.add(NewSequence { priority: 5, ..sequence(1, 8, 8) }).unwrap();
        state.add(NewSequence { priority: 0, ..sequence(2, 8, 8) }).unwrap();
        step(&mut state, 9);
        assert_eq!(shape(&step(&mut state, 9).0), (vec![2], vec![], vec![1]));
    }

    #[test]
    fn the_last_sequence_waits_with_its_blocks() {
        let mut state = state(config(5));
        state.add(sequence(1, 10, 3)).unwrap();
        state.add(sequence(2, 8, 8)).unwrap();
        // 1 fills its third block and ends; 2 lacks a block meanwhile and takes none from anybody.
        assert_eq!(shape(&step(&mut state, 9).0).1.len(), 2);
        assert_eq!(shape(&step(&mut state, 9).0).0, [1]);
        assert_eq!(step(&mut state, 9).1[0].seq, SeqId(1));
        assert_eq!(shape(&step(&mut state, 9).0), (vec![2], vec![], vec![]));
        assert_eq!(state.stats().preemptions, 0);
    }

    #[test]
    fn a_victim_in_flight_sits_out_a_step_and_gives_up_its_blocks_in_the_next() {
        let mut state = full(2);
        let first = start(&mut state);
        assert!(
            plan(&state, &state.limits()).is_empty(),
            "1 lacks a block, 2 is in flight and may not go on"
        );
        finish(&mut state, &first, 9);
        assert_eq!(shape(&plan(&state, &state.limits())), (vec![1], vec![], vec![2]));
    }

    #[test]
    fn a_victim_kept_out_is_spared_when_blocks_come_free_meanwhile() {
        let mut state = state(SchedConfig { depth: 2, ..config(5) });
        state.add(sequence(1, 4, 12)).unwrap();
        state.add(sequence(2, 4, 12)).unwrap();
        state.add(sequence(3, 8, 4)).unwrap();
        let first = start(&mut state);
        let second = start(&mut state);
        assert_eq!(shape(&second.1), (vec![1], vec![], vec![]), "2 lacks a block, and 3 sits out for it");
        state.abort(SeqId(3)).unwrap();
        finish(&mut state, &first, 9);
        let third = start(&mut state);
        assert_eq!(shape(&third.1), (vec![1, 2], vec![], vec![]));
        assert_eq!(state.stats().preemptions, 0);
    }

    #[test]
    fn a_draining_sequence_spares_a_preemption() {
        let mut state = state(SchedConfig { depth: 2, ..config(3) });
        state.add(sequence(1, 2, 8)).unwrap();
        state.add(sequence(2, 4, 8)).unwrap();
        state.add(sequence(3, 2, 8)).unwrap();
        let first = start(&mut state);
        finish(&mut state, &first, 9);
        let limits = Limits { max_num_seqs: 1, ..state.limits() };
        let second = start_with(&mut state, &limits);
        state.abort(SeqId(1)).unwrap();
        // 2 lacks a block and 3 could give its own at once, but that of 1 comes free without recomputing anything.
        let third = start(&mut state);
        assert_eq!(shape(&third.1), (vec![3], vec![], vec![]));
        commit(&mut state, second.0, []);
        assert_eq!(shape(&plan(&state, &state.limits())), (vec![2, 3], vec![], vec![]));
    }

    #[test]
    fn run_ahead_plans_a_token_that_is_still_in_flight_but_none_past_the_limit() {
        let mut state = state(SchedConfig { depth: 2, ..config(8) });
        state.add(sequence(1, 4, 2)).unwrap();
        let first = start(&mut state);
        let second = start(&mut state);
        assert_eq!(second.1.decode, [Decode { seq: SeqId(1), start: 4, num_drafts: 0 }]);
        assert_eq!(state.tokens(SeqId(1)).len(), 4, "the token at position 4 is not known yet");
        assert!(plan(&state, &state.limits()).is_empty(), "depth is reached");
        finish(&mut state, &first, 9);
        assert!(plan(&state, &state.limits()).is_empty(), "both tokens are in flight");
        assert_eq!(finish(&mut state, &second, 9).len(), 1);
    }

    #[test]
    fn drafts_stay_within_limit_budget_and_cache() {
        let drafts = |new, budget, num_blocks| {
            let mut state = state(config(num_blocks));
            state.add(sequence(1, 5, new)).unwrap();
            step(&mut state, 9);
            let limits = Limits { num_drafts: 6, max_num_batched_tokens: budget, ..state.limits() };
            start_with(&mut state, &limits).1.decode[0].num_drafts
        };
        assert_eq!(drafts(20, 16, 8), 6);
        assert_eq!(drafts(4, 16, 8), 2, "6 tokens known, 9 at most: the row may draw 3");
        assert_eq!(drafts(20, 4, 8), 3);
        assert_eq!(drafts(4, 16, 2), 2);
        let mut state = state(config(4));
        state.add(sequence(1, 5, 8)).unwrap();
        state.add(sequence(2, 5, 8)).unwrap();
        step(&mut state, 9);
        let limits = Limits { num_drafts: 6, ..state.limits() };
        let rows: Vec<_> =
            start_with(&mut state, &limits).1.decode.iter().map(|row| row.num_drafts).collect();
        assert_eq!(rows, [2, 2], "no free block, so up to the end of the last one");
    }

    #[test]
    fn drafts_leave_a_token_for_each_prefill() {
        let mut state = state(SchedConfig { max_num_batched_tokens: 4, ..config(20) });
        state.add(sequence(1, 2, 20)).unwrap();
        state.add(sequence(2, 10, 2)).unwrap();
        step(&mut state, 9);
        let chosen = plan(&state, &Limits { num_drafts: 9, ..state.limits() });
        assert_eq!((chosen.decode[0].num_drafts, chosen.prefill[0].len), (2, 1));
    }

    #[test]
    fn drafts_in_flight_count_as_accepted() {
        let mut state = state(SchedConfig { depth: 2, ..config(20) });
        state.add(sequence(1, 4, 9)).unwrap();
        let first = start(&mut state);
        let limits = Limits { num_drafts: 3, ..state.limits() };
        let second = start_with(&mut state, &limits);
        finish(&mut state, &first, 9);
        let third = start_with(&mut state, &limits);
        assert_eq!(third.1.decode, [Decode { seq: SeqId(1), start: 8, num_drafts: 3 }]);
        commit(&mut state, second.0, [drawn(SeqId(1), &[10, 11].map(TokenId))]);
        // Two of four were drawn: what was planned at 8 ran at 6.
        commit(&mut state, third.0, [drawn(SeqId(1), &[TokenId(12)])]);
        assert_eq!(plan(&state, &limits).decode, [Decode { seq: SeqId(1), start: 7, num_drafts: 3 }]);
        state.audit();
    }

    proptest! {
        /// Whatever waits: a plan is within its limits, begins cleanly, and is the same for the same state.
        #[test]
        fn plans_respect_limits(
            prompts in prop::collection::vec((1_usize..40, 1_u32..20, -2..3_i32), 1..8),
            num_blocks in 10_usize..40,
            depth in 1_usize..=2,
            budgets in prop::collection::vec((1_usize..20, 1_usize..6, 0_usize..4), 1..30),
        ) {
            let mut state = state(SchedConfig { depth, ..config(num_blocks) });
            for (id, (len, new, priority)) in prompts.into_iter().enumerate() {
                // Those too large for the cache are refused, which is another test.
                let _ = state.add(NewSequence { priority, ..sequence(id as u64, len, new) });
            }
            let mut in_flight = std::collections::VecDeque::new();
            for (max_num_batched_tokens, max_num_seqs, num_drafts) in budgets {
                let limits = Limits { max_num_batched_tokens, max_num_seqs, num_drafts };
                let chosen = plan(&state, &limits);
                prop_assert_eq!(&chosen, &plan(&state.clone(), &limits));
                prop_assert!(chosen.num_tokens() <= max_num_batched_tokens.min(16));
                prop_assert!(chosen.num_seqs() <= max_num_seqs.min(4));
                if !chosen.is_empty() {
                    let id = begin(&mut state, &chosen);
                    state.audit();
                    in_flight.push_back((id, chosen));
                }
                if in_flight.len() == depth {
                    finish(&mut state, &in_flight.pop_front().unwrap(), 9);
                }
            }
        }
    }
}
