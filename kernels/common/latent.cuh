// The rotation of queries and the write of a token's entry to the paged latent cache: shared by rope.cu and absorb.cu.
#pragma once
#include "eight.cuh"

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

/// Eight columns, number `index` of token `t`'s heads; none beyond the last.
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

/// Token `t`, by the block's first `threads` threads, whole warps with HELD eights per thread at most; every thread of the block calls it. The bits
/// depend on `threads`, which the host derives from the latent's width.
DEVICE void write_entry(const CacheArgs& a, i64 t, u32 threads, BlockScratch& scratch) {
    const Cache& c = a.cache;
    const bool takes_part = thread_id() < threads;
    float held[HELD][EIGHT];
    float squares = 0.0f;
    UNROLL for (u32 i = 0; i < HELD; ++i) {
        u32 column = EIGHT * (thread_id() + i * threads);
        u32 count = takes_part && column < c.latent_dim ? min_of(EIGHT, c.latent_dim - column) : 0;
        load8(a.kv_a, a.kv_dtype, t * a.kv_stride + column, count, a.kv_vectors != 0, held[i]);
        UNROLL for (u32 j = 0; j < EIGHT; ++j) squares = fma_of(held[i][j], held[i][j], squares);
    }
    float inverse = rsqrt_of(block_sum(squares, scratch) / float(c.latent_dim) + a.eps);
    // The same for all threads of the block; no barrier follows.
    u32 slot = a.slots[t];
    if (slot >= c.num_slots) return;
    i64 data = entry(c.data_strides, slot, c.block_size);
    UNROLL for (u32 i = 0; i < HELD; ++i) {
        u32 column = EIGHT * (thread_id() + i * threads);
        u32 count = takes_part && column < c.latent_dim ? min_of(EIGHT, c.latent_dim - column) : 0;
        float weight[EIGHT];
        load8(a.norm, a.norm_dtype, column, count, a.norm_vectors != 0, weight);
        UNROLL for (u32 j = 0; j < EIGHT; ++j) held[i][j] = held[i][j] * inverse * weight[j];
        if (!c.codes) {
            store8(c.data, c.dtype, data + column, count, c.data_vectors != 0, held[i]);
        } else if (takes_part && EIGHT * i * threads < c.latent_dim) {
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

}  // namespace rope
