// Absorbed MLA over the paged latent cache: all heads share one key and value per token.
//
// S sequences, T rows, H local heads, C = kv_lora_rank, R = qk_rope_head_dim; row t sees the first n_t tokens of its sequence:
//   out[t, h] = sum_p softmax_p(scale * (q_latent[t, h] . c[p] + q_rope[t, h] . k[p])) * c[p],   p < n_t
// q_latent, out [T, H, C], q_rope [T, H, R] (strided); cache [num_blocks, block_size, C + R] = [c | k] F32 or BF16, or FP8: c as codes
// [num_blocks, block_size, C] with scales [num_blocks, block_size, ceil(C / 128)] F32, k [num_blocks, block_size, R] BF16.
// Source: DeepSeek-V2 report, section 2.1.2 (arXiv:2405.04434).
//
// mla_split: a block takes up to 16 pairs of row and head against one split of the context. A tile of latent rows is brought to shared memory
// once and serves as keys (all of it) and as values (its first C columns). BF16 on the matrix units, or F32. FP8 codes are BF16 numbers exactly;
// their scales multiply each group's part of a score, and the weights that meet the group's values. Rows with more than one split
// leave partial sums, which mla_combine adds from left to right. Splits depend on a row's own context alone (attention.cuh), tiles begin at
// multiples of the tile from the split's start, and what a row does not see changes nothing to the bit: the result has the same bits
// whatever else is in the batch.
//
// mla_finish, for rows that decode: adds the splits as mla_combine does, rounds, and applies W_uv, a matrix [U, C] per head, as the linears' kernels
// would, to the bit: out[t, h, u] = sum_c o[t, h, c] * W_h[u, c]. A block has 64 outputs of a head, for as many rows (16 at most) as leave blocks
// enough. The FP8 form is written along where a head's outputs are whole groups of 128.
//
// Bytes of a decode row: n_t * 2 (C + R), 1,152 per token of V3 (656 in FP8), read once per 16 heads; 16 heads over 64 rows of 4,096 tokens are
// 302 MB, 70 us at 4.3 TB/s (H200, measured copy). FLOPs: 2 H n_t (2 C + R), 2,176 per token and head: with 16 heads 30 per byte, so bytes bind.
// Shared memory: 59 to 64 KiB at C = 512: three blocks per multiprocessor hide each other's loads, and it fits CDNA's 64 KiB. mla_finish reads
// H U C weights per row tile, 1.05 MB of one rank's 16 heads in FP8 (0.24 us), and 4 (C + 2) bytes per split of a row and head, twice.
// Oracle: crates/reference. Test: conformance::{mla_attention, mla_attention_range, mla_attend}; bits: crates/gpu/tests/attention_bits.rs.
#include "common/attention.cuh"
#include "common/eight.cuh"
#include "common/tile.cuh"

namespace mla_decode {
using namespace attention;

/// Pairs of row and head per block.
constexpr u32 QUERIES = 16;
constexpr u32 WARPS = 4;

struct SplitArgs {
    const void* q_latent;
    const void* q_rope;
    /// Whole entries, or codes.
    const void* cache;
    /// Of the FP8 form.
    const float* scales;
    const bf16* rope;
    void* out;
    float* partials;
    Sequences seqs;
    Pages pages;
    i64 q_latent_row, q_latent_head, q_rope_row, q_rope_head, out_row, out_head;
    i64 cache_block, cache_token, scales_block, scales_token, rope_block, rope_token;
    u32 heads, latent_dim, rope_dim, dtype, cache_dtype;
    /// The launch's first pack, and its splits per row, as many as the longest context needs.
    u32 first_pack, max_splits;
    u32 q_vectors, cache_vectors;
    float scale;
};

/// Partial results of one block: maxima and sums of its queries, then [QUERIES, C].
DEVICE float* partial(const SplitArgs& a, u32 pack, u32 group, u32 split) {
    u32 groups = ceil_div(a.heads, QUERIES);
    i64 index = (i64(pack) * groups + group) * a.max_splits + split;
    return a.partials + index * (QUERIES * (a.latent_dim + 2));
}

/// CODES: the tile holds FP8 codes, without their scales.
template <class E, int CP, int RP, int TILE, bool CODES>
struct SplitShared {
    static constexpr int PAD = 16 / sizeof(E), GROUPS = CODES ? CP / int(FP8_GROUP) : 1;
    // Weights of all groups just fit without padding.
    static constexpr int LD = CP + RP + PAD, LDS = TILE + 8, LDP = CODES ? TILE : TILE + PAD;
    // Keys that a warp takes at once.
    static constexpr int KEYS = TILE < 16 ? TILE : 16, KEY_GROUPS = TILE / KEYS, K_PARTS = WARPS / KEY_GROUPS;
    E q[QUERIES * LD];
    E kv[TILE * LD];
    E p[GROUPS][QUERIES * LDP];
    float scores[K_PARTS][QUERIES * LDS];
    float scales[TILE * GROUPS];
    float before[QUERIES], most[QUERIES], sum[QUERIES];
};

/// One warp brings an entry to row `key` of the tile: [c, zeros up to CP, k, zeros up to CP + RP].
template <class E, int CP, int RP, int TILE, bool CODES>
DEVICE void stage_entry(const SplitArgs& a, SplitShared<E, CP, RP, TILE, CODES>& s, u32 key, u32 seq, u32 position, bool valid) {
    using Shared = SplitShared<E, CP, RP, TILE, CODES>;
    E* to = s.kv + key * Shared::LD;
    u32 block = 0, offset = 0;
    if (valid) a.pages.find(seq, position, block, offset);
    i64 at = block * a.cache_block + offset * a.cache_token;
    if (a.cache_dtype != DTYPE_E4M3) {
        stage_row(to, a.cache, a.cache_dtype, at, a.latent_dim, CP, valid, a.cache_vectors);
        stage_row(to + CP, a.cache, a.cache_dtype, at + a.latent_dim, a.rope_dim, RP, valid, a.cache_vectors);
        return;
    }
    const e4m3* codes = static_cast<const e4m3*>(a.cache) + at;
    const float* scales = a.scales + block * a.scales_block + offset * a.scales_token;
    const u32 groups = ceil_div(a.latent_dim, FP8_GROUP);
    if (CODES && lane_id() < Shared::GROUPS) {
        s.scales[key * Shared::GROUPS + lane_id()] = valid && lane_id() < groups ? scales[lane_id()] : 0.0f;
    }
    if (a.cache_vectors) {
        for (u32 c = lane_id() * 16; c < a.latent_dim; c += WARP * 16) {
            Bytes16 chunk = {{0, 0, 0, 0}};
            if (valid) chunk = *reinterpret_cast<const Bytes16*>(codes + c);
            float scale = CODES || !valid ? 1.0f : scales[c / FP8_GROUP];
            constexpr int PER_STORE = 16 / int(sizeof(E));
            UNROLL for (int i = 0; i < 16; i += PER_STORE) {
                E values[PER_STORE];
                UNROLL for (int j = 0; j < PER_STORE; ++j) {
                    values[j] = from_float<E>(to_float(e4m3{u8(chunk.words[(i + j) / 4] >> ((i + j) % 4 * 8))}) * scale);
                }
                Bytes16 wide;
                __builtin_memcpy(&wide, values, sizeof(wide));
                *reinterpret_cast<Bytes16*>(to + c + i) = wide;
            }
        }
    } else {
        for (u32 c = lane_id(); c < a.latent_dim; c += WARP) {
            to[c] = from_float<E>(valid ? to_float(codes[c]) * (CODES ? 1.0f : scales[c / FP8_GROUP]) : 0.0f);
        }
    }
    for (u32 c = a.latent_dim + lane_id(); c < CP; c += WARP) to[c] = from_float<E>(0.0f);
    i64 rope_at = block * a.rope_block + offset * a.rope_token;
    stage_row(to + CP, a.rope, DTYPE_BF16, rope_at, a.rope_dim, RP, valid, a.cache_vectors && sizeof(E) == sizeof(bf16));
}

/// One warp's part of the scores against its keys.
template <class E, int CP, int RP, int TILE, bool CODES>
DEVICE void score(SplitShared<E, CP, RP, TILE, CODES>& s, u32 queries) {
    using Shared = SplitShared<E, CP, RP, TILE, CODES>;
    constexpr int LD = Shared::LD, PARTS = Shared::K_PARTS, GROUPS = Shared::GROUPS;
    const u32 keys = warp_id() % Shared::KEY_GROUPS * Shared::KEYS, part = warp_id() / Shared::KEY_GROUPS;
    const E* kv = s.kv + keys * LD;
    Acc<E, QUERIES, Shared::KEYS> dots;
    dots.clear();
    if constexpr (CODES) {
        if (part == 0) product<RP>(dots, s.q + CP, LD, kv + CP, LD, queries);
        for (u32 g = part * (GROUPS / PARTS); g < (part + 1) * (GROUPS / PARTS); ++g) {
            Acc<E, QUERIES, Shared::KEYS> codes;
            codes.clear();
            product<int(FP8_GROUP)>(codes, s.q + g * FP8_GROUP, LD, kv + g * FP8_GROUP, LD, queries);
            UNROLL for (int i = 0; i < dots.SIZE; ++i) dots.v[i] += codes.v[i] * s.scales[(keys + dots.col(i)) * GROUPS + g];
        }
    } else {
        constexpr int K = (CP + RP) / PARTS;
        product<K>(dots, s.q + part * K, LD, kv + part * K, LD, queries);
    }
    UNROLL for (int i = 0; i < dots.SIZE; ++i) s.scores[part][dots.row(i) * Shared::LDS + keys + dots.col(i)] = dots.v[i];
}

/// Grid: groups of 16 heads, splits, packs. CP and RP: C and R padded; E: what is multiplied.
template <class E, int CP, int RP, int TILE, bool CODES>
DEVICE void split(const SplitArgs& a) {
    using Shared = SplitShared<E, CP, RP, TILE, CODES>;
    constexpr int LD = Shared::LD, LDS = Shared::LDS, LDP = Shared::LDP, GROUPS = Shared::GROUPS;
    Shared& s = shared<Shared>();
    const u32 group = block_x(), split = block_y(), warp = warp_id(), lane = lane_id();
    const Pack pack = find_pack(a.seqs, a.first_pack + block_z());
    // The host sees to it that no pack has rows with splits of unlike length.
    const u32 last_sees = pack.last_sees(), len = a.seqs.split_len(last_sees), first = split * len;
    // The block as a whole leaves.
    if (!pack.here || (split > 0 && first >= last_sees)) return;
    const u32 end = min_of(first + len, last_sees);
    const u32 heads = min_of(a.heads - group * QUERIES, QUERIES), queries = pack.rows * heads;

    for (u32 q = warp; q < QUERIES; q += num_warps()) {
        bool valid = q < queries;
        i64 row = pack.row + q / heads, head = group * QUERIES + q % heads;
        i64 latent_at = row * a.q_latent_row + head * a.q_latent_head, rope_at = row * a.q_rope_row + head * a.q_rope_head;
        stage_row(s.q + q * LD, a.q_latent, a.dtype, latent_at, a.latent_dim, CP, valid, a.q_vectors);
        stage_row(s.q + q * LD + CP, a.q_rope, a.dtype, rope_at, a.rope_dim, RP, valid, a.q_vectors);
    }

    constexpr int LANES = WARP / (QUERIES / WARPS);
    const u32 mine = warp * (QUERIES / WARPS) + lane / LANES, place = lane % LANES;
    const u32 visible = mine < queries ? pack.sees(mine / heads) : 0;
    RunningSoftmax<LANES> softmax;
    Acc<E, QUERIES, CP / WARPS> acc;
    acc.clear();
    for (u32 tile = first; tile < end; tile += TILE) {
        for (u32 key = warp; key < TILE; key += num_warps()) {
            stage_entry(a, s, key, pack.seq, tile + key, tile + key < end);
        }
        async_commit();
        async_wait<0>();
        sync_block();
        score(s, queries);
        sync_block();
        {
            constexpr int EACH = TILE < LANES ? 1 : TILE / LANES;
            float weight[EACH];
            UNROLL for (int j = 0; j < EACH; ++j) {
                const u32 key = j * LANES + place;
                weight[j] = -INFINITE;
                if (key >= TILE || tile + key >= visible) continue;
                float score = s.scores[0][mine * LDS + key];
                UNROLL for (int part = 1; part < Shared::K_PARTS; ++part) score += s.scores[part][mine * LDS + key];
                weight[j] = score * a.scale;
            }
            float before = softmax.step(weight);
            UNROLL for (int j = 0; j < EACH; ++j) {
                const u32 key = j * LANES + place;
                if (key >= TILE) continue;
                UNROLL for (int g = 0; g < GROUPS; ++g) {
                    s.p[g][mine * LDP + key] = from_float<E>(CODES ? weight[j] * s.scales[key * GROUPS + g] : weight[j]);
                }
            }
            if (place == 0) {
                s.before[mine] = before;
                s.most[mine] = softmax.most;
                s.sum[mine] = softmax.sum;
            }
        }
        sync_block();
        UNROLL for (int i = 0; i < acc.SIZE; ++i) acc.v[i] *= s.before[acc.row(i)];
        const u32 column = warp * (CP / WARPS);
        product_kn<TILE>(acc, s.p[column * GROUPS / CP], LDP, s.kv + column, LD, queries);
        // Before the tile is overwritten.
        sync_block();
    }

    float* to = partial(a, block_z(), group, split);
    UNROLL for (int i = 0; i < acc.SIZE; ++i) {
        u32 q = acc.row(i), c = warp * (CP / WARPS) + acc.col(i);
        if (q >= queries || c >= a.latent_dim) continue;
        u32 sees = pack.sees(q / heads);
        if (a.seqs.num_splits(sees) > 1) {
            to[QUERIES * 2 + q * a.latent_dim + c] = acc.v[i];
        } else if (split == 0) {
            i64 at = (pack.row + q / heads) * a.out_row + (group * QUERIES + q % heads) * a.out_head + c;
            store_float(a.out, a.dtype, at, sees == 0 ? 0.0f : acc.v[i] / s.sum[q]);
        }
    }
    if (a.seqs.num_splits(last_sees) > 1 && thread_id() < queries) {
        to[thread_id()] = s.most[thread_id()];
        to[QUERIES + thread_id()] = s.sum[thread_id()];
    }
}

/// Adds the partial sums of one query from left to right; the block's threads share its channels and give each to `store(c, value)`.
template <class Store>
DEVICE void combine_splits(const SplitArgs& a, u32 pack, u32 group, u32 q, u32 splits, Store store) {
    // Loads in flight per thread and split.
    constexpr u32 HELD = 4;
    for (u32 first = thread_id(); first < a.latent_dim; first += HELD * num_threads()) {
        float most = -INFINITE, sum = 0.0f, value[HELD] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (u32 split = 0; split < splits; ++split) {
            const float* from = partial(a, pack, group, split);
            Merge merge(most, sum, from[q], from[QUERIES + q]);
            UNROLL for (u32 j = 0; j < HELD; ++j) {
                const u32 c = first + j * num_threads();
                if (c < a.latent_dim) value[j] = merge.add(value[j], from[QUERIES * 2 + q * a.latent_dim + c]);
            }
        }
        UNROLL for (u32 j = 0; j < HELD; ++j) {
            const u32 c = first + j * num_threads();
            if (c < a.latent_dim) store(c, value[j] / sum);
        }
    }
}

/// Grid: the 16 queries of a block, groups of heads, packs. Rows of one split are done already.
DEVICE void combine(const SplitArgs& a) {
    const u32 q = block_x(), group = block_y();
    const Pack pack = find_pack(a.seqs, a.first_pack + block_z());
    const u32 heads = min_of(a.heads - group * QUERIES, QUERIES);
    if (!pack.here || q >= pack.rows * heads) return;
    const u32 splits = a.seqs.num_splits(pack.sees(q / heads));
    if (splits <= 1) return;
    const i64 at = (pack.row + q / heads) * a.out_row + (group * QUERIES + q % heads) * a.out_head;
    combine_splits(a, block_z(), group, q, splits, [&](u32 c, float value) { store_float(a.out, a.dtype, at + c, value); });
}

// ---- Up to the output projection -----------------------------------------------------------------------------------------------------
struct FinishArgs {
    /// Of the split kernel; its `out` has the rows of one split.
    SplitArgs split;
    /// out[t, h, u] = sum_c o[t, h, c] * W_h[u, c]; its x is what this kernel brings.
    tile::Args gemm;
    Fp8Out fp8;
    u32 rows_per_block, dense_vectors;
};

/// Widest latent.
constexpr int LATENT = 512;
/// 64 outputs of a head, for up to 16 rows whose o_latent stands in shared memory.
template <class W>
using Finish = tile::Shape<bf16, W, false, 1, 4, 16, 16, 4, false, 0, LATENT>;

/// Rows `t0..t0 + rows` of the launch, of one head: sums of splits, rounded, zeros up to whole steps and whole tiles.
template <class S>
DEVICE void bring_latents(const SplitArgs& a, u32 t0, u32 rows, u32 head, typename S::X* to) {
    const u32 group = head / QUERIES, padded = ceil_div(a.latent_dim, S::STEP) * S::STEP;
    for (u32 row = 0; row < rows; ++row) {
        const Pack pack = find_pack(a.seqs, a.first_pack + t0 + row);
        const u32 splits = a.seqs.num_splits(pack.sees(0));
        bf16* o = to + row * S::LDX;
        if (splits > 1) {
            combine_splits(a, t0 + row, group, head % QUERIES, splits, [&](u32 c, float value) { o[c] = from_float<bf16>(value); });
        } else {
            const bf16* from = static_cast<const bf16*>(a.out) + pack.row * a.out_row + head * a.out_head;
            for (u32 c = thread_id(); c < a.latent_dim; c += num_threads()) o[c] = from[c];
        }
        for (u32 c = a.latent_dim + thread_id(); c < padded; c += num_threads()) o[c] = bf16{0};
    }
    for (u32 row = rows; row < u32(S::BM); ++row) {
        for (u32 c = thread_id(); c < padded; c += num_threads()) to[row * S::LDX + c] = bf16{0};
    }
}

/// Grid: a head's outputs by 64, rows, heads. Of sequences that decode: each pack is a row.
template <class S>
DEVICE void finish(const FinishArgs& a) {
    tile::Shared<S>& mem = shared<tile::Shared<S>>();
    const tile::Weight& weight = a.gemm.weights[0];
    const tile::Place at = {block_y() * a.rows_per_block, block_x() * S::BN, block_z()};
    const u32 rows = min_of(a.gemm.num_tokens - at.t0, a.rows_per_block);
    WarpAcc<S::TM, S::TN> sum;
    // The first steps of the weight are on their way meanwhile.
    tile::product<S, false>(a.gemm, weight, at, 0, a.gemm.k, mem, sum, [&]() { bring_latents<S>(a.split, at.t0, rows, at.head, mem.x[0]); });
    const u32 first_col = at.n0 + warp_id() * S::TN;
    UNROLL for (int i = 0; i < sum.SIZE; ++i) {
        const u32 row = sum.row(i), n = first_col + sum.col(i);
        if (row < rows && n < weight.n) {
            store_float(weight.out, weight.out_dtype, (at.t0 + row) * weight.out_stride + at.head * a.gemm.out_head_stride + n, sum.v[i]);
        }
    }
    if (!a.fp8.codes) return;
    // A head's outputs are whole groups: the last of the blocks that share one quantises it.
    constexpr u32 SHARERS = FP8_GROUP / S::BN;
    const u32 groups = weight.n / FP8_GROUP, group = block_x() / SHARERS;
    u32* counter = a.gemm.counters + (block_z() * grid_y() + block_y()) * groups + group;
    if (!is_last_block(counter, SHARERS, mem.flag[0])) return;
    const u32 column = at.head * weight.n + group * FP8_GROUP;
    quantize_group<S::THREADS>(a.fp8, weight.out, weight.out_dtype, weight.out_stride, a.dense_vectors != 0, at.t0, rows, S::BM, column, FP8_GROUP);
}

}  // namespace mla_decode

R1_KERNEL(mla_split_bf16_512, mla_decode::SplitArgs, (mla_decode::split<bf16, 512, 64, 32, false>), 4)
R1_KERNEL(mla_split_bf16_128, mla_decode::SplitArgs, (mla_decode::split<bf16, 128, 64, 64, false>), 4)
R1_KERNEL(mla_split_fp8_512, mla_decode::SplitArgs, (mla_decode::split<bf16, 512, 64, 32, true>), 4)
R1_KERNEL(mla_split_fp8_128, mla_decode::SplitArgs, (mla_decode::split<bf16, 128, 64, 64, true>), 4)
R1_KERNEL(mla_split_f32_512, mla_decode::SplitArgs, (mla_decode::split<float, 512, 64, 8, false>), 4)
R1_KERNEL(mla_split_f32_128, mla_decode::SplitArgs, (mla_decode::split<float, 128, 64, 32, false>), 4, 3)
R1_KERNEL(mla_combine, mla_decode::SplitArgs, mla_decode::combine, 4)
R1_KERNEL(mla_finish_w8, mla_decode::FinishArgs, (mla_decode::finish<mla_decode::Finish<e4m3>>), 4)
R1_KERNEL(mla_finish_bf16, mla_decode::FinishArgs, (mla_decode::finish<mla_decode::Finish<bf16>>), 4, 4)
