// Un-absorbed causal MLA of prefill chunks over keys and values that were expanded from the latent cache.
//
// T rows, H local heads, P = qk_nope_head_dim, R = qk_rope_head_dim, U = v_head_dim, N expanded tokens of the launch's sequences, one sequence
// after the other; row t sees the first n_t tokens of its sequence:
//   out[t, h] = sum_p softmax_p(scale * (q[t, h, :P] . k[p, h] + q[t, h, P:] . k_rope[p])) * v[p, h],   p < n_t
// q [T, H, P + R], kv [N, H, P + U] = [k | v], k_rope [N, R], out [T, H, U]; BF16 on the matrix units, or F32.
//
// A block takes 64 rows (32 in F32) of one sequence and one head and runs over the keys in tiles; each warp has 16 rows of its own and keeps
// their results in registers. Tiles begin at the sequence's first token, and keys that a row does not see change nothing to the bit, so a row's
// result does not depend on how a prompt is cut into chunks.
//
// FLOPs 2 (P + R + U) per row, head and visible token: a prompt of 4,096 tokens with V3's 128 heads is 0.69 TFLOP, 0.87 ms at 790 TFLOP/s (H200, measured
// BF16), which mma.sync cannot reach. Shared memory: 61 KiB, three blocks per multiprocessor, and it fits CDNA's 64 KiB.
// Oracle: crates/reference. Test: conformance::mla_attention_expanded; bits: crates/gpu/tests/attention_bits.rs.
#include "common/attention.cuh"

namespace mla_prefill {
using namespace attention;

struct ExpandedArgs {
    const void* q;
    const void* kv;
    const void* k_rope;
    void* out;
    const u32* context_start;
    Sequences seqs;
    i64 q_row, q_head, kv_row, kv_head, k_rope_row, out_row, out_head;
    u32 nope_dim, rope_dim, value_dim, dtype, kv_dtype, k_rope_dtype, q_vectors, kv_vectors;
    float scale;
};

template <class E, int DK, int DV, int WARPS, int TILE>
struct ExpandedShared {
    static constexpr int PAD = 16 / sizeof(E), LDK = DK + PAD, LDV = DV + PAD, LDP = TILE + PAD, LDS = TILE + 4;
    E q[WARPS * 16 * LDK];
    E k[TILE * LDK];
    E v[TILE * LDV];
    E p[WARPS][16 * LDP];
    float scores[WARPS][16 * LDS];
    float before[WARPS][16], sum[WARPS][16];
};

/// Grid: packs, heads. DK and DV: P + R and U padded; E: what is multiplied.
template <class E, int DK, int DV, int WARPS, int TILE>
DEVICE void attend(const ExpandedArgs& a) {
    using Shared = ExpandedShared<E, DK, DV, WARPS, TILE>;
    constexpr int LDK = Shared::LDK, LDV = Shared::LDV, LDP = Shared::LDP, LDS = Shared::LDS;
    Shared& s = shared<Shared>();
    const u32 head = block_y(), warp = warp_id(), lane = lane_id();
    const Pack pack = find_pack(a.seqs, block_x());
    // The block as a whole leaves.
    if (!pack.here) return;
    const u32 end = pack.last_sees(), qk_dim = a.nope_dim + a.rope_dim;
    const i64 first_key = a.context_start[pack.seq] - a.context_start[a.seqs.first];

    const u32 my_rows = pack.rows > warp * 16 ? min_of(pack.rows - warp * 16, 16) : 0;
    for (u32 q = 0; q < 16; ++q) {
        u32 row = warp * 16 + q;
        i64 at = (pack.row + row) * a.q_row + head * a.q_head;
        stage_row(s.q + row * LDK, a.q, a.dtype, at, qk_dim, DK, q < my_rows, a.q_vectors);
    }

    constexpr int LANES = WARP / 16;
    const u32 mine = lane / LANES, place = lane % LANES;
    const u32 visible = mine < my_rows ? pack.sees(warp * 16 + mine) : 0;
    RunningSoftmax<LANES> softmax;
    Acc<E, 16, DV> acc;
    acc.clear();
    for (u32 tile = 0; tile < end; tile += TILE) {
        for (u32 key = warp; key < TILE; key += num_warps()) {
            bool valid = tile + key < end;
            i64 row = first_key + tile + key, at = row * a.kv_row + head * a.kv_head;
            stage_row(s.k + key * LDK, a.kv, a.kv_dtype, at, a.nope_dim, a.nope_dim, valid, a.kv_vectors);
            stage_row(s.k + key * LDK + a.nope_dim, a.k_rope, a.k_rope_dtype, row * a.k_rope_row, a.rope_dim, DK - a.nope_dim, valid, a.kv_vectors);
            stage_row(s.v + key * LDV, a.kv, a.kv_dtype, at + a.nope_dim, a.value_dim, DV, valid, a.kv_vectors);
        }
        async_commit();
        async_wait<0>();
        sync_block();
        {
            Acc<E, 16, TILE> dots;
            dots.clear();
            product<DK>(dots, s.q + warp * 16 * LDK, LDK, s.k, LDK, my_rows);
            UNROLL for (int i = 0; i < dots.SIZE; ++i) s.scores[warp][dots.row(i) * LDS + dots.col(i)] = dots.v[i];
        }
        sync_warp();
        {
            float weight[TILE / LANES];
            UNROLL for (int j = 0; j < TILE / LANES; ++j) {
                u32 key = j * LANES + place;
                weight[j] = tile + key < visible ? s.scores[warp][mine * LDS + key] * a.scale : -INFINITE;
            }
            float before = softmax.step(weight);
            UNROLL for (int j = 0; j < TILE / LANES; ++j) s.p[warp][mine * LDP + j * LANES + place] = from_float<E>(weight[j]);
            if (place == 0) {
                s.before[warp][mine] = before;
                s.sum[warp][mine] = softmax.sum;
            }
        }
        sync_warp();
        UNROLL for (int i = 0; i < acc.SIZE; ++i) acc.v[i] *= s.before[warp][acc.row(i)];
        product_kn<TILE>(acc, s.p[warp], LDP, s.v, LDV, my_rows);
        // Before the tiles are overwritten.
        sync_block();
    }

    UNROLL for (int i = 0; i < acc.SIZE; ++i) {
        u32 q = acc.row(i), c = acc.col(i);
        if (q >= my_rows || c >= a.value_dim) continue;
        u32 row = warp * 16 + q;
        // A padding sequence sees nothing.
        float value = pack.sees(row) == 0 ? 0.0f : acc.v[i] / s.sum[warp][q];
        store_float(a.out, a.dtype, (pack.row + row) * a.out_row + head * a.out_head + c, value);
    }
}

}  // namespace mla_prefill

R1_KERNEL(mla_expanded_bf16_192, mla_prefill::ExpandedArgs, (mla_prefill::attend<bf16, 192, 128, 4, 32>), 4)
R1_KERNEL(mla_expanded_bf16_128, mla_prefill::ExpandedArgs, (mla_prefill::attend<bf16, 128, 64, 4, 32>), 4, 6)
R1_KERNEL(mla_expanded_f32_192, mla_prefill::ExpandedArgs, (mla_prefill::attend<float, 192, 128, 2, 16>), 2)
R1_KERNEL(mla_expanded_f32_128, mla_prefill::ExpandedArgs, (mla_prefill::attend<float, 128, 64, 2, 16>), 2, 6)
