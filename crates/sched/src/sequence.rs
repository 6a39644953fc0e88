//! One sequence as the scheduler sees it, what enters and what leaves. Knows nothing of other sequences.

use std::ops::Range;

use r1_core::{BlockId, FinishReason, SeqId, TokenId};

use crate::prefix::{BlockHash, HashChain};

/// A sequence to be generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSequence {
    /// Its name from now on.
    pub id: SeqId,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// At least 1; `max_model_len` may end the sequence earlier.
    pub max_new_tokens: u32,
    /// Lower goes first; arrival decides among equals.
    pub priority: i32,
    /// Sequences share cached blocks only if their salts are equal: any bytes, or none, which is a salt of its own.
    pub cache_salt: Option<Box<[u8]>>,
    /// Whether its next token may be drawn before the host has seen the one before. `false` for what depends on the
    /// tokens drawn (penalties, grammars): it is not planned while a token of it is in flight, and gets no drafts. Its rows
    /// may draw nothing, and it can be paused.
    pub run_ahead: bool,
    /// Whether the logits of its whole prompt are wanted: every token but the last is run for them, though its KV may be
    /// cached.
    pub prompt_logits: bool,
}

/// What a step did to one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome<'a> {
    /// Whose.
    pub seq: SeqId,
    /// Tokens drawn. A row that samples draws between 1 and `num_drafts + 1`, a prefill chunk that does not sample
    /// none. With a stop token the tokens end there: what was drawn after it is cut off by the caller. A sequence that may
    /// not run ahead may draw none: it runs its last token once more in a step to come.
    pub tokens: &'a [TokenId],
    /// The caller's reason to end the sequence here. Length is decided by the scheduler.
    pub finish: Option<FinishReason>,
}

/// A sequence that has ended, reported once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Which.
    pub seq: SeqId,
    /// Why.
    pub reason: FinishReason,
    /// Prompt and output.
    pub tokens: Vec<TokenId>,
    /// Where the output begins in `tokens`.
    pub prompt_len: usize,
}

impl Finished {
    /// The tokens generated.
    pub fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len..]
    }
}

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Holds no blocks: new, or preempted.
    Waiting,
    /// Holds blocks and is planned.
    Running,
    /// Ended, but a step in flight still writes to its blocks; gone with that step's commit.
    Draining,
}

/// Place in the order of service, running and waiting alike; lower first. Unique, because arrivals are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Turn {
    pub(crate) priority: i32,
    pub(crate) arrival: u64,
}

/// A sequence inside the scheduler.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) turn: Turn,
    pub(crate) phase: Phase,
    /// Prompt and committed output; empty once draining.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) prompt_len: usize,
    /// Most tokens it may ever have: `min(prompt + max_new_tokens, max_model_len)`.
    pub(crate) max_len: usize,
    pub(crate) run_ahead: bool,
    /// It has no decode row for now.
    pub(crate) paused: bool,
    /// What its full blocks are found by.
    pub(crate) chain: HashChain,
    /// Those at the front may be other sequences' too, and are only read.
    pub(crate) blocks: Vec<BlockId>,
    /// Blocks at the front of the table that are registered, found, or twins of registered ones.
    pub(crate) num_registered: usize,
    /// Positions whose KV is known to be written: found at admission, or by steps that have been committed.
    pub(crate) settled: usize,
    /// Positions at the front of the prompt whose logits are not wanted, or were given before it was preempted;
    /// `usize::MAX` for all.
    pub(crate) num_logits_given: usize,
    /// Found at the first admission, tokens; `None` before.
    pub(crate) cached_tokens: Option<usize>,
    /// Positions whose KV is written or will be by a step in flight, at the upper bound.
    pub(crate) placed: usize,
    /// Tokens that steps in flight will draw, at the upper bound.
    pub(crate) pending: usize,
    /// `placed` below this is prefill: the number of tokens known at admission.
    pub(crate) prefill_len: usize,
    /// Steps in flight that hold a row of it.
    pub(crate) steps_in_flight: usize,
}

impl Sequence {
    /// Its name.
    pub fn id(&self) -> SeqId {
        self.id
    }

    /// Lower goes first.
    pub fn priority(&self) -> i32 {
        self.turn.priority
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Prompt and committed output. Empty once draining: [`Finished`] took them.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Most tokens it may ever have, prompt and output together.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Committed and in flight, counting every draft in flight as accepted.
    pub fn len_upper_bound(&self) -> usize {
        self.tokens.len() + self.pending
    }

    /// Tokens at the front of the prompt that were found in the prefix cache when the sequence was first admitted; 0
    /// before that. What it finds again after a preemption does not count.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens.unwrap_or(0)
    }

    /// Its blocks of the KV cache: position `p` lies in block `p / block_size`. Only grows while the sequence runs.
    /// Blocks that other tables hold too are at its front, and no row of the sequence ever writes to them.
    pub fn block_table(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Whether a step in flight holds a row of it.
    pub fn is_in_flight(&self) -> bool {
        self.steps_in_flight > 0
    }

    /// Whether known tokens are still to be placed, rather than drawn ones.
    pub fn is_prefilling(&self) -> bool {
        self.placed < self.prefill_len
    }

    /// Whether it is [paused](crate::State::pause).
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether a decode row may be added: without any chance of drawing past the limit, and not ahead of the host where
    /// the host must see the last token first.
    pub(crate) fn may_decode(&self) -> bool {
        !self.paused
            && !self.is_prefilling()
            && self.len_upper_bound() < self.max_len
            && (self.run_ahead || self.pending == 0)
    }

    /// Tokens at its front that no row will run again while it keeps its blocks: a sequence that may draw nothing runs its
    /// last one until it does.
    pub(crate) fn num_final(&self) -> usize {
        self.tokens.len() - usize::from(!self.run_ahead)
    }

    /// Hashes of the blocks that it may share: full, and without its last known token, whose row must be run to draw
    /// the next, and without prompt tokens whose logits are wanted.
    pub(crate) fn shareable(&self, block_size: usize) -> &[BlockHash] {
        let hashes = self.chain.hashes();
        let num_run_before = (self.tokens.len() - 1).min(self.num_logits_given);
        &hashes[..hashes.len().min(num_run_before / block_size)]
    }

    /// Of a chunk that runs `len` tokens from `start` on, the positions whose logits are wanted, though no token is drawn
    /// from them: those of the prompt but its last, and each once, however often the sequence is preempted.
    pub fn prompt_logits(&self, start: usize, len: usize) -> Range<usize> {
        let from = start.max(self.num_logits_given);
        from..(start + len).min(self.prompt_len - 1).max(from)
    }

    /// Most tokens of a chunk from `start` on, at most `most`, that takes as many rows of logits.
    pub(crate) fn chunk_of_rows(&self, start: usize, most: usize, rows: usize) -> usize {
        let all = self.prompt_logits(start, most);
        // The row that draws, if the chunk ends with the last known token.
        let draws = usize::from(start + most == self.tokens.len());
        if all.len() + draws <= rows {
            most
        } else if all.len() <= rows {
            most - 1
        } else {
            all.start + rows - start
        }
    }

    /// Notes, before it is preempted, which logits need not be given again.
    pub(crate) fn keep_logits(&mut self) {
        self.num_logits_given = self.num_logits_given.max(self.settled);
        if self.num_logits_given >= self.prompt_len - 1 {
            self.num_logits_given = usize::MAX;
        }
    }

    /// Ends it: takes its tokens, leaves its blocks to whoever removes it.
    pub(crate) fn finish(&mut self, reason: FinishReason) -> Finished {
        Finished {
            seq: self.id,
            reason,
            tokens: std::mem::take(&mut self.tokens),
            prompt_len: self.prompt_len,
        }
    }
}
