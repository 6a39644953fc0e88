//! Queries against one tile of keys and values: what both forms of MLA do alike.
//! Knows neither caches nor sequences.

use r1_core::DType;

use super::softmax::State;
use crate::kernels::{Combine, InColumns, MatMul, PairCombine, TileSize, WeightRows, XRows};
use crate::simd::{Simd, slice};
use crate::view::Mat;

/// Keys of a tile: even, so that pairs of values do not cross tiles.
pub(super) const TILE: usize = 64;
/// Queries whose common keys are weighed together.
const GROUP: usize = 8;
/// What a row of sums is a multiple of where pairs are multiplied: numbers of a vector of pairs.
const PAIR_WIDTH: usize = 32;

/// How keys, values and weights are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Products {
    /// All widened to F32.
    F32,
    /// All BF16; a weight is the sum of two, which hold it to 16 bits.
    Pairs,
}

impl Products {
    pub(super) fn of(pairs: bool) -> Self {
        if pairs { Self::Pairs } else { Self::F32 }
    }

    /// Element type of queries, keys and values.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Pairs => DType::BF16,
        }
    }

    /// Floats that `rows` rows of `cols` elements take in working memory.
    pub(super) fn floats(self, rows: usize, cols: usize) -> usize {
        (rows * cols * self.dtype().size_bytes()).div_ceil(size_of::<f32>())
    }

    /// Width of the state's sums for values of `cols` columns.
    pub(super) fn state_width(self, cols: usize) -> usize {
        match self {
            Self::F32 => cols,
            Self::Pairs => cols.next_multiple_of(PAIR_WIDTH),
        }
    }

    /// Floats of working memory for `queries` rows: scores, weights and the products' scratch.
    pub(super) fn tile_floats(self, queries: usize, key_dim: usize) -> [usize; 3] {
        let keys = WeightRows { data: Mat::empty(self.dtype(), key_dim), scales: None };
        let products = TileSize::floats(&keys, TILE, queries).max(Combine::tile_floats(TILE));
        let weights = if self == Self::Pairs { self.floats(queries, 2 * TILE) } else { 0 };
        [queries * TILE, weights, products]
    }

    /// Row `i` of the result in the order of its columns.
    #[inline(always)]
    pub(super) fn finish<'s, S: Simd>(
        self,
        s: S,
        state: &'s mut State<'_>,
        i: usize,
        cols: usize,
    ) -> &'s [f32] {
        let row = state.finish(s, i);
        if self == Self::Pairs {
            s.pairs(InColumns { row });
        }
        &row[..cols]
    }
}

/// One tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// `[m, K]`.
    pub(super) q: Mat<'a>,
    /// `[n, K]`, n at most [`TILE`].
    pub(super) keys: Mat<'a>,
    /// `[n, V]`.
    pub(super) values: Mat<'a>,
    /// Keys of this tile that the first query sees; may be negative, or more than there are.
    pub(super) seen: isize,
    /// How many more keys each later query sees.
    pub(super) step: usize,
    pub(super) scale: f32,
}

impl Tile<'_> {
    fn visible(&self, i: usize) -> usize {
        let seen = self.seen + (i * self.step).cast_signed();
        seen.clamp(0, self.keys.rows.cast_signed()).cast_unsigned()
    }

    /// Adds the tile to the state. `bufs`: see [`Products::tile_floats`].
    #[inline(always)]
    pub(super) fn run<S: Simd>(
        &self,
        s: S,
        products: Products,
        state: &mut State<'_>,
        [scores, weights, scratch]: [&mut [f32]; 3],
    ) {
        let (m, n) = (self.q.rows, self.keys.rows);
        // Queries before `active` see nothing of this tile, those from `full` on all of it.
        let active = (0..m).position(|i| self.visible(i) > 0).unwrap_or(m);
        let full = (active..m).position(|i| self.visible(i) == n).map_or(m, |i| active + i);
        if active == m {
            return;
        }
        let keys = WeightRows { data: self.keys, scales: None };
        let x = XRows::range(self.q, active..m);
        s.call(MatMul { w: keys, rows: 0..n, x, y: &mut scores[active * TILE..], ldy: TILE, tile: scratch });
        for i in active..m {
            let seen = self.visible(i);
            state.weigh(s, i, &mut scores[i * TILE..][..seen], self.scale);
        }
        match products {
            Products::F32 => self.sum(s, state, active, full, scores, scratch),
            Products::Pairs => {
                let weights = as_u16s(weights);
                for i in active..m {
                    let seen = self.visible(i);
                    split(s, &mut scores[i * TILE..][..seen], &mut weights[i * 2 * TILE..][..2 * TILE]);
                }
                self.sum_pairs(s, state, active, full, weights);
            }
        }
    }

    #[inline(always)]
    fn sum<S: Simd>(
        &self,
        s: S,
        state: &mut State<'_>,
        active: usize,
        full: usize,
        weights: &[f32],
        scratch: &mut [f32],
    ) {
        let (m, cols) = (self.q.rows, self.values.cols);
        let w = WeightRows { data: self.values, scales: None };
        let mut i = active;
        while i < m {
            let (count, rows) = if i < full { (1, self.visible(i)) } else { (m - i, self.keys.rows) };
            s.call(Combine {
                w,
                rows: 0..rows,
                cols: 0..cols,
                coef: &weights[i * TILE..],
                ld_coef: TILE,
                m: count,
                y: state.sums(i),
                ldy: cols,
                tile: scratch,
            });
            i += count;
        }
    }

    #[inline(always)]
    fn sum_pairs<S: Simd>(&self, s: S, state: &mut State<'_>, active: usize, full: usize, weights: &[u16]) {
        let (m, w, ldy) = (self.q.rows, self.values, Products::Pairs.state_width(self.values.cols));
        let add = |i: usize, m: usize, first: usize, rows: usize, state: &mut State<'_>| {
            let coef = &weights[i * 2 * TILE..];
            s.pairs(PairCombine {
                w,
                first,
                rows,
                coef,
                ld_coef: 2 * TILE,
                low: TILE,
                m,
                y: state.sums(i),
                ldy,
            });
        };
        let mut i = active;
        while i < full {
            let count = GROUP.min(full - i);
            let common = self.visible(i) / 2 * 2;
            add(i, count, 0, common, state);
            for i in i..i + count {
                add(i, 1, common, self.visible(i) - common, state);
            }
            i += count;
        }
        add(full, m - full, 0, self.keys.rows, state);
    }
}

/// Weights in two BF16 parts: rounded in the first half of `parts`, what that leaves in the second; an odd last one gets a zero
/// beside it. `weights` keeps the second.
#[inline(always)]
fn split<S: Simd>(s: S, weights: &mut [f32], parts: &mut [u16]) {
    let n = weights.len();
    let mut rounded = [0.0; TILE];
    let rounded = &mut rounded[..n];
    let (high, low) = parts.split_at_mut(TILE);
    // SAFETY: both parts have room for `n` numbers, as `n` is at most a tile.
    unsafe {
        slice::write(s, weights, high[..n].as_mut_ptr().cast(), DType::BF16);
        slice::read(s, high[..n].as_ptr().cast(), DType::BF16, rounded);
        slice::axpby(s, -1.0, rounded, 1.0, weights);
        slice::write(s, weights, low[..n].as_mut_ptr().cast(), DType::BF16);
    }
    for part in [high, low] {
        part[n..n.next_multiple_of(2)].fill(0);
    }
}

/// Working memory for BF16 numbers.
fn as_u16s(floats: &mut [f32]) -> &mut [u16] {
    // SAFETY: a float is two 16-bit numbers, whatever its bits, and stricter in its alignment.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), 2 * floats.len()) }
}
