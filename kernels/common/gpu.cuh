// The one place that knows the vendor. A kernel includes this file, says nothing about CUDA, HIP or the host, and compiles as all three:
//   CUDA   nvcc, sm_80 and up: warps of 32, mma.sync
//   HIP    clang -x hip, gfx90a and gfx942: waves of 64, MFMA
//   emu    g++ or clang for the host: warps of 32, one fibre per thread (emu.h), matrix instructions once per warp, natively
//
// Rules that follow: a file's own functions and structs stand in a namespace of its name; shared memory is one struct per kernel, reached through `shared<T>()`; a barrier or a warp operation is reached by every
// thread of the block or warp; no early return before one; no thread count but num_warps() * WARP; vector loads only where the host has
// promised alignment.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if defined(__CUDACC__)
#define R1_CUDA 1
#elif defined(__HIP__)
#define R1_HIP 1
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#else
#define R1_EMU 1
#include "emu.h"
#endif

#if R1_EMU
#define DEVICE inline
#define UNROLL
#elif R1_CUDA
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define DEVICE __device__ inline __attribute__((always_inline))
#define UNROLL _Pragma("unroll")
#endif

// ---- Kernels -------------------------------------------------------------------------------------------------------------------------
// R1_KERNEL(name, Args, body, max_warps): the entry point `name`, which takes one Args by value and runs `body(args)`, a function or an
// instantiation in parentheses. Stands at the beginning of a line: the build finds it there. A fifth argument is how many blocks shall fit an NVIDIA
// multiprocessor, for kernels that spill a few bytes to fit one more.
#if R1_CUDA
#define R1_KERNEL(name, Args, body, max_warps, ...)                                                                                     \
    extern "C" __global__ void __launch_bounds__((max_warps) * 32 __VA_OPT__(, ) __VA_ARGS__) name(const __grid_constant__ Args args) { body(args); }
#elif R1_HIP
#define R1_KERNEL(name, Args, body, max_warps, ...)                                                                                     \
    extern "C" __global__ __attribute__((amdgpu_flat_work_group_size(1, (max_warps) * 64))) void name(const Args args) { body(args); }
#else
#define R1_KERNEL(name, Args, body, max_warps, ...)                                                                                     \
    extern "C" void r1_emu_kernel_##name(const void* args) { body(*static_cast<const Args*>(args)); }                                   \
    extern "C" const u32 r1_emu_args_bytes_##name = sizeof(Args);                                                                       \
    extern "C" const u32 r1_emu_max_warps_##name = (max_warps);
#endif

// ---- Threads -------------------------------------------------------------------------------------------------------------------------
#if R1_CUDA
constexpr u32 WARP = 32;
DEVICE u32 thread_id() { return threadIdx.x; }
DEVICE u32 num_threads() { return blockDim.x; }
DEVICE u32 block_x() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 block_z() { return blockIdx.z; }
DEVICE u32 grid_x() { return gridDim.x; }
DEVICE u32 grid_y() { return gridDim.y; }
DEVICE u32 grid_z() { return gridDim.z; }
#define sync_block() __syncthreads()
#define sync_warp() __syncwarp()
DEVICE void fence_device() { __threadfence(); }
extern __shared__ __align__(128) unsigned char r1_shared[];
#elif R1_HIP
constexpr u32 WARP = 64;
DEVICE u32 thread_id() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE u32 num_threads() { return __builtin_amdgcn_workgroup_size_x(); }
DEVICE u32 block_x() { return __builtin_amdgcn_workgroup_id_x(); }
DEVICE u32 block_y() { return __builtin_amdgcn_workgroup_id_y(); }
DEVICE u32 block_z() { return __builtin_amdgcn_workgroup_id_z(); }
DEVICE u32 grid_x() { return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x(); }
DEVICE u32 grid_y() { return __builtin_amdgcn_grid_size_y() / __builtin_amdgcn_workgroup_size_y(); }
DEVICE u32 grid_z() { return __builtin_amdgcn_grid_size_z() / __builtin_amdgcn_workgroup_size_z(); }
DEVICE void r1_hip_sync_block() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
DEVICE void r1_hip_sync_warp() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}
#define sync_block() r1_hip_sync_block()
#define sync_warp() r1_hip_sync_warp()
DEVICE void fence_device() { __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "agent"); }
extern __shared__ __attribute__((aligned(128))) unsigned char r1_shared[];
#else
constexpr u32 WARP = 32;
DEVICE u32 thread_id() { return r1_emu->thread; }
DEVICE u32 num_threads() { return r1_emu->num_threads; }
DEVICE u32 block_x() { return r1_emu->block[0]; }
DEVICE u32 block_y() { return r1_emu->block[1]; }
DEVICE u32 block_z() { return r1_emu->block[2]; }
DEVICE u32 grid_x() { return r1_emu->grid[0]; }
DEVICE u32 grid_y() { return r1_emu->grid[1]; }
DEVICE u32 grid_z() { return r1_emu->grid[2]; }
// A site is a place in a source file, so that a test can leave out each one in turn.
#define sync_block() r1_emu_barrier(__FILE__, __LINE__, R1_EMU_AT_BLOCK)
#define sync_warp() r1_emu_barrier(__FILE__, __LINE__, R1_EMU_AT_WARP)
DEVICE void fence_device() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#endif

DEVICE u32 lane_id() { return thread_id() % WARP; }
DEVICE u32 warp_id() { return thread_id() / WARP; }
DEVICE u32 num_warps() { return num_threads() / WARP; }

/// The block's shared memory as a struct. Its size is exactly what the launch asked for (the emulator checks), and holds garbage at first
/// (the emulator fills it with NaN).
template <class T>
DEVICE T& shared() {
#if R1_EMU
    return *static_cast<T*>(r1_emu_shared(sizeof(T)));
#else
    return *reinterpret_cast<T*>(r1_shared);
#endif
}

// ---- Numbers -------------------------------------------------------------------------------------------------------------------------
DEVICE u32 bits_of(float x) {
    u32 bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float float_of(u32 bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
/// OCP E4M3. On gfx942, whose units read FNUZ, the same bits stand for half the value: the matrix wrapper multiplies by what is missing, and
/// -0, which is NaN there, is written by neither the host nor a kernel.
struct e4m3 {
    u8 bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return float_of(u32(x.bits) << 16); }
DEVICE float to_float(f16 x) {
#if R1_CUDA
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#elif R1_HIP
    _Float16 y;
    __builtin_memcpy(&y, &x.bits, 2);
    return float(y);
#else
    // Exponent and mantissa as a float's, whose bias is 112 larger; a denormal is made normal by the multiplication.
    u32 magnitude = u32(x.bits & 0x7fff) << 13;
    float y = float_of(magnitude) * float_of(0x77800000u);
    if (magnitude >= 0x0f800000u) y = float_of(magnitude | 0x7f800000u);
    return float_of(bits_of(y) | u32(x.bits & 0x8000) << 16);
#endif
}
DEVICE float to_float(e4m3 x) {
    u32 magnitude = x.bits & 0x7f;
    // 2^120 corrects the exponent's bias and makes denormals normal; exact.
    float y = magnitude == 0x7f ? float_of(0x7fc00000u) : float_of(magnitude << 20) * float_of(0x7b800000u);
    return float_of(bits_of(y) | u32(x.bits & 0x80) << 24);
}

/// To nearest, ties to even; e4m3 saturates at 448 and keeps NaN.
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
    return x;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
    u32 bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16{u16(bits >> 16 | 0x40)};
    return bf16{u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
DEVICE e4m3 from_float<e4m3>(float x) {
    u32 bits = bits_of(x);
    u8 sign = u8(bits >> 24 & 0x80);
    u32 magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return e4m3{u8(sign | 0x7f)};
    if (magnitude >= bits_of(448.0f)) return e4m3{u8(sign | 0x7e)};
    u8 code;
    if (magnitude < bits_of(0.015625f)) {
        // Below 2^-6 the spacing is 2^-9: adding 2^14 rounds there, ties to even.
        code = u8(bits_of(float_of(magnitude) + 16384.0f) & 0xff);
    } else {
        u32 rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
        code = u8((rounded >> 20) - (120u << 3));
        if (code > 0x7e) code = 0x7e;
    }
#if R1_HIP
    // No -0: see e4m3.
    if (code == 0) sign = 0;
#endif
    return e4m3{u8(sign | code)};
}

/// Element types as the host names them, for kernels that are not worth an instantiation for each.
enum DTypeCode : u32 { DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2, DTYPE_E4M3 = 3 };
DEVICE float load_as_float(const void* base, u32 dtype, i64 index) {
    switch (dtype) {
        case DTYPE_F32: return static_cast<const float*>(base)[index];
        case DTYPE_BF16: return to_float(static_cast<const bf16*>(base)[index]);
        case DTYPE_F16: return to_float(static_cast<const f16*>(base)[index]);
        default: return to_float(static_cast<const e4m3*>(base)[index]);
    }
}
/// F32 or BF16.
DEVICE void store_float(void* base, u32 dtype, i64 index, float value) {
    if (dtype == DTYPE_F32) {
        static_cast<float*>(base)[index] = value;
    } else {
        static_cast<bf16*>(base)[index] = from_float<bf16>(value);
    }
}
/// `value` as it is after a store.
DEVICE float rounded_to(u32 dtype, float value) { return dtype == DTYPE_F32 ? value : to_float(from_float<bf16>(value)); }

constexpr float INFINITE = __builtin_inff();
#if R1_CUDA
DEVICE float exp_of(float x) { return expf(x); }
DEVICE float log_of(float x) { return logf(x); }
DEVICE float sqrt_of(float x) { return sqrtf(x); }
DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
DEVICE float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
#if R1_HIP
DEVICE float exp_of(float x) { return __builtin_expf(x); }
DEVICE float log_of(float x) { return __builtin_logf(x); }
#else
DEVICE float exp_of(float x) { return __builtin_expf(x); }
DEVICE float log_of(float x) { return __builtin_logf(x); }
#endif
DEVICE float sqrt_of(float x) { return __builtin_sqrtf(x); }
DEVICE float max_of(float a, float b) { return __builtin_fmaxf(a, b); }
#if R1_HIP
DEVICE float fma_of(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Without a fused instruction the host's fma is a slow call; two roundings are as right.
DEVICE float fma_of(float a, float b, float c) { return a * b + c; }
#endif
#endif
DEVICE float rsqrt_of(float x) { return 1.0f / sqrt_of(x); }
DEVICE u32 min_of(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 max_of(u32 a, u32 b) { return a > b ? a : b; }
DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

// ---- Warps: every lane takes part ----------------------------------------------------------------------------------------------------
#if R1_CUDA
DEVICE u32 shuffle_xor(u32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE u32 shuffle(u32 x, u32 lane) { return __shfl_sync(0xffffffffu, x, lane); }
#elif R1_HIP
DEVICE u32 shuffle_xor(u32 x, u32 mask) { return u32(__builtin_amdgcn_ds_bpermute(int((lane_id() ^ mask) << 2), int(x))); }
DEVICE u32 shuffle(u32 x, u32 lane) { return u32(__builtin_amdgcn_ds_bpermute(int(lane << 2), int(x))); }
#else
DEVICE u32 shuffle(u32 x, u32 lane) { return r1_emu_shuffle(x, lane); }
DEVICE u32 shuffle_xor(u32 x, u32 mask) { return r1_emu_shuffle(x, lane_id() ^ mask); }
#endif
DEVICE float shuffle_xor(float x, u32 mask) { return float_of(shuffle_xor(bits_of(x), mask)); }
DEVICE float shuffle(float x, u32 lane) { return float_of(shuffle(bits_of(x), lane)); }

/// The same on every lane; a fixed tree.
DEVICE float warp_sum(float x) {
#if R1_EMU
    return r1_emu_warp_sum(x);
#else
    UNROLL for (u32 mask = WARP / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
#endif
}
DEVICE float warp_max(float x) {
#if R1_EMU
    return r1_emu_warp_max(x);
#else
    UNROLL for (u32 mask = WARP / 2; mask > 0; mask /= 2) x = max_of(x, shuffle_xor(x, mask));
    return x;
#endif
}

/// Room for a block-wide sum or maximum: one float per warp, 32 warps at most.
struct BlockScratch {
    float of_warp[32];
};
/// The same on every thread; a fixed tree. `scratch` may be used again after the call, also by the next one.
DEVICE float block_sum(float x, BlockScratch& scratch) {
    x = warp_sum(x);
    if (lane_id() == 0) scratch.of_warp[warp_id()] = x;
    sync_block();
    float sum = 0.0f;
    for (u32 w = 0; w < num_warps(); ++w) sum += scratch.of_warp[w];
    sync_block();
    return sum;
}
DEVICE float block_max(float x, BlockScratch& scratch) {
    x = warp_max(x);
    if (lane_id() == 0) scratch.of_warp[warp_id()] = x;
    sync_block();
    float most = scratch.of_warp[0];
    for (u32 w = 1; w < num_warps(); ++w) most = max_of(most, scratch.of_warp[w]);
    sync_block();
    return most;
}

// ---- Device memory -------------------------------------------------------------------------------------------------------------------
struct alignas(16) Bytes16 {
    u32 words[4];
};
DEVICE u32 atomic_add(u32* at, u32 value) {
#if R1_CUDA
    return atomicAdd(at, value);
#elif R1_HIP
    return __hip_atomic_fetch_add(at, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#else
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
#endif
}
DEVICE u64 atomic_add(u64* at, u64 value) {
#if R1_CUDA
    return atomicAdd(at, value);
#elif R1_HIP
    return __hip_atomic_fetch_add(at, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#else
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
#endif
}
/// Sees what other blocks add.
DEVICE u32 atomic_load(const u32* at) {
#if R1_CUDA
    return *static_cast<const volatile u32*>(at);
#elif R1_HIP
    return __hip_atomic_load(at, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#else
    return __atomic_load_n(at, __ATOMIC_RELAXED);
#endif
}
/// In a loop that waits for another block.
DEVICE void relax() {
#if R1_HIP
    __builtin_amdgcn_s_sleep(1);
#elif R1_EMU
    r1_emu_relax();
#endif
}

/// Copies 16 bytes of device memory (both addresses aligned) to shared memory behind the thread's back; zeros where `valid` is false, and
/// then `from` is not read. Complete after `async_wait` and a `sync_block`.
DEVICE void async_copy16(void* to, const void* from, bool valid) {
#if R1_CUDA
    u32 address = u32(__cvta_generic_to_shared(to));
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
#else
    *static_cast<Bytes16*>(to) = valid ? *static_cast<const Bytes16*>(from) : Bytes16{{0, 0, 0, 0}};
#endif
}
/// As `async_copy16`, 4 bytes.
DEVICE void async_copy4(void* to, const void* from, bool valid) {
#if R1_CUDA
    u32 address = u32(__cvta_generic_to_shared(to));
    int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes));
#else
    *static_cast<u32*>(to) = valid ? *static_cast<const u32*>(from) : 0;
#endif
}
/// Closes a group of copies.
DEVICE void async_commit() {
#if R1_CUDA
    asm volatile("cp.async.commit_group;");
#endif
}
/// Waits for all groups but the last `PENDING`.
template <int PENDING>
DEVICE void async_wait() {
#if R1_CUDA
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
#endif
}

/// For kernels whose last block finishes what all blocks did: true on every thread of the block that is the last of `blocks` to arrive at
/// `counter`, which is zero again afterwards. What the blocks wrote before is visible to the last one. `flag` is in shared memory.
DEVICE bool is_last_block(u32* counter, u32 blocks, u32& flag) {
    fence_device();
    sync_block();
    if (thread_id() == 0) {
        u32 before = atomic_add(counter, 1);
        flag = before + 1 == blocks ? 1 : 0;
        if (flag) *counter = 0;
    }
    sync_block();
    bool last = flag != 0;
    if (last) fence_device();
    return last;
}

/// What `finisher` gives blocks that are done.
constexpr u32 NOT_ME = 0xffffffffu;
/// As `is_last_block`, for more work than one block should do: the last `count` of `blocks` to arrive wait until all have, and get numbers below
/// `count`, each its own; the others get NOT_ME. `count` is at most `blocks` and far less than what the device runs at once, so that whoever is
/// waited for runs.
DEVICE u32 finisher(u32* counter, u32 blocks, u32 count, u32& flag) {
    fence_device();
    sync_block();
    if (thread_id() == 0) {
        // Wraps for those before the last.
        u32 number = atomic_add(counter, 1) + count - blocks;
        flag = number < count ? number : NOT_ME;
        if (number < count) {
            while (atomic_load(counter) < blocks) relax();
            // The last one to leave makes the counter zero.
            if (atomic_add(counter, 1) + 1 == blocks + count) *counter = 0;
        }
    }
    sync_block();
    u32 number = flag;
    if (number != NOT_ME) fence_device();
    return number;
}

#include "mma.cuh"
