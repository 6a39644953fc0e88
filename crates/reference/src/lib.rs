//! The oracle: every backend operation in plain candle, readable, no tricks. Every fast backend is held against it.
//!
//! Computes in F32 whatever the tensors hold, rounds once when a result is written, and dequantises weights at each
//! use. Knows nothing of speed.
#![forbid(unsafe_code)]

mod attention;
mod gqa;
mod moe;
mod order;
mod sample;
mod storage;
mod weights;

use std::convert::Infallible;
use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{self as candle, D, DType, Device, Tensor};
use r1_backend::{
    Activation, AttentionKind, Backend, BackendError, Batch, Capabilities, Experts, HeadForm, HeadWeight,
    HostSlice, HostSliceMut, HostTensor, KvCache, LatentCache, LogprobsOut, RopeTable, Routing,
    SamplingBatch, Ticket, Weight, WeightFormat, shape,
};

use crate::storage::{View, read, read_stored, read_u32, write};
use crate::weights::{dequantized, operand, quantize};

/// The oracle backend, on the CPU.
#[derive(Default)]
pub struct Reference {
    /// The first failure since the last flush.
    failure: Mutex<Option<BackendError>>,
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reference")
    }
}

impl Reference {
    /// A new backend; several are independent.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs an operation; its failure is kept for [`Backend::flush`].
    fn enqueue(&self, op: &'static str, result: candle::Result<()>) {
        if let Err(error) = result {
            self.failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert_with(|| failed(op, &error));
        }
    }
}

fn failed(op: &'static str, error: &candle::Error) -> BackendError {
    BackendError::Failed { device: "reference".to_owned(), op, why: error.to_string() }
}

/// `x * rsqrt(mean(x²) + eps) * weight`, `[T, D]` F32.
fn normed(x: &Tensor, weight: &Tensor, eps: f32) -> candle::Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)
}

/// Writes both forms of an activation; the FP8 form holds what the dense form holds after its rounding.
fn write_activation(out: &Activation<Reference>, values: &Tensor) -> candle::Result<()> {
    write(&out.dense, values)?;
    quantize_activation(out)
}

fn quantize_activation(x: &Activation<Reference>) -> candle::Result<()> {
    match &x.fp8 {
        Some(fp8) => quantize(&read(&x.dense)?, fp8),
        None => Ok(()),
    }
}

fn feed_tokens(drawn: &View, from: &View, ids: &View) -> candle::Result<()> {
    let drawn = read_u32(drawn)?;
    let mut fed = read_u32(ids)?;
    for (id, row) in fed.iter_mut().zip(read_u32(from)?) {
        if row != u32::MAX {
            let Some(&token) = drawn.get(row as usize) else {
                candle::bail!("row {row} of {} drawn tokens", drawn.len());
            };
            *id = token;
        }
    }
    write(ids, &Tensor::from_vec(fed, ids.shape(), &Device::Cpu)?)
}

fn embed(ids: &View, table: &View, first_row: usize, out: &View) -> candle::Result<()> {
    // candle gives zeros for this index.
    const NO_ROW: u32 = u32::MAX;
    let row = |id: u32| match (id as usize).checked_sub(first_row) {
        Some(row) if row < table.dim(0) => row as u32,
        _ => NO_ROW,
    };
    let rows = Tensor::from_iter(read_u32(ids)?.into_iter().map(row), &Device::Cpu)?;
    write(out, &read_stored(table)?.index_select(&rows, 0)?.to_dtype(DType::F32)?)
}

fn linear(x: &Activation<Reference>, w: &Weight<Reference>, out: &View) -> candle::Result<()> {
    write(out, &operand(x, w)?.matmul(&dequantized(w)?.t()?)?)
}

fn per_head(x: &View, w: &HeadWeight<Reference>, out: &View) -> candle::Result<()> {
    let heads = x.dim(1);
    let weight = dequantized(&w.weight)?.reshape((heads, w.rows_per_head, w.weight.in_features()))?;
    let rows = weight.narrow(1, w.rows.start, w.rows.len())?;
    let right = match w.form {
        HeadForm::RowsIn => rows,
        HeadForm::RowsOut => rows.transpose(1, 2)?,
    };
    let left = read(x)?.transpose(0, 1)?.contiguous()?;
    write(out, &left.matmul(&right.contiguous()?)?.transpose(0, 1)?)
}

fn silu_mul(gate_up: &View, out: &Activation<Reference>) -> candle::Result<()> {
    write_activation(out, &candle_nn::ops::swiglu(&read(gate_up)?)?)
}

fn gather_rows(x: &View, rows: &View, out: &View) -> candle::Result<()> {
    write(out, &read_stored(x)?.index_select(&read_stored(rows)?, 0)?)
}

const ALL_FORMATS: [WeightFormat; 4] =
    [WeightFormat::Dense, WeightFormat::Fp8Block, WeightFormat::Int8Group, WeightFormat::Int4Group];

impl Backend for Reference {
    /// Flat, of the stored dtype.
    type Buffer = Tensor;
    type Graph = Infallible;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn describe(&self) -> String {
        "reference: plain candle on the CPU, for comparison, not for speed".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            activation_dtypes: vec![r1_core::DType::F32, r1_core::DType::BF16],
            weight_formats: ALL_FORMATS.to_vec(),
            expert_formats: ALL_FORMATS.to_vec(),
            attention: vec![AttentionKind::Mla, AttentionKind::Gqa],
            cache_dtypes: vec![r1_core::DType::F32, r1_core::DType::BF16, r1_core::DType::F8E4M3],
            fp8_activations: true,
            int8_activations: false,
            asynchronous: false,
            // candle's matrix products choose their order of summation by shape.
            batch_invariant: false,
            captures: false,
        }
    }

    fn alloc(&self, shape: &[usize], dtype: r1_core::DType) -> Result<View, BackendError> {
        storage::check_room(shape, dtype)?;
        storage::zeros(shape, dtype).map_err(|error| failed("alloc", &error))
    }

    fn import(&self, host: &HostTensor) -> Result<View, BackendError> {
        storage::check_room(host.shape(), host.dtype())?;
        storage::import(host).map_err(|error| failed("import", &error))
    }

    fn upload(&self, src: HostSlice<'_>, dst: &View) {
        let is_u32 = dst.dtype() == r1_core::DType::U32;
        let (len, fits) = match src {
            HostSlice::F32(values) => (values.len(), !is_u32),
            HostSlice::U32(values) => (values.len(), is_u32),
        };
        assert!(
            fits && len == dst.num_elements(),
            "upload: {len} values of another type or number for {dst:?}"
        );
        let values = match src {
            HostSlice::F32(values) => Tensor::from_slice(values, dst.shape(), &Device::Cpu),
            HostSlice::U32(values) => Tensor::from_slice(values, dst.shape(), &Device::Cpu),
        };
        self.enqueue("upload", values.and_then(|values| write(dst, &values)));
    }

    fn download(&self, src: &View, dst: HostSliceMut<'_>) -> Result<(), BackendError> {
        match dst {
            HostSliceMut::F32(dst) => {
                assert!(src.dtype() != r1_core::DType::U32, "download: {src:?} to F32 values");
                let values = read(src).and_then(|values| values.flatten_all()?.to_vec1());
                dst.copy_from_slice(&values.map_err(|error| failed("download", &error))?);
            }
            HostSliceMut::U32(dst) => {
                assert!(src.dtype() == r1_core::DType::U32, "download: {src:?} to U32 values");
                dst.copy_from_slice(&read_u32(src).map_err(|error| failed("download", &error))?);
            }
        }
        Ok(())
    }

    fn flush(&self) -> Ticket {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ticket::ready(failure.map_or(Ok(()), Err))
    }

    fn feed_tokens(&self, drawn: &View, from: &View, ids: &View) {
        shape::feed_tokens(drawn, from, ids);
        self.enqueue("feed_tokens", feed_tokens(drawn, from, ids));
    }

    fn embed(&self, ids: &View, table: &View, first_row: usize, out: &View) {
        shape::embed(ids, table, out);
        self.enqueue("embed", embed(ids, table, first_row, out));
    }

    fn rms_norm(&self, x: &View, weight: &View, eps: f32, out: &Activation<Self>) {
        shape::rms_norm(x, weight, out);
        let run = || write_activation(out, &normed(&read(x)?, &read(weight)?, eps)?);
        self.enqueue("rms_norm", run());
    }

    fn quantize(&self, x: &Activation<Self>) {
        shape::quantize(x);
        self.enqueue("quantize", quantize_activation(x));
    }

    fn linear(&self, x: &Activation<Self>, w: &Weight<Self>, out: &View) {
        shape::linear(x, w, out);
        self.enqueue("linear", linear(x, w, out));
    }

    fn per_head(&self, x: &View, w: &HeadWeight<Self>, out: &View) {
        shape::per_head(x, w, out);
        self.enqueue("per_head", per_head(x, w, out));
    }

    fn rope_cache(
        &self,
        q_rope: &View,
        kv_a: &View,
        norm: &View,
        eps: f32,
        rope: &RopeTable<Self>,
        batch: &Batch<Self>,
        cache: &LatentCache<Self>,
    ) {
        shape::rope_cache(q_rope, kv_a, norm, rope, batch, cache);
        self.enqueue("rope_cache", attention::rope_cache(q_rope, kv_a, norm, eps, rope, batch, cache));
    }

    fn mla_attention(
        &self,
        q_latent: &View,
        q_rope: &View,
        cache: &LatentCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        out: &View,
    ) {
        shape::mla_attention(q_latent, q_rope, cache, batch, &seqs, out);
        let result = attention::absorbed(q_latent, q_rope, cache, batch, seqs, scale, out);
        self.enqueue("mla_attention", result);
    }

    fn gather_latent(&self, cache: &LatentCache<Self>, batch: &Batch<Self>, seqs: Range<usize>, out: &View) {
        shape::gather_latent(cache, batch, &seqs, out);
        self.enqueue("gather_latent", attention::gather_latent(cache, batch, seqs, out));
    }

    fn mla_attention_expanded(
        &self,
        q: &View,
        kv: &View,
        k_rope: &View,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        out: &View,
    ) {
        shape::mla_attention_expanded(q, kv, k_rope, batch, &seqs, out);
        let result = attention::expanded(q, kv, k_rope, batch, seqs, scale, out);
        self.enqueue("mla_attention_expanded", result);
    }

    fn rope_cache_gqa(
        &self,
        q: &View,
        k: &View,
        v: &View,
        rope: &RopeTable<Self>,
        batch: &Batch<Self>,
        cache: &KvCache<Self>,
    ) {
        shape::rope_cache_gqa(q, k, v, rope, batch, cache);
        self.enqueue("rope_cache_gqa", gqa::rope_cache(q, k, v, rope, batch, cache));
    }

    fn gqa_attention(
        &self,
        q: &View,
        cache: &KvCache<Self>,
        batch: &Batch<Self>,
        seqs: Range<usize>,
        scale: f32,
        out: &View,
    ) {
        shape::gqa_attention(q, cache, batch, &seqs, out);
        self.enqueue("gqa_attention", gqa::attention(q, cache, batch, seqs, scale, out));
    }

    fn route(&self, logits: &View, bias: Option<&View>, routing: &Routing, ids: &View, weights: &View) {
        shape::route(logits, bias, routing, ids, weights);
        self.enqueue("route", moe::route(logits, bias, routing, ids, weights));
    }

    fn experts(&self, x: &Activation<Self>, ids: &View, weights: &View, experts: &Experts<Self>, out: &View) {
        shape::experts(x, ids, weights, experts, out);
        self.enqueue("experts", moe::experts(x, ids, weights, experts, out));
    }

    fn silu_mul(&self, gate_up: &View, out: &Activation<Self>) {
        shape::silu_mul(gate_up, out);
        self.enqueue("silu_mul", silu_mul(gate_up, out));
    }

    fn add(&self, residual: &View, x: &View) {
        shape::add(residual, x);
        let run = || write(residual, &(read(residual)? + read(x)?)?);
        self.enqueue("add", run());
    }

    fn gather_rows(&self, x: &View, rows: &View, out: &View) {
        shape::gather_rows(x, rows, out);
        self.enqueue("gather_rows", gather_rows(x, rows, out));
    }

    fn sample(&self, logits: &View, sampling: &SamplingBatch, out: &View) {
        shape::sample(logits, sampling, out);
        self.enqueue("sample", sample::sample(logits, sampling, out));
    }

    fn logprobs(&self, logits: &View, tokens: &View, out: &LogprobsOut<Self>) {
        shape::logprobs(logits, tokens, out);
        self.enqueue("logprobs", sample::logprobs(logits, tokens, out));
    }

    fn replay(&self, graph: &Infallible) {
        match *graph {}
    }
}
