// Experts: out[t] += sum_j weight[t, j] * down_e(silu(gate_e(x_t)) * up_e(x_t)), e = ids[t, j].   x [T, D], gate and up [I, D], down [D, I]
//
// moe_sort        pairs (t, j) grouped by expert, cut into tiles of 16 or 64 rows (common/moe.cuh)
// moe_gate_up_*   a tile of rows times 32 columns of gate and of up; silu, product, and by the last block of 128 columns, E4M3 codes -> hidden
// moe_down_*      a tile of rows of hidden times 64 columns of down -> products [pairs, D] F32; in decode the last block of 64 columns combines
// moe_combine     the weighted sum over j in its order, F32, rounded once
//
//   *_fp8_*   E4M3 rows and weights, part * (x_scale * w_scale) per step of 128      *_w8_*     BF16 rows, E4M3 weights widened exactly
//   *_bf16_*  BF16 both                                                              *_simt     all else, F32
//
// A shared expert is one more expert that has every token. Experts whose weights have another element type than a launch's are another launch's.
// A row's bits do not depend on its tile's height or the other rows: the order over k is the weight's, the order over j the token's.
//
// Bytes: 3 D I per expert that is touched and 64 rows; 6 T k D I FLOPs. Floor of one V3 expert in FP8 (D 7168, I 2048): 44 MB, 10.2 us at 4.3 TB/s; of a layer
// at T = 4096, k = 8 in BF16: 2.9 TFLOP, 3.7 ms at 790 TFLOP/s.
// Oracle: crates/reference. Tests: conformance::{experts, moe_layer}; crates/gpu/tests/experts_alone.rs.
#include "common/moe.cuh"
#include "common/tile.cuh"

namespace experts {

constexpr u32 WARPS = 4, THREADS = WARPS * WARP;
/// Columns of weights per block: of down, or half of gate and half of up.
constexpr u32 COLS = 64, HALF = COLS / 2;
/// Columns that share a scale of an activation.
constexpr u32 GROUP = 128;

struct Matrix {
    const void* data;
    /// Of E4M3 only.
    const float* scales;
    u32 dtype, stride, scale_stride;
    /// Rows and columns that share a scale, and where element (0, 0) lies in its block.
    u32 block[2], offset[2];
    u32 is_vectorizable;
};

/// One row of the layer's table.
struct Expert {
    Matrix gate, up, down;
};

struct Args {
    const Expert* experts;
    const u32* num_tiles;
    const moe::Tile* tiles;
    const u32* order;
    /// Activations of gate and up, [T, dim]; of down, `hidden`.
    const void* x;
    const float* x_scales;
    i64 x_stride, x_scale_stride;
    /// [pairs, hidden_stride].
    void* hidden;
    e4m3* hidden_codes;
    float* hidden_scales;
    /// [pairs, dim].
    float* products;
    const u32* ids;
    const float* weights;
    void* out;
    i64 ids_stride, weights_stride, out_stride;
    /// Of the last block's work, or null where another launch does it.
    u32* counters;
    u32 num_tokens, top_k, first, num_local;
    u32 dim, width, shared_width;
    u32 hidden_stride, hidden_groups;
    u32 x_dtype, x_is_vectorizable, activation_dtype, hidden_dtype, out_dtype;
    /// Bit `1 << dtype` of the weights that this launch applies.
    u32 dtypes;
    /// Hidden states that E4M3 weights will meet are quantised.
    u32 quantizes, power_of_two_scales;
    u32 has_shared;
    Expert shared;
};

// ---- Tiles -----------------------------------------------------------------------------------------------------------------------------
/// Rows X, weights W (the same, or E4M3 widened to BF16), ROWS of them per tile.
template <class X_, class W_, int ROWS_>
struct Form {
    typedef X_ X;
    typedef W_ W;
    static constexpr bool WIDENS = !tile::IsSame<X, W>::value;
    static constexpr bool HAS_W_SCALES = tile::IsSame<W, e4m3>::value, HAS_X_SCALES = tile::IsSame<X, e4m3>::value;
    static constexpr int ROWS = ROWS_, STAGES = ROWS == 16 ? 3 : 2;
    static constexpr int WARPS_M = ROWS == 16 ? 1 : 2, WARPS_N = WARPS / WARPS_M;
    static constexpr int TM = ROWS / WARPS_M, TN = COLS / WARPS_N;
    /// 128 bytes of activations.
    static constexpr int STEP = 128 / sizeof(X);
    /// Rows are an odd number of 16 bytes apart: no bank conflicts.
    static constexpr int LDX = STEP + 16 / sizeof(X), LDW = STEP + 16 / sizeof(W);

    struct Tiles {
        X x[STAGES][ROWS * LDX];
        W w[STAGES][COLS * LDW];
        X wide[WIDENS ? COLS * LDX : 8];
        float x_scales[STAGES][ROWS];
        float w_scales[STAGES][COLS];
    };
};

struct Simt {
    static constexpr int ROWS = 16, STEP = 32;
    struct Tiles {
        float x[ROWS][STEP];
        float w[STEP][COLS + 1];
    };
};

template <class F>
struct alignas(16) Shared {
    union {
        typename F::Tiles tiles;
        /// The block's product, over the tiles it was made of.
        float result[F::ROWS][COLS + 1];
    };
    /// Of each row: its pair, and its row of the activations.
    u32 pair[F::ROWS], source[F::ROWS];
    u32 flag;
};

/// Activations and weights of a block: columns `n0..` of `low`, and in the upper half of the tile those of `high`.
struct Operands {
    const void* x;
    const float* x_scales;
    i64 x_stride, x_scale_stride;
    u32 x_dtype, x_is_vectorizable;
    const Matrix *low, *high;
    /// Columns per half, how many there are at all, and the length of the sum.
    u32 half, n0, n, k;
    u32 rows;

    DEVICE const Matrix& matrix(u32 col) const { return col < half ? *low : *high; }
    DEVICE u32 column(u32 col) const { return n0 + (col < half ? col : col - half); }
};

template <u32 STEP, class T, class At>
DEVICE void copy_rows(T* to, u32 ld, u32 rows, u32 len, bool is_vectorizable, At at) {
    if (is_vectorizable) {
        constexpr u32 PER = 16 / sizeof(T), CHUNKS = STEP / PER;
        for (u32 c = thread_id(); c < rows * CHUNKS; c += THREADS) {
            const u32 row = c / CHUNKS, col = c % CHUNKS * PER;
            const T* from = at(row);
            async_copy16(to + row * ld + col, from + col, from && col < len);
        }
    } else {
        for (u32 e = thread_id(); e < rows * STEP; e += THREADS) {
            const u32 row = e / STEP, col = e % STEP;
            const T* from = at(row);
            to[row * ld + col] = from && col < len ? from[col] : T{0};
        }
    }
}

/// The block's product, to `mem.result`; complete after a barrier.
template <class F>
DEVICE void multiply(const Operands& o, Shared<F>& mem) {
    typedef typename F::X X;
    typedef typename F::W W;
    typename F::Tiles& tiles = mem.tiles;
    const Matrix& low = *o.low;
    // Steps begin at multiples of 16 bytes only where the scales' blocks do.
    const bool is_aligned = (low.block[1] % 16 == 0 && low.offset[1] % 16 == 0) || !F::HAS_W_SCALES;
    const bool w_is_vectorizable = is_aligned && low.is_vectorizable && o.high->is_vectorizable;
    const bool x_is_vectorizable = is_aligned && o.x_is_vectorizable;
    const u32 thread = thread_id();
    // A thread fetches the scale of one column, another one that of a row.
    const float* my_scale = nullptr;
    if (F::HAS_W_SCALES && thread < COLS && o.column(thread) < o.n) {
        const Matrix& matrix = o.matrix(thread);
        my_scale = matrix.scales + i64((o.column(thread) + matrix.offset[0]) / matrix.block[0]) * matrix.scale_stride;
    }
    const u32 my_row = thread - COLS;
    if (F::HAS_X_SCALES && thread >= COLS && my_row < o.rows) my_scale = o.x_scales + mem.source[my_row] * o.x_scale_stride;

    auto enqueue = [&](u32 slot, tile::Steps& steps) {
        if (steps.k < o.k) {
            const u32 len = steps.end - steps.k;
            copy_rows<F::STEP>(tiles.x[slot], F::LDX, F::ROWS, len, x_is_vectorizable, [&](u32 row) {
                return row < o.rows ? static_cast<const X*>(o.x) + mem.source[row] * o.x_stride + steps.k : nullptr;
            });
            copy_rows<F::STEP>(tiles.w[slot], F::LDW, COLS, len, w_is_vectorizable, [&](u32 col) {
                const Matrix& matrix = o.matrix(col);
                return o.column(col) < o.n ? static_cast<const W*>(matrix.data) + i64(o.column(col)) * matrix.stride + steps.k : nullptr;
            });
            if (F::HAS_W_SCALES && thread < COLS) async_copy4(&tiles.w_scales[slot][thread], my_scale + steps.k_block, my_scale);
            if (F::HAS_X_SCALES && thread >= COLS && my_row < F::ROWS) async_copy4(&tiles.x_scales[slot][my_row], my_scale + steps.k / GROUP, my_scale);
            steps.advance();
        }
        async_commit();
    };

    WarpAcc<F::TM, F::TN> acc;
    acc.clear();
    tile::Steps ahead(0, o.k, F::STEP, low.block[1], low.offset[1]);
    UNROLL for (int s = 0; s < F::STAGES - 1; ++s) enqueue(s, ahead);
    const u32 row0 = warp_id() / F::WARPS_N * F::TM, col0 = warp_id() % F::WARPS_N * F::TN;
    u32 slot = 0, free_slot = F::STAGES - 1;
    for (tile::Steps now(0, o.k, F::STEP, low.block[1], low.offset[1]); now.k < o.k; now.advance()) {
        async_wait<F::STAGES - 2>();
        // This step is there, and nobody reads the one before, whose place is filled next.
        sync_block();
        enqueue(free_slot, ahead);
        const X* b = reinterpret_cast<const X*>(tiles.w[slot]);
        if (F::WIDENS) {
            for (u32 c = thread; c < COLS * F::STEP / 4; c += THREADS) {
                const u32 row = c / (F::STEP / 4), col = c % (F::STEP / 4) * 4;
                tile::widen(tiles.wide + row * F::LDX + col, tiles.w[slot] + row * F::LDW + col);
            }
            sync_block();
            b = tiles.wide;
        }
        const X* a = tiles.x[slot] + row0 * F::LDX;
        if constexpr (F::HAS_W_SCALES) {
            WarpAcc<F::TM, F::TN> part;
            part.clear();
            warp_mma<F::STEP>(part, a, F::LDX, b + col0 * F::LDX, F::LDX);
            UNROLL for (int i = 0; i < acc.SIZE; ++i) {
                float scale = tiles.w_scales[slot][col0 + acc.col(i)];
                if (F::HAS_X_SCALES) scale *= tiles.x_scales[slot][row0 + acc.row(i)];
                acc.v[i] = fma_of(part.v[i], scale, acc.v[i]);
            }
        } else {
            warp_mma<F::STEP>(acc, a, F::LDX, b + col0 * F::LDX, F::LDX);
        }
        slot = slot + 1 == F::STAGES ? 0 : slot + 1;
        free_slot = free_slot + 1 == F::STAGES ? 0 : free_slot + 1;
    }
    // The result takes the tiles' place.
    sync_block();
    UNROLL for (int i = 0; i < acc.SIZE; ++i) mem.result[row0 + acc.row(i)][col0 + acc.col(i)] = acc.v[i];
}

/// Element types at run time; weights are dequantised on the way to shared memory.
template <>
DEVICE void multiply<Simt>(const Operands& o, Shared<Simt>& mem) {
    constexpr u32 STEP = Simt::STEP, ROWS_APART = THREADS / COLS;
    constexpr int MINE = Simt::ROWS / ROWS_APART;
    Simt::Tiles& tiles = mem.tiles;
    const u32 thread = thread_id(), my_col = thread % COLS, my_row = thread / COLS;
    float acc[MINE];
    UNROLL for (int i = 0; i < MINE; ++i) acc[i] = 0.0f;
    for (u32 k0 = 0; k0 < o.k; k0 += STEP) {
        const u32 len = min_of(STEP, o.k - k0);
        for (u32 e = thread; e < o.rows * STEP; e += THREADS) {
            const u32 row = e / STEP, k = e % STEP;
            if (k < len) tiles.x[row][k] = load_as_float(o.x, o.x_dtype, mem.source[row] * o.x_stride + k0 + k);
        }
        for (u32 e = thread; e < COLS * STEP; e += THREADS) {
            const u32 col = e / STEP, k = e % STEP, n = o.column(col);
            if (n >= o.n || k >= len) continue;
            const Matrix& matrix = o.matrix(col);
            float value = load_as_float(matrix.data, matrix.dtype, i64(n) * matrix.stride + k0 + k);
            if (matrix.dtype == DTYPE_E4M3) {
                const u32 block_row = (n + matrix.offset[0]) / matrix.block[0], block_col = (k0 + k + matrix.offset[1]) / matrix.block[1];
                value *= matrix.scales[i64(block_row) * matrix.scale_stride + block_col];
            }
            tiles.w[k][col] = value;
        }
        sync_block();
        for (u32 k = 0; k < len; ++k) {
            const float w = tiles.w[k][my_col];
            UNROLL for (int i = 0; i < MINE; ++i) {
                const u32 row = my_row + i * ROWS_APART;
                if (row < o.rows) acc[i] = fma_of(tiles.x[row][k], w, acc[i]);
            }
        }
        sync_block();
    }
    UNROLL for (int i = 0; i < MINE; ++i) mem.result[my_row + i * ROWS_APART][my_col] = acc[i];
}

/// The rows of a tile; complete after a barrier. `of_pairs`: activations have a row per pair, not per token.
template <class F>
DEVICE void find_rows(const Args& a, const moe::Tile& tile, bool of_pairs, Shared<F>& mem) {
    if (thread_id() < tile.count) {
        const u32 pair = a.order[tile.start + thread_id()], pairs = a.num_tokens * a.top_k;
        mem.pair[thread_id()] = pair;
        mem.source[thread_id()] = of_pairs ? pair : pair < pairs ? pair / a.top_k : pair - pairs;
    }
}

DEVICE const Expert& expert_of(const Args& a, const moe::Tile& tile) { return tile.expert < a.num_local ? a.experts[tile.expert] : a.shared; }
DEVICE bool applies(const Args& a, const Matrix& matrix) { return a.dtypes >> matrix.dtype & 1; }

// ---- Gate and up -----------------------------------------------------------------------------------------------------------------------
/// Codes of `count` values of a row, one group: a warp.
DEVICE void quantize_group(const Args& a, i64 row, u32 n0, u32 count) {
    constexpr u32 EACH = GROUP / WARP;
    float value[EACH], amax = 1e-4f;
    UNROLL for (u32 i = 0; i < EACH; ++i) {
        const u32 n = lane_id() + i * WARP;
        value[i] = n < count ? load_as_float(a.hidden, a.hidden_dtype, row * a.hidden_stride + n0 + n) : 0.0f;
        amax = max_of(amax, __builtin_fabsf(value[i]));
    }
    float scale = warp_max(amax) / 448.0f;
    if (a.power_of_two_scales) scale = float_of((bits_of(scale) + 0x7fffff) & 0x7f800000u);
    UNROLL for (u32 i = 0; i < EACH; ++i) {
        const u32 n = lane_id() + i * WARP;
        if (n < count) a.hidden_codes[row * a.hidden_stride + n0 + n] = from_float<e4m3>(value[i] / scale);
    }
    if (lane_id() == 0) a.hidden_scales[row * a.hidden_groups + n0 / GROUP] = scale;
}

/// Grid [columns / HALF, tiles].
template <class F>
DEVICE void gate_up(const Args& a) {
    if (block_y() >= *a.num_tiles) return;
    const moe::Tile tile = a.tiles[block_y()];
    const Expert& expert = expert_of(a, tile);
    // Rounded in between as by an MLP of its own, since codes of FP8 are coarse.
    const bool is_shared = tile.expert >= a.num_local;
    const u32 width = is_shared ? a.shared_width : a.width, n0 = block_x() * HALF;
    if (n0 >= width || !applies(a, expert.gate)) return;
    Shared<F>& mem = shared<Shared<F>>();
    find_rows(a, tile, false, mem);
    sync_block();
    Operands o = {a.x, a.x_scales, a.x_stride, a.x_scale_stride, a.x_dtype, a.x_is_vectorizable, &expert.gate, &expert.up, HALF, n0, width, a.dim, tile.count};
    multiply<F>(o, mem);
    sync_block();
    for (u32 e = thread_id(); e < tile.count * HALF; e += THREADS) {
        const u32 row = e / HALF, col = e % HALF;
        if (n0 + col >= width) continue;
        float gate = mem.result[row][col], up = mem.result[row][HALF + col];
        if (is_shared) {
            gate = rounded_to(a.activation_dtype, gate);
            up = rounded_to(a.activation_dtype, up);
        }
        float value = gate / (1.0f + exp_of(-gate)) * up;
        if (is_shared) value = rounded_to(a.activation_dtype, value);
        store_float(a.hidden, a.hidden_dtype, i64(mem.pair[row]) * a.hidden_stride + n0 + col, value);
    }
    if (!a.quantizes || expert.down.dtype != DTYPE_E4M3) return;
    const u32 group = n0 / GROUP, count = min_of(GROUP, width - group * GROUP);
    u32* counter = a.counters + block_y() * a.hidden_groups + group;
    if (is_last_block(counter, ceil_div(count, HALF), mem.flag)) {
        for (u32 row = warp_id(); row < tile.count; row += WARPS) quantize_group(a, mem.pair[row], group * GROUP, count);
    }
}

// ---- Down ------------------------------------------------------------------------------------------------------------------------------
DEVICE void combine_at(const Args& a, u32 t, u32 n) {
    const u32 pairs = a.num_tokens * a.top_k;
    float sum = 0.0f;
    for (u32 j = 0; j < a.top_k; ++j) {
        // Wraps for experts below the first.
        if (a.ids[t * a.ids_stride + j] - a.first >= a.num_local) continue;
        sum = fma_of(a.weights[t * a.weights_stride + j], a.products[i64(t * a.top_k + j) * a.dim + n], sum);
    }
    const i64 at = t * a.out_stride + n;
    const float before = a.has_shared ? a.products[i64(pairs + t) * a.dim + n] : load_as_float(a.out, a.out_dtype, at);
    store_float(a.out, a.out_dtype, at, before + sum);
}

/// Grid [columns / COLS, tiles].
template <class F>
DEVICE void down(const Args& a) {
    Shared<F>& mem = shared<Shared<F>>();
    const u32 n0 = block_x() * COLS;
    if (block_y() < *a.num_tiles) {
        const moe::Tile tile = a.tiles[block_y()];
        const Expert& expert = expert_of(a, tile);
        if (applies(a, expert.down)) {
            find_rows(a, tile, true, mem);
            sync_block();
            const u32 width = tile.expert < a.num_local ? a.width : a.shared_width;
            Operands o = {a.x, a.x_scales, a.x_stride, a.x_scale_stride, a.x_dtype, a.x_is_vectorizable, &expert.down, &expert.down, COLS, n0, a.dim, width, tile.count};
            multiply<F>(o, mem);
            sync_block();
            for (u32 e = thread_id(); e < tile.count * COLS; e += THREADS) {
                const u32 row = e / COLS, col = e % COLS;
                if (n0 + col < a.dim) a.products[i64(mem.pair[row]) * a.dim + n0 + col] = mem.result[row][col];
            }
        }
    }
    if (!a.counters) return;
    if (is_last_block(a.counters + block_x(), grid_y(), mem.flag)) {
        for (u32 e = thread_id(); e < a.num_tokens * COLS; e += THREADS) {
            if (n0 + e % COLS < a.dim) combine_at(a, e / COLS, n0 + e % COLS);
        }
    }
}

/// Grid [columns / THREADS, tokens in any number].
DEVICE void combine(const Args& a) {
    const u32 n = block_x() * num_threads() + thread_id();
    if (n >= a.dim) return;
    for (u32 t = block_y(); t < a.num_tokens; t += grid_y()) combine_at(a, t, n);
}

DEVICE void sort(const moe::SortArgs& a) { moe::sort(a, shared<moe::SortShared>()); }

}  // namespace experts

R1_KERNEL(moe_sort, moe::SortArgs, experts::sort, 8)
R1_KERNEL(moe_combine, experts::Args, experts::combine, 4)
R1_KERNEL(moe_gate_up_simt, experts::Args, (experts::gate_up<experts::Simt>), 4)
R1_KERNEL(moe_gate_up_bf16_16, experts::Args, (experts::gate_up<experts::Form<bf16, bf16, 16>>), 4, 7)
R1_KERNEL(moe_gate_up_bf16_64, experts::Args, (experts::gate_up<experts::Form<bf16, bf16, 64>>), 4)
R1_KERNEL(moe_gate_up_w8_16, experts::Args, (experts::gate_up<experts::Form<bf16, e4m3, 16>>), 4, 6)
R1_KERNEL(moe_gate_up_w8_64, experts::Args, (experts::gate_up<experts::Form<bf16, e4m3, 64>>), 4)
R1_KERNEL(moe_gate_up_fp8_16, experts::Args, (experts::gate_up<experts::Form<e4m3, e4m3, 16>>), 4)
R1_KERNEL(moe_gate_up_fp8_64, experts::Args, (experts::gate_up<experts::Form<e4m3, e4m3, 64>>), 4)
R1_KERNEL(moe_down_simt, experts::Args, (experts::down<experts::Simt>), 4)
R1_KERNEL(moe_down_bf16_16, experts::Args, (experts::down<experts::Form<bf16, bf16, 16>>), 4)
R1_KERNEL(moe_down_bf16_64, experts::Args, (experts::down<experts::Form<bf16, bf16, 64>>), 4)
R1_KERNEL(moe_down_w8_16, experts::Args, (experts::down<experts::Form<bf16, e4m3, 16>>), 4)
R1_KERNEL(moe_down_w8_64, experts::Args, (experts::down<experts::Form<bf16, e4m3, 64>>), 4)
R1_KERNEL(moe_down_fp8_16, experts::Args, (experts::down<experts::Form<e4m3, e4m3, 16>>), 4)
R1_KERNEL(moe_down_fp8_64, experts::Args, (experts::down<experts::Form<e4m3, e4m3, 64>>), 4)
