// Grouped-query attention over a paged cache, and what fills it.
//
// S sequences, T rows, H heads, G KV heads of which each serves H / G neighbouring heads; row t sees the first n_t tokens of its sequence:
//   out[t, h] = sum_p softmax_p(scale * q[t, h] . k[p, h / (H / G)]) * v[p, h / (H / G)],   p < n_t
// q [T, H, Dh] (strided), out [T, H, Dv], k [num_blocks, block_size, G, Dh], v [num_blocks, block_size, G, Dv]. Source: Ainslie et al.
// (arXiv:2305.13245).
//
// gqa_attend_*: each warp has 16 pairs of row and head of one KV head; the block's warps share the tiles of keys and values. A context is cut into
// splits of `split_tokens`. A row that decodes has a block of one warp per split, whose partial sums gqa_combine adds from left to right; for rows that
// prefill a block of 4 warps (2 in F32) runs over all splits and adds them in the same way. So a row has the same bits whatever else is in the
// batch and however its prompt was cut.
//
// Bytes of a decode row: n_t * 2 G (Dh + Dv), 4,096 per token of Llama 3 8B's 8 KV heads: 64 rows of 4,096 tokens are 1.1 GB, 250 us at 4.3 TB/s (H200,
// measured copy). FLOPs of a prefill row: 2 H n_t (Dh + Dv).
//
// rope_cache_gqa: rotates q in place, writes the rotated k and v at their slots; elements i and i + Dh / 2 are a pair. Bytes: once in, once out.
//
// Oracle: crates/reference. Test: conformance::{rope_cache_gqa, gqa_attention, gqa_batch_equals_alone}.
#include "common/attention.cuh"

namespace gqa {
using namespace attention;

struct GqaArgs {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    float* partials;
    Sequences seqs;
    Pages pages;
    i64 q_row, q_head, out_row, out_head;
    u32 heads, kv_heads, key_dim, value_dim, dtype, cache_dtype, first_pack;
    /// Of the launch; 0: each block runs over all splits.
    u32 max_splits;
    u32 q_vectors, cache_vectors;
    float scale;
};

/// Groups of queries that one KV head needs, where its heads are more than a block's queries.
DEVICE u32 head_groups(const GqaArgs& a, u32 queries) { return ceil_div(a.heads / a.kv_heads, queries); }

/// Maxima and sums of 16 queries, then [16, Dv].
DEVICE float* partial(const GqaArgs& a, u32 pack, u32 group, u32 split) {
    i64 index = (i64(pack) * a.kv_heads * head_groups(a, 16) + group) * a.max_splits + split;
    return a.partials + index * (16 * (a.value_dim + 2));
}

template <class E, int DK, int DV, int WARPS, int TILE>
struct GqaShared {
    static constexpr int PAD = 16 / sizeof(E), LDK = DK + PAD, LDV = DV + PAD, LDP = TILE + PAD, LDS = TILE + 4;
    E q[WARPS * 16 * LDK];
    E k[TILE * LDK];
    E v[TILE * LDV];
    E p[WARPS][16 * LDP];
    float scores[WARPS][16 * LDS];
    float before[WARPS][16], now[WARPS][16], sum[WARPS][16];
};

/// Grid: KV heads times groups of their heads, splits, packs. DK and DV: Dh and Dv padded; ALL: a block runs over all splits.
template <class E, int DK, int DV, int WARPS, int TILE, bool ALL>
DEVICE void attend(const GqaArgs& a) {
    using Shared = GqaShared<E, DK, DV, WARPS, TILE>;
    constexpr int LDK = Shared::LDK, LDV = Shared::LDV, LDP = Shared::LDP, LDS = Shared::LDS;
    constexpr u32 QUERIES = WARPS * 16;
    Shared& s = shared<Shared>();
    const u32 warp = warp_id(), lane = lane_id();
    const u32 sharing = a.heads / a.kv_heads, groups = head_groups(a, QUERIES);
    const u32 kv_head = block_x() / groups, first_head = block_x() % groups * QUERIES;
    const Pack pack = find_pack(a.seqs, a.first_pack + block_z());
    const u32 last_sees = pack.last_sees(), first_split = ALL ? 0 : block_y();
    // The block as a whole leaves.
    if (!pack.here || (first_split > 0 && first_split * a.seqs.split_tokens >= last_sees)) return;
    const u32 end_split = ALL ? ceil_div(last_sees, a.seqs.split_tokens) : first_split + 1;
    const u32 heads = min_of(sharing - first_head, QUERIES), queries = pack.rows * heads;
    const u32 my_queries = queries > warp * 16 ? min_of(queries - warp * 16, 16) : 0;

    for (u32 q = 0; q < 16; ++q) {
        u32 pair = warp * 16 + q;
        i64 at = (pack.row + pair / heads) * a.q_row + (kv_head * sharing + first_head + pair % heads) * a.q_head;
        stage_row(s.q + pair * LDK, a.q, a.dtype, at, a.key_dim, DK, q < my_queries, a.q_vectors);
    }

    constexpr int LANES = WARP / 16;
    const u32 mine = lane / LANES, place = lane % LANES;
    const u32 visible = mine < my_queries ? pack.sees((warp * 16 + mine) / heads) : 0;
    float most = -INFINITE, sum = 0.0f;
    Acc<E, 16, DV> total, acc;
    total.clear();
    for (u32 split = first_split; split < end_split; ++split) {
        const u32 first = split * a.seqs.split_tokens, end = min_of(first + a.seqs.split_tokens, last_sees);
        RunningSoftmax<LANES> softmax;
        acc.clear();
        for (u32 tile = first; tile < end; tile += TILE) {
            for (u32 key = warp; key < TILE; key += num_warps()) {
                bool valid = tile + key < end;
                u32 block = 0, offset = 0;
                if (valid) a.pages.find(pack.seq, tile + key, block, offset);
                i64 entry = (i64(block) * a.pages.block_size + offset) * a.kv_heads + kv_head;
                stage_row(s.k + key * LDK, a.k, a.cache_dtype, entry * a.key_dim, a.key_dim, DK, valid, a.cache_vectors);
                stage_row(s.v + key * LDV, a.v, a.cache_dtype, entry * a.value_dim, a.value_dim, DV, valid, a.cache_vectors);
            }
            async_commit();
            async_wait<0>();
            sync_block();
            {
                Acc<E, 16, TILE> dots;
                dots.clear();
                product<DK>(dots, s.q + warp * 16 * LDK, LDK, s.k, LDK, my_queries);
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
                if (place == 0) s.before[warp][mine] = before;
            }
            sync_warp();
            UNROLL for (int i = 0; i < acc.SIZE; ++i) acc.v[i] *= s.before[warp][acc.row(i)];
            product_kn<TILE>(acc, s.p[warp], LDP, s.v, LDV, my_queries);
            // Before the tiles are overwritten.
            sync_block();
        }
        float before = 1.0f, now = 0.0f;
        if (!ALL) {
            most = softmax.most;
            sum = softmax.sum;
        } else if (first < visible) {
            Merge merge(most, sum, softmax.most, softmax.sum);
            before = merge.before;
            now = merge.now;
        }
        if (place == 0) {
            s.before[warp][mine] = before;
            s.now[warp][mine] = now;
            s.sum[warp][mine] = sum;
        }
        sync_warp();
        UNROLL for (int i = 0; i < acc.SIZE; ++i) {
            u32 q = acc.row(i);
            total.v[i] = ALL ? fma_of(acc.v[i], s.now[warp][q], total.v[i] * s.before[warp][q]) : acc.v[i];
        }
    }

    float* to = ALL ? nullptr : partial(a, block_z(), block_x(), block_y());
    UNROLL for (int i = 0; i < total.SIZE; ++i) {
        u32 q = total.row(i), c = total.col(i), pair = warp * 16 + q;
        if (q >= my_queries || c >= a.value_dim) continue;
        u32 sees = pack.sees(pair / heads);
        if (!ALL && sees > a.seqs.split_tokens) {
            to[32 + q * a.value_dim + c] = total.v[i];
        } else {
            i64 at = (pack.row + pair / heads) * a.out_row + (kv_head * sharing + first_head + pair % heads) * a.out_head + c;
            // A padding sequence sees nothing.
            store_float(a.out, a.dtype, at, sees == 0 ? 0.0f : total.v[i] / s.sum[warp][q]);
        }
    }
    if (!ALL && last_sees > a.seqs.split_tokens && place == 0 && mine < my_queries) {
        to[mine] = most;
        to[16 + mine] = sum;
    }
}

/// Grid: 16 queries, KV heads times groups of their heads, packs. One warp. Rows of one split are done already.
DEVICE void combine(const GqaArgs& a) {
    const u32 q = block_x(), sharing = a.heads / a.kv_heads, groups = head_groups(a, 16);
    const u32 kv_head = block_y() / groups, first_head = block_y() % groups * 16;
    const Pack pack = find_pack(a.seqs, a.first_pack + block_z());
    const u32 heads = min_of(sharing - first_head, 16);
    if (!pack.here || q >= pack.rows * heads) return;
    const u32 splits = ceil_div(pack.sees(q / heads), a.seqs.split_tokens);
    if (splits <= 1) return;
    const i64 at = (pack.row + q / heads) * a.out_row + (kv_head * sharing + first_head + q % heads) * a.out_head;
    for (u32 c = thread_id(); c < a.value_dim; c += num_threads()) {
        float most = -INFINITE, sum = 0.0f, value = 0.0f;
        for (u32 split = 0; split < splits; ++split) {
            const float* from = partial(a, block_z(), block_y(), split);
            Merge merge(most, sum, from[q], from[16 + q]);
            value = merge.add(value, from[32 + q * a.value_dim + c]);
        }
        store_float(a.out, a.dtype, at + c, value / sum);
    }
}

struct RopeArgs {
    void* q;
    const void* k;
    const void* v;
    const float* cos_sin;
    const u32* positions;
    const u32* slots;
    void* k_cache;
    void* v_cache;
    i64 q_row, q_head, k_row, k_head, v_row, v_head, rope_row;
    u32 heads, kv_heads, key_dim, value_dim, q_dtype, k_dtype, v_dtype, cache_dtype;
};
/// One block per row.
DEVICE void rope_cache(const RopeArgs& a) {
    const u32 t = block_x(), half = a.key_dim / 2, slot = a.slots[t];
    const float* cos = a.cos_sin + a.positions[t] * a.rope_row;
    const float* sin = cos + half;
    for (u32 i = thread_id(); i < a.heads * half; i += num_threads()) {
        u32 c = i % half;
        i64 at = t * a.q_row + i / half * a.q_head + c;
        float x = load_as_float(a.q, a.q_dtype, at), y = load_as_float(a.q, a.q_dtype, at + half);
        store_float(a.q, a.q_dtype, at, x * cos[c] - y * sin[c]);
        store_float(a.q, a.q_dtype, at + half, x * sin[c] + y * cos[c]);
    }
    // Padding.
    if (slot == 0xffffffffu) return;
    const i64 entry = i64(slot) * a.kv_heads;
    for (u32 i = thread_id(); i < a.kv_heads * half; i += num_threads()) {
        u32 c = i % half, head = i / half;
        i64 from = t * a.k_row + head * a.k_head + c, at = (entry + head) * a.key_dim + c;
        float x = load_as_float(a.k, a.k_dtype, from), y = load_as_float(a.k, a.k_dtype, from + half);
        store_float(a.k_cache, a.cache_dtype, at, x * cos[c] - y * sin[c]);
        store_float(a.k_cache, a.cache_dtype, at + half, x * sin[c] + y * cos[c]);
    }
    for (u32 i = thread_id(); i < a.kv_heads * a.value_dim; i += num_threads()) {
        u32 c = i % a.value_dim, head = i / a.value_dim;
        float value = load_as_float(a.v, a.v_dtype, t * a.v_row + head * a.v_head + c);
        store_float(a.v_cache, a.cache_dtype, (entry + head) * a.value_dim + c, value);
    }
}

}  // namespace gqa

R1_KERNEL(gqa_decode_bf16, gqa::GqaArgs, (gqa::attend<bf16, 128, 128, 1, 32, false>), 1)
R1_KERNEL(gqa_prefill_bf16, gqa::GqaArgs, (gqa::attend<bf16, 128, 128, 4, 32, true>), 4)
R1_KERNEL(gqa_decode_f32, gqa::GqaArgs, (gqa::attend<float, 128, 128, 1, 16, false>), 1)
R1_KERNEL(gqa_prefill_f32, gqa::GqaArgs, (gqa::attend<float, 128, 128, 2, 16, true>), 2)
R1_KERNEL(gqa_combine, gqa::GqaArgs, gqa::combine, 1)
R1_KERNEL(rope_cache_gqa, gqa::RopeArgs, gqa::rope_cache, 4)
