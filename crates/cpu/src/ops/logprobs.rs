//! Log-probabilities of the raw logits.

use r1_backend::{LogprobsOut, Tensor, shape};

use crate::Cpu;
use crate::simd::{Kernel, Simd, slice};
use crate::view::{In, Mat, MatMut, Out};

/// Exponentials summed in F32 before they join the F64 sum.
const BLOCK: usize = 1024;

pub(crate) fn logprobs(cpu: &Cpu, logits: &Tensor<Cpu>, tokens: &Tensor<Cpu>, out: &LogprobsOut<Cpu>) {
    const OP: &str = "logprobs";
    shape::logprobs(logits, tokens, out);
    let (logits, tokens) = (In::new(OP, "logits", logits), In::new(OP, "tokens", tokens));
    let mut chosen = Out::new(OP, "out.chosen", &out.chosen);
    let mut top_ids = Out::new(OP, "out.top_ids", &out.top_ids);
    let mut top = Out::new(OP, "out.top", &out.top);
    let (logits, tokens) = (logits.mat(), tokens.u32s());
    let (chosen, top_ids, top) = (chosen.mat(), top_ids.mat(), top.mat());
    cpu.engine().pool.run(logits.rows, &|row, scratch| {
        assert!((tokens[row] as usize) < logits.cols, "{OP}: token {} of {}", tokens[row], logits.cols);
        let buf = scratch.floats.get(BLOCK);
        let candidates = &mut scratch.candidates;
        cpu.isa.run(LogprobsRow { logits, token: tokens[row], row, chosen, top_ids, top, buf, candidates });
    });
}

struct LogprobsRow<'a> {
    logits: Mat<'a>,
    token: u32,
    row: usize,
    chosen: MatMut<'a>,
    top_ids: MatMut<'a>,
    top: MatMut<'a>,
    buf: &'a mut [f32],
    candidates: &'a mut Vec<(f32, u32)>,
}

impl Kernel for LogprobsRow<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let logits = self.logits.f32_row(self.row);
        let max = slice::max(s, logits);
        let mut sum = 0.0f64;
        for block in logits.chunks(BLOCK) {
            let buf = &mut self.buf[..block.len()];
            buf.copy_from_slice(block);
            sum += f64::from(slice::exp_sum(s, buf, 1.0, max));
        }
        // In F64: far from zero, F32 has no digits left for the difference.
        let log_sum = f64::from(max) + sum.ln();
        let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
        // SAFETY: `chosen` is a vector, one element per row and task; the types were checked.
        let (ids, top) = unsafe {
            let chosen = [logprob(logits[self.token as usize])];
            self.chosen.write(s, 0, self.row, &chosen);
            (self.top_ids.row_mut::<u32>(self.row), self.top.row_mut::<f32>(self.row))
        };
        largest(logits, ids.len(), self.candidates);
        for ((id, top), &(logit, token)) in ids.iter_mut().zip(top).zip(&*self.candidates) {
            (*id, *top) = (token, logprob(logit));
        }
    }
}

/// The `n` largest of `values`, best first, the lower index first among equals; NaN is last.
///
/// A running list of at most `2 n` candidates: most values fail one comparison with the n-th best so far.
pub(crate) fn largest(values: &[f32], n: usize, out: &mut Vec<(f32, u32)>) {
    out.clear();
    if n == 0 {
        return;
    }
    out.reserve(2 * n);
    let mut floor = f32::NEG_INFINITY;
    for (i, &value) in values.iter().enumerate() {
        // Equal to the floor is too late: whoever is there has a lower index.
        if out.len() < n || value > floor {
            out.push((value, i as u32));
            if out.len() == 2 * n {
                out.select_nth_unstable_by(n - 1, best_first);
                out.truncate(n);
                floor = out[n - 1].0;
            }
        }
    }
    out.sort_unstable_by(best_first);
    out.truncate(n);
}

/// Larger values first, then lower indices; NaN counts as -inf.
#[allow(clippy::trivially_copy_pass_by_ref)] // what sorts take
pub(crate) fn best_first(a: &(f32, u32), b: &(f32, u32)) -> std::cmp::Ordering {
    let key = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    key(b.0).partial_cmp(&key(a.0)).expect("NaN was replaced").then(a.1.cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_agrees_with_a_full_sort() {
        let values: Vec<f32> =
            (0..997u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 26) as f32 - 20.0).collect();
        let mut all: Vec<(f32, u32)> = values.iter().copied().zip(0..).collect();
        all.sort_by(best_first);
        let mut out = Vec::new();
        for n in [0, 1, 2, 20, 500, 997] {
            largest(&values, n, &mut out);
            assert_eq!(out, all[..n]);
        }
    }

    #[test]
    fn nan_and_infinity_are_ordered_too() {
        let mut out = Vec::new();
        largest(&[f32::NAN, 1.0, f32::NEG_INFINITY, f32::INFINITY, 1.0], 5, &mut out);
        assert_eq!(out.iter().map(|c| c.1).collect::<Vec<_>>(), [3, 1, 4, 0, 2]);
    }
}
