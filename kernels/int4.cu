// Linears of 4-bit weights: out[t, n] = sum_k x[t, k] * (code[n, k] - zero[n, g]) * scale[n, g],   g = k / group
//
// x [T, K] BF16 (F32 meets gemm_simt), codes [N, K / 2] pairs, zero and scale [N, ceil(K / group)] F16, out [T, N] F32 or BF16. A step of 128 of k, or less
// where a group ends: the differences are whole numbers, which BF16 holds; part * scale. A row's bits do not depend on T: common/tile.cuh.
//
// Bytes: 0.53 N K of codes, zeros and scales at a group of 128, once per 16 or 64 rows. Floor of a 70B model's gate (28672 x 8192) at T = 1: 125 MB, 29 us
// at 4.3 TB/s. Oracle: crates/reference. Test: conformance::linear_int4, rows alone among it.
#include "common/tile.cuh"

R1_KERNEL(gemm_int4_short, tile::Args, (tile::gemm<tile::ShortInt4, tile::SPREAD>), 2)
R1_KERNEL(gemm_int4_middle, tile::Args, (tile::gemm<tile::MiddleInt4, tile::FOLDED>), 4)
