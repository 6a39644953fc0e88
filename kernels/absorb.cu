// What stands between the projections and absorbed attention, for few tokens, in one launch; each block has one of two roles:
//
//   rope_cache of all tokens, see rope.cu            blocks of a token: the first for its cache entry, the others for its queries
//   q_latent[t, h, c] = sum_p q[t, h, p] * W_uk[h, p, c] of the first rows, see per_head.cu            a block per tile and head
//
// The second reads the columns of q that the first does not write. Bits as from the kernels of rope.cu and per_head.cu.
//
// Bytes: the weight once per row tile; floor of one rank's W_uk (16 heads of 128 x 512, FP8) at T = 1: 1.05 MB, 0.24 us at 4.3 TB/s.
// Oracle: crates/reference. Tests: conformance::mla_absorb; crates/gpu/tests/fused.rs.
#include "common/latent.cuh"
#include "common/simt.cuh"

namespace absorb {

struct Args {
    tile::Args gemm;
    rope::CacheArgs rope;
    /// The first role's blocks, and of them those of a token.
    u32 rope_blocks, token_blocks;
    /// Threads of an entry's norm.
    u32 norm_threads;
    /// Tiles of columns and of rows.
    u32 tiles_n, tiles_t;
};

template <class Product>
union Shared {
    Product product;
    BlockScratch sum;
};

/// The first role; false for blocks of the second.
DEVICE bool ropes(const Args& a, BlockScratch& sum) {
    if (block_x() >= a.rope_blocks) return false;
    const u32 t = block_x() / a.token_blocks, part = block_x() % a.token_blocks;
    if (part == 0) {
        rope::write_entry(a.rope, t, a.norm_threads, sum);
    } else {
        rope::rotate_queries(a.rope, t, (part - 1) * num_threads() + thread_id());
    }
    return true;
}

DEVICE tile::Place place(const Args& a, u32 rows, u32 cols) {
    const u32 number = block_x() - a.rope_blocks, tile = number / a.tiles_n;
    return {tile % a.tiles_t * rows, number % a.tiles_n * cols, tile / a.tiles_t};
}

template <class S>
DEVICE void of_tiles(const Args& a) {
    Shared<tile::Shared<S>>& mem = shared<Shared<tile::Shared<S>>>();
    if (ropes(a, mem.sum)) return;
    const tile::Place at = place(a, S::BM, S::BN);
    WarpAcc<S::TM, S::TN> sum;
    tile::product<S, false>(a.gemm, a.gemm.weights[0], at, 0, a.gemm.k, mem.product, sum);
    tile::store<S>(a.gemm, a.gemm.weights[0], at, sum);
}

DEVICE void of_numbers(const Args& a) {
    Shared<simt::Shared>& mem = shared<Shared<simt::Shared>>();
    if (ropes(a, mem.sum)) return;
    simt::product<8>(a.gemm, a.gemm.weights[0], place(a, simt::BM, simt::BN), mem.product);
}

}  // namespace absorb

R1_KERNEL(mla_absorb_simt, absorb::Args, absorb::of_numbers, 8)
R1_KERNEL(mla_absorb_w8_short, absorb::Args, (absorb::of_tiles<tile::Short<bf16, e4m3, true>>), 2)
R1_KERNEL(mla_absorb_w8_middle, absorb::Args, (absorb::of_tiles<tile::Middle<bf16, e4m3, true>>), 4)
R1_KERNEL(mla_absorb_bf16_short, absorb::Args, (absorb::of_tiles<tile::Short<bf16, bf16, true>>), 2)
R1_KERNEL(mla_absorb_bf16_middle, absorb::Args, (absorb::of_tiles<tile::Middle<bf16, bf16, true>>), 4)
