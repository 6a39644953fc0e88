//! Checks of sampling and log-probabilities.

use r1_core::DType;

use super::naive;
use super::random::{Random, seeded};
use super::rounding::{Tolerance, assert_close};
use super::sampling_oracle::acceptable;
use super::settle;
use super::slab::{LAYOUTS, Layout, Slab};
use crate::{Backend, HostSlice, LogprobsOut, RowSampling, SamplingBatch, SeenToken};

const VOCABS: [usize; 5] = [1, 7, 129, 1000, 2049];

/// Draws one token per row of `logits` `[L, V]`.
fn draw<B: Backend>(
    backend: &B,
    logits: &[f64],
    vocab: usize,
    sampling: &SamplingBatch,
    layout: Layout,
) -> Vec<u32> {
    let rows = sampling.rows.len();
    let logits = Slab::floats(backend, &[rows, vocab], DType::F32, layout, logits);
    let out = Slab::poison(backend, &[rows], DType::U32, Layout::Dense);
    backend.sample(&logits.view, sampling, &out.view);
    settle(backend, "sample");
    logits.assert_unchanged(backend);
    out.read_ids(backend)
}

fn check<B: Backend>(backend: &B, logits: &[f64], vocab: usize, sampling: &SamplingBatch, layout: Layout) {
    let drawn = draw(backend, logits, vocab, sampling, layout);
    let mut undecided = 0;
    for ((token, logits), row) in drawn.iter().zip(logits.chunks(vocab)).zip(&sampling.rows) {
        let logits: Vec<f32> = logits.iter().map(|logit| *logit as f32).collect();
        let right = acceptable(&logits, row, sampling);
        assert!(right.contains(token), "sample: drew {token} of {vocab}, expected {right:?}, for {row:?}");
        undecided += usize::from(right.len() > 1);
    }
    // Rounding decides rarely; were it often, the check would check nothing.
    assert!(undecided <= 1 + drawn.len() / 10, "{undecided} of {} rows undecided", drawn.len());
}

/// F32 logits; at a spread of 3 they look like a language model's, at 1 many tokens are likely.
fn logits(random: &mut Random, count: usize, spread: f64) -> Vec<f64> {
    random.normals(count, spread).into_iter().map(|v| f64::from(v as f32)).collect()
}

/// A row with every parameter set to something.
fn any_row(random: &mut Random, batch: &mut SamplingBatch, vocab: usize) -> RowSampling {
    let mut pick = |values: &[f32]| values[random.below(values.len())];
    let mut row = RowSampling {
        temperature: pick(&[0.0, 0.3, 0.6, 1.0, 2.0]),
        top_p: pick(&[1.0, 0.95, 0.5, 0.01]),
        top_k: pick(&[0.0, 1.0, 5.0, 50.0, 1e6]) as u32,
        min_p: pick(&[0.0, 0.05, 0.5, 1.0]),
        repetition_penalty: pick(&[1.0, 2.0, 0.5]),
        presence_penalty: pick(&[0.0, 0.5, -0.5]),
        frequency_penalty: pick(&[0.0, 0.25]),
        ..RowSampling::greedy()
    };
    row.seed = random.next();
    row.position = random.next() >> random.below(64);
    let mut tokens: Vec<u32> = random.permutation(vocab).into_iter().map(|token| token as u32).collect();
    tokens.truncate(20);

    let first = batch.seen.len();
    batch.seen.extend(tokens.iter().map(|&token| SeenToken { token, output_count: random.below(4) as u32 }));
    row.seen = first..batch.seen.len();

    let first = batch.bias.len();
    let biases = [f32::NEG_INFINITY, -100.0, -1.5, 2.0, 8.0];
    batch.bias.extend(tokens.iter().take(8).map(|&token| (token, biases[random.below(biases.len())])));
    row.bias = first..batch.bias.len();

    if random.below(2) == 0 {
        let first = batch.mask.len();
        batch.mask.extend((0..vocab.div_ceil(32)).map(|_| random.next() as u32));
        // Something must be left to draw: the last token, which has no bias.
        let allowed = (0..vocab as u32).rev().find(|token| !tokens[..tokens.len().min(8)].contains(token));
        if let Some(allowed) = allowed {
            batch.mask[first + allowed as usize / 32] |= 1 << (allowed % 32);
        }
        row.mask = Some(first..batch.mask.len());
    }
    row
}

/// [`Backend::sample`] with every parameter at random: the very token that the definition gives.
pub fn sample<B: Backend>(backend: &B) {
    seeded("sample", |random| {
        for vocab in VOCABS {
            for rows in [1, 3, 33] {
                let mut batch = SamplingBatch::default();
                // Entries that belong to no row: only the ranges count.
                batch.bias.push((0, f32::NAN));
                batch.seen.push(SeenToken { token: u32::MAX, output_count: 9 });
                batch.mask.push(0);
                for _ in 0..rows {
                    let row = any_row(random, &mut batch, vocab);
                    batch.rows.push(row);
                }
                let logits = logits(random, rows * vocab, 3.0);
                check(backend, &logits, vocab, &batch, LAYOUTS[random.below(2)]);
            }
        }
    });
}

/// [`Backend::sample`] one parameter at a time, so that each is seen to act.
pub fn sample_single<B: Backend>(backend: &B) {
    seeded("sample_single", |random| {
        let plain = RowSampling { temperature: 1.0, ..RowSampling::greedy() };
        let variants = [
            RowSampling::greedy(),
            plain.clone(),
            RowSampling { temperature: 0.01, ..plain.clone() },
            RowSampling { temperature: 1e-38, ..plain.clone() },
            RowSampling { temperature: 1e-40, ..plain.clone() },
            RowSampling { temperature: 50.0, ..plain.clone() },
            RowSampling { top_k: 1, ..plain.clone() },
            RowSampling { top_k: 3, ..plain.clone() },
            RowSampling { top_p: 0.0, ..plain.clone() },
            RowSampling { top_p: 0.3, ..plain.clone() },
            RowSampling { top_p: 0.9, ..plain.clone() },
            RowSampling { min_p: 0.2, ..plain.clone() },
            RowSampling { min_p: 1.0, ..plain.clone() },
            RowSampling { top_k: 40, top_p: 0.9, min_p: 0.01, temperature: 0.6, ..plain },
        ];
        for vocab in [50, 2049] {
            let mut batch = SamplingBatch::default();
            for variant in &variants {
                for position in 0..24 {
                    batch.rows.push(RowSampling { seed: random.next(), position, ..variant.clone() });
                }
            }
            for spread in [1.0, 3.0] {
                let logits = logits(random, batch.rows.len() * vocab, spread);
                check(backend, &logits, vocab, &batch, Layout::Dense);
            }
        }
    });
}

/// [`Backend::sample`] with one penalty at a time on half of the vocabulary, for logits of both signs.
pub fn sample_penalties<B: Backend>(backend: &B) {
    seeded("sample_penalties", |random| {
        let vocab = 60;
        let greedy = RowSampling::greedy();
        let penalties = [
            RowSampling { repetition_penalty: 2.0, ..greedy.clone() },
            RowSampling { repetition_penalty: 0.5, ..greedy.clone() },
            RowSampling { presence_penalty: 1.0, ..greedy.clone() },
            RowSampling { presence_penalty: -1.0, ..greedy.clone() },
            RowSampling { frequency_penalty: 0.5, ..greedy.clone() },
            RowSampling { frequency_penalty: -0.5, ..greedy },
        ];
        let mut batch = SamplingBatch::default();
        let mut values = Vec::new();
        for penalty in &penalties {
            for position in 0..24 {
                let first = batch.seen.len();
                let tokens = random.permutation(vocab).into_iter().take(vocab / 2);
                for token in tokens.map(|token| token as u32) {
                    batch.seen.push(SeenToken { token, output_count: random.below(4) as u32 });
                }
                batch.rows.push(RowSampling {
                    temperature: [0.0, 1.0][random.below(2)],
                    seed: random.next(),
                    position,
                    seen: first..batch.seen.len(),
                    ..penalty.clone()
                });
                let shift = [-4.0, 0.0, 4.0][random.below(3)];
                values.extend(logits(random, vocab, 1.0).into_iter().map(|v| f64::from((v + shift) as f32)));
            }
        }
        check(backend, &values, vocab, &batch, Layout::Gaps);
    });
}

/// [`Backend::sample`] of ties, infinities and rows without a choice.
pub fn sample_edges<B: Backend>(backend: &B) {
    let inf = f64::INFINITY;
    let greedy = RowSampling::greedy();
    let warm = RowSampling { temperature: 0.7, top_p: 0.9, top_k: 3, min_p: 0.1, seed: 3, ..greedy.clone() };
    let plain = RowSampling { temperature: 1.0, seed: 5, ..greedy.clone() };
    let vocab = 40;
    let at = |places: &[(usize, f64)], rest: f64| {
        let mut row = vec![rest; vocab];
        for &(token, logit) in places {
            row[token] = logit;
        }
        row
    };
    let only = |token| Some(vec![token]);
    let cases = [
        ("greedy, all equal", at(&[], 1.0), &greedy, only(0)),
        ("greedy, two equal", at(&[(7, 2.0), (31, 2.0)], 1.0), &greedy, only(7)),
        ("greedy, zeros of both signs", at(&[(0, -1.0), (1, -0.0), (2, 0.0)], -1.0), &greedy, only(1)),
        ("greedy, all negative", at(&[(39, -1.0)], -5.0), &greedy, only(39)),
        ("greedy, nothing allowed", at(&[], -inf), &greedy, only(0)),
        ("nothing allowed", at(&[], -inf), &warm, only(0)),
        ("one allowed", at(&[(33, -80.0)], -inf), &warm, only(33)),
        ("one infinite", at(&[(12, inf)], 0.0), &warm, only(12)),
        ("two infinite", at(&[(12, inf), (30, inf)], 0.0), &plain, only(12)),
        ("far apart", at(&[(12, 3e38)], -3e38), &plain, only(12)),
        ("top_k of equals keeps the lowest ids", at(&[], 1.0), &warm, Some(vec![0, 1, 2])),
        ("all equal", at(&[], 1.0), &plain, None),
    ];
    let mut batch = SamplingBatch::default();
    let mut logits = Vec::new();
    for (_, row_logits, row, _) in &cases {
        batch.rows.push((*row).clone());
        logits.extend_from_slice(row_logits);
    }
    for layout in LAYOUTS {
        let drawn = draw(backend, &logits, vocab, &batch, layout);
        for ((what, row_logits, row, want), token) in cases.iter().zip(drawn) {
            let row_logits: Vec<f32> = row_logits.iter().map(|logit| *logit as f32).collect();
            let right = want.clone().unwrap_or_else(|| acceptable(&row_logits, row, &batch));
            assert!(right.contains(&token), "sample, {what}: drew {token}, expected one of {right:?}");
        }
    }
    // A broken model's logits must still give a token of the vocabulary.
    let nan = vec![f64::NAN; batch.rows.len() * vocab];
    let drawn = draw(backend, &nan, vocab, &batch, Layout::Dense);
    assert!(drawn.iter().all(|&token| (token as usize) < vocab), "sample of NaN: {drawn:?}");
}

/// The same row draws the same token wherever it lies and whatever is drawn beside it.
pub fn sample_ignores_batch<B: Backend>(backend: &B) {
    seeded("sample_ignores_batch", |random| {
        let vocab = 333;
        let mut batch = SamplingBatch::default();
        for _ in 0..24 {
            let row = any_row(random, &mut batch, vocab);
            batch.rows.push(row);
        }
        let logits = logits(random, batch.rows.len() * vocab, 3.0);
        let together = draw(backend, &logits, vocab, &batch, Layout::Dense);
        let order = random.permutation(batch.rows.len());
        let shuffled = SamplingBatch {
            rows: order.iter().map(|&row| batch.rows[row].clone()).collect(),
            ..batch.clone()
        };
        let shuffled_logits: Vec<f64> =
            order.iter().flat_map(|&row| logits[row * vocab..][..vocab].iter().copied()).collect();
        let elsewhere = draw(backend, &shuffled_logits, vocab, &shuffled, Layout::Gaps);
        for (place, &row) in order.iter().enumerate() {
            let single = SamplingBatch { rows: vec![batch.rows[row].clone()], ..batch.clone() };
            let alone = draw(backend, &logits[row * vocab..][..vocab], vocab, &single, Layout::Dense);
            assert_eq!([elsewhere[place], alone[0]], [together[row]; 2], "sample: {:?}", batch.rows[row]);
        }
    });
}

/// Draws over many positions follow the softmax: chi-square, with and without a cut-off.
pub fn sample_distribution<B: Backend>(backend: &B) {
    const ROWS: usize = 1000;
    const CALLS: usize = 12;
    seeded("sample_distribution", |random| {
        let vocab = 50;
        let logits = logits(random, vocab, 1.0);
        for (temperature, top_k) in [(1.0, 0), (0.8, 10)] {
            let mut counts = vec![0.0; vocab];
            let repeated = logits.repeat(ROWS);
            let slab = Slab::floats(backend, &[ROWS, vocab], DType::F32, Layout::Dense, &repeated);
            let out = Slab::poison(backend, &[ROWS], DType::U32, Layout::Dense);
            let row = RowSampling { temperature, top_k, seed: random.next(), ..RowSampling::greedy() };
            for call in 0..CALLS {
                let position = |row: usize| (call * ROWS + row) as u64;
                let rows = (0..ROWS).map(|i| RowSampling { position: position(i), ..row.clone() }).collect();
                backend.sample(&slab.view, &SamplingBatch { rows, ..Default::default() }, &out.view);
                settle(backend, "sample");
                out.read_ids(backend).into_iter().for_each(|token| counts[token as usize] += 1.0);
                backend.upload(HostSlice::U32(&[u32::MAX; ROWS]), &out.view);
            }
            let kept = naive::order(&logits);
            let kept = &kept[..if top_k == 0 { vocab } else { top_k as usize }];
            let weights: Vec<f64> =
                kept.iter().map(|&token| (logits[token] / f64::from(temperature)).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut chi_square = 0.0;
            for (&token, weight) in kept.iter().zip(&weights) {
                let expected = weight / sum * (ROWS * CALLS) as f64;
                chi_square += (counts[token] - expected).powi(2) / expected;
                counts[token] = 0.0;
            }
            assert!(counts.iter().all(|&count| count == 0.0), "sample: drew a token that was cut off");
            let freedom = (kept.len() - 1) as f64;
            // Four standard deviations of a chi-square.
            let bound = freedom + 4.0 * (2.0 * freedom).sqrt();
            assert!(chi_square < bound, "sample: chi-square {chi_square} with {freedom} degrees of freedom");
        }
    });
}

/// [`Backend::logprobs`]: the drawn token's and the most likely ones', ties by id, logits far from 0.
pub fn logprobs<B: Backend>(backend: &B) {
    seeded("logprobs", |random| {
        for vocab in VOCABS {
            for (rows, count) in [(1, 0), (3, 1), (17, 20), (2, vocab)] {
                let count = count.min(vocab);
                let mut logits = logits(random, rows * vocab, 3.0);
                match random.below(3) {
                    0 => logits.iter_mut().for_each(|logit| *logit = logit.round()),
                    1 => logits.iter_mut().for_each(|logit| *logit = f64::from((*logit + 5000.0) as f32)),
                    _ => logits[random.below(rows) * vocab] = if vocab > 1 { f64::NEG_INFINITY } else { 0.0 },
                }
                check_logprobs(backend, random, &logits, [rows, vocab, count]);
            }
        }
    });
}

fn check_logprobs<B: Backend>(
    backend: &B,
    random: &mut Random,
    logits: &[f64],
    [rows, vocab, count]: [usize; 3],
) {
    let tokens: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
    let slab = Slab::floats(backend, &[rows, vocab], DType::F32, LAYOUTS[random.below(2)], logits);
    let tokens_slab = Slab::ids(backend, &[rows], &tokens);
    let chosen = Slab::poison(backend, &[rows], DType::F32, Layout::Dense);
    // No alternatives at all are asked for as no columns of a tensor that has some.
    let top_ids = Slab::poison(backend, &[rows, count.max(1)], DType::U32, Layout::Dense);
    let top = Slab::poison(backend, &[rows, count.max(1)], DType::F32, LAYOUTS[random.below(2)]);
    let columns = |slab: &Slab<B>| slab.view.narrow(1, 0..count);
    let out = LogprobsOut { chosen: chosen.view.clone(), top_ids: columns(&top_ids), top: columns(&top) };
    backend.logprobs(&slab.view, &tokens_slab.view, &out);
    settle(backend, "logprobs");
    slab.assert_unchanged(backend);

    let (mut want_chosen, mut want_ids, mut want_top) = (Vec::new(), Vec::new(), Vec::new());
    for (logits, &token) in logits.chunks(vocab).zip(&tokens) {
        let logprobs = naive::log_softmax(logits);
        want_chosen.push(logprobs[token as usize]);
        for id in naive::order(logits).into_iter().take(count) {
            want_ids.push(id as u32);
            want_top.push(logprobs[id]);
        }
    }
    let tolerance = Tolerance { relative: 1e-5, of_rms: 1e-6 };
    assert_close("logprobs: chosen", &chosen.read(backend), &want_chosen, tolerance);
    if count == 0 {
        top_ids.assert_unchanged(backend);
        top.assert_unchanged(backend);
        return;
    }
    assert_eq!(top_ids.read_ids(backend), want_ids, "logprobs: ids");
    assert_close("logprobs: top", &top.read(backend), &want_top, tolerance);
}
