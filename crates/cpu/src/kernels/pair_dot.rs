//! `y[t, n] = Σ_k x[t, k] w[n, k]` where the inputs are BF16: [`MatMul`](super::MatMul) over products of pairs.
//!
//! An output is the sum of `LANES` partial sums over pairs of k, each in order of k; blocks with a scale of their own are summed
//! by themselves, scaled, then added. Both inner loops add in this order, so here too an output's bits depend on neither the
//! number of tokens nor the rows that a task was given.
//!
//! Few tokens: rows of the weight go through registers in the order of memory, once, widened there. Many: spans of weight rows
//! are kept in L1, widened if they are codes, and the tokens of a block stream past them from L2.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;
use r1_core::DType;

use super::{WeightRows, XRows};
use crate::simd::{Codes, F8, MAX_LANES, PairKernel, Pairs};

/// Up to so many tokens the weight streams through registers.
pub(super) const STREAMED_TOKENS: usize = 8;
/// Weight rows of a register tile without scales: 24 sums for 8 weights and 3 inputs loaded.
pub(super) const ROWS: usize = 8;
/// Weight rows of a register tile with scales, which needs twice the sums.
pub(super) const SCALED_ROWS: usize = 4;
/// Tokens of a register tile.
pub(super) const TOKENS: usize = 3;
/// Tokens that share one pass over the weight rows of a task; a multiple of `TOKENS`.
pub(super) const TOKEN_BLOCK: usize = 96;
/// Columns of K per pass: eight rows of it are half of a 32 KiB L1.
const SPAN: usize = 1024;
/// Numbers between rows in L1 beyond a span: rows a power of two apart would fall into the same few sets of the cache.
pub(super) const PADDING: usize = 32;
/// Up to so many tokens a row's products take less time than fetching it, and the hardware sees far enough ahead.
const PLAIN_TOKENS: usize = 4;
/// How far ahead of the products bytes of streamed rows are asked for.
pub(super) const AHEAD: usize = 2048;
/// Bytes between rows of which a cache of 32 KiB holds no eight.
const SET_STRIDE: usize = 4096;

/// Floats of scratch for `rows` weight rows and any number of tokens.
pub(super) fn scratch_floats(w: &WeightRows<'_>, rows: usize, tokens: usize) -> usize {
    if tokens <= STREAMED_TOKENS {
        // Room for the inputs where they would fall into each other's place in the cache.
        return tokens * far_row(w.data.cols) / 2;
    }
    let partial =
        if w.data.cols > span_of(w) { rows * (tokens.min(TOKEN_BLOCK) + TOKENS) * MAX_LANES } else { 0 };
    ROWS * near_row(w) / 2 + partial
}

/// Columns per pass, whole blocks of scales.
fn span_of(w: &WeightRows<'_>) -> usize {
    w.scales.map_or(SPAN, |scales| (SPAN / scales.block[1]).max(1) * scales.block[1])
}

/// Numbers between inputs that were moved apart.
fn far_row(cols: usize) -> usize {
    cols.next_multiple_of(2 * MAX_LANES) + PADDING
}

/// Numbers between rows that were brought into L1.
fn near_row(w: &WeightRows<'_>) -> usize {
    span_of(w).min(w.data.cols).next_multiple_of(2 * MAX_LANES) + PADDING
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
            (DType::BF16, false) => self.typed::<S, bf16, false>(s),
            (DType::F8E4M3, true) => self.typed::<S, F8, true>(s),
            (DType::F8E4M3, false) => self.typed::<S, F8, false>(s),
            (DType::I8, true) => self.typed::<S, i8, true>(s),
            (dtype, _) => panic!("weights {dtype} that pairs are not made for"),
        }
    }
}

/// A stretch of columns that register tiles run over: the first block of scales may be cut.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub(super) len: usize,
    pub(super) first: usize,
    pub(super) block: usize,
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
    fn typed<S: Pairs, E: Codes, const SCALED: bool>(mut self, s: S) {
        if self.w.data.cols == 0 {
            self.zero();
        } else if self.x.len() <= STREAMED_TOKENS {
            self.streamed::<S, E, SCALED>(s);
        } else {
            self.blocked::<S, E, SCALED>(s);
        }
    }

    #[inline(always)]
    fn streamed<S: Pairs, E: Codes, const SCALED: bool>(self, s: S) {
        macro_rules! stream {
            ($($tokens:literal)*) => {
                match self.x.len() {
                    $($tokens => s.call_pairs(Stream::<E, $tokens, SCALED> { mul: self, codes: PhantomData }),)*
                    tokens => unreachable!("{tokens} tokens do not stream"),
                }
            };
        }
        stream!(1 2 3 4 5 6 7 8);
    }

    #[inline(always)]
    fn blocked<S: Pairs, E: Codes, const SCALED: bool>(mut self, s: S) {
        let (k, tokens) = (self.w.data.cols, self.x.len());
        let tile = std::mem::take(&mut self.tile);
        let (near, totals) = tile.split_at_mut(ROWS * near_row(&self.w) / 2);
        let mut t0 = 0;
        while t0 < tokens {
            let block = t0..(t0 + TOKEN_BLOCK).min(tokens);
            let mut k0 = 0;
            while k0 < k {
                let cols = k0..self.pass_end(k0);
                let mut n = self.rows.start;
                if !SCALED {
                    while n + ROWS <= self.rows.end {
                        self.block::<S, E, ROWS, false>(s, n, &block, &cols, near, totals);
                        n += ROWS;
                    }
                }
                while n + SCALED_ROWS <= self.rows.end {
                    self.block::<S, E, SCALED_ROWS, SCALED>(s, n, &block, &cols, near, totals);
                    n += SCALED_ROWS;
                }
                while n < self.rows.end {
                    self.block::<S, E, 1, SCALED>(s, n, &block, &cols, near, totals);
                    n += 1;
                }
                k0 = cols.end;
            }
            t0 = block.end;
        }
    }

    /// All tokens of a block past `R` weight rows.
    #[inline(always)]
    fn block<S: Pairs, E: Codes, const R: usize, const SCALED: bool>(
        &mut self,
        s: S,
        n: usize,
        tokens: &Range<usize>,
        cols: &Range<usize>,
        near: &mut [f32],
        totals: &mut [f32],
    ) {
        let ld = near_row(&self.w);
        assert!(
            cols.len().next_multiple_of(S::PAIR_LANES) <= ld && R * ld <= 2 * near.len(),
            "rows past their room"
        );
        let near = near.as_mut_ptr().cast::<u16>();
        let mut w = [std::ptr::null::<u16>(); R];
        let in_place =
            E::STEP_VECTORS == 1 && !(self.w.data.stride * size_of::<E>()).is_multiple_of(SET_STRIDE);
        for (r, w) in w.iter_mut().enumerate() {
            let row = self.w.data.row(n + r).cast::<E>().wrapping_add(cols.start);
            if in_place {
                *w = row.cast();
            } else {
                let dst = near.wrapping_add(r * ld);
                *w = dst;
                s.call_pairs(Widen { src: row, len: cols.len(), dst });
            }
        }
        // What follows this group of rows is asked for while the tokens pass.
        let next = self.w.data.row(n).wrapping_add(R * self.w.data.stride * size_of::<E>());
        let next_len = if tokens.start == 0 { R * self.w.data.stride * size_of::<E>() } else { 0 };
        // The partial sums of a group of rows lie together; where one pass sees all of K there are none.
        let (first, last) = (cols.start == 0, cols.end == self.w.data.cols);
        let room = tokens.len().next_multiple_of(TOKENS) * S::LANES;
        let total = if first && last {
            std::ptr::null_mut()
        } else {
            totals[(n - self.rows.start) * room..][..R * room].as_mut_ptr()
        };
        let out = tokens.start * self.ldy + n - self.rows.start;
        assert!(out + (tokens.len() - 1) * self.ldy + R <= self.y.len(), "outputs past their slice");
        s.call_pairs(Block::<R, SCALED> {
            w,
            x: self.x,
            tokens: tokens.clone(),
            col: cols.start,
            scales: std::array::from_fn(|r| {
                self.w.scales.map_or(std::ptr::null(), |scales| scales.row_from(n + r, cols.start))
            }),
            columns: self.columns(cols),
            next,
            next_len,
            first,
            last,
            total,
            y: self.y[out..].as_mut_ptr(),
            ldy: self.ldy,
        });
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
                for j in 0..E::STEP_VECTORS {
                    s.store_pairs(self.dst.add(i + j * S::PAIR_LANES), v[j]);
                }
                i += step;
            }
            if i < self.len {
                let v = E::load_n(s, table, self.src.add(i), self.len - i);
                for j in 0..(self.len - i).div_ceil(S::PAIR_LANES) {
                    s.store_pairs(self.dst.add(i + j * S::PAIR_LANES), v[j]);
                }
            }
        }
    }
}

/// `R` weight rows, BF16 and near, with a block of tokens: `total[t][r] += Σ_k w[r][k] x[t][k]`, by lanes; with `SCALED`, each
/// block's sum times its scale. After the last pass the lanes are summed and go to `y[t * ldy + r]`.
///
/// Whoever makes one promises that `columns.len` numbers can be read at every `w` and from column `col` of every token, a scale
/// per block at every `scales` if `SCALED`, that `R` vectors per token, tokens rounded up to whole tiles, can be read and
/// written at `total` unless the pass is first and last, and that the outputs can be written.
pub(super) struct Block<'a, const R: usize, const SCALED: bool> {
    pub(super) w: [*const u16; R],
    pub(super) x: XRows<'a>,
    pub(super) tokens: Range<usize>,
    pub(super) col: usize,
    pub(super) scales: [*const f32; R],
    pub(super) columns: Columns,
    /// Bytes that will be wanted next.
    pub(super) next: *const u8,
    pub(super) next_len: usize,
    pub(super) first: bool,
    pub(super) last: bool,
    pub(super) total: *mut f32,
    pub(super) y: *mut f32,
    pub(super) ldy: usize,
}

impl<const R: usize, const SCALED: bool> PairKernel for Block<'_, R, SCALED> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let tiles = self.tokens.len().div_ceil(TOKENS);
        let ask = self.next_len.div_ceil(tiles).next_multiple_of(64);
        let mut t = self.tokens.start;
        let mut tile = 0;
        while t < self.tokens.end {
            let mut line = 0;
            while line < ask {
                s.prefetch(self.next.wrapping_add(tile * ask + line));
                line += 64;
            }
            match self.tokens.end - t {
                1 => self.tile::<S, 1>(s, t),
                2 => self.tile::<S, 2>(s, t),
                _ => self.tile::<S, TOKENS>(s, t),
            }
            t += TOKENS;
            tile += 1;
        }
    }
}

impl<const R: usize, const SCALED: bool> Block<'_, R, SCALED> {
    #[inline(always)]
    fn tile<S: Pairs, const T: usize>(&self, s: S, t: usize) {
        let mut x = [std::ptr::null::<u16>(); T];
        for i in 0..T {
            x[i] = self.x.row::<u16>(t + i).wrapping_add(self.col);
        }
        let (w, columns) = (self.w, self.columns);
        let sums = self.total.wrapping_add((t - self.tokens.start) * R * S::LANES);
        let mut total = [[s.zero(); T]; R];
        if !self.first {
            for r in 0..R {
                for t in 0..T {
                    // SAFETY: `total` has `R` vectors per token.
                    total[r][t] = unsafe { s.load(sums.add((r * T + t) * S::LANES)) };
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
        // SAFETY: `total` has `R` vectors per token, and the outputs can be written.
        unsafe {
            if self.last {
                finish::<S, R, T>(s, &total, self.y.add((t - self.tokens.start) * self.ldy), self.ldy);
            } else {
                for r in 0..R {
                    for t in 0..T {
                        s.store(sums.add((r * T + t) * S::LANES), total[r][t]);
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
pub(super) unsafe fn finish<S: Pairs, const R: usize, const T: usize>(
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

/// All rows of a product with `T` tokens, one after the other, widened in registers: what is bound by memory reads it in order.
struct Stream<'a, E, const T: usize, const SCALED: bool> {
    mul: PairMul<'a>,
    codes: PhantomData<E>,
}

impl<E: Codes, const T: usize, const SCALED: bool> PairKernel for Stream<'_, E, T, SCALED> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let Self { mul, .. } = self;
        let columns = mul.columns(&(0..mul.w.data.cols));
        let mut x = [std::ptr::null::<u16>(); T];
        let cols = mul.w.data.cols;
        let ld = far_row(cols);
        assert!(T * ld <= 2 * mul.tile.len(), "no room to move inputs apart");
        let room = mul.tile.as_mut_ptr().cast::<u16>();
        for t in 0..T {
            x[t] = mul.x.row::<u16>(t);
            let from_first = x[t].addr().abs_diff(x[0].addr());
            if t > 0 && from_first.is_multiple_of(SET_STRIDE) {
                let apart = room.wrapping_add(t * ld);
                // SAFETY: the input has the columns, and the room, the task's own, a row for each.
                unsafe { std::ptr::copy_nonoverlapping(x[t], apart, cols) };
                x[t] = apart;
            }
        }
        let table = s.table(&E::TABLE);
        let mut scales = std::ptr::null();
        // Rows of one block share their scales.
        let mut block_end = mul.rows.start;
        let mut n = mul.rows.start;
        while n < mul.rows.end {
            let count = (mul.rows.end - n).min(4);
            let mut totals = [[s.zero(); T]; 4];
            for r in 0..count {
                if SCALED && n + r >= block_end {
                    let of = mul.w.scales.expect("scaled weights have scales");
                    scales = of.row_from(n + r, 0);
                    block_end = of.block_end(0, n + r);
                }
                let w = mul.w.data.row(n + r).cast::<E>();
                // SAFETY: the row and the tokens have the columns, and blocks their scales.
                totals[r] = unsafe { row::<S, E, T, SCALED>(s, table, w, x, scales, columns) };
            }
            write_rows(s, &totals, count, &mut mul.y[n - mul.rows.start..], mul.ldy);
            n += count;
        }
    }
}

/// `y[t * ldy + r]`: the sums of the lanes of `totals[r][t]`, of the first `count` of four rows.
#[inline(always)]
pub(super) fn write_rows<S: Pairs, const T: usize>(
    s: S,
    totals: &[[S::V; T]; 4],
    count: usize,
    y: &mut [f32],
    ldy: usize,
) {
    for t in 0..T {
        let y = &mut y[t * ldy..][..count];
        if let Ok(y) = <&mut [f32; 4]>::try_from(&mut *y) {
            *y = s.sum4([totals[0][t], totals[1][t], totals[2][t], totals[3][t]]);
        } else {
            for r in 0..count {
                y[r] = s.sum(totals[r][t]);
            }
        }
    }
}

/// A weight row with `T` tokens, by lanes.
///
/// # Safety
/// `columns.len` codes can be read at `w` and as many numbers at every `x`, and a scale per block at `scales` if `SCALED`.
#[inline(always)]
unsafe fn row<S: Pairs, E: Codes, const T: usize, const SCALED: bool>(
    s: S,
    table: S::Table,
    w: *const E,
    x: [*const u16; T],
    scales: *const f32,
    columns: Columns,
) -> [S::V; T] {
    let step = E::STEP_VECTORS * S::PAIR_LANES;
    // A product takes longer than fetching what it multiplies, so that a few tokens take two blocks at a time.
    let twos = SCALED && T <= 4 && columns.block.is_multiple_of(step);
    let mut total = [s.zero(); T];
    let (mut i, mut end, mut block) = (0, columns.first, 0);
    // SAFETY: the caller's contract throughout: `i + step <= end <= len`; the ragged end reads what is left of the block.
    unsafe {
        while i < columns.len {
            if twos && end - i == columns.block && end + columns.block <= columns.len {
                let mut acc = [[s.zero(); T]; 2];
                while i < end {
                    for h in 0..2 {
                        let i = i + h * columns.block;
                        let wv = E::load(s, table, w.add(i));
                        for j in 0..E::STEP_VECTORS {
                            for t in 0..T {
                                acc[h][t] =
                                    s.dot(acc[h][t], wv[j], s.load_pairs(x[t].add(i + j * S::PAIR_LANES)));
                            }
                        }
                    }
                    i += step;
                }
                for h in 0..2 {
                    let scale = s.splat(*scales.add(block + h));
                    for t in 0..T {
                        total[t] = s.fma(acc[h][t], scale, total[t]);
                    }
                }
                i = end + columns.block;
                block += 2;
                end = (i + columns.block).min(columns.len);
                continue;
            }
            let mut acc = if SCALED { [s.zero(); T] } else { total };
            while i + step <= end {
                if T > PLAIN_TOKENS {
                    s.prefetch(w.add(i).cast::<u8>().wrapping_add(AHEAD));
                }
                let wv = E::load(s, table, w.add(i));
                for j in 0..E::STEP_VECTORS {
                    for t in 0..T {
                        acc[t] = s.dot(acc[t], wv[j], s.load_pairs(x[t].add(i + j * S::PAIR_LANES)));
                    }
                }
                i += step;
            }
            if i < end {
                let wv = E::load_n(s, table, w.add(i), end - i);
                for j in 0..E::STEP_VECTORS {
                    let n = (end - i).min(S::PAIR_LANES);
                    if n == 0 {
                        break;
                    }
                    for t in 0..T {
                        let x = x[t].add(i);
                        let xv = if n == S::PAIR_LANES { s.load_pairs(x) } else { s.load_pairs_n(x, n) };
                        acc[t] = s.dot(acc[t], wv[j], xv);
                    }
                    i += n;
                }
            }
            if SCALED {
                let scale = s.splat(*scales.add(block));
                for t in 0..T {
                    total[t] = s.fma(acc[t], scale, total[t]);
                }
            } else {
                total = acc;
            }
            block += 1;
            end = (end + columns.block).min(columns.len);
        }
    }
    total
}
