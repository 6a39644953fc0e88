//! `y[t, n] = Σ_k x[t, k] w[n, k]` where the inputs are BF16: [`MatMul`](super::MatMul) over products of pairs.
//!
//! An output is the sum of `LANES` partial sums over pairs of k, each in order of k; blocks with a scale of their own are summed
//! by themselves, scaled, then added. Both inner loops add in this order, so here too an output's bits depend on neither the
//! number of tokens nor the rows that a task was given.
//!
//! BF16 weights are multiplied where they lie. Codes are widened in registers for few tokens, and into L1 for many. Tiles keep
//! spans of weight rows in L1, which the tokens of a block stream past from L2.

use std::ops::Range;

use r1_core::DType;

use super::{WeightRows, XRows};
use crate::simd::{Codes, F8, MAX_LANES, PairKernel, Pairs};

/// Weight rows of a register tile without scales: 24 sums for 8 weights and 3 inputs loaded.
const ROWS: usize = 8;
/// Weight rows of a register tile with scales, which needs twice the sums.
const SCALED_ROWS: usize = 4;
/// Tokens of a register tile.
const TOKENS: usize = 3;
/// Up to so many tokens codes are widened in registers for each of them.
const STREAMED_TOKENS: usize = 2;
/// Tokens that share one pass over the weight rows of a task; a multiple of `TOKENS`.
const TOKEN_BLOCK: usize = 96;
/// Columns of K per pass, where there is more than one tile of tokens: eight rows of it are half of a 32 KiB L1.
const SPAN: usize = 1024;

/// Floats of scratch for `rows` weight rows and any number of tokens.
pub(super) fn scratch_floats(w: &WeightRows<'_>, rows: usize, tokens: usize) -> usize {
    let widened = if w.data.dtype == DType::BF16 { 0 } else { SCALED_ROWS * widened_row(w) / 2 };
    let partial =
        if w.data.cols > span_of(w) { rows * (tokens.min(TOKEN_BLOCK) + TOKENS) * MAX_LANES } else { 0 };
    widened + partial
}

/// Columns per pass, whole blocks of scales.
fn span_of(w: &WeightRows<'_>) -> usize {
    w.scales.map_or(SPAN, |scales| (SPAN / scales.block[1]).max(1) * scales.block[1])
}

/// Numbers between widened rows.
fn widened_row(w: &WeightRows<'_>) -> usize {
    span_of(w).min(w.data.cols).next_multiple_of(2 * MAX_LANES)
}

/// `y[t * ldy + n - rows.start] = x[t] · w[n]` for the weight rows `rows`. Sizes were checked by [`MatMul`](super::MatMul).
pub(super) struct PairMul<'a> {
    pub(super) w: WeightRows<'a>,
    pub(super) rows: Range<usize>,
    pub(super) x: XRows<'a>,
    pub(super) y: &'a mut [f32],
    pub(super) ldy: usize,
    /// Scratch of [`scratch_floats`].
    pub(super) tile: &'a mut [f32],
}

impl PairKernel for PairMul<'_> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        match (self.w.data.dtype, self.w.scales.is_some()) {
            (DType::BF16, false) => self.in_place(s),
            (DType::F8E4M3, true) => self.codes::<S, F8, true>(s),
            (DType::F8E4M3, false) => self.codes::<S, F8, false>(s),
            (dtype, _) => panic!("weights {dtype} that pairs are not made for"),
        }
    }
}

/// A stretch of columns that register tiles run over: the first block of scales may be cut.
#[derive(Clone, Copy)]
struct Columns {
    len: usize,
    first: usize,
    block: usize,
}

impl PairMul<'_> {
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

    /// The end of the pass that begins at column `k0`.
    fn pass_end(&self, k0: usize) -> usize {
        let span = span_of(&self.w);
        // The first pass ends at a block's end too, when a shard begins inside a block.
        let end = self.w.scales.map_or(k0 + span, |scales| scales.block_end(1, k0 + span - scales.block[1]));
        end.min(self.w.data.cols)
    }

    fn zero(&mut self) {
        for t in 0..self.x.len() {
            self.y[t * self.ldy..][..self.rows.len()].fill(0.0);
        }
    }

    #[inline(always)]
    fn in_place<S: Pairs>(mut self, s: S) {
        let (k, tokens) = (self.w.data.cols, self.x.len());
        if k == 0 {
            return self.zero();
        }
        let totals = std::mem::take(&mut self.tile);
        // One tile of tokens reads everything once, so there is nothing to keep in L1.
        let one_pass = tokens <= TOKENS;
        let mut t0 = 0;
        while t0 < tokens {
            let block = t0..(t0 + TOKEN_BLOCK).min(tokens);
            let mut k0 = 0;
            while k0 < k {
                let cols = k0..if one_pass { k } else { self.pass_end(k0) };
                let mut n = self.rows.start;
                while n + ROWS <= self.rows.end {
                    self.place_rows::<S, ROWS>(s, n, &block, &cols, totals);
                    n += ROWS;
                }
                while n < self.rows.end {
                    self.place_rows::<S, 1>(s, n, &block, &cols, totals);
                    n += 1;
                }
                k0 = cols.end;
            }
            t0 = block.end;
        }
    }

    #[inline(always)]
    fn place_rows<S: Pairs, const R: usize>(
        &mut self,
        s: S,
        n: usize,
        tokens: &Range<usize>,
        cols: &Range<usize>,
        totals: &mut [f32],
    ) {
        let w = std::array::from_fn(|r| self.w.data.row(n + r).cast::<u16>().wrapping_add(cols.start));
        // What a few tokens make of a row takes less time than fetching the next, so that is asked for meanwhile.
        let ahead = if tokens.len() <= TOKENS { R * self.w.data.stride } else { 0 };
        self.token_tiles::<S, R, false>(s, n, tokens, cols, w, ahead, totals);
    }

    #[inline(always)]
    fn codes<S: Pairs, E: Codes, const SCALED: bool>(mut self, s: S) {
        let (k, tokens) = (self.w.data.cols, self.x.len());
        if k == 0 {
            return self.zero();
        }
        if tokens <= STREAMED_TOKENS {
            let mut n = self.rows.start;
            while n + SCALED_ROWS <= self.rows.end {
                self.stream_rows::<S, E, SCALED_ROWS, SCALED>(s, n);
                n += SCALED_ROWS;
            }
            while n < self.rows.end {
                self.stream_rows::<S, E, 1, SCALED>(s, n);
                n += 1;
            }
            return;
        }
        let tile = std::mem::take(&mut self.tile);
        let (widened, totals) = tile.split_at_mut(SCALED_ROWS * widened_row(&self.w) / 2);
        let mut t0 = 0;
        while t0 < tokens {
            let block = t0..(t0 + TOKEN_BLOCK).min(tokens);
            let mut k0 = 0;
            while k0 < k {
                let cols = k0..self.pass_end(k0);
                let mut n = self.rows.start;
                while n + SCALED_ROWS <= self.rows.end {
                    self.widened_rows::<S, E, SCALED_ROWS, SCALED>(s, n, &block, &cols, widened, totals);
                    n += SCALED_ROWS;
                }
                while n < self.rows.end {
                    self.widened_rows::<S, E, 1, SCALED>(s, n, &block, &cols, widened, totals);
                    n += 1;
                }
                k0 = cols.end;
            }
            t0 = block.end;
        }
    }

    #[inline(always)]
    fn stream_rows<S: Pairs, E: Codes, const R: usize, const SCALED: bool>(&mut self, s: S, n: usize) {
        if self.x.len() == 1 {
            self.stream_tile::<S, E, R, 1, SCALED>(s, n);
        } else {
            self.stream_tile::<S, E, R, 2, SCALED>(s, n);
        }
    }

    #[inline(always)]
    fn stream_tile<S: Pairs, E: Codes, const R: usize, const T: usize, const SCALED: bool>(
        &mut self,
        s: S,
        n: usize,
    ) {
        let columns = self.columns(&(0..self.w.data.cols));
        let w = std::array::from_fn(|r| self.w.data.row(n + r).cast::<E>());
        let x = std::array::from_fn(|t| self.x.row::<u16>(t));
        let scales = self.scales::<R>(n, 0);
        let ahead = R * self.w.data.stride;
        let y = self.outputs::<R, T>(n, 0);
        s.call_pairs(Stream::<E, R, T, SCALED> { w, x, scales, columns, ahead, y, ldy: self.ldy });
    }

    /// Where the outputs of a tile go.
    fn outputs<const R: usize, const T: usize>(&mut self, n: usize, t: usize) -> *mut f32 {
        let first = t * self.ldy + n - self.rows.start;
        assert!(first + (T - 1) * self.ldy + R <= self.y.len(), "outputs past their slice");
        // SAFETY: checked above.
        unsafe { self.y.as_mut_ptr().add(first) }
    }

    #[inline(always)]
    fn widened_rows<S: Pairs, E: Codes, const R: usize, const SCALED: bool>(
        &mut self,
        s: S,
        n: usize,
        tokens: &Range<usize>,
        cols: &Range<usize>,
        widened: &mut [f32],
        totals: &mut [f32],
    ) {
        let ld = widened.len() / SCALED_ROWS;
        let mut w = [std::ptr::null::<u16>(); R];
        for (r, w) in w.iter_mut().enumerate() {
            // SAFETY: row `n + r` exists and has the columns.
            let row = unsafe { self.w.data.row(n + r).cast::<E>().add(cols.start) };
            let dst = &mut widened[r * ld..][..ld];
            assert!(cols.len() <= 2 * dst.len(), "a widened row past its room");
            *w = dst.as_ptr().cast();
            s.call_pairs(Widen { src: row, len: cols.len(), dst: dst.as_mut_ptr().cast() });
        }
        self.token_tiles::<S, R, SCALED>(s, n, tokens, cols, w, 0, totals);
    }

    /// All tokens of a block past `R` weight rows.
    #[inline(always)]
    fn token_tiles<S: Pairs, const R: usize, const SCALED: bool>(
        &mut self,
        s: S,
        n: usize,
        tokens: &Range<usize>,
        cols: &Range<usize>,
        w: [*const u16; R],
        ahead: usize,
        totals: &mut [f32],
    ) {
        // The partial sums of a tile lie together; where one pass sees all of K there are none.
        let whole = cols.start == 0 && cols.end == self.w.data.cols;
        let tiles = tokens.len().next_multiple_of(TOKENS);
        let totals = if whole { totals } else { &mut totals[(n - self.rows.start) * tiles * S::LANES..] };
        let tile_len = if whole { 0 } else { R * TOKENS * S::LANES };
        let mut t = tokens.start;
        while t < tokens.end {
            let first = (t - tokens.start) / TOKENS * tile_len;
            let total = &mut totals[first..first + tile_len];
            match tokens.end - t {
                1 => self.tile::<S, R, 1, SCALED>(s, n, t, cols, w, ahead, total),
                2 => self.tile::<S, R, 2, SCALED>(s, n, t, cols, w, ahead, total),
                _ => self.tile::<S, R, TOKENS, SCALED>(s, n, t, cols, w, ahead, total),
            }
            t += TOKENS;
        }
    }

    #[inline(always)]
    fn tile<S: Pairs, const R: usize, const T: usize, const SCALED: bool>(
        &mut self,
        s: S,
        n: usize,
        t: usize,
        cols: &Range<usize>,
        w: [*const u16; R],
        ahead: usize,
        total: &mut [f32],
    ) {
        let x = std::array::from_fn(|i| self.x.row::<u16>(t + i).wrapping_add(cols.start));
        let (scales, columns) = (self.scales::<R>(n, cols.start), self.columns(cols));
        let (first, last) = (cols.start == 0, cols.end == self.w.data.cols);
        assert!((first && last) || total.len() >= R * T * S::LANES, "no room for partial sums");
        let (y, ldy, total) = (self.outputs::<R, T>(n, t), self.ldy, total.as_mut_ptr());
        s.call_pairs(Tile::<R, T, SCALED> { w, x, scales, columns, ahead, first, last, total, y, ldy });
    }
}

/// Widens codes to BF16 numbers: `len` of them, readable at `src` and writable at `dst` up to a whole vector.
struct Widen<E> {
    src: *const E,
    len: usize,
    dst: *mut u16,
}

impl<E: Codes> PairKernel for Widen<E> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let table = s.table(&E::TABLE);
        let step = E::STEP_VECTORS * S::PAIR_LANES;
        let mut i = 0;
        // SAFETY: whoever makes one promises the memory; the last vectors are cut to what is left, whole vectors of room.
        unsafe {
            while i + step <= self.len {
                let v = E::load(s, table, self.src.add(i));
                for (j, &v) in v.iter().enumerate().take(E::STEP_VECTORS) {
                    s.store_pairs(self.dst.add(i + j * S::PAIR_LANES), v);
                }
                i += step;
            }
            if i < self.len {
                let v = E::load_n(s, table, self.src.add(i), self.len - i);
                for (j, &v) in v.iter().enumerate().take((self.len - i).div_ceil(S::PAIR_LANES)) {
                    s.store_pairs(self.dst.add(i + j * S::PAIR_LANES), v);
                }
            }
        }
    }
}

/// `total[r][t] += Σ_k w[r][k] x[t][k]`, by lanes; with `SCALED`, each block's sum times its scale. After the last pass the lanes
/// are summed and go to `y[t * ldy + r]`.
///
/// Called, not inlined: alone in its function it gets all registers. Whoever makes one promises that `columns.len` numbers
/// can be read at every `w` and `x`, a scale per block at every `scales` if `SCALED`, that `R * T` vectors can be read and written
/// at `total` unless the pass is first and last, and that the outputs can be written.
struct Tile<const R: usize, const T: usize, const SCALED: bool> {
    w: [*const u16; R],
    x: [*const u16; T],
    scales: [*const f32; R],
    columns: Columns,
    /// How far on, in numbers, the rows lie that are asked for meanwhile; 0: nowhere.
    ahead: usize,
    first: bool,
    last: bool,
    total: *mut f32,
    y: *mut f32,
    ldy: usize,
}

impl<const R: usize, const T: usize, const SCALED: bool> PairKernel for Tile<R, T, SCALED> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let Self { w, x, columns, .. } = self;
        let mut total = [[s.zero(); T]; R];
        if !self.first {
            for r in 0..R {
                for t in 0..T {
                    // SAFETY: `total` has `R * T` vectors.
                    total[r][t] = unsafe { s.load(self.total.add((r * T + t) * S::LANES)) };
                }
            }
        }
        let (mut i, mut end, mut block) = (0, columns.first, 0);
        while i < columns.len {
            let mut acc = if SCALED { [[s.zero(); T]; R] } else { total };
            // SAFETY: `i + PAIR_LANES <= end <= len`; the ragged end reads what is left of the block.
            unsafe {
                while i + S::PAIR_LANES <= end {
                    let mut xv = [s.load_pairs(x[0].add(i)); T];
                    for t in 1..T {
                        xv[t] = s.load_pairs(x[t].add(i));
                    }
                    for r in 0..R {
                        let wv = s.load_pairs(w[r].add(i));
                        for t in 0..T {
                            acc[r][t] = s.dot(acc[r][t], wv, xv[t]);
                        }
                    }
                    if self.ahead > 0 {
                        for w in w {
                            s.prefetch(w.wrapping_add(i + self.ahead).cast());
                        }
                    }
                    i += S::PAIR_LANES;
                }
                if i < end {
                    for r in 0..R {
                        let wv = s.load_pairs_n(w[r].add(i), end - i);
                        for t in 0..T {
                            acc[r][t] = s.dot(acc[r][t], wv, s.load_pairs_n(x[t].add(i), end - i));
                        }
                    }
                    i = end;
                }
            }
            if SCALED {
                for r in 0..R {
                    // SAFETY: the block has a scale.
                    let scale = s.splat(unsafe { *self.scales[r].add(block) });
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
        // SAFETY: `total` has `R * T` vectors, and the outputs can be written.
        unsafe {
            if self.last {
                finish::<S, R, T>(s, &total, self.y, self.ldy);
            } else {
                for r in 0..R {
                    for t in 0..T {
                        s.store(self.total.add((r * T + t) * S::LANES), total[r][t]);
                    }
                }
            }
        }
    }
}

/// Sums the lanes of a tile.
///
/// # Safety
/// `R` floats can be written at `y + t * ldy` for every `t`.
#[inline(always)]
unsafe fn finish<S: Pairs, const R: usize, const T: usize>(
    s: S,
    total: &[[S::V; T]; R],
    y: *mut f32,
    ldy: usize,
) {
    for t in 0..T {
        // SAFETY: the caller's contract.
        unsafe {
            let y = y.add(t * ldy);
            let mut r = 0;
            while r + 4 <= R {
                let sums = s.sum4([total[r][t], total[r + 1][t], total[r + 2][t], total[r + 3][t]]);
                y.add(r).cast::<[f32; 4]>().write_unaligned(sums);
                r += 4;
            }
            while r < R {
                *y.add(r) = s.sum(total[r][t]);
                r += 1;
            }
        }
    }
}

/// As [`Tile`] over all of K, of codes that are widened in registers.
struct Stream<E, const R: usize, const T: usize, const SCALED: bool> {
    w: [*const E; R],
    x: [*const u16; T],
    scales: [*const f32; R],
    columns: Columns,
    /// How far on, in codes, the rows lie that are asked for meanwhile.
    ahead: usize,
    y: *mut f32,
    ldy: usize,
}

impl<E: Codes, const R: usize, const T: usize, const SCALED: bool> PairKernel for Stream<E, R, T, SCALED> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let Self { w, x, columns, .. } = self;
        let table = s.table(&E::TABLE);
        let step = E::STEP_VECTORS * S::PAIR_LANES;
        let mut total = [[s.zero(); T]; R];
        let (mut i, mut end, mut block) = (0, columns.first, 0);
        while i < columns.len {
            let mut acc = if SCALED { [[s.zero(); T]; R] } else { total };
            // SAFETY: `i + step <= end <= len`; the ragged end reads what is left of the block.
            unsafe {
                while i + step <= end {
                    for r in 0..R {
                        let wv = E::load(s, table, w[r].add(i));
                        s.prefetch(w[r].wrapping_add(i + self.ahead).cast());
                        for j in 0..E::STEP_VECTORS {
                            for t in 0..T {
                                let xv = s.load_pairs(x[t].add(i + j * S::PAIR_LANES));
                                acc[r][t] = s.dot(acc[r][t], wv[j], xv);
                            }
                        }
                    }
                    i += step;
                }
                if i < end {
                    for r in 0..R {
                        let wv = E::load_n(s, table, w[r].add(i), end - i);
                        let mut from = i;
                        for j in 0..E::STEP_VECTORS {
                            let n = (end - from).min(S::PAIR_LANES);
                            if n == 0 {
                                break;
                            }
                            for t in 0..T {
                                let x = x[t].add(from);
                                let xv =
                                    if n == S::PAIR_LANES { s.load_pairs(x) } else { s.load_pairs_n(x, n) };
                                acc[r][t] = s.dot(acc[r][t], wv[j], xv);
                            }
                            from += n;
                        }
                    }
                    i = end;
                }
            }
            if SCALED {
                for r in 0..R {
                    // SAFETY: the block has a scale.
                    let scale = s.splat(unsafe { *self.scales[r].add(block) });
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
        // SAFETY: whoever makes one promises the outputs.
        unsafe { finish::<S, R, T>(s, &total, self.y, self.ldy) };
    }
}
