// The choice of experts. Logits [T, E] F32, bias [E] F32, ids [T, k] U32, weights [T, k] F32, best first.
//
//   score = softmax(logits) or sigmoid(logits); choice = score + bias; groups that lose: choice = -inf; ids = top-k of choice, the lower one among
//   equals; weight = score[id] (/ (their sum + 1e-20)) * scaling factor.      DeepSeek-V3 report, section 2.1.2 (arXiv:2412.19437)
//
// moe_route      one warp per token. Bytes: 4 T E, nothing beside the launch itself; the floor is the launch
// moe_router_*   for few tokens in one launch: the logits, a linear as in gemm.cu; by the last blocks of a tile of tokens the choice; by the last of these
//                the pairs sorted by expert (common/moe.cuh). Bytes: the router's matrix, 3.7 MB of BF16 for 256 experts of V3, 0.9 us at 4.3 TB/s (H200,
//                measured copy)
//
// Oracle: crates/reference. Tests: conformance::{route, route_ties, route_not_finite, moe_layer}; crates/gpu/tests/fused.rs.
#include "common/moe.cuh"
#include "common/simt.cuh"

namespace route {

constexpr u32 MAX_EXPERTS = moe::MAX_EXPERTS;

struct Args {
    const float* logits;
    /// Or null.
    const float* bias;
    u32* ids;
    float* weights;
    i64 logits_stride, ids_stride, weights_stride;
    u32 num_tokens, num_experts, top_k;
    /// No groups: n_group == 0.
    u32 n_group, topk_group;
    u32 is_softmax, is_top_two, is_normed;
    float scaling_factor;
};

/// Of one warp's choice.
struct Choice {
    float scores[MAX_EXPERTS];
    /// What experts are chosen by; NaN once they are.
    float choice[MAX_EXPERTS];
    /// Of groups; NaN once they are chosen.
    float worth[MAX_EXPERTS];
    u32 chosen[MAX_EXPERTS];
};

/// Index of the largest of `count` values, the lowest among equals; it becomes NaN, which is never taken again. Each lane looks at, and
/// marks, indices of its own.
DEVICE u32 take_best(float* values, u32 count) {
    float most = -INFINITE;
    u32 index = count;
    for (u32 i = lane_id(); i < count; i += WARP) {
        const float value = values[i];
        if (value == value && (index == count || value > most)) {
            most = value;
            index = i;
        }
    }
    const float best = warp_max(most);
    // As a float, an index is exact.
    const float first = -warp_max(index != count && most == best ? -float(index) : -INFINITE);
    const u32 taken = u32(first);
    if (taken == index) values[taken] = float_of(0x7fc00000u);
    return taken;
}

DEVICE void mask_groups(const Args& a, Choice& s) {
    const u32 per_group = a.num_experts / a.n_group;
    // Experts of a group were written by other lanes.
    sync_warp();
    for (u32 g = lane_id(); g < a.n_group; g += WARP) {
        float first = -INFINITE, second = -INFINITE;
        for (u32 i = 0; i < per_group; ++i) {
            // Lanes begin at different banks.
            const float score = s.choice[g * per_group + (i + g) % per_group];
            if (score > first) {
                second = first;
                first = score;
            } else if (score > second) {
                second = score;
            }
        }
        s.worth[g] = a.is_top_two && per_group > 1 ? first + second : first;
    }
    for (u32 i = 0; i < a.topk_group; ++i) take_best(s.worth, a.n_group);
    sync_warp();
    for (u32 e = lane_id(); e < a.num_experts; e += WARP) {
        const float worth = s.worth[e / per_group];
        if (worth == worth) s.choice[e] = -INFINITE;
    }
}

/// Of token `t`, by one warp.
DEVICE void choose(const Args& a, u32 t, Choice& s) {
    const float* logits = a.logits + t * a.logits_stride;
    float most = 0.0f, sum = 1.0f;
    if (a.is_softmax) {
        most = -INFINITE;
        for (u32 e = lane_id(); e < a.num_experts; e += WARP) most = max_of(most, logits[e]);
        most = warp_max(most);
        sum = 0.0f;
        for (u32 e = lane_id(); e < a.num_experts; e += WARP) sum += exp_of(logits[e] - most);
        sum = warp_sum(sum);
    }
    for (u32 e = lane_id(); e < a.num_experts; e += WARP) {
        const float score = a.is_softmax ? exp_of(logits[e] - most) / sum : 1.0f / (1.0f + exp_of(-logits[e]));
        const float biased = score + (a.bias ? a.bias[e] : 0.0f);
        s.scores[e] = score;
        // NaN loses against everything and still leaves every id in range.
        s.choice[e] = biased == biased ? biased : -INFINITE;
    }
    if (a.n_group) mask_groups(a, s);
    for (u32 j = 0; j < a.top_k; ++j) {
        const u32 best = take_best(s.choice, a.num_experts);
        if (lane_id() == 0) s.chosen[j] = best;
    }
    sync_warp();
    float total = 1.0f;
    if (a.is_normed) {
        total = 0.0f;
        for (u32 j = 0; j < a.top_k; ++j) total += s.scores[s.chosen[j]];
        total += 1e-20f;
    }
    for (u32 j = lane_id(); j < a.top_k; j += WARP) {
        const u32 id = s.chosen[j];
        a.ids[t * a.ids_stride + j] = id;
        a.weights[t * a.weights_stride + j] = s.scores[id] / total * a.scaling_factor;
    }
}

DEVICE void alone(const Args& a) { choose(a, block_x(), shared<Choice>()); }

struct RouterArgs {
    tile::Args gemm;
    Args route;
    moe::SortArgs sort;
    /// One per tile of tokens, and one more.
    u32* counters;
    /// Blocks of a tile of tokens that stay for the choice.
    u32 finishers;
};

/// Warps of a block that choose.
constexpr u32 CHOOSERS = 2;

template <class Product>
struct RouterShared {
    union {
        Product product;
        Choice choices[CHOOSERS];
        moe::SortShared sort;
    };
    u32 flag[4];
};

/// After a tile of `rows` tokens is written.
template <class Product>
DEVICE void finish(const RouterArgs& a, u32 rows, RouterShared<Product>& mem) {
    const u32 number = finisher(a.counters + block_y(), grid_x(), a.finishers, mem.flag[0]);
    if (number == NOT_ME) return;
    if (warp_id() < CHOOSERS) {
        const u32 end = min_of(a.route.num_tokens, (block_y() + 1) * rows);
        for (u32 t = block_y() * rows + number * CHOOSERS + warp_id(); t < end; t += a.finishers * CHOOSERS) {
            choose(a.route, t, mem.choices[warp_id()]);
            // Other lanes read what the next choice overwrites.
            sync_warp();
        }
    }
    if (is_last_block(a.counters + grid_y(), a.finishers * grid_y(), mem.flag[0])) moe::sort(a.sort, mem.sort);
}

template <class S>
DEVICE void of_tiles(const RouterArgs& a) {
    RouterShared<tile::Shared<S>>& mem = shared<RouterShared<tile::Shared<S>>>();
    if (tile::linear<S, tile::SPREAD>(a.gemm, mem.product)) finish(a, S::BM, mem);
}

DEVICE void of_numbers(const RouterArgs& a) {
    RouterShared<simt::Shared>& mem = shared<RouterShared<simt::Shared>>();
    simt::linear<4>(a.gemm, mem.product);
    finish(a, simt::BM, mem);
}

}  // namespace route

R1_KERNEL(moe_route, route::Args, route::alone, 1)
R1_KERNEL(moe_router_simt, route::RouterArgs, route::of_numbers, 4)
R1_KERNEL(moe_router_bf16, route::RouterArgs, (route::of_tiles<tile::Short<bf16, bf16, false>>), 2)
