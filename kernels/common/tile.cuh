// A tile of a matrix product per block, shared by the files whose kernels have linears: gemm.cu, per_head.cu, mla_decode.cu and more.
//
//   out[t, n] = sum_k x[t, k] * w[n, k]      (KN = false; a linear's weight, a row per output)
//   out[t, n] = sum_k x[t, k] * w[k, n]      (KN = true; a weight applied from its other side)
//
// The sum goes over k in steps of STEP, each one a matrix instruction's chain from zero where there are scales, and the steps are added in
// order; a step ends early where a scale's block does. The k of a weight with few outputs is cut into ranges, whose sums are added last, in
// order. So the order depends on the weight alone: tiles of any height give a row the same bits. Short tiles give each range to a block of its
// own, and the last of a tile's blocks adds them; higher tiles take one range after the other.
//
// Steps are copied to shared memory STAGES - 1 ahead, 16 bytes at a time where the host promises alignment, else element by element.
// E4M3 and 4-bit weights of BF16 activations are copied as codes and widened, exactly, before they are multiplied.
#pragma once
#include "gpu.cuh"

namespace tile {

/// Two codes of 4 bits, the lower bits first. The number is (code - zero) * scale, zero and scale F16 per output and group of k.
struct int4x2 {
    u8 bits;
};
/// After the codes of gpu.cuh.
constexpr u32 DTYPE_INT4 = 4;

/// A weight and what it gives. Scales of 1 are not there: `scales` is read for E4M3 and 4-bit codes only.
struct Weight {
    const void* data;
    /// [blocks of rows, blocks of columns], F32; of 4-bit codes F16, as their zeros.
    const void* scales;
    const f16* zeros;
    void* out;
    /// In elements of data: for 4-bit codes in pairs.
    i64 stride, scale_stride, zero_stride, out_stride;
    /// Outputs.
    u32 n;
    u32 dtype, out_dtype;
    /// Rows and columns of the data that share a scale, and where element (0, 0) lies in its block.
    u32 block[2], offset[2];
    u32 is_vectorizable;
    /// A multiple of 128; k where it is not cut.
    u32 range_len;
};

struct Args {
    const void* x;
    /// [T, ceil(k / 128)], of E4M3.
    const float* x_scales;
    i64 x_stride, x_scale_stride, x_head_stride, out_head_stride;
    u32 num_tokens, k;
    /// Head `block_z` has the rows from `block_z * rows_per_head + first_row` on.
    u32 rows_per_head, first_row;
    u32 x_dtype, x_is_vectorizable;
    /// Blocks in x that belong to the first weight; the others are the second's.
    u32 first_tiles;
    /// For the kernel that takes both forms at run time.
    u32 transposed;
    Weight weights[2];
    /// Of short tiles: sums of ranges, [blocks in y, blocks in x, ranges, BM * BN], and a counter per block in y and x. Several heads have one range.
    float* partials;
    u32* counters;
    u32 ranges;
};

/// The steps of a sum over k: each ends at a multiple of `step`, where a scale's block does, or at the end.
struct Steps {
    u32 k, end, k_block;
    u32 len, step, block, block_end;

    /// From `begin`, a multiple of `step`, to `len`. `offset`: where k = 0 lies among blocks.
    DEVICE Steps(u32 begin, u32 len_, u32 step_, u32 block_, u32 offset) : k(begin), len(len_), step(step_), block(block_) {
        k_block = (begin + offset) / block;
        block_end = (k_block + 1) * block - offset;
        end = min_of(len, min_of(k + step, block_end));
    }
    DEVICE void advance() {
        k = end;
        if (k == block_end) {
            k_block += 1;
            block_end += block;
        }
        end = min_of(len, min_of((k / step + 1) * step, block_end));
    }
};

template <class A, class B>
struct IsSame {
    static constexpr bool value = false;
};
template <class A>
struct IsSame<A, A> {
    static constexpr bool value = true;
};

/// Activations X (bf16, e4m3) and a weight W (the same, or e4m3 or int4x2 widened to bf16); WARPS_M x WARPS_N warps with tiles of TM x TN each.
/// PAIRED: the tile's right half is the second weight's. HELPERS: warps more that only copy, for blocks that do something else afterwards.
/// RESIDENT: whole rows of x, so many columns at most, stand in shared memory, where the kernel brings them; blocks of scales end where
/// steps do.
template <class X_, class W_, bool KN_, int WARPS_M_, int WARPS_N_, int TM_, int TN_, int STAGES_, bool PAIRED_ = false, int HELPERS_ = 0,
          int RESIDENT_ = 0>
struct Shape {
    typedef X_ X;
    typedef W_ W;
    static constexpr bool KN = KN_, PAIRED = PAIRED_;
    static constexpr bool WIDENS = !IsSame<X, W>::value;
    static constexpr bool INT4 = IsSame<W, int4x2>::value;
    static constexpr bool HAS_W_SCALES = INT4 || IsSame<W, e4m3>::value;
    static constexpr bool HAS_X_SCALES = IsSame<X, e4m3>::value;
    static constexpr int WARPS_N = WARPS_N_, TM = TM_, TN = TN_, STAGES = STAGES_;
    static constexpr int BM = WARPS_M_ * TM, BN = WARPS_N * TN;
    static constexpr int HELPERS = HELPERS_;
    /// Those that multiply come first.
    static constexpr u32 MULTIPLIERS = WARPS_M_ * WARPS_N_ * WARP, THREADS = MULTIPLIERS + HELPERS * WARP;
    /// 128 bytes of activations; of 4-bit codes AWQ's group.
    static constexpr int STEP = INT4 ? 128 : 128 / sizeof(X);
    /// Numbers per element of the weight's data.
    static constexpr int PER = INT4 ? 2 : 1;
    /// Rows are an odd number of 16 bytes apart: no bank conflicts.
    static constexpr int RESIDENT = RESIDENT_, X_STAGES = RESIDENT ? 1 : STAGES;
    static constexpr int LDX = (RESIDENT ? RESIDENT : STEP) + 16 / sizeof(X);
    static constexpr int W_ROWS = KN ? STEP : BN, W_COLS = KN ? BN : STEP;
    /// As it is copied, and as it is multiplied.
    static constexpr int LDW = W_COLS / PER + 16 / sizeof(W), LDB = W_COLS + 16 / sizeof(X);
    /// Outputs per block.
    static constexpr int OUTPUTS = PAIRED ? BN / 2 : BN;
    static_assert(!(PAIRED && KN) && !(INT4 && (PAIRED || KN)), "what the kernels need");
};

template <class S>
struct alignas(16) Shared {
    typename S::X x[S::X_STAGES][S::BM * S::LDX];
    typename S::W w[S::STAGES][S::W_ROWS * S::LDW];
    typename S::X wide[S::WIDENS ? S::W_ROWS * S::LDB : 8];
    float x_scales[S::STAGES][S::BM];
    float w_scales[S::STAGES][S::BN];
    u32 flag[4];
    /// Of 4-bit codes: the words that hold an output's scale and zero, and the step's scales.
    u32 half_scales[S::INT4 ? S::STAGES * S::BN : 4], half_zeros[S::INT4 ? S::STAGES * S::BN : 4];
    float step_scales[S::INT4 ? S::BN : 4];
};

/// Enqueues ROWS x COLS elements at `from`, of which `rows` x `cols` are there; zeros for the others.
template <u32 THREADS, int ROWS, int COLS, class T>
DEVICE void copy_tile(T* to, int ld, const T* from, i64 stride, u32 rows, u32 cols, bool is_vectorizable) {
    if (is_vectorizable) {
        constexpr u32 PER = 16 / sizeof(T), CHUNKS = COLS / PER;
        UNROLL for (u32 c = thread_id(); c < ROWS * CHUNKS; c += THREADS) {
            u32 row = c / CHUNKS, col = c % CHUNKS * PER;
            async_copy16(to + row * ld + col, from + row * stride + col, row < rows && col < cols);
        }
    } else {
        for (u32 e = thread_id(); e < u32(ROWS * COLS); e += THREADS) {
            u32 row = e / COLS, col = e % COLS;
            to[row * ld + col] = row < rows && col < cols ? from[row * stride + col] : T{0};
        }
    }
}

/// Four numbers.
DEVICE void widen(bf16* to, const e4m3* from) {
    UNROLL for (int i = 0; i < 4; ++i) to[i] = bf16{u16(bits_of(to_float(from[i])) >> 16)};
}
DEVICE void widen(e4m3*, const e4m3*) {}
DEVICE void widen(bf16*, const bf16*) {}
/// Four whole numbers, which BF16 holds.
DEVICE void widen_int4(bf16* to, const int4x2* from, float zero) {
    const u32 codes = from[0].bits | from[1].bits << 8;
    UNROLL for (int i = 0; i < 4; ++i) to[i] = bf16{u16(bits_of(float(codes >> (4 * i) & 15) - zero) >> 16)};
}

/// F16 numbers are copied with their neighbour, as a word: allocations are of whole ones.
DEVICE const u32* word_of(const f16* at) { return reinterpret_cast<const u32*>(reinterpret_cast<u64>(at) & ~u64(3)); }
DEVICE float half_of(u32 word, const f16* at) { return to_float(f16{u16(word >> (reinterpret_cast<u64>(at) & 2) * 8)}); }

/// Where a block's tile lies.
struct Place {
    u32 t0, n0, head;
};

struct Nothing {
    DEVICE void operator()() const {}
};

/// The sum of one tile over `begin..end` of k, in each warp's registers. `FOLDS`: its ranges' sums, added in order. `bring`: fills a resident x, by all
/// threads, while the first steps of the weight are on their way.
template <class S, bool FOLDS, class Bring = Nothing>
DEVICE void product(
    const Args& a, const Weight& weight, const Place& at, u32 begin, u32 end, Shared<S>& mem, WarpAcc<S::TM, S::TN>& sum, Bring bring = Bring()) {
    typedef typename S::X X;
    typedef typename S::W W;
    const u32 first_row = at.head * a.rows_per_head + a.first_row;
    const u32 rows = a.num_tokens - at.t0, cols = weight.n - at.n0;
    const X* x = static_cast<const X*>(a.x) + at.head * a.x_head_stride + at.t0 * a.x_stride;
    const i64 w_from = S::KN ? first_row * weight.stride + at.n0 : (first_row + at.n0) * weight.stride;
    const W* w = static_cast<const W*>(weight.data) + w_from;
    // Along k, in the weight's blocks.
    const u32 block_k = weight.block[S::KN ? 0 : 1], offset_k = weight.offset[S::KN ? 0 : 1] + (S::KN ? first_row : 0);
    const u32 thread = thread_id();
    const i64 scale_k = S::KN ? weight.scale_stride : 1;
    const float* my_w_scale = nullptr;
    const f16 *half_scales = nullptr, *half_zeros = nullptr;
    const float* my_x_scale = nullptr;
    if (S::INT4) {
        half_scales = static_cast<const f16*>(weight.scales) + at.n0 * weight.scale_stride;
        half_zeros = weight.zeros + at.n0 * weight.zero_stride;
    } else if (S::HAS_W_SCALES) {
        const Weight& mine = S::PAIRED && thread >= S::OUTPUTS ? a.weights[1] : weight;
        const u32 n = at.n0 + thread % S::OUTPUTS + (S::KN ? 0 : first_row) + mine.offset[S::KN ? 1 : 0];
        my_w_scale = static_cast<const float*>(mine.scales) + n / mine.block[S::KN ? 1 : 0] * (S::KN ? 1 : mine.scale_stride);
    }
    if (S::HAS_X_SCALES) my_x_scale = a.x_scales + (at.t0 + thread) * a.x_scale_stride;

    auto enqueue = [&](u32 slot, Steps& steps) {
        if (steps.k < end) {
            const u32 len = steps.end - steps.k;
            if constexpr (!S::RESIDENT) copy_tile<S::THREADS, S::BM, S::STEP>(mem.x[slot], S::LDX, x + steps.k, a.x_stride, rows, len, a.x_is_vectorizable);
            if (S::KN) {
                copy_tile<S::THREADS, S::W_ROWS, S::W_COLS>(mem.w[slot], S::LDW, w + steps.k * weight.stride, weight.stride, len, cols, weight.is_vectorizable);
            } else {
                copy_tile<S::THREADS, S::OUTPUTS, S::W_COLS / S::PER>(mem.w[slot], S::LDW, w + steps.k / S::PER, weight.stride, cols, len / S::PER, weight.is_vectorizable);
            }
            if (S::INT4 && thread < S::BN) {
                async_copy4(&mem.half_scales[slot * S::BN + thread], word_of(half_scales + thread * weight.scale_stride + steps.k_block), thread < cols);
                async_copy4(&mem.half_zeros[slot * S::BN + thread], word_of(half_zeros + thread * weight.zero_stride + steps.k_block), thread < cols);
            } else if (S::HAS_W_SCALES && thread < S::BN) {
                async_copy4(&mem.w_scales[slot][thread], my_w_scale + steps.k_block * scale_k, thread % S::OUTPUTS < cols);
            }
            if constexpr (S::PAIRED) {
                const Weight& right = a.weights[1];
                const W* from = static_cast<const W*>(right.data) + at.n0 * right.stride + steps.k;
                copy_tile<S::THREADS, S::OUTPUTS, S::W_COLS>(mem.w[slot] + S::OUTPUTS * S::LDW, S::LDW, from, right.stride, cols, len, right.is_vectorizable);
            }
            if (S::HAS_X_SCALES && thread < S::BM) async_copy4(&mem.x_scales[slot][thread], my_x_scale + steps.k / 128, thread < rows);
            steps.advance();
        }
        async_commit();
    };

    Steps ahead(begin, end, S::STEP, block_k, offset_k);
    UNROLL for (int s = 0; s < S::STAGES - 1; ++s) enqueue(s, ahead);
    bring();
    WarpAcc<S::TM, S::TN> acc;
    acc.clear();
    sum.clear();
    const u32 row0 = warp_id() / S::WARPS_N * S::TM, col0 = warp_id() % S::WARPS_N * S::TN;
    u32 slot = 0, free_slot = S::STAGES - 1, range_end = begin + weight.range_len;
    for (Steps now(begin, end, S::STEP, block_k, offset_k); now.k < end; now.advance()) {
        async_wait<S::STAGES - 2>();
        // This step is there, and nobody reads the one before, whose place is filled next.
        sync_block();
        enqueue(free_slot, ahead);
        const X* b = reinterpret_cast<const X*>(mem.w[slot]);
        if (S::WIDENS) {
            for (u32 c = thread; c < u32(S::W_ROWS * S::W_COLS / 4); c += S::THREADS) {
                u32 row = c / (S::W_COLS / 4), col = c % (S::W_COLS / 4) * 4;
                X* to = mem.wide + row * S::LDB + col;
                const W* from = mem.w[slot] + row * S::LDW + col / S::PER;
                if constexpr (S::INT4) {
                    widen_int4(to, from, half_of(mem.half_zeros[slot * S::BN + row], half_zeros + row * weight.zero_stride + now.k_block));
                } else {
                    widen(to, from);
                }
            }
            if (S::INT4 && thread < S::BN) {
                mem.step_scales[thread] = half_of(mem.half_scales[slot * S::BN + thread], half_scales + thread * weight.scale_stride + now.k_block);
            }
            sync_block();
            b = mem.wide;
        }
        const X* tile_x = S::RESIDENT ? mem.x[0] + row0 * S::LDX + now.k : mem.x[slot] + row0 * S::LDX;
        if (S::HELPERS > 0 && thread >= S::MULTIPLIERS) {
            // Copies only.
        } else if constexpr (S::HAS_W_SCALES) {
            WarpAcc<S::TM, S::TN> part;
            part.clear();
            if constexpr (S::KN) {
                warp_mma_kn<S::STEP>(part, tile_x, S::LDX, b + col0, S::LDB);
            } else {
                warp_mma<S::STEP>(part, tile_x, S::LDX, b + col0 * S::LDB, S::LDB);
            }
            UNROLL for (int i = 0; i < acc.SIZE; ++i) {
                const u32 col = col0 + acc.col(i);
                float scale = S::INT4 ? mem.step_scales[col] : mem.w_scales[slot][col];
                if (S::HAS_X_SCALES) scale *= mem.x_scales[slot][row0 + acc.row(i)];
                acc.v[i] = fma_of(part.v[i], scale, acc.v[i]);
            }
        } else if constexpr (S::KN) {
            warp_mma_kn<S::STEP>(acc, tile_x, S::LDX, b + col0, S::LDB);
        } else {
            warp_mma<S::STEP>(acc, tile_x, S::LDX, b + col0 * S::LDB, S::LDB);
        }
        if (FOLDS && now.end == range_end) {
            UNROLL for (int i = 0; i < acc.SIZE; ++i) sum.v[i] += acc.v[i];
            acc.clear();
            range_end += weight.range_len;
        }
        slot = slot + 1 == S::STAGES ? 0 : slot + 1;
        free_slot = free_slot + 1 == S::STAGES ? 0 : free_slot + 1;
    }
    UNROLL for (int i = 0; i < acc.SIZE; ++i) sum.v[i] += acc.v[i];
}

/// As `product`, of this block's range alone where there are several; true on all threads of the one block per tile that then has the whole
/// sum.
template <class S>
DEVICE bool product_of_ranges(const Args& a, const Weight& weight, const Place& at, Shared<S>& mem, WarpAcc<S::TM, S::TN>& sum) {
    const u32 range = block_z() % a.ranges, ranges = ceil_div(a.k, weight.range_len);
    // The other weight of this launch has more.
    if (range >= ranges) return false;
    product<S, false>(a, weight, at, range * weight.range_len, min_of(a.k, (range + 1) * weight.range_len), mem, sum);
    if (ranges == 1) return true;
    // Each thread reads what threads in its place wrote.
    const u32 number = block_y() * grid_x() + block_x();
    float* partials = a.partials + i64(number) * a.ranges * (S::BM * S::BN) + thread_id();
    const bool multiplies = S::HELPERS == 0 || thread_id() < S::MULTIPLIERS;
    if (multiplies) {
        UNROLL for (int i = 0; i < sum.SIZE; ++i) partials[(range * sum.SIZE + i) * S::MULTIPLIERS] = sum.v[i];
    }
    if (!is_last_block(a.counters + number, ranges, mem.flag[0])) return false;
    sum.clear();
    if (multiplies) {
        for (u32 r = 0; r < ranges; ++r) {
            UNROLL for (int i = 0; i < sum.SIZE; ++i) sum.v[i] += partials[(r * sum.SIZE + i) * S::MULTIPLIERS];
        }
    }
    return true;
}

/// The tile to the weight's `out`, rounded.
template <class S>
DEVICE void store(const Args& a, const Weight& weight, const Place& at, const WarpAcc<S::TM, S::TN>& sum) {
    if (S::HELPERS > 0 && thread_id() >= S::MULTIPLIERS) return;
    const u32 t0 = at.t0 + warp_id() / S::WARPS_N * S::TM, n0 = at.n0 + warp_id() % S::WARPS_N * S::TN;
    UNROLL for (int i = 0; i < sum.SIZE; ++i) {
        const u32 t = t0 + sum.row(i), n = n0 + sum.col(i);
        if (t < a.num_tokens && n < weight.n) store_float(weight.out, weight.out_dtype, t * weight.out_stride + at.head * a.out_head_stride + n, sum.v[i]);
    }
}

enum Ranges {
    /// Nothing is cut.
    ONE,
    /// A block takes all of them.
    FOLDED,
    /// A block takes one.
    SPREAD,
};

/// Grid [tiles of n, of one weight after the other; tiles of t; heads, each with its ranges where they are spread]. True where the block wrote a
/// tile of `out`: one block does per tile.
template <class S, Ranges RANGES>
DEVICE bool linear(const Args& a, Shared<S>& mem) {
    const bool second = block_x() >= a.first_tiles;
    const Weight& weight = a.weights[second ? 1 : 0];
    const u32 tile_n = block_x() - (second ? a.first_tiles : 0);
    const Place at = {block_y() * S::BM, tile_n * S::BN, RANGES == SPREAD ? block_z() / a.ranges : block_z()};
    WarpAcc<S::TM, S::TN> sum;
    bool whole = true;
    if constexpr (RANGES == SPREAD) {
        whole = product_of_ranges<S>(a, weight, at, mem, sum);
    } else {
        product<S, RANGES == FOLDED>(a, weight, at, 0, a.k, mem, sum);
    }
    if (whole) store<S>(a, weight, at, sum);
    return whole;
}

/// A whole kernel.
template <class S, Ranges RANGES>
DEVICE void gemm(const Args& a) {
    linear<S, RANGES>(a, shared<Shared<S>>());
}

// One row tile of 16 for few tokens, many blocks over n; 64 rows, still many blocks; 64 x 128 for prefill.
template <class X, class W, bool KN>
using Short = Shape<X, W, KN, 1, 2, 16, 16, 4>;
template <class X, class W>
using Pair = Shape<X, W, false, 1, 2, 16, 16, 4, true>;
// Of 4-bit codes, whose steps are twice as long.
typedef Shape<bf16, int4x2, false, 1, 2, 16, 16, 4> ShortInt4;
typedef Shape<bf16, int4x2, false, 4, 1, 16, 32, 2> MiddleInt4;
template <class X, class W, bool KN>
using Middle = Shape<X, W, KN, 4, 1, 16, 32, 3>;
template <class X, class W, bool KN>
using Tall = Shape<X, W, KN, 2, 4, 32, 32, 2>;

}  // namespace tile
