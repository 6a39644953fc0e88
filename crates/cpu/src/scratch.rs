//! Working memory that operations keep between calls: it grows at first use, never per step.

/// One cache line of floats: what vectors of floats are aligned to.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A growing run of floats, aligned to a cache line. What it holds is left from the last use.
#[derive(Default)]
pub(crate) struct Floats(Vec<Line>);

impl Floats {
    /// The first `len` floats.
    pub(crate) fn get(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        &mut self.0.as_flattened_floats()[..len]
    }

    /// Disjoint parts of the given sizes, each aligned to a cache line.
    pub(crate) fn parts<const N: usize>(&mut self, sizes: [usize; N]) -> [&mut [f32]; N] {
        let mut rest = self.get(sizes.iter().map(|size| size.next_multiple_of(16)).sum());
        sizes.map(|size| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(size.next_multiple_of(16));
            rest = tail;
            &mut part[..size]
        })
    }
}

trait Flatten {
    fn as_flattened_floats(&mut self) -> &mut [f32];
}

impl Flatten for Vec<Line> {
    fn as_flattened_floats(&mut self) -> &mut [f32] {
        // SAFETY: a line is sixteen floats without padding, so `len` lines are `16 * len` floats of the same allocation.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.len() * 16) }
    }
}

/// What one thread works in.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) floats: Floats,
    /// Candidates of the sampler: value and token.
    pub(crate) candidates: Vec<(f32, u32)>,
    /// Histogram of the sampler: tokens and probability mass per bin.
    pub(crate) bins: Vec<(usize, f64)>,
}

/// What an operation's tasks share.
#[derive(Default)]
pub(crate) struct Workspace {
    /// Widened inputs.
    pub(crate) x: Floats,
    /// A widened norm weight, or the hidden state of the experts.
    pub(crate) y: Floats,
    /// The hidden state of the experts in another order.
    pub(crate) z: Floats,
    /// What the experts of a few pairs gave.
    pub(crate) results: Floats,
    /// Pairs of tokens and experts, grouped.
    pub(crate) pairs: crate::ops::experts::Pairs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_disjoint() {
        let mut floats = Floats::default();
        let parts = floats.parts([3, 0, 17, 5]);
        assert_eq!(parts.each_ref().map(|p| p.len()), [3, 0, 17, 5]);
        for (i, part) in parts.into_iter().enumerate() {
            assert!(part.as_ptr().addr().is_multiple_of(64));
            part.fill(i as f32);
        }
        let all = floats.get(16 + 32 + 16);
        assert_eq!([all[0], all[2], all[16], all[32], all[48], all[52]], [0.0, 0.0, 2.0, 2.0, 3.0, 3.0]);
    }
}
