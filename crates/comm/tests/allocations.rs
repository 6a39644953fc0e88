//! Ranks meet without allocating: once every collective has run, running them again takes no memory from the heap.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use r1_backend::{Backend, Communicator};
use r1_comm::Local;
use r1_core::DType;
use r1_cpu::{Cpu, CpuOptions};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the same contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Collectives alternate between two sets of staging, so that two rounds warm both.
const WARM_UP: usize = 2;
const ROUNDS: usize = 50;

#[test]
fn later_collectives_allocate_nothing() {
    const WORLD: usize = 2;
    let (rows, n) = (5, 300);
    let together = Barrier::new(WORLD);
    let counted: Vec<usize> = thread::scope(|scope| {
        let run = |local: Local| {
            let cpu = Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("threads start");
            let rank = Communicator::<Cpu>::rank(&local);
            let alloc = |shape: &[usize], dtype| cpu.alloc(shape, dtype).expect("room");
            let whole = [DType::F32, DType::BF16].map(|dtype| alloc(&[rows, WORLD * n], dtype));
            let part = [DType::F32, DType::BF16].map(|dtype| alloc(&[rows, n], dtype));
            let flat = alloc(&[WORLD * rows, n], DType::F32);
            let ids = (alloc(&[rows], DType::U32), alloc(&[WORLD * rows], DType::U32));
            let round = || {
                for (part, whole) in part.iter().zip(&whole) {
                    local.all_reduce(&cpu, part);
                    local.all_gather_last(&cpu, part, whole);
                    local.all_to_all(&cpu, whole, whole);
                    local.broadcast(&cpu, whole, 1);
                }
                local.all_gather(&cpu, &part[0], &flat);
                local.reduce_scatter(&cpu, &flat, &part[0]);
                local.all_gather(&cpu, &ids.0, &ids.1);
                if rank == 0 {
                    local.send(&cpu, &flat, 1);
                    local.recv(&cpu, &ids.0, 1);
                } else {
                    local.recv(&cpu, &flat, 0);
                    local.send(&cpu, &ids.0, 0);
                }
                Communicator::<Cpu>::check(&local)
            };
            for _ in 0..WARM_UP {
                round().expect("both ranks are there");
            }
            together.wait();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            together.wait();
            for _ in 0..ROUNDS {
                round().expect("both ranks are there");
            }
            together.wait();
            let counted = ALLOCATIONS.load(Ordering::Relaxed) - before;
            together.wait();
            assert!(before > 0, "allocations are counted");
            counted
        };
        // Staging begins with less room than is needed, so that it must grow and keep what it grew to.
        let threads: Vec<_> =
            Local::group(WORLD, 1).into_iter().map(|local| scope.spawn(move || run(local))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank ends")).collect()
    });
    assert_eq!(counted, [0; WORLD], "allocations in {ROUNDS} rounds");
}
