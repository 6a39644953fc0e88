// What the attention kernels share: which rows a block answers for, tiles filled from rows of device memory, products of tiles in BF16
// (matrix units) and F32 (each lane's own multiplications).
#pragma once
#include "gpu.cuh"

namespace attention {

// ---- Rows ----------------------------------------------------------------------------------------------------------------------------
/// The sequences of a launch, as the device knows them: those that decode come first and have one row each.
struct Sequences {
    const u32* query_start;
    const u32* context_len;
    u32 first, end;
    /// Of the launch's sequences.
    u32 num_decodes;
    u32 rows_per_pack;
    /// A row's context is cut by its own length alone, so that its result has the same bits in every batch: pieces of so many tokens (a multiple
    /// of every kernel's tile), longer ones where there would be more than `split_limit`.
    u32 split_tokens, split_limit;
    DEVICE u32 split_len(u32 visible) const { return split_tokens * max_of(ceil_div(visible, split_tokens * split_limit), 1); }
    DEVICE u32 num_splits(u32 visible) const { return ceil_div(visible, split_len(visible)); }
};
/// Consecutive rows of one sequence, which is padding where it has no context.
struct Pack {
    bool here, padding;
    u32 seq, row, rows, first_sees;
    /// How many tokens row i sees.
    DEVICE u32 sees(u32 i) const { return padding ? 0 : first_sees + i; }
    DEVICE u32 last_sees() const { return sees(rows - 1); }
};
/// Sequence by sequence; `here` is false past the last pack.
DEVICE Pack find_pack(const Sequences& s, u32 index) {
    u32 seq = s.first + index, within = 0;
    if (index >= s.num_decodes) {
        within = index - s.num_decodes;
        seq = s.first + s.num_decodes;
        for (; seq < s.end; ++seq) {
            u32 packs = ceil_div(s.query_start[seq + 1] - s.query_start[seq], s.rows_per_pack);
            if (within < packs) break;
            within -= packs;
        }
    }
    if (seq >= s.end) return Pack{false, true, 0, 0, 0, 0};
    u32 start = s.query_start[seq], rows = s.query_start[seq + 1] - start, skip = within * s.rows_per_pack;
    u32 context = s.context_len[seq];
    return Pack{true, context == 0, seq, start + skip, min_of(s.rows_per_pack, rows - skip), context - rows + 1 + skip};
}

/// Where a token of a sequence lies in a paged tensor.
struct Pages {
    const u32* block_table;
    i64 table_row;
    u32 block_size;
    DEVICE void find(u32 seq, u32 position, u32& block, u32& offset) const {
        block = block_table[seq * table_row + position / block_size];
        offset = position % block_size;
    }
};

// ---- Splits of a context -------------------------------------------------------------------------------------------------------------
/// Adds a split to those before it.
struct Merge {
    float before, now;
    DEVICE Merge(float& most, float& sum, float split_most, float split_sum) {
        float best = max_of(most, split_most);
        before = exp_of(most - best);
        now = exp_of(split_most - best);
        most = best;
        sum = add(sum, split_sum);
    }
    // Written so that every compiler rounds it alike, wherever it stands.
    DEVICE float add(float value, float split_value) const { return fma_of(split_value, now, value * before); }
};

// ---- Tiles ---------------------------------------------------------------------------------------------------------------------------
/// One warp copies `n` elements at `from[at]` to a row of a tile and fills it up to `padded` with zeros; all zeros where `valid` is false, and
/// then nothing is read. `vectors`: same element type, everything a multiple of 16 bytes; complete after `async_wait`.
template <class E>
DEVICE void stage_row(E* to, const void* from, u32 dtype, i64 at, u32 n, u32 padded, bool valid, bool vectors) {
    constexpr u32 PER_COPY = 16 / sizeof(E);
    if (vectors) {
        const E* source = static_cast<const E*>(from) + at;
        for (u32 c = lane_id() * PER_COPY; c < n; c += WARP * PER_COPY) async_copy16(to + c, source + c, valid);
    } else {
        for (u32 c = lane_id(); c < n; c += WARP) to[c] = from_float<E>(valid ? load_as_float(from, dtype, at + c) : 0.0f);
    }
    for (u32 c = n + lane_id(); c < padded; c += WARP) to[c] = from_float<E>(0.0f);
}

/// As WarpAcc, for products without matrix units: neighbouring lanes have neighbouring columns, and N may be 8.
template <int M, int N>
struct LaneAcc {
    static constexpr int SIZE = M * N / int(WARP);
    float v[SIZE];
    DEVICE void clear() {
        UNROLL for (int i = 0; i < SIZE; ++i) v[i] = 0.0f;
    }
    DEVICE int row(int i) const { return (i * int(WARP) + int(lane_id())) / N; }
    DEVICE int col(int i) const { return (i * int(WARP) + int(lane_id())) % N; }
};
template <class E, int M, int N>
struct AccOf {
    typedef WarpAcc<M, N> Type;
};
template <int M, int N>
struct AccOf<float, M, N> {
    typedef LaneAcc<M, N> Type;
};
/// The sums of a product of `E`.
template <class E, int M, int N>
using Acc = typename AccOf<E, M, N>::Type;

/// acc[m][n] += sum_k a[m * lda + k] * b[n * ldb + k]; only the first `rows` rows are wanted.
template <int K, int M, int N>
DEVICE void product(WarpAcc<M, N>& acc, const bf16* a, int lda, const bf16* b, int ldb, u32) {
    warp_mma<K>(acc, a, lda, b, ldb);
}
template <int K, int M, int N>
DEVICE void product(LaneAcc<M, N>& acc, const float* a, int lda, const float* b, int ldb, u32 rows) {
    UNROLL for (int i = 0; i < LaneAcc<M, N>::SIZE; ++i) {
        if (acc.row(i) >= int(rows)) continue;
        const float *x = a + acc.row(i) * lda, *y = b + acc.col(i) * ldb;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int k = 0; k < K; k += 4) {
            UNROLL for (int j = 0; j < 4; ++j) sum[j] += x[k + j] * y[k + j];
        }
        acc.v[i] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}

/// acc[m][n] += sum_k a[m * lda + k] * b[k * ldb + n]; only the first `rows` rows are wanted.
template <int K, int M, int N>
DEVICE void product_kn(WarpAcc<M, N>& acc, const bf16* a, int lda, const bf16* b, int ldb, u32) {
    warp_mma_kn<K>(acc, a, lda, b, ldb);
}
template <int K, int M, int N>
DEVICE void product_kn(LaneAcc<M, N>& acc, const float* a, int lda, const float* b, int ldb, u32 rows) {
    UNROLL for (int i = 0; i < LaneAcc<M, N>::SIZE; ++i) {
        if (acc.row(i) >= int(rows)) continue;
        const float *x = a + acc.row(i) * lda, *y = b + acc.col(i);
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int k = 0; k < K; k += 4) {
            UNROLL for (int j = 0; j < 4; ++j) sum[j] += x[k + j] * y[(k + j) * ldb];
        }
        acc.v[i] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}

/// The running softmax of one row, held by `LANES` neighbouring lanes, each of which sees every LANES-th score.
template <int LANES>
struct RunningSoftmax {
    float most = -INFINITE, sum = 0.0f;
    /// Turns `count` scores (-INFINITE where there is none) into weights; gives what weights so far must be multiplied by. Scores that are all
    /// -INFINITE change nothing, to the bit.
    template <int COUNT>
    DEVICE float step(float (&score)[COUNT]) {
        float best = most;
        UNROLL for (int j = 0; j < COUNT; ++j) best = max_of(best, score[j]);
        UNROLL for (int mask = 1; mask < LANES; mask *= 2) best = max_of(best, shuffle_xor(best, u32(mask)));
        float shift = best == -INFINITE ? 0.0f : best;
        float before = exp_of(most - shift), part = 0.0f;
        UNROLL for (int j = 0; j < COUNT; ++j) {
            score[j] = exp_of(score[j] - shift);
            part += score[j];
        }
        UNROLL for (int mask = 1; mask < LANES; mask *= 2) part += shuffle_xor(part, u32(mask));
        sum = sum * before + part;
        most = best;
        return before;
    }
};

}  // namespace attention
