// Linears: out[t, n] = sum_k x[t, k] * w[n, k].   x [T, K], w [N, K], out [T, N] F32 or BF16; F32 sums
//
// gemm_fp8_*    x E4M3 with a scale per token and 128 of k, w E4M3 with a scale per block: part * (x_scale * w_scale) per step of 128
// gemm_w8_*     x BF16, w E4M3: codes widened to BF16, exactly; part * w_scale per step of 64
// gemm_bf16_*   x BF16, w BF16
// gemm_int4_*   int4.cu
// gemm_simt     all else (x F32, or w F32 or F16), and both sides a weight may be applied from
//
// A launch may hold two weights of the same x. A row's bits do not depend on T: common/tile.cuh. gemm_fp8_tall spills on sm_80, where nothing launches
// it: there are no FP8 activations without FP8 units.
//
// Bytes: N * K of weights once per 16, 64 or 64 rows, T * K per 32 or 128 columns from L2; 2 T N K FLOPs. Floor of q_b (24576 x 1536, FP8) at T = 1: 37.7 MB,
// 8.8 us at 4.3 TB/s; of the dense MLP's gate (18432 x 7168) at T = 4096 in BF16: 1.08 TFLOP, 1.37 ms at 790 TFLOP/s.
// Oracle: crates/reference. Tests: conformance::{linear, linear_fp8_activations}; crates/gpu/tests/rows_alone.rs.
#include "common/tile.cuh"

namespace gemm {

constexpr int BM = 16, BN = 64, STEP = 32, WARPS = 4;

struct SimtShared {
    float x[BM][STEP];
    /// A column more: filled along k without bank conflicts.
    float w[STEP][BN + 1];
};

/// A weight's number, as F32 holds it best.
DEVICE float number(const tile::Weight& weight, u32 row, u32 column) {
    if (weight.dtype == tile::DTYPE_INT4) {
        const u8 pair = static_cast<const u8*>(weight.data)[row * weight.stride + column / 2];
        const u32 group = column / weight.block[1];
        const float zero = to_float(weight.zeros[row * weight.zero_stride + group]);
        return (float(pair >> (column % 2 * 4) & 15) - zero) * to_float(static_cast<const f16*>(weight.scales)[row * weight.scale_stride + group]);
    }
    const float value = load_as_float(weight.data, weight.dtype, row * weight.stride + column);
    if (weight.dtype != DTYPE_E4M3) return value;
    const u32 block_row = (row + weight.offset[0]) / weight.block[0], block_col = (column + weight.offset[1]) / weight.block[1];
    return value * static_cast<const float*>(weight.scales)[block_row * weight.scale_stride + block_col];
}

/// Element types at run time; weights are dequantised on the way to shared memory. Grid as `tile::gemm`.
DEVICE void simt(const tile::Args& a) {
    constexpr u32 THREADS = WARPS * WARP, ROWS_APART = THREADS / BN;
    constexpr int ROWS = BM / ROWS_APART;
    SimtShared& mem = shared<SimtShared>();
    const bool second = block_x() >= a.first_tiles;
    const tile::Weight& weight = a.weights[second ? 1 : 0];
    const u32 t0 = block_y() * BM, n0 = (block_x() - (second ? a.first_tiles : 0)) * BN, head = block_z();
    const u32 first_row = head * a.rows_per_head + a.first_row;
    const u32 thread = thread_id(), my_col = thread % BN, my_row = thread / BN;
    const i64 x0 = head * a.x_head_stride + t0 * a.x_stride;
    // Rows of mine that are there.
    const u32 left = a.num_tokens - t0;
    const u32 my_rows = left > my_row ? min_of(ROWS, (left - my_row - 1) / ROWS_APART + 1) : 0;
    float acc[ROWS];
    UNROLL for (int i = 0; i < ROWS; ++i) acc[i] = 0.0f;
    for (u32 k0 = 0; k0 < a.k; k0 += STEP) {
        const u32 len = min_of(STEP, a.k - k0);
        for (u32 e = thread; e < u32(BM * STEP); e += THREADS) {
            const u32 row = e / STEP, k = e % STEP;
            if (row < left && k < len) mem.x[row][k] = load_as_float(a.x, a.x_dtype, x0 + row * a.x_stride + k0 + k);
        }
        for (u32 e = thread; e < u32(BN * STEP); e += THREADS) {
            // Neighbouring threads read neighbours.
            const u32 col = a.transposed ? e % BN : e / STEP, k = a.transposed ? e / BN : e % STEP;
            if (n0 + col >= weight.n || k >= len) continue;
            const u32 row = first_row + (a.transposed ? k0 + k : n0 + col), column = a.transposed ? n0 + col : k0 + k;
            mem.w[k][col] = number(weight, row, column);
        }
        sync_block();
        for (u32 k = 0; k < len; ++k) {
            const float w = mem.w[k][my_col];
            UNROLL for (int i = 0; i < ROWS; ++i) {
                if (u32(i) < my_rows) acc[i] = fma_of(mem.x[my_row + i * ROWS_APART][k], w, acc[i]);
            }
        }
        sync_block();
    }
    UNROLL for (int i = 0; i < ROWS; ++i) {
        const i64 t = t0 + my_row + i * ROWS_APART;
        if (u32(i) < my_rows && n0 + my_col < weight.n) {
            store_float(weight.out, weight.out_dtype, t * weight.out_stride + head * a.out_head_stride + n0 + my_col, acc[i]);
        }
    }
}

}  // namespace gemm

R1_KERNEL(gemm_simt, tile::Args, gemm::simt, 4, 12)
R1_KERNEL(gemm_fp8_short, tile::Args, (tile::gemm<tile::Short<e4m3, e4m3, false>, tile::SPREAD>), 2)
R1_KERNEL(gemm_fp8_middle, tile::Args, (tile::gemm<tile::Middle<e4m3, e4m3, false>, tile::FOLDED>), 4)
R1_KERNEL(gemm_fp8_tall, tile::Args, (tile::gemm<tile::Tall<e4m3, e4m3, false>, tile::FOLDED>), 8)
R1_KERNEL(gemm_w8_short, tile::Args, (tile::gemm<tile::Short<bf16, e4m3, false>, tile::SPREAD>), 2)
R1_KERNEL(gemm_w8_middle, tile::Args, (tile::gemm<tile::Middle<bf16, e4m3, false>, tile::FOLDED>), 4)
R1_KERNEL(gemm_w8_tall, tile::Args, (tile::gemm<tile::Tall<bf16, e4m3, false>, tile::FOLDED>), 8)
R1_KERNEL(gemm_bf16_short, tile::Args, (tile::gemm<tile::Short<bf16, bf16, false>, tile::SPREAD>), 2)
R1_KERNEL(gemm_bf16_middle, tile::Args, (tile::gemm<tile::Middle<bf16, bf16, false>, tile::FOLDED>), 4)
R1_KERNEL(gemm_bf16_tall, tile::Args, (tile::gemm<tile::Tall<bf16, bf16, false>, tile::FOLDED>), 8)
