//! The sampler's shortcuts against a full sort, on a vocabulary of a real model's order.

mod support;

use r1_backend::philox::gumbel;
use r1_backend::{Backend, LogprobsOut, RowSampling, SamplingBatch};
use r1_core::DType;
use support::{Random, every_isa, ids, read, read_ids, tensor};

const VOCAB: usize = 20_000;

/// Steps 3 to 5 as they are documented, with a sort.
fn draw(row: &RowSampling, logits: &[f32]) -> u32 {
    let mut kept: Vec<(f32, u32)> = logits.iter().map(|z| z / row.temperature).zip(0..).collect();
    kept.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let max = kept[0].0;
    if row.min_p > 0.0 {
        kept.retain(|c| c.0 >= max + row.min_p.ln());
    }
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    let mass: Vec<f64> = kept.iter().map(|c| f64::from(c.0 - max).exp()).collect();
    let total = mass.iter().sum::<f64>();
    let mut reached = 0.0;
    let last = mass.iter().position(|p| {
        reached += p;
        reached >= f64::from(row.top_p) * total
    });
    kept.truncate(last.map_or(kept.len(), |last| last + 1));
    let noisy = |c: &(f32, u32)| c.0 + gumbel(row.seed, row.position, c.1);
    kept.iter().max_by(|a, b| noisy(a).total_cmp(&noisy(b)).then(b.1.cmp(&a.1))).expect("some are kept").1
}

#[test]
fn shortcuts_draw_what_a_sort_draws() {
    for cpu in every_isa(2) {
        let mut random = Random(5);
        let out = cpu.alloc(&[1], DType::U32).expect("room");
        for round in 0..60u64 {
            // Flat, peaked, and with many equal values.
            let spread = [0.5, 8.0, 40.0][random.below(3)];
            let mut logits: Vec<f32> =
                (0..VOCAB).map(|_| (random.float() + random.float() + random.float()) * spread).collect();
            if round % 4 == 0 {
                logits = logits.iter().map(|z| z.round()).collect();
            }
            let row = RowSampling {
                temperature: [0.3, 1.0, 1.7][random.below(3)],
                top_p: [1.0, 0.95, 0.5, 0.01][random.below(4)],
                top_k: [0, 1, 50, 3000, VOCAB as u32 + 5][random.below(5)],
                min_p: [0.0, 0.05, 0.9][random.below(3)],
                seed: round,
                position: round * 7,
                ..RowSampling::greedy()
            };
            let device = tensor(&cpu, &logits, &[1, VOCAB], DType::F32);
            let sampling = SamplingBatch { rows: vec![row.clone()], ..SamplingBatch::default() };
            cpu.sample(&device, &sampling, &out);
            assert_eq!(read_ids(&cpu, &out), [draw(&row, &logits)], "round {round} {row:?}");
        }
    }
}

#[test]
fn logprobs_of_a_large_vocabulary_are_a_softmax() {
    for cpu in every_isa(2) {
        let mut random = Random(6);
        let logits: Vec<f32> = (0..VOCAB).map(|_| random.float() * 9.0).collect();
        let device = tensor(&cpu, &logits, &[1, VOCAB], DType::F32);
        let out = LogprobsOut {
            chosen: cpu.alloc(&[1], DType::F32).expect("room"),
            top_ids: cpu.alloc(&[1, 20], DType::U32).expect("room"),
            top: cpu.alloc(&[1, 20], DType::F32).expect("room"),
        };
        cpu.logprobs(&device, &ids(&cpu, &[777], &[1]), &out);
        let log_sum = logits.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
        let mut best: Vec<u32> = (0..VOCAB as u32).collect();
        best.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        assert_eq!(read_ids(&cpu, &out.top_ids), best[..20]);
        let got = [read(&cpu, &out.chosen), read(&cpu, &out.top)].concat();
        for (got, id) in got.into_iter().zip([777].iter().chain(&best)) {
            assert!((f64::from(got) - (f64::from(logits[*id as usize]) - log_sum)).abs() < 2e-6);
        }
    }
}
