//! Every primitive as plain loops over F64: what all backends, the oracle included, are held against.

use std::ops::Range;

use r1_core::DType;

use super::rounding::round_to;
use crate::{GroupScore, Groups, HeadForm, INT8_BLOCK, Routing, ScoreFunction};

pub(super) fn embed(ids: &[u32], table: &[f64], dim: usize, first_row: usize) -> Vec<f64> {
    let held = first_row..first_row + table.len() / dim;
    ids.iter()
        .flat_map(|&id| {
            let row = held.contains(&(id as usize)).then(|| (id as usize - first_row) * dim);
            (0..dim).map(move |d| row.map_or(0.0, |row| table[row + d]))
        })
        .collect()
}

pub(super) fn rms_norm(x: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let dim = weight.len();
    x.chunks(dim)
        .flat_map(|row| {
            let mean_square = row.iter().map(|v| v * v).sum::<f64>() / dim as f64;
            let inverse = 1.0 / (mean_square + f64::from(eps)).sqrt();
            row.iter().zip(weight).map(move |(v, w)| v * inverse * w)
        })
        .collect()
}

/// One scale per row and 128 channels.
pub(super) fn fp8_scales(x: &[f64], cols: usize, power_of_two: bool) -> Vec<f64> {
    x.chunks(cols)
        .flat_map(|row| row.chunks(128))
        .map(|block| {
            let amax = block.iter().fold(1e-4, |amax: f64, v| amax.max(v.abs()));
            // The quotient is an F32, so that one which is a power of two there stays that.
            let scale = amax as f32 / 448.0;
            if power_of_two { 2f64.powi(f64::from(scale).log2().ceil() as i32) } else { f64::from(scale) }
        })
        .collect()
}

/// One row as an FP8 activation holds it.
pub(super) fn fp8_round_trip(row: &[f64], power_of_two: bool) -> Vec<f64> {
    let scales = fp8_scales(row, row.len(), power_of_two);
    row.iter()
        .enumerate()
        .map(|(i, v)| round_to(DType::F8E4M3, v / scales[i / 128]) * scales[i / 128])
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `x` `[T, K]`, `w` `[N, K]`.
pub(super) fn linear(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    x.chunks(k).flat_map(|row| w.chunks(k).map(move |w| dot(row, w))).collect()
}

/// Rows of `k` inputs, quantized to int8 and back as a backend with int8 activations does it, where a weight takes them so.
pub(super) fn int8_round_trip(x: &[f64], k: usize) -> Vec<f64> {
    let block = |block: &[f64]| {
        let most = block.iter().fold(1e-30_f32, |most, &x| most.max((x as f32).abs()));
        let (inverse, scale) = (127.0 / most, most / 127.0);
        let value = move |x: f64| f64::from((x as f32 * inverse).round_ties_even()) * f64::from(scale);
        block.iter().map(|&x| value(x)).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(|row| row.chunks(INT8_BLOCK).flat_map(block)).collect()
}

/// `x` `[T, H, a]`, `w` `[H * rows_per_head, K]`.
pub(super) fn per_head(
    x: &[f64],
    w: &[f64],
    heads: usize,
    k: usize,
    rows: &Range<usize>,
    form: HeadForm,
) -> Vec<f64> {
    let rows_per_head = w.len() / k / heads;
    let width = match form {
        HeadForm::RowsIn => rows.len(),
        HeadForm::RowsOut => k,
    };
    let mut out = Vec::new();
    for (index, x) in x.chunks(width).enumerate() {
        let head = &w[index % heads * rows_per_head * k..][..rows_per_head * k];
        let rows: Vec<&[f64]> = head.chunks(k).skip(rows.start).take(rows.len()).collect();
        match form {
            HeadForm::RowsOut => out.extend(rows.iter().map(|row| dot(x, row))),
            HeadForm::RowsIn => {
                out.extend((0..k).map(|c| x.iter().zip(&rows).map(|(x, row)| x * row[c]).sum::<f64>()));
            }
        }
    }
    out
}

/// Rotates one row by `cos_sin`: half cosines, half sines; pairs are (2i, 2i + 1).
pub(super) fn rotate(row: &[f64], cos_sin: &[f64]) -> Vec<f64> {
    let (cos, sin) = cos_sin.split_at(row.len() / 2);
    row.chunks(2)
        .enumerate()
        .flat_map(|(i, pair)| [pair[0] * cos[i] - pair[1] * sin[i], pair[0] * sin[i] + pair[1] * cos[i]])
        .collect()
}

/// `Σ_p softmax(q · k_p * scale) v_p` over the tokens it is given.
pub(super) fn attend(q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>], scale: f32) -> Vec<f64> {
    let scores: Vec<f64> = keys.iter().map(|k| dot(q, k) * f64::from(scale)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..values[0].len())
        .map(|u| weights.iter().zip(values).map(|(w, v)| w * v[u]).sum::<f64>() / sum)
        .collect()
}

/// Ids and weights of one token's experts.
pub(super) fn route(logits: &[f64], bias: Option<&[f64]>, routing: &Routing) -> (Vec<u32>, Vec<f64>) {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
    // Scores are F32 by definition, so that two which are equal there tie here too.
    let scores: Vec<f32> = logits
        .iter()
        .map(|logit| match routing.score {
            ScoreFunction::Softmax => ((logit - max).exp() / sum) as f32,
            ScoreFunction::Sigmoid => (1.0 / (1.0 + (-logit).exp())) as f32,
        })
        .collect();
    let mut biased = scores.clone();
    if let Some(bias) = bias {
        biased.iter_mut().zip(bias).for_each(|(score, bias)| *score += *bias as f32);
    }
    if let Some(groups) = routing.groups {
        mask_losing_groups(&mut biased, groups);
    }
    let mut ids = Vec::new();
    for _ in 0..routing.top_k {
        let best = (0..biased.len())
            .filter(|expert| !ids.contains(&(*expert as u32)))
            .reduce(|best, expert| if biased[expert] > biased[best] { expert } else { best })
            .expect("at least k experts");
        ids.push(best as u32);
    }
    let chosen = ids.iter().map(|&id| f64::from(scores[id as usize]));
    let divisor = if routing.norm_topk_prob { chosen.clone().sum::<f64>() + 1e-20 } else { 1.0 };
    let factor = f64::from(routing.routed_scaling_factor);
    let weights = chosen.map(|score| score / divisor * factor).collect();
    (ids, weights)
}

fn mask_losing_groups(biased: &mut [f32], groups: Groups) {
    let per_group = biased.len() / groups.n_group;
    let worth: Vec<f32> = biased
        .chunks(per_group)
        .map(|group| {
            let mut sorted = group.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            match groups.score {
                GroupScore::Max => sorted[0],
                GroupScore::TopTwoSum => sorted.iter().take(2).sum(),
            }
        })
        .collect();
    for (index, group) in biased.chunks_mut(per_group).enumerate() {
        let better = (0..worth.len())
            .filter(|&other| worth[other] > worth[index] || worth[other] == worth[index] && other < index)
            .count();
        if better >= groups.topk_group {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `gate_up` `[T, 2 I]`.
pub(super) fn silu_mul(gate_up: &[f64], width: usize) -> Vec<f64> {
    gate_up.chunks(2 * width).flat_map(|row| (0..width).map(move |i| silu(row[i]) * row[width + i])).collect()
}

/// Gate, up and down `[I, D]`, `[I, D]`, `[D, I]`.
pub(super) struct Mlp {
    pub(super) gate: Vec<f64>,
    pub(super) up: Vec<f64>,
    pub(super) down: Vec<f64>,
}

impl Mlp {
    /// The hidden state, `[I]`, of one row `[D]`.
    pub(super) fn hidden(&self, x: &[f64]) -> Vec<f64> {
        let gate = linear(x, &self.gate, x.len());
        let up = linear(x, &self.up, x.len());
        gate.into_iter().zip(up).map(|(gate, up)| silu(gate) * up).collect()
    }
}

/// Log-probabilities of one row of logits.
pub(super) fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln();
    logits.iter().map(|logit| logit - max - log_sum).collect()
}

/// All indices, larger values first, the lower index among equals.
pub(super) fn order(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].partial_cmp(&values[*a]).expect("no NaN").then(a.cmp(b)));
    order
}
