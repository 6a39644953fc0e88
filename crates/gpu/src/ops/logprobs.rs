//! Log-probabilities. Kernels: `kernels/logprobs.cu`.

use r1_backend::{LogprobsOut, Tensor, shape};

use super::sample::{BEST_SCRATCH_BYTES, HISTOGRAM_BYTES, check_vocab, row_vectors, row_warps};
use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, ptr, stride};

/// `sizeof(logprobs::Shared)`: sums, the list, its length.
const SHARED_BYTES: usize = BEST_SCRATCH_BYTES + 32 * 8 + HISTOGRAM_BYTES + 256 * 8 + 8;

#[derive(Clone, Copy)]
#[repr(C)]
struct LogprobsArgs {
    logits: DevicePtr,
    tokens: DevicePtr,
    chosen: DevicePtr,
    top_ids: DevicePtr,
    top: DevicePtr,
    logits_stride: i64,
    top_ids_stride: i64,
    top_stride: i64,
    vocab: u32,
    num_top: u32,
    vectors: u32,
    unused: u32,
}

// SAFETY: the twin of logprobs::Args.
unsafe impl Args for LogprobsArgs {}

pub(crate) fn logprobs(gpu: &Gpu, logits: &Tensor<Gpu>, tokens: &Tensor<Gpu>, out: &LogprobsOut<Gpu>) {
    const OP: &str = "logprobs";
    shape::logprobs(logits, tokens, out);
    let (rows, vocab) = (logits.dim(0), logits.dim(1));
    if rows == 0 {
        return;
    }
    check_vocab(OP, vocab);
    let args = LogprobsArgs {
        logits: ptr(logits),
        tokens: ptr(tokens),
        chosen: ptr(&out.chosen),
        top_ids: ptr(&out.top_ids),
        top: ptr(&out.top),
        logits_stride: stride(logits, 0),
        top_ids_stride: stride(&out.top_ids, 0),
        top_stride: stride(&out.top, 0),
        vocab: vocab as u32,
        num_top: out.top.dim(1) as u32,
        vectors: row_vectors(logits),
        unused: 0,
    };
    let geometry = Geometry { grid: [rows, 1, 1], warps: row_warps(gpu, vocab), shared_bytes: SHARED_BYTES };
    gpu.launch("logprobs_rows", geometry, &args);
}
