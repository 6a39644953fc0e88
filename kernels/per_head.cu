// A matrix per head, a range of the rows of a larger weight, applied from either side.   x [T, H, a], out [T, H, b], strided; F32 sums
//
// RowsOut: out[t, h, r] = sum_k x[t, h, k] * W_h[r, k]     a linear per head: the kernels of gemm.cu with heads in z
// RowsIn:  out[t, h, k] = sum_r x[t, h, r] * W_h[r, k]     the kernels of this file, W8 (E4M3 weights widened) and BF16; gemm_simt for all else
//
// Bytes: the weight once per row tile. Floor of one rank's absorbed W_uk (16 heads of 128 x 512, FP8) at T = 1: 1.05 MB, 0.24 us at 4.3 TB/s; at T = 4096
// in BF16: 8.6 GFLOP, 11 us at 790 TFLOP/s. Oracle: crates/reference. Tests: conformance::per_head; crates/gpu/tests/rows_alone.rs.
#include "common/tile.cuh"

R1_KERNEL(per_head_w8_short, tile::Args, (tile::gemm<tile::Short<bf16, e4m3, true>, tile::ONE>), 2)
R1_KERNEL(per_head_w8_middle, tile::Args, (tile::gemm<tile::Middle<bf16, e4m3, true>, tile::ONE>), 4)
R1_KERNEL(per_head_w8_tall, tile::Args, (tile::gemm<tile::Tall<bf16, e4m3, true>, tile::ONE>), 8)
R1_KERNEL(per_head_bf16_short, tile::Args, (tile::gemm<tile::Short<bf16, bf16, true>, tile::ONE>), 2)
R1_KERNEL(per_head_bf16_middle, tile::Args, (tile::gemm<tile::Middle<bf16, bf16, true>, tile::ONE>), 4)
R1_KERNEL(per_head_bf16_tall, tile::Args, (tile::gemm<tile::Tall<bf16, bf16, true>, tile::ONE>), 8)
