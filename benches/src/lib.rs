//! Shared measuring code of the benches: the memory's ceiling, random tensors, and lines that set one against the other.
#![forbid(unsafe_code)]

mod model;
mod synthetic;

use std::cell::Cell;
use std::hint::black_box;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use r1_backend::{Backend, HostTensor, Tensor};
use r1_core::DType;
use r1_cpu::{Cpu, CpuOptions};

pub use model::{INPUT_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS, bundled, load, options};
pub use synthetic::Synthetic;

/// Bytes read to measure the ceiling: far more than any cache.
const CEILING_BYTES: usize = 1 << 30;

/// The machine: what it is, and what its memory gives.
pub struct Machine {
    /// The backend under test, on every core.
    pub cpu: Cpu,
    /// Bytes per second that all cores together read from memory, best of several passes.
    pub read_bytes_per_s: f64,
}

impl Machine {
    /// Measures the ceiling and prints the header of the report.
    ///
    /// # Panics
    /// When there is no CPU backend.
    pub fn measure() -> Self {
        let cpu = Cpu::new(CpuOptions { threads: None, isa: None }).expect("a CPU backend");
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let read_bytes_per_s = read_ceiling(threads);
        println!("{}; git {}", cpu.describe(), git_hash());
        println!("ceiling: {:.1} GB/s read by {threads} threads\n", read_bytes_per_s / 1e9);
        Self { cpu, read_bytes_per_s }
    }

    /// Runs one criterion bench of an operation that moves `bytes`, and prints achieved against ceiling. Returns the best
    /// time of one run.
    pub fn bench(
        &self,
        c: &mut Criterion,
        group: &str,
        name: &str,
        bytes: usize,
        mut run: impl FnMut(),
    ) -> Duration {
        let best = Cell::new(Duration::MAX);
        let mut group = c.benchmark_group(group);
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter_custom(|iterations| {
                let start = Instant::now();
                for _ in 0..iterations {
                    run();
                }
                let took = start.elapsed();
                best.set(best.get().min(took / iterations.try_into().unwrap_or(u32::MAX)));
                took
            });
        });
        group.finish();
        let rate = bytes as f64 / best.get().as_secs_f64();
        println!(
            "{name}: {:.1} us, {:.2} GB/s, {:.2} of the ceiling\n",
            best.get().as_secs_f64() * 1e6,
            rate / 1e9,
            rate / self.read_bytes_per_s
        );
        best.get()
    }
}

/// The commit that is measured; `unknown` outside a checkout.
pub fn git_hash() -> String {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    let hash = output
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok());
    hash.map_or_else(|| "unknown".into(), |hash| hash.trim().to_owned())
}

fn read_ceiling(threads: usize) -> f64 {
    let data = vec![1_u64; CEILING_BYTES / 8];
    let pass = || {
        let start = Instant::now();
        thread::scope(|scope| {
            for part in data.chunks(data.len().div_ceil(threads)) {
                scope.spawn(move || {
                    // Sixteen independent sums, so that the additions are not what is measured.
                    let mut sums = [0_u64; 16];
                    for chunk in part.as_chunks::<16>().0 {
                        for (sum, value) in sums.iter_mut().zip(chunk) {
                            *sum = sum.wrapping_add(*value);
                        }
                    }
                    black_box(sums);
                });
            }
        });
        CEILING_BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}

/// A seeded sequence of bytes, the same in every run.
pub struct Random(u64);

impl Random {
    /// Begins at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits (SplitMix64).
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn next_f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `n` such values.
    pub fn f32s(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next_f32()).collect()
    }

    /// A tensor of random values in [-1, 1); for F8E4M3 random codes without NaN.
    ///
    /// # Panics
    /// For U32, and when there is no memory.
    pub fn tensor<B: Backend>(&mut self, backend: &B, shape: &[usize], dtype: DType) -> Tensor<B> {
        let n = shape.iter().product::<usize>();
        let bytes: Vec<u8> = match dtype {
            DType::F32 => self.f32s(n).into_iter().flat_map(f32::to_le_bytes).collect(),
            // The upper half of an F32 is the BF16 below it.
            DType::BF16 => {
                self.f32s(n).into_iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect()
            }
            DType::F8E4M3 => (0..n).map(|_| self.next_u64() as u8 & 0xf7).collect(),
            other => panic!("no random {other}"),
        };
        backend.import_matrix(&HostTensor::from_vec(bytes, shape, dtype)).expect("memory for a bench")
    }
}
