//! Feeds known tokens to a model, in any cut into steps, over a cache whose blocks lie in no order.

use std::path::Path;
use std::sync::Arc;

use r1_backend::{Backend, Batch, Communicator, HostSlice, HostSliceMut, LatentCache, Tensor};
use r1_comm::Local;
use r1_core::{DType, Rank};
use r1_model::{
    DeepSeek, Fp8Compute, KvCacheFormat, MlaForm, ModelOptions, StageInput, StageOutput, StepError,
    WeightFormat,
};
use r1_weights::{Checkpoint, ModelConfig};

const BLOCK_SIZE: usize = 4;
const MAX_TOKENS: usize = 1024;

/// How to load a checkpoint for a test.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// F32 or BF16.
    pub dtype: DType,
    /// What the KV cache holds.
    pub kv_cache: KvCacheFormat,
    /// As stored, or widened.
    pub weights: WeightFormat,
    /// W8 or W8A8.
    pub fp8: Fp8Compute,
    /// Absorbed, expanded, or by size.
    pub form: MlaForm,
    /// First layer and the one after the last; `None` is all of them.
    pub layers: Option<[usize; 2]>,
    /// Refuse what is not batch invariant.
    pub deterministic: bool,
}

impl Load {
    /// F32 activations, weights as stored.
    pub fn f32(form: MlaForm) -> Self {
        Self {
            dtype: DType::F32,
            kv_cache: KvCacheFormat::Activations,
            weights: WeightFormat::AsStored,
            fp8: Fp8Compute::WeightOnly,
            form,
            layers: None,
            deterministic: false,
        }
    }

    /// For one of `world_size` tensor-parallel ranks.
    pub fn options(self, rank: usize, world_size: usize) -> ModelOptions {
        ModelOptions {
            activation_dtype: self.dtype,
            kv_cache: self.kv_cache,
            weights: self.weights,
            fp8: self.fp8,
            mla_form: self.form,
            max_batched_tokens: MAX_TOKENS,
            max_logit_rows: MAX_TOKENS,
            max_model_len: MAX_TOKENS,
            max_expanded_tokens: MAX_TOKENS,
            layers: self.layers.map(|[first, end]| first..end),
            deterministic: self.deterministic,
            rank: Rank(rank),
            world_size,
        }
    }

    /// Loads the checkpoint in `dir` on one rank.
    ///
    /// # Panics
    /// When it cannot be loaded.
    pub fn open<B: Backend>(self, backend: Arc<B>, dir: &Path) -> DeepSeek<B> {
        self.open_rank(backend, Arc::new(Local::single()), dir)
    }

    /// Loads `comm`'s rank of the checkpoint in `dir`.
    ///
    /// # Panics
    /// When it cannot be loaded.
    pub fn open_rank<B: Backend>(
        self,
        backend: Arc<B>,
        comm: Arc<dyn Communicator<B>>,
        dir: &Path,
    ) -> DeepSeek<B> {
        let config = ModelConfig::open(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let checkpoint = Checkpoint::open(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let options = self.options(comm.rank(), comm.world_size());
        let loaded = DeepSeek::load(backend, comm, &checkpoint, &config, options, &mut |_| {});
        loaded.unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
    }
}

/// How one sequence is fed.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// Its tokens.
    pub tokens: &'a [u32],
    /// Tokens per step; 1 decodes every token.
    pub chunk: usize,
}

/// Logits `[T, V]` after every token of every sequence. All sequences run in one batch until the last has ended.
///
/// # Panics
/// When a step fails.
pub fn teacher_force<B: Backend>(model: &DeepSeek<B>, feeds: &[Feed<'_>]) -> Vec<Vec<f32>> {
    teacher_force_stages(&[model], feeds)
}

/// As [`teacher_force`], through the pipeline stages of one model on one backend.
///
/// # Panics
/// When a step fails.
pub fn teacher_force_stages<B: Backend>(stages: &[&DeepSeek<B>], feeds: &[Feed<'_>]) -> Vec<Vec<f32>> {
    let mut feeder = Feeder::new(stages, feeds);
    while feeder.step(stages).expect("the step runs") {}
    feeder.logits
}

/// The same step by step, so that a step may fail and be run again.
pub struct Feeder<'a, B: Backend> {
    feeds: &'a [Feed<'a>],
    /// By stage and layer.
    caches: Vec<Vec<LatentCache<B>>>,
    blocks_each: usize,
    /// Tokens of each sequence that are in the cache.
    done: Vec<usize>,
    /// `[done, V]` of each sequence.
    pub logits: Vec<Vec<f32>>,
}

impl<'a, B: Backend> Feeder<'a, B> {
    /// Allocates the caches.
    ///
    /// # Panics
    /// When there is no room, or no sequence.
    pub fn new(stages: &[&DeepSeek<B>], feeds: &'a [Feed<'a>]) -> Self {
        let blocks_each =
            feeds.iter().map(|feed| feed.tokens.len().div_ceil(BLOCK_SIZE)).max().expect("a sequence");
        let caches = stages
            .iter()
            .map(|stage| stage.alloc_cache(blocks_each * feeds.len(), BLOCK_SIZE).expect("a small cache"))
            .collect();
        Self { feeds, caches, blocks_each, done: vec![0; feeds.len()], logits: vec![Vec::new(); feeds.len()] }
    }

    /// Runs one step; `false` when there was nothing left to run. A step that fails leaves everything as it was.
    ///
    /// # Panics
    /// When there is no room for a step's tensors.
    pub fn step(&mut self, stages: &[&DeepSeek<B>]) -> Result<bool, StepError> {
        let Self { feeds, caches, blocks_each, done, logits } = self;
        let blocks_each = *blocks_each;
        let backend = &**stages[0].backend();
        let config = stages[0].config();
        let vocab_size = config.vocab_size;
        let num_blocks = blocks_each * feeds.len();
        // Neighbours in a sequence lie far from each other, and no sequence has block 0 first.
        let block = |seq: usize, index: usize| num_blocks - 1 - (index * feeds.len() + seq);
        let mut rows: Vec<(usize, usize)> = (feeds.iter().enumerate())
            .map(|(seq, feed)| (seq, feed.chunk.min(feed.tokens.len() - done[seq])))
            .filter(|&(_, len)| len > 0)
            .collect();
        if rows.is_empty() {
            return Ok(false);
        }
        rows.sort_by_key(|&(_, len)| len > 1);
        let num_decodes = rows.iter().filter(|&&(_, len)| len == 1).count();
        let (mut ids, mut positions, mut slots) = (vec![], vec![], vec![]);
        let (mut query_start, mut context_len, mut context_start) = (vec![0], vec![], vec![0]);
        let mut table = vec![];
        for &(seq, len) in &rows {
            for position in done[seq]..done[seq] + len {
                ids.push(feeds[seq].tokens[position]);
                positions.push(position as u32);
                slots.push((block(seq, position / BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
            }
            let context = done[seq] + len;
            query_start.push(ids.len() as u32);
            context_len.push(context as u32);
            context_start.push(context_start[context_start.len() - 1] + context as u32);
            let used = context.div_ceil(BLOCK_SIZE);
            table.extend((0..blocks_each).map(|i| if i < used { block(seq, i) as u32 } else { u32::MAX }));
        }
        let upload = |values: &[u32]| {
            let tensor: Tensor<B> = backend.alloc(&[values.len()], DType::U32).expect("a small tensor");
            backend.upload(HostSlice::U32(values), &tensor);
            tensor
        };
        let num_tokens = ids.len();
        let batch = Batch {
            positions: upload(&positions),
            slots: upload(&slots),
            query_start: upload(&query_start),
            context_len: upload(&context_len),
            context_start: upload(&context_start),
            block_table: upload(&table).reshape(&[rows.len(), blocks_each]),
            num_tokens,
            num_seqs: rows.len(),
            num_decodes,
            prefill_context_tokens: context_len[num_decodes..].iter().map(|&len| len as usize).sum(),
            max_context_len: context_len.iter().max().map_or(0, |&len| len as usize),
        };
        let all_rows: Vec<u32> = (0..num_tokens as u32).collect();
        let out = backend.alloc(&[num_tokens, vocab_size], DType::F32).expect("small logits");
        let hidden = backend.alloc(&[num_tokens, config.hidden_size], stages[0].options().activation_dtype);
        let (hidden, ids, all_rows) = (hidden.expect("a small tensor"), upload(&ids), upload(&all_rows));
        for (i, stage) in stages.iter().enumerate() {
            let input = if i == 0 { StageInput::Tokens(&ids) } else { StageInput::Hidden(&hidden) };
            let output = if i + 1 == stages.len() {
                StageOutput::Logits { rows: &all_rows, logits: &out }
            } else {
                StageOutput::Hidden(&hidden)
            };
            stage.forward(&input, &batch, &caches[i], &output);
            stage.finish()?;
        }
        let mut host = vec![0.0; num_tokens * vocab_size];
        backend.download(&out, HostSliceMut::F32(&mut host)).expect("the logits are there");
        let mut at = 0;
        for (seq, len) in rows {
            logits[seq].extend_from_slice(&host[at * vocab_size..(at + len) * vocab_size]);
            at += len;
            done[seq] += len;
        }
        Ok(true)
    }
}
