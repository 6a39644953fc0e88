// The emulator's side of gpu.cuh: a block of GPU threads as fibres of one OS thread.
//
// Between two barriers the threads of a block run one after the other, warp by warp, in an order that changes from barrier to barrier, and
// a warp runs far ahead of the others. So a missing barrier shows as a wrong result, whichever way the data should have gone. What it does not
// find: races between blocks, and everything that needs two threads to run at the same instant.
#pragma once
#include <stddef.h>

enum { R1_EMU_READY = 0, R1_EMU_AT_WARP = 1, R1_EMU_AT_BLOCK = 2, R1_EMU_DONE = 3 };
enum { R1_EMU_WARP = 32, R1_EMU_MAX_THREADS = 1024 };

/// Done once for a warp, when all of its lanes have brought their `arg`.
typedef void (*r1_emu_collective_fn)(void** args);

struct R1EmuContext {
    u32 thread;
    u32 num_threads;
    u32 block[3];
    u32 grid[3];
    void* shared_memory;
    u32 shared_bytes;
};

/// The fibre that runs on this OS thread.
extern __thread R1EmuContext* r1_emu __attribute__((tls_model("initial-exec")));

void r1_emu_barrier(const char* file, int line, int kind);
void r1_emu_collective(r1_emu_collective_fn fn, void* arg);
void* r1_emu_shared(size_t bytes);
u32 r1_emu_shuffle(u32 x, u32 lane);
void r1_emu_relax();
float r1_emu_warp_sum(float x);
float r1_emu_warp_max(float x);
