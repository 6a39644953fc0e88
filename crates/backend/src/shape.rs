//! The one place where shapes are checked: every operation of every backend calls its check first.
//!
//! A size is bound to its letter at first sight and compared ever after. A mismatch is a bug of the caller and panics:
//! `linear: w has shape [8, 5], expected [N=8, K=4]`.

mod gqa;
mod grouped;

use std::ops::Range;

use r1_core::DType;

use crate::weight::FP8_BLOCK;
use crate::{
    Activation, Backend, Batch, Experts, HeadForm, HeadWeight, LatentCache, LogprobsOut, RopeTable, Routing,
    SamplingBatch, Tensor, Weight,
};

pub use gqa::{gqa_attention, rope_cache_gqa};

const MAX_LETTERS: usize = 14;
const ACTIVATION: &[DType] = &[DType::F32, DType::BF16];
const FLOAT: &[DType] = &[DType::F32, DType::BF16, DType::F16];

/// Sizes seen so far in one call.
struct Check {
    op: &'static str,
    bound: [(&'static str, usize); MAX_LETTERS],
    len: usize,
}

impl Check {
    fn new(op: &'static str) -> Self {
        Self { op, bound: [("", 0); MAX_LETTERS], len: 0 }
    }

    fn get(&self, letter: &str) -> Option<usize> {
        self.bound[..self.len].iter().find(|(name, _)| *name == letter).map(|&(_, size)| size)
    }

    fn bind(mut self, letter: &'static str, size: usize) -> Self {
        if self.get(letter).is_none() {
            self.bound[self.len] = (letter, size);
            self.len += 1;
        }
        self
    }

    #[track_caller]
    fn shape(mut self, arg: &str, shape: &[usize], letters: &[&'static str]) -> Self {
        let fits = shape.len() == letters.len()
            && shape
                .iter()
                .zip(letters)
                .all(|(&size, letter)| self.get(letter).is_none_or(|bound| bound == size));
        if !fits {
            let expected: Vec<String> = letters
                .iter()
                .map(|letter| {
                    self.get(letter).map_or_else(|| (*letter).to_string(), |size| format!("{letter}={size}"))
                })
                .collect();
            panic!("{}: {arg} has shape {shape:?}, expected [{}]", self.op, expected.join(", "));
        }
        for (&size, letter) in shape.iter().zip(letters) {
            self = self.bind(letter, size);
        }
        self
    }

    #[track_caller]
    fn arg<B: Backend>(self, arg: &str, t: &Tensor<B>, letters: &[&'static str], dtypes: &[DType]) -> Self {
        assert!(
            dtypes.contains(&t.dtype()),
            "{}: {arg} has dtype {}, expected one of {}",
            self.op,
            t.dtype(),
            dtypes.iter().map(|d| d.name()).collect::<Vec<_>>().join(", ")
        );
        self.shape(arg, t.shape(), letters)
    }

    #[track_caller]
    fn activation<B: Backend>(self, arg: &str, x: &Activation<B>, letters: &[&'static str; 2]) -> Self {
        let op = self.op;
        let check = self.arg(arg, &x.dense, letters, ACTIVATION);
        if let Some(q) = &x.fp8 {
            let (rows, cols) = (x.dense.dim(0), x.dense.dim(1));
            assert!(
                q.data.shape() == [rows, cols] && q.scales.shape() == [rows, cols.div_ceil(128)],
                "{op}: {arg}.fp8 has shapes {:?} and {:?}, expected [{rows}, {cols}] and [{rows}, {}]",
                q.data.shape(),
                q.scales.shape(),
                cols.div_ceil(128)
            );
        }
        check
    }

    #[track_caller]
    fn weight<B: Backend>(self, arg: &str, w: &Weight<B>, letters: &[&'static str; 2]) -> Self {
        let op = self.op;
        match w {
            Weight::Dense { data } => self.arg(arg, data, letters, FLOAT),
            Weight::Fp8Block { data, scales, block, offset } => {
                let want = [0, 1].map(|i| (data.dim(i) + offset[i]).div_ceil(block[i]));
                assert!(
                    scales.shape() == want && scales.dtype() == DType::F32,
                    "{op}: {arg}.scales has shape {:?} {}, expected {want:?} F32",
                    scales.shape(),
                    scales.dtype()
                );
                self.arg(arg, data, letters, &[DType::F8E4M3])
            }
            Weight::Int8Group { data, scales, group, offset } => {
                self.int8(arg, [data, scales], [*group, *offset], letters)
            }
            Weight::Int4Group(_) => {
                panic!("{op}: {arg} is {:?}, which `linear` and `experts` alone take", w.format())
            }
        }
    }

    #[track_caller]
    fn same_dtype<B: Backend>(self, args: [&str; 2], a: &Tensor<B>, b: &Tensor<B>) -> Self {
        let [name_a, name_b] = args;
        assert!(
            a.dtype() == b.dtype(),
            "{}: {name_a} is {} but {name_b} is {}",
            self.op,
            a.dtype(),
            b.dtype()
        );
        self
    }

    #[track_caller]
    fn batch<B: Backend>(self, batch: &Batch<B>) -> Self {
        const U32: &[DType] = &[DType::U32];
        let op = self.op;
        assert!(
            batch.num_decodes <= batch.num_seqs,
            "{op}: batch has {} decodes of {} sequences",
            batch.num_decodes,
            batch.num_seqs
        );
        self.bind("T", batch.num_tokens)
            .bind("S", batch.num_seqs)
            .bind("S+1", batch.num_seqs + 1)
            .arg("batch.positions", &batch.positions, &["T"], U32)
            .arg("batch.slots", &batch.slots, &["T"], U32)
            .arg("batch.query_start", &batch.query_start, &["S+1"], U32)
            .arg("batch.context_len", &batch.context_len, &["S"], U32)
            .arg("batch.context_start", &batch.context_start, &["S+1"], U32)
            .arg("batch.block_table", &batch.block_table, &["S", "max_blocks"], U32)
    }

    #[track_caller]
    fn cache<B: Backend>(self, cache: &LatentCache<B>) -> Self {
        let (latent, rope) = (cache.latent_dim, cache.rope_dim());
        let check = self.bind("C", latent).bind("R", rope).bind("C+R", latent + rope);
        let Some(fp8) = &cache.fp8 else {
            return check.arg("cache", &cache.data, &["num_blocks", "block_size", "C+R"], ACTIVATION);
        };
        check
            .bind("ceil(C/128)", latent.div_ceil(FP8_BLOCK))
            .arg("cache", &cache.data, &["num_blocks", "block_size", "C"], &[DType::F8E4M3])
            .arg("cache.scales", &fp8.scales, &["num_blocks", "block_size", "ceil(C/128)"], &[DType::F32])
            .arg("cache.rope", &fp8.rope, &["num_blocks", "block_size", "R"], &[DType::BF16])
    }

    #[track_caller]
    fn seqs<B: Backend>(self, seqs: &Range<usize>, batch: &Batch<B>) -> Self {
        assert!(
            seqs.start <= seqs.end && seqs.end <= batch.num_seqs,
            "{}: sequences {seqs:?} of {}",
            self.op,
            batch.num_seqs
        );
        self
    }
}

/// See [`Backend::feed_tokens`].
#[track_caller]
pub fn feed_tokens<B: Backend>(drawn: &Tensor<B>, from: &Tensor<B>, ids: &Tensor<B>) {
    Check::new("feed_tokens")
        .arg("drawn", drawn, &["L"], &[DType::U32])
        .arg("from", from, &["T"], &[DType::U32])
        .arg("ids", ids, &["T"], &[DType::U32]);
}

/// See [`Backend::embed`].
#[track_caller]
pub fn embed<B: Backend>(ids: &Tensor<B>, table: &Tensor<B>, out: &Tensor<B>) {
    Check::new("embed").arg("ids", ids, &["T"], &[DType::U32]).arg("table", table, &["V", "D"], FLOAT).arg(
        "out",
        out,
        &["T", "D"],
        ACTIVATION,
    );
}

/// See [`Backend::rms_norm`].
#[track_caller]
pub fn rms_norm<B: Backend>(x: &Tensor<B>, weight: &Tensor<B>, out: &Activation<B>) {
    Check::new("rms_norm")
        .arg("x", x, &["T", "D"], ACTIVATION)
        .arg("weight", weight, &["D"], FLOAT)
        .activation("out", out, &["T", "D"]);
}

/// See [`Backend::quantize`].
#[track_caller]
pub fn quantize<B: Backend>(x: &Activation<B>) {
    Check::new("quantize").activation("x", x, &["T", "K"]);
}

/// See [`Backend::linear`].
#[track_caller]
pub fn linear<B: Backend>(x: &Activation<B>, w: &Weight<B>, out: &Tensor<B>) {
    Check::new("linear").activation("x", x, &["T", "K"]).any_weight("w", w, &["N", "K"]).arg(
        "out",
        out,
        &["T", "N"],
        ACTIVATION,
    );
}

/// See [`Backend::per_head`].
#[track_caller]
pub fn per_head<B: Backend>(x: &Tensor<B>, w: &HeadWeight<B>, out: &Tensor<B>) {
    let (from, to) = match w.form {
        HeadForm::RowsIn => ("rows", "K"),
        HeadForm::RowsOut => ("K", "rows"),
    };
    let check = Check::new("per_head")
        .bind("rows", w.rows.len())
        .bind("H * rows_per_head", x.dim(1) * w.rows_per_head)
        .weight("w", &w.weight, &["H * rows_per_head", "K"])
        .arg("x", x, &["T", "H", from], ACTIVATION)
        .arg("out", out, &["T", "H", to], ACTIVATION);
    assert!(w.rows.end <= w.rows_per_head, "{}: rows {:?} of {} per head", check.op, w.rows, w.rows_per_head);
}

/// See [`Backend::rope_cache`].
#[track_caller]
pub fn rope_cache<B: Backend>(
    q_rope: &Tensor<B>,
    kv_a: &Tensor<B>,
    norm: &Tensor<B>,
    rope: &RopeTable<B>,
    batch: &Batch<B>,
    cache: &LatentCache<B>,
) {
    Check::new("rope_cache")
        .cache(cache)
        .batch(batch)
        .arg("q_rope", q_rope, &["T", "H", "R"], ACTIVATION)
        .arg("kv_a", kv_a, &["T", "C+R"], ACTIVATION)
        .arg("norm", norm, &["C"], FLOAT)
        .arg("rope.cos_sin", &rope.cos_sin, &["max_positions", "R"], &[DType::F32]);
}

/// See [`Backend::mla_attention`].
#[track_caller]
pub fn mla_attention<B: Backend>(
    q_latent: &Tensor<B>,
    q_rope: &Tensor<B>,
    cache: &LatentCache<B>,
    batch: &Batch<B>,
    seqs: &Range<usize>,
    out: &Tensor<B>,
) {
    Check::new("mla_attention")
        .cache(cache)
        .batch(batch)
        .seqs(seqs, batch)
        .arg("q_latent", q_latent, &["T", "H", "C"], ACTIVATION)
        .arg("q_rope", q_rope, &["T", "H", "R"], ACTIVATION)
        .arg("out", out, &["T", "H", "C"], ACTIVATION)
        .same_dtype(["q_latent", "out"], q_latent, out);
}

/// Rows of [`Backend::mla_attend`]; the operations that it is made of check the rest.
#[track_caller]
pub fn mla_attend<B: Backend>(
    batch: &Batch<B>,
    seqs: &Range<usize>,
    w_uv: &HeadWeight<B>,
    attended: &Activation<B>,
) {
    let is_first = *seqs == (0..batch.num_seqs) || *seqs == batch.decodes();
    assert!(
        is_first,
        "mla_attend: sequences {seqs:?}, expected all {} or the {} that decode",
        batch.num_seqs, batch.num_decodes
    );
    let rows = if seqs.end == batch.num_seqs { batch.num_tokens } else { batch.num_decodes };
    let heads = w_uv.weight.out_features() / w_uv.rows_per_head;
    Check::new("mla_attend").bind("L", rows).bind("H U", heads * w_uv.rows.len()).activation(
        "attended",
        attended,
        &["L", "H U"],
    );
}

/// See [`Backend::gather_latent`].
#[track_caller]
pub fn gather_latent<B: Backend>(
    cache: &LatentCache<B>,
    batch: &Batch<B>,
    seqs: &Range<usize>,
    out: &Tensor<B>,
) {
    Check::new("gather_latent").cache(cache).batch(batch).seqs(seqs, batch).arg(
        "out",
        out,
        &["N", "C+R"],
        ACTIVATION,
    );
}

/// See [`Backend::mla_attention_expanded`].
#[track_caller]
pub fn mla_attention_expanded<B: Backend>(
    q: &Tensor<B>,
    kv: &Tensor<B>,
    k_rope: &Tensor<B>,
    batch: &Batch<B>,
    seqs: &Range<usize>,
    out: &Tensor<B>,
) {
    let check = Check::new("mla_attention_expanded")
        .batch(batch)
        .seqs(seqs, batch)
        .arg("k_rope", k_rope, &["N", "R"], ACTIVATION)
        .arg("out", out, &["T", "H", "U"], ACTIVATION);
    let (rope_dim, v_dim) = (k_rope.dim(1), out.dim(2));
    let nope = q.shape().last().map_or(0, |&width| width.saturating_sub(rope_dim));
    check
        .bind("P+R", nope + rope_dim)
        .bind("P+U", nope + v_dim)
        .arg("q", q, &["T", "H", "P+R"], ACTIVATION)
        .arg("kv", kv, &["N", "H", "P+U"], ACTIVATION)
        .same_dtype(["q", "out"], q, out);
}

/// See [`Backend::route`].
#[track_caller]
pub fn route<B: Backend>(
    logits: &Tensor<B>,
    bias: Option<&Tensor<B>>,
    routing: &Routing,
    ids: &Tensor<B>,
    weights: &Tensor<B>,
) {
    let mut check =
        Check::new("route").bind("k", routing.top_k).arg("logits", logits, &["T", "E"], &[DType::F32]);
    if let Some(bias) = bias {
        check = check.arg("bias", bias, &["E"], &[DType::F32]);
    }
    check.arg("ids", ids, &["T", "k"], &[DType::U32]).arg("weights", weights, &["T", "k"], &[DType::F32]);
    let experts = logits.dim(1);
    assert!(routing.top_k <= experts, "route: {} of {experts} experts", routing.top_k);
    if let Some(groups) = routing.groups {
        let per_group = experts / groups.n_group;
        assert!(
            experts.is_multiple_of(groups.n_group)
                && groups.topk_group <= groups.n_group
                && routing.top_k <= groups.topk_group * per_group,
            "route: {} of {experts} experts from {} of {} groups",
            routing.top_k,
            groups.topk_group,
            groups.n_group
        );
    }
}

fn expert<B: Backend>(check: Check, weights: &crate::MlpWeights<B>) -> Check {
    check
        .any_weight("gate", &weights.gate, &["I", "D"])
        .any_weight("up", &weights.up, &["I", "D"])
        .any_weight("down", &weights.down, &["D", "I"])
}

/// That all experts of a layer have one shape.
///
/// # Panics
/// When they have not.
#[track_caller]
pub fn local_experts<B: Backend>(local: &[crate::MlpWeights<B>]) {
    local.iter().fold(Check::new("experts"), expert);
}

/// See [`Backend::experts`].
#[track_caller]
pub fn experts<B: Backend>(
    x: &Activation<B>,
    ids: &Tensor<B>,
    weights: &Tensor<B>,
    experts: &Experts<B>,
    out: &Tensor<B>,
) {
    let check = Check::new("experts")
        .activation("x", x, &["T", "D"])
        .arg("ids", ids, &["T", "k"], &[DType::U32])
        .arg("weights", weights, &["T", "k"], &[DType::F32])
        .arg("out", out, &["T", "D"], ACTIVATION);
    // The others were held against the first when they were put together: there may be hundreds, and a step has a layer's every
    // 50 microseconds.
    if let Some(first) = experts.local.first() {
        expert(check, first);
    }
    assert!(
        experts.first + experts.local.len() <= experts.total,
        "experts: {} from {} of {}",
        experts.local.len(),
        experts.first,
        experts.total
    );
}

/// See [`Backend::silu_mul`].
#[track_caller]
pub fn silu_mul<B: Backend>(gate_up: &Tensor<B>, out: &Activation<B>) {
    Check::new("silu_mul")
        .bind("2I", 2 * out.dense.dim(1))
        .arg("gate_up", gate_up, &["T", "2I"], ACTIVATION)
        .activation("out", out, &["T", "I"]);
}

/// See [`Backend::add`].
#[track_caller]
pub fn add<B: Backend>(residual: &Tensor<B>, x: &Tensor<B>) {
    Check::new("add").arg("residual", residual, &["T", "D"], ACTIVATION).arg("x", x, &["T", "D"], ACTIVATION);
}

/// See [`Backend::gather_rows`].
#[track_caller]
pub fn gather_rows<B: Backend>(x: &Tensor<B>, rows: &Tensor<B>, out: &Tensor<B>) {
    Check::new("gather_rows")
        .arg("x", x, &["T", "D"], ACTIVATION)
        .arg("rows", rows, &["L"], &[DType::U32])
        .arg("out", out, &["L", "D"], ACTIVATION)
        .same_dtype(["x", "out"], x, out);
}

/// See [`Backend::sample`].
#[track_caller]
pub fn sample<B: Backend>(logits: &Tensor<B>, sampling: &SamplingBatch, out: &Tensor<B>) {
    Check::new("sample")
        .bind("L", sampling.rows.len())
        .arg("logits", logits, &["L", "V"], &[DType::F32])
        .arg("out", out, &["L"], &[DType::U32]);
}

/// See [`Backend::logprobs`].
#[track_caller]
pub fn logprobs<B: Backend>(logits: &Tensor<B>, tokens: &Tensor<B>, out: &LogprobsOut<B>) {
    Check::new("logprobs")
        .arg("logits", logits, &["L", "V"], &[DType::F32])
        .arg("tokens", tokens, &["L"], &[DType::U32])
        .arg("out.chosen", &out.chosen, &["L"], &[DType::F32])
        .arg("out.top_ids", &out.top_ids, &["L", "N"], &[DType::U32])
        .arg("out.top", &out.top, &["L", "N"], &[DType::F32]);
    assert!(out.top.dim(1) <= logits.dim(1), "logprobs: {} most likely of {}", out.top.dim(1), logits.dim(1));
}
