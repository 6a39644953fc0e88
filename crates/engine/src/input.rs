//! The batch's input: what the host knows of a step, and the device tensors it is uploaded to. Both are made once, for the
//! largest step.

use r1_backend::{Backend, BackendError, Batch, HostSlice, LogprobsOut, Tensor};
use r1_core::{DType, SamplingParams, SeqId};
use r1_sched::{Plan, SchedConfig, State};

/// What pads a row of the block table; reading it would be a bug, and as a slot it lies outside every cache.
const NO_BLOCK: u32 = u32::MAX;
/// In [`StepInput::fed_from`]: the host knows this token.
const KNOWN: u32 = u32::MAX;

/// One step as every rank uploads it: decodes first, then prefill chunks, in the plan's order.
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
    logit_rows: Vec<u32>,
    num_seqs: usize,
    num_decodes: usize,
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
            logit_rows: room(seqs),
            block_size: config.block_size,
            ..Self::default()
        }
    }

    /// Rows that sample.
    pub(crate) fn num_logits(&self) -> usize {
        self.logit_rows.len()
    }

    /// Fills it for a step that has begun. `drawn_by` gives the row of the step before that draws a sequence's last token,
    /// for sequences whose last token is in flight.
    pub(crate) fn fill(&mut self, state: &State, plan: &Plan, drawn_by: impl Fn(SeqId) -> u32) {
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
        ] {
            list.clear();
        }
        self.is_fed = false;
        self.query_start.push(0);
        self.context_start.push(0);
    }
}

/// What one step draws; each step in flight has its own.
pub(crate) struct Draws<B: Backend> {
    /// `[L]` U32.
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

/// A rank's device tensors for the largest step.
pub(crate) struct Inputs<B: Backend> {
    ids: Tensor<B>,
    fed_from: Tensor<B>,
    positions: Tensor<B>,
    slots: Tensor<B>,
    query_start: Tensor<B>,
    context_len: Tensor<B>,
    context_start: Tensor<B>,
    /// Flat; a step sees `[S, blocks of its longest sequence]`.
    block_table: Tensor<B>,
    logit_rows: Tensor<B>,
    logits: Tensor<B>,
    /// One per step in flight.
    draws: Vec<Draws<B>>,
}

/// One step's views.
pub(crate) struct StepTensors<B: Backend> {
    /// `[T]` U32.
    pub(crate) ids: Tensor<B>,
    pub(crate) batch: Batch<B>,
    /// `[L]` U32: the last row of every sequence that samples, decodes first.
    pub(crate) logit_rows: Tensor<B>,
    /// `[L, V]` F32.
    pub(crate) logits: Tensor<B>,
}

impl<B: Backend> Inputs<B> {
    pub(crate) fn alloc(backend: &B, config: &SchedConfig, vocab_size: usize) -> Result<Self, BackendError> {
        let (tokens, seqs) = (config.max_num_batched_tokens, config.max_num_seqs);
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
            block_table: u32s(seqs * config.blocks_for(config.max_model_len))?,
            logit_rows: u32s(seqs)?,
            logits: backend.alloc(&[seqs, vocab_size], DType::F32)?,
            draws: (0..config.depth)
                .map(|_| Draws::alloc(backend, seqs, num_top))
                .collect::<Result<_, _>>()?,
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

    /// Uploads the input of the step in `slot`.
    pub(crate) fn upload(&self, backend: &B, input: &StepInput, slot: usize) -> StepTensors<B> {
        let put = |tensor: &Tensor<B>, values: &[u32]| {
            let view = tensor.rows(0..values.len());
            backend.upload(HostSlice::U32(values), &view);
            view
        };
        let ids = put(&self.ids, &input.ids);
        if input.is_fed {
            let before = (slot + self.draws.len() - 1) % self.draws.len();
            backend.feed_tokens(&self.draws[before].tokens, &put(&self.fed_from, &input.fed_from), &ids);
        }
        let (num_seqs, num_decodes) = (input.num_seqs, input.num_decodes);
        let width = input.block_table.len() / num_seqs;
        let batch = Batch {
            positions: put(&self.positions, &input.positions),
            slots: put(&self.slots, &input.slots),
            query_start: put(&self.query_start, &input.query_start),
            context_len: put(&self.context_len, &input.context_len),
            context_start: put(&self.context_start, &input.context_start),
            block_table: put(&self.block_table, &input.block_table).reshape(&[num_seqs, width]),
            num_tokens: input.ids.len(),
            num_seqs,
            num_decodes,
            prefill_context_tokens: input.context_len[num_decodes..].iter().map(|&len| len as usize).sum(),
            max_context_len: input.context_len.iter().max().map_or(0, |&len| len as usize),
        };
        StepTensors {
            ids,
            batch,
            logit_rows: put(&self.logit_rows, &input.logit_rows),
            logits: self.logits(input.num_logits()),
        }
    }
}
