//! Drawing tokens, step by step as `SamplingBatch` documents it, and log-probabilities.

use candle_core::{D, Device, Result, Tensor};
use r1_backend::philox::gumbel;
use r1_backend::{LogprobsOut, RowSampling, SamplingBatch};

use crate::Reference;
use crate::order::best_first;
use crate::storage::{View, read, read_stored, write};

pub(crate) fn sample(logits: &View, sampling: &SamplingBatch, out: &View) -> Result<()> {
    let logits = read(logits)?.to_vec2::<f32>()?;
    let tokens = logits.into_iter().zip(&sampling.rows).map(|(logits, row)| draw(logits, row, sampling));
    write(out, &Tensor::from_iter(tokens, &Device::Cpu)?)
}

fn draw(mut logits: Vec<f32>, row: &RowSampling, sampling: &SamplingBatch) -> u32 {
    adjust(&mut logits, row, sampling);
    let largest = best_first(&logits, 1)[0];
    // An infinite logit, or one that the division makes so, is not a distribution any more.
    if row.temperature == 0.0 || !(logits[largest] / row.temperature).is_finite() {
        return largest as u32;
    }
    let logits: Vec<f32> = logits.iter().map(|logit| logit / row.temperature).collect();
    let kept = keep(&logits, row);
    let noisy: Vec<f32> =
        kept.iter().map(|&token| logits[token] + gumbel(row.seed, row.position, token as u32)).collect();
    kept[best_first(&noisy, 1)[0]] as u32
}

/// Steps 1 and 2: mask, bias, penalties.
fn adjust(logits: &mut [f32], row: &RowSampling, sampling: &SamplingBatch) {
    if let Some(words) = &row.mask {
        let mask = &sampling.mask[words.clone()];
        for (token, logit) in logits.iter_mut().enumerate() {
            if mask[token / 32] >> (token % 32) & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    for &(token, bias) in &sampling.bias[row.bias.clone()] {
        logits[token as usize] += bias;
    }
    for seen in &sampling.seen[row.seen.clone()] {
        let logit = &mut logits[seen.token as usize];
        if *logit > 0.0 {
            *logit /= row.repetition_penalty;
        } else {
            *logit *= row.repetition_penalty;
        }
        let presence = if seen.output_count > 0 { row.presence_penalty } else { 0.0 };
        *logit -= row.frequency_penalty * seen.output_count as f32 + presence;
    }
}

/// Step 4: the tokens that may be drawn, in ascending order.
fn keep(logits: &[f32], row: &RowSampling) -> Vec<usize> {
    let mut kept = best_first(logits, logits.len());
    let max = logits[kept[0]];
    if row.min_p > 0.0 {
        let least = max + row.min_p.ln();
        kept.retain(|&token| logits[token] >= least);
    }
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    if row.top_p < 1.0 {
        let weights: Vec<f32> = kept.iter().map(|&token| (logits[token] - max).exp()).collect();
        let enough = row.top_p * weights.iter().sum::<f32>();
        let mut reached = 0.0;
        let needed = weights.iter().position(|weight| {
            reached += weight;
            reached >= enough
        });
        kept.truncate(needed.map_or(kept.len(), |last| last + 1));
    }
    // So that equal noisy logits take the lower id.
    kept.sort_unstable();
    kept
}

pub(crate) fn logprobs(logits: &View, tokens: &View, out: &LogprobsOut<Reference>) -> Result<()> {
    let logprobs = candle_nn::ops::log_softmax(&read(logits)?, D::Minus1)?;
    let tokens = read_stored(tokens)?.unsqueeze(1)?;
    write(&out.chosen, &logprobs.gather(&tokens, 1)?.squeeze(1)?)?;

    let count = out.top.dim(1);
    if count == 0 {
        return Ok(());
    }
    let best = read(logits)?.to_vec2::<f32>()?.into_iter().flat_map(|row| best_first(&row, count));
    let best = Tensor::from_iter(best.map(|token| token as u32), &Device::Cpu)?.reshape(out.top.shape())?;
    write(&out.top_ids, &best)?;
    write(&out.top, &logprobs.gather(&best, 1)?)
}
