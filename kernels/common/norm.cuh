// The norm of a row, alone or of what was added before, with its FP8 form: shared by norm.cu and by kernels that go on to it.
#pragma once
#include "eight.cuh"

namespace norms {

/// Eights of a row that a thread keeps in registers between the sum and the result.
constexpr u32 HELD = 4;

struct Args {
    const void* x;
    /// What x is added to, or null.
    void* residual;
    const void* weight;
    void* out;
    Fp8Out fp8;
    i64 x_stride, residual_stride, out_stride;
    u32 dim, x_dtype, residual_dtype, weight_dtype, out_dtype;
    u32 x_vectors, residual_vectors, weight_vectors, out_vectors;
    float eps;
};

/// Row `t`, by the block's first `threads` threads, whole warps with HELD eights per thread at most; every thread of the block calls it. The bits
/// depend on `threads`, which the host derives from `dim`. `scratch` as `block_sum` has it.
DEVICE void norm_row(const Args& a, i64 t, u32 threads, BlockScratch& scratch) {
    const bool takes_part = thread_id() < threads;
    float held[HELD][EIGHT];
    float squares = 0.0f;
    UNROLL for (u32 i = 0; i < HELD; ++i) {
        u32 column = EIGHT * (thread_id() + i * threads);
        u32 count = takes_part && column < a.dim ? min_of(EIGHT, a.dim - column) : 0;
        load8(a.x, a.x_dtype, t * a.x_stride + column, count, a.x_vectors != 0, held[i]);
        if (a.residual && count > 0) {
            float before[EIGHT];
            i64 at = t * a.residual_stride + column;
            load8(a.residual, a.residual_dtype, at, count, a.residual_vectors != 0, before);
            UNROLL for (u32 j = 0; j < EIGHT; ++j) held[i][j] = rounded_to(a.residual_dtype, before[j] + held[i][j]);
            store8(a.residual, a.residual_dtype, at, count, a.residual_vectors != 0, held[i]);
        }
        UNROLL for (u32 j = 0; j < EIGHT; ++j) squares = fma_of(held[i][j], held[i][j], squares);
    }
    float inverse = rsqrt_of(block_sum(squares, scratch) / float(a.dim) + a.eps);
    UNROLL for (u32 i = 0; i < HELD; ++i) {
        u32 column = EIGHT * (thread_id() + i * threads);
        u32 count = takes_part && column < a.dim ? min_of(EIGHT, a.dim - column) : 0;
        float weight[EIGHT], normed[EIGHT];
        load8(a.weight, a.weight_dtype, column, count, a.weight_vectors != 0, weight);
        UNROLL for (u32 j = 0; j < EIGHT; ++j) normed[j] = rounded_to(a.out_dtype, held[i][j] * inverse * weight[j]);
        store8(a.out, a.out_dtype, t * a.out_stride + column, count, a.out_vectors != 0, normed);
        // The same for all threads of a warp.
        if (a.fp8.codes && takes_part && EIGHT * i * threads < a.dim) store_quantized(a.fp8, t, column, count, normed);
    }
}

}  // namespace norms
