//! DeepSeek V2/V3/R1: the forward pass of a stage, written once for every backend.
//!
//! The residual stream stays in `residual`; every block adds to it through [`Backend::all_reduce_add_norm`], which also
//! makes the next block's input.

use std::ops::Range;
use std::sync::Arc;

use r1_backend::{
    Activation, Backend, BackendError, Batch, Communicator, LatentCache, MlpScratch, MlpWeights, MoeScratch,
    MoeWeights, RopeTable, Tensor, Weight,
};
use r1_core::DType;
use r1_weights::ModelConfig;

use crate::mla::{Mla, MlaScratch};
use crate::{Fp8Compute, ModelOptions, StepError};

/// What a stage starts from.
pub enum StageInput<'a, B: Backend> {
    /// The first stage: `[T]` U32 token ids.
    Tokens(&'a Tensor<B>),
    /// A later one: the residual stream `[T, D]` of the stage before, which this stage adds to in place.
    Hidden(&'a Tensor<B>),
}

/// What a stage ends with.
pub enum StageOutput<'a, B: Backend> {
    /// The last stage: logits of some rows.
    Logits {
        /// `[L]` U32: rows of the batch.
        rows: &'a Tensor<B>,
        /// `[L, V]` F32.
        logits: &'a Tensor<B>,
    },
    /// An earlier one: where the residual stream `[T, D]` goes; a middle stage gives its input again.
    Hidden(&'a Tensor<B>),
}

/// The feed-forward half of a layer.
#[allow(clippy::large_enum_variant)] // one per layer; a box would only add a hop
pub(crate) enum FeedForward<B: Backend> {
    Dense(MlpWeights<B>),
    Moe(MoeWeights<B>),
}

pub(crate) struct Layer<B: Backend> {
    pub(crate) input_norm: Tensor<B>,
    pub(crate) mla: Mla<B>,
    pub(crate) post_attention_norm: Tensor<B>,
    pub(crate) feed_forward: FeedForward<B>,
}

/// Before the first layer of the first stage.
pub(crate) struct Embedding<B: Backend> {
    /// `[V / world, D]`: this rank's rows of the table.
    pub(crate) table: Tensor<B>,
    /// The first of them.
    pub(crate) first_row: usize,
}

/// After the last layer of the last stage.
pub(crate) struct Head<B: Backend> {
    /// `[D]`.
    pub(crate) norm: Tensor<B>,
    /// `[V / world, D]`: this rank's rows, which give its columns of the logits.
    pub(crate) lm_head: Weight<B>,
}

/// Space for the largest step; every step takes the first rows of it.
pub(crate) struct Workspace<B: Backend> {
    residual: Tensor<B>,
    normed: Activation<B>,
    block_out: Tensor<B>,
    last: Tensor<B>,
    /// `[L, V / world]` F32: this rank's columns of the logits, before they are gathered. One rank has them all.
    shard_logits: Option<Tensor<B>>,
    mla: MlaScratch<B>,
    dense: Option<MlpScratch<B>>,
    moe: Option<MoeScratch<B>>,
}

/// A stage of a DeepSeek model on one rank.
pub struct DeepSeek<B: Backend> {
    pub(crate) backend: Arc<B>,
    /// `None` after the rank has left its group.
    pub(crate) comm: Option<Arc<dyn Communicator<B>>>,
    pub(crate) config: ModelConfig,
    pub(crate) options: ModelOptions,
    pub(crate) embedding: Option<Embedding<B>>,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) head: Option<Head<B>>,
    pub(crate) rope: RopeTable<B>,
    pub(crate) workspace: Workspace<B>,
    pub(crate) weight_bytes: usize,
}

/// Allocates an MLP's scratch of intermediate size `width`.
fn mlp_scratch<B: Backend>(
    backend: &B,
    options: &ModelOptions,
    width: usize,
    fp8: Option<bool>,
) -> Result<MlpScratch<B>, BackendError> {
    let rows = options.max_batched_tokens;
    Ok(MlpScratch {
        gate_up: backend.alloc(&[rows, 2 * width], options.activation_dtype)?,
        hidden: Activation::alloc(backend, rows, width, options.activation_dtype, fp8)?,
    })
}

fn mlp_rows<B: Backend>(scratch: &MlpScratch<B>, rows: Range<usize>) -> MlpScratch<B> {
    MlpScratch { gate_up: scratch.gate_up.rows(rows.clone()), hidden: scratch.hidden.rows(rows) }
}

impl<B: Backend> Workspace<B> {
    pub(crate) fn alloc(
        backend: &B,
        config: &ModelConfig,
        options: &ModelOptions,
        layers: &[Layer<B>],
        head: Option<&Head<B>>,
    ) -> Result<Self, BackendError> {
        let (rows, dtype, hidden) =
            (options.max_batched_tokens, options.activation_dtype, config.hidden_size);
        let fp8 = options.activation_fp8(config);
        let mut dense = None;
        let mut moe = None;
        for layer in layers {
            match &layer.feed_forward {
                FeedForward::Dense(mlp) if dense.is_none() => {
                    dense = Some(mlp_scratch(backend, options, mlp.gate.out_features(), fp8)?);
                }
                FeedForward::Moe(w) if moe.is_none() => {
                    let top_k = w.routing.top_k;
                    moe = Some(MoeScratch {
                        logits: backend.alloc(&[rows, w.experts.total], DType::F32)?,
                        ids: backend.alloc(&[rows, top_k], DType::U32)?,
                        weights: backend.alloc(&[rows, top_k], DType::F32)?,
                        shared: mlp_scratch(backend, options, w.shared.gate.out_features(), fp8)?,
                    });
                }
                _ => {}
            }
        }
        let shard_logits = match head {
            Some(head) if options.world_size > 1 => {
                Some(backend.alloc(&[options.max_logit_rows, head.lm_head.out_features()], DType::F32)?)
            }
            _ => None,
        };
        Ok(Self {
            residual: backend.alloc(&[rows, hidden], dtype)?,
            normed: Activation::alloc(backend, rows, hidden, dtype, fp8)?,
            block_out: backend.alloc(&[rows, hidden], dtype)?,
            last: backend.alloc(&[options.max_logit_rows, hidden], dtype)?,
            shard_logits,
            mla: MlaScratch::alloc(backend, config, options)?,
            dense,
            moe,
        })
    }
}

impl ModelOptions {
    /// # Panics
    /// When the communicator is another rank's than the options'.
    #[track_caller]
    pub(crate) fn assert_rank<B: Backend>(&self, comm: &dyn Communicator<B>) {
        assert_eq!(
            (comm.rank(), comm.world_size()),
            (self.rank.0, self.world_size),
            "the communicator's rank and group size, and the model's"
        );
    }

    /// Whether linears' inputs keep an FP8 form, and whether its scales are powers of two.
    pub(crate) fn activation_fp8(&self, config: &ModelConfig) -> Option<bool> {
        let quantization = config.quantization.as_ref()?;
        (self.fp8 == Fp8Compute::WeightsAndActivations && self.weights.needs().is_empty())
            .then(|| quantization.scale_fmt == r1_weights::ScaleFmt::Ue8m0)
    }
}

impl<B: Backend> DeepSeek<B> {
    /// The backend it runs on.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// What config.json says.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How it was asked to run.
    pub fn options(&self) -> &ModelOptions {
        &self.options
    }

    /// Bytes of this rank's weights.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Bytes of KV cache per token on this rank: kv_lora_rank + qk_rope_head_dim values per layer, and scales where they are
    /// FP8; nothing expanded.
    pub fn kv_bytes_per_token(&self) -> usize {
        self.options.kv_bytes_per_token(&self.config, self.layers.len())
    }

    /// A paged cache for every layer of the stage.
    pub fn alloc_cache(
        &self,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<Vec<LatentCache<B>>, BackendError> {
        let (latent, rope) = (self.config.kv_lora_rank, self.config.qk_rope_head_dim);
        let dtype = self.options.kv_cache_dtype();
        let alloc = |_| LatentCache::alloc(&*self.backend, dtype, [num_blocks, block_size], latent, rope);
        self.layers.iter().map(alloc).collect()
    }

    /// Leaves the group of ranks, after a step that failed here or elsewhere: drops this model's communicator, so that ranks
    /// which wait for this one are freed. A communicator that others hold too is not gone until they drop it as well.
    pub fn leave(&mut self) {
        self.comm = None;
    }

    /// Joins another group as the same rank; weights and caches stay. What an interrupted step left in the workspace is never
    /// read, and the cache rows of its tokens are written again when they are computed again.
    ///
    /// # Panics
    /// When `comm` is another rank, or of another group size, than the weights were cut for.
    pub fn join(&mut self, comm: Arc<dyn Communicator<B>>) {
        self.options.assert_rank(&*comm);
        self.comm = Some(comm);
    }

    /// Closes a step: waits for it and gives the first failure of the device or of a collective. A rank that has left its
    /// group has only the device's.
    pub fn finish(&self) -> Result<(), StepError> {
        let device = self.backend.flush().wait();
        // Asked in any case: a failure that is not taken would be the next step's.
        let comm = self.check();
        device?;
        comm
    }

    /// The first failure of a collective since the last call, for who waits for the step's ticket himself.
    pub fn check(&self) -> Result<(), StepError> {
        Ok(self.comm.as_ref().map_or(Ok(()), |comm| comm.check())?)
    }

    /// Enqueues one step. `caches` has one entry per layer of the stage.
    ///
    /// # Panics
    /// When input or output do not fit the stage, the batch is larger than `options` allow, or the rank has left its group and
    /// joined no other.
    pub fn forward(
        &self,
        input: &StageInput<'_, B>,
        batch: &Batch<B>,
        caches: &[LatentCache<B>],
        output: &StageOutput<'_, B>,
    ) {
        let (backend, ws) = (&*self.backend, &self.workspace);
        let comm = &**self
            .comm
            .as_ref()
            .expect("a step needs a group: this rank has left its own and joined no other");
        let rows = 0..batch.num_tokens;
        assert!(rows.end <= self.options.max_batched_tokens, "a step of {} tokens", rows.end);
        assert_eq!(caches.len(), self.layers.len(), "one cache per layer");
        let eps = self.config.rms_norm_eps as f32;
        let residual = match (input, output) {
            (StageInput::Hidden(hidden), _) | (_, StageOutput::Hidden(hidden)) => (*hidden).clone(),
            _ => ws.residual.rows(rows.clone()),
        };
        match (input, &self.embedding) {
            (StageInput::Tokens(ids), Some(embedding)) => {
                backend.embed(ids, &embedding.table, embedding.first_row, &residual);
                // A token's row lies on one rank; the others have zeros.
                comm.all_reduce(backend, &residual);
            }
            (StageInput::Hidden(_), None) => {}
            _ => panic!("token ids go to the first stage, hidden states to the others"),
        }
        let normed = ws.normed.rows(rows.clone());
        let block_out = ws.block_out.rows(rows.clone());
        let dense = ws.dense.as_ref().map(|scratch| mlp_rows(scratch, rows.clone()));
        let moe = ws.moe.as_ref().map(|scratch| MoeScratch {
            logits: scratch.logits.rows(rows.clone()),
            ids: scratch.ids.rows(rows.clone()),
            weights: scratch.weights.rows(rows.clone()),
            shared: mlp_rows(&scratch.shared, rows.clone()),
        });
        let mla = ws.mla.rows(batch);

        backend.rms_norm(&residual, &self.layers[0].input_norm, eps, &normed);
        for (i, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            let attended = layer.mla.forward(backend, &normed, &self.rope, batch, cache, &mla);
            let (o_proj, norm) = (&layer.mla.o_proj, &layer.post_attention_norm);
            backend.linear_add_norm(comm, attended, o_proj, &block_out, &residual, norm, eps, &normed);
            match &layer.feed_forward {
                FeedForward::Dense(w) => {
                    backend.mlp(&normed, w, dense.as_ref().expect("a dense layer has scratch"), &block_out);
                }
                FeedForward::Moe(w) => {
                    backend.moe_layer(
                        &normed,
                        w,
                        moe.as_ref().expect("an MoE layer has scratch"),
                        &block_out,
                    );
                }
            }
            let next_norm = self.layers.get(i + 1).map(|next| &next.input_norm);
            if let Some(norm) = next_norm.or(self.head.as_ref().map(|head| &head.norm)) {
                backend.all_reduce_add_norm(comm, &residual, &block_out, norm, eps, &normed);
            } else {
                comm.all_reduce(backend, &block_out);
                backend.add(&residual, &block_out);
            }
        }
        match (output, &self.head) {
            (StageOutput::Logits { rows, logits }, Some(head)) => {
                let last = ws.last.rows(0..rows.dim(0));
                backend.gather_rows(&normed.dense, rows, &last);
                let last = Activation::dense(last);
                match &ws.shard_logits {
                    None => backend.linear(&last, &head.lm_head, logits),
                    Some(shard) => {
                        let shard = shard.rows(0..rows.dim(0));
                        backend.linear(&last, &head.lm_head, &shard);
                        comm.all_gather_last(backend, &shard, logits);
                    }
                }
            }
            (StageOutput::Hidden(hidden), None) => {
                assert!(residual.shares_buffer(hidden), "a middle stage's output is the tensor it was given");
            }
            _ => panic!("logits come from the last stage, hidden states from the others"),
        }
    }
}
