//! Kernels of one device against what the same device gives in the same run: a copy for those that move bytes, the largest
//! matrix product for those that compute. Called by tools/gpu/check.sh. Knows no model.
#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use r1_backend::{Activation, Backend, HostSlice, Tensor, Weight};
use r1_core::DType;
use r1_gpu::{Found, Gpu, devices};

const USAGE: &str = "usage: r1-gpu-check devices
       r1-gpu-check bench cuda|rocm|emu [--ordinal N] [--matmul-tflops X] [--allow-ptx]
--matmul-tflops: what another library reached here in BF16; without it the ceiling of what computes is the best of this run.";
/// Leaves room for a server beside it.
const MEMORY_FRACTION: f64 = 0.3;
/// A figure is the best of as many rounds.
const ROUNDS: usize = 5;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args().skip(1).collect();
    match run(&args.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("r1-gpu-check: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result<(), Box<dyn Error>> {
    match args {
        ["devices"] => {
            for Found { driver, devices } in devices() {
                match devices {
                    Ok(count) => println!("{driver}: {count}"),
                    Err(error) => println!("{driver}: none, {error}"),
                }
            }
            Ok(())
        }
        ["bench", driver, options @ ..] => bench(driver, options),
        _ => Err(USAGE.into()),
    }
}

fn bench(driver: &str, mut options: &[&str]) -> Result<(), Box<dyn Error>> {
    let (mut ordinal, mut matmul_tflops, mut allow_ptx) = (0, None, false);
    loop {
        options = match options {
            [] => break,
            ["--ordinal", value, rest @ ..] => {
                ordinal = value.parse()?;
                rest
            }
            ["--matmul-tflops", value, rest @ ..] => {
                matmul_tflops = Some(value.parse::<f64>()?);
                rest
            }
            ["--allow-ptx", rest @ ..] => {
                allow_ptx = true;
                rest
            }
            _ => return Err(USAGE.into()),
        }
    }
    let gpu = match driver {
        "cuda" => Gpu::cuda(ordinal, MEMORY_FRACTION, allow_ptx)?,
        "rocm" => Gpu::rocm(ordinal, MEMORY_FRACTION)?,
        "emu" => Gpu::emulated(2, 1 << 30)?,
        _ => return Err(USAGE.into()),
    };
    // The emulator only shows that everything runs.
    let scale = if driver == "emu" { Scale::Small } else { Scale::Large };
    Bench { gpu, scale, random: 1 }.all(matmul_tflops)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scale {
    /// Sizes of DeepSeek-V3.
    Large,
    Small,
}

/// What one kernel reached.
struct Row {
    kernel: String,
    took: Duration,
    /// Bytes that it has to move, and operations that it has to do.
    bytes: usize,
    flops: usize,
}

struct Bench {
    gpu: Gpu,
    scale: Scale,
    random: u64,
}

impl Bench {
    fn size(&self, large: usize, small: usize) -> usize {
        if self.scale == Scale::Large { large } else { small }
    }

    /// Numbers between -1 and 1: zeros would let a GPU run faster than it can.
    fn tensor(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor<Gpu>, Box<dyn Error>> {
        let tensor = self.gpu.alloc(shape, dtype)?;
        let mut value = || {
            self.random = self.random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (self.random >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..tensor.num_elements()).map(|_| value()).collect();
        self.gpu.upload(HostSlice::F32(&values), &tensor);
        Ok(tensor)
    }

    /// The best time of one run, in rounds of so many that waiting for their end does not count.
    fn time(&self, mut enqueue: impl FnMut()) -> Result<Duration, Box<dyn Error>> {
        let (rounds, runs) = if self.scale == Scale::Large { (ROUNDS, 20) } else { (1, 1) };
        enqueue();
        self.gpu.flush().wait()?;
        let mut best = Duration::MAX;
        for _ in 0..rounds {
            let start = Instant::now();
            for _ in 0..runs {
                enqueue();
            }
            self.gpu.flush().wait()?;
            best = best.min(start.elapsed() / runs);
        }
        Ok(best)
    }

    fn all(mut self, matmul_tflops: Option<f64>) -> Result<(), Box<dyn Error>> {
        let copied_bytes = self.size(1 << 30, 1 << 20);
        let copy_bytes_per_s = self.gpu.copy_bytes_per_s(copied_bytes)?;
        let mut rows = vec![self.norm()?, self.add()?];
        let batches = if self.scale == Scale::Large { &[1, 64, 4096][..] } else { &[1, 16] };
        for &m in batches {
            rows.push(self.linear(m, DType::F8E4M3)?);
            rows.push(self.linear(m, DType::BF16)?);
        }
        let own = rows.iter().map(|row| row.flops as f64 / row.took.as_secs_f64()).fold(0.0, f64::max);
        let flops_per_s = matmul_tflops.map_or(own, |tflops| tflops * 1e12);
        let whose = if matmul_tflops.is_some() {
            "another library's BF16 product"
        } else {
            "the best product of this run"
        };
        println!("{}", self.gpu.describe());
        if self.scale == Scale::Small {
            // How long the emulator takes says nothing about a GPU.
            println!("\n| kernel | |\n|---|---|");
            for row in &rows {
                println!("| {} | ran |", row.kernel);
            }
            return Ok(());
        }
        println!(
            "ceilings: {:.0} GB/s copied; {:.1} TFLOP/s, {whose}\n",
            copy_bytes_per_s / 1e9,
            flops_per_s / 1e12
        );
        println!("| kernel | us | GB/s | TFLOP/s | of the ceiling that binds |\n|---|---|---|---|---|");
        for Row { kernel, took, bytes, flops } in rows {
            let seconds = took.as_secs_f64();
            let (moved, computed) = (bytes as f64 / seconds, flops as f64 / seconds);
            let share = (moved / copy_bytes_per_s).max(computed / flops_per_s);
            println!(
                "| {kernel} | {:.1} | {:.0} | {:.1} | {:.0}% |",
                seconds * 1e6,
                moved / 1e9,
                computed / 1e12,
                share * 100.0
            );
        }
        Ok(())
    }

    fn norm(&mut self) -> Result<Row, Box<dyn Error>> {
        let (tokens, hidden) = (self.size(4096, 16), self.size(7168, 256));
        let x = self.tensor(&[tokens, hidden], DType::BF16)?;
        let weight = self.tensor(&[hidden], DType::BF16)?;
        let out = Activation::dense(self.gpu.alloc(&[tokens, hidden], DType::BF16)?);
        let took = self.time(|| self.gpu.rms_norm(&x, &weight, 1e-6, &out))?;
        Ok(Row {
            kernel: format!("rms_norm [{tokens}, {hidden}]"),
            took,
            bytes: tokens * hidden * 4,
            flops: 0,
        })
    }

    fn add(&mut self) -> Result<Row, Box<dyn Error>> {
        let (tokens, hidden) = (self.size(4096, 16), self.size(7168, 256));
        let residual = self.tensor(&[tokens, hidden], DType::BF16)?;
        let x = self.tensor(&[tokens, hidden], DType::BF16)?;
        let took = self.time(|| self.gpu.add(&residual, &x))?;
        Ok(Row { kernel: format!("add [{tokens}, {hidden}]"), took, bytes: tokens * hidden * 6, flops: 0 })
    }

    /// The projection of queries, of which weights alone are 37 MB in FP8.
    fn linear(&mut self, tokens: usize, dtype: DType) -> Result<Row, Box<dyn Error>> {
        let (m, n, k) = (tokens, self.size(24_576, 256), self.size(1536, 256));
        let x = Activation::dense(self.tensor(&[m, k], DType::BF16)?);
        let data = self.tensor(&[n, k], dtype)?;
        let weight = if dtype == DType::F8E4M3 {
            let scales = self.tensor(&[n.div_ceil(128), k.div_ceil(128)], DType::F32)?;
            Weight::Fp8Block { data, scales, block: [128, 128], offset: [0, 0] }
        } else {
            Weight::Dense { data }
        };
        let out = self.gpu.alloc(&[m, n], DType::BF16)?;
        let took = self.time(|| self.gpu.linear(&x, &weight, &out))?;
        let bytes = weight.size_bytes() + (m * k + m * n) * 2;
        Ok(Row {
            kernel: format!("linear {dtype} [{m}, {k}] x [{n}, {k}]"),
            took,
            bytes,
            flops: 2 * m * n * k,
        })
    }
}
