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
#include "common/latent.cuh"

namespace rope {

/// Blocks in x per token; in y the first for the cache, the others for queries, eight columns per thread.
DEVICE void rope_cache(const CacheArgs& a) {
    if (block_y() == 0) {
        write_entry(a, block_x(), num_threads(), shared<BlockScratch>());
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
