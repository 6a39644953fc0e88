//! Philox 4x32-10, the counter-based generator of sampling: a pure function of (seed, position, token).
//! Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Four random words of a 128-bit counter under a 64-bit key.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
        }
        let a = u64::from(M0) * u64::from(counter[0]);
        let b = u64::from(M1) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
    }
    counter
}

/// Uniform in the open interval (0, 1), keyed by (seed, position, token).
pub fn uniform(seed: u64, position: u64, token: u32) -> f32 {
    let counter = [token / 4, 0, position as u32, (position >> 32) as u32];
    let word = philox4x32(counter, [seed as u32, (seed >> 32) as u32])[(token % 4) as usize];
    // 23 bits and a half: never 0, never 1, exact in F32.
    ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

/// Standard Gumbel noise: the largest of `logit + gumbel` over tokens is a draw from softmax(logit).
pub fn gumbel(seed: u64, position: u64, token: u32) -> f32 {
    -(-uniform(seed, position, token).ln()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds).
    #[test]
    fn matches_the_published_vectors() {
        let ones = [u32::MAX; 4];
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32(ones, [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn uniform_is_open_and_even() {
        let n = 100_000;
        let mean = (0..n)
            .map(|i| f64::from(uniform(7, 3, i)))
            .inspect(|u| assert!(*u > 0.0 && *u < 1.0))
            .sum::<f64>();
        assert!((mean / f64::from(n) - 0.5).abs() < 0.005);
        assert_ne!(uniform(7, 3, 0), uniform(7, 4, 0));
        assert_ne!(uniform(7, 3, 0), uniform(8, 3, 0));
    }
}
