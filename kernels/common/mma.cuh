// Matrix instructions behind one wrapper: a warp multiplies tiles that lie in shared memory and keeps the result in registers.
// Included by gpu.cuh.
//
//   WarpAcc<M, N> acc;  acc.clear();
//   warp_mma<K>(acc, a, lda, b, ldb);      acc[m][n] += sum_k a[m * lda + k] * b[n * ldb + k]     bf16 or e4m3
//   warp_mma_kn<K>(acc, a, lda, b, ldb);   acc[m][n] += sum_k a[m * lda + k] * b[k * ldb + n]     bf16
//   for (int i = 0; i < acc.SIZE; ++i) use(acc.row(i), acc.col(i), acc.v[i]);
//
// M and N are multiples of 16, K of 32. Leading dimensions are even numbers of elements (bf16) or multiples of 4 (e4m3), and tiles begin at
// multiples of 4 bytes; an odd multiple of 16 bytes as leading dimension avoids bank conflicts. Products are exact, sums F32; the order of a sum over
// k is the instruction's and does not depend on the other rows. Every lane of the warp calls it, and the tiles must be there for all lanes
// (a barrier before), and stay (a barrier before they are overwritten).
#pragma once

#if R1_CUDA

template <int M, int N>
struct WarpAcc {
    static constexpr int SIZE = M * N / 32;
    float v[SIZE];
    DEVICE void clear() {
        UNROLL for (int i = 0; i < SIZE; ++i) v[i] = 0.0f;
    }
    // Tiles of 16 x 8, row-major; four values each.
    DEVICE int row(int i) const { return i / 4 / (N / 8) * 16 + int(lane_id()) / 4 + i % 4 / 2 * 8; }
    DEVICE int col(int i) const { return i / 4 % (N / 8) * 8 + int(lane_id()) % 4 * 2 + i % 2; }
};

DEVICE void r1_mma_bf16(float* c, const u32* a, const u32* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <int K, int M, int N>
DEVICE void warp_mma(WarpAcc<M, N>& acc, const bf16* a, int lda, const bf16* b, int ldb) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    UNROLL for (int k = 0; k < K; k += 16) {
        u32 af[M / 16][4];
        UNROLL for (int m = 0; m < M / 16; ++m) {
            const bf16* at = a + (m * 16 + g) * lda + k + 2 * t;
            af[m][0] = *reinterpret_cast<const u32*>(at);
            af[m][1] = *reinterpret_cast<const u32*>(at + 8 * lda);
            af[m][2] = *reinterpret_cast<const u32*>(at + 8);
            af[m][3] = *reinterpret_cast<const u32*>(at + 8 * lda + 8);
        }
        UNROLL for (int n = 0; n < N / 8; ++n) {
            const bf16* at = b + (n * 8 + g) * ldb + k + 2 * t;
            u32 bf[2] = {*reinterpret_cast<const u32*>(at), *reinterpret_cast<const u32*>(at + 8)};
            UNROLL for (int m = 0; m < M / 16; ++m) r1_mma_bf16(acc.v + (m * (N / 8) + n) * 4, af[m], bf);
        }
    }
}

template <int K, int M, int N>
DEVICE void warp_mma_kn(WarpAcc<M, N>& acc, const bf16* a, int lda, const bf16* b, int ldb) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    UNROLL for (int k = 0; k < K; k += 16) {
        u32 af[M / 16][4];
        UNROLL for (int m = 0; m < M / 16; ++m) {
            const bf16* at = a + (m * 16 + g) * lda + k + 2 * t;
            af[m][0] = *reinterpret_cast<const u32*>(at);
            af[m][1] = *reinterpret_cast<const u32*>(at + 8 * lda);
            af[m][2] = *reinterpret_cast<const u32*>(at + 8);
            af[m][3] = *reinterpret_cast<const u32*>(at + 8 * lda + 8);
        }
        UNROLL for (int n = 0; n < N / 8; ++n) {
            const bf16* at = b + (k + 2 * t) * ldb + n * 8 + g;
            u32 bf[2] = {u32(at[0].bits) | u32(at[ldb].bits) << 16, u32(at[8 * ldb].bits) | u32(at[9 * ldb].bits) << 16};
            UNROLL for (int m = 0; m < M / 16; ++m) r1_mma_bf16(acc.v + (m * (N / 8) + n) * 4, af[m], bf);
        }
    }
}

#if __CUDA_ARCH__ >= 890
DEVICE void r1_mma_e4m3(float* c, const u32* a, const u32* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
// Without FP8 units: the codes are bf16 numbers exactly. Which k goes where does not matter as long as both sides agree.
DEVICE u32 r1_widen_pair(u32 codes) {
    return u32(from_float<bf16>(to_float(e4m3{u8(codes & 0xff)})).bits) | u32(from_float<bf16>(to_float(e4m3{u8(codes >> 8 & 0xff)})).bits) << 16;
}
DEVICE void r1_mma_e4m3(float* c, const u32* a, const u32* b) {
    UNROLL for (int half = 0; half < 2; ++half) {
        u32 wide_a[4], wide_b[2];
        UNROLL for (int i = 0; i < 4; ++i) wide_a[i] = r1_widen_pair(a[i] >> (16 * half));
        UNROLL for (int i = 0; i < 2; ++i) wide_b[i] = r1_widen_pair(b[i] >> (16 * half));
        r1_mma_bf16(c, wide_a, wide_b);
    }
}
#endif

template <int K, int M, int N>
DEVICE void warp_mma(WarpAcc<M, N>& acc, const e4m3* a, int lda, const e4m3* b, int ldb) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    UNROLL for (int k = 0; k < K; k += 32) {
        u32 af[M / 16][4];
        UNROLL for (int m = 0; m < M / 16; ++m) {
            const e4m3* at = a + (m * 16 + g) * lda + k + 4 * t;
            af[m][0] = *reinterpret_cast<const u32*>(at);
            af[m][1] = *reinterpret_cast<const u32*>(at + 8 * lda);
            af[m][2] = *reinterpret_cast<const u32*>(at + 16);
            af[m][3] = *reinterpret_cast<const u32*>(at + 8 * lda + 16);
        }
        UNROLL for (int n = 0; n < N / 8; ++n) {
            const e4m3* at = b + (n * 8 + g) * ldb + k + 4 * t;
            u32 bf[2] = {*reinterpret_cast<const u32*>(at), *reinterpret_cast<const u32*>(at + 16)};
            UNROLL for (int m = 0; m < M / 16; ++m) r1_mma_e4m3(acc.v + (m * (N / 8) + n) * 4, af[m], bf);
        }
    }
}

#elif R1_HIP

template <int M, int N>
struct WarpAcc {
    static constexpr int SIZE = M * N / 64;
    float v[SIZE];
    DEVICE void clear() {
        UNROLL for (int i = 0; i < SIZE; ++i) v[i] = 0.0f;
    }
    // Tiles of 16 x 16, row-major; four values each.
    DEVICE int row(int i) const { return i / 4 / (N / 16) * 16 + int(lane_id()) / 16 * 4 + i % 4; }
    DEVICE int col(int i) const { return i / 4 % (N / 16) * 16 + int(lane_id()) % 16; }
};

typedef short r1_short4 __attribute__((ext_vector_type(4)));
typedef float r1_float4 __attribute__((ext_vector_type(4)));

DEVICE void r1_mfma_bf16(float* c, r1_short4 a, r1_short4 b) {
    r1_float4 sum = {c[0], c[1], c[2], c[3]};
    sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, sum, 0, 0, 0);
    UNROLL for (int i = 0; i < 4; ++i) c[i] = sum[i];
}
DEVICE r1_short4 r1_row4(const bf16* at) {
    r1_short4 out;
    __builtin_memcpy(&out, __builtin_assume_aligned(at, 4), 8);
    return out;
}

template <int K, int M, int N>
DEVICE void warp_mma(WarpAcc<M, N>& acc, const bf16* a, int lda, const bf16* b, int ldb) {
    const int r = lane_id() % 16, q = lane_id() / 16 * 4;
    UNROLL for (int k = 0; k < K; k += 16) {
        UNROLL for (int m = 0; m < M / 16; ++m) {
            r1_short4 af = r1_row4(a + (m * 16 + r) * lda + k + q);
            UNROLL for (int n = 0; n < N / 16; ++n) r1_mfma_bf16(acc.v + (m * (N / 16) + n) * 4, af, r1_row4(b + (n * 16 + r) * ldb + k + q));
        }
    }
}

template <int K, int M, int N>
DEVICE void warp_mma_kn(WarpAcc<M, N>& acc, const bf16* a, int lda, const bf16* b, int ldb) {
    const int r = lane_id() % 16, q = lane_id() / 16 * 4;
    UNROLL for (int k = 0; k < K; k += 16) {
        UNROLL for (int m = 0; m < M / 16; ++m) {
            r1_short4 af = r1_row4(a + (m * 16 + r) * lda + k + q);
            UNROLL for (int n = 0; n < N / 16; ++n) {
                r1_short4 bf;
                UNROLL for (int i = 0; i < 4; ++i) bf[i] = short(b[(k + q + i) * ldb + n * 16 + r].bits);
                r1_mfma_bf16(acc.v + (m * (N / 16) + n) * 4, af, bf);
            }
        }
    }
}

template <int K, int M, int N>
DEVICE void warp_mma(WarpAcc<M, N>& acc, const e4m3* a, int lda, const e4m3* b, int ldb) {
    const int r = lane_id() % 16, q = lane_id() / 16 * 8;
    UNROLL for (int k = 0; k < K; k += 32) {
        UNROLL for (int m = 0; m < M / 16; ++m) {
            UNROLL for (int n = 0; n < N / 16; ++n) {
                const e4m3 *pa = a + (m * 16 + r) * lda + k + q, *pb = b + (n * 16 + r) * ldb + k + q;
                float* c = acc.v + (m * (N / 16) + n) * 4;
#if defined(__gfx942__)
                long af, bf;
                __builtin_memcpy(&af, __builtin_assume_aligned(pa, 4), 8);
                __builtin_memcpy(&bf, __builtin_assume_aligned(pb, 4), 8);
                // FNUZ reads each code as half its OCP value.
                r1_float4 part = {0.0f, 0.0f, 0.0f, 0.0f};
                part = __builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8(af, bf, part, 0, 0, 0);
                UNROLL for (int i = 0; i < 4; ++i) c[i] += 4.0f * part[i];
#else
                UNROLL for (int half = 0; half < 8; half += 4) {
                    r1_short4 af, bf;
                    UNROLL for (int i = 0; i < 4; ++i) {
                        af[i] = short(from_float<bf16>(to_float(pa[half + i])).bits);
                        bf[i] = short(from_float<bf16>(to_float(pb[half + i])).bits);
                    }
                    r1_mfma_bf16(c, af, bf);
                }
#endif
            }
        }
    }
}

#else

template <int M, int N>
struct WarpAcc {
    static constexpr int SIZE = M * N / 32;
    float v[SIZE];
    void clear() {
        for (int i = 0; i < SIZE; ++i) v[i] = 0.0f;
    }
    int row(int i) const { return (i * 32 + int(lane_id())) / N; }
    int col(int i) const { return (i * 32 + int(lane_id())) % N; }
};

struct R1EmuMma {
    float* acc;
    const void *a, *b;
    int lda, ldb;
};

/// One warp's product: `wide_a` and `wide_b` are [M][K] and [K][N].
template <int M, int N, int K>
inline void r1_emu_mma(void** lanes, const float (*a)[K], const float (*b)[N]) {
    for (int m = 0; m < M; ++m) {
        // Padding: few tokens, or few heads, would cost as much as many.
        bool zeros = true;
        for (int k = 0; k < K; ++k) zeros &= a[m][k] == 0.0f;
        if (zeros) continue;
        float sum[N];
        for (int n = 0; n < N; ++n) sum[n] = 0.0f;
        for (int k = 0; k < K; ++k) {
            for (int n = 0; n < N; ++n) sum[n] += a[m][k] * b[k][n];
        }
        for (int n = 0; n < N; ++n) {
            int e = m * N + n;
            static_cast<R1EmuMma*>(lanes[e % 32])->acc[e / 32] += sum[n];
        }
    }
}

template <int M, int N, int K, class T, bool KN>
inline void r1_emu_mma_once(void** lanes) {
    const R1EmuMma& mma = *static_cast<R1EmuMma*>(lanes[0]);
    // Big, and the fibres' stacks are small; one warp at a time on an OS thread.
    static thread_local float a[M][K], b[K][N];
    const T *pa = static_cast<const T*>(mma.a), *pb = static_cast<const T*>(mma.b);
    for (int m = 0; m < M; ++m) {
        for (int k = 0; k < K; ++k) a[m][k] = to_float(pa[m * mma.lda + k]);
    }
    for (int k = 0; k < K; ++k) {
        for (int n = 0; n < N; ++n) b[k][n] = to_float(KN ? pb[k * mma.ldb + n] : pb[n * mma.ldb + k]);
    }
    r1_emu_mma<M, N, K>(lanes, a, b);
}

template <int K, int M, int N, class T>
inline void warp_mma(WarpAcc<M, N>& acc, const T* a, int lda, const T* b, int ldb) {
    static_assert(M % 16 == 0 && N % 16 == 0 && K % 32 == 0, "see the top of this file");
    R1EmuMma mma = {acc.v, a, b, lda, ldb};
    r1_emu_collective(r1_emu_mma_once<M, N, K, T, false>, &mma);
}

template <int K, int M, int N>
inline void warp_mma_kn(WarpAcc<M, N>& acc, const bf16* a, int lda, const bf16* b, int ldb) {
    static_assert(M % 16 == 0 && N % 16 == 0 && K % 32 == 0, "see the top of this file");
    R1EmuMma mma = {acc.v, a, b, lda, ldb};
    r1_emu_collective(r1_emu_mma_once<M, N, K, bf16, true>, &mma);
}

#endif
