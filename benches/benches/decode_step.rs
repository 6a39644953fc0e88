//! A whole decode step through the engine's own step: of a random model of V3's shape that no cache holds, with the
//! bandwidth at which it reads weights, and of the bundled model, which fits the caches and shows what a step costs besides.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public functions

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use r1_benches::{INPUT_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS, Machine, Synthetic, bundled, load};
use r1_cpu::Cpu;
use r1_engine::{OneBatch, OneBatchBench};
use r1_model::MlaForm;

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
    let mut bench = load(&synthetic.config, &synthetic.checkpoint, MlaForm::Auto);
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

    let (config, checkpoint) = bundled();
    let mut bench = load(&config, &checkpoint, MlaForm::Auto);
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
