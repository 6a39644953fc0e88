//! What `--deterministic` costs: decode is the same code, a prefill loses the form that is chosen by size. Both engines take
//! turns, so that what else the machine does meets both alike.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public functions

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use r1_benches::{Machine, Synthetic, load};
use r1_engine::OneBatch;
use r1_model::MlaForm;

const ROUNDS: usize = 15;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn deterministic(_: &mut Criterion) {
    Machine::measure();
    let synthetic = Synthetic::make();
    let mut engines =
        [MlaForm::Auto, MlaForm::Absorbed].map(|form| load(&synthetic.config, &synthetic.checkpoint, form));
    let mut report = |what: &str, batch: OneBatch, of_decode: bool| {
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=ROUNDS {
            // Who comes first alternates, too.
            for turn in [round % 2, 1 - round % 2] {
                let (engine, times) = (&mut engines[turn], &mut times[turn]);
                let took = engine.run(batch, |_| {}).expect("the batch runs");
                // The first round warms up.
                if round > 0 {
                    times.push(if of_decode { median(took.decode_steps) } else { took.prefill });
                }
            }
        }
        let [free, deterministic] = times.map(|times| median(times).as_secs_f64() * 1e3);
        println!(
            "{what}: {free:.2} ms without, {deterministic:.2} ms with --deterministic: {:.3}",
            deterministic / free
        );
    };
    for batch_size in [1, 8] {
        let batch = OneBatch { batch_size, input_tokens: 32, output_tokens: 32 };
        report(&format!("decode step of {batch_size}"), batch, true);
    }
    for input_tokens in [64, 256, 512] {
        let batch = OneBatch { batch_size: 1, input_tokens, output_tokens: 1 };
        report(&format!("prefill of {input_tokens} tokens"), batch, false);
    }
}

criterion_group!(costs, deterministic);
criterion_main!(costs);
