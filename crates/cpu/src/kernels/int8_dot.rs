//! `y[t, n] = Σ_k x[t, k] w[n, k]` of int8 or int4 weights whose inputs were quantized to int8 too.
//!
//! Inputs have a scale per [`CHUNK`] columns, and so have the weights, whose groups are whole chunks. With w = s (c - z), where the
//! code c is a byte without a sign, and x = r q, a chunk is s r (Σ c q - z Σ q): both sums are whole numbers and exact, the second is
//! the input's own and taken once. int8 codes are without a sign once 128 is added, which is their zero then.
//!
//! An output is the sum of `LANES` partial sums in the order of chunks, so its bits depend on neither the number of tokens nor the
//! rows that a task was given. Few tokens: rows go through registers in the order of memory. Many: spans of rows are kept in L1.

use std::ops::Range;

use half::f16;
use r1_core::DType;

use super::pair_dot::{AHEAD, STREAMED_TOKENS, TOKEN_BLOCK, TOKENS, finish, write_rows};
use super::product::{AnyRows, Packed};
use super::{Scales, WeightRows, XRows};
use crate::simd::{CHUNK, Kernel, MAX_LANES, PairKernel, Pairs, Simd};
use crate::view::{Mat, MatMut};

const _: () = assert!(CHUNK == r1_backend::INT8_BLOCK);

/// Bytes of a vector.
const VECTOR: usize = 64;
/// Weight rows of a register tile.
const ROWS: usize = 4;
/// Chunks per pass, a vector of scales: four rows of codes are a quarter of a 32 KiB L1.
const SPAN: usize = MAX_LANES;
/// Bytes between rows in L1 beyond a span: rows a power of two apart would fall into the same few sets of the cache.
const PADDING: usize = 64;

/// Where the parts of a quantized input lie in its row of bytes: codes of whole chunks, a scale per chunk, then per chunk the sum of
/// its codes times the scale, negative. Both are filled up with zeros to whole vectors.
#[derive(Clone, Copy)]
struct Layout {
    chunks: usize,
}

impl Layout {
    fn of(cols: usize) -> Self {
        Self { chunks: cols.div_ceil(CHUNK) }
    }

    fn scales(self) -> usize {
        self.chunks * CHUNK
    }

    fn sums(self) -> usize {
        self.scales() + self.chunks.next_multiple_of(SPAN) * size_of::<f32>()
    }

    fn bytes(self) -> usize {
        self.sums() + self.chunks.next_multiple_of(SPAN) * size_of::<f32>()
    }
}

/// Bytes of a quantized input of so many columns.
pub(crate) fn quantized_bytes(cols: usize) -> usize {
    Layout::of(cols).bytes()
}

/// In which order a chunk has its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ColumnOrder {
    /// Their own: int8 weights.
    AsStored,
    /// The even ones, then the odd ones: int4 weights, whose bytes hold one of each.
    EvenThenOdd,
}

/// Quantizes rows.
pub(crate) struct Quantize<'a> {
    /// F32 or BF16.
    pub(crate) x: Mat<'a>,
    pub(crate) rows: Range<usize>,
    pub(crate) order: ColumnOrder,
    /// `[_, quantized_bytes]` I8. No other task writes these rows.
    pub(crate) out: MatMut<'a>,
    /// A row's columns, whole chunks of them.
    pub(crate) wide: &'a mut [f32],
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.pairs(self);
    }
}

impl PairKernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let layout = Layout::of(self.x.cols);
        assert_eq!(self.wide.len(), layout.chunks * CHUNK, "room for whole chunks");
        self.wide[self.x.cols..].fill(0.0);
        for row in self.rows {
            self.x.read(s, row, 0, &mut self.wide[..self.x.cols]);
            // SAFETY: every row belongs to one task.
            let out: &mut [u8] = unsafe { self.out.row_mut(row) };
            let (codes, floats) = out.split_at_mut(layout.scales());
            let floats: &mut [[u8; 4]] = floats.as_chunks_mut().0;
            let (scales, sums) = floats.split_at_mut(floats.len() / 2);
            for c in 0..layout.chunks {
                let (wide, codes) = (&self.wide[c * CHUNK..][..CHUNK], &mut codes[c * CHUNK..][..CHUNK]);
                // SAFETY: both slices are a chunk.
                unsafe {
                    let found = s.quantize_chunk(wide.as_ptr());
                    let vectors = match self.order {
                        ColumnOrder::AsStored => found.codes,
                        ColumnOrder::EvenThenOdd => s.even_and_odd(found.codes),
                    };
                    s.store_bytes(codes.as_mut_ptr(), vectors[0]);
                    s.store_bytes(codes.as_mut_ptr().add(VECTOR), vectors[1]);
                    scales[c] = found.scale.to_ne_bytes();
                    sums[c] = (-(found.sum as f32) * found.scale).to_ne_bytes();
                }
            }
            scales[layout.chunks..].fill([0; 4]);
            sums[layout.chunks..].fill([0; 4]);
        }
    }
}

/// Weights in codes.
trait Rows: Copy {
    /// Bytes of a chunk's codes.
    const CHUNK_BYTES: usize;
    /// Up to so many tokens a row's products take less time than fetching it, and the hardware sees far enough ahead.
    const PLAIN_TOKENS: usize;

    /// Codes of all rows.
    fn codes(&self) -> Mat<'_>;

    /// Two vectors of a chunk's codes without a sign, in the order of the inputs. Past `left` bytes they may be anything.
    /// # Safety
    /// `left` bytes, or a whole chunk's if that is less, can be read at `p`.
    unsafe fn load<S: Pairs>(s: S, p: *const u8, left: usize) -> [S::B; 2];

    /// Scales of `len` chunks of row `n` from chunk `first` on, at most a vector, and the scales times the zeros; zeros elsewhere.
    /// # Safety
    /// The row has the chunks.
    unsafe fn scales<S: Pairs>(&self, s: S, n: usize, first: usize, len: usize) -> [S::V; 2];
}

/// What each of `len` chunks' groups has, where a group is several of them.
#[inline(always)]
unsafe fn of_groups<S: Pairs, T: Copy>(
    s: S,
    row: *const T,
    chunks_per_group: usize,
    first: usize,
    len: usize,
    to_f32: impl Fn(T) -> f32,
) -> S::V {
    let mut values = [0.0; MAX_LANES];
    for (i, value) in values[..len].iter_mut().enumerate() {
        // SAFETY: the caller's row has the chunk's group.
        *value = to_f32(unsafe { *row.add((first + i) / chunks_per_group) });
    }
    // SAFETY: there are as many as the widest vector has.
    unsafe { s.load(values.as_ptr()) }
}

#[derive(Clone, Copy)]
struct Int8<'a> {
    codes: Mat<'a>,
    scales: *const f32,
    /// Floats between the scales of rows.
    stride: usize,
    chunks_per_group: usize,
}

impl<'a> Int8<'a> {
    /// # Panics
    /// When it has not a scale for every group.
    fn new(w: &WeightRows<'a>) -> Self {
        let Scales { values, block, offset } = w.scales.expect("int8 weights have scales");
        let suits = block[0] == 1 && block[1].is_multiple_of(CHUNK) && offset == [0, 0];
        assert!(w.data.dtype == DType::I8 && suits, "int8 products of groups of {block:?} from {offset:?}");
        w.check();
        let (scales, stride) = (values.row(0).cast(), values.stride);
        Self { codes: w.data, scales, stride, chunks_per_group: block[1] / CHUNK }
    }
}

impl Rows for Int8<'_> {
    const CHUNK_BYTES: usize = CHUNK;
    const PLAIN_TOKENS: usize = 4;

    fn codes(&self) -> Mat<'_> {
        self.codes
    }

    #[inline(always)]
    unsafe fn load<S: Pairs>(s: S, p: *const u8, left: usize) -> [S::B; 2] {
        // SAFETY: the caller's contract.
        let codes = unsafe {
            if left >= CHUNK {
                [s.load_bytes(p), s.load_bytes(p.add(VECTOR))]
            } else {
                let second = p.wrapping_add(VECTOR);
                [s.load_bytes_n(p, left.min(VECTOR)), s.load_bytes_n(second, left.saturating_sub(VECTOR))]
            }
        };
        [s.biased(codes[0]), s.biased(codes[1])]
    }

    #[inline(always)]
    unsafe fn scales<S: Pairs>(&self, s: S, n: usize, first: usize, len: usize) -> [S::V; 2] {
        // SAFETY: the caller's contract: a scale per group was checked.
        let scales = unsafe {
            let row = self.scales.add(n.wrapping_mul(self.stride));
            match self.chunks_per_group {
                1 if len == S::LANES => s.load(row.add(first)),
                1 => s.load_n(row.add(first), len, 0.0),
                chunks => of_groups(s, row, chunks, first, len, |scale| scale),
            }
        };
        [scales, s.mul(scales, s.splat(128.0))]
    }
}

#[derive(Clone, Copy)]
struct Int4<'a> {
    codes: Mat<'a>,
    /// Scales and zeros, and numbers between those of rows.
    groups: [(*const u16, usize); 2],
    chunks_per_group: usize,
}

impl<'a> Int4<'a> {
    /// # Panics
    /// When it has not a scale and a zero for every group, or groups that are no whole chunks.
    fn new(w: &Packed<'a>) -> Self {
        assert!(w.has_chunks(), "int8 products of int4 groups of {}", w.group);
        let groups = [w.scales, w.zeros].map(|mat| {
            let (rows, groups) = (w.rows(), w.cols().div_ceil(w.group));
            assert!(
                mat.dtype == DType::F16 && mat.rows >= rows && mat.cols >= groups,
                "groups without a scale"
            );
            (mat.row(0).cast(), mat.stride)
        });
        Self { codes: w.codes, groups, chunks_per_group: w.group / CHUNK }
    }
}

impl Rows for Int4<'_> {
    const CHUNK_BYTES: usize = CHUNK / 2;
    const PLAIN_TOKENS: usize = 0;

    fn codes(&self) -> Mat<'_> {
        self.codes
    }

    #[inline(always)]
    unsafe fn load<S: Pairs>(s: S, p: *const u8, left: usize) -> [S::B; 2] {
        // SAFETY: the caller's contract.
        let codes = unsafe { if left >= VECTOR { s.load_bytes(p) } else { s.load_bytes_n(p, left) } };
        s.nibbles(codes)
    }

    #[inline(always)]
    unsafe fn scales<S: Pairs>(&self, s: S, n: usize, first: usize, len: usize) -> [S::V; 2] {
        let mut of = [s.zero(); 2];
        for i in 0..2 {
            let (values, stride) = self.groups[i];
            // SAFETY: the caller's contract: a value per group was checked.
            of[i] = unsafe {
                let row = values.add(n.wrapping_mul(stride));
                match self.chunks_per_group {
                    1 => s.load_f16_n(row.add(first), len),
                    chunks => of_groups(s, row, chunks, first, len, |bits| f16::from_bits(bits).to_f32()),
                }
            };
        }
        [of[0], s.mul(of[0], of[1])]
    }
}

/// Floats of scratch for `rows` weight rows and any number of tokens.
pub(super) fn scratch_floats(cols: usize, rows: usize, tokens: usize) -> usize {
    if tokens <= STREAMED_TOKENS {
        return 0;
    }
    let chunks = cols.div_ceil(CHUNK);
    let partial = if chunks > SPAN { rows * (tokens.min(TOKEN_BLOCK) + TOKENS) * MAX_LANES } else { 0 };
    ROWS * near_row(chunks) / size_of::<f32>() + partial
}

/// Bytes between rows that were brought into L1.
fn near_row(chunks: usize) -> usize {
    chunks.min(SPAN) * CHUNK + PADDING
}

/// `y[t * ldy + n - rows.start] = x[t] · w[n]` for the weight rows `rows`; inputs that [`Quantize`] made.
pub(super) struct Int8Mul<'a> {
    pub(super) w: AnyRows<'a>,
    pub(super) rows: Range<usize>,
    pub(super) x: XRows<'a>,
    pub(super) y: &'a mut [f32],
    pub(super) ldy: usize,
    /// Scratch of [`scratch_floats`].
    pub(super) tile: &'a mut [f32],
}

impl PairKernel for Int8Mul<'_> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let (tokens, rows, cols) = (self.x.len(), self.rows.len(), self.w.cols());
        if tokens == 0 || rows == 0 {
            return;
        }
        assert!(self.rows.end <= self.w.rows(), "product of unlike shapes");
        self.x.check(DType::I8, quantized_bytes(cols));
        assert!((tokens - 1) * self.ldy + rows <= self.y.len(), "outputs past their slice");
        assert!(scratch_floats(cols, rows, tokens) <= self.tile.len(), "scratch too small");
        let Self { w, rows, x, y, ldy, tile } = self;
        if cols == 0 {
            for t in 0..x.len() {
                y[t * ldy..][..rows.len()].fill(0.0);
            }
            return;
        }
        match w {
            AnyRows::Plain(w) => Mul { w: Int8::new(&w), cols, rows, x, y, ldy, tile }.run(s),
            AnyRows::Int4(w) => Mul { w: Int4::new(&w), cols, rows, x, y, ldy, tile }.run(s),
        }
    }
}

/// [`Int8Mul`] of one format; sizes were checked.
struct Mul<'a, W> {
    w: W,
    cols: usize,
    rows: Range<usize>,
    x: XRows<'a>,
    y: &'a mut [f32],
    ldy: usize,
    tile: &'a mut [f32],
}

impl<W: Rows> Mul<'_, W> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        macro_rules! stream {
            ($($tokens:literal)*) => {
                match self.x.len() {
                    $($tokens => s.call_pairs(Stream::<W, $tokens>(self)),)*
                    _ => self.blocked(s),
                }
            };
        }
        stream!(1 2 3 4 5 6 7 8);
    }

    #[inline(always)]
    fn blocked<S: Pairs>(mut self, s: S) {
        let chunks = self.cols.div_ceil(CHUNK);
        let tile = std::mem::take(&mut self.tile);
        let (near, totals) = tile.split_at_mut(ROWS * near_row(chunks) / size_of::<f32>());
        let tokens = self.x.len();
        let mut t0 = 0;
        while t0 < tokens {
            let block = t0..(t0 + TOKEN_BLOCK).min(tokens);
            let mut c0 = 0;
            while c0 < chunks {
                let span = c0..(c0 + SPAN).min(chunks);
                let mut n = self.rows.start;
                while n + ROWS <= self.rows.end {
                    self.block::<S, ROWS>(s, n, &block, &span, near, totals);
                    n += ROWS;
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

    /// All tokens of a block past `R` weight rows.
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
        let layout = Layout::of(self.cols);
        let ld = near_row(layout.chunks);
        assert!(R * ld <= size_of_val(near), "rows past their room");
        let near = near.as_mut_ptr().cast::<u8>();
        let (codes, mut w) = (self.w.codes(), [std::ptr::null::<u8>(); R]);
        let row_bytes = codes.cols * codes.dtype.size_bytes();
        for r in 0..R {
            let dst = near.wrapping_add(r * ld);
            w[r] = dst;
            let (src, left) = (codes.row(n + r), row_bytes - (span.start * W::CHUNK_BYTES).min(row_bytes));
            let src = src.wrapping_add(span.start * W::CHUNK_BYTES);
            s.call_pairs(Unpack::<W> { src, left, chunks: span.len(), dst, rows: std::marker::PhantomData });
        }
        let next = codes.row(n).wrapping_add(R * codes.stride * codes.dtype.size_bytes());
        let next_len = if tokens.start == 0 { R * codes.stride * codes.dtype.size_bytes() } else { 0 };
        let (first, last) = (span.start == 0, span.end == layout.chunks);
        let room = tokens.len().next_multiple_of(TOKENS) * S::LANES;
        let total = if first && last {
            std::ptr::null_mut()
        } else {
            totals[(n - self.rows.start) * room..][..R * room].as_mut_ptr()
        };
        let out = tokens.start * self.ldy + n - self.rows.start;
        assert!(out + (tokens.len() - 1) * self.ldy + R <= self.y.len(), "outputs past their slice");
        s.call_pairs(Block::<W, R> {
            rows: &self.w,
            n,
            w,
            x: self.x,
            tokens: tokens.clone(),
            span: span.clone(),
            layout,
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

/// Brings a span's codes into L1 as bytes without a sign.
struct Unpack<W> {
    src: *const u8,
    /// Bytes of the row from there on.
    left: usize,
    chunks: usize,
    /// Room for the chunks.
    dst: *mut u8,
    rows: std::marker::PhantomData<W>,
}

impl<W: Rows> PairKernel for Unpack<W> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        for c in 0..self.chunks {
            // SAFETY: whoever makes one promises the memory; every chunk has some bytes.
            unsafe {
                let v = W::load(s, self.src.add(c * W::CHUNK_BYTES), self.left - c * W::CHUNK_BYTES);
                s.store_bytes(self.dst.add(c * CHUNK), v[0]);
                s.store_bytes(self.dst.add(c * CHUNK + VECTOR), v[1]);
            }
        }
    }
}

/// Products of scales, a vector for each of several sums.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Factors([f32; MAX_LANES]);

/// `R` weight rows with a block of tokens over a span of chunks: as `pair_dot`'s, over bytes.
///
/// Whoever makes one promises that the chunks' codes can be read at every `w`, that `R` vectors per token, tokens rounded up to whole
/// tiles, can be read and written at `total` unless the pass is first and last, and that the outputs can be written.
struct Block<'a, W, const R: usize> {
    rows: &'a W,
    /// The first of the rows.
    n: usize,
    w: [*const u8; R],
    x: XRows<'a>,
    tokens: Range<usize>,
    span: Range<usize>,
    layout: Layout,
    /// Bytes that will be wanted next.
    next: *const u8,
    next_len: usize,
    first: bool,
    last: bool,
    total: *mut f32,
    y: *mut f32,
    ldy: usize,
}

impl<W: Rows, const R: usize> PairKernel for Block<'_, W, R> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let mut scales = [[s.zero(); 2]; R];
        for r in 0..R {
            // SAFETY: whoever made this promises the rows and the chunks.
            scales[r] = unsafe { self.rows.scales(s, self.n + r, self.span.start, self.span.len()) };
        }
        let tiles = self.tokens.len().div_ceil(TOKENS);
        let ask = self.next_len.div_ceil(tiles).next_multiple_of(VECTOR);
        let mut t = self.tokens.start;
        let mut tile = 0;
        while t < self.tokens.end {
            let mut line = 0;
            while line < ask {
                s.prefetch(self.next.wrapping_add(tile * ask + line));
                line += VECTOR;
            }
            match self.tokens.end - t {
                1 => self.tile::<S, 1>(s, t, &scales),
                2 => self.tile::<S, 2>(s, t, &scales),
                _ => self.tile::<S, TOKENS>(s, t, &scales),
            }
            t += TOKENS;
            tile += 1;
        }
    }
}

impl<W: Rows, const R: usize> Block<'_, W, R> {
    #[inline(always)]
    fn tile<S: Pairs, const T: usize>(&self, s: S, t: usize, scales: &[[S::V; 2]; R]) {
        let mut x = [Input::default(); T];
        for i in 0..T {
            x[i] = Input::new(self.x.row(t + i), self.layout);
        }
        let w = self.w;
        let sums = self.total.wrapping_add((t - self.tokens.start) * R * S::LANES);
        let mut total = [[s.zero(); T]; R];
        let mut factors = [[Factors([0.0; MAX_LANES]); T]; R];
        for r in 0..R {
            for t in 0..T {
                // SAFETY: `total` has `R` vectors per token; an input has its scales and sums.
                unsafe {
                    if !self.first {
                        total[r][t] = s.load(sums.add((r * T + t) * S::LANES));
                    }
                    total[r][t] = x[t].begin(s, scales[r], self.span.start, &mut factors[r][t], total[r][t]);
                }
            }
        }
        for c in 0..self.span.len() {
            let mut acc = [[s.zero_sums(); T]; R];
            for h in 0..2 {
                // SAFETY: rows and inputs have the chunk.
                unsafe {
                    let at = (self.span.start + c) * CHUNK + h * VECTOR;
                    let mut xv = [s.load_bytes(x[0].codes.add(at)); T];
                    for t in 1..T {
                        xv[t] = s.load_bytes(x[t].codes.add(at));
                    }
                    for r in 0..R {
                        let wv = s.load_bytes(w[r].add(c * CHUNK + h * VECTOR));
                        for t in 0..T {
                            acc[r][t] = s.dot_bytes(acc[r][t], wv, xv[t]);
                        }
                    }
                }
            }
            for r in 0..R {
                for t in 0..T {
                    total[r][t] = s.fma(s.sums_to_f32(acc[r][t]), s.splat(factors[r][t].0[c]), total[r][t]);
                }
            }
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

/// A quantized input.
#[derive(Clone, Copy)]
struct Input {
    codes: *const u8,
    scales: *const f32,
    sums: *const f32,
}

impl Default for Input {
    fn default() -> Self {
        Self { codes: std::ptr::null(), scales: std::ptr::null(), sums: std::ptr::null() }
    }
}

impl Input {
    fn new(row: *const u8, layout: Layout) -> Self {
        let float = |at: usize| row.wrapping_add(at).cast();
        Self { codes: row, scales: float(layout.scales()), sums: float(layout.sums()) }
    }

    /// What a span begins with: the products of its scales to `factors`, and `total` less what its zeros take away.
    ///
    /// # Safety
    /// The input has the chunk `first`, which is a multiple of [`SPAN`].
    #[inline(always)]
    unsafe fn begin<S: Pairs>(
        &self,
        s: S,
        [scales, zeros]: [S::V; 2],
        first: usize,
        factors: &mut Factors,
        total: S::V,
    ) -> S::V {
        // SAFETY: the input has whole vectors of both.
        unsafe {
            s.store(factors.0.as_mut_ptr(), s.mul(scales, s.load(self.scales.add(first))));
            s.fma(zeros, s.load(self.sums.add(first)), total)
        }
    }
}

/// All rows with `T` tokens, one after the other.
struct Stream<'a, W, const T: usize>(Mul<'a, W>);

impl<W: Rows, const T: usize> PairKernel for Stream<'_, W, T> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        let Mul { w, cols, rows, x: inputs, y, ldy, .. } = self.0;
        let layout = Layout::of(cols);
        let mut x = [Input::default(); T];
        for t in 0..T {
            x[t] = Input::new(inputs.row(t), layout);
        }
        let codes = w.codes();
        let (row_bytes, stride) =
            (codes.cols * codes.dtype.size_bytes(), codes.stride * codes.dtype.size_bytes());
        let mut row = codes.row(rows.start);
        let mut n = rows.start;
        while n < rows.end {
            let count = (rows.end - n).min(4);
            let mut totals = [[s.zero(); T]; 4];
            for r in 0..4 {
                if r < count {
                    // SAFETY: inputs of this layout, rows of its columns.
                    totals[r] = unsafe { sum_row(s, &w, n + r, row, row_bytes, layout.chunks, &x) };
                    row = row.wrapping_add(stride);
                }
            }
            write_rows(s, &totals, count, &mut y[n - rows.start..], ldy);
            n += count;
        }
    }
}

/// Weight row `n`, which lies at `row`, with `T` tokens, by lanes.
///
/// # Safety
/// The row and every input have as many chunks; the row ends after `row_bytes`, in the last one.
#[inline(always)]
unsafe fn sum_row<S: Pairs, W: Rows, const T: usize>(
    s: S,
    w: &W,
    n: usize,
    row: *const u8,
    row_bytes: usize,
    chunks: usize,
    x: &[Input; T],
) -> [S::V; T] {
    let mut total = [s.zero(); T];
    let mut factors = [Factors([0.0; MAX_LANES]); T];
    let whole = row_bytes / W::CHUNK_BYTES;
    let (mut codes, mut at, mut first) = (row, 0_usize, 0);
    while first < chunks {
        let len = (chunks - first).min(SPAN);
        // SAFETY: the caller's contract; the last chunk alone may be cut.
        unsafe {
            let scales = w.scales(s, n, first, len);
            for t in 0..T {
                total[t] = x[t].begin(s, scales, first, &mut factors[t], total[t]);
            }
            // Places are counted up: that their products would not overflow was checked for the row's end.
            for c in 0..len.min(whole - first) {
                if T > W::PLAIN_TOKENS {
                    for line in 0..W::CHUNK_BYTES / VECTOR {
                        s.prefetch(codes.wrapping_add(line * VECTOR + AHEAD));
                    }
                }
                let wv = W::load(s, codes, W::CHUNK_BYTES);
                add_chunk(s, wv, x, at, &factors, c, &mut total);
                codes = codes.add(W::CHUNK_BYTES);
                at = at.wrapping_add(CHUNK);
            }
            if whole - first < len {
                let wv = W::load(s, codes, row_bytes % W::CHUNK_BYTES);
                add_chunk(s, wv, x, at, &factors, len - 1, &mut total);
            }
        }
        first += len;
    }
    total
}

/// Adds a chunk's products, which is number `c` of its span, from column `at` of the inputs on.
///
/// # Safety
/// Every input has the chunk.
#[inline(always)]
unsafe fn add_chunk<S: Pairs, const T: usize>(
    s: S,
    w: [S::B; 2],
    x: &[Input; T],
    at: usize,
    factors: &[Factors; T],
    c: usize,
    total: &mut [S::V; T],
) {
    for t in 0..T {
        // SAFETY: the caller's contract; a span has a factor per chunk.
        unsafe {
            let x = x[t].codes.add(at);
            let acc = s.dot_bytes(s.zero_sums(), w[0], s.load_bytes(x));
            let acc = s.dot_bytes(acc, w[1], s.load_bytes(x.add(VECTOR)));
            let factor = s.splat(*factors[t].0.as_ptr().add(c));
            total[t] = s.fma(s.sums_to_f32(acc), factor, total[t]);
        }
    }
}
