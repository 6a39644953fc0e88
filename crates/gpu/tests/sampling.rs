//! Draws and log-probabilities where the conformance suite does not go: a published vocabulary, ties everywhere, more rows and
//! parameters than are kept room for. The reference says what is right.

use r1_backend::{
    Backend, HostSlice, HostSliceMut, LogprobsOut, RowSampling, SamplingBatch, SeenToken, Tensor,
};
use r1_core::DType;
use r1_gpu::Gpu;
use r1_reference::Reference;

/// DeepSeek-V3's.
const PUBLISHED_VOCAB: usize = 129_280;

fn emu() -> Gpu {
    Gpu::emulated(2, 512 << 20).expect("an emulated device")
}

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// Roughly normal, as logits are.
    fn logit(&mut self, spread: f32) -> f32 {
        let sum: f32 = (0..6).map(|_| (self.next() >> 7) as f32 / 16_777_216.0 - 0.5).sum();
        sum * spread * std::f32::consts::SQRT_2
    }

    fn logits(&mut self, count: usize, spread: f32) -> Vec<f32> {
        (0..count).map(|_| self.logit(spread)).collect()
    }
}

fn floats<B: Backend>(backend: &B, shape: &[usize], values: &[f32]) -> Tensor<B> {
    let tensor = backend.alloc(shape, DType::F32).expect("room");
    backend.upload(HostSlice::F32(values), &tensor);
    tensor
}

fn draw<B: Backend>(backend: &B, logits: &[f32], batch: &SamplingBatch) -> Vec<u32> {
    let rows = batch.rows.len();
    let logits = floats(backend, &[rows, logits.len() / rows], logits);
    let out = backend.alloc(&[rows], DType::U32).expect("room");
    backend.sample(&logits, batch, &out);
    backend.flush().wait().expect("the kernel runs");
    let mut drawn = vec![u32::MAX; rows];
    backend.download(&out, HostSliceMut::U32(&mut drawn)).expect("download");
    drawn
}

fn cut_offs() -> Vec<RowSampling> {
    let plain = RowSampling { temperature: 0.7, ..RowSampling::greedy() };
    let mut rows = Vec::new();
    for top_k in [0, 1, 40, 3000] {
        for top_p in [1.0, 0.95, 0.4] {
            for min_p in [0.0, 0.02] {
                rows.push(RowSampling { top_k, top_p, min_p, ..plain.clone() });
            }
        }
    }
    rows
}

#[test]
fn draws_from_a_published_vocabulary() {
    let (gpu, mut noise) = (emu(), Noise(1));
    let mut batch = SamplingBatch { rows: cut_offs(), ..SamplingBatch::default() };
    batch.bias.extend([(5, f32::NEG_INFINITY), (129_279, 3.0)]);
    batch.seen.extend((0..500).map(|i| SeenToken { token: i * 257, output_count: i % 3 }));
    for (position, row) in (0..).zip(&mut batch.rows) {
        (row.seed, row.position) = (11, position);
        if position % 3 == 0 {
            (row.bias, row.seen) = (0..2, 0..500);
            (row.repetition_penalty, row.presence_penalty) = (1.2, 0.3);
        }
    }
    let logits = noise.logits(batch.rows.len() * PUBLISHED_VOCAB, 2.5);
    assert_eq!(draw(&gpu, &logits, &batch), draw(&Reference::new(), &logits, &batch));
}

/// A set that ends among equals takes the lower ids: found by places, in bins that hold nearly everything.
#[test]
fn cut_offs_among_equals() {
    let (gpu, reference, mut noise) = (emu(), Reference::new(), Noise(2));
    let vocab = 5000;
    for steps in [0.0, 1.0, 4.0] {
        let mut batch = SamplingBatch::default();
        for seed in 0..6 {
            batch.rows.extend(cut_offs().into_iter().map(|row| RowSampling { seed, position: 9, ..row }));
        }
        let mut logits = noise.logits(batch.rows.len() * vocab, 1.0);
        for logit in &mut logits {
            *logit = (*logit * steps).round() / 4.0;
        }
        assert_eq!(draw(&gpu, &logits, &batch), draw(&reference, &logits, &batch), "{steps}");
    }
}

#[test]
fn a_token_biased_twice_gets_both() {
    let vocab = 100;
    let mut logits = vec![0.0; 2 * vocab];
    (logits[9], logits[vocab + 9]) = (5.0, 5.0);
    // As a stop token that the user wants more of, before it may be drawn; and two that meet again.
    let bias = vec![(9, 8.0), (4, 1.0), (9, f32::NEG_INFINITY), (9, -8.0), (4, 1.5), (9, 8.0), (4, 1.0)];
    let row = |bias| RowSampling { bias, ..RowSampling::greedy() };
    let batch = SamplingBatch { rows: vec![row(0..3), row(3..7)], bias, ..SamplingBatch::default() };
    assert_eq!(draw(&emu(), &logits, &batch), [4, 9]);
}

/// Copies of adjusted rows that fill the scratch memory more than once, and masks that need more room than is kept.
#[test]
fn more_rows_than_there_is_room_for() {
    let (rows, vocab) = (300, 70_001);
    let words = 70_001usize.div_ceil(32);
    let target = |row: usize| row * 233 % vocab;
    let mut batch = SamplingBatch::default();
    for row in 0..rows {
        let first = batch.mask.len();
        if row % 50 == 7 {
            // Not adjusted, between those that are.
            batch.rows.push(RowSampling::greedy());
            continue;
        }
        batch.mask.resize(first + words, 0);
        batch.mask[first + target(row) / 32] = 1 << (target(row) % 32);
        batch.rows.push(RowSampling { mask: Some(first..first + words), ..RowSampling::greedy() });
    }
    let mut logits = vec![0.0; rows * vocab];
    for row in 0..rows {
        logits[row * vocab + 3] = 1.0;
    }
    let gpu = emu();
    for _ in 0..2 {
        for (row, token) in draw(&gpu, &logits, &batch).into_iter().enumerate() {
            assert_eq!(token as usize, if row % 50 == 7 { 3 } else { target(row) }, "row {row}");
        }
    }
}

fn logprobs<B: Backend>(
    backend: &B,
    logits: &[f32],
    rows: usize,
    count: usize,
) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let vocab = logits.len() / rows;
    let logits = floats(backend, &[rows, vocab], logits);
    let tokens = backend.alloc(&[rows], DType::U32).expect("room");
    backend.upload(
        HostSlice::U32(&(0..rows as u32).map(|row| 7 * row % vocab as u32).collect::<Vec<_>>()),
        &tokens,
    );
    let alloc = |shape: &[usize], dtype| backend.alloc(shape, dtype).expect("room");
    let out = LogprobsOut {
        chosen: alloc(&[rows], DType::F32),
        top_ids: alloc(&[rows, count], DType::U32),
        top: alloc(&[rows, count], DType::F32),
    };
    backend.logprobs(&logits, &tokens, &out);
    backend.flush().wait().expect("the kernel runs");
    let (mut chosen, mut ids, mut top) = (vec![0.0; rows], vec![0; rows * count], vec![0.0; rows * count]);
    backend.download(&out.chosen, HostSliceMut::F32(&mut chosen)).expect("download");
    backend.download(&out.top_ids, HostSliceMut::U32(&mut ids)).expect("download");
    backend.download(&out.top, HostSliceMut::F32(&mut top)).expect("download");
    (chosen, ids, top)
}

#[test]
fn log_probabilities_of_ties_and_of_a_published_vocabulary() {
    let (gpu, reference, mut noise) = (emu(), Reference::new(), Noise(3));
    for (vocab, rows, count, rounded) in
        [(PUBLISHED_VOCAB, 3, 20, false), (3000, 5, 700, true), (3000, 2, 3000, true)]
    {
        let mut logits = noise.logits(rows * vocab, 2.5);
        if rounded {
            for logit in &mut logits {
                *logit = logit.round();
            }
            // A broken model's.
            (logits[1], logits[2], logits[3]) = (f32::NEG_INFINITY, f32::NAN, f32::NEG_INFINITY);
        }
        // One token has nearly everything: a logarithm next to zero.
        logits[vocab + 7] = 40.0;
        let (own, right) = (logprobs(&gpu, &logits, rows, count), logprobs(&reference, &logits, rows, count));
        assert_eq!(own.1, right.1, "ids of {vocab}");
        let pairs = own.0.iter().chain(&own.2).zip(right.0.iter().chain(&right.2));
        for (own, right) in pairs.filter(|(_, right)| right.is_finite()) {
            assert!((own - right).abs() <= 1e-6 + 1e-6 * right.abs(), "{own}, expected {right}");
        }
    }
}

/// A row's draw and log-probabilities are its own, bit for bit.
#[test]
fn a_row_alone_is_what_it_is_in_a_batch() {
    let (gpu, mut noise) = (emu(), Noise(4));
    let vocab = 2500;
    let mut batch = SamplingBatch { rows: cut_offs(), ..SamplingBatch::default() };
    batch.rows.truncate(9);
    let rows = batch.rows.len();
    let logits = noise.logits(rows * vocab, 1.5);
    let (drawn, together) = (draw(&gpu, &logits, &batch), logprobs(&gpu, &logits, rows, 5));
    for (row, logits) in logits.chunks(vocab).enumerate() {
        let alone = SamplingBatch { rows: vec![batch.rows[row].clone()], ..SamplingBatch::default() };
        assert_eq!(draw(&gpu, logits, &alone), [drawn[row]]);
        let alone = logprobs(&gpu, logits, 1, 5);
        assert_eq!(alone.1, together.1[5 * row..][..5]);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&alone.2), bits(&together.2[5 * row..][..5]));
    }
}
