//! Chooses the next step. Pure: reads the state, changes nothing; [`begin`](crate::begin) carries the plan out.

mod available;
mod line;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Values;

use r1_core::SeqId;

use crate::prefix::BlockHash;
use crate::sequence::Turn;
use crate::{Limits, Phase, Sequence, State};
use available::Available;
use line::{Line, Next};

/// One step: which rows, and who loses their blocks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sequences that run their last token, in order of service.
    pub decode: Vec<Decode>,
    /// Pieces of known tokens, in order of service; but one that cannot finish its prompt comes last, behind those that
    /// overtake it. At most one per sequence, and none for one that decodes.
    pub prefill: Vec<PrefillChunk>,
    /// Sequences that give up their blocks before the step and wait to be computed anew, the last in service first.
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
    /// Position of the first token; exact. What lies before it has been run, or was found in the prefix cache.
    pub start: usize,
    /// Number of tokens, at least 1.
    pub len: usize,
    /// Whether the chunk ends with the last known token, after which the next one is drawn.
    pub samples: bool,
}

impl Plan {
    /// Nothing can run now: commit the oldest step in flight, or wait for a sequence. Never empty while a sequence is
    /// live and nothing is in flight, unless the limits of the step are 0 or a sequence is paused.
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

/// The same as [`plan`], into a plan whose vectors are used again. As long as nobody is admitted and nobody gives way, it
/// allocates nothing once they have their size.
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
    /// Rows of logits beyond one per sequence.
    num_logits: usize,
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
            num_logits: limits.max_prompt_logits.min(state.config.max_prompt_logits),
            blocks: Available::new(&state.pool),
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
        while let Some(next) = line.next(self.num_running) {
            // A full step may still hold rows of sequences that give way to one that waits.
            if self.is_full() && !next.waits {
                return;
            }
            let seq = next.seq;
            let start = if next.waits { self.admit(seq, true) } else { Some(seq.placed) };
            let Some(start) = start else {
                line.admits = false;
                continue;
            };
            // A prompt whose logits are wanted leaves what it has no rows for to those behind it.
            if self.rows_allow(&next, start) > self.num_tokens {
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
                let len = seq.tokens.len() - start;
                let fits = len <= reserve && seq.prompt_logits(start, len).is_empty();
                if self.admit(seq, fits).is_none() {
                    line.admits = false;
                    continue;
                }
            }
            let len = next.prefill_len() - start;
            if len <= reserve && seq.prompt_logits(start, len).is_empty() {
                self.chunk(&next, start);
                reserve -= len;
            }
        }
    }

    /// As much of a prefill, from `start` on, as there are rows of logits for.
    fn rows_allow(&self, next: &Next<'a>, start: usize) -> usize {
        next.seq.chunk_of_rows(start, next.prefill_len() - start, 1 + self.num_logits)
    }

    /// As much of a prefill, from `start` on, as the budget allows.
    fn chunk(&mut self, next: &Next<'a>, start: usize) {
        let left = next.prefill_len() - start;
        let len = self.rows_allow(next, start).min(self.num_tokens);
        let rows = next.seq.prompt_logits(start, len).len() + usize::from(len == left);
        self.num_tokens -= len;
        self.num_seqs -= 1;
        self.num_logits -= rows.saturating_sub(1);
        self.plan.prefill.push(PrefillChunk { seq: next.seq.id, start, len, samples: len == left });
    }

    /// Takes a seat and blocks for all known tokens of a waiting sequence, and says where its prefill begins. `None`:
    /// it does not fit, or the step is full, and nobody behind it is admitted either. If it `may_preempt`, running
    /// sequences of a strictly worse priority give way to it.
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
            let (mut in_flight, mut is_full) = (false, self.is_full());
            for victim in self.victims(seq.turn.priority) {
                num_victims += 1;
                in_flight |= victim.is_in_flight();
                if let Some(num_blocks) = self.planned_blocks(victim) {
                    blocks.num += num_blocks;
                    is_full = false;
                }
                blocks.release(&self.state.pool, &victim.blocks);
                if fits(self.num_holding - num_victims, &blocks) {
                    break;
                }
            }
            if is_full || !fits(self.num_holding - num_victims, &blocks) {
                return None;
            }
            self.cut(num_victims, in_flight);
            if in_flight {
                return None;
            }
            self.num_holding -= num_victims;
            self.blocks = blocks;
        }
        if self.is_full() {
            return None;
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
    fn planned_blocks(&self, seq: &Sequence) -> Option<usize> {
        let row = self.plan.decode.iter().rev().find(|row| row.seq == seq.id);
        row.map(|row| {
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
                self.blocks.num += self.planned_blocks(victim).unwrap_or(0);
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
        let seq = &self.state.sequences[&chunk.seq];
        let end = (chunk.start + chunk.len).min(seq.num_final());
        (chunk.start / block_size..end / block_size).contains(&at)
            && seq.chain.hashes().get(at) == Some(&hash)
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
