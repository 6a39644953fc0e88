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
#include "common/simt.cuh"

namespace gemm {

DEVICE void simt(const tile::Args& a) { simt::linear<4>(a, shared<simt::Shared>()); }

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
