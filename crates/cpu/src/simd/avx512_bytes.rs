//! AVX-512 VNNI: 64 products of bytes per instruction.

#[allow(clippy::wildcard_imports)] // every second line is an instruction
use std::arch::x86_64::*;

use super::Avx512;
use super::avx512::has;
use super::bytes::{Bytes, LEAST, Quantized};

/// Even places of 128 bytes; odd ones are the next.
const EVEN: [u8; 64] = {
    let mut places = [0; 64];
    let mut i = 0;
    while i < 64 {
        places[i] = 2 * i as u8;
        i += 1;
    }
    places
};

impl Bytes for Avx512<true> {
    type B = __m512i;
    type Sums = __m512i;

    #[inline(always)]
    fn zero_sums(self) -> __m512i {
        has!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn dot_bytes(self, acc: __m512i, unsigned: __m512i, signed: __m512i) -> __m512i {
        has!(_mm512_dpbusd_epi32(acc, unsigned, signed))
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: __m512i) -> __m512 {
        has!(_mm512_cvtepi32_ps(sums))
    }

    #[inline(always)]
    fn biased(self, signed: __m512i) -> __m512i {
        has!(_mm512_xor_si512(signed, _mm512_set1_epi8(-128)))
    }

    #[inline(always)]
    fn nibbles(self, bytes: __m512i) -> [__m512i; 2] {
        has!({
            let low = _mm512_set1_epi8(15);
            [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
        })
    }

    #[inline(always)]
    fn even_and_odd(self, [a, b]: [__m512i; 2]) -> [__m512i; 2] {
        has!({
            let even = _mm512_loadu_si512(EVEN.as_ptr().cast());
            let odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
            [_mm512_permutex2var_epi8(a, even, b), _mm512_permutex2var_epi8(a, odd, b)]
        })
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m512i {
        // SAFETY: the caller allows the reads, `self` the instruction.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_bytes_n(self, p: *const u8, n: usize) -> __m512i {
        let mask = if n < 64 { (1 << n) - 1 } else { u64::MAX };
        // SAFETY: the caller allows `n` reads, the mask hides the rest, `self` has the instruction.
        unsafe { _mm512_maskz_loadu_epi8(mask, p.cast()) }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: __m512i) {
        // SAFETY: the caller allows the writes, `self` the instruction.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }

    #[inline(always)]
    unsafe fn quantize_chunk(self, p: *const f32) -> Quantized<Self> {
        // SAFETY: the caller allows reading eight vectors, `self` has the instructions.
        unsafe {
            let x: [__m512; 8] = std::array::from_fn(|i| _mm512_loadu_ps(p.add(16 * i)));
            // Bits of magnitudes are in the order of their values, and those of NaN come last.
            let magnitude = _mm512_set1_epi32(i32::MAX);
            let mut most = _mm512_setzero_si512();
            for v in x {
                most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(v), magnitude));
            }
            let most = f32::from_bits(_mm512_reduce_max_epu32(most));
            let most = if most < LEAST { LEAST } else { most };
            let inverse = _mm512_set1_ps(127.0 / most);
            let mut bytes = [0_i8; 128];
            for (i, v) in x.into_iter().enumerate() {
                let codes = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
                _mm_storeu_si128(bytes.as_mut_ptr().add(16 * i).cast(), _mm512_cvtsepi32_epi8(codes));
            }
            let codes = [
                _mm512_loadu_si512(bytes.as_ptr().cast()),
                _mm512_loadu_si512(bytes.as_ptr().add(64).cast()),
            ];
            let ones = _mm512_set1_epi8(1);
            let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, codes[0]);
            let sums = _mm512_dpbusd_epi32(sums, ones, codes[1]);
            Quantized { codes, scale: most / 127.0, sum: _mm512_reduce_add_epi32(sums) }
        }
    }
}
