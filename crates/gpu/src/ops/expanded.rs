//! Un-absorbed MLA. Kernels: `kernels/mla_prefill.cu`.

use std::ops::Range;

use r1_backend::{Batch, Tensor, shape};
use r1_core::DType;

use super::attention::{MAX_GRID, Sequences};
use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, dtype_code, is_vectorizable, ptr, stride};

#[derive(Clone, Copy)]
#[repr(C)]
struct ExpandedArgs {
    q: DevicePtr,
    kv: DevicePtr,
    k_rope: DevicePtr,
    out: DevicePtr,
    context_start: DevicePtr,
    seqs: Sequences,
    q_row: i64,
    q_head: i64,
    kv_row: i64,
    kv_head: i64,
    k_rope_row: i64,
    out_row: i64,
    out_head: i64,
    nope_dim: u32,
    rope_dim: u32,
    value_dim: u32,
    dtype: u32,
    kv_dtype: u32,
    k_rope_dtype: u32,
    q_vectors: u32,
    kv_vectors: u32,
    scale: f32,
}

// SAFETY: the twin of mla_prefill::ExpandedArgs.
unsafe impl Args for ExpandedArgs {}

/// An instantiation of the kernel: its name, what it multiplies, the widths that it pads keys and values to, its warps of 16
/// rows, tokens per tile.
struct Form {
    kernel: &'static str,
    dtype: DType,
    key: usize,
    value: usize,
    warps: usize,
    tile: usize,
}

const FORMS: [Form; 4] = [
    Form { kernel: "mla_expanded_bf16_128", dtype: DType::BF16, key: 128, value: 64, warps: 4, tile: 32 },
    Form { kernel: "mla_expanded_bf16_192", dtype: DType::BF16, key: 192, value: 128, warps: 4, tile: 32 },
    Form { kernel: "mla_expanded_f32_128", dtype: DType::F32, key: 128, value: 64, warps: 2, tile: 16 },
    Form { kernel: "mla_expanded_f32_192", dtype: DType::F32, key: 192, value: 128, warps: 2, tile: 16 },
];

impl Form {
    /// The narrowest that holds keys and values. F32 where anything is.
    ///
    /// # Panics
    /// When none is wide enough.
    fn of(inputs: [&Tensor<Gpu>; 3], key: usize, value: usize) -> &'static Self {
        let all_bf16 = inputs.iter().all(|input| input.dtype() == DType::BF16);
        let dtype = if all_bf16 { DType::BF16 } else { DType::F32 };
        let fits = |form: &&Self| form.dtype == dtype && key <= form.key && value <= form.value;
        FORMS.iter().find(fits).unwrap_or_else(|| {
            panic!(
                "mla_attention_expanded: heads of {key} and {value} are wider than the kernels' 192 and 128"
            )
        })
    }

    /// `sizeof` of mla_prefill::ExpandedShared.
    fn shared_bytes(&self) -> usize {
        let size = self.dtype.size_bytes();
        let (pad, rows) = (16 / size, self.warps * 16);
        let elements =
            (rows + self.tile) * (self.key + pad) + self.tile * (self.value + pad) + rows * (self.tile + pad);
        elements * size + rows * (self.tile + 4 + 2) * size_of::<f32>()
    }
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_attention_expanded(
    gpu: &Gpu,
    q: &Tensor<Gpu>,
    kv: &Tensor<Gpu>,
    k_rope: &Tensor<Gpu>,
    batch: &Batch<Gpu>,
    seqs: &Range<usize>,
    scale: f32,
    out: &Tensor<Gpu>,
) {
    shape::mla_attention_expanded(q, kv, k_rope, batch, seqs, out);
    let (key, rope, value) = (q.dim(2), k_rope.dim(1), out.dim(2));
    let form = Form::of([q, kv, k_rope], key, value);
    let whole = |width: usize| (width * form.dtype.size_bytes()).is_multiple_of(16);
    let vectors = |tensor: &Tensor<Gpu>| tensor.dtype() == form.dtype && is_vectorizable(tensor);
    let kv_vectors = vectors(kv) && vectors(k_rope) && whole(key - rope);
    let sequences = Sequences::new(batch, seqs, form.warps * 16);
    let args = ExpandedArgs {
        q: ptr(q),
        kv: ptr(kv),
        k_rope: ptr(k_rope),
        out: ptr(out),
        context_start: ptr(&batch.context_start),
        seqs: sequences,
        q_row: stride(q, 0),
        q_head: stride(q, 1),
        kv_row: stride(kv, 0),
        kv_head: stride(kv, 1),
        k_rope_row: stride(k_rope, 0),
        out_row: stride(out, 0),
        out_head: stride(out, 1),
        nope_dim: (key - rope) as u32,
        rope_dim: rope as u32,
        value_dim: value as u32,
        dtype: dtype_code(q.dtype()),
        kv_dtype: dtype_code(kv.dtype()),
        k_rope_dtype: dtype_code(k_rope.dtype()),
        q_vectors: u32::from(vectors(q)),
        kv_vectors: u32::from(kv_vectors),
        scale,
    };
    let heads = q.dim(1);
    assert!(heads <= MAX_GRID, "mla_attention_expanded: {heads} heads");
    let geometry = Geometry {
        grid: [sequences.max_packs(batch), heads, 1],
        warps: form.warps as u32,
        shared_bytes: form.shared_bytes(),
    };
    gpu.launch(form.kernel, geometry, &args);
}
