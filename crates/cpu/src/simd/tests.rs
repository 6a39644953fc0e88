//! Every instruction set against scalar arithmetic.

use half::{bf16, f16};

use super::{Kernel, MAX_LANES, Simd, e4m3_to_f32, slice};
use crate::Isa;
use crate::isa::Available;

/// Runs a check under every instruction set of this machine.
fn everywhere<K: Kernel + Clone>(check: &K) {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        Available::choose(Some(isa)).expect("it is there").run(check.clone());
    }
}

/// Distance in representable numbers.
fn ulps(a: f32, b: f32) -> u32 {
    if a.is_nan() || b.is_nan() {
        return if a.is_nan() && b.is_nan() { 0 } else { u32::MAX };
    }
    (a.to_bits().cast_signed()).abs_diff(b.to_bits().cast_signed())
}

fn lanes<S: Simd>(s: S, v: S::V) -> [f32; MAX_LANES] {
    let mut out = [0.0; MAX_LANES];
    // SAFETY: `LANES <= MAX_LANES`.
    unsafe { s.store(out.as_mut_ptr(), v) };
    out
}

#[derive(Clone)]
struct Exp;

impl Kernel for Exp {
    fn run<S: Simd>(self, s: S) {
        let mut x = -104.5f32;
        let mut worst = 0;
        while x < 89.5 {
            let want = f64::from(x).exp() as f32;
            let got = lanes(s, s.exp(s.splat(x)))[0];
            // Subnormal results may be off by a step of theirs more.
            let gap = ulps(got, want).saturating_sub(u32::from(want < f32::MIN_POSITIVE));
            worst = worst.max(gap);
            assert!(gap <= 2, "e^{x} = {got}, not {want}");
            x += 0.000_917;
        }
        let special = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -0.0, -1e30, 1e30];
        for (x, want) in special.into_iter().zip([0.0, f32::INFINITY, f32::NAN, 1.0, 1.0, 0.0, f32::INFINITY])
        {
            assert_eq!(ulps(lanes(s, s.exp(s.splat(x)))[0], want), 0, "e^{x}");
        }
    }
}

#[test]
fn exp_is_within_two_ulp() {
    everywhere(&Exp);
}

#[derive(Clone)]
struct Widening;

impl Kernel for Widening {
    fn run<S: Simd>(self, s: S) {
        let codes: Vec<u8> = (0..=255).collect();
        for chunk in codes.chunks_exact(S::LANES) {
            // SAFETY: a chunk has `LANES` codes.
            let (fast, exact, nan) = unsafe {
                let p = chunk.as_ptr();
                (s.load_f8(p), s.load_f8_exact(p), s.has_f8_nan(p, chunk.len()))
            };
            let (fast, exact) = (lanes(s, fast), lanes(s, exact));
            for (i, &code) in chunk.iter().enumerate() {
                let want = e4m3_to_f32(code) / 256.0;
                assert_eq!(ulps(exact[i], want), 0, "code {code}");
                // The fast form may miss NaN only where it says so.
                assert!(ulps(fast[i], want) == 0 || want.is_nan() && nan, "code {code}");
            }
            // SAFETY: as above.
            let signed = lanes(s, unsafe { s.load_i8(chunk.as_ptr().cast()) });
            for (value, code) in signed.iter().zip(chunk) {
                assert_eq!(*value, f32::from(code.cast_signed()), "I8 code {code}");
            }
        }
        for bits in (0..=u16::MAX).collect::<Vec<_>>().chunks_exact(S::LANES) {
            // SAFETY: a chunk has `LANES` values.
            let (b, h) = unsafe { (s.load_bf16(bits.as_ptr()), s.load_f16(bits.as_ptr())) };
            let (b, h) = (lanes(s, b), lanes(s, h));
            for (i, &bits) in bits.iter().enumerate() {
                assert_eq!(ulps(b[i], bf16::from_bits(bits).to_f32()), 0, "bf16 {bits:#x}");
                assert_eq!(ulps(h[i], f16::from_bits(bits).to_f32()), 0, "f16 {bits:#x}");
            }
        }
    }
}

#[test]
fn every_code_is_widened_exactly() {
    everywhere(&Widening);
}

#[derive(Clone)]
struct NanScan;

impl Kernel for NanScan {
    fn run<S: Simd>(self, s: S) {
        // Behind the end lies a NaN that must not be seen.
        for n in [1, 7, 31, 32, 33, 63, 64, 65, 127, 128, 130] {
            let mut codes = vec![0x7eu8; n];
            codes.resize(n + 64, 0x7f);
            // SAFETY: `n` codes are there.
            let found = unsafe { s.has_f8_nan(codes.as_ptr(), n) };
            assert!(!found, "{n} codes");
            for (at, code) in [(0, 0x7f), (n / 2, 0xff), (n - 1, 0x7f)] {
                let mut codes = codes.clone();
                codes[at] = code;
                // SAFETY: as above. The portable form widens exactly and has nothing to say.
                let (found, exact) =
                    unsafe { (s.has_f8_nan(codes.as_ptr(), n), s.load_f8(codes[at..].as_ptr())) };
                assert!(found || lanes(s, exact)[0].is_nan(), "code {at} of {n}");
            }
        }
    }
}

#[test]
fn nan_codes_are_found() {
    everywhere(&NanScan);
}

#[derive(Clone)]
struct Narrowing;

impl Kernel for Narrowing {
    fn run<S: Simd>(self, s: S) {
        let mut bits = 0u32;
        let mut values = Vec::new();
        while let Some(next) = bits.checked_add(0x1_2345) {
            values.push(f32::from_bits(next));
            bits = next;
        }
        // Ties, in both directions, subnormals, the largest number, and a NaN that would round to infinity.
        let ties =
            [0x3f80_8000, 0x3f81_8000, 0x0000_8000, 0x0001_8000, 0x7f7f_ffff, 0x7f80_0001, 0xffff_ffff];
        values.extend(ties.map(f32::from_bits));
        for chunk in values.chunks(S::LANES) {
            let mut padded = [0.0; MAX_LANES];
            padded[..chunk.len()].copy_from_slice(chunk);
            let mut out = [0u16; MAX_LANES];
            // SAFETY: both have `MAX_LANES` elements.
            unsafe { s.store_bf16(out.as_mut_ptr(), s.load(padded.as_ptr())) };
            for (&value, got) in chunk.iter().zip(out) {
                assert_eq!(got, bf16::from_f32(value).to_bits(), "{:#x}", value.to_bits());
            }
        }
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    everywhere(&Narrowing);
}

#[derive(Clone)]
struct Slices;

impl Kernel for Slices {
    fn run<S: Simd>(self, s: S) {
        for n in 0..70usize {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            let y: Vec<f32> = (0..n).map(|i| (i as f32 * 0.3).cos()).collect();
            let close = |got: f32, want: f64| {
                assert!(
                    (f64::from(got) - want).abs() <= 1e-5 * want.abs().max(1.0),
                    "{got} {want} at n = {n}"
                );
            };
            let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            close(slice::sum_of_squares(s, &x), wide(&x).iter().map(|v| v * v).sum());
            let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(slice::max(s, &x), max);
            let mut e = x.clone();
            let sum = slice::exp_sum(s, &mut e, 0.5, 1.0);
            close(sum, wide(&x).iter().map(|v| (v * 0.5 - 1.0).exp()).sum());
            let mut z = y.clone();
            slice::axpby(s, 2.0, &x, -3.0, &mut z);
            for i in 0..n {
                close(e[i], (f64::from(x[i]) * 0.5 - 1.0).exp());
                close(z[i], 2.0 * f64::from(x[i]) - 3.0 * f64::from(y[i]));
            }
        }
        assert_eq!(slice::max(s, &[f32::NAN; 40]), f32::NEG_INFINITY);
        let mut some = [f32::NAN; 40];
        some[3] = -7.0;
        assert_eq!(slice::max(s, &some), -7.0);
    }
}

#[test]
fn slices_of_every_length() {
    everywhere(&Slices);
}

#[derive(Clone)]
struct Silu;

impl Kernel for Silu {
    fn run<S: Simd>(self, s: S) {
        let mut x = -120.0f32;
        while x < 120.0 {
            let got = lanes(s, slice::silu(s, s.splat(x)))[0];
            let want = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            assert!(
                (f64::from(got) - want).abs() <= 4e-7 * want.abs() + 1e-36,
                "silu({x}) = {got}, not {want}"
            );
            x += 0.013;
        }
    }
}

#[test]
fn silu_keeps_its_relative_accuracy() {
    everywhere(&Silu);
}
