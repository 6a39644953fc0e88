//! The vector abstraction: kernels are written once over [`Simd`] and compiled once per instruction set.
//!
//! A value of a `Simd` type proves that the machine has its instructions, so arithmetic is safe and only pointers are not.
//! Everything generic over `Simd` is `inline(always)`: it must end up inside [`Simd::call`], which alone carries the target
//! features; left outside, each instruction would become a function call. For the same reason closures hold no vectors.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bytes;
#[cfg(target_arch = "x86_64")]
mod avx512_pairs;
mod bytes;
mod elem;
#[cfg(test)]
mod pair_tests;
mod pairs;
mod portable;
pub(crate) mod slice;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use bytes::{Bytes, CHUNK};
pub(crate) use elem::{Elem, F8, e4m3_to_f32, f32_to_e4m3};
pub(crate) use pairs::{Codes, PairKernel, Pairs};
pub(crate) use portable::Portable;

/// Lanes of the widest vector: the size of stack buffers for ragged ends.
pub(crate) const MAX_LANES: usize = 16;

/// What is compiled once per instruction set. Implementations are `#[inline(always)]`.
pub(crate) trait Kernel {
    /// Does the work.
    fn run<S: Simd>(self, s: S);
}

/// F32 vectors and what the kernels do with them.
///
/// `max` and `min` return the second operand when either is NaN, as x86 does.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// `LANES` floats.
    type V: Copy;
    /// Floats per vector.
    const LANES: usize;
    /// Tokens per register tile of four weight rows.
    const TILE_TOKENS: usize;
    /// Up to so many tokens a weight is widened in registers for every tile, which is cheaper than writing it widened.
    const STREAMED_TOKENS: usize;

    /// Whether [`pairs`](Self::pairs) can be called.
    const PAIRS: bool = false;

    /// A call that carries the target features: keeps large kernels from being inlined at every use.
    fn call<K: Kernel>(self, kernel: K);
    /// Runs a kernel that multiplies BF16 in pairs.
    ///
    /// # Panics
    /// Where the instructions lack: see [`PAIRS`](Self::PAIRS).
    #[inline(always)]
    fn pairs<K: PairKernel>(self, _kernel: K) {
        unreachable!("inputs stay BF16 only where their products are there");
    }

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the instructions can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// `v * 2^n` for integral `n` in -150..=128, rounded at most once past the normal range.
    fn ldexp(self, v: Self::V, n: Self::V) -> Self::V;
    /// The sum of the lanes, always by the same tree.
    fn sum(self, v: Self::V) -> f32;

    /// # Safety
    /// `LANES` floats can be read at `p`; so for the other loads with their element types.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// See [`Simd::load`].
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// # Safety
    /// See [`Simd::load`].
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    /// Two's complement.
    /// # Safety
    /// See [`Simd::load`].
    unsafe fn load_i8(self, p: *const i8) -> Self::V;
    /// E4M3 codes as their values times 2^-8. NaN codes may come out as ±1.875: see [`Simd::has_f8_nan`].
    /// # Safety
    /// See [`Simd::load`].
    unsafe fn load_f8(self, p: *const u8) -> Self::V;
    /// As `load_f8`, with NaN for NaN codes.
    /// # Safety
    /// See [`Simd::load`].
    unsafe fn load_f8_exact(self, p: *const u8) -> Self::V;
    /// Whether `load_f8` would get one of these codes wrong.
    /// # Safety
    /// `n` bytes can be read at `p`.
    unsafe fn has_f8_nan(self, p: *const u8, n: usize) -> bool;
    /// # Safety
    /// `LANES` floats can be written at `p`.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Rounds to nearest even.
    /// # Safety
    /// `LANES` values can be written at `p`.
    unsafe fn store_bf16(self, p: *mut u16, v: Self::V);
    /// Asks for the line at `p`, which need not exist.
    fn prefetch(self, p: *const u8);

    /// The first `n < LANES` floats at `p`; `fill` elsewhere.
    /// # Safety
    /// `n` floats can be read at `p`.
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize, fill: f32) -> Self::V {
        let mut buf = [fill; MAX_LANES];
        // SAFETY: the caller allows `n` reads, `n < LANES <= MAX_LANES`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), n);
            self.load(buf.as_ptr())
        }
    }

    /// Writes the first `n < LANES` floats.
    /// # Safety
    /// `n` floats can be written at `p`.
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, v: Self::V) {
        let mut buf = [0.0; MAX_LANES];
        // SAFETY: the caller allows `n` writes, `n < LANES <= MAX_LANES`.
        unsafe {
            self.store(buf.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buf.as_ptr(), p, n);
        }
    }

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// e^v within 2 ulp; 0, infinity and NaN where they belong.
    ///
    /// 2^n e^r with |r| <= ln 2 / 2; ln 2 in two parts, the first short enough for `n * LN2_HIGH` to be exact.
    #[inline(always)]
    fn exp(self, v: Self::V) -> Self::V {
        const LN2_HIGH: f32 = 355.0 / 512.0;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Minimax polynomial of (e^r - 1 - r) / r², highest power first (Cephes, expf).
        const P: [f32; 6] =
            [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
        let v = self.min(self.splat(89.0), self.max(self.splat(-104.0), v));
        let n = self.round(self.mul(v, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-LN2_HIGH), v);
        let r = self.fma(n, self.splat(-LN2_LOW), r);
        let mut p = self.splat(P[0]);
        for c in &P[1..] {
            p = self.fma(p, r, self.splat(*c));
        }
        let p = self.add(self.fma(p, self.mul(r, r), r), self.splat(1.0));
        self.ldexp(p, n)
    }
}
