//! The batch's input tensors: allocated once, filled from a plan, uploaded once per step.

use r1_backend::{Backend, BackendError, Batch, HostSlice, LogprobsOut, Tensor};
use r1_core::{DType, SamplingParams};
use r1_sched::{Plan, SchedConfig, State};

/// What pads a row of the block table; reading it would be a bug, and as a slot it lies outside every cache.
const NO_BLOCK: u32 = u32::MAX;

/// Device tensors for the largest step, and the host memory they are filled from.
pub(crate) struct Inputs<B: Backend> {
    ids: Tensor<B>,
    positions: Tensor<B>,
    slots: Tensor<B>,
    query_start: Tensor<B>,
    context_len: Tensor<B>,
    context_start: Tensor<B>,
    /// Flat; a step sees `[S, blocks of its longest sequence]`.
    block_table: Tensor<B>,
    logit_rows: Tensor<B>,
    logits: Tensor<B>,
    drawn: Tensor<B>,
    logprobs: LogprobsOut<B>,
    block_size: usize,
    host: Host,
}

#[derive(Default)]
struct Host {
    ids: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    query_start: Vec<u32>,
    context_len: Vec<u32>,
    context_start: Vec<u32>,
    block_table: Vec<u32>,
    logit_rows: Vec<u32>,
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
    /// `[L]` U32.
    pub(crate) drawn: Tensor<B>,
    pub(crate) logprobs: LogprobsOut<B>,
}

impl<B: Backend> Inputs<B> {
    pub(crate) fn alloc(backend: &B, config: &SchedConfig, vocab_size: usize) -> Result<Self, BackendError> {
        let (tokens, seqs) = (config.max_num_batched_tokens, config.max_num_seqs);
        let max_blocks = config.blocks_for(config.max_model_len);
        let top = (SamplingParams::MAX_LOGPROBS as usize).min(vocab_size);
        let u32s = |len: usize| backend.alloc(&[len], DType::U32);
        Ok(Self {
            ids: u32s(tokens)?,
            positions: u32s(tokens)?,
            slots: u32s(tokens)?,
            query_start: u32s(seqs + 1)?,
            context_len: u32s(seqs)?,
            context_start: u32s(seqs + 1)?,
            block_table: u32s(seqs * max_blocks)?,
            logit_rows: u32s(seqs)?,
            logits: backend.alloc(&[seqs, vocab_size], DType::F32)?,
            drawn: u32s(seqs)?,
            logprobs: LogprobsOut {
                chosen: backend.alloc(&[seqs], DType::F32)?,
                top_ids: backend.alloc(&[seqs, top], DType::U32)?,
                top: backend.alloc(&[seqs, top], DType::F32)?,
            },
            block_size: config.block_size,
            host: Host::default(),
        })
    }

    /// Fills and uploads the inputs of a step that has begun: decodes first, then prefill chunks, in the plan's order.
    pub(crate) fn fill(&mut self, backend: &B, state: &State, plan: &Plan) -> StepTensors<B> {
        let rows = || {
            let decodes = plan.decode.iter().map(|row| (row.seq, row.start, 1, true));
            decodes.chain(plan.prefill.iter().map(|chunk| (chunk.seq, chunk.start, chunk.len, chunk.samples)))
        };
        let host = &mut self.host;
        host.clear();
        let widest =
            rows().map(|(_, start, len, _)| (start + len).div_ceil(self.block_size)).max().unwrap_or(0);
        for (seq, start, len, samples) in rows() {
            let (tokens, blocks) = (state.tokens(seq), state.block_table(seq));
            for position in start..start + len {
                host.ids.push(tokens[position].0);
                host.positions.push(position as u32);
                let block = blocks[position / self.block_size].0 as usize;
                host.slots.push((block * self.block_size + position % self.block_size) as u32);
            }
            host.query_start.push(host.ids.len() as u32);
            host.context_len.push((start + len) as u32);
            host.context_start.push(host.context_start[host.context_start.len() - 1] + (start + len) as u32);
            let used = (start + len).div_ceil(self.block_size);
            host.block_table.extend(blocks[..used].iter().map(|block| block.0));
            host.block_table.extend(std::iter::repeat_n(NO_BLOCK, widest - used));
            if samples {
                host.logit_rows.push(host.ids.len() as u32 - 1);
            }
        }
        let put = |tensor: &Tensor<B>, values: &[u32]| {
            let view = tensor.rows(0..values.len());
            backend.upload(HostSlice::U32(values), &view);
            view
        };
        let (num_seqs, num_logits) = (plan.num_seqs(), host.logit_rows.len());
        let num_decodes = plan.decode.len();
        let batch = Batch {
            positions: put(&self.positions, &host.positions),
            slots: put(&self.slots, &host.slots),
            query_start: put(&self.query_start, &host.query_start),
            context_len: put(&self.context_len, &host.context_len),
            context_start: put(&self.context_start, &host.context_start),
            block_table: put(&self.block_table, &host.block_table).reshape(&[num_seqs, widest]),
            num_tokens: host.ids.len(),
            num_seqs,
            num_decodes,
            prefill_context_tokens: host.context_len[num_decodes..].iter().map(|&len| len as usize).sum(),
            max_context_len: host.context_len.iter().max().map_or(0, |&len| len as usize),
        };
        StepTensors {
            ids: put(&self.ids, &host.ids),
            batch,
            logit_rows: put(&self.logit_rows, &host.logit_rows),
            logits: self.logits.rows(0..num_logits),
            drawn: self.drawn.rows(0..num_logits),
            logprobs: LogprobsOut {
                chosen: self.logprobs.chosen.rows(0..num_logits),
                top_ids: self.logprobs.top_ids.rows(0..num_logits),
                top: self.logprobs.top.rows(0..num_logits),
            },
        }
    }
}

impl Host {
    fn clear(&mut self) {
        let Self { ids, positions, slots, query_start, context_len, context_start, block_table, logit_rows } =
            self;
        for list in [ids, positions, slots, query_start, context_len, context_start, block_table, logit_rows]
        {
            list.clear();
        }
        self.query_start.push(0);
        self.context_start.push(0);
    }
}
