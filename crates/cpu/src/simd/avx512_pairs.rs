//! AVX-512 BF16 and VBMI: 32 BF16 numbers per vector, byte codes widened by looking both bytes of their BF16 number up.

#[allow(clippy::wildcard_imports)] // every second line is an instruction
use std::arch::x86_64::*;

use super::Avx512;
use crate::kernels::DIFFERENCES;

use super::avx512::has;
use super::pairs::{ByteTable, PairKernel, Pairs};

/// Upper and lower bytes of 128 numbers, each in two registers.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    high: [__m512i; 2],
    low: [__m512i; 2],
}

/// 0 to 15, twice.
const ENTRIES: [u16; 32] = {
    let mut entries = [0; 32];
    let mut i = 0;
    while i < 32 {
        entries[i] = i as u16 & 15;
        i += 1;
    }
    entries
};

#[allow(clippy::unused_self)] // the proof that the machine has the instructions
impl Avx512<true> {
    /// BF16 numbers of 64 codes, whose order `in_order` has prepared: the bits 0 to 6 of `magnitudes` and the sign bit of `signs`.
    #[inline(always)]
    fn look_up(self, table: Table, magnitudes: __m512i, signs: __m512i) -> [__m512bh; 2] {
        has!({
            let low = _mm512_permutex2var_epi8(table.low[0], magnitudes, table.low[1]);
            let high = _mm512_permutex2var_epi8(table.high[0], magnitudes, table.high[1]);
            // high | signs & 0x80
            let high = _mm512_ternarylogic_epi32::<0xf8>(high, signs, _mm512_set1_epi8(-128));
            [pairs(_mm512_unpacklo_epi8(low, high)), pairs(_mm512_unpackhi_epi8(low, high))]
        })
    }

    /// Moves eights of bytes so that unpacking, which works within 16 bytes, gives the first and the second 32 in order.
    #[inline(always)]
    fn in_order(self, codes: __m512i) -> __m512i {
        has!(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes))
    }
}

impl Pairs for Avx512<true> {
    type P = __m512bh;
    type Table = Table;
    const PAIR_LANES: usize = 32;

    #[inline(always)]
    fn call_pairs<K: PairKernel>(self, kernel: K) {
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vnni,avx2,fma,f16c"
        )]
        #[inline(never)]
        fn go<K: PairKernel>(kernel: K, s: Avx512<true>) {
            kernel.run(s);
        }
        has!(go(kernel, self));
    }

    #[inline(always)]
    fn zero_pairs(self) -> __m512bh {
        has!(pairs(_mm512_setzero_si512()))
    }

    #[inline(always)]
    fn dot(self, acc: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        has!(_mm512_dpbf16_ps(acc, a, b))
    }

    #[inline(always)]
    fn interleave(self, a: __m512bh, b: __m512bh) -> [__m512bh; 2] {
        has!({
            let (a, b) = (bits(a), bits(b));
            [pairs(_mm512_unpacklo_epi16(a, b)), pairs(_mm512_unpackhi_epi16(a, b))]
        })
    }

    // Unpacking works within 128 bits: the first half has the first four of every eight columns.
    #[inline(always)]
    fn columns(self, [low, high]: [__m512; 2]) -> [__m512; 2] {
        has!({
            let first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            let second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
            [_mm512_permutex2var_ps(low, first, high), _mm512_permutex2var_ps(low, second, high)]
        })
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        has!({
            // Halves of a register, then quarters, of two and of all four at once.
            let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
            let v = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0x4e>(v));
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0xb1>(v));
            let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, v)));
            out
        })
    }

    #[inline(always)]
    unsafe fn load_pairs(self, p: *const u16) -> __m512bh {
        // SAFETY: the caller allows the reads, `self` the instruction.
        unsafe { pairs(_mm512_loadu_si512(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_pairs_n(self, p: *const u16, n: usize) -> __m512bh {
        // SAFETY: the caller allows `n` reads, the mask hides the rest, `self` has the instruction.
        unsafe { pairs(_mm512_maskz_loadu_epi16((1 << n) - 1, p.cast())) }
    }

    #[inline(always)]
    unsafe fn store_pairs(self, p: *mut u16, v: __m512bh) {
        // SAFETY: the caller allows the writes, `self` the instruction.
        unsafe { _mm512_storeu_si512(p.cast(), bits(v)) }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, p: *const u16) -> __m512bh {
        // SAFETY: the caller allows reading four bytes, `self` the instruction.
        unsafe { pairs(_mm512_set1_epi32(p.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    fn table(self, table: &ByteTable) -> Table {
        let (high, low) = (table.high.as_ptr(), table.low.as_ptr());
        // SAFETY: both arrays have 128 bytes, `self` the instruction.
        unsafe {
            Table {
                high: [_mm512_loadu_si512(high.cast()), _mm512_loadu_si512(high.add(64).cast())],
                low: [_mm512_loadu_si512(low.cast()), _mm512_loadu_si512(low.add(64).cast())],
            }
        }
    }

    #[inline(always)]
    unsafe fn load_f8_pairs(self, table: Table, p: *const u8) -> [__m512bh; 2] {
        // SAFETY: the caller allows the reads, `self` the instruction.
        let codes = unsafe { _mm512_loadu_si512(p.cast()) };
        let codes = self.in_order(codes);
        self.look_up(table, codes, codes)
    }

    #[inline(always)]
    unsafe fn load_f8_pairs_n(self, table: Table, p: *const u8, n: usize) -> [__m512bh; 2] {
        // SAFETY: the caller allows `n` reads, the mask hides the rest, `self` has the instruction. Code 0 is zero.
        let codes = unsafe { _mm512_maskz_loadu_epi8((1 << n) - 1, p.cast()) };
        let codes = self.in_order(codes);
        self.look_up(table, codes, codes)
    }

    #[inline(always)]
    unsafe fn load_f16_n(self, p: *const u16, n: usize) -> __m512 {
        // SAFETY: the caller allows `n` reads, the mask hides the rest, `self` has the instructions.
        unsafe {
            let mask = 1_u32.wrapping_shl(n as u32).wrapping_sub(1) as u16;
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast()))
        }
    }

    #[inline(always)]
    unsafe fn int4_zeros(self, zeros: *const u16, n: usize, out: *mut u32) {
        // SAFETY: the caller allows `n` reads and writes, the mask hides the rest, `self` has the instructions.
        unsafe {
            let less = _mm512_sub_epi32(_mm512_cvtps_epi32(self.load_f16_n(zeros, n)), _mm512_set1_epi32(16));
            // Both halves of 32 bits.
            let low = _mm512_and_si512(less, _mm512_set1_epi32(0xffff));
            let twice = _mm512_or_si512(low, _mm512_slli_epi32::<16>(less));
            _mm512_mask_storeu_epi32(out.cast(), ((1_u32 << n) - 1) as u16, twice);
        }
    }

    #[inline(always)]
    unsafe fn load_int4_pairs(self, p: *const u8, len: usize, zero: u32) -> [__m512bh; 4] {
        // SAFETY: the caller allows the reads, the mask hides the rest, `self` has the instructions.
        unsafe {
            let words = if len == 64 {
                _mm512_loadu_si512(p.cast())
            } else {
                _mm512_maskz_loadu_epi8((1 << len) - 1, p.cast())
            };
            // Entry c of the table, and c + 16, since a look-up sees one bit of the next code: the number c - zero.
            let entries = _mm512_loadu_si512(ENTRIES.as_ptr().cast());
            let index = _mm512_sub_epi16(entries, _mm512_set1_epi32(zero.cast_signed()));
            let table = _mm512_permutexvar_epi16(index, _mm512_loadu_si512(DIFFERENCES.as_ptr().cast()));
            [
                pairs(_mm512_permutexvar_epi16(words, table)),
                pairs(_mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(words), table)),
                pairs(_mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(words), table)),
                pairs(_mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(words), table)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_i8_pairs(self, table: Table, p: *const i8) -> [__m512bh; 2] {
        // SAFETY: the caller allows the reads, `self` the instructions.
        let codes = self.in_order(unsafe { _mm512_loadu_si512(p.cast()) });
        self.look_up(table, has!(_mm512_abs_epi8(codes)), codes)
    }

    #[inline(always)]
    unsafe fn load_i8_pairs_n(self, table: Table, p: *const i8, n: usize) -> [__m512bh; 2] {
        // SAFETY: the caller allows `n` reads, the mask hides the rest, `self` has the instructions. Code 0 is zero.
        let codes = self.in_order(unsafe { _mm512_maskz_loadu_epi8((1 << n) - 1, p.cast()) });
        self.look_up(table, has!(_mm512_abs_epi8(codes)), codes)
    }
}

/// The same bits under the name that dot products take.
#[inline(always)]
fn pairs(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(v) }
}

#[inline(always)]
fn bits(v: __m512bh) -> __m512i {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(v) }
}
