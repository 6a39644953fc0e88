//! The batch's input: what the host knows of a step, and the device tensors it is uploaded to. Both are made once, for the
//! largest step.

use r1_backend::{Backend, BackendError, Batch, HostSlice, LogprobsOut, NO_SLOT, Tensor};
use r1_core::{DType, SamplingParams, SeqId};
use r1_sched::{Plan, SchedConfig, State};

use crate::buckets::Buckets;

/// What pads a row of the block table; reading it would be a bug, and as a slot it lies outside every cache.
const NO_BLOCK: u32 = u32::MAX;
/// The token of a padding row: no table has it.
const NO_TOKEN: u32 = u32::MAX;
/// In [`StepInput::fed_from`]: the host knows this token.
const KNOWN: u32 = u32::MAX;

/// One step as every rank uploads it: decodes first, then prefill chunks, in the plan's order. A step that only decodes may
/// be padded behind them.
#[derive(Default)]
pub(crate) struct StepInput {
    ids: Vec<u32>,
    /// Per token: the row of the step before that draws it, or [`KNOWN`].
    fed_from: Vec<u32>,
    /// Some token is drawn by the step before, which is in flight.
    is_fed: bool,
    positions: Vec<u32>,
    slots: Vec<u32>,
    query_start: Vec<u32>,
    context_len: Vec<u32>,
    context_start: Vec<u32>,
    /// `[S, blocks of the longest sequence]`.
    block_table: Vec<u32>,
    /// Those that sample, then those of prompts.
    logit_rows: Vec<u32>,
    /// Rows of prompts whose logits are wanted.
    prompt_rows: Vec<u32>,
    /// The token that follows in the prompt, for each of `prompt_rows`.
    prompt_tokens: Vec<u32>,
    /// Sequences without padding.
    num_seqs: usize,
    num_decodes: usize,
    /// Rows that sample, and rows of prompts.
    num_logits: usize,
    /// The batch size that a step was padded to, which is the one that it was captured for.
    bucket: Option<usize>,
    block_size: usize,
}

impl StepInput {
    /// Room for the largest step.
    pub(crate) fn with_room(config: &SchedConfig) -> Self {
        let (tokens, seqs) = (config.max_num_batched_tokens, config.max_num_seqs);
        let room = Vec::with_capacity;
        Self {
            ids: room(tokens),
            fed_from: room(tokens),
            positions: room(tokens),
            slots: room(tokens),
            query_start: room(seqs + 1),
            context_len: room(seqs),
            context_start: room(seqs + 1),
            block_table: room(seqs * config.blocks_for(config.max_model_len)),
            logit_rows: room(logit_rows(config)),
            prompt_rows: room(config.max_prompt_logits),
            prompt_tokens: room(config.max_prompt_logits),
            block_size: config.block_size,
            ..Self::default()
        }
    }

    /// Rows of logits.
    pub(crate) fn num_logits(&self) -> usize {
        self.num_logits
    }

    /// For each of the last rows of logits, which belong to prompts, the prompt's next token.
    pub(crate) fn prompt_tokens(&self) -> &[u32] {
        &self.prompt_tokens
    }

    /// The batch size that the step was padded to.
    pub(crate) fn bucket(&self) -> Option<usize> {
        self.bucket
    }

    /// A step of padding alone: it runs like any other, and leaves nothing behind.
    pub(crate) fn only_padding(bucket: usize) -> Self {
        let mut input = Self::default();
        input.clear();
        input.pad_to(bucket);
        input
    }

    /// Fills it for a step that has begun. `drawn_by` gives the row of the step before that draws a sequence's last token,
    /// for sequences whose last token is in flight. A step that only decodes is padded to the next of `buckets`.
    pub(crate) fn fill(
        &mut self,
        state: &State,
        plan: &Plan,
        buckets: &Buckets,
        drawn_by: impl Fn(SeqId) -> u32,
    ) {
        self.clear();
        (self.num_seqs, self.num_decodes) = (plan.num_seqs(), plan.decode.len());
        let rows = || {
            let decodes = plan.decode.iter().map(|row| (row.seq, row.start, 1, true));
            decodes.chain(plan.prefill.iter().map(|chunk| (chunk.seq, chunk.start, chunk.len, chunk.samples)))
        };
        let widest =
            rows().map(|(_, start, len, _)| (start + len).div_ceil(self.block_size)).max().unwrap_or(0);
        for (seq, start, len, samples) in rows() {
            let (tokens, blocks) = (state.tokens(seq), state.block_table(seq));
            for position in start..start + len {
                let (id, from) = match tokens.get(position) {
                    Some(token) => (token.0, KNOWN),
                    None => (0, drawn_by(seq)),
                };
                self.ids.push(id);
                self.fed_from.push(from);
                self.is_fed |= from != KNOWN;
                self.positions.push(position as u32);
                let block = blocks[position / self.block_size].0 as usize;
                self.slots.push((block * self.block_size + position % self.block_size) as u32);
            }
            let context_len = (start + len) as u32;
            self.query_start.push(self.ids.len() as u32);
            self.context_len.push(context_len);
            self.context_start.push(self.context_start[self.context_start.len() - 1] + context_len);
            let used = (start + len).div_ceil(self.block_size);
            self.block_table.extend(blocks[..used].iter().map(|block| block.0));
            self.block_table.extend(std::iter::repeat_n(NO_BLOCK, widest - used));
            if samples {
                self.logit_rows.push(self.ids.len() as u32 - 1);
            }
        }
        let mut first_row = plan.decode.len();
        for chunk in &plan.prefill {
            let seq = state.sequence(chunk.seq).expect("a planned sequence exists");
            for position in seq.prompt_logits(chunk.start, chunk.len) {
                self.prompt_rows.push((first_row + position - chunk.start) as u32);
                self.prompt_tokens.push(seq.tokens()[position + 1].0);
            }
            first_row += chunk.len;
        }
        self.logit_rows.extend_from_slice(&self.prompt_rows);
        self.num_logits = self.logit_rows.len();
        if plan.prefill.is_empty()
            && let Some(bucket) = buckets.fitting(self.num_seqs)
        {
            self.pad_to(bucket);
        }
    }

    /// Appends padding sequences, as [`Batch`] describes them, to a step of decodes; the block table has no rows for them.
    fn pad_to(&mut self, bucket: usize) {
        debug_assert!(self.ids.len() == self.num_decodes && self.num_seqs == self.num_decodes);
        for row in self.ids.len()..bucket {
            self.ids.push(NO_TOKEN);
            self.fed_from.push(KNOWN);
            self.positions.push(0);
            self.slots.push(NO_SLOT);
            self.query_start.push(row as u32 + 1);
            self.context_len.push(0);
            self.context_start.push(self.context_start[row]);
            self.logit_rows.push(row as u32);
        }
        self.bucket = Some(bucket);
    }

    fn clear(&mut self) {
        for list in [
            &mut self.ids,
            &mut self.fed_from,
            &mut self.positions,
            &mut self.slots,
            &mut self.query_start,
            &mut self.context_len,
            &mut self.context_start,
            &mut self.block_table,
            &mut self.logit_rows,
            &mut self.prompt_rows,
            &mut self.prompt_tokens,
        ] {
            list.clear();
        }
        self.is_fed = false;
        (self.num_seqs, self.num_decodes, self.num_logits, self.bucket) = (0, 0, 0, None);
        self.query_start.push(0);
        self.context_start.push(0);
    }
}

/// Most rows of logits in a step.
pub(crate) fn logit_rows(config: &SchedConfig) -> usize {
    config.max_num_seqs + config.max_prompt_logits
}

/// What one step draws; each step in flight has its own.
pub(crate) struct Draws<B: Backend> {
    /// `[L]` U32; behind those drawn, the next tokens of prompts.
    pub(crate) tokens: Tensor<B>,
    pub(crate) logprobs: LogprobsOut<B>,
}

impl<B: Backend> Draws<B> {
    fn alloc(backend: &B, rows: usize, num_top: usize) -> Result<Self, BackendError> {
        Ok(Self {
            tokens: backend.alloc(&[rows], DType::U32)?,
            logprobs: LogprobsOut {
                chosen: backend.alloc(&[rows], DType::F32)?,
                top_ids: backend.alloc(&[rows, num_top], DType::U32)?,
                top: backend.alloc(&[rows, num_top], DType::F32)?,
            },
        })
    }

    /// Of a step with that many rows of logits.
    pub(crate) fn rows(&self, num_logits: usize) -> Self {
        let rows = 0..num_logits;
        Self {
            tokens: self.tokens.rows(rows.clone()),
            logprobs: LogprobsOut {
                chosen: self.logprobs.chosen.rows(rows.clone()),
                top_ids: self.logprobs.top_ids.rows(rows.clone()),
                top: self.logprobs.top.rows(rows),
            },
        }
    }
}

/// A rank's device tensors for the largest step. Every step uses the same ones, at the same places, so that a captured step
/// finds its input.
pub(crate) struct Inputs<B: Backend> {
    ids: Tensor<B>,
    fed_from: Tensor<B>,
    positions: Tensor<B>,
    slots: Tensor<B>,
    query_start: Tensor<B>,
    context_len: Tensor<B>,
    context_start: Tensor<B>,
    /// `[max_num_seqs, blocks of the longest context]`; a step writes the columns that its longest sequence uses.
    block_table: Tensor<B>,
    logit_rows: Tensor<B>,
    logits: Tensor<B>,
    /// One per step in flight.
    draws: Vec<Draws<B>>,
    max_model_len: usize,
}

/// One step's views.
pub(crate) struct StepTensors<B: Backend> {
    /// `[T]` U32.
    pub(crate) ids: Tensor<B>,
    pub(crate) batch: Batch<B>,
    /// `[L]` U32: the last row of every sequence that samples, decodes first; then rows of prompts.
    pub(crate) logit_rows: Tensor<B>,
    /// `[L, V]` F32.
    pub(crate) logits: Tensor<B>,
}

impl<B: Backend> Inputs<B> {
    pub(crate) fn alloc(backend: &B, config: &SchedConfig, vocab_size: usize) -> Result<Self, BackendError> {
        let (tokens, seqs) = (config.max_num_batched_tokens, config.max_num_seqs);
        let rows = logit_rows(config);
        let num_top = (SamplingParams::MAX_LOGPROBS as usize).min(vocab_size);
        let u32s = |len: usize| backend.alloc(&[len], DType::U32);
        Ok(Self {
            ids: u32s(tokens)?,
            fed_from: u32s(tokens)?,
            positions: u32s(tokens)?,
            slots: u32s(tokens)?,
            query_start: u32s(seqs + 1)?,
            context_len: u32s(seqs)?,
            context_start: u32s(seqs + 1)?,
            block_table: backend.alloc(&[seqs, config.blocks_for(config.max_model_len)], DType::U32)?,
            logit_rows: u32s(rows)?,
            logits: backend.alloc(&[rows, vocab_size], DType::F32)?,
            draws: (0..config.depth)
                .map(|_| Draws::alloc(backend, rows, num_top))
                .collect::<Result<_, _>>()?,
            max_model_len: config.max_model_len,
        })
    }

    /// What the step in `slot` draws.
    pub(crate) fn draws(&self, slot: usize, num_logits: usize) -> Draws<B> {
        self.draws[slot].rows(num_logits)
    }

    /// The logits of a step.
    pub(crate) fn logits(&self, num_logits: usize) -> Tensor<B> {
        self.logits.rows(0..num_logits)
    }

    /// Uploads the input of the step in `slot`, and gives its views: those of its captured size where it was padded.
    pub(crate) fn upload(&self, backend: &B, input: &StepInput, slot: usize) -> StepTensors<B> {
        let put = |tensor: &Tensor<B>, values: &[u32]| {
            backend.upload(HostSlice::U32(values), &tensor.rows(0..values.len()));
        };
        put(&self.ids, &input.ids);
        if input.is_fed {
            let before = (slot + self.draws.len() - 1) % self.draws.len();
            let rows = 0..input.ids.len();
            put(&self.fed_from, &input.fed_from);
            let (from, ids) = (self.fed_from.rows(rows.clone()), self.ids.rows(rows));
            backend.feed_tokens(&self.draws[before].tokens, &from, &ids);
        }
        put(&self.positions, &input.positions);
        put(&self.slots, &input.slots);
        put(&self.query_start, &input.query_start);
        put(&self.context_len, &input.context_len);
        put(&self.context_start, &input.context_start);
        put(&self.logit_rows, &input.logit_rows);
        let width = input.block_table.len().checked_div(input.num_seqs).unwrap_or(0);
        let used = self.block_table.rows(0..input.num_seqs).narrow(1, 0..width);
        if input.num_seqs > 0 {
            backend.upload(HostSlice::U32(&input.block_table), &used);
        }
        if let Some(bucket) = input.bucket {
            return self.decodes(bucket);
        }
        let (num_seqs, num_decodes) = (input.num_seqs, input.num_decodes);
        let context_len =
            |range: std::ops::Range<usize>| input.context_len[range].iter().map(|&len| len as usize);
        self.step(Sizes {
            num_tokens: input.ids.len(),
            num_seqs,
            num_decodes,
            num_logits: input.num_logits,
            table_width: width,
            prefill_context_tokens: context_len(num_decodes..num_seqs).sum(),
            max_context_len: context_len(0..num_seqs).max().unwrap_or(0),
        })
    }

    /// The views of a step of `bucket` decodes, which are the same whatever the step: it is captured with them.
    pub(crate) fn decodes(&self, bucket: usize) -> StepTensors<B> {
        self.step(Sizes {
            num_tokens: bucket,
            num_seqs: bucket,
            num_decodes: bucket,
            num_logits: bucket,
            table_width: self.block_table.dim(1),
            prefill_context_tokens: 0,
            max_context_len: self.max_model_len,
        })
    }

    fn step(&self, sizes: Sizes) -> StepTensors<B> {
        let Sizes { num_tokens, num_seqs, num_decodes, num_logits, .. } = sizes;
        StepTensors {
            ids: self.ids.rows(0..num_tokens),
            batch: Batch {
                positions: self.positions.rows(0..num_tokens),
                slots: self.slots.rows(0..num_tokens),
                query_start: self.query_start.rows(0..num_seqs + 1),
                context_len: self.context_len.rows(0..num_seqs),
                context_start: self.context_start.rows(0..num_seqs + 1),
                block_table: self.block_table.rows(0..num_seqs).narrow(1, 0..sizes.table_width),
                num_tokens,
                num_seqs,
                num_decodes,
                prefill_context_tokens: sizes.prefill_context_tokens,
                max_context_len: sizes.max_context_len,
            },
            logit_rows: self.logit_rows.rows(0..num_logits),
            logits: self.logits(num_logits),
        }
    }
}

/// What the views of a step depend on.
#[derive(Clone, Copy)]
struct Sizes {
    num_tokens: usize,
    num_seqs: usize,
    num_decodes: usize,
    num_logits: usize,
    /// Columns of the block table.
    table_width: usize,
    prefill_context_tokens: usize,
    max_context_len: usize,
}

#[cfg(test)]
mod tests {
    use r1_sched::{Limits, NewSequence, Outcome, begin, commit, plan};

    use super::*;

    /// Sequences of these lengths that have drawn a token each, and the plan that decodes them.
    fn decoding(lens: &[usize]) -> (State, Plan) {
        let config = SchedConfig {
            block_size: 4,
            num_blocks: 32,
            max_num_seqs: 6,
            max_num_batched_tokens: 64,
            max_model_len: 24,
            max_queued: 8,
            depth: 2,
            prefix_cache: None,
            ..SchedConfig::default()
        };
        let mut state = State::new(config).expect("a small configuration");
        for (id, &len) in lens.iter().enumerate() {
            let sequence = NewSequence {
                id: SeqId(id as u64),
                prompt: vec![r1_core::TokenId(7); len],
                max_new_tokens: 5,
                priority: 0,
                cache_salt: None,
                run_ahead: true,
                prompt_logits: false,
            };
            state.add(sequence).expect("room");
        }
        let limits: Limits = state.limits();
        let prefill = plan(&state, &limits);
        let step = begin(&mut state, &prefill);
        let token = [r1_core::TokenId(9)];
        let outcomes: Vec<_> = (prefill.prefill.iter())
            .map(|chunk| Outcome { seq: chunk.seq, tokens: &token, finish: None })
            .collect();
        commit(&mut state, step, outcomes);
        let decode = plan(&state, &limits);
        assert_eq!((decode.decode.len(), decode.prefill.len()), (lens.len(), 0));
        begin(&mut state, &decode);
        (state, decode)
    }

    #[test]
    fn decodes_are_padded_behind_their_rows() {
        let (state, plan) = decoding(&[3, 9, 5]);
        let mut input = StepInput::with_room(state.config());
        input.fill(&state, &plan, &Buckets::default(), |_| unreachable!("every token is known"));
        assert_eq!((input.bucket(), input.num_logits(), input.ids.len()), (None, 3, 3));
        let alone = (input.positions.clone(), input.slots.clone(), input.block_table.clone());

        input.fill(&state, &plan, &Buckets::up_to(6), |_| unreachable!("every token is known"));
        assert_eq!((input.bucket(), input.num_logits(), input.num_seqs), (Some(4), 3, 3));
        assert_eq!(input.ids, [9, 9, 9, NO_TOKEN]);
        assert_eq!(input.positions, [&alone.0[..], &[0]].concat());
        assert_eq!(input.slots, [&alone.1[..], &[NO_SLOT]].concat());
        assert_eq!(input.block_table, alone.2, "padding has no row");
        assert_eq!(input.query_start, [0, 1, 2, 3, 4]);
        assert_eq!(input.context_len, [4, 10, 6, 0]);
        assert_eq!(input.context_start, [0, 4, 14, 20, 20]);
        assert_eq!(input.logit_rows, [0, 1, 2, 3]);
        assert_eq!(input.fed_from, [KNOWN; 4]);
        // Larger than the largest bucket: as it is.
        input.fill(&state, &plan, &Buckets::up_to(2), |_| unreachable!("every token is known"));
        assert_eq!((input.bucket(), input.ids.len()), (None, 3));
    }

    #[test]
    fn a_prefill_is_not_padded() {
        let mut state = decoding(&[3]).0;
        let sequence = NewSequence {
            id: SeqId(8),
            prompt: vec![r1_core::TokenId(7); 6],
            max_new_tokens: 5,
            priority: 0,
            cache_salt: None,
            run_ahead: true,
            prompt_logits: false,
        };
        state.add(sequence).expect("room");
        let plan = plan(&state, &state.limits());
        assert_eq!(plan.prefill.len(), 1);
        begin(&mut state, &plan);
        let mut input = StepInput::with_room(state.config());
        input.fill(&state, &plan, &Buckets::up_to(6), |_| 0);
        assert_eq!((input.bucket(), input.ids.len()), (None, 6 + plan.decode.len()));
    }

    #[test]
    fn a_step_of_padding_has_no_sequence() {
        let input = StepInput::only_padding(2);
        assert_eq!((input.bucket(), input.num_logits(), input.num_seqs), (Some(2), 0, 0));
        assert_eq!((&input.query_start[..], &input.context_start[..]), (&[0, 1, 2][..], &[0, 0, 0][..]));
        assert!(input.block_table.is_empty());
    }
}
