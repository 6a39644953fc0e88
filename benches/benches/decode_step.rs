//! A whole decode step through the engine's own step: of a random model of V3's shape that no cache holds, with the
//! bandwidth at which it reads weights, and of the bundled model, which fits the caches and shows what a step costs besides.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public functions

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use r1_benches::{Machine, Synthetic};
use r1_core::{DType, Rank};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{EngineConfig, OneBatch, OneBatchBench};
use r1_model::{DeepSeek, Fp8Compute, MlaForm, ModelOptions, WeightFormat};
use r1_weights::{Checkpoint, ModelConfig};

const MAX_NUM_SEQS: usize = 16;
const MAX_MODEL_LEN: usize = 512;
/// Few enough that one step prefills the largest batch: then all sequences decode side by side from first to last.
const INPUT_TOKENS: usize = 32;

fn load(config: &ModelConfig, checkpoint: &Checkpoint) -> OneBatchBench<Cpu> {
    let options = ModelOptions {
        activation_dtype: DType::F32,
        weights: WeightFormat::AsStored,
        fp8: Fp8Compute::WeightOnly,
        mla_form: MlaForm::Auto,
        max_batched_tokens: MAX_NUM_SEQS * INPUT_TOKENS,
        max_logit_rows: MAX_NUM_SEQS,
        max_model_len: MAX_MODEL_LEN,
        max_expanded_tokens: MAX_NUM_SEQS * INPUT_TOKENS,
        layers: None,
        rank: Rank(0),
        world_size: 1,
    };
    let engine = EngineConfig {
        block_size: 64,
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: MAX_NUM_SEQS * INPUT_TOKENS,
        max_model_len: MAX_MODEL_LEN,
        kv_memory_fraction: 0.5,
        log_every_steps: u64::MAX,
    };
    let cpu = Cpu::new(CpuOptions::default()).expect("a CPU backend");
    let comm = Arc::new(r1_comm::Local::single());
    let model =
        DeepSeek::load(Arc::new(cpu), comm, checkpoint, config, options, &mut |_| {}).expect("it loads");
    OneBatchBench::new(model, &engine).expect("room for a cache")
}

/// Runs one criterion bench; gives the best step.
fn measure(
    c: &mut Criterion,
    name: &str,
    bench: &mut OneBatchBench<Cpu>,
    batch_size: usize,
    bytes: usize,
) -> Duration {
    let mut best = Duration::MAX;
    let mut group = c.benchmark_group("decode_step");
    group.sample_size(10).throughput(Throughput::Bytes(bytes as u64));
    group.bench_function(BenchmarkId::new(format!("{name}, batch"), batch_size), |bencher| {
        bencher.iter_custom(|steps| {
            let (mut total, mut left) = (Duration::ZERO, steps as usize);
            while left > 0 {
                // A run ends at the context limit; its first token comes from the prefill.
                let output_tokens = (left + 1).min(MAX_MODEL_LEN - INPUT_TOKENS);
                let batch = OneBatch { batch_size, input_tokens: INPUT_TOKENS, output_tokens };
                let times = bench.run(batch, |step| best = best.min(step)).expect("the batch runs");
                total += times.decode_steps.iter().sum::<Duration>();
                left -= times.decode_steps.len();
            }
            total
        });
    });
    group.finish();
    best
}

fn decode_step(c: &mut Criterion) {
    let machine = Machine::measure();
    let synthetic = Synthetic::make();
    let mut bench = load(&synthetic.config, &synthetic.checkpoint);
    let bytes = synthetic.bytes_per_token;
    let best = measure(c, "random model of V3's shape", &mut bench, 1, bytes);
    let rate = bytes as f64 / best.as_secs_f64();
    println!(
        "random model of V3's shape ({} MB), batch 1: best {:.2} ms for {} MB read, {:.2} GB/s, {:.2} of the ceiling\n",
        bench.model().weight_bytes() / 1_000_000,
        best.as_secs_f64() * 1e3,
        bytes / 1_000_000,
        rate / 1e9,
        rate / machine.read_bytes_per_s
    );
    drop(bench);

    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/model");
    let config = ModelConfig::open(&folder).expect("config.json");
    let checkpoint = Checkpoint::open(&folder).expect("the bundled model");
    let mut bench = load(&config, &checkpoint);
    let bytes = bench.model().weight_bytes();
    for batch_size in [1, MAX_NUM_SEQS] {
        let best = measure(c, "tiny-r1", &mut bench, batch_size, bytes);
        println!(
            "tiny-r1 (in the caches), batch {batch_size}: best {:.1} us a step\n",
            best.as_secs_f64() * 1e6
        );
    }
}

criterion_group!(decode, decode_step);
criterion_main!(decode);
