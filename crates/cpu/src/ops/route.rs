//! Choice of experts.

use std::ops::Range;

use r1_backend::{GroupScore, Groups, Routing, ScoreFunction, Tensor, shape};

use super::Chunks;
use crate::Cpu;
use crate::simd::{Kernel, Simd, slice};
use crate::view::{In, Mat, MatMut, Out};

pub(crate) fn route(
    cpu: &Cpu,
    logits: &Tensor<Cpu>,
    bias: Option<&Tensor<Cpu>>,
    routing: &Routing,
    ids: &Tensor<Cpu>,
    weights: &Tensor<Cpu>,
) {
    const OP: &str = "route";
    shape::route(logits, bias, routing, ids, weights);
    let logits = In::new(OP, "logits", logits);
    let bias = bias.map(|bias| In::new(OP, "bias", bias));
    let (mut ids, mut weights) = (Out::new(OP, "ids", ids), Out::new(OP, "weights", weights));
    let (logits, ids, weights) = (logits.mat(), ids.mat(), weights.mat());
    let bias = bias.as_ref().map(|bias| bias.mat().f32_row(0));
    let experts = logits.cols;
    let groups = routing.groups.map_or(0, |groups| groups.n_group);
    // Choosing looks at every expert once per choice.
    let chunks = Chunks::rows(logits.rows, experts * (routing.top_k + 1), cpu.threads);
    cpu.engine().pool.run(chunks.count(), &|task, scratch| {
        let bufs = scratch.floats.parts([experts, experts, groups]);
        let rows = chunks.range(task);
        cpu.isa.run(RouteRows { logits, bias, routing, ids, weights, rows, bufs });
    });
}

struct RouteRows<'a> {
    logits: Mat<'a>,
    bias: Option<&'a [f32]>,
    routing: &'a Routing,
    ids: MatMut<'a>,
    weights: MatMut<'a>,
    rows: Range<usize>,
    /// Scores, what experts are chosen by, and the groups' scores.
    bufs: [&'a mut [f32]; 3],
}

impl Kernel for RouteRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [scores, choice, group_scores] = self.bufs;
        for row in self.rows {
            scores.copy_from_slice(self.logits.f32_row(row));
            match self.routing.score {
                ScoreFunction::Sigmoid => sigmoid(s, scores),
                ScoreFunction::Softmax => softmax(s, scores),
            }
            for (i, choice) in choice.iter_mut().enumerate() {
                let biased = scores[i] + self.bias.map_or(0.0, |bias| bias[i]);
                // NaN loses against everything and still leaves every id in range.
                *choice = if biased.is_nan() { f32::NEG_INFINITY } else { biased };
            }
            if let Some(groups) = self.routing.groups {
                mask_groups(groups, choice, group_scores);
            }
            // SAFETY: the row belongs to this task; the types were checked.
            let (ids, weights) = unsafe { (self.ids.row_mut::<u32>(row), self.weights.row_mut::<f32>(row)) };
            for (id, weight) in ids.iter_mut().zip(weights.iter_mut()) {
                let best = take_best(choice);
                *id = best as u32;
                *weight = scores[best];
            }
            if self.routing.norm_topk_prob {
                let sum = weights.iter().sum::<f32>() + 1e-20;
                for weight in weights.iter_mut() {
                    *weight /= sum;
                }
            }
            for weight in weights {
                *weight *= self.routing.routed_scaling_factor;
            }
        }
    }
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: &mut [f32]) {
    let one = s.splat(1.0);
    slice::map_sum!(s, x, 0.0, |v| s.div(one, s.add(one, s.exp(s.sub(s.zero(), v)))));
}

#[inline(always)]
fn softmax<S: Simd>(s: S, x: &mut [f32]) {
    let max = slice::max(s, x);
    let sum = s.splat(slice::exp_sum(s, x, 1.0, max));
    slice::map_sum!(s, x, 0.0, |v| s.div(v, sum));
}

/// -inf for the experts of groups that lose.
fn mask_groups(groups: Groups, choice: &mut [f32], group_scores: &mut [f32]) {
    let per_group = choice.len() / groups.n_group;
    for (group, members) in group_scores.iter_mut().zip(choice.chunks_exact(per_group)) {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &score in members {
            if score > first {
                (first, second) = (score, first);
            } else if score > second {
                second = score;
            }
        }
        *group = match groups.score {
            GroupScore::TopTwoSum if per_group > 1 => first + second,
            GroupScore::TopTwoSum | GroupScore::Max => first,
        };
    }
    for _ in 0..groups.topk_group {
        take_best(group_scores);
    }
    for (group, members) in group_scores.iter().zip(choice.chunks_exact_mut(per_group)) {
        if !group.is_nan() {
            members.fill(f32::NEG_INFINITY);
        }
    }
}

/// Index of the largest value, the lowest among equals; it becomes NaN, which is never taken again.
fn take_best(values: &mut [f32]) -> usize {
    let mut best: Option<(usize, f32)> = None;
    for (i, &value) in values.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|(_, most)| value > most) {
            best = Some((i, value));
        }
    }
    let (index, _) = best.expect("no more choices than values");
    values[index] = f32::NAN;
    index
}
