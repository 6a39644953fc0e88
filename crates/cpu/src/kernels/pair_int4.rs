//! `y[t, n] = Σ_k x[t, k] w[n, k]` of BF16 inputs and int4 weights, in products of pairs.
//!
//! 64 bytes of a row are 128 codes of one group, and four shifts make four vectors of them: the code of column `4 i + j` of such a
//! chunk is number `i` of vector `j`. The inputs are brought into this order once ([`by_chunks`]), not the weights. A look-up takes a
//! code less its group's zero to BF16, which holds it exactly; a chunk is summed by itself, scaled, then added.

use std::ops::Range;

use half::bf16;
use r1_core::DType;

use super::XRows;
use super::pair_dot::{
    AHEAD, Block, Columns, PADDING, ROWS, SCALED_ROWS, STREAMED_TOKENS, TOKEN_BLOCK, TOKENS, write_rows,
};
use super::product::Packed;
use crate::simd::{CHUNK, MAX_LANES, PairKernel, Pairs};

/// Bytes of its codes.
const CHUNK_BYTES: usize = 64;
/// Numbers of a vector of pairs.
const VECTOR: usize = CHUNK / 4;
/// Chunks per pass: eight rows of numbers are half of a 32 KiB L1.
const SPAN: usize = 8;

/// Columns of an input in the order of chunks, the last one filled up with zeros.
pub(crate) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(CHUNK)
}

/// Brings a row into the order of chunks.
pub(crate) fn by_chunks(row: &[u16], out: &mut [u16]) {
    assert_eq!(out.len(), padded(row.len()), "room for whole chunks");
    for (row, out) in row.chunks(CHUNK).zip(out.chunks_exact_mut(CHUNK)) {
        if row.len() < CHUNK {
            out.fill(0);
        }
        for (i, four) in row.chunks(4).enumerate() {
            for (j, &x) in four.iter().enumerate() {
                out[j * VECTOR + i] = x;
            }
        }
    }
}

/// Floats of scratch for `rows` weight rows and any number of tokens.
pub(super) fn scratch_floats(w: &Packed<'_>, rows: usize, tokens: usize) -> usize {
    let chunks = w.cols().div_ceil(CHUNK);
    if tokens <= STREAMED_TOKENS {
        return 2 * rows * chunks;
    }
    let partial = if chunks > SPAN { rows * (tokens.min(TOKEN_BLOCK) + TOKENS) * MAX_LANES } else { 0 };
    near_floats(chunks) + partial
}

/// Floats of the rows that were brought into L1, and of their scales.
fn near_floats(chunks: usize) -> usize {
    ROWS * (near_row(chunks) / 2 + SPAN)
}

/// Numbers between such rows.
fn near_row(chunks: usize) -> usize {
    chunks.min(SPAN) * CHUNK + PADDING
}

/// `y[t * ldy + n - rows.start] = x[t] · w[n]` for the weight rows `rows`; inputs in the order of chunks.
pub(super) struct Int4Mul<'a> {
    pub(super) w: Packed<'a>,
    pub(super) rows: Range<usize>,
    pub(super) x: XRows<'a>,
    pub(super) y: &'a mut [f32],
    pub(super) ldy: usize,
    /// Scratch of [`scratch_floats`].
    pub(super) tile: &'a mut [f32],
}

impl PairKernel for Int4Mul<'_> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let (tokens, rows) = (self.x.len(), self.rows.len());
        if tokens == 0 || rows == 0 {
            return;
        }
        assert!(self.w.has_chunks() && self.rows.end <= self.w.rows(), "product of unlike shapes");
        self.x.check(DType::BF16, padded(self.w.cols()));
        assert!((tokens - 1) * self.ldy + rows <= self.y.len(), "outputs past their slice");
        assert!(scratch_floats(&self.w, rows, tokens) <= self.tile.len(), "scratch too small");
        if self.w.cols() == 0 {
            for t in 0..tokens {
                self.y[t * self.ldy..][..rows].fill(0.0);
            }
            return;
        }
        if tokens > STREAMED_TOKENS {
            return self.blocked(s);
        }
        macro_rules! stream {
            ($($tokens:literal)*) => {
                match tokens {
                    $($tokens => s.call_pairs(Stream::<$tokens>(self)),)*
                    tokens => unreachable!("{tokens} tokens do not stream"),
                }
            };
        }
        stream!(1 2 3 4 5 6 7 8);
    }
}

impl Int4Mul<'_> {
    #[inline(always)]
    fn blocked<S: Pairs>(mut self, s: S) {
        let chunks = self.w.cols().div_ceil(CHUNK);
        let tile = std::mem::take(&mut self.tile);
        let (near, totals) = tile.split_at_mut(near_floats(chunks));
        let tokens = self.x.len();
        let mut t0 = 0;
        while t0 < tokens {
            let block = t0..(t0 + TOKEN_BLOCK).min(tokens);
            let mut c0 = 0;
            while c0 < chunks {
                let span = c0..(c0 + SPAN).min(chunks);
                let mut n = self.rows.start;
                while n + SCALED_ROWS <= self.rows.end {
                    self.block::<S, SCALED_ROWS>(s, n, &block, &span, near, totals);
                    n += SCALED_ROWS;
                }
                while n < self.rows.end {
                    self.block::<S, 1>(s, n, &block, &span, near, totals);
                    n += 1;
                }
                c0 = span.end;
            }
            t0 = block.end;
        }
    }

    #[inline(always)]
    fn block<S: Pairs, const R: usize>(
        &mut self,
        s: S,
        n: usize,
        tokens: &Range<usize>,
        span: &Range<usize>,
        near: &mut [f32],
        totals: &mut [f32],
    ) {
        let chunks = self.w.cols().div_ceil(CHUNK);
        let ld = near_row(chunks);
        let (numbers, scales) = near.split_at_mut(ROWS * ld / 2);
        let numbers = numbers.as_mut_ptr().cast::<u16>();
        assert!(R * SPAN <= scales.len(), "scales past their room");
        let scales = scales.as_mut_ptr();
        let mut w = [std::ptr::null::<u16>(); R];
        let mut row_scales = [std::ptr::null::<f32>(); R];
        for r in 0..R {
            let (dst, of_row) = (numbers.wrapping_add(r * ld), scales.wrapping_add(r * SPAN));
            (w[r], row_scales[r]) = (dst, of_row);
            // SAFETY: checked above, and each row has a part of its own.
            let scales = unsafe { std::slice::from_raw_parts_mut(of_row, SPAN) };
            s.call_pairs(Widen { w: self.w, n: n + r, span: span.clone(), dst, scales });
        }
        let next = self.w.codes.row(n).wrapping_add(R * self.w.codes.stride * size_of::<u32>());
        let next_len = if tokens.start == 0 { R * self.w.codes.stride * size_of::<u32>() } else { 0 };
        let (first, last) = (span.start == 0, span.end == chunks);
        let room = tokens.len().next_multiple_of(TOKENS) * S::LANES;
        let total = if first && last {
            std::ptr::null_mut()
        } else {
            totals[(n - self.rows.start) * room..][..R * room].as_mut_ptr()
        };
        let out = tokens.start * self.ldy + n - self.rows.start;
        assert!(out + (tokens.len() - 1) * self.ldy + R <= self.y.len(), "outputs past their slice");
        s.call_pairs(Block::<R, true> {
            w,
            x: self.x,
            tokens: tokens.clone(),
            col: span.start * CHUNK,
            scales: row_scales,
            columns: Columns { len: span.len() * CHUNK, first: CHUNK, block: CHUNK },
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

/// The numbers of chunk `c` of a row of `bytes` bytes, whose group has this zero. Past the row's end they are not zero, but the
/// inputs are.
///
/// # Safety
/// `bytes` can be read at `codes`, and the chunk begins before them all are over.
#[inline(always)]
unsafe fn chunk<S: Pairs>(s: S, codes: *const u8, bytes: usize, c: usize, zero: u32) -> [S::P; 4] {
    let left = bytes - c * CHUNK_BYTES;
    // SAFETY: the caller's contract; `left` bytes of the row are left.
    unsafe { s.load_int4_pairs(codes.add(c * CHUNK_BYTES), left.min(CHUNK_BYTES), zero) }
}

/// Zeros and scales of the chunks `span` of the rows `rows`, row by row.
#[inline(always)]
fn groups<S: Pairs>(
    s: S,
    w: &Packed<'_>,
    rows: Range<usize>,
    span: &Range<usize>,
    zeros: &mut [u32],
    scales: &mut [f32],
) {
    let len = span.len();
    assert!(zeros.len() == rows.len() * len && scales.len() == zeros.len(), "a zero and a scale per chunk");
    let per_group = w.group / CHUNK;
    let all = w.zeros.cols * per_group;
    assert!(span.end <= all && w.scales.cols == w.zeros.cols, "chunks past the groups");
    if per_group == 1 && len == all && w.zeros.is_contiguous() && w.scales.is_contiguous() {
        assert!(rows.end <= w.zeros.rows.min(w.scales.rows), "rows past the groups");
        // SAFETY: the rows follow each other without a gap.
        unsafe { run_of_groups(s, w.zeros.row(rows.start), w.scales.row(rows.start), zeros, scales) };
        return;
    }
    for (i, n) in rows.enumerate() {
        let (row_zeros, row_scales) = (w.zeros.f16_row(n), w.scales.f16_row(n));
        let mut at = 0;
        while at < len {
            // One group at a time where it has several chunks.
            let group = (span.start + at) / per_group;
            let n = if per_group == 1 { len - at } else { 1 };
            let (row_zeros, row_scales) = (&row_zeros[group..group + n], &row_scales[group..group + n]);
            let out = i * len + at..i * len + at + n;
            let (zeros, scales) = (&mut zeros[out.clone()], &mut scales[out]);
            // SAFETY: both rows have `n` groups from here on.
            unsafe { run_of_groups(s, row_zeros.as_ptr().cast(), row_scales.as_ptr().cast(), zeros, scales) };
            at += n;
        }
    }
}

/// As many zeros and scales as there is room for.
///
/// # Safety
/// So many F16 numbers can be read at both pointers; `scales` is as long as `zeros`.
#[inline(always)]
unsafe fn run_of_groups<S: Pairs>(
    s: S,
    row_zeros: *const u8,
    row_scales: *const u8,
    zeros: &mut [u32],
    scales: &mut [f32],
) {
    let (row_zeros, row_scales) = (row_zeros.cast::<u16>(), row_scales.cast::<u16>());
    let mut i = 0;
    while i < zeros.len() {
        let n = (zeros.len() - i).min(S::LANES);
        // SAFETY: the caller's contract, for the `n` that are left.
        unsafe {
            s.int4_zeros(row_zeros.add(i), n, zeros.as_mut_ptr().add(i));
            let v = s.load_f16_n(row_scales.add(i), n);
            if n == S::LANES {
                s.store(scales.as_mut_ptr().add(i), v);
            } else {
                s.store_n(scales.as_mut_ptr().add(i), n, v);
            }
        }
        i += n;
    }
}

struct Widen<'a> {
    w: Packed<'a>,
    n: usize,
    span: Range<usize>,
    /// Room for the span's numbers.
    dst: *mut u16,
    /// `[SPAN]`.
    scales: &'a mut [f32],
}

impl PairKernel for Widen<'_> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let codes = self.w.codes.u32_row(self.n);
        let len = self.span.len();
        let mut zeros = [0; SPAN];
        groups(s, &self.w, self.n..self.n + 1, &self.span, &mut zeros[..len], &mut self.scales[..len]);
        for (i, c) in self.span.enumerate() {
            // SAFETY: the row's bytes, of which every chunk has some.
            let v = unsafe { chunk(s, codes.as_ptr().cast(), size_of_val(codes), c, zeros[i]) };
            for j in 0..4 {
                // SAFETY: whoever makes one promises room for the span.
                unsafe { s.store_pairs(self.dst.add(i * CHUNK + j * VECTOR), v[j]) };
            }
        }
    }
}

/// All rows with `T` tokens, one after the other.
struct Stream<'a, const T: usize>(Int4Mul<'a>);

impl<const T: usize> PairKernel for Stream<'_, T> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let mul = self.0;
        let (chunks, rows) = (mul.w.cols().div_ceil(CHUNK), mul.rows.len());
        let mut x = [std::ptr::null::<u16>(); T];
        for t in 0..T {
            x[t] = mul.x.row::<u16>(t);
        }
        let (zeros, scales) = mul.tile[..2 * rows * chunks].split_at_mut(rows * chunks);
        // SAFETY: both are 32 bits, and every bit pattern is a value of either.
        let zeros = unsafe { std::slice::from_raw_parts_mut(zeros.as_mut_ptr().cast::<u32>(), zeros.len()) };
        groups(s, &mul.w, mul.rows.clone(), &(0..chunks), zeros, scales);
        let mut r = 0;
        while r < rows {
            let count = (rows - r).min(4);
            let mut totals = [[s.zero(); T]; 4];
            for i in 0..count {
                let codes = mul.w.codes.u32_row(mul.rows.start + r + i);
                let first = (r + i) * chunks;
                let (zeros, scales) = (&zeros[first..first + chunks], &scales[first..first + chunks]);
                // SAFETY: the row's bytes, and every input has the chunks.
                totals[i] =
                    unsafe { sum_row(s, codes.as_ptr().cast(), size_of_val(codes), zeros, scales, x) };
            }
            write_rows(s, &totals, count, &mut mul.y[r..], mul.ldy);
            r += count;
        }
    }
}

/// A weight row with `T` tokens, by lanes.
///
/// # Safety
/// `bytes` can be read at `codes`: what belongs to as many chunks as there are zeros and scales, the last of which may be cut. Every
/// `x` has all of the chunks.
#[inline(always)]
unsafe fn sum_row<S: Pairs, const T: usize>(
    s: S,
    codes: *const u8,
    bytes: usize,
    zeros: &[u32],
    scales: &[f32],
    x: [*const u16; T],
) -> [S::V; T] {
    let (chunks, zeros, scales) = (zeros.len(), zeros.as_ptr(), scales.as_ptr());
    let whole = bytes / CHUNK_BYTES;
    let mut total = [s.zero(); T];
    let mut c = 0;
    // SAFETY: the caller's contract throughout.
    unsafe {
        // A product takes longer than fetching what it multiplies, so that a few tokens take two chunks at a time.
        while T <= 4 && c + 2 <= whole {
            let mut acc = [[s.zero(); T]; 2];
            for h in 0..2 {
                s.prefetch(codes.wrapping_add((c + h) * CHUNK_BYTES + AHEAD));
            }
            let v = [
                s.load_int4_pairs(codes.add(c * CHUNK_BYTES), CHUNK_BYTES, *zeros.add(c)),
                s.load_int4_pairs(codes.add((c + 1) * CHUNK_BYTES), CHUNK_BYTES, *zeros.add(c + 1)),
            ];
            for j in 0..4 {
                for h in 0..2 {
                    for t in 0..T {
                        let xv = s.load_pairs(x[t].add((c + h) * CHUNK + j * VECTOR));
                        acc[h][t] = s.dot(acc[h][t], v[h][j], xv);
                    }
                }
            }
            for h in 0..2 {
                let scale = s.splat(*scales.add(c + h));
                for t in 0..T {
                    total[t] = s.fma(acc[h][t], scale, total[t]);
                }
            }
            c += 2;
        }
        while c < chunks {
            let mut acc = [s.zero(); T];
            s.prefetch(codes.wrapping_add(c * CHUNK_BYTES + AHEAD));
            let v = chunk(s, codes, bytes, c, *zeros.add(c));
            for j in 0..4 {
                for t in 0..T {
                    let xv = s.load_pairs(x[t].add(c * CHUNK + j * VECTOR));
                    acc[t] = s.dot(acc[t], v[j], xv);
                }
            }
            let scale = s.splat(*scales.add(c));
            for t in 0..T {
                total[t] = s.fma(acc[t], scale, total[t]);
            }
            c += 1;
        }
    }
    total
}

/// BF16 numbers from -16 to 15: what a code less a zero may be.
pub(crate) const DIFFERENCES: [u16; 32] = {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        table[i] = bf16::from_f32_const(i as f32 - 16.0).to_bits();
        i += 1;
    }
    table
};
