//! Shared measuring code of the benches: the machine's ceilings, random tensors, and lines that set one against the other.
#![forbid(unsafe_code)]

mod model;
mod synthetic;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use r1_backend::{Backend, HostTensor, Tensor};
use r1_core::DType;
use r1_cpu::{BarrierCost, Cpu, CpuOptions, Pages, ReadCeiling, ReadFrom};

pub use model::{INPUT_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS, bundled, load, options};
pub use synthetic::Synthetic;

/// Bytes read to measure the ceiling: far more than any cache.
const CEILING_BYTES: usize = 512 << 20;

/// The machine: what it is, and what its memory and its arithmetic give.
pub struct Machine {
    /// The backend under test, on every core.
    pub cpu: Cpu,
    /// Bytes per second that all threads together read from memory, from the kind of pages that gives most.
    pub read_bytes_per_s: f64,
    /// Multiplications and additions per second of all threads together, by the instruction that does most.
    pub flops_per_s: f64,
    /// The element type that `--dtype auto` takes for activations here.
    pub activation: DType,
}

/// What one run of an operation takes at least.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Bytes that must come from memory.
    pub bytes: usize,
    /// Multiplications and additions; 0 where they are not what counts.
    pub flops: usize,
}

impl Machine {
    /// Measures the ceilings and prints the header of the report.
    ///
    /// # Panics
    /// When there is no CPU backend, or no memory.
    pub fn measure() -> Self {
        let cpu = Cpu::new(CpuOptions { threads: None, isa: None }).expect("a CPU backend");
        println!("{}; git {}", cpu.describe(), git_hash());
        let mut read_bytes_per_s = 0.0_f64;
        let mut report = |what: &str, measured: io::Result<ReadCeiling>| match measured {
            Ok(ReadCeiling { bytes_per_s, huge_share }) => {
                let share = huge_share.map_or("unknown".into(), |share| format!("{:.0} %", share * 100.0));
                println!("reading {what}: {:.2} GB/s ({share} of it in huge pages)", bytes_per_s / 1e9);
                read_bytes_per_s = read_bytes_per_s.max(bytes_per_s);
            }
            Err(error) => println!("reading {what}: not measured: {error}"),
        };
        report("memory, huge pages", cpu.read_ceiling(ReadFrom::Memory(Pages::Huge), CEILING_BYTES));
        report("memory, small pages", cpu.read_ceiling(ReadFrom::Memory(Pages::Small), CEILING_BYTES));
        match file_of_ones(CEILING_BYTES) {
            Ok(file) => {
                let mapped = |pages| cpu.read_ceiling(ReadFrom::File(&file, pages), CEILING_BYTES);
                report("a mapped file in the page cache", mapped(Pages::Any));
                report("a mapped file in the page cache, small pages", mapped(Pages::Small));
            }
            Err(error) => println!("reading a mapped file: not measured: {error}"),
        }
        let compute = cpu.compute_ceilings();
        for ceiling in &compute {
            println!("{}: {:.0} GFLOP/s", ceiling.instruction, ceiling.flops_per_s / 1e9);
        }
        let flops_per_s = compute.iter().map(|ceiling| ceiling.flops_per_s).fold(0.0, f64::max);
        let BarrierCost { spinning, parked } = cpu.barrier_cost();
        println!(
            "a job that all threads come to: {spinning:.2?} while they spin, {parked:.1?} once they sleep"
        );
        let activation = if cpu.multiplies_bf16() { DType::BF16 } else { DType::F32 };
        println!(
            "ceilings: {:.2} GB/s, {:.0} GFLOP/s; activations {activation}\n",
            read_bytes_per_s / 1e9,
            flops_per_s / 1e9
        );
        assert!(read_bytes_per_s > 0.0, "no memory for a bench");
        Self { cpu, read_bytes_per_s, flops_per_s, activation }
    }

    /// Runs one criterion bench of an operation, and prints achieved against ceilings. Returns the best time of one run,
    /// [`Duration::MAX`] where a filter left it out.
    pub fn bench(
        &self,
        c: &mut Criterion,
        group: &str,
        name: &str,
        work: Work,
        mut run: impl FnMut(),
    ) -> Duration {
        let best = Cell::new(Duration::MAX);
        let mut group = c.benchmark_group(group);
        // A long operation runs no more often than there are samples.
        group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Bytes(work.bytes as u64));
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
        // A filter on the command line may have left it out.
        if best.get() < Duration::MAX {
            println!("{name}: {}\n", self.beside_ceilings(work, best.get()));
        }
        best.get()
    }

    /// The words of a report: time, rates, and their shares of the ceilings.
    pub fn beside_ceilings(&self, work: Work, took: Duration) -> String {
        let seconds = took.as_secs_f64();
        let bytes_per_s = work.bytes as f64 / seconds;
        let read = format!(
            "{:.1} us; {:.2} GB/s, {:.2} of the read ceiling",
            seconds * 1e6,
            bytes_per_s / 1e9,
            bytes_per_s / self.read_bytes_per_s
        );
        if work.flops == 0 {
            return read;
        }
        let flops_per_s = work.flops as f64 / seconds;
        let share = flops_per_s / self.flops_per_s;
        format!("{read}; {:.1} GFLOP/s, {share:.2} of the multiply-add ceiling", flops_per_s / 1e9)
    }
}

/// A file without a name that holds 1.0 as often as it takes, on disk, so that nothing is written any more while it is read.
fn file_of_ones(size_bytes: usize) -> io::Result<File> {
    let path = std::env::temp_dir().join(format!("r1-benches-{}", std::process::id()));
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    let ones: Vec<u8> = std::iter::repeat_n(1.0_f32.to_le_bytes(), 1 << 20).flatten().collect();
    for _ in 0..size_bytes / ones.len() {
        file.write_all(&ones)?;
    }
    file.sync_data()?;
    Ok(file)
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
