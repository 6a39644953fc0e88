// Runs one block of a kernel on the calling OS thread: a fibre per GPU thread, switched at barriers and warp operations. See emu.h.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
#include "emu.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef void (*KernelFn)(const void* args);

__thread R1EmuContext* r1_emu __attribute__((tls_model("initial-exec"))) = nullptr;

// ---- Switching ----------------------------------------------------------------------------------------------------------------------
// r1_emu_switch(save, load): pushes what a callee keeps, stores the stack pointer to *save, goes on at the stack `load`.
#if defined(__x86_64__)
asm(R"(
.text
.globl r1_emu_switch
.hidden r1_emu_switch
.type r1_emu_switch,@function
r1_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size r1_emu_switch,.-r1_emu_switch
)");
enum { SAVED_WORDS = 6 };
static void** first_frame(u8* top, void (*entry)()) {
    void** at = reinterpret_cast<void**>(top);
    // The address that the entry would return to, so that the stack is aligned as after a call.
    *--at = nullptr;
    *--at = reinterpret_cast<void*>(entry);
    for (int i = 0; i < SAVED_WORDS; ++i) *--at = nullptr;
    return at;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl r1_emu_switch
.hidden r1_emu_switch
.type r1_emu_switch,%function
r1_emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size r1_emu_switch,.-r1_emu_switch
)");
static void** first_frame(u8* top, void (*entry)()) {
    void** at = reinterpret_cast<void**>(top - 160);
    memset(at, 0, 160);
    at[11] = reinterpret_cast<void*>(entry);  // x30
    return at;
}
#else
#error "the emulated GPU switches fibres on x86-64 and aarch64 only"
#endif
extern "C" void r1_emu_switch(void*** save, void** load);

// ---- Fibres -------------------------------------------------------------------------------------------------------------------------
namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr u64 CANARY = 0x5afe57ac4b07703eull;

struct Fibre {
    void** stack_pointer;
    int state;
    const char* file;
    int line;
    void* arg;
    r1_emu_collective_fn collective;
};

/// What one OS thread needs to run blocks; made at its first block.
struct Machine {
    u8* stacks = nullptr;
    Fibre fibres[R1_EMU_MAX_THREADS];
    R1EmuContext context;
    void** scheduler = nullptr;
    KernelFn kernel = nullptr;
    const void* args = nullptr;
    u8* shared_memory = nullptr;
    u32 shared_room = 0;
    u64 random = 0;
    u32 waits = 0;
    const char* trouble = nullptr;
    char words[256];

    Machine() {
        void* at = mmap(nullptr, STACK_BYTES * R1_EMU_MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at != MAP_FAILED) stacks = static_cast<u8*>(at);
    }
    ~Machine() {
        if (stacks) munmap(stacks, STACK_BYTES * R1_EMU_MAX_THREADS);
        free(shared_memory);
    }
};

thread_local Machine machine;
/// The fibre functions reach it without the initialisation check of `machine`.
__thread Machine* running = nullptr;

u32 next_random(Machine& m) {
    m.random = m.random * 6364136223846793005ull + 1442695040888963407ull;
    return u32(m.random >> 33);
}

void yield(Machine& m, int state) {
    Fibre& self = m.fibres[m.context.thread];
    self.state = state;
    r1_emu_switch(&self.stack_pointer, m.scheduler);
}

void fibre_main() {
    Machine& m = *running;
    m.kernel(m.args);
    yield(m, R1_EMU_DONE);
    abort();
}

void resume(Machine& m, u32 thread) {
    m.context.thread = thread;
    r1_emu_switch(&m.scheduler, m.fibres[thread].stack_pointer);
}

/// A permutation of 0..n that changes with every call: a random odd step from a random start, for a power of two.
struct Order {
    u32 start, step, mask;
    Order(Machine& m, u32 n) {
        mask = 1;
        while (mask < n) mask <<= 1;
        mask -= 1;
        start = next_random(m);
        step = next_random(m) | 1;
    }
    u32 at(u32 i) const { return (start + i * step) & mask; }
};

bool same_site(const Fibre& a, const Fibre& b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

bool diverged(Machine& m, const Fibre& a, const Fibre& b, const char* what) {
    auto where = [](const Fibre& f, char* out, size_t room) {
        if (f.state == R1_EMU_DONE) {
            snprintf(out, room, "the end");
        } else if (f.file) {
            const char* name = strrchr(f.file, '/');
            snprintf(out, room, "%s:%d", name ? name + 1 : f.file, f.line);
        } else {
            snprintf(out, room, "a warp operation");
        }
    };
    char one[100], other[100];
    where(a, one, sizeof one);
    where(b, other, sizeof other);
    snprintf(m.words, sizeof m.words, "threads of one %s wait at %s and at %s", what, one, other);
    m.trouble = m.words;
    return false;
}

/// Runs a warp until all of its lanes wait for the block or have ended.
bool run_warp(Machine& m, u32 first) {
    for (;;) {
        Order order(m, R1_EMU_WARP);
        for (u32 i = 0; i < R1_EMU_WARP; ++i) {
            u32 thread = first + order.at(i);
            if (m.fibres[thread].state == R1_EMU_READY) resume(m, thread);
            if (m.trouble) return false;
        }
        Fibre* lanes = m.fibres + first;
        bool at_warp = false;
        for (u32 i = 0; i < R1_EMU_WARP; ++i) at_warp |= lanes[i].state == R1_EMU_AT_WARP;
        if (!at_warp) return true;
        for (u32 i = 1; i < R1_EMU_WARP; ++i) {
            if (lanes[i].state != lanes[0].state || lanes[i].collective != lanes[0].collective || !same_site(lanes[i], lanes[0])) {
                return diverged(m, lanes[0], lanes[i], "warp");
            }
        }
        if (lanes[0].collective) {
            void* args[R1_EMU_WARP];
            for (u32 i = 0; i < R1_EMU_WARP; ++i) args[i] = lanes[i].arg;
            lanes[0].collective(args);
        }
        for (u32 i = 0; i < R1_EMU_WARP; ++i) lanes[i].state = R1_EMU_READY;
    }
}

bool run(Machine& m) {
    u32 threads = m.context.num_threads, warps = threads / R1_EMU_WARP;
    for (;;) {
        Order order(m, warps);
        for (u32 i = 0; i <= order.mask; ++i) {
            u32 warp = order.at(i);
            if (warp < warps && !run_warp(m, warp * R1_EMU_WARP)) return false;
        }
        for (u32 t = 1; t < threads; ++t) {
            Fibre &a = m.fibres[0], &b = m.fibres[t];
            if (a.state != b.state || (a.state == R1_EMU_AT_BLOCK && !same_site(a, b))) return diverged(m, a, b, "block");
        }
        if (m.fibres[0].state == R1_EMU_DONE) return true;
        for (u32 t = 0; t < threads; ++t) m.fibres[t].state = R1_EMU_READY;
    }
}

/// `R1_EMU_SKIP_BARRIER=norm.cu:41` leaves that barrier out, so that a test can show that its absence is found.
struct Skip {
    char file[200];
    int line = -1;
    Skip() {
        const char* text = getenv("R1_EMU_SKIP_BARRIER");
        const char* colon = text ? strrchr(text, ':') : nullptr;
        if (!colon || size_t(colon - text) >= sizeof file) return;
        memcpy(file, text, colon - text);
        file[colon - text] = 0;
        line = atoi(colon + 1);
    }
    bool has(const char* path, int at) const {
        if (at != line) return false;
        size_t n = strlen(path), k = strlen(file);
        return n >= k && strcmp(path + n - k, file) == 0;
    }
};
const Skip skip;

}  // namespace

void r1_emu_barrier(const char* file, int line, int kind) {
    if (skip.line >= 0 && skip.has(file, line)) return;
    Machine& m = *running;
    Fibre& self = m.fibres[m.context.thread];
    self.file = file;
    self.line = line;
    self.collective = nullptr;
    yield(m, kind);
}

void r1_emu_collective(r1_emu_collective_fn fn, void* arg) {
    Machine& m = *running;
    Fibre& self = m.fibres[m.context.thread];
    self.file = nullptr;
    self.line = 0;
    self.collective = fn;
    self.arg = arg;
    yield(m, R1_EMU_AT_WARP);
}

void* r1_emu_shared(size_t bytes) {
    Machine& m = *running;
    if (bytes != m.context.shared_bytes) {
        snprintf(m.words, sizeof m.words, "it uses %zu bytes of shared memory and was launched with %u", bytes, m.context.shared_bytes);
        m.trouble = m.words;
        yield(m, R1_EMU_DONE);
    }
    return m.context.shared_memory;
}

namespace {
struct Lane {
    u32 value, from;
};
void shuffle_lanes(void** args) {
    u32 values[R1_EMU_WARP];
    for (u32 i = 0; i < R1_EMU_WARP; ++i) values[i] = static_cast<Lane*>(args[i])->value;
    for (u32 i = 0; i < R1_EMU_WARP; ++i) {
        Lane& lane = *static_cast<Lane*>(args[i]);
        lane.value = values[lane.from % R1_EMU_WARP];
    }
}
/// The tree that the butterfly of gpu.cuh makes.
template <class F>
void reduce_lanes(void** args, F combine) {
    float values[R1_EMU_WARP];
    for (u32 i = 0; i < R1_EMU_WARP; ++i) values[i] = *static_cast<float*>(args[i]);
    for (u32 half = R1_EMU_WARP / 2; half > 0; half /= 2) {
        for (u32 i = 0; i < half; ++i) values[i] = combine(values[i], values[i + half]);
    }
    for (u32 i = 0; i < R1_EMU_WARP; ++i) *static_cast<float*>(args[i]) = values[0];
}
void sum_lanes(void** args) {
    reduce_lanes(args, [](float a, float b) { return a + b; });
}
void max_lanes(void** args) {
    reduce_lanes(args, [](float a, float b) { return __builtin_fmaxf(a, b); });
}
}  // namespace

u32 r1_emu_shuffle(u32 x, u32 lane) {
    Lane arg = {x, lane};
    r1_emu_collective(shuffle_lanes, &arg);
    return arg.value;
}
void r1_emu_relax() {
    // Half a minute and more: those waited for have failed.
    constexpr u32 MOST = 1u << 26;
    Machine& m = *running;
    sched_yield();
    if (++m.waits < MOST) return;
    m.trouble = "it waits for blocks that do not come";
    yield(m, R1_EMU_DONE);
}
float r1_emu_warp_sum(float x) {
    r1_emu_collective(sum_lanes, &x);
    return x;
}
float r1_emu_warp_max(float x) {
    r1_emu_collective(max_lanes, &x);
    return x;
}

/// Runs one block; gives nothing, or what went wrong in words that live until this thread's next call. `threads` is a multiple of 32, 1,024
/// at most.
extern "C" const char* r1_emu_run_block(KernelFn kernel, const void* args, const u32* block, const u32* grid, u32 threads, u32 shared_bytes,
                                        u64 seed) {
    Machine& m = machine;
    if (!m.stacks) return "no memory for the fibres' stacks";
    if (threads == 0 || threads % R1_EMU_WARP != 0 || threads > R1_EMU_MAX_THREADS) return "it was launched with a number of threads that no GPU has";
    if (shared_bytes > m.shared_room) {
        free(m.shared_memory);
        m.shared_memory = static_cast<u8*>(aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
        m.shared_room = m.shared_memory ? shared_bytes : 0;
        if (!m.shared_memory) return "no memory for the block's shared memory";
    }
    // NaN as F32, BF16 and E4M3.
    if (shared_bytes) memset(m.shared_memory, 0xff, shared_bytes);
    running = &m;
    r1_emu = &m.context;
    m.kernel = kernel;
    m.args = args;
    m.trouble = nullptr;
    m.random = seed;
    m.waits = 0;
    m.context = {0, threads, {block[0], block[1], block[2]}, {grid[0], grid[1], grid[2]}, m.shared_memory, shared_bytes};
    for (u32 t = 0; t < threads; ++t) {
        u8* stack = m.stacks + STACK_BYTES * t;
        memcpy(stack, &CANARY, sizeof CANARY);
        m.fibres[t].stack_pointer = first_frame(stack + STACK_BYTES, fibre_main);
        m.fibres[t].state = R1_EMU_READY;
        m.fibres[t].file = nullptr;
        m.fibres[t].line = 0;
        m.fibres[t].collective = nullptr;
    }
    run(m);
    if (m.trouble) return m.trouble;
    for (u32 t = 0; t < threads; ++t) {
        if (memcmp(m.stacks + STACK_BYTES * t, &CANARY, sizeof CANARY) != 0) return "a thread's locals are larger than a fibre's stack";
    }
    return nullptr;
}
