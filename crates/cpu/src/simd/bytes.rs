//! Dot products of bytes, summed in 32 bits: what [`Pairs`](super::Pairs) is for BF16, for int8 inputs.

use super::Simd;

/// Columns that are quantized together and have one scale.
pub(crate) const CHUNK: usize = 128;

/// A chunk of inputs as int8.
#[derive(Clone, Copy)]
pub(crate) struct Quantized<S: Bytes> {
    /// The codes, -127 to 127.
    pub(crate) codes: [S::B; 2],
    /// What a code of 1 stands for.
    pub(crate) scale: f32,
    /// The sum of the codes.
    pub(crate) sum: i32,
}

/// Vectors of 64 bytes and of sums of their products. Lane `i` of a sum takes bytes `4 i..4 i + 4`.
pub(crate) trait Bytes: Simd {
    /// 64 bytes.
    type B: Copy;
    /// `LANES` sums in 32 bits.
    type Sums: Copy;

    fn zero_sums(self) -> Self::Sums;
    /// `acc[i] + Σ unsigned[4 i + j] signed[4 i + j]`, j from 0 to 3, exactly.
    fn dot_bytes(self, acc: Self::Sums, unsigned: Self::B, signed: Self::B) -> Self::Sums;
    /// Rounded where they have more than 24 bits.
    fn sums_to_f32(self, sums: Self::Sums) -> Self::V;
    /// Signed bytes plus 128.
    fn biased(self, signed: Self::B) -> Self::B;
    /// The lower four bits of every byte, then the upper ones.
    fn nibbles(self, bytes: Self::B) -> [Self::B; 2];
    /// The even bytes of both in order, then the odd ones: where [`nibbles`](Self::nibbles) of a row have their columns.
    fn even_and_odd(self, bytes: [Self::B; 2]) -> [Self::B; 2];

    /// # Safety
    /// 64 bytes can be read at `p`.
    unsafe fn load_bytes(self, p: *const u8) -> Self::B;
    /// The first `n <= 64` bytes, zeros elsewhere.
    /// # Safety
    /// `n` bytes can be read at `p`.
    unsafe fn load_bytes_n(self, p: *const u8, n: usize) -> Self::B;
    /// # Safety
    /// 64 bytes can be written at `p`.
    unsafe fn store_bytes(self, p: *mut u8, v: Self::B);

    /// Quantizes: with a = max(max |x|, 1e-30) the code of x is x times (127 / a), to the nearest, ties to even, and the scale is
    /// a / 127. One that is no number makes the scale none.
    /// # Safety
    /// [`CHUNK`] floats can be read at `p`.
    unsafe fn quantize_chunk(self, p: *const f32) -> Quantized<Self>;
}

/// The least magnitude that codes are relative to: its inverse times 127 is finite.
pub(crate) const LEAST: f32 = 1e-30;
