//! The batch sizes that decode steps are captured for.

use std::sync::Arc;

/// Batch sizes of captured steps, ascending; a step of fewer sequences is padded to the next one. None: steps are as large
/// as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Buckets(Arc<[usize]>);

impl Buckets {
    /// Powers of two below `largest`, and `largest` itself: a step is padded to less than twice its size, and few sizes take
    /// little time to capture. 0 has none.
    pub(crate) fn up_to(largest: usize) -> Self {
        let powers = (0..usize::BITS).map(|bit| 1 << bit).take_while(|&size| size < largest);
        Self(powers.chain((largest > 0).then_some(largest)).collect())
    }

    /// The sizes.
    pub(crate) fn sizes(&self) -> &[usize] {
        &self.0
    }

    /// The size that a decode step of so many sequences is padded to; `None` where it is larger than all of them, or empty.
    pub(crate) fn fitting(&self, num_seqs: usize) -> Option<usize> {
        let index = self.0.partition_point(|&size| size < num_seqs);
        self.0.get(index).copied().filter(|_| num_seqs > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_double_and_end_with_the_largest() {
        for (largest, sizes) in [
            (0, &[][..]),
            (1, &[1]),
            (2, &[1, 2]),
            (8, &[1, 2, 4, 8]),
            (9, &[1, 2, 4, 8, 9]),
            (64, &[1, 2, 4, 8, 16, 32, 64]),
        ] {
            assert_eq!(Buckets::up_to(largest).sizes(), sizes);
        }
    }

    #[test]
    fn a_step_takes_the_least_size_that_holds_it() {
        let buckets = Buckets::up_to(12);
        let fitting: Vec<_> = [0, 1, 2, 3, 5, 8, 9, 12, 13].map(|n| buckets.fitting(n)).into();
        let sizes = [1, 2, 4, 8, 8, 12, 12].map(Some);
        assert_eq!(fitting, [&[None][..], &sizes, &[None]].concat());
        assert_eq!(Buckets::default().fitting(1), None);
    }
}
