//! `SamplingBatch`'s definition, literally, with the tokens that rounding alone could tell apart.

use crate::philox::gumbel;
use crate::{RowSampling, SamplingBatch};

/// Relative difference that F32 arithmetic in another order may make.
const SLACK: f64 = 1e-5;

/// Tokens that a right sampler may draw: one, unless two are as good as equal or a cut-off lies between.
pub(super) fn acceptable(logits: &[f32], row: &RowSampling, batch: &SamplingBatch) -> Vec<u32> {
    let logits = adjusted(logits, row, batch);
    let best = (0..logits.len())
        .reduce(|best, token| if logits[token] > logits[best] { token } else { best })
        .expect("a vocabulary");
    if row.temperature == 0.0 || logits[best].is_infinite() {
        return vec![best as u32];
    }
    let scaled: Vec<f64> =
        logits.iter().map(|logit| f64::from(*logit) / f64::from(row.temperature)).collect();
    let mut tokens = Vec::new();
    for nudge in [-SLACK, 0.0, SLACK] {
        let noisy: Vec<(usize, f64)> = kept(&scaled, row, nudge)
            .into_iter()
            .map(|token| (token, scaled[token] + f64::from(gumbel(row.seed, row.position, token as u32))))
            .collect();
        let largest = noisy.iter().map(|(_, value)| *value).fold(f64::NEG_INFINITY, f64::max);
        let as_good = |value: f64| largest - value <= SLACK * (1.0 + largest.abs());
        tokens.extend(noisy.iter().filter(|(_, value)| as_good(*value)).map(|(token, _)| *token as u32));
    }
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Steps 1 and 2.
fn adjusted(logits: &[f32], row: &RowSampling, batch: &SamplingBatch) -> Vec<f32> {
    let mask = row.mask.clone().map(|words| &batch.mask[words]);
    let allows = |token: usize| mask.is_none_or(|mask| mask[token / 32] & 1 << (token % 32) != 0);
    let mut logits: Vec<f32> = logits
        .iter()
        .enumerate()
        .map(|(token, logit)| if allows(token) { *logit } else { f32::NEG_INFINITY })
        .collect();
    for (token, bias) in &batch.bias[row.bias.clone()] {
        logits[*token as usize] += bias;
    }
    for seen in &batch.seen[row.seen.clone()] {
        let logit = &mut logits[seen.token as usize];
        let penalty = row.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        if seen.output_count > 0 {
            *logit -= row.frequency_penalty * seen.output_count as f32 + row.presence_penalty;
        }
    }
    logits
}

/// Step 4, with both cut-offs moved by `nudge`.
fn kept(scaled: &[f64], row: &RowSampling, nudge: f64) -> Vec<usize> {
    let mut kept = super::naive::order(scaled);
    let max = scaled[kept[0]];
    if row.min_p > 0.0 {
        let least = max + f64::from(row.min_p).ln() + nudge;
        // The largest stays at any cut-off.
        kept.retain(|&token| scaled[token] >= least || scaled[token] == max);
    }
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    if row.top_p < 1.0 {
        let weights: Vec<f64> = kept.iter().map(|&token| (scaled[token] - max).exp()).collect();
        let enough = (f64::from(row.top_p) + nudge) * weights.iter().sum::<f64>();
        let mut reached = 0.0;
        let mut count = 0;
        for weight in weights {
            if count > 0 && reached >= enough {
                break;
            }
            reached += weight;
            count += 1;
        }
        kept.truncate(count);
    }
    kept
}
