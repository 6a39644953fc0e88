//! The simulator's random numbers: splitmix64, so that a seed replays the same run on every machine and for ever.

/// Sebastiano Vigna's splitmix64.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Uniform in `low..=high`; the bias of the remainder is below 2^-32 for the small ranges used here.
    pub(super) fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    pub(super) fn percent(&mut self, percent: usize) -> bool {
        self.range(0, 99) < percent
    }
}

/// splitmix64's finalizer, also the simulator's hash.
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_sequence() {
        // First outputs of the reference splitmix64.c for seed 1234567.
        let mut rng = Rng::new(1234567);
        assert_eq!(
            [rng.next(), rng.next(), rng.next()],
            [6457827717110365317, 3203168211198807973, 9817491932198370423]
        );
    }
}
