//! The operations a device must offer.

use std::fmt;
use std::ops::Range;

use r1_core::DType;

use crate::{
    Activation, BackendError, Batch, Communicator, Experts, HeadWeight, HostTensor, KvCache, LatentCache,
    LogprobsOut, MlpScratch, MlpWeights, MoeScratch, MoeWeights, QkvScratch, QkvWeights, RopeTable, Routing,
    SamplingBatch, Tensor, Weight, WeightFormat, composite,
};

/// Host values to write to a tensor; F32 values are rounded to nearest even when the tensor is narrower.
#[derive(Clone, Copy, Debug)]
pub enum HostSlice<'a> {
    /// For F32, BF16, F16 and F8E4M3 tensors (F8E4M3 saturates at ±448).
    F32(&'a [f32]),
    /// For U32 tensors.
    U32(&'a [u32]),
}

/// Where a tensor's values go; narrower floats are widened.
#[derive(Debug)]
pub enum HostSliceMut<'a> {
    /// From F32, BF16, F16 and F8E4M3 tensors.
    F32(&'a mut [f32]),
    /// From U32 tensors.
    U32(&'a mut [u32]),
}

/// A device's memory as a whole, whoever uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes that the device has.
    pub total_bytes: usize,
    /// Of these, bytes in use: by this process, by others and by the driver.
    pub used_bytes: usize,
}

/// Completion of the work enqueued before it was made.
#[must_use = "a step's failure is known only when its ticket is waited for"]
pub struct Ticket(State);

enum State {
    Done(Result<(), BackendError>),
    Waiting(Box<dyn FnOnce() -> Result<(), BackendError> + Send>),
}

impl Ticket {
    /// Work that is complete already.
    pub fn ready(result: Result<(), BackendError>) -> Self {
        Self(State::Done(result))
    }

    /// Work whose end `wait` waits for.
    pub fn waiting(wait: impl FnOnce() -> Result<(), BackendError> + Send + 'static) -> Self {
        Self(State::Waiting(Box::new(wait)))
    }

    /// Waits; gives the first failure of the work.
    pub fn wait(self) -> Result<(), BackendError> {
        match self.0 {
            State::Done(result) => result,
            State::Waiting(wait) => wait(),
        }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket")
    }
}

/// Kinds of attention, each with operations and a cache of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// Multi-head latent attention: [`Backend::rope_cache`], [`Backend::mla_attention`] and what belongs to them.
    Mla,
    /// Grouped-query attention: [`Backend::rope_cache_gqa`] and [`Backend::gqa_attention`].
    Gqa,
}

/// What a backend can do beyond the operations that every one has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // independent of each other
pub struct Capabilities {
    /// Element types that activations may have.
    pub activation_dtypes: Vec<DType>,
    /// Formats of weights that `linear` takes; dense ones and FP8 blocks are always among them.
    pub weight_formats: Vec<WeightFormat>,
    /// Of these, the ones that `experts` takes too; dense ones and FP8 blocks are always among them.
    pub expert_formats: Vec<WeightFormat>,
    /// Kinds of attention that it computes; MLA is always among them.
    pub attention: Vec<AttentionKind>,
    /// Element types that a [`LatentCache`] may have, whatever the activations have; F8E4M3 is its FP8 form.
    pub cache_dtypes: Vec<DType>,
    /// FP8 weights can be applied to FP8 activations (W8A8).
    pub fp8_activations: bool,
    /// Activations are quantized to int8, per token and [`INT8_BLOCK`](crate::INT8_BLOCK) inputs, where a weight
    /// [takes them so](Weight::takes_int8_activations), the hidden state of experts too: with a = max(max |x|, 1e-30) of a block, x
    /// becomes round(x · (127 / a)) · (a / 127), ties to even.
    pub int8_activations: bool,
    /// Work runs behind the caller's back, so that planning a step ahead pays.
    pub asynchronous: bool,
    /// A row's result depends neither on the other rows of a step nor on how a prompt is cut into steps, bit for bit, in
    /// the absorbed form of MLA and in grouped-query attention.
    pub batch_invariant: bool,
    /// [`capture`](Backend::capture) gives a graph. Where it does not, steps run eagerly.
    pub captures: bool,
}

/// A device and its operations.
///
/// Operations are enqueued in order and write into tensors that exist already, so that a step allocates nothing and can be
/// captured. A failure surfaces from the [`Ticket`] that [`flush`](Backend::flush) gives. Shapes are checked at every call by
/// [`shape`](crate::shape); a wrong one is a bug of the caller and panics with the operation's and the argument's name.
/// Unless said otherwise `x` and `out` have one of the activation dtypes (F32 or BF16), accumulation is F32, and `out` must
/// not share a buffer with an input, whether or not the views overlap.
///
/// T tokens, S sequences, L rows of logits, D hidden size, V vocabulary, H local heads, C = kv_lora_rank,
/// R = qk_rope_head_dim, P = qk_nope_head_dim, U = v_head_dim, E experts, k experts per token, I intermediate size; of
/// grouped-query attention G local KV heads, Dh and Dv the sizes of a head's keys and values.
pub trait Backend: Sized + Send + Sync + 'static {
    /// Device memory.
    type Buffer: Send + Sync;
    /// A captured step.
    type Graph: Send;

    /// What the user calls it: `cpu`, `reference`.
    fn name(&self) -> &'static str;

    /// Threads of the host that work for it while weights are made ready; `None`: as many as there are, shared among ranks.
    fn host_threads(&self) -> Option<usize> {
        None
    }

    /// One line for the log: instruction set, threads, device name.
    fn describe(&self) -> String;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Bytes of memory that allocations may still take; `None` where nothing can be said.
    fn free_bytes(&self) -> Option<usize> {
        None
    }

    /// Memory of the device; `None` where it has none of its own.
    fn memory(&self) -> Option<MemoryUse> {
        None
    }

    // Memory: at start only.

    /// A zeroed tensor.
    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor<Self>, BackendError>;

    /// A read-only tensor with the host's values: in place where the device can read them there, else copied.
    fn import(&self, host: &HostTensor) -> Result<Tensor<Self>, BackendError>;

    /// As [`import`](Backend::import), for the `[N, K]` data of a [`Weight`] (the codes of an int4 one). A backend may lay it
    /// out as its linears like it; nobody but its own `linear`, `per_head` and `experts` reads the result, and they read what
    /// [`import`](Backend::import) gives too: a tied head is the embedding's table.
    fn import_matrix(&self, host: &HostTensor) -> Result<Tensor<Self>, BackendError> {
        self.import(host)
    }

    /// An FP8 block weight as dense BF16 `[N, K]`, each value `code * scale` rounded once: `data` `[N, K]` F8E4M3, `scales`, `block`
    /// and `offset` as [`Weight::Fp8Block`] has them. `None`: this backend leaves the arithmetic to the host.
    fn import_widened(
        &self,
        _data: &HostTensor,
        _scales: &HostTensor,
        _block: [usize; 2],
        _offset: [usize; 2],
    ) -> Result<Option<Tensor<Self>>, BackendError> {
        Ok(None)
    }

    /// What this backend's `experts` needs to find the weights of a layer's experts, which stay where they are; nothing by
    /// default. Made once per layer, by [`Experts::new`].
    fn expert_table(&self, _local: &[MlpWeights<Self>]) -> Result<Option<Tensor<Self>>, BackendError> {
        Ok(None)
    }

    // Traffic with the host: a few kilobytes per step.

    /// Writes host values to `dst`.
    fn upload(&self, src: HostSlice<'_>, dst: &Tensor<Self>);

    /// Reads `src` once everything enqueued before has run.
    fn download(&self, src: &Tensor<Self>, dst: HostSliceMut<'_>) -> Result<(), BackendError>;

    /// As [`download`](Backend::download), but waits for no work beyond the steps whose tickets have been waited for. `src` must
    /// have been written by one of those and must not be written by work enqueued since.
    fn read_back(&self, src: &Tensor<Self>, dst: HostSliceMut<'_>) -> Result<(), BackendError> {
        self.download(src, dst)
    }

    /// Closes a step: the ticket gives the first failure of what was enqueued since the last flush.
    fn flush(&self) -> Ticket;

    // Primitives.

    /// `ids[t] = drawn[from[t]]` where `from[t]` is not `u32::MAX`; other ids stay. A step that is enqueued before the tokens of
    /// the step before it are known on the host reads them so. `drawn` `[L]`, `from` `[T]`, `ids` `[T]`, all U32; a `from[t]`
    /// that is no row of `drawn` is a bug of the caller.
    fn feed_tokens(&self, drawn: &Tensor<Self>, from: &Tensor<Self>, ids: &Tensor<Self>);

    /// `out[t] = table[ids[t] - first_row]`; ids whose row this table does not hold give zeros (a vocabulary shard).
    /// `ids` `[T]` U32, `table` `[V, D]`, `out` `[T, D]`.
    fn embed(&self, ids: &Tensor<Self>, table: &Tensor<Self>, first_row: usize, out: &Tensor<Self>);

    /// `out = x * rsqrt(mean(x²) + eps) * weight`, over the last dimension. `x` `[T, D]`, `weight` `[D]`.
    fn rms_norm(&self, x: &Tensor<Self>, weight: &Tensor<Self>, eps: f32, out: &Activation<Self>);

    /// Writes `x`'s FP8 form from its dense form; nothing to do where it has none.
    fn quantize(&self, x: &Activation<Self>);

    /// `out = x Wᵀ`. `x` `[T, K]`, `w` `[N, K]`, `out` `[T, N]`, F32 or the activation dtype. FP8 weights meet `x.fp8` where it
    /// is there (each 128-block of K accumulated in F32, scaled, then added), else `x.dense`; all others meet `x.dense`. Formats
    /// that [`Capabilities::weight_formats`] lacks are refused with a panic.
    fn linear(&self, x: &Activation<Self>, w: &Weight<Self>, out: &Tensor<Self>);

    /// One matrix per head, see [`HeadWeight`]: dense, in FP8 blocks or, where the capabilities have it, int8. `x` `[T, H, a]`, `out` `[T, H, b]`, both may be strided.
    fn per_head(&self, x: &Tensor<Self>, w: &HeadWeight<Self>, out: &Tensor<Self>);

    /// RoPE and cache write. Rotates `q_rope` `[T, H, R]` (strided) in place; writes `rms_norm(kv_a[:, :C])` and the rotated
    /// `kv_a[:, C:]` to the cache at the batch's slots; a row whose slot is [`NO_SLOT`](crate::NO_SLOT) writes nothing there.
    /// `kv_a` `[T, C + R]`, `norm` `[C]`. Into an FP8 cache the normed values go from F32 to their scales and nearest codes, and
    /// the rotated ones to BF16.
    fn rope_cache(
        &self,
        q_rope: &Tensor<Self>,
        kv_a: &Tensor<Self>,
        norm: &Tensor<Self>,
        eps: f32,
        rope: &RopeTable<Self>,
        batch: &Batch<Self>,
        cache: &LatentCache<Self>,
    );

    /// Absorbed MLA over the paged latent cache, for the sequences `seqs`, any mix of decode rows and prefill chunks; other
    /// sequences' rows of `out` are left alone. Row `i` of a sequence with `n` rows sees the first `context_len - n + 1 + i`
    /// tokens; the row of a sequence whose `context_len` is 0 (padding, see [`Batch`]) becomes zeros. `q_latent` `[T, H, C]`,
    /// `q_rope` `[T, H, R]` (strided), `out` `[T, H, C]`. `scale` holds YaRN's mscale². Codes of an FP8 cache stand for
    /// `code * scale`, as keys and as values.
    /// Source: DeepSeek-V2 report, section 2.1.2 (arXiv:2405.04434).
    fn mla_attention(
        &self,
        q_latent: &Tensor<Self>,
        q_rope: &Tensor<Self>,
        cache: &LatentCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        out: &Tensor<Self>,
    );

    /// Copies the cached rows of the sequences `seqs`, one after the other: sequence `s` begins at row
    /// `context_start[s] - context_start[seqs.start]`. `out` `[N, C + R]`; an FP8 cache's rows are dequantised and rounded once.
    fn gather_latent(
        &self,
        cache: &LatentCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        out: &Tensor<Self>,
    );

    /// Un-absorbed MLA of the sequences `seqs` over expanded keys and values laid out as by [`gather_latent`](Backend::gather_latent).
    /// `q` `[T, H, P + R]`, `kv` `[N, H, P + U]` = [k_nope | v], `k_rope` `[N, R]` (strided), `out` `[T, H, U]`.
    fn mla_attention_expanded(
        &self,
        q: &Tensor<Self>,
        kv: &Tensor<Self>,
        k_rope: &Tensor<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        out: &Tensor<Self>,
    );

    /// RoPE and cache write of grouped-query attention. Rotates `q` `[T, H, Dh]` (strided) in place and writes the rotated `k`
    /// `[T, G, Dh]` (strided) and `v` `[T, G, Dv]` (strided) to the cache at the batch's slots. Elements `i` and `i + Dh / 2` are a
    /// pair (Llama, Qwen2). `rope` `[max_positions, Dh]`. `q` shares no buffer with `k` or `v`.
    ///
    /// A row whose slot is `u32::MAX` is padding: nothing of it is written to the cache, its position must still be one of the
    /// table's, and its row of `q` holds anything afterwards.
    ///
    /// # Panics
    /// Where [`Capabilities::attention`] lacks [`AttentionKind::Gqa`].
    fn rope_cache_gqa(
        &self,
        _q: &Tensor<Self>,
        _k: &Tensor<Self>,
        _v: &Tensor<Self>,
        _rope: &RopeTable<Self>,
        _batch: &Batch<Self>,
        _cache: &KvCache<Self>,
    ) {
        panic!(
            "rope_cache_gqa: the {} backend has no grouped-query attention (see capabilities)",
            self.name()
        );
    }

    /// Grouped-query attention over the paged cache, causal, for the sequences `seqs`, any mix of decode rows and prefill
    /// chunks; other sequences' rows of `out` are left alone. Row `i` of a sequence with `n` rows sees the first
    /// `context_len - n + 1 + i` tokens; head `h` reads KV head `h / (H / G)`. `q` `[T, H, Dh]` (strided), `out` `[T, H, Dv]`; H is a
    /// multiple of G. A sequence whose `context_len` is 0 is padding: its rows of `out` become zeros.
    /// Source: Ainslie et al., GQA (arXiv:2305.13245).
    ///
    /// # Panics
    /// Where [`Capabilities::attention`] lacks [`AttentionKind::Gqa`].
    fn gqa_attention(
        &self,
        _q: &Tensor<Self>,
        _cache: &KvCache<Self>,
        _batch: &Batch<Self>,
        _seqs: Range<usize>,
        _scale: f32,
        _out: &Tensor<Self>,
    ) {
        panic!(
            "gqa_attention: the {} backend has no grouped-query attention (see capabilities)",
            self.name()
        );
    }

    /// Chooses experts, see [`Routing`]. `logits` `[T, E]` F32, `bias` `[E]` F32, `ids` `[T, k]` U32, `weights` `[T, k]` F32,
    /// best first.
    fn route(
        &self,
        logits: &Tensor<Self>,
        bias: Option<&Tensor<Self>>,
        routing: &Routing,
        ids: &Tensor<Self>,
        weights: &Tensor<Self>,
    );

    /// `out[t] += Σ_j weights[t, j] * expert_{ids[t, j]}(x[t])`; ids outside the local range are skipped. The sum is F32 and
    /// rounded once. Where `x` has an FP8 form, the experts' hidden state is quantised in the same way. Formats that
    /// [`Capabilities::expert_formats`] lacks are refused: with an error by [`Experts::new`], or with a panic.
    fn experts(
        &self,
        x: &Activation<Self>,
        ids: &Tensor<Self>,
        weights: &Tensor<Self>,
        experts: &Experts<Self>,
        out: &Tensor<Self>,
    );

    /// `out = silu(gate_up[:, :I]) * gate_up[:, I:]`.
    fn silu_mul(&self, gate_up: &Tensor<Self>, out: &Activation<Self>);

    /// `residual += x`, `[T, D]`.
    fn add(&self, residual: &Tensor<Self>, x: &Tensor<Self>);

    /// `out[i] = x[rows[i]]`. `x` `[T, D]`, `rows` `[L]` U32, `out` `[L, D]`.
    fn gather_rows(&self, x: &Tensor<Self>, rows: &Tensor<Self>, out: &Tensor<Self>);

    /// Draws one token per row, see [`SamplingBatch`]. `logits` `[L, V]` F32 is left as it is; `out` `[L]` U32.
    fn sample(&self, logits: &Tensor<Self>, sampling: &SamplingBatch, out: &Tensor<Self>);

    /// Log-probabilities of `tokens` `[L]` U32 and of the most likely ones under `logits` `[L, V]` F32.
    fn logprobs(&self, logits: &Tensor<Self>, tokens: &Tensor<Self>, out: &LogprobsOut<Self>);

    // Composites: default bodies are made of the primitives; a backend overrides them fused, and conformance compares both.

    /// `residual += x; out = rms_norm(residual)`.
    fn add_rms_norm(
        &self,
        residual: &Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
        out: &Activation<Self>,
    ) {
        composite::add_rms_norm(self, residual, x, weight, eps, out);
    }

    /// Sums `x` over the ranks, then [`add_rms_norm`](Backend::add_rms_norm).
    fn all_reduce_add_norm(
        &self,
        comm: &dyn Communicator<Self>,
        residual: &Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
        out: &Activation<Self>,
    ) {
        composite::all_reduce_add_norm(self, comm, residual, x, weight, eps, out);
    }

    /// Queries `q` `[T, H (P + R)]` and `kv_a` `[T, C + R]` of the normed hidden state `x`.
    fn mla_qkv(
        &self,
        x: &Activation<Self>,
        w: &QkvWeights<Self>,
        scratch: &QkvScratch<Self>,
        q: &Tensor<Self>,
        kv_a: &Tensor<Self>,
    ) {
        composite::mla_qkv(self, x, w, scratch, q, kv_a);
    }

    /// What stands between the projections and absorbed attention: [`rope_cache`](Backend::rope_cache) of all T rows, the
    /// rope part of `q` rotated in place, then `q_latent = q_nope W_uk` for the first L rows, L from 0 to T. `q`
    /// `[T, H, P + R]`, `kv_a` `[T, C + R]`, `norm` `[C]`, `w_uk` in the form [`RowsIn`](crate::HeadForm::RowsIn),
    /// `q_latent` `[L, H, C]`.
    fn mla_absorb(
        &self,
        q: &Tensor<Self>,
        kv_a: &Tensor<Self>,
        norm: &Tensor<Self>,
        eps: f32,
        rope: &RopeTable<Self>,
        batch: &Batch<Self>,
        cache: &LatentCache<Self>,
        w_uk: &HeadWeight<Self>,
        q_latent: &Tensor<Self>,
    ) {
        composite::mla_absorb(self, q, kv_a, norm, eps, rope, batch, cache, w_uk, q_latent);
    }

    /// Absorbed attention of the batch's first sequences, and what the output projection reads of it:
    /// [`mla_attention`](Backend::mla_attention), W_uv, [`quantize`](Backend::quantize). `seqs` begins at 0 and is
    /// either all sequences or those that decode; L is their number of rows. `q_latent` `[T, H, C]` and `q_rope`
    /// `[T, H, R]` (strided) are read in the first L rows, `o_latent` `[T, H, C]` is scratch, `w_uv` has the form
    /// [`RowsOut`](crate::HeadForm::RowsOut), `attended` `[L, H U]`.
    fn mla_attend(
        &self,
        q_latent: &Tensor<Self>,
        q_rope: &Tensor<Self>,
        cache: &LatentCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        w_uv: &HeadWeight<Self>,
        o_latent: &Tensor<Self>,
        attended: &Activation<Self>,
    ) {
        composite::mla_attend(self, q_latent, q_rope, cache, batch, seqs, scale, w_uv, o_latent, attended);
    }

    /// A block's last linear, whose results the ranks sum, and the next block's input:
    /// `block_out = x Wᵀ`, then [`all_reduce_add_norm`](Backend::all_reduce_add_norm). `x` `[T, K]`, `w` `[D, K]`, `residual`
    /// and `out` `[T, D]`; `block_out` `[T, D]` is scratch.
    fn linear_add_norm(
        &self,
        comm: &dyn Communicator<Self>,
        x: &Activation<Self>,
        w: &Weight<Self>,
        block_out: &Tensor<Self>,
        residual: &Tensor<Self>,
        norm: &Tensor<Self>,
        eps: f32,
        out: &Activation<Self>,
    ) {
        composite::linear_add_norm(self, comm, x, w, block_out, residual, norm, eps, out);
    }

    /// `out = down(silu(gate(x)) * up(x))`.
    fn mlp(
        &self,
        x: &Activation<Self>,
        w: &MlpWeights<Self>,
        scratch: &MlpScratch<Self>,
        out: &Tensor<Self>,
    ) {
        composite::mlp(self, x, w, scratch, out);
    }

    /// Router, shared experts, routed experts.
    fn moe_layer(
        &self,
        x: &Activation<Self>,
        w: &MoeWeights<Self>,
        scratch: &MoeScratch<Self>,
        out: &Tensor<Self>,
    ) {
        composite::moe_layer(self, x, w, scratch, out);
    }

    // Capture.

    /// Records what `step` enqueues, collectives included, and runs none of it; `step` is called once. It must neither
    /// move values to or from the host, nor allocate, nor flush, and what it enqueues must depend on host values alone that are
    /// the same at every replay: those of [`Batch`], shapes and strides. The graph reads and writes the tensors that `step`
    /// named, at their addresses, so it may be replayed only while they live. `None` where
    /// [`captures`](Capabilities::captures) is false: then `step` was not called.
    fn capture(&self, _step: &mut dyn FnMut()) -> Result<Option<Self::Graph>, BackendError> {
        Ok(None)
    }

    /// Enqueues a captured step, in order with everything else; a failure surfaces from [`flush`](Backend::flush) as any
    /// operation's does.
    fn replay(&self, graph: &Self::Graph);
}
