//! `y[m, c] += Σ_r coef[m, r] w[r, c]`: weighted sums of rows. W_uk of absorbed MLA, and probabilities times values.
//!
//! Each output is summed in order of r, FP8 row blocks by themselves, so its bits do not depend on how many there are. Where every
//! row has scales of its own (int8), they go into the coefficients.

use std::ops::Range;

use super::{WeightRows, with_elem};
use crate::simd::{Elem, Kernel, MAX_LANES, Simd, slice};

/// Vectors of columns per register tile.
const TILE_VECTORS: usize = 4;
/// Rows with scales of their own that are read together: more would be asked for faster than memory gives them.
const SCALED_ROWS: usize = 8;
/// From how many outputs on a strip of rows is widened first.
const WIDEN_FROM: usize = 5;

/// Adds weighted sums of the rows `rows` of `w`, columns `cols`, to `y`.
pub(crate) struct Combine<'a> {
    pub(crate) w: WeightRows<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
    /// `[m, rows.len()]`, rows `ld_coef` apart.
    pub(crate) coef: &'a [f32],
    pub(crate) ld_coef: usize,
    /// Outputs.
    pub(crate) m: usize,
    /// `[m, cols.len()]`, rows `ldy` apart.
    pub(crate) y: &'a mut [f32],
    pub(crate) ldy: usize,
    /// Scratch of [`Combine::tile_floats`], or of [`Combine::scaled_floats`] where there are scales.
    pub(crate) tile: &'a mut [f32],
}

impl Combine<'_> {
    /// Floats of `tile`: a widened strip of `rows` rows.
    pub(crate) fn tile_floats(rows: usize) -> usize {
        rows * TILE_VECTORS * MAX_LANES
    }

    /// As [`tile_floats`](Self::tile_floats) for `m` outputs of any weight.
    pub(crate) fn scaled_floats(w: &WeightRows<'_>, rows: usize, m: usize) -> usize {
        let by_row = w.scales.filter(|scales| scales.block[0] == 1);
        Self::tile_floats(rows) + by_row.map_or(0, |scales| m * rows.min(SCALED_ROWS) * scales.values.cols)
    }
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (rows, cols) = (self.rows.len(), self.cols.len());
        if self.m == 0 || rows == 0 || cols == 0 {
            return;
        }
        let data = &self.w.data;
        assert!(self.rows.end <= data.rows && self.cols.end <= data.cols, "sums of rows past the matrix");
        assert!((self.m - 1) * self.ld_coef + rows <= self.coef.len(), "too few coefficients");
        assert!((self.m - 1) * self.ldy + cols <= self.y.len(), "outputs past their slice");
        let by_row = self.w.scales.is_some_and(|scales| scales.block[0] == 1);
        with_elem!(data.dtype, E => if by_row { self.scaled_rows::<S, E>(s) } else { self.typed::<S, E>(s) });
    }
}

/// Rows of one scale, and a register tile's width of their columns.
struct Strip<'a, E> {
    w: *const E,
    ld: usize,
    rows: usize,
    coef: &'a [f32],
    ld_coef: usize,
    ldy: usize,
    scale: f32,
}

impl Combine<'_> {
    #[inline(always)]
    fn typed<S: Simd, E: Elem>(mut self, s: S) {
        let mut r0 = self.rows.start;
        while r0 < self.rows.end {
            let r1 = self.w.scales.map_or(self.rows.end, |scales| scales.block_end(0, r0).min(self.rows.end));
            let mut c0 = self.cols.start;
            while c0 < self.cols.end {
                let c_end =
                    self.w.scales.map_or(self.cols.end, |scales| scales.block_end(1, c0).min(self.cols.end));
                let scale = self.w.scales.map_or(1.0, |scales| scales.at(r0, c0) * E::FACTOR);
                self.strips::<S, E>(s, r0..r1, c0..c_end, scale);
                c0 = c_end;
            }
            r0 = r1;
        }
    }

    /// Every row has scales of its own. A few rows at a time, in the order of memory: the next ones are asked for meanwhile.
    #[inline(always)]
    fn scaled_rows<S: Simd, E: Elem>(self, s: S) {
        let Self { w, rows, cols, coef, ld_coef, m, y, ldy, tile } = self;
        let Some(scales) = w.scales else { return };
        let (tile, scaled) = tile.split_at_mut(Self::tile_floats(rows.len()));
        let ld = SCALED_ROWS.min(rows.len());
        let groups = scales.column(cols.start)..scales.column(cols.end - 1) + 1;
        let row_bytes = w.data.stride * size_of::<E>();
        let line_bytes = cols.len() * size_of::<E>();
        let mut r0 = rows.start;
        while r0 < rows.end {
            let r1 = (r0 + SCALED_ROWS).min(rows.end);
            let next = w.data.row(r0).wrapping_add(SCALED_ROWS * row_bytes + cols.start * size_of::<E>());
            for (i, r) in (r0..r1).enumerate() {
                let of_row = &scales.values.f32_row(r + scales.offset[0])[groups.clone()];
                for j in 0..m {
                    let coef = coef[j * ld_coef + r - rows.start];
                    for (scaled, scale) in scaled[j * ld + i..].iter_mut().step_by(m * ld).zip(of_row) {
                        *scaled = coef * (scale * E::FACTOR);
                    }
                }
                let (mut ask, mut left) = (next.wrapping_add(i * row_bytes), line_bytes);
                while left > 0 {
                    s.prefetch(ask);
                    ask = ask.wrapping_add(64);
                    left = left.saturating_sub(64);
                }
            }
            let mut c0 = cols.start;
            for scaled in scaled.chunks(m * ld).take(groups.len()) {
                let c1 = scales.block_end(1, c0).min(cols.end);
                let y = &mut y[c0 - cols.start..];
                let (rows, cols) = (r0..r1, c0..c1);
                let mut part = Combine { w, rows, cols, coef: scaled, ld_coef: ld, m, y, ldy, tile };
                part.strips::<S, E>(s, r0..r1, c0..c1, 1.0);
                c0 = c1;
            }
            r0 = r1;
        }
    }

    /// Rows and columns of one scale.
    #[inline(always)]
    fn strips<S: Simd, E: Elem>(&mut self, s: S, rows: Range<usize>, cols: Range<usize>, scale: f32) {
        let mut c0 = cols.start;
        while c0 < cols.end {
            let c1 = (c0 + TILE_VECTORS * S::LANES).min(cols.end);
            self.strip::<S, E>(s, rows.clone(), c0..c1, scale);
            c0 = c1;
        }
    }

    #[inline(always)]
    fn strip<S: Simd, E: Elem>(&mut self, s: S, rows: Range<usize>, cols: Range<usize>, scale: f32) {
        let (len, width) = (rows.len(), cols.len());
        let (coef, ld_coef, ldy) = (&self.coef[rows.start - self.rows.start..], self.ld_coef, self.ldy);
        let y = &mut self.y[cols.start - self.cols.start..];
        // SAFETY: row `rows.start` exists and has the columns.
        let w = unsafe { self.w.data.row(rows.start).cast::<E>().add(cols.start) };
        let ld = self.w.data.stride;
        if !E::IS_F32 && self.m >= WIDEN_FROM {
            let ld_tile = TILE_VECTORS * S::LANES;
            for r in 0..len {
                // SAFETY: row `rows.start + r` exists and has the columns.
                unsafe { slice::widen(s, w.add(r * ld), &mut self.tile[r * ld_tile..][..width]) };
            }
            let strip = Strip { w: self.tile.as_ptr(), ld: ld_tile, rows: len, coef, ld_coef, ldy, scale };
            // SAFETY: `len` rows of `width` columns were just widened.
            unsafe { strip.run(s, self.m, width, y) };
        } else {
            let strip = Strip { w, ld, rows: len, coef, ld_coef, ldy, scale };
            // SAFETY: the rows exist and have the columns.
            unsafe { strip.run(s, self.m, width, y) };
        }
    }
}

impl<E: Elem> Strip<'_, E> {
    /// # Safety
    /// `rows` rows of `width` elements, `ld` apart, can be read at `w`.
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, s: S, m: usize, width: usize, y: &mut [f32]) {
        assert!(
            self.coef.len() >= (m - 1) * self.ld_coef + self.rows && y.len() >= (m - 1) * self.ldy + width
        );
        // SAFETY: the caller's contract; coefficients and outputs were checked.
        unsafe {
            if width == TILE_VECTORS * S::LANES {
                let mut i = 0;
                while i + 4 <= m {
                    self.tile::<S, 4, TILE_VECTORS>(s, i, 0, y);
                    i += 4;
                }
                if i + 2 <= m {
                    self.tile::<S, 2, TILE_VECTORS>(s, i, 0, y);
                    i += 2;
                }
                if i < m {
                    self.tile::<S, 1, TILE_VECTORS>(s, i, 0, y);
                }
                return;
            }
            for i in 0..m {
                let mut c = 0;
                while c + S::LANES <= width {
                    self.tile::<S, 1, 1>(s, i, c, y);
                    c += S::LANES;
                }
                if c < width {
                    self.ragged(s, i, c, width - c, y);
                }
            }
        }
    }

    /// # Safety
    /// Outputs `i..i + M`, columns `c..c + V * LANES` exist.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const V: usize>(&self, s: S, i: usize, c: usize, y: &mut [f32]) {
        let mut acc = [[s.zero(); V]; M];
        let coef: [*const f32; M] =
            std::array::from_fn(|m| self.coef.as_ptr().wrapping_add((i + m) * self.ld_coef));
        for r in 0..self.rows {
            let mut w = [s.zero(); V];
            for v in 0..V {
                // SAFETY: the row has the columns.
                w[v] = unsafe { E::load_exact(s, self.w.add(r * self.ld + c + v * S::LANES)) };
            }
            for m in 0..M {
                // SAFETY: every output has `rows` coefficients.
                let k = s.splat(unsafe { *coef[m].add(r) });
                for v in 0..V {
                    acc[m][v] = s.fma(k, w[v], acc[m][v]);
                }
            }
        }
        let scale = s.splat(self.scale);
        for (m, row) in acc.iter().enumerate() {
            for (v, &sum) in row.iter().enumerate() {
                // SAFETY: the outputs exist.
                unsafe {
                    let p = y.as_mut_ptr().add((i + m) * self.ldy + c + v * S::LANES);
                    s.store(p, s.fma(sum, scale, s.load(p)));
                }
            }
        }
    }

    /// # Safety
    /// Output `i`, columns `c..c + n` exist, `n < LANES`.
    #[inline(always)]
    unsafe fn ragged<S: Simd>(&self, s: S, i: usize, c: usize, n: usize, y: &mut [f32]) {
        // SAFETY: the caller's contract; the output has `rows` coefficients.
        unsafe {
            let mut acc = s.zero();
            for r in 0..self.rows {
                let k = s.splat(*self.coef.as_ptr().add(i * self.ld_coef + r));
                acc = s.fma(k, E::load_n(s, self.w.add(r * self.ld + c), n), acc);
            }
            let p = y.as_mut_ptr().add(i * self.ldy + c);
            s.store_n(p, n, s.fma(acc, s.splat(self.scale), s.load_n(p, n, 0.0)));
        }
    }
}
