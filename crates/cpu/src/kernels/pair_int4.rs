//! `y[t, n] = Σ_k x[t, k] w[n, k]` of BF16 inputs and int4 weights, in products of pairs.
//!
//! 64 bytes of a row are 128 codes of one group, and four shifts make four vectors of them: the code of column `4 i + j` of such a
//! chunk is number `i` of vector `j`. The inputs are brought into this order once ([`by_chunks`]), not the weights. A look-up takes a
//! code less its group's zero to BF16, which holds it exactly; a chunk is summed by itself, scaled, then added.

use std::ops::Range;

use half::{bf16, f16};
use r1_core::DType;

use super::XRows;
use super::pair_dot::{
    Block, Columns, PADDING, ROWS, SCALED_ROWS, STREAMED_TOKENS, TOKEN_BLOCK, TOKENS, finish,
};
use super::product::Packed;
use crate::simd::{MAX_LANES, PairKernel, Pairs};

/// Columns of a chunk.
pub(crate) const CHUNK: usize = 128;
/// Bytes of its codes.
const CHUNK_BYTES: usize = 64;
/// Numbers of a vector of pairs.
const VECTOR: usize = CHUNK / 4;
/// Chunks per pass: eight rows of numbers are half of a 32 KiB L1.
const SPAN: usize = 8;
/// Groups whose scales are read together.
const GROUPS: usize = 16;

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
    if tokens <= STREAMED_TOKENS {
        return 0;
    }
    let chunks = w.cols().div_ceil(CHUNK);
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
        assert!(self.w.has_pairs() && self.rows.end <= self.w.rows(), "product of unlike shapes");
        self.x.check(DType::BF16, padded(self.w.cols()));
        assert!((tokens - 1) * self.ldy + rows <= self.y.len(), "outputs past their slice");
        assert!(scratch_floats(&self.w, rows, tokens) <= self.tile.len(), "scratch too small");
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
        let mut w = [std::ptr::null::<u16>(); R];
        let mut row_scales = [std::ptr::null::<f32>(); R];
        for r in 0..R {
            let (dst, scales) = (numbers.wrapping_add(r * ld), &mut scales[r * SPAN..][..SPAN]);
            (w[r], row_scales[r]) = (dst, scales.as_ptr());
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

/// The chunks of one row, four vectors at a time.
struct Row<'a> {
    w: Packed<'a>,
    codes: &'a [u32],
    zeros: &'a [f16],
    scales: &'a [f16],
}

impl<'a> Row<'a> {
    fn new(w: Packed<'a>, n: usize) -> Self {
        Self { w, codes: w.codes.u32_row(n), zeros: w.zeros.f16_row(n), scales: w.scales.f16_row(n) }
    }

    /// The numbers of chunk `c`, whose group has this zero. Past the row's end they are not zero, but the inputs are.
    #[inline(always)]
    fn chunk<S: Pairs>(&self, s: S, c: usize, zero: f32) -> [S::P; 4] {
        let start = c * CHUNK_BYTES;
        let len = (self.codes.len() * size_of::<u32>() - start).min(CHUNK_BYTES);
        // SAFETY: `len` bytes of the row are left; a zero is a whole number from 0 to 16.
        unsafe { s.load_int4_pairs(self.codes.as_ptr().cast::<u8>().add(start), len, zero) }
    }

    /// Zeros and scales of the chunks `c..c + GROUPS`, as far as there are.
    #[inline(always)]
    fn groups<S: Pairs>(&self, s: S, c: usize, zeros: &mut [f32; GROUPS], scales: &mut [f32; GROUPS]) {
        let per_group = self.w.group / CHUNK;
        if per_group == 1 && S::LANES == GROUPS {
            let n = (self.zeros.len() - c).min(GROUPS);
            // SAFETY: `n` numbers are left of both rows, and both arrays have a vector.
            unsafe {
                s.store(zeros.as_mut_ptr(), s.load_f16_n(self.zeros.as_ptr().add(c).cast(), n));
                s.store(scales.as_mut_ptr(), s.load_f16_n(self.scales.as_ptr().add(c).cast(), n));
            }
            return;
        }
        for i in 0..GROUPS {
            let group = (c + i) / per_group;
            if group < self.zeros.len() {
                (zeros[i], scales[i]) = (self.zeros[group].to_f32(), self.scales[group].to_f32());
            }
        }
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
        let row = Row::new(self.w, self.n);
        let (mut zeros, mut scales) = ([0.0; GROUPS], [0.0; GROUPS]);
        row.groups(s, self.span.start, &mut zeros, &mut scales);
        for (i, c) in self.span.enumerate() {
            self.scales[i] = scales[i];
            let v = row.chunk(s, c, zeros[i]);
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
        let chunks = mul.w.cols().div_ceil(CHUNK);
        let mut x = [std::ptr::null::<u16>(); T];
        for t in 0..T {
            x[t] = mul.x.row::<u16>(t);
        }
        for n in mul.rows.clone() {
            let row = Row::new(mul.w, n);
            let mut total = [[s.zero(); T]; 1];
            let (mut zeros, mut scales) = ([0.0; GROUPS], [0.0; GROUPS]);
            for c in 0..chunks {
                if c.is_multiple_of(GROUPS) {
                    row.groups(s, c, &mut zeros, &mut scales);
                }
                let v = row.chunk(s, c, zeros[c % GROUPS]);
                let mut acc = [s.zero(); T];
                for j in 0..4 {
                    for t in 0..T {
                        // SAFETY: every input has whole chunks, as many as the weight.
                        let xv = unsafe { s.load_pairs(x[t].add(c * CHUNK + j * VECTOR)) };
                        acc[t] = s.dot(acc[t], v[j], xv);
                    }
                }
                let scale = s.splat(scales[c % GROUPS]);
                for t in 0..T {
                    total[0][t] = s.fma(acc[t], scale, total[0][t]);
                }
            }
            let y = mul.y[n - mul.rows.start..].as_mut_ptr();
            // SAFETY: the outputs were checked.
            unsafe { finish::<S, 1, T>(s, &total, y, mul.ldy) };
        }
    }
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
