// Rows moved as they are.
//
// embed:       out[t] = table[ids[t] - first_row], zeros for rows that this shard does not hold
// gather_rows: out[l] = x[rows[l]]
// feed_tokens: ids[t] = drawn[from[t]] where from[t] is not 0xffffffff
// add:         residual[t, d] += x[t, d]
// interleave:  out[l, r * n + i] = x[r, l, i]: what ranks gathered, put together row by row
//
// Traffic: each row once in and once out. Oracle: crates/reference. Test: conformance::{embed, gather_rows, feed_tokens, add}; crates/gpu/tests/ranks.rs.
#include "common/gpu.cuh"

namespace rows {

struct EmbedArgs {
    const u32* ids;
    const void* table;
    void* out;
    i64 table_stride, out_stride;
    u32 first_row, num_rows, dim, table_dtype, out_dtype;
};
/// One block per token.
DEVICE void embed(const EmbedArgs& a) {
    u32 t = block_x();
    // Wraps for ids below the shard, and for 0xffffffff.
    u32 row = a.ids[t] - a.first_row;
    bool here = a.ids[t] >= a.first_row && row < a.num_rows;
    for (u32 d = thread_id(); d < a.dim; d += num_threads()) {
        float value = here ? load_as_float(a.table, a.table_dtype, row * a.table_stride + d) : 0.0f;
        store_float(a.out, a.out_dtype, t * a.out_stride + d, value);
    }
}

struct GatherRowsArgs {
    const void* x;
    const u32* rows;
    void* out;
    i64 x_stride, out_stride;
    u32 dim, dtype;
};
/// One block per row.
DEVICE void gather_rows_of(const GatherRowsArgs& a) {
    u32 l = block_x();
    i64 row = a.rows[l];
    for (u32 d = thread_id(); d < a.dim; d += num_threads()) {
        store_float(a.out, a.dtype, l * a.out_stride + d, load_as_float(a.x, a.dtype, row * a.x_stride + d));
    }
}

struct FeedTokensArgs {
    const u32* drawn;
    const u32* from;
    u32* ids;
    u32 num_tokens;
};
/// One thread per token.
DEVICE void feed(const FeedTokensArgs& a) {
    u32 t = block_x() * num_threads() + thread_id();
    if (t < a.num_tokens && a.from[t] != 0xffffffffu) a.ids[t] = a.drawn[a.from[t]];
}

struct AddArgs {
    void* residual;
    const void* x;
    i64 residual_stride, x_stride;
    u32 dim, residual_dtype, x_dtype;
};
/// One block per row.
DEVICE void add_rows(const AddArgs& a) {
    u32 t = block_x();
    for (u32 d = thread_id(); d < a.dim; d += num_threads()) {
        i64 at = t * a.residual_stride + d;
        float sum = load_as_float(a.residual, a.residual_dtype, at) + load_as_float(a.x, a.x_dtype, t * a.x_stride + d);
        store_float(a.residual, a.residual_dtype, at, sum);
    }
}

struct InterleaveArgs {
    const void* x;
    void* out;
    i64 out_stride;
    u32 num_ranks, num_rows, n, dtype;
};
/// One block per row and rank.
DEVICE void interleave_of(const InterleaveArgs& a) {
    u32 l = block_x(), r = block_y();
    for (u32 i = thread_id(); i < a.n; i += num_threads()) {
        float value = load_as_float(a.x, a.dtype, (i64(r) * a.num_rows + l) * a.n + i);
        store_float(a.out, a.dtype, l * a.out_stride + i64(r) * a.n + i, value);
    }
}

}  // namespace rows

R1_KERNEL(embed_rows, rows::EmbedArgs, rows::embed, 8)
R1_KERNEL(gather_rows, rows::GatherRowsArgs, rows::gather_rows_of, 8)
R1_KERNEL(feed_tokens, rows::FeedTokensArgs, rows::feed, 4)
R1_KERNEL(add, rows::AddArgs, rows::add_rows, 8)
R1_KERNEL(interleave, rows::InterleaveArgs, rows::interleave_of, 8)
