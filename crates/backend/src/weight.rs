//! Weights and activations that carry their format, so that model code never branches on it.

use std::ops::{Deref, Range};

use r1_core::DType;

use crate::{Backend, BackendError, Int4Group, Tensor};

/// Channels per scale of FP8 activations and of the FP8 latent cache.
pub(crate) const FP8_BLOCK: usize = 128;

/// Inputs per scale of int8 activations, see [`Capabilities::int8_activations`](crate::Capabilities::int8_activations).
pub const INT8_BLOCK: usize = 128;

/// The weight of a linear layer, `y = x Wᵀ`.
pub enum Weight<B: Backend> {
    /// `data` `[N, K]` F32, BF16 or F16.
    Dense {
        /// The matrix.
        data: Tensor<B>,
    },
    /// DeepSeek's FP8 block format: element `(n, k)` is `data[n, k] * scales[(n + offset[0]) / block[0], (k + offset[1]) / block[1]]`.
    Fp8Block {
        /// `[N, K]` F8E4M3.
        data: Tensor<B>,
        /// F32, `[ceil((N + offset[0]) / block[0]), ceil((K + offset[1]) / block[1])]`.
        scales: Tensor<B>,
        /// Rows and columns that share a scale: [128, 128] in every published checkpoint.
        block: [usize; 2],
        /// Where element (0, 0) lies inside its first block: not zero when a shard begins inside one.
        offset: [usize; 2],
    },
    /// 8-bit codes in groups along K, for [`linear`](Backend::linear) and [`experts`](Backend::experts): element `(n, k)` is
    /// `data[n, k] * scales[n, (k + offset) / group]`.
    Int8Group {
        /// `[N, K]` I8, -127 to 127.
        data: Tensor<B>,
        /// F32, `[N, ceil((K + offset) / group)]`.
        scales: Tensor<B>,
        /// Inputs that share a scale.
        group: usize,
        /// Where column 0 lies inside its group: not zero when a shard begins inside one; less than `group`.
        offset: usize,
    },
    /// 4-bit codes in groups along K, for [`linear`](Backend::linear) and [`experts`](Backend::experts).
    Int4Group(Int4Group<B>),
}

/// Formats of a [`Weight`], without its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// [`Weight::Dense`].
    Dense,
    /// [`Weight::Fp8Block`].
    Fp8Block,
    /// [`Weight::Int8Group`].
    Int8Group,
    /// [`Weight::Int4Group`].
    Int4Group,
}

impl<B: Backend> Weight<B> {
    /// Output features, N.
    pub fn out_features(&self) -> usize {
        match self {
            Self::Dense { data } | Self::Fp8Block { data, .. } | Self::Int8Group { data, .. } => data.dim(0),
            Self::Int4Group(w) => w.out_features(),
        }
    }

    /// Input features, K.
    pub fn in_features(&self) -> usize {
        match self {
            Self::Dense { data } | Self::Fp8Block { data, .. } | Self::Int8Group { data, .. } => data.dim(1),
            Self::Int4Group(w) => w.in_features(),
        }
    }

    /// Which format it has.
    pub fn format(&self) -> WeightFormat {
        match self {
            Self::Dense { .. } => WeightFormat::Dense,
            Self::Fp8Block { .. } => WeightFormat::Fp8Block,
            Self::Int8Group { .. } => WeightFormat::Int8Group,
            Self::Int4Group(_) => WeightFormat::Int4Group,
        }
    }

    /// Whether both have one format with one element type and groups of one size.
    pub fn is_stored_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dense { data: a }, Self::Dense { data: b }) => a.dtype() == b.dtype(),
            (Self::Fp8Block { block: a, .. }, Self::Fp8Block { block: b, .. }) => a == b,
            (Self::Int8Group { group: a, .. }, Self::Int8Group { group: b, .. }) => a == b,
            (Self::Int4Group(a), Self::Int4Group(b)) => a.group == b.group,
            _ => false,
        }
    }

    /// Whether a backend with [int8 activations](crate::Capabilities::int8_activations) quantizes the inputs of this weight: an int8
    /// or int4 one whose groups are whole blocks of [`INT8_BLOCK`] inputs. A shard that begins inside a group has none such.
    pub fn takes_int8_activations(&self) -> bool {
        match self {
            Self::Dense { .. } | Self::Fp8Block { .. } => false,
            Self::Int8Group { group, offset, .. } => group.is_multiple_of(INT8_BLOCK) && *offset == 0,
            Self::Int4Group(w) => w.group.is_multiple_of(INT8_BLOCK),
        }
    }

    /// The matrix as it is stored, scales aside: codes of an int4 weight.
    pub fn data(&self) -> &Tensor<B> {
        match self {
            Self::Dense { data } | Self::Fp8Block { data, .. } | Self::Int8Group { data, .. } => data,
            Self::Int4Group(int4) => &int4.codes,
        }
    }

    /// Bytes that a pass over the weight reads, scales and zeros included.
    pub fn size_bytes(&self) -> usize {
        let of = |t: &Tensor<B>| t.num_elements() * t.dtype().size_bytes();
        match self {
            Self::Dense { data } => of(data),
            Self::Fp8Block { data, scales, .. } | Self::Int8Group { data, scales, .. } => {
                of(data) + of(scales)
            }
            Self::Int4Group(w) => of(&w.codes) + of(&w.zeros) + of(&w.scales),
        }
    }
}

impl<B: Backend> Clone for Weight<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Dense { data } => Self::Dense { data: data.clone() },
            Self::Fp8Block { data, scales, block, offset } => {
                Self::Fp8Block { data: data.clone(), scales: scales.clone(), block: *block, offset: *offset }
            }
            Self::Int8Group { data, scales, group, offset } => {
                Self::Int8Group { data: data.clone(), scales: scales.clone(), group: *group, offset: *offset }
            }
            Self::Int4Group(w) => Self::Int4Group(w.clone()),
        }
    }
}

/// The FP8 form of an activation: per token and per 128 channels, `scale = max(amax, 1e-4) / 448`.
pub struct Fp8Activation<B: Backend> {
    /// `[T, K]` F8E4M3.
    pub data: Tensor<B>,
    /// `[T, ceil(K / 128)]` F32.
    pub scales: Tensor<B>,
    /// Scales are rounded up to a power of two (`scale_fmt: ue8m0`).
    pub power_of_two_scales: bool,
}

impl<B: Backend> Fp8Activation<B> {
    /// Rows `range`.
    pub fn rows(&self, range: Range<usize>) -> Self {
        Self {
            data: self.data.rows(range.clone()),
            scales: self.scales.rows(range),
            power_of_two_scales: self.power_of_two_scales,
        }
    }
}

/// What a linear reads. The dense form is always there; where the FP8 form is too, FP8 weights are applied to it (W8A8).
pub struct Activation<B: Backend> {
    /// `[T, K]` F32 or BF16.
    pub dense: Tensor<B>,
    /// The values of `dense`, after its rounding, quantised; written by whoever writes `dense`.
    pub fp8: Option<Fp8Activation<B>>,
}

impl<B: Backend> Activation<B> {
    /// An activation without an FP8 form.
    pub fn dense(dense: Tensor<B>) -> Self {
        Self { dense, fp8: None }
    }

    /// Allocates `[rows, cols]`; `fp8` says whether the FP8 form is kept, and whether its scales are powers of two.
    pub fn alloc(
        backend: &B,
        rows: usize,
        cols: usize,
        dtype: DType,
        fp8: Option<bool>,
    ) -> Result<Self, BackendError> {
        let fp8 = match fp8 {
            None => None,
            Some(power_of_two_scales) => Some(Fp8Activation {
                data: backend.alloc(&[rows, cols], DType::F8E4M3)?,
                scales: backend.alloc(&[rows, cols.div_ceil(FP8_BLOCK)], DType::F32)?,
                power_of_two_scales,
            }),
        };
        Ok(Self { dense: backend.alloc(&[rows, cols], dtype)?, fp8 })
    }

    /// Rows `range`.
    pub fn rows(&self, range: Range<usize>) -> Self {
        Self { dense: self.dense.rows(range.clone()), fp8: self.fp8.as_ref().map(|fp8| fp8.rows(range)) }
    }
}

/// Which way a head's rows are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadForm {
    /// `out[t, h, :] = Σ_r x[t, h, r] W_h[r, :]`: `[T, H, rows] -> [T, H, K]`, the absorbed W_uk.
    RowsIn,
    /// `out[t, h, r] = W_h[r, :] · x[t, h, :]`: `[T, H, K] -> [T, H, rows]`, the absorbed W_uv.
    RowsOut,
}

/// A range of rows of every head of a weight, applied head by head: W_uk and W_uv of absorbed MLA, both read from
/// `kv_b_proj` `[H * rows_per_head, K]` where it lies, so that the weight is resident once.
pub struct HeadWeight<B: Backend> {
    /// `[H * rows_per_head, K]`.
    pub weight: Weight<B>,
    /// Rows that belong to one head.
    pub rows_per_head: usize,
    /// Of these, the ones that are applied.
    pub rows: Range<usize>,
    /// Which way.
    pub form: HeadForm,
}

/// A gated MLP: `down(silu(gate(x)) * up(x))`, I = intermediate size.
pub struct MlpWeights<B: Backend> {
    /// `[I, D]`.
    pub gate: Weight<B>,
    /// `[I, D]`.
    pub up: Weight<B>,
    /// `[D, I]`.
    pub down: Weight<B>,
}

/// The routed experts that this rank holds. [`Experts::new`] has checked them and nothing changes them after that: there is no
/// `DerefMut`.
pub struct Experts<B: Backend>(LocalExperts<B>);

impl<B: Backend> Deref for Experts<B> {
    type Target = LocalExperts<B>;

    fn deref(&self) -> &LocalExperts<B> {
        &self.0
    }
}

/// What there is to read of [`Experts`].
pub struct LocalExperts<B: Backend> {
    /// Experts `first..first + local.len()`.
    pub local: Vec<MlpWeights<B>>,
    /// Id of the first local expert.
    pub first: usize,
    /// Experts of the whole layer, E.
    pub total: usize,
    /// Where they lie, as the device's own `experts` wants to know it; see [`Backend::expert_table`].
    pub table: Option<Tensor<B>>,
    /// Gates and ups are stored like the first gate, downs like the first down. Known once, since to look at hundreds of experts
    /// would cost more than a step's work on the few that are chosen.
    alike: bool,
}

impl<B: Backend> Experts<B> {
    /// Experts `first..first + local.len()` of `total`.
    ///
    /// # Panics
    /// When they are not of one shape.
    pub fn new(
        backend: &B,
        local: Vec<MlpWeights<B>>,
        first: usize,
        total: usize,
    ) -> Result<Self, BackendError> {
        crate::shape::local_experts(&local);
        let table = backend.expert_table(&local)?;
        let alike = local.iter().all(|expert| {
            let MlpWeights { gate, down, .. } = &local[0];
            gate.is_stored_like(&expert.gate)
                && gate.is_stored_like(&expert.up)
                && down.is_stored_like(&expert.down)
        });
        Ok(Self(LocalExperts { local, first, total, table, alike }))
    }
}

impl<B: Backend> LocalExperts<B> {
    /// Whether all gates and ups are stored alike, and all downs.
    pub fn are_alike(&self) -> bool {
        self.alike
    }
}

/// How router logits become scores, in F32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreFunction {
    /// V2.
    Softmax,
    /// V3.
    Sigmoid,
}

/// What a group of experts is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert's score: `group_limited_greedy`.
    Max,
    /// The sum of its two best biased scores: `noaux_tc`.
    TopTwoSum,
}

/// Restriction of a token's experts to a few groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups of consecutive experts.
    pub n_group: usize,
    /// Groups a token may use.
    pub topk_group: usize,
    /// How groups are compared.
    pub score: GroupScore,
}

/// How a token chooses its experts. Source: DeepSeek-V3 report, section 2.1.2 (arXiv:2412.19437).
///
/// Experts are chosen by score plus bias and weighed by the score alone. Groups that lose are masked with -inf.
/// Equal scores take the lower index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Logits to scores.
    pub score: ScoreFunction,
    /// `None`: all experts compete.
    pub groups: Option<Groups>,
    /// Experts per token, k.
    pub top_k: usize,
    /// Divide the chosen scores by their sum plus 1e-20.
    pub norm_topk_prob: bool,
    /// Multiplies the weights last.
    pub routed_scaling_factor: f32,
}

/// Space for a gated MLP: rows for the largest batch, I columns.
pub struct MlpScratch<B: Backend> {
    /// `[T, 2 I]`: gate and up.
    pub gate_up: Tensor<B>,
    /// `[T, I]`.
    pub hidden: Activation<B>,
}

/// A mixture-of-experts layer.
pub struct MoeWeights<B: Backend> {
    /// Router, `[E, D]`.
    pub router: Weight<B>,
    /// `e_score_correction_bias` `[E]` F32.
    pub bias: Option<Tensor<B>>,
    /// How tokens choose.
    pub routing: Routing,
    /// The routed experts.
    pub experts: Experts<B>,
    /// The shared experts as one MLP of width `n_shared_experts * moe_intermediate_size`.
    pub shared: MlpWeights<B>,
}

/// Space for a mixture-of-experts layer.
pub struct MoeScratch<B: Backend> {
    /// `[T, E]` F32.
    pub logits: Tensor<B>,
    /// `[T, k]` U32.
    pub ids: Tensor<B>,
    /// `[T, k]` F32.
    pub weights: Tensor<B>,
    /// For the shared experts.
    pub shared: MlpScratch<B>,
}

/// How queries are made from the hidden state.
#[allow(clippy::large_enum_variant)] // one per layer; a box would only add a hop
pub enum QueryProjection<B: Backend> {
    /// `q_lora_rank: null`: one matrix `[H * (nope + rope), D]`.
    Direct(Weight<B>),
    /// Down to `q_lora_rank`, a norm, and up.
    LowRank {
        /// `[q_lora_rank, D]`.
        a: Weight<B>,
        /// `[q_lora_rank]`.
        norm: Tensor<B>,
        /// `[H * (nope + rope), q_lora_rank]`.
        b: Weight<B>,
    },
}

/// What attention reads of the hidden state.
pub struct QkvWeights<B: Backend> {
    /// Queries.
    pub q: QueryProjection<B>,
    /// `[kv_lora_rank + rope, D]`.
    pub kv_a: Weight<B>,
    /// Epsilon of the low-rank norm.
    pub eps: f32,
}

/// Space for the low-rank query.
pub struct QkvScratch<B: Backend> {
    /// `[T, q_lora_rank]`.
    pub q_a: Tensor<B>,
    /// `[T, q_lora_rank]`.
    pub q_a_normed: Activation<B>,
}
