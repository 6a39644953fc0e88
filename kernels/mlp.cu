// The first half of a gated MLP for few tokens, in one launch:
//
//   hidden[t, i] = silu(gate[t, i]) * up[t, i],   gate[t, i] = sum_k x[t, k] * w_gate[i, k],   up likewise, both rounded as gate_up is
//
// and hidden's FP8 form. x [T <= 16, K], w_gate and w_up [I, K] of one format, hidden [T, I]. A block has 16 columns of both; the last of the
// blocks that share 128 columns of hidden quantises them. Bits as from the kernels of gemm.cu and norm.cu: a row may meet either.
//
// Bytes: 2 I K of weights once. Floor of a dense layer's gate and up (2 x 18432 x 7168, FP8) at T = 1: 264 MB, 61 us at 4.3 TB/s.
// Oracle: crates/reference. Tests: conformance::mlp_composite; crates/gpu/tests/rows_alone.rs.
#include "common/eight.cuh"
#include "common/tile.cuh"

namespace mlp {

struct Args {
    tile::Args gemm;
    void* hidden;
    Fp8Out fp8;
    i64 hidden_stride;
    u32 gate_up_dtype, hidden_dtype, hidden_vectors;
};

template <class S>
struct Shared {
    tile::Shared<S> product;
    float gate_up[S::BM][S::BN];
};

/// Grid [parts of 16 columns, 1, ranges].
template <class S>
DEVICE void gate_up(const Args& a) {
    Shared<S>& mem = shared<Shared<S>>();
    const u32 width = a.gemm.weights[0].n, tokens = a.gemm.num_tokens;
    const tile::Place at = {0, block_x() * S::OUTPUTS, 0};
    WarpAcc<S::TM, S::TN> sum;
    if (!tile::product_of_ranges<S>(a.gemm, a.gemm.weights[0], at, mem.product, sum)) return;
    const u32 row0 = warp_id() / S::WARPS_N * S::TM, col0 = warp_id() % S::WARPS_N * S::TN;
    UNROLL for (int i = 0; i < sum.SIZE; ++i) mem.gate_up[row0 + sum.row(i)][col0 + sum.col(i)] = rounded_to(a.gate_up_dtype, sum.v[i]);
    sync_block();
    for (u32 e = thread_id(); e < u32(S::BM * S::OUTPUTS); e += S::THREADS) {
        const u32 t = e / S::OUTPUTS, col = e % S::OUTPUTS;
        const float gate = mem.gate_up[t][col], up = mem.gate_up[t][S::OUTPUTS + col];
        if (t < tokens && at.n0 + col < width) {
            store_float(a.hidden, a.hidden_dtype, t * a.hidden_stride + at.n0 + col, gate / (1.0f + exp_of(-gate)) * up);
        }
    }
    if (!a.fp8.codes) return;
    constexpr u32 SHARERS = FP8_GROUP / S::OUTPUTS;
    const u32 group = block_x() / SHARERS, sharers = min_of(SHARERS, grid_x() - group * SHARERS);
    if (!is_last_block(a.gemm.counters + grid_x() + group, sharers, mem.product.flag[0])) return;
    const u32 column = group * FP8_GROUP;
    quantize_group<S::THREADS>(a.fp8, a.hidden, a.hidden_dtype, a.hidden_stride, a.hidden_vectors != 0, 0, tokens, S::BM, column, min_of(FP8_GROUP, width - column));
}

}  // namespace mlp

R1_KERNEL(gate_up_fp8, mlp::Args, (mlp::gate_up<tile::Pair<e4m3, e4m3>>), 2)
R1_KERNEL(gate_up_w8, mlp::Args, (mlp::gate_up<tile::Pair<bf16, e4m3>>), 2)
R1_KERNEL(gate_up_bf16, mlp::Args, (mlp::gate_up<tile::Pair<bf16, bf16>>), 2)
