// Pairs of a token and one of its experts, grouped by expert: what the grouped products of experts.cu walk over. Made on the device, since the
// host does not know the choice; shared by route.cu, whose last block sorts what was chosen, and experts.cu.
#pragma once
#include "gpu.cuh"

namespace moe {

constexpr u32 MAX_EXPERTS = 512;

/// Rows `order[start..start + count]` of one expert; the shared expert is number `num_local`.
struct Tile {
    u32 expert, start, count;
};

/// Pair `t * top_k + j` is choice j of token t, pair `num_tokens * top_k + t` the shared expert's of token t.
struct SortArgs {
    const u32* ids;
    i64 ids_stride;
    u32* num_tiles;
    Tile* tiles;
    u32* order;
    /// Experts `first..first + num_local` are here; other choices are left out.
    u32 num_tokens, top_k, first, num_local;
    u32 tile_rows, has_shared;
};

struct SortShared {
    u32 count[MAX_EXPERTS];
    u32 start[MAX_EXPERTS];
    u32 next[MAX_EXPERTS];
    u32 first_tile[MAX_EXPERTS];
    u32 total_rows, total_tiles;
};

/// Sum of the lanes before this one.
DEVICE u32 lanes_before(u32 x) {
    const u32 own = x;
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        const u32 other = shuffle(x, lane_id() - distance);
        if (lane_id() >= distance) x += other;
    }
    return x - own;
}

/// One block. The order inside an expert is any: no row looks at another one.
DEVICE void sort(const SortArgs& a, SortShared& s) {
    const u32 pairs = a.num_tokens * a.top_k;
    auto local_of = [&](u32 pair) {
        // Wraps for experts below the first.
        return a.ids[pair / a.top_k * a.ids_stride + pair % a.top_k] - a.first;
    };
    for (u32 e = thread_id(); e < a.num_local; e += num_threads()) s.count[e] = 0;
    sync_block();
    for (u32 p = thread_id(); p < pairs; p += num_threads()) {
        const u32 e = local_of(p);
        if (e < a.num_local) atomic_add(&s.count[e], 1);
    }
    sync_block();
    if (warp_id() == 0) {
        const u32 each = ceil_div(a.num_local, WARP), begin = lane_id() * each, end = min_of(begin + each, a.num_local);
        u32 rows = 0, tiles = 0;
        for (u32 e = begin; e < end; ++e) {
            rows += s.count[e];
            tiles += ceil_div(s.count[e], a.tile_rows);
        }
        u32 row = lanes_before(rows), tile = lanes_before(tiles);
        if (lane_id() == WARP - 1) {
            s.total_rows = row + rows;
            s.total_tiles = tile + tiles;
        }
        for (u32 e = begin; e < end; ++e) {
            s.start[e] = row;
            s.next[e] = row;
            s.first_tile[e] = tile;
            row += s.count[e];
            tile += ceil_div(s.count[e], a.tile_rows);
        }
    }
    sync_block();
    for (u32 e = thread_id(); e < a.num_local; e += num_threads()) {
        for (u32 at = 0, tile = s.first_tile[e]; at < s.count[e]; at += a.tile_rows, ++tile) {
            a.tiles[tile] = Tile{e, s.start[e] + at, min_of(a.tile_rows, s.count[e] - at)};
        }
    }
    for (u32 p = thread_id(); p < pairs; p += num_threads()) {
        const u32 e = local_of(p);
        if (e < a.num_local) a.order[atomic_add(&s.next[e], 1)] = p;
    }
    u32 num_tiles = s.total_tiles;
    if (a.has_shared) {
        const u32 shared_tiles = ceil_div(a.num_tokens, a.tile_rows);
        for (u32 i = thread_id(); i < shared_tiles; i += num_threads()) {
            const u32 at = i * a.tile_rows;
            a.tiles[num_tiles + i] = Tile{a.num_local, s.total_rows + at, min_of(a.tile_rows, a.num_tokens - at)};
        }
        for (u32 t = thread_id(); t < a.num_tokens; t += num_threads()) a.order[s.total_rows + t] = pairs + t;
        num_tiles += shared_tiles;
    }
    if (thread_id() == 0) *a.num_tiles = num_tiles;
}

}  // namespace moe
