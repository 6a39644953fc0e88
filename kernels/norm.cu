// Norms, SiLU and the FP8 form of activations.
//
// rms_norm:     out[t, d] = x[t, d] * rsqrt(mean_d(x²) + eps) * weight[d]
// add_rms_norm: residual[t, d] += x[t, d], rounded as the residual is; then the norm of that
// silu_mul:     out[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i]
// quantize:     the FP8 form of x: per token and 128 columns scale = max(amax, 1e-4) / 448, codes[t, d] = e4m3(x[t, d] / scale)
//
// x, residual, gate_up, out F32 or BF16 [T, D], weight F32, BF16 or F16 [D]; whoever writes `out` writes its FP8 form, of the values after
// their rounding, in the same launch. A row's sum is taken in an order that depends on D alone.
//
// Traffic: each element once in and once out; rms_norm of BF16 4 T D bytes: T = 4096, D = 7168 cannot beat 27 us at 4.3 TB/s (H200, measured
// copy), add_rms_norm 54 us; the FP8 form adds 1.03 T D bytes.
// Oracle: crates/reference. Test: conformance::{rms_norm, rms_norm_range, add_rms_norm, silu_mul, quantize}, crates/gpu/tests/norm_bits.rs.
#include "common/norm.cuh"

namespace norms {

/// One block per row.
DEVICE void norm(const Args& a) { norm_row(a, block_x(), num_threads(), shared<BlockScratch>()); }

struct SiluMulArgs {
    const void* gate_up;
    void* out;
    Fp8Out fp8;
    i64 gate_up_stride, out_stride;
    u32 width, gate_up_dtype, out_dtype;
    u32 gate_up_vectors, out_vectors;
};

/// Blocks in x per row, in y per part of a row; eight columns per thread.
DEVICE void silu_mul(const SiluMulArgs& a) {
    i64 t = block_x();
    u32 column = EIGHT * (block_y() * num_threads() + thread_id());
    u32 count = column < a.width ? min_of(EIGHT, a.width - column) : 0;
    float gate[EIGHT], up[EIGHT];
    i64 at = t * a.gate_up_stride + column;
    load8(a.gate_up, a.gate_up_dtype, at, count, a.gate_up_vectors != 0, gate);
    load8(a.gate_up, a.gate_up_dtype, at + a.width, count, a.gate_up_vectors != 0, up);
    UNROLL for (u32 j = 0; j < EIGHT; ++j) gate[j] = rounded_to(a.out_dtype, gate[j] / (1.0f + exp_of(-gate[j])) * up[j]);
    store8(a.out, a.out_dtype, t * a.out_stride + column, count, a.out_vectors != 0, gate);
    if (a.fp8.codes) store_quantized(a.fp8, t, column, count, gate);
}

struct QuantizeArgs {
    const void* x;
    Fp8Out fp8;
    i64 x_stride;
    u32 dim, x_dtype, x_vectors;
};

/// As silu_mul.
DEVICE void quantize(const QuantizeArgs& a) {
    i64 t = block_x();
    u32 column = EIGHT * (block_y() * num_threads() + thread_id());
    u32 count = column < a.dim ? min_of(EIGHT, a.dim - column) : 0;
    float x[EIGHT];
    load8(a.x, a.x_dtype, t * a.x_stride + column, count, a.x_vectors != 0, x);
    store_quantized(a.fp8, t, column, count, x);
}

}  // namespace norms

R1_KERNEL(rms_norm, norms::Args, norms::norm, 1024 / WARP)
R1_KERNEL(add_rms_norm, norms::Args, norms::norm, 1024 / WARP)
R1_KERNEL(silu_mul, norms::SiluMulArgs, norms::silu_mul, 4)
R1_KERNEL(quantize, norms::QuantizeArgs, norms::quantize, 4)
