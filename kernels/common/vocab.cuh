// A block looks at a row of logits: reading it, its best token, and where a set of its best tokens ends.
//
// Nothing is sorted. Tokens have a total order, larger logits first, lower ids among equals, and each token a place in it (a u64). The end of a
// set is found by histograms: first of distances from the largest logit, then of places inside the bin where the set ends, until one token is
// left there; two or three passes over the row as a rule. Probabilities are summed as integers, in units of 2^-40 of the largest token's, so
// that a sum depends on no order.
#pragma once
#include "gpu.cuh"

namespace vocab {

constexpr u32 NO_TOKEN = 0xffffffffu;
/// A token's place has its id in these low bits.
constexpr u32 ID_BITS = 24;
constexpr u32 MAX_ID = (1u << ID_BITS) - 1;
constexpr u32 BINS = 1024;
/// Bins of the first histogram that a distance of one takes: the last one holds all that is 64 or more below.
constexpr float BINS_PER_UNIT = 16.0f;
constexpr float MASS_UNITS = 1099511627776.0f;
constexpr float LEAST_FINITE = -3.402823466e38f;

/// A row, as it is or divided by a temperature; NaN counts as -inf.
struct Logits {
    const float* at;
    u32 count;
    /// The address of element 0 is that of a vector.
    bool vectors;
    bool divide;
    float temperature;
};

/// Tokens `first..first + 4` and how many of them there are.
DEVICE u32 load4(const Logits& l, u32 first, float (&v)[4]) {
    u32 n = first < l.count ? min_of(4, l.count - first) : 0;
    if (l.vectors && n == 4) {
        Bytes16 four = *reinterpret_cast<const Bytes16*>(l.at + first);
        UNROLL for (u32 j = 0; j < 4; ++j) v[j] = float_of(four.words[j]);
    } else {
        UNROLL for (u32 j = 0; j < 4; ++j) v[j] = j < n ? l.at[first + j] : -INFINITE;
    }
    UNROLL for (u32 j = 0; j < 4; ++j) v[j] = v[j] == v[j] ? v[j] : -INFINITE;
    return n;
}

/// Calls `visit(first, n, v)` for the thread's share of the row, in order of ids; loads run ahead so that memory is kept busy.
template <class F>
DEVICE void each_four(const Logits& l, F visit) {
    constexpr u32 AHEAD = 4;
    u32 step = 4 * num_threads();
    for (u32 first = 4 * thread_id(); first < l.count; first += AHEAD * step) {
        float v[AHEAD][4];
        u32 n[AHEAD];
        UNROLL for (u32 i = 0; i < AHEAD; ++i) n[i] = load4(l, first + i * step, v[i]);
        UNROLL for (u32 i = 0; i < AHEAD; ++i) {
            if (n[i] > 0) {
                if (l.divide) {
                    UNROLL for (u32 j = 0; j < 4; ++j) v[i][j] = v[i][j] / l.temperature;
                }
                visit(first + i * step, n[i], v[i]);
            }
        }
    }
}

// ---- The best token ------------------------------------------------------------------------------------------------------------------
struct Best {
    float value;
    u32 token;
};
DEVICE Best no_best() { return Best{-INFINITE, NO_TOKEN}; }
DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a; }

#if R1_EMU
inline void r1_emu_best_of_lanes(void** args) {
    Best best = *static_cast<Best*>(args[0]);
    for (u32 i = 1; i < WARP; ++i) best = better(best, *static_cast<Best*>(args[i]));
    for (u32 i = 0; i < WARP; ++i) *static_cast<Best*>(args[i]) = best;
}
inline void r1_emu_sum_of_lanes(void** args) {
    u64 sum = 0;
    for (u32 i = 0; i < WARP; ++i) sum += *static_cast<u64*>(args[i]);
    for (u32 i = 0; i < WARP; ++i) *static_cast<u64*>(args[i]) = sum;
}
#endif
DEVICE Best warp_best(Best best) {
#if R1_EMU
    r1_emu_collective(r1_emu_best_of_lanes, &best);
#else
    UNROLL for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        best = better(best, Best{shuffle_xor(best.value, mask), shuffle_xor(best.token, mask)});
    }
#endif
    return best;
}
DEVICE u64 warp_sum(u64 x) {
#if R1_EMU
    r1_emu_collective(r1_emu_sum_of_lanes, &x);
#else
    UNROLL for (u32 mask = WARP / 2; mask > 0; mask /= 2) x += u64(shuffle_xor(u32(x >> 32), mask)) << 32 | shuffle_xor(u32(x), mask);
#endif
    return x;
}

/// Room of one block-wide operation; each has its own, so that one barrier does.
struct BestScratch {
    Best of_warp[32];
};
DEVICE Best block_best(Best best, BestScratch& scratch) {
    best = warp_best(best);
    if (lane_id() == 0) scratch.of_warp[warp_id()] = best;
    sync_block();
    best = scratch.of_warp[0];
    for (u32 w = 1; w < num_warps(); ++w) best = better(best, scratch.of_warp[w]);
    return best;
}
struct SumScratch {
    u64 of_warp[32];
};
DEVICE u64 block_sum(u64 x, SumScratch& scratch) {
    x = warp_sum(x);
    if (lane_id() == 0) scratch.of_warp[warp_id()] = x;
    sync_block();
    u64 sum = 0;
    for (u32 w = 0; w < num_warps(); ++w) sum += scratch.of_warp[w];
    return sum;
}

/// The row's largest value and the lowest id that has it; no token where all are -inf.
DEVICE Best best_of_row(const Logits& l, BestScratch& scratch) {
    Best best = no_best();
    each_four(l, [&](u32 first, u32 n, const float (&v)[4]) {
        UNROLL for (u32 j = 0; j < 4; ++j) {
            if (j < n && v[j] > best.value) best = Best{v[j], first + j};
        }
    });
    return block_best(best, scratch);
}

// ---- Places --------------------------------------------------------------------------------------------------------------------------
/// Falls as `v` rises; zeros of both signs are one.
DEVICE u32 rank_of(float v) {
    u32 bits = bits_of(v + 0.0f);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
DEVICE float value_at(u32 rank) { return float_of(rank & 0x80000000u ? rank : ~rank & 0x7fffffffu); }
/// Lower places are better.
DEVICE u64 place_of(float v, u32 token) { return u64(rank_of(v)) << ID_BITS | token; }

DEVICE u64 mass_of(float below_max) {
    float mass = exp_of(below_max) * MASS_UNITS;
    // Not for NaN, which infinities make.
    return mass > 0.0f ? u64(mass) : 0;
}

/// Never falls as `v` falls; `v` is `max` at most.
DEVICE u32 bin_of(float max, float v) {
    float bin = (max - v) * BINS_PER_UNIT;
    // The last one also for NaN, which infinities make.
    return bin < float(BINS - 1) ? u32(bin) : BINS - 1;
}
/// The first rank whose bin is `bin` or a later one.
DEVICE u32 first_rank_of_bin(float max, u32 bin) {
    u32 low = rank_of(max), high = rank_of(-INFINITE) + 1;
    while (low < high) {
        u32 middle = low + (high - low) / 2;
        if (bin < BINS && bin_of(max, value_at(middle)) >= bin) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// ---- Where a set ends ----------------------------------------------------------------------------------------------------------------
/// What a set must reach: a number of tokens, or a part of the probability of all.
struct Goal {
    bool by_mass;
    u32 tokens;
    float part;
};

struct Found {
    /// The places among which the set ends, and what it still lacks before the first of them.
    u64 first, last, wanted;
    /// It ends at the last of them.
    bool ends;
};

struct Histogram {
    u64 mass[BINS];
    u32 count[BINS];
    u64 of_lane[64];
    Found found;
};

/// By one warp: finds the bin where the set ends, from the counts and masses of the places `now.first..=now.last`.
DEVICE void find_bin(Histogram& h, float max, const Goal& goal, Found now, bool by_distance, u32 shift) {
    constexpr u32 PER_LANE = BINS / WARP;
    u32 lane = lane_id();
    auto amount = [&](u32 bin) { return goal.by_mass ? h.mass[bin] : u64(h.count[bin]); };
    u64 own = 0;
    // Each lane from another place of its part, so that lanes meet in no bank.
    for (u32 i = 0; i < PER_LANE; ++i) own += amount(lane * PER_LANE + (i + lane) % PER_LANE);
    h.of_lane[lane] = own;
    sync_warp();
    u64 before = 0, total = 0;
    for (u32 i = 0; i < WARP; ++i) {
        if (i < lane) before += h.of_lane[i];
        total += h.of_lane[i];
    }
    if (by_distance) {
        if (goal.by_mass) {
            double wanted = double(goal.part) * double(total);
            now.wanted = u64(wanted);
            if (double(now.wanted) < wanted || now.wanted == 0) ++now.wanted;
        } else {
            now.wanted = goal.tokens;
        }
        if (now.wanted > total) now.wanted = total;
    }
    // One lane's part holds the end.
    if (before < now.wanted && now.wanted <= before + own) {
        u32 bin = lane * PER_LANE;
        while (before + amount(bin) < now.wanted) {
            before += amount(bin);
            ++bin;
        }
        u64 first, last;
        if (by_distance) {
            first = u64(first_rank_of_bin(max, bin)) << ID_BITS;
            last = (u64(first_rank_of_bin(max, bin + 1)) << ID_BITS) - 1;
        } else {
            first = now.first + (u64(bin) << shift);
            last = first + (u64(1) << shift) - 1;
        }
        h.found.first = first > now.first ? first : now.first;
        h.found.last = last < now.last ? last : now.last;
        h.found.wanted = now.wanted - before;
        h.found.ends = h.count[bin] == 1 || (!goal.by_mass && h.found.wanted == h.count[bin]);
    }
}

/// The last place of the smallest set of tokens, best first, that begins at place `first`, does not go beyond `last`, and reaches the goal.
/// There is a token between them; `max` is the row's largest value.
DEVICE u64 end_of_set(const Logits& l, Histogram& h, float max, u64 first, u64 last, const Goal& goal) {
    Found now = {first, last, 0, false};
    for (bool by_distance = true;; by_distance = false) {
        u32 shift = 0;
        while (!by_distance && (now.last - now.first) >> shift >= BINS) ++shift;
        for (u32 bin = thread_id(); bin < BINS; bin += num_threads()) {
            h.count[bin] = 0;
            h.mass[bin] = 0;
        }
        sync_block();
        each_four(l, [&](u32 token, u32 n, const float (&v)[4]) {
            UNROLL for (u32 j = 0; j < 4; ++j) {
                u64 place = place_of(v[j], token + j);
                if (j < n && now.first <= place && place <= now.last) {
                    u32 bin = by_distance ? bin_of(max, v[j]) : u32((place - now.first) >> shift);
                    atomic_add(&h.count[bin], 1);
                    if (goal.by_mass) atomic_add(&h.mass[bin], mass_of(v[j] - max));
                }
            }
        });
        sync_block();
        if (warp_id() == 0) find_bin(h, max, goal, now, by_distance, shift);
        sync_block();
        now = h.found;
        if (now.ends) return now.last;
    }
}

}  // namespace vocab
