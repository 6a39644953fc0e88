//! Drawing tokens, in the order that [`SamplingBatch`] documents.
//!
//! No full sort of the vocabulary: a histogram of distances from the largest logit finds the bin where `top_k` or `top_p`
//! ends, and only tokens up to that bin are listed and sorted. Noise is made only for tokens that can still win.

use r1_backend::philox::gumbel;
use r1_backend::{RowSampling, SamplingBatch, Tensor, shape};

use super::logprobs::best_first;
use crate::Cpu;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, slice};
use crate::view::{In, Out};

const OP: &str = "sample";
/// Bins of the histogram, and how many of them a distance of one takes: the last bin holds all that is 64 or more below.
const BINS: usize = 1024;
const BINS_PER_UNIT: f32 = 16.0;
/// Above the largest noise there is: -ln(-ln(1 - 2^-24)) = 16.64.
const MAX_NOISE: f32 = 17.0;

pub(crate) fn sample(cpu: &Cpu, logits: &Tensor<Cpu>, sampling: &SamplingBatch, out: &Tensor<Cpu>) {
    shape::sample(logits, sampling, out);
    let logits = In::new(OP, "logits", logits);
    let mut out = Out::new(OP, "out", out);
    let (logits, drawn) = (logits.mat(), out.mat());
    let vocab = logits.cols;
    assert!(vocab > 0 || sampling.rows.is_empty(), "{OP}: an empty vocabulary");
    cpu.engine().pool.run(sampling.rows.len(), &|index, scratch| {
        let row = &sampling.rows[index];
        let Scratch { floats, candidates, bins } = scratch;
        let mut token = 0;
        let [z, mass] = floats.parts([vocab, vocab]);
        z.copy_from_slice(logits.f32_row(index));
        adjust(row, sampling, z);
        cpu.isa.run(Draw { row, z, mass, candidates, bins, token: &mut token });
        // SAFETY: `out` is a U32 vector of which this task has element `index`.
        unsafe { drawn.row_part::<u32>(0, index, 1)[0] = token };
    });
}

/// Steps 1 and 2: mask, bias, penalties. NaN becomes -inf.
fn adjust(row: &RowSampling, sampling: &SamplingBatch, z: &mut [f32]) {
    let vocab = z.len();
    for value in &mut *z {
        if value.is_nan() {
            *value = f32::NEG_INFINITY;
        }
    }
    if let Some(words) = &row.mask {
        let words = &sampling.mask[words.clone()];
        assert!(
            words.len() == vocab.div_ceil(32),
            "{OP}: a mask of {} words for {vocab} tokens",
            words.len()
        );
        for (chunk, &word) in z.chunks_mut(32).zip(words) {
            if word != u32::MAX {
                for (bit, value) in chunk.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *value = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
    let place = |token: u32, what: &str| {
        assert!((token as usize) < vocab, "{OP}: {what} for token {token} of {vocab}");
        token as usize
    };
    for &(token, bias) in &sampling.bias[row.bias.clone()] {
        z[place(token, "bias")] += bias;
    }
    for seen in &sampling.seen[row.seen.clone()] {
        let value = &mut z[place(seen.token, "penalty")];
        if *value > 0.0 {
            *value /= row.repetition_penalty;
        } else {
            *value *= row.repetition_penalty;
        }
        let count = seen.output_count as f32;
        let present = if seen.output_count > 0 { row.presence_penalty } else { 0.0 };
        *value -= row.frequency_penalty * count + present;
    }
}

struct Draw<'a> {
    row: &'a RowSampling,
    /// Adjusted logits.
    z: &'a mut [f32],
    /// Room for probabilities.
    mass: &'a mut [f32],
    candidates: &'a mut Vec<(f32, u32)>,
    bins: &'a mut Vec<(usize, f64)>,
    token: &'a mut u32,
}

impl Kernel for Draw<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, z, mass, candidates, bins, token } = self;
        let largest = slice::max(s, z);
        // At infinity differences mean nothing, and noise changes nothing; a temperature that small is greedy.
        if row.temperature <= 0.0 || !(largest / row.temperature).is_finite() {
            *token = first_of(z, largest);
            return;
        }
        let temperature = s.splat(row.temperature);
        slice::map_sum!(s, z, 0.0, |v| s.div(v, temperature));
        let max = slice::max(s, z);
        let floor = if row.min_p > 0.0 { max + row.min_p.ln() } else { f32::NEG_INFINITY };
        let top_k =
            if row.top_k == 0 || row.top_k as usize >= z.len() { None } else { Some(row.top_k as usize) };
        if top_k.is_none() && row.top_p >= 1.0 {
            *token =
                noisiest(row, z.iter().copied().zip(0..).filter(|&(v, _)| v >= floor), first_of(z, max), max);
            return;
        }
        if row.top_p < 1.0 {
            mass.copy_from_slice(z);
            slice::exp_sum(s, mass, 1.0, max);
        } else {
            mass.fill(0.0);
        }
        let cut = cut(row, top_k, z, mass, max, floor, bins);
        candidates.clear();
        candidates.extend(z.iter().copied().zip(0..).filter(|&(v, _)| v >= floor && bin(max, v) <= cut));
        if let Some(k) = top_k.filter(|&k| k < candidates.len()) {
            candidates.select_nth_unstable_by(k - 1, best_first);
            candidates.truncate(k);
        }
        if row.top_p < 1.0 {
            keep_top_p(row.top_p, top_k.is_some(), candidates, mass, bins, |value| bin(max, value) == cut);
        }
        *token = noisiest(row, candidates.iter().copied(), first_of(z, max), max);
    }
}

/// Drops what comes after the smallest set, largest first, that reaches `top_p`.
fn keep_top_p(
    top_p: f32,
    limited: bool,
    candidates: &mut Vec<(f32, u32)>,
    mass: &[f32],
    bins: &[(usize, f64)],
    in_last_bin: impl Fn(f32) -> bool,
) {
    let of = |&(_, token): &(f32, u32)| f64::from(mass[token as usize]);
    // After `top_k` the mass is that of the candidates. Without, it is that of all bins, and the set ends in the last bin:
    // what lies before it is kept, in whatever order.
    let (total, settled) = if limited {
        (candidates.iter().map(of).sum(), 0)
    } else {
        candidates.sort_by_key(|candidate| in_last_bin(candidate.0));
        (bins.iter().map(|bin| bin.1).sum::<f64>(), candidates.partition_point(|c| !in_last_bin(c.0)))
    };
    let (before, open) = candidates.split_at_mut(settled);
    open.sort_unstable_by(best_first);
    let mut reached = before.iter().map(of).sum::<f64>();
    let last = open.iter().position(|candidate| {
        reached += of(candidate);
        reached >= f64::from(top_p) * total
    });
    if let Some(last) = last {
        candidates.truncate(settled + last + 1);
    }
}

/// The bin of a logit: 0 next to the largest, never falling as logits fall.
fn bin(max: f32, value: f32) -> usize {
    // A float past the range of integers converts to the nearest one.
    (((max - value) * BINS_PER_UNIT) as usize).min(BINS - 1)
}

/// Fills the histogram with what is above the floor, and says in which bin the kept set ends at the latest.
fn cut(
    row: &RowSampling,
    top_k: Option<usize>,
    z: &[f32],
    mass: &[f32],
    max: f32,
    floor: f32,
    bins: &mut Vec<(usize, f64)>,
) -> usize {
    bins.clear();
    bins.resize(BINS, (0, 0.0));
    for (&value, &mass) in z.iter().zip(mass) {
        if value >= floor && value > f32::NEG_INFINITY {
            let bin = &mut bins[bin(max, value)];
            bin.0 += 1;
            bin.1 += f64::from(mass);
        }
    }
    let total = bins.iter().map(|bin| bin.1).sum::<f64>();
    let wanted = f64::from(row.top_p) * total;
    let (mut count, mut reached) = (0, 0.0);
    let end = bins.iter().position(|bin| {
        count += bin.0;
        reached += bin.1;
        top_k.map_or(reached >= wanted, |k| count >= k)
    });
    end.unwrap_or(BINS - 1)
}

/// Lowest index of `value`; 0 where it is not to be found.
fn first_of(z: &[f32], value: f32) -> u32 {
    z.iter().position(|&v| v == value).unwrap_or(0) as u32
}

/// Step 5: the largest sum of logit and noise, the lowest id among equals. `best` is one of the candidates and has the largest
/// logit: with its sum known, most others cannot win and need no noise.
fn noisiest(row: &RowSampling, candidates: impl Iterator<Item = (f32, u32)>, best: u32, max: f32) -> u32 {
    let noise = |token: u32| gumbel(row.seed, row.position, token);
    let mut winner = (max + noise(best), best);
    for (value, token) in candidates {
        if value + MAX_NOISE < winner.0 || token == best {
            continue;
        }
        let sum = value + noise(token);
        if sum > winner.0 || sum == winner.0 && token < winner.1 {
            winner = (sum, token);
        }
    }
    winner.1
}
