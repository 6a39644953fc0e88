// Log-probabilities of the raw logits.
//
// chosen[l] = ln softmax(logits[l])[tokens[l]]; top_ids[l], top[l] = the N most likely tokens and theirs, best first, the lower id first among
// equals. logits F32 [L, V], tokens U32 [L], chosen F32 [L], top_ids U32 [L, N], top F32 [L, N]. The sum of exponentials is one of integers, in
// units of 2^-40 of the largest, so that it depends on no order; differences of logits are taken in F64, which far from zero have digits left.
//
// One block per row. Passes over the row: two, and for N > 0 three or four more. Traffic 4 V bytes each: V = 129,280, 64 rows read 33 MB once,
// 8 us at 4.3 TB/s (H200, measured copy).
// Oracle: crates/reference. Test: conformance::logprobs, crates/gpu/tests/sampling.rs.
#include "common/vocab.cuh"

namespace logprobs {

using namespace vocab;

/// Most tokens that are listed at once.
constexpr u32 LISTED = 256;

struct Args {
    const float* logits;
    const u32* tokens;
    float* chosen;
    u32* top_ids;
    float* top;
    i64 logits_stride, top_ids_stride, top_stride;
    u32 vocab, num_top, vectors, unused;
};

struct Shared {
    BestScratch largest;
    SumScratch sum;
    Histogram histogram;
    u64 list[LISTED];
    u32 listed;
};

/// One block per row.
DEVICE void row(const Args& a) {
    Shared& s = shared<Shared>();
    i64 index = block_x();
    Logits l = {a.logits + index * a.logits_stride, a.vocab, a.vectors != 0, false, 1.0f};
    float max = best_of_row(l, s.largest).value;
    u64 mass = 0;
    each_four(l, [&](u32, u32 n, const float (&v)[4]) {
        UNROLL for (u32 j = 0; j < 4; ++j) {
            if (j < n) mass += mass_of(v[j] - max);
        }
    });
    // ln of the sum, with what its rounding to F32 lost.
    double sum = double(block_sum(mass, s.sum)) * (1.0 / double(MASS_UNITS));
    float rounded = float(sum);
    double log_sum = double(max) + (double(log_of(rounded)) + (sum - double(rounded)) / sum);
    auto logprob = [&](float logit) { return float(double(logit) - log_sum); };
    if (thread_id() == 0) a.chosen[index] = logprob(l.at[a.tokens[index]]);

    u64 first = 0;
    for (u32 done = 0; done < a.num_top; done += LISTED) {
        u32 wanted = min_of(LISTED, a.num_top - done);
        // Read next behind barriers of `end_of_set`.
        if (thread_id() == 0) s.listed = 0;
        u64 last = end_of_set(l, s.histogram, max, first, ~u64(0), Goal{false, wanted, 0.0f});
        each_four(l, [&](u32 token, u32 n, const float (&v)[4]) {
            UNROLL for (u32 j = 0; j < 4; ++j) {
                u64 place = place_of(v[j], token + j);
                if (j < n && first <= place && place <= last) s.list[atomic_add(&s.listed, 1)] = place;
            }
        });
        sync_block();
        for (u32 i = thread_id(); i < wanted; i += num_threads()) {
            u32 rank = done;
            for (u32 k = 0; k < wanted; ++k) rank += s.list[k] < s.list[i] ? 1 : 0;
            a.top_ids[index * a.top_ids_stride + rank] = u32(s.list[i]) & MAX_ID;
            a.top[index * a.top_stride + rank] = logprob(value_at(u32(s.list[i] >> ID_BITS)));
        }
        first = last + 1;
    }
}

}  // namespace logprobs

R1_KERNEL(logprobs_rows, logprobs::Args, logprobs::row, 1024 / WARP)
