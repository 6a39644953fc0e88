//! What each element type can hold, and how far results may be from exact ones.

use half::{bf16, f16};
use r1_core::DType;

/// The value of an E4M3 code: bias 7, subnormals below 2^-6, NaN at 0x7f and 0xff.
pub(super) fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa * 2f64.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Distance of E4M3 values around `x`.
pub(super) fn e4m3_spacing(x: f64) -> f64 {
    let exponent = x.abs().max(f64::MIN_POSITIVE).log2().floor().clamp(-6.0, 8.0);
    2f64.powi(exponent as i32 - 3)
}

/// `value` as `dtype` holds it: nearest even, E4M3 saturating.
pub(super) fn round_to(dtype: DType, value: f64) -> f64 {
    let value = value as f32;
    match dtype {
        DType::F32 | DType::U32 => f64::from(value),
        DType::I8 => f64::from(value).round_ties_even().clamp(-127.0, 127.0),
        DType::BF16 => bf16::from_f32(value).to_f64(),
        DType::F16 => f16::from_f32(value).to_f64(),
        DType::F8E4M3 => {
            let spacing = e4m3_spacing(f64::from(value));
            ((f64::from(value) / spacing).round_ties_even() * spacing).clamp(-448.0, 448.0)
        }
    }
}

/// The bytes of `values`, which `dtype` holds exactly. Not for E4M3 and I8, whose weights are drawn as codes.
pub(super) fn to_bytes(dtype: DType, values: &[f64]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|v| bf16::from_f64(*v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect(),
        DType::F8E4M3 | DType::I8 | DType::U32 => unreachable!("no bytes of {dtype} from numbers"),
    }
}

/// How far a result may be from the exact one: `relative * |exact| + of_rms * rms(all exact)`, and the least normal F32,
/// since a device may flush what is smaller.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tolerance {
    pub(super) relative: f64,
    pub(super) of_rms: f64,
}

impl Tolerance {
    /// For an operation that computes in F32 and rounds once to `out`.
    pub(super) fn rounded_once(out: DType) -> Self {
        match out {
            DType::F32 => Self { relative: 1e-5, of_rms: 2e-5 },
            // One unit in the last place of a BF16.
            _ => Self { relative: 1.0 / 128.0, of_rms: 2e-5 },
        }
    }

    /// For an operation that may keep values between its parts (probabilities, hidden states) in the activations' dtype.
    pub(super) fn rounded_between(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self { relative: 1e-5, of_rms: 5e-5 },
            _ => Self { relative: 1.0 / 128.0, of_rms: 1.0 / 64.0 },
        }
    }

    /// For FP8 activations that may be rounded to the neighbouring code.
    pub(super) fn fp8_between() -> Self {
        Self { relative: 1.0 / 32.0, of_rms: 1.0 / 32.0 }
    }
}

/// Panics with the worst element when `got` is farther from `want` than `tolerance`.
#[track_caller]
pub(super) fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: Tolerance) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let finite: Vec<f64> = want.iter().copied().filter(|v| v.is_finite()).collect();
    let rms = (finite.iter().map(|v| v * v).sum::<f64>() / finite.len().max(1) as f64).sqrt();
    let excess = |i: usize| {
        let bound =
            tolerance.relative * want[i].abs() + tolerance.of_rms * rms + f64::from(f32::MIN_POSITIVE);
        let distance = if got[i] == want[i] { 0.0 } else { (got[i] - want[i]).abs() };
        if distance <= bound { 0.0 } else { distance.max(f64::MIN_POSITIVE) / bound }
    };
    // A NaN is worse than any number.
    let badness = |i: &usize| if excess(*i).is_nan() { f64::INFINITY } else { excess(*i) };
    let Some(worst) = (0..got.len()).max_by(|a, b| badness(a).total_cmp(&badness(b))) else { return };
    assert!(
        badness(&worst) == 0.0,
        "{what}: element {worst} of {} is {}, expected {} (rms {rms}, {tolerance:?})",
        got.len(),
        got[worst],
        want[worst]
    );
}
