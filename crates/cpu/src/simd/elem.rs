//! Element types that weights and activations are stored in, and how each is widened to F32.

use half::{bf16, f16};

use super::{MAX_LANES, Simd};

/// A stored element.
pub(crate) trait Elem: Copy + Default + 'static {
    /// What widened values are to be multiplied by: a power of two, applied with the scale.
    const FACTOR: f32;
    /// Already F32: nothing to widen.
    const IS_F32: bool;

    /// # Safety
    /// `LANES` elements can be read at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;

    /// As `load`, where `load` is allowed to get NaN wrong.
    /// # Safety
    /// `LANES` elements can be read at `p`.
    #[inline(always)]
    unsafe fn load_exact<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the same contract.
        unsafe { Self::load(s, p) }
    }

    /// The first `n < LANES` elements, zeros elsewhere.
    /// # Safety
    /// `n` elements can be read at `p`.
    #[inline(always)]
    unsafe fn load_n<S: Simd>(s: S, p: *const Self, n: usize) -> S::V {
        let mut buf = [Self::default(); MAX_LANES];
        // SAFETY: the caller allows `n` reads, `n < LANES <= MAX_LANES`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), n);
            Self::load_exact(s, buf.as_ptr())
        }
    }

    /// Whether `load` gets a NaN among these wrong.
    /// # Safety
    /// `n` elements can be read at `p`.
    #[inline(always)]
    unsafe fn hides_nan<S: Simd>(_s: S, _p: *const Self, _n: usize) -> bool {
        false
    }
}

impl Elem for f32 {
    const FACTOR: f32 = 1.0;
    const IS_F32: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the same contract.
        unsafe { s.load(p) }
    }
}

impl Elem for bf16 {
    const FACTOR: f32 = 1.0;
    const IS_F32: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the same contract; bf16 is its 16 bits.
        unsafe { s.load_bf16(p.cast()) }
    }
}

impl Elem for f16 {
    const FACTOR: f32 = 1.0;
    const IS_F32: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the same contract; f16 is its 16 bits.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl Elem for i8 {
    const FACTOR: f32 = 1.0;
    const IS_F32: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the same contract.
        unsafe { s.load_i8(p) }
    }
}

/// An F8 E4M3 code.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct F8(pub(super) u8);

impl Elem for F8 {
    const FACTOR: f32 = 256.0;
    const IS_F32: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the same contract; F8 is its byte.
        unsafe { s.load_f8(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_exact<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the same contract; F8 is its byte.
        unsafe { s.load_f8_exact(p.cast()) }
    }

    #[inline(always)]
    unsafe fn hides_nan<S: Simd>(s: S, p: *const Self, n: usize) -> bool {
        // SAFETY: the same contract; F8 is its byte.
        unsafe { s.has_f8_nan(p.cast(), n) }
    }
}

/// The value of an E4M3 code.
pub(crate) const fn e4m3_to_f32(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::from_bits((code as u32 & 0x80) << 24 | 0x7fc0_0000);
    }
    let (exponent, mantissa) = ((code >> 3) & 15, (code & 7) as f32);
    let magnitude = if exponent == 0 {
        mantissa / 512.0
    } else {
        f32::from_bits((exponent as u32 + 120) << 23) * (1.0 + mantissa / 8.0)
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The nearest E4M3 code, ties to even; saturates at ±448.
pub(crate) fn f32_to_e4m3(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    if x.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = x.abs().min(448.0);
    let code = if magnitude < 1.0 / 64.0 {
        // Steps of 2^-9; 8 of them are the smallest normal number, whose code is 8.
        (magnitude * 512.0).round_ties_even() as u8
    } else {
        let bits = magnitude.to_bits();
        let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    };
    sign | code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_e4m3_code_survives_the_round_trip() {
        for code in 0..=255u8 {
            let value = e4m3_to_f32(code);
            assert_eq!(f32_to_e4m3(value), code, "{value}");
            assert_eq!(value.is_nan(), code & 0x7f == 0x7f);
        }
        assert_eq!(
            [0x01, 0x07, 0x08, 0x38, 0x7e, 0xfe].map(e4m3_to_f32),
            [2f32.powi(-9), 7.0 * 2f32.powi(-9), 2f32.powi(-6), 1.0, 448.0, -448.0]
        );
    }

    #[test]
    fn e4m3_takes_the_nearest_code_and_saturates() {
        let mut x = 1e-4f32;
        while x < 448.0 {
            let code = f32_to_e4m3(x);
            let gap = (e4m3_to_f32(code) - x).abs();
            for other in 0..0x7f {
                let other_gap = (e4m3_to_f32(other) - x).abs();
                assert!(gap < other_gap || gap == other_gap && (other == code || code & 1 == 0), "{x}");
            }
            x *= 1.037;
        }
        // Halfway: 17 lies between 16 (even code) and 18, 19 between 18 and 20.
        assert_eq!([17.0, 19.0].map(|x| e4m3_to_f32(f32_to_e4m3(x))), [16.0, 20.0]);
        assert_eq!([1e9, f32::INFINITY, -f32::INFINITY].map(f32_to_e4m3), [0x7e, 0x7e, 0xfe]);
        assert_eq!([0.0, -0.0].map(f32_to_e4m3), [0x00, 0x80]);
    }
}
