//! `y[m, c] = Σ_r x[m, r] w[r, c]` of BF16 inputs and a weight's rows as they lie: W_uk of absorbed MLA.
//!
//! Rows are read in the order of memory, `GROUP` at a time, and meet every output while they are in registers. An output takes
//! pairs of rows in order, blocks with a scale of their own by themselves, so its bits do not depend on how many there are.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;
use r1_core::DType;

use super::WeightRows;
use crate::simd::{Codes, F8, Kernel, PairKernel, Pairs, Simd};
use crate::view::Mat;

/// Pairs of rows whose numbers are in registers together.
const GROUP: usize = 4;

/// Columns `cols` of the sums of the rows `rows` of `w`.
pub(crate) struct PairRows<'a> {
    pub(crate) w: WeightRows<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
    /// `[m, rows.len()]` BF16.
    pub(crate) x: Mat<'a>,
    /// `[m, ld]`, in the order of [`Pairs::columns`]: see there.
    pub(crate) y: &'a mut [f32],
    /// Sums of a block of rows, as `y`.
    pub(crate) part: &'a mut [f32],
    /// `cols.len()` rounded up by [`PairRows::width`].
    pub(crate) ld: usize,
}

impl PairRows<'_> {
    /// Room for a row of so many columns.
    pub(crate) fn width(cols: usize) -> usize {
        cols.next_multiple_of(64)
    }

    /// Whether the weight's blocks of scales fall between vectors when columns are taken from `col` on.
    pub(crate) fn suits(w: &WeightRows<'_>, col: usize) -> bool {
        w.has_pairs()
            && w.data.dtype != DType::I8
            && w.scales.is_none_or(|scales| {
                (scales.block_end(1, col) - col).is_multiple_of(64) && scales.block[1].is_multiple_of(64)
            })
    }
}

impl Kernel for PairRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert!(
            self.rows.end <= self.w.data.rows && self.cols.end <= self.w.data.cols,
            "rows past the matrix"
        );
        assert!(self.x.dtype == DType::BF16 && self.x.cols == self.rows.len(), "an input for each row");
        let floats = self.x.rows * self.ld;
        self.w.check();
        assert!(self.ld >= Self::width(self.cols.len()), "rows of sums overlap");
        assert!(self.y.len() >= floats && self.part.len() >= floats, "sums past their room");
        match self.w.data.dtype {
            DType::BF16 => s.pairs(Typed::<bf16> { rows: self, codes: PhantomData }),
            DType::F8E4M3 => s.pairs(Typed::<F8> { rows: self, codes: PhantomData }),
            dtype => panic!("weights {dtype} that pairs are not made for"),
        }
    }
}

struct Typed<'a, E> {
    rows: PairRows<'a>,
    codes: PhantomData<E>,
}

impl<E: Codes> PairKernel for Typed<'_, E> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let PairRows { w, rows, cols, x, y, part, ld } = self.rows;
        let floats = x.rows * ld;
        let (y, part) = (&mut y[..floats], &mut part[..floats]);
        let Some(scales) = w.scales else {
            y.fill(0.0);
            sum::<S, E>(s, w.data, rows.clone(), &cols, x, 0, y, ld);
            return;
        };
        y.fill(0.0);
        let mut r = rows.start;
        while r < rows.end {
            let end = scales.block_end(0, r).min(rows.end);
            part.fill(0.0);
            sum::<S, E>(s, w.data, r..end, &cols, x, r - rows.start, part, ld);
            let mut c = cols.start;
            while c < cols.end {
                let c_end = scales.block_end(1, c).min(cols.end);
                let scale = s.splat(scales.at(r, c));
                // Blocks end between vectors, but for the last, whose room is whole vectors.
                let columns = c - cols.start..PairRows::width(c_end - cols.start);
                for m in 0..x.rows {
                    for i in (columns.start..columns.end).step_by(S::LANES) {
                        let i = m * ld + i;
                        // SAFETY: a vector lies inside both rows.
                        unsafe {
                            let (y, part) = (y.as_mut_ptr().add(i), part.as_ptr().add(i));
                            s.store(y, s.fma(s.load(part), scale, s.load(y)));
                        }
                    }
                }
                c = c_end;
            }
            r = end;
        }
    }
}

/// Adds the products of the rows `rows` with the inputs from `first` on. Sizes were checked.
#[inline(always)]
fn sum<S: Pairs, E: Codes>(
    s: S,
    w: Mat<'_>,
    rows: Range<usize>,
    cols: &Range<usize>,
    x: Mat<'_>,
    first: usize,
    y: &mut [f32],
    ld: usize,
) {
    let table = s.table(&E::TABLE);
    let step = E::STEP_VECTORS * S::PAIR_LANES;
    let mut r = rows.start;
    while r < rows.end {
        let count = (rows.end - r).min(2 * GROUP);
        // Coefficients of absent rows are zero, and their numbers those of a row that is there.
        let row = |i: usize| w.row(r + i.min(count - 1)).cast::<E>().wrapping_add(cols.start);
        let base: [*const E; 2 * GROUP] = std::array::from_fn(row);
        let mut col = 0;
        while col < cols.len() {
            let left = cols.len() - col;
            let mut v = [[[s.zero_pairs(); 2]; 2]; GROUP];
            // The next rows, in the order of memory.
            for i in 0..2 * GROUP {
                s.prefetch(base[0].wrapping_add(2 * GROUP * w.stride + 2 * GROUP * col + i * step).cast());
            }
            for g in 0..GROUP {
                // SAFETY: the rows have the columns; `left` of them are left.
                let (a, b) = unsafe {
                    let (a, b) = (base[2 * g].add(col), base[2 * g + 1].add(col));
                    if left >= step {
                        (E::load(s, table, a), E::load(s, table, b))
                    } else {
                        (E::load_n(s, table, a, left), E::load_n(s, table, b, left))
                    }
                };
                for j in 0..E::STEP_VECTORS {
                    v[g][j] = s.interleave(a[j], b[j]);
                }
            }
            for m in 0..x.rows {
                let coef = x.row(m).cast::<u16>().wrapping_add(first + r - rows.start);
                let out = y[m * ld + col..][..step].as_mut_ptr();
                // SAFETY: the input has `count` numbers from here on, and the sums were sliced.
                unsafe {
                    let mut acc = [[s.zero(); 2]; 2];
                    for j in 0..E::STEP_VECTORS {
                        for h in 0..2 {
                            acc[j][h] = s.load(out.add((2 * j + h) * S::LANES));
                        }
                    }
                    for g in 0..GROUP {
                        let k = if 2 * g + 1 < count {
                            s.splat_pair(coef.add(2 * g))
                        } else {
                            let last = if 2 * g < count { *coef.add(2 * g) } else { 0 };
                            s.splat_pair([last, 0].as_ptr())
                        };
                        for j in 0..E::STEP_VECTORS {
                            for h in 0..2 {
                                acc[j][h] = s.dot(acc[j][h], k, v[g][j][h]);
                            }
                        }
                    }
                    for j in 0..E::STEP_VECTORS {
                        for h in 0..2 {
                            s.store(out.add((2 * j + h) * S::LANES), acc[j][h]);
                        }
                    }
                }
            }
            col += step;
        }
        r += count;
    }
}
