// FP8 block weights as BF16, once, at load.
//
// out[n, k] = data[n, k] * scales[(n + offset_n) / block_n, (k + offset_k) / block_k], rounded once
// data [N, K] e4m3, scales f32 [num_rows, scale_cols], out [N, K] bf16, all dense.
//
// Traffic 3 N K bytes: at 4.3 TB/s (H200, measured copy) 671 GB of weights take 0.5 s; the disk decides.
// Oracle: weights::HostLinear::to_f32. Test: crates/gpu/tests/memory.rs.
#include "common/gpu.cuh"

namespace widen {

struct Args {
    const e4m3* data;
    const float* scales;
    bf16* out;
    u32 num_rows, num_cols, scale_cols, block_n, block_k, offset_n, offset_k;
};
/// One row of blocks per row of the matrix, 1,024 columns each.
DEVICE void body(const Args& a) {
    u32 n = block_x();
    const float* scales = a.scales + i64((n + a.offset_n) / a.block_n) * a.scale_cols;
    i64 row = i64(n) * a.num_cols;
    u32 end = min_of(a.num_cols, (block_y() + 1) * 1024);
    for (u32 k = block_y() * 1024 + thread_id(); k < end; k += num_threads()) {
        a.out[row + k] = from_float<bf16>(to_float(a.data[row + k]) * scales[(k + a.offset_k) / a.block_k]);
    }
}

}  // namespace widen

R1_KERNEL(widen_fp8, widen::Args, widen::body, 4)
