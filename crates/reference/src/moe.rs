//! The router and the routed experts.

use candle_core::{D, DType, Device, Result, Tensor};
use r1_backend::{Activation, Experts, GroupScore, Groups, MlpWeights, Routing, ScoreFunction, Weight};

use crate::Reference;
use crate::order::best_first;
use crate::storage::{View, read, read_u32, write};
use crate::weights::{dequantized, operand, round_trip};

pub(crate) fn route(
    logits: &View,
    bias: Option<&View>,
    routing: &Routing,
    ids: &View,
    weights: &View,
) -> Result<()> {
    let logits = read(logits)?;
    let scores = match routing.score {
        ScoreFunction::Softmax => candle_nn::ops::softmax(&logits, D::Minus1)?,
        ScoreFunction::Sigmoid => candle_nn::ops::sigmoid(&logits)?,
    };
    let biased = match bias {
        Some(bias) => scores.broadcast_add(&read(bias)?)?,
        None => scores.clone(),
    };
    let mut chosen = Vec::new();
    for mut biased in biased.to_vec2::<f32>()? {
        if let Some(groups) = routing.groups {
            mask_losing_groups(&mut biased, groups);
        }
        chosen.extend(best_first(&biased, routing.top_k).into_iter().map(|expert| expert as u32));
    }
    let chosen = Tensor::from_vec(chosen, ids.shape(), &Device::Cpu)?;
    let mut chosen_scores = scores.gather(&chosen, 1)?;
    if routing.norm_topk_prob {
        let sum = chosen_scores.sum_keepdim(1)?;
        chosen_scores = chosen_scores.broadcast_div(&(sum + 1e-20)?)?;
    }
    write(ids, &chosen)?;
    write(weights, &(chosen_scores * f64::from(routing.routed_scaling_factor))?)
}

/// -inf for every expert of the groups that are not among the `topk_group` best.
fn mask_losing_groups(biased: &mut [f32], groups: Groups) {
    let per_group = biased.len() / groups.n_group;
    let counted = match groups.score {
        GroupScore::Max => 1,
        GroupScore::TopTwoSum => 2,
    };
    let worth: Vec<f32> = biased
        .chunks(per_group)
        .map(|group| best_first(group, counted).into_iter().map(|expert| group[expert]).sum())
        .collect();
    let kept = best_first(&worth, groups.topk_group);
    for (index, group) in biased.chunks_mut(per_group).enumerate() {
        if !kept.contains(&index) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// `down(silu(gate(x)) * up(x))` in F32. `rows` are those of `x` that take part; where `x` has an FP8 form, so has the
/// hidden state.
fn expert(x: &Activation<Reference>, rows: &Tensor, w: &MlpWeights<Reference>) -> Result<Tensor> {
    let apply = |w: &Weight<Reference>| operand(x, w)?.index_select(rows, 0)?.matmul(&dequantized(w)?.t()?);
    let hidden = (apply(&w.gate)?.silu()? * apply(&w.up)?)?;
    let hidden = match (&x.fp8, &w.down) {
        (Some(fp8), Weight::Fp8Block { .. }) => round_trip(&hidden, fp8.power_of_two_scales)?,
        _ => hidden,
    };
    hidden.matmul(&dequantized(&w.down)?.t()?)
}

pub(crate) fn experts(
    x: &Activation<Reference>,
    ids: &View,
    weights: &View,
    experts: &Experts<Reference>,
    out: &View,
) -> Result<()> {
    let per_token = ids.dim(1);
    let ids = read_u32(ids)?;
    let weights = read(weights)?.flatten_all()?.to_vec1::<f32>()?;
    let mut sum = Tensor::zeros(out.shape(), DType::F32, &Device::Cpu)?;
    for (index, w) in experts.local.iter().enumerate() {
        let id = (experts.first + index) as u32;
        let picks: Vec<usize> = (0..ids.len()).filter(|&pick| ids[pick] == id).collect();
        if picks.is_empty() {
            continue;
        }
        let rows = Tensor::from_iter(picks.iter().map(|pick| (pick / per_token) as u32), &Device::Cpu)?;
        let weights = Tensor::from_iter(picks.iter().map(|&pick| weights[pick]), &Device::Cpu)?;
        let y = expert(x, &rows, w)?.broadcast_mul(&weights.unsqueeze(1)?)?;
        sum = sum.index_add(&rows, &y, 0)?;
    }
    write(out, &(read(out)? + sum)?)
}
