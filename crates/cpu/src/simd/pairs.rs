//! Dot products of BF16 pairs: what [`Simd`](super::Simd) is for F32, for inputs that are BF16 already.
//!
//! A product of two BF16 numbers is exact in F32, and so is widening FP8 or int8 to BF16, so nothing is rounded that the F32 kernels
//! do not round; only the order of the sums is another. Instruction sets without such products widen to F32 instead.

use half::bf16;

use super::{Bytes, F8, e4m3_to_f32};

/// What is compiled for instruction sets that have [`Pairs`]. Implementations are `#[inline(always)]`.
pub(crate) trait PairKernel {
    /// Does the work.
    fn run<S: Pairs>(self, s: S);
}

/// Vectors of BF16 pairs. A vector holds `2 * LANES` numbers; lane `i` of a sum takes numbers `2 i` and `2 i + 1`.
///
/// Subnormal BF16 numbers count as zero.
pub(crate) trait Pairs: Bytes {
    /// `2 * LANES` BF16 numbers.
    type P: Copy;
    /// A [`ByteTable`] in registers.
    type Table: Copy;
    /// Numbers per vector.
    const PAIR_LANES: usize;

    /// As [`Simd::call`], for kernels that need pairs.
    fn call_pairs<K: PairKernel>(self, kernel: K);

    fn zero_pairs(self) -> Self::P;
    /// `acc[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]`.
    fn dot(self, acc: Self::V, a: Self::P, b: Self::P) -> Self::V;
    /// `a[0], b[0], a[1], b[1], …`: the vectors whose [`columns`](Self::columns) are in order.
    fn interleave(self, a: Self::P, b: Self::P) -> [Self::P; 2];
    /// Sums of both halves of an [`interleave`](Self::interleave) in the order of its inputs.
    fn columns(self, sums: [Self::V; 2]) -> [Self::V; 2];
    /// The sums of the lanes of four vectors, each by the tree of [`Simd::sum`].
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];

    /// # Safety
    /// `PAIR_LANES` numbers can be read at `p`.
    unsafe fn load_pairs(self, p: *const u16) -> Self::P;
    /// The first `n < PAIR_LANES` numbers, zeros elsewhere.
    /// # Safety
    /// `n` numbers can be read at `p`.
    unsafe fn load_pairs_n(self, p: *const u16, n: usize) -> Self::P;
    /// # Safety
    /// `PAIR_LANES` numbers can be written at `p`.
    unsafe fn store_pairs(self, p: *mut u16, v: Self::P);
    /// The pair at `p` in every lane.
    /// # Safety
    /// Two numbers can be read at `p`.
    unsafe fn splat_pair(self, p: *const u16) -> Self::P;

    fn table(self, table: &ByteTable) -> Self::Table;
    /// Two vectors of E4M3 codes, in order.
    /// # Safety
    /// `2 * PAIR_LANES` codes can be read at `p`.
    unsafe fn load_f8_pairs(self, table: Self::Table, p: *const u8) -> [Self::P; 2];
    /// The first `n < 2 * PAIR_LANES` codes, zeros elsewhere.
    /// # Safety
    /// `n` codes can be read at `p`.
    unsafe fn load_f8_pairs_n(self, table: Self::Table, p: *const u8, n: usize) -> [Self::P; 2];
    /// As [`Simd::load_f16`] of the first `n <= LANES` numbers, zeros elsewhere.
    /// # Safety
    /// `n` numbers can be read at `p`.
    unsafe fn load_f16_n(self, p: *const u16, n: usize) -> Self::V;
    /// The first `n <= LANES` zeros of groups, whole numbers from 0 to 16 as F16, as [`load_int4_pairs`](Self::load_int4_pairs) takes
    /// them.
    /// # Safety
    /// `n` numbers can be read at `zeros` and written at `out`.
    unsafe fn int4_zeros(self, zeros: *const u16, n: usize, out: *mut u32);
    /// Four vectors of 4-bit codes less `zero`: number `i` of vector `j` is bits `4 j..` of the 16-bit word `i`. Past `len` bytes,
    /// codes are 0.
    /// # Safety
    /// `len <= 2 * PAIR_LANES` bytes can be read at `p`.
    unsafe fn load_int4_pairs(self, p: *const u8, len: usize, zero: u32) -> [Self::P; 4];
    /// Two vectors of int8 codes, in order. -128 is none of them.
    /// # Safety
    /// `2 * PAIR_LANES` codes can be read at `p`.
    unsafe fn load_i8_pairs(self, table: Self::Table, p: *const i8) -> [Self::P; 2];
    /// The first `n < 2 * PAIR_LANES` codes, zeros elsewhere.
    /// # Safety
    /// `n` codes can be read at `p`.
    unsafe fn load_i8_pairs_n(self, table: Self::Table, p: *const i8, n: usize) -> [Self::P; 2];
}

/// The BF16 numbers of 128 magnitudes, upper and lower bytes apart.
pub(crate) struct ByteTable {
    pub(crate) high: [u8; 128],
    pub(crate) low: [u8; 128],
}

impl ByteTable {
    const fn new(f32_of: &[f32; 128]) -> Self {
        let mut table = Self { high: [0; 128], low: [0; 128] };
        let mut i = 0;
        while i < 128 {
            // Every value has at most eight significant bits, so its upper half is all of it.
            let bits = f32_of[i].to_bits();
            assert!(bits.trailing_zeros() >= 16, "a value that BF16 does not hold");
            table.high[i] = (bits >> 24) as u8;
            table.low[i] = (bits >> 16) as u8;
            i += 1;
        }
        table
    }
}

/// Weights that are BF16, or become BF16 without rounding.
pub(crate) trait Codes: Copy + 'static {
    /// Numbers per load.
    const STEP_VECTORS: usize;
    /// What is looked up.
    const TABLE: ByteTable;

    /// Two vectors; the second counts where `STEP_VECTORS` is 2.
    /// # Safety
    /// `STEP_VECTORS * PAIR_LANES` numbers can be read at `p`.
    unsafe fn load<S: Pairs>(s: S, table: S::Table, p: *const Self) -> [S::P; 2];

    /// The first `n` numbers, fewer than a load takes, zeros elsewhere.
    /// # Safety
    /// `n` numbers can be read at `p`.
    unsafe fn load_n<S: Pairs>(s: S, table: S::Table, p: *const Self, n: usize) -> [S::P; 2];
}

impl Codes for bf16 {
    const STEP_VECTORS: usize = 1;
    const TABLE: ByteTable = ByteTable { high: [0; 128], low: [0; 128] };

    #[inline(always)]
    unsafe fn load<S: Pairs>(s: S, _: S::Table, p: *const Self) -> [S::P; 2] {
        // SAFETY: the same contract; bf16 is its 16 bits.
        let v = unsafe { s.load_pairs(p.cast()) };
        [v, v]
    }

    #[inline(always)]
    unsafe fn load_n<S: Pairs>(s: S, _: S::Table, p: *const Self, n: usize) -> [S::P; 2] {
        // SAFETY: the same contract; bf16 is its 16 bits.
        let v = unsafe { s.load_pairs_n(p.cast(), n) };
        [v, v]
    }
}

const fn e4m3_magnitudes() -> [f32; 128] {
    let mut values = [0.0; 128];
    let mut code = 0;
    while code < 128 {
        values[code as usize] = e4m3_to_f32(code);
        code += 1;
    }
    values
}

impl Codes for F8 {
    const STEP_VECTORS: usize = 2;
    const TABLE: ByteTable = ByteTable::new(&e4m3_magnitudes());

    #[inline(always)]
    unsafe fn load<S: Pairs>(s: S, table: S::Table, p: *const Self) -> [S::P; 2] {
        // SAFETY: the same contract; F8 is its byte.
        unsafe { s.load_f8_pairs(table, p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_n<S: Pairs>(s: S, table: S::Table, p: *const Self, n: usize) -> [S::P; 2] {
        // SAFETY: the same contract; F8 is its byte.
        unsafe { s.load_f8_pairs_n(table, p.cast(), n) }
    }
}

const fn i8_magnitudes() -> [f32; 128] {
    let mut values = [0.0; 128];
    let mut code = 0;
    while code < 128 {
        values[code as usize] = code as f32;
        code += 1;
    }
    values
}

impl Codes for i8 {
    const STEP_VECTORS: usize = 2;
    const TABLE: ByteTable = ByteTable::new(&i8_magnitudes());

    #[inline(always)]
    unsafe fn load<S: Pairs>(s: S, table: S::Table, p: *const Self) -> [S::P; 2] {
        // SAFETY: the same contract.
        unsafe { s.load_i8_pairs(table, p) }
    }

    #[inline(always)]
    unsafe fn load_n<S: Pairs>(s: S, table: S::Table, p: *const Self, n: usize) -> [S::P; 2] {
        // SAFETY: the same contract.
        unsafe { s.load_i8_pairs_n(table, p, n) }
    }
}
