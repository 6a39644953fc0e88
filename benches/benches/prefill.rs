//! Where a prefill is cheaper expanded than absorbed: the rule in `model::mla` counts multiplications, this measures.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public functions

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use r1_benches::{Machine, Synthetic, load};
use r1_engine::OneBatch;
use r1_model::MlaForm;

fn prefill(c: &mut Criterion) {
    Machine::measure();
    let synthetic = Synthetic::make();
    let mut best = Vec::new();
    for form in [MlaForm::Absorbed, MlaForm::Expanded] {
        let mut bench = load(&synthetic.config, &synthetic.checkpoint, form);
        for input_tokens in [32, 64, 128, 256, 512] {
            let batch = OneBatch { batch_size: 1, input_tokens, output_tokens: 1 };
            let mut shortest = Duration::MAX;
            let mut group = c.benchmark_group("prefill");
            group.sample_size(10).throughput(Throughput::Elements(input_tokens as u64));
            group.bench_function(BenchmarkId::new(format!("{form:?}"), input_tokens), |bencher| {
                bencher.iter_custom(|runs| {
                    let once = |_| bench.run(batch, |_| {}).expect("the batch runs").prefill;
                    (0..runs).map(once).inspect(|&took| shortest = shortest.min(took)).sum()
                });
            });
            group.finish();
            best.push((form, input_tokens, shortest));
        }
    }
    let (absorbed, expanded) = best.split_at(best.len() / 2);
    for ((_, tokens, absorbed), (_, _, expanded)) in absorbed.iter().zip(expanded) {
        println!(
            "{tokens} tokens: absorbed {:.1} ms, expanded {:.1} ms, expanded / absorbed {:.2}",
            absorbed.as_secs_f64() * 1e3,
            expanded.as_secs_f64() * 1e3,
            expanded.as_secs_f64() / absorbed.as_secs_f64()
        );
    }
}

criterion_group!(prefills, prefill);
criterion_main!(prefills);
