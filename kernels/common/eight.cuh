// Rows of eight columns per thread: 16-byte loads where the host promises alignment, one element at a time where it does not, and the FP8
// form of what 16 neighbouring lanes hold.
#pragma once
#include "gpu.cuh"

/// Columns that a thread takes at once.
constexpr u32 EIGHT = 8;
/// Columns per scale, and the lanes that hold them.
constexpr u32 FP8_GROUP = 128;
constexpr u32 FP8_LANES = FP8_GROUP / EIGHT;

/// Elements `at` and the seven after it; zeros from `count` on, which are not read. `vectors`: the address of element 0 and `at` are those of
/// whole vectors.
DEVICE void load8(const void* base, u32 dtype, i64 at, u32 count, bool vectors, float (&v)[EIGHT]) {
    if (vectors && count == EIGHT && dtype == DTYPE_F32) {
        const Bytes16* from = reinterpret_cast<const Bytes16*>(static_cast<const float*>(base) + at);
        Bytes16 low = from[0], high = from[1];
        UNROLL for (u32 j = 0; j < 4; ++j) {
            v[j] = float_of(low.words[j]);
            v[4 + j] = float_of(high.words[j]);
        }
    } else if (vectors && count == EIGHT && dtype == DTYPE_BF16) {
        Bytes16 pairs = *reinterpret_cast<const Bytes16*>(static_cast<const bf16*>(base) + at);
        UNROLL for (u32 j = 0; j < 4; ++j) {
            v[2 * j] = float_of(pairs.words[j] << 16);
            v[2 * j + 1] = float_of(pairs.words[j] & 0xffff0000u);
        }
    } else {
        UNROLL for (u32 j = 0; j < EIGHT; ++j) v[j] = j < count ? load_as_float(base, dtype, at + j) : 0.0f;
    }
}

/// The first `count` of `v` to F32 or BF16.
DEVICE void store8(void* base, u32 dtype, i64 at, u32 count, bool vectors, const float (&v)[EIGHT]) {
    if (vectors && count == EIGHT && dtype == DTYPE_F32) {
        Bytes16* to = reinterpret_cast<Bytes16*>(static_cast<float*>(base) + at);
        to[0] = Bytes16{{bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])}};
        to[1] = Bytes16{{bits_of(v[4]), bits_of(v[5]), bits_of(v[6]), bits_of(v[7])}};
    } else if (vectors && count == EIGHT) {
        Bytes16 pairs;
        UNROLL for (u32 j = 0; j < 4; ++j) {
            pairs.words[j] = u32(from_float<bf16>(v[2 * j]).bits) | u32(from_float<bf16>(v[2 * j + 1]).bits) << 16;
        }
        *reinterpret_cast<Bytes16*>(static_cast<bf16*>(base) + at) = pairs;
    } else {
        UNROLL for (u32 j = 0; j < EIGHT; ++j) {
            if (j < count) store_float(base, dtype, at + j, v[j]);
        }
    }
}

struct alignas(8) Bytes8 {
    u32 words[2];
};
/// The first `count` of `v` as the nearest codes; `vectors`: element `at` has an address that is a multiple of eight.
DEVICE void store8_e4m3(e4m3* to, i64 at, u32 count, bool vectors, const float (&v)[EIGHT]) {
    if (vectors && count == EIGHT) {
        Bytes8 codes;
        UNROLL for (u32 w = 0; w < 2; ++w) {
            codes.words[w] = 0;
            UNROLL for (u32 j = 0; j < 4; ++j) codes.words[w] |= u32(from_float<e4m3>(v[4 * w + j]).bits) << (8 * j);
        }
        *reinterpret_cast<Bytes8*>(to + at) = codes;
    } else {
        UNROLL for (u32 j = 0; j < EIGHT; ++j) {
            if (j < count) to[at + j] = from_float<e4m3>(v[j]);
        }
    }
}

/// As load8, of codes.
DEVICE void load8_e4m3(const e4m3* from, i64 at, u32 count, bool vectors, float (&v)[EIGHT]) {
    if (vectors && count == EIGHT) {
        Bytes8 codes = *reinterpret_cast<const Bytes8*>(from + at);
        UNROLL for (u32 j = 0; j < EIGHT; ++j) v[j] = to_float(e4m3{u8(codes.words[j / 4] >> (8 * (j % 4)))});
    } else {
        UNROLL for (u32 j = 0; j < EIGHT; ++j) v[j] = j < count ? to_float(from[at + j]) : 0.0f;
    }
}

#if R1_EMU
inline void r1_emu_max_of_16_lanes(void** args) {
    for (u32 first = 0; first < WARP; first += FP8_LANES) {
        float most = *static_cast<float*>(args[first]);
        for (u32 i = 1; i < FP8_LANES; ++i) most = max_of(most, *static_cast<float*>(args[first + i]));
        for (u32 i = 0; i < FP8_LANES; ++i) *static_cast<float*>(args[first + i]) = most;
    }
}
#endif
/// The largest `x` of the 16 lanes that hold a group; every lane of the warp takes part.
DEVICE float max_of_group(float x) {
#if R1_EMU
    r1_emu_collective(r1_emu_max_of_16_lanes, &x);
#else
    UNROLL for (u32 mask = FP8_LANES / 2; mask > 0; mask /= 2) x = max_of(x, shuffle_xor(x, mask));
#endif
    return x;
}

/// Where an FP8 form goes: codes `[T, K]`, scales `[T, ceil(K / 128)]`; none where `codes` is null.
struct Fp8Out {
    e4m3* codes;
    float* scales;
    i64 codes_stride, scales_stride;
    u32 power_of_two, vectors;
};

/// `scale = max(amax, 1e-4) / 448`, rounded up to a power of two where that is asked for.
DEVICE float fp8_scale(float amax, bool power_of_two) {
    float scale = max_of(amax, 1e-4f) / 448.0f;
    if (!power_of_two) return scale;
    u32 bits = bits_of(scale);
    return float_of((bits + 0x7fffffu) & 0x7f800000u);
}

/// Scale and codes of row `row`, columns `column..column + count`, of which the lane holds `v` (zeros from `count` on). Every lane of the warp
/// takes part, those without columns with a count of 0.
DEVICE void store_quantized(const Fp8Out& to, i64 row, u32 column, u32 count, const float (&v)[EIGHT]) {
    float amax = 0.0f;
    UNROLL for (u32 j = 0; j < EIGHT; ++j) amax = max_of(amax, __builtin_fabsf(v[j]));
    float scale = fp8_scale(max_of_group(amax), to.power_of_two != 0);
    float codes[EIGHT];
    UNROLL for (u32 j = 0; j < EIGHT; ++j) codes[j] = v[j] / scale;
    store8_e4m3(to.codes, row * to.codes_stride + column, count, to.vectors != 0, codes);
    if (count > 0 && column % FP8_GROUP == 0) to.scales[row * to.scales_stride + column / FP8_GROUP] = scale;
}

/// Scales and codes of rows `t0..t0 + rows` in the `width` columns of a group, from `column` on, of what the block or those before it wrote to `dense`.
/// Every thread of the block takes part; `max_rows` is a bound on `rows` that the compiler knows.
template <u32 THREADS>
DEVICE void quantize_group(
    const Fp8Out& to, const void* dense, u32 dtype, i64 stride, bool vectors, u32 t0, u32 rows, u32 max_rows, u32 column, u32 width) {
    const u32 within = lane_id() % FP8_LANES * EIGHT, there = within < width ? min_of(EIGHT, width - within) : 0;
    for (u32 first = 0; first < max_rows; first += THREADS / FP8_LANES) {
        const u32 row = first + thread_id() / FP8_LANES, count = row < rows ? there : 0;
        float v[EIGHT];
        load8(dense, dtype, (t0 + row) * stride + column + within, count, vectors, v);
        store_quantized(to, t0 + row, column + within, count, v);
    }
}
