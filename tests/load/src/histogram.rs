//! Times in buckets of fixed relative width, so that a million of them cost no memory. Must not know what is measured.

use std::time::Duration;

/// Each power of two of microseconds is cut into this many buckets (as a power of two): under 1 % of width each.
const FINE_BITS: u32 = 7;
const FINE: u64 = 1 << FINE_BITS;
/// Longest time that is told apart, as a power of two of microseconds: a little over an hour.
const MAX_BITS: u32 = 32;
const BUCKETS: usize = ((MAX_BITS - FINE_BITS + 1) as usize) << FINE_BITS;

/// A distribution of times.
#[derive(Clone)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum_us: u64,
    max: Duration,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0, sum_us: 0, max: Duration::ZERO }
    }

    pub(crate) fn record(&mut self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).min((1 << MAX_BITS) - 1);
        self.counts[bucket(us)] += 1;
        self.total += 1;
        self.sum_us += us;
        self.max = self.max.max(time);
    }

    pub(crate) fn count(&self) -> u64 {
        self.total
    }

    pub(crate) fn max(&self) -> Duration {
        self.max
    }

    pub(crate) fn mean(&self) -> Duration {
        Duration::from_micros(self.sum_us.checked_div(self.total).unwrap_or(0))
    }

    /// The time that this share of all stays at or under, to the upper edge of its bucket; zero when there is none.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_micros(upper_us(bucket)).min(self.max);
            }
        }
        Duration::ZERO
    }
}

fn bucket(us: u64) -> usize {
    if us < FINE {
        return us as usize;
    }
    let shift = us.ilog2() - FINE_BITS;
    (((shift as u64) << FINE_BITS) + (us >> shift)) as usize
}

/// The largest time of a bucket.
fn upper_us(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * FINE {
        return bucket;
    }
    let shift = (bucket >> FINE_BITS) - 1;
    let mantissa = bucket - (shift << FINE_BITS);
    ((mantissa + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_lies_in_a_bucket_of_its_size() {
        for us in (0..5000).chain((0..400).map(|i| 1 << 12 | i << 14)).chain([(1 << MAX_BITS) - 1]) {
            let at = bucket(us);
            assert!(at < BUCKETS, "{us}");
            let upper = upper_us(at);
            assert!(us <= upper && upper <= us + us / 100, "{us} µs in a bucket up to {upper} µs");
            assert!(at == 0 || upper_us(at - 1) < us, "{us} also fits a lower bucket");
        }
    }

    #[test]
    fn quantiles_of_a_known_distribution() {
        let mut times = Histogram::new();
        assert_eq!(times.quantile(0.99), Duration::ZERO);
        for ms in 1..=1000 {
            times.record(Duration::from_millis(ms));
        }
        for (share, ms) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0), (1.0, 1000.0), (0.0, 1.0)] {
            let got = times.quantile(share).as_secs_f64() * 1e3;
            assert!((ms..=ms * 1.01).contains(&got), "{share}: {got} ms, not {ms} ms");
        }
        assert_eq!((times.count(), times.max()), (1000, Duration::from_secs(1)));
        assert_eq!(times.mean(), Duration::from_micros(500_500));
        times.record(Duration::from_hours(9));
        assert_eq!(times.max(), Duration::from_hours(9), "what is over the range still counts");
    }
}
