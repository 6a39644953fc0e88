//! Every sequence, every block and every step in flight. [`plan`](crate::plan) reads it; [`begin`](crate::begin) and
//! [`commit`](crate::commit) move it on.

use std::collections::{BTreeMap, VecDeque};

use r1_core::{BlockId, FinishReason, SeqId, TokenId};

use crate::prefix::HashChain;
use crate::sequence::Turn;
use crate::step::{Row, Step};
use crate::{BlockPool, Finished, Limits, NewSequence, Phase, SchedConfig, SchedError, Sequence};

/// The scheduler's whole state.
#[derive(Clone, Debug)]
pub struct State {
    pub(crate) config: SchedConfig,
    pub(crate) pool: BlockPool,
    pub(crate) sequences: BTreeMap<SeqId, Sequence>,
    /// In order of service.
    pub(crate) running: BTreeMap<Turn, SeqId>,
    /// In order of service.
    pub(crate) waiting: BTreeMap<Turn, SeqId>,
    /// Oldest first.
    pub(crate) in_flight: VecDeque<Step>,
    pub(crate) num_arrivals: u64,
    pub(crate) num_steps: u64,
    pub(crate) num_preemptions: u64,
    pub(crate) prefix_queries_tokens: u64,
    pub(crate) prefix_hits_tokens: u64,
    /// Row lists of steps gone by, for those to come.
    pub(crate) spare_rows: Vec<Vec<Row>>,
}

/// What a dashboard wants to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that hold blocks and are planned.
    pub running: usize,
    /// Sequences that wait for blocks, preempted ones included.
    pub waiting: usize,
    /// Ended sequences whose blocks a step in flight still writes to.
    pub draining: usize,
    /// Steps begun and not committed.
    pub steps_in_flight: usize,
    /// Blocks in the KV cache.
    pub blocks_total: usize,
    /// Blocks that sequences hold.
    pub blocks_used: usize,
    /// Blocks that nobody holds and that hold nothing of worth.
    pub blocks_free: usize,
    /// Blocks that nobody holds, but whose content may be hit. Evicted when no block is free.
    pub blocks_cached: usize,
    /// Preemptions since the start.
    pub preemptions: u64,
    /// Known tokens of sequences when they were first admitted, since the start. 0 without a prefix cache.
    pub prefix_queries_tokens: u64,
    /// How many of these were found in the prefix cache.
    pub prefix_hits_tokens: u64,
}

impl State {
    /// An idle scheduler.
    pub fn new(config: SchedConfig) -> Result<Self, SchedError> {
        config.validate()?;
        Ok(Self {
            pool: BlockPool::new(config.num_blocks),
            config,
            sequences: BTreeMap::new(),
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            in_flight: VecDeque::new(),
            num_arrivals: 0,
            num_steps: 0,
            prefix_queries_tokens: 0,
            prefix_hits_tokens: 0,
            num_preemptions: 0,
            spare_rows: Vec::new(),
        })
    }

    /// Puts a sequence into the queue, or says why not. A sequence that is too large is told so even when the queue
    /// is full.
    pub fn add(&mut self, new: NewSequence) -> Result<(), SchedError> {
        let NewSequence { id, prompt, max_new_tokens, priority, cache_salt, run_ahead, prompt_logits } = new;
        let SchedConfig { max_model_len, num_blocks, max_queued, .. } = self.config;
        if self.sequences.contains_key(&id) {
            return Err(SchedError::DuplicateId { id });
        }
        if prompt.is_empty() {
            return Err(SchedError::EmptyPrompt);
        }
        if max_new_tokens == 0 {
            return Err(SchedError::NoNewTokens);
        }
        if prompt.len() >= max_model_len {
            return Err(SchedError::PromptTooLong { prompt: prompt.len(), max_model_len });
        }
        let max_len = prompt.len().saturating_add(max_new_tokens as usize).min(max_model_len);
        // The last token is drawn but never run, so it needs no slot.
        let needs_blocks = self.config.blocks_for(max_len - 1);
        if needs_blocks > num_blocks {
            return Err(SchedError::NeverFits { needs_blocks, num_blocks });
        }
        if self.waiting.len() >= max_queued {
            return Err(SchedError::QueueFull { max: max_queued });
        }
        let turn = Turn { priority, arrival: self.num_arrivals };
        self.num_arrivals += 1;
        self.waiting.insert(turn, id);
        let mut chain = HashChain::new(self.config.prefix_cache, cache_salt.as_deref());
        chain.extend(&prompt, self.config.block_size);
        let sequence = Sequence {
            id,
            turn,
            phase: Phase::Waiting,
            prompt_len: prompt.len(),
            tokens: prompt,
            max_len,
            run_ahead,
            paused: false,
            chain,
            blocks: Vec::new(),
            num_registered: 0,
            settled: 0,
            num_logits_given: if prompt_logits { 0 } else { usize::MAX },
            cached_tokens: None,
            placed: 0,
            pending: 0,
            prefill_len: 0,
            steps_in_flight: 0,
        };
        self.sequences.insert(id, sequence);
        Ok(())
    }

    /// Ends a sequence from outside. What it had is handed back at once; the blocks of one that is in flight are free
    /// when its last step has been committed, and what that step draws for it is discarded. `None`: there is no such
    /// sequence, or it has ended already.
    ///
    /// Must not come between a `plan` and its `begin`.
    pub fn abort(&mut self, id: SeqId) -> Option<Finished> {
        let phase = self.sequences.get(&id)?.phase;
        (phase != Phase::Draining).then(|| self.end(id, FinishReason::Abort))
    }

    /// Ends a live sequence: out of the order of service now, gone when no step in flight holds it.
    pub(crate) fn end(&mut self, id: SeqId, reason: FinishReason) -> Finished {
        let seq = self.sequences.get_mut(&id).expect("only live sequences end");
        let finished = seq.finish(reason);
        let queue = if seq.phase == Phase::Waiting { &mut self.waiting } else { &mut self.running };
        assert_eq!(queue.remove(&seq.turn), Some(id), "sequence {id} is not in its queue");
        seq.phase = Phase::Draining;
        self.drop_if_drained(id);
        finished
    }

    /// Removes an ended sequence that no step in flight holds any more, and frees its blocks.
    pub(crate) fn drop_if_drained(&mut self, id: SeqId) {
        if !self.sequences[&id].is_in_flight() {
            let mut seq = self.sequences.remove(&id).expect("looked up just above");
            self.pool.release(&mut seq.blocks);
        }
    }

    /// Keeps a sequence that may not run ahead out of steps that would draw a token for it, until it is resumed: the host
    /// has to find out something first. It keeps its blocks and its place in the order of service, and what it has to
    /// prefill is prefilled. Nothing happens when there is no such sequence.
    ///
    /// Panics when the sequence may run ahead. Must not come between a `plan` and its `begin`.
    pub fn pause(&mut self, id: SeqId) {
        if let Some(seq) = self.sequences.get_mut(&id) {
            assert!(!seq.run_ahead, "sequence {id} runs ahead of the host, and cannot be paused");
            seq.paused = true;
        }
    }

    /// Lets a paused sequence go on. Nothing happens when it is not paused, or gone.
    ///
    /// Must not come between a `plan` and its `begin`.
    pub fn resume(&mut self, id: SeqId) {
        if let Some(seq) = self.sequences.get_mut(&id) {
            seq.paused = false;
        }
    }

    /// Forgets every block that could be hit: cached blocks become free, and those in use are not found any more. Gives
    /// the number of blocks that became free.
    ///
    /// Must not come between a `plan` and its `begin`.
    pub fn flush_prefix_cache(&mut self) -> usize {
        let num_cached = self.pool.num_cached();
        self.pool.flush();
        num_cached
    }

    /// What it was made with.
    pub fn config(&self) -> &SchedConfig {
        &self.config
    }

    /// The configuration's limits of a step; narrow them or ask for drafts, then pass them to `plan`.
    pub fn limits(&self) -> Limits {
        self.config.limits()
    }

    /// The sequence of that name: live, or draining.
    pub fn sequence(&self, id: SeqId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// The blocks of a sequence that a step has just begun. Panics when there is no such sequence.
    pub fn block_table(&self, id: SeqId) -> &[BlockId] {
        self.sequences.get(&id).unwrap_or_else(|| panic!("no sequence {id}")).block_table()
    }

    /// Prompt and committed output of a sequence. Panics when there is no such sequence.
    pub fn tokens(&self, id: SeqId) -> &[TokenId] {
        self.sequences.get(&id).unwrap_or_else(|| panic!("no sequence {id}")).tokens()
    }

    /// Running sequences in order of service.
    pub fn running(&self) -> impl DoubleEndedIterator<Item = &Sequence> {
        self.running.values().map(|id| &self.sequences[id])
    }

    /// Waiting sequences in order of service.
    pub fn waiting(&self) -> impl DoubleEndedIterator<Item = &Sequence> {
        self.waiting.values().map(|id| &self.sequences[id])
    }

    /// Steps begun and not committed.
    pub fn steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Ended sequences that a step in flight still holds.
    pub(crate) fn num_draining(&self) -> usize {
        self.sequences.len() - self.running.len() - self.waiting.len()
    }

    /// Nothing waits, nothing runs, nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.in_flight.is_empty()
    }

    /// Counts.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            draining: self.num_draining(),
            steps_in_flight: self.in_flight.len(),
            blocks_total: self.pool.total(),
            blocks_used: self.pool.num_used(),
            blocks_free: self.pool.num_free(),
            blocks_cached: self.pool.num_cached(),
            preemptions: self.num_preemptions,
            prefix_queries_tokens: self.prefix_queries_tokens,
            prefix_hits_tokens: self.prefix_hits_tokens,
        }
    }

    /// Free + used + cached blocks = all blocks, and the tables hold as many blocks as references are counted. Panics
    /// otherwise. Every commit calls it.
    pub(crate) fn check_totals(&self) {
        self.pool.check_totals();
        let held: usize = self.sequences.values().map(|seq| seq.blocks.len()).sum();
        let refs = self.pool.num_refs();
        assert_eq!(refs, held, "{refs} references to blocks, but the tables hold {held}");
    }

    /// Checks every invariant in O(blocks + sequences) and panics when one is broken: each block is free, cached or
    /// counted once per table, index and order of eviction agree, queues and phases agree, counts match the steps in
    /// flight, no sequence is past its limits.
    pub fn audit(&self) {
        self.check_totals();
        self.pool.audit(self.sequences.values().map(|seq| seq.blocks.as_slice()));
        assert!(self.in_flight.len() <= self.config.depth, "more steps in flight than depth");
        assert!(
            self.running.len() + self.num_draining() <= self.config.max_num_seqs,
            "more than max_num_seqs"
        );
        for seq in self.sequences.values() {
            let id = seq.id;
            let rows = |step: &Step| step.rows.iter().filter(|row| row.seq == id).count();
            assert!(
                self.in_flight.iter().all(|step| rows(step) <= 1),
                "sequence {id} has two rows in a step"
            );
            let in_flight: usize = self.in_flight.iter().map(rows).sum();
            assert_eq!(seq.steps_in_flight, in_flight, "steps in flight of sequence {id}");
            let queued = (self.running.get(&seq.turn) == Some(&id), self.waiting.get(&seq.turn) == Some(&id));
            match seq.phase {
                Phase::Waiting => {
                    assert_eq!(queued, (false, true), "queue of sequence {id}");
                    let nothing =
                        (seq.blocks.len(), seq.placed + seq.settled, seq.pending, seq.steps_in_flight);
                    assert_eq!(nothing, (0, 0, 0, 0), "waiting sequence {id} holds something");
                }
                Phase::Running => {
                    assert_eq!(queued, (true, false), "queue of sequence {id}");
                    assert!(
                        seq.placed <= seq.blocks.len() * self.config.block_size,
                        "slots of sequence {id}"
                    );
                    assert!(seq.len_upper_bound() <= seq.max_len, "sequence {id} is past its limit");
                    assert!(
                        seq.num_registered * self.config.block_size <= seq.placed.min(seq.num_final()),
                        "sequence {id} registered what is not written"
                    );
                    assert!(
                        seq.settled <= seq.placed && (seq.settled == seq.placed || seq.is_in_flight()),
                        "sequence {id} has settled {} of {} positions",
                        seq.settled,
                        seq.placed
                    );
                    let to_place = seq.len_upper_bound() - seq.placed;
                    assert!(
                        seq.is_prefilling() || to_place == 1,
                        "sequence {id} has {to_place} tokens to place"
                    );
                    assert!(
                        !seq.is_prefilling() || seq.pending == 0,
                        "prefilling sequence {id} has tokens pending"
                    );
                }
                Phase::Draining => {
                    assert_eq!(queued, (false, false), "queue of sequence {id}");
                    assert!(seq.is_in_flight(), "sequence {id} drains for no step");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit;
    use crate::fixture::{config, finish, sequence, start, state, step};

    #[test]
    fn add_refuses_with_the_reason_and_its_values() {
        let mut state = state(SchedConfig { max_queued: 2, ..config(4) });
        let seq = |id, len, new| sequence(id, len, new);
        assert_eq!(state.add(seq(1, 0, 5)), Err(SchedError::EmptyPrompt));
        assert_eq!(state.add(seq(1, 1, 0)), Err(SchedError::NoNewTokens));
        let too_long = SchedError::PromptTooLong { prompt: 64, max_model_len: 64 };
        assert_eq!(state.add(seq(1, 64, 1)), Err(too_long));
        // 18 tokens at the end, 17 of which are run: 5 blocks of 4.
        assert_eq!(state.add(seq(1, 10, 8)), Err(SchedError::NeverFits { needs_blocks: 5, num_blocks: 4 }));
        assert_eq!(state.add(seq(1, 10, 7)), Ok(()));
        assert_eq!(state.add(seq(1, 3, 3)), Err(SchedError::DuplicateId { id: SeqId(1) }));
        assert_eq!(state.add(seq(2, 3, 3)), Ok(()));
        assert_eq!(state.add(seq(3, 3, 3)), Err(SchedError::QueueFull { max: 2 }));
        assert_eq!(state.add(seq(3, 0, 3)), Err(SchedError::EmptyPrompt), "what never works is said first");
        assert_eq!(state.stats().waiting, 2, "refused sequences leave nothing behind");
        state.audit();
    }

    #[test]
    fn the_model_length_bounds_what_a_sequence_needs() {
        let mut state = state(SchedConfig { max_model_len: 16, ..config(4) });
        state.add(sequence(1, 10, u32::MAX)).unwrap();
        assert_eq!(state.sequence(SeqId(1)).unwrap().max_len(), 16);
    }

    #[test]
    fn a_waiting_sequence_is_gone_with_its_abort() {
        let mut state = state(config(4));
        state.add(sequence(1, 3, 3)).unwrap();
        let aborted = state.abort(SeqId(1)).unwrap();
        assert_eq!((aborted.reason, aborted.output().len(), aborted.prompt_len), (FinishReason::Abort, 0, 3));
        assert!(state.is_idle());
        assert_eq!(state.abort(SeqId(1)), None);
        assert_eq!(state.add(sequence(1, 3, 3)), Ok(()), "the id is free again");
    }

    #[test]
    fn a_running_sequence_that_is_not_in_flight_frees_its_blocks_with_its_abort() {
        let mut state = state(config(4));
        state.add(sequence(1, 3, 3)).unwrap();
        step(&mut state, 9);
        let aborted = state.abort(SeqId(1)).unwrap();
        assert_eq!(aborted.output(), [TokenId(9)]);
        assert!(state.is_idle());
        assert_eq!(state.stats().blocks_free, 4);
    }

    #[test]
    fn a_sequence_in_flight_keeps_its_blocks_until_its_last_step_is_committed() {
        let mut state = state(SchedConfig { depth: 2, ..config(4) });
        state.add(sequence(1, 4, 8)).unwrap();
        let (first, second) = (start(&mut state), start(&mut state));
        assert_eq!(state.abort(SeqId(1)).unwrap().output(), []);
        assert_eq!(state.abort(SeqId(1)), None, "reported once");
        assert_eq!(state.add(sequence(1, 3, 3)), Err(SchedError::DuplicateId { id: SeqId(1) }));
        let used = |state: &State| (state.stats().blocks_used, state.stats().draining);
        assert_eq!(used(&state), (2, 1));
        assert_eq!(finish(&mut state, &first, 7), [], "what it drew is discarded");
        assert_eq!(used(&state), (2, 1));
        assert_eq!(commit(&mut state, second.0, []), [], "and need not be reported");
        assert_eq!(used(&state), (0, 0));
        assert!(state.is_idle());
    }

    #[test]
    #[should_panic(expected = "1 references to blocks, but the tables hold 0")]
    fn a_lost_block_is_noticed() {
        let mut state = state(config(4));
        state.pool.extend(&mut Vec::new(), 1);
        state.check_totals();
    }

    #[test]
    #[should_panic(expected = "tables that hold block 0")]
    fn a_block_in_a_table_that_is_not_counted_is_noticed() {
        let mut state = state(config(4));
        state.add(sequence(1, 3, 3)).unwrap();
        state.add(sequence(2, 8, 3)).unwrap();
        step(&mut state, 9);
        let block = state.block_table(SeqId(1))[0];
        state.sequences.get_mut(&SeqId(2)).unwrap().blocks[0] = block;
        state.audit();
    }
}
