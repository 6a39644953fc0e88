//! Softmax-weighted sums that arrive in pieces (online softmax), for both forms of attention.
//! Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv:1805.02867).

use crate::simd::{Simd, slice};

/// `rows` running sums of `width` columns: largest score, sum of exponentials, weighted sum.
pub(crate) struct State<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    acc: &'a mut [f32],
    width: usize,
}

impl<'a> State<'a> {
    /// Floats of a state.
    pub(crate) fn floats(rows: usize, width: usize) -> usize {
        rows * (width + 2)
    }

    /// A state kept in `floats`, as it was left there.
    pub(crate) fn kept(floats: &'a mut [f32], rows: usize, width: usize) -> Self {
        let (max, rest) = floats.split_at_mut(rows);
        let (sum, acc) = rest.split_at_mut(rows);
        Self { max, sum, acc: &mut acc[..rows * width], width }
    }

    /// A state that has seen nothing.
    pub(crate) fn empty(floats: &'a mut [f32], rows: usize, width: usize) -> Self {
        let state = Self::kept(floats, rows, width);
        state.max.fill(f32::NEG_INFINITY);
        state.sum.fill(0.0);
        state.acc.fill(0.0);
        state
    }

    /// Turns scores of row `i` into weights relative to the running maximum, and brings what was summed before to it.
    #[inline(always)]
    pub(crate) fn weigh<S: Simd>(&mut self, s: S, i: usize, scores: &mut [f32], scale: f32) {
        slice::scale(s, scores, scale);
        let max = self.max[i].max(slice::max(s, scores));
        let shrink = (self.max[i] - max).exp();
        let added = slice::exp_sum(s, scores, 1.0, max);
        self.max[i] = max;
        self.sum[i] = self.sum[i] * shrink + added;
        if shrink != 1.0 {
            slice::scale(s, &mut self.acc[i * self.width..][..self.width], shrink);
        }
    }

    /// The weighted sums `[rows, width]` from row `i` on, to be added to.
    pub(crate) fn sums(&mut self, i: usize) -> &mut [f32] {
        &mut self.acc[i * self.width..]
    }

    /// Takes in what `later` has seen.
    #[inline(always)]
    pub(crate) fn merge<S: Simd>(&mut self, s: S, later: &State<'_>) {
        for i in 0..self.max.len() {
            let max = self.max[i].max(later.max[i]);
            let (a, b) = ((self.max[i] - max).exp(), (later.max[i] - max).exp());
            let cols = i * self.width..(i + 1) * self.width;
            slice::axpby(s, b, &later.acc[cols.clone()], a, &mut self.acc[cols]);
            self.sum[i] = self.sum[i] * a + later.sum[i] * b;
            self.max[i] = max;
        }
    }

    /// Row `i` of the result; zeros where it has seen nothing.
    #[inline(always)]
    pub(crate) fn finish<S: Simd>(&mut self, s: S, i: usize) -> &mut [f32] {
        let row = &mut self.acc[i * self.width..][..self.width];
        if self.sum[i] != 0.0 {
            slice::scale(s, row, 1.0 / self.sum[i]);
        }
        row
    }
}
