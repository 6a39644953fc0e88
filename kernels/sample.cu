// Draws one token per row of logits: mask, bias, penalties, temperature, min-p, top-k, top-p, and the largest sum of logit and Gumbel noise.
//
// out[l] = argmax over the kept tokens v of logits[l, v] / temperature + gumbel(seed, position, v), as `SamplingBatch` (crates/backend) defines
// it; the lowest id among equals. Greedy rows: argmax of the adjusted logits. logits F32 [L, V], left as they are; out U32 [L]. A row that is
// masked, biased or penalised works on its adjusted copy in scratch memory.
//
// One block per row. Passes over the row: one when greedy, two without cut-off, five with top_k or top_p, eight with both. Traffic: 4 V bytes
// each, the later ones out of L2: V = 129,280, 64 rows read 33 MB once, 8 us at 4.3 TB/s (H200, measured copy).
// Oracle: crates/reference, backend::philox. Test: conformance::sample*, crates/gpu/tests/sampling.rs.
#include "common/vocab.cuh"

namespace sample {

using namespace vocab;

/// No range of words, no adjusted copy.
constexpr u32 NONE = 0xffffffffu;
/// Above the largest noise there is: -ln(-ln(1 - 2^-24)) = 16.64.
constexpr float MAX_NOISE = 17.0f;

/// One row of `SamplingBatch`. Ranges are of words behind the rows: pairs of token and bias, pairs of token and output count, bits.
struct Row {
    float temperature, top_p, min_p;
    u32 top_k;
    float repetition_penalty, presence_penalty, frequency_penalty;
    /// Which copy is this row's.
    u32 adjusted;
    u32 seed[2], position[2];
    u32 bias, num_bias, seen, num_seen;
    u32 mask, unused[3];
};

struct Args {
    const float* logits;
    float* adjusted;
    const Row* rows;
    const u32* words;
    u32* out;
    i64 logits_stride, adjusted_stride;
    u32 vocab, vectors;
};

struct Shared {
    BestScratch largest, winner;
    Histogram histogram;
};

/// Steps 1 and 2 on a copy of the row.
DEVICE void adjust(const Logits& from, const Row& row, const u32* words, float* z) {
    each_four(from, [&](u32 first, u32 n, const float (&v)[4]) {
        u32 allowed = row.mask == NONE ? 15 : words[row.mask + first / 32] >> first % 32;
        UNROLL for (u32 j = 0; j < 4; ++j) {
            if (j < n) z[first + j] = allowed >> j & 1 ? v[j] : -INFINITE;
        }
    });
    sync_block();
    const u32* bias = words + row.bias;
    for (u32 i = thread_id(); i < row.num_bias; i += num_threads()) {
        // The entries of a token stand side by side; the thread of the first one adds them all, in their order.
        u32 token = bias[2 * i];
        if (i > 0 && bias[2 * i - 2] == token) continue;
        float value = z[token];
        for (u32 k = i; k < row.num_bias && bias[2 * k] == token; ++k) value += float_of(bias[2 * k + 1]);
        z[token] = value;
    }
    sync_block();
    const u32* seen = words + row.seen;
    for (u32 i = thread_id(); i < row.num_seen; i += num_threads()) {
        u32 token = seen[2 * i], count = seen[2 * i + 1];
        float value = z[token];
        value = value > 0.0f ? value / row.repetition_penalty : value * row.repetition_penalty;
        z[token] = value - (row.frequency_penalty * float(count) + (count > 0 ? row.presence_penalty : 0.0f));
    }
    sync_block();
}

/// Philox 4x32-10: the words of four tokens, of which the first is 4 * `fours`.
DEVICE void philox(const Row& row, u32 fours, u32 (&words)[4]) {
    u32 key[2] = {row.seed[0], row.seed[1]};
    words[0] = fours;
    words[1] = 0;
    words[2] = row.position[0];
    words[3] = row.position[1];
    UNROLL for (u32 round = 0; round < 10; ++round) {
        u64 a = u64(0xD2511F53u) * words[0], b = u64(0xCD9E8D57u) * words[2];
        words[0] = u32(b >> 32) ^ words[1] ^ key[0];
        words[1] = u32(b);
        words[2] = u32(a >> 32) ^ words[3] ^ key[1];
        words[3] = u32(a);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
}
DEVICE float gumbel(u32 word) {
    float uniform = (float(word >> 9) + 0.5f) * (1.0f / 8388608.0f);
    return -log_of(-log_of(uniform));
}

/// Step 5 over the tokens whose place is `last` at most. `largest` is the row's largest value and a token that has it.
DEVICE u32 noisiest(const Logits& l, const Row& row, Best largest, u64 last, BestScratch& scratch) {
    // With one token's sum known, most others cannot win and need no noise.
    float bound = -INFINITE;
    if (place_of(largest.value, largest.token) <= last) {
        u32 words[4];
        philox(row, largest.token / 4, words);
        u32 at = largest.token % 4;
        bound = largest.value + gumbel(at < 2 ? (at == 0 ? words[0] : words[1]) : (at == 2 ? words[2] : words[3]));
    }
    Best best = no_best();
    each_four(l, [&](u32 first, u32 n, const float (&v)[4]) {
        u32 open = 0;
        UNROLL for (u32 j = 0; j < 4; ++j) {
            bool can_win = j < n && v[j] + MAX_NOISE >= max_of(bound, best.value) && place_of(v[j], first + j) <= last;
            open |= u32(can_win) << j;
        }
        if (open == 0) return;
        u32 words[4];
        philox(row, first / 4, words);
        UNROLL for (u32 j = 0; j < 4; ++j) {
            float sum = open >> j & 1 ? v[j] + gumbel(words[j]) : -INFINITE;
            if (sum > best.value) best = Best{sum, first + j};
        }
    });
    return block_best(best, scratch).token;
}

/// One block per row.
DEVICE void draw(const Args& a) {
    Shared& s = shared<Shared>();
    u32 index = block_x();
    const Row& row = a.rows[index];
    Logits l = {a.logits + index * a.logits_stride, a.vocab, a.vectors != 0, false, 1.0f};
    if (row.adjusted != NONE) {
        float* z = a.adjusted + row.adjusted * a.adjusted_stride;
        adjust(l, row, a.words, z);
        l.at = z;
        l.vectors = true;
    }
    Best largest = best_of_row(l, s.largest);
    u32 token = largest.token == NO_TOKEN ? 0 : largest.token;
    float max = largest.value / row.temperature;
    // Step 3: at infinity differences mean nothing.
    bool greedy = !(row.temperature > 0.0f) || !(max < INFINITE && max > -INFINITE);
    if (!greedy) {
        l.divide = true;
        l.temperature = row.temperature;
        float floor = row.min_p > 0.0f ? max + log_of(row.min_p) : LEAST_FINITE;
        floor = floor < max ? max_of(floor, LEAST_FINITE) : max;
        u64 last = place_of(floor, MAX_ID);
        if (row.top_k > 0 && row.top_k < a.vocab) last = end_of_set(l, s.histogram, max, 0, last, Goal{false, row.top_k, 0.0f});
        if (row.top_p < 1.0f) last = end_of_set(l, s.histogram, max, 0, last, Goal{true, 0, row.top_p});
        token = noisiest(l, row, Best{max, token}, last, s.winner);
    }
    if (thread_id() == 0) a.out[index] = token;
}

}  // namespace sample

R1_KERNEL(sample_rows, sample::Args, sample::draw, 1024 / WARP)
