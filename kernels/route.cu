// The choice of experts. Logits [T, E] F32, bias [E] F32, ids [T, k] U32, weights [T, k] F32, best first.
//
//   score = softmax(logits) or sigmoid(logits); choice = score + bias; groups that lose: choice = -inf; ids = top-k of choice, the lower one among
//   equals; weight = score[id] (/ (their sum + 1e-20)) * scaling factor.      DeepSeek-V3 report, section 2.1.2 (arXiv:2412.19437)
//
// One warp per token. Bytes: 4 T E, nothing beside the launch itself; the floor is the launch. With `sort_counter` the last block goes on and sorts
// the pairs by expert (common/moe.cuh), which saves a decode step's launch.
// Oracle: crates/reference. Tests: conformance::{route, route_ties, route_not_finite, moe_layer}.
#include "common/moe.cuh"

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
    /// Or null.
    u32* sort_counter;
    moe::SortArgs sort;
};

struct Shared {
    float scores[MAX_EXPERTS];
    /// What experts are chosen by; NaN once they are.
    float choice[MAX_EXPERTS];
    /// Of groups; NaN once they are chosen.
    float worth[MAX_EXPERTS];
    u32 chosen[MAX_EXPERTS];
    moe::SortShared sort;
    u32 flag;
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

DEVICE void mask_groups(const Args& a, Shared& s) {
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

DEVICE void choose(const Args& a) {
    Shared& s = shared<Shared>();
    const u32 t = block_x();
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
    if (a.sort_counter && is_last_block(a.sort_counter, a.num_tokens, s.flag)) moe::sort(a.sort, s.sort);
}

}  // namespace route

R1_KERNEL(moe_route, route::Args, route::choose, 1)
