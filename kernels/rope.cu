// RoPE, the latent norm, and the paged latent cache.
//
// rope_cache:    q_rope[t, h] = rotate(q_rope[t, h], positions[t]), in place; the entry at slots[t] becomes
//                [rms_norm(kv_a[t, :C]) * norm | rotate(kv_a[t, C:])]; a slot that the cache does not have (0xffffffff) gets nothing
// gather_latent: out[context_start[s] - context_start[first] + p] = the entry of sequence s at position p
//
// rotate takes interleaved pairs: (x, y) -> (x cos - y sin, y cos + x sin), with R / 2 cosines, then R / 2 sines per position.
// q_rope [T, H, R] (strided), kv_a [T, C + R], out [N, C + R] F32 or BF16, norm [C] F32, BF16 or F16. The cache is dense,
// [num_blocks, block_size, C + R] F32 or BF16, or FP8: codes [.., C], a scale per 128 channels F32 [.., ceil(C / 128)] from the normed values
// in F32, rotated keys BF16 [.., R].
//
// Traffic: rope_cache moves 4 T H R + 4 T (C + R) bytes of BF16 (T = 1, H = 16: 6 KB, a launch's latency), gather_latent each entry once in
// and once out: 100,000 tokens of 1,152 bytes cannot beat 54 us at 4.3 TB/s (H200, measured copy).
// Oracle: crates/reference. Test: conformance::{rope_cache, gather_latent}, crates/gpu/tests/norm_bits.rs.
#include "common/eight.cuh"

namespace rope {

/// Eights of a latent row that a thread keeps in registers between the sum and the result.
constexpr u32 HELD = 4;

/// A latent cache; dense where `codes.codes` is null. Strides are those of blocks and of the entries in them.
struct Cache {
    /// Dense entries, or rotated keys.
    void* data;
    e4m3* codes;
    float* scales;
    i64 data_strides[2], codes_strides[2], scales_strides[2];
    u32 num_slots, block_size, latent_dim, rope_dim;
    u32 dtype, data_vectors, codes_vectors, unused;
};
DEVICE i64 entry(const i64 (&strides)[2], u32 slot, u32 block_size) {
    return i64(slot / block_size) * strides[0] + i64(slot % block_size) * strides[1];
}
DEVICE u32 eights_of(u32 dim) { return ceil_div(dim, EIGHT); }

/// Rotates columns `column..column + count` of a vector of `dim`.
DEVICE void rotate8(float (&v)[EIGHT], const float* cos_sin, u32 column, u32 count, u32 dim) {
    UNROLL for (u32 j = 0; j < EIGHT; j += 2) {
        if (j < count) {
            float cosine = cos_sin[(column + j) / 2], sine = cos_sin[dim / 2 + (column + j) / 2];
            float x = v[j], y = v[j + 1];
            v[j] = x * cosine - y * sine;
            v[j + 1] = y * cosine + x * sine;
        }
    }
}

struct CacheArgs {
    void* q_rope;
    const void* kv_a;
    const void* norm;
    const float* cos_sin;
    const u32* positions;
    const u32* slots;
    Cache cache;
    i64 q_token_stride, q_head_stride, kv_stride, cos_sin_stride;
    u32 heads, q_dtype, kv_dtype, norm_dtype;
    u32 q_vectors, kv_vectors, norm_vectors;
    float eps;
};

struct Shared {
    BlockScratch sum;
};

DEVICE void rotate_queries(const CacheArgs& a, i64 t, u32 index) {
    u32 dim = a.cache.rope_dim, per_head = eights_of(dim);
    u32 head = index / per_head, column = EIGHT * (index % per_head);
    if (head >= a.heads) return;
    u32 count = min_of(EIGHT, dim - column);
    i64 at = t * a.q_token_stride + head * a.q_head_stride + column;
    float v[EIGHT];
    load8(a.q_rope, a.q_dtype, at, count, a.q_vectors != 0, v);
    rotate8(v, a.cos_sin + a.positions[t] * a.cos_sin_stride, column, count, dim);
    store8(a.q_rope, a.q_dtype, at, count, a.q_vectors != 0, v);
}

DEVICE void write_entry(const CacheArgs& a, i64 t) {
    Shared& s = shared<Shared>();
    const Cache& c = a.cache;
    float held[HELD][EIGHT];
    float squares = 0.0f;
    UNROLL for (u32 i = 0; i < HELD; ++i) {
        u32 column = EIGHT * (thread_id() + i * num_threads());
        u32 count = column < c.latent_dim ? min_of(EIGHT, c.latent_dim - column) : 0;
        load8(a.kv_a, a.kv_dtype, t * a.kv_stride + column, count, a.kv_vectors != 0, held[i]);
        UNROLL for (u32 j = 0; j < EIGHT; ++j) squares = fma_of(held[i][j], held[i][j], squares);
    }
    float inverse = rsqrt_of(block_sum(squares, s.sum) / float(c.latent_dim) + a.eps);
    // The same for all threads of the block; no barrier follows.
    u32 slot = a.slots[t];
    if (slot >= c.num_slots) return;
    i64 data = entry(c.data_strides, slot, c.block_size);
    UNROLL for (u32 i = 0; i < HELD; ++i) {
        u32 column = EIGHT * (thread_id() + i * num_threads());
        u32 count = column < c.latent_dim ? min_of(EIGHT, c.latent_dim - column) : 0;
        float weight[EIGHT];
        load8(a.norm, a.norm_dtype, column, count, a.norm_vectors != 0, weight);
        UNROLL for (u32 j = 0; j < EIGHT; ++j) held[i][j] = held[i][j] * inverse * weight[j];
        if (!c.codes) {
            store8(c.data, c.dtype, data + column, count, c.data_vectors != 0, held[i]);
        } else if (EIGHT * i * num_threads() < c.latent_dim) {
            Fp8Out to = {c.codes + entry(c.codes_strides, slot, c.block_size),
                         c.scales + entry(c.scales_strides, slot, c.block_size), 0, 0, 0, c.codes_vectors};
            store_quantized(to, 0, column, count, held[i]);
        }
    }
    // Rotated keys stand behind the latent, or in a tensor of their own.
    if (!c.codes) data += c.latent_dim;
    bool from_vectors = a.kv_vectors && c.latent_dim % EIGHT == 0, to_vectors = c.data_vectors && (c.codes || c.latent_dim % EIGHT == 0);
    // From the last thread on, which has least of the latent.
    for (u32 column = EIGHT * (num_threads() - 1 - thread_id()); column < c.rope_dim; column += EIGHT * num_threads()) {
        u32 count = min_of(EIGHT, c.rope_dim - column);
        float v[EIGHT];
        load8(a.kv_a, a.kv_dtype, t * a.kv_stride + c.latent_dim + column, count, from_vectors, v);
        rotate8(v, a.cos_sin + a.positions[t] * a.cos_sin_stride, column, count, c.rope_dim);
        store8(c.data, c.dtype, data + column, count, to_vectors, v);
    }
}

/// Blocks in x per token; in y the first for the cache, the others for queries, eight columns per thread.
DEVICE void rope_cache(const CacheArgs& a) {
    if (block_y() == 0) {
        write_entry(a, block_x());
    } else {
        rotate_queries(a, block_x(), (block_y() - 1) * num_threads() + thread_id());
    }
}

struct GatherArgs {
    Cache cache;
    const u32* block_table;
    const u32* context_start;
    void* out;
    i64 table_stride, out_stride;
    u32 first_seq, end_seq, out_dtype, out_vectors;
};

/// One block per row of `out`; rows past the last sequence's are left alone.
DEVICE void gather(const GatherArgs& a) {
    const Cache& c = a.cache;
    u32 row = block_x(), base = a.context_start[a.first_seq];
    // The first sequence that ends behind the row.
    u32 low = a.first_seq, high = a.end_seq;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (a.context_start[middle + 1] - base > row) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    if (low == a.end_seq) return;
    u32 position = row - (a.context_start[low] - base);
    u32 slot = a.block_table[low * a.table_stride + position / c.block_size] * c.block_size + position % c.block_size;
    i64 data = entry(c.data_strides, slot, c.block_size), out = row * a.out_stride;
    u32 dense_dim = c.latent_dim + c.rope_dim;
    if (c.codes) {
        const e4m3* codes = c.codes + entry(c.codes_strides, slot, c.block_size);
        const float* scales = c.scales + entry(c.scales_strides, slot, c.block_size);
        for (u32 column = EIGHT * thread_id(); column < c.latent_dim; column += EIGHT * num_threads()) {
            u32 count = min_of(EIGHT, c.latent_dim - column);
            float v[EIGHT];
            load8_e4m3(codes, column, count, c.codes_vectors != 0, v);
            UNROLL for (u32 j = 0; j < EIGHT; ++j) v[j] *= scales[column / FP8_GROUP];
            store8(a.out, a.out_dtype, out + column, count, a.out_vectors != 0, v);
        }
        out += c.latent_dim;
        dense_dim = c.rope_dim;
    }
    bool to_vectors = a.out_vectors && (!c.codes || c.latent_dim % EIGHT == 0);
    for (u32 column = EIGHT * thread_id(); column < dense_dim; column += EIGHT * num_threads()) {
        u32 count = min_of(EIGHT, dense_dim - column);
        float v[EIGHT];
        load8(c.data, c.dtype, data + column, count, c.data_vectors != 0, v);
        store8(a.out, a.out_dtype, out + column, count, to_vectors, v);
    }
}

}  // namespace rope

R1_KERNEL(rope_cache, rope::CacheArgs, rope::rope_cache, 4)
R1_KERNEL(gather_latent, rope::GatherArgs, rope::gather, 4)
