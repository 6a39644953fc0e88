// The product for element types that have no matrix instruction: F32 sums over k in order, one number after the other. Takes a weight from both sides.
#pragma once
#include "tile.cuh"

namespace simt {

constexpr int BM = 16, BN = 64, STEP = 32;

struct Shared {
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

/// One tile, by WARPS warps. Element types at run time; weights are dequantised on the way to shared memory.
template <int WARPS>
DEVICE void product(const tile::Args& a, const tile::Weight& weight, const tile::Place& at, Shared& mem) {
    constexpr u32 THREADS = WARPS * WARP, ROWS_APART = THREADS / BN;
    static_assert(THREADS % BN == 0 && BM % ROWS_APART == 0, "a thread has a column and every ROWS_APART-th row");
    constexpr int ROWS = BM / ROWS_APART;
    const u32 t0 = at.t0, n0 = at.n0, head = at.head;
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

/// Grid as that of `tile::linear`, without ranges.
template <int WARPS>
DEVICE void linear(const tile::Args& a, Shared& mem) {
    const bool second = block_x() >= a.first_tiles;
    const tile::Place at = {block_y() * BM, (block_x() - (second ? a.first_tiles : 0)) * BN, block_z()};
    product<WARPS>(a, a.weights[second ? 1 : 0], at, mem);
}

}  // namespace simt
