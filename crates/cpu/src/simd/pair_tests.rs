//! Every operation on BF16 pairs against scalar arithmetic, where the machine has them.

use half::{bf16, f16};

use super::{Codes, F8, Kernel, MAX_LANES, PairKernel, Pairs, Simd, e4m3_to_f32};
use crate::Isa;
use crate::isa::Available;

/// Numbers of the widest vector of pairs.
const MAX_NUMBERS: usize = 2 * MAX_LANES;

struct InPairs<K>(K);

impl<K: PairKernel> Kernel for InPairs<K> {
    fn run<S: Simd>(self, s: S) {
        if S::PAIRS {
            s.pairs(self.0);
        }
    }
}

/// Runs a check under every instruction set of this machine that has pairs.
fn everywhere<K: PairKernel + Copy>(check: K) {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        Available::choose(Some(isa)).expect("it is there").run(InPairs(check));
    }
}

fn numbers<S: Pairs>(s: S, v: S::P) -> Vec<f32> {
    let mut out = [0u16; MAX_NUMBERS];
    assert!(S::PAIR_LANES == 2 * S::LANES && S::LANES <= MAX_LANES, "vectors past their room");
    // SAFETY: the room is that of the widest vector.
    unsafe { s.store_pairs(out.as_mut_ptr(), v) };
    out[..S::PAIR_LANES].iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect()
}

fn lanes<S: Pairs>(s: S, v: S::V) -> Vec<f32> {
    let mut out = [0.0; MAX_LANES];
    // SAFETY: the room is that of the widest vector.
    unsafe { s.store(out.as_mut_ptr(), v) };
    out[..S::LANES].to_vec()
}

fn vector<S: Pairs>(s: S, values: &[f32]) -> S::V {
    assert_eq!(values.len(), S::LANES);
    // SAFETY: a vector of floats.
    unsafe { s.load(values.as_ptr()) }
}

fn pairs<S: Pairs>(s: S, values: &[f32]) -> S::P {
    assert_eq!(values.len(), S::PAIR_LANES);
    let bits: Vec<u16> = values.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
    // SAFETY: a vector of pairs.
    unsafe { s.load_pairs(bits.as_ptr()) }
}

/// Numbers with eight significant bits of many magnitudes.
fn values(len: usize, salt: usize) -> Vec<f32> {
    let value = |i: usize| {
        let word = (i + 1).wrapping_mul(salt.wrapping_mul(2).wrapping_add(1)).wrapping_mul(0x9e37_79b9) >> 7;
        let magnitude = (word % 255 + 1) as f32 * 2f32.powi((word >> 8) as i32 % 9 - 8);
        if word & 1 << 20 == 0 { magnitude } else { -magnitude }
    };
    (0..len).map(value).collect()
}

#[track_caller]
fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
        assert!(same, "{what}: number {i} is {got}, not {want}");
    }
}

/// What codes are widened to, whole and cut: `codes` with `junk` behind what is asked for.
fn check_codes<S: Pairs, E: Codes>(s: S, codes: &[E], junk: E, value: &dyn Fn(E) -> f32) {
    let (table, step) = (s.table(&E::TABLE), E::STEP_VECTORS * S::PAIR_LANES);
    let wide =
        |v: [S::P; 2]| -> Vec<f32> { v[..E::STEP_VECTORS].iter().flat_map(|&v| numbers(s, v)).collect() };
    let padded = codes.iter().copied().chain(std::iter::repeat_n(junk, step)).collect::<Vec<_>>();
    for start in (0..codes.len()).step_by(step) {
        let of = &padded[start..start + step];
        let want: Vec<f32> = of.iter().map(|&code| value(code)).collect();
        // SAFETY: a step of codes.
        let got = wide(unsafe { E::load(s, table, of.as_ptr()) });
        assert_same(&got, &want, "whole");
        for n in 0..step {
            let mut cut = of.to_vec();
            cut[n..].fill(junk);
            let mut want = want.clone();
            want[n..].fill(0.0);
            // SAFETY: at least `n` codes.
            let got = wide(unsafe { E::load_n(s, table, cut.as_ptr(), n) });
            assert_same(&got, &want, &format!("the first {n}"));
        }
    }
}

#[derive(Clone, Copy)]
struct AllCodes;

impl PairKernel for AllCodes {
    fn run<S: Pairs>(self, s: S) {
        let f8: Vec<F8> = (0..=255).map(F8).collect();
        check_codes(s, &f8, F8(0x7f), &|code| e4m3_to_f32(code.0));
        let i8s: Vec<i8> = (-127..=127).collect();
        // A code of zero is positive.
        check_codes(s, &i8s, 99, &|code| f32::from(code));
        let floats: Vec<bf16> = values(3 * MAX_NUMBERS, 1).into_iter().map(bf16::from_f32).collect();
        check_codes(s, &floats, bf16::NAN, &|value| value.to_f32());
    }
}

#[test]
fn every_code_is_widened_exactly() {
    everywhere(AllCodes);
}

#[derive(Clone, Copy)]
struct Int4;

impl PairKernel for Int4 {
    fn run<S: Pairs>(self, s: S) {
        let bytes = 2 * S::PAIR_LANES;
        // All zeros, a vector and a ragged rest at a time.
        let zeros: Vec<u16> = (0..=16u8).map(|zero| f16::from_f32(f32::from(zero)).to_bits()).collect();
        let mut taken = [u32::MAX; 18];
        for (at, part) in zeros.chunks(S::LANES).enumerate() {
            // SAFETY: as many zeros are there as are written.
            unsafe { s.int4_zeros(part.as_ptr(), part.len(), taken[at * S::LANES..].as_mut_ptr()) };
        }
        assert_eq!(taken[17], u32::MAX, "written past what was asked for");
        for (zero, &taken) in (0..=16u16).zip(&taken) {
            // Every code in every place: 16 rotations of all codes.
            for turn in 0..16usize {
                let code = |i: usize, j: usize| (i + 4 * j + i / 16 + turn) % 16;
                let words: Vec<u16> = (0..S::PAIR_LANES)
                    .map(|i| (0..4).fold(0, |word, j| word | (code(i, j) << (4 * j)) as u16))
                    .collect();
                let codes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                for len in [0, 4, 8, 20, bytes - 4, bytes] {
                    // SAFETY: `len` bytes are there.
                    let got = unsafe { s.load_int4_pairs(codes.as_ptr(), len, taken) };
                    for (j, v) in got.into_iter().enumerate() {
                        let value = |i: usize| {
                            let code = if 2 * i < len { code(i, j) } else { 0 };
                            code as f32 - f32::from(zero)
                        };
                        let want: Vec<f32> = (0..S::PAIR_LANES).map(value).collect();
                        assert_same(&numbers(s, v), &want, &format!("zero {zero}, {len} bytes, vector {j}"));
                    }
                }
            }
        }
    }
}

#[test]
fn every_int4_code_loses_every_zero() {
    everywhere(Int4);
}

#[derive(Clone, Copy)]
struct Loads;

impl PairKernel for Loads {
    fn run<S: Pairs>(self, s: S) {
        assert_same(&numbers(s, s.zero_pairs()), &vec![0.0; S::PAIR_LANES], "zeros");
        let of = values(S::PAIR_LANES, 3);
        assert_same(&numbers(s, pairs(s, &of)), &of, "what was stored");
        let bits: Vec<u16> = of.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
        // SAFETY: two numbers.
        let splat = numbers(s, unsafe { s.splat_pair(bits[5..].as_ptr()) });
        assert_same(&splat, &[of[5], of[6]].repeat(S::LANES), "a pair in every lane");
        for n in 0..=S::LANES {
            let mut halves: Vec<f16> = of[..S::LANES].iter().map(|&value| f16::from_f32(value)).collect();
            let mut want: Vec<f32> = halves.iter().map(|value| value.to_f32()).collect();
            halves[n..].fill(f16::NAN);
            want[n..].fill(0.0);
            // SAFETY: at least `n` numbers.
            let got = lanes(s, unsafe { s.load_f16_n(halves.as_ptr().cast(), n) });
            assert_same(&got, &want, &format!("the first {n} of F16"));
        }
    }
}

#[test]
fn loads_of_every_length() {
    everywhere(Loads);
}

#[derive(Clone, Copy)]
struct Sums;

impl PairKernel for Sums {
    fn run<S: Pairs>(self, s: S) {
        for salt in 0..200 {
            let four = [0, 1, 2, 3].map(|i| vector(s, &values(S::LANES, 4 * salt + i)));
            assert_same(&s.sum4(four), &four.map(|v| s.sum(v)), "four sums");
        }
        let mut with_nan = values(S::LANES, 1);
        with_nan[S::LANES - 1] = f32::NAN;
        let (nan, other) = (vector(s, &with_nan), vector(s, &values(S::LANES, 2)));
        let sums = s.sum4([other, nan, other, other]);
        assert_same(&sums, &[s.sum(other), f32::NAN, s.sum(other), s.sum(other)], "one of four is NaN");
    }
}

#[test]
fn four_sums_are_those_of_each() {
    everywhere(Sums);
}

#[derive(Clone, Copy)]
struct Dots;

impl PairKernel for Dots {
    fn run<S: Pairs>(self, s: S) {
        for salt in 0..100 {
            let [a, b] = [1, 2].map(|i| values(S::PAIR_LANES, 7 * salt + i));
            let acc = values(S::LANES, salt);
            let got = lanes(s, s.dot(vector(s, &acc), pairs(s, &a), pairs(s, &b)));
            for i in 0..S::LANES {
                let [x, y] = [2 * i, 2 * i + 1].map(|i| f64::from(a[i]) * f64::from(b[i]));
                let (want, size) = (f64::from(acc[i]) + x + y, f64::from(acc[i]).abs() + x.abs() + y.abs());
                let gap = (f64::from(got[i]) - want).abs();
                assert!(gap <= 1.2e-7 * size, "lane {i}: {}, not {want}", got[i]);
            }
        }
        // Exact where every sum is, NaN where a number is, and subnormal numbers count as zero.
        let mut a: Vec<f32> = (0..S::PAIR_LANES).map(|i| i as f32 - 9.0).collect();
        let b: Vec<f32> = (0..S::PAIR_LANES).map(|i| 3.0 * i as f32 - 20.0).collect();
        (a[4], a[7]) = (f32::NAN, f32::from_bits(0x0040_0000));
        let want: Vec<f32> = (0..S::LANES)
            .map(|i| match i {
                2 => f32::NAN,
                3 => 5.0 + a[6] * b[6],
                _ => 5.0 + a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1],
            })
            .collect();
        let got = s.dot(s.splat(5.0), pairs(s, &a), pairs(s, &b));
        assert_same(&lanes(s, got), &want, "small whole numbers");
    }
}

#[test]
fn dot_products_of_pairs() {
    everywhere(Dots);
}

#[derive(Clone, Copy)]
struct Interleaved;

impl PairKernel for Interleaved {
    fn run<S: Pairs>(self, s: S) {
        let a: Vec<f32> = (0..S::PAIR_LANES).map(|i| i as f32 + 1.0).collect();
        let b: Vec<f32> = (0..S::PAIR_LANES).map(|i| 100.0 - 2.0 * i as f32).collect();
        let coef = [3.0, -5.0].map(|k| bf16::from_f32(k).to_bits());
        // SAFETY: two numbers.
        let coef = unsafe { s.splat_pair(coef.as_ptr()) };
        let sums = s.interleave(pairs(s, &a), pairs(s, &b)).map(|v| s.dot(s.zero(), coef, v));
        let got: Vec<f32> = s.columns(sums).into_iter().flat_map(|v| lanes(s, v)).collect();
        let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| 3.0 * a - 5.0 * b).collect();
        assert_same(&got, &want, "columns");
    }
}

#[test]
fn columns_of_interleaved_rows_are_in_order() {
    everywhere(Interleaved);
}
