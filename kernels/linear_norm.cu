// A linear and the norm of what it gives, for few tokens, in one launch:
//
//   y[t, n] = sum_k x[t, k] * w[n, k], rounded;   residual[t, n] += y[t, n], rounded, where there is one;   out[t] = rms_norm(residual[t] or y[t])
//
// and out's FP8 form. x [T, K], w [N, K], y, residual, out [T, N]; a second weight of the same x may come along, without a norm. Tiles as in gemm.cu; the
// last blocks of a tile of rows, as many as the host says, wait for each other and norm its rows in turn. Bits as from the kernels of gemm.cu and norm.cu.
//
// Bytes: those of the linear, 8 T N more of BF16. Floor of o_proj (7168 x 16384, FP8) at T = 1: 117 MB, 27 us at 4.3 TB/s.
// linear_norm_fp8_middle spills on sm_80, where nothing launches it: there are no FP8 activations without FP8 units.
// Oracle: crates/reference. Tests: conformance::{linear_add_norm, mla_qkv}; crates/gpu/tests/fused.rs.
#include "common/norm.cuh"
#include "common/simt.cuh"

namespace linear_norm {

/// What a row's norm has at most.
constexpr int WARPS = 8;

struct Args {
    tile::Args gemm;
    /// Of the first weight's output.
    norms::Args norm;
    /// One per tile of rows.
    u32* counters;
    /// Threads of a row's norm, and blocks of a tile of rows that stay for it.
    u32 norm_threads, finishers;
};

template <class Product>
struct Shared {
    Product product;
    BlockScratch sum;
    u32 flag[4];
};

/// After a tile of `rows` rows is written.
DEVICE void finish(const Args& a, u32 rows, BlockScratch& sum, u32& flag) {
    if (block_x() >= a.gemm.first_tiles) return;
    const u32 number = finisher(a.counters + block_y(), min_of(a.gemm.first_tiles, grid_x()), a.finishers, flag);
    if (number == NOT_ME) return;
    const u32 end = min_of(a.gemm.num_tokens, (block_y() + 1) * rows);
    for (u32 t = block_y() * rows + number; t < end; t += a.finishers) norms::norm_row(a.norm, t, a.norm_threads, sum);
}

template <class S, tile::Ranges RANGES>
DEVICE void of_tiles(const Args& a) {
    Shared<tile::Shared<S>>& mem = shared<Shared<tile::Shared<S>>>();
    if (tile::linear<S, RANGES>(a.gemm, mem.product)) finish(a, S::BM, mem.sum, mem.flag[0]);
}

DEVICE void of_numbers(const Args& a) {
    Shared<simt::Shared>& mem = shared<Shared<simt::Shared>>();
    simt::linear<WARPS>(a.gemm, mem.product);
    finish(a, simt::BM, mem.sum, mem.flag[0]);
}

// The tiles of gemm.cu in blocks of WARPS warps.
template <class X, class W>
using Short = tile::Shape<X, W, false, 1, 2, 16, 16, 4, false, WARPS - 2>;
template <class X, class W>
using Middle = tile::Shape<X, W, false, 4, 2, 16, 16, 3>;

}  // namespace linear_norm

R1_KERNEL(linear_norm_simt, linear_norm::Args, linear_norm::of_numbers, 8)
R1_KERNEL(linear_norm_fp8_short, linear_norm::Args, (linear_norm::of_tiles<linear_norm::Short<e4m3, e4m3>, tile::SPREAD>), 8)
R1_KERNEL(linear_norm_fp8_middle, linear_norm::Args, (linear_norm::of_tiles<linear_norm::Middle<e4m3, e4m3>, tile::FOLDED>), 8)
R1_KERNEL(linear_norm_w8_short, linear_norm::Args, (linear_norm::of_tiles<linear_norm::Short<bf16, e4m3>, tile::SPREAD>), 8)
R1_KERNEL(linear_norm_w8_middle, linear_norm::Args, (linear_norm::of_tiles<linear_norm::Middle<bf16, e4m3>, tile::FOLDED>), 8)
R1_KERNEL(linear_norm_bf16_short, linear_norm::Args, (linear_norm::of_tiles<linear_norm::Short<bf16, bf16>, tile::SPREAD>), 8)
R1_KERNEL(linear_norm_bf16_middle, linear_norm::Args, (linear_norm::of_tiles<linear_norm::Middle<bf16, bf16>, tile::FOLDED>), 8)
