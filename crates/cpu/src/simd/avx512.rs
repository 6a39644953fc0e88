//! AVX-512: 16 lanes; with `PAIRS` also the dot products of BF16 pairs, see `pairs`.

#[allow(clippy::wildcard_imports)] // every second line is an instruction
use std::arch::x86_64::*;

use super::{Kernel, PairKernel, Pairs, Simd};

/// Proof that the machine has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C; with `PAIRS` also AVX-512 BF16, VBMI and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const PAIRS: bool>(());

impl<const PAIRS: bool> Avx512<PAIRS> {
    /// # Safety
    /// The machine has the instructions.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

/// An instruction that `self` proves to exist.
macro_rules! has {
    ($e:expr) => {
        // SAFETY: a value of this type exists only where the machine has the instructions.
        unsafe { $e }
    };
}
pub(super) use has;

/// E4M3 bits moved to their places in F16: sign, a zero, four bits of exponent, three of mantissa. Its value is 2^-8 of the
/// code's, also for subnormals.
#[inline(always)]
fn f8_as_f16<const PAIRS: bool>(codes: __m128i, _proof: Avx512<PAIRS>) -> __m256i {
    has!({
        let wide = _mm256_cvtepi8_epi16(codes);
        _mm256_and_si256(_mm256_slli_epi16::<7>(wide), _mm256_set1_epi16(0xbfff_u16 as i16))
    })
}

impl<const PAIRS: bool> Simd for Avx512<PAIRS> {
    type V = __m512;
    const LANES: usize = 16;
    const TILE_TOKENS: usize = 3;
    const STREAMED_TOKENS: usize = 12;
    const PAIRS: bool = PAIRS;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        #[inline(never)]
        fn go<K: Kernel>(kernel: K, s: Avx512<false>) {
            kernel.run(s);
        }
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vnni,avx2,fma,f16c"
        )]
        #[inline(never)]
        fn go_pairs<K: Kernel>(kernel: K, s: Avx512<true>) {
            kernel.run(s);
        }
        if PAIRS { has!(go_pairs(kernel, Avx512(()))) } else { has!(go(kernel, Avx512(()))) }
    }

    #[inline(always)]
    fn pairs<K: PairKernel>(self, kernel: K) {
        assert!(PAIRS, "inputs stay BF16 only where their products are there");
        Avx512::<true>(()).call_pairs(kernel);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        has!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        has!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        has!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        has!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }

    #[inline(always)]
    fn ldexp(self, v: __m512, n: __m512) -> __m512 {
        has!(_mm512_scalef_ps(v, n))
    }

    // Not `_mm512_reduce_add_ps`, which leaves the order to the compiler.
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        has!({
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        })
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller allows the reads, `self` the instruction.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> __m512 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe { _mm512_cvtph_ps(f8_as_f16(_mm_loadu_si128(p.cast()), self)) }
    }

    #[inline(always)]
    unsafe fn load_f8_exact(self, p: *const u8) -> __m512 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe {
            let codes = _mm_loadu_si128(p.cast());
            let nan = _mm_cmpeq_epi8_mask(_mm_or_si128(codes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
            _mm512_mask_mov_ps(_mm512_cvtph_ps(f8_as_f16(codes, self)), nan, _mm512_set1_ps(f32::NAN))
        }
    }

    #[inline(always)]
    unsafe fn has_f8_nan(self, p: *const u8, n: usize) -> bool {
        // SAFETY: the caller allows `n` reads, the mask hides the rest, `self` has the instructions.
        unsafe {
            let (sign, ones) = (_mm512_set1_epi8(-128), _mm512_set1_epi8(-1));
            let mut found = 0;
            let mut i = 0;
            while i + 64 <= n {
                let codes = _mm512_loadu_si512(p.add(i).cast());
                found |= _mm512_cmpeq_epi8_mask(_mm512_or_si512(codes, sign), ones);
                i += 64;
            }
            if i < n {
                let codes = _mm512_maskz_loadu_epi8((1 << (n - i)) - 1, p.add(i).cast());
                found |= _mm512_cmpeq_epi8_mask(_mm512_or_si512(codes, sign), ones);
            }
            found != 0
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller allows the writes, `self` the instruction.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    // Not `vcvtneps2bf16`, which flushes subnormals.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: __m512) {
        // SAFETY: the caller allows the writes, `self` the instructions.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let high = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
            let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let out = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(out));
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        has!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }

    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize, fill: f32) -> __m512 {
        // SAFETY: the caller allows `n` reads, the mask hides the rest, `self` has the instruction.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), (1 << n) - 1, p) }
    }

    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, v: __m512) {
        // SAFETY: the caller allows `n` writes, the mask hides the rest, `self` has the instruction.
        unsafe { _mm512_mask_storeu_ps(p, (1 << n) - 1, v) }
    }
}
