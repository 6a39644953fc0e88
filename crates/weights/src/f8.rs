//! FP8 e4m3 as numbers. Knows no scale.

/// The value of an e4m3 code (OCP FP8: 4 exponent bits, bias 7, no infinities; 0x7f and 0xff are NaN).
pub fn f8e4m3_to_f32(code: u8) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    let (exponent, mantissa) = (u32::from(code >> 3) & 0xf, u32::from(code & 7));
    match (exponent, mantissa) {
        (0xf, 7) => f32::NAN,
        // Subnormal: mantissa · 2^-9, exact in f32.
        (0, m) => f32::from_bits(sign | (m as f32 / 512.0).to_bits()),
        (e, m) => f32::from_bits(sign | (e + 120) << 23 | m << 20),
    }
}

/// The code of the nearest value, ties to even; saturates at ±448.
pub(crate) fn f32_to_f8e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let x = x.abs().min(448.0);
    // Values below 2^-6 share its exponent's step, 2^-9.
    let exponent = ((x.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    // In steps: 8 to 16, which is 8 of the next exponent, or below 8 with the smallest.
    let steps = (x / step).round_ties_even() as i32;
    sign | ((exponent + 6) * 8 + steps) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_what_the_format_defines() {
        for code in 0..=255u8 {
            let (s, e, m) = (code >> 7, i32::from(code >> 3 & 15), f64::from(code & 7));
            let magnitude = if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) };
            let found = f8e4m3_to_f32(code);
            if code & 0x7f == 0x7f {
                assert!(found.is_nan());
            } else {
                assert_eq!(f64::from(found), if s == 1 { -magnitude } else { magnitude }, "{code:#x}");
                assert_eq!(found.is_sign_negative(), s == 1, "{code:#x}");
            }
        }
        assert_eq!(f8e4m3_to_f32(0x7e), 448.0);
    }

    #[test]
    fn the_nearest_code_is_taken() {
        // Of two neighbours, the one whose mantissa is even takes the middle.
        for code in 0..0x7e_u8 {
            let (low, high) = (f8e4m3_to_f32(code), f8e4m3_to_f32(code + 1));
            let middle = f32::midpoint(low, high);
            let even = if code % 2 == 0 { code } else { code + 1 };
            for (x, expected) in [
                (low, code),
                (high, code + 1),
                (middle, even),
                (middle.next_down(), code),
                (middle.next_up(), code + 1),
            ] {
                assert_eq!(f32_to_f8e4m3(x), expected, "{x}");
                assert_eq!(f32_to_f8e4m3(-x), expected | 0x80, "-{x}");
            }
        }
        assert_eq!([449.0, 1e30, f32::INFINITY].map(f32_to_f8e4m3), [0x7e; 3]);
        assert_eq!(f32_to_f8e4m3(f32::NAN) & 0x7f, 0x7f);
    }
}
