//! `y[t, n] = Σ_k x[t, k] w[n, k]`: rows of inputs with rows of a weight, any weight format.
//!
//! An output is the sum of `LANES` partial sums over k, each in order of k; FP8 blocks are summed by themselves, scaled, then
//! added. One inner loop, `tile`, serves every number of tokens and only changes how many outputs it computes
//! side by side, so an output's bits depend on neither the number of tokens nor the rows that a task was given.
//!
//! Few tokens: the weight streams through registers once, widened there. Many: four rows of a span of K are widened into L1
//! and meet all tokens of a block, whose inputs of that span stay in L2.

use std::ops::Range;

use r1_core::DType;

use super::pair_dot::{self, PairMul};
use super::{WeightRows, with_elem};
use crate::simd::{Elem, Kernel, MAX_LANES, Simd, slice};
use crate::view::Mat;

/// Weight rows per register tile.
const TILE_ROWS: usize = 4;
/// The largest `TILE_TOKENS`.
const MAX_TILE_TOKENS: usize = 3;
/// Tokens that share one pass over the weight rows of a task; a multiple of every `TILE_TOKENS`.
const TOKEN_BLOCK: usize = 60;
/// Columns of K per pass: four widened rows of it fill half of a 32 KiB L1.
const SPAN: usize = 1024;

/// Input rows: every row, or chosen ones, of an F32 matrix, or of a BF16 or quantized one where their products are there.
#[derive(Clone, Copy)]
pub(crate) struct XRows<'a> {
    mat: Mat<'a>,
    index: Option<&'a [u32]>,
}

impl<'a> XRows<'a> {
    pub(crate) fn all(mat: Mat<'a>) -> Self {
        assert!(
            matches!(mat.dtype, DType::F32 | DType::BF16 | DType::I8),
            "inputs are widened before the product"
        );
        Self { mat, index: None }
    }

    /// Rows `range`.
    pub(crate) fn range(mat: Mat<'a>, range: Range<usize>) -> Self {
        Self::all(mat.slice(range))
    }

    /// Rows `index`, in this order.
    pub(crate) fn gathered(mat: Mat<'a>, index: &'a [u32]) -> Self {
        Self { index: Some(index), ..Self::all(mat) }
    }

    pub(crate) fn len(&self) -> usize {
        self.index.map_or(self.mat.rows, <[u32]>::len)
    }

    pub(super) fn dtype(&self) -> DType {
        self.mat.dtype
    }

    /// # Panics
    /// When the rows are not of this type and length.
    pub(super) fn check(&self, dtype: DType, cols: usize) {
        let Mat { dtype: has, cols: len, .. } = self.mat;
        assert!(has == dtype && len == cols, "inputs are {len} {has}, not {cols} {dtype}");
    }

    pub(super) fn row<T>(&self, t: usize) -> *const T {
        debug_assert_eq!(self.mat.dtype.size_bytes(), size_of::<T>());
        self.mat.row(self.index.map_or(t, |index| index[t] as usize)).cast()
    }
}

/// How much scratch a [`MatMul`] wants.
pub(crate) struct TileSize;

impl TileSize {
    /// Floats of `tile` for `rows` weight rows and any number of tokens.
    pub(crate) fn floats(w: &WeightRows<'_>, rows: usize, tokens: usize) -> usize {
        // The last tile of a block of tokens may be narrower than its room.
        let f32s =
            TILE_ROWS * widened_row(w) + rows * (tokens.min(TOKEN_BLOCK) + MAX_TILE_TOKENS) * MAX_LANES;
        f32s.max(pair_dot::scratch_floats(w, rows, tokens))
    }
}

/// Columns per pass, whole blocks of scales.
fn span_of(w: &WeightRows<'_>) -> usize {
    w.scales.map_or(SPAN, |scales| (SPAN / scales.block[1]).max(1) * scales.block[1])
}

/// Floats between widened rows.
fn widened_row(w: &WeightRows<'_>) -> usize {
    span_of(w).min(w.data.cols).next_multiple_of(MAX_LANES)
}

/// `y[t * ldy + n - rows.start] = x[t] · w[n]` for the weight rows `rows`.
pub(crate) struct MatMul<'a> {
    pub(crate) w: WeightRows<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) x: XRows<'a>,
    pub(crate) y: &'a mut [f32],
    pub(crate) ldy: usize,
    /// Scratch of [`TileSize::floats`].
    pub(crate) tile: &'a mut [f32],
}

impl Kernel for MatMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let tokens = self.x.len();
        if tokens == 0 || self.rows.is_empty() {
            return;
        }
        assert!(
            self.rows.end <= self.w.data.rows && self.x.mat.cols == self.w.data.cols,
            "product of unlike shapes"
        );
        assert!((tokens - 1) * self.ldy + self.rows.len() <= self.y.len(), "outputs past their slice");
        self.w.check();
        assert!(TileSize::floats(&self.w, self.rows.len(), tokens) <= self.tile.len(), "scratch too small");
        if self.x.mat.dtype == DType::BF16 {
            let Self { w, rows, x, y, ldy, tile } = self;
            return s.pairs(PairMul { w, rows, x, y, ldy, tile });
        }
        with_elem!(self.w.data.dtype, E => {
            if self.w.scales.is_some() {
                self.typed::<S, E, true>(s);
            } else {
                self.typed::<S, E, false>(s);
            }
        });
    }
}

/// A stretch of columns that register tiles run over: the first block of scales may be cut.
#[derive(Clone, Copy)]
struct Columns {
    len: usize,
    first: usize,
    block: usize,
}

impl MatMul<'_> {
    #[inline(always)]
    fn typed<S: Simd, E: Elem, const SCALED: bool>(self, s: S) {
        if self.x.len() <= S::STREAMED_TOKENS {
            self.streamed::<S, E, SCALED>(s);
        } else {
            self.blocked::<S, E, SCALED>(s);
        }
    }

    fn columns(&self, span: &Range<usize>) -> Columns {
        let len = span.len();
        self.w.scales.map_or(Columns { len, first: len, block: len }, |scales| Columns {
            len,
            first: (scales.block_end(1, span.start) - span.start).min(len),
            block: scales.block[1],
        })
    }

    #[inline(always)]
    fn scales<const R: usize>(&self, n: usize, col: usize) -> [*const f32; R] {
        std::array::from_fn(|r| self.w.scales.map_or(std::ptr::null(), |scales| scales.row_from(n + r, col)))
    }

    /// The weight goes through registers once.
    #[inline(always)]
    fn streamed<S: Simd, E: Elem, const SCALED: bool>(mut self, s: S) {
        if self.w.data.cols == 0 {
            return self.zero();
        }
        let mut n = self.rows.start;
        while n + TILE_ROWS <= self.rows.end {
            self.stream_rows::<S, E, TILE_ROWS, SCALED>(s, n);
            n += TILE_ROWS;
        }
        while n < self.rows.end {
            self.stream_rows::<S, E, 1, SCALED>(s, n);
            n += 1;
        }
    }

    fn zero(&mut self) {
        for t in 0..self.x.len() {
            self.y[t * self.ldy..][..self.rows.len()].fill(0.0);
        }
    }

    /// Tokens in passes of at most `TILE_TOKENS`: after the first the rows are in L1.
    #[inline(always)]
    fn stream_rows<S: Simd, E: Elem, const R: usize, const SCALED: bool>(&mut self, s: S, n: usize) {
        let mut t = 0;
        while t < self.x.len() {
            match (self.x.len() - t).min(S::TILE_TOKENS) {
                1 => self.stream_tile::<S, E, R, 1, SCALED>(s, n, t),
                2 => self.stream_tile::<S, E, R, 2, SCALED>(s, n, t),
                _ => self.stream_tile::<S, E, R, 3, SCALED>(s, n, t),
            }
            t += S::TILE_TOKENS;
        }
    }

    #[inline(always)]
    fn stream_tile<S: Simd, E: Elem, const R: usize, const T: usize, const SCALED: bool>(
        &mut self,
        s: S,
        n: usize,
        t: usize,
    ) {
        let columns = self.columns(&(0..self.w.data.cols));
        let w = std::array::from_fn(|r| self.w.data.row(n + r).cast::<E>());
        let x = std::array::from_fn(|i| self.x.row::<f32>(t + i));
        let scales = self.scales::<R>(n, 0);
        // Rows follow each other closely, so the next group's are asked for as this one's are read.
        let ahead = if R == TILE_ROWS && t == 0 { R * self.w.data.stride } else { 0 };
        let mut total = [0.0; TILE_ROWS * MAX_TILE_TOKENS * MAX_LANES];
        let sums = total.as_mut_ptr();
        s.call(Tile::<E, R, T, SCALED> {
            w,
            x,
            scales,
            factor: E::FACTOR,
            columns,
            ahead,
            fresh: true,
            total: sums,
        });
        self.finish::<S, R, T>(s, n, t, &total);
    }

    /// Sums the lanes of a tile's `R * T` vectors.
    #[inline(always)]
    fn finish<S: Simd, const R: usize, const T: usize>(&mut self, s: S, n: usize, t: usize, total: &[f32]) {
        let (n, total) = (n - self.rows.start, &total[..R * T * S::LANES]);
        for i in 0..T {
            let y = &mut self.y[(t + i) * self.ldy + n..][..R];
            for r in 0..R {
                // SAFETY: `total` has `R * T` vectors.
                y[r] = s.sum(unsafe { s.load(total.as_ptr().add((r * T + i) * S::LANES)) });
            }
        }
    }

    /// Weight spans are widened once per block of tokens.
    #[inline(always)]
    fn blocked<S: Simd, E: Elem, const SCALED: bool>(mut self, s: S) {
        let (k, tokens, span) = (self.w.data.cols, self.x.len(), span_of(&self.w));
        if k == 0 {
            return self.zero();
        }
        let tile = std::mem::take(&mut self.tile);
        let (widened, totals) = tile.split_at_mut(TILE_ROWS * widened_row(&self.w));
        let mut t0 = 0;
        while t0 < tokens {
            let block = t0..(t0 + TOKEN_BLOCK).min(tokens);
            let mut k0 = 0;
            while k0 < k {
                // The first span ends at a block's end too, when a shard begins inside a block.
                let k1 = self
                    .w
                    .scales
                    .map_or(k0 + span, |scales| scales.block_end(1, k0 + span - scales.block[1]));
                let cols = k0..k1.min(k);
                let mut n = self.rows.start;
                while n + TILE_ROWS <= self.rows.end {
                    self.block_rows::<S, E, TILE_ROWS, SCALED>(s, n, &block, cols.clone(), widened, totals);
                    n += TILE_ROWS;
                }
                while n < self.rows.end {
                    self.block_rows::<S, E, 1, SCALED>(s, n, &block, cols.clone(), widened, totals);
                    n += 1;
                }
                k0 = cols.end;
            }
            t0 = block.end;
        }
    }

    #[inline(always)]
    fn block_rows<S: Simd, E: Elem, const R: usize, const SCALED: bool>(
        &mut self,
        s: S,
        n: usize,
        tokens: &Range<usize>,
        cols: Range<usize>,
        widened: &mut [f32],
        totals: &mut [f32],
    ) {
        let ld = widened.len() / TILE_ROWS;
        let mut w = [std::ptr::null::<f32>(); R];
        for (r, w) in w.iter_mut().enumerate() {
            // SAFETY: row `n + r` exists and has the columns.
            let row = unsafe { self.w.data.row(n + r).cast::<E>().add(cols.start) };
            if E::IS_F32 {
                *w = row.cast();
            } else {
                let dst = &mut widened[r * ld..][..cols.len()];
                // SAFETY: as above.
                unsafe { slice::widen(s, row, dst) };
                *w = dst.as_ptr();
                let next = row.wrapping_add(R * self.w.data.stride);
                for line in (0..cols.len()).step_by(64 / size_of::<E>()) {
                    s.prefetch(next.wrapping_add(line).cast());
                }
            }
        }
        // The partial sums of a tile lie together.
        let group = (n - self.rows.start) * tokens.len().next_multiple_of(S::TILE_TOKENS) * S::LANES;
        let mut totals = totals[group..].chunks_exact_mut(R * S::TILE_TOKENS * S::LANES);
        let mut t = tokens.start;
        while t + S::TILE_TOKENS <= tokens.end {
            let totals = totals.next().expect("room for every tile");
            if S::TILE_TOKENS == 3 {
                self.block_tile::<S, E, R, 3, SCALED>(s, n, t, &cols, w, totals);
            } else {
                self.block_tile::<S, E, R, 2, SCALED>(s, n, t, &cols, w, totals);
            }
            t += S::TILE_TOKENS;
        }
        if t < tokens.end {
            let totals = totals.next().expect("room for every tile");
            if tokens.end - t == 2 {
                self.block_tile::<S, E, R, 2, SCALED>(s, n, t, &cols, w, totals);
            } else {
                self.block_tile::<S, E, R, 1, SCALED>(s, n, t, &cols, w, totals);
            }
        }
    }

    #[inline(always)]
    fn block_tile<S: Simd, E: Elem, const R: usize, const T: usize, const SCALED: bool>(
        &mut self,
        s: S,
        n: usize,
        t: usize,
        cols: &Range<usize>,
        w: [*const f32; R],
        totals: &mut [f32],
    ) {
        let total = totals[..R * T * S::LANES].as_mut_ptr();
        let x = std::array::from_fn(|i| self.x.row::<f32>(t + i).wrapping_add(cols.start));
        let (scales, columns, fresh) = (self.scales::<R>(n, cols.start), self.columns(cols), cols.start == 0);
        s.call(Tile::<f32, R, T, SCALED> {
            w,
            x,
            scales,
            factor: E::FACTOR,
            columns,
            ahead: 0,
            fresh,
            total,
        });
        if cols.end == self.w.data.cols {
            self.finish::<S, R, T>(s, n, t, totals);
        }
    }
}

/// `total[r][t] += Σ_k w[r][k] x[t][k]`, by lanes; with `SCALED`, each block's sum times its scale.
///
/// Called, not inlined: alone in its function it gets all registers. Whoever makes one promises that `columns.len` elements
/// can be read at every `w` and `x`, a scale per block at every `scales` if `SCALED`, and `R * T` vectors be written at `total`.
struct Tile<E, const R: usize, const T: usize, const SCALED: bool> {
    w: [*const E; R],
    x: [*const f32; T],
    scales: [*const f32; R],
    factor: f32,
    columns: Columns,
    /// How far on, in elements, the rows lie that are asked for meanwhile; 0: nowhere.
    ahead: usize,
    /// Nothing is summed yet.
    fresh: bool,
    total: *mut f32,
}

impl<E: Elem, const R: usize, const T: usize, const SCALED: bool> Kernel for Tile<E, R, T, SCALED> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { w, x, columns, .. } = self;
        let mut total = [[s.zero(); T]; R];
        if !self.fresh {
            for r in 0..R {
                for t in 0..T {
                    // SAFETY: `total` has `R * T` vectors.
                    total[r][t] = unsafe { s.load(self.total.add((r * T + t) * S::LANES)) };
                }
            }
        }
        let (mut i, mut end, mut block) = (0, columns.first, 0);
        while i < columns.len {
            let start = i;
            let mut acc = if SCALED { [[s.zero(); T]; R] } else { total };
            // SAFETY: `i + LANES <= end <= len`; the ragged end reads what is left of the block.
            unsafe {
                while i + S::LANES <= end {
                    let wv: [S::V; R] = load_all::<S, E, R>(s, &w, i);
                    if self.ahead > 0 && ((i - start) * size_of::<E>()).is_multiple_of(64) {
                        for w in w {
                            s.prefetch(w.wrapping_add(i + self.ahead).cast());
                        }
                    }
                    for t in 0..T {
                        let xv = s.load(x[t].add(i));
                        for r in 0..R {
                            acc[r][t] = s.fma(wv[r], xv, acc[r][t]);
                        }
                    }
                    i += S::LANES;
                }
                if i < end {
                    for r in 0..R {
                        let wv = E::load_n(s, w[r].add(i), end - i);
                        for t in 0..T {
                            acc[r][t] = s.fma(wv, s.load_n(x[t].add(i), end - i, 0.0), acc[r][t]);
                        }
                    }
                    i = end;
                }
            }
            if SCALED {
                for r in 0..R {
                    // SAFETY: the block has a scale, and its elements can be read.
                    let scale = unsafe {
                        if E::hides_nan(s, w[r].add(start), end - start) {
                            f32::NAN
                        } else {
                            *self.scales[r].add(block) * self.factor
                        }
                    };
                    let scale = s.splat(scale);
                    for t in 0..T {
                        total[r][t] = s.fma(acc[r][t], scale, total[r][t]);
                    }
                }
            } else {
                total = acc;
            }
            block += 1;
            end = (end + columns.block).min(columns.len);
        }
        for r in 0..R {
            for t in 0..T {
                // SAFETY: `total` has `R * T` vectors.
                unsafe { s.store(self.total.add((r * T + t) * S::LANES), total[r][t]) };
            }
        }
    }
}

/// # Safety
/// `LANES` elements can be read at `i` of every `w`.
#[inline(always)]
unsafe fn load_all<S: Simd, E: Elem, const R: usize>(s: S, w: &[*const E; R], i: usize) -> [S::V; R] {
    let mut out = [s.zero(); R];
    for r in 0..R {
        // SAFETY: the same contract.
        out[r] = unsafe { E::load(s, w[r].add(i)) };
    }
    out
}
