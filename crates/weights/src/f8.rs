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
}
