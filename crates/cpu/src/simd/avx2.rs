//! AVX2 with FMA and F16C: 8 lanes.

#[allow(clippy::wildcard_imports)] // every second line is an instruction
use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
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

/// As in AVX-512: E4M3 bits in F16's places are worth 2^-8 of the code.
#[inline(always)]
fn f8_to_f32(codes: __m128i, _proof: Avx2) -> __m256 {
    has!({
        let wide = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(codes));
        _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(0xbfff_u16 as i16)))
    })
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const TILE_TOKENS: usize = 2;
    const STREAMED_TOKENS: usize = 6;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline(never)]
        fn go<K: Kernel>(kernel: K, s: Avx2) {
            kernel.run(s);
        }
        has!(go(kernel, self));
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        has!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        has!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        has!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        has!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        has!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        has!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        has!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        has!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, v: __m256) -> __m256 {
        has!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }

    #[inline(always)]
    fn ldexp(self, v: __m256, n: __m256) -> __m256 {
        // Two steps, since 2^n itself need not be a normal number.
        has!({
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            _mm256_mul_ps(_mm256_mul_ps(v, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high))
        })
    }

    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        has!({
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        })
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: the caller allows the reads, `self` the instruction.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m256 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> __m256 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe { f8_to_f32(_mm_loadl_epi64(p.cast()), self) }
    }

    #[inline(always)]
    unsafe fn load_f8_exact(self, p: *const u8) -> __m256 {
        // SAFETY: the caller allows the reads, `self` the instructions.
        unsafe {
            let codes = _mm_loadl_epi64(p.cast());
            let nan = _mm_cmpeq_epi8(_mm_or_si128(codes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
            // All ones is a NaN already: the widened comparison serves as the value.
            let nan = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan));
            _mm256_or_ps(f8_to_f32(codes, self), nan)
        }
    }

    #[inline(always)]
    unsafe fn has_f8_nan(self, p: *const u8, n: usize) -> bool {
        // SAFETY: the caller allows `n` reads, `self` the instructions.
        unsafe {
            let (sign, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi8(-1));
            let mut found = _mm256_setzero_si256();
            let mut i = 0;
            while i + 32 <= n {
                let codes = _mm256_or_si256(_mm256_loadu_si256(p.add(i).cast()), sign);
                found = _mm256_or_si256(found, _mm256_cmpeq_epi8(codes, ones));
                i += 32;
            }
            let mut any = _mm256_movemask_epi8(found) != 0;
            while i < n {
                any |= *p.add(i) & 0x7f == 0x7f;
                i += 1;
            }
            any
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller allows the writes, `self` the instruction.
        unsafe { _mm256_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: __m256) {
        // SAFETY: the caller allows the writes, `self` the instructions.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let high = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let out = _mm256_blendv_epi8(rounded, quiet, nan);
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(out, out));
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        has!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
}
