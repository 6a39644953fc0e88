//! Multi-head latent attention over the paged latent cache, absorbed and expanded side by side: each is the other's
//! oracle. Source: DeepSeek-V2 report, section 2.1 (arXiv:2405.04434).
//!
//! ```text
//! absorbed:  q_lat = q_nope W_uk;  score = q_lat·c_kv + q_rope·k_rope;  o_lat = Σ p c_kv;  o = o_lat W_uv
//! expanded:  [k_nope | v] = c_kv W_kvb;  score = [q_nope | q_rope]·[k_nope | k_rope];  o = Σ p v
//! ```

use r1_backend::{
    Activation, Backend, BackendError, Batch, Fp8Activation, HeadForm, HeadWeight, LatentCache, QkvScratch,
    QkvWeights, RopeTable, Tensor, Weight,
};
use r1_weights::ModelConfig;

use crate::{MlaForm, ModelOptions};

/// One layer's attention. H is this rank's share of the heads.
pub(crate) struct Mla<B: Backend> {
    pub(crate) qkv: QkvWeights<B>,
    /// `[C]`.
    pub(crate) kv_norm: Tensor<B>,
    /// W_uk: the first P rows of each head of `kv_b`.
    pub(crate) w_uk: HeadWeight<B>,
    /// W_uv: its last U rows.
    pub(crate) w_uv: HeadWeight<B>,
    /// `[H (P + U), C]`, the same memory.
    pub(crate) kv_b: Weight<B>,
    /// `[D, H U]`.
    pub(crate) o_proj: Weight<B>,
    pub(crate) num_heads: usize,
    pub(crate) nope_dim: usize,
    pub(crate) eps: f32,
    pub(crate) scale: f32,
    pub(crate) form: MlaForm,
}

impl<B: Backend> Mla<B> {
    /// The two halves of `kv_b` as per-head weights.
    pub(crate) fn absorbed(
        kv_b: &Weight<B>,
        nope_dim: usize,
        v_dim: usize,
    ) -> (HeadWeight<B>, HeadWeight<B>) {
        let half =
            |rows, form| HeadWeight { weight: kv_b.clone(), rows_per_head: nope_dim + v_dim, rows, form };
        (half(0..nope_dim, HeadForm::RowsIn), half(nope_dim..nope_dim + v_dim, HeadForm::RowsOut))
    }

    /// Whether this step's prefills are expanded.
    ///
    /// Per query row and context token the absorbed form takes H (2C + R) multiplications, the expanded one
    /// H (P + R + U), but that one expands each context token first: H C (P + U). Over `n` query rows per sequence the
    /// expanded form does less once `n (2C - P - U) > C (P + U)`: 171 rows for V3. Measured (`benches/benches/prefill.rs`, whole
    /// prefills at V3's head sizes on a CPU) the two take the same time from 64 to 128 rows, and the expanded form 0.94 of the
    /// other's at 256 and 0.90 at 512.
    fn expands(&self, batch: &Batch<B>, max_expanded_tokens: usize) -> bool {
        let prefills = batch.prefills().len();
        let fits = batch.prefill_context_tokens <= max_expanded_tokens;
        match self.form {
            _ if prefills == 0 => false,
            MlaForm::Absorbed => false,
            MlaForm::Expanded => {
                assert!(
                    fits,
                    "{} context tokens to expand, room for {max_expanded_tokens}",
                    batch.prefill_context_tokens
                );
                true
            }
            MlaForm::Auto => {
                let rows = (batch.num_tokens - batch.num_decodes) / prefills;
                let (latent, expanded) = (self.kv_b.in_features(), self.w_uv.rows.end);
                fits && rows * (2 * latent).saturating_sub(expanded) > latent * expanded
            }
        }
    }

    /// Attention up to its output projection: what that reads, `[T, H U]` in `scratch`. Writes the batch's tokens to `cache`.
    pub(crate) fn forward<'s>(
        &self,
        backend: &B,
        x: &Activation<B>,
        rope: &RopeTable<B>,
        batch: &Batch<B>,
        cache: &LatentCache<B>,
        scratch: &'s MlaScratch<B>,
    ) -> &'s Activation<B> {
        let (nope, v_dim) = (self.nope_dim, self.w_uv.rows.len());
        let latent_dim = cache.latent_dim;
        let expands = self.expands(batch, scratch.max_expanded_tokens);
        // Decodes come first and have one row each, so their rows are the first `num_decodes` ones.
        let (absorbed, num_absorbed) = if expands {
            (batch.decodes(), batch.num_decodes)
        } else {
            (0..batch.num_seqs, batch.num_tokens)
        };
        backend.mla_qkv(x, &self.qkv, &scratch.qkv, &scratch.q, &scratch.kv_a);
        let q = scratch.q.split_last(&[self.num_heads, nope + cache.rope_dim()]);
        let (kv_a, q_latent) = (&scratch.kv_a, scratch.q_latent.rows(0..num_absorbed));
        backend.mla_absorb(&q, kv_a, &self.kv_norm, self.eps, rope, batch, cache, &self.w_uk, &q_latent);
        if !absorbed.is_empty() {
            let q_rope = q.narrow(2, nope..q.dim(2));
            let (q_latent, o_latent) = (&scratch.q_latent, &scratch.o_latent);
            let attended = scratch.attended.rows(0..num_absorbed);
            backend.mla_attend(
                q_latent, &q_rope, cache, batch, absorbed, self.scale, &self.w_uv, o_latent, &attended,
            );
        }
        if expands {
            let rows = 0..batch.prefill_context_tokens;
            let context = scratch.context.rows(rows.clone());
            backend.gather_latent(cache, batch, batch.prefills(), &context);
            let latent = Activation {
                dense: context.narrow(1, 0..latent_dim),
                fp8: scratch.latent_fp8.as_ref().map(|fp8| fp8.rows(rows.clone())),
            };
            backend.quantize(&latent);
            let kv = scratch.kv.rows(rows);
            backend.linear(&latent, &self.kv_b, &kv);
            let kv = kv.split_last(&[self.num_heads, nope + v_dim]);
            let k_rope = context.narrow(1, latent_dim..context.dim(1));
            let by_head = scratch.attended.dense.split_last(&[self.num_heads, v_dim]);
            backend.mla_attention_expanded(&q, &kv, &k_rope, batch, batch.prefills(), self.scale, &by_head);
            backend.quantize(&scratch.attended.rows(num_absorbed..batch.num_tokens));
        }
        &scratch.attended
    }
}

/// Space for attention: rows for the largest step, or a view of the first rows for one step.
pub(crate) struct MlaScratch<B: Backend> {
    qkv: QkvScratch<B>,
    /// `[T, H (P + R)]`.
    q: Tensor<B>,
    /// `[T, C + R]`.
    kv_a: Tensor<B>,
    /// `[T, H, C]`.
    q_latent: Tensor<B>,
    /// `[T, H, C]`.
    o_latent: Tensor<B>,
    /// `[T, H U]`.
    attended: Activation<B>,
    /// `[max_expanded_tokens, C + R]`.
    context: Tensor<B>,
    /// FP8 form of the context's latent part. Its dense form is a view of `context`.
    latent_fp8: Option<Fp8Activation<B>>,
    /// `[max_expanded_tokens, H (P + U)]`.
    kv: Tensor<B>,
    max_expanded_tokens: usize,
}

impl<B: Backend> MlaScratch<B> {
    pub(crate) fn alloc(
        backend: &B,
        config: &ModelConfig,
        options: &ModelOptions,
    ) -> Result<Self, BackendError> {
        let (rows, dtype) = (options.max_batched_tokens, options.activation_dtype);
        let fp8 = options.activation_fp8(config);
        let heads = config.num_attention_heads / options.world_size;
        let (latent, cached) = (config.kv_lora_rank, config.kv_cache_dim());
        let (nope, v_dim) = (config.qk_nope_head_dim, config.v_head_dim);
        let q_rank = config.q_lora_rank.unwrap_or(0);
        let expanded = if options.mla_form == MlaForm::Absorbed { 0 } else { options.max_expanded_tokens };
        Ok(Self {
            qkv: QkvScratch {
                q_a: backend.alloc(&[rows, q_rank], dtype)?,
                q_a_normed: Activation::alloc(backend, rows, q_rank, dtype, fp8)?,
            },
            q: backend.alloc(&[rows, heads * config.qk_head_dim()], dtype)?,
            kv_a: backend.alloc(&[rows, cached], dtype)?,
            q_latent: backend.alloc(&[rows, heads, latent], dtype)?,
            o_latent: backend.alloc(&[rows, heads, latent], dtype)?,
            attended: Activation::alloc(backend, rows, heads * v_dim, dtype, fp8)?,
            context: backend.alloc(&[expanded, cached], dtype)?,
            latent_fp8: match fp8 {
                Some(_) => Activation::alloc(backend, expanded, latent, dtype, fp8)?.fp8,
                None => None,
            },
            kv: backend.alloc(&[expanded, heads * (nope + v_dim)], dtype)?,
            max_expanded_tokens: expanded,
        })
    }

    /// The first rows, for one step.
    pub(crate) fn rows(&self, batch: &Batch<B>) -> Self {
        let rows = 0..batch.num_tokens;
        Self {
            qkv: QkvScratch {
                q_a: self.qkv.q_a.rows(rows.clone()),
                q_a_normed: self.qkv.q_a_normed.rows(rows.clone()),
            },
            q: self.q.rows(rows.clone()),
            kv_a: self.kv_a.rows(rows.clone()),
            q_latent: self.q_latent.rows(rows.clone()),
            o_latent: self.o_latent.rows(rows.clone()),
            attended: self.attended.rows(rows),
            // Attention takes as many of these as the step's prefills have context.
            context: self.context.clone(),
            latent_fp8: self.latent_fp8.as_ref().map(|fp8| fp8.rows(0..self.max_expanded_tokens)),
            kv: self.kv.clone(),
            max_expanded_tokens: self.max_expanded_tokens,
        }
    }
}
