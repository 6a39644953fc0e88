//! `y[m, c] += Σ_r coef[m, r] w[r, c]` of BF16 rows: probabilities times values. A coefficient is the sum of two BF16 numbers, so
//! that rounding it costs less than rounding the result does.
//!
//! Each output takes pairs of rows in order, an odd last row with a zero. So sums of rows `0..r` with even `r`, then of `r..end`,
//! are the sums of `0..end` bit for bit, and an output's bits do not depend on how many there are.

use r1_core::DType;

use crate::simd::{PairKernel, Pairs};
use crate::view::Mat;

/// Outputs of a register tile.
const TILE_OUTPUTS: usize = 8;

/// Adds weighted sums of the rows `first..first + rows` of `w` to `y`.
///
/// Columns of `y` are in the order of [`Pairs::interleave`], `PAIR_LANES` at a time: see [`Pairs::columns`].
pub(crate) struct PairCombine<'a> {
    /// `[R, C]` BF16.
    pub(crate) w: Mat<'a>,
    /// An even row.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    /// BF16 `[m, R]`, rows `ld_coef` apart, row 0 of `w` first; where `rows` is odd one more, which is zero.
    pub(crate) coef: &'a [u16],
    pub(crate) ld_coef: usize,
    /// How far behind a coefficient the number lies that is added to it.
    pub(crate) low: usize,
    /// Outputs.
    pub(crate) m: usize,
    /// `[m, C rounded up to vectors of pairs]`, rows `ldy` apart.
    pub(crate) y: &'a mut [f32],
    pub(crate) ldy: usize,
}

impl PairKernel for PairCombine<'_> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let Self { w, first, rows, coef, ld_coef, low, m, y, ldy } = self;
        if m == 0 || rows == 0 || w.cols == 0 {
            return;
        }
        assert_eq!(w.dtype, DType::BF16, "pairs of rows that are not BF16");
        assert!(first.is_multiple_of(2) && first + rows <= w.rows, "sums of rows past the matrix");
        let used = first + rows.next_multiple_of(2);
        assert!((m - 1) * ld_coef + low + used <= coef.len(), "too few coefficients");
        let width = w.cols.next_multiple_of(S::PAIR_LANES);
        assert!((m - 1) * ldy + width <= y.len(), "outputs past their slice");
        let mut col = 0;
        while col < w.cols {
            let strip = Strip {
                w: w.row(first).cast::<u16>().wrapping_add(col),
                ld: w.stride,
                cols: (w.cols - col).min(S::PAIR_LANES),
                rows,
                coef: coef[first..].as_ptr(),
                ld_coef,
                low,
                y: y[col..].as_mut_ptr(),
                ldy,
            };
            let mut i = 0;
            // SAFETY: rows, coefficients and outputs were checked; `cols` columns are left.
            unsafe {
                while i + TILE_OUTPUTS <= m {
                    strip.tile::<S, TILE_OUTPUTS>(s, i);
                    i += TILE_OUTPUTS;
                }
                if i + 4 <= m {
                    strip.tile::<S, 4>(s, i);
                    i += 4;
                }
                if i + 2 <= m {
                    strip.tile::<S, 2>(s, i);
                    i += 2;
                }
                if i < m {
                    strip.tile::<S, 1>(s, i);
                }
            }
            col += S::PAIR_LANES;
        }
    }
}

/// At most a vector of pairs' width of columns.
struct Strip {
    w: *const u16,
    ld: usize,
    cols: usize,
    rows: usize,
    coef: *const u16,
    ld_coef: usize,
    low: usize,
    y: *mut f32,
    ldy: usize,
}

impl Strip {
    /// # Safety
    /// `cols` numbers of `rows` rows can be read at `w`, coefficients of outputs `i..i + M` in whole pairs, and two vectors of each
    /// output can be read and written.
    #[inline(always)]
    unsafe fn tile<S: Pairs, const M: usize>(&self, s: S, i: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            if self.cols == S::PAIR_LANES {
                self.sum::<S, M, true>(s, i);
            } else {
                self.sum::<S, M, false>(s, i);
            }
        }
    }

    /// # Safety
    /// As for `tile`; `WHOLE` says that `cols` is a vector's.
    #[inline(always)]
    unsafe fn sum<S: Pairs, const M: usize, const WHOLE: bool>(&self, s: S, i: usize) {
        // SAFETY: the caller's contract throughout.
        unsafe {
            let mut acc = [[s.zero(); 2]; M];
            for (m, acc) in acc.iter_mut().enumerate() {
                let y = self.y.add((i + m) * self.ldy);
                *acc = [s.load(y), s.load(y.add(S::LANES))];
            }
            let coef = self.coef.add(i * self.ld_coef);
            let mut r = 0;
            while r < self.rows {
                let row = self.w.add(r * self.ld);
                let a = Self::row::<S, WHOLE>(s, row, self.cols);
                let b = if r + 1 < self.rows {
                    Self::row::<S, WHOLE>(s, row.add(self.ld), self.cols)
                } else {
                    s.load_pairs_n(row, 0)
                };
                let [low, high] = s.interleave(a, b);
                for (m, acc) in acc.iter_mut().enumerate() {
                    let coef = coef.add(m * self.ld_coef + r);
                    let k = s.splat_pair(coef);
                    *acc = [s.dot(acc[0], k, low), s.dot(acc[1], k, high)];
                    let k = s.splat_pair(coef.add(self.low));
                    *acc = [s.dot(acc[0], k, low), s.dot(acc[1], k, high)];
                }
                r += 2;
            }
            for (m, acc) in acc.iter().enumerate() {
                let y = self.y.add((i + m) * self.ldy);
                s.store(y, acc[0]);
                s.store(y.add(S::LANES), acc[1]);
            }
        }
    }

    /// # Safety
    /// `n` numbers can be read at `p`.
    #[inline(always)]
    unsafe fn row<S: Pairs, const WHOLE: bool>(s: S, p: *const u16, n: usize) -> S::P {
        // SAFETY: the same contract.
        unsafe { if WHOLE { s.load_pairs(p) } else { s.load_pairs_n(p, n) } }
    }
}

/// Brings a row of sums of [`PairCombine`] into the order of the columns.
pub(crate) struct InColumns<'a> {
    /// Whole vectors of pairs.
    pub(crate) row: &'a mut [f32],
}

impl PairKernel for InColumns<'_> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        for chunk in self.row.chunks_exact_mut(S::PAIR_LANES) {
            let p = chunk.as_mut_ptr();
            // SAFETY: a chunk has two vectors.
            unsafe {
                let [a, b] = s.columns([s.load(p), s.load(p.add(S::LANES))]);
                s.store(p, a);
                s.store(p.add(S::LANES), b);
            }
        }
    }
}
