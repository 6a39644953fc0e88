//! A whole decode step of the bundled model through the engine's own step, and the bandwidth at which it reads weights.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public functions

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use r1_benches::Machine;
use r1_core::{DType, Rank};
use r1_engine::{EngineConfig, OneBatch, OneBatchBench};
use r1_model::{DeepSeek, Fp8Compute, MlaForm, ModelOptions, WeightFormat};
use r1_weights::{Checkpoint, ModelConfig};

/// Few enough that one step prefills the largest batch: then all sequences decode side by side from first to last.
const INPUT_TOKENS: usize = 32;

fn decode_step(c: &mut Criterion) {
    let machine = Machine::measure();
    let ceiling = machine.read_bytes_per_s;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/model");
    let config = ModelConfig::open(&folder).expect("config.json");
    let checkpoint = Checkpoint::open(&folder).expect("the bundled model");
    let (max_num_seqs, max_model_len) = (16, 1024);
    let options = ModelOptions {
        activation_dtype: DType::F32,
        weights: WeightFormat::AsStored,
        fp8: Fp8Compute::WeightOnly,
        mla_form: MlaForm::Auto,
        max_batched_tokens: 1024,
        max_logit_rows: max_num_seqs,
        max_model_len,
        max_expanded_tokens: 1024,
        layers: None,
        rank: Rank(0),
        world_size: 1,
    };
    let engine = EngineConfig {
        block_size: 64,
        max_num_seqs,
        max_num_batched_tokens: 1024,
        max_model_len,
        kv_memory_fraction: 0.5,
        log_every_steps: u64::MAX,
    };
    let comm = Arc::new(r1_comm::Local::single());
    let model = DeepSeek::load(Arc::new(machine.cpu), comm, &checkpoint, &config, options, &mut |_| {});
    let mut bench =
        OneBatchBench::new(model.expect("the bundled model loads"), &engine).expect("room for a cache");
    let bytes = bench.model().weight_bytes();
    let mut group = c.benchmark_group("decode_step");
    group.sample_size(10).throughput(Throughput::Bytes(bytes as u64));
    for batch_size in [1, 16] {
        let mut best = Duration::MAX;
        group.bench_function(BenchmarkId::new("tiny-r1, batch", batch_size), |bencher| {
            bencher.iter_custom(|steps| {
                let (mut total, mut left) = (Duration::ZERO, steps as usize);
                while left > 0 {
                    // A run ends at the context limit; its first token comes from the prefill.
                    let output_tokens = (left + 1).min(max_model_len - INPUT_TOKENS);
                    let batch = OneBatch { batch_size, input_tokens: INPUT_TOKENS, output_tokens };
                    let times = bench.run(batch, |step| best = best.min(step)).expect("the batch runs");
                    total += times.decode_steps.iter().sum::<Duration>();
                    left -= times.decode_steps.len();
                }
                total
            });
        });
        let rate = bytes as f64 / best.as_secs_f64();
        println!(
            "tiny-r1, batch {batch_size}: best {:.1} us, {:.2} GB/s of all {bytes} weight bytes, {:.2} of the ceiling\n",
            best.as_secs_f64() * 1e6,
            rate / 1e9,
            rate / ceiling
        );
    }
    group.finish();
}

criterion_group!(decode, decode_step);
criterion_main!(decode);
