//! Seeded random inputs. Its own generator, so that a seed that fails once fails everywhere.

use std::thread;

/// Seeds that every check runs with.
const SEEDS: u64 = 2;

/// Runs `check` on fresh inputs of every seed; when it panics, says of which.
pub(super) fn seeded(check_name: &'static str, mut check: impl FnMut(&mut Random)) {
    for seed in 0..SEEDS {
        let _announce = Announce { check_name, seed };
        check(&mut Random { state: seed.wrapping_mul(0x9E3779B97F4A7C15) });
    }
}

struct Announce {
    check_name: &'static str,
    seed: u64,
}

impl Drop for Announce {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("conformance::{} failed with seed {}", self.check_name, self.seed);
        }
    }
}

/// SplitMix64. Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
#[derive(Clone)]
pub(super) struct Random {
    state: u64,
}

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E3779B97F4A7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
        z ^ (z >> 31)
    }

    /// Another generator, whose numbers these are not.
    pub(super) fn split(&mut self) -> Self {
        Self { state: self.next() }
    }

    /// Uniform in [low, high).
    pub(super) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform among 0..bound.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Mean 0, variance 1.
    pub(super) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform(f64::MIN_POSITIVE, 1.0).ln()).sqrt();
        radius * self.uniform(0.0, std::f64::consts::TAU).cos()
    }

    /// `count` normal values times `scale`.
    pub(super) fn normals(&mut self, count: usize, scale: f64) -> Vec<f64> {
        (0..count).map(|_| scale * self.normal()).collect()
    }

    /// 0..count in random order.
    pub(super) fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}
